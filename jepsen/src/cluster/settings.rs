//! What a cluster is made of, and what may go wrong with it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use boomerang::sabotage::Fault;
use boomerang_testkit::NotReady;

use super::links::Host;

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
    #[error(transparent)]
    NotReady(#[from] NotReady),
    #[error("node {0} does not run")]
    Down(u64),
    #[error("not every shard was whole within {within:?}: {left}")]
    NotWhole { within: Duration, left: String },
    #[error("not every replica said within {within:?} what its state is: {left}")]
    NoDigest { within: Duration, left: String },
    #[error("boomtool {args}: {said}")]
    Tool { args: String, said: String },
    #[error("{0} is not what the harness understands; are harness and server of the same version?")]
    Strange(String),
    #[error("there is no machine {0}")]
    NoMachine(Host),
}

impl ClusterError {
    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| ClusterError::Io { what, source }
    }

    pub(super) fn strange(error: serde_json::Error) -> Self {
        ClusterError::Strange(error.to_string())
    }
}
