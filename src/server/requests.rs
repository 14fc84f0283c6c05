//! What each message means: from an envelope to an answer.
//!
//! A request is checked here in the order of who asks, what is asked, and whether it fits the limits. What changes
//! state goes to the proposer, with a closure that turns the reply into the answering message; reads are answered from
//! this node's state.

use std::sync::Arc;

use super::Service;
use super::auth::{AuthError, Identity, new_key};
use super::list;
use super::sessions::{Session, SessionError};
use crate::callback::Callbacks;
use crate::propose::{Ask, Due, Refused};
use crate::shard::{self, PutApiKey, PutClient, Reply, Request};
use crate::store::StoreError;
use crate::store::keys::Key;
use crate::store::overlay::get_row;
use crate::store::rows::{CursorRow, PolicyRow, TaskRow};
use crate::task::{ClientId, GroupId, InstantMs, Invalid, Policy, TaskId};
use crate::wire::convert::{callback_to, policy_over};
use crate::wire::proto::boomerang_envelope::Payload;
use crate::wire::{PROTOCOL, proto};
use proto::Status;

/// Sends the answer to one request; called once, from any task.
pub(super) type Respond = Box<dyn FnOnce(Payload) + Send>;

/// An answer that is not the one hoped for, before it is put into the message of its request.
#[derive(Debug)]
pub(super) struct Problem {
    status: Status,
    text: String,
    detail: Option<proto::Detail>,
}

impl Problem {
    fn new(status: Status, text: impl Into<String>) -> Self {
        Self { status, text: text.into(), detail: None }
    }

    pub(super) fn unauthorized(text: impl Into<String>) -> Self {
        Self::new(Status::Unauthorized, text)
    }

