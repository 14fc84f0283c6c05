//! A node that is killed loses nothing: what it acknowledged fires, none early, and what fires twice carries a larger
//! fence. Real processes, SIGKILL after any number of deliveries, counted from what a receiver saw.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use boomerang_client::{Client, Credentials, Due, Options, Registration};
use boomerang_receiver::{Received, Receiver};
use boomerang_task::{Callback, Fence, Protocol, Retry, TaskId};
use boomerang_testkit::seed;
use common::node::{ADMIN_PASSWORD, NodeProcess};
use common::{PATIENCE, now_ms};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::sync::mpsc;

const KILLS: usize = 22;
const DELIVERIES_BETWEEN_KILLS_MAX: usize = 500;
/// Registrations under way at a time while the node is being killed.
const LOADERS: usize = 8;
const ALL_FIRED_WITHIN: Duration = Duration::from_secs(60);

fn options(node: &NodeProcess, receiver: &Receiver) -> Options {
    let client_id = "admin".parse().unwrap();
    let password = ADMIN_PASSWORD.to_owned();
    let mut options = Options::new(vec![node.started.tcp.to_string()], Credentials::Password { client_id, password });
    options.callback = Some(Callback::new(Protocol::Tcp, &receiver.local_addr().to_string()).unwrap());
    options.retry = Some(Retry { attempts_max: 50, interval_ms: 50, interval_max_ms: 200, ..Retry::default() });
    options
}

/// What a receiver saw, and what that says about the promises.
#[derive(Default)]
struct Seen {
    deliveries: HashMap<(TaskId, u64), Vec<Fence>>,
    early: usize,
    duplicates: usize,
    /// Duplicates whose fence is not larger than that of the delivery before.
    unfenced: usize,
}

