//! One life of a simulated node: the rooms of the server, put together by `boomerang::node::assembly`, on a disk in memory,
//! a simulated network and a clock that may be wrong. Without group 0, etcd, listeners for clients, and what looks after a
//! real disk.
//!
//! A life that has crashed is a ghost: its tasks may still run, but its disk is read by nobody, its connections lead
//! nowhere, and nothing it delivers leaves it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use boomerang::callback::{CallbackSettings, Callbacks};
use boomerang::clock::Clock;
use boomerang::firing::{Firing, FiringSettings, Ledger};
use boomerang::inspect::Digest;
use boomerang::metrics::Metrics;
use boomerang::node::assembly::{Foundation, NodeParts, Rooms as Assembled};
use boomerang::placement::{self, Cluster, Digests, NodeInfo, NodesService, Table, nodes};
use boomerang::propose::{DiskState, Proposer};
use boomerang::raft::groups::GroupError;
use boomerang::raft::{Groups, Observer, PeerNetwork, PeerService, peer_service};
use boomerang::server::routing::Router;
use boomerang::shard::Effect;
use boomerang::store::Store;
use boomerang::store::memory::MemoryDisk;
use boomerang::store::rows::ShardMetaRow;
use boomerang::store::syncer::Rounds;
use boomerang::store::writer::Writer;
use boomerang_task::GroupId;
use boomerang_task::locks::Mutex;
use futures::future::BoxFuture;
use futures::{FutureExt, stream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::BEGAN_MS;
use super::net::{LifeId, Net, NodeId};
use super::receivers::{Carrier, Receivers};
use super::rows::{Rows, learn};

const CLUSTER: &str = "sim";
/// Short, so that tasks come into the window by themselves and by being read.
const WINDOW_MS: u64 = 3_000;
pub const ANSWER_WITHIN: Duration = Duration::from_millis(1_500);
const COOL_DOWN_MIN: Duration = Duration::from_millis(200);
const COOL_DOWN_MAX: Duration = Duration::from_secs(2);

/// A clock that is off by what it is told, and runs too fast or too slow.
pub struct NodeClock {
    began: Instant,
    offset_us: AtomicI64,
    drift_ppm: i64,
    last_us: AtomicU64,
}

impl NodeClock {
    pub fn new(began: Instant, offset_us: i64, drift_ppm: i64) -> Self {
        Self { began, offset_us: AtomicI64::new(offset_us), drift_ppm, last_us: AtomicU64::new(0) }
    }

    /// From now on it agrees with that of the run, but that it never goes back.
    pub fn set_right(&self) {
        let passed_us = i64::try_from(self.began.elapsed().as_micros()).expect("a run is short");
        self.offset_us.store(-passed_us * self.drift_ppm / 1_000_000, Ordering::SeqCst);
    }
}

impl Clock for NodeClock {
    fn now_us(&self) -> u64 {
        let passed_us = i64::try_from(self.began.elapsed().as_micros()).expect("a run is short");
        let ahead_us = passed_us * self.drift_ppm / 1_000_000 + self.offset_us.load(Ordering::SeqCst);
        let now_us = (BEGAN_MS * 1000 + passed_us.cast_unsigned()).saturating_add_signed(ahead_us);
        self.last_us.fetch_max(now_us, Ordering::SeqCst).max(now_us)
    }
}

/// How long the disk takes to sync, in milliseconds.
pub struct DiskPace {
    pub sync_ms: AtomicU64,
}

/// What a node is made of, life after life.
pub struct Machine {
    pub node: NodeId,
    /// All of them, from 1 up.
    pub nodes: u64,
    pub shards: u16,
    /// What etcd has of the placement, and what this node had stored of it last.
    pub rows: Arc<Rows>,
    pub known: Arc<Mutex<Arc<Table>>>,
    pub disk: MemoryDisk,
    pub pace: Arc<DiskPace>,
    pub net: Net,
    pub receivers: Arc<Receivers>,
    /// Told of whatever is applied.
    pub applied: Arc<Notify>,
}

/// Tells those who wait for something to be applied.
struct TellsApplied(Arc<Notify>);

impl Observer for TellsApplied {
    fn applied(&self, _: GroupId, _: &ShardMetaRow, _: &[Effect]) {
        self.0.notify_waiters();
    }

    fn replaced(&self, _: GroupId) {
        self.0.notify_waiters();
    }
}

/// Replicas are compared from outside.
struct NoDigests;

impl Digests for NoDigests {
    fn mark(&self, _: GroupId, _: u64) -> BoxFuture<'_, Result<(), String>> {
        async { Err("no marks here".to_owned()) }.boxed()
    }

    fn digest(&self, _: GroupId, _: u64) -> BoxFuture<'_, Result<Digest, String>> {
        async { Err("no marks here".to_owned()) }.boxed()
    }
}

