//! The end of a task before its time. Touches: task, timeline, cursor, policy.
//!
//! Whatever the answer, no further attempt or occurrence follows; the answer says whether one may be out already.

use super::{Cancel, Claim, Reply, Shard};
use crate::store::StoreError;

impl Shard<'_, '_> {
    pub(super) fn cancel(&mut self, cancel: Cancel) -> Result<Reply, StoreError> {
        let Cancel { id, owner, claim } = cancel;
        let Some(task) = self.task(id)? else { return Ok(Reply::NotFound) };
        // Another client's task is not found rather than forbidden: ids of others are not confirmed.
        if owner.is_some_and(|owner| owner != task.client) {
            return Ok(Reply::NotFound);
        }
        let at = self.cursor(id, &task)?;
        self.remove(id, &task, at);
        let occurrence = at.occurrence;
        Ok(match claim {
            Claim::MayBeOut { occurrence, attempt } => Reply::TooLate { occurrence, attempt },
            Claim::Unknown => Reply::TooLate { occurrence, attempt: at.attempt },
            // This attempt is not out, but an earlier one of the same occurrence was.
            Claim::NotDispatched if at.attempt > 1 => Reply::TooLate { occurrence, attempt: at.attempt - 1 },
            Claim::NotDispatched => Reply::Cancelled,
        })
    }
}
