//! All writes of a node's groups, one after the other, and by one thread where many gather.
//!
//! RocksDB lets one writer in at a time, and whoever waits for its turn there waits with its thread: with as many groups
//! as write at once, the threads of the common runtime all stood in that line, and nobody was left to hear a request. So
//! groups leave here what is to be written. The thread takes all that has gathered, makes one batch of it for each of the
//! two families, the log first, and passes on those who wait for the log to the [syncer](super::syncer). What is small,
//! while nobody writes, is written by whoever leaves it: that takes less time than to wake another thread.
//!
//! ```text
//!   append of g3 --+                       +--> one batch, with WAL --> syncer: one fsync --> callbacks
//!   append of g7 --+--> what has gathered -+
//!   applied by g7 -+                       +--> one batch, without ---> whoever waits for it
//! ```
//!
//! Order: what is left here is written in the order in which it was left, except that state may wait for log that came
//! after it. So what is applied is never written before the entries it comes from.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, MutexGuard};
use std::thread::JoinHandle;

use tokio::sync::oneshot;

use super::keys::Key;
use super::overlay::Write;
use super::syncer::{Callback, Rounds, Syncer, SyncerThread};
use super::{LogWrite, Store, StoreError};
use crate::task::locks::{Condvar, Mutex};

/// More rows of the state are not written in one go, so that the log does not wait longer than some milliseconds.
const STATE_ROWS_PER_WRITE: usize = 4_096;
const STATE_BYTES_PER_WRITE: usize = 2 * 1024 * 1024;
/// As many rows are small, and as many bytes.
const SMALL_ROWS: usize = 64;
const SMALL_BYTES: usize = 16 * 1024;

type Written = oneshot::Sender<Result<(), Arc<StoreError>>>;

#[derive(Default)]
struct Queue {
    log: Vec<LogWrite>,
    /// Those who wait for the log, in order.
    callbacks: Vec<Callback>,
    state: VecDeque<(Rows, Written)>,
    /// The thread sleeps: whoever leaves something has to wake it.
    idle: bool,
    /// Somebody writes.
    busy: bool,
    stopping: bool,
    /// Why nobody writes any more: the thread was stopped, or something could not be written. What comes after that must
    /// not be written either, as it may rest on it.
    ended: Option<Arc<StoreError>>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    arrived: Condvar,
}

impl Queue {
    fn is_empty(&self) -> bool {
        self.callbacks.is_empty() && self.state.is_empty()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock()
    }

    /// Puts something into the queue.
    fn leave(&self, put: impl FnOnce(&mut Queue)) {
        let mut queue = self.lock();
        put(&mut queue);
        self.wake(&mut queue);
    }

    /// Whoever writes now wakes the thread afterwards.
    fn wake(&self, queue: &mut Queue) {
        if !queue.busy && std::mem::take(&mut queue.idle) {
            self.arrived.notify_one();
        }
    }

    /// The right to write at once, while nobody else does and nothing waits.
    fn turn(&self) -> Option<Turn<'_>> {
        let mut queue = self.lock();
        if queue.busy || queue.ended.is_some() || !queue.is_empty() {
            return None;
        }
        queue.busy = true;
        Some(Turn(self))
    }

    /// Nothing is written from now on; whoever waits hears why.
    fn end(&self, why: Arc<StoreError>) {
        let mut queue = self.lock();
        queue.ended.get_or_insert_with(|| why.clone());
        queue.log.clear();
        let (callbacks, state) = (std::mem::take(&mut queue.callbacks), std::mem::take(&mut queue.state));
        drop(queue);
        callbacks.into_iter().for_each(|callback| callback(Err(why.clone())));
        for (_, written) in state {
            let _ = written.send(Err(why.clone()));
        }
    }
}

/// Nobody else writes until it is dropped.
struct Turn<'a>(&'a Shared);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut queue = self.0.lock();
        queue.busy = false;
        if !queue.is_empty() || queue.stopping || queue.ended.is_some() {
            self.0.wake(&mut queue);
        }
    }
}

/// A handle on the writer; cheap to clone.
#[derive(Clone)]
pub struct Writer {
    store: Store,
    syncer: Syncer,
    /// `None` when whoever writes does it itself.
    shared: Option<Arc<Shared>>,
}

fn stopped() -> Arc<StoreError> {
    Arc::new(StoreError::damaged("the store", "cannot be written: the writer has stopped"))
}

