//! Those who ask: processes in the sense of the history, each of which asks for one thing at a time.
//!
//! They ask the proposer of a node, as `server::api` does, and read where `server::routing` says that reading is allowed.
//! What certainly was not done is asked of the next node; what may have been done is unknown.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use boomerang::propose::{Ask, Due as AskDue, Refused};
use boomerang::shard::{self, Change, Reply};
use boomerang::store::StoreError;
use boomerang::store::codec;
use boomerang::store::keys::{Key, Parsed, parse_state};
use boomerang::store::rows::{Role, TaskRow};
use boomerang_task::{
    Backoff, Callback, ClientId, DedupHash, GroupId, Missed, Policy, Protocol, Recurrence, Retry, TaskId,
};
use boomerang_wire::routing::Access;
use rand::RngExt;
use rand::rngs::SmallRng;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::node::Life;
use super::world::{World, chance};
use crate::history::{Answer, Call, Due, End, Process, Registration, Token, What};
use crate::payload::Payload;

/// Between two operations of one process.
const PAUSE_MS: (u64, u64) = (20, 400);
/// From a client to a node, or back.
const WAY_MS: (u64, u64) = (1, 6);
/// Nobody leads: asked again after this, for so long.
const AGAIN_MS: (u64, u64) = (20, 80);
const PATIENCE: Duration = Duration::from_secs(2);
/// A request without an answer is unknown after this.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// While things are broken, so many answers get lost.
const ANSWERS_LOST: f64 = 0.03;
/// How far ahead tasks are due.
const AHEAD_MS: (u64, u64) = (0, 2_500);
const DEDUP_TTL_MS: u64 = 3_600_000;
const RETRY_AFTER_MS: u64 = 150;
const RETRY_AFTER_MS_MAX: u64 = 600;
const RECURRING_MAX: usize = 2;
/// Before a process gives up to end what it began.
const TRIES_MAX: u32 = 50;
const ASKED_WHO_LEADS: f64 = 0.8;
/// Seldom: it is others who may have led, and may believe that they still do, that could show something old.
const READ_FROM_WHO_LEADS: f64 = 0.3;

/// A task of this process.
#[derive(Clone)]
struct Own {
    payload: Payload,
    task: TaskId,
    recurring: bool,
    next_version: u32,
}

pub struct Client {
    world: Arc<World>,
    process: Process,
    name: ClientId,
    rng: SmallRng,
    tokens: u64,
    keys: u64,
    own: Vec<Own>,
    policies: BTreeMap<(u32, &'static str), Arc<Policy>>,
}

impl Client {
    pub fn new(world: Arc<World>, process: Process) -> Self {
        let rng = chance(world.seed, 100 + u64::from(process));
        Self {
            world,
            process,
            name: format!("client-{process}").parse().expect("a valid name"),
            rng,
            tokens: 0,
            keys: 0,
            own: Vec::new(),
            policies: BTreeMap::new(),
        }
    }

    /// Asks until it is told to stop, and then ends what would never end.
    pub async fn run(mut self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            let pause = self.some_ms(PAUSE_MS);
            let _ = timeout(pause, stop.cancelled()).await;
            self.one().await;
        }
        let recurring: Vec<Own> = self.own.iter().filter(|own| own.recurring).cloned().collect();
        for own in recurring {
            for _ in 0..TRIES_MAX {
                if self.cancel(&own).await {
                    break;
                }
            }
        }
    }

    async fn one(&mut self) {
        match self.rng.random_range(0..100) {
            0..30 => self.one_shot("one-shot", 3, 0, false).await,
            30..36 => self.recurring().await,
            36..48 => self.dedup().await,
            48..52 => {
                let refusals = if self.rng.random_bool(0.5) { u32::MAX } else { 1 };
                self.one_shot("dead-letters", 2, refusals, false).await;
            }
            52..62 => self.one_shot("fenced", 4, 0, true).await,
            62..70 => {
                if let Some(own) = self.any_own() {
                    self.cancel(&own).await;
                }
            }
            70..80 => self.edit().await,
            80..94 => {
                if let Some(own) = self.any_own() {
                    self.get(&own).await;
                }
            }
            _ => self.list().await,
        }
    }

    fn some_ms(&mut self, (from, until): (u64, u64)) -> Duration {
        Duration::from_millis(self.rng.random_range(from..until))
    }

