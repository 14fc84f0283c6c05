//! `bench overload`: nodes that are offered more than they carry, and whether they keep their word.
//!
//! ```text
//!   calibrate: more and more requests under way, until that brings nothing --> what is carried, of each kind
//!   offer:     so many requests a second as that is, times a factor, whatever comes back
//! ```
//!
//! In the second phase the loop is open: a request leaves when it is its turn, not when another has been answered. Nothing
//! is sent twice. All kinds go at once, see [`Kind`].
//!
//! Tasks of `single`, `batch` and `keyed` are due after the bench; a part of them soon after the load, so that the receiver
//! sees whether they are there. `edit` and `cancel` take those of `single` and `keyed`.
//!
//! Of what is due after the bench, the nodes' own count of pending tasks tells whether it is there, and each
//! cancellation and edit, which must find its task.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use boomerang_task::locks::Mutex;
use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::super::ToolError;
use super::super::args::{Global, millis};
use super::account::{histogram, rate, rounded};
use super::args::{Kind, LoadArgs, OverloadBench};
use super::load::{Payloads, count, merge, micros, now_ms, pause_if_overloaded};
use super::local::LocalCluster;
use super::report::{Counts, Report};
use super::{Bench, configuration};
use boomerang_client::{
    Cancelled, Client, ClientError, Dedup, Due, Registered, Registration, TaskFilter, TaskUpdate, Updated,
};
use boomerang_receiver::Percentiles;
use boomerang_task::{InstantMs, Invalid, Protocol, TaskId};
use boomerang_wire::proto::Status;

/// An accepted registration is answered within this, 99 of 100.
const ACCEPTED_WITHIN: Duration = Duration::from_millis(500);
/// A refusal is told within this, 99 of 100.
const REFUSED_WITHIN: Duration = Duration::from_millis(50);
/// That of a list, which may come from another node.
const LIST_REFUSED_WITHIN: Duration = Duration::from_millis(500);
/// One in so many seconds may be lost, in all groups together: the system may take a processor away for as long as that.
const LEASE_LOST_EVERY_SECS: u64 = 10;
/// Requests of each kind under way at first, while it is found out what is carried; of `single`, one on each connection.
const BATCHES_UNDER_WAY: usize = 2;
const SOME_UNDER_WAY: usize = 8;
const LISTS_UNDER_WAY: usize = 1;
/// Tasks in a page of `list`.
const PAGE: u32 = 100;
/// Looks at what is carried, each with twice as many under way as the one before.
const LOOKS_MAX: u32 = 8;
/// A look that finds less than so many times what the best one found is the last.
const WORTH_MORE: f64 = 1.1;
/// The first part of a look, which does not count: one of so many.
const WARM_UP: u32 = 4;
/// Between the calibration and the load, for what is still under way.
const REST: Duration = Duration::from_secs(3);
/// Otherwise requests leave, and answers are read, when the nodes have left this program a turn.
const NODE_NICE: u8 = 10;
/// So often a pacer looks what is due to be sent.
const TICK: Duration = Duration::from_millis(2);
/// Within a span of this length tasks of `fire` are due, from `NEAR_MS_MIN` after their registration on.
const NEAR_MS: u64 = 2_000;
const NEAR_MS_MIN: u64 = 500;
/// Far enough for no task to be due while the bench runs, and for it to be beyond the window that nodes keep in memory.
const FAR_MS: u64 = 3_600_000;
/// One of so many far tasks is due after the load instead, within [`SHOWN_MS`].
const SHOWN: u64 = 50;
const SHOWN_MS: u64 = 60_000;
/// Tasks that are kept for being cancelled or edited.
const CHANGEABLE_MAX: usize = 200_000;
/// Followers apply what leaders have.
const PENDING_WITHIN: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// With more nodes, none has all shards.
const NODES_WITH_ALL: u16 = 3;
/// Deliveries that the receiver's list has room for from the start, for each second.
const DELIVERIES_PER_SECOND: u64 = 5_000;
/// What nodes said most often.
const SAID_MAX: usize = 10;

