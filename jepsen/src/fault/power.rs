//! The power is cut: a process that is killed leaves what it wrote to the kernel, a machine without power only what was
//! synced. One machine, or all of them at the same moment.
//!
//! The node is killed, and its disk is put back to what the file system had sent to it by then. All at once, this is what
//! shows that an answer has waited for the disk: nobody else has what is lost.

use rand::rngs::StdRng;

use super::targets::{named, victim};
use super::{Begun, NotDone};
use crate::cluster::Cluster;
use crate::cluster::links::Host;

pub(super) async fn one(cluster: &Cluster, rng: &mut StdRng) -> Result<Begun, NotDone> {
    let host = victim(cluster, rng)?;
    let name = named(cluster, host);
    cut(cluster, vec![host], format!("{name} without power")).await
}

pub(super) async fn all(cluster: &Cluster) -> Result<Begun, NotDone> {
    cut(cluster, cluster.places().collect(), "every machine without power".into()).await
}

async fn cut(cluster: &Cluster, hosts: Vec<Host>, detail: String) -> Result<Begun, NotDone> {
    cluster.cut_power(&hosts).await?;
    Ok(Begun::down(detail, cluster, hosts))
}
