//! From what is asked to what is replicated: stamps time, makes ids, gathers batches, hands out the answers.
//!
//! One task per group takes everything that has arrived while the entry before was under way, makes one log entry of it
//! and waits until it is applied: a natural group commit, whose batches grow with the load. What is asked for becomes a
//! command here and nowhere else, because time and ids must come from the leader and must be values by the time they
//! are in the log.
//!
//! Bounds: asks waiting per group, payload bytes waiting per node, requests and bytes per entry, and the time it takes to
//! get through them ([`pressure`]); see [`admission`]. New work that finds no room is refused; what belongs to old work
//! waits for it.
//!
//! A refusal says whether the request may have been stored: [`Refused::Unknown`] and, when it comes to those who
//! already waited, [`Refused::Stopping`] are the ones where it may.

mod admission;
pub(crate) mod maker;
pub mod pressure;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

pub use admission::Admission;
use admission::{Message, Queue, Waiting};
use bytes::Bytes;
use maker::{Entry, Maker};
use openraft::errors::ClientWriteError;
use openraft::impls::ProgressResponder;
use pressure::{Line, Pressure};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;

use crate::clock::Clock;
use crate::raft::types::{Command, leader_of};
use crate::raft::{Group, Groups};
use crate::random;
use crate::shard::{Change, Claim, Numbered, Reply, Request, Settle};
use crate::store::Store;
use crate::task::locks::Mutex;
use crate::task::{ClientId, DeadLetterId, DedupHash, GroupId, InstantMs, Policy, Recurrence, Tags, TaskId};

/// How far ahead of now the armed watermark is set. After a failover a cancel of what is due within this span can only
/// be answered "too late"; the shorter it is, the more entries an otherwise idle shard writes while it fires.
pub const ARM_AHEAD_MS: u64 = 1_000;

const PAYLOAD_BYTES_WAITING_MAX: usize = 64 * 1024 * 1024;
const REQUESTS_PER_ENTRY_MAX: usize = 1_024;
const BYTES_PER_ENTRY_MAX: usize = 1024 * 1024;
/// An entry that is not applied by then may still be, later: its outcome is unknown.
const APPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// About what a request takes in the log besides its payload.
const REQUEST_BYTES: usize = 64;
const OVERLOADED_RETRY_MS: u64 = 1_000;
/// After lines that were full.
const FULL_RETRY: Duration = Duration::from_millis(250);
/// How long a turn lasts: some rounds of a busy group, so that what is asked meanwhile waits for the next entry of the
/// same one. The first entry of each turn holds little.
const TURN: Duration = Duration::from_millis(50);
/// With so many tasks a turn is over sooner: no entry holds more than a few times this, and the next shard can begin
/// while this one is stored.
const TURN_TASKS: usize = 512;

/// Why there is no reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("this node does not lead the shard")]
    NotLeader { group: GroupId },
    #[error("{why}")]
    Overloaded { why: String, retry_after_ms: u64 },
    #[error("the answer did not come in time; the request may have been stored")]
    Unknown,
    #[error("the node is stopping; the request may have been stored")]
    Stopping,
}

pub type Answer = Box<dyn FnOnce(Result<Reply, Refused>) + Send>;

/// When a task is due, before the leader's time is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    After(u64),
    At(InstantMs),
}

impl Due {
    pub fn at(self, now_ms: InstantMs) -> InstantMs {
        match self {
            Due::After(delay_ms) => now_ms.saturating_add(delay_ms),
            Due::At(due_ms) => due_ms,
        }
    }
}

/// What is asked of a group.
pub enum Ask {
    Register {
        client: ClientId,
        policy: Arc<Policy>,
        due: Due,
        recurrence: Option<Recurrence>,
        tags: Option<Tags>,
        /// The key, and how long it is remembered.
        dedup: Option<(DedupHash, u64)>,
        numbered: Option<Numbered>,
        payload: Bytes,
    },
    Cancel {
        id: TaskId,
        owner: Option<ClientId>,
    },
    Edit {
        id: TaskId,
        owner: Option<ClientId>,
        version: Option<u64>,
        due: Option<Due>,
        /// Without its due instant.
        change: Change,
    },
    /// Or resume.
    Pause {
        id: TaskId,
        owner: Option<ClientId>,
        paused: bool,
    },
    /// An occurrence goes its own way.
    Detach {
        id: TaskId,
        occurrence: u64,
    },
    Replay {
        letter: DeadLetterId,
        owner: Option<ClientId>,
    },
    Settle(Settle),
    /// A request that needs nothing from the leader.
    Plain(Request),
    /// Whatever is due up to here is about to be dispatched.
    Arm(InstantMs),
}

