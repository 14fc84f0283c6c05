//! Exact tests of the wheel: boundaries, order, bounded work and memory. What goes wrong only in
//! some long sequence of calls is for the random walks in `twin`.

use boomerang_testkit::seed;
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use super::{TICK_MS_MAX, TimerId, Wheel, WheelConfig, WheelConfigError};

/// An id as in production.
type Id = [u8; 16];

/// Ten years in milliseconds.
const TEN_YEARS_MS: u64 = 10 * 365 * 24 * 3_600_000;

/// What a wheel that was full and is empty may hold: the slots, one chunk, the smallest index.
const EMPTY_BYTES_MAX: usize = 60_000;

/// What a wheel with timers may hold whatever their number: the slots, a chunk of holes, a chunk
/// begun and a spare one.
const SLACK_BYTES_MAX: usize = 130_000;

/// The most per timer beyond that, while the wheel empties: half as many holes, and an index that
/// is about to shrink.
const TIMER_BYTES_MAX: usize = 100;

impl<K: TimerId> Wheel<K> {
    /// Panics unless lists, busy words, slab and index agree about every timer.
    pub(super) fn validate(&self) {
        let mut timers = self.slots.validate(&self.slab);
        timers.sort_unstable();
        self.slab.validate(&timers);
        self.index.validate(&self.slab, &timers);
        assert_eq!(self.len(), timers.len());
    }
}

fn wheel(tick_ms: u64, levels: u32, now_ms: u64) -> Wheel<u64> {
    Wheel::new(WheelConfig { tick_ms, levels }, now_ms)
}

/// All that expires at an instant, without limit.
fn expire<K: TimerId>(wheel: &mut Wheel<K>, now_ms: u64) -> Vec<(u64, K)> {
    let mut out = Vec::new();
    assert!(!wheel.expire(now_ms, usize::MAX, &mut out), "no limit, so nothing is left");
    wheel.validate();
    out
}

fn random_id(rng: &mut StdRng) -> Id {
    rng.random()
}

#[test]
fn config_is_checked() {
    let valid = WheelConfig::default();
    assert_eq!((valid.tick_ms, valid.levels), (1, 4));
    assert_eq!(valid.validate(), Ok(()));
    assert_eq!(WheelConfig { tick_ms: TICK_MS_MAX, levels: 8 }.validate(), Ok(()));
    for tick_ms in [0, TICK_MS_MAX + 1] {
        let error = WheelConfig { tick_ms, ..valid }.validate().unwrap_err();
        assert_eq!(error, WheelConfigError::TickMs(tick_ms));
        assert!(error.to_string().contains("must be from 1 to 1000"), "{error}");
    }
    for levels in [0, 9] {
        let error = WheelConfig { levels, ..valid }.validate().unwrap_err();
        assert_eq!(error.to_string(), format!("wheel levels is {levels}, it must be from 1 to 8"));
    }
}

#[test]
#[should_panic(expected = "wheel tick_ms is 0")]
fn invalid_config_is_a_bug() {
    let _ = wheel(0, 4, 0);
}

#[test]
fn a_due_fires_at_its_tick_and_not_before() {
    // Around every edge: the same tick, the next, the ends of each level and beyond the top one.
    let spans = [0, 1, 2, 63, 64, 65, 127, 128, 4_095, 4_096, 4_097];
    let far_spans = [262_143, 262_144, 262_145, 16_777_215, 16_777_216, 16_777_217, TEN_YEARS_MS];
    for levels in 1..=8 {
        for tick_ms in [1, 10, 1_000] {
            for start_tick in [0, 1, 63, 64, 4_095, 1_234_567, 1_760_000_000_000] {
                for span in spans.into_iter().chain(far_spans) {
                    let start_ms = start_tick * tick_ms;
                    let due_ms = start_ms + span * tick_ms;
                    let mut wheel = wheel(tick_ms, levels, start_ms);
                    assert!(wheel.insert(due_ms, 7));
                    if span > 0 {
                        assert_eq!(expire(&mut wheel, due_ms - 1), [], "start {start_ms}");
                    }
                    assert_eq!(wheel.next_wake_ms(), Some(due_ms), "nothing is nearer");
                    assert_eq!(expire(&mut wheel, due_ms), [(due_ms, 7)], "start {start_ms}");
                    assert!(wheel.is_empty());
                }
            }
        }
    }
}

