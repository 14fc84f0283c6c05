//! Pauses between tries of something that failed.

use std::time::Duration;

/// Pauses that double from one to the next, up to a bound. Each is between half and all of that, so that many who have lost
/// the same node do not come back together.
#[derive(Debug, Clone)]
pub struct Pauses {
    next: Duration,
    max: Duration,
}

impl Pauses {
    /// The first pause is at most `min`, none is longer than `max`.
    pub const fn new(min: Duration, max: Duration) -> Self {
        Self { next: min, max }
    }

    /// The pause before the next try. `chance` is a random number between 0 and 1.
    pub fn next(&mut self, chance: f64) -> Duration {
        let longest = self.next.min(self.max);
        self.next = longest.saturating_mul(2);
        longest.mul_f64(0.5 + chance.clamp(0.0, 1.0) / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_differ() {
        let mut pauses = Pauses::new(Duration::from_millis(10), Duration::from_millis(35));
        let taken = [1.0, 1.0, 1.0, 1.0, 0.0, 0.5].map(|chance| pauses.next(chance).as_micros());
        assert_eq!(taken, [10_000, 20_000, 35_000, 35_000, 17_500, 26_250]);
    }

    #[test]
    fn a_pause_of_any_number_is_bounded() {
        let mut pauses = Pauses::new(Duration::from_secs(1), Duration::MAX);
        assert!((0..1_000).all(|_| pauses.next(0.0) > Duration::ZERO), "and does not overflow");
    }
}
