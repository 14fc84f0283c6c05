//! Pauses a task, or has it go on.

use std::sync::Arc;

use super::operation::{Operation, Respond};
use super::tasks::{Wanted, not_found};
use crate::propose::{Ask, Refused};
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::shard::Reply;
use crate::wire::proto::{Detail, PauseTaskRequest, PauseTaskResponse};

impl Operation for PauseTaskRequest {
    async fn here(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        let Wanted { id, group, owner } = match Wanted::of(service, &session, &self.task_id) {
            Ok(wanted) => wanted,
            Err(problem) => return respond(Err(problem)),
        };
        let reply = move |result: Result<Reply, Refused>| {
            respond(match result {
                Ok(Reply::Paused { out }) => {
                    let detail = |(occurrence, attempt)| Detail { occurrence, attempt, ..Default::default() };
                    Ok(PauseTaskResponse { detail: out.map(detail), ..Default::default() })
                }
                Ok(Reply::Resumed { due_ms }) => {
                    Ok(PauseTaskResponse { scheduled_time_ms: due_ms, ..Default::default() })
                }
                Ok(Reply::NotFound) => Err(not_found(id)),
                Ok(other) => unreachable!("a pause is never answered with {other:?}"),
                Err(refused) => Err(refused.into()),
            });
        };
        service.proposer.submit(group, Ask::Pause { id, owner, paused: self.paused }, Box::new(reply)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::super::rig::{DISK, ELSEWHERE, HERE, Receivers, Rig, check, nobodys};
    use super::*;
    use crate::wire::problems::Code;

    fn pause(task_id: impl Into<String>) -> PauseTaskRequest {
        PauseTaskRequest { task_id: task_id.into(), paused: true }
    }

    fn resume(task_id: impl Into<String>) -> PauseTaskRequest {
        PauseTaskRequest { paused: false, ..pause(task_id) }
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_rests_until_it_is_resumed() {
        let rig = Rig::start().await;
        let id = rig.register().await;
        check("a stranger", &rig.refusal(&rig.stranger(), pause(&id)).await, Code::NotFound, "is not known");
        let paused = rig.ask(&rig.client(), pause(&id)).await.unwrap();
        assert_eq!((paused.scheduled_time_ms, paused.detail), (0, None));
        let resumed = rig.ask(&rig.admin(), resume(&id)).await.unwrap();
        assert!(resumed.scheduled_time_ms > rig.service.clock.now_ms(), "{resumed:?}");
        check("nobody's", &rig.refusal(&rig.client(), pause(nobodys(HERE))).await, Code::NotFound, "is not known");
        check("no id", &rig.refusal(&rig.client(), pause("seven")).await, Code::InvalidRequest, "task_id");
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempt_that_is_out_is_told_of() {
        let rig = Rig::start().await;
        let id = rig.register_and_send(Receivers::Hang).await;
        let paused = rig.ask(&rig.client(), pause(&id)).await.unwrap();
        let out = paused.detail.map(|detail| (detail.occurrence, detail.attempt));
        assert_eq!(out, Some((0, 1)), "it may arrive all the same");
    }

    #[tokio::test(start_paused = true)]
    async fn full_and_hanging_disks_are_told_apart() {
        let rig = Rig::start().await;
        let id = rig.register().await;
        rig.let_disk_run_full();
        check("full", &rig.refusal(&rig.client(), pause(&id)).await, Code::Overloaded, DISK);
        let rig = Rig::start().await.with_another_node();
        let id = rig.register().await;
        rig.hang_disk();
        check("hangs", &rig.refusal(&rig.client(), pause(&id)).await, Code::MaybeDone, "may have been");
        check("elsewhere", &rig.refusal(&rig.client(), pause(nobodys(ELSEWHERE))).await, Code::NotLeader, "shard 1");
    }
}
