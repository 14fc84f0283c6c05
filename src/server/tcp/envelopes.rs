//! One envelope: opens a session or keeps it alive, or holds a request of the session it names.

use std::net::IpAddr;
use std::sync::Arc;

use crate::server::access::handshake::authenticate;
use crate::server::problem::Problem;
use crate::server::{Service, api};
use crate::wire::PROTOCOL;
use crate::wire::answers::{Answer, Verdict};
use crate::wire::operations::answer_mut;
use crate::wire::proto::boomerang_envelope::Payload;
use crate::wire::proto::{self, Status};

/// Answers one envelope, which came from this address. Returns when the next one may be read: for what changes state that is before the answer.
pub(super) async fn handle(
    service: &Arc<Service>,
    envelope: proto::BoomerangEnvelope,
    from: IpAddr,
    respond: impl FnOnce(Payload) + Send + 'static,
) {
    let proto::BoomerangEnvelope { session_id, payload, .. } = envelope;
    let session = service.sessions.get(&session_id, service.clock.now_ms());
    let extended = match &payload {
        Some(Payload::AuthHandshake(handshake)) => handshake.protocol >= PROTOCOL,
        _ => session.as_ref().is_ok_and(|session| session.extended),
    };
    let tasks = match &payload {
        Some(Payload::RegistrationRequest(_)) => 1,
        Some(Payload::RegistrationBatch(batch)) => batch.tasks.len(),
        _ => 0,
    };
    let metrics = service.metrics.clone();
    let respond = move |mut answer| {
        if tasks > 0 {
            metrics.refusals.inc_by(refused(&answer, tasks));
        }
        if !extended {
            in_old_words(&mut answer);
        }
        respond(answer);
    };
    match (payload, session) {
        (None, _) => respond(api::misunderstood(Problem::invalid("the envelope holds no request"))),
        (Some(Payload::AuthHandshake(handshake)), _) => {
            let answer = authenticate(service, handshake, from).await;
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

/// How many of `tasks` registrations were refused, without those that belong elsewhere.
fn refused(answer: &Payload, tasks: usize) -> u64 {
    let is_refused = |verdict: &Verdict<'_>| verdict.status != Status::Ok as i32 && !verdict.is_not_leader();
    let refused = match answer {
        Payload::RegistrationBatchResponse(batch) if !batch.responses.is_empty() => {
            batch.responses.iter().filter(|answer| is_refused(&answer.verdict())).count()
        }
        answer => Verdict::of(answer).filter(is_refused).map_or(0, |_| tasks),
    };
    refused as u64
}

/// For a client of the original protocol, which knows five statuses.
fn in_old_words(answer: &mut Payload) {
    let old = |status: &mut i32| {
        if *status >= Status::NotLeader as i32 {
            *status = Status::Error as i32;
        }
    };
    match answer {
        Payload::RegistrationBatchResponse(batch) => batch.responses.iter_mut().for_each(|one| old(&mut one.status)),
        Payload::CancellationBatchResponse(batch) => batch.responses.iter_mut().for_each(|one| old(&mut one.status)),
        _ => {}
    }
    if let Some(answer) = answer_mut(answer) {
        old(answer.status_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: Status) -> proto::RegistrationResponse {
        proto::RegistrationResponse { status: status.into(), ..Default::default() }
    }

    #[test]
    fn each_task_that_was_refused_counts() {
        let batch = |responses| {
            Payload::RegistrationBatchResponse(proto::RegistrationBatchResponse { responses, ..Default::default() })
        };
        let whole = proto::RegistrationBatchResponse { status: Status::Overloaded.into(), ..Default::default() };
        for (name, payload, tasks, expected) in [
            ("stored", Payload::RegistrationResponse(answer(Status::Ok)), 1, 0),
            ("refused", Payload::RegistrationResponse(answer(Status::Overloaded)), 1, 1),
            ("sent elsewhere", Payload::RegistrationResponse(answer(Status::NotLeader)), 1, 0),
            (
                "a part",
                batch(vec![answer(Status::Ok), answer(Status::InvalidRequest), answer(Status::NotLeader)]),
                3,
                1,
            ),
            ("a whole batch", Payload::RegistrationBatchResponse(whole), 1_000, 1_000),
            ("an empty batch", batch(vec![]), 0, 0),
        ] {
            assert_eq!(refused(&payload, tasks), expected, "{name}");
        }
    }

    #[test]
    fn the_original_protocol_knows_five_statuses() {
        let mut batch = proto::RegistrationBatchResponse { status: Status::NotLeader.into(), ..Default::default() };
        batch.responses = vec![answer(Status::TooLate), answer(Status::SessionExpired)];
        let mut payload = Payload::RegistrationBatchResponse(batch);
        in_old_words(&mut payload);
        let Payload::RegistrationBatchResponse(batch) = payload else { unreachable!("it is the same answer") };
        let statuses: Vec<Status> = batch.responses.iter().map(proto::RegistrationResponse::status).collect();
        assert_eq!((batch.status(), statuses), (Status::Error, vec![Status::Error, Status::SessionExpired]));
    }
}
