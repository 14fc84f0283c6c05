//! Answers to cancels and edits were true.
//!
//! - `Cancelled`: a one-shot task was never delivered and never will be; of a recurring one, nothing that was not out.
//! - `CancelledTooLate`: nothing follows the attempt that may be out.
//! - `Edited`: no attempt that was out has changed, and what comes later is the new version.
//! - `EditTooLate`, and a failure: that version never comes.
//! - `NotFound`: the task has ended, or was not there yet.
//!
//! One attempt has one version, whatever happens: only what is not out can be edited. That and the order of attempts are
//! judged whenever things arrive. Where an old delivery may have been on its way, [`Limits::stale_us`] is allowed.

use std::collections::BTreeMap;

use super::tasks::{Arrival, Base, Edit, Task, Tasks, has_cancelled, may_have_cancelled};
use super::{Findings, Limits, Verdict};
use crate::history::{Answer, FIRST_VERSION, History, Operation};

#[derive(Default)]
struct Counts {
    cancelled: u64,
    cancelled_too_late: u64,
    edited: u64,
    edit_too_late: u64,
    not_found: u64,
    failed: u64,
    unknown: u64,
}

pub(super) fn check(history: &History, limits: &Limits) -> Verdict {
    let tasks = Tasks::of(history);
    let mut findings = Findings::new("answers", "Answers to cancels and edits were true");
    let mut counts = Counts::default();
    let (mut cancels, mut edits) = (0, 0);
    for task in &tasks.all {
        cancels += task.cancels.len() as u64;
        edits += task.edits.len() as u64;
        for operation in task.cancels.iter().chain(task.edits.iter().map(|edit| &edit.operation)) {
            count(operation, &mut counts);
            if matches!(operation.answer(), Some(Answer::NotFound)) {
                not_found(&tasks, task, operation, limits, &mut findings);
            }
        }
        for cancel in &task.cancels {
            match cancel.answer() {
                Some(Answer::Cancelled) => cancelled(task, cancel, limits, &mut findings),
                Some(Answer::CancelledTooLate { occurrence, attempt }) => {
                    nothing_follows(task, cancel, (*occurrence, *attempt), limits, &mut findings);
                }
                _ => {}
            }
        }
        ended_twice(task, &mut findings);
        versions(task, &mut findings);
        for edit in task.edits.iter().filter(|edit| edit.edited().is_some()) {
            edited(task, edit, limits, &mut findings);
        }
    }
    findings.verdict(vec![
        ("operations", tasks.operations),
        ("deliveries", tasks.deliveries()),
        ("cancels", cancels),
        ("cancelled", counts.cancelled),
        ("cancelled_too_late", counts.cancelled_too_late),
        ("edits", edits),
        ("edited", counts.edited),
        ("edit_too_late", counts.edit_too_late),
        ("not_found", counts.not_found),
        ("failed", counts.failed),
        ("unknown", counts.unknown),
    ])
}

fn count(operation: &Operation<'_>, counts: &mut Counts) {
    let counter = match operation.answer() {
        Some(Answer::Cancelled) => &mut counts.cancelled,
        Some(Answer::CancelledTooLate { .. }) => &mut counts.cancelled_too_late,
        Some(Answer::Edited { .. }) => &mut counts.edited,
        Some(Answer::EditTooLate { .. }) => &mut counts.edit_too_late,
        Some(Answer::NotFound) => &mut counts.not_found,
        _ if operation.failed() => &mut counts.failed,
        _ => &mut counts.unknown,
    };
    *counter += 1;
}

fn with(operation: &Operation<'_>, arrival: &Arrival<'_>) -> Vec<u64> {
    let mut events = operation.events();
    events.push(arrival.index);
    events
}

/// Nothing of the occurrence it stood at was ever out.
fn cancelled(task: &Task<'_>, cancel: &Operation<'_>, limits: &Limits, findings: &mut Findings) {
    let Some((_, ended_us, ended)) = cancel.end else { return };
    if task.every_ms().is_none() {
        if let Some(arrival) = task.deliveries.first() {
            let what = format!("{}: was cancelled before any dispatch, and was delivered", task.name());
            findings.add(with(cancel, arrival), what);
        }
        return;
    }
    // Those before were done with, but may have been on their way again: only what is seen for the first time is new.
    let done = task.deliveries.iter().take_while(|arrival| arrival.index < ended).map(|arrival| arrival.turn().0).max();
    let after = task.deliveries.iter().skip_while(|arrival| arrival.index < ended);
    for arrival in after {
        let n = arrival.turn().0;
        let stale = done.is_some_and(|done| n <= done) || task.is_dead(n);
        if !stale || arrival.at_us > ended_us + limits.stale_us {
            let what = format!("{}: was cancelled, and occurrence {n} came after that", task.name());
            return findings.add(with(cancel, arrival), what);
        }
    }
}

