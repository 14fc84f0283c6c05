//! Nodes and etcd as processes, each in a network of its own.
//!
//! ```text
//!   machine 1 .. N   a namespace, a disk, a clock, and one node      etcd   a namespace
//!            \                                                       /
//!             '---------------------- wire -------------------------'
//!                                       |
//!                       this process: clients and receivers
//! ```
//!
//! Where namespaces are not permitted, everything runs on loopback, and what is done to networks and disks is left out; that is
//! said once. Nothing here decides what to break (that is [`crate::fault`]), and nothing judges. Everything ends with the
//! process that holds it, however that ends ([`keeper`]).

mod etcd;
mod ground;
mod keeper;
pub mod links;
mod machine;
mod nodes;
mod settings;
mod watch;
mod whole;
mod wire;

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, MutexGuard, Weak};
use std::time::Duration;

use boomerang_task::locks::Mutex;
use boomerang_testkit::{Certs, run};
use futures::future::try_join_all;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::history::Recorder;
use etcd::Etcd;
use ground::{Ground, Loopback};
use keeper::Run;
use links::Host;
use machine::{Addresses, Machine};
pub use machine::{Skew, State, View};
pub use settings::{ClusterError, ClusterSettings, find_binaries};
pub use watch::Leader;
pub use whole::{Group, Replica};
pub use wire::Wire;

const PASSWORD: &str = "boomerang-jepsen";
const TCP_PORT: u16 = 9973;
const HTTP_PORT: u16 = 9974;
const PEER_PORT: u16 = 9975;
/// A new cluster makes its groups before its nodes are ready.
const START_WITHIN: Duration = Duration::from_secs(90);
/// What `boomtool` does at once is done by then, or never.
const TOOL_WITHIN: Duration = Duration::from_secs(60);

/// What `boomtool` printed.
#[derive(Debug, Clone)]
pub struct Reported {
    /// `None` when it took too long.
    pub code: Option<i32>,
    /// One object for each line.
    pub lines: Vec<Value>,
    pub said: String,
}

/// A cluster; cheap to clone. Ends with the last clone, and with this process.
#[derive(Clone)]
pub struct Cluster {
    inner: Arc<ClusterInner>,
}

/// For whoever must not keep a cluster alive.
struct Weakly(Weak<ClusterInner>);

impl Weakly {
    fn get(&self) -> Option<Cluster> {
        self.0.upgrade().map(|inner| Cluster { inner })
    }
}

struct ClusterInner {
    settings: ClusterSettings,
    recorder: Recorder,
    leaders: Mutex<BTreeMap<u16, Leader>>,
    next_node: AtomicU64,
    stop: CancellationToken,
    logs: PathBuf,
    certs: Certs,
    // Processes go before what they stand on, also those that only the run knows of.
    machines: Vec<Machine>,
    etcd: Etcd,
    run: Mutex<Run>,
    ground: Ground,
}

impl Cluster {
    /// Returns when every node is ready and every shard whole.
    pub async fn start(settings: ClusterSettings, recorder: Recorder) -> Result<Self, ClusterError> {
        let run = Run::begin().map_err(ClusterError::io("begin a run"))?;
        let ground = if settings.loopback {
            Ground::loopback("the settings say so")
        } else {
            Ground::lay(&run, settings.nodes, settings.seed)
        };
        match &ground {
            Ground::Loopback(Loopback { why, .. }) => {
                tracing::warn!(why, "no namespaces: everything is on loopback, and no network and no disk is broken")
            }
            Ground::Namespaces(namespaces) => {
                if let Some(why) = &namespaces.no_disks {
                    tracing::warn!(why, "no disks of their own: none is full, and no power is cut");
                }
            }
        }
        let logs = settings.logs.clone().unwrap_or_else(|| run.folder().join("logs"));
        std::fs::create_dir_all(&logs).map_err(ClusterError::io(format!("make the folder {}", logs.display())))?;
        let etcd =
            Etcd::new(&ground, &run, settings.nodes + 1, &logs).map_err(ClusterError::io("find room for etcd"))?;
        let machines = (1..=settings.nodes)
            .map(|host| machine(&ground, &run, host, &logs).map_err(ClusterError::io(format!("make machine {host}"))))
            .collect::<Result<Vec<_>, _>>()?;
        let certs = certificates(&settings, &run, &machines).map_err(ClusterError::io("make certificates"))?;
        let next_node = AtomicU64::new(u64::try_from(settings.nodes).expect("a small number") + 1);
        let (leaders, stop, run) = (Mutex::default(), CancellationToken::new(), Mutex::new(run));
        let inner =
            ClusterInner { settings, recorder, leaders, next_node, stop, logs, certs, machines, etcd, ground, run };
        let cluster = Self { inner: Arc::new(inner) };
        cluster.start_all().await?;
        tokio::spawn(watch::watch(cluster.stopped().clone(), cluster.weak()));
        Ok(cluster)
    }

