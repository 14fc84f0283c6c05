//! What a page says in numbers: operations by what came of them, deliveries, lateness.

use std::collections::{BTreeMap, HashSet};

use crate::check::percentile;
use crate::history::{Call, Delivery, End, History};

/// What came of the operations of one kind.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcomes {
    pub ok: u64,
    pub fail: u64,
    pub unknown: u64,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// By kind of operation.
    pub operations: BTreeMap<&'static str, Outcomes>,
    pub deliveries: u64,
    /// The same attempt of the same occurrence again.
    pub repeated: u64,
    /// Attempts after the first.
    pub retries: u64,
    pub accepted: u64,
    /// Copies of dead letters.
    pub copies: u64,
    /// Of first attempts, sorted.
    pub late_us: Vec<u64>,
}

pub fn of_call(call: &Call) -> &'static str {
    match call {
        Call::Register(_) => "register",
        Call::Cancel { .. } => "cancel",
        Call::Edit { .. } => "edit",
        Call::Get { .. } => "get",
        Call::List { .. } => "list",
    }
}

/// Which attempts have come already.
pub struct Come<'h>(HashSet<(&'h str, u64, u32)>);

impl<'h> Come<'h> {
    pub fn new() -> Self {
        Self(HashSet::new())
    }

    /// Whether this attempt has not come before.
    pub fn is_new(&mut self, delivery: &'h Delivery) -> bool {
        self.0.insert((&delivery.task, delivery.occurrence, delivery.attempt))
    }
}

pub fn figures(history: &History) -> Figures {
    let mut figures = Figures::default();
    for operation in history.operations() {
        let outcomes = figures.operations.entry(of_call(operation.call)).or_default();
        match operation.end {
            Some((End::Ok(_), ..)) => outcomes.ok += 1,
            Some((End::Fail(_), ..)) => outcomes.fail += 1,
            Some((End::Unknown(_), ..)) | None => outcomes.unknown += 1,
        }
    }
    let mut seen = Come::new();
    for (_, at_us, delivery) in history.deliveries() {
        if delivery.dead_letter {
            figures.copies += 1;
            continue;
        }
        figures.deliveries += 1;
        figures.accepted += u64::from(delivery.accepted);
        if !seen.is_new(delivery) {
            figures.repeated += 1;
        } else if delivery.attempt > 1 {
            figures.retries += 1;
        } else {
            figures.late_us.push(at_us.saturating_sub(history.since_began_us(delivery.due_ms)));
        }
    }
    figures.late_us.sort_unstable();
    figures
}

impl Figures {
    pub fn late(&self, percent: usize) -> u64 {
        percentile(&self.late_us, percent)
    }
}