    fn token(&mut self) -> Token {
        self.tokens += 1;
        u64::from(self.process) * 1_000_000 + self.tokens
    }

    /// One of the last ones: those of long ago have ended.
    fn any_own(&mut self) -> Option<Own> {
        let some = self.own.len().min(6);
        (some > 0).then(|| self.own[self.own.len() - 1 - self.rng.random_range(0..some)].clone())
    }

    fn policy(&mut self, attempts: u32, receiver: &'static str) -> Arc<Policy> {
        let policy = self.policies.entry((attempts, receiver)).or_insert_with(|| {
            let callback = Callback::new(Protocol::Tcp, &format!("{receiver}:1")).expect("a valid endpoint");
            let retry = Retry {
                attempts_max: attempts,
                backoff: Backoff::Exponential,
                interval_ms: RETRY_AFTER_MS,
                interval_max_ms: RETRY_AFTER_MS_MAX,
                jitter_percent: 20,
            };
            Arc::new(Policy { callback, retry, dead_letter: None })
        });
        policy.clone()
    }

    fn due(&mut self) -> Due {
        let ahead_ms = self.rng.random_range(AHEAD_MS.0..AHEAD_MS.1);
        if self.rng.random_bool(0.5) { Due::In(ahead_ms) } else { Due::At(self.world.now_ms() + ahead_ms) }
    }

    fn registration(&mut self, load: &str, attempts: u32) -> Registration {
        Registration {
            token: self.token(),
            load: load.to_owned(),
            client: self.name.to_string(),
            due: self.due(),
            every_ms: None,
            missed: Missed::Once,
            count: None,
            key: None,
            attempts,
            refusals: 0,
        }
    }

    async fn one_shot(&mut self, load: &str, attempts: u32, refusals: u32, fenced: bool) {
        let registration = Registration { refusals, ..self.registration(load, attempts) };
        let payload = Payload { token: registration.token, version: 1, refusals, fenced };
        self.register(registration, payload).await;
    }

    async fn recurring(&mut self) {
        if self.own.iter().filter(|own| own.recurring).count() >= RECURRING_MAX {
            return;
        }
        let registration = self.registration("recurring", 3);
        let missed = [Missed::Once, Missed::Skip, Missed::All { max: 3 }][self.rng.random_range(0..3)];
        let every_ms = Some(self.rng.random_range(200..1_500));
        let count = self.rng.random_bool(0.5).then(|| self.rng.random_range(2..8));
        let payload = Payload { token: registration.token, version: 1, refusals: 0, fenced: false };
        self.register(Registration { every_ms, missed, count, ..registration }, payload).await;
    }

    /// The same again, until it is answered, and now and then once more.
    async fn dedup(&mut self) {
        self.keys += 1;
        let key = Some(format!("key-{}", self.keys));
        let registration = Registration { key, ..self.registration("dedup", 3) };
        let payload = Payload { token: registration.token, version: 1, refusals: 0, fenced: false };
        for _ in 0..4 {
            let answered = self.register(registration.clone(), payload).await;
            if answered && self.rng.random_bool(0.6) {
                return;
            }
        }
    }

    /// Whether it was answered.
    async fn register(&mut self, registration: Registration, payload: Payload) -> bool {
        let receiver = match registration.load.as_str() {
            "fenced" => "fenced",
            "dead-letters" => "refuses",
            _ => "plain",
        };
        let policy = self.policy(registration.attempts, receiver);
        let dedup = registration.key.as_ref().map(|key| {
            let hash = DedupHash::new(&self.name, key).expect("a valid key");
            (hash, DEDUP_TTL_MS)
        });
        let group = match &dedup {
            Some((hash, _)) => GroupId::of_shard(hash.shard(self.world.plan.shards)),
            None => GroupId(self.rng.random_range(1..=self.world.plan.shards)),
        };
        let (missed, count) = (registration.missed, registration.count);
        let recurrence =
            registration.every_ms.map(|every_ms| Recurrence { missed, count, ..Recurrence::every(every_ms) });
        let due = match registration.due {
            Due::In(delay_ms) => AskDue::After(delay_ms),
            Due::At(due_ms) => AskDue::At(due_ms),
        };
        let (client, bytes) = (self.name.clone(), payload.bytes());
        let ask = move || Ask::Register {
            client: client.clone(),
            policy: policy.clone(),
            due,
            recurrence,
            tags: None,
            dedup,
            numbered: None,
            payload: bytes.clone(),
        };
        let recurring = registration.every_ms.is_some();
        self.call(Call::Register(registration));
        match self.ask(group, ask).await {
            Ok(Reply::Registered { id, due_ms, duplicate }) => {
                let own = Own { payload, task: id, recurring, next_version: 2 };
                if !self.own.iter().any(|known| known.task == id) {
                    self.own.push(own.clone());
                }
                self.ok(Answer::Registered { task: id.to_string(), due_ms, duplicate });
                self.ask_others(&own);
                true
            }
            Ok(other) => unreachable!("a registration is never answered with {other:?}"),
            Err(refused) => {
                self.refused(&refused);
                false
            }
        }
    }

