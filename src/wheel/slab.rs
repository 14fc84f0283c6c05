//! The slab: all timers of a wheel in chunks of one size, addressed by a number of 32 bits.
//!
//! ```text
//!   chunk 0            chunk 1            chunk 2
//!   [t t t . t t t t]  [t . t t t t . t]  [t t t          ]
//!          hole                                 ^ used: all numbers below are a timer or a hole
//! ```
//!
//! A removed timer leaves a hole; a new one takes the latest hole, else the next number. Growth
//! adds a chunk: nothing is copied or doubled. When holes outnumber a chunk and half the timers,
//! the wheel calls `drop_last` until they do not: the last timer moves into a hole and the end
//! moves down. So memory follows the number of timers, wherever the survivors lay. Holes are doubly
//! linked, as the last number may be one.

use std::ops::{Index, IndexMut};

/// "No timer" as a link.
pub(super) const NIL: u32 = u32::MAX;

/// Timers in a chunk: about 40 KB, far less than a busy wheel holds and enough to make allocations
/// rare.
const CHUNK: u32 = 1 << CHUNK_BITS;
const CHUNK_BITS: u32 = 10;

/// Most timers in a slab, so that every number differs from `NIL`. The caller's memory bound comes
/// long before.
const TIMERS_MAX: u32 = NIL - 1;

/// Most memory for a timer with a 16-byte id: eight for the due tick, eight for the two links, the
/// rest for flags.
const ENTRY_BYTES_MAX: usize = 40;
const _: () = assert!(size_of::<Entry<[u8; 16]>>() <= ENTRY_BYTES_MAX);
const _: () = assert!(size_of::<Entry<[u64; 2]>>() <= ENTRY_BYTES_MAX);

/// A timer, or the hole one left.
#[derive(Clone, Copy)]
pub(super) struct Entry<K> {
    /// The tick it fires at.
    pub(super) due_tick: u64,
    /// Whose timer it is. A hole keeps the id of the last one, which nobody reads.
    pub(super) id: K,
    /// The timer before it in its list, or the hole before it.
    pub(super) prev: u32,
    /// The timer after it in its list, or the hole after it.
    pub(super) next: u32,
    /// How long before its tick it is due: less than a tick.
    pub(super) early_ms: u16,
    /// False for a hole.
    live: bool,
}

impl<K> Entry<K> {
    /// A timer in no list yet.
    pub(super) fn new(id: K, due_tick: u64, early_ms: u16) -> Self {
        Self { due_tick, id, prev: NIL, next: NIL, early_ms, live: true }
    }
}

type Chunk<K> = Box<[Entry<K>; CHUNK as usize]>;

/// See the head of the file.
pub(super) struct Slab<K> {
    chunks: Vec<Chunk<K>>,
    /// Numbers in use, by timers and holes. The rest of the last chunk has never been used since it
    /// was added.
    used: u32,
    /// How many of those are holes.
    holes: u32,
    /// The hole to fill next.
    first_hole: u32,
}

impl<K: Copy> Slab<K> {
    pub(super) fn new() -> Self {
        Self { chunks: Vec::new(), used: 0, holes: 0, first_hole: NIL }
    }

    /// How many timers there are.
    pub(super) fn len(&self) -> usize {
        (self.used - self.holes) as usize
    }

    /// Adds a timer and returns its number.
    pub(super) fn insert(&mut self, entry: Entry<K>) -> u32 {
        if self.first_hole != NIL {
            return self.fill_hole(entry);
        }
        let number = self.used;
        assert!(number < TIMERS_MAX, "a wheel holds at most {TIMERS_MAX} timers");
        if (number >> CHUNK_BITS) as usize == self.chunks.len() {
            // Filled with copies of this timer: any value does, as no number past `used` is read.
            let chunk = vec![entry; CHUNK as usize].into_boxed_slice();
            self.chunks.push(chunk.try_into().unwrap_or_else(|_| unreachable!("CHUNK entries")));
        }
        self[number] = entry;
        self.used += 1;
        number
    }

