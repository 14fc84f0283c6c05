//! What keeps the rows of a node, as the rest of the store sees it.
//!
//! [`rocks`](super::rocks) keeps them in files, [`memory`](super::memory) in the memory of a simulation. An engine knows
//! keys and values; what they mean, and that one of them is called "last applied", is known above it, by
//! [`Store`](super::Store).

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use futures::future::BoxFuture;
use tokio::sync::mpsc;

use super::error::StoreError;
use super::keys::Key;
use super::overlay::Write;
use crate::task::GroupId;

/// One key and its value.
pub type Row = (Vec<u8>, Vec<u8>);

/// One change of the log.
pub enum LogWrite {
    Put(Key, Vec<u8>),
    /// From the first key on and before the second.
    DeleteRange(Key, Key),
}

/// One of the two sets of rows of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// What was promised.
    Log,
    /// What the log amounts to.
    State,
}

impl Family {
    /// For errors.
    pub(super) fn shown(self) -> &'static str {
        match self {
            Self::Log => "the log",
            Self::State => "state",
        }
    }
}

/// What keeps the two families of rows of a node.
///
/// Order:
/// 1. A call that writes is one batch: of its changes, which take effect in their order, a crash leaves all or none.
/// 2. When the call returns, everybody reads what it wrote.
/// 3. What a crash leaves of a family is what the first so many calls wrote, in the order in which they returned; never a
///    later one without all earlier ones.
///
/// Durability:
/// 4. The log outlives the process from the moment the call returns, and a loss of power once a
///    [`sync_log`](Engine::sync_log) that began later has returned. A loss of power may leave some of what was not synced.
/// 5. The state is durable once it was flushed, by [`flush_state`](Engine::flush_state) or by the engine itself, whenever it
///    likes. The end of the process loses what was not.
/// 6. Before any of the state is flushed, the log that was written before it is durable. So after a crash the state is
///    never ahead of the log that it came from.
/// 7. [`get_durable_state`](Engine::get_durable_state) reads what would be left of the state if power were lost now.
///
/// A write that failed may have happened or not, and nothing may be written after it.
///
/// Calls may wait for the disk, so they are made where a thread may be blocked. Any number of threads may read; writers take
/// turns, and [`Writer`](super::writer::Writer) sees to it that they do not queue up here.
pub trait Engine: Send + Sync {
    /// Writes to the log; durable after the next [`Engine::sync_log`].
    fn write_log(&self, changes: Vec<LogWrite>) -> Result<(), StoreError>;

    /// Returns when everything that was written to the log before this call is on disk.
    fn sync_log(&self) -> Result<(), StoreError>;

    /// Writes to the state. [`Write`] says what has to hold of a row that is written once: an engine relies on it.
    fn write_state(&self, writes: &mut dyn Iterator<Item = (Key, Write)>) -> Result<(), StoreError>;

    /// Makes the state durable as it is now; returns before that when `wait` is false.
    fn flush_state(&self, wait: bool) -> Result<(), StoreError>;

    fn get(&self, family: Family, key: &Key) -> Result<Option<Vec<u8>>, StoreError>;

    /// The values of `keys`, in their order.
    fn get_state_many(&self, keys: &[Key]) -> Result<Vec<Option<Vec<u8>>>, StoreError>;

    fn get_durable_state(&self, key: &Key) -> Result<Option<Vec<u8>>, StoreError>;

    /// At most `limit` rows from `from` on and before `until`, in key order, as of one moment.
    fn scan(&self, family: Family, from: &Key, until: &Key, limit: usize) -> Result<Vec<Row>, StoreError>;

    /// At most `limit` rows before `until` and down to `from`, the last one first, as of one moment.
    fn scan_back(&self, family: Family, from: &Key, until: &Key, limit: usize) -> Result<Vec<Row>, StoreError>;

    /// All rows from `from` on and before `until`, or to the end of the family, as they are at the moment of this call,
    /// however long it takes to read them.
    fn pin(&self, family: Family, from: &Key, until: Option<&Key>) -> Box<dyn PinnedRows + '_>;

