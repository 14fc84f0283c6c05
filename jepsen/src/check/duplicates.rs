//! An attempt leaves once in a term, whatever is broken, and once at all while nothing is.
//!
//! A leader knows what it has out until its term ends, also while it is not sure that it leads: an attempt whose outcome it
//! does not learn has failed, and what follows has a larger number. So the same attempt of the same occurrence with two
//! fences of one term is a leader that has forgotten, whatever was done to it. The next leader knows nothing of what the one
//! before it had out and delivers it again; but that takes a change of leaders, for which there is no reason where nothing
//! is broken. One is left: leadership that is handed over in good order, as placement does it, waits for what is out, but not
//! for long. So receivers that hold back their answers, which are those that look at fences, count only within a term.
//!
//! A dead letter that is played again begins anew with its first attempt: no load does that.
//!
//! `fences` says of such deliveries only that they must not have the same fence.

use std::collections::BTreeMap;

use super::fences::is_doubled;
use super::tasks::{Arrival, BEGINNING_US, Tasks};
use super::{Findings, Limits, Verdict};
use crate::history::{FaultNote, History, Stage, What};

/// Of one attempt of one occurrence, or of a copy of its dead letter: what came, by fence, without what a network doubled.
struct Attempt<'a, 'h> {
    name: String,
    arrivals: Vec<&'a Arrival<'h>>,
}

pub(super) fn within_a_term(history: &History, _: &Limits) -> Verdict {
    let tasks = Tasks::of(history);
    let mut findings = Findings::new("duplicates", "Within a term no attempt is delivered twice, whatever is broken");
    let (mut attempts, mut again) = (0, 0);
    for Attempt { name, arrivals } in each(&tasks) {
        attempts += 1;
        for pair in arrivals.windows(2) {
            let [one, two] = [pair[0], pair[1]];
            if one.fence().term == two.fence().term {
                findings.add([one.index, two.index], format!("{name} left twice in term {}", one.fence().term));
            } else {
                again += 1;
            }
        }
    }
    findings.verdict(vec![("deliveries", tasks.deliveries()), ("attempts", attempts), ("by another leader", again)])
}

pub(super) fn without_a_fault(history: &History, _: &Limits) -> Verdict {
    let tasks = Tasks::of(history);
    let promise = "As long as nothing has been broken, nothing is delivered twice";
    let mut findings = Findings::new("duplicates_without_a_fault", promise);
    let peace_us = peace_us(history);
    let mut attempts = 0;
    for Attempt { name, arrivals } in each(&tasks) {
        let counts = |arrival: &&Arrival<'_>| arrival.at_us < peace_us && arrival.delivery.effect.is_none();
        let arrivals: Vec<_> = arrivals.into_iter().filter(counts).collect();
        attempts += u64::from(!arrivals.is_empty());
        for pair in arrivals.windows(2) {
            let [one, two] = [pair[0], pair[1]];
            let terms = format!("in term {} and again in term {}", one.fence().term, two.fence().term);
            findings.add([one.index, two.index], format!("{name} left {terms}"));
        }
    }
    findings.verdict(vec![("deliveries", tasks.deliveries()), ("attempts", attempts)])
}

/// Until when nothing has been broken, nor a leader been told to hand over.
fn peace_us(history: &History) -> u64 {
    let not_done = |note: &FaultNote| note.stage == Stage::Note && note.detail.starts_with("not done");
    let broken = |what: &What| matches!(what, What::Fault(note) if !not_done(note));
    let first = history.events.iter().find(|event| broken(&event.what));
    first.map_or(u64::MAX, |event| event.at_us.saturating_sub(BEGINNING_US))
}

