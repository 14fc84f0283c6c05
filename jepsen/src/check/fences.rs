//! What comes again has a larger fence, and a receiver that looks at fences has each effect once.
//!
//! Of one occurrence no two deliveries have the same fence, and a later attempt has a larger one than all earlier
//! attempts, whoever sent them: both hold in any order of arrival. A delivery that was overtaken by one with a larger fence
//! is stale, and a datagram can be doubled by the network itself. That breaks nothing, since fences are there for it; but what
//! is stale must not be on its way for longer than [`Limits::stale_us`], or somebody still sends who should not.

use std::collections::BTreeMap;

use super::tasks::{Arrival, Task, Tasks};
use super::{Findings, Limits, Verdict};
use crate::history::History;

#[derive(Default)]
struct Counts {
    occurrences: u64,
    duplicates: u64,
    retries: u64,
    stale: u64,
    doubled: u64,
    effects: u64,
}

pub(super) fn check(history: &History, limits: &Limits) -> Verdict {
    let tasks = Tasks::of(history);
    let promise =
        "What is delivered again has a larger fence, and a receiver that looks at fences has each effect once";
    let mut findings = Findings::new("fences", promise);
    let mut counts = Counts::default();
    for task in &tasks.all {
        let mut occurrences: BTreeMap<(&str, u64), Vec<&Arrival<'_>>> = BTreeMap::new();
        for arrival in &task.deliveries {
            let of = (arrival.delivery.task.as_str(), arrival.delivery.occurrence);
            occurrences.entry(of).or_default().push(arrival);
        }
        for ((_, occurrence), arrivals) in &occurrences {
            counts.occurrences += 1;
            let name = || format!("{}, occurrence {occurrence}", task.name());
            grows(&name, arrivals, &mut counts, &mut findings);
            overtaken(&name, arrivals, limits, &mut counts, &mut findings);
            once(&name, arrivals, &mut counts, &mut findings);
        }
        in_order(task, limits, &mut findings);
    }
    findings.verdict(vec![
        ("deliveries", tasks.deliveries()),
        ("occurrences", counts.occurrences),
        ("duplicates", counts.duplicates),
        ("retries", counts.retries),
        ("stale", counts.stale),
        ("doubled", counts.doubled),
        ("effects", counts.effects),
    ])
}

