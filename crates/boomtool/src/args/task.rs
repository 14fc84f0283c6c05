//! What can be typed after `boomtool task`.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use clap::{Args, Subcommand, ValueEnum};

use super::delivery::PolicyArgs;
use super::{millis, parse_interval, parse_timeout};
use boomerang_client::{Dedup, Due, Registration, TaskState};
use boomerang_task::when::{parse_duration, parse_instant};
use boomerang_task::{ClientId, InstantMs, Invalid, Missed, Recurrence, Tags, TaskId};

/// How often `--watch` looks, when it does not say.
const WATCH_EVERY: &str = "2s";

/// What can be done with tasks.
#[derive(Debug, Subcommand)]
pub enum TaskCommand {
    /// Store a payload that comes back at a given time; or many of them
    Register(Box<Register>),
    /// Show one task, and what became of its occurrences
    Get(Get),
    /// List tasks
    List(List),
    /// Change a task of which no attempt is out
    Update(Box<Update>),
    /// Keep tasks from being delivered until they are resumed
    #[command(
        long_about = "Keep tasks from being delivered until they are resumed.\n\n\
            Due instants that pass meanwhile are left out. An attempt that may be out already is named.",
        after_help = "\
Examples:
  boomtool task pause 0190b2c4-...
  boomtool task list --label team=blue --json | jq -r .task_id | xargs boomtool task pause"
    )]
    Pause(TaskIds),
    /// Let paused tasks be delivered again
    #[command(after_help = "\
Examples:
  boomtool task resume 0190b2c4-...
  boomtool task list --state paused --all --json | jq -r .task_id | xargs boomtool task resume")]
    Resume(TaskIds),
    /// Take tasks back
    #[command(
        long_about = "Take tasks back.\n\n\
            The answer is definite. 'cancelled': it was not delivered and will not be. 'too late': the named attempt \
            may be out already. 'not found': it never was, is done, or was cancelled before. The exit code is 0 only \
            when every task was cancelled.",
        after_help = "\
Examples:
  boomtool task cancel 0190b2c4-..."
    )]
    Cancel(TaskIds),
}

/// One task or more.
#[derive(Debug, Args)]
pub struct TaskIds {
    /// Task ids, as 'task register' printed them
    #[arg(value_name = "ID", required = true)]
    pub task_ids: Vec<TaskId>,
}

/// `task register`.
#[derive(Debug, Args)]
#[command(
    long_about = "Store a payload that comes back at a given time; or many of them.\n\n\
        When this command prints a task id, a majority of the cluster has the task on disk: it will come back, even if \
        nodes fail before. It goes to the receiver that --callback names, or else to the one the client was registered \
        with.\n\n\
        --batch reads many tasks, one JSON object per line, with these fields: payload (text, or any JSON, which is \
        sent as its text) or payload_hex; in, at, every, missed, overlap, count, until; dedup_key, dedup_ttl; name, \
        labels (an object); callback, secret, callback_timeout, ack, http2, follow_redirects; attempts, backoff, \
        retry_interval, retry_max_interval, jitter; dead_letters. They mean what the flags of the same names mean, a \
        number where a time is wanted is in milliseconds, and the flags given are the defaults for all lines. Nothing \
        is sent when any line is wrong. One line is printed for each task, in their order.",
    after_help = "\
Examples:
  boomtool task register hello --in 1h30m
  boomtool task register --file job.json --at 2030-01-31T08:00:00+02:00 --name nightly --label team=blue
  date | boomtool task register - --every 1m --missed skip --callback http://127.0.0.1:8080/tick
  boomtool task register x --in 5s --attempts 10 --backoff exponential --retry-interval 1s --retry-max-interval 5m
  boomtool task register 'order 17' --in 1h --dedup-key order-17       # safe to send twice
  echo '{\"payload\":\"a\",\"in\":\"5s\",\"labels\":{\"team\":\"blue\"}}' | boomtool task register --batch - --name many"
)]
pub struct Register {
    /// Payload as text; '-' reads it from standard input, '' is an empty one
    #[arg(value_name = "PAYLOAD", required_unless_present_any = ["file", "batch"])]
    pub payload: Option<String>,
    /// Read the payload from a file; '-' is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "payload")]
    pub file: Option<PathBuf>,
    /// Read many tasks from a file, one JSON object per line; '-' is standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["payload", "file"])]
    pub batch: Option<PathBuf>,
    /// What it is given.
    #[command(flatten)]
    pub spec: TaskSpec,
}

