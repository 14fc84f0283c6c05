//! Where callbacks must not go: real nodes with the settings that people give, and receivers that count who comes.

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use boomerang::sabotage::Fault;
use boomerang_client::{Client, Credentials, DeadLetterFilter, Due, Options, OwnSettings, Registration};
use boomerang_receiver::{Received, Receiver};
use boomerang_task::{Backoff, Callback, FailureClass, Retry, TaskId};
use common::cluster::Cluster;
use common::etcd::Etcd;
use common::node::{ADMIN_PASSWORD, NodeProcess};
use common::{PATIENCE, eventually};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

/// A node, as a client that nobody watches would use it.
struct World {
    client: Client,
    /// Where copies of dead letters go: that they come is how it is known that a task has failed.
    copies: String,
    deliveries: mpsc::Receiver<Received>,
    _receiver: Receiver,
}

impl World {
    /// With the node that is at the address which `start` says when it is told what is to be allowed: the copies.
    async fn new(start: impl FnOnce(&str) -> SocketAddr) -> Self {
        let (receiver, deliveries) = Receiver::channel("127.0.0.1:0", 100).await.unwrap();
        let address = receiver.local_addr().to_string();
        let node = tokio::task::block_in_place(|| start(&address));
        let credentials =
            Credentials::Password { client_id: "admin".parse().unwrap(), password: ADMIN_PASSWORD.to_owned() };
        let client = Client::connect(Options::new(vec![node.to_string()], credentials)).await.unwrap();
        Self { client, copies: format!("tcp://{address}"), deliveries, _receiver: receiver }
    }

    /// A task that is called back at `url`, twice at most.
    async fn register(&self, url: &str) -> TaskId {
        let retry =
            Retry { attempts_max: 2, backoff: Backoff::Fixed, interval_ms: 1, interval_max_ms: 1, jitter_percent: 0 };
        let callback = Some(Callback::from_url(url).unwrap().unwrap());
        let task = Registration {
            payload: bytes::Bytes::from_static(b"payload"),
            due: Due::In(0),
            settings: OwnSettings { callback, retry: Some(retry), dead_letters: Some(self.copies.clone()) },
            ..Registration::default()
        };
        self.client.register(task).await.unwrap().task_id
    }

    /// How the last of two attempts to call back at `url` ended.
    async fn failure(&mut self, url: &str) -> (FailureClass, String) {
        let task_id = self.register(url).await;
        let copy = tokio::time::timeout(PATIENCE, self.deliveries.recv()).await;
        let copy = copy.unwrap_or_else(|_| panic!("{url}: neither a failure nor its copy")).unwrap();
        assert_eq!(copy.task_id, task_id, "{url}");
        let filter = DeadLetterFilter { task_id: Some(task_id), ..Default::default() };
        let page = self.client.list_dead_letters(&filter, 1, "").await.unwrap();
        let letter = page.dead_letters.into_iter().next().unwrap_or_else(|| panic!("{url}: no dead letter"));
        assert_eq!(letter.attempts, 2, "{url}: it is retried as any other failure is");
        let failure = letter.failure.unwrap();
        (failure.class.unwrap(), failure.text)
    }

    async fn assert_forbidden(&mut self, url: &str, why: &str) {
        let (class, text) = self.failure(url).await;
        assert!(class == FailureClass::Forbidden && text.contains(why), "{url}: {class}: {text}");
    }
}

/// Counts who comes.
async fn counting() -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, count) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
    let counted = count.clone();
    tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });
    (address, count)
}

