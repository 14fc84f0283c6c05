//! What the operations on dead letters share: what a filter finds, what a request chooses, how one is shown.
//!
//! The oldest come first; each client's are indexed apart, so that nobody looks at those of others. Replaying and purging by
//! a filter goes page by page as well: each request deals with some, and answers with a cursor to go on from, so that a
//! client can show how far it is and stop in between.

use std::sync::Arc;

use futures::StreamExt;
use futures::future::join_all;

use super::tasks::whose;
use crate::propose::Ask;
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::server::problem::Problem;
use crate::server::routing::leader::seek;
use crate::server::routing::pages::{InParts, gather, read_all};
use crate::server::scan::{Part, Place, Range, Room, Scan, place_behind, token};
use crate::shard::Reply;
use crate::store::keys::{Key, client_hash};
use crate::store::overlay::get_row;
use crate::store::rows::{CopyState, DeadLetterRow};
use crate::store::{StoreError, codec};
use crate::task::{ClientId, DeadLetterId, FailureClass, GroupId, InstantMs, Invalid, TaskId};
use crate::wire::convert::{callback_shown, failure_class_from, failure_to, retry_to};
use crate::wire::problems::Code;
use crate::wire::proto::{DeadLetter, DeadLetterFilter};
use crate::wire::routing::Access;

/// Of the index of dead letters, in cursors.
const INDEX: char = 'd';
const LETTERS_DEFAULT: u32 = 100;
const LETTERS_MAX: u32 = 1_000;
/// Rows looked at for one page.
const LOOKED_AT_MAX: usize = 10_000;
/// Replayed or purged at a time, by one request.
const CHANGED_AT_ONCE_MAX: usize = 256;
/// Asked of other nodes at a time, for one request.
const ASKED_AT_A_TIME: usize = 32;

/// How many a page shows, by what was asked for; 0 leaves it to the node.
pub(super) fn limit(limit: u32) -> usize {
    let limit = if limit == 0 { LETTERS_DEFAULT } else { limit.min(LETTERS_MAX) };
    limit as usize
}

/// The cursor behind `place`; empty at the end.
pub(super) fn next_token(more_behind: Option<Place>) -> String {
    more_behind.map_or_else(String::new, |place| token(INDEX, &place))
}

/// A request that does something to each dead letter it names or chooses.
pub(super) trait Changes: InParts<Item = ()> {
    fn choice(&self) -> Choice<'_>;

    /// The same, with a cursor.
    fn going_on(&self, next_token: String) -> Self;

    /// For one dead letter.
    fn one(id: DeadLetterId) -> Self;

    /// What the leader of its shard is asked for.
    fn ask(letter: DeadLetterId, owner: Option<ClientId>) -> Ask;
}

/// What a request to replay or to purge names.
#[derive(Clone, Copy)]
pub(super) struct Choice<'a> {
    pub ids: &'a [String],
    pub filter: Option<&'a DeadLetterFilter>,
    pub limit: u32,
    pub next_token: &'a str,
}

impl<'a> Choice<'a> {
    pub fn room(self) -> Room {
        let items = match self.limit {
            0 => CHANGED_AT_ONCE_MAX,
            wanted => limit(wanted).min(CHANGED_AT_ONCE_MAX),
        };
        Room { items, bytes: usize::MAX }
    }

    /// What dies while this goes on is not part of it: a receiver that fails at once would keep it busy for ever. The
    /// cursor carries the bound, and behind it where to go on.
    fn bound(self, service: &Service) -> Result<(InstantMs, &'a str), Problem> {
        match self.next_token {
            "" => Ok((service.clock.now_ms() + 1, "")),
            token => {
                let parts = token.split_once('-').and_then(|(bound, rest)| Some((bound.parse().ok()?, rest)));
                Ok(parts.ok_or_else(foreign_token)?)
            }
        }
    }

    /// Those that are named one by one; `None` when there is a filter instead.
    fn named(self, service: &Service) -> Result<Option<Chosen>, Problem> {
        let count = self.ids.len();
        if count == 0 {
            return Ok(None);
        }
        if count > LETTERS_MAX as usize {
            return Err(Invalid::new(format!("dead_letter_ids: {count} of them, the limit is {LETTERS_MAX}")).into());
        }
        let letters = self.ids.iter().map(|id| group_of(service, id).map(|(id, _)| id)).collect::<Result<_, _>>()?;
        Ok(Some(Chosen { letters, next_token: String::new() }))
    }

