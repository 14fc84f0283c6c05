//! What a bench prints: one JSON object, or the same as lines for people.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::super::ToolError;
use super::super::args::millis;
use super::super::output::{Output, note};
use super::account::{Judgement, rounded};
use super::load::Registering;
use boomerang_receiver::Percentiles;

/// Of tasks, or of timers.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    pub sent: u64,
    pub acknowledged: u64,
    /// For want of room, where that is no failure.
    pub refused: u64,
    pub fired: u64,
    pub lost: u64,
    pub early: u64,
    pub duplicates: u64,
}

/// The outcome of one bench.
pub(super) struct Report {
    pub bench: &'static str,
    /// Flags by name, defaults included.
    pub configuration: Value,
    pub counts: Counts,
    pub per_second: f64,
    pub latency_us: Percentiles,
    /// `None` where nothing fires.
    pub lateness_us: Option<Percentiles>,
    /// Nodes were killed or the like: what came twice is then no broken promise.
    pub faults: bool,
    /// What only this bench knows to be wrong.
    pub wrong: Vec<String>,
    /// What only this bench knows.
    pub more: Map<String, Value>,
    /// What requests failed with, and how many of them.
    pub failures: BTreeMap<String, u64>,
}

impl Report {
    /// Of a bench whose tasks fire: what was sent, against what the receiver saw. `own` is what only that bench knows.
    pub fn of_deliveries(
        bench: &'static str,
        configuration: Value,
        registering: Registering,
        judgement: Judgement,
        faults: bool,
        own: Map<String, Value>,
    ) -> Self {
        if registering.late > 0 {
            note(&format!(
                "{} tasks were due before they were acknowledged, which counts as lateness: a longer --lead avoids it",
                registering.late
            ));
        }
        let mut more = Map::from_iter([
            ("registered_late".to_owned(), json!(registering.late)),
            ("registering_ms".to_owned(), json!(millis(registering.took))),
            ("duplicates_without_larger_fence".to_owned(), json!(judgement.duplicates_not_larger)),
            ("duplicates_with_the_same_fence".to_owned(), json!(judgement.duplicates_same_fence)),
            ("early_us_max".to_owned(), json!(judgement.early_us_max)),
            ("strays".to_owned(), json!(judgement.strays)),
        ]);
        more.extend(own);
        Self {
            bench,
            configuration,
            counts: Counts {
                sent: registering.sent,
                acknowledged: registering.acknowledged.len() as u64,
                refused: registering.refused,
                fired: judgement.fired,
                lost: judgement.lost.len() as u64,
                early: judgement.early,
                duplicates: judgement.duplicates,
            },
            per_second: judgement.per_second(),
            latency_us: Percentiles::of(&registering.latency_us),
            lateness_us: Some(judgement.lateness_us),
            faults,
            wrong: Vec::new(),
            more,
            failures: registering.failures,
        }
    }

    pub fn print(&self, output: &Output) -> Result<(), ToolError> {
        output.line(|| self.text(), || self.object())
    }

    /// What makes the bench end with exit code 1, if anything: a promise that was not kept, or requests that failed.
    pub fn verdict(&self) -> Result<(), ToolError> {
        let Counts { sent, acknowledged, refused, lost, early, duplicates, .. } = self.counts;
        let mut wrong = Vec::new();
        let unanswered = sent.saturating_sub(acknowledged + refused);
        if unanswered > 0 {
            let how = if refused > 0 { "neither acknowledged nor refused" } else { "not acknowledged" };
            wrong.push(format!("{unanswered} of {sent} were {how}"));
        }
        if lost > 0 {
            wrong.push(format!("{lost} of {acknowledged} acknowledged were lost"));
        }
        if early > 0 {
            wrong.push(format!("{early} came early"));
        }
        if duplicates > 0 && !self.faults {
            wrong.push(format!("{duplicates} came once more without a fault"));
        }
        wrong.extend(self.wrong.iter().cloned());
        if wrong.is_empty() { Ok(()) } else { Err(ToolError::Undone(wrong.join(", "))) }
    }

    fn object(&self) -> Value {
        let Counts { sent, acknowledged, refused, fired, lost, early, duplicates } = self.counts;
        let mut object = self.more.clone();
        for (name, value) in [
            ("bench", json!(self.bench)),
            ("configuration", self.configuration.clone()),
            ("sent", json!(sent)),
            ("acknowledged", json!(acknowledged)),
            ("refused", json!(refused)),
            ("fired", json!(fired)),
            ("lost", json!(lost)),
            ("early", json!(early)),
            ("duplicates", json!(duplicates)),
            ("duplicates_without_a_fault", if self.faults { Value::Null } else { json!(duplicates) }),
            ("per_second", json!(self.per_second)),
            ("latency_us", json!(self.latency_us)),
            ("failures", json!(self.failures)),
            // Figures of a build for debugging are worth less.
            ("debug_assertions", json!(cfg!(debug_assertions))),
        ] {
            object.insert(name.to_owned(), value);
        }
        if let Some(lateness_us) = &self.lateness_us {
            object.insert("lateness_us".to_owned(), json!(lateness_us));
        }
        Value::Object(object)
    }

