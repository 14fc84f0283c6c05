//! A store with a writer on a folder, without consensus: what the tests drive by hand.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::StreamExt;
use openraft::storage::{RaftLogStorageExt, RaftStateMachine};

use crate::raft::log_store::LogStore;
use crate::raft::state_machine::{Observer, StateMachine};
use crate::raft::types::LogEntry;
use crate::shard::Effect;
use crate::store::Store;
use crate::store::rows::ShardMetaRow;
use crate::store::syncer::Rounds;
use crate::store::writer::{Writer, WriterThreads};
use crate::task::GroupId;

pub struct Ignore;

impl Observer for Ignore {
    fn applied(&self, _: GroupId, _: &ShardMetaRow, _: &[Effect]) {}
}

/// An open database. Dropping it closes it in order.
pub struct Bench {
    pub folder: PathBuf,
    pub store: Store,
    pub writer: Writer,
    _thread: Option<WriterThreads>,
}

impl Bench {
    pub fn open(folder: &Path) -> Self {
        let store = Store::open(&folder.join("db")).expect("the store opens");
        let (writer, thread) = Writer::start(store.clone());
        Self { folder: folder.into(), store, writer, _thread: Some(thread) }
    }

    /// Nothing is synced before [`Rounds::round`] is called.
    pub fn open_unsynced(folder: &Path) -> (Self, Rounds) {
        let store = Store::open(&folder.join("db")).expect("the store opens");
        let (writer, rounds) = Writer::by_hand(store.clone());
        (Self { folder: folder.into(), store, writer, _thread: None }, rounds)
    }

    pub fn log(&self, group: GroupId) -> LogStore {
        LogStore::new(group, self.writer.clone())
    }

    pub fn machine(&self, group: GroupId) -> StateMachine {
        StateMachine::open(group, self.writer.clone(), self.folder.join("staging"), Arc::new(Ignore)).unwrap()
    }
}

pub async fn append(log: &mut LogStore, entries: &[LogEntry]) {
    log.blocking_append(entries.to_vec()).await.expect("entries are appended");
}

pub async fn apply(machine: &mut StateMachine, entries: impl IntoIterator<Item = LogEntry>) {
    let entries: Vec<_> = entries.into_iter().map(|entry| Ok((entry, None))).collect();
    machine.apply(futures::stream::iter(entries).boxed()).await.expect("entries are applied");
}

/// What the disk holds for certain: all of it but the end of the newest WAL file that was not synced.
///
/// RocksDB syncs a closed WAL file before it publishes a flush (`FlushMemTableToOutputFile`), and a file is only closed
/// for a flush, so the older ones are whole.
pub struct PowerCut {
    folder: PathBuf,
    synced: BTreeMap<PathBuf, u64>,
}

impl PowerCut {
    pub fn new(bench: &Bench) -> Self {
        let mut cut = Self { folder: bench.folder.clone(), synced: BTreeMap::new() };
        // Opening has synced what it left.
        cut.note();
        cut
    }

    /// Everything written until now is on disk. To be called before a sync, as what is written meanwhile may not be.
    fn note(&mut self) {
        self.synced = wal_files(&self.folder.join("db")).into_iter().collect();
    }

    pub fn sync(&mut self, rounds: &Rounds) {
        self.note();
        rounds.round();
    }

    pub fn synced_len(&self, wal: &Path) -> u64 {
        self.synced.get(wal).copied().unwrap_or(0)
    }

    /// The folder as the machine would find it if the power went now.
    pub fn cut(&self) -> tempfile::TempDir {
        let after = copy(&self.folder);
        if let Some((newest, _)) = wal_files(&after.path().join("db")).last() {
            let synced = self.synced_len(&self.folder.join("db").join(newest.file_name().unwrap()));
            std::fs::OpenOptions::new().write(true).open(newest).unwrap().set_len(synced).unwrap();
        }
        after
    }
}

/// The WAL files of a database and their lengths, oldest first.
pub fn wal_files(db: &Path) -> Vec<(PathBuf, u64)> {
    let entries = std::fs::read_dir(db).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = entries
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .map(|path| (path.clone(), std::fs::metadata(&path).unwrap().len()))
        .collect();
    files.sort();
    files
}

/// A copy of a folder whose database is closed, or rests: nothing is being flushed or compacted.
pub fn copy(folder: &Path) -> tempfile::TempDir {
    fn copy_into(from: &Path, to: &Path) {
        std::fs::create_dir_all(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            let target = to.join(path.file_name().unwrap());
            if path.is_dir() {
                copy_into(&path, &target);
            } else {
                std::fs::copy(&path, &target).unwrap();
            }
        }
    }
    let to = tempfile::tempdir().unwrap();
    copy_into(folder, to.path());
    to
}
