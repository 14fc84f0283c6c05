//! Threads of their own for what must not wait behind work.
//!
//! On a busy node a task of the common runtime waits behind every other: entries and rows that are stored, callbacks,
//! lists. The system gives a thread that mostly sleeps its turn soon, however busy the others are. So these have their own:
//!
//! - `urgent`: what nodes say to each other about leading (requests to be bound, beats, votes, transfers), the clock that
//!   has it said ([`crate::raft`]'s pacer) and the listener that hears it: a lease lasts 450 ms and is not asked why a beat
//!   is late. Log entries come by the same listener and are read here as well, since others wait for their answers; they
//!   are stored elsewhere. Snapshots and forwarded requests are read elsewhere
//! - `front`: connections of clients. What they ask for is read, checked, and refused if there is too much of it, while
//!   what was taken on is stored and fired elsewhere. A request that another node has to answer, or several, is looked
//!   after here
//! - `readers`: pages of lists are read, which takes long and is urgent to nobody: they give way to what is at work

use std::io;
use std::num::NonZeroUsize;
use std::sync::OnceLock;
use std::thread::available_parallelism;
use std::time::Duration;

use rustix::process::{getpriority_process, setpriority_process};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Handle, Runtime};

use crate::sabotage::Fault;

/// Two, so that one connection that has much to say does not hold up another.
const URGENT: usize = 2;
const FRONT_MIN: usize = 2;
pub const READERS: usize = 2;
const STOP_WITHIN: Duration = Duration::from_secs(2);
/// Steps of niceness. A thread at work gets half of the processor time of one that is not nicer, while both want it.
const GIVES_WAY: i32 = 3;
const NICE_MAX: i32 = 19;

/// From now on, this thread lets others of this process go first: what is at work is more than what is urgent, and need not
/// be as quick. Threads that it starts do so as well, and no more than it.
pub fn give_way() {
    be_nicer(GIVES_WAY);
}

/// The same, even to threads that give way.
fn give_way_to_all() {
    be_nicer(2 * GIVES_WAY);
}

/// By so many steps than the first thread of this process that asked.
fn be_nicer(steps: i32) {
    static FIRST: OnceLock<i32> = OnceLock::new();
    // Only on Linux a thread has a niceness of its own; there, nobody means the thread that asks.
    if cfg!(target_os = "linux")
        && let Ok(nice) = getpriority_process(None)
        && let wanted = NICE_MAX.min(FIRST.get_or_init(|| nice) + steps)
        && wanted > nice
        && let Err(error) = setpriority_process(None, wanted)
    {
        tracing::debug!(%error, "a thread does not give way");
    }
}

/// The runtime of some threads. They end when it is dropped.
pub struct Threads {
    runtime: Option<Runtime>,
    handle: Handle,
}

impl Threads {
    /// Called on the common runtime.
    pub fn urgent() -> io::Result<Self> {
        if Fault::BeatsBehindWork.is_on() {
            return Ok(Self { runtime: None, handle: Handle::current() });
        }
        Self::start("urgent", URGENT, || {})
    }

    pub fn front() -> io::Result<Self> {
        Self::start("front", FRONT_MIN.max(available_parallelism().map_or(1, NonZeroUsize::get) / 2), || {})
    }

    pub fn readers() -> io::Result<Self> {
        Self::start("readers", READERS, give_way_to_all)
    }

    /// Each of them does `begin` first.
    fn start(name: &str, threads: usize, begin: fn()) -> io::Result<Self> {
        let mut builder = Builder::new_multi_thread();
        let builder = builder.worker_threads(threads).thread_name(name).enable_all().on_thread_start(begin);
        let runtime = builder.build()?;
        Ok(Self { handle: runtime.handle().clone(), runtime: Some(runtime) })
    }

    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// A listener that was bound on another runtime; who connects from now on is heard on these threads.
    pub fn take_over(&self, listener: TcpListener) -> io::Result<TcpListener> {
        let listener = listener.into_std()?;
        let _entered = self.handle.enter();
        TcpListener::from_std(listener)
    }

    /// Ends the threads, and what still runs on them, and waits for that: some of it holds the database. Blocks.
    pub fn stop(mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(STOP_WITHIN);
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // Where a runtime must not be waited for: whoever drops this may be a task of another one.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// Of this thread.
    fn nice() -> i32 {
        getpriority_process(None).unwrap()
    }

    #[test]
    fn who_gives_way_is_nicer_than_the_others() {
        let before = nice();
        let given = |give: fn()| {
            give();
            nice()
        };
        let at_work = std::thread::spawn(move || {
            let own = given(give_way);
            let started = std::thread::spawn(move || (nice(), given(give_way), given(give_way_to_all)));
            (own, started.join().unwrap())
        });
        let [once, twice] = [1, 2].map(|times| NICE_MAX.min(before + times * GIVES_WAY));
        assert_eq!(
            at_work.join().unwrap(),
            (once, (once, once, twice)),
            "a thread that it starts is as nice, not nicer"
        );
        assert_eq!(nice(), before, "of all others nothing has changed");
    }
}
