//! Histories by hand, for the tests of checkers: short to write, and every instant is chosen.
//!
//! Instants are milliseconds since the run began; the run begins at [`BEGAN`], so `due(5)` is what the cluster would say of
//! the fifth millisecond.

use boomerang_task::{Fence, Missed};

use super::{Checker, Limits, Verdict};
use crate::history::{
    Answer, Call, Delivery, Due, End, Event, FIRST_VERSION, FaultNote, History, Left, LeftAs, Registration, Stage,
    Token, What,
};

pub const BEGAN: u64 = 1_000_000;

pub fn due(at_ms: u64) -> u64 {
    BEGAN + at_ms
}

/// Nothing is early but by wrong clocks, and then by a second; all is calm 10 s after healing, half a second is late, what is
/// 5 s on its way is no longer stale.
pub const LIMITS: Limits = Limits {
    early_us: 0,
    early_clocks_us: 1_000_000,
    heal_within_us: 10_000_000,
    late_us: 500_000,
    answer_us: 200_000,
    stale_us: 5_000_000,
};

/// Gathers events in any order; [`HandMade::history`] puts them into theirs.
#[derive(Default)]
pub struct HandMade {
    events: Vec<(u64, What)>,
    processes: u32,
}

pub fn one_shot(token: Token, due_at: u64) -> Registration {
    Registration {
        token,
        load: "one-shot".to_owned(),
        client: "c".to_owned(),
        due: Due::At(due(due_at)),
        every_ms: None,
        missed: Missed::Once,
        count: None,
        key: None,
        attempts: 3,
        refusals: 0,
    }
}

pub fn recurring(token: Token, first_at: u64, every_ms: u64, missed: Missed) -> Registration {
    Registration { load: "recurring".to_owned(), every_ms: Some(every_ms), missed, ..one_shot(token, first_at) }
}

pub fn id(token: Token) -> String {
    format!("t{token}")
}

/// A delivery of occurrence 0, attempt 1, accepted, in term 1.
pub fn delivery(token: Token, due_at: u64) -> Delivery {
    Delivery {
        token,
        task: id(token),
        occurrence: 0,
        attempt: 1,
        version: FIRST_VERSION,
        due_ms: due(due_at),
        fence: Fence { term: 1, seq: 1 },
        accepted: true,
        effect: None,
        dead_letter: false,
        datagram: false,
    }
}

pub fn registered(token: Token, due_at: u64) -> End {
    End::Ok(Answer::Registered { task: id(token), due_ms: due(due_at), duplicate: false })
}

pub fn unknown() -> End {
    End::Unknown("nobody answered".to_owned())
}

pub fn failed() -> End {
    End::Fail("not the leader".to_owned())
}

pub fn found(due_at: u64, version: u32) -> End {
    End::Ok(Answer::Found { due_ms: due(due_at), occurrence: 0, attempt: 1, version })
}

pub fn listed(tokens: &[Token]) -> End {
    End::Ok(Answer::Listed { tasks: tokens.iter().map(|token| id(*token)).collect() })
}

impl HandMade {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn event(mut self, at: u64, what: What) -> Self {
        self.events.push((at, what));
        self
    }

    /// An operation by a process of its own.
    pub fn operation(mut self, called: u64, ended: u64, call: Call, end: End) -> Self {
        self.processes += 1;
        let process = self.processes;
        self.event(called, What::Call(process, call)).event(ended, What::End(process, end))
    }

    pub fn register(self, called: u64, ended: u64, registration: Registration, end: End) -> Self {
        self.operation(called, ended, Call::Register(registration), end)
    }

    /// Asked at `called`, acknowledged a millisecond later.
    pub fn acknowledged(self, called: u64, registration: Registration) -> Self {
        let Due::At(due_ms) = registration.due else { panic!("a due instant is given") };
        let end = registered(registration.token, due_ms - BEGAN);
        self.register(called, called + 1, registration, end)
    }

    pub fn cancel(self, called: u64, ended: u64, token: Token, end: End) -> Self {
        self.operation(called, ended, Call::Cancel { token, task: id(token) }, end)
    }

    pub fn edit(self, called: u64, ended: u64, token: Token, due_at: u64, version: u32, end: End) -> Self {
        self.operation(called, ended, Call::Edit { token, task: id(token), due_ms: due(due_at), version }, end)
    }

    pub fn get(self, called: u64, ended: u64, token: Token, end: End) -> Self {
        self.operation(called, ended, Call::Get { token, task: id(token) }, end)
    }

    pub fn list(self, called: u64, ended: u64, end: End) -> Self {
        self.operation(called, ended, Call::List { client: "c".to_owned() }, end)
    }

    pub fn delivered(self, at: u64, delivery: Delivery) -> Self {
        self.event(at, What::Delivered(delivery))
    }

    /// The `n`-th occurrence of a recurring task, accepted.
    pub fn occurrence(self, at: u64, token: Token, n: u64, due_at: u64) -> Self {
        let fence = Fence { term: 1, seq: n + 1 };
        self.delivered(at, Delivery { occurrence: n, fence, ..delivery(token, due_at) })
    }

    pub fn fault(self, at: u64, stage: Stage) -> Self {
        self.fault_of("kill", at, stage)
    }

    pub fn fault_of(self, fault: &str, at: u64, stage: Stage) -> Self {
        self.event(at, What::Fault(FaultNote { fault: fault.to_owned(), stage, detail: "node 1".to_owned() }))
    }

    pub fn healed(self, at: u64) -> Self {
        self.event(at, What::Healed)
    }

    pub fn left(self, at: u64, token: Token, state: LeftAs) -> Self {
        self.event(at, What::Left(Left { token: Some(token), task: id(token), state }))
    }

    /// The run goes on until then: an event that says nothing.
    pub fn until(self, at: u64) -> Self {
        self.fault(at, Stage::Note)
    }

    pub fn history(mut self) -> History {
        self.events.sort_by_key(|(at, _)| *at);
        let events = self.events.into_iter().map(|(at, what)| Event { at_us: at * 1000, what }).collect();
        History { began_ms: BEGAN, events }
    }

    /// The checker has nothing to say against it.
    #[track_caller]
    pub fn passes(self, checker: Checker) -> Verdict {
        let verdict = checker(&self.history(), &LIMITS);
        assert!(verdict.holds(), "{:#?}", verdict.violations);
        verdict
    }

    /// The checker finds exactly one violation, and says `what`.
    #[track_caller]
    pub fn fails(self, checker: Checker, what: &str) {
        let history = self.history();
        let verdict = checker(&history, &LIMITS);
        assert_eq!(verdict.violations.len(), 1, "{:#?}", verdict.violations);
        let violation = &verdict.violations[0];
        assert!(violation.what.contains(what), "expected '{what}' in '{}'", violation.what);
        assert!(violation.events.iter().all(|index| *index < history.events.len() as u64));
        assert!(!violation.events.is_empty(), "a violation names events");
    }
}
