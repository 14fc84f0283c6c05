//! Tables of messages and of what they must be answered: each row is a message with a name, a status and a text, and
//! one function asks them all and says of every row that was answered otherwise what was expected and what came.

use std::fmt::Write;

use boomerang_wire::proto::{BoomerangEnvelope, RegistrationResponse, Status, boomerang_envelope::Payload};

use super::PATIENCE;
use super::legacy::{self, Client};
use super::raw::{NoFrame, Raw, frame};

/// The longest text of an answer, in bytes: names and addresses that are refused are quoted, but not without end.
const TEXT_MAX: usize = 4_000;
/// The number that requests of a table carry, and that their answers must carry, too.
const REQUEST_ID: u64 = 77;

/// A row: what is sent, and what must be answered.
#[derive(Clone)]
pub struct Case<M> {
    name: String,
    message: M,
    status: i32,
    /// `...` stands for anything.
    text: &'static str,
}

/// A row of a table. In `text`, `...` stands for anything: `"delay_ms: ...30 days"` begins and ends like this.
pub fn case<M>(name: impl Into<String>, message: M, status: impl Into<i32>, text: &'static str) -> Case<M> {
    Case { name: name.into(), message, status: status.into(), text }
}

impl<M> Case<M> {
    /// The same row with another message made of this one.
    pub fn map<N>(self, change: impl FnOnce(M) -> N) -> Case<N> {
        Case { name: self.name, message: change(self.message), status: self.status, text: self.text }
    }
}

/// What came after a message was sent.
pub enum Came {
    /// The answer to it.
    Answer { status: i32, text: String },
    /// Something that is no answer to it.
    Amiss(String),
    /// No frame. After one that did not come in time nothing more is asked: it could come instead of the next answer.
    Nothing(NoFrame),
}

/// Sends one row after the other. Fails with all rows that were answered otherwise; returns the texts of the answers.
pub fn check<M>(cases: impl IntoIterator<Item = Case<M>>, mut ask: impl FnMut(M) -> Came) -> Vec<String> {
    let mut cases = cases.into_iter();
    let (mut texts, mut wrong, mut asked) = (Vec::new(), String::new(), 0);
    while let Some(Case { name, message, status, text }) = cases.next() {
        asked += 1;
        let (came, ends) = match ask(message) {
            Came::Answer { status: found, text: said } => {
                let fits = found == status && is_like(&said, text) && is_fit_for_a_terminal(&said);
                let came = (!fits).then(|| format!("{} {}", name_of(found), shortened(&said)));
                texts.push(said);
                (came, false)
            }
            Came::Amiss(what) => (Some(shortened(&what)), false),
            Came::Nothing(why) => (Some(format!("no answer: {why:?}")), why == NoFrame::TimedOut),
        };
        if let Some(came) = came {
            let _ = write!(wrong, "\n  {name}\n    expected  {} {text:?}\n    came      {came}", name_of(status));
        }
        if ends {
            let _ = write!(wrong, "\n  {} more were not sent", cases.by_ref().count());
        }
    }
    assert!(asked > 0, "a table without rows");
    assert!(wrong.is_empty(), "not all of {asked} messages were answered as expected:{wrong}");
    texts
}

/// Sends bytes that are no request.
pub fn send_bytes(raw: &mut Raw, bytes: &[u8]) -> Came {
    match exchange(raw, bytes, 0) {
        Ok(Payload::ErrorResponse(answer)) => Came::Answer { status: answer.status, text: answer.error_message },
        Ok(other) => Came::Amiss(format!("{other:?}")),
        Err(came) => came,
    }
}

/// The same, when the connection must be closed after the answer.
pub fn send_last_bytes(raw: &mut Raw, bytes: &[u8]) -> Came {
    match send_bytes(raw, bytes) {
        Came::Answer { status, text } => match raw.next_frame(PATIENCE) {
            Err(NoFrame::Closed) => Came::Answer { status, text },
            open => Came::Amiss(format!("{} {text:?}, and then {open:?} instead of the end", name_of(status))),
        },
        other => other,
    }
}

/// Sends a request in a session ("" is none) of a client that knows all there is.
pub fn ask(raw: &mut Raw, session_id: &str, request: Payload) -> Came {
    match exchange(raw, &numbered(session_id, request.clone()), REQUEST_ID) {
        Ok(answer) => answer_to(&request, answer),
        Err(came) => came,
    }
}

/// Sends, in a session, what is well-formed and yet no request.
pub fn send_no_request(raw: &mut Raw, session_id: &str, payload: Payload) -> Came {
    match exchange(raw, &numbered(session_id, payload), REQUEST_ID) {
        Ok(Payload::ErrorResponse(answer)) => Came::Answer { status: answer.status, text: answer.error_message },
        Ok(other) => Came::Amiss(format!("{other:?}")),
        Err(came) => came,
    }
}

