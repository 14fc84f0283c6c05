//! An answer that is not the one hoped for: a code, a text, and what goes beyond them. What can be done about it follows
//! from the code, see [`Code::advice`].

use std::time::Duration;

use super::access::auth::AuthError;
use super::access::sessions::SessionError;
use crate::placement::ControlError;
use crate::propose::Refused;
use crate::store::StoreError;
use crate::task::Invalid;
use crate::wire::answers::{Answer, Refusal};
use crate::wire::problems::Code;
use crate::wire::proto::Detail;

/// Why a request has no good answer, before it is put into the words of whoever asks.
#[derive(Debug, Clone)]
pub(super) struct Problem {
    pub code: Code,
    pub text: String,
    pub detail: Option<Detail>,
}

impl Problem {
    pub(super) fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, text: text.into(), detail: None }
    }

    fn with_detail(code: Code, text: impl Into<String>, detail: Detail) -> Self {
        Self { code, text: text.into(), detail: Some(detail) }
    }

    pub(super) fn invalid(text: impl Into<String>) -> Self {
        Self::new(Code::InvalidRequest, text)
    }

    pub(super) fn unauthorized(text: impl Into<String>) -> Self {
        Self::new(Code::Unauthorized, text)
    }

    /// An attempt may be out; `so` says what follows from it for the request.
    pub(super) fn too_late(occurrence: u64, attempt: u32, so: &str) -> Self {
        let text = format!("too late: attempt {attempt} of occurrence {occurrence} may be out; {so}");
        Self::with_detail(Code::TooLate, text, Detail { occurrence, attempt, ..Default::default() })
    }

    pub(super) fn conflict(version: u64) -> Self {
        let text = format!("the task has version {version}; nothing was changed");
        Self::with_detail(Code::Conflict, text, Detail { version, ..Default::default() })
    }

    /// With where to go instead, as far as that is known.
    pub(super) fn not_leader(text: impl Into<String>, detail: Detail) -> Self {
        Self::with_detail(Code::NotLeader, text, detail)
    }

    /// Nobody knows whether it was done.
    pub(super) fn maybe_done(text: impl Into<String>) -> Self {
        Self::with_detail(Code::MaybeDone, text, Detail { maybe_done: true, ..Default::default() })
    }

    /// Nothing was done, and there is no room for it before `retry_after`.
    pub(super) fn overloaded(text: impl Into<String>, retry_after: Duration) -> Self {
        let retry_after_ms = u64::try_from(retry_after.as_millis()).unwrap_or(u64::MAX).max(1);
        Self::with_detail(Code::Overloaded, text, Detail { retry_after_ms, ..Default::default() })
    }

    pub(super) fn is_not_leader(&self) -> bool {
        self.code == Code::NotLeader
    }

    /// An answer of another node, as one of this node's.
    pub(super) fn unless_done<A: Answer>(answer: A) -> Result<A, Self> {
        let verdict = answer.verdict();
        match Code::of(&verdict) {
            None => Ok(answer),
            Some(code) => Err(Self { code, text: verdict.text.to_owned(), detail: verdict.detail.cloned() }),
        }
    }
}

impl From<Problem> for Refusal {
    fn from(problem: Problem) -> Self {
        Self { status: problem.code.status(), text: problem.text, detail: problem.detail }
    }
}

impl From<Invalid> for Problem {
    fn from(invalid: Invalid) -> Self {
        Self::invalid(invalid.to_string())
    }
}

impl From<SessionError> for Problem {
    fn from(error: SessionError) -> Self {
        let code = match error {
            SessionError::Missing => Code::Unauthorized,
            SessionError::Unknown | SessionError::Expired => Code::SessionExpired,
            SessionError::TooMany(_) | SessionError::TooManyOfClient(_) => Code::LimitReached,
        };
        Self::new(code, error.to_string())
    }
}

impl From<AuthError> for Problem {
    fn from(error: AuthError) -> Self {
        if let Some(wait) = error.again_after() {
            return Self::overloaded(error.to_string(), wait);
        }
        let code = match error {
            AuthError::WrongPassword | AuthError::WrongKey => Code::Unauthorized,
            AuthError::PasswordTooLong(_) | AuthError::PasswordEmpty | AuthError::Invalid(_) => Code::InvalidRequest,
            AuthError::Store(_) => Code::Failed,
            AuthError::Busy | AuthError::TooManyFailures(_) => Code::Overloaded,
        };
        Self::new(code, error.to_string())
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        tracing::error!(%error, "cannot read what was asked for");
        Self::new(Code::Failed, "the node cannot read its store")
    }
}

impl From<ControlError> for Problem {
    fn from(error: ControlError) -> Self {
        let code = match error {
            ControlError::NoNode(_) => Code::NotFound,
            ControlError::LastNode(_) | ControlError::CannotMove(_) | ControlError::Fixed | ControlError::Alone => {
                Code::InvalidRequest
            }
            ControlError::Moving(_) => Code::Conflict,
            ControlError::Etcd(_) => Code::Failed,
        };
        Self::new(code, error.to_string())
    }
}

impl From<Refused> for Problem {
    fn from(refused: Refused) -> Self {
        let text = refused.to_string();
        match refused {
            Refused::NotLeader { group } => {
                let shard = group.shard().map_or(0, |shard| u32::from(shard.0));
                Self::not_leader(text, Detail { shard, ..Default::default() })
            }
            Refused::Overloaded { retry_after_ms, .. } => Self::overloaded(text, Duration::from_millis(retry_after_ms)),
            Refused::Unknown | Refused::Stopping => Self::maybe_done(text),
        }
    }
}
