//! The other end of callbacks: writes down each delivery, and answers as its task wants.
//!
//! On the way a request can get lost, or its answer, while things are broken. One receiver looks at fences and does what it
//! is asked once; the others only say yes or no.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use boomerang::callback;
use boomerang_task::locks::Mutex;
use boomerang_task::{Delivery, Failure, FailureClass};
use futures::FutureExt;
use futures::future::BoxFuture;
use rand::RngExt;
use rand::rngs::SmallRng;
use tokio_util::sync::CancellationToken;

use crate::effects::Effects;
use crate::history::{self, Recorder, What};
use crate::payload::Payload;

/// On the way to a receiver, and back.
const USUAL_MS: (u64, u64) = (1, 15);
const SLOW_MS: (u64, u64) = (100, 1_200);

pub struct Receivers {
    recorder: Recorder,
    state: Mutex<State>,
    /// Requests and answers get lost, and some take long.
    broken: AtomicBool,
}

struct State {
    rng: SmallRng,
    effects: Effects,
}

/// What happens to one delivery, decided when it leaves.
struct Fate {
    there: Duration,
    back: Duration,
    request_lost: bool,
    answer_lost: bool,
}

impl Receivers {
    pub fn new(recorder: Recorder, rng: SmallRng) -> Self {
        let state = Mutex::new(State { rng, effects: Effects::default() });
        Self { recorder, state, broken: AtomicBool::new(false) }
    }

    pub fn set_broken(&self, broken: bool) {
        self.broken.store(broken, Ordering::SeqCst);
    }

    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    fn fate(&self) -> Fate {
        let broken = self.broken.load(Ordering::SeqCst);
        let rng = &mut self.state.lock().rng;
        let slow = broken && rng.random_bool(0.03);
        let (from_ms, until_ms) = if slow { SLOW_MS } else { USUAL_MS };
        let mut way = || Duration::from_millis(rng.random_range(from_ms..until_ms));
        let (there, back) = (way(), way());
        let (request_lost, answer_lost) = (broken && rng.random_bool(0.03), broken && rng.random_bool(0.05));
        Fate { there, back, request_lost, answer_lost }
    }

    /// It arrives. Whether it is accepted.
    fn take(&self, delivery: &Delivery) -> bool {
        // What comes without one is nobody's: a checker finds that nobody has registered it.
        let payload = Payload::read(&delivery.payload).unwrap_or_default();
        let accepted = delivery.attempt > payload.refusals;
        let effect = payload.fenced.then(|| {
            let effects = &mut self.state.lock().effects;
            effects.take(delivery.task, delivery.occurrence, delivery.fence, accepted)
        });
        self.recorder.record(What::Delivered(history::Delivery {
            token: payload.token,
            task: delivery.task.to_string(),
            occurrence: delivery.occurrence,
            attempt: delivery.attempt,
            version: payload.version,
            due_ms: delivery.due_ms,
            fence: delivery.fence,
            accepted,
            effect,
            dead_letter: delivery.dead_letter.is_some(),
            datagram: false,
        }));
        accepted
    }
}

/// What takes the deliveries of one life there.
pub struct Carrier {
    pub receivers: Arc<Receivers>,
    pub gone: CancellationToken,
}

impl callback::Carrier for Carrier {
    fn carry(&self, delivery: Delivery, within: Duration) -> BoxFuture<'static, Result<(), Failure>> {
        let (receivers, gone) = (self.receivers.clone(), self.gone.clone());
        let carried = async move {
            if gone.is_cancelled() {
                return std::future::pending().await;
            }
            let fate = receivers.fate();
            let (out, answer) = tokio::sync::oneshot::channel();
            // It is on its way, whatever becomes of its sender.
            tokio::spawn(async move {
                tokio::time::sleep(fate.there).await;
                if fate.request_lost {
                    return std::future::pending().await;
                }
                let accepted = receivers.take(&delivery);
                if fate.answer_lost {
                    return std::future::pending().await;
                }
                tokio::time::sleep(fate.back).await;
                let _ = out.send(accepted);
            });
            let answer = tokio::time::timeout(within, answer).await;
            if gone.is_cancelled() {
                return std::future::pending().await;
            }
            match answer {
                Ok(Ok(true)) => Ok(()),
                Ok(Ok(false)) => Err(Failure::new(FailureClass::BadStatus, "the receiver said no")),
                Ok(Err(_)) | Err(_) => Err(Failure::new(FailureClass::Timeout, "no answer in time")),
            }
        };
        carried.boxed()
    }
}
