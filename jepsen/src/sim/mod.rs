//! The simulation: several nodes in one process and one thread, on simulated time, network and disks.
//!
//! ```text
//!   clients --> propose --> raft (openraft, our log) --> shard --> store in memory      one of these per node,
//!                             ^ peer service, peer network                              all on one runtime whose
//!                             '--- connections of the simulation ---> other nodes       time stands still while
//!   receivers <-- carrier <-- callback <-- firing                                       anybody has something to do
//! ```
//!
//! What runs is the real code: openraft, `raft`, `propose`, `firing`, `shard`, keys, rows and log entries of `store`, the
//! gates and lines of `callback`, how `placement` plans rows, follows them and changes members, and the messages between
//! nodes over HTTP/2. What is simulated is what is under it: the disk ([`boomerang::store::memory`]), the network ([`net`]),
//! the clocks, etcd ([`placement`]) and the receivers; and there is no group 0, and no listener for clients.
//!
//! A schedule has two phases. First clients ask while nodes lose their power, links are cut and slowed, disks hang and
//! leaders are changed ([`faults`]), and in every fourth schedule replicas move: nothing that was promised may be broken.
//! Then everything is mended, clients go on for a while, and what is left must come to its end: everything due has fired,
//! every replica is where it is to be and nothing of its state is left elsewhere, and all are equal.
//!
//! # What repeats
//!
//! Everything that is drawn by chance comes from the seed, there is one thread, and time moves only when nobody has anything
//! left to do. So the same program gives the same history for the same seed; a test compares hashes of runs. Another build
//! may give another history for a seed, as may another version of a library. What does not come from the seed: how maps
//! of the standard library are ordered, and dates in HTTP headers; neither was seen to make a difference. In which order
//! tokio wakes several that wait for one watch channel did: it has the seed, too, if it is built with
//! `--cfg tokio_unstable`, as `.cargo/config.toml` says.

mod clients;
mod faults;
mod many;
mod net;
mod node;
mod placement;
mod receivers;
mod rows;
mod world;

use std::cell::RefCell;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Once};
use std::time::Duration;

use boomerang::inspect::{Digest, digest};
use boomerang::raft::ReplicaId;
use boomerang::sabotage::{self, Fault};
use boomerang::store::codec;
use boomerang::store::keys::{Key, Parsed, parse_state};
use boomerang::store::rows::DeadLetterRow;
use boomerang_task::GroupId;
use data_encoding::HEXLOWER;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::check::{self, Limits, Verdict, Violation};
use crate::history::{History, Left, LeftAs, What};
use crate::payload::Payload;
use clients::Client;
use world::World;

pub use many::{Broken, Many, Summary, many};

/// When every run begins, by the clock of the simulation.
const BEGAN_MS: u64 = 1_700_000_000_000;
/// After the last fault, clients go on until all must be well, and for so long after that.
const HEAL_WITHIN: Duration = Duration::from_secs(4);
const CALM: Duration = Duration::from_secs(2);
/// So late something may be when all is well: a message or two between nodes and to the receiver.
const LATE: Duration = Duration::from_millis(300);
/// What is left when clients have stopped ends within this.
const QUIET_WITHIN: Duration = Duration::from_secs(60);
/// Every replica is where it is to be, after clients have stopped.
const SETTLED_WITHIN: Duration = Duration::from_secs(60);
/// And all replicas have applied the same.
const EQUAL_WITHIN: Duration = Duration::from_secs(20);
/// A delivery that is on its way for longer than this has no excuse.
const STALE: Duration = Duration::from_secs(30);

/// What a schedule is about, besides its seed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub nodes: u64,
    pub shards: u16,
    /// Of each shard.
    pub replicas: usize,
    /// They move.
    pub moves: bool,
    pub clients: u32,
    /// How long things are broken.
    pub safety: Duration,
    /// Clocks are ahead or behind by this at most.
    pub clock_offset_us: u64,
    /// What the nodes are broken by on purpose.
    pub sabotage: Vec<Fault>,
}

