//! The ledger, moved by hand: a clock that stands still, effects as `apply` would tell of them, turns one by one.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};

use super::FiringSettings;
use super::driver::Driver;
use super::ledger::{DueIds, Handed, Ledger};
use crate::callback::tests::{loose_name, loose_permit};
use crate::callback::{Ticket, Waiters};
use crate::clock::{Clock, ManualClock, SystemClock};
use crate::propose::Dispatches;
use crate::raft::Observer;
use crate::shard::{Claim, Effect};
use crate::store::Store;
use crate::store::codec;
use crate::store::keys::Key;
use crate::store::memory::MemoryDisk;
use crate::store::overlay::Write;
use crate::store::rows::{CursorRow, NEVER, Role, ShardMetaRow, TaskRow};
use crate::task::locks::Mutex;
use crate::task::{Failure, FailureClass, GroupId, InstantMs, PolicyId, ShardId, TaskId};

const GROUP: GroupId = GroupId(1);
const TERM: u64 = 7;
const NOTHING: [u64; 0] = [];

fn id(n: u64) -> TaskId {
    TaskId::new(0, ShardId(0), n)
}

fn number(id: TaskId) -> u64 {
    u64::from_be_bytes(id.as_bytes()[8..].try_into().unwrap()) & (u64::MAX >> 2)
}

fn due_of(handed: Handed) -> DueIds {
    match handed {
        Handed::Due(due) => due,
        other => panic!("nothing waits for a destination here: {other:?}"),
    }
}

/// A ledger that leads one shard from 1,000 ms on, with everything before 1,000,000 ms in the window.
struct Bench {
    ledger: Arc<Ledger>,
    clock: Arc<ManualClock>,
    store: Store,
    dues: mpsc::UnboundedReceiver<Handed>,
    room: Arc<Notify>,
    arms: Mutex<Vec<InstantMs>>,
    meta: ShardMetaRow,
    _temp: tempfile::TempDir,
}

impl Bench {
    fn new(settings: FiringSettings, armed_before_ms: InstantMs) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::open(&temp.path().join("db")).unwrap();
        let clock = Arc::new(ManualClock::at_ms(1_000));
        let ledger = Ledger::new(store.clone(), clock.clone(), settings, 2);
        let meta = ShardMetaRow { armed_ms: armed_before_ms, ..ShardMetaRow::default() };
        store.write_state([(Key::shard_meta(GROUP), Write::Put(codec::encode(&meta)))]).unwrap();
        let (dues, room) = ledger.lead(GROUP, TERM).unwrap();
        assert_eq!(ledger.widen(GROUP, TERM, (1_000_000, None)), Some((0, None)));
        Self { ledger, clock, store, dues, room, arms: Mutex::default(), meta, _temp: temp }
    }

    fn applied(&self, effects: &[Effect]) {
        self.ledger.applied(GROUP, &self.meta, effects);
    }

    fn schedule(&self, n: u64, due_ms: InstantMs) {
        self.applied(&[Effect::Scheduled { id: id(n), due_ms }]);
    }

    fn arm(&mut self, armed_ms: InstantMs) {
        self.meta.armed_ms = armed_ms;
        self.applied(&[]);
    }

    /// Stores the task's row, as `apply` has done before it tells of the effect.
    fn store_task(&self, n: u64, first_due_ms: InstantMs) {
        let row = TaskRow {
            client: "me".parse().unwrap(),
            policy: PolicyId([0; 16]),
            first_due_ms,
            first_occurrence: 0,
            recurrence: None,
            version: 1,
            tags: None,
            role: Role::Own,
            payload: bytes::Bytes::new(),
        };
        self.store.write_state([(Key::task(GROUP, id(n)), Write::PutOnce(codec::encode(&row)))]).unwrap();
    }

    /// Moves the clock, and returns what is handed over, until the driver would sleep.
    fn at(&mut self, now_ms: InstantMs) -> Vec<u64> {
        self.clock.advance(Duration::from_millis(now_ms - self.clock.now_ms()));
        while let super::ledger::Turn::Again = self.ledger.turn(&|_, _, up_to| self.arms.lock().push(up_to)) {}
        let mut handed_over = Vec::new();
        while let Ok(handed) = self.dues.try_recv() {
            for (due_ms, id) in due_of(handed) {
                assert!(due_ms <= now_ms && due_ms <= self.meta.armed_ms, "{due_ms} is early");
                handed_over.push(number(id));
            }
        }
        handed_over
    }

    /// The dispatcher looks it up, and it stands there.
    fn begin(&self, term: u64, id: TaskId, occurrence: u64, attempt: u32) -> Option<u64> {
        self.ledger.mark_read(GROUP, term, &[(0, id)]);
        self.ledger.begin(GROUP, term, id, occurrence, attempt)
    }

    /// The dispatcher looks it up, and it does not stand there.
    fn put_back(&self, n: u64) {
        self.ledger.mark_read(GROUP, TERM, &[(0, id(n))]);
        self.ledger.put_back(GROUP, TERM, id(n)).unwrap();
    }

    /// How often the watermark was asked for. Up to where is a lower bound: the wheel knows the slot of what is far.
    fn arms(&self) -> usize {
        std::mem::take(&mut *self.arms.lock()).len()
    }
}

fn bench() -> Bench {
    Bench::new(FiringSettings::default(), 0)
}

