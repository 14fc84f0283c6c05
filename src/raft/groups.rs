//! The groups of this node, from start to stop.
//!
//! Besides starting them, one task looks after all of them, once a second:
//!
//! - *Marker*: after a flush it tells each group up to where its state is durable. openraft takes that for a snapshot
//!   and purges the log below it; this is the only way log entries go.
//! - *Cache*: it grows with what is stored.
//! - *Flush*: state that has been waiting in memory for long is flushed, so that a restart replays little.
//! - *Supervision*: a group whose task has panicked is built again from the store, the others go on. A storage error
//!   is the node's end: [`Groups::failed`] resolves, and the process stops rather than answers. So is a panic of those who
//!   propose and fire, which raise an [`Alarm`]: nobody would do it in their place, and what they share may be half done.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::FutureExt;
use openraft::SnapshotPolicy;
use openraft::errors::Fatal;
use openraft::rt::{Instant as _, WatchReceiver as _};
use openraft::{Config, ServerState};
use tokio::sync::watch;
use tokio::time::Instant;

use super::lease::{Promise, Proof};
use super::log_store::LogStore;
use super::network::PeerNetwork;
use super::state_machine::{Observer, StateLease, StateMachine};
use super::types::{LogId, Member, Raft, ReplicaId};
use super::{HEARTBEAT, LEASE, STALLED_AFTER, pacer};
use crate::blocking;
use crate::sabotage::Fault;
use crate::store::keys::Key;
use crate::store::overlay::Write;
use crate::store::writer::Writer;
use crate::store::{LogWrite, Store, StoreError, codec};
use crate::task::GroupId;
use crate::task::locks::{Mutex, RwLock};

/// Entries below the marker that stay for followers that are a little behind; each may hold a thousand requests.
const ENTRIES_KEPT: u64 = 128;

const LOOK_AFTER_EVERY: Duration = Duration::from_secs(1);
/// In looks: files come and go by flushes and merges.
const FIT_CACHE_EVERY: u32 = 5;
/// State that has not been flushed for this long is.
const FLUSH_AFTER: Duration = Duration::from_secs(60);
/// A state machine whose group is gone ends with what it is applying; that takes milliseconds.
const SEAT_WAIT_MAX: Duration = Duration::from_secs(1);
/// The first replica of a group that this node makes.
const FIRST_REPLICA: ReplicaId = 1;

#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("group {group} cannot {verb}: {why}")]
    Raft { group: GroupId, verb: &'static str, why: String },
    #[error("cannot clear {path}: {source}")]
    Staging { path: String, source: std::io::Error },
}

/// One group's replica on this node; cheap to clone.
#[derive(Clone)]
pub struct Group {
    pub id: GroupId,
    pub replica: ReplicaId,
    pub raft: Raft,
    /// Differs from one start of the group in this process to the next.
    pub life: u64,
    pub(super) promise: Promise,
    pub(super) proof: Proof,
    /// The term in which leadership is being given to another replica: that one may lead before this one knows.
    giving_away: Arc<AtomicU64>,
    /// Of the node: then it does not act as a leader, whatever the others say.
    clock_wrong: Arc<AtomicBool>,
    /// It was in the group before it was started here, and may have promised its leader to vote for nobody else.
    pub(super) bound_until: Option<Instant>,
}

impl Group {
    /// The term this replica leads in, if it is sure of that now: it is the only voter, or a majority has answered it
    /// within its lease, less `margin`.
    pub fn leads(&self, margin: Duration) -> Option<u64> {
        if self.core_has_panicked() || self.clock_wrong.load(Ordering::Acquire) {
            return None;
        }
        let receiver = self.raft.metrics();
        let metrics = receiver.borrow_watched();
        if metrics.state != ServerState::Leader || metrics.running_state.is_err() {
            return None;
        }
        let term = metrics.current_term;
        // Its own vote for somebody else is known there first; what openraft says of itself may be late by as much as it
        // has to do.
        if self.is_given_away(term) || self.promise.term() > term {
            return None;
        }
        // An isolated leader believes in itself for ever; only the answers of others prove it. A lone voter is a
        // majority by itself, and openraft records no answer for it.
        let lone = metrics.membership_config.voter_ids().eq([self.replica]);
        let lease = LEASE.saturating_sub(margin);
        let acked = |within| metrics.last_quorum_acked.is_some_and(|acked| acked.elapsed() < within);
        let voters = || metrics.membership_config.membership().get_joint_config();
        let promised = || self.proof.since(term, self.replica, voters()).is_some_and(|since| since.elapsed() < lease);
        let held = || acked(STALLED_AFTER) && !Fault::BeatsBehindWork.is_on() && promised();
        (lone || acked(lease) || held() || Fault::SkipLease.is_on()).then_some(term)
    }

