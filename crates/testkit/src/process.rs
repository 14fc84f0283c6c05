//! A process that runs until it is told to end: started, waited for, signalled and ended.
//!
//! ```text
//!   start --> line, started --> signal --> stop, kill, drop
//!     |            |                             |
//!     '------------'--- it ends by itself -------'--> wait, ended
//! ```
//!
//! Whatever is waited for is an event: the first line of its output, and its end. Those who wait do so with `await`; see
//! [`crate::blocking`] for the others.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use futures::future::try_join_all;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::timeout;

/// Longer than a killed process takes on a busy machine.
const DEATH: Duration = Duration::from_secs(20);
/// Of a log, in the text of an error.
const LOG_LINES: usize = 20;
/// Of a log, read from its end: more than any lines that are asked for.
const LOG_BYTES: u64 = 64 * 1024;

/// What a node prints when it is ready.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Started {
    pub node_id: u64,
    pub tcp: SocketAddr,
    pub http: SocketAddr,
    /// `None` on a node that is alone.
    pub peer: Option<SocketAddr>,
}

/// Why a process is of no use to whoever waited for it.
#[derive(Debug, thiserror::Error)]
#[error("{what} {cause}; its log ends with:\n{log}")]
pub struct NotReady {
    /// The name that the process was started with.
    pub what: String,
    pub cause: Cause,
    /// The last lines of its log.
    pub log: String,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    #[error("ended before it was ready ({0})")]
    Ended(ExitStatus),
    #[error("was not ready within {0:?}")]
    Late(Duration),
    #[error("printed something else than its start line: {0}")]
    Strange(String),
}

/// A process. Dropping it kills it, and returns when it is gone.
pub struct Process {
    what: String,
    pid: u32,
    handle: Handle,
    log: PathBuf,
    /// The first line of its output; closed without one when the output ends before.
    line: watch::Receiver<Option<String>>,
    end: watch::Receiver<Option<ExitStatus>>,
    left: bool,
}

