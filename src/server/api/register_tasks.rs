//! Registers the tasks of a batch: all in one shard, so that they travel in one log entry; those with a deduplication key go
//! where their keys are.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::gathered::Gathered;
use super::operation::{Operation, Respond};
use super::register_task::{Place, give_key, register};
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::server::problem::Problem;
use crate::server::routing::batches::{Batch, ask_each, is_not_leader, name_leaders};
use crate::server::routing::leader::in_the_background;
use crate::task::{GroupId, Invalid};
use crate::wire::answers::Answer;
use crate::wire::operations::Request;
use crate::wire::proto::{Origin, RegistrationBatch, RegistrationBatchResponse, RegistrationResponse, Task};
use crate::wire::routing::{BATCH_TASKS_MAX, Effect, Nowhere, group_of_task, is_known_again};

/// About what one task is answered with, a refusal included.
const ANSWER_BYTES: usize = 160;

impl Operation for RegistrationBatch {
    async fn here(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        let count = self.tasks.len();
        if count == 0 {
            return respond(Ok(RegistrationBatchResponse::default()));
        }
        let first = match first_place(&self, service, &session) {
            Ok(first) => first,
            Err(problem) => return respond(Err(problem)),
        };
        let mut admission = service.proposer.admission();
        let together = self.tasks.iter().all(|task| task.dedup_key.is_empty() && task.origin.is_none());
        if together && let Some(refused) = admission.busy(first.group) {
            return respond(Err(refused.into()));
        }
        let gathered = Gathered::new(count, |answers| respond(Ok(answered(answers))));
        for (at, task) in self.tasks.into_iter().enumerate() {
            let place = match &task.origin {
                None => Ok(first.behind(at)),
                Some(origin) => Place::of(service, &session, origin),
            };
            let gathered = gathered.clone();
            let answer = move |answer: Result<RegistrationResponse, Problem>| {
                gathered.put(at, answer.unwrap_or_else(RegistrationResponse::refusing));
            };
            register(service, &session, task, place, &mut admission, answer).await;
        }
        admission.send();
    }

    async fn among_nodes(mut self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        if let Some(origin) = &self.origin
            && let Err(problem) = Place::of(service, &session, origin)
        {
            return respond(Err(problem));
        }
        if !session.redirects {
            number_tasks(&mut self);
        }
        let (other, keeper) = (service.clone(), session.clone());
        if !is_for_this_node(&self, service, &session) {
            let tasks = self.tasks.into_iter().enumerate().collect();
            let work = async move { Ok(answered(store(&other, &keeper, tasks).await.into_values().collect())) };
            return in_the_background(service, respond, work).await;
        }
        let kept = (!session.redirects).then(|| self.tasks.clone());
        let respond = Box::new(move |answer: Result<RegistrationBatchResponse, Problem>| match answer {
            Ok(answer) => finish(other, keeper, kept, answer, respond),
            Err(problem) => respond(Err(problem)),
        });
        self.here(service, session, respond).await;
    }

    fn answer_bytes_max(&self, _: usize) -> usize {
        self.tasks.len() * ANSWER_BYTES
    }
}

/// Where the first task goes, unless that has a place of its own.
fn first_place(batch: &RegistrationBatch, service: &Service, session: &Session) -> Result<Place, Problem> {
    let count = batch.tasks.len();
    if count > BATCH_TASKS_MAX {
        let text = format!("tasks: {count} in one batch, the limit is {BATCH_TASKS_MAX}");
        return Err(Invalid::new(text).into());
    }
    // What a shard remembers of a sender is written with each entry, so many in one would cost it much.
    let mut origins = batch.origin.iter().chain(batch.tasks.iter().filter_map(|task| task.origin.as_ref()));
    if let Some(origin) = origins.next()
        && origins.any(|other| other.sender != origin.sender)
    {
        let text = "origin.sender: the tasks of a batch have one sender, or none";
        return Err(Invalid::new(text).into());
    }
    match &batch.origin {
        None => Ok(Place::anywhere(service, count)),
        Some(origin) => Place::of(service, session, origin),
    }
}

/// Gives each task what its batch says of all of them, so that they can go different ways.
fn number_tasks(batch: &mut RegistrationBatch) {
    let Some(origin) = batch.origin.take() else { return };
    for (task, place) in batch.tasks.iter_mut().zip(0..) {
        if !is_known_again(task) {
            task.origin = Some(Origin { number: origin.number.saturating_add(place), ..origin.clone() });
        }
    }
}

/// Whether this node can have a try at all of it: a client that follows redirects is told where to go with the rest.
fn is_for_this_node(batch: &RegistrationBatch, service: &Service, session: &Session) -> bool {
    let any_here = service.router.leads_any();
    if session.redirects {
        return any_here || batch.origin.is_some() || batch.tasks.iter().all(is_known_again);
    }
    batch.tasks.iter().all(|task| match group_of_task(task, Some(&session.client), service.shards) {
        Ok(Some(group)) => service.router.leads(group).is_some(),
        Ok(None) => any_here,
        // Refused wherever it goes.
        Err(Nowhere) => true,
    })
}

fn answered(responses: Vec<RegistrationResponse>) -> RegistrationBatchResponse {
    RegistrationBatchResponse { responses, ..Default::default() }
}