pub struct Life {
    pub node: NodeId,
    pub store: Store,
    pub groups: Groups,
    pub cluster: Cluster,
    pub ledger: Arc<Ledger>,
    pub proposer: Proposer,
    pub router: Router,
    pub clock: Arc<NodeClock>,
    /// Told when it is over.
    pub gone: CancellationToken,
    running: Mutex<Option<Running>>,
}

struct Running {
    _firing: Firing,
    _helpers: JoinSet<()>,
    _tasks: JoinSet<()>,
    _disk: watch::Sender<DiskState>,
}

impl Machine {
    /// Returns when it holds its replicas.
    pub async fn start(&self, id: LifeId, clock: NodeClock) -> Result<Life, GroupError> {
        let (node, shards) = (self.node, self.shards);
        let mut tasks = JoinSet::new();
        let store = self.disk.open();
        let (writer, rounds) = Writer::by_hand(store.clone());
        tasks.spawn(sync(rounds, self.pace.clone()));
        let clock = Arc::new(clock);
        let network = PeerNetwork::new(CLUSTER, node, self.net.dialer(node, id));
        let foundation = Foundation::lay(NodeParts {
            cluster: CLUSTER.to_owned(),
            node_id: node,
            shards,
            store: store.clone(),
            writer,
            // Nothing is put there.
            staging: PathBuf::from(format!("no-folder-of-{node}")),
            clock: clock.clone(),
            network,
            firing: firing_settings(),
            metrics: Arc::new(Metrics::new()),
            observers: vec![Arc::new(TellsApplied(self.applied.clone()))],
        })
        .await?;
        let cluster = foundation.cluster.clone();
        (1..=self.nodes).for_each(|node| cluster.set_node(NodeInfo::at(node, &Net::address(node))));
        let wires = self.net.listen(node, id);
        self.net.back(node);
        let wires = stream::unfold(wires, async |mut wires| wires.recv().await.map(|wire| (wire, wires)));
        let service = PeerService::new(foundation.groups.clone());
        let others = NodesService::new(cluster.clone(), clock.clone(), Arc::new(NoDigests)).routes();
        tasks.spawn(async move {
            // It ends with this task.
            let _ = peer_service::serve_wires(wires, service, others).await;
        });
        let everyday: Arc<dyn Clock> = clock.clone();
        tasks.spawn(nodes::ask_around(cluster.clone(), everyday.clone()));
        let known = self.known.lock().clone();
        cluster.set_table((*known).clone());
        placement::follow(&cluster, &everyday, &foundation.hand_over(), &mut tasks).await;
        let gone = CancellationToken::new();
        let carrier = Carrier { receivers: self.receivers.clone(), gone: gone.clone() };
        let callbacks = Callbacks::carried(callback_settings(), Arc::new(carrier));
        let (disk_out, disk) = watch::channel(DiskState::Fine);
        let Assembled { groups, cluster, ledger, proposer, firing, helpers } = foundation.build(disk, callbacks);
        let router = Router::new(cluster.clone(), shards);
        tasks.spawn(learn(cluster.clone(), self.known.clone(), self.rows.clone()));
        cluster.set_begun();
        let running = Mutex::new(Some(Running { _firing: firing, _helpers: helpers, _tasks: tasks, _disk: disk_out }));
        Ok(Life { node, store, groups, cluster, ledger, proposer, router, clock, gone, running })
    }
}

impl Life {
    /// What is left of it is a ghost.
    pub fn end(&self) {
        self.gone.cancel();
        let running = self.running.lock().take();
        drop(running);
        for group in self.groups.all() {
            tokio::spawn(async move {
                let _ = group.raft.shutdown().await;
            });
        }
    }

    /// The term in which it leads `group` now, as far as it knows.
    pub fn leads(&self, group: GroupId) -> Option<u64> {
        self.groups.get(group)?.leads(Duration::ZERO)
    }
}

async fn sync(rounds: Rounds, pace: Arc<DiskPace>) {
    loop {
        rounds.arrived().await;
        tokio::time::sleep(Duration::from_millis(pace.sync_ms.load(Ordering::SeqCst))).await;
        rounds.round();
    }
}

fn firing_settings() -> FiringSettings {
    FiringSettings { window_ms: WINDOW_MS, ..FiringSettings::default() }
}

fn callback_settings() -> CallbackSettings {
    CallbackSettings {
        answer_timeout: ANSWER_WITHIN,
        cool_down_min: COOL_DOWN_MIN,
        cool_down_max: COOL_DOWN_MAX,
        ..CallbackSettings::default()
    }
}
