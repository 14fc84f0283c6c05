//! What a client asks for its tasks: register, cancel, change, pause, look.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::problem::Problem;
use super::sessions::{Session, SessionError};
use super::{Respond, Service};
use crate::propose::{Admission, Ask, Due, Refused};
use crate::shard::{self, Change, Numbered, Reply};
use crate::store::StoreError;
use crate::store::codec;
use crate::store::keys::{HISTORY_BUCKET_MS, Key, Parsed, parse_state};
use crate::store::overlay::get_row;
use crate::store::rows::{CursorRow, Ended, HistoryRow, PolicyRow, TaskRow};
use crate::task::{ClientId, DedupHash, GroupId, InstantMs, Invalid, ShardId, Tags, TaskId};
use crate::wire::answers::Answer;
use crate::wire::convert::{
    callback_from, callback_shown, dead_letter_from, dead_letter_to, failure_to, policy_over, recurrence_from,
    recurrence_to, retry_from, retry_to,
};
use crate::wire::proto::boomerang_envelope::Payload;
use crate::wire::proto::{self, Status, TaskState};
use crate::wire::routing::{BATCH_TASKS_MAX, CANCELLATIONS_MAX};

/// Of the name a sender of registrations gives itself.
const SENDER_BYTES_MAX: usize = 64;
/// No sender gets that far, and what counts on from there fits.
const NUMBER_MAX: u64 = 1 << 62;
const DEDUP_TTL_MS_DEFAULT: u64 = 24 * 3600 * 1000;
const DEDUP_TTL_MS_MAX: u64 = 366 * 24 * 3600 * 1000;
/// Shown of one task.
const HISTORY_MAX: usize = 100;

pub(super) async fn register(
    service: &Arc<Service>,
    session: Result<Arc<Session>, SessionError>,
    task: proto::Task,
    respond: Respond,
) {
    let answer = move |answer| respond(Payload::RegistrationResponse(answer));
    match session {
        Ok(session) => {
            let place = match &task.origin {
                None => Ok(Place { group: service.any_shard(1), numbered: None }),
                Some(origin) => Place::of(service, &session, origin),
            };
            let mut admission = service.proposer.admission();
            register_one(service, &session, task, place, &mut admission, answer).await;
            admission.send();
        }
        Err(error) => {
            service.metrics.refusals.inc();
            answer(proto::RegistrationResponse::refusing(Problem::from(error)));
        }
    }
}

/// Where a task without a deduplication key goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    group: GroupId,
    numbered: Option<Numbered>,
}

impl Place {
    /// Where its sender says.
    pub(super) fn of(service: &Service, session: &Session, origin: &proto::Origin) -> Result<Self, Problem> {
        let shards = service.shards;
        let shard = u16::try_from(origin.shard).ok().filter(|shard| *shard < shards);
        let shard = shard.ok_or_else(|| {
            Invalid::new(format!("origin.shard: {}, and there are {shards}, counted from 0", origin.shard))
        })?;
        let sender = match origin.sender.len() {
            1..=SENDER_BYTES_MAX => DedupHash::new(&session.client, &origin.sender)?,
            bytes => {
                return Err(
                    Invalid::new(format!("origin.sender: {bytes} bytes, must be 1 to {SENDER_BYTES_MAX}")).into()
                );
            }
        };
        if !(1..=NUMBER_MAX).contains(&origin.number) || origin.answered_below > origin.number {
            let text = "origin.number: counts from 1 to 2^62, and must not be below origin.answered_below";
            return Err(Invalid::new(text).into());
        }
        let numbered = Numbered { sender, number: origin.number, answered_below: origin.answered_below };
        Ok(Self { group: GroupId::of_shard(ShardId(shard)), numbered: Some(numbered) })
    }

    /// That of the task which lies `behind` by so many in a batch.
    fn behind(self, behind: usize) -> Self {
        let number = |numbered: Numbered| numbered.number.saturating_add(behind as u64);
        let numbered = self.numbered.map(|numbered| Numbered { number: number(numbered), ..numbered });
        Self { numbered, ..self }
    }
}