#[test]
fn nothing_leaves_before_it_is_due_and_armed() {
    let mut bench = bench();
    bench.schedule(2, 2_000);
    bench.schedule(1, 1_900);
    assert_eq!(bench.at(1_300), NOTHING);
    assert_eq!(bench.arms(), 0, "it is too early to arm");
    assert_eq!(bench.at(1_500), NOTHING);
    assert_eq!(bench.arms(), 1, "asked for once, a while ahead");
    assert_eq!(bench.at(1_950), NOTHING, "due, but not armed");
    assert_eq!(bench.arms(), 0);
    bench.arm(1_960);
    assert_eq!(bench.at(1_950), [1]);
    assert_eq!(bench.arms(), 1);
    bench.arm(3_000);
    assert_eq!(bench.at(1_999), NOTHING);
    assert_eq!(bench.at(2_000), [2]);
}

#[test]
fn a_watermark_that_was_not_raised_is_asked_for_again() {
    let mut bench = bench();
    bench.schedule(1, 1_200);
    bench.at(1_000);
    assert_eq!(bench.arms(), 1);
    bench.ledger.arm_failed(GROUP, TERM - 1);
    bench.at(1_050);
    assert_eq!(bench.arms(), 0, "it was another term's");
    bench.ledger.arm_failed(GROUP, TERM);
    bench.at(1_100);
    assert_eq!(bench.arms(), 1);
}

#[test]
fn overdue_tasks_leave_first_and_in_due_order() {
    let mut bench = Bench::new(FiringSettings::default(), 5_000);
    let rows: Vec<_> = [10, 20, 500, 900, 1_100, 1_101].into_iter().zip(1..).map(|(due, n)| (due, id(n))).collect();
    assert_eq!(bench.ledger.load(GROUP, TERM, &rows), Some(true));
    bench.meta.armed_ms = 5_000;
    assert_eq!(bench.at(1_100), [1, 2, 3, 4, 5]);
    assert_eq!(bench.at(1_101), [6]);
}

#[test]
fn what_is_out_or_beyond_the_window_is_not_loaded_twice() {
    let mut bench = bench();
    bench.arm(10_000);
    bench.schedule(1, 1_100);
    assert_eq!(bench.at(1_100), [1]);
    // The window is read again, from rows that were there before it left.
    bench.ledger.load(GROUP, TERM, &[(1_100, id(1)), (1_200, id(2))]);
    assert_eq!(bench.at(1_200), [2]);
    bench.schedule(3, 1_000_000);
    assert_eq!(bench.ledger.counts().timers, 0, "beyond the window it stays on disk");
    assert_eq!(bench.ledger.widen(GROUP, TERM, (2_000_000, None)), Some((1_000_000, None)));
    bench.schedule(3, 1_000_000);
    assert_eq!(bench.ledger.counts().timers, 1);
    // A retry: the attempt that was out is settled, the next one is scheduled.
    bench.schedule(1, 1_300);
    assert_eq!(bench.ledger.counts().in_flight, 1);
    assert_eq!(bench.at(1_300), [1]);
    bench.applied(&[Effect::Ended { id: id(1) }, Effect::Ended { id: id(2) }, Effect::Ended { id: id(3) }]);
    let counts = bench.ledger.counts();
    assert_eq!((counts.timers, counts.in_flight), (0, 0));
}

#[test]
fn a_full_wheel_ends_the_window_and_tells_of_room() {
    let mut bench = Bench::new(FiringSettings { timers_max: 1_000, ..FiringSettings::default() }, 0);
    let rows: Vec<_> = (0..1_000).map(|n| (2_000 + n, id(n))).collect();
    assert_eq!(bench.ledger.load(GROUP, TERM, &rows), Some(false));
    assert!(!bench.ledger.has_room(GROUP, TERM));
    bench.schedule(5_000, 900_000);
    assert_eq!(bench.ledger.counts().timers, 1_000, "behind the end of the window");
    bench.schedule(5_001, 2_500);
    assert_eq!(bench.ledger.counts().timers, 1_001, "within it, there is room for what is new");
    assert_eq!(bench.ledger.widen(GROUP, TERM, (1_000_000, None)), Some((2_999, Some(id(999)))));
    bench.arm(10_000);
    assert_eq!(bench.at(2_300).len(), 301);
    assert!(bench.ledger.has_room(GROUP, TERM));
    let mut told = tokio_test_poll(bench.room.notified());
    assert!(told(), "whoever reads ahead is woken");
}

/// Polls a future once.
fn tokio_test_poll(future: impl Future<Output = ()>) -> impl FnMut() -> bool {
    let mut future = Box::pin(future);
    move || {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        future.as_mut().poll(&mut context).is_ready()
    }
}

#[test]
fn no_more_are_out_than_allowed() {
    let mut bench = Bench::new(FiringSettings { in_flight_max: 10, ..FiringSettings::default() }, 0);
    bench.arm(10_000);
    for n in 0..25 {
        bench.schedule(n, 1_100 + n);
    }
    assert_eq!(bench.at(2_000), (0..10).collect::<Vec<_>>());
    assert_eq!(bench.at(2_000), NOTHING);
    bench.applied(&[Effect::Ended { id: id(3) }, Effect::Ended { id: id(4) }]);
    assert_eq!(bench.at(2_000), [10, 11]);
    bench.put_back(5);
    assert_eq!(bench.at(2_000), [12]);
}

