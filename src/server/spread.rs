//! A request in a cluster: to the one node that leads what it is about, or to several.
//!
//! ```text
//!   by id, with a key    led here --> serve ---- NOT_LEADER after all ---+
//!                        elsewhere --> NOT_LEADER, to a client that      |
//!                                      follows redirects                 v
//!                                  --> forward, until someone leads and answers
//!   without a key        to a shard led here; with none, it gets a key, and then see above
//!   batch                each task by itself, those for one node in one message; cancellations too
//!   list                 the parts of all nodes, merged
//!   replay, purge        chosen as a list is, done one by one
//! ```
//!
//! Who does not follow redirects notices no more of a failover than a pause: a request that was certainly not done is
//! tried again until somebody leads, and one that may be done twice even when nobody knows. Everything else is answered
//! with "may have been done".

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use futures::future::{BoxFuture, join_all};
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use prost::Message;

use super::auth::random_hex;
use super::forward::{self, Forwarded};
use super::letters::{self, Choice};
use super::list::{self, ITEM_BYTES};
use super::parts::part_here;
use super::problem::Problem;
use super::requests::{serve, served};
use super::route::{Patience, Route, shown};
use super::sessions::Session;
use super::tasks;
use super::walk::{Part, Room, merge};
use super::{Respond, Service};
use crate::task::{DeadLetterId, GroupId};
use crate::wire::answers::{Answer, answer_mut, is_done, is_not_leader, refused};
use crate::wire::proto::boomerang_envelope::Payload;
use crate::wire::proto::{self, Status};
use crate::wire::routing::{self, Access, Nowhere, Target, is_known_again};

/// How long the keys are remembered that this node gives to what it may have to send twice.
const OWN_KEY_TTL_MS: u64 = 10 * 60_000;
const OWN_KEY_BYTES: usize = 16;
/// Dead letters replayed or purged at a time, for one request.
const LETTERS_AT_A_TIME: usize = 32;

fn group_of(service: &Service, session: &Session, task: &proto::Task) -> Result<Option<GroupId>, Nowhere> {
    routing::group_of_task(task, Some(&session.client), service.shards)
}

/// Gives each task of a batch what its batch says of all of them, so that they can go different ways.
fn number_tasks(batch: &mut proto::RegistrationBatch) {
    let Some(origin) = batch.origin.take() else { return };
    for (task, place) in batch.tasks.iter_mut().zip(0..) {
        if !is_known_again(task) {
            task.origin = Some(proto::Origin { number: origin.number.saturating_add(place), ..origin.clone() });
        }
    }
}

/// With a key, it may be sent again when no answer comes, and is stored once.
fn give_key(task: &mut proto::Task) {
    task.dedup_key = format!("node-{}", random_hex(OWN_KEY_BYTES));
    task.dedup_ttl_ms = OWN_KEY_TTL_MS;
}

/// Whether a client that follows redirects is sent to the leader. What administrators ask is rare, and goes there by
/// itself.
fn is_redirected(session: &Session, group: GroupId) -> bool {
    session.redirects && group != GroupId::CLUSTER
}

/// Answers a request; returns when the next one may be read.
pub(super) async fn ask(service: &Arc<Service>, session: Arc<Session>, payload: Payload, respond: Respond) {
    match routing::target(&payload, Some(&session.client), service.shards) {
        Target::Any => serve(service, Ok(session), payload, respond).await,
        Target::Leader(group, access) => ask_group(service, session, payload, group, access, respond).await,
        Target::AnyLeader => ask_any(service, session, payload, respond).await,
        Target::Batch => ask_batch(service, session, payload, respond).await,
        Target::Cancellations => ask_cancellations(service, session, payload, respond).await,
        Target::Page => {
            in_the_background(service, respond, move |service| {
                async move { page(&service, &session, payload).await }.boxed()
            })
            .await;
        }
        Target::DeadLetters => {
            in_the_background(service, respond, move |service| {
                async move { change_letters(&service, &session, payload).await }.boxed()
            })
            .await;
        }
    }
}

