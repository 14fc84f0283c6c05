//! One attempt on its way out, and how it ended.

use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{ClientId, InstantMs, Policy, TaskId};

/// A pair that only grows from one delivery of an occurrence to the next, whichever node makes it: a new leader has a
/// larger term, and within a term the leader counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Fence {
    pub term: u64,
    pub seq: u64,
}

/// What goes to the receiver.
#[derive(Debug, Clone)]
pub struct Delivery {
    pub task: TaskId,
    pub client: ClientId,
    pub payload: Bytes,
    pub occurrence: u64,
    pub attempt: u32,
    /// When this occurrence was due; a retry keeps the due instant of its occurrence.
    pub due_ms: InstantMs,
    pub fence: Fence,
    pub policy: Arc<Policy>,
}

/// How an attempt ended. Append only: it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The receiver said yes.
    Acknowledged,
    /// It did not, or nobody knows; the text says what happened and is kept with a dead letter.
    Failed(String),
}