#[test]
fn a_held_task_stays_and_goes_on_when_it_is_released() {
    let mut bench = bench();
    bench.arm(10_000);
    bench.store_task(1, 1_500);
    bench.schedule(1, 1_500);
    assert_eq!(bench.ledger.hold(GROUP, TERM, id(1)), Claim::NotDispatched);
    assert_eq!(bench.at(1_600), NOTHING, "held");
    // The window is read beside it.
    bench.ledger.load(GROUP, TERM, &[(1_500, id(1))]);
    assert_eq!(bench.at(1_600), NOTHING, "still held");
    bench.ledger.release(GROUP, TERM, id(1));
    assert_eq!(bench.at(1_600), [1]);
    assert_eq!(bench.ledger.hold(GROUP, TERM, id(1)), Claim::MayBeOut { occurrence: 0, attempt: 1 }, "handed over");
    assert_eq!(bench.begin(TERM, id(1), 0, 1), Some(1));
    assert_eq!(bench.ledger.hold(GROUP, TERM, id(1)), Claim::MayBeOut { occurrence: 0, attempt: 1 }, "out");
    bench.applied(&[Effect::Ended { id: id(1) }]);
    assert_eq!(bench.at(1_700), NOTHING);
}

/// Somebody cancels what is not theirs: the state says no, and the task goes on as if nothing had happened.
#[test]
fn a_refused_cancellation_leaves_no_trace() {
    let mut bench = bench();
    bench.arm(10_000);
    bench.store_task(1, 1_500);
    bench.schedule(1, 1_500);
    bench.ledger.hold(GROUP, TERM, id(1));
    bench.ledger.hold(GROUP, TERM, id(1));
    bench.ledger.release(GROUP, TERM, id(1));
    assert_eq!(bench.ledger.counts().timers, 0, "another one is still under way");
    bench.ledger.release(GROUP, TERM, id(1));
    assert_eq!(bench.ledger.counts().timers, 1);
    assert_eq!(bench.at(1_600), [1]);
    // It fails, is due again, and an attempt to cancel it is refused while the first attempt is out.
    bench.begin(TERM, id(1), 0, 1);
    bench.ledger.hold(GROUP, TERM, id(1));
    bench.schedule(1, 1_700);
    assert_eq!(bench.at(1_800), NOTHING, "held: no attempt follows the one the claim names");
    bench.ledger.release(GROUP, TERM, id(1));
    assert_eq!(bench.at(1_800), [1]);
}

#[test]
fn a_task_stays_held_when_the_lease_comes_back_and_not_in_a_new_term() {
    let mut bench = bench();
    bench.arm(10_000);
    bench.store_task(1, 1_500);
    assert_eq!(bench.ledger.hold(GROUP, TERM, id(1)), Claim::NotDispatched);
    bench.ledger.unlead(GROUP, TERM);
    (bench.dues, bench.room) = bench.ledger.lead(GROUP, TERM).unwrap();
    bench.ledger.load(GROUP, TERM, &[(1_500, id(1))]);
    assert_eq!(bench.at(1_600), NOTHING, "the cancellation is still under way");
    assert_eq!(bench.ledger.hold(GROUP, TERM + 1, id(1)), Claim::Unknown, "of a term it knows nothing of");
    (bench.dues, bench.room) = bench.ledger.lead(GROUP, TERM + 2).unwrap();
    bench.ledger.load(GROUP, TERM + 2, &[(1_500, id(1))]);
    assert_eq!(bench.at(1_600), [1]);
}

/// An edit was asked for between the election and the first look, a cancellation after it.
#[test]
fn the_end_of_one_change_lets_go_of_no_other() {
    let mut bench = bench();
    bench.arm(10_000);
    bench.store_task(1, 1_500);
    let of_before = TERM;
    bench.ledger.hold(GROUP, of_before, id(1));
    let term = TERM + 1;
    assert_eq!(bench.ledger.hold(GROUP, term, id(1)), Claim::Unknown, "the edit");
    (bench.dues, bench.room) = bench.ledger.lead(GROUP, term).unwrap();
    bench.ledger.widen(GROUP, term, (1_000_000, None)).unwrap();
    bench.ledger.load(GROUP, term, &[(1_500, id(1))]);
    assert_eq!(bench.at(1_600), NOTHING, "the edit is under way");
    bench.ledger.hold(GROUP, term, id(1));
    bench.ledger.release(GROUP, of_before, id(1));
    bench.ledger.release(GROUP, term, id(1));
    assert_eq!(bench.at(1_600), NOTHING, "the cancellation is under way");
    bench.ledger.release(GROUP, term, id(1));
    assert_eq!(bench.at(1_600), [1]);
}

/// What came due while nobody led is armed before it leaves: the leader after this one knows by the watermark alone what
/// may be out.
#[test]
fn what_is_overdue_waits_for_the_watermark() {
    let mut bench = Bench::new(FiringSettings::default(), 400);
    assert_eq!(bench.ledger.load(GROUP, TERM, &[(300, id(1)), (500, id(2)), (1_000, id(3))]), Some(true));
    assert_eq!(bench.at(1_000), [1]);
    assert_eq!(bench.arms(), 1);
    bench.arm(999);
    assert_eq!(bench.at(1_000), [2]);
    bench.arm(2_000);
    assert_eq!(bench.at(1_000), [3]);
}

