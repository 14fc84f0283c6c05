//! Changes to a task that a client asks for: edit, pause, resume. Touches: task, timeline, cursor, policy, history.
//!
//! An edit happens only if no attempt is out and the task can do with it, and says so otherwise: then nothing is changed.

use super::{Change, Claim, Edit, Effect, Pause, Reply, Shard};
use crate::store::StoreError;
use crate::store::rows::{CursorRow, NEVER, TaskRow};
use crate::task::{Invalid, Policy};

impl Shard<'_, '_> {
    pub(super) fn edit(&mut self, edit: Edit) -> Result<Reply, StoreError> {
        let Edit { id, owner, claim, version, change } = edit;
        let Some(before) = self.owned(id, owner.as_ref())? else { return Ok(Reply::NotFound) };
        if version.is_some_and(|version| version != before.version) {
            return Ok(Reply::Conflict { version: before.version });
        }
        if let Err(why) = self.check(&before, &change)? {
            return Ok(Reply::Unfit(why));
        }
        let at = self.cursor(id, &before)?;
        if let Some((occurrence, attempt)) = self.may_be_out(claim, &at) {
            return Ok(Reply::TooLate { occurrence, attempt });
        }
        let Change { due_ms, payload, callback, retry, dead_letter } = change;
        let mut task = before.clone();
        task.version += 1;
        task.payload = payload.unwrap_or(task.payload);
        if callback.is_some() || retry.is_some() || dead_letter.is_some() {
            let known = self.policy(before.policy)?;
            task.policy = self.bring(Policy {
                callback: callback.unwrap_or(known.callback),
                retry: retry.unwrap_or(known.retry),
                dead_letter: dead_letter.unwrap_or(known.dead_letter),
            });
        }
        // Not out, so this attempt never was: it leaves as the new version.
        let mut to = CursorRow { out_due_ms: None, ..at.clone() };
        if let Some(due_ms) = due_ms {
            // The occurrence moves, and those after it follow from there.
            task.first_due_ms = due_ms.min(NEVER - 1);
            task.first_occurrence = at.occurrence;
            if !at.is_paused() {
                to.due_ms = task.first_due_ms;
            }
        }
        // All rows of the task anew: where it stands is told by how that differs from its first occurrence.
        self.unschedule(id, &before, &at);
        self.replace(id, &before, &task);
        self.schedule(id, &task, &to);
        self.effects.push(Effect::Scheduled { id, due_ms: to.due_ms });
        Ok(Reply::Edited { version: task.version, due_ms: to.due_ms })
    }

    /// Whether the task could still be delivered, and end, as it would be then.
    fn check(&self, task: &TaskRow, change: &Change) -> Result<Result<(), Invalid>, StoreError> {
        if let (Some(recurrence), Some(due_ms)) = (&task.recurrence, change.due_ms)
            && let Err(why) = recurrence.validate(Some(due_ms))
        {
            return Ok(Err(why));
        }
        let payload_bytes = change.payload.as_ref().unwrap_or(&task.payload).len();
        if Policy::takes_any(payload_bytes) {
            return Ok(Ok(()));
        }
        let mut policy = self.policy(task.policy)?;
        policy.callback = change.callback.clone().unwrap_or(policy.callback);
        policy.dead_letter = change.dead_letter.clone().unwrap_or(policy.dead_letter);
        Ok(policy.check_payload(payload_bytes))
    }

    pub(super) fn pause(&mut self, pause: Pause) -> Result<Reply, StoreError> {
        let Pause { id, owner, paused, claim } = pause;
        let Some(task) = self.owned(id, owner.as_ref())? else { return Ok(Reply::NotFound) };
        let at = self.cursor(id, &task)?;
        let out = self.may_be_out(claim, &at);
        if !paused {
            let due_ms = if at.is_paused() { self.resume(id, &task, &at, out.is_some())? } else { at.due_ms };
            return Ok(Reply::Resumed { due_ms });
        }
        if !at.is_paused() {
            let to = CursorRow { due_ms: NEVER, out_due_ms: out.map(|_| at.due_ms), ..at.clone() };
            self.unschedule(id, &task, &at);
            self.schedule(id, &task, &to);
            // No effect: an attempt that is out stays out, and what waits is held back by whoever asked.
        }
        Ok(Reply::Paused { out })
    }

    /// The attempt that may be out, going by what the leader claims. An attempt before the one the task stands at has been
    /// settled since the claim, and nothing has left after it.
    fn may_be_out(&self, claim: Claim, at: &CursorRow) -> Option<(u64, u32)> {
        match claim {
            Claim::NotDispatched => None,
            Claim::MayBeOut { occurrence, attempt } => {
                ((occurrence, attempt) >= (at.occurrence, at.attempt)).then_some((occurrence, attempt))
            }
            Claim::Unknown => self.was_armed(at).then_some((at.occurrence, at.attempt)),
        }
    }
}
