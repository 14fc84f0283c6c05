//! Entries of one group from a seed, and the state they must lead to.
//!
//! The state is computed by the same `apply`, but over a map in memory: what is judged here is whether the store keeps
//! it, not whether `apply` is right.

use std::collections::{BTreeMap, BTreeSet};

use openraft::entry::{Entry, EntryPayload};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::inspect::rows::Line;
use crate::raft::types::{Command, LogEntry, Member, Membership, log_id};
use crate::shard::{self, Batch, Cancel, Claim, Register, Request, Settle};
use crate::store::codec;
use crate::store::engine::Family;
use crate::store::keys::Key;
use crate::store::overlay::{MemoryRows, Overlay};
use crate::store::rows::{Applied, ShardMetaRow};
use crate::store::{Row, Store};
use crate::task::{
    Backoff, Callback, ClientId, Failure, FailureClass, GroupId, Outcome, Policy, Protocol, Recurrence, Retry, Tags,
    TaskId,
};

pub const TERM: u64 = 1;

pub struct World {
    pub group: GroupId,
    rng: StdRng,
    rows: MemoryRows,
    meta: ShardMetaRow,
    live: Vec<TaskId>,
    /// Of the next entry.
    pub next: u64,
}

impl World {
    pub fn new(seed: u64, group: GroupId) -> Self {
        let rng = StdRng::seed_from_u64(seed ^ u64::from(group.0) << 48);
        Self { group, rng, rows: MemoryRows::default(), meta: ShardMetaRow::default(), live: Vec::new(), next: 0 }
    }

    /// A world that has made the entries before `next`.
    pub fn at(seed: u64, group: GroupId, next: u64) -> Self {
        let mut world = Self::new(seed, group);
        world.take(next);
        world
    }

    pub fn take(&mut self, count: u64) -> Vec<LogEntry> {
        (0..count).map(|_| self.entry()).collect()
    }

    /// The next entry; from now on the state is the one after it.
    pub fn entry(&mut self) -> LogEntry {
        let index = self.next;
        self.next += 1;
        let payload = if index == 0 {
            EntryPayload::Membership(membership())
        } else if self.rng.random_ratio(1, 16) {
            EntryPayload::Blank
        } else {
            let batch = self.batch();
            EntryPayload::Normal(Command(batch.encode(64)))
        };
        Entry { log_id: log_id(TERM, index), payload }
    }

    /// A batch of requests as a leader would make it: what it settles and cancels, older batches have registered.
    pub fn batch(&mut self) -> Batch {
        let rng = &mut self.rng;
        let now_ms = self.meta.now_ms.max(1_700_000_000_000) + rng.random_range(0..50);
        let policies = vec![policy(1), policy(2)];
        let mut batch = Batch { now_ms, armed_ms: now_ms + 20, keep_history: true, policies, requests: Vec::new() };
        for _ in 0..rng.random_range(1..8) {
            let known = (!self.live.is_empty()).then(|| self.live[rng.random_range(0..self.live.len())]);
            let request = match (rng.random_range(0..10), known) {
                (0..=1, Some(id)) => Request::Cancel(Cancel { id, owner: None, claim: Claim::NotDispatched }),
                (2..=5, Some(id)) => {
                    let at = shard::read_task(&self.rows, self.group, id).unwrap().expect("live tasks are there").1;
                    let failed = rng.random_ratio(1, 2);
                    let outcome = if failed {
                        Outcome::Failed(Failure::new(FailureClass::Refused, "refused"))
                    } else {
                        Outcome::Acknowledged
                    };
                    let (occurrence, attempt) = (at.occurrence, at.attempt);
                    Request::Settle(Settle { id, occurrence, attempt, outcome, dispatched_ms: now_ms })
                }
                _ => {
                    let shard = self.group.shard().expect("a group with tasks");
                    let payload: Vec<u8> = (0..rng.random_range(0..200)).map(|_| rng.random()).collect();
                    Request::Register(Register {
                        id: TaskId::new(now_ms, shard, rng.random()),
                        client: client(),
                        policy: rng.random_range(0..2),
                        due_ms: now_ms + rng.random_range(0..60_000),
                        recurrence: rng.random_ratio(1, 4).then(|| Recurrence::every(rng.random_range(10..1_000))),
                        tags: rng.random_ratio(1, 4).then(|| Tags::new("name", []).expect("a good name")),
                        dedup: None,
                        numbered: None,
                        payload: payload.into(),
                    })
                }
            };
            batch.requests.push(request);
        }
        let mut overlay = Overlay::new(&self.rows);
        shard::apply(self.group, &mut overlay, &mut self.meta, batch.clone()).expect("a map does not fail");
        let writes = overlay.into_writes();
        self.rows.store(writes);
        self.live.extend(batch.requests.iter().filter_map(|request| match request {
            Request::Register(register) => Some(register.id),
            _ => None,
        }));
        self.live.retain(|id| self.rows.0.contains_key(&Key::task(self.group, *id)));
        batch
    }

