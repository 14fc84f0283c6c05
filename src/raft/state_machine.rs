//! From committed entries to the state on disk: the shell around [`crate::shard::apply`].
//!
//! The order is what counts. All entries openraft hands over in one go become one batch in the store, together with
//! `last applied`; then the [`Observer`] hears of the effects; then the replies go out. So whoever has an answer can rely
//! on everything that follows from it: a client that cancels right after registering meets a scheduled task.
//!
//! A snapshot, for Raft's purposes, is only a number: the index up to which the state is durable (see `groups`). Bytes
//! are read when a replica needs them.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::{Stream, TryStreamExt};
use openraft::OptionalSend;
use openraft::entry::EntryPayload;
use openraft::storage::{ApplyResponder, EntryResponder, RaftSnapshotBuilder, RaftStateMachine, Snapshot};
use serde::{Deserialize, Serialize};
use tokio::sync::OwnedMutexGuard;

use super::types::{
    LogId, Membership, MembershipRow, Replies, SnapshotMeta, StoredMembership, TypeConfig, log_id, term_of,
};
use crate::sabotage::Fault;
use crate::shard::{self, Batch, Effect};
use crate::store::export::{Export, Staging, export};
use crate::store::keys::Key;
use crate::store::overlay::{Overlay, Write, get_row};
use crate::store::rows::{Applied, ShardMetaRow};
use crate::store::writer::Writer;
use crate::store::{Store, StoreError, codec};
use crate::task::GroupId;

/// While catching up, this many requests are gathered into one write.
const REQUESTS_PER_WRITE: usize = 8192;

/// Hears what was applied on this node, once it is stored and before it is answered. Called in the order of the log;
/// must not block.
pub trait Observer: Send + Sync + 'static {
    fn applied(&self, group: GroupId, meta: &ShardMetaRow, effects: &[Effect]);

    /// The whole state came from another replica: what has happened in between nobody was told.
    fn replaced(&self, _group: GroupId) {}
}

/// All of them hear it, one after the other.
impl Observer for Vec<Arc<dyn Observer>> {
    fn applied(&self, group: GroupId, meta: &ShardMetaRow, effects: &[Effect]) {
        self.iter().for_each(|observer| observer.applied(group, meta, effects));
    }

    fn replaced(&self, group: GroupId) {
        self.iter().for_each(|observer| observer.replaced(group));
    }
}

/// The rows of a shard on their way to another replica.
pub enum SnapshotData {
    /// Read from here, at one moment.
    Outgoing(Export),
    /// Received, in files.
    Staged(crate::store::export::Staged),
    /// Only the number was asked for.
    Marker,
}

/// The right to write the state of a group. One state machine at a time holds it: what openraft leaves behind of a group
/// that has panicked may still be applying, and two that apply would each count the same tasks.
pub struct StateLease {
    _taken: OwnedMutexGuard<()>,
    panicked: Arc<AtomicBool>,
}

impl StateLease {
    /// `panicked` is set when the lease is left by a panic.
    pub fn new(taken: OwnedMutexGuard<()>, panicked: Arc<AtomicBool>) -> Self {
        Self { _taken: taken, panicked }
    }
}

impl Drop for StateLease {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.panicked.store(true, Ordering::Release);
        }
    }
}

type ShardSnapshot = openraft::alias::SnapshotOf<TypeConfig, SnapshotData>;

pub struct StateMachine {
    group: GroupId,
    store: Store,
    writer: Writer,
    staging: PathBuf,
    observer: Arc<dyn Observer>,
    applied: Option<LogId>,
    membership: StoredMembership,
    meta: ShardMetaRow,
    /// The last of the batch before; see [`Fault::AppliedApart`].
    stored: Option<LogId>,
    /// Kept, and never looked at.
    _lease: Option<StateLease>,
    /// openraft's conformance suite leaves out entries; nothing else may.
    #[cfg(test)]
    pub gaps_allowed: bool,
}

/// The membership a shard has applied, as it is stored.
#[derive(Serialize, Deserialize)]
struct AppliedMembershipRow {
    log_id: Option<Applied>,
    membership: MembershipRow,
}

impl From<LogId> for Applied {
    fn from(id: LogId) -> Self {
        Applied { term: term_of(&id), index: id.index }
    }
}

impl From<Applied> for LogId {
    fn from(row: Applied) -> Self {
        log_id(row.term, row.index)
    }
}