/// `turn` may have been out, and nothing later.
fn nothing_follows(
    task: &Task<'_>,
    cancel: &Operation<'_>,
    turn: (u64, u32),
    limits: &Limits,
    findings: &mut Findings,
) {
    let Some(ended_us) = cancel.ended_us() else { return };
    for arrival in &task.deliveries {
        let later = arrival.turn() > turn;
        if !later && arrival.at_us <= ended_us + limits.stale_us {
            continue;
        }
        let (occurrence, attempt) = arrival.turn();
        let came = format!("attempt {attempt} of occurrence {occurrence} came");
        let when = if later { "" } else { " long after that" };
        let what = format!("{}: ended with attempt {} of occurrence {}", task.name(), turn.1, turn.0);
        return findings.add(with(cancel, arrival), format!("{what}, and {came}{when}"));
    }
}

/// A task has one end.
fn ended_twice(task: &Task<'_>, findings: &mut Findings) {
    let mut cancels = task.cancels.iter().filter(|cancel| has_cancelled(cancel));
    if let (Some(one), Some(two)) = (cancels.next(), cancels.next()) {
        let events = one.events().into_iter().chain(two.events());
        findings.add(events, format!("{}: two cancels are said to have ended it", task.name()));
    }
}

/// It has ended by then, or may have, or was not certainly there before.
fn not_found(tasks: &Tasks<'_>, task: &Task<'_>, operation: &Operation<'_>, limits: &Limits, findings: &mut Findings) {
    let Some((_, _, ended)) = operation.end else { return };
    let Some(acknowledged) = task.acknowledged().filter(|there| there.index < operation.call_index) else { return };
    let cancels = task.cancels.iter().filter(|cancel| cancel.call_index != operation.call_index);
    let cancelled = cancels.into_iter().any(|cancel| may_have_cancelled(cancel) && cancel.call_index < ended);
    if cancelled || tasks.settled_from(task, limits).is_some_and(|from| from < ended) {
        return;
    }
    let events = acknowledged.operation.events().into_iter().chain(operation.events());
    findings.add(events, format!("{}: was not found, though it was there and had not ended", task.name()));
}

/// Versions that nobody made, attempts of two versions, and versions that go back.
fn versions(task: &Task<'_>, findings: &mut Findings) {
    if task.edits.is_empty() && task.deliveries.iter().all(|arrival| arrival.delivery.version == FIRST_VERSION) {
        return;
    }
    let mut by_turn: BTreeMap<(u64, u32), &Arrival<'_>> = BTreeMap::new();
    let mut never = Vec::new();
    for arrival in &task.deliveries {
        let version = arrival.delivery.version;
        if version != FIRST_VERSION && task.base(version) == Base::Never && !never.contains(&version) {
            never.push(version);
            let edits = task.edits.iter().filter(|edit| edit.version == version);
            let events = edits.flat_map(|edit| edit.operation.events()).chain([arrival.index]);
            let what = format!("{}: came in version {version}, which no edit has made", task.name());
            findings.add(events, what);
        }
        let first = *by_turn.entry(arrival.turn()).or_insert(arrival);
        if (first.delivery.version, first.delivery.due_ms) != (version, arrival.delivery.due_ms) {
            let (n, attempt) = arrival.turn();
            let what = format!("{}: attempt {attempt} of occurrence {n} was changed while it was out", task.name());
            findings.add([first.index, arrival.index], what);
        }
    }
    // In the order of attempts, whatever came when. Each is compared with the one before it.
    let in_order: Vec<&Arrival<'_>> = by_turn.into_values().collect();
    for pair in in_order.windows(2) {
        let [one, two] = [pair[0], pair[1]];
        if let Some(edit) = task.edits.iter().find(|edit| edit.version == one.delivery.version)
            && is_before(task, two.delivery.version, edit)
        {
            let what = format!("{}: version {} comes back after", task.name(), two.delivery.version);
            let events = edit.operation.events().into_iter().chain([one.index, two.index]);
            findings.add(events, format!("{what} version {}", one.delivery.version));
        }
    }
}

/// Whether `version` was certainly there before the edit, and so is gone with it.
fn is_before(task: &Task<'_>, version: u32, edit: &Edit<'_>) -> bool {
    if version == edit.version {
        return false;
    }
    let earlier = |other: &Edit<'_>| {
        other.edited().is_some() && other.operation.end.is_some_and(|(.., ended)| ended < edit.operation.call_index)
    };
    version == FIRST_VERSION || task.edits.iter().any(|other| other.version == version && earlier(other))
}

