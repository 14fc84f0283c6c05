//! `bench fire`: how late deliveries are at a steady rate, with any number of other tasks waiting.

use serde_json::{Map, json};

use super::super::ToolError;
use super::super::args::{Global, millis};
use super::account::{Schedule, rate};
use super::args::FireBench;
use super::load::{micros, now_ms};
use super::local::Nodes;
use super::report::Report;
use super::{Bench, configuration};
use boomerang_task::Protocol;

pub(super) async fn run(args: FireBench, global: &Global) -> Result<Report, ToolError> {
    let FireBench { tasks, spread, pending, pending_delay, protocol, lead, wait, own, load } = args;
    let protocol = Protocol::from(protocol);
    let nodes = Nodes::of(own, global, load.quiet).await?;
    let own = json!({
        "tasks": tasks,
        "spread_ms": millis(spread),
        "pending": pending,
        "pending_delay_ms": millis(pending_delay),
        "protocol": protocol.to_string(),
        "lead_ms": millis(lead),
        "wait_ms": millis(wait),
    });
    let configuration = configuration(&load, nodes.configuration(), own);
    let bench = Bench::start(&load, &nodes, protocol, tasks).await?;
    let waiting = bench.register("registering pending", pending, Schedule::In(millis(pending_delay))).await;
    let before = nodes.reading().await?;
    let first_ms = now_ms() + millis(lead);
    let schedule = Schedule::Spread { first_ms, spread_ms: millis(spread), tasks };
    let registering = bench.register("registering", tasks, schedule).await;
    let judgement = bench.wait(&registering.acknowledged, wait).await;
    let cost = nodes.cost_since(before, judgement.fired).await?;

    let pending_acknowledged = waiting.acknowledged.len() as u64;
    let left = waiting.acknowledged.into_iter().map(|(id, _)| id).chain(judgement.lost.iter().copied()).collect();
    let mut own = Map::from_iter([
        ("pending_acknowledged".to_owned(), json!(pending_acknowledged)),
        ("pending_per_second".to_owned(), json!(rate(pending_acknowledged, micros(waiting.took)))),
        ("pending_failures".to_owned(), json!(waiting.failures)),
    ]);
    own.extend(cost);
    own.insert("cleaned_up".to_owned(), bench.finish(left).await);
    Ok(Report::of_deliveries("fire", configuration, registering, judgement, load.faults, own))
}