/// All in one shard, so that they travel in one log entry; those with a deduplication key go where their keys are.
pub(super) async fn register_batch(
    service: &Arc<Service>,
    session: Result<Arc<Session>, SessionError>,
    batch: proto::RegistrationBatch,
    respond: Respond,
) {
    let refuse =
        |problem: Problem| Payload::RegistrationBatchResponse(proto::RegistrationBatchResponse::refusing(problem));
    let session = match session {
        Ok(session) => session,
        Err(error) => return respond(refuse(error.into())),
    };
    let count = batch.tasks.len();
    if count > BATCH_TASKS_MAX {
        let text = format!("tasks: {count} in one batch, the limit is {BATCH_TASKS_MAX}");
        return respond(refuse(Invalid::new(text).into()));
    }
    if count == 0 {
        return respond(Payload::RegistrationBatchResponse(proto::RegistrationBatchResponse::default()));
    }
    // What a shard remembers of a sender is written with each entry, so many in one would cost it much.
    let mut origins = batch.origin.iter().chain(batch.tasks.iter().filter_map(|task| task.origin.as_ref()));
    if let Some(origin) = origins.next()
        && origins.any(|other| other.sender != origin.sender)
    {
        let text = "origin.sender: the tasks of a batch have one sender, or none";
        return respond(refuse(Invalid::new(text).into()));
    }
    let first = match &batch.origin {
        None => Ok(Place { group: service.any_shard(count), numbered: None }),
        Some(origin) => Place::of(service, &session, origin),
    };
    let first = match first {
        Ok(first) => first,
        Err(problem) => return respond(refuse(problem)),
    };
    let mut admission = service.proposer.admission();
    let together = batch.tasks.iter().all(|task| task.dedup_key.is_empty() && task.origin.is_none());
    if together && let Some(refused) = admission.busy(first.group) {
        service.metrics.refusals.inc_by(count as u64);
        return respond(refuse(refused.into()));
    }
    let gathered = Gathered::new(count, respond, |responses| {
        Payload::RegistrationBatchResponse(proto::RegistrationBatchResponse { responses, ..Default::default() })
    });
    for (place, task) in batch.tasks.into_iter().enumerate() {
        let whereto = match &task.origin {
            None => Ok(first.behind(place)),
            Some(origin) => Place::of(service, &session, origin),
        };
        let gathered = gathered.clone();
        let answer = move |answer| Gathered::put(&gathered, place, answer);
        register_one(service, &session, task, whereto, &mut admission, answer).await;
    }
    admission.send();
}

/// The answers to a batch, until the last one is there.
struct Gathered<T> {
    responses: Vec<Option<T>>,
    missing: usize,
    /// Who waits, and the message for them.
    finish: Option<Finish<T>>,
}

type Finish<T> = (Respond, fn(Vec<T>) -> Payload);

impl<T> Gathered<T> {
    fn new(count: usize, respond: Respond, message: fn(Vec<T>) -> Payload) -> Arc<Mutex<Self>> {
        let responses = std::iter::repeat_with(|| None).take(count).collect();
        Arc::new(Mutex::new(Self { responses, missing: count, finish: Some((respond, message)) }))
    }

    /// The answer to one of them; the last one answers the batch.
    fn put(gathered: &Mutex<Self>, place: usize, answer: T) {
        let mut of = gathered.lock().expect("no panic under this lock");
        of.responses[place] = Some(answer);
        of.missing -= 1;
        if of.missing > 0 {
            return;
        }
        let responses = std::mem::take(&mut of.responses).into_iter().flatten().collect();
        let finish = of.finish.take();
        drop(of);
        if let Some((respond, message)) = finish {
            respond(message(responses));
        }
    }
}

