//! The rules of a request in a cluster, as functions of the message alone: whose answer it needs, and whether it may be sent
//! again. The client asks them to find the right node, a node to find the leader for its client; what an answer proves is
//! in [`super::answers`].

use boomerang_task::{ClientId, DeadLetterId, DedupHash, GroupId, ShardId, TaskId};

use crate::proto::{self, boomerang_envelope::Payload};

/// Most registrations in one message. Each counts as a request.
pub const BATCH_TASKS_MAX: usize = 1_000;
/// Most cancellations in one message: they are smaller than tasks.
pub const CANCELLATIONS_MAX: usize = 10_000;

/// What a request needs of the node that answers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// To know all that was ever acknowledged.
    Read,
    /// To lead.
    Write,
}

/// Whose answer a request needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Any node's. So it is for what cannot be understood: any node refuses it.
    Any,
    /// That of the group's leader.
    Leader(GroupId, Access),
    /// That of any leader of a shard: a registration that may be stored anywhere.
    AnyLeader,
    /// For each task of the batch, that of the leader it goes to; see [`group_of_task`].
    Batch,
    /// For each task named, that of its leader.
    Cancellations,
    /// Those of the leaders of all shards, merged: a page of a list.
    Page,
    /// Of those who lead what it chooses or names: dead letters to be replayed or purged.
    DeadLetters,
}

/// What no group can be found for, since it is against the rules of what a name may look like. Any node refuses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nowhere;

/// Whose answer `request` needs in a cluster of so many shards, when `client` makes it. A client that does not know yet what
/// it is called can ask as well: then its deduplication keys may be anywhere.
pub fn target(request: &Payload, client: Option<&ClientId>, shards: u16) -> Target {
    let of_task = |id: &str, access| leader(id.parse().ok().map(|id: TaskId| id.shard()), access, shards);
    let of_letter = |id: &str, access| leader(id.parse().ok().map(|id: DeadLetterId| id.task.shard()), access, shards);
    let of_letters = |ids: &[String]| match ids {
        [id] => of_letter(id, Access::Write),
        _ => Target::DeadLetters,
    };
    match request {
        Payload::RegistrationRequest(task) => match group_of_task(task, client, shards) {
            Ok(Some(group)) => Target::Leader(group, Access::Write),
            Ok(None) => Target::AnyLeader,
            Err(Nowhere) => Target::Any,
        },
        Payload::RegistrationBatch(batch) if (1..=BATCH_TASKS_MAX).contains(&batch.tasks.len()) => Target::Batch,
        Payload::CancellationRequest(request) => of_task(&request.task_id, Access::Write),
        Payload::CancellationBatch(batch) if (1..=CANCELLATIONS_MAX).contains(&batch.task_ids.len()) => {
            Target::Cancellations
        }
        Payload::UpdateTaskRequest(request) => of_task(&request.task_id, Access::Write),
        Payload::PauseTaskRequest(request) => of_task(&request.task_id, Access::Write),
        Payload::GetTaskRequest(request) => of_task(&request.task_id, Access::Read),
        Payload::GetDeadLetterRequest(request) => of_letter(&request.dead_letter_id, Access::Read),
        Payload::ReplayDeadLettersRequest(request) => of_letters(&request.dead_letter_ids),
        Payload::PurgeDeadLettersRequest(request) => of_letters(&request.dead_letter_ids),
        Payload::ListTasksRequest(_) | Payload::ListDeadLettersRequest(_) => Target::Page,
        Payload::ClientRegistration(_)
        | Payload::ClientDeregistration(_)
        | Payload::ApiKeyRequest(_)
        | Payload::ApiKeyRevocation(_) => Target::Leader(GroupId::CLUSTER, Access::Write),
        _ => Target::Any,
    }
}

fn leader(shard: Option<ShardId>, access: Access, shards: u16) -> Target {
    let shard = shard.filter(|shard| shard.0 < shards);
    shard.map_or(Target::Any, |shard| Target::Leader(GroupId::of_shard(shard), access))
}

/// Where a task goes: with a deduplication key to where the key lives, otherwise to where its sender says. `None`: that is
/// left to the node.
pub fn group_of_task(task: &proto::Task, client: Option<&ClientId>, shards: u16) -> Result<Option<GroupId>, Nowhere> {
    if task.dedup_key.is_empty() {
        return task.origin.as_ref().map(|origin| group_of_origin(origin, shards)).transpose();
    }
    let Some(client) = client.filter(|_| shards > 0) else { return Ok(None) };
    let hash = DedupHash::new(client, &task.dedup_key).map_err(|_| Nowhere)?;
    Ok(Some(GroupId::of_shard(hash.shard(shards))))
}

/// Where the sender of registrations wants them.
pub fn group_of_origin(origin: &proto::Origin, shards: u16) -> Result<GroupId, Nowhere> {
    let shard = u16::try_from(origin.shard).ok().filter(|shard| *shard < shards);
    shard.map(|shard| GroupId::of_shard(ShardId(shard))).ok_or(Nowhere)
}

/// Whether a shard knows the task when it comes again, and stores it once.
pub fn is_known_again(task: &proto::Task) -> bool {
    !task.dedup_key.is_empty() || task.origin.is_some()
}

/// Whether `request` may be sent again when nobody knows if it was done: done twice, it has the same effect and the same
/// answer as done once.
pub fn may_be_repeated(request: &Payload) -> bool {
    match request {
        Payload::RegistrationRequest(task) => is_known_again(task),
        Payload::RegistrationBatch(batch) => batch.origin.is_some() || batch.tasks.iter().all(is_known_again),
        Payload::ClientRegistration(_) => true,
        _ => !changes_something(request),
    }
}

/// Whether doing `request` leaves anything behind. A question that is asked twice has one answer; of a change that was asked
/// for twice, the second answer does not say what became of the first.
pub fn changes_something(request: &Payload) -> bool {
    !matches!(
        request,
        Payload::GetTaskRequest(_)
            | Payload::ListTasksRequest(_)
            | Payload::GetDeadLetterRequest(_)
            | Payload::ListDeadLettersRequest(_)
            | Payload::ShardMapRequest(_)
    )
}

/// What the caller is told in the end: the last answer, unless the request may have been done when it was sent before, which
/// `before` says. Then only an answer which proves that it is done says more than that: a refusal is no proof.
pub fn what_to_tell<A>(last: A, proves_done: impl FnOnce(&A) -> bool, before: Option<A>) -> A {
    match before {
        Some(before) if !proves_done(&last) => before,
        _ => last,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            assert_eq!(target(&request, Some(&client()), SHARDS), expected, "{name}");
        }
        let unknown = target(&Payload::RegistrationRequest(keyed("k")), None, SHARDS);
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
            assert_eq!(may_be_repeated(&request), repeated, "{name}");
        }
    }

    #[test]
    fn a_refusal_after_an_answer_that_was_lost_is_no_proof() {
        let done = |answer: &&str| *answer == "done";
        assert_eq!(what_to_tell("refused", done, Some("lost")), "lost");
        assert_eq!(what_to_tell("done", done, Some("lost")), "done");
        assert_eq!(what_to_tell("refused", done, None), "refused");
    }
}
