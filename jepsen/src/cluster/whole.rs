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
/// What `boomtool cluster verify` makes of a group; anything else is why it cannot tell.
const DIFFERENT: &str = "DIFFERENT";
const EQUAL: &str = "equal";

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

    /// Compares the replicas and writes down what each says. Returns what `boomtool` made of it; it is an error when some
    /// have not said it, unless others differ already.
    pub async fn record_digests(&self) -> Result<Told, ClusterError> {
        let deadline = Instant::now() + DIGESTS_WITHIN;
        loop {
            let told = self.boomtool(&["cluster", "verify"]).await?;
            let verdicts: Vec<Verdict> =
                told.lines.iter().cloned().filter_map(|line| serde_json::from_value(line).ok()).collect();
            let differ = verdicts.iter().any(|verdict| verdict.result == DIFFERENT);
            if told.code == Some(0) || differ || Instant::now() > deadline {
                verdicts.iter().for_each(|verdict| self.record(verdict));
                if told.code == Some(0) || differ {
                    return Ok(told);
                }
                return Err(ClusterError::NoDigest { within: DIGESTS_WITHIN, left: silent(&verdicts, &told) });
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

/// Who has not said what its state is.
fn silent(verdicts: &[Verdict], told: &Told) -> String {
    let mut left = Vec::new();
    for verdict in verdicts.iter().filter(|verdict| verdict.result != EQUAL) {
        let failed = verdict.replicas.iter().filter_map(|said| Some((said, said.failed.as_ref()?)));
        let names = failed.map(|(said, why)| format!("replica {} on node {}: {why}", said.replica, said.node_id));
        let names = names.collect::<Vec<_>>().join(", ");
        let names = if names.is_empty() { &verdict.result } else { &names };
        left.push(format!("group {}: {names}", verdict.group));
    }
    match (told.code, told.said.trim()) {
        (None, _) => left.push("boomtool did not come to an end".into()),
        (_, "") => {}
        (_, said) => left.push(said.to_owned()),
    }
    left.join("; ")
}

fn places(group: &Group) -> Vec<u64> {
    group.replicas.iter().map(|replica| replica.node_id).collect()
}

/// The objects among the lines.
pub(super) fn objects(text: &str) -> Vec<Value> {
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn who_is_silent_is_named() {
        let busy = json!({"replica": 4, "node_id": 7, "digest": "", "applied_index": 0, "failed": "busy"});
        let verdicts = json!([
            {"group": 2, "result": "equal", "replicas": []},
            {"group": 3, "result": "no digest from node 7: busy", "replicas": [busy]},
            {"group": 4, "result": "it has no leader", "replicas": []},
        ]);
        let verdicts: Vec<Verdict> = serde_json::from_value(verdicts).unwrap();
        let told = Told { code: Some(1), lines: Vec::new(), said: "error: 2 groups\n".into() };
        assert_eq!(
            silent(&verdicts, &told),
            "group 3: replica 4 on node 7: busy; group 4: it has no leader; error: 2 groups"
        );
    }
}