/// Everything a task can be given besides its payload.
#[derive(Debug, Clone, Default, Args)]
pub struct TaskSpec {
    /// Due so long from now: 250ms, 5s, 1h30m, 2d
    #[arg(
        long = "in",
        value_name = "DURATION",
        value_parser = parse_duration,
        conflicts_with = "at",
        required_unless_present_any = ["at", "every", "batch"]
    )]
    pub delay: Option<Duration>,
    /// Due at this instant: RFC 3339, or milliseconds since 1970; one in the past is due at once
    #[arg(long, value_name = "INSTANT", value_parser = parse_instant)]
    pub at: Option<InstantMs>,
    /// Come back again and again, so far apart; without --in or --at the first time is one interval from now
    #[arg(long, value_name = "DURATION", value_parser = parse_interval)]
    pub every: Option<Duration>,
    /// What becomes of times that were missed: run as one, left out, or each run, the latest N of them [default: once]
    #[arg(long, value_name = "once|skip|all[:N]", value_parser = parse_missed)]
    pub missed: Option<Missed>,
    /// Start an occurrence even if the one before is still out or being retried
    #[arg(long)]
    pub overlap: bool,
    /// End after so many times
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// End at this instant
    #[arg(long, value_name = "INSTANT", value_parser = parse_instant)]
    pub until: Option<InstantMs>,
    /// The same key gives the same task, however often it is sent
    #[arg(long, value_name = "TEXT")]
    pub dedup_key: Option<String>,
    /// How long the key is remembered [default: 24h]
    #[arg(long, value_name = "DURATION", value_parser = parse_timeout)]
    pub dedup_ttl: Option<Duration>,
    /// A name, to find it again; it need not be unique
    #[arg(long, value_name = "TEXT")]
    pub name: Option<String>,
    /// A label, to find it again; can be given several times
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse_label)]
    pub labels: Vec<(String, String)>,
    /// Where it goes, and how often it is tried.
    #[command(flatten)]
    pub policy: PolicyArgs,
}

impl TaskSpec {
    /// With this payload.
    pub fn registration(&self, payload: Bytes) -> Result<Registration, Invalid> {
        let due = match (self.at, self.delay.or(self.every)) {
            (Some(at_ms), _) => Due::At(at_ms),
            (None, Some(delay)) => Due::In(millis(delay)),
            (None, None) => return Err(Invalid::new("in, at, every: one of them must say when it is due")),
        };
        let dedup = match (&self.dedup_key, self.dedup_ttl) {
            (Some(key), _) if key.is_empty() => return Err(Invalid::new("dedup_key: is empty")),
            (Some(key), ttl) => Some(Dedup { key: key.clone(), ttl_ms: ttl.map(millis) }),
            (None, Some(_)) => return Err(Invalid::new("dedup_ttl: says more about dedup_key, which is missing")),
            (None, None) => None,
        };
        Ok(Registration {
            payload,
            due,
            recurrence: self.recurrence()?,
            dedup,
            tags: Tags::new(self.name.as_deref().unwrap_or_default(), self.labels.iter().cloned())?,
            settings: self.policy.settings()?,
        })
    }

