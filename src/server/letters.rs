//! Dead letters: pages of them, one of them, and what can be done with them.
//!
//! The oldest come first; each client's are indexed apart, so that nobody walks over those of others. Replaying and purging by a filter goes page by page as well: each request deals with some, and
//! answers with a cursor to go on from, so that a client can show how far it is and stop in between.

use std::sync::Arc;

use futures::future::join_all;
use prost::Message;

use super::Service;
use super::list::{ITEM_BYTES, page_bytes, whose};
use super::problem::Problem;
use super::sessions::{Session, SessionError};
use super::walk::{Part, Place, Range, Room, Walk, place_behind, token};
use crate::propose::Ask;
use crate::shard::{Purge, Reply, Request};
use crate::store::keys::{Key, client_hash};
use crate::store::overlay::get_row;
use crate::store::rows::{CopyState, DeadLetterRow};
use crate::store::{StoreError, codec};
use crate::task::{ClientId, DeadLetterId, FailureClass, GroupId, InstantMs, Invalid, TaskId};
use crate::wire::convert::{callback_shown, failure_class_from, failure_to, retry_to};
use crate::wire::proto;
use proto::Status;

const INDEX: char = 'd';
const LETTERS_DEFAULT: u32 = 100;
const LETTERS_MAX: u32 = 1_000;
/// Looked at for one page.
const WALKED_MAX: usize = 10_000;
/// Replayed or purged at a time, by one request.
const CHANGED_AT_ONCE_MAX: usize = 256;

fn limit(limit: u32) -> usize {
    let limit = if limit == 0 { LETTERS_DEFAULT } else { limit.min(LETTERS_MAX) };
    limit as usize
}

pub(super) fn room(service: &Service, request: &proto::ListDeadLettersRequest) -> Room {
    Room { items: limit(request.limit), bytes: page_bytes(service) }
}

/// A page of a node that leads all shards.
pub(super) fn page(
    service: &Service,
    session: &Session,
    request: &proto::ListDeadLettersRequest,
) -> Result<proto::ListDeadLettersResponse, Problem> {
    Ok(answer(part(service, session, request, service.router.all_shards())?))
}

/// Some shards' part of a page.
pub(super) fn part(
    service: &Service,
    session: &Session,
    request: &proto::ListDeadLettersRequest,
    groups: impl IntoIterator<Item = GroupId>,
) -> Result<Part<proto::DeadLetter>, Problem> {
    let filter = Filter::new(session, request.filter.as_ref())?;
    let room = room(service, request);
    let mut bytes = 0;
    let mut items = Vec::new();
    let more_behind = walk(service, &filter, &request.next_token, groups, room.items, |place, id, row| {
        let shown = shown(id, row);
        bytes += ITEM_BYTES + shown.encoded_len();
        let fits = bytes <= room.bytes || items.is_empty();
        if fits {
            items.push((place.clone(), shown));
        }
        fits
    })?;
    Ok(Part { items, more_behind })
}

pub(super) fn answer(part: Part<proto::DeadLetter>) -> proto::ListDeadLettersResponse {
    let next_token = part.more_behind.map_or_else(String::new, |place| token(INDEX, &place));
    let dead_letters = part.items.into_iter().map(|(_, letter)| letter).collect();
    proto::ListDeadLettersResponse { status: Status::Ok as i32, dead_letters, next_token, ..Default::default() }
}

pub(super) fn get(
    service: &Service,
    session: &Session,
    request: &proto::GetDeadLetterRequest,
) -> Result<proto::GetDeadLetterResponse, Problem> {
    let (id, group) = group_of(service, &request.dead_letter_id)?;
    let row: Option<DeadLetterRow> = get_row(&service.store, "a dead letter", &Key::dead_letter(group, id))?;
    // Another client's is not found rather than forbidden.
    let row = row.filter(|row| session.admin || row.client == session.client).ok_or_else(|| not_found(id))?;
    Ok(proto::GetDeadLetterResponse {
        status: Status::Ok as i32,
        dead_letter: Some(shown(id, row)),
        ..Default::default()
    })
}

