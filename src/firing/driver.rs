//! What fires: it sleeps to the next busy slot of the wheels, not tick by tick, and hands over what is due.
//!
//! A thread of its own, since on a busy runtime a timer is as late as the task before it is long. It does nothing but
//! take the ledger's locks, move ids into a channel and sleep. On a runtime of one thread, which is a simulation's, it is a
//! task, so that its turns have a place in the one order of everything.

use std::sync::Arc;

use super::ledger::{Ledger, Turn};
use crate::blocking;
use crate::task::{GroupId, InstantMs};

pub(super) enum Driver {
    Thread(std::thread::JoinHandle<()>),
    Task(tokio::task::JoinHandle<()>),
}

impl Driver {
    /// `kept` is dropped with the driver, and also when it panics.
    pub fn start(
        ledger: Arc<Ledger>,
        arm: impl Fn(GroupId, u64, InstantMs) + Send + Sync + 'static,
        kept: impl Send + 'static,
    ) -> Self {
        match blocking::on_one_thread() {
            true => Driver::Task(tokio::spawn(run(ledger, arm, kept))),
            false => Self::on_a_thread(ledger, arm, kept),
        }
    }

    pub fn on_a_thread(
        ledger: Arc<Ledger>,
        arm: impl Fn(GroupId, u64, InstantMs) + Send + 'static,
        kept: impl Send + 'static,
    ) -> Self {
        let thread = std::thread::Builder::new().name("wheel-driver".into()).spawn(move || {
            let _kept = kept;
            loop {
                match ledger.turn(&arm) {
                    Turn::Again => {}
                    Turn::Sleep => ledger.sleep(),
                    Turn::Stop => return,
                }
            }
        });
        Driver::Thread(thread.expect("the system has room for a thread"))
    }

    /// After the ledger was stopped.
    pub fn join(self) {
        match self {
            // If it has panicked, that was the node's end.
            Driver::Thread(thread) => drop(thread.join()),
            // It does nothing more.
            Driver::Task(task) => task.abort(),
        }
    }
}

async fn run(
    ledger: Arc<Ledger>,
    arm: impl Fn(GroupId, u64, InstantMs) + Send + Sync + 'static,
    _kept: impl Send + 'static,
) {
    loop {
        match ledger.turn(&arm) {
            Turn::Again => tokio::task::yield_now().await,
            Turn::Sleep => ledger.slept().await,
            Turn::Stop => return,
        }
    }
}
