//! What each request means on this node, whoever leads what it is about: the proposer refuses what this node does not lead.
//! What a request does is in [`super::tasks`], [`super::letters`], [`super::clients`] and [`super::cluster`].
//!
//! A request is checked here in the order of who asks, what is asked, and whether it fits the limits. What changes
//! state goes to the proposer, with a closure that turns the reply into the answering message; reads are answered from
//! this node's state.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::problem::Problem;
use super::sessions::{Session, SessionError};
use super::{Respond, Service, clients, cluster, letters, list, misunderstood, tasks};
use crate::propose::Refused;
use crate::wire::answers::{Answer, refused};
use crate::wire::proto::boomerang_envelope::Payload;
use crate::wire::proto::{self, Status};

/// An answer that says no more than yes or no.
macro_rules! plain_answer {
    ($message:ident, $result:expr) => {
        match $result {
            Ok(()) => proto::$message { status: Status::Ok as i32, ..Default::default() },
            Err(problem) => proto::$message::refusing(problem),
        }
    };
}

/// Does a request here, whoever leads what it is about; the proposer refuses what this node does not lead.
pub(super) async fn served(service: &Arc<Service>, session: Arc<Session>, payload: Payload) -> Payload {
    let (out, answer) = oneshot::channel();
    let respond = Box::new(move |answer| {
        // Whoever asked may be gone.
        let _ = out.send(answer);
    });
    let stopping = refused(&payload, Problem::from(Refused::Stopping));
    serve(service, Ok(session), payload, respond).await;
    answer.await.unwrap_or(stopping)
}

/// Does a request on this node, and calls `respond` with the answer, perhaps later. Returns when the next request of the same
/// connection may be read: for what changes state that is before the answer.
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
            respond(Payload::GetTaskResponse(answer.unwrap_or_else(proto::GetTaskResponse::refusing)));
        }
        Payload::ListTasksRequest(request) => {
            let service = service.clone();
            // What this connection asks for next does not wait for it.
            tokio::spawn(async move {
                let page = move |service: &Service, session: &Session| list::page(service, session, &request);
                respond(Payload::ListTasksResponse(
                    service.read_page(session, page).await.unwrap_or_else(proto::ListTasksResponse::refusing),
                ));
            });
        }
        Payload::ListDeadLettersRequest(request) => {
            let service = service.clone();
            tokio::spawn(async move {
                let page = move |service: &Service, session: &Session| letters::page(service, session, &request);
                respond(Payload::ListDeadLettersResponse(
                    service.read_page(session, page).await.unwrap_or_else(proto::ListDeadLettersResponse::refusing),
                ));
            });
        }
        Payload::GetDeadLetterRequest(request) => {
            let answer = read(session, |session| letters::get(service, session, &request));
            respond(Payload::GetDeadLetterResponse(answer.unwrap_or_else(proto::GetDeadLetterResponse::refusing)));
        }
        Payload::ReplayDeadLettersRequest(request) => {
            let answer = letters::replay(service, session, request).await;
            respond(Payload::ReplayDeadLettersResponse(
                answer.unwrap_or_else(proto::ReplayDeadLettersResponse::refusing),
            ));
        }
        Payload::PurgeDeadLettersRequest(request) => {
            let answer = letters::purge(service, session, request).await;
            respond(Payload::PurgeDeadLettersResponse(
                answer.unwrap_or_else(proto::PurgeDeadLettersResponse::refusing),
            ));
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
            respond(Payload::ApiKeyResponse(
                clients::create_key(service, session, request).await.unwrap_or_else(proto::ApiKeyResponse::refusing),
            ));
        }
        Payload::ApiKeyRevocation(request) => {
            let result = clients::revoke_key(service, session, request.key_id).await;
            respond(Payload::ApiKeyRevocationResponse(plain_answer!(ApiKeyRevocationResponse, result)));
        }
        Payload::ShardMapRequest(_) => {
            let answer = session.map(|_| service.router.map()).map_err(Problem::from);
            respond(Payload::ShardMapResponse(answer.unwrap_or_else(proto::ShardMapResponse::refusing)));
        }
        Payload::AuthHandshake(_) | Payload::SessionRefresh(_) => {
            respond(misunderstood("a session belongs to the node it was opened on"));
        }
        Payload::ClusterRequest(request) => {
            // Rare, and large: not a part of what each connection keeps.
            respond(Payload::ClusterResponse(match Box::pin(cluster::handle(service, session, request)).await {
                Ok(answer) => proto::ClusterResponse { status: Status::Ok as i32, answer, ..Default::default() },
                Err(problem) => proto::ClusterResponse::refusing(problem),
            }));
        }
        Payload::CallbackRequest(_) | Payload::CallbackResponse(_) => {
            respond(misunderstood("a callback is sent by the server, to the receiver's own address"));
        }
        // Named one by one, so that the compiler asks where a new request goes.
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

/// What is answered from this node's state, which may have to be read from disk.
fn read<T>(
    session: Result<Arc<Session>, SessionError>,
    answer: impl FnOnce(&Session) -> Result<T, Problem>,
) -> Result<T, Problem> {
    let session = session?;
    tokio::task::block_in_place(|| answer(&session))
}
