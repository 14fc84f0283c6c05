//! From one node to another, on behalf of a client: requests, parts of lists, and who somebody is.
//!
//! The node that is asked does it or says that it does not lead; it never asks a third one. So a request takes one hop
//! at most, and whoever sent it looks again for the leader. Both ends trust each other: the peer port is for nodes only,
//! and the caller a request comes with has been checked by the node the client is connected to.
//!
//! What counts is what is known when no answer comes. [`Forwarded::NotSent`] and [`Forwarded::Elsewhere`] mean that
//! nothing was done; after [`Forwarded::Unknown`] anything may have been, and only what may be done twice is sent again.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

use super::Service;
use super::auth::{AuthError, Identity};
use super::parts::part_here;
use super::problem::Problem;
use super::requests::served;
use super::route::Route;
use super::sessions::Session;
use super::walk::Part;
use crate::placement::LeaderAt;
use crate::store::StoreError;
use crate::store::codec;
use crate::store::keys::Key;
use crate::store::overlay::get_row;
use crate::store::rows::{Applied, ClientRow};
use crate::task::{ClientId, ClientLimits, GroupId, Policy};
use crate::wire::answers::is_not_leader;
use crate::wire::peer::requests_client::RequestsClient;
use crate::wire::peer::requests_server::{Requests, RequestsServer};
use crate::wire::peer::{self, forward_response, identify_response, part_response};
use crate::wire::proto::{self, BoomerangEnvelope, boomerang_envelope::Payload};
use crate::wire::routing::{self, Access, Target};

/// A leader stores an entry within ten seconds, or says that it does not know.
const ANSWER_WITHIN: Duration = Duration::from_secs(12);
/// A page is read within milliseconds, or refused after some hundred of them.
const PART_WITHIN: Duration = Duration::from_secs(3);
/// Told to who asked for a list when another node has no room for its part.
const BUSY_RETRY: Duration = Duration::from_millis(250);
const IDENTIFY_WITHIN: Duration = Duration::from_secs(3);
/// Above the largest frame, with what is around it.
const MESSAGE_BYTES_MAX: usize = 72 * 1024 * 1024;

/// On whose behalf: the part of a session that matters elsewhere.
#[derive(Serialize, Deserialize)]
struct CallerRow {
    client: ClientId,
    admin: bool,
    policy: Option<Policy>,
    limits: ClientLimits,
}

fn caller(session: &Session) -> Bytes {
    let policy = session.policy.as_deref().cloned();
    let row = CallerRow { client: session.client.clone(), admin: session.admin, policy, limits: session.limits };
    codec::encode(&row).into()
}

fn envelope(payload: Payload) -> Bytes {
    BoomerangEnvelope { session_id: String::new(), payload: Some(payload), request_id: 0 }.encode_to_vec().into()
}

/// What came of asking another node.
#[derive(Debug)]
pub(super) enum Forwarded<T> {
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
pub(super) async fn send(service: &Service, node_id: u64, session: &Session, payload: Payload) -> Forwarded<Payload> {
    let Ok(mut client) = client(service, node_id) else { return Forwarded::NotSent };
    service.metrics.forwarded.inc();
    let cluster = service.router.cluster().network().cluster().to_owned();
    let request = peer::ForwardRequest { cluster, caller: caller(session), envelope: envelope(payload) };
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
            match BoomerangEnvelope::decode(bytes).ok().and_then(|envelope| envelope.payload) {
                Some(payload) => Forwarded::Answer(payload),
                None => Forwarded::Unknown(format!("the answer of node {node_id} makes no sense")),
            }
        }
        None => Forwarded::Unknown(format!("the answer of node {node_id} is empty")),
    }
}