/// `place` is where it goes unless it has a deduplication key. `answer` is called once.
async fn register_one(
    service: &Arc<Service>,
    session: &Session,
    task: proto::Task,
    place: Result<Place, Problem>,
    admission: &mut Admission<'_>,
    answer: impl FnOnce(proto::RegistrationResponse) + Send + 'static,
) {
    let (group, ask) = match place.and_then(|place| registration(service, session, task, place)) {
        Ok(found) => found,
        Err(problem) => {
            service.metrics.refusals.inc();
            return answer(proto::RegistrationResponse::refusing(problem));
        }
    };
    let arrived_us = service.clock.now_us();
    let (clock, metrics) = (service.clock.clone(), service.metrics.clone());
    let reply = move |result: Result<Reply, Refused>| {
        answer(match result {
            Ok(Reply::Registered { id, due_ms, duplicate }) => {
                metrics.registrations.inc();
                let took = clock.now_us().saturating_sub(arrived_us);
                metrics.registration_latency.observe(Duration::from_micros(took).as_secs_f64());
                proto::RegistrationResponse {
                    task_id: id.to_string(),
                    status: Status::Ok as i32,
                    scheduled_time_ms: due_ms,
                    duplicate,
                    ..Default::default()
                }
            }
            Ok(Reply::GivenUp) => {
                metrics.refusals.inc();
                let text = "origin.number: its sender has given it up, or had an answer to it; nothing was stored";
                proto::RegistrationResponse::refusing(Problem::new(Status::InvalidRequest, text))
            }
            Ok(Reply::TooManyOpen { open_max }) => {
                metrics.refusals.inc();
                let text = format!(
                    "origin: {open_max} registrations of this sender wait in this shard for origin.answered_below to \
                     pass them; raise it, or register by another sender"
                );
                proto::RegistrationResponse::refusing(Problem::new(Status::Overloaded, text))
            }
            Ok(other) => unreachable!("a registration is never answered with {other:?}"),
            Err(refused) => {
                metrics.refusals.inc();
                proto::RegistrationResponse::refusing(Problem::from(refused))
            }
        });
    };
    admission.put(group, ask, Box::new(reply)).await;
}

fn registration(
    service: &Service,
    session: &Session,
    task: proto::Task,
    place: Place,
) -> Result<(GroupId, Ask), Problem> {
    let limits = service.limits.with(session.limits);
    limits.check_payload(task.payload.len())?;
    limits.check_interval(task.repeat_interval_ms)?;
    let due = due(service, session, Some(task.delay_ms).filter(|delay| *delay > 0), task.due_ms)?;
    let due = due.unwrap_or(Due::After(0));
    let recurrence = recurrence_from(task.repeat_interval_ms, task.recurrence.as_ref())?;
    if let Some(recurrence) = &recurrence {
        recurrence.validate(Some(due.at(service.clock.now_ms())))?;
    }
    let tags = Tags::new(&task.name, task.labels)?;
    let policy = if task.callback.is_some() || task.retry.is_some() || task.dlq.is_some() {
        let own = (task.callback.as_ref(), task.retry.as_ref(), task.dlq.as_ref());
        policy_over(session.policy.as_deref(), own.0, own.1, own.2)?.map(Arc::new)
    } else {
        session.policy.clone()
    };
    let policy = policy.ok_or_else(|| {
        Invalid::new(
            "callback: neither the task, nor the session, nor the client has one; give it with the task or in the \
             handshake, or register the client with one",
        )
    })?;
    policy.check_payload(task.payload.len())?;
    let mut dedup = None;
    let Place { mut group, mut numbered } = place;
    if !task.dedup_key.is_empty() {
        if task.origin.is_some() {
            return Err(Invalid::new("origin: cannot be given together with dedup_key").into());
        }
        numbered = None;
        let hash = DedupHash::new(&session.client, &task.dedup_key)?;
        let ttl_ms = if task.dedup_ttl_ms == 0 { DEDUP_TTL_MS_DEFAULT } else { task.dedup_ttl_ms };
        if ttl_ms > DEDUP_TTL_MS_MAX {
            return Err(
                Invalid::new(format!("dedup_ttl_ms: {ttl_ms}, the limit is {DEDUP_TTL_MS_MAX} (366 days)")).into()
            );
        }
        dedup = Some((hash, ttl_ms));
        group = service.proposer.shard_of(hash);
    }
    let tags = (!tags.is_empty()).then_some(tags);
    let client = session.client.clone();
    Ok((group, Ask::Register { client, policy, due, recurrence, tags, dedup, numbered, payload: task.payload }))
}

