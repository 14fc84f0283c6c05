//! The same registration with the same key, until one is answered and once more after that: one task comes of it.

use rand::RngExt;

use super::Worker;
use super::one_shot::ATTEMPTS;
use crate::history::{Due, Registration};
use crate::payload::Payload;

const DELAY_MS: std::ops::Range<u64> = 500..6_000;
/// An unlucky one is given up after so many.
const TRIES_MAX: u32 = 8;

pub(super) async fn run(worker: &mut Worker) {
    while worker.turn().await {
        let payload = Payload::plain(worker.shared.token());
        let delay_ms = worker.rng.random_range(DELAY_MS);
        let registration = Registration {
            due: Due::In(delay_ms),
            key: Some(format!("key-{}", payload.token)),
            ..worker.registration(payload, ATTEMPTS)
        };
        let request = worker.request(payload, ATTEMPTS);
        let mut more = worker.rng.random_range(0..3);
        for _ in 0..TRIES_MAX {
            if worker.asker.register(registration.clone(), request.clone()).await.is_some() {
                if more == 0 {
                    break;
                }
                more -= 1;
            }
            let pause = worker.pause.mul_f64(worker.rng.random_range(0.0..0.5));
            if !worker.rest(pause).await {
                return;
            }
        }
    }
}
