//! Everything that is simulated, and what is done to it: nodes that come and go, links, disks, clocks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use boomerang::raft::groups::GroupError;
use boomerang::store::memory::MemoryDisk;
use boomerang_task::GroupId;
use boomerang_task::locks::Mutex;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::Notify;
use tokio::time::{Instant, interval};

use super::net::{LifeId, Net, NodeId};
use super::node::{DiskPace, Life, Machine, NodeClock};
use super::placement::Placement;
use super::receivers::Receivers;
use super::{BEGAN_MS, Plan};
use crate::history::{FaultNote, Recorder, Stage, Watch, What};

/// So often somebody looks who leads.
const LOOK_EVERY: Duration = Duration::from_millis(10);
pub const SYNC_MS: u64 = 1;

/// The time of the run.
pub struct SimWatch(pub Instant);

impl Watch for SimWatch {
    fn now_us(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_micros()).expect("a run is short")
    }
}

pub struct World {
    pub plan: Plan,
    pub seed: u64,
    pub began: Instant,
    pub recorder: Recorder,
    pub net: Net,
    pub receivers: Arc<Receivers>,
    pub placement: Placement,
    /// Told whenever anything is applied anywhere.
    pub applied: Arc<Notify>,
    machines: Vec<Machine>,
    lives: Mutex<BTreeMap<NodeId, Arc<Life>>>,
    /// Since when nodes are away that were there.
    away: Mutex<BTreeMap<NodeId, Instant>>,
    next_life: AtomicU64,
    /// Who was seen to lead last.
    leaders: Mutex<BTreeMap<GroupId, (u64, NodeId)>>,
    /// What must not happen to a node: its storage has failed, or it cannot start.
    stopped: Mutex<Vec<String>>,
    rng: Mutex<SmallRng>,
}

/// Chance for one purpose.
pub fn chance(seed: u64, purpose: u64) -> SmallRng {
    SmallRng::seed_from_u64(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(purpose))
}

impl World {
    pub fn new(seed: u64, plan: Plan) -> Arc<Self> {
        let began = Instant::now();
        let recorder = Recorder::new(BEGAN_MS, SimWatch(began));
        let net = Net::new(chance(seed, 1).random());
        let receivers = Arc::new(Receivers::new(recorder.clone(), chance(seed, 2)));
        let applied = Arc::new(Notify::new());
        let placement = Placement::new(&plan);
        let machines = (1..=plan.nodes).map(|node| Machine {
            node,
            nodes: plan.nodes,
            shards: plan.shards,
            rows: placement.rows.clone(),
            known: Arc::new(Mutex::new(placement.rows.now())),
            disk: MemoryDisk::default(),
            pace: Arc::new(DiskPace { sync_ms: AtomicU64::new(SYNC_MS) }),
            net: net.clone(),
            receivers: receivers.clone(),
            applied: applied.clone(),
        });
        Arc::new(Self {
            machines: machines.collect(),
            plan,
            seed,
            began,
            recorder,
            net,
            receivers,
            placement,
            applied: applied.clone(),
            lives: Mutex::default(),
            away: Mutex::default(),
            next_life: AtomicU64::new(1),
            leaders: Mutex::default(),
            stopped: Mutex::default(),
            rng: Mutex::new(chance(seed, 3)),
        })
    }

    pub fn nodes(&self) -> impl Iterator<Item = NodeId> + use<> {
        1..=self.plan.nodes
    }

    pub fn groups(&self) -> impl Iterator<Item = GroupId> + use<> {
        (1..=self.plan.shards).map(GroupId)
    }

    /// The time of the run, in milliseconds since 1970.
    pub fn now_ms(&self) -> u64 {
        BEGAN_MS + self.recorder.now_us() / 1000
    }

    pub fn life(&self, node: NodeId) -> Option<Arc<Life>> {
        self.lives.lock().get(&node).cloned()
    }

    pub fn away_since(&self, node: NodeId) -> Option<Instant> {
        self.away.lock().get(&node).copied()
    }

