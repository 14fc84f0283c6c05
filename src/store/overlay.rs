//! The writes of one `apply`, readable before they are stored.
//!
//! `apply` reads and writes through an [`Overlay`], so that the second request of a batch sees what the first one did;
//! the shell then stores all of it in one batch. The overlay only needs something to read from, so tests of the state
//! machine run on a map.
//!
//! Rows written once are removed with RocksDB's SingleDelete, by which a row that lives and dies between two flushes
//! costs no disk write. That is only sound if such a key is never written twice without a removal in between, so the
//! overlay asserts it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::codec;
use super::error::StoreError;
use super::keys::Key;

/// Where stored values are read from.
pub trait Rows: Send + Sync {
    fn get(&self, key: &Key) -> Result<Option<Vec<u8>>, StoreError>;

    /// The values of `keys`, in their order.
    fn get_many(&self, keys: &[Key]) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        keys.iter().map(|key| self.get(key)).collect()
    }
}

/// Reads one typed value.
pub fn get_row<T: DeserializeOwned>(rows: &dyn Rows, what: &'static str, key: &Key) -> Result<Option<T>, StoreError> {
    rows.get(key)?.map(|bytes| codec::decode(what, &bytes)).transpose()
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    Put(Vec<u8>),
    /// The key is not in use now and is removed with [`Write::DeleteOnce`] before it is used again.
    PutOnce(Vec<u8>),
    Delete,
    DeleteOnce,
    /// [`Write::DeleteOnce`], and then [`Write::PutOnce`].
    ReplaceOnce(Vec<u8>),
    /// Everything from the key on and before this one; none of it is written beside.
    DeleteRange(Key),
}

pub struct Overlay<'a> {
    base: &'a dyn Rows,
    writes: HashMap<Key, Write>,
    /// What `base` holds, as far as it was read ahead.
    ahead: HashMap<Key, Option<Vec<u8>>>,
}

impl<'a> Overlay<'a> {
    pub fn new(base: &'a dyn Rows) -> Self {
        Self { base, writes: HashMap::new(), ahead: HashMap::new() }
    }

    /// Reads these together, which is cheaper than one by one, and keeps them until this is called again.
    pub fn read_ahead(&mut self, keys: Vec<Key>) -> Result<(), StoreError> {
        self.ahead.clear();
        let values = self.base.get_many(&keys)?;
        self.ahead.extend(keys.into_iter().zip(values));
        Ok(())
    }

    pub fn get<T: DeserializeOwned>(&self, what: &'static str, key: &Key) -> Result<Option<T>, StoreError> {
        match self.writes.get(key) {
            Some(Write::Put(bytes) | Write::PutOnce(bytes) | Write::ReplaceOnce(bytes)) => {
                codec::decode(what, bytes).map(Some)
            }
            Some(Write::Delete | Write::DeleteOnce) => Ok(None),
            // The range begins there.
            Some(Write::DeleteRange(_)) | None => match self.ahead.get(key) {
                Some(value) => value.as_ref().map(|bytes| codec::decode(what, bytes)).transpose(),
                None => get_row(self.base, what, key),
            },
        }
    }

    pub fn put<T: Serialize>(&mut self, key: Key, value: &T) {
        let before = self.writes.insert(key, Write::Put(codec::encode(value)));
        debug_assert!(
            !matches!(before, Some(Write::PutOnce(_) | Write::ReplaceOnce(_) | Write::DeleteOnce)),
            "two kinds of writes on a key"
        );
    }

    pub fn put_once<T: Serialize>(&mut self, key: Key, value: &T, bytes: usize) {
        let value = codec::encode_sized(value, bytes);
        match self.writes.entry(key) {
            Entry::Vacant(entry) => {
                entry.insert(Write::PutOnce(value));
            }
            Entry::Occupied(mut entry) => {
                assert!(matches!(entry.get(), Write::DeleteOnce), "a row that is written once was there already");
                entry.insert(Write::ReplaceOnce(value));
            }
        }
    }

    pub fn delete(&mut self, key: Key) {
        self.writes.insert(key, Write::Delete);
    }

    pub fn delete_once(&mut self, key: Key) {
        match self.writes.entry(key) {
            Entry::Vacant(entry) => {
                entry.insert(Write::DeleteOnce);
            }
            Entry::Occupied(mut entry) => match entry.get() {
                // Never stored: there is nothing to remove.
                Write::PutOnce(_) => {
                    entry.remove();
                }
                Write::ReplaceOnce(_) => {
                    entry.insert(Write::DeleteOnce);
                }
                _ => panic!("a row that is written once was removed twice"),
            },
        }
    }

    /// Of rows that [`Overlay::put`] wrote. While a log is replayed, many batches are stored with one write, in no order.
    pub fn delete_range(&mut self, from: Key, until: Key) {
        let before = match self.writes.remove(&from) {
            Some(Write::DeleteRange(before)) => before,
            _ => from.clone(),
        };
        self.writes.retain(|key, _| *key < from || *key >= until);
        self.writes.insert(from, Write::DeleteRange(before.max(until)));
    }

    pub fn into_writes(self) -> HashMap<Key, Write> {
        self.writes
    }
}

/// A store in memory, for tests of whatever reads [`Rows`].
#[cfg(test)]
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryRows(pub std::collections::BTreeMap<Key, Vec<u8>>);

#[cfg(test)]
impl Rows for MemoryRows {
    fn get(&self, key: &Key) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.0.get(key).cloned())
    }
}

#[cfg(test)]
impl MemoryRows {
    /// Stores `writes`, and checks what SingleDelete asks for.
    pub fn store(&mut self, writes: HashMap<Key, Write>) {
        for (key, write) in writes {
            match write {
                Write::Put(value) => {
                    self.0.insert(key, value);
                }
                Write::PutOnce(value) => {
                    let before = self.0.insert(key.clone(), value);
                    assert!(before.is_none(), "{key:?} is written once, and was there already");
                }
                Write::Delete => {
                    self.0.remove(&key);
                }
                Write::DeleteOnce => {
                    assert!(self.0.remove(&key).is_some(), "{key:?} is removed once, and was not there");
                }
                Write::ReplaceOnce(value) => {
                    assert!(self.0.insert(key.clone(), value).is_some(), "{key:?} is replaced, and was not there");
                }
                Write::DeleteRange(until) => self.0.retain(|other, _| *other < key || *other >= until),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::{GroupId, ShardId, TaskId};

    #[test]
    fn what_is_written_hides_what_was_read_ahead() {
        let key = |n| Key::cursor(GroupId(1), TaskId::new(0, ShardId(0), n));
        let base = MemoryRows([(key(1), codec::encode(&1u64)), (key(2), codec::encode(&2u64))].into());
        let mut rows = Overlay::new(&base);
        rows.put(key(1), &10u64);
        rows.read_ahead(vec![key(1), key(2), key(3)]).unwrap();
        let get = |rows: &Overlay<'_>, n| rows.get::<u64>("a number", &key(n)).unwrap();
        assert_eq!([1, 2, 3].map(|n| get(&rows, n)), [Some(10), Some(2), None]);
        rows.delete(key(2));
        rows.put(key(3), &30u64);
        assert_eq!([1, 2, 3].map(|n| get(&rows, n)), [Some(10), None, Some(30)]);
        rows.read_ahead(vec![]).unwrap();
        assert_eq!([1, 2, 3].map(|n| get(&rows, n)), [Some(10), None, Some(30)]);
    }
}
