//! What this node knows as the leader of its shards: which timers run, what is out, what is held back, what is armed.
//!
//! One lock for all shards, never held across an await or a read of the disk. The ledger hears of everything applied
//! ([`Observer`]), in the order of the log, and answers the proposer's question about a dispatch ([`Dispatches`]).
//!
//! What it knows of a shard lasts as long as the term. While the lease is not valid, leading is only *suspended*: nothing is
//! handed over and nothing begins, what had been handed over and has not begun is in the wheel again, ahead of all that
//! is due, and what is out stays known as out. No entry of another leader can be applied meanwhile without the term ending.
//!
//! What is in the wheel may be stale (the window is read beside `apply`), what is not loaded is never dispatched: the
//! dispatcher checks each id against the state before it goes out.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, mpsc, watch};

use super::FiringSettings;
use crate::callback::{DestinationName, Permit, Ticket, Waiters};
use crate::clock::Clock;
use crate::propose::Dispatches;
use crate::raft::Observer;
use crate::sabotage::Fault;
use crate::shard::{self, Claim, Effect};
use crate::store::keys::Key;
use crate::store::overlay::get_row;
use crate::store::rows::ShardMetaRow;
use crate::store::{Store, StoreError};
use crate::task::{Failure, GroupId, InstantMs, TaskId};
use crate::wheel::Wheel;

/// The most a shard hands over at a time, so that none keeps the others waiting.
const DUE_PER_TURN_MAX: usize = 1_024;
/// See [`Fault::FireEarly`].
const EARLY_MS: u64 = 250;
/// The watermark is asked for this long before something is due.
const ARM_BEFORE_MS: u64 = 500;

/// Ids that are due now, in due order.
pub type Due = Vec<(InstantMs, TaskId)>;

/// What the dispatcher of a shard is handed.
#[derive(Debug)]
pub(super) enum Handed {
    Due(Due),
    /// They waited for their destination, and now there is room.
    Admitted(Vec<(Ticket, Permit)>),
    /// They wait for their destination, which is down.
    Down(Vec<Ticket>, Failure, DestinationName),
}

/// How far an attempt is on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// With the dispatcher, which looks it up. What it has `looked` up before this counts no more.
    Handed {
        looked: bool,
    },
    /// The same, after it has waited for its destination.
    Admitted {
        looked: bool,
    },
    Out {
        occurrence: u64,
        attempt: u32,
    },
}

/// A place in the timeline. Everything before it is in the wheel, or out, or done.
pub type Horizon = (InstantMs, Option<TaskId>);

fn is_before(due_ms: InstantMs, id: TaskId, horizon: Horizon) -> bool {
    (due_ms, Some(id)) < horizon
}

/// One shard this node leads.
struct Leading {
    term: u64,
    wheel: Wheel<TaskId>,
    horizon: Horizon,
    /// Handed to the dispatcher and not settled.
    in_flight: HashMap<TaskId, Stage>,
    /// Who waits for a destination, neither in the wheel nor in flight. Tasks that ended while they waited are kept until
    /// it would have been their turn. Released after they were held, they can be in line more than once.
    waiting: HashSet<TaskId>,
    armed_ms: InstantMs,
    /// The watermark as it was when this term began: what is due up to it may have been dispatched by an earlier leader.
    armed_before_ms: InstantMs,
    arming: bool,
    fence_seq: u64,
    due: mpsc::UnboundedSender<Handed>,
    /// Woken when timers have left the wheel.
    room: Arc<Notify>,
    /// Nothing more is handed over, because another replica is to lead; told when nothing is out any more.
    resting: Option<Arc<Notify>>,
    /// Nothing more is handed over, because this node is not sure that it leads; dropped when it goes on, or the term ends.
    suspended: Option<watch::Sender<()>>,
}

struct State {
    leading: BTreeMap<GroupId, Leading>,
    /// Of every group of this node, led or not.
    metas: HashMap<GroupId, ShardMetaRow>,
    /// The term a group was led in last, and the deliveries of that term: a lease that is lost and won back within one
    /// term must not give a fence twice.
    fences: HashMap<GroupId, (u64, u64)>,
    /// Not to be dispatched in a term: so many changes of that term are under way. They may begin before this node leads
    /// in it, and outlive a lease that is lost and won back.
    held: BTreeMap<(GroupId, u64), HashMap<TaskId, usize>>,
    /// Whose turn is first, so that none is always the last to get what room there is.
    first: usize,
    /// What takes room: without that of shards that are suspended, which may be so for hours.
    in_flight: usize,
    timers: usize,
    /// Until when the driver means to sleep. Whatever makes an earlier turn worthwhile lowers it and wakes the driver.
    sleeping_until_ms: InstantMs,
    stopped: bool,
}

