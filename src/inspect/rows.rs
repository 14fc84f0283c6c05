//! Everything stored, for people: one line per row.
//!
//! ```text
//!   state g1 task 0190f1c2-... client=orders policy=9f86d081... due=1700000060000 payload=3 bytes "abc"
//!   log   g1 entry 17 term=2 command now=1700000000000 armed=0 requests=2 policies=1 bytes=131
//! ```
//!
//! A row that cannot be read is shown as such, with the reason, and the dump goes on: it is wanted most when something
//! is damaged. Secrets are stored hashed, and not even the hashes are shown.

use std::fmt::Write as _;
use std::io::{self, Write};

use openraft::entry::EntryPayload;
use serde::de::DeserializeOwned;

use crate::raft::state_machine::decode_membership;
use crate::raft::types::{ReplicaId, Vote, VoteRow, decode_entry, term_of};
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

pub(super) fn hex(bytes: &[u8]) -> String {
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
}
