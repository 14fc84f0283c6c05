//! What a dispatcher does with what it is handed, in single steps. Nothing here waits: `dispatch` takes one step after
//! another, and the simulation of races takes them as they are, with anything between two of them.
//!
//! ```text
//!   due -------> mark -> read -> judge -+-> begin -> leaves
//!                                       +-> wait, in the line of its destination
//!                                       '-> moves on in the state
//!   admitted --> mark -> read -> begin -> leaves
//!   down -> end of the wait -> mark -> read -> begin -> fails
//! ```
//!
//! Whatever does not stand any more where it was handed over, or cannot begin, is put back.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::ledger::{DueIds, Handed, Ledger};
use crate::blocking;
use crate::callback::{Callbacks, DestinationName, Permit, Ticket};
use crate::clock::Clock;
use crate::metrics::Metrics;
use crate::propose::Ask;
use crate::shard::{self, CatchUp, Request, Settle};
use crate::store::StoreError;
use crate::store::keys::Key;
use crate::store::rows::{CursorRow, PolicyRow, Role, TaskRow};
use crate::store::{Store, codec};
use crate::task::{DeadLetterNotice, Delivery, Failure, Fence, GroupId, InstantMs, Outcome, Policy, PolicyId, TaskId};

/// The wait of so many tasks ends in one step, under one lock.
const WAITS_AT_ONCE: usize = 1_024;
const READ_WITHOUT_A_WORD_MAX: usize = 16;
/// Policies remembered per shard while it is led.
const POLICIES_MAX: usize = 1_024;

/// Of one shard, in one term.
pub(super) struct Dispatcher {
    pub group: GroupId,
    pub term: u64,
    with: Means,
    policies: Policies,
    /// What is to be done, the next at the front.
    work: VecDeque<Work>,
}

/// What steps are done with.
pub(super) struct Means {
    pub ledger: Arc<Ledger>,
    pub clock: Arc<dyn Clock>,
    pub store: Store,
    pub callbacks: Callbacks,
    pub metrics: Arc<Metrics>,
}

/// One step.
pub(super) enum Work {
    /// The ledger is told that these are about to be looked up.
    MarkRead(DueIds, Vec<How>),
    Read(DueIds, Vec<How>),
    /// It stands, and has not waited: does it go out, and is there room for it?
    Judge(Box<Ready>),
    Begin(Box<Ready>, Permit),
    /// It fails without being sent.
    BeginFailed(Box<Ready>, Arc<Down>),
    /// Its destination has no room.
    Wait(TaskId),
    PutBack(TaskId),
    /// With a destination that is down they fail; without, they wait in the wheel.
    EndWait(Vec<Ticket>, Option<Arc<Down>>),
    /// Nothing of this begins, because leading is suspended. The places go, since other shards may want them and that may
    /// last for hours.
    TakeBack(DueIds, Vec<Permit>),
}

/// How a task comes to be looked up.
pub(super) enum How {
    Due,
    /// It waited for its destination, and has a place there now.
    Admitted(Permit),
    /// It waited for its destination, which is down.
    Down(Arc<Down>),
}

/// Why attempts fail without being sent, and which: those that still go to this destination.
pub(super) struct Down {
    pub failure: Failure,
    pub destination: DestinationName,
}

/// A task whose time has come, as it stands.
#[derive(Clone)]
pub(super) struct Ready {
    pub id: TaskId,
    /// The instant that was handed over.
    pub due_ms: InstantMs,
    pub task: TaskRow,
    pub at: CursorRow,
    pub policy: Arc<Policy>,
}

/// What comes of a step, for whoever can wait for what follows.
pub(super) enum Done {
    /// Nothing to wait for.
    Here,
    Leaves(Box<Departure>),
    /// To be settled.
    Fails(Settle),
    /// To be asked for; if the answer is that the task has moved by itself, it is to be put back.
    Moves(TaskId, Move),
}

/// An attempt on its way to its receiver.
pub(super) struct Departure {
    pub attempt: Attempt,
    pub delivery: Delivery,
    pub permit: Permit,
}

/// What is settled when it is over.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attempt {
    pub id: TaskId,
    pub occurrence: u64,
    pub attempt: u32,
    dispatched_ms: InstantMs,
}

