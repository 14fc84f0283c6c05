//! What other nodes ask of this one on behalf of their clients: requests, parts of lists, and who somebody is.
//!
//! This node does it or says that it does not lead; it never asks a third one. So a request takes one hop at most, and
//! whoever sent it looks again for the leader. Both ends trust each other: the peer port is for nodes only, and the caller a
//! request comes with has been checked by the node the client is connected to.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use prost::Message;
use tokio::runtime::Handle;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Request, Response, Status};

use super::Service;
use super::access::auth::Who;
use super::access::handshake::applied_index;
use super::access::sessions::Session;
use super::api;
use super::routing::forward::{CallerRow, MESSAGE_BYTES_MAX, envelope, written};
use super::scan::Part;
use crate::store::StoreError;
use crate::store::codec;
use crate::task::{GroupId, Invalid};
use crate::wire::operations::{is_not_leader, target};
use crate::wire::peer::requests_server::{Requests, RequestsServer};
use crate::wire::peer::{self, forward_response, identify_request, identify_response, part_response};
use crate::wire::proto::{BoomerangEnvelope, boomerang_envelope::Payload};
use crate::wire::routing::{Access, Asker, Target};

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
        let envelope = BoomerangEnvelope::decode(envelope);
        let payload = envelope.map_err(|error| Status::invalid_argument(error.to_string()))?.payload;
        let payload = payload.ok_or_else(|| Status::new(Code::InvalidArgument, "the envelope holds no request"))?;
        Ok((Arc::new(row.into()), payload))
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
        let asker = Asker { client: Some(&session.client), shards: self.service.shards };
        let target = target(&payload, &asker);
        if let Target::Leader(group, access) = target
            && !self.service.router.can_serve(group, access).await
        {
            return Ok(forward_response::Result::Elsewhere(self.elsewhere(group)));
        }
        let answer = api::answer_here(&self.service, session, payload).await;
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
        let part = api::part_here(&self.service, session, payload, groups.clone()).await;
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
        let peer::IdentifyRequest { cluster, who } = request;
        self.check(&cluster)?;
        let invalid = |why: &str| Status::invalid_argument(format!("who: {why}"));
        let who = match who {
            Some(identify_request::Who::Client(name)) => {
                Who::Client(name.parse().map_err(|error: Invalid| invalid(&error.to_string()))?)
            }
            Some(identify_request::Who::KeyId(key_id)) => Who::Key(key_id),
            None => return Err(invalid("is missing")),
        };
        if !self.service.router.can_serve(GroupId::CLUSTER, Access::Read).await {
            let result = Some(identify_response::Result::Elsewhere(self.elsewhere(GroupId::CLUSTER)));
            return Ok(peer::IdentifyResponse { result, applied_index: 0 });
        }
        let in_store = |_: StoreError| Status::internal("the node cannot read its store");
        let stored = self.service.auth.stored(&who).map_err(in_store)?;
        let result = identify_response::Result::Stored(codec::encode(&stored).into());
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
