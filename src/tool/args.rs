//! What can be typed: flags and commands as plain values, and their help.
//!
//! The first of two stages. Here text becomes values, each checked by itself (clap exits with 2 and its own message); what
//! can only be judged together, or needs a file, is the business of the command. Defaults are those of [`Options`].

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::bench::args::BenchCommand;
use crate::client::{Credentials, Options};
use crate::task::{Backoff, Callback, ClientId, InstantMs, Invalid, Protocol, Retry, TaskId};
use crate::when::{parse_duration, parse_instant};

const HEAD: &str = "Connection";

/// Talks to a Boomerang node: registers tasks, looks at them, takes them back, and receives them.
#[derive(Debug, Parser)]
#[command(
    name = "boomtool",
    version,
    propagate_version = true,
    arg_required_else_help = true,
    long_about = "Talks to a Boomerang node: registers tasks, looks at them, takes them back, and receives them.\n\n\
        A task is a payload and a time. The node stores it durably, and at that time delivers the payload to the \
        receiver of the client that registered it: a TCP, UDP, HTTP or gRPC address.\n\n\
        Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 failed, 2 wrong usage.",
    after_help = "\
Examples:
  boomtool listen --tcp 127.0.0.1:9980                 # in one terminal: a receiver that prints what comes
  boomtool task register hello --in 5s --callback tcp://127.0.0.1:9980
  boomtool task list
  BOOMERANG_ADDR=10.0.0.7:9973 BOOMERANG_TOKEN=... boomtool task get 0190b2c4-...

'boomtool <command> --help' tells more about each command."
)]
pub struct Cli {
    /// How to reach the node, and how to print.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags that every command takes.
#[derive(Debug, Args)]
pub struct Global {
    /// Node to connect to, as host:port; several of one cluster with commas between
    #[arg(
        long,
        global = true,
        env = "BOOMERANG_ADDR",
        default_value = "127.0.0.1:9973",
        value_name = "HOST:PORT",
        value_delimiter = ',',
        help_heading = HEAD
    )]
    pub addr: Vec<String>,
    /// Client to log in as
    #[arg(
        long,
        global = true,
        env = "BOOMERANG_CLIENT",
        default_value = ClientId::ADMIN,
        value_name = "ID",
        help_heading = HEAD
    )]
    pub client: ClientId,
    /// Password of the client
    ///
    /// Better given as BOOMERANG_PASSWORD: other users of this machine can see the arguments of a command.
    #[arg(
        long,
        global = true,
        env = "BOOMERANG_PASSWORD",
        default_value = "",
        hide_default_value = true,
        hide_env_values = true,
        value_name = "TEXT",
        help_heading = HEAD
    )]
    pub password: String,
    /// API key, instead of client and password
    #[arg(
        long,
        global = true,
        env = "BOOMERANG_TOKEN",
        hide_env_values = true,
        value_name = "KEY",
        help_heading = HEAD
    )]
    pub token: Option<String>,
    /// How long to wait for the node, such as 500ms or 10s
    #[arg(
        long,
        global = true,
        default_value = "10s",
        value_name = "DURATION",
        value_parser = parse_timeout,
        help_heading = HEAD
    )]
    pub timeout: Duration,
    /// Print one JSON object per line
    #[arg(long, global = true)]
    pub json: bool,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Register, look at, and cancel tasks
    #[command(subcommand)]
    Task(TaskCommand),
    /// Clients and their keys (for administrators)
    #[command(subcommand)]
    Client(ClientCommand),
    /// Receive callbacks and print them as they come
    Listen(Listen),
    /// Measure a node, or the timing wheel alone
    #[command(subcommand)]
    Bench(Box<BenchCommand>),
}

/// What can be done with tasks.
#[derive(Debug, Subcommand)]
pub enum TaskCommand {
    /// Store a payload that comes back at a given time
    Register(Box<Register>),
    /// Show one task
    Get {
        /// Task id, as 'task register' printed it
        #[arg(value_name = "ID")]
        task_id: TaskId,
    },
    /// List tasks
    List(List),
    /// Take tasks back
    #[command(long_about = "Take tasks back.\n\n\
            The answer is definite. 'cancelled': it was not delivered and will not be. 'too late': the named attempt may \
            be out already. 'not found': it never was, is done, or was cancelled before. The exit code is 0 only when \
            every task was cancelled.")]
    Cancel {
        /// Task ids
        #[arg(value_name = "ID", required = true)]
        task_ids: Vec<TaskId>,
    },
}

