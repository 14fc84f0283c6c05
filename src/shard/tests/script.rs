//! The language of the scripts in `src/shard/scripts`, one file per test: what a shard is asked, line by line, and
//! behind `->` what came of it. With `UPDATE_SCRIPTS=1` that part is written anew; nothing else of a file ever is.
//!
//! | Line | What it is |
//! | --- | --- |
//! | `# ...` | a comment |
//! | `policy attempts=1 interval=0` | tries of a task from here on, and milliseconds between them; at first 3, 100 |
//! | `1000 cancel a held -> cancelled, a ended` | a request at 1000 ms, in its own batch; the reply, then the effects |
//! | `show history a -> 0 acknowledged` | no request, but a look at what is stored |
//!
//! A task is one letter, and all are of the client `me`. What is due by the time of a request was armed. Requests:
//!
//! ```text
//! register a due=5 [every=3 [missed=skip|all:2] [count=4] [until=9] [overlap]] [name=n] [key=k..expiry]
//!                  [sent=sender.number/answered-below]
//! cancel a CLAIM [by=client]          pause a CLAIM [by=client]           resume a CLAIM [by=client]
//! edit a CLAIM [by=client] [version=1] [due=9] [payload=p] [to=host:1]
//! settle a 0.1 ok|failed              catch-up a 3                        detach a 3 stand-in
//! replay a@died stand-in [by=client]  purge a@died [by=client]            forget - [key=k..expiry] [sender=s..seen]
//! ```
//!
//! `0.1` is the first attempt of occurrence 0. CLAIM is what the leader knows of the task's next attempt: `held` (it is
//! kept in), `out=0.1` (this one may be out), or `unknown`. What can be shown: `rows`, `counts`, `task a`, `history a`,
//! `dead-letter a@died`, `sender s`.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::*;

/// Re-records instead of comparing, if it is `1`.
const UPDATE: &str = "UPDATE_SCRIPTS";
const FOLDER: &str = "src/shard/scripts";
const ARROW: &str = "->";

/// Runs the script of this name, which is the name of its test, too.
pub fn check(name: &str) {
    let file = format!("{FOLDER}/{name}.txt");
    let path = folder().join(format!("{name}.txt"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{file}: {error}"));
    let Replayed { recorded, difference } = replay(&text).unwrap_or_else(|Malformed { line, why }| {
        panic!("{file}:{line}: {why}; nothing was run, and nothing would be recorded")
    });
    if difference.is_empty() {
        return;
    }
    if std::env::var_os(UPDATE).is_some_and(|value| value == "1") {
        std::fs::write(&path, recorded).unwrap_or_else(|error| panic!("{file}: {error}"));
        eprintln!("{file} was recorded anew:\n{difference}");
        return;
    }
    panic!(
        "{file}: something else came of it than is recorded:\n{difference}\nIf all of this is as it should be:\n  \
         {UPDATE}=1 cargo test --lib -- --exact shard::tests::{name}\n"
    );
}

/// The names of all scripts there are.
pub fn names() -> BTreeSet<String> {
    let files = std::fs::read_dir(folder()).expect("the folder of the scripts");
    let name = |path: PathBuf| path.file_stem().expect("a file has a name").to_string_lossy().into_owned();
    files.map(|file| name(file.expect("an entry of the folder").path())).collect()
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(FOLDER)
}

/// A world in which one request was carried out.
pub fn world_after(policy: Policy, now_ms: InstantMs, request: &str) -> World {
    let mut world = World::default();
    world.apply(vec![batch(policy, now_ms, parse_request(&mut Words::of(request)).expect("a request"))]);
    world
}

/// What came of a script.
#[derive(Debug)]
struct Replayed {
    /// The script with what came behind each arrow.
    recorded: String,
    /// Each line of which something else is recorded, with both; empty when all is as recorded.
    difference: String,
}

/// Why a script was not run.
#[derive(Debug, PartialEq)]
struct Malformed {
    /// Counted from 1.
    line: usize,
    why: String,
}

/// Runs a script, if all of it can be understood.
fn replay(text: &str) -> Result<Replayed, Malformed> {
    let number = |(at, line)| (at + 1, line);
    let parse = |(line, text)| Line::parse(text).map_err(|why| Malformed { line, why });
    let lines = text.split_inclusive('\n').enumerate().map(number).map(parse).collect::<Result<Vec<_>, _>>()?;
    let mut world = World::default();
    let mut policy = three_tries();
    let (mut recorded, mut difference) = (String::new(), String::new());
    for (at, (line, text)) in lines.into_iter().zip(text.split_inclusive('\n')).enumerate() {
        let _place = Place { line: at + 1, text };
        let came = match line {
            Line::Comment => None,
            Line::Policy(new) => {
                policy = *new;
                None
            }
            Line::Ask { now_ms, request } => {
                let applied = world.apply(vec![batch(policy.clone(), now_ms, *request)]).remove(0);
                Some(reply_and_effects(&applied.replies[0], &applied.effects))
            }
            Line::Show(what) => Some(show(&world, &what)),
        };
        let Some(came) = came else {
            recorded += text;
            continue;
        };
        let (asked, expected) = text.split_once(ARROW).expect("a line with an outcome has an arrow");
        let end = if text.ends_with('\n') { "\n" } else { "" };
        recorded += &format!("{asked}{ARROW} {came}{end}");
        if expected.trim() != came {
            let (number, asked, expected) = (at + 1, asked.trim(), expected.trim());
            let _ = writeln!(difference, "  line {number}: {asked}\n    recorded  {expected}\n    came      {came}");
        }
    }
    Ok(Replayed { recorded, difference })
}

/// Says which line was being run when an assertion failed.
struct Place<'a> {
    line: usize,
    text: &'a str,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("while line {} of the script was run: {}", self.line, self.text.trim());
        }
    }
}

