//! No acknowledged write is missing from get and list: each task by itself is linearizable.
//!
//! A task is a small machine, and what clients asked of it must have happened in some order, each operation at one instant
//! between its call and its end:
//!
//! ```text
//!   unregistered --register--> pending (version, due, occurrence and attempt) --cancel, or the cluster--> ended
//!                                 '--edit-->'
//! ```
//!
//! The cluster ends a task at any time after its last occurrence was accepted for the first time, or as a dead letter. A write without an answer
//! takes effect at any time after its call, or never. A list asks each task whether it is pending. A delivery shows that the task
//! had been registered, and had come to that attempt.
//!
//! The search (Wing and Gong, with memory) walks over calls and ends in order and keeps every state that is still possible,
//! together with the operations under way that have already taken effect in it. When an operation ends, only the states in which it
//! has taken effect are kept; when none is left, no order explains the history. What is kept is bounded by how many operations of
//! one task overlap, not by the length of the run. A task with too many is not decided, and then nobody can say that the
//! promise was kept: that is a violation, too, and says so. Loads must not ask for so much of one task at a time.

use std::collections::{HashMap, HashSet};

use super::tasks::{Base, Task, Tasks, is_open, may_have_cancelled};
use super::{Findings, Limits, Verdict};
use crate::history::{Answer, FIRST_VERSION, History, Operation};

/// More possible states than this, or more operations under way at once than there are bits, and a task is left undecided.
const STATES_MAX: usize = 20_000;
const UNDER_WAY_MAX: usize = 64;

/// Occurrence and attempt.
type Turn = (u64, u32);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum State {
    Unregistered,
    Pending {
        version: u32,
        /// `None`: it was asked for as a delay, and nobody answered.
        due_ms: Option<u64>,
        /// It has come at least so far.
        turn: Turn,
    },
    Ended,
}

/// What was asked, together with what was answered.
#[derive(Debug, Clone, Copy)]
enum Step {
    Register {
        due_ms: Option<u64>,
        first: bool,
    },
    Cancel,
    Edit {
        version: u32,
        due_ms: u64,
    },
    EditTooLate,
    NotFound,
    Found {
        version: u32,
        due_ms: u64,
        turn: Turn,
    },
    Listed,
    NotListed,
    /// A delivery came: not an operation, but as good as a look.
    Delivered {
        turn: Turn,
    },
    /// The cluster is done with it.
    Settle,
}

#[derive(Debug, Clone)]
struct Move {
    step: Step,
    /// Index of the call.
    from: u64,
    /// Index of the end; `None`: whenever, or never.
    to: Option<u64>,
}

/// A state that is possible, and which of the moves under way have been made in it.
type Possible = (State, u64);