impl Process {
    /// Starts `command`, called `what` in errors. Its errors, and what it prints after the first line, go to the end of `log`.
    /// It has ended when it has, and all that share its output with it.
    pub fn start(what: impl Into<String>, command: &mut Command, log: &Path) -> io::Result<Self> {
        let cannot =
            |what: String| move |error: io::Error| io::Error::new(error.kind(), format!("cannot {what}: {error}"));
        let file = File::options().create(true).append(true).open(log);
        let file = file.map_err(cannot(format!("write to {}", log.display())))?;
        let mut rest = file.try_clone()?;
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(file).spawn();
        let mut child = spawned.map_err(cannot(format!("start {}", command.get_program().display())))?;
        let pid = child.id();
        // It is there, or waits for us to hear of its end: the number means no other yet.
        let handle = Handle::of(pid).inspect_err(|_| end(&mut child))?;
        let (say, line) = watch::channel(None);
        let (ended, end) = watch::channel(None);
        let stdout = child.stdout.take().expect("it is piped");
        std::thread::spawn(move || {
            let mut stdout = BufReader::new(stdout);
            let mut first = String::new();
            if stdout.read_line(&mut first).is_ok_and(|length| length > 0) {
                let _ = say.send(Some(first));
            }
            drop(say);
            let _ = io::copy(&mut stdout, &mut rest);
            // Also when the log takes no more: or it would stop at a full pipe.
            let _ = io::copy(&mut stdout, &mut io::sink());
            let _ = ended.send(Some(child.wait().expect("nobody else waits for this child")));
        });
        Ok(Self { what: what.into(), pid, handle, log: log.to_owned(), line, end, left: false })
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The first line that it prints.
    pub async fn line(&self, within: Duration) -> Result<String, NotReady> {
        let (mut line, mut end) = (self.line.clone(), self.end.clone());
        let said = async {
            if let Ok(line) = line.wait_for(Option::is_some).await {
                return Ok(line.clone().expect("it was waited for"));
            }
            // It will say nothing any more, and is about to end.
            let status = end.wait_for(Option::is_some).await.expect("its end is told before the channel is closed");
            Err(Cause::Ended(status.expect("it was waited for")))
        };
        let said = timeout(within, said).await.unwrap_or(Err(Cause::Late(within)));
        said.map_err(|cause| self.not_ready(cause))
    }

    /// What it says when it is ready, if it is a node.
    pub async fn started(&self, within: Duration) -> Result<Started, NotReady> {
        let line = self.line(within).await?;
        serde_json::from_str(&line).map_err(|_| self.not_ready(Cause::Strange(line.trim_end().to_owned())))
    }

    pub(crate) fn not_ready(&self, cause: Cause) -> NotReady {
        NotReady { what: self.what.clone(), cause, log: log_end(&self.log, LOG_LINES) }
    }

    /// To one that has ended, this is nothing.
    pub fn signal(&self, signal: Signal) {
        self.handle.signal(signal);
    }

    /// `None` while it runs.
    pub fn ended(&self) -> Option<ExitStatus> {
        *self.end.borrow()
    }

    /// `None` when it takes longer.
    pub async fn wait(&self, within: Duration) -> Option<ExitStatus> {
        let mut end = self.end.clone();
        timeout(within, end.wait_for(Option::is_some)).await.ok()?.ok().and_then(|status| *status)
    }

    /// Asks it to end, and kills it when that takes longer: `None`, then.
    pub async fn stop(&self, within: Duration) -> Option<ExitStatus> {
        self.signal(Signal::TERM);
        let status = self.wait(within).await;
        if status.is_none() {
            self.kill().await;
        }
        status
    }

    /// As if its power had been cut. Returns when it is gone.
    pub async fn kill(&self) {
        self.signal(Signal::KILL);
        // The kernel may still have to write for it; it is dead all the same.
        let _ = self.wait(DEATH).await;
    }

    /// Leaves it running, also when this process ends; what it prints from then on is lost.
    pub fn leave(mut self) {
        self.left = true;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.left {
            self.signal(Signal::KILL);
            self.handle.ends_within(DEATH);
        }
    }
}

/// The start lines of nodes that may be ready only together, in their order. An error as soon as one of them ends.
pub async fn all_started(
    nodes: impl IntoIterator<Item = &Process>,
    within: Duration,
) -> Result<Vec<Started>, NotReady> {
    try_join_all(nodes.into_iter().map(|node| node.started(within))).await
}

/// The very process, also when it has ended and its number is given to another.
pub struct Handle(OwnedFd);

impl Handle {
    /// An error when there is no process with this number.
    pub fn of(pid: u32) -> io::Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self(pidfd_open(pid, PidfdFlags::empty())?))
    }

    /// To one that has ended, this is nothing.
    pub fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.0, signal);
    }

    /// Blocks until it has ended, also if it is no child of ours; `false` when that takes longer.
    pub fn ends_within(&self, within: Duration) -> bool {
        let within = Timespec::try_from(within).expect("shorter than the age of the world");
        let ended = || poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&within));
        rustix::io::retry_on_intr(ended).is_ok_and(|ready| ready > 0)
    }
}

/// Keeps from a command what the environment of this process says to Boomerang: the variables `BOOMERANG_...`.
pub fn without_settings(command: &mut Command) {
    let names = std::env::vars_os().map(|(name, _)| name);
    for name in names.filter(|name| name.to_string_lossy().starts_with("BOOMERANG_")) {
        command.env_remove(name);
    }
}

