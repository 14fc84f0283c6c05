//! etcd, alone on a machine of its own.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::ground::Ground;
use super::keeper::Run;
use super::links::Host;
use super::process::Process;
use super::{ClusterError, empty_log, http, last_line};
use crate::patience;

const CLIENT_PORT: u16 = 2379;
const PEER_PORT: u16 = 2380;
const LOOK_WITHIN: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_millis(50);

pub(super) struct Etcd {
    host: Host,
    client: String,
    peer: String,
    data: PathBuf,
    log: PathBuf,
    process: Mutex<Option<Arc<Process>>>,
}

impl Etcd {
    pub fn new(ground: &Ground, run: &Run, host: Host, logs: &Path) -> io::Result<Self> {
        Ok(Self {
            host,
            client: ground.listen(host, CLIENT_PORT)?,
            peer: ground.listen(host, PEER_PORT)?,
            data: run.folder().join("etcd"),
            log: empty_log(logs, "etcd.log")?,
            process: Mutex::new(None),
        })
    }

    /// For `--etcd`.
    pub fn url(&self) -> String {
        format!("http://{}", self.client)
    }

    /// On what it held before, if anything.
    pub fn start(&self, ground: &Ground, run: &Run) -> io::Result<()> {
        let mut process = self.process.lock().expect("no panic under this lock");
        if process.as_ref().is_some_and(|process| process.ended().is_none()) {
            return Ok(());
        }
        let (client, peer) = (self.url(), format!("http://{}", self.peer));
        let mut command = ground.command(run, self.host, Path::new("etcd"));
        command.args(["--name", "jepsen", "--logger", "zap", "--log-level", "warn", "--data-dir"]).arg(&self.data);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &format!("jepsen={peer}")]);
        *process = Some(Arc::new(Process::start(&mut command, &self.log)?));
        Ok(())
    }

    pub async fn kill(&self) {
        let process = self.process.lock().expect("no panic under this lock").take();
        if let Some(process) = process {
            process.kill().await;
        }
    }

    /// Until it answers.
    pub async fn wait_until_ready(&self, within: Duration) -> Result<(), ClusterError> {
        let process = self.process.lock().expect("no panic under this lock").clone();
        let healthy = || async {
            let page = http::get(&self.client, "/health", LOOK_WITHIN).await;
            page.filter(|page| page.contains("true")).map(drop).ok_or(())
        };
        let ended = async { process?.wait(within).await };
        let (what, last) = (|| "etcd".to_owned(), || last_line(&self.log));
        tokio::select! {
            Some(status) = ended => Err(ClusterError::Ended { what: what(), status, last: last() }),
            ready = patience::insist(within, LOOK_EVERY, healthy) => {
                ready.map_err(|()| ClusterError::NotReady { what: what(), within, last: last() })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_etcd_that_ends_is_not_waited_for() {
        let run = Run::begin().unwrap();
        let (ground, logs) = (Ground::loopback("a test"), run.folder().join("logs"));
        std::fs::create_dir(&logs).unwrap();
        std::fs::write(run.folder().join("etcd"), "no room for data").unwrap();
        let etcd = Etcd::new(&ground, &run, 2, &logs).unwrap();
        etcd.start(&ground, &run).unwrap();
        let ready = etcd.wait_until_ready(Duration::from_secs(3600));
        let error = tokio::time::timeout(Duration::from_secs(60), ready).await.expect("it has ended").unwrap_err();
        assert!(matches!(error, ClusterError::Ended { .. }), "{error}");
    }
}
