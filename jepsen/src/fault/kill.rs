//! SIGKILL, and after a while a start on what is on disk.

use rand::rngs::StdRng;

use super::targets::{named, victim};
use super::{Begun, NotDone};
use crate::cluster::Cluster;

pub(super) async fn begin(cluster: &Cluster, rng: &mut StdRng) -> Result<Begun, NotDone> {
    let host = victim(cluster, rng)?;
    let name = named(cluster, host);
    cluster.kill_node(host).await?;
    Ok(Begun::down(format!("{name} killed"), cluster, vec![host]))
}
