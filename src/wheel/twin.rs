//! The dumb twin: the wheel as one ordered map from (tick, arrival) to timer, and random walks that
//! do the same to both and compare everything that can be seen. A walk is a seed; a failure names
//! it.
//!
//! The twin's only cleverness is the order key. A timer that is overdue when it arrives counts for
//! the tick the twin has reached, so it queues behind what became ready before it; one that is given
//! back goes before it, with a number below zero:
//!
//! ```text
//!   key = (max(due tick, reached tick), arrival number)
//! ```
//!
//! `BOOMERANG_SEED=n cargo test twin` runs seed n alone, at both scales.

use std::collections::{BTreeMap, HashMap};

use boomerang_testkit::seed;
use rand::RngExt;
use rand::rngs::StdRng;

use super::{Wheel, WheelConfig};

/// How long a walk is, and how often the inside of the wheel is checked, which looks at all of it.
struct Scale {
    seeds: u64,
    steps: usize,
    ids: u64,
    validate_every: usize,
}

/// So few ids that double inserts and cancels of the dead happen often.
const SMALL: Scale = Scale { seeds: 400, steps: 1_500, ids: 250, validate_every: 1 };

/// So many that the slab and the index grow and shrink through several chunks.
const LARGE: Scale = Scale { seeds: 30, steps: 60_000, ids: 20_000, validate_every: 997 };

/// A walk has so many phases, each with weights of its own.
const PHASES: usize = 8;

/// How likely each operation is: expire by a distance, expire at the next wake, give back some of
/// what has expired last, cancel, reschedule, look up, insert.
type Weights = [u32; 7];

const WEIGHTS: [Weights; 5] = [
    [2, 1, 1, 1, 1, 1, 8],      // a bit of everything
    [6, 3, 2, 2, 2, 1, 6],      // time flies
    [0, 9, 2, 2, 2, 1, 6],      // time passes from wake to wake
    [0, 0, 1, 20, 20, 20, 400], // the wheel fills
    [0, 0, 1, 400, 20, 20, 20], // the wheel empties
];

/// Most timers that an unbounded `expire` can return: all of them.
const UNBOUNDED: usize = usize::MAX;

/// A year in milliseconds.
const YEAR_MS: u64 = 365 * 24 * 3_600_000;

/// Order of leaving: the tick it counts for, then arrival.
type Key = (u64, i64);

struct Twin {
    tick_ms: u64,
    now_ms: u64,
    /// The tick up to which timers have been returned.
    reached: u64,
    arrivals: i64,
    returns: i64,
    by_order: BTreeMap<Key, (u64, u64)>,
    by_id: HashMap<u64, Key>,
}

impl Twin {
    fn new(tick_ms: u64, now_ms: u64) -> Self {
        let reached = Self::tick_of_now(tick_ms, now_ms);
        let (by_order, by_id) = (BTreeMap::new(), HashMap::new());
        Self { tick_ms, now_ms, reached, arrivals: 0, returns: 0, by_order, by_id }
    }

    /// The last tick begun; at the end of time the one that would begin after it too.
    fn tick_of_now(tick_ms: u64, now_ms: u64) -> u64 {
        let tick = u128::from(now_ms) / u128::from(tick_ms);
        let beyond = now_ms == u64::MAX && !now_ms.is_multiple_of(tick_ms);
        u64::try_from(tick).unwrap() + u64::from(beyond)
    }

    fn due_of(&self, id: u64) -> Option<u64> {
        self.by_id.get(&id).map(|key| self.by_order[key].0)
    }

    fn insert(&mut self, due_ms: u64, id: u64) -> bool {
        if self.by_id.contains_key(&id) {
            return false;
        }
        let due_tick = due_ms / self.tick_ms + u64::from(!due_ms.is_multiple_of(self.tick_ms));
        let key = (due_tick.max(self.reached), self.arrivals);
        self.arrivals += 1;
        self.by_order.insert(key, (due_ms, id));
        self.by_id.insert(id, key);
        true
    }

    fn give_back(&mut self, due_ms: u64, id: u64) -> bool {
        if self.by_id.contains_key(&id) {
            return false;
        }
        self.returns += 1;
        let key = (self.reached, -self.returns);
        self.by_order.insert(key, (due_ms, id));
        self.by_id.insert(id, key);
        true
    }

