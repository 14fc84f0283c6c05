//! From one occurrence to the next, and what becomes of those that were missed. Touches: task, timeline, cursor, policy,
//! stand-ins, history.
//!
//! Due instants are counted from the first, so nothing drifts. The next occurrence waits for the one before; what came
//! due meanwhile was *missed*, and so was what the whole node slept through. An occurrence that is less than one
//! interval late, or less than a second, is not missed but late: otherwise a task whose interval is shorter than it takes
//! to write this down would be caught up for ever and never start. With overlap, an occurrence that starts becomes a task of its own (a stand-in),
//! and the next one waits for nothing but its due instant.

use super::{CatchUp, Detach, Effect, Reply, Shard, first_attempt, occurrence_due};
use crate::store::StoreError;
use crate::store::keys::Key;
use crate::store::rows::{CursorRow, Ended, NEVER, Role, StandInsRow, TaskRow};
use crate::task::{InstantMs, Missed, Recurrence, TaskId};

/// More occurrences of one task than this do not overlap; those that come due are left out.
pub const STAND_INS_MAX: usize = 100;

/// Whatever the interval, an occurrence that is no later than this simply starts.
const LATE_MS_MAX: u64 = 1_000;

/// What follows an occurrence.
#[derive(Debug, PartialEq, Eq)]
struct Next {
    /// `None`: the task has ended.
    occurrence: Option<u64>,
    /// Due instants from the first number on that are not run, and how they are called.
    left_out: Option<(u64, u64, Ended)>,
}

/// The last occurrence that comes at all.
fn last(task: &TaskRow, recurrence: &Recurrence) -> u64 {
    let by_count = recurrence.count.map_or(u64::MAX, |count| count.saturating_sub(1));
    let by_time = |until_ms: InstantMs| {
        let intervals = until_ms.saturating_sub(task.first_due_ms) / recurrence.interval_ms;
        task.first_occurrence.saturating_add(intervals)
    };
    // At the end of time there is no next instant.
    by_count.min(by_time(recurrence.until_ms.unwrap_or(NEVER - 1).min(NEVER - 1)))
}

/// The latest occurrence that is due by `now_ms`, if one is.
fn latest(task: &TaskRow, recurrence: &Recurrence, now_ms: InstantMs) -> Option<u64> {
    let passed = now_ms.checked_sub(task.first_due_ms)? / recurrence.interval_ms;
    Some(task.first_occurrence.saturating_add(passed))
}

/// What comes when all before `first` is done with.
fn next(task: &TaskRow, recurrence: &Recurrence, first: u64, now_ms: InstantMs) -> Next {
    let last = last(task, recurrence);
    if first > last {
        return Next { occurrence: None, left_out: None };
    }
    let Some(latest) =
        latest(task, recurrence, now_ms).map(|latest| latest.min(last)).filter(|latest| *latest >= first)
    else {
        return Next { occurrence: Some(first), left_out: None };
    };
    let from = match recurrence.missed {
        Missed::Skip => latest + 1,
        Missed::Once => latest,
        Missed::All { max } => first.max((latest + 1).saturating_sub(max.into())),
    };
    let how = if recurrence.missed == Missed::Once { Ended::Merged } else { Ended::Skipped };
    let left_out = (from > first).then_some((first, from - first, how));
    Next { occurrence: (from <= last).then_some(from), left_out }
}

/// Whether so much was missed that the occurrence a task stands at must not simply start: the dispatcher asks, and
/// proposes a [`CatchUp`].
pub fn must_catch_up(task: &TaskRow, at: &CursorRow, now_ms: InstantMs) -> bool {
    let Some(recurrence) = &task.recurrence else { return false };
    let late_ms = now_ms.saturating_sub(occurrence_due(task, at.occurrence));
    if at.attempt > 1 || late_ms < recurrence.interval_ms.max(LATE_MS_MAX) {
        return false;
    }
    next(task, recurrence, at.occurrence, now_ms).occurrence != Some(at.occurrence)
}

impl Shard<'_, '_> {
    /// After an occurrence has ended: to the next one, or to the end of the task.
    pub(super) fn go_on(&mut self, id: TaskId, task: &TaskRow, at: &CursorRow) -> Result<(), StoreError> {
        self.go_to(id, task, at, at.occurrence.saturating_add(1), self.meta.now_ms)
    }

