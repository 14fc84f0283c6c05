//! Cancels a task.

use std::sync::Arc;

use super::operation::{Operation, Respond};
use super::tasks::{Wanted, not_found};
use crate::propose::{Admission, Ask, Refused};
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::server::problem::Problem;
use crate::shard::Reply;
use crate::wire::proto::{CancellationRequest, CancellationResponse};

impl Operation for CancellationRequest {
    async fn here(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        let mut admission = service.proposer.admission();
        cancel(service, &session, &self.task_id, &mut admission, respond).await;
        admission.send();
    }
}

/// `respond` is called once.
pub(super) async fn cancel(
    service: &Arc<Service>,
    session: &Session,
    id: &str,
    admission: &mut Admission<'_>,
    respond: impl FnOnce(Result<CancellationResponse, Problem>) + Send + 'static,
) {
    let Wanted { id, group, owner } = match Wanted::of(service, session, id) {
        Ok(wanted) => wanted,
        Err(problem) => return respond(Err(problem)),
    };
    let metrics = service.metrics.clone();
    let reply = move |result: Result<Reply, Refused>| {
        respond(match result {
            Ok(Reply::Cancelled) => {
                metrics.cancellations.inc();
                Ok(CancellationResponse::default())
            }
            Ok(Reply::NotFound) => Err(not_found(id)),
            Ok(Reply::TooLate { occurrence, attempt }) => {
                Err(Problem::too_late(occurrence, attempt, "nothing follows it"))
            }
            Ok(other) => unreachable!("a cancellation is never answered with {other:?}"),
            Err(refused) => Err(refused.into()),
        });
    };
    admission.put(group, Ask::Cancel { id, owner }, Box::new(reply)).await;
}

#[cfg(test)]
mod tests {
    use super::super::rig::{DISK, ELSEWHERE, HERE, Receivers, Rig, check, nobodys};
    use super::*;
    use crate::wire::problems::Code;

    fn cancel(task_id: impl Into<String>) -> CancellationRequest {
        CancellationRequest { task_id: task_id.into() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_is_cancelled_by_its_owner_or_an_administrator_once() {
        let rig = Rig::start().await;
        for owner in [rig.client(), rig.admin()] {
            let id = rig.register().await;
            check("a stranger", &rig.refusal(&rig.stranger(), cancel(&id)).await, Code::NotFound, "is not known");
            rig.ask(&owner, cancel(&id)).await.unwrap();
            check("twice", &rig.refusal(&owner, cancel(&id)).await, Code::NotFound, &id);
        }
        check("nobody's", &rig.refusal(&rig.admin(), cancel(nobodys(HERE))).await, Code::NotFound, "is not known");
        check("no id", &rig.refusal(&rig.admin(), cancel("seven")).await, Code::InvalidRequest, "task_id");
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_too_late_while_an_attempt_is_out() {
        let rig = Rig::start().await;
        let id = rig.register_and_send(Receivers::Hang).await;
        let refusal = rig.refusal(&rig.client(), cancel(&id)).await;
        check("out", &refusal, Code::TooLate, "attempt 1 of occurrence 0 may be out; nothing follows it");
        assert_eq!(refusal.detail.unwrap().attempt, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_done_on_a_low_disk_refused_on_a_full_one_and_nobody_knows_on_one_that_hangs() {
        let rig = Rig::start().await;
        let (id, other) = (rig.register().await, rig.register().await);
        rig.let_disk_run_low();
        rig.ask(&rig.client(), cancel(&id)).await.unwrap();
        rig.let_disk_run_full();
        check("full", &rig.refusal(&rig.client(), cancel(&other)).await, Code::Overloaded, DISK);
        let rig = Rig::start().await;
        let id = rig.register().await;
        rig.hang_disk();
        check("hangs", &rig.refusal(&rig.client(), cancel(&id)).await, Code::MaybeDone, "may have been");
    }

    #[tokio::test(start_paused = true)]
    async fn who_leads_it_is_named() {
        let rig = Rig::start().await.with_another_node();
        check(
            "led elsewhere",
            &rig.refusal(&rig.client(), cancel(nobodys(ELSEWHERE))).await,
            Code::NotLeader,
            "shard 1",
        );
    }
}
