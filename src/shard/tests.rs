//! The state machine by scripts: commands and their time in; replies, effects and state out.
//!
//! A line is one request; consecutive lines with the same time travel in one batch. What follows `->` is the reply and
//! then the effects. After each batch the whole state is validated.

use std::collections::BTreeMap;

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};

use super::*;
use crate::store::codec;
use crate::store::keys::{Parsed, parse_state};
use crate::store::overlay::MemoryRows;
use crate::store::rows::{DeadLetterRow, TimelineRow};
use crate::task::{Backoff, Callback, Failure, FailureClass, Outcome, Policy, Protocol, Retry, ShardId};

const GROUP: GroupId = GroupId(1);

#[derive(Clone, Default, PartialEq, Debug)]
struct World {
    rows: MemoryRows,
    meta: ShardMetaRow,
}

impl World {
    /// Applies `batches` with one write, as the state machine does while it catches up.
    fn apply(&mut self, batches: Vec<Batch>) -> Vec<Applied> {
        let mut overlay = Overlay::new(&self.rows);
        let mut meta = self.meta;
        let batches = batches.into_iter().map(|batch| Batch::decode(&batch.encode(0)).expect("what we encode"));
        let applied =
            batches.map(|batch| apply(GROUP, &mut overlay, &mut meta, batch).expect("rows are whole")).collect();
        let writes = overlay.into_writes();
        self.rows.store(writes);
        self.meta = meta;
        self.validate();
        applied
    }

    fn get<T: serde::de::DeserializeOwned>(&self, key: &Key) -> Option<T> {
        self.rows.0.get(key).map(|bytes| codec::decode("a row", bytes).expect("what we encoded"))
    }

    /// All that must hold between the rows.
    fn validate(&self) {
        let mut tasks = 0;
        let mut timeline = 0;
        let mut dead = 0;
        let mut uses: BTreeMap<PolicyId, u64> = BTreeMap::new();
        for key in self.rows.0.keys() {
            match parse_state(key.as_ref()).expect("one of ours").1 {
                Parsed::Task(id) => {
                    tasks += 1;
                    let (task, cursor) = read_task(&self.rows, GROUP, id).unwrap().unwrap();
                    *uses.entry(task.policy).or_default() += 1;
                    let row: TimelineRow = self.get(&Key::timeline(GROUP, cursor.due_ms, id)).expect("it is scheduled");
                    assert_eq!((row.occurrence, row.attempt), (cursor.occurrence, cursor.attempt));
                    assert!(cursor.due_ms >= occurrence_due(&task, cursor.occurrence), "never early");
                }
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
                    assert_eq!(row.policy.id(), id);
                }
                Parsed::DeadLetter(..) => dead += 1,
                other => panic!("{other:?} does not belong into a shard"),
            }
        }
        for (id, tasks) in uses {
            assert_eq!(self.get::<PolicyRow>(&Key::policy(GROUP, id)).map(|row| row.tasks), Some(tasks));
        }
        assert_eq!((tasks, dead), (self.meta.pending, self.meta.dead_letters));
        assert_eq!(timeline, tasks, "each task is scheduled exactly once");
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

fn owner(name: &str) -> crate::task::ClientId {
    name.parse().unwrap()
}

/// `register a due=5 every=3` · `cancel a [by=x] held|out=0.1|unknown` · `settle a 0.1 ok|failed`
fn parse_request(text: &str) -> Request {
    let mut words = text.split_whitespace();
    let verb = words.next().unwrap();
    let id = id_of(words.next().expect("a task"));
    let rest: Vec<&str> = words.collect();
    let named = |name: &str| rest.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let number = |name| named(name).map_or(0, |text| text.parse().expect("a number"));
    let attempt = |text: &str| {
        let (occurrence, attempt) = text.split_once('.').expect("occurrence.attempt");
        (occurrence.parse().unwrap(), attempt.parse().unwrap())
    };
    match verb {
        "register" => Request::Register(Register {
            id,
            client: owner("me"),
            policy: 0,
            due_ms: number("due"),
            interval_ms: number("every"),
            payload: bytes::Bytes::from_static(b"payload"),
        }),
        "cancel" => {
            let claim = match (named("out"), rest.contains(&"held")) {
                (Some(text), _) => {
                    let (occurrence, attempt) = attempt(text);
                    Claim::MayBeOut { occurrence, attempt }
                }
                (None, true) => Claim::NotDispatched,
                (None, false) => Claim::Unknown,
            };
            Request::Cancel(Cancel { id, owner: named("by").map(owner), claim })
        }
        "settle" => {
            let (occurrence, attempt) = attempt(rest[0]);
            let outcome = match rest[1] {
                "ok" => Outcome::Acknowledged,
                _ => Outcome::Failed(Failure::new(FailureClass::Refused, "refused")),
            };
            Request::Settle(Settle { id, occurrence, attempt, outcome })
        }
        other => panic!("unknown verb {other}"),
    }
}

fn show(reply: &Reply, effects: &[Effect]) -> String {
    let mut text = match reply {
        Reply::Registered { due_ms, .. } => format!("due {due_ms}"),
        Reply::TooLate { occurrence, attempt } => format!("too late {occurrence}.{attempt}"),
        other => format!("{other:?}").to_lowercase(),
    };
    for effect in effects {
        text += &match effect {
            Effect::Scheduled { id, due_ms } => format!(", {} at {due_ms}", name_of(*id)),
            Effect::Ended { id } => format!(", {} ended", name_of(*id)),
        };
    }
    text
}

/// Runs a script, and compares what follows each `->`.
fn script(policy: Policy, text: &str) -> World {
    let mut world = World::default();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (time, rest) = line.split_once(' ').expect("a time");
        let (request, expected) = rest.split_once("->").expect("an expectation");
        let now_ms = time.parse().expect("a time in milliseconds");
        let batch =
            Batch { now_ms, armed_ms: 0, policies: vec![policy.clone()], requests: vec![parse_request(request)] };
        let applied = world.apply(vec![batch]).remove(0);
        assert_eq!(show(&applied.replies[0], &applied.effects), expected.trim(), "{line}");
    }
    world
}

