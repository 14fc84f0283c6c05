//! A `boomerang serve` of its own process.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use boomerang::sabotage::{self, Fault};
pub use boomerang_testkit::Ended;
use boomerang_testkit::{
    Certs, OwnAddress, Process, Signal, Started, all_started, blocking, log_end, run as run_to_end, without_settings,
};
use tempfile::TempDir;

use super::legacy::Client;
use super::{PATIENCE, eventually, http_get};

pub const ADMIN_PASSWORD: &str = "boomerang-test";
/// What `boomtool` may take, a bench of it, too.
pub const TOOL_ENDS_WITHIN: Duration = Duration::from_secs(200);
/// Of what the node has logged, shown when a test fails.
const LOG_TAIL_LINES: usize = 40;

/// A node; ends with this value.
pub struct NodeProcess {
    pub started: Started,
    /// From its start until it, and all that were started with it, had printed their start lines.
    pub took: Duration,
    process: Process,
    home: Home,
}

#[allow(clippy::needless_pass_by_ref_mut, reason = "whoever ends it has it alone")]
impl NodeProcess {
    /// With [`ADMIN_PASSWORD`] and `flags`.
    pub fn start(flags: &[&str]) -> Self {
        let flags: Vec<&str> = ["--admin-password", ADMIN_PASSWORD].iter().chain(flags).copied().collect();
        Self::start_with(&flags)
    }

    /// As a developer starts one.
    pub fn start_dev() -> Self {
        Self::start_one(Home { command: "dev", ..Home::new(Vec::new()) })
    }

    /// The same, all at once, for nodes that are ready only together.
    pub fn start_all(flags: &[Vec<String>]) -> Vec<Self> {
        let own = ["--admin-password", ADMIN_PASSWORD].map(str::to_owned);
        Self::start_there(flags.iter().map(|flags| Home::new([&own[..], flags].concat())).collect())
    }

    /// The same, each without what this fault takes away.
    pub fn start_all_broken(flags: &[Vec<String>], fault: Fault) -> Vec<Self> {
        let own = ["--admin-password", ADMIN_PASSWORD].map(str::to_owned);
        let home = |flags: &Vec<String>| Home { fault: Some(fault), ..Home::new([&own[..], flags].concat()) };
        Self::start_there(flags.iter().map(home).collect())
    }

    /// One that is not expected to become ready; its start line is made up.
    pub fn start_unready(flags: &[&str]) -> Self {
        let home = Home::new(owned(&[&["--admin-password", ADMIN_PASSWORD], flags].concat()));
        let process = spawn(&home);
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let started = Started { node_id: 0, tcp: nowhere, http: nowhere, peer: None };
        Self { started, took: Duration::ZERO, process, home }
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
        nodes.map(|(home, (process, started, took))| Self { started, took, process, home }).collect()
    }

    pub fn data_dir(&self) -> PathBuf {
        self.home.data_dir.clone()
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// As if the power of the process had been cut.
    pub fn kill(&mut self) {
        blocking(self.process.kill());
    }

    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Asks it to stop; returns its exit code.
    pub fn terminate(&mut self) -> Option<i32> {
        let ended = blocking(self.process.stop(PATIENCE));
        ended.unwrap_or_else(|| panic!("a node that got SIGTERM does not end within {PATIENCE:?}")).code()
    }

    /// On the same folder, after [`NodeProcess::kill`] or [`NodeProcess::terminate`]; the ports are new.
    pub fn restart(&mut self) {
        assert!(self.exit_code().is_some(), "a node is restarted that still runs, with pid {}", self.pid());
        (self.process, self.started, self.took) = run(&[&self.home]).remove(0);
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

    /// On the same folder and with the same flags, but for what `change` does to them.
    pub fn restart_changed(&mut self, change: impl FnOnce(&mut Vec<String>)) {
        change(&mut self.home.flags);
        self.restart();
    }

    /// `None` while it runs.
    pub fn exit_code(&self) -> Option<Option<i32>> {
        self.process.ended().map(|status| status.code())
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
        std::fs::read_to_string(self.home.log_path()).unwrap_or_default()
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let (flags, log) = (&self.home.flags, log_end(&self.home.log_path(), LOG_TAIL_LINES));
            eprintln!("the node with {flags:?} logged, at last:\n{log}");
        }
    }
}

/// Where a node lives, with which flags.
struct Home {
    flags: Vec<String>,
    data_dir: PathBuf,
    temp: TempDir,
    fault: Option<Fault>,
    /// Of `boomerang`.
    command: &'static str,
}

impl Home {
    fn new(flags: Vec<String>) -> Self {
        let temp = tempfile::tempdir().unwrap();
        Self { flags, data_dir: temp.path().join("data"), temp, fault: None, command: "serve" }
    }

