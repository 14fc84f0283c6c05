//! A schedule, done to a cluster and written down.

use std::time::Duration;

use futures::future::join_all;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio_util::sync::CancellationToken;

use super::schedule::{Planned, Schedule};
use super::{Kind, NotDone};
use crate::cluster::Cluster;
use crate::history::{FaultNote, Stage, What};

/// Does what `seed` says, of `kinds` those that are possible here, until `stop`; what has begun by then is ended before this
/// returns. Returns how many faults have begun. [`heal`](super::heal()) comes after it.
pub async fn run(cluster: &Cluster, seed: u64, kinds: &[Kind], stop: &CancellationToken) -> u64 {
    let mut possible = Vec::new();
    for kind in kinds {
        match kind.impossible(cluster) {
            None => possible.push(*kind),
            Some(why) => note(cluster, *kind, Stage::Note, format!("not done: {why}")),
        }
    }
    let mut begun = 0;
    for round in Schedule::new(seed, &possible) {
        if stop.is_cancelled() {
            break;
        }
        let faults = round.faults.iter().map(|planned| one(cluster, planned, stop));
        begun += join_all(faults).await.into_iter().map(u64::from).sum::<u64>();
        wait(round.rest, stop).await;
    }
    begun
}

/// One fault, from its instant to its end. Whether it began.
async fn one(cluster: &Cluster, planned: &Planned, stop: &CancellationToken) -> bool {
    wait(planned.after, stop).await;
    if stop.is_cancelled() {
        return false;
    }
    let kind = planned.kind;
    let begun = match kind.begin(cluster, &mut StdRng::seed_from_u64(planned.seed)).await {
        Ok(begun) => begun,
        Err(NotDone::NotNow(why)) => {
            note(cluster, kind, Stage::Note, format!("not done: {why}"));
            return false;
        }
        Err(NotDone::Cluster(error)) => {
            note(cluster, kind, Stage::Note, format!("could not be done: {error}"));
            return false;
        }
    };
    note(cluster, kind, Stage::Begin, begun.detail);
    wait(planned.lasts, stop).await;
    match begun.end.await {
        Ok(detail) => note(cluster, kind, Stage::End, detail),
        // It is over all the same: healing finds out whether the cluster is.
        Err(error) => note(cluster, kind, Stage::End, format!("did not end well: {error}")),
    }
    true
}

async fn wait(time: Duration, stop: &CancellationToken) {
    let _ = stop.run_until_cancelled(tokio::time::sleep(time)).await;
}

fn note(cluster: &Cluster, kind: Kind, stage: Stage, detail: String) {
    tracing::info!(%kind, ?stage, "{detail}");
    cluster.recorder().record(What::Fault(FaultNote { fault: kind.name(), stage, detail }));
}