/// Gets the answer from others, as soon as there is room for one more.
async fn in_the_background(
    service: &Arc<Service>,
    respond: Respond,
    work: impl FnOnce(Arc<Service>) -> BoxFuture<'static, Payload>,
) {
    let room = service.router.room().await;
    let answer = work(service.clone());
    tokio::spawn(async move {
        respond(answer.await);
        drop(room);
    });
}

async fn ask_group(
    service: &Arc<Service>,
    session: Arc<Session>,
    payload: Payload,
    group: GroupId,
    access: Access,
    respond: Respond,
) {
    if service.router.may_serve(group, access) {
        let respond = unless_led_elsewhere(service, &session, &payload, group, access, respond);
        return serve(service, Ok(session), payload, respond).await;
    }
    // It may lead and not know enough yet.
    if is_redirected(&session, group) && service.router.route(group, None) != Route::Here {
        service.metrics.redirected.inc();
        return respond(refused(&payload, service.router.not_leader(group)));
    }
    in_the_background(service, respond, move |service| {
        async move { seek(&service, &session, payload, group, access).await }.boxed()
    })
    .await;
}

/// The leadership may be lost before the request comes to its turn; then nothing was done, and it goes another way.
fn unless_led_elsewhere(
    service: &Arc<Service>,
    session: &Arc<Session>,
    payload: &Payload,
    group: GroupId,
    access: Access,
    respond: Respond,
) -> Respond {
    let service = service.clone();
    if is_redirected(session, group) {
        return Box::new(move |mut answer| {
            if is_not_leader(&answer) {
                service.metrics.redirected.inc();
                name_leader(&service, &mut answer, group);
            }
            respond(answer);
        });
    }
    let (session, kept) = (session.clone(), payload.clone());
    Box::new(move |answer| {
        if !is_not_leader(&answer) {
            return respond(answer);
        }
        service.router.look_again();
        tokio::spawn(async move {
            let _room = service.router.room().await;
            respond(seek(&service, &session, kept, group, access).await);
        });
    })
}

/// Puts into a refusal what is known by now.
fn name_leader(service: &Service, answer: &mut Payload, group: GroupId) {
    if let Some(answer) = answer_mut(answer) {
        answer.refuse(service.router.not_leader(group).into());
    }
}

/// Brings a request to the leader of its group, wherever that is by then.
async fn seek(
    service: &Arc<Service>,
    session: &Arc<Session>,
    payload: Payload,
    group: GroupId,
    access: Access,
) -> Payload {
    let mut patience = Patience::new();
    let mut past = None;
    let mut unknown = None;
    let tell = |answer: Payload, unknown: Option<Problem>| {
        routing::what_to_tell(answer, is_done, unknown.map(|problem| refused(&payload, problem)))
    };
    loop {
        match service.router.route(group, past) {
            Route::Here if service.router.can_serve(group, access).await => {
                let answer = served(service, session.clone(), payload.clone()).await;
                if !is_not_leader(&answer) {
                    return tell(answer, unknown);
                }
            }
            Route::Here | Route::Nobody => past = None,
            Route::At(node_id) => match forward::send(service, node_id, session, payload.clone()).await {
                Forwarded::Answer(answer) => return tell(answer, unknown),
                Forwarded::Elsewhere => past = None,
                Forwarded::NotSent => past = Some(node_id),
                Forwarded::Unknown(why) => {
                    if !routing::may_be_repeated(&payload) {
                        return refused(&payload, lost(node_id, &why));
                    }
                    unknown = routing::changes_something(&payload).then(|| lost(node_id, &why));
                    past = Some(node_id);
                }
            },
        }
        if !patience.wait(&service.router, group).await {
            return tell(refused(&payload, service.router.not_leader(group)), unknown);
        }
    }
}

fn lost(node_id: u64, why: &str) -> Problem {
    Problem::maybe_done(format!("node {node_id} was asked and has not answered ({why}); it may have been done"))
}

/// A registration that may go to any shard goes to one that is led here, if there is one.
async fn ask_any(service: &Arc<Service>, session: Arc<Session>, payload: Payload, respond: Respond) {
    if !service.router.leads_any() {
        return in_the_background(service, respond, move |service| {
            async move { register_elsewhere(&service, &session, payload).await }.boxed()
        })
        .await;
    }
    let (kept, keeper, other) = (payload.clone(), session.clone(), service.clone());
    let respond = Box::new(move |answer| {
        if !is_not_leader(&answer) {
            return respond(answer);
        }
        other.router.look_again();
        tokio::spawn(async move {
            let _room = other.router.room().await;
            respond(register_elsewhere(&other, &keeper, kept).await);
        });
    });
    serve(service, Ok(session), payload, respond).await;
}