impl Ask {
    /// What it takes besides [`REQUEST_BYTES`].
    fn payload_bytes(&self) -> usize {
        match self {
            Ask::Register { payload, tags, policy, .. } => {
                let tags = tags.as_ref().map_or(0, Tags::bytes);
                // A session's policy is shared, a task's own is not.
                let policy = if Arc::strong_count(policy) == 1 { policy.bytes() } else { 0 };
                payload.len() + tags + policy
            }
            Ask::Edit { change: Change { payload: Some(payload), .. }, .. } => payload.len(),
            _ => 0,
        }
    }

    /// Whether it is work that this node has not taken on yet, and need not.
    fn is_new(&self) -> bool {
        matches!(self, Ask::Register { .. } | Ask::Edit { .. } | Ask::Replay { .. })
    }

    /// Whether somebody waits for this who should rather be told than wait until there is room on the disk.
    fn refused_by(&self, disk: &DiskState) -> Option<String> {
        match (self, disk) {
            // What makes room is let through as long as anything is.
            (Ask::Plain(Request::Purge(_) | Request::Forget(_)), DiskState::Low(_)) => None,
            // Old work goes on.
            (Ask::Plain(Request::CatchUp(_)), _) => None,
            (
                Ask::Register { .. } | Ask::Edit { .. } | Ask::Replay { .. } | Ask::Plain(_),
                DiskState::Low(why) | DiskState::Full(why),
            )
            | (Ask::Cancel { .. } | Ask::Pause { .. }, DiskState::Full(why)) => Some(why.clone()),
            _ => None,
        }
    }
}

impl fmt::Debug for Ask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Ask::Register { .. } => "register",
            Ask::Cancel { .. } => "cancel",
            Ask::Edit { .. } => "edit",
            Ask::Pause { .. } => "pause",
            Ask::Detach { .. } => "detach",
            Ask::Replay { .. } => "replay",
            Ask::Settle(_) => "settle",
            Ask::Plain(_) => "plain",
            Ask::Arm(_) => "arm",
        })
    }
}

/// What the leader knows about dispatches; the firing room is the one who does.
pub trait Dispatches: Send + Sync + 'static {
    /// Holds the task back in `term`, until it is released or has ended, and says whether its current attempt may be out.
    fn hold(&self, group: GroupId, term: u64, id: TaskId) -> Claim;
    /// What it was held back for in `term` has not ended the task: it goes on as the state has it.
    fn release(&self, group: GroupId, term: u64, id: TaskId);
    /// Whether an attempt is out, as far as this node knows.
    fn is_out(&self, group: GroupId, id: TaskId) -> bool;
}

/// How much may be written, by the room that is left on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskState {
    Fine,
    /// New work is refused, old work goes on. The text says how much is free and how much must be.
    Low(String),
    /// Nothing is written; what is under way waits.
    Full(String),
}

/// A handle on the proposing tasks of all groups; cheap to clone.
#[derive(Clone)]
pub struct Proposer {
    inner: Arc<ProposerInner>,
}

struct ProposerInner {
    queues: BTreeMap<GroupId, Queue>,
    pressure: Pressure,
    room: Arc<Semaphore>,
    disk: watch::Receiver<DiskState>,
    shards: u16,
    turns: Turns,
}

/// Which shard gets the next new task, of those that may have any: tasks that arrive together go to one shard, so that
/// they share its log entry, and over time all get as many. An entry costs every replica the same whatever is in it.
#[derive(Debug)]
pub struct Turns {
    now: Mutex<Turn>,
}

