//! Cancel, edit, pause and resume race against dispatch and restarts, and no answer is ever false. Real processes, a
//! receiver that writes down all it gets, refuses some of it and answers some of it late; commands at random instants
//! around the due instants. Afterwards every answer is held against what came.
//!
//! Two tables say what this is about: [`RACES`], who races whom, and [`RULES`], what may be seen after which answer.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use boomerang_client::{Cancelled, Client, Credentials, Due, Options, Paused, Registration, TaskUpdate, Updated};
use boomerang_receiver::{Received, Receiver, Reply};
use boomerang_task::locks::Mutex;
use boomerang_task::{Callback, Fence, Protocol, Recurrence, Retry, TaskId};
use boomerang_testkit::seed;
use common::node::{ADMIN_PASSWORD, NodeProcess};
use common::{now_ms, until};
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng, rngs::StdRng};

const TASKS: usize = 3_000;
const BATCH: usize = 500;
const CLIENTS: usize = 4;
const FIRST_DUE_MS: u64 = 1_500;
const INTERVAL_MS: u64 = 120;
/// Attempts from this one on are accepted, so that none dies.
const ACCEPTED_FROM: u32 = 3;
/// How often each answer must be given, or the test says nothing about it.
const MET_MIN: usize = 10;

/// What is done to one task. Each race is one against its dispatch as well, and against the node's end where that is
/// killed.
struct Race {
    /// How many of a hundred tasks it happens to.
    share: u32,
    name: &'static str,
    steps: &'static [Step],
}

/// Who races whom.
static RACES: [Race; 11] = [
    race(30, "cancel", &[NearDue, Alone(Cancel)]),
    race(12, "edit", &[NearDue, Alone(Edit)]),
    race(4, "edit, then cancel", &[NearDue, Alone(Edit), NearDue, Alone(Cancel)]),
    race(4, "edit, then edit", &[NearDue, Alone(Edit), NearDue, Alone(Edit)]),
    race(10, "edit beside edit", &[NearDue, Beside(EditOfFirst, EditOfFirst)]),
    race(10, "edit beside cancel", &[NearDue, Beside(Edit, Cancel)]),
    race(10, "cancel beside cancel", &[NearDue, Beside(Cancel, Cancel)]),
    race(10, "pause, resume", &[NearDue, Pause, Within(300), Resume]),
    race(4, "pause, edit, resume", &[NearDue, Pause, Within(300), Alone(Edit), Within(100), Resume]),
    race(4, "pause, resume, cancel", &[NearDue, Pause, Within(300), Resume, Alone(Cancel)]),
    race(2, "pause, edit, cancel", &[NearDue, Pause, Within(300), Alone(Edit), Within(100), Resume, Alone(Cancel)]),
];

const fn race(share: u32, name: &'static str, steps: &'static [Step]) -> Race {
    Race { share, name, steps }
}

#[derive(Clone, Copy)]
enum Step {
    /// Waits for an instant around the one at which the task is due, or around a later occurrence; often very close.
    NearDue,
    /// Waits for up to so many milliseconds.
    Within(u64),
    /// Sends one, and waits for the answer.
    Alone(Change),
    /// Sends both at once, and waits for both answers.
    Beside(Change, Change),
    /// Is answered `PAUSED`, `PAUSED_MAYBE_OUT` or `PAUSE_NOT_FOUND`.
    Pause,
    /// Asks until it is answered: whatever became of the pause, the task must not stay behind.
    Resume,
}

#[derive(Clone, Copy)]
enum Change {
    /// Is answered `CANCELLED`, `CANCEL_TOO_LATE` or `CANCEL_NOT_FOUND`.
    Cancel,
    /// A payload with a number of its own; sooner, later, or at the old instant. Is answered `EDITED`, `EDIT_TOO_LATE`
    /// or `EDIT_NOT_FOUND`.
    Edit,
    /// The same, but only if nobody has edited the task before: it may be answered `EDIT_CONFLICT`, too.
    EditOfFirst,
}

use Change::{Cancel, Edit, EditOfFirst};
use Step::{Alone, Beside, NearDue, Pause, Resume, Within};

/// What must hold of a task to which this was answered.
struct Rule {
    answer: &'static str,
    holds: &'static str,
    /// What breaks it in this story.
    broken: fn(&Story) -> Option<String>,
}