/// How a task goes on in the state instead of being delivered.
#[derive(Debug, Clone, Copy)]
pub(super) enum Move {
    CatchUp(CatchUp),
    Detach { id: TaskId, occurrence: u64 },
}

impl Move {
    pub fn ask(self) -> Ask {
        match self {
            Move::CatchUp(catch_up) => Ask::Plain(Request::CatchUp(catch_up)),
            Move::Detach { id, occurrence } => Ask::Detach { id, occurrence },
        }
    }
}

impl Dispatcher {
    pub fn new(group: GroupId, term: u64, with: Means) -> Self {
        Self { group, term, with, policies: Policies::default(), work: VecDeque::new() }
    }

    /// Whether something of what was handed over may begin, when this node is sure to lead in the term it says. Those who
    /// were refused something for want of a lease suspend as well.
    pub fn may_begin(&self, leads: Option<u64>) -> bool {
        leads == Some(self.term) && !self.with.ledger.is_suspended(self.group, self.term)
    }

    /// Takes on what was handed over. Turns in a line come one by one when attempts end one by one: those that gather
    /// meanwhile are read together. Returns those whose destination is down: to [`Dispatcher::fail`], in turns.
    pub fn take(&mut self, messages: &mut Vec<Handed>) -> Vec<(Vec<Ticket>, Arc<Down>)> {
        let (mut due, mut admitted, mut permits, mut down) = (DueIds::new(), DueIds::new(), Vec::new(), Vec::new());
        for message in messages.drain(..) {
            match message {
                Handed::Due(more) => due.extend(more),
                Handed::Admitted(more) => {
                    for (ticket, permit) in more {
                        admitted.push((ticket.due_ms, ticket.task));
                        permits.push(How::Admitted(permit));
                    }
                }
                Handed::Down(tickets, failure, destination) => {
                    down.push((tickets, Arc::new(Down { failure, destination })));
                }
            }
        }
        let firsts = due.iter().map(|_| How::Due).collect();
        self.work.extend([Work::MarkRead(admitted, permits), Work::MarkRead(due, firsts)]);
        down
    }

    /// The same while leading is suspended: all of it goes back.
    pub fn give_back(&mut self, messages: &mut Vec<Handed>) {
        let (mut due, mut permits) = (DueIds::new(), Vec::new());
        for message in messages.drain(..) {
            match message {
                Handed::Due(more) => due.extend(more),
                Handed::Admitted(more) => {
                    for (ticket, permit) in more {
                        due.push((ticket.due_ms, ticket.task));
                        permits.push(permit);
                    }
                }
                // Whether their destination is down is found out anew.
                Handed::Down(tickets, ..) => {
                    for some in tickets.chunks(WAITS_AT_ONCE) {
                        self.work.push_back(Work::EndWait(some.to_vec(), None));
                    }
                }
            }
        }
        self.work.push_back(Work::TakeBack(due, permits));
    }

    /// Takes on attempts that fail without being sent.
    pub fn fail(&mut self, tickets: &[Ticket], down: Arc<Down>) {
        self.work.push_back(Work::EndWait(tickets.to_vec(), Some(down)));
    }

    /// What the next step is.
    #[cfg(test)]
    pub fn next(&self) -> Option<&Work> {
        self.work.front()
    }

