//! When all is calm again, what is due comes on time.
//!
//! Lateness is from the due instant to the first arrival of the first attempt. It begins later where nobody could have
//! been on time: the task was registered or moved to an instant that was over, or the occurrence before was still out. When all is
//! calm, no first attempt may vanish either: where none ever came, the first arrival stands for it. Datagrams may be lost.

use std::collections::BTreeMap;

use super::tasks::{Arrival, Task, Tasks};
use super::{Findings, Limits, Verdict};
use crate::history::{FIRST_VERSION, History};

/// How late, by when it was due.
#[derive(Default)]
struct Lateness {
    /// Before anything was broken.
    before: Vec<u64>,
    during: Vec<u64>,
    after: Vec<u64>,
}

pub(super) fn check(history: &History, limits: &Limits) -> Verdict {
    let tasks = Tasks::of(history);
    let mut findings = Findings::new("lateness", "After healing, what is due comes on time");
    let calm_us = tasks.calm_us(limits.heal_within_us).unwrap_or(u64::MAX);
    let broken_us = tasks.first_broken_us.unwrap_or(calm_us);
    let mut lateness = Lateness::default();
    for task in &tasks.all {
        for First { due_us, may_wait_us, arrival } in first_attempts(history, task, limits, calm_us) {
            let late_us = arrival.at_us.saturating_sub(due_us);
            let kind = match due_us {
                _ if due_us >= calm_us => &mut lateness.after,
                _ if due_us >= broken_us => &mut lateness.during,
                _ => &mut lateness.before,
            };
            kind.push(late_us);
            if due_us >= calm_us && arrival.at_us > due_us.max(may_wait_us) + limits.late_us {
                let (occurrence, _) = arrival.turn();
                let first = if arrival.delivery.attempt == 1 { "" } else { ", and no first attempt ever" };
                let what = format!("{}, occurrence {occurrence}: came {late_us} us late{first}", task.name());
                findings.add([arrival.index], what);
            }
        }
    }
    let mut counts = vec![("deliveries", tasks.deliveries())];
    let names = [
        (&mut lateness.before, ["before", "before_p50_us", "before_p99_us", "before_max_us"]),
        (&mut lateness.during, ["during", "during_p50_us", "during_p99_us", "during_max_us"]),
        (&mut lateness.after, ["after", "after_p50_us", "after_p99_us", "after_max_us"]),
    ];
    for (figures, [many, p50, p99, max]) in names {
        figures.sort_unstable();
        counts.push((many, figures.len() as u64));
        counts.push((p50, percentile(figures, 50)));
        counts.push((p99, percentile(figures, 99)));
        counts.push((max, percentile(figures, 100)));
    }
    findings.verdict(counts)
}

/// So many of a hundred are no larger. Of nothing it is zero.
pub fn percentile(sorted: &[u64], percent: usize) -> u64 {
    let place = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(place).copied().unwrap_or(0)
}

/// The first arrival of a first attempt, or of what came instead of it.
struct First<'a, 'h> {
    /// From when on it is late.
    due_us: u64,
    /// Until then the receiver may have been at the occurrence before.
    may_wait_us: u64,
    arrival: &'a Arrival<'h>,
}

fn first_attempts<'a, 'h>(history: &History, task: &'a Task<'h>, limits: &Limits, calm_us: u64) -> Vec<First<'a, 'h>> {
    let mut firsts: BTreeMap<u64, &Arrival<'h>> = BTreeMap::new();
    let mut retries: BTreeMap<u64, &Arrival<'h>> = BTreeMap::new();
    let mut lasts: BTreeMap<u64, u64> = BTreeMap::new();
    for arrival in &task.deliveries {
        let (occurrence, attempt) = arrival.turn();
        lasts.insert(occurrence, arrival.at_us);
        if attempt == 1 {
            firsts.entry(occurrence).or_insert(arrival);
        } else {
            retries.entry(occurrence).or_insert(arrival);
        }
    }
    // A first attempt that was made before may have been lost with what was broken.
    let in_peace = |arrival: &Arrival<'_>| history.since_began_us(arrival.delivery.due_ms) >= calm_us;
    for (occurrence, arrival) in retries {
        if in_peace(arrival) && !arrival.delivery.datagram {
            firsts.entry(occurrence).or_insert(arrival);
        }
    }
    let mut known_us: BTreeMap<u32, Option<u64>> = BTreeMap::new();
    let mut judged = Vec::with_capacity(firsts.len());
    for (occurrence, arrival) in firsts {
        let version = arrival.delivery.version;
        // Nobody knows when it was registered or edited.
        let Some(known_us) = *known_us.entry(version).or_insert_with(|| since_us(task, version)) else { continue };
        let due_us = history.since_began_us(arrival.delivery.due_ms);
        let before_us = lasts.range(..occurrence).next_back().map(|(_, last_us)| *last_us);
        let due_us = due_us.max(known_us).max(before_us.unwrap_or(0).min(arrival.at_us));
        let may_wait_us = before_us.map_or(0, |before_us| before_us + limits.answer_us);
        judged.push(First { due_us, may_wait_us, arrival });
    }
    judged
}

