//! The entry point of the fuzz target `fuzz/fuzz_targets/frames.rs`, and of the short fixed run in the tests.
//!
//! Whatever the bytes are: no panic, no frame above the limit, and what was understood says the same after another
//! round through the encoder.

use bytes::BytesMut;
use tokio_util::codec::Decoder;

use super::{decode_envelope, encode_frame, frame_codec};

/// Small, so that a fuzzer meets it.
const FUZZ_FRAME_BYTES_MAX: usize = 4096;

/// Feeds `data` in pieces, as a network would, and returns how many envelopes were understood.
pub fn frames(data: &[u8]) -> usize {
    let mut codec = frame_codec(FUZZ_FRAME_BYTES_MAX);
    let mut buffer = BytesMut::new();
    let mut understood = 0;
    let piece_len = data.first().map_or(1, |byte| usize::from(*byte) + 1);
    for piece in data.chunks(piece_len) {
        buffer.extend_from_slice(piece);
        loop {
            match codec.decode(&mut buffer) {
                Err(_) => return understood,
                Ok(None) => break,
                Ok(Some(frame)) => {
                    assert!(frame.len() <= FUZZ_FRAME_BYTES_MAX);
                    let Ok(envelope) = decode_envelope(frame.freeze()) else { continue };
                    understood += 1;
                    let mut again = BytesMut::new();
                    encode_frame(&envelope, &mut again);
                    let second = decode_envelope(again.freeze().split_off(4)).expect("what we encode, we decode");
                    assert_eq!(envelope, second);
                }
            }
        }
    }
    understood
}