    /// `None` when there is nothing left to do.
    pub fn step(&mut self) -> Result<Option<Done>, StoreError> {
        let Some(work) = self.work.pop_front() else { return Ok(None) };
        let Self { group, term, .. } = *self;
        let ledger = &self.with.ledger;
        match work {
            Work::MarkRead(due, hows) => {
                if !due.is_empty() {
                    ledger.mark_read(group, term, &due);
                    self.work.push_front(Work::Read(due, hows));
                }
            }
            Work::Read(due, hows) => {
                let standing = self.read(&due)?;
                for (((_, id), ready), how) in due.into_iter().zip(standing).zip(hows).rev() {
                    self.work.push_front(match (ready, how) {
                        (None, _) => Work::PutBack(id),
                        (Some(ready), How::Due) => Work::Judge(ready),
                        (Some(ready), How::Admitted(permit)) => Work::Begin(ready, permit),
                        // It may have been given another receiver while it waited.
                        (Some(ready), How::Down(down)) if down.destination.is_of(&ready.policy.callback) => {
                            Work::BeginFailed(ready, down)
                        }
                        (Some(_), How::Down(_)) => Work::PutBack(id),
                    });
                }
            }
            Work::Judge(ready) => {
                let Ready { id, due_ms, ref task, ref at, .. } = *ready;
                let occurrence = at.occurrence;
                if shard::must_catch_up(task, at, self.with.clock.now_ms()) {
                    return Ok(Some(Done::Moves(id, Move::CatchUp(CatchUp { id, occurrence }))));
                }
                if task.recurrence.is_some_and(|recurrence| recurrence.overlap) && at.attempt == 1 {
                    return Ok(Some(Done::Moves(id, Move::Detach { id, occurrence })));
                }
                let ticket = Ticket { group, term, task: id, due_ms };
                self.work.push_front(match self.with.callbacks.admit(&ready.policy.callback, ticket) {
                    Some(permit) => Work::Begin(ready, permit),
                    None => Work::Wait(id),
                });
            }
            Work::Begin(ready, permit) => {
                let CursorRow { occurrence, attempt, .. } = ready.at;
                if let Some(seq) = ledger.begin(group, term, ready.id, occurrence, attempt) {
                    return Ok(Some(Done::Leaves(Box::new(self.leave(*ready, seq, permit)))));
                }
                // Another replica is about to lead, or this is not its turn any more.
                self.work.push_front(Work::PutBack(ready.id));
            }
            Work::BeginFailed(ready, down) => {
                let Ready { id, at: CursorRow { occurrence, attempt, .. }, .. } = *ready;
                if ledger.begin(group, term, id, occurrence, attempt).is_some() {
                    self.with.metrics.failed_attempts.inc();
                    let outcome = Outcome::Failed(down.failure.clone());
                    return Ok(Some(Done::Fails(Settle { id, occurrence, attempt, outcome, dispatched_ms: 0 })));
                }
                self.work.push_front(Work::PutBack(id));
            }
            Work::Wait(id) => ledger.wait(group, term, id),
            Work::PutBack(id) => ledger.put_back(group, term, id)?,
            Work::EndWait(tickets, down) => {
                let due = ledger.end_wait(&tickets);
                if let Some(down) = down {
                    let hows = due.iter().map(|_| How::Down(down.clone())).collect();
                    self.work.push_front(Work::MarkRead(due, hows));
                }
            }
            Work::TakeBack(due, permits) => {
                ledger.take_back(group, term, &due);
                drop(permits);
            }
        }
        Ok(Some(Done::Here))
    }

    fn leave(&self, ready: Ready, seq: u64, mut permit: Permit) -> Departure {
        let Ready { id, due_ms, task, at: CursorRow { occurrence, attempt, .. }, policy } = ready;
        let Means { clock, metrics, .. } = &self.with;
        permit.begin();
        let now_us = clock.now_us();
        let late = Duration::from_micros(now_us.saturating_sub(due_ms * 1000));
        metrics.lateness.observe(late.as_secs_f64());
        metrics.dispatches.inc();
        let (shown, shown_occurrence) = shard::shown_as(id, &task, occurrence);
        let dead_letter = match &task.role {
            Role::Copy(copy) => {
                Some(DeadLetterNotice { id: copy.letter, attempts: copy.attempts, failure: copy.failure.clone() })
            }
            Role::Own | Role::StandIn { .. } => None,
        };
        let delivery = Delivery {
            task: shown,
            due_ms: shard::shown_due(&task, occurrence),
            client: task.client,
            name: task.tags.as_ref().and_then(|tags| tags.name().map(str::to_owned)),
            payload: task.payload,
            occurrence: shown_occurrence,
            attempt,
            fence: Fence { term: self.term, seq },
            policy,
            dead_letter,
        };
        let attempt = Attempt { id, occurrence, attempt, dispatched_ms: now_us / 1000 };
        Departure { attempt, delivery, permit }
    }

