//! A history as EDN, one map for each event, in the form that outside checkers (Jepsen, Knossos, Elle) read.
//!
//! ```edn
//! {:index 0, :time 1200000, :type :invoke, :process 3, :f :cancel, :value {:token 9, :task "0190..."}}
//! {:index 1, :time 1900000, :type :ok, :process 3, :f :cancel, :value {:answer :cancelled}}
//! {:index 2, :time 2100000, :type :info, :process :nemesis, :f :healed, :value {}}
//! ```
//!
//! `:time` is nanoseconds since the run began. `:type` of the end of an operation is `:ok`, `:fail` or `:info`
//! (unknown), the last two with `:error`. Whatever is no operation is `:info` of `:receiver`, `:nemesis` or
//! `:observer`.
//!
//! It is an export: nothing here reads it, and what a run was recorded under is only in the stored form
//! ([`super::stored`]).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write};

use boomerang_task::Missed;

use super::{
    Answer, Call, Delivery, Due, End, Event, FaultNote, History, Left, LeftAs, Process, Registration, Stage, What,
};

const NANOS_PER_MICRO: u128 = 1_000;

/// Writes all of it. `to` had better be buffered.
pub fn write(history: &History, mut to: impl Write) -> io::Result<()> {
    let mut open: BTreeMap<Process, &'static str> = BTreeMap::new();
    for (index, event) in history.events.iter().enumerate() {
        writeln!(to, "{}", line(index, event, &mut open))?;
    }
    to.flush()
}

/// A map that is being written.
struct Map(String);

impl Map {
    fn new() -> Self {
        Self("{".to_owned())
    }

    fn put(&mut self, key: &str, value: &str) {
        let comma = if self.0.len() > 1 { ", " } else { "" };
        write!(self.0, "{comma}:{key} {value}").expect("a string takes what it is given");
    }

    fn number(&mut self, key: &str, value: impl Into<u128>) {
        let value: u128 = value.into();
        // What an outside reader would not take for a 64-bit integer.
        let big = if value > i64::MAX as u128 { "N" } else { "" };
        self.put(key, &format!("{value}{big}"));
    }

    fn maybe(&mut self, key: &str, value: Option<u64>) {
        if let Some(value) = value {
            self.number(key, value);
        }
    }

    fn text_of(&mut self, key: &str, value: &str) {
        self.put(key, &quoted(value));
    }

    fn word(&mut self, key: &str, value: &str) {
        self.put(key, &format!(":{value}"));
    }

    fn truth(&mut self, key: &str, value: bool) {
        self.put(key, if value { "true" } else { "false" });
    }

    fn map(&mut self, key: &str, value: Map) {
        self.put(key, &value.text());
    }

    fn text(mut self) -> String {
        self.0.push('}');
        self.0
    }
}

fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for character in text.chars() {
        match character {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            control if control.is_control() => {
                write!(quoted, "\\u{:04x}", u32::from(control)).expect("a string takes what it is given");
            }
            other => quoted.push(other),
        }
    }
    quoted.push('"');
    quoted
}

fn line(index: usize, event: &Event, open: &mut BTreeMap<Process, &'static str>) -> String {
    let mut line = Map::new();
    line.number("index", index as u64);
    line.number("time", u128::from(event.at_us) * NANOS_PER_MICRO);
    match &event.what {
        What::Call(process, call) => {
            let (f, value) = of_call(call);
            open.insert(*process, f);
            line.word("type", "invoke");
            line.number("process", *process);
            line.word("f", f);
            line.map("value", value);
        }
        What::End(process, end) => of_end(&mut line, *process, open.remove(process).unwrap_or("nothing"), end),
        other => {
            let (process, f, value) = of_other(other);
            line.word("type", "info");
            line.word("process", process);
            line.word("f", f);
            line.map("value", value);
        }
    }
    line.text()
}

fn of_end(line: &mut Map, process: Process, f: &str, end: &End) {
    let (kind, error) = match end {
        End::Ok(_) => ("ok", None),
        End::Fail(why) => ("fail", Some(why)),
        End::Unknown(why) => ("info", Some(why)),
    };
    line.word("type", kind);
    line.number("process", process);
    line.word("f", f);
    if let End::Ok(answer) = end {
        line.map("value", of_answer(answer));
    }
    if let Some(why) = error {
        line.text_of("error", why);
    }
}

fn of_call(call: &Call) -> (&'static str, Map) {
    let mut value = Map::new();
    let f = match call {
        Call::Register(registration) => {
            of_registration(&mut value, registration);
            "register"
        }
        Call::Cancel { token, task } => {
            value.number("token", *token);
            value.text_of("task", task);
            "cancel"
        }
        Call::Edit { token, task, due_ms, version } => {
            value.number("token", *token);
            value.text_of("task", task);
            value.number("due-ms", *due_ms);
            value.number("version", *version);
            "edit"
        }
        Call::Get { token, task } => {
            value.number("token", *token);
            value.text_of("task", task);
            "get"
        }
        Call::List { client } => {
            value.text_of("client", client);
            "list"
        }
    };
    (f, value)
}