impl State {
    fn led(&mut self, group: GroupId, term: u64) -> Option<&mut Leading> {
        self.leading.get_mut(&group).filter(|leading| leading.term == term)
    }

    fn is_held(&self, group: GroupId, term: u64, id: TaskId) -> bool {
        self.held.get(&(group, term)).is_some_and(|held| held.contains_key(&id))
    }

    /// What is returned must be dropped when the lock is free: with it may go the permits of those who were about to
    /// leave, and each lets another one go.
    #[must_use = "to be dropped without the lock"]
    fn drop_leading(&mut self, group: GroupId) -> Option<Leading> {
        let gone = self.leading.remove(&group)?;
        self.timers -= gone.wheel.len();
        self.in_flight -= gone.room_of(gone.in_flight.len());
        self.fences.insert(group, (gone.term, gone.fence_seq));
        Some(gone)
    }
}

impl Leading {
    /// After something has come back.
    fn tell_if_idle(&self) {
        if let Some(resting) = self.resting.as_ref().filter(|_| self.in_flight.is_empty()) {
            resting.notify_one();
        }
    }

    /// How much room `many` attempts of it take.
    fn room_of(&self, many: usize) -> usize {
        if self.suspended.is_some() { 0 } else { many }
    }

    /// What takes memory: the timers, and what waits.
    fn kept(&self) -> usize {
        self.wheel.len() + self.waiting.len()
    }

    /// Marks what leaves the wheel as out, unless it is out already.
    fn hand_over(&mut self, id: TaskId) -> bool {
        match self.in_flight.entry(id) {
            // A stale row of the window: the attempt that is out settles first.
            std::collections::hash_map::Entry::Occupied(_) => false,
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(Stage::Handed { looked: false });
                true
            }
        }
    }
}

/// What the driver does next.
pub(super) enum Turn {
    Again,
    Sleep,
    Stop,
}

/// Wakes the driver, which is a thread or a task.
#[derive(Default)]
struct Wake {
    thread: Condvar,
    task: Notify,
}

impl Wake {
    fn notify_one(&self) {
        self.thread.notify_one();
        self.task.notify_one();
    }
}

pub struct Ledger {
    /// Whose turn it is to settle attempts that fail without being sent.
    pub(super) failing: tokio::sync::Mutex<()>,
    state: Mutex<State>,
    wake: Wake,
    store: Store,
    clock: Arc<dyn Clock>,
    settings: FiringSettings,
}

impl Ledger {
    pub fn new(store: Store, clock: Arc<dyn Clock>, settings: FiringSettings) -> Arc<Self> {
        let state = State {
            leading: BTreeMap::new(),
            metas: HashMap::new(),
            fences: HashMap::new(),
            held: BTreeMap::new(),
            first: 0,
            in_flight: 0,
            timers: 0,
            sleeping_until_ms: 0,
            stopped: false,
        };
        let failing = tokio::sync::Mutex::new(());
        Arc::new(Self { failing, state: Mutex::new(state), wake: Wake::default(), store, clock, settings })
    }

    pub fn settings(&self) -> &FiringSettings {
        &self.settings
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic under this lock")
    }

    /// Makes the driver take a turn at `at_ms` or earlier.
    fn wake_at(&self, state: &mut State, at_ms: InstantMs) {
        if at_ms < state.sleeping_until_ms {
            state.sleeping_until_ms = at_ms;
            self.wake.notify_one();
        }
    }

