//! Pages of tasks, in due order, or in the order of their names or labels.
//!
//! Each filter that narrows much has an index of its own: a client's tasks, a client's names and labels. What the others
//! (state, recurring) leave out is looked at in vain. A page that would have to look at too many rows to find the ones asked
//! for, or would not fit into a frame, ends early, with a cursor to go on from: so it costs the same at a million tasks
//! as at a thousand.

use std::sync::Arc;

use prost::Message;

use super::operation::{Operation, PartRead, Respond};
use super::tasks::{details, whose};
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::server::problem::Problem;
use crate::server::routing::leader::in_the_background;
use crate::server::routing::pages::{self, ITEM_BYTES, InParts, gather, page_bytes, read_all};
use crate::server::scan::{Part, Place, Range, Room, Scan, after, place_behind, token};
use crate::shard;
use crate::store::keys::{Key, TagKind, client_hash};
use crate::store::rows::{CursorRow, NEVER, Role, TaskRow, TimelineRow};
use crate::store::{StoreError, codec};
use crate::task::{ClientId, GroupId, InstantMs, Invalid, TaskId};
use crate::wire::proto::{ListTasksRequest, ListTasksResponse, TaskDetails, TaskState};

const TASKS_DEFAULT: u32 = 100;
const TASKS_MAX: u32 = 1_000;
/// Rows looked at for one page.
const LOOKED_AT_MAX: usize = 20_000;

impl Operation for ListTasksRequest {
    async fn here(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        let service = service.clone();
        // What this connection asks for next does not wait for it.
        tokio::spawn(async move {
            let part = read_all(&service, session.clone(), self.clone()).await;
            respond(part.and_then(|part| answer(&session, &self, part)));
        });
    }

    async fn among_nodes(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        let other = service.clone();
        let work = async move { answer(&session, &self, gather(&other, &session, &self).await?) };
        in_the_background(service, respond, work).await;
    }

    fn part(self, service: &Arc<Service>, session: Arc<Session>, groups: Vec<GroupId>) -> PartRead {
        pages::encoded(service, session, self, groups)
    }

    fn answer_bytes_max(&self, frame_bytes_max: usize) -> usize {
        frame_bytes_max
    }
}

impl InParts for ListTasksRequest {
    type Item = TaskDetails;

    fn read(&self, service: &Service, session: &Session, groups: &[GroupId]) -> Result<Part<TaskDetails>, Problem> {
        part(service, session, self, groups)
    }

    fn room(&self, service: &Service) -> Room {
        let items = match self.limit {
            0 => TASKS_DEFAULT,
            limit => limit.min(TASKS_MAX),
        };
        Room { items: items as usize, bytes: page_bytes(service) }
    }
}

