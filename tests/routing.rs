//! Three nodes, and a client that is connected to one of them: whatever it asks for is done by whoever leads it. Clients
//! of the original protocol notice nothing of it; those that follow redirects are told where to go; and the Rust client
//! does not notice when a leader dies.

mod common;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use boomerang_client::{Cancelled, Client, ClientError, Credentials, Dedup, Due, Options, Registration, TaskFilter};
use boomerang_receiver::Receiver;
use boomerang_task::{Callback, DedupHash, Protocol, TaskId};
use boomerang_wire::proto::{self, Status, boomerang_envelope::Payload};
use common::cluster::SHARDS;
use common::legacy::{self, ERROR, ListTasksRequest, OK, SESSION_EXPIRED};
use common::node::ADMIN_PASSWORD;
use common::trio::{Extended, Trio};
use common::{PATIENCE, eventually, http_get};

const HOUR_MS: u64 = 3_600_000;

fn shard_of(task_id: &str) -> u32 {
    u32::from(task_id.parse::<TaskId>().unwrap().shard().0)
}

/// Whatever it registers at one node, it finds, lists and cancels at each, wherever it lives.
#[test]
fn a_client_of_the_original_protocol_is_served_by_any_node() {
    let trio = Trio::start();
    let mut clients: Vec<legacy::Client> = trio.nodes.iter().map(|node| node.admin()).collect();
    clients[0].add_client("orders", "127.0.0.1:9", None);
    // Two nodes may not have heard of it yet, and ask.
    let mut orders: Vec<legacy::Client> = trio
        .nodes
        .iter()
        .map(|node| legacy::Client::login(node.started.tcp, "orders", &legacy::password_of("orders")))
        .collect();

    // Those that come within a moment may all go to one shard of the node.
    let mut tasks = BTreeMap::new();
    let mut shards = BTreeSet::new();
    let deadline = Instant::now() + PATIENCE;
    while tasks.len() < 60 || shards.len() < usize::from(SHARDS) {
        assert!(Instant::now() < deadline, "{} tasks, and all of them in {shards:?}", tasks.len());
        let n = tasks.len() as u64;
        let payload = format!("task {n}");
        // Due far apart and not in the order in which they are registered.
        let (task_id, due_ms) = orders[n as usize % 3].throw(payload.as_bytes(), HOUR_MS + (n * 37) % 60 * 1_000);
        shards.insert(shard_of(&task_id));
        tasks.insert(task_id, (payload, due_ms));
    }

    for client in &mut orders {
        for limit in [7, 0] {
            let listed = client.list_all(&ListTasksRequest { limit, ..Default::default() });
            assert_eq!(listed.len(), tasks.len(), "tasks of all shards, in pages of {limit}");
            let due: Vec<u64> = listed.iter().map(|task| task.expiration_ms).collect();
            assert!(due.is_sorted(), "in due order across all shards: {due:?}");
            let changed = listed.iter().find(|task| tasks[&task.task_id].0.as_bytes() != task.payload);
            assert_eq!(changed, None, "a task with another payload than was registered");
        }
        for (task_id, (payload, due_ms)) in &tasks {
            let task = client.get(task_id).task.expect("a task is found at any node");
            let found = (task.payload.as_slice(), task.expiration_ms);
            assert_eq!(found, (payload.as_bytes(), *due_ms), "payload and due instant as they were registered");
        }
    }
    for (n, task_id) in tasks.keys().enumerate() {
        // By a node that leads it, or by one that does not.
        assert_eq!(orders[n % 3].cancel(task_id).status, OK, "a task is cancelled at any node");
        assert_eq!(orders[(n + 1) % 3].get(task_id).status, ERROR, "a cancelled task is found at no node");
        assert_eq!(orders[(n + 2) % 3].cancel(task_id).status, ERROR, "a cancelled task is cancelled again at no node");
    }
    let left = orders[1].list_all(&ListTasksRequest::default());
    assert_eq!(left, [], "tasks after all were cancelled");
    let forwarded: f64 = trio.nodes.iter().map(|node| node.metric("boomerang_forwarded_total")).sum();
    assert!(forwarded > 0.0, "no node has forwarded a request, so nothing was tested");

    a_removed_client_is_out_everywhere(&mut clients, &mut orders);
}

