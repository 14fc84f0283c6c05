//! A history by task: everything that was asked, answered and delivered of each. Judges nothing; the checkers do.
//!
//! A task is known by its token, and all registrations with one key are one task. Whatever is kept of a task is in the
//! order of the history.

use std::collections::HashMap;

use boomerang_task::{Fence, Missed};

use super::Limits;
use super::clocks::WrongClocks;
use crate::history::{
    Answer, Call, Delivery, Due, End, FIRST_VERSION, History, Left, LeftAs, Operation, Registration, Stage, TaskId,
    Token, What,
};

/// A fault is written down when it has begun: it may have been at work for so long before.
pub(super) const BEGINNING_US: u64 = 2_000_000;

pub(super) struct Tasks<'h> {
    pub history: &'h History,
    pub all: Vec<Task<'h>>,
    /// Lists, with the client they are about.
    pub lists: Vec<(&'h str, Operation<'h>)>,
    pub operations: u64,
    pub healed_us: Option<u64>,
    /// When the first fault was written down; `None` if nothing was ever broken.
    pub first_broken_us: Option<u64>,
    pub wrong_clocks: WrongClocks,
    /// When the last event came.
    pub end_us: u64,
    /// Whether the cluster was asked, at the end, what it still knows.
    pub has_left: bool,
    by_token: HashMap<Token, usize>,
    by_id: HashMap<&'h str, usize>,
}

#[derive(Default)]
pub(super) struct Task<'h> {
    pub registrations: Vec<(&'h Registration, Operation<'h>)>,
    pub cancels: Vec<Operation<'h>>,
    pub edits: Vec<Edit<'h>>,
    pub gets: Vec<Operation<'h>>,
    /// Of the task itself, in the order in which they came.
    pub deliveries: Vec<Arrival<'h>>,
    /// Copies of its dead letters.
    pub copies: Vec<Arrival<'h>>,
    pub left: Vec<(u64, u64, &'h Left)>,
}

#[derive(Clone, Copy)]
pub(super) struct Arrival<'h> {
    pub index: u64,
    pub at_us: u64,
    pub delivery: &'h Delivery,
}

impl Arrival<'_> {
    /// Occurrence and attempt.
    pub fn turn(&self) -> (u64, u32) {
        (self.delivery.occurrence, self.delivery.attempt)
    }

    pub fn fence(&self) -> Fence {
        self.delivery.fence
    }
}

#[derive(Clone, Copy)]
pub(super) struct Edit<'h> {
    pub operation: Operation<'h>,
    pub version: u32,
    /// What was asked for.
    pub due_ms: u64,
}

impl Edit<'_> {
    pub fn edited(&self) -> Option<u64> {
        match self.operation.answer() {
            Some(Answer::Edited { due_ms }) => Some(*due_ms),
            _ => None,
        }
    }

    /// It may have been done: it was, or nobody knows.
    pub fn may_be_done(&self) -> bool {
        self.edited().is_some() || is_open(&self.operation)
    }
}

/// An acknowledged registration.
#[derive(Clone, Copy)]
pub(super) struct Acknowledged<'h> {
    pub task: &'h TaskId,
    pub due_ms: u64,
    pub operation: Operation<'h>,
    pub at_us: u64,
    pub index: u64,
}

/// Where the due instants of a version of a task come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Base {
    At(u64),
    /// It was never answered, and asked for as a delay.
    Unknown,
    /// No operation that may have been done made such a version.
    Never,
}

fn first_broken_us(history: &History) -> Option<u64> {
    let broken = |what: &What| matches!(what, What::Fault(note) if note.stage == Stage::Begin);
    history.events.iter().find(|event| broken(&event.what)).map(|event| event.at_us)
}

/// Nobody knows whether it happened.
pub(super) fn is_open(operation: &Operation<'_>) -> bool {
    matches!(operation.end, None | Some((End::Unknown(_), ..)))
}

/// It ended the task, or may have.
pub(super) fn may_have_cancelled(cancel: &Operation<'_>) -> bool {
    is_open(cancel) || has_cancelled(cancel)
}

pub(super) fn has_cancelled(cancel: &Operation<'_>) -> bool {
    matches!(cancel.answer(), Some(Answer::Cancelled | Answer::CancelledTooLate { .. }))
}