    /// Makes a hole of a timer that is in no list any more. The last timer of all leaves one empty
    /// chunk and no hole.
    pub(super) fn remove(&mut self, number: u32) {
        debug_assert!(self[number].live, "{number} is a hole already");
        let after = self.first_hole;
        if after != NIL {
            self[after].prev = number;
        }
        let entry = &mut self[number];
        entry.live = false;
        entry.prev = NIL;
        entry.next = after;
        self.first_hole = number;
        self.holes += 1;
        if self.holes == self.used {
            self.used = 0;
            self.holes = 0;
            self.first_hole = NIL;
            self.release_chunks();
        }
    }

    /// Whether there are more holes than are worth keeping. One removal adds at most two to what is
    /// too many.
    pub(super) fn is_sparse(&self) -> bool {
        self.holes > CHUNK + (self.used - self.holes) / 2
    }

    /// Gives up the last number in use. A timer there moves into a hole: returned as (from, to),
    /// for whatever names it must follow. There must be a hole.
    pub(super) fn drop_last(&mut self) -> Option<(u32, u32)> {
        let last = self.used - 1;
        let entry = self[last];
        let moved = if entry.live {
            Some((last, self.fill_hole(entry)))
        } else {
            self.unlink_hole(last);
            None
        };
        self.used -= 1;
        self.release_chunks();
        moved
    }

    /// Puts a timer into the first hole and returns its number.
    fn fill_hole(&mut self, entry: Entry<K>) -> u32 {
        let number = self.first_hole;
        self.unlink_hole(number);
        self[number] = entry;
        number
    }

    /// Takes a hole out of the list of holes.
    fn unlink_hole(&mut self, number: u32) {
        let Entry { prev, next, .. } = self[number];
        if prev == NIL {
            self.first_hole = next;
        } else {
            self[prev].next = next;
        }
        if next != NIL {
            self[next].prev = prev;
        }
        self.holes -= 1;
    }

    /// Frees the chunks past the last number in use, but for one: the next timers may need it, and
    /// a wheel that hovers around the edge of a chunk would else allocate at every step.
    fn release_chunks(&mut self) {
        let needed = self.used.div_ceil(CHUNK) as usize;
        let kept = needed + 1;
        if self.chunks.len() > kept {
            self.chunks.truncate(kept);
            // The list of chunks itself, a word for each, shrinks by half when three quarters of it
            // are unused.
            if self.chunks.capacity() / 4 > kept {
                self.chunks.shrink_to(self.chunks.capacity() / 2);
            }
        }
    }

    /// Heap memory held.
    pub(super) fn allocated_bytes(&self) -> usize {
        self.chunks.len() * size_of::<[Entry<K>; CHUNK as usize]>() + self.chunks.capacity() * size_of::<Chunk<K>>()
    }

    /// Panics unless `timers`, sorted, are exactly the numbers of the live entries, and the holes
    /// are all linked.
    #[cfg(test)]
    pub(super) fn validate(&self, timers: &[u32]) {
        assert!((0..self.used).filter(|&number| self[number].live).eq(timers.iter().copied()));
        let (mut holes, mut prev, mut hole) = (0, NIL, self.first_hole);
        while hole != NIL {
            assert!(hole < self.used && !self[hole].live, "hole {hole}");
            assert_eq!(self[hole].prev, prev, "hole {hole}");
            holes += 1;
            (prev, hole) = (hole, self[hole].next);
        }
        assert_eq!(self.holes, holes);
        assert!(!self.is_sparse(), "{holes} holes in {}", self.used);
        let needed = self.used.div_ceil(CHUNK) as usize;
        assert!((needed..=needed + 1).contains(&self.chunks.len()), "{}", self.chunks.len());
    }
}

impl<K> Index<u32> for Slab<K> {
    type Output = Entry<K>;

    fn index(&self, number: u32) -> &Entry<K> {
        &self.chunks[(number >> CHUNK_BITS) as usize][(number % CHUNK) as usize]
    }
}

impl<K> IndexMut<u32> for Slab<K> {
    fn index_mut(&mut self, number: u32) -> &mut Entry<K> {
        &mut self.chunks[(number >> CHUNK_BITS) as usize][(number % CHUNK) as usize]
    }
}
