//! A cluster of several nodes: who leads what, which node a request goes to, and what is sent again.
//!
//! ```text
//!   request --> shard? --> map: its leader --> connection to that node --> answer
//!                  ^                                                         |
//!                  +--- NOT_LEADER, no connection, lost and repeatable ------+   until the request's deadline
//! ```
//!
//! The map is fetched after the first handshake that names more than one node, and again when a node says that it does
//! not lead, when a connection was lost, and when it is old. It may be wrong at any time: a node that does not lead says
//! so, and says who does. With one node none of this happens.
//!
//! What a request may be sent again for is decided in [`Judgement::of`], by the rules of [`boomerang_wire::routing`] that the
//! nodes keep as well.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use boomerang_task::locks::{Mutex, RwLock};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

use super::connection::{AnswerResult, Connection, Sent};
use super::link::{Link, Seen};
use super::senders::{Numbers, Senders};
use super::{ClientError, Options, session};
use boomerang_task::{GroupId, Pauses, ShardId, TaskId};
use boomerang_wire::answers::{Proof, Refused, Verdict};
use boomerang_wire::operations::{effect, target};
use boomerang_wire::proto::{self, Detail, Status, boomerang_envelope::Payload};
use boomerang_wire::routing::{self, Asker, Target};

/// A failover takes about a second: the first tries come quickly, the later ones do not add to the load.
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_millis(400);
/// So long is waited for a node that is busy. One that names a longer time has another reason, and the caller should know.
const ROOM_WITHIN: Duration = Duration::from_millis(500);
/// Thousands of requests that fail together ask for the map once.
const MAP_FRESH_FOR: Duration = Duration::from_millis(25);
const MAP_OLD_AFTER: Duration = Duration::from_secs(30);
/// One node among others is not worth a longer wait.
const CONNECT_WITHIN: Duration = Duration::from_secs(2);
/// Registrations of so many milliseconds go to one shard of the node they go to, by the clock, so that those of many
/// clients meet in one log entry. How well the clocks agree decides how many do, and nothing else.
const TOGETHER_MS: u128 = 50;
/// A request with so many tasks fills an entry by itself, and goes to any of these shards.
const TASKS_ALONE: usize = 256;
/// Sessions that turn out to be gone, one after the other, before the caller hears of it.
const SESSIONS_MAX: usize = 3;

/// Who leads one shard.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Lead {
    /// Empty while nobody is known to.
    address: String,
    term: u64,
}

/// Who leads what.
#[derive(Debug, Clone)]
pub(super) struct Map {
    shards: Vec<Lead>,
    addresses: Vec<String>,
    fetched: Instant,
}

impl Map {
    fn new(message: proto::ShardMapResponse, fetched: Instant) -> Self {
        let addresses: BTreeMap<u64, String> =
            message.nodes.into_iter().map(|node| (node.node_id, node.address)).collect();
        let lead = |leader: proto::ShardLeader| Lead {
            address: addresses.get(&leader.node_id).cloned().unwrap_or_default(),
            term: leader.term,
        };
        let shards = message.shards.into_iter().map(lead).collect();
        Self { shards, addresses: addresses.into_values().collect(), fetched }
    }

    fn shards_count(&self) -> u16 {
        u16::try_from(self.shards.len()).unwrap_or(u16::MAX)
    }

    fn leader(&self, shard: ShardId) -> Option<&str> {
        let lead = self.shards.get(usize::from(shard.0))?;
        (!lead.address.is_empty()).then_some(lead.address.as_str())
    }

    /// The shards that the node at this address leads.
    pub fn led_at(&self, address: &str) -> Vec<ShardId> {
        let shards = (0..).map(ShardId).zip(&self.shards);
        shards.filter(|(_, lead)| lead.address == address).map(|(shard, _)| shard).collect()
    }

    /// A node that leads shards: those that lead more have more turns.
    fn leader_in_turn(&self, turn: usize) -> Option<&str> {
        let count = self.shards.len().max(1);
        (0..count).find_map(|step| {
            let shard = ShardId(u16::try_from((turn + step) % count).expect("no more shards than fit"));
            self.leader(shard)
        })
    }

    /// A node has said who leads. Returns whether that is news.
    fn learn(&mut self, detail: &Detail) -> bool {
        let Some(lead) = self.shards.get_mut(detail.shard as usize) else { return false };
        if detail.term < lead.term || detail.leader_address.is_empty() || lead.address == detail.leader_address {
            return false;
        }
        *lead = Lead { address: detail.leader_address.clone(), term: detail.term };
        true
    }
}

/// Which node a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    /// The leader of this shard.
    Shard(ShardId),
    /// Any that leads shards.
    AnyLeader,
    Any,
}

/// What the clones of a client share.
pub(super) struct Hub {
    options: Arc<Options>,
    inflight: Arc<Semaphore>,
    seen: Arc<Seen>,
    /// To any node: the only link when there is one node.
    home: Link,
    /// To the nodes the map names.
    links: Mutex<BTreeMap<String, Arc<Link>>>,
    map: RwLock<Option<Arc<Map>>>,
    /// Held while the map is being fetched.
    fetching: tokio::sync::Mutex<()>,
    refreshing: AtomicBool,
    turn: AtomicUsize,
    senders: Arc<Senders>,
}

