//! Registers dead letters again: those that are named, or some of those that a filter chooses.

use std::sync::Arc;

use super::dead_letters::{Changes, Choice, change_among_nodes, change_here};
use super::operation::{Operation, PartRead, Respond};
use crate::propose::Ask;
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::server::problem::Problem;
use crate::server::routing::leader::in_the_background;
use crate::server::routing::pages::{self, InParts};
use crate::server::scan::{Part, Room};
use crate::shard::Reply;
use crate::task::{ClientId, DeadLetterId, GroupId};
use crate::wire::proto::{ReplayDeadLettersRequest, ReplayDeadLettersResponse, Replayed};

impl Operation for ReplayDeadLettersRequest {
    async fn here(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        let replayed = |(id, reply): (DeadLetterId, Reply)| {
            let task_id = match reply {
                Reply::Replayed { id } => id.to_string(),
                _ => String::new(),
            };
            Replayed { dead_letter_id: id.to_string(), task_id }
        };
        let done = change_here(service, &session, self).await;
        respond(done.map(|(replies, next_token)| {
            let replayed = replies.into_iter().map(replayed).collect();
            ReplayDeadLettersResponse { replayed, next_token, ..Default::default() }
        }));
    }

    async fn among_nodes(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        let other = service.clone();
        let work = async move {
            let (answers, next_token) = change_among_nodes(&other, &session, self).await?;
            let replayed = answers.into_iter().flat_map(|answer| answer.replayed).collect();
            Ok(ReplayDeadLettersResponse { replayed, next_token, ..Default::default() })
        };
        in_the_background(service, respond, work).await;
    }

    fn part(self, service: &Arc<Service>, session: Arc<Session>, groups: Vec<GroupId>) -> PartRead {
        pages::encoded(service, session, self, groups)
    }

    fn answer_bytes_max(&self, frame_bytes_max: usize) -> usize {
        frame_bytes_max
    }
}

impl InParts for ReplayDeadLettersRequest {
    type Item = ();

    fn read(&self, service: &Service, session: &Session, groups: &[GroupId]) -> Result<Part<()>, Problem> {
        self.choice().part(service, session, groups)
    }

    fn room(&self, _: &Service) -> Room {
        self.choice().room()
    }
}

impl Changes for ReplayDeadLettersRequest {
    fn choice(&self) -> Choice<'_> {
        let Self { dead_letter_ids: ids, filter, limit, next_token } = self;
        Choice { ids, filter: filter.as_ref(), limit: *limit, next_token }
    }

    fn going_on(&self, next_token: String) -> Self {
        Self { next_token, ..self.clone() }
    }

    fn one(id: DeadLetterId) -> Self {
        Self { dead_letter_ids: vec![id.to_string()], ..Default::default() }
    }

    fn ask(letter: DeadLetterId, owner: Option<ClientId>) -> Ask {
        Ask::Replay { letter, owner }
    }
}

#[cfg(test)]
mod tests {
    use super::super::rig::{DISK, ELSEWHERE, Receivers, Rig, check, nobodys};
    use super::*;
    use crate::wire::problems::Code;
    use crate::wire::proto::DeadLetterFilter;

    fn replay(ids: &[&str]) -> ReplayDeadLettersRequest {
        ReplayDeadLettersRequest {
            dead_letter_ids: ids.iter().map(|id| (*id).to_owned()).collect(),
            ..Default::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn each_is_registered_again_once() {
        let rig = Rig::start().await;
        let (first, second) = (rig.bury().await, rig.bury().await);
        rig.set_receivers(Receivers::Accept);
        let answer = rig.ask(&rig.client(), replay(&[&first])).await.unwrap();
        assert_eq!(answer.replayed.len(), 1);
        assert!(!answer.replayed[0].task_id.is_empty(), "{answer:?}");
        // It is not there any more; the other one is.
        let answer = rig.ask(&rig.client(), replay(&[&first, &second])).await.unwrap();
        let done: Vec<bool> = answer.replayed.iter().map(|one| !one.task_id.is_empty()).collect();
        assert_eq!(done, [false, true]);
        assert_eq!(rig.letters().await, []);
    }

    #[tokio::test(start_paused = true)]
    async fn a_filter_is_worked_off_page_by_page_and_ends() {
        let rig = Rig::start().await;
        for _ in 0..3 {
            rig.bury().await;
        }
        let mut request = ReplayDeadLettersRequest { limit: 2, ..Default::default() };
        let mut replayed = 0;
        loop {
            // The receiver refuses still: what dies again meanwhile is not part of it.
            let answer = rig.ask(&rig.client(), request.clone()).await.unwrap();
            replayed += answer.replayed.len();
            if answer.next_token.is_empty() {
                break;
            }
            request.next_token = answer.next_token;
        }
        assert_eq!(replayed, 3);
        let none = rig.ask(&rig.stranger(), ReplayDeadLettersRequest::default()).await.unwrap();
        assert_eq!(none.replayed, [], "a client chooses among its own");
    }

    #[tokio::test(start_paused = true)]
    async fn refusals() {
        let rig = Rig::start().await;
        let letter = rig.bury().await;
        let strangers = rig.ask(&rig.stranger(), replay(&[&letter])).await.unwrap();
        assert_eq!(strangers.replayed[0].task_id, "", "another's is as if it were not there");
        check("no id", &rig.refusal(&rig.client(), replay(&["seven"])).await, Code::InvalidRequest, "dead_letter_id");
        let others = DeadLetterFilter { client_id: "stranger".into(), ..Default::default() };
        let others = ReplayDeadLettersRequest { filter: Some(others), ..Default::default() };
        check("others", &rig.refusal(&rig.client(), others).await, Code::Unauthorized, "administrator");
        let foreign = ReplayDeadLettersRequest { next_token: "x".into(), ..Default::default() };
        check("a cursor", &rig.refusal(&rig.client(), foreign).await, Code::InvalidRequest, "next_token");
        rig.let_disk_run_low();
        check("low", &rig.refusal(&rig.client(), replay(&[&letter])).await, Code::Overloaded, DISK);
        let rig = rig.with_another_node();
        let elsewhere = format!("{}@7", nobodys(ELSEWHERE));
        check("elsewhere", &rig.refusal(&rig.client(), replay(&[&elsewhere])).await, Code::NotLeader, "shard 1");
        check("a part", &rig.refusal(&rig.client(), replay(&[])).await, Code::NotLeader, "would not be complete");
    }

    #[tokio::test(start_paused = true)]
    async fn on_a_disk_that_hangs_nobody_knows() {
        let rig = Rig::start().await;
        let letter = rig.bury().await;
        rig.hang_disk();
        check("hangs", &rig.refusal(&rig.client(), replay(&[&letter])).await, Code::MaybeDone, "may have been");
    }
}