    /// A client of the original protocol knows five statuses.
    fn status_for(&self, extended: bool) -> i32 {
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

/// An answer that says no more than yes or no.
macro_rules! plain_answer {
    ($variant:ident, $message:ident, $result:expr, $extended:expr) => {
        Payload::$variant(match $result {
            Ok(()) => proto::$message { status: Status::Ok as i32, ..Default::default() },
            Err(problem) => {
                let problem: Problem = problem;
                proto::$message {
                    status: problem.status_for($extended),
                    error_message: problem.text,
                    ..Default::default()
                }
            }
        })
    };
}

/// Answers one envelope. Returns when the next one may be read: for what changes state that is before the answer.
pub(super) async fn handle(service: &Arc<Service>, envelope: proto::BoomerangEnvelope, respond: Respond) {
    let session = service.sessions.get(&envelope.session_id, service.clock.now_ms());
    let Some(payload) = envelope.payload else {
        return respond(misunderstood("the envelope holds no request"));
    };
    match payload {
        Payload::AuthHandshake(request) => respond(authenticate(service, request).await),
        Payload::SessionRefresh(_) => respond(refresh(service, &envelope.session_id)),
        Payload::RegistrationRequest(task) => register(service, session, task, respond).await,
        Payload::CancellationRequest(request) => cancel(service, session, &request, respond).await,
        Payload::GetTaskRequest(request) => {
            let extended = session.as_ref().is_ok_and(|session| session.extended);
            let found = session.map_err(Problem::from).and_then(|session| get(service, &session, &request));
            respond(match found {
                Ok(task) => Payload::GetTaskResponse(proto::GetTaskResponse {
                    status: Status::Ok as i32,
                    task: Some(task),
                    ..Default::default()
                }),
                Err(problem) => plain_answer!(GetTaskResponse, GetTaskResponse, Err(problem), extended),
            });
        }
        Payload::ListTasksRequest(request) => {
            let extended = session.as_ref().is_ok_and(|session| session.extended);
            let found = session
                .map_err(Problem::from)
                .and_then(|session| tokio::task::block_in_place(|| list::page(service, &session, &request)));
            respond(match found {
                Ok(page) => Payload::ListTasksResponse(page),
                Err(problem) => plain_answer!(ListTasksResponse, ListTasksResponse, Err(problem), extended),
            });
        }
        Payload::ClientRegistration(request) => {
            let extended = session.as_ref().is_ok_and(|session| session.extended);
            let result = register_client(service, session, request).await;
            respond(plain_answer!(ClientRegistrationResponse, ClientRegistrationResponse, result, extended));
        }
        Payload::ClientDeregistration(request) => {
            let extended = session.as_ref().is_ok_and(|session| session.extended);
            let result = deregister_client(service, session, &request.client_id).await;
            respond(plain_answer!(ClientDeregistrationResponse, ClientDeregistrationResponse, result, extended));
        }
        Payload::ApiKeyRequest(request) => respond(create_key(service, session, request).await),
        Payload::ApiKeyRevocation(request) => {
            let result = revoke_key(service, session, request.key_id).await;
            respond(plain_answer!(ApiKeyRevocationResponse, ApiKeyRevocationResponse, result, true));
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
        | _ => {
            respond(misunderstood("the envelope holds an answer where a request was expected"));
        }
    }
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
    policy.as_ref().map_or(Ok(()), check_policy)?;
    Ok(service.sessions.open(client, row.admin, key_id, policy, extended, service.clock.now_ms())?)
}

/// Refuses what could never be delivered when it is set, not when it is due.
fn check_policy(policy: &Policy) -> Result<(), Problem> {
    let protocol = policy.callback.protocol;
    if Callbacks::supports(protocol) {
        return Ok(());
    }
    Err(Problem::new(
        Status::InvalidRequest,
        format!("callback.protocol: {protocol} callbacks are not supported by this version"),
    ))
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

async fn register(
    service: &Arc<Service>,
    session: Result<Arc<Session>, SessionError>,
    task: proto::Task,
    respond: Respond,
) {
    let extended = session.as_ref().is_ok_and(|session| session.extended);
    let refuse = move |problem: Problem| {
        Payload::RegistrationResponse(proto::RegistrationResponse {
            status: problem.status_for(extended),
            error_message: problem.text,
            detail: problem.detail,
            ..Default::default()
        })
    };
    let ask = match session.map_err(Problem::from).and_then(|session| registration(service, &session, task)) {
        Ok(ask) => ask,
        Err(problem) => {
            service.metrics.refusals.inc();
            return respond(refuse(problem));
        }
    };
    let arrived_us = service.clock.now_us();
    let (clock, metrics) = (service.clock.clone(), service.metrics.clone());
    let answer = move |result: Result<Reply, Refused>| {
        respond(match result {
            Ok(Reply::Registered { id, due_ms }) => {
                metrics.registrations.inc();
                let took = clock.now_us().saturating_sub(arrived_us);
                metrics.registration_latency.observe(std::time::Duration::from_micros(took).as_secs_f64());
                Payload::RegistrationResponse(proto::RegistrationResponse {
                    task_id: id.to_string(),
                    status: Status::Ok as i32,
                    scheduled_time_ms: due_ms,
                    ..Default::default()
                })
            }
            Ok(other) => unreachable!("a registration is never answered with {other:?}"),
            Err(refused) => {
                metrics.refusals.inc();
                refuse(refused.into())
            }
        });
    };
    service.proposer.submit(service.proposer.any_shard(), ask, Box::new(answer)).await;
}

fn registration(service: &Service, session: &Session, task: proto::Task) -> Result<Ask, Problem> {
    let limits = &service.limits;
    limits.check_payload(task.payload.len())?;
    limits.check_interval(task.repeat_interval_ms)?;
    let due = match (task.due_ms, task.delay_ms) {
        (0, delay_ms) => {
            limits.check_delay(delay_ms)?;
            Due::After(delay_ms)
        }
        (due_ms, 0) => {
            limits.check_due(due_ms, service.clock.now_ms())?;
            Due::At(due_ms)
        }
        _ => return Err(Invalid::new("due_ms: cannot be given together with delay_ms").into()),
    };
    let Some(policy) = session.policy.clone() else {
        return Err(Problem::new(
            Status::InvalidRequest,
            "callback: neither the session nor the client has one; give it in the handshake or register the client with one",
        ));
    };
    Ok(Ask::Register {
        client: session.client.clone(),
        policy,
        due,
        interval_ms: task.repeat_interval_ms,
        payload: task.payload,
    })
}

/// The group that holds a task.
fn group_of(service: &Service, id: &str) -> Result<(TaskId, GroupId), Problem> {
    let id: TaskId = id.parse()?;
    if id.shard().0 >= service.shards {
        return Err(Problem::new(Status::NotFound, format!("task {id} is not known")));
    }
    Ok((id, GroupId::of_shard(id.shard())))
}

fn not_found(id: TaskId) -> Problem {
    Problem::new(Status::NotFound, format!("task {id} is not known: it was never registered, or is done, or cancelled"))
}

async fn cancel(
    service: &Arc<Service>,
    session: Result<Arc<Session>, SessionError>,
    request: &proto::CancellationRequest,
    respond: Respond,
) {
    let extended = session.as_ref().is_ok_and(|session| session.extended);
    let message = move |result: Result<(), Problem>| {
        Payload::CancellationResponse(match result {
            Ok(()) => proto::CancellationResponse { status: Status::Ok as i32, ..Default::default() },
            Err(problem) => proto::CancellationResponse {
                status: problem.status_for(extended),
                error_message: problem.text,
                detail: problem.detail,
            },
        })
    };
    let found = session.map_err(Problem::from).and_then(|session| {
        let (id, group) = group_of(service, &request.task_id)?;
        Ok((id, group, (!session.admin).then(|| session.client.clone())))
    });
    let (id, group, owner) = match found {
        Ok(found) => found,
        Err(problem) => return respond(message(Err(problem))),
    };
    let metrics = service.metrics.clone();
    let answer = move |result: Result<Reply, Refused>| {
        respond(message(match result {
            Ok(Reply::Cancelled) => {
                metrics.cancellations.inc();
                Ok(())
            }
            Ok(Reply::NotFound) => Err(not_found(id)),
            Ok(Reply::TooLate { occurrence, attempt }) => Err(Problem {
                status: Status::TooLate,
                text: format!("too late: attempt {attempt} of occurrence {occurrence} may be out; nothing follows it"),
                detail: Some(proto::Detail { occurrence, attempt, ..Default::default() }),
            }),
            Ok(other) => unreachable!("a cancellation is never answered with {other:?}"),
            Err(refused) => Err(refused.into()),
        }));
    };
    service.proposer.submit(group, Ask::Cancel { id, owner }, Box::new(answer)).await;
}

fn get(service: &Service, session: &Session, request: &proto::GetTaskRequest) -> Result<proto::TaskDetails, Problem> {
    let (id, group) = group_of(service, &request.task_id)?;
    let (task, cursor) = shard::read_task(&service.store, group, id)?.ok_or_else(|| not_found(id))?;
    if !session.admin && task.client != session.client {
        return Err(not_found(id));
    }
    details(service, group, id, task, cursor)
}

/// A task as it is shown.
pub(super) fn details(
    service: &Service,
    group: GroupId,
    id: TaskId,
    task: TaskRow,
    cursor: CursorRow,
) -> Result<proto::TaskDetails, Problem> {
    let policy: Option<PolicyRow> = get_row(&service.store, "a policy", &Key::policy(group, task.policy))?;
    Ok(proto::TaskDetails {
        task_id: id.to_string(),
        client_id: task.client.to_string(),
        expiration_ms: cursor.due_ms,
        repeat_interval_ms: task.interval_ms,
        payload: task.payload,
        first_due_ms: task.first_due_ms,
        occurrence: cursor.occurrence,
        attempt: cursor.attempt,
        callback: policy.map(|row| callback_to(&row.policy.callback)),
        ..Default::default()
    })
}

fn administrator(session: Result<Arc<Session>, SessionError>) -> Result<Arc<Session>, Problem> {
    let session = session?;
    if session.admin {
        return Ok(session);
    }
    Err(Problem::new(Status::Unauthorized, format!("client '{}' is not an administrator", session.client)))
}

/// Asks the cluster's own group.
async fn ask_cluster(service: &Service, request: Request) -> Result<Reply, Problem> {
    Ok(service.proposer.ask(GroupId::CLUSTER, Ask::Plain(request)).await?)
}

async fn register_client(
    service: &Service,
    session: Result<Arc<Session>, SessionError>,
    request: proto::ClientRegistrationRequest,
) -> Result<(), Problem> {
    administrator(session)?;
    let client: ClientId = request.client_id.parse()?;
    let policy = policy_over(None, request.callback.as_ref(), request.retry.as_ref(), request.dlq.as_ref())?;
    policy.as_ref().map_or(Ok(()), check_policy)?;
    let password_hash = service.auth.hash(request.password).await?;
    let put =
        PutClient { client: client.clone(), password_hash, admin: request.is_admin, policy, only_if_absent: false };
    ask_cluster(service, Request::PutClient(put)).await?;
    // Whoever is in with an old password or old rights comes in again with the new ones.
    service.sessions.end_all(&client);
    Ok(())
}

async fn deregister_client(
    service: &Service,
    session: Result<Arc<Session>, SessionError>,
    client: &str,
) -> Result<(), Problem> {
    administrator(session)?;
    let client: ClientId = client.parse()?;
    if client.as_str() == ClientId::ADMIN {
        return Err(Problem::new(Status::InvalidRequest, "client_id: 'admin' cannot be removed"));
    }
    match ask_cluster(service, Request::RemoveClient(client.clone())).await? {
        Reply::NotFound => Err(Problem::new(Status::NotFound, format!("client '{client}' is not known"))),
        _ => {
            service.sessions.end_all(&client);
            Ok(())
        }
    }
}

async fn create_key(
    service: &Service,
    session: Result<Arc<Session>, SessionError>,
    request: proto::ApiKeyRequest,
) -> Payload {
    const LABEL_BYTES_MAX: usize = 128;
    let created = async {
        administrator(session)?;
        let client: ClientId = request.client_id.parse()?;
        if request.label.len() > LABEL_BYTES_MAX {
            return Err(Invalid::new(format!("label: more than {LABEL_BYTES_MAX} bytes")).into());
        }
        let new = new_key();
        let put = PutApiKey {
            key_id: new.key_id.clone(),
            client: client.clone(),
            label: request.label,
            secret_hash: new.secret_hash,
        };
        match ask_cluster(service, Request::PutApiKey(put)).await? {
            Reply::NotFound => Err(Problem::new(Status::NotFound, format!("client '{client}' is not known"))),
            _ => Ok(new),
        }
    };
    Payload::ApiKeyResponse(match created.await {
        Ok(new) => {
            proto::ApiKeyResponse { status: Status::Ok as i32, key_id: new.key_id, key: new.key, ..Default::default() }
        }
        Err(problem) => proto::ApiKeyResponse {
            status: problem.status_for(true),
            error_message: problem.text,
            ..Default::default()
        },
    })
}

async fn revoke_key(
    service: &Service,
    session: Result<Arc<Session>, SessionError>,
    key_id: String,
) -> Result<(), Problem> {
    administrator(session)?;
    match ask_cluster(service, Request::RemoveApiKey(key_id.clone())).await? {
        Reply::NotFound => Err(Problem::new(Status::NotFound, format!("API key '{key_id}' is not known"))),
        _ => {
            service.sessions.end_all_of_key(&key_id);
            Ok(())
        }
    }
}
