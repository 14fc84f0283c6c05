//! Each stored row, decoded, and as a line for people.
//!
//! ```text
//!   state g1 task 0190f1c2-... client=orders policy=9f86d081... due=1700000060000 payload=3 bytes "abc"
//!   log   g1 entry 17 term=2 command now=1700000000000 armed=0 requests=2 policies=1 bytes=131
//! ```
//!
//! A row that cannot be read is shown as such, with the reason, and the dump goes on: it is wanted most when something
//! is damaged. Secrets are not shown, nor their hashes, and so nothing of the bytes of a row that cannot be read.

use std::fmt::{self, Write as _};
use std::io::{self, Write};

use data_encoding::HEXLOWER;
use openraft::entry::EntryPayload;
use serde::de::DeserializeOwned;
use serde::ser::{Serialize, SerializeStruct, Serializer};

use crate::raft::state_machine::decode_membership;
use crate::raft::types::{LogId, Membership, ReplicaId, StoredMembership, Vote, VoteRow, decode_entry, term_of};
use crate::shard::Batch;
use crate::store::engine::Family;
use crate::store::keys::{Key, Parsed, ParsedLog, parse_log, parse_state};
use crate::store::rows::{
    ApiKeyRow, Applied, ClientRow, CursorRow, DeadLetterRow, DedupRow, HistoryRow, PolicyRow, Role, SenderRow,
    ShardMetaRow, StandInsRow, TaskRow, TimelineRow,
};
use crate::store::{Store, StoreError, codec};
use crate::task::{DedupHash, GroupId, Policy, PolicyId};

/// What is shown of a payload; it may be half a megabyte.
const PAYLOAD_BYTES_SHOWN: usize = 32;

/// Writes every row, `state` first, in the order of the keys.
pub fn dump(store: &Store, out: &mut impl Write) -> io::Result<()> {
    each_line(store, None, |line| writeln!(out, "{line}"))
}

/// All rows, or those of one group, `state` first, in the order of the keys.
pub fn each_line<E: From<StoreError>>(
    store: &Store,
    group: Option<GroupId>,
    mut see: impl FnMut(&Line) -> Result<(), E>,
) -> Result<(), E> {
    let range = group.map(Key::group_range);
    let (from, until) = range.map_or((Key::first(), None), |(from, until)| (from, Some(until)));
    for family in [Family::State, Family::Log] {
        let mut rows = store.pin(family, &from, until.as_ref());
        while let Some((key, value)) = rows.next()? {
            see(&Line::of(family, key, value))?;
        }
    }
    Ok(())
}

/// A row as people read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub family: Family,
    /// `None`: the node's own, or a key that is not one of ours.
    pub group: Option<GroupId>,
    /// What it is of, as its key says.
    pub row: String,
    /// What it holds, or why that cannot be read.
    pub value: Result<String, String>,
}

impl Line {
    pub fn of(family: Family, key: &[u8], value: &[u8]) -> Self {
        match family {
            Family::State => Self::of_state(key, value),
            Family::Log => Self::of_log(key, value),
        }
    }

    fn of_state(key: &[u8], value: &[u8]) -> Self {
        let Some((group, parsed)) = parse_state(key) else { return Self::foreign(Family::State, key, value) };
        let group = (parsed != Parsed::NodeOpened).then_some(group);
        let shown = decode_state(&parsed, value).map(StateRow::shown);
        Self { family: Family::State, group, row: state_name(&parsed), value: shown.map_err(|why| damage(&why, value)) }
    }

    fn of_log(key: &[u8], value: &[u8]) -> Self {
        let Some((group, parsed)) = parse_log(key) else { return Self::foreign(Family::Log, key, value) };
        let shown = decode_log(&parsed, value).map(LogRow::shown);
        let row = log_name(&parsed);
        Self { family: Family::Log, group: Some(group), row, value: shown.map_err(|why| damage(&why, value)) }
    }

    fn foreign(family: Family, key: &[u8], value: &[u8]) -> Self {
        let why = StoreError::damaged("the key", "it is not one of ours");
        Self { family, group: None, row: format!("key {}", HEXLOWER.encode(key)), value: Err(damage(&why, value)) }
    }

