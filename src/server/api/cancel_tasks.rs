//! Cancels the tasks of a batch: those of one shard travel together.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::cancel_task::cancel;
use super::gathered::Gathered;
use super::operation::{Operation, Respond};
use super::tasks::group_of;
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::server::problem::Problem;
use crate::server::routing::batches::{Batch, ask_each, name_leaders};
use crate::server::routing::leader::in_the_background;
use crate::task::{GroupId, Invalid};
use crate::wire::answers::Answer;
use crate::wire::operations::Request;
use crate::wire::proto::{CancellationBatch, CancellationBatchResponse, CancellationRequest, CancellationResponse};
use crate::wire::routing::{CANCELLATIONS_MAX, Effect};

/// What one is answered with; its text is with another.
const ANSWER_BYTES: usize = 64;

impl Operation for CancellationBatch {
    async fn here(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        let count = self.task_ids.len();
        if count > CANCELLATIONS_MAX {
            let text = format!("task_ids: {count} in one batch, the limit is {CANCELLATIONS_MAX}");
            return respond(Err(Invalid::new(text).into()));
        }
        if count == 0 {
            return respond(Ok(CancellationBatchResponse::default()));
        }
        let gathered = Gathered::new(count, |answers| respond(Ok(answered(answers))));
        let mut admission = service.proposer.admission();
        for (at, id) in self.task_ids.iter().enumerate() {
            let gathered = gathered.clone();
            let answer = move |answer: Result<CancellationResponse, Problem>| {
                gathered.put(at, answer.unwrap_or_else(CancellationResponse::refusing));
            };
            cancel(service, &session, id, &mut admission, answer).await;
        }
        admission.send();
    }

    /// Who follows redirects gets the answers of this node, and is told where to go with the others.
    async fn among_nodes(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        let other = service.clone();
        if !session.redirects {
            let ids = self.task_ids.into_iter().enumerate().collect();
            let work = async move {
                let answers = ask_each::<CancellationBatch>(&other, &session, ids).await;
                Ok(answered(answers.into_values().collect()))
            };
            return in_the_background(service, respond, work).await;
        }
        let respond = Box::new(move |answer: Result<CancellationBatchResponse, Problem>| {
            respond(answer.map(|mut answer| {
                name_leaders(&other, &mut answer.responses);
                answered(answer.responses)
            }));
        });
        self.here(service, session, respond).await;
    }

    fn answer_bytes_max(&self, _: usize) -> usize {
        self.task_ids.len() * ANSWER_BYTES
    }
}

/// Each status is explained once, or thousands would not fit into a frame.
fn answered(mut responses: Vec<CancellationResponse>) -> CancellationBatchResponse {
    let mut explained = BTreeSet::new();
    for response in &mut responses {
        if !explained.insert(response.status) {
            response.error_message.clear();
        }
    }
    CancellationBatchResponse { responses, ..Default::default() }
}

impl Batch for CancellationBatch {
    type Item = String;
    type ItemAnswer = CancellationResponse;

    fn of(task_ids: Vec<String>) -> Self {
        Self { task_ids }
    }

    fn answers(answer: CancellationBatchResponse) -> Vec<CancellationResponse> {
        answer.responses
    }

    fn group(service: &Service, _: &Session, id: &String) -> Option<GroupId> {
        // What cannot be understood is refused here as anywhere.
        group_of(service, id).ok().map(|(_, group)| group)
    }

    fn item_effect(id: &String) -> Effect {
        CancellationRequest { task_id: id.clone() }.effect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::rig::{ELSEWHERE, HERE, Receivers, Rig, check, nobodys};
    use super::*;
    use crate::wire::problems::Code;
    use crate::wire::proto::Status;

    fn statuses(answer: &CancellationBatchResponse) -> Vec<Status> {
        answer.responses.iter().map(CancellationResponse::status).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn each_has_its_answer_and_each_status_one_text() {
        let rig = Rig::start().await;
        let empty = rig.ask(&rig.client(), CancellationBatch { task_ids: vec![] }).await.unwrap();
        assert_eq!(empty.responses, []);
        let out = rig.register_and_send(Receivers::Hang).await;
        let task_ids = vec![rig.register().await, nobodys(HERE), "seven".into(), out, nobodys(HERE)];
        let answer = rig.ask(&rig.client(), CancellationBatch { task_ids }).await.unwrap();
        let expected = [Status::Ok, Status::NotFound, Status::InvalidRequest, Status::TooLate, Status::NotFound];
        assert_eq!(statuses(&answer), expected);
        let texts: Vec<bool> = answer.responses.iter().map(|answer| answer.error_message.is_empty()).collect();
        assert_eq!(texts, [true, false, false, false, true], "{answer:?}");
        let many = CancellationBatch { task_ids: vec![nobodys(HERE); CANCELLATIONS_MAX + 1] };
        check("too many", &rig.refusal(&rig.client(), many).await, Code::InvalidRequest, "10001 in one batch");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_led_elsewhere_does_not_hold_up_the_rest() {
        let rig = Rig::start().await.with_another_node();
        for session in [rig.client(), rig.follows_nobody()] {
            let task_ids = vec![nobodys(ELSEWHERE), rig.register().await];
            let answer = rig.ask(&session, CancellationBatch { task_ids }).await.unwrap();
            assert_eq!(statuses(&answer), [Status::NotLeader, Status::Ok], "redirects: {}", session.redirects);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn full_and_hanging_disks_are_told_apart() {
        let rig = Rig::start().await;
        let task_ids = vec![rig.register().await];
        rig.let_disk_run_full();
        let answer = rig.ask(&rig.client(), CancellationBatch { task_ids: task_ids.clone() }).await.unwrap();
        assert_eq!(statuses(&answer), [Status::Overloaded]);
        let rig = Rig::start().await;
        let task_ids = vec![rig.register().await];
        rig.hang_disk();
        let answer = rig.ask(&rig.client(), CancellationBatch { task_ids }).await.unwrap();
        assert!(answer.responses[0].detail.as_ref().unwrap().maybe_done, "{answer:?}");
    }
}
