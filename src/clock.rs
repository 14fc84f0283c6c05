//! What time it is: one trait, a real clock and one that tests move by hand.
//!
//! The real clock never steps. It reads the wall clock once, at the start, and from then on counts with the boot clock,
//! which nobody can set and which goes on while the machine is suspended. When the wall clock is found to have been
//! stepped, the difference is slewed: time runs at most a tenth faster or slower until both agree. So a clock that is
//! set an hour ahead by mistake cannot fire an hour of tasks early; the price is that a clock set right by hours is
//! followed slowly, which is logged and measured, and a restart takes the wall clock as it is.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

use crate::task::InstantMs;
use crate::task::locks::Mutex;

/// Slewed time differs from real time by at most this part.
const SLEW_PER_MILLE: i64 = 100;
/// A difference below this is the jitter of reading two clocks.
const STEP_US_MIN: i64 = 1_000;
/// Two clocks are compared by a reading during which nothing came between.
const READING_US_MAX: i64 = 200;

pub trait Clock: Send + Sync + 'static {
    /// Microseconds since 1970. Never goes back.
    fn now_us(&self) -> u64;

    fn now_ms(&self) -> InstantMs {
        self.now_us() / 1000
    }

    /// How long to sleep until `due_ms`; zero when it has come.
    fn until(&self, due_ms: InstantMs) -> Duration {
        Duration::from_micros(due_ms.saturating_mul(1000).saturating_sub(self.now_us()))
    }
}

/// The real clock.
pub struct SystemClock {
    inner: Mutex<ClockInner>,
}

struct ClockInner {
    machine: Machine,
    slew: Slew,
}

/// The two clocks of this machine; in tests, those of a machine whose clocks are wrong.
#[derive(Default)]
struct Machine {
    skew: Option<Skew>,
}

/// What a test says about both clocks, in a file that it may write again at any time.
struct Skew {
    file: PathBuf,
    /// The wall clock is ahead by this much, and by what it has gained since.
    wall_us: i64,
    /// Both clocks run faster by this part.
    drift_ppm: i64,
    /// Since when, by the real boot clock, and what the boot clock had gained before; nobody sets that one right.
    from_us: i64,
    gained_us: i64,
}

impl Skew {
    /// Since the file was written last.
    fn drifted_us(&self, boot_us: i64) -> i64 {
        (boot_us - self.from_us) * self.drift_ppm / 1_000_000
    }

    fn gained_us(&self, boot_us: i64) -> i64 {
        self.gained_us + self.drifted_us(boot_us)
    }

    /// The file holds two numbers: by how many microseconds the wall clock is ahead, and the drift in parts per million.
    /// One that is being written is read at the next look.
    fn read(&mut self, boot_us: i64) {
        let Ok(text) = std::fs::read_to_string(&self.file) else { return };
        let numbers: Vec<i64> = text.split_whitespace().map_while(|number| number.parse().ok()).collect();
        let [wall_us, drift_ppm] = numbers[..] else { return };
        if (self.wall_us, self.drift_ppm) == (wall_us, drift_ppm) {
            return;
        }
        self.gained_us = self.gained_us(boot_us);
        (self.from_us, self.wall_us, self.drift_ppm) = (boot_us, wall_us, drift_ppm);
    }
}

impl Machine {
    fn skewed_by(file: &Path) -> Self {
        let from_us = boot_us();
        let mut skew = Skew { file: file.to_owned(), wall_us: 0, drift_ppm: 0, from_us, gained_us: 0 };
        skew.read(from_us);
        Self { skew: Some(skew) }
    }

    fn boot_us(&self) -> i64 {
        let boot_us = boot_us();
        boot_us + self.skew.as_ref().map_or(0, |skew| skew.gained_us(boot_us))
    }

    /// Both clocks at one moment.
    fn both_us(&mut self) -> (i64, i64) {
        let (boot_us, wall_us) = both_us();
        let Some(skew) = &mut self.skew else { return (boot_us, wall_us) };
        skew.read(boot_us);
        (boot_us + skew.gained_us(boot_us), wall_us + skew.wall_us + skew.drifted_us(boot_us))
    }
}

/// Time as a straight line through the boot clock, bent at `at_us`.
struct Slew {
    /// Boot time at which the line was last bent.
    at_us: i64,
    /// What we said then.
    said_us: i64,
    /// How far the wall clock was ahead of us then, and what is not yet made up for.
    behind_us: i64,
}

impl Slew {
    fn now_us(&self, boot_us: i64) -> i64 {
        let passed = (boot_us - self.at_us).max(0);
        let most = passed * SLEW_PER_MILLE / 1000;
        self.said_us + passed + self.behind_us.clamp(-most, most)
    }

    /// Bends the line towards `wall_us`. Returns the difference.
    fn look(&mut self, boot_us: i64, wall_us: i64) -> i64 {
        let now = self.now_us(boot_us);
        let behind = wall_us - now;
        let behind_us = if behind.abs() < STEP_US_MIN { 0 } else { behind };
        *self = Slew { at_us: boot_us, said_us: now, behind_us };
        behind_us
    }
}

fn boot_us() -> i64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec * 1_000_000 + now.tv_nsec / 1000
}

fn wall_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