/// With a key, which says where it goes and makes it safe to send it twice.
async fn register_elsewhere(service: &Arc<Service>, session: &Arc<Session>, payload: Payload) -> Payload {
    let Payload::RegistrationRequest(mut task) = payload else { unreachable!("only registrations go anywhere") };
    give_key(&mut task);
    let group = group_of(service, session, &task).ok().flatten().expect("a short key");
    let mut answer = seek(service, session, Payload::RegistrationRequest(task), group, Access::Write).await;
    if let Payload::RegistrationResponse(answer) = &mut answer {
        // The key was not the client's.
        answer.duplicate = false;
    }
    answer
}

async fn ask_batch(service: &Arc<Service>, session: Arc<Session>, mut payload: Payload, respond: Respond) {
    let Payload::RegistrationBatch(batch) = &mut payload else { unreachable!("a batch") };
    if let Some(origin) = &batch.origin
        && let Err(problem) = tasks::Place::of(service, &session, origin)
    {
        return respond(Payload::RegistrationBatchResponse(proto::RegistrationBatchResponse::refusing(problem)));
    }
    if !session.redirects {
        number_tasks(batch);
    }
    let any_here = service.router.leads_any();
    let is_here = |task: &proto::Task| match group_of(service, &session, task) {
        Ok(Some(group)) => service.router.leads(group).is_some(),
        Ok(None) => any_here,
        // Refused wherever it goes.
        Err(Nowhere) => true,
    };
    let direct = if session.redirects {
        any_here || batch.origin.is_some() || batch.tasks.iter().all(is_known_again)
    } else {
        batch.tasks.iter().all(is_here)
    };
    if !direct {
        let Payload::RegistrationBatch(batch) = payload else { unreachable!("a batch") };
        let tasks = batch.tasks.into_iter().enumerate().collect();
        return in_the_background(service, respond, move |service| {
            async move { answer_batch(Batch::new(tasks).store(&service, &session).await) }.boxed()
        })
        .await;
    }
    let kept = (!session.redirects).then(|| batch.tasks.clone());
    let (keeper, other) = (session.clone(), service.clone());
    let respond = Box::new(move |answer| finish_batch(other, keeper, kept, answer, respond));
    serve(service, Ok(session), payload, respond).await;
}

/// What of a batch was refused for want of the leadership goes another way.
fn finish_batch(
    service: Arc<Service>,
    session: Arc<Session>,
    kept: Option<Vec<proto::Task>>,
    answer: Payload,
    respond: Respond,
) {
    let Payload::RegistrationBatchResponse(mut answer) = answer else { return respond(answer) };
    let missed = |answer: &proto::RegistrationResponse| answer.status == Status::NotLeader as i32;
    if !answer.responses.iter().any(missed) {
        return respond(Payload::RegistrationBatchResponse(answer));
    }
    service.router.look_again();
    let Some(tasks) = kept else {
        for answer in answer.responses.iter_mut().filter(|answer| missed(answer)) {
            let shard = answer.detail.as_ref().map_or(0, |detail| detail.shard);
            let group = GroupId(u16::try_from(shard + 1).unwrap_or(1));
            *answer = proto::RegistrationResponse::refusing(service.router.not_leader(group));
        }
        service.metrics.redirected.inc();
        return respond(Payload::RegistrationBatchResponse(answer));
    };
    tokio::spawn(async move {
        let _room = service.router.room().await;
        let again = tasks.into_iter().enumerate().filter(|(place, _)| missed(&answer.responses[*place]));
        for (place, found) in Batch::new(again.collect()).store(&service, &session).await {
            answer.responses[place] = found;
        }
        respond(Payload::RegistrationBatchResponse(answer));
    });
}

fn answer_batch(responses: BTreeMap<usize, proto::RegistrationResponse>) -> Payload {
    let responses = responses.into_values().collect();
    Payload::RegistrationBatchResponse(proto::RegistrationBatchResponse { responses, ..Default::default() })
}

