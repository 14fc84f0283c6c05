//! What can be asked of a shard, as it lies in the log. All enums are append only.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::store::rows::{ApiKeyRow, ClientRow};
use crate::store::{StoreError, codec};
use crate::task::{ClientId, InstantMs, Outcome, Policy, TaskId};

/// One log entry: everything that reached a shard while the entry before it was under way.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    /// The leader's stamp.
    pub now_ms: InstantMs,
    /// From now on, whatever is due up to here may be dispatched. Never goes down.
    pub armed_ms: InstantMs,
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
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Register {
    pub id: TaskId,
    pub client: ClientId,
    /// Position in [`Batch::policies`].
    pub policy: u16,
    pub due_ms: InstantMs,
    /// 0: once.
    pub interval_ms: u64,
    pub payload: Bytes,
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
    /// The leader does not know: the attempt the task stands at may be out.
    Unknown,
}

/// How one attempt ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settle {
    pub id: TaskId,
    pub occurrence: u64,
    pub attempt: u32,
    pub outcome: Outcome,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PutClient {
    pub client: ClientId,
    pub password_hash: String,
    pub admin: bool,
    pub policy: Option<Policy>,
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
        let Self { password_hash, admin, policy, .. } = self;
        ClientRow { password_hash, admin, policy, since_ms, api_keys }
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
    },
    /// Before any dispatch of the current occurrence.
    Cancelled,
    /// This attempt may be out, or was; nothing follows it.
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
}
