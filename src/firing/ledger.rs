//! What this node knows as the leader of its shards: which timers run, what is out, what is held back, what is armed.
//!
//! One lock for each shard, never held across an await or a read of the disk; nobody has two of them at a time. What is of
//! all shards, two counts and when the driver wakes, is atomic. The ledger hears of everything applied ([`Observer`]), in
//! the order of the log, and answers the proposer's question about a dispatch ([`Dispatches`]).
//!
//! What it knows of a shard lasts as long as the term. While the lease is not valid, leading is only *suspended*: nothing is
//! handed over and nothing begins, what had been handed over and has not begun is in the wheel again, ahead of all that
//! is due, and what is out stays known as out. No entry of another leader can be applied meanwhile without the term ending.
//!
//! What is in the wheel may be stale (the window is read beside `apply`), what is not loaded is never dispatched: the
//! dispatcher checks each id against the state before it goes out.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, MutexGuard};

use tokio::sync::{Notify, mpsc, watch};

use super::FiringSettings;
use super::held::Held;
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
use crate::task::locks::{Condvar, Mutex};
use crate::task::{Failure, GroupId, InstantMs, TaskId};
use crate::wheel::Wheel;

/// The most a shard hands over at a time, so that none keeps the others waiting.
const DUE_PER_TURN_MAX: usize = 1_024;
/// See [`Fault::FireEarly`].
const EARLY_MS: u64 = 250;
/// The watermark is asked for this long before something is due.
const ARM_BEFORE_MS: u64 = 500;

/// Ids that are due now, in due order.
pub type DueIds = Vec<(InstantMs, TaskId)>;

/// What the dispatcher of a shard is handed.
#[derive(Debug)]
pub(super) enum Handed {
    Due(DueIds),
    /// They waited for their destination, and now there is room.
    Admitted(Vec<(Ticket, Permit)>),
    /// They wait for their destination, which is down.
    Down(Vec<Ticket>, Failure, DestinationName),
}

