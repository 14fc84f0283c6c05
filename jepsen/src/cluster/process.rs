//! One process of a run: started, signalled and waited for by a handle that never means another process.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::sync::watch;

/// A process; killed with this value.
pub struct Process {
    pid: u32,
    /// Names the very process, also when it has ended and its number is given to another.
    handle: OwnedFd,
    /// The first line of its output.
    line: watch::Receiver<Option<String>>,
    end: watch::Receiver<Option<ExitStatus>>,
}

impl Process {
    /// Its errors, and what it prints after the first line, go to the end of `log`.
    pub fn start(command: &mut Command, log: &Path) -> io::Result<Self> {
        let log = File::options().create(true).append(true).open(log)?;
        let mut rest = log.try_clone()?;
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn()?;
        let handle = handle(&child)?;
        let pid = child.id();
        let (say, line) = watch::channel(None);
        let (ended, end) = watch::channel(None);
        let stdout = child.stdout.take().expect("it is piped");
        std::thread::Builder::new().name(format!("process-{pid}")).spawn(move || {
            let mut stdout = BufReader::new(stdout);
            let mut first = String::new();
            if stdout.read_line(&mut first).is_ok_and(|length| length > 0) {
                let _ = say.send(Some(first));
            }
            drop(say);
            let _ = io::copy(&mut stdout, &mut rest);
            // Also when the log takes no more: or it would stop at a full pipe.
            let _ = io::copy(&mut stdout, &mut io::sink());
            let _ = ended.send(child.wait().ok());
        })?;
        Ok(Self { pid, handle, line, end })
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What it printed first; `None` when it ended before, or took longer.
    pub async fn first_line(&self, within: Duration) -> Option<String> {
        let mut line = self.line.clone();
        let said = tokio::time::timeout(within, line.wait_for(Option::is_some)).await.ok()?.ok()?;
        said.clone()
    }

    /// To one that has ended, this is nothing.
    pub fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.handle, signal);
    }

    /// `None` while it runs.
    pub fn ended(&self) -> Option<ExitStatus> {
        *self.end.borrow()
    }

    /// `None` when it takes longer.
    pub async fn wait(&self, within: Duration) -> Option<ExitStatus> {
        let mut end = self.end.clone();
        tokio::time::timeout(within, end.wait_for(Option::is_some)).await.ok()?.ok().and_then(|status| *status)
    }

    /// As if its power had been cut. Returns when it is gone.
    pub async fn kill(&self) {
        self.signal(Signal::KILL);
        // The kernel may still have to write for it; it is dead all the same.
        let _ = self.wait(DEATH).await;
    }
}

/// Longer than a killed process takes on a busy machine.
const DEATH: Duration = Duration::from_secs(20);

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

fn handle(child: &Child) -> io::Result<OwnedFd> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("the kernel numbers processes so");
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// What a command that ends by itself has said.
#[derive(Debug)]
pub struct Said {
    /// `None` when a signal ended it, such as ours.
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

/// Runs a command to its end; whatever takes longer is killed.
pub async fn run(mut command: Command, within: Duration) -> io::Result<Said> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let handle = handle(&child)?;
    let mut ending = tokio::task::spawn_blocking(move || {
        let stderr = child.stderr.take().expect("it is piped");
        // Both at once: who waits for one pipe must not fill the other.
        let err = std::thread::spawn(move || text(stderr));
        let out = text(child.stdout.take().expect("it is piped"));
        let status = child.wait()?;
        Ok(Said { code: status.code(), out, err: err.join().unwrap_or_default() })
    });
    let said = match tokio::time::timeout(within, &mut ending).await {
        Ok(said) => said,
        Err(_) => {
            let _ = pidfd_send_signal(&handle, Signal::KILL);
            ending.await
        }
    };
    said.expect("reading what a process says does not panic")
}

fn text(mut pipe: impl Read) -> String {
    let mut bytes = Vec::new();
    let _ = pipe.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[tokio::test]
    async fn a_process_says_a_line_and_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        // Both lines at once: when the first is heard, the second has been said.
        let script = r"echo trouble >&2; printf 'ready\nmore\n'; exec sleep 1000";
        let process = Process::start(&mut sh(script), &log).unwrap();
        assert_eq!(process.first_line(Duration::from_secs(10)).await.as_deref(), Some("ready\n"));
        assert!(process.ended().is_none());
        process.kill().await;
        assert_eq!(process.ended().unwrap().code(), None);
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "trouble\nmore\n");
        process.signal(Signal::KILL);

        let process = Process::start(&mut sh("exit 3"), &log).unwrap();
        assert_eq!(process.first_line(Duration::from_secs(10)).await, None);
        assert_eq!(process.wait(Duration::from_secs(10)).await.unwrap().code(), Some(3));
    }

    #[tokio::test]
    async fn a_command_that_does_not_end_is_ended() {
        let said = run(sh("echo out; echo err >&2; exit 1"), Duration::from_secs(10)).await.unwrap();
        assert_eq!((said.code, said.out.as_str(), said.err.as_str()), (Some(1), "out\n", "err\n"));
        let said = run(sh("exec sleep 1000"), Duration::from_millis(50)).await.unwrap();
        assert_eq!(said.code, None);
    }
}
