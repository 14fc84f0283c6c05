//! Everything that can go wrong between a caller and a node, told apart by what the caller can do about it.
//!
//! Errors are cloneable, because one broken connection is the answer to thousands of requests. Every text says whether
//! the request can have taken effect: after [`ClientError::ConnectionLost`], [`ClientError::Timeout`],
//! [`ClientError::Protocol`] and a refusal that is `maybe_done` it can, after all others it did not. [`ClientError::is_unknown`] tells them apart.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use boomerang_task::Invalid;
use boomerang_wire::answers::Verdict;
use boomerang_wire::problems::Code;
use boomerang_wire::proto::{Detail, Status};

/// Why a request has no good answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// The node understood the request and said no.
    #[error("{}: {message}", status.as_str_name())]
    Server {
        /// What kind of refusal it is.
        status: Status,
        /// The node's own words.
        message: String,
        /// With `OVERLOADED`: wait this long before the next try.
        retry_after: Option<Duration>,
        /// The node does not know either: the request may have taken effect, or may still.
        maybe_done: bool,
    },
    /// The request was sent and not answered in time.
    #[error("no answer within {after:?}; the outcome is unknown: the request may still take effect")]
    Timeout {
        /// The timeout of requests in [`super::Options`].
        after: Duration,
    },
    /// The connection broke while the request was under way.
    #[error(
        "the connection to {address} was lost before the answer came ({reason}); the outcome is unknown: a registration \
         may have been stored, so look for it before you send it again"
    )]
    ConnectionLost {
        /// The node at the other end.
        address: String,
        /// What was seen on this side.
        reason: String,
    },
    /// There is no connection, and none could be made. The request was not sent.
    #[error("cannot connect to {address}")]
    Connect {
        /// The last address that was tried.
        address: String,
        /// What the operating system said.
        source: Arc<io::Error>,
    },
    /// The other end does not speak this protocol as it should.
    #[error("unexpected answer: {0}; is it a Boomerang node, and as new as this client?")]
    Protocol(String),
    /// The request is larger than a node takes; it was not sent.
    #[error("the request has {bytes} bytes, a frame holds at most {bytes_max}; it was not sent")]
    TooLarge {
        /// The size of the envelope.
        bytes: usize,
        /// `frame_bytes_max` in [`super::Options`].
        bytes_max: usize,
    },
    /// A value was refused on this side; nothing was sent.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// [`super::Client::close`] was called.
    #[error("the client is closed; nothing was sent")]
    Closed,
}

impl ClientError {
    /// What the node answered, if it answered.
    pub fn status(&self) -> Option<Status> {
        match self {
            ClientError::Server { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// What kind of refusal the node answered with, if it answered: its [`Code::advice`] says what to do.
    pub fn code(&self) -> Option<Code> {
        let ClientError::Server { status, retry_after, maybe_done, .. } = self else { return None };
        let retry_after_ms = retry_after.map_or(0, |after| u64::try_from(after.as_millis()).unwrap_or(u64::MAX).max(1));
        let detail = Detail { retry_after_ms, maybe_done: *maybe_done, ..Default::default() };
        Code::of(&Verdict { status: (*status).into(), text: "", detail: Some(&detail) })
    }

    /// Whether the request may have taken effect all the same, or may still.
    pub fn is_unknown(&self) -> bool {
        match self {
            ClientError::ConnectionLost { .. } | ClientError::Timeout { .. } | ClientError::Protocol(_) => true,
            ClientError::Server { maybe_done, .. } => *maybe_done,
            _ => false,
        }
    }

    pub(super) fn connect(address: &str, source: io::Error) -> Self {
        ClientError::Connect { address: address.to_owned(), source: Arc::new(source) }
    }

    /// The caller or its credentials are at fault, so another try or another node would end alike.
    pub(super) fn is_final(&self) -> bool {
        match self {
            ClientError::Server { status, .. } => matches!(status, Status::Unauthorized | Status::InvalidRequest),
            ClientError::Invalid(_) | ClientError::TooLarge { .. } | ClientError::Closed => true,
            _ => false,
        }
    }
}

pub(super) fn unexpected(what: &str) -> ClientError {
    ClientError::Protocol(what.to_owned())
}

/// An error unless the answer says that all is well.
pub(super) fn check(verdict: Verdict<'_>) -> Result<(), ClientError> {
    if verdict.status == Status::Ok as i32 {
        return Ok(());
    }
    let retry_after = verdict.detail.filter(|detail| detail.retry_after_ms > 0);
    let retry_after = retry_after.map(|detail| Duration::from_millis(detail.retry_after_ms));
    let maybe_done = verdict.detail.is_some_and(|detail| detail.maybe_done);
    Err(match Status::try_from(verdict.status) {
        Ok(status) => {
            let message = if verdict.text.is_empty() { "the node gave no reason" } else { verdict.text };
            ClientError::Server { status, message: message.to_owned(), retry_after, maybe_done }
        }
        Err(_) => ClientError::Server {
            status: Status::Error,
            message: format!("status {}, unknown to this client: {}", verdict.status, verdict.text),
            retry_after,
            maybe_done,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use boomerang_wire::proto::boomerang_envelope::Payload;
    use boomerang_wire::proto::{CancellationResponse, ErrorResponse, RegistrationResponse};

    fn error_of(answer: &Payload) -> ClientError {
        check(Verdict::of(answer).unwrap()).unwrap_err()
    }

    #[test]
    fn a_refusal_keeps_what_the_node_said() {
        let detail = Detail { retry_after_ms: 250, ..Default::default() };
        let payload = Payload::RegistrationResponse(RegistrationResponse {
            status: Status::Overloaded.into(),
            error_message: "queue is full".into(),
            detail: Some(detail),
            ..Default::default()
        });
        let error = error_of(&payload);
        assert_eq!(error.to_string(), "OVERLOADED: queue is full");
        assert!(matches!(error, ClientError::Server { retry_after: Some(after), .. } if after.as_millis() == 250));
        assert!(!error.is_unknown());
        assert_eq!(error.code(), Some(Code::Overloaded));

        let payload = Payload::ErrorResponse(ErrorResponse { status: 99, error_message: "new".into() });
        let text = error_of(&payload).to_string();
        assert!(text.contains("99") && text.contains("new"), "{text}");
    }

    #[test]
    fn unknown_outcomes_say_so() {
        let lost = ClientError::ConnectionLost { address: "h:1".into(), reason: "reset".into() }.to_string();
        assert!(lost.contains("h:1") && lost.contains("outcome is unknown"), "{lost}");
        let maybe = Payload::CancellationResponse(CancellationResponse {
            status: Status::Error.into(),
            error_message: "no answer in time".into(),
            detail: Some(Detail { maybe_done: true, ..Default::default() }),
        });
        assert!(error_of(&maybe).is_unknown());
        assert_eq!(error_of(&maybe).code(), Some(Code::MaybeDone));
        assert_eq!(ClientError::Closed.code(), None);
        let slow = ClientError::Timeout { after: Duration::from_secs(3) }.to_string();
        assert!(slow.contains("3s") && slow.contains("outcome is unknown"), "{slow}");
    }
}
