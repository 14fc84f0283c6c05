//! openraft's messages as those of `proto/peer.proto`, and back.
//!
//! Out of a peer's message comes either a message openraft can be handed, or [`Malformed`], which names the field: what
//! openraft takes for granted about a message (and asserts) is checked here, so that a peer can be wrong without harm.
//! Whether the message is meant for this replica is for `peer_service` to say.

use openraft::entry::RaftEntry;
use openraft::raft::{
    AppendEntriesRequest, StreamAppendError, StreamAppendResult, TransferLeaderRequest, VoteRequest, VoteResponse,
};

use super::log_store::REPLICATED_BYTES_MAX;
use super::types::{
    self, LogEntry, LogId, Membership, MembershipRow, ReplicaId, SnapshotMeta, StoredMembership, TypeConfig, Vote,
    decode_entry, encode_entry, log_id, term_of,
};
use crate::store::codec;
use crate::wire::peer;

/// The largest message a peer takes. Far above what is replicated in one go, because one entry always goes, however
/// large: a limit that an entry exceeds would stop its group for good.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;

const _: () = assert!(MESSAGE_BYTES_MAX >= 16 * REPLICATED_BYTES_MAX);

/// A message that says something impossible.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {why}")]
pub struct Malformed {
    what: &'static str,
    why: String,
}

impl Malformed {
    pub fn new(what: &'static str, why: impl Into<String>) -> Self {
        Self { what, why: why.into() }
    }
}

impl From<Malformed> for tonic::Status {
    fn from(malformed: Malformed) -> Self {
        tonic::Status::invalid_argument(malformed.to_string())
    }
}

fn there<T>(what: &'static str, value: Option<T>) -> Result<T, Malformed> {
    value.ok_or_else(|| Malformed::new(what, "is missing"))
}

pub fn to_vote(vote: &Vote) -> peer::Vote {
    peer::Vote { term: vote.leader_id.term, replica: vote.leader_id.voted_for, committed: vote.committed }
}

pub fn from_vote(vote: Option<peer::Vote>) -> Result<Vote, Malformed> {
    let vote = there("vote", vote)?;
    Ok(types::vote(vote.term, vote.replica, vote.committed))
}

/// The vote of a leader: only a committed one may append or install.
pub fn from_leader_vote(vote: Option<peer::Vote>) -> Result<Vote, Malformed> {
    let vote = from_vote(vote)?;
    if vote.committed { Ok(vote) } else { Err(Malformed::new("vote", "is not that of a leader")) }
}

pub fn to_log_id(id: &LogId) -> peer::LogId {
    peer::LogId { term: term_of(id), index: id.index }
}

pub fn from_log_id(id: peer::LogId) -> LogId {
    log_id(id.term, id.index)
}

pub fn to_vote_request(to: peer::Address, request: &VoteRequest<TypeConfig>, pre_vote: bool) -> peer::VoteRequest {
    peer::VoteRequest {
        to: Some(to),
        vote: Some(to_vote(&request.vote)),
        last_log_id: request.last_log_id.as_ref().map(to_log_id),
        leadership_transfer: request.leadership_transfer,
        pre_vote,
    }
}

pub fn from_vote_request(request: peer::VoteRequest) -> Result<VoteRequest<TypeConfig>, Malformed> {
    Ok(VoteRequest {
        vote: from_vote(request.vote)?,
        last_log_id: request.last_log_id.map(from_log_id),
        leadership_transfer: request.leadership_transfer,
    })
}

pub fn to_vote_response(response: &VoteResponse<TypeConfig>) -> peer::VoteResponse {
    peer::VoteResponse {
        vote: Some(to_vote(&response.vote)),
        granted: response.vote_granted,
        last_log_id: response.last_log_id.as_ref().map(to_log_id),
    }
}

pub fn from_vote_response(response: peer::VoteResponse) -> Result<VoteResponse<TypeConfig>, Malformed> {
    let vote = from_vote(response.vote)?;
    Ok(VoteResponse::new(vote, response.last_log_id.map(from_log_id), response.granted))
}

pub fn to_append(to: Option<peer::Address>, request: &AppendEntriesRequest<TypeConfig>) -> peer::AppendRequest {
    peer::AppendRequest {
        to,
        vote: Some(to_vote(&request.vote)),
        prev_log_id: request.prev_log_id.as_ref().map(to_log_id),
        leader_commit: request.leader_commit.as_ref().map(to_log_id),
        entries: request.entries.iter().map(|entry| encode_entry(entry).into()).collect(),
    }
}

