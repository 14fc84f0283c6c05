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
//! - [`keys`]: the order of everything stored; [`rows`]: what the values hold; [`codec`]: their bytes
//! - [`overlay`]: the writes of one `apply`, readable before they are stored
//! - [`writer`]: all writes of a node's groups, by one thread; [`syncer`]: one fsync for all of them
//! - [`folder`]: who may open a data folder; [`space`]: room on the disk
//! - [`wal`]: damage that RocksDB would not get past; [`memory`]: a disk in memory, for a simulation
//! - [`export`]: a shard's rows as a stream, and back; [`dump`]: everything stored, for people

pub mod codec;
pub mod dump;
pub mod export;
pub mod folder;
pub mod keys;
pub mod memory;
pub mod overlay;
pub mod rows;
pub mod space;
pub mod syncer;
pub mod wal;
pub mod writer;

use std::path::Path;
use std::sync::Arc;

use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, BoundColumnFamily, Cache, ColumnFamilyDescriptor, DBCompactionStyle,
    DBCompressionType, DBWithThreadMode, FlushOptions, MultiThreaded, Options, ReadOptions, ReadTier, SliceTransform,
    UniversalCompactOptions, WriteBatch, WriteBufferManager, WriteOptions,
};

use crate::sabotage::Fault;
use crate::task::GroupId;
use keys::Key;
use overlay::Write;
use rows::Applied;

const LOG_FAMILY: &str = "log";
const STATE_FAMILY: &str = "state";

const MIB: usize = 1024 * 1024;

/// The most memory all memtables take together; beyond it the largest is flushed.
const WRITE_BUFFERS_BYTES_MAX: usize = 32 * MIB;
/// A small memtable is flushed often, in short writes that delay an fsync beside them little.
const WRITE_BUFFER_BYTES: usize = 8 * MIB;
const WRITE_BUFFERS_PER_FAMILY_MAX: i32 = 4;
/// Room for rows that are read again. What the open files need for their indexes and filters comes on top; see
/// [`Store::fit_cache`].
const DATA_CACHE_BYTES: usize = 16 * MIB;
/// What the indexes and filters of a file take for each of its rows, measured: 0.4 to 1.3 bytes by the kind of row.
const INDEX_BYTES_PER_ROW: usize = 2;
/// A part of an index or a filter: what is read at once when it is not in the cache.
const INDEX_PART_BYTES: usize = 4 * 1024;
/// A filter of each memtable, so that a row that is not there costs no walk through it: 84 KB, some 10 bits for each row
/// of those that are read one by one.
const MEMTABLE_FILTER_RATIO: f64 = 0.01;
/// RocksDB asks the disk to begin writing after this much, so that no fsync meets a backlog.
const BYTES_PER_SYNC: u64 = MIB as u64;
/// Closed WAL files beyond this force the flush of the memtables that still need them.
const WAL_BYTES_MAX: u64 = 256 * MIB as u64;
const OPEN_FILES_MAX: i32 = 512;
/// One that flushes and two that compact: a merge of much must not hold up those of little.
const BACKGROUND_JOBS: i32 = 3;
/// Entries of the log are deleted soon, so merging its files early would copy what nobody will read.
const LOG_FILES_TO_MERGE: i32 = 20;
const LOG_FILES_MAX: i32 = 60;
/// Files of the state of about one size that are merged into one.
const STATE_FILES_TO_MERGE: i32 = 6;
const STATE_FILES_MAX: i32 = 40;
/// In percent: files that differ by less count as of one size.
const STATE_SIZE_RATIO: i32 = 10;
const BLOOM_BITS_PER_KEY: f64 = 10.0;

/// See [`Store::fit_cache`]: enough for some hundred million rows.
pub const CACHE_BYTES_MAX_DEFAULT: usize = 256 * MIB;

