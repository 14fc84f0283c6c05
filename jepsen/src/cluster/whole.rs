//! Whether everything is where it should be, as `boomtool` tells: shards whole, replicas equal.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;

use super::{Cluster, ClusterError, Told};
use crate::history::What;

const LOOK_EVERY: Duration = Duration::from_millis(300);
/// A replica that took in a snapshot has no digest of that moment; another look finds one.
const DIGESTS_WITHIN: Duration = Duration::from_secs(60);

/// A group as `boomtool cluster shards` shows it.
#[derive(Debug, Clone, Deserialize)]
pub struct Group {
    pub group: u16,
    pub state: String,
    pub leader_node: Option<u64>,
    pub replicas: Vec<Replica>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Replica {
    pub node_id: u64,
    pub voter: bool,
}

#[derive(Debug, Deserialize)]
struct Verdict {
    group: u16,
    result: String,
    replicas: Vec<Digest>,
}

#[derive(Debug, Deserialize)]
struct Digest {
    replica: u64,
    node_id: u64,
    digest: String,
    applied_index: u64,
    failed: Option<String>,
}

impl Group {
    /// Led, with all of its copies, on nodes that are there.
    fn whole(&self, replicas: usize, nodes: &BTreeSet<u64>) -> bool {
        let voters = self.replicas.iter().filter(|replica| replica.voter).count();
        self.state == "ok" && voters >= replicas && self.replicas.iter().all(|replica| nodes.contains(&replica.node_id))
    }
}

impl Cluster {
    /// Every group, and where its replicas are.
    pub async fn groups(&self) -> Result<Vec<Group>, ClusterError> {
        let told = self.ok(&["cluster", "shards"]).await?;
        told.lines.into_iter().map(|line| serde_json::from_value(line).map_err(ClusterError::strange)).collect()
    }

    /// Waits until every shard has all of its replicas on nodes that run now, and a leader, and nothing moves.
    pub async fn wait_until_whole(&self, within: Duration) -> Result<(), ClusterError> {
        let deadline = Instant::now() + within;
        loop {
            let nodes: BTreeSet<u64> = self.hosts().iter().map(|view| view.node).collect();
            let left = match self.groups().await {
                Ok(groups) if groups.is_empty() => "there are no shards".to_owned(),
                Ok(groups) => {
                    let replicas = self.settings().replicas;
                    let torn: Vec<String> = groups
                        .iter()
                        .filter(|group| !group.whole(replicas, &nodes))
                        .map(|group| format!("{} is {} on {:?}", group.group, group.state, places(group)))
                        .collect();
                    if torn.is_empty() {
                        return Ok(());
                    }
                    torn.join("; ")
                }
                Err(error) => error.to_string(),
            };
            if Instant::now() > deadline {
                return Err(ClusterError::NotWhole { within, left });
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Compares the replicas and writes down what each says. Returns what `boomtool` made of it.
    pub async fn record_digests(&self) -> Result<Told, ClusterError> {
        let deadline = Instant::now() + DIGESTS_WITHIN;
        loop {
            let told = self.boomtool(&["cluster", "verify"]).await?;
            let verdicts: Vec<Verdict> =
                told.lines.iter().cloned().filter_map(|line| serde_json::from_value(line).ok()).collect();
            let differ = verdicts.iter().any(|verdict| verdict.result == "DIFFERENT");
            if told.code == Some(0) || differ || Instant::now() > deadline {
                verdicts.iter().for_each(|verdict| self.record(verdict));
                return Ok(told);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn record(&self, verdict: &Verdict) {
        for said in verdict.replicas.iter().filter(|said| said.failed.is_none()) {
            self.recorder().record(What::Digest {
                group: verdict.group,
                replica: said.replica,
                node: said.node_id,
                index: said.applied_index,
                digest: said.digest.clone(),
            });
        }
    }
}

fn places(group: &Group) -> Vec<u64> {
    group.replicas.iter().map(|replica| replica.node_id).collect()
}

/// The objects among the lines.
pub(super) fn objects(text: &str) -> Vec<Value> {
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}
