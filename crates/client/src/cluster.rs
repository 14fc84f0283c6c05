//! The cluster: its nodes, its groups, and where replicas are to be. For administrators.
//!
//! What a node shows of the cluster has no other form than the message: it is looked at, and nothing is made of it.

use super::error::unexpected;
use super::{Client, ClientError};
use boomerang_wire::proto::cluster_request::Ask;
use boomerang_wire::proto::cluster_response::Answer;
use boomerang_wire::proto::{
    ClusterGroups, ClusterGroupsRequest, ClusterNodes, ClusterNodesRequest, ClusterRequest, ClusterVerdict,
    ClusterVerifyRequest, DrainNode, MoveReplica, boomerang_envelope::Payload,
};

impl Client {
    /// The nodes, as the one that answers sees them.
    pub async fn cluster_nodes(&self) -> Result<ClusterNodes, ClientError> {
        match self.ask_cluster(Ask::Nodes(ClusterNodesRequest {})).await? {
            Some(Answer::Nodes(nodes)) => Ok(nodes),
            _ => Err(unexpected("the wrong kind of answer to a question about the nodes")),
        }
    }

    /// The groups and their replicas: the cluster's own, and one for each shard.
    pub async fn cluster_groups(&self) -> Result<ClusterGroups, ClientError> {
        match self.ask_cluster(Ask::Groups(ClusterGroupsRequest {})).await? {
            Some(Answer::Groups(groups)) => Ok(groups),
            _ => Err(unexpected("the wrong kind of answer to a question about the groups")),
        }
    }

    /// Has every replica of a group compute a digest of its state at the same entry. Group 0 is the cluster's own.
    pub async fn verify_group(&self, group: u32) -> Result<ClusterVerdict, ClientError> {
        match self.ask_cluster(Ask::Verify(ClusterVerifyRequest { group })).await? {
            Some(Answer::Verdict(verdict)) => Ok(verdict),
            _ => Err(unexpected("the wrong kind of answer to a question about replicas")),
        }
    }

    /// Decides that a replica goes from one node to another. Returns before it is there.
    pub async fn move_replica(&self, shard: u16, from_node: u64, to_node: u64) -> Result<(), ClientError> {
        self.ask_cluster(Ask::Move(MoveReplica { shard: shard.into(), from_node, to_node })).await.map(drop)
    }

    /// Decides that a node is to hold nothing. Returns before it does.
    pub async fn drain_node(&self, node_id: u64) -> Result<(), ClientError> {
        self.ask_cluster(Ask::Drain(DrainNode { node_id })).await.map(drop)
    }

    /// Decides that a node may hold replicas again.
    pub async fn undrain_node(&self, node_id: u64) -> Result<(), ClientError> {
        self.ask_cluster(Ask::Undrain(DrainNode { node_id })).await.map(drop)
    }

    async fn ask_cluster(&self, ask: Ask) -> Result<Option<Answer>, ClientError> {
        match self.request(Payload::ClusterRequest(ClusterRequest { ask: Some(ask) })).await? {
            Payload::ClusterResponse(answer) => Ok(answer.answer),
            _ => Err(unexpected("the wrong kind of answer to a question about the cluster")),
        }
    }
}
