//! A request that one leader answers: done here, or sent to where that leader is.

use std::sync::Arc;

use super::forward::{self, Forwarded};
use super::router::{Patience, Route};
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::server::api::operation::{Operation, Respond, done_here};
use crate::server::problem::Problem;
use crate::task::GroupId;
use crate::wire::routing::{Access, what_to_tell};

/// Whether a client that follows redirects is sent to the leader. What administrators ask is rare, and goes there by
/// itself.
fn is_redirected(session: &Session, group: GroupId) -> bool {
    session.redirects && group != GroupId::CLUSTER
}

/// Gets the answer from others, as soon as there is room for one more.
pub(in crate::server) async fn in_the_background<A: 'static>(
    service: &Arc<Service>,
    respond: Box<dyn FnOnce(A) + Send>,
    work: impl Future<Output = A> + Send + 'static,
) {
    let room = service.router.room().await;
    tokio::spawn(async move {
        respond(work.await);
        drop(room);
    });
}

/// Answers a request for a group; returns when the next one may be read.
pub(in crate::server) async fn ask<O: Operation>(
    service: &Arc<Service>,
    session: Arc<Session>,
    request: O,
    group: GroupId,
    access: Access,
    respond: Respond<O>,
) {
    if service.router.may_serve(group, access) {
        let respond = unless_led_elsewhere(service, &session, &request, group, access, respond);
        return request.here(service, session, respond).await;
    }
    // It may lead and not know enough yet.
    if is_redirected(&session, group) && service.router.route(group, None) != Route::Here {
        service.metrics.redirected.inc();
        return respond(Err(service.router.not_leader(group)));
    }
    let other = service.clone();
    let work = async move { seek(&other, &session, request, group, access).await };
    in_the_background(service, respond, work).await;
}

/// The leadership may be lost before the request comes to its turn; then nothing was done, and it goes another way.
fn unless_led_elsewhere<O: Operation>(
    service: &Arc<Service>,
    session: &Arc<Session>,
    request: &O,
    group: GroupId,
    access: Access,
    respond: Respond<O>,
) -> Respond<O> {
    let service = service.clone();
    if is_redirected(session, group) {
        return Box::new(move |answer| match answer {
            Err(problem) if problem.is_not_leader() => {
                service.metrics.redirected.inc();
                // With what is known by now.
                respond(Err(service.router.not_leader(group)));
            }
            answer => respond(answer),
        });
    }
    let (session, kept) = (session.clone(), request.clone());
    Box::new(move |answer| match answer {
        Err(problem) if problem.is_not_leader() => {
            service.router.look_again();
            tokio::spawn(async move {
                let _room = service.router.room().await;
                respond(seek(&service, &session, kept, group, access).await);
            });
        }
        answer => respond(answer),
    })
}

/// Brings a request to the leader of its group, wherever that is by then.
pub(in crate::server) async fn seek<O: Operation>(
    service: &Arc<Service>,
    session: &Arc<Session>,
    request: O,
    group: GroupId,
    access: Access,
) -> Result<O::Answer, Problem> {
    let mut patience = Patience::new();
    let mut past = None;
    let mut unknown = None;
    let tell = |answer, unknown: Option<Problem>| what_to_tell(answer, Result::is_ok, unknown.map(Err));
    loop {
        match service.router.route(group, past) {
            Route::Here if service.router.can_serve(group, access).await => {
                match done_here(service, session.clone(), request.clone()).await {
                    Err(problem) if problem.is_not_leader() => {}
                    answer => return tell(answer, unknown),
                }
            }
            Route::Here | Route::Nobody => past = None,
            Route::At(node_id) => match forward::send(service, node_id, session, request.clone()).await {
                Forwarded::Answer(answer) => return tell(answer, unknown),
                Forwarded::Elsewhere => past = None,
                Forwarded::NotSent => past = Some(node_id),
                Forwarded::Unknown(why) => {
                    let effect = request.effect();
                    if !effect.may_be_repeated() {
                        return Err(lost(node_id, &why));
                    }
                    unknown = effect.changes_something().then(|| lost(node_id, &why));
                    past = Some(node_id);
                }
            },
        }
        if !patience.wait(&service.router, group).await {
            return tell(Err(service.router.not_leader(group)), unknown);
        }
    }
}