impl Hub {
    pub async fn connect(options: Options) -> Result<Self, ClientError> {
        let options = Arc::new(options);
        let inflight = Arc::new(Semaphore::new(options.inflight_max));
        let seen = Arc::new(Seen::default());
        let home = Link::new(options.clone(), options.addresses.clone(), inflight.clone(), seen.clone());
        home.begin().await?;
        Ok(Self {
            options,
            inflight,
            seen,
            home,
            links: Mutex::default(),
            map: RwLock::default(),
            fetching: tokio::sync::Mutex::default(),
            refreshing: AtomicBool::new(false),
            turn: AtomicUsize::new(rand::random_range(0..usize::from(u16::MAX))),
            senders: Senders::new(),
        })
    }

    pub fn options(&self) -> &Arc<Options> {
        &self.options
    }

    pub fn inflight(&self) -> &Arc<Semaphore> {
        &self.inflight
    }

    pub fn home(&self) -> &Link {
        &self.home
    }

    pub fn is_cluster(&self) -> bool {
        self.seen.nodes.load(Ordering::Relaxed) > 1
    }

    pub fn end(&self) {
        self.home.end();
        let links = std::mem::take(&mut *self.links.lock());
        links.values().for_each(|link| link.end());
    }

    /// Sends a request, and returns what follows it until it has an answer.
    pub async fn begin(
        self: Arc<Self>,
        mut payload: Payload,
    ) -> Result<impl Future<Output = AnswerResult> + Send + use<>, ClientError> {
        let deadline = self.home.deadline();
        let mut numbers = None;
        if let Payload::RegistrationRequest(task) = &mut payload
            && task.dedup_key.is_empty()
        {
            let map = self.map(deadline).await?;
            let turn = self.turn.fetch_add(1, Ordering::Relaxed);
            numbers = map.leader_in_turn(turn).and_then(|node| self.number(&map, node, 1));
            task.origin = numbers.as_ref().map(|(origin, _)| origin.clone());
        }
        let first = self.send(payload, deadline).await?;
        Ok(async move {
            let mut answer = self.follow(first, deadline, None).await;
            if numbers.is_some()
                && let Ok(Payload::RegistrationResponse(answer)) = &mut answer
            {
                // It was sent again by us, and not by the caller.
                answer.duplicate = false;
            }
            answer
        })
    }

