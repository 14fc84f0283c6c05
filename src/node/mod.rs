//! A node: the rooms built on each other in order, and taken down in the opposite order.
//!
//! Start: data folder, store, groups, the peer listener, placement, proposer, firing, the listeners for clients; the node
//! is ready when what it hosts has leaders, here or elsewhere, and its listeners are open. Stop ([`Node::stop`]): what it
//! leads is handed over, no new requests, no new dispatches, what is out settles, the state is flushed. A process that is killed instead loses nothing, it only replays more.

pub mod assembly;
mod ours;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use openraft::ReadPolicy;
use rustix::process::{Resource, getrlimit};
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::callback::Callbacks;
use crate::callback::guard::Guard;
use crate::clock::{Clock, SystemClock};
use crate::disk::DiskGuard;
use crate::firing::hand_over::hand_over;
use crate::firing::{Firing, Ledger};
use crate::metrics::Metrics;
use crate::placement::verify::Marks;
use crate::placement::{self, Cluster, NodeInfo, NodesService, Placement, PlacementError};
use crate::propose::{Ask, DiskState, Proposer, Refused};
use crate::raft::groups::GroupError;
use crate::raft::peer_credentials::{CredentialsError, PeerCredentials};
use crate::raft::{Groups, PeerNetwork, PeerService, peer_service};
use crate::server::access::auth::{Auth, random_hex};
use crate::server::access::sessions::{Ending, Sessions};
use crate::server::guests::GuestLimits;
use crate::server::peer::Forwarding;
use crate::server::readers::Readers;
use crate::server::routing::Router;
use crate::server::tcp::TcpSettings;
use crate::server::tls::{Tls, TlsError};
use crate::server::{Service, http, tcp};
use crate::settings::Settings;
use crate::shard::{PutClient, Request};
use crate::store::folder::{DataFolder, FORMAT, FolderError, Identity};
use crate::store::writer::{Writer, WriterThreads};
use crate::store::{Store, StoreError};
use crate::task::{ClientId, GroupId};
use crate::threads::{READERS, Threads};
use assembly::{Foundation, Rooms};
use ours::OurPlaces;

/// A node that is alone leads within milliseconds, and applies what its log is ahead of its state in seconds.
const READY_WITHIN: Duration = Duration::from_secs(120);
const LEADS_LOOK_EVERY: Duration = Duration::from_millis(2);
/// How long a node of a cluster waits for groups that it does not lead.
const OTHERS_READY_WITHIN: Duration = Duration::from_secs(15);
const READY_TOLD_EVERY: Duration = Duration::from_secs(10);
const ADMIN_LOOK_EVERY: Duration = Duration::from_millis(20);
/// A node that comes to a cluster is given something to hold within a second or two, unless it is drained.
const UNWANTED_AFTER: Duration = Duration::from_secs(10);
/// Each waits a moment for what is out, so they go side by side.
const HAND_OVERS_AT_A_TIME: usize = 64;
/// How long callbacks that are out may take to come back when the node stops.
const DRAIN_WITHIN: Duration = Duration::from_secs(10);
const CLOCK_LOOK_EVERY: Duration = Duration::from_secs(1);
const SWEEP_EVERY: Duration = Duration::from_secs(30);
const ADMIN_PASSWORD_FILE: &str = "admin-password";
const ADMIN_PASSWORD_BYTES: usize = 16;

