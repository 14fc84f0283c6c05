//! Whether two replicas hold the same: a digest of what a group holds.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvError;
use std::thread::JoinHandle;

use data_encoding::HEXLOWER;
use sha2::{Digest as _, Sha256};

use crate::store::engine::Family;
use crate::store::keys::Key;
use crate::store::rows::Applied;
use crate::store::{Store, StoreError, codec};
use crate::task::GroupId;
use crate::task::locks::Mutex;

/// What a group holds, in short. Two replicas that have applied the same entries have equal digests, whatever they
/// have flushed, replayed or taken in as a snapshot on the way.
///
/// `last applied` stands apart from the rest: an election moves it and changes nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Digest {
    pub applied: Option<Applied>,
    pub rows: u64,
    /// Of every key and value but that of `last applied`.
    pub hash: [u8; 32],
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let index = self.applied.map_or_else(|| "none".into(), |applied| applied.index.to_string());
        write!(f, "{} rows, applied {index}, {}", self.rows, HEXLOWER.encode(&self.hash[..8]))
    }
}

/// The threads that compute digests. They hold the database, so that whoever is about to end the process waits for their end.
#[derive(Default)]
pub struct DigestThreads {
    threads: Mutex<Vec<JoinHandle<()>>>,
    stopped: Arc<AtomicBool>,
}

impl DigestThreads {
    /// The digest of `group` as it is when this is called, computed on a thread of its own, where `done` is called; never,
    /// once these were stopped.
    pub fn digest(&self, store: Store, group: GroupId, done: impl FnOnce(Result<Digest, StoreError>) + Send + 'static) {
        let (pinned_out, pinned) = std::sync::mpsc::channel();
        let stopped = self.stopped.clone();
        let read = move || {
            let digest = digest_while(&store, group, || drop(pinned_out), || !stopped.load(Ordering::Relaxed));
            if let Some(digest) = digest.transpose() {
                done(digest);
            }
        };
        let mut threads = self.threads.lock();
        threads.retain(|thread| !thread.is_finished());
        match std::thread::Builder::new().name(format!("digest-{group}")).spawn(read) {
            Ok(thread) => {
                threads.push(thread);
                // It takes microseconds until the channel is closed.
                let _: Result<(), RecvError> = pinned.recv();
            }
            Err(error) => tracing::error!(%error, "cannot start a thread for a digest"),
        }
    }

    /// Ends what is being computed, and waits for it.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "computing a digest does not panic");
        }
    }
}

impl Drop for DigestThreads {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The digest of `group` as of one moment, even while entries are applied.
pub fn digest(store: &Store, group: GroupId) -> Result<Digest, StoreError> {
    Ok(digest_while(store, group, || (), || true)?.expect("it was not stopped"))
}

/// `None` when `wanted` was false before the end.
fn digest_while(
    store: &Store,
    group: GroupId,
    pinned: impl FnOnce(),
    wanted: impl Fn() -> bool,
) -> Result<Option<Digest>, StoreError> {
    let (from, until) = Key::group_range(group);
    let mut digester = Digester::of(group);
    let mut rows = store.pin(Family::State, &from, Some(&until));
    pinned();
    while let Some((key, value)) = rows.next()? {
        if !wanted() {
            return Ok(None);
        }
        digester.add(key, value)?;
    }
    Ok(Some(digester.finish()))
}

/// Takes the rows of a group, in the order of their keys.
pub(super) struct Digester {
    applied_key: Key,
    digest: Digest,
    hash: Sha256,
}

impl Digester {
    pub fn of(group: GroupId) -> Self {
        let digest = Digest { applied: None, rows: 0, hash: [0; 32] };
        Self { applied_key: Key::applied(group), digest, hash: Sha256::new() }
    }

    pub fn add(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        if key == self.applied_key.as_ref() {
            self.digest.applied = Some(codec::decode("last applied", value)?);
            return Ok(());
        }
        self.digest.rows += 1;
        // Lengths first, so that no byte can move from a key to its value unseen.
        for part in [key, value] {
            self.hash.update((part.len() as u64).to_be_bytes());
            self.hash.update(part);
        }
        Ok(())
    }

    pub fn finish(mut self) -> Digest {
        self.digest.hash = self.hash.finalize().into();
        self.digest
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{GROUP, fill, id, put};
    use super::*;
    use crate::store::rows::{ShardMetaRow, TimelineRow};

    #[test]
    fn a_digest_sees_every_byte_of_its_group_and_no_other() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::open(temp.path()).unwrap();
        fill(&store);
        let before = digest(&store, GROUP).unwrap();
        assert_eq!(before.applied, Some(Applied { term: 1, index: 3 }));
        put(&store, Key::shard_meta(GroupId(2)), &ShardMetaRow::default());
        put(&store, Key::client("other"), &7u8);
        assert_eq!(digest(&store, GROUP).unwrap(), before);
        put(&store, Key::applied(GROUP), &Applied { term: 2, index: 4 });
        assert_eq!(digest(&store, GROUP).unwrap().hash, before.hash, "an election changes no row");
        put(&store, Key::timeline(GROUP, 5, id()), &TimelineRow { occurrence: 1, attempt: 3, recurring: false });
        assert_ne!(digest(&store, GROUP).unwrap().hash, before.hash);
    }

    #[test]
    fn digests_that_are_stopped_leave_nobody_with_the_database() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::open(temp.path()).unwrap();
        fill(&store);
        let (done, found) = std::sync::mpsc::channel();
        let threads = DigestThreads::default();
        let again = done.clone();
        threads.digest(store.clone(), GROUP, move |found| again.send(found.unwrap()).unwrap());
        assert_eq!(found.recv().unwrap(), digest(&store, GROUP).unwrap());
        threads.stop();
        threads.digest(store.clone(), GROUP, move |found| done.send(found.unwrap()).unwrap());
        drop((threads, store));
        assert!(found.recv().is_err(), "after the end there is no answer");
        Store::open(temp.path()).expect("nobody else has it open");
    }
}
