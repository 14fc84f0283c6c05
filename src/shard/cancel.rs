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
        let occurrence = at.occurrence;
        self.end(id, &task, &at)?;
        Ok(match (claim, stand_in) {
            (Claim::MayBeOut { occurrence, attempt }, _) => Reply::TooLate { occurrence, attempt },
            (Claim::Unknown, _) => Reply::TooLate { occurrence, attempt: at.attempt },
            // This attempt is not out, but an earlier one of the same occurrence was.
            (Claim::NotDispatched, _) if at.attempt > 1 => Reply::TooLate { occurrence, attempt: at.attempt - 1 },
            (Claim::NotDispatched, Some(too_late)) => too_late,
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
            self.end(stand_in, &task, &at)?;
            let (_, occurrence) = shown_as(stand_in, &task, at.occurrence);
            reply = Some(Reply::TooLate { occurrence, attempt: at.attempt });
        }
        Ok(reply)
    }

    fn end(&mut self, id: TaskId, task: &TaskRow, at: &CursorRow) -> Result<(), StoreError> {
        let failure = at.failure.as_ref().map(|(failure, _)| failure.clone());
        self.record(id, task, at, Ended::Cancelled, 0, failure);
        self.remove(id, task, at)
    }
}
