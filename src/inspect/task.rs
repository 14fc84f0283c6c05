//! What there is of one task: its rows, and the log entries that name it.

use super::folder::StoppedFolder;
use super::rows::{Line, LogRow, StateRow, decode_log, decode_state};
use super::{InspectError, Lines};
use crate::raft::types::term_of;
use crate::shard::Request;
use crate::store::engine::Family;
use crate::store::keys::{Key, Parsed, parse_log, parse_state};
use crate::store::overlay::get_row;
use crate::store::rows::{Applied, Role, StandInsRow};
use crate::task::{GroupId, PolicyId, TaskId};

/// All rows of its group are read: what is looked for may be missing in an index.
pub(super) fn show(folder: &StoppedFolder, id: TaskId, lines: &mut Lines<'_>) -> Result<(), InspectError> {
    let group = GroupId::of_shard(id.shard());
    let no_task = |why: String| Err(InspectError::NoTask { id, why });
    let shards = folder.identity.shards;
    if id.shard().0 >= shards {
        return no_task(format!("its shard would be {}, and this cluster has shards 0 to {}", id.shard(), shards - 1));
    }
    let (from, until) = Key::group_range(group);
    let (mut any, mut found) = (false, false);
    let mut policy = None;
    let mut rows = folder.store.pin(Family::State, &from, Some(&until));
    while let Some((key, value)) = rows.next()? {
        any = true;
        let Some((_, parsed)) = parse_state(key) else { continue };
        let row = decode_state(&parsed, value);
        if let (Parsed::Task(task), Ok(StateRow::Task(row))) = (&parsed, &row)
            && *task == id
        {
            policy = Some(row.policy);
        }
        if key_names(&parsed, id) || row.is_ok_and(|row| value_names(&row, id)) {
            found = true;
            lines.write(&Line::of(Family::State, key, value))?;
        }
    }
    if let Some(policy) = policy {
        write_policy(folder, group, policy, lines)?;
    }
    let applied: Option<Applied> = get_row(&folder.store, "last applied", &Key::applied(group))?;
    let mut rows = folder.store.pin(Family::Log, &from, Some(&until));
    while let Some((key, value)) = rows.next()? {
        any = true;
        let Some((_, parsed)) = parse_log(key) else { continue };
        let (log_id, batch) = match decode_log(&parsed, value) {
            Ok(LogRow::Command(log_id, batch, _)) => (log_id, batch),
            Ok(_) => continue,
            // It may name the task.
            Err(_) => {
                lines.write(&Line::of(Family::Log, key, value))?;
                continue;
            }
        };
        let of_task = batch.requests.iter().filter(|request| tasks_of(request).contains(&Some(id)));
        let asked: Vec<&str> = of_task.map(verb).collect();
        if asked.is_empty() {
            continue;
        }
        found = true;
        let is_applied = applied.is_some_and(|applied| log_id.index <= applied.index);
        let state = if is_applied { "" } else { " (not applied yet)" };
        let shown = format!("term={} now={} {}{state}", term_of(&log_id), batch.now_ms, asked.join(", "));
        lines.write(&Line { value: Ok(shown), ..Line::of(Family::Log, key, value) })?;
    }
    match (any, found) {
        (_, true) => lines.end(),
        (true, false) => no_task(format!("no row of group {} names it, and no entry of its log", group.0)),
        (false, false) => no_task(format!("it is of group {}, of which this node holds nothing", group.0)),
    }
}

fn write_policy(
    folder: &StoppedFolder,
    group: GroupId,
    policy: PolicyId,
    lines: &mut Lines<'_>,
) -> Result<(), InspectError> {
    let key = Key::policy(group, policy);
    match folder.store.get_state(&key)? {
        Some(value) => lines.write(&Line::of(Family::State, key.as_ref(), &value)),
        None => {
            let missing = Line::of(Family::State, key.as_ref(), &[]);
            lines.write(&Line { value: Err("the policy of the task is missing".into()), ..missing })
        }
    }
}

fn key_names(key: &Parsed, id: TaskId) -> bool {
    match key {
        Parsed::Task(task)
        | Parsed::Timeline(_, task)
        | Parsed::Cursor(task)
        | Parsed::History(task, ..)
        | Parsed::ByClient(_, _, task)
        | Parsed::ByTag(task)
        | Parsed::StandIns(task) => *task == id,
        Parsed::DeadLetter(letter) | Parsed::LetterOfClient(_, letter) => letter.task == id,
        Parsed::Policy(_)
        | Parsed::Dedup(_)
        | Parsed::DedupEnd(..)
        | Parsed::Sender(_)
        | Parsed::Applied
        | Parsed::Membership
        | Parsed::ShardMeta
        | Parsed::Client(_)
        | Parsed::ApiKey(_)
        | Parsed::NodeOpened => false,
    }
}

fn value_names(row: &StateRow, id: TaskId) -> bool {
    match row {
        StateRow::Task(row) => match &row.role {
            Role::Own => false,
            Role::StandIn { task, .. } => *task == id,
            Role::Copy(copy) => copy.letter.task == id,
        },
        StateRow::StandIns(StandInsRow(ids)) => ids.contains(&id),
        StateRow::Dedup(row) => row.id == id,
        StateRow::Sender(row) => row.stored.iter().any(|stored| stored.id == id),
        StateRow::Timeline(_)
        | StateRow::Cursor(_)
        | StateRow::Policy(_)
        | StateRow::DeadLetter(_)
        | StateRow::DedupEnd(_)
        | StateRow::History(_)
        | StateRow::Index
        | StateRow::Applied(_)
        | StateRow::Membership(_)
        | StateRow::ShardMeta(_)
        | StateRow::Client(_)
        | StateRow::ApiKey(_)
        | StateRow::NodeOpened => false,
    }
}

/// The tasks that a request is about.
fn tasks_of(request: &Request) -> [Option<TaskId>; 2] {
    match request {
        Request::Register(register) => [Some(register.id), None],
        Request::Cancel(cancel) => [Some(cancel.id), None],
        Request::Settle(settle) => [Some(settle.id), None],
        Request::Edit(edit) => [Some(edit.id), None],
        Request::Pause(pause) => [Some(pause.id), None],
        Request::CatchUp(catch_up) => [Some(catch_up.id), None],
        Request::Detach(detach) => [Some(detach.id), Some(detach.stand_in)],
        Request::Replay(replay) => [Some(replay.letter.task), Some(replay.stand_in)],
        Request::Purge(purge) => [Some(purge.letter.task), None],
        Request::PutClient(_)
        | Request::RemoveClient(_)
        | Request::PutApiKey(_)
        | Request::RemoveApiKey(_)
        | Request::Forget(_)
        | Request::Mark(_) => [None, None],
    }
}

/// What a request asks for.
fn verb(request: &Request) -> &'static str {
    match request {
        Request::Register(_) => "register",
        Request::Cancel(_) => "cancel",
        Request::Settle(_) => "settle",
        Request::Edit(_) => "edit",
        Request::Pause(pause) if pause.paused => "pause",
        Request::Pause(_) => "resume",
        Request::CatchUp(_) => "catch up",
        Request::Detach(_) => "detach",
        Request::Replay(_) => "replay",
        Request::Purge(_) => "purge",
        Request::PutClient(_) => "put client",
        Request::RemoveClient(_) => "remove client",
        Request::PutApiKey(_) => "put API key",
        Request::RemoveApiKey(_) => "remove API key",
        Request::Forget(_) => "forget",
        Request::Mark(_) => "mark",
    }
}