#[test]
fn a_pause_does_not_hide_what_an_earlier_leader_had_armed() {
    let bench = Bench::new(FiringSettings::default(), 1_500);
    for (n, out_due_ms) in [(1, Some(1_500)), (2, Some(1_501)), (3, None)] {
        bench.store_task(n, out_due_ms.unwrap_or(1_200));
        let paused = CursorRow { due_ms: NEVER, occurrence: 0, attempt: 1, failure: None, out_due_ms };
        bench.store.write_state([(Key::cursor(GROUP, id(n)), Write::Put(codec::encode(&paused)))]).unwrap();
    }
    let out = Claim::MayBeOut { occurrence: 0, attempt: 1 };
    assert_eq!(bench.ledger.hold(GROUP, TERM, id(1)), out);
    assert_eq!(bench.ledger.hold(GROUP, TERM, id(2)), Claim::NotDispatched, "armed in this term, and not dispatched");
    assert_eq!(bench.ledger.hold(GROUP, TERM, id(3)), Claim::NotDispatched, "it was not out when it was paused");
}

/// The dispatcher reads a task while it is paused, and gives it back after it was resumed.
#[test]
fn a_task_that_is_resumed_before_it_is_put_back_goes_on() {
    let mut bench = bench();
    bench.arm(10_000);
    bench.store_task(1, 1_100);
    bench.schedule(1, 1_100);
    assert_eq!(bench.at(1_100), [1]);
    // Here it is paused and read; the resumption finds it handed over, and leaves it to the dispatcher.
    assert_eq!(bench.ledger.hold(GROUP, TERM, id(1)), Claim::MayBeOut { occurrence: 0, attempt: 1 });
    bench.ledger.release(GROUP, TERM, id(1));
    bench.put_back(1);
    assert_eq!(bench.at(1_100), [1]);
}

/// What the dispatcher has looked up counts no more once the task has gone on and was handed over again.
#[test]
fn what_was_looked_up_too_early_does_not_leave() {
    let mut bench = bench();
    bench.arm(10_000);
    bench.schedule(1, 1_100);
    assert_eq!(bench.at(1_100), [1]);
    bench.ledger.mark_read(GROUP, TERM, &[(1_100, id(1))]);
    // A delivery of a lease that was lost and won back is settled meanwhile.
    bench.schedule(1, 1_200);
    assert_eq!(bench.at(1_200), [1]);
    assert_eq!(bench.ledger.begin(GROUP, TERM, id(1), 0, 1), None);
    assert_eq!(bench.begin(TERM, id(1), 0, 2), Some(1));
}

/// Held and released while it waits for its destination, a task is in line twice.
#[test]
fn who_waits_is_counted_once() {
    let mut bench = bench();
    bench.arm(10_000);
    bench.store_task(1, 1_100);
    bench.schedule(1, 1_100);
    let ticket = Ticket { group: GROUP, term: TERM, task: id(1), due_ms: 1_100 };
    assert_eq!(bench.at(1_100), [1]);
    bench.ledger.mark_read(GROUP, TERM, &[(0, id(1))]);
    bench.ledger.wait(GROUP, TERM, id(1));
    bench.ledger.hold(GROUP, TERM, id(1));
    bench.ledger.release(GROUP, TERM, id(1));
    assert_eq!(bench.at(1_100), [1]);
    assert_eq!(bench.ledger.counts().waiting, 1);
    // The first ticket's turn comes while the dispatcher finds room for the second.
    let failure = Failure::new(FailureClass::CircuitOpen, "down");
    bench.ledger.down(vec![ticket], &failure, &loose_name());
    let Ok(Handed::Down(tickets, ..)) = bench.dues.try_recv() else { panic!("it is told") };
    assert_eq!(bench.ledger.end_wait(&tickets), [(1_100, id(1))]);
    assert_eq!(bench.begin(TERM, id(1), 0, 1), Some(1));
    bench.applied(&[Effect::Ended { id: id(1) }]);
    let counts = bench.ledger.counts();
    assert_eq!((counts.waiting, counts.in_flight, counts.timers), (0, 0, 0));
}

/// An old batch and a new one both hold the task: it goes out once, for where it stands.
#[test]
fn a_stale_row_puts_the_task_back_to_where_it_stands() {
    let mut bench = bench();
    bench.arm(10_000);
    bench.schedule(1, 1_100);
    assert_eq!(bench.at(1_100), [1]);
    bench.store_task(1, 1_300);
    bench.put_back(1);
    assert_eq!(bench.at(1_299), NOTHING);
    assert_eq!(bench.at(1_300), [1]);
    assert_eq!(bench.begin(TERM, id(1), 0, 2), Some(1));
    assert_eq!(bench.begin(TERM, id(1), 0, 2), None, "not twice");
    bench.put_back(1);
    assert_eq!(bench.ledger.counts().in_flight, 1, "an attempt is out; what follows is scheduled when it settles");
}