    /// Numbers for registrations that go to `node`, in one of the shards that it leads. `None` when they are not to be sent
    /// again, or it leads none.
    fn number(&self, map: &Map, node: &str, count: usize) -> Option<(proto::Origin, Numbers)> {
        if !self.options.retry_registrations {
            return None;
        }
        let slice = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() / TOGETHER_MS;
        let led = map.led_at(node);
        // Multiplied by an odd number without a pattern: whoever registers at regular intervals meets all shards.
        let slice = match count {
            ..TASKS_ALONE => (slice as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32,
            _ => rand::random::<u32>().into(),
        };
        let shard = *led.get(usize::try_from(slice).expect("32 bits") % led.len().max(1))?;
        Some(self.senders.open(shard, count))
    }

    /// Whether what the only node has answered is no answer yet: see [`Self::again`].
    pub fn is_for_again(&self, payload: &Payload, answer: &AnswerResult) -> bool {
        match Judgement::of(payload, answer) {
            Judgement::NewSession => true,
            Judgement::NoRoom { .. } => self.options.wait_for_room,
            Judgement::Final | Judgement::Redirected(_) | Judgement::Again => false,
        }
    }

    /// The answer to what the only node did not do for want of a session or of room, and is asked for again.
    pub async fn again(
        self: Arc<Self>,
        (mut connection, mut sent): (Arc<Connection>, Sent),
        mut answer: AnswerResult,
        deadline: Instant,
    ) -> AnswerResult {
        let mut sessions = 0;
        loop {
            let judgement = Judgement::of(&sent.payload, &answer);
            if !self.take_care_of(judgement, &connection, &sent, &mut sessions, deadline).await? {
                return answer;
            }
            if Instant::now() >= deadline {
                return answer;
            }
            let sending = async {
                let permit = self.inflight.clone().acquire_owned().await.ok()?;
                self.home.send(sent.payload, Some(permit)).await.ok()
            };
            // That it was not done is worth more to the caller than that it could not be sent once more.
            (connection, sent) = match timeout_at(deadline, sending).await {
                Ok(Some(next)) => next,
                Ok(None) | Err(_) => return answer,
            };
            answer = match timeout_at(deadline, &mut sent.answer).await {
                Ok(answer) => answer.unwrap_or(Err(ClientError::Closed)),
                Err(_) => return Err(ClientError::Timeout { after: self.options.request_timeout }),
            };
        }
    }

    /// Sees to what a request that was not done was refused for: returns whether it may go out again now.
    async fn take_care_of(
        &self,
        judgement: Judgement,
        connection: &Arc<Connection>,
        sent: &Sent,
        sessions: &mut usize,
        deadline: Instant,
    ) -> Result<bool, ClientError> {
        match judgement {
            Judgement::NewSession => {
                *sessions += 1;
                if *sessions == SESSIONS_MAX {
                    return Ok(false);
                }
                match session::renew(connection, &self.options, sent.session_number).await {
                    // A new connection brings a new session.
                    Ok(()) | Err(ClientError::ConnectionLost { .. } | ClientError::Protocol(_)) => Ok(true),
                    Err(error) => Err(error),
                }
            }
            Judgement::NoRoom { retry_after } => {
                let at = Instant::now() + retry_after.mul_f64(rand::random_range(1.0..1.5));
                if !self.options.wait_for_room || at >= deadline {
                    return Ok(false);
                }
                tokio::time::sleep_until(at).await;
                Ok(true)
            }
            Judgement::Final | Judgement::Redirected(_) | Judgement::Again => Ok(false),
        }
    }

    /// Waits for the answer, and sends the request again as long as that is of use and does no harm. `unknown`: what
    /// was heard when it was sent before and may have been done. Then only a yes says more than that.
    async fn follow(
        self: &Arc<Self>,
        first: (Arc<Connection>, Sent),
        deadline: Instant,
        unknown: Option<AnswerResult>,
    ) -> AnswerResult {
        let (answer, unknown) = self.pursue(first, deadline, unknown).await;
        worth_more(answer, unknown)
    }

    /// The last answer, and what was heard before it that left open whether the request was done.
    async fn pursue(
        self: &Arc<Self>,
        first: (Arc<Connection>, Sent),
        deadline: Instant,
        mut unknown: Option<AnswerResult>,
    ) -> (AnswerResult, Option<AnswerResult>) {
        let (mut connection, mut sent) = first;
        let mut pauses = pauses();
        let mut redirected = false;
        let mut sessions = 0;
        loop {
            let sent_at = Instant::now();
            let Ok(answer) = timeout_at(deadline, &mut sent.answer).await else {
                return (Err(ClientError::Timeout { after: self.options.request_timeout }), unknown);
            };
            let answer = answer.unwrap_or_else(|_| Err(ClientError::Closed));
            match Judgement::of(&sent.payload, &answer) {
                Judgement::Final => return (answer, unknown),
                Judgement::Redirected(detail) => {
                    // The first news is followed at once, unless two nodes take each other for the leader.
                    if !self.learn(&detail) || redirected {
                        let at_most = Some(detail.retry_after_ms).filter(|ms| *ms > 0).map(Duration::from_millis);
                        pause(&mut pauses, at_most, deadline).await;
                        self.refresh_map(sent_at, deadline).await;
                    }
                    redirected = true;
                }
                Judgement::Again => {
                    unknown = effect(&sent.payload).changes_something().then(|| answer.clone());
                    pause(&mut pauses, None, deadline).await;
                    self.refresh_map(sent_at, deadline).await;
                }
                refused => match self.take_care_of(refused, &connection, &sent, &mut sessions, deadline).await {
                    Ok(true) => {}
                    Ok(false) => return (answer, unknown),
                    Err(error) => return (Err(error), unknown),
                },
            }
            if Instant::now() >= deadline {
                return (answer, unknown);
            }
            // What became of it before is worth more to the caller than that it could not be sent once more.
            match self.send(sent.payload, deadline).await {
                Ok(next) => (connection, sent) = next,
                Err(_) => return (answer, unknown),
            }
        }
    }

    /// Sends to whoever it is for, as soon as there is a connection.
    async fn send(
        self: &Arc<Self>,
        mut payload: Payload,
        deadline: Instant,
    ) -> Result<(Arc<Connection>, Sent), ClientError> {
        loop {
            let connection = self.connection(&payload, deadline).await?;
            match connection.send(payload, None) {
                Ok(sent) => return Ok((connection, sent)),
                Err(unsent) => payload = unsent.payload,
            }
        }
    }

    async fn connection(
        self: &Arc<Self>,
        payload: &Payload,
        deadline: Instant,
    ) -> Result<Arc<Connection>, ClientError> {
        let mut pauses = pauses();
        loop {
            let asked_at = Instant::now();
            let map = self.map(deadline).await?;
            let wished = match self.wish(payload, &map) {
                Wish::Any => return self.home.connection(deadline).await,
                Wish::Shard(shard) => map.leader(shard),
                Wish::AnyLeader => map.leader_in_turn(self.turn.fetch_add(1, Ordering::Relaxed)),
            };
            let mut why = None;
            if let Some(address) = wished {
                if let Some(home) = self.home.open_connection().filter(|home| home.address() == address) {
                    return Ok(home);
                }
                match timeout_at(deadline, self.link(address).try_connection()).await {
                    Ok(Ok(connection)) => return Ok(connection),
                    Ok(Err(error)) if error.is_final() => return Err(error),
                    Ok(Err(error)) => why = Some(error),
                    Err(_) => {}
                }
            }
            if Instant::now() >= deadline {
                return Err(why.unwrap_or_else(|| no_leader(&self.options)));
            }
            pause(&mut pauses, None, deadline).await;
            self.refresh_map(asked_at, deadline).await;
        }
    }

    fn wish(&self, payload: &Payload, map: &Map) -> Wish {
        let of_group = |group: GroupId| group.shard().map_or(Wish::Any, Wish::Shard);
        let asker = Asker { client: self.seen.client_id.get(), shards: map.shards_count() };
        match (target(payload, &asker), payload) {
            (Target::Leader(group, _), _) => of_group(group),
            (Target::AnyLeader, _) => Wish::AnyLeader,
            // Those of one node are in one batch, as far as that is known: see `split`.
            (Target::Batch, Payload::RegistrationBatch(batch)) => {
                let said =
                    batch.origin.as_ref().and_then(|origin| routing::group_of_origin(origin, map.shards_count()).ok());
                let shard = said.and_then(GroupId::shard);
                let of_tasks = || batch.tasks.iter().find_map(|task| self.shard_of(task, map));
                shard.or_else(of_tasks).map_or(Wish::AnyLeader, Wish::Shard)
            }
            (Target::Cancellations, Payload::CancellationBatch(batch)) => {
                let first = batch.task_ids.first().and_then(|id| id.parse().ok());
                let shard = first.map(|id: TaskId| id.shard()).filter(|shard| shard.0 < map.shards_count());
                shard.map_or(Wish::Any, Wish::Shard)
            }
            _ => Wish::Any,
        }
    }

    /// Where a task has to go, if that is not left to the node.
    fn shard_of(&self, task: &proto::Task, map: &Map) -> Option<ShardId> {
        let group = routing::group_of_task(task, self.seen.client_id.get(), map.shards_count());
        group.ok().flatten().and_then(GroupId::shard)
    }

    fn link(&self, address: &str) -> Arc<Link> {
        let mut links = self.links.lock();
        if let Some(link) = links.get(address) {
            return link.clone();
        }
        let connect_timeout = self.options.connect_timeout.min(CONNECT_WITHIN);
        let options = Arc::new(Options { connect_timeout, ..(*self.options).clone() });
        let addresses = vec![address.to_owned()];
        let link = Arc::new(Link::new(options, addresses, self.inflight.clone(), self.seen.clone()));
        links.insert(address.to_owned(), link.clone());
        link
    }

    fn known_map(&self) -> Option<Arc<Map>> {
        self.map.read().clone()
    }

    /// The map there is; an old one is used once more, and fetched anew beside that.
    async fn map(self: &Arc<Self>, deadline: Instant) -> Result<Arc<Map>, ClientError> {
        if let Some(map) = self.known_map() {
            if map.fetched.elapsed() > MAP_OLD_AFTER && !self.refreshing.swap(true, Ordering::Relaxed) {
                let hub = self.clone();
                tokio::spawn(async move {
                    hub.refresh_map(Instant::now(), hub.home.deadline()).await;
                    hub.refreshing.store(false, Ordering::Relaxed);
                });
            }
            return Ok(map);
        }
        self.fetch_map(Instant::now(), deadline).await
    }

    /// Fetches the map, unless somebody has done so since `seen_at`. What goes wrong shows itself to the request.
    async fn refresh_map(&self, seen_at: Instant, deadline: Instant) {
        let _ = self.fetch_map(seen_at, deadline).await;
    }

    async fn fetch_map(&self, seen_at: Instant, deadline: Instant) -> Result<Arc<Map>, ClientError> {
        let timed_out = || ClientError::Timeout { after: self.options.request_timeout };
        let _one_at_a_time = timeout_at(deadline, self.fetching.lock()).await.map_err(|_| timed_out())?;
        if let Some(map) = self.known_map()
            && (map.fetched > seen_at || map.fetched.elapsed() < MAP_FRESH_FOR)
        {
            return Ok(map);
        }
        let fetched = Instant::now();
        let answer = timeout_at(deadline, self.ask_for_map(deadline)).await.map_err(|_| timed_out())??;
        let map = Arc::new(Map::new(answer, fetched));
        self.home.add_addresses(map.addresses.iter());
        *self.map.write() = Some(map.clone());
        Ok(map)
    }

    async fn ask_for_map(&self, deadline: Instant) -> Result<proto::ShardMapResponse, ClientError> {
        let mut sessions = 0;
        loop {
            let connection = self.home.connection(deadline).await?;
            let session_number = connection.session_number();
            let answer = connection.call(Payload::ShardMapRequest(proto::ShardMapRequest {})).await?;
            match (answer, sessions) {
                (Payload::ShardMapResponse(answer), _) if answer.status == Status::Ok as i32 => return Ok(answer),
                (answer, 0) if proof_of(&answer) == Proof::NotDone(Refused::NoSession) => {
                    sessions += 1;
                    session::renew(&connection, &self.options, session_number).await?;
                }
                (answer, _) => {
                    session::check(&answer)?;
                    return Err(ClientError::Protocol("the wrong kind of answer to a request for the map".into()));
                }
            }
        }
    }

    /// Who leads what, as the nodes know now.
    pub async fn fresh_map(&self) -> Result<Arc<Map>, ClientError> {
        self.fetch_map(Instant::now(), self.home.deadline()).await
    }

    /// Returns whether that is news.
    pub fn learn(&self, detail: &Detail) -> bool {
        let mut map = self.map.write();
        map.as_mut().is_some_and(|map| Arc::make_mut(map).learn(detail))
    }

    /// Tasks of a batch by the node they go to, as far as is known. Those nobody is known to lead go together.
    pub async fn split(self: &Arc<Self>, tasks: Vec<proto::Task>) -> Result<Vec<PartOfBatch>, ClientError> {
        let map = self.map(self.home.deadline()).await?;
        let mut parts: BTreeMap<Option<&str>, PartOfBatch> = BTreeMap::new();
        let mut any = PartOfBatch::default();
        for (place, task) in tasks.into_iter().enumerate() {
            let part = match self.shard_of(&task, &map) {
                Some(shard) => parts.entry(map.leader(shard)).or_default(),
                None => &mut any,
            };
            part.places.push(place);
            part.tasks.push(task);
        }
        // Without keys they stay together, in the shard of one log entry.
        let node = map.leader_in_turn(self.turn.fetch_add(1, Ordering::Relaxed));
        if let Some(node) = node.filter(|_| !any.tasks.is_empty()) {
            any.numbers = self.number(&map, node, any.tasks.len());
        }
        let parts = parts.into_values().chain([any]);
        Ok(parts.filter(|part| !part.tasks.is_empty()).collect())
    }

    /// The places of these tasks by the node that leads them, as far as is known.
    pub async fn split_ids(self: &Arc<Self>, task_ids: &[TaskId]) -> Result<Vec<Vec<usize>>, ClientError> {
        let map = self.map(self.home.deadline()).await?;
        let mut by_node: BTreeMap<Option<&str>, Vec<usize>> = BTreeMap::new();
        for (place, task_id) in task_ids.iter().enumerate() {
            by_node.entry(map.leader(task_id.shard())).or_default().push(place);
        }
        Ok(by_node.into_values().collect())
    }

    /// Stores a part of a batch whose tasks are all for one node as far as is known: each is answered for by itself.
    pub async fn begin_part(
        self: Arc<Self>,
        mut tasks: Vec<proto::Task>,
        numbers: Option<(proto::Origin, Numbers)>,
    ) -> Result<impl Future<Output = Vec<AnswerOfOne>> + Send + use<>, ClientError> {
        let deadline = self.home.deadline();
        let origin = numbers.as_ref().map(|(origin, _)| origin.clone());
        let payload = Payload::RegistrationBatch(proto::RegistrationBatch { tasks: tasks.clone(), origin });
        let first = self.send(payload, deadline).await?;
        // Each may have to go on by itself.
        if let Some((origin, _)) = &numbers {
            for (task, place) in tasks.iter_mut().zip(0..) {
                task.origin = Some(proto::Origin { number: origin.number + place, ..origin.clone() });
            }
        }
        Ok(async move {
            // Until all are answered.
            let _numbers = numbers;
            let count = tasks.len();
            let (answer, unknown) = self.pursue(first, deadline, None).await;
            // When the batch was sent before, each of its tasks may have been stored then.
            let unknown = unknown.map(|unknown| match unknown {
                Ok(answer) => session::check(&answer).err().unwrap_or_else(|| no_leader(&self.options)),
                Err(error) => error,
            });
            match answer {
                Ok(Payload::RegistrationBatchResponse(answer)) if answer.responses.len() == count => {
                    let answers = answer.responses.into_iter().zip(tasks);
                    let before = || unknown.clone().map(Err);
                    let settled = answers.map(|(answer, task)| self.settle_one(answer, task, deadline, before()));
                    futures::future::join_all(settled).await
                }
                Ok(Payload::RegistrationBatchResponse(answer)) if answer.status == Status::Ok as i32 => {
                    let got = answer.responses.len();
                    vec![Err(ClientError::Protocol(format!("{got} results for {count} registrations"))); count]
                }
                Ok(answer) => {
                    let wrong = || ClientError::Protocol("the wrong kind of answer to a batch".into());
                    let error = unknown.or_else(|| session::check(&answer).err());
                    vec![Err(error.unwrap_or_else(wrong)); count]
                }
                Err(error) => vec![Err(unknown.unwrap_or(error)); count],
            }
        })
    }

    /// One of a batch that this node does not lead any more goes on by itself.
    async fn settle_one(
        self: &Arc<Self>,
        answer: proto::RegistrationResponse,
        task: proto::Task,
        deadline: Instant,
        mut unknown: Option<AnswerResult>,
    ) -> AnswerOfOne {
        let payload = Payload::RegistrationRequest(task);
        let wrapped = Ok(Payload::RegistrationResponse(answer));
        match Judgement::of(&payload, &wrapped) {
            Judgement::Redirected(detail) => {
                self.learn(&detail);
            }
            Judgement::Again => unknown = Some(wrapped.clone()),
            Judgement::Final | Judgement::NewSession | Judgement::NoRoom { .. } => {
                return only_answer(worth_more(wrapped, unknown));
            }
        }
        match self.send(payload, deadline).await {
            Ok(first) => only_answer(self.follow(first, deadline, unknown).await),
            Err(_) => only_answer(worth_more(wrapped, unknown)),
        }
    }
}

/// What became of one task of a batch.
pub(super) type AnswerOfOne = Result<proto::RegistrationResponse, ClientError>;

fn only_answer(answer: AnswerResult) -> AnswerOfOne {
    match answer? {
        Payload::RegistrationResponse(answer) => Ok(answer),
        _ => Err(ClientError::Protocol("the wrong kind of answer to a registration".into())),
    }
}

fn no_leader(options: &Options) -> ClientError {
    let text = "nobody leads what this is about";
    ClientError::connect(&options.addresses.join(" or "), std::io::Error::other(text))
}

/// Tasks of a batch that go to one node.
#[derive(Default)]
pub(super) struct PartOfBatch {
    /// Of each in the batch.
    pub places: Vec<usize>,
    pub tasks: Vec<proto::Task>,
    /// Of those without a key of the caller's.
    pub numbers: Option<(proto::Origin, Numbers)>,
}

/// What a busy node refuses, and has room for soon.
fn waits_for_room(payload: &Payload) -> bool {
    matches!(
        payload,
        Payload::RegistrationRequest(_)
            | Payload::RegistrationBatch(_)
            | Payload::UpdateTaskRequest(_)
            | Payload::ListTasksRequest(_)
            | Payload::ListDeadLettersRequest(_)
    )
}

fn proof_of(answer: &Payload) -> Proof {
    // What is no answer proves nothing of the request; its caller says what came.
    Verdict::of(answer).map_or(Proof::NotDone(Refused::Itself), |verdict| verdict.proves())
}

fn worth_more(answer: AnswerResult, unknown: Option<AnswerResult>) -> AnswerResult {
    let done = |answer: &AnswerResult| answer.as_ref().is_ok_and(|answer| proof_of(answer) == Proof::Done);
    routing::what_to_tell(answer, done, unknown)
}

/// What an answer, or the lack of one, means for the request.
#[derive(Debug, PartialEq)]
enum Judgement {
    /// It is what the caller gets.
    Final,
    /// Not done: the node does not know the session.
    NewSession,
    /// Not done: another node leads, or nobody.
    Redirected(Detail),
    /// Not done: the node will have room for it soon.
    NoRoom { retry_after: Duration },
    /// Perhaps done, and may be done again.
    Again,
}

impl Judgement {
    fn of(request: &Payload, answer: &AnswerResult) -> Self {
        let detail = |answer| Verdict::of(answer).and_then(|verdict| verdict.detail).cloned().unwrap_or_default();
        match answer.as_ref().map(|answer| (proof_of(answer), answer)) {
            Ok((Proof::NotDone(Refused::NoRoom { retry_after }), _))
                if retry_after <= ROOM_WITHIN && waits_for_room(request) =>
            {
                Judgement::NoRoom { retry_after }
            }
            Ok((Proof::NotDone(Refused::NoSession), _)) => Judgement::NewSession,
            Ok((Proof::NotDone(Refused::NotLeader), answer)) => Judgement::Redirected(detail(answer)),
            Ok((Proof::Nothing, _)) | Err(ClientError::ConnectionLost { .. }) if effect(request).may_be_repeated() => {
                Judgement::Again
            }
            _ => Judgement::Final,
        }
    }
}

const fn pauses() -> Pauses {
    Pauses::new(PAUSE_MIN, PAUSE_MAX)
}

/// Lets a pause pass, or as much of it as is left; with `at_most`, no more than that: the node has said that it is enough.
async fn pause(pauses: &mut Pauses, at_most: Option<Duration>, deadline: Instant) {
    let pause = pauses.next(rand::random());
    let pause = at_most.map_or(pause, |most| pause.min(most));
    tokio::time::sleep_until((Instant::now() + pause).min(deadline)).await;
}

#[cfg(test)]
mod tests {
    use super::super::fake::{self, Cluster};
    use super::super::{Cancelled, Client, Dedup, Registration};
    use super::*;

