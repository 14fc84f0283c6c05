//! A data folder on a page.

use std::collections::BTreeMap;
use std::io::{self, Write};

use data_encoding::HEXLOWER;
use serde::Serialize;

use super::InspectError;
use super::digest::Digester;
use super::folder::StoppedFolder;
use super::rows::{Line, LogRow, StateRow, decode_log, decode_state, kind};
use crate::raft::types::{LogId, Membership, ReplicaId};
use crate::store::StoreError;
use crate::store::engine::Family;
use crate::store::keys::{Key, Parsed, ParsedLog, parse_log, parse_state};
use crate::store::rows::Applied;
use crate::task::when::format_instant;
use crate::task::{GroupId, InstantMs, SHARDS_MAX};

/// Damage beyond this is counted and not named: where it is everywhere, that is what has to be said.
const DAMAGE_NAMED_MAX: usize = 20;
/// Clients that are named in a text.
const CLIENTS_NAMED_MAX: usize = 10;

/// What is in a data folder. Its fields are those of the JSON.
#[derive(Serialize)]
pub struct Summary {
    data_dir: String,
    format: u32,
    cluster: String,
    node_id: u64,
    /// Of the cluster, not of this node.
    shards: u16,
    tasks: u64,
    dead_letters: u64,
    dedup_keys: u64,
    /// Known where the cluster's own group is.
    clients: Vec<String>,
    api_keys: u64,
    groups: Vec<GroupSummary>,
    /// Rows that cannot be read, and entries that are missing.
    pub(super) damaged_rows: u64,
    /// The first of them, with the reason.
    damaged: Vec<String>,
}

/// What a node holds of a group.
#[derive(Serialize)]
struct GroupSummary {
    group: u16,
    shard: Option<u16>,
    /// `None`: it was begun and never got a number.
    replica: Option<ReplicaId>,
    /// It was released; what is left goes at the next start.
    retired: bool,
    vote: Option<VoteSummary>,
    applied: Option<Applied>,
    log: LogSummary,
    /// Entries of the log that are above `applied`: the node applies them when it starts, or as soon as a leader says so.
    to_apply: u64,
    membership: Option<MembershipSummary>,
    /// One that is in the log and not applied yet.
    next_membership: Option<MembershipSummary>,
    /// The stamp of the last command, Unix milliseconds.
    time_ms: Option<InstantMs>,
    /// What is due up to here may have been dispatched, Unix milliseconds.
    armed_ms: Option<InstantMs>,
    tasks: u64,
    dead_letters: u64,
    dedup_keys: u64,
    /// Rows of each kind.
    rows: BTreeMap<&'static str, u64>,
    /// Of keys and values, as they are before compression.
    bytes: u64,
    /// The same on every replica that has applied the same entries.
    digest: String,
}

#[derive(Serialize)]
struct VoteSummary {
    term: u64,
    voted_for: ReplicaId,
    /// It leads, or has led.
    committed: bool,
}

#[derive(Serialize, Default)]
struct LogSummary {
    purged: Option<Applied>,
    first: Option<u64>,
    last: Option<Applied>,
    entries: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct MembershipSummary {
    index: Option<u64>,
    voters: Vec<MemberSummary>,
    learners: Vec<MemberSummary>,
}

#[derive(Serialize)]
struct MemberSummary {
    replica: ReplicaId,
    node_id: u64,
}

impl MembershipSummary {
    fn of(log_id: Option<LogId>, membership: &Membership) -> Self {
        let member = |replica| {
            let node_id = membership.get_node(&replica).map_or(0, |member| member.node_id);
            MemberSummary { replica, node_id }
        };
        let mut voters: Vec<ReplicaId> = membership.voter_ids().collect();
        // In a joint configuration most are there twice.
        voters.sort_unstable();
        voters.dedup();
        let learners = membership.learner_ids().map(member).collect();
        Self { index: log_id.map(|id| id.index), voters: voters.into_iter().map(member).collect(), learners }
    }
}

/// A group while its rows are read.
struct Reading {
    summary: GroupSummary,
    digester: Digester,
    /// The entry that has to come next.
    next: u64,
}

impl Reading {
    fn of(group: GroupId) -> Self {
        let summary = GroupSummary {
            group: group.0,
            shard: group.shard().map(|shard| shard.0),
            replica: None,
            retired: false,
            vote: None,
            applied: None,
            log: LogSummary::default(),
            to_apply: 0,
            membership: None,
            next_membership: None,
            time_ms: None,
            armed_ms: None,
            tasks: 0,
            dead_letters: 0,
            dedup_keys: 0,
            rows: BTreeMap::new(),
            bytes: 0,
            digest: String::new(),
        };
        Self { summary, digester: Digester::of(group), next: 0 }
    }
}

#[derive(Default)]
struct Reader {
    groups: BTreeMap<GroupId, Reading>,
    clients: Vec<String>,
    api_keys: u64,
    damaged_rows: u64,
    damaged: Vec<String>,
}

impl Reader {
    fn group(&mut self, group: GroupId) -> &mut Reading {
        self.groups.entry(group).or_insert_with(|| Reading::of(group))
    }