/// Two shards and little room: each has its share, and is told of room by its own timers.
#[test]
fn each_shard_has_its_share_of_the_timers() {
    let bench = Bench::new(FiringSettings { timers_max: 1_000, ..FiringSettings::default() }, 0);
    let other = GroupId(2);
    let (_dues, _room) = bench.ledger.lead(other, TERM).unwrap();
    bench.ledger.widen(other, TERM, (1_000_000, None)).unwrap();
    let rows: Vec<_> = (0..500).map(|n| (2_000 + n, id(n))).collect();
    assert_eq!(bench.ledger.load(GROUP, TERM, &rows), Some(false));
    assert!(!bench.ledger.has_room(GROUP, TERM));
    assert!(bench.ledger.has_room(other, TERM));
    assert_eq!(bench.ledger.load(other, TERM, &rows[..10]), Some(true), "what one took is not missing for the other");
    assert!(bench.ledger.has_room(GROUP, TERM + 1), "nobody waits for room in a term that is over");
}

#[test]
fn a_task_an_earlier_leader_had_armed_may_be_out() {
    let mut bench = Bench::new(FiringSettings::default(), 1_500);
    bench.store_task(1, 1_500);
    bench.store_task(2, 1_501);
    bench.ledger.load(GROUP, TERM, &[(1_500, id(1)), (1_501, id(2))]);
    bench.meta.armed_ms = 10_000;
    bench.applied(&[]);
    assert_eq!(bench.ledger.hold(GROUP, TERM, id(1)), Claim::MayBeOut { occurrence: 0, attempt: 1 });
    assert_eq!(bench.ledger.hold(GROUP, TERM, id(2)), Claim::NotDispatched, "armed in this term, and not dispatched");
    assert_eq!(bench.ledger.hold(GROUP, TERM, id(3)), Claim::NotDispatched, "unknown");
    assert_eq!(bench.at(2_000), NOTHING);
    bench.ledger.unlead(GROUP, TERM);
    assert_eq!(bench.ledger.hold(GROUP, TERM, id(2)), Claim::Unknown);
}

#[test]
fn a_fence_is_given_once_even_if_the_lease_comes_back() {
    let mut bench = bench();
    bench.arm(10_000);
    bench.schedule(1, 1_000);
    assert_eq!(bench.at(1_000), [1]);
    assert_eq!(bench.begin(TERM, id(1), 0, 1), Some(1));
    bench.ledger.unlead(GROUP, TERM);
    assert_eq!(bench.ledger.counts().in_flight, 0);
    (bench.dues, bench.room) = bench.ledger.lead(GROUP, TERM).unwrap();
    bench.ledger.load(GROUP, TERM, &[(1_000, id(1))]);
    assert_eq!(bench.at(1_000), [1]);
    assert_eq!(bench.begin(TERM, id(1), 0, 1), Some(2));
    // A message of the term before, or to a task that is not out, does nothing.
    assert_eq!(bench.begin(TERM - 1, id(1), 0, 1), None);
    assert_eq!(bench.begin(TERM, id(9), 0, 1), None);
    bench.ledger.unlead(GROUP, TERM - 1);
    assert_eq!(bench.ledger.counts().led, 1);
    let (_dues, _room) = bench.ledger.lead(GROUP, TERM + 1).unwrap();
    bench.ledger.load(GROUP, TERM + 1, &[(1_000, id(1))]);
    bench.at(1_000);
    assert_eq!(bench.begin(TERM + 1, id(1), 0, 1), Some(1), "a new term counts from the start");
}

/// A stall, with ten thousand attempts out: none of them leaves again, and what was on its way comes first, in order.
#[test]
fn what_is_out_stays_known_while_leading_is_suspended() {
    const OUT: u64 = 10_000;
    let mut bench = bench();
    bench.arm(100_000);
    for n in 0..OUT + 3 {
        bench.schedule(n, 1_100 + n / 1_000);
    }
    let mut due = bench.at(1_200);
    assert_eq!(due.len() as u64, OUT + 3);
    let handed = due.split_off(usize::try_from(OUT).unwrap());
    for n in due {
        assert!(bench.begin(TERM, id(n), 0, 1).is_some());
    }
    // One of the three was looked up already when it turned out that the lease was not valid.
    bench.ledger.mark_read(GROUP, TERM, &[(1_110, id(handed[0]))]);
    assert!(bench.ledger.suspend(GROUP, TERM).is_some());
    assert!(bench.ledger.is_suspended(GROUP, TERM) && bench.ledger.leads(GROUP, TERM));
    assert_eq!(bench.ledger.begin(GROUP, TERM, id(handed[0]), 0, 1), None, "nothing begins");
    bench.ledger.take_back(GROUP, TERM, &handed.iter().map(|n| (1_110, id(*n))).collect::<DueIds>());
    bench.schedule(20_000, 1_300);
    let counts = bench.ledger.counts();
    assert_eq!((counts.led, counts.suspended, counts.in_flight, counts.timers), (0, 1, 10_000, 4));
    assert_eq!(bench.at(1_600), NOTHING);
    assert_eq!(bench.arms(), 0);
    // Of what is out, one has failed and one has ended; entries of this term are applied all the time.
    bench.schedule(0, 1_500);
    bench.applied(&[Effect::Ended { id: id(1) }]);
    // The window is where it was, and rows of before say nothing new.
    assert_eq!(bench.ledger.widen(GROUP, TERM, (1_000_000, None)), Some((1_000_000, None)));
    bench.ledger.load(GROUP, TERM, &(2..OUT).map(|n| (1_100 + n / 1_000, id(n))).collect::<DueIds>());
    assert_eq!(bench.at(1_600), NOTHING);
    bench.ledger.resume(GROUP, TERM);
    assert_eq!(bench.at(1_600), [&handed[..], &[20_000, 0]].concat(), "each once, and only what is not out");
    assert_eq!(bench.begin(TERM, id(handed[0]), 0, 1), Some(OUT + 1), "fences go on");
    let counts = bench.ledger.counts();
    assert_eq!((counts.led, counts.suspended, counts.in_flight), (1, 0, 10_003));
}

