//! Nodes of one cluster, each a process of its own, and a load whose account another process keeps.

use std::process::Command;
use std::time::Duration;

use boomerang::sabotage::Fault;
use boomerang_testkit::{Process, Signal, blocking, log_end};
use serde_json::Value;
use tempfile::TempDir;

use super::eventually_within;
use super::node::{ADMIN_PASSWORD, NodeProcess, TOOL_ENDS_WITHIN, boomtool, free_address, to_its_end};

/// Few, so that each node leads some and a test build is quick.
pub const SHARDS: u16 = 6;
/// Replicas that were away catch up, leaders come back to where they belong.
const SETTLED_WITHIN: Duration = Duration::from_secs(60);

pub struct Cluster {
    pub nodes: Vec<NodeProcess>,
}

impl Cluster {
    /// Nodes 1 to `count` with a fixed list of peers. `flags` are for each of them.
    pub fn with_peers(count: u64, flags: &[&str]) -> Self {
        Self::start(peers_flags(count, flags))
    }

    /// Nodes 1 to `count`, placed by etcd.
    pub fn with_etcd(count: u64, etcd: &str, flags: &[&str]) -> Self {
        let flags: Vec<&str> = ["--etcd", etcd].iter().chain(flags).copied().collect();
        Self::start((1..=count).map(|number| flags_of(number, free_address(), &flags)).collect())
    }

    /// With a fixed list of peers, each without what this fault takes away.
    pub fn broken(count: u64, fault: Fault) -> Self {
        Self { nodes: NodeProcess::start_all_broken(&peers_flags(count, &[]), fault) }
    }

    fn start(flags: Vec<Vec<String>>) -> Self {
        Self { nodes: NodeProcess::start_all(&flags) }
    }

    /// One more; it has to be told of the others by etcd.
    pub fn add(&mut self, number: u64, etcd: &str, flags: &[&str]) {
        let flags: Vec<&str> = ["--etcd", etcd].iter().chain(flags).copied().collect();
        self.nodes.extend(NodeProcess::start_all(&[flags_of(number, free_address(), &flags)]));
    }

    pub fn addresses(&self) -> String {
        let all: Vec<String> = self.nodes.iter().map(|node| node.started.tcp.to_string()).collect();
        all.join(",")
    }

    fn tool(&self, args: &[&str]) -> Command {
        let mut command = boomtool();
        command.args(["--json", "--addr", &self.addresses(), "--client", "admin"]).args(args);
        command.env("BOOMERANG_PASSWORD", ADMIN_PASSWORD);
        command
    }

    /// `boomtool` with these arguments: its exit code, the objects it printed, and what it said.
    pub fn run(&self, args: &[&str]) -> (i32, Vec<Value>, String) {
        let ended = to_its_end(&mut self.tool(args), TOOL_ENDS_WITHIN);
        let objects = ended.stdout.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        (ended.code.unwrap(), objects, ended.stderr)
    }

    /// `boomtool` with these arguments, which must succeed.
    pub fn ok(&self, args: &[&str]) -> Vec<Value> {
        let (code, objects, said) = self.run(args);
        assert_eq!(code, 0, "boomtool {args:?}: {said}");
        objects
    }

    /// `boomtool bench fire` with these arguments, beside the test and whatever that does to the nodes.
    pub fn load(&self, args: &[&str]) -> Load {
        let fire = ["bench", "fire", "--quiet", "--faults", "--wait", "100s", "--connections", "2", "--inflight", "64"];
        let all: Vec<&str> = fire.iter().chain(args).copied().collect();
        let folder = tempfile::tempdir().unwrap();
        let process = Process::start("a load", &mut self.tool(&all), &folder.path().join("log")).unwrap();
        Load { process, _folder: folder }
    }

    /// Waits until every replica of every group is equal to the others at one and the same entry.
    pub fn assert_replicas_agree(&self) {
        eventually_within(SETTLED_WITHIN, "all replicas can be compared", || {
            let (code, verdicts, said) = self.run(&["cluster", "verify"]);
            assert!(!said.contains("differ"), "replicas differ: {verdicts:?}\n{said}");
            if code == 0 { Ok(()) } else { Err(format!("{verdicts:?}\n{said}")) }
        });
    }

