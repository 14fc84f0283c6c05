//! From a due id to a delivery, and from its outcome to a settled attempt.
//!
//! For each batch of due ids: is the lease valid, what does the state say, and only what still stands at that due instant
//! goes out. The fence (term, count of deliveries in this term) is given here.
//!
//! When the lease is not valid, leading is suspended ([`Ledger::suspend`](super::Ledger)) and this looks every few
//! milliseconds whether it is valid again; nothing else does anything meanwhile. Outcomes that cannot be stored wait for
//! that, and are stored then. The end of the term is not noticed here, but by `window`.
//!
//! A task whose destination has no room waits in the destination's line, by its id: it is looked up again when it is
//! its turn. A recurring task that has missed more than it may, or that overlaps itself, is moved on in the state
//! first, and comes back from there.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

use super::Parts;
use super::ledger::{Due, Handed};
use crate::blocking;
use crate::callback::{DestinationName, Permit, Ticket};
use crate::propose::{Ask, Refused};
use crate::raft::Group;
use crate::sabotage::Fault;
use crate::shard::{self, CatchUp, Reply, Request, Settle};
use crate::store::StoreError;
use crate::store::keys::Key;
use crate::store::rows::{CursorRow, PolicyRow, Role, TaskRow};
use crate::store::{Store, codec};
use crate::task::{DeadLetterNotice, Delivery, Failure, Fence, GroupId, InstantMs, Outcome, Policy, PolicyId, TaskId};

/// The lease must last at least this much longer when a batch is handed to its receivers' connections.
const LEASE_MARGIN: Duration = Duration::from_millis(100);
/// While leading is suspended: so often it is looked whether the lease is valid again. As much lateness it may add.
const LEASE_LOOK_EVERY: Duration = Duration::from_millis(20);
/// What waits for destinations that are down is looked through so many at a time while leading is suspended.
const BACK_AT_ONCE: usize = 1_024;
/// A settled attempt that could not be stored is proposed again after this.
const SETTLE_AGAIN_AFTER: Duration = Duration::from_millis(500);
/// Messages of the ledger that are dealt with together.
const MESSAGES_AT_ONCE: usize = 256;
const READ_WITHOUT_A_WORD_MAX: usize = 16;
/// Attempts that fail without being sent are settled so many at a time, on the whole node.
const FAILED_AT_ONCE: usize = 64;
/// Those that cannot be stored for so long let the next ones have their turn.
const FAILING_MAX: Duration = Duration::from_millis(500);
/// Policies remembered per shard while it is led.
const POLICIES_MAX: usize = 1_024;

/// Raises a shard's watermark when the driver asks for it.
pub(super) fn armer(parts: Arc<Parts>) -> impl Fn(GroupId, u64, InstantMs) + Send + Sync + 'static {
    let runtime = tokio::runtime::Handle::current();
    move |group, term, up_to| {
        let parts = parts.clone();
        runtime.spawn(async move {
            let _alarm = parts.groups.alarm("who raises a watermark");
            match parts.proposer.ask(group, Ask::Arm(up_to)).await {
                Ok(_) => {}
                Err(Refused::Stopping) => {}
                // The driver asks again when leading goes on.
                Err(Refused::NotLeader { .. }) if parts.ledger.suspend(group, term).is_some() => {}
                // If the leadership is over, so is this.
                Err(refused) => {
                    tracing::debug!(%group, %refused, "the watermark could not be raised; trying again");
                    tokio::time::sleep(SETTLE_AGAIN_AFTER).await;
                    parts.ledger.arm_failed(group, term);
                }
            }
        });
    }
}

/// Dispatches what is due, whenever the lease is valid; until the term is over, which ends it from outside.
pub(super) async fn run(group: &Group, term: u64, mut handed: mpsc::UnboundedReceiver<Handed>, parts: &Arc<Parts>) {
    let mut dispatcher = Dispatcher { group: group.id, term, policies: Policies::default(), parts: parts.clone() };
    let mut messages = Vec::with_capacity(MESSAGES_AT_ONCE);
    while handed.recv_many(&mut messages, MESSAGES_AT_ONCE).await > 0 {
        // Those who were refused something for want of a lease suspend as well.
        if group.leads(LEASE_MARGIN) != Some(term) || parts.ledger.is_suspended(group.id, term) {
            if Fault::ForgetOut.is_on() {
                return;
            }
            be_suspended(group, term, &mut messages, &mut handed, parts).await;
            continue;
        }
        // Turns in a line come one by one when attempts end one by one: those that gather meanwhile are read together.
        let (mut due, mut admitted) = (Due::new(), Vec::new());
        for message in messages.drain(..) {
            match message {
                Handed::Due(more) => due.extend(more),
                Handed::Admitted(more) => admitted.extend(more),
                Handed::Down(tickets, failure, destination) => {
                    parts.deliveries.spawn(fail(tickets, failure, destination, group.id, term, parts.clone()));
                }
            }
        }
        if let Err(error) = dispatcher.admitted(admitted).and_then(|()| dispatcher.due(&due)) {
            parts.groups.fail(&error.to_string());
            return;
        }
    }
}