/// It may last for hours, when the others of one shard are away.
#[test]
fn a_suspended_shard_takes_no_room_from_others() {
    let mut bench = Bench::new(FiringSettings { in_flight_max: 10, ..FiringSettings::default() }, 0);
    let other = GroupId(2);
    let (mut dues, _room) = bench.ledger.lead(other, TERM).unwrap();
    bench.ledger.widen(other, TERM, (1_000_000, None)).unwrap();
    bench.arm(10_000);
    for n in 0..20 {
        bench.schedule(n, 1_100 + n);
    }
    assert_eq!(bench.at(1_100), [0]);
    assert_eq!(bench.at(1_200).len(), 9);
    let scheduled: Vec<_> = (0..20).map(|n| Effect::Scheduled { id: id(100 + n), due_ms: 1_150 }).collect();
    bench.ledger.applied(other, &bench.meta, &scheduled);
    bench.at(1_200);
    assert!(dues.try_recv().is_err(), "there is no room");
    bench.begin(TERM, id(0), 0, 1);
    bench.ledger.suspend(GROUP, TERM).unwrap();
    bench.at(1_200);
    assert_eq!(due_of(dues.try_recv().unwrap()).len(), 10);
    bench.ledger.take_back(GROUP, TERM, &(1..10).map(|n| (1_100 + n, id(n))).collect::<DueIds>());
    bench.applied(&[Effect::Ended { id: id(0) }]);
    bench.ledger.resume(GROUP, TERM);
    assert_eq!(bench.at(1_200), NOTHING, "it is with others now");
    let ended: Vec<_> = (0..10).map(|n| Effect::Ended { id: id(100 + n) }).collect();
    bench.ledger.applied(other, &bench.meta, &ended);
    while let Ok(handed) = dues.try_recv() {
        assert_eq!(due_of(handed), []);
    }
    let left = bench.at(1_200);
    assert!(left.len() <= 10 && left.iter().zip(1..).all(|(n, expected)| *n == expected), "in order: {left:?}");
}

#[test]
fn claims_stay_true_while_leading_is_suspended() {
    let mut bench = Bench::new(FiringSettings::default(), 1_050);
    bench.arm(10_000);
    for n in 1..=4 {
        bench.store_task(n, 1_100);
        bench.schedule(n, 1_100);
    }
    assert_eq!(bench.at(1_100), [1, 2, 3, 4]);
    bench.begin(TERM, id(1), 0, 1);
    bench.ledger.suspend(GROUP, TERM).unwrap();
    let out = Claim::MayBeOut { occurrence: 0, attempt: 1 };
    assert_eq!(bench.ledger.hold(GROUP, TERM, id(1)), out);
    assert_eq!(bench.ledger.hold(GROUP, TERM, id(2)), out, "with the dispatcher still");
    bench.ledger.take_back(GROUP, TERM, &[(1_100, id(2)), (1_100, id(3)), (1_100, id(4))]);
    assert_eq!(bench.ledger.hold(GROUP, TERM, id(3)), Claim::NotDispatched, "it is not on its way any more");
    bench.ledger.resume(GROUP, TERM);
    assert_eq!(bench.at(1_100), [4]);
    for n in 1..=3 {
        bench.ledger.release(GROUP, TERM, id(n));
    }
    assert_eq!(bench.at(1_100), [2, 3], "what is out is not due");
}

/// The permits go: others at the destination need not wait for a shard that may be suspended for long.
#[test]
fn who_waits_for_a_destination_waits_in_the_wheel_while_leading_is_suspended() {
    let mut bench = bench();
    bench.arm(10_000);
    let ticket = |n| Ticket { group: GROUP, term: TERM, task: id(n), due_ms: 1_100 };
    for n in 1..=6 {
        bench.schedule(n, 1_100);
    }
    assert_eq!(bench.at(1_100), [1, 2, 3, 4, 5, 6]);
    for n in 1..=4 {
        bench.ledger.mark_read(GROUP, TERM, &[(1_100, id(n))]);
        bench.ledger.wait(GROUP, TERM, id(n));
    }
    // The fifth has its turn before it is said that it waits, and the sixth just before the lease is over.
    bench.ledger.mark_read(GROUP, TERM, &[(1_100, id(5)), (1_100, id(6))]);
    bench.ledger.go(vec![(ticket(6), loose_permit())]);
    bench.ledger.suspend(GROUP, TERM).unwrap();
    bench.ledger.go(vec![(ticket(1), loose_permit()), (ticket(2), loose_permit()), (ticket(5), loose_permit())]);
    bench.ledger.wait(GROUP, TERM, id(5));
    let failure = Failure::new(FailureClass::CircuitOpen, "down");
    bench.ledger.down(vec![ticket(3)], &failure, &loose_name());
    let mut admitted = Vec::new();
    while let Ok(handed) = bench.dues.try_recv() {
        match handed {
            Handed::Due(due) => assert_eq!(due, [], "the word that it is suspended"),
            Handed::Admitted(turns) => admitted.extend(turns.into_iter().map(|(ticket, _)| ticket)),
            Handed::Down(tickets, ..) => assert_eq!(bench.ledger.end_wait(&tickets), []),
        }
    }
    assert_eq!(admitted, [ticket(6)]);
    bench.ledger.take_back(GROUP, TERM, &[(1_100, id(6))]);
    let counts = bench.ledger.counts();
    assert_eq!((counts.in_flight, counts.waiting, counts.timers), (0, 1, 5), "the fourth is in its line still");
    bench.ledger.resume(GROUP, TERM);
    assert_eq!(bench.at(1_100), [6, 1, 2, 5, 3]);
    bench.ledger.go(vec![(ticket(4), loose_permit())]);
    assert!(matches!(bench.dues.try_recv(), Ok(Handed::Admitted(turns)) if turns[0].0 == ticket(4)));
}