    /// How long ago a majority was heard that has bound itself to this replica as the leader; `None` where it does not lead,
    /// needs nobody, or has just been elected.
    pub(super) fn lease_age(&self) -> Option<Duration> {
        let receiver = self.raft.metrics();
        let metrics = receiver.borrow_watched();
        if metrics.state != ServerState::Leader || metrics.membership_config.voter_ids().eq([self.replica]) {
            return None;
        }
        let acked = metrics.last_quorum_acked.map(|acked| acked.elapsed());
        let voters = metrics.membership_config.membership().get_joint_config();
        let promised = self.proof.since(metrics.current_term, self.replica, voters).map(|since| since.elapsed());
        acked.into_iter().chain(promised).min()
    }

    /// The term in which this replica asks others for their promise, and of whom: all other members.
    pub(super) fn wishes_bound(&self) -> Option<(u64, Vec<(ReplicaId, u64)>)> {
        let receiver = self.raft.metrics();
        let metrics = receiver.borrow_watched();
        let lives = metrics.last_quorum_acked.is_some_and(|acked| acked.elapsed() < STALLED_AFTER);
        if metrics.state != ServerState::Leader || metrics.running_state.is_err() || !lives || !self.may_lead() {
            return None;
        }
        let term = metrics.current_term;
        if self.is_given_away(term) || self.promise.term() > term {
            return None;
        }
        let nodes = metrics.membership_config.nodes();
        let others = nodes.filter(|(replica, _)| **replica != self.replica).map(|(replica, at)| (*replica, at.node_id));
        Some((term, others.collect()))
    }

    /// Whether it may ask for votes.
    pub(super) fn may_lead(&self) -> bool {
        !self.clock_wrong.load(Ordering::Acquire)
    }

    /// Whether somebody leads the group, here or elsewhere, and has been heard within a lease.
    pub fn has_leader(&self) -> bool {
        self.leads(Duration::ZERO).is_some() || self.follows()
    }

    fn follows(&self) -> bool {
        let receiver = self.raft.metrics();
        let metrics = receiver.borrow_watched();
        metrics.current_leader.is_some_and(|leader| leader != self.replica) && self.promise.heard_at().elapsed() < LEASE
    }

    /// Everybody who takes part in the group, learners included.
    pub fn members(&self) -> BTreeMap<ReplicaId, Member> {
        let receiver = self.raft.metrics();
        let metrics = receiver.borrow_watched();
        metrics.membership_config.nodes().map(|(replica, member)| (*replica, *member)).collect()
    }

    /// Whether there is anybody who could lead it instead.
    pub fn has_other_voters(&self) -> bool {
        self.raft.metrics().borrow_watched().membership_config.voter_ids().any(|voter| voter != self.replica)
    }

    /// Has `to` elected. From now on this replica acts as the leader no more in `term`, whether that works or not: the
    /// transfer goes past the leases, and the other one may lead before it is known here.
    pub async fn transfer(&self, term: u64, to: ReplicaId) -> Result<(), GroupError> {
        self.giving_away.store(term, Ordering::Release);
        let error = |why: String| GroupError::Raft { group: self.id, verb: "be given away", why };
        self.raft.trigger().transfer_leader(to).await.map_err(|fatal| error(fatal.to_string()))
    }

    /// Whether it is being given to another replica.
    pub fn is_given_away(&self, term: u64) -> bool {
        self.giving_away.load(Ordering::Acquire) == term
    }

