//! Makes log entries of what is asked, and hands out what came of them. Nothing here waits: the simulation of races in
//! `firing` steps it as it is.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use rand::{Rng, rngs::SmallRng};
use tokio::sync::OwnedSemaphorePermit;

use super::{ARM_AHEAD_MS, Answer, Ask, Dispatches, REQUEST_BYTES, Refused};
use crate::clock::Clock;
use crate::shard::{Batch, Cancel, Change, Dedup, Detach, Edit, Pause, Register, Replay, Reply, Request};
use crate::store::Store;
use crate::store::keys::Key;
use crate::store::overlay::get_row;
use crate::store::rows::ShardMetaRow;
use crate::task::{GroupId, InstantMs, Policy, PolicyId, TaskId};

/// Room among the payloads that wait; given back with the answer. Some have no payload.
type Room = Option<OwnedSemaphorePermit>;

/// What is asked, and who waits for the answer.
pub(crate) struct Asked {
    pub ask: Ask,
    pub answer: Answer,
    pub room: Room,
}

/// A log entry and whoever waits for its replies.
pub(crate) struct Entry {
    pub bytes: Bytes,
    /// One per request.
    answers: Vec<Waited>,
    /// Asks that are no requests.
    others: Vec<Answer>,
    /// As far as it arms the shard, once it is applied.
    pub armed_ms: InstantMs,
    group: GroupId,
    /// In which its claims are true.
    term: u64,
}

/// Who waits for the reply to one request.
struct Waited {
    answer: Answer,
    room: Room,
    /// The task that is held back until the reply is known.
    held: Option<TaskId>,
}

impl Entry {
    /// The tasks that are held back until the reply to their request is known: one place for each request.
    pub fn held(&self) -> Vec<Option<TaskId>> {
        self.answers.iter().map(|waited| waited.held).collect()
    }

    /// Hands out what came of it, and releases what it held back. Returns whether it is stored for sure.
    pub fn end(self, result: Result<Vec<Reply>, Refused>, dispatches: &dyn Dispatches) -> bool {
        let Self { answers, others, group, term, .. } = self;
        match result {
            Ok(replies) => {
                assert_eq!(replies.len(), answers.len(), "one reply per request");
                for (Waited { answer, room, held }, reply) in answers.into_iter().zip(replies) {
                    // A task that has ended has been released by then.
                    if let Some(id) = held.filter(|_| reply != Reply::Cancelled) {
                        dispatches.release(group, term, id);
                    }
                    answer(Ok(reply));
                    drop(room);
                }
                for answer in others {
                    answer(Ok(Reply::Stored));
                }
                true
            }
            Err(refused) => {
                for Waited { answer, room, held } in answers {
                    // What may have been stored stays held back: it is applied later, or the term is over.
                    if let Some(id) = held.filter(|_| refused != Refused::Unknown) {
                        dispatches.release(group, term, id);
                    }
                    answer(Err(refused.clone()));
                    drop(room);
                }
                for answer in others {
                    answer(Err(refused.clone()));
                }
                false
            }
        }
    }
}

/// Makes log entries: the only place where the leader's time, ids and knowledge become values.
pub(crate) struct Maker {
    group: GroupId,
    clock: Arc<dyn Clock>,
    dispatches: Arc<dyn Dispatches>,
    term: u64,
    last_stamp: InstantMs,
    /// As far as it is stored.
    pub armed_ms: InstantMs,
    keep_history: bool,
    random: SmallRng,
}

impl Maker {
    /// `keep_history`: occurrences that end leave a row behind. Ids come from `random`.
    pub fn new(
        group: GroupId,
        clock: Arc<dyn Clock>,
        dispatches: Arc<dyn Dispatches>,
        keep_history: bool,
        random: SmallRng,
    ) -> Self {
        Self { group, clock, dispatches, term: 0, last_stamp: 0, armed_ms: 0, keep_history, random }
    }

    /// What was known in an earlier term counts no more; the shard's time goes on from where it stands.
    pub fn begin(&mut self, term: u64, store: &Store) {
        if self.term == term {
            return;
        }
        self.term = term;
        self.armed_ms = 0;
        // A storage error shows itself to `apply` as well, and ends the node there.
        let meta = get_row::<ShardMetaRow>(store, "shard meta", &Key::shard_meta(self.group)).ok().flatten();
        self.last_stamp = self.last_stamp.max(meta.map_or(0, |meta| meta.now_ms));
    }

