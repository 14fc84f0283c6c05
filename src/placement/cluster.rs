//! What this node knows of its cluster: where the others are, what is wanted, who leads.
//!
//! One handle for all rooms that need to find another node. What is here may be old, and whoever acts on it finds out
//! where it does: a node that does not lead says so.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use openraft::rt::WatchReceiver as _;
use tokio::sync::watch;

use super::{NodeInfo, Table};
use crate::raft::{Groups, PeerNetwork};
use crate::task::GroupId;

/// Who leads a group, as far as is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaderAt {
    pub node_id: u64,
    pub term: u64,
}

/// Cheap to clone.
#[derive(Clone)]
pub struct Cluster {
    inner: Arc<Inner>,
}

struct Inner {
    groups: Groups,
    network: PeerNetwork,
    nodes: RwLock<BTreeMap<u64, NodeInfo>>,
    table: watch::Sender<Arc<Table>>,
    /// Of groups that this node does not hold, as others have told.
    told: RwLock<BTreeMap<GroupId, LeaderAt>>,
}

impl Cluster {
    pub fn new(groups: Groups, network: PeerNetwork) -> Self {
        let inner = Inner {
            groups,
            network,
            nodes: RwLock::default(),
            table: watch::Sender::new(Arc::default()),
            told: RwLock::default(),
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
        self.inner.nodes.read().expect("no panic under this lock").get(&node_id).cloned()
    }

    /// There is no other node; asked with every request.
    pub fn is_alone(&self) -> bool {
        self.inner.nodes.read().expect("no panic under this lock").len() <= 1
    }

    pub fn nodes_count(&self) -> u32 {
        u32::try_from(self.inner.nodes.read().expect("no panic under this lock").len()).unwrap_or(u32::MAX)
    }

    pub fn nodes(&self) -> Vec<NodeInfo> {
        self.inner.nodes.read().expect("no panic under this lock").values().cloned().collect()
    }

    /// A node that is there, or is somewhere else than it was. One that goes away for a while stays known: what is sent
    /// to it finds out.
    pub fn set_node(&self, info: NodeInfo) {
        self.inner.network.set(info.node_id, &info.peer);
        self.inner.nodes.write().expect("no panic under this lock").insert(info.node_id, info);
    }

    /// A node that will not come back.
    pub fn remove_node(&self, node_id: u64) {
        self.inner.network.remove(node_id);
        self.inner.nodes.write().expect("no panic under this lock").remove(&node_id);
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
            return self.inner.told.read().expect("no panic under this lock").get(&group).copied();
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
        let mut told = self.inner.told.write().expect("no panic under this lock");
        if told.get(&group).is_none_or(|known| known.term <= leader.term) {
            told.insert(group, leader);
        }
    }
}