impl Writer {
    /// Starts the thread, and that of the syncer.
    pub fn start(store: Store) -> (Self, WriterThreads) {
        let (syncer, syncer_thread) = Syncer::start(store.clone());
        let shared = Arc::new(Shared::default());
        let writer = Self { store, syncer, shared: Some(shared.clone()) };
        let (store, syncer) = (writer.store.clone(), writer.syncer.clone());
        let thread = std::thread::Builder::new()
            .name("store-write".into())
            .spawn({
                let shared = shared.clone();
                move || run(&store, &syncer, &shared)
            })
            .expect("the system has room for a thread");
        (writer, WriterThreads { shared, thread: Some(thread), _syncer: syncer_thread })
    }

    /// Without threads: everything is written at once by whoever leaves it, and synced by [`Rounds::round`].
    pub fn by_hand(store: Store) -> (Self, Rounds) {
        let (syncer, rounds) = Syncer::by_hand(store.clone());
        (Self { store, syncer, shared: None }, rounds)
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Writes to the log, and calls `callback` once it is on disk, with all that was left for the log before, or cannot be.
    /// Until then it may not be found by reading.
    pub fn append(&self, changes: Vec<LogWrite>, callback: impl FnOnce(Result<(), Arc<StoreError>>) + Send + 'static) {
        let Some(shared) = &self.shared else {
            let _ = write_log(&self.store, &self.syncer, changes, vec![Box::new(callback)]);
            return;
        };
        if log_bytes(&changes) <= SMALL_BYTES
            && let Some(_turn) = shared.turn()
        {
            if let Err(why) = write_log(&self.store, &self.syncer, changes, vec![Box::new(callback)]) {
                shared.end(why);
            }
            return;
        }
        let mut callback = Some(callback);
        let mut ended = None;
        shared.leave(|queue| {
            ended = queue.ended.clone();
            if ended.is_none() {
                queue.log.extend(changes);
                queue.callbacks.push(Box::new(callback.take().expect("it is called once")));
            }
        });
        if let (Some(callback), Some(why)) = (callback, ended) {
            callback(Err(why));
        }
    }

    /// [`Writer::append`], for those who want to wait.
    pub async fn write_log(&self, changes: Vec<LogWrite>) -> Result<(), Arc<StoreError>> {
        let (done, synced) = oneshot::channel();
        self.append(changes, move |result| {
            let _ = done.send(result);
        });
        synced.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// Stores all of `writes` or, after a crash, none. They can be read when this returns.
    pub async fn write_state(&self, writes: HashMap<Key, Write>) -> Result<(), Arc<StoreError>> {
        let Some(shared) = &self.shared else { return self.store.write_state(writes).map_err(Arc::new) };
        let bytes = state_bytes(&writes);
        if writes.len() <= SMALL_ROWS
            && bytes <= SMALL_BYTES
            && let Some(_turn) = shared.turn()
        {
            let written = self.store.write_state(writes).map_err(Arc::new);
            if let Err(why) = &written {
                shared.end(why.clone());
            }
            return written;
        }
        let (done, written) = oneshot::channel();
        let mut ended = None;
        shared.leave(|queue| {
            ended = queue.ended.clone();
            if ended.is_none() {
                queue.state.push_back((Rows { writes, bytes }, done));
            }
        });
        match ended {
            Some(why) => Err(why),
            None => written.await.unwrap_or_else(|_| Err(stopped())),
        }
    }

    /// Waits until everything that was left here before can be read.
    pub async fn settled(&self) -> Result<(), Arc<StoreError>> {
        match self.shared {
            Some(_) => self.write_state(HashMap::new()).await,
            None => Ok(()),
        }
    }

    /// Syncs of the log done so far, and appends left so far.
    pub fn counts(&self) -> (u64, u64) {
        self.syncer.counts()
    }
}

/// The threads of a writer, which do not outlive this: they hold the database. When this is dropped, everything left before is
/// written and answered, and nothing after it.
pub struct WriterThreads {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Ends after the other one, which leaves it something to the last.
    _syncer: SyncerThread,
}

impl Drop for WriterThreads {
    fn drop(&mut self) {
        self.shared.leave(|queue| queue.stopping = true);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the writer does not panic");
        }
    }
}

/// Nothing waits for ever when the thread has panicked.
struct Ended<'a>(&'a Shared);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.end(stopped());
    }
}

