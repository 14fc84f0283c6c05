//! The state machine by scripts: commands and their time in; replies, effects and state out. The scripts are the files
//! of `src/shard/scripts`; how to read them is told in [`script`]. After each batch the whole state is validated.
//!
//! Where a line cannot say it, because it takes many requests, random ones, or rows made by hand, it is a test in Rust.

mod script;

use std::collections::{BTreeMap, BTreeSet};

use boomerang_testkit::seed;
use rand::{RngExt, rngs::StdRng, seq::IndexedRandom};

use super::*;
use crate::store::codec;
use crate::store::keys::{Parsed, parse_state};
use crate::store::overlay::MemoryRows;
use crate::store::rows::{CopyState, DeadLetterRow, DedupRow, NEVER, SenderRow, StandInsRow};
use crate::task::{
    Backoff, Callback, ClientLimits, DeadLetterId, DedupHash, Failure, FailureClass, Missed, Outcome, Policy, Protocol,
    Recurrence, Retry, ShardId, Tags,
};

const GROUP: GroupId = GroupId(1);

#[derive(Clone, Default, PartialEq, Debug)]
struct World {
    rows: MemoryRows,
    meta: ShardMetaRow,
}

impl World {
    /// Applies `batches` with one write, as the state machine does while it catches up, and looks at all of the state.
    fn apply(&mut self, batches: Vec<Batch>) -> Vec<Applied> {
        let applied = self.apply_unseen(batches);
        self.validate();
        applied
    }

    fn apply_unseen(&mut self, batches: Vec<Batch>) -> Vec<Applied> {
        let mut overlay = Overlay::new(&self.rows);
        let mut meta = self.meta;
        let batches = batches.into_iter().map(|batch| Batch::decode(&batch.encode(0)).expect("what we encode"));
        let applied =
            batches.map(|batch| apply(GROUP, &mut overlay, &mut meta, batch).expect("rows are whole")).collect();
        let writes = overlay.into_writes();
        self.rows.store(writes);
        self.meta = meta;
        applied
    }

    /// Whether a leader may have found it due: what has ended or was paused meanwhile may have been.
    fn may_be_due(&self, id: TaskId) -> bool {
        let standing = read_task(&self.rows, GROUP, id).unwrap();
        standing.is_none_or(|(_, at)| at.is_paused() || at.due_ms <= self.meta.now_ms)
    }

    /// Nothing else is left behind, the policy neither.
    fn leaves_only_history(&self, rows: usize) {
        let kinds: Vec<Parsed> = self.rows.0.keys().map(|key| parse_state(key.as_ref()).unwrap().1).collect();
        assert!(kinds.iter().all(|kind| matches!(kind, Parsed::History(..))), "{kinds:?}");
        assert_eq!(kinds.len(), rows, "{kinds:?}");
    }

    /// What became of a task's occurrences: `0 acknowledged, 1-3 skipped`.
    fn history(&self, task: TaskId) -> String {
        let of = self.rows.0.keys().filter_map(|key| match parse_state(key.as_ref()).unwrap().1 {
            Parsed::History(id, occurrence, _) if id == task => {
                let HistoryRow { ended, count, .. } = self.get(key).unwrap();
                let last = if count > 1 { format!("-{}", occurrence + count - 1) } else { String::new() };
                Some(format!("{occurrence}{last} {ended:?}").to_lowercase())
            }
            _ => None,
        });
        of.collect::<Vec<_>>().join(", ")
    }

    fn get<T: serde::de::DeserializeOwned>(&self, key: &Key) -> Option<T> {
        self.rows.0.get(key).map(|bytes| codec::decode("a row", bytes).expect("what we encoded"))
    }

