//! The state machine by scripts: commands and their time in; replies, effects and state out.
//!
//! A line is one request; consecutive lines with the same time travel in one batch. What follows `->` is the reply and
//! then the effects. After each batch the whole state is validated.

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
    fn history(&self, name: &str) -> String {
        let of = self.rows.0.keys().filter_map(|key| match parse_state(key.as_ref()).unwrap().1 {
            Parsed::History(id, occurrence, _) if id == id_of(name) => {
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
                    assert_eq!((row.occurrence, row.attempt), (cursor.occurrence, cursor.attempt));
                    assert_eq!(row.recurring, task.recurrence.is_some());
                    let mine = Key::by_client(GROUP, client_hash(&task.client), cursor.due_ms, id);
                    assert_eq!(self.get::<TimelineRow>(&mine), Some(row), "its client's timeline says the same");
                    for key in tag_keys(GROUP, id, &task) {
                        assert!(self.rows.0.contains_key(&key));
                        tags += 1;
                    }
                    assert!(cursor.due_ms >= occurrence_due(&task, cursor.occurrence), "never early");
                    if let Role::StandIn { due_ms, .. } = task.role {
                        assert!(task.first_due_ms >= due_ms, "never early");
                    }
                }
                Parsed::ByClient(..) => by_client += 1,
                Parsed::ByTag(_) => by_tag += 1,
                Parsed::StandIns(of) => {
                    let StandInsRow(ids) = self.get(key).unwrap();
                    assert!(!ids.is_empty());
                    for id in ids {
                        let (task, _) = read_task(&self.rows, GROUP, id).unwrap().expect("a stand-in is a task");
                        assert!(matches!(task.role, Role::StandIn { task, .. } if task == of));
                    }
                }
                Parsed::Dedup(hash) => {
                    let row: DedupRow = self.get(key).unwrap();
                    dedups.insert((row.expires_ms, hash));
                }
                // It may name one that was registered again since, under its earlier expiry.
                Parsed::DedupEnd(expires_ms, first) => {
                    let hashes: Vec<DedupHash> = self.get(key).unwrap();
                    assert_eq!(hashes[0], first);
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
                    assert_eq!(row.policy.id(), id);
                }
                Parsed::DeadLetter(letter) => {
                    let row: DeadLetterRow = self.get(key).unwrap();
                    let of_client = Key::letter_of_client(GROUP, client_hash(&row.client), letter);
                    assert!(self.rows.0.contains_key(&of_client));
                    dead += 1;
                }
                Parsed::LetterOfClient(..) => of_clients += 1,
                Parsed::Sender(_) => {
                    let row: SenderRow = self.get(key).unwrap();
                    let numbers: Vec<u64> = row.stored.iter().map(|one| one.number).collect();
                    assert!(numbers.is_sorted() && numbers.first().is_none_or(|first| *first >= row.answered_below));
                }
                other => panic!("{other:?} does not belong into a shard"),
            }
        }
        for (id, tasks) in uses {
            assert_eq!(self.get::<PolicyRow>(&Key::policy(GROUP, id)).map(|row| row.tasks), Some(tasks));
        }
        assert_eq!((tasks, dead), (self.meta.pending, self.meta.dead_letters));
        assert_eq!(of_clients, dead);
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

fn owner(name: &str) -> crate::task::ClientId {
    name.parse().unwrap()
}

fn sender_hash(name: &str) -> DedupHash {
    DedupHash::new(&owner("me"), name).unwrap()
}

/// `register a due=5 [sent=s.2/1] [every=3 missed=skip|all:2 count=4 until=9 overlap] [key=k] [name=n]` · `settle a 0.1 ok|failed`
/// `cancel a [by=x] held|out=0.1|unknown` · `edit a [version=1] [due=9] [payload=p] [to=host:1] held|..` · `pause a held|..`
/// `resume a held|..` · `catch-up a 3` · `detach a 3 z` · `replay a@5 z [by=x]` · `purge a@5` · `forget - key=k..5`
/// `forget - sender=s..5`
fn parse_request(text: &str) -> Request {
    let mut words = text.split_whitespace();
    let verb = words.next().unwrap();
    let subject = words.next().unwrap_or(" ");
    let id = id_of(subject);
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
            recurrence: recurrence(&rest),
            tags: named("name").map(|name| Tags::new(name, []).unwrap()),
            dedup: named("key").map(|key| {
                let (key, expires_ms) = key.split_once("..").expect("key..expiry");
                Dedup { hash: DedupHash::new(&owner("me"), key).unwrap(), expires_ms: expires_ms.parse().unwrap() }
            }),
            numbered: named("sent").map(|sent| {
                let (sender, numbers) = sent.split_once('.').expect("sender.number/answered-below");
                let (number, below) = numbers.split_once('/').expect("number/answered-below");
                let [number, answered_below] = [number, below].map(|text| text.parse().expect("a number"));
                Numbered { sender: sender_hash(sender), number, answered_below }
            }),
            payload: bytes::Bytes::from_static(b"payload"),
        }),
        "cancel" | "edit" | "pause" | "resume" => {
            let claim = match (named("out"), rest.contains(&"held")) {
                (Some(text), _) => {
                    let (occurrence, attempt) = attempt(text);
                    Claim::MayBeOut { occurrence, attempt }
                }
                (None, true) => Claim::NotDispatched,
                (None, false) => Claim::Unknown,
            };
            let owner = named("by").map(owner);
            match verb {
                "cancel" => Request::Cancel(Cancel { id, owner, claim }),
                "edit" => {
                    let change = Change {
                        due_ms: named("due").map(|due| due.parse().unwrap()),
                        payload: named("payload").map(|text| text.to_owned().into()),
                        callback: named("to").map(|to| Callback::new(Protocol::Tcp, to).unwrap()),
                        ..Change::default()
                    };
                    let version = named("version").map(|version| version.parse().unwrap());
                    Request::Edit(Edit { id, owner, claim, version, change })
                }
                _ => Request::Pause(Pause { id, owner, claim, paused: verb == "pause" }),
            }
        }
        "catch-up" => Request::CatchUp(CatchUp { id, occurrence: rest[0].parse().unwrap() }),
        "detach" => Request::Detach(Detach { id, occurrence: rest[0].parse().unwrap(), stand_in: id_of(rest[1]) }),
        "replay" => {
            Request::Replay(Replay { letter: letter(subject), owner: named("by").map(owner), stand_in: id_of(rest[0]) })
        }
        "purge" => Request::Purge(Purge { letter: letter(subject), owner: named("by").map(owner) }),
        "forget" => {
            let senders = named("sender").map(|sender| {
                let (sender, seen_ms) = sender.split_once("..").expect("sender..seen");
                (sender_hash(sender), seen_ms.parse().unwrap())
            });
            let dedup = named("key").map(|key| {
                let (key, expires_ms) = key.split_once("..").expect("key..expiry");
                (expires_ms.parse().unwrap(), DedupHash::new(&owner("me"), key).unwrap())
            });
            Request::Forget(Forget {
                dedup: dedup.into_iter().collect(),
                senders: senders.into_iter().collect(),
                history_before: number("before"),
            })
        }
        "settle" => {
            let (occurrence, attempt) = attempt(rest[0]);
            let outcome = match rest[1] {
                "ok" => Outcome::Acknowledged,
                _ => Outcome::Failed(Failure::new(FailureClass::Refused, "refused")),
            };
            Request::Settle(Settle { id, occurrence, attempt, outcome, dispatched_ms: 0 })
        }
        other => panic!("unknown verb {other}"),
    }
}

