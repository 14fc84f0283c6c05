//! What is read from the leaders of all shards, and put together: a page of a list, or what a filter chooses.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use prost::Message;

use super::forward::{self, Forwarded};
use super::router::{Patience, Route, shown};
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::server::api::operation::{Operation, PartRead};
use crate::server::problem::Problem;
use crate::server::scan::{Part, Room, merge};
use crate::task::GroupId;
use crate::wire::FRAME_BYTES_MAX;
use crate::wire::problems::Code;
use crate::wire::routing::Access;

/// What an item takes in a page besides itself: a tag and a length.
pub(in crate::server) const ITEM_BYTES: usize = 8;

/// What a page takes besides its items: the envelope, the status and the cursor.
const PAGE_BYTES: usize = 512;

/// As much of a frame as items may take.
pub(in crate::server) fn page_bytes(service: &Service) -> usize {
    service.frame_bytes_max.min(FRAME_BYTES_MAX) - PAGE_BYTES
}

/// A request whose answer is put together from what lies in each shard.
pub(in crate::server) trait InParts: Operation {
    /// `()` where only the places count.
    type Item: Message + Default + Send + 'static;

    /// What lies in `groups`. It may take long, and is read by the readers.
    fn read(&self, service: &Service, session: &Session, groups: &[GroupId]) -> Result<Part<Self::Item>, Problem>;

    /// How much goes into the answer.
    fn room(&self, service: &Service) -> Room;
}

/// Of a node that leads all shards.
pub(in crate::server) async fn read_all<R: InParts>(
    service: &Arc<Service>,
    session: Arc<Session>,
    request: R,
) -> Result<Part<R::Item>, Problem> {
    let groups: Vec<GroupId> = service.router.all_shards().collect();
    service.read_page(session, move |service, session| request.read(service, session, &groups)).await
}

/// This node's part, with the items as they go to the node that puts the parts together.
pub(in crate::server) fn encoded<R: InParts>(
    service: &Arc<Service>,
    session: Arc<Session>,
    request: R,
    groups: Vec<GroupId>,
) -> PartRead {
    let service = service.clone();
    Box::pin(async move {
        let part = service.read_page(session, move |service, session| {
            let Part { items, more_behind } = request.read(service, session, &groups)?;
            let items = items.into_iter().map(|(place, item)| (place, item.encode_to_vec().into())).collect();
            Ok(Part { items, more_behind })
        });
        part.await
    })
}

/// The parts of all shards, each from its leader, as one. All of them, or a refusal that names one that is missing.
pub(in crate::server) async fn gather<R: InParts>(
    service: &Arc<Service>,
    session: &Arc<Session>,
    request: &R,
) -> Result<Part<R::Item>, Problem> {
    let part = merge(parts(service, session, request).await?, request.room(service), |item| ITEM_BYTES + item.len());
    let decode = |(place, item): (_, Bytes)| R::Item::decode(item).map(|item| (place, item));
    let items = part.items.into_iter().map(decode).collect::<Result<_, _>>();
    let items = items.map_err(|error| Problem::new(Code::Failed, format!("another node's part: {error}")))?;
    Ok(Part { items, more_behind: part.more_behind })
}

async fn parts<R: InParts>(
    service: &Arc<Service>,
    session: &Arc<Session>,
    request: &R,
) -> Result<Vec<Part<Bytes>>, Problem> {
    if let Some(busy) = service.readers.busy() {
        // Before others do their parts for nothing.
        return Err(busy);
    }
    let mut patience = Patience::new();
    let mut missing: BTreeSet<GroupId> = service.router.all_shards().collect();
    let mut parts = Vec::new();
    let mut past = None;
    loop {
        let mut by_node: BTreeMap<Option<u64>, Vec<GroupId>> = BTreeMap::new();
        for group in &missing {
            match service.router.route(*group, past) {
                Route::Here if service.router.can_serve(*group, Access::Read).await => {
                    by_node.entry(None).or_default().push(*group);
                }
                Route::At(node_id) => by_node.entry(Some(node_id)).or_default().push(*group),
                Route::Here | Route::Nobody => {}
            }
        }
        past = None;
        let asked = by_node.into_iter().map(|(node_id, groups)| {
            let (service, session, request) = (service.clone(), session.clone(), request.clone());
            async move {
                let its = groups.clone();
                let answer = match node_id {
                    None => Forwarded::Answer(encoded(&service, session, request, its).await),
                    Some(node_id) => {
                        // Run to its end even if another part is refused meanwhile: a peer ends the connection of who
                        // takes back many requests.
                        let part = async move { forward::part(&service, node_id, &session, request, &its).await };
                        tokio::spawn(part).await.unwrap_or_else(|error| Forwarded::Unknown(error.to_string()))
                    }
                };
                (node_id, groups, answer)
            }
        });
        let mut asked: FuturesUnordered<_> = asked.collect();
        while let Some((node_id, groups, answer)) = asked.next().await {
            match answer {
                Forwarded::Answer(part) => {
                    // Without one of them the others are worth nothing.
                    parts.push(part?);
                    missing.retain(|group| !groups.contains(group));
                }
                Forwarded::Elsewhere => {}
                Forwarded::NotSent | Forwarded::Unknown(_) => past = node_id,
            }
        }
        let Some(group) = missing.first() else { return Ok(parts) };
        if !patience.wait(&service.router, *group).await {
            let mut problem = service.router.not_leader(*group);
            problem.text = format!("{} does not answer; without it, this would not be complete", shown(*group));
            return Err(problem);
        }
    }
}