/// What became of the requests of one kind; counted in tasks, a page of a list as one.
#[derive(Debug, Clone)]
struct Tally {
    accepted: u64,
    refused: u64,
    /// Neither.
    failed: u64,
    /// Never sent, because too many were under way.
    held_back: u64,
    accepted_us: Histogram<u64>,
    refused_us: Histogram<u64>,
    failures: BTreeMap<String, u64>,
}

impl Tally {
    fn new() -> Self {
        Self {
            accepted: 0,
            refused: 0,
            failed: 0,
            held_back: 0,
            accepted_us: histogram(),
            refused_us: histogram(),
            failures: BTreeMap::new(),
        }
    }

    fn take<T>(&mut self, result: &Result<T, ClientError>, took_us: u64, tasks: u64) {
        match result {
            Ok(_) => {
                self.accepted += tasks;
                self.accepted_us.saturating_record_n(took_us, tasks);
            }
            Err(error) if error.status() == Some(Status::Overloaded) => {
                self.refused += tasks;
                self.refused_us.saturating_record_n(took_us, tasks);
            }
            Err(error) => {
                self.failed += tasks;
                count(&mut self.failures, error, tasks);
            }
        }
    }

    fn offered(&self) -> u64 {
        self.accepted + self.refused + self.failed + self.held_back
    }

    /// A line of the report.
    fn shown(&self, kind: Kind, took: Duration) -> Value {
        let (accepted, refused) = (Percentiles::of(&self.accepted_us), Percentiles::of(&self.refused_us));
        json!({
            "kind": kind.name(),
            "offered": self.offered(),
            "offered_per_second": rate(self.offered(), micros(took)),
            "accepted": self.accepted,
            "accepted_per_second": rate(self.accepted, micros(took)),
            "refused": self.refused,
            "failed": self.failed,
            "held_back": self.held_back,
            "accepted_us_p50": accepted.p50,
            "accepted_us_p99": accepted.p99,
            "accepted_us_max": accepted.max,
            "refused_us_p99": refused.p99,
            "refused_us_max": refused.max,
        })
    }
}

/// What the nodes owe.
#[derive(Debug, Default)]
struct Books {
    /// Acknowledged, and due before the bench ends; with the due instant that the node answered.
    expected: Vec<(TaskId, InstantMs)>,
    /// Acknowledged, and due after it.
    far: u64,
    cancelled: u64,
    /// Registrations and cancellations that may have been done.
    unknown: u64,
    cancels_unknown: u64,
    /// A cancellation or an edit of an acknowledged task did not find it.
    not_found: u64,
    /// A cancellation or an edit of a task that is due in an hour came too late.
    too_late: u64,
    /// To be cancelled or edited, and not under way to either.
    changeable: VecDeque<TaskId>,
}

impl Books {
    /// The number of far tasks that are there, at least and at most.
    fn pending(&self) -> (u64, u64) {
        let least = self.far.saturating_sub(self.cancelled + self.cancels_unknown + self.too_late);
        (least, self.far.saturating_sub(self.cancelled + self.too_late) + self.unknown)
    }
}

/// What is carried.
#[derive(Debug, Clone, Default)]
struct Carried {
    /// So many requests brought the most.
    under_way: usize,
    /// Tasks.
    per_second: BTreeMap<Kind, f64>,
}

impl Carried {
    fn all(&self) -> f64 {
        self.per_second.values().sum()
    }
}

/// Everything that requests share.
struct Rig {
    bench: Bench,
    payloads: Arc<Payloads>,
    batch: u64,
    kinds: Vec<Kind>,
    /// From when on those far tasks are due that are to be seen; 0 while none is.
    shown_from_ms: AtomicU64,
    number: AtomicU64,
    tallies: [Mutex<Tally>; Kind::COUNT],
    books: Mutex<Books>,
}