    fn damage(&mut self, rows: u64, shown: impl FnOnce() -> String) {
        self.damaged_rows += rows;
        if self.damaged.len() < DAMAGE_NAMED_MAX {
            self.damaged.push(shown());
        }
    }

    fn damaged_row(&mut self, family: Family, key: &[u8], value: &[u8]) {
        self.damage(1, || Line::of(family, key, value).to_string());
    }

    fn state(&mut self, key: &[u8], value: &[u8]) {
        let Some((group, parsed)) = parse_state(key) else { return self.damaged_row(Family::State, key, value) };
        if parsed == Parsed::NodeOpened {
            return;
        }
        let of = self.group(group);
        *of.summary.rows.entry(kind(&parsed)).or_default() += 1;
        of.summary.bytes += (key.len() + value.len()) as u64;
        // It fails where the row is damaged, which is found below.
        let _ = of.digester.add(key, value);
        match &parsed {
            Parsed::Task(_) => of.summary.tasks += 1,
            Parsed::DeadLetter(_) => of.summary.dead_letters += 1,
            Parsed::Dedup(_) => of.summary.dedup_keys += 1,
            Parsed::Client(name) => self.clients.push(name.clone()),
            Parsed::ApiKey(_) => self.api_keys += 1,
            _ => {}
        }
        let summary = &mut self.group(group).summary;
        match decode_state(&parsed, value) {
            Ok(StateRow::Applied(applied)) => summary.applied = Some(applied),
            Ok(StateRow::Membership(stored)) => {
                summary.membership = Some(MembershipSummary::of(*stored.log_id(), stored.membership()));
            }
            Ok(StateRow::ShardMeta(meta)) => {
                summary.time_ms = Some(meta.now_ms);
                summary.armed_ms = Some(meta.armed_ms);
            }
            Ok(_) => {}
            Err(_) => self.damaged_row(Family::State, key, value),
        }
    }

    fn log(&mut self, key: &[u8], value: &[u8]) {
        let Some((group, parsed)) = parse_log(key) else { return self.damaged_row(Family::Log, key, value) };
        if let ParsedLog::Entry(index) = parsed {
            self.entry(group, index, value.len());
        }
        let summary = &mut self.group(group).summary;
        let to_apply = |id: LogId| summary.applied.is_none_or(|applied| id.index > applied.index);
        match decode_log(&parsed, value) {
            Ok(LogRow::Vote(vote)) => {
                let (leader, committed) = (vote.leader_id, vote.committed);
                summary.vote = Some(VoteSummary { term: leader.term, voted_for: leader.voted_for, committed });
            }
            Ok(LogRow::Purged(purged)) => {
                summary.log.purged = Some(purged);
                self.group(group).next = purged.index + 1;
            }
            Ok(LogRow::Replica(replica)) => summary.replica = Some(replica),
            Ok(LogRow::Retired) => summary.retired = true,
            Ok(LogRow::Membership(id, membership)) => {
                if to_apply(id) {
                    summary.next_membership = Some(MembershipSummary::of(Some(id), &membership));
                }
                summary.log.last = Some(id.into());
            }
            Ok(LogRow::Blank(id) | LogRow::Command(id, ..)) => summary.log.last = Some(id.into()),
            Err(_) => self.damaged_row(Family::Log, key, value),
        }
    }

    fn entry(&mut self, group: GroupId, index: u64, bytes: usize) {
        let of = self.group(group);
        let log = &mut of.summary.log;
        log.first.get_or_insert(index);
        log.entries += 1;
        log.bytes += bytes as u64;
        of.summary.to_apply += u64::from(of.summary.applied.is_none_or(|applied| index > applied.index));
        // What was purged may be there still.
        let next = of.next;
        of.next = next.max(index + 1);
        if index > next {
            self.damage(index - next, || format!("log   {group} entries {next} to {} ? they are missing", index - 1));
        }
    }

