//! Nodes that are real processes on this machine, for as long as a bench runs: a cluster, or one that is alone.
//!
//! The nodes of a cluster have a fixed list of peers. Ports stay theirs over restarts, and folders go with the bench. Each
//! process ends by its own handle: whoever panics, or is interrupted, leaves none behind.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::super::ToolError;
use super::super::args::Global;
use super::super::output::note;
use super::args::{OwnArgs, ServerArgs};
use super::cost::{self, Reading, processor_ms};
use super::progress;
use boomerang_client::{Credentials, Options};
use boomerang_task::{ClientId, Invalid};
use boomerang_testkit::{Certs, OwnAddress, Process, all_started, page};

/// Whoever can read the folder can read this as well.
const PASSWORD: &str = "bench";
const SHARDS_DEFAULT: u16 = 16;
/// What would make a node a part of something else than this bench.
const VARIABLES_NOT_FOR_NODES: [&str; 3] = ["BOOMERANG_CONFIG", "BOOMERANG_ETCD", "BOOMERANG_PEERS"];
/// What takes longer on a busy machine will never be ready.
const READY_WITHIN: Duration = Duration::from_secs(120);
/// Leaders go one by one to the nodes they belong to, once those have been well for five seconds.
const SETTLED_WITHIN: Duration = Duration::from_secs(60);
/// Where nothing has moved for so long, nothing will.
const SETTLED_FOR: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A node that is busy may be slow to show itself.
const PAGE_WITHIN: Duration = Duration::from_secs(10);

/// The nodes that a load goes to.
pub(super) enum Nodes {
    /// They end with the bench.
    Own(Box<LocalCluster>),
    /// Somebody else's, and how they are reached.
    Others(Box<Options>),
}

impl Nodes {
    /// Those that the flags say; its own have been started, and are ready for a load.
    pub async fn of(own: OwnArgs, global: &Global, quiet: bool) -> Result<Self, ToolError> {
        let OwnArgs { nodes, server } = own;
        if let Some(nodes) = nodes {
            return Ok(Self::Own(Box::new(LocalCluster::start(nodes, server, global.timeout, quiet).await?)));
        }
        let ServerArgs { shards, boomerang, node_flags, node_nice } = server;
        let given = [
            ("shards", shards.is_some()),
            ("boomerang", boomerang.is_some()),
            ("node-flag", !node_flags.is_empty()),
            ("node-nice", node_nice.is_some()),
        ];
        if let Some((flag, _)) = given.iter().find(|(_, given)| *given) {
            let text = format!("--{flag}: is for nodes that the bench starts; say with --nodes how many");
            return Err(Invalid::new(text).into());
        }
        Ok(Self::Others(Box::new(global.options()?)))
    }

    pub fn options(&self) -> Options {
        match self {
            Self::Own(cluster) => cluster.options(),
            Self::Others(options) => (**options).clone(),
        }
    }

    pub fn are_own(&self) -> bool {
        matches!(self, Self::Own(_))
    }

    /// Their part of the configuration, as far as it is known.
    pub fn configuration(&self) -> Map<String, Value> {
        match self {
            Self::Own(cluster) => cluster.configuration(),
            Self::Others(_) => Map::new(),
        }
    }

    /// What they have used and done by now; nothing, of somebody else's.
    pub async fn reading(&self) -> Result<Option<Reading>, ToolError> {
        match self {
            Self::Own(cluster) => cluster.reading().await.map(Some),
            Self::Others(_) => Ok(None),
        }
    }

    /// What a phase cost that began with a reading and ends now, for so many tasks. Empty where nothing was read.
    pub async fn cost_since(&self, before: Option<Reading>, tasks: u64) -> Result<Map<String, Value>, ToolError> {
        let now = self.reading().await?;
        Ok(before.zip(now).map(|(before, now)| now.since(&before, tasks)).unwrap_or_default())
    }
}

/// Who leads a group, and since which term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lead {
    pub term: u64,
    pub node: u64,
}

/// By shard; `None` is the cluster's own group. A group without a leader is not there.
pub(super) type Leaders = BTreeMap<Option<u16>, Lead>;

/// What `/v1/shards` answers, as far as it matters here.
#[derive(Deserialize)]
struct ShownMap {
    shards: Vec<ShownLeader>,
    cluster: ShownLeader,
}