fn run(store: &Store, syncer: &Syncer, shared: &Shared) {
    let _ended = Ended(shared);
    loop {
        let (log, callbacks, state) = {
            let mut queue = shared.lock();
            while queue.busy || (queue.is_empty() && !queue.stopping && queue.ended.is_none()) {
                queue.idle = true;
                queue = shared.arrived.wait(queue);
            }
            queue.idle = false;
            if queue.is_empty() {
                queue.ended.get_or_insert_with(stopped);
                return;
            }
            queue.busy = true;
            let log = std::mem::take(&mut queue.log);
            let callbacks = std::mem::take(&mut queue.callbacks);
            (log, callbacks, some_of(&mut queue.state))
        };
        let _turn = Turn(shared);
        let (rows, waiting): (Vec<_>, Vec<_>) = state.into_iter().unzip();
        let written = write_log(store, syncer, log, callbacks).and_then(|before| write_state(store, rows, before));
        for one in waiting {
            // Whoever waited may be gone.
            let _ = one.send(written.clone());
        }
        if let Err(why) = written {
            return shared.end(why);
        }
    }
}

fn state_bytes(writes: &HashMap<Key, Write>) -> usize {
    let bytes = |write: &Write| match write {
        Write::Put(value) | Write::PutOnce(value) | Write::ReplaceOnce(value) => value.len(),
        Write::Delete | Write::DeleteOnce | Write::DeleteRange(_) => 0,
    };
    writes.values().map(bytes).sum()
}

fn log_bytes(changes: &[LogWrite]) -> usize {
    let bytes = |change: &LogWrite| match change {
        LogWrite::Put(_, value) => value.len(),
        LogWrite::DeleteRange(..) => 0,
    };
    changes.iter().map(bytes).sum()
}

/// What is written to the state together.
struct Rows {
    writes: HashMap<Key, Write>,
    bytes: usize,
}

/// As much of the state as is written in one go, and at least the first part.
fn some_of<T>(state: &mut VecDeque<(Rows, T)>) -> Vec<(Rows, T)> {
    let (mut rows, mut bytes) = (0, 0);
    let fits = state.iter().take_while(|(part, _)| {
        rows += part.writes.len();
        bytes += part.bytes;
        rows <= STATE_ROWS_PER_WRITE && bytes <= STATE_BYTES_PER_WRITE
    });
    let count = fits.count().max(1).min(state.len());
    state.drain(..count).collect()
}

/// The state follows from the log, so none of it may be on the disk when the log is not. Nothing else makes one of these.
struct LogIsWritten;

/// Answers those who wait, at once if it fails.
fn write_log(
    store: &Store,
    syncer: &Syncer,
    changes: Vec<LogWrite>,
    callbacks: Vec<Callback>,
) -> Result<LogIsWritten, Arc<StoreError>> {
    if callbacks.is_empty() {
        return Ok(LogIsWritten);
    }
    if let Err(error) = store.write_log(changes) {
        tracing::error!(%error, "the log cannot be written");
        let error = Arc::new(error);
        callbacks.into_iter().for_each(|callback| callback(Err(error.clone())));
        return Err(error);
    }
    syncer.after_sync(callbacks);
    Ok(LogIsWritten)
}

