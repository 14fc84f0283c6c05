//! What a task says of itself, in its payload: which one it is, which version, and how its receiver shall behave.

use bytes::Bytes;

use crate::history::{FIRST_VERSION, Token};

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Payload {
    pub token: Token,
    /// Raised by each edit.
    pub version: u32,
    /// So many attempts of an occurrence are refused first.
    pub refusals: u32,
    /// Its receiver looks at fences, and remembers what it has done ([`crate::effects`]).
    pub fenced: bool,
}

impl Payload {
    /// Of a task that was just made, for a receiver that takes everything and remembers nothing.
    pub fn plain(token: Token) -> Self {
        Self { token, version: FIRST_VERSION, refusals: 0, fenced: false }
    }

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
