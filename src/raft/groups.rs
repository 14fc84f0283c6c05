//! The groups of this node, from start to stop.
//!
//! Besides starting them, one task looks after all of them, once a second:
//!
//! - *Marker*: after a flush it tells each group up to where its state is durable. openraft takes that for a snapshot
//!   and purges the log below it; this is the only way log entries go.
//! - *Flush*: state that has been waiting in memory for long is flushed, so that a restart replays little.
//! - *Supervision*: a group whose task has panicked is built again from the store, the others go on. A storage error
//!   is the node's end: [`Groups::failed`] resolves, and the process stops rather than answers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use futures::FutureExt;
use openraft::SnapshotPolicy;
use openraft::errors::Fatal;
use openraft::rt::{Instant as _, WatchReceiver as _};
use openraft::{Config, ServerState};
use tokio::sync::watch;
use tokio::time::Instant;

use super::log_store::LogStore;
use super::network::PeerNetwork;
use super::state_machine::{Observer, Seat, StateMachine};
use super::types::{LogId, Member, Raft, ReplicaId};
use crate::store::keys::Key;
use crate::store::syncer::Syncer;
use crate::store::{LogWrite, Store, StoreError, codec};
use crate::task::GroupId;

const HEARTBEAT_MS: u64 = 200;
const ELECTION_MIN_MS: u64 = 800;
const ELECTION_MAX_MS: u64 = 1_200;
/// Entries below the marker that stay for followers that are a little behind; each may hold a thousand requests.
const ENTRIES_KEPT: u64 = 128;

const LOOK_AFTER_EVERY: Duration = Duration::from_secs(1);
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
}

impl Group {
    /// The term this replica leads in, if it is sure of that now: it is the only voter, or a majority has answered it
    /// within its lease, less `margin`.
    pub fn leads(&self, margin: Duration) -> Option<u64> {
        if self.core_has_panicked() {
            return None;
        }
        let receiver = self.raft.metrics();
        let metrics = receiver.borrow_watched();
        if metrics.state != ServerState::Leader || metrics.running_state.is_err() {
            return None;
        }
        let term = metrics.current_term;
        // An isolated leader believes in itself for ever; only the answers of others prove it. A lone voter is a
        // majority by itself, and openraft records no answer for it.
        let lone = metrics.membership_config.voter_ids().eq([self.replica]);
        let lease = Duration::from_millis(ELECTION_MAX_MS).saturating_sub(margin);
        let fresh = || metrics.last_quorum_acked.is_some_and(|acked| acked.elapsed() < lease);
        (lone || fresh()).then_some(term)
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

/// How a group that this node does not know yet comes to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// With this node as its only voter.
    Alone,
    /// As `replica` of a group that has a leader elsewhere, or will have: it waits until that one speaks to it.
    Wait { replica: ReplicaId },
}

/// What all groups of a node share.
pub struct Parts {
    pub cluster: String,
    pub node_id: u64,
    pub shards: u16,
    pub store: Store,
    pub syncer: Syncer,
    pub staging: PathBuf,
    pub network: PeerNetwork,
    pub observer: Arc<dyn Observer>,
    pub begin: Begin,
}

/// See [`Seat`].
#[derive(Default)]
struct Chair {
    taken: Arc<tokio::sync::Mutex<()>>,
    /// Whoever had it last.
    panicked: Arc<AtomicBool>,
}

struct Inner {
    parts: Parts,
    groups: RwLock<BTreeMap<GroupId, Group>>,
    chairs: Mutex<BTreeMap<GroupId, Chair>>,
    failed: watch::Sender<Option<String>>,
}

/// A handle on all groups of this node; cheap to clone.
#[derive(Clone)]
pub struct Groups {
    inner: Arc<Inner>,
}

impl Groups {
    /// Starts every group this node hosts: with the static placement of a single node, all of them.
    pub async fn start(parts: Parts) -> Result<Self, GroupError> {
        let last = GroupId(parts.shards);
        clear_staging(&parts.staging)?;
        let inner =
            Inner { parts, groups: RwLock::default(), chairs: Mutex::default(), failed: watch::Sender::new(None) };
        let groups = Self { inner: Arc::new(inner) };
        let starts = (0..=last.0).map(|id| groups.start_group(GroupId(id)));
        for started in futures::future::join_all(starts).await {
            let group = started?;
            groups.inner.groups.write().expect("no panic under this lock").insert(group.id, group);
        }
        Ok(groups)
    }

