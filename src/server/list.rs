//! Pages of tasks, in due order, or in the order of their names or labels.
//!
//! Each filter that narrows much has an index of its own: a client's tasks, a client's names and labels. What the others
//! (state, recurring) leave out is walked over. A page that would have to walk over too many rows to find the ones asked
//! for, or would not fit into a frame, ends early, with a cursor to go on from: so it costs the same at a million tasks
//! as at a thousand.

use prost::Message;

use super::Service;
use super::problem::Problem;
use super::sessions::Session;
use super::tasks::details;
use super::walk::{Part, Place, Range, Room, Walk, after, place_behind, token};
use crate::shard;
use crate::store::keys::{Key, TagKind, client_hash};
use crate::store::rows::{CursorRow, NEVER, Role, TaskRow, TimelineRow};
use crate::store::{StoreError, codec};
use crate::task::{ClientId, GroupId, InstantMs, Invalid, TaskId};
use crate::wire::FRAME_BYTES_MAX;
use crate::wire::proto::{ListTasksRequest, ListTasksResponse, Status, TaskDetails, TaskState};

const TASKS_DEFAULT: u32 = 100;
const TASKS_MAX: u32 = 1_000;
/// Rows walked over for one page.
const WALKED_MAX: usize = 20_000;
/// What a page takes besides its tasks: the envelope, the status and the cursor.
const PAGE_BYTES: usize = 512;
/// What an item takes in a page besides itself: a tag and a length.
pub(super) const ITEM_BYTES: usize = 8;

/// A page of a node that leads all shards.
pub(super) fn page(
    service: &Service,
    session: &Session,
    request: &ListTasksRequest,
) -> Result<ListTasksResponse, Problem> {
    let part = part(service, session, request, service.router.all_shards())?;
    answer(session, request, part)
}

/// What such a page may hold.
pub(super) fn room(service: &Service, request: &ListTasksRequest) -> Room {
    let items = match request.limit {
        0 => TASKS_DEFAULT,
        limit => limit.min(TASKS_MAX),
    };
    Room { items: items as usize, bytes: page_bytes(service) }
}

/// As much of a frame as items may take.
pub(super) fn page_bytes(service: &Service) -> usize {
    service.frame_bytes_max.min(FRAME_BYTES_MAX) - PAGE_BYTES
}

/// Some shards' part of a page.
pub(super) fn part(
    service: &Service,
    session: &Session,
    request: &ListTasksRequest,
    groups: impl IntoIterator<Item = GroupId>,
) -> Result<Part<TaskDetails>, Problem> {
    let filter = Filter::new(session, request)?;
    let (range_from, range_until) = filter.range();
    let index = filter.order.index();
    let from = match request.next_token.as_str() {
        "" => range_from,
        token => place_behind(index, token)
            .ok_or_else(|| Invalid::new("next_token: is not one that an earlier page of this list answered with"))?,
    };
    let prefix = |group: GroupId| filter.order.prefix(group);
    let mut walk = Walk::new(&service.store, groups, &Range { prefix: &prefix, from, until: range_until })?;
    let room = room(service, request);
    let mut part = Part::default();
    let mut bytes = 0;
    let mut walked = 0;
    while part.items.len() < room.items && walked < WALKED_MAX {
        let Some((group, place, row)) = walk.next()? else { return Ok(Part { more_behind: None, ..part }) };
        walked += 1;
        if let Some(task) = filter.take(service, group, &place, &row)? {
            bytes += ITEM_BYTES + task.encoded_len();
            if bytes > room.bytes && !part.items.is_empty() {
                // The next page begins with it.
                break;
            }
            part.items.push((place.clone(), task));
        }
        part.more_behind = Some(place);
    }
    Ok(part)
}

pub(super) fn answer(
    session: &Session,
    request: &ListTasksRequest,
    part: Part<TaskDetails>,
) -> Result<ListTasksResponse, Problem> {
    let index = Filter::new(session, request)?.order.index();
    let next_token = part.more_behind.map_or_else(String::new, |place| token(index, &place));
    let tasks = part.items.into_iter().map(|(_, task)| task).collect();
    Ok(ListTasksResponse { status: Status::Ok as i32, tasks, next_token, ..Default::default() })
}

/// Which index a list walks along.
enum Order {
    /// Everybody's tasks, by due instant.
    Timeline,
    OfClient([u8; 8]),
    /// One client's, by name or label.
    Tag([u8; 8], TagKind, String),
}

impl Order {
    fn index(&self) -> char {
        match self {
            Order::Timeline => 't',
            Order::OfClient(_) => 'c',
            Order::Tag(_, TagKind::Name, _) => 'n',
            Order::Tag(_, TagKind::Label, _) => 'l',
        }
    }

