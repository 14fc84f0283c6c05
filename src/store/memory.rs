//! A disk in memory, for a simulation: what RocksDB does to the two families, and what a crash leaves of it.
//!
//! ```text
//!   log    written ----------------------> synced         a crash keeps what is synced, and so much of the rest, in the
//!   state  written (memtable) --flush----> in files       order of the log, as it is told; of the state only the files
//! ```
//!
//! A flush of the state syncs the log first, as RocksDB does. Rows that are written once are checked for it: what
//! SingleDelete would spoil in silence is a panic here.
//!
//! A [`MemoryDisk`] outlives the nodes that open it. After [`MemoryDisk::crash`] those who had it open write to what
//! nobody will ever read again.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::path::PathBuf;
use std::sync::{Arc, MutexGuard};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::mpsc;

use super::Store;
use super::engine::{BorrowedRow, Chunk, Chunks, Engine, Export, Family, LogWrite, PinnedRows, Row, StagedRows};
use super::error::StoreError;
use super::keys::Key;
use super::overlay::Write;
use crate::task::GroupId;
use crate::task::locks::Mutex;

/// Rows that leave an export together: few, as there are few.
const ROWS_PER_CHUNK: usize = 16;

type Map = BTreeMap<Vec<u8>, Bytes>;

enum Change {
    Put(Vec<u8>, Bytes),
    Delete(Vec<u8>),
    /// From the first key on and before the second.
    DeleteRange(Vec<u8>, Vec<u8>),
}

fn make(rows: &mut Map, change: &Change) {
    match change {
        Change::Put(key, value) => {
            rows.insert(key.clone(), value.clone());
        }
        Change::Delete(key) => {
            rows.remove(key);
        }
        Change::DeleteRange(from, until) => clear(rows, from, until),
    }
}

fn clear(rows: &mut Map, from: &[u8], until: &[u8]) {
    let gone: Vec<Vec<u8>> = range(rows, from, Some(until)).map(|(key, _)| key.clone()).collect();
    gone.iter().for_each(|key| drop(rows.remove(key)));
}

fn range<'r>(
    rows: &'r Map,
    from: &[u8],
    until: Option<&[u8]>,
) -> impl DoubleEndedIterator<Item = (&'r Vec<u8>, &'r Bytes)> {
    // A map does not take a range that ends before it begins.
    let until = until.map_or(Bound::Unbounded, |until| Bound::Excluded(until.max(from)));
    rows.range::<[u8], _>((Bound::Included(from), until))
}

/// The rows of one family.
#[derive(Default)]
struct Rows {
    /// As they are read.
    now: Map,
    /// As they are on the disk.
    durable: Map,
    /// What lies between the two, batch by batch.
    pending: VecDeque<Vec<Change>>,
}

impl Rows {
    fn write(&mut self, batch: Vec<Change>) {
        batch.iter().for_each(|change| make(&mut self.now, change));
        self.pending.push_back(batch);
    }

    /// The first `batches` reach the disk.
    fn keep(&mut self, batches: usize) {
        for batch in self.pending.drain(..batches) {
            batch.iter().for_each(|change| make(&mut self.durable, change));
        }
    }

    fn keep_all(&mut self) {
        self.keep(self.pending.len());
    }

    /// As it is found after a crash.
    fn found(&self) -> Self {
        Self { now: self.durable.clone(), durable: self.durable.clone(), pending: VecDeque::new() }
    }
}

#[derive(Default)]
struct Contents {
    log: Rows,
    state: Rows,
}

impl Contents {
    fn family(&self, family: Family) -> &Rows {
        match family {
            Family::Log => &self.log,
            Family::State => &self.state,
        }
    }

    /// The log first, as RocksDB does.
    fn flush_state(&mut self) {
        self.log.keep_all();
        self.state.keep_all();
    }
}

/// What survives.
#[derive(Clone, Default)]
pub struct MemoryDisk {
    opened: Arc<Mutex<Mounted>>,
}

impl MemoryDisk {
    /// What is on it, for a node that starts.
    pub fn open(&self) -> Store {
        Store::on(self.mounted())
    }

    fn mounted(&self) -> Mounted {
        self.opened.lock().clone()
    }

    /// Batches that were written to the log and not synced.
    pub fn unsynced(&self) -> usize {
        self.mounted().lock().log.pending.len()
    }

    /// The node is gone at this moment. Of what it wrote to the log and did not sync, the first `kept` batches had
    /// reached the disk: all of them when only the process was killed.
    pub fn crash(&self, kept: usize) {
        let mut opened = self.opened.lock();
        let found = {
            let mut contents = opened.lock();
            let kept = kept.min(contents.log.pending.len());
            contents.log.keep(kept);
            Contents { log: contents.log.found(), state: contents.state.found() }
        };
        *opened = Mounted { contents: Arc::new(Mutex::new(found)) };
    }
}

