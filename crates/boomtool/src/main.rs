//! `boomtool`: commands for people and scripts, over the Rust client.
//!
//! Parsed values come from [`args`]; each command file builds its request, makes it, and prints the result. Nothing
//! here knows bytes on the wire. Exit codes: 0 done, 1 failed, 2 wrong usage. Data goes to standard output, all else to
//! standard error, and every error says what to do next where that is known.
//!
//! - [`args`]: flags, commands and their help
//! - `task`, `batch`, `dlq`, `client`, `cluster`, `listen`, `shell`, `bench`: one file per family of commands
//! - `output`: lines, tables and JSON; `show`: tasks and dead letters in them; `watch`: the same again and again

mod args;
mod batch;
mod bench;
mod client;
mod cluster;
mod dlq;
mod listen;
mod output;
mod profile;
mod shell;
mod show;
mod task;
mod watch;

use std::error::Error;
use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::CommandFactory;

use args::{Cli, Command, Global};
use boomerang_client::{Client, ClientError};
use boomerang_task::Invalid;
use boomerang_wire::FRAME_BYTES_MAX;
use boomerang_wire::proto::Status;
use output::{Output, note};

/// Why a command did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// The node said no, or could not be reached.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Flags that do not go together.
    #[error(transparent)]
    Usage(#[from] Invalid),
    /// A payload or password could not be read.
    #[error("cannot read {path}")]
    File {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// No socket to listen on.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: String,
        /// Why not.
        source: io::Error,
    },
    /// Results could not be written.
    #[error("cannot write the results")]
    Output(#[source] io::Error),
    /// Everything worked, but the result is not the one that was asked for.
    #[error("{0}")]
    Undone(String),
}

impl ToolError {
    fn file(path: &Path, source: io::Error) -> Self {
        let path = if path == Path::new("-") { Path::new("standard input") } else { path };
        ToolError::File { path: path.to_owned(), source }
    }

    /// 2 is for the caller's line, 1 for the rest.
    pub fn exit_code(&self) -> u8 {
        match self {
            // Whoever reads the results has seen enough.
            ToolError::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
            ToolError::Usage(_) | ToolError::Client(ClientError::Invalid(_)) => 2,
            _ => 1,
        }
    }

    /// What to do next, where that is known.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            ToolError::Client(ClientError::Connect { source, .. }) => match source.kind() {
                io::ErrorKind::TimedOut => "is the address right, and the node reachable? see --addr and --timeout",
                _ => "is a node running? start one with: boomerang dev",
            },
            ToolError::Client(ClientError::Timeout { .. }) => "is the node overloaded? a longer --timeout waits longer",
            ToolError::Client(ClientError::ConnectionLost { .. }) => "'boomtool task list' shows what is stored",
            ToolError::Client(ClientError::TooLarge { .. }) => {
                "store the data elsewhere, and register where it is to be found"
            }
            ToolError::Client(error @ ClientError::Server { status, retry_after, .. }) => match (status, retry_after) {
                (Status::Unauthorized, _) => {
                    "see --client and --password (BOOMERANG_CLIENT, BOOMERANG_PASSWORD), or --token (BOOMERANG_TOKEN); \
                     the first password of 'admin' is in <data-dir>/admin-password on the node"
                }
                (Status::Overloaded, Some(after)) => return Some(format!("try again in {after:?}")),
                // The text says what it is against.
                (Status::InvalidRequest, _) => return None,
                _ => return error.code().map(|code| code.advice().to_owned()),
            },
            ToolError::Listen { source, .. } if source.kind() == io::ErrorKind::AddrInUse => {
                "another program listens there; port 0 picks a free one"
            }
            ToolError::Usage(_) => "see --help",
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

/// What a command has besides its own arguments.
#[derive(Clone)]
struct Context {
    global: Global,
    output: Output,
    /// Somebody is there who can be asked.
    interactive: bool,
    /// In the shell: the connection that is kept from one line to the next.
    kept: Option<Arc<shell::Kept>>,
}

impl Context {
    /// A connection, opened for this command or kept from an earlier one.
    async fn connect(&self) -> Result<Client, ToolError> {
        match &self.kept {
            Some(kept) => kept.connect(&self.global).await,
            None => Ok(Client::connect(self.global.options()?).await?),
        }
    }

    /// The command needs its connection no longer.
    async fn hang_up(&self, client: Client) {
        if self.kept.is_none() {
            client.close().await;
        }
    }

    /// Reads a file, or standard input for `-`; no more than a frame could carry.
    fn read_input(&self, path: &Path) -> Result<Vec<u8>, ToolError> {
        let mut bytes = Vec::new();
        // One more than fits, so that too much is seen and refused rather than cut.
        let mut input = self.open_input(path)?.take(FRAME_BYTES_MAX as u64 + 1);
        input.read_to_end(&mut bytes).map_err(|source| ToolError::file(path, source))?;
        Ok(bytes)
    }

    /// Opens a file, or standard input for `-`.
    fn open_input(&self, path: &Path) -> Result<Box<dyn Read>, ToolError> {
        if path != Path::new("-") {
            let file = std::fs::File::open(path).map_err(|source| ToolError::file(path, source))?;
            return Ok(Box::new(file));
        }
        if self.kept.is_some() {
            return Err(Invalid::new("-: standard input is the shell's own; write the data into a file").into());
        }
        Ok(Box::new(io::stdin().lock()))
    }
}

fn main() -> ExitCode {
    let (mut cli, matches) = Cli::read_with_matches(std::env::args_os()).unwrap_or_else(|error| error.exit());
    // What is being kept is what the line says, and nothing of what was kept before.
    let filled = match &cli.command {
        Command::Profile(_) => Ok(()),
        _ => profile::fill(&mut cli.global, &matches),
    };
    if let Err(error) = filled {
        report(&error);
        return ExitCode::from(error.exit_code());
    }
    match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(run(cli)),
        Err(error) => {
            eprintln!("error: cannot start the runtime: caused by: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a parsed command line and says with which code to exit.
async fn run(cli: Cli) -> ExitCode {
    // One write per line: a listener's lines come out as they happen, even into a pipe.
    let output = Output::new(io::stdout(), cli.global.json, io::stdout().is_terminal());
    let interactive = io::stdin().is_terminal() && io::stderr().is_terminal();
    let context = Context { global: cli.global, output, interactive, kept: None };
    match execute(cli.command, context).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = error.exit_code();
            if code != 0 {
                report(&error);
            }
            ExitCode::from(code)
        }
    }
}

/// Prints an error with its causes, and the hint.
fn report(error: &ToolError) {
    note(&format!("error: {}", chain(error)));
    if let Some(hint) = error.hint() {
        note(&format!("hint: {hint}"));
    }
}

async fn execute(command: Command, context: Context) -> Result<(), ToolError> {
    match command {
        Command::Task(command) => task::run(command, &context).await,
        Command::Dlq(command) => dlq::run(command, &context).await,
        Command::Client(command) => client::run(command, &context).await,
        Command::Cluster(command) => cluster::run(command, &context).await,
        Command::Profile(command) => profile::run(command, &context),
        Command::Listen(listen) => listen::run(*listen, &context).await,
        Command::Shell(args) => shell::run(args, context).await,
        Command::Bench(command) => bench::run(*command, &context).await,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "boomtool", &mut script);
            context.output.raw(&String::from_utf8_lossy(&script))
        }
    }
}

