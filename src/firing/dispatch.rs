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
//!
//! What is done without waiting is in [`steps`](super::steps); here is when, and what follows.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

use super::FiringParts;
use super::ledger::Handed;
use super::steps::{Departure, Dispatcher, Done, Down, Means};
use crate::callback::{Callbacks, Ticket};
use crate::metrics::Metrics;
use crate::propose::{Ask, Refused};
use crate::raft::Group;
use crate::sabotage::Fault;
use crate::shard::{Reply, Settle};
use crate::store::StoreError;
use crate::task::{GroupId, InstantMs, Outcome, TaskId};

/// The lease must last at least this much longer when a batch is handed to its receivers' connections.
const LEASE_MARGIN: Duration = Duration::from_millis(100);
/// While leading is suspended: so often it is looked whether the lease is valid again. As much lateness it may add.
const LEASE_LOOK_EVERY: Duration = Duration::from_millis(20);
/// A settled attempt that could not be stored is proposed again after this.
const SETTLE_AGAIN_AFTER: Duration = Duration::from_millis(500);
/// Messages of the ledger that are dealt with together.
pub(super) const MESSAGES_AT_ONCE: usize = 256;
/// Attempts that fail without being sent are settled so many at a time, on the whole node.
const FAILED_AT_ONCE: usize = 64;
/// Those that cannot be stored for so long let the next ones have their turn.
const FAILING_MAX: Duration = Duration::from_millis(500);

/// Raises a shard's watermark when the driver asks for it.
pub(super) fn armer(parts: Arc<FiringParts>) -> impl Fn(GroupId, u64, InstantMs) + Send + Sync + 'static {
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
pub(super) async fn run(
    group: &Group,
    term: u64,
    mut handed: mpsc::UnboundedReceiver<Handed>,
    parts: &Arc<FiringParts>,
) {
    let mut dispatcher = dispatcher(group.id, term, parts);
    let mut messages = Vec::with_capacity(MESSAGES_AT_ONCE);
    while handed.recv_many(&mut messages, MESSAGES_AT_ONCE).await > 0 {
        let worked = if dispatcher.may_begin(group.leads(LEASE_MARGIN)) {
            for (tickets, down) in dispatcher.take(&mut messages) {
                parts.deliveries.spawn(fail(tickets, down, group.id, term, parts.clone()));
            }
            work(&mut dispatcher, parts).map(|failed| assert!(failed.is_empty(), "they fail beside this"))
        } else if Fault::ForgetOut.is_on() {
            return;
        } else {
            be_suspended(group, &mut dispatcher, &mut messages, &mut handed, parts).await
        };
        if let Err(error) = worked {
            parts.groups.fail(&error.to_string());
            return;
        }
    }
}

