//! The requests a client can make, as typed calls over [`Client::submit`].
//!
//! Each builds one message, waits for its answer and checks that it is of the right kind. Answers that are no failure
//! of the request, such as "too late to cancel", are values and not errors.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;

use super::{Client, ClientError, InFlight, session};
use crate::task::{Callback, ClientId, InstantMs, Retry, TaskId};
use crate::wire::convert;
use crate::wire::proto::{self, Status, boomerang_envelope::Payload};

/// When a task is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// So many milliseconds after the node took the request.
    In(u64),
    /// At this instant; one in the past is due at once.
    At(InstantMs),
}

/// A task to be stored.
#[derive(Debug, Clone)]
pub struct Registration {
    /// Comes back as it is.
    pub payload: Bytes,
    /// When it comes back, the first time.
    pub due: Due,
    /// Then again after every interval; `None` is once.
    pub repeat_interval_ms: Option<u64>,
}

/// What the node answers when a majority has the task on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Registered {
    /// The name of the task, made by the node.
    pub task_id: TaskId,
    /// When it is due.
    pub due_ms: InstantMs,
}

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

/// A task as it is stored now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskView {
    /// Its name.
    pub task_id: TaskId,
    /// Whose it is.
    pub client_id: String,
    /// When it is due next.
    pub due_ms: InstantMs,
    /// When it was due first.
    pub first_due_ms: InstantMs,
    /// `None` for a task that comes back once.
    pub repeat_interval_ms: Option<u64>,
    /// The occurrence that is due next, counted from 0.
    pub occurrence: u64,
    /// The attempt that comes next or is out now, counted from 1.
    pub attempt: u32,
    /// Where it goes.
    pub callback: Option<Callback>,
    /// What comes back.
    pub payload: Bytes,
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
    /// Stores a task, and waits until a majority has it on disk.
    pub async fn register(&self, registration: Registration) -> Result<Registered, ClientError> {
        self.register_nowait(registration).await?.await
    }

    /// Sends a registration; the answer is awaited apart from it, so that one task can keep thousands under way.
    pub async fn register_nowait(&self, registration: Registration) -> Result<PendingRegistration, ClientError> {
        let (delay_ms, due_ms) = match registration.due {
            Due::In(delay_ms) => (delay_ms, 0),
            // 0 would mean "use delay_ms"; to be due in 1970 is to be due at once.
            Due::At(due_ms) => (0, due_ms.max(1)),
        };
        let task = proto::Task {
            payload: registration.payload,
            delay_ms,
            repeat_interval_ms: registration.repeat_interval_ms.unwrap_or(0),
            due_ms,
            ..Default::default()
        };
        Ok(PendingRegistration(self.submit(Payload::RegistrationRequest(task)).await?))
    }

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

    /// One page of tasks.
    pub async fn list(&self, filter: TaskFilter) -> Result<Page, ClientError> {
        let request = proto::ListTasksRequest {
            client_id: filter.client_id.map(|client| client.to_string()).unwrap_or_default(),
            scheduled_after: filter.due_after_ms.unwrap_or(0),
            scheduled_before: filter.due_before_ms.unwrap_or(0),
            is_recurring: filter.recurring,
            limit: filter.limit,
            next_token: filter.token,
            ..Default::default()
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
            match Status::try_from(answer.status) {
                Ok(Status::TooLate) => {
                    let detail = answer.detail.clone().unwrap_or_default();
                    return Ok(Cancelled::TooLate { occurrence: detail.occurrence, attempt: detail.attempt });
                }
                Ok(Status::NotFound) => return Ok(Cancelled::NotFound),
                _ => {}
            }
        }
        session::check(&answer)?;
        match answer {
            Payload::CancellationResponse(_) => Ok(Cancelled::Cancelled),
            _ => Err(unexpected("the wrong kind of answer to a cancellation")),
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
            ..Default::default()
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

    /// Makes an API key worthless.
    pub async fn revoke_api_key(&self, key_id: &str) -> Result<(), ClientError> {
        let request = proto::ApiKeyRevocation { key_id: key_id.to_owned() };
        match self.request(Payload::ApiKeyRevocation(request)).await? {
            Payload::ApiKeyRevocationResponse(_) => Ok(()),
            _ => Err(unexpected("the wrong kind of answer to a revocation")),
        }
    }
}

/// The answer to a registration that was sent. Dropping it does not take the registration back.
#[must_use = "only the answer says that the task is stored"]
pub struct PendingRegistration(InFlight);

impl Future for PendingRegistration {
    type Output = Result<Registered, ClientError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = ready!(Pin::new(&mut self.0).poll(context))?;
        session::check(&answer)?;
        Poll::Ready(match answer {
            Payload::RegistrationResponse(answer) => match answer.task_id.parse() {
                Ok(task_id) => Ok(Registered { task_id, due_ms: answer.scheduled_time_ms }),
                Err(error) => Err(unexpected(&error.to_string())),
            },
            _ => Err(unexpected("the wrong kind of answer to a registration")),
        })
    }
}

impl TaskView {
    fn from_details(details: proto::TaskDetails) -> Result<Self, ClientError> {
        let callback = details.callback.as_ref().map(convert::callback_from).transpose();
        Ok(Self {
            task_id: details.task_id.parse().map_err(|error: crate::task::Invalid| unexpected(&error.to_string()))?,
            client_id: details.client_id,
            due_ms: details.expiration_ms,
            first_due_ms: details.first_due_ms,
            repeat_interval_ms: (details.repeat_interval_ms > 0).then_some(details.repeat_interval_ms),
            occurrence: details.occurrence,
            attempt: details.attempt,
            callback: callback.map_err(|error| unexpected(&error.to_string()))?,
            payload: details.payload,
        })
    }
}

fn unexpected(what: &str) -> ClientError {
    ClientError::Protocol(what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::fake::{self, Fake};
    use super::*;

    /// Runs `call` against a node that answers its one request with `answer`, and returns that request.
    async fn exchange<T>(answer: Payload, call: impl AsyncFnOnce(Client) -> T) -> (Payload, T) {
        let fake = Fake::start().await;
        let (client, mut peer) = fake.connect(fake.options()).await;
        let (request, result) = tokio::join!(
            async {
                let request = peer.next().await.unwrap();
                peer.send(request.request_id, answer).await;
                request.payload.unwrap()
            },
            call(client)
        );
        (request, result)
    }

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
    async fn due_instants_are_absolute_or_relative() {
        for (due, sent) in [(Due::In(5), (5, 0)), (Due::At(77), (0, 77)), (Due::At(0), (0, 1))] {
            let registration = Registration { payload: Bytes::new(), due, repeat_interval_ms: None };
            let register = async |client: Client| client.register(registration).await;
            let (request, result) = exchange(fake::registered(42), register).await;
            let Payload::RegistrationRequest(task) = request else { panic!("{request:?}") };
            assert_eq!((task.delay_ms, task.due_ms), sent);
            assert_eq!(result.unwrap(), Registered { task_id: fake::task_id(42), due_ms: 42 });
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
        let list = async |client: Client| client.list(filter).await;
        let (request, page) = exchange(Payload::ListTasksResponse(answer), list).await;
        let page = page.unwrap();
        assert_eq!(page.tasks.len(), 2);
        assert_eq!(page.tasks[1].payload, "two");
        assert_eq!(page.next_token.as_deref(), Some("more"));
        let Payload::ListTasksRequest(request) = request else { panic!("{request:?}") };
        assert_eq!((request.scheduled_after, request.is_recurring, request.limit), (9, Some(false), 2));
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
