//! What can be asked of a shard, as it lies in the log. All enums are append only.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::store::rows::{ApiKeyRow, ClientRow};
use crate::store::{StoreError, codec};
use crate::task::{
    Callback, ClientId, ClientLimits, DeadLetterId, DedupHash, InstantMs, Invalid, Outcome, Policy, Recurrence, Retry,
    Tags, TaskId,
};

/// One log entry: everything that reached a shard while the entry before it was under way.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    /// The leader's stamp.
    pub now_ms: InstantMs,
    /// From now on, whatever is due up to here may be dispatched. Never goes down.
    pub armed_ms: InstantMs,
    /// What becomes of occurrences is recorded.
    pub keep_history: bool,
    /// The policies that registrations of this batch name by position.
    pub policies: Vec<Policy>,
    pub requests: Vec<Request>,
}

impl Batch {
    pub fn encode(&self, size_hint: usize) -> Bytes {
        codec::encode_sized(self, size_hint).into()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        codec::decode("a log entry", bytes)
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Request {
    Register(Register),
    Cancel(Cancel),
    Settle(Settle),
    PutClient(PutClient),
    RemoveClient(ClientId),
    PutApiKey(PutApiKey),
    RemoveApiKey(String),
    Edit(Edit),
    Pause(Pause),
    CatchUp(CatchUp),
    Detach(Detach),
    Replay(Replay),
    Purge(Purge),
    Forget(Forget),
    /// Changes nothing. Every replica computes a digest of its state as it is now, to be found by this number.
    Mark(u64),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Register {
    pub id: TaskId,
    pub client: ClientId,
    /// Position in [`Batch::policies`].
    pub policy: u16,
    pub due_ms: InstantMs,
    pub recurrence: Option<Recurrence>,
    pub tags: Option<Tags>,
    pub dedup: Option<Dedup>,
    pub numbered: Option<Numbered>,
    pub payload: Bytes,
}

/// Which of its sender's registrations it is, so that one that comes again is not stored twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numbered {
    /// A hash of the client and of the name the sender has given itself.
    pub sender: DedupHash,
    /// Counts what this sender registers in this shard.
    pub number: u64,
    /// All before this number have been answered, or given up, and never come again.
    pub answered_below: u64,
}

/// Whoever registers with the same key before it expires gets the answer to the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dedup {
    pub hash: DedupHash,
    pub expires_ms: InstantMs,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cancel {
    pub id: TaskId,
    /// Only a task of this client; `None` is an administrator, who may cancel any.
    pub owner: Option<ClientId>,
    pub claim: Claim,
}

/// What the leader knows about the current attempt when it proposes. It holds the attempt back until the answer is
/// out, so the claim is still true when it is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Claim {
    NotDispatched,
    /// This attempt, which need not be the one the task stands at when the command is applied.
    MayBeOut {
        occurrence: u64,
        attempt: u32,
    },
    /// The leader does not know: the attempt the task stands at may be out, if it was armed.
    Unknown,
}

/// How one attempt ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settle {
    pub id: TaskId,
    pub occurrence: u64,
    pub attempt: u32,
    pub outcome: Outcome,
    /// When it left.
    pub dispatched_ms: InstantMs,
}

/// Changes what is given, if no attempt is out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Edit {
    pub id: TaskId,
    pub owner: Option<ClientId>,
    pub claim: Claim,
    /// Only if the task has this version.
    pub version: Option<u64>,
    pub change: Change,
}

/// What a client may change of its task.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Change {
    pub due_ms: Option<InstantMs>,
    pub payload: Option<Bytes>,
    pub callback: Option<Callback>,
    pub retry: Option<Retry>,
    /// `Some(None)` is none from now on.
    pub dead_letter: Option<Option<String>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pause {
    pub id: TaskId,
    pub owner: Option<ClientId>,
    /// False resumes.
    pub paused: bool,
    pub claim: Claim,
}

/// This occurrence could not start before the next one came due: what was missed is left out or merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CatchUp {
    pub id: TaskId,
    pub occurrence: u64,
}

/// This occurrence goes its own way, as a task named `stand_in`, and the next one does not wait for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detach {
    pub id: TaskId,
    pub occurrence: u64,
    pub stand_in: TaskId,
}

/// A dead letter becomes a task again, named `stand_in`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Replay {
    pub letter: DeadLetterId,
    pub owner: Option<ClientId>,
    pub stand_in: TaskId,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Purge {
    pub letter: DeadLetterId,
    pub owner: Option<ClientId>,
}

/// Removes what has been kept long enough.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Forget {
    /// Rows of the index of expiries: the instant, and the first of the keys that expire then.
    pub dedup: Vec<(InstantMs, DedupHash)>,
    /// Senders of registrations, with the instant each was seen last when it was found.
    pub senders: Vec<(DedupHash, InstantMs)>,
    /// History that ended before.
    pub history_before: InstantMs,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PutClient {
    pub client: ClientId,
    pub password_hash: String,
    pub admin: bool,
    pub policy: Option<Policy>,
    pub limits: ClientLimits,
    /// Leave a client of that name as it is.
    pub only_if_absent: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PutApiKey {
    pub key_id: String,
    pub client: ClientId,
    pub label: String,
    pub secret_hash: [u8; 32],
}

impl PutClient {
    pub(super) fn row(self, since_ms: InstantMs, api_keys: Vec<String>) -> ClientRow {
        let Self { password_hash, admin, policy, limits, .. } = self;
        ClientRow { password_hash, admin, policy, limits, since_ms, api_keys }
    }
}

impl PutApiKey {
    pub(super) fn row(self, since_ms: InstantMs) -> ApiKeyRow {
        let Self { client, label, secret_hash, .. } = self;
        ApiKeyRow { client, label, secret_hash, since_ms }
    }
}

/// The answer to one request: the same on every replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Registered {
        id: TaskId,
        due_ms: InstantMs,
        /// The answer to an earlier registration with the same key.
        duplicate: bool,
    },
    /// Before any dispatch of the current occurrence.
    Cancelled,
    /// This attempt may be out, or was. Nothing follows it if it was to be cancelled; nothing was changed if it was to be
    /// edited.
    TooLate {
        occurrence: u64,
        attempt: u32,
    },
    NotFound,
    Settled,
    /// The attempt had been settled before, or its task is gone.
    Stale,
    Stored,
    /// What should be left as it is was there already.
    Exists,
    Edited {
        version: u64,
        due_ms: InstantMs,
    },
    /// The change does not go with what the task is; nothing was changed.
    Unfit(Invalid),
    /// The task has this version; nothing was changed.
    Conflict {
        version: u64,
    },
    /// Nothing leaves any more; this attempt may be out.
    Paused {
        out: Option<(u64, u32)>,
    },
    Resumed {
        due_ms: InstantMs,
    },
    /// As a task of this name.
    Replayed {
        id: TaskId,
    },
    /// A registration that its sender has given up or had an answer to; nothing was stored.
    GivenUp,
    /// The sender has so many registrations without an answer that no more can be remembered; nothing was stored.
    TooManyOpen {
        open_max: usize,
    },
}