/// What may be seen after which answer. "Later" is after the answer has come.
static RULES: [Rule; 17] = [
    rule("anything", "nothing comes before it is due", Story::early),
    rule("anything", "no fence comes twice", Story::fence_twice),
    rule("anything", "fences grow from attempt to attempt", Story::out_of_order),
    rule("nothing that ends it", "a task that is due once comes", Story::never_came),
    rule(CANCELLED, "a task that is due once does not come", Story::came_though_cancelled),
    rule(CANCELLED, "nothing comes later", Story::came_after_cancelled),
    rule(CANCEL_TOO_LATE, "no attempt after the named one comes", Story::came_after_named),
    rule(CANCEL_NOT_FOUND, "nothing comes later but what another cancel has named", Story::came_after_not_found),
    rule("cancelled, or too late", "no other cancel finds the task", Story::ended_by_two_cancels),
    rule(EDITED, "the version follows the expected one", Story::edited_another_version),
    rule(EDITED, "versions count up, and each is given once", Story::versions_with_gaps),
    rule(EDITED, "no older version comes later", Story::older_version_later),
    rule(EDITED, "an attempt comes in one version", Story::attempt_in_two_versions),
    rule(EDITED, "it comes no sooner than its new due instant, unless it was paused", Story::before_the_new_instant),
    rule("edit: any refusal", "nothing of the edit is stored, or comes", Story::refused_edit_seen),
    rule(EDIT_CONFLICT, "a version was expected, and somebody made the named one", Story::conflict_with_nobody),
    rule("paused", "until it is resumed nothing comes but the named attempt", Story::came_while_paused),
];

const fn rule(answer: &'static str, holds: &'static str, broken: fn(&Story) -> Option<String>) -> Rule {
    Rule { answer, holds, broken }
}

const CANCELLED: &str = "cancelled";
const CANCEL_TOO_LATE: &str = "cancel: too late";
const CANCEL_NOT_FOUND: &str = "cancel: not found";
const EDITED: &str = "edited";
const EDIT_TOO_LATE: &str = "edit: too late";
const EDIT_NOT_FOUND: &str = "edit: not found";
const EDIT_CONFLICT: &str = "edit: conflict";
const PAUSED: &str = "paused";
const PAUSED_MAYBE_OUT: &str = "paused: an attempt may be out";
const PAUSE_NOT_FOUND: &str = "pause: not found";
/// The node was killed before it answered: it may have done it or not.
const UNKNOWN: &str = "unknown";

/// The answers that must come in a test, each at least [`MET_MIN`] times.
const ANSWERS: [&str; 9] = [
    CANCELLED,
    CANCEL_TOO_LATE,
    CANCEL_NOT_FOUND,
    EDITED,
    EDIT_TOO_LATE,
    EDIT_NOT_FOUND,
    EDIT_CONFLICT,
    PAUSED,
    PAUSED_MAYBE_OUT,
];

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

/// An answer; `None` is unknown.
#[derive(Debug, Clone)]
enum Answer {
    Cancel(Option<Cancelled>),
    Edit {
        edit: u64,
        expected: Option<u64>,
        answer: Option<Updated>,
        /// The number of the edit whose payload the task had after a refusal.
        read_afterwards: Option<u64>,
    },
    /// Without `Paused`, the task was not found.
    Pause {
        answer: Option<Option<Paused>>,
        resumed_us: u64,
    },
}

impl Answer {
    fn name(&self) -> &'static str {
        match self {
            Self::Cancel(None) | Self::Edit { answer: None, .. } | Self::Pause { answer: None, .. } => UNKNOWN,
            Self::Cancel(Some(Cancelled::Cancelled)) => CANCELLED,
            Self::Cancel(Some(Cancelled::TooLate { .. })) => CANCEL_TOO_LATE,
            Self::Cancel(Some(Cancelled::NotFound)) => CANCEL_NOT_FOUND,
            Self::Edit { answer: Some(Updated::Updated { .. }), .. } => EDITED,
            Self::Edit { answer: Some(Updated::TooLate { .. }), .. } => EDIT_TOO_LATE,
            Self::Edit { answer: Some(Updated::Conflict { .. }), .. } => EDIT_CONFLICT,
            Self::Edit { answer: Some(Updated::NotFound), .. } => EDIT_NOT_FOUND,
            Self::Pause { answer: Some(Some(Paused { maybe_out: None, .. })), .. } => PAUSED,
            Self::Pause { answer: Some(Some(Paused { .. })), .. } => PAUSED_MAYBE_OUT,
            Self::Pause { answer: Some(None), .. } => PAUSE_NOT_FOUND,
        }
    }
}

