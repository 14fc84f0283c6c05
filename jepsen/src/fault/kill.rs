//! SIGKILL, and after a while a start on what is on disk.

use rand::rngs::StdRng;

use super::targets::{bring_up, named, victim};
use super::{Begun, NotDone};
use crate::cluster::Cluster;

pub(super) async fn begin(cluster: &Cluster, rng: &mut StdRng) -> Result<Begun, NotDone> {
    let host = victim(cluster, rng)?;
    let name = named(cluster, host);
    cluster.kill_node(host).await?;
    let cluster = cluster.clone();
    Ok(Begun::new(format!("{name} killed"), async move {
        let took = bring_up(&cluster, host).await?;
        Ok(format!("machine {host} is ready again, after {took:.1?}"))
    }))
}
