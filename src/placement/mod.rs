//! Who hosts which group: from the nodes there are to the replicas each of them holds.
//!
//! A [`Table`] says which replicas every group is to have. It comes from the settings (one node alone, or a fixed list
//! of peers) or from etcd, where a controller writes it. Each node then does its own part of it: it hosts what it is
//! named for, lets go of what it is not, and, where it leads, moves the membership of the group towards the row.
//!
//! This room decides where replicas are and never what they hold. It is not on the way of any request: while etcd is
//! away nothing moves, and everything else goes on.
//!
//! - [`cluster`]: what this node knows of the others: addresses, the table, who leads
//! - [`verify`]: whether replicas are equal

pub mod cluster;
pub mod verify;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use cluster::{Cluster, LeaderAt};

use crate::raft::ReplicaId;
use crate::task::GroupId;

/// A node as it announces itself; addresses are `host:port`, as others reach it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    pub node_id: u64,
    pub peer: String,
    pub tcp: String,
    pub http: String,
    /// Replicas of a group are spread over zones; empty is a zone of its own kind.
    pub zone: String,
    pub version: String,
}

/// One copy of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ReplicaAt {
    pub replica: ReplicaId,
    pub node_id: u64,
    /// Learners follow and do not count; group 0 has one on every node that holds no voter of it.
    pub voter: bool,
}

/// The replicas a group is to have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupRow {
    /// Grows with each change. In epoch 1 the group begins, with the voters of this row.
    pub epoch: u64,
    /// The first voter leads when nothing speaks against it.
    pub replicas: Vec<ReplicaAt>,
    /// Above every replica id that the group ever had: none is used twice.
    pub next_replica: ReplicaId,
}

impl GroupRow {
    /// The replica that `node_id` is to hold.
    pub fn on(&self, node_id: u64) -> Option<ReplicaAt> {
        self.replicas.iter().find(|at| at.node_id == node_id).copied()
    }
}

/// The wanted replicas of all groups.
pub type Table = BTreeMap<GroupId, GroupRow>;