/// Since when the task has certainly had this version.
fn since_us(task: &Task<'_>, version: u32) -> Option<u64> {
    if version == FIRST_VERSION {
        return task.acknowledged().map(|acknowledged| acknowledged.at_us);
    }
    let edit = task.edits.iter().find(|edit| edit.version == version && edit.edited().is_some())?;
    edit.operation.ended_us()
}

#[cfg(test)]
mod tests {
    use boomerang_task::Missed;

    use super::*;
    use crate::check::hand_made::*;
    use crate::history::{Answer, Delivery, End, Stage};

    /// Broken until second 5, calm from second 15 on.
    fn broken() -> HandMade {
        HandMade::new().fault(2_000, Stage::Begin).healed(5_000)
    }

    #[test]
    fn on_time_is_on_time() {
        let verdict = broken()
            .acknowledged(0, one_shot(1, 1_000))
            .delivered(1_001, delivery(1, 1_000))
            .acknowledged(0, one_shot(2, 20_000))
            .delivered(20_002, delivery(2, 20_000))
            .passes(check);
        for count in [("before", 1), ("before_max_us", 1_000), ("after", 1), ("after_p99_us", 2_000), ("during", 0)] {
            assert!(verdict.counts.contains(&count), "{:?}", verdict.counts);
        }
    }

    #[test]
    fn late_after_healing_is_found() {
        broken()
            .acknowledged(0, one_shot(1, 20_000))
            .delivered(20_501, delivery(1, 20_000))
            .fails(check, "501000 us late");
        let late = HandMade::new().acknowledged(0, one_shot(1, 20_000)).delivered(20_501, delivery(1, 20_000));
        late.fails(check, "501000 us late");
    }

    #[test]
    fn late_while_broken_is_only_counted() {
        let verdict = broken().acknowledged(0, one_shot(1, 3_000)).delivered(14_000, delivery(1, 3_000)).passes(check);
        assert!(verdict.counts.contains(&("during_max_us", 11_000_000)), "{:?}", verdict.counts);
        let never = HandMade::new().fault(2_000, Stage::Begin).acknowledged(0, one_shot(1, 20_000));
        never.delivered(30_000, delivery(1, 20_000)).passes(check);
    }

    #[test]
    fn a_retry_is_not_late() {
        let retry = Delivery { attempt: 2, ..delivery(1, 20_000) };
        let tried = broken().acknowledged(0, one_shot(1, 20_000)).delivered(20_001, delivery(1, 20_000));
        tried.delivered(25_000, retry).passes(check);
    }

    #[test]
    fn a_first_attempt_that_vanishes_in_peace_is_late() {
        let second = |due_at| Delivery { attempt: 2, ..delivery(1, due_at) };
        let once = |due_at| broken().acknowledged(0, one_shot(1, due_at));
        once(20_000).delivered(20_900, second(20_000)).fails(check, "900000 us late, and no first attempt ever");
        // If the next one comes in time, nobody can tell.
        once(20_000).delivered(20_400, second(20_000)).passes(check);
        // What was due while things were broken may have been lost with them, and so may a packet.
        once(14_000).delivered(20_900, second(14_000)).passes(check);
        let packet = Delivery { datagram: true, ..second(20_000) };
        once(20_000).delivered(20_900, packet).passes(check);
        // It came after all, even if later than the second.
        once(20_000).delivered(20_300, second(20_000)).delivered(20_400, delivery(1, 20_000)).passes(check);
    }

    #[test]
    fn an_instant_that_was_over_is_due_when_it_is_known() {
        let over = || broken().register(30_000, 30_400, one_shot(1, 20_000), registered(1, 20_000));
        over().delivered(30_500, delivery(1, 20_000)).passes(check);
        over().delivered(30_950, delivery(1, 20_000)).fails(check, "550000 us late");
        let second = Delivery { version: 2, ..delivery(1, 20_000) };
        broken()
            .acknowledged(0, one_shot(1, 60_000))
            .edit(30_000, 30_010, 1, 20_000, 2, End::Ok(Answer::Edited { due_ms: due(20_000) }))
            .delivered(30_020, second)
            .passes(check);
    }

    #[test]
    fn an_occurrence_waits_for_the_one_before() {
        let task = || broken().acknowledged(0, recurring(1, 20_000, 1_000, Missed::All { max: 9 }));
        let again = Delivery { attempt: 2, ..delivery(1, 20_000) };
        let waits = || task().occurrence(20_000, 1, 0, 20_000).delivered(22_500, again.clone());
        waits().occurrence(22_510, 1, 1, 21_000).passes(check);
        // Its receiver may have taken a while for its answer.
        waits().occurrence(23_200, 1, 1, 21_000).passes(check);
        waits().occurrence(23_300, 1, 1, 21_000).fails(check, "800000 us late");
    }

    #[test]
    fn percentiles_are_of_what_is_there() {
        let figures: Vec<u64> = (1..=200).collect();
        assert_eq!([50, 99, 100].map(|percent| percentile(&figures, percent)), [100, 198, 200]);
        assert_eq!(percentile(&[], 50), 0);
        assert_eq!(percentile(&[7], 1), 7);
    }
}
