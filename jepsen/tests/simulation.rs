//! The simulation: it repeats, it keeps its promises, and it can be seen to fail.

use boomerang::sabotage::Fault;
use jepsen::sim::{Many, Plan, many, run};

/// Schedules that every test run goes through. `jepsen sim` is for more.
const SCHEDULES: u64 = 12;
const THREADS: usize = 2;

/// What is taken away, who may notice, and within how many schedules somebody must. Who stands first is meant to; the
/// others see the same harm from another side. `nodes` is an assertion in the server itself.
const BROKEN: [(Fault, &[&str], u64); 10] = [
    (Fault::SkipFsync, &["lost", "reads", "answers", "occurrences", "digests", "fences", "nodes"], 60),
    (Fault::IgnoreWatermark, &["answers", "occurrences"], 120),
    (Fault::SkipLease, &["reads", "fences", "answers"], 200),
    (Fault::AppliedApart, &["digests", "occurrences", "lost", "reads", "answers", "nodes"], 60),
    (Fault::FireEarly, &["early"], 20),
    (Fault::ForgetDedup, &["unique", "reads", "early", "answers"], 20),
    (Fault::ForgetOverdue, &["occurrences", "lost"], 20),
    (Fault::ApplyDiffers, &["digests"], 20),
    (Fault::BeginLate, &["lateness", "occurrences", "lost"], 20),
    (Fault::StaleReads, &["reads"], 40),
];

fn asked(schedules: u64, sabotage: &[Fault]) -> Many {
    Many { seed: 0, schedules, threads: THREADS, sabotage: sabotage.to_vec() }
}

#[test]
fn a_seed_gives_the_same_history_again_and_another_gives_another() {
    let [first, again, other] = [5, 5, 6].map(|seed| run(seed, &Plan::of(seed)).hash());
    assert_eq!(first, again);
    assert_ne!(first, other);
}

#[test]
fn every_promise_is_kept() {
    let summary = many(&asked(SCHEDULES, &[]), |text| println!("{text}"));
    if let Some(broken) = &summary.broken {
        let violated = broken.outcome.verdicts.iter().filter(|verdict| !verdict.holds());
        panic!("{}\n{:#?}", broken.command, violated.collect::<Vec<_>>());
    }
    assert_eq!(summary.schedules, SCHEDULES);
    assert!(summary.events > 100 * SCHEDULES, "something happens: {} events", summary.events);
}

#[test]
fn whatever_is_broken_on_purpose_is_found() {
    for (fault, checkers, budget) in BROKEN {
        let summary = many(&asked(budget, &[fault]), |_| {});
        let Some(broken) = summary.broken else { panic!("{fault}: nobody has noticed in {budget} schedules") };
        let violated = broken.outcome.verdicts.iter().filter(|verdict| !verdict.holds());
        let by: Vec<&str> = violated.map(|verdict| verdict.checker).collect();
        println!("{fault}: found by {by:?} after {} schedules: {}", summary.schedules, broken.command);
        assert!(by.iter().any(|checker| checkers.contains(checker)), "{fault}: only {by:?} have objected");
    }
}
