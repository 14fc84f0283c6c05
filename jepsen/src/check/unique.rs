//! Registrations with one key are one task: one id, one due instant, one registration that made it.
//!
//! A client may lose the first answer and ask again by itself, so that all that is seen is `duplicate`; but never twice
//! the contrary. Keys belong to clients: the same key of another client is another task.

use super::tasks::{Task, Tasks};
use super::{Findings, Limits, Verdict};
use crate::history::{Answer, History};

pub(super) fn check(history: &History, _: &Limits) -> Verdict {
    let tasks = Tasks::of(history);
    let mut findings =
        Findings::new("unique", "Registrations with the same key are one task, and all of them are told the same");
    let (mut keys, mut registrations, mut answered, mut duplicates, mut deliveries) = (0, 0, 0, 0, 0);
    for task in tasks.all.iter().filter(|task| task.asked().is_some_and(|asked| asked.key.is_some())) {
        keys += 1;
        registrations += task.registrations.len() as u64;
        deliveries += task.deliveries.len() as u64;
        for (_, operation) in &task.registrations {
            if let Some(Answer::Registered { duplicate, .. }) = operation.answer() {
                answered += 1;
                duplicates += u64::from(*duplicate);
            }
        }
        same_answers(task, &mut findings);
        one_task(task, &mut findings);
    }
    // Without a key, a token is a task as well.
    for task in tasks.all.iter().filter(|task| task.asked().is_some_and(|asked| asked.key.is_none())) {
        one_task(task, &mut findings);
    }
    findings.verdict(vec![
        ("operations", tasks.operations),
        ("keys", keys),
        ("registrations", registrations),
        ("answered", answered),
        ("duplicates", duplicates),
        ("deliveries", deliveries),
    ])
}

fn same_answers(task: &Task<'_>, findings: &mut Findings) {
    let Some(first) = task.acknowledged() else { return };
    let mut made = None;
    for (_, operation) in &task.registrations {
        let Some(Answer::Registered { task: id, due_ms, duplicate }) = operation.answer() else { continue };
        let events = || first.operation.events().into_iter().chain(operation.events());
        if id != first.task {
            findings.add(events(), format!("{}: the same key is also {id}", task.name()));
        } else if *due_ms != first.due_ms {
            findings.add(events(), format!("{}: due at {}, or at {due_ms}", task.name(), first.due_ms));
        }
        if !duplicate && let Some(before) = made.replace(operation) {
            let events = before.events().into_iter().chain(operation.events());
            findings.add(events, format!("{}: two registrations are said to be the first", task.name()));
        }
    }
}

/// All deliveries are of one id, the one that was answered, with the token of one registration.
fn one_task(task: &Task<'_>, findings: &mut Findings) {
    let first = task.acknowledged().map(|acknowledged| (acknowledged.task, acknowledged.index));
    let Some(first) = first.or_else(|| task.deliveries.first().map(|first| (&first.delivery.task, first.index))) else {
        return;
    };
    if let Some(other) = task.deliveries.iter().find(|arrival| arrival.delivery.task != *first.0) {
        let what = format!("{}: also came as {}", task.name(), other.delivery.task);
        return findings.add([first.1, other.index], what);
    }
    let Some(one) = task.deliveries.first() else { return };
    if let Some(other) = task.deliveries.iter().find(|arrival| arrival.delivery.token != one.delivery.token) {
        let what =
            format!("{}: one id came with the tokens {} and {}", task.name(), one.delivery.token, other.delivery.token);
        findings.add([one.index, other.index], what);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::hand_made::*;
    use crate::history::{Delivery, End, Registration, Token};

    fn keyed(token: Token) -> Registration {
        Registration { key: Some("k".to_owned()), ..one_shot(token, 100) }
    }

    fn answer(id: &str, due_at: u64, duplicate: bool) -> End {
        End::Ok(Answer::Registered { task: id.to_owned(), due_ms: due(due_at), duplicate })
    }

    fn first() -> HandMade {
        HandMade::new().register(0, 10, keyed(1), answer("t1", 100, false))
    }

    #[test]
    fn repeated_registrations_are_one_task() {
        let verdict = first()
            .register(5, 20, keyed(1), answer("t1", 100, true))
            .register(30, 40, keyed(2), answer("t1", 100, true))
            .register(50, 60, keyed(3), unknown())
            .delivered(100, delivery(1, 100))
            .delivered(110, delivery(1, 100))
            .passes(check);
        for count in [("keys", 1), ("registrations", 4), ("duplicates", 2), ("deliveries", 2)] {
            assert!(verdict.counts.contains(&count), "{:?}", verdict.counts);
        }
    }

    #[test]
    fn the_first_answer_may_be_lost() {
        HandMade::new()
            .register(0, 10, keyed(1), unknown())
            .register(20, 30, keyed(2), answer("t1", 100, true))
            .delivered(100, delivery(1, 100))
            .passes(check);
    }

    #[test]
    fn two_ids_for_one_key_are_found() {
        first().register(30, 40, keyed(2), answer("t9", 100, true)).fails(check, "also t9");
        let other = Delivery { task: "t9".to_owned(), ..delivery(1, 100) };
        first().delivered(100, delivery(1, 100)).delivered(100, other.clone()).fails(check, "also came as t9");
        first().delivered(100, other).fails(check, "also came as t9");
    }

    #[test]
    fn two_first_registrations_are_found() {
        first().register(30, 40, keyed(2), answer("t1", 100, false)).fails(check, "said to be the first");
    }

    #[test]
    fn two_due_instants_are_found() {
        first().register(30, 40, keyed(2), answer("t1", 120, true)).fails(check, "due at");
    }

    #[test]
    fn one_task_has_one_token() {
        first()
            .register(30, 40, keyed(2), unknown())
            .delivered(100, delivery(1, 100))
            .delivered(110, Delivery { token: 2, ..delivery(1, 100) })
            .fails(check, "with the tokens 1 and 2");
    }

    #[test]
    fn a_key_of_another_client_is_another_task() {
        let other = Registration { client: "d".to_owned(), ..keyed(2) };
        first().register(30, 40, other, answer("t2", 100, false)).passes(check);
    }

    #[test]
    fn a_task_without_a_key_is_registered_once_as_well() {
        let twice = Delivery { task: "t9".to_owned(), ..delivery(1, 100) };
        HandMade::new().acknowledged(0, one_shot(1, 100)).delivered(100, twice).fails(check, "also came as t9");
    }
}
