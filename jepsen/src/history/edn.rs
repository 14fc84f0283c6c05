//! A history as EDN lines, one map for each event, in the form that outside checkers (Jepsen, Knossos, Elle) read.
//!
//! ```edn
//! {:began-ms 1700000000000, :seed 7, :settings {"nodes" "5"}}
//! {:index 0, :time 1200000, :type :invoke, :process 3, :f :cancel, :value {:token 9, :task "0190..."}}
//! {:index 1, :time 1900000, :type :ok, :process 3, :f :cancel, :value {:answer :cancelled}}
//! {:index 2, :time 2100000, :type :info, :process :nemesis, :f :fault, :value {:fault "kill", :stage :begin, :detail "2"}}
//! ```
//!
//! The first line says what was recorded and is no event; an outside checker skips it. `:time` is nanoseconds since the run
//! began. `:type` of the end of an operation is `:ok`, `:fail` or `:info` (unknown), the last two with `:error`. Whatever is no
//! operation is `:info` of `:receiver`, `:nemesis` or `:observer`.
//!
//! [`read`] takes back what [`write()`] wrote, and refuses anything else with the line it stands in; it is no reader for all
//! of EDN. It must not judge, nor mend, what it reads.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::sync::{LazyLock, Mutex, PoisonError};

use boomerang_task::{Fence, Missed};

use value::{Fields, Value};

use super::{
    Answer, Call, Delivery, Due, End, Event, FaultNote, History, Left, LeftAs, Process, Registration, Stage, What,
};

mod value;

/// What a history was recorded under.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    pub seed: Option<u64>,
    /// By name: how many nodes, which loads and faults, how long.
    pub settings: BTreeMap<String, String>,
}

#[derive(Debug, thiserror::Error)]
pub enum EdnError {
    #[error("the history cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("line {line} of the history: {why}")]
    Line { line: usize, why: String },
}

const NANOS: u128 = 1_000;

/// Writes all of it. `to` had better be buffered.
pub fn write(history: &History, meta: &Meta, mut to: impl Write) -> io::Result<()> {
    let mut head = Map::new();
    head.number("began-ms", history.began_ms);
    head.maybe("seed", meta.seed);
    let mut settings = Map::new();
    for (name, value) in &meta.settings {
        settings.put(&quoted(name), &quoted(value));
    }
    head.map("settings", settings);
    writeln!(to, "{}", head.text())?;
    let mut open: BTreeMap<Process, &'static str> = BTreeMap::new();
    for (index, event) in history.events.iter().enumerate() {
        writeln!(to, "{}", line(index, event, &mut open))?;
    }
    to.flush()
}

/// Reads what [`write()`] wrote.
pub fn read(from: impl BufRead) -> Result<(History, Meta), EdnError> {
    let mut history = History::default();
    let mut meta = None;
    for (number, line) in (1..).zip(from.lines()) {
        let line = line?;
        let at = |why: String| EdnError::Line { line: number, why };
        if line.trim().is_empty() {
            continue;
        }
        let value = value::parse(&line).map_err(at)?;
        let fields = Fields::of(&value).map_err(at)?;
        if meta.is_none() {
            history.began_ms = fields.number("began-ms").map_err(at)?;
            meta = Some(head(&fields).map_err(at)?);
        } else {
            history.events.push(event(&fields, history.events.len()).map_err(at)?);
        }
    }
    let nothing = || EdnError::Line { line: 1, why: "there is nothing in it".to_owned() };
    Ok((history, meta.ok_or_else(nothing)?))
}

/// Reads the history of a file; what it was recorded under is for people.
pub fn read_file(file: &Path) -> Result<(History, Meta), EdnError> {
    read(BufReader::new(File::open(file)?))
}

// Writing.

/// A map that is being written.
struct Map(String);

impl Map {
    fn new() -> Self {
        Self("{".to_owned())
    }

    fn put(&mut self, key: &str, value: &str) {
        let comma = if self.0.len() > 1 { ", " } else { "" };
        self.0.push_str(comma);
        self.0.push_str(key);
        self.0.push(' ');
        self.0.push_str(value);
    }

    fn number(&mut self, key: &str, value: impl Into<u128>) {
        let value: u128 = value.into();
        // What an outside reader would not take for a 64-bit integer.
        let big = if value > i64::MAX as u128 { "N" } else { "" };
        self.put(&format!(":{key}"), &format!("{value}{big}"));
    }

