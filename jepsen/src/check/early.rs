//! Nothing comes before its due instant, and the due instant it carries is the one that was promised.
//!
//! The promise is the answer to the registration or to the edit that made the delivered version, and for recurring tasks
//! that and whole intervals. For what was never answered it is what was asked for, if that was an instant. What may come
//! early because clocks are wrong is said in `clocks`.

use super::tasks::{Arrival, Base, Task, Tasks};
use super::{Findings, Limits, Verdict};
use crate::history::{Answer, Due, FIRST_VERSION, History};

/// The beginning of the run is known in whole milliseconds, rounded down: what comes on time can seem so much early.
const ROUNDING_US: u64 = 1_000;

pub(super) fn check(history: &History, limits: &Limits) -> Verdict {
    let tasks = Tasks::of(history);
    let mut findings =
        Findings::new("early", "No delivery comes before its due instant, which is the one that was promised");
    let (mut deliveries, mut promised, mut nearest_us) = (0, 0, u64::MAX);
    for task in &tasks.all {
        wrong_answers(task, &mut findings);
        for arrival in &task.deliveries {
            deliveries += 1;
            let due_us = history.since_began_us(arrival.delivery.due_ms);
            let early_us = tasks.wrong_clocks.early_us(limits, arrival.at_us);
            if arrival.at_us + early_us + ROUNDING_US <= due_us {
                let what = format!("{}: came {} us before it was due", task.name(), due_us - arrival.at_us);
                findings.add([arrival.index], what);
            }
            nearest_us = nearest_us.min(arrival.at_us.saturating_sub(due_us));
            promised += u64::from(task.base(arrival.delivery.version) != Base::Unknown);
            if let Some(why) = not_promised(task, arrival) {
                let registered = task.acknowledged().map(|acknowledged| acknowledged.index);
                let events = registered.into_iter().chain([arrival.index]);
                findings.add(events, format!("{}: {why}", task.name()));
            }
        }
    }
    findings.verdict(vec![
        ("operations", tasks.operations),
        ("deliveries", deliveries),
        ("promised", promised),
        ("least_late_us", if deliveries == 0 { 0 } else { nearest_us }),
    ])
}

/// Due instants in answers that differ from what was asked for.
fn wrong_answers(task: &Task<'_>, findings: &mut Findings) {
    for (asked, operation) in &task.registrations {
        if let (Due::At(due), Some(Answer::Registered { due_ms, duplicate: false, .. })) =
            (asked.due, operation.answer())
            && due != *due_ms
            && asked.key.is_none()
        {
            let what = format!("{}: asked for {due}, and was told {due_ms}", task.name());
            findings.add(operation.events(), what);
        }
    }
    for edit in &task.edits {
        if let Some(due_ms) = edit.edited().filter(|due_ms| *due_ms != edit.due_ms) {
            let what = format!("{}: was to move to {}, and moved to {due_ms}", task.name(), edit.due_ms);
            findings.add(edit.operation.events(), what);
        }
    }
}

/// Why the due instant of a delivery is not what was promised.
fn not_promised(task: &Task<'_>, arrival: &Arrival<'_>) -> Option<String> {
    let delivery = arrival.delivery;
    let base = match task.base(delivery.version) {
        Base::At(base) => base,
        // Then all deliveries must agree with the first one.
        Base::Unknown => assumed(task)?,
        // `lost` and `answers` say so.
        Base::Never => return None,
    };
    let (due_ms, occurrence) = (delivery.due_ms, delivery.occurrence);
    match task.every_ms() {
        None if occurrence != 0 => Some(format!("is due once, and occurrence {occurrence} came")),
        None => (due_ms != base).then(|| format!("was promised for {base}, and came with {due_ms}")),
        Some(every_ms) if delivery.version == FIRST_VERSION => {
            let expected = base + occurrence * every_ms;
            (due_ms != expected)
                .then(|| format!("occurrence {occurrence} is due at {expected}, and came with {due_ms}"))
        }
        // Which occurrence the edit moved is not known: only that all later ones follow at the interval.
        Some(every_ms) => {
            let fits = due_ms.checked_sub(base).is_some_and(|since| since % every_ms == 0);
            (!fits).then(|| format!("was moved to {base}, every {every_ms} ms, and came with {due_ms}"))
        }
    }
}

