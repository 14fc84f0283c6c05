//! Everything that clients, receivers and those who break things saw, in the order in which it was seen.
//!
//! One clock stamps all of it: that of the process that runs clients, receivers and faults. An operation is two events,
//! its call and its end; what has no end, or an unknown one, may or may not have happened. Nothing here judges.
//!
//! A history is stored as lines of JSON ([`stored`]), and can be exported for outside checkers ([`edn`]).
//!
//! Every task carries a [`Token`] in its payload, so that a delivery can be told from others even if the answer to its
//! registration was lost.

use std::collections::BTreeMap;
use std::sync::Arc;

use boomerang_task::locks::Mutex;
use boomerang_task::{Fence, Missed};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

pub mod edn;
pub mod stored;

/// A task as the load knows it: given by the load, unique in a run.
pub type Token = u64;
/// A task as the cluster knows it.
pub type TaskId = String;
/// Who asks: one operation at a time each.
pub type Process = u32;

/// Of the payload of a task that was never edited.
pub const FIRST_VERSION: u32 = 1;

/// What is checked.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct History {
    /// Milliseconds since 1970 at which the run began, by the clock that due instants are compared with.
    pub began_ms: u64,
    /// In order; the index of an event is its place.
    pub events: Vec<Event>,
}

/// What a history was recorded under.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    pub seed: Option<u64>,
    /// By name: how many nodes, which loads and faults, how long.
    pub settings: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Microseconds since the run began.
    pub at_us: u64,
    pub what: What,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    Call(Process, Call),
    /// The end of the last call of this process.
    End(Process, End),
    Delivered(Delivery),
    /// Something was broken, or mended again.
    Fault(FaultNote),
    /// From here on nothing is broken any more: every node is there, every link whole, every clock right.
    Healed,
    /// A node began to lead a group, as far as anybody has noticed.
    Leads {
        group: u16,
        node: u64,
        term: u64,
    },
    /// What a replica says of its state at one entry.
    Digest {
        group: u16,
        replica: u64,
        node: u64,
        index: u64,
        digest: String,
    },
    /// What the cluster still knew of a task when all was over.
    Left(Left),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    Ok(Answer),
    /// It certainly did not happen.
    Fail(String),
    /// It may have happened, or may still.
    Unknown(String),
}

/// What is asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Call {
    Register(Registration),
    Cancel {
        token: Token,
        task: TaskId,
    },
    /// Moves the task to another due instant, and its payload to another version: one that no other edit of this task
    /// has, and not [`FIRST_VERSION`].
    Edit {
        token: Token,
        task: TaskId,
        due_ms: u64,
        version: u32,
    },
    Get {
        token: Token,
        task: TaskId,
    },
    /// Everything of one client.
    List {
        client: String,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registration {
    pub token: Token,
    /// Which load it belongs to: `one-shot`, `races`, `recurring`, `dedup`, `dead-letters`, `fenced`.
    pub load: String,
    pub client: String,
    pub due: Due,
    /// Every so many milliseconds; `None` for a task that is due once.
    pub every_ms: Option<u64>,
    /// What becomes of missed occurrences; of no meaning for a task that is due once.
    #[serde(with = "MissedForm")]
    pub missed: Missed,
    /// It ends after so many due instants.
    pub count: Option<u64>,
    /// Registrations with the same key are the same task: that of the first one's token.
    pub key: Option<String>,
    /// So many attempts before it becomes a dead letter.
    pub attempts: u32,
    /// How its receiver answers: so many attempts are refused first. `u32::MAX`: all of them.
    pub refusals: u32,
}

/// [`Missed`] as it is stored, with names like all others.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Missed", rename_all = "snake_case")]
enum MissedForm {
    Skip,
    Once,
    All { max: u32 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Due {
    In(u64),
    At(u64),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    Registered {
        task: TaskId,
        due_ms: u64,
        duplicate: bool,
    },
    /// It was never dispatched, and never will be.
    Cancelled,
    /// This attempt may be out; no other follows.
    CancelledTooLate {
        occurrence: u64,
        attempt: u32,
    },
    Edited {
        due_ms: u64,
    },
    /// This attempt may be out; nothing was changed.
    EditTooLate {
        occurrence: u64,
        attempt: u32,
    },
    /// There is no such task: it has ended, or there never was one.
    NotFound,
    Found {
        due_ms: u64,
        occurrence: u64,
        attempt: u32,
        /// Of the payload, as in [`Delivery::version`].
        version: u32,
    },
    /// Every page of it, one after the other.
    Listed {
        tasks: Vec<TaskId>,
    },
}

/// One delivery, as the receiver saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Delivery {
    pub token: Token,
    pub task: TaskId,
    pub occurrence: u64,
    pub attempt: u32,
    /// Of the payload, which an edit raises.
    pub version: u32,
    pub due_ms: u64,
    pub fence: Fence,
    /// What the receiver said: done, or not.
    pub accepted: bool,
    /// Of a receiver that looks at fences: it did what the delivery asks for. `None` for one that does not look.
    pub effect: Option<bool>,
    /// A dead letter's copy, at its own destination.
    pub dead_letter: bool,
    /// It came in a packet of its own, which a network may double.
    pub datagram: bool,
}

/// What was broken or mended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultNote {
    /// Which kind, for example `partition`.
    pub fault: String,
    pub stage: Stage,
    /// What exactly: nodes, links, sizes.
    pub detail: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    Begin,
    End,
    /// It has no duration, or could not be done.
    Note,
}

/// What the cluster knew of a task at the very end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Left {
    pub token: Option<Token>,
    pub task: TaskId,
    pub state: LeftAs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeftAs {
    /// It waits for its due instant.
    Pending {
        due_ms: u64,
        occurrence: u64,
    },
    DeadLetter {
        occurrence: u64,
        attempts: u32,
    },
}

/// An operation: its call, and what became of it.
#[derive(Debug, Clone, Copy)]
pub struct Operation<'h> {
    pub process: Process,
    pub call: &'h Call,
    pub called_us: u64,
    /// The place of the call.
    pub call_index: u64,
    /// `None`: the run was over before it.
    pub end: Option<(&'h End, u64, u64)>,
}

impl<'h> Operation<'h> {
    /// What was answered, if it certainly happened.
    pub fn answer(&self) -> Option<&'h Answer> {
        match self.end {
            Some((End::Ok(answer), ..)) => Some(answer),
            _ => None,
        }
    }

    /// Whether it certainly did not happen.
    pub fn failed(&self) -> bool {
        matches!(self.end, Some((End::Fail(_), ..)))
    }

    pub fn ended_us(&self) -> Option<u64> {
        self.end.map(|(_, at_us, _)| at_us)
    }

    /// Call and end, by index.
    pub fn events(&self) -> Vec<u64> {
        std::iter::once(self.call_index).chain(self.end.map(|(_, _, index)| index)).collect()
    }
}

