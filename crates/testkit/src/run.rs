//! A command that ends by itself; and waiting without `await`.

use std::io::{self, Read};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use crate::Handle;
use crate::process::end;

/// Of one that was killed.
const DIES_WITHIN: Duration = Duration::from_secs(10);

/// How a command ended, and what it printed.
#[derive(Debug)]
pub struct Ended {
    /// `None` when a signal ended it, such as ours.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a command to its end; whatever takes longer is killed.
pub async fn run(command: &mut Command, within: Duration) -> io::Result<Ended> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let handle = Handle::of(child.id()).inspect_err(|_| end(&mut child))?;
    let mut ending = tokio::task::spawn_blocking(move || {
        let stderr = child.stderr.take().expect("it is piped");
        // Both at once: who waits for one pipe must not fill the other.
        let stderr = thread::spawn(move || text(stderr));
        let stdout = text(child.stdout.take().expect("it is piped"));
        let status = child.wait()?;
        Ok(Ended { code: status.code(), stdout, stderr: stderr.join().expect("reading does not panic") })
    });
    let ended = match tokio::time::timeout(within, &mut ending).await {
        Ok(ended) => ended,
        Err(_) => {
            handle.signal(Signal::KILL);
            // What it started may hold its output open for as long as it likes.
            let ended = tokio::time::timeout(DIES_WITHIN, ending).await;
            ended.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "it was killed, and others hold its output"))?
        }
    };
    ended.expect("reading what a process says does not panic")
}

fn text(mut pipe: impl Read) -> String {
    let mut bytes = Vec::new();
    let _ = pipe.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What a future comes to, for whoever cannot `await` it: blocks this thread, and may be called within a runtime, too.
pub fn blocking<T: Send>(future: impl Future<Output = T> + Send) -> T {
    let wait = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime can be made").block_on(future)
    };
    let waited = thread::scope(|scope| scope.spawn(wait).join());
    waited.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, within: Duration) -> Ended {
        blocking(run(Command::new("sh").args(["-c", script]), within)).unwrap()
    }

    #[tokio::test]
    async fn a_command_that_does_not_end_is_ended() {
        let ended = sh("echo out; echo err >&2; exit 1", Duration::from_secs(60));
        assert_eq!((ended.code, ended.stdout.as_str(), ended.stderr.as_str()), (Some(1), "out\n", "err\n"));
        assert_eq!(sh("exec sleep 1000", Duration::from_millis(50)).code, None);
    }
}
