//! What comes in: connections, sessions, requests; and the answers that go back.
//!
//! This room checks who asks and whether the request makes sense, turns it into an [`crate::propose::Ask`] or a read of
//! this node's state, and turns the reply into a message. It never writes to the store and knows nothing of Raft but
//! refusals.
//!
//! - [`tcp`]: one connection: frames in, frames out, bounds on both
//! - [`requests`]: where each message goes; [`tasks`], [`letters`], [`clients`], [`cluster`]: what it does
//! - [`list`]: pages of tasks; [`walk`]: an index of all shards as one
//! - [`sessions`]: who is who until when; [`auth`]: passwords and API keys
//! - [`http`]: health, readiness, metrics

pub mod auth;
mod clients;
mod cluster;
pub mod http;
mod letters;
mod list;
mod requests;
pub mod sessions;
mod tasks;
pub mod tcp;
mod walk;

use std::sync::Arc;

use crate::clock::Clock;
use crate::metrics::Metrics;
use crate::placement::{Cluster, Control};
use crate::propose::{Dispatches, Proposer};
use crate::store::Store;
use crate::task::Limits;
use auth::Auth;
use sessions::Sessions;

/// What every connection shares.
pub struct Service {
    pub store: Store,
    pub clock: Arc<dyn Clock>,
    pub proposer: Proposer,
    /// Which attempts are out.
    pub dispatches: Arc<dyn Dispatches>,
    pub history_ms: u64,
    pub sessions: Sessions,
    pub auth: Auth,
    pub metrics: Arc<Metrics>,
    pub limits: Limits,
    /// No answer is larger, for its receiver has the same limit.
    pub frame_bytes_max: usize,
    pub shards: u16,
    pub cluster: Cluster,
    pub control: Control,
}
