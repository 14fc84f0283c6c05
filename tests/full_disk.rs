//! A disk that fills up under a node: it refuses what is new with a clear error, finishes what it accepted as long as
//! there is room for that, stays alive, keeps everything it acknowledged, and goes on when there is space again.
//!
//! Needs a file system of its own, which only root may mount; without that it says so and ends.

mod common;

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use boomerang::store::space::DiskSpace;
use boomerang_client::{Client, ClientError, Credentials, Due, Options, Registration};
use boomerang_receiver::{Received, Receiver};
use boomerang_task::{Callback, Protocol, TaskId};
use boomerang_wire::proto::Status;
use common::node::{ADMIN_PASSWORD, NodeProcess};
use common::{eventually_within, http_get};
use rustix::fs::{FallocateFlags, fallocate};
use tokio::sync::mpsc;

const MIB: u64 = 1024 * 1024;
const DISK_MIB: u64 = 192;
const LOW_MIB: u64 = 64;
const RESERVE_MIB: u64 = 24;
const RESERVE_HALF: u64 = RESERVE_MIB / 2 * MIB;
const WITHIN: Duration = Duration::from_secs(20);

/// A small file system in memory; unmounted when it is dropped.
struct SmallDisk {
    path: PathBuf,
    _temp: tempfile::TempDir,
}

impl SmallDisk {
    fn mount() -> Option<Self> {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("disk");
        std::fs::create_dir(&path).unwrap();
        let size = format!("size={DISK_MIB}m");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&path).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self { path, _temp: temp }),
            _ => None,
        }
    }

    fn free(&self) -> u64 {
        DiskSpace { path: self.path.clone() }.free_bytes().unwrap()
    }

    /// Leaves only `left` bytes free. In one go: a node that gave up its reserve half way would see it filled as well.
    fn fill(&self, name: &str, left: u64) -> PathBuf {
        let path = self.path.join(name);
        let file = File::create(&path).unwrap();
        let take_all = || fallocate(&file, FallocateFlags::empty(), 0, self.free().saturating_sub(left));
        // The node may write between the look and the taking.
        eventually_within(WITHIN, "the disk is filled", take_all);
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.path).output();
    }
}

async fn connect(node: &NodeProcess, receiver: &Receiver) -> Client {
    let client_id = "admin".parse().unwrap();
    let password = ADMIN_PASSWORD.to_owned();
    let mut options = Options::new(vec![node.started.tcp.to_string()], Credentials::Password { client_id, password });
    options.callback = Some(Callback::new(Protocol::Tcp, &receiver.local_addr().to_string()).unwrap());
    Client::connect(options).await.unwrap()
}

async fn register(client: &Client, delay_ms: u64) -> Result<TaskId, ClientError> {
    let payload = bytes::Bytes::from_static(b"kept");
    let registration = Registration { payload, due: Due::In(delay_ms), ..Default::default() };
    client.register(registration).await.map(|registered| registered.task_id)
}

/// Asks until the node refuses because of the disk; it looks ten times a second.
async fn refused(client: &Client, node: &NodeProcess, expected: &str) {
    let deadline = Instant::now() + WITHIN;
    loop {
        match register(client, 60_000_000).await {
            Err(ClientError::Server { status, message, .. }) if message.contains(expected) => {
                assert_eq!(status, Status::Overloaded, "{message}");
                break;
            }
            other => assert!(Instant::now() < deadline, "the node goes on to answer {other:?}"),
        }
    }
    let (status, text) = http_get(node.started.http, "/readyz");
    assert!(
        status == 503 && text.contains("disk"),
        "a node with a full disk is not ready, and says so: {status} {text}"
    );
    assert_eq!(http_get(node.started.http, "/healthz").0, 200, "a node with a full disk is healthy");
}

async fn accepted(client: &Client, delay_ms: u64) -> TaskId {
    let deadline = Instant::now() + WITHIN;
    loop {
        match register(client, delay_ms).await {
            Ok(id) => return id,
            Err(error) => assert!(Instant::now() < deadline, "the node goes on to refuse: {error}"),
        }
    }
}

async fn wait_for(deliveries: &mut mpsc::Receiver<Received>, mut expected: HashSet<TaskId>) {
    while !expected.is_empty() {
        let received = tokio::time::timeout(WITHIN, deliveries.recv()).await;
        let received = received.unwrap_or_else(|_| panic!("{} tasks did not fire", expected.len())).unwrap();
        assert!(received.lateness_us().unwrap() >= 0, "before it was due: {received:?}");
        expected.remove(&received.task_id);
    }
}

fn start(disk: &Path) -> NodeProcess {
    let (low, reserve) = (LOW_MIB.to_string(), RESERVE_MIB.to_string());
    NodeProcess::start_in(&disk.join("data"), &["--disk-free-min", &low, "--disk-reserve", &reserve])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_refused_survived_and_recovered_from() {
    let Some(disk) = SmallDisk::mount() else {
        eprintln!("skipped: this needs a file system of its own, and mounting one is not permitted here");
        return;
    };
    let mut node = start(&disk.path);
    let (receiver, mut deliveries) = Receiver::channel("127.0.0.1:0", 1_000).await.unwrap();
    let client = connect(&node, &receiver).await;
    assert_eq!(http_get(node.started.http, "/readyz").0, 200, "a node with room on its disk is ready");
    let far = accepted(&client, 3_600_000).await;
    let mut soon = HashSet::new();
    for n in 0..50 {
        soon.insert(accepted(&client, 1_500 + 40 * n).await);
    }

    // Nearly full: what is new is refused, what was accepted fires.
    let filler = disk.fill("filler", (LOW_MIB / 2) * MIB);
    refused(&client, &node, "nearly full").await;
    wait_for(&mut deliveries, soon).await;

    // Full to the last byte, twice: the second time there is no reserve left. What is due then waits.
    std::fs::remove_file(&filler).unwrap();
    let mut late = HashSet::new();
    for _ in 0..50 {
        late.insert(accepted(&client, 4_000).await);
    }
    let filler = disk.fill("filler", 0);
    refused(&client, &node, "full").await;
    // Its name goes before its room is there; filling the disk in between would find nothing to fill.
    let reserve = node.data_dir().join("reserve");
    eventually_within(WITHIN, "the reserve is given up", || match (reserve.exists(), disk.free()) {
        (false, RESERVE_HALF..) => Ok(()),
        (is_there, free) => Err(format!("it is {}there, {free} bytes are free", if is_there { "" } else { "not " })),
    });
    let second = disk.fill("second", 0);
    refused(&client, &node, "nothing is written").await;
    assert!(client.cancel(far).await.is_err(), "a cancellation is refused as well, rather than left hanging");
    assert!(client.get(far).await.unwrap().is_some(), "reading goes on");
    assert_eq!(node.exit_code(), None, "a full disk is not the end of a node");

    // Space again: everything goes on by itself, and nothing is lost.
    std::fs::remove_file(&second).unwrap();
    std::fs::remove_file(&filler).unwrap();
    wait_for(&mut deliveries, late).await;
    let more = accepted(&client, 100).await;
    wait_for(&mut deliveries, HashSet::from([more])).await;
    assert_eq!(http_get(node.started.http, "/readyz").0, 200, "a node that has room again is ready");
    assert_eq!(node.exit_code(), None, "a full disk is not the end of a node");
    node.kill();
    tokio::task::block_in_place(|| node.restart());
    assert!(client.get(far).await.unwrap().is_some(), "what was acknowledged before all this is still there");
}