    fn recurrence(&self) -> Result<Option<Recurrence>, Invalid> {
        let Self { missed, overlap, count, until, .. } = self;
        let Some(every) = self.every else {
            return match missed.is_none() && !overlap && count.is_none() && until.is_none() {
                true => Ok(None),
                false => Err(Invalid::new("missed, overlap, count, until: say more about every, which is missing")),
            };
        };
        let recurrence = Recurrence {
            missed: missed.unwrap_or(Missed::Once),
            overlap: *overlap,
            count: *count,
            until_ms: *until,
            ..Recurrence::every(millis(every))
        };
        recurrence.validate(self.at)?;
        Ok(Some(recurrence))
    }
}

/// `task get`.
#[derive(Debug, Args)]
#[command(
    long_about = "Show one task, and what became of its occurrences.\n\n\
        A task that has ended is known by its history for a while. With --watch, the task is shown until it has ended, \
        and then how: on a terminal it is drawn anew, elsewhere a line is printed whenever something has changed.",
    after_help = "\
Examples:
  boomtool task get 0190b2c4-...
  boomtool task get 0190b2c4-... --json --history | jq '.history[].outcome'
  boomtool task get 0190b2c4-... --watch 500ms"
)]
pub struct Get {
    /// Task id, as 'task register' printed it
    #[arg(value_name = "ID")]
    pub task_id: TaskId,
    /// With --json, print the history too; for people it is always there
    #[arg(long)]
    pub history: bool,
    /// Look again so often, until the task has ended [default: 2s]
    #[arg(
        long,
        value_name = "DURATION",
        num_args = 0..=1,
        default_missing_value = WATCH_EVERY,
        value_parser = parse_timeout
    )]
    pub watch: Option<Duration>,
}

/// `task list`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  boomtool task list --client-id orders --after 2030-01-01T00:00:00Z --limit 20
  boomtool task list --state retrying --watch
  boomtool task list --label team=blue --name-prefix night
  boomtool task list --all --json | jq -r .task_id")]
pub struct List {
    /// Only tasks of this client
    #[arg(long, value_name = "ID")]
    pub client_id: Option<ClientId>,
    /// Only tasks in this state
    #[arg(long, value_name = "STATE")]
    pub state: Option<StateArg>,
    /// Only tasks whose name begins so
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub name_prefix: String,
    /// Only tasks with this label, whose value begins so
    #[arg(long, value_name = "KEY=PREFIX", value_parser = parse_label)]
    pub label: Option<(String, String)>,
    /// Only tasks due after this instant: RFC 3339, or milliseconds since 1970
    #[arg(long, value_name = "INSTANT", value_parser = parse_instant)]
    pub after: Option<InstantMs>,
    /// Only tasks due before this instant
    #[arg(long, value_name = "INSTANT", value_parser = parse_instant)]
    pub before: Option<InstantMs>,
    /// Only recurring tasks
    #[arg(long, conflicts_with = "once")]
    pub recurring: bool,
    /// Only tasks that come back once
    #[arg(long)]
    pub once: bool,
    /// Show at most so many
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    pub limit: u64,
    /// Show all of them
    #[arg(long, conflicts_with = "limit")]
    pub all: bool,
    /// List again so often, until Ctrl-C [default: 2s]
    ///
    /// On a terminal the list is drawn anew; elsewhere only what has changed is printed.
    #[arg(
        long,
        value_name = "DURATION",
        num_args = 0..=1,
        default_missing_value = WATCH_EVERY,
        value_parser = parse_timeout
    )]
    pub watch: Option<Duration>,
}

/// The values of `--state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StateArg {
    /// Waits for its first attempt
    Scheduled,
    /// An attempt has failed; waits for the next one
    Retrying,
    /// An attempt is out
    Out,
    /// Waits for being resumed
    Paused,
}

impl From<StateArg> for TaskState {
    fn from(state: StateArg) -> Self {
        match state {
            StateArg::Scheduled => TaskState::Scheduled,
            StateArg::Retrying => TaskState::Retrying,
            StateArg::Out => TaskState::Out,
            StateArg::Paused => TaskState::Paused,
        }
    }
}