fn a_removed_client_is_out_everywhere(admins: &mut [legacy::Client], orders: &mut [legacy::Client]) {
    for client in orders.iter_mut() {
        assert_eq!(client.refresh().status, OK, "the session of a client before it is removed");
    }
    // By a node that need not lead the cluster's own group.
    assert_eq!(admins[2].remove_client("orders").status, OK, "a client is removed at any node");
    for client in orders {
        eventually("the session ends on every node", || (client.refresh().status == SESSION_EXPIRED).then_some(()));
    }
}

fn task(payload: &str) -> proto::Task {
    let callback = proto::CallbackConfig { endpoint: "127.0.0.1:9".into(), ..Default::default() };
    proto::Task {
        payload: payload.to_owned().into(),
        delay_ms: HOUR_MS,
        callback: Some(callback),
        ..Default::default()
    }
}

fn registered(answer: Payload) -> proto::RegistrationResponse {
    match answer {
        Payload::RegistrationResponse(answer) => answer,
        other => panic!("not the answer to a registration: {other:?}"),
    }
}

/// Told at once where to go, and served there; a client that does not want to be told is served where it is.
#[test]
fn a_client_that_follows_redirects_is_told_where_to_go() {
    let trio = Trio::start();
    let leaders = trio.leaders(1).unwrap();
    let mut sessions: Vec<Extended> = (0..3).map(|node| trio.extended(node, true)).collect();
    assert_eq!((sessions[0].session.nodes, sessions[0].session.client_id.as_str()), (3, "admin"));
    let admin = "admin".parse().unwrap();
    for n in 0..30 {
        let key = format!("key {n}");
        let shard = u32::from(DedupHash::new(&admin, &key).unwrap().shard(SHARDS).0);
        let leader = leaders[&shard];
        let keyed = proto::Task { dedup_key: key, ..task("keyed") };
        for step in 1..=2 {
            let answer = registered(sessions[(leader + step) % 3].ask(Payload::RegistrationRequest(keyed.clone())));
            let detail = answer.detail.as_ref().expect("what is known");
            assert_eq!((answer.status(), detail.shard), (Status::NotLeader, shard), "{}", answer.error_message);
            assert_eq!(
                detail.leader_address,
                trio.nodes[leader].started.tcp.to_string(),
                "the address of shard {shard}"
            );
            assert!(detail.term > 0, "a leader has a term: {detail:?}");
        }
        let first = registered(sessions[leader].ask(Payload::RegistrationRequest(keyed.clone())));
        assert_eq!((first.status(), shard_of(&first.task_id)), (Status::Ok, shard), "{first:?}");
        // By a node that forwards: the same task.
        let mut other = trio.extended((leader + 1) % 3, false);
        let again = registered(other.ask(Payload::RegistrationRequest(keyed)));
        let found = (again.status(), again.duplicate, &again.task_id);
        assert_eq!(found, (Status::Ok, true, &first.task_id), "the same key, at a node that forwards: {again:?}");
        // By its id.
        let get = proto::GetTaskRequest { task_id: first.task_id, ..Default::default() };
        for (node, session) in sessions.iter_mut().enumerate() {
            let answer = session.ask(Payload::GetTaskRequest(get.clone()));
            let Payload::GetTaskResponse(answer) = answer else { panic!("not a task: {answer:?}") };
            let expected = if node == leader { Status::Ok } else { Status::NotLeader };
            assert_eq!(answer.status(), expected, "node {node}, while {leader} leads: {}", answer.error_message);
        }
    }
    a_batch_goes_to_all_who_lead(&trio);
    cancellations_go_to_all_who_lead(&trio);
    the_map_is_the_same_over_http(&trio, &leaders);
}

