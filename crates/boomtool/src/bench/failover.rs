//! `bench failover`: how long a shard does not fire when the node that leads it is killed.
//!
//! A cluster of its own on this machine, a steady stream of tasks, and one kill after the other. The gap of a shard is
//! the time between two arrivals: the last one with the fence of the old leader, and the first with that of the new. So
//! every shard must have something due all the time: the tasks have random keys, which spread them evenly.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Map, json};

use super::super::ToolError;
use super::super::args::millis;
use super::account::{Arrival, Schedule, histogram};
use super::args::FailoverBench;
use super::load::{Registering, now_ms};
use super::local::LocalCluster;
use super::report::Report;
use super::{Bench, configuration};
use boomerang_receiver::Percentiles;
use boomerang_task::{Protocol, ShardId};

/// Tasks are registered this far ahead: longer than any gap, so that a gap shows in what fires and not in what is
/// registered.
const LEAD: Duration = Duration::from_secs(8);
const SLICE: Duration = Duration::from_millis(200);
/// How long a killed node's shards have to fire again before the bench gives up on the round.
const FIRES_AGAIN_WITHIN: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(20);

pub(super) async fn run(args: FailoverBench) -> Result<Report, ToolError> {
    let FailoverBench { kills, nodes, pending, rate, pause, wait, server, load } = args;
    let mut cluster = LocalCluster::start(nodes, server, wait, load.quiet).await?;
    let own = json!({ "kills": kills, "pending": pending, "rate": rate, "pause_ms": millis(pause) });
    let configuration = configuration(&load, cluster.configuration(), own);
    let room = rate * (LEAD + (pause + LEAD) * u32::from(kills)).as_secs();
    let bench = Bench::connect(&load, cluster.options(), Protocol::Tcp, room).await?;
    let waiting = bench.register("registering pending", pending, Schedule::In(millis(PENDING_DELAY))).await;
    // Without keys each slice would lie in one shard, and a shard could be silent for seconds without a fault.
    let bench = Arc::new(bench.with_batches(1, true));

    let stop = Arc::new(AtomicBool::new(false));
    let feeding = tokio::spawn(feed(bench.clone(), rate, stop.clone()));
    // Until what was registered first is due.
    tokio::time::sleep(LEAD + pause).await;
    let mut gaps = histogram();
    let mut rounds = Vec::new();
    for kill in 0..kills {
        let victim = usize::from(kill % nodes);
        let before = terms(&bench.arrivals.since(0));
        let seen = bench.arrivals.len();
        let led = bench.clients[0].shards_led_at(&cluster.addresses()[victim]).await?;
        cluster.kill(victim);
        let killed = Instant::now();
        let round = wait_for_new_terms(&bench, seen, &before, &led).await;
        for gap_us in round.values() {
            gaps.saturating_record(*gap_us);
        }
        rounds.push(json!({
            "node": victim + 1,
            "shards": led.len(),
            "fired_again": round.len(),
            "gap_us_max": round.values().max(),
            "took_ms": millis(killed.elapsed()),
        }));
        cluster.restart(victim).await?;
        tokio::time::sleep(pause).await;
    }
    stop.store(true, Ordering::Relaxed);
    let registering = feeding.await.expect("the feeder does not panic");
    let judgement = bench.wait(&registering.acknowledged, wait).await;
    let own = Map::from_iter([
        ("gap_us".to_owned(), json!(Percentiles::of(&gaps))),
        ("gaps".to_owned(), json!(gaps.len())),
        ("rounds".to_owned(), json!(rounds)),
        ("pending_acknowledged".to_owned(), json!(waiting.acknowledged.len())),
        ("pending_failures".to_owned(), json!(waiting.failures)),
    ]);
    let report = Report::of_deliveries("failover", configuration, registering, judgement, true, own);
    drop(cluster);
    Ok(report)
}

const PENDING_DELAY: Duration = Duration::from_secs(3600);

/// Registers `rate` tasks per second, each due [`LEAD`] later, until it is told to stop.
async fn feed(bench: Arc<Bench>, rate: u64, stop: Arc<AtomicBool>) -> Registering {
    let mut all = Registering::new();
    let slice_ms = millis(SLICE);
    let tasks = (rate * slice_ms / 1000).max(1);
    let mut first_ms = now_ms() + millis(LEAD);
    let mut slices = tokio::time::interval(SLICE);
    while !stop.load(Ordering::Relaxed) {
        slices.tick().await;
        let schedule = Schedule::Spread { first_ms, spread_ms: slice_ms, tasks };
        first_ms = (first_ms + slice_ms).max(now_ms() + millis(LEAD) / 2);
        all.absorb(bench.register("firing", tasks, schedule).await);
    }
    all
}

/// The latest term that each shard has fired in.
fn terms(arrivals: &[Arrival]) -> BTreeMap<ShardId, (u64, u64)> {
    let mut terms = BTreeMap::new();
    for arrival in arrivals {
        let (term, last_us) = terms.entry(arrival.task_id.shard()).or_insert((arrival.fence.term, arrival.arrived_us));
        if arrival.fence.term >= *term {
            (*term, *last_us) = (arrival.fence.term, arrival.arrived_us);
        }
    }
    terms
}

/// The gaps of `led`, as soon as all of them have fired in a new term.
async fn wait_for_new_terms(
    bench: &Bench,
    seen: usize,
    before: &BTreeMap<ShardId, (u64, u64)>,
    led: &[ShardId],
) -> BTreeMap<ShardId, u64> {
    let deadline = Instant::now() + FIRES_AGAIN_WITHIN;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let mut last: BTreeMap<ShardId, (u64, u64)> = before.clone();
        let mut gaps = BTreeMap::new();
        for arrival in bench.arrivals.since(seen) {
            let shard = arrival.task_id.shard();
            if gaps.contains_key(&shard) || !led.contains(&shard) {
                continue;
            }
            match last.get(&shard) {
                Some((term, last_us)) if arrival.fence.term > *term => {
                    gaps.insert(shard, arrival.arrived_us.saturating_sub(*last_us));
                }
                Some((term, _)) if arrival.fence.term < *term => {}
                _ => {
                    last.insert(shard, (arrival.fence.term, arrival.arrived_us));
                }
            }
        }
        if gaps.len() == led.len() || Instant::now() > deadline {
            return gaps;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use boomerang_client::fake::task_id;
    use boomerang_task::Fence;

    #[test]
    fn the_latest_term_of_a_shard_counts() {
        let arrival = |term, arrived_us| Arrival {
            task_id: task_id(1),
            occurrence: 0,
            fence: Fence { term, seq: 1 },
            arrived_us,
        };
        // A stale delivery of the old leader comes last.
        let terms = terms(&[arrival(2, 10), arrival(3, 30), arrival(2, 40)]);
        assert_eq!(terms.into_values().collect::<Vec<_>>(), [(3, 30)]);
    }
}
