//! Whom a fault hits, and how a machine comes back.

use std::time::{Duration, Instant};

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};

use super::NotDone;
use crate::cluster::links::Host;
use crate::cluster::{Cluster, ClusterError, State};

/// A node that starts reads its log, hears from the others, and takes part: longer than that on a busy machine.
pub const READY_WITHIN: Duration = Duration::from_secs(90);
/// A node that is not ready by then may wait for something that another fault has taken away.
const TRY_FOR: Duration = Duration::from_secs(30);

/// Machines whose nodes run.
pub fn up(cluster: &Cluster) -> Vec<Host> {
    cluster.hosts().into_iter().filter(|view| view.state == State::Up).map(|view| view.host).collect()
}

/// A machine that runs; more often than not one that leads something.
pub fn victim(cluster: &Cluster, rng: &mut StdRng) -> Result<Host, NotDone> {
    // Both are drawn in any case, so that the schedule does not depend on what is there.
    let (leads, by_group, at_random) = (rng.random_bool(0.75), rng.random::<u64>(), rng.random::<u64>());
    let up = up(cluster);
    if up.is_empty() {
        return Err(NotDone::NotNow("no node runs".into()));
    }
    let leaders: Vec<u64> = cluster.leaders().values().map(|leader| leader.node).collect();
    let leader = pick(&leaders, by_group).and_then(|node| cluster.node(*node)).map(|view| view.host);
    match leader.filter(|host| leads && up.contains(host)) {
        Some(host) => Ok(host),
        None => Ok(*pick(&up, at_random).expect("it is not empty")),
    }
}

fn pick<T>(from: &[T], number: u64) -> Option<&T> {
    let count = u64::try_from(from.len()).expect("a small number");
    from.get(usize::try_from(number.checked_rem(count)?).expect("smaller than the count"))
}

/// All machines in a random order.
pub fn shuffled(cluster: &Cluster, rng: &mut StdRng) -> Vec<Host> {
    let mut hosts: Vec<Host> = cluster.places().collect();
    hosts.shuffle(rng);
    hosts
}

pub fn one_of<T: Copy>(rng: &mut StdRng, of: &[T]) -> T {
    *of.choose(rng).expect("there is something to choose from")
}

/// Which machine, and which node that is now.
pub fn named(cluster: &Cluster, host: Host) -> String {
    let leads = |node| {
        cluster.leaders().iter().filter(|(_, leader)| leader.node == node).map(|(group, _)| *group).collect::<Vec<_>>()
    };
    match cluster.host(host) {
        Ok(view) => format!("node {} (machine {host}, leads groups {:?})", view.node, leads(view.node)),
        Err(error) => error.to_string(),
    }
}

/// Starts the node of a machine and waits until it is ready; again, when it gives up by itself.
pub async fn bring_up(cluster: &Cluster, host: Host) -> Result<Duration, ClusterError> {
    let begun = Instant::now();
    loop {
        cluster.start_node(host).await?;
        match cluster.wait_until_ready(host, TRY_FOR).await {
            Ok(()) => return Ok(begun.elapsed()),
            Err(error) if begun.elapsed() > READY_WITHIN => return Err(error),
            // It may have ended, and may not end the next time.
            Err(_) => {}
        }
    }
}
