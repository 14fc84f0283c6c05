//! The hierarchical timing wheel: which timers are due, and when to look next. It knows (due, id)
//! only: no clock, thread, I/O or randomness. Time comes in as a value; `firing` drives it.
//!
//! A tick number is read in digits of 6 bits. A timer waits in the row of the highest digit in
//! which its due tick differs from the cursor (the tick the wheel has reached), in that digit's
//! slot:
//!
//! ```text
//!   cursor 3|17|05    due 3|17|09 -> row 0, slot 9     fires when the cursor gets there
//!                     due 3|20|44 -> row 1, slot 20    moves down when slot 20 begins
//!   above the top row: the far row, a slot per bit; it begins where that bit of the cursor turns 1
//! ```
//!
//! So busy slots all lie ahead, lower rows first, and the next one is a `trailing_zeros` on a row's
//! busy word: empty stretches cost nothing. No timer leaves early; the cursor never goes back.

mod index;
mod slab;
mod slots;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod twin;

use std::fmt;
use std::hash::Hash;

use self::index::Index;
use self::slab::{Entry, Slab};
use self::slots::{LEVELS_MAX, Slots};

/// Longest tick. A coarser wheel would make every timer late by more than a person notices.
pub const TICK_MS_MAX: u64 = 1_000;

/// Default tick: the resolution of a due time.
const TICK_MS_DEFAULT: u64 = 1;

/// Default number of levels: 64^4 ticks of 1 ms are 4.6 hours, well beyond the window of 30
/// minutes.
const LEVELS_DEFAULT: u32 = 4;

/// What identifies a timer: a task id in production, a number in tests.
pub trait TimerId: Copy + Eq + Hash + fmt::Debug {}

impl<T: Copy + Eq + Hash + fmt::Debug> TimerId for T {}

/// The two settings of a wheel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WheelConfig {
    /// Length of a tick in milliseconds. Due times are rounded up to it.
    pub tick_ms: u64,
    /// Number of levels of 64 slots. Timers beyond 64^levels ticks wait in the far row.
    pub levels: u32,
}

impl Default for WheelConfig {
    fn default() -> Self {
        Self { tick_ms: TICK_MS_DEFAULT, levels: LEVELS_DEFAULT }
    }
}

/// Why a [`WheelConfig`] was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WheelConfigError {
    #[error("wheel tick_ms is {0}, it must be from 1 to {TICK_MS_MAX} milliseconds")]
    TickMs(u64),
    #[error("wheel levels is {0}, it must be from 1 to {LEVELS_MAX}")]
    Levels(u32),
}

impl WheelConfig {
    /// Checks both settings.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> Result<(), WheelConfigError> {
        if !(1..=TICK_MS_MAX).contains(&self.tick_ms) {
            return Err(WheelConfigError::TickMs(self.tick_ms));
        }
        if !(1..=LEVELS_MAX).contains(&self.levels) {
            return Err(WheelConfigError::Levels(self.levels));
        }
        Ok(())
    }

    /// The tick at which a timer fires: the first one that is not before its due.
    fn tick_of_due(&self, due_ms: u64) -> u64 {
        due_ms.div_ceil(self.tick_ms)
    }

    /// The last tick that has begun at `now_ms`. The very last instant belongs to the tick after
    /// it, which would begin beyond the end of `u64`: otherwise a timer due in that unfinished tick
    /// could never fire.
    fn tick_of_now(&self, now_ms: u64) -> u64 {
        if now_ms == u64::MAX { self.tick_of_due(now_ms) } else { now_ms / self.tick_ms }
    }

    /// The instant at which a tick begins; the one tick beyond the end of `u64` begins at its end.
    fn ms_of_tick(&self, tick: u64) -> u64 {
        tick.saturating_mul(self.tick_ms)
    }

    /// A timer as the slab keeps it: the tick it fires at, and how long before that tick it is
    /// really due.
    fn entry<K>(&self, due_ms: u64, id: K) -> Entry<K> {
        let due_tick = self.tick_of_due(due_ms);
        // Wrapping, because the last tick may end beyond u64; the difference is exact all the same.
        let early_ms = due_tick.wrapping_mul(self.tick_ms).wrapping_sub(due_ms);
        let early_ms = u16::try_from(early_ms).expect("less than a tick, so less than TICK_MS_MAX");
        Entry::new(id, due_tick, early_ms)
    }

    /// The due that [`WheelConfig::entry`] was given.
    fn due_ms<K>(&self, entry: &Entry<K>) -> u64 {
        entry.due_tick.wrapping_mul(self.tick_ms).wrapping_sub(u64::from(entry.early_ms))
    }
}

