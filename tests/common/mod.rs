//! Real nodes in processes of their own.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub const ADMIN_PASSWORD: &str = "test-password";

const STARTED_WITHIN: Duration = Duration::from_secs(30);
const STDERR_BYTES_SHOWN: usize = 4_000;

pub fn now_ms() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

/// A port nobody uses now.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// One `boomerang serve`; it ends, by its own id, when this value does.
pub struct NodeProcess {
    child: Child,
    flags: Vec<String>,
    folder: PathBuf,
    stderr: PathBuf,
    start_line: serde_json::Value,
    _temp: Option<tempfile::TempDir>,
}

impl NodeProcess {
    /// On free ports and a folder of its own.
    pub fn start(flags: &[&str]) -> Self {
        Self::start_in_temp([0, 0, 0], flags)
    }

    /// On ports that stay the same when the node is started again.
    pub fn start_on_fixed_ports(flags: &[&str]) -> Self {
        Self::start_in_temp([free_port(), free_port(), free_port()], flags)
    }

    fn start_in_temp(ports: [u16; 3], flags: &[&str]) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let mut node = Self::start_in(&temp.path().join("data"), ports, flags);
        node._temp = Some(temp);
        node
    }

    /// In a folder of the test's.
    pub fn start_in(folder: &Path, [tcp, http, peer]: [u16; 3], flags: &[&str]) -> Self {
        let mut all = vec!["serve".to_owned(), "--data-dir".into(), folder.display().to_string()];
        for (flag, port) in [("--tcp-addr", tcp), ("--http-addr", http), ("--peer-addr", peer)] {
            all.extend([flag.to_owned(), format!("127.0.0.1:{port}")]);
        }
        all.extend(["--admin-password".to_owned(), ADMIN_PASSWORD.to_owned()]);
        all.extend(flags.iter().map(|flag| (*flag).to_owned()));
        // Not in the folder of the node, which may be a disk that is full.
        let stderr = std::env::temp_dir().join(format!("boomerang-test-{}-{}.log", std::process::id(), free_port()));
        let (child, start_line) = spawn(&all, &stderr);
        Self { child, flags: all, folder: folder.to_owned(), stderr, start_line, _temp: None }
    }

    fn address(&self, name: &str) -> SocketAddr {
        self.start_line[name].as_str().expect("the start line names it").parse().expect("an address")
    }

    pub fn tcp(&self) -> SocketAddr {
        self.address("tcp")
    }

    pub fn http(&self) -> SocketAddr {
        self.address("http")
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL, and waits until the process is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }

    /// Starts it again after [`NodeProcess::kill`], with the same flags on the same folder.
    pub fn restart(&mut self) {
        (self.child, self.start_line) = spawn(&self.flags, &self.stderr);
    }

    /// Whether it still runs.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// One GET over HTTP: status and body.
    pub fn get(&self, path: &str) -> (u16, String) {
        use std::io::Write;
        let mut stream = std::net::TcpStream::connect(self.http()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let status = answer.split_whitespace().nth(1).and_then(|code| code.parse().ok()).expect("a status");
        let body = answer.split_once("\r\n\r\n").map_or(String::new(), |(_, body)| body.to_owned());
        (status, body)
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the node said:\n{}", tail(&self.stderr));
        }
        let _ = std::fs::remove_file(&self.stderr);
    }
}

fn tail(path: &Path) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&text[text.len().saturating_sub(STDERR_BYTES_SHOWN)..]).into_owned()
}

/// Waits for the start line, which says that the node is ready.
fn spawn(flags: &[String], stderr: &Path) -> (Child, serde_json::Value) {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(stderr).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_boomerang"))
        .args(flags)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .expect("the binary was built");
    let stdout = child.stdout.take().unwrap();
    let (line_out, line_in) = mpsc::channel();
    std::thread::spawn(move || {
        let mut lines = BufReader::new(stdout).lines();
        let _ = line_out.send(lines.next());
        // Kept open, or the node would write into a closed pipe.
        lines.for_each(drop);
    });
    match line_in.recv_timeout(STARTED_WITHIN) {
        Ok(Some(Ok(line))) => (child, serde_json::from_str(&line).expect("a line of JSON")),
        other => {
            let _ = child.kill();
            let _ = child.wait();
            panic!("the node did not start: {other:?}\n{}", tail(stderr));
        }
    }
}
