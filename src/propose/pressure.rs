//! Whether new work is taken on: not more than can be answered soon, and none that could cost this node what it leads.
//!
//! Who asks for more than a node can do is told so at once, with a time to come back, instead of waiting in a line that
//! grows. Looked at are how long a request would wait here, how late the runtime gets to what is ready, and how old the
//! leases are that this node leads by. Old work goes on: what is due fires and is settled, and a cancel is heard.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::{BYTES_PER_ENTRY_MAX, REQUESTS_PER_ENTRY_MAX};
use crate::raft::Groups;
use crate::sabotage::Fault;
use crate::task::locks::Mutex;

/// A new request is not let in that would wait longer for its entry to be stored.
const WAIT_MAX: Duration = Duration::from_millis(75);
/// Nor while the runtime is later than this with what is ready to run.
const LATE_MAX: Duration = Duration::from_millis(50);
/// Nor while it is later than this, though hardly anybody waits here: something else than requests keeps it from running.
const LATE_FOR_FEW_MAX: Duration = Duration::from_millis(250);
/// Nor while a lease is older than this: after one lost or late answer of the others there is time for two more.
const LEASE_AGE_MAX: Duration = Duration::from_millis(250);
/// So few may always wait in a line, or a group whose entries take long would take on hardly anything.
const FEW: usize = 64;
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// The same while nobody waits.
const LOOK_IDLE_EVERY: Duration = Duration::from_millis(50);
/// How long it counts how long an entry took.
const ROUND_KNOWN_FOR: Duration = Duration::from_secs(1);
/// How long it is remembered how late the runtime was.
const LATE_FOR: Duration = Duration::from_millis(100);

/// What is measured on this node; cheap to clone.
#[derive(Clone)]
pub struct Pressure {
    inner: Arc<PressureInner>,
}

struct PressureInner {
    groups: Groups,
    /// Requests that are not in an entry yet, in all lines of the node.
    waiting: Arc<AtomicUsize>,
    since: Instant,
    /// When the runtime should look again, in milliseconds since `since`.
    look_at_ms: AtomicU64,
    /// How late it was with that, in milliseconds, and when that was seen.
    late_ms: AtomicU64,
    late_at_ms: AtomicU64,
}

/// Of one group: how long who asks now would wait.
#[derive(Default)]
pub struct Line {
    /// Requests that are not in an entry yet, in all lines of the node.
    everywhere: Arc<AtomicUsize>,
    /// Requests that are not in an entry yet.
    waiting: AtomicUsize,
    /// Of their payloads.
    bytes: AtomicUsize,
    rounds: Mutex<Rounds>,
}

/// Entries, one after the other.
#[derive(Debug)]
struct Rounds {
    /// Of the one that is under way.
    begun: Option<Instant>,
    /// The last one.
    took: Duration,
    ended: Instant,
}

/// A request in the line, until it is dropped.
pub struct Place {
    line: Arc<Line>,
    bytes: usize,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.line.everywhere.fetch_sub(1, Ordering::Relaxed);
        self.line.waiting.fetch_sub(1, Ordering::Relaxed);
        self.line.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// An entry that is under way, until it is dropped.
pub struct Round<'a>(&'a Line);

impl Drop for Round<'_> {
    fn drop(&mut self) {
        let mut rounds = self.0.rounds.lock();
        if let Some(begun) = rounds.begun.take() {
            rounds.took = begun.elapsed();
            rounds.ended = Instant::now();
        }
    }
}

impl Default for Rounds {
    fn default() -> Self {
        Self { begun: None, took: Duration::ZERO, ended: Instant::now() }
    }
}

impl Line {
    /// One of the lines of a node.
    pub fn beside(everywhere: &Arc<AtomicUsize>) -> Self {
        Self { everywhere: everywhere.clone(), ..Self::default() }
    }

    /// For a request with so many bytes of payload.
    pub fn join(line: &Arc<Self>, bytes: usize) -> Place {
        line.everywhere.fetch_add(1, Ordering::Relaxed);
        line.waiting.fetch_add(1, Ordering::Relaxed);
        line.bytes.fetch_add(bytes, Ordering::Relaxed);
        Place { line: line.clone(), bytes }
    }