/// A storage error is the node's end: whoever meets one stops rather than answers.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot {verb} {what}: {source}")]
    Rocks { verb: &'static str, what: &'static str, source: rocksdb::Error },
    #[error("{what} is damaged: {why}")]
    Damaged { what: &'static str, why: String },
    #[error("cannot {verb} {path}: {source}")]
    File { verb: &'static str, path: String, source: std::io::Error },
    #[error(transparent)]
    Folder(#[from] folder::FolderError),
}

impl StoreError {
    fn rocks(verb: &'static str, what: &'static str) -> impl FnOnce(rocksdb::Error) -> Self {
        move |source| Self::Rocks { verb, what, source }
    }

    pub(crate) fn damaged(what: &'static str, why: impl Into<String>) -> Self {
        Self::Damaged { what, why: why.into() }
    }

    fn file(verb: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.display().to_string();
        move |source| Self::File { verb, path, source }
    }
}

impl From<StoreError> for std::io::Error {
    fn from(error: StoreError) -> Self {
        std::io::Error::other(error)
    }
}

pub(crate) type Db = DBWithThreadMode<MultiThreaded>;

/// A handle on the node's database; cheap to clone.
#[derive(Clone)]
pub struct Store {
    backend: Backend,
}

/// Where it is.
#[derive(Clone)]
enum Backend {
    Rocks(Rocks),
    /// In a simulation.
    Memory(memory::Mounted),
}

#[derive(Clone)]
struct Rocks {
    db: Arc<Db>,
    cache: Cache,
    cache_bytes_max: usize,
}

impl Rocks {
    fn log(&self) -> Arc<BoundColumnFamily<'_>> {
        self.db.cf_handle(LOG_FAMILY).expect("opened with this family")
    }

    fn state(&self) -> Arc<BoundColumnFamily<'_>> {
        self.db.cf_handle(STATE_FAMILY).expect("opened with this family")
    }

    fn scan(
        &self,
        family: &Arc<BoundColumnFamily<'_>>,
        from: &Key,
        until: &Key,
        limit: usize,
        what: &'static str,
    ) -> Result<Vec<Row>, StoreError> {
        let mut options = scan_options();
        options.set_iterate_upper_bound(until.as_ref());
        let mut rows = Vec::with_capacity(limit.min(1024));
        let mut iterator = self.db.raw_iterator_cf_opt(family, options);
        iterator.seek(from);
        while rows.len() < limit {
            let Some((key, value)) = iterator.item() else { break };
            rows.push((key.to_vec(), value.to_vec()));
            iterator.next();
        }
        iterator.status().map_err(StoreError::rocks("scan", what))?;
        Ok(rows)
    }
}

/// One key and its value, as an iterator finds them.
pub type Row = (Vec<u8>, Vec<u8>);