    fn log_path(&self) -> PathBuf {
        self.temp.path().join("stderr")
    }
}

/// Starts a node in each home and waits for their start lines, with the time that took. If one ends instead, it is the one
/// that is told of.
fn run(homes: &[&Home]) -> Vec<(Process, Started, Duration)> {
    let begun = Instant::now();
    let processes: Vec<Process> = homes.iter().map(|home| spawn(home)).collect();
    let started = blocking(all_started(&processes, PATIENCE)).unwrap_or_else(|error| panic!("{error}"));
    let took = begun.elapsed();
    processes.into_iter().zip(started).map(|(process, started)| (process, started, took)).collect()
}

/// Runs a command that is to end by itself.
pub fn to_its_end(command: &mut Command, within: Duration) -> Ended {
    let ended = blocking(run_to_end(command, within)).unwrap();
    assert!(ended.code.is_some(), "{command:?} does not end within {within:?}: {ended:?}");
    ended
}

/// `boomerang` with arguments that make it end by itself.
pub fn run_to_its_end(args: &[&str]) -> Ended {
    to_its_end(&mut command(args), PATIENCE)
}

/// `boomerang serve` on a folder, with free ports, that is expected to refuse.
pub fn serve_to_its_end(folder: &Path, flags: &[&str]) -> Ended {
    let folder = folder.to_str().unwrap();
    let known = known_by(&owned(flags));
    let known = known.iter().map(String::as_str);
    let args: Vec<&str> =
        ["serve", "--data-dir", folder].iter().chain(&ANY_PORTS).chain(flags).copied().chain(known).collect();
    run_to_its_end(&args)
}

/// Where receivers of tests are.
pub const LOOPBACK: &str = "127.0.0.0/8,::1";

const ANY_PORTS: [&str; 6] = ["--tcp-addr", "127.0.0.1:0", "--http-addr", "127.0.0.1:0", "--peer-addr", "127.0.0.1:0"];

/// `boomtool`, which cargo builds beside the server.
pub fn boomtool() -> Command {
    let path = boomerang().with_file_name("boomtool");
    assert!(path.exists(), "{} is missing; `cargo build` makes it", path.display());
    let mut command = Command::new(path);
    // None of whoever runs the tests.
    command.env("BOOMERANG_PROFILES", "/nonexistent").env_remove("BOOMERANG_PROFILE");
    command
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(boomerang());
    command.args(args);
    without_settings(&mut command);
    command
}

/// An address nobody listens on, and nobody else is given; whoever it is for may listen there.
pub fn free_address() -> String {
    OwnAddress::take().unwrap().keep().to_string()
}

/// The server.
pub fn boomerang() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_boomerang"))
}

/// By what the nodes of all clusters of a test know each other, unless the test says it.
pub fn certs() -> Certs {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| tempfile::tempdir().unwrap());
    static MADE: OnceLock<Certs> = OnceLock::new();
    MADE.get_or_init(|| Certs::make(boomerang(), folder.path(), [("node".to_owned(), "127.0.0.1,localhost")]).unwrap())
        .clone()
}

/// What these flags of a node lack.
fn known_by(flags: &[String]) -> Vec<String> {
    let has = |names: &[&str]| flags.iter().any(|flag| names.contains(&flag.as_str()));
    match has(&["--peers", "--etcd"]) && !has(&["--peer-cert", "--cluster-secret-file", "--cluster-secret"]) {
        true => certs().flags("node").to_vec(),
        false => Vec::new(),
    }
}

fn owned(flags: &[&str]) -> Vec<String> {
    flags.iter().map(|flag| (*flag).to_owned()).collect()
}

fn spawn(home: &Home) -> Process {
    let mut args = vec![home.command, "--data-dir", home.data_dir.to_str().unwrap()];
    // No flag may be given twice: a test that names one wins. No reserve of disk space for a node of a second's life.
    let receivers = ["--callback-allow", LOOPBACK];
    let allowed = (home.command == "serve").then_some(receivers.as_slice());
    for pair in ANY_PORTS.chunks(2).chain([["--disk-reserve", "1"].as_slice()]).chain(allowed) {
        if !home.flags.iter().any(|flag| flag == pair[0]) {
            args.extend(pair);
        }
    }
    args.extend(home.flags.iter().map(String::as_str));
    let known = known_by(&home.flags);
    args.extend(known.iter().map(String::as_str));
    let mut command = command(&args);
    if let Some(fault) = home.fault {
        command.env(sabotage::VARIABLE, fault.name());
    }
    Process::start(format!("the node with {:?}", home.flags), &mut command, &home.log_path()).unwrap()
}