    fn maybe(&mut self, key: &str, value: Option<u64>) {
        if let Some(value) = value {
            self.number(key, value);
        }
    }

    fn text_of(&mut self, key: &str, value: &str) {
        self.put(&format!(":{key}"), &quoted(value));
    }

    fn word(&mut self, key: &str, value: &str) {
        self.put(&format!(":{key}"), &format!(":{value}"));
    }

    fn truth(&mut self, key: &str, value: bool) {
        self.put(&format!(":{key}"), if value { "true" } else { "false" });
    }

    fn map(&mut self, key: &str, value: Map) {
        self.put(&format!(":{key}"), &value.text());
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
    line.number("time", u128::from(event.at_us) * NANOS);
    what(&mut line, event, open);
    line.text()
}

/// One event for people, without place and time. Of an end it is not known what was asked.
pub fn line_of(event: &Event) -> String {
    let mut line = Map::new();
    what(&mut line, event, &mut BTreeMap::new());
    line.text()
}

fn what(line: &mut Map, event: &Event, open: &mut BTreeMap<Process, &'static str>) {
    match &event.what {
        What::Call(process, call) => {
            let (f, value) = of_call(call);
            open.insert(*process, f);
            line.word("type", "invoke");
            line.number("process", *process);
            line.word("f", f);
            line.map("value", value);
        }
        What::End(process, end) => of_end(line, *process, open.remove(process).unwrap_or("nothing"), end),
        other => {
            let (process, f, value) = of_other(other);
            line.word("type", "info");
            line.word("process", process);
            line.word("f", f);
            line.map("value", value);
        }
    }
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
            value.put(":tasks", &format!("[{}]", tasks.join(" ")));
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

// Reading.

fn head(fields: &Fields<'_>) -> Result<Meta, String> {
    Ok(Meta { seed: fields.maybe_number("seed")?, settings: fields.map("settings")?.pairs()?.into_iter().collect() })
}

fn event(fields: &Fields<'_>, place: usize) -> Result<Event, String> {
    let index: usize = fields.number("index")?;
    if index != place {
        return Err(format!("event {place} belongs here, not {index}"));
    }
    let nanos: u128 = fields.number("time")?;
    let at_us = u64::try_from(nanos / NANOS).map_err(|_| format!(":time is too large: {nanos}"))?;
    let what = match fields.get("process")? {
        Value::Number(_) => operation(fields)?,
        Value::Word(_) => other(fields)?,
        strange => return Err(format!(":process is {strange:?}")),
    };
    Ok(Event { at_us, what })
}

fn operation(fields: &Fields<'_>) -> Result<What, String> {
    let process = fields.number("process")?;
    Ok(match fields.word("type")? {
        "invoke" => What::Call(process, call(fields.word("f")?, &fields.map("value")?)?),
        "ok" => What::End(process, End::Ok(answer(&fields.map("value")?)?)),
        "fail" => What::End(process, End::Fail(fields.text("error")?.to_owned())),
        "info" => What::End(process, End::Unknown(fields.text("error")?.to_owned())),
        strange => return Err(format!(":type is :{strange}")),
    })
}

fn call(f: &str, value: &Fields<'_>) -> Result<Call, String> {
    if f == "register" {
        return Ok(Call::Register(registration(value)?));
    }
    if f == "list" {
        return Ok(Call::List { client: value.text("client")?.to_owned() });
    }
    let (token, task) = (value.number("token")?, value.text("task")?.to_owned());
    Ok(match f {
        "cancel" => Call::Cancel { token, task },
        "edit" => Call::Edit { token, task, due_ms: value.number("due-ms")?, version: value.number("version")? },
        "get" => Call::Get { token, task },
        strange => return Err(format!("nobody calls :{strange}")),
    })
}

fn registration(value: &Fields<'_>) -> Result<Registration, String> {
    let due = match value.maybe_number("due-in-ms")? {
        Some(delay_ms) => Due::In(delay_ms),
        None => Due::At(value.number("due-at-ms")?),
    };
    let missed = match value.word("missed")? {
        "skip" => Missed::Skip,
        "once" => Missed::Once,
        "all" => Missed::All { max: value.number("missed-max")? },
        strange => return Err(format!(":missed is :{strange}")),
    };
    Ok(Registration {
        token: value.number("token")?,
        load: kept(value.text("load")?),
        client: value.text("client")?.to_owned(),
        due,
        every_ms: value.maybe_number("every-ms")?,
        count: value.maybe_number("count")?,
        missed,
        key: value.find("key").map(|_| value.text("key")).transpose()?.map(str::to_owned),
        attempts: value.number("attempts")?,
        refusals: value.number("refusals")?,
    })
}

fn answer(value: &Fields<'_>) -> Result<Answer, String> {
    let occurrence = || value.number("occurrence");
    let attempt = || value.number("attempt");
    let due_ms = || value.number("due-ms");
    Ok(match value.word("answer")? {
        "registered" => {
            let (task, duplicate) = (value.text("task")?.to_owned(), value.truth("duplicate")?);
            Answer::Registered { task, due_ms: due_ms()?, duplicate }
        }
        "cancelled" => Answer::Cancelled,
        "cancelled-too-late" => Answer::CancelledTooLate { occurrence: occurrence()?, attempt: attempt()? },
        "edited" => Answer::Edited { due_ms: due_ms()? },
        "edit-too-late" => Answer::EditTooLate { occurrence: occurrence()?, attempt: attempt()? },
        "not-found" => Answer::NotFound,
        "found" => {
            let version = value.number("version")?;
            Answer::Found { due_ms: due_ms()?, occurrence: occurrence()?, attempt: attempt()?, version }
        }
        "listed" => Answer::Listed { tasks: value.texts("tasks")? },
        strange => return Err(format!(":answer is :{strange}")),
    })
}

fn other(fields: &Fields<'_>) -> Result<What, String> {
    let value = fields.map("value")?;
    Ok(match fields.word("f")? {
        "deliver" => What::Delivered(delivery(&value)?),
        "fault" => What::Fault(FaultNote {
            fault: kept(value.text("fault")?),
            stage: stage(value.word("stage")?)?,
            detail: value.text("detail")?.to_owned(),
        }),
        "healed" => What::Healed,
        "leads" => {
            What::Leads { group: value.number("group")?, node: value.number("node")?, term: value.number("term")? }
        }
        "digest" => What::Digest {
            group: value.number("group")?,
            replica: value.number("replica")?,
            node: value.number("node")?,
            index: value.number("index")?,
            digest: value.text("digest")?.to_owned(),
        },
        "left" => What::Left(left(&value)?),
        strange => return Err(format!(":f is :{strange}")),
    })
}

fn left(value: &Fields<'_>) -> Result<Left, String> {
    let occurrence = value.number("occurrence")?;
    let state = match value.word("state")? {
        "pending" => LeftAs::Pending { due_ms: value.number("due-ms")?, occurrence },
        "dead-letter" => LeftAs::DeadLetter { occurrence, attempts: value.number("attempts")? },
        strange => return Err(format!(":state is :{strange}")),
    };
    Ok(Left { token: value.maybe_number("token")?, task: value.text("task")?.to_owned(), state })
}

fn delivery(value: &Fields<'_>) -> Result<Delivery, String> {
    Ok(Delivery {
        token: value.number("token")?,
        task: value.text("task")?.to_owned(),
        occurrence: value.number("occurrence")?,
        attempt: value.number("attempt")?,
        version: value.number("version")?,
        due_ms: value.number("due-ms")?,
        fence: Fence { term: value.number("fence-term")?, seq: value.number("fence-seq")? },
        accepted: value.truth("accepted")?,
        effect: value.find("effect").map(|_| value.truth("effect")).transpose()?,
        dead_letter: value.truth("dead-letter")?,
        datagram: value.truth("datagram")?,
    })
}

fn stage(name: &str) -> Result<Stage, String> {
    [Stage::Begin, Stage::End, Stage::Note]
        .into_iter()
        .find(|stage| stage_name(*stage) == name)
        .ok_or_else(|| format!(":stage is :{name}"))
}

/// Loads and faults have names that live as long as the program. A name that is read is kept for as long, once: there are few.
fn kept(name: &str) -> &'static str {
    static KEPT: LazyLock<Mutex<BTreeSet<&'static str>>> = LazyLock::new(Mutex::default);
    // A set is whole even if somebody panicked with it in hand.
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = kept.get(name) {
        return known;
    }
    let name: &'static str = Box::leak(name.to_owned().into_boxed_str());
    kept.insert(name);
    name
}

#[cfg(test)]
pub(crate) mod tests;
