//! What each message means: from an envelope to an answer. Here is who asks and where each kind of request goes; what
//! it does is in [`super::tasks`], [`super::letters`], [`super::clients`] and [`super::cluster`].
//!
//! A request is checked here in the order of who asks, what is asked, and whether it fits the limits. What changes
//! state goes to the proposer, with a closure that turns the reply into the answering message; reads are answered from
//! this node's state.

use std::sync::Arc;

use super::auth::{AuthError, Identity};
use super::sessions::{Opened, Session, SessionError};
use super::{Service, clients, cluster, letters, list, tasks};
use crate::propose::Refused;
use crate::store::StoreError;
use crate::task::{ClientId, InstantMs, Invalid};
use crate::wire::convert::policy_over;
use crate::wire::proto::boomerang_envelope::Payload;
use crate::wire::{PROTOCOL, proto};
use proto::Status;

/// Sends the answer to one request; called once, from any task.
pub(super) type Respond = Box<dyn FnOnce(Payload) + Send>;

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
            AuthError::PasswordTooLong(_) | AuthError::PasswordEmpty => Status::InvalidRequest,
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
            Refused::Unknown | Refused::Stopping => Self::new(Status::Error, text),
        }
    }
}

/// The message that says no, with as much as it can hold.
macro_rules! refusal {
    ($message:ident, $problem:expr, $extended:expr) => {{
        let problem: Problem = $problem;
        proto::$message { status: problem.status_for($extended), error_message: problem.text, ..Default::default() }
    }};
    ($message:ident, $problem:expr, $extended:expr, detail) => {{
        let problem: Problem = $problem;
        #[allow(clippy::needless_update, reason = "some messages have nothing else")]
        let message = proto::$message {
            status: problem.status_for($extended),
            error_message: problem.text,
            detail: problem.detail,
            ..Default::default()
        };
        message
    }};
}
pub(super) use refusal;

/// An answer that says no more than yes or no.
macro_rules! plain_answer {
    ($message:ident, $result:expr, $extended:expr) => {
        match $result {
            Ok(()) => proto::$message { status: Status::Ok as i32, ..Default::default() },
            Err(problem) => refusal!($message, problem, $extended, detail),
        }
    };
}

/// Answers one envelope. Returns when the next one may be read: for what changes state that is before the answer.
pub(super) async fn handle(service: &Arc<Service>, envelope: proto::BoomerangEnvelope, respond: Respond) {
    let session = service.sessions.get(&envelope.session_id, service.clock.now_ms());
    let Some(payload) = envelope.payload else {
        return respond(misunderstood("the envelope holds no request"));
    };
    let extended = session.as_ref().is_ok_and(|session| session.extended);
    match payload {
        Payload::AuthHandshake(request) => respond(authenticate(service, request).await),
        Payload::SessionRefresh(_) => respond(refresh(service, &envelope.session_id)),
        Payload::RegistrationRequest(task) => tasks::register(service, session, task, respond).await,
        Payload::RegistrationBatch(batch) => tasks::register_batch(service, session, batch, respond).await,
        Payload::CancellationRequest(request) => tasks::cancel(service, session, &request, respond).await,
        Payload::UpdateTaskRequest(request) => tasks::update(service, session, request, respond).await,
        Payload::PauseTaskRequest(request) => tasks::pause(service, session, &request, respond).await,
        Payload::GetTaskRequest(request) => {
            let answer = read(session, |session| tasks::get(service, session, &request));
            respond(Payload::GetTaskResponse(match answer {
                Ok(answer) => answer,
                Err(problem) => refusal!(GetTaskResponse, problem, extended),
            }));
        }
        Payload::ListTasksRequest(request) => {
            let answer = read(session, |session| list::page(service, session, &request));
            respond(Payload::ListTasksResponse(match answer {
                Ok(answer) => answer,
                Err(problem) => refusal!(ListTasksResponse, problem, extended),
            }));
        }
        Payload::ListDeadLettersRequest(request) => {
            let answer = read(session, |session| letters::page(service, session, &request));
            respond(Payload::ListDeadLettersResponse(match answer {
                Ok(answer) => answer,
                Err(problem) => refusal!(ListDeadLettersResponse, problem, extended),
            }));
        }
        Payload::GetDeadLetterRequest(request) => {
            let answer = read(session, |session| letters::get(service, session, &request));
            respond(Payload::GetDeadLetterResponse(match answer {
                Ok(answer) => answer,
                Err(problem) => refusal!(GetDeadLetterResponse, problem, extended),
            }));
        }
        Payload::ReplayDeadLettersRequest(request) => {
            let answer = letters::replay(service, session, request).await;
            respond(Payload::ReplayDeadLettersResponse(match answer {
                Ok(answer) => answer,
                Err(problem) => refusal!(ReplayDeadLettersResponse, problem, extended, detail),
            }));
        }
        Payload::PurgeDeadLettersRequest(request) => {
            let answer = letters::purge(service, session, request).await;
            respond(Payload::PurgeDeadLettersResponse(match answer {
                Ok(answer) => answer,
                Err(problem) => refusal!(PurgeDeadLettersResponse, problem, extended, detail),
            }));
        }
        Payload::ClientRegistration(request) => {
            let result = clients::register(service, session, request).await;
            respond(Payload::ClientRegistrationResponse(plain_answer!(ClientRegistrationResponse, result, extended)));
        }
        Payload::ClientDeregistration(request) => {
            let result = clients::deregister(service, session, &request.client_id).await;
            let answer = plain_answer!(ClientDeregistrationResponse, result, extended);
            respond(Payload::ClientDeregistrationResponse(answer));
        }
        Payload::ApiKeyRequest(request) => {
            respond(Payload::ApiKeyResponse(match clients::create_key(service, session, request).await {
                Ok(answer) => answer,
                Err(problem) => refusal!(ApiKeyResponse, problem, true),
            }));
        }
        Payload::ApiKeyRevocation(request) => {
            let result = clients::revoke_key(service, session, request.key_id).await;
            respond(Payload::ApiKeyRevocationResponse(plain_answer!(ApiKeyRevocationResponse, result, true)));
        }
        Payload::ClusterRequest(request) => {
            respond(Payload::ClusterResponse(match cluster::handle(service, session, request).await {
                Ok(answer) => proto::ClusterResponse { status: Status::Ok as i32, answer, ..Default::default() },
                Err(problem) => refusal!(ClusterResponse, problem, true, detail),
            }));
        }
        Payload::CallbackRequest(_) | Payload::CallbackResponse(_) => {
            respond(misunderstood("a callback is sent by the server, to the receiver's own address"));
        }
        Payload::AuthResponse(_)
        | Payload::RegistrationResponse(_)
        | Payload::CancellationResponse(_)
        | Payload::SessionRefreshResponse(_)
        | Payload::ClientRegistrationResponse(_)
        | Payload::ClientDeregistrationResponse(_)
        | Payload::ListTasksResponse(_)
        | Payload::GetTaskResponse(_)
        | Payload::ErrorResponse(_)
        | Payload::ApiKeyResponse(_)
        | Payload::ApiKeyRevocationResponse(_)
        | Payload::RegistrationBatchResponse(_)
        | Payload::UpdateTaskResponse(_)
        | Payload::PauseTaskResponse(_)
        | Payload::ListDeadLettersResponse(_)
        | Payload::GetDeadLetterResponse(_)
        | Payload::ReplayDeadLettersResponse(_)
        | Payload::PurgeDeadLettersResponse(_)
        | Payload::ClusterResponse(_) => {
            respond(misunderstood("the envelope holds an answer where a request was expected"));
        }
    }
}

