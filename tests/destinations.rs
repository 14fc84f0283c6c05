//! Destinations do not delay each other: a real node, one receiver that hangs or is dead, and another one at work.

mod common;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use boomerang_client::{Client, Credentials, Due, Options, OwnSettings, Registration, TaskFilter};
use boomerang_receiver::Receiver;
use boomerang_task::{Backoff, Callback, Protocol, Retry, TaskId};
use common::node::{ADMIN_PASSWORD, NodeProcess};
use common::{PATIENCE, one_of_three};
use tokio::sync::mpsc;

/// One test at a time: lateness is measured, and what another test does beside it would be measured as well.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// In a test with two threads.
fn block_on<T>(what: impl Future<Output = T>) -> T {
    tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(what))
}

async fn admin(node: &NodeProcess) -> Client {
    let credentials =
        Credentials::Password { client_id: "admin".parse().unwrap(), password: ADMIN_PASSWORD.to_owned() };
    Client::connect(Options::new(vec![node.started.tcp.to_string()], credentials)).await.unwrap()
}

fn task(callback: &Callback, delay_ms: u64) -> Registration {
    let retry =
        Retry { attempts_max: 3, backoff: Backoff::Fixed, interval_ms: 200, interval_max_ms: 200, jitter_percent: 0 };
    Registration {
        payload: bytes::Bytes::from_static(b"payload"),
        due: Due::In(delay_ms),
        settings: OwnSettings { callback: Some(callback.clone()), retry: Some(retry), dead_letters: None },
        ..Registration::default()
    }
}

async fn register_many(client: &Client, callback: &Callback, delays: impl Iterator<Item = u64>) -> HashSet<TaskId> {
    let mut pending = Vec::new();
    let delays: Vec<u64> = delays.collect();
    for part in delays.chunks(500) {
        let batch = part.iter().map(|delay_ms| task(callback, *delay_ms)).collect();
        pending.push(client.register_batch_nowait(batch).await.unwrap());
    }
    let mut ids = HashSet::new();
    for batch in pending {
        ids.extend(batch.await.unwrap().into_iter().map(|registered| registered.unwrap().task_id));
    }
    ids
}

/// How late they came, in milliseconds, sorted.
async fn lateness_ms(
    mut ids: HashSet<TaskId>,
    deliveries: &mut mpsc::Receiver<boomerang_receiver::Received>,
) -> Vec<f64> {
    let mut late = Vec::new();
    while !ids.is_empty() {
        let received = tokio::time::timeout(PATIENCE, deliveries.recv()).await;
        let received = received.unwrap_or_else(|_| panic!("{} did not come", ids.len())).unwrap();
        if ids.remove(&received.task_id) {
            let late_us = received.lateness_us().unwrap();
            assert!(late_us >= 0, "{} us before it was due: {received:?}", -late_us);
            late.push(late_us as f64 / 1_000.0);
        }
    }
    late.sort_by(f64::total_cmp);
    late
}

fn at(late: &[f64], part: f64) -> f64 {
    late[((late.len() - 1) as f64 * part) as usize]
}

/// 30,000 tasks are due for a receiver that takes everything and answers nothing, nearly twice what a node may have out;
/// beside them 1,000 a second for one that works.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_hangs_delays_nobody_else() {
    let _alone = ALONE.lock().await;
    one_of_three(|| block_on(beside_one_that_hangs()));
}

