//! One attempt on its way out, and how it ended.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{ClientId, DeadLetterId, InstantMs, Policy, TaskId};

/// A pair that only grows from one delivery of an occurrence to the next, whichever node makes it: a new leader has a
/// larger term, and within a term the leader counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Fence {
    /// Term of the leader that made the delivery.
    pub term: u64,
    /// Number of the delivery within the term; grows.
    pub seq: u64,
}

/// What goes to the receiver.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// Name of the task.
    pub task: TaskId,
    /// Whose task it is.
    pub client: ClientId,
    /// What its client calls it.
    pub name: Option<String>,
    /// What the client wants to have back, byte for byte.
    pub payload: Bytes,
    /// Number of the due instant, from 0; always 0 for a task that does not recur.
    pub occurrence: u64,
    /// Number of the try of this occurrence, from 1.
    pub attempt: u32,
    /// When this occurrence was due; a retry keeps the due instant of its occurrence.
    pub due_ms: InstantMs,
    /// Larger than that of each delivery of this occurrence before.
    pub fence: Fence,
    /// Where it goes, and what follows a failure.
    pub policy: Arc<Policy>,
    /// This is the copy of a dead letter.
    pub dead_letter: Option<DeadLetterNotice>,
}

/// What the destination of dead letters is told besides the task itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetterNotice {
    /// Name of the dead letter, by which it is replayed.
    pub id: DeadLetterId,
    /// How often it was tried.
    pub attempts: u32,
    /// How the last attempt failed.
    pub failure: Failure,
}

/// How an attempt ended. Append only: it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The receiver said yes.
    Acknowledged,
    /// It did not, or nobody knows.
    Failed(Failure),
}

/// Why an attempt failed. The text says what happened, for a person to act on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What kind of failure it is, for programs.
    pub class: FailureClass,
    /// What happened, at most [`Failure::TEXT_CHARS_MAX`] characters and dots, for people.
    pub text: String,
    /// The receiver wants the next attempt no sooner than so long after this one.
    pub retry_after_ms: Option<u64>,
}

impl Failure {
    /// No more of a text is kept.
    pub const TEXT_CHARS_MAX: usize = 500;

    /// Cuts a text that is too long.
    pub fn new(class: FailureClass, text: impl Into<String>) -> Self {
        let mut text: String = text.into();
        if let Some((end, _)) = text.char_indices().nth(Self::TEXT_CHARS_MAX) {
            text.truncate(end);
            text.push_str("...");
        }
        Self { class, text, retry_after_ms: None }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.class, self.text)
    }
}

/// The ways in which an attempt can fail. Append only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FailureClass {
    /// Nobody listens there.
    Refused,
    /// No connection, or no answer, in time.
    Timeout,
    /// The receiver answered no.
    BadStatus,
    /// Its answer could not be understood.
    BadAnswer,
    /// The connection broke before the answer.
    Broken,
    /// No such host, no way to it, or no TLS with it.
    Unreachable,
    /// More than the protocol can carry.
    TooLarge,
    /// Not sent: another attempt had just found the destination down.
    CircuitOpen,
    /// Not sent: callbacks must not go to that address.
    Forbidden,
}

impl fmt::Display for FailureClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FailureClass::Refused => "refused",
            FailureClass::Timeout => "timeout",
            FailureClass::BadStatus => "bad status",
            FailureClass::BadAnswer => "bad answer",
            FailureClass::Broken => "broken",
            FailureClass::Unreachable => "unreachable",
            FailureClass::TooLarge => "too large",
            FailureClass::CircuitOpen => "circuit open",
            FailureClass::Forbidden => "forbidden",
        })
    }
}
