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
//!              |  |      +-------------------+  acknowledged or out of tries: occurrence n+1, attempt 1
//!       cancel |  |                          |  out of tries: a dead letter as well
//!              |  |      +-------------------+
//!              |  +----> paused: due never   | resume: occurrence as time has it
//!              |  pause  +-------------------+
//!              +--> gone
//! ```
//!
//! An edit leaves a task where it is, or moves it to another due instant. With overlap, an occurrence that starts
//! becomes a task of its own, a stand-in, and the task goes on to the next; a dead letter that is played again is a
//! stand-in too.
//!
//! A storage error inside `apply` is the node's end. A request that cannot be understood does not decode, which is
//! one: skipping it would let replicas differ.

mod cancel;
mod clients;
mod command;
mod edit;
mod forget;
mod letters;
mod recur;
mod register;
mod sender;
mod settle;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

pub use command::{
    Batch, Cancel, CatchUp, Change, Claim, Dedup, Detach, Edit, Forget, Numbered, Pause, Purge, PutApiKey, PutClient,
    Register, Replay, Reply, Request, Settle,
};
pub use recur::must_catch_up;

use crate::store::StoreError;
use crate::store::keys::{Key, TagKind, client_hash};
use crate::store::overlay::{Overlay, Rows, get_row};
use crate::store::rows::{
    CursorRow, Ended, HistoryRow, PolicyRow, Role, SenderRow, ShardMetaRow, TaskRow, TimelineRow,
};
use crate::task::{ClientId, DedupHash, Failure, GroupId, InstantMs, Policy, PolicyId, TaskId};

/// About what a task row takes besides its payload and the client's name.
const TASK_ROW_BYTES: usize = 64;
const TIMELINE_ROW_BYTES: usize = 8;
/// Requests whose rows are read at once. Each row holds a payload, of any size.
const READ_TOGETHER: usize = 64;

/// What is done after the writes are stored: by the leader, if nothing else is said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// The task's next attempt is due then; any earlier one is settled.
    Scheduled { id: TaskId, due_ms: InstantMs },
    /// There is nothing more to do for this task.
    Ended { id: TaskId },
    /// It is new, or has another password or other rights, or is gone. Matters on every node.
    ClientChanged { client: ClientId },
    /// Whoever came in with this key is out. Matters on every node.
    KeyRevoked { key_id: String },
    /// Somebody wants a digest of the state as it is now.
    Marked { mark: u64 },
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
    let Batch { keep_history, policies, requests, .. } = batch;
    let policies = policies.into_iter().map(|policy| (policy.id(), policy)).collect();
    let policy_changes = BTreeMap::new();
    let (effects, expiries, senders) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
    let mut shard = Shard { group, rows, meta, keep_history, policies, policy_changes, expiries, senders, effects };
    let mut replies = Vec::with_capacity(requests.len());
    let mut requests = requests.into_iter();
    while requests.len() > 0 {
        let together = requests.len().min(READ_TOGETHER);
        shard.read_ahead(&requests.as_slice()[..together])?;
        for request in requests.by_ref().take(together) {
            replies.push(shard.carry_out(request)?);
        }
    }
    shard.store_policy_changes()?;
    shard.store_expiries();
    shard.store_senders();
    let effects = shard.effects;
    Ok(Applied { replies, effects })
}

/// The state while one batch is applied to it.
struct Shard<'a, 'b> {
    group: GroupId,
    rows: &'a mut Overlay<'b>,
    meta: &'a mut ShardMetaRow,
    keep_history: bool,
    /// What this batch brings, and what its requests need besides.
    policies: Vec<(PolicyId, Policy)>,
    /// By how much the number of tasks using a policy changes; stored once, at the end.
    policy_changes: BTreeMap<PolicyId, i64>,
    /// When the deduplication keys that came with this batch expire; stored once, at the end.
    expiries: BTreeMap<InstantMs, Vec<DedupHash>>,
    /// Those whose registrations are in this batch; stored once, at the end.
    senders: BTreeMap<DedupHash, SenderRow>,
    effects: Vec<Effect>,
}

impl Shard<'_, '_> {
    /// What is asked for most often comes in hundreds, and reading is the larger part of it.
    fn read_ahead(&mut self, requests: &[Request]) -> Result<(), StoreError> {
        let mut keys = Vec::new();
        let mut last_sender = None;
        for request in requests {
            match request {
                Request::Settle(Settle { id, .. }) => {
                    keys.extend([Key::task(self.group, *id), Key::cursor(self.group, *id)]);
                }
                Request::Register(Register { dedup: Some(dedup), .. }) => keys.push(Key::dedup(self.group, dedup.hash)),
                // Neighbours often have the same.
                Request::Register(Register { numbered: Some(Numbered { sender, .. }), .. })
                    if last_sender.replace(*sender) != Some(*sender) && !self.senders.contains_key(sender) =>
                {
                    keys.push(Key::sender(self.group, *sender));
                }
                _ => {}
            }
        }
        self.rows.read_ahead(keys)
    }