fn write_state(store: &Store, parts: Vec<Rows>, _before: LogIsWritten) -> Result<(), Arc<StoreError>> {
    if parts.iter().all(|part| part.writes.is_empty()) {
        return Ok(());
    }
    store.write_state(parts.into_iter().flat_map(|part| part.writes)).map_err(|error| {
        tracing::error!(%error, "the state cannot be written");
        Arc::new(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::GroupId;

    const GROUP: GroupId = GroupId(1);

    fn put(n: u64) -> Vec<LogWrite> {
        vec![LogWrite::Put(Key::log_entry(GROUP, n), n.to_be_bytes().to_vec())]
    }

    fn row(n: u8) -> HashMap<Key, Write> {
        HashMap::from([(Key::from_stored(vec![0, 1, n]), Write::Put(vec![n]))])
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn all_of_it_is_written_in_order_and_nothing_after_the_end() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::open(temp.path()).unwrap();
        let (writer, threads) = Writer::start(store.clone());
        let (done, results) = std::sync::mpsc::channel();
        for n in 1..=200 {
            let done = done.clone();
            writer.append(put(n), move |result| done.send((n, result.is_ok())).unwrap());
        }
        let states = futures::future::join_all((1..=200).map(|n| writer.write_state(row(n)))).await;
        assert!(states.iter().all(Result::is_ok));
        assert_eq!(store.get_log(&Key::log_entry(GROUP, 200)).unwrap().unwrap(), 200_u64.to_be_bytes());
        assert_eq!(store.get_state(&Key::from_stored(vec![0, 1, 200])).unwrap().unwrap(), [200]);
        writer.write_log(put(201)).await.unwrap();
        let answered: Vec<_> = results.try_iter().collect();
        assert_eq!(answered, (1..=200).map(|n| (n, true)).collect::<Vec<_>>());
        let (syncs, appends) = writer.counts();
        assert!((1..=201).contains(&syncs) && appends == 201, "{syncs} syncs for {appends} appends");
        drop(threads);
        assert!(writer.write_state(row(1)).await.is_err() && writer.write_log(put(202)).await.is_err());
        drop((writer, store));
        Store::open(temp.path()).expect("the threads have released the database");
    }

    #[test]
    fn much_of_the_state_is_written_in_several_goes() {
        let rows = |count: usize| {
            let writes = (0..count).map(|n| (Key::from_stored(n.to_be_bytes().to_vec()), Write::Delete)).collect();
            (Rows { writes, bytes: 1 }, ())
        };
        let mut state =
            VecDeque::from([rows(STATE_ROWS_PER_WRITE + 1), rows(STATE_ROWS_PER_WRITE - 1), rows(1), rows(1)]);
        let goes: Vec<usize> = std::iter::from_fn(|| (!state.is_empty()).then(|| some_of(&mut state).len())).collect();
        assert_eq!(goes, [1, 2, 1]);
        assert!(some_of(&mut state).is_empty());
        let large = || (Rows { writes: HashMap::new(), bytes: STATE_BYTES_PER_WRITE }, ());
        assert_eq!(some_of(&mut VecDeque::from([large(), large()])).len(), 1);
    }

    /// What rests on it must not be written either.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn after_something_could_not_be_written_nothing_is() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::open(temp.path()).unwrap();
        let (writer, threads) = Writer::start(store.clone());
        writer.write_log(put(1)).await.unwrap();
        let shared = writer.shared.clone().unwrap();
        shared.end(Arc::new(StoreError::damaged("the disk", "is full")));
        for refused in [writer.write_log(put(2)).await, writer.write_state(row(2)).await, writer.settled().await] {
            assert!(refused.unwrap_err().to_string().contains("is full"));
        }
        assert!(store.get_log(&Key::log_entry(GROUP, 2)).unwrap().is_none());
        drop(threads);
    }

    /// Large and small, from several threads: each finds its own in order, and everything is answered when the threads end.
    #[test]
    fn what_one_thread_leaves_is_written_in_its_order() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::open(temp.path()).unwrap();
        let (writer, threads) = Writer::start(store.clone());
        let (done, results) = std::sync::mpsc::channel();
        let leavers: Vec<_> = (2..6_u16)
            .map(|group| {
                let (writer, done) = (writer.clone(), done.clone());
                std::thread::spawn(move || {
                    for n in 1..=300_u64 {
                        let bytes = if n % 3 == 0 { SMALL_BYTES + 1 } else { 10 };
                        let change = LogWrite::Put(
                            Key::log_entry(GroupId(group), 1),
                            [&n.to_be_bytes()[..], &vec![0; bytes]].concat(),
                        );
                        let done = done.clone();
                        writer.append(vec![change], move |result| done.send((group, n, result.is_ok())).unwrap());
                    }
                })
            })
            .collect();
        leavers.into_iter().for_each(|leaver| leaver.join().unwrap());
        drop(threads);
        let answered: Vec<_> = results.try_iter().collect();
        assert_eq!(answered.len(), 4 * 300);
        for group in 2..6 {
            let of_group: Vec<_> =
                answered.iter().filter(|(one, ..)| *one == group).map(|(_, n, good)| (*n, *good)).collect();
            assert_eq!(of_group, (1..=300).map(|n| (n, true)).collect::<Vec<_>>());
            let last = store.get_log(&Key::log_entry(GroupId(group), 1)).unwrap().unwrap();
            assert_eq!(last[..8], 300_u64.to_be_bytes(), "the last one counts");
        }
    }
}