    /// It has not worked, and it is too late for it to work still.
    pub fn keep(&self, term: u64) {
        let _ = self.giving_away.compare_exchange(term, 0, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Who could lead the group next: the voter that has stored most, among those that have answered within a lease
    /// and are not on one of the `unfit` nodes. Only the leader knows.
    pub fn best_heir(&self, unfit: &BTreeSet<u64>) -> Option<ReplicaId> {
        let receiver = self.raft.metrics();
        let metrics = receiver.borrow_watched();
        let (stored, answered) = (metrics.replication.as_ref()?, metrics.heartbeat.as_ref()?);
        let voters = metrics.membership_config.voter_ids().filter(|voter| *voter != self.replica);
        let fresh = |voter: &ReplicaId| {
            answered.get(voter).copied().flatten().is_some_and(|answered| answered.elapsed() < LEASE)
        };
        let membership = metrics.membership_config.membership();
        let fit = |voter: &ReplicaId| membership.get_node(voter).is_none_or(|member| !unfit.contains(&member.node_id));
        voters.filter(fresh).filter(fit).max_by_key(|voter| stored.get(voter).copied().flatten())
    }

    /// openraft tells of a panic only when it is asked something: the last metrics of its core say that all is well, and
    /// nobody is left to change them.
    fn core_has_panicked(&self) -> bool {
        let mut metrics = self.raft.metrics();
        let running = metrics.borrow_and_update().running_state.is_ok();
        // Closed, though it did not say why. `changed` is ready at once when it is.
        running && matches!(metrics.changed().now_or_never(), Some(Err(_)))
    }
}

/// How a replica that this node does not hold yet comes to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begin {
    /// As the only voter of a new group.
    Alone,
    /// As one of the first voters of a new group. All of them begin with the very same members, and none of them may
    /// have been in the group before.
    Together { replica: ReplicaId, members: BTreeMap<ReplicaId, Member> },
    /// As `replica` of a group that has a leader elsewhere, or will have: it waits until that one speaks to it.
    Wait { replica: ReplicaId },
}

impl Begin {
    fn replica(&self) -> ReplicaId {
        match self {
            Begin::Alone => FIRST_REPLICA,
            Begin::Together { replica, .. } | Begin::Wait { replica } => *replica,
        }
    }

    /// Whom it begins a new group with.
    fn members(&self, node_id: u64) -> Option<BTreeMap<ReplicaId, Member>> {
        match self {
            Begin::Alone => Some(BTreeMap::from([(FIRST_REPLICA, Member { node_id })])),
            Begin::Together { members, .. } => Some(members.clone()),
            Begin::Wait { .. } => None,
        }
    }
}

/// What all groups of a node share.
pub struct GroupsParts {
    pub cluster: String,
    pub node_id: u64,
    pub shards: u16,
    pub store: Store,
    pub writer: Writer,
    pub staging: PathBuf,
    pub network: PeerNetwork,
    pub observer: Arc<dyn Observer>,
}

/// See [`StateLease`].
#[derive(Default)]
struct StateLock {
    taken: Arc<tokio::sync::Mutex<()>>,
    /// Whoever had it last.
    panicked: Arc<AtomicBool>,
}

struct GroupsInner {
    parts: GroupsParts,
    groups: RwLock<BTreeMap<GroupId, Group>>,
    state_locks: Mutex<BTreeMap<GroupId, StateLock>>,
    failed: watch::Sender<Option<String>>,
    /// Counts how often a group has come or gone.
    changes: watch::Sender<u64>,
    /// Held while a group comes or goes.
    coming: tokio::sync::Mutex<()>,
    clock_wrong: Arc<AtomicBool>,
    /// Of the oldest lease that this node leads by, in milliseconds.
    lease_age_ms: AtomicU64,
}

/// A handle on all groups of this node; cheap to clone.
#[derive(Clone)]
pub struct Groups {
    inner: Arc<GroupsInner>,
}

/// The groups, for somebody who must not keep them alive.
pub(super) struct WeakGroups(Weak<GroupsInner>);

impl WeakGroups {
    /// `None` when nobody needs them any more.
    pub(super) fn all(&self) -> Option<Vec<Group>> {
        Some(Groups { inner: self.0.upgrade()? }.all())
    }