/// `task register`.
#[derive(Debug, Args)]
#[command(
    long_about = "Store a payload that comes back at a given time.\n\n\
        When this command prints a task id, a majority of the cluster has the task on disk: it will come back, even if \
        nodes fail before. It goes to the receiver that --callback names, or else to the one the client was registered \
        with.",
    after_help = "\
Examples:
  boomtool task register hello --in 1h30m
  boomtool task register --file job.json --at 2030-01-31T08:00:00+02:00
  date | boomtool task register - --every 1m --callback http://127.0.0.1:8080/tick
  boomtool task register x --in 5s --attempts 10 --backoff exponential --retry-interval 1s --retry-max-interval 5m"
)]
pub struct Register {
    /// Payload as text; '-' reads it from standard input, '' is an empty one
    #[arg(value_name = "PAYLOAD", required_unless_present = "file")]
    pub payload: Option<String>,
    /// Read the payload from a file; '-' is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "payload")]
    pub file: Option<PathBuf>,
    /// Due so long from now: 250ms, 5s, 1h30m, 2d
    #[arg(
        long = "in",
        value_name = "DURATION",
        value_parser = parse_duration,
        conflicts_with = "at",
        required_unless_present_any = ["at", "every"]
    )]
    pub delay: Option<Duration>,
    /// Due at this instant: RFC 3339, or milliseconds since 1970; one in the past is due at once
    #[arg(long, value_name = "INSTANT", value_parser = parse_instant)]
    pub at: Option<InstantMs>,
    /// Come back again and again, so far apart; without --in or --at the first time is one interval from now
    #[arg(long, value_name = "DURATION", value_parser = parse_interval)]
    pub every: Option<Duration>,
    /// Where it goes, and how often it is tried.
    #[command(flatten)]
    pub policy: PolicyArgs,
}

/// Callback, retry and dead-letter settings.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Delivery")]
pub struct PolicyArgs {
    /// Receiver: tcp://host:port, udp://host:port, http(s)://..., grpc(s)://host:port
    #[arg(long, value_name = "URL", value_parser = parse_callback)]
    pub callback: Option<Callback>,
    /// How often an occurrence is tried, the first time included
    ///
    /// When one of the four retry flags is given, the others have these defaults: 5 attempts, exponential, 1s, 1m.
    #[arg(long, value_name = "N")]
    pub attempts: Option<u32>,
    /// How the pause between attempts grows
    #[arg(long, value_name = "KIND")]
    pub backoff: Option<BackoffArg>,
    /// The pause after the first attempt
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub retry_interval: Option<Duration>,
    /// The longest pause, with exponential backoff
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub retry_max_interval: Option<Duration>,
    /// Where a copy goes when every attempt has failed
    #[arg(long, value_name = "URL")]
    pub dead_letter: Option<String>,
}

/// The values of `--backoff`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackoffArg {
    /// Always the same pause
    Fixed,
    /// Twice as long each time
    Exponential,
}

/// `task list`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  boomtool task list --client-id orders --after 2030-01-01T00:00:00Z --limit 20
  boomtool task list --all --json | jq -r .task_id")]
pub struct List {
    /// Only tasks of this client
    #[arg(long, value_name = "ID")]
    pub client_id: Option<ClientId>,
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
}

/// What can be done with clients.
#[derive(Debug, Subcommand)]
pub enum ClientCommand {
    /// Register a client, with the defaults for its tasks
    #[command(after_help = "\
Examples:
  boomtool client add orders --new-password s3cret --callback tcp://orders.internal:9980
  head -c 24 /dev/urandom | base64 | tee pw | boomtool client add orders --new-password -")]
    Add(Box<ClientAdd>),
    /// Remove a client; its tasks stay and are delivered
    Remove {
        /// Client id
        #[arg(value_name = "ID")]
        client_id: ClientId,
    },
    /// Make an API key for a client, and print it: it is shown this once only
    Key {
        /// Client id
        #[arg(value_name = "ID")]
        client_id: ClientId,
        /// What it is for
        #[arg(long, default_value = "", value_name = "TEXT")]
        label: String,
    },
    /// Make an API key worthless
    RevokeKey {
        /// Key id, as 'client key' printed it
        #[arg(value_name = "KEYID")]
        key_id: String,
    },
}

/// `client add`.
#[derive(Debug, Args)]
pub struct ClientAdd {
    /// Client id
    #[arg(value_name = "ID")]
    pub client_id: ClientId,
    /// Its password; '-' reads one line from standard input
    #[arg(long, value_name = "TEXT")]
    pub new_password: String,
    /// It may do what administrators may
    #[arg(long)]
    pub admin: bool,
    /// The defaults for its tasks.
    #[command(flatten)]
    pub policy: PolicyArgs,
}