    /// This node leads `group` in `term`, and has applied everything of earlier terms. Returns who hands over what is
    /// due, and who tells of room in the wheels; the window is still empty.
    pub(super) fn lead(
        &self,
        group: GroupId,
        term: u64,
    ) -> Result<(mpsc::UnboundedReceiver<Handed>, Arc<Notify>), StoreError> {
        let (due, dues) = mpsc::unbounded_channel();
        let room = Arc::new(Notify::new());
        // Not from `metas`: nothing may have been applied since the start.
        let stored: Option<ShardMetaRow> = get_row(&self.store, "shard meta", &Key::shard_meta(group))?;
        let mut state = self.lock();
        let armed_ms = stored.into_iter().chain(state.metas.get(&group).copied()).map(|meta| meta.armed_ms).max();
        let armed_ms = armed_ms.unwrap_or(0);
        let gone = state.drop_leading(group);
        let before = state.fences.get(&group).filter(|(before, _)| *before == term).map(|(_, seq)| *seq);
        // Whatever was under way in an earlier term has been applied, or is void.
        state.held.retain(|(of, held_in), _| *of != group || *held_in >= term);
        let fence_seq = before.unwrap_or(0);
        let leading = Leading {
            term,
            // What is overdue in the wheel leaves it at once, so its clock begins where the watermark is.
            wheel: Wheel::new(self.settings.wheel, self.clock.now_ms().min(armed_ms)),
            horizon: (if Fault::ForgetOverdue.is_on() { self.clock.now_ms() } else { 0 }, None),
            in_flight: HashMap::new(),
            waiting: HashSet::new(),
            armed_ms,
            armed_before_ms: armed_ms,
            arming: false,
            fence_seq,
            due,
            room: room.clone(),
            resting: None,
            suspended: None,
        };
        state.leading.insert(group, leading);
        drop(state);
        drop(gone);
        Ok((dues, room))
    }

    /// This node no longer leads `group` in `term`; forgets what it knew. Those who wait until it goes on are told.
    pub(super) fn unlead(&self, group: GroupId, term: u64) {
        let mut state = self.lock();
        if state.led(group, term).is_some() {
            let gone = state.drop_leading(group);
            // Others may have waited for the room.
            self.wake_at(&mut state, 0);
            drop(state);
            drop(gone);
        }
    }

    /// From now on, what is scheduled before `until` comes to the wheel by itself. Returns where to read on from; `None`
    /// when the term is over.
    pub(super) fn widen(&self, group: GroupId, term: u64, until: Horizon) -> Option<Horizon> {
        let mut state = self.lock();
        let leading = state.led(group, term)?;
        let from = leading.horizon;
        leading.horizon = from.max(until);
        Some(from)
    }

    /// Puts rows of the timeline into the wheel, in due order. Returns whether there is room for more; if there is
    /// none, the window ends behind the last of them.
    pub(super) fn load(&self, group: GroupId, term: u64, rows: &[(InstantMs, TaskId)]) -> Option<bool> {
        let Some((last_due_ms, last)) = rows.last() else { return Some(true) };
        let mut state = self.lock();
        let share = self.share(&state);
        let State { leading: all, held, timers, .. } = &mut *state;
        let leading = all.get_mut(&group).filter(|leading| leading.term == term)?;
        let held = held.get(&(group, term));
        let is_held = |id: &TaskId| held.is_some_and(|held| held.contains_key(id));
        let added: usize = rows
            .iter()
            // A held task comes back by itself if its cancellation fails.
            .filter(|(_, id)| !leading.in_flight.contains_key(id) && !is_held(id))
            .map(|(due_ms, id)| usize::from(leading.wheel.insert(*due_ms, *id)))
            .sum();
        *timers += added;
        let room = leading.kept() < share;
        if !room {
            leading.horizon = (*last_due_ms, Some(*last));
        }
        let wake_ms = leading.wheel.next_wake_ms().unwrap_or(InstantMs::MAX);
        self.wake_at(&mut state, wake_ms.saturating_sub(ARM_BEFORE_MS));
        Some(room)
    }

    /// How many timers of all one shard may have: an equal share, so that none waits for room that others took.
    fn share(&self, state: &State) -> usize {
        (self.settings.timers_max / state.leading.len().max(1)).max(1)
    }

    /// Whether enough of the shard's timers have gone since there was no room; also when the term is over.
    pub(super) fn has_room(&self, group: GroupId, term: u64) -> bool {
        let mut state = self.lock();
        let share = self.share(&state);
        state.led(group, term).is_none_or(|leading| leading.kept() < share.div_ceil(4) * 3)
    }

    pub(super) fn leads(&self, group: GroupId, term: u64) -> bool {
        self.lock().led(group, term).is_some()
    }

