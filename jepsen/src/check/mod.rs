//! One file for each promise: what in a history breaks it.
//!
//! A checker is a function from a history and its [`Limits`] to a [`Verdict`]. It sees nothing else: no cluster, no clock.
//! What nobody knows (an operation without an answer) speaks neither for nor against.

use serde::Serialize;

use crate::fault;
use crate::history::History;

mod answers;
mod clocks;
mod digests;
mod duplicates;
mod early;
mod fences;
#[cfg(test)]
pub(crate) mod hand_made;
mod lateness;
mod lost;
mod occurrences;
mod reads;
mod tasks;
mod unique;

pub use lateness::percentile;

/// How much of what depends on time is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// So much before its due instant a delivery may come at any time: nothing, unless clocks are wrong all the time.
    pub early_us: u64,
    /// So much while a history says that clocks are set wrong, and until they have followed the right time again.
    pub early_clocks_us: u64,
    /// So long after everything was healed, lateness must be normal again.
    pub heal_within_us: u64,
    /// What is normal: the lateness of whatever is due after that.
    pub late_us: u64,
    /// So long a receiver may take for its answer; the next occurrence waits for it.
    pub answer_us: u64,
    /// A delivery may be so long on its way (a paused sender, a cut link) and still come: until then, one that was
    /// overtaken by what followed it breaks no promise.
    pub stale_us: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            early_us: 0,
            early_clocks_us: fault::EARLY_US_MAX,
            heal_within_us: 15_000_000,
            late_us: 500_000,
            answer_us: 1_500_000,
            stale_us: 60_000_000,
        }
    }
}

/// What a checker found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    pub checker: &'static str,
    /// The promise, in one sentence.
    pub promise: &'static str,
    /// What was looked at and counted, by name: a verdict about nothing is worth nothing.
    pub counts: Vec<(&'static str, u64)>,
    /// Empty when the promise was kept.
    pub violations: Vec<Violation>,
}

/// One break of a promise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Violation {
    pub what: String,
    /// The events it rests on, by index.
    pub events: Vec<u64>,
}

impl Verdict {
    pub fn holds(&self) -> bool {
        self.violations.is_empty()
    }
}

pub type Checker = fn(&History, &Limits) -> Verdict;

/// Every promise, by the name of its checker.
pub const ALL: [(&str, Checker); 11] = [
    ("lost", lost::check),
    ("early", early::check),
    ("occurrences", occurrences::check),
    ("answers", answers::check),
    ("fences", fences::check),
    ("duplicates", duplicates::within_a_term),
    ("duplicates_without_a_fault", duplicates::without_a_fault),
    ("unique", unique::check),
    ("digests", digests::check),
    ("lateness", lateness::check),
    ("reads", reads::check),
];

/// What all of them say.
pub fn all(history: &History, limits: &Limits) -> Vec<Verdict> {
    ALL.iter().map(|(_, checker)| checker(history, limits)).collect()
}

/// More violations than this are counted, not described: one broken promise can break for every task of a run.
const DESCRIBED_MAX: usize = 100;

/// What a checker gathers while it looks.
struct Findings {
    checker: &'static str,
    promise: &'static str,
    violations: Vec<Violation>,
    found: u64,
}

impl Findings {
    fn new(checker: &'static str, promise: &'static str) -> Self {
        Self { checker, promise, violations: Vec::new(), found: 0 }
    }

    fn add(&mut self, events: impl IntoIterator<Item = u64>, what: String) {
        self.found += 1;
        if self.violations.len() < DESCRIBED_MAX {
            self.violations.push(Violation { what, events: events.into_iter().collect() });
        }
    }

    fn verdict(self, mut counts: Vec<(&'static str, u64)>) -> Verdict {
        counts.push(("violations", self.found));
        Verdict { checker: self.checker, promise: self.promise, counts, violations: self.violations }
    }
}
