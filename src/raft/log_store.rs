//! Entries and votes of one group in the store's `log` family.
//!
//! `append` leaves the entries to the node's writer, with openraft's callback, so that one write and one fsync serve every
//! group. The entries can be read at once, from memory, and `apply` may even reach them before they are durable here (a
//! majority elsewhere can commit them): that is sound because state and log share one database, the writer never writes
//! what is applied before the entries it comes from, and RocksDB syncs the log before it publishes a flush of the state.
//!
//! The last entries stay in memory when they are on disk as well, since each is read again within milliseconds, by `apply`
//! and for each follower.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::{Arc, MutexGuard};

use futures::Stream;
use openraft::OptionalSend;
use openraft::entry::{EntryPayload, RaftEntry};
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use tokio::sync::watch;

use super::lease::Promise;
use super::types::{LogEntry, LogId, TypeConfig, Vote, VoteRow, decode_entry, encode_entry, log_id, term_of};
use crate::store::keys::Key;
use crate::store::rows::Applied;
use crate::store::writer::Writer;
use crate::store::{LogWrite, Store, StoreError, codec};
use crate::task::GroupId;
use crate::task::locks::Mutex;

/// What stays in memory per group: enough for entries on their way, little against everything else.
const RECENT_BYTES_MAX: usize = 128 * 1024;
/// Entries read from disk at a time.
const CHUNK_ENTRIES: usize = 64;
/// The most one message to a follower carries, well below what a peer accepts; one entry always goes.
pub(super) const REPLICATED_BYTES_MAX: usize = 1024 * 1024;

#[derive(Clone)]
pub struct LogStore {
    group: GroupId,
    store: Store,
    writer: Writer,
    recent: Arc<Mutex<Recent>>,
    /// The index of the last entry; 0 while there is none since the start.
    last: watch::Sender<u64>,
    /// What a vote bears on.
    promise: Promise,
}

/// A run of entries without a gap, the last of the log. Those that may not be on disk are all here.
#[derive(Default)]
struct Recent {
    entries: VecDeque<LogEntry>,
    bytes: usize,
    /// Up to here they are on disk.
    synced: u64,
    /// Up to here all were purged, even if they are still on disk.
    purged: Option<LogId>,
}

fn payload_bytes(entry: &LogEntry) -> usize {
    match &entry.payload {
        EntryPayload::Normal(command) => command.0.len(),
        EntryPayload::Blank | EntryPayload::Membership(_) => 0,
    }
}

impl Recent {
    fn push(&mut self, entry: LogEntry) {
        if self.entries.back().is_some_and(|last| last.index() + 1 != entry.index()) {
            self.clear();
        }
        self.bytes += payload_bytes(&entry);
        self.entries.push_back(entry);
        self.trim();
    }

    /// The entries up to `index` are on disk.
    fn note_synced(&mut self, index: u64) {
        self.synced = self.synced.max(index);
        self.trim();
    }

    fn trim(&mut self) {
        while self.bytes > RECENT_BYTES_MAX
            && self.entries.len() > 1
            && self.entries.front().is_some_and(|first| first.index() <= self.synced)
        {
            self.pop();
        }
    }

    fn pop(&mut self) {
        if let Some(gone) = self.entries.pop_front() {
            self.bytes -= payload_bytes(&gone);
        }
    }

    /// Those up to there are wanted no more.
    fn purge(&mut self, purged: LogId) {
        self.purged = Some(purged);
        while self.entries.front().is_some_and(|first| first.index() <= purged.index) {
            self.pop();
        }
    }

    /// After a truncation, whose entries come again with other contents; or when a snapshot has left a hole before what
    /// comes, and what was before it is wanted no more.
    fn clear(&mut self) {
        *self = Self { purged: self.purged, ..Self::default() };
    }

    /// The entries `from..until`, at most [`CHUNK_ENTRIES`], if the first of them is here.
    fn get(&self, from: u64, until: u64) -> Option<Vec<LogEntry>> {
        let first = self.entries.front()?.index();
        let skip = usize::try_from(from.checked_sub(first)?).ok()?;
        let found: Vec<_> = self
            .entries
            .iter()
            .skip(skip)
            .take(CHUNK_ENTRIES)
            .take_while(|entry| entry.index() < until)
            .cloned()
            .collect();
        (!found.is_empty()).then_some(found)
    }
}

impl LogStore {
    /// Everything that was left to `writer` before has to be [written](Writer::settled).
    pub fn new(group: GroupId, writer: Writer) -> Self {
        let store = writer.store().clone();
        Self { group, store, writer, recent: Arc::default(), last: watch::Sender::new(0), promise: Promise::now() }
    }