    fn lead(node_id: u64, term: u64) -> proto::ShardLeader {
        proto::ShardLeader { node_id, term }
    }

    fn not_leader(address: &str, term: u64) -> Detail {
        Detail { leader_address: address.into(), shard: 0, term, ..Default::default() }
    }

    #[test]
    fn a_map_learns_from_later_terms_only() {
        let nodes = (1..=2).map(|n| proto::NodeAddress { node_id: n, address: format!("h:{n}") }).collect();
        let shards = vec![lead(1, 3), lead(0, 0), lead(2, 1)];
        let mut map = Map::new(proto::ShardMapResponse { shards, nodes, ..Default::default() }, Instant::now());
        assert_eq!((map.leader(ShardId(0)), map.leader(ShardId(1)), map.leader(ShardId(9))), (Some("h:1"), None, None));
        assert!(!map.learn(&not_leader("h:2", 2)), "an old leader");
        assert!(!map.learn(&not_leader("", 9)), "nobody");
        assert!(map.learn(&not_leader("h:2", 4)));
        assert!(!map.learn(&not_leader("h:2", 4)), "no news any more");
        let turns: Vec<_> = (0..4).map(|turn| map.leader_in_turn(turn)).collect();
        assert_eq!(turns, [Some("h:2"); 4], "whoever leads nothing has no turn");
    }