/// Asks another node for its part of a list.
pub(super) async fn part(
    service: &Service,
    node_id: u64,
    session: &Session,
    payload: Payload,
    groups: &[GroupId],
) -> Forwarded<Result<Part<Bytes>, Problem>> {
    let Ok(mut client) = client(service, node_id) else { return Forwarded::NotSent };
    let request = peer::PartRequest {
        cluster: service.router.cluster().network().cluster().to_owned(),
        caller: caller(session),
        envelope: envelope(payload),
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

fn written(problem: Problem) -> Bytes {
    let answer = proto::ErrorResponse { status: problem.status as i32, error_message: problem.text };
    answer.encode_to_vec().into()
}

fn read_problem(bytes: Bytes) -> Problem {
    let answer = proto::ErrorResponse::decode(bytes).unwrap_or_default();
    match proto::Status::try_from(answer.status).unwrap_or(proto::Status::Error) {
        // The other node does not say when it will have room.
        proto::Status::Overloaded => Problem::overloaded(answer.error_message, BUSY_RETRY),
        status => Problem::new(status, answer.error_message),
    }
}

/// Who somebody is, and when that was found out.
#[derive(Debug)]
pub(super) struct Identified {
    pub identity: Identity,
    /// What the leader of group 0 had applied by then.
    pub applied_index: u64,
}

#[derive(Serialize, Deserialize)]
struct IdentityRow {
    client: ClientId,
    row: ClientRow,
    key_id: Option<String>,
}

/// Asks the leader of group 0 who this is. `None` when it cannot be asked now.
pub(super) async fn identify(
    service: &Service,
    handshake: proto::AuthHandshake,
) -> Option<Result<Identified, AuthError>> {
    let by_key = !handshake.token.is_empty();
    let Route::At(node_id) = service.router.route(GroupId::CLUSTER, None) else { return None };
    let mut client = client(service, node_id).ok()?;
    let cluster = service.router.cluster().network().cluster().to_owned();
    let request = peer::IdentifyRequest { cluster, handshake: handshake.encode_to_vec().into() };
    let answer = timeout(IDENTIFY_WITHIN, client.identify(request)).await.ok()?.ok()?.into_inner();
    match answer.result? {
        identify_response::Result::Identity(bytes) => {
            let IdentityRow { client, row, key_id } = codec::decode("an identity", &bytes).ok()?;
            let identity = Identity { client, row, key_id };
            Some(Ok(Identified { identity, applied_index: answer.applied_index }))
        }
        identify_response::Result::Elsewhere(_) => None,
        identify_response::Result::Refused(_) => {
            Some(Err(if by_key { AuthError::WrongKey } else { AuthError::WrongPassword }))
        }
    }
}

/// How far this node has applied group 0.
pub(super) fn applied_index(service: &Service) -> Result<u64, StoreError> {
    let applied: Option<Applied> = get_row(&service.store, "last applied", &Key::applied(GroupId::CLUSTER))?;
    Ok(applied.map_or(0, |applied| applied.index))
}

/// What other nodes ask of this one. Cheap to clone; the peer port is open before there is a service to ask, because
/// the groups begin by it.
#[derive(Clone)]
pub struct Forwarding {
    service: Arc<OnceLock<Arc<Service>>>,
    /// Where requests are served: not on the threads that hear them, which have more urgent things to do.
    threads: Handle,
}

impl Forwarding {
    /// Serves on the runtime this is called on.
    #[expect(clippy::new_without_default, reason = "it has to be called on a runtime")]
    pub fn new() -> Self {
        Self { service: Arc::default(), threads: Handle::current() }
    }

    /// For the peer port.
    pub fn server(&self) -> RequestsServer<Self> {
        RequestsServer::new(self.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    fn asked(&self) -> Option<Asked> {
        self.service.get().cloned().map(|service| Asked { service })
    }

    async fn serve<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Result<T, Status> {
        // It ends with whoever waits for it, as if it had run here.
        let mut work = AbortOnDropHandle::new(self.threads.spawn(work));
        (&mut work).await.map_err(|error| Status::internal(error.to_string()))?
    }

    /// From now on requests are answered.
    pub fn begin(&self, service: Arc<Service>) {
        assert!(self.service.set(service).is_ok(), "a node begins once");
    }
}

/// This node is starting, and answers nobody yet.
fn nothing_yet() -> peer::Elsewhere {
    peer::Elsewhere { group: 0, leader_node: 0, term: 0 }
}

/// What is asked of a node that has begun.
struct Asked {
    service: Arc<Service>,
}

impl Asked {
    fn check(&self, cluster: &str) -> Result<(), Status> {
        let ours = self.service.router.cluster().network().cluster();
        if cluster == ours {
            return Ok(());
        }
        Err(Status::failed_precondition(format!("this node belongs to cluster '{ours}', not '{cluster}'")))
    }

    fn read(&self, cluster: &str, caller: &[u8], envelope: Bytes) -> Result<(Arc<Session>, Payload), Status> {
        self.check(cluster)?;
        let row: CallerRow =
            codec::decode("a caller", caller).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let CallerRow { client, admin, policy, limits } = row;
        let session = Session::of_caller(client, admin, policy, limits);
        let envelope = BoomerangEnvelope::decode(envelope);
        let payload = envelope.map_err(|error| Status::invalid_argument(error.to_string()))?.payload;
        let payload = payload.ok_or_else(|| Status::new(Code::InvalidArgument, "the envelope holds no request"))?;
        Ok((Arc::new(session), payload))
    }

    fn elsewhere(&self, group: GroupId) -> peer::Elsewhere {
        let cluster = self.service.router.cluster();
        // Not this one: whoever asked was just told so.
        let leader = cluster.leader(group).filter(|leader| leader.node_id != cluster.node_id());
        peer::Elsewhere {
            group: group.0.into(),
            leader_node: leader.map_or(0, |leader| leader.node_id),
            term: leader.map_or(0, |leader| leader.term),
        }
    }

    /// The first of these that this node cannot answer for.
    async fn not_led(&self, groups: &[GroupId]) -> Option<GroupId> {
        for group in groups {
            if !self.service.router.can_serve(*group, Access::Read).await {
                return Some(*group);
            }
        }
        None
    }

    async fn forward(&self, request: peer::ForwardRequest) -> Result<forward_response::Result, Status> {
        let peer::ForwardRequest { cluster, caller, envelope: bytes } = request;
        let (session, payload) = self.read(&cluster, &caller, bytes)?;
        let target = routing::target(&payload, Some(&session.client), self.service.shards);
        if let Target::Leader(group, access) = target
            && !self.service.router.can_serve(group, access).await
        {
            return Ok(forward_response::Result::Elsewhere(self.elsewhere(group)));
        }
        let answer = served(&self.service, session, payload).await;
        Ok(match target {
            Target::Leader(group, _) if is_not_leader(&answer) => {
                forward_response::Result::Elsewhere(self.elsewhere(group))
            }
            _ => forward_response::Result::Envelope(envelope(answer)),
        })
    }

    async fn list_part(&self, request: peer::PartRequest) -> Result<part_response::Result, Status> {
        let peer::PartRequest { cluster, caller, envelope, groups } = request;
        let (session, payload) = self.read(&cluster, &caller, envelope)?;
        let groups = groups.into_iter().map(|group| u16::try_from(group).map(GroupId)).collect::<Result<Vec<_>, _>>();
        let groups = groups.map_err(|_| Status::invalid_argument("groups: not a number of one"))?;
        if let Some(group) = self.not_led(&groups).await {
            return Ok(part_response::Result::Elsewhere(self.elsewhere(group)));
        }
        let part = part_here(&self.service, &session, &payload, &groups).await;
        // Read while it led: what another leader has stored since then is not missing.
        let lost = groups.into_iter().find(|group| !self.service.router.may_serve(*group, Access::Read));
        Ok(match (lost, part) {
            (Some(group), _) => part_response::Result::Elsewhere(self.elsewhere(group)),
            (None, Ok(Part { items, more_behind })) => {
                let (places, items) = items.into_iter().map(|(place, item)| (Bytes::from(place), item)).unzip();
                let more_behind = more_behind.unwrap_or_default().into();
                part_response::Result::Part(peer::Part { places, items, more_behind })
            }
            (None, Err(problem)) => part_response::Result::Problem(written(problem)),
        })
    }

    async fn identify(&self, request: peer::IdentifyRequest) -> Result<peer::IdentifyResponse, Status> {
        let peer::IdentifyRequest { cluster, handshake } = request;
        self.check(&cluster)?;
        let handshake = proto::AuthHandshake::decode(handshake);
        let handshake = handshake.map_err(|error| Status::invalid_argument(error.to_string()))?;
        if !self.service.router.can_serve(GroupId::CLUSTER, Access::Read).await {
            let result = Some(identify_response::Result::Elsewhere(self.elsewhere(GroupId::CLUSTER)));
            return Ok(peer::IdentifyResponse { result, applied_index: 0 });
        }
        let in_store = |_: StoreError| Status::internal("the node cannot read its store");
        let result = match self.service.auth.identify(&handshake).await {
            Ok(Identity { client, row, key_id }) => {
                identify_response::Result::Identity(codec::encode(&IdentityRow { client, row, key_id }).into())
            }
            Err(AuthError::Store(error)) => return Err(in_store(error)),
            Err(error) => identify_response::Result::Refused(error.to_string()),
        };
        // Afterwards: whoever has applied as much knows at least what was found here.
        let applied_index = applied_index(&self.service).map_err(in_store)?;
        Ok(peer::IdentifyResponse { result: Some(result), applied_index })
    }
}

#[tonic::async_trait]
impl Requests for Forwarding {
    async fn forward(&self, request: Request<peer::ForwardRequest>) -> Result<Response<peer::ForwardResponse>, Status> {
        let result = match self.asked() {
            Some(asked) => self.serve(async move { asked.forward(request.into_inner()).await }).await?,
            None => forward_response::Result::Elsewhere(nothing_yet()),
        };
        Ok(Response::new(peer::ForwardResponse { result: Some(result) }))
    }

    async fn list_part(&self, request: Request<peer::PartRequest>) -> Result<Response<peer::PartResponse>, Status> {
        let result = match self.asked() {
            Some(asked) => {
                asked.check(&request.get_ref().cluster)?;
                match asked.service.readers.busy() {
                    // Told at once: work is behind.
                    Some(busy) => part_response::Result::Problem(written(busy)),
                    None => self.serve(async move { asked.list_part(request.into_inner()).await }).await?,
                }
            }
            None => part_response::Result::Elsewhere(nothing_yet()),
        };
        Ok(Response::new(peer::PartResponse { result: Some(result) }))
    }

    async fn identify(
        &self,
        request: Request<peer::IdentifyRequest>,
    ) -> Result<Response<peer::IdentifyResponse>, Status> {
        Ok(Response::new(match self.asked() {
            Some(asked) => self.serve(async move { asked.identify(request.into_inner()).await }).await?,
            None => {
                let result = Some(identify_response::Result::Elsewhere(nothing_yet()));
                peer::IdentifyResponse { result, applied_index: 0 }
            }
        }))
    }
}
