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
    // From the last byte: the first one is 0 in every stream that can be understood.
    let piece_len = data.last().map_or(1, |byte| usize::from(*byte) + 1);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{self, BoomerangEnvelope, boomerang_envelope::Payload};
    use boomerang_testkit::seed;
    use rand::{RngExt, rngs::StdRng};

    const INPUTS: usize = 50_000;

    fn text(rng: &mut StdRng) -> String {
        (0..rng.random_range(0..20)).map(|_| rng.random_range('a'..='z')).collect()
    }

    fn envelope(rng: &mut StdRng) -> BoomerangEnvelope {
        let payload: Vec<u8> = (0..rng.random_range(0..60)).map(|_| rng.random()).collect();
        let payload = match rng.random_range(0..7) {
            0 => Payload::AuthHandshake(proto::AuthHandshake {
                client_id: text(rng),
                password: text(rng),
                ..Default::default()
            }),
            1 => Payload::RegistrationRequest(proto::Task {
                payload: payload.into(),
                delay_ms: rng.random(),
                ..Default::default()
            }),
            2 => Payload::CancellationRequest(proto::CancellationRequest { task_id: text(rng) }),
            3 => Payload::SessionRefresh(proto::SessionRefreshRequest::default()),
            4 => Payload::CallbackRequest(proto::CallbackRequest {
                task_id: text(rng),
                payload: payload.into(),
                ..Default::default()
            }),
            5 => Payload::ListTasksRequest(proto::ListTasksRequest {
                client_id: text(rng),
                limit: rng.random(),
                ..Default::default()
            }),
            _ => Payload::ClientRegistration(proto::ClientRegistrationRequest {
                client_id: text(rng),
                callback: Some(proto::CallbackConfig {
                    protocol: rng.random_range(0..6),
                    endpoint: text(rng),
                    ..Default::default()
                }),
                retry: Some(proto::RetryPolicy { max_attempts: rng.random(), ..Default::default() }),
                ..Default::default()
            }),
        };
        BoomerangEnvelope { session_id: text(rng), payload: Some(payload), ..Default::default() }
    }

    /// One to four frames, and how many.
    fn stream(rng: &mut StdRng) -> (Vec<u8>, usize) {
        let count = rng.random_range(1..=4);
        let mut out = BytesMut::new();
        (0..count).for_each(|_| encode_frame(&envelope(rng), &mut out));
        (out.to_vec(), count)
    }

    #[test]
    fn fifty_thousand_inputs_and_no_surprise() {
        let seed = seed::one();
        let mut rng = seed.rng();
        let (mut sent, mut understood, mut flipped, mut flipped_understood) = (0, 0, 0, 0);
        for input in 0..INPUTS {
            let (mut bytes, count) = stream(&mut rng);
            match input % 5 {
                // As it is: every frame is understood, in whatever pieces it comes.
                0 => assert_eq!(frames(&bytes), count),
                // Cut off: all but the last ones.
                1 => {
                    bytes.truncate(rng.random_range(0..bytes.len()));
                    assert!(frames(&bytes) < count);
                }
                // A few bits: most of what they leave alone is still understood.
                2 => {
                    for _ in 0..rng.random_range(1..4) {
                        let at = rng.random_range(0..bytes.len());
                        bytes[at] ^= 1 << rng.random_range(0..8);
                    }
                    flipped += count;
                    flipped_understood += frames(&bytes);
                }
                // Good frames and then noise: the noise takes nothing back.
                3 => {
                    bytes.extend((0..rng.random_range(0..100)).map(|_| rng.random::<u8>()));
                    assert!(frames(&bytes) >= count);
                }
                _ => {
                    let noise: Vec<u8> = (0..rng.random_range(0..300)).map(|_| rng.random()).collect();
                    frames(&noise);
                    continue;
                }
            }
            sent += count;
            understood += frames(&bytes);
        }
        println!("{understood} of {sent} understood; with flipped bits {flipped_understood} of {flipped}");
        assert!(understood * 2 > sent, "{understood} of {sent}");
        assert!(flipped_understood * 4 > flipped, "{flipped_understood} of {flipped}");
        assert!(flipped_understood < flipped, "the bits did something");
    }

    /// A length above the limit ends the stream before anything is read for it.
    #[test]
    fn a_frame_above_the_limit_is_refused() {
        let seed = seed::one();
        let mut rng = seed.rng();
        let (good, count) = stream(&mut rng);
        let mut bytes = good.clone();
        bytes.extend((FUZZ_FRAME_BYTES_MAX as u32 + 1).to_be_bytes());
        bytes.extend(vec![0; FUZZ_FRAME_BYTES_MAX + 1]);
        bytes.extend(&good);
        assert_eq!(frames(&bytes), count);
    }
}