    /// The state of `group` as it is now, and first of all the rows of it named by `head`; see [`super::export`].
    fn export(self: Arc<Self>, group: GroupId, head: Vec<Key>) -> BoxFuture<'static, Result<Export, StoreError>>;

    /// A place for rows that are to become the state of `group`. An engine that needs files has them in `folder`, which is
    /// nobody else's, and goes with what is returned.
    fn stage(&self, group: GroupId, folder: PathBuf) -> Result<Box<dyn StagedRows>, StoreError>;

    /// Bytes of memory for what is not yet flushed.
    fn memtable_bytes(&self) -> u64 {
        0
    }

    /// Bytes of memory for what is read again.
    fn cache_bytes(&self) -> u64 {
        0
    }

    /// To be called when much has been written or removed: fits the memory for what is read again to what is stored.
    fn fit_cache(&self) {}

    /// Whether writers are made to wait: for a flush, or until there is room on the disk.
    fn writes_stopped(&self) -> bool {
        false
    }

    /// Merges every file of the state, so that a test meets what that makes of it.
    #[cfg(test)]
    fn compact_state(&self) {}
}

/// Key and value of a row, as long as nothing else is read.
pub type BorrowedRow<'a> = (&'a [u8], &'a [u8]);

/// Rows of one moment, read once, in key order.
pub trait PinnedRows {
    /// The next key and its value; `None` after the last.
    fn next(&mut self) -> Result<Option<BorrowedRow<'_>>, StoreError>;
}

/// Rows that are put aside for a group. None of them is part of the state before [`StagedRows::ingest`]; dropping this
/// removes them.
pub trait StagedRows: Send {
    /// Keys come in ascending order.
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError>;

    /// After the last row: leaves [`StagedRows::ingest`] as little to do as possible.
    fn finish(&mut self) -> Result<(), StoreError>;

    /// Replaces all that the state holds of the group by these rows, in one step that is durable when this returns: after a
    /// crash the group is as before, or all new.
    fn ingest(self: Box<Self>) -> Result<(), StoreError>;
}

/// Chunks on their way from disk to whoever takes them.
const CHUNKS_AHEAD: usize = 4;

/// Some rows, in key order, after all earlier ones.
pub type Chunk = Result<Vec<Row>, StoreError>;

/// A pinned moment of a shard.
pub struct Export {
    /// The rows at `head` of the moment that is pinned, in the order asked for.
    pub head: Vec<Option<Vec<u8>>>,
    pub chunks: Chunks,
}

/// The rows on their way. The thread that reads them does not outlive this: it holds the database, which must not be closed
/// by whoever happens to be last while the process takes its statics down.
pub struct Chunks {
    rows: mpsc::Receiver<Chunk>,
    reader: Option<JoinHandle<()>>,
}

impl Chunks {
    /// For the rows of an export.
    pub(super) fn channel() -> (mpsc::Sender<Chunk>, mpsc::Receiver<Chunk>) {
        mpsc::channel(CHUNKS_AHEAD)
    }

    /// What `reader` sends; it ends when nobody receives any more.
    pub(super) fn read_by(reader: JoinHandle<()>, rows: mpsc::Receiver<Chunk>) -> Self {
        Self { rows, reader: Some(reader) }
    }

    /// Sent by whoever needs no thread for it.
    pub(super) fn without_thread(rows: mpsc::Receiver<Chunk>) -> Self {
        Self { rows, reader: None }
    }

    /// The next rows; `None` after the last.
    pub async fn recv(&mut self) -> Option<Chunk> {
        self.rows.recv().await
    }
}

impl Drop for Chunks {
    fn drop(&mut self) {
        self.rows.close();
        // What it waits to send is refused; at most one chunk is still being read.
        if let Some(reader) = self.reader.take() {
            let ended = reader.join();
            assert!(ended.is_ok() || std::thread::panicking(), "reading rows does not panic");
        }
    }
}
