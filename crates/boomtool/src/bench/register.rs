//! `bench register`: registrations per second, and the latency of each from submit to answer.

use serde_json::{Map, json};

use super::super::ToolError;
use super::super::args::{Global, millis};
use super::account::{Schedule, rate, slices};
use super::args::RegisterBench;
use super::load::micros;
use super::local::Nodes;
use super::report::{Counts, Report};
use super::{Bench, configuration};
use boomerang_receiver::Percentiles;
use boomerang_task::Protocol;

pub(super) async fn run(args: RegisterBench, global: &Global) -> Result<Report, ToolError> {
    let RegisterBench { tasks, delay, batch, keys, own, load } = args;
    let nodes = Nodes::of(own, global, load.quiet).await?;
    let own = json!({ "tasks": tasks, "delay_ms": millis(delay), "batch": batch, "keys": keys });
    let configuration = configuration(&load, nodes.configuration(), own);
    // Nothing fires unless the delay is shorter than the bench, so no room is kept for it.
    let bench = Bench::start(&load, &nodes, Protocol::Tcp, 0).await?.with_batches(batch, keys);
    let before = nodes.reading().await?;
    let registering = bench.register("registering", tasks, Schedule::In(millis(delay))).await;
    let cost = nodes.cost_since(before, registering.acknowledged.len() as u64).await?;
    let acknowledged = registering.acknowledged.len() as u64;
    // No delivery is waited for, so none is lost.
    let judgement = bench.arrivals.judge(&registering.acknowledged);
    let left = judgement.lost;
    let mut more = Map::from_iter([
        ("took_ms".to_owned(), json!(millis(registering.took))),
        ("slices".to_owned(), json!(slices(registering.answered_us))),
    ]);
    more.extend(cost);
    more.insert("cleaned_up".to_owned(), bench.finish(left).await);
    Ok(Report {
        bench: "register",
        configuration,
        counts: Counts {
            sent: registering.sent,
            acknowledged,
            refused: registering.refused,
            fired: judgement.fired,
            lost: 0,
            early: judgement.early,
            duplicates: judgement.duplicates,
        },
        per_second: rate(acknowledged, micros(registering.took)),
        latency_us: Percentiles::of(&registering.latency_us),
        lateness_us: None,
        faults: load.faults,
        wrong: Vec::new(),
        more,
        failures: registering.failures,
    })
}