async fn beside_one_that_hangs() -> Result<(), String> {
    const SECONDS: u64 = 4;
    let node = NodeProcess::start(&["--callback-timeout", "2s"]);
    let client = admin(&node).await;
    let (receiver, mut deliveries) = Receiver::channel("127.0.0.1:0", 100_000).await.unwrap();
    let works = Callback::new(Protocol::Tcp, &receiver.local_addr().to_string()).unwrap();
    let spread = || (0..SECONDS * 1_000).map(|n| 1_500 + n);
    let alone = register_many(&client, &works, spread()).await;
    let alone = lateness_ms(alone, &mut deliveries).await;
    // Connections are taken by the system, and nobody ever reads from them.
    let hanging = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let hangs = Callback::new(Protocol::Tcp, &hanging.local_addr().unwrap().to_string()).unwrap();
    let stuck = register_many(&client, &hangs, (0..30_000).map(|_| 0)).await;
    let beside = register_many(&client, &works, spread()).await;
    let beside = lateness_ms(beside, &mut deliveries).await;
    let counts = (node.metric("boomerang_in_flight"), node.metric("boomerang_waiting"));
    let seen = format!(
        "lateness alone p50 {:.2} p99 {:.2} max {:.2} ms; beside one that hangs p50 {:.2} p99 {:.2} max {:.2} ms; \
         out and waiting {counts:?}",
        at(&alone, 0.5),
        at(&alone, 0.99),
        at(&alone, 1.0),
        at(&beside, 0.5),
        at(&beside, 0.99),
        at(&beside, 1.0),
    );
    println!("{seen}");
    assert!(counts.1 > 10_000.0, "tasks for the one that hangs wait; out and waiting: {counts:?}");
    // None of those that hang is lost: each is still there, or has become a dead letter.
    let pending = node.metric("boomerang_pending");
    let dead = node.metric("boomerang_dead_letters");
    let all = stuck.len();
    assert!(pending + dead >= all as f64, "{pending} pending and {dead} dead of {all} tasks for the one that hangs");
    // A few milliseconds, also while all who waited are settled.
    let quick = at(&beside, 0.5) < at(&alone, 0.5) + 5.0 && at(&beside, 0.99) < at(&alone, 0.99) + 10.0;
    if quick { Ok(()) } else { Err(seen) }
}

/// Not even a dozen of them have all of a node between them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_receivers_that_hang_delay_nobody_else() {
    let _alone = ALONE.lock().await;
    let node = NodeProcess::start(&["--in-flight-max", "1000", "--destination-in-flight-max", "400"]);
    let client = admin(&node).await;
    let (receiver, mut deliveries) = Receiver::channel("127.0.0.1:0", 100_000).await.unwrap();
    let works = Callback::new(Protocol::Tcp, &receiver.local_addr().to_string()).unwrap();
    let mut hanging = Vec::new();
    for n in 0..12 {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        // Where each attempt needs no connection of its own, it may have hundreds out.
        let address = listener.local_addr().unwrap();
        let hangs = match n % 2 {
            0 => Callback::new(Protocol::Tcp, &address.to_string()).unwrap(),
            _ => Callback::new(Protocol::Grpc, &address.to_string()).unwrap(),
        };
        register_many(&client, &hangs, (0..1_000).map(|_| 0)).await;
        hanging.push(listener);
    }
    common::eventually("they take what they can", || (node.metric("boomerang_waiting") > 9_000.0).then_some(()));
    one_of_three(|| {
        let beside = block_on(register_many(&client, &works, (0..2_000).map(|n| 500 + n)));
        let beside = block_on(lateness_ms(beside, &mut deliveries));
        let seen = format!(
            "beside twelve that hang p50 {:.2} p99 {:.2} max {:.2} ms; out {}",
            at(&beside, 0.5),
            at(&beside, 0.99),
            at(&beside, 1.0),
            node.metric("boomerang_in_flight"),
        );
        println!("{seen}");
        // A few milliseconds, also beside other work.
        if at(&beside, 0.5) < 10.0 && at(&beside, 0.99) < 60.0 { Ok(()) } else { Err(seen) }
    });
}

/// Nobody listens. 5,000 tasks use up their attempts at the pace of their settings, and the node does not knock 15,000
/// times.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_receiver_uses_up_attempts_and_nothing_else() {
    let _alone = ALONE.lock().await;
    one_of_three(|| block_on(attempts_used_up()));
}