/// When something is due, by what a request says of it; 0 as an instant is none.
fn due(service: &Service, session: &Session, delay_ms: Option<u64>, due_ms: InstantMs) -> Result<Option<Due>, Problem> {
    let limits = service.limits.with(session.limits);
    match (delay_ms, due_ms) {
        (None, 0) => Ok(None),
        (Some(delay_ms), 0) => {
            limits.check_delay(delay_ms)?;
            Ok(Some(Due::After(delay_ms)))
        }
        (None, due_ms) => {
            limits.check_due(due_ms, service.clock.now_ms())?;
            Ok(Some(Due::At(due_ms)))
        }
        _ => Err(Invalid::new("due_ms: cannot be given together with delay_ms").into()),
    }
}

/// The group that holds a task.
pub(super) fn group_of(service: &Service, id: &str) -> Result<(TaskId, GroupId), Problem> {
    let id: TaskId = id.parse()?;
    if id.shard().0 >= service.shards {
        return Err(not_found(id));
    }
    Ok((id, GroupId::of_shard(id.shard())))
}

fn not_found(id: TaskId) -> Problem {
    Problem::new(Status::NotFound, format!("task {id} is not known: it was never registered, or is done, or cancelled"))
}

fn too_late(occurrence: u64, attempt: u32, so: &str) -> Problem {
    Problem {
        status: Status::TooLate,
        text: format!("too late: attempt {attempt} of occurrence {occurrence} may be out; {so}"),
        detail: Some(proto::Detail { occurrence, attempt, ..Default::default() }),
    }
}

/// A task that somebody wants to change: where it is, and whose it must be.
struct Wanted {
    id: TaskId,
    group: GroupId,
    owner: Option<ClientId>,
    session: Arc<Session>,
}

fn wanted(service: &Service, session: Result<Arc<Session>, SessionError>, id: &str) -> Result<Wanted, Problem> {
    let session = session?;
    let (id, group) = group_of(service, id)?;
    let owner = (!session.admin).then(|| session.client.clone());
    Ok(Wanted { id, group, owner, session })
}

pub(super) async fn cancel(
    service: &Arc<Service>,
    session: Result<Arc<Session>, SessionError>,
    request: &proto::CancellationRequest,
    respond: Respond,
) {
    let answer = move |answer| respond(Payload::CancellationResponse(answer));
    let mut admission = service.proposer.admission();
    cancel_one(service, session, &request.task_id, &mut admission, answer).await;
    admission.send();
}

/// Those of one shard travel together.
pub(super) async fn cancel_batch(
    service: &Arc<Service>,
    session: Result<Arc<Session>, SessionError>,
    batch: proto::CancellationBatch,
    respond: Respond,
) {
    let refuse =
        |problem: Problem| Payload::CancellationBatchResponse(proto::CancellationBatchResponse::refusing(problem));
    let session = match session {
        Ok(session) => session,
        Err(error) => return respond(refuse(error.into())),
    };
    let count = batch.task_ids.len();
    if count > CANCELLATIONS_MAX {
        let text = format!("task_ids: {count} in one batch, the limit is {CANCELLATIONS_MAX}");
        return respond(refuse(Invalid::new(text).into()));
    }
    if count == 0 {
        return respond(Payload::CancellationBatchResponse(proto::CancellationBatchResponse::default()));
    }
    let gathered = Gathered::new(count, respond, |responses| Payload::CancellationBatchResponse(answers(responses)));
    let mut admission = service.proposer.admission();
    for (place, id) in batch.task_ids.iter().enumerate() {
        let gathered = gathered.clone();
        let answer = move |answer| Gathered::put(&gathered, place, answer);
        cancel_one(service, Ok(session.clone()), id, &mut admission, answer).await;
    }
    admission.send();
}

