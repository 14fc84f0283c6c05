//! To another node, on behalf of a client: requests, parts of lists, and who somebody is. What that node does with it is in
//! [`crate::server::peer`].
//!
//! What counts is what is known when no answer comes. [`Forwarded::NotSent`] and [`Forwarded::Elsewhere`] mean that
//! nothing was done; after [`Forwarded::Unknown`] anything may have been, and only what may be done twice is sent again.

use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use tonic::Status;
use tonic::transport::Channel;

use super::router::Route;
use crate::placement::LeaderAt;
use crate::server::Service;
use crate::server::access::auth::{Stored, Who};
use crate::server::access::sessions::Session;
use crate::server::problem::Problem;
use crate::server::scan::Part;
use crate::store::codec;
use crate::task::{ClientId, ClientLimits, GroupId, Policy};
use crate::wire::operations::Request;
use crate::wire::peer::requests_client::RequestsClient;
use crate::wire::peer::{self, forward_response, identify_request, identify_response, part_response};
use crate::wire::problems::Code;
use crate::wire::proto::{self, BoomerangEnvelope, boomerang_envelope::Payload};

/// A leader stores an entry within ten seconds, or says that it does not know.
const ANSWER_WITHIN: Duration = Duration::from_secs(12);
/// A page is read within milliseconds, or refused after some hundred of them.
const PART_WITHIN: Duration = Duration::from_secs(3);
/// Told to who asked for a list when another node has no room for its part.
const BUSY_RETRY: Duration = Duration::from_millis(250);
const IDENTIFY_WITHIN: Duration = Duration::from_secs(3);
/// Above the largest frame, with what is around it.
pub(in crate::server) const MESSAGE_BYTES_MAX: usize = 72 * 1024 * 1024;

/// On whose behalf: the part of a session that matters elsewhere.
#[derive(Serialize, Deserialize)]
pub(in crate::server) struct CallerRow {
    client: ClientId,
    admin: bool,
    policy: Option<Policy>,
    limits: ClientLimits,
}

impl From<CallerRow> for Session {
    fn from(row: CallerRow) -> Self {
        let CallerRow { client, admin, policy, limits } = row;
        Session::of_caller(client, admin, policy, limits)
    }
}

fn caller(session: &Session) -> Bytes {
    let policy = session.policy.as_deref().cloned();
    let row = CallerRow { client: session.client.clone(), admin: session.admin, policy, limits: session.limits };
    codec::encode(&row).into()
}

pub(in crate::server) fn envelope(payload: Payload) -> Bytes {
    BoomerangEnvelope { session_id: String::new(), payload: Some(payload), request_id: 0 }.encode_to_vec().into()
}

/// What came of asking another node.
#[derive(Debug)]
pub(in crate::server) enum Forwarded<T> {
    Answer(T),
    /// It does not lead the group; nothing was done.
    Elsewhere,
    /// It was not reached; nothing was done.
    NotSent,
    /// No answer came; it may have been done.
    Unknown(String),
}

/// There was no connection to send it on.
fn not_sent(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

fn failed<T>(status: &Status) -> Forwarded<T> {
    if not_sent(status) { Forwarded::NotSent } else { Forwarded::Unknown(status.message().to_owned()) }
}

fn client(service: &Service, node_id: u64) -> Result<RequestsClient<Channel>, String> {
    let channel = service.router.cluster().network().requests_to(node_id)?;
    Ok(RequestsClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX))
}

fn learn(service: &Service, elsewhere: &peer::Elsewhere) {
    if let Ok(group) = u16::try_from(elsewhere.group) {
        service.router.told(GroupId(group), LeaderAt { node_id: elsewhere.leader_node, term: elsewhere.term });
    }
}

/// Asks another node, and waits for its answer.
pub(super) async fn send<R: Request>(
    service: &Service,
    node_id: u64,
    session: &Session,
    request: R,
) -> Forwarded<Result<R::Answer, Problem>> {
    let Ok(mut client) = client(service, node_id) else { return Forwarded::NotSent };
    service.metrics.forwarded.inc();
    let cluster = service.router.cluster().network().cluster().to_owned();
    let request = peer::ForwardRequest { cluster, caller: caller(session), envelope: envelope(request.into()) };
    let answer = match timeout(ANSWER_WITHIN, client.forward(request)).await {
        Err(_) => return Forwarded::Unknown(format!("node {node_id} does not answer")),
        Ok(Err(status)) => return failed(&status),
        Ok(Ok(answer)) => answer.into_inner(),
    };
    match answer.result {
        Some(forward_response::Result::Elsewhere(elsewhere)) => {
            learn(service, &elsewhere);
            Forwarded::Elsewhere
        }
        Some(forward_response::Result::Envelope(bytes)) => {
            match BoomerangEnvelope::decode(bytes).ok().and_then(|envelope| envelope.payload).map(read::<R>) {
                Some(Ok(answer)) => Forwarded::Answer(answer),
                Some(Err(())) | None => Forwarded::Unknown(format!("the answer of node {node_id} makes no sense")),
            }
        }
        None => Forwarded::Unknown(format!("the answer of node {node_id} is empty")),
    }
}

