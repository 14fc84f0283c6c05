//! From id to number in the slab. The table holds only numbers, 4 bytes and a control byte each,
//! and reads the ids in the slab: 6 to 11 bytes per timer, where a map with its own ids takes 24 to
//! 48.
//!
//! A table doubles when full and shrinks only when nearly empty, so that a number of timers that
//! swings does not rebuild it again and again. Nobody iterates over it: its order never becomes an
//! order of firing. Hashing has no seed, for the same run must give the same steps. That is safe
//! because the leader makes the ids, 62 random bits in each; a client's own key never comes here.

use std::hash::{Hash, Hasher};

use hashbrown::HashTable;
use hashbrown::hash_table::{Entry, VacantEntry};

use super::TimerId;
use super::slab::Slab;

/// Tables the ids are spread over, by hash. Growing reads every id of a table again, all over
/// memory: in one table of a million that is a pause of 100 ms, in one of 64 it is 1 or 2.
const TABLES: usize = 1 << TABLE_BITS;
const TABLE_BITS: u32 = 6;

/// Where in a hash the number of the table is: above the bits that choose the bucket and below the
/// seven highest, which the table compares first.
const TABLE_SHIFT: u32 = 48;

/// A table shrinks when it holds less than one timer in so many buckets. It grows at seven of
/// eight.
const SHRINK_BELOW: usize = 8;

/// A table of this many buckets is never shrunk, only freed with the wheel: a hundred bytes.
const BUCKETS_MIN: usize = 16;

/// See the head of the file.
pub(super) struct Index {
    tables: Box<[HashTable<u32>; TABLES]>,
}

impl Index {
    pub(super) fn new() -> Self {
        Self { tables: Box::new([const { HashTable::new() }; TABLES]) }
    }

    /// The number of a timer.
    pub(super) fn find<K: TimerId>(&self, slab: &Slab<K>, id: &K) -> Option<u32> {
        let hash = hash_of(id);
        self.tables[table_of(hash)].find(hash, |&number| slab[number].id == *id).copied()
    }

    /// The gap a new id goes into; `None` when the id is there already.
    pub(super) fn vacancy<K: TimerId>(&mut self, slab: &Slab<K>, id: &K) -> Option<VacantEntry<'_, u32>> {
        let hash = hash_of(id);
        let same = |&number: &u32| slab[number].id == *id;
        let rehash = |&number: &u32| hash_of(&slab[number].id);
        match self.tables[table_of(hash)].entry(hash, same, rehash) {
            Entry::Occupied(_) => None,
            Entry::Vacant(vacancy) => Some(vacancy),
        }
    }

    /// Forgets an id and returns the number it had.
    pub(super) fn remove<K: TimerId>(&mut self, slab: &Slab<K>, id: &K) -> Option<u32> {
        let hash = hash_of(id);
        let table = &mut self.tables[table_of(hash)];
        let found = table.find_entry(hash, |&number| slab[number].id == *id).ok()?;
        let (number, _) = found.remove();
        shrink_if_sparse(table, slab);
        Some(number)
    }

    /// Gives a timer that moved within the slab its new number.
    pub(super) fn replace<K: TimerId>(&mut self, id: &K, from: u32, to: u32) {
        let hash = hash_of(id);
        let number = self.tables[table_of(hash)].find_mut(hash, |&number| number == from);
        *number.expect("every timer is in the index") = to;
    }

    /// Heap memory held.
    pub(super) fn allocated_bytes(&self) -> usize {
        let tables = self.tables.iter().map(HashTable::allocation_size).sum::<usize>();
        tables + size_of_val(&*self.tables)
    }

    /// Panics unless exactly these timers are found, each under its own id.
    #[cfg(test)]
    pub(super) fn validate<K: TimerId>(&self, slab: &Slab<K>, timers: &[u32]) {
        assert_eq!(self.tables.iter().map(HashTable::len).sum::<usize>(), timers.len());
        for &timer in timers {
            assert_eq!(self.find(slab, &slab[timer].id), Some(timer));
        }
    }
}

/// Rebuilds a table that is nearly empty to about half full: many more changes follow before the
/// next.
fn shrink_if_sparse<K: TimerId>(table: &mut HashTable<u32>, slab: &Slab<K>) {
    let buckets = table.num_buckets();
    if buckets > BUCKETS_MIN && table.len() < buckets / SHRINK_BELOW {
        let wanted = table.len() + table.len() / 2;
        table.shrink_to(wanted.max(BUCKETS_MIN / 2), |&number| hash_of(&slab[number].id));
    }
}

/// The number of the table that ids of this hash are in.
fn table_of(hash: u64) -> usize {
    let table = (hash >> TABLE_SHIFT) % (1 << TABLE_BITS);
    #[allow(clippy::cast_possible_truncation, reason = "less than TABLES")]
    {
        table as usize
    }
}

fn hash_of<K: Hash>(id: &K) -> u64 {
    let mut hasher = IdHasher(IdHasher::START);
    id.hash(&mut hasher);
    hasher.0
}

/// Multiplies each word into 128 bits and folds them: every bit of an id reaches the high bits the
/// table compares first and the low bits that choose the bucket, at one multiplication for eight
/// bytes.
struct IdHasher(u64);

impl IdHasher {
    /// First state: digits of pi, to be nothing in particular.
    const START: u64 = 0x243f_6a88_85a3_08d3;

    /// Odd, with its bits well spread: further digits of pi.
    const FACTOR: u64 = 0x1319_8a2e_0370_7345;
}

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(size_of::<u64>()) {
            let mut word = [0; size_of::<u64>()];
            word[..part.len()].copy_from_slice(part);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        let product = u128::from(self.0 ^ word) * u128::from(Self::FACTOR);
        #[allow(clippy::cast_possible_truncation, reason = "the two halves are what is wanted")]
        let (low, high) = (product as u64, (product >> u64::BITS) as u64);
        self.0 = low ^ high;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