fn batch(policy: Policy, now_ms: InstantMs, request: Request) -> Batch {
    Batch { now_ms, armed_ms: now_ms, keep_history: true, policies: vec![policy], requests: vec![request] }
}

enum Line {
    Comment,
    Policy(Box<Policy>),
    Ask { now_ms: InstantMs, request: Box<Request> },
    Show(Show),
}

enum Show {
    Rows,
    Counts,
    Task(TaskId),
    History(TaskId),
    DeadLetter(DeadLetterId),
    Sender(DedupHash),
}

impl Line {
    fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.is_empty() || text.starts_with('#') {
            return Ok(Self::Comment);
        }
        let (asked, has_arrow) = text.split_once(ARROW).map_or((text, false), |(asked, _)| (asked, true));
        let mut words = Words::of(asked);
        let line = match words.next("a time, 'show' or 'policy'")? {
            "policy" => {
                let (attempts_max, interval_ms) = (words.needed("attempts")?, words.needed("interval")?);
                let retry = Retry { attempts_max, interval_ms, interval_max_ms: interval_ms, ..three_tries().retry };
                Self::Policy(Box::new(policy(retry)))
            }
            "show" => Self::Show(parse_show(&mut words)?),
            time => {
                let now_ms = parse("a time in milliseconds", time)?;
                Self::Ask { now_ms, request: Box::new(parse_request(&mut words)?) }
            }
        };
        words.end()?;
        match (&line, has_arrow) {
            (Self::Policy(_), true) => Err(format!("nothing comes of a policy, so no '{ARROW}'")),
            (Self::Ask { .. } | Self::Show(_), false) => Err(format!("'{ARROW}' is missing")),
            _ => Ok(line),
        }
    }
}

fn parse_show(words: &mut Words<'_>) -> Result<Show, String> {
    Ok(match words.next("what to show")? {
        "rows" => Show::Rows,
        "counts" => Show::Counts,
        "task" => Show::Task(parse_task(words.next("a task")?)?),
        "history" => Show::History(parse_task(words.next("a task")?)?),
        "dead-letter" => Show::DeadLetter(parse_letter(words.next("a dead letter")?)?),
        "sender" => Show::Sender(sender_hash(words.next("a sender")?)),
        other => return Err(format!("'{other}' cannot be shown")),
    })
}

