//! Removes dead letters: those that are named, or some of those that a filter chooses.

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
use crate::shard::{Purge, Reply, Request};
use crate::task::{ClientId, DeadLetterId, GroupId};
use crate::wire::proto::{PurgeDeadLettersRequest, PurgeDeadLettersResponse};

impl Operation for PurgeDeadLettersRequest {
    async fn here(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        let done = change_here(service, &session, self).await;
        respond(done.map(|(replies, next_token)| {
            let purged = replies.iter().filter(|(_, reply)| *reply == Reply::Stored).count() as u64;
            PurgeDeadLettersResponse { purged, next_token, ..Default::default() }
        }));
    }

    async fn among_nodes(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        let other = service.clone();
        let work = async move {
            let (answers, next_token) = change_among_nodes(&other, &session, self).await?;
            let purged = answers.iter().map(|answer| answer.purged).sum();
            Ok(PurgeDeadLettersResponse { purged, next_token, ..Default::default() })
        };
        in_the_background(service, respond, work).await;
    }

    fn part(self, service: &Arc<Service>, session: Arc<Session>, groups: Vec<GroupId>) -> PartRead {
        pages::encoded(service, session, self, groups)
    }
}

impl InParts for PurgeDeadLettersRequest {
    type Item = ();

    fn read(&self, service: &Service, session: &Session, groups: &[GroupId]) -> Result<Part<()>, Problem> {
        self.choice().part(service, session, groups)
    }

    fn room(&self, _: &Service) -> Room {
        self.choice().room()
    }
}

impl Changes for PurgeDeadLettersRequest {
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
        Ask::Plain(Request::Purge(Purge { letter, owner }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::rig::{DISK, ELSEWHERE, Rig, check, nobodys};
    use super::*;
    use crate::wire::problems::Code;

    fn purge(ids: &[&str]) -> PurgeDeadLettersRequest {
        PurgeDeadLettersRequest {
            dead_letter_ids: ids.iter().map(|id| (*id).to_owned()).collect(),
            ..Default::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn they_are_gone_and_counted() {
        let rig = Rig::start().await;
        let letters = [rig.bury().await, rig.bury().await, rig.bury().await];
        assert_eq!(rig.ask(&rig.stranger(), purge(&[&letters[0]])).await.unwrap().purged, 0);
        assert_eq!(rig.ask(&rig.client(), purge(&[&letters[0]])).await.unwrap().purged, 1);
        assert_eq!(rig.ask(&rig.client(), purge(&[&letters[0]])).await.unwrap().purged, 0, "it is gone");
        // It makes room, and so is let through as long as anything is.
        rig.let_disk_run_low();
        assert_eq!(rig.ask(&rig.admin(), purge(&[])).await.unwrap().purged, 2);
        assert_eq!(rig.letters().await, []);
    }

    #[tokio::test(start_paused = true)]
    async fn refusals() {
        let rig = Rig::start().await;
        let letter = rig.bury().await;
        check("no id", &rig.refusal(&rig.client(), purge(&["seven"])).await, Code::InvalidRequest, "dead_letter_id");
        let many = vec![letter.as_str(); 1_001];
        check("too many", &rig.refusal(&rig.client(), purge(&many)).await, Code::InvalidRequest, "1001 of them");
        rig.let_disk_run_full();
        check("full", &rig.refusal(&rig.client(), purge(&[&letter])).await, Code::Overloaded, DISK);
        let rig = rig.with_another_node();
        let elsewhere = format!("{}@7", nobodys(ELSEWHERE));
        check("elsewhere", &rig.refusal(&rig.client(), purge(&[&elsewhere])).await, Code::NotLeader, "shard 1");
        let rig = Rig::start().await;
        let letter = rig.bury().await;
        rig.hang_disk();
        check("hangs", &rig.refusal(&rig.client(), purge(&[&letter])).await, Code::MaybeDone, "may have been");
    }
}
