//! One envelope: opens a session or keeps it alive, or holds a request of the session it names.

use std::sync::Arc;

use crate::server::access::handshake::authenticate;
use crate::server::problem::Problem;
use crate::server::{Service, api};
use crate::wire::PROTOCOL;
use crate::wire::answers::Answer;
use crate::wire::operations::answer_mut;
use crate::wire::proto::boomerang_envelope::Payload;
use crate::wire::proto::{self, Status};

/// Answers one envelope. Returns when the next one may be read: for what changes state that is before the answer.
pub(super) async fn handle(
    service: &Arc<Service>,
    envelope: proto::BoomerangEnvelope,
    respond: impl FnOnce(Payload) + Send + 'static,
) {
    let proto::BoomerangEnvelope { session_id, payload, .. } = envelope;
    let session = service.sessions.get(&session_id, service.clock.now_ms());
    let extended = match &payload {
        Some(Payload::AuthHandshake(handshake)) => handshake.protocol >= PROTOCOL,
        _ => session.as_ref().is_ok_and(|session| session.extended),
    };
    let metrics = service.metrics.clone();
    let respond = move |mut answer| {
        each_status(&mut answer, |status| {
            if *status != Status::Ok as i32 {
                metrics.refusals.inc();
            }
            if !extended {
                in_old_words(status);
            }
        });
        respond(answer);
    };
    match (payload, session) {
        (None, _) => respond(api::misunderstood(Problem::invalid("the envelope holds no request"))),
        (Some(Payload::AuthHandshake(handshake)), _) => {
            let answer = authenticate(service, handshake).await;
            respond(Payload::AuthResponse(answer.unwrap_or_else(proto::AuthResponse::refusing)));
        }
        (Some(Payload::SessionRefresh(_)), _) => {
            let answer = refresh(service, &session_id);
            respond(Payload::SessionRefreshResponse(answer.unwrap_or_else(proto::SessionRefreshResponse::refusing)));
        }
        (Some(payload), Ok(session)) => api::answer(service, session, payload, respond).await,
        (Some(payload), Err(error)) => respond(api::refused(&payload, error.into())),
    }
}

fn refresh(service: &Service, session_id: &str) -> Result<proto::SessionRefreshResponse, Problem> {
    let new_expires_at_ms = service.sessions.refresh(session_id, service.clock.now_ms())?;
    Ok(proto::SessionRefreshResponse { new_expires_at_ms, ..Default::default() })
}

/// Shows the status of an answer, and those of all that it answers together.
fn each_status(answer: &mut Payload, mut show: impl FnMut(&mut i32)) {
    match answer {
        Payload::RegistrationBatchResponse(batch) => batch.responses.iter_mut().for_each(|one| show(&mut one.status)),
        Payload::CancellationBatchResponse(batch) => batch.responses.iter_mut().for_each(|one| show(&mut one.status)),
        _ => {}
    }
    if let Some(answer) = answer_mut(answer) {
        show(answer.status_mut());
    }
}

/// For a client of the original protocol, which knows five statuses.
fn in_old_words(status: &mut i32) {
    if *status >= Status::NotLeader as i32 {
        *status = Status::Error as i32;
    }
}