    /// This node is not sure that it leads `group`, though the term goes on: nothing more is handed over or begins until
    /// [`Ledger::resume`]. Returns what ends by an error when it goes on or the term is over; `None` when the term is over
    /// already, or the node stops and nobody would go on.
    pub(super) fn suspend(&self, group: GroupId, term: u64) -> Option<watch::Receiver<()>> {
        let mut guard = self.lock();
        let state = &mut *guard;
        if state.stopped {
            return None;
        }
        let leading = state.leading.get_mut(&group).filter(|leading| leading.term == term)?;
        if let Some(suspended) = &leading.suspended {
            return Some(suspended.subscribe());
        }
        state.in_flight -= leading.in_flight.len();
        let (suspended, goes_on) = watch::channel(());
        leading.suspended = Some(suspended);
        // To tell the dispatcher, who looks when it can go on.
        let _ = leading.due.send(Handed::Due(Due::new()));
        // Others may have waited for the room.
        self.wake_at(state, 0);
        Some(goes_on)
    }

    pub(super) fn is_suspended(&self, group: GroupId, term: u64) -> bool {
        self.lock().led(group, term).is_some_and(|leading| leading.suspended.is_some())
    }

    /// This node is sure again that it leads `group` in `term`: it goes on where it was.
    pub(super) fn resume(&self, group: GroupId, term: u64) {
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(leading) = state.leading.get_mut(&group).filter(|leading| leading.term == term) else { return };
        if leading.suspended.take().is_some() {
            state.in_flight += leading.in_flight.len();
            // Whoever asked for it was refused, or is about to be answered, and then once more does no harm.
            leading.arming = false;
            self.wake_at(state, 0);
        }
    }

    /// What was handed over, in this order, has not begun and is not to begin now. It comes first when leading goes on, and
    /// is looked up again then.
    pub(super) fn take_back(&self, group: GroupId, term: u64, due: &[(InstantMs, TaskId)]) {
        let mut guard = self.lock();
        let State { leading, held, timers, in_flight, .. } = &mut *guard;
        let Some(leading) = leading.get_mut(&group).filter(|leading| leading.term == term) else { return };
        let held = held.get(&(group, term));
        for (due_ms, id) in due.iter().rev() {
            let Some(Stage::Handed { .. } | Stage::Admitted { .. }) = leading.in_flight.get(id) else { continue };
            leading.in_flight.remove(id);
            *in_flight -= leading.room_of(1);
            // A held task comes back by itself.
            if !held.is_some_and(|held| held.contains_key(id)) {
                *timers += usize::from(leading.wheel.give_back(*due_ms, *id));
            }
        }
        leading.tell_if_idle();
    }

    /// One turn of the driver: hands over what is due and armed. `arm` asks for a higher watermark in a term; it must not
    /// block.
    pub(super) fn turn(&self, arm: &dyn Fn(GroupId, u64, InstantMs)) -> Turn {
        let early_ms = if Fault::FireEarly.is_on() { EARLY_MS } else { 0 };
        // Before the lock is taken: whoever panics with it has others panic, who would be told of instead.
        let now_ms = self.clock.now_ms() + early_ms;
        let mut guard = self.lock();
        let state = &mut *guard;
        if state.stopped {
            return Turn::Stop;
        }
        let mut sleep_until_ms = InstantMs::MAX;
        state.first = state.first.wrapping_add(1);
        let mut order: Vec<GroupId> = state.leading.keys().copied().collect();
        let first = state.first.checked_rem(order.len()).unwrap_or(0);
        order.rotate_left(first);
        for group in &order {
            let leading = state.leading.get_mut(group).expect("it was there");
            let held = state.held.get(&(*group, leading.term));
            if leading.resting.is_some() || leading.suspended.is_some() {
                continue;
            }
            let room = self.settings.in_flight_max.saturating_sub(state.in_flight).min(DUE_PER_TURN_MAX);
            if room > 0 {
                let mut due = Due::new();
                // Nothing that is not armed leaves the wheel, however due it is.
                leading.wheel.expire(now_ms.min(leading.armed_ms), room, &mut due);
                if !due.is_empty() {
                    state.timers -= due.len();
                    due.retain(|(_, id)| !held.is_some_and(|held| held.contains_key(id)) && leading.hand_over(*id));
                    state.in_flight += due.len();
                    // The receiver goes only when the leadership does, and then this is void.
                    let _ = leading.due.send(Handed::Due(due));
                    leading.room.notify_one();
                }
            }
            let Some(wake_ms) = leading.wheel.next_wake_ms() else { continue };
            if wake_ms <= leading.armed_ms {
                // Without room, the next settled attempt wakes us.
                if state.in_flight < self.settings.in_flight_max {
                    sleep_until_ms = sleep_until_ms.min(wake_ms);
                }
            } else if wake_ms > now_ms + ARM_BEFORE_MS {
                sleep_until_ms = sleep_until_ms.min(wake_ms - ARM_BEFORE_MS);
            } else if !leading.arming {
                // The watermark wakes us when it has risen.
                leading.arming = true;
                arm(*group, leading.term, wake_ms);
            }
        }
        state.sleeping_until_ms = if early_ms == 0 { sleep_until_ms } else { sleep_until_ms.saturating_sub(early_ms) };
        if sleep_until_ms <= now_ms { Turn::Again } else { Turn::Sleep }
    }

