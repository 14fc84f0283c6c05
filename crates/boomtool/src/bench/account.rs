//! What was promised against what came: which tasks fired, were lost, came early or twice, and how late they were.
//!
//! Pure functions over two lists: what the node acknowledged, and what the receiver wrote down. They are compared after
//! the fact, for a delivery can overtake the answer to its registration. Writing down is all that happens while it
//! counts: 48 bytes under a lock that is hardly ever contended.

use std::collections::{HashMap, HashSet};
use std::time::UNIX_EPOCH;

use boomerang_task::locks::Mutex;
use hdrhistogram::Histogram;

use boomerang_client::Due;
use boomerang_receiver::{Percentiles, Received};
use boomerang_task::{Fence, InstantMs, TaskId};

/// Everything above counts as this: an hour.
const SPAN_US_MAX: u64 = 3_600_000_000;

/// A run that becomes slower, or faster, shows it in so many parts.
const SLICES: usize = 10;

/// The accuracy of percentiles: 3 significant digits.
const SIGNIFICANT_DIGITS: u8 = 3;

/// For spans of time in microseconds.
pub(super) fn histogram() -> Histogram<u64> {
    Histogram::new_with_max(SPAN_US_MAX, SIGNIFICANT_DIGITS).expect("constants in range")
}

/// The due instants of the tasks of a bench, by their number.
#[derive(Debug, Clone, Copy)]
pub(super) enum Schedule {
    /// All as long after their registration.
    In(u64),
    /// Evenly over `spread_ms` from `first_ms` on; all at one instant when that is 0.
    Spread { first_ms: InstantMs, spread_ms: u64, tasks: u64 },
}

impl Schedule {
    pub fn due(&self, number: u64) -> Due {
        match *self {
            Schedule::In(delay_ms) => Due::In(delay_ms),
            Schedule::Spread { first_ms, spread_ms, tasks } => {
                let offset = u128::from(spread_ms) * u128::from(number) / u128::from(tasks.max(1));
                Due::At(first_ms + u64::try_from(offset).unwrap_or(u64::MAX))
            }
        }
    }
}

/// A delivery, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Arrival {
    pub task_id: TaskId,
    pub occurrence: u64,
    pub fence: Fence,
    pub arrived_us: u64,
}

/// Everything that came, in the order of arrival.
#[derive(Debug)]
pub(super) struct Arrivals(Mutex<Vec<Arrival>>);

impl Arrivals {
    /// Has room for so many before it must grow.
    pub fn with_capacity(expected: u64) -> Self {
        Self(Mutex::new(Vec::with_capacity(usize::try_from(expected).unwrap_or(0))))
    }

    pub fn take(&self, received: &Received) {
        let since = received.arrived_at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let arrival = Arrival {
            task_id: received.task_id,
            occurrence: received.occurrence,
            fence: received.fence,
            arrived_us: u64::try_from(since.as_micros()).unwrap_or(u64::MAX),
        };
        self.0.lock().push(arrival);
    }

    pub fn len(&self) -> usize {
        self.0.lock().len()
    }

    /// What came after the first `seen`.
    pub fn since(&self, seen: usize) -> Vec<Arrival> {
        self.0.lock()[seen..].to_vec()
    }

    pub fn judge(&self, acknowledged: &[(TaskId, InstantMs)]) -> Judgement {
        // Of a copy: no delivery is to wait for it.
        Judgement::of(acknowledged, &self.since(0))
    }
}

/// What became of the acknowledged tasks of a bench. Each has one occurrence.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Judgement {
    /// Came at least once.
    pub fired: u64,
    /// Acknowledged, and did not come.
    pub lost: Vec<TaskId>,
    /// Deliveries before the due instant that the node had answered.
    pub early: u64,
    /// By how much, at most.
    pub early_us_max: u64,
    /// Deliveries of what had come before, whichever attempt it was: the receiver of a bench accepts the first.
    pub duplicates: u64,
    /// Those of acknowledged tasks that did not carry a larger fence: a receiver that keeps the largest refuses them.
    pub duplicates_not_larger: u64,
    /// Those that carried the very same one, which no leader may give twice.
    pub duplicates_same_fence: u64,
    /// Deliveries of other tasks, such as those whose registration was never answered.
    pub strays: u64,
    /// Of the first delivery of each task; an early one counts as 0.
    pub lateness_us: Percentiles,
    /// First and last of these first deliveries.
    pub first_us: u64,
    pub last_us: u64,
}