/// The answer to a batch of cancellations. Each status is explained once, or thousands would not fit into a frame.
pub(super) fn answers(mut responses: Vec<proto::CancellationResponse>) -> proto::CancellationBatchResponse {
    let mut explained = BTreeSet::new();
    for response in &mut responses {
        if !explained.insert(response.status) {
            response.error_message.clear();
        }
    }
    proto::CancellationBatchResponse { responses, ..Default::default() }
}

/// `answer` is called once.
async fn cancel_one(
    service: &Arc<Service>,
    session: Result<Arc<Session>, SessionError>,
    id: &str,
    admission: &mut Admission<'_>,
    answer: impl FnOnce(proto::CancellationResponse) + Send + 'static,
) {
    let message = |result: Result<(), Problem>| match result {
        Ok(()) => proto::CancellationResponse { status: Status::Ok as i32, ..Default::default() },
        Err(problem) => proto::CancellationResponse::refusing(problem),
    };
    let Wanted { id, group, owner, .. } = match wanted(service, session, id) {
        Ok(wanted) => wanted,
        Err(problem) => return answer(message(Err(problem))),
    };
    let metrics = service.metrics.clone();
    let reply = move |result: Result<Reply, Refused>| {
        answer(message(match result {
            Ok(Reply::Cancelled) => {
                metrics.cancellations.inc();
                Ok(())
            }
            Ok(Reply::NotFound) => Err(not_found(id)),
            Ok(Reply::TooLate { occurrence, attempt }) => Err(too_late(occurrence, attempt, "nothing follows it")),
            Ok(other) => unreachable!("a cancellation is never answered with {other:?}"),
            Err(refused) => Err(refused.into()),
        }));
    };
    admission.put(group, Ask::Cancel { id, owner }, Box::new(reply)).await;
}

pub(super) async fn update(
    service: &Arc<Service>,
    session: Result<Arc<Session>, SessionError>,
    request: proto::UpdateTaskRequest,
    respond: Respond,
) {
    let message = move |result: Result<(u64, InstantMs), Problem>| {
        Payload::UpdateTaskResponse(match result {
            Ok((version, scheduled_time_ms)) => proto::UpdateTaskResponse {
                status: Status::Ok as i32,
                version,
                scheduled_time_ms,
                ..Default::default()
            },
            Err(problem) => proto::UpdateTaskResponse::refusing(problem),
        })
    };
    let asked = wanted(service, session, &request.task_id)
        .and_then(|wanted| Ok((wanted.id, wanted.group, edit(service, &wanted, request)?)));
    let (id, group, ask) = match asked {
        Ok(asked) => asked,
        Err(problem) => return respond(message(Err(problem))),
    };
    let answer = move |result: Result<Reply, Refused>| {
        respond(message(match result {
            // What is paused is due at no instant.
            Ok(Reply::Edited { version, due_ms }) => Ok((version, due_or_zero(due_ms))),
            Ok(Reply::NotFound) => Err(not_found(id)),
            Ok(Reply::TooLate { occurrence, attempt }) => {
                Err(too_late(occurrence, attempt, "nothing was changed; try again when it is settled"))
            }
            Ok(Reply::Unfit(why)) => Err(why.into()),
            Ok(Reply::Conflict { version }) => Err(Problem {
                status: Status::Conflict,
                text: format!("the task has version {version}; nothing was changed"),
                detail: Some(proto::Detail { version, ..Default::default() }),
            }),
            Ok(other) => unreachable!("an edit is never answered with {other:?}"),
            Err(refused) => Err(refused.into()),
        }));
    };
    service.proposer.submit(group, ask, Box::new(answer)).await;
}

