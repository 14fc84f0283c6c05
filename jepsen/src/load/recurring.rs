//! Tasks that come again: each of their due instants has to come, or to be accounted for.

use std::time::Duration;

use boomerang_client::Registration as Request;
use boomerang_task::{Missed, Recurrence};
use rand::RngExt;

use super::Worker;
use super::one_shot::ATTEMPTS;
use crate::history::{Due, Registration};
use crate::payload::Payload;

const FIRST_IN_MS: std::ops::Range<u64> = 0..2_000;
const EVERY_MS: std::ops::Range<u64> = 200..3_000;
/// How long one of them goes on.
const SPAN_MS: std::ops::Range<u64> = 5_000..40_000;

pub(super) async fn run(worker: &mut Worker) {
    while worker.turn().await {
        let payload = Payload::plain(worker.shared.token());
        let every_ms = worker.rng.random_range(EVERY_MS);
        let count = (worker.rng.random_range(SPAN_MS) / every_ms).max(2);
        // What was missed while nobody led is run as one, or one by one, or left out.
        let missed = match worker.rng.random_range(0..3) {
            0 => Missed::Skip,
            1 => Missed::Once,
            _ => Missed::All { max: Missed::MAX_MAX },
        };
        let registration = Registration {
            due: Due::In(worker.rng.random_range(FIRST_IN_MS)),
            every_ms: Some(every_ms),
            missed,
            count: Some(count),
            ..worker.registration(payload, ATTEMPTS)
        };
        let recurrence = Recurrence { missed, count: Some(count), ..Recurrence::every(every_ms) };
        let request = Request { recurrence: Some(recurrence), ..worker.request(payload, ATTEMPTS) };
        let registered = worker.asker.register(registration, request).await;
        // Each of them is many deliveries: a few at a time are enough.
        let span = Duration::from_millis(every_ms * count);
        let Some(registered) = registered.filter(|_| worker.rng.random_ratio(1, 2)) else { continue };
        let until = span.mul_f64(worker.rng.random_range(0.1..0.9));
        if !worker.rest(until).await {
            return;
        }
        if worker.rng.random_ratio(1, 4) {
            worker.asker.list().await;
        }
        if worker.rng.random_ratio(1, 2) {
            worker.asker.get(payload, registered.task_id).await;
        } else {
            worker.asker.cancel(payload, registered.task_id).await;
        }
    }
}