    fn go_to(
        &mut self,
        id: TaskId,
        task: &TaskRow,
        at: &CursorRow,
        first: u64,
        now_ms: InstantMs,
    ) -> Result<(), StoreError> {
        let Some(recurrence) = &task.recurrence else { return self.remove(id, task, at) };
        // While a task is paused nothing is missed: it is settled when it is resumed.
        let now_ms = if at.is_paused() { 0 } else { now_ms };
        let Next { occurrence, left_out } = next(task, recurrence, first, now_ms);
        if let Some((from, count, how)) = left_out {
            self.record_left_out(id, task, from, count, how);
        }
        match occurrence {
            Some(occurrence) => {
                let due_ms = if at.is_paused() { NEVER } else { occurrence_due(task, occurrence) };
                self.advance(id, task, at, first_attempt(due_ms, occurrence));
                Ok(())
            }
            None => self.remove(id, task, at),
        }
    }

    pub(super) fn catch_up(&mut self, catch_up: CatchUp) -> Result<Reply, StoreError> {
        let CatchUp { id, occurrence } = catch_up;
        let Some(task) = self.task(id)? else { return Ok(Reply::Stale) };
        let at = self.cursor(id, &task)?;
        if at.occurrence != occurrence || at.is_paused() || !must_catch_up(&task, &at, self.meta.now_ms) {
            return Ok(Reply::Stale);
        }
        self.go_to(id, &task, &at, occurrence, self.meta.now_ms)?;
        Ok(Reply::Settled)
    }

    pub(super) fn detach(&mut self, detach: Detach) -> Result<Reply, StoreError> {
        let Detach { id, occurrence, stand_in } = detach;
        let Some(task) = self.task(id)? else { return Ok(Reply::Stale) };
        let at = self.cursor(id, &task)?;
        if (at.occurrence, at.attempt) != (occurrence, 1) || at.is_paused() {
            return Ok(Reply::Stale);
        }
        let key = Key::stand_ins(self.group, id);
        let mut others: StandInsRow = self.rows.get("stand-ins", &key)?.unwrap_or_default();
        if others.0.len() >= STAND_INS_MAX {
            self.record_left_out(id, &task, occurrence, 1, Ended::Skipped);
        } else {
            others.0.push(stand_in);
            self.rows.put(key, &others);
            let role = Role::StandIn { task: id, occurrence, due_ms: occurrence_due(&task, occurrence) };
            let row = TaskRow {
                first_due_ms: at.due_ms,
                first_occurrence: 0,
                recurrence: None,
                version: 1,
                role,
                ..task.clone()
            };
            self.add(stand_in, &row);
            self.effects.push(Effect::Scheduled { id: stand_in, due_ms: at.due_ms });
        }
        self.go_to(id, &task, &at, occurrence + 1, 0)?;
        Ok(Reply::Settled)
    }

    /// One of the stand-ins of a task that overlaps itself has ended.
    pub(super) fn forget_stand_in(&mut self, of: TaskId, stand_in: TaskId) -> Result<(), StoreError> {
        let key = Key::stand_ins(self.group, of);
        // A dead letter that was played again is not among them.
        let Some(StandInsRow(mut others)) = self.rows.get("stand-ins", &key)? else { return Ok(()) };
        others.retain(|other| *other != stand_in);
        if others.is_empty() {
            self.rows.delete(key);
        } else {
            self.rows.put(key, &StandInsRow(others));
        }
        Ok(())
    }

    /// Where a resumed task goes on. With an attempt that is still `out`, that is where it was.
    pub(super) fn resume(
        &mut self,
        id: TaskId,
        task: &TaskRow,
        at: &CursorRow,
        out: bool,
    ) -> Result<InstantMs, StoreError> {
        let now_ms = self.meta.now_ms;
        if out {
            let to = CursorRow { due_ms: occurrence_due(task, at.occurrence), out_due_ms: None, ..at.clone() };
            let due_ms = to.due_ms;
            self.unschedule(id, task, at);
            self.schedule(id, task, &to);
            // No effect: it is settled as if nothing had been.
            return Ok(due_ms);
        }
        let mut to = CursorRow { due_ms: occurrence_due(task, at.occurrence), out_due_ms: None, ..at.clone() };
        if at.attempt > 1 {
            // Not before the instant it was moved to meanwhile.
            to.due_ms = now_ms.max(to.due_ms);
        } else if let Some(recurrence) = &task.recurrence {
            // Due instants that passed while it was paused are left out, whatever the task says of missed ones.
            let skip = Recurrence { missed: Missed::Skip, ..*recurrence };
            let Next { occurrence, left_out } = next(task, &skip, at.occurrence, now_ms);
            if let Some((from, count, how)) = left_out {
                self.record_left_out(id, task, from, count, how);
            }
            let Some(occurrence) = occurrence else {
                self.remove(id, task, at)?;
                return Ok(0);
            };
            to = first_attempt(occurrence_due(task, occurrence), occurrence);
        }
        let due_ms = to.due_ms;
        self.advance(id, task, at, to);
        Ok(due_ms)
    }
}