    /// What was purged must be in the state.
    fn check_gap(&mut self) {
        let gaps: Vec<(u16, u64, u64)> = self
            .groups
            .values()
            .filter_map(|of| {
                let (purged, applied) = (of.summary.log.purged?.index, of.summary.applied.map(|applied| applied.index));
                let first = applied.map_or(0, |applied| applied + 1);
                (purged >= first).then_some((of.summary.group, first, purged))
            })
            .collect();
        for (group, first, last) in gaps {
            let shown =
                format!("log   g{group} entries {first} to {last} ? they were removed before they were applied");
            self.damage(last - first + 1, || shown);
        }
    }
}

impl Summary {
    /// Reads all there is, or all there is of one group.
    pub fn of(folder: &StoppedFolder, group: Option<GroupId>) -> Result<Self, InspectError> {
        let mut reader = Reader::default();
        let range = group.map(Key::group_range);
        let (from, until) = range.map_or((Key::first(), None), |(from, until)| (from, Some(until)));
        let mut rows = folder.store.pin(Family::State, &from, until.as_ref());
        while let Some((key, value)) = rows.next()? {
            reader.state(key, value);
        }
        let mut rows = folder.store.pin(Family::Log, &from, until.as_ref());
        while let Some((key, value)) = rows.next()? {
            reader.log(key, value);
        }
        reader.check_gap();
        if let Some(group) = group
            && reader.groups.is_empty()
        {
            return Err(no_group(folder, group)?);
        }
        let finished = reader.groups.into_values().map(|Reading { summary, digester, .. }| {
            let digest = HEXLOWER.encode(&digester.finish().hash);
            GroupSummary { digest, ..summary }
        });
        let groups: Vec<GroupSummary> = finished.collect();
        let sum = |count: fn(&GroupSummary) -> u64| groups.iter().map(count).sum();
        let identity = folder.identity.clone();
        Ok(Self {
            data_dir: folder.path.display().to_string(),
            format: identity.format,
            cluster: identity.cluster,
            node_id: identity.node_id,
            shards: identity.shards,
            tasks: sum(|group| group.tasks),
            dead_letters: sum(|group| group.dead_letters),
            dedup_keys: sum(|group| group.dedup_keys),
            clients: reader.clients,
            api_keys: reader.api_keys,
            groups,
            damaged_rows: reader.damaged_rows,
            damaged: reader.damaged,
        })
    }

    /// For people; of each group either a line or, if `in_detail`, a paragraph.
    pub fn write(&self, in_detail: bool, out: &mut dyn Write) -> io::Result<()> {
        let Self { data_dir, format, cluster, node_id, shards, .. } = self;
        writeln!(
            out,
            "Data folder {data_dir}: node {node_id} of cluster '{cluster}', {shards} shards, format {format}"
        )?;
        if in_detail {
            self.groups.iter().try_for_each(|group| group.write(out))?;
        } else {
            self.write_counts(out)?;
            writeln!(out)?;
            self.write_table(out)?;
        }
        if self.damaged_rows > 0 {
            writeln!(out, "\nDamaged or missing: {}", self.damaged_rows)?;
            self.damaged.iter().try_for_each(|line| writeln!(out, "  {line}"))?;
            if self.damaged_rows > self.damaged.len() as u64 {
                writeln!(out, "  ...")?;
            }
        }
        Ok(())
    }

    fn write_counts(&self, out: &mut dyn Write) -> io::Result<()> {
        write!(
            out,
            "{}, {}, {}",
            counted(self.tasks, "task"),
            counted(self.dead_letters, "dead letter"),
            counted(self.dedup_keys, "deduplication key")
        )?;
        if self.groups.iter().any(|group| group.group == GroupId::CLUSTER.0) {
            let more = if self.clients.len() > CLIENTS_NAMED_MAX { ", ..." } else { "" };
            let named = self.clients.iter().take(CLIENTS_NAMED_MAX).cloned().collect::<Vec<_>>().join(", ");
            let named = if named.is_empty() { named } else { format!(" ({named}{more})") };
            let (clients, keys) = (self.clients.len() as u64, self.api_keys);
            write!(out, ", {}{named}, {}", counted(clients, "client"), counted(keys, "API key"))?;
        }
        writeln!(out)
    }

    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        const HEAD: [&str; 10] = [
            "GROUP",
            "REPLICA",
            "TERM",
            "APPLIED",
            "LOG",
            "TO APPLY",
            "VOTERS (NODES)",
            "TASKS",
            "DEAD LETTERS",
            "DEDUP KEYS",
        ];
        let rows = self.groups.iter().map(|group| {
            [
                format!("g{}", group.group),
                group.replica.map_or_else(|| "-".into(), |replica| replica.to_string()),
                group.vote.as_ref().map_or_else(|| "-".into(), |vote| vote.term.to_string()),
                group.applied.map_or_else(|| "-".into(), |applied| applied.index.to_string()),
                group.log.shown(),
                group.to_apply.to_string(),
                group.nodes(),
                group.tasks.to_string(),
                group.dead_letters.to_string(),
                group.dedup_keys.to_string(),
            ]
        });
        let rows: Vec<_> = std::iter::once(HEAD.map(str::to_owned)).chain(rows).collect();
        let width = |at: usize| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0);
        let widths: [usize; 10] = std::array::from_fn(width);
        for row in &rows {
            let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
            writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }
}

