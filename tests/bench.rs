//! `boomtool bench` with nodes of its own: it starts and stops them, and reports what they counted.

mod common;

use std::process::{Output, Stdio};

use boomerang::sabotage::{self, Fault};
use serde_json::Value;

fn run(line: &str, variables: &[(&str, &str)]) -> (Output, String) {
    let mut command = common::node::boomtool();
    command.args(["bench"]).args(line.split_whitespace()).args(["--quiet", "--json"]);
    // It is not the one that the bench starts.
    command.env("BOOMERANG_ADDR", "127.0.0.1:1").env("BOOMERANG_PEERS", "1=127.0.0.1:1").stdin(Stdio::null());
    let output = command.envs(variables.iter().copied()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output, said)
}

/// The report of a bench that must succeed.
fn bench(line: &str) -> Value {
    let (output, said) = run(line, &[]);
    assert!(output.status.success(), "boomtool bench {line} ended with {}: {said}", output.status);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{line}: {error}: {said}"))
}

fn number(report: &Value, path: &str) -> f64 {
    report.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {path} in {report}"))
}

#[test]
fn a_cluster_lives_as_long_as_the_bench_and_says_what_it_cost() {
    let report = bench("register --nodes 3 --shards 6 --tasks 3000 --batch 100 --connections 2 --inflight 2 --keys");
    assert_eq!((number(&report, "/configuration/nodes"), number(&report, "/configuration/shards")), (3.0, 6.0));
    assert_eq!(number(&report, "/acknowledged"), 3000.0, "all that was sent is accepted: {report}");
    // Others may be at work where this runs.
    assert!(number(&report, "/leader_changes") >= 0.0);
    for cost in ["node_cpu_ms", "tool_cpu_ms", "log_syncs", "log_appends"] {
        assert!(number(&report, &format!("/cost_per_1000/{cost}")) > 0.0, "{cost}: {report}");
    }
    assert_eq!(report["slices"].as_array().unwrap().len(), 10, "slices of time: {}", report["slices"]);
    assert!(report["cleaned_up"].is_null(), "nodes of its own need no cleaning up: {}", report["cleaned_up"]);
}

#[test]
fn one_node_is_alone() {
    let report = bench("drain --nodes 1 --shards 2 --tasks 1000 --lead 2s --node-flag=--window=10m");
    assert_eq!((number(&report, "/fired"), number(&report, "/duplicates_without_a_fault")), (1000.0, 0.0));
    assert!(number(&report, "/registering_cost_per_1000/log_syncs") > 0.0, "{report}");
    assert_eq!(report["configuration"]["node_flags"], "--window=10m");
}

#[test]
fn an_overload_finds_beats_that_wait_behind_work() {
    if !cfg!(debug_assertions) {
        return;
    }
    let line = "overload --kinds single,batch,fire,edit,cancel --calibrate 1s --time 8s --wait 20s";
    let (output, said) = run(line, &[(sabotage::VARIABLE, Fault::BeatsBehindWork.name())]);
    assert_eq!(output.status.code(), Some(1), "the exit code when a promise is broken: {said}");
    assert!(said.contains("leases ran out"), "the broken promise is named: {said}");
}