/// How far an attempt is on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// With the dispatcher, which looks it up, and has told so (`marked`): what it read before this counts no more.
    Handed {
        marked: bool,
    },
    /// The same, after it has waited for its destination.
    Admitted {
        marked: bool,
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

/// What is known of one shard of this node, led or not.
#[derive(Default)]
struct Shard {
    leading: Option<Box<Leading>>,
    held: Held,
    /// As last applied; `None` when nothing was since the start.
    meta: Option<ShardMetaRow>,
    /// The term it was led in last, and the deliveries of that term: a lease that is lost and won back within one
    /// term must not give a fence twice.
    fence: (u64, u64),
}

impl Shard {
    fn led(&mut self, term: u64) -> Option<&mut Leading> {
        Some(self.led_and_held(term)?.0)
    }

    fn led_and_held(&mut self, term: u64) -> Option<(&mut Leading, &Held)> {
        let leading = self.leading.as_deref_mut().filter(|leading| leading.term == term)?;
        Some((leading, &self.held))
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
                entry.insert(Stage::Handed { marked: false });
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

/// The sleep of the driver, which is a thread or a task.
///
/// No turn is missed, though there is no lock around all of it. Whoever has something for the driver notes it where the
/// driver looks, and then asks until when it means to sleep. The driver means to sleep for ever, looks at one shard after
/// the other, and then sleeps until what it found or what it was told meanwhile, whichever is first. So what is noted where
/// it has looked already is told, unless it wakes in time anyway.
struct Sleep {
    until_ms: AtomicU64,
    stopped: AtomicBool,
    /// Held between the last look at these two and falling asleep.
    falling_asleep: Mutex<()>,
    thread: Condvar,
    task: Notify,
}

impl Sleep {
    fn new() -> Self {
        let (falling_asleep, thread, task) = (Mutex::new(()), Condvar::new(), Notify::new());
        Self { until_ms: AtomicU64::new(0), stopped: AtomicBool::new(false), falling_asleep, thread, task }
    }

    /// Makes the driver take a turn at `at_ms` or earlier.
    fn wake_at(&self, at_ms: InstantMs) {
        // Most change nothing, and need not write to what all shards share.
        if at_ms < self.until_ms.load(Ordering::SeqCst) && at_ms < self.until_ms.fetch_min(at_ms, Ordering::SeqCst) {
            self.wake();
        }
    }

    fn wake(&self) {
        drop(self.falling_asleep.lock_after_panic());
        self.thread.notify_one();
        self.task.notify_one();
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }
}

pub struct Ledger {
    /// Whose turn it is to settle attempts that fail without being sent.
    pub(super) failing: tokio::sync::Mutex<()>,
    /// Group by group, the cluster's own at the front.
    shards: Vec<Mutex<Shard>>,
    /// Shards that are led.
    led: AtomicUsize,
    /// Attempts that take room: without those of shards that are suspended, which may be so for hours.
    in_flight: AtomicUsize,
    /// In all wheels.
    timers: AtomicUsize,
    /// The group to begin the next turn with, or one behind it, so that none is always the last to get what room there is.
    first: AtomicUsize,
    sleep: Sleep,
    store: Store,
    clock: Arc<dyn Clock>,
    settings: FiringSettings,
}

impl Ledger {
    /// Of a node with `shards` shards, whose groups are numbered from 1.
    pub fn new(store: Store, clock: Arc<dyn Clock>, settings: FiringSettings, shards: u16) -> Arc<Self> {
        Arc::new(Self {
            failing: tokio::sync::Mutex::new(()),
            shards: (0..=shards).map(|_| Mutex::default()).collect(),
            led: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
            timers: AtomicUsize::new(0),
            first: AtomicUsize::new(0),
            sleep: Sleep::new(),
            store,
            clock,
            settings,
        })
    }

    pub fn settings(&self) -> &FiringSettings {
        &self.settings
    }

    fn shard(&self, group: GroupId) -> MutexGuard<'_, Shard> {
        self.shards[usize::from(group.0)].lock()
    }

    fn has_room_in_flight(&self) -> bool {
        self.in_flight.load(Ordering::SeqCst) < self.settings.in_flight_max
    }

    /// `many` attempts have come back, or take no room any more. If there was none for more, now there is.
    fn give_room(&self, many: usize) {
        if many > 0 && self.in_flight.fetch_sub(many, Ordering::SeqCst) >= self.settings.in_flight_max {
            self.sleep.wake_at(0);
        }
    }

    fn take_room(&self, many: usize) {
        self.in_flight.fetch_add(many, Ordering::SeqCst);
    }

    fn add_timers(&self, many: usize) {
        self.timers.fetch_add(many, Ordering::Relaxed);
    }

    fn remove_timers(&self, many: usize) {
        self.timers.fetch_sub(many, Ordering::Relaxed);
    }

    /// What is returned must be dropped when the lock is free: with it may go the permits of those who were about to
    /// leave, and each lets another one go.
    #[must_use = "to be dropped without the lock"]
    fn drop_leading(&self, shard: &mut Shard) -> Option<Box<Leading>> {
        let gone = shard.leading.take()?;
        self.led.fetch_sub(1, Ordering::Relaxed);
        self.remove_timers(gone.wheel.len());
        self.give_room(gone.room_of(gone.in_flight.len()));
        shard.fence = (gone.term, gone.fence_seq);
        Some(gone)
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
        // Not from `meta`: nothing may have been applied since the start.
        let stored: Option<ShardMetaRow> = get_row(&self.store, "shard meta", &Key::shard_meta(group))?;
        let now_ms = self.clock.now_ms();
        let mut shard = self.shard(group);
        let armed_ms = stored.into_iter().chain(shard.meta).map(|meta| meta.armed_ms).max().unwrap_or(0);
        let gone = self.drop_leading(&mut shard);
        shard.held.begin_term(term);
        let (fences_of, fences) = shard.fence;
        shard.leading = Some(Box::new(Leading {
            term,
            // What is overdue in the wheel leaves it at once, so its clock begins where the watermark is.
            wheel: Wheel::new(self.settings.wheel, now_ms.min(armed_ms)),
            horizon: (if Fault::ForgetOverdue.is_on() { now_ms } else { 0 }, None),
            in_flight: HashMap::new(),
            waiting: HashSet::new(),
            armed_ms,
            armed_before_ms: armed_ms,
            arming: false,
            fence_seq: if fences_of == term { fences } else { 0 },
            due,
            room: room.clone(),
            resting: None,
            suspended: None,
        }));
        self.led.fetch_add(1, Ordering::Relaxed);
        drop(shard);
        drop(gone);
        Ok((dues, room))
    }

    /// This node no longer leads `group` in `term`; forgets what it knew. Those who wait until it goes on are told.
    pub(super) fn unlead(&self, group: GroupId, term: u64) {
        let mut shard = self.shard(group);
        if shard.led(term).is_some() {
            let gone = self.drop_leading(&mut shard);
            drop(shard);
            drop(gone);
        }
    }

    /// From now on, what is scheduled before `until` comes to the wheel by itself. Returns where to read on from; `None`
    /// when the term is over.
    pub(super) fn widen(&self, group: GroupId, term: u64, until: Horizon) -> Option<Horizon> {
        let mut shard = self.shard(group);
        let leading = shard.led(term)?;
        let from = leading.horizon;
        leading.horizon = from.max(until);
        Some(from)
    }

    /// Puts rows of the timeline into the wheel, in due order. Returns whether there is room for more; if there is
    /// none, the window ends behind the last of them.
    pub(super) fn load(&self, group: GroupId, term: u64, rows: &[(InstantMs, TaskId)]) -> Option<bool> {
        let Some((last_due_ms, last)) = rows.last() else { return Some(true) };
        let mut shard = self.shard(group);
        let (leading, held) = shard.led_and_held(term)?;
        let added: usize = rows
            .iter()
            // A held task comes back by itself if its cancellation fails.
            .filter(|(_, id)| !leading.in_flight.contains_key(id) && !held.is_held(term, *id))
            .map(|(due_ms, id)| usize::from(leading.wheel.insert(*due_ms, *id)))
            .sum();
        self.add_timers(added);
        let room = leading.kept() < self.share();
        if !room {
            leading.horizon = (*last_due_ms, Some(*last));
        }
        let wake_ms = leading.wheel.next_wake_ms().unwrap_or(InstantMs::MAX);
        self.sleep.wake_at(wake_ms.saturating_sub(ARM_BEFORE_MS));
        Some(room)
    }

    /// How many timers of all one shard may have: an equal share, so that none waits for room that others took.
    fn share(&self) -> usize {
        (self.settings.timers_max / self.led.load(Ordering::Relaxed).max(1)).max(1)
    }

    /// Whether enough of the shard's timers have gone since there was no room; also when the term is over.
    pub(super) fn has_room(&self, group: GroupId, term: u64) -> bool {
        let share = self.share();
        self.shard(group).led(term).is_none_or(|leading| leading.kept() < share.div_ceil(4) * 3)
    }

    pub(super) fn leads(&self, group: GroupId, term: u64) -> bool {
        self.shard(group).led(term).is_some()
    }

    /// This node is not sure that it leads `group`, though the term goes on: nothing more is handed over or begins until
    /// [`Ledger::resume`]. Returns what ends by an error when it goes on or the term is over; `None` when the term is over
    /// already, or the node stops and nobody would go on.
    pub(super) fn suspend(&self, group: GroupId, term: u64) -> Option<watch::Receiver<()>> {
        let mut shard = self.shard(group);
        // Under the lock: if it stops from here on, it looks at this shard afterwards.
        if self.sleep.is_stopped() {
            return None;
        }
        let leading = shard.led(term)?;
        if let Some(suspended) = &leading.suspended {
            return Some(suspended.subscribe());
        }
        // Others may have waited for the room.
        self.give_room(leading.in_flight.len());
        let (suspended, goes_on) = watch::channel(());
        leading.suspended = Some(suspended);
        // To tell the dispatcher, who looks when it can go on.
        let _ = leading.due.send(Handed::Due(DueIds::new()));
        Some(goes_on)
    }

    pub(super) fn is_suspended(&self, group: GroupId, term: u64) -> bool {
        self.shard(group).led(term).is_some_and(|leading| leading.suspended.is_some())
    }

    /// This node is sure again that it leads `group` in `term`: it goes on where it was.
    pub(super) fn resume(&self, group: GroupId, term: u64) {
        let mut shard = self.shard(group);
        let Some(leading) = shard.led(term) else { return };
        if leading.suspended.take().is_some() {
            self.take_room(leading.in_flight.len());
            // Whoever asked for it was refused, or is about to be answered, and then once more does no harm.
            leading.arming = false;
            self.sleep.wake_at(0);
        }
    }

    /// What was handed over, in this order, has not begun and is not to begin now. It comes first when leading goes on, and
    /// is looked up again then.
    pub(super) fn take_back(&self, group: GroupId, term: u64, due: &[(InstantMs, TaskId)]) {
        let mut shard = self.shard(group);
        let Some((leading, held)) = shard.led_and_held(term) else { return };
        for (due_ms, id) in due.iter().rev() {
            let Some(Stage::Handed { .. } | Stage::Admitted { .. }) = leading.in_flight.get(id) else { continue };
            leading.in_flight.remove(id);
            self.give_room(leading.room_of(1));
            // A held task comes back by itself.
            if !held.is_held(term, *id) {
                self.add_timers(usize::from(leading.wheel.give_back(*due_ms, *id)));
            }
        }
        leading.tell_if_idle();
    }

    /// One turn of the driver: hands over what is due and armed. `arm` asks for a higher watermark in a term; it must not
    /// block.
    pub(super) fn turn(&self, arm: &dyn Fn(GroupId, u64, InstantMs)) -> Turn {
        if self.sleep.is_stopped() {
            return Turn::Stop;
        }
        self.sleep.until_ms.store(InstantMs::MAX, Ordering::SeqCst);
        let early_ms = if Fault::FireEarly.is_on() { EARLY_MS } else { 0 };
        // Before a lock is taken: whoever panics with it has others panic, who would be told of instead.
        let now_ms = self.clock.now_ms() + early_ms;
        let mut sleep_until_ms = InstantMs::MAX;
        let all = 0..u16::try_from(self.shards.len()).expect("groups are numbered");
        let first = self.first.load(Ordering::Relaxed) % self.shards.len();
        let mut moved_on = false;
        for group in all.clone().cycle().skip(first).take(all.len()).map(GroupId) {
            let mut shard = self.shard(group);
            let Shard { leading: Some(leading), held, .. } = &mut *shard else { continue };
            if leading.resting.is_some() || leading.suspended.is_some() {
                continue;
            }
            if !moved_on {
                // Of those that could be first, each in turn: the others may be many, and all on one side.
                self.first.store(usize::from(group.0) + 1, Ordering::Relaxed);
                moved_on = true;
            }
            let taken = self.in_flight.load(Ordering::SeqCst);
            let room = self.settings.in_flight_max.saturating_sub(taken).min(DUE_PER_TURN_MAX);
            if room > 0 {
                let mut due = DueIds::new();
                // Nothing that is not armed leaves the wheel, however due it is.
                leading.wheel.expire(now_ms.min(leading.armed_ms), room, &mut due);
                if !due.is_empty() {
                    self.remove_timers(due.len());
                    due.retain(|(_, id)| !held.is_held(leading.term, *id) && leading.hand_over(*id));
                    self.take_room(due.len());
                    // The receiver goes only when the leadership does, and then this is void.
                    let _ = leading.due.send(Handed::Due(due));
                    leading.room.notify_one();
                }
            }
            let Some(wake_ms) = leading.wheel.next_wake_ms() else { continue };
            if wake_ms <= leading.armed_ms {
                // Without room, the next settled attempt wakes us.
                if self.has_room_in_flight() {
                    sleep_until_ms = sleep_until_ms.min(wake_ms);
                }
            } else if wake_ms > now_ms + ARM_BEFORE_MS {
                sleep_until_ms = sleep_until_ms.min(wake_ms - ARM_BEFORE_MS);
            } else if !leading.arming {
                // The watermark wakes us when it has risen.
                leading.arming = true;
                arm(group, leading.term, wake_ms);
            }
        }
        let until_ms = if early_ms == 0 { sleep_until_ms } else { sleep_until_ms.saturating_sub(early_ms) };
        self.sleep.until_ms.fetch_min(until_ms, Ordering::SeqCst);
        if sleep_until_ms <= now_ms { Turn::Again } else { Turn::Sleep }
    }

    /// Sleeps until the next turn is due.
    pub(super) fn sleep(&self) {
        let Sleep { until_ms: until, falling_asleep, thread, .. } = &self.sleep;
        while !self.sleep.is_stopped() {
            let until_ms = until.load(Ordering::SeqCst);
            // Without the lock, as in a turn.
            let left = (until_ms < InstantMs::MAX).then(|| self.clock.until(until_ms));
            if left.is_some_and(|left| left.is_zero()) {
                return;
            }
            let falling = falling_asleep.lock();
            // It may have been woken meanwhile.
            if self.sleep.is_stopped() || until.load(Ordering::SeqCst) != until_ms {
                continue;
            }
            match left {
                None => drop(thread.wait(falling)),
                Some(left) => drop(thread.wait_timeout(falling, left)),
            }
        }
    }

    /// The same, for a driver without a thread.
    pub(super) async fn slept(&self) {
        loop {
            if self.sleep.is_stopped() {
                return;
            }
            let until_ms = self.sleep.until_ms.load(Ordering::SeqCst);
            if until_ms == InstantMs::MAX {
                self.sleep.task.notified().await;
                continue;
            }
            let left = self.clock.until(until_ms);
            if left.is_zero() {
                return;
            }
            let _ = tokio::time::timeout(left, self.sleep.task.notified()).await;
        }
    }

    /// Lets the driver look at the clock again: for a clock that was moved by hand.
    pub fn clock_moved(&self) {
        self.sleep.until_ms.store(0, Ordering::SeqCst);
        self.sleep.wake();
    }

    /// The watermark was not raised; the next turn asks again.
    pub(super) fn arm_failed(&self, group: GroupId, term: u64) {
        if let Some(leading) = self.shard(group).led(term) {
            leading.arming = false;
            self.sleep.wake_at(0);
        }
    }

    /// The dispatcher is about to look these up.
    pub(super) fn mark_read(&self, group: GroupId, term: u64, due: &[(InstantMs, TaskId)]) {
        let mut shard = self.shard(group);
        let Some(leading) = shard.led(term) else { return };
        for (_, id) in due {
            if let Some(Stage::Handed { marked } | Stage::Admitted { marked }) = leading.in_flight.get_mut(id) {
                *marked = true;
            }
        }
    }

    /// The attempt that is about to go out, and its place among the deliveries of this term. `None`: it must not.
    pub(super) fn begin(&self, group: GroupId, term: u64, id: TaskId, occurrence: u64, attempt: u32) -> Option<u64> {
        let mut shard = self.shard(group);
        let leading = shard.led(term)?;
        if leading.resting.is_some() || leading.suspended.is_some() {
            return None;
        }
        let known = leading.in_flight.get_mut(&id)?;
        // It can be handed over twice, for an earlier due instant and for the present one; and what was looked up before
        // the last time may have changed since.
        let (Stage::Handed { marked: true } | Stage::Admitted { marked: true }) = known else { return None };
        *known = Stage::Out { occurrence, attempt };
        leading.fence_seq += 1;
        Some(leading.fence_seq)
    }

    /// What was handed over turned out not to be due: it was settled or removed meanwhile, or is due later.
    pub(super) fn put_back(&self, group: GroupId, term: u64, id: TaskId) -> Result<(), StoreError> {
        {
            let mut shard = self.shard(group);
            let Some(leading) = shard.led(term) else { return Ok(()) };
            let Some(Stage::Handed { marked: true } | Stage::Admitted { marked: true }) = leading.in_flight.get(&id)
            else {
                // Another attempt is out by now; when it settles, the next one is scheduled. Or it was handed over again.
                return Ok(());
            };
            leading.in_flight.remove(&id);
            leading.tell_if_idle();
            self.give_room(leading.room_of(1));
        }
        // Read when it does not count as out any more: whoever resumed it before left it to us, whoever moves it from
        // now on puts it into the wheel, where it stays as it is.
        let Some((_, cursor)) = shard::read_task(&self.store, group, id)? else { return Ok(()) };
        let mut shard = self.shard(group);
        let Some((leading, held)) = shard.led_and_held(term) else { return Ok(()) };
        if is_before(cursor.due_ms, id, leading.horizon)
            && !leading.in_flight.contains_key(&id)
            && !held.is_held(term, id)
        {
            self.add_timers(usize::from(leading.wheel.insert(cursor.due_ms, id)));
            self.sleep.wake_at(cursor.due_ms.saturating_sub(ARM_BEFORE_MS));
        }
        Ok(())
    }

    /// What was handed over waits for its destination, and takes no room among what is in flight.
    pub(super) fn wait(&self, group: GroupId, term: u64, id: TaskId) {
        let mut shard = self.shard(group);
        let Some(leading) = shard.led(term) else { return };
        // Its turn may have come before we got here.
        if leading.in_flight.get(&id) == Some(&Stage::Handed { marked: true }) {
            leading.in_flight.remove(&id);
            leading.tell_if_idle();
            leading.waiting.insert(id);
            self.give_room(leading.room_of(1));
        }
    }

    /// The wait of these, which are of one shard, is over. Returns those that are still waited for; they are in flight
    /// from now on.
    pub(super) fn end_wait(&self, tickets: &[Ticket]) -> DueIds {
        let Some(Ticket { group, .. }) = tickets.first() else { return DueIds::new() };
        let mut shard = self.shard(*group);
        let over = tickets.iter().filter(|ticket| self.wait_is_over(&mut shard, ticket));
        over.map(|ticket| (ticket.due_ms, ticket.task)).collect()
    }

    /// The wait of a task is over. False when nobody waits for it any more: the term is over, or it is held back, or it is in
    /// the wheel again until leading goes on.
    fn wait_is_over(&self, shard: &mut Shard, ticket: &Ticket) -> bool {
        let Some((leading, held)) = shard.led_and_held(ticket.term) else { return false };
        leading.waiting.remove(&ticket.task);
        let is_held = held.is_held(ticket.term, ticket.task);
        if leading.suspended.is_some() {
            // Its place must not be kept from other shards for as long as this takes.
            let stage = leading.in_flight.get(&ticket.task);
            if let None | Some(Stage::Handed { .. }) = stage {
                leading.in_flight.remove(&ticket.task);
                leading.tell_if_idle();
                self.add_timers(usize::from(!is_held && leading.wheel.insert(ticket.due_ms, ticket.task)));
            }
            return false;
        }
        let marked = match leading.in_flight.get(&ticket.task) {
            // The dispatcher is about to say that it waits.
            Some(Stage::Handed { marked }) => *marked,
            // It came another way meanwhile.
            Some(_) => return false,
            None => {
                // It comes back by itself when what it is held back for is over.
                if is_held {
                    return false;
                }
                self.take_room(1);
                false
            }
        };
        leading.in_flight.insert(ticket.task, Stage::Admitted { marked });
        true
    }

    /// Nothing more of `group` is handed over in `term`. Returns who is told when nothing is out any more; `None` when
    /// that is so already, or the term is over.
    pub(super) fn rest(&self, group: GroupId, term: u64) -> Option<Arc<Notify>> {
        let mut shard = self.shard(group);
        let leading = shard.led(term)?;
        let resting = leading.resting.get_or_insert_default().clone();
        (!leading.in_flight.is_empty()).then_some(resting)
    }

    /// It goes on after all.
    pub(super) fn go_on(&self, group: GroupId, term: u64) {
        if let Some(leading) = self.shard(group).led(term) {
            leading.resting = None;
            self.sleep.wake_at(0);
        }
    }

    /// Nothing is dispatched from now on, and nobody looks when leading goes on: those who wait for it try by themselves.
    pub(super) fn stop(&self) {
        self.sleep.stopped.store(true, Ordering::SeqCst);
        for shard in &self.shards {
            // Also after a panic under the lock.
            let mut shard = shard.lock_after_panic();
            let Some(leading) = &mut shard.leading else { continue };
            if leading.suspended.take().is_some() {
                self.take_room(leading.in_flight.len());
            }
        }
        self.sleep.wake();
    }

    /// Shard by shard, each as it is when its turn comes.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts { timers: self.timers.load(Ordering::Relaxed), ..Counts::default() };
        for shard in &self.shards {
            let shard = shard.lock();
            if let Some(meta) = &shard.meta {
                counts.missed += meta.missed;
                counts.pending += meta.pending;
                counts.dead_letters += meta.dead_letters;
            }
            let Some(leading) = &shard.leading else { continue };
            match leading.suspended {
                Some(_) => counts.suspended += 1,
                None => counts.led += 1,
            }
            counts.wheel_bytes += leading.wheel.allocated_bytes();
            counts.in_flight += leading.in_flight.len();
            counts.waiting += leading.waiting.len();
        }
        counts
    }
}

/// How much there is, for the metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
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
        let mut shard = self.shard(group);
        shard.meta = Some(*meta);
        let Shard { leading, held, .. } = &mut *shard;
        for effect in effects {
            if let Effect::Ended { id } = effect {
                held.ended(*id);
            }
        }
        let Some(leading) = leading else { return };
        let mut wake_ms = InstantMs::MAX;
        if meta.armed_ms > leading.armed_ms {
            leading.armed_ms = meta.armed_ms;
            // Whatever waited for it, and the driver's plan for what lies behind the old one.
            if std::mem::take(&mut leading.arming) {
                wake_ms = 0;
            }
        }
        let mut settled = 0;
        for effect in effects {
            let (Effect::Scheduled { id, .. } | Effect::Ended { id }) = effect else { continue };
            // Either way the attempt before is settled.
            settled += usize::from(leading.in_flight.remove(id).is_some());
            match effect {
                Effect::Scheduled { id, due_ms } => {
                    if !held.is_held(leading.term, *id) && is_before(*due_ms, *id, leading.horizon) {
                        self.add_timers(usize::from(leading.wheel.reschedule(*due_ms, *id).is_none()));
                        wake_ms = wake_ms.min(due_ms.saturating_sub(ARM_BEFORE_MS));
                        if *due_ms <= leading.armed_ms {
                            wake_ms = wake_ms.min(*due_ms);
                        }
                    }
                }
                Effect::Ended { id } => self.remove_timers(usize::from(leading.wheel.cancel(id).is_some())),
                Effect::ClientChanged { .. } | Effect::KeyRevoked { .. } | Effect::Marked { .. } => {}
            }
        }
        leading.tell_if_idle();
        self.give_room(leading.room_of(settled));
        self.sleep.wake_at(wake_ms);
    }
}

