//! What happens to a packet between two machines. Pure: no device, no clock, no thread.
//!
//! Every ordered pair of machines has a [`Link`] of its own, so that one direction can be cut and the other not. Faults
//! lay [`Layer`]s over the links and lift them again in any order; what holds for a pair is all of its layers together:
//! cut by one is cut, delays add up, of each probability the largest counts.

use std::collections::BTreeMap;
use std::time::Duration;

use rand::{RngExt, rngs::StdRng};

/// A machine, by its place: the nodes' machines from 1 up, then [`Links::etcd`] and [`Links::clients`].
pub type Host = usize;

/// What is wrong with one direction between two machines. Nothing, by default.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Link {
    /// Nothing comes through.
    pub cut: bool,
    /// Every packet takes so much longer,
    pub delay: Duration,
    /// and up to so much more than that, each another time. The order is kept.
    pub jitter: Duration,
    /// This part of all packets is lost,
    pub loss: f64,
    /// this part comes twice,
    pub duplicate: f64,
    /// and this part comes after those that were sent behind it.
    pub reorder: f64,
}

impl Link {
    pub const CUT: Link =
        Link { cut: true, delay: Duration::ZERO, jitter: Duration::ZERO, loss: 0.0, duplicate: 0.0, reorder: 0.0 };

    fn with(self, other: Link) -> Link {
        Link {
            cut: self.cut || other.cut,
            delay: self.delay + other.delay,
            jitter: self.jitter + other.jitter,
            loss: self.loss.max(other.loss),
            duplicate: self.duplicate.max(other.duplicate),
            reorder: self.reorder.max(other.reorder),
        }
    }

    /// When a packet that is sent at `now_us` arrives: once, twice or not at all. `last_us` is when the one before it
    /// arrives, and after that this one.
    pub fn fate(&self, now_us: u64, last_us: &mut u64, rng: &mut StdRng) -> Fate {
        if self.cut || chance(self.loss, rng) {
            return Fate::default();
        }
        let jitter = micros(self.jitter);
        let extra = if jitter == 0 { 0 } else { rng.random_range(0..=jitter) };
        let due_us = now_us + micros(self.delay) + extra;
        let first = if chance(self.reorder, rng) {
            // Held back, and nobody waits for it.
            due_us + rng.random_range(REORDER_US)
        } else {
            *last_us = due_us.max(*last_us);
            *last_us
        };
        let second = chance(self.duplicate, rng).then(|| first + rng.random_range(DUPLICATE_US));
        Fate { first: Some(first), second }
    }
}

/// A packet that others overtake is late by so much.
const REORDER_US: std::ops::Range<u64> = 500..10_000;
/// The second of two comes so much after the first.
const DUPLICATE_US: std::ops::Range<u64> = 0..5_000;

/// When the copies of one packet arrive, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fate {
    pub first: Option<u64>,
    pub second: Option<u64>,
}

