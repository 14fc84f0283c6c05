//! Placement by way of etcd: nodes announce themselves on leases, and one of them, the controller, writes the table.
//!
//! Four tasks, each of which goes on for ever and begins again when etcd was away:
//!
//! - [`register`]: this node's number and its lease
//! - the watch: everything under the cluster's prefix, into a [`View`]
//! - the carrying over: from the view into what this node knows, and into a file for a start without etcd
//! - [`controller`]: on whichever node holds the key, from nodes and rows to better rows
//!
//! ```text
//!   register --lease--> controller --rows--> etcd --watch--> View --> Cluster --> agent, converge
//!                                                              '--> placement.json
//! ```
//!
//! While etcd is away the view stays what it was, and with it the table: nothing moves, and nothing else waits.

pub mod access;
pub mod controller;
pub mod register;
pub mod view;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, Compare, CompareOp, ConnectOptions, EventType, GetOptions, WatchOptions};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::files::{self, FileError};
use super::plan::{CannotMove, NodeState, Nodes, move_replica};
use super::{Cluster, NodeInfo, Table};
use crate::task::{GroupId, Pauses};
use access::Access;
use view::{Change, DrainRow, Keys, View, wall_ms};

/// What was last known of the placement, for a start without etcd.
pub const KNOWN_FILE: &str = "placement.json";
/// No answer of etcd takes longer, or it is taken for being away.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// etcd closes the connection of whoever asks for signs of life more often than every five seconds.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(6);
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(3);

#[derive(Debug, Clone, thiserror::Error)]
pub enum EtcdError {
    #[error("etcd does not answer within {ANSWER_WITHIN:?}")]
    Slow,
    #[error("etcd: {0}")]
    Failed(String),
    #[error(
        "the cluster has {cluster} shards, and this node was started for {ours}: give --shards {cluster}, and an empty --data-dir"
    )]
    Shards { cluster: u16, ours: u16 },
    #[error("the cluster's keys in etcd have format {0}, this binary knows formats up to {format}", format = view::FORMAT)]
    Newer(u32),
    #[error("node id {0} belongs to another data folder: a wiped node needs a new --node-id")]
    OtherFolder(u64),
    #[error(
        "the data folder holds groups, and node {0} is not known in the cluster: they are those of another cluster. \
         Choose an empty --data-dir, or another --cluster"
    )]
    Foreign(u64),
}

impl EtcdError {
    /// Trying again does not help.
    pub fn is_final(&self) -> bool {
        !matches!(self, EtcdError::Slow | EtcdError::Failed(_))
    }
}

impl From<etcd_client::Error> for EtcdError {
    fn from(error: etcd_client::Error) -> Self {
        EtcdError::Failed(error.to_string())
    }
}

/// Where etcd is, and what is ours in it; cheap to clone.
#[derive(Clone)]
pub struct Link {
    endpoints: Arc<Vec<String>>,
    access: Arc<Access>,
    pub keys: Keys,
}

impl Link {
    pub fn new(endpoints: Vec<String>, access: Access, cluster: &str) -> Self {
        Self { endpoints: Arc::new(endpoints), access: Arc::new(access), keys: Keys::new(cluster) }
    }

    async fn connect(&self) -> Result<Client, EtcdError> {
        let options = ConnectOptions::new()
            .with_connect_timeout(ANSWER_WITHIN)
            .with_keep_alive(KEEPALIVE_EVERY, ANSWER_WITHIN)
            .with_keep_alive_while_idle(true)
            // A member that has lost the others says so, and does not answer with what was.
            .with_require_leader(true);
        let options = self.access.add_to(options);
        answer(Client::connect(self.endpoints.as_slice(), Some(options))).await
    }
}

/// What etcd answers, unless that takes too long. Its calls are large, and would make large whatever waits for them.
async fn answer<T>(call: impl Future<Output = Result<T, etcd_client::Error>>) -> Result<T, EtcdError> {
    Ok(timeout(ANSWER_WITHIN, Box::pin(call)).await.map_err(|_| EtcdError::Slow)??)
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain fields")
}

/// The key is not there.
fn absent(key: String) -> Compare {
    Compare::create_revision(key, CompareOp::Equal, 0)
}

/// Nobody has written it since.
fn unchanged(key: String, changed: i64) -> Compare {
    Compare::mod_revision(key, CompareOp::Equal, changed)
}