struct Seen {
    due_ms: InstantMs,
    /// The largest so far; `None` before the first delivery.
    fence: Option<Fence>,
}

impl Judgement {
    fn of(acknowledged: &[(TaskId, InstantMs)], arrivals: &[Arrival]) -> Self {
        let mut tasks: HashMap<TaskId, Seen> =
            acknowledged.iter().map(|(id, due_ms)| (*id, Seen { due_ms: *due_ms, fence: None })).collect();
        let mut lateness = histogram();
        let (mut early, mut early_us_max, mut duplicates, mut strays) = (0, 0, 0, 0);
        let mut strangers = HashSet::new();
        let (mut duplicates_not_larger, mut duplicates_same_fence) = (0, 0);
        let (mut fired, mut first_us, mut last_us) = (0, u64::MAX, 0);
        for arrival in arrivals {
            let Some(seen) = tasks.get_mut(&arrival.task_id).filter(|_| arrival.occurrence == 0) else {
                strays += 1;
                duplicates += u64::from(!strangers.insert((arrival.task_id, arrival.occurrence)));
                continue;
            };
            let due_us = seen.due_ms.saturating_mul(1000);
            if arrival.arrived_us < due_us {
                early += 1;
                early_us_max = early_us_max.max(due_us - arrival.arrived_us);
            }
            match seen.fence {
                None => {
                    fired += 1;
                    first_us = first_us.min(arrival.arrived_us);
                    last_us = last_us.max(arrival.arrived_us);
                    lateness.saturating_record(arrival.arrived_us.saturating_sub(due_us));
                }
                Some(fence) => {
                    duplicates += 1;
                    duplicates_not_larger += u64::from(arrival.fence <= fence);
                    duplicates_same_fence += u64::from(arrival.fence == fence);
                }
            }
            seen.fence = seen.fence.max(Some(arrival.fence));
        }
        let came = |id: &TaskId| tasks.get(id).is_some_and(|seen| seen.fence.is_some());
        Self {
            fired,
            lost: acknowledged.iter().map(|(id, _)| *id).filter(|id| !came(id)).collect(),
            early,
            early_us_max,
            duplicates,
            duplicates_not_larger,
            duplicates_same_fence,
            strays,
            lateness_us: Percentiles::of(&lateness),
            first_us: first_us.min(last_us),
            last_us,
        }
    }

    /// From the first delivery to the last.
    pub fn per_second(&self) -> f64 {
        // The first one opens the span and is not part of it.
        rate(self.fired.saturating_sub(1), self.last_us - self.first_us)
    }
}

/// So many in so many microseconds, as a rate; with one decimal, for nobody reads more.
#[allow(clippy::cast_precision_loss, reason = "a rate needs no 16 digits")]
pub(super) fn rate(count: u64, span_us: u64) -> f64 {
    rounded(count as f64 * 1e6 / span_us.max(1) as f64, 1)
}

/// The rate of each tenth of what happened at these instants, in their order; empty when there are not ten.
pub(super) fn slices(mut happened_us: Vec<u64>) -> Vec<f64> {
    happened_us.sort_unstable();
    let all = happened_us.len();
    if all < SLICES {
        return Vec::new();
    }
    let mut begin = (0, 0);
    let slice = |number: usize| {
        let end = (all * number / SLICES, happened_us[all * number / SLICES - 1]);
        let (count, span_us) = (end.0 - begin.0, end.1 - begin.1);
        begin = end;
        rate(count as u64, span_us)
    };
    (1..=SLICES).map(slice).collect()
}

/// With so many decimals.
pub(super) fn rounded(number: f64, decimals: i32) -> f64 {
    let unit = 10f64.powi(decimals);
    (number * unit).round() / unit
}

#[cfg(test)]
mod tests {
    use super::*;
    use boomerang_client::fake::task_id;

    const DUE_MS: u64 = 1_000;

