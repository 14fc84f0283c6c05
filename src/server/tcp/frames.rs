//! From the bytes of a client to frames: a length in four bytes, the first the most significant, and as many bytes.
//!
//! Whoever has not shown who it is sends small ones: a handshake fits, with the longest of all it can hold, and memory is kept for nobody who may be anybody. A
//! frame that begins with the id of a session is somebody's, however large.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use prost::encoding::{WireType, decode_key, decode_varint};
use tokio_util::codec::Decoder;

const LENGTH_BYTES: usize = 4;
/// The largest frame of a stranger.
pub const STRANGER_BYTES_MAX: usize = 8 * 1024;
/// At the start of a frame: enough for the id of a session and what is before it.
const BEGINNING_BYTES: usize = 128;
/// Of an envelope.
const SESSION_ID_FIELD: u32 = 1;

/// The frame is larger than this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TooLarge {
    #[error("the frame is larger than {0} bytes; the connection is closed")]
    ForAnybody(usize),
    #[error(
        "the frame is larger than {STRANGER_BYTES_MAX} bytes, and nobody has authenticated; the connection is closed"
    )]
    ForAStranger,
}

/// `knows`: whether this is the id of a session.
pub struct Frames<K> {
    bytes_max: usize,
    is_known: bool,
    knows: K,
}

impl<K: FnMut(&str) -> bool> Frames<K> {
    pub fn new(bytes_max: usize, knows: K) -> Self {
        Self { bytes_max, is_known: false, knows }
    }

    /// Whoever sends has shown who it is.
    pub fn set_known(&mut self) {
        self.is_known = true;
    }
}

impl<K: FnMut(&str) -> bool> Decoder for Frames<K> {
    type Item = Bytes;
    type Error = io::Error;

    fn decode(&mut self, buffer: &mut BytesMut) -> io::Result<Option<Bytes>> {
        let Some(length) = buffer.first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let bytes = usize::try_from(u32::from_be_bytes(*length)).expect("at least 32 bits");
        if bytes > self.bytes_max {
            return Err(io::Error::new(io::ErrorKind::InvalidData, TooLarge::ForAnybody(self.bytes_max)));
        }
        if !self.is_known && bytes > STRANGER_BYTES_MAX {
            if buffer.len() < LENGTH_BYTES + BEGINNING_BYTES {
                return Ok(None);
            }
            let beginning = &buffer[LENGTH_BYTES..LENGTH_BYTES + BEGINNING_BYTES];
            if !session_id(beginning).is_some_and(|id| (self.knows)(id)) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, TooLarge::ForAStranger));
            }
            self.is_known = true;
        }
        if buffer.len() < LENGTH_BYTES + bytes {
            buffer.reserve(LENGTH_BYTES + bytes - buffer.len());
            return Ok(None);
        }
        buffer.advance(LENGTH_BYTES);
        Ok(Some(buffer.split_to(bytes).freeze()))
    }
}

/// Where it is written first, as everybody writes it.
fn session_id(mut beginning: &[u8]) -> Option<&str> {
    let (field, wire_type) = decode_key(&mut beginning).ok()?;
    if field != SESSION_ID_FIELD || wire_type != WireType::LengthDelimited {
        return None;
    }
    let bytes = usize::try_from(decode_varint(&mut beginning).ok()?).ok()?;
    str::from_utf8(beginning.get(..bytes)?).ok()
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::wire::proto::boomerang_envelope::Payload;
    use crate::wire::proto::{BoomerangEnvelope, Task};

    const MAX: usize = 64 * 1024;

    fn frame(session_id: &str, payload_bytes: usize) -> BytesMut {
        let task = Task { payload: vec![b'x'; payload_bytes].into(), ..Default::default() };
        let payload = Some(Payload::RegistrationRequest(task));
        let envelope = BoomerangEnvelope { session_id: session_id.into(), request_id: 1, payload }.encode_to_vec();
        let mut frame = BytesMut::from(&u32::try_from(envelope.len()).unwrap().to_be_bytes()[..]);
        frame.extend_from_slice(&envelope);
        frame
    }

    fn frames() -> Frames<impl FnMut(&str) -> bool> {
        Frames::new(MAX, |id: &str| id == "good")
    }

    #[test]
    fn a_frame_comes_when_it_is_whole() {
        let (mut frames, whole) = (frames(), frame("", 100));
        let mut buffer = BytesMut::new();
        for byte in &whole[..whole.len() - 1] {
            buffer.extend_from_slice(&[*byte]);
            assert_eq!(frames.decode(&mut buffer).unwrap(), None);
        }
        buffer.extend_from_slice(&whole[whole.len() - 1..]);
        buffer.extend_from_slice(&whole);
        for _ in 0..2 {
            assert_eq!(frames.decode(&mut buffer).unwrap().unwrap(), &whole[LENGTH_BYTES..]);
        }
        assert!(buffer.is_empty() && frames.decode(&mut buffer).unwrap().is_none());
        let empty = frames.decode(&mut BytesMut::from(&[0, 0, 0, 0][..])).unwrap();
        assert_eq!(empty.unwrap(), "");
    }

    #[test]
    fn a_stranger_sends_little_and_whoever_is_known_what_it_may() {
        let refused = |frames: &mut Frames<_>, mut buffer: BytesMut| {
            let error = frames.decode(&mut buffer).unwrap_err();
            *error.get_ref().unwrap().downcast_ref::<TooLarge>().unwrap()
        };
        assert_eq!(refused(&mut frames(), frame("", STRANGER_BYTES_MAX)), TooLarge::ForAStranger);
        assert_eq!(refused(&mut frames(), frame("bad", STRANGER_BYTES_MAX)), TooLarge::ForAStranger);
        assert!(frames().decode(&mut frame("", STRANGER_BYTES_MAX - 64)).unwrap().is_some());
        let mut known = frames();
        known.set_known();
        assert!(known.decode(&mut frame("", STRANGER_BYTES_MAX)).unwrap().is_some());
        assert_eq!(refused(&mut known, frame("", MAX)), TooLarge::ForAnybody(MAX));
        // As somebody who comes back with its session.
        let mut back = frames();
        assert!(back.decode(&mut frame("good", STRANGER_BYTES_MAX)).unwrap().is_some());
        assert!(back.decode(&mut frame("", STRANGER_BYTES_MAX)).unwrap().is_some(), "it is known from then on");
    }

    /// Nothing that a stranger announces takes memory before it is there.
    #[test]
    fn what_is_announced_takes_no_memory() {
        let mut buffer = BytesMut::from(&u32::try_from(MAX).unwrap().to_be_bytes()[..]);
        assert_eq!(frames().decode(&mut buffer).unwrap(), None);
        assert!(buffer.capacity() < STRANGER_BYTES_MAX, "{}", buffer.capacity());
    }
}
