//! The ledger, the state machine and those between them, interleaved at random: whatever was answered stays true.
//!
//! Real, on a store in memory that checks what is written once: the ledger, the maker of entries, `shard::apply`, the
//! steps of the dispatcher ([`steps`](super::steps)) and of whoever reads the timeline ahead ([`Reading`]), and the
//! destinations with their places, lines and breakers ([`Callbacks`]). Anything can come between any two steps: a command
//! is held, then applied, then answered; an id is handed over, then looked up, read, judged and begun.
//!
//! Told here, because it waits, or needs a group of replicas: that a term begins and ends, and how long a lease is valid
//! (`window`, `dispatch::run`: which messages are taken on, and which given back); how an entry gets through the log
//! (`propose`, `raft::state_machine`); who asks again when nothing or nothing certain was answered
//! (`dispatch::propose_until_stored`, `armer`); what receivers answer. Steps for which `put_back`, `hold` or `release`
//! give the shard's lock back on the way are one here. A hand-over to another leader is not tried.
//!
//! What leaves is a delivery. Each truth is checked as soon as it can be broken. Leading is suspended at any moment and goes
//! on, or its term ends meanwhile; within a term no attempt leaves twice. In the end the leadership stays, everything is
//! released, and nothing may be left: no task, no attempt that is out, nobody who waits.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use boomerang_testkit::seed;
use futures::FutureExt;
use futures::future::{BoxFuture, ready};
use rand::rngs::{SmallRng, StdRng};
use rand::{RngExt, SeedableRng};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use super::FiringSettings;
use super::dispatch::{MESSAGES_AT_ONCE, attempt};
use super::ledger::{Handed, Ledger, Turn};
use super::steps::{Departure, Dispatcher, Done, Means, Move, Ready, Work};
use super::window::{Loaded, Reading};
use crate::callback::{CallbackSettings, Callbacks, Carrier, Ticket};
use crate::clock::{Clock, ManualClock};
use crate::metrics::Metrics;
use crate::propose::maker::{Asked, Maker};
use crate::propose::{self, Dispatches, Refused};
use crate::raft::Observer;
use crate::shard::{self, Batch, Cancel, CatchUp, Change, Claim, Detach, Edit, Pause, Reply, Request, Settle};
use crate::store::Store;
use crate::store::codec;
use crate::store::keys::Key;
use crate::store::memory::MemoryDisk;
use crate::store::overlay::{Overlay, Write};
use crate::store::rows::{CursorRow, NEVER, Role, ShardMetaRow, TaskRow};
use crate::task::locks::Mutex;
use crate::task::{
    Callback, Delivery, Failure, FailureClass, Fence, GroupId, InstantMs, Missed, Policy, Protocol, Recurrence, Retry,
    ShardId, TaskId,
};

const SCHEDULES: u64 = 2_000;
const STEPS: usize = 400;
const TASKS_MAX: u64 = 10;
/// Short, so that tasks come into it by themselves and by being read.
const WINDOW_MS: u64 = 1_500;
/// Of the timeline, read at a time: so that there is something between two reads.
const ROWS_PER_CHUNK: usize = 2;
const DESTINATIONS: [&str; 2] = ["127.0.0.1:1", "127.0.0.1:2"];

/// What is asked for and not yet in an entry.
#[derive(Debug, Clone)]
enum Ask {
    Register {
        recurrence: Option<Recurrence>,
        due_ms: InstantMs,
        destination: usize,
    },
    Cancel(TaskId),
    Edit {
        id: TaskId,
        version: Option<u64>,
        due_ms: Option<InstantMs>,
        destination: Option<usize>,
    },
    Pause(TaskId, bool),
    /// From a delivery of this term, which ends with it.
    Settle(u64, Settle),
    Move(u64, Move),
    Arm(InstantMs),
}

/// What was proposed: its claims are made, its tasks are held.
struct Entry {
    term: u64,
    batch: Batch,
    held: Vec<Option<TaskId>>,
    /// Who has to be told that it was of no use.
    moves: Vec<Option<TaskId>>,
    /// With those who wait for it, until they have heard of it.
    made: Option<propose::maker::Entry>,
    replies: Option<Vec<Reply>>,
    /// Nobody waits for it any more; it is applied all the same.
    timed_out: bool,
    armed_ms: InstantMs,
}

/// While the ledger leads: its dispatcher.
struct Leads {
    dues: mpsc::UnboundedReceiver<Handed>,
    dispatcher: Dispatcher,
    /// It gives back what it is handed, until the lease is valid.
    suspended: bool,
}

/// An attempt that the receiver has and has not answered.
struct Out {
    term: u64,
    departure: Departure,
}

/// Whoever gets attempts, and what they say to the next one.
struct Receivers(Mutex<Result<(), Failure>>);

impl Carrier for Receivers {
    fn carry(&self, _: Delivery, _: Duration) -> BoxFuture<'static, Result<(), Failure>> {
        ready(self.0.lock().clone()).boxed()
    }
}

/// What is known of one task, and what was promised.
#[derive(Default)]
struct Promised {
    recurring: bool,
    overlap: bool,
    /// Occurrence, attempt, version; of stand-ins version 0.
    delivered: Vec<(u64, u32, u64)>,
    /// Term, occurrence, attempt.
    delivered_in: BTreeSet<(u64, u64, u32)>,
    last_fence: Option<Fence>,
    ended: Option<End>,
    version_min: u64,
    due_min_ms: InstantMs,
    /// The attempt that may be out all the same.
    paused: Option<Option<(u64, u32)>>,
}