fn of_registration(value: &mut Map, registration: &Registration) {
    let Registration { token, load, client, due, every_ms, missed, count, key, attempts, refusals } = registration;
    value.number("token", *token);
    value.text_of("load", load);
    value.text_of("client", client);
    match due {
        Due::In(delay_ms) => value.number("due-in-ms", *delay_ms),
        Due::At(due_ms) => value.number("due-at-ms", *due_ms),
    }
    value.maybe("every-ms", *every_ms);
    value.maybe("count", *count);
    match missed {
        Missed::Skip => value.word("missed", "skip"),
        Missed::Once => value.word("missed", "once"),
        Missed::All { max } => {
            value.word("missed", "all");
            value.number("missed-max", *max);
        }
    }
    if let Some(key) = key {
        value.text_of("key", key);
    }
    value.number("attempts", *attempts);
    value.number("refusals", *refusals);
}

fn of_answer(answer: &Answer) -> Map {
    let mut value = Map::new();
    match answer {
        Answer::Registered { task, due_ms, duplicate } => {
            value.word("answer", "registered");
            value.text_of("task", task);
            value.number("due-ms", *due_ms);
            value.truth("duplicate", *duplicate);
        }
        Answer::Cancelled => value.word("answer", "cancelled"),
        Answer::CancelledTooLate { occurrence, attempt } => {
            value.word("answer", "cancelled-too-late");
            value.number("occurrence", *occurrence);
            value.number("attempt", *attempt);
        }
        Answer::Edited { due_ms } => {
            value.word("answer", "edited");
            value.number("due-ms", *due_ms);
        }
        Answer::EditTooLate { occurrence, attempt } => {
            value.word("answer", "edit-too-late");
            value.number("occurrence", *occurrence);
            value.number("attempt", *attempt);
        }
        Answer::NotFound => value.word("answer", "not-found"),
        Answer::Found { due_ms, occurrence, attempt, version } => {
            value.word("answer", "found");
            value.number("due-ms", *due_ms);
            value.number("occurrence", *occurrence);
            value.number("attempt", *attempt);
            value.number("version", *version);
        }
        Answer::Listed { tasks } => {
            value.word("answer", "listed");
            let tasks: Vec<String> = tasks.iter().map(|task| quoted(task)).collect();
            value.put("tasks", &format!("[{}]", tasks.join(" ")));
        }
    }
    value
}

/// Who saw it, what it is called, and what it was.
fn of_other(what: &What) -> (&'static str, &'static str, Map) {
    let mut value = Map::new();
    match what {
        What::Call(..) | What::End(..) => unreachable!("operations are written by `line`"),
        What::Delivered(delivery) => {
            of_delivery(&mut value, delivery);
            ("receiver", "deliver", value)
        }
        What::Fault(FaultNote { fault, stage, detail }) => {
            value.text_of("fault", fault);
            value.word("stage", stage_name(*stage));
            value.text_of("detail", detail);
            ("nemesis", "fault", value)
        }
        What::Healed => ("nemesis", "healed", value),
        What::Leads { group, node, term } => {
            value.number("group", *group);
            value.number("node", *node);
            value.number("term", *term);
            ("observer", "leads", value)
        }
        What::Digest { group, replica, node, index, digest } => {
            value.number("group", *group);
            value.number("replica", *replica);
            value.number("node", *node);
            value.number("index", *index);
            value.text_of("digest", digest);
            ("observer", "digest", value)
        }
        What::Left(Left { token, task, state }) => {
            value.maybe("token", *token);
            value.text_of("task", task);
            let (state, number, name, occurrence) = match state {
                LeftAs::Pending { due_ms, occurrence } => ("pending", *due_ms, "due-ms", occurrence),
                LeftAs::DeadLetter { occurrence, attempts } => {
                    ("dead-letter", u64::from(*attempts), "attempts", occurrence)
                }
            };
            value.word("state", state);
            value.number("occurrence", *occurrence);
            value.number(name, number);
            ("observer", "left", value)
        }
    }
}

fn of_delivery(value: &mut Map, delivery: &Delivery) {
    let Delivery { token, task, occurrence, attempt, version, due_ms, fence, accepted, effect, dead_letter, datagram } =
        delivery;
    value.number("token", *token);
    value.text_of("task", task);
    value.number("occurrence", *occurrence);
    value.number("attempt", *attempt);
    value.number("version", *version);
    value.number("due-ms", *due_ms);
    value.number("fence-term", fence.term);
    value.number("fence-seq", fence.seq);
    value.truth("accepted", *accepted);
    if let Some(effect) = effect {
        value.truth("effect", *effect);
    }
    value.truth("dead-letter", *dead_letter);
    value.truth("datagram", *datagram);
}

fn stage_name(stage: Stage) -> &'static str {
    match stage {
        Stage::Begin => "begin",
        Stage::End => "end",
        Stage::Note => "note",
    }
}

#[cfg(test)]
mod tests;
