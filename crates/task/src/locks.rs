//! The locks of all crates: those of the standard library, which tell when somebody has panicked under one of them.
//!
//! What is under a lock then may be half changed, and whoever went on with it would make it worse. So whoever comes next
//! panics as well, up to whoever looks after panics: that is said here once, and not at each lock.
//!
//! ```
//! use boomerang_task::locks::Mutex;
//!
//! let waiting = Mutex::new(vec![1, 2]);
//! waiting.lock().push(3);
//! assert_eq!(waiting.into_inner(), [1, 2, 3]);
//! ```

use std::sync::{self, MutexGuard, PoisonError, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

const PANICKED: &str = "somebody has panicked under this lock, and what is under it may be half changed";

/// A [`sync::Mutex`].
#[derive(Debug, Default)]
pub struct Mutex<T: ?Sized>(sync::Mutex<T>);

impl<T> Mutex<T> {
    /// One that nobody has.
    pub const fn new(value: T) -> Self {
        Self(sync::Mutex::new(value))
    }

    /// What was under it.
    ///
    /// # Panics
    /// When somebody has panicked under it.
    #[track_caller]
    pub fn into_inner(self) -> T {
        self.0.into_inner().expect(PANICKED)
    }
}

impl<T: ?Sized> Mutex<T> {
    /// Waits until nobody else has it.
    ///
    /// # Panics
    /// When somebody has panicked under it.
    #[track_caller]
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().expect(PANICKED)
    }

    /// The same, also when somebody has panicked under it: for what is right whatever is half changed, such as an end.
    pub fn lock_after_panic(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` while somebody else has it.
    ///
    /// # Panics
    /// When somebody has panicked under it.
    #[track_caller]
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        match self.0.try_lock() {
            Ok(guard) => Some(guard),
            Err(sync::TryLockError::WouldBlock) => None,
            Err(sync::TryLockError::Poisoned(_)) => panic!("{PANICKED}"),
        }
    }
}

/// A [`sync::Condvar`].
#[derive(Debug, Default)]
pub struct Condvar(sync::Condvar);

impl Condvar {
    /// One that nobody waits for.
    pub const fn new() -> Self {
        Self(sync::Condvar::new())
    }

    /// Gives the lock back until somebody notifies, or for no reason.
    ///
    /// # Panics
    /// When somebody has panicked under the lock meanwhile.
    #[track_caller]
    pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        self.0.wait(guard).expect(PANICKED)
    }

    /// The same, for no longer than `most`.
    ///
    /// # Panics
    /// When somebody has panicked under the lock meanwhile.
    #[track_caller]
    pub fn wait_timeout<'a, T>(&self, guard: MutexGuard<'a, T>, most: Duration) -> MutexGuard<'a, T> {
        self.0.wait_timeout(guard, most).expect(PANICKED).0
    }

    /// Wakes one of those who wait.
    pub fn notify_one(&self) {
        self.0.notify_one();
    }

    /// Wakes all who wait.
    pub fn notify_all(&self) {
        self.0.notify_all();
    }
}

/// A [`sync::RwLock`].
#[derive(Debug, Default)]
pub struct RwLock<T: ?Sized>(sync::RwLock<T>);

impl<T> RwLock<T> {
    /// One that nobody has.
    pub const fn new(value: T) -> Self {
        Self(sync::RwLock::new(value))
    }
}

impl<T: ?Sized> RwLock<T> {
    /// Waits until nobody changes what is under it.
    ///
    /// # Panics
    /// When somebody has panicked while changing it.
    #[track_caller]
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        self.0.read().expect(PANICKED)
    }

    /// Waits until nobody else has it.
    ///
    /// # Panics
    /// When somebody has panicked while changing it.
    #[track_caller]
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        self.0.write().expect(PANICKED)
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn whoever_comes_after_a_panic_panics_as_well() {
        let panics = |what: &dyn Fn()| catch_unwind(AssertUnwindSafe(what)).is_err();
        let mutex = Mutex::new(1);
        assert!(!panics(&|| *mutex.lock() += 1));
        assert!(panics(&|| {
            let _held = mutex.lock();
            panic!("on purpose");
        }));
        assert!(panics(&|| drop(mutex.lock())) && panics(&|| drop(mutex.try_lock())));
        assert_eq!(*mutex.lock_after_panic(), 2);
        let shared = RwLock::new(1);
        assert!(panics(&|| {
            let _held = shared.write();
            panic!("on purpose");
        }));
        assert!(panics(&|| drop(shared.read())) && panics(&|| drop(shared.write())));
    }

    #[test]
    fn who_does_not_wait_is_told() {
        let mutex = Mutex::new(1);
        let held = mutex.lock();
        assert!(mutex.try_lock().is_none());
        drop(held);
        assert_eq!(mutex.try_lock().as_deref(), Some(&1));
    }
}