    fn text(&self) -> String {
        let Counts { sent, acknowledged, refused, fired, lost, early, duplicates } = self.counts;
        let refused = if refused > 0 { format!("  refused {refused}") } else { String::new() };
        let mut lines = vec![
            format!("bench {}  {}", self.bench, pairs(&self.configuration)),
            format!(
                "sent {sent}  acknowledged {acknowledged}{refused}  fired {fired}  lost {lost}  early {early}  duplicates \
                 {duplicates}"
            ),
            format!("per second {}", self.per_second),
            format!("latency ms   {}", percentiles_text(&self.latency_us)),
        ];
        lines.extend(
            self.lateness_us.iter().map(|lateness_us| format!("lateness ms  {}", percentiles_text(lateness_us))),
        );
        for (name, value) in &self.more {
            match value {
                Value::Null => {}
                Value::Object(values) if values.is_empty() => {}
                Value::Array(values) if values.is_empty() => {}
                Value::Array(values) if values.iter().all(Value::is_number) => lines.push(numbers(name, values)),
                Value::Array(values) => lines.extend(values.iter().map(pairs)),
                value => lines.push(format!("{name}: {}", pairs(value))),
            }
        }
        lines.extend(self.failures.iter().map(|(why, count)| format!("failed {count} times: {why}")));
        lines.join("\n")
    }
}

/// Rates one after the other, and what the last is of the first.
fn numbers(name: &str, values: &[Value]) -> String {
    let all: Vec<String> = values.iter().map(Value::to_string).collect();
    let (first, last) = (values[0].as_f64().unwrap_or(0.0), values[values.len() - 1].as_f64().unwrap_or(0.0));
    let part = rounded(last / first, 2);
    format!("{name}: per second {}  (the last is {part} of the first)", all.join(" "))
}

/// An object as `name value` pairs.
fn pairs(object: &Value) -> String {
    let Value::Object(object) = object else { return object.to_string() };
    let pair = |(name, value): (&String, &Value)| match value {
        Value::String(text) => format!("{name} {text}"),
        value => format!("{name} {value}"),
    };
    object.iter().map(pair).collect::<Vec<_>>().join("  ")
}

fn percentiles_text(percentiles: &Percentiles) -> String {
    let Percentiles { p50, p90, p99, p999, max } = percentiles;
    let [p50, p90, p99, p999, max] = [p50, p90, p99, p999, max].map(|us| format!("{}.{:03}", us / 1000, us % 1000));
    format!("p50 {p50}  p90 {p90}  p99 {p99}  p999 {p999}  max {max}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(counts: Counts) -> Report {
        Report {
            bench: "fire",
            configuration: json!({ "tasks": 2, "protocol": "tcp" }),
            counts,
            per_second: 12.5,
            latency_us: Percentiles { p50: 1_234, p90: 2, p99: 3, p999: 4, max: 5 },
            lateness_us: None,
            faults: false,
            wrong: Vec::new(),
            more: Map::from_iter([("strays".to_owned(), json!(0))]),
            failures: BTreeMap::new(),
        }
    }

    #[test]
    fn the_object_has_every_promised_field() {
        let report = Report { lateness_us: Some(report(Counts::default()).latency_us), ..report(Counts::default()) };
        let object = report.object();
        for field in ["bench", "configuration", "sent", "acknowledged", "fired", "lost", "early", "duplicates"] {
            assert!(!object[field].is_null(), "{field}: {object}");
        }
        for spans in ["latency_us", "lateness_us"] {
            for field in ["p50", "p90", "p99", "p999", "max"] {
                assert!(object[spans][field].is_u64(), "{spans}.{field}: {object}");
            }
        }
        assert_eq!((&object["per_second"], &object["strays"]), (&json!(12.5), &json!(0)));
        let slices = Map::from_iter([("slices".to_owned(), json!([200.0, 150.5, 100.0]))]);
        let line = "slices: per second 200.0 150.5 100.0  (the last is 0.5 of the first)";
        assert_eq!(Report { more: slices, ..self::report(Counts::default()) }.text().lines().last(), Some(line));
        assert!(report.text().contains("latency ms   p50 1.234  p90 0.002"), "{}", report.text());
        assert!(report.text().starts_with("bench fire  protocol tcp  tasks 2\n"), "{}", report.text());
    }

    #[test]
    fn a_broken_promise_is_a_failure_and_so_is_a_duplicate_without_a_fault() {
        let good = Counts { sent: 5, acknowledged: 5, fired: 5, ..Counts::default() };
        report(good).verdict().unwrap();
        let twice = Report { faults: true, ..report(Counts { duplicates: 2, ..good }) };
        twice.verdict().unwrap();
        assert_eq!(
            (&twice.object()["duplicates"], &twice.object()["duplicates_without_a_fault"]),
            (&json!(2), &json!(null))
        );
        report(Counts { acknowledged: 2, refused: 3, ..good }).verdict().unwrap();
        let slow = Report { wrong: vec!["it is slow".into()], ..report(good) };
        assert_eq!(slow.verdict().unwrap_err().to_string(), "it is slow");
        assert_eq!(report(Counts { duplicates: 2, ..good }).object()["duplicates_without_a_fault"], 2);
        for (counts, why) in [
            (Counts { acknowledged: 4, ..good }, "1 of 5 were not acknowledged"),
            (Counts { fired: 4, lost: 1, ..good }, "1 of 5 acknowledged were lost"),
            (Counts { early: 3, ..good }, "3 came early"),
            (Counts { acknowledged: 2, refused: 2, ..good }, "1 of 5 were neither acknowledged nor refused"),
            (Counts { duplicates: 2, ..good }, "2 came once more without a fault"),
        ] {
            let error = report(counts).verdict().unwrap_err();
            assert_eq!((error.to_string().as_str(), error.exit_code()), (why, 1));
        }
    }
}