    fn arrival(task: u64, fence: (u64, u64), arrived_us: u64) -> Arrival {
        Arrival { task_id: task_id(task), occurrence: 0, fence: Fence { term: fence.0, seq: fence.1 }, arrived_us }
    }

    fn acknowledged(tasks: impl IntoIterator<Item = u64>) -> Vec<(TaskId, InstantMs)> {
        tasks.into_iter().map(|task| (task_id(task), DUE_MS)).collect()
    }

    #[test]
    fn dues_are_spread_evenly_and_within_the_span() {
        let schedule = Schedule::Spread { first_ms: 100, spread_ms: 10, tasks: 4 };
        let dues: Vec<Due> = (0..4).map(|number| schedule.due(number)).collect();
        assert_eq!(dues, [100, 102, 105, 107].map(Due::At));
        let many = Schedule::Spread { first_ms: 0, spread_ms: 10, tasks: 1_000_000 };
        assert_eq!((many.due(0), many.due(999_999)), (Due::At(0), Due::At(9)));
        let instant = Schedule::Spread { first_ms: 7, spread_ms: 0, tasks: 3 };
        assert_eq!((instant.due(0), instant.due(2)), (Due::At(7), Due::At(7)));
        assert_eq!(Schedule::In(5).due(9), Due::In(5));
    }

    #[test]
    fn lost_early_and_twice_are_told_apart() {
        let arrivals = [
            arrival(1, (1, 1), 1_000_400),
            // Twice: once as a retry with a new fence, once as a copy.
            arrival(2, (1, 2), 1_000_600),
            arrival(2, (1, 3), 1_900_000),
            arrival(2, (1, 3), 1_900_001),
            // The fence of an old leader after that of a new one.
            arrival(3, (2, 1), 1_000_800),
            arrival(3, (1, 9), 1_000_900),
            arrival(4, (1, 4), 999_990),
            // Nobody has heard of it, and another occurrence is none of ours either.
            arrival(9, (1, 5), 1_000_000),
            Arrival { occurrence: 1, ..arrival(1, (1, 6), 1_000_000) },
            arrival(9, (1, 7), 1_000_000),
        ];
        let judgement = Judgement::of(&acknowledged(1..=5), &arrivals);
        assert_eq!(judgement.lost, [task_id(5)]);
        assert_eq!((judgement.fired, judgement.strays), (4, 3));
        assert_eq!((judgement.early, judgement.early_us_max), (1, 10));
        assert_eq!((judgement.duplicates, judgement.duplicates_not_larger), (4, 2));
        assert_eq!(judgement.duplicates_same_fence, 1);
        assert_eq!((judgement.first_us, judgement.last_us), (999_990, 1_000_800), "duplicates end no span");
        assert_eq!((judgement.lateness_us.p50, judgement.lateness_us.max), (400, 800), "nor are they lateness");
    }

    #[test]
    fn nothing_came() {
        let judgement = Judgement::of(&acknowledged(1..=2), &[]);
        assert_eq!((judgement.fired, judgement.lost.len(), judgement.per_second()), (0, 2, 0.0));
    }

    #[test]
    fn a_slice_is_a_tenth_of_what_happened() {
        // A hundred, one each millisecond, the last ten one each ten; in any order.
        let instants = (1..=90).map(|n| n * 1_000).chain((1..=10).map(|n| 90_000 + n * 10_000));
        let mut expected = vec![1_000.0; 9];
        expected.push(100.0);
        assert_eq!(slices(instants.rev().collect()), expected);
        assert_eq!(slices((0..9).collect()), [0.0; 0], "too few");
        // All of them with one answer.
        assert_eq!(slices(vec![1_000_000; 20])[..2], [2.0, 2e6]);
    }

    #[test]
    fn a_rate_is_counted_between_the_first_and_the_last() {
        let arrivals: Vec<Arrival> = (0..11).map(|n| arrival(n, (1, n), 2_000_000 + n * 1_000)).collect();
        assert_eq!(Judgement::of(&acknowledged(0..11), &arrivals).per_second(), 1_000.0);
        assert_eq!(rate(3, 0), 3e6, "a clock of microseconds sees nothing shorter");
        assert_eq!(rate(1, 3_000_000), 0.3);
    }
}