    /// All that must hold between the rows.
    fn validate(&self) {
        let mut tasks = 0;
        let mut timeline = 0;
        let (mut dead, mut of_clients) = (0, 0);
        let (mut tags, mut by_client, mut by_tag) = (0, 0, 0);
        let (mut dedups, mut dedup_ends) = (BTreeSet::new(), BTreeSet::new());
        let mut uses: BTreeMap<PolicyId, u64> = BTreeMap::new();
        for key in self.rows.0.keys() {
            match parse_state(key.as_ref()).expect("one of ours").1 {
                Parsed::Task(id) => {
                    tasks += 1;
                    let (task, cursor) = read_task(&self.rows, GROUP, id).unwrap().unwrap();
                    *uses.entry(task.policy).or_default() += 1;
                    let row: TimelineRow = self.get(&Key::timeline(GROUP, cursor.due_ms, id)).expect("it is scheduled");
                    let timeline = (row.occurrence, row.attempt, row.recurring);
                    let expected = (cursor.occurrence, cursor.attempt, task.recurrence.is_some());
                    assert_eq!(timeline, expected, "the timeline says of {id} what its cursor and its task say");
                    let mine = Key::by_client(GROUP, client_hash(&task.client), cursor.due_ms, id);
                    assert_eq!(self.get::<TimelineRow>(&mine), Some(row), "its client's timeline says the same");
                    for key in tag_keys(GROUP, id, &task) {
                        assert!(self.rows.0.contains_key(&key), "no index by tag names {id}: {task:?}");
                        tags += 1;
                    }
                    let due_ms = occurrence_due(&task, cursor.occurrence);
                    assert!(cursor.due_ms >= due_ms, "{id} is due at {due_ms}, and stands early: {cursor:?}");
                    if let Role::StandIn { due_ms, .. } = task.role {
                        assert!(task.first_due_ms >= due_ms, "a stand-in for {due_ms} is due early: {task:?}");
                    }
                }
                Parsed::ByClient(..) => by_client += 1,
                Parsed::ByTag(_) => by_tag += 1,
                Parsed::StandIns(of) => {
                    let StandInsRow(ids) = self.get(key).unwrap();
                    assert!(!ids.is_empty(), "a list of no stand-ins is left behind for {of}");
                    for id in ids {
                        let (task, _) = read_task(&self.rows, GROUP, id).unwrap().expect("a stand-in is a task");
                        let is_of = matches!(task.role, Role::StandIn { task, .. } if task == of);
                        assert!(is_of, "{id} is in the list of stand-ins of {of}: {task:?}");
                    }
                }
                Parsed::Dedup(hash) => {
                    let row: DedupRow = self.get(key).unwrap();
                    dedups.insert((row.expires_ms, hash));
                }
                // It may name one that was registered again since, under its earlier expiry.
                Parsed::DedupEnd(expires_ms, first) => {
                    let hashes: Vec<DedupHash> = self.get(key).unwrap();
                    assert_eq!(hashes[0], first, "a row of keys that expire is called by its first key");
                    dedup_ends.extend(hashes.into_iter().map(|hash| (expires_ms, hash)));
                }
                Parsed::History(..) => {}
                Parsed::Timeline(_, id) => {
                    timeline += 1;
                    assert!(self.rows.0.contains_key(&Key::task(GROUP, id)), "a row of the timeline has a task");
                }
                Parsed::Cursor(id) => {
                    let (task, cursor) = read_task(&self.rows, GROUP, id).unwrap().expect("a cursor has a task");
                    assert_ne!(cursor, first_cursor(&task), "a cursor is there only when it says something");
                }
                Parsed::Policy(id) => {
                    let row: PolicyRow = self.get(key).unwrap();
                    assert_eq!(row.policy.id(), id, "a policy is stored under its hash: {row:?}");
                }
                Parsed::DeadLetter(letter) => {
                    let row: DeadLetterRow = self.get(key).unwrap();
                    let of_client = Key::letter_of_client(GROUP, client_hash(&row.client), letter);
                    assert!(self.rows.0.contains_key(&of_client), "not among its client's dead letters: {row:?}");
                    dead += 1;
                }
                Parsed::LetterOfClient(..) => of_clients += 1,
                Parsed::Sender(_) => {
                    let row: SenderRow = self.get(key).unwrap();
                    let numbers: Vec<u64> = row.stored.iter().map(|one| one.number).collect();
                    let are_open = numbers.first().is_none_or(|first| *first >= row.answered_below);
                    assert!(numbers.is_sorted() && are_open, "numbers in order, none of them answered: {row:?}");
                }
                other => panic!("{other:?} does not belong into a shard"),
            }
        }
        for (id, tasks) in uses {
            let counted = self.get::<PolicyRow>(&Key::policy(GROUP, id)).map(|row| row.tasks);
            assert_eq!(counted, Some(tasks), "how many tasks use policy {id:?}");
        }
        let counted = (self.meta.pending, self.meta.dead_letters);
        assert_eq!(counted, (tasks, dead), "tasks and dead letters, as counted and as stored");
        assert_eq!(of_clients, dead, "each dead letter is among its client's once");
        assert_eq!((timeline, by_client), (tasks, tasks), "each task is scheduled exactly once");
        assert_eq!(by_tag, tags, "no index names what is not there");
        assert!(
            dedups.is_subset(&dedup_ends),
            "each deduplication key is in the index of expiries, or it stays for ever"
        );
    }
}