pub(super) fn check(history: &History, limits: &Limits) -> Verdict {
    let tasks = Tasks::of(history);
    let promise = "No acknowledged write is missing from get and list; each task is linearizable";
    let mut findings = Findings::new("reads", promise);
    let settled: Vec<Option<u64>> = tasks.all.iter().map(|task| tasks.settled_from(task, limits)).collect();
    let of_task = |(task, settled): (&Task<'_>, &Option<u64>)| moves_of(task, *settled);
    let mut moves: Vec<Vec<Move>> = tasks.all.iter().zip(&settled).map(of_task).collect();
    let strangers = add_lists(&tasks, &settled, &mut moves);
    let (mut made, mut undecided, mut judged) = (0, 0, 0);
    for (task, moves) in tasks.all.iter().zip(&moves) {
        if task.registrations.is_empty() {
            continue;
        }
        judged += 1;
        made += moves.len() as u64;
        match (Search { recurring: task.every_ms().is_some(), moves }).run() {
            Outcome::Explained => {}
            Outcome::Undecided => {
                undecided += 1;
                let what = format!("{}: too much was asked of it at a time to decide: nobody can tell", task.name());
                findings.add(task.registrations.iter().flat_map(|(_, operation)| operation.events()), what);
            }
            Outcome::Stuck(at) => findings.add(events(moves, at), explain(task, &moves[at])),
        }
    }
    findings.verdict(vec![
        ("operations", tasks.operations),
        ("deliveries", tasks.deliveries()),
        ("gets", tasks.all.iter().map(|task| task.gets.len() as u64).sum()),
        ("lists", tasks.lists.len() as u64),
        ("tasks", judged),
        ("moves", made),
        ("strangers_listed", strangers),
        ("undecided", undecided),
    ])
}

/// Everything but lists.
fn moves_of(task: &Task<'_>, settled: Option<u64>) -> Vec<Move> {
    let mut moves = Vec::new();
    let due_ms = match task.base(FIRST_VERSION) {
        Base::At(due_ms) => Some(due_ms),
        Base::Unknown | Base::Never => None,
    };
    for (_, operation) in &task.registrations {
        let first = matches!(operation.answer(), Some(Answer::Registered { duplicate: false, .. }));
        add(&mut moves, operation, Some(Step::Register { due_ms, first }), |answer| match answer {
            Answer::Registered { .. } => Some(Step::Register { due_ms, first }),
            _ => None,
        });
    }
    for operation in &task.cancels {
        add(&mut moves, operation, Some(Step::Cancel), |answer| match answer {
            Answer::Cancelled | Answer::CancelledTooLate { .. } => Some(Step::Cancel),
            Answer::NotFound => Some(Step::NotFound),
            _ => None,
        });
    }
    for edit in &task.edits {
        let (version, due_ms) = (edit.version, edit.edited().unwrap_or(edit.due_ms));
        add(&mut moves, &edit.operation, Some(Step::Edit { version, due_ms }), |answer| match answer {
            Answer::Edited { .. } => Some(Step::Edit { version, due_ms }),
            Answer::EditTooLate { .. } => Some(Step::EditTooLate),
            Answer::NotFound => Some(Step::NotFound),
            _ => None,
        });
    }
    for operation in &task.gets {
        // A look without an answer has seen nothing.
        add(&mut moves, operation, None, |answer| match answer {
            Answer::Found { due_ms, occurrence, attempt, version } => {
                Some(Step::Found { version: *version, due_ms: *due_ms, turn: (*occurrence, *attempt) })
            }
            Answer::NotFound => Some(Step::NotFound),
            _ => None,
        });
    }
    for arrival in &task.deliveries {
        let (step, at) = (Step::Delivered { turn: arrival.turn() }, arrival.index);
        moves.push(Move { step, from: at, to: Some(at) });
    }
    moves.extend(settled.map(|from| Move { step: Step::Settle, from, to: None }));
    moves
}

/// `open` is what an operation without an answer may have done.
fn add(
    moves: &mut Vec<Move>,
    operation: &Operation<'_>,
    open: Option<Step>,
    answered: impl FnOnce(&Answer) -> Option<Step>,
) {
    let from = operation.call_index;
    if let (Some(answer), Some((.., to))) = (operation.answer(), operation.end) {
        moves.extend(answered(answer).map(|step| Move { step, from, to: Some(to) }));
    } else if is_open(operation) {
        moves.extend(open.map(|step| Move { step, from, to: None }));
    }
}

/// A list, and whom it named.
struct List {
    from: u64,
    to: u64,
    named: HashSet<usize>,
}

/// What lists say of each task. Gives how many names nobody knows.
fn add_lists(tasks: &Tasks<'_>, settled: &[Option<u64>], moves: &mut [Vec<Move>]) -> u64 {
    let mut strangers = 0;
    let mut by_client: HashMap<&str, Vec<List>> = HashMap::new();
    for (client, operation) in &tasks.lists {
        let (Some(Answer::Listed { tasks: names }), Some((.., to))) = (operation.answer(), operation.end) else {
            continue;
        };
        let from = operation.call_index;
        let named: HashSet<usize> = names.iter().filter_map(|name| tasks.by_id(name)).collect();
        // A task may be named on two pages, if it moved meanwhile.
        strangers += names.iter().filter(|name| tasks.by_id(name).is_none()).count() as u64;
        for at in &named {
            moves[*at].push(Move { step: Step::Listed, from, to: Some(to) });
        }
        by_client.entry(client).or_default().push(List { from, to, named });
    }
    let closed: Vec<u64> = tasks.all.iter().zip(settled).map(|(task, settled)| closed_from(task, *settled)).collect();
    for (client, lists) in by_client {
        let of_client = |at: &usize| tasks.all[*at].asked().is_some_and(|asked| asked.client == client);
        let members: Vec<usize> = (0..tasks.all.len()).filter(of_client).collect();
        add_absent(tasks, &members, &closed, &lists, moves);
    }
    strangers
}

/// What lists do *not* say. A task matters from the moment that it is known to be there until a list has shown that it has
/// ended: so the work follows what is pending, not all that ever was.
fn add_absent(tasks: &Tasks<'_>, members: &[usize], closed: &[u64], lists: &[List], moves: &mut [Vec<Move>]) {
    let mut known: Vec<(u64, usize)> =
        members.iter().filter_map(|at| Some((known_from(&tasks.all[*at], &moves[*at])?, *at))).collect();
    known.sort_unstable();
    let mut known = known.into_iter().peekable();
    let mut there: Vec<(u64, usize)> = Vec::new();
    for list in lists {
        while let Some((from, at)) = known.next_if(|(from, _)| *from < list.to) {
            there.push((closed[at].max(from), at));
        }
        there.retain(|(closed, at)| {
            if list.named.contains(at) || is_moving(&tasks.all[*at], list) {
                return true;
            }
            moves[*at].push(Move { step: Step::NotListed, from: list.from, to: Some(list.to) });
            list.from < *closed
        });
    }
}

/// The first event that shows that the task is there.
fn known_from(task: &Task<'_>, moves: &[Move]) -> Option<u64> {
    let looks =
        moves.iter().filter(|one| matches!(one.step, Step::Found { .. } | Step::Listed | Step::Delivered { .. }));
    let seen = looks.filter_map(|one| one.to).min();
    task.acknowledged().map(|acknowledged| acknowledged.index).into_iter().chain(seen).min()
}

/// From when on it may have ended.
fn closed_from(task: &Task<'_>, settled: Option<u64>) -> u64 {
    let cancels = task.cancels.iter().filter(|cancel| may_have_cancelled(cancel));
    let cancelled = cancels.map(|cancel| cancel.call_index).min();
    cancelled.into_iter().chain(settled).min().unwrap_or(u64::MAX)
}

/// A list is read in the order of due instants, page by page: a task that an edit moves meanwhile to where the list has
/// been is not missing.
fn is_moving(task: &Task<'_>, list: &List) -> bool {
    task.edits.iter().filter(|edit| edit.may_be_done()).any(|edit| {
        let done = edit.operation.end.filter(|_| edit.edited().is_some()).map(|(.., to)| to);
        edit.operation.call_index < list.to && done.is_none_or(|done| done > list.from)
    })
}

enum Outcome {
    Explained,
    Undecided,
    /// No order has this move.
    Stuck(usize),
}

struct Search<'m> {
    recurring: bool,
    moves: &'m [Move],
}

