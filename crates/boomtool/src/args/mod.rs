//! What can be typed: flags and commands as plain values, and their help.
//!
//! The first of two stages. Here text becomes values, each checked by itself (clap exits with 2 and its own message);
//! what can only be judged together, or needs a file, is the business of the command. Defaults are those of
//! [`Options`].
//!
//! - [`task`], [`dlq`], [`cluster`], [`listen`]: one file per family of commands; those of `bench` are with the benches
//! - [`delivery`]: where a task goes, for all commands that can say so

pub mod cluster;
pub mod delivery;
pub mod dlq;
pub mod listen;
pub mod profile;
pub mod task;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::Shell;

use super::ToolError;
use super::bench::args::BenchCommand;
use boomerang_client::{Credentials, Options, Tls};
use boomerang_task::when::parse_duration;
use boomerang_task::{ClientId, ClientLimits, Invalid};
use cluster::ClusterCommand;
use delivery::PolicyArgs;
use dlq::DlqCommand;
use listen::Listen;
use profile::ProfileCommand;
use task::TaskCommand;

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
  boomtool task list --watch
  boomtool dlq list
  boomtool shell
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
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct Global {
    /// Nodes, client and TLS as they are kept under this name by 'boomtool profile add'
    #[arg(long, global = true, env = "BOOMERANG_PROFILE", value_name = "NAME", help_heading = HEAD)]
    pub profile: Option<String>,
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
    /// Speak TLS with the node, which must show a certificate for its host; any of --ca and --cert means this, too
    #[arg(
        long,
        global = true,
        env = "BOOMERANG_TLS",
        value_parser = clap::builder::FalseyValueParser::new(),
        help_heading = HEAD
    )]
    pub tls: bool,
    /// Who signs the node's certificate, PEM [default: whom this machine trusts]
    #[arg(long, global = true, env = "BOOMERANG_CA", value_name = "FILE", help_heading = HEAD)]
    pub ca: Option<PathBuf>,
    /// Certificate to show to the node, PEM
    #[arg(long, global = true, env = "BOOMERANG_CERT", value_name = "FILE", requires = "key", help_heading = HEAD)]
    pub cert: Option<PathBuf>,
    /// Key of --cert, PEM
    #[arg(long, global = true, env = "BOOMERANG_KEY", value_name = "FILE", requires = "cert", help_heading = HEAD)]
    pub key: Option<PathBuf>,
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
    /// Register, look at, change, pause and cancel tasks
    #[command(subcommand)]
    Task(TaskCommand),
    /// Dead letters: tasks of which every attempt has failed
    #[command(subcommand)]
    Dlq(DlqCommand),
    /// Clients and their keys (for administrators)
    #[command(subcommand)]
    Client(ClientCommand),
    /// The nodes and shards of a cluster, and where replicas are (for administrators)
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Keep nodes, client, password and TLS under a name
    #[command(subcommand)]
    Profile(ProfileCommand),
    /// Receive callbacks and print them as they come
    Listen(Box<Listen>),
    /// An interactive prompt, on one connection
    Shell(ShellArgs),
    /// Measure a node
    #[command(subcommand)]
    Bench(Box<BenchCommand>),
    /// Print a script that completes the words of a command line
    #[command(after_help = "\
Examples:
  boomtool completions bash > ~/.local/share/bash-completion/completions/boomtool
  boomtool completions zsh > ~/.zfunc/_boomtool
  boomtool completions fish > ~/.config/fish/completions/boomtool.fish")]
    Completions {
        /// For which shell
        #[arg(value_name = "SHELL")]
        shell: Shell,
    },
}

