//! A part that panics ends the node: real groups, and a fault in what each part asks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{Notify, watch};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use super::{Firing, FiringSettings, Ledger};
use crate::callback::guard::Guard;
use crate::callback::{CallbackSettings, Callbacks};
use crate::clock::{Clock, SystemClock};
use crate::metrics::Metrics;
use crate::propose::{self, Ask, DiskState, Dispatches, Proposer};
use crate::raft::alone::{Alone, GROUP, NEVER};
use crate::shard::Claim;
use crate::task::{GroupId, ShardId, TaskId};

/// Fails whoever asks it, from when it is told to.
struct Faulty {
    clock: SystemClock,
    faulty: AtomicBool,
    asked: Notify,
}

impl Faulty {
    fn new() -> Arc<Self> {
        Arc::new(Self { clock: SystemClock::new(), faulty: AtomicBool::new(false), asked: Notify::new() })
    }

    fn fail_from_now_on(&self) {
        self.faulty.store(true, Ordering::SeqCst);
    }
}

impl Clock for Faulty {
    fn now_us(&self) -> u64 {
        self.asked.notify_waiters();
        assert!(!self.faulty.load(Ordering::SeqCst), "on purpose");
        self.clock.now_us()
    }
}

impl Dispatches for Faulty {
    fn hold(&self, _: GroupId, _: u64, _: TaskId) -> Claim {
        panic!("on purpose")
    }

    fn release(&self, _: GroupId, _: u64, _: TaskId) {}

    fn is_out(&self, _: GroupId, _: TaskId) -> bool {
        false
    }
}

/// A node with one shard, which it leads.
struct Node {
    /// Whom the driver asks what time it is.
    of_driver: Arc<Faulty>,
    /// And whoever reads the timeline ahead.
    of_follower: Arc<Faulty>,
    ledger: Arc<Ledger>,
    proposer: Proposer,
    firing: Firing,
    alone: Alone,
    _disk: watch::Sender<DiskState>,
}

impl Node {
    async fn start() -> Self {
        let (of_driver, of_follower) = (Faulty::new(), Faulty::new());
        // Read again every second.
        let settings = FiringSettings { window_ms: 1, ..FiringSettings::default() };
        let mut ledger = None;
        let alone =
            Alone::start(|store| ledger.insert(Ledger::new(store.clone(), of_driver.clone(), settings, 1)).clone());
        let alone = alone.await;
        let ledger = ledger.expect("it was made for the groups");
        let (groups, store) = (alone.groups.clone(), alone.store());
        let (disk_out, disk) = watch::channel(DiskState::Fine);
        let proposer = Proposer::start(propose::ProposerParts {
            groups: groups.clone(),
            clock: Arc::new(SystemClock::new()),
            dispatches: Faulty::new(),
            disk,
            store: store.clone(),
            shards: 1,
            keep_history: true,
        });
        let firing = Firing::start(super::FiringParts {
            ledger: ledger.clone(),
            clock: of_follower.clone(),
            store,
            groups: groups.clone(),
            proposer: proposer.clone(),
            callbacks: Callbacks::new(CallbackSettings::default(), Guard::new(Vec::new(), Arc::new(()))),
            metrics: Arc::new(Metrics::new()),
            deliveries: TaskTracker::new(),
        });
        let node = Self { of_driver, of_follower, ledger, proposer, firing, alone, _disk: disk_out };
        node.led().await;
        node
    }

    async fn led(&self) {
        let looks = async {
            loop {
                // Whoever fires for a shard that is led asks what time it is, again and again.
                let asked = self.of_follower.asked.notified();
                if self.ledger.counts().led > 0 {
                    return;
                }
                asked.await;
            }
        };
        timeout(NEVER, looks).await.expect("it leads its shard");
    }

    /// It says why it cannot go on, and can still be stopped.
    async fn ends_by(self, who: &str) {
        let why = timeout(NEVER, self.alone.groups.failed()).await.expect("it does not go on as if nothing had been");
        assert!(why.contains(who), "{why}");
        drop(self.firing);
        let _ = self.alone.groups.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_of_who_fires_for_a_shard_is_the_end_of_the_node() {
    let node = Node::start().await;
    node.of_follower.fail_from_now_on();
    node.ends_by("who fires for a shard has panicked").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_of_the_driver_is_the_end_of_the_node() {
    let node = Node::start().await;
    node.of_driver.fail_from_now_on();
    node.ledger.clock_moved();
    let ledger = node.ledger.clone();
    node.ends_by("the driver of the wheels has panicked").await;
    // Nobody else panics because of it, and is told of instead.
    ledger.counts();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_of_who_proposes_is_the_end_of_the_node() {
    let node = Node::start().await;
    let cancel = Ask::Cancel { id: TaskId::new(0, ShardId(0), 1), owner: None };
    // Whoever waits for an answer is told that there is none.
    timeout(NEVER, node.proposer.ask(GROUP, cancel)).await.unwrap().unwrap_err();
    node.ends_by("who proposes for a group has panicked").await;
}