fn chance(part: f64, rng: &mut StdRng) -> bool {
    part > 0.0 && rng.random_bool(part.min(1.0))
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// What one fault does to links, from one machine to another each.
pub type Layer = Vec<(Host, Host, Link)>;
/// By which a layer is lifted.
pub type LayerId = u64;

/// All links between the machines.
#[derive(Debug, Clone)]
pub struct Links {
    nodes: usize,
    layers: BTreeMap<LayerId, Layer>,
    next: LayerId,
    /// By `from * machines + to`; what all layers say together.
    together: Vec<Link>,
}

impl Links {
    pub fn whole(nodes: usize) -> Self {
        let machines = nodes + 3;
        Self { nodes, layers: BTreeMap::new(), next: 1, together: vec![Link::default(); machines * machines] }
    }

    /// Machines that run nodes.
    pub fn nodes(&self) -> std::ops::RangeInclusive<Host> {
        1..=self.nodes
    }

    pub fn etcd(&self) -> Host {
        self.nodes + 1
    }

    /// This process: clients and receivers.
    pub fn clients(&self) -> Host {
        self.nodes + 2
    }

    pub fn lay(&mut self, layer: Layer) -> LayerId {
        let id = self.next;
        self.next += 1;
        self.layers.insert(id, layer);
        self.add_up();
        id
    }

    pub fn lift(&mut self, id: LayerId) {
        self.layers.remove(&id);
        self.add_up();
    }

    pub fn lift_all(&mut self) {
        self.layers.clear();
        self.add_up();
    }

    pub fn between(&self, from: Host, to: Host) -> Link {
        self.together[self.place(from, to)]
    }

    /// So many places there are.
    pub fn pairs(&self) -> usize {
        self.together.len()
    }

    pub fn place(&self, from: Host, to: Host) -> usize {
        from * (self.nodes + 3) + to
    }

    fn add_up(&mut self) {
        self.together.fill(Link::default());
        for (from, to, link) in self.layers.values().flatten().copied() {
            let place = self.place(from, to);
            self.together[place] = self.together[place].with(link);
        }
    }
}

/// Nothing between `one` and `other`, in both directions.
pub fn cut_apart(one: &[Host], other: &[Host]) -> Layer {
    let pairs = one.iter().flat_map(|a| other.iter().map(move |b| (*a, *b)));
    pairs.flat_map(|(a, b)| [(a, b, Link::CUT), (b, a, Link::CUT)]).collect()
}

/// Of these machines, each hears only those beside it.
pub fn ring(machines: &[Host]) -> Layer {
    let count = machines.len();
    let mut layer = Layer::new();
    for (place, from) in machines.iter().enumerate() {
        for (other, to) in machines.iter().enumerate() {
            let apart = place.abs_diff(other).min(count - place.abs_diff(other));
            if apart > 1 {
                layer.push((*from, *to, Link::CUT));
            }
        }
    }
    layer
}

/// The same for every ordered pair of these machines.
pub fn among(machines: &[Host], link: Link) -> Layer {
    let pairs = machines.iter().flat_map(|from| machines.iter().map(move |to| (*from, *to)));
    pairs.filter(|(from, to)| from != to).map(|(from, to)| (from, to, link)).collect()
}

/// The same between one machine and each of the others, in both directions.
pub fn around(machine: Host, others: &[Host], link: Link) -> Layer {
    others
        .iter()
        .filter(|other| **other != machine)
        .flat_map(|to| [(machine, *to, link), (*to, machine, link)])
        .collect()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn arrivals(link: Link, packets: u64, seed: u64) -> Vec<(u64, u64)> {
        let (mut rng, mut last_us) = (StdRng::seed_from_u64(seed), 0);
        let mut arrivals: Vec<(u64, u64)> = (0..packets)
            .flat_map(|packet| {
                let fate = link.fate(packet * 100, &mut last_us, &mut rng);
                [fate.first, fate.second].into_iter().flatten().map(move |at_us| (at_us, packet))
            })
            .collect();
        // As the switch does: by instant, and in the order of sending within one.
        arrivals.sort_by_key(|(at_us, _)| *at_us);
        arrivals
    }

    fn in_order(arrivals: &[(u64, u64)]) -> bool {
        arrivals.is_sorted_by_key(|(_, packet)| *packet)
    }

    #[test]
    fn a_whole_link_lets_everything_through_at_once() {
        let found = arrivals(Link::default(), 1_000, 1);
        assert_eq!(found, (0..1_000).map(|packet| (packet * 100, packet)).collect::<Vec<_>>());
        assert!(arrivals(Link::CUT, 1_000, 1).is_empty());
    }

    #[test]
    fn a_slow_link_is_late_and_keeps_the_order() {
        let (delay, jitter) = (Duration::from_millis(20), Duration::from_millis(10));
        let found = arrivals(Link { delay, jitter, ..Link::default() }, 5_000, 2);
        assert_eq!(found.len(), 5_000);
        assert!(in_order(&found));
        assert!(found.iter().all(|(at_us, packet)| (20_000..=30_000).contains(&(at_us - packet * 100))));
        let latest = found.iter().map(|(at_us, packet)| at_us - packet * 100).max();
        assert!(latest > Some(28_000), "jitter shows: {latest:?}");
    }

    #[test]
    fn a_lossy_link_loses_doubles_and_reorders_as_often_as_it_says() {
        let link = Link { loss: 0.2, duplicate: 0.1, reorder: 0.05, ..Link::default() };
        let found = arrivals(link, 20_000, 3);
        assert!(!in_order(&found));
        let mut times = vec![0; 20_000];
        found.iter().for_each(|(_, packet)| times[usize::try_from(*packet).unwrap()] += 1);
        let part = |count| times.iter().filter(|times| **times == count).count() as f64 / 20_000.0;
        assert!((part(0) - 0.2).abs() < 0.02, "lost: {}", part(0));
        assert!((part(2) - 0.08).abs() < 0.02, "twice: {}", part(2));
        assert_eq!(found, arrivals(link, 20_000, 3), "the same seed");
        assert_ne!(found, arrivals(link, 20_000, 4), "another seed");
    }

    #[test]
    fn layers_add_up_and_are_lifted_in_any_order() {
        let mut links = Links::whole(3);
        let slow = Link { delay: Duration::from_millis(5), loss: 0.1, ..Link::default() };
        let first = links.lay(vec![(1, 2, slow)]);
        let second = links.lay(cut_apart(&[1], &[2, 3]));
        let third = links.lay(vec![(1, 2, Link { loss: 0.3, ..slow })]);
        assert!(links.between(1, 2).cut && links.between(2, 1).cut && links.between(3, 1).cut);
        assert!(!links.between(2, 3).cut);
        links.lift(second);
        assert_eq!(links.between(1, 2), Link { delay: Duration::from_millis(10), loss: 0.3, ..Link::default() });
        links.lift(third);
        assert_eq!(links.between(1, 2), slow);
        links.lift(first);
        assert_eq!(links.between(1, 2), Link::default());
    }

    #[test]
    fn in_a_ring_each_hears_its_neighbours() {
        let mut links = Links::whole(5);
        links.lay(ring(&[1, 2, 3, 4, 5]));
        for from in 1..=5 {
            let heard: Vec<Host> = (1..=5).filter(|to| *to != from && !links.between(from, *to).cut).collect();
            assert_eq!(heard.len(), 2, "{from} is heard by {heard:?}");
        }
        assert!(!links.between(1, 5).cut && !links.between(1, links.clients()).cut);
    }
}
