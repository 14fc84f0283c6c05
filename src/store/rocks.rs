//! Rows in files: RocksDB, with two column families.
//!
//! How the contract of [`Engine`] is kept: the log is in RocksDB's own write-ahead log and the state is not, so each call is
//! one batch of one family, and [`Engine::sync_log`] syncs that log. A flush of the state takes whole batches, in order, and
//! RocksDB syncs the files of its write-ahead log that are closed before it makes a flush known.

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Weak};

use futures::FutureExt;
use futures::future::BoxFuture;
use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, BoundColumnFamily, Cache, ColumnFamilyDescriptor, DBCompactionStyle,
    DBCompressionType, DBRawIteratorWithThreadMode, DBWithThreadMode, FlushOptions, IngestExternalFileOptions,
    MultiThreaded, Options, ReadOptions, ReadTier, SliceTransform, SstFileWriter, UniversalCompactOptions, WriteBatch,
    WriteBufferManager, WriteOptions,
};
use tokio::sync::{mpsc, oneshot};

use super::engine::{BorrowedRow, Chunk, Chunks, Engine, Export, Family, LogWrite, PinnedRows, Row, StagedRows};
use super::error::StoreError;
use super::keys::{self, Key};
use super::overlay::Write;
use super::wal;
use crate::task::GroupId;

const LOG_FAMILY: &str = "log";
const STATE_FAMILY: &str = "state";

const MIB: usize = 1024 * 1024;

/// The most memory all memtables take together; beyond it the largest is flushed.
const WRITE_BUFFERS_BYTES_MAX: usize = 32 * MIB;
/// A small memtable is flushed often, in short writes that delay an fsync beside them little.
const WRITE_BUFFER_BYTES: usize = 8 * MIB;
const WRITE_BUFFERS_PER_FAMILY_MAX: i32 = 4;
/// Room for rows that are read again. What the open files need for their indexes and filters comes on top; see
/// [`Engine::fit_cache`].
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

/// Bytes of rows that leave an export together, at least.
const CHUNK_BYTES: usize = 256 * 1024;

type Db = DBWithThreadMode<MultiThreaded>;

/// A database in a folder.
pub(super) struct RocksEngine {
    db: Arc<Db>,
    cache: Cache,
    cache_bytes_max: usize,
}

fn failed(verb: &'static str, what: &'static str) -> impl FnOnce(rocksdb::Error) -> StoreError {
    move |source| StoreError::Rocks { verb, what, source }
}

impl RocksEngine {
    /// Makes the database if it is not there.
    pub fn open(path: &Path, cache_bytes_max: usize) -> Result<Self, StoreError> {
        wal::disarm(path)?;
        let cache = Cache::new_lru_cache(DATA_CACHE_BYTES.min(cache_bytes_max));
        let mut options = database_options();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        let db = Db::open_cf_descriptors(&options, path, families(&cache)).map_err(failed("open", "the database"))?;
        let engine = Self { db: Arc::new(db), cache, cache_bytes_max };
        engine.fit_cache();
        // A persisted read skips the memtables only once a write without WAL has completed since the start.
        engine.write_state(&mut std::iter::once((Key::node_opened(), Write::Put(Vec::new()))))?;
        Ok(engine)
    }

    /// Writes are errors.
    pub fn open_read_only(path: &Path) -> Result<Self, StoreError> {
        // Named by every database; where there is none, RocksDB would leave an empty folder behind.
        let current = path.join("CURRENT");
        std::fs::metadata(&current).map_err(StoreError::file("read", &current))?;
        let cache_bytes_max = DATA_CACHE_BYTES;
        let cache = Cache::new_lru_cache(cache_bytes_max);
        let mut options = database_options();
        // All files are opened at once, and stay readable when a node removes them.
        options.set_max_open_files(-1);
        // What is in them is copied to memory, so that the copies may go.
        let copies = wal::disarmed_copies(path)?;
        if let Some(copies) = &copies {
            options.set_wal_dir(copies.path());
        }
        let db = Db::open_cf_descriptors_read_only(&options, path, families(&cache), false);
        let db = db.map_err(failed("open", "the database"))?;
        Ok(Self { db: Arc::new(db), cache, cache_bytes_max })
    }

    fn family(&self, family: Family) -> Arc<BoundColumnFamily<'_>> {
        let name = match family {
            Family::Log => LOG_FAMILY,
            Family::State => STATE_FAMILY,
        };
        self.db.cf_handle(name).expect("opened with this family")
    }
}

