//! What a node shows: tasks, what became of their occurrences, and dead letters.
//!
//! Messages become values of the vocabulary here. What a newer node may say and this client does not know (a state, an
//! outcome, a class of failures) becomes "unknown", and is no error.

use bytes::Bytes;

use super::ClientError;
use super::error::unexpected;
use boomerang_task::{Callback, DeadLetterId, FailureClass, InstantMs, Invalid, Recurrence, Retry, Tags, TaskId};
use boomerang_wire::convert;
use boomerang_wire::proto::{self, TaskState, occurrence};

/// A task as it is stored now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskView {
    /// Its name.
    pub task_id: TaskId,
    /// Whose it is.
    pub client_id: String,
    /// What it waits for; [`TaskState::Unspecified`] when the node does not say.
    pub state: TaskState,
    /// Grows with each change by a client; 0 when the node does not say.
    pub version: u64,
    /// Name and labels.
    pub tags: Tags,
    /// When it is due next.
    pub due_ms: InstantMs,
    /// When it was due first.
    pub first_due_ms: InstantMs,
    /// `None` for a task that comes back once.
    pub recurrence: Option<Recurrence>,
    /// The occurrence that is due next, counted from 0.
    pub occurrence: u64,
    /// The attempt that comes next or is out now, counted from 1.
    pub attempt: u32,
    /// Where it goes. A secret is never shown.
    pub callback: Option<Callback>,
    /// How often it is tried.
    pub retry: Option<Retry>,
    /// Where a copy goes when every attempt has failed.
    pub dead_letters: Option<String>,
    /// Of the attempt before, while it is retried.
    pub last_failure: Option<FailureView>,
    /// What comes back.
    pub payload: Bytes,
}

/// Why an attempt failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailureView {
    /// In what way; `None` when the node does not say.
    pub class: Option<FailureClass>,
    /// In words.
    pub text: String,
    /// When.
    pub at_ms: InstantMs,
}

/// A task and what became of it. One that has ended is known by its history alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskHistory {
    /// `None` when it has ended.
    pub task: Option<TaskView>,
    /// The latest occurrences first.
    pub past: Vec<PastOccurrence>,
}

/// What became of a due instant, or of several in a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PastOccurrence {
    /// Counted from 0.
    pub occurrence: u64,
    /// So many due instants from that one on.
    pub count: u64,
    /// How it ended.
    pub outcome: occurrence::Outcome,
    /// When it was due.
    pub due_ms: InstantMs,
    /// When its last attempt left; `None` when none did.
    pub dispatched_ms: Option<InstantMs>,
    /// When it ended.
    pub ended_ms: InstantMs,
    /// So many were made.
    pub attempts: u32,
    /// Of the last attempt, if that failed.
    pub failure: Option<FailureView>,
}

/// An occurrence whose every attempt failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// Its name.
    pub id: DeadLetterId,
    /// The task it was an occurrence of.
    pub task_id: TaskId,
    /// Whose it is.
    pub client_id: String,
    /// Name and labels of the task.
    pub tags: Tags,
    /// What was to be delivered.
    pub payload: Bytes,
    /// Counted from 0.
    pub occurrence: u64,
    /// When it was due.
    pub due_ms: InstantMs,
    /// When it was given up.
    pub died_ms: InstantMs,
    /// So many were made.
    pub attempts: u32,
    /// Of the last attempt.
    pub failure: Option<FailureView>,
    /// Where it was to go.
    pub callback: Option<Callback>,
    /// How often it was to be tried.
    pub retry: Option<Retry>,
    /// Where the copy goes; empty is nowhere.
    pub destination: String,
    /// What became of the copy: empty, "under way", "delivered", or why it was not.
    pub copy: String,
}

/// An optional message that must be valid when it is there.
fn valid<M, T>(message: Option<M>, convert: impl FnOnce(&M) -> Result<T, Invalid>) -> Result<Option<T>, ClientError> {
    message.as_ref().map(convert).transpose().map_err(|error| unexpected(&error.to_string()))
}

fn known<T>(result: Result<T, Invalid>) -> Result<T, ClientError> {
    result.map_err(|error| unexpected(&error.to_string()))
}

impl TaskView {
    pub(super) fn from_details(details: proto::TaskDetails) -> Result<Self, ClientError> {
        Ok(Self {
            task_id: known(details.task_id.parse())?,
            client_id: details.client_id,
            state: TaskState::try_from(details.state).unwrap_or(TaskState::Unspecified),
            version: details.version,
            tags: known(Tags::new(&details.name, details.labels))?,
            due_ms: details.expiration_ms,
            first_due_ms: details.first_due_ms,
            // A node sends an empty recurrence or none with a task that comes back once.
            recurrence: match details.repeat_interval_ms {
                0 => None,
                every => known(convert::recurrence_from(every, details.recurrence.as_ref()))?,
            },
            occurrence: details.occurrence,
            attempt: details.attempt,
            callback: valid(details.callback, convert::callback_from)?,
            retry: valid(details.retry, convert::retry_from)?,
            dead_letters: details.dlq.map(|dlq| dlq.destination).filter(|destination| !destination.is_empty()),
            last_failure: details.last_failure.map(FailureView::from),
            payload: details.payload,
        })
    }
}

impl From<proto::Failure> for FailureView {
    fn from(failure: proto::Failure) -> Self {
        let class = convert::failure_class_from(failure.class).unwrap_or(None);
        Self { class, text: failure.text, at_ms: failure.at_ms }
    }
}

impl From<proto::Occurrence> for PastOccurrence {
    fn from(past: proto::Occurrence) -> Self {
        Self {
            occurrence: past.occurrence,
            count: past.count.max(1),
            outcome: past.outcome(),
            due_ms: past.due_ms,
            dispatched_ms: (past.dispatched_ms > 0).then_some(past.dispatched_ms),
            ended_ms: past.ended_ms,
            attempts: past.attempts,
            failure: past.failure.map(FailureView::from),
        }
    }
}

impl DeadLetter {
    pub(super) fn from_message(letter: proto::DeadLetter) -> Result<Self, ClientError> {
        Ok(Self {
            id: known(letter.dead_letter_id.parse())?,
            task_id: known(letter.task_id.parse())?,
            client_id: letter.client_id,
            tags: known(Tags::new(&letter.name, letter.labels))?,
            payload: letter.payload,
            occurrence: letter.occurrence,
            due_ms: letter.due_ms,
            died_ms: letter.died_ms,
            attempts: letter.attempts,
            failure: letter.failure.map(FailureView::from),
            callback: valid(letter.callback, convert::callback_from)?,
            retry: valid(letter.retry, convert::retry_from)?,
            destination: letter.destination,
            copy: letter.copy,
        })
    }
}
