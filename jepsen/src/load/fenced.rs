//! A receiver of real effects: whatever comes again, each effect is had once.

use boomerang_client::Registration as Request;
use boomerang_task::Recurrence;
use rand::RngExt;

use super::Worker;
use super::one_shot::ATTEMPTS;
use crate::history::{Due, Registration};
use crate::payload::Payload;

const DELAY_MS_MAX: u64 = 5_000;
const EVERY_MS: std::ops::Range<u64> = 300..1_500;

pub(super) async fn run(worker: &mut Worker) {
    while worker.turn().await {
        let payload = Payload { fenced: true, ..Payload::plain(worker.shared.token()) };
        let due = Due::In(worker.rng.random_range(0..DELAY_MS_MAX));
        let again = worker.rng.random_ratio(1, 4).then(|| {
            let count = worker.rng.random_range(2..8);
            Recurrence { count: Some(count), ..Recurrence::every(worker.rng.random_range(EVERY_MS)) }
        });
        let registration = Registration {
            due,
            every_ms: again.map(|recurrence| recurrence.interval_ms),
            count: again.and_then(|recurrence| recurrence.count),
            ..worker.registration(payload, ATTEMPTS)
        };
        let request = Request { recurrence: again, ..worker.request(payload, ATTEMPTS) };
        worker.asker.register(registration, request).await;
    }
}