fn policy(retry: Retry) -> Policy {
    Policy { callback: Callback::new(Protocol::Tcp, "receiver:1").unwrap(), retry, dead_letter: None }
}

/// Three tries, 100 ms apart.
fn three_tries() -> Policy {
    policy(Retry {
        attempts_max: 3,
        backoff: Backoff::Fixed,
        interval_ms: 100,
        interval_max_ms: 100,
        jitter_percent: 0,
    })
}

/// Tasks of a script are named by one letter.
fn id_of(name: &str) -> TaskId {
    TaskId::new(0, ShardId(0), u64::from(name.as_bytes()[0]))
}

fn name_of(id: TaskId) -> char {
    char::from(id.as_bytes()[15])
}

fn owner(name: &str) -> ClientId {
    name.parse().unwrap()
}

fn sender_hash(name: &str) -> DedupHash {
    DedupHash::new(&owner("me"), name).unwrap()
}

fn letter(text: &str) -> DeadLetterId {
    let (name, died_ms) = text.split_once('@').expect("task@instant");
    DeadLetterId { died_ms: died_ms.parse().unwrap(), task: id_of(name) }
}

/// Each script is a test of its own, so that it can be run and recorded alone; none is forgotten.
macro_rules! scripts {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            script::check(stringify!($name));
        })*

        #[test]
        fn every_script_is_a_test() {
            let tests: BTreeSet<String> = [$(stringify!($name)),*].map(str::to_owned).into();
            let odd: Vec<String> = script::names().symmetric_difference(&tests).cloned().collect();
            assert!(odd.is_empty(), "scripts that no test runs, or tests without a script: {odd:?}");
        }
    };
}

scripts! {
    a_task_lives_once
    failures_are_tried_again_and_end_as_a_dead_letter
    a_retry_is_never_due_at_the_same_instant_again
    a_recurring_task_does_not_drift_and_merges_what_it_missed
    a_recurring_task_ends_at_the_end_of_time
    a_recurring_task_ends_by_count_or_instant
    missed_runs_follow_the_policy
    an_occurrence_that_overlaps_goes_its_own_way
    a_cancellation_says_what_may_be_out
    what_was_not_armed_has_not_left
    a_paused_task_waits_and_leaves_out_what_passes
    a_paused_task_remembers_that_an_attempt_may_be_out
    an_edit_changes_what_is_not_out
    an_edit_that_the_task_cannot_do_with_changes_nothing
    an_edited_task_keeps_what_was_not_edited
    the_same_key_gives_the_same_answer_until_it_expires
    what_a_sender_sends_again_gets_the_same_answer_until_it_has_had_it
    a_dead_letter_is_played_again_or_thrown_away
}

#[test]
fn time_and_watermark_never_go_back() {
    let mut world = World::default();
    let batch = |now_ms, armed_ms| Batch { now_ms, armed_ms, ..Batch::default() };
    world.apply(vec![batch(1_000, 1_500), batch(900, 1_400)]);
    let reached = (world.meta.now_ms, world.meta.armed_ms);
    assert_eq!(reached, (1_000, 1_500), "time and watermark, after a batch that is older in both");
}

#[test]
fn an_edit_to_more_than_a_datagram_carries_changes_nothing() {
    let by_udp = Policy { callback: Callback::new(Protocol::Udp, "h:1").unwrap(), ..three_tries() };
    let mut world = World::default();
    let mut reply_to = |request| {
        let policies = vec![by_udp.clone()];
        let batch = Batch { now_ms: 1_000, policies, requests: vec![request], ..Batch::default() };
        world.apply(vec![batch]).remove(0).replies.remove(0)
    };
    let id = id_of("a");
    reply_to(Request::Register(Register {
        id,
        client: owner("me"),
        policy: 0,
        due_ms: 2_000,
        recurrence: None,
        tags: None,
        dedup: None,
        numbered: None,
        payload: bytes::Bytes::new(),
    }));
    let edit = |bytes, callback| {
        let change = Change { payload: Some(vec![b'x'; bytes].into()), callback, ..Change::default() };
        Request::Edit(Edit { id, owner: None, claim: Claim::NotDispatched, version: None, change })
    };
    let Reply::Unfit(why) = reply_to(edit(60_001, None)) else { panic!("60001 bytes were taken") };
    assert_eq!(why.to_string(), "payload: 60001 bytes, a datagram carries at most 60000");
    let taken = |version| Reply::Edited { version, due_ms: 2_000 };
    assert_eq!(reply_to(edit(60_000, None)), taken(2), "as much as fits");
    let by_tcp = Callback::new(Protocol::Tcp, "h:1").unwrap();
    assert_eq!(reply_to(edit(60_001, Some(by_tcp))), taken(3), "by TCP from now on");
}