fn part(
    service: &Service,
    session: &Session,
    request: &ListTasksRequest,
    groups: &[GroupId],
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
    let mut scan =
        Scan::new(&service.store, groups.iter().copied(), &Range { prefix: &prefix, from, until: range_until })?;
    let room = request.room(service);
    let mut part = Part::default();
    let mut bytes = 0;
    let mut looked_at = 0;
    while part.items.len() < room.items && looked_at < LOOKED_AT_MAX {
        let Some((group, place, row)) = scan.next()? else { return Ok(Part { more_behind: None, ..part }) };
        looked_at += 1;
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

/// A page, from what was found for it.
fn answer(
    session: &Session,
    request: &ListTasksRequest,
    part: Part<TaskDetails>,
) -> Result<ListTasksResponse, Problem> {
    let index = Filter::new(session, request)?.order.index();
    let next_token = part.more_behind.map_or_else(String::new, |place| token(index, &place));
    let tasks = part.items.into_iter().map(|(_, task)| task).collect();
    Ok(ListTasksResponse { tasks, next_token, ..Default::default() })
}

/// Which index a list goes along.
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

    /// The places to look at, from the first and before the second.
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

#[cfg(test)]
mod tests {
    use super::super::rig::{Rig, check, in_an_hour};
    use super::*;
    use crate::wire::problems::Code;
    use crate::wire::proto::Task;

    #[tokio::test(start_paused = true)]
    async fn pages_follow_each_other_and_each_sees_its_own() {
        let rig = Rig::start().await;
        let mut ids = Vec::new();
        for _ in 0..5 {
            ids.push(rig.register().await);
        }
        rig.ask(&rig.stranger(), in_an_hour()).await.unwrap();
        let mut found = Vec::new();
        let mut request = ListTasksRequest { limit: 2, ..Default::default() };
        loop {
            let page = rig.ask(&rig.client(), request.clone()).await.unwrap();
            assert!(page.tasks.len() <= 2);
            found.extend(page.tasks.into_iter().map(|task| task.task_id));
            if page.next_token.is_empty() {
                break;
            }
            request.next_token = page.next_token;
        }
        found.sort();
        ids.sort();
        assert_eq!(found, ids);
        let all = rig.ask(&rig.admin(), ListTasksRequest::default()).await.unwrap();
        assert_eq!(all.tasks.len(), 6, "an administrator sees everybody's");
    }

    #[tokio::test(start_paused = true)]
    async fn filters_find_what_they_name() {
        let rig = Rig::start().await;
        let named = Task { name: "bill 7".into(), labels: [("city".into(), "Bern".into())].into(), ..in_an_hour() };
        let id = rig.ask(&rig.client(), named).await.unwrap().task_id;
        rig.register().await;
        let all = ListTasksRequest::default();
        for (name, request, count) in [
            ("name", ListTasksRequest { name_prefix: "bill".into(), ..all.clone() }, 1),
            ("label", ListTasksRequest { label_prefix: "city=B".into(), ..all.clone() }, 1),
            ("another label", ListTasksRequest { label_prefix: "city=Z".into(), ..all.clone() }, 0),
            ("recurring", ListTasksRequest { is_recurring: Some(true), ..all.clone() }, 0),
            ("paused", ListTasksRequest { state: TaskState::Paused.into(), ..all.clone() }, 0),
            ("scheduled", ListTasksRequest { state: TaskState::Scheduled.into(), ..all.clone() }, 2),
            ("before now", ListTasksRequest { scheduled_before: 5, ..all.clone() }, 0),
        ] {
            let found = rig.ask(&rig.client(), request).await.unwrap().tasks;
            assert_eq!(found.len(), count, "{name}: {found:?}");
            assert!(count != 1 || found[0].task_id == id, "{name}: {found:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_makes_no_sense_or_is_others_is_refused() {
        let rig = Rig::start().await;
        let all = ListTasksRequest::default();
        for (name, request, code, text) in [
            (
                "a cursor",
                ListTasksRequest { next_token: "x".into(), ..all.clone() },
                Code::InvalidRequest,
                "next_token",
            ),
            ("a state", ListTasksRequest { state: 99, ..all.clone() }, Code::InvalidRequest, "state: 99"),
            (
                "a label",
                ListTasksRequest { label_prefix: "x".into(), ..all.clone() },
                Code::InvalidRequest,
                "label_prefix",
            ),
            (
                "others",
                ListTasksRequest { client_id: "stranger".into(), ..all.clone() },
                Code::Unauthorized,
                "administrator",
            ),
        ] {
            check(name, &rig.refusal(&rig.client(), request).await, code, text);
        }
        let prefix = ListTasksRequest { name_prefix: "x".into(), ..all.clone() };
        check("whose", &rig.refusal(&rig.admin(), prefix).await, Code::InvalidRequest, "client_id");
        // Without shard 1 the list would not be complete.
        let rig = rig.with_another_node();
        check("a part", &rig.refusal(&rig.client(), all).await, Code::NotLeader, "would not be complete");
    }
}