    fn new_id(&mut self, now_ms: InstantMs) -> TaskId {
        let shard = self.group.shard().expect("tasks go to shards");
        TaskId::new(now_ms, shard, self.random.next_u64())
    }

    /// `None` when nothing has to be written.
    pub fn entry(&mut self, asked: impl IntoIterator<Item = Asked>) -> Option<Entry> {
        let now_ms = self.clock.now_ms().max(self.last_stamp);
        self.last_stamp = now_ms;
        let mut batch = Batch { now_ms, keep_history: self.keep_history, ..Batch::default() };
        let mut policies: BTreeMap<PolicyId, u16> = BTreeMap::new();
        let mut last_policy: Option<(Arc<Policy>, u16)> = None;
        let mut entry = Entry {
            bytes: Bytes::new(),
            answers: Vec::new(),
            others: Vec::new(),
            armed_ms: 0,
            group: self.group,
            term: self.term,
        };
        let mut arm_up_to = 0;
        let mut size = 0;
        for Asked { ask, answer, room } in asked {
            size += ask.payload_bytes() + REQUEST_BYTES;
            let mut held = None;
            let request = match ask {
                Ask::Register { client, policy, due, recurrence, tags, dedup, numbered, payload } => {
                    // Sessions share their policy, so most neighbours have the very same.
                    let position = match &last_policy {
                        Some((last, position)) if Arc::ptr_eq(last, &policy) => *position,
                        _ => *policies.entry(policy.id()).or_insert_with(|| {
                            batch.policies.push((*policy).clone());
                            u16::try_from(batch.policies.len() - 1).expect("no more policies than requests")
                        }),
                    };
                    last_policy = Some((policy, position));
                    let (id, due_ms) = (self.new_id(now_ms), due.at(now_ms));
                    let dedup = dedup.map(|(hash, ttl_ms)| Dedup { hash, expires_ms: now_ms.saturating_add(ttl_ms) });
                    let policy = position;
                    Request::Register(Register {
                        id,
                        client,
                        policy,
                        due_ms,
                        recurrence,
                        tags,
                        dedup,
                        numbered,
                        payload,
                    })
                }
                Ask::Cancel { id, owner } => {
                    let claim = self.dispatches.hold(self.group, self.term, id);
                    held = Some(id);
                    Request::Cancel(Cancel { id, owner, claim })
                }
                Ask::Edit { id, owner, version, due, change } => {
                    let claim = self.dispatches.hold(self.group, self.term, id);
                    held = Some(id);
                    let change = Change { due_ms: due.map(|due| due.at(now_ms)), ..change };
                    Request::Edit(Edit { id, owner, claim, version, change })
                }
                Ask::Pause { id, owner, paused } => {
                    let claim = self.dispatches.hold(self.group, self.term, id);
                    held = Some(id);
                    Request::Pause(Pause { id, owner, paused, claim })
                }
                Ask::Detach { id, occurrence } => {
                    Request::Detach(Detach { id, occurrence, stand_in: self.new_id(now_ms) })
                }
                Ask::Replay { letter, owner } => {
                    Request::Replay(Replay { letter, owner, stand_in: self.new_id(now_ms) })
                }
                Ask::Settle(settle) => Request::Settle(settle),
                Ask::Plain(request) => request,
                Ask::Arm(up_to) => {
                    arm_up_to = arm_up_to.max(up_to);
                    entry.others.push(answer);
                    continue;
                }
            };
            batch.requests.push(request);
            entry.answers.push(Waited { answer, room, held });
        }
        if batch.requests.is_empty() && arm_up_to <= self.armed_ms {
            for answer in entry.others {
                answer(Ok(Reply::Stored));
            }
            return None;
        }
        if self.group.shard().is_some() {
            batch.armed_ms = self.armed_ms.max(now_ms + ARM_AHEAD_MS).max(arm_up_to);
        }
        entry.armed_ms = batch.armed_ms;
        entry.bytes = batch.encode(size);
        Some(entry)
    }
}
