//! The requests a client can make, as typed calls over [`Client::submit`].
//!
//! Each builds one message, waits for its answer and checks that it is of the right kind. Answers that are no failure
//! of the request, such as "too late to cancel", are values and not errors. Registrations are in `registration`, dead
//! letters in `dead_letters`, what a node shows in `views`.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::StreamExt;

use super::error::unexpected;
use super::registration::{Due, OwnSettings};
use super::{Client, ClientError, PastOccurrence, TaskHistory, TaskView, error, session};
use boomerang_task::{Callback, ClientId, ClientLimits, InstantMs, Retry, ShardId, TaskId};
use boomerang_wire::answers::Answer;
use boomerang_wire::convert;
use boomerang_wire::proto::{self, Detail, Status, TaskState, boomerang_envelope::Payload};

/// Of a batch, those that go on by themselves, at a time.
const ALONE_MAX: usize = 256;

/// What a cancellation came to. It is always definite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    /// It will not be delivered, and was not.
    Cancelled,
    /// This attempt may be out already.
    TooLate {
        /// The occurrence, counted from 0.
        occurrence: u64,
        /// The attempt, counted from 1.
        attempt: u32,
    },
    /// There is no such task: it never was, is done, or was cancelled before.
    NotFound,
}

/// A change of a task of which no attempt is out. What is `None` stays as it is.
#[derive(Debug, Clone, Default)]
pub struct TaskUpdate {
    /// Only if the task still has this version.
    pub expected_version: Option<u64>,
    /// Moves the next occurrence; those after it follow at the task's interval.
    pub due: Option<Due>,
    /// What comes back from now on.
    pub payload: Option<Bytes>,
    /// Its own settings from now on, each that is present.
    pub settings: OwnSettings,
}

/// What an update came to. It is always definite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Updated {
    /// The task is changed.
    Updated {
        /// What it has now; for [`TaskUpdate::expected_version`] of the next change.
        version: u64,
        /// When it is due next.
        due_ms: InstantMs,
    },
    /// This attempt may be out already; nothing was changed.
    TooLate {
        /// The occurrence, counted from 0.
        occurrence: u64,
        /// The attempt, counted from 1.
        attempt: u32,
    },
    /// Somebody else has changed it before; nothing was changed.
    Conflict {
        /// The version it has.
        version: u64,
    },
    /// There is no such task.
    NotFound,
}

/// A task that is paused now, or was before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Paused {
    /// Occurrence and attempt that may be out all the same.
    pub maybe_out: Option<(u64, u32)>,
}

/// A task that is not paused any more, or was not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resumed {
    /// When it is due next.
    pub due_ms: InstantMs,
}

/// Which tasks to list. The default is all of them.
#[derive(Debug, Clone, Default)]
pub struct TaskFilter {
    /// Only tasks of this client; others than one's own are for administrators.
    pub client_id: Option<ClientId>,
    /// Only tasks due after this instant.
    pub due_after_ms: Option<InstantMs>,
    /// Only tasks due before this instant.
    pub due_before_ms: Option<InstantMs>,
    /// Only recurring tasks, or only the others.
    pub recurring: Option<bool>,
    /// Only tasks in this state.
    pub state: Option<TaskState>,
    /// Only tasks whose name begins so; they come in the order of their names. Empty is all.
    pub name_prefix: String,
    /// Only tasks with a label that begins so, `key=` or `key=begin of value`; in the order of that label. Empty is
    /// all.
    pub label_prefix: String,
    /// How many tasks a page may hold; 0 leaves it to the node.
    pub limit: u32,
    /// [`Page::next_token`] of the page before; empty for the first.
    pub token: String,
}

/// Some tasks, and where the next page begins.
#[derive(Debug, Clone)]
pub struct Page {
    /// In the node's order.
    pub tasks: Vec<TaskView>,
    /// For [`TaskFilter::token`]; `None` when this is the last page.
    pub next_token: Option<String>,
}

