//! Every way in which a request can go wrong, each with a name, a status, and what its reader should do: one table.

use crate::answers::Verdict;
use crate::proto::Status;

macro_rules! problems {
    ($($(#[doc = $doc:literal])+ $code:ident = $name:literal, $status:ident, $advice:literal;)*) => {
        /// What has gone wrong with a request, by what can be done about it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code {
            $($(#[doc = $doc])+ $code,)*
        }

        impl Code {
            /// All of them.
            pub const ALL: &[Code] = &[$(Code::$code),*];

            /// For programs: never changes.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Code::$code => $name,)*
                }
            }

            /// In messages. Several codes may have one status.
            pub const fn status(self) -> Status {
                match self {
                    $(Code::$code => Status::$status,)*
                }
            }

            /// What its reader should do, as a sentence.
            pub const fn advice(self) -> &'static str {
                match self {
                    $(Code::$code => $advice,)*
                }
            }
        }
    };
}

problems! {
    /// The request is against the rules; it is refused each time.
    InvalidRequest = "invalid_request", InvalidRequest, "correct what the text names, and ask again";
    /// Whoever asks may not do this, or is not known.
    Unauthorized = "unauthorized", Unauthorized, "ask with the credentials of somebody who may do this";
    /// The session has ended; nothing was done.
    SessionExpired = "session_expired", SessionExpired, "open a new session, and ask again";
    /// There is no such thing, or none of the asker's.
    NotFound = "not_found", NotFound, "look whether it is done, cancelled or removed, and whether its id was copied whole";
    /// An attempt may be out already.
    TooLate = "too_late", TooLate, "wait until the attempt is settled, and ask again if it is still wanted";
    /// It was changed since it was read.
    Conflict = "conflict", Conflict, "read it again, and decide by what it is now";
    /// Another node leads what this is about, or nobody does; nothing was done.
    NotLeader = "not_leader", NotLeader, "ask the node that is named, or the same one again in half a second";
    /// There is no room now; nothing was done.
    Overloaded = "overloaded", Overloaded, "ask again after the time that is given";
    /// There is no room until something is given up or done with; nothing was done.
    LimitReached = "limit_reached", Overloaded, "end what is no longer needed, or have the limit raised";
    /// Nobody knows whether it was done.
    MaybeDone = "maybe_done", Error, "look whether it was done before asking again, or ask with a deduplication key";
    /// The node has failed.
    Failed = "failed", Error, "look into the node's log, which says why";
}

impl Code {
    /// That of an answer; `None` when all is well.
    pub fn of(verdict: &Verdict<'_>) -> Option<Self> {
        let detail = verdict.detail;
        let has_room_later = detail.is_some_and(|detail| detail.retry_after_ms > 0);
        Some(match Status::try_from(verdict.status) {
            Ok(Status::Ok) => return None,
            _ if detail.is_some_and(|detail| detail.maybe_done) => Code::MaybeDone,
            Ok(Status::InvalidRequest) => Code::InvalidRequest,
            Ok(Status::Unauthorized) => Code::Unauthorized,
            Ok(Status::SessionExpired) => Code::SessionExpired,
            Ok(Status::NotFound) => Code::NotFound,
            Ok(Status::TooLate) => Code::TooLate,
            Ok(Status::Conflict) => Code::Conflict,
            Ok(Status::NotLeader) => Code::NotLeader,
            Ok(Status::Overloaded) if has_room_later => Code::Overloaded,
            Ok(Status::Overloaded) => Code::LimitReached,
            Ok(Status::Error) | Err(_) => Code::Failed,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::proto::Detail;

    #[test]
    fn an_answer_tells_which_problem_it_is() {
        for code in Code::ALL {
            let detail = Detail {
                maybe_done: *code == Code::MaybeDone,
                retry_after_ms: if *code == Code::Overloaded { 50 } else { 0 },
                ..Default::default()
            };
            let verdict = Verdict { status: code.status().into(), text: "", detail: Some(&detail) };
            assert_eq!(Code::of(&verdict), Some(*code));
        }
        assert_eq!(Code::of(&Verdict { status: Status::Ok.into(), text: "", detail: None }), None);
        let newer = Verdict { status: 99, text: "", detail: None };
        assert_eq!(Code::of(&newer), Some(Code::Failed), "a status that this code does not know");
    }

    #[test]
    fn each_has_a_name_of_its_own_and_advice() {
        let names: HashSet<&str> = Code::ALL.iter().map(|code| code.name()).collect();
        assert_eq!(names.len(), Code::ALL.len());
        for code in Code::ALL {
            assert!(code.name().bytes().all(|letter| letter.is_ascii_lowercase() || letter == b'_'), "{code:?}");
            assert!(!code.advice().is_empty() && !code.advice().ends_with('.'), "{code:?}");
        }
    }
}
