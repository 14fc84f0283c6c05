//! Shows a task, and what became of its occurrences.

use std::sync::Arc;

use super::operation::{Operation, Respond};
use super::tasks::{details, group_of, not_found};
use crate::blocking;
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::server::problem::Problem;
use crate::shard;
use crate::store::keys::{HISTORY_BUCKET_MS, Key, Parsed, parse_state};
use crate::store::rows::{Ended, HistoryRow};
use crate::store::{StoreError, codec};
use crate::task::{GroupId, InstantMs, TaskId};
use crate::wire::convert::failure_to;
use crate::wire::proto::{GetTaskRequest, GetTaskResponse, Occurrence, occurrence::Outcome};

/// Occurrences shown of one task.
const HISTORY_MAX: usize = 100;

impl Operation for GetTaskRequest {
    async fn here(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        // It may have to be read from disk.
        respond(blocking::in_place(|| get(service, &session, &self)));
    }

    fn answer_bytes_max(&self, frame_bytes_max: usize) -> usize {
        frame_bytes_max
    }
}

fn get(service: &Service, session: &Session, request: &GetTaskRequest) -> Result<GetTaskResponse, Problem> {
    let (id, group) = group_of(service, &request.task_id)?;
    let found = shard::read_task(&service.store, group, id)?;
    let found = found.filter(|(task, _)| session.admin || task.client == session.client);
    let task = found.map(|(task, at)| details(service, group, id, task, at)).transpose()?;
    let history = if request.history { history(service, session, group, id)? } else { Vec::new() };
    if task.is_none() && history.is_empty() {
        return Err(not_found(id));
    }
    Ok(GetTaskResponse { task, history, ..Default::default() })
}

/// What became of a task's occurrences, the latest first: from the hour it was made in, or as far back as is kept.
fn history(service: &Service, session: &Session, group: GroupId, id: TaskId) -> Result<Vec<Occurrence>, StoreError> {
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

fn occurrence_shown(occurrence: u64, ended_ms: InstantMs, row: HistoryRow) -> Occurrence {
    let HistoryRow { client: _, ended, count, due_ms, dispatched_ms, attempts, failure } = row;
    let outcome = match ended {
        Ended::Acknowledged => Outcome::Acknowledged,
        Ended::Dead => Outcome::Dead,
        Ended::Cancelled => Outcome::Cancelled,
        Ended::Skipped => Outcome::Skipped,
        Ended::Merged => Outcome::Merged,
    };
    Occurrence {
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

#[cfg(test)]
mod tests {
    use super::super::rig::{ELSEWHERE, HERE, Receivers, Rig, check, in_an_hour, nobodys};
    use super::*;
    use crate::wire::problems::Code;
    use crate::wire::proto::TaskState;

    fn get(task_id: impl Into<String>) -> GetTaskRequest {
        GetTaskRequest { task_id: task_id.into(), history: true }
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_is_shown_to_its_owner_and_administrators() {
        let rig = Rig::start().await;
        let id = rig.register().await;
        for session in [rig.client(), rig.admin()] {
            let task = rig.ask(&session, get(&id)).await.unwrap().task.unwrap();
            assert_eq!((task.payload, task.version), (in_an_hour().payload, 1));
            assert_eq!((task.client_id.as_str(), task.state), ("orders", TaskState::Scheduled.into()));
        }
        // Rather than forbidden: whether there is one is nobody else's business.
        check("a stranger", &rig.refusal(&rig.stranger(), get(&id)).await, Code::NotFound, "is not known");
        check("nobody's", &rig.refusal(&rig.admin(), get(nobodys(HERE))).await, Code::NotFound, "is not known");
        check("no id", &rig.refusal(&rig.admin(), get("seven")).await, Code::InvalidRequest, "task_id");
        let far = nobodys(crate::task::ShardId(9));
        check("no shard", &rig.refusal(&rig.admin(), get(far)).await, Code::NotFound, "is not known");
    }

    #[tokio::test(start_paused = true)]
    async fn what_became_of_it_is_shown_when_it_is_done() {
        let rig = Rig::start().await;
        let out = rig.register_and_send(Receivers::Hang).await;
        let task = rig.ask(&rig.client(), get(&out)).await.unwrap().task.unwrap();
        assert_eq!(task.state(), TaskState::Out);
        let letter = rig.bury().await;
        let id = letter.split_once('@').unwrap().0;
        let found = rig.ask(&rig.client(), get(id)).await.unwrap();
        let outcomes: Vec<i32> = found.history.iter().map(|occurrence| occurrence.outcome).collect();
        assert_eq!((found.task, outcomes), (None, vec![Outcome::Dead.into()]));
        check("a stranger", &rig.refusal(&rig.stranger(), get(id)).await, Code::NotFound, "is not known");
    }

    #[tokio::test(start_paused = true)]
    async fn only_who_leads_it_answers() {
        let rig = Rig::start().await.with_another_node();
        let id = rig.register().await;
        rig.ask(&rig.client(), get(&id)).await.unwrap();
        check("elsewhere", &rig.refusal(&rig.client(), get(nobodys(ELSEWHERE))).await, Code::NotLeader, "shard 1");
    }
}