    fn family(&self) -> &'static str {
        match self.family {
            Family::State => "state",
            Family::Log => "log",
        }
    }
}

/// Why a row cannot be read, with its length instead of its bytes, which may be those of a secret.
fn damage(why: &StoreError, value: &[u8]) -> String {
    format!("{why} ({} bytes)", value.len())
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<5} ", self.family())?;
        if let Some(group) = self.group {
            write!(f, "{group} ")?;
        }
        f.write_str(&self.row)?;
        match &self.value {
            Ok(value) if value.is_empty() => Ok(()),
            Ok(value) => write!(f, " {value}"),
            Err(why) => write!(f, " ? {why}"),
        }
    }
}

impl Serialize for Line {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut line = serializer.serialize_struct("Line", 4)?;
        line.serialize_field("family", self.family())?;
        line.serialize_field("group", &self.group)?;
        line.serialize_field("row", &self.row)?;
        match &self.value {
            Ok(value) => line.serialize_field("value", value)?,
            Err(why) => line.serialize_field("damaged", why)?,
        }
        line.end()
    }
}

/// What a row of the state holds. Each kind is named, here and below: a new one does not compile before it can be shown.
pub enum StateRow {
    Task(TaskRow),
    Timeline(TimelineRow),
    Cursor(CursorRow),
    Policy(PolicyRow),
    DeadLetter(Box<DeadLetterRow>),
    Dedup(DedupRow),
    DedupEnd(Vec<DedupHash>),
    Sender(SenderRow),
    History(HistoryRow),
    /// The key says all.
    Index,
    StandIns(StandInsRow),
    Applied(Applied),
    Membership(StoredMembership),
    ShardMeta(ShardMetaRow),
    Client(Box<ClientRow>),
    ApiKey(ApiKeyRow),
    NodeOpened,
}

/// Reads the value of the row that `key` names.
pub fn decode_state(key: &Parsed, value: &[u8]) -> Result<StateRow, StoreError> {
    Ok(match key {
        Parsed::Task(_) => StateRow::Task(read(value)?),
        Parsed::Timeline(..) | Parsed::ByClient(..) => StateRow::Timeline(read(value)?),
        Parsed::Cursor(_) => StateRow::Cursor(read(value)?),
        Parsed::Policy(_) => StateRow::Policy(read(value)?),
        Parsed::DeadLetter(_) => StateRow::DeadLetter(read(value)?),
        Parsed::Dedup(_) => StateRow::Dedup(read(value)?),
        Parsed::DedupEnd(..) => StateRow::DedupEnd(read(value)?),
        Parsed::Sender(_) => StateRow::Sender(read(value)?),
        Parsed::History(..) => StateRow::History(read(value)?),
        Parsed::LetterOfClient(..) | Parsed::ByTag(_) => read(value).map(|()| StateRow::Index)?,
        Parsed::StandIns(_) => StateRow::StandIns(read(value)?),
        Parsed::Applied => StateRow::Applied(read(value)?),
        Parsed::Membership => StateRow::Membership(decode_membership(value)?),
        Parsed::ShardMeta => StateRow::ShardMeta(read(value)?),
        Parsed::Client(_) => StateRow::Client(read(value)?),
        Parsed::ApiKey(_) => StateRow::ApiKey(read(value)?),
        // Written at every start, and empty.
        Parsed::NodeOpened => StateRow::NodeOpened,
    })
}

/// The kind of a row, as it is counted and named.
pub fn kind(key: &Parsed) -> &'static str {
    match key {
        Parsed::Task(_) => "task",
        Parsed::Timeline(..) => "timeline",
        Parsed::Cursor(_) => "cursor",
        Parsed::Policy(_) => "policy",
        Parsed::DeadLetter(_) => "dead-letter",
        Parsed::Dedup(_) => "dedup",
        Parsed::DedupEnd(..) => "dedup-end",
        Parsed::Sender(_) => "sender",
        Parsed::History(..) => "history",
        Parsed::ByClient(..) => "by-client",
        Parsed::LetterOfClient(..) => "letter-of-client",
        Parsed::ByTag(_) => "by-tag",
        Parsed::StandIns(_) => "stand-ins",
        Parsed::Applied => "applied",
        Parsed::Membership => "membership",
        Parsed::ShardMeta => "meta",
        Parsed::Client(_) => "client",
        Parsed::ApiKey(_) => "api-key",
        Parsed::NodeOpened => "node opened",
    }
}