    fn cancel(&mut self, id: u64) -> Option<u64> {
        let key = self.by_id.remove(&id)?;
        self.by_order.remove(&key).map(|(due_ms, _)| due_ms)
    }

    fn expire(&mut self, now_ms: u64, max: usize, out: &mut Vec<(u64, u64)>) -> bool {
        self.now_ms = self.now_ms.max(now_ms);
        let target = Self::tick_of_now(self.tick_ms, self.now_ms);
        while let Some((&key, &(due_ms, id))) = self.by_order.first_key_value() {
            if key.0 > target {
                break;
            }
            if out.len() == max {
                self.reached = key.0;
                return true;
            }
            self.by_order.remove(&key);
            self.by_id.remove(&id);
            out.push((due_ms, id));
        }
        self.reached = target;
        false
    }

    /// The instant the next timer can leave.
    fn next_ms(&self) -> Option<u64> {
        let (&(tick, _), _) = self.by_order.first_key_value()?;
        if tick <= self.reached {
            return Some(self.now_ms);
        }
        Some(tick.saturating_mul(self.tick_ms).max(self.now_ms))
    }
}

/// A wheel and its twin, which get the same orders.
struct Pair {
    wheel: Wheel<u64>,
    twin: Twin,
    config: WheelConfig,
    /// What has expired last, in its order.
    last: Vec<(u64, u64)>,
}

impl Pair {
    fn new(config: WheelConfig, now_ms: u64) -> Self {
        let twin = Twin::new(config.tick_ms, now_ms);
        Self { wheel: Wheel::new(config, now_ms), twin, config, last: Vec::new() }
    }

    fn expire(&mut self, now_ms: u64, max: usize) -> usize {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        let more = self.wheel.expire(now_ms, max, &mut ours);
        assert_eq!(more, self.twin.expire(now_ms, max, &mut theirs), "more to come");
        assert_eq!(ours, theirs, "expired at {now_ms}, at most {max}");
        assert!(ours.iter().all(|&(due_ms, _)| due_ms <= self.twin.now_ms), "early");
        self.last = ours;
        self.last.len()
    }

    /// What can be seen after every step.
    fn compare(&self) {
        assert_eq!(self.wheel.len(), self.twin.by_id.len());
        assert_eq!(self.wheel.is_empty(), self.twin.by_id.is_empty());
        match (self.wheel.next_wake_ms(), self.twin.next_ms()) {
            (None, None) => (),
            (Some(wake_ms), Some(next_ms)) => {
                assert!(wake_ms <= next_ms, "wake {wake_ms} after the next due {next_ms}");
                assert!(wake_ms >= self.twin.now_ms, "wake {wake_ms} in the past");
                let next_tick = self.config.tick_of_now(next_ms);
                if next_tick / 64 == self.twin.reached / 64 {
                    assert_eq!(wake_ms, next_ms, "exact within the lowest row");
                }
            }
            different => panic!("next wake, next due: {different:?}"),
        }
    }

    /// One operation, drawn with these weights, on both.
    fn step(&mut self, rng: &mut StdRng, weights: Weights, id: u64) {
        let (now_ms, tick_ms) = (self.twin.now_ms, self.config.tick_ms);
        match draw(rng, weights) {
            0 => {
                let distance = distance_ms(rng, tick_ms);
                let back = rng.random_bool(0.1);
                let to_ms = if back { now_ms.saturating_sub(distance) } else { now_ms.saturating_add(distance) };
                let bounded = rng.random_bool(0.3);
                self.expire(to_ms, if bounded { rng.random_range(0..4) } else { UNBOUNDED });
            }
            1 => {
                let wake_ms = self.wheel.next_wake_ms().unwrap_or(now_ms);
                self.expire(wake_ms, rng.random_range(0..30));
            }
            2 => {
                let some = if self.last.is_empty() { 0 } else { rng.random_range(0..=self.last.len().min(9)) };
                for _ in 0..some {
                    let (due_ms, id) = self.last.pop().expect("so many are there");
                    assert_eq!(self.wheel.give_back(due_ms, id), self.twin.give_back(due_ms, id));
                }
            }
            3 => assert_eq!(self.wheel.cancel(&id), self.twin.cancel(id)),
            4 => {
                let due_ms = due_ms(rng, now_ms, tick_ms);
                let old_due_ms = self.twin.cancel(id);
                assert!(self.twin.insert(due_ms, id));
                assert_eq!(self.wheel.reschedule(due_ms, id), old_due_ms);
            }
            5 => {
                assert_eq!(self.wheel.due_of(&id), self.twin.due_of(id));
                assert_eq!(self.wheel.contains(&id), self.twin.due_of(id).is_some());
            }
            _ => {
                let due_ms = due_ms(rng, now_ms, tick_ms);
                assert_eq!(self.wheel.insert(due_ms, id), self.twin.insert(due_ms, id));
            }
        }
    }