impl Rig {
    fn tally(&self, kind: Kind) -> std::sync::MutexGuard<'_, Tally> {
        self.tallies[kind as usize].lock()
    }

    fn books(&self) -> std::sync::MutexGuard<'_, Books> {
        self.books.lock()
    }

    fn client(&self, number: u64) -> &Client {
        let clients = &self.bench.clients;
        &clients[usize::try_from(number % clients.len() as u64).expect("an index")]
    }

    /// Tasks in a request of this kind.
    fn tasks_in(&self, kind: Kind) -> u64 {
        if kind == Kind::Batch { self.batch } else { 1 }
    }

    fn registration(&self, number: u64, due: Due) -> Registration {
        Registration { payload: self.payloads.get(number), due, ..Default::default() }
    }

    /// When a task of `single` or `batch` is due, and whether that is before the bench ends.
    fn far(&self) -> (Due, bool) {
        let shown_from_ms = self.shown_from_ms.load(Ordering::Relaxed);
        if shown_from_ms > 0 && rand::random_range(0..SHOWN) == 0 {
            return (Due::At(shown_from_ms + rand::random_range(0..SHOWN_MS)), true);
        }
        (Due::In(FAR_MS + rand::random_range(0..FAR_MS)), false)
    }

    /// Makes one request of a kind, and accounts for its answer. Returns what it was refused with.
    async fn ask(&self, kind: Kind) -> Option<ClientError> {
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        match kind {
            Kind::Single | Kind::Keyed => self.register(kind, number, self.far()).await,
            Kind::Fire => {
                let due = Due::In(NEAR_MS_MIN + rand::random_range(0..NEAR_MS));
                self.register(kind, number, (due, true)).await
            }
            Kind::Batch => self.register_batch(number).await,
            Kind::Edit => self.edit(number).await,
            Kind::List => self.list(number).await,
            Kind::Cancel => self.cancel(number).await,
        }
    }

    async fn register(&self, kind: Kind, number: u64, (due, seen): (Due, bool)) -> Option<ClientError> {
        let mut registration = self.registration(number, due);
        if kind == Kind::Keyed {
            registration.dedup = Some(Dedup { key: format!("{:016x}", rand::random::<u64>()), ttl_ms: None });
        }
        let sent = Instant::now();
        let result = self.client(number).register(registration).await;
        self.tally(kind).take(&result, micros(sent.elapsed()), 1);
        self.book(&result, seen, kind != Kind::Fire);
        result.err()
    }

    async fn register_batch(&self, number: u64) -> Option<ClientError> {
        let dues: Vec<_> = (0..self.batch).map(|_| self.far()).collect();
        let tasks = dues.iter().map(|(due, _)| self.registration(number, *due)).collect();
        let sent = Instant::now();
        let results = match self.client(number).register_batch(tasks).await {
            Ok(results) => results,
            Err(error) => vec![Err(error); dues.len()],
        };
        let took_us = micros(sent.elapsed());
        let mut refusal = None;
        for (result, (_, seen)) in results.into_iter().zip(dues) {
            self.tally(Kind::Batch).take(&result, took_us, 1);
            self.book(&result, seen, false);
            refusal = refusal.or(result.err());
        }
        refusal
    }

    fn book(&self, result: &Result<Registered, ClientError>, seen: bool, changeable: bool) {
        let mut books = self.books();
        match result {
            Ok(Registered { task_id, due_ms, .. }) if seen => books.expected.push((*task_id, *due_ms)),
            Ok(Registered { task_id, .. }) => {
                books.far += 1;
                if changeable && books.changeable.len() < CHANGEABLE_MAX {
                    books.changeable.push_back(*task_id);
                }
            }
            Err(error) => books.unknown += u64::from(error.is_unknown()),
        }
    }

    /// `None`, after a moment, while there is nothing to cancel or to edit.
    async fn changeable(&self) -> Option<TaskId> {
        let task_id = self.books().changeable.pop_front();
        if task_id.is_none() {
            // For whoever asks again and again.
            tokio::time::sleep(TICK).await;
        }
        task_id
    }

    async fn cancel(&self, number: u64) -> Option<ClientError> {
        let task_id = self.changeable().await?;
        let sent = Instant::now();
        let result = self.client(number).cancel(task_id).await;
        self.tally(Kind::Cancel).take(&result, micros(sent.elapsed()), 1);
        let mut books = self.books();
        match &result {
            Ok(Cancelled::Cancelled) => books.cancelled += 1,
            Ok(Cancelled::TooLate { .. }) => books.too_late += 1,
            Ok(Cancelled::NotFound) => books.not_found += 1,
            Err(error) if error.is_unknown() => books.cancels_unknown += 1,
            // Nothing was done: somebody else may.
            Err(_) => books.changeable.push_back(task_id),
        }
        drop(books);
        result.err()
    }

    async fn edit(&self, number: u64) -> Option<ClientError> {
        let task_id = self.changeable().await?;
        let due = Due::In(FAR_MS + rand::random_range(0..FAR_MS));
        let update = TaskUpdate { due: Some(due), payload: Some(self.payloads.get(number)), ..TaskUpdate::default() };
        let sent = Instant::now();
        let result = self.client(number).update(task_id, update).await;
        self.tally(Kind::Edit).take(&result, micros(sent.elapsed()), 1);
        let mut books = self.books();
        match &result {
            Ok(Updated::TooLate { .. }) => books.too_late += 1,
            Ok(Updated::NotFound | Updated::Conflict { .. }) => books.not_found += 1,
            // It is there, as it was or as it is to be.
            Ok(Updated::Updated { .. }) | Err(_) => books.changeable.push_back(task_id),
        }
        drop(books);
        result.err()
    }

    async fn list(&self, number: u64) -> Option<ClientError> {
        let sent = Instant::now();
        let result = self.client(number).list(TaskFilter { limit: PAGE, ..TaskFilter::default() }).await;
        self.tally(Kind::List).take(&result, micros(sent.elapsed()), 1);
        result.err()
    }

    /// Forgets what became of requests so far.
    fn begin_anew(&self) {
        Kind::ALL.iter().for_each(|kind| *self.tally(*kind) = Tally::new());
    }

    /// The most that is carried while registrations are answered in time: tasks a second of each kind, all of them at
    /// once. Each look has more requests under way, for their number decides what a closed loop comes to.
    async fn calibrate(self: &Arc<Self>, look: Duration) -> Carried {
        let stop = Arc::new(AtomicBool::new(false));
        let mut workers = JoinSet::new();
        let mut best = Carried::default();
        let mut under_way = 0;
        for number in 0..LOOKS_MAX {
            // As many again as there are.
            let more = 1 << number.saturating_sub(1);
            for (kind, first) in [
                (Kind::Single, self.bench.clients.len()),
                (Kind::Batch, BATCHES_UNDER_WAY),
                (Kind::Keyed, SOME_UNDER_WAY),
                (Kind::Fire, SOME_UNDER_WAY),
                (Kind::Edit, SOME_UNDER_WAY),
                (Kind::List, LISTS_UNDER_WAY),
                (Kind::Cancel, SOME_UNDER_WAY),
            ] {
                for _ in 0..if self.kinds.contains(&kind) { first * more } else { 0 } {
                    let (rig, stop) = (self.clone(), stop.clone());
                    workers.spawn(async move { rig.keep_asking(kind, &stop).await });
                    under_way += 1;
                }
            }
            tokio::time::sleep(look / WARM_UP).await;
            self.begin_anew();
            let begun = Instant::now();
            tokio::time::sleep(look - look / WARM_UP).await;
            let took_us = micros(begun.elapsed());
            let per_second = self.kinds.iter().map(|kind| (*kind, rate(self.tally(*kind).accepted, took_us))).collect();
            let in_time = too_slow(&Kind::ALL.map(|kind| (kind, self.tally(kind).clone()))).is_empty();
            let found = Carried { under_way, per_second };
            let worth = found.all() >= best.all() * WORTH_MORE;
            if found.all() > best.all() && in_time || number == 0 {
                best = found;
            }
            if !worth || !in_time {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        workers.join_all().await;
        best
    }

    async fn keep_asking(&self, kind: Kind, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            if let Some(error) = self.ask(kind).await {
                pause_if_overloaded(&error).await;
            }
        }
    }

    /// Offers so many tasks a second, whatever becomes of them. Returns when all have been sent and answered, with how
    /// late requests were sent.
    async fn offer(
        self: &Arc<Self>,
        per_second: &BTreeMap<Kind, f64>,
        time: Duration,
        under_way_max: u32,
    ) -> Histogram<u64> {
        let room = Arc::new(Semaphore::new(under_way_max as usize));
        let mut pacers = JoinSet::new();
        for (&kind, &per_second) in per_second {
            let (rig, room) = (self.clone(), room.clone());
            pacers.spawn(async move { rig.pace(kind, per_second, time, room).await });
        }
        let mut late_us = histogram();
        while let Some(late) = pacers.join_next().await {
            late_us.add(late.expect("no panic in a pacer")).expect("histograms of one shape");
        }
        let _all = room.acquire_many(under_way_max).await;
        late_us
    }

    async fn pace(
        self: Arc<Self>,
        kind: Kind,
        per_second: f64,
        time: Duration,
        room: Arc<Semaphore>,
    ) -> Histogram<u64> {
        let mut late_us = histogram();
        let tasks = self.tasks_in(kind);
        let seconds_each = tasks as f64 / per_second.max(f64::MIN_POSITIVE);
        let begun = Instant::now();
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut next = 0.0;
        loop {
            ticks.tick().await;
            let now = begun.elapsed();
            if now >= time {
                return late_us;
            }
            while next <= now.as_secs_f64() {
                late_us.saturating_record(micros(now.saturating_sub(Duration::from_secs_f64(next))));
                next += seconds_each;
                let Ok(permit) = room.clone().try_acquire_owned() else {
                    self.tally(kind).held_back += tasks;
                    continue;
                };
                let rig = self.clone();
                tokio::spawn(async move {
                    rig.ask(kind).await;
                    drop(permit);
                });
            }
        }
    }
}