fn recurrence(words: &[&str]) -> Option<Recurrence> {
    let named = |name: &str| words.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let mut recurrence = Recurrence::every(named("every")?.parse().unwrap());
    recurrence.missed = match named("missed") {
        Some("skip") => Missed::Skip,
        Some(all) => Missed::All { max: all.strip_prefix("all:").expect("skip or all").parse().unwrap() },
        None => Missed::Once,
    };
    recurrence.overlap = words.contains(&"overlap");
    recurrence.count = named("count").map(|count| count.parse().unwrap());
    recurrence.until_ms = named("until").map(|until| until.parse().unwrap());
    Some(recurrence)
}

fn letter(text: &str) -> DeadLetterId {
    let (name, died_ms) = text.split_once('@').expect("task@instant");
    DeadLetterId { died_ms: died_ms.parse().unwrap(), task: id_of(name) }
}

fn show(reply: &Reply, effects: &[Effect]) -> String {
    let mut text = match reply {
        Reply::Registered { due_ms, duplicate: false, .. } => format!("due {due_ms}"),
        Reply::Registered { id, due_ms, duplicate: true } => format!("{} before, due {due_ms}", name_of(*id)),
        Reply::Edited { version, due_ms } => format!("version {version} due {}", instant(*due_ms)),
        Reply::Unfit(why) => format!("unfit: {why}"),
        Reply::Conflict { version } => format!("conflict {version}"),
        Reply::Paused { out: None } => "paused".into(),
        Reply::Paused { out: Some((occurrence, attempt)) } => format!("paused, {occurrence}.{attempt} out"),
        Reply::Resumed { due_ms } => format!("resumed due {due_ms}"),
        Reply::Replayed { id } => format!("replayed as {}", name_of(*id)),
        Reply::GivenUp => "given up".into(),
        Reply::TooLate { occurrence, attempt } => format!("too late {occurrence}.{attempt}"),
        other => format!("{other:?}").to_lowercase(),
    };
    for effect in effects {
        text += &match effect {
            Effect::Scheduled { id, due_ms } => format!(", {} at {}", name_of(*id), instant(*due_ms)),
            Effect::Ended { id } => format!(", {} ended", name_of(*id)),
            Effect::ClientChanged { client } => format!(", client {client} changed"),
            Effect::KeyRevoked { key_id } => format!(", key {key_id} revoked"),
            Effect::Marked { mark } => format!(", marked {mark}"),
        };
    }
    text
}