fn state_name(key: &Parsed) -> String {
    let kind = kind(key);
    match key {
        Parsed::Task(id) | Parsed::Cursor(id) | Parsed::ByTag(id) | Parsed::StandIns(id) => format!("{kind} {id}"),
        Parsed::Timeline(due_ms, id) => format!("{kind} {due_ms} {id}"),
        Parsed::Policy(id) => format!("{kind} {}", short(*id)),
        Parsed::DeadLetter(letter) => format!("{kind} {letter}"),
        Parsed::Dedup(hash) | Parsed::Sender(hash) => format!("{kind} {}", HEXLOWER.encode(&hash.0)),
        Parsed::DedupEnd(at, first) => format!("{kind} {at} {}", HEXLOWER.encode(&first.0)),
        Parsed::History(id, n, ended_ms) => format!("{kind} {id} {n} ended={ended_ms}"),
        Parsed::ByClient(hash, due_ms, id) => format!("{kind} {} {due_ms} {id}", HEXLOWER.encode(hash)),
        Parsed::LetterOfClient(hash, letter) => format!("{kind} {} {letter}", HEXLOWER.encode(hash)),
        Parsed::Client(name) | Parsed::ApiKey(name) => format!("{kind} {name:?}"),
        Parsed::Applied | Parsed::Membership | Parsed::ShardMeta | Parsed::NodeOpened => kind.to_owned(),
    }
}

impl StateRow {
    fn shown(self) -> String {
        match self {
            Self::Task(row) => task(row),
            Self::Timeline(row) => timeline(row),
            Self::Cursor(row) => cursor(row),
            Self::Policy(row) => policy_row(row),
            Self::DeadLetter(row) => dead_letter(*row),
            Self::Dedup(row) => dedup(row),
            Self::DedupEnd(keys) => keys.iter().map(|key| HEXLOWER.encode(&key.0)).collect::<Vec<_>>().join(" "),
            Self::Sender(row) => sender(row),
            Self::History(row) => history(row),
            Self::StandIns(StandInsRow(ids)) => format!("{ids:?}"),
            Self::Applied(row) => applied(row),
            Self::Membership(stored) => stored.to_string(),
            Self::ShardMeta(row) => shard_meta(row),
            Self::Client(row) => client(*row),
            Self::ApiKey(row) => api_key(row),
            Self::Index | Self::NodeOpened => String::new(),
        }
    }
}

/// What a row of the log holds.
pub enum LogRow {
    Vote(Vote),
    Purged(Applied),
    Replica(ReplicaId),
    Retired,
    Blank(LogId),
    Membership(LogId, Membership),
    /// The last number is that of its bytes.
    Command(LogId, Batch, usize),
}

/// Reads the value of the row that `key` names.
pub fn decode_log(key: &ParsedLog, value: &[u8]) -> Result<LogRow, StoreError> {
    Ok(match key {
        ParsedLog::Vote => LogRow::Vote(read::<VoteRow>(value)?.into()),
        ParsedLog::Purged => LogRow::Purged(read(value)?),
        ParsedLog::Replica => LogRow::Replica(read(value)?),
        ParsedLog::Retired => LogRow::Retired,
        ParsedLog::Entry(index) => {
            let entry = decode_entry(value)?;
            if entry.log_id.index != *index {
                return Err(StoreError::damaged("the value", format!("it is entry {}", entry.log_id.index)));
            }
            match entry.payload {
                EntryPayload::Blank => LogRow::Blank(entry.log_id),
                EntryPayload::Membership(membership) => LogRow::Membership(entry.log_id, membership),
                EntryPayload::Normal(command) => {
                    LogRow::Command(entry.log_id, Batch::decode(&command.0)?, command.0.len())
                }
            }
        }
    })
}

