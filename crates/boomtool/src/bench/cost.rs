//! What a phase of a bench cost: what its nodes counted meanwhile, and the processor time of their processes and ours.
//!
//! Everything is read from outside: counts from `/metrics`, processor time and memory from `/proc`. Two readings and a
//! number of tasks are a cost.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::account::rounded;
use super::local::Leaders;

/// What `/proc` counts processor time in, for programs, on every Linux that Boomerang runs on.
const TICK_MS: u64 = 10;

/// Counts of the log, and of what nodes say to each other: what begins so is reported, by whatever name it goes on.
const COUNTED: [&str; 2] = ["boomerang_log_", "boomerang_peer_"];
const LEASES_LOST: &str = "boomerang_leases_lost_total";

/// What nodes have used and done since they were started, all of them together.
#[derive(Debug, Clone, Default)]
pub(super) struct Reading {
    pub node_cpu_ms: u64,
    pub tool_cpu_ms: u64,
    /// By the name that the node gives them.
    pub counts: BTreeMap<String, f64>,
    pub leases_lost: u64,
    /// Of each group, as of this moment.
    pub leaders: Leaders,
}

impl Reading {
    /// Adds what one node shows at `/metrics`.
    pub fn add_metrics(&mut self, text: &str) {
        for (name, value) in counts(text) {
            *self.counts.entry(name.to_owned()).or_default() += value;
        }
        self.leases_lost += metric(text, LEASES_LOST).unwrap_or(0);
    }

    /// What happened from `before` until now: `cost_per_1000` of so many tasks, and how often another term began and a lease
    /// ran out.
    pub fn since(&self, before: &Self, tasks: u64) -> Map<String, Value> {
        let each = |amount: f64| json!(rounded(amount * 1_000.0 / tasks.max(1) as f64, 3));
        let mut cost = Map::from_iter([
            ("node_cpu_ms".to_owned(), each(self.node_cpu_ms.saturating_sub(before.node_cpu_ms) as f64)),
            ("tool_cpu_ms".to_owned(), each(self.tool_cpu_ms.saturating_sub(before.tool_cpu_ms) as f64)),
        ]);
        for (name, now) in &self.counts {
            let shown = name.trim_start_matches("boomerang_").trim_end_matches("_total");
            cost.insert(shown.to_owned(), each(now - before.counts.get(name).copied().unwrap_or(0.0)));
        }
        Map::from_iter([
            ("cost_per_1000".to_owned(), Value::Object(cost)),
            ("leader_changes".to_owned(), json!(changes(&before.leaders, &self.leaders))),
            ("leases_lost".to_owned(), json!(self.leases_lost.saturating_sub(before.leases_lost))),
        ])
    }
}

/// How many terms began between two looks.
pub(super) fn changes(before: &Leaders, after: &Leaders) -> u64 {
    let began = |(group, lead): (_, &super::local::Lead)| {
        lead.term.saturating_sub(before.get(group).map_or(0, |lead| lead.term))
    };
    after.iter().map(began).sum()
}

/// The counts among the metrics of a node.
fn counts(text: &str) -> impl Iterator<Item = (&str, f64)> {
    text.lines().filter_map(|line| {
        let (name, value) = line.split_once(' ')?;
        let counted = COUNTED.iter().any(|begin| name.starts_with(begin));
        (counted && !name.contains('{')).then_some((name, value.parse().ok()?))
    })
}

/// What a node shows under this name.
pub(super) fn metric(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

/// The largest resident memory that a process ever had; 0 of one that is not there.
pub(super) fn memory_peak_bytes(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap_or(0) * 1024
}

/// The processor time that a process has used; 0 of one that is not there.
pub(super) fn processor_ms(process: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // The name of the program may hold anything but stands in parentheses; `utime` and `stime` are the 14th and 15th.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = fields.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok());
    ticks.sum::<u64>() * TICK_MS
}

#[cfg(test)]
mod tests {
    use super::super::local::Lead;
    use super::*;

    const METRICS: &str = "\
# HELP boomerang_log_syncs Times the log was synced to disk.
# TYPE boomerang_log_syncs gauge
boomerang_log_syncs 40
boomerang_log_appends 100
boomerang_peer_messages_total 7
boomerang_peer_seconds_bucket{le=\"0.1\"} 3
boomerang_lateness_seconds_sum 0.5
boomerang_registrations_total 12
boomerang_leases_lost_total 1
# EOF";

    #[test]
    fn a_cost_is_what_was_added_for_each_thousand() {
        let lead = |term| Lead { term, node: 1 };
        let mut before = Reading { leaders: [(None, lead(3)), (Some(0), lead(1))].into(), ..Default::default() };
        before.add_metrics(METRICS);
        let mut after = Reading { node_cpu_ms: 500, tool_cpu_ms: 250, ..Default::default() };
        after.leaders = [(None, lead(3)), (Some(0), lead(4)), (Some(1), lead(1))].into();
        // Of two nodes.
        after.add_metrics(METRICS);
        after.add_metrics(METRICS);
        let found = Value::Object(after.since(&before, 2_000));
        let cost = json!({
            "node_cpu_ms": 250.0, "tool_cpu_ms": 125.0, "log_syncs": 20.0, "log_appends": 50.0, "peer_messages": 3.5,
        });
        assert_eq!(found, json!({ "cost_per_1000": cost, "leader_changes": 4, "leases_lost": 1 }));
    }

    #[test]
    fn a_metric_is_found_by_its_whole_name() {
        assert_eq!(metric(METRICS, "boomerang_log_syncs"), Some(40));
        assert_eq!(metric(METRICS, "boomerang_log"), None);
    }

    #[test]
    fn a_process_uses_the_processor() {
        let begun = processor_ms(std::process::id());
        let mut sum = 0u64;
        while processor_ms(std::process::id()) < begun + 3 * TICK_MS {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert_eq!(processor_ms(u32::MAX), 0, "nobody has this number");
        assert!(memory_peak_bytes(std::process::id()) > 1 << 20);
    }
}
