//! What is there when all is over: tasks that wait still, and dead letters.

use std::time::Duration;

use boomerang_client::{Client, ClientError, DeadLetterFilter, TaskFilter, TaskView};

use super::LoadError;
use crate::history::{Left, LeftAs, Recorder, What};
use crate::patience;
use crate::payload::Payload;

const PAGE: u32 = 1_000;
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Waits until no task is left, or `patience` is over, and writes down what there is.
pub(super) async fn account(admin: &Client, recorder: &Recorder, patience: Duration) -> Result<(), LoadError> {
    let none = || async {
        match tasks(admin).await {
            Ok(tasks) if tasks.is_empty() => Ok(()),
            left => Err(left),
        }
    };
    let tasks = match patience::insist(patience, LOOK_EVERY, none).await {
        Ok(()) => Vec::new(),
        Err(left) => left?,
    };
    for task in tasks {
        let token = Payload::read(&task.payload).map(|payload| payload.token);
        let state = LeftAs::Pending { due_ms: task.due_ms, occurrence: task.occurrence };
        recorder.record(What::Left(Left { token, task: task.task_id.to_string(), state }));
    }
    let mut from = String::new();
    loop {
        let page = admin.list_dead_letters(&DeadLetterFilter::default(), PAGE, &from).await?;
        for letter in page.dead_letters {
            let token = Payload::read(&letter.payload).map(|payload| payload.token);
            let state = LeftAs::DeadLetter { occurrence: letter.occurrence, attempts: letter.attempts };
            recorder.record(What::Left(Left { token, task: letter.task_id.to_string(), state }));
        }
        match page.next_token {
            Some(next) => from = next,
            None => return Ok(()),
        }
    }
}

async fn tasks(admin: &Client) -> Result<Vec<TaskView>, ClientError> {
    let (mut all, mut token) = (Vec::new(), String::new());
    loop {
        let page = admin.list(TaskFilter { limit: PAGE, token, ..Default::default() }).await?;
        all.extend(page.tasks);
        match page.next_token {
            Some(next) => token = next,
            None => return Ok(all),
        }
    }
}
