//! How an attempt ended, and what follows. Touches: task, timeline, cursor, policy, dead letter.
//!
//! Idempotent by (id, occurrence, attempt): only the attempt the task stands at can be settled, and settling moves it.

use super::{Effect, Reply, Settle, Shard, first_cursor, occurrence_due};
use crate::store::StoreError;
use crate::store::keys::Key;
use crate::store::rows::{CursorRow, DeadLetterRow, TaskRow, TimelineRow};
use crate::task::{InstantMs, Outcome, Policy, TaskId};

const TIMELINE_ROW_BYTES: usize = 8;

impl Shard<'_, '_> {
    pub(super) fn settle(&mut self, settle: Settle) -> Result<Reply, StoreError> {
        let Settle { id, occurrence, attempt, outcome } = settle;
        let Some(task) = self.task(id)? else { return Ok(Reply::Stale) };
        let at = self.cursor(id, &task)?;
        if (at.occurrence, at.attempt) != (occurrence, attempt) {
            return Ok(Reply::Stale);
        }
        if let Outcome::Failed(error) = outcome {
            let policy = self.policy(task.policy)?;
            if let Some(due_ms) = policy.retry.next_due(attempt, self.meta.now_ms, error.retry_after_ms, 0) {
                // Strictly later, so that the key in the timeline is a new one.
                let due_ms = due_ms.max(at.due_ms + 1);
                self.advance(id, &task, at, CursorRow { due_ms, occurrence, attempt: attempt + 1 });
                return Ok(Reply::Settled);
            }
            self.bury(id, &task, policy, at, error)?;
        }
        match next_occurrence(&task, occurrence, self.meta.now_ms.max(at.due_ms)) {
            Some((occurrence, due_ms)) => self.advance(id, &task, at, CursorRow { due_ms, occurrence, attempt: 1 }),
            None => self.remove(id, &task, at),
        }
        Ok(Reply::Settled)
    }

    /// Moves a task from where it stands to its next attempt.
    fn advance(&mut self, id: TaskId, task: &TaskRow, from: CursorRow, to: CursorRow) {
        assert!(to.due_ms > from.due_ms, "a task only moves forward in time");
        debug_assert!(to != first_cursor(task));
        self.rows.delete_once(Key::timeline(self.group, from.due_ms, id));
        let row = TimelineRow { occurrence: to.occurrence, attempt: to.attempt };
        self.rows.put_once(Key::timeline(self.group, to.due_ms, id), &row, TIMELINE_ROW_BYTES);
        self.rows.put(Key::cursor(self.group, id), &to);
        self.effects.push(Effect::Scheduled { id, due_ms: to.due_ms });
    }

    fn bury(
        &mut self,
        id: TaskId,
        task: &TaskRow,
        policy: Policy,
        at: CursorRow,
        error: crate::task::Failure,
    ) -> Result<(), StoreError> {
        let row = DeadLetterRow {
            client: task.client.clone(),
            policy,
            payload: task.payload.clone(),
            occurrence: at.occurrence,
            due_ms: occurrence_due(task, at.occurrence),
            attempts: at.attempt,
            error: error.text,
        };
        // Two occurrences of one task can die within one millisecond; neither may take the other's place.
        let mut died_at = self.meta.now_ms;
        while self.rows.get::<DeadLetterRow>("a dead letter", &Key::dead_letter(self.group, died_at, id))?.is_some() {
            died_at += 1;
        }
        self.rows.put(Key::dead_letter(self.group, died_at, id), &row);
        self.meta.dead_letters += 1;
        Ok(())
    }
}

/// What is due after `occurrence` was settled. Occurrences that came due meanwhile are merged into the next one to
/// come (missed-run policy `once`): the one just settled was late for all of them.
fn next_occurrence(task: &TaskRow, occurrence: u64, now_ms: InstantMs) -> Option<(u64, InstantMs)> {
    if task.interval_ms == 0 {
        return None;
    }
    let passed = now_ms.saturating_sub(task.first_due_ms) / task.interval_ms;
    let next = (occurrence + 1).max(passed + 1);
    let due_ms = occurrence_due(task, next);
    // At the end of time there is no next instant.
    (due_ms > occurrence_due(task, occurrence) && due_ms < InstantMs::MAX).then_some((next, due_ms))
}