fn parse_request(words: &mut Words<'_>) -> Result<Request, String> {
    let verb = words.next("a request")?;
    let mut task = || parse_task(words.next("a task")?);
    Ok(match verb {
        "register" => Request::Register(parse_register(task()?, words)?),
        "cancel" => {
            let id = task()?;
            Request::Cancel(Cancel { id, owner: words.owner()?, claim: words.claim()? })
        }
        "edit" => {
            let id = task()?;
            let callback = |to: &str| Callback::new(Protocol::Tcp, to).map_err(|why| format!("to={to}: {why}"));
            let change = Change {
                due_ms: words.wanted("due")?,
                payload: words.named("payload").map(|text| text.to_owned().into()),
                callback: words.named("to").map(callback).transpose()?,
                ..Change::default()
            };
            let (owner, claim, version) = (words.owner()?, words.claim()?, words.wanted("version")?);
            Request::Edit(Edit { id, owner, claim, version, change })
        }
        "pause" | "resume" => {
            let id = task()?;
            Request::Pause(Pause { id, owner: words.owner()?, claim: words.claim()?, paused: verb == "pause" })
        }
        "catch-up" => {
            Request::CatchUp(CatchUp { id: task()?, occurrence: parse("an occurrence", words.next("an occurrence")?)? })
        }
        "detach" => {
            let (id, occurrence) = (task()?, parse("an occurrence", words.next("an occurrence")?)?);
            Request::Detach(Detach { id, occurrence, stand_in: parse_task(words.next("a stand-in")?)? })
        }
        "replay" => {
            let letter = parse_letter(words.next("a dead letter")?)?;
            let stand_in = parse_task(words.next("a stand-in")?)?;
            Request::Replay(Replay { letter, owner: words.owner()?, stand_in })
        }
        "purge" => {
            let letter = parse_letter(words.next("a dead letter")?)?;
            Request::Purge(Purge { letter, owner: words.owner()? })
        }
        "forget" => {
            words.next("'-'")?;
            let dedup = words.named("key").map(parse_key).transpose()?;
            let sender = words.named("sender").map(|text| split(text, "..", "sender..seen")).transpose()?;
            let seen = |(sender, seen_ms)| Ok::<_, String>((sender_hash(sender), parse("an instant", seen_ms)?));
            Request::Forget(Forget {
                dedup: dedup.map(|Dedup { hash, expires_ms }| (expires_ms, hash)).into_iter().collect(),
                senders: sender.map(seen).transpose()?.into_iter().collect(),
                ..Forget::default()
            })
        }
        "settle" => {
            let id = task()?;
            let (occurrence, attempt) = parse_attempt(words.next("an attempt")?)?;
            let outcome = match words.next("'ok' or 'failed'")? {
                "ok" => Outcome::Acknowledged,
                "failed" => Outcome::Failed(Failure::new(FailureClass::Refused, "refused")),
                other => return Err(format!("'{other}' is neither 'ok' nor 'failed'")),
            };
            Request::Settle(Settle { id, occurrence, attempt, outcome, dispatched_ms: 0 })
        }
        other => return Err(format!("'{other}' is no request")),
    })
}

fn parse_register(id: TaskId, words: &mut Words<'_>) -> Result<Register, String> {
    let tags = |name: &str| Tags::new(name, []).map_err(|why| format!("name={name}: {why}"));
    Ok(Register {
        id,
        client: owner("me"),
        policy: 0,
        due_ms: words.needed("due")?,
        recurrence: parse_recurrence(words)?,
        tags: words.named("name").map(tags).transpose()?,
        dedup: words.named("key").map(parse_key).transpose()?,
        numbered: words.named("sent").map(parse_numbered).transpose()?,
        payload: bytes::Bytes::from_static(b"payload"),
    })
}

fn parse_recurrence(words: &mut Words<'_>) -> Result<Option<Recurrence>, String> {
    let Some(interval_ms) = words.wanted("every")? else { return Ok(None) };
    let missed = match words.named("missed").map(|text| (text, text.strip_prefix("all:"))) {
        None => Missed::Once,
        Some(("skip", _)) => Missed::Skip,
        Some((_, Some(max))) => Missed::All { max: parse("a number", max)? },
        Some((other, None)) => return Err(format!("missed={other} is neither 'skip' nor 'all:' and a number")),
    };
    let (overlap, count, until_ms) = (words.flag("overlap"), words.wanted("count")?, words.wanted("until")?);
    Ok(Some(Recurrence { missed, overlap, count, until_ms, ..Recurrence::every(interval_ms) }))
}