impl Dispatches for Ledger {
    fn hold(&self, group: GroupId, term: u64, id: TaskId) -> Claim {
        let ignored = Fault::IgnoreWatermark.is_on();
        let known = {
            let mut shard = self.shard(group);
            // In any case: the attempt that is out may settle before the cancellation, and the next must not follow; and
            // an end that is told must find what it ends.
            shard.held.hold(term, id);
            let Some(leading) = shard.led(term) else {
                // This node leads the shard, but what it knows is of another term, or not there yet.
                return if ignored { Claim::NotDispatched } else { Claim::Unknown };
            };
            self.remove_timers(usize::from(leading.wheel.cancel(&id).is_some()));
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
        let mut shard = self.shard(group);
        if !shard.held.release(term, id) {
            return;
        }
        // In another term the timeline has been read, or will be.
        let Some(leading) = shard.led(term) else { return };
        if let Some(due_ms) = due_ms.filter(|due_ms| is_before(*due_ms, id, leading.horizon))
            && !leading.in_flight.contains_key(&id)
        {
            self.add_timers(usize::from(leading.wheel.reschedule(due_ms, id).is_none()));
            self.sleep.wake_at(due_ms.saturating_sub(ARM_BEFORE_MS));
        }
    }

    fn is_out(&self, group: GroupId, id: TaskId) -> bool {
        self.shard(group).leading.as_ref().is_some_and(|leading| leading.in_flight.contains_key(&id))
    }
}

impl Waiters for Ledger {
    fn go(&self, admitted: Vec<(Ticket, Permit)>) {
        let mut turns: BTreeMap<GroupId, Vec<(Ticket, Permit)>> = BTreeMap::new();
        for (ticket, permit) in admitted {
            turns.entry(ticket.group).or_default().push((ticket, permit));
        }
        for (group, turn) in turns {
            let mut shard = self.shard(group);
            let (turn, void): (Vec<_>, Vec<_>) =
                turn.into_iter().partition(|(ticket, _)| self.wait_is_over(&mut shard, ticket));
            let due = shard.leading.as_ref().map(|leading| leading.due.clone());
            // Nothing of these is dropped under the lock: a place that is given back lets the next one go.
            drop(shard);
            drop(void);
            if !turn.is_empty() {
                send(due, Handed::Admitted(turn));
            }
        }
    }

    /// They go on waiting, until the dispatcher gets to them: as many at once as there may be would take all the room of
    /// what is in flight.
    fn down(&self, tickets: Vec<Ticket>, failure: &Failure, destination: &DestinationName) {
        let mut turns: BTreeMap<GroupId, Vec<Ticket>> = BTreeMap::new();
        for ticket in tickets {
            turns.entry(ticket.group).or_default().push(ticket);
        }
        for (group, tickets) in turns {
            let due = self.shard(group).leading.as_ref().map(|leading| leading.due.clone());
            send(due, Handed::Down(tickets, failure.clone(), destination.clone()));
        }
    }
}

/// The receiver goes only when the leadership does, and then this is void.
fn send(due: Option<mpsc::UnboundedSender<Handed>>, handed: Handed) {
    if let Some(due) = due {
        let _ = due.send(handed);
    }
}
