//! A `boomerang serve` of its own process.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

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

/// A node; ends with this value, by its own process id.
pub struct NodeProcess {
    pub started: Started,
    /// From the start of the process to its start line.
    pub took: Duration,
    child: Child,
    flags: Vec<String>,
    data_dir: PathBuf,
    temp: TempDir,
}

impl NodeProcess {
    /// With [`ADMIN_PASSWORD`] and `flags`.
    pub fn start(flags: &[&str]) -> Self {
        let flags: Vec<&str> = ["--admin-password", ADMIN_PASSWORD].iter().chain(flags).copied().collect();
        Self::start_with(&flags)
    }

    /// With `flags` only.
    pub fn start_with(flags: &[&str]) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let data_dir = temp.path().join("data");
        Self::start_there(temp, data_dir, flags)
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
        Self::start_there(tempfile::tempdir().unwrap(), data_dir.to_owned(), &flags)
    }

    fn start_there(temp: TempDir, data_dir: PathBuf, flags: &[&str]) -> Self {
        let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let (child, started, took) = spawn(&temp, &data_dir, &flags);
        Self { started, took, child, flags, data_dir, temp }
    }

    pub fn data_dir(&self) -> PathBuf {
        self.data_dir.clone()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// As if the power of the process had been cut.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks it to stop; returns its exit code.
    pub fn terminate(&mut self) -> Option<i32> {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        eventually("the node stops", || self.child.try_wait().unwrap()).code()
    }

    /// On the same folder, after [`NodeProcess::kill`] or [`NodeProcess::terminate`]; the ports are new.
    pub fn restart(&mut self) {
        assert!(self.child.try_wait().unwrap().is_some(), "it still runs");
        (self.child, self.started, self.took) = spawn(&self.temp, &self.data_dir, &self.flags);
    }

    pub fn restart_with(&mut self, flags: &[&str]) {
        self.flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        self.restart();
    }

    /// `None` while it runs.
    pub fn exit_code(&mut self) -> Option<Option<i32>> {
        self.child.try_wait().unwrap().map(|status| status.code())
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
        std::fs::read_to_string(log_path(&self.temp)).unwrap_or_default()
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("{}", tail(&self.temp));
        }
    }
}

/// `boomerang` with arguments that make it end by itself.
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

pub fn run_to_its_end(args: &[&str]) -> Ended {
    let mut child = command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            panic!("it does not end: {args:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let (mut stdout, mut stderr) = (String::new(), String::new());
    out.read_to_string(&mut stdout).unwrap();
    err.read_to_string(&mut stderr).unwrap();
    Ended { code: status.code(), stdout, stderr }
}

/// `boomerang serve` on a folder, with free ports, that is expected to refuse.
pub fn serve_to_its_end(folder: &Path, flags: &[&str]) -> Ended {
    let folder = folder.to_str().unwrap();
    let args: Vec<&str> = ["serve", "--data-dir", folder].iter().chain(&ANY_PORTS).chain(flags).copied().collect();
    run_to_its_end(&args)
}

const ANY_PORTS: [&str; 6] = ["--tcp-addr", "127.0.0.1:0", "--http-addr", "127.0.0.1:0", "--peer-addr", "127.0.0.1:0"];

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

/// An address nobody listens on now.
pub fn free_address() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

fn log_path(temp: &TempDir) -> PathBuf {
    temp.path().join("stderr")
}

fn tail(temp: &TempDir) -> String {
    let log = std::fs::read_to_string(log_path(temp)).unwrap_or_default();
    let lines: Vec<&str> = log.lines().collect();
    let from = lines.len().saturating_sub(LOG_TAIL_LINES);
    format!("the node logged, at last:\n{}", lines[from..].join("\n"))
}

fn spawn(temp: &TempDir, data_dir: &Path, flags: &[String]) -> (Child, Started, Duration) {
    let mut args = vec!["serve", "--data-dir", data_dir.to_str().unwrap()];
    // No flag may be given twice: a test that names one wins. No reserve of disk space for a node of a second's life.
    for pair in ANY_PORTS.chunks(2).chain([["--disk-reserve", "1"].as_slice()]) {
        if !flags.iter().any(|flag| flag == pair[0]) {
            args.extend(pair);
        }
    }
    args.extend(flags.iter().map(String::as_str));
    let log: File = OpenOptions::new().create(true).append(true).open(log_path(temp)).unwrap();
    let begun = Instant::now();
    let mut child = command(&args).stdout(Stdio::piped()).stderr(log).spawn().unwrap();
    let (out, line) = mpsc::channel();
    let stdout = child.stdout.take().unwrap();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let _ = out.send(line);
        }
    });
    match line.recv_timeout(PATIENCE) {
        Ok(line) => {
            let started = serde_json::from_str(&line).unwrap_or_else(|error| panic!("start line {line}: {error}"));
            (child, started, begun.elapsed())
        }
        Err(_) => {
            let _ = child.kill();
            let status = child.wait();
            panic!("no start line from {args:?} ({status:?})\n{}", tail(temp));
        }
    }
}
