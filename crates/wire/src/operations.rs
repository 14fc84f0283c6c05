//! What a client can ask for: one table, and what follows from it for any request.
//!
//! A line names the request, its message and its answer; what it does; and whose answer it needs. The server has its
//! dispatcher from the same lines, see [`for_each_operation!`](crate::for_each_operation).

use crate::answers::{Answer, Refusal, Verdict};
use crate::proto::{self, boomerang_envelope::Payload};
use crate::routing::{Access, Asker, Effect, Target, is_known_again};

/// A message that asks for something.
///
/// ```
/// use boomerang_wire::operations::Request;
/// use boomerang_wire::proto::{GetTaskRequest, boomerang_envelope::Payload};
/// use boomerang_wire::routing::{Effect, Target, Asker};
///
/// let request = GetTaskRequest { task_id: "no id".into(), ..Default::default() };
/// assert_eq!(request.effect(), Effect::Nothing);
/// // What cannot be understood is refused by any node.
/// assert_eq!(request.target(&Asker { client: None, shards: 16 }), Target::Any);
/// assert!(matches!(request.into(), Payload::GetTaskRequest(_)));
/// ```
pub trait Request: Into<Payload> + Clone + Send + Sync + 'static {
    /// The message that answers it.
    type Answer: Answer + Default + Send + 'static;

    /// What it does.
    fn effect(&self) -> Effect;

    /// Whose answer it needs.
    fn target(&self, asker: &Asker<'_>) -> Target;

    /// Its answer, if that is what `payload` is.
    fn answer_in(payload: Payload) -> Option<Self::Answer>;
}

/// Calls the macro `$apply` with the table of operations. Each line of it:
///
/// ```text
/// Request: Message => Answer (without_detail), |message| effect, |message, asker| target;
/// ```
///
/// `Request` and `Answer` are their names in the envelope. `without_detail` marks an answer that has no place for one.
#[macro_export]
macro_rules! for_each_operation {
    ($apply:ident) => {
        $apply! {
            RegistrationRequest: Task => RegistrationResponse, registers, |task, asker| asker.new_task(task);
            RegistrationBatch: RegistrationBatch => RegistrationBatchResponse, registers_all, |batch, _| Target::of_batch(batch);
            CancellationRequest: CancellationRequest => CancellationResponse, changes, |ask, asker| asker.task(&ask.task_id, Access::Write);
            CancellationBatch: CancellationBatch => CancellationBatchResponse, changes, |batch, _| Target::of_cancellations(batch);
            UpdateTaskRequest: UpdateTaskRequest => UpdateTaskResponse, changes, |ask, asker| asker.task(&ask.task_id, Access::Write);
            PauseTaskRequest: PauseTaskRequest => PauseTaskResponse, changes, |ask, asker| asker.task(&ask.task_id, Access::Write);
            GetTaskRequest: GetTaskRequest => GetTaskResponse, reads, |ask, asker| asker.task(&ask.task_id, Access::Read);
            ListTasksRequest: ListTasksRequest => ListTasksResponse, reads, |_, _| Target::Page;
            ListDeadLettersRequest: ListDeadLettersRequest => ListDeadLettersResponse, reads, |_, _| Target::Page;
            GetDeadLetterRequest: GetDeadLetterRequest => GetDeadLetterResponse, reads, |ask, asker| asker.dead_letter(&ask.dead_letter_id, Access::Read);
            ReplayDeadLettersRequest: ReplayDeadLettersRequest => ReplayDeadLettersResponse, changes, |ask, asker| asker.dead_letters(&ask.dead_letter_ids);
            PurgeDeadLettersRequest: PurgeDeadLettersRequest => PurgeDeadLettersResponse, changes, |ask, asker| asker.dead_letters(&ask.dead_letter_ids);
            ClientRegistration: ClientRegistrationRequest => ClientRegistrationResponse, settles, |_, _| Target::CLUSTER;
            ClientDeregistration: ClientDeregistrationRequest => ClientDeregistrationResponse, changes, |_, _| Target::CLUSTER;
            ApiKeyRequest: ApiKeyRequest => ApiKeyResponse, changes, |_, _| Target::CLUSTER;
            ApiKeyRevocation: ApiKeyRevocation => ApiKeyRevocationResponse, changes, |_, _| Target::CLUSTER;
            ShardMapRequest: ShardMapRequest => ShardMapResponse (without_detail), reads, |_, _| Target::Any;
            ClusterRequest: ClusterRequest => ClusterResponse, changes, |_, _| Target::Any;
        }
    };
}