pub fn from_append(request: peer::AppendRequest) -> Result<AppendEntriesRequest<TypeConfig>, Malformed> {
    let vote = from_leader_vote(request.vote)?;
    let prev_log_id = request.prev_log_id.map(from_log_id);
    let mut last = prev_log_id;
    let mut entries: Vec<LogEntry> = Vec::with_capacity(request.entries.len());
    for bytes in &request.entries {
        let entry = decode_entry(bytes).map_err(|error| Malformed::new("entries", error.to_string()))?;
        let expected = last.map_or(0, |last| last.index + 1);
        if entry.index() != expected || last.is_some_and(|last| last > entry.log_id) {
            return Err(Malformed::new("entries", format!("{} does not follow {last:?}", entry.log_id)));
        }
        last = Some(entry.log_id);
        entries.push(entry);
    }
    if last.is_some_and(|last| term_of(&last) > vote.leader_id.term) {
        return Err(Malformed::new("entries", format!("{last:?} is not of {vote}'s time, but later")));
    }
    Ok(AppendEntriesRequest { vote, prev_log_id, leader_commit: request.leader_commit.map(from_log_id), entries })
}

pub fn to_append_response(result: StreamAppendResult<TypeConfig>) -> peer::AppendResponse {
    use peer::append_response::Result as Answer;
    let answer = match result {
        Ok(last) => Answer::Accepted(peer::Accepted { last_log_id: last.as_ref().map(to_log_id) }),
        Err(StreamAppendError::Conflict(id)) => Answer::Conflict(to_log_id(&id)),
        Err(StreamAppendError::HigherVote(vote)) => Answer::HigherVote(to_vote(&vote)),
    };
    peer::AppendResponse { result: Some(answer) }
}

pub fn from_append_response(response: peer::AppendResponse) -> Result<StreamAppendResult<TypeConfig>, Malformed> {
    use peer::append_response::Result as Answer;
    Ok(match there("result", response.result)? {
        Answer::Accepted(accepted) => Ok(accepted.last_log_id.map(from_log_id)),
        Answer::Conflict(id) => Err(StreamAppendError::Conflict(from_log_id(id))),
        Answer::HigherVote(vote) => Err(StreamAppendError::HigherVote(from_vote(Some(vote))?)),
    })
}

pub fn to_transfer(to: peer::Address, request: &TransferLeaderRequest<TypeConfig>) -> peer::TransferRequest {
    peer::TransferRequest {
        to: Some(to),
        from: Some(to_vote(request.from_leader())),
        candidate: *request.to_node_id(),
        last_log_id: request.last_log_id().map(to_log_id),
    }
}

pub fn from_transfer(request: peer::TransferRequest) -> Result<TransferLeaderRequest<TypeConfig>, Malformed> {
    let from = from_leader_vote(request.from)?;
    let candidate: ReplicaId = request.candidate;
    Ok(TransferLeaderRequest::new(from, candidate, request.last_log_id.map(from_log_id)))
}

pub fn to_snapshot_header(to: peer::Address, vote: &Vote, meta: &SnapshotMeta) -> peer::SnapshotHeader {
    let membership: &Membership = meta.last_membership.membership();
    peer::SnapshotHeader {
        to: Some(to),
        vote: Some(to_vote(vote)),
        last_log_id: meta.last_log_id.as_ref().map(to_log_id),
        membership: codec::encode(&MembershipRow::from(membership)).into(),
        membership_log_id: meta.last_membership.log_id().as_ref().map(to_log_id),
    }
}

pub fn from_snapshot_header(header: peer::SnapshotHeader) -> Result<(Vote, SnapshotMeta), Malformed> {
    let vote = from_leader_vote(header.vote)?;
    let last_log_id = from_log_id(there("last_log_id", header.last_log_id)?);
    if term_of(&last_log_id) > vote.leader_id.term {
        return Err(Malformed::new("last_log_id", format!("{last_log_id} is not of {vote}'s time, but later")));
    }
    let row: MembershipRow = codec::decode("a membership", &header.membership)
        .map_err(|error| Malformed::new("membership", error.to_string()))?;
    let membership = row.into_membership().map_err(|error| Malformed::new("membership", error.to_string()))?;
    let membership_log_id = header.membership_log_id.map(from_log_id);
    if membership_log_id.is_some_and(|id| id > last_log_id) {
        return Err(Malformed::new("membership_log_id", "is later than last_log_id"));
    }
    let last_membership = StoredMembership::new(membership_log_id, membership);
    Ok((vote, SnapshotMeta { last_log_id: Some(last_log_id), last_membership }))
}
