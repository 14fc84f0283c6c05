//! A `boomerang serve` of its own process.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use boomerang_testkit::OwnAddress;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::legacy::Client;
use super::{PATIENCE, eventually, http_get};

pub const ADMIN_PASSWORD: &str = "boomerang-test";
/// Of what the node has logged, shown when a test fails.
const LOG_TAIL_LINES: usize = 40;

/// What the start line says.
#[derive(Debug, Clone, serde::Deserialize)]
pub struct Started {
    pub node_id: u64,
    pub tcp: SocketAddr,
    pub http: SocketAddr,
    pub peer: SocketAddr,
}

/// A node; ends with this value.
pub struct NodeProcess {
    pub started: Started,
    /// From the start of the process to its start line.
    pub took: Duration,
    process: Process,
    home: Home,
}

impl NodeProcess {
    /// With [`ADMIN_PASSWORD`] and `flags`.
    pub fn start(flags: &[&str]) -> Self {
        let flags: Vec<&str> = ["--admin-password", ADMIN_PASSWORD].iter().chain(flags).copied().collect();
        Self::start_with(&flags)
    }

    /// The same, all at once, for nodes that are ready only together.
    pub fn start_all(flags: &[Vec<String>]) -> Vec<Self> {
        let own = ["--admin-password", ADMIN_PASSWORD].map(str::to_owned);
        Self::start_there(flags.iter().map(|flags| Home::new([&own[..], flags].concat())).collect())
    }

    /// With `flags` only.
    pub fn start_with(flags: &[&str]) -> Self {
        Self::start_one(Home::new(owned(flags)))
    }

    /// On a port for clients that stays the same over restarts.
    pub fn start_on_a_fixed_port(flags: &[&str]) -> Self {
        let address = free_address();
        let flags: Vec<&str> = ["--tcp-addr", &address].iter().chain(flags).copied().collect();
        Self::start(&flags)
    }

    /// On a folder of the test's, and on a fixed port.
    pub fn start_in(data_dir: &Path, flags: &[&str]) -> Self {
        let address = free_address();
        let own = ["--tcp-addr", &address, "--admin-password", ADMIN_PASSWORD];
        let flags: Vec<&str> = own.iter().chain(flags).copied().collect();
        Self::start_one(Home { data_dir: data_dir.to_owned(), ..Home::new(owned(&flags)) })
    }

    fn start_one(home: Home) -> Self {
        Self::start_there(vec![home]).remove(0)
    }

    fn start_there(homes: Vec<Home>) -> Vec<Self> {
        let running = run(&homes.iter().collect::<Vec<_>>());
        let nodes = homes.into_iter().zip(running);
        nodes.map(|(home, Running { started, took, process })| Self { started, took, process, home }).collect()
    }

    pub fn data_dir(&self) -> PathBuf {
        self.home.data_dir.clone()
    }

    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// As if the power of the process had been cut.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Asks it to stop; returns its exit code.
    pub fn terminate(&mut self) -> Option<i32> {
        kill_process(Pid::from_child(&self.process.child), Signal::TERM).unwrap();
        let ended = self.process.ended.recv_timeout(PATIENCE);
        assert_eq!(ended, Err(RecvTimeoutError::Disconnected), "a node that got SIGTERM ends within {PATIENCE:?}");
        self.process.child.wait().unwrap().code()
    }

    /// On the same folder, after [`NodeProcess::kill`] or [`NodeProcess::terminate`]; the ports are new.
    pub fn restart(&mut self) {
        assert!(self.exit_code().is_some(), "a node is restarted that still runs, with pid {}", self.pid());
        Running { started: self.started, took: self.took, process: self.process } = run(&[&self.home]).remove(0);
    }

    /// The same, as if it had been away for `away`: so far its clock has gone on.
    pub fn restart_after(&mut self, away: Duration) {
        let clock = self.home.temp.path().join("clock");
        std::fs::write(&clock, format!("{} 0", away.as_micros())).unwrap();
        self.home.flags.extend(["--test-clock".to_owned(), clock.to_str().unwrap().to_owned()]);
        self.restart();
    }

    pub fn restart_with(&mut self, flags: &[&str]) {
        self.home.flags = owned(flags);
        self.restart();
    }

    /// `None` while it runs.
    pub fn exit_code(&mut self) -> Option<Option<i32>> {
        self.process.child.try_wait().unwrap().map(|status| status.code())
    }

    pub fn admin(&self) -> Client {
        Client::login(self.started.tcp, "admin", ADMIN_PASSWORD)
    }

    /// The value of a metric without labels.
    pub fn metric(&self, name: &str) -> f64 {
        let (status, body) = http_get(self.started.http, "/metrics");
        assert_eq!(status, 200, "{body}");
        let value = body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        value.unwrap_or_else(|| panic!("no metric {name} in:\n{body}"))
    }

    pub fn wait_for_metric(&self, name: &str, value: f64) {
        let mut last = f64::NAN;
        eventually(&format!("{name} is {value}"), || {
            let found = self.metric(name);
            if found.to_bits() != last.to_bits() {
                eprintln!("{name} is {found}");
            }
            last = found;
            (found == value).then_some(())
        });
    }

    /// Memory of the process in use, in bytes.
    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok());
        1024 * kib.map_or(0, |kib: u64| kib)
    }

    pub fn log(&self) -> String {
        self.home.log()
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("{}", self.home.log_tail());
        }
    }
}

/// Where a node lives, with which flags.
struct Home {
    flags: Vec<String>,
    data_dir: PathBuf,
    temp: TempDir,
}