/// The disk as one life of a node has it open.
#[derive(Clone, Default)]
struct Mounted {
    contents: Arc<Mutex<Contents>>,
}

impl Mounted {
    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock_after_panic()
    }
}

impl Engine for Mounted {
    fn write_log(&self, changes: Vec<LogWrite>) -> Result<(), StoreError> {
        let change = |change| match change {
            LogWrite::Put(key, value) => Change::Put(key.into_bytes(), value.into()),
            LogWrite::DeleteRange(from, until) => Change::DeleteRange(from.into_bytes(), until.into_bytes()),
        };
        self.lock().log.write(changes.into_iter().map(change).collect());
        Ok(())
    }

    fn sync_log(&self) -> Result<(), StoreError> {
        self.lock().log.keep_all();
        Ok(())
    }

    fn write_state(&self, writes: &mut dyn Iterator<Item = (Key, Write)>) -> Result<(), StoreError> {
        let mut contents = self.lock();
        let mut batch = Vec::new();
        for (key, write) in writes {
            let key = key.into_bytes();
            let is_there = contents.state.now.contains_key(&key);
            let must = |wanted: bool, what| assert!(wanted == is_there, "{key:?} is {what}");
            match write {
                Write::Put(value) => batch.push(Change::Put(key, value.into())),
                Write::PutOnce(value) => {
                    must(false, "written once, and was there already");
                    batch.push(Change::Put(key, value.into()));
                }
                Write::Delete => batch.push(Change::Delete(key)),
                Write::DeleteOnce => {
                    must(true, "removed once, and was not there");
                    batch.push(Change::Delete(key));
                }
                Write::ReplaceOnce(value) => {
                    must(true, "replaced, and was not there");
                    batch.push(Change::Put(key, value.into()));
                }
                Write::DeleteRange(until) => batch.push(Change::DeleteRange(key, until.into_bytes())),
            }
        }
        contents.state.write(batch);
        Ok(())
    }

    /// At once, whether it is waited for or not.
    fn flush_state(&self, _wait: bool) -> Result<(), StoreError> {
        self.lock().flush_state();
        Ok(())
    }

    fn get(&self, family: Family, key: &Key) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.lock().family(family).now.get(key.as_ref()).map(|value| value.to_vec()))
    }

    fn get_state_many(&self, keys: &[Key]) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        keys.iter().map(|key| self.get(Family::State, key)).collect()
    }

    fn get_durable_state(&self, key: &Key) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.lock().state.durable.get(key.as_ref()).map(|value| value.to_vec()))
    }

    fn scan(&self, family: Family, from: &Key, until: &Key, limit: usize) -> Result<Vec<Row>, StoreError> {
        let contents = self.lock();
        Ok(range(&contents.family(family).now, from.as_ref(), Some(until.as_ref())).take(limit).map(row).collect())
    }

    fn scan_back(&self, family: Family, from: &Key, until: &Key, limit: usize) -> Result<Vec<Row>, StoreError> {
        let contents = self.lock();
        let rows = range(&contents.family(family).now, from.as_ref(), Some(until.as_ref()));
        Ok(rows.rev().take(limit).map(row).collect())
    }

    fn pin(&self, family: Family, from: &Key, until: Option<&Key>) -> Box<dyn PinnedRows + '_> {
        let contents = self.lock();
        let rows: Vec<Row> =
            range(&contents.family(family).now, from.as_ref(), until.map(Key::as_ref)).map(row).collect();
        Box::new(Copied { rows: rows.into_iter(), shown: None })
    }

    /// By a task, as a simulation has no threads.
    fn export(self: Arc<Self>, group: GroupId, head: Vec<Key>) -> BoxFuture<'static, Result<Export, StoreError>> {
        async move {
            let head = self.get_state_many(&head)?;
            let (from, until) = Key::group_range(group);
            let (out, rows) = Chunks::channel();
            tokio::spawn(send_chunks(self.scan(Family::State, &from, &until, usize::MAX)?, out));
            Ok(Export { head, chunks: Chunks::without_thread(rows) })
        }
        .boxed()
    }

    fn stage(&self, group: GroupId, _folder: PathBuf) -> Result<Box<dyn StagedRows>, StoreError> {
        Ok(Box::new(StagedInMemory { disk: self.clone(), group, rows: Vec::new() }))
    }
}

