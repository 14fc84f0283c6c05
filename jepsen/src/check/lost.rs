//! No acknowledged one-shot task is lost, and none fires that was refused.
//!
//! A task that was acknowledged and is due in time before the end of the run must have been delivered and accepted. It
//! need not if it may have been cancelled, if it is a dead letter, or if the cluster says that its next attempt comes after the end.
//! One that was edited must have been accepted in a version that may be its last: an acknowledged edit is not lost, whatever
//! came before it. What nobody answered may be there or not. What certainly failed must not come, nor what nobody asked for.
//! Recurring tasks are those of `occurrences`.

use super::tasks::{Acknowledged, Edit, Task, Tasks};
use super::{Findings, Limits, Verdict};
use crate::history::{History, LeftAs};

#[derive(Default)]
struct Counts {
    acknowledged: u64,
    accepted: u64,
    cancelled: u64,
    dead: u64,
    waiting: u64,
    not_due: u64,
    unknown: u64,
    unknown_delivered: u64,
    refused: u64,
}

pub(super) fn check(history: &History, limits: &Limits) -> Verdict {
    let tasks = Tasks::of(history);
    let mut findings = Findings::new(
        "lost",
        "Every acknowledged one-shot task is delivered and accepted; none fires that was refused",
    );
    let mut counts = Counts::default();
    for task in &tasks.all {
        uninvited(task, &mut findings);
        if task.registrations.is_empty() || task.every_ms().is_some() {
            continue;
        }
        if let Some(acknowledged) = task.acknowledged() {
            counts.acknowledged += 1;
            fate(&tasks, limits, task, &acknowledged, &mut counts, &mut findings);
        } else if task.registrations.iter().all(|(_, operation)| operation.failed()) {
            counts.refused += 1;
        } else {
            counts.unknown += 1;
            counts.unknown_delivered += u64::from(!task.deliveries.is_empty());
        }
    }
    findings.verdict(vec![
        ("operations", tasks.operations),
        ("deliveries", tasks.deliveries()),
        ("acknowledged", counts.acknowledged),
        ("accepted", counts.accepted),
        ("cancelled", counts.cancelled),
        ("dead_letters", counts.dead),
        ("waiting", counts.waiting),
        ("not_due", counts.not_due),
        ("unknown", counts.unknown),
        ("unknown_delivered", counts.unknown_delivered),
        ("refused", counts.refused),
    ])
}

/// Deliveries of what nobody asked for, or what was refused.
fn uninvited(task: &Task<'_>, findings: &mut Findings) {
    let mut seen = Vec::new();
    for arrival in task.deliveries.iter().chain(&task.copies) {
        let token = arrival.delivery.token;
        if seen.contains(&token) {
            continue;
        }
        seen.push(token);
        let asked: Vec<_> = task.registrations.iter().filter(|(asked, _)| asked.token == token).collect();
        let Some((_, first)) = asked.first() else {
            findings.add([arrival.index], format!("token {token} was delivered, and nobody registered it"));
            continue;
        };
        if asked.iter().all(|(_, operation)| operation.failed()) {
            let events = asked.iter().flat_map(|(_, operation)| operation.events()).chain([arrival.index]);
            let what = format!("{}: the registration certainly failed, and it was delivered", task.name());
            findings.add(events, what);
        } else if first.call_index > arrival.index {
            let what = format!("{}: was delivered before anybody asked for it", task.name());
            findings.add([arrival.index, first.call_index], what);
        }
    }
}

/// What became of an acknowledged task.
fn fate(
    tasks: &Tasks<'_>,
    limits: &Limits,
    task: &Task<'_>,
    acknowledged: &Acknowledged<'_>,
    counts: &mut Counts,
    findings: &mut Findings,
) {
    let due_ms = task.latest_due_ms().unwrap_or(acknowledged.due_ms);
    let due_us = tasks.history.since_began_us(due_ms).max(known_us(task, acknowledged));
    let last = Last::of(task);
    if task.deliveries.iter().any(|arrival| arrival.delivery.accepted && last.may_be(arrival.delivery.version)) {
        counts.accepted += 1;
    } else if task.may_be_cancelled() {
        counts.cancelled += 1;
    } else if task.is_dead(0) {
        counts.dead += 1;
    } else if tasks.calm_us(limits.heal_within_us).is_none_or(|calm| due_us.max(calm) + limits.late_us > tasks.end_us) {
        counts.not_due += 1;
    } else if waits(tasks, task, &last) {
        counts.waiting += 1;
    } else {
        let what = format!("{}: acknowledged, due at {due_ms}, and {}", task.name(), instead(task));
        let edits = task.edits.iter().filter(|edit| last.may_be(edit.version)).take(5);
        let events = acknowledged.operation.events().into_iter().chain(edits.flat_map(|edit| edit.operation.events()));
        let refused = task.deliveries.iter().take(5).map(|arrival| arrival.index);
        findings.add(events.chain(refused).chain(task.left.iter().map(|(index, ..)| *index)), what);
    }
}