/// A question.
fn reads<M>(_: &M) -> Effect {
    Effect::Nothing
}

/// Done twice, it is not what it is done once.
fn changes<M>(_: &M) -> Effect {
    Effect::Change
}

/// Done twice, it is what it is done once.
fn settles<M>(_: &M) -> Effect {
    Effect::SameAgain
}

fn registers(task: &proto::Task) -> Effect {
    if is_known_again(task) { Effect::SameAgain } else { Effect::Change }
}

fn registers_all(batch: &proto::RegistrationBatch) -> Effect {
    let known = batch.origin.is_some() || batch.tasks.iter().all(is_known_again);
    if known { Effect::SameAgain } else { Effect::Change }
}

/// What all answers have, of one of them: some have no place for a detail.
macro_rules! answer {
    ($answer:ident $(($without_detail:ident))?) => {
        impl Answer for proto::$answer {
            fn verdict(&self) -> Verdict<'_> {
                Verdict {
                    status: self.status,
                    text: &self.error_message,
                    detail: answer!(@detail self $($without_detail)?),
                }
            }

            fn status_mut(&mut self) -> &mut i32 {
                &mut self.status
            }

            fn refuse(&mut self, refusal: Refusal) {
                self.status = refusal.status.into();
                self.error_message = refusal.text;
                answer!(@refuse self (refusal.detail) $($without_detail)?);
            }
        }
    };
    (@detail $answer:ident) => { $answer.detail.as_ref() };
    (@detail $answer:ident without_detail) => { None };
    (@refuse $answer:ident ($detail:expr)) => { $answer.detail = $detail };
    (@refuse $answer:ident ($detail:expr) without_detail) => { drop($detail) };
}