#[derive(Deserialize)]
struct ShownLeader {
    shard: Option<u16>,
    node: Option<u64>,
    term: Option<u64>,
}

pub(super) struct LocalCluster {
    server: ServerArgs,
    binary: PathBuf,
    folder: PathBuf,
    nodes: Vec<LocalNode>,
    /// By which they know each other; a node that is alone has none.
    certs: Option<Certs>,
    request_timeout: Duration,
}

struct LocalNode {
    tcp: OwnAddress,
    http: OwnAddress,
    peer: OwnAddress,
    process: Option<Process>,
}

impl LocalCluster {
    /// Returns when every node is ready and leads its share of the shards.
    pub async fn start(
        nodes: u16,
        server: ServerArgs,
        request_timeout: Duration,
        quiet: bool,
    ) -> Result<Self, ToolError> {
        if progress::wanted(quiet) {
            note(&format!("starting {nodes} {}", if nodes == 1 { "node" } else { "nodes" }));
        }
        let binary = server.boomerang.clone().map_or_else(beside_us, Ok)?;
        let folder = std::env::temp_dir().join(format!("boomerang-bench-{:016x}", rand::random::<u64>()));
        std::fs::create_dir_all(&folder).map_err(|error| failed("make a folder for", &folder, &error))?;
        let mut cluster = Self { server, binary, folder, nodes: Vec::new(), certs: None, request_timeout };
        for _ in 0..nodes {
            let own = || OwnAddress::take().map_err(|error| failed("find a free port for", &cluster.folder, &error));
            let node = LocalNode { tcp: own()?, http: own()?, peer: own()?, process: None };
            cluster.nodes.push(node);
        }
        if nodes > 1 {
            let names = (1..=cluster.nodes.len()).map(|number| (name(number), "127.0.0.1"));
            let certs = Certs::make(&cluster.binary, &cluster.folder.join("certs"), names);
            cluster.certs = Some(certs.map_err(|error| ToolError::Undone(error.to_string()))?);
        }
        // All before the first is waited for: none of them is ready alone.
        for node in 0..cluster.nodes.len() {
            cluster.spawn(node)?;
        }
        cluster.ready(cluster.processes()).await?;
        cluster.settle().await?;
        Ok(cluster)
    }

    /// Waits until each node leads its share: a load that begins earlier is measured while leaders move.
    async fn settle(&self) -> Result<(), ToolError> {
        let deadline = Instant::now() + SETTLED_WITHIN;
        let (mut last, mut since) = (self.leaders().await?, Instant::now());
        loop {
            if is_even(&last, self.shards(), self.nodes.len())
                && (self.nodes.len() == 1 || since.elapsed() > SETTLED_FOR)
            {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(ToolError::Undone(format!("not each node leads its share within {SETTLED_WITHIN:?}")));
            }
            tokio::time::sleep(LOOK_EVERY).await;
            let seen = self.leaders().await?;
            if seen != last {
                (last, since) = (seen, Instant::now());
            }
        }
    }

    pub fn addresses(&self) -> Vec<String> {
        self.nodes.iter().map(|node| node.tcp.to_string()).collect()
    }

    /// How they are reached, as the administrator.
    pub fn options(&self) -> Options {
        let client_id = ClientId::ADMIN.parse().expect("a valid name");
        let credentials = Credentials::Password { client_id, password: PASSWORD.to_owned() };
        Options { request_timeout: self.request_timeout, ..Options::new(self.addresses(), credentials) }
    }

    fn shards(&self) -> u16 {
        self.server.shards.unwrap_or(SHARDS_DEFAULT)
    }

    pub fn configuration(&self) -> Map<String, Value> {
        let flags = (!self.server.node_flags.is_empty()).then(|| self.server.node_flags.join(" "));
        let nice = self.server.node_nice.map(|nice| ("node_nice", json!(nice)));
        let own = [("nodes", json!(self.nodes.len())), ("shards", json!(self.shards()))];
        own.into_iter()
            .chain(flags.map(|flags| ("node_flags", json!(flags))))
            .chain(nice)
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    }