/// The first due instant, by the first delivery that tells.
fn assumed(task: &Task<'_>) -> Option<u64> {
    let first = task.deliveries.iter().find(|arrival| arrival.delivery.version == FIRST_VERSION)?.delivery;
    first.due_ms.checked_sub(first.occurrence * task.every_ms().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use boomerang_task::Missed;

    use super::*;
    use crate::check::hand_made::*;
    use crate::history::{Delivery, End, Registration, Stage};

    fn once() -> HandMade {
        HandMade::new().acknowledged(0, one_shot(1, 100))
    }

    fn every_50() -> HandMade {
        HandMade::new().acknowledged(0, recurring(1, 100, 50, Missed::Once))
    }

    #[test]
    fn on_time_is_not_early() {
        let verdict = once().delivered(100, delivery(1, 100)).passes(check);
        assert!(verdict.counts.contains(&("deliveries", 1)));
        every_50().occurrence(100, 1, 0, 100).occurrence(151, 1, 1, 150).passes(check);
    }

    #[test]
    fn a_millisecond_early_is_early() {
        once().delivered(99, delivery(1, 100)).fails(check, "came 1000 us before");
        every_50().occurrence(100, 1, 0, 100).occurrence(140, 1, 1, 150).fails(check, "came 10000 us before");
    }

    /// Clocks are wrong from second 20 to second 30.
    fn wrong_clocks(fault: &str) -> HandMade {
        HandMade::new().fault_of(fault, 20_000, Stage::Begin).fault_of(fault, 30_000, Stage::End)
    }

    #[test]
    fn early_while_clocks_are_wrong_is_no_break() {
        for fault in ["clock", "clock-wild"] {
            let came =
                |at| wrong_clocks(fault).acknowledged(0, one_shot(1, at + 250)).delivered(at, delivery(1, at + 250));
            for at in [20_010, 29_900, 35_000] {
                came(at).passes(check);
            }
            // Neither before nor after, and not by any amount.
            for at in [10_000, 41_000] {
                came(at).fails(check, "came 250000 us before");
            }
            let far = wrong_clocks(fault).acknowledged(0, one_shot(1, 26_100));
            far.delivered(25_000, delivery(1, 26_100)).fails(check, "came 1100000 us before");
        }
        let killed = HandMade::new().fault(20_000, Stage::Begin).acknowledged(0, one_shot(1, 25_250));
        killed.delivered(25_000, delivery(1, 25_250)).fails(check, "came 250000 us before");
    }

    #[test]
    fn an_instant_that_a_wrong_clock_gave_is_kept_to() {
        // Registered while clocks were wrong, due when they are right.
        let asked = || {
            let delayed = Registration { due: Due::In(30_000), ..one_shot(1, 0) };
            wrong_clocks("clock").register(25_000, 25_010, delayed, registered(1, 55_200))
        };
        asked().delivered(55_200, delivery(1, 55_200)).passes(check);
        asked().delivered(55_000, delivery(1, 55_200)).fails(check, "came 200000 us before");
    }

    #[test]
    fn a_retry_keeps_the_due_instant_of_its_occurrence() {
        let retry = |due_at| Delivery { attempt: 2, ..delivery(1, due_at) };
        once().delivered(100, delivery(1, 100)).delivered(300, retry(100)).passes(check);
        once().delivered(100, delivery(1, 100)).delivered(300, retry(300)).fails(check, "was promised for");
    }

    #[test]
    fn another_due_instant_than_promised_is_found() {
        once().delivered(100, delivery(1, 90)).fails(check, "was promised for");
        every_50().occurrence(170, 1, 1, 160).fails(check, "occurrence 1 is due at");
        once().delivered(100, Delivery { occurrence: 1, ..delivery(1, 100) }).fails(check, "is due once");
    }

    #[test]
    fn an_edit_promises_another_instant() {
        let edited = || once().edit(10, 20, 1, 200, 2, End::Ok(Answer::Edited { due_ms: due(200) }));
        let second = |due_at| Delivery { version: 2, ..delivery(1, due_at) };
        edited().delivered(200, second(200)).passes(check);
        edited().delivered(200, second(100)).fails(check, "was promised for");
        // An edit without an answer may have been done.
        once().edit(10, 20, 1, 200, 2, unknown()).delivered(200, second(200)).passes(check);
    }

    #[test]
    fn an_edit_moves_all_later_occurrences() {
        let edited = || every_50().edit(10, 20, 1, 120, 2, End::Ok(Answer::Edited { due_ms: due(120) }));
        let second = |n, due_at| Delivery { version: 2, occurrence: n, ..delivery(1, due_at) };
        edited().delivered(120, second(0, 120)).delivered(170, second(1, 170)).passes(check);
        edited().delivered(120, second(0, 120)).delivered(200, second(1, 150)).fails(check, "was moved to");
    }

    #[test]
    fn answers_that_differ_from_the_question_are_found() {
        HandMade::new().register(0, 1, one_shot(1, 100), registered(1, 101)).fails(check, "and was told");
        let moved = End::Ok(Answer::Edited { due_ms: due(201) });
        once().edit(10, 20, 1, 200, 2, moved).fails(check, "and moved to");
    }

    #[test]
    fn what_was_never_promised_only_has_to_agree_with_itself() {
        let asked = || {
            let delayed = Registration { due: Due::In(100), ..recurring(1, 0, 50, Missed::Once) };
            HandMade::new().register(0, 50, delayed, unknown())
        };
        asked().occurrence(170, 1, 1, 160).occurrence(210, 1, 2, 210).passes(check);
        asked().occurrence(170, 1, 1, 160).occurrence(215, 1, 2, 211).fails(check, "occurrence 2 is due at");
    }
}