impl Plan {
    /// What the seed asks for.
    pub fn of(seed: u64) -> Self {
        let moves = matches!(seed % 8, 1 | 4);
        let five = seed % 8 == 7;
        Self {
            nodes: if five || moves { 5 } else { 3 },
            shards: 2,
            replicas: if five { 5 } else { 3 },
            moves,
            clients: 4,
            safety: Duration::from_secs(6),
            clock_offset_us: if seed % 2 == 1 { 100_000 } else { 0 },
            sabotage: Vec::new(),
        }
    }

    fn limits(&self) -> Limits {
        let us = |duration: Duration| u64::try_from(duration.as_micros()).expect("a short while");
        Limits {
            // One leader's clock may be behind by this, and the next one's ahead.
            early_us: 3 * self.clock_offset_us,
            heal_within_us: us(HEAL_WITHIN),
            late_us: us(LATE) + 2 * self.clock_offset_us,
            stale_us: us(STALE),
            ..Limits::default()
        }
    }
}

/// What came of one schedule.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub seed: u64,
    pub history: History,
    pub verdicts: Vec<Verdict>,
}

impl Outcome {
    pub fn holds(&self) -> bool {
        self.verdicts.iter().all(Verdict::holds)
    }

    /// Differs for histories that differ, in all likelihood.
    pub fn hash(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for event in &self.history.events {
            format!("{event:?}").hash(&mut hasher);
        }
        hasher.finish()
    }
}

/// Runs the schedule of `seed` on this thread.
pub fn run(seed: u64, plan: &Plan) -> Outcome {
    hear_panics();
    boomerang::random::seed_this_thread(Some(seed));
    sabotage::on_this_thread(&plan.sabotage);
    PANICS.set(Some(Vec::new()));
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    #[cfg(tokio_unstable)]
    runtime.rng_seed(tokio::runtime::RngSeed::from_bytes(&seed.to_le_bytes()));
    let runtime = runtime.enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime without threads and sockets needs nothing");
    let (history, stopped, misplaced) = runtime.block_on(simulate(seed, plan));
    drop(runtime);
    let panics = PANICS.take().unwrap_or_default();
    sabotage::on_this_thread(&[]);
    boomerang::random::seed_this_thread(None);
    let mut verdicts = check::all(&history, &plan.limits());
    verdicts.push(seen_here(
        "nodes",
        "No node stops by itself, and no assertion fails",
        panics.into_iter().chain(stopped),
    ));
    verdicts.push(seen_here("places", "In the end every replica is where it is to be, and nowhere else", misplaced));
    Outcome { seed, history, verdicts }
}

/// With why nodes have stopped, and what is not where it is to be.
async fn simulate(seed: u64, plan: &Plan) -> (History, Vec<String>, Vec<String>) {
    let world = World::new(seed, plan.clone());
    let starts = world.nodes().map(|node| {
        let world = world.clone();
        async move { world.start(node).await }
    });
    futures::future::join_all(starts).await;
    let watching = tokio::spawn(world.clone().watch_leaders());
    let controller = plan.moves.then(|| tokio::spawn(placement::control(world.clone())));
    let stop = CancellationToken::new();
    let mut clients = JoinSet::new();
    for process in 1..=plan.clients {
        clients.spawn(Client::new(world.clone(), process).run(stop.clone()));
    }
    faults::run(&world).await;
    sleep(HEAL_WITHIN + CALM).await;
    stop.cancel();
    while clients.join_next().await.is_some() {}
    become_quiet(&world).await;
    let misplaced = placement::settle(&world, SETTLED_WITHIN).await;
    if let Some(controller) = controller {
        controller.abort();
    }
    record_left(&world);
    record_digests(&world).await;
    watching.abort();
    let (history, stopped) = (world.recorder.so_far(), world.take_stopped());
    for node in world.nodes() {
        if let Some(life) = world.life(node) {
            life.end();
        }
    }
    (history, stopped, misplaced)
}