    pub fn get(&self, id: GroupId) -> Option<Group> {
        self.inner.groups.read().expect("no panic under this lock").get(&id).cloned()
    }

    pub fn all(&self) -> Vec<Group> {
        self.inner.groups.read().expect("no panic under this lock").values().cloned().collect()
    }

    pub(super) fn parts(&self) -> &Parts {
        &self.inner.parts
    }

    /// Resolves with the reason when this node's storage has failed.
    pub async fn failed(&self) -> String {
        let mut failed = self.inner.failed.subscribe();
        let reason = failed.wait_for(Option::is_some).await.expect("the sender lives as long as we do");
        reason.clone().expect("waited for it")
    }

    async fn start_group(&self, id: GroupId) -> Result<Group, GroupError> {
        let parts = &self.inner.parts;
        let error = |verb| move |why: String| GroupError::Raft { group: id, verb, why };
        let replica = self.replica(id).await?;
        let seat = self.take_seat(id).await?;
        let log = LogStore::new(id, parts.store.clone(), parts.syncer.clone());
        let machine = StateMachine::open(id, parts.store.clone(), parts.staging.clone(), parts.observer.clone())?;
        let machine = machine.seated(seat);
        check_no_gap(&log, &machine)?;
        let network = parts.network.for_group(id);
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
        } else if parts.begin == Begin::Alone {
            let members = BTreeMap::from([(replica, Member { node_id: parts.node_id })]);
            raft.initialize(members).await.map_err(|why| error("begin")(why.to_string()))?;
        }
        static LIVES: AtomicU64 = AtomicU64::new(0);
        Ok(Group { id, replica, raft, life: LIVES.fetch_add(1, Ordering::Relaxed) })
    }

    /// Waits for whoever applies to the group, if it was started before.
    async fn take_seat(&self, id: GroupId) -> Result<Seat, GroupError> {
        let taken = {
            let mut chairs = self.inner.chairs.lock().expect("no panic under this lock");
            chairs.entry(id).or_default().taken.clone()
        };
        let why = "its last state machine is still at work".to_owned();
        let late = |_| GroupError::Raft { group: id, verb: "start", why };
        let taken = tokio::time::timeout(SEAT_WAIT_MAX, taken.lock_owned()).await.map_err(late)?;
        let panicked = Arc::new(AtomicBool::new(false));
        let mut chairs = self.inner.chairs.lock().expect("no panic under this lock");
        chairs.entry(id).or_default().panicked = panicked.clone();
        Ok(Seat::new(taken, panicked))
    }

    /// The replica this node holds of a group: written down before it can vote.
    async fn replica(&self, id: GroupId) -> Result<ReplicaId, GroupError> {
        let store = &self.inner.parts.store;
        let key = Key::log_replica(id);
        if let Some(bytes) = store.get_log(&key)? {
            return Ok(codec::decode("a replica id", &bytes)?);
        }
        let replica = match self.inner.parts.begin {
            Begin::Alone => FIRST_REPLICA,
            Begin::Wait { replica } => replica,
        };
        store.write_log(vec![LogWrite::Put(key, codec::encode(&replica))])?;
        let (done, synced) = tokio::sync::oneshot::channel();
        self.inner.parts.syncer.after_sync(move |result| {
            let _ = done.send(result);
        });
        let lost = |why: String| GroupError::Raft { group: id, verb: "store its replica id", why };
        synced.await.map_err(|error| lost(error.to_string()))?.map_err(|error| lost(error.to_string()))?;
        Ok(replica)
    }