fn a_batch_goes_to_all_who_lead(trio: &Trio) {
    let tasks = (0..200).map(|n| {
        let dedup_key = if n % 2 == 0 { format!("batch {n}") } else { String::new() };
        proto::Task { dedup_key, ..task(&n.to_string()) }
    });
    let batch = proto::RegistrationBatch { tasks: tasks.collect(), origin: None };
    let mut ids: Vec<Vec<String>> = Vec::new();
    for node in 0..3 {
        let answer = registered_batch(trio.extended(node, false).ask(Payload::RegistrationBatch(batch.clone())));
        assert_eq!((answer.status(), answer.responses.len()), (Status::Ok, 200), "{}", answer.error_message);
        let bad: Vec<_> = answer.responses.iter().filter(|answer| answer.status() != Status::Ok).collect();
        assert!(bad.is_empty(), "tasks of a batch were refused by node {node}: {bad:?}");
        ids.push(answer.responses.into_iter().map(|answer| answer.task_id).collect());
    }
    let [first, second, third] = <[_; 3]>::try_from(ids).unwrap();
    for (place, ((one, two), three)) in first.iter().zip(&second).zip(&third).enumerate() {
        let same = one == two && two == three;
        assert_eq!(
            same,
            place % 2 == 0,
            "whether task {place} is the same each time: those with a key are, others not"
        );
    }
}

fn registered_batch(answer: Payload) -> proto::RegistrationBatchResponse {
    match answer {
        Payload::RegistrationBatchResponse(answer) => answer,
        other => panic!("not the answer to a batch of registrations: {other:?}"),
    }
}

fn cancelled_batch(answer: Payload) -> proto::CancellationBatchResponse {
    match answer {
        Payload::CancellationBatchResponse(answer) => answer,
        other => panic!("not the answer to a batch of cancellations: {other:?}"),
    }
}

fn cancellations(answer: Payload) -> Vec<proto::CancellationResponse> {
    let answer = cancelled_batch(answer);
    assert_eq!(answer.status(), Status::Ok, "a batch of cancellations as a whole: {}", answer.error_message);
    answer.responses
}

/// Each is done once, by whichever node it is asked for; who follows redirects is told of the others.
fn cancellations_go_to_all_who_lead(trio: &Trio) {
    let tasks = (0..120).map(|n| proto::Task { dedup_key: format!("cancel {n}"), ..task(&n.to_string()) });
    let batch = proto::RegistrationBatch { tasks: tasks.collect(), origin: None };
    let answer = registered_batch(trio.extended(0, false).ask(Payload::RegistrationBatch(batch)));
    let ids: Vec<String> = answer.responses.into_iter().map(|answer| answer.task_id).collect();
    let ask = |node, redirects, task_ids: &[String]| {
        let task_ids = task_ids.to_vec();
        let request = Payload::CancellationBatch(proto::CancellationBatch { task_ids });
        trio.extended(node, redirects).ask(request)
    };
    let leaders = trio.leaders(0).unwrap();
    // A part of them at each node, with one among them that is no id.
    for (node, ids) in ids.chunks(30).take(2).enumerate() {
        let mut asked = ids.to_vec();
        asked.insert(7, "nonsense".into());
        let answers = cancellations(ask(node, false, &asked));
        assert_eq!(answers.len(), asked.len(), "answers to a batch of cancellations");
        for (place, answer) in answers.iter().enumerate() {
            let expected = if place == 7 { Status::InvalidRequest } else { Status::Ok };
            assert_eq!(answer.status(), expected, "{place}: {}", answer.error_message);
        }
        let again = cancellations(ask(2, false, &asked));
        let explained = again.iter().filter(|answer| !answer.error_message.is_empty()).count();
        assert_eq!(explained, 2, "each status once: {again:?}");
        let gone = again.iter().filter(|answer| answer.status() == Status::NotFound).count();
        assert_eq!(gone, ids.len(), "cancelled tasks that are not found when they are cancelled again: {again:?}");
    }
    let mut left = ids[60..].to_vec();
    for node in 0..3 {
        let answers = cancellations(ask(node, true, &left));
        let mut missed = Vec::new();
        for (id, answer) in left.into_iter().zip(answers) {
            let leader = leaders[&shard_of(&id)];
            if leader == node {
                assert_eq!(answer.status(), Status::Ok, "{}", answer.error_message);
                continue;
            }
            assert_eq!(answer.status(), Status::NotLeader, "task {id} at node {node}: {}", answer.error_message);
            let address = answer.detail.unwrap().leader_address;
            assert_eq!(address, trio.nodes[leader].started.tcp.to_string(), "where task {id} is led");
            missed.push(id);
        }
        left = missed;
    }
    assert!(left.is_empty(), "no node leads these tasks: {left:?}");
    let too_many = vec![ids[0].clone(); 10_001];
    let answer = cancelled_batch(ask(0, false, &too_many));
    assert_eq!((answer.status(), answer.responses.len()), (Status::InvalidRequest, 0), "10,001 cancellations");
    assert!(answer.error_message.starts_with("task_ids: 10001"), "{}", answer.error_message);
    let answer = cancelled_batch(ask(0, false, &too_many[1..]));
    let found = (answer.status(), answer.responses.len());
    assert_eq!(found, (Status::Ok, 10_000), "10,000 cancellations: {}", answer.error_message);
}