impl Store {
    /// Opens the database in `folder`, which the caller has locked, and makes it if it is not there.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_with(path, CACHE_BYTES_MAX_DEFAULT)
    }

    /// With a cache of blocks that grows with what is stored, up to `cache_bytes_max`.
    pub fn open_with(path: &Path, cache_bytes_max: usize) -> Result<Self, StoreError> {
        wal::disarm(path)?;
        let buffers = WriteBufferManager::new_write_buffer_manager(WRITE_BUFFERS_BYTES_MAX, false);
        let cache = Cache::new_lru_cache(DATA_CACHE_BYTES.min(cache_bytes_max));
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_write_buffer_manager(&buffers);
        // One writes at a time (see `writer`): nobody has to spin for a turn, or to share a memtable while it is filled.
        options.set_allow_concurrent_memtable_write(false);
        options.set_enable_write_thread_adaptive_yield(false);
        options.set_max_background_jobs(BACKGROUND_JOBS);
        options.set_bytes_per_sync(BYTES_PER_SYNC);
        options.set_wal_bytes_per_sync(BYTES_PER_SYNC);
        options.set_max_total_wal_size(WAL_BYTES_MAX);
        options.set_max_open_files(OPEN_FILES_MAX);
        options.set_keep_log_file_num(3);
        // An idle node does not wake up to write statistics that nobody reads.
        options.set_stats_dump_period_sec(0);
        options.set_stats_persist_period_sec(0);

        let families = [
            ColumnFamilyDescriptor::new(LOG_FAMILY, family_options(&cache)),
            ColumnFamilyDescriptor::new(STATE_FAMILY, state_options(&cache)),
        ];
        let db =
            Db::open_cf_descriptors(&options, path, families).map_err(StoreError::rocks("open", "the database"))?;
        let store = Self { backend: Backend::Rocks(Rocks { db: Arc::new(db), cache, cache_bytes_max }) };
        store.fit_cache();
        // A persisted read skips the memtables only once a write without WAL has completed since the start.
        store.write_state(std::iter::once((Key::node_opened(), Write::Put(Vec::new()))))?;
        Ok(store)
    }

    /// Makes room in the cache for the indexes and filters of all that is stored, as far as memory is granted: one that
    /// is not there is read from the disk for every row that is looked for. To be called when files have come or gone.
    pub fn fit_cache(&self) {
        let Backend::Rocks(rocks) = &self.backend else { return };
        let Ok(files) = rocks.db.live_files() else { return };
        let rows = files.iter().map(|file| usize::try_from(file.num_entries).unwrap_or(usize::MAX));
        let rows = rows.fold(0, usize::saturating_add);
        let wanted = DATA_CACHE_BYTES.saturating_add(rows.saturating_mul(INDEX_BYTES_PER_ROW));
        rocks.cache.clone().set_capacity(wanted.min(rocks.cache_bytes_max));
    }

    /// Bytes of blocks, indexes and filters that are in memory.
    pub fn cache_bytes(&self) -> u64 {
        let Backend::Rocks(rocks) = &self.backend else { return 0 };
        rocks.cache.get_usage() as u64
    }

    /// Stores all of `writes` or, after a crash, none.
    pub fn write_state(&self, writes: impl IntoIterator<Item = (Key, Write)>) -> Result<(), StoreError> {
        let rocks = match &self.backend {
            Backend::Rocks(rocks) => rocks,
            Backend::Memory(memory) => {
                memory.write_state(writes);
                return Ok(());
            }
        };
        let state = rocks.state();
        let mut batch = WriteBatch::default();
        for (key, write) in writes {
            match write {
                Write::Put(value) | Write::PutOnce(value) => batch.put_cf(&state, key, value),
                Write::Delete => batch.delete_cf(&state, key),
                Write::DeleteOnce => batch.single_delete_cf(&state, key),
                Write::ReplaceOnce(value) => {
                    batch.single_delete_cf(&state, &key);
                    batch.put_cf(&state, key, value);
                }
                Write::DeleteRange(until) => batch.delete_range_cf(&state, key, until),
            }
        }
        let mut options = WriteOptions::default();
        options.disable_wal(true);
        rocks.db.write_opt(batch, &options).map_err(StoreError::rocks("write", "state"))
    }

    pub fn get_state(&self, key: &Key) -> Result<Option<Vec<u8>>, StoreError> {
        match &self.backend {
            Backend::Rocks(rocks) => rocks.db.get_cf(&rocks.state(), key).map_err(StoreError::rocks("read", "state")),
            Backend::Memory(memory) => Ok(memory.get_state(key)),
        }
    }

    /// The values of `keys`, in their order.
    pub fn get_state_many(&self, keys: &[Key]) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        let rocks = match &self.backend {
            Backend::Rocks(rocks) => rocks,
            Backend::Memory(memory) => return Ok(keys.iter().map(|key| memory.get_state(key)).collect()),
        };
        let values = rocks.db.batched_multi_get_cf_opt(&rocks.state(), keys, false, &ReadOptions::default());
        values
            .into_iter()
            .map(|value| Ok(value.map_err(StoreError::rocks("read", "state"))?.map(|slice| slice.to_vec())))
            .collect()
    }

    /// At most `limit` rows from `from` on and before `until`, in key order.
    pub fn scan_state(&self, from: &Key, until: &Key, limit: usize) -> Result<Vec<Row>, StoreError> {
        match &self.backend {
            Backend::Rocks(rocks) => rocks.scan(&rocks.state(), from, until, limit, "state"),
            Backend::Memory(memory) => Ok(memory.scan_state(from, until, limit)),
        }
    }

    /// At most `limit` rows before `until` and down to `from`, the last one first.
    pub fn scan_state_back(&self, from: &Key, until: &Key, limit: usize) -> Result<Vec<Row>, StoreError> {
        let rocks = match &self.backend {
            Backend::Rocks(rocks) => rocks,
            Backend::Memory(memory) => return Ok(memory.scan_state_back(from, until, limit)),
        };
        let mut options = scan_options();
        options.set_iterate_lower_bound(from.as_ref());
        let mut rows = Vec::new();
        let mut iterator = rocks.db.raw_iterator_cf_opt(&rocks.state(), options);
        iterator.seek_for_prev(until);
        while rows.len() < limit {
            let Some((key, value)) = iterator.item() else { break };
            if key < until.as_ref() {
                rows.push((key.to_vec(), value.to_vec()));
            }
            iterator.prev();
        }
        iterator.status().map_err(StoreError::rocks("scan", "state"))?;
        Ok(rows)
    }

    /// What `group` had applied in the state that would be there after losing power now.
    pub fn durable_applied(&self, group: GroupId) -> Result<Option<Applied>, StoreError> {
        let value = match &self.backend {
            Backend::Rocks(rocks) => {
                let mut options = ReadOptions::default();
                options.set_read_tier(ReadTier::Persisted);
                let value = rocks.db.get_cf_opt(&rocks.state(), Key::applied(group), &options);
                value.map_err(StoreError::rocks("read", "the durable state"))?
            }
            Backend::Memory(memory) => memory.get_durable_state(&Key::applied(group)),
        };
        value.map(|bytes| codec::decode("last applied", &bytes)).transpose()
    }

    /// Makes everything applied so far durable; waits for it when `wait` is set.
    pub fn flush_state(&self, wait: bool) -> Result<(), StoreError> {
        let rocks = match &self.backend {
            Backend::Rocks(rocks) => rocks,
            Backend::Memory(memory) => {
                memory.flush_state();
                return Ok(());
            }
        };
        let mut options = FlushOptions::default();
        options.set_wait(wait);
        rocks.db.flush_cf_opt(&rocks.state(), &options).map_err(StoreError::rocks("flush", "state"))
    }

    /// Merges every file of `state`, so that a test meets what compaction makes of it.
    #[cfg(test)]
    pub fn compact_state(&self) {
        if let Backend::Rocks(rocks) = &self.backend {
            rocks.db.compact_range_cf(&rocks.state(), None::<&[u8]>, None::<&[u8]>);
        }
    }

    /// Writes to the log without waiting for the disk: readable at once, durable after the next [`Store::sync_log`].
    pub fn write_log(&self, changes: Vec<LogWrite>) -> Result<(), StoreError> {
        let rocks = match &self.backend {
            Backend::Rocks(rocks) => rocks,
            Backend::Memory(memory) => {
                memory.write_log(changes);
                return Ok(());
            }
        };
        let log = rocks.log();
        let mut batch = WriteBatch::default();
        for change in changes {
            match change {
                LogWrite::Put(key, value) => batch.put_cf(&log, key, value),
                LogWrite::DeleteRange(from, until) => batch.delete_range_cf(&log, from, until),
            }
        }
        rocks.db.write_opt(batch, &WriteOptions::default()).map_err(StoreError::rocks("write", "the log"))
    }

    /// Waits until everything written to the log so far is on disk.
    pub fn sync_log(&self) -> Result<(), StoreError> {
        if Fault::SkipFsync.is_on() {
            return Ok(());
        }
        match &self.backend {
            Backend::Rocks(rocks) => rocks.db.flush_wal(true).map_err(StoreError::rocks("sync", "the log")),
            Backend::Memory(memory) => {
                memory.sync_log();
                Ok(())
            }
        }
    }

    pub fn get_log(&self, key: &Key) -> Result<Option<Vec<u8>>, StoreError> {
        match &self.backend {
            Backend::Rocks(rocks) => rocks.db.get_cf(&rocks.log(), key).map_err(StoreError::rocks("read", "the log")),
            Backend::Memory(memory) => Ok(memory.get_log(key)),
        }
    }

    pub fn scan_log(&self, from: &Key, until: &Key, limit: usize) -> Result<Vec<Row>, StoreError> {
        match &self.backend {
            Backend::Rocks(rocks) => rocks.scan(&rocks.log(), from, until, limit, "the log"),
            Backend::Memory(memory) => Ok(memory.scan_log(from, until, limit)),
        }
    }

    /// The last row before `until`, if it is not before `from`.
    pub fn last_log(&self, from: &Key, until: &Key) -> Result<Option<Row>, StoreError> {
        let rocks = match &self.backend {
            Backend::Rocks(rocks) => rocks,
            Backend::Memory(memory) => return Ok(memory.last_log(from, until)),
        };
        let mut iterator = rocks.db.raw_iterator_cf(&rocks.log());
        iterator.seek_for_prev(until);
        // `until` itself is out of the range; keys of that form are never stored, so one step back is enough.
        let row = iterator
            .item()
            .filter(|(key, _)| *key >= from.as_ref() && *key < until.as_ref())
            .map(|(key, value)| (key.to_vec(), value.to_vec()));
        iterator.status().map_err(StoreError::rocks("scan", "the log"))?;
        Ok(row)
    }

    /// Bytes of memory RocksDB holds for what is not yet flushed.
    pub fn memtable_bytes(&self) -> u64 {
        let Backend::Rocks(rocks) = &self.backend else { return 0 };
        let of = |family| {
            rocks.db.property_int_value_cf(family, "rocksdb.cur-size-all-mem-tables").ok().flatten().unwrap_or(0)
        };
        of(&rocks.log()) + of(&rocks.state())
    }

    /// Whether RocksDB makes writers wait: for a flush, or until there is room on the disk.
    pub fn writes_stopped(&self) -> bool {
        let Backend::Rocks(rocks) = &self.backend else { return false };
        rocks.db.property_int_value("rocksdb.is-write-stopped").ok().flatten().unwrap_or(0) != 0
    }
}