    /// What all nodes have used and done by now.
    pub async fn reading(&self) -> Result<Reading, ToolError> {
        let mut reading = Reading { leaders: self.leaders().await?, ..Default::default() };
        for page in self.pages("/metrics").await? {
            reading.add_metrics(&page);
        }
        reading.node_cpu_ms = self.processes().map(|process| processor_ms(process.pid())).sum();
        reading.tool_cpu_ms = processor_ms(std::process::id());
        Ok(reading)
    }

    /// Who leads what, by what all of them know: the latest term counts.
    pub async fn leaders(&self) -> Result<Leaders, ToolError> {
        let mut leaders = Leaders::new();
        for page in self.pages("/v1/shards").await? {
            let ShownMap { shards, cluster } = serde_json::from_str(&page)
                .map_err(|error| ToolError::Undone(format!("a node's list of leaders makes no sense: {error}")))?;
            for shown in shards.into_iter().chain([cluster]) {
                let (Some(node), Some(term)) = (shown.node, shown.term) else { continue };
                let lead = leaders.entry(shown.shard).or_insert(Lead { term, node });
                if term > lead.term {
                    *lead = Lead { term, node };
                }
            }
        }
        Ok(leaders)
    }

    /// One metric of each node that has it.
    pub async fn metric(&self, name: &str) -> Result<Vec<u64>, ToolError> {
        Ok(self.pages("/metrics").await?.iter().filter_map(|page| cost::metric(page, name)).collect())
    }

    /// The process of each node that was started.
    fn processes(&self) -> impl Iterator<Item = &Process> {
        self.nodes.iter().filter_map(|node| node.process.as_ref())
    }

    /// The largest resident memory that each node ever had, by its number.
    pub fn memory_peaks(&self) -> Vec<(usize, u64)> {
        (1..).zip(self.processes().map(|process| cost::memory_peak_bytes(process.pid()))).collect()
    }

    /// The numbers of those that run no more.
    pub fn ended(&self) -> Vec<usize> {
        let nodes = (1..).zip(&self.nodes);
        let ended = |node: &LocalNode| node.process.as_ref().is_some_and(|process| process.ended().is_some());
        nodes.filter_map(|(number, node)| ended(node).then_some(number)).collect()
    }

    /// How often all nodes together have written each warning and error, without its numbers.
    pub fn warnings(&self) -> BTreeMap<String, u64> {
        let mut warnings = BTreeMap::new();
        for number in 1..=self.nodes.len() {
            let log = std::fs::read_to_string(self.log_of(number)).unwrap_or_default();
            for text in log.lines().filter_map(warning) {
                *warnings.entry(text).or_insert(0) += 1;
            }
        }
        warnings
    }

    fn log_of(&self, number: usize) -> PathBuf {
        self.folder.join(format!("node-{number}.log"))
    }

    /// One page of each node.
    async fn pages(&self, path: &str) -> Result<Vec<String>, ToolError> {
        let shown = async |node: usize| {
            let address = self.nodes[node].http.to_string();
            let shown = tokio::time::timeout(PAGE_WITHIN, page(&address, path)).await;
            let shown = shown.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            shown.map_err(|error| ToolError::Undone(format!("node {} does not show its {path}: {error}", node + 1)))
        };
        try_join_all((0..self.nodes.len()).map(shown)).await
    }

    /// As if its power had been cut.
    pub fn kill(&mut self, node: usize) {
        self.nodes[node].process = None;
    }

    /// After [`LocalCluster::kill`], on the same folder and ports. Returns when it is ready.
    pub async fn restart(&mut self, node: usize) -> Result<(), ToolError> {
        self.spawn(node)?;
        self.ready(self.nodes[node].process.as_ref()).await
    }

