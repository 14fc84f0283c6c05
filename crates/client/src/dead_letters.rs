//! Dead letters: look at them, send them again, throw them away.
//!
//! Replay and purge work page by page: a node does a bounded part with each request and says where to go on. Nothing is
//! done twice when a page is asked for again, for what was replayed or purged is gone.

use super::error::unexpected;
use super::{Client, ClientError, DeadLetter};
use boomerang_task::{ClientId, DeadLetterId, FailureClass, InstantMs, Invalid, TaskId};
use boomerang_wire::convert;
use boomerang_wire::proto::{self, Status, boomerang_envelope::Payload};

/// Which dead letters. The default is all of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeadLetterFilter {
    /// Only those of this client; others than one's own are for administrators.
    pub client_id: Option<ClientId>,
    /// Only those that died after this instant.
    pub died_after_ms: Option<InstantMs>,
    /// Only those that died before this instant.
    pub died_before_ms: Option<InstantMs>,
    /// Only those of this task.
    pub task_id: Option<TaskId>,
    /// Only those whose last attempt failed in this way.
    pub class: Option<FailureClass>,
    /// Only those of tasks whose name begins so.
    pub name_prefix: String,
}

/// What to replay or purge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeadLetterChoice {
    /// These; at least one.
    Ids(Vec<DeadLetterId>),
    /// All that the filter names.
    Filter(DeadLetterFilter),
}

/// Some dead letters, and where the next page begins.
#[derive(Debug, Clone)]
pub struct DeadLetterPage {
    /// The oldest first.
    pub dead_letters: Vec<DeadLetter>,
    /// `None` when this is the last page. A page may be empty and yet not be the last one.
    pub next_token: Option<String>,
}

/// A dead letter that was to be sent again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replayed {
    /// Which one.
    pub id: DeadLetterId,
    /// The task that was made of it; `None` when the dead letter was not there any more.
    pub task_id: Option<TaskId>,
}

/// What one request has replayed, and where to go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplayPage {
    /// Each with the task that was made of it.
    pub replayed: Vec<Replayed>,
    /// `None` when nothing is left to do.
    pub next_token: Option<String>,
}

/// What one request has purged, and where to go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PurgePage {
    /// So many are gone.
    pub purged: u64,
    /// `None` when nothing is left to do.
    pub next_token: Option<String>,
}

impl DeadLetterFilter {
    fn message(&self) -> proto::DeadLetterFilter {
        let class = self.class.map_or(proto::FailureClass::UnknownFailure, convert::failure_class_to);
        proto::DeadLetterFilter {
            client_id: self.client_id.as_ref().map(ClientId::to_string).unwrap_or_default(),
            died_after_ms: self.died_after_ms.unwrap_or(0),
            died_before_ms: self.died_before_ms.unwrap_or(0),
            task_id: self.task_id.map(|task_id| task_id.to_string()).unwrap_or_default(),
            failure_class: class.into(),
            name_prefix: self.name_prefix.clone(),
        }
    }
}

impl DeadLetterChoice {
    /// Ids, or a filter. No ids at all would mean "all that the filter names" to the node, and is refused.
    fn parts(&self) -> Result<(Vec<String>, Option<proto::DeadLetterFilter>), Invalid> {
        match self {
            DeadLetterChoice::Ids(ids) if ids.is_empty() => Err(Invalid("dead_letter_ids: is empty".into())),
            DeadLetterChoice::Ids(ids) => Ok((ids.iter().map(DeadLetterId::to_string).collect(), None)),
            DeadLetterChoice::Filter(filter) => Ok((Vec::new(), Some(filter.message()))),
        }
    }
}

impl Client {
    /// One page of dead letters, from the beginning or from the `next_token` of the page before. A `limit` of 0 leaves
    /// the size to the node.
    pub async fn list_dead_letters(
        &self,
        filter: &DeadLetterFilter,
        limit: u32,
        token: &str,
    ) -> Result<DeadLetterPage, ClientError> {
        let filter = Some(filter.message());
        let request = proto::ListDeadLettersRequest { filter, limit, next_token: token.to_owned() };
        match self.request(Payload::ListDeadLettersRequest(request)).await? {
            Payload::ListDeadLettersResponse(answer) => Ok(DeadLetterPage {
                dead_letters: answer
                    .dead_letters
                    .into_iter()
                    .map(DeadLetter::from_message)
                    .collect::<Result<_, _>>()?,
                next_token: further(answer.next_token, token)?,
            }),
            _ => Err(unexpected("the wrong kind of answer to a list of dead letters")),
        }
    }