/// From one try to the next. All nodes lose etcd together.
const fn backoff() -> Pauses {
    Pauses::new(BACKOFF_MIN, BACKOFF_MAX)
}

async fn wait(backoff: &mut Pauses) {
    sleep(backoff.next(rand::random())).await;
}

/// Keeps `views` as etcd is, until it is dropped.
pub async fn watch_all(link: Link, views: watch::Sender<Arc<View>>) {
    let mut pauses = backoff();
    let mut said = false;
    loop {
        let error = match watch_once(&link, &views, &mut said, &mut pauses).await {
            Ok(()) => EtcdError::Failed("the watch has ended".into()),
            Err(error) => error,
        };
        if !said {
            tracing::warn!(%error, "etcd is away: nothing moves until it is back, everything else goes on");
            said = true;
        }
        wait(&mut pauses).await;
    }
}

async fn watch_once(
    link: &Link,
    views: &watch::Sender<Arc<View>>,
    away: &mut bool,
    pauses: &mut Pauses,
) -> Result<(), EtcdError> {
    let mut client = link.connect().await?;
    let found = answer(client.get(link.keys.all(), Some(GetOptions::new().with_prefix()))).await?;
    let mut view = View::default();
    for kv in found.kvs() {
        let (created, changed) = (kv.create_revision(), kv.mod_revision());
        view.apply(&link.keys, &Change { key: kv.key(), value: Some(kv.value()), created, changed });
    }
    // Whoever is missing is so from now on: it may have come and gone while nobody looked.
    view.note_away();
    views.send_replace(Arc::new(view.clone()));
    let next = found.header().map_or(0, |header| header.revision()) + 1;
    let options = WatchOptions::new().with_prefix().with_start_revision(next);
    let mut stream = answer(client.watch(link.keys.all(), Some(options))).await?;
    if std::mem::take(away) {
        tracing::info!("etcd is back");
    }
    *pauses = backoff();
    while let Some(message) = stream.message().await? {
        if message.canceled() {
            return Err(EtcdError::Failed(format!("the watch was ended: {}", message.cancel_reason())));
        }
        for event in message.events() {
            let Some(kv) = event.kv() else { continue };
            let value = (event.event_type() == EventType::Put).then(|| kv.value());
            let (created, changed) = (kv.create_revision(), kv.mod_revision());
            view.apply(&link.keys, &Change { key: kv.key(), value, created, changed });
        }
        if !message.events().is_empty() {
            view.note_away();
            views.send_replace(Arc::new(view.clone()));
        }
    }
    Ok(())
}

/// What a node knows when it starts without etcd.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    pub nodes: BTreeMap<u64, NodeInfo>,
    pub table: Table,
}

impl Known {
    pub fn read(data_dir: &std::path::Path) -> Result<Option<Self>, FileError> {
        files::read(&data_dir.join(KNOWN_FILE))
    }

    /// A row never goes back: its replicas of then may have been released.
    fn update(&mut self, view: &View) {
        self.nodes.extend(view.known());
        for (group, row) in view.table() {
            match self.table.get(&group) {
                Some(known) if known.epoch > row.epoch || known.epoch == row.epoch && *known != row => {
                    tracing::error!(%group, known = known.epoch, found = row.epoch, "a row in etcd has gone back");
                }
                _ => drop(self.table.insert(group, row)),
            }
        }
    }

    pub fn tell(&self, cluster: &Cluster) {
        for node in self.nodes.values().filter(|node| node.node_id != cluster.node_id()) {
            cluster.set_node(node.clone());
        }
        cluster.set_table(self.table.clone());
    }
}

/// Carries the view over into what this node knows, until it is dropped.
pub async fn carry_over(mut known: Known, mut views: watch::Receiver<Arc<View>>, cluster: Cluster, data_dir: PathBuf) {
    let mut pauses = backoff();
    loop {
        let view = views.borrow_and_update().clone();
        let mut next = known.clone();
        next.update(&view);
        if next != known {
            let (path, stored) = (data_dir.join(KNOWN_FILE), next.clone());
            let written = tokio::task::spawn_blocking(move || files::write(&path, &stored)).await;
            // First of all on disk: whoever releases a replica must not find, after a restart, that it is wanted.
            if let Err(error) = written.expect("writing does not panic") {
                tracing::warn!(%error, "the placement is not followed until it can be stored");
                wait(&mut pauses).await;
                continue;
            }
            known = next;
            known.tell(&cluster);
        }
        if views.changed().await.is_err() {
            return;
        }
    }
}

