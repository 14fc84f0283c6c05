//! Placement without etcd: the replicas are a function of the list of peers, and never move.
//!
//! Every node has the same list, and so the same table. A replica's id is the number of its node, and that is why a
//! node that has lost its disk can never come back under its number: its replicas have voted, and would vote again
//! without knowing it. So the very first start is done together. A node with an empty folder waits until all others
//! answer, and begins only when each of them has an empty folder too, or has begun with this very one: folders have
//! random ids, and whoever begins writes down those it has begun with.
//!
//! ```text
//!   node 1: waits for 2 and 3 --> writes down {1: a, 2: b, 3: c} --> begins
//!   node 2:                  waits for 1 and 3 --> node 1 has begun with b, which is this folder --> begins
//!   node 2, disk lost, folder is d:                node 1 has begun with b                       --> refuses
//! ```

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::cluster::Founding;
use super::files::{self, FileError};
use super::{Cluster, GroupRow, NodeInfo, ReplicaAt, Table};
use crate::task::GroupId;
use crate::wire::peer::NodeStatus;

/// Written before the first group begins.
pub const BEGUN_FILE: &str = "peers.json";
const SAY_EVERY: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum FixedError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(
        "the cluster has begun already, node {began} with another data folder of node {node}, and this one is empty: a \
         replica that has lost its disk cannot come back under its number, for it would forget how it has voted. \
         Restore the folder, or use --etcd, where a new --node-id takes the place of a node that is lost"
    )]
    Empty { node: u64, began: u64 },
    #[error("--peers: the cluster has begun with the nodes {was}, not {now}; the list of nodes never changes")]
    Others { was: String, now: String },
    #[error("--replicas: the cluster has begun with {was}, not {now}")]
    Replicas { was: u16, now: u16 },
    #[error("the data folder holds a node that did not begin with --peers; choose an empty --data-dir")]
    NotBegun,
}

/// What was begun with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Begun {
    replicas: u16,
    /// The data folder of each node.
    folders: BTreeMap<u64, String>,
}

/// The same on every node.
pub fn table(shards: u16, nodes: &[u64], replicas: u16) -> Table {
    let mut nodes = nodes.to_vec();
    nodes.sort_unstable();
    let voters = usize::from(replicas).clamp(1, nodes.len());
    let next_replica = nodes.last().map_or(1, |last| last + 1);
    let row = move |group: GroupId| {
        nodes.rotate_left(usize::from(group != GroupId::CLUSTER));
        let at =
            |(position, node): (usize, &u64)| ReplicaAt { replica: *node, node_id: *node, voter: position < voters };
        let held = if group == GroupId::CLUSTER { nodes.len() } else { voters };
        let replicas = nodes.iter().take(held).enumerate().map(at).collect();
        (group, GroupRow { epoch: 1, replicas, next_replica })
    };
    (0..=shards).map(GroupId).map(row).collect()
}

/// One node that holds everything.
pub fn alone(shards: u16, node_id: u64) -> Table {
    let at = ReplicaAt { replica: 1, node_id, voter: true };
    let row = |group| (group, GroupRow { epoch: 1, replicas: vec![at], next_replica: 2 });
    (0..=shards).map(GroupId).map(row).collect()
}

/// The list says where the others listen for peers; the rest they say themselves.
pub async fn learn_addresses(cluster: Cluster) {
    let mut hearings = cluster.hearings();
    while hearings.changed().await.is_ok() {
        for heard in cluster.statuses().into_values() {
            let status = &heard.status;
            let Some(known) = cluster.node(status.node_id) else { continue };
            let said = NodeInfo {
                node_id: known.node_id,
                peer: known.peer.clone(),
                tcp: status.tcp.clone(),
                http: status.http.clone(),
                zone: status.zone.clone(),
                version: status.version.clone(),
            };
            if said != known {
                cluster.set_node(said);
            }
        }
    }
}

/// Returns when this node may begin its part of the cluster, or has begun it before. `holds`: there are groups in its
/// store.
pub async fn begin(
    cluster: &Cluster,
    data_dir: &Path,
    folder: String,
    nodes: &[u64],
    replicas: u16,
    holds: bool,
) -> Result<(), FixedError> {
    let path = data_dir.join(BEGUN_FILE);
    if let Some(begun) = files::read::<Begun>(&path)? {
        check(&begun, nodes, replicas)?;
        cluster.set_founding(Founding { folder, founders: begun.folders });
        return Ok(());
    }
    if holds {
        return Err(FixedError::NotBegun);
    }
    cluster.set_founding(Founding { folder: folder.clone(), founders: BTreeMap::new() });
    let folders = wait_for_all(cluster, &folder, nodes).await?;
    files::write(&path, &Begun { replicas, folders: folders.clone() })?;
    cluster.set_founding(Founding { folder, founders: folders });
    Ok(())
}

fn check(begun: &Begun, nodes: &[u64], replicas: u16) -> Result<(), FixedError> {
    let shown = |nodes: &mut dyn Iterator<Item = u64>| {
        let shown: Vec<String> = nodes.map(|node| node.to_string()).collect();
        shown.join(", ")
    };
    let (was, now) = (shown(&mut begun.folders.keys().copied()), shown(&mut nodes.iter().copied()));
    if was != now {
        return Err(FixedError::Others { was, now });
    }
    if begun.replicas != replicas {
        return Err(FixedError::Replicas { was: begun.replicas, now: replicas });
    }
    Ok(())
}

