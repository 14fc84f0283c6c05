//! What only the leader of a shard does: loads the window, drives the wheel, dispatches, settles.
//!
//! ```text
//!   apply --Scheduled/Ended--> [ledger: wheel, in flight, held, armed] <--window-- timeline on disk
//!                                       |
//!                              driver thread: due and armed
//!                                       v
//!                     dispatcher: lease? still due? payload  --> callback --> settle --> propose
//! ```
//!
//! Everything here is a cache of the shard's state and dies with the term: a new leader reads the timeline from
//! its start, so what was overdue goes out first, in due order, while the rest of the window is still loading. Whether
//! an attempt may go out is decided by replicated state, the armed watermark; that this node may still lead is checked
//! before every batch, which keeps duplicates rare and is not what correctness rests on (the fence is). While it may not
//! be sure, and the term goes on, all of this stands still and stays: within a term no attempt leaves twice.
//!
//! None of these tasks ends before the node does. A panic in one of them would leave a leader that does nothing, so it is
//! the node's end ([`Alarm`](crate::raft::groups::Alarm)).
//!
//! - [`ledger`]: what this node knows as leader, shard by shard; it hears what is applied. [`held`]: what is held back
//! - [`driver`]: what sleeps to the next busy slot
//! - [`window`]: follows leadership, and reads the timeline ahead
//! - [`dispatch`]: from a due id to a delivery and its outcome; [`steps`]: what of it needs no waiting
//! - [`forget`]: what has been kept long enough
//! - [`hand_over`]: when another replica is to lead; [`flags`]: its settings

mod dispatch;
mod driver;
pub mod flags;
mod forget;
pub mod hand_over;
mod held;
mod ledger;
#[cfg(test)]
mod panics;
#[cfg(test)]
mod races;
mod steps;
#[cfg(test)]
mod tests;
mod window;

use std::sync::Arc;

use driver::Driver;
pub use ledger::Ledger;

use crate::callback::Callbacks;
use crate::clock::Clock;
use crate::metrics::Metrics;
use crate::propose::Proposer;
use crate::raft::Groups;
use crate::store::Store;
use crate::task::GroupId;
use crate::wheel::WheelConfig;
use tokio_util::task::TaskTracker;

/// How far ahead, how much and how fine.
#[derive(Debug, Clone, Copy)]
pub struct FiringSettings {
    pub wheel: WheelConfig,
    /// What is due within this span is kept in memory.
    pub window_ms: u64,
    /// The most timers in all wheels of the node; the window is shorter when it is reached.
    pub timers_max: usize,
    /// The most attempts that are out at a time.
    pub in_flight_max: usize,
    /// How long it is kept what became of occurrences; 0 keeps nothing.
    pub history_ms: u64,
}

impl Default for FiringSettings {
    fn default() -> Self {
        Self {
            wheel: WheelConfig::default(),
            window_ms: 30 * 60 * 1000,
            timers_max: 4_000_000,
            in_flight_max: 16_384,
            history_ms: 24 * 3600 * 1000,
        }
    }
}

/// What the parts of this room share.
pub struct FiringParts {
    pub ledger: Arc<Ledger>,
    pub clock: Arc<dyn Clock>,
    pub store: Store,
    pub groups: Groups,
    pub proposer: Proposer,
    pub callbacks: Callbacks,
    pub metrics: Arc<Metrics>,
    /// The attempts that are out.
    pub deliveries: TaskTracker,
}

/// Runs until it is dropped: then nothing more is dispatched.
pub struct Firing {
    ledger: Arc<Ledger>,
    driver: Option<Driver>,
    deliveries: TaskTracker,
    followers: tokio::task::JoinSet<()>,
}

impl Firing {
    pub fn start(parts: FiringParts) -> Self {
        parts.callbacks.set_waiters(parts.ledger.clone());
        let parts = Arc::new(parts);
        let mut followers = tokio::task::JoinSet::new();
        for group in (1..=parts.groups.shards()).map(GroupId) {
            followers.spawn(window::follow(group, parts.clone()));
        }
        let (ledger, deliveries) = (parts.ledger.clone(), parts.deliveries.clone());
        let alarm = parts.groups.alarm("the driver of the wheels");
        let driver = Driver::start(ledger.clone(), dispatch::armer(parts), alarm);
        Self { ledger, driver: Some(driver), deliveries, followers }
    }

    /// Stops dispatching, and waits until everything that is out has come back and is settled.
    pub async fn drain(&mut self) {
        self.stop_dispatching();
        self.deliveries.close();
        self.deliveries.wait().await;
    }

    fn stop_dispatching(&mut self) {
        self.followers.abort_all();
        self.ledger.stop();
        if let Some(driver) = self.driver.take() {
            driver.join();
        }
    }
}

impl Drop for Firing {
    fn drop(&mut self) {
        self.stop_dispatching();
    }
}