/// The timing wheel. See the head of the module.
pub struct Wheel<K> {
    config: WheelConfig,
    /// The latest instant the wheel has been told. The cursor of `slots` is at its tick, or behind
    /// it while `expire` has ready timers that the caller's `max` did not let out.
    now_ms: u64,
    /// The lists the timers wait in.
    slots: Slots,
    /// The timers.
    slab: Slab<K>,
    /// From id to the place in the slab.
    index: Index,
}

impl<K: TimerId> Wheel<K> {
    /// An empty wheel whose clock stands at `now_ms`.
    ///
    /// # Panics
    /// When the config is not valid: it is validated once, where the settings are read.
    #[must_use]
    pub fn new(config: WheelConfig, now_ms: u64) -> Self {
        if let Err(error) = config.validate() {
            panic!("{error}");
        }
        Self {
            config,
            now_ms,
            slots: Slots::new(config.levels, config.tick_of_now(now_ms)),
            slab: Slab::new(),
            index: Index::new(),
        }
    }

    /// Adds a timer. Returns false and changes nothing when the id is there already, whatever its
    /// due. A timer that is due already is ready at once, behind those that became ready before it:
    /// a loader that feeds overdue tasks in due order gets them back in that order.
    pub fn insert(&mut self, due_ms: u64, id: K) -> bool {
        let Some(vacancy) = self.index.vacancy(&self.slab, &id) else {
            return false;
        };
        let slot = self.slab.insert(self.config.entry(due_ms, id));
        vacancy.insert(slot);
        self.slots.push_back(&mut self.slab, slot);
        true
    }

    /// Adds a timer that has expired before, and was of no use: ready at once, ahead of all that are
    /// ready. Several that were returned together come back in their order when the last of them
    /// comes first. One whose due the wheel has not reached waits for it like any other. Returns false
    /// and changes nothing when the id is there already.
    pub fn give_back(&mut self, due_ms: u64, id: K) -> bool {
        let Some(vacancy) = self.index.vacancy(&self.slab, &id) else {
            return false;
        };
        let slot = self.slab.insert(self.config.entry(due_ms, id));
        vacancy.insert(slot);
        self.slots.push_front_if_ready(&mut self.slab, slot);
        true
    }

    /// Removes a timer and returns its due; `None` when it is not there (never was, expired, or
    /// cancelled before).
    pub fn cancel(&mut self, id: &K) -> Option<u64> {
        let slot = self.index.remove(&self.slab, id)?;
        Some(self.forget(slot))
    }

    /// Adds a timer or moves it to another due; returns the old due of one that was there. A moved
    /// timer queues behind those of its new tick, like a new one.
    pub fn reschedule(&mut self, due_ms: u64, id: K) -> Option<u64> {
        let Some(slot) = self.index.find(&self.slab, &id) else {
            let inserted = self.insert(due_ms, id);
            debug_assert!(inserted, "{id:?} was not in the index");
            return None;
        };
        self.slots.unlink(&mut self.slab, slot);
        let old_due_ms = self.config.due_ms(&self.slab[slot]);
        let moved = self.config.entry(due_ms, id);
        self.slab[slot].due_tick = moved.due_tick;
        self.slab[slot].early_ms = moved.early_ms;
        self.slots.push_back(&mut self.slab, slot);
        Some(old_due_ms)
    }