fn instant(due_ms: InstantMs) -> String {
    if due_ms == NEVER { "never".into() } else { due_ms.to_string() }
}

/// Runs a script, and compares what follows each `->`. What is due by the time of a line was armed.
fn script(policy: Policy, text: &str) -> World {
    let mut world = World::default();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (time, rest) = line.split_once(' ').expect("a time");
        let (request, expected) = rest.split_once("->").expect("an expectation");
        let now_ms = time.parse().expect("a time in milliseconds");
        let requests = vec![parse_request(request)];
        let batch = Batch { now_ms, armed_ms: now_ms, keep_history: true, policies: vec![policy.clone()], requests };
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
    world.leaves_only_history(2);
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
    let row: DeadLetterRow = world.get(&Key::dead_letter(GROUP, letter("a@2215"))).unwrap();
    assert_eq!((row.attempts, row.failure.text.as_str(), row.due_ms), (3, "refused", 2000));
    assert_eq!(world.rows.0.len(), 3, "only the dead letter, its place in its client's and its history are left");
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
        # A late answer: 2200 and 2300 have passed, and are run as one, at once.
        2350 settle a 1.1 ok               -> settled, a at 2300
        2355 settle a 3.1 ok               -> settled, a at 2400
        # A failed attempt belongs to its occurrence; the next is counted from the first due instant all the same.
        2400 settle a 4.1 failed           -> settled, a at 2500
        2510 settle a 4.2 failed           -> settled, a at 2610
        2611 settle a 4.3 failed           -> settled, a at 2600
        2620 settle a 6.1 ok               -> settled, a at 2700
        2710 cancel a held                 -> cancelled, a ended
        2800 settle a 7.1 ok               -> stale
        ",
    );
    assert_eq!((world.meta.dead_letters, world.meta.missed), (1, 2));
    let ended =
        "0 acknowledged, 1 acknowledged, 2 merged, 3 acknowledged, 4 dead, 5 merged, 6 acknowledged, 7 cancelled";
    assert_eq!(world.history("a"), ended);
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
        2000 cancel e unknown          -> too late 0.1, e ended
        ",
    );
}

