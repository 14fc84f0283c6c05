//! The Rust client: everything the protocol of clients has, over one TCP connection to a node. The other end of callbacks
//! is the crate `boomerang-receiver`.
//!
//! Used by `boomtool`, `jepsen` and the tests, and by anyone who embeds it. It speaks the protocol of
//! `proto/client.proto`; of shards it knows who leads them, and nothing of stores or Raft.
//!
//! ```text
//!   Client::submit ── permit ──> which node? ──> buffer of its connection ──> writer task ──> many frames in one write
//!        InFlight <── answer by number ────────── reader task <── many frames in one read
//! ```
//!
//! What it promises, with one node: a request is sent at most once, except that one answered "your session is gone"
//! (which means: not executed) goes out again in a new session, and what there was no room for goes out
//! again when there is some (see [`Options::wait_for_room`]). When a connection breaks, what was under way ends
//! with [`ClientError::ConnectionLost`], since nobody can know its outcome; the next request connects again.
//!
//! In a cluster it keeps a map of who leads which shard, and a connection to each node it needs. What was certainly not
//! executed (the node does not lead, the session is gone, there was no connection) goes out again, to whoever leads by
//! then. What may have been executed goes out again only if that has the same effect as once: reads, and registrations
//! with a deduplication key, which the client gives to those that have none (see [`Options::retry_registrations`]). So a
//! failover is a pause to whoever registers or reads, and no task is stored twice. A cancellation, an edit or a pause
//! without an answer ends with [`ClientError::ConnectionLost`], as with one node. All of it within
//! [`Options::request_timeout`].
//!
//! - `handle`: sending and answers; `hub`: which node, and what is sent again
//! - `link`, `connection`, `session`: how a request travels; `error`: how it can fail
//! - `registration`, `requests`, `dead_letters`, `cluster`: what can be asked for; `views`: what a node shows
//! ```no_run
//! use boomerang_client::{Client, Credentials, Due, Options, Registration};
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let credentials = Credentials::Password { client_id: "orders".parse()?, password: "secret".into() };
//! let options = Options::new(vec!["127.0.0.1:9973".into()], credentials);
//! let client = Client::connect(options).await?;
//! // Answered when a majority has it on disk.
//! let payload = "hello, future me".into();
//! let registered = client.register(Registration { payload, due: Due::In(3_000), ..Default::default() }).await?;
//! println!("{} is due at {}", registered.task_id, registered.due_ms);
//! client.cancel(registered.task_id).await?;
//! # Ok(())
//! # }
//! ```

#![warn(missing_docs)]

mod cluster;
mod connection;
mod dead_letters;
mod error;
mod handle;
mod hub;
mod link;
mod options;
mod registration;
mod requests;
mod senders;
mod session;
#[cfg(feature = "tls")]
mod tls;
mod views;

#[cfg(any(test, feature = "fake"))]
#[allow(missing_docs, reason = "for the tests of this workspace")]
pub mod fake;

pub use boomerang_wire::proto::{
    ClusterGroup, ClusterGroups, ClusterNode, ClusterNodes, ClusterReplica, ClusterVerdict, ReplicaDigest,
};
pub use boomerang_wire::proto::{TaskState, occurrence::Outcome};
pub use dead_letters::{DeadLetterChoice, DeadLetterFilter, DeadLetterPage, PurgePage, ReplayPage, Replayed};
pub use error::ClientError;
pub use handle::{Client, InFlight};
pub use options::{Credentials, Options};
pub use registration::{
    BatchResult, Dedup, Due, OwnSettings, PendingBatch, PendingRegistration, Registered, Registration,
};
pub use requests::{ApiKey, Cancelled, ClientSettings, Page, Paused, Resumed, TaskFilter, TaskUpdate, Updated};
#[cfg(feature = "tls")]
pub use tls::{Tls, TlsError};
pub use views::{DeadLetter, FailureView, PastOccurrence, TaskHistory, TaskView};
