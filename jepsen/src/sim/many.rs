//! Many schedules, on as many threads as are wanted, until one is broken.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use boomerang::sabotage::Fault;
use boomerang_task::locks::Mutex;
use tracing::subscriber::NoSubscriber;

use super::{Outcome, Plan, run};

const SAY_EVERY: Duration = Duration::from_secs(10);

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Many {
    /// The seed of the first schedule; those that follow have the next ones.
    pub seed: u64,
    pub schedules: u64,
    pub threads: usize,
    pub sabotage: Vec<Fault>,
}

/// What came of it.
#[derive(Debug)]
pub struct Summary {
    pub schedules: u64,
    /// In all histories together.
    pub events: u64,
    pub took: Duration,
    /// The first that was found. Nothing is begun after it.
    pub broken: Option<Broken>,
}

/// A schedule in which a promise was broken.
#[derive(Debug)]
pub struct Broken {
    pub outcome: Outcome,
    /// How to see it again.
    pub command: String,
}

/// Runs until all are done or one is broken. `say` hears how far it is.
pub fn many(asked: &Many, say: impl Fn(&str) + Sync) -> Summary {
    let began = Instant::now();
    let (next, done, events) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let (over, broken) = (AtomicBool::new(false), Mutex::new(None));
    let said_at = Mutex::new(began);
    let work = || {
        // Nodes complain while they are broken. One schedule alone may be looked at.
        let _quiet = (asked.schedules > 1).then(|| tracing::subscriber::set_default(NoSubscriber::default()));
        while !over.load(Ordering::SeqCst) {
            let n = next.fetch_add(1, Ordering::SeqCst);
            if n >= asked.schedules {
                return;
            }
            let seed = asked.seed + n;
            let outcome = run(seed, &Plan { sabotage: asked.sabotage.clone(), ..Plan::of(seed) });
            events.fetch_add(outcome.history.events.len() as u64, Ordering::SeqCst);
            let done = done.fetch_add(1, Ordering::SeqCst) + 1;
            if !outcome.holds() {
                over.store(true, Ordering::SeqCst);
                let mut broken = broken.lock();
                broken.get_or_insert_with(|| Broken { command: command(seed, &asked.sabotage), outcome });
                return;
            }
            let mut said_at = said_at.lock();
            if said_at.elapsed() >= SAY_EVERY {
                *said_at = Instant::now();
                say(&format!("{done} of {} schedules, all promises kept", asked.schedules));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..asked.threads.max(1) {
            scope.spawn(work);
        }
    });
    Summary {
        schedules: done.into_inner(),
        events: events.into_inner(),
        took: began.elapsed(),
        broken: broken.into_inner(),
    }
}

fn command(seed: u64, sabotage: &[Fault]) -> String {
    let names: Vec<&str> = sabotage.iter().map(|fault| fault.name()).collect();
    let sabotage = if names.is_empty() { String::new() } else { format!(" --sabotage {}", names.join(",")) };
    format!("jepsen sim --schedules 1 --seed {seed}{sabotage}")
}