impl LogSummary {
    fn shown(&self) -> String {
        match (self.first, self.last) {
            (Some(first), Some(last)) => format!("{first}..{}", last.index),
            (Some(first), None) => format!("{first}..?"),
            (None, _) => "-".into(),
        }
    }
}

impl GroupSummary {
    /// The nodes of its voters, and with a plus those of its learners.
    fn nodes(&self) -> String {
        let Some(membership) = self.membership.as_ref().or(self.next_membership.as_ref()) else { return "-".into() };
        let voters = membership.voters.iter().map(|member| member.node_id.to_string());
        let learners = membership.learners.iter().map(|member| format!("+{}", member.node_id));
        voters.chain(learners).collect::<Vec<_>>().join(" ")
    }

    fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let holds = self.shard.map_or_else(|| "the cluster's own".to_owned(), |shard| format!("holds shard {shard}"));
        let retired = if self.retired { "; released, what is left goes at the next start" } else { "" };
        writeln!(out, "\nGroup g{}, {holds}{retired}", self.group)?;
        let mut field = |name: &str, value: String| writeln!(out, "  {name:<14}{value}");
        let none = || "none".to_owned();
        field("replica", self.replica.map_or_else(none, |replica| replica.to_string()))?;
        let vote = self.vote.as_ref().map(|vote| {
            let led = if vote.committed { ", which was elected" } else { "" };
            format!("term {}, for replica {}{led}", vote.term, vote.voted_for)
        });
        field("vote", vote.unwrap_or_else(none))?;
        let entry = |entry: Option<Applied>| {
            entry.map_or_else(none, |entry| format!("entry {} of term {}", entry.index, entry.term))
        };
        field("applied", entry(self.applied))?;
        let log = &self.log;
        let range = format!("{} ({}, {} bytes)", log.shown(), entries(log.entries), log.bytes);
        field("log", if log.entries == 0 { none() } else { range })?;
        field("purged up to", entry(log.purged))?;
        field("to apply", entries(self.to_apply))?;
        field("members", self.membership.as_ref().map_or_else(none, MembershipSummary::shown))?;
        if let Some(next) = &self.next_membership {
            field("members next", next.shown())?;
        }
        if let (Some(time_ms), Some(armed_ms)) = (self.time_ms, self.armed_ms) {
            field("time", format_instant(time_ms))?;
            field("armed up to", format_instant(armed_ms))?;
        }
        let rows: Vec<String> = self.rows.iter().map(|(kind, rows)| format!("{kind} {rows}")).collect();
        let all = format!("{} ({} bytes)", rows.join(", "), self.bytes);
        field("rows", if rows.is_empty() { none() } else { all })?;
        field("digest", self.digest.clone())
    }
}

impl MembershipSummary {
    fn shown(&self) -> String {
        let list = |members: &[MemberSummary]| {
            let members = members.iter().map(|member| format!("{} (node {})", member.replica, member.node_id));
            members.collect::<Vec<_>>().join(", ")
        };
        let index = self.index.map_or_else(String::new, |index| format!(", by entry {index}"));
        let learners =
            if self.learners.is_empty() { String::new() } else { format!("; learners {}", list(&self.learners)) };
        format!("voters {}{learners}{index}", list(&self.voters))
    }
}

fn counted(count: u64, one: &str) -> String {
    if count == 1 { format!("1 {one}") } else { format!("{count} {one}s") }
}

fn entries(count: u64) -> String {
    if count == 1 { "1 entry".into() } else { format!("{count} entries") }
}

/// Says which groups there are instead.
pub(super) fn no_group(folder: &StoppedFolder, group: GroupId) -> Result<InspectError, StoreError> {
    let mut held = Vec::new();
    for family in [Family::State, Family::Log] {
        // From group to group, without reading what is between.
        let mut from = Key::first();
        while let Some((key, _)) = folder.store.pin(family, &from, None).next()? {
            let Some(found) = key.first_chunk().map(|bytes| GroupId(u16::from_be_bytes(*bytes))) else { break };
            if !is_of_a_group(family, key) || found.0 > SHARDS_MAX {
                break;
            }
            held.push(found.0);
            from = Key::group_range(found).1;
        }
    }
    held.sort_unstable();
    held.dedup();
    let held = match &held[..] {
        [] => "no group at all".to_owned(),
        [one] => format!("group {one}"),
        several => format!("groups {}", several.iter().map(u16::to_string).collect::<Vec<_>>().join(", ")),
    };
    Ok(InspectError::NoGroup { group: group.0, path: folder.path.display().to_string(), held })
}

fn is_of_a_group(family: Family, key: &[u8]) -> bool {
    match family {
        Family::State => parse_state(key).is_some_and(|(_, parsed)| parsed != Parsed::NodeOpened),
        Family::Log => parse_log(key).is_some(),
    }
}
