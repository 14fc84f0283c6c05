//! A new task. Touches: task, timeline, policy.

use super::{Effect, Register, Reply, Shard};
use crate::store::StoreError;
use crate::store::keys::Key;
use crate::store::rows::{TaskRow, TimelineRow};

/// About what a task row takes besides its payload and the client's name.
const TASK_ROW_BYTES: usize = 48;
const TIMELINE_ROW_BYTES: usize = 8;

impl Shard<'_, '_> {
    pub(super) fn register(&mut self, register: Register) -> Result<Reply, StoreError> {
        let Register { id, client, policy, due_ms, interval_ms, payload } = register;
        let policy = self
            .policies
            .get(usize::from(policy))
            .ok_or_else(|| StoreError::damaged("a log entry", "a registration names a policy that is not in it"))?
            .id();
        let bytes = TASK_ROW_BYTES + payload.len() + client.as_str().len();
        let task = TaskRow { client, policy, first_due_ms: due_ms, interval_ms, payload };
        self.rows.put_once(Key::task(self.group, id), &task, bytes);
        let first = TimelineRow { occurrence: 0, attempt: 1 };
        self.rows.put_once(Key::timeline(self.group, due_ms, id), &first, TIMELINE_ROW_BYTES);
        *self.policy_changes.entry(policy).or_default() += 1;
        self.meta.pending += 1;
        self.effects.push(Effect::Scheduled { id, due_ms });
        Ok(Reply::Registered { id, due_ms })
    }
}