impl<'h> Tasks<'h> {
    pub fn of(history: &'h History) -> Self {
        let first_broken_us = first_broken_us(history);
        // What nobody ever broke needs no healing.
        let never_broken = first_broken_us.is_none().then_some(0);
        let mut tasks = Self {
            history,
            all: Vec::new(),
            lists: Vec::new(),
            operations: 0,
            healed_us: history.healed_us().or(never_broken),
            first_broken_us,
            wrong_clocks: WrongClocks::of(history),
            end_us: history.events.last().map_or(0, |event| event.at_us),
            has_left: false,
            by_token: HashMap::new(),
            by_id: HashMap::new(),
        };
        let operations = history.operations();
        tasks.operations = operations.len() as u64;
        tasks.add_registrations(&operations);
        for operation in &operations {
            tasks.add_operation(*operation);
        }
        for (index, at_us, delivery) in history.deliveries() {
            let arrival = Arrival { index, at_us, delivery };
            let at = tasks.place(delivery.token);
            let task = &mut tasks.all[at];
            if delivery.dead_letter {
                task.copies.push(arrival)
            } else {
                task.deliveries.push(arrival)
            }
            tasks.by_id.entry(&delivery.task).or_insert(at);
        }
        tasks.add_left();
        tasks
    }

    pub fn by_id(&self, id: &str) -> Option<usize> {
        self.by_id.get(id).copied()
    }

    /// How many deliveries there are, without copies of dead letters.
    pub fn deliveries(&self) -> u64 {
        self.all.iter().map(|task| task.deliveries.len() as u64).sum()
    }

    /// From when on what is due is due in peace; `None` if the run ended broken.
    pub fn calm_us(&self, heal_within_us: u64) -> Option<u64> {
        self.healed_us.map(|healed_us| healed_us.saturating_add(heal_within_us))
    }

    /// Until when what is due is due in peace, before the first fault; without any, always.
    pub fn peace_us(&self) -> u64 {
        self.first_broken_us.map_or(u64::MAX, |broken_us| broken_us.saturating_sub(BEGINNING_US))
    }

    /// The cluster says that the task waits for an instant that was not over when it was asked.
    pub fn is_to_come(&self, task: &Task<'_>) -> bool {
        task.left.iter().any(|(_, at_us, left)| match left.state {
            LeftAs::Pending { due_ms, .. } => self.history.since_began_us(due_ms) > *at_us,
            LeftAs::DeadLetter { .. } => false,
        })
    }

    /// The event from which on the cluster may be done with a task; `None` if only a cancel can end it.
    pub fn settled_from(&self, task: &Task<'_>, limits: &Limits) -> Option<u64> {
        let asked = task.asked()?;
        let last = match (asked.every_ms, asked.count) {
            (None, _) => 0,
            (Some(_), count) => count?.saturating_sub(1),
        };
        // Attempts of a dead letter may all have been on their way in vain, and an edit moves the last of all instants.
        let any_time = if task.every_ms().is_none() { task.may_have_died() } else { !task.edits.is_empty() };
        if any_time || task.is_dead(last) {
            return Some(0);
        }
        let accepted = task.deliveries.iter().filter(|one| one.delivery.accepted && one.delivery.occurrence == last);
        let accepted = accepted.map(|arrival| arrival.index).next();
        let skipped = asked.every_ms.filter(|_| asked.missed == Missed::Skip).map(|every_ms| {
            let Base::At(first_ms) = task.first_base() else { return 0 };
            let last_us = self.history.since_began_us(first_ms.saturating_add(last.saturating_mul(every_ms)));
            let from_us = last_us.saturating_sub(self.wrong_clocks.early_before_us(limits, last_us));
            self.history.events.partition_point(|event| event.at_us < from_us) as u64
        });
        accepted.into_iter().chain(skipped).min()
    }

    /// Before all else: only registrations say which tokens are one task.
    fn add_registrations(&mut self, operations: &[Operation<'h>]) {
        let mut by_key: HashMap<(&str, &str), usize> = HashMap::new();
        for operation in operations {
            let Call::Register(registration) = operation.call else { continue };
            let at = match &registration.key {
                None => self.place(registration.token),
                Some(key) => {
                    let known = by_key.get(&(registration.client.as_str(), key.as_str())).copied();
                    let at = known.unwrap_or_else(|| self.place(registration.token));
                    by_key.insert((&registration.client, key), at);
                    self.by_token.insert(registration.token, at);
                    at
                }
            };
            self.all[at].registrations.push((registration, *operation));
            if let Some(Answer::Registered { task, .. }) = operation.answer() {
                self.by_id.entry(task).or_insert(at);
            }
        }
    }

    fn add_operation(&mut self, operation: Operation<'h>) {
        match operation.call {
            Call::Register(_) => {}
            Call::Cancel { token, .. } => {
                let at = self.place(*token);
                self.all[at].cancels.push(operation);
            }
            Call::Edit { token, due_ms, version, .. } => {
                let at = self.place(*token);
                self.all[at].edits.push(Edit { operation, version: *version, due_ms: *due_ms });
            }
            Call::Get { token, .. } => {
                let at = self.place(*token);
                self.all[at].gets.push(operation);
            }
            Call::List { client } => self.lists.push((client, operation)),
        }
    }

    fn add_left(&mut self) {
        for (index, event) in (0..).zip(&self.history.events) {
            let What::Left(left) = &event.what else { continue };
            self.has_left = true;
            let known = left.token.and_then(|token| self.by_token.get(&token).copied());
            if let Some(at) = known.or_else(|| self.by_id(&left.task)) {
                self.all[at].left.push((index, event.at_us, left));
            }
        }
    }

    fn place(&mut self, token: Token) -> usize {
        *self.by_token.entry(token).or_insert_with(|| {
            self.all.push(Task::default());
            self.all.len() - 1
        })
    }
}

impl<'h> Task<'h> {
    /// What was asked for at first; `None` for what nobody registered.
    pub fn asked(&self) -> Option<&'h Registration> {
        self.registrations.first().map(|(registration, _)| *registration)
    }

