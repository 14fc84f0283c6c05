//! Counts what came: how many, how late, how often twice, and whether ever early.
//!
//! A delivery is a duplicate when its occurrence was delivered before with the same or a later attempt, or with the
//! same or a larger fence; with a larger one it is stale as well. The copy of a dead letter is another thing than the
//! deliveries of its occurrence. Memory is bounded: the oldest occurrences are forgotten, and a duplicate of one of
//! those counts as new; the bound is the caller's.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::Received;
use boomerang_task::{Fence, TaskId};

/// Everything above counts as this: an hour.
const LATENESS_US_MAX: u64 = 3_600_000_000;

/// The accuracy of percentiles: 3 significant digits.
const SIGNIFICANT_DIGITS: u8 = 3;

/// Task, occurrence, and whether it is the copy of a dead letter.
type Key = (TaskId, u64, bool);

/// How a delivery relates to those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Novelty {
    /// The first of its occurrence, or a further attempt.
    New,
    /// It came before.
    Duplicate,
    /// A delivery with a larger fence came before: this one is from an earlier leader, or was overtaken.
    Stale,
}

/// A running account of deliveries.
#[derive(Debug)]
pub struct Tally {
    occurrences: HashMap<Key, Seen>,
    /// The keys of `occurrences`, oldest first.
    order: VecDeque<Key>,
    occurrences_max: usize,
    deliveries: u64,
    fired: u64,
    duplicates: u64,
    stale: u64,
    early: u64,
    lateness_us: Histogram<u64>,
}

#[derive(Debug)]
struct Seen {
    attempt: u32,
    fence: Fence,
}

/// What a [`Tally`] has come to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TallySummary {
    /// Everything that came.
    pub deliveries: u64,
    /// Occurrences that came at least once.
    pub fired: u64,
    /// Deliveries that a receiver with a fence would have refused.
    pub duplicates: u64,
    /// Those of them that came after one with a larger fence.
    pub stale: u64,
    /// Deliveries before their due instant.
    pub early: u64,
    /// Of the first delivery of each occurrence; an early one counts as 0.
    pub lateness_us: Percentiles,
}

/// Five numbers of a distribution, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Percentiles {
    /// Half are below.
    pub p50: u64,
    /// 9 of 10 are below.
    pub p90: u64,
    /// 99 of 100 are below.
    pub p99: u64,
    /// 999 of 1000 are below.
    pub p999: u64,
    /// The largest.
    pub max: u64,
}

impl Percentiles {
    /// Reads them from a histogram; all are 0 when it is empty.
    pub fn of(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile);
        Self { p50: at(0.5), p90: at(0.9), p99: at(0.99), p999: at(0.999), max: histogram.max() }
    }
}

impl Tally {
    /// Remembers the newest `occurrences_max` occurrences, at about 100 bytes each.
    pub fn new(occurrences_max: usize) -> Self {
        Self {
            occurrences: HashMap::new(),
            order: VecDeque::new(),
            occurrences_max: occurrences_max.max(1),
            deliveries: 0,
            fired: 0,
            duplicates: 0,
            stale: 0,
            early: 0,
            lateness_us: Histogram::new_with_max(LATENESS_US_MAX, SIGNIFICANT_DIGITS).expect("constants in range"),
        }
    }

    /// Takes one delivery into account.
    pub fn record(&mut self, received: &Received) -> Novelty {
        self.deliveries += 1;
        let lateness_us = received.lateness_us();
        if lateness_us.is_some_and(|lateness_us| lateness_us < 0) {
            self.early += 1;
        }
        let key = (received.task_id, received.occurrence, received.dead_letter.is_some());
        let (attempt, fence) = (received.attempt, received.fence);
        match self.occurrences.entry(key) {
            Entry::Occupied(mut entry) => {
                let seen = entry.get_mut();
                let novelty = if fence < seen.fence {
                    Novelty::Stale
                } else if attempt > seen.attempt && fence > seen.fence {
                    Novelty::New
                } else {
                    Novelty::Duplicate
                };
                *seen = Seen { attempt: attempt.max(seen.attempt), fence: fence.max(seen.fence) };
                self.duplicates += u64::from(novelty != Novelty::New);
                self.stale += u64::from(novelty == Novelty::Stale);
                novelty
            }
            Entry::Vacant(entry) => {
                entry.insert(Seen { attempt, fence });
                self.order.push_back(key);
                let fired = received.dead_letter.is_none();
                self.fired += u64::from(fired);
                if let Some(lateness_us) = lateness_us.filter(|_| fired) {
                    self.lateness_us.saturating_record(u64::try_from(lateness_us).unwrap_or(0));
                }
                if self.order.len() > self.occurrences_max
                    && let Some(oldest) = self.order.pop_front()
                {
                    self.occurrences.remove(&oldest);
                }
                Novelty::New
            }
        }
    }