pub(super) async fn replay(
    service: &Arc<Service>,
    session: Result<Arc<Session>, SessionError>,
    request: proto::ReplayDeadLettersRequest,
) -> Result<proto::ReplayDeadLettersResponse, Problem> {
    let session = session?;
    let choice = Choice::from(request);
    let chosen = choose(service, &session, choice).await?;
    let owner = owner(&session);
    let ask = |letter| Ask::Replay { letter, owner: owner.clone() };
    let mut replayed = Vec::new();
    for (id, reply) in ask_all(service, &chosen.letters, ask).await? {
        let task_id = match reply {
            Reply::Replayed { id } => id.to_string(),
            _ => String::new(),
        };
        replayed.push(proto::Replayed { dead_letter_id: id.to_string(), task_id });
    }
    let next_token = chosen.next_token;
    Ok(proto::ReplayDeadLettersResponse { status: Status::Ok as i32, replayed, next_token, ..Default::default() })
}

pub(super) async fn purge(
    service: &Arc<Service>,
    session: Result<Arc<Session>, SessionError>,
    request: proto::PurgeDeadLettersRequest,
) -> Result<proto::PurgeDeadLettersResponse, Problem> {
    let session = session?;
    let choice = Choice::from(request);
    let chosen = choose(service, &session, choice).await?;
    let owner = owner(&session);
    let ask = |letter| Ask::Plain(Request::Purge(Purge { letter, owner: owner.clone() }));
    let replies = ask_all(service, &chosen.letters, ask).await?;
    let purged = replies.iter().filter(|(_, reply)| *reply == Reply::Stored).count() as u64;
    let next_token = chosen.next_token;
    Ok(proto::PurgeDeadLettersResponse { status: Status::Ok as i32, purged, next_token, ..Default::default() })
}

fn owner(session: &Session) -> Option<ClientId> {
    (!session.admin).then(|| session.client.clone())
}

/// Asks for all of them at once. What was done before one of them was refused is done.
async fn ask_all(
    service: &Service,
    letters: &[DeadLetterId],
    ask: impl Fn(DeadLetterId) -> Ask,
) -> Result<Vec<(DeadLetterId, Reply)>, Problem> {
    let asked = letters.iter().map(async |letter| {
        let reply = service.proposer.ask(GroupId::of_shard(letter.task.shard()), ask(*letter)).await;
        reply.map(|reply| (*letter, reply))
    });
    Ok(join_all(asked).await.into_iter().collect::<Result<_, _>>()?)
}

/// What a request to replay or to purge names.
pub(super) struct Choice {
    ids: Vec<String>,
    filter: Option<proto::DeadLetterFilter>,
    limit: u32,
    next_token: String,
}

impl From<proto::ReplayDeadLettersRequest> for Choice {
    fn from(request: proto::ReplayDeadLettersRequest) -> Self {
        let proto::ReplayDeadLettersRequest { dead_letter_ids: ids, filter, limit, next_token } = request;
        Self { ids, filter, limit, next_token }
    }
}

impl From<proto::PurgeDeadLettersRequest> for Choice {
    fn from(request: proto::PurgeDeadLettersRequest) -> Self {
        let proto::PurgeDeadLettersRequest { dead_letter_ids: ids, filter, limit, next_token } = request;
        Self { ids, filter, limit, next_token }
    }
}

/// What one request deals with.
pub(super) struct Chosen {
    pub letters: Vec<DeadLetterId>,
    pub next_token: String,
}

async fn choose(service: &Arc<Service>, session: &Arc<Session>, choice: Choice) -> Result<Chosen, Problem> {
    if let Some(chosen) = named(service, &choice)? {
        return Ok(chosen);
    }
    let (bound_ms, _) = bound(service, &choice)?;
    let part = service.read_page(Ok(session.clone()), move |service, session| {
        chosen_part(service, session, &choice, service.router.all_shards())
    });
    chosen(bound_ms, part.await?)
}

