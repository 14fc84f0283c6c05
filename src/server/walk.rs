//! An index of all shards as one: a merge of their rows in the order of what follows the prefix.
//!
//! A place is what a row's key has behind the prefix of its index, the same in every shard, and ends with a task's id.
//! It is also what a cursor holds: rows may come and go between two pages, and none is shown twice or left out because
//! of it, unless it was moved itself. Walking costs what is walked over, however much the index holds.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use crate::store::keys::Key;
use crate::store::{Store, StoreError};
use crate::task::GroupId;

const ROWS_PER_READ: usize = 64;

pub(super) type Place = Vec<u8>;

/// Where to walk, the same in every shard.
pub(super) struct Range<'a> {
    pub prefix: &'a dyn Fn(GroupId) -> Key,
    /// The first place.
    pub from: Place,
    /// Before this place; `None` is the end of the index.
    pub until: Option<Place>,
}

pub(super) struct Walk<'a> {
    store: &'a Store,
    shards: Vec<Part>,
    /// The first unread place of each shard that has one.
    heads: BinaryHeap<Reverse<(Place, usize)>>,
}

/// One shard's part of the index.
struct Part {
    group: GroupId,
    prefix_bytes: usize,
    read: VecDeque<(Place, Vec<u8>)>,
    next: Option<Key>,
    until: Key,
}

impl<'a> Walk<'a> {
    pub fn new(store: &'a Store, shards: u16, range: &Range<'_>) -> Result<Self, StoreError> {
        let mut walk = Self { store, shards: Vec::new(), heads: BinaryHeap::new() };
        for group in (1..=shards).map(GroupId) {
            let prefix = (range.prefix)(group);
            let until = match &range.until {
                Some(place) => prefix.join(place),
                None => Key::from_stored(after(prefix.as_ref()).expect("a prefix begins with the group's number")),
            };
            let next = Some(prefix.join(&range.from));
            let prefix_bytes = prefix.as_ref().len();
            walk.shards.push(Part { group, prefix_bytes, read: VecDeque::new(), next, until });
            walk.pull(walk.shards.len() - 1)?;
        }
        Ok(walk)
    }

    /// The next row of all: its shard, its place, and its value.
    pub fn next(&mut self) -> Result<Option<(GroupId, Place, Vec<u8>)>, StoreError> {
        let Some(Reverse((_, at))) = self.heads.pop() else { return Ok(None) };
        let shard = &mut self.shards[at];
        let group = shard.group;
        let (place, value) = shard.read.pop_front().expect("a head was read");
        self.pull(at)?;
        Ok(Some((group, place, value)))
    }

    /// Puts the next place of one shard among the heads.
    fn pull(&mut self, at: usize) -> Result<(), StoreError> {
        let shard = &mut self.shards[at];
        if shard.read.is_empty()
            && let Some(from) = shard.next.take()
        {
            // The range may be empty, the wrong way round.
            let rows = match from < shard.until {
                true => self.store.scan_state(&from, &shard.until, ROWS_PER_READ)?,
                false => Vec::new(),
            };
            shard.next = rows.last().filter(|_| rows.len() == ROWS_PER_READ).map(|(key, _)| behind(key));
            let prefix_bytes = shard.prefix_bytes;
            shard.read = rows.into_iter().map(|(key, value)| (key[prefix_bytes..].to_vec(), value)).collect();
        }
        if let Some((place, _)) = shard.read.front() {
            self.heads.push(Reverse((place.clone(), at)));
        }
        Ok(())
    }
}

/// The first key behind this one.
fn behind(key: &[u8]) -> Key {
    Key::from_stored([key, &[0]].concat())
}

/// The first bytes behind all that begin with these; `None` when there are none.
pub(super) fn after(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = prefix.to_vec();
    while let Some(last) = bytes.pop() {
        if last < u8::MAX {
            bytes.push(last + 1);
            return Some(bytes);
        }
    }
    None
}

/// A cursor: which index, and the place that was looked at last.
pub(super) fn token(index: char, place: &[u8]) -> String {
    use std::fmt::Write;
    place.iter().fold(String::from(index), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a String grows");
        text
    })
}

/// Where to go on from; `None` when it is no cursor of this index.
pub(super) fn place_behind(index: char, token: &str) -> Option<Place> {
    let digits = token.strip_prefix(index)?.as_bytes();
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let mut place = Vec::with_capacity(digits.len() / 2 + 1);
    for pair in digits.chunks(2) {
        let &[high, low] = pair else { return None };
        place.push(u8::try_from(digit(high)? * 16 + digit(low)?).expect("two digits"));
    }
    // Every place ends with an id.
    (place.len() >= 16).then(|| {
        place.push(0);
        place
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_a_place_of_its_index_and_nothing_else_is_a_cursor() {
        let place = [7u8; 24];
        let token = token('t', &place);
        assert_eq!(place_behind('t', &token).unwrap(), [&place[..], &[0]].concat());
        assert_eq!(place_behind('c', &token), None);
        for wrong in ["", "t", "tx", &token[1..], &token[..token.len() - 1], "t\u{e9}\u{e9}", "t00"] {
            assert_eq!(place_behind('t', wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_begins_alike_ends_somewhere() {
        assert_eq!(after(b"ab").unwrap(), b"ac");
        assert_eq!(after(&[1, 255, 255]).unwrap(), [2]);
        assert_eq!(after(&[255]), None);
        assert_eq!(after(&[]), None);
    }
}