    /// Everything that came, duplicates included.
    pub fn deliveries(&self) -> u64 {
        self.deliveries
    }

    /// The account so far.
    pub fn summary(&self) -> TallySummary {
        TallySummary {
            deliveries: self.deliveries,
            fired: self.fired,
            duplicates: self.duplicates,
            stale: self.stale,
            early: self.early,
            lateness_us: Percentiles::of(&self.lateness_us),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use bytes::Bytes;

    use super::*;
    use crate::DeadLetterCopy;
    use boomerang_client::fake::task_id;
    use boomerang_task::Protocol;

    fn received(task: u64, occurrence: u64, attempt: u32, fence: (u64, u64), arrived_us: u64) -> Received {
        Received {
            task_id: task_id(task),
            client_id: String::new(),
            protocol: Protocol::Tcp,
            name: String::new(),
            payload: Bytes::new(),
            occurrence,
            attempt,
            due_ms: 1_000,
            fence: Fence { term: fence.0, seq: fence.1 },
            dead_letter: None,
            http: None,
            request_id: 1,
            from: "127.0.0.1:1".parse().unwrap(),
            arrived_at: UNIX_EPOCH + Duration::from_micros(arrived_us),
        }
    }

    #[test]
    fn duplicates_are_told_from_retries() {
        let mut tally = Tally::new(100);
        let copy = DeadLetterCopy { id: String::new(), attempts: 2, error: String::new() };
        let copy = Received { dead_letter: Some(copy), ..received(1, 0, 1, (0, 0), 1_000_200) };
        for (what, delivery, novelty) in [
            ("first", received(1, 0, 1, (1, 1), 1_000_100), Novelty::New),
            ("retry", received(1, 0, 2, (1, 2), 2_000_000), Novelty::New),
            ("same again", received(1, 0, 2, (1, 2), 2_000_000), Novelty::Duplicate),
            ("same attempt of a new leader", received(1, 0, 2, (2, 1), 2_000_000), Novelty::Duplicate),
            ("stale fence", received(1, 0, 3, (1, 9), 2_000_000), Novelty::Stale),
            ("its dead letter", copy, Novelty::New),
            ("next occurrence", received(1, 1, 1, (1, 3), 1_000_300), Novelty::New),
            ("early", received(2, 0, 1, (1, 4), 999_000), Novelty::New),
        ] {
            assert_eq!(tally.record(&delivery), novelty, "{what}");
        }
        let summary = tally.summary();
        assert_eq!((summary.deliveries, summary.fired, summary.duplicates, summary.early), (8, 3, 3, 1));
        assert_eq!(summary.stale, 1);
        assert_eq!((summary.lateness_us.p50, summary.lateness_us.max), (100, 300), "retries are not lateness");
    }

    #[test]
    fn memory_is_bounded() {
        let mut tally = Tally::new(2);
        for task in [1, 2, 3, 3] {
            tally.record(&received(task, 0, 1, (1, task), 1_000_000));
        }
        assert_eq!(tally.occurrences.len(), 2);
        assert_eq!(tally.summary().duplicates, 1);
        let again = tally.record(&received(1, 0, 1, (1, 1), 1_000_000));
        assert_eq!(again, Novelty::New, "forgotten");
    }

    #[test]
    fn an_empty_account_is_all_zeros() {
        let summary = Tally::new(1).summary();
        assert_eq!((summary.fired, summary.lateness_us.p50, summary.lateness_us.max), (0, 0, 0));
    }
}