/// Reads the row under [`Key::membership`].
pub fn decode_membership(bytes: &[u8]) -> Result<StoredMembership, StoreError> {
    let row: AppliedMembershipRow = codec::decode("a membership", bytes)?;
    Ok(StoredMembership::new(row.log_id.map(LogId::from), row.membership.into_membership()?))
}

impl StateMachine {
    pub fn open(
        group: GroupId,
        writer: Writer,
        staging: PathBuf,
        observer: Arc<dyn Observer>,
    ) -> Result<Self, StoreError> {
        let mut machine = Self {
            group,
            store: writer.store().clone(),
            writer,
            staging,
            observer,
            applied: None,
            membership: StoredMembership::default(),
            meta: ShardMetaRow::default(),
            stored: None,
            _lease: None,
            #[cfg(test)]
            gaps_allowed: false,
        };
        machine.load()?;
        Ok(machine)
    }

    /// For whoever applies: the lease was taken before this was opened.
    pub fn with_lease(mut self, lease: StateLease) -> Self {
        self._lease = Some(lease);
        self
    }

    pub fn applied(&self) -> Option<LogId> {
        self.applied
    }

    /// Takes over what the store says.
    fn load(&mut self) -> Result<(), StoreError> {
        let applied: Option<Applied> = get_row(&self.store, "last applied", &Key::applied(self.group))?;
        self.applied = applied.map(LogId::from);
        self.membership = match self.store.get_state(&Key::membership(self.group))? {
            Some(bytes) => decode_membership(&bytes)?,
            None => StoredMembership::default(),
        };
        self.meta = get_row(&self.store, "shard meta", &Key::shard_meta(self.group))?.unwrap_or_default();
        Ok(())
    }

    async fn snapshot(&self) -> Result<Option<ShardSnapshot>, StoreError> {
        let head = vec![Key::applied(self.group), Key::membership(self.group)];
        let export = export(self.store.clone(), self.group, head).await?;
        // Read from the pinned moment, not from `self`: entries may be applied while the rows are on their way.
        let [Some(applied), membership] = &export.head[..] else { return Ok(None) };
        let applied: Applied = codec::decode("last applied", applied)?;
        let last_membership = match membership {
            Some(bytes) => decode_membership(bytes)?,
            None => StoredMembership::default(),
        };
        let meta = SnapshotMeta { last_log_id: Some(applied.into()), last_membership };
        Ok(Some(Snapshot { meta, snapshot: SnapshotData::Outgoing(export) }))
    }

    async fn stage(&self, mut export: Export) -> Result<crate::store::export::Staged, StoreError> {
        let mut staging = Staging::begin(&self.store, self.group, self.staging.join(format!("{}-own", self.group)))?;
        while let Some(chunk) = export.chunks.recv().await {
            staging.add(&chunk?)?;
        }
        staging.finish()
    }
}

/// What has been applied but not stored yet.
struct Pending<'a> {
    rows: Overlay<'a>,
    effects: Vec<Effect>,
    answers: Vec<(ApplyResponder<TypeConfig>, Replies)>,
    requests: usize,
    /// The entry that holds a membership, if there was one.
    membership: Option<(LogId, Membership)>,
    last: Option<LogId>,
}

impl<'a> Pending<'a> {
    fn new(store: &'a Store) -> Self {
        Self {
            rows: Overlay::new(store),
            effects: Vec::new(),
            answers: Vec::new(),
            requests: 0,
            membership: None,
            last: None,
        }
    }
}