    pub fn pace(&self, node: NodeId) -> &DiskPace {
        &self.machine(node).pace
    }

    fn machine(&self, node: NodeId) -> &Machine {
        &self.machines[usize::try_from(node - 1).expect("a few nodes")]
    }

    pub fn note(&self, fault: &str, stage: Stage, detail: String) {
        self.recorder.record(What::Fault(FaultNote { fault: fault.to_owned(), stage, detail }));
    }

    /// A node that stops by itself has met something it must not meet here.
    fn stopped(&self, why: String) {
        self.stopped.lock().push(why);
    }

    pub fn take_stopped(&self) -> Vec<String> {
        std::mem::take(&mut self.stopped.lock())
    }

    /// Starts `node`, if it is not there.
    pub async fn start(self: &Arc<Self>, node: NodeId) {
        if self.life(node).is_some() {
            return;
        }
        let id: LifeId = self.next_life.fetch_add(1, Ordering::SeqCst);
        let clock = self.clock();
        let started: Result<Life, GroupError> = self.machine(node).start(id, clock).await;
        match started {
            Ok(life) => {
                let life = Arc::new(life);
                self.lives.lock().insert(node, life.clone());
                self.away.lock().remove(&node);
                tokio::spawn(watch_storage(self.clone(), life));
            }
            Err(error) => self.stopped(format!("node {node} cannot start: {error}")),
        }
    }

    /// As wrong as the plan allows.
    fn clock(&self) -> NodeClock {
        let mut rng = self.rng.lock();
        let offset_us = i64::try_from(self.plan.clock_offset_us).expect("less than a second");
        let offset_us = if offset_us == 0 { 0 } else { rng.random_range(-offset_us..=offset_us) };
        let drift_ppm = if offset_us == 0 { 0 } else { rng.random_range(-DRIFT_PPM_MAX..=DRIFT_PPM_MAX) };
        NodeClock::new(self.began, offset_us, drift_ppm)
    }

    /// The power of `node` is gone, or only its process; nothing else happens to the others. False when it was not there.
    pub fn crash(&self, node: NodeId, power: bool) -> bool {
        let Some(life) = self.lives.lock().remove(&node) else { return false };
        self.away.lock().insert(node, Instant::now());
        let disk = &self.machine(node).disk;
        let kept = match power {
            true => {
                let unsynced = disk.unsynced();
                self.rng.lock().random_range(0..=unsynced)
            }
            false => usize::MAX,
        };
        disk.crash(kept);
        self.net.crash(node, power);
        life.end();
        true
    }

    /// Who was seen to lead `group` last; it may lead no more.
    pub fn leader(&self, group: GroupId) -> Option<NodeId> {
        self.leaders.lock().get(&group).map(|(_, node)| *node)
    }

    /// Who is sure now that it leads `group`.
    pub fn leading(&self, group: GroupId) -> Option<Arc<Life>> {
        self.nodes().filter_map(|node| self.life(node)).find(|life| life.leads(group).is_some())
    }

    /// Writes down who leads, until it is dropped.
    pub async fn watch_leaders(self: Arc<Self>) {
        let mut looks = interval(LOOK_EVERY);
        loop {
            looks.tick().await;
            for node in self.nodes() {
                let Some(life) = self.life(node) else { continue };
                for group in self.groups() {
                    let Some(term) = life.leads(group) else { continue };
                    let mut leaders = self.leaders.lock();
                    if leaders.get(&group).is_none_or(|(known, _)| *known < term) {
                        leaders.insert(group, (term, node));
                        self.recorder.record(What::Leads { group: group.0, node, term });
                    }
                }
            }
        }
    }
}

/// A crystal is off by less.
const DRIFT_PPM_MAX: i64 = 200;

async fn watch_storage(world: Arc<World>, life: Arc<Life>) {
    tokio::select! {
        biased;
        () = life.gone.cancelled() => {}
        why = life.groups.failed() => world.stopped(format!("node {} has stopped: {why}", life.node)),
    }
}
