//! Every due instant of an acknowledged recurring task comes, or is left out as the task asks for when it was missed.
//!
//! Occurrences come first in their order. One that is left out must have been missed: with `all` only if more were due
//! than may be run; with `once` and `skip` anywhere while things are broken, but not when all is calm (before the first
//! fault, and after healing) and the one before was done in time. A dead letter is an end like another. When all is calm,
//! nothing may be outstanding at the end.

use std::collections::BTreeMap;

use boomerang_task::Missed;

use super::tasks::{Acknowledged, Arrival, Base, Task, Tasks};
use super::{Findings, Limits, Verdict};
use crate::history::{FIRST_VERSION, History};

/// An occurrence that is no later than this, or than its interval, is late and not missed; see `shard::recur`.
const LATE_US_MAX: u64 = 1_000_000;

#[derive(Default)]
struct Counts {
    tasks: u64,
    delivered: u64,
    accepted: u64,
    left_out: u64,
    dead: u64,
    unjudged: u64,
}

/// What was seen of one occurrence.
struct Seen<'a, 'h> {
    first: &'a Arrival<'h>,
    last: &'a Arrival<'h>,
    attempts: u32,
    accepted: bool,
}

/// A task, as far as this checker is concerned.
struct Recurring<'a, 'h> {
    tasks: &'a Tasks<'h>,
    limits: &'a Limits,
    task: &'a Task<'h>,
    acknowledged: Acknowledged<'h>,
    every_ms: u64,
    missed: Missed,
    count: Option<u64>,
    seen: BTreeMap<u64, Seen<'a, 'h>>,
}

pub(super) fn check(history: &History, limits: &Limits) -> Verdict {
    let tasks = Tasks::of(history);
    let promise =
        "Every due instant of an acknowledged recurring task comes, or is left out by the rule for missed ones";
    let mut findings = Findings::new("occurrences", promise);
    let mut counts = Counts::default();
    for task in &tasks.all {
        let (Some(asked), Some(acknowledged)) = (task.asked(), task.acknowledged()) else { continue };
        let Some(every_ms) = asked.every_ms else { continue };
        let seen = seen(task, &mut findings);
        let (missed, count) = (asked.missed, asked.count);
        let recurring = Recurring { tasks: &tasks, limits, task, acknowledged, every_ms, missed, count, seen };
        counts.tasks += 1;
        counts.delivered += recurring.seen.len() as u64;
        counts.accepted += recurring.seen.values().filter(|seen| seen.accepted).count() as u64;
        recurring.gaps(&mut counts, &mut findings);
        recurring.given_up(&mut counts, &mut findings);
        recurring.outstanding(&mut counts, &mut findings);
    }
    findings.verdict(vec![
        ("operations", tasks.operations),
        ("deliveries", tasks.deliveries()),
        ("tasks", counts.tasks),
        ("occurrences", counts.delivered),
        ("accepted", counts.accepted),
        ("left_out", counts.left_out),
        ("dead_letters", counts.dead),
        ("unjudged", counts.unjudged),
    ])
}

/// By occurrence; one that comes for the first time after a later one is a violation, unless it is a dead letter: then
/// none of its attempts may have arrived in time.
fn seen<'a, 'h>(task: &'a Task<'h>, findings: &mut Findings) -> BTreeMap<u64, Seen<'a, 'h>> {
    let mut seen: BTreeMap<u64, Seen<'a, 'h>> = BTreeMap::new();
    for arrival in &task.deliveries {
        let n = arrival.delivery.occurrence;
        if let Some(known) = seen.get_mut(&n) {
            known.last = arrival;
            known.attempts = known.attempts.max(arrival.delivery.attempt);
            known.accepted |= arrival.delivery.accepted;
            continue;
        }
        // Overtaken on its way, it may come late: its sender is gone, and the next one has merged it into a later one.
        if let Some((later, before)) = seen.range(n..).next()
            && arrival.fence() > before.first.fence()
            && !task.is_dead(n)
        {
            let what = format!("{}: occurrence {n} comes first after occurrence {later}", task.name());
            findings.add([before.first.index, arrival.index], what);
        }
        let (attempts, accepted) = (arrival.delivery.attempt, arrival.delivery.accepted);
        seen.insert(n, Seen { first: arrival, last: arrival, attempts, accepted });
    }
    seen
}

