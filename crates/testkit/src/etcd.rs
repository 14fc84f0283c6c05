//! The etcd of a cluster: one, alone.

use std::io;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use crate::{Cause, Certs, NotReady, Process, page};

const NAME: &str = "etcd";
/// It tells nobody when it begins to answer.
const LOOK_EVERY: Duration = Duration::from_millis(50);
const LOOK_WITHIN: Duration = Duration::from_secs(1);

/// Where an etcd is, over all of its processes.
#[derive(Debug)]
pub struct Etcd {
    /// Addresses, each `IP:port`.
    pub client: String,
    pub peer: String,
    /// Its folder. What is in it survives its process.
    pub data: PathBuf,
    pub log: PathBuf,
    /// With certificates it takes only those who have one as well.
    pub tls: Option<EtcdTls>,
}

/// How an etcd knows its clients.
#[derive(Debug)]
pub struct EtcdTls {
    /// Its own are called `etcd`.
    pub certs: Certs,
    /// Where anybody may ask whether it is well, `IP:port`.
    pub health: String,
}

impl Etcd {
    /// For `--etcd`.
    pub fn url(&self) -> String {
        format!("{}://{}", if self.tls.is_some() { "https" } else { "http" }, self.client)
    }

    /// Starts `command`, which is or becomes `etcd`, on what it held before, if anything. See [`Etcd::ready`].
    pub fn start(&self, command: &mut Command) -> io::Result<Process> {
        let (client, peer) = (self.url(), format!("http://{}", self.peer));
        command.args(["--name", NAME, "--logger", "zap", "--log-level", "warn", "--data-dir"]).arg(&self.data);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &format!("{NAME}={peer}")]);
        if let Some(EtcdTls { certs, health }) = &self.tls {
            let [_, cert, _, key, _, ca] = certs.flags(NAME);
            command.args(["--cert-file", &cert, "--key-file", &key, "--trusted-ca-file", &ca, "--client-cert-auth"]);
            command.args(["--listen-metrics-urls", &format!("http://{health}")]);
        }
        Process::start(NAME, command, &self.log)
    }

    fn health(&self) -> &str {
        self.tls.as_ref().map_or(&self.client, |tls| &tls.health)
    }

    /// Until it answers that it is well.
    pub async fn ready(&self, process: &Process, within: Duration) -> Result<(), NotReady> {
        let well = async {
            loop {
                let health = timeout(LOOK_WITHIN, page(self.health(), "/health")).await;
                if health.is_ok_and(|page| page.is_ok_and(|page| page.contains("true"))) {
                    return Ok(());
                }
                sleep(LOOK_EVERY).await;
            }
        };
        let ended = async { process.wait(Duration::MAX).await.map(Cause::Ended).ok_or(()) };
        let cause = tokio::select! {
            Ok(cause) = ended => cause,
            well = timeout(within, well) => match well {
                Ok(well) => return well,
                Err(_) => Cause::Late(within),
            },
        };
        Err(process.not_ready(cause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::OwnAddress;

    const WITHIN: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn an_etcd_is_ready_again_on_what_it_held_and_one_that_ends_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let (client, peer) = (OwnAddress::take().unwrap(), OwnAddress::take().unwrap());
        let etcd = Etcd {
            client: client.to_string(),
            peer: peer.to_string(),
            data: folder.path().join("data"),
            log: folder.path().join("log"),
            tls: None,
        };
        for _ in 0..2 {
            let process = etcd.start(&mut Command::new("etcd")).unwrap();
            etcd.ready(&process, WITHIN).await.unwrap();
            process.kill().await;
        }
        std::fs::remove_dir_all(&etcd.data).unwrap();
        std::fs::write(&etcd.data, "no room for data").unwrap();
        let process = etcd.start(&mut Command::new("etcd")).unwrap();
        let error = etcd.ready(&process, Duration::MAX).await.unwrap_err();
        assert!(matches!(error.cause, Cause::Ended(_)), "{error}");
    }
}
