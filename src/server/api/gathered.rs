//! The answers to a batch, until the last one is there.

use std::sync::Arc;

use crate::task::locks::Mutex;

/// Who waits for the answers, and what makes one of them.
type Finish<T> = Box<dyn FnOnce(Vec<T>) + Send>;

/// The answers so far, by place; cheap to clone.
pub(super) struct Gathered<T>(Arc<Mutex<Answers<T>>>);

struct Answers<T> {
    by_place: Vec<Option<T>>,
    missing: usize,
    finish: Option<Finish<T>>,
}

impl<T> Clone for Gathered<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Gathered<T> {
    /// Calls `finish` with the answers to all `count` of them, in their order.
    pub fn new(count: usize, finish: impl FnOnce(Vec<T>) + Send + 'static) -> Self {
        let by_place = std::iter::repeat_with(|| None).take(count).collect();
        Self(Arc::new(Mutex::new(Answers { by_place, missing: count, finish: Some(Box::new(finish)) })))
    }

    /// The answer to one of them; each has one. The last one ends it.
    pub fn put(&self, place: usize, answer: T) {
        let mut answers = self.0.lock();
        answers.by_place[place] = Some(answer);
        answers.missing -= 1;
        if answers.missing > 0 {
            return;
        }
        let all = std::mem::take(&mut answers.by_place).into_iter().flatten().collect();
        let finish = answers.finish.take();
        drop(answers);
        if let Some(finish) = finish {
            finish(all);
        }
    }
}
