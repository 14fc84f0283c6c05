//! Whether everything is where it should be, as `boomtool` tells: shards whole, replicas equal.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use super::{Cluster, ClusterError, Reported};
use crate::history::What;
use crate::patience;

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

/// What `boomtool` has told, and what it is about.
type Verified = (Reported, Vec<Verdict>);

enum Unverified {
    /// Some replicas have not said it.
    Some(Verified),
    Tool(ClusterError),
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
        let whole = patience::insist(within, LOOK_EVERY, || self.is_whole()).await;
        whole.map_err(|left| ClusterError::NotWhole { within, left })
    }

    /// Or what is not.
    async fn is_whole(&self) -> Result<(), String> {
        let nodes: BTreeSet<u64> = self.hosts().iter().map(|view| view.node).collect();
        let groups = self.groups().await.map_err(|error| error.to_string())?;
        if groups.is_empty() {
            return Err("there are no shards".to_owned());
        }
        let replicas = self.settings().replicas;
        let torn = groups.iter().filter(|group| !group.whole(replicas, &nodes));
        let torn: Vec<String> =
            torn.map(|group| format!("{} is {} on {:?}", group.group, group.state, places(group))).collect();
        if torn.is_empty() { Ok(()) } else { Err(torn.join("; ")) }
    }

    /// Compares the replicas and writes down what each says. Returns what `boomtool` made of it; it is an error when some
    /// have not said it, unless others differ already.
    pub async fn record_digests(&self) -> Result<Reported, ClusterError> {
        let verified = patience::insist(DIGESTS_WITHIN, LOOK_EVERY, || self.verified()).await;
        let all_said = verified.is_ok();
        let (told, verdicts) = match verified {
            Ok(all) | Err(Unverified::Some(all)) => all,
            Err(Unverified::Tool(error)) => return Err(error),
        };
        verdicts.iter().for_each(|verdict| self.record(verdict));
        if all_said {
            Ok(told)
        } else {
            Err(ClusterError::NoDigest { within: DIGESTS_WITHIN, left: silent(&verdicts, &told) })
        }
    }

    /// When all replicas have said it, or some differ.
    async fn verified(&self) -> Result<Verified, Unverified> {
        let told = self.boomtool(&["cluster", "verify"]).await.map_err(Unverified::Tool)?;
        let verdicts: Vec<Verdict> =
            told.lines.iter().cloned().filter_map(|line| serde_json::from_value(line).ok()).collect();
        let differ = verdicts.iter().any(|verdict| verdict.result == DIFFERENT);
        let enough = told.code == Some(0) || differ;
        if enough { Ok((told, verdicts)) } else { Err(Unverified::Some((told, verdicts))) }
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
fn silent(verdicts: &[Verdict], told: &Reported) -> String {
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
        let told = Reported { code: Some(1), lines: Vec::new(), said: "error: 2 groups\n".into() };
        assert_eq!(
            silent(&verdicts, &told),
            "group 3: replica 4 on node 7: busy; group 4: it has no leader; error: 2 groups"
        );
    }
}