    #[test]
    fn only_what_does_no_harm_is_sent_again() {
        let keyed = proto::Task { dedup_key: "k".into(), ..Default::default() };
        let keyed = Payload::RegistrationRequest(keyed);
        let unkeyed = Payload::RegistrationRequest(proto::Task::default());
        let cancel = Payload::CancellationRequest(proto::CancellationRequest::default());
        let get = Payload::GetTaskRequest(proto::GetTaskRequest::default());
        let lost = || Err(ClientError::ConnectionLost { address: "h:1".into(), reason: "reset".into() });
        let maybe = |detail| {
            let status = Status::Error.into();
            Ok(Payload::CancellationResponse(proto::CancellationResponse { status, detail, ..Default::default() }))
        };
        for (request, again) in [(&keyed, true), (&unkeyed, false), (&cancel, false), (&get, true)] {
            let expected = if again { Judgement::Again } else { Judgement::Final };
            assert_eq!(Judgement::of(request, &lost()), expected, "{request:?}");
            let answer = maybe(Some(Detail { maybe_done: true, ..Default::default() }));
            assert_eq!(Judgement::of(request, &answer), expected, "{request:?}");
            assert_eq!(Judgement::of(request, &maybe(None)), Judgement::Final);
            let slow = Err(ClientError::Timeout { after: Duration::ZERO });
            assert_eq!(Judgement::of(request, &slow), Judgement::Final, "there is no time left");
            let gone = Ok(fake::refused(Status::SessionExpired, "gone"));
            assert_eq!(Judgement::of(request, &gone), Judgement::NewSession);
        }
    }