    /// Whether the task is known to have ended.
    async fn cancel(&mut self, own: &Own) -> bool {
        let (id, owner) = (own.task, Some(self.name.clone()));
        self.call(Call::Cancel { token: own.payload.token, task: id.to_string() });
        let answer = self.ask(GroupId::of_shard(id.shard()), move || Ask::Cancel { id, owner: owner.clone() }).await;
        match answer {
            Ok(Reply::Cancelled) => self.ok(Answer::Cancelled),
            Ok(Reply::TooLate { occurrence, attempt }) => self.ok(Answer::CancelledTooLate { occurrence, attempt }),
            Ok(Reply::NotFound) => self.ok(Answer::NotFound),
            Ok(other) => unreachable!("a cancellation is never answered with {other:?}"),
            Err(refused) => {
                self.refused(&refused);
                return false;
            }
        }
        self.ask_others(own);
        self.own.retain(|other| other.task != id);
        true
    }

    async fn edit(&mut self) {
        let Some(own) = self.any_own() else { return };
        let due_ms = self.world.now_ms() + self.rng.random_range(AHEAD_MS.0..AHEAD_MS.1);
        let payload = Payload { version: own.next_version, ..own.payload };
        if let Some(known) = self.own.iter_mut().find(|known| known.task == own.task) {
            known.next_version += 1;
        }
        let (id, owner) = (own.task, Some(self.name.clone()));
        let token = payload.token;
        self.call(Call::Edit { token, task: id.to_string(), due_ms, version: payload.version });
        let ask = move || Ask::Edit {
            id,
            owner: owner.clone(),
            version: None,
            due: Some(AskDue::At(due_ms)),
            change: Change { payload: Some(payload.bytes()), ..Change::default() },
        };
        match self.ask(GroupId::of_shard(id.shard()), ask).await {
            Ok(Reply::Edited { due_ms, .. }) => {
                self.ok(Answer::Edited { due_ms });
                self.ask_others(&own);
            }
            Ok(Reply::TooLate { occurrence, attempt }) => self.ok(Answer::EditTooLate { occurrence, attempt }),
            Ok(Reply::NotFound) => self.ok(Answer::NotFound),
            Ok(other) => unreachable!("an edit is never answered with {other:?}"),
            Err(refused) => self.refused(&refused),
        }
    }

    async fn get(&mut self, own: &Own) {
        let (id, group) = (own.task, GroupId::of_shard(own.task.shard()));
        self.call(Call::Get { token: own.payload.token, task: id.to_string() });
        let found = self.read(group, |life| found(life, id)).await;
        self.end(found.map_or_else(|| End::Fail("nobody answered".to_owned()), End::Ok));
    }

    /// Of a task that something was just answered about: whoever else would answer now must know it too. Nobody should,
    /// but for a moment when the lead changes; a leader of the past that takes its lease for valid would, and does not.
    fn ask_others(&self, own: &Own) {
        let group = GroupId::of_shard(own.task.shard());
        let leader = self.world.leader(group);
        for life in self.world.nodes().filter(|node| Some(*node) != leader).filter_map(|node| self.world.life(node)) {
            if life.router.may_serve(group, Access::Read) {
                self.call(Call::Get { token: own.payload.token, task: own.task.to_string() });
                self.ok(found(&life, own.task).expect("memory does not fail"));
            }
        }
    }

    /// Each shard's part from whoever leads it.
    async fn list(&mut self) {
        self.call(Call::List { client: self.name.to_string() });
        let mut tasks = Vec::new();
        for group in self.world.groups() {
            let name = self.name.clone();
            match self.read(group, |life| tasks_of(life, group, &name)).await {
                Some(part) => tasks.extend(part.into_iter().map(|id| id.to_string())),
                None => return self.end(End::Fail("nobody answered".to_owned())),
            }
        }
        self.ok(Answer::Listed { tasks });
    }

