//! Nodes that hear too late that they still lead, while nobody else is elected: leading is suspended, and nothing that is out
//! leaves again. Real nodes, with a way between each two of them on which answers can be held up.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use boomerang_client::{Client, Credentials, Due, Options, OwnSettings, Registration};
use boomerang_task::locks::Mutex;
use boomerang_task::{Callback, Protocol};
use common::cluster::SHARDS;
use common::node::{ADMIN_PASSWORD, NodeProcess, free_address};
use common::one_of_three;
use common::trio::Trio;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

const WEBHOOKS: usize = 10_000;
/// Due beside the stall: without anything that is due, nobody would notice it.
const BESIDE: usize = 600;
/// So many of those are out when the stall begins: others are on their way.
const BEGUN: usize = 100;
/// Registered after the stall, over all shards: whatever leaves again by mistake is due earlier, and leaves before them.
const AFTER: usize = 600;
const COME_WITHIN: Duration = Duration::from_secs(60);
const STALL: Duration = Duration::from_millis(400);
/// Over HTTP/1.1 few attempts may be out to one receiver; there would be room for all of them twice.
const RECEIVERS: usize = 60;
/// The receivers answer when all is over.
const ANSWER_WITHIN_MS: u64 = 120_000;
/// What a node says when it is not sure that it leads.
const SUSPENDED: &str = "nothing is dispatched until it is";

/// In a test with two threads.
fn block_on<T>(what: impl Future<Output = T>) -> T {
    tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(what))
}

/// The address of a way to `to`. While `held` says so, nothing comes back on it.
async fn way(to: String, held: watch::Receiver<bool>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((from, _)) = listener.accept().await {
            // Whoever dials a node that is not there yet dials again.
            let Ok(to) = TcpStream::connect(&to).await else { continue };
            let _ = (from.set_nodelay(true), to.set_nodelay(true));
            let ((mut asks, mut answered), (mut answers, mut asked)) = (from.into_split(), to.into_split());
            tokio::spawn(async move { tokio::io::copy(&mut asks, &mut asked).await });
            let mut held = held.clone();
            tokio::spawn(async move {
                let mut bytes = vec![0; 64 * 1024];
                while let Ok(read @ 1..) = answers.read(&mut bytes).await {
                    if held.wait_for(|held| !held).await.is_err() || answered.write_all(&bytes[..read]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// Three nodes that reach each other by such ways.
async fn cluster(held: &watch::Receiver<bool>) -> Trio {
    let peers: BTreeMap<u64, String> = (1..=3).map(|node| (node, free_address())).collect();
    let mut flags = Vec::new();
    for (node, peer) in &peers {
        let mut list = Vec::new();
        for (other, address) in &peers {
            let address = if other == node { address.clone() } else { way(address.clone(), held.clone()).await };
            list.push(format!("{other}={address}"));
        }
        let (node, list) = (node.to_string(), list.join(","));
        let (tcp, http) = (free_address(), free_address());
        let own = ["--node-id", &node, "--tcp-addr", &tcp, "--http-addr", &http, "--peer-addr", peer, "--peers", &list];
        flags.push([&own[..], &["--shards", &SHARDS.to_string()]].concat().into_iter().map(str::to_owned).collect());
    }
    tokio::task::block_in_place(|| Trio::of(NodeProcess::start_all(&flags)))
}

/// An attempt: task, occurrence and number.
type Attempt = (String, String, String);

#[derive(Default)]
struct Seen {
    /// The fences that each attempt came with.
    attempts: Mutex<BTreeMap<Attempt, Vec<String>>>,
    /// Changes when one comes.
    came: watch::Sender<()>,
}

impl Seen {
    fn count(&self) -> usize {
        self.attempts.lock().len()
    }

    fn take(&self, attempt: Attempt, fence: String) {
        self.attempts.lock().entry(attempt).or_default().push(fence);
        self.came.send_replace(());
    }

    /// Those that came more than once.
    fn again(&self) -> Vec<(Attempt, Vec<String>)> {
        let seen = self.attempts.lock();
        seen.iter()
            .filter(|(_, fences)| fences.len() > 1)
            .map(|(attempt, fences)| (attempt.clone(), fences.clone()))
            .collect()
    }
}

/// Takes requests over HTTP/1.1 and answers them when it is told to. Returns its address.
async fn receiver(seen: Arc<Seen>, answer: watch::Receiver<bool>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (seen, answer) = (seen.clone(), answer.clone());
            tokio::spawn(async move { serve(stream, &seen, answer).await });
        }
    });
    address
}

async fn serve(stream: TcpStream, seen: &Seen, mut answer: watch::Receiver<bool>) -> Option<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut headers: BTreeMap<String, String> = BTreeMap::new();
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).await.ok()? == 0 {
                return None;
            }
            let Some((name, value)) = line.trim_end().split_once(": ") else {
                if line == "\r\n" {
                    break;
                }
                continue;
            };
            headers.insert(name.to_ascii_lowercase(), value.to_owned());
        }
        let header = |name: &str| headers.get(name).cloned().unwrap_or_default();
        let mut body = vec![0; header("content-length").parse().unwrap_or(0)];
        stream.read_exact(&mut body).await.ok()?;
        let attempt = (header("x-boomerang-task-id"), header("x-boomerang-occurrence"), header("x-boomerang-attempt"));
        seen.take(attempt, header("x-boomerang-fence"));
        answer.wait_for(|answer| *answer).await.ok()?;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.ok()?;
    }
}

