//! What every answer has, whichever kind it is: a status, a text, and what goes beyond them; and what that proves about the
//! request.

use std::time::Duration;

use crate::proto::{Detail, Status};

/// What an answer says about its request. Any answer can be asked for it, see [`Verdict::of`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Verdict<'a> {
    /// A [`Status`]; another number comes from a node that is newer than this code.
    pub status: i32,
    /// For people; empty when all is well.
    pub text: &'a str,
    /// What goes beyond both, where it is known.
    pub detail: Option<&'a Detail>,
}

/// What an answer proves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// The request was done.
    Done,
    /// It was not done, and will not be.
    NotDone(Refused),
    /// Nobody knows; it may have been done, and may be done yet.
    Nothing,
}

/// Why a request was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The node does not know the session. In another one it would be done.
    NoSession,
    /// The node does not lead what the request is about. Whoever does would do it.
    NotLeader,
    /// There was no room, and there will be some after this time.
    NoRoom {
        /// From when the answer was made.
        retry_after: Duration,
    },
    /// By what it asks for, or by who asks: it is refused each time.
    Itself,
}

impl Verdict<'_> {
    /// Whether the request was done, as far as this answer says.
    pub fn proves(&self) -> Proof {
        if self.detail.is_some_and(|detail| detail.maybe_done) {
            return Proof::Nothing;
        }
        let retry_after_ms = self.detail.map_or(0, |detail| detail.retry_after_ms);
        match Status::try_from(self.status) {
            Ok(Status::Ok) => Proof::Done,
            _ if self.session_is_gone() => Proof::NotDone(Refused::NoSession),
            Ok(Status::NotLeader) => Proof::NotDone(Refused::NotLeader),
            Ok(Status::Overloaded) if retry_after_ms > 0 => {
                Proof::NotDone(Refused::NoRoom { retry_after: Duration::from_millis(retry_after_ms) })
            }
            _ => Proof::NotDone(Refused::Itself),
        }
    }

    /// Whether nothing was done because the node does not lead what the request is about.
    pub fn is_not_leader(&self) -> bool {
        self.proves() == Proof::NotDone(Refused::NotLeader)
    }

    /// The node does not know the session, so it did not execute the request.
    ///
    /// `UNAUTHORIZED` also means "this client may not do that", where a new session would not help; the original
    /// protocol has no other mark than the text to tell the two apart.
    fn session_is_gone(&self) -> bool {
        self.status == Status::SessionExpired as i32
            || self.status == Status::Unauthorized as i32 && self.text.to_ascii_lowercase().contains("session")
    }
}

/// A request is not done, in the words of any answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Refusal {
    /// Not `OK`.
    pub status: Status,
    /// What is wrong, and what can be done about it.
    pub text: String,
    /// What goes beyond both, where it is known.
    pub detail: Option<Detail>,
}

/// A message that answers a request.
pub trait Answer {
    /// What it says about the request.
    fn verdict(&self) -> Verdict<'_>;
    /// The place of its status, see [`Verdict::status`].
    fn status_mut(&mut self) -> &mut i32;
    /// Makes it refuse its request; the rest of it stays as it is.
    fn refuse(&mut self, refusal: Refusal);

    /// One that refuses.
    fn refusing(refusal: impl Into<Refusal>) -> Self
    where
        Self: Default,
    {
        let mut answer = Self::default();
        answer.refuse(refusal.into());
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict<'a>(status: Status, text: &'a str, detail: Option<&'a Detail>) -> Verdict<'a> {
        Verdict { status: status.into(), text, detail }
    }

    #[test]
    fn only_an_unknown_session_is_worth_a_new_one() {
        for (status, text, expected) in [
            (Status::SessionExpired, "", Refused::NoSession),
            (Status::Unauthorized, "Unknown session", Refused::NoSession),
            (Status::Unauthorized, "needs an administrator", Refused::Itself),
            (Status::Error, "session store is full", Refused::Itself),
        ] {
            assert_eq!(verdict(status, text, None).proves(), Proof::NotDone(expected), "{status:?} {text}");
        }
    }

    #[test]
    fn what_an_answer_proves() {
        let later = Detail { retry_after_ms: 250, ..Default::default() };
        let maybe = Detail { maybe_done: true, ..Default::default() };
        // It says when to come again, and that it may be done already: the latter counts.
        let both = Detail { maybe_done: true, ..later.clone() };
        let no_room = Refused::NoRoom { retry_after: Duration::from_millis(250) };
        for (status, detail, expected) in [
            (Status::Ok, None, Proof::Done),
            (Status::NotLeader, None, Proof::NotDone(Refused::NotLeader)),
            (Status::NotLeader, Some(&later), Proof::NotDone(Refused::NotLeader)),
            (Status::Overloaded, Some(&later), Proof::NotDone(no_room)),
            // Of sessions, say: nobody knows when there will be room for one more.
            (Status::Overloaded, None, Proof::NotDone(Refused::Itself)),
            (Status::TooLate, None, Proof::NotDone(Refused::Itself)),
            (Status::Error, None, Proof::NotDone(Refused::Itself)),
            (Status::Error, Some(&maybe), Proof::Nothing),
            (Status::Overloaded, Some(&both), Proof::Nothing),
        ] {
            assert_eq!(verdict(status, "", detail).proves(), expected, "{status:?} {detail:?}");
        }
        let newer = Verdict { status: 99, text: "", detail: None };
        assert_eq!(newer.proves(), Proof::NotDone(Refused::Itself), "a status that this code does not know");
    }
}
