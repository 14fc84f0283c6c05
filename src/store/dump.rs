//! Everything stored, for people: one line per row, used by tests and when something has to be looked at; and a digest,
//! to tell whether two replicas hold the same.
//!
//! ```text
//!   state g1 task 0190f1c2-... client=orders policy=9f86d081... due=1700000060000 payload=3 bytes "abc"
//!   log   g1 entry 17 term=2 command now=1700000000000 armed=0 requests=2 policies=1 bytes=131
//! ```
//!
//! A row that cannot be read is shown as such, with the reason, and the dump goes on: it is wanted most when something
//! is damaged. Secrets are stored hashed, and not even the hashes are shown.
//!
//! This is the one file of the room that looks upwards: what lies in the log only `raft` and `shard` can decode.

use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvError;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use openraft::entry::EntryPayload;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

use super::keys::{Key, Parsed, ParsedLog, parse_log, parse_state};
use super::rows::{
    ApiKeyRow, Applied, ClientRow, CursorRow, DeadLetterRow, DedupRow, HistoryRow, PolicyRow, Role, SenderRow,
    ShardMetaRow, StandInsRow, TaskRow, TimelineRow,
};
use super::engine::Family;
use super::{Store, StoreError, codec};
use crate::raft::state_machine::decode_membership;
use crate::raft::types::{ReplicaId, Vote, VoteRow, decode_entry, term_of};
use crate::shard::Batch;
use crate::task::{DedupHash, GroupId, Policy, PolicyId};

/// What is shown of a payload; it may be half a megabyte.
const PAYLOAD_BYTES_SHOWN: usize = 32;

/// Writes every row, `state` first, in the order of the keys.
pub fn dump(store: &Store, out: &mut impl Write) -> io::Result<()> {
    let mut rows = store.pin(Family::State, &Key::first(), None);
    while let Some((key, value)) = rows.next()? {
        writeln!(out, "state {}", state_line(key, value))?;
    }
    let mut rows = store.pin(Family::Log, &Key::first(), None);
    while let Some((key, value)) = rows.next()? {
        writeln!(out, "log   {}", log_line(key, value))?;
    }
    Ok(())
}

/// One row of `state`, readable.
pub fn state_line(key: &[u8], value: &[u8]) -> String {
    let Some((group, parsed)) = parse_state(key) else { return foreign(key, value) };
    // Every kind is named here, without a `_`: a new one does not compile before it can be shown.
    let (name, shown) = match parsed {
        Parsed::Task(id) => (format!("task {id}"), row(value, task)),
        Parsed::Timeline(due_ms, id) => (format!("timeline {due_ms} {id}"), row(value, timeline)),
        Parsed::Cursor(id) => (format!("cursor {id}"), row(value, cursor)),
        Parsed::Policy(id) => (format!("policy {}", short(id)), row(value, policy_row)),
        Parsed::DeadLetter(letter) => (format!("dead-letter {letter}"), row(value, dead_letter)),
        Parsed::Dedup(hash) => (format!("dedup {}", hex(&hash.0)), row(value, dedup)),
        Parsed::Sender(hash) => (format!("sender {}", hex(&hash.0)), row(value, sender)),
        Parsed::DedupEnd(at, first) => (
            format!("dedup-end {at} {}", hex(&first.0)),
            row(value, |keys: Vec<DedupHash>| {
                let keys: Vec<String> = keys.iter().map(|key| hex(&key.0)).collect();
                keys.join(" ")
            }),
        ),
        Parsed::History(id, n, ended_ms) => (format!("history {id} {n} ended={ended_ms}"), row(value, history)),
        Parsed::ByClient(hash, due_ms, id) => (format!("by-client {} {due_ms} {id}", hex(&hash)), row(value, timeline)),
        Parsed::LetterOfClient(hash, letter) => {
            (format!("letter-of-client {} {letter}", hex(&hash)), row(value, |(): ()| String::new()))
        }
        Parsed::ByTag(id) => (format!("by-tag {id}"), row(value, |(): ()| String::new())),
        Parsed::StandIns(id) => (format!("stand-ins {id}"), row(value, |StandInsRow(ids)| format!("{ids:?}"))),
        Parsed::Applied => ("applied".into(), row(value, applied)),
        Parsed::Membership => ("membership".into(), decode_membership(value).map(|stored| stored.to_string())),
        Parsed::ShardMeta => ("meta".into(), row(value, shard_meta)),
        Parsed::Client(name) => (format!("client {name:?}"), row(value, client)),
        Parsed::ApiKey(id) => (format!("api-key {id:?}"), row(value, api_key)),
        Parsed::NodeOpened => return "node opened".into(),
    };
    line(group, &name, shown, value)
}