/// Since when everything that was acknowledged is known.
fn known_us(task: &Task<'_>, acknowledged: &Acknowledged<'_>) -> u64 {
    let edits = task.edits.iter().filter(|edit| edit.edited().is_some());
    edits.filter_map(|edit| edit.operation.ended_us()).fold(acknowledged.at_us, u64::max)
}

/// The versions that may be the last one of a task.
enum Last {
    /// No edit was acknowledged: whichever comes was asked for, or `answers` says so.
    Any,
    /// Of those that were acknowledged, or may have been made, those that no acknowledged one has certainly followed. One
    /// without an answer may be made at any time.
    OneOf(Vec<u32>),
}

impl Last {
    fn of(task: &Task<'_>) -> Self {
        let Some(called) = task.edits.iter().filter(|edit| edit.edited().is_some()).map(called).max() else {
            return Self::Any;
        };
        let followed = |edit: &Edit<'_>| match edit.operation.end {
            Some((.., ended)) => edit.edited().is_some() && ended < called,
            None => false,
        };
        let may_be_last = task.edits.iter().filter(|edit| edit.may_be_done() && !followed(edit));
        Self::OneOf(may_be_last.map(|edit| edit.version).collect())
    }

    fn may_be(&self, version: u32) -> bool {
        match self {
            Self::Any => true,
            Self::OneOf(versions) => versions.contains(&version),
        }
    }
}

fn called(edit: &Edit<'_>) -> u64 {
    edit.operation.call_index
}

/// It was refused, and its next attempt is still to come.
fn waits(tasks: &Tasks<'_>, task: &Task<'_>, last: &Last) -> bool {
    if task.deliveries.is_empty() {
        return false;
    }
    // If the cluster was never asked what is left, nothing speaks against it.
    let refused = || task.deliveries.iter().any(|arrival| last.may_be(arrival.delivery.version));
    !tasks.has_left && refused() || tasks.is_to_come(task)
}

