//! More nodes than a majority can miss, killed at one moment: nothing can be acknowledged until they are back, and nothing that was
//! may be lost.

use futures::future::try_join_all;
use rand::rngs::StdRng;

use super::targets::{bring_up, shuffled};
use super::{Begun, NotDone};
use crate::cluster::Cluster;
use crate::cluster::links::Host;

pub(super) async fn begin(cluster: &Cluster, rng: &mut StdRng) -> Result<Begun, NotDone> {
    let hosts = shuffled(cluster, rng);
    let victims: Vec<Host> = hosts[..hosts.len() / 2 + 1].to_vec();
    try_join_all(victims.iter().map(|host| cluster.kill_node(*host))).await?;
    let (detail, cluster) = (format!("machines {victims:?} killed"), cluster.clone());
    Ok(Begun::new(detail, async move {
        // Together: none of them may be ready alone.
        let took = try_join_all(victims.iter().map(|host| bring_up(&cluster, *host))).await?;
        Ok(format!("machines {victims:?} are ready again, after {:.1?}", took.into_iter().max().unwrap_or_default()))
    }))
}