/// One row of `log`, readable.
pub fn log_line(key: &[u8], value: &[u8]) -> String {
    let Some((group, parsed)) = parse_log(key) else { return foreign(key, value) };
    let (name, shown) = match parsed {
        ParsedLog::Vote => {
            ("vote".into(), codec::decode::<VoteRow>("the vote", value).map(|row| Vote::from(row).to_string()))
        }
        ParsedLog::Purged => ("purged".into(), row(value, applied)),
        ParsedLog::Retired => ("retired".into(), Ok(String::new())),
        ParsedLog::Replica => ("replica".into(), row(value, |id: ReplicaId| id.to_string())),
        ParsedLog::Entry(index) => (format!("entry {index}"), entry(index, value)),
    };
    line(group, &name, shown, value)
}

fn line(group: GroupId, name: &str, shown: Result<String, StoreError>, value: &[u8]) -> String {
    match shown {
        Ok(shown) => format!("{group} {name} {shown}"),
        Err(error) => format!("{group} {name} ? {error}: {}", bytes(value)),
    }
}

fn foreign(key: &[u8], value: &[u8]) -> String {
    format!("? key {} is not one of ours, value {}", hex(key), bytes(value))
}

fn row<T: DeserializeOwned>(value: &[u8], show: impl FnOnce(T) -> String) -> Result<String, StoreError> {
    codec::decode("the value", value).map(show)
}

fn task(row: TaskRow) -> String {
    let TaskRow { client, policy, first_due_ms, first_occurrence, recurrence, version, tags, role, payload } = row;
    let mut out = format!("client={client} policy={} due={first_due_ms} version={version}", short(policy));
    let mut more = |text: String| out.push_str(&text);
    if first_occurrence > 0 {
        more(format!(" from-occurrence={first_occurrence}"));
    }
    if let Some(recurrence) = recurrence {
        more(format!(" every={} {recurrence:?}", recurrence.interval_ms));
    }
    if let Some(tags) = tags {
        more(format!(" name={:?} labels={:?}", tags.name(), tags.labels()));
    }
    match role {
        Role::Own => {}
        Role::StandIn { task, occurrence, due_ms } => more(format!(" stands-in-for={task}.{occurrence} of={due_ms}")),
        Role::Copy(copy) => more(format!(" copy-of={}", copy.letter)),
    }
    out + &format!(" payload={}", bytes(&payload))
}

fn timeline(row: TimelineRow) -> String {
    let TimelineRow { occurrence, attempt, recurring } = row;
    format!("occurrence={occurrence} attempt={attempt}{}", if recurring { " recurring" } else { "" })
}

fn cursor(row: CursorRow) -> String {
    let CursorRow { due_ms, occurrence, attempt, failure, out_due_ms } = row;
    let failure = failure.map_or_else(String::new, |(failure, at)| format!(" failed={at} error={:?}", failure.text));
    let out = out_due_ms.map_or_else(String::new, |due_ms| format!(" out-since={due_ms}"));
    format!("due={due_ms} occurrence={occurrence} attempt={attempt}{out}{failure}")
}

fn sender(row: SenderRow) -> String {
    let stored: Vec<String> =
        row.stored.iter().map(|one| format!("{}={}@{}", one.number, one.id, one.due_ms)).collect();
    format!("answered below {}, seen {}, stored [{}]", row.answered_below, row.seen_ms, stored.join(" "))
}

fn dedup(row: DedupRow) -> String {
    let DedupRow { id, due_ms, expires_ms } = row;
    format!("task={id} due={due_ms} expires={expires_ms}")
}

fn history(row: HistoryRow) -> String {
    let HistoryRow { client, ended, count, due_ms, dispatched_ms, attempts, failure } = row;
    let failure = failure.map_or_else(String::new, |failure| format!(" error={:?}", failure.text));
    format!(
        "{ended:?} client={client} count={count} due={due_ms} dispatched={dispatched_ms} attempts={attempts}{failure}"
    )
}