/// What came after the answer is not the old version, unless it may have been on its way.
fn edited(task: &Task<'_>, edit: &Edit<'_>, limits: &Limits, findings: &mut Findings) {
    let Some(ended_us) = edit.operation.ended_us() else { return };
    // With one attempt of one occurrence, nothing can have been out before.
    let only = task.every_ms().is_none() && task.asked().is_some_and(|asked| asked.attempts == 1);
    let from_us = if only { 0 } else { ended_us + limits.stale_us + 1 };
    let start = task.deliveries.partition_point(|arrival| arrival.at_us < from_us);
    let old = |arrival: &&Arrival<'_>| is_before(task, arrival.delivery.version, edit);
    if let Some(arrival) = task.deliveries[start..].iter().find(old) {
        let what = format!("{}: was edited to version {}, and came in", task.name(), edit.version);
        findings.add(with(&edit.operation, arrival), format!("{what} version {}", arrival.delivery.version));
    }
}

#[cfg(test)]
mod tests {
    use boomerang_task::Missed;

    use super::*;
    use crate::check::hand_made::*;
    use crate::history::{Delivery, End, LeftAs, Registration};

    fn once() -> HandMade {
        HandMade::new().acknowledged(0, one_shot(1, 1_000))
    }

    fn every_second() -> HandMade {
        HandMade::new().acknowledged(0, recurring(1, 1_000, 1_000, Missed::Once))
    }

    fn came(attempt: u32, version: u32) -> Delivery {
        Delivery { attempt, version, ..delivery(1, 1_000) }
    }

    fn cancelled() -> End {
        End::Ok(Answer::Cancelled)
    }

    fn too_late(occurrence: u64, attempt: u32) -> End {
        End::Ok(Answer::CancelledTooLate { occurrence, attempt })
    }

    fn edited(due_at: u64) -> End {
        End::Ok(Answer::Edited { due_ms: due(due_at) })
    }

    fn not_found() -> End {
        End::Ok(Answer::NotFound)
    }

    #[test]
    fn cancelled_never_comes() {
        let verdict = once().cancel(10, 20, 1, cancelled()).until(9_000).passes(check);
        assert!(verdict.counts.contains(&("cancelled", 1)));
        once().cancel(10, 20, 1, cancelled()).delivered(1_000, came(1, 1)).fails(check, "was delivered");
        // Not before the answer either: it says that there was no dispatch.
        once().cancel(990, 1_100, 1, cancelled()).delivered(1_000, came(1, 1)).fails(check, "was delivered");
    }

    #[test]
    fn a_cancel_without_an_answer_allows_both() {
        once().cancel(10, 20, 1, unknown()).delivered(1_000, came(1, 1)).passes(check);
        once().cancel(10, 20, 1, unknown()).until(9_000).passes(check);
    }

    #[test]
    fn a_cancelled_recurring_task_has_no_further_occurrence() {
        let two = || every_second().occurrence(1_000, 1, 0, 1_000).occurrence(2_000, 1, 1, 2_000);
        two().cancel(2_500, 2_510, 1, cancelled()).passes(check);
        two()
            .cancel(2_500, 2_510, 1, cancelled())
            .occurrence(3_000, 1, 2, 3_000)
            .fails(check, "occurrence 2 came after");
        // What was on its way again may still come, but not for ever.
        two().cancel(2_500, 2_510, 1, cancelled()).occurrence(3_000, 1, 1, 2_000).passes(check);
        two()
            .cancel(2_500, 2_510, 1, cancelled())
            .occurrence(9_000, 1, 1, 2_000)
            .fails(check, "occurrence 1 came after");
    }

    #[test]
    fn after_too_late_nothing_follows() {
        let late = || once().cancel(990, 1_010, 1, too_late(0, 1));
        late().delivered(1_020, came(1, 1)).passes(check);
        late().until(9_000).passes(check);
        late().delivered(1_000, came(1, 1)).delivered(1_300, came(2, 1)).fails(check, "and attempt 2");
        late().delivered(9_000, came(1, 1)).fails(check, "long after that");
    }

    #[test]
    fn after_too_late_no_occurrence_follows() {
        let one = || every_second().occurrence(1_000, 1, 0, 1_000).cancel(1_005, 1_010, 1, too_late(0, 1));
        one().until(9_000).passes(check);
        one().occurrence(2_000, 1, 1, 2_000).fails(check, "of occurrence 1 came");
    }

