//! What a receiver of real effects remembers, as the chapter on callbacks in `docs/PROTOCOL.md` has it: which occurrence it
//! has done, and the highest fence it has seen of each. With that, each effect is had once.

use std::collections::BTreeMap;

use boomerang_task::{Fence, TaskId};

#[derive(Debug, Default)]
pub struct Effects {
    known: BTreeMap<(TaskId, u64), Known>,
}

#[derive(Debug, Default)]
struct Known {
    highest: Option<Fence>,
    done: bool,
}

impl Effects {
    /// A delivery has come. Whether the receiver does what it asks for now: if it is `willing`, has not done it before, and
    /// nothing newer has come.
    pub fn take(&mut self, task: TaskId, occurrence: u64, fence: Fence, willing: bool) -> bool {
        let known = self.known.entry((task, occurrence)).or_default();
        let stale = known.highest.is_some_and(|highest| fence < highest);
        known.highest = known.highest.max(Some(fence));
        let does = willing && !stale && !known.done;
        known.done |= does;
        does
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use boomerang_task::ShardId;

    #[test]
    fn an_effect_is_had_once_and_never_by_what_was_overtaken() {
        let task = TaskId::new(1, ShardId(0), 7);
        let fence = |term, seq| Fence { term, seq };
        let mut effects = Effects::default();
        assert!(!effects.take(task, 0, fence(2, 1), false), "it was not willing");
        assert!(!effects.take(task, 0, fence(1, 9), true), "an older leader's came late");
        assert!(effects.take(task, 0, fence(2, 2), true));
        assert!(!effects.take(task, 0, fence(3, 1), true), "it is done");
        assert!(effects.take(task, 1, fence(1, 1), true), "each occurrence by itself");
    }
}
