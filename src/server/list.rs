//! Pages of tasks, in due order over all shards.
//!
//! A page is a merge of the shards' timelines from a place on. The place is the due instant and id of the last task
//! that was looked at, which is what the cursor holds: tasks may come and go between two pages, and none is shown twice
//! or left out because of it, unless it was moved itself. A page that would have to look at too many tasks to find the
//! ones asked for, or would not fit into a frame, ends early, with a cursor to go on from.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use prost::Message;

use super::Service;
use super::requests::{Problem, details};
use super::sessions::Session;
use crate::shard;
use crate::store::keys::{Key, Parsed, parse_state};
use crate::store::{Store, StoreError};
use crate::task::{GroupId, InstantMs, Invalid, TaskId};
use crate::wire::FRAME_BYTES_MAX;
use crate::wire::proto::{ListTasksRequest, ListTasksResponse, Status, TaskDetails};

const TASKS_DEFAULT: u32 = 100;
const TASKS_MAX: u32 = 1_000;
/// Looked at for one page.
const LOOKED_AT_MAX: usize = 20_000;
/// What a page takes besides its tasks: the envelope, the status and the cursor.
const PAGE_BYTES: usize = 128;
/// What a task takes in a page besides itself: a tag and a length.
const TASK_BYTES: usize = 8;
const ROWS_PER_READ: usize = 256;

type Place = (InstantMs, TaskId);

pub(super) fn page(
    service: &Service,
    session: &Session,
    request: &ListTasksRequest,
) -> Result<ListTasksResponse, Problem> {
    let filter = Filter::new(session, request)?;
    let limit = match request.limit {
        0 => TASKS_DEFAULT,
        limit => limit.min(TASKS_MAX),
    };
    let mut merge = Merge::new(&service.store, service.shards, filter.from, filter.until_ms)?;
    let mut tasks = Vec::new();
    let room = service.frame_bytes_max.min(FRAME_BYTES_MAX) - PAGE_BYTES;
    let mut bytes = 0;
    let mut looked_at = 0;
    let mut last = None;
    while tasks.len() < limit as usize && looked_at < LOOKED_AT_MAX {
        let Some((group, place)) = merge.next()? else { return Ok(answer(tasks, None)) };
        looked_at += 1;
        // It may have fired since its row was read.
        let read = shard::read_task(&service.store, group, place.1)?;
        if let Some((task, cursor)) = read.filter(|(task, _)| filter.takes(task.client.as_str(), task.interval_ms)) {
            let task = details(service, group, place.1, task, cursor)?;
            bytes += TASK_BYTES + task.encoded_len();
            if bytes > room && !tasks.is_empty() {
                // The next page begins with it.
                break;
            }
            tasks.push(task);
        }
        last = Some(place);
    }
    Ok(answer(tasks, last))
}

fn answer(tasks: Vec<TaskDetails>, last: Option<Place>) -> ListTasksResponse {
    let next_token = last.map_or_else(String::new, |(due_ms, id)| format!("{due_ms:016x}{id}"));
    ListTasksResponse { status: Status::Ok as i32, tasks, next_token, ..Default::default() }
}

struct Filter {
    client: Option<String>,
    recurring: Option<bool>,
    /// Behind this place; at this instant or later when there is no id.
    from: (InstantMs, Option<TaskId>),
    until_ms: InstantMs,
}

impl Filter {
    fn new(session: &Session, request: &ListTasksRequest) -> Result<Self, Problem> {
        let client = match (request.client_id.as_str(), session.admin) {
            ("", true) => None,
            ("", false) => Some(session.client.to_string()),
            (client, admin) if admin || client == session.client.as_str() => Some(client.to_owned()),
            _ => return Err(Problem::unauthorized("only an administrator sees the tasks of others")),
        };
        let from = match request.next_token.as_str() {
            "" => (request.scheduled_after, None),
            token => {
                let (due_ms, id) = parse_token(token)
                    .ok_or_else(|| Invalid::new("next_token: is not one that an earlier page answered with"))?;
                (due_ms, Some(id))
            }
        };
        // 0 is what a client leaves out.
        let until_ms = if request.scheduled_before == 0 { InstantMs::MAX } else { request.scheduled_before };
        Ok(Self { client, recurring: request.is_recurring, from, until_ms })
    }

