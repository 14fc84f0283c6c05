//! Shows a dead letter.

use std::sync::Arc;

use super::dead_letters::{group_of, not_found, shown};
use super::operation::{Operation, Respond};
use crate::blocking;
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::server::problem::Problem;
use crate::store::keys::Key;
use crate::store::overlay::get_row;
use crate::store::rows::DeadLetterRow;
use crate::wire::proto::{GetDeadLetterRequest, GetDeadLetterResponse};

impl Operation for GetDeadLetterRequest {
    async fn here(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        // It may have to be read from disk.
        respond(blocking::in_place(|| get(service, &session, &self)));
    }

    fn answer_bytes_max(&self, frame_bytes_max: usize) -> usize {
        frame_bytes_max
    }
}

fn get(service: &Service, session: &Session, request: &GetDeadLetterRequest) -> Result<GetDeadLetterResponse, Problem> {
    let (id, group) = group_of(service, &request.dead_letter_id)?;
    let row: Option<DeadLetterRow> = get_row(&service.store, "a dead letter", &Key::dead_letter(group, id))?;
    // Another client's is not found rather than forbidden.
    let row = row.filter(|row| session.admin || row.client == session.client).ok_or_else(|| not_found(id))?;
    Ok(GetDeadLetterResponse { dead_letter: Some(shown(id, row)), ..Default::default() })
}

#[cfg(test)]
mod tests {
    use super::super::rig::{ELSEWHERE, HERE, Rig, check, nobodys};
    use super::*;
    use crate::wire::problems::Code;

    fn get(id: impl Into<String>) -> GetDeadLetterRequest {
        GetDeadLetterRequest { dead_letter_id: id.into() }
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_shown_to_its_owner_and_administrators() {
        let rig = Rig::start().await;
        let id = rig.bury().await;
        for session in [rig.client(), rig.admin()] {
            let letter = rig.ask(&session, get(&id)).await.unwrap().dead_letter.unwrap();
            assert_eq!((letter.client_id.as_str(), letter.attempts), ("orders", 1));
        }
        let nobodys_letter = |shard| format!("{}@7", nobodys(shard));
        check("a stranger", &rig.refusal(&rig.stranger(), get(&id)).await, Code::NotFound, "is not known");
        check("nobody's", &rig.refusal(&rig.admin(), get(nobodys_letter(HERE))).await, Code::NotFound, "is not known");
        check("no id", &rig.refusal(&rig.admin(), get("seven")).await, Code::InvalidRequest, "dead_letter_id");
        let rig = rig.with_another_node();
        let elsewhere = rig.refusal(&rig.client(), get(nobodys_letter(ELSEWHERE))).await;
        check("elsewhere", &elsewhere, Code::NotLeader, "shard 1");
    }
}
