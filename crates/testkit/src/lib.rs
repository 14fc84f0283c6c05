//! What tests, benches and fault tests share, and nothing of the server.
//!
//! - [`OwnAddress`]: an address for a process that is yet to begin
//! - [`seed`]: where chance comes from in tests

mod address;
pub mod seed;

pub use address::OwnAddress;
