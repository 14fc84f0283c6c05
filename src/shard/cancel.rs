//! The end of a task before its time. Touches: task, timeline, cursor, policy, stand-ins, history.
//!
//! Whatever the answer, no further attempt or occurrence follows; the answer says whether one may be out already.

use super::{Cancel, Claim, Reply, Shard, shown_as};
use crate::store::StoreError;
use crate::store::keys::Key;
use crate::store::rows::{CursorRow, Ended, StandInsRow, TaskRow};
use crate::task::{ClientId, TaskId};

impl Shard<'_, '_> {
    pub(super) fn cancel(&mut self, cancel: Cancel) -> Result<Reply, StoreError> {
        let Cancel { id, owner, claim } = cancel;
        let stand_in = self.cancel_stand_ins(id, owner.as_ref())?;
        let Some(task) = self.owned(id, owner.as_ref())? else { return Ok(stand_in.unwrap_or(Reply::NotFound)) };
        let at = self.cursor(id, &task)?;
        let claim = if self.was_armed(&at) || claim != Claim::Unknown { claim } else { Claim::NotDispatched };
        let attempts = if claim == Claim::NotDispatched { at.attempt - 1 } else { at.attempt };
        self.end(id, &task, &at, attempts)?;
        // A stand-in goes out as another task's occurrence.
        let too_late = |occurrence, attempt| Reply::TooLate { occurrence: shown_as(id, &task, occurrence).1, attempt };
        Ok(match (claim, stand_in) {
            (Claim::MayBeOut { occurrence, attempt }, _) => too_late(occurrence, attempt),
            (Claim::Unknown, _) => too_late(at.occurrence, at.attempt),
            // This attempt is not out, but an earlier one of the same occurrence was.
            (Claim::NotDispatched, _) if at.attempt > 1 => too_late(at.occurrence, at.attempt - 1),
            (Claim::NotDispatched, Some(stand_in)) => stand_in,
            (Claim::NotDispatched, None) => Reply::Cancelled,
        })
    }

    /// Ends what goes out in the name of a task. Nobody held it back, so the last of it may be out.
    fn cancel_stand_ins(&mut self, id: TaskId, owner: Option<&ClientId>) -> Result<Option<Reply>, StoreError> {
        let stand_ins: Option<StandInsRow> = self.rows.get("stand-ins", &Key::stand_ins(self.group, id))?;
        let mut reply = None;
        for stand_in in stand_ins.unwrap_or_default().0 {
            let Some(task) = self.owned(stand_in, owner)? else { continue };
            let at = self.cursor(stand_in, &task)?;
            self.end(stand_in, &task, &at, at.attempt)?;
            let (_, occurrence) = shown_as(stand_in, &task, at.occurrence);
            reply = Some(Reply::TooLate { occurrence, attempt: at.attempt });
        }
        Ok(reply)
    }

    /// `attempts` have left, or may have.
    fn end(&mut self, id: TaskId, task: &TaskRow, at: &CursorRow, attempts: u32) -> Result<(), StoreError> {
        let failure = at.failure.as_ref().map(|(failure, _)| failure.clone());
        let left = CursorRow { attempt: attempts, ..at.clone() };
        self.record(id, task, &left, Ended::Cancelled, 0, failure);
        self.remove(id, task, at)
    }
}