#[derive(Clone, Copy, Debug)]
enum End {
    /// Cancelled or not found: nothing from now on.
    Nothing,
    /// Too late: nothing after this attempt.
    UpTo(u64, u32),
}

/// How often what happened; so that a test that meets nothing fails.
macro_rules! met {
    ($($(#[$comment:meta])* $field:ident,)*) => {
        #[derive(Default, Debug)]
        struct Met { $($(#[$comment])* $field: u64,)* }

        impl Met {
            fn add(&mut self, other: Met) {
                $(self.$field += other.$field;)*
            }

            fn least(&self) -> u64 {
                [$(self.$field),*].into_iter().min().unwrap()
            }
        }
    };
}

met! {
    cancelled,
    cancel_too_late,
    cancel_not_found,
    edited,
    edit_too_late,
    conflicts,
    paused,
    paused_maybe_out,
    resumed,
    deliveries,
    again,
    waits,
    turns_in_line,
    downs,
    put_back,
    void_begins,
    new_terms,
    same_terms,
    kills,
    moved,
    timed_out,
    unknown,
    late_ends,
    refused,
    suspended,
    /// Leading went on while attempts were out.
    resumed_with_out,
    /// The term ended meanwhile.
    over_while_suspended,
    taken_back,
    /// Whose destination was down, and who were not sent.
    failed,
    /// The window ended where there was no room in the wheel.
    full,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lease {
    Valid,
    /// It will not last much longer, which is enough to propose and not to dispatch.
    Short,
    Over,
}

type Rows = Vec<(InstantMs, TaskId)>;

struct World<'r> {
    rng: StdRng,
    group: GroupId,
    store: Store,
    /// Of the destinations' timers; its time goes with the clock.
    runtime: &'r Runtime,
    clock: Arc<ManualClock>,
    settings: FiringSettings,
    ledger: Arc<Ledger>,
    callbacks: Callbacks,
    receivers: Arc<Receivers>,
    /// Which receivers cannot be reached.
    unreachable: [bool; DESTINATIONS.len()],
    metrics: Arc<Metrics>,
    meta: ShardMetaRow,
    term: u64,
    /// This node has won `term`, and has a lease. What is asked is proposed from then on.
    won: bool,
    maker: Maker,
    leads: Option<Leads>,
    lease: Lease,
    /// The last term in which the ledger led, and whether it has begun in it more than once: then it has forgotten what was
    /// out. Nobody does that to it any more, and what it says is true all the same.
    led_in: u64,
    forgot: bool,
    asks: Vec<Ask>,
    /// How fast entries are applied: 1 is fast.
    pace: f64,
    /// The most steps that a dispatcher takes with nothing in between.
    stride: usize,
    /// In the order of the log.
    entries: VecDeque<Entry>,
    /// Ends of what an entry of an earlier term held back, or one that nobody waits for, which nobody has told yet.
    late_ends: Vec<(u64, TaskId)>,
    /// Moved on by the dispatcher, and found to have moved by themselves.
    stale: Vec<(u64, TaskId)>,
    /// Each settles some whose destination is down, beside the dispatcher and beyond its term.
    failing: Vec<Dispatcher>,
    /// What is read from the timeline, and the rows that are not yet with the ledger.
    reading: Option<(Reading, Option<Rows>)>,
    full: bool,
    out: Vec<Out>,
    tasks: BTreeMap<TaskId, Promised>,
    next_id: u64,
    policies: [Arc<Policy>; DESTINATIONS.len()],
    met: Met,
}

impl<'r> World<'r> {
    /// In `runtime`.
    fn new(mut rng: StdRng, runtime: &'r Runtime) -> Self {
        let (group, store) = (GroupId(1), MemoryDisk::default().open());
        let clock = Arc::new(ManualClock::at_ms(1_000));
        let timers_max = [FiringSettings::default().timers_max, 4][rng.random_range(0..2)];
        let in_flight_max = [FiringSettings::default().in_flight_max, 2][rng.random_range(0..2)];
        let settings = FiringSettings { window_ms: WINDOW_MS, timers_max, in_flight_max, ..FiringSettings::default() };
        let ledger = Ledger::new(store.clone(), clock.clone(), settings, group.0);
        let receivers = Arc::new(Receivers(Mutex::new(Ok(()))));
        let callbacks = callbacks(&receivers, &ledger, &mut rng);
        let maker = maker(group, &clock, &ledger, &mut rng);
        let pace = [1.0, 0.2][rng.random_range(0..2)];
        let stride = rng.random_range(1..6);
        let unreachable = [false; DESTINATIONS.len()];
        let retry = Retry { attempts_max: 3, interval_ms: 100, interval_max_ms: 100, ..Retry::default() };
        let policies = [0, 1].map(|n| Arc::new(Policy { callback: callback(n), retry, dead_letter: None }));
        Self {
            rng,
            group,
            store,
            runtime,
            clock,
            settings,
            ledger,
            callbacks,
            receivers,
            unreachable,
            metrics: Arc::new(Metrics::new()),
            meta: ShardMetaRow::default(),
            term: 0,
            won: false,
            maker,
            leads: None,
            lease: Lease::Valid,
            led_in: 0,
            forgot: false,
            asks: Vec::new(),
            pace,
            stride,
            entries: VecDeque::new(),
            late_ends: Vec::new(),
            stale: Vec::new(),
            failing: Vec::new(),
            reading: None,
            full: false,
            out: Vec::new(),
            tasks: BTreeMap::new(),
            next_id: 0,
            policies,
            met: Met::default(),
        }
    }

    fn now_ms(&self) -> InstantMs {
        self.clock.now_ms()
    }

    fn any_task(&mut self) -> Option<TaskId> {
        if self.tasks.is_empty() {
            return None;
        }
        // Rather the last: changes of one task are what can go wrong.
        let last = self.tasks.len() - 1;
        let n = if self.rng.random_bool(0.5) { last } else { self.rng.random_range(0..=last) };
        self.tasks.keys().nth(n).copied()
    }

    fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..10 => self.ask(),
            10..20 => {
                let by = Duration::from_millis(self.rng.random_range(0..250));
                self.pass(by);
            }
            20..32 => self.turn(),
            32..42 => self.propose(),
            42..50 => {
                if self.rng.random_bool(self.pace) {
                    self.apply();
                }
            }
            50..58 => self.answer(),
            58..74 => self.dispatch(),
            74..78 => self.fail_some(),
            78..83 => self.settle_one(),
            83..86 => {
                let n = self.rng.random_range(0..DESTINATIONS.len());
                self.unreachable[n] = self.rng.random_bool(0.7);
                if self.unreachable[n] {
                    self.break_off(n);
                }
            }
            86..92 => self.read_ahead(),
            92..95 => self.give_back_one(),
            95..97 => self.lose_or_win(),
            97 if self.rng.random_bool(0.3) => self.kill(),
            98 => self.end_late(),
            _ if self.won && self.leads.is_none() => self.lead(),
            _ => self.turn(),
        }
    }

    fn pass(&self, by: Duration) {
        self.clock.advance(by);
        self.runtime.block_on(async {
            tokio::time::advance(by).await;
            // Timers have their turn.
            for _ in 0..3 {
                tokio::task::yield_now().await;
            }
        });
    }

    /// A client wants something.
    fn ask(&mut self) {
        let soon_ms = self.now_ms() + self.rng.random_range(0..1_500);
        let may_register = self.next_id < TASKS_MAX;
        let Some(id) = self.any_task().filter(|_| !may_register || self.rng.random_bool(0.7)) else {
            if may_register {
                let recurrence = self.rng.random_bool(0.5).then(|| Recurrence {
                    missed: [Missed::Once, Missed::Skip, Missed::All { max: 2 }][self.rng.random_range(0..3)],
                    overlap: self.rng.random_bool(0.3),
                    count: Some(self.rng.random_range(1..6)),
                    ..Recurrence::every(self.rng.random_range(100..800))
                });
                let destination = self.rng.random_range(0..DESTINATIONS.len());
                self.asks.push(Ask::Register { recurrence, due_ms: soon_ms, destination });
                self.next_id += 1;
            }
            return;
        };
        let ask = match self.rng.random_range(0..10) {
            0..2 => Ask::Cancel(id),
            2..6 => {
                let version = self.rng.random_bool(0.5).then(|| self.rng.random_range(1..4));
                let due_ms = self.rng.random_bool(0.5).then_some(soon_ms);
                let destination = self.rng.random_bool(0.2).then(|| self.rng.random_range(0..DESTINATIONS.len()));
                Ask::Edit { id, version, due_ms, destination }
            }
            6..8 => Ask::Pause(id, true),
            _ => Ask::Pause(id, false),
        };
        self.asks.push(ask);
    }

    fn turn(&mut self) {
        let arms = Mutex::new(Vec::new());
        let turn = self.ledger.turn(&|_, _, up_to| arms.lock().push(up_to));
        assert!(!matches!(turn, Turn::Stop));
        self.asks.extend(arms.into_inner().into_iter().map(Ask::Arm));
    }

    /// The real maker makes an entry of some of what is asked: claims are made here, and tasks are held from here on.
    fn propose(&mut self) {
        if self.lease == Lease::Over {
            // Refused: clients ask elsewhere, the watermark is asked for again when leading goes on, and whoever moves a task
            // waits for that.
            let is_ours = |ask: &Ask| matches!(ask, Ask::Arm(_) | Ask::Settle(..) | Ask::Move(..));
            if self.asks.iter().any(is_ours) {
                let _ = self.ledger.suspend(self.group, self.term);
            }
            self.asks.retain(|ask| matches!(ask, Ask::Settle(..) | Ask::Move(..)));
            return;
        }
        if !self.won || self.asks.is_empty() {
            return;
        }
        // One at a time, unless the one before takes too long.
        if let Some(last) = self.entries.back_mut() {
            if last.replies.is_some() || self.rng.random_bool(0.8) {
                return;
            }
            last.timed_out = true;
            if let Some(made) = last.made.take() {
                made.end(Err(Refused::Unknown), &*self.ledger);
            }
            self.met.timed_out += 1;
        }
        let some = self.rng.random_range(1..=self.asks.len());
        let asks: Vec<Ask> = self.asks.drain(..some).collect();
        let asked: Vec<Asked> = asks.iter().map(|ask| self.asked(ask)).collect();
        self.maker.begin(self.term, &self.store);
        let Some(made) = self.maker.entry(asked) else { return };
        let batch = Batch::decode(&made.bytes).unwrap();
        self.met.unknown +=
            batch.requests.iter().filter(|request| claim_of(request) == Some(Claim::Unknown)).count() as u64;
        if self.rng.random_bool(0.05) {
            // The lease was over just then: nothing is appended.
            self.met.refused += 1;
            made.end(Err(Refused::NotLeader { group: self.group }), &*self.ledger);
            if asks.iter().any(|ask| matches!(ask, Ask::Arm(_))) {
                self.ledger.arm_failed(self.group, self.term);
            }
            // Whoever wanted the others asks again.
            self.asks.splice(0..0, asks.into_iter().filter(|ask| !matches!(ask, Ask::Arm(_))));
            return;
        }
        let moved = |request: &Request| match request {
            Request::CatchUp(CatchUp { id, .. }) | Request::Detach(Detach { id, .. }) => Some(*id),
            _ => None,
        };
        let moves = batch.requests.iter().map(moved).collect();
        let (held, armed_ms, made) = (made.held(), made.armed_ms, Some(made));
        let (term, timed_out) = (self.term, false);
        self.entries.push_back(Entry { term, batch, held, moves, made, replies: None, timed_out, armed_ms });
    }

    /// As whoever asks does it.
    fn asked(&self, ask: &Ask) -> Asked {
        let ask = match ask.clone() {
            Ask::Register { recurrence, due_ms, destination } => propose::Ask::Register {
                client: "me".parse().unwrap(),
                policy: self.policies[destination].clone(),
                due: propose::Due::At(due_ms),
                recurrence,
                tags: None,
                dedup: None,
                numbered: None,
                payload: bytes::Bytes::from_static(b"old"),
            },
            Ask::Cancel(id) => propose::Ask::Cancel { id, owner: None },
            Ask::Edit { id, version, due_ms, destination } => {
                let payload = Some(bytes::Bytes::from_static(b"new"));
                let change = Change { payload, callback: destination.map(callback), ..Change::default() };
                propose::Ask::Edit { id, owner: None, version, due: due_ms.map(propose::Due::At), change }
            }
            Ask::Pause(id, paused) => propose::Ask::Pause { id, owner: None, paused },
            Ask::Settle(_, settle) => propose::Ask::Settle(settle),
            Ask::Move(_, way) => way.ask(),
            Ask::Arm(up_to) => propose::Ask::Arm(up_to),
        };
        // What is answered is checked when it is applied.
        Asked { ask, answer: Box::new(|_| {}), room: None }
    }

    /// As `raft::state_machine` does it: stored, told to the ledger; the answers leave later.
    fn apply(&mut self) {
        let Some(n) = self.entries.iter().position(|entry| entry.replies.is_none()) else { return };
        let batch = self.entries[n].batch.clone();
        let replies = self.apply_batch(&batch, !self.entries[n].timed_out);
        self.entries[n].replies = Some(replies);
    }

    fn apply_batch(&mut self, batch: &Batch, answered: bool) -> Vec<Reply> {
        // One by one, so that each is checked against what it met; the ledger hears of all of them at once.
        let mut effects = Vec::new();
        let mut replies = Vec::new();
        let parts: Vec<Batch> = match batch.requests.len() {
            0 => vec![batch.clone()],
            _ => batch.requests.iter().map(|one| Batch { requests: vec![one.clone()], ..batch.clone() }).collect(),
        };
        let base = self.store.clone();
        let mut overlay = Overlay::new(&base);
        let mut checks = Vec::new();
        for part in parts {
            let of = match part.requests.first() {
                Some(
                    Request::Cancel(Cancel { id, .. })
                    | Request::Edit(Edit { id, .. })
                    | Request::Pause(Pause { id, .. }),
                ) => Some(*id),
                _ => None,
            };
            let before = of.and_then(|id| standing(&overlay, self.group, id));
            let request = part.requests.first().cloned();
            let mut applied = shard::apply(self.group, &mut overlay, &mut self.meta, part).unwrap();
            effects.append(&mut applied.effects);
            let after = of.and_then(|id| standing(&overlay, self.group, id));
            if let (Some(request), Some(reply)) = (request, applied.replies.first()) {
                checks.push((request, reply.clone(), before, after));
            }
            replies.append(&mut applied.replies);
        }
        let mut writes = overlay.into_writes();
        writes.insert(Key::shard_meta(self.group), Write::Put(codec::encode(&self.meta)));
        self.store.write_state(writes).unwrap();
        self.ledger.applied(self.group, &self.meta, &effects);
        for (request, reply, before, after) in checks {
            self.promise(&request, &reply, before, after, answered);
        }
        replies
    }

    /// Checks an answer against what was delivered before, and remembers what must not be delivered after it.
    fn promise(
        &mut self,
        request: &Request,
        reply: &Reply,
        before: Option<(TaskRow, CursorRow)>,
        after: Option<(TaskRow, CursorRow)>,
        answered: bool,
    ) {
        let met = &mut self.met;
        match (request, reply) {
            (Request::Register(register), Reply::Registered { id, .. }) => {
                let recurrence = register.recurrence;
                let told = Promised {
                    recurring: recurrence.is_some(),
                    overlap: recurrence.is_some_and(|recurrence| recurrence.overlap),
                    version_min: 1,
                    due_min_ms: register.due_ms,
                    ..Promised::default()
                };
                assert!(self.tasks.insert(*id, told).is_none());
            }
            (Request::Cancel(cancel), reply) => {
                let told = self.tasks.get_mut(&cancel.id).unwrap();
                let end = match reply {
                    Reply::Cancelled => {
                        met.cancelled += u64::from(answered);
                        let (_, at) = before.expect("what is cancelled was there");
                        let current = |(occurrence, _, _): &&(u64, u32, u64)| *occurrence >= at.occurrence;
                        let out = told.delivered.iter().find(current);
                        assert_eq!(out, None, "cancelled, and {} was delivered before", cancel.id);
                        assert!(told.recurring || told.delivered.is_empty(), "cancelled, and it was delivered");
                        End::Nothing
                    }
                    Reply::TooLate { occurrence, attempt } => {
                        met.cancel_too_late += u64::from(answered);
                        let last = (*occurrence, *attempt);
                        let later = told.delivered.iter().find(|(o, a, _)| (*o, *a) > last);
                        assert_eq!(later, None, "too late at {last:?}, and a later one was delivered");
                        End::UpTo(*occurrence, *attempt)
                    }
                    Reply::NotFound => {
                        met.cancel_not_found += u64::from(answered);
                        End::Nothing
                    }
                    other => panic!("{other:?}"),
                };
                // What a later answer says holds beside what an earlier one said.
                if !matches!((told.ended, end), (Some(_), End::Nothing)) {
                    told.ended = Some(end);
                }
                assert!(after.is_none(), "it is gone, whatever the answer");
            }
            (Request::Edit(edit), reply) => {
                let told = self.tasks.get_mut(&edit.id).unwrap();
                match reply {
                    Reply::Edited { version, due_ms } => {
                        met.edited += 1;
                        let (row, at) = before.unwrap();
                        assert_eq!(*version, row.version + 1);
                        assert!(edit.version.is_none_or(|expected| expected == row.version));
                        let this = |(o, a, _): &&(u64, u32, u64)| (*o, *a) == (at.occurrence, at.attempt);
                        if !told.overlap {
                            let old = told.delivered.iter().find(this);
                            assert_eq!(old, None, "version {version}, and the attempt went out as the one before");
                        }
                        told.version_min = *version;
                        told.due_min_ms = if *due_ms == NEVER { 0 } else { *due_ms };
                    }
                    Reply::TooLate { .. } => {
                        met.edit_too_late += 1;
                        assert_eq!(before, after, "nothing was changed");
                    }
                    Reply::Conflict { version } => {
                        met.conflicts += 1;
                        assert_eq!(before, after, "nothing was changed");
                        let (row, _) = after.unwrap();
                        assert!(row.version == *version && edit.version.is_some_and(|expected| expected != *version));
                    }
                    Reply::NotFound => assert!(before.is_none()),
                    other => panic!("{other:?}"),
                }
            }
            (Request::Pause(_), Reply::NotFound) => assert!(before.is_none()),
            (Request::Pause(pause), Reply::Paused { out }) => {
                met.paused += 1;
                met.paused_maybe_out += u64::from(out.is_some());
                let told = self.tasks.get_mut(&pause.id).unwrap();
                let (_, at) = before.unwrap();
                let at = (at.occurrence, at.attempt);
                // A stand-in goes on by itself.
                let is_out = !told.overlap && told.delivered.iter().any(|(o, a, _)| (*o, *a) == at);
                assert!(!is_out || out.is_some(), "{at:?} was delivered, and the pause does not say so");
                told.paused = Some(*out);
            }
            (Request::Pause(pause), Reply::Resumed { .. }) => {
                met.resumed += 1;
                let told = self.tasks.get_mut(&pause.id).unwrap();
                told.paused = None;
                if before.is_some_and(|(_, at)| at.is_paused()) {
                    told.due_min_ms = 0;
                }
            }
            (Request::CatchUp(_) | Request::Detach(_), Reply::Settled) => met.moved += 1,
            _ => {}
        }
    }

    /// As `propose` does it, once the entry is applied: the real entry answers, and releases what it held back.
    fn answer(&mut self) {
        if self.entries.front().is_none_or(|entry| entry.replies.is_none()) {
            return;
        }
        let entry = self.entries.pop_front().unwrap();
        if entry.term == self.term && !entry.timed_out {
            self.maker.armed_ms = self.maker.armed_ms.max(entry.armed_ms);
        }
        if entry.timed_out {
            // Whoever moves a task asks again.
            for request in &entry.batch.requests {
                match request {
                    Request::Settle(settle) => self.asks.push(Ask::Settle(entry.term, settle.clone())),
                    Request::CatchUp(catch_up) => self.asks.push(Ask::Move(entry.term, Move::CatchUp(*catch_up))),
                    Request::Detach(Detach { id, occurrence, .. }) => {
                        self.asks.push(Ask::Move(entry.term, Move::Detach { id: *id, occurrence: *occurrence }));
                    }
                    _ => {}
                }
            }
        }
        let replies = entry.replies.unwrap();
        if let Some(made) = entry.made {
            assert!(made.end(Ok(replies.clone()), &*self.ledger));
        }
        for ((reply, held), moved) in replies.into_iter().zip(entry.held).zip(entry.moves) {
            // Whoever still waits for it, beside the proposer, gets to it at any time.
            if let Some(id) = held.filter(|_| entry.timed_out) {
                self.late_ends.push((entry.term, id));
            }
            if let Some(id) = moved.filter(|_| reply == Reply::Stale && !entry.timed_out) {
                self.stale.push((entry.term, id));
            }
        }
    }

    fn dispatcher(&self) -> Dispatcher {
        let (ledger, clock, store) = (self.ledger.clone(), self.clock.clone(), self.store.clone());
        let (callbacks, metrics) = (self.callbacks.clone(), self.metrics.clone());
        Dispatcher::new(self.group, self.term, Means { ledger, clock, store, callbacks, metrics })
    }

    /// As `dispatch::run` does it: some of the steps there are, or else the next messages.
    fn dispatch(&mut self) {
        let Some(mut leads) = self.leads.take() else { return };
        if leads.dispatcher.next().is_some() {
            for _ in 0..self.rng.random_range(1..=self.stride) {
                self.step_of(&mut leads.dispatcher);
            }
        } else if leads.suspended && self.lease == Lease::Valid && self.rng.random_bool(0.5) {
            self.met.resumed_with_out += u64::from(self.ledger.counts().in_flight > 0);
            self.ledger.resume(self.group, self.term);
            leads.suspended = false;
        } else {
            self.receive(&mut leads);
        }
        self.leads = Some(leads);
    }

    fn receive(&mut self, leads: &mut Leads) {
        let Leads { dues, dispatcher, suspended } = leads;
        let mut messages = Vec::new();
        if dues.recv_many(&mut messages, MESSAGES_AT_ONCE).now_or_never().is_none() {
            return;
        }
        for message in &messages {
            match message {
                Handed::Due(_) => {}
                Handed::Admitted(turns) => self.met.turns_in_line += turns.len() as u64,
                Handed::Down(tickets, ..) => self.met.downs += tickets.len() as u64,
            }
        }
        let valid = (self.lease == Lease::Valid).then_some(self.term);
        if !*suspended && dispatcher.may_begin(valid) {
            assert_eq!(self.lease, Lease::Valid);
            for (tickets, down) in dispatcher.take(&mut messages) {
                let mut failing = self.dispatcher();
                failing.fail(&tickets, down);
                self.failing.push(failing);
            }
            return;
        }
        if !*suspended {
            self.met.suspended += 1;
            assert!(self.ledger.suspend(self.group, self.term).is_some());
            *suspended = true;
        }
        dispatcher.give_back(&mut messages);
    }

    /// As `dispatch::fail` does it.
    fn fail_some(&mut self) {
        if self.failing.is_empty() {
            return;
        }
        let n = self.rng.random_range(0..self.failing.len());
        let mut failing = self.failing.swap_remove(n);
        for _ in 0..self.rng.random_range(1..=self.stride) {
            self.step_of(&mut failing);
        }
        if failing.next().is_some() {
            self.failing.push(failing);
        }
    }

    fn step_of(&mut self, dispatcher: &mut Dispatcher) {
        let mut begins = None;
        if let Some(Work::BeginFailed(ready, down)) = dispatcher.next() {
            assert!(down.destination.is_of(&ready.policy.callback), "another destination is down");
        }
        match dispatcher.next() {
            Some(Work::Begin(ready, _) | Work::BeginFailed(ready, _)) => begins = Some(ready.clone()),
            Some(Work::Wait(_)) => {
                self.met.waits += 1;
                // Its turn may come before the ledger hears that it waits.
                if self.rng.random_bool(0.1) {
                    self.settle_one();
                }
            }
            Some(Work::PutBack(_)) => self.met.put_back += 1,
            Some(Work::TakeBack(due, _)) => self.met.taken_back += due.len() as u64,
            _ => {}
        }
        let suspended = self.ledger.is_suspended(self.group, dispatcher.term);
        match dispatcher.step().unwrap() {
            Some(Done::Leaves(departure)) => {
                assert!(!suspended, "it leaves while leading is suspended");
                assert_eq!(dispatcher.term, self.term, "it leaves after its term");
                self.leaves(*begins.unwrap(), *departure);
            }
            Some(Done::Fails(settle)) => {
                self.met.failed += 1;
                self.asks.push(Ask::Settle(dispatcher.term, settle));
            }
            Some(Done::Moves(_, way)) => self.asks.push(Ask::Move(dispatcher.term, way)),
            Some(Done::Here) => self.met.void_begins += u64::from(begins.is_some()),
            None => {}
        }
    }

    fn leaves(&mut self, ready: Ready, departure: Departure) {
        let Ready { id, ref task, ref at, .. } = ready;
        self.met.deliveries += 1;
        // Of what was on its way before it was held back, the claim says so.
        let holds = |request: &Request| match request {
            Request::Cancel(Cancel { id: of, claim, .. })
            | Request::Edit(Edit { id: of, claim, .. })
            | Request::Pause(Pause { id: of, claim, .. }) => *of == id && !matches!(claim, Claim::MayBeOut { .. }),
            _ => false,
        };
        let under_way = self.entries.iter().filter(|entry| entry.term == self.term);
        let held = under_way.flat_map(|entry| &entry.batch.requests).find(|request| holds(request));
        assert!(held.is_none(), "{id} leaves while it is held back for {held:?}");
        let now_ms = self.now_ms();
        assert!(at.due_ms <= now_ms, "early");
        assert!(at.due_ms <= self.meta.armed_ms, "not armed: the next leader would not know of it");
        let Delivery { task: shown, occurrence, attempt, due_ms, fence, .. } = departure.delivery;
        assert!(due_ms <= now_ms, "early");
        let own = task.role == Role::Own;
        let told = self.tasks.get_mut(&shown).expect("registered");
        assert!(told.last_fence < Some(fence), "the fence grows");
        told.last_fence = Some(fence);
        let which = (occurrence, attempt);
        match told.ended {
            Some(End::Nothing) => panic!("{shown} {which:?} leaves after it was cancelled"),
            Some(End::UpTo(o, a)) => assert!(which <= (o, a), "{shown} {which:?} leaves after too late {:?}", (o, a)),
            None => {}
        }
        if own {
            assert!(task.version >= told.version_min, "{shown}: version {} after {}", task.version, told.version_min);
            assert!(now_ms >= told.due_min_ms, "{shown}: {now_ms}, and it was moved to {}", told.due_min_ms);
            if let Some(out) = told.paused {
                assert_eq!(Some(which), out, "{shown} leaves while it is paused");
            }
        }
        self.met.again += u64::from(told.delivered.iter().any(|(o, a, _)| (*o, *a) == which));
        let once = told.delivered_in.insert((self.term, which.0, which.1));
        assert!(once || self.forgot, "{shown} {which:?} leaves twice in term {}", self.term);
        told.delivered.push((which.0, which.1, if own { task.version } else { 0 }));
        self.out.push(Out { term: self.term, departure });
    }

    /// A receiver answers.
    fn settle_one(&mut self) {
        if self.out.is_empty() {
            return;
        }
        let n = self.rng.random_range(0..self.out.len());
        let Out { term, departure } = self.out.swap_remove(n);
        let to = departure.delivery.policy.callback.endpoint.as_str();
        let to = DESTINATIONS.iter().position(|endpoint| *endpoint == to).unwrap();
        let answer = match self.unreachable[to] {
            true => Err(not_there()),
            false if self.rng.random_bool(0.6) => Ok(()),
            false => Err(Failure::new(FailureClass::BadStatus, "no")),
        };
        *self.receivers.0.lock() = answer;
        let settle = attempt(departure, &self.callbacks, &self.metrics).now_or_never().expect("it is there at once");
        self.asks.push(Ask::Settle(term, settle));
    }

    /// Attempts of others have failed there, and nobody is sent there any more but a probe now and then.
    fn break_off(&self, destination: usize) {
        let policy = &self.policies[destination];
        let nobody = TaskId::new(0, ShardId(0), 0);
        let ticket = Ticket { group: GroupId(0), term: 0, task: nobody, due_ms: 0 };
        while let Some(permit) = self.callbacks.admit(&policy.callback, ticket) {
            let delivery = Delivery {
                task: nobody,
                client: "other".parse().unwrap(),
                name: None,
                payload: bytes::Bytes::new(),
                occurrence: 0,
                attempt: 1,
                due_ms: 0,
                fence: Fence { term: 0, seq: 0 },
                policy: policy.clone(),
                dead_letter: None,
            };
            *self.receivers.0.lock() = Err(not_there());
            let _ = self.callbacks.deliver(permit, delivery).now_or_never();
        }
    }

    /// As `window` does it.
    fn read_ahead(&mut self) {
        for _ in 0..self.rng.random_range(1..4) {
            self.reading = match self.reading.take() {
                Some((reading, None)) => {
                    let rows = reading.read(&self.store).unwrap();
                    Some((reading, Some(rows)))
                }
                Some((mut reading, Some(rows))) => match reading.load(&self.ledger, &rows) {
                    Loaded::More => Some((reading, None)),
                    loaded => {
                        self.full = loaded == Loaded::Full;
                        self.met.full += u64::from(self.full);
                        None
                    }
                },
                None if self.leads.is_none() || self.full && !self.ledger.has_room(self.group, self.term) => None,
                None => {
                    let until = (self.now_ms() + WINDOW_MS, None);
                    let begun = Reading::begin(&self.ledger, self.group, self.term, until, ROWS_PER_CHUNK);
                    Some((begun.expect("it leads"), None))
                }
            };
        }
    }

    /// What the dispatcher wanted to move on has moved by itself.
    fn give_back_one(&mut self) {
        let Some((term, id)) = self.stale.pop() else { return };
        self.ledger.put_back(self.group, term, id).unwrap();
    }

    fn lose_or_win(&mut self) {
        match (self.won, self.leads.is_some()) {
            (_, true) if self.lease != Lease::Valid && self.rng.random_bool(0.7) => self.lease = Lease::Valid,
            (_, true) if self.lease == Lease::Valid && self.rng.random_bool(0.6) => self.lose_lease(),
            (_, true) => self.lose(),
            (true, false) => self.lead(),
            (false, false) => self.win(),
        }
    }

    /// The dispatcher finds out with its next message, or somebody who was refused does, while the dispatcher may have looked
    /// up half of a batch.
    fn lose_lease(&mut self) {
        self.lease = [Lease::Short, Lease::Over][self.rng.random_range(0..2)];
        if self.rng.random_bool(0.5) {
            assert!(self.ledger.suspend(self.group, self.term).is_some());
            assert!(self.ledger.suspend(self.group, self.term).is_some(), "twice is the same as once");
        }
    }

    fn lose(&mut self) {
        let mut leads = self.leads.take().expect("it leads");
        // One batch is one step of the dispatcher, and so is the end of a term.
        while leads.dispatcher.next().is_some() {
            self.step_of(&mut leads.dispatcher);
        }
        self.met.over_while_suspended += u64::from(self.ledger.is_suspended(self.group, self.term));
        // With all places it was handed, and that before the ledger forgets.
        drop(leads);
        self.lease = Lease::Valid;
        (self.reading, self.full) = (None, false);
        self.ledger.unlead(self.group, self.term);
        // The lease may be back before anybody asks.
        self.won = self.rng.random_bool(0.2);
        if self.won {
            self.met.same_terms += 1;
            return;
        }
        // Whatever is asked of who does not lead is refused; deliveries ask again as long as their term lasts.
        let term = self.term;
        self.asks.retain(|ask| matches!(ask, Ask::Settle(of, _) | Ask::Move(of, _) if *of == term));
    }

    /// The term that was lost, if nobody else has led meanwhile.
    fn win(&mut self) {
        let new = self.term == 0 || self.rng.random_bool(0.5);
        if new {
            self.met.new_terms += 1;
            self.term += 1;
            self.end_entries(true);
        } else {
            self.met.same_terms += 1;
        }
        self.won = true;
    }

    /// As `window` does it, a while after the election.
    fn lead(&mut self) {
        let (dues, _room) = self.ledger.lead(self.group, self.term).unwrap();
        self.leads = Some(Leads { dues, dispatcher: self.dispatcher(), suspended: false });
        self.forgot = self.led_in == self.term;
        self.led_in = self.term;
    }

    /// Entries of a term that is over are applied before the next leader begins, or never.
    fn end_entries(&mut self, node_lives: bool) {
        let mut stored = true;
        for entry in std::mem::take(&mut self.entries) {
            stored = stored && (entry.replies.is_some() || self.rng.random_bool(0.5));
            let replies = match entry.replies {
                Some(replies) => replies,
                None if stored => self.apply_batch(&entry.batch, false),
                // Nobody can tell what became of it, so nobody ends what it held back.
                None => continue,
            };
            let ends =
                entry.held.into_iter().zip(replies).filter(|(_, reply)| node_lives && *reply != Reply::Cancelled);
            self.late_ends.extend(ends.filter_map(|(held, _)| held.map(|id| (entry.term, id))));
        }
    }

    fn end_late(&mut self) {
        if self.late_ends.is_empty() {
            return;
        }
        let n = self.rng.random_range(0..self.late_ends.len());
        let (term, id) = self.late_ends.swap_remove(n);
        self.met.late_ends += 1;
        self.ledger.release(self.group, term, id);
    }

    /// Nothing is left but what is stored.
    fn kill(&mut self) {
        self.met.kills += 1;
        self.leads = None;
        self.lease = Lease::Valid;
        self.asks.clear();
        self.late_ends.clear();
        self.stale.clear();
        self.failing.clear();
        (self.reading, self.full) = (None, false);
        self.out.clear();
        self.ledger = Ledger::new(self.store.clone(), self.clock.clone(), self.settings, self.group.0);
        self.callbacks = callbacks(&self.receivers, &self.ledger, &mut self.rng);
        self.maker = maker(self.group, &self.clock, &self.ledger, &mut self.rng);
        self.end_entries(false);
        self.term += 1;
        self.won = true;
    }

    /// Everything that stands is delivered, and nothing is left of it.
    fn drain(&mut self) {
        if !self.won {
            self.win();
        }
        if self.leads.is_none() {
            self.lead();
        }
        self.lease = Lease::Valid;
        self.unreachable = DESTINATIONS.map(|_| false);
        for id in self.tasks.keys().copied().collect::<Vec<_>>() {
            self.asks.push(Ask::Pause(id, false));
        }
        // What the leader that lost its lease forgot is due for its armed instants, which pass.
        let mut idle = 0;
        while idle < 40 {
            let before = (self.meta.pending, self.met.deliveries);
            for _ in 0..4 {
                self.turn();
                self.propose();
                self.apply();
                self.answer();
                self.read_ahead();
                while self.is_busy() {
                    self.dispatch();
                    self.fail_some();
                }
                while !self.out.is_empty() {
                    self.settle_one();
                }
                while !self.stale.is_empty() {
                    self.give_back_one();
                }
                while !self.late_ends.is_empty() {
                    self.end_late();
                }
            }
            self.pass(Duration::from_millis(100));
            let quiet = self.asks.is_empty() && self.entries.is_empty() && self.callbacks.counts().waiting == 0;
            idle = if before == (self.meta.pending, self.met.deliveries) && quiet { idle + 1 } else { 0 };
        }
        let counts = self.ledger.counts();
        assert_eq!(self.meta.pending, 0, "tasks that never leave; {counts:?}");
        assert_eq!((counts.in_flight, counts.waiting, counts.timers), (0, 0, 0), "nothing is left behind");
    }

    fn is_busy(&self) -> bool {
        let leads = self.leads.as_ref().expect("it leads to the end");
        leads.suspended || leads.dispatcher.next().is_some() || !leads.dues.is_empty() || !self.failing.is_empty()
    }
}

fn callbacks(receivers: &Arc<Receivers>, ledger: &Arc<Ledger>, rng: &mut StdRng) -> Callbacks {
    let settings = CallbackSettings {
        // A receiver that has shown that it can has two attempts at a time.
        connections_max: 1,
        in_flight_max: rng.random_range(1..3),
        cool_down_min: Duration::from_millis(50),
        cool_down_max: Duration::from_millis(100),
        ..CallbackSettings::default()
    };
    let callbacks = Callbacks::carried(settings, receivers.clone());
    callbacks.set_waiters(ledger.clone());
    callbacks
}

fn not_there() -> Failure {
    Failure::new(FailureClass::Unreachable, "nobody is there")
}

fn callback(destination: usize) -> Callback {
    Callback::new(Protocol::Tcp, DESTINATIONS[destination]).unwrap()
}

fn maker(group: GroupId, clock: &Arc<ManualClock>, ledger: &Arc<Ledger>, rng: &mut StdRng) -> Maker {
    Maker::new(group, clock.clone(), ledger.clone(), false, SmallRng::seed_from_u64(rng.random()))
}

fn claim_of(request: &Request) -> Option<Claim> {
    match request {
        Request::Cancel(Cancel { claim, .. })
        | Request::Edit(Edit { claim, .. })
        | Request::Pause(Pause { claim, .. }) => Some(*claim),
        _ => None,
    }
}

fn standing(rows: &Overlay<'_>, group: GroupId, id: TaskId) -> Option<(TaskRow, CursorRow)> {
    let task: TaskRow = rows.get("a task", &Key::task(group, id)).unwrap()?;
    let at = rows.get("a cursor", &Key::cursor(group, id)).unwrap();
    let at = at.unwrap_or_else(|| shard::first_cursor(&task));
    Some((task, at))
}

#[test]
fn no_answer_is_ever_false() {
    let mut met = Met::default();
    for seed in seed::rounds(SCHEDULES) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let _entered = runtime.enter();
        let mut world = World::new(seed.rng(), &runtime);
        for _ in 0..STEPS {
            world.step();
        }
        world.drain();
        met.add(world.met);
    }
    println!("{met:?}");
    assert!(seed::is_chosen() || met.least() >= 5, "everything was met: {met:?}");
}