    pub(super) fn set_lease_age(&self, age: Duration) {
        if let Some(inner) = self.0.upgrade() {
            inner.lease_age_ms.store(millis(age), Ordering::Relaxed);
        }
    }
}

impl Groups {
    /// Starts every group that this node holds a replica of. The others come with [`Groups::host`].
    pub async fn start(parts: GroupsParts) -> Result<Self, GroupError> {
        clear_staging(&parts.staging)?;
        let mut held = Vec::new();
        for id in (0..=parts.shards).map(GroupId) {
            if parts.store.get_log(&Key::log_retired(id))?.is_some() {
                erase(&parts.store, id).await?;
            }
            if let Some(bytes) = parts.store.get_log(&Key::log_replica(id))? {
                held.push((id, codec::decode("a replica id", &bytes)?));
            }
        }
        let inner = GroupsInner {
            parts,
            groups: RwLock::default(),
            state_locks: Mutex::default(),
            failed: watch::Sender::new(None),
            changes: watch::Sender::new(0),
            coming: tokio::sync::Mutex::default(),
            clock_wrong: Arc::default(),
            lease_age_ms: AtomicU64::new(0),
        };
        let groups = Self { inner: Arc::new(inner) };
        let paced = pacer::run(WeakGroups(Arc::downgrade(&groups.inner)), groups.inner.parts.network.clone());
        groups.inner.parts.network.spawn_urgent(paced);
        let starts = held.into_iter().map(|(id, replica)| groups.start_group(id, replica, None));
        for started in futures::future::join_all(starts).await {
            groups.insert(started?);
        }
        Ok(groups)
    }

    /// Holds a replica of `id` from now on. Does nothing when that replica is here already; refuses when another is.
    pub async fn host(&self, id: GroupId, begin: Begin) -> Result<Group, GroupError> {
        let _turn = self.inner.coming.lock().await;
        let replica = begin.replica();
        if let Some(group) = self.get(id) {
            if group.replica == replica {
                self.begin(&group, begin.members(self.inner.parts.node_id)).await?;
                return Ok(group);
            }
            let why = format!("this node holds replica {} of it", group.replica);
            return Err(GroupError::Raft { group: id, verb: "be held here as another replica", why });
        }
        // What an attempt to release another replica has left: with it, this one would vote as that one did.
        let store = &self.inner.parts.store;
        let stored = store.get_log(&Key::log_replica(id))?;
        let stored = stored.map(|bytes| codec::decode::<ReplicaId>("a replica id", &bytes)).transpose()?;
        if store.get_log(&Key::log_retired(id))?.is_some() || stored.is_some_and(|stored| stored != replica) {
            let _lease = self.lease_state(id).await?;
            erase(store, id).await?;
        }
        self.write_replica(id, replica).await?;
        let group = self.start_group(id, replica, begin.members(self.inner.parts.node_id)).await?;
        self.insert(group.clone());
        Ok(group)
    }

    /// Releases a replica that is no member of its group any more, and everything it has stored. Its id must never
    /// be used again.
    pub async fn retire(&self, id: GroupId) -> Result<(), GroupError> {
        let _turn = self.inner.coming.lock().await;
        let Some(group) = self.get(id) else { return Ok(()) };
        self.inner.groups.write().remove(&id);
        self.inner.changes.send_modify(|changes| *changes += 1);
        let _ = group.raft.shutdown().await;
        // Nothing of it is at work any more: what it would write now would stay for ever.
        let lease = self.lease_state(id).await?;
        let store = &self.inner.parts.store;
        // First of all, so that whatever happens from here on, the next start goes on with it.
        self.write_log(id, LogWrite::Put(Key::log_retired(id), Vec::new()), "be released").await?;
        if !Fault::LeaveBehind.is_on() {
            erase(store, id).await?;
        }
        drop(lease);
        tracing::info!(group = %id, replica = group.replica, "released a replica");
        Ok(())
    }

    fn insert(&self, group: Group) {
        self.inner.groups.write().insert(group.id, group);
        self.inner.changes.send_modify(|changes| *changes += 1);
    }

    /// Changes whenever a group comes, goes, or is built again.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changes.subscribe()
    }

    /// Whether this node's clock is so wrong that it must lead nothing.
    pub fn set_clock_wrong(&self, wrong: bool) {
        self.inner.clock_wrong.store(wrong, Ordering::Release);
    }

    /// How long ago the others were heard by whose promises this node leads, where that is longest; see [`super::lease`].
    /// Looked at every few milliseconds.
    pub fn lease_age(&self) -> Duration {
        Duration::from_millis(self.inner.lease_age_ms.load(Ordering::Relaxed))
    }

    pub fn shards(&self) -> u16 {
        self.inner.parts.shards
    }

