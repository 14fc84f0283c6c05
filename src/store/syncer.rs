//! One fsync for all groups of a node.
//!
//! What is written to the log is not waited for (see [`super::writer`]), and a callback is left here. One thread takes
//! all callbacks that have gathered, syncs RocksDB's WAL once, and answers all of them; what arrives meanwhile waits for
//! the next round. So the number of fsyncs follows the disk, not the number of groups: sixteen busy groups cost one
//! fsync, not sixteen.
//!
//! Order: a callback is taken before its sync begins, and its entries were written before it was left here, so when it
//! is answered everything written before it, by any group, is durable as well.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard};
use std::thread::JoinHandle;

use tokio::sync::Notify;

use super::{Store, StoreError};
use crate::task::locks::{Condvar, Mutex};

pub(super) type Callback = Box<dyn FnOnce(Result<(), Arc<StoreError>>) + Send>;

#[derive(Default)]
struct Queue {
    waiting: Vec<Callback>,
    stopping: bool,
    /// The thread is gone: nobody would answer any more.
    ended: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    arrived: Condvar,
    /// The same, for one who does not have a thread.
    told: Notify,
    syncs: AtomicU64,
    requests: AtomicU64,
}

/// A handle on the syncer; cheap to clone.
#[derive(Clone)]
pub struct Syncer {
    shared: Arc<Shared>,
}

impl Syncer {
    /// Starts the thread.
    pub fn start(store: Store) -> (Self, SyncerThread) {
        let shared = Arc::new(Shared::default());
        let syncer = Self { shared: shared.clone() };
        let thread = std::thread::Builder::new()
            .name("wal-sync".into())
            .spawn(move || run(&store, &shared))
            .expect("the system has room for a thread");
        (syncer.clone(), SyncerThread { syncer, thread: Some(thread) })
    }

    /// Calls each of `callbacks`, in order, once everything written to the log before this call is on disk, or cannot be.
    pub(super) fn after_sync(&self, callbacks: Vec<Callback>) {
        self.shared.requests.fetch_add(callbacks.len() as u64, Ordering::Relaxed);
        let mut queue = self.shared.queue.lock();
        if queue.ended {
            // An error rather than silence: whoever waits for a sync would wait for ever.
            drop(queue);
            let error = Arc::new(StoreError::damaged("the log", "cannot be synced: the syncer has stopped"));
            return callbacks.into_iter().for_each(|callback| callback(Err(error.clone())));
        }
        let was_empty = queue.waiting.is_empty();
        queue.waiting.extend(callbacks);
        // The thread looks at the queue again before it sleeps; only the first of a round has to wake it.
        if was_empty {
            self.shared.arrived.notify_one();
            self.shared.told.notify_one();
        }
    }

    fn stop(&self) {
        self.shared.queue.lock().stopping = true;
        self.shared.arrived.notify_one();
    }

    /// Syncs done so far, and callbacks left so far.
    pub fn counts(&self) -> (u64, u64) {
        (self.shared.syncs.load(Ordering::Relaxed), self.shared.requests.load(Ordering::Relaxed))
    }
}

/// The thread of a syncer, which does not outlive this: it holds the database. When this is dropped, everything left before is
/// answered, and nothing after it.
pub struct SyncerThread {
    syncer: Syncer,
    thread: Option<JoinHandle<()>>,
}

impl Drop for SyncerThread {
    fn drop(&mut self) {
        self.syncer.stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the syncer does not panic");
        }
    }
}

fn run(store: &Store, shared: &Shared) {
    loop {
        let round = {
            let mut queue = shared.queue.lock();
            while queue.waiting.is_empty() && !queue.stopping {
                queue = shared.arrived.wait(queue);
            }
            if queue.waiting.is_empty() {
                queue.ended = true;
                return;
            }
            std::mem::take(&mut queue.waiting)
        };
        answer(store, shared, round);
    }
}

fn answer(store: &Store, shared: &Shared, round: Vec<Callback>) {
    let result = store.sync_log().map_err(Arc::new);
    shared.syncs.fetch_add(1, Ordering::Relaxed);
    if let Err(error) = &result {
        tracing::error!(%error, "the log cannot be synced");
    }
    for callback in round {
        callback(result.clone());
    }
}

/// The syncer's rounds, one by one: for tests of what must wait for them, and for a simulation.
pub struct Rounds {
    store: Store,
    shared: Arc<Shared>,
}

impl Rounds {
    /// Waits until somebody waits.
    pub async fn arrived(&self) {
        while self.queue().waiting.is_empty() {
            self.shared.told.notified().await;
        }
    }

    /// Syncs once, and answers whoever waits.
    pub fn round(&self) {
        let round = std::mem::take(&mut self.queue().waiting);
        answer(&self.store, &self.shared, round);
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.shared.queue.lock()
    }
}

impl Syncer {
    /// A syncer without a thread.
    pub fn by_hand(store: Store) -> (Self, Rounds) {
        let shared = Arc::new(Shared::default());
        (Self { shared: shared.clone() }, Rounds { store, shared })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn what_is_left_before_a_stop_is_answered_and_what_comes_later_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::open(temp.path()).unwrap();
        let (syncer, thread) = Syncer::start(store);
        let (done, results) = mpsc::channel();
        for _ in 0..100 {
            let done = done.clone();
            syncer.after_sync(vec![Box::new(move |result| done.send(result.is_ok()).unwrap())]);
        }
        drop(thread);
        assert_eq!(results.try_iter().filter(|good| *good).count(), 100);
        syncer.after_sync(vec![Box::new(move |result| done.send(result.is_ok()).unwrap())]);
        assert_eq!(results.try_recv(), Ok(false), "an answer comes at once, and it is no");
        Store::open(temp.path()).expect("the thread has released the database");
    }
}