    #[test]
    fn a_refusal_after_an_answer_that_was_lost_is_no_proof() {
        let lost = || Err(ClientError::ConnectionLost { address: "h:1".into(), reason: "reset".into() });
        let refused = || Ok(fake::refused(Status::NotLeader, "nobody leads"));
        assert!(worth_more(refused(), Some(lost())).unwrap_err().is_unknown());
        assert!(worth_more(Err(ClientError::Closed), Some(lost())).unwrap_err().is_unknown());
        assert_eq!(worth_more(Ok(fake::registered(7)), Some(lost())).unwrap(), fake::registered(7));
        assert_eq!(worth_more(refused(), None).unwrap(), refused().unwrap());
    }

    /// Tells the first `refused` messages to come back later.
    async fn busy_node(refused: usize, retry_after_ms: u64) -> Options {
        let node = fake::Fake::start().await;
        let options = node.options();
        let mut asked = 0;
        node.serve(move |payload| {
            asked += 1;
            let (status, detail) = match asked > refused {
                true => (Status::Ok, None),
                false => (Status::Overloaded, Some(Detail { retry_after_ms, ..Default::default() })),
            };
            let one = || proto::RegistrationResponse {
                task_id: fake::task_id(7).to_string(),
                scheduled_time_ms: 2,
                ..Default::default()
            };
            match payload {
                Payload::RegistrationRequest(_) => Payload::RegistrationResponse(proto::RegistrationResponse {
                    status: status.into(),
                    detail,
                    ..one()
                }),
                Payload::RegistrationBatch(batch) => {
                    let responses = batch.tasks.iter().map(|_| one()).collect();
                    let status = status.into();
                    Payload::RegistrationBatchResponse(proto::RegistrationBatchResponse {
                        responses,
                        status,
                        detail,
                        ..Default::default()
                    })
                }
                other => panic!("not asked for here: {other:?}"),
            }
        });
        options
    }