impl Search<'_> {
    fn run(&self) -> Outcome {
        let mut possible: HashSet<Possible> = HashSet::from([(State::Unregistered, 0)]);
        // The moves under way, each with its bit.
        let mut under_way: [Option<usize>; UNDER_WAY_MAX] = [None; UNDER_WAY_MAX];
        for (_, is_end, at) in self.edges() {
            if !is_end {
                let Some(free) = under_way.iter().position(Option::is_none) else { return Outcome::Undecided };
                under_way[free] = Some(at);
                continue;
            }
            let Some(bit) = under_way.iter().position(|other| *other == Some(at)) else { continue };
            match self.made(possible, &under_way, 1 << bit) {
                None => return Outcome::Undecided,
                Some(left) if left.is_empty() => return Outcome::Stuck(at),
                Some(left) => possible = left,
            }
            under_way[bit] = None;
        }
        Outcome::Explained
    }

    /// Calls and ends in order: index, whether it is an end, which move.
    fn edges(&self) -> Vec<(u64, bool, usize)> {
        let mut edges: Vec<(u64, bool, usize)> = Vec::with_capacity(self.moves.len() * 2);
        for (at, one) in self.moves.iter().enumerate() {
            edges.push((one.from, false, at));
            edges.extend(one.to.map(|to| (to, true, at)));
        }
        edges.sort_unstable();
        edges
    }

    /// Every possible state in which the move with this bit has been made, which is then forgotten. `None`: too many.
    fn made(
        &self,
        possible: HashSet<Possible>,
        under_way: &[Option<usize>; UNDER_WAY_MAX],
        wanted: u64,
    ) -> Option<HashSet<Possible>> {
        let mut left = HashSet::new();
        let mut open: Vec<Possible> = possible.iter().copied().collect();
        let mut known = possible;
        while let Some((state, made)) = open.pop() {
            if made & wanted != 0 {
                left.insert((state, made & !wanted));
                continue;
            }
            for (bit, at) in under_way.iter().enumerate().filter_map(|(bit, at)| Some((1 << bit, (*at)?))) {
                if made & bit != 0 {
                    continue;
                }
                let Some(after) = self.after(state, &self.moves[at]) else { continue };
                let next = (after, made | bit);
                if known.insert(next) {
                    open.push(next);
                }
            }
            if known.len() > STATES_MAX {
                return None;
            }
        }
        Some(left)
    }

    /// The state after a move; `None` if it cannot be made, or need not: what nobody answered and changes nothing.
    fn after(&self, state: State, one: &Move) -> Option<State> {
        let after = self.step(state, one.step)?;
        (one.to.is_some() || after != state).then_some(after)
    }

    fn step(&self, state: State, step: Step) -> Option<State> {
        match (step, state) {
            (Step::Register { due_ms, .. }, State::Unregistered) => {
                Some(State::Pending { version: FIRST_VERSION, due_ms, turn: (0, 1) })
            }
            (Step::Register { first, .. }, _) => (!first).then_some(state),
            (Step::Cancel | Step::Settle, State::Pending { .. }) => Some(State::Ended),
            (Step::Edit { version, due_ms }, State::Pending { turn, .. }) => {
                Some(State::Pending { version, due_ms: Some(due_ms), turn })
            }
            (Step::EditTooLate | Step::Listed, State::Pending { .. }) => Some(state),
            (Step::NotFound | Step::NotListed, State::Unregistered | State::Ended) => Some(state),
            (Step::Found { version, due_ms, turn }, State::Pending { .. }) => self.found(state, version, due_ms, turn),
            (Step::Delivered { turn }, State::Pending { version, due_ms, turn: before }) => {
                Some(State::Pending { version, due_ms, turn: before.max(turn) })
            }
            (Step::Delivered { .. }, State::Ended) => Some(state),
            _ => None,
        }
    }

    /// A retry and a later occurrence are due at instants of their own, which `early` judges.
    fn found(&self, state: State, version: u32, found_ms: u64, turn: Turn) -> Option<State> {
        let State::Pending { version: current, due_ms, turn: before } = state else { return None };
        let same_due = self.recurring || turn.1 > 1 || due_ms.is_none_or(|due_ms| due_ms == found_ms);
        let due_ms = if self.recurring || turn.1 > 1 { due_ms } else { Some(found_ms) };
        (version == current && same_due && turn >= before).then_some(State::Pending { version, due_ms, turn })
    }
}

