//! The replicated state machine: what one command does to a shard.
//!
//! [`apply`] is a function: (state, batch with its time) gives (writes, one reply per request, effects). It reads no
//! clock, draws no random number, awaits nothing and touches no network; what it needs of these, ids and instants, the
//! leader put into the batch. So every replica computes the same, and a replay after a crash computes it again.
//!
//! The caller stores the writes together with `last applied` in one batch, and only then answers and carries out the
//! effects; effects matter on the leader alone, and a new leader finds all of them again in the timeline.
//!
//! ```text
//!                         failed, tries left
//!                        +-------------------+
//!   register             v                   |          acknowledged, last occurrence
//!  ----------> pending (occurrence n, attempt k) ------------------------------------> gone
//!                 |      ^                   |
//!                 |      +-------------------+  acknowledged or out of tries: occurrence n+1, attempt 1
//!          cancel |                          |  out of tries: a dead letter as well
//!                 +--> gone
//! ```
//!
//! A storage error inside `apply` is the node's end. A request that cannot be understood does not decode, which is
//! one: skipping it would let replicas differ.

mod cancel;
mod clients;
mod command;
mod register;
mod settle;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

pub use command::{Batch, Cancel, Claim, PutApiKey, PutClient, Register, Reply, Request, Settle};

use crate::store::StoreError;
use crate::store::keys::Key;
use crate::store::overlay::{Overlay, Rows, get_row};
use crate::store::rows::{CursorRow, PolicyRow, ShardMetaRow, TaskRow};
use crate::task::{GroupId, InstantMs, Policy, PolicyId, TaskId};

/// What the leader does after the writes are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// The task's next attempt is due then; any earlier one is settled.
    Scheduled { id: TaskId, due_ms: InstantMs },
    /// There is nothing more to do for this task.
    Ended { id: TaskId },
}

/// What one batch did, besides its writes.
#[derive(Debug, Default)]
pub struct Applied {
    /// One per request, in their order.
    pub replies: Vec<Reply>,
    pub effects: Vec<Effect>,
}

/// Applies one batch to `group`. `meta` is the group's own row, which the caller stores with the writes.
pub fn apply(
    group: GroupId,
    rows: &mut Overlay<'_>,
    meta: &mut ShardMetaRow,
    batch: Batch,
) -> Result<Applied, StoreError> {
    // The stamp is max(clock, last stamp), and one leader's batches are applied in order: time never goes back.
    meta.now_ms = meta.now_ms.max(batch.now_ms);
    meta.armed_ms = meta.armed_ms.max(batch.armed_ms);
    let Batch { policies, requests, .. } = batch;
    let mut shard = Shard { group, rows, meta, policies, policy_changes: BTreeMap::new(), effects: Vec::new() };
    let mut replies = Vec::with_capacity(requests.len());
    for request in requests {
        replies.push(match request {
            Request::Register(register) => shard.register(register)?,
            Request::Cancel(cancel) => shard.cancel(cancel)?,
            Request::Settle(settle) => shard.settle(settle)?,
            Request::PutClient(put) => shard.put_client(put)?,
            Request::RemoveClient(client) => shard.remove_client(&client)?,
            Request::PutApiKey(put) => shard.put_api_key(put)?,
            Request::RemoveApiKey(key_id) => shard.remove_api_key(&key_id)?,
        });
    }
    shard.store_policy_changes()?;
    let effects = shard.effects;
    Ok(Applied { replies, effects })
}

/// The state while one batch is applied to it.
struct Shard<'a, 'b> {
    group: GroupId,
    rows: &'a mut Overlay<'b>,
    meta: &'a mut ShardMetaRow,
    /// What this batch brings.
    policies: Vec<Policy>,
    /// By how much the number of tasks using a policy changes; stored once, at the end.
    policy_changes: BTreeMap<PolicyId, i64>,
    effects: Vec<Effect>,
}

impl Shard<'_, '_> {
    fn task(&self, id: TaskId) -> Result<Option<TaskRow>, StoreError> {
        self.rows.get("a task", &Key::task(self.group, id))
    }

    /// Where `task` stands.
    fn cursor(&self, id: TaskId, task: &TaskRow) -> Result<CursorRow, StoreError> {
        let stored = self.rows.get("a cursor", &Key::cursor(self.group, id))?;
        Ok(stored.unwrap_or_else(|| first_cursor(task)))
    }

    /// Takes a task out of the state, wherever it stands.
    fn remove(&mut self, id: TaskId, task: &TaskRow, at: CursorRow) {
        self.rows.delete_once(Key::task(self.group, id));
        self.rows.delete_once(Key::timeline(self.group, at.due_ms, id));
        if at != first_cursor(task) {
            self.rows.delete(Key::cursor(self.group, id));
        }
        *self.policy_changes.entry(task.policy).or_default() -= 1;
        self.meta.pending = self.meta.pending.checked_sub(1).expect("a task that is there was counted");
        self.effects.push(Effect::Ended { id });
    }

    /// A policy that some task uses. One that came with this batch is not stored yet.
    fn policy(&self, id: PolicyId) -> Result<Policy, StoreError> {
        let stored: Option<PolicyRow> = self.rows.get("a policy", &Key::policy(self.group, id))?;
        let brought = || self.policies.iter().find(|policy| policy.id() == id).cloned();
        let policy = stored.map(|row| row.policy).or_else(brought);
        policy.ok_or_else(|| StoreError::damaged("a policy", "is missing, though a task uses it"))
    }

    fn store_policy_changes(&mut self) -> Result<(), StoreError> {
        for (id, change) in std::mem::take(&mut self.policy_changes) {
            let key = Key::policy(self.group, id);
            let known: Option<PolicyRow> = self.rows.get("a policy", &key)?;
            let before = known.map_or(0, |row| row.tasks);
            let tasks = before.checked_add_signed(change).expect("no more tasks leave a policy than came to it");
            if tasks == 0 {
                self.rows.delete(key);
                continue;
            }
            let policy = self.policy(id)?;
            self.rows.put(key, &PolicyRow { policy, tasks });
        }
        Ok(())
    }
}

/// Where every task begins.
pub fn first_cursor(task: &TaskRow) -> CursorRow {
    CursorRow { due_ms: task.first_due_ms, occurrence: 0, attempt: 1 }
}

/// A task and where it stands, as the firing room and `get` read it.
pub fn read_task(rows: &dyn Rows, group: GroupId, id: TaskId) -> Result<Option<(TaskRow, CursorRow)>, StoreError> {
    let Some(task) = get_row::<TaskRow>(rows, "a task", &Key::task(group, id))? else { return Ok(None) };
    let stored = get_row(rows, "a cursor", &Key::cursor(group, id))?;
    let cursor = stored.unwrap_or_else(|| first_cursor(&task));
    Ok(Some((task, cursor)))
}

/// When occurrence `n` of a task is due: counted from the first, so that nothing drifts.
pub fn occurrence_due(task: &TaskRow, occurrence: u64) -> InstantMs {
    task.first_due_ms.saturating_add(task.interval_ms.saturating_mul(occurrence))
}
