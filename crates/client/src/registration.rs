//! Registrations: what a task can be given, one at a time or many in one message.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::task::JoinSet;

use super::error::unexpected;
use super::hub::PartOfBatch;
use super::{Client, ClientError, InFlight, error, session};
use boomerang_task::{Callback, InstantMs, Recurrence, Retry, Tags, TaskId};
use boomerang_wire::answers::Answer;
use boomerang_wire::convert;
use boomerang_wire::proto::{self, boomerang_envelope::Payload};

/// When a task is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// So many milliseconds after the node took the request.
    In(u64),
    /// At this instant; one in the past is due at once.
    At(InstantMs),
}

impl Default for Due {
    fn default() -> Self {
        Due::In(0)
    }
}

/// A task to be stored. By default it has an empty payload and is due at once.
#[derive(Debug, Clone, Default)]
pub struct Registration {
    /// Comes back as it is.
    pub payload: Bytes,
    /// When it comes back, the first time.
    pub due: Due,
    /// How it goes on; `None` is once.
    pub recurrence: Option<Recurrence>,
    /// Makes it safe to send it twice.
    pub dedup: Option<Dedup>,
    /// Name and labels, to find it again.
    pub tags: Tags,
    /// Its own settings.
    pub settings: OwnSettings,
}

/// The same client and key give the same answer, and one task, while the key is remembered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dedup {
    /// Any text of the client's choice.
    pub key: String,
    /// How long the key is remembered; `None` leaves it to the node.
    pub ttl_ms: Option<u64>,
}

/// Settings of one task. Each takes the place of the session's, and the session's of the client's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OwnSettings {
    /// Where it goes.
    pub callback: Option<Callback>,
    /// How often it is tried.
    pub retry: Option<Retry>,
    /// Where a copy goes when every attempt has failed.
    pub dead_letters: Option<String>,
}

impl OwnSettings {
    pub(super) fn callback(&self) -> Option<proto::CallbackConfig> {
        self.callback.as_ref().map(convert::callback_to)
    }

    pub(super) fn retry(&self) -> Option<proto::RetryPolicy> {
        self.retry.as_ref().map(convert::retry_to)
    }

    pub(super) fn dlq(&self) -> Option<proto::DlqPolicy> {
        self.dead_letters.as_deref().map(convert::dead_letter_to)
    }
}

/// What the node answers when a majority has the task on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Registered {
    /// The name of the task, made by the node.
    pub task_id: TaskId,
    /// When it is due.
    pub due_ms: InstantMs,
    /// The deduplication key was known: this is the answer to the first registration with it.
    pub duplicate: bool,
}

impl Registration {
    /// Size of this task in a message, in bytes: what a batch must have room for.
    pub fn message_bytes(&self) -> usize {
        prost::Message::encoded_len(&self.clone().into_task())
    }

    /// The message.
    pub(crate) fn into_task(self) -> proto::Task {
        let (delay_ms, due_ms) = match self.due {
            Due::In(delay_ms) => (delay_ms, 0),
            // 0 would mean "use delay_ms"; to be due in 1970 is to be due at once.
            Due::At(due_ms) => (0, due_ms.max(1)),
        };
        let (dedup_key, dedup_ttl_ms) =
            self.dedup.map_or((String::new(), 0), |dedup| (dedup.key, dedup.ttl_ms.unwrap_or(0)));
        proto::Task {
            payload: self.payload,
            delay_ms,
            repeat_interval_ms: self.recurrence.map_or(0, |recurrence| recurrence.interval_ms),
            due_ms,
            dedup_key,
            dedup_ttl_ms,
            name: self.tags.name().unwrap_or_default().to_owned(),
            labels: self.tags.labels().iter().cloned().collect(),
            callback: self.settings.callback(),
            retry: self.settings.retry(),
            dlq: self.settings.dlq(),
            recurrence: self.recurrence.as_ref().map(convert::recurrence_to),
            origin: None,
        }
    }
}

impl Client {
    /// Stores a task, and waits until a majority has it on disk.
    pub async fn register(&self, registration: Registration) -> Result<Registered, ClientError> {
        self.register_nowait(registration).await?.await
    }

    /// Sends a registration; the answer is awaited apart from it, so that one task can keep thousands under way.
    pub async fn register_nowait(&self, registration: Registration) -> Result<PendingRegistration, ClientError> {
        let request = Payload::RegistrationRequest(registration.into_task());
        Ok(PendingRegistration(self.submit(request).await?))
    }

