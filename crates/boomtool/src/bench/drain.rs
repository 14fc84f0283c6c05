//! `bench drain`: how fast tasks go out that are all due at one instant.

use std::time::Duration;

use serde_json::{Map, json};

use super::super::ToolError;
use super::super::args::{Global, millis};
use super::account::Schedule;
use super::args::DrainBench;
use super::load::now_ms;
use super::local::Nodes;
use super::report::Report;
use super::{Bench, configuration};
use boomerang_task::Protocol;

/// How fast a node is trusted to register, when no `--lead` is given.
const REGISTERED_PER_MS: u64 = 5;
const LEAD_MS_MIN: u64 = 2_000;

pub(super) async fn run(args: DrainBench, global: &Global) -> Result<Report, ToolError> {
    let DrainBench { tasks, lead, wait, own, load } = args;
    let nodes = Nodes::of(own, global, load.quiet).await?;
    let lead = lead.unwrap_or_else(|| lead_for(tasks));
    let own = json!({ "tasks": tasks, "lead_ms": millis(lead), "wait_ms": millis(wait) });
    let configuration = configuration(&load, nodes.configuration(), own);
    let bench = Bench::start(&load, &nodes, Protocol::Tcp, tasks).await?;
    let begun = nodes.reading().await?;
    let schedule = Schedule::Spread { first_ms: now_ms() + millis(lead), spread_ms: 0, tasks };
    let registering = bench.register("registering", tasks, schedule).await;
    let registered = nodes.cost_since(begun, registering.acknowledged.len() as u64).await?;
    let before = nodes.reading().await?;
    let judgement = bench.wait(&registering.acknowledged, wait).await;
    let cost = nodes.cost_since(before, judgement.fired).await?;
    let mut own = Map::from_iter([("draining_us".to_owned(), json!(judgement.last_us - judgement.first_us))]);
    own.extend(registered.into_iter().map(|(name, value)| (format!("registering_{name}"), value)));
    own.extend(cost);
    own.insert("cleaned_up".to_owned(), bench.finish(judgement.lost.clone()).await);
    Ok(Report::of_deliveries("drain", configuration, registering, judgement, load.faults, own))
}

fn lead_for(tasks: u64) -> Duration {
    Duration::from_millis(LEAD_MS_MIN + tasks / REGISTERED_PER_MS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lead_grows_with_the_tasks() {
        assert_eq!([0, 5_000, 100_000].map(lead_for), [2, 3, 22].map(Duration::from_secs));
    }
}
