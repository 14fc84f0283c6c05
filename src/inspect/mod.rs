//! What is stored, looked at from outside: for people, and to compare replicas.
//!
//! This room knows the meaning of every row, also of those that only `raft` and `shard` can decode, and so stands above
//! them. It reads, and never writes.
//!
//! - [`rows`]: each row as a line; [`digest`]: whether two replicas hold the same

pub mod digest;
pub mod rows;
#[cfg(test)]
mod tests;

pub use digest::{Digest, DigestThreads, digest};
pub use rows::dump;
