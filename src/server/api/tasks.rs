//! What the operations on tasks share: where a task is, whose it is, when it is due, how it is shown.

use crate::propose::Due;
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::server::problem::Problem;
use crate::shard;
use crate::store::keys::Key;
use crate::store::overlay::get_row;
use crate::store::rows::{CursorRow, NEVER, PolicyRow, TaskRow};
use crate::task::{ClientId, GroupId, InstantMs, Invalid, TaskId};
use crate::wire::convert::{callback_shown, dead_letter_to, failure_to, recurrence_to, retry_to};
use crate::wire::problems::Code;
use crate::wire::proto::{TaskDetails, TaskState};

/// When something is due, by what a request says of it; 0 as an instant is none.
pub(super) fn due(
    service: &Service,
    session: &Session,
    delay_ms: Option<u64>,
    due_ms: InstantMs,
) -> Result<Option<Due>, Problem> {
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

pub(super) fn not_found(id: TaskId) -> Problem {
    Problem::new(Code::NotFound, format!("task {id} is not known: it was never registered, or is done, or cancelled"))
}

/// A task that somebody wants to change.
pub(super) struct Wanted {
    pub id: TaskId,
    pub group: GroupId,
    /// Whose it must be; `None` is anybody's.
    pub owner: Option<ClientId>,
}

impl Wanted {
    pub fn of(service: &Service, session: &Session, id: &str) -> Result<Self, Problem> {
        let (id, group) = group_of(service, id)?;
        let owner = (!session.admin).then(|| session.client.clone());
        Ok(Self { id, group, owner })
    }
}

/// A task as it is shown.
pub(super) fn details(
    service: &Service,
    group: GroupId,
    id: TaskId,
    task: TaskRow,
    at: CursorRow,
) -> Result<TaskDetails, Problem> {
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
    Ok(TaskDetails {
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
pub(super) fn due_or_zero(due_ms: InstantMs) -> InstantMs {
    if due_ms == NEVER { 0 } else { due_ms }
}

/// Whose things are listed; `None` is everybody's. A client sees its own only.
pub(super) fn whose(session: &Session, client: &str) -> Result<Option<ClientId>, Problem> {
    match (client, session.admin) {
        ("", true) => Ok(None),
        ("", false) => Ok(Some(session.client.clone())),
        (client, admin) if admin || client == session.client.as_str() => Ok(Some(client.parse()?)),
        _ => Err(Problem::unauthorized("only an administrator sees what belongs to others")),
    }
}
