//! The rules of a request in a cluster: whose answer it needs, and whether it may be sent again. The client goes by them to
//! find the right node, a node to find the leader for its client. Which request they say what of is in [`super::operations`],
//! what an answer proves in [`super::answers`].

use boomerang_task::{ClientId, DeadLetterId, DedupHash, GroupId, ShardId, TaskId};

use crate::proto;

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

impl Target {
    /// That of the leader of the cluster's own group.
    pub const CLUSTER: Self = Self::Leader(GroupId::CLUSTER, Access::Write);

    pub(crate) fn of_batch(batch: &proto::RegistrationBatch) -> Self {
        if (1..=BATCH_TASKS_MAX).contains(&batch.tasks.len()) { Self::Batch } else { Self::Any }
    }

    pub(crate) fn of_cancellations(batch: &proto::CancellationBatch) -> Self {
        if (1..=CANCELLATIONS_MAX).contains(&batch.task_ids.len()) { Self::Cancellations } else { Self::Any }
    }
}

/// What a request does, as far as it matters when nobody knows whether it was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// It leaves nothing behind: a question.
    Nothing,
    /// Done twice, it has the same effect and the same answer as done once.
    SameAgain,
    /// Done twice, it has another effect, or an answer that does not say what became of the first time.
    Change,
}

impl Effect {
    /// Whether the request may be sent again when nobody knows if it was done.
    pub fn may_be_repeated(self) -> bool {
        self != Effect::Change
    }

    /// Whether it leaves anything behind.
    pub fn changes_something(self) -> bool {
        self != Effect::Nothing
    }
}

/// Who asks, and in what cluster.
#[derive(Debug, Clone, Copy)]
pub struct Asker<'a> {
    /// Not known yet to a client that does not know what it is called: then its deduplication keys may be anywhere.
    pub client: Option<&'a ClientId>,
    /// Number of shards in the cluster.
    pub shards: u16,
}

impl Asker<'_> {
    pub(crate) fn new_task(&self, task: &proto::Task) -> Target {
        match group_of_task(task, self.client, self.shards) {
            Ok(Some(group)) => Target::Leader(group, Access::Write),
            Ok(None) => Target::AnyLeader,
            Err(Nowhere) => Target::Any,
        }
    }

    pub(crate) fn task(&self, id: &str, access: Access) -> Target {
        self.leader(id.parse().ok().map(|id: TaskId| id.shard()), access)
    }

    pub(crate) fn dead_letter(&self, id: &str, access: Access) -> Target {
        self.leader(id.parse().ok().map(|id: DeadLetterId| id.task.shard()), access)
    }

    pub(crate) fn dead_letters(&self, ids: &[String]) -> Target {
        match ids {
            [id] => self.dead_letter(id, Access::Write),
            _ => Target::DeadLetters,
        }
    }

    fn leader(&self, shard: Option<ShardId>, access: Access) -> Target {
        let shard = shard.filter(|shard| shard.0 < self.shards);
        shard.map_or(Target::Any, |shard| Target::Leader(GroupId::of_shard(shard), access))
    }
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

    #[test]
    fn a_refusal_after_an_answer_that_was_lost_is_no_proof() {
        let done = |answer: &&str| *answer == "done";
        assert_eq!(what_to_tell("refused", done, Some("lost")), "lost");
        assert_eq!(what_to_tell("done", done, Some("lost")), "done");
        assert_eq!(what_to_tell("refused", done, None), "refused");
    }
}