fn the_map_is_the_same_over_http(trio: &Trio, leaders: &BTreeMap<u32, usize>) {
    for (node, process) in trio.nodes.iter().enumerate() {
        let (status, body) = http_get(process.started.http, "/v1/shards");
        let map: serde_json::Value = serde_json::from_str(&body).unwrap();
        let found = (status, map["shards"].as_array().unwrap().len());
        assert_eq!(found, (200, usize::from(SHARDS)), "status and number of shards of node {node}: {body}");
        assert_eq!(http_get(process.started.http, "/readyz").0, 200, "a follower is ready too");
        for (shard, leader) in leaders {
            assert_eq!(map["shards"][*shard as usize]["node"], *leader as u64 + 1, "leader of shard {shard}: {map}");
            let (status, body) = http_get(process.started.http, &format!("/v1/shards/{shard}/leader"));
            assert_eq!(status, if node == *leader { 200 } else { 307 }, "node {node}, while {leader} leads: {body}");
        }
        assert_eq!(http_get(process.started.http, "/v1/shards/99/leader").0, 404, "the leader of no shard");
    }
}

fn options(trio: &Trio, nodes: &[usize], receiver: &Receiver) -> Options {
    let credentials =
        Credentials::Password { client_id: "admin".parse().unwrap(), password: ADMIN_PASSWORD.to_owned() };
    let addresses = nodes.iter().map(|node| trio.nodes[*node].started.tcp.to_string()).collect();
    let mut options = Options::new(addresses, credentials);
    options.callback = Some(Callback::new(Protocol::Tcp, &receiver.local_addr().to_string()).unwrap());
    options.request_timeout = PATIENCE;
    options
}

fn in_ms(payload: String, delay_ms: u64) -> Registration {
    Registration { payload: payload.into(), due: Due::In(delay_ms), ..Default::default() }
}

/// A leader is killed while thousands are under way, by ones and in batches. The caller sees no error; each is stored
/// once, is found by whatever node is left, and fires.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_leader_dies_and_the_rust_client_does_not_notice() {
    const TASKS: usize = 6_000;
    const BATCHES: usize = 20;
    const BATCH: usize = 100;
    let mut trio = tokio::task::spawn_blocking(Trio::start).await.unwrap();
    let (receiver, mut deliveries) = Receiver::channel("127.0.0.1:0", 100_000).await.unwrap();
    let client = Arc::new(Client::connect(options(&trio, &[0], &receiver)).await.unwrap());
    let due = |n: usize| 8_000 + (n as u64 * 7) % 4_000;

    let mut pending = Vec::new();
    for n in 0..TASKS {
        if n == TASKS / 2 {
            // Also the node the client knows of by itself; the rest it has learned.
            trio.nodes[0].kill();
        }
        pending.push(client.register_nowait(in_ms(n.to_string(), due(n))).await.unwrap());
    }
    let mut batches = Vec::new();
    for batch in 0..BATCHES {
        let tasks = (0..BATCH).map(|n| in_ms(format!("{batch}.{n}"), due(n)));
        batches.push(client.register_batch_nowait(tasks.collect()).await.unwrap());
    }
    let mut expected: HashMap<TaskId, String> = HashMap::new();
    let started = Instant::now();
    for (n, pending) in pending.into_iter().enumerate() {
        let found = pending.await.unwrap_or_else(|error| panic!("task {n}: {error}"));
        assert!(!found.duplicate, "task {n} is the first with its number, and yet a duplicate: {found:?}");
        assert_eq!(expected.insert(found.task_id, n.to_string()), None, "one id for two tasks");
    }
    for (batch, pending) in batches.into_iter().enumerate() {
        for (n, found) in pending.await.unwrap().into_iter().enumerate() {
            let found = found.unwrap_or_else(|error| panic!("batch {batch}, task {n}: {error}"));
            expected.insert(found.task_id, format!("{batch}.{n}"));
        }
    }
    println!("all {} stored {:?} after the last was sent", expected.len(), started.elapsed());
    assert_eq!(expected.len(), TASKS + BATCHES * BATCH, "ids of all tasks that were registered");

    let mut came: HashMap<String, BTreeSet<(TaskId, u64)>> = HashMap::new();
    let mut open: HashMap<TaskId, String> = expected.clone();
    while !open.is_empty() {
        let received = tokio::time::timeout(PATIENCE, deliveries.recv()).await;
        let received = received.unwrap_or_else(|_| panic!("{} did not fire", open.len())).unwrap();
        let payload = String::from_utf8(received.payload.to_vec()).unwrap();
        assert_eq!(expected.get(&received.task_id), Some(&payload), "a task whose id nobody was given: {received:?}");
        open.remove(&received.task_id);
        came.entry(payload).or_default().insert((received.task_id, received.occurrence));
    }
    // Two tasks with one payload would be one registration that was stored twice.
    let twice = came.iter().find(|(_, tasks)| tasks.len() > 1);
    assert_eq!(twice, None, "a registration that was stored twice");
    assert_eq!(came.len(), expected.len(), "payloads that came");
}