/// Tasks of a batch on their way to those who lead their shards.
struct Batch {
    /// By their place in the batch.
    open: BTreeMap<usize, proto::Task>,
    /// Those that have a key from this node.
    keyed_here: BTreeSet<usize>,
    /// By place: it may have been done already, and is asked for again.
    unknown: BTreeMap<usize, Problem>,
    done: BTreeMap<usize, proto::RegistrationResponse>,
}

impl Batch {
    fn new(open: BTreeMap<usize, proto::Task>) -> Self {
        Self { open, keyed_here: BTreeSet::new(), unknown: BTreeMap::new(), done: BTreeMap::new() }
    }

    /// Returns an answer to each, by place.
    async fn store(
        mut self,
        service: &Arc<Service>,
        session: &Arc<Session>,
    ) -> BTreeMap<usize, proto::RegistrationResponse> {
        let mut patience = Patience::new();
        let mut past = None;
        loop {
            let (by_node, mut waits_for) = self.sort(service, session, past.take());
            let asked = by_node.into_iter().map(async |(node_id, places)| {
                let tasks = places.iter().map(|place| self.open[place].clone()).collect();
                let payload = Payload::RegistrationBatch(proto::RegistrationBatch { tasks, origin: None });
                let answer = match node_id {
                    None => Forwarded::Answer(served(service, session.clone(), payload).await),
                    Some(node_id) => forward::send(service, node_id, session, payload).await,
                };
                (node_id, places, answer)
            });
            for (node_id, places, answer) in join_all(asked).await {
                match answer {
                    Forwarded::Answer(answer) => self.take(&places, answer),
                    Forwarded::Elsewhere => {}
                    Forwarded::NotSent => past = node_id,
                    Forwarded::Unknown(why) => {
                        past = node_id;
                        self.give_up(&places, node_id.unwrap_or_default(), &why);
                    }
                }
            }
            let Some(task) = self.open.values().next() else { break };
            let open = group_of(service, session, task).ok().flatten();
            let group = waits_for.take().or(open).unwrap_or(GroupId(1));
            if !patience.wait(&service.router, group).await {
                for (place, task) in std::mem::take(&mut self.open) {
                    let group = group_of(service, session, &task).ok().flatten().unwrap_or(group);
                    self.done.insert(place, proto::RegistrationResponse::refusing(service.router.not_leader(group)));
                }
                break;
            }
        }
        for (place, problem) in std::mem::take(&mut self.unknown) {
            let answer = self.done.get_mut(&place).expect("everything is answered by now");
            // That it was refused later does not say that it was not done before.
            if answer.status != Status::Ok as i32 {
                *answer = proto::RegistrationResponse::refusing(problem);
            }
        }
        for place in &self.keyed_here {
            self.done.entry(*place).and_modify(|answer| answer.duplicate = false);
        }
        self.done
    }

    /// Which of them go where, `None` being this node; and a group that has no leader.
    #[allow(clippy::type_complexity, reason = "named where it is used")]
    fn sort(
        &mut self,
        service: &Service,
        session: &Session,
        past: Option<u64>,
    ) -> (BTreeMap<Option<u64>, Vec<usize>>, Option<GroupId>) {
        let any_here = service.router.leads_any();
        let mut by_node: BTreeMap<Option<u64>, Vec<usize>> = BTreeMap::new();
        let mut waits_for = None;
        let mut routes: BTreeMap<GroupId, Route> = BTreeMap::new();
        for (place, task) in &mut self.open {
            if !is_known_again(task) && !any_here {
                give_key(task);
                self.keyed_here.insert(*place);
            }
            let route = match group_of(service, session, task) {
                Ok(Some(group)) => {
                    let route = *routes.entry(group).or_insert_with(|| service.router.route(group, past));
                    if route == Route::Nobody {
                        waits_for = Some(group);
                    }
                    route
                }
                _ => Route::Here,
            };
            match route {
                Route::Here => by_node.entry(None).or_default().push(*place),
                Route::At(node_id) => by_node.entry(Some(node_id)).or_default().push(*place),
                Route::Nobody => {}
            }
        }
        (by_node, waits_for)
    }