async fn attempts_used_up() -> Result<(), String> {
    const TASKS: usize = 5_000;
    let node = NodeProcess::start(&[]);
    let client = admin(&node).await;
    let dead = Callback::new(Protocol::Tcp, "127.0.0.1:1").unwrap();
    let began = Instant::now();
    register_many(&client, &dead, (0..TASKS as u64).map(|_| 100)).await;
    // Later by a whole round of the cool-down, which doubles, when a disk is slow to settle them.
    common::eventually_within(Duration::from_secs(120), "they are dead", || {
        let dead = node.metric("boomerang_dead_letters");
        if dead == TASKS as f64 { Ok(()) } else { Err(dead) }
    });
    let took = began.elapsed();
    println!("{TASKS} tasks of 3 attempts died within {took:?}");
    assert_eq!(node.metric("boomerang_failed_attempts_total"), (TASKS * 3) as f64, "each attempt is accounted for");
    let tried = node.metric("boomerang_dispatches_total");
    assert!(tried < (TASKS * 2) as f64, "most are not sent at all: {tried}");
    assert_eq!((node.metric("boomerang_waiting"), node.metric("boomerang_in_flight")), (0.0, 0.0));
    let left = client.list(TaskFilter::default()).await.unwrap().tasks;
    assert!(left.is_empty(), "tasks that are dead letters are no tasks any more: {left:?}");
    if took < Duration::from_secs(30) { Ok(()) } else { Err(format!("{took:?}")) }
}

/// A receiver that comes up again is served again, those that waited included.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_comes_back_is_served() {
    let _alone = ALONE.lock().await;
    let node = NodeProcess::start(&[]);
    let client = admin(&node).await;
    let address = common::node::free_address();
    let callback = Callback::new(Protocol::Tcp, &address).unwrap();
    let mut registration = task(&callback, 0);
    registration.settings.retry.as_mut().unwrap().attempts_max = 200;
    for _ in 0..200 {
        client.register(registration.clone()).await.unwrap();
    }
    common::eventually("they fail", || (node.metric("boomerang_failed_attempts_total") > 300.0).then_some(()));
    let (_receiver, mut deliveries) = Receiver::channel(&address, 1_000).await.unwrap();
    let mut seen = HashSet::new();
    while seen.len() < 200 {
        seen.insert(tokio::time::timeout(PATIENCE, deliveries.recv()).await.expect("served again").unwrap().task_id);
    }
    node.wait_for_metric("boomerang_pending", 0.0);
}

/// Every protocol, from one node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_protocol_brings_the_same() {
    let _alone = ALONE.lock().await;
    let node = NodeProcess::start(&[]);
    let client = admin(&node).await;
    for protocol in [Protocol::Tcp, Protocol::Grpc, Protocol::Http, Protocol::Udp] {
        let (receiver, mut deliveries) = Receiver::channel_of(protocol, "127.0.0.1:0", 100).await.unwrap();
        let address = receiver.local_addr();
        let endpoint = if protocol == Protocol::Http { format!("http://{address}/hook") } else { address.to_string() };
        let mut callback = Callback::new(protocol, &endpoint).unwrap();
        callback.options.acknowledge = protocol == Protocol::Udp;
        let tags = boomerang_task::Tags::new("nightly", []).unwrap();
        let registered = client.register(Registration { tags, ..task(&callback, 100) }).await.unwrap();
        let received = tokio::time::timeout(PATIENCE, deliveries.recv()).await.expect("it comes").unwrap();
        assert_eq!((received.protocol, received.task_id), (protocol, registered.task_id), "{received:?}");
        let which = (received.due_ms, received.attempt, received.occurrence);
        assert_eq!(which, (registered.due_ms, 1, 0), "due instant, attempt and occurrence by {protocol}");
        let whose = (received.client_id.as_str(), received.name.as_str());
        assert_eq!(whose, ("admin", "nightly"), "client and name by {protocol}");
        assert_eq!(received.payload.as_ref(), b"payload", "payload by {protocol}");
        assert!(
            received.fence.term > 0 && received.fence.seq > 0,
            "a delivery by {protocol} has a fence: {received:?}"
        );
        assert!(received.lateness_us().unwrap() >= 0, "before it was due, by {protocol}: {received:?}");
        node.wait_for_metric("boomerang_pending", 0.0);
    }
}