    fn prefix(&self, group: GroupId) -> Key {
        match self {
            Order::Timeline => Key::timeline_prefix(group),
            Order::OfClient(client) => Key::by_client_prefix(group, *client),
            Order::Tag(client, kind, _) => Key::by_tag_prefix(group, *client, *kind),
        }
    }
}

struct Filter {
    order: Order,
    client: Option<ClientId>,
    recurring: Option<bool>,
    state: TaskState,
    from_ms: InstantMs,
    until_ms: InstantMs,
}

impl Filter {
    fn new(session: &Session, request: &ListTasksRequest) -> Result<Self, Problem> {
        let client = whose(session, &request.client_id)?;
        let state = TaskState::try_from(request.state)
            .map_err(|_| Invalid::new(format!("state: {} is unknown", request.state)))?;
        let tag = match (request.name_prefix.as_str(), request.label_prefix.as_str()) {
            ("", "") => None,
            (name, "") => Some((TagKind::Name, name)),
            ("", label) if label.contains('=') => Some((TagKind::Label, label)),
            ("", _) => return Err(Invalid::new("label_prefix: is not key=beginning of the value").into()),
            _ => return Err(Invalid::new("label_prefix: cannot be given together with name_prefix").into()),
        };
        let order = match (&client, tag) {
            (Some(client), Some((kind, text))) => Order::Tag(client_hash(client), kind, text.to_owned()),
            (Some(client), None) => Order::OfClient(client_hash(client)),
            (None, None) => Order::Timeline,
            (None, Some(_)) => {
                return Err(
                    Invalid::new("client_id: names and labels belong to a client; give it with a prefix").into()
                );
            }
        };
        // 0 is what a client leaves out.
        let until_ms = if request.scheduled_before == 0 { InstantMs::MAX } else { request.scheduled_before };
        Ok(Self { order, client, recurring: request.is_recurring, state, from_ms: request.scheduled_after, until_ms })
    }

    /// The places to walk along, from the first and before the second.
    fn range(&self) -> (Place, Option<Place>) {
        if let Order::Tag(_, _, text) = &self.order {
            return (text.as_bytes().to_vec(), after(text.as_bytes()));
        }
        let place = |due_ms: InstantMs| due_ms.to_be_bytes().to_vec();
        // What is paused is due never, and so behind everything else.
        let from_ms = if self.state == TaskState::Paused { NEVER } else { self.from_ms };
        let until_ms = match self.state {
            TaskState::Paused | TaskState::Unspecified => None,
            _ => Some(NEVER),
        };
        let until_ms = Some(self.until_ms).filter(|until_ms| *until_ms < NEVER).or(until_ms);
        (place(from_ms), until_ms.map(place))
    }

    fn take(
        &self,
        service: &Service,
        group: GroupId,
        place: &[u8],
        row: &[u8],
    ) -> Result<Option<TaskDetails>, Problem> {
        let id = place.last_chunk::<16>().copied().map(TaskId::from_stored);
        let id = id.ok_or_else(|| StoreError::damaged("an index of tasks", "a key is too short"))?;
        if !matches!(self.order, Order::Tag(..)) {
            // Enough to pass over most without reading them.
            let row: TimelineRow = codec::decode("a row of the timeline", row)?;
            if self.recurring.is_some_and(|wanted| wanted != row.recurring)
                || (self.state == TaskState::Retrying && row.attempt == 1)
                || (self.state == TaskState::Scheduled && row.attempt > 1)
            {
                return Ok(None);
            }
        }
        // It may have fired since its row was read.
        let Some((task, at)) = shard::read_task(&service.store, group, id)? else { return Ok(None) };
        if !self.takes(&task, &at) {
            return Ok(None);
        }
        let details = details(service, group, id, task, at)?;
        let state_fits = self.state == TaskState::Unspecified || details.state == self.state as i32;
        Ok(state_fits.then_some(details))
    }

    fn takes(&self, task: &TaskRow, at: &CursorRow) -> bool {
        let in_time = at.due_ms >= self.from_ms && (at.due_ms < self.until_ms || self.until_ms == InstantMs::MAX);
        self.client.as_ref().is_none_or(|wanted| *wanted == task.client)
            && self.recurring.is_none_or(|wanted| wanted == task.recurrence.is_some())
            && in_time
            && !matches!(task.role, Role::Copy(_))
    }
}

/// Whose things are listed; `None` is everybody's. A client sees its own only.
pub(super) fn whose(session: &Session, client: &str) -> Result<Option<ClientId>, Problem> {
    match (client, session.admin) {
        ("", true) => Ok(None),
        ("", false) => Ok(Some(session.client.clone())),
        (client, admin) if admin || client == session.client.as_str() => Ok(Some(client.parse()?)),
        _ => Err(Problem::unauthorized("only an administrator sees what belongs to others")),
    }
}
