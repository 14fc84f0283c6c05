//! Where work runs that takes a while without awaiting: on a thread that is meant for it, or right here.
//!
//! A node has a runtime of several threads, and what reads a disk must not hold up the others. A runtime of one thread
//! is a test's or a simulation's: there everything runs in one order, and so in place.

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::JoinError;

/// Whether everything runs on this one thread.
pub fn on_one_thread() -> bool {
    Handle::current().runtime_flavor() == RuntimeFlavor::CurrentThread
}

/// Runs `work` where it holds up nobody.
pub async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
    if on_one_thread() {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await
}

/// Runs `work` here, after the runtime was told to have others do what else there is.
pub fn in_place<T>(work: impl FnOnce() -> T) -> T {
    if on_one_thread() {
        return work();
    }
    tokio::task::block_in_place(work)
}