impl History {
    /// Every operation, in the order of calls.
    pub fn operations(&self) -> Vec<Operation<'_>> {
        let mut operations: Vec<Operation<'_>> = Vec::new();
        let mut open: BTreeMap<Process, usize> = BTreeMap::new();
        for (index, event) in (0..).zip(&self.events) {
            match &event.what {
                What::Call(process, call) => {
                    open.insert(*process, operations.len());
                    let (process, called_us) = (*process, event.at_us);
                    operations.push(Operation { process, call, called_us, call_index: index, end: None });
                }
                What::End(process, end) => {
                    if let Some(at) = open.remove(process) {
                        operations[at].end = Some((end, event.at_us, index));
                    }
                }
                _ => {}
            }
        }
        operations
    }

    /// Every delivery with its place and when it came.
    pub fn deliveries(&self) -> impl Iterator<Item = (u64, u64, &Delivery)> {
        (0..).zip(&self.events).filter_map(|(index, event)| match &event.what {
            What::Delivered(delivery) => Some((index, event.at_us, delivery)),
            _ => None,
        })
    }

    /// When all was mended for good.
    pub fn healed_us(&self) -> Option<u64> {
        self.events.iter().rev().find(|event| event.what == What::Healed).map(|event| event.at_us)
    }

    /// An instant of the cluster, in microseconds since the run began; zero for what was before.
    pub fn since_began_us(&self, instant_ms: u64) -> u64 {
        instant_ms.saturating_sub(self.began_ms) * 1000
    }
}

/// What time it is for a history: since the run began.
pub trait Watch: Send + Sync + 'static {
    fn now_us(&self) -> u64;
}

/// Whoever sees something says it here; cheap to clone. What is said first stands first.
#[derive(Clone)]
pub struct Recorder {
    inner: Arc<Recording>,
}

struct Recording {
    watch: Box<dyn Watch>,
    history: Mutex<History>,
    /// Changes with each event.
    recorded: watch::Sender<()>,
}

impl Recorder {
    pub fn new(began_ms: u64, watch: impl Watch) -> Self {
        let history = Mutex::new(History { began_ms, events: Vec::new() });
        Self { inner: Arc::new(Recording { watch: Box::new(watch), history, recorded: watch::Sender::new(()) }) }
    }

    pub fn record(&self, what: What) {
        let mut history = self.inner.history.lock();
        // Read under the lock, so that events are in order.
        let at_us = self.inner.watch.now_us();
        history.events.push(Event { at_us, what });
        drop(history);
        self.inner.recorded.send_replace(());
    }

    /// Waits for a history in which `look` finds something; it looks again after each event, so it should be quick.
    pub async fn until<T>(&self, look: impl Fn(&History) -> Option<T>) -> T {
        let mut recorded = self.inner.recorded.subscribe();
        loop {
            if let Some(found) = self.look(&look) {
                return found;
            }
            recorded.changed().await.expect("the recording lives as long as its recorders");
        }
    }

    pub fn now_us(&self) -> u64 {
        self.inner.watch.now_us()
    }

    /// What has been said so far.
    pub fn so_far(&self) -> History {
        self.inner.history.lock().clone()
    }

    /// Looks at what has been said so far without copying it.
    pub fn look<T>(&self, look: impl FnOnce(&History) -> T) -> T {
        look(&self.inner.history.lock())
    }
}
