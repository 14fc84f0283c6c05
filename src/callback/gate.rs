//! Who may go to one destination now: a limit, a line and a breaker, as a function of events and time. No lock, no
//! clock, no task: `destinations` has these.
//!
//! ```text
//!            FAILURES_MAX in a row, no answer between
//!   [closed] -----------------------------------------> [open until T] --T, somebody wants to go--> [probing]
//!      ^                                                   ^    |                                      |
//!      |                                                   +----|---- the probe failed: T twice as far -+
//!      +--------------- any answer from the receiver -----------+--------------------------------------+
//! ```
//!
//! - At most `limit` passes are out, the probe included. Whoever gets none joins the end of the line, and whoever is
//!   not at its head never goes first. Whoever waited and has been given a pass is on its way until it begins, and
//!   those of its shard who come meanwhile queue up behind it, also when there is room: what is due of a shard leaves in
//!   order, and shards know nothing of each other.
//! - The breaker counts failures to reach the receiver, not its refusals. While it is open nobody goes; then one does.
//!   If that fails too, all who waited up to then have failed with it: so a destination that is down costs one
//!   connection per cool-down, and attempts are used up at the pace of the retry policies all the same.
//! - What was sent before the breaker was last closed says nothing about now: an attempt that hangs for long is not
//!   held against a destination that has come back meanwhile. An answer is: whoever answers is there.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::Ticket;
use crate::task::{Failure, GroupId};

/// So many in a row open the breaker: enough that a connection or two lost by chance do not.
pub const FAILURES_MAX: u32 = 5;

pub struct Gate {
    limit: usize,
    cool_downs: CoolDowns,
    /// Passes that have not come back.
    out: usize,
    line: VecDeque<Ticket>,
    /// So many of the line have their passes, and have not begun.
    on_their_way: HashMap<GroupId, usize>,
    /// Those who failed without being sent, with the probe that failed for them; until they are taken.
    down: Vec<(Vec<Ticket>, Failure)>,
    breaker: Breaker,
    /// How often the breaker was closed.
    epoch: u64,
}

/// How long nobody is sent to a destination that is down: at first, and at most.
#[derive(Debug, Clone, Copy)]
pub struct CoolDowns {
    pub min: Duration,
    pub max: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Breaker {
    /// Failures since the last answer.
    Closed { failures: u32 },
    /// Until its time has come and somebody goes.
    Open { until: Instant, cool_down: Duration },
    /// One is out, and decides.
    Probing { cool_down: Duration },
}

/// The right to one attempt. Comes back to [`Gate::end`].
#[derive(Debug, Clone, Copy)]
pub struct Pass {
    epoch: u64,
    probe: bool,
    /// Of this shard: it was waited for, and has not begun.
    on_its_way: Option<GroupId>,
}

impl Pass {
    /// Whether it was waited for, and has not begun.
    pub fn is_on_its_way(self) -> bool {
        self.on_its_way.is_some()
    }
}

/// What an attempt has shown about its destination.
#[derive(Debug, Clone, Default)]
pub enum Evidence {
    /// It was not made, or ended before it left.
    #[default]
    Nothing,
    /// The receiver is there, whatever it said.
    Answered,
    /// The receiver could not be reached, or did not answer.
    Failed(Failure),
}

impl Gate {
    pub fn new(limit: usize, cool_downs: CoolDowns) -> Self {
        assert!(limit > 0, "a destination takes at least one attempt at a time");
        Self {
            limit,
            cool_downs,
            out: 0,
            line: VecDeque::new(),
            on_their_way: HashMap::new(),
            down: Vec::new(),
            breaker: Breaker::Closed { failures: 0 },
            epoch: 0,
        }
    }

    /// From now on; those who are out stay out. Whoever lowers it must see to it that the line moves again: it does
    /// whenever a pass comes back, and with none out there is always one to be had.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit.max(1);
    }

    /// A pass, or a place at the end of the line.
    pub fn admit(&mut self, ticket: Ticket, now: Instant) -> Option<Pass> {
        if self.line.is_empty()
            && !self.on_their_way.contains_key(&ticket.group)
            && let Some(pass) = self.pass(now)
        {
            return Some(pass);
        }
        self.line.push_back(ticket);
        None
    }