#[test]
fn those_who_wait_until_leading_goes_on_are_told_and_so_when_it_never_does() {
    let bench = bench();
    let wait = || {
        let mut goes_on = bench.ledger.suspend(GROUP, TERM).unwrap();
        tokio_test_poll(async move { while goes_on.changed().await.is_ok() {} })
    };
    let (mut first, mut second) = (wait(), wait());
    assert!(!first() && !second());
    bench.ledger.resume(GROUP, TERM);
    assert!(first() && second());
    assert!(bench.ledger.suspend(GROUP, TERM - 1).is_none(), "that term is over");
    let mut third = wait();
    assert!(!third());
    bench.ledger.unlead(GROUP, TERM);
    assert!(third(), "the term is over");
    let (_dues, _room) = bench.ledger.lead(GROUP, TERM + 1).unwrap();
    let mut goes_on = bench.ledger.suspend(GROUP, TERM + 1).unwrap();
    let mut fourth = tokio_test_poll(async move { while goes_on.changed().await.is_ok() {} });
    assert!(!fourth());
    bench.ledger.stop();
    assert!(fourth(), "nobody would look");
    assert!(bench.ledger.suspend(GROUP, TERM + 1).is_none(), "they try by themselves");
}

/// It was refused, or is on its way still: asked for once more in any case.
#[test]
fn the_watermark_is_asked_for_when_leading_goes_on_and_not_before() {
    let mut bench = bench();
    bench.schedule(1, 1_200);
    assert_eq!(bench.at(1_000), NOTHING);
    assert_eq!(bench.arms(), 1);
    bench.ledger.suspend(GROUP, TERM).unwrap();
    bench.ledger.arm_failed(GROUP, TERM);
    bench.at(1_100);
    assert_eq!(bench.arms(), 0);
    bench.ledger.resume(GROUP, TERM);
    bench.at(1_100);
    assert_eq!(bench.arms(), 1);
}

/// Several threads schedule, move and end tasks while the driver runs on the real clock: each task that stays is handed
/// over exactly once, none early, and nothing is left behind.
#[test]
fn feeding_from_several_threads_while_the_clock_runs() {
    const THREADS: u64 = 4;
    const TASKS: u64 = 3_000;
    let temp = tempfile::tempdir().unwrap();
    let store = Store::open(&temp.path().join("db")).unwrap();
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let settings = FiringSettings { in_flight_max: 1 << 20, ..FiringSettings::default() };
    let ledger = Ledger::new(store, clock.clone(), settings, 1);
    let (mut dues, _room) = ledger.lead(GROUP, TERM).unwrap();
    ledger.widen(GROUP, TERM, (InstantMs::MAX, None)).unwrap();
    let armed = Arc::new(AtomicU64::new(0));
    // The watermark rises a little later than it is asked for, on another thread.
    let (arm_out, arm_in) = std::sync::mpsc::channel::<InstantMs>();
    let armer = std::thread::spawn({
        let (ledger, armed) = (ledger.clone(), armed.clone());
        move || {
            for up_to in arm_in {
                let armed_ms = armed.fetch_max(up_to + 3, Ordering::SeqCst).max(up_to + 3);
                ledger.applied(GROUP, &ShardMetaRow { armed_ms, ..ShardMetaRow::default() }, &[]);
            }
        }
    });
    let arm = move |_, _, up_to| {
        let _ = arm_out.send(up_to);
    };
    let driver = Driver::on_a_thread(ledger.clone(), arm, ());
    let feeders: Vec<_> = (0..THREADS)
        .map(|thread| {
            let (ledger, clock, armed) = (ledger.clone(), clock.clone(), armed.clone());
            std::thread::spawn(move || {
                let meta = || ShardMetaRow { armed_ms: armed.load(Ordering::SeqCst), ..ShardMetaRow::default() };
                let mut last = HashMap::new();
                for n in 0..TASKS {
                    let id = id(thread * TASKS + n);
                    let due_ms = clock.now_ms() + n % 200;
                    ledger.applied(GROUP, &meta(), &[Effect::Scheduled { id, due_ms }]);
                    last.insert(number(id), due_ms);
                    if n % 10 == 9 {
                        // Far away, so that it is not out yet; then it is gone.
                        let far = TaskId::new(1, ShardId(0), number(id));
                        let due_ms = clock.now_ms() + 500_000;
                        ledger.applied(GROUP, &meta(), &[Effect::Scheduled { id: far, due_ms }]);
                        ledger.applied(GROUP, &meta(), &[Effect::Scheduled { id: far, due_ms: due_ms + 5 }]);
                        ledger.applied(GROUP, &meta(), &[Effect::Ended { id: far }]);
                    }
                }
                last
            })
        })
        .collect();
    let mut handed_over = HashMap::new();
    let mut wanted = HashMap::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        while handed_over.len() < usize::try_from(THREADS * TASKS).unwrap() {
            let due = tokio::time::timeout(Duration::from_secs(20), dues.recv()).await;
            let due = due.expect("the driver goes on").expect("the shard is led");
            let now_ms = clock.now_ms();
            for (due_ms, id) in due_of(due) {
                assert!(due_ms <= now_ms, "{due_ms} was handed over at {now_ms}");
                assert!(handed_over.insert(number(id), due_ms).is_none(), "handed over twice");
            }
        }
    });
    for feeder in feeders {
        wanted.extend(feeder.join().unwrap());
    }
    assert_eq!(handed_over, wanted);
    let counts = ledger.counts();
    assert_eq!((counts.timers, counts.in_flight), (0, wanted.len()));
    ledger.stop();
    driver.join();
    armer.join().unwrap();
}

