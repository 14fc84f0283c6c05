//! Who hosts which group: from the nodes there are to the replicas each of them holds.
//!
//! A [`Table`] says which replicas every group is to have. It comes from the settings (one node alone, or a fixed list
//! of peers) or from etcd, where a controller writes it. Each node then does its own part of it: it hosts what it is
//! named for, releases what it is not, and, where it leads, moves the membership of the group towards the row.
//!
//! This room decides where replicas are and never what they hold. It is not on the way of any request: while etcd is
//! away nothing moves, and everything else goes on.
//!
//! - [`cluster`]: what this node knows of the others: addresses, the table, who leads
//! - [`nodes`]: what nodes ask of each other
//! - [`fixed`]: the table of a fixed list of peers; [`etcd`]: the table in etcd, and the controller that writes it
//! - [`plan`]: from nodes and rows to better rows, a function
//! - [`agent`]: what this node holds; [`converge`]: the members of the groups that it leads
//! - [`files`]: what is kept of it in the data folder
//! - [`clock_guard`]: a node whose clock is wrong leads nothing
//! - [`verify`]: whether replicas are equal; [`flags`]: its settings

pub mod agent;
pub mod clock_guard;
pub mod cluster;
pub mod converge;
pub mod etcd;
mod files;
pub mod fixed;
pub mod flags;
pub mod nodes;
pub mod plan;
pub mod verify;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

pub use cluster::{Cluster, LeaderAt};
pub use converge::HandOver;
pub use etcd::ControlError;
pub use nodes::{Digests, NodesService};

use etcd::access::{Access, AccessError, AccessSettings};
use etcd::register::{self, Registration};

use crate::clock::Clock;
use crate::raft::groups::GroupError;
use crate::raft::{Begin, ReplicaId};
use crate::task::GroupId;

/// A node as it announces itself; addresses are `host:port`, as others reach it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    pub node_id: u64,
    pub peer: String,
    pub tcp: String,
    pub http: String,
    /// Replicas of a group are spread over zones; empty is a zone of its own kind.
    pub zone: String,
    pub version: String,
}

impl NodeInfo {
    /// One of which no more is known.
    pub fn at(node_id: u64, peer: &str) -> Self {
        let unknown = String::new;
        Self { node_id, peer: peer.to_owned(), tcp: unknown(), http: unknown(), zone: unknown(), version: unknown() }
    }
}

/// One copy of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ReplicaAt {
    pub replica: ReplicaId,
    pub node_id: u64,
    /// Learners follow and do not count; group 0 has one on every node that holds no voter of it.
    pub voter: bool,
}

/// The replicas a group is to have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupRow {
    /// Grows with each change. In epoch 1 the group begins, with the voters of this row.
    pub epoch: u64,
    /// The first voter leads when nothing speaks against it.
    pub replicas: Vec<ReplicaAt>,
    /// Above every replica id that the group ever had: none is used twice.
    pub next_replica: ReplicaId,
}

impl GroupRow {
    /// The replica that `node_id` is to hold.
    pub fn on(&self, node_id: u64) -> Option<ReplicaAt> {
        self.replicas.iter().find(|at| at.node_id == node_id).copied()
    }

    /// They come before all learners.
    pub fn voters(&self) -> impl Iterator<Item = &ReplicaAt> {
        self.replicas.iter().filter(|at| at.voter)
    }

    /// An id that no replica has had.
    fn new_replica(&mut self) -> ReplicaId {
        self.next_replica += 1;
        self.next_replica - 1
    }
}

/// The wanted replicas of all groups.
pub type Table = BTreeMap<GroupId, GroupRow>;

/// How long a node that holds groups waits for etcd when it starts, in case it is not to be let in.
const ETCD_WAIT: Duration = Duration::from_secs(2);
/// A node that waits says so this often.
const SAY_EVERY: Duration = Duration::from_secs(10);
/// What could not be done about this node's part is tried again after this, when it starts.
const HOST_AGAIN_AFTER: Duration = Duration::from_millis(200);

