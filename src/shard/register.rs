//! A new task. Touches: task, timeline, policy, dedup, sender.

use super::{Dedup, Effect, Register, Reply, Shard};
use crate::sabotage::Fault;
use crate::store::StoreError;
use crate::store::keys::Key;
use crate::store::rows::{DedupRow, Role, TaskRow};

impl Shard<'_, '_> {
    pub(super) fn register(&mut self, register: Register) -> Result<Reply, StoreError> {
        let Register { id, client, policy, due_ms, recurrence, tags, dedup, numbered, payload } = register;
        if let Some(numbered) = numbered
            && let Some(reply) = self.came_before(numbered)?
        {
            return Ok(reply);
        }
        if let Some(dedup) = dedup
            && !Fault::ForgetDedup.is_on()
            && let Some(reply) = self.registered_before(dedup)?
        {
            return Ok(reply);
        }
        let (policy, _) = *self
            .policies
            .get(usize::from(policy))
            .ok_or_else(|| StoreError::damaged("a log entry", "a registration names a policy that is not in it"))?;
        let task = TaskRow {
            client,
            policy,
            first_due_ms: due_ms,
            first_occurrence: 0,
            recurrence,
            version: 1,
            tags,
            role: Role::Own,
            payload,
        };
        self.add(id, &task);
        if let Some(Dedup { hash, expires_ms }) = dedup {
            self.rows.put(Key::dedup(self.group, hash), &DedupRow { id, due_ms, expires_ms });
            self.expiries.entry(expires_ms).or_default().push(hash);
        }
        if let Some(numbered) = numbered {
            self.remember(numbered, id, due_ms);
        }
        self.effects.push(Effect::Scheduled { id, due_ms });
        Ok(Reply::Registered { id, due_ms, duplicate: false })
    }

    /// The answer to the first registration with this key, unless it has expired.
    fn registered_before(&self, dedup: Dedup) -> Result<Option<Reply>, StoreError> {
        let known: Option<DedupRow> = self.rows.get("a deduplication key", &Key::dedup(self.group, dedup.hash))?;
        let Some(DedupRow { id, due_ms, expires_ms }) = known else { return Ok(None) };
        // The index of expiries may name it still, under the old one.
        Ok((expires_ms > self.meta.now_ms).then_some(Reply::Registered { id, due_ms, duplicate: true }))
    }

    /// One row for all keys of this batch that expire at one instant.
    pub(super) fn store_expiries(&mut self) {
        for (expires_ms, hashes) in std::mem::take(&mut self.expiries) {
            // Keys of two batches never share a place: the first of them lives until then.
            self.rows.put(Key::dedup_end(self.group, expires_ms, hashes[0]), &hashes);
        }
    }
}
