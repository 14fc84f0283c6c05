//! SIGSTOP and SIGCONT: a process that does nothing for a while and does not know it.

use rand::rngs::StdRng;

use super::targets::{named, victim};
use super::{Begun, NotDone};
use crate::cluster::Cluster;

pub(super) fn begin(cluster: &Cluster, rng: &mut StdRng) -> Result<Begun, NotDone> {
    let host = victim(cluster, rng)?;
    let name = named(cluster, host);
    cluster.pause_node(host)?;
    let cluster = cluster.clone();
    Ok(Begun::new(format!("{name} stands still"), async move {
        cluster.continue_node(host)?;
        Ok(format!("machine {host} goes on"))
    }))
}