async fn send_chunks(rows: Vec<Row>, out: mpsc::Sender<Chunk>) {
    for chunk in rows.chunks(ROWS_PER_CHUNK) {
        if out.send(Ok(chunk.to_vec())).await.is_err() {
            return;
        }
    }
}

struct Copied {
    rows: std::vec::IntoIter<Row>,
    /// The one that was asked for last.
    shown: Option<Row>,
}

impl PinnedRows for Copied {
    fn next(&mut self) -> Result<Option<BorrowedRow<'_>>, StoreError> {
        self.shown = self.rows.next();
        Ok(self.shown.as_ref().map(|(key, value)| (key.as_slice(), value.as_slice())))
    }
}

struct StagedInMemory {
    disk: Mounted,
    group: GroupId,
    rows: Vec<Row>,
}

impl StagedRows for StagedInMemory {
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.rows.push((key.to_vec(), value.to_vec()));
        Ok(())
    }

    fn finish(&mut self) -> Result<(), StoreError> {
        Ok(())
    }

    fn ingest(self: Box<Self>) -> Result<(), StoreError> {
        let (from, until) = Key::group_range(self.group);
        let puts = self.rows.into_iter().map(|(key, value)| Change::Put(key, value.into()));
        let changes = std::iter::once(Change::DeleteRange(from.into_bytes(), until.into_bytes())).chain(puts).collect();
        let mut contents = self.disk.lock();
        contents.flush_state();
        contents.state.write(changes);
        contents.state.keep_all();
        Ok(())
    }
}

fn row((key, value): (&Vec<u8>, &Bytes)) -> Row {
    (key.clone(), value.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::codec;
    use crate::store::overlay::get_row;
    use crate::store::rows::Applied;

    const GROUP: GroupId = GroupId(1);

    fn put(index: u64) -> LogWrite {
        LogWrite::Put(Key::log_entry(GROUP, index), vec![1])
    }

    fn entries(store: &Store) -> usize {
        store.scan_log(&Key::log_entry(GROUP, 0), &Key::log_end(GROUP), usize::MAX).unwrap().len()
    }

    fn applied_in(store: &Store) -> Option<u64> {
        get_row(store, "last applied", &Key::applied(GROUP)).unwrap().map(|applied: Applied| applied.index)
    }

    fn applied(index: u64) -> [(Key, Write); 1] {
        [(Key::applied(GROUP), Write::Put(codec::encode(&Applied { term: 1, index })))]
    }

    #[test]
    fn a_crash_keeps_what_is_synced_and_a_part_of_the_rest_in_order() {
        let disk = MemoryDisk::default();
        let store = disk.open();
        (0..3).for_each(|index| store.write_log(vec![put(index)]).unwrap());
        store.sync_log().unwrap();
        (3..7).for_each(|index| store.write_log(vec![put(index), put(index + 100)]).unwrap());
        assert_eq!((entries(&store), disk.unsynced()), (11, 4));
        disk.crash(2);
        let found = disk.open();
        assert_eq!(entries(&found), 7, "whole batches");
        assert!(found.get_log(&Key::log_entry(GROUP, 104)).unwrap().is_some());
        assert!(found.get_log(&Key::log_entry(GROUP, 5)).unwrap().is_none());
        // Whoever had it open before writes to nobody.
        store.write_log(vec![put(50)]).unwrap();
        store.sync_log().unwrap();
        disk.crash(usize::MAX);
        assert_eq!(entries(&disk.open()), 7);
    }

    #[test]
    fn the_state_falls_back_to_its_last_flush_which_syncs_the_log_first() {
        let disk = MemoryDisk::default();
        let store = disk.open();
        store.write_log(vec![put(1)]).unwrap();
        store.write_state(applied(1)).unwrap();
        assert_eq!(store.durable_applied(GROUP).unwrap(), None);
        store.flush_state(true).unwrap();
        store.write_state(applied(2)).unwrap();
        assert_eq!(store.durable_applied(GROUP).unwrap(), Some(Applied { term: 1, index: 1 }));
        assert_eq!(applied_in(&store), Some(2));
        disk.crash(0);
        let found = disk.open();
        assert_eq!(entries(&found), 1);
        assert_eq!(applied_in(&found), Some(1));
    }

    #[test]
    #[should_panic(expected = "written once, and was there already")]
    fn a_row_that_is_written_once_is_written_once() {
        let store = MemoryDisk::default().open();
        store.write_state([(Key::applied(GROUP), Write::PutOnce(vec![]))]).unwrap();
        store.write_state([(Key::applied(GROUP), Write::PutOnce(vec![]))]).unwrap();
    }
}
