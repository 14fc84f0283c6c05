//! Changes a task: when it is due, its payload, parts of its policy.

use std::sync::Arc;

use super::operation::{Operation, Respond};
use super::tasks::{Wanted, due, due_or_zero, not_found};
use crate::propose::{Ask, Refused};
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::server::problem::Problem;
use crate::shard::{Change, Reply};
use crate::task::Invalid;
use crate::wire::convert::{callback_from, dead_letter_from, retry_from};
use crate::wire::proto::{UpdateTaskRequest, UpdateTaskResponse};

impl Operation for UpdateTaskRequest {
    async fn here(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        let (Wanted { id, group, .. }, ask) = match edit(service, &session, self) {
            Ok(asked) => asked,
            Err(problem) => return respond(Err(problem)),
        };
        let reply = move |result: Result<Reply, Refused>| {
            respond(match result {
                Ok(Reply::Edited { version, due_ms }) => {
                    let scheduled_time_ms = due_or_zero(due_ms);
                    Ok(UpdateTaskResponse { version, scheduled_time_ms, ..Default::default() })
                }
                Ok(Reply::NotFound) => Err(not_found(id)),
                Ok(Reply::TooLate { occurrence, attempt }) => {
                    Err(Problem::too_late(occurrence, attempt, "nothing was changed; try again when it is settled"))
                }
                Ok(Reply::Unfit(why)) => Err(why.into()),
                Ok(Reply::Conflict { version }) => Err(Problem::conflict(version)),
                Ok(other) => unreachable!("an edit is never answered with {other:?}"),
                Err(refused) => Err(refused.into()),
            });
        };
        service.proposer.submit(group, ask, Box::new(reply)).await;
    }
}

fn edit(service: &Service, session: &Session, request: UpdateTaskRequest) -> Result<(Wanted, Ask), Problem> {
    let wanted = Wanted::of(service, session, &request.task_id)?;
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
    let ask = Ask::Edit { id: wanted.id, owner: wanted.owner.clone(), version, due, change };
    Ok((wanted, ask))
}

#[cfg(test)]
mod tests {
    use super::super::rig::{DISK, ELSEWHERE, HERE, HOUR_MS, Receivers, Rig, check, nobodys};
    use super::*;
    use crate::wire::problems::Code;
    use crate::wire::proto::{CallbackConfig, RetryPolicy};

    fn postpone(task_id: impl Into<String>) -> UpdateTaskRequest {
        UpdateTaskRequest { task_id: task_id.into(), delay_ms: Some(2 * HOUR_MS), ..Default::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_is_changed_by_its_owner_and_its_version_grows() {
        let rig = Rig::start().await;
        let id = rig.register().await;
        let first = rig.ask(&rig.client(), postpone(&id)).await.unwrap();
        assert_eq!(first.version, 2);
        assert!(first.scheduled_time_ms.abs_diff(rig.service.clock.now_ms() + 2 * HOUR_MS) < 1_000, "{first:?}");
        let second = rig.ask(&rig.admin(), UpdateTaskRequest { expected_version: 2, ..postpone(&id) }).await.unwrap();
        assert_eq!(second.version, 3);
        check("a stranger", &rig.refusal(&rig.stranger(), postpone(&id)).await, Code::NotFound, "is not known");
        check("nobody's", &rig.refusal(&rig.client(), postpone(nobodys(HERE))).await, Code::NotFound, "is not known");
    }

    #[tokio::test(start_paused = true)]
    async fn who_read_an_older_version_is_told_the_one_it_has() {
        let rig = Rig::start().await;
        let id = rig.register().await;
        rig.ask(&rig.client(), postpone(&id)).await.unwrap();
        let refusal = rig.refusal(&rig.client(), UpdateTaskRequest { expected_version: 1, ..postpone(&id) }).await;
        check("an older version", &refusal, Code::Conflict, "has version 2; nothing was changed");
        assert_eq!(refusal.detail.unwrap().version, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_too_late_while_an_attempt_is_out() {
        let rig = Rig::start().await;
        let id = rig.register_and_send(Receivers::Hang).await;
        check("out", &rig.refusal(&rig.client(), postpone(&id)).await, Code::TooLate, "nothing was changed; try again");
    }

    #[tokio::test(start_paused = true)]
    async fn what_makes_no_sense_is_refused_by_name() {
        let rig = Rig::start().await;
        let id = rig.register().await;
        let of = |change: UpdateTaskRequest| UpdateTaskRequest { task_id: id.clone(), ..change };
        let udp = CallbackConfig { protocol: 3, endpoint: "127.0.0.1:9".into(), ..Default::default() };
        for (name, request, text) in [
            ("no id", postpone("seven"), "task_id"),
            ("no change", of(UpdateTaskRequest::default()), "nothing to change"),
            ("two instants", of(UpdateTaskRequest { due_ms: Some(5), ..postpone("") }), "due_ms: cannot be given"),
            (
                "a payload too large",
                of(UpdateTaskRequest { payload: Some(vec![0; 600 * 1024].into()), ..Default::default() }),
                "payload",
            ),
            (
                "no retry",
                of(UpdateTaskRequest {
                    retry: Some(RetryPolicy { max_attempts: 1_000_000, ..Default::default() }),
                    ..Default::default()
                }),
                "max_attempts",
            ),
            // Known only where it is applied: the payload is another request's.
            (
                "a payload that no datagram holds",
                of(UpdateTaskRequest {
                    callback: Some(udp),
                    payload: Some(vec![0; 70_000].into()),
                    ..Default::default()
                }),
                "payload",
            ),
        ] {
            check(name, &rig.refusal(&rig.client(), request).await, Code::InvalidRequest, text);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_room_it_is_refused_and_without_a_disk_nobody_knows() {
        let rig = Rig::start().await;
        let id = rig.register().await;
        rig.let_disk_run_low();
        check("low", &rig.refusal(&rig.client(), postpone(&id)).await, Code::Overloaded, DISK);
        let rig = Rig::start().await.with_another_node();
        let id = rig.register().await;
        rig.hang_disk();
        check("hangs", &rig.refusal(&rig.client(), postpone(&id)).await, Code::MaybeDone, "may have been");
        check("elsewhere", &rig.refusal(&rig.client(), postpone(nobodys(ELSEWHERE))).await, Code::NotLeader, "shard 1");
    }
}
