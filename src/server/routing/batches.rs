//! A batch, each item of which goes to the leader of its own group: those of one node in one message.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::future::join_all;

use super::forward::{self, Forwarded};
use super::leader::lost;
use super::router::{Patience, Route};
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::server::api::operation::{Operation, done_here};
use crate::server::problem::Problem;
use crate::task::GroupId;
use crate::wire::answers::{Answer, Proof};
use crate::wire::routing::{Effect, what_to_tell};

/// A request that is several of one kind, each with an answer of its own.
pub(in crate::server) trait Batch: Operation {
    type Item: Clone + Send + Sync + 'static;
    type ItemAnswer: Answer + Default + Send + 'static;

    fn of(items: Vec<Self::Item>) -> Self;

    /// In the order of the items; fewer when the batch was refused as a whole.
    fn answers(answer: Self::Answer) -> Vec<Self::ItemAnswer>;

    /// Gives an item what it needs for its next try.
    fn prepare(_service: &Service, _item: &mut Self::Item) {}

    /// Where an item goes; `None` is this node.
    fn group(service: &Service, session: &Session, item: &Self::Item) -> Option<GroupId>;

    /// What an item does, by itself.
    fn item_effect(item: &Self::Item) -> Effect;
}

/// Items by their place in the batch, and what is known of each.
struct Open<B: Batch> {
    items: BTreeMap<usize, B::Item>,
    /// May have been done already, and is asked for again.
    unknown: BTreeMap<usize, Problem>,
    done: BTreeMap<usize, B::ItemAnswer>,
}

/// Brings each item to its leader, by place. What was certainly not done is tried again, until somebody leads or patience
/// ends. Every item has an answer.
pub(in crate::server) async fn ask_each<B: Batch>(
    service: &Arc<Service>,
    session: &Arc<Session>,
    items: BTreeMap<usize, B::Item>,
) -> BTreeMap<usize, B::ItemAnswer> {
    let mut open: Open<B> = Open { items, unknown: BTreeMap::new(), done: BTreeMap::new() };
    let mut patience = Patience::new();
    let mut past = None;
    loop {
        let (by_node, leaderless) = open.sort(service, session, past.take());
        let asked = by_node.into_iter().map(|(node_id, places)| {
            let request = B::of(places.iter().map(|place| open.items[place].clone()).collect());
            async move {
                let answer = match node_id {
                    None => Forwarded::Answer(done_here(service, session.clone(), request).await),
                    Some(node_id) => forward::send(service, node_id, session, request).await,
                };
                (node_id, places, answer)
            }
        });
        for (node_id, places, answer) in join_all(asked).await {
            match answer {
                Forwarded::Answer(answer) => open.take(&places, answer),
                Forwarded::Elsewhere => {}
                Forwarded::NotSent => past = node_id,
                Forwarded::Unknown(why) => {
                    past = node_id;
                    open.doubt(&places, &lost(node_id.unwrap_or_default(), &why));
                }
            }
        }
        let Some(item) = open.items.values().next() else { break };
        let group = leaderless.or_else(|| B::group(service, session, item)).unwrap_or(GroupId(1));
        if !patience.wait(&service.router, group).await {
            open.refuse_all(service, session, group);
            break;
        }
    }
    open.answers()
}

impl<B: Batch> Open<B> {
    /// Which of them go where, `None` being this node; and a group that has no leader.
    fn sort(&mut self, service: &Service, session: &Session, past: Option<u64>) -> (ByNode, Option<GroupId>) {
        let mut by_node = ByNode::new();
        let mut leaderless = None;
        let mut routes: BTreeMap<GroupId, Route> = BTreeMap::new();
        for (place, item) in &mut self.items {
            B::prepare(service, item);
            let route = match B::group(service, session, item) {
                Some(group) => {
                    let route = *routes.entry(group).or_insert_with(|| service.router.route(group, past));
                    if route == Route::Nobody {
                        leaderless = Some(group);
                    }
                    route
                }
                None => Route::Here,
            };
            match route {
                Route::Here => by_node.entry(None).or_default().push(*place),
                Route::At(node_id) => by_node.entry(Some(node_id)).or_default().push(*place),
                Route::Nobody => {}
            }
        }
        (by_node, leaderless)
    }

    /// What one node has answered; those it does not lead stay open.
    fn take(&mut self, places: &[usize], answer: Result<B::Answer, Problem>) {
        let (mut answers, whole) = match answer {
            Ok(answer) => (B::answers(answer), None),
            Err(problem) if problem.is_not_leader() => return,
            Err(problem) => (Vec::new(), Some(problem)),
        };
        let mut answers = answers.drain(..);
        for place in places {
            let answer = match (&whole, answers.next()) {
                (Some(problem), _) => B::ItemAnswer::refusing(problem.clone()),
                (None, Some(answer)) => answer,
                // Too few answers: nobody knows of these.
                (None, None) => B::ItemAnswer::refusing(Problem::maybe_done(
                    "another node has answered to a part of the batch only",
                )),
            };
            if !is_not_leader(&answer) {
                self.items.remove(place);
                self.done.insert(*place, answer);
            }
        }
    }

    /// No answer came: some may be sent again, the others may have been done.
    fn doubt(&mut self, places: &[usize], lost: &Problem) {
        for place in places {
            if B::item_effect(&self.items[place]).may_be_repeated() {
                self.unknown.insert(*place, lost.clone());
            } else {
                self.items.remove(place);
                self.done.insert(*place, B::ItemAnswer::refusing(lost.clone()));
            }
        }
    }

