//! The load: many connections with many requests under way on each, measured one by one.
//!
//! The loop is closed: a connection sends the next request when an answer has come. So a node that is slow is asked
//! less, and `latency_us` is to be read together with the rate. Whatever fails is counted by its text and not repeated.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::StreamExt;
use futures::future::Either;
use futures::stream::FuturesUnordered;
use hdrhistogram::Histogram;
use serde::Serialize;
use tokio::task::JoinSet;

use super::account::{Schedule, histogram};
use super::progress::Progress;
use boomerang_client::{
    BatchResult, Cancelled, Client, ClientError, Dedup, PendingBatch, PendingRegistration, Registered, Registration,
};
use boomerang_task::{InstantMs, TaskId};

/// Payloads are cut from this many random bytes: far more than the window of a compressor that meets several of them.
const POOL_BYTES: usize = 1 << 20;

/// From one payload to the next: prime, so that they come to lie at all places of the pool.
const POOL_STEP: u64 = 8_191;

/// Cancellations in one request, and requests under way on each connection: what takes back is not measured.
const CANCELLED_AT_ONCE: usize = 1_000;
const CANCELS_UNDER_WAY: usize = 2;

/// A node that has had no room for so long is not waited for any more.
const PATIENCE: Duration = Duration::from_secs(30);

/// After an answer that names no time to wait.
const OVERLOADED_PAUSE: Duration = Duration::from_millis(10);

/// Random payloads that cost nothing to make: slices of one buffer.
pub(super) struct Payloads {
    pool: Bytes,
    bytes: usize,
}

impl Payloads {
    pub fn new(bytes: usize) -> Self {
        let mut pool = vec![0; POOL_BYTES + bytes];
        rand::fill(&mut pool[..]);
        Self { pool: pool.into(), bytes }
    }

    pub fn get(&self, number: u64) -> Bytes {
        let at = number.wrapping_mul(POOL_STEP) % POOL_BYTES as u64;
        let at = usize::try_from(at).expect("within the pool");
        self.pool.slice(at..at + self.bytes)
    }
}

/// What each connection asks for.
#[derive(Clone)]
pub(super) struct Shape {
    /// Requests under way on each.
    pub inflight: usize,
    /// Tasks in each request.
    pub batch: u64,
    /// Each task has a deduplication key of the caller's own.
    pub keys: bool,
    pub payloads: Arc<Payloads>,
}

impl Shape {
    fn task(&self, number: u64, schedule: Schedule) -> Registration {
        // Random, for keys that follow one another would be neighbours in the store.
        let dedup = self.keys.then(|| Dedup { key: format!("bench-{:032x}", rand::random::<u128>()), ttl_ms: None });
        let payload = self.payloads.get(number);
        Registration { payload, due: schedule.due(number), dedup, ..Default::default() }
    }

    /// Sends the tasks of these numbers with one request.
    async fn send(&self, client: &Client, numbers: &[u64], schedule: Schedule) -> Result<Pending, ClientError> {
        let task = |number: &u64| self.task(*number, schedule);
        match numbers {
            [one] => client.register_nowait(task(one)).await.map(Either::Left),
            many => client.register_batch_nowait(many.iter().map(task).collect()).await.map(Either::Right),
        }
    }
}

/// What became of many registrations.
pub(super) struct Registering {
    pub sent: u64,
    /// With the due instant that the node answered.
    pub acknowledged: Vec<(TaskId, InstantMs)>,
    /// When each of them was, in microseconds since the first request.
    pub answered_us: Vec<u64>,
    /// Of those acknowledged when they were due already.
    pub late: u64,
    pub latency_us: Histogram<u64>,
    /// From the first request to the last answer.
    pub took: Duration,
    /// Refused for want of room, and sent again.
    pub refused: u64,
    pub failures: BTreeMap<String, u64>,
}

impl Registering {
    pub fn new() -> Self {
        let latency_us = histogram();
        let (acknowledged, answered_us, failures) = (Vec::new(), Vec::new(), BTreeMap::new());
        Self { sent: 0, acknowledged, answered_us, late: 0, latency_us, took: Duration::ZERO, refused: 0, failures }
    }

