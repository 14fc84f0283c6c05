//! Which of this client's registrations is which: a number for each, so that a node knows one that comes again.
//!
//! A sender counts what it registers in one shard, and says with each registration below which number all have been
//! answered; the shard remembers all from there on. It writes what it remembers of a sender with each log entry, so none may
//! go far beyond its first one without an answer: another sender begins then, until that one is answered.
//!
//! ```text
//!   shard 3   sender "f3a9-0"   1 2 3 4 | 5 6 . 8     5, 6 and 8 are open: the next one says "answered below 5"
//!             sender "f3a9-1"   1 2 3 | 4             took over while 5 was without an answer for too long
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use boomerang_task::locks::Mutex;
use data_encoding::HEXLOWER;
use rand::Rng;

use boomerang_task::ShardId;
use boomerang_wire::proto;

/// From the first registration of a sender that is without an answer to the last one: the shard remembers all of these.
/// One request may have more.
const SPAN_MAX: u64 = 1_024;
const NAME_BYTES: usize = 16;

/// All senders of a client.
pub(super) struct Senders {
    /// No other client has it.
    name: String,
    shards: Mutex<BTreeMap<ShardId, Vec<Sender>>>,
}

/// One of them, in one shard.
#[derive(Debug)]
struct Sender {
    next: u64,
    /// The first number of each request that is under way.
    open: BTreeSet<u64>,
}

impl Sender {
    fn answered_below(&self) -> u64 {
        self.open.first().copied().unwrap_or(self.next)
    }

    fn has_room(&self, count: u64) -> bool {
        self.open.is_empty() || self.next + count - self.answered_below() <= SPAN_MAX
    }
}

/// The numbers of one request, until it is dropped: then they are never sent again.
pub(super) struct Numbers {
    senders: Arc<Senders>,
    shard: ShardId,
    sender: usize,
    first: u64,
}

impl Senders {
    pub fn new() -> Arc<Self> {
        let mut random = [0u8; NAME_BYTES];
        rand::rng().fill_bytes(&mut random);
        Arc::new(Self { name: HEXLOWER.encode(&random), shards: Mutex::default() })
    }

    /// Numbers for `count` registrations that go to `shard` with one request, and what its message says of the first.
    pub fn open(self: &Arc<Self>, shard: ShardId, count: usize) -> (proto::Origin, Numbers) {
        let count = count as u64;
        debug_assert!(count > 0, "a request without registrations has no number");
        let mut shards = self.shards.lock();
        let senders = shards.entry(shard).or_default();
        let place = senders.iter().position(|sender| sender.has_room(count)).unwrap_or_else(|| {
            senders.push(Sender { next: 1, open: BTreeSet::new() });
            senders.len() - 1
        });
        let sender = &mut senders[place];
        let origin = proto::Origin {
            sender: format!("{}-{place}", self.name),
            shard: u32::from(shard.0),
            number: sender.next,
            answered_below: sender.answered_below(),
        };
        sender.open.insert(sender.next);
        sender.next += count;
        let numbers = Numbers { senders: self.clone(), shard, sender: place, first: origin.number };
        (origin, numbers)
    }
}

impl Drop for Numbers {
    fn drop(&mut self) {
        let mut shards = self.senders.shards.lock();
        let senders = shards.get_mut(&self.shard).expect("its numbers come from there");
        let sender = &mut senders[self.sender];
        sender.open.remove(&self.first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_open_is_not_said_to_be_answered() {
        let senders = Senders::new();
        let shard = ShardId(3);
        let open = |count| senders.open(shard, count);
        let (first, first_open) = open(1);
        let (second, second_open) = open(10);
        let (third, third_open) = open(1);
        assert_eq!([&first, &second, &third].map(|origin| origin.number), [1, 2, 12]);
        assert_eq!([&first, &second, &third].map(|origin| origin.answered_below), [1, 1, 1]);
        assert!(first.sender == third.sender && first.shard == 3);
        drop(second_open);
        assert_eq!(open(1).0.answered_below, 1, "the first is open still");
        drop(first_open);
        assert_eq!(open(1).0.answered_below, 12);
        drop(third_open);
        let (last, _) = open(1);
        assert_eq!((last.number, last.answered_below), (15, 15), "nothing is open");
        assert_eq!(senders.open(ShardId(4), 1).0.number, 1, "each shard is counted by itself");
    }

    #[test]
    fn a_sender_with_many_open_gives_way_and_comes_back() {
        let senders = Senders::new();
        let (first, _open) = senders.open(ShardId(0), 1_000);
        let (second, other) = senders.open(ShardId(0), 1_000);
        assert_ne!(first.sender, second.sender);
        assert_eq!((second.number, second.answered_below), (1, 1));
        drop(other);
        assert_eq!(senders.open(ShardId(0), 5_000).0, proto::Origin { number: 1_001, answered_below: 1_001, ..second });
        assert_eq!(senders.open(ShardId(0), 24).0.sender, first.sender, "there is room for so many more");
    }

    #[test]
    fn one_that_gets_no_answer_does_not_keep_the_others_from_being_forgotten() {
        let senders = Senders::new();
        let (slow, _open) = senders.open(ShardId(0), 1);
        let names: BTreeSet<String> = (0..5_000).map(|_| senders.open(ShardId(0), 1).0.sender).collect();
        assert!(names.len() == 2 && names.contains(&slow.sender));
        let (last, _) = senders.open(ShardId(0), 1);
        assert!(last.sender != slow.sender && last.number == last.answered_below, "{last:?}");
    }
}
