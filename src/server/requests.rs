//! What each message means: from an envelope to an answer. Here is who asks and where each kind of request goes; what
//! it does is in [`super::tasks`], [`super::letters`], [`super::clients`] and [`super::cluster`]. In a cluster,
//! [`super::spread`] comes in between, and brings a request to whoever leads what it is about.
//!
//! A request is checked here in the order of who asks, what is asked, and whether it fits the limits. What changes
//! state goes to the proposer, with a closure that turns the reply into the answering message; reads are answered from
//! this node's state.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::auth::{AuthError, Identity};
use super::forward::{self, Identified};
use super::sessions::{Opened, Print, Session, SessionError};
use super::{Service, clients, cluster, letters, list, spread, tasks};
use crate::propose::Refused;
use crate::store::StoreError;
use crate::task::{ClientId, GroupId, InstantMs, Invalid};
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

/// The message that says no.
macro_rules! refusal {
    ($message:ident, $problem:expr) => {{
        let problem: Problem = $problem;
        #[allow(clippy::needless_update, reason = "some messages have nothing else")]
        let message = proto::$message {
            status: problem.status as i32,
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
    ($message:ident, $result:expr) => {
        match $result {
            Ok(()) => proto::$message { status: Status::Ok as i32, ..Default::default() },
            Err(problem) => refusal!($message, problem),
        }
    };
}

/// Answers one envelope. Returns when the next one may be read: for what changes state that is before the answer.
pub(super) async fn handle(service: &Arc<Service>, envelope: proto::BoomerangEnvelope, respond: Respond) {
    let session = service.sessions.get(&envelope.session_id, service.clock.now_ms());
    let Some(payload) = envelope.payload else {
        return respond(misunderstood("the envelope holds no request"));
    };
    let respond = match &session {
        Ok(session) if session.extended => respond,
        _ => Box::new(move |mut answer| {
            in_old_words(&mut answer);
            respond(answer);
        }),
    };
    match (session, payload) {
        (_, Payload::AuthHandshake(request)) => respond(authenticate(service, request).await),
        (_, Payload::SessionRefresh(_)) => respond(refresh(service, &envelope.session_id)),
        (Ok(session), payload) if !service.router.is_alone() => spread::ask(service, session, payload, respond).await,
        (session, payload) => serve(service, session, payload, respond).await,
    }
}

/// Does a request here, whoever leads what it is about; the proposer refuses what this node does not lead.
pub(super) async fn served(service: &Arc<Service>, session: Arc<Session>, payload: Payload) -> Payload {
    let (out, answer) = oneshot::channel();
    let respond = Box::new(move |answer| {
        // Whoever asked may be gone.
        let _ = out.send(answer);
    });
    let stopping = refused(&payload, Refused::Stopping.into());
    serve(service, Ok(session), payload, respond).await;
    answer.await.unwrap_or(stopping)
}

/// As [`handle`], on this node and nowhere else.
pub(super) async fn serve(
    service: &Arc<Service>,
    session: Result<Arc<Session>, SessionError>,
    payload: Payload,
    respond: Respond,
) {
    match payload {
        Payload::RegistrationRequest(task) => tasks::register(service, session, task, respond).await,
        Payload::RegistrationBatch(batch) => tasks::register_batch(service, session, batch, respond).await,
        Payload::CancellationRequest(request) => tasks::cancel(service, session, &request, respond).await,
        Payload::CancellationBatch(batch) => tasks::cancel_batch(service, session, batch, respond).await,
        Payload::UpdateTaskRequest(request) => tasks::update(service, session, request, respond).await,
        Payload::PauseTaskRequest(request) => tasks::pause(service, session, &request, respond).await,
        Payload::GetTaskRequest(request) => {
            let answer = read(session, |session| tasks::get(service, session, &request));
            respond(Payload::GetTaskResponse(match answer {
                Ok(answer) => answer,
                Err(problem) => refusal!(GetTaskResponse, problem),
            }));
        }
        Payload::ListTasksRequest(request) => {
            let service = service.clone();
            // What this connection asks for next does not wait for it.
            tokio::spawn(async move {
                let page = move |service: &Service, session: &Session| list::page(service, session, &request);
                respond(Payload::ListTasksResponse(match read_page(&service, session, page).await {
                    Ok(answer) => answer,
                    Err(problem) => refusal!(ListTasksResponse, problem),
                }));
            });
        }
        Payload::ListDeadLettersRequest(request) => {
            let service = service.clone();
            tokio::spawn(async move {
                let page = move |service: &Service, session: &Session| letters::page(service, session, &request);
                respond(Payload::ListDeadLettersResponse(match read_page(&service, session, page).await {
                    Ok(answer) => answer,
                    Err(problem) => refusal!(ListDeadLettersResponse, problem),
                }));
            });
        }
        Payload::GetDeadLetterRequest(request) => {
            let answer = read(session, |session| letters::get(service, session, &request));
            respond(Payload::GetDeadLetterResponse(match answer {
                Ok(answer) => answer,
                Err(problem) => refusal!(GetDeadLetterResponse, problem),
            }));
        }
        Payload::ReplayDeadLettersRequest(request) => {
            let answer = letters::replay(service, session, request).await;
            respond(Payload::ReplayDeadLettersResponse(match answer {
                Ok(answer) => answer,
                Err(problem) => refusal!(ReplayDeadLettersResponse, problem),
            }));
        }
        Payload::PurgeDeadLettersRequest(request) => {
            let answer = letters::purge(service, session, request).await;
            respond(Payload::PurgeDeadLettersResponse(match answer {
                Ok(answer) => answer,
                Err(problem) => refusal!(PurgeDeadLettersResponse, problem),
            }));
        }
        Payload::ClientRegistration(request) => {
            let result = clients::register(service, session, request).await;
            respond(Payload::ClientRegistrationResponse(plain_answer!(ClientRegistrationResponse, result)));
        }
        Payload::ClientDeregistration(request) => {
            let result = clients::deregister(service, session, &request.client_id).await;
            let answer = plain_answer!(ClientDeregistrationResponse, result);
            respond(Payload::ClientDeregistrationResponse(answer));
        }
        Payload::ApiKeyRequest(request) => {
            respond(Payload::ApiKeyResponse(match clients::create_key(service, session, request).await {
                Ok(answer) => answer,
                Err(problem) => refusal!(ApiKeyResponse, problem),
            }));
        }
        Payload::ApiKeyRevocation(request) => {
            let result = clients::revoke_key(service, session, request.key_id).await;
            respond(Payload::ApiKeyRevocationResponse(plain_answer!(ApiKeyRevocationResponse, result)));
        }
        Payload::ShardMapRequest(_) => {
            let answer = session.map(|_| service.router.map()).map_err(Problem::from);
            respond(Payload::ShardMapResponse(answer.unwrap_or_else(|problem| proto::ShardMapResponse {
                status: problem.status as i32,
                error_message: problem.text,
                ..Default::default()
            })));
        }
        Payload::AuthHandshake(_) | Payload::SessionRefresh(_) => {
            respond(misunderstood("a session belongs to the node it was opened on"));
        }
        Payload::ClusterRequest(request) => {
            // Rare, and large: not a part of what each connection keeps.
            respond(Payload::ClusterResponse(match Box::pin(cluster::handle(service, session, request)).await {
                Ok(answer) => proto::ClusterResponse { status: Status::Ok as i32, answer, ..Default::default() },
                Err(problem) => refusal!(ClusterResponse, problem),
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
        | Payload::CancellationBatchResponse(_)
        | Payload::UpdateTaskResponse(_)
        | Payload::PauseTaskResponse(_)
        | Payload::ListDeadLettersResponse(_)
        | Payload::GetDeadLetterResponse(_)
        | Payload::ReplayDeadLettersResponse(_)
        | Payload::PurgeDeadLettersResponse(_)
        | Payload::ShardMapResponse(_)
        | Payload::ClusterResponse(_) => {
            respond(misunderstood("the envelope holds an answer where a request was expected"));
        }
    }
}

/// The answer to `request` that says no.
pub(super) fn refused(request: &Payload, problem: Problem) -> Payload {
    match request {
        Payload::RegistrationRequest(_) => Payload::RegistrationResponse(refusal!(RegistrationResponse, problem)),
        Payload::RegistrationBatch(_) => {
            Payload::RegistrationBatchResponse(refusal!(RegistrationBatchResponse, problem))
        }
        Payload::CancellationRequest(_) => Payload::CancellationResponse(refusal!(CancellationResponse, problem)),
        Payload::CancellationBatch(_) => {
            Payload::CancellationBatchResponse(refusal!(CancellationBatchResponse, problem))
        }
        Payload::UpdateTaskRequest(_) => Payload::UpdateTaskResponse(refusal!(UpdateTaskResponse, problem)),
        Payload::PauseTaskRequest(_) => Payload::PauseTaskResponse(refusal!(PauseTaskResponse, problem)),
        Payload::GetTaskRequest(_) => Payload::GetTaskResponse(refusal!(GetTaskResponse, problem)),
        Payload::ListTasksRequest(_) => Payload::ListTasksResponse(refusal!(ListTasksResponse, problem)),
        Payload::ListDeadLettersRequest(_) => {
            Payload::ListDeadLettersResponse(refusal!(ListDeadLettersResponse, problem))
        }
        Payload::GetDeadLetterRequest(_) => Payload::GetDeadLetterResponse(refusal!(GetDeadLetterResponse, problem)),
        Payload::ReplayDeadLettersRequest(_) => {
            Payload::ReplayDeadLettersResponse(refusal!(ReplayDeadLettersResponse, problem))
        }
        Payload::PurgeDeadLettersRequest(_) => {
            Payload::PurgeDeadLettersResponse(refusal!(PurgeDeadLettersResponse, problem))
        }
        Payload::ClientRegistration(_) => {
            Payload::ClientRegistrationResponse(refusal!(ClientRegistrationResponse, problem))
        }
        Payload::ClientDeregistration(_) => {
            Payload::ClientDeregistrationResponse(refusal!(ClientDeregistrationResponse, problem))
        }
        Payload::ApiKeyRequest(_) => Payload::ApiKeyResponse(refusal!(ApiKeyResponse, problem)),
        Payload::ClusterRequest(_) => Payload::ClusterResponse(refusal!(ClusterResponse, problem)),
        Payload::ApiKeyRevocation(_) => Payload::ApiKeyRevocationResponse(refusal!(ApiKeyRevocationResponse, problem)),
        _ => {
            Payload::ErrorResponse(proto::ErrorResponse { status: problem.status as i32, error_message: problem.text })
        }
    }
}

/// Where an answer has its status; nothing in what is no answer to a request for something.
fn status_of(answer: &mut Payload) -> Option<&mut i32> {
    Some(match answer {
        Payload::RegistrationResponse(answer) => &mut answer.status,
        Payload::RegistrationBatchResponse(answer) => &mut answer.status,
        Payload::CancellationResponse(answer) => &mut answer.status,
        Payload::CancellationBatchResponse(answer) => &mut answer.status,
        Payload::UpdateTaskResponse(answer) => &mut answer.status,
        Payload::PauseTaskResponse(answer) => &mut answer.status,
        Payload::GetTaskResponse(answer) => &mut answer.status,
        Payload::ListTasksResponse(answer) => &mut answer.status,
        Payload::ListDeadLettersResponse(answer) => &mut answer.status,
        Payload::GetDeadLetterResponse(answer) => &mut answer.status,
        Payload::ReplayDeadLettersResponse(answer) => &mut answer.status,
        Payload::PurgeDeadLettersResponse(answer) => &mut answer.status,
        Payload::ClientRegistrationResponse(answer) => &mut answer.status,
        Payload::ClientDeregistrationResponse(answer) => &mut answer.status,
        _ => return None,
    })
}

/// Nothing of the request was done, because this node does not lead.
pub(super) fn is_not_leader(answer: &Payload) -> bool {
    status_of_change(answer) == Some(Status::NotLeader as i32)
}

/// It was done.
pub(super) fn is_yes(answer: &Payload) -> bool {
    status_of_change(answer) == Some(Status::Ok as i32)
}

/// Of an answer to what changes something.
fn status_of_change(answer: &Payload) -> Option<i32> {
    Some(match answer {
        Payload::RegistrationResponse(answer) => answer.status,
        Payload::CancellationResponse(answer) => answer.status,
        Payload::UpdateTaskResponse(answer) => answer.status,
        Payload::PauseTaskResponse(answer) => answer.status,
        Payload::ReplayDeadLettersResponse(answer) => answer.status,
        Payload::PurgeDeadLettersResponse(answer) => answer.status,
        Payload::ClientRegistrationResponse(answer) => answer.status,
        Payload::ClientDeregistrationResponse(answer) => answer.status,
        Payload::ApiKeyResponse(answer) => answer.status,
        Payload::ApiKeyRevocationResponse(answer) => answer.status,
        // The others never come to the proposer, and what is left of a batch is looked at one by one.
        _ => return None,
    })
}

/// For a client of the original protocol, which knows five statuses.
fn in_old_words(answer: &mut Payload) {
    let old = |status: &mut i32| {
        if *status >= Status::NotLeader as i32 {
            *status = Status::Error as i32;
        }
    };
    if let Payload::RegistrationBatchResponse(batch) = answer {
        batch.responses.iter_mut().for_each(|answer| old(&mut answer.status));
    }
    if let Payload::CancellationBatchResponse(batch) = answer {
        batch.responses.iter_mut().for_each(|answer| old(&mut answer.status));
    }
    if let Some(status) = status_of(answer) {
        old(status);
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

/// The same for what is long.
pub(super) async fn read_page<T: Send + 'static>(
    service: &Arc<Service>,
    session: Result<Arc<Session>, SessionError>,
    page: impl FnOnce(&Service, &Session) -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    let (service, session) = (service.clone(), session?);
    service.clone().readers.read(move || page(&service, &session)).await
}

/// The answer to what is no request.
pub(super) fn misunderstood(text: impl Into<String>) -> Payload {
    Payload::ErrorResponse(proto::ErrorResponse { status: Status::InvalidRequest as i32, error_message: text.into() })
}

async fn authenticate(service: &Service, request: proto::AuthHandshake) -> Payload {
    let extended = request.protocol >= PROTOCOL;
    Payload::AuthResponse(match try_authenticate(service, request, extended).await {
        Ok((session_id, expires_at_ms, client)) => proto::AuthResponse {
            session_id,
            status: Status::Ok as i32,
            expires_at_ms,
            client_id: if extended { client.to_string() } else { String::new() },
            nodes: if extended { service.router.cluster().nodes_count() } else { 0 },
            ..Default::default()
        },
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
) -> Result<(String, InstantMs, ClientId), Problem> {
    let Identified { identity, applied_index } = identify(service, &request).await?;
    let Identity { client, row, key_id } = &identity;
    let policy =
        policy_over(row.policy.as_ref(), request.callback.as_ref(), request.retry.as_ref(), request.dlq.as_ref())?;
    let print = Print::of(row);
    let opened = Opened {
        client: client.clone(),
        admin: row.admin,
        key_id: key_id.clone(),
        policy,
        limits: row.limits,
        extended,
        redirects: request.redirects,
        print,
    };
    let (session_id, expires_at_ms) = service.sessions.open(opened, service.clock.now_ms())?;
    // The client may have been changed or removed since it was looked up; whatever this node applies from now on ends
    // the session by itself. A node that has not come as far as whoever looked knows nothing better.
    if !identity.is_anyone() && forward::applied_index(service)? >= applied_index {
        let now = service.auth.client(client)?.as_ref().map(Print::of);
        let key_is_good = key_id.as_ref().is_none_or(|key_id| service.auth.knows_key(key_id).unwrap_or(false));
        if now != Some(print) || !key_is_good {
            service.sessions.end(&session_id);
            return Err(AuthError::WrongPassword.into());
        }
    }
    Ok((session_id, expires_at_ms, identity.client))
}

/// Who shakes hands. This node may not have heard yet of somebody who is new, so the leader is asked before anybody is
/// turned away.
async fn identify(service: &Service, request: &proto::AuthHandshake) -> Result<Identified, AuthError> {
    let wrong = match service.auth.identify(request).await {
        Ok(identity) => return Ok(Identified { identity, applied_index: 0 }),
        Err(wrong @ (AuthError::WrongPassword | AuthError::WrongKey)) => wrong,
        Err(error) => return Err(error),
    };
    if service.router.is_alone() || service.router.leads(GroupId::CLUSTER).is_some() {
        return Err(wrong);
    }
    let named = proto::AuthHandshake {
        client_id: request.client_id.clone(),
        password: request.password.clone(),
        token: request.token.clone(),
        ..Default::default()
    };
    forward::identify(service, named).await.unwrap_or(Err(wrong))
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
