//! What is done when: a function of a seed and of the kinds that are allowed. Pure.
//!
//! Faults come in rounds, with a rest after each: one alone, or several that overlap, of which at most one is hard. Kinds are
//! dealt like cards: each comes once before any comes again, but for the rare ones, which are left out of most decks. A
//! round lasts as long as its faults do; how long a node takes to start is not known here, so instants are counted from the
//! beginning of the round.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

use super::Kind;

/// One fault of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planned {
    pub kind: Kind,
    /// After the beginning of the round.
    pub after: Duration,
    /// What cannot be ended at once ends later.
    pub lasts: Duration,
    /// Of whatever else is to be chosen.
    pub seed: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Round {
    pub faults: Vec<Planned>,
    pub rest: Duration,
}

/// Rounds without end.
#[derive(Debug)]
pub struct Schedule {
    rng: StdRng,
    hard: Deck,
    soft: Deck,
}

#[derive(Debug)]
struct Deck {
    kinds: Vec<Kind>,
    left: Vec<Kind>,
}

/// A rare kind is in one deck of so many.
const RARE: u32 = 3;
const REST_MS: std::ops::RangeInclusive<u64> = 1_000..=6_000;
const LASTS_MS: std::ops::RangeInclusive<u64> = 1_500..=15_000;
/// So much after the beginning of a round each of several faults begins: soft ones before the hard one, or into it.
const AFTER_MS: std::ops::RangeInclusive<u64> = 0..=6_000;

impl Schedule {
    /// `kinds` in any order.
    pub fn new(seed: u64, kinds: &[Kind]) -> Self {
        let mut kinds = kinds.to_vec();
        kinds.sort_unstable();
        kinds.dedup();
        let (hard, soft) = kinds.into_iter().partition(|kind| kind.is_hard());
        Self { rng: StdRng::seed_from_u64(seed), hard: Deck::of(hard), soft: Deck::of(soft) }
    }

    fn round(&mut self) -> Option<Round> {
        // Of ten rounds: four with one hard fault alone, two with one soft one, four mixed.
        let (mut hard, mut soft) = match self.rng.random_range(0..10) {
            0..4 => (true, 0),
            4..6 => (false, 1),
            _ => (true, self.rng.random_range(1..=2)),
        };
        // With kinds of one sort only, there is no choice.
        hard |= self.soft.is_empty();
        soft = soft.max(usize::from(self.hard.is_empty()));
        let mut kinds: Vec<Kind> = hard.then(|| self.hard.deal(&mut self.rng)).flatten().into_iter().collect();
        for _ in 0..soft {
            kinds.extend(self.soft.deal(&mut self.rng).filter(|kind| !kinds.contains(kind)));
        }
        let alone = kinds.len() < 2;
        let faults: Vec<Planned> = kinds.into_iter().map(|kind| self.planned(kind, alone)).collect();
        let rest = self.millis(REST_MS);
        (!faults.is_empty()).then_some(Round { faults, rest })
    }

    fn planned(&mut self, kind: Kind, alone: bool) -> Planned {
        let after = self.millis(AFTER_MS);
        let after = if alone { Duration::ZERO } else { after };
        Planned { kind, after, lasts: self.millis(LASTS_MS), seed: self.rng.random() }
    }

    fn millis(&mut self, range: std::ops::RangeInclusive<u64>) -> Duration {
        Duration::from_millis(self.rng.random_range(range))
    }
}

impl Iterator for Schedule {
    type Item = Round;

    /// `None` when there is nothing that may be done.
    fn next(&mut self) -> Option<Round> {
        if self.hard.is_empty() && self.soft.is_empty() {
            return None;
        }
        loop {
            if let Some(round) = self.round() {
                return Some(round);
            }
        }
    }
}

impl Deck {
    fn of(kinds: Vec<Kind>) -> Self {
        Self { kinds, left: Vec::new() }
    }

    fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }

    fn deal(&mut self, rng: &mut StdRng) -> Option<Kind> {
        if self.left.is_empty() {
            let with_rare = rng.random_ratio(1, RARE);
            let only_rare = self.kinds.iter().all(|kind| is_rare(*kind));
            self.left = self.kinds.iter().copied().filter(|kind| with_rare || only_rare || !is_rare(*kind)).collect();
            self.left.shuffle(rng);
        }
        self.left.pop()
    }
}

/// What asks for more than a majority can bear is not what most of a run should be about.
fn is_rare(kind: Kind) -> bool {
    matches!(kind, Kind::Majority | Kind::Blackout)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_rounds() {
        let rounds = |seed| Schedule::new(seed, &Kind::ALL).take(200).collect::<Vec<_>>();
        assert_eq!(rounds(7), rounds(7));
        assert_ne!(rounds(7), rounds(8));
        let mut other_order = Kind::ALL.to_vec();
        other_order.reverse();
        assert_eq!(Schedule::new(7, &other_order).take(200).collect::<Vec<_>>(), rounds(7));
    }

    #[test]
    fn every_kind_comes_alone_and_in_company_and_never_two_hard_ones() {
        let (mut times, mut mixed, mut alone) = (BTreeMap::<Kind, u32>::new(), 0, 0);
        for round in Schedule::new(1, &Kind::ALL).take(1_000) {
            assert!(round.faults.iter().filter(|fault| fault.kind.is_hard()).count() <= 1, "{round:?}");
            let mut kinds: Vec<Kind> = round.faults.iter().map(|fault| fault.kind).collect();
            kinds.sort_unstable();
            kinds.dedup();
            assert_eq!(kinds.len(), round.faults.len(), "no kind twice");
            *(if kinds.len() > 1 { &mut mixed } else { &mut alone }) += 1;
            kinds.into_iter().for_each(|kind| *times.entry(kind).or_insert(0) += 1);
        }
        assert_eq!(times.len(), Kind::ALL.len(), "{times:?}");
        assert!(mixed > 200 && alone > 200, "{mixed} mixed, {alone} alone");
        let common = times[&Kind::Kill];
        assert!(times[&Kind::Majority] * 2 < common, "{times:?}");
        assert!(times[&Kind::Wipe].abs_diff(common) <= 1, "dealt like cards: {times:?}");
    }

    #[test]
    fn a_few_kinds_are_enough_and_none_is_nothing() {
        for kind in Kind::ALL {
            assert!(
                Schedule::new(3, &[kind]).take(20).all(|round| round.faults.iter().all(|fault| fault.kind == kind))
            );
        }
        assert_eq!(Schedule::new(3, &[]).next(), None);
    }
}