    /// The due of a timer.
    #[must_use]
    pub fn due_of(&self, id: &K) -> Option<u64> {
        self.index.find(&self.slab, id).map(|slot| self.config.due_ms(&self.slab[slot]))
    }

    /// Whether a timer is in the wheel, ready ones included.
    #[must_use]
    pub fn contains(&self, id: &K) -> bool {
        self.index.find(&self.slab, id).is_some()
    }

    /// How many timers the wheel holds, ready ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slab.len()
    }

    /// Whether the wheel holds no timer.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The earliest instant at which `expire` can return something: the wheel's now when a timer is
    /// ready, else the beginning of the next busy slot. That is exact in the lowest row; in a
    /// higher one the timers may be later, and an `expire` at that instant moves them down. `None`
    /// when the wheel is empty.
    #[must_use]
    pub fn next_wake_ms(&self) -> Option<u64> {
        if self.slots.first_ready().is_some() {
            return Some(self.now_ms);
        }
        // With a cursor behind now (see `now_ms`) the next slot may have begun already.
        let (_, start_tick) = self.slots.next_busy()?;
        Some(self.config.ms_of_tick(start_tick).max(self.now_ms))
    }

    /// Advances the wheel to `now_ms` and appends at most `max` expired timers to `out` as (due,
    /// id): in the order of their ticks, within a tick in the order they were inserted, and first
    /// of all those that were overdue when inserted. Returns true when more are ready: call again
    /// with the same now. Those stay cancellable. A `now_ms` before the latest one counts as the
    /// latest one, for the wheel's clock never goes back.
    ///
    /// # Panics
    /// When a timer is about to fire before its due, which no caller can cause.
    pub fn expire(&mut self, now_ms: u64, max: usize, out: &mut Vec<(u64, K)>) -> bool {
        self.now_ms = self.now_ms.max(now_ms);
        let target_tick = self.config.tick_of_now(self.now_ms);
        let mut room = max;
        loop {
            while room > 0
                && let Some(slot) = self.slots.first_ready()
            {
                let id = self.slab[slot].id;
                let removed = self.index.remove(&self.slab, &id);
                debug_assert_eq!(removed, Some(slot), "the index knows every timer");
                let due_ms = self.forget(slot);
                assert!(due_ms <= self.now_ms, "{id:?} due {due_ms} fires early");
                out.push((due_ms, id));
                room -= 1;
            }
            // The cursor moves on only when nothing is ready, so that ready timers all belong to
            // its tick and leave in the order they came. With no room left this looks for one more,
            // to give an exact answer.
            if self.slots.first_ready().is_some() {
                return true;
            }
            if !self.slots.advance(&mut self.slab, target_tick) {
                return false;
            }
        }
    }

    /// Removes all timers and gives their memory back. The clock stays.
    pub fn clear(&mut self) {
        *self = Self::new(self.config, self.now_ms);
    }

    /// The heap memory the wheel holds now: timers, index and slots.
    #[must_use]
    pub fn allocated_bytes(&self) -> usize {
        self.slab.allocated_bytes() + self.index.allocated_bytes() + self.slots.allocated_bytes()
    }

    /// Takes a timer, already gone from the index, out of its list and the slab; returns its due.
    /// Where that leaves too many holes, timers from the slab's end are moved into them: at most
    /// two for each timer removed.
    fn forget(&mut self, slot: u32) -> u64 {
        self.slots.unlink(&mut self.slab, slot);
        let due_ms = self.config.due_ms(&self.slab[slot]);
        self.slab.remove(slot);
        while self.slab.is_sparse() {
            if let Some((from, to)) = self.slab.drop_last() {
                self.slots.relink(&mut self.slab, to);
                self.index.replace(&self.slab[to].id, from, to);
            }
        }
        due_ms
    }
}

impl<K: TimerId> fmt::Debug for Wheel<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wheel")
            .field("config", &self.config)
            .field("now_ms", &self.now_ms)
            .field("len", &self.len())
            .field("next_wake_ms", &self.next_wake_ms())
            .finish_non_exhaustive()
    }
}