/// One change of the log.
pub enum LogWrite {
    Put(Key, Vec<u8>),
    /// From the first key on and before the second.
    DeleteRange(Key, Key),
}

/// For iterators: they go over all rows of a range, also those that a filter knows of.
fn scan_options() -> ReadOptions {
    let mut options = ReadOptions::default();
    options.set_total_order_seek(true);
    options
}

fn table_options(cache: &Cache) -> BlockBasedOptions {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(cache);
    // Otherwise index and filter blocks of every open file would add to the memory without a bound. In parts, because a
    // whole one may be larger than a shard of the cache, and could never stay.
    table.set_cache_index_and_filter_blocks(true);
    table.set_index_type(BlockBasedIndexType::TwoLevelIndexSearch);
    table.set_metadata_block_size(INDEX_PART_BYTES);
    table.set_pin_l0_filter_and_index_blocks_in_cache(true);
    table.set_pin_top_level_index_and_filter(true);
    table
}

/// Entries of the log are met by scans, and the few other rows are read at a start: no filters.
fn family_options(cache: &Cache) -> Options {
    let mut options = options_with(&table_options(cache));
    options.set_level_zero_file_num_compaction_trigger(LOG_FILES_TO_MERGE);
    merge_before(&mut options, LOG_FILES_MAX);
    options
}