    /// Sleeps until the next turn is due.
    pub(super) fn sleep(&self) {
        let mut state = self.lock();
        while !state.stopped {
            let until_ms = state.sleeping_until_ms;
            if until_ms == InstantMs::MAX {
                state = self.wake.thread.wait(state).expect("no panic under this lock");
                continue;
            }
            // Without the lock, as in a turn.
            drop(state);
            let left = self.clock.until(until_ms);
            if left.is_zero() {
                return;
            }
            state = self.lock();
            // It may have been woken meanwhile.
            if !state.stopped && state.sleeping_until_ms == until_ms {
                state = self.wake.thread.wait_timeout(state, left).expect("no panic under this lock").0;
            }
        }
    }

    /// The same, for a driver without a thread.
    pub(super) async fn slept(&self) {
        loop {
            let until_ms = {
                let state = self.lock();
                if state.stopped {
                    return;
                }
                state.sleeping_until_ms
            };
            if until_ms == InstantMs::MAX {
                self.wake.task.notified().await;
                continue;
            }
            let left = self.clock.until(until_ms);
            if left.is_zero() {
                return;
            }
            let _ = tokio::time::timeout(left, self.wake.task.notified()).await;
        }
    }

    /// Lets the driver look at the clock again: for a clock that was moved by hand.
    pub fn clock_moved(&self) {
        let mut state = self.lock();
        self.wake_at(&mut state, 0);
        self.wake.notify_one();
    }

    /// The watermark was not raised; the next turn asks again.
    pub(super) fn arm_failed(&self, group: GroupId, term: u64) {
        let mut state = self.lock();
        if let Some(leading) = state.led(group, term) {
            leading.arming = false;
            self.wake_at(&mut state, 0);
        }
    }

    /// The dispatcher is about to look these up.
    pub(super) fn look(&self, group: GroupId, term: u64, due: &[(InstantMs, TaskId)]) {
        let mut state = self.lock();
        let Some(leading) = state.led(group, term) else { return };
        for (_, id) in due {
            if let Some(Stage::Handed { looked } | Stage::Admitted { looked }) = leading.in_flight.get_mut(id) {
                *looked = true;
            }
        }
    }

    /// The attempt that is about to go out, and its place among the deliveries of this term. `None`: it must not.
    pub(super) fn begin(&self, group: GroupId, term: u64, id: TaskId, occurrence: u64, attempt: u32) -> Option<u64> {
        let mut state = self.lock();
        let leading = state.led(group, term)?;
        if leading.resting.is_some() || leading.suspended.is_some() {
            return None;
        }
        let known = leading.in_flight.get_mut(&id)?;
        // It can be handed over twice, for an earlier due instant and for the present one; and what was looked up before
        // the last time may have changed since.
        let (Stage::Handed { looked: true } | Stage::Admitted { looked: true }) = known else { return None };
        *known = Stage::Out { occurrence, attempt };
        leading.fence_seq += 1;
        Some(leading.fence_seq)
    }

    /// What was handed over turned out not to be due: it was settled or removed meanwhile, or is due later.
    pub(super) fn put_back(&self, group: GroupId, term: u64, id: TaskId) -> Result<(), StoreError> {
        {
            let mut state = self.lock();
            let Some(leading) = state.led(group, term) else { return Ok(()) };
            let Some(Stage::Handed { looked: true } | Stage::Admitted { looked: true }) = leading.in_flight.get(&id)
            else {
                // Another attempt is out by now; when it settles, the next one is scheduled. Or it was handed over again.
                return Ok(());
            };
            leading.in_flight.remove(&id);
            leading.tell_if_idle();
            let room = leading.room_of(1);
            state.in_flight -= room;
            self.wake_if_full(&mut state);
        }
        // Read when it does not count as out any more: whoever resumed it before left it to us, whoever moves it from
        // now on puts it into the wheel, where it stays as it is.
        let Some((_, cursor)) = shard::read_task(&self.store, group, id)? else { return Ok(()) };
        let mut guard = self.lock();
        let state = &mut *guard;
        let is_held = state.is_held(group, term, id);
        let Some(leading) = state.leading.get_mut(&group).filter(|leading| leading.term == term) else { return Ok(()) };
        if is_before(cursor.due_ms, id, leading.horizon) && !leading.in_flight.contains_key(&id) && !is_held {
            state.timers += usize::from(leading.wheel.insert(cursor.due_ms, id));
            self.wake_at(state, cursor.due_ms.saturating_sub(ARM_BEFORE_MS));
        }
        Ok(())
    }

