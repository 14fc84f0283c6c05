//! What a simulated task says of itself, in its payload.

use bytes::Bytes;

use crate::history::Token;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Payload {
    pub token: Token,
    pub version: u32,
    /// So many attempts of an occurrence are refused first.
    pub refusals: u32,
    /// Its receiver looks at fences.
    pub fenced: bool,
}

impl Payload {
    pub fn bytes(self) -> Bytes {
        let Self { token, version, refusals, fenced } = self;
        format!("{token} {version} {refusals} {}", u8::from(fenced)).into()
    }

    /// `None` for what no load has made.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let mut parts = std::str::from_utf8(bytes).ok()?.split(' ');
        let payload = Self {
            token: parts.next()?.parse().ok()?,
            version: parts.next()?.parse().ok()?,
            refusals: parts.next()?.parse().ok()?,
            fenced: parts.next()? == "1",
        };
        parts.next().is_none().then_some(payload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let payload = Payload { token: 7, version: 3, refusals: u32::MAX, fenced: true };
        assert_eq!(Payload::read(&payload.bytes()), Some(payload));
        assert_eq!(Payload::read(b"7 3 0 1 more"), None);
        assert_eq!(Payload::read(b"x"), None);
    }
}
