//! Cancel, edit, pause and resume race against dispatch and restarts, and no answer is ever false. Real processes, a
//! receiver that writes down all it gets, refuses some of it and answers some of it late; commands at random instants
//! around the due instants. Afterwards every answer is held against what came.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use boomerang_client::{Cancelled, Client, Credentials, Due, Options, Registration, TaskUpdate, Updated};
use boomerang_receiver::{Answer, Received, Receiver, Reply};
use boomerang_task::{Callback, Fence, Protocol, Recurrence, Retry, TaskId};
use boomerang_testkit::seed;
use common::node::{ADMIN_PASSWORD, NodeProcess};
use common::{now_ms, until};
use rand::{RngExt, SeedableRng, rngs::StdRng};

const TASKS: usize = 3_000;
const BATCH: usize = 500;
const CLIENTS: usize = 4;
const FIRST_DUE_MS: u64 = 1_500;
/// Attempts from this one on are accepted, so that none dies.
const ACCEPTED_FROM: u32 = 3;

/// Occurrence and attempt.
type Which = (u64, u32);

/// One delivery, as the receiver saw it.
#[derive(Debug, Clone)]
struct Came {
    which: Which,
    fence: Fence,
    at_us: u64,
    early: bool,
    /// The number of the edit that brought the payload; 0 is the registration's.
    edit: u64,
}

/// One answer; `None` is unknown.
#[derive(Debug, Clone)]
enum Said {
    Cancel(Option<Cancelled>),
    Edit {
        edit: u64,
        expected: Option<u64>,
        answer: Option<Updated>,
    },
    /// The attempt that may be out all the same, and until when nothing else may come: the resumption.
    Pause {
        answer: Option<Option<Which>>,
        until_us: u64,
    },
    /// The task was not there to be paused.
    PauseNotFound,
}

#[derive(Debug, Clone)]
struct Told {
    said: Said,
    at_us: u64,
}

#[derive(Debug, Clone, Copy)]
struct Task {
    id: TaskId,
    due_ms: u64,
    recurring: bool,
}

/// How often each answer was given.
#[derive(Default, Debug)]
struct Counts {
    deliveries: usize,
    retries: usize,
    redelivered: usize,
    cancelled: usize,
    cancel_too_late: usize,
    cancel_not_found: usize,
    updated: usize,
    update_too_late: usize,
    update_not_found: usize,
    conflicts: usize,
    paused: usize,
    paused_maybe_out: usize,
    pause_not_found: usize,
    unknown: usize,
}

fn now_us() -> u64 {
    us(SystemTime::now())
}

fn us(at: SystemTime) -> u64 {
    u64::try_from(at.duration_since(UNIX_EPOCH).unwrap().as_micros()).unwrap()
}

type Log = Arc<Mutex<HashMap<TaskId, Vec<Came>>>>;