    /// What was handed over waits for its destination, and takes no room among what is in flight.
    pub(super) fn wait(&self, group: GroupId, term: u64, id: TaskId) {
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(leading) = state.leading.get_mut(&group).filter(|leading| leading.term == term) else { return };
        // Its turn may have come before we got here.
        if leading.in_flight.get(&id) == Some(&Stage::Handed { looked: true }) {
            leading.in_flight.remove(&id);
            leading.tell_if_idle();
            leading.waiting.insert(id);
            state.in_flight -= leading.room_of(1);
            self.wake_if_full(state);
        }
    }

    /// The wait of these is over. Returns those that are still waited for; they are in flight from now on.
    pub(super) fn end_wait(&self, tickets: &[Ticket]) -> Due {
        let mut state = self.lock();
        let over = tickets.iter().filter(|ticket| Self::wait_is_over(&mut state, ticket));
        over.map(|ticket| (ticket.due_ms, ticket.task)).collect()
    }

    /// The wait of a task is over. False when nobody waits for it any more: the term is over, or it is held back, or it is in
    /// the wheel again until leading goes on.
    fn wait_is_over(state: &mut State, ticket: &Ticket) -> bool {
        let State { leading, held, in_flight, timers, .. } = state;
        let Some(leading) = leading.get_mut(&ticket.group).filter(|leading| leading.term == ticket.term) else {
            return false;
        };
        leading.waiting.remove(&ticket.task);
        let is_held = held.get(&(ticket.group, ticket.term)).is_some_and(|held| held.contains_key(&ticket.task));
        if leading.suspended.is_some() {
            // Its place must not be kept from other shards for as long as this takes.
            let stage = leading.in_flight.get(&ticket.task);
            if let None | Some(Stage::Handed { .. }) = stage {
                leading.in_flight.remove(&ticket.task);
                leading.tell_if_idle();
                *timers += usize::from(!is_held && leading.wheel.insert(ticket.due_ms, ticket.task));
            }
            return false;
        }
        let looked = match leading.in_flight.get(&ticket.task) {
            // The dispatcher is about to say that it waits.
            Some(Stage::Handed { looked }) => *looked,
            // It came another way meanwhile.
            Some(_) => return false,
            None => {
                // It comes back by itself when what it is held back for is over.
                if is_held {
                    return false;
                }
                *in_flight += 1;
                false
            }
        };
        leading.in_flight.insert(ticket.task, Stage::Admitted { looked });
        true
    }

    /// After one attempt has come back: if there was no room for more, now there is.
    fn wake_if_full(&self, state: &mut State) {
        if state.in_flight + 1 >= self.settings.in_flight_max {
            self.wake_at(state, 0);
        }
    }

    /// Nothing more of `group` is handed over in `term`. Returns who is told when nothing is out any more; `None` when
    /// that is so already, or the term is over.
    pub(super) fn rest(&self, group: GroupId, term: u64) -> Option<Arc<Notify>> {
        let mut state = self.lock();
        let leading = state.led(group, term)?;
        let resting = leading.resting.get_or_insert_default().clone();
        (!leading.in_flight.is_empty()).then_some(resting)
    }

    /// It goes on after all.
    pub(super) fn go_on(&self, group: GroupId, term: u64) {
        let mut state = self.lock();
        if let Some(leading) = state.led(group, term) {
            leading.resting = None;
            self.wake_at(&mut state, 0);
        }
    }