/// Ctrl-C, or a polite request to end. Never, where the system cannot tell: there Ctrl-C ends the process by itself.
async fn interrupted() {
    let waiting = async {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            result = tokio::signal::ctrl_c() => result,
            _ = terminate.recv() => Ok(()),
        }
    };
    if waiting.await.is_err() {
        std::future::pending().await
    }
}

/// An error and its causes on one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": caused by: {error}"));
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use boomerang_task::locks::Mutex;
    use std::io::Write;
    use std::sync::Arc;

    use super::*;

    /// What a command printed.
    #[derive(Clone, Default)]
    pub struct Printed(Arc<Mutex<Vec<u8>>>);

    impl Write for Printed {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Printed {
        pub fn text(&self) -> String {
            String::from_utf8(self.0.lock().clone()).unwrap()
        }
    }

    /// A command line, what it is run with, and what it prints. Words are separated as in a shell.
    pub fn prepare(line: &str) -> (Command, Context, Printed) {
        let words = shlex::split(line).unwrap();
        let cli = Cli::read(std::iter::once("boomtool".to_owned()).chain(words)).unwrap();
        let printed = Printed::default();
        let output = Output::new(printed.clone(), cli.global.json, false);
        (cli.command, Context { global: cli.global, output, interactive: false, kept: None }, printed)
    }

    /// Runs a command line.
    pub async fn boomtool(line: &str) -> (String, Result<(), ToolError>) {
        let (command, context, printed) = prepare(line);
        let result = execute(command, context).await;
        (printed.text(), result)
    }

    #[tokio::test]
    async fn completions_know_the_commands() {
        for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
            let (printed, result) = boomtool(&format!("completions {shell}")).await;
            result.unwrap();
            assert!(printed.contains("replay") && printed.contains("dedup-key"), "{shell}");
        }
    }

    #[tokio::test]
    async fn a_dead_node_is_explained() {
        let address = boomerang_client::fake::dead_address().to_string();
        let (printed, result) = boomtool(&format!("task list --addr {address}")).await;
        let error = result.unwrap_err();
        let text = chain(&error);
        assert!(text.starts_with(&format!("cannot connect to {address}: caused by: ")), "{text}");
        assert!(error.hint().unwrap().contains("boomerang dev"));
        assert_eq!((error.exit_code(), printed.as_str()), (1, ""));
    }

    #[tokio::test]
    async fn a_wrong_address_is_wrong_usage() {
        let (_, result) = boomtool("task list --addr nowhere").await;
        let error = result.unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("addresses: 'nowhere' is not host:port"), "{error}");
    }

    #[test]
    fn a_closed_pipe_is_no_failure() {
        assert_eq!(ToolError::Output(io::ErrorKind::BrokenPipe.into()).exit_code(), 0);
        assert_eq!(ToolError::Output(io::ErrorKind::StorageFull.into()).exit_code(), 1);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = prepare("task list").1.read_input(Path::new("/nonexistent/payload")).unwrap_err();
        assert!(chain(&error).starts_with("cannot read /nonexistent/payload: caused by: No such file"));
    }
}
