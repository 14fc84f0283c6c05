//! One process of the history: says what it asks, asks, and says what came of it.
//!
//! What the client reports as certainly not done is a failure; what may have been done is unknown, whatever the reason.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use boomerang_client::{
    Cancelled, Client, ClientError, Dedup, Due as ClientDue, Registered, Registration as Request, TaskFilter,
    TaskUpdate, Updated,
};
use boomerang_task::{ClientId, TaskId};

use crate::history::{Answer, Call, Due, End, Process, Recorder, Registration, What};
use crate::payload::Payload;

/// Pages of a list are this long.
const PAGE: u32 = 500;

pub struct Asker {
    process: AtomicU32,
    /// Of all processes: one of which nobody knows whether it still does something is not used again, as Jepsen has it.
    processes: Arc<AtomicU32>,
    client: Client,
    client_id: ClientId,
    recorder: Recorder,
}

impl Asker {
    pub fn new(processes: Arc<AtomicU32>, client: Client, client_id: ClientId, recorder: Recorder) -> Self {
        let process = AtomicU32::new(processes.fetch_add(1, Ordering::Relaxed));
        Self { process, processes, client, client_id, recorder }
    }

    pub fn client_id(&self) -> String {
        self.client_id.to_string()
    }

    /// `request`: what goes to the node besides what `registration` says.
    pub async fn register(&self, registration: Registration, request: Request) -> Option<Registered> {
        let due = match registration.due {
            Due::In(delay_ms) => ClientDue::In(delay_ms),
            Due::At(due_ms) => ClientDue::At(due_ms),
        };
        let dedup = registration.key.clone().map(|key| Dedup { key, ttl_ms: None });
        let request = Request { due, dedup, ..request };
        self.asked(Call::Register(registration), self.client.register(request), |registered| {
            let Registered { task_id, due_ms, duplicate } = *registered;
            Answer::Registered { task: task_id.to_string(), due_ms, duplicate }
        })
        .await
    }

    pub async fn cancel(&self, payload: Payload, task: TaskId) -> Option<Cancelled> {
        let call = Call::Cancel { token: payload.token, task: task.to_string() };
        self.asked(call, self.client.cancel(task), |cancelled| match *cancelled {
            Cancelled::Cancelled => Answer::Cancelled,
            Cancelled::TooLate { occurrence, attempt } => Answer::CancelledTooLate { occurrence, attempt },
            Cancelled::NotFound => Answer::NotFound,
        })
        .await
    }

    /// `payload`: as it is to be from now on.
    pub async fn edit(&self, payload: Payload, task: TaskId, due_ms: u64) -> Option<Updated> {
        let call = Call::Edit { token: payload.token, task: task.to_string(), due_ms, version: payload.version };
        let due = Some(ClientDue::At(due_ms));
        let update = TaskUpdate { due, payload: Some(payload.bytes()), ..Default::default() };
        self.asked(call, self.client.update(task, update), |updated| match *updated {
            Updated::Updated { due_ms, .. } => Answer::Edited { due_ms },
            Updated::TooLate { occurrence, attempt } => Answer::EditTooLate { occurrence, attempt },
            Updated::Conflict { .. } => unreachable!("no version was asked for"),
            Updated::NotFound => Answer::NotFound,
        })
        .await
    }

    pub async fn get(&self, payload: Payload, task: TaskId) {
        let call = Call::Get { token: payload.token, task: task.to_string() };
        self.asked(call, self.client.get(task), |found| match found {
            None => Answer::NotFound,
            Some(view) => Answer::Found {
                due_ms: view.due_ms,
                occurrence: view.occurrence,
                attempt: view.attempt,
                version: Payload::read(&view.payload).map_or(0, |payload| payload.version),
            },
        })
        .await;
    }

    /// All of this client's tasks.
    pub async fn list(&self) {
        let pages = async {
            let (mut tasks, mut token) = (Vec::new(), String::new());
            loop {
                let filter = TaskFilter { limit: PAGE, token, ..Default::default() };
                let page = self.client.list(filter).await?;
                tasks.extend(page.tasks.into_iter().map(|view| view.task_id.to_string()));
                match page.next_token {
                    Some(next) => token = next,
                    None => return Ok(tasks),
                }
            }
        };
        let call = Call::List { client: self.client_id.to_string() };
        self.asked(call, pages, |tasks| Answer::Listed { tasks: tasks.clone() }).await;
    }

    async fn asked<T>(
        &self,
        call: Call,
        asking: impl Future<Output = Result<T, ClientError>>,
        answer: impl FnOnce(&T) -> Answer,
    ) -> Option<T> {
        let process: Process = self.process.load(Ordering::Relaxed);
        self.recorder.record(What::Call(process, call));
        let result = asking.await;
        let end = match &result {
            Ok(found) => End::Ok(answer(found)),
            Err(error) if error.is_unknown() => End::Unknown(error.to_string()),
            Err(error) => End::Fail(error.to_string()),
        };
        if matches!(end, End::Unknown(_)) {
            self.process.store(self.processes.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        }
        self.recorder.record(What::End(process, end));
        result.ok()
    }
}