    #[tokio::test]
    async fn a_busy_node_is_asked_again() {
        let client = async |refused, retry_after_ms, change: fn(&mut Options)| {
            let mut options = busy_node(refused, retry_after_ms).await;
            change(&mut options);
            Client::connect(options).await.unwrap()
        };
        let batch = || vec![Registration::default(); 3];
        let one = client(2, 5, |_| {}).await.register(Registration::default()).await;
        assert_eq!(one.unwrap().due_ms, 2);
        let all = client(2, 5, |_| {}).await.register_batch(batch()).await;
        assert!(all.unwrap().iter().all(Result::is_ok), "a batch is refused as a whole");
        let refused = async |client: Client| client.register(Registration::default()).await.unwrap_err().status();
        let client_of_busy = client(1, 5, |options| options.wait_for_room = false).await;
        assert_eq!(refused(client_of_busy.clone()).await, Some(Status::Overloaded), "who does not want to wait");
        assert_eq!(client_of_busy.register(Registration::default()).await.unwrap().due_ms, 2);
        let later = client(usize::MAX, 501, |_| {}).await;
        assert_eq!(refused(later).await, Some(Status::Overloaded), "too long to wait");
        let never = client(usize::MAX, 20, |options| options.request_timeout = Duration::from_millis(100)).await;
        assert_eq!(refused(never).await, Some(Status::Overloaded), "what it said at last");
    }

    #[tokio::test]
    async fn a_session_that_is_lost_while_there_is_no_room_is_opened_again() {
        let fake = fake::Fake::start().await;
        let (client, mut peer) = fake.connect(fake.options()).await;
        let serve = async {
            for session in ["session-2", "session-3"] {
                let request = peer.next().await.unwrap();
                let detail = Some(Detail { retry_after_ms: 1, ..Default::default() });
                let status = Status::Overloaded.into();
                let no_room = proto::RegistrationResponse { status, detail, ..Default::default() };
                peer.send(request.request_id, Payload::RegistrationResponse(no_room)).await;
                let request = peer.next().await.unwrap();
                peer.send(request.request_id, fake::refused(Status::SessionExpired, "session expired")).await;
                peer.welcome(session, 0).await;
            }
            let request = peer.next().await.unwrap();
            peer.send(request.request_id, fake::registered(9)).await;
            &mut peer
        };
        let (_peer, registered) = tokio::join!(serve, client.register(Registration::default()));
        assert_eq!(registered.unwrap().due_ms, 9);
    }

