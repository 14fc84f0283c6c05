//! A schedule, done to a cluster and written down; with what it takes between rounds for the next to find all nodes there.

use std::time::Duration;

use futures::future::join_all;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio_util::sync::CancellationToken;

use super::schedule::{Planned, Schedule};
use super::targets::bring_up;
use super::{Kind, NotDone};
use crate::cluster::links::Host;
use crate::cluster::{Cluster, ClusterError, State, View};
use crate::history::{FaultNote, Stage, What};

/// What is written down under this name is no fault, but what was done between two rounds.
const MEND: &str = "mend";
/// Beyond the time for which a node may be away: what it held is copied.
const WHOLE_WITHIN: Duration = Duration::from_secs(120);

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
        let went = join_all(faults).await;
        begun += went.iter().map(|went| u64::from(went.begun)).sum::<u64>();
        if !stop.is_cancelled() {
            mend(cluster, went.iter().all(|went| went.well)).await;
        }
        wait(round.rest, stop).await;
    }
    begun
}

/// How a fault went.
struct Went {
    begun: bool,
    /// Nothing is left of it.
    well: bool,
}

/// One fault, from its instant to its end.
async fn one(cluster: &Cluster, planned: &Planned, stop: &CancellationToken) -> Went {
    wait(planned.after, stop).await;
    if stop.is_cancelled() {
        return Went { begun: false, well: true };
    }
    let kind = planned.kind;
    let begun = match kind.begin(cluster, &mut StdRng::seed_from_u64(planned.seed)).await {
        Ok(begun) => begun,
        Err(NotDone::NotNow(why)) => {
            note(cluster, kind, Stage::Note, format!("not done: {why}"));
            return Went { begun: false, well: true };
        }
        Err(NotDone::Cluster(error)) => {
            note(cluster, kind, Stage::Note, format!("could not be done: {error}"));
            return Went { begun: false, well: false };
        }
    };
    note(cluster, kind, Stage::Begin, begun.detail);
    wait(planned.lasts, stop).await;
    let ended = begun.end.await;
    let well = ended.is_ok();
    // It is over all the same: mending, and healing in the end, find out whether the cluster is.
    let detail = ended.unwrap_or_else(|error| format!("did not end well: {error}"));
    note(cluster, kind, Stage::End, detail);
    Went { begun: true, well }
}

/// Brings up whoever is down when every fault of a round is over, so that the next round does not hit a cluster that is short
/// already: a fault that began by half or did not end `well` has left it so, or a node ended by itself.
async fn mend(cluster: &Cluster, well: bool) {
    // One that was given up while it began may begin still.
    let is_down = |view: &View| view.pid.is_none() || !well && view.state != State::Up;
    let down: Vec<Host> = cluster.hosts().iter().filter(|view| is_down(view)).map(|view| view.host).collect();
    if well && down.is_empty() {
        return;
    }
    let detail = match bring_back(cluster, &down).await {
        Ok(()) => format!("machines {down:?} were down after the round, and are ready again; every shard is whole"),
        Err(error) => format!("machines {down:?} were down after the round, and not all is well again: {error}"),
    };
    tracing::info!("{detail}");
    cluster.recorder().record(What::Fault(FaultNote { fault: MEND.to_owned(), stage: Stage::Note, detail }));
}

/// Together: none of them may be ready alone.
async fn bring_back(cluster: &Cluster, down: &[Host]) -> Result<(), ClusterError> {
    let brought = join_all(down.iter().map(|host| bring_up(cluster, *host))).await;
    brought.into_iter().collect::<Result<Vec<_>, _>>()?;
    cluster.wait_until_whole(cluster.settings().node_grace + WHOLE_WITHIN).await
}

async fn wait(time: Duration, stop: &CancellationToken) {
    let _ = stop.run_until_cancelled(tokio::time::sleep(time)).await;
}

fn note(cluster: &Cluster, kind: Kind, stage: Stage, detail: String) {
    tracing::info!(%kind, ?stage, "{detail}");
    cluster.recorder().record(What::Fault(FaultNote { fault: kind.name().to_owned(), stage, detail }));
}
