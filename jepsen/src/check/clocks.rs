//! While which clocks are wrong in a run, and how early what is due may come then.
//!
//! What counts is when a delivery arrives: a node dispatches what its own clock, or the time that its shard was stamped with,
//! says is due. Who stamped the due instant does not matter: a registration with a delay that a wrong clock answers is
//! promised a wrong instant, but one that is fixed from then on and that right clocks keep to. Only what pushes the shard's
//! time ahead outlives its clock, since that time never goes back: the right clocks catch up with it within
//! as much time as it was ahead, which is far less than [`FOLLOWED_US`].
//!
//! A clock is wrong from the beginning of a fault of clocks to its end, and then for as long as it takes to follow the right
//! one. A fault that did not end well, or did not begin well, may have left a clock wrong until everything was healed.

use super::Limits;
use super::tasks::BEGINNING_US;
use crate::history::{FaultNote, History, Stage, What};

/// The kinds of faults that set clocks; see `fault::clock`.
const FAULTS: [&str; 2] = ["clock", "clock-wild"];
/// A clock that is set right runs a tenth slower or faster until it is: 3 s for 300 ms. One that was wildly wrong is right
/// with the start of its node, but may have stamped its shard's time with as much as nobody noticed.
const FOLLOWED_US: u64 = 10_000_000;

/// From when to when, both included; in order, and none touches another.
pub(super) struct WrongClocks {
    windows: Vec<(u64, u64)>,
}

impl WrongClocks {
    pub fn of(history: &History) -> Self {
        let mut clocks = Self { windows: Vec::new() };
        let mut wrong: Option<(u64, u64)> = None;
        for event in &history.events {
            match &event.what {
                What::Fault(note) if FAULTS.contains(&note.fault.as_str()) => {
                    let (since_us, many) = wrong.unwrap_or((event.at_us.saturating_sub(BEGINNING_US), 0));
                    let many = if begins(note) { many + 1 } else { many - u64::from(ends(note)).min(many) };
                    wrong = (many > 0).then_some((since_us, many));
                    if many == 0 && ends(note) {
                        clocks.add(since_us, event.at_us + FOLLOWED_US);
                    }
                }
                What::Healed => {
                    if let Some((since_us, _)) = wrong.take() {
                        clocks.add(since_us, event.at_us + FOLLOWED_US);
                    }
                }
                _ => {}
            }
        }
        if let Some((since_us, _)) = wrong {
            clocks.add(since_us, u64::MAX);
        }
        clocks
    }

    fn add(&mut self, from_us: u64, to_us: u64) {
        match self.windows.last_mut() {
            Some((_, last_us)) if *last_us >= from_us => *last_us = to_us.max(*last_us),
            _ => self.windows.push((from_us, to_us)),
        }
    }

    /// So early may be what comes at this instant.
    pub fn early_us(&self, limits: &Limits, at_us: u64) -> u64 {
        self.early_between_us(limits, at_us, at_us)
    }

    /// By so much before `due_us` the cluster may already take it for due.
    pub fn early_before_us(&self, limits: &Limits, due_us: u64) -> u64 {
        self.early_between_us(limits, due_us.saturating_sub(limits.early_clocks_us), due_us)
    }

    fn early_between_us(&self, limits: &Limits, from_us: u64, to_us: u64) -> u64 {
        let next = self.windows.partition_point(|(_, last_us)| *last_us < from_us);
        let wrong = self.windows.get(next).is_some_and(|(first_us, _)| *first_us <= to_us);
        if wrong { limits.early_us.max(limits.early_clocks_us) } else { limits.early_us }
    }
}

/// A clock is set wrong. What could not be done may have been done in part; what was not done was not.
fn begins(note: &FaultNote) -> bool {
    match note.stage {
        Stage::Begin => true,
        Stage::Note => note.detail.starts_with("could not be done"),
        Stage::End => false,
    }
}

/// A clock is set right, and certainly.
fn ends(note: &FaultNote) -> bool {
    note.stage == Stage::End && !note.detail.starts_with("did not end well")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::hand_made::*;

    fn windows(history: HandMade) -> Vec<(u64, u64)> {
        let ms = |us: u64| if us == u64::MAX { us } else { us / 1000 };
        WrongClocks::of(&history.history()).windows.into_iter().map(|(from, to)| (ms(from), ms(to))).collect()
    }

    fn noted(fault: &str, stage: Stage, detail: &str) -> What {
        What::Fault(FaultNote { fault: fault.to_owned(), stage, detail: detail.to_owned() })
    }

    fn begun(at: u64) -> HandMade {
        HandMade::new().event(at, noted("clock", Stage::Begin, "machine 1 by 100 ms"))
    }

    #[test]
    fn clocks_are_wrong_from_a_beginning_until_they_have_followed() {
        let one = || begun(20_000).event(30_000, noted("clock", Stage::End, "right"));
        assert_eq!(windows(one()), [(18_000, 40_000)]);
        // Not by what else is broken, nor by what was not done.
        let other = one().fault(60_000, Stage::Begin).event(70_000, noted("clock", Stage::Note, "not done: none"));
        assert_eq!(windows(other), [(18_000, 40_000)]);
        let again = one().event(50_000, noted("clock-wild", Stage::Begin, "node 1"));
        assert_eq!(windows(again), [(18_000, 40_000), (48_000, u64::MAX)]);
    }

    #[test]
    fn two_at_once_end_with_the_second() {
        let two = begun(20_000)
            .event(21_000, noted("clock-wild", Stage::Begin, "node 1"))
            .event(30_000, noted("clock", Stage::End, "right"))
            .event(50_000, noted("clock-wild", Stage::End, "right"));
        assert_eq!(windows(two), [(18_000, 60_000)]);
    }

    #[test]
    fn what_ended_badly_is_wrong_until_healed() {
        let badly = begun(20_000).event(30_000, noted("clock", Stage::End, "did not end well: no such machine"));
        assert_eq!(windows(badly.healed(90_000)), [(18_000, 100_000)]);
        let half = HandMade::new().event(20_000, noted("clock-wild", Stage::Note, "could not be done: no answer"));
        assert_eq!(windows(half.healed(90_000)), [(18_000, 100_000)]);
    }

    #[test]
    fn the_allowance_is_that_of_the_instant() {
        let clocks = WrongClocks::of(&begun(20_000).event(30_000, noted("clock", Stage::End, "right")).history());
        let limits = Limits { early_us: 7, early_clocks_us: 1_000_000, ..LIMITS };
        for (at_us, early_us) in [(17_999_999, 7), (18_000_000, 1_000_000), (40_000_000, 1_000_000), (40_000_001, 7)] {
            assert_eq!(clocks.early_us(&limits, at_us), early_us, "at {at_us}");
        }
        assert_eq!(clocks.early_before_us(&limits, 41_000_000), 1_000_000);
        assert_eq!(clocks.early_before_us(&limits, 41_000_001), 7);
        // What is allowed at any time is no less meanwhile.
        assert_eq!(clocks.early_us(&Limits { early_us: 2_000_000, ..limits }, 20_000_000), 2_000_000);
    }
}
