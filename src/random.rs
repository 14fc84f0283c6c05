//! Where chance comes from in what a simulation runs: of the system, or from a seed.
//!
//! A simulation gives its thread a seed; from then on every source made on this thread is made from it, one after the
//! other. Without one, sources are as random as the system's. Secrets do not come from here.

use std::cell::RefCell;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

thread_local! {
    static SEEDED: RefCell<Option<SmallRng>> = const { RefCell::new(None) };
}

/// From now on, what this thread takes for chance follows from `seed`; `None`: it is chance again.
pub fn seed_this_thread(seed: Option<u64>) {
    SEEDED.set(seed.map(SmallRng::seed_from_u64));
}

/// A new source.
pub fn source() -> SmallRng {
    SEEDED.with_borrow_mut(|seeded| match seeded {
        Some(seeded) => SmallRng::seed_from_u64(seeded.random()),
        None => SmallRng::from_rng(&mut rand::rng()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_again_and_none_gives_another() {
        let numbers = || (0..3).map(|_| source().random::<u64>()).collect::<Vec<_>>();
        seed_this_thread(Some(7));
        let first = numbers();
        assert_ne!(first[0], first[1]);
        seed_this_thread(Some(7));
        assert_eq!(first, numbers());
        seed_this_thread(None);
        assert_ne!(first, numbers());
    }
}