impl Home {
    fn new(flags: Vec<String>) -> Self {
        let temp = tempfile::tempdir().unwrap();
        Self { flags, data_dir: temp.path().join("data"), temp }
    }

    fn log_path(&self) -> PathBuf {
        self.temp.path().join("stderr")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let from = lines.len().saturating_sub(LOG_TAIL_LINES);
        format!("the node with {:?} logged, at last:\n{}", self.flags, lines[from..].join("\n"))
    }
}

/// Ends with this value, by its own process id.
struct Process {
    child: Child,
    /// Closed when the process has ended.
    ended: mpsc::Receiver<Infallible>,
}

impl Process {
    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

struct Running {
    started: Started,
    took: Duration,
    process: Process,
}

/// Starts a node in each home and waits for their start lines. If one ends instead, it is the one that is told of.
fn run(homes: &[&Home]) -> Vec<Running> {
    let begun = Instant::now();
    let (told, lines) = mpsc::channel();
    let mut processes: Vec<Process> = (0..).zip(homes).map(|(at, home)| spawn(home, at, told.clone())).collect();
    let mut started = BTreeMap::new();
    while started.len() < homes.len() {
        match lines.recv_timeout(PATIENCE.saturating_sub(begun.elapsed())) {
            Ok((at, Some(line))) => {
                let line = serde_json::from_str(&line).unwrap_or_else(|error| panic!("start line {line}: {error}"));
                started.insert(at, (line, begun.elapsed()));
            }
            Ok((at, None)) => {
                let status = processes[at].child.wait().unwrap();
                panic!("no start line, but {status}; {}", homes[at].log_tail());
            }
            Err(_) => {
                let missing = (0..homes.len()).filter(|at| !started.contains_key(at));
                let logs: Vec<String> = missing.map(|at| homes[at].log_tail()).collect();
                panic!("no start line within {PATIENCE:?}; {}", logs.join("\n"));
            }
        }
    }
    let running = processes.into_iter().zip(started.into_values());
    running.map(|(process, (started, took))| Running { started, took, process }).collect()
}

/// `boomerang` with arguments that make it end by itself.
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    /// Waits for the end of `child`, and of what it says.
    pub fn of(mut child: Child, within: Duration) -> Self {
        let deadline = Instant::now() + within;
        let pipes = (all_of(child.stdout.take().unwrap()), all_of(child.stderr.take().unwrap()));
        let text = |pipe: mpsc::Receiver<String>| pipe.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        match (text(pipes.0), text(pipes.1)) {
            (Ok(stdout), Ok(stderr)) => Self { code: child.wait().unwrap().code(), stdout, stderr },
            said => {
                let _ = child.kill();
                let _ = child.wait();
                panic!("process {} does not end within {within:?}; stdout and stderr: {said:?}", child.id());
            }
        }
    }
}

/// What comes out of a pipe, when it has ended.
fn all_of(mut pipe: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (out, text) = mpsc::channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        pipe.read_to_string(&mut text).unwrap();
        let _ = out.send(text);
    });
    text
}

pub fn run_to_its_end(args: &[&str]) -> Ended {
    Ended::of(command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap(), PATIENCE)
}

/// `boomerang serve` on a folder, with free ports, that is expected to refuse.
pub fn serve_to_its_end(folder: &Path, flags: &[&str]) -> Ended {
    let folder = folder.to_str().unwrap();
    let args: Vec<&str> = ["serve", "--data-dir", folder].iter().chain(&ANY_PORTS).chain(flags).copied().collect();
    run_to_its_end(&args)
}

const ANY_PORTS: [&str; 6] = ["--tcp-addr", "127.0.0.1:0", "--http-addr", "127.0.0.1:0", "--peer-addr", "127.0.0.1:0"];

/// `boomtool`, which cargo builds beside the server.
pub fn boomtool() -> Command {
    let path = Path::new(env!("CARGO_BIN_EXE_boomerang")).with_file_name("boomtool");
    assert!(path.exists(), "{} is missing; `cargo build` makes it", path.display());
    Command::new(path)
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_boomerang"));
    command.args(args).stdin(Stdio::null());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("BOOMERANG_") {
            command.env_remove(name);
        }
    }
    command
}

/// An address nobody listens on, and nobody else is given; whoever it is for may listen there.
pub fn free_address() -> String {
    OwnAddress::take().unwrap().keep().to_string()
}

fn owned(flags: &[&str]) -> Vec<String> {
    flags.iter().map(|flag| (*flag).to_owned()).collect()
}

/// Tells its first line, or that there is none, as the number `at`.
fn spawn(home: &Home, at: usize, told: mpsc::Sender<(usize, Option<String>)>) -> Process {
    let mut args = vec!["serve", "--data-dir", home.data_dir.to_str().unwrap()];
    // No flag may be given twice: a test that names one wins. No reserve of disk space for a node of a second's life.
    for pair in ANY_PORTS.chunks(2).chain([["--disk-reserve", "1"].as_slice()]) {
        if !home.flags.iter().any(|flag| flag == pair[0]) {
            args.extend(pair);
        }
    }
    args.extend(home.flags.iter().map(String::as_str));
    let log: File = OpenOptions::new().create(true).append(true).open(home.log_path()).unwrap();
    let mut child = command(&args).stdout(Stdio::piped()).stderr(log).spawn().unwrap();
    let stdout = child.stdout.take().unwrap();
    let (end, ended) = mpsc::channel();
    std::thread::spawn(move || {
        let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
        let _ = told.send((at, lines.next()));
        lines.for_each(drop);
        drop(end);
    });
    Process { child, ended }
}