    /// Every row of the group but its membership.
    fn expected(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let mut rows: BTreeMap<_, _> =
            self.rows.0.iter().map(|(key, value)| (key.as_ref().to_vec(), value.clone())).collect();
        if let Some(index) = self.next.checked_sub(1) {
            let applied = codec::encode(&Applied { term: TERM, index });
            rows.insert(Key::applied(self.group).into_bytes(), applied);
            rows.insert(Key::shard_meta(self.group).into_bytes(), codec::encode(&self.meta));
        }
        rows
    }

    /// Panics unless `found` are exactly the rows of this state.
    pub fn assert_rows(&self, found: impl IntoIterator<Item = Row>) {
        let mut expected = self.expected();
        let membership = Key::membership(self.group).into_bytes();
        let mut member = false;
        for (key, value) in found {
            if key == membership {
                member = true;
                continue;
            }
            let shown = Line::of(Family::State, &key, &value);
            match expected.remove(&key) {
                Some(wanted) if wanted == value => {}
                Some(wanted) => panic!("entry {}: {shown}, not {}", self.next, Line::of(Family::State, &key, &wanted)),
                None => panic!("entry {}: {shown} should not be there", self.next),
            }
        }
        assert_eq!(member, self.next > 0, "the membership goes with the rest");
        if let Some((key, value)) = expected.first_key_value() {
            let more = expected.len() - 1;
            let missing = Line::of(Family::State, key.as_ref(), value);
            panic!("entry {}: {missing} is missing, and {more} rows more", self.next);
        }
    }

    /// Whether the tasks are those of this state, whatever openraft has added to the log in between.
    pub fn holds(&self, store: &Store) -> bool {
        let bookkeeping = [Key::applied(self.group), Key::membership(self.group)].map(Key::into_bytes);
        let found = rows_of(store, self.group).into_iter().filter(|(key, _)| !bookkeeping.contains(key));
        let mut expected: BTreeMap<_, _> =
            self.rows.0.iter().map(|(key, value)| (key.as_ref().to_vec(), value.clone())).collect();
        expected.insert(Key::shard_meta(self.group).into_bytes(), codec::encode(&self.meta));
        found.eq(expected)
    }

    pub fn assert_stored(&self, store: &Store) {
        self.assert_rows(rows_of(store, self.group));
    }
}

pub fn rows_of(store: &Store, group: GroupId) -> Vec<Row> {
    let (from, until) = Key::group_range(group);
    store.scan_state(&from, &until, usize::MAX).unwrap()
}

pub fn membership() -> Membership {
    Membership::new(vec![BTreeSet::from([1])], BTreeMap::from([(1, Member { node_id: 1 })])).unwrap()
}

fn client() -> ClientId {
    "orders".parse().unwrap()
}

fn policy(attempts_max: u32) -> Policy {
    let callback = Callback::new(Protocol::Tcp, "h:1").unwrap();
    let retry =
        Retry { attempts_max, backoff: Backoff::Fixed, interval_ms: 100, interval_max_ms: 100, jitter_percent: 0 };
    Policy { callback, retry, dead_letter: None }
}