/// Every request of the Rust client, against a cluster of which it knows one node, before and after a failover.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_rust_client_finds_everything_again_after_a_failover() {
    let mut trio = tokio::task::spawn_blocking(Trio::start).await.unwrap();
    let (receiver, _deliveries) = Receiver::channel("127.0.0.1:0", 1_000).await.unwrap();
    let client = Client::connect(options(&trio, &[1], &receiver)).await.unwrap();
    let mut ids = Vec::new();
    for n in 0..40 {
        let dedup = (n % 2 == 0).then(|| Dedup { key: format!("k{n}"), ttl_ms: None });
        let registration = Registration { dedup, ..in_ms(n.to_string(), HOUR_MS) };
        ids.push(client.register(registration).await.unwrap().task_id);
    }
    trio.nodes[2].kill();
    let killed = Instant::now();
    for id in &ids {
        assert_eq!(
            client.get(*id).await.unwrap().map(|task| task.task_id),
            Some(*id),
            "a task after a leader is killed"
        );
    }
    println!("all {} were found {:?} after the kill", ids.len(), killed.elapsed());
    let again = Registration { dedup: Some(Dedup { key: "k0".into(), ttl_ms: None }), ..in_ms("0".into(), HOUR_MS) };
    let again = client.register(again).await.unwrap();
    assert!(again.duplicate && again.task_id == ids[0], "the caller's own key: {again:?}");
    let filter = TaskFilter { limit: 1_000, ..Default::default() };
    assert_eq!(client.list(filter.clone()).await.unwrap().tasks.len(), ids.len(), "tasks after a leader is killed");
    // Some by one message, which goes to whoever leads them by now.
    let (together, ids) = ids.split_at(20);
    let cancelled = client.cancel_batch(together).await.unwrap();
    assert!(cancelled.iter().all(|result| matches!(result, Ok(Cancelled::Cancelled))), "{cancelled:?}");
    for id in ids {
        // Between the kill and the next leader a cancellation is not sent twice; by now there is one.
        match client.cancel(*id).await {
            Ok(cancelled) => assert_eq!(cancelled, Cancelled::Cancelled),
            Err(ClientError::ConnectionLost { .. }) => panic!("nothing was lost since"),
            Err(error) => panic!("{error}"),
        }
    }
    let left = client.list(filter).await.unwrap().tasks;
    assert!(left.is_empty(), "tasks after all were cancelled: {left:?}");
    // The node that is left over leads with the other one, and comes back as a follower.
    trio.nodes[2].restart();
    let asked = Duration::from_secs(30);
    tokio::time::timeout(asked, async { while client.register(in_ms("more".into(), HOUR_MS)).await.is_err() {} })
        .await
        .unwrap();
}
