//! What fires, whatever others do: a real node, its client and a receiver.

mod common;

use std::collections::HashSet;
use std::time::Duration;

use boomerang_client::{Cancelled, Client, ClientSettings, Credentials, Due, Options, Registration};
use boomerang_receiver::Receiver;
use boomerang_task::{Callback, Protocol};
use common::PATIENCE;
use common::node::{ADMIN_PASSWORD, NodeProcess};

fn options(node: &NodeProcess, receiver: &Receiver, client: &str, password: &str) -> Options {
    let credentials = Credentials::Password { client_id: client.parse().unwrap(), password: password.to_owned() };
    let mut options = Options::new(vec![node.started.tcp.to_string()], credentials);
    options.callback = Some(Callback::new(Protocol::Tcp, &receiver.local_addr().to_string()).unwrap());
    options
}

fn in_ms(delay_ms: u64) -> Registration {
    Registration { payload: bytes::Bytes::from_static(b"mine"), due: Due::In(delay_ms), ..Default::default() }
}

/// A cancellation that the state refuses must not keep the task in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_fires_though_a_stranger_cancelled_it() {
    let node = NodeProcess::start(&[]);
    let (receiver, mut deliveries) = Receiver::channel("127.0.0.1:0", 100).await.unwrap();
    let admin = Client::connect(options(&node, &receiver, "admin", ADMIN_PASSWORD)).await.unwrap();
    let stranger = ClientSettings::new("stranger".parse().unwrap(), "secret");
    admin.register_client(stranger).await.unwrap();
    let stranger = Client::connect(options(&node, &receiver, "stranger", "secret")).await.unwrap();
    let mut expected = HashSet::new();
    for n in 0..20 {
        let registered = admin.register(in_ms(1_000 + 10 * n)).await.unwrap();
        let refused = stranger.cancel(registered.task_id).await.unwrap();
        assert_eq!(refused, Cancelled::NotFound, "a stranger does not find a task that it cancels");
        expected.insert(registered.task_id);
    }
    let own = admin.register(in_ms(1_000)).await.unwrap();
    assert_eq!(
        admin.cancel(own.task_id).await.unwrap(),
        Cancelled::Cancelled,
        "its owner cancels a task before it is due"
    );
    while !expected.is_empty() {
        let received = tokio::time::timeout(PATIENCE, deliveries.recv()).await.expect("they fire").unwrap();
        assert!(
            expected.remove(&received.task_id),
            "a task came twice, or though its owner cancelled it: {received:?}"
        );
    }
    assert_eq!(admin.cancel(own.task_id).await.unwrap(), Cancelled::NotFound, "a cancelled task is gone");
}

/// Far more tasks than the wheels may hold: the window is short, is read on again and again, and nobody is left out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wheels_that_are_full_leave_nobody_out() {
    const TASKS: u64 = 20_000;
    let node = NodeProcess::start(&["--timers-max", "1000"]);
    let (receiver, mut deliveries) = Receiver::channel("127.0.0.1:0", 100_000).await.unwrap();
    let client = Client::connect(options(&node, &receiver, "admin", ADMIN_PASSWORD)).await.unwrap();
    let mut pending = Vec::new();
    for n in 0..TASKS {
        // Not in due order, and from soon to later.
        pending.push(client.register_nowait(in_ms(1_000 + (n * 7_919) % 5_000)).await.unwrap());
    }
    let mut expected = HashSet::new();
    for registered in pending {
        expected.insert(registered.await.unwrap().task_id);
    }
    let mut worst = Duration::ZERO;
    while !expected.is_empty() {
        let received = tokio::time::timeout(PATIENCE, deliveries.recv()).await;
        let received = received.unwrap_or_else(|_| panic!("{} did not fire", expected.len())).unwrap();
        let late_us = received.lateness_us().expect("the due instant is told");
        worst = worst.max(Duration::from_micros(u64::try_from(late_us).expect("none is early")));
        expected.remove(&received.task_id);
    }
    println!("{TASKS} tasks through wheels of 1,000 timers, the worst {worst:?} late");
}