/// `listen`.
#[derive(Debug, Args)]
#[command(
    long_about = "Receive callbacks and print them as they come.\n\n\
        Each line says when a delivery arrived, by how many milliseconds it was late (measured by the clock of this \
        machine: trust it as far as the clocks agree), which task, attempt, occurrence and fence it carries, and the \
        payload. At the end, or on Ctrl-C, a summary follows: on standard output with --quiet, else on standard error. \
        A delivery is a duplicate when its occurrence came before with the same or a later attempt, or with the same \
        or a larger fence.\n\n\
        With --count, an end before so many deliveries is a failure (exit code 1).",
    after_help = "\
Examples:
  boomtool listen --tcp 127.0.0.1:9980
  boomtool listen --tcp 127.0.0.1:0 --count 1000 --quiet --json    # port 0: a free one, named on standard error
  boomtool listen --tcp 127.0.0.1:9980 --status error --delay 2s   # a receiver that is slow and fails"
)]
pub struct Listen {
    /// Address to listen on; port 0 picks a free one
    #[arg(long, value_name = "HOST:PORT")]
    pub tcp: String,
    /// Stop after so many deliveries
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// What the sender is told
    #[arg(long, value_name = "STATUS", default_value = "ok")]
    pub status: StatusArg,
    /// How long the sender waits for it
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = parse_duration)]
    pub delay: Duration,
    /// Print the summary only
    #[arg(long)]
    pub quiet: bool,
    /// How many characters of a payload are shown
    #[arg(long, value_name = "N", default_value_t = 60)]
    pub width: usize,
}

/// The values of `--status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StatusArg {
    /// The task is done
    Ok,
    /// It failed; the node may try again
    Error,
}

impl Global {
    /// How to connect, without any override of delivery settings.
    pub fn options(&self) -> Options {
        let credentials = match &self.token {
            Some(token) => Credentials::Token(token.clone()),
            None => Credentials::Password { client_id: self.client.clone(), password: self.password.clone() },
        };
        let options = Options::new(self.addr.clone(), credentials);
        Options { connect_timeout: options.connect_timeout.min(self.timeout), request_timeout: self.timeout, ..options }
    }
}

impl PolicyArgs {
    /// The retry settings, when any of them was given.
    pub fn retry(&self) -> Result<Option<Retry>, Invalid> {
        let Self { attempts, backoff, retry_interval, retry_max_interval, .. } = self;
        if attempts.is_none() && backoff.is_none() && retry_interval.is_none() && retry_max_interval.is_none() {
            return Ok(None);
        }
        let defaults = Retry::default();
        let interval_ms = retry_interval.map_or(defaults.interval_ms, millis);
        let retry = Retry {
            attempts_max: attempts.unwrap_or(defaults.attempts_max),
            backoff: match backoff {
                Some(BackoffArg::Fixed) => Backoff::Fixed,
                Some(BackoffArg::Exponential) => Backoff::Exponential,
                None => defaults.backoff,
            },
            interval_ms,
            interval_max_ms: retry_max_interval.map_or(defaults.interval_max_ms.max(interval_ms), millis),
            jitter_percent: 0,
        };
        retry.validate()?;
        Ok(Some(retry))
    }
}

/// In milliseconds; what was parsed here always fits.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn parse_timeout(text: &str) -> Result<Duration, String> {
    parse_duration(text).and_then(|timeout| if timeout.is_zero() { Err("is zero".into()) } else { Ok(timeout) })
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    parse_duration(text).and_then(|interval| {
        if interval.is_zero() {
            Err("is zero; leave --every out for a task that comes back once".into())
        } else {
            Ok(interval)
        }
    })
}