    /// What still stands at, or before, the instants that were handed over, which are armed.
    fn read(&mut self, due: &DueIds) -> Result<Vec<Option<Box<Ready>>>, StoreError> {
        let (group, store, policies) = (self.group, &self.with.store, &mut self.policies);
        // To tell the runtime costs more than to read a few rows.
        match due.len() {
            ..=READ_WITHOUT_A_WORD_MAX => read(store, group, due, policies),
            _ => blocking::in_place(|| read(store, group, due, policies)),
        }
    }
}

impl Attempt {
    pub fn ended(self, outcome: Outcome) -> Settle {
        let Self { id, occurrence, attempt, dispatched_ms } = self;
        Settle { id, occurrence, attempt, outcome, dispatched_ms }
    }
}

/// Where each of the due tasks stands, in two reads for all of them. `None`: not at, or before, the instant given.
fn read(
    store: &Store,
    group: GroupId,
    due: &DueIds,
    policies: &mut Policies,
) -> Result<Vec<Option<Box<Ready>>>, StoreError> {
    let tasks: Vec<Key> = due.iter().map(|(_, id)| Key::task(group, *id)).collect();
    let cursors: Vec<Key> = due.iter().map(|(_, id)| Key::cursor(group, *id)).collect();
    let tasks = store.get_state_many(&tasks)?;
    let cursors = store.get_state_many(&cursors)?;
    let mut standing = Vec::with_capacity(due.len());
    for (((due_ms, id), task), cursor) in due.iter().copied().zip(tasks).zip(cursors) {
        let Some(task) = task else {
            standing.push(None);
            continue;
        };
        let task: TaskRow = codec::decode("a task", &task)?;
        let at: CursorRow = match cursor {
            Some(cursor) => codec::decode("a cursor", &cursor)?,
            None => shard::first_cursor(&task),
        };
        let policy = policies.get(store, group, task.policy)?.filter(|_| at.due_ms <= due_ms);
        standing.push(policy.map(|policy| Box::new(Ready { id, due_ms, task, at, policy })));
    }
    Ok(standing)
}

/// The shard's policies as they are met.
#[derive(Default)]
struct Policies(HashMap<PolicyId, Arc<Policy>>);

impl Policies {
    /// `None` when the policy is gone, and so the last task that used it.
    fn get(&mut self, store: &Store, group: GroupId, id: PolicyId) -> Result<Option<Arc<Policy>>, StoreError> {
        if let Some(policy) = self.0.get(&id) {
            return Ok(Some(policy.clone()));
        }
        let Some(bytes) = store.get_state(&Key::policy(group, id))? else { return Ok(None) };
        let row: PolicyRow = codec::decode("a policy", &bytes)?;
        if self.0.len() >= POLICIES_MAX {
            self.0.clear();
        }
        let policy = Arc::new(row.policy);
        self.0.insert(id, policy.clone());
        Ok(Some(policy))
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use futures::future::{BoxFuture, pending};
    use tokio::sync::mpsc;

    use super::*;
    use crate::callback::{CallbackSettings, Carrier};
    use crate::clock::ManualClock;
    use crate::firing::FiringSettings;
    use crate::raft::Observer;
    use crate::shard::Effect;
    use crate::store::memory::MemoryDisk;
    use crate::store::overlay::Write;
    use crate::store::rows::ShardMetaRow;
    use crate::task::{Callback, Missed, Policy, Recurrence, Retry, ShardId};

    const GROUP: GroupId = GroupId(1);
    const TERM: u64 = 3;
    const NOW_MS: InstantMs = 1_000_000;
    const POLICY: PolicyId = PolicyId([7; 16]);

    /// Receivers that never answer.
    struct Silence;

    impl Carrier for Silence {
        fn carry(&self, _: Delivery, _: Duration) -> BoxFuture<'static, Result<(), Failure>> {
            pending().boxed()
        }
    }

    /// A dispatcher of a shard that is led, with room for one attempt at its only destination.
    struct Bench {
        ledger: Arc<Ledger>,
        store: Store,
        dispatcher: Dispatcher,
        handed: mpsc::UnboundedReceiver<Handed>,
    }