/// A client to be registered by an administrator.
#[derive(Debug, Clone)]
pub struct ClientSettings {
    /// Its name.
    pub client_id: ClientId,
    /// Its password.
    pub password: String,
    /// Whether it may do what administrators may.
    pub is_admin: bool,
    /// Where its tasks go by default.
    pub callback: Option<Callback>,
    /// How often they are tried by default.
    pub retry: Option<Retry>,
    /// Where their dead letters go by default.
    pub dead_letter: Option<String>,
    /// What it may ask for, where that is less than what the node allows.
    pub limits: ClientLimits,
}

impl ClientSettings {
    /// A client that is no administrator and brings no settings for its tasks.
    pub fn new(client_id: ClientId, password: impl Into<String>) -> Self {
        Self {
            client_id,
            password: password.into(),
            is_admin: false,
            callback: None,
            retry: None,
            dead_letter: None,
            limits: ClientLimits::default(),
        }
    }
}

/// A new API key.
#[derive(Clone)]
pub struct ApiKey {
    /// By which it can be revoked.
    pub key_id: String,
    /// The secret itself. The node keeps only a hash of it.
    pub key: String,
}

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ApiKey({})", self.key_id)
    }
}

impl Client {
    /// One task; `None` when there is none of this name, for this client.
    pub async fn get(&self, task_id: TaskId) -> Result<Option<TaskView>, ClientError> {
        let request = proto::GetTaskRequest { task_id: task_id.to_string(), history: false };
        match self.request(Payload::GetTaskRequest(request)).await {
            Ok(Payload::GetTaskResponse(answer)) => match answer.task {
                Some(details) => TaskView::from_details(details).map(Some),
                None => Err(unexpected("a task without its details")),
            },
            Ok(_) => Err(unexpected("the wrong kind of answer to a get")),
            Err(error) if error.status() == Some(Status::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// One task, and what became of its occurrences. The task may have ended and still have a history; `None` when the
    /// node knows nothing of it, or it belongs to another client.
    pub async fn get_with_history(&self, task_id: TaskId) -> Result<Option<TaskHistory>, ClientError> {
        let request = proto::GetTaskRequest { task_id: task_id.to_string(), history: true };
        match self.request(Payload::GetTaskRequest(request)).await {
            Ok(Payload::GetTaskResponse(answer)) => Ok(Some(TaskHistory {
                task: answer.task.map(TaskView::from_details).transpose()?,
                past: answer.history.into_iter().map(PastOccurrence::from).collect(),
            })),
            Ok(_) => Err(unexpected("the wrong kind of answer to a get")),
            Err(error) if error.status() == Some(Status::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// One page of tasks.
    pub async fn list(&self, filter: TaskFilter) -> Result<Page, ClientError> {
        let request = proto::ListTasksRequest {
            client_id: filter.client_id.map(|client| client.to_string()).unwrap_or_default(),
            scheduled_after: filter.due_after_ms.unwrap_or(0),
            scheduled_before: filter.due_before_ms.unwrap_or(0),
            is_recurring: filter.recurring,
            limit: filter.limit,
            next_token: filter.token,
            state: filter.state.unwrap_or(TaskState::Unspecified).into(),
            name_prefix: filter.name_prefix,
            label_prefix: filter.label_prefix,
        };
        match self.request(Payload::ListTasksRequest(request)).await? {
            Payload::ListTasksResponse(answer) => Ok(Page {
                tasks: answer.tasks.into_iter().map(TaskView::from_details).collect::<Result<_, _>>()?,
                next_token: (!answer.next_token.is_empty()).then_some(answer.next_token),
            }),
            _ => Err(unexpected("the wrong kind of answer to a list")),
        }
    }

    /// Takes a task back, or says that it is too late for that.
    pub async fn cancel(&self, task_id: TaskId) -> Result<Cancelled, ClientError> {
        let request = proto::CancellationRequest { task_id: task_id.to_string() };
        let answer = self.submit(Payload::CancellationRequest(request)).await?.await?;
        if let Payload::CancellationResponse(answer) = &answer {
            return cancelled(answer);
        }
        session::check(&answer)?;
        Err(unexpected("the wrong kind of answer to a cancellation"))
    }

    /// Takes many tasks back, at most 10,000, with one message to each node that leads some of them. They are cancelled
    /// one by one, so each has a result of its own, in their order; an error for the whole says nothing of any of them.
    pub async fn cancel_batch(&self, task_ids: &[TaskId]) -> Result<Vec<Result<Cancelled, ClientError>>, ClientError> {
        let all: Vec<usize> = (0..task_ids.len()).collect();
        if !self.hub.is_cluster() {
            return self.cancel_part(task_ids, &all).await;
        }
        let parts = self.hub.split_ids(task_ids).await?;
        let asked = parts.iter().map(async |places| match self.cancel_part(task_ids, places).await {
            Ok(results) => results,
            // Others may be done already.
            Err(error) => vec![Err(error); places.len()],
        });
        let mut results = vec![Err(ClientError::Closed); task_ids.len()];
        for (places, part) in parts.iter().zip(futures::future::join_all(asked).await) {
            for (place, result) in places.iter().zip(part) {
                results[*place] = result;
            }
        }
        Ok(results)
    }

    /// Those at these places, which are for one node as far as is known. What it does not lead goes on by itself.
    async fn cancel_part(
        &self,
        task_ids: &[TaskId],
        places: &[usize],
    ) -> Result<Vec<Result<Cancelled, ClientError>>, ClientError> {
        let request =
            proto::CancellationBatch { task_ids: places.iter().map(|place| task_ids[*place].to_string()).collect() };
        let answer = self.submit(Payload::CancellationBatch(request)).await?.await?;
        session::check(&answer)?;
        let Payload::CancellationBatchResponse(answer) = answer else {
            return Err(unexpected("the wrong kind of answer to a batch of cancellations"));
        };
        if answer.responses.len() != places.len() {
            return Err(unexpected(&format!("{} results for {} cancellations", answer.responses.len(), places.len())));
        }
        let mut texts: BTreeMap<i32, String> = BTreeMap::new();
        let answers = answer.responses.into_iter().zip(places).map(|(mut answer, place)| {
            // Of several with the same status, the first has the text.
            let text = texts.entry(answer.status).or_insert_with(|| answer.error_message.clone());
            answer.error_message.clone_from(text);
            (answer, task_ids[*place])
        });
        let answers: Vec<_> = answers.collect();
        let settled = answers.into_iter().map(async |(answer, task_id)| {
            match &answer.detail {
                Some(detail) if answer.status == Status::NotLeader as i32 => self.hub.learn(detail),
                _ => return cancelled(&answer),
            };
            self.cancel(task_id).await
        });
        Ok(futures::stream::iter(settled).buffered(ALONE_MAX).collect().await)
    }

    /// Changes a task, if no attempt of it is out and nobody has changed it since the version that is expected.
    pub async fn update(&self, task_id: TaskId, update: TaskUpdate) -> Result<Updated, ClientError> {
        let (due_ms, delay_ms) = match update.due {
            Some(Due::At(due_ms)) => (Some(due_ms), None),
            Some(Due::In(delay_ms)) => (None, Some(delay_ms)),
            None => (None, None),
        };
        let request = proto::UpdateTaskRequest {
            task_id: task_id.to_string(),
            expected_version: update.expected_version.unwrap_or(0),
            due_ms,
            delay_ms,
            payload: update.payload,
            callback: update.settings.callback(),
            retry: update.settings.retry(),
            dlq: update.settings.dlq(),
        };
        let answer = self.submit(Payload::UpdateTaskRequest(request)).await?.await?;
        if let Payload::UpdateTaskResponse(answer) = &answer {
            let Detail { occurrence, attempt, version, .. } = answer.detail.clone().unwrap_or_default();
            match Status::try_from(answer.status) {
                Ok(Status::TooLate) => return Ok(Updated::TooLate { occurrence, attempt }),
                Ok(Status::Conflict) => return Ok(Updated::Conflict { version }),
                Ok(Status::NotFound) => return Ok(Updated::NotFound),
                _ => {}
            }
        }
        session::check(&answer)?;
        match answer {
            Payload::UpdateTaskResponse(answer) => {
                Ok(Updated::Updated { version: answer.version, due_ms: answer.scheduled_time_ms })
            }
            _ => Err(unexpected("the wrong kind of answer to an update")),
        }
    }

    /// Keeps a task from being delivered until it is resumed; due instants that pass meanwhile are left out. `None`
    /// when there is no such task.
    pub async fn pause(&self, task_id: TaskId) -> Result<Option<Paused>, ClientError> {
        let answer = self.set_paused(task_id, true).await?;
        Ok(answer.map(|answer| {
            let detail = answer.detail.unwrap_or_default();
            Paused { maybe_out: (detail.attempt > 0).then_some((detail.occurrence, detail.attempt)) }
        }))
    }

    /// Lets a paused task be delivered again. `None` when there is no such task.
    pub async fn resume(&self, task_id: TaskId) -> Result<Option<Resumed>, ClientError> {
        let answer = self.set_paused(task_id, false).await?;
        Ok(answer.map(|answer| Resumed { due_ms: answer.scheduled_time_ms }))
    }

    async fn set_paused(&self, task_id: TaskId, paused: bool) -> Result<Option<proto::PauseTaskResponse>, ClientError> {
        let request = proto::PauseTaskRequest { task_id: task_id.to_string(), paused };
        match self.request(Payload::PauseTaskRequest(request)).await {
            Ok(Payload::PauseTaskResponse(answer)) => Ok(Some(answer)),
            Ok(_) => Err(unexpected("the wrong kind of answer to a pause")),
            Err(error) if error.status() == Some(Status::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Registers a client, with the settings its tasks have unless a session says otherwise.
    pub async fn register_client(&self, settings: ClientSettings) -> Result<(), ClientError> {
        let request = proto::ClientRegistrationRequest {
            client_id: settings.client_id.to_string(),
            password: settings.password,
            is_admin: settings.is_admin,
            callback: settings.callback.as_ref().map(convert::callback_to),
            retry: settings.retry.as_ref().map(convert::retry_to),
            dlq: settings.dead_letter.as_deref().map(convert::dead_letter_to),
            limits: (settings.limits != ClientLimits::default()).then(|| proto::ClientLimits {
                delay_max_ms: settings.limits.delay_max_ms.unwrap_or(0),
                payload_bytes_max: settings.limits.payload_bytes_max.unwrap_or(0),
                interval_min_ms: settings.limits.interval_min_ms.unwrap_or(0),
            }),
        };
        match self.request(Payload::ClientRegistration(request)).await? {
            Payload::ClientRegistrationResponse(_) => Ok(()),
            _ => Err(unexpected("the wrong kind of answer to a client's registration")),
        }
    }

    /// Removes a client. Tasks it has registered keep their policy and are delivered.
    pub async fn deregister_client(&self, client_id: &ClientId) -> Result<(), ClientError> {
        let request = proto::ClientDeregistrationRequest { client_id: client_id.to_string() };
        match self.request(Payload::ClientDeregistration(request)).await? {
            Payload::ClientDeregistrationResponse(_) => Ok(()),
            _ => Err(unexpected("the wrong kind of answer to a client's removal")),
        }
    }

    /// Makes an API key for a client. The secret is in the answer and nowhere else.
    pub async fn create_api_key(&self, client_id: &ClientId, label: &str) -> Result<ApiKey, ClientError> {
        let request = proto::ApiKeyRequest { client_id: client_id.to_string(), label: label.to_owned() };
        match self.request(Payload::ApiKeyRequest(request)).await? {
            Payload::ApiKeyResponse(answer) => Ok(ApiKey { key_id: answer.key_id, key: answer.key }),
            _ => Err(unexpected("the wrong kind of answer to a request for a key")),
        }
    }

    /// The shards that the node at this address (`host:port`, as the cluster names it) leads now.
    pub async fn shards_led_at(&self, address: &str) -> Result<Vec<ShardId>, ClientError> {
        Ok(self.hub.fresh_map().await?.led_at(address))
    }

    /// Makes an API key worthless.
    pub async fn revoke_api_key(&self, key_id: &str) -> Result<(), ClientError> {
        let request = proto::ApiKeyRevocation { key_id: key_id.to_owned() };
        match self.request(Payload::ApiKeyRevocation(request)).await? {
            Payload::ApiKeyRevocationResponse(_) => Ok(()),
            _ => Err(unexpected("the wrong kind of answer to a revocation")),
        }
    }
}

fn cancelled(answer: &proto::CancellationResponse) -> Result<Cancelled, ClientError> {
    match Status::try_from(answer.status) {
        Ok(Status::TooLate) => {
            let detail = answer.detail.clone().unwrap_or_default();
            Ok(Cancelled::TooLate { occurrence: detail.occurrence, attempt: detail.attempt })
        }
        Ok(Status::NotFound) => Ok(Cancelled::NotFound),
        _ => error::check(answer.verdict()).map(|()| Cancelled::Cancelled),
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::{self, exchange};
    use super::*;

    fn cancellation(status: Status) -> Payload {
        Payload::CancellationResponse(proto::CancellationResponse {
            status: status.into(),
            detail: Some(proto::Detail { occurrence: 4, attempt: 2, ..Default::default() }),
            ..Default::default()
        })
    }

    #[tokio::test]
    async fn a_cancellation_is_definite() {
        for (status, result) in [
            (Status::Ok, Cancelled::Cancelled),
            (Status::TooLate, Cancelled::TooLate { occurrence: 4, attempt: 2 }),
            (Status::NotFound, Cancelled::NotFound),
        ] {
            let cancel = async |client: Client| client.cancel(fake::task_id(1)).await;
            assert_eq!(exchange(cancellation(status), cancel).await.1.unwrap(), result);
        }
        let cancel = async |client: Client| client.cancel(fake::task_id(1)).await;
        let (_, result) = exchange(cancellation(Status::Error), cancel).await;
        assert_eq!(result.unwrap_err().status(), Some(Status::Error));
        let cancel = async |client: Client| client.cancel(fake::task_id(1)).await;
        let (_, result) = exchange(fake::registered(1), cancel).await;
        assert!(matches!(result, Err(ClientError::Protocol(_))));
    }

    #[tokio::test]
    async fn each_cancellation_of_a_batch_has_its_result() {
        let one = |status: Status, text: &str| proto::CancellationResponse {
            status: status.into(),
            error_message: text.into(),
            detail: Some(proto::Detail { occurrence: 1, attempt: 2, ..Default::default() }),
        };
        let responses = vec![
            one(Status::Ok, ""),
            one(Status::NotFound, "not known"),
            one(Status::TooLate, "too late"),
            one(Status::Overloaded, "no room"),
            one(Status::Overloaded, ""),
        ];
        let ids: Vec<TaskId> = (0..5).map(fake::task_id).collect();
        let answer = proto::CancellationBatchResponse { responses, ..Default::default() };
        let cancel = async |client: Client| client.cancel_batch(&ids).await;
        let (request, results) = exchange(Payload::CancellationBatchResponse(answer.clone()), cancel).await;
        let Payload::CancellationBatch(request) = request else { panic!("{request:?}") };
        assert_eq!(request.task_ids, ids.iter().map(TaskId::to_string).collect::<Vec<_>>());
        let results = results.unwrap();
        let good: Vec<_> = results.iter().take(3).map(|result| result.clone().unwrap()).collect();
        let too_late = Cancelled::TooLate { occurrence: 1, attempt: 2 };
        assert_eq!(good, [Cancelled::Cancelled, Cancelled::NotFound, too_late]);
        for result in &results[3..] {
            assert_eq!(
                result.as_ref().unwrap_err().to_string(),
                "OVERLOADED: no room",
                "each has the text of the first"
            );
        }
        let cancel = async |client: Client| client.cancel_batch(&ids[..2]).await;
        let error = exchange(Payload::CancellationBatchResponse(answer), cancel).await.1.unwrap_err();
        assert!(error.to_string().contains("5 results for 2 cancellations"), "{error}");
    }

    fn updated(status: Status) -> Payload {
        Payload::UpdateTaskResponse(proto::UpdateTaskResponse {
            status: status.into(),
            version: 6,
            scheduled_time_ms: 77,
            detail: Some(proto::Detail { occurrence: 4, attempt: 2, version: 5, ..Default::default() }),
            ..Default::default()
        })
    }

    #[tokio::test]
    async fn an_update_is_definite() {
        for (status, result) in [
            (Status::Ok, Updated::Updated { version: 6, due_ms: 77 }),
            (Status::TooLate, Updated::TooLate { occurrence: 4, attempt: 2 }),
            (Status::Conflict, Updated::Conflict { version: 5 }),
            (Status::NotFound, Updated::NotFound),
        ] {
            let update = async |client: Client| client.update(fake::task_id(1), TaskUpdate::default()).await;
            assert_eq!(exchange(updated(status), update).await.1.unwrap(), result);
        }
        let update = async |client: Client| client.update(fake::task_id(1), TaskUpdate::default()).await;
        assert_eq!(exchange(updated(Status::Error), update).await.1.unwrap_err().status(), Some(Status::Error));
    }

    #[tokio::test]
    async fn an_update_names_only_what_changes() {
        let change = TaskUpdate {
            expected_version: Some(3),
            due: Some(Due::In(0)),
            payload: Some(Bytes::new()),
            settings: OwnSettings { dead_letters: Some(String::new()), ..Default::default() },
        };
        let update = async |client: Client| client.update(fake::task_id(1), change).await;
        let Payload::UpdateTaskRequest(request) = exchange(updated(Status::Ok), update).await.0 else { panic!() };
        assert_eq!((request.expected_version, request.due_ms, request.delay_ms), (3, None, Some(0)));
        assert_eq!((request.payload, request.callback, request.retry), (Some(Bytes::new()), None, None));
        assert_eq!(request.dlq.unwrap().destination, "", "to keep no copies from now on");
    }

    #[tokio::test]
    async fn pause_says_what_may_be_out_and_resume_when_it_is_due() {
        let paused = |attempt| {
            Payload::PauseTaskResponse(proto::PauseTaskResponse {
                scheduled_time_ms: 5,
                detail: Some(proto::Detail { occurrence: 2, attempt, ..Default::default() }),
                ..Default::default()
            })
        };
        for (attempt, maybe_out) in [(0, None), (3, Some((2, 3)))] {
            let pause = async |client: Client| client.pause(fake::task_id(1)).await;
            let (request, result) = exchange(paused(attempt), pause).await;
            assert_eq!(result.unwrap(), Some(Paused { maybe_out }));
            assert!(matches!(request, Payload::PauseTaskRequest(request) if request.paused));
        }
        let resume = async |client: Client| client.resume(fake::task_id(1)).await;
        let (request, result) = exchange(paused(0), resume).await;
        assert_eq!(result.unwrap(), Some(Resumed { due_ms: 5 }));
        assert!(matches!(request, Payload::PauseTaskRequest(request) if !request.paused));
        let resume = async |client: Client| client.resume(fake::task_id(1)).await;
        let missing = fake::refused(Status::NotFound, "no such task");
        assert_eq!(exchange(missing, resume).await.1.unwrap(), None);
    }

    #[tokio::test]
    async fn a_task_that_has_ended_is_known_by_its_history() {
        let past = proto::Occurrence {
            occurrence: 3,
            outcome: proto::occurrence::Outcome::Dead.into(),
            attempts: 5,
            failure: Some(proto::Failure { class: 99, text: "new".into(), at_ms: 8 }),
            ..Default::default()
        };
        let answer = proto::GetTaskResponse { history: vec![past], ..Default::default() };
        let get = async |client: Client| client.get_with_history(fake::task_id(1)).await;
        let (request, result) = exchange(Payload::GetTaskResponse(answer), get).await;
        let TaskHistory { task, past } = result.unwrap().unwrap();
        assert_eq!((task, past.len(), past[0].count, past[0].dispatched_ms), (None, 1, 1, None));
        assert_eq!(past[0].failure.as_ref().unwrap().class, None, "a class this client does not know");
        assert!(matches!(request, Payload::GetTaskRequest(request) if request.history));
        let get = async |client: Client| client.get_with_history(fake::task_id(1)).await;
        assert_eq!(exchange(fake::refused(Status::NotFound, ""), get).await.1.unwrap(), None);
    }

    #[tokio::test]
    async fn limits_travel_with_a_new_client() {
        let limits = ClientLimits { delay_max_ms: Some(5), ..ClientLimits::default() };
        for limits in [limits, ClientLimits::default()] {
            let settings = ClientSettings { limits, ..ClientSettings::new("orders".parse().unwrap(), "pw") };
            let register = async |client: Client| client.register_client(settings).await;
            let answer = Payload::ClientRegistrationResponse(Default::default());
            let Payload::ClientRegistration(request) = exchange(answer, register).await.0 else { panic!() };
            let sent = request.limits.map(|limits| (limits.delay_max_ms, limits.payload_bytes_max));
            assert_eq!(sent, limits.delay_max_ms.map(|delay_max_ms| (delay_max_ms, 0)));
        }
    }

    #[tokio::test]
    async fn a_page_says_where_the_next_begins() {
        let answer = proto::ListTasksResponse {
            tasks: vec![fake::details(1, b"one"), fake::details(2, b"two")],
            next_token: "more".into(),
            ..Default::default()
        };
        let filter = TaskFilter { recurring: Some(false), limit: 2, due_after_ms: Some(9), ..Default::default() };
        let filter = TaskFilter { state: Some(TaskState::Paused), label_prefix: "a=b".into(), ..filter };
        let list = async |client: Client| client.list(filter).await;
        let (request, page) = exchange(Payload::ListTasksResponse(answer), list).await;
        let page = page.unwrap();
        assert_eq!(page.tasks.len(), 2);
        assert_eq!(page.tasks[1].payload, "two");
        assert_eq!(page.next_token.as_deref(), Some("more"));
        let Payload::ListTasksRequest(request) = request else { panic!("{request:?}") };
        assert_eq!((request.scheduled_after, request.is_recurring, request.limit), (9, Some(false), 2));
        assert_eq!((request.state(), request.label_prefix.as_str()), (TaskState::Paused, "a=b"));
    }

    #[tokio::test]
    async fn a_missing_task_is_no_error() {
        let answer = proto::GetTaskResponse { status: Status::NotFound.into(), ..Default::default() };
        let get = async |client: Client| client.get(fake::task_id(1)).await;
        assert_eq!(exchange(Payload::GetTaskResponse(answer), get).await.1.unwrap(), None);
    }

    #[tokio::test]
    async fn a_new_key_is_handed_out_and_not_shown() {
        let answer = proto::ApiKeyResponse { key_id: "k1".into(), key: "k1.secret".into(), ..Default::default() };
        let create = async |client: Client| client.create_api_key(&"orders".parse().unwrap(), "ci").await;
        let (_, key) = exchange(Payload::ApiKeyResponse(answer), create).await;
        let key = key.unwrap();
        assert_eq!((key.key_id.as_str(), key.key.as_str()), ("k1", "k1.secret"));
        assert!(!format!("{key:?}").contains("secret"));
    }
}