/// Shards have locks of their own, and share the room in flight and the driver's sleep: whoever gives room back, or has
/// something due, while the driver looks at another shard or falls asleep is not missed.
#[test]
fn shards_side_by_side_miss_no_turn() {
    const SHARDS: u16 = 4;
    const ROUNDS: u64 = 500;
    const AT_ONCE: u64 = 5;
    let temp = tempfile::tempdir().unwrap();
    let store = Store::open(&temp.path().join("db")).unwrap();
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let settings = FiringSettings { in_flight_max: 3, ..FiringSettings::default() };
    let ledger = Ledger::new(store, clock.clone(), settings, SHARDS);
    let driver = Driver::on_a_thread(ledger.clone(), |_, _, _| panic!("all of it is armed"), ());
    let shards: Vec<_> = (1..=SHARDS)
        .map(|shard| {
            let (ledger, clock) = (ledger.clone(), clock.clone());
            std::thread::spawn(move || {
                let group = GroupId(shard);
                let meta = ShardMetaRow { armed_ms: InstantMs::MAX, ..ShardMetaRow::default() };
                let (mut dues, _room) = ledger.lead(group, TERM).unwrap();
                ledger.widen(group, TERM, (InstantMs::MAX, None)).unwrap();
                let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
                for round in 0..ROUNDS {
                    let due_ms = clock.now_ms() + round % 2;
                    let scheduled = |n| Effect::Scheduled { id: id(n), due_ms };
                    ledger.applied(group, &meta, &(0..AT_ONCE).map(scheduled).collect::<Vec<_>>());
                    let mut left = AT_ONCE;
                    while left > 0 {
                        let due = async { tokio::time::timeout(Duration::from_secs(20), dues.recv()).await };
                        let due = runtime.block_on(due);
                        let due = due_of(due.expect("the driver goes on").expect("the shard is led"));
                        assert!(due.len() <= 3, "no more than there is room for");
                        left -= u64::try_from(due.len()).unwrap();
                        let ended: Vec<_> = due.into_iter().map(|(_, id)| Effect::Ended { id }).collect();
                        ledger.applied(group, &meta, &ended);
                    }
                }
            })
        })
        .collect();
    for shard in shards {
        shard.join().unwrap();
    }
    let counts = ledger.counts();
    assert_eq!((counts.led, counts.timers, counts.in_flight), (usize::from(SHARDS), 0, 0));
    ledger.stop();
    driver.join();
}

/// A node leads two shards of many, side by side, and there is room for one attempt at a time.
#[test]
fn shards_side_by_side_get_as_many_turns() {
    const LED: [GroupId; 2] = [GroupId(5), GroupId(6)];
    let store = MemoryDisk::default().open();
    let settings = FiringSettings { in_flight_max: 1, ..FiringSettings::default() };
    let ledger = Ledger::new(store, Arc::new(ManualClock::at_ms(10_000)), settings, 64);
    let meta = ShardMetaRow { armed_ms: InstantMs::MAX, ..ShardMetaRow::default() };
    let mut handed = LED.map(|group| {
        let (dues, _) = ledger.lead(group, TERM).unwrap();
        ledger.widen(group, TERM, (InstantMs::MAX, None)).unwrap();
        let scheduled: Vec<Effect> = (0..100).map(|n| Effect::Scheduled { id: id(n), due_ms: 1_000 + n }).collect();
        ledger.applied(group, &meta, &scheduled);
        dues
    });
    let mut turns = [0; 2];
    for _ in 0..100 {
        ledger.turn(&|_, _, _| panic!("all of it is armed"));
        for (at, dues) in handed.iter_mut().enumerate() {
            while let Ok(due) = dues.try_recv() {
                for (_, id) in due_of(due) {
                    turns[at] += 1;
                    ledger.applied(LED[at], &meta, &[Effect::Ended { id }]);
                }
            }
        }
    }
    assert_eq!(turns, [50, 50], "each shard has as many turns as the other");
}
