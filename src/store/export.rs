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

use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::thread::JoinHandle;

use rocksdb::{Cache, IngestExternalFileOptions, Options, SstFileWriter};
use tokio::sync::{mpsc, oneshot};

use super::keys::Key;
use super::rows::Applied;
use super::{Backend, Rocks, Row, Store, StoreError, codec, scan_options, state_options};
use crate::task::GroupId;

const CHUNK_BYTES: usize = 256 * 1024;
/// The same in memory, where there is little.
const ROWS_PER_CHUNK: usize = 16;
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

/// Pins `group` as it is now. `head` names rows that are wanted before the rest.
pub async fn export(store: Store, group: GroupId, head: Vec<Key>) -> Result<Export, StoreError> {
    let (out, rows) = mpsc::channel(CHUNKS_AHEAD);
    let rocks = match store.backend {
        Backend::Rocks(rocks) => rocks,
        Backend::Memory(memory) => {
            let head = head.iter().map(|key| memory.get_state(key)).collect();
            let (from, until) = Key::group_range(group);
            tokio::spawn(send_chunks(memory.scan_state(&from, &until, usize::MAX), out));
            return Ok(Export { head, chunks: Chunks { rows, reader: None } });
        }
    };
    let (head_out, head_in) = oneshot::channel();
    let spawned = std::thread::Builder::new().name(format!("export-{group}")).spawn(move || {
        read_pinned(&rocks, group, &head, head_out, &out);
    });
    let reader = spawned.map_err(StoreError::file("start a thread for", Path::new("an export")))?;
    let chunks = Chunks { rows, reader: Some(reader) };
    let head = head_in.await.map_err(|_| StoreError::damaged("an export", "its thread died"))??;
    Ok(Export { head, chunks })
}

async fn send_chunks(rows: Vec<Row>, out: mpsc::Sender<Chunk>) {
    for chunk in rows.chunks(ROWS_PER_CHUNK) {
        if out.send(Ok(chunk.to_vec())).await.is_err() {
            return;
        }
    }
}

fn read_pinned(
    rocks: &Rocks,
    group: GroupId,
    head: &[Key],
    head_out: oneshot::Sender<Result<Vec<Option<Vec<u8>>>, StoreError>>,
    out: &mpsc::Sender<Chunk>,
) {
    let state = rocks.state();
    let pinned = rocks.db.snapshot();
    let head = head.iter().map(|key| pinned.get_cf(&state, key).map_err(StoreError::rocks("read", "state")));
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
            let _ = out.blocking_send(Err(StoreError::rocks("scan", "state")(error)));
            return;
        }
        if rows.is_empty() || out.blocking_send(Ok(rows)).is_err() {
            return;
        }
    }
}

/// Rows of a shard on their way in; nothing of it counts before [`Store::ingest`]. Its files go when it is dropped.
pub struct Staging {
    group: GroupId,
    place: Place,
    last: Option<Vec<u8>>,
    applied: Option<Applied>,
}

enum Place {
    Files {
        // Closed before its folder goes.
        writer: Option<SstFileWriter<'static>>,
        folder: Folder,
    },
    Memory(Vec<Row>),
}

/// Goes with everything in it.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// All rows of a shard.
pub struct Staged {
    group: GroupId,
    rows: StagedRows,
    applied: Option<Applied>,
}

enum StagedRows {
    Files { files: Vec<PathBuf>, _folder: Folder },
    Memory(Vec<Row>),
}

impl Staged {
    /// The moment these rows are of, as they say themselves.
    pub fn applied(&self) -> Option<Applied> {
        self.applied
    }
}

impl Staging {
    /// For `store`, which is to take it in. `folder` must not be in use by another.
    pub fn begin(store: &Store, group: GroupId, folder: PathBuf) -> Result<Self, StoreError> {
        let place = match &store.backend {
            Backend::Rocks(_) => {
                // Left over from a process that was killed.
                let _ = std::fs::remove_dir_all(&folder);
                std::fs::create_dir_all(&folder).map_err(StoreError::file("create", &folder))?;
                Place::Files { writer: None, folder: Folder(folder) }
            }
            Backend::Memory(_) => Place::Memory(Vec::new()),
        };
        Ok(Self { group, place, last: None, applied: None })
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
            match &mut self.place {
                Place::Files { writer, folder } => {
                    let writer = match writer {
                        Some(writer) => writer,
                        none => none.insert(open_writer(&folder.0.join("rows.sst"))?),
                    };
                    writer.put(key, value).map_err(StoreError::rocks("write", "a snapshot"))?;
                }
                Place::Memory(kept) => kept.push((key.clone(), value.clone())),
            }
            if key == applied_key.as_ref() {
                self.applied = Some(codec::decode("last applied", value)?);
            }
            self.last = Some(key.clone());
        }
        Ok(())
    }

    pub fn finish(self) -> Result<Staged, StoreError> {
        let Self { group, place, applied, .. } = self;
        let rows = match place {
            Place::Files { writer, folder } => finish_files(group, folder, writer)?,
            Place::Memory(rows) => StagedRows::Memory(rows),
        };
        Ok(Staged { group, rows, applied })
    }
}

fn finish_files(
    group: GroupId,
    folder: Folder,
    rows: Option<SstFileWriter<'static>>,
) -> Result<StagedRows, StoreError> {
    let clear = folder.0.join("clear.sst");
    let (from, until) = Key::group_range(group);
    let mut writer = open_writer(&clear)?;
    writer
        .delete_range(from.as_ref(), until.as_ref())
        .and_then(|()| writer.finish())
        .map_err(StoreError::rocks("write", "a snapshot"))?;
    let mut files = vec![clear];
    if let Some(mut writer) = rows {
        writer.finish().map_err(StoreError::rocks("write", "a snapshot"))?;
        files.push(folder.0.join("rows.sst"));
    }
    Ok(StagedRows::Files { files, _folder: folder })
}

fn open_writer(path: &Path) -> Result<SstFileWriter<'static>, StoreError> {
    // As the database writes its own: with a filter and an index in parts. A writer reads nothing, so its cache is none.
    static OPTIONS: LazyLock<Options> = LazyLock::new(|| state_options(&Cache::new_lru_cache(0)));
    let writer = SstFileWriter::create(&OPTIONS);
    writer.open(path).map_err(StoreError::rocks("write", "a snapshot"))?;
    Ok(writer)
}

impl Store {
    /// Takes in what was staged for it, in one step: after a crash the shard is as before, or all new.
    pub fn ingest(&self, staged: Staged) -> Result<(), StoreError> {
        tracing::info!(group = %staged.group, "taking in a snapshot");
        match (&self.backend, staged.rows) {
            (Backend::Rocks(rocks), StagedRows::Files { files, _folder }) => {
                let mut options = IngestExternalFileOptions::default();
                options.set_move_files(true);
                rocks
                    .db
                    .ingest_external_file_cf_opts(&rocks.state(), &options, files)
                    .map_err(StoreError::rocks("ingest", "a snapshot"))
            }
            (Backend::Memory(memory), StagedRows::Memory(rows)) => {
                memory.ingest(Key::group_range(staged.group), rows);
                Ok(())
            }
            _ => Err(StoreError::damaged("a snapshot", "it was staged for another store")),
        }
    }
}
