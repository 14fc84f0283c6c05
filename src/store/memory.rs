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
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;

use super::keys::Key;
use super::overlay::Write;
use super::{Backend, LogWrite, Row, Store};

type Rows = BTreeMap<Vec<u8>, Bytes>;

enum Change {
    Put(Vec<u8>, Bytes),
    Delete(Vec<u8>),
    /// From the first key on and before the second.
    DeleteRange(Vec<u8>, Vec<u8>),
}

fn make(rows: &mut Rows, change: &Change) {
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

fn clear(rows: &mut Rows, from: &[u8], until: &[u8]) {
    let gone: Vec<Vec<u8>> = range(rows, from, until).map(|(key, _)| key.clone()).collect();
    gone.iter().for_each(|key| drop(rows.remove(key)));
}

fn range<'r>(rows: &'r Rows, from: &[u8], until: &[u8]) -> impl DoubleEndedIterator<Item = (&'r Vec<u8>, &'r Bytes)> {
    // A map does not take a range that ends before it begins.
    let until = until.max(from);
    rows.range::<[u8], _>((Bound::Included(from), Bound::Excluded(until)))
}

/// One column family.
#[derive(Default)]
struct Family {
    /// As it is read.
    now: Rows,
    /// As it is on the disk.
    durable: Rows,
    /// What lies between the two, batch by batch.
    pending: VecDeque<Vec<Change>>,
}

impl Family {
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
    log: Family,
    state: Family,
}

/// What survives.
#[derive(Clone, Default)]
pub struct MemoryDisk {
    opened: Arc<Mutex<Mounted>>,
}

impl MemoryDisk {
    /// What is on it, for a node that starts.
    pub fn open(&self) -> Store {
        Store { backend: Backend::Memory(self.mounted()) }
    }

    fn mounted(&self) -> Mounted {
        self.opened.lock().expect("no panic under this lock").clone()
    }

    /// Batches that were written to the log and not synced.
    pub fn unsynced(&self) -> usize {
        self.mounted().lock().log.pending.len()
    }

    /// The node is gone at this moment. Of what it wrote to the log and did not sync, the first `kept` batches had
    /// reached the disk: all of them when only the process was killed.
    pub fn crash(&self, kept: usize) {
        let mut opened = self.opened.lock().expect("no panic under this lock");
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
pub(super) struct Mounted {
    contents: Arc<Mutex<Contents>>,
}

impl Mounted {
    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub fn write_state(&self, writes: impl IntoIterator<Item = (Key, Write)>) {
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
    }

    pub fn write_log(&self, changes: Vec<LogWrite>) {
        let change = |change| match change {
            LogWrite::Put(key, value) => Change::Put(key.into_bytes(), value.into()),
            LogWrite::DeleteRange(from, until) => Change::DeleteRange(from.into_bytes(), until.into_bytes()),
        };
        self.lock().log.write(changes.into_iter().map(change).collect());
    }

    pub fn sync_log(&self) {
        self.lock().log.keep_all();
    }

    pub fn flush_state(&self) {
        let mut contents = self.lock();
        contents.log.keep_all();
        contents.state.keep_all();
    }

    /// In one step, and durable after it.
    pub fn ingest(&self, group: (Key, Key), rows: Vec<Row>) {
        self.flush_state();
        let (from, until) = (group.0.into_bytes(), group.1.into_bytes());
        let puts = rows.into_iter().map(|(key, value)| Change::Put(key, value.into()));
        let mut contents = self.lock();
        contents.state.write(std::iter::once(Change::DeleteRange(from, until)).chain(puts).collect());
        contents.state.keep_all();
    }

    pub fn get_state(&self, key: &Key) -> Option<Vec<u8>> {
        self.lock().state.now.get(key.as_ref()).map(|value| value.to_vec())
    }

    pub fn get_durable_state(&self, key: &Key) -> Option<Vec<u8>> {
        self.lock().state.durable.get(key.as_ref()).map(|value| value.to_vec())
    }

    pub fn get_log(&self, key: &Key) -> Option<Vec<u8>> {
        self.lock().log.now.get(key.as_ref()).map(|value| value.to_vec())
    }

    pub fn scan_state(&self, from: &Key, until: &Key, limit: usize) -> Vec<Row> {
        let contents = self.lock();
        range(&contents.state.now, from.as_ref(), until.as_ref()).take(limit).map(row).collect()
    }

    pub fn scan_state_back(&self, from: &Key, until: &Key, limit: usize) -> Vec<Row> {
        let contents = self.lock();
        range(&contents.state.now, from.as_ref(), until.as_ref()).rev().take(limit).map(row).collect()
    }

    pub fn scan_log(&self, from: &Key, until: &Key, limit: usize) -> Vec<Row> {
        let contents = self.lock();
        range(&contents.log.now, from.as_ref(), until.as_ref()).take(limit).map(row).collect()
    }

    pub fn last_log(&self, from: &Key, until: &Key) -> Option<Row> {
        let contents = self.lock();
        range(&contents.log.now, from.as_ref(), until.as_ref()).next_back().map(row)
    }

    /// Everything: the state, and then the log.
    pub fn all(&self) -> (Vec<Row>, Vec<Row>) {
        let contents = self.lock();
        (contents.state.now.iter().map(row).collect(), contents.log.now.iter().map(row).collect())
    }
}

fn row((key, value): (&Vec<u8>, &Bytes)) -> Row {
    (key.clone(), value.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::rows::Applied;
    use crate::store::{codec, dump::digest};
    use crate::task::GroupId;

    const GROUP: GroupId = GroupId(1);

    fn put(index: u64) -> LogWrite {
        LogWrite::Put(Key::log_entry(GROUP, index), vec![1])
    }

    fn entries(store: &Store) -> usize {
        store.scan_log(&Key::log_entry(GROUP, 0), &Key::log_end(GROUP), usize::MAX).unwrap().len()
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
        assert_eq!(digest(&store, GROUP).unwrap().applied, Some(Applied { term: 1, index: 2 }));
        disk.crash(0);
        let found = disk.open();
        assert_eq!(entries(&found), 1);
        assert_eq!(digest(&found, GROUP).unwrap().applied, Some(Applied { term: 1, index: 1 }));
    }

    #[test]
    #[should_panic(expected = "written once, and was there already")]
    fn a_row_that_is_written_once_is_written_once() {
        let store = MemoryDisk::default().open();
        store.write_state([(Key::applied(GROUP), Write::PutOnce(vec![]))]).unwrap();
        store.write_state([(Key::applied(GROUP), Write::PutOnce(vec![]))]).unwrap();
    }
}
