//! What this node knows of its cluster: where the others are, what is wanted, who leads.
//!
//! One handle for all rooms that need to find another node. What is here may be old, and whoever acts on it finds out
//! where it does: a node that does not lead says so.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use openraft::rt::WatchReceiver as _;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::{NodeInfo, Table};
use crate::raft::{Groups, PeerNetwork};
use crate::task::GroupId;
use crate::task::locks::RwLock;
use crate::wire::peer::NodeStatus;

/// Who leads a group, as far as is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaderAt {
    pub node_id: u64,
    pub term: u64,
}

/// What another node has said of itself.
#[derive(Debug, Clone)]
pub struct Heard {
    pub status: Arc<NodeStatus>,
    pub at: Instant,
    /// How far its clock is ahead of ours, give or take half the time the question took.
    pub clock_ahead_us: i64,
    /// From the question to the answer.
    pub took: Duration,
}

/// Who this node is to others that begin a cluster with it; see [`super::fixed`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Founding {
    pub folder: String,
    /// The folder of each node with which the cluster was begun; empty before.
    pub founders: BTreeMap<u64, String>,
}

/// Cheap to clone.
#[derive(Clone)]
pub struct Cluster {
    inner: Arc<ClusterInner>,
}

struct ClusterInner {
    groups: Groups,
    network: PeerNetwork,
    nodes: RwLock<BTreeMap<u64, NodeInfo>>,
    table: watch::Sender<Arc<Table>>,
    /// Of groups that this node does not hold, as others have told.
    told: RwLock<BTreeMap<GroupId, LeaderAt>>,
    heard: RwLock<BTreeMap<u64, Heard>>,
    /// Counts what was heard.
    hearings: watch::Sender<u64>,
    ask: Notify,
    founding: RwLock<Founding>,
    stopping: AtomicBool,
    /// It answers clients.
    begun: AtomicBool,
}

impl Cluster {
    pub fn new(groups: Groups, network: PeerNetwork) -> Self {
        let inner = ClusterInner {
            groups,
            network,
            nodes: RwLock::default(),
            table: watch::Sender::new(Arc::default()),
            told: RwLock::default(),
            heard: RwLock::default(),
            hearings: watch::Sender::new(0),
            ask: Notify::new(),
            founding: RwLock::default(),
            stopping: AtomicBool::new(false),
            begun: AtomicBool::new(false),
        };
        Self { inner: Arc::new(inner) }
    }

    pub fn groups(&self) -> &Groups {
        &self.inner.groups
    }

    pub fn network(&self) -> &PeerNetwork {
        &self.inner.network
    }

    /// This node.
    pub fn node_id(&self) -> u64 {
        self.inner.groups.node_id()
    }

    pub fn node(&self, node_id: u64) -> Option<NodeInfo> {
        self.inner.nodes.read().get(&node_id).cloned()
    }

    /// There is no other node; asked with every request.
    pub fn is_alone(&self) -> bool {
        self.inner.nodes.read().len() <= 1
    }

    pub fn nodes_count(&self) -> u32 {
        u32::try_from(self.inner.nodes.read().len()).unwrap_or(u32::MAX)
    }

    /// Of all nodes, this one included, those that listen at this port for anybody.
    pub fn hosts_at(&self, port: u16) -> Vec<String> {
        let nodes = self.inner.nodes.read();
        let addresses = nodes.values().flat_map(|node| [&node.tcp, &node.http, &node.peer]);
        let hosts = addresses.filter_map(|address| {
            let (host, at) = address.rsplit_once(':')?;
            (at.parse() == Ok(port)).then(|| host.to_owned())
        });
        hosts.collect()
    }

    pub fn nodes(&self) -> Vec<NodeInfo> {
        self.inner.nodes.read().values().cloned().collect()
    }

    /// A node that is there, or is somewhere else than it was. One that goes away for a while stays known: what is sent
    /// to it finds out.
    pub fn set_node(&self, info: NodeInfo) {
        self.inner.network.set(info.node_id, &info.peer);
        self.inner.nodes.write().insert(info.node_id, info);
    }

    /// What the other nodes have said last, however long ago.
    pub fn statuses(&self) -> BTreeMap<u64, Heard> {
        self.inner.heard.read().clone()
    }

    pub fn status(&self, node_id: u64) -> Option<Heard> {
        self.inner.heard.read().get(&node_id).cloned()
    }

    /// It was heard of within `within`, and goes on.
    pub fn answers(&self, node_id: u64, within: Duration) -> bool {
        self.status(node_id).is_some_and(|heard| heard.at.elapsed() <= within && !heard.status.stopping)
    }

    /// Those that are starting or stopping, and are to be given nothing.
    pub fn unfit(&self) -> BTreeSet<u64> {
        self.statuses().into_iter().filter(|(_, heard)| heard.status.stopping).map(|(node, _)| node).collect()
    }

    pub(super) fn heard(&self, heard: Heard) {
        let node_id = heard.status.node_id;
        self.inner.heard.write().insert(node_id, heard);
        self.inner.hearings.send_modify(|count| *count += 1);
    }

    /// Changes whenever a node has said something.
    pub fn hearings(&self) -> watch::Receiver<u64> {
        self.inner.hearings.subscribe()
    }

    /// Has all nodes asked now, and not when it is time.
    pub fn ask_now(&self) {
        self.inner.ask.notify_one();
    }

    pub(super) async fn asked(&self) {
        self.inner.ask.notified().await;
    }

    pub fn founding(&self) -> Founding {
        self.inner.founding.read().clone()
    }

    pub fn set_founding(&self, founding: Founding) {
        *self.inner.founding.write() = founding;
    }

    /// This node hands over what it leads, and others are told to give it nothing.
    pub fn stopping(&self) -> bool {
        self.inner.stopping.load(Ordering::Acquire)
    }

    /// Others may give it the lead of something: it has begun and does not stop.
    pub fn takes_leads(&self) -> bool {
        self.inner.begun.load(Ordering::Acquire) && !self.stopping()
    }

    pub fn set_begun(&self) {
        self.inner.begun.store(true, Ordering::Release);
    }

    pub fn set_stopping(&self) {
        self.inner.stopping.store(true, Ordering::Release);
    }

    pub fn table(&self) -> watch::Receiver<Arc<Table>> {
        self.inner.table.subscribe()
    }

    pub fn set_table(&self, table: Table) {
        self.inner.table.send_if_modified(|known| {
            let changed = **known != table;
            if changed {
                *known = Arc::new(table);
            }
            changed
        });
    }

    /// Who leads `group`. `None` while nobody does, or while nothing was heard of it.
    pub fn leader(&self, group: GroupId) -> Option<LeaderAt> {
        let Some(here) = self.inner.groups.get(group) else {
            return self.inner.told.read().get(&group).copied();
        };
        if let Some(term) = here.leads(Duration::ZERO) {
            return Some(LeaderAt { node_id: self.node_id(), term });
        }
        let metrics = here.raft.metrics();
        let metrics = metrics.borrow_watched();
        let leader = metrics.current_leader.filter(|leader| *leader != here.replica)?;
        let member = *metrics.membership_config.membership().get_node(&leader)?;
        Some(LeaderAt { node_id: member.node_id, term: metrics.current_term })
    }

    /// What another node has told of a group that is not held here.
    pub fn told(&self, group: GroupId, leader: LeaderAt) {
        let mut told = self.inner.told.write();
        if told.get(&group).is_none_or(|known| known.term <= leader.term) {
            told.insert(group, leader);
        }
    }
}