fn log_name(key: &ParsedLog) -> String {
    match key {
        ParsedLog::Vote => "vote".into(),
        ParsedLog::Purged => "purged".into(),
        ParsedLog::Replica => "replica".into(),
        ParsedLog::Retired => "retired".into(),
        ParsedLog::Entry(index) => format!("entry {index}"),
    }
}

impl LogRow {
    fn shown(self) -> String {
        match self {
            Self::Vote(vote) => vote.to_string(),
            Self::Purged(row) => applied(row),
            Self::Replica(id) => id.to_string(),
            Self::Retired => String::new(),
            Self::Blank(id) => format!("term={} blank", term_of(&id)),
            Self::Membership(id, membership) => format!("term={} membership {membership}", term_of(&id)),
            Self::Command(id, batch, bytes) => {
                let Batch { now_ms, armed_ms, policies, requests, keep_history: _ } = batch;
                let (term, requests, policies) = (term_of(&id), requests.len(), policies.len());
                format!(
                    "term={term} command now={now_ms} armed={armed_ms} requests={requests} policies={policies} bytes={bytes}"
                )
            }
        }
    }
}

fn read<T: DeserializeOwned>(value: &[u8]) -> Result<T, StoreError> {
    codec::decode("the value", value)
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
        without_user(callback.endpoint.as_str()),
        callback.options,
        retry.attempts_max,
        retry.backoff,
        retry.interval_ms,
        retry.interval_max_ms,
        retry.jitter_percent
    );
    if let Some(to) = dead_letter {
        write!(out, " dead-letters={:?}", without_user(to)).expect("a String grows");
    }
    out
}

/// A URL without the name and password it may hold before its host.
fn without_user(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    match authority.rsplit_once('@') {
        Some((_, host)) => format!("{scheme}://***@{host}{path}"),
        None => url.to_owned(),
    }
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

fn short(id: PolicyId) -> String {
    HEXLOWER.encode(&id.0[..4])
}

fn bytes(bytes: &[u8]) -> String {
    let shown = &bytes[..bytes.len().min(PAYLOAD_BYTES_SHOWN)];
    let more = if shown.len() < bytes.len() { "..." } else { "" };
    format!("{} bytes \"{}\"{more}", bytes.len(), shown.escape_ascii())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{GROUP, fill};
    use super::*;
    use crate::raft::types::{LogEntry, encode_entry, log_id};
    use crate::store::LogWrite;
    use crate::store::overlay::Write as StateWrite;
    use openraft::entry::Entry;

    fn lines(store: &Store) -> Vec<String> {
        let mut out = Vec::new();
        dump(store, &mut out).unwrap();
        String::from_utf8(out).unwrap().lines().map(str::to_owned).collect()
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
        assert!(
            text.contains("http http://***@h/due ") && text.contains("dead-letters=\"https://***@dead\""),
            "{text}"
        );
        for secret in ["argon2", "whsec", "swordfish"] {
            assert!(!text.contains(secret), "{text}");
        }
    }

    #[test]
    fn what_is_damaged_is_shown_and_does_not_end_the_dump() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::open(temp.path()).unwrap();
        store.write_state([(Key::shard_meta(GROUP), StateWrite::Put(vec![99]))]).unwrap();
        store.write_state([(Key::from_stored(vec![0, 1, 200]), StateWrite::Put(vec![1]))]).unwrap();
        let cut_off = b"\x03\x1e$argon2id$v=19$m=19456".to_vec();
        store.write_state([(Key::client("orders"), StateWrite::Put(cut_off))]).unwrap();
        let entry: LogEntry = Entry { log_id: log_id(1, 8), payload: EntryPayload::Blank };
        store.write_log(vec![LogWrite::Put(Key::log_entry(GROUP, 7), encode_entry(&entry))]).unwrap();
        let text = lines(&store).join("\n");
        assert!(text.contains("g1 meta ? the value is damaged: version 99"), "{text}");
        assert!(text.contains("state key 0001c8 ? the key is damaged: it is not one of ours (1 bytes)"), "{text}");
        assert!(text.contains("g1 entry 7 ? the value is damaged: it is entry 8"), "{text}");
        assert!(
            text.contains("state g0 client \"orders\" ? the value is damaged: ") && !text.contains("argon2"),
            "{text}"
        );
    }
}