const EVERYTHING: &str = "0.0.0.0/0,::/0";
const NOT_ALLOWED: &str = "--callback-allow";
const OURS: &str = "the cluster itself listens there";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_calls_back_on_its_own_machine_only_what_it_is_allowed_to() {
    let mut node = None;
    let mut world = World::new(|copies| {
        // Its port only.
        node.insert(NodeProcess::start(&["--callback-allow", copies])).started.tcp
    })
    .await;
    let (address, count) = counting().await;
    for scheme in ["tcp", "grpc", "http", "https", "udp"] {
        world.assert_forbidden(&format!("{scheme}://{address}"), NOT_ALLOWED).await;
    }
    world.assert_forbidden("http://169.254.169.254/latest/meta-data", NOT_ALLOWED).await;
    assert_eq!(count.load(Ordering::Relaxed), 0, "somebody was called");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_has_a_node_call_a_node_or_their_etcd() {
    let (mut etcd, mut cluster) = (None, None);
    let mut world = World::new(|_| {
        let etcd = etcd.insert(Etcd::start());
        let started = Cluster::with_etcd(3, &etcd.url(), &["--callback-allow", EVERYTHING]);
        cluster.insert(started).nodes[0].started.tcp
    })
    .await;
    let mut places: Vec<String> = Vec::new();
    for node in &cluster.as_ref().unwrap().nodes {
        let started = &node.started;
        places.extend([started.tcp, started.http, started.peer.unwrap()].map(|address| address.to_string()));
    }
    places.push(etcd.as_ref().unwrap().url().trim_start_matches("http://").to_owned());
    for place in &places {
        for scheme in ["tcp", "http"] {
            world.assert_forbidden(&format!("{scheme}://{place}"), OURS).await;
        }
    }
    let port = places[0].rsplit_once(':').unwrap().1.to_owned();
    world.assert_forbidden(&format!("http://[::ffff:127.0.0.1]:{port}/"), OURS).await;
    world.assert_forbidden(&format!("http://localhost:{port}/"), OURS).await;
    world.assert_forbidden(&format!("grpc://localhost:{port}"), OURS).await;
    world.assert_forbidden(&format!("udp://127.0.0.1:{port}"), OURS).await;
    for place in [places[0].as_str(), places.last().unwrap()] {
        let port = place.rsplit_once(':').unwrap().1;
        // The whole network is this machine's, and so is the address that is none.
        world.assert_forbidden(&format!("http://127.0.0.2:{port}/"), OURS).await;
        world.assert_forbidden(&format!("http://0.0.0.0:{port}/"), "unspecified").await;
        world.assert_forbidden(&format!("tcp://[::]:{port}"), "unspecified").await;
    }
    // Nothing else is out of reach.
    let (address, count) = counting().await;
    let (class, text) = world.failure(&format!("tcp://{address}")).await;
    assert!(class == FailureClass::Broken && count.load(Ordering::Relaxed) > 0, "{class}: {text}");
}

/// Who tries things out calls back its own machine, and not the node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_developers_node_calls_back_its_own_machine_and_not_itself() {
    let mut node = None;
    let mut world = World::new(|_| node.insert(NodeProcess::start_dev()).started.tcp).await;
    let (address, count) = counting().await;
    let (class, text) = world.failure(&format!("tcp://{address}")).await;
    assert!(class == FailureClass::Broken && count.load(Ordering::Relaxed) > 0, "{class}: {text}");
    let started = node.as_ref().unwrap().started.clone();
    for place in [started.tcp, started.http] {
        world.assert_forbidden(&format!("http://{place}/"), OURS).await;
    }
    world.assert_forbidden("http://10.0.0.1/", NOT_ALLOWED).await;
}

/// The copy of a dead letter goes where callbacks may go, and nowhere else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_a_dead_letter_is_held_to_the_same() {
    let mut node = None;
    let mut world =
        World::new(|copies| node.insert(NodeProcess::start(&["--callback-allow", copies])).started.tcp).await;
    let (address, count) = counting().await;
    world.copies = format!("tcp://{address}");
    let task_id = world.register("tcp://10.0.0.1:1").await;
    // Two attempts, and one at least to bring the copy.
    let node = node.as_ref().unwrap();
    tokio::task::block_in_place(|| {
        eventually("the copy was tried", || (node.metric("boomerang_failed_attempts_total") >= 3.0).then_some(()))
    });
    let filter = DeadLetterFilter { task_id: Some(task_id), ..Default::default() };
    assert_eq!(world.client.list_dead_letters(&filter, 1, "").await.unwrap().dead_letters.len(), 1);
    assert_eq!(count.load(Ordering::Relaxed), 0, "a copy went where it must not");
}

/// What the tests above rest on, taken away: they would notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_calls_anybody_is_noticed() {
    let mut node = None;
    let mut world = World::new(|copies| {
        let flags = ["--callback-allow", copies].map(str::to_owned).to_vec();
        let started = NodeProcess::start_all_broken(&[flags], Fault::CallAnybody).remove(0);
        node.insert(started).started.tcp
    })
    .await;
    let (address, count) = counting().await;
    let (class, text) = world.failure(&format!("tcp://{address}")).await;
    assert!(class != FailureClass::Forbidden && count.load(Ordering::Relaxed) > 0, "{class}: {text}");
}