    fn acknowledge(&mut self, registered: Registered, latency: Duration, answered_us: u64) {
        self.acknowledged.push((registered.task_id, registered.due_ms));
        self.answered_us.push(answered_us);
        self.late += u64::from(now_ms() > registered.due_ms);
        self.latency_us.saturating_record(micros(latency));
    }

    /// Accounts for the answer to one registration.
    fn take(&mut self, one: Result<Registered, ClientError>, latency: Duration, answered_us: u64, progress: &Progress) {
        match one {
            Ok(registered) => {
                self.acknowledge(registered, latency, answered_us);
                progress.one();
            }
            Err(error) => count(&mut self.failures, &error, 1),
        }
    }

    pub fn absorb(&mut self, other: Self) {
        self.sent += other.sent;
        self.acknowledged.extend(other.acknowledged);
        self.answered_us.extend(other.answered_us);
        self.late += other.late;
        self.latency_us.add(&other.latency_us).expect("histograms of one shape");
        self.refused += other.refused;
        merge(&mut self.failures, other.failures);
    }
}

/// A registration that was sent, or a batch of them.
type Pending = Either<PendingRegistration, PendingBatch>;

/// What came of a request, for each of its tasks.
async fn answers(pending: Pending, tasks: usize) -> BatchResult {
    match pending {
        Either::Left(one) => vec![one.await],
        Either::Right(many) => many.await.unwrap_or_else(|error| vec![Err(error); tasks]),
    }
}

/// Registers `tasks` tasks over all connections; whichever is free takes the next ones in the order of their due
/// instants.
pub(super) async fn register(
    clients: &[Client],
    shape: &Shape,
    tasks: u64,
    schedule: Schedule,
    progress: &Arc<Progress>,
) -> Registering {
    let started = Instant::now();
    let next = Arc::new(AtomicU64::new(0));
    let mut connections = JoinSet::new();
    for client in clients {
        let (client, next, shape, progress) = (client.clone(), next.clone(), shape.clone(), progress.clone());
        connections.spawn(async move {
            let batch = shape.batch;
            let mut result = Registering::new();
            let mut under_way = FuturesUnordered::new();
            // What was refused for want of room, which is certainly not stored.
            let mut again: Vec<u64> = Vec::new();
            let mut heard_at = Instant::now();
            loop {
                while under_way.len() < shape.inflight {
                    let mut numbers = again.split_off(again.len().saturating_sub(batch as usize));
                    if numbers.is_empty() {
                        let first = next.fetch_add(batch, Ordering::Relaxed);
                        numbers = (first..(first + batch).min(tasks)).collect();
                    }
                    if numbers.is_empty() {
                        break;
                    }
                    let count = numbers.len() as u64;
                    let submitted = Instant::now();
                    result.sent += count;
                    match shape.send(&client, &numbers, schedule).await {
                        Ok(pending) => under_way.push(async move {
                            let answers = answers(pending, numbers.len()).await;
                            (numbers, answers, submitted.elapsed())
                        }),
                        Err(error) => {
                            // It could not even be sent, after a wait: the rest would take for ever to fail alike.
                            next.store(tasks, Ordering::Relaxed);
                            self::count(&mut result.failures, &error, count);
                        }
                    }
                }
                let Some((numbers, answers, latency)) = under_way.next().await else { return result };
                let answered_us = micros(started.elapsed());
                let mut overloaded = None;
                for (number, answer) in numbers.into_iter().zip(answers) {
                    match answer {
                        Err(error) if is_overloaded(&error) && heard_at.elapsed() < PATIENCE => {
                            result.refused += 1;
                            again.push(number);
                            overloaded = Some(error);
                        }
                        answer => {
                            heard_at = if answer.is_ok() { Instant::now() } else { heard_at };
                            result.take(answer, latency, answered_us, &progress);
                        }
                    }
                }
                if let Some(error) = overloaded {
                    pause_if_overloaded(&error).await;
                }
            }
        });
    }
    let mut all = Registering::new();
    while let Some(one) = connections.join_next().await {
        all.absorb(one.expect("no panic in a connection"));
    }
    all.took = started.elapsed();
    all
}