    fn carry_out(&mut self, request: Request) -> Result<Reply, StoreError> {
        match request {
            Request::Register(register) => self.register(register),
            Request::Cancel(cancel) => self.cancel(cancel),
            Request::Settle(settle) => self.settle(settle),
            Request::PutClient(put) => self.put_client(put),
            Request::RemoveClient(client) => self.remove_client(&client),
            Request::PutApiKey(put) => self.put_api_key(put),
            Request::RemoveApiKey(key_id) => self.remove_api_key(&key_id),
            Request::Edit(edit) => self.edit(edit),
            Request::Pause(pause) => self.pause(pause),
            Request::CatchUp(catch_up) => self.catch_up(catch_up),
            Request::Detach(detach) => self.detach(detach),
            Request::Replay(replay) => self.replay(replay),
            Request::Purge(purge) => self.purge(purge),
            Request::Forget(forget) => self.forget(forget),
            Request::Mark(mark) => {
                self.effects.push(Effect::Marked { mark });
                Ok(Reply::Stored)
            }
        }
    }

    fn task(&self, id: TaskId) -> Result<Option<TaskRow>, StoreError> {
        self.rows.get("a task", &Key::task(self.group, id))
    }

    /// Where `task` stands.
    fn cursor(&self, id: TaskId, task: &TaskRow) -> Result<CursorRow, StoreError> {
        let stored = self.rows.get("a cursor", &Key::cursor(self.group, id))?;
        Ok(stored.unwrap_or_else(|| first_cursor(task)))
    }

    /// Whether the attempt the task stands at may have left: nothing does before the watermark has passed it.
    fn was_armed(&self, at: &CursorRow) -> bool {
        at.armed_by_ms() <= self.meta.armed_ms
    }

    /// A task that `owner` may touch; `None` is an administrator. Another client's task is not found rather than
    /// forbidden: ids of others are not confirmed.
    fn owned(&self, id: TaskId, owner: Option<&ClientId>) -> Result<Option<TaskRow>, StoreError> {
        let may = |task: &TaskRow| owner.is_none_or(|owner| *owner == task.client);
        // The copy of a dead letter is ours.
        Ok(self.task(id)?.filter(|task| may(task) && !matches!(task.role, Role::Copy(_))))
    }

    /// Puts a new task into the state, at its first occurrence.
    fn add(&mut self, id: TaskId, task: &TaskRow) {
        self.put_task(id, task);
        self.schedule(id, task, &first_cursor(task));
        self.meta.pending += 1;
    }

    fn put_task(&mut self, id: TaskId, task: &TaskRow) {
        let bytes = TASK_ROW_BYTES + task.payload.len() + task.client.as_str().len();
        self.rows.put_once(Key::task(self.group, id), task, bytes);
        for key in tag_keys(self.group, id, task) {
            self.rows.put_once(key, &(), 1);
        }
        *self.policy_changes.entry(task.policy).or_default() += 1;
    }

    fn take_task(&mut self, id: TaskId, task: &TaskRow) {
        self.rows.delete_once(Key::task(self.group, id));
        for key in tag_keys(self.group, id, task) {
            self.rows.delete_once(key);
        }
        *self.policy_changes.entry(task.policy).or_default() -= 1;
    }

    fn replace(&mut self, id: TaskId, before: &TaskRow, after: &TaskRow) {
        self.take_task(id, before);
        self.put_task(id, after);
    }

    /// Takes a task out of the state, wherever it stands.
    fn remove(&mut self, id: TaskId, task: &TaskRow, at: &CursorRow) -> Result<(), StoreError> {
        self.unschedule(id, task, at);
        self.take_task(id, task);
        if let Role::StandIn { task, .. } = task.role {
            self.forget_stand_in(task, id)?;
        }
        self.meta.pending = self.meta.pending.checked_sub(1).expect("a task that is there was counted");
        self.effects.push(Effect::Ended { id });
        Ok(())
    }

    /// Writes where a task stands.
    fn schedule(&mut self, id: TaskId, task: &TaskRow, at: &CursorRow) {
        let row = TimelineRow { occurrence: at.occurrence, attempt: at.attempt, recurring: task.recurrence.is_some() };
        self.rows.put_once(Key::timeline(self.group, at.due_ms, id), &row, TIMELINE_ROW_BYTES);
        let mine = Key::by_client(self.group, client_hash(&task.client), at.due_ms, id);
        self.rows.put_once(mine, &row, TIMELINE_ROW_BYTES);
        if *at != first_cursor(task) {
            self.rows.put(Key::cursor(self.group, id), at);
        }
    }