    /// Those at the head of the line who may go now. Each is to [`Gate::begin`], or to end.
    pub fn turns(&mut self, now: Instant) -> Vec<(Ticket, Pass)> {
        let mut turns = Vec::new();
        while let Some(ticket) = self.line.front().copied() {
            let Some(pass) = self.pass(now) else { break };
            self.line.pop_front();
            *self.on_their_way.entry(ticket.group).or_default() += 1;
            turns.push((ticket, Pass { on_its_way: Some(ticket.group), ..pass }));
        }
        turns
    }

    /// Whoever has this pass is gone, and nobody overtakes it any more. Others may have their turn now.
    pub fn begin(&mut self, pass: &mut Pass) {
        let Some(group) = pass.on_its_way.take() else { return };
        let Entry::Occupied(mut left) = self.on_their_way.entry(group) else {
            unreachable!("whoever is on its way is counted");
        };
        *left.get_mut() -= 1;
        if *left.get() == 0 {
            left.remove();
        }
    }

    fn pass(&mut self, now: Instant) -> Option<Pass> {
        if self.out >= self.limit {
            return None;
        }
        let probe = match self.breaker {
            Breaker::Closed { .. } => false,
            Breaker::Open { until, cool_down } if now >= until => {
                self.breaker = Breaker::Probing { cool_down };
                true
            }
            Breaker::Open { .. } | Breaker::Probing { .. } => return None,
        };
        self.out += 1;
        Some(Pass { epoch: self.epoch, probe, on_its_way: None })
    }

    /// An attempt is over. Others may have their turn now, or have failed.
    pub fn end(&mut self, mut pass: Pass, evidence: Evidence, now: Instant) {
        assert!(self.out > 0, "a pass comes back once");
        self.out -= 1;
        self.begin(&mut pass);
        let current = pass.epoch == self.epoch;
        match (evidence, self.breaker) {
            (Evidence::Answered, Breaker::Closed { .. }) => self.breaker = Breaker::Closed { failures: 0 },
            (Evidence::Answered, _) => {
                self.breaker = Breaker::Closed { failures: 0 };
                self.epoch += 1;
            }
            (Evidence::Failed(_), Breaker::Closed { failures }) if current => {
                self.breaker = match failures + 1 {
                    FAILURES_MAX.. => self.opened(now, self.cool_downs.min),
                    failures => Breaker::Closed { failures },
                };
            }
            (Evidence::Failed(failure), Breaker::Probing { cool_down }) if current && pass.probe => {
                self.breaker = self.opened(now, (cool_down * 2).min(self.cool_downs.max));
                if !self.line.is_empty() {
                    self.down.push((std::mem::take(&mut self.line).into(), failure));
                }
            }
            // Its time had come when this probe went: the next one takes its place.
            (Evidence::Nothing, Breaker::Probing { cool_down }) if current && pass.probe => {
                self.breaker = Breaker::Open { until: now, cool_down };
            }
            (Evidence::Failed(_) | Evidence::Nothing, _) => {}
        }
    }

    fn opened(&self, now: Instant, cool_down: Duration) -> Breaker {
        Breaker::Open { until: now + cool_down, cool_down }
    }

    /// Those who have failed since this was last asked.
    pub fn take_down(&mut self) -> Vec<(Vec<Ticket>, Failure)> {
        std::mem::take(&mut self.down)
    }

    /// When somebody who waits may go though nothing else happens until then.
    pub fn wakes_at(&self, now: Instant) -> Option<Instant> {
        match self.breaker {
            Breaker::Open { until, .. } if until > now && !self.line.is_empty() => Some(until),
            _ => None,
        }
    }

    pub fn waiting(&self) -> usize {
        self.line.len()
    }

    pub fn is_open(&self) -> bool {
        !matches!(self.breaker, Breaker::Closed { .. })
    }

    /// Nobody is out and nobody waits.
    pub fn is_idle(&self) -> bool {
        self.out == 0 && self.line.is_empty() && self.down.is_empty()
    }