fn policy_row(row: PolicyRow) -> String {
    let PolicyRow { policy, tasks } = row;
    format!("tasks={tasks} {}", policy_text(&policy))
}

fn policy_text(policy: &Policy) -> String {
    let Policy { callback, retry, dead_letter } = policy;
    let mut out = format!(
        "{} {} {:?} attempts={} {:?} interval={}..{} jitter={}%",
        callback.protocol,
        callback.endpoint,
        callback.options,
        retry.attempts_max,
        retry.backoff,
        retry.interval_ms,
        retry.interval_max_ms,
        retry.jitter_percent
    );
    if let Some(to) = dead_letter {
        write!(out, " dead-letters={to:?}").expect("a String grows");
    }
    out
}

fn dead_letter(row: DeadLetterRow) -> String {
    let DeadLetterRow { client, policy, payload, tags, occurrence, due_ms, attempts, failure, copy } = row;
    let name = tags.as_ref().and_then(|tags| tags.name());
    format!(
        "client={client} name={name:?} occurrence={occurrence} due={due_ms} attempts={attempts} error={:?} copy={copy:?} \
         payload={} {}",
        failure.text,
        bytes(&payload),
        policy_text(&policy)
    )
}

fn applied(row: Applied) -> String {
    let Applied { term, index } = row;
    format!("term={term} index={index}")
}

fn shard_meta(row: ShardMetaRow) -> String {
    let ShardMetaRow { now_ms, armed_ms, pending, dead_letters, missed } = row;
    format!("now={now_ms} armed={armed_ms} pending={pending} dead-letters={dead_letters} missed={missed}")
}

fn client(row: ClientRow) -> String {
    let ClientRow { password_hash: _, admin, policy, limits, since_ms, api_keys } = row;
    let policy = policy.as_ref().map_or_else(|| "no policy".into(), policy_text);
    format!("admin={admin} since={since_ms} api-keys={api_keys:?} {limits:?} {policy}")
}

fn api_key(row: ApiKeyRow) -> String {
    let ApiKeyRow { client, label, secret_hash: _, since_ms } = row;
    format!("client={client} label={label:?} since={since_ms}")
}

fn entry(index: u64, value: &[u8]) -> Result<String, StoreError> {
    let entry = decode_entry(value)?;
    if entry.log_id.index != index {
        return Err(StoreError::damaged("the value", format!("it is entry {}", entry.log_id.index)));
    }
    let payload = match entry.payload {
        EntryPayload::Blank => "blank".into(),
        EntryPayload::Membership(membership) => format!("membership {membership}"),
        EntryPayload::Normal(command) => {
            let Batch { now_ms, armed_ms, policies, requests, keep_history: _ } = Batch::decode(&command.0)?;
            let (requests, policies, bytes) = (requests.len(), policies.len(), command.0.len());
            format!("command now={now_ms} armed={armed_ms} requests={requests} policies={policies} bytes={bytes}")
        }
    };
    Ok(format!("term={} {payload}", term_of(&entry.log_id)))
}

fn short(id: PolicyId) -> String {
    hex(&id.0[..4])
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
        write!(out, "{byte:02x}").expect("a String grows");
        out
    })
}

