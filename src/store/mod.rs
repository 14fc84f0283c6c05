//! What is on disk: one RocksDB per node, two column families, one encoding.
//!
//! ```text
//!   log    group | kind | index            with WAL      the Raft log: what was promised
//!   state  group | tag  | fields           without WAL   what the log amounts to, a little behind on disk
//! ```
//!
//! `log` is the write-ahead log of `state`: after a crash `state` reopens at an older consistent point (a flush takes
//! whole batches, in order, and each batch carries `last applied`) and the Raft log replays the rest. That rests on
//! three duties, kept by `raft` with what is here: log entries are removed only below what [`Store::durable_applied`]
//! says, rows and `last applied` travel in one batch, and the vote lies in the same WAL as the entries.
//!
//! This room holds no scheduling rules: it knows keys and rows, not what they mean.
//!
//! - [`engine`]: what keeps the rows, as a contract; kept in files by `rocks`, in a simulation by [`memory`]
//! - [`keys`]: the order of everything stored; [`rows`]: what the values hold; [`codec`]: their bytes
//! - [`overlay`]: the writes of one `apply`, readable before they are stored
//! - [`writer`]: all writes of a node's groups, by one thread; [`syncer`]: one fsync for all of them
//! - [`folder`]: who may open a data folder; [`space`]: room on the disk
//! - [`wal`]: damage that RocksDB would not get past
//! - [`export`]: a shard's rows as a stream, and back
//! - [`flags`]: its settings

pub mod codec;
pub mod engine;
mod error;
pub mod export;
pub mod flags;
pub mod folder;
pub mod keys;
pub mod memory;
pub mod overlay;
mod rocks;
pub mod rows;
pub mod space;
pub mod syncer;
pub mod wal;
pub mod writer;

use std::path::Path;
use std::sync::Arc;

pub use engine::{LogWrite, Row};
pub use error::StoreError;

use crate::sabotage::Fault;
use crate::task::GroupId;
use engine::{Engine, Family, PinnedRows};
use keys::Key;
use overlay::{Rows, Write};
use rocks::RocksEngine;
use rows::Applied;

/// See [`Store::fit_cache`]: enough for some hundred million rows.
pub const CACHE_BYTES_MAX_DEFAULT: usize = 256 * 1024 * 1024;

/// A handle on what a node has stored; cheap to clone. What may be relied on is told at [`Engine`].
#[derive(Clone)]
pub struct Store {
    engine: Arc<dyn Engine>,
}

impl Store {
    /// Opens the database in `path`, whose folder the caller has locked, and makes it if it is not there.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_with(path, CACHE_BYTES_MAX_DEFAULT)
    }

    /// With a cache of blocks that grows with what is stored, up to `cache_bytes_max`.
    pub fn open_with(path: &Path, cache_bytes_max: usize) -> Result<Self, StoreError> {
        Ok(Self::on(RocksEngine::open(path, cache_bytes_max)?))
    }

    /// Opens the database in `path` for reading, as it is at this moment, and changes nothing in that folder; writes are
    /// refused. Nobody may have it open now; what others do to it later is not seen.
    pub fn open_read_only(path: &Path) -> Result<Self, StoreError> {
        Ok(Self::on(RocksEngine::open_read_only(path)?))
    }

    fn on(engine: impl Engine + 'static) -> Self {
        Self { engine: Arc::new(engine) }
    }

    /// Stores all of `writes` or, after a crash, none.
    pub fn write_state(&self, writes: impl IntoIterator<Item = (Key, Write)>) -> Result<(), StoreError> {
        self.engine.write_state(&mut writes.into_iter())
    }

    pub fn get_state(&self, key: &Key) -> Result<Option<Vec<u8>>, StoreError> {
        self.engine.get(Family::State, key)
    }

    /// The values of `keys`, in their order.
    pub fn get_state_many(&self, keys: &[Key]) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        self.engine.get_state_many(keys)
    }

    /// At most `limit` rows from `from` on and before `until`, in key order.
    pub fn scan_state(&self, from: &Key, until: &Key, limit: usize) -> Result<Vec<Row>, StoreError> {
        self.engine.scan(Family::State, from, until, limit)
    }

    /// At most `limit` rows before `until` and down to `from`, the last one first.
    pub fn scan_state_back(&self, from: &Key, until: &Key, limit: usize) -> Result<Vec<Row>, StoreError> {
        self.engine.scan_back(Family::State, from, until, limit)
    }

    /// What `group` had applied in the state that would be there after losing power now.
    pub fn durable_applied(&self, group: GroupId) -> Result<Option<Applied>, StoreError> {
        let value = self.engine.get_durable_state(&Key::applied(group))?;
        value.map(|bytes| codec::decode("last applied", &bytes)).transpose()
    }

    /// Makes everything applied so far durable; waits for it when `wait` is set.
    pub fn flush_state(&self, wait: bool) -> Result<(), StoreError> {
        self.engine.flush_state(wait)
    }

    /// Writes to the log without waiting for the disk: readable at once, durable after the next [`Store::sync_log`].
    pub fn write_log(&self, changes: Vec<LogWrite>) -> Result<(), StoreError> {
        self.engine.write_log(changes)
    }

    /// Waits until everything written to the log so far is on disk.
    pub fn sync_log(&self) -> Result<(), StoreError> {
        if Fault::SkipFsync.is_on() {
            return Ok(());
        }
        self.engine.sync_log()
    }

    pub fn get_log(&self, key: &Key) -> Result<Option<Vec<u8>>, StoreError> {
        self.engine.get(Family::Log, key)
    }

    /// At most `limit` rows from `from` on and before `until`, in key order.
    pub fn scan_log(&self, from: &Key, until: &Key, limit: usize) -> Result<Vec<Row>, StoreError> {
        self.engine.scan(Family::Log, from, until, limit)
    }

    /// The last row before `until`, if it is not before `from`.
    pub fn last_log(&self, from: &Key, until: &Key) -> Result<Option<Row>, StoreError> {
        Ok(self.engine.scan_back(Family::Log, from, until, 1)?.pop())
    }

    /// See [`Engine::pin`].
    pub fn pin(&self, family: Family, from: &Key, until: Option<&Key>) -> Box<dyn PinnedRows + '_> {
        self.engine.pin(family, from, until)
    }

    /// See [`Engine::memtable_bytes`].
    pub fn memtable_bytes(&self) -> u64 {
        self.engine.memtable_bytes()
    }

    /// See [`Engine::cache_bytes`].
    pub fn cache_bytes(&self) -> u64 {
        self.engine.cache_bytes()
    }

    /// See [`Engine::fit_cache`].
    pub fn fit_cache(&self) {
        self.engine.fit_cache();
    }

    /// See [`Engine::writes_stopped`].
    pub fn writes_stopped(&self) -> bool {
        self.engine.writes_stopped()
    }

    /// See [`Engine::compact_state`].
    #[cfg(test)]
    pub fn compact_state(&self) {
        self.engine.compact_state();
    }
}

impl Rows for Store {
    fn get(&self, key: &Key) -> Result<Option<Vec<u8>>, StoreError> {
        self.get_state(key)
    }

    fn get_many(&self, keys: &[Key]) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        self.get_state_many(keys)
    }
}