#[test]
fn what_is_no_batch_is_damage() {
    assert!(Batch::decode(b"").is_err(), "nothing is no batch");
    assert!(Batch::decode(&[9, 1, 2]).is_err(), "a batch of a version nobody knows is none");
    let mut bytes = Batch::default().encode(0).to_vec();
    bytes.push(1);
    assert!(Batch::decode(&bytes).is_err(), "a request this version does not know is not skipped");
}

/// A seed whose log once detached a task before it was due, and then moved the stand-in to before it. No leader detaches
/// what is not due.
const DETACHED_EARLY: u64 = 872752607407296597;

/// The same log, cut into writes in two ways and encoded on the way, gives the same state and the same replies.
#[test]
fn a_replay_gives_the_same_state_however_it_is_cut() {
    for seed in seed::rounds_and(&[DETACHED_EARLY], 30) {
        let mut rng = seed.rng();
        let log = random_log(&mut rng);
        let mut one_by_one = World::default();
        let mut replies = Vec::new();
        for batch in log.clone() {
            replies.extend(one_by_one.apply(vec![batch]).remove(0).replies);
        }
        let mut in_chunks = World::default();
        let mut replayed = Vec::new();
        let mut rest = log;
        while !rest.is_empty() {
            let tail = rest.split_off(rng.random_range(1..=rest.len().min(9)));
            let applied = in_chunks.apply(rest);
            replayed.extend(applied.into_iter().flat_map(|applied| applied.replies));
            rest = tail;
        }
        assert_eq!(replies, replayed, "replies of the same log, one batch at a time and several");
        assert!(one_by_one == in_chunks, "the same log leaves another state when it is cut in another way");
        assert!(replies.contains(&Reply::Settled) && replies.contains(&Reply::Stale), "the log is worth replaying");
    }
}