/// Sends a request of a client that knows only the original protocol, in its session.
pub fn ask_as_original(client: &mut Client, request: &legacy::Payload) -> Came {
    use legacy::Payload as P;
    let bytes = client.frame(request.clone());
    let _ = client.raw.try_send_bytes(&bytes);
    let answer = match client.try_answer() {
        Ok(answer) => answer,
        Err(why) => return Came::Nothing(why),
    };
    let (status, text) = match (request, answer) {
        (P::AuthHandshake(_), P::AuthResponse(answer)) => (answer.status, answer.error_message),
        (P::RegistrationRequest(_), P::RegistrationResponse(answer)) => {
            if answer.status != legacy::OK && !answer.task_id.is_empty() {
                return Came::Amiss(format!("refused, and yet it has an id: {answer:?}"));
            }
            (answer.status, answer.error_message)
        }
        (P::CancellationRequest(_), P::CancellationResponse(answer)) => (answer.status, answer.error_message),
        // The original has no text for this one.
        (P::SessionRefresh(_), P::SessionRefreshResponse(answer)) => (answer.status, String::new()),
        (P::ClientRegistration(_), P::ClientRegistrationResponse(answer)) => (answer.status, answer.error_message),
        (P::ClientDeregistration(_), P::ClientDeregistrationResponse(answer)) => (answer.status, answer.error_message),
        (P::ListTasksRequest(_), P::ListTasksResponse(answer)) => (answer.status, answer.error_message),
        (P::GetTaskRequest(_), P::GetTaskResponse(answer)) => (answer.status, answer.error_message),
        (_, other) => return Came::Amiss(format!("{other:?}")),
    };
    Came::Answer { status, text }
}

/// The answer to a registration: one that was refused has no id.
pub fn registered(answer: RegistrationResponse) -> Came {
    if answer.status() != Status::Ok && !answer.task_id.is_empty() {
        return Came::Amiss(format!("refused, and yet it has an id: {answer:?}"));
    }
    Came::Answer { status: answer.status, text: answer.error_message }
}

/// Status and text of `answer`, if it is of the kind that `request` asks for.
fn answer_to(request: &Payload, answer: Payload) -> Came {
    use Payload as P;
    let (status, text) = match (request, answer) {
        (P::AuthHandshake(_), P::AuthResponse(answer)) => {
            if answer.status() != Status::Ok && !answer.session_id.is_empty() {
                return Came::Amiss(format!("refused, and yet it has a session: {answer:?}"));
            }
            (answer.status, answer.error_message)
        }
        (P::RegistrationRequest(_), P::RegistrationResponse(answer)) => return registered(answer),
        (P::SessionRefresh(_), P::SessionRefreshResponse(answer)) => (answer.status, answer.error_message),
        (P::ListTasksRequest(_), P::ListTasksResponse(answer)) => (answer.status, answer.error_message),
        (P::UpdateTaskRequest(_), P::UpdateTaskResponse(answer)) => (answer.status, answer.error_message),
        (P::PauseTaskRequest(_), P::PauseTaskResponse(answer)) => (answer.status, answer.error_message),
        (P::GetDeadLetterRequest(_), P::GetDeadLetterResponse(answer)) => (answer.status, answer.error_message),
        (P::ListDeadLettersRequest(_), P::ListDeadLettersResponse(answer)) => (answer.status, answer.error_message),
        (P::ReplayDeadLettersRequest(_), P::ReplayDeadLettersResponse(answer)) => (answer.status, answer.error_message),
        (P::ApiKeyRequest(_), P::ApiKeyResponse(answer)) => (answer.status, answer.error_message),
        (P::ApiKeyRevocation(_), P::ApiKeyRevocationResponse(answer)) => (answer.status, answer.error_message),
        (_, other) => return Came::Amiss(format!("{other:?}")),
    };
    Came::Answer { status, text }
}

fn numbered(session_id: &str, payload: Payload) -> Vec<u8> {
    frame(&BoomerangEnvelope { session_id: session_id.to_owned(), request_id: REQUEST_ID, payload: Some(payload) })
}

/// The next answer, which must carry this number.
fn exchange(raw: &mut Raw, bytes: &[u8], request_id: u64) -> Result<Payload, Came> {
    // The other side may have had enough before all of it is sent; what it says to that is what counts.
    let _ = raw.try_send_bytes(bytes);
    let envelope = raw.next().map_err(Came::Nothing)?;
    match envelope {
        BoomerangEnvelope { request_id: found, payload: Some(answer), .. } if found == request_id => Ok(answer),
        other => Err(Came::Amiss(format!("an answer to request {request_id} was expected: {other:?}"))),
    }
}

/// Whether `text` is `pattern`, in which `...` stands for anything.
fn is_like(text: &str, pattern: &str) -> bool {
    let (first, rest) = pattern.split_once("...").map_or((pattern, None), |(first, rest)| (first, Some(rest)));
    let Some(text) = text.strip_prefix(first) else { return false };
    let Some(rest) = rest else { return text.is_empty() };
    text.char_indices().map(|(at, _)| at).chain([text.len()]).any(|at| is_like(&text[at..], rest))
}

/// Short, and nothing in it that a terminal would obey.
fn is_fit_for_a_terminal(text: &str) -> bool {
    text.len() < TEXT_MAX && !text.chars().any(char::is_control)
}

fn name_of(status: i32) -> String {
    Status::try_from(status).map_or_else(|_| format!("status {status}"), |status| format!("{status:?}"))
}

fn shortened(text: &str) -> String {
    let short: String = text.chars().take(300).collect();
    let more =
        if short.len() < text.len() { format!(" and {} bytes more", text.len() - short.len()) } else { String::new() };
    format!("{short:?}{more}")
}