#[test]
fn a_task_lives_once() {
    let world = script(
        three_tries(),
        "
        1000 register a due=2000       -> due 2000, a at 2000
        1000 register b due=1500       -> due 1500, b at 1500
        1500 settle b 0.1 ok           -> settled, b ended
        # A second answer to the same attempt, after a retry of the proposal, changes nothing.
        1500 settle b 0.1 ok           -> stale
        1501 settle a 0.2 ok           -> stale
        2000 settle a 0.1 ok           -> settled, a ended
        ",
    );
    assert!(world.rows.0.is_empty(), "nothing is left behind, the policy neither: {world:?}");
}

#[test]
fn failures_are_tried_again_and_end_as_a_dead_letter() {
    let world = script(
        three_tries(),
        "
        1000 register a due=2000       -> due 2000, a at 2000
        2005 settle a 0.1 failed       -> settled, a at 2105
        # The first attempt's answer comes once more.
        2006 settle a 0.1 failed       -> stale
        2110 settle a 0.2 failed       -> settled, a at 2210
        2215 settle a 0.3 failed       -> settled, a ended
        ",
    );
    let letter: DeadLetterRow = world.get(&Key::dead_letter(GROUP, 2215, id_of("a"))).unwrap();
    assert_eq!((letter.attempts, letter.error.as_str(), letter.due_ms), (3, "refused", 2000));
    assert_eq!(world.rows.0.len(), 1, "only the dead letter is left");
}

#[test]
fn a_retry_is_never_due_at_the_same_instant_again() {
    let at_once = policy(Retry {
        attempts_max: 3,
        backoff: Backoff::Fixed,
        interval_ms: 0,
        interval_max_ms: 0,
        jitter_percent: 0,
    });
    script(
        at_once,
        "
        1000 register a due=2000       -> due 2000, a at 2000
        2000 settle a 0.1 failed       -> settled, a at 2001
        2000 settle a 0.2 failed       -> settled, a at 2002
        ",
    );
}

#[test]
fn a_recurring_task_does_not_drift_and_merges_what_it_missed() {
    let world = script(
        three_tries(),
        "
        1000 register a due=2000 every=100 -> due 2000, a at 2000
        2003 settle a 0.1 ok               -> settled, a at 2100
        # A late answer: 2200 and 2300 have passed, and are merged into 2400.
        2350 settle a 1.1 ok               -> settled, a at 2400
        # A failed attempt belongs to its occurrence; the next is counted from the first due instant all the same.
        2400 settle a 4.1 failed           -> settled, a at 2500
        2510 settle a 4.2 failed           -> settled, a at 2610
        2611 settle a 4.3 failed           -> settled, a at 2700
        2700 settle a 7.1 ok               -> settled, a at 2800
        2710 cancel a held                 -> cancelled, a ended
        2800 settle a 8.1 ok               -> stale
        ",
    );
    assert_eq!(world.meta.dead_letters, 1);
}

