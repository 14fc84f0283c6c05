//! An answer that is not the one hoped for: what is wrong, in a status, a text and what goes beyond them.

use std::time::Duration;

use super::auth::AuthError;
use super::sessions::SessionError;
use crate::propose::Refused;
use crate::store::StoreError;
use crate::task::Invalid;
use crate::wire::answers::Refusal;
use crate::wire::proto::{self, Status};

/// An answer that is not the one hoped for, before it is put into the message of its request.
#[derive(Debug)]
pub(super) struct Problem {
    pub status: Status,
    pub text: String,
    pub detail: Option<proto::Detail>,
}

impl Problem {
    pub(super) fn new(status: Status, text: impl Into<String>) -> Self {
        Self { status, text: text.into(), detail: None }
    }

    /// Nobody knows whether it was done.
    pub(super) fn maybe_done(text: impl Into<String>) -> Self {
        let detail = proto::Detail { maybe_done: true, ..Default::default() };
        Self { status: Status::Error, text: text.into(), detail: Some(detail) }
    }

    /// Nothing was done, and there is no room for it before `retry_after`.
    pub(super) fn overloaded(text: impl Into<String>, retry_after: Duration) -> Self {
        let retry_after_ms = u64::try_from(retry_after.as_millis()).unwrap_or(u64::MAX);
        let detail = proto::Detail { retry_after_ms, ..Default::default() };
        Self { status: Status::Overloaded, text: text.into(), detail: Some(detail) }
    }

    pub(super) fn unauthorized(text: impl Into<String>) -> Self {
        Self::new(Status::Unauthorized, text)
    }

    /// A client of the original protocol knows five statuses.
    pub(super) fn status_for(&self, extended: bool) -> i32 {
        let known = extended || (self.status as i32) < Status::NotLeader as i32;
        (if known { self.status } else { Status::Error }) as i32
    }
}

impl From<Invalid> for Problem {
    fn from(invalid: Invalid) -> Self {
        Self::new(Status::InvalidRequest, invalid.to_string())
    }
}

impl From<SessionError> for Problem {
    fn from(error: SessionError) -> Self {
        let status = match error {
            SessionError::Missing => Status::Unauthorized,
            SessionError::Unknown | SessionError::Expired => Status::SessionExpired,
            SessionError::TooMany(_) => Status::Overloaded,
        };
        Self::new(status, error.to_string())
    }
}

impl From<AuthError> for Problem {
    fn from(error: AuthError) -> Self {
        let status = match error {
            AuthError::WrongPassword | AuthError::WrongKey => Status::Unauthorized,
            AuthError::PasswordTooLong(_) | AuthError::PasswordEmpty | AuthError::Invalid(_) => Status::InvalidRequest,
            AuthError::Store(_) => Status::Error,
        };
        Self::new(status, error.to_string())
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        tracing::error!(%error, "cannot read what was asked for");
        Self::new(Status::Error, "the node cannot read its store")
    }
}

impl From<Refused> for Problem {
    fn from(refused: Refused) -> Self {
        let text = refused.to_string();
        match refused {
            Refused::NotLeader { group } => {
                let shard = group.shard().map_or(0, |shard| u32::from(shard.0));
                let detail = proto::Detail { shard, ..Default::default() };
                Self { status: Status::NotLeader, text, detail: Some(detail) }
            }
            Refused::Overloaded { retry_after_ms, .. } => {
                let detail = proto::Detail { retry_after_ms, ..Default::default() };
                Self { status: Status::Overloaded, text, detail: Some(detail) }
            }
            Refused::Unknown | Refused::Stopping => Self::maybe_done(text),
        }
    }
}

impl From<Problem> for Refusal {
    fn from(problem: Problem) -> Self {
        Self { status: problem.status, text: problem.text, detail: problem.detail }
    }
}
