//! From this node's groups to their replicas on other nodes.

use std::sync::Arc;

use openraft::errors::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse};
use openraft::{AnyError, OptionalSend};

use super::state_machine::SnapshotData;
use super::types::{Member, ReplicaId, TypeConfig, Vote};
use crate::task::GroupId;

#[derive(Clone, Default)]
pub struct PeerNetwork(Arc<()>);

impl PeerNetwork {
    pub fn for_group(&self, _group: GroupId) -> GroupNetwork {
        GroupNetwork
    }
}

pub struct GroupNetwork;
pub struct Peer(Member);

impl RaftNetworkFactory<TypeConfig> for GroupNetwork {
    type Network = Peer;
    async fn new_client(&mut self, _target: ReplicaId, node: &Member) -> Peer {
        Peer(*node)
    }
}

impl Peer {
    fn unreachable(&self) -> Unreachable<TypeConfig> {
        Unreachable::new(&AnyError::error(format!("no address is known for {}", self.0)))
    }
}

impl RaftNetworkV2<TypeConfig> for Peer {
    type SnapshotData = SnapshotData;
    async fn append_entries(
        &mut self,
        _rpc: AppendEntriesRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        Err(self.unreachable().into())
    }
    async fn vote(
        &mut self,
        _rpc: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        Err(self.unreachable().into())
    }
    async fn full_snapshot(
        &mut self,
        _vote: Vote,
        _snapshot: openraft::alias::SnapshotOf<TypeConfig, SnapshotData>,
        _cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        Err(self.unreachable().into())
    }
}