    fn unschedule(&mut self, id: TaskId, task: &TaskRow, at: &CursorRow) {
        self.rows.delete_once(Key::timeline(self.group, at.due_ms, id));
        self.rows.delete_once(Key::by_client(self.group, client_hash(&task.client), at.due_ms, id));
        if *at != first_cursor(task) {
            self.rows.delete(Key::cursor(self.group, id));
        }
    }

    /// Moves a task from where it stands to its next attempt.
    fn advance(&mut self, id: TaskId, task: &TaskRow, from: &CursorRow, to: CursorRow) {
        self.unschedule(id, task, from);
        self.schedule(id, task, &to);
        self.effects.push(Effect::Scheduled { id, due_ms: to.due_ms });
    }

    /// Puts down what became of the occurrence a task stands at.
    fn record(
        &mut self,
        id: TaskId,
        task: &TaskRow,
        at: &CursorRow,
        ended: Ended,
        dispatched_ms: InstantMs,
        failure: Option<Failure>,
    ) {
        if !self.keep_history {
            return;
        }
        let (shown, occurrence) = shown_as(id, task, at.occurrence);
        let row = HistoryRow {
            client: task.client.clone(),
            ended,
            count: 1,
            due_ms: shown_due(task, at.occurrence),
            dispatched_ms,
            attempts: at.attempt,
            failure,
        };
        self.rows.put(Key::history(self.group, self.meta.now_ms, shown, occurrence), &row);
    }

    /// Puts down that due instants from `first` on are not run.
    fn record_left_out(&mut self, id: TaskId, task: &TaskRow, first: u64, count: u64, how: Ended) {
        self.meta.missed = self.meta.missed.saturating_add(count);
        if !self.keep_history {
            return;
        }
        let row = HistoryRow {
            client: task.client.clone(),
            ended: how,
            count,
            due_ms: occurrence_due(task, first),
            dispatched_ms: 0,
            attempts: 0,
            failure: None,
        };
        self.rows.put(Key::history(self.group, self.meta.now_ms, id, first), &row);
    }

    /// A policy that a request of this batch makes out of what it found.
    fn bring(&mut self, policy: Policy) -> PolicyId {
        let id = policy.id();
        self.policies.push((id, policy));
        id
    }

    /// A policy that some task uses. One that came with this batch is not stored yet.
    fn policy(&self, id: PolicyId) -> Result<Policy, StoreError> {
        let stored: Option<PolicyRow> = self.rows.get("a policy", &Key::policy(self.group, id))?;
        let brought = || self.policies.iter().find(|(brought, _)| *brought == id).map(|(_, policy)| policy.clone());
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
    first_attempt(task.first_due_ms, task.first_occurrence)
}

/// Where every occurrence begins.
fn first_attempt(due_ms: InstantMs, occurrence: u64) -> CursorRow {
    CursorRow { due_ms, occurrence, attempt: 1, failure: None, out_due_ms: None }
}

/// The task and occurrence in whose name this one goes out.
pub fn shown_as(id: TaskId, task: &TaskRow, occurrence: u64) -> (TaskId, u64) {
    match &task.role {
        Role::Own => (id, occurrence),
        Role::StandIn { task, occurrence, .. } => (*task, *occurrence),
        Role::Copy(copy) => (copy.letter.task, copy.occurrence),
    }
}

/// When the occurrence that goes out was due.
pub fn shown_due(task: &TaskRow, occurrence: u64) -> InstantMs {
    match &task.role {
        Role::Own => occurrence_due(task, occurrence),
        Role::StandIn { due_ms, .. } => *due_ms,
        Role::Copy(copy) => copy.due_ms,
    }
}

/// The places of a task in the index of names and labels.
fn tag_keys(group: GroupId, id: TaskId, task: &TaskRow) -> Vec<Key> {
    // A copy is no task of the client's.
    let Some(tags) = task.tags.as_ref().filter(|_| !matches!(task.role, Role::Copy(_))) else { return Vec::new() };
    let client = client_hash(&task.client);
    let name = tags.name().map(|name| Key::by_tag(group, client, TagKind::Name, name, id));
    let label =
        |(key, value): &(String, String)| Key::by_tag(group, client, TagKind::Label, &format!("{key}={value}"), id);
    name.into_iter().chain(tags.labels().iter().map(label)).collect()
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
    let interval_ms = task.recurrence.map_or(0, |recurrence| recurrence.interval_ms);
    let intervals = occurrence.saturating_sub(task.first_occurrence);
    task.first_due_ms.saturating_add(interval_ms.saturating_mul(intervals))
}