pub(super) async fn run(args: OverloadBench, global: &Global) -> Result<Report, ToolError> {
    let OverloadBench {
        factor,
        mut kinds,
        time,
        calibrate,
        batch,
        connections,
        under_way_max,
        payload,
        memory_max,
        wait,
        nodes,
        mut server,
        quiet,
    } = args;
    kinds.sort();
    kinds.dedup();
    if !kinds.iter().any(|kind| kind.registers()) {
        return Err(Invalid::new("--kinds: none of them registers a task").into());
    }
    server.node_nice.get_or_insert(NODE_NICE);
    let cluster = LocalCluster::start(nodes, server, global.timeout, quiet).await?;
    let load = LoadArgs {
        connections,
        inflight: under_way_max,
        payload,
        listen: "127.0.0.1:0".into(),
        advertise: None,
        keep: true,
        faults: false,
        quiet,
    };
    let own = json!({
        "factor": factor,
        "kinds": kinds.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(","),
        "time_ms": millis(time),
        "calibrate_ms": millis(calibrate),
        "batch": batch,
        "memory_max": memory_max,
        "wait_ms": millis(wait),
    });
    let configuration = configuration(&load, cluster.configuration(), own);
    let room = (calibrate * LOOKS_MAX + time).as_secs() * DELIVERIES_PER_SECOND;
    let bench = Bench::connect(&load, cluster.options(), Protocol::Tcp, room).await?;
    let payloads = bench.shape.payloads.clone();
    let rig = Arc::new(Rig {
        bench,
        payloads,
        batch: u64::from(batch),
        kinds,
        shown_from_ms: AtomicU64::new(0),
        number: AtomicU64::new(0),
        tallies: Kind::ALL.map(|_| Mutex::new(Tally::new())),
        books: Mutex::default(),
    });

    rig.bench.progress.phase("measuring what is carried", 0);
    let carried = rig.calibrate(calibrate).await;
    tokio::time::sleep(REST).await;
    rig.begin_anew();
    rig.shown_from_ms.store(now_ms() + millis(time) + NEAR_MS, Ordering::Relaxed);

    rig.bench.progress.phase("offering more than that", 0);
    let before = cluster.reading().await?;
    let begun = Instant::now();
    let offered = carried.per_second.iter().map(|(kind, per_second)| (*kind, per_second * factor)).collect();
    let late_us = rig.offer(&offered, time, under_way_max).await;
    let took = begun.elapsed().min(time);
    let ended = cluster.ended();
    let accepted: u64 = Kind::ALL.iter().filter(|kind| kind.registers()).map(|kind| rig.tally(*kind).accepted).sum();
    let mut wrong: Vec<String> = ended.iter().map(|node| format!("node {node} ended by itself")).collect();
    let mut more = match cluster.reading().await {
        Ok(reading) => reading.since(&before, accepted),
        // The rest of the report is worth having.
        Err(error) => {
            wrong.push(error.to_string());
            Map::new()
        }
    };

    let books = std::mem::take(&mut *rig.books());
    let judgement = rig.bench.wait(&books.expected, wait).await;
    let (least, most) = books.pending();
    let pending = if nodes <= NODES_WITH_ALL { pending(&cluster, least).await } else { None };
    let missing = pending.map_or(0, |pending| least.saturating_sub(pending)).max(books.not_found);

    let tallies: Vec<_> =
        rig.kinds.iter().map(|kind| (*kind, std::mem::replace(&mut *rig.tally(*kind), Tally::new()))).collect();
    let memory = cluster.memory_peaks();
    if let Some(changes) = more.get("leader_changes").and_then(Value::as_u64).filter(|changes| *changes > 0) {
        wrong.push(format!("{changes} changes of a leader"));
    }
    if let Some(lost) = more.get("leases_lost").and_then(Value::as_u64).filter(|lost| *lost > leases_lost_max(took)) {
        wrong.push(format!("{lost} leases ran out, more than {}", leases_lost_max(took)));
    }
    wrong.extend(too_slow(&tallies));
    if all_was_carried(&tallies) {
        wrong.push("all of it was carried in time, so this was no overload: try a larger --factor".to_owned());
    }
    for (node, bytes) in &memory {
        if *bytes > memory_max {
            wrong.push(format!("node {node} took {} MiB of memory, more than {} MiB", bytes >> 20, memory_max >> 20));
        }
    }
    if books.too_late > 0 {
        wrong.push(format!("{} cancellations or edits came too late, an hour before the task was due", books.too_late));
    }

    let mut latency_us = histogram();
    let mut failures = BTreeMap::new();
    let mut counts = Counts {
        fired: judgement.fired,
        lost: judgement.lost.len() as u64 + missing,
        early: judgement.early,
        duplicates: judgement.duplicates,
        ..Counts::default()
    };
    for (kind, tally) in &tallies {
        merge(&mut failures, tally.failures.clone());
        counts.sent += tally.offered() - tally.held_back;
        counts.acknowledged += tally.accepted;
        counts.refused += tally.refused;
        if kind.registers() {
            latency_us.add(&tally.accepted_us).expect("histograms of one shape");
        }
    }
    let mut carried_per_second: Map<String, Value> =
        carried.per_second.iter().map(|(kind, rate)| (kind.name().to_owned(), json!(rate))).collect();
    carried_per_second.insert("under_way".to_owned(), json!(carried.under_way));
    more.extend([
        ("took_ms".to_owned(), json!(millis(took))),
        ("carried_per_second".to_owned(), Value::Object(carried_per_second)),
        ("kinds".to_owned(), tallies.iter().map(|(kind, tally)| tally.shown(*kind, took)).collect()),
        ("sent_late_us".to_owned(), json!(Percentiles::of(&late_us))),
        (
            "far".to_owned(),
            json!({
                "acknowledged": books.far, "cancelled": books.cancelled, "pending": pending, "pending_least": least,
                "pending_most": most, "not_found": books.not_found,
            }),
        ),
        (
            "memory".to_owned(),
            memory.iter().map(|(node, bytes)| json!({ "node": node, "memory_mib_max": bytes >> 20 })).collect(),
        ),
        ("early_us_max".to_owned(), json!(judgement.early_us_max)),
        ("strays".to_owned(), json!(judgement.strays)),
        ("said".to_owned(), said(&cluster)),
    ]);
    Ok(Report {
        bench: "overload",
        configuration,
        counts,
        per_second: rate(accepted, micros(took)),
        latency_us: Percentiles::of(&latency_us),
        lateness_us: Some(judgement.lateness_us),
        faults: false,
        wrong,
        more,
        failures,
    })
}

