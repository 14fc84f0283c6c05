//! Registrations that are sent again, known by the number their sender gave them. Touches: sender.
//!
//! A client that gets no answer must send again, and must not store twice. A deduplication key does that for as long as
//! the client wishes, at the price of two rows for each task. Here the sender counts what it sends, and says with each
//! registration up to where it has had its answers (Ongaro's thesis on Raft, section 6.3): only what lies above that is
//! remembered, in one row for each sender.
//!
//! ```text
//!   answered_below 5            stored
//!   1 2 3 4 | 5 6 . 8           5 -> id, due   6 -> id, due   8 -> id, due      7 is under way, or lost
//! ```

use std::collections::btree_map::Entry;

use super::{Numbered, Reply, Shard};
use crate::sabotage::Fault;
use crate::store::StoreError;
use crate::store::keys::Key;
use crate::store::rows::{SenderRow, StoredRow};
use crate::task::{DedupHash, InstantMs, TaskId};

/// What is remembered of one sender in one shard: its row is written with each of its log entries.
const OPEN_MAX: usize = 2_048;

impl Shard<'_, '_> {
    /// The answer to a registration that is not to be stored; `None` for one that is new.
    pub(super) fn came_before(&mut self, numbered: Numbered) -> Result<Option<Reply>, StoreError> {
        let Numbered { sender, number, answered_below } = numbered;
        let row = match self.senders.entry(sender) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => {
                let stored = self.rows.get("a sender", &Key::sender(self.group, sender))?;
                unknown.insert(stored.unwrap_or_default())
            }
        };
        if answered_below > row.answered_below {
            row.answered_below = answered_below;
            let answered = row.stored.partition_point(|one| one.number < answered_below);
            row.stored.drain(..answered);
        }
        if Fault::ForgetDedup.is_on() {
            return Ok(None);
        }
        if number < row.answered_below {
            return Ok(Some(Reply::GivenUp));
        }
        if let Ok(place) = row.stored.binary_search_by_key(&number, |one| one.number) {
            let StoredRow { id, due_ms, .. } = row.stored[place];
            return Ok(Some(Reply::Registered { id, due_ms, duplicate: true }));
        }
        Ok((row.stored.len() >= OPEN_MAX).then_some(Reply::TooManyOpen { open_max: OPEN_MAX }))
    }

    /// What [`Shard::came_before`] is to answer next time.
    pub(super) fn remember(&mut self, numbered: Numbered, id: TaskId, due_ms: InstantMs) {
        let Numbered { sender, number, .. } = numbered;
        let row = self.senders.get_mut(&sender).expect("it was looked for before");
        let place = row.stored.partition_point(|one| one.number < number);
        row.stored.insert(place, StoredRow { number, id, due_ms });
        row.seen_ms = self.meta.now_ms;
    }

    /// One row for each sender that something was stored for in this batch.
    pub(super) fn store_senders(&mut self) {
        let now_ms = self.meta.now_ms;
        for (sender, row) in std::mem::take(&mut self.senders) {
            if row.seen_ms == now_ms {
                self.rows.put(Key::sender(self.group, sender), &row);
            }
        }
    }

    /// Goes, unless it was seen again since it was found.
    pub(super) fn forget_sender(&mut self, sender: DedupHash, seen_ms: InstantMs) -> Result<(), StoreError> {
        let key = Key::sender(self.group, sender);
        let row: Option<SenderRow> = self.rows.get("a sender", &key)?;
        // In the same batch it is not in the rows yet.
        if row.is_some_and(|row| row.seen_ms == seen_ms) && !self.senders.contains_key(&sender) {
            self.rows.delete(key);
        }
        Ok(())
    }
}
