//! The bytes on the wire: generated messages, the frame around them, and the way from a message to the vocabulary.
//!
//! Used by the server (what comes in, and what goes out), the client and receivers. It holds no connection and decides
//! nothing; a value that came through [`convert`] is valid.
//!
//! What follows from `proto/` is in `src/generated`, so that whoever builds this needs no `protoc`. A test says whether it
//! is what comes of it, and writes it anew when `UPDATE_PROTO=1` is set.
//!
//! A frame is a 4-byte big-endian length and one [`proto::BoomerangEnvelope`]:
//!
//! ```text
//!   00 00 00 2a | BoomerangEnvelope (42 bytes) | 00 00 01 07 | BoomerangEnvelope (263 bytes) | ...
//! ```
//! ```
//! use boomerang_wire::proto::{BoomerangEnvelope, GetTaskRequest, boomerang_envelope::Payload};
//! use boomerang_wire::{FRAME_BYTES_MAX, decode_envelope, encode_frame, frame_codec};
//! use tokio_util::codec::Decoder;
//!
//! let asked = Payload::GetTaskRequest(GetTaskRequest { task_id: "a name".into(), ..Default::default() });
//! let envelope = BoomerangEnvelope { request_id: 7, payload: Some(asked), ..Default::default() };
//! let mut bytes = bytes::BytesMut::new();
//! encode_frame(&envelope, &mut bytes);
//! let frame = frame_codec(FRAME_BYTES_MAX).decode(&mut bytes).unwrap().expect("a whole frame");
//! assert_eq!(decode_envelope(frame.freeze()).unwrap(), envelope);
//! ```

#![warn(missing_docs)]

pub mod answers;
pub mod convert;
pub mod fuzz;
pub mod operations;
pub mod problems;
pub mod routing;

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use tokio_util::codec::LengthDelimitedCodec;

use proto::BoomerangEnvelope;

/// The messages of `proto/client.proto` and `proto/callback.proto`.
#[allow(clippy::pedantic, missing_docs)]
pub mod proto {
    include!("generated/boomerang.rs");
}

/// The messages of `proto/peer.proto`.
#[allow(clippy::pedantic, missing_docs)]
pub mod peer {
    include!("generated/boomerang.peer.rs");
}

/// The largest envelope a node takes unless its settings say otherwise.
pub const FRAME_BYTES_MAX: usize = 1024 * 1024;

/// What a client announces that understands the fields from 20 up.
pub const PROTOCOL: u32 = 20;

const LENGTH_BYTES: usize = 4;

/// Cuts a stream of bytes into frames; a frame larger than `frame_bytes_max` is an error before it is read.
pub fn frame_codec(frame_bytes_max: usize) -> LengthDelimitedCodec {
    LengthDelimitedCodec::builder()
        .big_endian()
        .length_field_length(LENGTH_BYTES)
        .max_frame_length(frame_bytes_max)
        .new_codec()
}

/// Appends one frame to `out`. Many can follow each other in one buffer and leave in one write.
pub fn encode_frame(envelope: &BoomerangEnvelope, out: &mut BytesMut) {
    let len = envelope.encoded_len();
    out.reserve(LENGTH_BYTES + len);
    out.put_u32(u32::try_from(len).expect("an envelope is far below 4 GiB"));
    envelope.encode(out).expect("a BytesMut grows");
}

/// Reads the envelope out of a frame. The payloads inside share the frame's memory.
pub fn decode_envelope(frame: Bytes) -> Result<BoomerangEnvelope, prost::DecodeError> {
    BoomerangEnvelope::decode(frame)
}
