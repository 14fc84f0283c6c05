//! Follows the leadership of one group, and while this node leads reads the timeline ahead into the wheel.
//!
//! The window may begin to fire when the state holds every entry of earlier terms: openraft's linearizable read waits
//! for just that. Reading starts at the beginning of the timeline, so a new leader meets overdue tasks first.
//!
//! While the lease is not valid and the term goes on, nothing ends here: see [`super::dispatch`].
//!
//! Reading runs beside `apply`. So the horizon is moved *before* the rows are read: a task that is scheduled meanwhile
//! comes to the wheel by itself, or by the rows, or both ways, which is the same.

use std::sync::Arc;
use std::time::Duration;

use openraft::ReadPolicy;
use openraft::ServerState;
use openraft::rt::WatchReceiver as _;
use tokio::sync::Notify;

use super::ledger::{Horizon, Ledger};
use super::{FiringParts, dispatch, forget};
use crate::blocking;
use crate::raft::Group;
use crate::sabotage::Fault;
use crate::store::keys::{Key, Parsed, parse_state};
use crate::store::{Store, StoreError};
use crate::task::{GroupId, InstantMs, TaskId};

/// Rows read and handed to the wheel at a time: the lock is held for well below a millisecond.
const ROWS_PER_CHUNK: usize = 2_048;
/// After a failed attempt to begin a term, and while a group is built again.
const RETRY_AFTER: Duration = Duration::from_millis(50);
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// See [`Fault::BeginLate`].
const LATE: Duration = Duration::from_secs(20);