/// Returns when this node is sure again that it leads. Whatever is handed over until then goes back, and each place at a
/// destination is given back, since other shards may want it and this may last for hours.
async fn be_suspended(
    group: &Group,
    term: u64,
    messages: &mut Vec<Handed>,
    handed: &mut mpsc::UnboundedReceiver<Handed>,
    parts: &Arc<Parts>,
) {
    let since = Instant::now();
    let _ = parts.ledger.suspend(group.id, term);
    // While another replica is made the leader, it is meant to be so.
    let meant = group.is_given_away(term);
    match meant {
        true => tracing::debug!(group = %group.id, term, "given away; nothing is dispatched"),
        false => {
            parts.metrics.leases_lost.inc();
            tracing::warn!(group = %group.id, term, "the lease is not valid; nothing is dispatched until it is");
        }
    }
    let mut looks = tokio::time::interval_at(since + LEASE_LOOK_EVERY, LEASE_LOOK_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let (mut due, mut permits) = (Due::new(), Vec::new());
        for message in messages.drain(..) {
            match message {
                Handed::Due(more) => due.extend(more),
                Handed::Admitted(more) => {
                    for (ticket, permit) in more {
                        due.push((ticket.due_ms, ticket.task));
                        permits.push(permit);
                    }
                }
                // They wait in the wheel from now on; whether their destination is down is found out anew.
                Handed::Down(tickets, ..) => {
                    for some in tickets.chunks(BACK_AT_ONCE) {
                        parts.ledger.end_wait(some);
                    }
                }
            }
        }
        parts.ledger.take_back(group.id, term, &due);
        drop(permits);
        tokio::select! {
            biased;
            _ = looks.tick() => {
                if group.leads(LEASE_MARGIN) == Some(term) {
                    break;
                }
            }
            received = handed.recv_many(messages, MESSAGES_AT_ONCE) => {
                if received == 0 {
                    return;
                }
            }
        }
    }
    parts.ledger.resume(group.id, term);
    let after = since.elapsed();
    match meant {
        true => tracing::debug!(group = %group.id, term, ?after, "it is kept; what is due goes out"),
        false => tracing::warn!(group = %group.id, term, ?after, "the lease is valid again; what is due goes out"),
    }
}

/// Of one shard, in one term.
struct Dispatcher {
    group: GroupId,
    term: u64,
    policies: Policies,
    parts: Arc<Parts>,
}

/// A task whose time has come, as it stands.
struct Ready {
    id: TaskId,
    /// The instant that was handed over.
    due_ms: InstantMs,
    task: TaskRow,
    at: CursorRow,
    policy: Arc<Policy>,
}

impl Dispatcher {
    fn due(&mut self, due: &Due) -> Result<(), StoreError> {
        let now_ms = self.parts.clock.now_ms();
        for ready in self.ready(due)? {
            if shard::must_catch_up(&ready.task, &ready.at, now_ms) {
                let catch_up = CatchUp { id: ready.id, occurrence: ready.at.occurrence };
                self.go_on(ready.id, move || Ask::Plain(Request::CatchUp(catch_up)));
                continue;
            }
            if ready.task.recurrence.is_some_and(|recurrence| recurrence.overlap) && ready.at.attempt == 1 {
                let (id, occurrence) = (ready.id, ready.at.occurrence);
                self.go_on(id, move || Ask::Detach { id, occurrence });
                continue;
            }
            let Self { group, term, .. } = *self;
            let ticket = Ticket { group, term, task: ready.id, due_ms: ready.due_ms };
            match self.parts.callbacks.admit(&ready.policy.callback, ticket) {
                Some(permit) => self.deliver(ready, permit)?,
                None => self.parts.ledger.wait(group, term, ready.id),
            }
        }
        Ok(())
    }

    fn admitted(&mut self, admitted: Vec<(Ticket, Permit)>) -> Result<(), StoreError> {
        let due: Due = admitted.iter().map(|(ticket, _)| (ticket.due_ms, ticket.task)).collect();
        let mut permits: HashMap<TaskId, Permit> =
            admitted.into_iter().map(|(ticket, permit)| (ticket.task, permit)).collect();
        for ready in self.ready(&due)? {
            if let Some(permit) = permits.remove(&ready.id) {
                self.deliver(ready, permit)?;
            }
        }
        Ok(())
    }

