//! Pages of dead letters, the oldest first.

use std::sync::Arc;

use prost::Message;

use super::dead_letters::{Filter, limit, next_token, scan, shown};
use super::operation::{Operation, PartRead, Respond};
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::server::problem::Problem;
use crate::server::routing::leader::in_the_background;
use crate::server::routing::pages::{self, ITEM_BYTES, InParts, gather, page_bytes, read_all};
use crate::server::scan::{Part, Room};
use crate::task::GroupId;
use crate::wire::proto::{DeadLetter, ListDeadLettersRequest, ListDeadLettersResponse};

impl Operation for ListDeadLettersRequest {
    async fn here(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        let service = service.clone();
        // What this connection asks for next does not wait for it.
        tokio::spawn(async move { respond(read_all(&service, session, self).await.map(answer)) });
    }

    async fn among_nodes(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        let other = service.clone();
        let work = async move { gather(&other, &session, &self).await.map(answer) };
        in_the_background(service, respond, work).await;
    }

    fn part(self, service: &Arc<Service>, session: Arc<Session>, groups: Vec<GroupId>) -> PartRead {
        pages::encoded(service, session, self, groups)
    }

    fn answer_bytes_max(&self, frame_bytes_max: usize) -> usize {
        frame_bytes_max
    }
}

impl InParts for ListDeadLettersRequest {
    type Item = DeadLetter;

    fn read(&self, service: &Service, session: &Session, groups: &[GroupId]) -> Result<Part<DeadLetter>, Problem> {
        let filter = Filter::new(session, self.filter.as_ref())?;
        let room = self.room(service);
        let mut bytes = 0;
        let mut items = Vec::new();
        let more_behind = scan(service, &filter, &self.next_token, groups, room.items, |place, id, row| {
            let shown = shown(id, row);
            bytes += ITEM_BYTES + shown.encoded_len();
            let fits = bytes <= room.bytes || items.is_empty();
            if fits {
                items.push((place.clone(), shown));
            }
            fits
        })?;
        Ok(Part { items, more_behind })
    }

    fn room(&self, service: &Service) -> Room {
        Room { items: limit(self.limit), bytes: page_bytes(service) }
    }
}

fn answer(part: Part<DeadLetter>) -> ListDeadLettersResponse {
    let next_token = next_token(part.more_behind);
    let dead_letters = part.items.into_iter().map(|(_, letter)| letter).collect();
    ListDeadLettersResponse { dead_letters, next_token, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::super::rig::{Rig, check};
    use super::*;
    use crate::wire::problems::Code;
    use crate::wire::proto::DeadLetterFilter;

    #[tokio::test(start_paused = true)]
    async fn the_oldest_come_first_a_page_at_a_time() {
        let rig = Rig::start().await;
        let buried = [rig.bury().await, rig.bury().await, rig.bury().await];
        let first = ListDeadLettersRequest { limit: 2, ..Default::default() };
        let page = rig.ask(&rig.client(), first.clone()).await.unwrap();
        let rest = ListDeadLettersRequest { next_token: page.next_token.clone(), ..first };
        let rest = rig.ask(&rig.client(), rest).await.unwrap();
        let shown = page.dead_letters.iter().chain(&rest.dead_letters).map(|letter| letter.dead_letter_id.clone());
        assert_eq!(shown.collect::<Vec<_>>(), buried);
        assert_eq!((page.dead_letters.len(), rest.next_token.as_str()), (2, ""));
        let strangers = rig.ask(&rig.stranger(), ListDeadLettersRequest::default()).await.unwrap();
        assert_eq!(strangers.dead_letters, []);
        let all = rig.ask(&rig.admin(), ListDeadLettersRequest::default()).await.unwrap();
        assert_eq!(all.dead_letters.len(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn what_makes_no_sense_or_is_others_is_refused() {
        let rig = Rig::start().await;
        let by = |filter| ListDeadLettersRequest { filter: Some(filter), ..Default::default() };
        let foreign = ListDeadLettersRequest { next_token: "t00".into(), ..Default::default() };
        let others = by(DeadLetterFilter { client_id: "stranger".into(), ..Default::default() });
        for (name, request, code, text) in [
            ("a cursor", foreign, Code::InvalidRequest, "next_token"),
            (
                "a task",
                by(DeadLetterFilter { task_id: "7".into(), ..Default::default() }),
                Code::InvalidRequest,
                "task_id",
            ),
            (
                "a class",
                by(DeadLetterFilter { failure_class: 99, ..Default::default() }),
                Code::InvalidRequest,
                "failure_class",
            ),
            ("others", others, Code::Unauthorized, "administrator"),
        ] {
            check(name, &rig.refusal(&rig.client(), request).await, code, text);
        }
        let rig = rig.with_another_node();
        let part = rig.refusal(&rig.client(), ListDeadLettersRequest::default()).await;
        check("a part", &part, Code::NotLeader, "would not be complete");
    }
}