/// A request went out, and no answer came.
pub(super) fn lost(node_id: u64, why: &str) -> Problem {
    Problem::maybe_done(format!("node {node_id} was asked and has not answered ({why}); it may have been done"))
}

#[cfg(test)]
mod tests {
    use crate::server::api::rig::{ELSEWHERE, Rig, Says, check, elsewhere, nobodys};
    use crate::server::problem::Problem;
    use crate::wire::answers::Answer;
    use crate::wire::problems::Code;
    use crate::wire::proto::boomerang_envelope::Payload;
    use crate::wire::proto::{
        CancellationRequest, CancellationResponse, GetTaskRequest, GetTaskResponse, RegistrationResponse,
    };

    fn refusing<A: Answer + Default>(code: Code) -> A {
        A::refusing(Problem::new(code, "the other node's words"))
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_known_again_is_asked_again_until_it_is_known() {
        let stored = || RegistrationResponse { task_id: "t".into(), ..Default::default() };
        let stored = || Says::answer(Payload::RegistrationResponse(stored()));
        let refused = || Says::answer(Payload::RegistrationResponse(refusing(Code::InvalidRequest)));
        for (name, says, asked, expected) in [
            ("stored", vec![stored()], 1, Ok(())),
            ("refused", vec![refused()], 1, Err(Code::InvalidRequest)),
            ("not the leader, then stored", vec![Says::Elsewhere, stored()], 2, Ok(())),
            ("lost, then stored", vec![Says::Nothing, stored()], 2, Ok(())),
            // That it is refused now does not say that it was not stored then.
            ("lost, then refused", vec![Says::Nothing, refused()], 2, Err(Code::MaybeDone)),
            ("lost, not the leader, refused", vec![Says::Nothing, Says::Elsewhere, refused()], 3, Err(Code::MaybeDone)),
        ] {
            let (rig, other) = Rig::start().await.with_leader_elsewhere(says);
            let answer = rig.ask(&rig.follows_nobody(), elsewhere()).await;
            assert_eq!(answer.map(|_| ()).map_err(|problem| problem.code), expected, "{name}");
            assert_eq!(other.asked().len(), asked, "{name}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_differs_when_it_is_done_twice_is_asked_once() {
        let (rig, other) = Rig::start().await.with_leader_elsewhere([Says::Nothing]);
        let request = CancellationRequest { task_id: nobodys(ELSEWHERE) };
        let refusal = rig.refusal(&rig.follows_nobody(), request).await;
        check("lost", &refusal, Code::MaybeDone, "node 2 was asked and has not answered (it died)");
        assert_eq!(other.asked().len(), 1);
        let done = Says::answer(Payload::CancellationResponse(CancellationResponse::default()));
        let (rig, other) = Rig::start().await.with_leader_elsewhere([Says::Elsewhere, done]);
        rig.ask(&rig.follows_nobody(), CancellationRequest { task_id: nobodys(ELSEWHERE) }).await.unwrap();
        assert_eq!(other.asked().len(), 2, "the first time it was certainly not done");
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_has_the_answer_it_gets_last() {
        let unknown = Says::answer(Payload::GetTaskResponse(refusing::<GetTaskResponse>(Code::NotFound)));
        let (rig, other) = Rig::start().await.with_leader_elsewhere([Says::Nothing, unknown]);
        let request = GetTaskRequest { task_id: nobodys(ELSEWHERE), history: false };
        check("gone", &rig.refusal(&rig.follows_nobody(), request).await, Code::NotFound, "the other node's words");
        assert_eq!(other.asked().len(), 2);
    }
}
