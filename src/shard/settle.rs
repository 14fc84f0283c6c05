//! How an attempt ended, and what follows. Touches: task, timeline, cursor, policy, dead letter, stand-ins, history.
//!
//! Idempotent by (id, occurrence, attempt): only the attempt the task stands at can be settled, and settling moves it.

use super::{Reply, Settle, Shard, shown_as};
use crate::store::StoreError;
use crate::store::keys::{Key, client_hash};
use crate::store::rows::{CopyOf, CopyState, CursorRow, DeadLetterRow, Ended, NEVER, Role, TaskRow};
use crate::task::{DeadLetterId, Failure, Outcome, ShardId, TaskId};

impl Shard<'_, '_> {
    pub(super) fn settle(&mut self, settle: Settle) -> Result<Reply, StoreError> {
        let Settle { id, occurrence, attempt, outcome, dispatched_ms } = settle;
        let Some(task) = self.task(id)? else { return Ok(Reply::Stale) };
        let at = self.cursor(id, &task)?;
        if (at.occurrence, at.attempt) != (occurrence, attempt) {
            return Ok(Reply::Stale);
        }
        match outcome {
            Outcome::Acknowledged => {
                if let Role::Copy(copy) = &task.role {
                    self.copy_ended(copy, CopyState::Delivered)?;
                } else {
                    self.record(id, &task, &at, Ended::Acknowledged, dispatched_ms, None);
                }
            }
            Outcome::Failed(failure) => {
                let policy = self.policy(task.policy)?;
                let random = spread(id, occurrence, attempt.into());
                let next = policy.retry.next_due(attempt, self.meta.now_ms, failure.retry_after_ms, random);
                if let Some(due_ms) = next {
                    // Strictly later, so that a retry is never due at an instant that has been dispatched.
                    let due_ms =
                        if at.is_paused() { NEVER } else { due_ms.max(at.due_ms.saturating_add(1)).min(NEVER - 1) };
                    let failure = Some((failure, self.meta.now_ms));
                    let attempt = attempt + 1;
                    self.advance(id, &task, &at, CursorRow { due_ms, occurrence, attempt, failure, out_due_ms: None });
                    return Ok(Reply::Settled);
                }
                if let Role::Copy(copy) = &task.role {
                    self.copy_ended(copy, CopyState::Failed(failure))?;
                } else {
                    self.record(id, &task, &at, Ended::Dead, dispatched_ms, Some(failure.clone()));
                    self.bury(id, &task, &at, failure)?;
                }
            }
        }
        self.go_on(id, &task, &at)?;
        Ok(Reply::Settled)
    }

    /// Stores a dead letter, and sends a copy of it on its way if its destination is a URL.
    fn bury(&mut self, id: TaskId, task: &TaskRow, at: &CursorRow, failure: Failure) -> Result<(), StoreError> {
        let policy = self.policy(task.policy)?;
        let (shown, occurrence) = shown_as(id, task, at.occurrence);
        let mut letter = DeadLetterId { died_ms: self.meta.now_ms, task: shown };
        // Occurrences of one task can die within one millisecond, and none may take another's place. In growing steps:
        // thousands may, when they were all played again.
        let mut step = 1;
        while self.rows.get::<DeadLetterRow>("a dead letter", &Key::dead_letter(self.group, letter))?.is_some() {
            letter.died_ms += step;
            step *= 2;
        }
        let due_ms = super::shown_due(task, at.occurrence);
        let copy = policy.for_copy();
        let row = DeadLetterRow {
            client: task.client.clone(),
            payload: task.payload.clone(),
            tags: task.tags.clone(),
            occurrence,
            due_ms,
            attempts: at.attempt,
            failure: failure.clone(),
            copy: if copy.is_some() { CopyState::UnderWay } else { CopyState::None },
            policy,
        };
        self.rows.put(Key::dead_letter(self.group, letter), &row);
        self.rows.put(Key::letter_of_client(self.group, client_hash(&task.client), letter), &());
        self.meta.dead_letters += 1;
        if let Some(policy) = copy {
            let of = CopyOf { letter, occurrence, due_ms, attempts: at.attempt, failure };
            let shard = self.group.shard().unwrap_or(ShardId(0));
            // Made here and not by the leader, so it is made of what every replica knows.
            let copy_id = TaskId::new(self.meta.now_ms, shard, spread(id, at.occurrence, letter.died_ms));
            let policy = self.bring(policy);
            let copy = TaskRow {
                policy,
                first_due_ms: self.meta.now_ms,
                first_occurrence: 0,
                recurrence: None,
                version: 1,
                role: Role::Copy(Box::new(of)),
                ..task.clone()
            };
            self.add(copy_id, &copy);
            self.effects.push(super::Effect::Scheduled { id: copy_id, due_ms: self.meta.now_ms });
        }
        Ok(())
    }

    /// The dead letter may have been replayed or purged meanwhile.
    fn copy_ended(&mut self, copy: &CopyOf, state: CopyState) -> Result<(), StoreError> {
        let key = Key::dead_letter(self.group, copy.letter);
        if let Some(row) = self.rows.get::<DeadLetterRow>("a dead letter", &key)? {
            self.rows.put(key, &DeadLetterRow { copy: state, ..row });
        }
        Ok(())
    }
}

/// A number that looks random and is the same on every replica.
fn spread(id: TaskId, occurrence: u64, turn: u64) -> u64 {
    let mut hash = u64::from_be_bytes(id.as_bytes()[8..].try_into().expect("eight bytes"));
    for part in [occurrence, turn] {
        // The finalizer of SplitMix64.
        hash = hash.wrapping_add(part).wrapping_add(0x9e37_79b9_7f4a_7c15);
        hash = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash = (hash ^ hash >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        hash ^= hash >> 31;
    }
    hash
}
