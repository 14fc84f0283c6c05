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
/// be as quick. Threads that it starts do so as well.
pub fn give_way() {
    // On Linux, which has a niceness for each thread, nobody means the thread that asks.
    if cfg!(target_os = "linux")
        && let Ok(nice) = getpriority_process(None)
        && let Err(error) = setpriority_process(None, NICE_MAX.min(nice + GIVES_WAY))
    {
        tracing::debug!(%error, "a thread at work does not give way");
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
        Self::start("readers", READERS, || (0..2).for_each(|_| give_way()))
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
        let at_work = std::thread::spawn(|| {
            give_way();
            let own = nice();
            (own, std::thread::spawn(nice).join().unwrap())
        });
        let expected = NICE_MAX.min(before + GIVES_WAY);
        assert_eq!(at_work.join().unwrap(), (expected, expected), "and so is a thread that it starts");
        assert_eq!(nice(), before, "of all others nothing has changed");
        let nicest = std::thread::spawn(|| {
            (0..=NICE_MAX).for_each(|_| give_way());
            nice()
        });
        assert_eq!(nicest.join().unwrap(), NICE_MAX);
    }
}