#[derive(Debug)]
struct Turn {
    number: u64,
    until: Instant,
    tasks_left: usize,
}

impl Turns {
    pub fn starting_at(number: u64) -> Self {
        Self { now: Mutex::new(Turn { number, until: Instant::now(), tasks_left: 0 }) }
    }

    /// The number of the turn in which `tasks` tasks have come. It grows by one from turn to turn.
    pub fn take(&self, tasks: usize) -> u64 {
        let mut turn = self.now.lock();
        let now = Instant::now();
        if turn.tasks_left == 0 || now >= turn.until {
            *turn = Turn { number: turn.number.wrapping_add(1), until: now + TURN, tasks_left: TURN_TASKS };
        }
        turn.tasks_left = turn.tasks_left.saturating_sub(tasks);
        turn.number
    }
}

/// What the tasks share.
pub struct ProposerParts {
    pub groups: Groups,
    pub clock: Arc<dyn Clock>,
    pub dispatches: Arc<dyn Dispatches>,
    pub disk: watch::Receiver<DiskState>,
    pub store: Store,
    pub shards: u16,
    /// What becomes of occurrences is recorded.
    pub keep_history: bool,
}

impl Proposer {
    /// Starts one task per group. They end when the last handle is gone.
    pub fn start(parts: ProposerParts) -> Self {
        let parts = Arc::new(parts);
        let mut queues = BTreeMap::new();
        let waiting_everywhere = Arc::default();
        for group in (0..=parts.shards).map(GroupId) {
            let (asks, waiting) = mpsc::unbounded_channel();
            let line = Arc::new(Line::beside(&waiting_everywhere));
            queues.insert(group, Queue::new(asks, line.clone()));
            tokio::spawn(run(group, parts.clone(), waiting, line));
        }
        let inner = ProposerInner {
            queues,
            pressure: Pressure::start(parts.groups.clone(), waiting_everywhere),
            room: Arc::new(Semaphore::new(PAYLOAD_BYTES_WAITING_MAX)),
            disk: parts.disk.clone(),
            shards: parts.shards,
            turns: Turns::starting_at(0),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The group of a deduplication key.
    pub fn shard_of(&self, hash: DedupHash) -> GroupId {
        GroupId::of_shard(hash.shard(self.inner.shards))
    }

    /// The group that `tasks` new tasks go to: each in turn.
    pub fn any_shard(&self, tasks: usize) -> GroupId {
        let turn = self.inner.turns.take(tasks) % u64::from(self.inner.shards);
        GroupId(u16::try_from(turn).expect("below the number of shards") + 1)
    }

    /// For what one message asks for.
    pub fn admission(&self) -> Admission<'_> {
        Admission::new(self)
    }

    /// Waits for room and then hands over `ask`; `answer` is called once, perhaps on another task, and must not block.
    pub async fn submit(&self, group: GroupId, ask: Ask, answer: Answer) {
        let mut admission = self.admission();
        admission.put(group, ask, answer).await;
        admission.send();
    }

    /// Why new work for a group is refused now, if it is.
    fn busy(&self, group: GroupId) -> Option<Refused> {
        let queue = self.inner.queues.get(&group)?;
        let why = self.inner.pressure.refuses(queue.line())?;
        Some(busy(why.to_string(), why.retry_after()))
    }

    /// [`Proposer::submit`], for those who want to wait.
    pub async fn ask(&self, group: GroupId, ask: Ask) -> Result<Reply, Refused> {
        let (out, reply) = tokio::sync::oneshot::channel();
        let answer = Box::new(move |result| {
            let _ = out.send(result);
        });
        self.submit(group, ask, answer).await;
        reply.await.unwrap_or(Err(Refused::Stopping))
    }
}

async fn run(group: GroupId, parts: Arc<ProposerParts>, mut asks: mpsc::UnboundedReceiver<Message>, line: Arc<Line>) {
    let _alarm = parts.groups.alarm("who proposes for a group");
    let (clock, dispatches) = (parts.clock.clone(), parts.dispatches.clone());
    let mut maker = Maker::new(group, clock, dispatches, parts.keep_history, random::source());
    let mut disk = parts.disk.clone();
    // After a round, `waiting` holds what did not fit into its entry, and `next` the message that came after that.
    let mut waiting = Message::new();
    let mut next: Option<Message> = None;
    loop {
        if waiting.is_empty() {
            let first = match next.take() {
                Some(message) => Some(message),
                None => asks.recv().await,
            };
            let Some(first) = first else { return };
            waiting = first;
        }
        while let Some(more) = next.take().or_else(|| asks.try_recv().ok()) {
            // What came together is stored together, if it fits into one entry.
            if waiting.len() + more.len() > REQUESTS_PER_ENTRY_MAX {
                next = Some(more);
                break;
            }
            waiting.extend(more);
        }
        if disk.wait_for(|state| !matches!(state, DiskState::Full(_))).await.is_err() {
            return;
        }
        let Some((node, term)) = leading(&parts.groups, group) else {
            for refused in waiting.drain(..) {
                (refused.asked.answer)(Err(Refused::NotLeader { group }));
            }
            continue;
        };
        let fits = fitting(&waiting);
        let rest = waiting.split_off(fits);
        let round = line.begin();
        maker.begin(term, &parts.store);
        if let Some(entry) = maker.entry(waiting.drain(..).map(|waiting| waiting.asked)) {
            let armed_ms = entry.armed_ms;
            if propose(&node, term, entry, &parts.dispatches).await {
                maker.armed_ms = armed_ms;
            }
            drop(round);
        }
        waiting.extend(rest);
    }
}

/// Nothing was done, and there is no room for it.
fn busy(why: String, retry_after: Duration) -> Refused {
    let retry_after_ms = u64::try_from(retry_after.as_millis()).unwrap_or(OVERLOADED_RETRY_MS);
    Refused::Overloaded { why, retry_after_ms }
}

fn leading(groups: &Groups, group: GroupId) -> Option<(Group, u64)> {
    let node = groups.get(group)?;
    let term = node.leads(Duration::ZERO)?;
    Some((node, term))
}

/// How many of those waiting go into one entry; at least one.
fn fitting(waiting: &[Waiting]) -> usize {
    let mut bytes = 0;
    let fit = waiting.iter().take_while(|one| {
        bytes += one.asked.ask.payload_bytes() + REQUEST_BYTES;
        bytes <= BYTES_PER_ENTRY_MAX
    });
    fit.count().clamp(1, REQUESTS_PER_ENTRY_MAX.min(waiting.len()))
}

/// Replicates one entry and hands out what came of it. Returns whether it is stored for sure.
async fn propose(node: &Group, term: u64, entry: Entry, dispatches: &Arc<dyn Dispatches>) -> bool {
    // In this term or not at all: what the entry claims about dispatches is known by this leader only.
    let (responder, reply) = ProgressResponder::complete_only();
    let write = node.raft.write(Command(entry.bytes.clone())).with_leader(leader_of(term)).responder(responder);
    let mut reply = Box::pin(reply);
    let result = match write.await {
        Err(_fatal) => Err(Refused::Unknown),
        Ok(()) => match tokio::time::timeout(APPLY_TIMEOUT, &mut reply).await {
            Err(_) => {
                // Once it is applied after all, what it has not ended goes on.
                let held = entry.held();
                let (group, dispatches) = (node.id, dispatches.clone());
                tokio::spawn(async move {
                    if matches!(reply.await, Ok(Ok(_))) {
                        held.into_iter().flatten().for_each(|id| dispatches.release(group, term, id));
                    }
                });
                Err(Refused::Unknown)
            }
            Ok(Err(_)) => Err(Refused::Unknown),
            Ok(Ok(Err(error))) => Err(refusal(node.id, &error)),
            Ok(Ok(Ok(response))) => Ok(response.data.0),
        },
    };
    entry.end(result, &**dispatches)
}

fn refusal(group: GroupId, error: &ClientWriteError<crate::raft::TypeConfig>) -> Refused {
    match error {
        // Certainly not appended.
        ClientWriteError::ForwardToLeader(_) => Refused::NotLeader { group },
        // Anything else may have been.
        _ => Refused::Unknown,
    }
}
