//! A real etcd of its own process, on free ports and in a folder of its own.

use std::process::Command;

use boomerang_testkit::{Certs, EtcdTls, Process, blocking, log_end};
use tempfile::TempDir;

use super::{PATIENCE, node::free_address};

pub struct Etcd {
    place: boomerang_testkit::Etcd,
    process: Process,
    _folder: TempDir,
}

#[allow(clippy::needless_pass_by_ref_mut, reason = "whoever ends it has it alone")]
impl Etcd {
    pub fn start() -> Self {
        Self::start_on(None)
    }

    /// One that takes only those who have a certificate, too. Its own are called `etcd`.
    pub fn start_with_tls(certs: &Certs) -> Self {
        Self::start_on(Some(EtcdTls { certs: certs.clone(), health: free_address() }))
    }

    fn start_on(tls: Option<EtcdTls>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let place = boomerang_testkit::Etcd {
            client: free_address(),
            peer: free_address(),
            data: folder.path().join("data"),
            log: folder.path().join("log"),
            tls,
        };
        Self { process: start(&place), place, _folder: folder }
    }

    /// For `--etcd`.
    pub fn url(&self) -> String {
        self.place.url()
    }

    /// As if its machine had lost power.
    pub fn kill(&mut self) {
        blocking(self.process.kill());
    }

    /// On the same data and the same ports.
    pub fn restart(&mut self) {
        self.kill();
        self.process = start(&self.place);
    }

    /// On the same ports, and with nothing of what it held.
    pub fn lose_everything(&mut self) {
        self.kill();
        std::fs::remove_dir_all(&self.place.data).unwrap();
        self.restart();
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("etcd logged, at last:\n{}", log_end(&self.place.log, 10));
        }
    }
}

/// Returns when it answers.
fn start(place: &boomerang_testkit::Etcd) -> Process {
    let process = place.start(&mut Command::new("etcd")).expect("etcd, which scripts/setup.sh installs");
    blocking(place.ready(&process, PATIENCE)).unwrap_or_else(|error| panic!("{error}"));
    process
}