fn leases_lost_max(took: Duration) -> u64 {
    took.as_secs() / LEASE_LOST_EVERY_SECS
}

/// Answers that took longer than they may.
fn too_slow(tallies: &[(Kind, Tally)]) -> Vec<String> {
    let mut wrong = Vec::new();
    let ms = |us: u64| rounded(us as f64 / 1_000.0, 1);
    for (kind, tally) in tallies {
        let (accepted, refused) = (Percentiles::of(&tally.accepted_us).p99, Percentiles::of(&tally.refused_us).p99);
        if kind.registers() && accepted > micros(ACCEPTED_WITHIN) {
            let text = format!("p99 of an accepted registration ({}) is {} ms", kind.name(), ms(accepted));
            wrong.push(format!("{text}, more than {}", ACCEPTED_WITHIN.as_millis()));
        }
        let refused_within = if *kind == Kind::List { LIST_REFUSED_WITHIN } else { REFUSED_WITHIN };
        if refused > micros(refused_within) {
            let text = format!("p99 of a refusal ({}) is {} ms", kind.name(), ms(refused));
            wrong.push(format!("{text}, more than {}", refused_within.as_millis()));
        }
    }
    wrong
}

/// Whether this says nothing about overload: neither was anything refused or held back, nor answered late.
fn all_was_carried(tallies: &[(Kind, Tally)]) -> bool {
    too_slow(tallies).is_empty() && tallies.iter().all(|(_, tally)| tally.refused + tally.failed + tally.held_back == 0)
}

