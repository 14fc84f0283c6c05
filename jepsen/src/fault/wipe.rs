//! A machine loses its disk and comes back as another node; the old one is missed, and replaced.
//!
//! It lasts until every replica of the lost node is somewhere else: a second one that is lost before would be more than a
//! majority can bear.

use std::time::Duration;

use rand::rngs::StdRng;

use super::targets::{bring_up, named, victim};
use super::{Begun, NotDone};
use crate::cluster::Cluster;

/// Beyond the time for which a node may be away: its replicas are copied.
const REPLACED_WITHIN: Duration = Duration::from_secs(120);

pub(super) async fn begin(cluster: &Cluster, rng: &mut StdRng) -> Result<Begun, NotDone> {
    let host = victim(cluster, rng)?;
    let groups = cluster.groups().await?;
    if let Some(group) = groups.iter().find(|group| group.state != "ok") {
        let why =
            format!("group {} is {}: to lose a disk now might be more than it can bear", group.group, group.state);
        return Err(NotDone::NotNow(why));
    }
    let name = named(cluster, host);
    let (_, new) = cluster.wipe_node(host).await?;
    let cluster = cluster.clone();
    Ok(Begun::new(format!("{name} lost its disk; node {new} takes its place"), async move {
        let took = bring_up(&cluster, host).await?;
        cluster.wait_until_whole(cluster.settings().node_grace + REPLACED_WITHIN).await?;
        Ok(format!("node {new} is ready after {took:.1?}, and every replica is replaced"))
    }))
}