    pub fn begin(&self) -> Round<'_> {
        self.rounds.lock().begun = Some(Instant::now());
        Round(self)
    }

    /// What is left of the round that is under way, and as long as those take that the line before it fills, and its own.
    fn wait(&self) -> Duration {
        let (round, left) = {
            let rounds = self.rounds.lock();
            let known = if rounds.ended.elapsed() < ROUND_KNOWN_FOR { rounds.took } else { Duration::ZERO };
            rounds.begun.map_or((known, Duration::ZERO), |begun| {
                let so_far = begun.elapsed();
                (known.max(so_far), known.saturating_sub(so_far))
            })
        };
        let by_count = self.waiting.load(Ordering::Relaxed) / REQUESTS_PER_ENTRY_MAX;
        let by_bytes = self.bytes.load(Ordering::Relaxed) / BYTES_PER_ENTRY_MAX;
        let rounds = 1 + by_count.max(by_bytes);
        round.saturating_mul(u32::try_from(rounds).unwrap_or(u32::MAX)).saturating_add(left)
    }

    fn is_short(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) < FEW && self.bytes.load(Ordering::Relaxed) < BYTES_PER_ENTRY_MAX
    }
}

/// Why nothing new is taken on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    Waits(Duration),
    RunsLate(Duration),
    LeaseIsOld(Duration),
}

impl Why {
    /// Nothing, as long as none of the three is too much.
    fn of(late: Duration, lease_age: Duration, line: &Line) -> Option<Self> {
        let few = line.everywhere.load(Ordering::Relaxed) < FEW;
        let late_max = if few { LATE_FOR_FEW_MAX } else { LATE_MAX };
        if late > late_max {
            return Some(Why::RunsLate(late));
        }
        if lease_age > LEASE_AGE_MAX {
            return Some(Why::LeaseIsOld(lease_age));
        }
        let wait = line.wait();
        (wait > WAIT_MAX && !line.is_short()).then_some(Why::Waits(wait))
    }

    /// When it is worthwhile to come back: when what is here now has been done.
    pub fn retry_after(self) -> Duration {
        let (Why::Waits(behind) | Why::RunsLate(behind) | Why::LeaseIsOld(behind)) = self;
        behind.clamp(Duration::from_millis(50), Duration::from_secs(2))
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::Waits(wait) => write!(f, "requests wait {} ms in this shard", wait.as_millis()),
            Why::RunsLate(late) => write!(f, "this node is {} ms behind with its work", late.as_millis()),
            Why::LeaseIsOld(age) => write!(f, "the other nodes were heard {} ms ago", age.as_millis()),
        }?;
        write!(f, "; nothing was stored, and more would only wait")
    }
}

impl Pressure {
    /// Measures until the returned handle and its clones are gone. `waiting` is what all lines have in common.
    pub fn start(groups: Groups, waiting: Arc<AtomicUsize>) -> Self {
        let inner = Arc::new(PressureInner::new(groups, waiting));
        let weak = Arc::downgrade(&inner);
        tokio::spawn(async move {
            while let Some(due) = weak.upgrade().map(|inner| inner.looks_again()) {
                tokio::time::sleep_until(due).await;
                let Some(inner) = weak.upgrade() else { return };
                inner.saw(due.elapsed());
            }
        });
        Self { inner }
    }

    /// Whether new work for the group with this line is refused.
    pub fn refuses(&self, line: &Line) -> Option<Why> {
        if Fault::BeatsBehindWork.is_on() {
            return None;
        }
        Why::of(self.inner.late(), self.inner.groups.lease_age(), line)
    }
}

impl PressureInner {
    fn new(groups: Groups, waiting: Arc<AtomicUsize>) -> Self {
        let ms = || AtomicU64::new(0);
        Self { groups, waiting, since: Instant::now(), look_at_ms: ms(), late_ms: ms(), late_at_ms: ms() }
    }

