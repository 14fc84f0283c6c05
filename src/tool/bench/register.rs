//! `bench register`: registrations per second, and the latency of each from submit to answer.

use serde_json::{Map, json};

use super::super::ToolError;
use super::super::args::{Global, millis};
use super::account::{Schedule, rate};
use super::args::RegisterBench;
use super::load::micros;
use super::report::{Counts, Report};
use super::{Bench, configuration};
use crate::client::Percentiles;
use crate::task::Protocol;

pub(super) async fn run(args: RegisterBench, global: &Global) -> Result<Report, ToolError> {
    let configuration =
        configuration(&args.load, json!({ "tasks": args.tasks, "delay_ms": millis(args.delay), "batch": args.batch }));
    // Nothing fires unless the delay is shorter than the bench, so no room is kept for it.
    let bench = Bench::start(&args.load, global.options(), Protocol::Tcp, 0).await?.with_batches(args.batch);
    let registering = bench.register("registering", args.tasks, Schedule::In(millis(args.delay))).await;
    let acknowledged = registering.acknowledged.len() as u64;
    // No delivery is waited for, so none is lost.
    let judgement = bench.arrivals.judge(&registering.acknowledged);
    let left = judgement.lost;
    let cleaned_up = bench.finish(left).await;
    Ok(Report {
        bench: "register",
        configuration,
        counts: Counts {
            sent: registering.sent,
            acknowledged,
            fired: judgement.fired,
            lost: 0,
            early: judgement.early,
            duplicates: judgement.duplicates,
        },
        per_second: rate(acknowledged, micros(registering.took)),
        latency_us: Percentiles::of(&registering.latency_us),
        lateness_us: None,
        more: Map::from_iter([
            ("took_ms".to_owned(), json!(millis(registering.took))),
            ("cleaned_up".to_owned(), cleaned_up),
        ]),
        failures: registering.failures,
    })
}