/// Runs as long as the node dispatches, whether the group is here or not.
pub(super) async fn follow(id: GroupId, parts: Arc<FiringParts>) {
    let _alarm = parts.groups.alarm("who fires for a shard");
    let mut changes = parts.groups.changes();
    loop {
        changes.mark_unchanged();
        // A group that failed is built again under the same id.
        if let Some(group) = parts.groups.get(id) {
            follow_replica(&group, &parts).await;
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

async fn follow_replica(group: &Group, parts: &Arc<FiringParts>) {
    let mut server = group.raft.server_metrics();
    // openraft's last words may be that it leads: a group that was built again is another one.
    while parts.groups.get(group.id).is_some_and(|now| now.life == group.life) {
        let term = {
            let metrics = server.borrow_watched();
            let leads = metrics.state == ServerState::Leader;
            leads.then_some(metrics.vote.leader_id.term)
        };
        if let Some(term) = term {
            lead(group, term, &mut server, parts).await;
            parts.ledger.unlead(group.id, term);
        } else if server.changed().await.is_err() {
            return;
        }
    }
}

type ServerMetrics = openraft::alias::WatchReceiverOf<
    crate::raft::TypeConfig,
    openraft::metrics::RaftServerMetrics<crate::raft::TypeConfig>,
>;

/// Returns when this node does not lead in `term` any more, as openraft says, or cannot begin yet.
async fn lead(group: &Group, term: u64, server: &mut ServerMetrics, parts: &Arc<FiringParts>) {
    // Until it may act as the leader, there is nothing to begin with.
    if group.leads(Duration::ZERO) != Some(term) {
        tokio::time::sleep(RETRY_AFTER).await;
        return;
    }
    if let Err(error) = group.raft.ensure_linearizable(ReadPolicy::ReadIndex).await {
        tracing::debug!(group = %group.id, term, %error, "cannot begin to fire yet");
        tokio::time::sleep(RETRY_AFTER).await;
        return;
    }
    if Fault::BeginLate.is_on() {
        tokio::time::sleep(LATE).await;
    }
    let (dues, room) = match parts.ledger.lead(group.id, term) {
        Ok(begun) => begun,
        Err(error) => {
            tracing::error!(group = %group.id, %error, "cannot begin to fire");
            tokio::time::sleep(RETRY_AFTER).await;
            return;
        }
    };
    tracing::debug!(group = %group.id, term, "leading");
    let changed = async {
        loop {
            if server.changed().await.is_err() {
                return;
            }
            let metrics = server.borrow_watched();
            if metrics.state != ServerState::Leader || metrics.vote.leader_id.term != term {
                return;
            }
        }
    };
    tokio::select! {
        biased;
        () = changed => {}
        result = read_ahead(group.id, term, parts, &room) => {
            if let Err(error) = result {
                parts.groups.fail(&error.to_string());
            }
        }
        // Ends when the storage has failed.
        () = dispatch::run(group, term, dues, parts) => {}
        Err(error) = forget::run(group.id, parts) => parts.groups.fail(&error.to_string()),
    }
}

/// Keeps the window filled; returns when the term is over.
async fn read_ahead(group: GroupId, term: u64, parts: &Arc<FiringParts>, room: &Notify) -> Result<(), StoreError> {
    let window_ms = parts.ledger.settings().window_ms;
    loop {
        let until: Horizon = (parts.clock.now_ms() + window_ms, None);
        let Some(reading) = Reading::begin(&parts.ledger, group, term, until, ROWS_PER_CHUNK) else { return Ok(()) };
        if load(reading, parts).await? == Loaded::Full {
            // The window is as long as memory allows; go on when some of it has fired.
            while !parts.ledger.has_room(group, term) {
                // Told when timers have fired; those that were cancelled are found by looking.
                let _ = tokio::time::timeout(LOOK_EVERY, room.notified()).await;
            }
            continue;
        }
        // Half a window before its end it is time for the next half. In short sleeps, because those stand still while
        // the machine is suspended, and the clock does not.
        while parts.clock.now_ms() + window_ms / 2 < until.0 {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// Never [`Loaded::More`].
async fn load(mut reading: Reading, parts: &Arc<FiringParts>) -> Result<Loaded, StoreError> {
    loop {
        let (store, next) = (parts.store.clone(), reading.clone());
        let rows = blocking::aside(move || next.read(&store)).await.expect("a scan does not panic")?;
        match reading.load(&parts.ledger, &rows) {
            Loaded::More => {}
            ended => return Ok(ended),
        }
    }
}

/// A part of the timeline on its way into the wheel, in single steps: begun, then read and loaded, row by row. The
/// simulation of races takes them with anything in between.
#[derive(Clone)]
pub(super) struct Reading {
    group: GroupId,
    term: u64,
    from: Key,
    until: Key,
    /// Read at a time; two at least, or nothing would be read after the first.
    rows_max: usize,
}

/// What a step came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loaded {
    /// There is more to read.
    More,
    /// Everything is loaded, or the term is over.
    All,
    /// There was no room for all of it.
    Full,
}

impl Reading {
    /// What is scheduled before `until` comes to the wheel by itself from now on; what is stored already is to be read.
    /// `None` when the term is over.
    pub fn begin(ledger: &Ledger, group: GroupId, term: u64, until: Horizon, rows_max: usize) -> Option<Self> {
        let from = match ledger.widen(group, term, until)? {
            (due_ms, None) => Key::timeline_from(group, due_ms),
            (due_ms, Some(id)) => Key::timeline(group, due_ms, id),
        };
        Some(Self { group, term, from, until: Key::timeline_from(group, until.0), rows_max })
    }

    /// The next rows, as they are at this moment.
    pub fn read(&self, store: &Store) -> Result<Vec<(InstantMs, TaskId)>, StoreError> {
        if self.from >= self.until {
            return Ok(Vec::new());
        }
        let rows = store.scan_state(&self.from, &self.until, self.rows_max)?;
        let place = |key: &[u8]| match parse_state(key) {
            Some((_, Parsed::Timeline(due_ms, id))) => Ok((due_ms, id)),
            other => Err(StoreError::damaged("the timeline", format!("it holds {other:?}"))),
        };
        rows.iter().map(|(key, _)| place(key)).collect()
    }

    pub fn load(&mut self, ledger: &Ledger, rows: &[(InstantMs, TaskId)]) -> Loaded {
        let Some((last_due_ms, last)) = rows.last() else { return Loaded::All };
        match ledger.load(self.group, self.term, rows) {
            Some(true) if rows.len() == self.rows_max => {
                // Read again from the last one: the wheel knows it already.
                self.from = Key::timeline(self.group, *last_due_ms, *last);
                Loaded::More
            }
            Some(false) => Loaded::Full,
            Some(true) | None => Loaded::All,
        }
    }
}
