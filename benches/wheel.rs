//! `cargo bench`: what the timing wheel costs by itself, next to two others, in the same run and with the same timers.
//! Prints one line of JSON for each.
//!
//! - `boomerang`: `boomerang::wheel`; finds a timer by its id, and takes a cancelled one out at once.
//! - `delay_queue`: `tokio_util::time::DelayQueue`, a wheel with a slab. It cancels by a key of its own, so a map from id
//!   to key is kept beside it, as anybody must who cancels by id. It follows the real clock: it is left alone until
//!   everything in it is due, and then emptied as fast as it goes. With debug assertions it walks the whole list of a
//!   slot for each cancellation (`Stack::remove` of tokio-util 0.7.20), so such a build leaves it out of longer runs.
//! - `hierarchical_hash_wheel`: the crate of that name, made for the same purpose as ours. A cancelled timer leaves its
//!   map at once and its slot when that comes up; it has one thread only (`Rc`).
//!
//! Time is the processor time of the thread, which other processes disturb less than they do the clock; only
//! `latency_us`, the length of a turn, is by the clock. Memory is what the resident memory of the process grows by while
//! the timers are inserted, divided by their number. Each structure has a thread of its own that lives until the last
//! one is measured: so glibc gives each its own arena, and none gets the memory that another has just freed. Where a
//! structure can tell its size, that is reported as well.

use std::collections::{HashMap, HashSet};
use std::future::poll_fn;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use clap::{Parser, value_parser};
use hdrhistogram::Histogram;
use hierarchical_hash_wheel_timer::IdOnlyTimerEntry;
use hierarchical_hash_wheel_timer::wheels::cancellable::QuadWheelWithOverflow;
use rand::seq::SliceRandom;
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio_util::time::{DelayQueue, delay_queue};

use boomerang::task::{ShardId, TaskId, when};
use boomerang::wheel::{Wheel, WheelConfig};

/// The wheel's clock at the start: as large as real instants are, since that decides how far timers move.
const BASE_MS: u64 = 1_800_000_000_000;

/// So many ticks are stepped through one by one.
const SPREAD_MS_MAX: u64 = 24 * 3600 * 1000;

/// Above this many timers a build with debug assertions would measure those of the delay queue, for minutes.
const QUEUE_TIMERS_MAX: u32 = if cfg!(debug_assertions) { 20_000 } else { u32::MAX };

/// The timers that every structure gets. Their due instants count from the start.
struct Workload {
    timers: Vec<(u64, TaskId)>,
    /// Half of them, in random order.
    cancelled: Vec<TaskId>,
    spread_ms: u64,
}

impl Workload {
    fn new(timers: u32, spread_ms: u64) -> Self {
        let timer = |_| {
            let id = TaskId::new(BASE_MS, ShardId(rand::random_range(0..16)), rand::random());
            (rand::random_range(1..=spread_ms), id)
        };
        let timers: Vec<(u64, TaskId)> = (0..timers).map(timer).collect();
        let mut order: Vec<TaskId> = timers.iter().map(|(_, id)| *id).collect();
        order.shuffle(&mut rand::rng());
        order.truncate(timers.len() / 2);
        Self { timers, cancelled: order, spread_ms }
    }
}

/// A structure to be measured. Instants are milliseconds from the start.
trait Timers {
    /// Whether it goes by the real clock: then it is asked once, when everything is due.
    const REAL_CLOCK: bool = false;

    fn insert(&mut self, due_ms: u64, id: TaskId) -> bool;

    fn cancel(&mut self, id: &TaskId) -> bool;

    /// Everything that is due at `now_ms`, with its due instant. It is called for every millisecond in turn.
    fn expire(&mut self, now_ms: u64, out: &mut Vec<(u64, TaskId)>);

    /// The heap memory it holds, if it can tell.
    fn allocated_bytes(&self) -> Option<usize> {
        None
    }
}

impl Timers for Wheel<TaskId> {
    fn insert(&mut self, due_ms: u64, id: TaskId) -> bool {
        Wheel::insert(self, BASE_MS + due_ms, id)
    }

    fn cancel(&mut self, id: &TaskId) -> bool {
        Wheel::cancel(self, id).is_some()
    }

    fn expire(&mut self, now_ms: u64, out: &mut Vec<(u64, TaskId)>) {
        let from = out.len();
        Wheel::expire(self, BASE_MS + now_ms, usize::MAX, out);
        out[from..].iter_mut().for_each(|(due_ms, _)| *due_ms -= BASE_MS);
    }

    fn allocated_bytes(&self) -> Option<usize> {
        Some(Wheel::allocated_bytes(self))
    }
}

struct Queue<'a> {
    runtime: &'a Runtime,
    queue: DelayQueue<(u64, TaskId)>,
    keys: HashMap<TaskId, delay_queue::Key>,
    start: tokio::time::Instant,
}

impl<'a> Queue<'a> {
    fn new(runtime: &'a Runtime) -> Self {
        Self { runtime, queue: DelayQueue::new(), keys: HashMap::new(), start: tokio::time::Instant::now() }
    }
}