/// Those that are named one by one; `None` when there is a filter instead.
pub(super) fn named(service: &Service, choice: &Choice) -> Result<Option<Chosen>, Problem> {
    let count = choice.ids.len();
    if count == 0 {
        return Ok(None);
    }
    if count > LETTERS_MAX as usize {
        return Err(Invalid::new(format!("dead_letter_ids: {count} of them, the limit is {LETTERS_MAX}")).into());
    }
    let letters = choice.ids.iter().map(|id| group_of(service, id).map(|(id, _)| id)).collect::<Result<_, _>>()?;
    Ok(Some(Chosen { letters, next_token: String::new() }))
}

/// What dies while this goes on is not part of it: a receiver that fails at once would keep it busy for ever. The
/// cursor carries the bound.
pub(super) fn bound<'a>(service: &Service, choice: &'a Choice) -> Result<(InstantMs, &'a str), Problem> {
    match choice.next_token.as_str() {
        "" => Ok((service.clock.now_ms() + 1, "")),
        token => {
            let parts = token.split_once('-').and_then(|(bound, rest)| Some((bound.parse().ok()?, rest)));
            Ok(parts.ok_or_else(foreign_token)?)
        }
    }
}

pub(super) fn room_to_change(choice: &Choice) -> Room {
    let items = match choice.limit {
        0 => CHANGED_AT_ONCE_MAX,
        wanted => limit(wanted).min(CHANGED_AT_ONCE_MAX),
    };
    Room { items, bytes: usize::MAX }
}

/// Some shards' part of what a filter chooses: only the places.
pub(super) fn chosen_part(
    service: &Service,
    session: &Session,
    choice: &Choice,
    groups: impl IntoIterator<Item = GroupId>,
) -> Result<Part<()>, Problem> {
    let mut filter = Filter::new(session, choice.filter.as_ref())?;
    let (bound_ms, next_token) = bound(service, choice)?;
    filter.until_ms = filter.until_ms.min(bound_ms);
    let mut items = Vec::new();
    let more_behind = walk(service, &filter, next_token, groups, room_to_change(choice).items, |place, _, _| {
        items.push((place.clone(), ()));
        true
    })?;
    Ok(Part { items, more_behind })
}

pub(super) fn chosen(bound_ms: InstantMs, part: Part<()>) -> Result<Chosen, Problem> {
    let letters = part.items.iter().map(|(place, ())| id_at(place)).collect::<Result<_, _>>()?;
    let next_token = part.more_behind.map_or_else(String::new, |place| format!("{bound_ms}-{}", token(INDEX, &place)));
    Ok(Chosen { letters, next_token })
}

/// Shows what the filter takes, up to `limit`, until one is not taken any more. Returns behind which place to go on;
/// nothing at the end.
fn walk(
    service: &Service,
    filter: &Filter,
    next_token: &str,
    groups: impl IntoIterator<Item = GroupId>,
    limit: usize,
    mut take: impl FnMut(&Place, DeadLetterId, DeadLetterRow) -> bool,
) -> Result<Option<Place>, Problem> {
    let from = match next_token {
        "" => filter.from_ms.to_be_bytes().to_vec(),
        token => place_behind(INDEX, token).ok_or_else(foreign_token)?,
    };
    let until = (filter.until_ms < InstantMs::MAX).then(|| filter.until_ms.to_be_bytes().to_vec());
    let prefix = |group: GroupId| match &filter.client {
        Some(client) => Key::letter_of_client_prefix(group, client_hash(client)),
        None => Key::dead_letter_prefix(group),
    };
    let range = Range { prefix: &prefix, from, until };
    let mut walk = Walk::new(&service.store, groups, &range)?;
    let mut taken = 0;
    let mut last: Option<Place> = None;
    for _ in 0..WALKED_MAX {
        if taken == limit {
            break;
        }
        let Some((group, place, row)) = walk.next()? else { return Ok(None) };
        let id = id_at(&place)?;
        let row: Option<DeadLetterRow> = match filter.client {
            // It may have been replayed since its place was read.
            Some(_) => get_row(&service.store, "a dead letter", &Key::dead_letter(group, id))?,
            None => Some(codec::decode("a dead letter", &row)?),
        };
        if let Some(row) = row.filter(|row| filter.takes(id, row)) {
            if !take(&place, id, row) {
                break;
            }
            taken += 1;
        }
        last = Some(place);
    }
    Ok(last)
}

