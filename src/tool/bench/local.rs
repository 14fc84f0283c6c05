//! A cluster of real processes on this machine, for as long as a bench runs.
//!
//! The nodes have a fixed list of peers, ports that stay theirs over restarts, and folders that go with the bench. Each
//! process ends by its own handle: whoever panics leaves none behind.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use futures::future::try_join_all;

use super::super::ToolError;
use crate::address::OwnAddress;

/// Whoever can read the folder can read this as well.
pub(super) const PASSWORD: &str = "bench-failover";

/// What a node is started with besides its own addresses.
#[derive(Debug, Clone)]
pub(super) struct LocalSettings {
    /// The server.
    pub binary: PathBuf,
    pub nodes: u16,
    pub shards: u16,
    /// Passed on to every node.
    pub flags: Vec<String>,
}

pub(super) struct LocalCluster {
    settings: LocalSettings,
    folder: PathBuf,
    nodes: Vec<LocalNode>,
}

struct LocalNode {
    tcp: OwnAddress,
    http: OwnAddress,
    peer: OwnAddress,
    process: Option<Child>,
}

impl LocalCluster {
    /// Returns when every node is ready.
    pub async fn start(settings: LocalSettings) -> Result<Self, ToolError> {
        let folder = std::env::temp_dir().join(format!("boomerang-bench-{}", std::process::id()));
        std::fs::create_dir_all(&folder).map_err(|error| failed("make a folder for", &folder, &error))?;
        let mut nodes = Vec::new();
        for _ in 0..settings.nodes {
            let own = || OwnAddress::take().map_err(|error| failed("find a free port for", &folder, &error));
            nodes.push(LocalNode { tcp: own()?, http: own()?, peer: own()?, process: None });
        }
        let mut cluster = Self { settings, folder, nodes };
        // All before the first is waited for: none of them is ready alone.
        let lines: Vec<_> = (0..cluster.nodes.len()).map(|node| cluster.spawn(node)).collect::<Result<_, _>>()?;
        // All at once: the first waits for the others, and it is one of them that may have ended.
        try_join_all(lines.into_iter().enumerate().map(|(node, line)| cluster.ready(node, line))).await?;
        Ok(cluster)
    }

    pub fn addresses(&self) -> Vec<String> {
        self.nodes.iter().map(|node| node.tcp.to_string()).collect()
    }

    /// As if its power had been cut.
    pub fn kill(&mut self, node: usize) {
        if let Some(mut process) = self.nodes[node].process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// After [`LocalCluster::kill`], on the same folder and ports. Returns when it is ready.
    pub async fn restart(&mut self, node: usize) -> Result<(), ToolError> {
        let line = self.spawn(node)?;
        self.ready(node, line).await
    }

    fn spawn(&mut self, node: usize) -> Result<tokio::task::JoinHandle<io::Result<String>>, ToolError> {
        let number = node + 1;
        let folder = self.folder.join(format!("node-{number}"));
        let peers: Vec<String> =
            self.nodes.iter().enumerate().map(|(at, node)| format!("{}={}", at + 1, node.peer)).collect();
        let LocalNode { tcp, http, peer, .. } = &self.nodes[node];
        let binary = &self.settings.binary;
        let log = File::options().create(true).append(true).open(self.folder.join(format!("node-{number}.log")));
        let log = log.map_err(|error| failed("write the log of", &folder, &error))?;
        let mut command = Command::new(binary);
        command.arg("serve").arg("--node-id").arg(number.to_string()).arg("--data-dir").arg(&folder);
        command.args(["--tcp-addr", &tcp.to_string(), "--http-addr", &http.to_string()]);
        command.args(["--peer-addr", &peer.to_string(), "--peers", &peers.join(",")]);
        command.args(["--shards", &self.settings.shards.to_string(), "--admin-password", PASSWORD]);
        command.args(&self.settings.flags);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let mut process = command.spawn().map_err(|error| failed("start", binary, &error))?;
        let stdout = process.stdout.take().expect("it is piped");
        self.nodes[node].process = Some(process);
        Ok(tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            BufReader::new(stdout).read_line(&mut line).map(|_| line)
        }))
    }

    async fn ready(&self, node: usize, line: tokio::task::JoinHandle<io::Result<String>>) -> Result<(), ToolError> {
        let line = line.await.expect("reading a line does not panic");
        if line.is_ok_and(|line| line.starts_with('{')) {
            return Ok(());
        }
        let log = self.folder.join(format!("node-{}.log", node + 1));
        let said = std::fs::read_to_string(log).unwrap_or_default();
        let last = said.lines().last().unwrap_or("it said nothing");
        Err(ToolError::Undone(format!("node {} did not start: {last}", node + 1)))
    }
}

impl Drop for LocalCluster {
    fn drop(&mut self) {
        (0..self.nodes.len()).for_each(|node| self.kill(node));
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn failed(verb: &str, path: &Path, error: &io::Error) -> ToolError {
    ToolError::Undone(format!("cannot {verb} {}: {error}", path.display()))
}