/// The answer to such a request; an error when it is none.
fn read<R: Request>(payload: Payload) -> Result<Result<R::Answer, Problem>, ()> {
    if let Payload::ErrorResponse(refusal) = payload {
        return Problem::unless_done(refusal).map_or_else(|problem| Ok(Err(problem)), |_| Err(()));
    }
    R::answer_in(payload).map(Problem::unless_done).ok_or(())
}

/// Asks another node for its part of a list.
pub(super) async fn part<R: Request>(
    service: &Service,
    node_id: u64,
    session: &Session,
    request: R,
    groups: &[GroupId],
) -> Forwarded<Result<Part<Bytes>, Problem>> {
    let Ok(mut client) = client(service, node_id) else { return Forwarded::NotSent };
    let request = peer::PartRequest {
        cluster: service.router.cluster().network().cluster().to_owned(),
        caller: caller(session),
        envelope: envelope(request.into()),
        groups: groups.iter().map(|group| u32::from(group.0)).collect(),
    };
    let answer = match timeout(PART_WITHIN, client.list_part(request)).await {
        Err(_) => return Forwarded::Unknown(format!("node {node_id} does not answer")),
        Ok(Err(status)) => return failed(&status),
        Ok(Ok(answer)) => answer.into_inner(),
    };
    match answer.result {
        Some(part_response::Result::Part(part)) if part.places.len() == part.items.len() => {
            let items = part.places.into_iter().map(|place| place.to_vec()).zip(part.items).collect();
            let more_behind = (!part.more_behind.is_empty()).then(|| part.more_behind.to_vec());
            Forwarded::Answer(Ok(Part { items, more_behind }))
        }
        Some(part_response::Result::Elsewhere(elsewhere)) => {
            learn(service, &elsewhere);
            Forwarded::Elsewhere
        }
        Some(part_response::Result::Problem(bytes)) => Forwarded::Answer(Err(read_problem(bytes))),
        _ => Forwarded::Unknown(format!("the answer of node {node_id} makes no sense")),
    }
}

/// A refusal, as one node writes it for another.
pub(in crate::server) fn written(problem: Problem) -> Bytes {
    let answer = proto::ErrorResponse { status: problem.code.status() as i32, error_message: problem.text };
    answer.encode_to_vec().into()
}

fn read_problem(bytes: Bytes) -> Problem {
    let answer = proto::ErrorResponse::decode(bytes).unwrap_or_default();
    match Problem::unless_done(answer) {
        // The other node does not say when it will have room.
        Err(problem) if problem.code == Code::LimitReached => Problem::overloaded(problem.text, BUSY_RETRY),
        Err(problem) => problem,
        Ok(_) => Problem::new(Code::Failed, "another node has refused its part and has not said why"),
    }
}

/// Asks the leader of group 0 what it knows of somebody, and how far it had applied the group by then. `None` when it
/// cannot be asked now.
pub(in crate::server) async fn stored(service: &Service, who: &Who) -> Option<(Option<Stored>, u64)> {
    let Route::At(node_id) = service.router.route(GroupId::CLUSTER, None) else { return None };
    let mut client = client(service, node_id).ok()?;
    let cluster = service.router.cluster().network().cluster().to_owned();
    let who = match who {
        Who::Client(client) => identify_request::Who::Client(client.to_string()),
        Who::Key(key_id) => identify_request::Who::KeyId(key_id.clone()),
    };
    let request = peer::IdentifyRequest { cluster, who: Some(who) };
    let answer = timeout(IDENTIFY_WITHIN, client.identify(request)).await.ok()?.ok()?.into_inner();
    match answer.result? {
        identify_response::Result::Stored(bytes) => {
            Some((codec::decode("what is stored of a client", &bytes).ok()?, answer.applied_index))
        }
        identify_response::Result::Elsewhere(_) => None,
    }
}