impl Engine for RocksEngine {
    fn write_log(&self, changes: Vec<LogWrite>) -> Result<(), StoreError> {
        let log = self.family(Family::Log);
        let mut batch = WriteBatch::default();
        for change in changes {
            match change {
                LogWrite::Put(key, value) => batch.put_cf(&log, key, value),
                LogWrite::DeleteRange(from, until) => batch.delete_range_cf(&log, from, until),
            }
        }
        self.db.write_opt(batch, &WriteOptions::default()).map_err(failed("write", "the log"))
    }

    fn sync_log(&self) -> Result<(), StoreError> {
        self.db.flush_wal(true).map_err(failed("sync", "the log"))
    }

    fn write_state(&self, writes: &mut dyn Iterator<Item = (Key, Write)>) -> Result<(), StoreError> {
        let state = self.family(Family::State);
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
        self.db.write_opt(batch, &options).map_err(failed("write", "state"))
    }

    fn flush_state(&self, wait: bool) -> Result<(), StoreError> {
        let mut options = FlushOptions::default();
        options.set_wait(wait);
        self.db.flush_cf_opt(&self.family(Family::State), &options).map_err(failed("flush", "state"))
    }

    fn get(&self, family: Family, key: &Key) -> Result<Option<Vec<u8>>, StoreError> {
        self.db.get_cf(&self.family(family), key).map_err(failed("read", family.shown()))
    }

    fn get_state_many(&self, keys: &[Key]) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        let state = self.family(Family::State);
        let values = self.db.batched_multi_get_cf_opt(&state, keys, false, &ReadOptions::default());
        let values = values.into_iter().map(|value| Ok(value?.map(|slice| slice.to_vec())));
        values.collect::<Result<_, _>>().map_err(failed("read", "state"))
    }

    fn get_durable_state(&self, key: &Key) -> Result<Option<Vec<u8>>, StoreError> {
        let mut options = ReadOptions::default();
        options.set_read_tier(ReadTier::Persisted);
        let value = self.db.get_cf_opt(&self.family(Family::State), key, &options);
        value.map_err(failed("read", "the durable state"))
    }

    fn scan(&self, family: Family, from: &Key, until: &Key, limit: usize) -> Result<Vec<Row>, StoreError> {
        let mut options = scan_options();
        options.set_iterate_upper_bound(until.as_ref());
        let mut rows = Vec::with_capacity(limit.min(1024));
        let mut iterator = self.db.raw_iterator_cf_opt(&self.family(family), options);
        iterator.seek(from);
        while rows.len() < limit {
            let Some((key, value)) = iterator.item() else { break };
            rows.push((key.to_vec(), value.to_vec()));
            iterator.next();
        }
        iterator.status().map_err(failed("scan", family.shown()))?;
        Ok(rows)
    }

    fn scan_back(&self, family: Family, from: &Key, until: &Key, limit: usize) -> Result<Vec<Row>, StoreError> {
        let mut options = scan_options();
        options.set_iterate_lower_bound(from.as_ref());
        let mut rows = Vec::new();
        let mut iterator = self.db.raw_iterator_cf_opt(&self.family(family), options);
        iterator.seek_for_prev(until);
        while rows.len() < limit {
            let Some((key, value)) = iterator.item() else { break };
            if key < until.as_ref() {
                rows.push((key.to_vec(), value.to_vec()));
            }
            iterator.prev();
        }
        iterator.status().map_err(failed("scan", family.shown()))?;
        Ok(rows)
    }

    fn pin(&self, family: Family, from: &Key, until: Option<&Key>) -> Box<dyn PinnedRows + '_> {
        let mut options = scan_options();
        if let Some(until) = until {
            options.set_iterate_upper_bound(until.as_ref());
        }
        // What is read once must not push everything else out of the cache.
        options.fill_cache(false);
        // An iterator sees the database as it was when it was made.
        let iterator = self.db.raw_iterator_cf_opt(&self.family(family), options);
        Box::new(PinnedIterator { iterator, family, from: Some(from.clone()) })
    }

    fn export(self: Arc<Self>, group: GroupId, head: Vec<Key>) -> BoxFuture<'static, Result<Export, StoreError>> {
        export(self, group, head).boxed()
    }

    fn stage(&self, group: GroupId, folder: PathBuf) -> Result<Box<dyn StagedRows>, StoreError> {
        // Left over from a process that was killed.
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).map_err(StoreError::file("create", &folder))?;
        Ok(Box::new(StagedFiles {
            db: Arc::downgrade(&self.db),
            group,
            rows: None,
            files: Vec::new(),
            folder: Folder(folder),
        }))
    }

    fn memtable_bytes(&self) -> u64 {
        let of = |family| {
            let family = self.family(family);
            self.db.property_int_value_cf(&family, "rocksdb.cur-size-all-mem-tables").ok().flatten().unwrap_or(0)
        };
        of(Family::Log) + of(Family::State)
    }

    fn cache_bytes(&self) -> u64 {
        self.cache.get_usage() as u64
    }

    /// Makes room for the indexes and filters of all that is stored, as far as memory is granted: one that is not in the
    /// cache is read from the disk for every row that is looked for.
    fn fit_cache(&self) {
        let Ok(files) = self.db.live_files() else { return };
        let rows = files.iter().map(|file| usize::try_from(file.num_entries).unwrap_or(usize::MAX));
        let rows = rows.fold(0, usize::saturating_add);
        let wanted = DATA_CACHE_BYTES.saturating_add(rows.saturating_mul(INDEX_BYTES_PER_ROW));
        self.cache.clone().set_capacity(wanted.min(self.cache_bytes_max));
    }

    fn writes_stopped(&self) -> bool {
        self.db.property_int_value("rocksdb.is-write-stopped").ok().flatten().unwrap_or(0) != 0
    }

    #[cfg(test)]
    fn compact_state(&self) {
        self.db.compact_range_cf(&self.family(Family::State), None::<&[u8]>, None::<&[u8]>);
    }
}

