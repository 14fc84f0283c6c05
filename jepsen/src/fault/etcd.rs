//! etcd killed, or cut off from the nodes: nothing is placed any more, and everything else goes on.

use rand::RngExt;
use rand::rngs::StdRng;

use super::targets::shuffled;
use super::{Begun, NotDone};
use crate::cluster::Cluster;
use crate::cluster::links::cut_apart;

pub(super) async fn kill(cluster: &Cluster) -> Result<Begun, NotDone> {
    cluster.kill_etcd().await;
    let cluster = cluster.clone();
    Ok(Begun::new("etcd killed", async move {
        cluster.start_etcd().await?;
        Ok("etcd is ready again".into())
    }))
}

/// From all nodes, or from some.
pub(super) fn cut(cluster: &Cluster, rng: &mut StdRng) -> Result<Begun, NotDone> {
    let wire = cluster.wire().ok_or_else(|| NotDone::NotNow("there is no network to cut".into()))?;
    let (all, hosts) = (rng.random_bool(0.5), shuffled(cluster, rng));
    let count = if all { hosts.len() } else { rng.random_range(1..=hosts.len()) };
    let layer = cut_apart(&[wire.etcd()], &hosts[..count]);
    Ok(super::links::lay(cluster, wire, layer, format!("etcd cut off from machines {:?}", &hosts[..count])))
}