    /// Stores many tasks with one message. They are stored one by one, so each has a result of its own, in their order;
    /// an error for the whole says nothing of any of them.
    pub async fn register_batch(&self, batch: Vec<Registration>) -> Result<BatchResult, ClientError> {
        self.register_batch_nowait(batch).await?.await
    }

    /// Sends many registrations in one message; the answer is awaited apart from it.
    pub async fn register_batch_nowait(&self, batch: Vec<Registration>) -> Result<PendingBatch, ClientError> {
        let tasks: Vec<proto::Task> = batch.into_iter().map(Registration::into_task).collect();
        let count = tasks.len();
        if self.hub.is_cluster() && count > 0 {
            return self.spread_batch(tasks).await;
        }
        let request = Payload::RegistrationBatch(proto::RegistrationBatch { tasks, origin: None });
        Ok(PendingBatch(Pending::Whole { answer: self.submit(request).await?, count }))
    }

    /// To each node what it leads. A part that cannot be sent fails by itself: others may be stored already.
    async fn spread_batch(&self, tasks: Vec<proto::Task>) -> Result<PendingBatch, ClientError> {
        let count = tasks.len();
        let mut parts = JoinSet::new();
        for PartOfBatch { places, tasks, numbers } in self.hub.split(tasks).await? {
            let payload = Payload::RegistrationBatch(proto::RegistrationBatch::default());
            let permit = self.permit(&payload).await?;
            let (size, keyed_here) = (places.len(), numbers.is_some());
            let begun = self.hub.clone().begin_part(tasks, numbers).await;
            parts.spawn(async move {
                let answers = match begun {
                    Ok(following) => following.await,
                    Err(error) => vec![Err(error); size],
                };
                drop(permit);
                (places, answers, keyed_here)
            });
        }
        let gathered = async move {
            let mut results: Vec<Option<Result<Registered, ClientError>>> = vec![None; count];
            while let Some(Ok((places, answers, keyed_here))) = parts.join_next().await {
                for (place, answer) in places.into_iter().zip(answers) {
                    let result = answer.and_then(|answer| {
                        error::check(answer.verdict())?;
                        registered(&answer)
                    });
                    // What was sent again here says nothing to the caller.
                    let duplicate =
                        |found: Registered| Registered { duplicate: found.duplicate && !keyed_here, ..found };
                    results[place] = Some(result.map(duplicate));
                }
            }
            results.into_iter().map(|result| result.unwrap_or(Err(ClientError::Closed))).collect()
        };
        Ok(PendingBatch(Pending::Spread(Box::pin(gathered))))
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
            Payload::RegistrationResponse(answer) => registered(&answer),
            _ => Err(unexpected("the wrong kind of answer to a registration")),
        })
    }
}

/// What became of each task of a batch, in their order.
pub type BatchResult = Vec<Result<Registered, ClientError>>;

/// The answer to a batch that was sent. Dropping it does not take the registrations back.
#[must_use = "only the answer says which tasks are stored"]
pub struct PendingBatch(Pending);

#[allow(
    clippy::large_enum_variant,
    reason = "with one node all are `Whole`, and a box would be an allocation per batch"
)]
enum Pending {
    Whole {
        answer: InFlight,
        count: usize,
    },
    /// In a cluster: the parts are on their way, each with whoever follows it.
    Spread(Pin<Box<dyn Future<Output = BatchResult> + Send>>),
}

impl Future for PendingBatch {
    type Output = Result<BatchResult, ClientError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let (answer, count) = match &mut self.0 {
            Pending::Whole { answer, count } => (ready!(Pin::new(answer).poll(context))?, *count),
            Pending::Spread(gathered) => return gathered.as_mut().poll(context).map(Ok),
        };
        session::check(&answer)?;
        Poll::Ready(match answer {
            Payload::RegistrationBatchResponse(answer) if answer.responses.len() == count => {
                let one = |answer: proto::RegistrationResponse| {
                    error::check(answer.verdict()).and_then(|()| registered(&answer))
                };
                Ok(answer.responses.into_iter().map(one).collect())
            }
            Payload::RegistrationBatchResponse(answer) => {
                let got = answer.responses.len();
                Err(unexpected(&format!("{got} results for {count} registrations")))
            }
            _ => Err(unexpected("the wrong kind of answer to a batch")),
        })
    }
}

fn registered(answer: &proto::RegistrationResponse) -> Result<Registered, ClientError> {
    let task_id = answer.task_id.parse().map_err(|error: boomerang_task::Invalid| unexpected(&error.to_string()))?;
    Ok(Registered { task_id, due_ms: answer.scheduled_time_ms, duplicate: answer.duplicate })
}

