//! One file for each promise: what in a history breaks it.
//!
//! A checker is a function from a history and its [`Limits`] to a [`Verdict`]. It sees only what clients and receivers
//! saw. What nobody knows (an operation without an answer) speaks neither for nor against.

use serde::Serialize;

use crate::history::History;

/// How much of what depends on time is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// So much before its due instant a delivery may come: nothing, unless clocks were set wrong.
    pub early_us: u64,
    /// So long after everything was healed, lateness must be normal again.
    pub heal_within_us: u64,
    /// What is normal: the lateness of whatever is due after that.
    pub late_us: u64,
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