impl StateMachine {
    fn apply_entry<'a>(
        &mut self,
        pending: &mut Pending<'a>,
        (entry, responder): EntryResponder<TypeConfig>,
    ) -> Result<(), StoreError> {
        let follows = self.applied.is_none_or(|applied| applied.index + 1 == entry.log_id.index);
        #[cfg(test)]
        let follows = follows || self.gaps_allowed;
        assert!(follows, "entries are applied one after the other: {} after {:?}", entry.log_id, self.applied);
        self.applied = Some(entry.log_id);
        pending.last = Some(entry.log_id);
        let replies = match entry.payload {
            EntryPayload::Blank => Vec::new(),
            EntryPayload::Normal(command) => {
                let batch = Batch::decode(&command.0)?;
                pending.requests += batch.requests.len();
                let applied = shard::apply(self.group, &mut pending.rows, &mut self.meta, batch)?;
                pending.effects.extend(applied.effects);
                applied.replies
            }
            EntryPayload::Membership(membership) => {
                pending.membership = Some((entry.log_id, membership));
                Vec::new()
            }
        };
        if let Some(responder) = responder {
            pending.answers.push((responder, Replies(replies)));
        }
        Ok(())
    }

    /// One batch for everything in `pending`, then the effects, then the answers.
    async fn store(&mut self, pending: Pending<'_>) -> Result<(), io::Error> {
        let Some(last) = pending.last else { return Ok(()) };
        let applied = if Fault::AppliedApart.is_on() { self.stored.replace(last) } else { Some(last) };
        if Fault::ApplyDiffers.is_on() {
            let here = self.staging.as_os_str().as_encoded_bytes();
            self.meta.missed += here.iter().map(|byte| u64::from(*byte)).sum::<u64>();
        }
        let mut writes = pending.rows.into_writes();
        let mut put = |key, value| writes.insert(key, Write::Put(value));
        if let Some(applied) = applied {
            put(Key::applied(self.group), codec::encode(&Applied::from(applied)));
        }
        put(Key::shard_meta(self.group), codec::encode(&self.meta));
        if let Some((log_id, membership)) = pending.membership {
            let row = AppliedMembershipRow { log_id: Some(log_id.into()), membership: (&membership).into() };
            put(Key::membership(self.group), codec::encode(&row));
            self.membership = StoredMembership::new(Some(log_id), membership);
        }
        self.writer.write_state(writes).await.map_err(io::Error::other)?;
        self.observer.applied(self.group, &self.meta, &pending.effects);
        for (responder, replies) in pending.answers {
            responder.send(replies);
        }
        Ok(())
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let store = self.store.clone();
        let mut pending = Pending::new(&store);
        while let Some(entry) = entries.try_next().await? {
            let before = pending.effects.len();
            self.apply_entry(&mut pending, entry)?;
            // What is marked is the state after this very entry, the same on every replica.
            let marked = pending.effects[before..].iter().any(|effect| matches!(effect, Effect::Marked { .. }));
            if marked || pending.requests >= REQUESTS_PER_WRITE {
                self.store(std::mem::replace(&mut pending, Pending::new(&store))).await?;
            }
        }
        self.store(pending).await?;
        Ok(())
    }

    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<SnapshotBuilder> {
        Some(SnapshotBuilder { group: self.group, writer: self.writer.clone(), staging: self.staging.clone(), force })
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        self.try_create_snapshot_builder(true).await.expect("there always is one")
    }

    /// The files are there already; what happens here is one short atomic step.
    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: SnapshotData) -> Result<(), io::Error> {
        let staged = match snapshot {
            SnapshotData::Staged(staged) => staged,
            SnapshotData::Outgoing(export) => self.stage(export).await?,
            SnapshotData::Marker => return Err(io::Error::other("a marker holds no rows to install")),
        };
        // Before anything is lost. An empty group has no rows, and so none that says what was applied.
        let holds = staged.applied().map(LogId::from);
        if holds != meta.last_log_id {
            let why = format!("it says it holds {:?} and holds {holds:?}", meta.last_log_id);
            return Err(StoreError::damaged("a snapshot", why).into());
        }
        staged.ingest()?;
        self.load()?;
        self.observer.replaced(self.group);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<ShardSnapshot>, io::Error> {
        Ok(self.snapshot().await?)
    }
}

/// Tells openraft up to where the state is durable, which is what lets it purge the log.
pub struct SnapshotBuilder {
    group: GroupId,
    writer: Writer,
    staging: PathBuf,
    /// Make everything applied durable first, and bring the rows.
    force: bool,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> Result<ShardSnapshot, io::Error> {
        if self.force {
            self.writer.store().flush_state(true)?;
        }
        let durable = self.writer.store().durable_applied(self.group)?;
        let machine = StateMachine::open(self.group, self.writer.clone(), self.staging.clone(), Arc::new(Deaf))?;
        // Of nothing, as long as nothing has been applied.
        let empty = || Snapshot { meta: SnapshotMeta::default(), snapshot: SnapshotData::Marker };
        if self.force {
            return Ok(machine.snapshot().await?.unwrap_or_else(empty));
        }
        // Whoever asks has seen that something is; but an error here would end the node.
        let Some(durable) = durable else { return Ok(empty()) };
        // The membership may be a little newer than the marker: openraft takes it only as a hint, as the log above the
        // marker, where it comes from, is still there.
        let meta = SnapshotMeta { last_log_id: Some(durable.into()), last_membership: machine.membership };
        Ok(Snapshot { meta, snapshot: SnapshotData::Marker })
    }
}

/// Nobody listens.
struct Deaf;

impl Observer for Deaf {
    fn applied(&self, _: GroupId, _: &ShardMetaRow, _: &[Effect]) {}
}