impl<'h> Recurring<'_, 'h> {
    /// What was left out between two that came, and before the first.
    fn gaps(&self, counts: &mut Counts, findings: &mut Findings) {
        let mut before: Option<(u64, &Seen<'_, 'h>)> = None;
        for (&n, seen) in &self.seen {
            let first = before.map_or(0, |(n, _)| n + 1);
            // An edit between the two moved all instants.
            let version = before.map_or(FIRST_VERSION, |(_, seen)| seen.last.delivery.version);
            if first < n && version == seen.first.delivery.version {
                let missing = (first..n).find(|n| !self.task.is_dead(*n));
                counts.left_out += n - first;
                if let Some(missing) = missing
                    && let Some(why) = self.not_missed(before, missing, n, seen)
                {
                    let since = before.map_or(self.acknowledged.index, |(_, seen)| seen.last.index);
                    let what = format!("{}: occurrence {missing} was left out, {why}", self.task.name());
                    findings.add([since, seen.first.index], what);
                }
            }
            before = Some((n, seen));
        }
    }

    /// Why `missing`, and what follows it before `n`, should have come.
    fn not_missed(
        &self,
        before: Option<(u64, &Seen<'_, 'h>)>,
        missing: u64,
        n: u64,
        seen: &Seen<'_, '_>,
    ) -> Option<String> {
        let due_ms = seen.first.delivery.due_ms;
        let due_us = |other: u64| {
            let instant_ms = if other >= n {
                due_ms + (other - n) * self.every_ms
            } else {
                due_ms.saturating_sub((n - other) * self.every_ms)
            };
            self.tasks.history.since_began_us(instant_ms)
        };
        if let Missed::All { max } = self.missed {
            // It goes on with the latest `max` of those that are due.
            let latest = n + u64::from(max) - 1;
            // Of those that a clock that is ahead takes for due, at that.
            let ahead_us = self.tasks.wrong_clocks.early_us(self.limits, seen.first.at_us);
            return (seen.first.at_us + ahead_us < due_us(latest))
                .then(|| format!("and no more than {max} were due when occurrence {n} came"));
        }
        let late_max_us = LATE_US_MAX.max(self.every_ms * 1000);
        let done_us = before.map_or(self.acknowledged.at_us, |(_, seen)| seen.last.at_us);
        let in_time =
            done_us + self.limits.answer_us + self.limits.late_us < due_us(n) && self.limits.late_us < late_max_us;
        (in_time && self.in_peace(due_us(missing), done_us))
            .then(|| format!("though all was calm and the one before was done long before {n} was due"))
    }

    /// What was due at `due_us`, and whose predecessor was done at `done_us`, was to come when nothing was broken.
    fn in_peace(&self, due_us: u64, done_us: u64) -> bool {
        let healed = self.tasks.calm_us(self.limits.heal_within_us).is_some_and(|calm_us| due_us >= calm_us);
        let comes_us = due_us.max(done_us + self.limits.answer_us) + self.limits.late_us;
        healed || comes_us < self.tasks.peace_us()
    }

    /// A refused occurrence that was tried again is settled by acceptance or death, and not before.
    fn given_up(&self, counts: &mut Counts, findings: &mut Findings) {
        let Some((&last, _)) = self.seen.last_key_value() else { return };
        for (&n, seen) in self.seen.range(..last).filter(|(_, seen)| !seen.accepted) {
            if self.task.is_dead(n) {
                counts.dead += 1;
            } else if self.tasks.has_left && seen.attempts > 1 {
                let what = format!("{}: occurrence {n} was refused, is no dead letter, and", self.task.name());
                findings.add([seen.first.index, seen.last.index], format!("{what} others came after it"));
            }
        }
    }

    /// What should have come by the end, and did not.
    fn outstanding(&self, counts: &mut Counts, findings: &mut Findings) {
        let Some((due_ms, since)) = self.next_due() else {
            counts.unjudged += 1;
            return;
        };
        let Some(calm_us) = self.tasks.calm_us(self.limits.heal_within_us) else { return };
        if self.has_ended(calm_us) {
            return;
        }
        // By the rule `skip`, what was overdue comes at the next instant.
        let skipped_us = if self.missed == Missed::Skip { self.every_ms * 1000 } else { 0 };
        let asked_us = since.map_or(self.acknowledged.at_us, |arrival| arrival.at_us);
        let due_us = self.tasks.history.since_began_us(due_ms).max(calm_us).max(asked_us);
        let cancelled = self.task.cancels.iter().filter(|cancel| super::tasks::may_have_cancelled(cancel));
        let end_us = cancelled.map(|cancel| cancel.called_us).min().unwrap_or(self.tasks.end_us);
        if due_us + skipped_us + self.limits.answer_us + self.limits.late_us > end_us {
            return;
        }
        // The last one was refused and will be tried again, or the cluster was not asked.
        if let Some((n, seen)) = self.seen.last_key_value()
            && !seen.accepted
            && !self.task.is_dead(*n)
            && (!self.tasks.has_left || self.tasks.is_to_come(self.task))
        {
            return;
        }
        let left = self.task.left.iter().map(|(index, ..)| *index);
        let events = since.map_or(self.acknowledged.index, |arrival| arrival.index);
        let what = format!("{}: was due at {due_ms}, and nothing came any more", self.task.name());
        findings.add(std::iter::once(events).chain(left), what);
    }

    /// The last of its due instants came, or may have been left out.
    fn has_ended(&self, calm_us: u64) -> bool {
        let Some(count) = self.count else { return false };
        let last = self.seen.last_key_value();
        let skipped = || {
            let (n, due_ms) = last.map_or((0, self.acknowledged.due_ms), |(n, seen)| (*n, seen.last.delivery.due_ms));
            let last_ms = due_ms + count.saturating_sub(n + 1) * self.every_ms;
            self.missed == Missed::Skip && self.tasks.history.since_began_us(last_ms) < calm_us
        };
        last.is_some_and(|(n, _)| n + 1 >= count) || skipped()
    }

    /// When the next one is due after the last that came, and that one; `None` if nobody can know.
    fn next_due(&self) -> Option<(u64, Option<&Arrival<'h>>)> {
        let last = self.seen.last_key_value().map(|(_, seen)| seen.last);
        if self.task.edits.iter().any(|edit| edit.may_be_done() && edit.edited().is_none()) {
            return None;
        }
        let edit =
            self.task.edits.iter().filter(|edit| edit.edited().is_some()).max_by_key(|edit| edit.operation.call_index);
        let version = edit.map_or(FIRST_VERSION, |edit| edit.version);
        if let Some(last) = last.filter(|last| last.delivery.version == version) {
            return Some((last.delivery.due_ms + self.every_ms, Some(last)));
        }
        // Nothing of the newest version has come yet. With several edits, which one was the last is not known for sure.
        let edited = self.task.edits.iter().filter(|edit| edit.edited().is_some()).count();
        match self.task.base(version) {
            Base::At(base) if edited <= 1 => Some((base, last)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use boomerang_task::Fence;

    use super::*;
    use crate::check::hand_made::*;
    use crate::history::{Answer, Delivery, End, LeftAs, Registration, Stage};

    /// Due every two seconds from second 2 on.
    fn every_two(missed: Missed) -> HandMade {
        HandMade::new().acknowledged(0, recurring(1, 2_000, 2_000, missed))
    }

    /// These occurrences on time.
    fn on_time(history: HandMade, occurrences: impl IntoIterator<Item = u64>) -> HandMade {
        occurrences.into_iter().fold(history, |history, n| history.occurrence(at(n), 1, n, at(n)))
    }

    fn at(n: u64) -> u64 {
        2_000 + n * 2_000
    }

    fn broken(history: HandMade) -> HandMade {
        history.fault(1, Stage::Begin)
    }

    #[test]
    fn all_on_time_is_as_promised() {
        let verdict = on_time(every_two(Missed::Once), 0..10).until(21_900).passes(check);
        for count in [("tasks", 1), ("occurrences", 10), ("accepted", 10), ("left_out", 0)] {
            assert!(verdict.counts.contains(&count), "{:?}", verdict.counts);
        }
    }

    #[test]
    fn nothing_after_healing_is_found() {
        on_time(every_two(Missed::Once), 0..3).until(40_000).fails(check, "nothing came any more");
        every_two(Missed::Skip).until(40_000).fails(check, "nothing came any more");
        broken(on_time(every_two(Missed::Once), 0..3))
            .healed(20_000)
            .until(40_000)
            .fails(check, "nothing came any more");
        // Not before it must be calm again.
        broken(on_time(every_two(Missed::Once), 0..3)).healed(30_000).until(40_000).passes(check);
        broken(on_time(every_two(Missed::Once), 0..3)).until(40_000).passes(check);
    }

    #[test]
    fn after_the_last_of_a_few_nothing_is_due() {
        let few = |missed| {
            let registration = Registration { count: Some(6), ..recurring(1, 2_000, 2_000, missed) };
            HandMade::new().acknowledged(0, registration)
        };
        on_time(few(Missed::Once), 0..6).until(40_000).passes(check);
        on_time(few(Missed::Once), 0..5).until(40_000).fails(check, "nothing came any more");
        // What was missed to the end is run as one by `once`, and not at all by `skip`.
        broken(on_time(few(Missed::Once), 0..3)).healed(20_000).until(60_000).fails(check, "nothing came any more");
        broken(on_time(few(Missed::Skip), 0..3)).healed(20_000).until(60_000).passes(check);
    }

    #[test]
    fn after_a_cancel_nothing_is_due() {
        let cancelled = |end| on_time(every_two(Missed::Once), 0..8).cancel(17_000, 17_010, 1, end).until(40_000);
        cancelled(End::Ok(Answer::Cancelled)).passes(check);
        cancelled(unknown()).passes(check);
        cancelled(failed()).fails(check, "nothing came any more");
    }

    #[test]
    fn missed_ones_are_merged_while_things_are_broken() {
        let history =
            || broken(on_time(every_two(Missed::Once), [0, 1])).occurrence(13_500, 1, 5, at(5)).healed(14_000);
        let verdict = on_time(history(), 6..20).until(at(20)).passes(check);
        assert!(verdict.counts.contains(&("left_out", 3)), "{:?}", verdict.counts);
    }

    #[test]
    fn an_occurrence_left_out_in_peace_is_found() {
        for missed in [Missed::Once, Missed::Skip] {
            let history = on_time(every_two(missed), (0..20).filter(|n| *n != 12)).until(at(20));
            history.fails(check, "occurrence 12 was left out");
        }
        // If the one before took its time, it was missed.
        let history = on_time(every_two(Missed::Once), (0..20).filter(|n| *n != 12));
        let again = Delivery { occurrence: 11, attempt: 2, ..delivery(1, at(11)) };
        history.delivered(at(13) - 100, again).until(at(20)).passes(check);
    }

    #[test]
    fn one_left_out_before_the_first_fault_is_found() {
        for missed in [Missed::Once, Missed::Skip] {
            // The third is due at second 6.
            let history = || on_time(every_two(missed), (0..20).filter(|n| *n != 2)).until(at(20));
            history().fault(12_000, Stage::Begin).healed(30_000).fails(check, "occurrence 2 was left out");
            // Though nothing is ever healed, or broken.
            history().fault(12_000, Stage::Begin).fails(check, "occurrence 2 was left out");
            history().fails(check, "occurrence 2 was left out");
            // What is written down at second 8 may have begun when it was due.
            history().fault(8_000, Stage::Begin).healed(30_000).passes(check);
        }
    }

    #[test]
    fn with_all_none_is_left_out() {
        let all = Missed::All { max: 3 };
        // 2, 3, 4 and 5 were due at 13.5 s: three of them run.
        let history = broken(on_time(every_two(all), [0, 1]));
        let history = [3, 4, 5].into_iter().fold(history, |history, n| history.occurrence(13_500, 1, n, at(n)));
        on_time(history, 6..20).healed(14_000).until(at(20)).passes(check);
        let history = broken(on_time(every_two(all), [0, 1]));
        let history = [4, 5].into_iter().fold(history, |history, n| history.occurrence(13_500, 1, n, at(n)));
        on_time(history, 6..20).healed(14_000).until(at(20)).fails(check, "occurrence 2 was left out");
    }

    #[test]
    fn a_dead_letter_is_an_end() {
        let history = || on_time(every_two(Missed::All { max: 9 }), (0..20).filter(|n| *n != 12)).until(at(20));
        history().fails(check, "occurrence 12 was left out");
        history().left(at(20), 1, LeftAs::DeadLetter { occurrence: 12, attempts: 3 }).passes(check);
    }

    #[test]
    fn the_order_of_occurrences_is_kept() {
        let history = || on_time(every_two(Missed::Once), (0..20).filter(|n| *n != 12)).until(at(20));
        let twelfth = |seq| Delivery { occurrence: 12, fence: Fence { term: 1, seq }, ..delivery(1, at(12)) };
        history().delivered(at(13) + 100, twelfth(15)).fails(check, "comes first after occurrence 13");
        // Dispatched before that one, it was overtaken on its way.
        history().delivered(at(13) + 100, twelfth(13)).passes(check);
        // A repetition may come at any time.
        on_time(every_two(Missed::Once), 0..20).occurrence(at(13) + 100, 1, 12, at(12)).until(at(20)).passes(check);
    }

    #[test]
    fn a_refused_occurrence_is_not_given_up() {
        let refused = |attempt| Delivery { occurrence: 12, attempt, accepted: false, ..delivery(1, at(12)) };
        let history = || {
            on_time(every_two(Missed::Once), (0..20).filter(|n| *n != 12))
                .delivered(at(12), refused(1))
                .delivered(at(12) + 300, refused(2))
                .left(at(20), 1, LeftAs::Pending { due_ms: due(at(20) + 5), occurrence: 20 })
        };
        history().fails(check, "is no dead letter");
        history().left(at(20), 1, LeftAs::DeadLetter { occurrence: 12, attempts: 2 }).passes(check);
    }

    #[test]
    fn a_refused_last_occurrence_comes_again() {
        let refused = || {
            on_time(every_two(Missed::Once), 0..12)
                .delivered(at(12), Delivery { occurrence: 12, accepted: false, ..delivery(1, at(12)) })
                .until(60_000)
        };
        let pending = |at| LeftAs::Pending { due_ms: due(at), occurrence: 12 };
        refused().left(60_000, 1, pending(70_000)).passes(check);
        refused().left(60_000, 1, pending(50_000)).fails(check, "nothing came any more");
    }

    #[test]
    fn after_an_edit_the_new_instants_are_due() {
        let second = |n: u64, due_at| Delivery { occurrence: n, version: 2, ..delivery(1, due_at) };
        let edited = |end| on_time(every_two(Missed::Once), 0..3).edit(6_500, 6_510, 1, 30_000, 2, end).until(33_900);
        let ok = || End::Ok(Answer::Edited { due_ms: due(30_000) });
        let come =
            |history: HandMade| history.delivered(30_000, second(3, 30_000)).delivered(32_000, second(4, 32_000));
        come(edited(ok())).passes(check);
        edited(ok()).fails(check, "was due at");
        let verdict = edited(unknown()).passes(check);
        assert!(verdict.counts.contains(&("unjudged", 1)));
    }
}