/// A leader that knows nothing of those before it need not know: what they can have let out was armed.
#[test]
fn what_was_not_armed_has_not_left() {
    script(
        three_tries(),
        "
        1000 register a due=2000       -> due 2000, a at 2000
        1500 pause a unknown           -> paused
        1500 resume a unknown          -> resumed due 2000, a at 2000
        1500 edit a due=1800 unknown   -> version 2 due 1800, a at 1800
        1799 cancel a unknown          -> cancelled, a ended
        1799 register b due=1800       -> due 1800, b at 1800
        1800 edit b due=1900 unknown   -> too late 0.1
        1800 pause b unknown           -> paused, 0.1 out
        1801 settle b 0.1 failed       -> settled, b at never
        1801 resume b unknown          -> resumed due 1801, b at 1801
        1802 settle b 0.2 failed       -> settled, b at 1902
        # Of the third attempt that much is known, and the second was out.
        1802 cancel b unknown          -> too late 0.2, b ended
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
        assert_eq!(replies, replayed);
        assert_eq!(one_by_one, in_chunks);
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
fn missed_runs_follow_the_policy() {
    let world = script(
        three_tries(),
        "
        1000 register a due=2000 every=100 missed=skip  -> due 2000, a at 2000
        # Late, but not by an interval: it is run.
        2090 settle a 0.1 ok      -> settled, a at 2100
        2350 settle a 1.1 ok      -> settled, a at 2400
        # The node was down from 2400 on.
        3399 catch-up a 4         -> stale
        3400 catch-up a 4         -> settled, a at 3500
        3400 catch-up a 4         -> stale
        1000 register b due=4000 every=100 missed=all:2 -> due 4000, b at 4000
        4050 settle b 0.1 ok      -> settled, b at 4100
        4550 settle b 1.1 ok      -> settled, b at 4400
        4551 settle b 4.1 ok      -> settled, b at 4500
        4552 settle b 5.1 ok      -> settled, b at 4600
        1000 register c due=5000 every=100 -> due 5000, c at 5000
        # Later than an interval, but not by a second: it simply starts.
        5350 catch-up c 0         -> stale
        6350 catch-up c 0         -> settled, c at 6300
        6351 settle c 13.1 ok     -> settled, c at 6400
        1000 register d due=7000 every=5000 -> due 7000, d at 7000
        11999 catch-up d 0        -> stale
        12000 catch-up d 0        -> settled, d at 12000
        ",
    );
    assert_eq!(world.history("a"), "0 acknowledged, 1 acknowledged, 2-3 skipped, 4-14 skipped");
    assert_eq!(world.history("b"), "0 acknowledged, 1 acknowledged, 2-3 skipped, 4 acknowledged, 5 acknowledged");
    assert_eq!(world.history("c"), "0-12 merged, 13 acknowledged");
    assert_eq!(world.meta.missed, 2 + 11 + 2 + 13 + 1);
}

#[test]
fn a_recurring_task_ends_by_count_or_instant() {
    let world = script(
        three_tries(),
        "
        1000 register a due=2000 every=100 count=3 -> due 2000, a at 2000
        2000 settle a 0.1 ok      -> settled, a at 2100
        2100 settle a 1.1 ok      -> settled, a at 2200
        2200 settle a 2.1 ok      -> settled, a ended
        1000 register b due=3000 every=100 until=3100 -> due 3000, b at 3000
        3000 settle b 0.1 ok      -> settled, b at 3100
        3100 settle b 1.1 ok      -> settled, b ended
        # What was missed is counted up to the end, and no further.
        1000 register c due=4000 every=100 count=3 missed=skip -> due 4000, c at 4000
        4900 settle c 0.1 ok      -> settled, c ended
        1000 register d due=5000 every=100 count=3 -> due 5000, d at 5000
        5900 settle d 0.1 ok      -> settled, d at 5200
        5900 settle d 2.1 ok      -> settled, d ended
        ",
    );
    assert_eq!(world.history("c"), "0 acknowledged, 1-2 skipped");
    assert_eq!(world.history("d"), "0 acknowledged, 1 merged, 2 acknowledged");
    world.leaves_only_history(3 + 2 + 2 + 3);
}

#[test]
fn an_occurrence_that_overlaps_goes_its_own_way() {
    let world = script(
        three_tries(),
        "
        1000 register a due=2000 every=100 count=3 overlap -> due 2000, a at 2000
        2000 detach a 0 x         -> settled, x at 2000, a at 2100
        2000 detach a 0 y         -> stale
        2100 detach a 1 y         -> settled, y at 2100, a at 2200
        # Neither waits for the other.
        2150 settle y 0.1 ok      -> settled, y ended
        2160 settle x 0.1 failed  -> settled, x at 2260
        2260 settle x 0.2 failed  -> settled, x at 2360
        2360 settle x 0.3 failed  -> settled, x ended
        2200 detach a 2 z         -> settled, z at 2200, a ended
        # The task is gone, one of its occurrences is not; cancelling it ends that too.
        2300 cancel a by=other held -> notfound
        2300 cancel a held        -> too late 2.1, z ended
        2301 settle z 0.1 ok      -> stale
        ",
    );
    assert_eq!(world.history("a"), "0 dead, 1 acknowledged, 2 cancelled");
    let row: DeadLetterRow = world.get(&Key::dead_letter(GROUP, letter("a@2360"))).unwrap();
    assert_eq!((row.occurrence, row.due_ms), (0, 2000));
}

#[test]
fn no_more_than_so_many_overlap() {
    let mut world = script(three_tries(), "1000 register a due=2000 every=1 overlap -> due 2000, a at 2000");
    let limit = super::recur::STAND_INS_MAX as u64;
    for occurrence in 0..=limit {
        let stand_in = TaskId::new(9, ShardId(0), occurrence);
        let requests = vec![Request::Detach(Detach { id: id_of("a"), occurrence, stand_in })];
        world.apply(vec![Batch { now_ms: 2000, keep_history: true, requests, ..Batch::default() }]);
    }
    assert_eq!((world.meta.pending, world.meta.missed), (limit + 1, 1));
    assert_eq!(world.history("a"), format!("{limit} skipped"));
}

#[test]
fn a_paused_task_waits_and_leaves_out_what_passes() {
    let world = script(
        three_tries(),
        "
        1000 register a due=2000 every=100 -> due 2000, a at 2000
        2000 settle a 0.1 ok      -> settled, a at 2100
        2050 pause a by=other held -> notfound
        2050 pause a held         -> paused
        2060 pause a held         -> paused
        2350 resume a held        -> resumed due 2400, a at 2400
        2350 resume a held        -> resumed due 2400
        2400 settle a 4.1 ok      -> settled, a at 2500
        # With an attempt out, it is settled, and nothing follows until the task is resumed.
        2500 pause a out=5.1      -> paused, 5.1 out
        2510 settle a 5.1 failed  -> settled, a at never
        2520 resume a held        -> resumed due 2520, a at 2520
        2530 pause a out=5.2      -> paused, 5.2 out
        2540 settle a 5.2 ok      -> settled, a at never
        2999 resume a held        -> resumed due 3000, a at 3000
        # Resumed while the attempt is still out: as if nothing had been.
        3000 pause a out=10.1     -> paused, 10.1 out
        3010 resume a out=10.1    -> resumed due 3000
        3020 settle a 10.1 ok     -> settled, a at 3100
        3030 pause a held         -> paused
        3040 cancel a held        -> cancelled, a ended
        # A task that is due once can wait as well; it is due at its instant, or at once.
        1000 register b due=5000  -> due 5000, b at 5000
        1500 pause b held         -> paused
        6000 resume b held        -> resumed due 5000, b at 5000
        6000 settle b 0.1 ok      -> settled, b ended
        # A retry is due at once, but not before the instant it was moved to meanwhile.
        1000 register d due=2000  -> due 2000, d at 2000
        6000 settle d 0.1 failed  -> settled, d at 6100
        6010 pause d held         -> paused
        6020 edit d due=8000 held -> version 2 due never, d at never
        6030 resume d held        -> resumed due 8000, d at 8000
        6040 cancel d held        -> too late 0.1, d ended
        # The end passes while it is paused.
        1000 register c due=7000 every=100 count=2 -> due 7000, c at 7000
        1500 pause c held         -> paused
        9000 resume c held        -> resumed due 0, c ended
        ",
    );
    assert_eq!(
        world.history("a"),
        "0 acknowledged, 1-3 skipped, 4 acknowledged, 5 acknowledged, 6-9 skipped, 10 acknowledged, 11 cancelled"
    );
    assert_eq!(world.history("c"), "0-1 skipped");
}

/// The watermark says what an earlier leader may have dispatched, and a pause must not hide it.
#[test]
fn a_paused_task_remembers_that_an_attempt_may_be_out() {
    let since = |text: &str| {
        let world = script(three_tries(), text);
        read_task(&world.rows, GROUP, id_of("a")).unwrap().unwrap().1.out_due_ms
    };
    let paused = "
        1000 register a due=2000 -> due 2000, a at 2000
        2000 pause a out=0.1     -> paused, 0.1 out
        ";
    assert_eq!(since(paused), Some(2_000));
    assert_eq!(since(&format!("{paused} 2010 settle a 0.1 failed -> settled, a at never")), None);
    assert_eq!(since(&format!("{paused} 2010 resume a out=0.1 -> resumed due 2000")), None);
    assert_eq!(since(&format!("{paused} 2010 edit a payload=new held -> version 2 due never, a at never")), None);
    assert_eq!(since("1000 register a due=2000 -> due 2000, a at 2000\n 1500 pause a held -> paused"), None);
}

#[test]
fn an_edit_that_the_task_cannot_do_with_changes_nothing() {
    script(
        three_tries(),
        "
        1000 register a due=2000 every=100 until=5000 -> due 2000, a at 2000
        1100 edit a due=5001 held -> unfit: recurrence.until_ms: is before the first due instant
        # Whose it is, and which version, is looked at before; whether it is out, after.
        1100 edit a by=other due=5001 held -> notfound
        1100 edit a version=7 due=5001 held -> conflict 1
        2000 edit a due=5001 out=0.1 -> unfit: recurrence.until_ms: is before the first due instant
        1100 edit a due=5000 held -> version 2 due 5000, a at 5000
        ",
    );
    let by_udp = Policy { callback: Callback::new(Protocol::Udp, "h:1").unwrap(), ..three_tries() };
    let (fits, large) = ("x".repeat(60_000), "x".repeat(60_001));
    let unfit = "unfit: payload: 60001 bytes, a datagram carries at most 60000";
    script(
        by_udp,
        &format!(
            "
            1000 register a due=2000 -> due 2000, a at 2000
            1100 edit a payload={large} held -> {unfit}
            1100 edit a payload={fits} held -> version 2 due 2000, a at 2000
            1100 edit a payload={large} to=elsewhere:1 held -> version 3 due 2000, a at 2000
            "
        ),
    );
}

#[test]
fn an_edit_changes_what_is_not_out() {
    let world = script(
        three_tries(),
        "
        1000 register a due=2000  -> due 2000, a at 2000
        1100 edit a by=other due=3000 held -> notfound
        1100 edit a version=7 due=3000 held -> conflict 1
        1100 edit a version=1 due=3000 held -> version 2 due 3000, a at 3000
        # Earlier again, and to the same instant twice.
        1200 edit a due=2500 held -> version 3 due 2500, a at 2500
        1200 edit a due=2500 held -> version 4 due 2500, a at 2500
        1300 edit a payload=new to=elsewhere:1 held -> version 5 due 2500, a at 2500
        2500 edit a due=9000 out=0.1 -> too late 0.1
        2500 edit a due=9000 unknown -> too late 0.1
        2501 settle a 0.1 failed  -> settled, a at 2601
        # What was claimed has been settled since, and nothing else has left.
        2501 edit a due=9000 out=0.1 -> version 6 due 9000, a at 9000
        9000 settle a 0.2 ok      -> settled, a ended
        9000 edit a due=9999 held -> notfound
        # A recurring task goes on from where it was moved to.
        9000 register b due=12000 every=100 -> due 12000, b at 12000
        12000 settle b 0.1 ok     -> settled, b at 12100
        12050 edit b due=12130 held -> version 2 due 12130, b at 12130
        12130 settle b 1.1 ok     -> settled, b at 12230
        # What is paused is moved where it waits.
        12140 pause b held        -> paused
        12150 edit b due=15000 held -> version 3 due never, b at never
        12160 resume b held       -> resumed due 15000, b at 15000
        15000 cancel b held       -> cancelled, b ended
        ",
    );
    world.leaves_only_history(1 + 3);
}

#[test]
fn an_edited_task_keeps_what_was_not_edited() {
    let world = script(
        three_tries(),
        "
        1000 register a due=2000 every=100 name=nightly -> due 2000, a at 2000
        1100 edit a payload=new to=elsewhere:1 held -> version 2 due 2000, a at 2000
        ",
    );
    let (task, at) = read_task(&world.rows, GROUP, id_of("a")).unwrap().unwrap();
    assert_eq!((task.payload.as_ref(), at), (&b"new"[..], first_cursor(&task)));
    let row: PolicyRow = world.get(&Key::policy(GROUP, task.policy)).unwrap();
    assert_eq!((row.policy.callback.endpoint.as_str(), row.policy.retry), ("elsewhere:1", three_tries().retry));
    assert!(task.recurrence.is_some() && task.tags.is_some());
}

#[test]
fn the_same_key_gives_the_same_answer_until_it_expires() {
    let world = script(
        three_tries(),
        "
        1000 register a due=2000 key=k..5000 -> due 2000, a at 2000
        1100 register b due=3000 key=k..5100 -> a before, due 2000
        2000 settle a 0.1 ok      -> settled, a ended
        # Also when the task is gone.
        4999 register b due=3000 key=k..8000 -> a before, due 2000
        4999 register c due=6000 key=other..9000 -> due 6000, c at 6000
        5000 register b due=7000 key=k..9000 -> due 7000, b at 7000
        # What looked old has been used again since.
        9000 forget - key=k..5000   -> stored
        8999 register d due=9999 key=k..9999 -> due 9999, d at 9999
        9500 forget - key=other..9000 -> stored
        9500 forget - key=k..9999   -> stored
        9600 register e due=9999 key=k..9999 -> d before, due 9999
        ",
    );
    let left = world.rows.0.keys().filter(|key| matches!(parse_state(key.as_ref()).unwrap().1, Parsed::Dedup(_)));
    assert_eq!(left.count(), 1);
}

#[test]
fn what_a_sender_sends_again_gets_the_same_answer_until_it_has_had_it() {
    let world = script(
        three_tries(),
        "
        1000 register a due=2000 sent=s.1/1 -> due 2000, a at 2000
        1000 register b due=2000 sent=s.2/1 -> due 2000, b at 2000
        1100 register c due=3000 sent=s.1/1 -> a before, due 2000
        2000 settle a 0.1 ok                -> settled, a ended
        # Also when the task is gone.
        2100 register c due=3000 sent=s.1/1 -> a before, due 2000
        # One that was overtaken is new when it comes.
        2200 register e due=4000 sent=s.4/2 -> due 4000, e at 4000
        2300 register d due=4000 sent=s.3/2 -> due 4000, d at 4000
        2300 register c due=4000 sent=s.3/2 -> d before, due 4000
        # What was answered or given up is not stored any more, however late it comes.
        2400 register c due=4000 sent=s.1/1 -> given up
        2500 register f due=4000 sent=s.9/9 -> due 4000, f at 4000
        2500 register c due=4000 sent=s.4/2 -> given up
        # Others count for themselves.
        2600 register g due=4000 sent=t.1/1 -> due 4000, g at 4000
        # It has stored something since.
        2700 forget - sender=s..2400        -> stored
        2800 register c due=4000 sent=s.9/9 -> f before, due 4000
        2900 forget - sender=s..2500        -> stored
        3000 register h due=4000 sent=s.9/9 -> due 4000, h at 4000
        ",
    );
    let stored = |sender| {
        let row: SenderRow = world.get(&Key::sender(GROUP, sender_hash(sender))).unwrap();
        row.stored.iter().map(|one| (one.number, name_of(one.id))).collect::<Vec<_>>()
    };
    assert_eq!((stored("s"), stored("t")), (vec![(9, 'h')], vec![(1, 'g')]));
}

#[test]
fn a_dead_letter_is_played_again_or_thrown_away() {
    let world = script(
        policy(Retry { attempts_max: 1, ..three_tries().retry }),
        "
        1000 register a due=2000 name=n -> due 2000, a at 2000
        2001 settle a 0.1 failed  -> settled, a ended
        2500 replay a@2001 x by=other -> notfound
        2500 replay a@2001 x by=me -> replayed as x, x at 2500
        2500 replay a@2001 y      -> notfound
        # It dies once more, in the name of the task that it stands in for.
        2600 settle x 0.1 failed  -> settled, x ended
        2700 replay a@2600 y      -> replayed as y, y at 2700
        2701 settle y 0.1 ok      -> settled, y ended
        1000 register b due=3000  -> due 3000, b at 3000
        3000 settle b 0.1 failed  -> settled, b ended
        3001 purge b@3000 by=other -> notfound
        3001 purge b@3000         -> stored
        3001 purge b@3000         -> notfound
        ",
    );
    assert_eq!(world.history("a"), "0 dead, 0 dead, 0 acknowledged");
    assert_eq!(world.meta.dead_letters, 0);
    world.leaves_only_history(4);
}

#[test]
fn a_copy_of_a_dead_letter_goes_to_its_destination() {
    let with_copy = Policy {
        dead_letter: Some("tcp://graveyard:1".into()),
        ..policy(Retry { attempts_max: 1, ..three_tries().retry })
    };
    let mut world = script(with_copy, "1000 register a due=2000 name=n -> due 2000, a at 2000");
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