/// `task update`.
#[derive(Debug, Args)]
#[command(
    long_about = "Change a task of which no attempt is out.\n\n\
        What is not named stays as it is. The answer is definite: 'updated' with the new version, 'too late' when the \
        named attempt may be out, 'conflict' when --if-version names another version than it has, 'not found'. The \
        exit code is 0 only when it was updated. --callback replaces the receiver with all of its options; one of the \
        retry flags replaces all five of them.",
    after_help = "\
Examples:
  boomtool task update 0190b2c4-... --in 10m
  boomtool task update 0190b2c4-... --payload 'something else' --if-version 3
  boomtool task update 0190b2c4-... --callback https://orders.example/hook --attempts 20"
)]
pub struct Update {
    /// Task id
    #[arg(value_name = "ID")]
    pub task_id: TaskId,
    /// Due so long from now
    #[arg(long = "in", value_name = "DURATION", value_parser = parse_duration, conflicts_with = "at")]
    pub delay: Option<Duration>,
    /// Due at this instant; one in the past is due at once
    #[arg(long, value_name = "INSTANT", value_parser = parse_instant)]
    pub at: Option<InstantMs>,
    /// Another payload as text; '-' reads it from standard input
    #[arg(long, value_name = "TEXT")]
    pub payload: Option<String>,
    /// Another payload from a file; '-' is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "payload")]
    pub file: Option<PathBuf>,
    /// Only if the task still has this version, as 'task get' shows it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub if_version: Option<u64>,
    /// Where it goes, and how often it is tried.
    #[command(flatten)]
    pub policy: PolicyArgs,
}

/// `skip`, `once`, `all` or `all:N`.
pub fn parse_missed(text: &str) -> Result<Missed, String> {
    match text.split_once(':') {
        None if text == "skip" => Ok(Missed::Skip),
        None if text == "once" => Ok(Missed::Once),
        None if text == "all" => Ok(Missed::All { max: Missed::MAX_DEFAULT }),
        Some(("all", number)) => match number.parse() {
            Ok(max @ 1..=Missed::MAX_MAX) => Ok(Missed::All { max }),
            _ => Err(format!("'{number}' is not within 1 and {}", Missed::MAX_MAX)),
        },
        _ => Err(format!("'{text}' is none of: once, skip, all, all:N")),
    }
}

/// `key=value`; the value may be empty.
fn parse_label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("'{text}' is not KEY=VALUE")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missed_occurrences_have_three_ways() {
        assert_eq!(parse_missed("all:7"), Ok(Missed::All { max: 7 }));
        assert_eq!(parse_missed("all"), Ok(Missed::All { max: Missed::MAX_DEFAULT }));
        assert_eq!([parse_missed("skip"), parse_missed("once")], [Ok(Missed::Skip), Ok(Missed::Once)]);
        assert!(
            ["", "none", "all:", "all:0", "all:x", "all:10001", "skip:1"].into_iter().all(|t| parse_missed(t).is_err())
        );
    }

    #[test]
    fn what_says_more_needs_what_it_says_more_about() {
        let second = Some(Duration::from_secs(1));
        for (spec, why) in [
            (TaskSpec::default(), "say when"),
            (TaskSpec { delay: second, dedup_ttl: second, ..Default::default() }, "dedup_key"),
            (TaskSpec { delay: second, dedup_key: Some(String::new()), ..Default::default() }, "is empty"),
            (TaskSpec { delay: second, overlap: true, ..Default::default() }, "every"),
            (TaskSpec { at: Some(9), every: second, until: Some(8), ..Default::default() }, "until_ms"),
            (TaskSpec { delay: second, name: Some("a\nb".into()), ..Default::default() }, "name"),
        ] {
            let error = spec.registration(Bytes::new()).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