    pub fn node_id(&self) -> u64 {
        self.inner.parts.node_id
    }

    pub fn get(&self, id: GroupId) -> Option<Group> {
        self.inner.groups.read().get(&id).cloned()
    }

    pub fn all(&self) -> Vec<Group> {
        self.inner.groups.read().values().cloned().collect()
    }

    pub(super) fn parts(&self) -> &GroupsParts {
        &self.inner.parts
    }

    /// Resolves with the reason when this node cannot go on.
    pub async fn failed(&self) -> String {
        let mut failed = self.inner.failed.subscribe();
        let reason = failed.wait_for(Option::is_some).await.expect("the sender lives as long as we do");
        reason.clone().expect("waited for it")
    }

    /// `members`: whom it begins a new group with, if it does.
    async fn start_group(
        &self,
        id: GroupId,
        replica: ReplicaId,
        members: Option<BTreeMap<ReplicaId, Member>>,
    ) -> Result<Group, GroupError> {
        let parts = &self.inner.parts;
        let error = |verb| move |why: String| GroupError::Raft { group: id, verb, why };
        let lease = self.lease_state(id).await?;
        let log = LogStore::new(id, parts.writer.clone());
        let machine = StateMachine::open(id, parts.writer.clone(), parts.staging.clone(), parts.observer.clone())?;
        let machine = machine.with_lease(lease);
        check_no_gap(&log, &machine)?;
        let network = parts.network.for_group(id).with_log(log.last());
        let promise = log.promise()?;
        let raft = Raft::new(replica, Arc::new(config(&parts.cluster, id)), network, log, machine)
            .await
            .map_err(|fatal| error("start")(fatal.to_string()))?;
        let known = raft.is_initialized().await.map_err(|fatal| error("start")(fatal.to_string()))?;
        if known {
            // A lone voter need not wait for an election timeout to find out that nobody else wants to lead.
            let lone = raft.voter_ids().eq([replica]);
            if lone {
                raft.trigger().elect(false).await.map_err(|fatal| error("elect a leader")(fatal.to_string()))?;
            }
        }
        static LIVES: AtomicU64 = AtomicU64::new(0);
        let life = LIVES.fetch_add(1, Ordering::Relaxed);
        let bound_until = known.then(|| Instant::now() + LEASE);
        let clock_wrong = self.inner.clock_wrong.clone();
        let (proof, giving_away) = (Proof::default(), Arc::default());
        let group = Group { id, replica, raft, life, promise, proof, giving_away, clock_wrong, bound_until };
        self.begin(&group, members).await?;
        Ok(group)
    }

    /// A new group begins, unless it has begun already.
    async fn begin(&self, group: &Group, members: Option<BTreeMap<ReplicaId, Member>>) -> Result<(), GroupError> {
        let Some(members) = members else { return Ok(()) };
        let error = |why: String| GroupError::Raft { group: group.id, verb: "begin", why };
        if group.raft.is_initialized().await.map_err(|fatal| error(fatal.to_string()))? {
            return Ok(());
        }
        group.raft.initialize(members).await.map_err(|why| error(why.to_string()))
    }

    /// Waits for whoever applies to the group, if it was started before, and until all it has left is written.
    async fn lease_state(&self, id: GroupId) -> Result<StateLease, GroupError> {
        let taken = {
            let mut state_locks = self.inner.state_locks.lock();
            state_locks.entry(id).or_default().taken.clone()
        };
        let why = "its last state machine is still at work".to_owned();
        let late = |_| GroupError::Raft { group: id, verb: "start", why };
        let taken = tokio::time::timeout(SEAT_WAIT_MAX, taken.lock_owned()).await.map_err(late)?;
        // What an earlier life of the group has left to be written.
        let unread = |why: Arc<StoreError>| GroupError::Raft { group: id, verb: "start", why: why.to_string() };
        self.inner.parts.writer.settled().await.map_err(unread)?;
        let panicked = Arc::new(AtomicBool::new(false));
        let mut state_locks = self.inner.state_locks.lock();
        state_locks.entry(id).or_default().panicked = panicked.clone();
        Ok(StateLease::new(taken, panicked))
    }