async fn register(client: &Client, receivers: &[String], delays_ms: impl Iterator<Item = u64>) {
    let registration = |(n, delay_ms): (usize, u64)| {
        let endpoint = format!("http://{}/", receivers[n % RECEIVERS]);
        let mut callback = Callback::new(Protocol::Http, &endpoint).unwrap();
        callback.options.timeout_ms = Some(ANSWER_WITHIN_MS);
        Registration {
            payload: bytes::Bytes::from_static(b"payload"),
            due: Due::In(delay_ms),
            settings: OwnSettings { callback: Some(callback), ..OwnSettings::default() },
            ..Registration::default()
        }
    };
    let all: Vec<Registration> = delays_ms.enumerate().map(registration).collect();
    for part in all.chunks(500) {
        for registered in client.register_batch(part.to_vec()).await.unwrap() {
            registered.unwrap();
        }
    }
}

/// Or something came again, and the rest is of no interest.
async fn all_have_come(seen: &Seen, expected: usize) {
    let mut came = seen.came.subscribe();
    let done = came.wait_for(|()| seen.count() >= expected || !seen.again().is_empty());
    let in_time = tokio::time::timeout(COME_WITHIN, done).await;
    assert!(in_time.is_ok(), "{} of {expected} are out after {COME_WITHIN:?}", seen.count());
}

/// Ten thousand webhooks are out when every leader loses its lease for a moment: none of them leaves again, and what is due
/// meanwhile leaves once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stall_does_not_deliver_again_what_is_out() {
    one_of_three(|| block_on(a_stall()));
}

async fn a_stall() -> Result<(), String> {
    let (hold, held) = watch::channel(false);
    let (answer, answers) = watch::channel(false);
    let trio = cluster(&held).await;
    let seen = Arc::new(Seen::default());
    let mut receivers = Vec::new();
    for _ in 0..RECEIVERS {
        receivers.push(receiver(seen.clone(), answers.clone()).await);
    }
    let credentials =
        Credentials::Password { client_id: "admin".parse().unwrap(), password: ADMIN_PASSWORD.to_owned() };
    let addresses = trio.nodes.iter().map(|node| node.started.tcp.to_string()).collect();
    let client = Client::connect(Options::new(addresses, credentials)).await.unwrap();
    register(&client, &receivers, (0..WEBHOOKS as u64).map(|n| 5_000 + n % 3_000)).await;
    all_have_come(&seen, WEBHOOKS).await;
    register(&client, &receivers, (0..BESIDE as u64).map(|n| 1_000 + 2 * n)).await;
    all_have_come(&seen, WEBHOOKS + BEGUN).await;
    hold.send_replace(true);
    // As long as the fault lasts.
    tokio::time::sleep(STALL).await;
    hold.send_replace(false);
    all_have_come(&seen, WEBHOOKS + BESIDE).await;
    let out: f64 = trio.nodes.iter().map(|node| node.metric("boomerang_in_flight")).sum();
    register(&client, &receivers, (0..AFTER).map(|_| 1)).await;
    all_have_come(&seen, WEBHOOKS + BESIDE + AFTER).await;
    answer.send_replace(true);
    common::until("all are settled", async || {
        let pending: f64 = trio.nodes.iter().map(|node| node.metric("boomerang_in_flight")).sum();
        (pending == 0.0).then_some(())
    })
    .await;
    let suspended: usize = trio.nodes.iter().map(|node| node.log().matches(SUSPENDED).count()).sum();
    let again = seen.again();
    println!("{out} were out; leading was suspended {suspended} times; {} came again", again.len());
    for (attempt, fences) in &again {
        let terms: BTreeSet<&str> = fences.iter().map(|fence| fence.split('.').next().unwrap()).collect();
        assert_eq!(terms.len(), fences.len(), "{attempt:?} came again in one term: {fences:?}");
    }
    match (suspended, again.len()) {
        (0, _) => Err("no lease was lost".to_owned()),
        (_, 0) => Ok(()),
        // Somebody else was elected: the machine is too busy for this.
        (_, again) => Err(format!("{again} came again from another leader")),
    }
}