/// What is answered from this node's state, which may have to be read from disk.
fn read<T>(
    session: Result<Arc<Session>, SessionError>,
    answer: impl FnOnce(&Session) -> Result<T, Problem>,
) -> Result<T, Problem> {
    let session = session?;
    tokio::task::block_in_place(|| answer(&session))
}

/// The answer to what is no request.
pub(super) fn misunderstood(text: impl Into<String>) -> Payload {
    Payload::ErrorResponse(proto::ErrorResponse { status: Status::InvalidRequest as i32, error_message: text.into() })
}

async fn authenticate(service: &Service, request: proto::AuthHandshake) -> Payload {
    let extended = request.protocol >= PROTOCOL;
    Payload::AuthResponse(match try_authenticate(service, request, extended).await {
        Ok((session_id, expires_at_ms)) => {
            proto::AuthResponse { session_id, status: Status::Ok as i32, expires_at_ms, ..Default::default() }
        }
        Err(problem) => proto::AuthResponse {
            status: problem.status_for(extended),
            error_message: problem.text,
            detail: problem.detail,
            ..Default::default()
        },
    })
}

async fn try_authenticate(
    service: &Service,
    request: proto::AuthHandshake,
    extended: bool,
) -> Result<(String, InstantMs), Problem> {
    let Identity { client, row, key_id } = if request.token.is_empty() {
        service.auth.with_password(request.client_id.parse::<ClientId>()?, request.password).await?
    } else {
        service.auth.with_key(&request.token)?
    };
    let policy =
        policy_over(row.policy.as_ref(), request.callback.as_ref(), request.retry.as_ref(), request.dlq.as_ref())?;
    let opened = Opened { client, admin: row.admin, key_id, policy, limits: row.limits, extended };
    Ok(service.sessions.open(opened, service.clock.now_ms())?)
}

fn refresh(service: &Service, session_id: &str) -> Payload {
    Payload::SessionRefreshResponse(match service.sessions.refresh(session_id, service.clock.now_ms()) {
        Ok(new_expires_at_ms) => {
            proto::SessionRefreshResponse { status: Status::Ok as i32, new_expires_at_ms, ..Default::default() }
        }
        Err(error) => {
            let problem = Problem::from(error);
            proto::SessionRefreshResponse {
                status: problem.status_for(false),
                error_message: problem.text,
                ..Default::default()
            }
        }
    })
}