    async fn start_all(&self) -> Result<(), ClusterError> {
        self.start_etcd().await?;
        // All before the first is waited for: none of them is ready alone.
        for host in self.places() {
            self.start_node(host).await?;
        }
        // All at once: the first waits for the others, and it is one of them that may have ended.
        try_join_all(self.places().map(|host| self.wait_until_ready(host, START_WITHIN))).await?;
        self.wait_until_whole(START_WITHIN).await
    }

    /// Ends everything, and removes it. What clones are left are of no use any more.
    pub async fn stop(self) {
        self.inner.stop.cancel();
        for machine in &self.inner.machines {
            if let Some(process) = machine.vacate() {
                process.kill().await;
            }
        }
        self.inner.etcd.kill().await;
        let inner = self.inner.clone();
        let ending = tokio::task::spawn_blocking(move || inner.run.lock().end());
        ending.await.expect("waiting for the keeper does not panic");
    }

    /// Where clients connect: every node.
    pub fn addresses(&self) -> Vec<String> {
        self.inner.machines.iter().map(|machine| machine.addresses.tcp.clone()).collect()
    }

    /// Where receivers listen so that nodes reach them.
    pub fn receiver_host(&self) -> IpAddr {
        self.inner.ground.receiver_host()
    }

    /// Of the client `admin`.
    pub fn password(&self) -> &'static str {
        PASSWORD
    }

    pub fn settings(&self) -> &ClusterSettings {
        &self.inner.settings
    }

    pub fn recorder(&self) -> &Recorder {
        &self.inner.recorder
    }

    /// Where nodes and etcd write their logs.
    pub fn logs(&self) -> &Path {
        &self.inner.logs
    }

    /// Whether machines have networks of their own, which can be cut.
    pub fn has_network(&self) -> bool {
        self.inner.ground.wire().is_some()
    }

    /// Whether machines have disks of their own, which can be full.
    pub fn has_disks(&self) -> bool {
        self.inner.ground.has_disks()
    }

    /// The network between the machines, where there is one.
    pub fn wire(&self) -> Option<&Wire> {
        self.inner.ground.wire()
    }

    /// The machines of nodes, by place.
    pub fn places(&self) -> std::ops::RangeInclusive<Host> {
        1..=self.inner.settings.nodes
    }

    /// Every machine as it is now.
    pub fn hosts(&self) -> Vec<View> {
        self.inner.machines.iter().map(Machine::view).collect()
    }

    /// A machine as it is now.
    pub fn host(&self, host: Host) -> Result<View, ClusterError> {
        self.machine(host).map(Machine::view)
    }

    /// The machine on which a node runs now.
    pub fn node(&self, node: u64) -> Option<View> {
        self.hosts().into_iter().find(|view| view.node == node)
    }

    /// Who leads each group, by the latest news; the cluster's own group is 0.
    pub fn leaders(&self) -> BTreeMap<u16, Leader> {
        self.known_leaders().clone()
    }

    /// `boomtool` with these arguments, as administrator.
    pub async fn boomtool(&self, args: &[&str]) -> Result<Reported, ClusterError> {
        let mut command = std::process::Command::new(self.inner.settings.binaries.join("boomtool"));
        self.adopt(&mut command);
        // Those that run first: whoever asks a paused node waits for it.
        let mut views = self.hosts();
        views.sort_by_key(|view| view.state != State::Up);
        let addresses: Vec<String> = views.into_iter().map(|view| view.addresses.tcp).collect();
        command.args(["--json", "--addr", &addresses.join(","), "--client", "admin"]).args(args);
        command.env("BOOMERANG_PASSWORD", PASSWORD);
        let said = run(&mut command, TOOL_WITHIN).await.map_err(ClusterError::io("run boomtool"))?;
        Ok(Reported { code: said.code, lines: whole::objects(&said.stdout), said: said.stderr })
    }

    /// The same, and it is an error when it fails.
    pub async fn ok(&self, args: &[&str]) -> Result<Reported, ClusterError> {
        let told = self.boomtool(args).await?;
        match told.code {
            Some(0) => Ok(told),
            Some(_) => Err(ClusterError::Tool { args: args.join(" "), said: told.said.trim().to_owned() }),
            None => Err(ClusterError::Tool { args: args.join(" "), said: format!("took longer than {TOOL_WITHIN:?}") }),
        }
    }

    /// Whatever panicked in a node, as the logs tell: no fault excuses it.
    pub fn panics(&self) -> Vec<String> {
        self.machines().iter().flat_map(Machine::panics).collect()
    }

    /// What no fault excuses in a node: that something panicked, or that it ended by itself, other than by a storage error
    /// while its disk was full. Each with the node, and what its log ends with. To be asked before [`Cluster::stop`],
    /// which may remove the logs.
    pub fn own_ends(&self) -> Vec<String> {
        self.panics().into_iter().chain(self.machines().iter().flat_map(Machine::own_ends)).collect()
    }

    pub async fn start_etcd(&self) -> Result<(), ClusterError> {
        let etcd = &self.inner.etcd;
        let started = self.with_run(|run| etcd.start(&self.inner.ground, run));
        let process = started.map_err(ClusterError::io("start etcd, which scripts/setup.sh installs"))?;
        Ok(etcd.place.ready(&process, START_WITHIN).await?)
    }

    pub async fn kill_etcd(&self) {
        self.inner.etcd.kill().await;
    }

    fn machine(&self, host: Host) -> Result<&Machine, ClusterError> {
        self.machines().iter().find(|machine| machine.host == host).ok_or(ClusterError::NoMachine(host))
    }

    fn machines(&self) -> &[Machine] {
        &self.inner.machines
    }

    fn known_leaders(&self) -> MutexGuard<'_, BTreeMap<u16, Leader>> {
        self.inner.leaders.lock()
    }

    fn weak(&self) -> Weakly {
        Weakly(Arc::downgrade(&self.inner))
    }

    fn stopped(&self) -> &CancellationToken {
        &self.inner.stop
    }

    fn with_run<T>(&self, with: impl FnOnce(&Run) -> T) -> T {
        with(&self.inner.run.lock())
    }

    fn adopt(&self, command: &mut std::process::Command) {
        self.with_run(|run| run.adopt(command));
    }
}