/// `k..expiry`
fn parse_key(text: &str) -> Result<Dedup, String> {
    let (key, expires_ms) = split(text, "..", "key..expiry")?;
    let hash = DedupHash::new(&owner("me"), key).map_err(|why| format!("key={key}: {why}"))?;
    Ok(Dedup { hash, expires_ms: parse("an instant", expires_ms)? })
}

/// `sender.number/answered-below`
fn parse_numbered(text: &str) -> Result<Numbered, String> {
    let (sender, numbers) = split(text, ".", "sender.number/answered-below")?;
    let (number, answered_below) = split(numbers, "/", "number/answered-below")?;
    let (number, answered_below) = (parse("a number", number)?, parse("a number", answered_below)?);
    Ok(Numbered { sender: sender_hash(sender), number, answered_below })
}

fn parse_task(text: &str) -> Result<TaskId, String> {
    if text.len() == 1 { Ok(id_of(text)) } else { Err(format!("'{text}' is no task: those are one letter")) }
}

/// `a@died`
fn parse_letter(text: &str) -> Result<DeadLetterId, String> {
    let (name, died_ms) = split(text, "@", "task@instant")?;
    Ok(DeadLetterId { died_ms: parse("an instant", died_ms)?, task: parse_task(name)? })
}

/// `0.1`
fn parse_attempt(text: &str) -> Result<(u64, u32), String> {
    let (occurrence, attempt) = split(text, ".", "occurrence.attempt")?;
    Ok((parse("an occurrence", occurrence)?, parse("an attempt", attempt)?))
}

fn split<'a>(text: &'a str, by: &str, form: &str) -> Result<(&'a str, &'a str), String> {
    text.split_once(by).ok_or_else(|| format!("'{text}' is not of the form {form}"))
}

fn parse<T: FromStr>(what: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("'{text}' is not {what}"))
}

/// The words of a line that nobody has understood yet.
struct Words<'a>(Vec<&'a str>);

impl<'a> Words<'a> {
    fn of(text: &'a str) -> Self {
        Self(text.split_whitespace().collect())
    }

    fn next(&mut self, what: &str) -> Result<&'a str, String> {
        if self.0.is_empty() { Err(format!("{what} is missing")) } else { Ok(self.0.remove(0)) }
    }

    /// What follows `name=`.
    fn named(&mut self, name: &str) -> Option<&'a str> {
        let value = |word: &&'a str| word.strip_prefix(name)?.strip_prefix('=');
        let (at, value) = self.0.iter().enumerate().find_map(|(at, word)| Some((at, value(word)?)))?;
        self.0.remove(at);
        Some(value)
    }

    fn wanted<T: FromStr>(&mut self, name: &str) -> Result<Option<T>, String> {
        self.named(name).map(|text| parse(&format!("a number for {name}="), text)).transpose()
    }

    fn needed<T: FromStr>(&mut self, name: &str) -> Result<T, String> {
        self.wanted(name)?.ok_or_else(|| format!("{name}= is missing"))
    }

    fn flag(&mut self, flag: &str) -> bool {
        let at = self.0.iter().position(|word| *word == flag);
        at.map(|at| self.0.remove(at)).is_some()
    }

    fn owner(&mut self) -> Result<Option<ClientId>, String> {
        self.named("by").map(|text| parse("a client", text)).transpose()
    }

    fn claim(&mut self) -> Result<Claim, String> {
        let out = self.named("out").map(parse_attempt).transpose()?;
        match (out, self.flag("held"), self.flag("unknown")) {
            (Some((occurrence, attempt)), false, false) => Ok(Claim::MayBeOut { occurrence, attempt }),
            (None, true, false) => Ok(Claim::NotDispatched),
            (None, false, true) => Ok(Claim::Unknown),
            _ => Err("one of 'held', 'out=0.1' and 'unknown' is needed".into()),
        }
    }

    fn end(self) -> Result<(), String> {
        self.0.first().map_or(Ok(()), |word| Err(format!("'{word}' has no meaning here")))
    }
}