    /// One dead letter; `None` when there is none of this name, for this client.
    pub async fn get_dead_letter(&self, id: DeadLetterId) -> Result<Option<DeadLetter>, ClientError> {
        let request = proto::GetDeadLetterRequest { dead_letter_id: id.to_string() };
        match self.request(Payload::GetDeadLetterRequest(request)).await {
            Ok(Payload::GetDeadLetterResponse(answer)) => match answer.dead_letter {
                Some(letter) => DeadLetter::from_message(letter).map(Some),
                None => Err(unexpected("a dead letter without its details")),
            },
            Ok(_) => Err(unexpected("the wrong kind of answer to a get of a dead letter")),
            Err(error) if error.status() == Some(Status::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Registers dead letters again, due at once with all their attempts, and removes them, each in one step. Does a
    /// part of them: go on with the `next_token` until there is none.
    pub async fn replay_dead_letters(
        &self,
        choice: &DeadLetterChoice,
        limit: u32,
        token: &str,
    ) -> Result<ReplayPage, ClientError> {
        let (dead_letter_ids, filter) = choice.parts()?;
        let request = proto::ReplayDeadLettersRequest { dead_letter_ids, filter, limit, next_token: token.to_owned() };
        match self.request(Payload::ReplayDeadLettersRequest(request)).await? {
            Payload::ReplayDeadLettersResponse(answer) => Ok(ReplayPage {
                replayed: answer.replayed.into_iter().map(replayed).collect::<Result<_, _>>()?,
                next_token: further(answer.next_token, token)?,
            }),
            _ => Err(unexpected("the wrong kind of answer to a replay")),
        }
    }

    /// Removes dead letters for good. Does a part of them: go on with the `next_token` until there is none.
    pub async fn purge_dead_letters(
        &self,
        choice: &DeadLetterChoice,
        limit: u32,
        token: &str,
    ) -> Result<PurgePage, ClientError> {
        let (dead_letter_ids, filter) = choice.parts()?;
        let request = proto::PurgeDeadLettersRequest { dead_letter_ids, filter, limit, next_token: token.to_owned() };
        match self.request(Payload::PurgeDeadLettersRequest(request)).await? {
            Payload::PurgeDeadLettersResponse(answer) => {
                Ok(PurgePage { purged: answer.purged, next_token: further(answer.next_token, token)? })
            }
            _ => Err(unexpected("the wrong kind of answer to a purge")),
        }
    }
}

fn replayed(message: proto::Replayed) -> Result<Replayed, ClientError> {
    let wrong = |error: Invalid| unexpected(&error.to_string());
    let task_id = (!message.task_id.is_empty()).then(|| message.task_id.parse()).transpose().map_err(wrong)?;
    Ok(Replayed { id: message.dead_letter_id.parse().map_err(wrong)?, task_id })
}

/// Where to go on. A token that comes back as it was sent would make an endless loop of it.
fn further(next_token: String, token: &str) -> Result<Option<String>, ClientError> {
    match next_token {
        next if next.is_empty() => Ok(None),
        next if next == token => Err(unexpected(&format!("the page token '{token}' was repeated"))),
        next => Ok(Some(next)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::{self, exchange};
    use super::*;

    #[tokio::test]
    async fn a_filter_travels_and_a_page_comes_back() {
        let answer = Payload::ListDeadLettersResponse(proto::ListDeadLettersResponse {
            dead_letters: vec![fake::dead_letter(1)],
            next_token: "more".into(),
            ..Default::default()
        });
        let filter = DeadLetterFilter {
            client_id: Some("orders".parse().unwrap()),
            died_before_ms: Some(9),
            task_id: Some(fake::task_id(1)),
            class: Some(FailureClass::Timeout),
            name_prefix: "night".into(),
            ..Default::default()
        };
        let list = async |client: Client| client.list_dead_letters(&filter, 7, "").await;
        let (request, page) = exchange(answer, list).await;
        let page = page.unwrap();
        assert_eq!(page.next_token.as_deref(), Some("more"));
        let letter = &page.dead_letters[0];
        assert_eq!((letter.id, letter.attempts), (fake::dead_letter_id(1), 5));
        assert_eq!(letter.failure.as_ref().unwrap().class, Some(FailureClass::Refused));
        let Payload::ListDeadLettersRequest(request) = request else { panic!("{request:?}") };
        let sent = request.filter.unwrap();
        assert_eq!((sent.client_id.as_str(), sent.died_before_ms, request.limit), ("orders", 9, 7));
        assert_eq!(sent.failure_class(), proto::FailureClass::Timeout);
        assert_eq!((sent.name_prefix.as_str(), sent.task_id), ("night", fake::task_id(1).to_string()));
    }

    #[tokio::test]
    async fn replay_and_purge_say_where_to_go_on() {
        let answer = Payload::ReplayDeadLettersResponse(proto::ReplayDeadLettersResponse {
            replayed: vec![
                proto::Replayed {
                    dead_letter_id: fake::dead_letter_id(1).to_string(),
                    task_id: fake::task_id(9).to_string(),
                },
                proto::Replayed { dead_letter_id: fake::dead_letter_id(2).to_string(), task_id: String::new() },
            ],
            next_token: "2".into(),
            ..Default::default()
        });
        let choice = DeadLetterChoice::Ids(vec![fake::dead_letter_id(1), fake::dead_letter_id(2)]);
        let replay = async |client: Client| client.replay_dead_letters(&choice, 0, "1").await;
        let (request, page) = exchange(answer.clone(), replay).await;
        let page = page.unwrap();
        assert_eq!(page.next_token.as_deref(), Some("2"));
        let made: Vec<_> = page.replayed.iter().map(|replayed| replayed.task_id).collect();
        assert_eq!(made, [Some(fake::task_id(9)), None]);
        let Payload::ReplayDeadLettersRequest(request) = request else { panic!("{request:?}") };
        assert_eq!((request.dead_letter_ids.len(), request.filter, request.next_token.as_str()), (2, None, "1"));

        let repeat = async |client: Client| client.replay_dead_letters(&choice, 0, "2").await;
        assert!(matches!(exchange(answer, repeat).await.1, Err(ClientError::Protocol(_))), "it would never end");

        let answer = proto::PurgeDeadLettersResponse { purged: 12, ..Default::default() };
        let all = DeadLetterChoice::Filter(DeadLetterFilter::default());
        let purge = async |client: Client| client.purge_dead_letters(&all, 100, "").await;
        let (request, page) = exchange(Payload::PurgeDeadLettersResponse(answer), purge).await;
        assert_eq!(page.unwrap(), PurgePage { purged: 12, next_token: None });
        let Payload::PurgeDeadLettersRequest(request) = request else { panic!("{request:?}") };
        assert!(request.filter.is_some() && request.dead_letter_ids.is_empty() && request.limit == 100);
    }

    #[test]
    fn no_ids_are_not_all_of_them() {
        assert!(DeadLetterChoice::Ids(Vec::new()).parts().is_err());
    }

    #[tokio::test]
    async fn a_missing_dead_letter_is_no_error() {
        let answer = proto::GetDeadLetterResponse { status: Status::NotFound.into(), ..Default::default() };
        let get = async |client: Client| client.get_dead_letter(fake::dead_letter_id(1)).await;
        assert_eq!(exchange(Payload::GetDeadLetterResponse(answer), get).await.1.unwrap(), None);
        let answer = proto::GetDeadLetterResponse { dead_letter: Some(fake::dead_letter(3)), ..Default::default() };
        let get = async |client: Client| client.get_dead_letter(fake::dead_letter_id(3)).await;
        assert_eq!(exchange(Payload::GetDeadLetterResponse(answer), get).await.1.unwrap().unwrap().payload, "dead");
    }
}