#[test]
fn a_due_within_a_tick_is_rounded_up() {
    let mut wheel = wheel(10, 3, 95);
    for (id, due_ms) in [(1, 90), (2, 91), (3, 95), (4, 100), (5, 101)] {
        assert!(wheel.insert(due_ms, id));
    }
    assert_eq!(wheel.next_wake_ms(), Some(95), "90 is a tick that has begun");
    assert_eq!(expire(&mut wheel, 95), [(90, 1)]);
    assert_eq!(wheel.next_wake_ms(), Some(100));
    assert_eq!(expire(&mut wheel, 99), []);
    assert_eq!(expire(&mut wheel, 100), [(91, 2), (95, 3), (100, 4)]);
    assert_eq!(wheel.next_wake_ms(), Some(110));
    assert_eq!(expire(&mut wheel, 109), []);
    assert_eq!(expire(&mut wheel, 110), [(101, 5)]);
}

#[test]
fn overdue_timers_leave_first_and_in_the_order_they_came() {
    let mut wheel = wheel(1, 4, 1_000);
    wheel.insert(1_001, 0);
    for (id, due_ms) in [(1, 5), (2, 5), (3, 400), (4, 300), (5, 1_000)] {
        wheel.insert(due_ms, id);
    }
    assert_eq!(wheel.next_wake_ms(), Some(1_000));
    let expired: Vec<u64> = expire(&mut wheel, 1_001).into_iter().map(|(_, id)| id).collect();
    assert_eq!(expired, [1, 2, 3, 4, 5, 0]);
}

#[test]
fn what_was_of_no_use_comes_back_ahead_of_what_is_ready() {
    let mut wheel = wheel(1, 4, 0);
    for id in 0..6 {
        wheel.insert(10 + id, id);
    }
    let mut out = Vec::new();
    assert!(wheel.expire(20, 3, &mut out));
    assert_eq!(wheel.cancel(&4), Some(14));
    for (due_ms, id) in out.drain(..).rev() {
        assert!(wheel.give_back(due_ms, id));
        assert!(!wheel.give_back(due_ms, id), "once");
        wheel.validate();
    }
    assert_eq!(wheel.next_wake_ms(), Some(20));
    assert_eq!(wheel.cancel(&1), Some(11));
    assert_eq!(expire(&mut wheel, 20), [(10, 0), (12, 2), (13, 3), (15, 5)]);
}

#[test]
fn what_comes_back_too_early_waits_for_its_due() {
    let mut wheel = wheel(1, 4, 0);
    assert!(wheel.give_back(10, 1));
    assert_eq!(expire(&mut wheel, 9), []);
    assert_eq!(expire(&mut wheel, 10), [(10, 1)]);
}

#[test]
fn an_id_is_in_the_wheel_once() {
    let mut wheel = wheel(1, 4, 0);
    assert!(wheel.insert(50, 1));
    assert!(!wheel.insert(60, 1), "already there");
    assert_eq!(wheel.due_of(&1), Some(50), "and unchanged");
    assert_eq!(wheel.reschedule(70, 1), Some(50));
    assert_eq!(wheel.reschedule(80, 2), None);
    assert_eq!((wheel.len(), wheel.due_of(&1), wheel.due_of(&2)), (2, Some(70), Some(80)));
    assert_eq!(wheel.cancel(&1), Some(70));
    assert_eq!(wheel.cancel(&1), None);
    assert!(!wheel.contains(&1) && wheel.contains(&2));
    assert_eq!(expire(&mut wheel, 80), [(80, 2)]);
    assert_eq!(wheel.cancel(&2), None, "expired");
    assert_eq!(wheel.next_wake_ms(), None);
}

