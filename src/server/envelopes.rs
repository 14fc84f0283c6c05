//! What to do with one envelope: open a session, or keep it alive; or find out whose request it is, and have it done by
//! this node ([`super::requests`]) or wherever it belongs ([`super::spread`]).

use std::sync::Arc;

use super::auth::{AuthError, Identity};
use super::forward::{self, Identified};
use super::problem::Problem;
use super::sessions::{Opened, Print};
use super::{Respond, Service, misunderstood, requests, spread};
use crate::task::{ClientId, GroupId, InstantMs};
use crate::wire::PROTOCOL;
use crate::wire::answers::answer_mut;
use crate::wire::convert::policy_over;
use crate::wire::proto::boomerang_envelope::Payload;
use crate::wire::proto::{self, Status};

/// Answers one envelope. Returns when the next one may be read: for what changes state that is before the answer.
pub(super) async fn handle(service: &Arc<Service>, envelope: proto::BoomerangEnvelope, respond: Respond) {
    let session = service.sessions.get(&envelope.session_id, service.clock.now_ms());
    let payload = match envelope.payload {
        None => return respond(misunderstood("the envelope holds no request")),
        Some(Payload::AuthHandshake(request)) => return respond(authenticate(service, request).await),
        Some(Payload::SessionRefresh(_)) => return respond(refresh(service, &envelope.session_id)),
        Some(payload) => payload,
    };
    let respond = match &session {
        Ok(session) if session.extended => respond,
        _ => Box::new(move |mut answer| {
            in_old_words(&mut answer);
            respond(answer);
        }),
    };
    match session {
        Ok(session) if !service.router.is_alone() => spread::ask(service, session, payload, respond).await,
        session => requests::serve(service, session, payload, respond).await,
    }
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
    if let Some(answer) = answer_mut(answer) {
        old(answer.status_mut());
    }
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