    /// It has been long enough.
    fn refuse_all(&mut self, service: &Service, session: &Session, leaderless: GroupId) {
        for (place, item) in std::mem::take(&mut self.items) {
            let group = B::group(service, session, &item).unwrap_or(leaderless);
            self.done.insert(place, B::ItemAnswer::refusing(service.router.not_leader(group)));
        }
    }

    fn answers(mut self) -> BTreeMap<usize, B::ItemAnswer> {
        let is_done = |answer: &B::ItemAnswer| answer.verdict().proves() == Proof::Done;
        for (place, problem) in self.unknown {
            let last = self.done.remove(&place).expect("every item has an answer by now");
            self.done.insert(place, what_to_tell(last, is_done, Some(B::ItemAnswer::refusing(problem))));
        }
        self.done
    }
}

/// Places of items, by the node they go to; `None` is this one.
type ByNode = BTreeMap<Option<u64>, Vec<usize>>;

pub(in crate::server) fn is_not_leader(answer: &impl Answer) -> bool {
    answer.verdict().is_not_leader()
}

/// For a client that follows redirects: says in each answer who leads what this node does not, as far as that is known by
/// now.
pub(in crate::server) fn name_leaders<A: Answer + Default>(service: &Service, answers: &mut [A]) {
    let mut found = false;
    for answer in answers.iter_mut().filter(|answer| is_not_leader(*answer)) {
        let shard = answer.verdict().detail.map_or(0, |detail| detail.shard);
        let group = GroupId(u16::try_from(shard + 1).unwrap_or(1));
        *answer = A::refusing(service.router.not_leader(group));
        found = true;
    }
    if found {
        service.router.look_again();
        service.metrics.redirected.inc();
    }
}

#[cfg(test)]
mod tests {
    use crate::server::api::rig::{ELSEWHERE, Rig, Says, elsewhere, in_an_hour, nobodys};
    use crate::server::problem::Problem;
    use crate::wire::answers::Answer;
    use crate::wire::problems::Code;
    use crate::wire::proto::boomerang_envelope::Payload;
    use crate::wire::proto::{CancellationBatch, RegistrationBatch, RegistrationBatchResponse, RegistrationResponse};

    fn codes<A: Answer>(answers: &[A]) -> Vec<Option<Code>> {
        answers.iter().map(|answer| Code::of(&answer.verdict())).collect()
    }

    fn answered(responses: Vec<RegistrationResponse>) -> Says {
        Says::answer(Payload::RegistrationBatchResponse(RegistrationBatchResponse { responses, ..Default::default() }))
    }

    fn refusing(code: Code) -> RegistrationResponse {
        RegistrationResponse::refusing(Problem::new(code, "the other node's words"))
    }

    #[tokio::test(start_paused = true)]
    async fn each_task_is_asked_for_until_it_is_known() {
        let stored = RegistrationResponse::default;
        let whole = RegistrationBatchResponse::refusing(Problem::new(Code::InvalidRequest, "all of it"));
        let whole = || Says::answer(Payload::RegistrationBatchResponse(whole.clone()));
        let (ok, refused, unknown) = (None, Some(Code::InvalidRequest), Some(Code::MaybeDone));
        for (name, says, asked, expected) in [
            ("stored", vec![answered(vec![stored(), stored()])], vec![2], [ok, ok]),
            (
                "one of them refused",
                vec![answered(vec![stored(), refusing(Code::InvalidRequest)])],
                vec![2],
                [ok, refused],
            ),
            (
                "one of them elsewhere at first",
                vec![answered(vec![stored(), refusing(Code::NotLeader)]), answered(vec![stored()])],
                vec![2, 1],
                [ok, ok],
            ),
            ("refused as a whole", vec![whole()], vec![2], [refused, refused]),
            ("fewer answers than tasks", vec![answered(vec![stored()])], vec![2], [ok, unknown]),
            ("lost, then stored", vec![Says::Nothing, answered(vec![stored(), stored()])], vec![2, 2], [ok, ok]),
            (
                "lost, then one refused",
                vec![Says::Nothing, answered(vec![stored(), refusing(Code::InvalidRequest)])],
                vec![2, 2],
                [ok, unknown],
            ),
            ("lost, then refused as a whole", vec![Says::Nothing, whole()], vec![2, 2], [unknown, unknown]),
            (
                "not the leader, then lost, then refused",
                vec![Says::Elsewhere, Says::Nothing, whole()],
                vec![2; 3],
                [unknown; 2],
            ),
        ] {
            let (rig, other) = Rig::start().await.with_leader_elsewhere(says);
            let tasks = vec![elsewhere(), in_an_hour(), elsewhere()];
            let answer = rig.ask(&rig.follows_nobody(), RegistrationBatch { tasks, origin: None }).await.unwrap();
            let found = codes(&answer.responses);
            assert_eq!([found[0], found[2]], expected, "{name}: {answer:?}");
            assert_eq!(found[1], None, "{name}: what is led here is stored here");
            let counts = other.asked().into_iter().map(|asked| match asked {
                Payload::RegistrationBatch(batch) => batch.tasks.len(),
                other => panic!("{name}: it was asked {other:?}"),
            });
            assert_eq!(counts.collect::<Vec<_>>(), asked, "{name}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancellation_that_was_lost_is_not_sent_again() {
        let (rig, other) = Rig::start().await.with_leader_elsewhere([Says::Nothing]);
        let task_ids = vec![rig.register().await, nobodys(ELSEWHERE)];
        let answer = rig.ask(&rig.follows_nobody(), CancellationBatch { task_ids }).await.unwrap();
        assert_eq!(codes(&answer.responses), [None, Some(Code::MaybeDone)]);
        assert_eq!(other.asked().len(), 1);
    }
}