    /// Before it can vote.
    async fn write_replica(&self, id: GroupId, replica: ReplicaId) -> Result<(), GroupError> {
        let row = LogWrite::Put(Key::log_replica(id), codec::encode(&replica));
        self.write_log(id, row, "store its replica id").await
    }

    /// Returns when it is durable, with everything that was left for the log before.
    async fn write_log(&self, group: GroupId, change: LogWrite, verb: &'static str) -> Result<(), GroupError> {
        let written = self.inner.parts.writer.write_log(vec![change]).await;
        written.map_err(|error| GroupError::Raft { group, verb, why: error.to_string() })
    }

    /// Looks after the groups until the returned future is dropped.
    pub async fn look_after(self) {
        let mut progress = Progress::default();
        let mut rounds = tokio::time::interval(LOOK_AFTER_EVERY);
        rounds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut turns = (0..FIT_CACHE_EVERY).cycle();
        loop {
            rounds.tick().await;
            for group in self.all() {
                if let Err(error) = self.look_at(&group, &mut progress).await {
                    self.fail(&error.to_string());
                }
            }
            if let Err(error) = progress.flush_if_old(&self.inner.parts.store) {
                self.fail(&error.to_string());
            }
            if turns.next() == Some(0) {
                self.inner.parts.store.fit_cache();
            }
        }
    }

    /// This node cannot go on; see [`Groups::failed`].
    pub fn fail(&self, reason: &str) {
        tracing::error!(reason, "the node cannot go on; it stops");
        self.inner.failed.send_replace(Some(reason.to_owned()));
    }

    /// For a task or thread that must not panic.
    pub fn alarm(&self, who: &'static str) -> Alarm {
        Alarm { groups: self.clone(), who }
    }

    async fn look_at(&self, group: &Group, progress: &mut Progress) -> Result<(), GroupError> {
        if self.has_panicked(group) {
            return self.rebuild(group).await;
        }
        let (running, applied, marked) = {
            let receiver = group.raft.metrics();
            let metrics = receiver.borrow_watched();
            let index = |id: Option<LogId>| id.map(|id| id.index);
            (metrics.running_state.clone(), index(metrics.last_applied), index(metrics.snapshot))
        };
        match running {
            Ok(()) => {}
            // Stopped: an earlier attempt to build it again did not succeed.
            Err(Fatal::Panicked | Fatal::Stopped) => return self.rebuild(group).await,
            Err(Fatal::StorageError(error)) => {
                return Err(GroupError::Raft { group: group.id, verb: "go on", why: error.to_string() });
            }
        }
        if progress.durable(&self.inner.parts.store, group, applied)? > marked {
            // A trigger that comes while one is under way is dropped; the next round repeats it.
            if let Err(error) = group.raft.trigger().snapshot().await {
                tracing::debug!(group = %group.id, %error, "the marker was not set; the next round looks again");
            }
        }
        Ok(())
    }

    /// When it is the state machine that has panicked, the core goes on until it next has something to apply.
    fn has_panicked(&self, group: &Group) -> bool {
        let state_locks = self.inner.state_locks.lock();
        group.core_has_panicked()
            || state_locks.get(&group.id).is_some_and(|lock| lock.panicked.load(Ordering::Acquire))
    }

    async fn rebuild(&self, broken: &Group) -> Result<(), GroupError> {
        tracing::error!(group = %broken.id, "the group has panicked; building it again from the store");
        let _ = broken.raft.shutdown().await;
        let _turn = self.inner.coming.lock().await;
        if self.get(broken.id).is_none_or(|now| now.life != broken.life) {
            return Ok(());
        }
        let group = match self.start_group(broken.id, broken.replica, None).await {
            Ok(group) => group,
            // It may panic again while it starts; the other groups go on, and the next round tries again.
            Err(error @ GroupError::Raft { .. }) => {
                tracing::error!(%error, "the group could not be built again yet");
                return Ok(());
            }
            Err(error @ (GroupError::Store(_) | GroupError::Staging { .. })) => return Err(error),
        };
        self.insert(group);
        Ok(())
    }