fn instead(task: &Task<'_>) -> String {
    let overdue = task.left.iter().any(|(.., left)| matches!(left.state, LeftAs::Pending { .. }));
    let still = if overdue { "it is still pending" } else { "nothing is left of it" };
    if let Some(accepted) = task.first_accepted() {
        return format!("edited, and accepted only in version {}; {still}", accepted.delivery.version);
    }
    match task.deliveries.len() {
        0 => format!("never delivered; {still}"),
        many => format!("delivered {many} times and never accepted; {still}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::hand_made::*;
    use crate::history::{Answer, Delivery, End};

    fn acknowledged() -> HandMade {
        HandMade::new().acknowledged(0, one_shot(1, 100)).healed(1_000).until(60_000)
    }

    fn refused(attempt: u32) -> Delivery {
        Delivery { attempt, accepted: false, ..delivery(1, 100) }
    }

    #[test]
    fn delivered_is_not_lost() {
        let verdict = acknowledged().delivered(100, delivery(1, 100)).passes(check);
        assert!(verdict.counts.contains(&("accepted", 1)), "{:?}", verdict.counts);
    }

    #[test]
    fn a_delivery_may_be_seen_before_the_answer() {
        HandMade::new()
            .register(0, 500, one_shot(1, 100), registered(1, 100))
            .delivered(100, delivery(1, 100))
            .until(60_000)
            .passes(check);
    }

    #[test]
    fn never_delivered_is_lost() {
        acknowledged().fails(check, "never delivered");
    }

    #[test]
    fn pending_though_overdue_is_lost() {
        let left = LeftAs::Pending { due_ms: due(100), occurrence: 0 };
        acknowledged().left(60_000, 1, left).fails(check, "it is still pending");
    }

    #[test]
    fn what_is_due_after_the_end_or_while_broken_is_not_judged() {
        HandMade::new().acknowledged(0, one_shot(1, 59_900)).until(60_000).passes(check);
        HandMade::new().acknowledged(0, one_shot(1, 100)).healed(55_000).until(60_000).passes(check);
        HandMade::new()
            .acknowledged(0, one_shot(1, 100))
            .fault(50, crate::history::Stage::Begin)
            .until(60_000)
            .passes(check);
    }

    #[test]
    fn an_edit_that_nobody_answered_may_have_moved_it() {
        acknowledged().edit(10, 20, 1, 90_000, 2, unknown()).passes(check);
        acknowledged().edit(10, 20, 1, 90_000, 2, failed()).fails(check, "never delivered");
    }

    fn edited(due_at: u64) -> End {
        End::Ok(Answer::Edited { due_ms: due(due_at) })
    }

    fn came(attempt: u32, version: u32, due_at: u64) -> Delivery {
        Delivery { attempt, version, ..delivery(1, due_at) }
    }

    #[test]
    fn an_acknowledged_edit_is_not_lost() {
        // The first version was out when the edit was answered, and ended the task.
        let lost = || acknowledged().edit(90, 110, 1, 5_000, 2, edited(5_000)).delivered(105, came(1, 1, 100));
        lost().fails(check, "accepted only in version 1");
        lost().delivered(5_000, came(2, 2, 5_000)).passes(check);
        // Unless it may have come to another end, or it is not due yet.
        lost().cancel(2_000, 2_010, 1, unknown()).passes(check);
        lost().left(60_000, 1, LeftAs::DeadLetter { occurrence: 0, attempts: 3 }).passes(check);
        lost().left(60_000, 1, LeftAs::Pending { due_ms: due(70_000), occurrence: 0 }).passes(check);
        acknowledged().edit(90, 110, 1, 59_900, 2, edited(59_900)).delivered(105, came(1, 1, 100)).passes(check);
        // What was not edited was not lost.
        acknowledged().edit(90, 110, 1, 5_000, 2, unknown()).delivered(105, came(1, 1, 100)).passes(check);
        acknowledged().edit(90, 110, 1, 5_000, 2, failed()).delivered(105, came(1, 1, 100)).passes(check);
    }

    #[test]
    fn the_last_of_several_edits_must_come() {
        let two = |from, end| {
            let first = acknowledged().edit(10, 20, 1, 4_000, 2, edited(4_000));
            first.edit(from, from + 20, 1, 5_000, 3, end)
        };
        let second = || came(1, 2, 4_000);
        two(30, edited(5_000)).delivered(4_000, second()).fails(check, "accepted only in version 2");
        two(30, edited(5_000)).delivered(5_000, came(1, 3, 5_000)).passes(check);
        // At the same time, either may be the last; without an answer, it may be or not. But the first version is gone.
        for (from, end) in [(15, edited(5_000)), (30, unknown()), (5, unknown())] {
            two(from, end.clone()).delivered(4_000, second()).passes(check);
            two(from, end.clone()).delivered(5_000, came(1, 3, 5_000)).passes(check);
            two(from, end).delivered(100, came(1, 1, 100)).fails(check, "accepted only in version 1");
        }
    }

    #[test]
    fn a_cancel_that_nobody_answered_may_have_ended_it() {
        acknowledged().cancel(10, 20, 1, unknown()).passes(check);
        acknowledged().cancel(10, 20, 1, End::Ok(Answer::NotFound)).fails(check, "never delivered");
    }

    #[test]
    fn a_dead_letter_is_not_lost() {
        let dead = LeftAs::DeadLetter { occurrence: 0, attempts: 3 };
        acknowledged().delivered(100, refused(1)).left(60_000, 1, dead).passes(check);
        let copy = Delivery { dead_letter: true, ..delivery(1, 100) };
        acknowledged().delivered(100, refused(1)).delivered(900, copy).passes(check);
    }

    #[test]
    fn refused_and_then_forgotten_is_lost() {
        let other = LeftAs::Pending { due_ms: due(90_000), occurrence: 0 };
        acknowledged()
            .acknowledged(0, one_shot(2, 90_000))
            .delivered(100, refused(1))
            .delivered(400, refused(2))
            .left(60_000, 2, other)
            .fails(check, "delivered 2 times and never accepted");
        acknowledged().delivered(100, refused(1)).left(60_000, 1, other).passes(check);
    }

    #[test]
    fn what_failed_must_not_come() {
        HandMade::new()
            .register(0, 1, one_shot(1, 100), failed())
            .delivered(100, delivery(1, 100))
            .fails(check, "certainly failed");
    }

    #[test]
    fn what_nobody_answered_may_come_or_not() {
        let unknown = HandMade::new().register(0, 1, one_shot(1, 100), unknown()).healed(1_000).until(60_000);
        unknown.passes(check);
        HandMade::new()
            .register(0, 1, one_shot(1, 100), super::tests::unknown())
            .delivered(100, delivery(1, 100))
            .until(60_000)
            .passes(check);
    }

    #[test]
    fn what_nobody_asked_for_must_not_come() {
        HandMade::new().delivered(100, delivery(7, 100)).fails(check, "nobody registered");
        HandMade::new()
            .acknowledged(200, one_shot(1, 100))
            .delivered(100, delivery(1, 100))
            .fails(check, "before anybody asked");
    }
}