    /// Nothing is dispatched from now on, and nobody looks when leading goes on: those who wait for it try by themselves.
    pub(super) fn stop(&self) {
        // Also after a panic under the lock.
        let mut guard = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let state = &mut *guard;
        state.stopped = true;
        for leading in state.leading.values_mut() {
            if leading.suspended.take().is_some() {
                state.in_flight += leading.in_flight.len();
            }
        }
        drop(guard);
        self.wake.notify_one();
    }

    pub fn counts(&self) -> Counts {
        let state = self.lock();
        let sum = |of: fn(&ShardMetaRow) -> u64| state.metas.values().map(of).sum();
        let all = || state.leading.values();
        let suspended = all().filter(|leading| leading.suspended.is_some()).count();
        Counts {
            led: state.leading.len() - suspended,
            suspended,
            timers: state.timers,
            wheel_bytes: all().map(|leading| leading.wheel.allocated_bytes()).sum(),
            in_flight: all().map(|leading| leading.in_flight.len()).sum(),
            waiting: all().map(|leading| leading.waiting.len()).sum(),
            missed: sum(|meta| meta.missed),
            pending: sum(|meta| meta.pending),
            dead_letters: sum(|meta| meta.dead_letters),
        }
    }
}

/// How much there is, for the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Shards this node is sure to lead: over all nodes, none is counted twice but in the moment of a change.
    pub led: usize,
    /// Shards that are led in a term that goes on, while this node is not sure of it: nothing of them is dispatched.
    pub suspended: usize,
    pub timers: usize,
    pub wheel_bytes: usize,
    pub in_flight: usize,
    pub waiting: usize,
    pub missed: u64,
    pub pending: u64,
    pub dead_letters: u64,
}

impl Observer for Ledger {
    fn applied(&self, group: GroupId, meta: &ShardMetaRow, effects: &[Effect]) {
        let mut guard = self.lock();
        let state = &mut *guard;
        state.metas.insert(group, *meta);
        for (_, held) in state.held.range_mut((group, 0)..=(group, u64::MAX)) {
            for effect in effects {
                if let Effect::Ended { id } = effect {
                    held.remove(id);
                }
            }
        }
        let Some(leading) = state.leading.get_mut(&group) else { return };
        let mut wake_ms = InstantMs::MAX;
        if meta.armed_ms > leading.armed_ms {
            leading.armed_ms = meta.armed_ms;
            // Whatever waited for it, and the driver's plan for what lies behind the old one.
            if std::mem::take(&mut leading.arming) {
                wake_ms = 0;
            }
        }
        let held = state.held.get(&(group, leading.term));
        let was_full = state.in_flight >= self.settings.in_flight_max;
        for effect in effects {
            let (Effect::Scheduled { id, .. } | Effect::Ended { id }) = effect else { continue };
            // Either way the attempt before is settled.
            let settled = usize::from(leading.in_flight.remove(id).is_some());
            state.in_flight -= leading.room_of(settled);
            match effect {
                Effect::Scheduled { id, due_ms } => {
                    let is_held = held.is_some_and(|held| held.contains_key(id));
                    if !is_held && is_before(*due_ms, *id, leading.horizon) {
                        state.timers += usize::from(leading.wheel.reschedule(*due_ms, *id).is_none());
                        wake_ms = wake_ms.min(due_ms.saturating_sub(ARM_BEFORE_MS));
                        if *due_ms <= leading.armed_ms {
                            wake_ms = wake_ms.min(*due_ms);
                        }
                    }
                }
                Effect::Ended { id } => {
                    state.timers -= usize::from(leading.wheel.cancel(id).is_some());
                }
                Effect::ClientChanged { .. } | Effect::KeyRevoked { .. } | Effect::Marked { .. } => {}
            }
        }
        leading.tell_if_idle();
        if was_full && state.in_flight < self.settings.in_flight_max {
            wake_ms = 0;
        }
        self.wake_at(state, wake_ms);
    }
}