    fn takes(&self, client: &str, interval_ms: u64) -> bool {
        self.client.as_ref().is_none_or(|wanted| wanted == client)
            && self.recurring.is_none_or(|wanted| wanted == (interval_ms > 0))
    }
}

fn parse_token(token: &str) -> Option<Place> {
    let (due, id) = token.split_at_checked(16)?;
    Some((InstantMs::from_str_radix(due, 16).ok()?, id.parse().ok()?))
}

/// The timelines of all shards as one.
struct Merge<'a> {
    store: &'a Store,
    until_ms: InstantMs,
    shards: Vec<Timeline>,
    /// The first unread place of each shard that has one.
    heads: BinaryHeap<Reverse<(Place, usize)>>,
}

struct Timeline {
    group: GroupId,
    read: VecDeque<Place>,
    next: Option<Key>,
}

impl<'a> Merge<'a> {
    fn new(
        store: &'a Store,
        shards: u16,
        from: (InstantMs, Option<TaskId>),
        until_ms: InstantMs,
    ) -> Result<Self, StoreError> {
        let mut merge = Self { store, until_ms, shards: Vec::new(), heads: BinaryHeap::new() };
        for group in (1..=shards).map(GroupId) {
            let next = match from {
                (due_ms, None) => Key::timeline_from(group, due_ms),
                (due_ms, Some(id)) => behind(group, (due_ms, id)),
            };
            merge.shards.push(Timeline { group, read: VecDeque::new(), next: Some(next) });
            merge.pull(usize::from(group.0 - 1))?;
        }
        Ok(merge)
    }

    /// The next place of all.
    fn next(&mut self) -> Result<Option<(GroupId, Place)>, StoreError> {
        let Some(Reverse((place, at))) = self.heads.pop() else { return Ok(None) };
        self.pull(at)?;
        Ok(Some((self.shards[at].group, place)))
    }

    /// Puts the next place of one shard among the heads.
    fn pull(&mut self, at: usize) -> Result<(), StoreError> {
        let shard = &mut self.shards[at];
        if shard.read.is_empty()
            && let Some(from) = shard.next.take()
        {
            let until = if self.until_ms == InstantMs::MAX {
                Key::timeline_end(shard.group)
            } else {
                Key::timeline_from(shard.group, self.until_ms)
            };
            // The range may be empty, the wrong way round.
            let rows = if from < until { self.store.scan_state(&from, &until, ROWS_PER_READ)? } else { Vec::new() };
            let whole = rows.len() == ROWS_PER_READ;
            for (key, _) in rows {
                match parse_state(&key) {
                    Some((_, Parsed::Timeline(due_ms, id))) => shard.read.push_back((due_ms, id)),
                    other => return Err(StoreError::damaged("the timeline", format!("it holds {other:?}"))),
                }
            }
            shard.next = shard.read.back().filter(|_| whole).map(|last| behind(shard.group, *last));
        }
        if let Some(place) = shard.read.pop_front() {
            self.heads.push(Reverse((place, at)));
        }
        Ok(())
    }
}

/// The first key behind a place.
fn behind(group: GroupId, (due_ms, id): Place) -> Key {
    let mut key = Key::timeline(group, due_ms, id).into_bytes();
    key.push(0);
    Key::from_stored(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::ShardId;

    #[test]
    fn a_cursor_is_a_place_and_nothing_else_is_a_cursor() {
        let id = TaskId::new(5, ShardId(1), 9);
        let token = answer(Vec::new(), Some((77, id))).next_token;
        assert_eq!(parse_token(&token), Some((77, id)));
        for wrong in ["", "x", &token[1..], &token[..token.len() - 1], "zzzzzzzzzzzzzzzz", "é".repeat(30).as_str()] {
            assert_eq!(parse_token(wrong), None, "{wrong}");
        }
    }
}
