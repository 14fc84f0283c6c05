//! What the log and the state owe each other, tried on the real store.
//!
//! - [`suite`]: openraft's own conformance suite
//! - [`log`]: what is durable when, torn tails, the entries in memory against those on disk
//! - [`crash`]: child processes killed at any instant, with SIGKILL
//! - [`snapshot`]: a shard as a stream and back; replay
//! - [`groups`]: one fsync for all groups, restart, purge, supervision
//!
//! [`world`] makes the entries and knows, independently of RocksDB, what state they must lead to.
//!
//! Two kinds of ends are told apart. A *kill* loses what the process held, which here is the memtables of `state`;
//! what was written to a file is safe in the system's cache. It is tried for real, by SIGKILL on a child process: a
//! copy of an open database would be of many moments at once. A *power cut* loses as well what was not synced; no
//! process can do that to itself, so it is simulated by cutting the newest WAL file back to what was synced, see
//! [`bench::PowerCut`].

mod bench;
mod crash;
mod groups;
mod log;
mod snapshot;
mod suite;
mod world;
