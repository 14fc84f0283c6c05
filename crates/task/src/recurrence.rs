//! How a task goes on after its first occurrence: when the next one is due, and what becomes of those that were missed.

use serde::{Deserialize, Serialize};

use super::{InstantMs, Invalid};

/// A task that comes back. Its n-th due instant is the first one and n intervals: nothing drifts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recurrence {
    /// From one due instant to the next, milliseconds, at least 1.
    pub interval_ms: u64,
    /// What becomes of due instants that have passed.
    pub missed: Missed,
    /// An occurrence starts even if the one before is still out.
    pub overlap: bool,
    /// The task ends after so many due instants.
    pub count: Option<u64>,
    /// No occurrence is due later than this.
    pub until_ms: Option<InstantMs>,
}

/// What becomes of due instants at which a task could not start: the node was down, or the occurrence before still out.
/// Append only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Missed {
    /// They are left out.
    Skip,
    /// They are run as one, at once.
    Once,
    /// Each is run, one after the other: at most so many of them, the latest.
    All {
        /// The latest so many; the others are left out.
        max: u32,
    },
}

impl Missed {
    /// So many of those that were missed are delivered when nothing else is said.
    pub const MAX_DEFAULT: u32 = 100;
    /// No more of those that were missed can be asked for.
    pub const MAX_MAX: u32 = 10_000;
}

impl Recurrence {
    /// Every `interval_ms`, with the settings of whoever names none.
    pub fn every(interval_ms: u64) -> Self {
        Self { interval_ms, missed: Missed::Once, overlap: false, count: None, until_ms: None }
    }

    /// Refuses what is out of range, or has no occurrence at all when the first is due at `first_due_ms`.
    pub fn validate(&self, first_due_ms: Option<InstantMs>) -> Result<(), Invalid> {
        if self.interval_ms == 0 {
            return Err(Invalid::new("recurrence: needs a repeat_interval_ms"));
        }
        if let Missed::All { max } = self.missed
            && (max == 0 || max > Missed::MAX_MAX)
        {
            return Err(Invalid::new(format!("recurrence.missed_max: {max} is not within 1 and {}", Missed::MAX_MAX)));
        }
        if let (Some(until_ms), Some(first)) = (self.until_ms, first_due_ms)
            && until_ms < first
        {
            return Err(Invalid::new("recurrence.until_ms: is before the first due instant"));
        }
        Ok(())
    }
}
