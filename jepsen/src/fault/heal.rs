//! Everything back as it should be, whatever a fault may have left.

use std::time::Duration;

use super::{clock, disk_full, targets};
use crate::cluster::{Cluster, ClusterError, Reported, Skew};
use crate::history::What;
use crate::patience;

/// A cluster that is whole within this time after the last fault is healthy enough.
const WHOLE_WITHIN: Duration = Duration::from_secs(180);
const HEARD_WITHIN: Duration = Duration::from_secs(60);
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(500);

/// Links whole, disks with room, clocks right, etcd and all nodes up; then waits until every shard is whole, and writes that
/// down.
pub async fn heal(cluster: &Cluster) -> Result<(), ClusterError> {
    if let Some(wire) = cluster.wire() {
        wire.lift_all();
    }
    cluster.start_etcd().await?;
    for host in cluster.places() {
        cluster.continue_node(host)?;
        disk_full::make_room(cluster, host)?;
        cluster.set_clock(host, Skew::default())?;
        // All before the first is waited for: none of them may be ready alone.
        cluster.start_node(host).await?;
    }
    for host in cluster.places() {
        if cluster.clock_touched(host)? {
            clock::set_right(cluster, host).await?;
        } else {
            targets::bring_up(cluster, host).await?;
        }
    }
    for node in drained(cluster).await? {
        undrain(cluster, &node).await?;
    }
    cluster.wait_until_whole(WHOLE_WITHIN).await?;
    cluster.recorder().record(What::Healed);
    Ok(())
}

/// Nodes that are to hold nothing.
async fn drained(cluster: &Cluster) -> Result<Vec<String>, ClusterError> {
    let told = insist(cluster, &["cluster", "status"]).await?;
    let draining = told.lines.iter().filter(|line| line["draining"] == true);
    Ok(draining.filter_map(|line| line["node_id"].as_u64()).map(|node| node.to_string()).collect())
}

/// A node may hold replicas again.
pub(super) async fn undrain(cluster: &Cluster, node: &str) -> Result<(), ClusterError> {
    insist(cluster, &["cluster", "undrain", node]).await.map(drop)
}

/// Until it is said and heard: etcd may be away, or a leader.
async fn insist(cluster: &Cluster, args: &[&str]) -> Result<Reported, ClusterError> {
    patience::insist(HEARD_WITHIN, TRY_AGAIN_AFTER, || cluster.ok(args)).await
}