    impl Bench {
        fn new() -> Self {
            let store = MemoryDisk::default().open();
            let clock = Arc::new(ManualClock::at_ms(NOW_MS));
            let ledger = Ledger::new(store.clone(), clock.clone(), FiringSettings::default(), 1);
            let settings = CallbackSettings { connections_max: 1, in_flight_max: 1, ..CallbackSettings::default() };
            let callbacks = Callbacks::carried(settings, Arc::new(Silence));
            callbacks.set_waiters(ledger.clone());
            let callback = Callback::from_url("tcp://receiver:1").unwrap().unwrap();
            let policy =
                PolicyRow { tasks: 1, policy: Policy { callback, retry: Retry::default(), dead_letter: None } };
            store.write_state([(Key::policy(GROUP, POLICY), Write::Put(codec::encode(&policy)))]).unwrap();
            let (handed, _) = ledger.lead(GROUP, TERM).unwrap();
            ledger.widen(GROUP, TERM, (InstantMs::MAX, None)).unwrap();
            let means = Means {
                ledger: ledger.clone(),
                clock,
                store: store.clone(),
                callbacks,
                metrics: Arc::new(Metrics::new()),
            };
            Self { ledger, store, dispatcher: Dispatcher::new(GROUP, TERM, means), handed }
        }

        /// Stores tasks that are due, and returns their ids.
        fn due(&self, tasks: u64, first_due_ms: InstantMs, recurrence: Option<Recurrence>) -> Vec<TaskId> {
            let ids: Vec<TaskId> = (0..tasks).map(|n| TaskId::new(0, ShardId(0), n)).collect();
            let row = TaskRow {
                client: "me".parse().unwrap(),
                policy: POLICY,
                first_due_ms,
                first_occurrence: 0,
                recurrence,
                version: 1,
                tags: None,
                role: Role::Own,
                payload: bytes::Bytes::new(),
            };
            let rows = ids.iter().map(|id| (Key::task(GROUP, *id), Write::PutOnce(codec::encode(&row))));
            self.store.write_state(rows).unwrap();
            let meta = ShardMetaRow { armed_ms: InstantMs::MAX, ..ShardMetaRow::default() };
            let scheduled: Vec<Effect> =
                ids.iter().map(|id| Effect::Scheduled { id: *id, due_ms: first_due_ms }).collect();
            self.ledger.applied(GROUP, &meta, &scheduled);
            ids
        }

        /// Takes on what the ledger hands over, and all steps that follow.
        fn dispatch(&mut self) -> Vec<Done> {
            self.ledger.turn(&|_, _, _| panic!("all of it is armed"));
            let mut messages = Vec::new();
            while let Ok(handed) = self.handed.try_recv() {
                messages.push(handed);
            }
            assert!(self.dispatcher.take(&mut messages).is_empty(), "nothing is down");
            let steps = std::iter::from_fn(|| self.dispatcher.step().unwrap());
            steps.filter(|done| !matches!(done, Done::Here)).collect()
        }
    }

    #[tokio::test]
    async fn who_waits_for_a_destination_takes_no_room_of_others() {
        let mut bench = Bench::new();
        bench.due(3, NOW_MS, None);
        let done = bench.dispatch();
        assert!(matches!(done[..], [Done::Leaves(_)]), "there is room for one: {} came of it", done.len());
        assert_eq!(bench.ledger.counts().in_flight, 1, "the others wait in the line of their destination");
    }

    #[tokio::test]
    async fn a_task_that_has_missed_instants_is_moved_on_before_it_leaves() {
        let mut bench = Bench::new();
        let each_second =
            |overlap| Recurrence { interval_ms: 1_000, missed: Missed::Skip, overlap, count: None, until_ms: None };
        let ids = bench.due(1, NOW_MS - 600_000, Some(each_second(false)));
        let done = bench.dispatch();
        let [Done::Moves(id, Move::CatchUp(catch_up))] = done[..] else { panic!("{} came of it", done.len()) };
        assert_eq!((id, catch_up.id, catch_up.occurrence), (ids[0], ids[0], 0));
        // One that may overlap itself leaves by a stand-in.
        let mut bench = Bench::new();
        let ids = bench.due(1, NOW_MS, Some(each_second(true)));
        let done = bench.dispatch();
        let [Done::Moves(_, Move::Detach { id, occurrence: 0 })] = done[..] else {
            panic!("{} came of it", done.len())
        };
        assert_eq!(id, ids[0]);
    }
}