    /// Looks after the groups until the returned future is dropped.
    pub async fn look_after(self) {
        let mut progress = Progress::default();
        let mut rounds = tokio::time::interval(LOOK_AFTER_EVERY);
        rounds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
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
        }
    }

    /// This node's storage has failed; see [`Groups::failed`].
    pub fn fail(&self, reason: &str) {
        tracing::error!(reason, "storage has failed; the node stops");
        self.inner.failed.send_replace(Some(reason.to_owned()));
    }

    async fn look_at(&self, group: &Group, progress: &mut Progress) -> Result<(), GroupError> {
        if self.has_panicked(group) {
            return self.rebuild(group).await;
        }
        let (running, applied, marked, lone) = {
            let receiver = group.raft.metrics();
            let metrics = receiver.borrow_watched();
            let index = |id: Option<LogId>| id.map(|id| id.index);
            let lone = metrics.membership_config.voter_ids().eq([group.replica]);
            (metrics.running_state.clone(), index(metrics.last_applied), index(metrics.snapshot), lone)
        };
        // A lone voter has nobody to send heartbeats to and nobody to wait for: without its clock, an idle group costs
        // nothing at all.
        group.raft.runtime_config().tick(!lone);
        match running {
            Ok(()) => {}
            // Stopped: an earlier attempt to build it again did not succeed.
            Err(Fatal::Panicked | Fatal::Stopped) => return self.rebuild(group).await,
            Err(Fatal::StorageError(error)) => {
                return Err(GroupError::Raft { group: group.id, verb: "go on", why: error.to_string() });
            }
        }
        if progress.durable(&self.inner.parts.store, group.id, applied)? > marked {
            // A trigger that comes while one is under way is dropped; the next round repeats it.
            if let Err(error) = group.raft.trigger().snapshot().await {
                tracing::debug!(group = %group.id, %error, "the marker was not set; the next round looks again");
            }
        }
        Ok(())
    }

    /// When it is the state machine that has panicked, the core goes on until it next has something to apply.
    fn has_panicked(&self, group: &Group) -> bool {
        let chairs = self.inner.chairs.lock().expect("no panic under this lock");
        group.core_has_panicked() || chairs.get(&group.id).is_some_and(|chair| chair.panicked.load(Ordering::Acquire))
    }

    async fn rebuild(&self, broken: &Group) -> Result<(), GroupError> {
        tracing::error!(group = %broken.id, "the group has panicked; building it again from the store");
        let _ = broken.raft.shutdown().await;
        let group = match self.start_group(broken.id).await {
            Ok(group) => group,
            // It may panic again while it starts; the other groups go on, and the next round tries again.
            Err(error @ GroupError::Raft { .. }) => {
                tracing::error!(%error, "the group could not be built again yet");
                return Ok(());
            }
            Err(error @ (GroupError::Store(_) | GroupError::Staging { .. })) => return Err(error),
        };
        self.inner.groups.write().expect("no panic under this lock").insert(group.id, group);
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
        let store = self.inner.parts.store.clone();
        tokio::task::spawn_blocking(move || store.flush_state(true)).await.expect("a flush does not panic")?;
        Ok(())
    }
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
    durable: BTreeMap<GroupId, u64>,
    /// Since when something has been applied that is not durable.
    behind_since: Option<Instant>,
    behind: bool,
}

impl Progress {
    /// Up to where `group` is durable. An idle group costs one comparison.
    fn durable(&mut self, store: &Store, group: GroupId, applied: Option<u64>) -> Result<Option<u64>, StoreError> {
        let known = self.durable.get(&group).copied();
        if applied.is_none() || applied == known {
            return Ok(known);
        }
        let durable = store.durable_applied(group)?.map(|durable| durable.index);
        self.behind |= applied != durable;
        if let Some(index) = durable {
            self.durable.insert(group, index);
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

fn config(cluster: &str, id: GroupId) -> Config {
    let config = Config {
        cluster_name: format!("{cluster}/{id}"),
        heartbeat_interval: HEARTBEAT_MS,
        election_timeout_min: ELECTION_MIN_MS,
        election_timeout_max: ELECTION_MAX_MS,
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
