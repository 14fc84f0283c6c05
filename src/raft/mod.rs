//! Consensus: every group is an openraft group over this node's store.
//!
//! This room moves bytes between disks and peers and never decides what they mean: a log entry holds an encoded
//! [`crate::shard::Batch`], which [`crate::shard::apply`] understands. It gives the rooms above three things: a
//! [`Group`] to propose to, the replies, and an [`Observer`] that hears what was applied.
//!
//! - [`types`]: openraft's type parameters and the stored form of an entry
//! - [`log_store`]: entries and votes in the `log` family, durable through the node's one writer
//! - [`state_machine`]: from committed entries to `apply` to one batch in the `state` family
//! - [`groups`]: the groups of this node: start, marker of durable state, stop
//! - [`pacer`]: heartbeats and elections of all groups, by one clock; [`lease`]: what followers have promised a leader; both on
//!   [threads](crate::threads) of their own
//! - [`heartbeats`]: what is sent to one node at one moment, in one message
//! - [`network`]: what a replica sends to those on other nodes; [`peer_service`]: what it hears from them;
//!   [`peer_messages`]: openraft's messages as those of `proto/peer.proto`, and back
//! - [`peer_credentials`]: by what nodes know each other, certificates ([`peer_tls`]) or a secret ([`peer_secret`]);
//!   [`dial`]: who makes connections; [`flags`]: the room's settings
//!
//! What must hold for the log to be the write-ahead log of the state (the tests named keep it):
//!
//! - Entries are removed only below the durable applied index (`purge_never_outruns_durable_state`).
//! - Rows and `last applied` are stored in one batch (`state_machine`, one call of `write_state`).
//! - Vote and entries lie in one WAL, in order (`log_store`, one family, one writer).
//! - A restarted leader begins a new term (`enable_leader_restore` is off), so its fences grow.
//! - A replica id is used once in a group: it is stored with the log and goes with it.

pub mod dial;
pub mod flags;
pub mod groups;
mod heartbeats;
mod lease;
pub mod log_store;
pub mod network;
mod pacer;
pub mod peer_credentials;
mod peer_messages;
pub mod peer_secret;
pub mod peer_service;
mod peer_tls;
pub mod state_machine;
pub mod types;

use std::time::Duration;

#[cfg(test)]
pub(crate) mod alone;
#[cfg(test)]
mod tests;

pub use groups::{Begin, Group, Groups};
pub use network::PeerNetwork;
pub use peer_service::PeerService;
pub use state_machine::Observer;
pub use types::{Member, Raft, ReplicaId, TypeConfig};

/// A leader speaks to its followers this often when there is nothing else to say.
pub const HEARTBEAT: Duration = Duration::from_millis(150);
/// So long a follower that has heard its leader gives its vote to nobody else, and so long a leader that has heard a
/// majority may act as one. The same on every node of a cluster.
pub const LEASE: Duration = Duration::from_millis(450);
/// A group whose leader has brought nothing through its log for so long, not even a beat, has none, whatever was promised
/// to it: its disk hangs, or its task.
const STALLED_AFTER: Duration = Duration::from_secs(3);