    /// Stops every group and leaves a state that needs no replay.
    pub async fn stop(&self) -> Result<(), GroupError> {
        let stops = self.all().into_iter().map(|group| async move { group.raft.shutdown().await });
        for stopped in futures::future::join_all(stops).await {
            if let Err(error) = stopped {
                tracing::warn!(%error, "a group did not stop in order");
            }
        }
        let (store, writer) = (self.inner.parts.store.clone(), &self.inner.parts.writer);
        let unwritten =
            |why: Arc<StoreError>| GroupError::Raft { group: GroupId::CLUSTER, verb: "stop", why: why.to_string() };
        writer.settled().await.map_err(unwritten)?;
        blocking::aside(move || store.flush_state(true)).await.expect("a flush does not panic")?;
        Ok(())
    }
}

/// Held by a task or thread that nobody joins as long as the node runs: its panic is the node's end.
pub struct Alarm {
    groups: Groups,
    /// For the log, which has the panic itself.
    who: &'static str,
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.groups.fail(&format!("{} has panicked", self.who));
        }
    }
}

/// Everything stored of a group that was released, and last of all the note that it was.
async fn erase(store: &Store, id: GroupId) -> Result<(), StoreError> {
    let store = store.clone();
    let erased = blocking::aside(move || {
        let (from, until) = Key::group_range(id);
        store.write_state([(from.clone(), Write::DeleteRange(until.clone()))])?;
        store.flush_state(true)?;
        store.write_log(vec![LogWrite::DeleteRange(from, until)])?;
        store.sync_log()
    });
    erased.await.expect("erasing does not panic")
}

/// What is purged must be in the state: openraft takes an empty state above a purged log for a new one, and would serve
/// without what was acknowledged.
fn check_no_gap(log: &LogStore, machine: &StateMachine) -> Result<(), StoreError> {
    let (purged, applied) = (log.last_purged()?, machine.applied());
    if purged.map(|id| id.index) > applied.map(|id| id.index) {
        let shown = |id: Option<LogId>| id.map_or_else(|| "nothing".into(), |id| id.to_string());
        let why = format!("it holds {} and the log begins after {}", shown(applied), shown(purged));
        return Err(StoreError::damaged("the state", why));
    }
    Ok(())
}

/// How far each group is, in memory and on disk.
#[derive(Default)]
struct Progress {
    /// By group and life: a replica that comes after another one begins with nothing.
    durable: BTreeMap<(GroupId, u64), u64>,
    /// Since when something has been applied that is not durable.
    behind_since: Option<Instant>,
    behind: bool,
}

impl Progress {
    /// Up to where `group` is durable. An idle group costs one comparison.
    fn durable(&mut self, store: &Store, group: &Group, applied: Option<u64>) -> Result<Option<u64>, StoreError> {
        let key = (group.id, group.life);
        let known = self.durable.get(&key).copied();
        if applied.is_none() || applied == known {
            return Ok(known);
        }
        let durable = store.durable_applied(group.id)?.map(|durable| durable.index);
        self.behind |= applied != durable;
        if let Some(index) = durable {
            self.durable.retain(|(id, life), _| *id != group.id || *life == group.life);
            self.durable.insert(key, index);
        }
        Ok(durable)
    }

    fn flush_if_old(&mut self, store: &Store) -> Result<(), StoreError> {
        if !std::mem::take(&mut self.behind) {
            self.behind_since = None;
            return Ok(());
        }
        let since = *self.behind_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= FLUSH_AFTER {
            self.behind_since = None;
            store.flush_state(false)?;
        }
        Ok(())
    }
}

/// Takes away what a process left there that was killed while it received a snapshot: the names are never used again.
fn clear_staging(folder: &Path) -> Result<(), GroupError> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(GroupError::Staging { path: folder.display().to_string(), source: error })
        }
        _ => Ok(()),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).expect("a short while")
}

fn config(cluster: &str, id: GroupId) -> Config {
    let config = Config {
        cluster_name: format!("{cluster}/{id}"),
        // Heartbeats and elections come from `pacer`; these say how long a message may take, and the lease.
        enable_tick: false,
        heartbeat_interval: millis(HEARTBEAT),
        election_timeout_min: millis(LEASE) * 3 / 4,
        election_timeout_max: millis(LEASE),
        // The marker of durable state is the only snapshot; see the head of this file.
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: ENTRIES_KEPT,
        // A node that comes back begins a new term: its state may be older than before, and two lives of one leader
        // must not share a fence.
        enable_leader_restore: Some(false),
        enable_pre_vote: Some(true),
        ..Config::default()
    };
    config.validate().expect("these settings fit together")
}
