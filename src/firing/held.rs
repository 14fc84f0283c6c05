//! Which tasks of one shard are held back.

use std::collections::{BTreeMap, HashMap};

use crate::task::TaskId;

/// Tasks that are not to be dispatched, because a change of them is under way: from when it is asked for until it is applied
/// or certainly is not in the log.
///
/// - It belongs to the term in which the change was asked for. That may begin before this node leads in it as far as the
///   ledger knows, and goes on when a lease is lost and won back.
/// - Each change counts by itself: a task is held until all of them are over, and the end of one releases no other.
/// - A task that has ended is held in no term, whatever is still under way: nothing comes of it.
/// - When a term begins, whatever was under way in an earlier one has been applied, or is void.
/// - What is held in the term that is led is not in the wheel, unless it is read into it by a window that knew nothing of
///   it yet; so what leaves the wheel is asked for here. Whoever lets the last hold go puts the task back.
#[derive(Default)]
pub(super) struct Held {
    /// By term. How many changes of each task are under way; never 0.
    terms: BTreeMap<u64, HashMap<TaskId, usize>>,
}

impl Held {
    pub fn is_held(&self, term: u64, id: TaskId) -> bool {
        self.terms.get(&term).is_some_and(|held| held.contains_key(&id))
    }

    pub fn hold(&mut self, term: u64, id: TaskId) {
        *self.terms.entry(term).or_default().entry(id).or_default() += 1;
    }

    /// One change is over. Returns whether the task is held no more; also when it was not, because it has ended.
    pub fn release(&mut self, term: u64, id: TaskId) -> bool {
        let Some(held) = self.terms.get_mut(&term) else { return true };
        let Some(holds) = held.get_mut(&id) else { return true };
        *holds -= 1;
        if *holds > 0 {
            return false;
        }
        held.remove(&id);
        true
    }

    pub fn ended(&mut self, id: TaskId) {
        for held in self.terms.values_mut() {
            held.remove(&id);
        }
    }

    pub fn begin_term(&mut self, term: u64) {
        self.terms = self.terms.split_off(&term);
    }
}