impl Dispatches for Ledger {
    fn hold(&self, group: GroupId, term: u64, id: TaskId) -> Claim {
        let ignored = Fault::IgnoreWatermark.is_on();
        let known = {
            let mut guard = self.lock();
            let state = &mut *guard;
            // In any case: the attempt that is out may settle before the cancellation, and the next must not follow; and
            // an end that is told must find what it ends.
            *state.held.entry((group, term)).or_default().entry(id).or_default() += 1;
            let Some(leading) = state.leading.get_mut(&group).filter(|leading| leading.term == term) else {
                // This node leads the shard, but what it knows is of another term, or not there yet.
                return if ignored { Claim::NotDispatched } else { Claim::Unknown };
            };
            state.timers -= usize::from(leading.wheel.cancel(&id).is_some());
            match leading.in_flight.get(&id) {
                Some(Stage::Out { occurrence, attempt }) => {
                    return Claim::MayBeOut { occurrence: *occurrence, attempt: *attempt };
                }
                // Handed over, and so as good as out; the state says which attempt it is.
                Some(Stage::Handed { .. } | Stage::Admitted { .. }) => None,
                None => Some(leading.armed_before_ms),
            }
        };
        // Only this node's own tasks are read, which are applied here; a storage error shows itself to `apply` as well.
        let cursor = match shard::read_task(&self.store, group, id) {
            Ok(Some((_, cursor))) => cursor,
            Ok(None) => return Claim::NotDispatched,
            Err(error) => {
                tracing::error!(%error, "cannot read a task");
                return Claim::Unknown;
            }
        };
        match known {
            Some(armed_before_ms) if ignored || cursor.armed_by_ms() > armed_before_ms => Claim::NotDispatched,
            // Handed over, or due within what an earlier leader had armed.
            _ => Claim::MayBeOut { occurrence: cursor.occurrence, attempt: cursor.attempt },
        }
    }

    fn release(&self, group: GroupId, term: u64, id: TaskId) {
        // The state, not the ledger, says when it is due: it may not have been in the wheel, or have moved.
        let due_ms = match shard::read_task(&self.store, group, id) {
            Ok(found) => found.map(|(_, cursor)| cursor.due_ms),
            Err(error) => {
                tracing::error!(%error, "cannot read a task");
                None
            }
        };
        let mut guard = self.lock();
        let state = &mut *guard;
        if let Some(held) = state.held.get_mut(&(group, term))
            && let Some(holds) = held.get_mut(&id)
        {
            *holds -= 1;
            if *holds > 0 {
                return;
            }
            held.remove(&id);
        }
        // In another term the timeline has been read, or will be.
        let Some(leading) = state.leading.get_mut(&group).filter(|leading| leading.term == term) else { return };
        if let Some(due_ms) = due_ms.filter(|due_ms| is_before(*due_ms, id, leading.horizon))
            && !leading.in_flight.contains_key(&id)
        {
            state.timers += usize::from(leading.wheel.reschedule(due_ms, id).is_none());
            self.wake_at(state, due_ms.saturating_sub(ARM_BEFORE_MS));
        }
    }

    fn is_out(&self, group: GroupId, id: TaskId) -> bool {
        let state = self.lock();
        state.leading.get(&group).is_some_and(|leading| leading.in_flight.contains_key(&id))
    }
}

impl Waiters for Ledger {
    fn go(&self, admitted: Vec<(Ticket, Permit)>) {
        let mut turns: BTreeMap<GroupId, Vec<(Ticket, Permit)>> = BTreeMap::new();
        // Nothing of these is dropped under the lock: a place that is given back lets the next one go.
        let mut void = Vec::new();
        let mut out = Vec::new();
        {
            let mut state = self.lock();
            for (ticket, permit) in admitted {
                match Self::wait_is_over(&mut state, &ticket) {
                    true => turns.entry(ticket.group).or_default().push((ticket, permit)),
                    false => void.push(permit),
                }
            }
            for (group, turn) in turns {
                let sender = state.leading.get(&group).expect("it was there").due.clone();
                out.push((sender, Handed::Admitted(turn)));
            }
        }
        send(out);
    }

    /// They go on waiting, until the dispatcher gets to them: as many at once as there may be would take all the room of
    /// what is in flight.
    fn down(&self, tickets: Vec<Ticket>, failure: &Failure, destination: &DestinationName) {
        let mut turns: BTreeMap<GroupId, Vec<Ticket>> = BTreeMap::new();
        for ticket in tickets {
            turns.entry(ticket.group).or_default().push(ticket);
        }
        let out = {
            let state = self.lock();
            let led = turns.into_iter().filter_map(|(group, tickets)| {
                let sender = state.leading.get(&group)?.due.clone();
                Some((sender, Handed::Down(tickets, failure.clone(), destination.clone())))
            });
            led.collect()
        };
        send(out);
    }
}

/// The receiver goes only when the leadership does, and then this is void.
fn send(out: Vec<(mpsc::UnboundedSender<Handed>, Handed)>) {
    for (sender, handed) in out {
        let _ = sender.send(handed);
    }
}