/// By fence, attempts only grow, and no fence is there twice.
fn grows(name: &dyn Fn() -> String, arrivals: &[&Arrival<'_>], counts: &mut Counts, findings: &mut Findings) {
    let mut by_fence = arrivals.to_vec();
    by_fence.sort_by_key(|arrival| (arrival.fence(), arrival.delivery.attempt));
    for pair in by_fence.windows(2) {
        let [one, two] = [pair[0], pair[1]];
        let events = [one.index, two.index];
        if is_doubled(one, two) {
            counts.doubled += 1;
        } else if one.fence() == two.fence() {
            findings.add(events, format!("{}: two deliveries have the fence {}", name(), shown(one)));
        } else if two.delivery.attempt < one.delivery.attempt {
            let (low, high) = (two.delivery.attempt, one.delivery.attempt);
            let what = format!("{}: attempt {low} has the fence {}", name(), shown(two));
            findings.add(events, format!("{what}, attempt {high} only {}", shown(one)));
        } else if two.delivery.attempt == one.delivery.attempt {
            counts.duplicates += 1;
        } else {
            counts.retries += 1;
        }
    }
}

/// One packet that the network has doubled: it is the same in all there is to it.
pub(super) fn is_doubled(one: &Arrival<'_>, two: &Arrival<'_>) -> bool {
    let [a, b] = [one.delivery, two.delivery];
    a.datagram && b.datagram && one.fence() == two.fence() && (a.attempt, a.version) == (b.attempt, b.version)
}

fn shown(arrival: &Arrival<'_>) -> String {
    format!("{}.{}", arrival.fence().term, arrival.fence().seq)
}

/// Counts what came after something with a larger fence. Arrivals are in order.
fn overtaken(
    name: &dyn Fn() -> String,
    arrivals: &[&Arrival<'_>],
    limits: &Limits,
    counts: &mut Counts,
    findings: &mut Findings,
) {
    // Each has a larger fence than all that came before it.
    let mut highest: Vec<&Arrival<'_>> = Vec::new();
    for arrival in arrivals {
        let smaller = highest.partition_point(|high| high.fence() <= arrival.fence());
        let Some(larger) = highest.get(smaller) else {
            highest.push(arrival);
            continue;
        };
        counts.stale += 1;
        let late_us = arrival.at_us - larger.at_us;
        if late_us > limits.stale_us {
            let what = format!("{}: fence {} came {late_us} us after", name(), shown(arrival));
            findings.add([larger.index, arrival.index], format!("{what} {}", shown(larger)));
        }
    }
}

/// A receiver that looks at fences did it once.
fn once(name: &dyn Fn() -> String, arrivals: &[&Arrival<'_>], counts: &mut Counts, findings: &mut Findings) {
    let accepted: Vec<_> = arrivals.iter().filter(|arrival| arrival.delivery.accepted).collect();
    let Some(first) = accepted.iter().find(|arrival| arrival.delivery.effect.is_some()) else { return };
    let effects: Vec<_> = arrivals.iter().filter(|arrival| arrival.delivery.effect == Some(true)).collect();
    counts.effects += effects.len() as u64;
    match effects[..] {
        [] => findings.add([first.index], format!("{}: was accepted and never done", name())),
        [effect] => {
            let before = arrivals.iter().take_while(|arrival| arrival.index < effect.index);
            if let Some(larger) = before.into_iter().find(|arrival| arrival.fence() > effect.fence()) {
                let what = format!("{}: done for the fence {}", name(), shown(effect));
                findings.add([larger.index, effect.index], format!("{what}, though {} had come", shown(larger)));
            }
        }
        _ => {
            let what = format!("{}: was done {} times", name(), effects.len());
            findings.add(effects.iter().map(|effect| effect.index), what);
        }
    }
}

/// Effects of one task follow the order of fences, but for what was overtaken on its way.
fn in_order(task: &Task<'_>, limits: &Limits, findings: &mut Findings) {
    let mut effects = task.deliveries.iter().filter(|arrival| arrival.delivery.effect == Some(true));
    let Some(mut highest) = effects.next() else { return };
    for effect in effects {
        if effect.fence() > highest.fence() {
            highest = effect;
        } else if effect.turn().0 != highest.turn().0 && effect.at_us - highest.at_us > limits.stale_us {
            let what = format!("{}: an effect with the fence {} came long after", task.name(), shown(effect));
            findings.add([highest.index, effect.index], format!("{what} {}", shown(highest)));
        }
    }
}

#[cfg(test)]
mod tests {
    use boomerang_task::{Fence, Missed};

    use super::*;
    use crate::check::hand_made::*;
    use crate::history::Delivery;

    fn sent(attempt: u32, term: u64, seq: u64) -> Delivery {
        Delivery { attempt, fence: Fence { term, seq }, ..delivery(1, 100) }
    }

    fn done(attempt: u32, term: u64, effect: bool) -> Delivery {
        Delivery { effect: Some(effect), ..sent(attempt, term, 1) }
    }

    fn task() -> HandMade {
        HandMade::new().acknowledged(0, one_shot(1, 100))
    }

    #[test]
    fn duplicates_with_larger_fences_are_as_promised() {
        let verdict = task()
            .delivered(100, sent(1, 1, 5))
            .delivered(150, sent(1, 2, 1))
            .delivered(300, sent(2, 2, 7))
            .passes(check);
        for count in [("deliveries", 3), ("duplicates", 1), ("retries", 1), ("stale", 0)] {
            assert!(verdict.counts.contains(&count), "{:?}", verdict.counts);
        }
    }

    #[test]
    fn the_same_fence_twice_is_found() {
        task()
            .delivered(100, sent(1, 1, 5))
            .delivered(150, sent(1, 1, 5))
            .fails(check, "two deliveries have the fence");
        task()
            .delivered(100, sent(1, 1, 5))
            .delivered(150, sent(2, 1, 5))
            .fails(check, "two deliveries have the fence");
    }

    #[test]
    fn a_packet_may_be_doubled_on_its_way() {
        let packet = |attempt| Delivery { datagram: true, ..sent(attempt, 1, 5) };
        let verdict = task().delivered(100, packet(1)).delivered(101, packet(1)).passes(check);
        assert!(verdict.counts.contains(&("doubled", 1)), "{:?}", verdict.counts);
        task().delivered(100, packet(1)).delivered(101, packet(2)).fails(check, "two deliveries have the fence");
    }

    #[test]
    fn a_later_attempt_with_a_smaller_fence_is_found_in_any_order() {
        task().delivered(100, sent(1, 2, 1)).delivered(150, sent(2, 1, 9)).fails(check, "attempt 1 has the fence 2.1");
        task().delivered(100, sent(2, 1, 9)).delivered(150, sent(1, 2, 1)).fails(check, "attempt 1 has the fence 2.1");
    }

    #[test]
    fn what_was_overtaken_is_stale_but_only_for_a_while() {
        let verdict = task().delivered(200, sent(1, 2, 1)).delivered(210, sent(1, 1, 5)).passes(check);
        assert!(verdict.counts.contains(&("stale", 1)), "{:?}", verdict.counts);
        task().delivered(200, sent(1, 2, 1)).delivered(9_000, sent(1, 1, 5)).fails(check, "came 8800000 us after");
        // What counts is when it was overtaken first, not last.
        task()
            .delivered(200, sent(1, 2, 1))
            .delivered(8_900, sent(1, 3, 1))
            .delivered(9_000, sent(1, 1, 5))
            .fails(check, "came 8800000 us after 2.1");
    }

    #[test]
    fn an_effect_is_had_once() {
        task().delivered(100, done(1, 1, true)).delivered(150, done(1, 2, false)).passes(check);
        task().delivered(100, done(1, 1, true)).delivered(150, done(1, 2, true)).fails(check, "was done 2 times");
        task().delivered(100, done(1, 1, false)).fails(check, "never done");
        // Refused, it is no effect yet.
        task().delivered(100, Delivery { accepted: false, ..done(1, 1, false) }).passes(check);
    }

    #[test]
    fn an_effect_is_not_for_a_stale_delivery() {
        task()
            .delivered(100, done(1, 2, false))
            .delivered(150, done(1, 1, true))
            .fails(check, "done for the fence 1.1");
    }

    #[test]
    fn effects_of_a_task_follow_its_fences() {
        let nth = |n, term| Delivery { occurrence: n, ..done(1, term, true) };
        let task = || HandMade::new().acknowledged(0, recurring(1, 100, 50, Missed::Once));
        task().delivered(100, nth(0, 1)).delivered(9_000, nth(1, 2)).passes(check);
        task().delivered(100, nth(1, 2)).delivered(9_000, nth(0, 1)).fails(check, "long after");
    }
}