    #[cfg(test)]
    pub fn out(&self) -> usize {
        self.out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::callback::tests::ticket;
    use crate::task::FailureClass;

    const COOL_DOWN_MIN: Duration = Duration::from_secs(1);
    const COOL_DOWN_MAX: Duration = Duration::from_secs(30);

    fn closed(limit: usize) -> Gate {
        Gate::new(limit, CoolDowns { min: COOL_DOWN_MIN, max: COOL_DOWN_MAX })
    }

    fn failed() -> Evidence {
        Evidence::Failed(Failure::new(FailureClass::Refused, "h:1: refused"))
    }

    fn tasks(turns: &[(Ticket, Pass)]) -> Vec<Ticket> {
        turns.iter().map(|(ticket, _)| *ticket).collect()
    }

    /// A gate whose breaker has just opened, and when it did.
    fn opened(limit: usize) -> (Gate, Instant) {
        let (mut gate, now) = (closed(limit), Instant::now());
        for n in 0..u64::from(FAILURES_MAX) {
            let pass = gate.admit(ticket(n), now).unwrap();
            gate.end(pass, failed(), now);
        }
        assert!(gate.is_open());
        (gate, now)
    }

    #[test]
    fn who_does_not_fit_waits_in_line_and_nobody_overtakes() {
        let (mut gate, now) = (closed(2), Instant::now());
        let first = gate.admit(ticket(0), now).unwrap();
        let second = gate.admit(ticket(1), now).unwrap();
        assert!((2..6).all(|n| gate.admit(ticket(n), now).is_none()));
        assert!(gate.turns(now).is_empty());
        gate.end(first, Evidence::Answered, now);
        // There is room, but somebody waits for it.
        assert!(gate.admit(ticket(6), now).is_none());
        gate.end(second, Evidence::Nothing, now);
        assert_eq!(tasks(&gate.turns(now)), [ticket(2), ticket(3)]);
        assert_eq!((gate.waiting(), gate.out(), gate.wakes_at(now)), (3, 2, None));
    }

    #[test]
    fn nobody_overtakes_those_who_have_had_their_turn_and_not_begun() {
        let (mut gate, now) = (closed(1), Instant::now());
        let first = gate.admit(ticket(0), now).unwrap();
        assert!((1..4).all(|n| gate.admit(ticket(n), now).is_none()));
        gate.set_limit(100);
        gate.end(first, Evidence::Answered, now);
        let mut turns = gate.turns(now);
        assert_eq!(tasks(&turns), [ticket(1), ticket(2), ticket(3)]);
        gate.begin(&mut turns[0].1);
        gate.begin(&mut turns[1].1);
        let elsewhere = Ticket { group: GroupId(2), ..ticket(9) };
        assert!(gate.admit(elsewhere, now).is_some(), "another shard does not wait for this one");
        assert!(gate.admit(ticket(4), now).is_none(), "there is room, and no line, but one is still on its way");
        // It has no task any more.
        gate.end(turns[2].1, Evidence::Nothing, now);
        assert!(gate.admit(ticket(5), now).is_none());
        let mut turns = gate.turns(now);
        assert_eq!(tasks(&turns), [ticket(4), ticket(5)]);
        turns.iter_mut().for_each(|(_, pass)| gate.begin(pass));
        assert!(gate.admit(ticket(6), now).is_some());
    }

    #[test]
    fn an_answer_between_failures_keeps_the_breaker_closed() {
        let (mut gate, now) = (closed(1), Instant::now());
        for n in 0..10 * u64::from(FAILURES_MAX) {
            let pass = gate.admit(ticket(n), now).unwrap();
            let evidence = if n % u64::from(FAILURES_MAX) == 0 { Evidence::Answered } else { failed() };
            gate.end(pass, evidence, now);
        }
        assert!(!gate.is_open());
    }

    #[test]
    fn a_failed_probe_takes_the_line_along_and_doubles_the_cool_down() {
        let (mut gate, mut now) = opened(100);
        let mut cool_down = COOL_DOWN_MIN;
        for round in 0..10 {
            assert!((0..3).all(|n| gate.admit(ticket(n), now).is_none()));
            assert_eq!(gate.wakes_at(now), Some(now + cool_down), "round {round}");
            assert!(gate.turns(now + cool_down - Duration::from_millis(1)).is_empty());
            now += cool_down;
            let probes = gate.turns(now);
            assert_eq!(tasks(&probes), [ticket(0)]);
            assert!(gate.admit(ticket(3), now).is_none(), "one at a time");
            gate.end(probes[0].1, failed(), now);
            let down = gate.take_down();
            assert_eq!(down.len(), 1);
            assert_eq!(down[0].0, [ticket(1), ticket(2), ticket(3)]);
            assert_eq!((gate.waiting(), gate.wakes_at(now)), (0, None));
            cool_down = (cool_down * 2).min(COOL_DOWN_MAX);
        }
        assert_eq!(cool_down, COOL_DOWN_MAX);
        // With nobody in line, the next to come is the probe; its answer closes the breaker and forgets the cool-down.
        now += cool_down;
        let probe = gate.admit(ticket(7), now).unwrap();
        assert!(gate.admit(ticket(8), now).is_none());
        gate.end(probe, Evidence::Answered, now);
        assert!(!gate.is_open());
        assert_eq!(tasks(&gate.turns(now)), [ticket(8)]);
    }

    #[test]
    fn a_probe_that_was_not_sent_makes_room_for_the_next() {
        let (mut gate, now) = opened(1);
        assert!((0..3).all(|n| gate.admit(ticket(n), now).is_none()));
        let now = now + COOL_DOWN_MIN;
        let (_, probe) = gate.turns(now)[0];
        gate.end(probe, Evidence::Nothing, now);
        assert!(gate.is_open());
        let next = gate.turns(now);
        assert_eq!(tasks(&next), [ticket(1)]);
        gate.end(next[0].1, Evidence::Answered, now);
        assert_eq!(tasks(&gate.turns(now)), [ticket(2)]);
    }

    #[test]
    fn a_probe_waits_for_room_and_a_late_answer_closes_the_breaker() {
        let (mut gate, now) = (closed(6), Instant::now());
        let passes: Vec<Pass> = (0..6).map(|n| gate.admit(ticket(n), now).unwrap()).collect();
        for pass in &passes[..5] {
            gate.end(*pass, failed(), now);
        }
        assert!(gate.is_open() && gate.admit(ticket(6), now).is_none());
        // The sixth has hung since before the breaker opened.
        gate.end(passes[5], Evidence::Answered, now);
        assert!(!gate.is_open());
        assert_eq!(tasks(&gate.turns(now)), [ticket(6)]);

        let (mut gate, now) = (closed(5), Instant::now());
        let hanging: Vec<Pass> = (0..5).map(|n| gate.admit(ticket(n), now).unwrap()).collect();
        for pass in hanging {
            gate.end(pass, failed(), now);
        }
        let now = now + COOL_DOWN_MIN;
        gate.out = 5;
        assert!(gate.admit(ticket(9), now).is_none(), "there is no room for the probe");
        assert_eq!(gate.wakes_at(now), None, "a pass that comes back wakes it");
        gate.end(Pass { epoch: 0, probe: false, on_its_way: None }, failed(), now);
        assert_eq!(tasks(&gate.turns(now)), [ticket(9)]);
    }

    #[test]
    fn failures_of_before_the_breaker_closed_do_not_open_it_again() {
        let (mut gate, now) = (closed(100), Instant::now());
        let passes: Vec<Pass> = (0..50).map(|n| gate.admit(ticket(n), now).unwrap()).collect();
        for pass in &passes[..20] {
            gate.end(*pass, failed(), now);
        }
        let now = now + COOL_DOWN_MIN;
        let probe = gate.admit(ticket(100), now).unwrap();
        gate.end(passes[20], failed(), now);
        assert!(gate.is_open(), "only the probe decides");
        gate.end(probe, Evidence::Answered, now);
        for pass in &passes[21..] {
            gate.end(*pass, failed(), now);
        }
        assert!(!gate.is_open());
        let fresh: Vec<Pass> = (0..5).map(|n| gate.admit(ticket(n), now).unwrap()).collect();
        for pass in fresh {
            gate.end(pass, failed(), now);
        }
        assert!(gate.is_open());
    }
}
