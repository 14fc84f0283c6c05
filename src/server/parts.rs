//! This node's part of what is read from all shards, for itself or for the node that puts the parts together.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use super::letters::{self, Choice};
use super::problem::Problem;
use super::sessions::Session;
use super::walk::Part;
use super::{Service, list};
use crate::task::GroupId;
use crate::wire::proto::Status;
use crate::wire::proto::boomerang_envelope::Payload;

/// This node's part of a list: the items as they are answered, or nothing where only their places count.
pub(super) async fn part_here(
    service: &Arc<Service>,
    session: &Arc<Session>,
    payload: &Payload,
    groups: &[GroupId],
) -> Result<Part<Bytes>, Problem> {
    fn encoded<T>(part: Part<T>, encode: impl Fn(T) -> Bytes) -> Part<Bytes> {
        let items = part.items.into_iter().map(|(place, item)| (place, encode(item))).collect();
        Part { items, more_behind: part.more_behind }
    }
    let (payload, groups) = (payload.clone(), groups.to_vec());
    let part = service.read_page(Ok(session.clone()), move |service, session| match payload {
        Payload::ListTasksRequest(request) => {
            Ok(encoded(list::part(service, session, &request, groups)?, |task| task.encode_to_vec().into()))
        }
        Payload::ListDeadLettersRequest(request) => {
            Ok(encoded(letters::part(service, session, &request, groups)?, |letter| letter.encode_to_vec().into()))
        }
        Payload::ReplayDeadLettersRequest(request) => {
            let choice = Choice::from(request);
            Ok(encoded(letters::chosen_part(service, session, &choice, groups)?, |()| Bytes::new()))
        }
        Payload::PurgeDeadLettersRequest(request) => {
            let choice = Choice::from(request);
            Ok(encoded(letters::chosen_part(service, session, &choice, groups)?, |()| Bytes::new()))
        }
        _ => Err(Problem::new(Status::InvalidRequest, "no part can be made of this")),
    });
    part.await
}