#[derive(Debug, Clone)]
struct Answered {
    answer: Answer,
    at_us: u64,
}

#[derive(Debug, Clone, Copy)]
struct Task {
    id: TaskId,
    due_ms: u64,
    recurring: bool,
}

/// How often each answer was given, and what came.
#[derive(Default, Debug)]
struct Counts {
    answers: BTreeMap<&'static str, usize>,
    deliveries: usize,
    retries: usize,
    redelivered: usize,
}

impl Counts {
    fn of(&self, answer: &str) -> usize {
        self.answers.get(answer).copied().unwrap_or_default()
    }
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
        let edit = edit_of(&received.payload);
        let which = (received.occurrence, received.attempt);
        let early = received.lateness_us().expect("the due instant is told") < 0;
        let came = Came { which, fence: received.fence, at_us: us(received.arrived_at), early, edit };
        log.lock().entry(received.task_id).or_default().push(came);
        let random = received
            .task_id
            .as_bytes()
            .iter()
            .fold(seed, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
        let mut rng = StdRng::seed_from_u64(random ^ received.occurrence << 8 ^ u64::from(received.attempt));
        let refuses = received.attempt < ACCEPTED_FROM && rng.random_bool(0.4);
        let reply = if refuses { Reply::refuse("not now") } else { Reply::Accept };
        let delay_ms = if rng.random_bool(0.5) { rng.random_range(1..80) } else { 0 };
        boomerang_receiver::Answer { reply, delay: Duration::from_millis(delay_ms) }
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
            recurrence: recurring
                .then(|| Recurrence { count: Some(rng.random_range(3..8)), ..Recurrence::every(INTERVAL_MS) }),
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

/// Does to one task what its race says.
struct Racer {
    task: Task,
    clients: Arc<Vec<Client>>,
    rng: StdRng,
    edits: u64,
}

impl Racer {
    async fn run(mut self) -> (Task, &'static Race, Vec<Answered>) {
        let race = RACES.choose_weighted(&mut self.rng, |race| race.share).unwrap();
        let mut answers = Vec::new();
        let mut paused = None;
        for step in race.steps {
            match *step {
                NearDue => self.near_due().await,
                Within(span_ms) => at(now_us() + self.rng.random_range(0..span_ms * 1_000)).await,
                Alone(change) => answers.push(self.request(change).await),
                Beside(one, other) => {
                    let (one, other) = (self.request(one), self.request(other));
                    let (one, other) = tokio::join!(one, other);
                    answers.extend([one, other]);
                }
                Pause => {
                    let client = self.client();
                    let answer = client.pause(self.task.id).await.ok();
                    paused = Some((client, answer, now_us()));
                }
                Resume => {
                    let (client, answer, at_us) = paused.take().expect("a pause before a resumption");
                    let resumed_us = now_us();
                    until("the node is back", || async { client.resume(self.task.id).await.ok() }).await;
                    answers.push(Answered { answer: Answer::Pause { answer, resumed_us }, at_us });
                }
            }
        }
        (self.task, race, answers)
    }

    fn client(&mut self) -> Client {
        self.clients[self.rng.random_range(0..CLIENTS)].clone()
    }

    async fn near_due(&mut self) {
        let occurrence = if self.task.recurring { self.rng.random_range(0..4) } else { 0 };
        let around_ms = self.task.due_ms + INTERVAL_MS * occurrence;
        let span_ms = [4, 15, 60, 400][self.rng.random_range(0..4)];
        let at_us = (around_ms * 1_000 + self.rng.random_range(0..2 * span_ms * 1_000)).saturating_sub(span_ms * 1_000);
        at(at_us).await;
    }

    /// Made at once, sent when it is awaited.
    fn request(&mut self, change: Change) -> impl Future<Output = Answered> + use<> {
        let (client, id) = (self.client(), self.task.id);
        let update = match change {
            Cancel => None,
            Edit => Some(self.update(None)),
            EditOfFirst => Some(self.update(Some(1))),
        };
        async move {
            match update {
                None => {
                    let answer = client.cancel(id).await.ok();
                    Answered { answer: Answer::Cancel(answer), at_us: now_us() }
                }
                Some((edit, update)) => send_edit(&client, id, edit, update).await,
            }
        }
    }

    fn update(&mut self, expected_version: Option<u64>) -> (u64, TaskUpdate) {
        self.edits += 1;
        let due = match self.rng.random_range(0..3) {
            0 => None,
            1 => Some(Due::In(self.rng.random_range(0..20))),
            _ => Some(Due::In(self.rng.random_range(100..600))),
        };
        let payload = Some(self.edits.to_string().into());
        (self.edits, TaskUpdate { expected_version, due, payload, ..Default::default() })
    }
}

async fn send_edit(client: &Client, id: TaskId, edit: u64, update: TaskUpdate) -> Answered {
    let expected = update.expected_version;
    let answer = client.update(id, update).await.ok();
    let at_us = now_us();
    let mut read_afterwards = None;
    if let Some(Updated::TooLate { .. } | Updated::Conflict { .. }) = answer
        && let Ok(Some(view)) = client.get(id).await
    {
        read_afterwards = Some(edit_of(&view.payload));
    }
    Answered { answer: Answer::Edit { edit, expected, answer, read_afterwards }, at_us }
}

/// The number of the edit that made a payload.
fn edit_of(payload: &[u8]) -> u64 {
    std::str::from_utf8(payload).unwrap().parse().unwrap()
}

/// What was done to a task, what was answered, and what came.
#[derive(Debug)]
struct Story {
    race: &'static str,
    task: Task,
    answers: Vec<Answered>,
    came: Vec<Came>,
}

/// An edit that was made.
struct Version {
    number: u64,
    edit: u64,
    due_ms: u64,
    at_us: u64,
}

/// What the rules ask; each returns what breaks it.
impl Story {
    fn cancels(&self) -> impl Iterator<Item = (Option<Cancelled>, u64)> {
        self.answers.iter().filter_map(|answered| match answered.answer {
            Answer::Cancel(answer) => Some((answer, answered.at_us)),
            _ => None,
        })
    }

    /// In the order of their numbers.
    fn versions(&self) -> Vec<Version> {
        let version = |answered: &Answered| match answered.answer {
            Answer::Edit { edit, answer: Some(Updated::Updated { version, due_ms }), .. } => {
                Some(Version { number: version, edit, due_ms, at_us: answered.at_us })
            }
            _ => None,
        };
        let mut versions: Vec<Version> = self.answers.iter().filter_map(version).collect();
        versions.sort_by_key(|version| version.number);
        versions
    }

    /// Whether an edit may have been made that nobody was told of.
    fn has_unknown_edits(&self) -> bool {
        self.answers.iter().any(|answered| matches!(answered.answer, Answer::Edit { answer: None, .. }))
    }

    fn by_fence(&self) -> Vec<&Came> {
        let mut came: Vec<&Came> = self.came.iter().collect();
        came.sort_by_key(|came| came.fence);
        came
    }

    /// What came of the task before it was given this version.
    fn older_than(&self, version: &Version) -> Vec<&Came> {
        let older: Vec<u64> =
            self.versions().iter().filter(|other| other.number < version.number).map(|other| other.edit).collect();
        self.came.iter().filter(|came| came.edit == 0 || older.contains(&came.edit)).collect()
    }

    fn early(&self) -> Option<String> {
        found(self.came.iter().find(|came| came.early))
    }

    fn fence_twice(&self) -> Option<String> {
        found(self.by_fence().windows(2).find(|pair| pair[0].fence == pair[1].fence))
    }

    fn out_of_order(&self) -> Option<String> {
        found(self.by_fence().windows(2).find(|pair| pair[0].which > pair[1].which))
    }

    fn never_came(&self) -> Option<String> {
        let may_have_ended = self.cancels().any(|(answer, _)| !matches!(answer, Some(Cancelled::NotFound)));
        let missing = !self.task.recurring && !may_have_ended && self.came.is_empty();
        missing.then(|| "nothing came".into())
    }

    fn came_though_cancelled(&self) -> Option<String> {
        let cancelled = self.cancels().any(|(answer, _)| answer == Some(Cancelled::Cancelled));
        found(self.came.iter().find(|_| cancelled && !self.task.recurring))
    }

    fn came_after_cancelled(&self) -> Option<String> {
        let cancelled = |(answer, at_us)| (answer == Some(Cancelled::Cancelled)).then_some(at_us);
        let first = self.cancels().filter_map(cancelled).min()?;
        found(self.came.iter().find(|came| came.at_us > first))
    }

    fn came_after_named(&self) -> Option<String> {
        let first = self.cancels().filter_map(|(answer, _)| named(answer)).min()?;
        found(self.came.iter().find(|came| came.which > first))
    }

    fn came_after_not_found(&self) -> Option<String> {
        let is_unknown = self.cancels().any(|(answer, _)| answer.is_none());
        let not_found = |(answer, at_us)| (answer == Some(Cancelled::NotFound)).then_some(at_us);
        let first = self.cancels().filter_map(not_found).min()?;
        // What another cancellation named may still be on its way.
        let last_named = self.cancels().filter_map(|(answer, _)| named(answer)).max();
        found(self.came.iter().find(|came| !is_unknown && came.at_us > first && Some(came.which) > last_named))
    }

    fn ended_by_two_cancels(&self) -> Option<String> {
        let ended = |(answer, _): &(Option<Cancelled>, u64)| !matches!(answer, None | Some(Cancelled::NotFound));
        let ended: Vec<_> = self.cancels().filter(ended).collect();
        (ended.len() > 1).then(|| format!("{ended:?}"))
    }

    fn edited_another_version(&self) -> Option<String> {
        found(self.answers.iter().find(|answered| match answered.answer {
            Answer::Edit { expected: Some(expected), answer: Some(Updated::Updated { version, .. }), .. } => {
                version != expected + 1
            }
            _ => false,
        }))
    }

    fn versions_with_gaps(&self) -> Option<String> {
        let numbers: Vec<u64> = self.versions().iter().map(|version| version.number).collect();
        let once = numbers.is_sorted_by(|one, next| one < next);
        let without_gaps = self.has_unknown_edits() || numbers.iter().copied().eq(2..2 + numbers.len() as u64);
        (!once || !without_gaps).then(|| format!("versions {numbers:?}"))
    }

    fn older_version_later(&self) -> Option<String> {
        self.versions().iter().find_map(|version| {
            let older = self.older_than(version);
            found(older.iter().find(|came| came.at_us > version.at_us))
                .map(|what| format!("{}: {what}", version.number))
        })
    }

    fn attempt_in_two_versions(&self) -> Option<String> {
        self.versions().iter().find_map(|version| {
            let last_old = self.older_than(version).iter().map(|came| came.which).max()?;
            let of_this = self.came.iter().filter(|came| came.edit == version.edit);
            let first_new = of_this.map(|came| came.which).min()?;
            let what = || format!("{last_old:?} of an older version, {first_new:?} of version {}", version.number);
            (last_old >= first_new).then(what)
        })
    }

    fn before_the_new_instant(&self) -> Option<String> {
        // A resumption may bring a retry forward.
        let was_paused =
            |answered: &Answered| matches!(answered.answer, Answer::Pause { answer: None | Some(Some(_)), .. });
        if self.answers.iter().any(was_paused) {
            return None;
        }
        self.versions().iter().find_map(|version| {
            let early = |came: &&Came| came.edit == version.edit && came.at_us < version.due_ms * 1_000;
            found(self.came.iter().find(early))
        })
    }

    fn refused_edit_seen(&self) -> Option<String> {
        self.answers.iter().find_map(|answered| match answered.answer {
            Answer::Edit { answer: None | Some(Updated::Updated { .. }), .. } => None,
            Answer::Edit { edit, read_afterwards, .. } => found(read_afterwards.filter(|read| *read == edit))
                .or_else(|| found(self.came.iter().find(|came| came.edit == edit))),
            _ => None,
        })
    }

    fn conflict_with_nobody(&self) -> Option<String> {
        let versions = self.versions();
        found(self.answers.iter().find(|answered| match answered.answer {
            Answer::Edit { expected, answer: Some(Updated::Conflict { version }), .. } => {
                let is_made = versions.iter().any(|made| made.number == version) || self.has_unknown_edits();
                expected.is_none() || !is_made
            }
            _ => false,
        }))
    }

    fn came_while_paused(&self) -> Option<String> {
        self.answers.iter().find_map(|answered| {
            let Answer::Pause { answer: Some(Some(Paused { maybe_out, .. })), resumed_us } = answered.answer else {
                return None;
            };
            let paused = answered.at_us + 1..resumed_us;
            found(self.came.iter().find(|came| paused.contains(&came.at_us) && Some(came.which) != maybe_out))
        })
    }
}

fn found<T: std::fmt::Debug>(what: Option<T>) -> Option<String> {
    what.map(|what| format!("{what:?}"))
}

/// The attempt that may be out although the task was cancelled.
fn named(answer: Option<Cancelled>) -> Option<Which> {
    match answer {
        Some(Cancelled::TooLate { occurrence, attempt }) => Some((occurrence, attempt)),
        _ => None,
    }
}

/// Holds every story against every rule, and fails with each rule that is broken, how often, and by what first.
fn judge(stories: &[Story]) -> Counts {
    let mut counts = Counts::default();
    let mut verdict = String::new();
    for Rule { answer, holds, broken } in &RULES {
        let broken: Vec<_> = stories.iter().filter_map(|story| Some((story, broken(story)?))).collect();
        if let Some((story, what)) = broken.first() {
            let (times, race) = (broken.len(), story.race);
            let _ = writeln!(verdict, "answered '{answer}': {holds}");
            let _ = writeln!(verdict, "  broken {times} times, first in a race of '{race}' by {what}\n  {story:#?}");
        }
    }
    assert!(verdict.is_empty(), "of {} tasks:\n{verdict}", stories.len());
    for story in stories {
        for Answered { answer, .. } in &story.answers {
            *counts.answers.entry(answer.name()).or_default() += 1;
        }
        counts.deliveries += story.came.len();
        counts.retries += story.came.iter().filter(|came| came.which.1 > 1).count();
        counts.redelivered += story.by_fence().windows(2).filter(|pair| pair[0].which == pair[1].which).count();
    }
    counts
}

/// `kills` is when the node is killed and started again.
async fn race_all(spread_ms: u64, kills: &[u64]) -> Counts {
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
            tokio::spawn(Racer { task: *task, clients: clients.clone(), rng, edits: 0 }.run())
        })
        .collect();
    for at_ms in kills {
        at(1_000 * (begun_ms + FIRST_DUE_MS + at_ms + rng.random_range(0..200))).await;
        node.kill();
        tokio::task::block_in_place(|| node.restart());
    }
    let mut told = Vec::new();
    for racer in racers {
        told.push(racer.await.unwrap());
    }
    tokio::task::block_in_place(|| {
        node.wait_for_metric("boomerang_pending", 0.0);
        node.wait_for_metric("boomerang_in_flight", 0.0);
        for name in ["boomerang_waiting", "boomerang_wheel_timers"] {
            node.wait_for_metric(name, 0.0);
        }
    });
    let log = log.lock();
    let story = |(task, race, answers): (Task, &Race, _)| {
        let came = log.get(&task.id).cloned().unwrap_or_default();
        Story { race: race.name, task, answers, came }
    };
    let stories: Vec<Story> = told.into_iter().map(story).collect();
    let counts = judge(&stories);
    println!("{} tasks, {} kills: {counts:?}", tasks.len(), kills.len());
    for answer in ANSWERS {
        let given = counts.of(answer);
        assert!(given >= MET_MIN, "'{answer}' was answered {given} times, which says nothing about it: {counts:?}");
    }
    assert!(counts.retries >= MET_MIN, "{} retries, which say nothing about them: {counts:?}", counts.retries);
    counts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_answer_is_false() {
    let counts = race_all(4_000, &[]).await;
    let disturbed = (counts.of(UNKNOWN), counts.redelivered);
    assert_eq!(disturbed, (0, 0), "unknown answers and attempts that came again, while nobody disturbs the node");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_answer_is_false_though_the_node_is_killed() {
    let counts = race_all(6_000, &[0, 1_500, 3_000, 4_500]).await;
    assert!(counts.of(UNKNOWN) > 0, "no answer is unknown, so no kill was felt: {counts:?}");
    assert!(counts.redelivered > 0, "no attempt came again, so no kill was felt: {counts:?}");
}
