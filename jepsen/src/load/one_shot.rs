//! Tasks that are due once, soon or in a while, looked at by get and list on their way.

use boomerang_task::TaskId;
use rand::RngExt;

use super::Worker;
use crate::history::{Due, Registration};
use crate::payload::Payload;

/// Of its own tasks a process remembers so many to look at.
const REMEMBERED: usize = 32;
/// Enough for any time that a receiver cannot be reached.
pub(super) const ATTEMPTS: u32 = 1_000;
const DELAY_MS_MAX: u64 = 20_000;

pub(super) async fn run(worker: &mut Worker) {
    let mut known: Vec<(Payload, TaskId)> = Vec::new();
    while worker.turn().await {
        if !known.is_empty() && worker.rng.random_ratio(1, 3) {
            let (payload, task) = known[worker.rng.random_range(0..known.len())];
            worker.asker.get(payload, task).await;
            continue;
        }
        if worker.rng.random_ratio(1, 40) {
            worker.asker.list().await;
            continue;
        }
        let payload = Payload::plain(worker.shared.token());
        if let Some(task) = register(worker, payload).await {
            if known.len() == REMEMBERED {
                known.remove(0);
            }
            known.push((payload, task));
        }
    }
}

async fn register(worker: &mut Worker, payload: Payload) -> Option<TaskId> {
    // Most are due within seconds, some wait in the timeline until their leader is long gone.
    let delay_ms = match worker.rng.random_range(0..10) {
        0 => worker.rng.random_range(0..50),
        1..7 => worker.rng.random_range(50..4_000),
        _ => worker.rng.random_range(4_000..DELAY_MS_MAX),
    };
    let due = match worker.rng.random_ratio(1, 4) {
        true => Due::At(worker.now_ms() + delay_ms),
        false => Due::In(delay_ms),
    };
    let registration = Registration { due, ..worker.registration(payload, ATTEMPTS) };
    let request = worker.request(payload, ATTEMPTS);
    worker.asker.register(registration, request).await.map(|registered| registered.task_id)
}