    fn spawn(&mut self, node: usize) -> Result<(), ToolError> {
        let number = node + 1;
        let folder = self.folder.join(format!("node-{number}"));
        let peers: Vec<String> =
            self.nodes.iter().enumerate().map(|(at, node)| format!("{}={}", at + 1, node.peer)).collect();
        let LocalNode { tcp, http, peer, .. } = &self.nodes[node];
        let mut command = match self.server.node_nice.filter(|nice| *nice > 0) {
            None => Command::new(&self.binary),
            // It becomes the server, with the same process id.
            Some(nice) => {
                let mut command = Command::new("nice");
                command.args(["-n", &nice.to_string()]).arg(&self.binary);
                command
            }
        };
        for name in VARIABLES_NOT_FOR_NODES {
            command.env_remove(name);
        }
        command.arg("serve").arg("--node-id").arg(number.to_string()).arg("--data-dir").arg(&folder);
        command.args(["--tcp-addr", &tcp.to_string(), "--http-addr", &http.to_string()]);
        command.args(["--peer-addr", &peer.to_string()]);
        if peers.len() > 1 {
            command.args(["--peers", &peers.join(",")]);
        }
        if let Some(certs) = &self.certs {
            command.args(certs.flags(&name(number)));
        }
        command.args(["--shards", &self.shards().to_string(), "--admin-password", PASSWORD]);
        // Where the receiver of a bench is.
        command.args(["--callback-allow", "127.0.0.0/8"]);
        command.args(&self.server.node_flags);
        let process = Process::start(format!("node {number}"), &mut command, &self.log_of(number));
        self.nodes[node].process = Some(process.map_err(|error| ToolError::Undone(error.to_string()))?);
        Ok(())
    }

    async fn ready(&self, nodes: impl IntoIterator<Item = &Process>) -> Result<(), ToolError> {
        let ready = all_started(nodes, READY_WITHIN).await;
        ready.map(drop).map_err(|error| ToolError::Undone(error.to_string()))
    }
}

impl Drop for LocalCluster {
    fn drop(&mut self) {
        self.nodes.clear();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn name(number: usize) -> String {
    format!("node-{number}")
}

/// The text of a line of a log that is a warning or an error, up to its first field.
fn warning(line: &str) -> Option<String> {
    let mut words = line.split_whitespace().skip_while(|word| !word.starts_with("20"));
    words.next()?;
    words.next().filter(|level| ["WARN", "ERROR"].contains(level))?;
    Some(words.take_while(|word| !word.contains('=')).collect::<Vec<_>>().join(" "))
}

/// Whether every shard is led, and by nodes that lead as many as the others, or one less.
fn is_even(leaders: &Leaders, shards: u16, nodes: usize) -> bool {
    let led = leaders.iter().filter_map(|(shard, lead)| shard.map(|_| lead.node));
    let mut share = BTreeMap::new();
    led.for_each(|node| *share.entry(node).or_insert(0usize) += 1);
    let least = usize::from(shards) / nodes;
    leaders.len() == usize::from(shards) + 1
        && share.values().all(|share| (least..=least + 1).contains(share))
        && (share.len() == nodes || least == 0)
}

/// The server is where the tool is.
fn beside_us() -> Result<PathBuf, ToolError> {
    let path = std::env::current_exe().ok().map(|tool| tool.with_file_name("boomerang"));
    path.filter(|path| path.is_file()).ok_or_else(|| {
        ToolError::Undone("there is no 'boomerang' beside this program; name it with --boomerang".into())
    })
}

fn failed(verb: &str, path: &Path, error: &io::Error) -> ToolError {
    ToolError::Undone(format!("cannot {verb} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaders(nodes: &[u64]) -> Leaders {
        let shards = (0..).map(Some).zip(nodes);
        [(None, &1)].into_iter().chain(shards).map(|(shard, node)| (shard, Lead { term: 1, node: *node })).collect()
    }

    #[test]
    fn a_warning_is_known_by_its_text() {
        let line = "2026-11-29T17:00:00.000000Z  WARN boomerang::firing: the lease is not valid group=3 term=7";
        assert_eq!(warning(line).unwrap(), "boomerang::firing: the lease is not valid");
        assert_eq!(warning("2026-11-29T17:00:00.000000Z  INFO boomerang: ready"), None);
        assert_eq!(warning(""), None);
    }

    #[test]
    fn leaders_are_where_they_belong_when_no_node_leads_two_more() {
        for (nodes, of, even) in [
            (&[1, 2, 3, 1][..], 3, true),
            (&[1, 2, 3, 1, 1], 3, false),
            (&[1, 2, 2, 1], 3, false),
            (&[1, 1, 1], 1, true),
            (&[2], 3, true),
        ] {
            assert_eq!(is_even(&leaders(nodes), nodes.len() as u16, of), even, "{nodes:?}");
        }
        assert!(!is_even(&leaders(&[1, 2]), 3, 3), "one has no leader");
    }
}