fn reply_and_effects(reply: &Reply, effects: &[Effect]) -> String {
    let mut text = match reply {
        Reply::Registered { due_ms, duplicate: false, .. } => format!("due {due_ms}"),
        Reply::Registered { id, due_ms, duplicate: true } => format!("{} before, due {due_ms}", name_of(*id)),
        Reply::Edited { version, due_ms } => format!("version {version} due {}", instant(*due_ms)),
        Reply::Unfit(why) => format!("unfit: {why}"),
        Reply::Conflict { version } => format!("conflict {version}"),
        Reply::Paused { out: None } => "paused".into(),
        Reply::Paused { out: Some((occurrence, attempt)) } => format!("paused, {occurrence}.{attempt} out"),
        Reply::Resumed { due_ms } => format!("resumed due {due_ms}"),
        Reply::Replayed { id } => format!("replayed as {}", name_of(*id)),
        Reply::GivenUp => "given up".into(),
        Reply::TooLate { occurrence, attempt } => format!("too late {occurrence}.{attempt}"),
        other => format!("{other:?}").to_lowercase(),
    };
    for effect in effects {
        text += &match effect {
            Effect::Scheduled { id, due_ms } => format!(", {} at {}", name_of(*id), instant(*due_ms)),
            Effect::Ended { id } => format!(", {} ended", name_of(*id)),
            Effect::ClientChanged { client } => format!(", client {client} changed"),
            Effect::KeyRevoked { key_id } => format!(", key {key_id} revoked"),
            Effect::Marked { mark } => format!(", marked {mark}"),
        };
    }
    text
}

fn instant(due_ms: InstantMs) -> String {
    if due_ms == NEVER { "never".into() } else { due_ms.to_string() }
}

fn show(world: &World, what: &Show) -> String {
    match what {
        Show::Rows => show_rows(world),
        Show::Counts => {
            let ShardMetaRow { pending, dead_letters, missed, .. } = world.meta;
            format!("tasks {pending}, dead letters {dead_letters}, missed {missed}")
        }
        Show::Task(id) => show_task(world, *id),
        Show::History(id) => world.history(*id),
        Show::DeadLetter(letter) => match world.get::<DeadLetterRow>(&Key::dead_letter(GROUP, *letter)) {
            Some(DeadLetterRow { occurrence, due_ms, attempts, failure, .. }) => {
                format!("occurrence {occurrence} due {due_ms}, after {attempts} attempts: {}", failure.text.as_str())
            }
            None => "none".into(),
        },
        Show::Sender(sender) => match world.get::<SenderRow>(&Key::sender(GROUP, *sender)) {
            Some(SenderRow { stored, .. }) => {
                let numbers = stored.iter().map(|one| format!("{} is {}", one.number, name_of(one.id)));
                numbers.collect::<Vec<_>>().join(", ")
            }
            None => "none".into(),
        },
    }
}

/// How many rows there are of each kind.
fn show_rows(world: &World) -> String {
    let mut counts = BTreeMap::<&str, usize>::new();
    for key in world.rows.0.keys() {
        let kind = match parse_state(key.as_ref()).expect("one of ours").1 {
            Parsed::Task(_) => "task",
            Parsed::Timeline(..) => "timeline",
            Parsed::Cursor(_) => "cursor",
            Parsed::Policy(_) => "policy",
            Parsed::DeadLetter(_) => "dead letter",
            Parsed::Dedup(_) => "dedup",
            Parsed::DedupEnd(..) => "dedup end",
            Parsed::Sender(_) => "sender",
            Parsed::History(..) => "history",
            Parsed::ByClient(..) => "by client",
            Parsed::ByTag(_) => "by tag",
            Parsed::StandIns(_) => "stand-ins",
            Parsed::LetterOfClient(..) => "dead letter by client",
            other => panic!("{other:?} does not belong into a shard"),
        };
        *counts.entry(kind).or_default() += 1;
    }
    counts.iter().map(|(kind, count)| format!("{kind} {count}")).collect::<Vec<_>>().join(", ")
}

