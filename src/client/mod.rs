//! The Rust client: everything the protocol of clients has, over one TCP connection, and receivers of callbacks by TCP,
//! gRPC, HTTP and UDP.
//!
//! Used by `boomtool`, `jepsen`, the tests and the benches, and by anyone who embeds it. It speaks the protocol of
//! `proto/client.proto` and knows nothing of shards, stores or Raft.
//!
//! ```text
//!   Client::submit ── permit ──> buffer of the connection ──> writer task ──> many frames in one write
//!        InFlight <── answer by number ── reader task <── many frames in one read
//! ```
//!
//! What it promises: a request is sent at most once, except that one answered "your session is gone" (which means: not
//! executed) goes out once more in a new session. When a connection breaks, what was under way ends with
//! [`ClientError::ConnectionLost`], since nobody can know its outcome; the next request connects again.
//!
//! - `link`, `connection`, `session`: how a request travels; `error`: how it can fail
//! - `registration`, `requests`, `dead_letters`, `cluster`: what can be asked for; `views`: what a node shows
//! - [`receiver`]: the other end of callbacks; `tally`: what came, counted

mod cluster;
mod connection;
mod dead_letters;
mod error;
mod link;
mod options;
pub mod receiver;
mod registration;
mod requests;
mod session;
mod tally;
mod views;

#[cfg(test)]
pub(crate) mod fake;

pub use crate::wire::proto::{ClusterGroup, ClusterGroups, ClusterNode, ClusterNodes, ClusterReplica};
pub use crate::wire::proto::{TaskState, occurrence::Outcome};
pub use dead_letters::{DeadLetterChoice, DeadLetterFilter, DeadLetterPage, PurgePage, ReplayPage, Replayed};
pub use error::ClientError;
pub use link::{Client, InFlight};
pub use options::{Credentials, Options};
pub use receiver::{Answer, DeadLetterCopy, Handler, HttpRequest, Received, Receiver, Refusal, Reply};
pub use registration::{
    BatchResult, Dedup, Due, OwnSettings, PendingBatch, PendingRegistration, Registered, Registration,
};
pub use requests::{ApiKey, Cancelled, ClientSettings, Page, Paused, Resumed, TaskFilter, TaskUpdate, Updated};
pub use tally::{Novelty, Percentiles, Tally, TallySummary};
pub use views::{DeadLetter, FailureView, PastOccurrence, TaskHistory, TaskView};
