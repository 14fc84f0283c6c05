//! A node is emptied, and filled again.

use rand::rngs::StdRng;

use super::targets::{named, victim};
use super::{Begun, NotDone};
use crate::cluster::Cluster;

pub(super) async fn begin(cluster: &Cluster, rng: &mut StdRng) -> Result<Begun, NotDone> {
    let host = victim(cluster, rng)?;
    let detail = format!("{} is to hold nothing", named(cluster, host));
    let node = cluster.host(host)?.node.to_string();
    cluster.ok(&["cluster", "drain", &node, "--no-wait"]).await?;
    let cluster = cluster.clone();
    Ok(Begun::new(detail, async move {
        super::heal::undrain(&cluster, &node).await?;
        Ok(format!("node {node} may hold replicas again"))
    }))
}