    /// What one node has answered; those it does not lead stay open.
    fn take(&mut self, places: &[usize], answer: Payload) {
        let Payload::RegistrationBatchResponse(answer) = answer else { return };
        let whole = proto::RegistrationResponse {
            status: answer.status,
            error_message: answer.error_message,
            detail: answer.detail,
            ..Default::default()
        };
        let mut responses = answer.responses.into_iter();
        for place in places {
            let answer = responses.next().unwrap_or_else(|| whole.clone());
            if answer.status != Status::NotLeader as i32 {
                self.open.remove(place);
                self.done.insert(*place, answer);
            }
        }
    }

    /// No answer came: those with a key are sent again, the others may have been stored.
    fn give_up(&mut self, places: &[usize], node_id: u64, why: &str) {
        for place in places {
            if !is_known_again(&self.open[place]) {
                self.open.remove(place);
                self.done.insert(*place, proto::RegistrationResponse::refusing(lost(node_id, why)));
            } else {
                self.unknown.insert(*place, lost(node_id, why));
            }
        }
    }
}

/// Who follows redirects gets the answers of this node, and is told where to go with the others.
async fn ask_cancellations(service: &Arc<Service>, session: Arc<Session>, payload: Payload, respond: Respond) {
    let Payload::CancellationBatch(batch) = payload else { unreachable!("cancellations") };
    if !session.redirects {
        return in_the_background(service, respond, move |service| {
            async move { Payload::CancellationBatchResponse(cancel_all(&service, &session, batch.task_ids).await) }
                .boxed()
        })
        .await;
    }
    let other = service.clone();
    let respond = Box::new(move |answer| {
        let Payload::CancellationBatchResponse(mut answer) = answer else { return respond(answer) };
        let missed = answer.responses.iter_mut().filter(|answer| answer.status == Status::NotLeader as i32);
        let missed = missed.map(|answer| {
            let shard = answer.detail.as_ref().map_or(0, |detail| detail.shard);
            let group = GroupId(u16::try_from(shard + 1).unwrap_or(1));
            *answer = proto::CancellationResponse::refusing(other.router.not_leader(group));
        });
        if missed.count() > 0 {
            other.router.look_again();
            other.metrics.redirected.inc();
        }
        let answer = match answer.responses.is_empty() {
            // It was refused as a whole.
            true => answer,
            false => tasks::answers(answer.responses),
        };
        respond(Payload::CancellationBatchResponse(answer));
    });
    serve(service, Ok(session), Payload::CancellationBatch(batch), respond).await;
}

/// Cancels tasks wherever they are led, those of one node with one message. What was certainly not done is tried again.
async fn cancel_all(
    service: &Arc<Service>,
    session: &Arc<Session>,
    task_ids: Vec<String>,
) -> proto::CancellationBatchResponse {
    let mut patience = Patience::new();
    let mut past = None;
    let mut open: BTreeMap<usize, String> = task_ids.into_iter().enumerate().collect();
    let mut done: BTreeMap<usize, proto::CancellationResponse> = BTreeMap::new();
    loop {
        let mut by_node: BTreeMap<Option<u64>, Vec<usize>> = BTreeMap::new();
        let mut waits_for = None;
        for (place, id) in &open {
            // What cannot be understood is refused here as anywhere.
            let group = tasks::group_of(service, id).ok().map(|(_, group)| group);
            match group.map_or(Route::Here, |group| service.router.route(group, past)) {
                Route::Here => by_node.entry(None).or_default().push(*place),
                Route::At(node_id) => by_node.entry(Some(node_id)).or_default().push(*place),
                Route::Nobody => {}
            }
            waits_for = waits_for.or(group);
        }
        past = None;
        let asked = by_node.into_iter().map(async |(node_id, places)| {
            let task_ids = places.iter().map(|place| open[place].clone()).collect();
            let payload = Payload::CancellationBatch(proto::CancellationBatch { task_ids });
            let answer = match node_id {
                None => Forwarded::Answer(served(service, session.clone(), payload).await),
                Some(node_id) => forward::send(service, node_id, session, payload).await,
            };
            (node_id, places, answer)
        });
        for (node_id, places, answer) in join_all(asked).await {
            match answer {
                Forwarded::Answer(Payload::CancellationBatchResponse(answer)) => {
                    let whole = proto::CancellationResponse {
                        status: answer.status,
                        error_message: answer.error_message,
                        detail: answer.detail,
                    };
                    let mut responses = answer.responses.into_iter();
                    for place in places {
                        let answer = responses.next().unwrap_or_else(|| whole.clone());
                        if answer.status != Status::NotLeader as i32 {
                            open.remove(&place);
                            done.insert(place, answer);
                        }
                    }
                }
                Forwarded::Answer(_) | Forwarded::Elsewhere => {}
                Forwarded::NotSent => past = node_id,
                Forwarded::Unknown(why) => {
                    for place in places {
                        open.remove(&place);
                        let problem = lost(node_id.unwrap_or_default(), &why);
                        done.insert(place, proto::CancellationResponse::refusing(problem));
                    }
                }
            }
        }
        let Some(group) = waits_for.filter(|_| !open.is_empty()) else { break };
        if !patience.wait(&service.router, group).await {
            for (place, id) in std::mem::take(&mut open) {
                let group = tasks::group_of(service, &id).map_or(group, |(_, group)| group);
                done.insert(place, proto::CancellationResponse::refusing(service.router.not_leader(group)));
            }
            break;
        }
    }
    tasks::answers(done.into_values().collect())
}

