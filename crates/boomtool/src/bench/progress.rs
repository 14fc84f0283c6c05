//! A line per second on standard error while a bench runs: what it does, how far it is, and how fast.
//!
//! Only for people: nothing is printed when standard error is no terminal, or with `--quiet`.

use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use boomerang_task::locks::Mutex;

use super::super::output::note;
use super::account::Arrivals;

const PERIOD: Duration = Duration::from_secs(1);

/// What a bench is at. Ends with it.
pub(super) struct Progress {
    shared: Arc<Shared>,
    ticker: Option<tokio::task::JoinHandle<()>>,
}

struct Shared {
    phase: Mutex<Phase>,
    done: AtomicU64,
}

struct Phase {
    name: &'static str,
    /// 0: nothing is counted.
    total: u64,
}

impl Progress {
    pub fn start(quiet: bool, arrivals: Arc<Arrivals>) -> Self {
        let phase = Mutex::new(Phase { name: "connecting", total: 0 });
        let shared = Arc::new(Shared { phase, done: AtomicU64::new(0) });
        let ticker = wanted(quiet).then(|| tokio::spawn(shared.clone().tick(arrivals)));
        Self { shared, ticker }
    }

    /// Something else begins.
    pub fn phase(&self, name: &'static str, total: u64) {
        let mut phase = self.shared.phase.lock();
        *phase = Phase { name, total };
        self.shared.done.store(0, Ordering::Relaxed);
    }

    /// One more of what the phase counts.
    pub fn one(&self) {
        self.add(1);
    }

    pub fn add(&self, count: u64) {
        self.shared.done.fetch_add(count, Ordering::Relaxed);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(ticker) = &self.ticker {
            ticker.abort();
        }
    }
}

impl Shared {
    async fn tick(self: Arc<Self>, arrivals: Arc<Arrivals>) {
        let mut seconds = tokio::time::interval(PERIOD);
        seconds.tick().await;
        let (mut done_before, mut delivered_before) = (0, 0);
        loop {
            seconds.tick().await;
            let done = self.done.load(Ordering::Relaxed);
            let delivered = arrivals.len();
            note(&{
                let phase = self.phase.lock();
                // A new phase counts from 0.
                let step = done.checked_sub(done_before).unwrap_or(done);
                let counted = match phase.total {
                    0 => String::new(),
                    total => format!(" {done} of {total} ({step}/s)"),
                };
                format!("{}{counted}, delivered {delivered} ({}/s)", phase.name, delivered - delivered_before)
            });
            (done_before, delivered_before) = (done, delivered);
        }
    }
}

/// Whether somebody looks.
pub(super) fn wanted(quiet: bool) -> bool {
    !quiet && io::stderr().is_terminal()
}
