//! From a due id to a delivery, and from its outcome to a settled attempt.
//!
//! For each batch of due ids: is the lease valid (else the whole term is void here), what does the state say, and only
//! what still stands at that due instant goes out. The fence (term, count of deliveries in this term) is given here.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::Parts;
use super::ledger::Due;
use crate::callback::{Permit, Ticket};
use crate::propose::{Ask, Refused};
use crate::raft::Group;
use crate::shard::{self, Reply, Settle};
use crate::store::StoreError;
use crate::store::keys::Key;
use crate::store::rows::{CursorRow, PolicyRow, TaskRow};
use crate::store::{Store, codec};
use crate::task::{Delivery, Fence, GroupId, InstantMs, Outcome, Policy, PolicyId, TaskId};

/// The lease must last at least this much longer when a batch is handed to its receivers' connections.
const LEASE_MARGIN: Duration = Duration::from_millis(100);
/// A settled attempt that could not be stored is proposed again after this.
const SETTLE_AGAIN_AFTER: Duration = Duration::from_millis(500);
/// Policies remembered per shard while it is led.
const POLICIES_MAX: usize = 1_024;

/// Raises a shard's watermark when the driver asks for it.
pub(super) fn armer(parts: Arc<Parts>) -> impl Fn(GroupId, InstantMs) + Send + 'static {
    let runtime = tokio::runtime::Handle::current();
    move |group, up_to| {
        let parts = parts.clone();
        runtime.spawn(async move {
            match parts.proposer.ask(group, Ask::Arm(up_to)).await {
                Ok(_) => {}
                Err(Refused::Stopping) => {}
                // If the leadership is over, so is this; if only the lease was, the driver asks again.
                Err(refused) => {
                    tracing::debug!(%group, %refused, "the watermark could not be raised; trying again");
                    tokio::time::sleep(SETTLE_AGAIN_AFTER).await;
                    parts.ledger.arm_failed(group);
                }
            }
        });
    }
}

/// Dispatches what is due until the lease is not valid.
pub(super) async fn run(group: &Group, term: u64, mut dues: mpsc::UnboundedReceiver<Due>, parts: &Arc<Parts>) {
    let mut policies = Policies::default();
    while let Some(due) = dues.recv().await {
        if group.leads(LEASE_MARGIN) != Some(term) {
            tracing::warn!(group = %group.id, term, "the lease is not valid; nothing is dispatched");
            return;
        }
        if let Err(error) = dispatch(group.id, term, &due, &mut policies, parts) {
            parts.groups.fail(&error.to_string());
            return;
        }
    }
}

fn dispatch(
    group: GroupId,
    term: u64,
    due: &Due,
    policies: &mut Policies,
    parts: &Arc<Parts>,
) -> Result<(), StoreError> {
    let standing = tokio::task::block_in_place(|| read(&parts.store, group, due, policies))?;
    for ((due_ms, id), standing) in due.iter().zip(standing) {
        let stands_at = standing.as_ref().map(|(_, cursor, _)| cursor.due_ms);
        // Only what is due by the instant that was handed over, which is armed.
        let Some((task, cursor, policy)) = standing.filter(|(_, cursor, _)| cursor.due_ms <= *due_ms) else {
            parts.ledger.put_back(group, term, *id, stands_at);
            continue;
        };
        let CursorRow { occurrence, attempt, .. } = cursor;
        let Some(seq) = parts.ledger.begin(group, term, *id, occurrence, attempt) else { continue };
        let delivery = Delivery {
            task: *id,
            due_ms: shard::occurrence_due(&task, occurrence),
            client: task.client,
            name: None,
            payload: task.payload,
            occurrence,
            attempt,
            fence: Fence { term, seq },
            policy,
            dead_letter: None,
        };
        let late_us = parts.clock.now_us().saturating_sub(due_ms * 1000);
        parts.metrics.lateness.observe(Duration::from_micros(late_us).as_secs_f64());
        parts.metrics.dispatches.inc();
        let ticket = Ticket { group, term, task: *id, due_ms: *due_ms };
        let permit = parts.callbacks.admit(&delivery.policy.callback, ticket).expect("there is always room");
        parts.deliveries.spawn(deliver(group, term, delivery, permit, parts.clone()));
    }
    Ok(())
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

async fn deliver(group: GroupId, term: u64, delivery: Delivery, permit: Permit, parts: Arc<Parts>) {
    let Delivery { task: id, occurrence, attempt, .. } = delivery;
    let outcome = parts.callbacks.deliver(permit, delivery).await;
    match &outcome {
        Outcome::Acknowledged => parts.metrics.acknowledged.inc(),
        Outcome::Failed(error) => {
            tracing::debug!(task = %id, occurrence, attempt, %error, "an attempt failed");
            parts.metrics.failed_attempts.inc()
        }
    };
    settle(&parts, group, term, id, Settle { id, occurrence, attempt, outcome }).await;
}

/// Stores how an attempt ended, however long that takes: until then the task counts as out.
async fn settle(parts: &Parts, group: GroupId, term: u64, id: TaskId, settle: Settle) {
    loop {
        match parts.proposer.ask(group, Ask::Settle(settle.clone())).await {
            Ok(Reply::Settled | Reply::Stale) => return,
            Ok(other) => unreachable!("a settle is never answered with {other:?}"),
            Err(Refused::Stopping) => return,
            // The next leader delivers again, with a larger fence.
            Err(Refused::NotLeader { .. }) if !parts.ledger.leads(group, term) => {
                tracing::debug!(task = %id, term, "could not be settled: the leadership is over");
                return;
            }
            Err(refused) => {
                tracing::warn!(task = %id, %refused, "not settled yet");
                tokio::time::sleep(SETTLE_AGAIN_AFTER).await;
            }
        }
    }
}