    /// Sleeping to `next_wake_ms` again and again reaches every timer, in steps that each are
    /// either useful or a move down, of which a timer has no more than there are rows and far bits.
    fn drain(&mut self, rng: &mut StdRng) {
        let moves_max = 64;
        let mut idle_left = moves_max * (self.wheel.len() + 1);
        while let Some(wake_ms) = self.wheel.next_wake_ms() {
            let max = if rng.random_bool(0.5) { UNBOUNDED } else { rng.random_range(1..5) };
            if self.expire(wake_ms, max) == 0 {
                idle_left = idle_left.checked_sub(1).expect("waking up gets somewhere");
            }
            self.compare();
        }
        assert!(self.twin.by_id.is_empty());
    }
}

/// The number of an operation.
fn draw(rng: &mut StdRng, weights: Weights) -> usize {
    let mut left = rng.random_range(0..weights.iter().sum());
    weights
        .iter()
        .take_while(|&&weight| {
            left >= weight && {
                left -= weight;
                true
            }
        })
        .count()
}

/// A distance in time: from nothing to years, each scale as likely as the next.
fn distance_ms(rng: &mut StdRng, tick_ms: u64) -> u64 {
    match rng.random_range(0..8) {
        0 => 0,
        1 => tick_ms,
        2 => rng.random_range(0..70) * tick_ms,
        3 => rng.random_range(0..5_000),
        4 => rng.random_range(0..300_000),
        5 => rng.random_range(0..20_000_000),
        6 => (1 << rng.random_range(0..40)) + rng.random_range(0..3) - 1,
        _ => rng.random_range(0..20 * YEAR_MS),
    }
}

fn due_ms(rng: &mut StdRng, now_ms: u64, tick_ms: u64) -> u64 {
    let distance = distance_ms(rng, tick_ms);
    match rng.random_range(0..20) {
        0..3 => now_ms.saturating_sub(distance),
        3 => u64::MAX - rng.random_range(0..2_000),
        _ => now_ms.saturating_add(distance),
    }
}

fn walk(rng: &mut StdRng, scale: &Scale) {
    let tick_ms = [1, 1, 10, 10, 7, 1_000][rng.random_range(0..6)];
    let levels = [1, 2, 3, 4, 4, 8][rng.random_range(0..6)];
    let start_ms = match rng.random_range(0..8) {
        0 => 0,
        1 => u64::MAX - distance_ms(rng, tick_ms),
        _ => rng.random_range(0..100 * YEAR_MS),
    };
    let mut pair = Pair::new(WheelConfig { tick_ms, levels }, start_ms);
    let mut weights = WEIGHTS[0];
    for step in 0..scale.steps {
        if step.is_multiple_of(scale.steps / PHASES) {
            weights = WEIGHTS[rng.random_range(0..WEIGHTS.len())];
        }
        let id = rng.random_range(0..scale.ids);
        pair.step(rng, weights, id);
        pair.compare();
        if step.is_multiple_of(scale.validate_every) {
            pair.wheel.validate();
        }
    }
    pair.drain(rng);
    pair.wheel.validate();
}

fn walk_all(scale: &Scale) {
    for seed in seed::rounds(scale.seeds) {
        walk(&mut seed.rng(), scale);
    }
}

#[test]
fn small_random_walks_agree_with_the_twin() {
    walk_all(&SMALL);
}

#[test]
fn large_random_walks_agree_with_the_twin() {
    walk_all(&LARGE);
}