/// What can be done with clients.
#[derive(Debug, Subcommand)]
pub enum ClientCommand {
    /// Register a client, with the defaults for its tasks
    #[command(after_help = "\
Examples:
  boomtool client add orders --new-password s3cret --callback tcp://orders.internal:9980
  boomtool client add guest --new-password s3cret --delay-max 7d --payload-max 4KiB
  head -c 24 /dev/urandom | base64 | tee pw | boomtool client add orders --new-password -")]
    Add(Box<ClientAdd>),
    /// Remove a client; its tasks stay and are delivered
    #[command(after_help = "\
Examples:
  boomtool client remove orders")]
    Remove {
        /// Client id
        #[arg(value_name = "ID")]
        client_id: ClientId,
    },
    /// Make an API key for a client, and print it: it is shown this once only
    #[command(after_help = "\
Examples:
  boomtool client key orders --label ci
  export BOOMERANG_TOKEN=$(boomtool client key orders --json | jq -r .key)")]
    Key {
        /// Client id
        #[arg(value_name = "ID")]
        client_id: ClientId,
        /// What it is for
        #[arg(long, default_value = "", value_name = "TEXT")]
        label: String,
    },
    /// Make an API key worthless
    #[command(after_help = "\
Examples:
  boomtool client revoke-key 3f2a91c0")]
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
    /// How far ahead its tasks may be due, where that is less than what the node allows
    #[arg(long, value_name = "DURATION", value_parser = parse_timeout)]
    pub delay_max: Option<Duration>,
    /// How large its payloads may be, where that is less than what the node allows: 65536, 64KiB, 1MiB
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub payload_max: Option<u64>,
    /// The shortest interval of its recurring tasks, shorter or longer than what the node allows otherwise
    #[arg(long, value_name = "DURATION", value_parser = parse_timeout)]
    pub interval_min: Option<Duration>,
    /// The defaults for its tasks.
    #[command(flatten)]
    pub policy: PolicyArgs,
}

/// `shell`.
#[derive(Debug, Args)]
#[command(
    long_about = "An interactive prompt.\n\n\
        Every command without the word 'boomtool', with quotes as in a shell, on one connection that is kept open. The \
        flags for the connection, and --json, hold for every line that does not name its own. An error does not end \
        it; Ctrl-C ends a command, 'exit' or Ctrl-D the prompt. Lines that name a secret are not kept in the history.\n\n\
        When standard input is no terminal there is no prompt, and the exit code is 1 if any line failed.",
    after_help = "\
Examples:
  boomtool shell --addr 10.0.0.7:9973
  printf 'task list\\nclient add orders --new-password x\\n' | boomtool shell --json"
)]
pub struct ShellArgs {
    /// Where lines are remembered [default: boomtool/history in $XDG_STATE_HOME or ~/.local/state]
    #[arg(long, value_name = "FILE")]
    pub history: Option<PathBuf>,
    /// Remember lines until the end only
    #[arg(long, conflicts_with = "history")]
    pub no_history: bool,
}

impl Cli {
    /// Reads a line, the name of the program first.
    #[cfg(test)]
    pub fn read<W: Into<OsString> + Clone>(words: impl IntoIterator<Item = W>) -> Result<Self, clap::Error> {
        Self::read_with_matches(words).map(|(cli, _)| cli)
    }

    /// Reads a line, the name of the program first, and says what clap found in it.
    pub fn read_with_matches<W: Into<OsString> + Clone>(
        words: impl IntoIterator<Item = W>,
    ) -> Result<(Self, ArgMatches), clap::Error> {
        let matches = Self::command().try_get_matches_from(words)?;
        Ok((Self::of(&matches)?, matches))
    }

    /// The same from what clap found. Refuses what says of a node that it is not the bench's and of the bench that it
    /// has nodes of its own; an environment that names a node is no such word.
    pub(super) fn of(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let cli = Self::from_arg_matches(matches)?;
        let typed = |flag: &&str| matches.value_source(flag) == Some(ValueSource::CommandLine);
        if let Command::Bench(bench) = &cli.command
            && bench.starts_nodes()
            && let Some(flag) = ["addr", "client", "password", "token"].into_iter().find(typed)
        {
            let text = format!(
                "--{flag} is for a node that runs already, and this bench starts nodes of its own: leave out --{flag}, \
                 or --nodes"
            );
            return Err(Self::command().error(ErrorKind::ArgumentConflict, text));
        }
        Ok(cli)
    }
}

