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
//! Where namespaces are not permitted, everything runs on loopback, and only what is done to processes can be tried; that is
//! said once. Nothing here decides what to break (that is [`crate::fault`]), and nothing judges. Everything ends with the
//! process that holds it, however that ends ([`keeper`]).

mod etcd;
mod ground;
mod http;
mod keeper;
pub mod links;
mod machine;
mod process;
mod watch;
mod whole;
mod wire;

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use boomerang::sabotage::{self, Fault};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::history::Recorder;
use etcd::Etcd;
use ground::Ground;
use keeper::Run;
use links::Host;
use machine::{Addresses, Machine};
pub use machine::{Skew, State, View};
use process::Process;
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

/// What a cluster is made of.
#[derive(Debug, Clone)]
pub struct ClusterSettings {
    /// The folder with `boomerang` and `boomtool`.
    pub binaries: PathBuf,
    pub nodes: usize,
    pub replicas: usize,
    pub shards: u16,
    /// A node that is away for longer is replaced.
    pub node_grace: Duration,
    /// What is lost on a lossy link and how late a slow one is.
    pub seed: u64,
    /// What all nodes are broken by on purpose.
    pub sabotage: Vec<Fault>,
    /// No namespaces, even where they are permitted.
    pub loopback: bool,
    /// Where logs are kept; without it they go with the run.
    pub logs: Option<PathBuf>,
    /// Passed on to every node.
    pub flags: Vec<String>,
}

impl ClusterSettings {
    /// Five nodes, three replicas of six shards.
    pub fn new(binaries: impl Into<PathBuf>) -> Self {
        Self {
            binaries: binaries.into(),
            nodes: 5,
            replicas: 3,
            shards: 6,
            node_grace: Duration::from_secs(20),
            seed: 0,
            sabotage: Vec::new(),
            loopback: false,
            logs: None,
            flags: Vec::new(),
        }
    }
}

/// The folder of `boomerang` and `boomtool`: the one that `BIN` names, or else the one that this program, or a test, was
/// built into.
pub fn find_binaries() -> Option<PathBuf> {
    let named = std::env::var_os("BIN").map(PathBuf::from);
    let this = std::env::current_exe().unwrap_or_default();
    let beside = this.ancestors().skip(1).take(2).map(Path::to_owned);
    named
        .into_iter()
        .chain(beside)
        .find(|folder| ["boomerang", "boomtool"].iter().all(|name| folder.join(name).exists()))
}

#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error("cannot {what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("{what} was not ready within {within:?}; its log ends with: {last}")]
    NotReady { what: String, within: Duration, last: String },
    #[error("not every shard was whole within {within:?}: {left}")]
    NotWhole { within: Duration, left: String },
    #[error("boomtool {args}: {said}")]
    Tool { args: String, said: String },
    #[error("{0} is not what the harness understands; are harness and server of the same version?")]
    Strange(String),
    #[error("there is no machine {0}")]
    NoMachine(Host),
}

impl ClusterError {
    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| ClusterError::Io { what, source }
    }

    fn strange(error: serde_json::Error) -> Self {
        ClusterError::Strange(error.to_string())
    }
}

/// What `boomtool` printed.
#[derive(Debug, Clone)]
pub struct Told {
    /// `None` when it took too long.
    pub code: Option<i32>,
    /// One object for each line.
    pub lines: Vec<Value>,
    pub said: String,
}

/// A cluster; cheap to clone. Ends with the last clone, and with this process.
#[derive(Clone)]
pub struct Cluster {
    inner: Arc<Inner>,
}

/// For whoever must not keep a cluster alive.
struct Weakly(Weak<Inner>);

impl Weakly {
    fn get(&self) -> Option<Cluster> {
        self.0.upgrade().map(|inner| Cluster { inner })
    }
}

struct Inner {
    settings: ClusterSettings,
    recorder: Recorder,
    leaders: Mutex<BTreeMap<u16, Leader>>,
    next_node: AtomicU64,
    stop: CancellationToken,
    logs: PathBuf,
    // Processes go before what they stand on.
    machines: Vec<Machine>,
    etcd: Etcd,
    ground: Ground,
    run: Mutex<Run>,
}