struct PinnedIterator<'a> {
    iterator: DBRawIteratorWithThreadMode<'a, Db>,
    family: Family,
    /// Where to begin, until that was done.
    from: Option<Key>,
}

impl PinnedRows for PinnedIterator<'_> {
    fn next(&mut self) -> Result<Option<BorrowedRow<'_>>, StoreError> {
        match self.from.take() {
            Some(from) => self.iterator.seek(from),
            None => self.iterator.next(),
        }
        if !self.iterator.valid() {
            self.iterator.status().map_err(failed("scan", self.family.shown()))?;
        }
        Ok(self.iterator.item())
    }
}

/// Reads on a thread of its own, which does not outlive what is returned.
async fn export(engine: Arc<RocksEngine>, group: GroupId, head: Vec<Key>) -> Result<Export, StoreError> {
    let (out, rows) = Chunks::channel();
    let (head_out, head_in) = oneshot::channel();
    let spawned = std::thread::Builder::new().name(format!("export-{group}")).spawn(move || {
        read_pinned(&engine, group, &head, head_out, &out);
    });
    let reader = spawned.map_err(StoreError::file("start a thread for", Path::new("an export")))?;
    let chunks = Chunks::read_by(reader, rows);
    let head = head_in.await.map_err(|_| StoreError::damaged("an export", "its thread died"))??;
    Ok(Export { head, chunks })
}

fn read_pinned(
    engine: &RocksEngine,
    group: GroupId,
    head: &[Key],
    head_out: oneshot::Sender<Result<Vec<Option<Vec<u8>>>, StoreError>>,
    out: &mpsc::Sender<Chunk>,
) {
    let state = engine.family(Family::State);
    let pinned = engine.db.snapshot();
    let head = head.iter().map(|key| pinned.get_cf(&state, key).map_err(failed("read", "state")));
    if head_out.send(head.collect()).is_err() {
        return;
    }
    let (from, until) = Key::group_range(group);
    let mut options = scan_options();
    options.set_iterate_upper_bound(until.as_ref());
    // A snapshot is read once; it must not push everything else out of the cache.
    options.fill_cache(false);
    let mut iterator = pinned.raw_iterator_cf_opt(&state, options);
    iterator.seek(&from);
    loop {
        let mut rows = Vec::new();
        let mut bytes = 0;
        while bytes < CHUNK_BYTES {
            let Some((key, value)) = iterator.item() else { break };
            bytes += key.len() + value.len();
            rows.push((key.to_vec(), value.to_vec()));
            iterator.next();
        }
        if let Err(error) = iterator.status() {
            let _ = out.blocking_send(Err(failed("scan", "state")(error)));
            return;
        }
        if rows.is_empty() || out.blocking_send(Ok(rows)).is_err() {
            return;
        }
    }
}

/// Rows in a file beside the database, which it takes over.
struct StagedFiles {
    /// Rows that are forgotten somewhere must not keep the database open.
    db: Weak<Db>,
    group: GroupId,
    // Closed before its folder goes.
    rows: Option<SstFileWriter<'static>>,
    /// In the order in which they count: what comes later hides what came before.
    files: Vec<PathBuf>,
    folder: Folder,
}

/// Goes with everything in it.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

const ROWS_FILE: &str = "rows.sst";