/// The nodes as the plan sees them. `gone`: who has been away for too long.
pub fn node_states(view: &View, gone: impl Fn(u64) -> bool) -> Nodes {
    let state = |(node_id, info): (u64, NodeInfo)| {
        let alive = view.nodes.contains_key(&node_id);
        let draining = view.drains.contains(&node_id);
        (node_id, NodeState { zone: info.zone, alive, draining, gone: !alive && gone(node_id) })
    };
    view.known().into_iter().map(state).collect()
}

/// Why an operator's wish is not done.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("node {0} is not known")]
    NoNode(u64),
    #[error("node {0} is the last one that may hold anything")]
    LastNode(u64),
    #[error(transparent)]
    CannotMove(#[from] CannotMove),
    #[error("{0} is on its way, or has no leader; try again when it has settled")]
    Moving(GroupId),
    #[error("the placement is static: replicas do not move")]
    Fixed,
    #[error("the node is alone: there is nowhere to move to")]
    Alone,
    #[error("placement cannot be changed now: {0}")]
    Etcd(#[from] EtcdError),
}

/// Changes what operators may change; cheap to clone.
#[derive(Clone)]
pub struct Control {
    link: Link,
    views: watch::Receiver<Arc<View>>,
}

impl Control {
    pub fn new(link: Link, views: watch::Receiver<Arc<View>>) -> Self {
        Self { link, views }
    }

    pub fn view(&self) -> Arc<View> {
        self.views.borrow().clone()
    }

    /// The node is to hold nothing, and gets nothing.
    pub async fn drain(&self, node_id: u64) -> Result<(), ControlError> {
        let view = self.view();
        if !view.ids.contains_key(&node_id) {
            return Err(ControlError::NoNode(node_id));
        }
        let mut others = view.nodes.keys().filter(|other| **other != node_id && !view.drains.contains(other));
        if others.next().is_none() {
            return Err(ControlError::LastNode(node_id));
        }
        let mut client = self.link.connect().await?;
        let row = json(&DrainRow { since_ms: wall_ms() });
        answer(client.put(self.link.keys.drain(node_id), row, None)).await?;
        Ok(())
    }

    pub async fn undrain(&self, node_id: u64) -> Result<(), ControlError> {
        if !self.view().ids.contains_key(&node_id) {
            return Err(ControlError::NoNode(node_id));
        }
        let mut client = self.link.connect().await?;
        answer(client.delete(self.link.keys.drain(node_id), None)).await?;
        Ok(())
    }

    /// Moves a voter by hand. The row is written here and not by the controller: whoever comes second sees that the row
    /// has changed, and looks again.
    pub async fn move_replica(&self, group: GroupId, from: u64, to: u64) -> Result<(), ControlError> {
        let view = self.view();
        let nodes = node_states(&view, |_| false);
        let row = move_replica(&view.table(), &nodes, group, from, to)?;
        let before = &view.groups[&group];
        let key = self.link.keys.group(group);
        let put = etcd_client::TxnOp::put(key.clone(), json(&row), None);
        let txn = etcd_client::Txn::new().when([unchanged(key, before.changed)]).and_then([put]);
        let mut client = self.link.connect().await?;
        if !answer(client.txn(txn)).await?.succeeded() {
            return Err(ControlError::Moving(group));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::fixed;

    #[test]
    fn a_row_never_goes_back() {
        let view = |epoch| {
            let mut view = View::default();
            for (group, mut row) in fixed::alone(1, 1) {
                row.epoch = epoch;
                view.groups.insert(group, view::Stored { value: row, created: 1, changed: 1 });
            }
            view
        };
        let mut known = Known::default();
        known.update(&view(3));
        known.update(&view(2));
        assert!(known.table.values().all(|row| row.epoch == 3));
        known.update(&View::default());
        assert_eq!(known.table.len(), 2, "what is not there is not known better");
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Known::read(folder.path()).unwrap(), None);
        files::write(&folder.path().join(KNOWN_FILE), &known).unwrap();
        assert_eq!(Known::read(folder.path()).unwrap(), Some(known));
    }
}