    fn ready(&mut self, due: &Due) -> Result<Vec<Ready>, StoreError> {
        ready(&self.parts, self.group, self.term, due, &mut self.policies)
    }

    fn deliver(&self, ready: Ready, mut permit: Permit) -> Result<(), StoreError> {
        let Self { group, term, parts, .. } = self;
        let Ready { id, due_ms, task, at, policy } = ready;
        let CursorRow { occurrence, attempt, .. } = at;
        let Some(seq) = parts.ledger.begin(*group, *term, id, occurrence, attempt) else {
            // Another replica is about to lead, or this is not its turn any more.
            return parts.ledger.put_back(*group, *term, id);
        };
        permit.begin();
        let now_us = parts.clock.now_us();
        let late = Duration::from_micros(now_us.saturating_sub(due_ms * 1000));
        parts.metrics.lateness.observe(late.as_secs_f64());
        parts.metrics.dispatches.inc();
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
            fence: Fence { term: *term, seq },
            policy,
            dead_letter,
        };
        let attempt = Attempt { id, occurrence, attempt, dispatched_ms: now_us / 1000 };
        parts.deliveries.spawn(deliver(*group, *term, attempt, delivery, permit, parts.clone()));
        Ok(())
    }

    /// Moves a task on in the state instead of delivering it, and gives it back if it has moved by itself.
    fn go_on(&self, id: TaskId, ask: impl Fn() -> Ask + Send + 'static) {
        let (group, term, parts) = (self.group, self.term, self.parts.clone());
        self.parts.deliveries.spawn(async move {
            let _alarm = parts.groups.alarm("who moves a task on");
            if propose_until_stored(&parts, group, term, id, ask).await == Some(Reply::Stale)
                && let Err(error) = parts.ledger.put_back(group, term, id)
            {
                parts.groups.fail(&error.to_string());
            }
        });
    }
}

/// What still stands at, or before, the instants that were handed over, which are armed. The rest goes back.
fn ready(
    parts: &Parts,
    group: GroupId,
    term: u64,
    due: &Due,
    policies: &mut Policies,
) -> Result<Vec<Ready>, StoreError> {
    if due.is_empty() {
        return Ok(Vec::new());
    }
    parts.ledger.look(group, term, due);
    // To tell the runtime costs more than to read a few rows.
    let standing = match due.len() {
        ..=READ_WITHOUT_A_WORD_MAX => read(&parts.store, group, due, policies)?,
        _ => blocking::in_place(|| read(&parts.store, group, due, policies))?,
    };
    let mut all = Vec::with_capacity(due.len());
    for ((due_ms, id), standing) in due.iter().copied().zip(standing) {
        match standing {
            Some((task, at, policy)) if at.due_ms <= due_ms => all.push(Ready { id, due_ms, task, at, policy }),
            _ => parts.ledger.put_back(group, term, id)?,
        }
    }
    Ok(all)
}

/// Attempts that fail without being sent, because their destination is down. Thousands may have waited, and each costs
/// the node as much as one that is delivered: so they are settled in small turns, one at a time for all shards and
/// destinations, and after each the node rests from it for as long as it took. Their next attempts are due as far apart.
async fn fail(
    tickets: Vec<Ticket>,
    failure: Failure,
    destination: DestinationName,
    group: GroupId,
    term: u64,
    parts: Arc<Parts>,
) {
    let _alarm = parts.groups.alarm("who settles attempts that were not sent");
    let mut policies = Policies::default();
    for tickets in tickets.chunks(FAILED_AT_ONCE) {
        let turn = parts.ledger.failing.lock().await;
        // Those who still wait are due again at the next leader, or the next start.
        if parts.deliveries.is_closed() || !parts.ledger.leads(group, term) {
            return;
        }
        let began = Instant::now();
        let due = parts.ledger.end_wait(tickets);
        // Some may have been given another receiver while they waited, and another replica may be about to lead.
        let begins = |Ready { id, at, policy, .. }: &Ready| {
            destination.is_of(&policy.callback)
                && parts.ledger.begin(group, term, *id, at.occurrence, at.attempt).is_some()
        };
        let begun = ready(&parts, group, term, &due, &mut policies).and_then(|ready| {
            let (begun, others): (Vec<Ready>, Vec<Ready>) = ready.into_iter().partition(begins);
            others.into_iter().try_for_each(|other| parts.ledger.put_back(group, term, other.id))?;
            Ok(begun)
        });
        let begun = match begun {
            Ok(begun) => begun,
            Err(error) => return parts.groups.fail(&error.to_string()),
        };
        let settled = begun.into_iter().map(|Ready { id, at, .. }| {
            parts.metrics.failed_attempts.inc();
            let outcome = Outcome::Failed(failure.clone());
            let CursorRow { occurrence, attempt, .. } = at;
            settle(&parts, group, term, Settle { id, occurrence, attempt, outcome, dispatched_ms: 0 })
        });
        let mut settled = join_all(settled);
        let in_time = tokio::time::timeout(FAILING_MAX, &mut settled).await;
        tokio::time::sleep(began.elapsed()).await;
        drop(turn);
        if in_time.is_err() {
            settled.await;
        }
    }
}

