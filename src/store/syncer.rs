//! One fsync for all groups of a node.
//!
//! A group writes its log entries without waiting and leaves a callback here. One thread takes all callbacks that have
//! gathered, syncs RocksDB's WAL once, and answers all of them; what arrives meanwhile waits for the next round. So the
//! number of fsyncs follows the disk, not the number of groups: sixteen busy groups cost one fsync, not sixteen.
//!
//! Order: a callback is taken before its sync begins, and its entries were written before it was left here, so when it
//! is answered everything written before it, by any group, is durable as well.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use super::{Store, StoreError};

type Callback = Box<dyn FnOnce(Result<(), Arc<StoreError>>) + Send>;

#[derive(Default)]
struct Queue {
    waiting: Vec<Callback>,
    stopping: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    arrived: Condvar,
    syncs: AtomicU64,
    requests: AtomicU64,
}

/// A handle on the syncer; cheap to clone.
#[derive(Clone)]
pub struct Syncer {
    shared: Arc<Shared>,
}

impl Syncer {
    /// Starts the thread. It ends after [`Syncer::stop`], when everything left before has been answered.
    pub fn start(store: Store) -> (Self, JoinHandle<()>) {
        let shared = Arc::new(Shared::default());
        let syncer = Self { shared: shared.clone() };
        let thread = std::thread::Builder::new()
            .name("wal-sync".into())
            .spawn(move || run(&store, &shared))
            .expect("the system has room for a thread");
        (syncer, thread)
    }

    /// Calls `callback` once everything written to the log before this call is on disk, or cannot be.
    pub fn after_sync(&self, callback: impl FnOnce(Result<(), Arc<StoreError>>) + Send + 'static) {
        self.shared.requests.fetch_add(1, Ordering::Relaxed);
        let mut queue = self.shared.queue.lock().expect("the syncer never panics under its lock");
        queue.waiting.push(Box::new(callback));
        // The thread looks at the queue again before it sleeps; only the first of a round has to wake it.
        if queue.waiting.len() == 1 {
            self.shared.arrived.notify_one();
        }
    }

    pub fn stop(&self) {
        self.shared.queue.lock().expect("the syncer never panics under its lock").stopping = true;
        self.shared.arrived.notify_one();
    }

    /// Syncs done so far, and callbacks left so far.
    pub fn counts(&self) -> (u64, u64) {
        (self.shared.syncs.load(Ordering::Relaxed), self.shared.requests.load(Ordering::Relaxed))
    }
}

fn run(store: &Store, shared: &Shared) {
    loop {
        let round = {
            let mut queue = shared.queue.lock().expect("the syncer never panics under its lock");
            while queue.waiting.is_empty() && !queue.stopping {
                queue = shared.arrived.wait(queue).expect("the syncer never panics under its lock");
            }
            if queue.waiting.is_empty() {
                return;
            }
            std::mem::take(&mut queue.waiting)
        };
        let result = store.sync_log().map_err(Arc::new);
        shared.syncs.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = &result {
            tracing::error!(%error, "the log cannot be synced");
        }
        for callback in round {
            callback(result.clone());
        }
    }
}