    pub fn every_ms(&self) -> Option<u64> {
        self.asked().and_then(|asked| asked.every_ms)
    }

    /// The first answer that says that the task is there.
    pub fn acknowledged(&self) -> Option<Acknowledged<'h>> {
        let answers =
            self.registrations.iter().filter_map(|(_, operation)| match (operation.answer(), operation.end) {
                (Some(Answer::Registered { task, due_ms, .. }), Some((_, at_us, index))) => {
                    Some(Acknowledged { task, due_ms: *due_ms, operation: *operation, at_us, index })
                }
                _ => None,
            });
        answers.min_by_key(|acknowledged| acknowledged.index)
    }

    /// For people.
    pub fn name(&self) -> String {
        let id = self.acknowledged().map(|acknowledged| acknowledged.task);
        let id = id.or_else(|| self.deliveries.first().map(|arrival| &arrival.delivery.task));
        let token = self.asked().map(|asked| asked.token);
        let token = token.or_else(|| self.deliveries.first().map(|arrival| arrival.delivery.token));
        let load = self.asked().map_or("nobody's", |asked| asked.load.as_str());
        match (token, id) {
            (Some(token), Some(id)) => format!("{load} task {token} ({id})"),
            (Some(token), None) => format!("{load} task {token}"),
            (None, _) => "a task that nobody registered".to_owned(),
        }
    }

    /// Where due instants of this version of the payload come from.
    pub fn base(&self, version: u32) -> Base {
        if version == FIRST_VERSION {
            return self.first_base();
        }
        match self.edits.iter().find(|edit| edit.version == version && edit.may_be_done()) {
            Some(edit) => Base::At(edit.edited().unwrap_or(edit.due_ms)),
            None => Base::Never,
        }
    }

    fn first_base(&self) -> Base {
        if let Some(acknowledged) = self.acknowledged() {
            return Base::At(acknowledged.due_ms);
        }
        let mut open = self.registrations.iter().filter(|(_, operation)| is_open(operation));
        match (open.next(), open.next()) {
            (None, _) => Base::Never,
            (Some((Registration { due: Due::At(due_ms), .. }, _)), None) => Base::At(*due_ms),
            _ => Base::Unknown,
        }
    }

    /// The latest instant at which a task that is due once may be due; `None` if nobody knows.
    pub fn latest_due_ms(&self) -> Option<u64> {
        let Base::At(first) = self.first_base() else { return None };
        let edits = self.edits.iter().filter(|edit| edit.may_be_done());
        Some(edits.map(|edit| edit.edited().unwrap_or(edit.due_ms)).fold(first, u64::max))
    }

    /// The cluster says, or a copy of it has come, that this occurrence became a dead letter.
    pub fn is_dead(&self, occurrence: u64) -> bool {
        self.copies.iter().any(|copy| copy.delivery.occurrence == occurrence)
            || self.left.iter().any(
                |(.., left)| matches!(left.state, LeftAs::DeadLetter { occurrence: dead, .. } if dead == occurrence),
            )
    }

    /// The task may have become a dead letter, as far as anybody can know.
    pub fn may_have_died(&self) -> bool {
        self.is_dead(0) || self.asked().is_some_and(|asked| asked.refusals >= asked.attempts)
    }

    pub fn first_accepted(&self) -> Option<&Arrival<'h>> {
        self.deliveries.iter().find(|arrival| arrival.delivery.accepted)
    }

    pub fn may_be_cancelled(&self) -> bool {
        self.cancels.iter().any(may_have_cancelled)
    }
}
