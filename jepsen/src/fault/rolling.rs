//! SIGTERM to one node after the other, each started again and waited for before the next: an upgrade.

use std::time::Duration;

use rand::rngs::StdRng;

use super::targets::{bring_up, shuffled};
use super::{Begun, NotDone};
use crate::cluster::links::Host;
use crate::cluster::{Cluster, ClusterError};

/// A node that stops hands over and settles what is out.
const STOP_WITHIN: Duration = Duration::from_secs(40);

/// It goes on by itself from its beginning; its end is when the last node is ready.
pub(super) fn begin(cluster: &Cluster, rng: &mut StdRng) -> Result<Begun, NotDone> {
    let hosts = shuffled(cluster, rng);
    let detail = format!("machines in the order {hosts:?}");
    let restarting = tokio::spawn(restart(cluster.clone(), hosts));
    Ok(Begun::new(detail, async move { restarting.await.expect("restarting nodes does not panic") }))
}

async fn restart(cluster: Cluster, hosts: Vec<Host>) -> Result<String, ClusterError> {
    let mut how = Vec::new();
    for host in hosts {
        let code = cluster.terminate_node(host, STOP_WITHIN).await?;
        let took = bring_up(&cluster, host).await?;
        let stopped = code.map_or_else(|| "had to be killed".to_owned(), |code| format!("exit {code}"));
        how.push(format!("machine {host}: {stopped}, ready after {took:.1?}"));
    }
    Ok(how.join("; "))
}
