//! What has been kept long enough goes. Touches: dedup, history.

use super::{Forget, Reply, Shard};
use crate::store::StoreError;
use crate::store::keys::Key;
use crate::store::rows::DedupRow;

impl Shard<'_, '_> {
    pub(super) fn forget(&mut self, forget: Forget) -> Result<Reply, StoreError> {
        let Forget { dedup, history_before } = forget;
        for (expires_ms, hash) in dedup {
            let key = Key::dedup(self.group, hash);
            let row: Option<DedupRow> = self.rows.get("a deduplication key", &key)?;
            // Registered again since it was found, it has another expiry, and its index another key.
            if expires_ms > self.meta.now_ms || row.is_none_or(|row| row.expires_ms != expires_ms) {
                continue;
            }
            self.rows.delete(key);
            self.rows.delete(Key::dedup_end(self.group, expires_ms, hash));
        }
        let (from, until) = Key::history_range(self.group, history_before.min(self.meta.now_ms));
        if from < until && history_before > 0 {
            self.rows.delete_range(from, until);
        }
        Ok(Reply::Stored)
    }
}
