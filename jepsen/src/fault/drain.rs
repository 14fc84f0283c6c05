//! A node is emptied, and filled again.

use rand::rngs::StdRng;

use super::targets::{named, victim};
use super::{Begun, NotDone};
use crate::cluster::Cluster;

pub(super) async fn begin(cluster: &Cluster, rng: &mut StdRng) -> Result<Begun, NotDone> {
    let host = victim(cluster, rng)?;
    let name = named(cluster, host);
    let node = cluster.host(host)?.node.to_string();
    let detail = match cluster.ok(&["cluster", "drain", &node, "--no-wait"]).await {
        Ok(_) => format!("{name} is to hold nothing"),
        // It may have been heard all the same, so it has to be taken back.
        Err(error) => format!("{name} is to hold nothing, perhaps: {error}"),
    };
    let cluster = cluster.clone();
    Ok(Begun::new(detail, async move {
        super::heal::undrain(&cluster, &node).await?;
        Ok(format!("node {node} may hold replicas again"))
    }))
}