fn foreign_token() -> Invalid {
    Invalid::new("next_token: is not one that an earlier page answered with")
}

fn id_at(place: &[u8]) -> Result<DeadLetterId, StoreError> {
    let parts = place.split_first_chunk::<8>().and_then(|(died, task)| Some((*died, task.try_into().ok()?)));
    let (died, task) = parts.ok_or_else(|| StoreError::damaged("a dead letter", "its key is too short"))?;
    Ok(DeadLetterId { died_ms: InstantMs::from_be_bytes(died), task: TaskId::from_stored(task) })
}

struct Filter {
    client: Option<ClientId>,
    from_ms: InstantMs,
    until_ms: InstantMs,
    task: Option<TaskId>,
    class: Option<FailureClass>,
    name_prefix: String,
}

impl Filter {
    fn new(session: &Session, message: Option<&proto::DeadLetterFilter>) -> Result<Self, Problem> {
        let empty = proto::DeadLetterFilter::default();
        let message = message.unwrap_or(&empty);
        Ok(Self {
            client: whose(session, &message.client_id)?,
            from_ms: message.died_after_ms,
            until_ms: if message.died_before_ms == 0 { InstantMs::MAX } else { message.died_before_ms },
            task: (!message.task_id.is_empty()).then(|| message.task_id.parse()).transpose()?,
            class: failure_class_from(message.failure_class)?,
            name_prefix: message.name_prefix.clone(),
        })
    }

    fn takes(&self, id: DeadLetterId, row: &DeadLetterRow) -> bool {
        let name = || row.tags.as_ref().and_then(|tags| tags.name()).unwrap_or_default();
        self.client.as_ref().is_none_or(|client| *client == row.client)
            && self.task.is_none_or(|task| task == id.task)
            && self.class.is_none_or(|class| class == row.failure.class)
            && (self.name_prefix.is_empty() || name().starts_with(&self.name_prefix))
    }
}

fn shown(id: DeadLetterId, row: DeadLetterRow) -> proto::DeadLetter {
    let DeadLetterRow { client, policy, payload, tags, occurrence, due_ms, attempts, failure, copy } = row;
    let tags = tags.unwrap_or_default();
    proto::DeadLetter {
        dead_letter_id: id.to_string(),
        task_id: id.task.to_string(),
        client_id: client.to_string(),
        payload,
        occurrence,
        due_ms,
        died_ms: id.died_ms,
        attempts,
        failure: Some(failure_to(&failure, id.died_ms)),
        callback: Some(callback_shown(&policy.callback)),
        retry: Some(retry_to(&policy.retry)),
        destination: policy.dead_letter.unwrap_or_default(),
        copy: match copy {
            CopyState::None => String::new(),
            CopyState::UnderWay => "under way".into(),
            CopyState::Delivered => "delivered".into(),
            CopyState::Failed(failure) => failure.to_string(),
        },
        name: tags.name().unwrap_or_default().to_owned(),
        labels: tags.labels().iter().cloned().collect(),
    }
}

pub(super) fn group_of(service: &Service, id: &str) -> Result<(DeadLetterId, GroupId), Problem> {
    let id: DeadLetterId = id.parse()?;
    if id.task.shard().0 >= service.shards {
        return Err(not_found(id));
    }
    Ok((id, GroupId::of_shard(id.task.shard())))
}

fn not_found(id: DeadLetterId) -> Problem {
    Problem::new(Status::NotFound, format!("dead letter {id} is not known: it never was, or was replayed or purged"))
}
