//! What comes in: connections, sessions, requests; and the answers that go back.
//!
//! This room checks who asks and whether the request makes sense, turns it into an [`crate::propose::Ask`] or a read of
//! this node's state, and turns the reply into an answer. It never writes to the store. Of Raft it knows refusals, and in
//! [`routing`] who leads and whether this node's state may be read.
//!
//! ```text
//!   tcp: frames, envelopes --+                            +--> api: one file per operation
//!                            +--> api: the dispatcher --> |
//!   peer: from other nodes --+                            +--> routing: to whoever leads --> other nodes
//! ```
//!
//! - [`tcp`], [`peer`], [`http`]: listeners; what they read becomes a request of [`api`], what it answers goes back
//! - [`api`]: what can be asked for; [`problem`]: what can go wrong with it
//! - [`routing`]: which node leads what, and how a request gets there
//! - [`access`]: who somebody is, and until when; [`guests`]: how many may be connected; [`tls`]: what they
//!   speak in
//! - [`scan`]: an index of all shards as one; [`readers`]: who reads it; [`flags`]: the room's settings

pub mod access;
mod api;
pub mod flags;
pub mod guests;
pub mod http;
pub mod peer;
mod problem;
pub mod readers;
pub mod routing;
mod scan;
pub mod tcp;
pub mod tls;

use std::sync::Arc;

use crate::clock::Clock;
use crate::metrics::Metrics;
use crate::placement::verify::Marks;
use crate::placement::{Cluster, Control};
use crate::propose::{Dispatches, Proposer};
use crate::store::Store;
use crate::task::{GroupId, Limits};
use access::auth::Auth;
use access::sessions::{Session, Sessions};
use problem::Problem;
use readers::Readers;
use routing::Router;

/// What every request may need of this node.
pub struct Service {
    pub store: Store,
    pub readers: Readers,
    pub clock: Arc<dyn Clock>,
    pub proposer: Proposer,
    /// Which attempts are out.
    pub dispatches: Arc<dyn Dispatches>,
    /// How long history is kept, in milliseconds; 0 is not at all.
    pub history_ms: u64,
    pub sessions: Arc<Sessions>,
    /// Who leads what.
    pub router: Router,
    pub auth: Auth,
    pub metrics: Arc<Metrics>,
    pub limits: Limits,
    /// No answer is larger, for its receiver has the same limit.
    pub frame_bytes_max: usize,
    pub shards: u16,
    pub cluster: Cluster,
    /// Of this node's replicas.
    pub digests: Arc<Marks>,
    pub control: Control,
}

impl Service {
    /// The group that `tasks` new tasks go to: each in turn, of those that this node leads.
    fn any_shard(&self, tasks: usize) -> GroupId {
        match self.router.is_alone() {
            true => self.proposer.any_shard(tasks),
            false => self.router.shard_here(tasks).unwrap_or_else(|| self.proposer.any_shard(tasks)),
        }
    }

    /// What is long to read is read by those who do nothing else.
    async fn read_page<T: Send + 'static>(
        self: &Arc<Self>,
        session: Arc<Session>,
        page: impl FnOnce(&Service, &Session) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let service = self.clone();
        self.readers.read(move || page(&service, &session)).await
    }
}