#[cfg(test)]
mod tests {
    use super::super::fake::{self, exchange};
    use super::*;
    use boomerang_task::{Missed, Protocol};
    use boomerang_wire::proto::Status;

    #[tokio::test]
    async fn due_instants_are_absolute_or_relative() {
        for (due, sent) in [(Due::In(5), (5, 0)), (Due::At(77), (0, 77)), (Due::At(0), (0, 1))] {
            let registration = Registration { due, ..Default::default() };
            let register = async |client: Client| client.register(registration).await;
            let (request, result) = exchange(fake::registered(42), register).await;
            let Payload::RegistrationRequest(task) = request else { panic!("{request:?}") };
            assert_eq!((task.delay_ms, task.due_ms), sent);
            assert_eq!(result.unwrap(), Registered { task_id: fake::task_id(42), due_ms: 42, duplicate: false });
        }
    }

    #[tokio::test]
    async fn a_task_carries_everything_it_was_given() {
        let answer = Payload::RegistrationResponse(proto::RegistrationResponse {
            task_id: fake::task_id(1).to_string(),
            duplicate: true,
            ..Default::default()
        });
        let label = ("team".to_owned(), "blue".to_owned());
        let registration = Registration {
            recurrence: Some(Recurrence {
                missed: Missed::All { max: 7 },
                overlap: true,
                count: Some(3),
                ..Recurrence::every(500)
            }),
            dedup: Some(Dedup { key: "order-1".into(), ttl_ms: Some(60_000) }),
            tags: Tags::new("nightly", [label.clone()]).unwrap(),
            settings: OwnSettings {
                callback: Some(Callback::new(Protocol::Http, "http://h/x").unwrap()),
                retry: Some(Retry { jitter_percent: 20, ..Retry::default() }),
                dead_letters: Some("ops".into()),
            },
            ..Default::default()
        };
        let register = async |client: Client| client.register(registration).await;
        let (request, result) = exchange(answer, register).await;
        assert!(result.unwrap().duplicate);
        let Payload::RegistrationRequest(task) = request else { panic!("{request:?}") };
        assert_eq!((task.dedup_key.as_str(), task.dedup_ttl_ms), ("order-1", 60_000));
        assert_eq!((task.name.as_str(), task.labels.get(&label.0)), ("nightly", Some(&label.1)));
        assert_eq!(task.callback.unwrap().endpoint, "http://h/x");
        assert_eq!((task.retry.unwrap().jitter_percent, task.dlq.unwrap().destination.as_str()), (20, "ops"));
        let recurrence = task.recurrence.unwrap();
        assert_eq!(task.repeat_interval_ms, 500);
        assert_eq!((recurrence.missed_max, recurrence.overlap, recurrence.count), (7, true, 3));
    }

    fn batch_answer(responses: Vec<proto::RegistrationResponse>) -> Payload {
        Payload::RegistrationBatchResponse(proto::RegistrationBatchResponse { responses, ..Default::default() })
    }

    #[tokio::test]
    async fn each_task_of_a_batch_has_its_result() {
        let refused = proto::RegistrationResponse {
            status: Status::InvalidRequest.into(),
            error_message: "payload: too large".into(),
            ..Default::default()
        };
        let good = proto::RegistrationResponse {
            task_id: fake::task_id(1).to_string(),
            scheduled_time_ms: 9,
            ..Default::default()
        };
        let two = vec![Registration::default(), Registration { payload: "x".into(), ..Default::default() }];
        let send = two.clone();
        let register = async |client: Client| client.register_batch(send).await;
        let (request, results) = exchange(batch_answer(vec![good.clone(), refused]), register).await;
        let results = results.unwrap();
        assert_eq!(results[0].as_ref().unwrap().due_ms, 9);
        assert_eq!(results[1].as_ref().unwrap_err().to_string(), "INVALID_REQUEST: payload: too large");
        let Payload::RegistrationBatch(request) = request else { panic!("{request:?}") };
        assert_eq!((request.tasks.len(), request.tasks[1].payload.as_ref()), (2, &b"x"[..]));

        let send = two.clone();
        let register = async |client: Client| client.register_batch(send).await;
        let error = exchange(batch_answer(vec![good]), register).await.1.unwrap_err();
        assert!(error.to_string().contains("1 results for 2"), "{error}");

        let whole = Payload::RegistrationBatchResponse(proto::RegistrationBatchResponse {
            status: Status::Overloaded.into(),
            ..Default::default()
        });
        let register = async |client: Client| client.register_batch(two).await;
        assert_eq!(exchange(whole, register).await.1.unwrap_err().status(), Some(Status::Overloaded));
    }
}