/// A task as it stands. Why its last attempt failed, and that one may be out, is told only where it is so.
fn show_task(world: &World, id: TaskId) -> String {
    let Some((task, at)) = read_task(&world.rows, GROUP, id).unwrap() else { return "none".into() };
    let PolicyRow { policy, .. } = world.get(&Key::policy(GROUP, task.policy)).expect("a task has its policy");
    let mut text = format!(
        "{}.{} due {}, version {}, payload {}, to {}, attempts {} interval {}",
        at.occurrence,
        at.attempt,
        instant(at.due_ms),
        task.version,
        String::from_utf8_lossy(&task.payload),
        policy.callback.endpoint.as_str(),
        policy.retry.attempts_max,
        policy.retry.interval_ms
    );
    let every = task.recurrence.map(|recurrence| format!(", every {}", recurrence.interval_ms));
    let name = task.tags.and_then(|tags| tags.name().map(|name| format!(", name {name}")));
    let failed = at.failure.map(|(failure, at_ms)| format!(", failed at {at_ms}: {}", failure.text.as_str()));
    let out = at.out_due_ms.map(|due_ms| format!(", may be out since {due_ms}"));
    for more in [every, name, failed, out].into_iter().flatten() {
        text += &more;
    }
    text
}

mod tests {
    use super::*;

    const WRONG: &str = "# A story.\npolicy attempts=1 interval=0\n\n1000  register a due=2000   -> wrong\n\
                         2000 settle a 0.1 failed -> \nshow counts -> tasks 0, dead letters 1, missed 0";

    #[test]
    fn only_what_is_behind_an_arrow_is_recorded() {
        let Replayed { recorded, difference } = replay(WRONG).unwrap();
        let right = "# A story.\npolicy attempts=1 interval=0\n\n1000  register a due=2000   -> due 2000, a at 2000\n\
                     2000 settle a 0.1 failed -> settled, a ended\nshow counts -> tasks 0, dead letters 1, missed 0";
        assert_eq!(recorded, right, "the script as it is recorded");
        let expected = "  line 4: 1000  register a due=2000\n    recorded  wrong\n    came      due 2000, a at 2000\n  \
                        line 5: 2000 settle a 0.1 failed\n    recorded  \n    came      settled, a ended\n";
        assert_eq!(difference, expected, "what a failed test shows");
        let Replayed { recorded: again, difference } = replay(&recorded).unwrap();
        assert_eq!((again.as_str(), difference.as_str()), (right, ""), "what was recorded is what comes");
    }

    #[test]
    fn a_script_with_a_line_that_has_no_meaning_is_neither_run_nor_recorded() {
        for (line, why) in [
            ("1000 register a due=2000", "'->' is missing"),
            ("show counts", "'->' is missing"),
            ("policy attempts=1 interval=0 -> ok", "nothing comes of a policy, so no '->'"),
            ("soon register a due=2000 ->", "'soon' is not a time in milliseconds"),
            ("1000 ->", "a request is missing"),
            ("1000 regster a due=2000 ->", "'regster' is no request"),
            ("1000 register a ->", "due= is missing"),
            ("1000 register a due=x ->", "'x' is not a number for due="),
            ("1000 register a due=2000 from=b ->", "'from=b' has no meaning here"),
            ("1000 register a due=2000 overlap ->", "'overlap' has no meaning here"),
            ("1000 register ab due=2000 ->", "'ab' is no task: those are one letter"),
            ("1000 register a due=2000 every=9 missed=two ->", "missed=two is neither 'skip' nor 'all:' and a number"),
            ("1000 register a due=2000 key=k ->", "'k' is not of the form key..expiry"),
            ("1000 cancel a ->", "one of 'held', 'out=0.1' and 'unknown' is needed"),
            ("1000 cancel a held unknown ->", "one of 'held', 'out=0.1' and 'unknown' is needed"),
            ("1000 settle a 0.1 maybe ->", "'maybe' is neither 'ok' nor 'failed'"),
            ("1000 settle a 01 ok ->", "'01' is not of the form occurrence.attempt"),
            ("show weather ->", "'weather' cannot be shown"),
        ] {
            let refused = replay(&format!("{WRONG}\n{line}\n")).map(|replayed| replayed.recorded);
            assert_eq!(refused, Err(Malformed { line: 7, why: why.into() }), "{line}");
        }
    }
}
