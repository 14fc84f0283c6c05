//! etcd, alone on a machine of its own.

use std::io;
use std::path::Path;
use std::sync::Arc;

use boomerang_task::locks::Mutex;
use boomerang_testkit::Process;

use super::empty_log;
use super::ground::Ground;
use super::keeper::Run;
use super::links::Host;

const CLIENT_PORT: u16 = 2379;
const PEER_PORT: u16 = 2380;

pub(super) struct Etcd {
    host: Host,
    pub place: boomerang_testkit::Etcd,
    process: Mutex<Option<Arc<Process>>>,
}

impl Etcd {
    pub fn new(ground: &Ground, run: &Run, host: Host, logs: &Path) -> io::Result<Self> {
        let place = boomerang_testkit::Etcd {
            client: ground.listen(host, CLIENT_PORT)?,
            peer: ground.listen(host, PEER_PORT)?,
            data: run.folder().join("etcd"),
            log: empty_log(logs, "etcd.log")?,
            tls: None,
        };
        Ok(Self { host, place, process: Mutex::new(None) })
    }

    /// On what it held before, if anything, unless it runs.
    pub fn start(&self, ground: &Ground, run: &Run) -> io::Result<Arc<Process>> {
        let mut process = self.process.lock();
        if let Some(process) = process.as_ref().filter(|process| process.ended().is_none()) {
            return Ok(process.clone());
        }
        let started = self.place.start(&mut ground.command(run, self.host, Path::new("etcd")))?;
        Ok(process.insert(Arc::new(started)).clone())
    }

    pub async fn kill(&self) {
        let process = self.process.lock().take();
        if let Some(process) = process {
            process.kill().await;
        }
    }
}
