//! Receivers that refuse: a few attempts, or all of them, and then the task is a dead letter, with a copy for somebody
//! else.

use rand::RngExt;

use super::Worker;
use crate::history::{Due, Registration};
use crate::payload::Payload;

const DELAY_MS_MAX: u64 = 4_000;
const ATTEMPTS: u32 = 4;

pub(super) async fn run(worker: &mut Worker) {
    while worker.turn().await {
        let refusals = match worker.rng.random_range(0..4) {
            0 => 1,
            1 => ATTEMPTS - 1,
            _ => u32::MAX,
        };
        let payload = Payload { refusals, ..Payload::plain(worker.shared.token()) };
        let due = Due::In(worker.rng.random_range(0..DELAY_MS_MAX));
        let registration = Registration { due, ..worker.registration(payload, ATTEMPTS) };
        let mut request = worker.request(payload, ATTEMPTS);
        request.settings.dead_letters = worker.rng.random_ratio(1, 2).then(|| worker.shared.receivers.dead_letters());
        worker.asker.register(registration, request).await;
    }
}
