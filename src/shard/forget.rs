//! What has been kept long enough goes. Touches: dedup, sender, history.

use super::{Forget, Reply, Shard};
use crate::store::StoreError;
use crate::store::keys::Key;
use crate::store::rows::DedupRow;
use crate::task::DedupHash;

impl Shard<'_, '_> {
    pub(super) fn forget(&mut self, forget: Forget) -> Result<Reply, StoreError> {
        let Forget { dedup, senders, history_before } = forget;
        for (sender, seen_ms) in senders {
            self.forget_sender(sender, seen_ms)?;
        }
        for (expires_ms, first) in dedup {
            let index = Key::dedup_end(self.group, expires_ms, first);
            let hashes: Option<Vec<DedupHash>> = self.rows.get("expired deduplication keys", &index)?;
            let Some(hashes) = hashes.filter(|_| expires_ms <= self.meta.now_ms) else { continue };
            for hash in hashes {
                let key = Key::dedup(self.group, hash);
                let row: Option<DedupRow> = self.rows.get("a deduplication key", &key)?;
                // Registered again meanwhile, it has another expiry, and stands elsewhere in the index.
                if row.is_some_and(|row| row.expires_ms == expires_ms) {
                    self.rows.delete(key);
                }
            }
            self.rows.delete(index);
        }
        let (from, until) = Key::history_range(self.group, history_before.min(self.meta.now_ms));
        if from < until && history_before > 0 {
            self.rows.delete_range(from, until);
        }
        Ok(Reply::Stored)
    }
}