fn edit(service: &Service, wanted: &Wanted, request: proto::UpdateTaskRequest) -> Result<Ask, Problem> {
    let Wanted { id, owner, session, .. } = wanted;
    let due = due(service, session, request.delay_ms, request.due_ms.map_or(0, |due_ms| due_ms.max(1)))?;
    if let Some(payload) = &request.payload {
        service.limits.with(session.limits).check_payload(payload.len())?;
    }
    let change = Change {
        due_ms: None,
        payload: request.payload,
        callback: request.callback.as_ref().map(callback_from).transpose()?,
        retry: request.retry.as_ref().map(retry_from).transpose()?,
        dead_letter: request.dlq.as_ref().map(dead_letter_from).transpose()?,
    };
    if due.is_none() && change == Change::default() {
        return Err(Invalid::new("nothing to change: give a due instant, a payload, or part of a policy").into());
    }
    let version = (request.expected_version > 0).then_some(request.expected_version);
    Ok(Ask::Edit { id: *id, owner: owner.clone(), version, due, change })
}

pub(super) async fn pause(
    service: &Arc<Service>,
    session: Result<Arc<Session>, SessionError>,
    request: &proto::PauseTaskRequest,
    respond: Respond,
) {
    let message = move |result: Result<proto::PauseTaskResponse, Problem>| {
        Payload::PauseTaskResponse(match result {
            Ok(answer) => answer,
            Err(problem) => proto::PauseTaskResponse::refusing(problem),
        })
    };
    let Wanted { id, group, owner, .. } = match wanted(service, session, &request.task_id) {
        Ok(wanted) => wanted,
        Err(problem) => return respond(message(Err(problem))),
    };
    let answer = move |result: Result<Reply, Refused>| {
        respond(message(match result {
            Ok(Reply::Paused { out }) => Ok(proto::PauseTaskResponse {
                detail: out.map(|(occurrence, attempt)| proto::Detail { occurrence, attempt, ..Default::default() }),
                ..Default::default()
            }),
            Ok(Reply::Resumed { due_ms }) => {
                Ok(proto::PauseTaskResponse { scheduled_time_ms: due_ms, ..Default::default() })
            }
            Ok(Reply::NotFound) => Err(not_found(id)),
            Ok(other) => unreachable!("a pause is never answered with {other:?}"),
            Err(refused) => Err(refused.into()),
        }));
    };
    let ask = Ask::Pause { id, owner, paused: request.paused };
    service.proposer.submit(group, ask, Box::new(answer)).await;
}

pub(super) fn get(
    service: &Service,
    session: &Session,
    request: &proto::GetTaskRequest,
) -> Result<proto::GetTaskResponse, Problem> {
    let (id, group) = group_of(service, &request.task_id)?;
    let found = shard::read_task(&service.store, group, id)?;
    let found = found.filter(|(task, _)| session.admin || task.client == session.client);
    let task = found.map(|(task, at)| details(service, group, id, task, at)).transpose()?;
    let history = if request.history { history(service, session, group, id)? } else { Vec::new() };
    if task.is_none() && history.is_empty() {
        return Err(not_found(id));
    }
    Ok(proto::GetTaskResponse { status: Status::Ok as i32, task, history, ..Default::default() })
}