#[derive(Debug, thiserror::Error)]
pub enum PlacementError {
    #[error(transparent)]
    Group(#[from] GroupError),
    #[error(transparent)]
    File(#[from] files::FileError),
    #[error(transparent)]
    Fixed(#[from] fixed::FixedError),
    #[error(transparent)]
    Etcd(#[from] etcd::EtcdError),
    #[error(transparent)]
    Access(#[from] AccessError),
    #[error("the data folder belongs to a node of a cluster; give {0} as before, or choose an empty --data-dir")]
    NotAlone(&'static str),
}

/// What decides where replicas are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// One node holds everything.
    Alone,
    /// A fixed list of nodes, by their numbers.
    Static {
        peers: BTreeMap<u64, String>,
        replicas: u16,
    },
    Etcd {
        endpoints: Vec<String>,
        access: AccessSettings,
        replicas: u16,
        bootstrap_expect: u16,
        node_grace: Duration,
    },
}

impl Placement {
    /// Hosts of the nodes of a cluster, as far as they are told; `None` when there is no cluster.
    pub fn hosts(&self) -> Option<Vec<String>> {
        match self {
            Self::Alone => None,
            Self::Etcd { .. } => Some(Vec::new()),
            Self::Static { peers, .. } => {
                let host =
                    |address: &String| address.rsplit_once(':').map_or(address.clone(), |(host, _)| host.to_owned());
                Some(peers.values().map(host).collect())
            }
        }
    }
}

/// What placement works with.
pub struct PlacementParts {
    pub placement: Placement,
    pub shards: u16,
    pub data_dir: PathBuf,
    /// This node, as others reach it.
    pub here: NodeInfo,
    pub cluster: Cluster,
    pub clock: Arc<dyn Clock>,
    pub hand_over: Arc<dyn HandOver>,
}

/// Placement at work; ends when it is dropped.
pub struct Running {
    tasks: JoinSet<()>,
    control: Control,
    /// To be given back.
    lease: Option<(etcd::Link, watch::Receiver<Registration>)>,
}

impl Running {
    /// For operators.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Nothing moves any more, and others are told that this node is away.
    pub async fn stop(&mut self) {
        self.tasks.shutdown().await;
        let Some((link, registration)) = self.lease.take() else { return };
        let state = registration.borrow().clone();
        if let Registration::Done(lease) = state {
            register::leave(&link, lease).await;
        }
    }
}

/// What decides where replicas are, as operators see it.
#[derive(Clone)]
pub enum Control {
    Alone,
    Fixed,
    Etcd(etcd::Control),
}

impl Control {
    /// Why nothing can be changed, or who can.
    pub fn changeable(&self) -> Result<&etcd::Control, ControlError> {
        match self {
            Control::Alone => Err(ControlError::Alone),
            Control::Fixed => Err(ControlError::Fixed),
            Control::Etcd(control) => Ok(control),
        }
    }
}

/// Returns when this node holds what it is to hold, as far as that is known; peers must be served before, because those
/// who begin a group together speak to each other. Takes as long as it takes for the others to be there.
pub async fn start(parts: PlacementParts) -> Result<Running, PlacementError> {
    parts.cluster.set_node(parts.here.clone());
    let mut running = Running { tasks: JoinSet::new(), control: Control::Alone, lease: None };
    match &parts.placement {
        Placement::Alone => start_alone(&parts).await?,
        Placement::Static { peers, replicas } => start_fixed(&parts, peers, *replicas, &mut running).await?,
        Placement::Etcd { endpoints, access, replicas, bootstrap_expect, node_grace } => {
            let link = etcd::Link::new(endpoints.clone(), Access::read(access)?, parts.cluster.network().cluster());
            let start = EtcdStart { link, replicas: *replicas, expect: *bootstrap_expect, grace: *node_grace };
            start_etcd(&parts, start, &mut running).await?;
        }
    }
    Ok(running)
}

async fn start_alone(parts: &PlacementParts) -> Result<(), PlacementError> {
    for (file, flag) in [(fixed::BEGUN_FILE, "--peers"), (etcd::KNOWN_FILE, "--etcd")] {
        if parts.data_dir.join(file).exists() {
            return Err(PlacementError::NotAlone(flag));
        }
    }
    for group in (0..=parts.shards).map(GroupId) {
        parts.cluster.groups().host(group, Begin::Alone).await?;
    }
    parts.cluster.set_table(fixed::alone(parts.shards, parts.cluster.node_id()));
    Ok(())
}

async fn start_fixed(
    parts: &PlacementParts,
    peers: &BTreeMap<u64, String>,
    replicas: u16,
    running: &mut Running,
) -> Result<(), PlacementError> {
    running.control = Control::Fixed;
    let (cluster, tasks) = (&parts.cluster, &mut running.tasks);
    for (node_id, address) in peers.iter().filter(|(node_id, _)| **node_id != cluster.node_id()) {
        cluster.set_node(NodeInfo::at(*node_id, address));
    }
    let folder = files::folder_id(&parts.data_dir)?;
    let holds = !cluster.groups().all().is_empty();
    tasks.spawn(nodes::ask_around(cluster.clone(), parts.clock.clone()));
    tasks.spawn(fixed::learn_addresses(cluster.clone()));
    let nodes: Vec<u64> = peers.keys().copied().collect();
    fixed::begin(cluster, &parts.data_dir, folder, &nodes, replicas, holds).await?;
    cluster.set_table(fixed::table(parts.shards, &nodes, replicas));
    follow(cluster, &parts.clock, &parts.hand_over, tasks).await;
    Ok(())
}

struct EtcdStart {
    link: etcd::Link,
    replicas: u16,
    expect: u16,
    grace: Duration,
}

async fn start_etcd(parts: &PlacementParts, start: EtcdStart, running: &mut Running) -> Result<(), PlacementError> {
    let (cluster, tasks) = (&parts.cluster, &mut running.tasks);
    let folder = files::folder_id(&parts.data_dir)?;
    cluster.set_founding(cluster::Founding { folder: folder.clone(), ..Default::default() });
    let known = etcd::Known::read(&parts.data_dir)?;
    let held: BTreeMap<GroupId, ReplicaId> =
        cluster.groups().all().into_iter().map(|group| (group.id, group.replica)).collect();
    let holds = !held.is_empty();
    if let Some(known) = &known {
        known.tell(cluster);
    }
    let (views, view) = watch::channel(Arc::default());
    let (registered, mut registration) = watch::channel(Registration::Trying);
    let applicant = register::Applicant {
        link: start.link.clone(),
        here: parts.here.clone(),
        folder,
        shards: parts.shards,
        replicas: start.replicas,
        held,
    };
    running.control = Control::Etcd(etcd::Control::new(start.link.clone(), view.clone()));
    running.lease = Some((start.link.clone(), registration.clone()));
    tasks.spawn(nodes::ask_around(cluster.clone(), parts.clock.clone()));
    tasks.spawn(register::stay_registered(applicant, registered));
    // A node that is not let in must not follow a table that is not its own.
    let first = timeout(ETCD_WAIT, register::first_word(&mut registration)).await;
    match first {
        Ok(word) => word?,
        Err(_) if known.is_some() && holds => {
            tracing::warn!("etcd does not answer; starting with the placement that was last known");
        }
        Err(_) => {
            tracing::info!("waiting for etcd: this node is new");
            register::first_word(&mut registration).await?;
        }
    }
    tasks.spawn(etcd::watch_all(start.link.clone(), views));
    tasks.spawn(etcd::carry_over(known.unwrap_or_default(), view.clone(), cluster.clone(), parts.data_dir.clone()));
    let controller = etcd::controller::Controller {
        link: start.link,
        cluster: cluster.clone(),
        clock: parts.clock.clone(),
        shards: parts.shards,
        bootstrap_expect: start.expect.into(),
        grace: start.grace,
        views: view,
        registration,
    };
    tasks.spawn(controller.run());
    wait_for_table(cluster).await;
    follow(cluster, &parts.clock, &parts.hand_over, tasks).await;
    Ok(())
}

/// A new cluster has no groups until enough nodes are there.
async fn wait_for_table(cluster: &Cluster) {
    let mut tables = cluster.table();
    while timeout(SAY_EVERY, tables.wait_for(|table| !table.is_empty())).await.is_err() {
        tracing::info!("waiting for the groups to be made, which takes as many nodes as --bootstrap-expect");
    }
}

/// Does this node's part of the table, and has `tasks` go on with that. Returns when it holds what it is to hold.
pub async fn follow(cluster: &Cluster, clock: &Arc<dyn Clock>, hand_over: &Arc<dyn HandOver>, tasks: &mut JoinSet<()>) {
    loop {
        let table = cluster.table().borrow().clone();
        let holds_all =
            || table.iter().all(|(id, row)| row.on(cluster.node_id()).is_none() || cluster.groups().get(*id).is_some());
        agent::follow_once(cluster, clock, &table).await;
        // What it still has and should not have can wait.
        if holds_all() {
            break;
        }
        let _ = timeout(HOST_AGAIN_AFTER, cluster.table().changed()).await;
    }
    tasks.spawn(agent::follow(cluster.clone(), clock.clone()));
    tasks.spawn(converge::converge(cluster.clone(), hand_over.clone()));
}