impl ClientAdd {
    /// What was given of them.
    pub fn limits(&self) -> ClientLimits {
        ClientLimits {
            delay_max_ms: self.delay_max.map(millis),
            payload_bytes_max: self.payload_max,
            interval_min_ms: self.interval_min.map(millis),
        }
    }
}

impl Global {
    /// Takes over from `shell` what the line in `matches` did not name itself.
    pub fn inherit(&mut self, shell: &Global, matches: &ArgMatches) {
        let named = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
        // Who is calling is one thing, however many flags say it.
        if !named("client") && !named("password") && !named("token") {
            (self.client, self.password, self.token) =
                (shell.client.clone(), shell.password.clone(), shell.token.clone());
        } else if !named("token") {
            self.token = None;
        }
        if !named("addr") {
            self.addr = shell.addr.clone();
        }
        if !named("timeout") {
            self.timeout = shell.timeout;
        }
        if !named("tls") && !named("ca") && !named("cert") {
            (self.tls, self.ca) = (shell.tls, shell.ca.clone());
            (self.cert, self.key) = (shell.cert.clone(), shell.key.clone());
        }
        self.json |= shell.json;
    }

    /// How to connect, without any override of delivery settings.
    pub fn options(&self) -> Result<Options, ToolError> {
        let credentials = match &self.token {
            Some(token) => Credentials::Token(token.clone()),
            None => Credentials::Password { client_id: self.client.clone(), password: self.password.clone() },
        };
        let options = Options::new(self.addr.clone(), credentials);
        let connect_timeout = options.connect_timeout.min(self.timeout);
        Ok(Options { tls: self.tls()?, connect_timeout, request_timeout: self.timeout, ..options })
    }

