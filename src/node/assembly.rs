//! The rooms of a node, put together once: for a process, and for a node of the simulation.
//!
//! Whoever asks brings what differs between the two: the store and its writer, the clock, the network between nodes, and what
//! carries callbacks. It comes in two steps, because between them the others must be served, and this node gets what it is to
//! hold: those who begin a group together speak to each other.
//!
//! ```text
//!   Foundation::lay   groups, ledger, cluster; they look after themselves from here on
//!        |            ... peers are served; placement has this node hold its replicas ...
//!   Foundation::build proposer, firing
//!        v
//!      Rooms          ... listeners for clients ...
//! ```

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use futures::future::BoxFuture;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use crate::callback::Callbacks;
use crate::clock::Clock;
use crate::firing::hand_over::hand_over;
use crate::firing::{self, Firing, FiringSettings, Ledger};
use crate::metrics::Metrics;
use crate::placement::{Cluster, HandOver, clock_guard};
use crate::propose::{self, DiskState, Proposer};
use crate::raft::groups::{self, GroupError};
use crate::raft::{Groups, Observer, PeerNetwork, ReplicaId};
use crate::store::Store;
use crate::store::writer::Writer;
use crate::task::GroupId;

/// What a node is made of.
pub struct NodeParts {
    /// Name of the cluster: nodes of another one are refused.
    pub cluster: String,
    pub node_id: u64,
    pub shards: u16,
    pub store: Store,
    pub writer: Writer,
    /// Where snapshots are put together before they replace a replica.
    pub staging: PathBuf,
    pub clock: Arc<dyn Clock>,
    pub network: PeerNetwork,
    pub firing: FiringSettings,
    pub metrics: Arc<Metrics>,
    /// Told of what is applied, in this order, after the ledger.
    pub observers: Vec<Arc<dyn Observer>>,
}

/// A node that holds groups, and does not fire yet.
pub struct Foundation {
    pub groups: Groups,
    pub cluster: Cluster,
    pub ledger: Arc<Ledger>,
    shards: u16,
    store: Store,
    clock: Arc<dyn Clock>,
    firing: FiringSettings,
    metrics: Arc<Metrics>,
    helpers: JoinSet<()>,
}

/// A node that takes on work and fires. Ends when it is dropped, without order; see [`Firing::drain`] and [`Groups::stop`].
pub struct Rooms {
    pub groups: Groups,
    pub cluster: Cluster,
    pub ledger: Arc<Ledger>,
    pub proposer: Proposer,
    pub firing: Firing,
    /// What looks after groups and clocks.
    pub helpers: JoinSet<()>,
}

impl Foundation {
    /// Opens the groups that the store holds.
    pub async fn lay(parts: NodeParts) -> Result<Self, GroupError> {
        let NodeParts { cluster, node_id, shards, store, writer, staging, clock, network, firing, metrics, observers } =
            parts;
        let ledger = Ledger::new(store.clone(), clock.clone(), firing, shards);
        let observers: Vec<_> = [ledger.clone() as Arc<dyn Observer>].into_iter().chain(observers).collect();
        let groups = Groups::start(groups::GroupsParts {
            cluster,
            node_id,
            shards,
            store: store.clone(),
            writer,
            staging,
            network: network.clone(),
            observer: Arc::new(observers),
        })
        .await?;
        let cluster = Cluster::new(groups.clone(), network);
        let mut helpers = JoinSet::new();
        // From the very first: what is led from here on is stored, and fires by this clock.
        helpers.spawn(groups.clone().look_after());
        helpers.spawn(clock_guard::watch(cluster.clone()));
        Ok(Self { groups, cluster, ledger, shards, store, clock, firing, metrics, helpers })
    }

    /// How placement gives the lead of a group away.
    pub fn hand_over(&self) -> Arc<dyn HandOver> {
        Arc::new(HandOvers { groups: self.groups.clone(), ledger: self.ledger.clone() })
    }

    /// From here on this node takes on work, as far as `disk` lets it, and whatever it leads fires.
    pub fn build(self, disk: watch::Receiver<DiskState>, callbacks: Callbacks) -> Rooms {
        let Self { groups, cluster, ledger, shards, store, clock, firing, metrics, helpers } = self;
        let proposer = Proposer::start(propose::ProposerParts {
            groups: groups.clone(),
            clock: clock.clone(),
            dispatches: ledger.clone(),
            disk,
            store: store.clone(),
            shards,
            keep_history: firing.history_ms > 0,
        });
        let firing = Firing::start(firing::FiringParts {
            ledger: ledger.clone(),
            clock,
            store,
            groups: groups.clone(),
            proposer: proposer.clone(),
            callbacks,
            metrics,
            deliveries: TaskTracker::new(),
        });
        Rooms { groups, cluster, ledger, proposer, firing, helpers }
    }
}

/// Firing rests before another node leads.
struct HandOvers {
    groups: Groups,
    ledger: Arc<Ledger>,
}

impl HandOver for HandOvers {
    fn hand_over(&self, group: GroupId, to: ReplicaId) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let Some(group) = self.groups.get(group) else { return };
            if let Err(error) = hand_over(&self.ledger, &group, Some(to), &BTreeSet::new()).await {
                tracing::warn!(%error, "leadership was not handed over");
            }
        })
    }
}
