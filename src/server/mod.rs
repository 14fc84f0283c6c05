//! What comes in: connections, sessions, requests; and the answers that go back.
//!
//! This room checks who asks and whether the request makes sense, turns it into an [`crate::propose::Ask`] or a read of
//! this node's state, and turns the reply into a message. It never writes to the store. Of Raft it knows refusals, and in
//! [`route`] who leads and whether this node's state may be read.
//!
//! - [`tcp`]: one connection: frames in, frames out, bounds on both
//! - [`envelopes`]: who asks, and where that goes; [`requests`]: what it means on this node; [`tasks`], [`letters`],
//!   [`clients`], [`cluster`]: what it does; [`problem`]: what went wrong
//! - [`list`]: pages of tasks; [`walk`]: an index of all shards as one; [`parts`]: what of it is read here; [`readers`]: by
//!   whom
//! - [`route`]: which node leads what; [`forward`]: from one node to another; [`spread`]: a request in a cluster
//! - [`sessions`]: who is who until when; [`auth`]: passwords and API keys
//! - [`http`]: health, readiness, metrics, where shards are led

pub mod auth;
mod clients;
mod cluster;
mod envelopes;
pub mod forward;
pub mod http;
mod letters;
mod list;
mod parts;
mod problem;
pub mod readers;
mod requests;
pub mod route;
pub mod sessions;
mod spread;
mod tasks;
pub mod tcp;
mod walk;

use std::sync::Arc;

use crate::clock::Clock;
use crate::metrics::Metrics;
use crate::placement::verify::Marks;
use crate::placement::{Cluster, Control};
use crate::propose::{Dispatches, Proposer};
use crate::store::Store;
use crate::task::{GroupId, Limits};
use crate::wire::proto::boomerang_envelope::Payload;
use crate::wire::proto::{self, Status};
use auth::Auth;
use problem::Problem;
use readers::Readers;
use route::Router;
use sessions::{Session, SessionError, Sessions};

/// Sends the answer to one request; called once, from any task.
type Respond = Box<dyn FnOnce(Payload) + Send>;

/// The answer to what is no request.
fn misunderstood(text: impl Into<String>) -> Payload {
    Payload::ErrorResponse(proto::ErrorResponse { status: Status::InvalidRequest as i32, error_message: text.into() })
}

/// What every connection shares.
pub struct Service {
    pub store: Store,
    pub readers: Readers,
    pub clock: Arc<dyn Clock>,
    pub proposer: Proposer,
    /// Which attempts are out.
    pub dispatches: Arc<dyn Dispatches>,
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
        session: Result<Arc<Session>, SessionError>,
        page: impl FnOnce(&Service, &Session) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let (service, session) = (self.clone(), session?);
        self.readers.read(move || page(&service, &session)).await
    }
}