    /// Some shards' part of what a filter chooses: only the places.
    pub fn part(self, service: &Service, session: &Session, groups: &[GroupId]) -> Result<Part<()>, Problem> {
        let mut filter = Filter::new(session, self.filter)?;
        let (bound_ms, next_token) = self.bound(service)?;
        filter.until_ms = filter.until_ms.min(bound_ms);
        let mut items = Vec::new();
        let more_behind = scan(service, &filter, next_token, groups, self.room().items, |place, _, _| {
            items.push((place.clone(), ()));
            true
        })?;
        Ok(Part { items, more_behind })
    }
}

/// What one request deals with.
struct Chosen {
    letters: Vec<DeadLetterId>,
    next_token: String,
}

impl Chosen {
    fn by_filter(bound_ms: InstantMs, part: Part<()>) -> Result<Self, Problem> {
        let letters = part.items.iter().map(|(place, ())| id_at(place)).collect::<Result<_, _>>()?;
        let next_token =
            part.more_behind.map_or_else(String::new, |place| format!("{bound_ms}-{}", token(INDEX, &place)));
        Ok(Self { letters, next_token })
    }
}

/// Does to each what `request` asks for, all at once, on this node. What was done before one of them was refused is done.
/// Returns the replies, and the cursor to go on from.
pub(super) async fn change_here<C: Changes>(
    service: &Arc<Service>,
    session: &Arc<Session>,
    request: C,
) -> Result<(Vec<(DeadLetterId, Reply)>, String), Problem> {
    let chosen = match request.choice().named(service)? {
        Some(chosen) => chosen,
        None => {
            let (bound_ms, from) = request.choice().bound(service)?;
            let request = request.going_on(format!("{bound_ms}-{from}"));
            Chosen::by_filter(bound_ms, read_all(service, session.clone(), request).await?)?
        }
    };
    let owner = (!session.admin).then(|| session.client.clone());
    let asked = chosen.letters.iter().map(async |letter| {
        let group = GroupId::of_shard(letter.task.shard());
        let reply = service.proposer.ask(group, C::ask(*letter, owner.clone())).await;
        reply.map(|reply| (*letter, reply))
    });
    let replies = join_all(asked).await.into_iter().collect::<Result<_, _>>()?;
    Ok((replies, chosen.next_token))
}

/// The same in a cluster, each by its leader. The bound is the same for all nodes, by this one's clock.
pub(super) async fn change_among_nodes<C: Changes>(
    service: &Arc<Service>,
    session: &Arc<Session>,
    request: C,
) -> Result<(Vec<C::Answer>, String), Problem> {
    let chosen = match request.choice().named(service)? {
        Some(chosen) => chosen,
        None => {
            let (bound_ms, from) = request.choice().bound(service)?;
            let request = request.going_on(format!("{bound_ms}-{from}"));
            Chosen::by_filter(bound_ms, gather(service, session, &request).await?)?
        }
    };
    let asked = chosen.letters.iter().map(|letter| {
        let group = GroupId::of_shard(letter.task.shard());
        let (service, session, request) = (service.clone(), session.clone(), C::one(*letter));
        async move { seek(&service, &session, request, group, Access::Write).await }
    });
    // Collected first: a stream over borrowed closures is not `Send`.
    let asked: Vec<_> = asked.collect();
    let answers: Vec<_> = futures::stream::iter(asked).buffered(ASKED_AT_A_TIME).collect().await;
    // What was done before one of them was refused is done.
    Ok((answers.into_iter().collect::<Result<_, _>>()?, chosen.next_token))
}

/// Shows what the filter takes, up to `limit`, until one is not taken any more. Returns behind which place to go on;
/// nothing at the end.
pub(super) fn scan(
    service: &Service,
    filter: &Filter,
    next_token: &str,
    groups: &[GroupId],
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
    let mut scan = Scan::new(&service.store, groups.iter().copied(), &range)?;
    let mut taken = 0;
    let mut last: Option<Place> = None;
    for _ in 0..LOOKED_AT_MAX {
        if taken == limit {
            break;
        }
        let Some((group, place, row)) = scan.next()? else { return Ok(None) };
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

pub(super) struct Filter {
    client: Option<ClientId>,
    from_ms: InstantMs,
    until_ms: InstantMs,
    task: Option<TaskId>,
    class: Option<FailureClass>,
    name_prefix: String,
}

impl Filter {
    pub fn new(session: &Session, message: Option<&DeadLetterFilter>) -> Result<Self, Problem> {
        let empty = DeadLetterFilter::default();
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

pub(super) fn shown(id: DeadLetterId, row: DeadLetterRow) -> DeadLetter {
    let DeadLetterRow { client, policy, payload, tags, occurrence, due_ms, attempts, failure, copy } = row;
    let tags = tags.unwrap_or_default();
    DeadLetter {
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

pub(super) fn not_found(id: DeadLetterId) -> Problem {
    Problem::new(Code::NotFound, format!("dead letter {id} is not known: it never was, or was replayed or purged"))
}
