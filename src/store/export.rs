//! A shard's rows as a stream, and back into a store.
//!
//! Out: a thread of its own pins a RocksDB snapshot and reads the shard's whole key range from it, `last applied` and
//! membership included, so that all of it is of one moment; the rows leave through a bounded channel, and dropping the
//! receiver ends the thread, and waits for its end. In: the rows become sorted files next to the database first (slow,
//! interruptible, no effect), and are then taken in by one atomic step that also drops whatever the shard held before.
//!
//! ```text
//!   pinned snapshot --chunks--> [ channel | network ] --chunks--> staging/x/clear.sst  range tombstone
//!                                                                 staging/x/rows.sst   the rows
//!                                                                 --- ingest, one step ---> state
//! ```

use std::path::PathBuf;

use super::engine::{Row, StagedRows};
use super::error::StoreError;
use super::keys::Key;
use super::rows::Applied;
use super::{Store, codec};
use crate::task::GroupId;

pub use super::engine::{Chunk, Chunks, Export};

/// Pins `group` as it is now. `head` names rows that are wanted before the rest.
pub async fn export(store: Store, group: GroupId, head: Vec<Key>) -> Result<Export, StoreError> {
    store.engine.export(group, head).await
}

/// Rows of a shard on their way in; nothing of it counts before [`Staged::ingest`]. What is there of them goes when it is
/// dropped.
pub struct Staging {
    group: GroupId,
    rows: Box<dyn StagedRows>,
    last: Option<Vec<u8>>,
    applied: Option<Applied>,
}

/// All rows of a shard.
pub struct Staged {
    group: GroupId,
    rows: Box<dyn StagedRows>,
    applied: Option<Applied>,
}

impl Staging {
    /// For `store`, which is to take it in. `folder` must not be in use by another.
    pub fn begin(store: &Store, group: GroupId, folder: PathBuf) -> Result<Self, StoreError> {
        let rows = store.engine.stage(group, folder)?;
        Ok(Self { group, rows, last: None, applied: None })
    }

    pub fn add(&mut self, rows: &[Row]) -> Result<(), StoreError> {
        let (from, until) = Key::group_range(self.group);
        let applied_key = Key::applied(self.group);
        for (key, value) in rows {
            if key.as_slice() < from.as_ref() || key.as_slice() >= until.as_ref() {
                return Err(StoreError::damaged("a snapshot", "it holds a row of another group"));
            }
            if self.last.as_ref().is_some_and(|last| last >= key) {
                return Err(StoreError::damaged("a snapshot", "its rows are not in order"));
            }
            self.rows.put(key, value)?;
            if key == applied_key.as_ref() {
                self.applied = Some(codec::decode("last applied", value)?);
            }
            self.last = Some(key.clone());
        }
        Ok(())
    }

    pub fn finish(self) -> Result<Staged, StoreError> {
        let Self { group, mut rows, applied, last: _ } = self;
        rows.finish()?;
        Ok(Staged { group, rows, applied })
    }
}

impl Staged {
    /// The moment these rows are of, as they say themselves.
    pub fn applied(&self) -> Option<Applied> {
        self.applied
    }

    /// Takes them into the store they were staged for, in one step: after a crash the shard is as before, or all new.
    pub fn ingest(self) -> Result<(), StoreError> {
        tracing::info!(group = %self.group, "taking in a snapshot");
        self.rows.ingest()
    }
}