/// What became of many cancellations.
#[derive(Debug, Default, Serialize)]
pub(super) struct Cancelling {
    pub cancelled: u64,
    pub too_late: u64,
    pub not_found: u64,
    pub failures: BTreeMap<String, u64>,
}

impl Cancelling {
    /// Accounts for the answer to one; gives the error back, if it is one.
    fn take(&mut self, one: Result<Cancelled, ClientError>) -> Option<ClientError> {
        match one {
            Ok(Cancelled::Cancelled) => self.cancelled += 1,
            Ok(Cancelled::TooLate { .. }) => self.too_late += 1,
            Ok(Cancelled::NotFound) => self.not_found += 1,
            Err(error) => {
                count(&mut self.failures, &error, 1);
                return Some(error);
            }
        }
        None
    }
}

/// Takes tasks back, so that a bench leaves the node as it found it: a thousand with each request.
pub(super) async fn cancel(clients: &[Client], tasks: Vec<TaskId>, progress: &Arc<Progress>) -> Cancelling {
    let tasks = Arc::new(tasks);
    let next = Arc::new(AtomicU64::new(0));
    let mut connections = JoinSet::new();
    for client in clients {
        let (client, next, tasks, progress) = (client.clone(), next.clone(), tasks.clone(), progress.clone());
        connections.spawn(async move {
            let mut result = Cancelling::default();
            let parts = std::iter::from_fn(|| {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let part = usize::try_from(number).ok().and_then(|number| tasks.chunks(CANCELLED_AT_ONCE).nth(number));
                part.map(<[TaskId]>::to_vec)
            });
            let cancel = |part: Vec<TaskId>| {
                let client = client.clone();
                async move {
                    let answers = client.cancel_batch(&part).await;
                    answers.unwrap_or_else(|error| vec![Err(error); part.len()])
                }
            };
            let mut answers = futures::stream::iter(parts).map(cancel).buffer_unordered(CANCELS_UNDER_WAY);
            while let Some(answers) = answers.next().await {
                progress.add(answers.len() as u64);
                let errors: Vec<ClientError> = answers.into_iter().filter_map(|one| result.take(one)).collect();
                if let Some(error) = errors.first() {
                    pause_if_overloaded(error).await;
                }
                if errors.iter().any(|error| matches!(error, ClientError::Connect { .. })) {
                    next.store(u64::MAX / 2, Ordering::Relaxed);
                }
            }
            result
        });
    }
    let mut all = Cancelling::default();
    while let Some(one) = connections.join_next().await {
        let one = one.expect("no panic in a connection");
        all.cancelled += one.cancelled;
        all.too_late += one.too_late;
        all.not_found += one.not_found;
        merge(&mut all.failures, one.failures);
    }
    all
}

pub(super) fn is_overloaded(error: &ClientError) -> bool {
    matches!(error, ClientError::Server { status: boomerang_wire::proto::Status::Overloaded, .. })
}

pub(super) async fn pause_if_overloaded(error: &ClientError) {
    if let ClientError::Server { status: boomerang_wire::proto::Status::Overloaded, retry_after, .. } = error {
        tokio::time::sleep(retry_after.unwrap_or(OVERLOADED_PAUSE)).await;
    }
}

pub(super) fn count(failures: &mut BTreeMap<String, u64>, error: &ClientError, times: u64) {
    *failures.entry(error.to_string()).or_default() += times;
}

pub(super) fn merge(into: &mut BTreeMap<String, u64>, from: BTreeMap<String, u64>) {
    for (why, count) in from {
        *into.entry(why).or_default() += count;
    }
}

pub(super) fn now_ms() -> InstantMs {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_have_their_size_and_differ() {
        let payloads = Payloads::new(100);
        assert_ne!(payloads.get(0), payloads.get(1));
        assert!([0, 1, 127, 128, 129, u64::MAX].iter().all(|&number| payloads.get(number).len() == 100));
        assert!(Payloads::new(0).get(5).is_empty());
    }
}