#[test]
fn what_max_holds_back_can_be_cancelled_and_moved() {
    let mut wheel = wheel(1, 4, 0);
    for id in 0..6 {
        wheel.insert(10 + id / 3, id);
    }
    let mut out = Vec::new();
    assert!(wheel.expire(20, 0, &mut out), "all are ready");
    assert!(out.is_empty());
    assert!(wheel.expire(20, 2, &mut out));
    assert_eq!(out, [(10, 0), (10, 1)]);
    assert_eq!(wheel.next_wake_ms(), Some(20), "more is ready");
    assert_eq!(wheel.cancel(&2), Some(10));
    assert_eq!(wheel.next_wake_ms(), Some(20), "the slot of 11 has begun");
    assert_eq!(wheel.reschedule(30, 4), Some(11));
    wheel.validate();
    out.clear();
    assert!(!wheel.expire(20, 2, &mut out), "two were left, and no more");
    assert_eq!(out, [(11, 3), (11, 5)]);
    assert_eq!(expire(&mut wheel, 30), [(30, 4)]);
}

#[test]
fn the_clock_never_goes_back() {
    let mut wheel = wheel(1, 4, 1_000);
    assert_eq!(expire(&mut wheel, 10), []);
    wheel.insert(1_000, 1);
    assert_eq!(wheel.next_wake_ms(), Some(1_000));
    assert_eq!(expire(&mut wheel, 10), [(1_000, 1)], "10 counts as 1000");
}

#[test]
fn the_end_of_time_can_be_reached() {
    for (tick_ms, levels) in [(1, 1), (1, 4), (10, 3), (999, 8)] {
        let mut wheel = wheel(tick_ms, levels, 5);
        wheel.insert(u64::MAX, 1);
        wheel.insert(u64::MAX - 1, 2);
        assert_eq!(wheel.due_of(&1), Some(u64::MAX));
        let mut last = expire(&mut wheel, u64::MAX - 1);
        assert!(last.is_empty() || last == [(u64::MAX - 1, 2)], "{last:?}");
        assert_eq!(wheel.next_wake_ms(), Some(u64::MAX));
        last.extend(expire(&mut wheel, u64::MAX));
        last.sort_unstable();
        assert_eq!(last, [(u64::MAX - 1, 2), (u64::MAX, 1)]);
        wheel.insert(u64::MAX, 3);
        assert_eq!(expire(&mut wheel, u64::MAX), [(u64::MAX, 3)]);
    }
}

#[test]
fn a_lone_timer_is_reached_in_few_wakes() {
    for levels in 1..=8 {
        for bit in 0..64 {
            let mut wheel = wheel(1, levels, 77);
            wheel.insert((1 << bit) + 12_345, 1);
            let (mut wakes, mut out) = (0, Vec::new());
            while let Some(wake_ms) = wheel.next_wake_ms() {
                wheel.expire(wake_ms, 1, &mut out);
                wakes += 1;
            }
            assert_eq!(out.len(), 1);
            assert!(wakes <= 16, "{wakes} wakes, {levels} levels, bit {bit}");
        }
    }
}

#[test]
fn an_empty_stretch_costs_nothing() {
    let start_ms = 1_760_000_000_123;
    let mut wheel = wheel(1, 4, start_ms);
    expire(&mut wheel, start_ms + TEN_YEARS_MS);
    assert_eq!(wheel.slots.steps, 1, "empty: one look");

    // One timer: it moves down through far slots and rows, two steps for each, whatever the
    // distance.
    wheel.insert(start_ms + 2 * TEN_YEARS_MS, 1);
    wheel.slots.steps = 0;
    assert_eq!(expire(&mut wheel, start_ms + 2 * TEN_YEARS_MS - 1), []);
    assert_eq!(expire(&mut wheel, start_ms + 2 * TEN_YEARS_MS).len(), 1);
    assert!(wheel.slots.steps <= 50, "{} steps", wheel.slots.steps);

    // Timers on both sides of an empty stretch: its length does not count.
    let (now_ms, later_ms) = (start_ms + 2 * TEN_YEARS_MS, start_ms + 3 * TEN_YEARS_MS);
    for id in 0..100 {
        wheel.insert(now_ms + 1 + id, id);
        wheel.insert(later_ms + id, 100 + id);
    }
    wheel.slots.steps = 0;
    assert_eq!(expire(&mut wheel, later_ms + 100).len(), 200);
    assert!(wheel.slots.steps <= 200 * 20, "{} steps", wheel.slots.steps);
}