/// What became of a task's occurrences, the latest first: from the hour it was made in, or as far back as is kept.
fn history(
    service: &Service,
    session: &Session,
    group: GroupId,
    id: TaskId,
) -> Result<Vec<proto::Occurrence>, StoreError> {
    if service.history_ms == 0 {
        return Ok(Vec::new());
    }
    let now_ms = service.clock.now_ms();
    let bucket = |at_ms: InstantMs| at_ms - at_ms % HISTORY_BUCKET_MS;
    // The clock of another leader may have been a little ahead.
    let last = bucket(now_ms + HISTORY_BUCKET_MS);
    let first = bucket(id.made_at().max(now_ms.saturating_sub(service.history_ms)));
    let mut shown = Vec::new();
    let mut at = last;
    while at >= first && shown.len() < HISTORY_MAX {
        let (from, until) = Key::history_of(group, at, id);
        for (key, value) in service.store.scan_state_back(&from, &until, HISTORY_MAX)? {
            let Some((_, Parsed::History(_, occurrence, ended_ms))) = parse_state(&key) else {
                return Err(StoreError::damaged("history", "a key is not one of ours"));
            };
            let row: HistoryRow = codec::decode("history", &value)?;
            if (session.admin || row.client == session.client) && shown.len() < HISTORY_MAX {
                shown.push(occurrence_shown(occurrence, ended_ms, row));
            }
        }
        let Some(before) = at.checked_sub(HISTORY_BUCKET_MS) else { break };
        at = before;
    }
    Ok(shown)
}

fn occurrence_shown(occurrence: u64, ended_ms: InstantMs, row: HistoryRow) -> proto::Occurrence {
    use proto::occurrence::Outcome;
    let HistoryRow { client: _, ended, count, due_ms, dispatched_ms, attempts, failure } = row;
    let outcome = match ended {
        Ended::Acknowledged => Outcome::Acknowledged,
        Ended::Dead => Outcome::Dead,
        Ended::Cancelled => Outcome::Cancelled,
        Ended::Skipped => Outcome::Skipped,
        Ended::Merged => Outcome::Merged,
    };
    proto::Occurrence {
        occurrence,
        outcome: outcome.into(),
        due_ms,
        dispatched_ms,
        ended_ms,
        attempts,
        failure: failure.map(|failure| failure_to(&failure, ended_ms)),
        count,
    }
}

/// A task as it is shown.
pub(super) fn details(
    service: &Service,
    group: GroupId,
    id: TaskId,
    task: TaskRow,
    at: CursorRow,
) -> Result<proto::TaskDetails, Problem> {
    let policy: Option<PolicyRow> = get_row(&service.store, "a policy", &Key::policy(group, task.policy))?;
    let policy = policy.map(|row| row.policy);
    let state = if at.is_paused() {
        TaskState::Paused
    } else if service.dispatches.is_out(group, id) {
        TaskState::Out
    } else if at.attempt > 1 {
        TaskState::Retrying
    } else {
        TaskState::Scheduled
    };
    let (_, occurrence) = shard::shown_as(id, &task, at.occurrence);
    let tags = task.tags.unwrap_or_default();
    Ok(proto::TaskDetails {
        task_id: id.to_string(),
        client_id: task.client.to_string(),
        expiration_ms: due_or_zero(at.due_ms),
        repeat_interval_ms: task.recurrence.map_or(0, |recurrence| recurrence.interval_ms),
        payload: task.payload,
        first_due_ms: task.first_due_ms,
        occurrence,
        attempt: at.attempt,
        callback: policy.as_ref().map(|policy| callback_shown(&policy.callback)),
        state: state.into(),
        version: task.version,
        name: tags.name().unwrap_or_default().to_owned(),
        labels: tags.labels().iter().cloned().collect(),
        recurrence: task.recurrence.as_ref().map(recurrence_to),
        retry: policy.as_ref().map(|policy| retry_to(&policy.retry)),
        dlq: policy.as_ref().and_then(|policy| policy.dead_letter.as_deref()).map(dead_letter_to),
        last_failure: at.failure.as_ref().map(|(failure, at_ms)| failure_to(failure, *at_ms)),
    })
}

/// What is paused is due at no instant.
fn due_or_zero(due_ms: InstantMs) -> InstantMs {
    if due_ms == crate::store::rows::NEVER { 0 } else { due_ms }
}