/// Reads a receiver's URL; its scheme names the protocol.
pub fn parse_callback(url: &str) -> Result<Callback, String> {
    const HOW: &str = "write it like tcp://host:port, udp://host:port, http://host/path, https://host/path or \
        grpc://host:port";
    let Some((scheme, rest)) = url.split_once("://") else {
        return Err(format!("'{url}' has no scheme; {HOW}"));
    };
    let callback = match scheme {
        "tcp" => Callback::new(Protocol::Tcp, rest),
        "udp" => Callback::new(Protocol::Udp, rest),
        "http" | "https" => Callback::new(Protocol::Http, url),
        "grpc" => Callback::new(Protocol::Grpc, rest),
        "grpcs" => Callback::new(Protocol::Grpc, &format!("https://{rest}")),
        _ => return Err(format!("'{scheme}' is not a protocol of callbacks; {HOW}")),
    };
    callback.map_err(|error| format!("{error}; {HOW}"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;

    const ID: &str = "018bcfe5-6800-7003-8000-000000000001";

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("boomtool").chain(line.split_whitespace()))
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn good_lines_are_understood() {
        for line in [
            "task register hello --in 5s",
            "task register --file - --at 2030-01-31T08:00:00Z --every 1h",
            "task register - --every 1m",
            "task register x --in 1s --callback grpc://h:1 --attempts 3 --backoff fixed --retry-interval 1s",
            "--json task list --after 1896076800000 --recurring --limit 5",
            "task list --all --once --addr a:1,b:2",
            "client add orders --new-password x --admin --callback https://h/x",
            "client key orders --label ci --token k",
            "client revoke-key k1",
            "listen --tcp 127.0.0.1:0 --count 3 --status error --delay 10ms --quiet --json",
            "bench register --tasks 10 --connections 2 --inflight 8 --payload 0 --delay 1h --keep --quiet",
            "bench fire --tasks 10 --spread 1s --pending 5 --pending-delay 2h --protocol tcp --lead 1s --wait 5s --json",
            "bench drain --tasks 10 --lead 1s --listen 0.0.0.0:0 --advertise bench.internal",
            "bench wheel --timers 1000 --spread 5s --alone",
        ] {
            if let Err(error) = parse(line) {
                panic!("{line}: {error}");
            }
        }
        assert!(parse(&format!("task get {ID}")).is_ok());
        assert!(parse(&format!("task cancel {ID} {ID}")).is_ok());
    }

    #[test]
    fn wrong_lines_are_refused_with_a_reason() {
        for (line, why) in [
            ("task register hello", "--in"),
            ("task register --in 5s", "PAYLOAD"),
            ("task register x --in 5s --at 1896076800000", "cannot be used with"),
            ("task register x --file f --in 5s", "cannot be used with"),
            ("task register x --in 30", "has no unit"),
            ("task register x --every 0s", "is zero"),
            ("task register x --at tomorrow", "not an instant"),
            ("task register x --in 1s --callback h:1", "has no scheme"),
            ("task register x --in 1s --callback tcp://h", "not host:port"),
            ("task register x --in 1s --callback ftp://h:1", "not a protocol"),
            ("task get nonsense", "is not a UUID"),
            ("task cancel", "required"),
            ("task list --recurring --once", "cannot be used with"),
            ("task list --all --limit 3", "cannot be used with"),
            ("listen", "--tcp"),
            ("listen --tcp h:1 --count 0", "0 is not in"),
            ("task list --timeout 0s", "is zero"),
            ("bench register --tasks 0", "0 is not in"),
            ("bench fire --spread 0s", "is zero"),
            ("bench fire --protocol udp", "possible values: tcp"),
            ("bench wheel --timers 1", "1 is not in"),
        ] {
            let error = parse(line).expect_err(line);
            assert!(error.to_string().contains(why), "{line}: {error}");
            assert_eq!(error.exit_code(), 2, "{line}");
        }
        assert_eq!(parse("task register --help").unwrap_err().kind(), ErrorKind::DisplayHelp);
    }

    #[test]
    fn schemes_name_protocols() {
        for (url, protocol, endpoint) in [
            ("tcp://h:1", Protocol::Tcp, "h:1"),
            ("udp://[::1]:2", Protocol::Udp, "[::1]:2"),
            ("http://h/x", Protocol::Http, "http://h/x"),
            ("https://h:8443/x?y=1", Protocol::Http, "https://h:8443/x?y=1"),
            ("grpc://h:3", Protocol::Grpc, "h:3"),
            ("grpcs://h:3", Protocol::Grpc, "https://h:3"),
        ] {
            let callback = parse_callback(url).unwrap();
            assert_eq!((callback.protocol, callback.endpoint.as_str()), (protocol, endpoint), "{url}");
        }
    }

    #[test]
    fn one_retry_flag_brings_the_defaults_of_the_others() {
        assert_eq!(PolicyArgs::default().retry().unwrap(), None);
        let args = PolicyArgs { attempts: Some(9), ..Default::default() };
        assert_eq!(args.retry().unwrap(), Some(Retry { attempts_max: 9, ..Retry::default() }));
        let args = PolicyArgs { retry_interval: Some(Duration::from_secs(3600)), ..Default::default() };
        assert_eq!(args.retry().unwrap().unwrap().interval_max_ms, 3_600_000, "the cap follows a longer pause");
        let args = PolicyArgs { retry_max_interval: Some(Duration::from_millis(1)), ..Default::default() };
        assert!(args.retry().unwrap_err().to_string().contains("max_interval_ms"));
    }

    #[test]
    fn a_token_takes_the_place_of_a_password() {
        let cli = parse("task list --client orders --password p --timeout 2s").unwrap();
        let options = cli.global.options();
        assert!(
            matches!(&options.credentials, Credentials::Password { client_id, .. } if client_id.as_str() == "orders")
        );
        assert_eq!((options.connect_timeout.as_secs(), options.request_timeout.as_secs()), (2, 2));
        let cli = parse("task list --token t").unwrap();
        assert!(matches!(cli.global.options().credentials, Credentials::Token(token) if token == "t"));
    }
}