/// How many tasks wait, as the node knows that has most; waits until it is `least`. `None` where it cannot be read.
async fn pending(cluster: &LocalCluster, least: u64) -> Option<u64> {
    let deadline = Instant::now() + PENDING_WITHIN;
    loop {
        let most = cluster.metric("boomerang_pending").await.ok()?.into_iter().max()?;
        if most >= least || Instant::now() > deadline {
            return Some(most);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// The warnings and errors of all nodes, those first that were said most often.
fn said(cluster: &LocalCluster) -> Value {
    let mut said: Vec<(String, u64)> = cluster.warnings().into_iter().collect();
    said.sort_by_key(|(_, times)| std::cmp::Reverse(*times));
    said.truncate(SAID_MAX);
    said.into_iter().map(|(text, times)| json!({ "times": times, "said": text })).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(status: Status) -> Result<(), ClientError> {
        Err(ClientError::Server { status, message: "no".into(), retry_after: None, maybe_done: false })
    }

    #[test]
    fn a_refusal_is_told_from_a_failure() {
        let mut tally = Tally::new();
        tally.take(&Ok(()), 600_000, 3);
        tally.take(&refused(Status::Overloaded), 60_000, 2);
        tally.take(&refused(Status::NotLeader), 5, 1);
        tally.held_back = 4;
        assert_eq!((tally.accepted, tally.refused, tally.failed, tally.offered()), (3, 2, 1, 10));
        let shown = tally.shown(Kind::Fire, Duration::from_secs(2));
        assert_eq!((&shown["kind"], &shown["offered_per_second"]), (&json!("fire"), &json!(5.0)));
        let wrong = too_slow(&[(Kind::Fire, tally)]);
        assert!(
            wrong[0].starts_with("p99 of an accepted registration (fire) is 6") && wrong[0].ends_with("more than 500")
        );
        assert!(
            wrong[1].starts_with("p99 of a refusal (fire) is 6") && wrong[1].ends_with("more than 50"),
            "{wrong:?}"
        );
        let mut slow = Tally::new();
        slow.take(&Ok(()), 600_000, 1);
        assert!(too_slow(&[(Kind::Cancel, slow)]).is_empty(), "it registers nothing");
        let mut fast = Tally::new();
        fast.take(&Ok(()), 1_000, 1);
        assert!(all_was_carried(&[(Kind::Single, fast.clone())]));
        fast.take(&refused(Status::Overloaded), 1_000, 1);
        assert!(!all_was_carried(&[(Kind::Single, fast)]), "there was too much");
    }

    #[test]
    fn what_nobody_knows_widens_the_bounds() {
        let books = Books { far: 100, cancelled: 10, unknown: 3, cancels_unknown: 2, too_late: 1, ..Books::default() };
        assert_eq!(books.pending(), (87, 92));
    }
}