type Standing = Option<(TaskRow, CursorRow, Arc<Policy>)>;

/// Where each of the due tasks stands, in two reads for all of them.
fn read(store: &Store, group: GroupId, due: &Due, policies: &mut Policies) -> Result<Vec<Standing>, StoreError> {
    let tasks: Vec<Key> = due.iter().map(|(_, id)| Key::task(group, *id)).collect();
    let cursors: Vec<Key> = due.iter().map(|(_, id)| Key::cursor(group, *id)).collect();
    let tasks = store.get_state_many(&tasks)?;
    let cursors = store.get_state_many(&cursors)?;
    let mut standing = Vec::with_capacity(due.len());
    for (task, cursor) in tasks.into_iter().zip(cursors) {
        let Some(task) = task else {
            standing.push(None);
            continue;
        };
        let task: TaskRow = codec::decode("a task", &task)?;
        let cursor = match cursor {
            Some(cursor) => codec::decode("a cursor", &cursor)?,
            None => shard::first_cursor(&task),
        };
        let policy = policies.get(store, group, task.policy)?;
        standing.push(policy.map(|policy| (task, cursor, policy)));
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

/// What is settled when it is over.
struct Attempt {
    id: TaskId,
    occurrence: u64,
    attempt: u32,
    dispatched_ms: InstantMs,
}

async fn deliver(group: GroupId, term: u64, attempt: Attempt, delivery: Delivery, permit: Permit, parts: Arc<Parts>) {
    let _alarm = parts.groups.alarm("a delivery");
    let Attempt { id, occurrence, attempt, dispatched_ms } = attempt;
    let outcome = parts.callbacks.deliver(permit, delivery).await;
    match &outcome {
        Outcome::Acknowledged => parts.metrics.acknowledged.inc(),
        Outcome::Failed(failure) => {
            tracing::debug!(task = %id, occurrence, attempt, %failure, "an attempt failed");
            parts.metrics.failed_attempts.inc()
        }
    };
    settle(&parts, group, term, Settle { id, occurrence, attempt, outcome, dispatched_ms }).await;
}

/// Stores how an attempt ended, however long that takes: until then the task counts as out.
async fn settle(parts: &Parts, group: GroupId, term: u64, settle: Settle) {
    let id = settle.id;
    propose_until_stored(parts, group, term, id, || Ask::Settle(settle.clone())).await;
}

/// `None` when this node leads no more in that term, or stops. While leading is suspended it waits: until then the task is
/// out, and if the term ends the next leader knows nothing of this.
async fn propose_until_stored(
    parts: &Parts,
    group: GroupId,
    term: u64,
    id: TaskId,
    ask: impl Fn() -> Ask,
) -> Option<Reply> {
    let mut once_more = false;
    loop {
        match parts.proposer.ask(group, ask()).await {
            Ok(reply @ (Reply::Settled | Reply::Stale)) => return Some(reply),
            Ok(other) => unreachable!("a settle is never answered with {other:?}"),
            Err(Refused::Stopping) => return None,
            // The next leader delivers again, with a larger fence.
            Err(Refused::NotLeader { .. }) if !parts.ledger.leads(group, term) => {
                tracing::debug!(task = %id, term, "could not be settled: the leadership is over");
                return None;
            }
            Err(Refused::NotLeader { .. }) => match parts.ledger.suspend(group, term) {
                // Nothing is ever sent: it ends by what is told.
                Some(mut goes_on) => while goes_on.changed().await.is_ok() {},
                // Nothing is suspended in a node that stops. It may have been a moment without a lease; if it is more,
                // the other nodes are gone, and waiting for them would only keep this one from stopping.
                None if once_more => return None,
                None => {
                    once_more = true;
                    tokio::time::sleep(SETTLE_AGAIN_AFTER).await;
                }
            },
            Err(refused) => {
                tracing::warn!(task = %id, %refused, "not settled yet");
                tokio::time::sleep(SETTLE_AGAIN_AFTER).await;
            }
        }
    }
}
