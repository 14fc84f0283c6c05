//! A real etcd of its own process, on free ports and in a folder of its own.

use std::fs::File;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use super::{eventually, node::free_address};

pub struct Etcd {
    client: String,
    peer: String,
    folder: TempDir,
    child: Child,
}

impl Etcd {
    pub fn start() -> Self {
        let (client, peer) = (free_address(), free_address());
        let folder = tempfile::tempdir().unwrap();
        let child = spawn(&folder, &client, &peer);
        let etcd = Self { client, peer, folder, child };
        etcd.wait();
        etcd
    }

    /// For `--etcd`.
    pub fn url(&self) -> String {
        format!("http://{}", self.client)
    }

    /// As if its machine had lost power.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// On the same data and the same ports.
    pub fn restart(&mut self) {
        self.kill();
        self.child = spawn(&self.folder, &self.client, &self.peer);
        self.wait();
    }

    /// On the same ports, and with nothing of what it held.
    pub fn lose_everything(&mut self) {
        self.kill();
        std::fs::remove_dir_all(self.folder.path().join("data")).unwrap();
        self.restart();
    }

    fn wait(&self) {
        let addr: std::net::SocketAddr = self.client.parse().unwrap();
        eventually("etcd is healthy", || {
            let stream = std::net::TcpStream::connect(addr).ok()?;
            drop(stream);
            let (status, body) = super::http_get(addr, "/health");
            (status == 200 && body.contains("true")).then_some(())
        });
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().rev().take(10).collect();
            eprintln!("etcd logged, the latest first:\n{}", lines.join("\n"));
        }
    }
}

fn spawn(folder: &TempDir, client: &str, peer: &str) -> Child {
    let log = File::options().create(true).append(true).open(folder.path().join("log")).unwrap();
    let (client, peer) = (format!("http://{client}"), format!("http://{peer}"));
    let data = folder.path().join("data");
    let mut command = Command::new("etcd");
    command.args(["--name", "test", "--data-dir", data.to_str().unwrap(), "--logger", "zap"]);
    command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
    command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
    command.args(["--initial-cluster", &format!("test={peer}")]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    command.spawn().expect("etcd, which scripts/setup.sh installs")
}