/// What it does with an attempt is the same whenever it comes.
async fn receiver(log: Log, seed: u64) -> Receiver {
    let take = move |received: &Received| {
        let edit = std::str::from_utf8(&received.payload).unwrap().parse().unwrap();
        let which = (received.occurrence, received.attempt);
        let early = received.lateness_us().expect("the due instant is told") < 0;
        let came = Came { which, fence: received.fence, at_us: us(received.arrived_at), early, edit };
        log.lock().unwrap().entry(received.task_id).or_default().push(came);
        let random = received
            .task_id
            .as_bytes()
            .iter()
            .fold(seed, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
        let mut rng = StdRng::seed_from_u64(random ^ received.occurrence << 8 ^ u64::from(received.attempt));
        let refuses = received.attempt < ACCEPTED_FROM && rng.random_bool(0.4);
        let reply = if refuses { Reply::refuse("not now") } else { Reply::Accept };
        let delay_ms = if rng.random_bool(0.5) { rng.random_range(1..80) } else { 0 };
        Answer { reply, delay: Duration::from_millis(delay_ms) }
    };
    Receiver::bind("127.0.0.1:0", take).await.unwrap()
}

fn options(node: &NodeProcess, receiver: &Receiver) -> Options {
    let client_id = "admin".parse().unwrap();
    let password = ADMIN_PASSWORD.to_owned();
    let mut options = Options::new(vec![node.started.tcp.to_string()], Credentials::Password { client_id, password });
    options.callback = Some(Callback::new(Protocol::Tcp, &receiver.local_addr().to_string()).unwrap());
    let retry = Retry { attempts_max: 50, interval_ms: 40, interval_max_ms: 200, ..Retry::default() };
    options.retry = Some(retry);
    options.request_timeout = Duration::from_secs(5);
    options
}

async fn register(client: &Client, rng: &mut StdRng, spread_ms: u64) -> Vec<Task> {
    let mut tasks = Vec::new();
    for _ in 0..TASKS / BATCH {
        let recurring: Vec<bool> = (0..BATCH).map(|_| rng.random_bool(0.3)).collect();
        let registrations = recurring.iter().map(|recurring| Registration {
            payload: "0".into(),
            due: Due::In(FIRST_DUE_MS + rng.random_range(0..spread_ms)),
            recurrence: recurring.then(|| Recurrence { count: Some(rng.random_range(3..8)), ..Recurrence::every(120) }),
            ..Default::default()
        });
        let registered = client.register_batch(registrations.collect()).await.unwrap();
        for (registered, recurring) in registered.into_iter().zip(recurring) {
            let registered = registered.unwrap();
            tasks.push(Task { id: registered.task_id, due_ms: registered.due_ms, recurring });
        }
    }
    tasks
}

/// At an instant by chance, which is what races are made of: nothing is waited for.
async fn at(at_us: u64) {
    tokio::time::sleep(Duration::from_micros(at_us.saturating_sub(now_us()))).await;
}

/// What is done to one task, and what was answered.
struct Racer {
    task: Task,
    clients: Arc<Vec<Client>>,
    rng: StdRng,
    edits: u64,
}

impl Racer {
    fn client(&mut self) -> Client {
        self.clients[self.rng.random_range(0..CLIENTS)].clone()
    }

    /// Around the instant at which the task is due, or around a later occurrence; often very close.
    async fn some_instant(&mut self) {
        let around_ms = self.task.due_ms + if self.task.recurring { 120 * self.rng.random_range(0..4) } else { 0 };
        let span_ms = [4, 15, 60, 400][self.rng.random_range(0..4)];
        let at_us = (around_ms * 1_000 + self.rng.random_range(0..2 * span_ms * 1_000)).saturating_sub(span_ms * 1_000);
        at(at_us).await;
    }

    async fn race(mut self) -> (Task, Vec<Told>) {
        let mut told = Vec::new();
        self.some_instant().await;
        match self.rng.random_range(0..10) {
            0..3 => told.push(self.cancel().await),
            3..5 => {
                let edit = self.edit(None).await;
                told.push(edit);
                if self.rng.random_bool(0.4) {
                    self.some_instant().await;
                    let other = if self.rng.random_bool(0.5) { self.cancel().await } else { self.edit(None).await };
                    told.push(other);
                }
            }
            5 => {
                let (one, other) = (self.prepare(Some(1)), self.prepare(Some(1)));
                let (one, other) = tokio::join!(self.send(one), self.send(other));
                told.extend([one, other]);
            }
            6 => {
                let edit = self.prepare(None);
                let client = self.client();
                let (edit, cancel) = tokio::join!(self.send(edit), cancel(client, self.task.id));
                told.extend([edit, cancel]);
            }
            7..9 => {
                let paused = self.pause().await;
                told.extend(paused);
                if self.rng.random_bool(0.3) {
                    told.push(self.cancel().await);
                }
            }
            _ => {
                let (one, other) = (self.client(), self.client());
                let id = self.task.id;
                let (one, other) = tokio::join!(cancel(one, id), cancel(other, id));
                told.extend([one, other]);
            }
        }
        (self.task, told)
    }

    async fn cancel(&mut self) -> Told {
        cancel(self.client(), self.task.id).await
    }

    /// A payload with a number of its own; sooner, later, or at its old instant.
    fn prepare(&mut self, expected: Option<u64>) -> (Client, u64, TaskUpdate) {
        self.edits += 1;
        let due = match self.rng.random_range(0..3) {
            0 => None,
            1 => Some(Due::In(self.rng.random_range(0..20))),
            _ => Some(Due::In(self.rng.random_range(100..600))),
        };
        let payload = Some(self.edits.to_string().into());
        let update = TaskUpdate { expected_version: expected, due, payload, ..Default::default() };
        (self.client(), self.edits, update)
    }

    async fn edit(&mut self, expected: Option<u64>) -> Told {
        let prepared = self.prepare(expected);
        self.send(prepared).await
    }

    async fn send(&self, (client, edit, update): (Client, u64, TaskUpdate)) -> Told {
        let expected = update.expected_version;
        let answer = client.update(self.task.id, update).await.ok();
        let at_us = now_us();
        if let Some(Updated::TooLate { .. } | Updated::Conflict { .. }) = answer
            && let Ok(Some(view)) = client.get(self.task.id).await
        {
            assert_ne!(view.payload, edit.to_string(), "{answer:?}, and it was changed");
        }
        Told { said: Said::Edit { edit, expected, answer }, at_us }
    }

    /// And resumes it after a while; perhaps changes it while it is paused.
    async fn pause(&mut self) -> Vec<Told> {
        let client = self.client();
        let answer = client.pause(self.task.id).await;
        let at_us = now_us();
        let mut told = Vec::new();
        at(now_us() + self.rng.random_range(0..300_000)).await;
        if self.rng.random_bool(0.3) {
            let edit = self.edit(None).await;
            told.push(edit);
            at(now_us() + self.rng.random_range(0..100_000)).await;
        }
        let until_us = now_us();
        // Whatever became of the pause: the task must not stay behind.
        until("the node is back", || async { client.resume(self.task.id).await.ok() }).await;
        let said = match answer {
            Ok(Some(paused)) => Said::Pause { answer: Some(paused.maybe_out), until_us },
            Ok(None) => Said::PauseNotFound,
            Err(_) => Said::Pause { answer: None, until_us },
        };
        told.push(Told { said, at_us });
        told
    }
}

async fn cancel(client: Client, id: TaskId) -> Told {
    let answer = client.cancel(id).await.ok();
    Told { said: Said::Cancel(answer), at_us: now_us() }
}

/// Holds every answer against what came.
fn judge(task: Task, told: &[Told], came: &[Came], counts: &mut Counts) {
    let story = || format!("{task:?}\ntold {told:#?}\ncame {came:#?}");
    counts.deliveries += came.len();
    counts.retries += came.iter().filter(|came| came.which.1 > 1).count();
    assert!(came.iter().all(|came| !came.early), "early: {}", story());
    let mut by_fence = came.to_vec();
    by_fence.sort_by_key(|came| came.fence);
    assert!(by_fence.is_sorted_by(|one, next| one.fence < next.fence), "no fence twice: {}", story());
    assert!(by_fence.is_sorted_by_key(|came| came.which), "attempts in their order: {}", story());
    let again = by_fence.windows(2).filter(|pair| pair[0].which == pair[1].which).count();
    counts.redelivered += again;

    let cancels = told.iter().filter_map(|told| match told.said {
        Said::Cancel(answer) => Some((answer, told.at_us)),
        _ => None,
    });
    let cancels: Vec<_> = cancels.collect();
    let cancel_unknown = cancels.iter().any(|(answer, _)| answer.is_none());
    let named = |came: &Came| {
        cancels.iter().any(|(answer, _)| match answer {
            Some(Cancelled::TooLate { occurrence, attempt }) => came.which <= (*occurrence, *attempt),
            _ => false,
        })
    };
    for (answer, at_us) in &cancels {
        match answer {
            None => counts.unknown += 1,
            Some(Cancelled::Cancelled) => {
                counts.cancelled += 1;
                assert!(task.recurring || came.is_empty(), "cancelled, and it came: {}", story());
                assert!(came.iter().all(|came| came.at_us <= *at_us), "cancelled, and it came later: {}", story());
            }
            Some(Cancelled::TooLate { occurrence, attempt }) => {
                counts.cancel_too_late += 1;
                let last = (*occurrence, *attempt);
                assert!(came.iter().all(|came| came.which <= last), "more than {last:?} came: {}", story());
            }
            Some(Cancelled::NotFound) => {
                counts.cancel_not_found += 1;
                // What another cancellation named may still be on its way.
                let late = came.iter().any(|came| came.at_us > *at_us && !named(came));
                assert!(cancel_unknown || !late, "not found, and it came later: {}", story());
            }
        }
    }

    let mut versions: BTreeMap<u64, (u64, u64, u64)> = BTreeMap::new();
    let mut edits_unknown = false;
    for Told { said, at_us } in told {
        let Said::Edit { edit, expected, answer } = said else { continue };
        match answer {
            None => {
                counts.unknown += 1;
                edits_unknown = true;
            }
            Some(Updated::Updated { version, due_ms }) => {
                counts.updated += 1;
                assert!(expected.is_none_or(|expected| expected + 1 == *version), "{}", story());
                let before = versions.insert(*version, (*edit, *due_ms, *at_us));
                assert!(before.is_none(), "a version was given twice: {}", story());
            }
            Some(refused) => {
                match refused {
                    Updated::TooLate { .. } => counts.update_too_late += 1,
                    Updated::Conflict { .. } => counts.conflicts += 1,
                    _ => counts.update_not_found += 1,
                }
                assert!(came.iter().all(|came| came.edit != *edit), "{refused:?}, and it came: {}", story());
            }
        }
    }
    let conflicting = |told: &Told| match told.said {
        Said::Edit { answer: Some(Updated::Conflict { version }), .. } => Some(version),
        _ => None,
    };
    for version in told.iter().filter_map(conflicting) {
        assert!(edits_unknown || versions.contains_key(&version), "nobody made version {version}: {}", story());
    }
    if !edits_unknown {
        assert!(versions.keys().copied().eq(2..2 + versions.len() as u64), "a version is missing: {}", story());
    }
    let was_paused = told.iter().any(|told| matches!(told.said, Said::Pause { .. }));
    for (version, (edit, due_ms, at_us)) in &versions {
        let number =
            |came: &Came| versions.iter().find(|(_, (edit, ..))| *edit == came.edit).map(|(number, _)| *number);
        let is_older = |came: &&Came| came.edit == 0 || number(came).is_some_and(|number| number < *version);
        let late = came.iter().filter(is_older).find(|came| came.at_us > *at_us);
        assert!(late.is_none(), "version {version}, and an older one came later: {}", story());
        let last_old = came.iter().filter(is_older).map(|came| came.which).max();
        let first_new = came.iter().filter(|came| came.edit == *edit).map(|came| came.which).min();
        let in_order = last_old.is_none() || first_new.is_none() || last_old < first_new;
        assert!(in_order, "an attempt came as two versions: {}", story());
        // A resumption may bring a retry forward.
        let early = came.iter().find(|came| came.edit == *edit && came.at_us < due_ms * 1_000);
        assert!(was_paused || early.is_none(), "before it was due: {}", story());
    }

    for Told { said, at_us } in told {
        match said {
            Said::Pause { answer: None, .. } => counts.unknown += 1,
            Said::PauseNotFound => counts.pause_not_found += 1,
            Said::Pause { answer: Some(out), until_us } => {
                counts.paused += 1;
                counts.paused_maybe_out += usize::from(out.is_some());
                let paused = |came: &&Came| came.at_us > *at_us && came.at_us < *until_us;
                let stray = came.iter().filter(paused).find(|came| Some(came.which) != *out);
                assert!(stray.is_none(), "it came while it was paused: {}", story());
            }
            _ => {}
        }
    }

    // Whatever nobody ended comes.
    let may_have_ended = cancels.iter().any(|(answer, _)| !matches!(answer, Some(Cancelled::NotFound)));
    assert!(task.recurring || may_have_ended || !came.is_empty(), "it never came: {}", story());
}

/// `kills` is when the node is killed and started again.
async fn race(spread_ms: u64, kills: &[u64]) -> Counts {
    let seed = seed::one();
    let mut rng = seed.rng();
    let mut node = NodeProcess::start_on_a_fixed_port(&[]);
    let log = Log::default();
    let receiver = receiver(log.clone(), *seed).await;
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(Client::connect(options(&node, &receiver)).await.unwrap());
    }
    let clients = Arc::new(clients);
    let begun_ms = now_ms();
    let tasks = register(&clients[0], &mut rng, spread_ms).await;
    let racers: Vec<_> = tasks
        .iter()
        .map(|task| {
            let rng = StdRng::seed_from_u64(rng.random());
            tokio::spawn(Racer { task: *task, clients: clients.clone(), rng, edits: 0 }.race())
        })
        .collect();
    for at_ms in kills {
        at(1_000 * (begun_ms + FIRST_DUE_MS + at_ms + rng.random_range(0..200))).await;
        node.kill();
        tokio::task::block_in_place(|| node.restart());
    }
    let mut stories = Vec::new();
    for racer in racers {
        stories.push(racer.await.unwrap());
    }
    tokio::task::block_in_place(|| {
        node.wait_for_metric("boomerang_pending", 0.0);
        node.wait_for_metric("boomerang_in_flight", 0.0);
        for name in ["boomerang_waiting", "boomerang_wheel_timers"] {
            node.wait_for_metric(name, 0.0);
        }
    });
    let log = log.lock().unwrap();
    let mut counts = Counts::default();
    for (task, told) in &stories {
        judge(*task, told, log.get(&task.id).map_or(&[], Vec::as_slice), &mut counts);
    }
    println!("{} tasks, {} kills: {counts:?}", tasks.len(), kills.len());
    counts
}

fn assert_all_met(counts: &Counts) {
    let Counts { retries, cancelled, cancel_too_late, cancel_not_found, updated, update_too_late, .. } = *counts;
    let Counts { update_not_found, conflicts, paused, paused_maybe_out, .. } = *counts;
    for met in [
        retries,
        cancelled,
        cancel_too_late,
        cancel_not_found,
        updated,
        update_too_late,
        update_not_found,
        conflicts,
        paused,
        paused_maybe_out,
    ] {
        assert!(met >= 10, "each answer was given a few times: {counts:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_answer_is_false() {
    let counts = race(4_000, &[]).await;
    assert_all_met(&counts);
    assert_eq!((counts.unknown, counts.redelivered), (0, 0), "nobody disturbs the node");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_answer_is_false_though_the_node_is_killed() {
    let counts = race(6_000, &[0, 1_500, 3_000, 4_500]).await;
    assert_all_met(&counts);
    assert!(counts.unknown > 0 && counts.redelivered > 0, "the kills were felt: {counts:?}");
}