    /// Waits until every shard has `replicas` replicas and a leader, and nothing moves.
    pub fn wait_until_whole(&self, replicas: usize) {
        eventually_within(SETTLED_WITHIN, "every shard is whole", || {
            let (code, shards, said) = self.run(&["cluster", "shards"]);
            let whole = |shard: &Value| {
                shard["state"] == "ok" && shard["replicas"].as_array().is_some_and(|all| all.len() >= replicas)
            };
            let all = code == 0 && !shards.is_empty() && shards.iter().all(whole);
            if all { Ok(()) } else { Err(format!("{shards:?}\n{said}")) }
        });
    }

    /// Waits until the nodes that run have counted so many together, since each was started.
    pub fn wait_for_count(&mut self, metric: &str, count: u64) {
        eventually_within(SETTLED_WITHIN, &format!("{metric} is {count}"), || {
            let found = self.count(metric);
            if found >= count { Ok(()) } else { Err(found) }
        });
    }

    /// Of the nodes that run.
    pub fn count(&mut self, metric: &str) -> u64 {
        let running = self.nodes.iter_mut().filter_map(|node| node.exit_code().is_none().then_some(node));
        running.map(|node| node.metric(metric) as u64).sum()
    }

    pub fn stop_process(&self, node: usize) {
        self.nodes[node].signal(Signal::STOP);
    }

    pub fn continue_process(&self, node: usize) {
        self.nodes[node].signal(Signal::CONT);
    }
}

/// Of nodes 1 to `count` with a fixed list of peers.
fn peers_flags(count: u64, flags: &[&str]) -> Vec<Vec<String>> {
    let peers: Vec<String> = (0..count).map(|_| free_address()).collect();
    let list: Vec<String> = peers.iter().enumerate().map(|(at, peer)| format!("{}={peer}", at + 1)).collect();
    let list = list.join(",");
    let flags: Vec<&str> = ["--peers", &list].iter().chain(flags).copied().collect();
    (1..).zip(peers).map(|(number, peer)| flags_of(number, peer, &flags)).collect()
}

/// Of a node whose addresses are the same over restarts.
fn flags_of(number: u64, peer: String, flags: &[&str]) -> Vec<String> {
    let (tcp, http) = (free_address(), free_address());
    let (number, shards) = (number.to_string(), SHARDS.to_string());
    let mut all = vec!["--node-id", &number, "--tcp-addr", &tcp, "--http-addr", &http, "--peer-addr", &peer];
    if !flags.contains(&"--shards") {
        all.extend(["--shards", &shards]);
    }
    all.extend(flags);
    all.into_iter().map(str::to_owned).collect()
}

/// A load under way; its report is what its receiver saw, in one line.
pub struct Load {
    process: Process,
    /// Of its log.
    _folder: TempDir,
}

/// What came of a load.
pub struct Account {
    pub report: Value,
}

impl Load {
    pub fn finish(self) -> Account {
        let line = blocking(self.process.line(TOOL_ENDS_WITHIN)).unwrap_or_else(|error| panic!("{error}"));
        let said = || log_end(self.process.log(), 20);
        let report: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}\n{}", said()));
        eprintln!(
            "sent {} acknowledged {} fired {} lost {} early {} duplicates {} lateness {} failures {}",
            report["sent"],
            report["acknowledged"],
            report["fired"],
            report["lost"],
            report["early"],
            report["duplicates"],
            report["lateness_us"],
            report["failures"]
        );
        Account { report }
    }
}

impl Account {
    pub fn number(&self, field: &str) -> u64 {
        self.report[field].as_u64().unwrap_or_else(|| panic!("no {field} in {}", self.report))
    }

    /// Everything acknowledged came, nothing early, and what came twice can be told by its fence.
    pub fn assert_promises(&self) {
        assert!(self.number("acknowledged") > 0, "a load of which nothing was accepted says nothing: {}", self.report);
        for promise in ["lost", "early", "duplicates_with_the_same_fence"] {
            assert_eq!(self.number(promise), 0, "tasks that are {promise} in {}", self.report);
        }
    }

    /// And nobody who asked was refused.
    pub fn assert_all_acknowledged(&self) {
        let (acknowledged, sent) = (self.number("acknowledged"), self.number("sent"));
        assert_eq!(acknowledged, sent, "all that was sent is accepted; failures: {}", self.report["failures"]);
    }

    pub fn latest(&self) -> Duration {
        Duration::from_micros(self.report["lateness_us"]["max"].as_u64().unwrap())
    }
}