    #[tokio::test]
    async fn a_redirect_is_followed_with_the_same_number() {
        let cluster = Cluster::start(2).await;
        cluster.lead(0, 5);
        let client = Client::connect(cluster.options()).await.unwrap();
        assert_eq!(client.register(Registration::default()).await.unwrap().due_ms, 0, "by the first node");
        // The map that the client has is old now.
        cluster.lead(1, 6);
        assert_eq!(client.register(Registration::default()).await.unwrap().due_ms, 1, "by the second");
        let stored = cluster.stored();
        assert_eq!(stored.len(), 2);
        let origins: Vec<_> = stored.into_iter().map(|task| task.origin.unwrap()).collect();
        assert!(!origins[0].sender.is_empty() && origins[0].sender == origins[1].sender);
        assert_eq!(origins.iter().map(|one| (one.number, one.answered_below)).collect::<Vec<_>>(), [(1, 1), (2, 2)]);
    }

    #[tokio::test]
    async fn an_answer_that_is_lost_is_asked_for_again_and_stored_once() {
        let cluster = Cluster::start(3).await;
        cluster.lead(0, 1);
        let client = Client::connect(cluster.options()).await.unwrap();
        cluster.lose_answers(1);
        let found = client.register(Registration::default()).await.unwrap();
        assert!(!found.duplicate, "the key was not the caller's");
        assert_eq!(cluster.stored().len(), 1);

        let own = Dedup { key: "mine".into(), ttl_ms: None };
        let registration = Registration { dedup: Some(own), ..Default::default() };
        cluster.lose_answers(2);
        let found = client.register(registration).await.unwrap();
        assert!(found.duplicate, "the caller's own key, and it was stored before");
        assert_eq!(cluster.stored().len(), 2);
    }

    #[tokio::test]
    async fn a_dead_leader_is_waited_out() {
        let cluster = Cluster::start(3).await;
        cluster.lead(0, 1);
        let client = Client::connect(cluster.options()).await.unwrap();
        client.register(Registration::default()).await.unwrap();
        // The only node the client was given; it has learned of the others.
        cluster.kill(0);
        let (registered, ()) = tokio::join!(client.register(Registration::default()), async {
            cluster.asked_for_the_map().await;
            cluster.lead(2, 2);
        });
        assert_eq!(registered.unwrap().due_ms, 2);
    }

    #[tokio::test]
    async fn a_cancellation_goes_out_again_only_if_it_was_not_done() {
        let cluster = Cluster::start(2).await;
        cluster.lead(0, 1);
        let client = Client::connect(cluster.options()).await.unwrap();
        client.register(Registration::default()).await.unwrap();
        cluster.lead(1, 2);
        let task_id = fake::task_id_in(0, 7);
        assert_eq!(client.cancel(task_id).await.unwrap(), Cancelled::Cancelled, "redirected");
        cluster.lose_answers(1);
        let error = client.cancel(task_id).await.unwrap_err();
        assert!(matches!(error, ClientError::ConnectionLost { .. }), "{error}");
        assert_eq!(cluster.cancellations(), 2);
    }

    #[tokio::test]
    async fn cancellations_go_to_who_leads_now_and_none_goes_out_twice() {
        let cluster = Cluster::start(2).await;
        cluster.lead(0, 1);
        let client = Client::connect(cluster.options()).await.unwrap();
        client.register(Registration::default()).await.unwrap();
        let ids: Vec<TaskId> = (0..30).map(|n| fake::task_id_in(0, n)).collect();
        let done = |result: &Result<Cancelled, ClientError>| matches!(result, Ok(Cancelled::Cancelled));
        assert!(client.cancel_batch(&ids).await.unwrap().iter().all(done));
        assert_eq!(cluster.cancellations(), 30);
        // The map that the client has is old now.
        cluster.lead(1, 2);
        assert!(client.cancel_batch(&ids).await.unwrap().iter().all(done));
        assert_eq!(cluster.cancellations(), 60);
        cluster.lose_answers(1);
        let results = client.cancel_batch(&ids).await.unwrap();
        assert!(results.iter().all(|result| result.as_ref().is_err_and(ClientError::is_unknown)), "{results:?}");
        assert_eq!(cluster.cancellations(), 90, "they were done, and nobody knows");
    }

    #[tokio::test]
    async fn a_batch_is_answered_in_its_order_whoever_stores_it() {
        let cluster = Cluster::start(2).await;
        cluster.lead(0, 1);
        let client = Client::connect(cluster.options()).await.unwrap();
        client.register(Registration::default()).await.unwrap();
        cluster.lead(1, 2);
        cluster.lose_answers(1);
        let batch = (0..50).map(|n: u8| Registration { payload: vec![n].into(), ..Default::default() });
        let results = client.register_batch(batch.collect()).await.unwrap();
        assert!(results.iter().all(|result| result.as_ref().is_ok_and(|found| !found.duplicate)), "{results:?}");
        let stored: Vec<u8> = cluster.stored()[1..].iter().map(|task| task.payload[0]).collect();
        assert_eq!(stored.len(), 50, "each once");
    }
}