/// The parts of all shards, each from its leader. All of them, or a refusal that names one that is missing.
async fn gather(
    service: &Arc<Service>,
    session: &Arc<Session>,
    payload: &Payload,
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
        let asked = by_node.into_iter().map(async |(node_id, groups)| {
            let answer = match node_id {
                None => Forwarded::Answer(part_here(service, session, payload, &groups).await),
                Some(node_id) => {
                    let (service, session, payload) = (service.clone(), session.clone(), payload.clone());
                    let its = groups.clone();
                    // Run to its end even if another part is refused meanwhile: a peer ends the connection of who takes
                    // back many requests.
                    let part = async move { forward::part(&service, node_id, &session, payload, &its).await };
                    tokio::spawn(part).await.unwrap_or_else(|error| Forwarded::Unknown(error.to_string()))
                }
            };
            (node_id, groups, answer)
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

async fn page(service: &Arc<Service>, session: &Arc<Session>, payload: Payload) -> Payload {
    let answer = match &payload {
        Payload::ListTasksRequest(request) => page_of_tasks(service, session, request, &payload).await,
        Payload::ListDeadLettersRequest(request) => page_of_letters(service, session, request, &payload).await,
        _ => unreachable!("only lists have pages"),
    };
    answer.unwrap_or_else(|problem| refused(&payload, problem))
}

async fn page_of_tasks(
    service: &Arc<Service>,
    session: &Arc<Session>,
    request: &proto::ListTasksRequest,
    payload: &Payload,
) -> Result<Payload, Problem> {
    let parts = gather(service, session, payload).await?;
    let part = decoded(merged(parts, list::room(service, request)))?;
    Ok(Payload::ListTasksResponse(list::answer(session, request, part)?))
}

async fn page_of_letters(
    service: &Arc<Service>,
    session: &Arc<Session>,
    request: &proto::ListDeadLettersRequest,
    payload: &Payload,
) -> Result<Payload, Problem> {
    let parts = gather(service, session, payload).await?;
    let part = decoded(merged(parts, letters::room(service, request)))?;
    Ok(Payload::ListDeadLettersResponse(letters::answer(part)))
}

fn merged(parts: Vec<Part<Bytes>>, room: Room) -> Part<Bytes> {
    merge(parts, room, |item| ITEM_BYTES + item.len())
}

fn decoded<T: Message + Default>(part: Part<Bytes>) -> Result<Part<T>, Problem> {
    let decode = |(place, item): (_, Bytes)| T::decode(item).map(|item| (place, item));
    let items = part.items.into_iter().map(decode).collect::<Result<_, _>>();
    let items = items.map_err(|error| Problem::new(Status::Error, format!("another node's part: {error}")))?;
    Ok(Part { items, more_behind: part.more_behind })
}

/// Replays or purges dead letters of several shards.
async fn change_letters(service: &Arc<Service>, session: &Arc<Session>, payload: Payload) -> Payload {
    let done = match payload.clone() {
        Payload::ReplayDeadLettersRequest(request) => replay(service, session, request).await,
        Payload::PurgeDeadLettersRequest(request) => purge(service, session, request).await,
        _ => unreachable!("nothing else is done to dead letters"),
    };
    done.unwrap_or_else(|problem| refused(&payload, problem))
}

async fn replay(
    service: &Arc<Service>,
    session: &Arc<Session>,
    request: proto::ReplayDeadLettersRequest,
) -> Result<Payload, Problem> {
    let choice = Choice::from(request.clone());
    let with_token = |next_token| {
        Payload::ReplayDeadLettersRequest(proto::ReplayDeadLettersRequest { next_token, ..request.clone() })
    };
    let chosen = choose(service, session, &choice, with_token).await?;
    let one = |id: DeadLetterId| {
        let dead_letter_ids = vec![id.to_string()];
        Payload::ReplayDeadLettersRequest(proto::ReplayDeadLettersRequest { dead_letter_ids, ..Default::default() })
    };
    let mut replayed = Vec::new();
    for answer in change_all(service, session, &chosen.letters, one).await {
        match answer {
            Payload::ReplayDeadLettersResponse(answer) if answer.status == Status::Ok as i32 => {
                replayed.extend(answer.replayed);
            }
            // What was done before is done.
            refusal => return Ok(refusal),
        }
    }
    let next_token = chosen.next_token;
    let answer = proto::ReplayDeadLettersResponse { replayed, next_token, ..Default::default() };
    Ok(Payload::ReplayDeadLettersResponse(answer))
}

async fn purge(
    service: &Arc<Service>,
    session: &Arc<Session>,
    request: proto::PurgeDeadLettersRequest,
) -> Result<Payload, Problem> {
    let choice = Choice::from(request.clone());
    let with_token =
        |next_token| Payload::PurgeDeadLettersRequest(proto::PurgeDeadLettersRequest { next_token, ..request.clone() });
    let chosen = choose(service, session, &choice, with_token).await?;
    let one = |id: DeadLetterId| {
        let dead_letter_ids = vec![id.to_string()];
        Payload::PurgeDeadLettersRequest(proto::PurgeDeadLettersRequest { dead_letter_ids, ..Default::default() })
    };
    let mut purged = 0;
    for answer in change_all(service, session, &chosen.letters, one).await {
        match answer {
            Payload::PurgeDeadLettersResponse(answer) if answer.status == Status::Ok as i32 => purged += answer.purged,
            refusal => return Ok(refusal),
        }
    }
    let next_token = chosen.next_token;
    Ok(Payload::PurgeDeadLettersResponse(proto::PurgeDeadLettersResponse { purged, next_token, ..Default::default() }))
}

/// The same bound for all nodes, by this one's clock.
async fn choose(
    service: &Arc<Service>,
    session: &Arc<Session>,
    choice: &Choice,
    with_token: impl Fn(String) -> Payload,
) -> Result<letters::Chosen, Problem> {
    if let Some(chosen) = letters::named(service, choice)? {
        return Ok(chosen);
    }
    let (bound_ms, from) = letters::bound(service, choice)?;
    let parts = gather(service, session, &with_token(format!("{bound_ms}-{from}"))).await?;
    let Part { items, more_behind } = merged(parts, letters::room_to_change(choice));
    let items = items.into_iter().map(|(place, _)| (place, ())).collect();
    letters::chosen(bound_ms, Part { items, more_behind })
}

async fn change_all(
    service: &Arc<Service>,
    session: &Arc<Session>,
    letters: &[DeadLetterId],
    one: impl Fn(DeadLetterId) -> Payload,
) -> Vec<Payload> {
    let asked = letters.iter().map(|letter| {
        let group = GroupId::of_shard(letter.task.shard());
        let (service, session, payload) = (service.clone(), session.clone(), one(*letter));
        async move { seek(&service, &session, payload, group, Access::Write).await }
    });
    // Collected first: a stream over borrowed closures is not `Send`.
    let asked: Vec<_> = asked.collect();
    futures::stream::iter(asked).buffered(LETTERS_AT_A_TIME).collect().await
}
