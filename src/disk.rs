//! Watches the room on the disk, and says how much may be written.
//!
//! ```text
//!   free:   0 ....... stop ............ low ...................... plenty
//!           | Full     | Low             | Fine                    |
//!           nothing is   new tasks are     the reserve is laid by again
//!           written      refused
//! ```
//!
//! A write-ahead log that meets a full disk is the end of a node, so it must not come to that: new tasks are refused
//! while there is still room to finish the old ones, and when even that runs out, a file that was kept back for this is
//! deleted. Only when its room is used up as well does everything wait, until somebody makes space; what was
//! acknowledged is on the disk all the while.

use std::path::Path;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use crate::metrics::Metrics;
use crate::propose::DiskState;
use crate::store::Store;
use crate::store::space::{DiskSpace, Reserve};

/// Somebody else can fill a disk quickly; looking costs microseconds.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const RESERVE_FILE: &str = "reserve";
const MIB: u64 = 1024 * 1024;
/// Less than this, and the next write may fail: RocksDB lays by about this much for a new log file.
const STOP_BYTES: u64 = 16 * MIB;

pub struct DiskGuard {
    space: DiskSpace,
    reserve: Reserve,
    store: Store,
    low_bytes: u64,
    stop_bytes: u64,
}

impl DiskGuard {
    /// Below `low_bytes` of free room new tasks are refused; of so many more, `reserve_bytes` are kept back in a file.
    pub fn new(folder: &Path, low_bytes: u64, reserve_bytes: u64, store: Store) -> Self {
        Self {
            space: DiskSpace { path: folder.to_owned() },
            reserve: Reserve::find(folder.join(RESERVE_FILE), reserve_bytes),
            store,
            low_bytes,
            stop_bytes: STOP_BYTES.min(low_bytes / 2),
        }
    }

    /// Looks once, and does what has to be done with the reserve.
    pub fn look(&mut self) -> (DiskState, u64) {
        let mut free = self.free();
        if free < self.stop_bytes && self.reserve.is_held() {
            tracing::warn!(
                free_mib = free / MIB,
                "the disk is full; giving up the reserve to finish what was accepted"
            );
            if let Err(error) = self.reserve.release() {
                tracing::error!(%error, "the reserve cannot be given up");
            }
            free = self.free();
        }
        // RocksDB recovers by itself once there is room, a little later. On a disk with room, writes that are stopped
        // only wait for a flush.
        if free < self.stop_bytes || (free < self.low_bytes && self.store.writes_stopped()) {
            return (
                DiskState::Full(format!("the disk is full: {} MiB are free; nothing is written", free / MIB)),
                free,
            );
        }
        if free < self.low_bytes {
            let why = format!(
                "the disk is nearly full: {} MiB are free, {} MiB must be; new tasks are refused",
                free / MIB,
                self.low_bytes / MIB
            );
            return (DiskState::Low(why), free);
        }
        // With some distance, so that the reserve itself does not make the disk nearly full again.
        if !self.reserve.is_held()
            && free > self.low_bytes + 2 * self.reserve.bytes()
            && let Err(error) = self.reserve.restore()
        {
            tracing::debug!(%error, "no room is held back on the disk");
        }
        (DiskState::Fine, free)
    }

    fn free(&self) -> u64 {
        // A file system that cannot be asked is no reason to stop: a write would say so.
        self.space.free_bytes().unwrap_or(u64::MAX)
    }

    pub async fn watch(mut self, states: watch::Sender<DiskState>, metrics: std::sync::Arc<Metrics>) {
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            let (state, free) = tokio::task::block_in_place(|| self.look());
            metrics.disk_free_bytes.set(i64::try_from(free).unwrap_or(i64::MAX));
            states.send_if_modified(|known| {
                // The figure in the text changes all the time; it is kept up to date, but only a change is news.
                let news = std::mem::discriminant(known) != std::mem::discriminant(&state);
                if news {
                    match &state {
                        DiskState::Fine => tracing::info!("the disk has room again"),
                        DiskState::Low(why) | DiskState::Full(why) => tracing::warn!("{why}"),
                    }
                }
                *known = state;
                news
            });
        }
    }
}