fn bytes(bytes: &[u8]) -> String {
    let shown = &bytes[..bytes.len().min(PAYLOAD_BYTES_SHOWN)];
    let more = if shown.len() < bytes.len() { "..." } else { "" };
    format!("{} bytes \"{}\"{more}", bytes.len(), shown.escape_ascii())
}

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
        write!(f, "{} rows, applied {index}, {}", self.rows, hex(&self.hash[..8]))
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
        let mut threads = self.threads.lock().expect("no panic under this lock");
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
        let threads = std::mem::take(&mut *self.threads.lock().expect("no panic under this lock"));
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
    let applied_key = Key::applied(group);
    let mut digest = Digest { applied: None, rows: 0, hash: [0; 32] };
    let mut hash = Sha256::new();
    let mut add = |key: &[u8], value: &[u8]| {
        if key == applied_key.as_ref() {
            digest.applied = Some(codec::decode("last applied", value)?);
            return Ok(());
        }
        digest.rows += 1;
        // Lengths first, so that no byte can move from a key to its value unseen.
        for part in [key, value] {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        Ok::<(), StoreError>(())
    };
    let mut rows = store.pin(Family::State, &from, Some(&until));
    pinned();
    while let Some((key, value)) = rows.next()? {
        if !wanted() {
            return Ok(None);
        }
        add(key, value)?;
    }
    digest.hash = hash.finalize().into();
    Ok(Some(digest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::types::{Command, LogEntry, Member, Membership, encode_entry, log_id};
    use crate::store::LogWrite;
    use crate::store::keys::{TagKind, client_hash};
    use crate::store::overlay::Write as StateWrite;
    use crate::store::rows::{CopyState, Ended};
    use crate::task::{
        Callback, ClientId, ClientLimits, DeadLetterId, DedupHash, Failure, FailureClass, Protocol, Recurrence, Retry,
        ShardId, Tags, TaskId,
    };
    use openraft::entry::Entry;
    use serde::Serialize;
    use std::collections::{BTreeMap, BTreeSet};

    const GROUP: GroupId = GroupId(1);

    fn policy() -> Policy {
        let callback = Callback::new(Protocol::Tcp, "h:1").unwrap();
        Policy { callback, retry: Retry::default(), dead_letter: Some("http://dead/".into()) }
    }

    fn id() -> TaskId {
        TaskId::new(1_700_000_000_000, ShardId(0), 7)
    }

    fn put(store: &Store, key: Key, value: &impl Serialize) {
        store.write_state([(key, StateWrite::Put(codec::encode(value)))]).unwrap();
    }

    fn lines(store: &Store) -> Vec<String> {
        let mut out = Vec::new();
        dump(store, &mut out).unwrap();
        String::from_utf8(out).unwrap().lines().map(str::to_owned).collect()
    }

    /// One row of every kind.
    fn fill(store: &Store) {
        let client: ClientId = "orders".parse().unwrap();
        let payload = bytes::Bytes::from(vec![b'x'; 100]);
        put(
            store,
            Key::task(GROUP, id()),
            &TaskRow {
                client: client.clone(),
                policy: policy().id(),
                first_due_ms: 5,
                first_occurrence: 0,
                recurrence: Some(Recurrence::every(9)),
                version: 1,
                tags: Some(Tags::new("nightly", [("env".into(), "test".into())]).unwrap()),
                role: Role::StandIn { task: id(), occurrence: 7, due_ms: 3 },
                payload: payload.clone(),
            },
        );
        let row = TimelineRow { occurrence: 1, attempt: 2, recurring: true };
        put(store, Key::timeline(GROUP, 5, id()), &row);
        let hash = client_hash(&client);
        put(store, Key::by_client(GROUP, hash, 5, id()), &row);
        put(store, Key::by_tag(GROUP, hash, TagKind::Name, "nightly", id()), &());
        let failure = Failure::new(FailureClass::Refused, "refused");
        let failed = Some((failure.clone(), 4));
        let cursor = CursorRow { due_ms: 5, occurrence: 1, attempt: 2, failure: failed, out_due_ms: None };
        put(store, Key::cursor(GROUP, id()), &cursor);
        let key = DedupHash::new(&client, "key").unwrap();
        put(store, Key::dedup(GROUP, key), &DedupRow { id: id(), due_ms: 5, expires_ms: 50 });
        put(store, Key::dedup_end(GROUP, 50, key), &vec![key]);
        put(store, Key::stand_ins(GROUP, id()), &StandInsRow(vec![id()]));
        let ended = HistoryRow {
            client: client.clone(),
            ended: Ended::Acknowledged,
            count: 1,
            due_ms: 2,
            dispatched_ms: 3,
            attempts: 1,
            failure: None,
        };
        put(store, Key::history(GROUP, 4, id(), 0), &ended);
        put(store, Key::policy(GROUP, policy().id()), &PolicyRow { policy: policy(), tasks: 1 });
        let died = DeadLetterRow {
            client: client.clone(),
            policy: policy(),
            payload,
            occurrence: 1,
            due_ms: 5,
            attempts: 3,
            failure,
            tags: None,
            copy: CopyState::UnderWay,
        };
        let letter = DeadLetterId { died_ms: 6, task: id() };
        put(store, Key::dead_letter(GROUP, letter), &died);
        put(store, Key::letter_of_client(GROUP, hash, letter), &());
        put(store, Key::applied(GROUP), &Applied { term: 1, index: 3 });
        put(store, Key::shard_meta(GROUP), &ShardMetaRow::default());
        let row = ClientRow {
            password_hash: "$argon2id$secret".into(),
            admin: true,
            policy: None,
            limits: ClientLimits::default(),
            since_ms: 1,
            api_keys: vec!["k1".into()],
        };
        put(store, Key::client("orders"), &row);
        let row = ApiKeyRow { client, label: "ci".into(), secret_hash: [7; 32], since_ms: 1 };
        put(store, Key::api_key("k1"), &row);

        let members = BTreeMap::from([(1, Member { node_id: 4 })]);
        let membership = Membership::new(vec![BTreeSet::from([1])], members).unwrap();
        let batch = Batch { now_ms: 11, ..Batch::default() }.encode(64);
        let payloads =
            [EntryPayload::Blank, EntryPayload::Membership(membership), EntryPayload::Normal(Command(batch))];
        for (index, payload) in (1..).zip(payloads) {
            let entry: LogEntry = Entry { log_id: log_id(1, index), payload };
            store.write_log(vec![LogWrite::Put(Key::log_entry(GROUP, index), encode_entry(&entry))]).unwrap();
        }
        let vote = VoteRow::from(&Vote::new(3, 1));
        store
            .write_log(vec![
                LogWrite::Put(Key::log_vote(GROUP), codec::encode(&vote)),
                LogWrite::Put(Key::log_purged(GROUP), codec::encode(&Applied { term: 1, index: 0 })),
                LogWrite::Put(Key::log_replica(GROUP), codec::encode(&1u64)),
            ])
            .unwrap();
    }

    #[test]
    fn every_row_is_a_line_and_secrets_are_not_shown() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::open(temp.path()).unwrap();
        fill(&store);
        let lines = lines(&store);
        let text = lines.join("\n");
        assert!(!text.contains('?'), "{text}");
        // Membership is the one kind of `state` that is not here; see the tests of `raft`, which dump real groups.
        assert_eq!(lines.len(), 16 + 1 + 6, "{text}");
        for wanted in [
            "state g1 task ",
            "payload=100 bytes \"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\"...",
            "state g1 timeline 5 ",
            "state g1 cursor ",
            "state g1 policy ",
            "state g1 dead-letter ",
            "@6 client=orders",
            "state g1 letter-of-client ",
            "state g1 history ",
            "Acknowledged client=orders",
            "state g1 dedup ",
            "state g1 dedup-end 50 ",
            "state g1 by-client ",
            "state g1 by-tag ",
            "state g1 stand-ins ",
            "stands-in-for=",
            "name=Some(\"nightly\")",
            "error=\"refused\"",
            "state g1 applied term=1 index=3",
            "state g1 meta now=0",
            "state g0 client \"orders\" admin=true",
            "state g0 api-key \"k1\" client=orders",
            "state node opened",
            "log   g1 entry 1 term=1 blank",
            "log   g1 entry 2 term=1 membership ",
            "log   g1 entry 3 term=1 command now=11",
            "log   g1 vote ",
            "log   g1 purged term=1 index=0",
            "log   g1 replica 1",
        ] {
            assert!(text.contains(wanted), "{wanted} is missing in:\n{text}");
        }
        assert!(!text.contains("argon2"), "{text}");
    }

    #[test]
    fn what_is_damaged_is_shown_and_does_not_end_the_dump() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::open(temp.path()).unwrap();
        store.write_state([(Key::shard_meta(GROUP), StateWrite::Put(vec![99]))]).unwrap();
        store.write_state([(Key::from_stored(vec![0, 1, 200]), StateWrite::Put(vec![1]))]).unwrap();
        let entry: LogEntry = Entry { log_id: log_id(1, 8), payload: EntryPayload::Blank };
        store.write_log(vec![LogWrite::Put(Key::log_entry(GROUP, 7), encode_entry(&entry))]).unwrap();
        let text = lines(&store).join("\n");
        assert!(text.contains("g1 meta ? the value is damaged: version 99"), "{text}");
        assert!(text.contains("? key 0001c8 is not one of ours"), "{text}");
        assert!(text.contains("g1 entry 7 ? the value is damaged: it is entry 8"), "{text}");
    }

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