#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error(transparent)]
    Folder(#[from] FolderError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Group(#[from] GroupError),
    #[error(transparent)]
    Placement(#[from] PlacementError),
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("cannot listen on {flag} {address}: {source}")]
    Listen { flag: &'static str, address: SocketAddr, source: std::io::Error },
    #[error("cannot start threads: {0}")]
    Threads(std::io::Error),
    #[error("cannot write {path}: {source}")]
    PasswordFile { path: String, source: std::io::Error },
    #[error("the administrator cannot be stored: {0}")]
    Admin(Refused),
    #[error("group {0} has no leader after {READY_WITHIN:?}")]
    NotReady(GroupId),
    #[error("the node cannot go on: {0}")]
    Failed(String),
}

/// Printed as one line of JSON when the node is ready.
#[derive(Debug, Clone, Serialize)]
pub struct StartLine {
    pub node_id: u64,
    pub tcp: SocketAddr,
    pub http: SocketAddr,
    /// `None` on a node that is alone: it has nobody to listen to.
    pub peer: Option<SocketAddr>,
}

/// A running node.
pub struct Node {
    pub start_line: StartLine,
    groups: Groups,
    ledger: Arc<Ledger>,
    cluster: Cluster,
    placement: placement::Running,
    firing: Firing,
    writer: WriterThreads,
    digests: RunningDigests,
    urgent: Threads,
    front: Threads,
    readers: Threads,
    /// Ends the listeners.
    stop: CancellationToken,
    listeners: Vec<JoinHandle<()>>,
    helpers: JoinSet<()>,
    /// Released last.
    _folder: DataFolder,
}

/// Whatever becomes of the node, nobody computes a digest after it.
struct RunningDigests(Arc<Marks>);

impl Drop for RunningDigests {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl Node {
    pub async fn start(settings: Settings) -> Result<Self, NodeError> {
        let identity = Identity {
            format: FORMAT,
            cluster: settings.cluster.clone(),
            node_id: settings.node_id,
            shards: settings.shards,
        };
        let folder = DataFolder::open(&settings.data_dir, &identity)?;
        // Bound before anything is built, so that a port in use is said at once; accepted from when all is ready.
        let tcp_listener = listen("--tcp-addr", settings.tcp_addr).await?;
        let http_listener = listen("--http-addr", settings.http_addr).await?;
        let peer_listener = match settings.placement {
            Placement::Alone => None,
            _ => Some(listen("--peer-addr", settings.peer_addr).await?),
        };
        let start_line = StartLine {
            node_id: settings.node_id,
            tcp: bound(&tcp_listener, settings.tcp_addr),
            http: bound(&http_listener, settings.http_addr),
            peer: peer_listener.as_ref().map(|listener| bound(listener, settings.peer_addr)),
        };

        let database = folder.database();
        let cache_bytes_max = settings.store.cache_bytes_max;
        let opened = tokio::task::spawn_blocking(move || Store::open_with(&database, cache_bytes_max));
        let store = opened.await.expect("opening does not panic")?;
        let (writer, writer_threads) = Writer::start(store.clone());
        let system_clock = Arc::new(match &settings.test_clock {
            None => SystemClock::new(),
            Some(file) => {
                tracing::warn!(file = %file.display(), "a test sets the clock of this node");
                SystemClock::skewed_by(file)
            }
        });
        let clock: Arc<dyn Clock> = system_clock.clone();
        let metrics = Arc::new(Metrics::new());
        let (tls, renewal) = Tls::read(&settings.server.tls)?;
        let urgent = Threads::urgent().map_err(NodeError::Threads)?;
        let front = Threads::front().map_err(NodeError::Threads)?;
        let readers = Threads::readers().map_err(NodeError::Threads)?;
        let peers = match peer_listener {
            None => None,
            Some(listener) => {
                let credentials = PeerCredentials::read(&settings.cluster, settings.node_id, &settings.peers)?;
                Some((urgent.take_over(listener).map_err(NodeError::Threads)?, credentials))
            }
        };
        let network = match &peers {
            None => PeerNetwork::alone(&settings.cluster, settings.node_id),
            Some((_, credentials)) => {
                PeerNetwork::new(&settings.cluster, settings.node_id, Arc::new(credentials.clone()))
            }
        };
        network.run_urgent_on(urgent.handle());
        let marks = Marks::new(store.clone());
        let digests = RunningDigests(marks.clone());
        let sessions = Arc::new(Sessions::new(settings.server.session_lifetime_ms, settings.server.sessions_max));
        let ending = Ending { sessions: sessions.clone(), store: store.clone() };
        let foundation = Foundation::lay(assembly::NodeParts {
            cluster: settings.cluster.clone(),
            node_id: settings.node_id,
            shards: settings.shards,
            store: store.clone(),
            writer: writer.clone(),
            staging: folder.staging(),
            clock: clock.clone(),
            network,
            firing: settings.firing,
            metrics: metrics.clone(),
            observers: vec![marks.clone(), Arc::new(ending)],
        })
        .await?;
        let cluster = foundation.cluster.clone();
        let stop = CancellationToken::new();
        let forwarding = Forwarding::new();
        // Before placement: those who begin a group together speak to each other.
        let peers = peers.map(|(listener, credentials)| {
            let nodes = NodesService::new(cluster.clone(), clock.clone(), marks.clone());
            let others = nodes.routes().add_service(forwarding.server());
            let service = PeerService::new(foundation.groups.clone());
            urgent.handle().spawn(serve_peers(listener, service, others, credentials, stop.clone()))
        });
        let placement = placement::start(placement::PlacementParts {
            placement: settings.placement.clone(),
            shards: settings.shards,
            data_dir: settings.data_dir.clone(),
            here: here(&settings, &start_line),
            cluster: cluster.clone(),
            clock: clock.clone(),
            hand_over: foundation.hand_over(),
        })
        .await?;
        let mut guard = DiskGuard::new(
            folder.path(),
            settings.store.disk_free_min_bytes,
            settings.store.disk_reserve_bytes,
            store.clone(),
        );
        let (disk_out, disk) = watch::channel(guard.look().0);
        // Whatever this node leads fires, though other groups may be waiting for their nodes still.
        let ours = Arc::new(OurPlaces::new(&settings, &start_line, &cluster));
        let callbacks = Callbacks::new(settings.callback, Guard::new(settings.callback_allowed.clone(), ours));
        let Rooms { groups, cluster, ledger, proposer, firing, mut helpers } =
            foundation.build(disk.clone(), callbacks.clone());
        marks.propose_with(proposer.clone());
        let auth = Auth::new(store.clone(), settings.open);
        let ready = async {
            wait_until_ready(&groups, settings.placement == Placement::Alone).await?;
            ensure_admin(&settings, &auth, &cluster, &proposer).await
        };
        tokio::select! {
            ready = ready => ready?,
            why = groups.failed() => return Err(NodeError::Failed(why)),
        }
        let service = Arc::new(Service {
            store: store.clone(),
            readers: Readers::new(readers.handle().clone(), READERS),
            clock,
            proposer,
            dispatches: ledger.clone(),
            history_ms: settings.firing.history_ms,
            sessions,
            router: Router::new(cluster.clone(), settings.shards),
            auth,
            metrics: metrics.clone(),
            limits: settings.server.limits,
            frame_bytes_max: settings.server.tcp.frame_bytes_max,
            shards: settings.shards,
            cluster: cluster.clone(),
            digests: marks.clone(),
            control: placement.control(),
        });
        forwarding.begin(service.clone());
        cluster.set_begun();

        let watched = Arc::new(Watched {
            groups: groups.clone(),
            ledger: ledger.clone(),
            callbacks,
            store,
            writer: writer.clone(),
            disk,
            service: service.clone(),
            metrics: metrics.clone(),
        });
        let listeners = vec![
            front.handle().spawn(tcp::serve(
                front.take_over(tcp_listener).map_err(NodeError::Threads)?,
                service.clone(),
                within_file_limit(settings.server.tcp),
                tls.clone(),
                stop.clone(),
            )),
            tokio::spawn(http::serve(http_listener, watched, settings.open, tls, stop.clone())),
        ];
        let listeners = listeners.into_iter().chain(peers).collect();
        helpers.spawn(guard.watch(disk_out, metrics.clone()));
        if let Some(renewal) = renewal {
            helpers.spawn(renewal.run());
        }
        helpers.spawn(keep_house(service, system_clock));
        Ok(Self {
            start_line,
            groups,
            ledger,
            cluster,
            placement,
            firing,
            writer: writer_threads,
            digests,
            urgent,
            front,
            readers,
            stop,
            listeners,
            helpers,
            _folder: folder,
        })
    }

    /// Resolves when the node's storage has failed, or a part of it has panicked: nothing it says can be relied on any more.
    pub async fn failed(&self) -> NodeError {
        NodeError::Failed(self.groups.failed().await)
    }

    /// Hands over what it leads, lets what is under way end, and leaves a state that needs no replay.
    pub async fn stop(mut self) -> Result<(), NodeError> {
        self.cluster.set_stopping();
        hand_everything_over(&self.cluster, &self.ledger).await;
        self.placement.stop().await;
        self.stop.cancel();
        // Answers under way leave, and what is out comes back; both need the groups, which stop last.
        let drained = tokio::time::timeout(DRAIN_WITHIN, async {
            self.firing.drain().await;
            futures::future::join_all(&mut self.listeners).await;
        });
        if drained.await.is_err() {
            tracing::warn!("some callbacks did not come back in time; they are delivered again after the next start");
        }
        self.helpers.abort_all();
        self.groups.stop().await?;
        let (writer, digests) = (self.writer, self.digests);
        let threads = [self.front, self.readers, self.urgent];
        let ended = tokio::task::spawn_blocking(move || {
            threads.into_iter().for_each(Threads::stop);
            drop((writer, digests));
        });
        ended.await.expect("ending threads does not panic");
        Ok(())
    }
}

/// No more client connections than leave files for the store and for receivers.
fn within_file_limit(tcp: TcpSettings) -> TcpSettings {
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let left = usize::try_from(files / 2).unwrap_or(usize::MAX).saturating_sub(http::GUESTS.all).max(1);
    if tcp.connections.all > left {
        tracing::warn!(
            files,
            connections_max = left,
            "fewer client connections than set: the limit of open files is low"
        );
    }
    let GuestLimits { all, of_an_address } = tcp.connections;
    let of_an_address = if all > left { of_an_address.min(left.div_ceil(2)) } else { of_an_address };
    TcpSettings { connections: GuestLimits { all: all.min(left), of_an_address }, ..tcp }
}

async fn listen(flag: &'static str, address: SocketAddr) -> Result<TcpListener, NodeError> {
    TcpListener::bind(address).await.map_err(|source| NodeError::Listen { flag, address, source })
}

fn bound(listener: &TcpListener, wanted: SocketAddr) -> SocketAddr {
    listener.local_addr().unwrap_or(wanted)
}

async fn serve_peers(
    listener: TcpListener,
    service: PeerService,
    others: Routes,
    credentials: PeerCredentials,
    stop: CancellationToken,
) {
    if let Err(error) = peer_service::serve(listener, service, others, credentials, stop.cancelled_owned()).await {
        tracing::error!(%error, "the peer listener has ended");
    }
}

/// Every group that is held here has a leader; and where that is this node, it holds everything that was acknowledged
/// before. The state reopens at an older point and the log is applied to it while we wait: a node that answered before
/// its end would not know its own clients.
///
/// A node that is `alone` leads within moments or never; others wait for their peers, for group 0 as long as it takes.
async fn wait_until_ready(groups: &Groups, alone: bool) -> Result<(), NodeError> {
    let deadline = Instant::now() + READY_WITHIN;
    let others_until = Instant::now() + OTHERS_READY_WITHIN;
    let mut told_at = Instant::now() + READY_TOLD_EVERY;
    for id in groups.all().into_iter().map(|group| group.id) {
        // It may be released meanwhile, or come back as another replica.
        while let Some(group) = groups.get(id) {
            let leads = group.leads(Duration::ZERO).is_some();
            if leads && group.raft.ensure_linearizable(ReadPolicy::ReadIndex).await.is_ok() {
                break;
            }
            if !leads && group.has_leader() {
                break;
            }
            if alone && Instant::now() > deadline {
                return Err(NodeError::NotReady(group.id));
            }
            // One that has lost its majority must not keep this node from serving the others.
            if !alone && id != GroupId::CLUSTER && Instant::now() > others_until {
                tracing::warn!(group = %id, "has no leader; this node begins without it");
                break;
            }
            if Instant::now() > told_at {
                tracing::info!(group = %group.id, "waiting for a leader: a majority of its nodes has to be there");
                told_at = Instant::now() + READY_TOLD_EVERY;
            }
            tokio::time::sleep(LEADS_LOOK_EVERY).await;
        }
    }
    Ok(())
}

/// This node as others reach it.
fn here(settings: &Settings, bound: &StartLine) -> NodeInfo {
    let at = |address: SocketAddr| match &settings.advertise_host {
        Some(host) if host.contains(':') => format!("[{host}]:{}", address.port()),
        Some(host) => format!("{host}:{}", address.port()),
        None => address.to_string(),
    };
    NodeInfo {
        node_id: settings.node_id,
        peer: bound.peer.map(at).unwrap_or_default(),
        tcp: at(bound.tcp),
        http: at(bound.http),
        zone: settings.zone.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// Makes the administrator when the cluster has none. A password that is given later does not replace the first one.
/// Whoever leads the cluster's own group does it; the others wait until they know of it.
async fn ensure_admin(
    settings: &Settings,
    auth: &Auth,
    cluster: &Cluster,
    proposer: &Proposer,
) -> Result<(), NodeError> {
    let unwanted_after = Instant::now() + UNWANTED_AFTER;
    while !settings.open && !auth.knows_admin()? {
        let group = cluster.groups().get(GroupId::CLUSTER);
        let unwanted = || cluster.table().borrow().values().all(|row| row.on(cluster.node_id()).is_none());
        if group.is_none() && Instant::now() > unwanted_after && unwanted() {
            tracing::warn!("this node is drained: it holds nothing, and lets nobody in");
            return Ok(());
        }
        if group.is_none_or(|group| group.leads(Duration::ZERO).is_none()) {
            tokio::time::sleep(ADMIN_LOOK_EVERY).await;
            continue;
        }
        match make_admin(settings, auth, proposer).await {
            // Somebody else leads now, and does it.
            Err(NodeError::Admin(Refused::NotLeader { .. })) => {}
            made => made?,
        }
    }
    Ok(())
}

async fn make_admin(settings: &Settings, auth: &Auth, proposer: &Proposer) -> Result<(), NodeError> {
    let password = match &settings.server.admin_password {
        Some(password) => password.clone(),
        None => {
            let password = random_hex(ADMIN_PASSWORD_BYTES);
            let path = settings.data_dir.join(ADMIN_PASSWORD_FILE);
            write_private(&path, &password)
                .map_err(|source| NodeError::PasswordFile { path: path.display().to_string(), source })?;
            tracing::info!(path = %path.display(), "made a password for the client 'admin'");
            password
        }
    };
    let password_hash = auth.hash(password).await.expect("neither empty nor too long");
    let client = ClientId::ADMIN.parse().expect("a valid name");
    let put = PutClient {
        client,
        password_hash,
        admin: true,
        policy: None,
        limits: Default::default(),
        only_if_absent: true,
    };
    let stored = proposer.ask(GroupId::CLUSTER, Ask::Plain(Request::PutClient(put))).await;
    stored.map(|_| ()).map_err(NodeError::Admin)
}

/// Others lead from now on what this node leads, as far as there are others.
async fn hand_everything_over(cluster: &Cluster, ledger: &Arc<Ledger>) {
    // Twice: another node that stops at the same time may have handed something to this one.
    for _ in 0..2 {
        let unfit = &cluster.unfit();
        let led = cluster.groups().all().into_iter();
        let led = led.filter(|group| group.leads(Duration::ZERO).is_some() && group.has_other_voters());
        let handed = futures::stream::iter(led).for_each_concurrent(HAND_OVERS_AT_A_TIME, |group| async move {
            if let Err(error) = hand_over(ledger, &group, None, unfit).await {
                tracing::warn!(%error, "a group is left without a leader for a moment");
            }
        });
        handed.await;
    }
}

fn write_private(path: &std::path::Path, text: &str) -> std::io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(path)?;
    writeln!(file, "{text}")?;
    file.sync_all()
}

/// What grows without anybody asking for it is cut back here.
async fn keep_house(service: Arc<Service>, clock: Arc<SystemClock>) {
    let mut clock_looks = tokio::time::interval(CLOCK_LOOK_EVERY);
    clock_looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut sweeps = tokio::time::interval(SWEEP_EVERY);
    let mut stepped = false;
    loop {
        tokio::select! {
            _ = clock_looks.tick() => {
                let ahead_us = clock.look();
                service.metrics.clock_offset_us.set(ahead_us);
                if (ahead_us != 0) != stepped {
                    stepped = ahead_us != 0;
                    tracing::warn!(ahead_us, "the wall clock was stepped, or agrees again; time is slewed towards it");
                }
            }
            _ = sweeps.tick() => service.sessions.sweep(service.clock.now_ms()),
        }
    }
}

/// The node as its HTTP listener shows it.
struct Watched {
    groups: Groups,
    ledger: Arc<Ledger>,
    callbacks: Callbacks,
    store: Store,
    writer: Writer,
    disk: watch::Receiver<DiskState>,
    service: Arc<Service>,
    metrics: Arc<Metrics>,
}

fn shown(number: impl TryInto<i64>) -> i64 {
    number.try_into().unwrap_or(i64::MAX)
}

impl http::Watched for Watched {
    fn not_ready(&self) -> Option<String> {
        if let DiskState::Low(why) | DiskState::Full(why) = &*self.disk.borrow() {
            return Some(why.clone());
        }
        // A follower is ready too: it sends on what it does not lead.
        let leaderless = self.groups.all().into_iter().find(|group| !group.has_leader())?;
        Some(format!("group {} has no leader", leaderless.id))
    }

    fn router(&self) -> &Router {
        &self.service.router
    }

    fn metrics(&self) -> String {
        let metrics = &self.metrics;
        let counts = self.ledger.counts();
        metrics.pending.set(shown(counts.pending));
        metrics.dead_letters.set(shown(counts.dead_letters));
        metrics.wheel_timers.set(shown(counts.timers));
        metrics.wheel_bytes.set(shown(counts.wheel_bytes));
        metrics.in_flight.set(shown(counts.in_flight));
        metrics.waiting.set(shown(counts.waiting));
        metrics.missed.set(shown(counts.missed));
        let destinations = self.callbacks.counts();
        metrics.destinations_down.set(shown(destinations.breakers_open));
        metrics.groups_led.set(shown(counts.led));
        metrics.groups_suspended.set(shown(counts.suspended));
        metrics.sessions.set(shown(self.service.sessions.count()));
        let (syncs, appends) = self.writer.counts();
        metrics.log_syncs.set(shown(syncs));
        metrics.log_appends.set(shown(appends));
        metrics.cache_bytes.set(shown(self.store.cache_bytes()));
        metrics.peer_messages.set(shown(self.service.cluster.network().messages()));
        metrics.lease_age_ms.set(shown(self.groups.lease_age().as_millis()));
        metrics.memtable_bytes.set(shown(self.store.memtable_bytes()));
        metrics.text()
    }
}