async fn wait_for_all(cluster: &Cluster, folder: &str, nodes: &[u64]) -> Result<BTreeMap<u64, String>, FixedError> {
    let mut hearings = cluster.hearings();
    loop {
        hearings.borrow_and_update();
        let heard = cluster.statuses();
        let statuses: BTreeMap<u64, &NodeStatus> = heard.iter().map(|(node, heard)| (*node, &*heard.status)).collect();
        let missing = match verdict(cluster.node_id(), folder, nodes, &statuses)? {
            Verdict::Begin(folders) => return Ok(folders),
            Verdict::Wait(missing) => missing,
        };
        // As long as others are asked, something is heard now and then.
        let changed = async {
            loop {
                let _ = hearings.changed().await;
                if cluster.statuses().len() != statuses.len() {
                    return;
                }
            }
        };
        if timeout(SAY_EVERY, changed).await.is_err() {
            tracing::info!(?missing, "the cluster begins when all of its nodes answer");
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Begin(BTreeMap<u64, String>),
    /// For these.
    Wait(Vec<u64>),
}

/// May the node `me` begin, with an empty folder, when the others are like this?
fn verdict(me: u64, folder: &str, nodes: &[u64], statuses: &BTreeMap<u64, &NodeStatus>) -> Result<Verdict, FixedError> {
    let mut folders = BTreeMap::from([(me, folder.to_owned())]);
    let mut missing = Vec::new();
    for &node in nodes.iter().filter(|node| **node != me) {
        let Some(status) = statuses.get(&node) else {
            missing.push(node);
            continue;
        };
        let begun = !status.founders.is_empty() || !status.groups.is_empty();
        let with_us = status.founders.iter().any(|founder| founder.node_id == me && founder.folder == folder);
        if begun && !with_us {
            return Err(FixedError::Empty { node: me, began: node });
        }
        folders.insert(node, status.folder.clone());
    }
    Ok(if missing.is_empty() { Verdict::Begin(folders) } else { Verdict::Wait(missing) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::peer::{Founder, GroupStatus};

    #[test]
    fn every_node_has_the_same_table_and_as_much_to_do() {
        let rows = table(12, &[3, 1, 2], 3);
        assert_eq!(rows, table(12, &[1, 2, 3], 3));
        for row in rows.values() {
            assert_eq!((row.epoch, row.voters().count(), row.next_replica), (1, 3, 4));
            assert!(row.replicas.iter().all(|at| at.replica == at.node_id));
        }
        for node in 1..=3 {
            let leads = rows.iter().filter(|(group, row)| group.0 > 0 && row.replicas[0].node_id == node).count();
            assert_eq!(leads, 4);
        }
        let rows = table(10, &[1, 2, 3, 4, 5], 3);
        assert_eq!(rows[&GroupId::CLUSTER].replicas.len(), 5, "learners of group 0 on the others");
        assert!(rows.iter().all(|(_, row)| row.voters().count() == 3));
        assert!(rows.iter().all(|(group, row)| group.0 == 0 || row.replicas.len() == 3));
        for node in 1..=5 {
            let held = rows.iter().filter(|(group, row)| group.0 > 0 && row.on(node).is_some()).count();
            assert_eq!(held, 6);
        }
        assert_eq!(table(2, &[7], 3)[&GroupId(1)].replicas.len(), 1);
    }

    fn fresh(folder: &str) -> NodeStatus {
        NodeStatus { folder: folder.into(), ..Default::default() }
    }

    fn begun(folder: &str, with: &[(u64, &str)]) -> NodeStatus {
        let founder = |(node_id, folder): &(u64, &str)| Founder { node_id: *node_id, folder: (*folder).into() };
        NodeStatus {
            founders: with.iter().map(founder).collect(),
            groups: vec![GroupStatus::default()],
            ..fresh(folder)
        }
    }

    fn ask(folder: &str, others: &[(u64, NodeStatus)]) -> Result<Verdict, FixedError> {
        let others: BTreeMap<u64, &NodeStatus> = others.iter().map(|(node, status)| (*node, status)).collect();
        verdict(2, folder, &[1, 2, 3], &others)
    }

    #[test]
    fn a_cluster_begins_when_all_are_there_and_new() {
        let all = BTreeMap::from([(1, "a".to_owned()), (2, "b".to_owned()), (3, "c".to_owned())]);
        assert_eq!(ask("b", &[(1, fresh("a"))]).unwrap(), Verdict::Wait(vec![3]));
        assert_eq!(ask("b", &[(1, fresh("a")), (3, fresh("c"))]).unwrap(), Verdict::Begin(all.clone()));
        // One that was quicker has begun already, with us.
        let quick = begun("a", &[(1, "a"), (2, "b"), (3, "c")]);
        assert_eq!(ask("b", &[(1, quick.clone())]).unwrap(), Verdict::Wait(vec![3]));
        assert_eq!(ask("b", &[(1, quick), (3, fresh("c"))]).unwrap(), Verdict::Begin(all));
    }

    #[test]
    fn a_folder_that_was_lost_does_not_begin_again() {
        let began = begun("a", &[(1, "a"), (2, "b"), (3, "c")]);
        assert!(matches!(ask("d", &[(1, began.clone())]), Err(FixedError::Empty { node: 2, began: 1 })));
        assert!(matches!(ask("d", &[(1, fresh("a")), (3, began)]), Err(FixedError::Empty { began: 3, .. })));
    }

    #[test]
    fn the_list_never_changes() {
        let folders = BTreeMap::from([(1, "a".to_owned()), (2, "b".to_owned())]);
        let begun = Begun { replicas: 3, folders };
        check(&begun, &[1, 2], 3).unwrap();
        assert!(check(&begun, &[1, 2, 3], 3).unwrap_err().to_string().contains("1, 2, not 1, 2, 3"));
        assert!(check(&begun, &[1, 2], 2).unwrap_err().to_string().contains("--replicas"));
    }
}