/// Ends a child that nothing more can be done with.
pub(crate) fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// At most the last `lines` of a log, of its last 64 KiB; "nothing" when it is empty or not there.
pub fn log_end(log: &Path, lines: usize) -> String {
    let read = || {
        let mut file = File::open(log)?;
        let from = file.metadata()?.len().saturating_sub(LOG_BYTES);
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        io::Result::Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    let end = all[all.len().saturating_sub(lines)..].join("\n");
    if end.is_empty() { "nothing".to_owned() } else { end }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::blocking;

    const WITHIN: Duration = Duration::from_secs(60);
    const LINE: &str = r#"{"node_id":1,"tcp":"127.0.0.1:1","http":"127.0.0.1:2","peer":"127.0.0.1:3","more":true}"#;

    /// A shell with this script, and the folder of its log.
    fn sh(script: &str) -> (Process, TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        (Process::start("a shell", Command::new("sh").args(["-c", script]), &log).unwrap(), folder)
    }

    #[tokio::test]
    async fn a_process_says_a_line_and_is_killed() {
        // Both lines at once: when the first is heard, the second has been said.
        let (process, _folder) = sh(r"echo trouble >&2; printf 'ready\nmore\n'; exec sleep 1000");
        assert_eq!(process.line(WITHIN).await.unwrap(), "ready\n");
        assert_eq!(process.ended(), None);
        process.kill().await;
        assert_eq!(process.ended().unwrap().code(), None, "a signal ended it");
        assert_eq!(std::fs::read_to_string(process.log()).unwrap(), "trouble\nmore\n");
        process.signal(Signal::KILL);
    }

    #[tokio::test]
    async fn a_start_line_is_understood_and_nothing_else() {
        let (process, _folder) = sh(&format!("echo '{LINE}'; exec sleep 1000"));
        let address = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let expected = Started { node_id: 1, tcp: address(1), http: address(2), peer: Some(address(3)) };
        assert_eq!(process.started(WITHIN).await.unwrap(), expected);
        let (process, _folder) = sh(r#"echo '{"node_id":1,"tcp":"127.0.0.1:1","http":"127.0.0.1:2","peer":null}'"#);
        assert_eq!(process.started(WITHIN).await.unwrap(), Started { peer: None, ..expected });
        let (process, _folder) = sh("echo hello; exec sleep 1000");
        assert_eq!(process.started(WITHIN).await.unwrap_err().cause, Cause::Strange("hello".into()));
    }

    #[tokio::test]
    async fn an_end_is_told_at_once_and_with_the_end_of_the_log() {
        let (process, _folder) = sh("for line in $(seq 100); do echo no $line >&2; done; exit 3");
        let error = process.started(Duration::MAX).await.unwrap_err();
        assert!(matches!(error.cause, Cause::Ended(status) if status.code() == Some(3)), "{error}");
        let text = error.to_string();
        assert!(text.starts_with("a shell ended before it was ready (exit status: 3); its log ends with:"), "{text}");
        assert!(text.ends_with("\nno 99\nno 100") && !text.contains("no 80\n"), "{text}");
    }

    #[tokio::test]
    async fn one_that_says_nothing_is_late() {
        let (process, _folder) = sh("exec sleep 1000");
        let error = process.started(Duration::from_millis(50)).await.unwrap_err();
        assert_eq!((error.cause, error.log.as_str()), (Cause::Late(Duration::from_millis(50)), "nothing"));
    }

    #[tokio::test]
    async fn of_nodes_that_wait_for_each_other_the_one_that_ends_is_told_of() {
        let (first, _first) = sh("exec sleep 1000");
        let (second, _second) = sh("echo broken >&2; exit 1");
        let error = all_started([&first, &second], Duration::MAX).await.unwrap_err();
        assert_eq!(error.log, "broken");
        let (first, _first) = sh(&format!("echo '{LINE}'"));
        let (second, _second) = sh(&format!("echo '{}'", LINE.replace(":1,", ":2,")));
        let started = all_started([&first, &second], WITHIN).await.unwrap();
        assert_eq!(started.iter().map(|started| started.node_id).collect::<Vec<_>>(), [1, 2]);
    }

    #[tokio::test]
    async fn who_does_not_stop_in_time_is_killed() {
        let (process, _folder) = sh("trap 'exit 7' TERM; echo ready; while :; do :; done");
        process.line(WITHIN).await.unwrap();
        assert_eq!(process.stop(WITHIN).await.unwrap().code(), Some(7));
        let (process, _folder) = sh("trap '' TERM; echo ready; exec sleep 1000");
        process.line(WITHIN).await.unwrap();
        assert_eq!(process.stop(Duration::from_millis(50)).await, None);
        assert_eq!(process.ended().unwrap().code(), None, "a signal ended it");
    }

    #[test]
    fn one_that_is_dropped_is_gone_and_one_that_is_left_is_not() {
        let (process, _folder) = sh("exec sleep 1000");
        let handle = Handle::of(process.pid()).unwrap();
        assert!(!handle.ends_within(Duration::ZERO), "it runs");
        drop(process);
        assert!(handle.ends_within(Duration::ZERO), "it is gone");
        let (process, _folder) = sh("echo ready; exec sleep 1000");
        blocking(process.line(WITHIN)).unwrap();
        let handle = Handle::of(process.pid()).unwrap();
        process.leave();
        assert!(!handle.ends_within(Duration::ZERO), "it runs on");
        handle.signal(Signal::KILL);
        assert!(handle.ends_within(WITHIN));
    }

    #[test]
    fn what_cannot_be_started_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let error = Process::start("nobody", &mut Command::new("/no/such/program"), &log).err().unwrap();
        assert!(error.to_string().starts_with("cannot start /no/such/program: "), "{error}");
        let error = Process::start("nobody", &mut Command::new("true"), &log.join("log")).err().unwrap();
        assert!(error.to_string().starts_with("cannot write to "), "{error}");
    }
}
