//! Cancels and edits, most of them at about the instant at which the task is due: their answers are always definite, and
//! have to be true.

use std::time::Duration;

use boomerang_client::{Cancelled, Updated};
use rand::RngExt;

use super::Worker;
use super::one_shot::ATTEMPTS;
use crate::history::{Due, Registration};
use crate::payload::Payload;

const DELAY_MS: std::ops::Range<u64> = 100..3_000;
const EDITS_MAX: u32 = 3;

pub(super) async fn run(worker: &mut Worker) {
    while worker.turn().await {
        one(worker).await;
    }
}

async fn one(worker: &mut Worker) {
    let mut payload = Payload::plain(worker.shared.token());
    let due = Due::In(worker.rng.random_range(DELAY_MS));
    let registration = Registration { due, ..worker.registration(payload, ATTEMPTS) };
    let request = worker.request(payload, ATTEMPTS);
    let Some(registered) = worker.asker.register(registration, request).await else { return };
    let (task, mut due_ms) = (registered.task_id, registered.due_ms);
    for _ in 0..worker.rng.random_range(0..=EDITS_MAX) {
        if !near(worker, due_ms).await {
            return;
        }
        if worker.rng.random_ratio(1, 4) {
            worker.asker.get(payload, task).await;
        }
        payload.version += 1;
        let to_ms = worker.now_ms() + worker.rng.random_range(DELAY_MS);
        match worker.asker.edit(payload, task, to_ms).await {
            Some(Updated::Updated { due_ms: moved_ms, .. }) => due_ms = moved_ms,
            // Done, or about to be; or nobody knows which version it has.
            _ => return worker.asker.get(payload, task).await,
        }
    }
    if worker.rng.random_ratio(1, 12) {
        worker.asker.list().await;
    }
    if worker.rng.random_ratio(2, 3) && near(worker, due_ms).await {
        let cancelled = worker.asker.cancel(payload, task).await;
        if !matches!(cancelled, Some(Cancelled::NotFound)) {
            worker.asker.get(payload, task).await;
        }
    }
}

/// Waits until the task is nearly due, or just was, or not at all.
async fn near(worker: &mut Worker, due_ms: u64) -> bool {
    let left_ms = due_ms.saturating_sub(worker.now_ms());
    let wait_ms = match worker.rng.random_range(0..4) {
        0 => worker.rng.random_range(0..=left_ms),
        1 => left_ms.saturating_sub(worker.rng.random_range(0..1_200)),
        2 => left_ms.saturating_sub(worker.rng.random_range(0..40)),
        _ => left_ms + worker.rng.random_range(0..40),
    };
    worker.rest(Duration::from_millis(wait_ms)).await
}