/// What a leader may propose. The requests of clients are anything; what it asks for by itself rests on what it has applied.
fn random_log(rng: &mut StdRng) -> Vec<Batch> {
    let policies = vec![
        three_tries(),
        policy(Retry { attempts_max: 1, ..three_tries().retry }),
        Policy {
            dead_letter: Some("tcp://graveyard:1".into()),
            ..policy(Retry { attempts_max: 2, interval_ms: 0, jitter_percent: 50, ..three_tries().retry })
        },
    ];
    let names: Vec<u64> = (0..120).collect();
    let mut unused = names.clone();
    let mut now_ms = 1_000;
    let mut log = Vec::new();
    let mut world = World::default();
    for _ in 0..200 {
        now_ms += rng.random_range(0..80);
        let policies = policies.clone();
        let mut batch = Batch { now_ms, armed_ms: now_ms, keep_history: true, policies, requests: Vec::new() };
        world.apply_unseen(vec![batch.clone()]);
        for _ in 0..rng.random_range(0..8) {
            let id = TaskId::new(0, ShardId(0), *names.choose(rng).unwrap());
            let (occurrence, attempt) = (rng.random_range(0..3), rng.random_range(1..3));
            let claim = *[Claim::NotDispatched, Claim::MayBeOut { occurrence, attempt }].choose(rng).unwrap();
            // An id is used once.
            let mut unused_id = || unused.pop().map(|name| TaskId::new(0, ShardId(0), name));
            let letter = DeadLetterId { died_ms: now_ms - rng.random_range(0..40), task: id };
            let request = match rng.random_range(0..20) {
                0..5 => {
                    let Some(id) = unused_id() else { continue };
                    let mut recurrence = Recurrence::every(50);
                    recurrence.missed = *[Missed::Once, Missed::Skip, Missed::All { max: 2 }].choose(rng).unwrap();
                    recurrence.count = *[None, Some(4)].choose(rng).unwrap();
                    let key = ["k", "l"].choose(rng).unwrap();
                    let hash = DedupHash::new(&owner("me"), key).unwrap();
                    Request::Register(Register {
                        id,
                        client: owner(["me", "you"].choose(rng).unwrap()),
                        policy: rng.random_range(0..3),
                        due_ms: now_ms + rng.random_range(0..200),
                        recurrence: rng.random_ratio(1, 2).then_some(recurrence),
                        tags: rng.random_ratio(1, 4).then(|| Tags::new("n", [("k".into(), "v".into())]).unwrap()),
                        dedup: rng.random_ratio(1, 4).then_some(Dedup { hash, expires_ms: now_ms + 300 }),
                        numbered: rng.random_ratio(1, 4).then(|| {
                            let number = rng.random_range(1..20);
                            Numbered { sender: hash, number, answered_below: number.saturating_sub(5) }
                        }),
                        payload: bytes::Bytes::from_static(b"p"),
                    })
                }
                5 => Request::Cancel(Cancel { id, owner: None, claim }),
                6 => {
                    let due_ms = rng.random_ratio(1, 2).then(|| now_ms + rng.random_range(0..100));
                    let payload = rng.random_ratio(1, 2).then(|| bytes::Bytes::from_static(b"other"));
                    let retry = rng.random_ratio(1, 2).then(Retry::default);
                    let change = Change { due_ms, payload, retry, ..Change::default() };
                    Request::Edit(Edit { id, owner: None, claim, version: None, change })
                }
                7 => Request::Pause(Pause { id, owner: None, claim, paused: rng.random_ratio(1, 2) }),
                8 => Request::CatchUp(CatchUp { id, occurrence }),
                9 => {
                    let Some(stand_in) = unused_id().filter(|_| world.may_be_due(id)) else { continue };
                    Request::Detach(Detach { id, occurrence, stand_in })
                }
                10 => {
                    let Some(stand_in) = unused_id() else { continue };
                    Request::Replay(Replay { letter, owner: None, stand_in })
                }
                11 => Request::Purge(Purge { letter, owner: None }),
                12 => {
                    let hash = DedupHash::new(&owner("me"), "k").unwrap();
                    Request::Forget(Forget { dedup: vec![(now_ms.saturating_sub(10), hash)], ..Forget::default() })
                }
                _ => {
                    let outcome = if rng.random_bool(0.5) {
                        Outcome::Acknowledged
                    } else {
                        Outcome::Failed(Failure::new(FailureClass::Refused, "no"))
                    };
                    Request::Settle(Settle { id, occurrence, attempt, outcome, dispatched_ms: now_ms })
                }
            };
            world.apply_unseen(vec![Batch { requests: vec![request.clone()], ..batch.clone() }]);
            batch.requests.push(request);
        }
        log.push(batch);
    }
    log
}

#[test]
fn clients_and_their_keys() {
    let mut rows = MemoryRows::default();
    let mut meta = ShardMetaRow::default();
    let mut ask = |request| {
        let mut overlay = Overlay::new(&rows);
        let batch = Batch { now_ms: 5, requests: vec![request], ..Batch::default() };
        let applied = apply(GroupId::CLUSTER, &mut overlay, &mut meta, batch).unwrap();
        let writes = overlay.into_writes();
        rows.store(writes);
        (applied.replies[0].clone(), rows.0.len())
    };
    let put = |hash: &str, only_if_absent| {
        Request::PutClient(PutClient {
            client: owner("orders"),
            password_hash: hash.into(),
            admin: false,
            policy: None,
            limits: ClientLimits::default(),
            only_if_absent,
        })
    };
    let key = |key_id: &str, client| {
        Request::PutApiKey(PutApiKey {
            key_id: key_id.into(),
            client: owner(client),
            label: String::new(),
            secret_hash: [7; 32],
        })
    };
    assert_eq!(ask(put("one", true)), (Reply::Stored, 1));
    assert_eq!(ask(put("two", true)), (Reply::Exists, 1));
    assert_eq!(ask(key("k1", "orders")), (Reply::Stored, 2));
    assert_eq!(ask(key("k2", "orders")), (Reply::Stored, 3));
    assert_eq!(ask(key("k3", "nobody")), (Reply::NotFound, 3));
    assert_eq!(ask(Request::RemoveApiKey("k1".into())), (Reply::Stored, 2));
    assert_eq!(ask(Request::RemoveApiKey("k1".into())), (Reply::NotFound, 2));
    // A new password leaves the keys as they are; a client that goes takes them along.
    assert_eq!(ask(put("three", false)), (Reply::Stored, 2));
    assert_eq!(ask(Request::RemoveClient(owner("orders"))), (Reply::Stored, 0));
    assert_eq!(ask(Request::RemoveClient(owner("orders"))), (Reply::NotFound, 0));
}

