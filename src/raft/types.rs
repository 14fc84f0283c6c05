//! openraft's type parameters for Boomerang, and the stored form of log entries.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use bytes::Bytes;
use openraft::entry::{Entry, EntryPayload};
use openraft::impls::leader_id_std;
use serde::{Deserialize, Serialize};

use super::state_machine::StateMachine;
use crate::shard::Reply;
use crate::store::{StoreError, codec};

/// One of the copies of a group. Allocated once, never used again within its group.
pub type ReplicaId = u64;

openraft::declare_raft_types!(
    /// One leader per term, so that the term alone tells leaders apart.
    pub TypeConfig:
        D = Command,
        R = Replies,
        NodeId = ReplicaId,
        Node = Member,
        LeaderId = leader_id_std::LeaderId<u64, u64>,
        AsyncRuntime = openraft_rt_tokio::TokioRuntime
);

pub type Raft = openraft::Raft<TypeConfig, StateMachine>;
pub type LogId = openraft::alias::LogIdOf<TypeConfig>;
pub type Vote = openraft::alias::VoteOf<TypeConfig>;
pub type LogEntry = openraft::alias::EntryOf<TypeConfig>;
pub type Membership = openraft::Membership<ReplicaId, Member>;
pub type StoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;
pub type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;

/// An encoded batch. Reference counted: the log, the peers and `apply` share one copy.
#[derive(Clone, PartialEq, Eq)]
pub struct Command(pub Bytes);

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Command({} bytes)", self.0.len())
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// One reply per request of a batch; none for an entry of openraft's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replies(pub Vec<Reply>);

impl fmt::Display for Replies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} replies", self.0.len())
    }
}

/// The machine a replica is on. Its address is not here: addresses change, a membership only through the log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    pub node_id: u64,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {}", self.node_id)
    }
}

/// Who leads a term, as openraft names it.
pub fn leader_of(term: u64) -> openraft::alias::CommittedLeaderIdOf<TypeConfig> {
    openraft::alias::CommittedLeaderIdOf::<TypeConfig>::new(term)
}

pub fn log_id(term: u64, index: u64) -> LogId {
    LogId::new_term_index(term, index)
}

pub fn term_of(id: &LogId) -> u64 {
    id.committed_leader_id().term
}

pub fn vote(term: u64, voted_for: ReplicaId, committed: bool) -> Vote {
    Vote { leader_id: leader_id_std::LeaderId { term, voted_for }, committed }
}

/// A log entry on disk and on its way to a peer.
#[derive(Serialize, Deserialize)]
struct EntryRow {
    term: u64,
    index: u64,
    payload: PayloadRow,
}

/// Append only.
#[derive(Serialize, Deserialize)]
enum PayloadRow {
    Blank,
    Command(Bytes),
    Membership(MembershipRow),
}

#[derive(Serialize, Deserialize)]
pub struct MembershipRow {
    configs: Vec<BTreeSet<ReplicaId>>,
    members: BTreeMap<ReplicaId, Member>,
}

impl From<&Membership> for MembershipRow {
    fn from(membership: &Membership) -> Self {
        Self {
            configs: membership.get_joint_config().clone(),
            members: membership.nodes().map(|(id, member)| (*id, *member)).collect(),
        }
    }
}

impl MembershipRow {
    pub fn into_membership(self) -> Result<Membership, StoreError> {
        Membership::new(self.configs, self.members)
            .map_err(|error| StoreError::damaged("a membership", error.to_string()))
    }
}

pub fn encode_entry(entry: &LogEntry) -> Vec<u8> {
    const ENTRY_BYTES: usize = 32;
    let (payload, len) = match &entry.payload {
        EntryPayload::Blank => (PayloadRow::Blank, 0),
        EntryPayload::Normal(command) => (PayloadRow::Command(command.0.clone()), command.0.len()),
        EntryPayload::Membership(membership) => (PayloadRow::Membership(membership.into()), 0),
    };
    let row = EntryRow { term: term_of(&entry.log_id), index: entry.log_id.index, payload };
    codec::encode_sized(&row, ENTRY_BYTES + len)
}

pub fn decode_entry(bytes: &[u8]) -> Result<LogEntry, StoreError> {
    let row: EntryRow = codec::decode("a log entry", bytes)?;
    let payload = match row.payload {
        PayloadRow::Blank => EntryPayload::Blank,
        PayloadRow::Command(bytes) => EntryPayload::Normal(Command(bytes)),
        PayloadRow::Membership(row) => EntryPayload::Membership(row.into_membership()?),
    };
    Ok(Entry { log_id: log_id(row.term, row.index), payload })
}

/// The vote as it is stored.
#[derive(Serialize, Deserialize)]
pub struct VoteRow {
    term: u64,
    voted_for: ReplicaId,
    committed: bool,
}

impl From<&Vote> for VoteRow {
    fn from(vote: &Vote) -> Self {
        Self { term: vote.leader_id.term, voted_for: vote.leader_id.voted_for, committed: vote.committed }
    }
}

impl From<VoteRow> for Vote {
    fn from(row: VoteRow) -> Self {
        vote(row.term, row.voted_for, row.committed)
    }
}