impl Seen {
    fn record(&mut self, received: &Received) {
        let fences = self.deliveries.entry((received.task_id, received.occurrence)).or_default();
        if let Some(before) = fences.last() {
            self.duplicates += 1;
            self.unfenced += usize::from(received.fence <= *before);
        }
        fences.push(received.fence);
        self.early += usize::from(received.lateness_us().expect("the due instant is told") < 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_random_instants_under_load() {
    let seed = seed::one();
    let mut rng = seed.rng();
    // A fixed port, so that the client finds the node again.
    let mut node = NodeProcess::start_on_a_fixed_port(&[]);
    let (receiver, mut deliveries) = Receiver::channel("127.0.0.1:0", 100_000).await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let unknown = Arc::new(AtomicU64::new(0));
    let (acknowledged_out, mut acknowledged_in) = mpsc::unbounded_channel();
    let loaders: Vec<_> = (0..LOADERS)
        .map(|n| {
            let (options, stop, unknown) = (options(&node, &receiver), stop.clone(), unknown.clone());
            let acknowledged = acknowledged_out.clone();
            let mut rng = StdRng::seed_from_u64(seed.wrapping_add(n as u64));
            tokio::spawn(async move {
                let client = loop {
                    match Client::connect(options.clone()).await {
                        Ok(client) => break client,
                        // The node is being killed from the first moment on.
                        Err(_) => tokio::task::yield_now().await,
                    }
                };
                while !stop.load(Ordering::Relaxed) {
                    let due = Due::In(rng.random_range(0..4_000));
                    let payload = bytes::Bytes::from_static(b"survivor");
                    let registration = Registration { payload, due, ..Default::default() };
                    match client.register(registration).await {
                        Ok(registered) => drop(acknowledged.send((registered.task_id, registered.due_ms))),
                        Err(_) => drop(unknown.fetch_add(1, Ordering::Relaxed)),
                    }
                }
            })
        })
        .collect();
    drop(acknowledged_out);

    let mut seen = Seen::default();
    let mut restarts = Vec::new();
    for _ in 0..KILLS {
        // What came before the kill says nothing about how far the node is now.
        while let Ok(received) = deliveries.try_recv() {
            seen.record(&received);
        }
        for _ in 0..rng.random_range(0..DELIVERIES_BETWEEN_KILLS_MAX) {
            let received = tokio::time::timeout(PATIENCE, deliveries.recv()).await;
            seen.record(&received.expect("tasks fire").unwrap());
        }
        node.kill();
        let began = Instant::now();
        tokio::task::block_in_place(|| node.restart());
        restarts.push(began.elapsed());
    }
    stop.store(true, Ordering::Relaxed);
    for loader in loaders {
        loader.await.unwrap();
    }
    let mut acknowledged = BTreeMap::new();
    while let Some((id, due_ms)) = acknowledged_in.recv().await {
        assert!(acknowledged.insert(id, due_ms).is_none(), "id {id} was given twice");
    }

    let mut missing = acknowledged.keys().filter(|id| !seen.deliveries.contains_key(&(**id, 0))).count();
    let deadline = Instant::now() + ALL_FIRED_WITHIN;
    while missing > 0 && Instant::now() < deadline {
        let Ok(Some(received)) = tokio::time::timeout(Duration::from_secs(10), deliveries.recv()).await else { break };
        let first = !seen.deliveries.contains_key(&(received.task_id, received.occurrence));
        missing -= usize::from(first && acknowledged.contains_key(&received.task_id));
        seen.record(&received);
    }
    restarts.sort();
    println!(
        "kills {KILLS}, acknowledged {}, unknown {}, fired {}, lost {missing}, early {}, duplicates {} (unfenced {}), \
         restart p50 {:?} max {:?}",
        acknowledged.len(),
        unknown.load(Ordering::Relaxed),
        seen.deliveries.len(),
        seen.early,
        seen.duplicates,
        seen.unfenced,
        restarts[restarts.len() / 2],
        restarts[restarts.len() - 1],
    );
    assert!(acknowledged.len() > 500, "{} tasks were accepted, which is no load", acknowledged.len());
    assert_eq!((missing, seen.early, seen.unfenced), (0, 0, 0), "lost, early, duplicates without a larger fence");
}

/// After a restart the overdue tasks leave first, each shard's in due order, before what has come due since.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overdue_tasks_leave_in_due_order() {
    // Each shard in turn gets some hundreds.
    const TASKS: u64 = 9_000;
    let mut node = NodeProcess::start_on_a_fixed_port(&[]);
    let (receiver, mut deliveries) = Receiver::channel("127.0.0.1:0", 10_000).await.unwrap();
    let client = Client::connect(options(&node, &receiver)).await.unwrap();
    let mut pending = Vec::new();
    for n in 0..TASKS {
        // Far enough ahead that none fires before the kill, and not in the order of registration.
        let due = Due::In(3_600_000 + (n * 7_919) % 1_000);
        let registration = Registration { payload: bytes::Bytes::new(), due, ..Default::default() };
        pending.push(client.register_nowait(registration).await.unwrap());
    }
    let mut last_due_ms = 0;
    for registered in pending {
        last_due_ms = last_due_ms.max(registered.await.unwrap().due_ms);
    }
    node.kill();
    assert!(deliveries.try_recv().is_err(), "nothing has fired yet");
    // All of them are overdue when the node is back.
    let away = Duration::from_millis(last_due_ms + 100 - now_ms());
    tokio::task::block_in_place(|| node.restart_after(away));
    let mut by_shard: HashMap<u16, Vec<(Fence, u64)>> = HashMap::new();
    for _ in 0..TASKS {
        let received = tokio::time::timeout(Duration::from_secs(20), deliveries.recv()).await;
        let received = received.expect("all of them fire").unwrap();
        by_shard.entry(received.task_id.shard().0).or_default().push((received.fence, received.due_ms));
    }
    assert_eq!(by_shard.len(), 16, "they were spread over all shards");
    for (shard, mut dispatched) in by_shard {
        // The fence says in which order they left.
        dispatched.sort();
        let overtaken: Vec<_> = dispatched.windows(2).filter(|pair| pair[0].1 > pair[1].1).collect();
        assert!(overtaken.is_empty(), "shard {shard}, of {}: {overtaken:?}", dispatched.len());
    }
}

/// An answer means that it is on disk: the log as it was synced is all that is left, and the task is still there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acknowledged_task_is_there_after_the_next_start() {
    let mut node = NodeProcess::start_on_a_fixed_port(&[]);
    let (receiver, _deliveries) = Receiver::channel("127.0.0.1:0", 10).await.unwrap();
    let client = Client::connect(options(&node, &receiver)).await.unwrap();
    for round in 0..5u64 {
        let registration = Registration {
            payload: bytes::Bytes::from(format!("{round}")),
            due: Due::In(3_600_000),
            ..Default::default()
        };
        let registered = client.register(registration).await.unwrap();
        node.kill();
        tokio::task::block_in_place(|| node.restart());
        let task = client.get(registered.task_id).await.unwrap().expect("an accepted task is still there");
        let expected = (registered.due_ms, bytes::Bytes::from(format!("{round}")));
        assert_eq!((task.due_ms, task.payload), expected, "due instant and payload of an accepted task, after a kill");
    }
}