pub(super) fn state_options(cache: &Cache) -> Options {
    let mut table = table_options(cache);
    table.set_bloom_filter(BLOOM_BITS_PER_KEY, false);
    table.set_partition_filters(true);
    // By "prefix", which is the whole key of those rows that are read one by one; the others, most of all, are in no
    // filter.
    table.set_whole_key_filtering(false);
    let mut options = options_with(&table);
    options.set_prefix_extractor(SliceTransform::create(keys::READ_ALONE_NAME, |key| key, Some(keys::is_read_alone)));
    options.set_memtable_prefix_bloom_ratio(MEMTABLE_FILTER_RATIO);
    // By size, not by level: rows come in with ids and due times all over the groups, so every merge into a level would
    // copy the whole of it. Registering 15 million tasks, by level, fell to a fifth of its first rate.
    options.set_compaction_style(DBCompactionStyle::Universal);
    let mut by_size = UniversalCompactOptions::default();
    by_size.set_size_ratio(STATE_SIZE_RATIO);
    options.set_universal_compaction_options(&by_size);
    // By itself RocksDB would copy everything once a month, also on an idle node.
    options.set_ttl(0);
    options.set_periodic_compaction_seconds(0);
    options.set_level_zero_file_num_compaction_trigger(STATE_FILES_TO_MERGE);
    merge_before(&mut options, STATE_FILES_MAX);
    options
}

/// With more files than this writes are slowed down, and with twice as many stopped, until some have been merged.
fn merge_before(options: &mut Options, files: i32) {
    options.set_level_zero_slowdown_writes_trigger(files);
    options.set_level_zero_stop_writes_trigger(2 * files);
}

fn options_with(table: &BlockBasedOptions) -> Options {
    let mut options = Options::default();
    options.set_block_based_table_factory(table);
    options.set_write_buffer_size(WRITE_BUFFER_BYTES);
    options.set_max_write_buffer_number(WRITE_BUFFERS_PER_FAMILY_MAX);
    options.set_compression_type(DBCompressionType::Lz4);
    options
}