/// Both clocks at one moment. A thread that is put aside between the two readings would make us run ahead.
fn both_us() -> (i64, i64) {
    loop {
        let (before, wall, after) = (boot_us(), wall_us(), boot_us());
        if after - before <= READING_US_MAX {
            return (after, wall);
        }
    }
}

impl SystemClock {
    #[allow(clippy::new_without_default, reason = "reading the clock is not a default")]
    pub fn new() -> Self {
        Self::of(Machine::default())
    }

    /// As on a machine whose clocks are wrong in the way that `file` says, from the start on and after each
    /// [`SystemClock::look`]. For tests.
    pub fn skewed_by(file: &Path) -> Self {
        Self::of(Machine::skewed_by(file))
    }

    fn of(mut machine: Machine) -> Self {
        let (at_us, said_us) = machine.both_us();
        Self { inner: Mutex::new(ClockInner { machine, slew: Slew { at_us, said_us, behind_us: 0 } }) }
    }

    /// Compares with the wall clock; to be called now and then. Returns by how many microseconds the wall clock is
    /// ahead, zero while both agree.
    pub fn look(&self) -> i64 {
        let mut inner = self.inner.lock();
        let (boot_us, wall_us) = inner.machine.both_us();
        inner.slew.look(boot_us, wall_us)
    }
}

impl Clock for SystemClock {
    fn now_us(&self) -> u64 {
        let inner = self.inner.lock();
        u64::try_from(inner.slew.now_us(inner.machine.boot_us())).unwrap_or(0)
    }
}

/// A clock that stands still until it is moved.
#[derive(Debug, Default)]
pub struct ManualClock {
    now_us: AtomicU64,
}

impl ManualClock {
    pub fn at_ms(now_ms: InstantMs) -> Self {
        Self { now_us: AtomicU64::new(now_ms * 1000) }
    }

    pub fn advance(&self, by: Duration) {
        let micros = u64::try_from(by.as_micros()).expect("a test moves the clock by less than 500,000 years");
        self.now_us.fetch_add(micros, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now_us(&self) -> u64 {
        self.now_us.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000;

    #[test]
    fn a_step_ahead_is_slewed_and_never_jumps() {
        let mut slew = Slew { at_us: 0, said_us: 100 * SECOND, behind_us: 0 };
        assert_eq!(slew.now_us(10 * SECOND), 110 * SECOND);
        // The wall clock is set an hour ahead: ten seconds later we are at most one second further than before.
        assert_eq!(slew.look(10 * SECOND, 3_710 * SECOND), 3_600 * SECOND);
        assert_eq!(slew.now_us(10 * SECOND), 110 * SECOND);
        assert_eq!(slew.now_us(20 * SECOND), 121 * SECOND);
        // It is set right again; nothing is left to make up for but the second we gained.
        assert_eq!(slew.look(20 * SECOND, 120 * SECOND), -SECOND);
        assert_eq!(slew.now_us(30 * SECOND), 130 * SECOND);
        assert_eq!(slew.now_us(40 * SECOND), 140 * SECOND);
    }

    #[test]
    fn a_step_back_never_turns_time_back() {
        let mut slew = Slew { at_us: 0, said_us: 1_000 * SECOND, behind_us: 0 };
        slew.look(0, 0);
        let mut last = 0;
        for tick in 0..2_000 {
            let now = slew.now_us(tick * SECOND / 10);
            assert!(now > last, "time goes on");
            last = now;
            if tick % 100 == 0 {
                slew.look(tick * SECOND / 10, tick * SECOND / 10);
            }
        }
        assert!(last < 1_000 * SECOND + 185 * SECOND, "and is slower than the other clock: {last}");
    }

    #[test]
    fn a_test_sets_the_clocks_of_a_machine_wrong() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("clock");
        let hour = 3_600 * SECOND;
        std::fs::write(&file, format!("{hour} 0\n")).unwrap();
        let real = SystemClock::new();
        let ahead = |clock: &SystemClock| clock.now_us().cast_signed() - real.now_us().cast_signed();
        let started = SystemClock::skewed_by(&file);
        assert!((ahead(&started) - hour).abs() < SECOND / 10, "a start takes the wall clock as it is");

        // Set right while it runs: followed slowly.
        std::fs::write(&file, "0 0\n").unwrap();
        assert!(started.look() <= -hour + SECOND / 10);
        assert!((ahead(&started) - hour).abs() < SECOND / 10);

        // Half as fast again: what is gained shows. When the drift is over the wall clock is right, and is followed slowly.
        std::fs::write(&file, "0 500000\n").unwrap();
        let drifting = SystemClock::skewed_by(&file);
        let until = boot_us() + SECOND / 25;
        while boot_us() < until {
            std::hint::spin_loop();
        }
        std::fs::write(&file, "0 0\n").unwrap();
        let behind = drifting.look();
        let gained = ahead(&drifting);
        assert!(behind <= -(SECOND / 100), "{behind}");
        assert!(gained >= SECOND / 100, "{gained}");
        assert!(ahead(&drifting) >= gained - SECOND / 1000);
    }

    #[test]
    fn the_real_clock_agrees_with_the_wall() {
        let clock = SystemClock::new();
        assert_eq!(clock.look(), 0);
        let wall = u64::try_from(wall_us()).unwrap();
        assert!(clock.now_us().abs_diff(wall) < 20_000);
        assert_eq!(clock.until(0), Duration::ZERO);
    }
}