fn machine(ground: &Ground, run: &Run, host: Host, logs: &Path) -> io::Result<Machine> {
    let folder = run.folder().join(machine_name(host));
    std::fs::create_dir_all(&folder)?;
    let disk = ground.disk(&folder)?;
    let (tcp, http, peer) =
        (ground.listen(host, TCP_PORT)?, ground.listen(host, HTTP_PORT)?, ground.listen(host, PEER_PORT)?);
    let log = empty_log(logs, &format!("{}.log", machine_name(host)))?;
    Machine::new(host, Addresses { tcp, http, peer }, &folder, disk, log)
}

fn machine_name(host: Host) -> String {
    format!("machine-{host}")
}

/// By which the nodes know each other, whatever numbers they have.
fn certificates(settings: &ClusterSettings, run: &Run, machines: &[Machine]) -> io::Result<Certs> {
    let hosts = machines.iter().map(|machine| {
        let peer = &machine.addresses.peer;
        (machine_name(machine.host), peer.rsplit_once(':').map_or(peer.as_str(), |(host, _)| host))
    });
    Certs::make(&settings.binaries.join("boomerang"), &run.folder().join("certs"), hosts)
}

/// A log without what an earlier run has left in the same folder: its panics would be told again.
fn empty_log(logs: &Path, name: &str) -> io::Result<PathBuf> {
    let log = logs.join(name);
    std::fs::File::create(&log)?;
    Ok(log)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_panicked_in_an_earlier_run_is_not_told_again() {
        let run = Run::begin().unwrap();
        let logs = run.folder().join("logs");
        std::fs::create_dir(&logs).unwrap();
        std::fs::write(logs.join("machine-1.log"), "thread 'a' panicked at b.rs:1:2:\ntoo bad\n").unwrap();
        let machine = machine(&Ground::loopback("a test"), &run, 1, &logs).unwrap();
        assert_eq!(machine.panics(), Vec::<String>::new());
    }
}