fn each<'a, 'h>(tasks: &'a Tasks<'h>) -> Vec<Attempt<'a, 'h>> {
    let mut all = Vec::new();
    for task in &tasks.all {
        let mut attempts: BTreeMap<(bool, &str, u64, u32), Vec<&Arrival<'_>>> = BTreeMap::new();
        for arrival in task.deliveries.iter().chain(&task.copies) {
            let delivery = arrival.delivery;
            let key = (delivery.dead_letter, &*delivery.task, delivery.occurrence, delivery.attempt);
            attempts.entry(key).or_default().push(arrival);
        }
        for ((copy, _, occurrence, attempt), mut arrivals) in attempts {
            arrivals.sort_by_key(|arrival| arrival.fence());
            arrivals.dedup_by(|later, earlier| is_doubled(earlier, later));
            let what = if copy { "its copy, " } else { "" };
            let name = format!("{}, occurrence {occurrence}: {what}attempt {attempt}", task.name());
            all.push(Attempt { name, arrivals });
        }
    }
    all
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

    fn task() -> HandMade {
        HandMade::new().acknowledged(0, one_shot(1, 100))
    }

    fn broken(at: u64) -> HandMade {
        task().fault(at, Stage::Begin)
    }

    #[test]
    fn the_next_leader_may_deliver_again_and_a_retry_is_another_attempt() {
        let verdict = broken(50)
            .delivered(100, sent(1, 1, 5))
            .delivered(150, sent(1, 2, 1))
            .delivered(300, sent(2, 2, 7))
            .passes(within_a_term);
        for count in [("deliveries", 3), ("attempts", 2), ("by another leader", 1)] {
            assert!(verdict.counts.contains(&count), "{:?}", verdict.counts);
        }
    }

    #[test]
    fn an_attempt_that_leaves_twice_in_a_term_is_found_whatever_is_broken() {
        let twice = || broken(50).delivered(100, sent(1, 1, 5)).delivered(150, sent(1, 1, 9));
        twice().fails(within_a_term, "occurrence 0: attempt 1 left twice in term 1");
        // In any order of arrival, and with others in between.
        broken(50)
            .delivered(100, sent(2, 1, 9))
            .delivered(110, sent(1, 1, 5))
            .delivered(120, sent(2, 2, 1))
            .delivered(130, sent(2, 1, 7))
            .fails(within_a_term, "attempt 2 left twice in term 1");
        // A copy of a dead letter has attempts of its own.
        let copy = |seq| Delivery { dead_letter: true, ..sent(1, 1, seq) };
        broken(50).delivered(90, sent(1, 1, 1)).delivered(100, copy(5)).passes(within_a_term);
        broken(50).delivered(100, copy(5)).delivered(150, copy(6)).fails(within_a_term, "its copy, attempt 1");
    }

    #[test]
    fn occurrences_have_attempts_of_their_own() {
        let nth = |n, seq| Delivery { occurrence: n, ..sent(1, 1, seq) };
        let task = || HandMade::new().acknowledged(0, recurring(1, 100, 50, Missed::Once));
        task().delivered(100, nth(0, 1)).delivered(150, nth(1, 2)).passes(within_a_term);
        task().delivered(100, nth(0, 1)).delivered(150, nth(1, 2)).passes(without_a_fault);
        task().delivered(100, nth(1, 1)).delivered(150, nth(1, 2)).fails(within_a_term, "occurrence 1: attempt 1");
    }

    #[test]
    fn a_packet_that_the_network_doubled_left_once() {
        let packet = |seq| Delivery { datagram: true, ..sent(1, 1, seq) };
        task().delivered(100, packet(5)).delivered(101, packet(5)).passes(within_a_term);
        task().delivered(100, packet(5)).delivered(101, packet(5)).passes(without_a_fault);
        let twice = || task().delivered(100, packet(5)).delivered(101, packet(5)).delivered(102, packet(6));
        twice().fails(within_a_term, "left twice");
    }

    #[test]
    fn where_nothing_is_broken_no_leader_delivers_what_another_has() {
        let again = |history: HandMade| history.delivered(100, sent(1, 1, 5)).delivered(150, sent(1, 2, 1));
        again(task()).passes(within_a_term);
        again(task()).fails(without_a_fault, "attempt 1 left in term 1 and again in term 2");
        let verdict = task().delivered(100, sent(1, 1, 5)).delivered(300, sent(2, 1, 9)).passes(without_a_fault);
        assert!(verdict.counts.contains(&("attempts", 2)), "{:?}", verdict.counts);
        // A fault is written down when it has begun; until shortly before there was none.
        again(broken(160)).passes(without_a_fault);
        again(broken(2_151)).fails(without_a_fault, "again in term 2");
        // A hand-over does not wait for a receiver that takes its time.
        let slow = |term| Delivery { effect: Some(term == 1), ..sent(1, term, 1) };
        task().delivered(100, slow(1)).delivered(150, slow(2)).passes(without_a_fault);
        let held_back = |seq| Delivery { effect: Some(seq == 1), ..sent(1, 1, seq) };
        task().delivered(100, held_back(1)).delivered(150, held_back(2)).fails(within_a_term, "left twice");
        // What could not be done is none, and to hand over is one.
        let noted = |detail: &str| {
            let note = FaultNote { fault: "hand-over".to_owned(), stage: Stage::Note, detail: detail.to_owned() };
            task().event(50, What::Fault(note))
        };
        again(noted("not done: nobody leads")).fails(without_a_fault, "again in term 2");
        again(noted("shard 1, from node 2")).passes(without_a_fault);
    }
}