impl Timers for Queue<'_> {
    const REAL_CLOCK: bool = true;

    fn insert(&mut self, due_ms: u64, id: TaskId) -> bool {
        let key = self.queue.insert_at((due_ms, id), self.start + Duration::from_millis(due_ms));
        self.keys.insert(id, key).is_none()
    }

    fn cancel(&mut self, id: &TaskId) -> bool {
        self.keys.remove(id).is_some_and(|key| self.queue.try_remove(&key).is_some())
    }

    fn expire(&mut self, _: u64, out: &mut Vec<(u64, TaskId)>) {
        let Self { runtime, queue, keys, .. } = self;
        // A budget per task is for being fair to others, of which there are none.
        runtime.block_on(tokio::task::unconstrained(async {
            while let Some(expired) = poll_fn(|context| queue.poll_expired(context)).await {
                let timer = expired.into_inner();
                keys.remove(&timer.1);
                out.push(timer);
            }
        }));
    }
}

impl Timers for QuadWheelWithOverflow<IdOnlyTimerEntry<TaskId>> {
    fn insert(&mut self, due_ms: u64, id: TaskId) -> bool {
        // All are inserted before its first tick, so a delay is an instant.
        Self::insert(self, IdOnlyTimerEntry::new(id, Duration::from_millis(due_ms))).is_ok()
    }

    fn cancel(&mut self, id: &TaskId) -> bool {
        Self::cancel(self, id).is_ok()
    }

    fn expire(&mut self, _: u64, out: &mut Vec<(u64, TaskId)>) {
        out.extend(self.tick().into_iter().map(|entry| (millis(entry.delay), entry.id)));
    }
}

/// What one structure came to.
struct Measured {
    name: &'static str,
    insert_ns: f64,
    cancel_ns: f64,
    /// For each timer that expired, not for each tick.
    expire_ns: f64,
    bytes_per_timer: f64,
    allocated_bytes_per_timer: Option<f64>,
    inserted: usize,
    fired: usize,
    lost: usize,
    early: usize,
    /// Fired though cancelled, or fired before.
    wrong: usize,
    /// One call of `expire`.
    turn_us: Histogram<u64>,
    late_ms_max: u64,
}

impl Measured {
    fn keeps_its_word(&self) -> bool {
        (self.lost, self.early, self.wrong) == (0, 0, 0)
    }

    fn json(&self, cli: &Cli) -> Value {
        json!({
            "bench": "wheel",
            "structure": self.name,
            "timers": cli.timers,
            "spread_ms": millis(cli.spread),
            "insert_ns": self.insert_ns,
            "cancel_ns": self.cancel_ns,
            "expire_ns": self.expire_ns,
            "bytes_per_timer": self.bytes_per_timer,
            "allocated_bytes_per_timer": self.allocated_bytes_per_timer,
            "turn_us_p99": self.turn_us.value_at_quantile(0.99),
            "late_ms_max": self.late_ms_max,
            "inserted": self.inserted,
            "fired": self.fired,
            "lost": self.lost,
            "early": self.early,
            "wrong": self.wrong,
        })
    }
}

fn measure<T: Timers>(name: &'static str, new: impl FnOnce() -> T, workload: &Workload) -> Measured {
    let Workload { timers: given, cancelled, spread_ms } = workload;
    // Its pages are there before anything is measured.
    let mut fired = given.clone();
    fired.clear();
    let resident_before = resident_bytes();

    let (started, before) = (Instant::now(), cpu_time());
    let mut timers = new();
    let inserted = given.iter().filter(|(due_ms, id)| timers.insert(*due_ms, *id)).count();
    let inserting = cpu_time().saturating_sub(before);
    let resident = resident_bytes().saturating_sub(resident_before);
    let allocated = timers.allocated_bytes();

    let before = cpu_time();
    let done = cancelled.iter().filter(|id| timers.cancel(id)).count();
    let cancelling = cpu_time().saturating_sub(before);
    assert_eq!(done, cancelled.len(), "{name} knows every timer");

    let from_ms = if T::REAL_CLOCK {
        std::thread::sleep(Duration::from_millis(*spread_ms).saturating_sub(started.elapsed()));
        *spread_ms
    } else {
        1
    };
    let mut turn_us = Histogram::new(3).expect("three digits are allowed");
    // How many had fired at the end of each turn.
    let mut turns = Vec::with_capacity(usize::try_from(spread_ms - from_ms + 1).expect("bounded by SPREAD_MS_MAX"));
    let before = cpu_time();
    for now_ms in from_ms..=*spread_ms {
        let turn = Instant::now();
        timers.expire(now_ms, &mut fired);
        turn_us.saturating_record(u64::try_from(turn.elapsed().as_micros()).unwrap_or(u64::MAX));
        turns.push((now_ms, fired.len()));
    }
    let expiring = cpu_time().saturating_sub(before);

    let (mut late_ms_max, mut early, mut from) = (0, 0, 0);
    for (now_ms, until) in turns {
        for (due_ms, _) in &fired[from..until] {
            early += usize::from(*due_ms > now_ms);
            late_ms_max = late_ms_max.max(now_ms.saturating_sub(*due_ms));
        }
        from = until;
    }
    let (lost, wrong) = compare(workload, &fired);
    Measured {
        name,
        insert_ns: ns_each(inserting, given.len()),
        cancel_ns: ns_each(cancelling, cancelled.len()),
        expire_ns: ns_each(expiring, fired.len()),
        bytes_per_timer: each(resident, given.len()),
        allocated_bytes_per_timer: allocated.map(|bytes| each(bytes, given.len())),
        inserted,
        fired: fired.len(),
        lost,
        early,
        wrong,
        turn_us,
        late_ms_max,
    }
}

