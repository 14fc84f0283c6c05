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
use crate::wire::answers::{Answer, Proof, Refused};

/// A request that is several of one kind, each with an answer of its own.
pub(in crate::server) trait Batch: Operation {
    type Item: Clone + Send + Sync + 'static;
    type ItemAnswer: Answer + Default + Send + 'static;

    fn of(items: Vec<Self::Item>) -> Self;

    /// In the order of the items; fewer when the batch was refused as a whole.
    fn answers(answer: Self::Answer) -> Vec<Self::ItemAnswer>;

    /// Where an item goes; `None` is this node. Called before each try, and may give the item what it needs for it.
    fn group(service: &Service, session: &Session, item: &mut Self::Item) -> Option<GroupId>;

    /// Whether an item may be sent again when nobody knows if it was done.
    fn may_be_repeated(item: &Self::Item) -> bool;
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
        let Some(item) = open.items.values_mut().next() else { break };
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
            if B::may_be_repeated(&self.items[place]) {
                self.unknown.insert(*place, lost.clone());
            } else {
                self.items.remove(place);
                self.done.insert(*place, B::ItemAnswer::refusing(lost.clone()));
            }
        }
    }

    /// It has been long enough.
    fn refuse_all(&mut self, service: &Service, session: &Session, leaderless: GroupId) {
        for (place, mut item) in std::mem::take(&mut self.items) {
            let group = B::group(service, session, &mut item).unwrap_or(leaderless);
            self.done.insert(place, B::ItemAnswer::refusing(service.router.not_leader(group)));
        }
    }

    fn answers(mut self) -> BTreeMap<usize, B::ItemAnswer> {
        for (place, problem) in self.unknown {
            let answer = self.done.get_mut(&place).expect("every item has an answer by now");
            // That it was refused later does not say that it was not done before.
            if answer.verdict().proves() != Proof::Done {
                *answer = B::ItemAnswer::refusing(problem);
            }
        }
        self.done
    }
}

/// Places of items, by the node they go to; `None` is this one.
type ByNode = BTreeMap<Option<u64>, Vec<usize>>;

/// Whether nothing was done because the node does not lead.
pub(in crate::server) fn is_not_leader(answer: &impl Answer) -> bool {
    answer.verdict().proves() == Proof::NotDone(Refused::NotLeader)
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
