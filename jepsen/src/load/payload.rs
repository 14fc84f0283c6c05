//! What a task says of itself: which one it is, which version, and how its receiver shall behave.

use std::fmt;

use bytes::Bytes;

use crate::history::Token;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Payload {
    pub token: Token,
    /// Raised by each edit.
    pub version: u32,
    /// So many attempts of an occurrence are refused first.
    pub refusals: u32,
    pub manner: Manner,
}

/// How its receiver goes about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Answers at once, and remembers nothing.
    Plain,
    /// Looks at fences, remembers what it has done, and now and then is late with its answer or forgets it.
    Fenced,
}

impl Payload {
    pub fn plain(token: Token) -> Self {
        Self { token, version: 1, refusals: 0, manner: Manner::Plain }
    }

    pub fn bytes(self) -> Bytes {
        self.to_string().into()
    }

    /// `None` for what no load has made.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        let mut parts = text.split(' ');
        let payload = Self {
            token: parts.next()?.parse().ok()?,
            version: parts.next()?.parse().ok()?,
            refusals: parts.next()?.parse().ok()?,
            manner: match parts.next()? {
                "plain" => Manner::Plain,
                "fenced" => Manner::Fenced,
                _ => return None,
            },
        };
        parts.next().is_none().then_some(payload)
    }
}

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let manner = match self.manner {
            Manner::Plain => "plain",
            Manner::Fenced => "fenced",
        };
        write!(f, "{} {} {} {manner}", self.token, self.version, self.refusals)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_nothing_else_is() {
        let payload = Payload { token: 7, version: 3, refusals: u32::MAX, manner: Manner::Fenced };
        assert_eq!(Payload::read(&payload.bytes()), Some(payload));
        for wrong in ["", "7", "7 3 0 other", "7 3 0 plain more", "x 3 0 plain"] {
            assert_eq!(Payload::read(wrong.as_bytes()), None, "{wrong}");
        }
    }
}