    fn call(&self, call: Call) {
        self.world.recorder.record(What::Call(self.process, call));
    }

    fn ok(&self, answer: Answer) {
        self.end(End::Ok(answer));
    }

    fn end(&self, end: End) {
        self.world.recorder.record(What::End(self.process, end));
    }

    fn refused(&self, refused: &Refused) {
        self.end(match refused {
            Refused::Unknown | Refused::Stopping => End::Unknown(refused.to_string()),
            Refused::NotLeader { .. } | Refused::Overloaded { .. } => End::Fail(refused.to_string()),
        });
    }

    /// A request or an answer is on its way.
    async fn way(&mut self) {
        sleep(self.some_ms(WAY_MS)).await;
    }

    /// Before it asks once more.
    async fn rest(&mut self) {
        sleep(self.some_ms(AGAIN_MS)).await;
    }

    /// Whoever leads, as far as is `known`, so often; or anybody.
    fn pick(&mut self, group: GroupId, known: f64) -> Option<Arc<Life>> {
        let known = self.world.leader(group).filter(|_| self.rng.random_bool(known));
        let node = known.unwrap_or_else(|| self.rng.random_range(1..=self.world.plan.nodes));
        self.world.life(node)
    }

    async fn ask(&mut self, group: GroupId, ask: impl Fn() -> Ask) -> Result<Reply, Refused> {
        let until = Instant::now() + PATIENCE;
        loop {
            self.way().await;
            let answer = match self.pick(group, ASKED_WHO_LEADS) {
                None => Err(Refused::NotLeader { group }),
                Some(life) => {
                    let asked = timeout(ANSWER_WITHIN, life.proposer.ask(group, ask()));
                    tokio::select! {
                        biased;
                        () = life.gone.cancelled() => Err(Refused::Unknown),
                        answer = asked => answer.unwrap_or(Err(Refused::Unknown)),
                    }
                }
            };
            if matches!(answer, Err(Refused::NotLeader { .. })) && Instant::now() < until {
                self.rest().await;
                continue;
            }
            self.way().await;
            if self.world.receivers.is_broken() && self.rng.random_bool(ANSWERS_LOST) {
                return Err(Refused::Unknown);
            }
            return answer;
        }
    }

    /// `None` when nobody may answer, for long.
    async fn read<T>(&mut self, group: GroupId, read: impl Fn(&Life) -> Result<T, StoreError>) -> Option<T> {
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            self.way().await;
            if let Some(life) = self.pick(group, READ_FROM_WHO_LEADS) {
                let router = &life.router;
                let may =
                    async { router.may_serve(group, Access::Read) || router.can_serve(group, Access::Read).await };
                let may = tokio::select! {
                    biased;
                    () = life.gone.cancelled() => false,
                    may = may => may,
                };
                if may {
                    let found = read(&life).expect("memory does not fail");
                    self.way().await;
                    return Some(found);
                }
            }
            self.rest().await;
        }
        None
    }
}

/// What a get of the task is answered with.
fn found(life: &Life, id: TaskId) -> Result<Answer, StoreError> {
    let found = shard::read_task(&life.store, GroupId::of_shard(id.shard()), id)?;
    Ok(found.map_or(Answer::NotFound, |(task, at)| {
        let version = Payload::read(&task.payload).map_or(0, |payload| payload.version);
        Answer::Found { due_ms: at.due_ms, occurrence: at.occurrence, attempt: at.attempt, version }
    }))
}

/// The tasks of `group`, with their rows.
pub fn tasks_in(life: &Life, group: GroupId) -> Result<Vec<(TaskId, TaskRow)>, StoreError> {
    let (from, until) = Key::group_range(group);
    let mut tasks = Vec::new();
    for (key, value) in life.store.scan_state(&from, &until, usize::MAX)? {
        if let Some((_, Parsed::Task(id))) = parse_state(&key) {
            tasks.push((id, codec::decode("a task", &value)?));
        }
    }
    Ok(tasks)
}

fn tasks_of(life: &Life, group: GroupId, client: &ClientId) -> Result<Vec<TaskId>, StoreError> {
    let all = tasks_in(life, group)?.into_iter();
    let own = all.filter(|(_, row)| row.client == *client && matches!(row.role, Role::Own));
    Ok(own.map(|(id, _)| id).collect())
}
