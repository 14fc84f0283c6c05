//! A cluster on this machine: etcd and nodes, everything they write in one folder. `make cluster` runs it.
//!
//! ```text
//!   cluster up      start what does not run yet, and wait until it is ready
//!   cluster down    stop everything; the data stays
//!   cluster status  what runs
//! ```
//!
//! Variables: `BIN`, the folder of the binaries; `FOLDER`, where data, logs, start lines and process numbers are; `NODES`, how
//! many nodes; `ETCD_PORT`, and the one after it; `BOOMERANG_ADMIN_PASSWORD`.

use std::error::Error;
use std::ffi::OsStr;
use std::fmt::Display;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::str::FromStr;
use std::time::Duration;

use boomerang_testkit::{Certs, Etcd, Handle, Process, Signal, all_started};
use tokio::signal::unix::{SignalKind, signal};

const READY_WITHIN: Duration = Duration::from_secs(60);
const STOPS_WITHIN: Duration = Duration::from_secs(30);
/// Of one that was killed.
const DIES_WITHIN: Duration = Duration::from_secs(5);
const ETCD: &str = "etcd";

type Done = Result<(), Box<dyn Error>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let asked = std::env::args().nth(1).unwrap_or_default();
    let done = match asked.as_str() {
        "up" => tokio::select! {
            done = up() => done,
            () = told_to_stop() => Err("interrupted; what was started is ended again".into()),
        },
        "down" => down(),
        "status" => status(),
        _ => {
            eprintln!("usage: cluster up|down|status");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// By Ctrl-C, by whoever started this, or because its terminal is closed.
async fn told_to_stop() {
    let mut signals = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()]
        .map(|kind| signal(kind).expect("signals can be heard"));
    let [interrupt, terminate, hangup] = &mut signals;
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
}

/// Returns when all are ready. If one ends instead, what was started beside it is ended, too.
async fn up() -> Done {
    let (folder, nodes, etcd_port) = (Folder::named(), variable("NODES", 3_u16)?, variable("ETCD_PORT", 23_790_u16)?);
    let (bin, password) =
        (variable("BIN", String::new())?, variable("BOOMERANG_ADMIN_PASSWORD", "boomerang".to_owned())?);
    std::fs::create_dir_all(folder.0.join("logs"))?;
    let etcd = Etcd {
        client: format!("127.0.0.1:{etcd_port}"),
        peer: format!("127.0.0.1:{}", etcd_port + 1),
        data: folder.0.join(ETCD),
        log: folder.log(ETCD),
        tls: None,
    };
    let mut started = Vec::new();
    if folder.running(ETCD).is_some() {
        say(format!("{ETCD} runs already"));
    } else {
        let process = etcd.start(Command::new(ETCD).process_group(0));
        let process = process.map_err(|error| format!("{error}; 'make setup' installs what is missing"))?;
        folder.note(ETCD, &process)?;
        etcd.ready(&process, READY_WITHIN).await?;
        started.push(process);
    }
    let mut beginning = Vec::new();
    let boomerang = Path::new(&bin).join("boomerang");
    let certs =
        Certs::make(&boomerang, &folder.0.join("certs"), (1..=nodes).map(|number| (node(number), "127.0.0.1")))?;
    for number in 1..=nodes {
        let name = node(number);
        if folder.running(&name).is_some() {
            if !folder.line(&name).exists() {
                return Err(format!("{name} runs and is not ready: stop everything, and begin again").into());
            }
            say(format!("{name} runs already"));
            continue;
        }
        let [tcp, http, peer] = [0, 1, 2].map(|port| address(number, port));
        let mut command = Command::new(&boomerang);
        command.arg("serve").args(["--node-id", &number.to_string(), "--data-dir"]).arg(folder.0.join(&name));
        command.args(["--tcp-addr", &tcp, "--http-addr", &http, "--peer-addr", &peer, "--etcd", &etcd.url()]);
        command.args(["--bootstrap-expect", &nodes.to_string()]).args(certs.flags(&name));
        // Receivers are on this machine, too.
        command.args(["--callback-allow", "127.0.0.0/8"]);
        // Not an argument: those can be read by whoever is on this machine.
        command.env("BOOMERANG_ADMIN_PASSWORD", &password).env_remove("BOOMERANG_PEERS");
        let process = Process::start(&name, command.process_group(0), &folder.log(&name))?;
        folder.note(&name, &process)?;
        beginning.push((name, process));
    }
    // All at once: they wait for each other.
    all_started(beginning.iter().map(|(_, process)| process), READY_WITHIN).await?;
    for (name, process) in beginning {
        std::fs::write(folder.line(&name), process.line(READY_WITHIN).await?)?;
        started.push(process);
    }
    // Before anything is said: nobody reading it is no reason to end them.
    started.into_iter().for_each(Process::leave);
    for number in 1..=nodes {
        let line = std::fs::read_to_string(folder.line(&node(number)))?;
        say(format!("node {number} is ready: {}", line.trim_end()));
    }
    let (folder, addresses) = (folder.0.display(), (1..=nodes).map(|number| address(number, 0)).collect::<Vec<_>>());
    say(format!(
        "
Logs are in {folder}/logs. Try it (the password of 'admin' is '{password}'):
  export BOOMERANG_ADDR={} BOOMERANG_CLIENT=admin BOOMERANG_PASSWORD={password}
  {bin}/boomtool cluster status
  {bin}/boomtool listen --tcp 127.0.0.1:9000 --count 1 &
  {bin}/boomtool task register 'hello from a cluster' --in 3s --callback tcp://127.0.0.1:9000
  kill -9 $(cat {folder}/node-1.pid)     # and register again: two of three are enough
  make cluster                           # starts what does not run
  make cluster-down",
        addresses.join(",")
    ));
    Ok(())
}

/// Nodes first, side by side, then etcd.
fn down() -> Done {
    let folder = Folder::named();
    let nodes = folder.names().into_iter().filter(|name| name != ETCD).collect();
    for names in [nodes, vec![ETCD.to_owned()]] {
        let running: Vec<(&String, Handle)> =
            names.iter().filter_map(|name| Some((name, folder.running(name)?))).collect();
        running.iter().for_each(|(_, process)| process.signal(Signal::TERM));
        for (name, process) in running {
            if !process.ends_within(STOPS_WITHIN) {
                return Err(format!("{name} does not stop").into());
            }
        }
        names.iter().for_each(|name| folder.forget(name));
    }
    say(format!("stopped; the data is in {}", folder.0.display()));
    Ok(())
}

fn status() -> Done {
    let folder = Folder::named();
    let names = folder.names();
    if names.is_empty() {
        say("nothing runs".to_owned());
    }
    for name in names {
        match (folder.running(&name), folder.pid(&name)) {
            (Some(_), Some(pid)) => say(format!("{name} runs, process {pid}")),
            _ => say(format!("{name} does not run")),
        }
    }
    Ok(())
}

/// Where all of it is.
struct Folder(PathBuf);

impl Folder {
    fn named() -> Self {
        Self(std::env::var_os("FOLDER").unwrap_or_else(|| ".boomerang-cluster".into()).into())
    }

    fn log(&self, name: &str) -> PathBuf {
        self.0.join("logs").join(format!("{name}.log"))
    }

    /// The file with the start line of a node that is ready.
    fn line(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.out"))
    }

    fn pid_file(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.pid"))
    }

    fn pid(&self, name: &str) -> Option<u32> {
        std::fs::read_to_string(self.pid_file(name)).ok()?.trim().parse().ok()
    }

    /// The process of a pid file, unless its number is another's by now.
    fn running(&self, name: &str) -> Option<Handle> {
        let pid = self.pid(name)?;
        // Before the look at whose it is: from then on it stays the same process.
        let process = Handle::of(pid).ok()?;
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let command = std::fs::read(proc.join("cmdline")).ok()?;
        if command.is_empty() {
            // It was killed and is about to be gone: until then it holds its folder and its ports.
            process.ends_within(DIES_WITHIN);
            return None;
        }
        // However the folder was named when it was started.
        let (data, there) = (self.0.join(name).canonicalize().ok()?, proc.join("cwd").canonicalize().ok()?);
        let mut arguments = command.split(|byte| *byte == 0).map(OsStr::from_bytes);
        let ours = arguments.any(|argument| there.join(argument).canonicalize().is_ok_and(|path| path == data));
        ours.then_some(process)
    }

    /// A process that is about to be ready.
    fn note(&self, name: &str, process: &Process) -> Done {
        self.forget(name);
        Ok(std::fs::write(self.pid_file(name), format!("{}\n", process.pid()))?)
    }

    fn forget(&self, name: &str) {
        let _ = std::fs::remove_file(self.pid_file(name));
        let _ = std::fs::remove_file(self.line(name));
    }

    /// Of everything that was started, in order.
    fn names(&self) -> Vec<String> {
        let files = std::fs::read_dir(&self.0).into_iter().flatten().flatten();
        let name = |file: std::fs::DirEntry| Some(file.file_name().to_str()?.strip_suffix(".pid")?.to_owned());
        let mut names: Vec<String> = files.filter_map(name).collect();
        names.sort();
        names
    }
}

fn say(line: String) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn node(number: u16) -> String {
    format!("node-{number}")
}

/// `port`: 0 for clients, 1 for HTTP, 2 for other nodes.
fn address(number: u16, port: u16) -> String {
    format!("127.0.0.1:{}", 9_963 + number * 10 + port)
}

fn variable<T: FromStr<Err: Display>>(name: &str, default: T) -> Result<T, String> {
    match std::env::var(name) {
        Ok(text) => text.parse().map_err(|error| format!("{name} is '{text}': {error}")),
        Err(_) => Ok(default),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;

    use super::*;

    #[test]
    fn a_process_is_known_by_its_folder_however_that_is_named() {
        let temp = tempfile::tempdir().unwrap();
        let folder = temp.path().join("cluster");
        std::fs::create_dir_all(folder.join("node-1")).unwrap();
        let folder = Folder(folder);
        assert!(folder.running("node-1").is_none(), "nothing was started");
        let mut command = Command::new("sh");
        // It waits for an end of its input that does not come.
        command.args(["-c", "echo ready; read line", "sh", "cluster/node-1"]).current_dir(temp.path());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // A process that has just been started has no arguments yet, for some microseconds, as one that is dead.
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        std::fs::write(folder.pid_file("node-1"), format!("{}\n", child.id())).unwrap();
        assert_eq!(folder.names(), ["node-1"]);
        let running = folder.running("node-1").expect("it runs");
        std::fs::create_dir(folder.0.join("node-2")).unwrap();
        std::fs::write(folder.pid_file("node-2"), format!("{}\n", child.id())).unwrap();
        assert!(folder.running("node-2").is_none(), "the number is another's");
        running.signal(Signal::TERM);
        assert!(running.ends_within(STOPS_WITHIN), "it ends");
        child.wait().unwrap();
        assert!(folder.running("node-1").is_none(), "it has ended");
        folder.forget("node-1");
        assert_eq!(folder.names(), ["node-2"]);
    }
}
