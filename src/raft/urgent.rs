//! Threads and connections of their own for what must not wait behind work: who leads hangs on them.
//!
//! On a busy node a task of the common runtime waits behind every other: requests, log entries, rows that are applied. A
//! lease lasts 450 ms and is not asked why a beat is late. What nodes say to each other about leading (requests to be
//! bound, beats, votes, transfers), the clock that has it said ([`super::pacer`]) and the listener that hears it run here.
//! The system gives a thread that mostly sleeps its turn soon, however busy the others are. What comes in of log entries
//! and snapshots is read here as well, since it comes by the same listener; what is done with it is not.

use std::io;
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};

/// Two, so that one connection that has much to say does not hold up another.
const THREADS: usize = 2;
const STOP_WITHIN: Duration = Duration::from_secs(2);

/// The runtime of these threads. They end when it is dropped.
pub struct Urgent {
    runtime: Option<Runtime>,
    handle: Handle,
}

impl Urgent {
    pub fn start() -> io::Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(THREADS).thread_name("urgent").enable_all().build()?;
        Ok(Self { handle: runtime.handle().clone(), runtime: Some(runtime) })
    }

    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Ends the threads, and what still runs on them, and waits for that: some of it holds the database. Blocks.
    pub fn stop(mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(STOP_WITHIN);
        }
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        // Where a runtime must not be waited for: whoever drops this may be a task of another one.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