/// What follows from the table.
macro_rules! implement {
    ($($request:ident: $message:ident => $answer:ident $(($mark:ident))?, $effect:expr, $target:expr;)*) => {
        $(
            answer!($answer $(($mark))?);

            impl From<proto::$message> for Payload {
                fn from(request: proto::$message) -> Self {
                    Payload::$request(request)
                }
            }

            impl Request for proto::$message {
                type Answer = proto::$answer;

                fn effect(&self) -> Effect {
                    let effect: fn(&Self) -> Effect = $effect;
                    effect(self)
                }

                fn target(&self, asker: &Asker<'_>) -> Target {
                    let target: fn(&Self, &Asker<'_>) -> Target = $target;
                    target(self, asker)
                }

                fn answer_in(payload: Payload) -> Option<Self::Answer> {
                    match payload {
                        Payload::$answer(answer) => Some(answer),
                        _ => None,
                    }
                }
            }
        )*

        /// The answer to `request` that refuses it; to what is no request, one that says so in general.
        pub fn refused(request: &Payload, refusal: impl Into<Refusal>) -> Payload {
            match request {
                $(Payload::$request(_) => Payload::$answer(proto::$answer::refusing(refusal)),)*
                Payload::AuthHandshake(_) => Payload::AuthResponse(proto::AuthResponse::refusing(refusal)),
                Payload::SessionRefresh(_) => {
                    Payload::SessionRefreshResponse(proto::SessionRefreshResponse::refusing(refusal))
                }
                _ => Payload::ErrorResponse(proto::ErrorResponse::refusing(refusal)),
            }
        }

        /// The answer in `payload`; `None` when it is a request.
        pub fn answer(payload: &Payload) -> Option<&dyn Answer> {
            match payload {
                $(Payload::$answer(answer) => Some(answer),)*
                Payload::AuthResponse(answer) => Some(answer),
                Payload::SessionRefreshResponse(answer) => Some(answer),
                Payload::ErrorResponse(answer) => Some(answer),
                _ => None,
            }
        }

        /// The same, to be changed.
        pub fn answer_mut(payload: &mut Payload) -> Option<&mut dyn Answer> {
            match payload {
                $(Payload::$answer(answer) => Some(answer),)*
                Payload::AuthResponse(answer) => Some(answer),
                Payload::SessionRefreshResponse(answer) => Some(answer),
                Payload::ErrorResponse(answer) => Some(answer),
                _ => None,
            }
        }

        /// Whose answer `request` needs. What is no operation is for the node that gets it.
        pub fn target(request: &Payload, asker: &Asker<'_>) -> Target {
            match request {
                $(Payload::$request(request) => request.target(asker),)*
                _ => Target::Any,
            }
        }

        /// What `request` does. What is no operation concerns the session it comes in, and is not to be repeated in another.
        pub fn effect(request: &Payload) -> Effect {
            match request {
                $(Payload::$request(request) => request.effect(),)*
                _ => Effect::Change,
            }
        }
    };
}

for_each_operation!(implement);
answer!(AuthResponse);
answer!(SessionRefreshResponse(without_detail));
answer!(ErrorResponse(without_detail));

impl<'a> Verdict<'a> {
    /// `None` when `payload` is a request.
    pub fn of(payload: &'a Payload) -> Option<Self> {
        answer(payload).map(Answer::verdict)
    }
}

/// Whether nothing of the request was done because the node does not lead.
pub fn is_not_leader(answer: &Payload) -> bool {
    Verdict::of(answer).is_some_and(|verdict| verdict.is_not_leader())
}

#[cfg(test)]
mod tests {
    use boomerang_task::{ClientId, DedupHash, GroupId, ShardId, TaskId};

    use super::*;
    use crate::proto::{Detail, Status};
    use crate::routing::{Asker, BATCH_TASKS_MAX};

    #[test]
    fn a_refusal_is_told_by_the_answer_to_its_request() {
        let refusal = Refusal {
            status: Status::Conflict,
            text: "no".into(),
            detail: Some(Detail { version: 7, ..Default::default() }),
        };
        let answered = refused(&Payload::UpdateTaskRequest(proto::UpdateTaskRequest::default()), refusal.clone());
        let Payload::UpdateTaskResponse(answer) = &answered else { panic!("an edit was answered with {answered:?}") };
        assert_eq!((answer.status, answer.detail.as_ref()), (Status::Conflict.into(), refusal.detail.as_ref()));
        // No place for a detail.
        let map = refused(&Payload::ShardMapRequest(proto::ShardMapRequest {}), refusal.clone());
        assert_eq!(Verdict::of(&map), Some(Verdict { status: Status::Conflict.into(), text: "no", detail: None }));
        // Only requests are answered by name.
        let general = refused(&answered, refusal);
        assert!(matches!(general, Payload::ErrorResponse(_)), "{general:?}");
    }

    const SHARDS: u16 = 16;

    fn client() -> ClientId {
        "orders".parse().unwrap()
    }

    fn task_in(shard: u16) -> TaskId {
        TaskId::new(1_800_000_000_000, ShardId(shard), 7)
    }

    fn letter_in(shard: u16) -> String {
        format!("{}@7", task_in(shard))
    }

    fn keyed(key: &str) -> proto::Task {
        proto::Task { dedup_key: key.into(), ..Default::default() }
    }

    fn from_sender(shard: u32) -> proto::Task {
        proto::Task { origin: Some(proto::Origin { shard, ..Default::default() }), ..Default::default() }
    }

    fn batch(tasks: Vec<proto::Task>) -> Payload {
        Payload::RegistrationBatch(proto::RegistrationBatch { tasks, origin: None })
    }

    fn cancel(task_id: String) -> Payload {
        Payload::CancellationRequest(proto::CancellationRequest { task_id })
    }

    fn purge(dead_letter_ids: Vec<String>) -> Payload {
        Payload::PurgeDeadLettersRequest(proto::PurgeDeadLettersRequest { dead_letter_ids, ..Default::default() })
    }

    #[test]
    fn whose_answer_each_request_needs() {
        let shard = |shard, access| Target::Leader(GroupId::of_shard(ShardId(shard)), access);
        let of_key = DedupHash::new(&client(), "k").unwrap().shard(SHARDS).0;
        let get = |task_id| Payload::GetTaskRequest(proto::GetTaskRequest { task_id, ..Default::default() });
        for (name, request, expected) in [
            ("a plain task", Payload::RegistrationRequest(proto::Task::default()), Target::AnyLeader),
            ("with a key", Payload::RegistrationRequest(keyed("k")), shard(of_key, Access::Write)),
            ("a key too long", Payload::RegistrationRequest(keyed(&"k".repeat(10_000))), Target::Any),
            ("of a sender", Payload::RegistrationRequest(from_sender(3)), shard(3, Access::Write)),
            ("of a sender, to no shard", Payload::RegistrationRequest(from_sender(16)), Target::Any),
            ("an empty batch", batch(vec![]), Target::Any),
            ("a batch", batch(vec![proto::Task::default(); BATCH_TASKS_MAX]), Target::Batch),
            ("a batch too large", batch(vec![proto::Task::default(); BATCH_TASKS_MAX + 1]), Target::Any),
            ("a cancellation", cancel(task_in(5).to_string()), shard(5, Access::Write)),
            ("of a shard that is not there", cancel(task_in(16).to_string()), Target::Any),
            ("of nothing", cancel("seven".into()), Target::Any),
            ("a look", get(task_in(5).to_string()), shard(5, Access::Read)),
            ("one dead letter", purge(vec![letter_in(4)]), shard(4, Access::Write)),
            ("two of them", purge(vec![letter_in(4), letter_in(5)]), Target::DeadLetters),
            ("those of a filter", purge(vec![]), Target::DeadLetters),
            ("a list", Payload::ListTasksRequest(proto::ListTasksRequest::default()), Target::Page),
            ("a map", Payload::ShardMapRequest(proto::ShardMapRequest {}), Target::Any),
            (
                "a client",
                Payload::ClientRegistration(proto::ClientRegistrationRequest::default()),
                Target::Leader(GroupId::CLUSTER, Access::Write),
            ),
        ] {
            assert_eq!(target(&request, &Asker { client: Some(&client()), shards: SHARDS }), expected, "{name}");
        }
        let unknown = target(&Payload::RegistrationRequest(keyed("k")), &Asker { client: None, shards: SHARDS });
        assert_eq!(unknown, Target::AnyLeader, "whoever does not know its own name cannot say where its key is");
    }

    #[test]
    fn only_what_does_no_harm_is_sent_again() {
        let numbered =
            proto::RegistrationBatch { tasks: vec![proto::Task::default()], origin: Some(proto::Origin::default()) };
        for (name, request, repeated) in [
            ("a plain task", Payload::RegistrationRequest(proto::Task::default()), false),
            ("with a key", Payload::RegistrationRequest(keyed("k")), true),
            ("of a sender", Payload::RegistrationRequest(from_sender(3)), true),
            ("a batch with keys", batch(vec![keyed("a"), keyed("b")]), true),
            ("a batch with one key missing", batch(vec![keyed("a"), proto::Task::default()]), false),
            ("a batch of a sender", Payload::RegistrationBatch(numbered), true),
            // Cancelled twice, the second answer is "not found".
            ("a cancellation", cancel(task_in(5).to_string()), false),
            ("a look", Payload::GetTaskRequest(proto::GetTaskRequest::default()), true),
            ("a list", Payload::ListTasksRequest(proto::ListTasksRequest::default()), true),
            ("an edit", Payload::UpdateTaskRequest(proto::UpdateTaskRequest::default()), false),
            ("a purge", purge(vec![letter_in(4)]), false),
            // Each makes another key.
            ("an API key", Payload::ApiKeyRequest(proto::ApiKeyRequest::default()), false),
            ("a client", Payload::ClientRegistration(proto::ClientRegistrationRequest::default()), true),
        ] {
            assert_eq!(effect(&request).may_be_repeated(), repeated, "{name}");
        }
    }
}
