//! `bench fire`: how late deliveries are at a steady rate, with any number of other tasks waiting.

use serde_json::{Map, Value, json};

use super::super::ToolError;
use super::super::args::{Global, millis};
use super::super::output::note;
use super::account::{Judgement, Schedule, rate};
use super::args::{FireBench, ProtocolArg};
use super::load::{Registering, micros, now_ms};
use super::report::{Counts, Report};
use super::{Bench, configuration};
use crate::client::Percentiles;

pub(super) async fn run(args: FireBench, global: &Global) -> Result<Report, ToolError> {
    let FireBench { tasks, spread, pending, pending_delay, protocol: ProtocolArg::Tcp, lead, wait, load } = args;
    let configuration = configuration(
        &load,
        json!({
            "tasks": tasks,
            "spread_ms": millis(spread),
            "pending": pending,
            "pending_delay_ms": millis(pending_delay),
            "protocol": "tcp",
            "lead_ms": millis(lead),
            "wait_ms": millis(wait),
        }),
    );
    let bench = Bench::start(&load, global, tasks).await?;
    let waiting = bench.register("registering pending", pending, Schedule::In(millis(pending_delay))).await;
    let first_ms = now_ms() + millis(lead);
    let schedule = Schedule::Spread { first_ms, spread_ms: millis(spread), tasks };
    let mut registering = bench.register("registering", tasks, schedule).await;
    let judgement = bench.wait(&registering.acknowledged, wait).await;

    let mut more = facts(&registering, &judgement);
    let pending_acknowledged = waiting.acknowledged.len() as u64;
    more.insert("pending_acknowledged".into(), json!(pending_acknowledged));
    more.insert("pending_per_second".into(), json!(rate(pending_acknowledged, micros(waiting.took))));
    more.insert("pending_failures".into(), json!(waiting.failures));
    let left = waiting.acknowledged.into_iter().map(|(id, _)| id).chain(judgement.lost.iter().copied()).collect();
    more.insert("cleaned_up".into(), bench.finish(left).await);
    let failures = std::mem::take(&mut registering.failures);
    Ok(Report {
        bench: "fire",
        configuration,
        counts: counts(&registering, &judgement),
        per_second: judgement.per_second(),
        latency_us: Percentiles::of(&registering.latency_us),
        lateness_us: Some(judgement.lateness_us),
        more,
        failures,
    })
}

pub(super) fn counts(registering: &Registering, judgement: &Judgement) -> Counts {
    Counts {
        sent: registering.sent,
        acknowledged: registering.acknowledged.len() as u64,
        fired: judgement.fired,
        lost: judgement.lost.len() as u64,
        early: judgement.early,
        duplicates: judgement.duplicates,
    }
}

/// What `drain` reports as well.
pub(super) fn facts(registering: &Registering, judgement: &Judgement) -> Map<String, Value> {
    if registering.late > 0 {
        note(&format!(
            "{} tasks were due before they were acknowledged, which counts as lateness: a longer --lead avoids it",
            registering.late
        ));
    }
    Map::from_iter([
        ("registered_late".to_owned(), json!(registering.late)),
        ("registering_ms".to_owned(), json!(millis(registering.took))),
        ("duplicates_without_larger_fence".to_owned(), json!(judgement.duplicates_same_fence)),
        ("early_us_max".to_owned(), json!(judgement.early_us_max)),
        ("strays".to_owned(), json!(judgement.strays)),
    ])
}
