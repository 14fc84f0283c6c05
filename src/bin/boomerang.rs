//! The server. Parses, builds, runs until it is told to stop; the code is in the library.
//!
//! Exit codes: 0 stopped in order, 1 failed, 2 wrong usage.

use std::ffi::OsString;
use std::io::{BufWriter, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use boomerang::certs;
use boomerang::flags::WrongFlag;
use boomerang::inspect::{Asked, inspect};
use boomerang::node::{Node, NodeError};
use boomerang::settings::{Given, Settings, flags_in_file};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

#[global_allocator]
static MEMORY: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// A durable, replicated scheduler: throw a task into the future, it comes back on time.
#[derive(Parser)]
#[command(
    name = "boomerang",
    version,
    after_help = "\
Try it:
  boomerang dev
  boomtool listen --tcp 127.0.0.1:9000
  boomtool task register 'hello' --in 3s --callback tcp://127.0.0.1:9000"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// What to log, for example 'info' or 'boomerang::firing=debug'
    #[arg(long, global = true, value_name = "FILTER", env = "BOOMERANG_LOG", default_value = "info,openraft=error")]
    log: String,
    /// TOML file with settings; flags and BOOMERANG_* variables win over it
    #[arg(long, global = true, value_name = "FILE", env = "BOOMERANG_CONFIG")]
    config: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Run one node on loopback for trying things out: every client id is let in as administrator
    Dev(Given),
    /// Run a node
    #[command(after_help = "\
Prints one line of JSON with its addresses when it is ready; logs go to stderr. SIGTERM stops it in order.

Example:
  boomerang serve --data-dir /var/lib/boomerang --tcp-addr 0.0.0.0:9973")]
    Serve(Given),
    /// Make certificates by which the nodes of a cluster know each other, and an authority that signs them
    #[command(after_help = "\
Makes ca.pem, ca.key, and NAME.pem and NAME.key for each node, in PEM. Each node is given its own two
files and ca.pem; ca.key is for adding nodes later, by the same command, and belongs nowhere else.
Nothing is written over. Whoever has a certificate of the authority is a node of the cluster.

Example:
  boomerang certs --out certs --node node-1,10.0.0.1,node-1.internal --node node-2,10.0.0.2
  boomerang serve --peer-cert certs/node-1.pem --peer-key certs/node-1.key --peer-ca certs/ca.pem ...")]
    Certs(certs::Asked),
    /// Look into the data folder of a node that does not run; nothing in it is changed
    #[command(after_help = "\
Shows whose folder it is, what it holds of each group, and what is damaged. APPLIED is the last
log entry whose effect is in the files. TO APPLY counts the entries after it, which the node has
and applies when it starts: after a crash that is no error. Where two replicas have applied the
same entry, --group N shows the same digest. Passwords, keys and callback secrets are not shown.

Exit codes: 0 all of it can be read; 1 something is damaged or missing, or there is nothing to
show; 2 wrong usage.

Examples:
The folder on a page:
  boomerang inspect /var/lib/boomerang
Log, members, vote, rows and digest of one group:
  boomerang inspect /var/lib/boomerang --group 3
Where a task stands, and what was asked for it:
  boomerang inspect /var/lib/boomerang --task 01a1fcdf-d301-7000-838b-2ee828ed8c5d
The rows of a group that cannot be read:
  boomerang inspect /var/lib/boomerang --rows --group 3 | grep ' ? '
What to compare with the folder of another node:
  boomerang inspect /var/lib/boomerang --json | jq '.groups[] | {group, applied, digest}'")]
    Inspect(Asked),
}

/// Where `dev` keeps its data unless told otherwise.
const DEV_DATA_DIR: &str = ".boomerang-dev";

const THREADS_MIN: usize = 4;

fn main() -> ExitCode {
    let cli = match with_file() {
        Ok(cli) => cli,
        Err(error) => return usage(&error.to_string()),
    };
    let filter = match EnvFilter::try_new(&cli.log) {
        Ok(filter) => filter,
        Err(error) => return usage(&format!("--log: {error}")),
    };
    // Colours are for people; a file or a collector gets plain text.
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
    let (given, open) = match cli.command {
        Command::Dev(mut given) => {
            given.data_dir.get_or_insert_with(|| DEV_DATA_DIR.into());
            (given, true)
        }
        Command::Serve(given) => (given, false),
        Command::Inspect(asked) => return look_into(&asked),
        Command::Certs(asked) => return make_certs(&asked),
    };
    let settings = match Settings::build(given, open) {
        Ok(settings) => settings,
        Err(error) => return usage(&error.to_string()),
    };
    raise_file_limit();
    // RocksDB makes a thread wait when it has too much to flush: a few more threads than cores keep the rest going.
    let threads = std::thread::available_parallelism().map_or(THREADS_MIN, |cores| cores.get().max(THREADS_MIN));
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime.worker_threads(threads).on_thread_start(boomerang::threads::give_way).enable_all();
    let runtime = match runtime.build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&format!("cannot start the runtime: {error}")),
    };
    match runtime.block_on(run(settings)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error.to_string()),
    }
}

/// The command line, with what the file named by `--config` adds to it.
fn with_file() -> Result<Cli, WrongFlag> {
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    match (&cli.config, matches.subcommand()) {
        (Some(path), Some((_, given))) if matches!(cli.command, Command::Dev(_) | Command::Serve(_)) => {
            let mut line: Vec<OsString> = std::env::args_os().collect();
            let end = line.iter().position(|word| word == "--").unwrap_or(line.len());
            line.splice(end..end, flags_in_file(path, given)?);
            Ok(Cli::parse_from(line))
        }
        _ => Ok(cli),
    }
}

fn usage(error: &str) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::from(2)
}

fn failed(error: &str) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::FAILURE
}

/// Connections and the store's files need more than the 1,024 that most systems begin with; running out of them would be a
/// storage error. Whatever may be had without asking anybody is taken.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

fn look_into(asked: &Asked) -> ExitCode {
    // All files of the store are open at once.
    raise_file_limit();
    let shown = inspect(asked, &mut BufWriter::new(std::io::stdout()));
    match shown {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error.to_string()),
    }
}

fn make_certs(asked: &certs::Asked) -> ExitCode {
    match certs::make(asked) {
        Ok(made) => {
            let mut out = std::io::stdout();
            for (cert, key) in made {
                let _ = writeln!(out, "made {} and {}", cert.display(), key.display());
            }
            ExitCode::SUCCESS
        }
        Err(error) => failed(&error.to_string()),
    }
}

async fn run(settings: Settings) -> Result<(), NodeError> {
    // From now on it ends nothing: it asks for certificates to be read again, and a node may have none, or be starting.
    let _hangup = signal(SignalKind::hangup()).expect("signals can be handled");
    let node = Node::start(settings).await?;
    // Before the line: whoever has read it may ask us to stop.
    let mut terminate = signal(SignalKind::terminate()).expect("signals can be handled");
    let mut interrupt = signal(SignalKind::interrupt()).expect("signals can be handled");
    // The line says that the node is ready; nobody reading it is no reason to stop.
    let line = serde_json::to_string(&node.start_line).expect("plain fields");
    let _ = writeln!(std::io::stdout(), "{line}");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        // Nothing is flushed or answered any more: what was acknowledged is in the log.
        error = node.failed() => return Err(error),
    }
    tracing::info!("stopping");
    node.stop().await
}