    /// When it will look again.
    fn looks_again(&self) -> Instant {
        let idle = self.waiting.load(Ordering::Relaxed) == 0;
        let due = Instant::now() + if idle { LOOK_IDLE_EVERY } else { LOOK_EVERY };
        let due_ms = due.duration_since(self.since).as_millis();
        self.look_at_ms.store(u64::try_from(due_ms).unwrap_or(u64::MAX), Ordering::Relaxed);
        due
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn saw(&self, late: Duration) {
        let (now_ms, late_ms) = (self.now_ms(), u64::try_from(late.as_millis()).unwrap_or(u64::MAX));
        let is_old =
            now_ms > self.late_at_ms.load(Ordering::Relaxed) + u64::try_from(LATE_FOR.as_millis()).unwrap_or(0);
        if late_ms >= self.late_ms.load(Ordering::Relaxed) || is_old {
            self.late_ms.store(late_ms, Ordering::Relaxed);
            self.late_at_ms.store(now_ms, Ordering::Relaxed);
        }
    }

    /// How late it was a moment ago, or is by now.
    fn late(&self) -> Duration {
        let by_now = self.now_ms().saturating_sub(self.look_at_ms.load(Ordering::Relaxed));
        Duration::from_millis(self.late_ms.load(Ordering::Relaxed).max(by_now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_line_takes_as_long_as_the_entries_it_fills() {
        let millis = Duration::from_millis;
        let line = Arc::new(Line::default());
        assert_eq!(line.wait(), Duration::ZERO);
        let round = line.begin();
        tokio::time::advance(millis(20)).await;
        assert_eq!(line.wait(), millis(20), "so long it has taken already");
        drop(round);
        let places: Vec<Place> = (0..REQUESTS_PER_ENTRY_MAX).map(|_| Line::join(&line, 0)).collect();
        assert_eq!(line.wait(), millis(40));
        let round = line.begin();
        drop(places);
        assert_eq!(line.wait(), millis(40), "it will take as long as the one before, and then its own");
        tokio::time::advance(millis(15)).await;
        assert_eq!(line.wait(), millis(25));
        tokio::time::advance(millis(35)).await;
        drop(round);
        assert_eq!(line.wait(), millis(50));
        tokio::time::advance(ROUND_KNOWN_FOR).await;
        assert_eq!(line.wait(), Duration::ZERO, "a slow one of long ago says nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn new_work_is_refused_when_one_of_the_three_is_too_much() {
        let millis = Duration::from_millis;
        let everywhere = Arc::default();
        let (line, other) = (Arc::new(Line::beside(&everywhere)), Arc::new(Line::beside(&everywhere)));
        assert_eq!(Why::of(LATE_FOR_FEW_MAX, LEASE_AGE_MAX, &line), None);
        assert_eq!(Why::of(millis(251), LEASE_AGE_MAX, &line), Some(Why::RunsLate(millis(251))));
        assert_eq!(Why::of(LATE_MAX, millis(251), &line), Some(Why::LeaseIsOld(millis(251))));
        let many: Vec<Place> = (0..FEW).map(|_| Line::join(&other, 1)).collect();
        assert_eq!(Why::of(LATE_MAX, LEASE_AGE_MAX, &line), None);
        assert_eq!(Why::of(millis(51), LEASE_AGE_MAX, &line), Some(Why::RunsLate(millis(51))));
        drop(many);
        let slow = line.begin();
        tokio::time::advance(millis(60)).await;
        drop(slow);
        let mut places: Vec<Place> = (1..FEW).map(|_| Line::join(&line, 1)).collect();
        let refused = |line| Why::of(Duration::ZERO, Duration::ZERO, line);
        assert_eq!(refused(&line), None, "60 ms");
        let large = Line::join(&line, BYTES_PER_ENTRY_MAX);
        assert_eq!(refused(&line), Some(Why::Waits(millis(120))), "two entries by their bytes, if not by their number");
        drop(large);
        assert_eq!(refused(&line), None);
        let round = line.begin();
        tokio::time::advance(millis(101)).await;
        assert_eq!(refused(&line), None, "so few may always wait");
        places.push(Line::join(&line, 1));
        assert_eq!(refused(&line), Some(Why::Waits(millis(101))));
        drop(round);
    }

    #[test]
    fn whoever_is_refused_is_told_why_and_when_to_come_back() {
        let why = Why::Waits(Duration::from_millis(300));
        assert_eq!(why.to_string(), "requests wait 300 ms in this shard; nothing was stored, and more would only wait");
        assert_eq!(why.retry_after(), Duration::from_millis(300));
        assert_eq!(Why::RunsLate(Duration::from_secs(60)).retry_after(), Duration::from_secs(2));
    }
}