/// Waits until no task is left anywhere, or patience is over.
async fn become_quiet(world: &World) {
    let until = Instant::now() + QUIET_WITHIN;
    let quiet = |group| {
        let life = world.leading(group)?;
        Some(clients::tasks_in(&life, group).expect("memory does not fail").is_empty())
    };
    let all = || world.groups().all(|group| quiet(group) == Some(true)).then_some(());
    let _ = timeout_at(until, once_applied(world, all)).await;
}

/// Waits until something is so, and looks again whenever anything is applied on any node.
async fn once_applied<T>(world: &World, look: impl Fn() -> Option<T>) -> T {
    loop {
        let applied = world.applied.notified();
        if let Some(found) = look() {
            return found;
        }
        applied.await;
    }
}

/// What the leaders still know of.
fn record_left(world: &World) {
    for group in world.groups() {
        let Some(life) = world.leading(group) else { continue };
        let (from, until) = Key::group_range(group);
        for (key, value) in life.store.scan_state(&from, &until, usize::MAX).expect("memory does not fail") {
            if let Some(left) = left(&life, group, &key, &value) {
                world.recorder.record(What::Left(left));
            }
        }
    }
}

fn left(life: &node::Life, group: GroupId, key: &[u8], value: &[u8]) -> Option<Left> {
    let token = |payload: &[u8]| Payload::read(payload).map(|payload| payload.token);
    match parse_state(key)?.1 {
        Parsed::Task(id) => {
            let (task, at) = boomerang::shard::read_task(&life.store, group, id).expect("memory does not fail")?;
            let state = LeftAs::Pending { due_ms: at.due_ms, occurrence: at.occurrence };
            Some(Left { token: token(&task.payload), task: id.to_string(), state })
        }
        Parsed::DeadLetter(letter) => {
            let row: DeadLetterRow = codec::decode("a dead letter", value).expect("what was encoded is decoded");
            let state = LeftAs::DeadLetter { occurrence: row.occurrence, attempts: row.attempts };
            Some(Left { token: token(&row.payload), task: letter.task.to_string(), state })
        }
        _ => None,
    }
}

/// Of all replicas, when they have applied the same; as they are when that takes too long.
async fn record_digests(world: &World) {
    for group in world.groups() {
        let equal = || {
            let digests = digests(world, group);
            digests.windows(2).all(|two| two[0].2.applied == two[1].2.applied).then_some(digests)
        };
        let until = Instant::now() + EQUAL_WITHIN;
        let said = timeout_at(until, once_applied(world, equal)).await.unwrap_or_else(|_| digests(world, group));
        for (node, replica, digest) in said {
            let index = digest.applied.map_or(0, |applied| applied.index);
            let digest = HEXLOWER.encode(&digest.hash);
            world.recorder.record(What::Digest { group: group.0, replica, node, index, digest });
        }
    }
}

fn digests(world: &World, group: GroupId) -> Vec<(net::NodeId, ReplicaId, Digest)> {
    let lives = world.nodes().filter_map(|node| world.life(node));
    let of = |life: Arc<node::Life>| {
        let replica = life.groups.get(group)?.replica;
        Some((life.node, replica, digest(&life.store, group).expect("memory does not fail")))
    };
    lives.filter_map(of).collect()
}

thread_local! {
    /// What panicked on this thread, while it simulates.
    static PANICS: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

/// An assertion that fails in a task ends that task, and openraft builds the group again: nobody else would notice.
fn hear_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let heard = PANICS.with_borrow_mut(|panics| {
                let Some(panics) = panics else { return false };
                panics.push(panic.to_string());
                true
            });
            if !heard {
                before(panic);
            }
        }));
    });
}

/// What the simulation itself has to say.
fn seen_here(checker: &'static str, promise: &'static str, what: impl IntoIterator<Item = String>) -> Verdict {
    let violations: Vec<Violation> = what.into_iter().map(|what| Violation { what, events: Vec::new() }).collect();
    Verdict { checker, promise, counts: vec![("violations", violations.len() as u64)], violations }
}
