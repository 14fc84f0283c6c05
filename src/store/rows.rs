//! What the stored values hold. Kept apart from what the code computes with, so that a change here is seen for what it
//! is: a change of the stored format (see [`super::codec`]).

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::task::{ClientId, InstantMs, Policy, PolicyId};

/// Written once when the task is registered, never changed, removed once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskRow {
    pub client: ClientId,
    pub policy: PolicyId,
    pub first_due_ms: InstantMs,
    /// 0: the task is due once.
    pub interval_ms: u64,
    pub payload: Bytes,
}

/// One pending attempt. Its key says when it is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineRow {
    pub occurrence: u64,
    pub attempt: u32,
}

/// Where a task stands, once that differs from its first occurrence and attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CursorRow {
    pub due_ms: InstantMs,
    pub occurrence: u64,
    pub attempt: u32,
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
    pub occurrence: u64,
    pub due_ms: InstantMs,
    pub attempts: u32,
    pub error: String,
}

/// What a shard knows about itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardMetaRow {
    /// The stamp of the last command: the shard's time, which never goes back.
    pub now_ms: InstantMs,
    /// Whatever is due up to here may have been dispatched.
    pub armed_ms: InstantMs,
    pub pending: u64,
    pub dead_letters: u64,
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