impl StagedRows for StagedFiles {
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        let rows = match &mut self.rows {
            Some(rows) => rows,
            none => none.insert(open_writer(&self.folder.0.join(ROWS_FILE))?),
        };
        rows.put(key, value).map_err(failed("write", "a snapshot"))
    }

    fn finish(&mut self) -> Result<(), StoreError> {
        let clear = self.folder.0.join("clear.sst");
        let (from, until) = Key::group_range(self.group);
        let mut writer = open_writer(&clear)?;
        writer
            .delete_range(from.as_ref(), until.as_ref())
            .and_then(|()| writer.finish())
            .map_err(failed("write", "a snapshot"))?;
        self.files.push(clear);
        if let Some(mut rows) = self.rows.take() {
            rows.finish().map_err(failed("write", "a snapshot"))?;
            self.files.push(self.folder.0.join(ROWS_FILE));
        }
        Ok(())
    }

    fn ingest(self: Box<Self>) -> Result<(), StoreError> {
        let Some(db) = self.db.upgrade() else {
            return Err(StoreError::damaged("a snapshot", "its database was closed"));
        };
        let state = db.cf_handle(STATE_FAMILY).expect("opened with this family");
        let mut options = IngestExternalFileOptions::default();
        options.set_move_files(true);
        db.ingest_external_file_cf_opts(&state, &options, self.files.clone()).map_err(failed("ingest", "a snapshot"))
    }
}

fn open_writer(path: &Path) -> Result<SstFileWriter<'static>, StoreError> {
    // As the database writes its own: with a filter and an index in parts. A writer reads nothing, so its cache is none.
    static OPTIONS: LazyLock<Options> = LazyLock::new(|| state_options(&Cache::new_lru_cache(0)));
    let writer = SstFileWriter::create(&OPTIONS);
    writer.open(path).map_err(failed("write", "a snapshot"))?;
    Ok(writer)
}

fn database_options() -> Options {
    let mut options = Options::default();
    let buffers = WriteBufferManager::new_write_buffer_manager(WRITE_BUFFERS_BYTES_MAX, false);
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
    options
}

fn families(cache: &Cache) -> [ColumnFamilyDescriptor; 2] {
    [
        ColumnFamilyDescriptor::new(LOG_FAMILY, log_options(cache)),
        ColumnFamilyDescriptor::new(STATE_FAMILY, state_options(cache)),
    ]
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
fn log_options(cache: &Cache) -> Options {
    let mut options = options_with(&table_options(cache));
    options.set_level_zero_file_num_compaction_trigger(LOG_FILES_TO_MERGE);
    merge_before(&mut options, LOG_FILES_MAX);
    options
}

fn state_options(cache: &Cache) -> Options {
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn key(n: u32) -> Key {
        Key::from_stored([&[0, 1, 1][..], &n.to_be_bytes()].concat())
    }

    fn write(engine: &RocksEngine, n: u32, value: u8) {
        engine.write_log(vec![LogWrite::Put(key(n), vec![value])]).unwrap();
        engine.write_state(&mut std::iter::once((key(n), Write::Put(vec![value])))).unwrap();
    }

    fn read_all(engine: &RocksEngine, family: Family) -> Vec<Row> {
        engine.scan(family, &Key::first(), &key(u32::MAX), usize::MAX).unwrap()
    }

    #[test]
    fn what_is_opened_for_reading_stays_as_it_was() {
        let temp = tempfile::tempdir().unwrap();
        let engine = RocksEngine::open(temp.path(), 0).unwrap();
        for n in 0..100 {
            write(&engine, n, 1);
            if n % 10 == 0 {
                engine.flush_state(true).unwrap();
            }
        }
        engine.flush_state(true).unwrap();
        drop(engine);
        let reading = RocksEngine::open_read_only(temp.path()).unwrap();
        let engine = RocksEngine::open(temp.path(), 0).unwrap();
        let files = |engine: &RocksEngine| -> BTreeSet<String> {
            engine.db.live_files().unwrap().into_iter().map(|file| file.name).collect()
        };
        let files_before = files(&engine);
        (0..200).for_each(|n| write(&engine, n, 2));
        engine.flush_state(true).unwrap();
        engine.compact_state();
        let files_after = files(&engine);
        assert!(!files_before.is_subset(&files_after), "none has gone: {files_before:?}, then {files_after:?}");
        for family in [Family::Log, Family::State] {
            assert_eq!(read_all(&engine, family).len(), 200);
            let rows = read_all(&reading, family);
            assert_eq!(rows.len(), 100, "{family:?}");
            assert!(rows.iter().all(|(_, value)| *value == [1]), "{family:?}");
        }
        assert!(reading.write_log(vec![LogWrite::Put(key(1), vec![3])]).is_err());
        assert!(RocksEngine::open_read_only(&temp.path().join("missing")).is_err());
        assert!(!temp.path().join("missing").exists());
    }
}