    #[test]
    fn edited_comes_in_the_new_version() {
        let second = |due_at| Delivery { version: 2, ..delivery(1, due_at) };
        once().edit(10, 20, 1, 2_000, 2, edited(2_000)).delivered(2_000, second(2_000)).passes(check);
        once().edit(10, 20, 1, 9_000, 2, edited(9_000)).delivered(9_000, came(1, 1)).fails(check, "came in version 1");
        let only = Registration { attempts: 1, ..one_shot(1, 1_000) };
        let only = HandMade::new().acknowledged(0, only).edit(10, 20, 1, 2_000, 2, edited(2_000));
        only.delivered(1_000, came(1, 1)).fails(check, "came in version 1");
    }

    #[test]
    fn an_attempt_that_is_out_is_not_changed() {
        let both = || once().edit(990, 1_010, 1, 2_000, 2, edited(2_000)).delivered(1_005, came(1, 1));
        let second = |attempt| Delivery { version: 2, attempt, ..delivery(1, 2_000) };
        both().delivered(2_000, second(1)).fails(check, "changed while it was out");
        // The first attempt failed; the second was not out.
        both().delivered(2_000, second(2)).passes(check);
    }

    #[test]
    fn versions_do_not_go_back() {
        let edited = || once().edit(10, 20, 1, 2_000, 2, edited(2_000)).edit(30, 40, 1, 1_000, 3, unknown());
        let second = Delivery { version: 2, ..delivery(1, 2_000) };
        edited().delivered(2_000, second.clone()).delivered(2_300, came(2, 1)).fails(check, "version 1 comes back");
        // Nobody knows when the third was made.
        let third = Delivery { version: 3, attempt: 2, ..delivery(1, 1_000) };
        edited().delivered(2_000, second).delivered(2_300, third).passes(check);
    }

    #[test]
    fn a_failed_edit_changes_nothing() {
        let late = End::Ok(Answer::EditTooLate { occurrence: 0, attempt: 1 });
        once().edit(990, 1_010, 1, 2_000, 2, late.clone()).delivered(1_000, came(1, 1)).passes(check);
        for end in [late, failed(), not_found()] {
            let known = once().cancel(5, 6, 1, unknown()).edit(990, 1_010, 1, 1_000, 2, end);
            known.delivered(1_300, came(1, 2)).fails(check, "which no edit has made");
        }
        once().edit(990, 1_010, 1, 1_000, 2, unknown()).delivered(1_300, came(1, 2)).passes(check);
    }

    #[test]
    fn not_found_must_have_ended() {
        once().cancel(10, 20, 1, not_found()).fails(check, "was not found");
        once().edit(10, 20, 1, 2_000, 2, not_found()).fails(check, "was not found");
        every_second()
            .occurrence(1_000, 1, 0, 1_000)
            .cancel(1_500, 1_510, 1, not_found())
            .fails(check, "was not found");
        once().delivered(1_000, came(1, 1)).cancel(1_001, 1_010, 1, not_found()).passes(check);
        once().delivered(1_050, came(1, 1)).cancel(1_001, 1_010, 1, not_found()).fails(check, "was not found");
        let refused = Delivery { accepted: false, ..came(1, 1) };
        once().delivered(1_000, refused.clone()).cancel(1_001, 1_010, 1, not_found()).fails(check, "was not found");
        let dead = LeftAs::DeadLetter { occurrence: 0, attempts: 3 };
        once().delivered(1_000, refused).cancel(1_001, 1_010, 1, not_found()).left(9_000, 1, dead).passes(check);
    }

    #[test]
    fn a_recurring_task_may_end_by_itself() {
        let two = |missed| {
            let registration = Registration { count: Some(2), ..recurring(1, 1_000, 1_000, missed) };
            HandMade::new().acknowledged(0, registration).occurrence(1_000, 1, 0, 1_000)
        };
        two(Missed::Once).cancel(2_500, 2_510, 1, not_found()).fails(check, "was not found");
        two(Missed::Once).occurrence(2_000, 1, 1, 2_000).cancel(2_500, 2_510, 1, not_found()).passes(check);
        // The last one may have been left out.
        two(Missed::Skip).cancel(2_500, 2_510, 1, not_found()).passes(check);
        two(Missed::Skip).cancel(1_500, 1_510, 1, not_found()).fails(check, "was not found");
    }

    #[test]
    fn not_found_may_be_before_it_was_there() {
        let asked = |end| HandMade::new().register(0, 100, one_shot(1, 1_000), end).cancel(50, 60, 1, not_found());
        asked(registered(1, 1_000)).passes(check);
        asked(unknown()).passes(check);
    }

    #[test]
    fn not_found_may_be_after_another_cancel() {
        once().cancel(10, 50, 1, unknown()).cancel(20, 30, 1, not_found()).passes(check);
        once().cancel(10, 15, 1, cancelled()).cancel(20, 30, 1, not_found()).passes(check);
        once().cancel(10, 30, 1, cancelled()).cancel(20, 25, 1, cancelled()).fails(check, "two cancels");
    }
}