/// What of a batch was refused for want of the leadership goes another way.
fn finish(
    service: Arc<Service>,
    session: Arc<Session>,
    kept: Option<Vec<Task>>,
    mut answer: RegistrationBatchResponse,
    respond: Respond<RegistrationBatch>,
) {
    if !answer.responses.iter().any(is_not_leader) {
        return respond(Ok(answer));
    }
    service.router.look_again();
    let Some(tasks) = kept else {
        name_leaders(&service, &mut answer.responses);
        return respond(Ok(answer));
    };
    tokio::spawn(async move {
        let _room = service.router.room().await;
        let again = tasks.into_iter().enumerate().filter(|(place, _)| is_not_leader(&answer.responses[*place]));
        for (place, found) in store(&service, &session, again.collect()).await {
            answer.responses[place] = found;
        }
        respond(Ok(answer));
    });
}

/// Has tasks stored by those who lead their shards.
async fn store(
    service: &Arc<Service>,
    session: &Arc<Session>,
    tasks: BTreeMap<usize, Task>,
) -> BTreeMap<usize, RegistrationResponse> {
    let plain: Vec<usize> = tasks.iter().filter(|(_, task)| !is_known_again(task)).map(|(place, _)| *place).collect();
    let mut answers = ask_each::<RegistrationBatch>(service, session, tasks).await;
    for place in plain {
        // A key it has was not the client's.
        answers.entry(place).and_modify(|answer| answer.duplicate = false);
    }
    answers
}

impl Batch for RegistrationBatch {
    type Item = Task;
    type ItemAnswer = RegistrationResponse;

    fn of(tasks: Vec<Task>) -> Self {
        Self { tasks, origin: None }
    }

    fn answers(answer: RegistrationBatchResponse) -> Vec<RegistrationResponse> {
        answer.responses
    }

    /// With a key it can go to a shard that is led elsewhere.
    fn prepare(service: &Service, task: &mut Task) {
        if !is_known_again(task) && !service.router.leads_any() {
            give_key(task);
        }
    }

    fn group(service: &Service, session: &Session, task: &Task) -> Option<GroupId> {
        group_of_task(task, Some(&session.client), service.shards).ok().flatten()
    }

    fn item_effect(task: &Task) -> Effect {
        task.effect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::rig::{DISK, ELSEWHERE, HERE, Rig, anywhere, check, in_an_hour};
    use super::*;
    use crate::wire::problems::Code;
    use crate::wire::proto::Status;

    fn batch(tasks: Vec<Task>) -> RegistrationBatch {
        RegistrationBatch { tasks, origin: None }
    }

    fn sent_to(shard: u16) -> Task {
        let origin = Origin { sender: "sender".into(), shard: shard.into(), number: 1, answered_below: 1 };
        Task { origin: Some(origin), ..in_an_hour() }
    }

    fn statuses(answer: &RegistrationBatchResponse) -> Vec<Status> {
        answer.responses.iter().map(RegistrationResponse::status).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn each_task_has_its_answer_at_its_place() {
        let rig = Rig::start().await;
        let empty = rig.ask(&rig.client(), batch(vec![])).await.unwrap();
        assert_eq!(empty.responses, []);
        let late = Task { delay_ms: u64::MAX, ..Default::default() };
        let answer = rig.ask(&rig.client(), batch(vec![sent_to(HERE.0), late, anywhere()])).await.unwrap();
        assert_eq!(statuses(&answer)[..2], [Status::Ok, Status::InvalidRequest]);
        assert!(answer.responses[1].error_message.contains("delay_ms"), "{answer:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_that_makes_no_sense_is_refused_as_a_whole() {
        let rig = Rig::start().await;
        let other = Task {
            origin: sent_to(0).origin.map(|origin| Origin { sender: "other".into(), ..origin }),
            ..in_an_hour()
        };
        for (name, request, text) in [
            ("too many", batch(vec![in_an_hour(); BATCH_TASKS_MAX + 1]), "1001 in one batch"),
            ("two senders", batch(vec![sent_to(0), other]), "origin.sender"),
        ] {
            check(name, &rig.refusal(&rig.client(), request).await, Code::InvalidRequest, text);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_room_each_is_refused_and_without_a_disk_nobody_knows() {
        let rig = Rig::start().await;
        rig.let_disk_run_low();
        let answer = rig.ask(&rig.client(), batch(vec![sent_to(HERE.0); 2])).await.unwrap();
        assert_eq!(statuses(&answer), [Status::Overloaded; 2]);
        assert!(answer.responses[0].error_message.contains(DISK), "{answer:?}");
        let rig = Rig::start().await;
        rig.hang_disk();
        let answer = rig.ask(&rig.client(), batch(vec![sent_to(HERE.0)])).await.unwrap();
        let detail = answer.responses[0].detail.as_ref().unwrap();
        assert!(detail.maybe_done, "{answer:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_led_elsewhere_does_not_hold_up_the_rest() {
        let rig = Rig::start().await.with_another_node();
        let mixed = batch(vec![sent_to(ELSEWHERE.0), sent_to(HERE.0)]);
        let answer = rig.ask(&rig.client(), mixed.clone()).await.unwrap();
        assert_eq!(statuses(&answer), [Status::NotLeader, Status::Ok], "one who follows redirects is told");
        let answer = rig.ask(&rig.follows_nobody(), mixed).await.unwrap();
        assert_eq!(statuses(&answer), [Status::NotLeader, Status::Ok], "nobody came to lead it");
        assert!(answer.responses[0].error_message.contains("shard 1"), "{answer:?}");
    }
}
