//! An index of all shards as one: a merge of their rows in the order of what follows the prefix.
//!
//! A place is what a row's key has behind the prefix of its index, the same in every shard, and ends with a task's id.
//! It is also what a cursor holds: rows may come and go between two pages, and none is shown twice or left out because
//! of it, unless it was moved itself. A scan costs what it looks at, however much the index holds.
//!
//! In a cluster each node scans the shards it leads, and the [`Part`]s are merged by place once more: a page ends at
//! the first place behind which one of the parts may hold more, because what lies there is not known.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use data_encoding::HEXLOWER;

use crate::store::keys::Key;
use crate::store::{Store, StoreError};
use crate::task::GroupId;

const ROWS_PER_READ: usize = 64;

pub(super) type Place = Vec<u8>;

/// Where to look, the same in every shard.
pub(super) struct Range<'a> {
    pub prefix: &'a dyn Fn(GroupId) -> Key,
    /// The first place.
    pub from: Place,
    /// Before this place; `None` is the end of the index.
    pub until: Option<Place>,
}

pub(super) struct Scan<'a> {
    store: &'a Store,
    shards: Vec<Rows>,
    /// The first unread place of each shard that has one.
    heads: BinaryHeap<Reverse<(Place, usize)>>,
}

/// One shard's rows of the index.
struct Rows {
    group: GroupId,
    prefix_bytes: usize,
    read: VecDeque<(Place, Vec<u8>)>,
    next: Option<Key>,
    until: Key,
}

impl<'a> Scan<'a> {
    pub fn new(
        store: &'a Store,
        groups: impl IntoIterator<Item = GroupId>,
        range: &Range<'_>,
    ) -> Result<Self, StoreError> {
        let mut scan = Self { store, shards: Vec::new(), heads: BinaryHeap::new() };
        for group in groups {
            let prefix = (range.prefix)(group);
            let until = match &range.until {
                Some(place) => prefix.join(place),
                None => Key::from_stored(after(prefix.as_ref()).expect("a prefix begins with the group's number")),
            };
            let next = Some(prefix.join(&range.from));
            let prefix_bytes = prefix.as_ref().len();
            scan.shards.push(Rows { group, prefix_bytes, read: VecDeque::new(), next, until });
            scan.pull(scan.shards.len() - 1)?;
        }
        Ok(scan)
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

/// What was found along an index, or along some shards of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part<T> {
    /// In the order of their places.
    pub items: Vec<(Place, T)>,
    /// The last place that was looked at, if there may be more behind it.
    pub more_behind: Option<Place>,
}

impl<T> Default for Part<T> {
    fn default() -> Self {
        Self { items: Vec::new(), more_behind: None }
    }
}

/// How much goes into a page.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    pub items: usize,
    pub bytes: usize,
}

/// Several parts as one. `size` is what an item takes of the room; the first one always fits.
pub(super) fn merge<T>(parts: Vec<Part<T>>, room: Room, size: impl Fn(&T) -> usize) -> Part<T> {
    let known_up_to = parts.iter().filter_map(|part| part.more_behind.clone()).min();
    let known = |place: &Place| known_up_to.as_ref().is_none_or(|last| place <= last);
    let mut items: Vec<(Place, T)> = parts.into_iter().flat_map(|part| part.items).collect();
    items.retain(|(place, _)| known(place));
    items.sort_by(|(a, _), (b, _)| a.cmp(b));
    let mut bytes = 0;
    let fit = items.iter().take(room.items).take_while(|(_, item)| {
        let first = bytes == 0;
        bytes += size(item);
        first || bytes <= room.bytes
    });
    let fit = fit.count();
    if fit < items.len() {
        items.truncate(fit);
        return Part { more_behind: items.last().map(|(place, _)| place.clone()), items };
    }
    Part { items, more_behind: known_up_to }
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
    format!("{index}{}", HEXLOWER.encode(place))
}

/// Where to go on from; `None` when it is no cursor of this index.
pub(super) fn place_behind(index: char, token: &str) -> Option<Place> {
    let mut place = HEXLOWER.decode(token.strip_prefix(index)?.as_bytes()).ok()?;
    // Every place ends with an id.
    (place.len() >= 16).then(|| {
        place.push(0);
        place
    })
}

#[cfg(test)]
mod tests {
    use boomerang_testkit::seed;
    use rand::RngExt;

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

    /// One shard's rows behind `from`, up to a number of them and of bytes, as a node would answer.
    fn part_of(rows: &[(Place, usize)], from: &[u8], room: Room, walked_max: usize) -> Part<usize> {
        let mut part = Part::default();
        let mut bytes = 0;
        for (walked, (place, size)) in rows.iter().filter(|(place, _)| place.as_slice() > from).enumerate() {
            bytes += size;
            if walked == walked_max || part.items.len() == room.items || bytes > room.bytes && !part.items.is_empty() {
                return part;
            }
            part.more_behind = Some(place.clone());
            // Every third one is walked over and not taken.
            if place[0] % 3 > 0 {
                part.items.push((place.clone(), *size));
            } else {
                bytes -= size;
            }
        }
        Part { more_behind: None, ..part }
    }

    #[test]
    fn pages_of_parts_are_pages_of_the_whole() {
        for seed in seed::rounds(500) {
            let mut rng = seed.rng();
            let nodes = rng.random_range(1..5);
            let mut shards: Vec<Vec<(Place, usize)>> = vec![Vec::new(); nodes];
            let mut whole = Vec::new();
            for _ in 0..rng.random_range(0..120) {
                let place: Place = (0..4).map(|_| rng.random()).collect();
                let row = (place, rng.random_range(1..50));
                shards[rng.random_range(0..nodes)].push(row.clone());
                whole.push(row);
            }
            shards.iter_mut().for_each(|rows| rows.sort());
            whole.retain(|(place, _)| place[0] % 3 > 0);
            whole.sort();
            let room = Room { items: rng.random_range(1..20), bytes: rng.random_range(1..200) };
            let walked_max = rng.random_range(1..30);
            let (mut found, mut from) = (Vec::new(), Vec::new());
            loop {
                let parts = shards.iter().map(|rows| part_of(rows, &from, room, walked_max)).collect();
                let page = merge(parts, room, |size| *size);
                assert!(page.items.len() <= room.items);
                let bytes: usize = page.items.iter().map(|(_, size)| size).sum();
                assert!(bytes <= room.bytes || page.items.len() == 1);
                found.extend(page.items);
                let Some(place) = page.more_behind else { break };
                assert!(place > from, "it goes on");
                from = place;
            }
            assert_eq!(found, whole);
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
