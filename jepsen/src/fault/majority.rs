//! More nodes than a majority can miss, killed at one moment: nothing can be acknowledged until they are back, and nothing that was
//! may be lost.

use futures::future::try_join_all;
use rand::rngs::StdRng;

use super::targets::shuffled;
use super::{Begun, NotDone};
use crate::cluster::Cluster;
use crate::cluster::links::Host;

pub(super) async fn begin(cluster: &Cluster, rng: &mut StdRng) -> Result<Begun, NotDone> {
    let hosts = shuffled(cluster, rng);
    let victims: Vec<Host> = hosts[..hosts.len() / 2 + 1].to_vec();
    try_join_all(victims.iter().map(|host| cluster.kill_node(*host))).await?;
    Ok(Begun::down(format!("machines {victims:?} killed"), cluster, victims))
}
