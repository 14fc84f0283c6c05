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
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use tokio::sync::oneshot;

use super::keys::Key;
use super::overlay::Write;
use super::syncer::{Callback, Rounds, Syncer, SyncerThread};
use super::{LogWrite, Store, StoreError};

/// More rows of the state are not written in one go, so that the log does not wait longer than some milliseconds.
const STATE_ROWS_PER_WRITE: usize = 4_096;
/// As many rows are small.
const SMALL_ROWS: usize = 64;
/// And as many bytes of the log.
const SMALL_LOG_BYTES: usize = 16 * 1024;

type Written = oneshot::Sender<Result<(), Arc<StoreError>>>;

#[derive(Default)]
struct Queue {
    log: Vec<LogWrite>,
    /// Those who wait for the log, in order.
    callbacks: Vec<Callback>,
    state: VecDeque<(HashMap<Key, Write>, Written)>,
    /// The thread sleeps: whoever leaves something has to wake it.
    idle: bool,
    /// Somebody writes.
    busy: bool,
    stopping: bool,
    /// The thread is gone: nobody would write any more.
    ended: bool,
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
        self.queue.lock().expect("the writer never panics under its lock")
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
        if queue.busy || queue.ended || !queue.is_empty() {
            return None;
        }
        queue.busy = true;
        Some(Turn(self))
    }
}

/// Nobody else writes until it is dropped.
struct Turn<'a>(&'a Shared);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut queue = self.0.lock();
        queue.busy = false;
        if !queue.is_empty() || queue.stopping {
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

    /// Writes to the log, and calls `callback` once it is on disk, with everything that was left here before, or cannot be.
    /// Until then it may not be found by reading.
    pub fn append(&self, changes: Vec<LogWrite>, callback: impl FnOnce(Result<(), Arc<StoreError>>) + Send + 'static) {
        let Some(shared) = &self.shared else {
            return write_log(&self.store, &self.syncer, changes, vec![Box::new(callback)]);
        };
        if log_bytes(&changes) <= SMALL_LOG_BYTES
            && let Some(_turn) = shared.turn()
        {
            return write_log(&self.store, &self.syncer, changes, vec![Box::new(callback)]);
        }
        let mut callback = Some(callback);
        shared.leave(|queue| {
            if !queue.ended {
                queue.log.extend(changes);
                queue.callbacks.push(Box::new(callback.take().expect("it is called once")));
            }
        });
        if let Some(callback) = callback {
            callback(Err(stopped()));
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
        if writes.len() <= SMALL_ROWS
            && let Some(_turn) = shared.turn()
        {
            return self.store.write_state(writes).map_err(Arc::new);
        }
        let (done, written) = oneshot::channel();
        shared.leave(|queue| {
            if !queue.ended {
                queue.state.push_back((writes, done));
            }
        });
        written.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// Waits until everything that was left here before can be read.
    pub async fn settled(&self) -> Result<(), Arc<StoreError>> {
        self.write_state(HashMap::new()).await
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

fn run(store: &Store, syncer: &Syncer, shared: &Shared) {
    loop {
        let (log, callbacks, state) = {
            let mut queue = shared.lock();
            while queue.busy || (queue.is_empty() && !queue.stopping) {
                queue.idle = true;
                queue = shared.arrived.wait(queue).expect("the writer never panics under its lock");
            }
            queue.idle = false;
            if queue.is_empty() {
                queue.ended = true;
                return;
            }
            queue.busy = true;
            let log = std::mem::take(&mut queue.log);
            let callbacks = std::mem::take(&mut queue.callbacks);
            (log, callbacks, some_of(&mut queue.state))
        };
        let _turn = Turn(shared);
        write_log(store, syncer, log, callbacks);
        write_state(store, state);
    }
}

fn log_bytes(changes: &[LogWrite]) -> usize {
    let bytes = |change: &LogWrite| match change {
        LogWrite::Put(_, value) => value.len(),
        LogWrite::DeleteRange(..) => 0,
    };
    changes.iter().map(bytes).sum()
}

/// As much of the state as is written in one go, and at least the first part.
fn some_of<T>(state: &mut VecDeque<(HashMap<Key, Write>, T)>) -> Vec<(HashMap<Key, Write>, T)> {
    let mut rows = 0;
    let fits = state.iter().take_while(|(writes, _)| {
        rows += writes.len();
        rows <= STATE_ROWS_PER_WRITE
    });
    let count = fits.count().max(1).min(state.len());
    state.drain(..count).collect()
}

fn write_log(store: &Store, syncer: &Syncer, changes: Vec<LogWrite>, callbacks: Vec<Callback>) {
    if callbacks.is_empty() {
        return;
    }
    match store.write_log(changes) {
        Ok(()) => syncer.all_after_sync(callbacks),
        Err(error) => {
            tracing::error!(%error, "the log cannot be written");
            let error = Arc::new(error);
            callbacks.into_iter().for_each(|callback| callback(Err(error.clone())));
        }
    }
}

fn write_state(store: &Store, parts: Vec<(HashMap<Key, Write>, Written)>) {
    if parts.is_empty() {
        return;
    }
    let (writes, waiting): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
    let result = match writes.iter().all(HashMap::is_empty) {
        true => Ok(()),
        false => store.write_state(writes.into_iter().flatten()).map_err(Arc::new),
    };
    if let Err(error) = &result {
        tracing::error!(%error, "the state cannot be written");
    }
    for written in waiting {
        // Whoever waited may be gone.
        let _ = written.send(result.clone());
    }
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
        // The log was left first, so it is there.
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
        Store::open(temp.path()).expect("the threads have let go of the database");
    }

    #[test]
    fn much_of_the_state_is_written_in_several_goes() {
        let rows = |count: usize| {
            let rows = (0..count).map(|n| (Key::from_stored(n.to_be_bytes().to_vec()), Write::Delete));
            (rows.collect::<HashMap<_, _>>(), ())
        };
        let mut state =
            VecDeque::from([rows(STATE_ROWS_PER_WRITE + 1), rows(STATE_ROWS_PER_WRITE - 1), rows(1), rows(1)]);
        let goes: Vec<usize> = std::iter::from_fn(|| (!state.is_empty()).then(|| some_of(&mut state).len())).collect();
        assert_eq!(goes, [1, 2, 1]);
        assert!(some_of(&mut state).is_empty());
    }
}
