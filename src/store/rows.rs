//! What the stored values hold. Kept apart from what the code computes with, so that a change here is seen for what it
//! is: a change of the stored format (see [`super::codec`]).

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::task::{
    ClientId, ClientLimits, DeadLetterId, Failure, InstantMs, Policy, PolicyId, Recurrence, Tags, TaskId,
};

/// Written when the task is registered and when a client changes it, removed once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskRow {
    pub client: ClientId,
    pub policy: PolicyId,
    pub first_due_ms: InstantMs,
    /// The occurrence that is due at `first_due_ms`: 0, unless the task was moved.
    pub first_occurrence: u64,
    pub recurrence: Option<Recurrence>,
    /// Grows with each change by a client; 1 at first.
    pub version: u64,
    pub tags: Option<Tags>,
    pub role: Role,
    pub payload: Bytes,
}

/// What a task is there for. Append only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// A client registered it.
    Own,
    /// It delivers an occurrence in the name of another task: one that overlaps the next, or a dead letter that is
    /// played again.
    StandIn { task: TaskId, occurrence: u64, due_ms: InstantMs },
    /// It takes the copy of a dead letter to its destination.
    Copy(Box<CopyOf>),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyOf {
    pub letter: DeadLetterId,
    pub occurrence: u64,
    pub due_ms: InstantMs,
    pub attempts: u32,
    pub failure: Failure,
}

/// One pending attempt, in the timeline and in its client's. Its key says when it is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineRow {
    pub occurrence: u64,
    pub attempt: u32,
    pub recurring: bool,
}

/// The due instant of what is paused: it never comes.
pub const NEVER: InstantMs = InstantMs::MAX;

/// Where a task stands, once that differs from its first occurrence and attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CursorRow {
    pub due_ms: InstantMs,
    pub occurrence: u64,
    pub attempt: u32,
    /// Why the attempt before failed, and when.
    pub failure: Option<(Failure, InstantMs)>,
    /// When it was due, if it is paused and this attempt may have been out by then.
    pub out_due_ms: Option<InstantMs>,
}

impl CursorRow {
    pub fn is_paused(&self) -> bool {
        self.due_ms == NEVER
    }

    /// The instant that says whether an earlier leader may have dispatched this attempt: a pause does not change that.
    pub fn armed_by_ms(&self) -> InstantMs {
        self.out_due_ms.unwrap_or(self.due_ms)
    }
}

/// A policy and how many tasks of the shard use it; it goes with the last one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyRow {
    pub policy: Policy,
    pub tasks: u64,
}

/// An occurrence whose every attempt failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetterRow {
    pub client: ClientId,
    /// In full: the task's own may be gone.
    pub policy: Policy,
    pub payload: Bytes,
    pub tags: Option<Tags>,
    pub occurrence: u64,
    pub due_ms: InstantMs,
    pub attempts: u32,
    pub failure: Failure,
    pub copy: CopyState,
}

/// What became of the copy for the destination of dead letters. Append only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CopyState {
    /// The destination is no URL, or there is none.
    None,
    UnderWay,
    Delivered,
    Failed(Failure),
}

/// The answer to a registration with a deduplication key, until it expires.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DedupRow {
    pub id: TaskId,
    pub due_ms: InstantMs,
    pub expires_ms: InstantMs,
}

/// What is known of a sender of registrations: those it may send again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SenderRow {
    /// All before this number have been answered, or given up, and never come again.
    pub answered_below: u64,
    /// The others that were stored, in ascending order.
    pub stored: Vec<StoredRow>,
    /// When one of its registrations was stored last. A sender that has stored nothing for long is forgotten.
    pub seen_ms: InstantMs,
}

/// The answer to a registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredRow {
    pub number: u64,
    pub id: TaskId,
    pub due_ms: InstantMs,
}

/// What became of an occurrence, or of several in a row from this one on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryRow {
    pub client: ClientId,
    pub ended: Ended,
    pub count: u64,
    pub due_ms: InstantMs,
    /// When the last attempt left; 0 when it was not sent, or the task was cancelled.
    pub dispatched_ms: InstantMs,
    pub attempts: u32,
    pub failure: Option<Failure>,
}

/// How an occurrence ended. Append only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ended {
    Acknowledged,
    Dead,
    Cancelled,
    Skipped,
    Merged,
}

/// The tasks that stand in for one, in the order in which they came.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandInsRow(pub Vec<TaskId>);

/// What a shard knows about itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardMetaRow {
    /// The stamp of the last command: the shard's time, which never goes back.
    pub now_ms: InstantMs,
    /// Whatever is due up to here may have been dispatched.
    pub armed_ms: InstantMs,
    pub pending: u64,
    pub dead_letters: u64,
    /// Due instants left out or merged into others, ever.
    pub missed: u64,
}

/// The last log entry whose effect is in the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    pub term: u64,
    pub index: u64,
}

/// Someone who may register tasks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientRow {
    /// An argon2 hash in PHC form; the password itself is never stored.
    pub password_hash: String,
    pub admin: bool,
    pub policy: Option<Policy>,
    pub limits: ClientLimits,
    pub since_ms: InstantMs,
    /// The ids of its API keys, which go when it goes.
    pub api_keys: Vec<String>,
}

/// A key that stands for a client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiKeyRow {
    pub client: ClientId,
    pub label: String,
    /// SHA-256 of the secret part, which is 256 random bits: there is nothing to guess, so a fast hash will do.
    pub secret_hash: [u8; 32],
    pub since_ms: InstantMs,
}