impl Cluster {
    /// Returns when every node is ready and every shard whole.
    pub async fn start(settings: ClusterSettings, recorder: Recorder) -> Result<Self, ClusterError> {
        let run = Run::begin().map_err(ClusterError::io("begin a run"))?;
        let ground = if settings.loopback {
            Ground::Loopback("the settings say so".into())
        } else {
            Ground::lay(&run, settings.nodes, settings.seed)
        };
        match &ground {
            Ground::Loopback(why) => tracing::warn!(why, "no namespaces: only processes are broken, on loopback"),
            Ground::Namespaces(namespaces) => {
                if let Some(why) = &namespaces.no_disks {
                    tracing::warn!(why, "no disks of their own: none can be full");
                }
            }
        }
        let logs = settings.logs.clone().unwrap_or_else(|| run.folder().join("logs"));
        std::fs::create_dir_all(&logs).map_err(ClusterError::io("make the folder of logs"))?;
        let etcd =
            Etcd::new(&ground, &run, settings.nodes + 1, &logs).map_err(ClusterError::io("find room for etcd"))?;
        let machines = (1..=settings.nodes)
            .map(|host| machine(&ground, &run, host, &logs).map_err(ClusterError::io(format!("make machine {host}"))))
            .collect::<Result<Vec<_>, _>>()?;
        let next_node = AtomicU64::new(u64::try_from(settings.nodes).expect("a small number") + 1);
        let (leaders, stop, run) = (Mutex::default(), CancellationToken::new(), Mutex::new(run));
        let inner = Inner { settings, recorder, leaders, next_node, stop, logs, machines, etcd, ground, run };
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
        for host in self.places() {
            self.wait_until_ready(host, START_WITHIN).await?;
        }
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
        let ending = tokio::task::spawn_blocking(move || inner.run.lock().expect("no panic under this lock").end());
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
    pub async fn boomtool(&self, args: &[&str]) -> Result<Told, ClusterError> {
        let mut command = std::process::Command::new(self.inner.settings.binaries.join("boomtool"));
        self.adopt(&mut command);
        // Those that run first: whoever asks a paused node waits for it.
        let mut views = self.hosts();
        views.sort_by_key(|view| view.state != State::Up);
        let addresses: Vec<String> = views.into_iter().map(|view| view.addresses.tcp).collect();
        command.args(["--json", "--addr", &addresses.join(","), "--client", "admin"]).args(args);
        command.env("BOOMERANG_PASSWORD", PASSWORD);
        let said = process::run(command, TOOL_WITHIN).await.map_err(ClusterError::io("run boomtool"))?;
        Ok(Told { code: said.code, lines: whole::objects(&said.out), said: said.err })
    }

    /// The same, and it is an error when it fails.
    pub async fn ok(&self, args: &[&str]) -> Result<Told, ClusterError> {
        let told = self.boomtool(args).await?;
        match told.code {
            Some(0) => Ok(told),
            Some(_) => Err(ClusterError::Tool { args: args.join(" "), said: told.said.trim().to_owned() }),
            None => Err(ClusterError::Tool { args: args.join(" "), said: format!("took longer than {TOOL_WITHIN:?}") }),
        }
    }

    /// Lines of the nodes' logs that no fault excuses, each with the log it is in.
    pub fn panics(&self) -> Vec<String> {
        let mut found = Vec::new();
        for machine in &self.inner.machines {
            let text = std::fs::read(&machine.log).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines = text.lines().filter(|line| line.contains("panicked at"));
            found.extend(lines.map(|line| format!("machine {}: {line}", machine.host)));
        }
        found
    }

    pub async fn start_etcd(&self) -> Result<(), ClusterError> {
        let etcd = &self.inner.etcd;
        let started = self.with_run(|run| etcd.start(&self.inner.ground, run));
        started.map_err(ClusterError::io("start etcd, which scripts/setup.sh installs"))?;
        if etcd.ready(START_WITHIN).await {
            return Ok(());
        }
        let last = last_line(&self.inner.logs.join("etcd.log"));
        Err(ClusterError::NotReady { what: "etcd".into(), within: START_WITHIN, last })
    }

    pub async fn kill_etcd(&self) {
        self.inner.etcd.kill().await;
    }

    /// Starts the node of a machine, unless it runs. See [`Cluster::wait_until_ready`].
    pub async fn start_node(&self, host: Host) -> Result<(), ClusterError> {
        let machine = self.machine(host)?;
        let _busy = machine.busy.lock().await;
        if machine.view().pid.is_some() {
            return Ok(());
        }
        let binary = self.inner.settings.binaries.join("boomerang");
        let mut command = self.with_run(|run| self.inner.ground.command(run, host, &binary));
        self.serve(&mut command, machine);
        let skewed = machine.skewed();
        let started = Process::start(&mut command, &machine.log);
        let process =
            machine.occupy(started.map_err(ClusterError::io(format!("start the node of machine {host}")))?, skewed);
        let cluster = self.weak();
        // Whoever waits for it or not: it is ready from then on.
        tokio::spawn(async move {
            if process.first_line(Duration::MAX).await.is_some_and(|line| line.starts_with('{'))
                && let Some(cluster) = cluster.get()
                && let Ok(machine) = cluster.machine(host)
            {
                machine.now_ready_if(&process);
            }
        });
        Ok(())
    }

    fn serve(&self, command: &mut std::process::Command, machine: &Machine) {
        let settings = &self.inner.settings;
        let Addresses { tcp, http, peer } = &machine.addresses;
        command.args(["serve", "--node-id", &machine.node().to_string(), "--data-dir"]).arg(machine.data_dir());
        command.args(["--tcp-addr", tcp, "--http-addr", http, "--peer-addr", peer]);
        command.args(["--etcd", &self.inner.etcd.url(), "--bootstrap-expect", &settings.nodes.to_string()]);
        command.args(["--replicas", &settings.replicas.to_string(), "--shards", &settings.shards.to_string()]);
        command.args(["--node-grace", &format!("{}ms", settings.node_grace.as_millis())]);
        command.args(["--admin-password", PASSWORD, "--test-clock"]).arg(machine.clock_file());
        command.args(&settings.flags);
        if !settings.sabotage.is_empty() {
            let names: Vec<&str> = settings.sabotage.iter().map(|fault| fault.name()).collect();
            command.env(sabotage::VARIABLE, names.join(","));
        }
    }

    /// Until the node of a machine has said that it is ready.
    pub async fn wait_until_ready(&self, host: Host, within: Duration) -> Result<(), ClusterError> {
        let machine = self.machine(host)?;
        let line = match machine.process() {
            Some(process) => process.first_line(within).await,
            None => None,
        };
        if line.is_some_and(|line| line.starts_with('{')) {
            return Ok(());
        }
        let what = format!("node {}", machine.node());
        Err(ClusterError::NotReady { what, within, last: last_line(&machine.log) })
    }

    /// As if the power of the process had been cut; what it wrote stays.
    pub async fn kill_node(&self, host: Host) -> Result<(), ClusterError> {
        let machine = self.machine(host)?;
        let _busy = machine.busy.lock().await;
        if let Some(process) = machine.vacate() {
            process.kill().await;
        }
        Ok(())
    }

    /// As if the power of these machines had been cut at one moment: what was not synced is lost. Their nodes are down
    /// afterwards. Needs disks.
    pub async fn cut_power(&self, hosts: &[Host]) -> Result<(), ClusterError> {
        futures::future::try_join_all(hosts.iter().map(|host| self.kill_node(*host))).await?;
        for host in hosts {
            let machine = self.machine(*host)?;
            let _busy = machine.busy.lock().await;
            let (cluster, folder) = (self.clone(), machine.disk.with_file_name(""));
            let losing = tokio::task::spawn_blocking(move || cluster.inner.ground.lose_unsynced(&folder));
            let lost = losing.await.expect("copying a disk does not panic");
            lost.map_err(ClusterError::io(format!("cut the power of machine {host}")))?;
        }
        Ok(())
    }

    /// Asks the node to stop; its exit code, if it did so in time and by itself.
    pub async fn terminate_node(&self, host: Host, within: Duration) -> Result<Option<i32>, ClusterError> {
        let machine = self.machine(host)?;
        let _busy = machine.busy.lock().await;
        Ok(machine.terminate(within).await)
    }

    pub fn pause_node(&self, host: Host) -> Result<(), ClusterError> {
        self.machine(host).map(|machine| machine.pause(true))
    }

    pub fn continue_node(&self, host: Host) -> Result<(), ClusterError> {
        self.machine(host).map(|machine| machine.pause(false))
    }

    /// Kills the node of a machine and removes all that it knew; the next that starts there is another. Returns both
    /// numbers.
    pub async fn wipe_node(&self, host: Host) -> Result<(u64, u64), ClusterError> {
        self.kill_node(host).await?;
        let machine = self.machine(host)?;
        let _busy = machine.busy.lock().await;
        std::fs::remove_dir_all(machine.data_dir())
            .map_err(ClusterError::io(format!("wipe the disk of machine {host}")))?;
        let (old, new) = (machine.node(), self.inner.next_node.fetch_add(1, Ordering::Relaxed));
        machine.renumber(new);
        Ok((old, new))
    }

    /// Sets the clocks of a machine wrong, or right again. A node that runs follows slowly; a start takes them as they
    /// are.
    pub fn set_clock(&self, host: Host, skew: Skew) -> Result<(), ClusterError> {
        let set = self.machine(host)?.set_clock(skew);
        set.map_err(ClusterError::io(format!("set the clock of machine {host}")))
    }

    /// Whether the node of a machine began, or went on, while its clock was wrong.
    pub fn clock_touched(&self, host: Host) -> Result<bool, ClusterError> {
        self.machine(host).map(Machine::clock_touched)
    }

    /// The data folder of the node of a machine.
    pub fn data_dir(&self, host: Host) -> Result<PathBuf, ClusterError> {
        self.machine(host).map(Machine::data_dir)
    }

    /// What the data folder is on.
    pub fn disk(&self, host: Host) -> Result<&Path, ClusterError> {
        self.machine(host).map(|machine| machine.disk.as_path())
    }

    fn machine(&self, host: Host) -> Result<&Machine, ClusterError> {
        self.machines().iter().find(|machine| machine.host == host).ok_or(ClusterError::NoMachine(host))
    }

    fn machines(&self) -> &[Machine] {
        &self.inner.machines
    }

    fn known_leaders(&self) -> MutexGuard<'_, BTreeMap<u16, Leader>> {
        self.inner.leaders.lock().expect("no panic under this lock")
    }

    fn weak(&self) -> Weakly {
        Weakly(Arc::downgrade(&self.inner))
    }

    fn stopped(&self) -> &CancellationToken {
        &self.inner.stop
    }

    fn with_run<T>(&self, with: impl FnOnce(&Run) -> T) -> T {
        with(&self.inner.run.lock().expect("no panic under this lock"))
    }

    fn adopt(&self, command: &mut std::process::Command) {
        self.with_run(|run| run.adopt(command));
    }
}

fn machine(ground: &Ground, run: &Run, host: Host, logs: &Path) -> io::Result<Machine> {
    let folder = run.folder().join(format!("machine-{host}"));
    std::fs::create_dir_all(&folder)?;
    let disk = ground.disk(&folder)?;
    let (tcp, http, peer) =
        (ground.listen(host, TCP_PORT)?, ground.listen(host, HTTP_PORT)?, ground.listen(host, PEER_PORT)?);
    Machine::new(host, Addresses { tcp, http, peer }, &folder, disk, logs.join(format!("machine-{host}.log")))
}

fn last_line(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    String::from_utf8_lossy(&text).lines().next_back().unwrap_or("nothing").to_owned()
}