#[test]
fn no_more_than_so_many_overlap() {
    let mut world = script::world_after(three_tries(), 1000, "register a due=2000 every=1 overlap");
    let limit = super::recur::STAND_INS_MAX as u64;
    for occurrence in 0..=limit {
        let stand_in = TaskId::new(9, ShardId(0), occurrence);
        let requests = vec![Request::Detach(Detach { id: id_of("a"), occurrence, stand_in })];
        world.apply(vec![Batch { now_ms: 2000, keep_history: true, requests, ..Batch::default() }]);
    }
    assert_eq!((world.meta.pending, world.meta.missed), (limit + 1, 1));
    assert_eq!(world.history(id_of("a")), format!("{limit} skipped"));
}

#[test]
fn a_copy_of_a_dead_letter_goes_to_its_destination() {
    let with_copy = Policy {
        dead_letter: Some("tcp://graveyard:1".into()),
        ..policy(Retry { attempts_max: 1, ..three_tries().retry })
    };
    let mut world = script::world_after(with_copy, 1000, "register a due=2000 name=n");
    let ask = |world: &mut World, now_ms, requests| {
        world.apply(vec![Batch { now_ms, keep_history: true, requests, ..Batch::default() }]).remove(0)
    };
    let settle =
        |id, attempt, outcome| vec![Request::Settle(Settle { id, occurrence: 0, attempt, outcome, dispatched_ms: 0 })];
    let failed = || Outcome::Failed(Failure::new(FailureClass::Timeout, "no answer"));
    let applied = ask(&mut world, 2001, settle(id_of("a"), 1, failed()));
    let Effect::Scheduled { id: copy, due_ms: 2001 } = applied.effects[0] else { panic!("{applied:?}") };
    let (task, _) = read_task(&world.rows, GROUP, copy).unwrap().unwrap();
    let row: PolicyRow = world.get(&Key::policy(GROUP, task.policy)).unwrap();
    assert_eq!(row.policy.callback.endpoint.as_str(), "graveyard:1");
    let Role::Copy(of) = &task.role else { panic!("{task:?}") };
    assert_eq!((of.letter, of.attempts, of.failure.text.as_str()), (letter("a@2001"), 1, "no answer"));
    // It is nobody's task to cancel, and has tries of its own.
    let cancel = Request::Cancel(Cancel { id: copy, owner: None, claim: Claim::NotDispatched });
    assert_eq!(ask(&mut world, 2002, vec![cancel]).replies, [Reply::NotFound]);
    assert_eq!(ask(&mut world, 2003, settle(copy, 1, failed())).replies, [Reply::Settled]);
    let state = |world: &World| world.get::<DeadLetterRow>(&Key::dead_letter(GROUP, letter("a@2001"))).unwrap().copy;
    assert_eq!(state(&world), CopyState::UnderWay);
    let applied = ask(&mut world, 9000, settle(copy, 2, Outcome::Acknowledged));
    assert_eq!(applied.effects, [Effect::Ended { id: copy }]);
    assert_eq!(state(&world), CopyState::Delivered);
    assert_eq!(world.meta.dead_letters, 1, "a copy never becomes a dead letter");
}

#[test]
fn history_is_kept_only_when_asked_for_and_forgotten_by_the_hour() {
    const HOUR: u64 = 3_600_000;
    let mut world = World::default();
    for hour in 0..3 {
        for keep_history in [true, false] {
            let now_ms = HOUR * hour + 5;
            let id = TaskId::new(now_ms, ShardId(0), u64::from(keep_history));
            let register = Register {
                id,
                client: owner("me"),
                policy: 0,
                due_ms: now_ms,
                recurrence: None,
                tags: None,
                dedup: None,
                numbered: None,
                payload: bytes::Bytes::new(),
            };
            let settle =
                Settle { id, occurrence: 0, attempt: 1, outcome: Outcome::Acknowledged, dispatched_ms: now_ms };
            let requests = vec![Request::Register(register), Request::Settle(settle)];
            world.apply(vec![Batch { now_ms, keep_history, policies: vec![three_tries()], requests, armed_ms: 0 }]);
        }
    }
    world.leaves_only_history(3);
    let mut forget = |history_before| {
        let requests = vec![Request::Forget(Forget { history_before, ..Forget::default() })];
        world.apply(vec![Batch { now_ms: 3 * HOUR, requests, ..Batch::default() }]);
        world.rows.0.len()
    };
    assert_eq!((forget(HOUR - 1), forget(HOUR), forget(2 * HOUR + 9), forget(9 * HOUR)), (3, 2, 1, 0));
}