#[test]
fn clear_forgets_all_but_the_time() {
    let mut wheel = wheel(1, 4, 0);
    let fresh_bytes = wheel.allocated_bytes();
    for id in 0..5_000 {
        wheel.insert(id * 37, id);
    }
    expire(&mut wheel, 100);
    wheel.clear();
    wheel.validate();
    assert_eq!((wheel.len(), wheel.next_wake_ms(), wheel.contains(&99)), (0, None, false));
    assert_eq!(wheel.allocated_bytes(), fresh_bytes);
    wheel.insert(90, 1);
    assert_eq!(expire(&mut wheel, 0), [(90, 1)], "the clock still stands at 100");
}

/// A wheel with `count` timers in the next half hour, and their ids in another order.
fn filled(rng: &mut StdRng, count: usize) -> (Wheel<Id>, Vec<Id>) {
    let mut wheel = Wheel::new(WheelConfig::default(), 0);
    let mut ids: Vec<Id> = (0..count).map(|_| random_id(rng)).collect();
    for &id in &ids {
        wheel.insert(rng.random_range(0..1_800_000), id);
    }
    ids.shuffle(rng);
    (wheel, ids)
}

#[test]
fn memory_comes_back() {
    const COUNT: usize = 200_000;
    let seed = seed::one();
    let rng = &mut seed.rng();
    let (mut wheel, ids) = filled(rng, COUNT);
    let full = wheel.allocated_bytes();
    assert!(full < COUNT * 52, "{full} bytes");

    // Half by cancel and half by time, mixed; on the way down memory stays in proportion.
    let (mut now_ms, mut out) = (0, Vec::new());
    for (step, id) in ids.iter().enumerate() {
        wheel.cancel(id);
        if step % 1_000 == 0 {
            now_ms += 10_000;
            wheel.expire(now_ms, 1_000, &mut out);
            let bytes = wheel.allocated_bytes();
            let bytes_max = SLACK_BYTES_MAX + wheel.len() * TIMER_BYTES_MAX;
            assert!(bytes <= bytes_max, "{bytes} for {}", wheel.len());
            if step % 20_000 == 0 {
                wheel.validate();
            }
        }
    }
    assert!(out.len() > COUNT / 4, "{} expired", out.len());
    assert!(wheel.is_empty());
    wheel.validate();
    assert!(wheel.allocated_bytes() <= EMPTY_BYTES_MAX, "{}", wheel.allocated_bytes());
}

#[test]
fn scattered_survivors_do_not_hold_memory() {
    let seed = seed::one();
    let rng = &mut seed.rng();
    let (mut wheel, ids) = filled(rng, 200_000);
    let (gone, survivors) = ids.split_at(199_900);
    for id in gone {
        assert!(wheel.cancel(id).is_some());
    }
    wheel.validate();
    assert!(survivors.iter().all(|id| wheel.contains(id)));
    let bytes_max = SLACK_BYTES_MAX + survivors.len() * TIMER_BYTES_MAX;
    assert!(wheel.allocated_bytes() <= bytes_max, "{}", wheel.allocated_bytes());
    let mut wakes = 0;
    let mut out = Vec::new();
    while let Some(wake_ms) = wheel.next_wake_ms() {
        wheel.expire(wake_ms, 10, &mut out);
        wakes += 1;
    }
    assert_eq!(out.len(), survivors.len());
    assert!(out.is_sorted_by_key(|&(due_ms, _)| due_ms));
    assert!(wakes <= 400, "{wakes} wakes");
}

#[test]
fn long_churn_does_not_grow() {
    const ALIVE: usize = 1_000;
    let seed = seed::one();
    let rng = &mut seed.rng();
    let (mut wheel, mut ids) = filled(rng, ALIVE);
    let mut bytes_max = 0;
    for step in 0..2_000_000 {
        let alive = &mut ids[step % ALIVE];
        assert!(wheel.cancel(alive).is_some());
        *alive = random_id(rng);
        wheel.insert(rng.random_range(0..1_800_000), *alive);
        bytes_max = bytes_max.max(wheel.allocated_bytes());
    }
    wheel.validate();
    assert!(bytes_max <= SLACK_BYTES_MAX + ALIVE * TIMER_BYTES_MAX, "{bytes_max} bytes");
}