#[test]
fn a_recurring_task_ends_at_the_end_of_time() {
    script(
        three_tries(),
        "
        1000 register a due=2000 every=9223372036854775807 -> due 2000, a at 2000
        2000 settle a 0.1 ok -> settled, a at 9223372036854777807
        9223372036854777807 settle a 1.1 ok -> settled, a ended
        ",
    );
}

#[test]
fn a_cancellation_says_what_may_be_out() {
    script(
        three_tries(),
        "
        1000 register a due=2000       -> due 2000, a at 2000
        1500 cancel a by=other held    -> notfound
        1500 cancel a by=me held       -> cancelled, a ended
        1500 cancel a held             -> notfound
        1000 register b due=2000       -> due 2000, b at 2000
        2000 cancel b out=0.1          -> too late 0.1, b ended
        2001 settle b 0.1 failed       -> stale
        1000 register c due=2000       -> due 2000, c at 2000
        2000 settle c 0.1 failed       -> settled, c at 2101
        # The second attempt is held, but the first one was out.
        2050 cancel c held             -> too late 0.1, c ended
        2050 register d due=2050 every=50 -> due 2050, d at 2050
        # The answer to an attempt overtook the cancellation that claims it.
        2051 settle d 0.1 ok           -> settled, d at 2100
        2051 cancel d out=0.1          -> too late 0.1, d ended
        1000 register e due=2000       -> due 2000, e at 2000
        1000 cancel e unknown          -> too late 0.1, e ended
        ",
    );
}

#[test]
fn time_and_watermark_never_go_back() {
    let mut world = World::default();
    let batch = |now_ms, armed_ms| Batch { now_ms, armed_ms, ..Batch::default() };
    world.apply(vec![batch(1_000, 1_500), batch(900, 1_400)]);
    assert_eq!((world.meta.now_ms, world.meta.armed_ms), (1_000, 1_500));
}

#[test]
fn what_is_no_batch_is_damage() {
    assert!(Batch::decode(b"").is_err());
    assert!(Batch::decode(&[9, 1, 2]).is_err());
    let mut bytes = Batch::default().encode(0).to_vec();
    bytes.push(1);
    assert!(Batch::decode(&bytes).is_err(), "a request this version does not know is not skipped");
}

/// The same log, cut into writes in two ways and encoded on the way, gives the same state and the same replies.
#[test]
fn a_replay_gives_the_same_state_however_it_is_cut() {
    for round in 0..30 {
        let seed: u64 = rand::random();
        println!("round {round}, seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
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
        assert_eq!(replies, replayed);
        assert_eq!(one_by_one, in_chunks);
        assert!(replies.contains(&Reply::Settled) && replies.contains(&Reply::Stale), "the log is worth replaying");
    }
}

fn random_log(rng: &mut StdRng) -> Vec<Batch> {
    let policies = vec![
        three_tries(),
        policy(Retry { attempts_max: 1, ..three_tries().retry }),
        policy(Retry { attempts_max: 2, interval_ms: 0, ..three_tries().retry }),
    ];
    let names: Vec<u64> = (0..40).collect();
    let mut unused = names.clone();
    let mut now_ms = 1_000;
    let mut log = Vec::new();
    for _ in 0..200 {
        now_ms += rng.random_range(0..80);
        let mut batch = Batch { now_ms, armed_ms: now_ms, policies: policies.clone(), requests: Vec::new() };
        for _ in 0..rng.random_range(0..8) {
            let id = TaskId::new(0, ShardId(0), *names.choose(rng).unwrap());
            batch.requests.push(match rng.random_range(0..10) {
                0..3 => {
                    // An id is used once.
                    let Some(name) = unused.pop() else { continue };
                    Request::Register(Register {
                        id: TaskId::new(0, ShardId(0), name),
                        client: owner("me"),
                        policy: rng.random_range(0..3),
                        due_ms: now_ms + rng.random_range(0..200),
                        interval_ms: *[0, 0, 50].choose(rng).unwrap(),
                        payload: bytes::Bytes::from_static(b"p"),
                    })
                }
                3 => Request::Cancel(Cancel { id, owner: None, claim: Claim::NotDispatched }),
                _ => {
                    let outcome = if rng.random_bool(0.5) {
                        Outcome::Acknowledged
                    } else {
                        Outcome::Failed(Failure::new(FailureClass::Refused, "no"))
                    };
                    let (occurrence, attempt) = (rng.random_range(0..3), rng.random_range(1..3));
                    Request::Settle(Settle { id, occurrence, attempt, outcome })
                }
            });
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
