//! Boomerang.
pub mod raft;
pub mod shard;
pub mod store;
pub mod task;
pub mod wire;