    /// What this replica has promised, given the vote that it has stored.
    pub fn promise(&self) -> Result<Promise, StoreError> {
        let vote: Option<VoteRow> = self.read("the vote", &Key::log_vote(self.group))?;
        if let Some(vote) = vote {
            self.promise.voted(Vote::from(vote).leader_id.term);
        }
        Ok(self.promise.clone())
    }

    /// Tells the index of the last entry whenever it changes.
    pub fn last(&self) -> watch::Receiver<u64> {
        self.last.subscribe()
    }

    /// The next entries of `from..until`: a chunk, or all that are left. Empty only when there are none. What was
    /// purged is passed over: the first entry may be a later one than `from`, from there on none is missing.
    fn chunk(&self, from: u64, until: u64) -> Result<Vec<LogEntry>, StoreError> {
        let from = self.recent().purged.map_or(from, |purged| from.max(purged.index + 1));
        if from >= until {
            return Ok(Vec::new());
        }
        loop {
            let first = {
                let recent = self.recent();
                if let Some(entries) = recent.get(from, until) {
                    return Ok(entries);
                }
                recent.entries.front().map(RaftEntry::index)
            };
            let entries = self.stored_chunk(from, until)?;
            if !entries.is_empty() {
                return Ok(entries);
            }
            // All before them were purged, unless some have been written meanwhile and are not kept any more.
            let recent = self.recent();
            let Some(first) = first.filter(|first| (from..until).contains(first)) else { return Ok(Vec::new()) };
            if recent.entries.front().is_some_and(|entry| entry.index() == first) {
                return Ok(recent.get(first, until).unwrap_or_default());
            }
        }
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock()
    }

    /// The same of what is on disk.
    fn stored_chunk(&self, from: u64, until: u64) -> Result<Vec<LogEntry>, StoreError> {
        let until_key = if until == u64::MAX { Key::log_end(self.group) } else { Key::log_entry(self.group, until) };
        let rows = self.store.scan_log(&Key::log_entry(self.group, from), &until_key, CHUNK_ENTRIES)?;
        let mut entries: Vec<LogEntry> = Vec::with_capacity(rows.len());
        for (key, value) in rows {
            let entry = decode_entry(&value)?;
            let damaged = |why| Err(StoreError::damaged("the log", format!("{}: {why}", self.group)));
            if Key::log_entry(self.group, entry.index()).as_ref() != key {
                return damaged(format!("entry {} lies in the place of another", entry.index()));
            }
            if let Some(before) = entries.last().filter(|before| before.index() + 1 != entry.index()) {
                return damaged(format!("entry {} is missing", before.index() + 1));
            }
            entries.push(entry);
        }
        Ok(entries)
    }

    /// The chunk after one that ended before `from`: what is between is missing.
    fn next_chunk(&self, from: u64, until: u64) -> Result<Vec<LogEntry>, StoreError> {
        let chunk = self.chunk(from, until)?;
        match chunk.first() {
            Some(first) if first.index() != from => {
                Err(StoreError::damaged("the log", format!("{}: entry {from} is missing", self.group)))
            }
            _ => Ok(chunk),
        }
    }

    fn read<T: serde::de::DeserializeOwned>(&self, what: &'static str, key: &Key) -> Result<Option<T>, StoreError> {
        self.store.get_log(key)?.map(|bytes| codec::decode(what, &bytes)).transpose()
    }

    pub fn last_purged(&self) -> Result<Option<LogId>, StoreError> {
        if let Some(purged) = self.recent().purged {
            return Ok(Some(purged));
        }
        let row: Option<Applied> = self.read("the purge marker", &Key::log_purged(self.group))?;
        Ok(row.map(|row| log_id(row.term, row.index)))
    }

    /// Makes sure the state up to `index` will still be there after a crash, before its log goes.
    ///
    /// openraft asks to purge only up to the marker, which is durable already, so this does nothing; but the price of
    /// being wrong here would be acknowledged tasks. An index that is not applied at all is a hole that a snapshot
    /// left behind, whose state was durable when it was installed.
    fn make_durable(&self, index: u64) -> Result<(), StoreError> {
        let durable = self.store.durable_applied(self.group)?;
        if durable.is_some_and(|durable| durable.index >= index) {
            return Ok(());
        }
        let bytes = self.store.get_state(&Key::applied(self.group))?;
        let applied: Option<Applied> = bytes.map(|bytes| codec::decode("last applied", &bytes)).transpose()?;
        if applied.is_some_and(|applied| applied.index >= index) {
            self.store.flush_state(true)?;
        }
        Ok(())
    }
}

fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let from = match range.start_bound() {
        Bound::Included(index) => *index,
        Bound::Excluded(index) => index + 1,
        Bound::Unbounded => 0,
    };
    let until = match range.end_bound() {
        Bound::Included(index) => index.saturating_add(1),
        Bound::Excluded(index) => *index,
        Bound::Unbounded => u64::MAX,
    };
    (from, until)
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<LogEntry>, io::Error> {
        let (from, until) = bounds(&range);
        if from >= until {
            return Ok(Vec::new());
        }
        let mut entries = self.chunk(from, until)?;
        while let Some(next) = entries.last().map(|last| last.index() + 1).filter(|next| *next < until) {
            let chunk = self.next_chunk(next, until)?;
            if chunk.is_empty() {
                break;
            }
            entries.extend(chunk);
        }
        Ok(entries)
    }

    /// A chunk at a time: the default would hold the whole range in memory.
    async fn entries_stream<RB>(&mut self, range: RB) -> impl Stream<Item = Result<LogEntry, io::Error>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (from, until) = bounds(&range);
        let chunks = futures::stream::try_unfold((self.clone(), from), move |(log, next)| async move {
            if next >= until {
                return Ok::<_, io::Error>(None);
            }
            let chunk = if next == from { log.chunk(next, until)? } else { log.next_chunk(next, until)? };
            let Some(last) = chunk.last() else { return Ok(None) };
            let next = last.index() + 1;
            Ok(Some((futures::stream::iter(chunk.into_iter().map(Ok)), (log, next))))
        });
        Box::pin(futures::TryStreamExt::try_flatten(chunks))
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<LogEntry>, io::Error> {
        let mut entries = self.chunk(start, end)?;
        let mut bytes = 0;
        let fitting = entries.iter().take_while(|entry| {
            bytes += payload_bytes(entry);
            bytes <= REPLICATED_BYTES_MAX
        });
        let fitting = fitting.count().max(1);
        entries.truncate(fitting);
        Ok(entries)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        let row: Option<VoteRow> = self.read("the vote", &Key::log_vote(self.group))?;
        Ok(row.map(Vote::from))
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        self.writer.settled().await.map_err(io::Error::other)?;
        let last_purged_log_id = self.last_purged()?;
        let last = self.store.last_log(&Key::log_entry(self.group, 0), &Key::log_end(self.group))?;
        let last = last.map(|(_, value)| decode_entry(&value)).transpose()?;
        let last_log_id = last.map(|entry| entry.log_id).or(last_purged_log_id);
        Ok(LogState { last_purged_log_id, last_log_id })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    /// Returns when the vote is durable, and with it every entry appended before.
    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        // First of all: from here on nothing is promised to the leader of an earlier term.
        self.promise.voted(vote.leader_id.term);
        let value = codec::encode(&VoteRow::from(vote));
        let row = LogWrite::Put(Key::log_vote(self.group), value);
        self.writer.write_log(vec![row]).await.map_err(io::Error::other)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = LogEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<LogEntry> = entries.into_iter().collect();
        let rows =
            entries.iter().map(|entry| LogWrite::Put(Key::log_entry(self.group, entry.index()), encode_entry(entry)));
        let rows = rows.collect();
        let last = {
            let mut recent = self.recent();
            for entry in entries {
                recent.push(entry);
            }
            recent.entries.back().map(RaftEntry::index)
        };
        if let Some(last) = last {
            self.last.send_replace(last);
        }
        let recent = self.recent.clone();
        self.writer.append(rows, move |result| {
            if let (Ok(()), Some(last)) = (&result, last) {
                recent.lock().note_synced(last);
            }
            callback.io_completed(result.map_err(io::Error::other));
        });
        Ok(())
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        let from = last_log_id.map_or(0, |id| id.index + 1);
        let range = LogWrite::DeleteRange(Key::log_entry(self.group, from), Key::log_end(self.group));
        self.writer.write_log(vec![range]).await.map_err(io::Error::other)?;
        // Afterwards: what was appended before has been called synced by then, and nothing says so of what comes now.
        self.recent().clear();
        self.last.send_replace(from.saturating_sub(1));
        Ok(())
    }

    async fn purge(&mut self, purged: LogId) -> Result<(), io::Error> {
        // The marker never goes back: what lies between would be a hole.
        if self.last_purged()?.is_some_and(|before| before >= purged) {
            return Ok(());
        }
        self.make_durable(purged.index)?;
        let marker = codec::encode(&Applied { term: term_of(&purged), index: purged.index });
        let range = LogWrite::DeleteRange(Key::log_entry(self.group, 0), Key::log_entry(self.group, purged.index + 1));
        // One batch: after a crash both are there or neither.
        let marker = LogWrite::Put(Key::log_purged(self.group), marker);
        // Not waited for: openraft would append nothing meanwhile. If a crash forgets it, it is purged once more; if it
        // cannot be written, the next entry cannot either.
        self.writer.append(vec![marker, range], |_| {});
        self.recent().purge(purged);
        Ok(())
    }
}