/// How many of those that should have fired did not, and how often one fired that should not, or not again.
fn compare(workload: &Workload, fired: &[(u64, TaskId)]) -> (usize, usize) {
    let cancelled: HashSet<&TaskId> = workload.cancelled.iter().collect();
    let mut expected: HashMap<TaskId, bool> = workload.timers.iter().map(|(_, id)| (*id, false)).collect();
    expected.retain(|id, _| !cancelled.contains(id));
    let mut wrong = 0;
    for (_, id) in fired {
        match expected.get_mut(id) {
            Some(seen) if !*seen => *seen = true,
            _ => wrong += 1,
        }
    }
    (expected.values().filter(|seen| !**seen).count(), wrong)
}

#[allow(clippy::cast_precision_loss, reason = "one decimal is kept")]
fn each(whole: usize, parts: usize) -> f64 {
    (whole as f64 / parts.max(1) as f64 * 10.0).round() / 10.0
}

fn ns_each(took: Duration, operations: usize) -> f64 {
    each(usize::try_from(took.as_nanos()).unwrap_or(usize::MAX), operations)
}

/// The processor time of this thread.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// The resident memory of this process; 0 where the system does not say.
fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.trim().trim_end_matches("kB").trim().parse::<usize>().unwrap_or(0) * 1024
}

fn boomerang(workload: &Workload) -> Measured {
    measure("boomerang", || Wheel::new(WheelConfig::default(), BASE_MS), workload)
}

fn delay_queue(workload: &Workload) -> Measured {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime without I/O");
    let _context = runtime.enter();
    measure("delay_queue", || Queue::new(&runtime), workload)
}

fn hierarchical_hash_wheel(workload: &Workload) -> Measured {
    measure("hierarchical_hash_wheel", QuadWheelWithOverflow::new, workload)
}

/// Measures one after the other; each has its own thread, and all threads end at the end.
fn measure_all(workload: &Arc<Workload>, structures: &[fn(&Workload) -> Measured], mut done: impl FnMut(&Measured)) {
    let mut threads = Vec::new();
    for measure in structures {
        let (result, results) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let (workload, measure) = (workload.clone(), *measure);
        let thread = std::thread::spawn(move || {
            let _ = result.send(measure(&workload));
            // An error is the end.
            let _ = ended.recv();
        });
        threads.push((end, thread));
        done(&results.recv().expect("no panic while measuring"));
    }
    for (end, thread) in threads {
        drop(end);
        let _ = thread.join();
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// What the timing wheel costs by itself, next to tokio-util's DelayQueue and hierarchical_hash_wheel.
///
/// Inserts timers, cancels half of them in random order, and lets the others expire millisecond by millisecond.
/// Nanoseconds are processor time of one thread. Memory is what the resident memory of the process grew by. Exit code 1:
/// one of them lost a timer, or fired one early or wrongly.
#[derive(Parser)]
#[command(name = "cargo bench --bench wheel --")]
struct Cli {
    /// How many timers
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = value_parser!(u32).range(2..=1_000_000_000))]
    timers: u32,
    /// The time their due instants are spread over, at random; at most 24h
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = spread)]
    spread: Duration,
    /// Measure Boomerang's wheel only
    #[arg(long)]
    alone: bool,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

fn spread(text: &str) -> Result<Duration, String> {
    let spread = when::parse_duration(text)?;
    match millis(spread) {
        1..=SPREAD_MS_MAX => Ok(spread),
        _ => Err("every millisecond of it is stepped through, so it is at least 1ms and at most 24h".into()),
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut structures: Vec<fn(&Workload) -> Measured> = vec![boomerang];
    if !cli.alone {
        if cli.timers <= QUEUE_TIMERS_MAX {
            structures.push(delay_queue);
        } else {
            eprintln!("the delay queue is left out: its debug assertions would be measured; use `cargo bench`");
        }
        structures.push(hierarchical_hash_wheel);
    }
    let workload = Arc::new(Workload::new(cli.timers, millis(cli.spread)));
    let mut good = true;
    measure_all(&workload, &structures, |measured| {
        good &= measured.keeps_its_word();
        println!("{}", measured.json(&cli));
    });
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