/// The move, and what was asked last before it.
fn events(moves: &[Move], stuck: usize) -> Vec<u64> {
    const SHOWN_MAX: usize = 12;
    let end = moves[stuck].to.unwrap_or(u64::MAX);
    let mut before: Vec<&Move> = moves.iter().filter(|one| one.from < end).collect();
    before.sort_by_key(|one| one.from);
    let mut events: Vec<u64> =
        before.iter().rev().take(SHOWN_MAX).flat_map(|one| [Some(one.from), one.to]).flatten().collect();
    events.extend([Some(moves[stuck].from), moves[stuck].to].into_iter().flatten());
    // What was acknowledged first is what most answers contradict.
    events.extend(before.iter().filter(|one| matches!(one.step, Step::Register { .. })).filter_map(|one| one.to).min());
    events.sort_unstable();
    events.dedup();
    events
}

fn explain(task: &Task<'_>, stuck: &Move) -> String {
    let what = match stuck.step {
        Step::Register { first: true, .. } => "it was registered, for the first time".to_owned(),
        Step::Register { .. } => "it was registered".to_owned(),
        Step::Cancel => "it was cancelled".to_owned(),
        Step::Edit { version, .. } => format!("it was edited to version {version}"),
        Step::EditTooLate => "it was too late to edit it".to_owned(),
        Step::NotFound => "it was not found".to_owned(),
        Step::Found { version, due_ms, turn: (occurrence, attempt) } => {
            format!("it was found in version {version}, due at {due_ms}, at occurrence {occurrence}, attempt {attempt}")
        }
        Step::Listed => "a list has it".to_owned(),
        Step::NotListed => "a list does not have it".to_owned(),
        Step::Delivered { .. } => "it was delivered".to_owned(),
        Step::Settle => "it was settled".to_owned(),
    };
    format!("{}: {what}, and no order of what was asked explains that", task.name())
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

    fn not_found() -> End {
        End::Ok(Answer::NotFound)
    }

    fn cancelled() -> End {
        End::Ok(Answer::Cancelled)
    }

    fn edited(due_at: u64) -> End {
        End::Ok(Answer::Edited { due_ms: due(due_at) })
    }

    #[test]
    fn what_is_there_is_found_and_listed() {
        let verdict = once()
            .get(10, 20, 1, found(1_000, 1))
            .list(30, 40, listed(&[1]))
            .delivered(1_000, delivery(1, 1_000))
            .get(1_001, 1_002, 1, found(1_000, 1))
            .get(1_010, 1_020, 1, not_found())
            .list(1_030, 1_040, listed(&[]))
            .passes(check);
        for count in [("tasks", 1), ("gets", 3), ("lists", 2), ("undecided", 0)] {
            assert!(verdict.counts.contains(&count), "{:?}", verdict.counts);
        }
    }

    #[test]
    fn an_acknowledged_task_that_is_missing_is_found() {
        once().get(10, 20, 1, not_found()).fails(check, "it was not found");
        once().list(10, 20, listed(&[])).fails(check, "a list does not have it");
        // A delivery that was refused is no end.
        let refused = Delivery { accepted: false, ..delivery(1, 1_000) };
        once().delivered(1_000, refused.clone()).get(1_010, 1_020, 1, not_found()).fails(check, "it was not found");
        let dead = LeftAs::DeadLetter { occurrence: 0, attempts: 1 };
        let died = once().delivered(1_000, refused).get(1_010, 1_020, 1, not_found());
        died.left(2_000, 1, dead).passes(check);
    }

    #[test]
    fn a_look_during_the_registration_may_see_both() {
        let asked = || HandMade::new().register(0, 100, one_shot(1, 1_000), registered(1, 1_000));
        asked().get(10, 20, 1, not_found()).get(30, 40, 1, found(1_000, 1)).passes(check);
        asked().list(10, 20, listed(&[])).list(30, 40, listed(&[1])).passes(check);
        asked().get(10, 20, 1, found(1_000, 1)).get(30, 40, 1, not_found()).fails(check, "it was not found");
        asked().list(10, 20, listed(&[1])).list(30, 40, listed(&[])).fails(check, "a list does not have it");
    }

    #[test]
    fn what_nobody_answered_happened_or_not_but_not_both() {
        let asked = || HandMade::new().register(0, 5, one_shot(1, 1_000), unknown());
        asked().get(10, 20, 1, not_found()).get(30, 40, 1, found(1_000, 1)).passes(check);
        asked().get(10, 20, 1, not_found()).list(30, 40, listed(&[])).passes(check);
        asked().get(10, 20, 1, found(1_000, 1)).get(30, 40, 1, not_found()).fails(check, "it was not found");
        // Delivered, it had been registered.
        let refused = Delivery { accepted: false, ..delivery(1, 1_000) };
        asked().delivered(1_000, refused).get(1_010, 1_020, 1, not_found()).fails(check, "it was not found");
    }

    #[test]
    fn a_failed_registration_is_not_there() {
        let asked = || HandMade::new().register(0, 5, one_shot(1, 1_000), failed());
        asked().get(10, 20, 1, not_found()).passes(check);
        asked().get(10, 20, 1, found(1_000, 1)).fails(check, "it was found");
    }

    #[test]
    fn what_was_cancelled_is_gone() {
        once().cancel(10, 20, 1, cancelled()).get(30, 40, 1, not_found()).list(50, 60, listed(&[])).passes(check);
        once().cancel(10, 20, 1, cancelled()).get(30, 40, 1, found(1_000, 1)).fails(check, "it was found");
        once().cancel(10, 20, 1, cancelled()).list(30, 40, listed(&[1])).fails(check, "a list has it");
        once().cancel(10, 20, 1, cancelled()).edit(30, 40, 1, 2_000, 2, edited(2_000)).fails(check, "it was edited");
        // While it is being cancelled it is there, then not, and never again.
        let slow = || once().cancel(10, 100, 1, cancelled());
        slow().get(20, 30, 1, found(1_000, 1)).get(40, 50, 1, not_found()).passes(check);
        slow().get(20, 30, 1, not_found()).get(40, 50, 1, found(1_000, 1)).fails(check, "it was found");
    }

    #[test]
    fn a_cancel_without_an_answer_ends_it_once() {
        let open = || once().cancel(10, 20, 1, unknown());
        open().get(30, 40, 1, found(1_000, 1)).get(50, 60, 1, not_found()).passes(check);
        open().get(30, 40, 1, not_found()).get(50, 60, 1, found(1_000, 1)).fails(check, "it was found");
        open().list(30, 40, listed(&[])).list(50, 60, listed(&[1])).fails(check, "a list has it");
        // One that never ended is the same.
        let call = crate::history::Call::Cancel { token: 1, task: id(1) };
        once().event(10, crate::history::What::Call(99, call)).get(30, 40, 1, not_found()).passes(check);
    }

    #[test]
    fn an_edit_is_seen_by_who_looks_later() {
        let moved = || once().edit(10, 20, 1, 2_000, 2, edited(2_000));
        moved().get(30, 40, 1, found(2_000, 2)).passes(check);
        moved().get(30, 40, 1, found(1_000, 1)).fails(check, "it was found in version 1");
        moved().get(30, 40, 1, found(1_000, 2)).fails(check, "it was found in version 2");
        moved().get(15, 18, 1, found(1_000, 1)).passes(check);
        let open = || once().edit(10, 20, 1, 2_000, 2, unknown());
        open().get(30, 40, 1, found(1_000, 1)).get(50, 60, 1, found(2_000, 2)).passes(check);
        open()
            .get(30, 40, 1, found(2_000, 2))
            .get(50, 60, 1, found(1_000, 1))
            .fails(check, "it was found in version 1");
    }

    #[test]
    fn concurrent_edits_come_in_either_order() {
        let two = || once().edit(10, 50, 1, 2_000, 2, edited(2_000)).edit(20, 60, 1, 3_000, 3, edited(3_000));
        two().get(70, 80, 1, found(2_000, 2)).passes(check);
        two().get(70, 80, 1, found(3_000, 3)).passes(check);
        two().get(70, 80, 1, found(1_000, 1)).fails(check, "it was found in version 1");
        let both = two().get(70, 80, 1, found(2_000, 2)).get(90, 95, 1, found(3_000, 3));
        both.fails(check, "it was found in version 3");
    }

    #[test]
    fn a_task_that_is_moved_while_a_list_is_read_is_not_missing() {
        once().edit(15, 20, 1, 500, 2, edited(500)).list(10, 30, listed(&[])).passes(check);
        once().edit(5, 8, 1, 500, 2, edited(500)).list(10, 30, listed(&[])).fails(check, "a list does not have it");
        once().edit(15, 20, 1, 500, 2, failed()).list(10, 30, listed(&[])).fails(check, "a list does not have it");
    }

    #[test]
    fn what_was_settled_does_not_come_back() {
        let done = || once().delivered(1_000, delivery(1, 1_000));
        done().get(1_010, 1_020, 1, not_found()).list(1_030, 1_040, listed(&[1])).fails(check, "a list has it");
        done().list(1_010, 1_020, listed(&[])).get(1_030, 1_040, 1, found(1_000, 1)).fails(check, "it was found");
        done().list(1_010, 1_020, listed(&[])).list(1_030, 1_040, listed(&[1])).fails(check, "a list has it");
    }

    #[test]
    fn a_stale_attempt_is_found() {
        let at = |occurrence, attempt| {
            End::Ok(Answer::Found { due_ms: due(1_000), occurrence, attempt, version: FIRST_VERSION })
        };
        let tried = || once().delivered(1_000, Delivery { attempt: 2, accepted: false, ..delivery(1, 1_000) });
        tried().get(1_010, 1_020, 1, at(0, 2)).passes(check);
        tried().get(1_010, 1_020, 1, at(0, 1)).fails(check, "it was found");
        let every = || HandMade::new().acknowledged(0, recurring(1, 1_000, 500, Missed::Once));
        every().get(10, 20, 1, at(0, 1)).get(1_600, 1_610, 1, at(1, 1)).passes(check);
        every().get(1_600, 1_610, 1, at(1, 1)).get(1_620, 1_630, 1, at(0, 1)).fails(check, "it was found");
        every().occurrence(1_000, 1, 0, 1_000).get(1_010, 1_020, 1, not_found()).fails(check, "it was not found");
    }

    #[test]
    fn a_recurring_task_ends_with_its_last_occurrence() {
        let two = || {
            let registration = Registration { count: Some(2), ..recurring(1, 1_000, 500, Missed::Once) };
            HandMade::new().acknowledged(0, registration).occurrence(1_000, 1, 0, 1_000)
        };
        two().get(1_100, 1_110, 1, not_found()).fails(check, "it was not found");
        two().occurrence(1_500, 1, 1, 1_500).get(1_600, 1_610, 1, not_found()).passes(check);
        two().occurrence(1_500, 1, 1, 1_500).list(1_600, 1_610, listed(&[])).passes(check);
    }

    #[test]
    fn registrations_with_a_key_are_one_register() {
        let keyed = |token| Registration { key: Some("k".to_owned()), ..one_shot(token, 1_000) };
        let again = |duplicate| End::Ok(Answer::Registered { task: id(1), due_ms: due(1_000), duplicate });
        let two = |duplicate| {
            let one = HandMade::new().register(0, 10, keyed(1), again(false));
            one.register(20, 30, keyed(2), again(duplicate))
        };
        two(true).get(40, 50, 1, found(1_000, 1)).passes(check);
        two(false).fails(check, "for the first time");
    }

    #[test]
    fn a_list_of_another_client_says_nothing() {
        let other = crate::history::Call::List { client: "d".to_owned() };
        once().operation(10, 20, other, listed(&[])).passes(check);
    }

    #[test]
    fn what_cannot_be_decided_is_not_passed() {
        let open = |many| {
            let edit = |history: HandMade, n: u32| history.edit(10, 20, 1, 2_000, 2 + n, unknown());
            (0..many).fold(once(), edit)
        };
        open(70).fails(check, "nobody can tell");
        open(30).passes(check);
        // So many orders of so few that it takes too long.
        open(30).get(30, 40, 1, found(1_000, 1)).fails(check, "nobody can tell");
        open(5).get(30, 40, 1, found(1_000, 1)).passes(check);
    }

    #[test]
    fn a_long_history_of_one_task_is_quick() {
        let mut history = HandMade::new().acknowledged(0, recurring(1, 1_000, 500, Missed::Once));
        for n in 0..20_000 {
            let at = 1_000 + n * 500;
            history = history.occurrence(at, 1, n, at);
            // Four looks that overlap each other.
            for look in 0..4 {
                history = history.list(at + look, at + 10 + look, listed(&[1]));
            }
        }
        let began = std::time::Instant::now();
        let verdict = history.passes(check);
        assert!(verdict.counts.contains(&("moves", 100_001)), "{:?}", verdict.counts);
        assert!(began.elapsed().as_secs() < 10, "{:?}", began.elapsed());
    }
}