/// Returns when this node is sure again that it leads. Whatever is handed over until then goes back.
async fn be_suspended(
    group: &Group,
    dispatcher: &mut Dispatcher,
    messages: &mut Vec<Handed>,
    handed: &mut mpsc::UnboundedReceiver<Handed>,
    parts: &Arc<FiringParts>,
) -> Result<(), StoreError> {
    let (since, term) = (Instant::now(), dispatcher.term);
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
        dispatcher.give_back(messages);
        while dispatcher.step()?.is_some() {}
        tokio::select! {
            biased;
            _ = looks.tick() => {
                if group.leads(LEASE_MARGIN) == Some(term) {
                    break;
                }
            }
            received = handed.recv_many(messages, MESSAGES_AT_ONCE) => {
                if received == 0 {
                    return Ok(());
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
    Ok(())
}

fn dispatcher(group: GroupId, term: u64, parts: &FiringParts) -> Dispatcher {
    let FiringParts { ledger, clock, store, callbacks, metrics, .. } = parts;
    let (ledger, clock, store) = (ledger.clone(), clock.clone(), store.clone());
    Dispatcher::new(group, term, Means { ledger, clock, store, callbacks: callbacks.clone(), metrics: metrics.clone() })
}

/// Takes all steps there are, and sees to what comes of them. Returns who has failed, to be settled.
fn work(dispatcher: &mut Dispatcher, parts: &Arc<FiringParts>) -> Result<Vec<Settle>, StoreError> {
    let Dispatcher { group, term, .. } = *dispatcher;
    let mut failed = Vec::new();
    while let Some(done) = dispatcher.step()? {
        match done {
            Done::Here => {}
            Done::Leaves(departure) => {
                parts.deliveries.spawn(deliver(group, term, *departure, parts.clone()));
            }
            Done::Fails(settle) => failed.push(settle),
            Done::Moves(id, way) => {
                parts.deliveries.spawn(go_on(group, term, id, move || way.ask(), parts.clone()));
            }
        }
    }
    Ok(failed)
}

/// Moves a task on in the state instead of delivering it, and gives it back if it has moved by itself.
async fn go_on(group: GroupId, term: u64, id: TaskId, ask: impl Fn() -> Ask, parts: Arc<FiringParts>) {
    let _alarm = parts.groups.alarm("who moves a task on");
    if propose_until_stored(&parts, group, term, id, ask).await == Some(Reply::Stale)
        && let Err(error) = parts.ledger.put_back(group, term, id)
    {
        parts.groups.fail(&error.to_string());
    }
}

/// Attempts that fail without being sent, because their destination is down. Thousands may have waited, and each costs
/// the node as much as one that is delivered: so they are settled in small turns, one at a time for all shards and
/// destinations, and after each the node rests from it for as long as it took. Their next attempts are due as far apart.
async fn fail(tickets: Vec<Ticket>, down: Arc<Down>, group: GroupId, term: u64, parts: Arc<FiringParts>) {
    let _alarm = parts.groups.alarm("who settles attempts that were not sent");
    let mut dispatcher = dispatcher(group, term, &parts);
    for tickets in tickets.chunks(FAILED_AT_ONCE) {
        let turn = parts.ledger.failing.lock().await;
        // Those who still wait are due again at the next leader, or the next start.
        if parts.deliveries.is_closed() || !parts.ledger.leads(group, term) {
            return;
        }
        let began = Instant::now();
        dispatcher.fail(tickets, down.clone());
        let failed = match work(&mut dispatcher, &parts) {
            Ok(failed) => failed,
            Err(error) => return parts.groups.fail(&error.to_string()),
        };
        let mut settled = join_all(failed.into_iter().map(|failed| settle(&parts, group, term, failed)));
        let in_time = tokio::time::timeout(FAILING_MAX, &mut settled).await;
        tokio::time::sleep(began.elapsed()).await;
        drop(turn);
        if in_time.is_err() {
            settled.await;
        }
    }
}

async fn deliver(group: GroupId, term: u64, departure: Departure, parts: Arc<FiringParts>) {
    let _alarm = parts.groups.alarm("a delivery");
    let ended = attempt(departure, &parts.callbacks, &parts.metrics).await;
    settle(&parts, group, term, ended).await;
}

/// Returns how it ended.
pub(super) async fn attempt(departure: Departure, callbacks: &Callbacks, metrics: &Metrics) -> Settle {
    let Departure { attempt, delivery, permit } = departure;
    let outcome = callbacks.deliver(permit, delivery).await;
    match &outcome {
        Outcome::Acknowledged => metrics.acknowledged.inc(),
        Outcome::Failed(failure) => {
            tracing::debug!(?attempt, %failure, "an attempt failed");
            metrics.failed_attempts.inc()
        }
    };
    attempt.ended(outcome)
}

/// Stores how an attempt ended, however long that takes: until then the task counts as out.
async fn settle(parts: &FiringParts, group: GroupId, term: u64, settle: Settle) {
    let id = settle.id;
    propose_until_stored(parts, group, term, id, || Ask::Settle(settle.clone())).await;
}

/// `None` when this node leads no more in that term, or stops. While leading is suspended it waits: until then the task is
/// out, and if the term ends the next leader knows nothing of this.
async fn propose_until_stored(
    parts: &FiringParts,
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