    fn tls(&self) -> Result<Option<Tls>, ToolError> {
        let read =
            |path: &Path| std::fs::read(path).map_err(|source| ToolError::File { path: path.to_owned(), source });
        let ca = self.ca.as_deref().map(read).transpose()?;
        let tls = match (&self.cert, &self.key, ca) {
            (Some(cert), Some(key), ca) => Tls::showing(ca.as_deref(), &read(cert)?, &read(key)?),
            (_, _, Some(ca)) => Tls::trusting(&ca),
            _ if self.tls => Tls::trusting_the_system(),
            _ => return Ok(None),
        };
        tls.map(Some).map_err(|error| ToolError::Usage(Invalid::new(format!("--ca, --cert, --key: {error}"))))
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

/// `65536`, `64KiB`, `1MiB`, `1GiB`.
pub(super) fn parse_bytes(text: &str) -> Result<u64, String> {
    const HOW: &str = "write it like 65536, 64KiB, 1MiB or 1GiB";
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return Err(format!("'{unit}' is no unit of sizes; {HOW}")),
    };
    match number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit)) {
        Some(0) => Err("is zero".into()),
        Some(bytes) => Ok(bytes),
        None => Err(format!("'{text}' is not a size; {HOW}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "018bcfe5-6800-7003-8000-000000000001";

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::read(std::iter::once("boomtool").chain(line.split_whitespace()))
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
            "task register --batch - --in 5s",
            "task register x --every 5s --missed all:3 --overlap --count 9 --until 2030-01-31T08:00:00Z",
            "task register x --in 1s --dedup-key k --dedup-ttl 1h --name n --label a=b --label c=",
            "task register x --in 1s --callback udp://h:1 --ack --callback-timeout 2s --jitter 20% --dead-letters http://d",
            "task list --state retrying --name-prefix n --label a=b --watch",
            "task list --watch 500ms",
            "dlq list --client-id orders --died-after 1896076800000 --class bad-status --name-prefix n --limit 3",
            "dlq replay --all --class timeout",
            "dlq purge --all --yes",
            "client add guest --new-password x --delay-max 7d --payload-max 4KiB",
            "listen --tcp 127.0.0.1:0 --count 3 --status error --delay 10ms --quiet --json",
            "listen --tcp a:1 --tcp a:2 --grpc a:3 --http a:4 --udp a:5 --fail-rate 0.5 --status 503 --status overloaded",
            "completions zsh",
            "shell --no-history",
            "bench register --tasks 10 --connections 2 --inflight 8 --payload 0 --delay 1h --keep --quiet",
            "bench fire --tasks 10 --spread 1s --pending 5 --pending-delay 2h --protocol tcp --lead 1s --wait 5s --json",
            "bench drain --tasks 10 --lead 1s --listen 0.0.0.0:0 --advertise bench.internal",
            "bench register --nodes 3 --shards 2 --boomerang b --node-flag=--window=10m --node-flag --tick-ms=2",
            "bench fire --nodes 1 --timeout 3s --json",
            "bench drain --nodes 9",
            "bench failover --nodes 2 --shards 64 --kills 1",
            "bench overload --factor 1.5 --time 30s --nodes 1 --memory-max 512MiB --shards 4",
        ] {
            if let Err(error) = parse(line) {
                panic!("{line}: {error}");
            }
        }
        for line in [
            format!("task get {ID} --history"),
            format!("task get {ID} --watch"),
            format!("task update {ID} --in 5s --payload x --if-version 3"),
            format!("task pause {ID} {ID}"),
            format!("task resume {ID}"),
            format!("dlq get {ID}@5"),
            format!("dlq purge {ID}@5 {ID}@6"),
        ] {
            assert!(parse(&line).is_ok(), "{line}");
        }
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
            ("task list --state asleep", "possible values: scheduled"),
            ("task list --label blue", "is not KEY=VALUE"),
            ("task register x --every 1s --missed never", "none of: once, skip"),
            ("task register x --in 1s --jitter 101", "not a percentage"),
            ("task register x --in 1s --secret whsec_!", "not base64"),
            ("task register x --batch f", "cannot be used with"),
            ("dlq get 5", "<task id>@<milliseconds>"),
            ("dlq replay", "required"),
            ("dlq purge 018bcfe5-6800-7003-8000-000000000001@5 --all", "cannot be used with"),
            ("client add x --new-password y --payload-max 4KB", "no unit"),
            ("listen --http a:1 --fail-rate 30", "30%"),
            ("listen --http a:1 --status teapot", "invalid-request"),
            ("completions csh", "possible values: bash"),
            ("bench register --tasks 0", "0 is not in"),
            ("bench fire --spread 0s", "is zero"),
            ("bench fire --protocol smtp", "possible values: tcp"),
            ("bench register --nodes 0", "0 is not in"),
            ("bench register --nodes 3 --addr h:1", "--addr is for a node that runs already"),
            ("--addr h:1 bench drain --nodes 3", "leave out --addr, or --nodes"),
            ("bench fire --nodes 1 --token t", "--token is for a node"),
            ("bench failover --password p", "--password is for a node"),
            ("bench overload --factor 0", "is no number from 0.1"),
            ("bench overload --addr h:1", "--addr is for a node"),
        ] {
            let error = parse(line).expect_err(line);
            assert!(error.to_string().contains(why), "{line}: {error}");
            assert_eq!(error.exit_code(), 2, "{line}");
        }
        assert_eq!(parse("task register --help").unwrap_err().kind(), ErrorKind::DisplayHelp);
    }

    #[test]
    fn every_command_has_help_with_examples() {
        fn check(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            if !command.has_subcommands() {
                let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(help.contains("Examples:") && help.contains("boomtool"), "{path}");
            }
            command.get_subcommands().for_each(|command| check(command, &path));
        }
        check(&Cli::command(), "");
    }

    #[test]
    fn the_examples_are_understood() {
        fn examples(command: &clap::Command, lines: &mut Vec<String>) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            lines.extend(help.lines().filter(|line| line.starts_with("  ")).map(str::to_owned));
            command.get_subcommands().for_each(|command| examples(command, lines));
        }
        let mut lines = Vec::new();
        examples(&Cli::command(), &mut lines);
        let mut seen = 0;
        for line in lines {
            // Comments go; and of a pipe, whatever calls us.
            let line = line.split(" #").next().unwrap().replace("0190b2c4-...", ID);
            for part in line.split(" | ").filter(|part| !part.contains("xargs") && !part.contains("$(")) {
                let words = shlex::split(part).expect("quotes are closed");
                let Some(at) = words.iter().position(|word| word == "boomtool") else { continue };
                let words = words[at..].iter().take_while(|word| *word != ">");
                if let Err(error) = Cli::read(words) {
                    panic!("{line}: {error}");
                }
                seen += 1;
            }
        }
        assert!(seen > 40, "{seen}");
    }

    #[test]
    fn sizes_are_bytes_or_have_a_unit() {
        assert_eq!(["1", "2B", "64KiB", "3GiB"].map(parse_bytes), [Ok(1), Ok(2), Ok(65536), Ok(3 << 30)]);
        assert!(["", "0", "x", "1KB", "1.5KiB", "99999999999999999999"].iter().all(|text| parse_bytes(text).is_err()));
    }

    #[test]
    fn a_line_in_the_shell_inherits_what_it_does_not_name() {
        let shell = parse("shell --addr a:1 --token t --timeout 3s --json").unwrap().global;
        let inherited = |line: &str| {
            let words = std::iter::once("boomtool").chain(line.split_whitespace());
            let matches = Cli::command().try_get_matches_from(words).unwrap();
            let mut cli = Cli::of(&matches).unwrap();
            cli.global.inherit(&shell, &matches);
            cli.global
        };
        assert_eq!(inherited("task list"), shell);
        assert_eq!(inherited("task list --addr b:2").addr, ["b:2"]);
        let other = inherited("task list --client orders --password p");
        assert_eq!((other.client.as_str(), other.token, other.addr), ("orders", None, vec!["a:1".to_owned()]));
        assert_eq!(inherited("--token u task list").token.as_deref(), Some("u"));
    }

    #[test]
    fn a_token_takes_the_place_of_a_password() {
        let cli = parse("task list --client orders --password p --timeout 2s").unwrap();
        let options = cli.global.options().unwrap();
        assert!(
            matches!(&options.credentials, Credentials::Password { client_id, .. } if client_id.as_str() == "orders")
        );
        assert_eq!((options.connect_timeout.as_secs(), options.request_timeout.as_secs()), (2, 2));
        let cli = parse("task list --token t").unwrap();
        assert!(matches!(cli.global.options().unwrap().credentials, Credentials::Token(token) if token == "t"));
    }

    #[test]
    fn tls_is_meant_by_any_of_its_flags() {
        let folder = tempfile::tempdir().unwrap();
        let nonsense = folder.path().join("ca.pem");
        std::fs::write(&nonsense, "nonsense").unwrap();
        let options = |line: &str| parse(line).unwrap().global.options();
        assert!(options("task list").unwrap().tls.is_none());
        match options("task list --tls") {
            Ok(options) => assert!(options.tls.is_some()),
            // Some machines do.
            Err(error) => assert!(error.to_string().contains("trusts nobody"), "{error}"),
        }
        let error = options(&format!("task list --ca {}", nonsense.display())).unwrap_err().to_string();
        assert!(error.contains("holds no certificate in PEM"), "{error}");
        let error = options("task list --ca none.pem").unwrap_err().to_string();
        assert_eq!(error, "cannot read none.pem");
        assert!(parse("task list --cert c").is_err(), "a certificate without its key");
    }
}
