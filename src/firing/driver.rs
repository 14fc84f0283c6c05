//! The thread that fires: it sleeps to the next busy slot of the wheels, not tick by tick, and hands over what is due.
//!
//! A thread of its own, since on a busy runtime a timer is as late as the task before it is long. It does nothing but
//! take the ledger's lock, move ids into a channel and sleep.

use std::sync::Arc;
use std::thread::JoinHandle;

use super::ledger::{Ledger, Turn};
use crate::task::{GroupId, InstantMs};

pub(super) fn start(ledger: Arc<Ledger>, arm: impl Fn(GroupId, InstantMs) + Send + 'static) -> JoinHandle<()> {
    std::thread::Builder::new()
        .name("wheel-driver".into())
        .spawn(move || {
            loop {
                match ledger.turn(&arm) {
                    Turn::Again => {}
                    Turn::Sleep => ledger.sleep(),
                    Turn::Stop => return,
                }
            }
        })
        .expect("the system has room for a thread")
}
