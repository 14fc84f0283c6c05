//! The whole life of a task, as a client and a receiver see it: a real node, real sockets, real restarts.

mod common;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use boomerang_client::{
    Client, ClientSettings, Credentials, DeadLetter, DeadLetterChoice, DeadLetterFilter, Dedup, Due, Options,
    OwnSettings, PastOccurrence, Registered, Registration, TaskFilter, TaskUpdate, TaskView, Updated,
};
use boomerang_receiver::{Answer, Received, Receiver, Reply};
use boomerang_task::{
    Backoff, Callback, ClientLimits, FailureClass, Missed, Protocol, Recurrence, Retry, Tags, TaskId,
};
use boomerang_wire::proto::occurrence::Outcome;
use boomerang_wire::proto::{Status, TaskState};
use bytes::Bytes;
use common::node::{ADMIN_PASSWORD, NodeProcess};
use common::{LATENESS_MAX_MS, PATIENCE, now_ms, until};
use tokio::sync::mpsc;

fn options(node: &NodeProcess, client: &str, password: &str) -> Options {
    let credentials = Credentials::Password { client_id: client.parse().unwrap(), password: password.to_owned() };
    Options::new(vec![node.started.tcp.to_string()], credentials)
}

async fn admin(node: &NodeProcess) -> Client {
    Client::connect(options(node, "admin", ADMIN_PASSWORD)).await.unwrap()
}

/// A client that is no administrator.
async fn plain_client(node: &NodeProcess, admin: &Client, name: &str, limits: ClientLimits) -> Client {
    let settings = ClientSettings { limits, ..ClientSettings::new(name.parse().unwrap(), "secret") };
    admin.register_client(settings).await.unwrap();
    Client::connect(options(node, name, "secret")).await.unwrap()
}

fn to(endpoint: &str) -> Callback {
    Callback::new(Protocol::Tcp, endpoint).unwrap()
}

/// Where nobody listens.
const NOWHERE: &str = "127.0.0.1:1";
const HOUR_MS: u64 = 3_600_000;

fn tries(attempts_max: u32, interval_ms: u64) -> Retry {
    let interval_max_ms = interval_ms;
    Retry { attempts_max, backoff: Backoff::Fixed, interval_ms, interval_max_ms, jitter_percent: 0 }
}

fn task(callback: Callback, retry: Retry, delay_ms: u64) -> Registration {
    Registration {
        payload: Bytes::from_static(b"payload"),
        due: Due::In(delay_ms),
        settings: OwnSettings { callback: Some(callback), retry: Some(retry), dead_letters: None },
        ..Registration::default()
    }
}

fn named(name: &str, label: Option<(&str, &str)>) -> Tags {
    Tags::new(name, label.map(|(key, value)| (key.to_owned(), value.to_owned()))).unwrap()
}

async fn letters(client: &Client, filter: &DeadLetterFilter) -> Vec<DeadLetter> {
    let mut all = Vec::new();
    let mut token = String::new();
    loop {
        let page = client.list_dead_letters(filter, 3, &token).await.unwrap();
        assert!(page.dead_letters.len() <= 3, "{} dead letters on a page of 3", page.dead_letters.len());
        all.extend(page.dead_letters);
        match page.next_token {
            Some(next) => token = next,
            None => return all,
        }
    }
}

async fn list(client: &Client, filter: TaskFilter) -> Vec<TaskView> {
    let mut all = Vec::new();
    let mut filter = TaskFilter { limit: 4, ..filter };
    loop {
        let page = client.list(filter.clone()).await.unwrap();
        all.extend(page.tasks);
        match page.next_token {
            Some(token) => filter.token = token,
            None => return all,
        }
    }
}

async fn past(client: &Client, id: TaskId) -> Vec<PastOccurrence> {
    client.get_with_history(id).await.unwrap().map_or_else(Vec::new, |found| found.past)
}

async fn next(deliveries: &mut mpsc::Receiver<Received>) -> Received {
    tokio::time::timeout(PATIENCE, deliveries.recv()).await.expect("something is delivered").unwrap()
}

/// A receiver of one's own answers; what it is asked comes out of the channel.
async fn receiver(
    answer: impl Fn(&Received) -> Answer + Send + Sync + 'static,
) -> (Receiver, Callback, mpsc::UnboundedReceiver<Received>) {
    let (out, deliveries) = mpsc::unbounded_channel();
    let handler = move |received: &Received| {
        let _ = out.send(received.clone());
        answer(received)
    };
    let receiver = Receiver::bind("127.0.0.1:0", handler).await.unwrap();
    let callback = to(&receiver.local_addr().to_string());
    (receiver, callback, deliveries)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attempts_and_their_failures_survive_a_restart() {
    let mut node = NodeProcess::start_on_a_fixed_port(&[]);
    let client = admin(&node).await;
    let registered = client.register(task(to(NOWHERE), tries(4, 700), 0)).await.unwrap();
    let second = until("the first attempt has failed", async || {
        client.get(registered.task_id).await.unwrap().filter(|task| task.attempt == 2)
    });
    let second = second.await;
    let failure = second.last_failure.expect("it says why");
    assert_eq!((failure.class, second.state), (Some(FailureClass::Refused), TaskState::Retrying), "{failure:?}");
    assert!(failure.text.contains(NOWHERE), "{failure:?}");
    node.kill();
    tokio::task::block_in_place(|| node.restart());
    let after = client.get(registered.task_id).await.unwrap().expect("a task that is retried is still there");
    assert!(after.attempt >= 2 && after.last_failure.is_some(), "an attempt was forgotten by the restart: {after:?}");
    let all =
        until("it dies", async || Some(letters(&client, &Default::default()).await).filter(|all| !all.is_empty()));
    let letter = all.await.remove(0);
    assert_eq!((letter.task_id, letter.attempts), (registered.task_id, 4), "the attempts before the kill count");
    let class = letter.failure.unwrap().class;
    assert_eq!(class, Some(FailureClass::Refused), "why a task is dead whose receiver nobody is");
    assert_eq!(client.get(registered.task_id).await.unwrap(), None, "a task that is a dead letter is gone");
    let past = past(&client, registered.task_id).await;
    assert_eq!((past.len(), past[0].outcome, past[0].attempts), (1, Outcome::Dead, 4), "its history: {past:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_letters_are_listed_replayed_and_purged() {
    let mut node = NodeProcess::start_on_a_fixed_port(&[]);
    let client = admin(&node).await;
    let stranger = plain_client(&node, &client, "stranger", ClientLimits::default()).await;
    let alive = Arc::new(AtomicUsize::new(0));
    let is_alive = alive.clone();
    let (_receiver, callback, mut deliveries) = receiver(move |_| match is_alive.load(Ordering::Relaxed) {
        0 => Reply::refuse("not now").into(),
        _ => Reply::Accept.into(),
    })
    .await;
    let mut ids = HashSet::new();
    for n in 0..10 {
        let tags = named(if n < 4 { "even" } else { "odd" }, None);
        let registered =
            client.register(Registration { tags, ..task(callback.clone(), tries(1, 0), 0) }).await.unwrap();
        ids.insert(registered.task_id);
    }
    let refused = client.register(task(to(NOWHERE), tries(1, 0), 0)).await.unwrap();
    let all = until("all of them die", async || {
        Some(letters(&client, &Default::default()).await).filter(|all| all.len() == 11)
    })
    .await;
    assert!(all.is_sorted_by_key(|letter| letter.died_ms), "dead letters are listed as they died: {all:?}");
    let by = async |filter: DeadLetterFilter| -> Vec<TaskId> {
        letters(&client, &filter).await.into_iter().map(|letter| letter.task_id).collect()
    };
    let even = by(DeadLetterFilter { name_prefix: "ev".into(), ..Default::default() }).await;
    assert_eq!(even.len(), 4, "dead letters by the beginning of their names");
    let class = Some(FailureClass::Refused);
    let of_class = by(DeadLetterFilter { class, ..Default::default() }).await;
    assert_eq!(of_class, [refused.task_id], "dead letters that nobody took");
    let task_id = Some(refused.task_id);
    let of_task = by(DeadLetterFilter { task_id, ..Default::default() }).await;
    assert_eq!(of_task, [refused.task_id], "dead letters of one task");
    let middle = Some(all[5].died_ms);
    let early = by(DeadLetterFilter { died_before_ms: middle, ..Default::default() }).await;
    let late = by(DeadLetterFilter { died_after_ms: middle, ..Default::default() }).await;
    assert_eq!(early.len() + late.len(), 11, "those that died before an instant and those after it are all there are");

    // What belongs to others is not there for a stranger.
    assert_eq!(letters(&stranger, &Default::default()).await, [], "dead letters that a stranger sees");
    assert_eq!(stranger.get_dead_letter(all[0].id).await.unwrap(), None, "a dead letter that a stranger asks for");
    let one = DeadLetterChoice::Ids(vec![all[0].id]);
    let replayed = stranger.replay_dead_letters(&one, 0, "").await.unwrap().replayed;
    assert_eq!(replayed[0].task_id, None, "a dead letter that a stranger plays again");
    assert_eq!(
        stranger.purge_dead_letters(&one, 0, "").await.unwrap().purged,
        0,
        "dead letters that a stranger purges"
    );
    let own = client.get_dead_letter(all[0].id).await.unwrap();
    assert_eq!(own.as_ref(), Some(&all[0]), "the same dead letter, for its owner");

    // They are still there after a restart; then one is played again, and then all that are left of some kind.
    node.kill();
    tokio::task::block_in_place(|| node.restart());
    alive.store(1, Ordering::Relaxed);
    while deliveries.try_recv().is_ok() {}
    let chosen = client.get_dead_letter(all[3].id).await.unwrap().unwrap();
    let page = client.replay_dead_letters(&DeadLetterChoice::Ids(vec![chosen.id]), 0, "").await.unwrap();
    let played = page.replayed[0].task_id.expect("it was there");
    let again = tokio::time::timeout(PATIENCE, deliveries.recv()).await.unwrap().unwrap();
    let came = (again.task_id, again.occurrence, again.due_ms);
    assert_eq!(came, (chosen.task_id, 0, chosen.due_ms), "what is played again comes in the name of the dead task");
    assert_ne!(played, chosen.task_id, "what is played again is a task of its own");
    let filter = DeadLetterFilter { class: Some(FailureClass::BadStatus), ..Default::default() };
    let mut token = String::new();
    let mut replayed = 0;
    loop {
        let choice = DeadLetterChoice::Filter(filter.clone());
        let page = client.replay_dead_letters(&choice, 2, &token).await.unwrap();
        replayed += page.replayed.len();
        match page.next_token {
            Some(next) => token = next,
            None => break,
        }
    }
    assert_eq!(replayed, 9, "dead letters of one class that are played again, on all pages");
    let mut seen = HashSet::from([again.task_id]);
    while seen.len() < 10 {
        seen.insert(tokio::time::timeout(PATIENCE, deliveries.recv()).await.unwrap().unwrap().task_id);
    }
    assert_eq!(seen, ids, "tasks that were played again and came");
    let everything = DeadLetterChoice::Filter(DeadLetterFilter::default());
    let purged = client.purge_dead_letters(&everything, 0, "").await.unwrap().purged;
    assert_eq!(purged, 1, "dead letters that were left to purge");
    assert_eq!(letters(&client, &Default::default()).await, [], "dead letters after all were played again or purged");
    node.wait_for_metric("boomerang_dead_letters", 0.0);
    node.wait_for_metric("boomerang_pending", 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_a_dead_letter_goes_to_its_url_with_tries_of_its_own() {
    let node = NodeProcess::start(&[]);
    let client = admin(&node).await;
    // The destination is down at first as well.
    let (_graveyard, graveyard, mut copies) = receiver(|received| match received.attempt {
        1 => Reply::refuse("not yet").into(),
        _ => Reply::Accept.into(),
    })
    .await;
    let mut registration = task(to(NOWHERE), tries(2, 10), 0);
    registration.settings.dead_letters = Some(format!("tcp://{}", graveyard.endpoint));
    registration.tags = named("precious", None);
    let registered = client.register(registration).await.unwrap();
    let mut copy = tokio::time::timeout(PATIENCE, copies.recv()).await.unwrap().unwrap();
    while copy.attempt == 1 {
        copy = tokio::time::timeout(PATIENCE, copies.recv()).await.unwrap().unwrap();
    }
    let of = (copy.task_id, copy.payload.as_ref());
    assert_eq!(of, (registered.task_id, &b"payload"[..]), "task and payload of the copy of a dead letter");
    let notice = copy.dead_letter.expect("it says that it is a copy");
    assert!(notice.attempts == 2 && notice.error.contains("refused"), "{notice:?}");
    let letter = until("the copy is settled", async || {
        letters(&client, &Default::default()).await.pop().filter(|letter| letter.copy == "delivered")
    })
    .await;
    assert_eq!(letter.id.to_string(), notice.id, "the dead letter that its copy names");
    node.wait_for_metric("boomerang_pending", 0.0);
    let left = list(&client, TaskFilter::default()).await;
    assert!(left.is_empty(), "neither the task nor its copy is a task any more: {left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_key_is_stored_once_also_over_a_restart() {
    let mut node = NodeProcess::start_on_a_fixed_port(&[]);
    let client = admin(&node).await;
    let stranger = plain_client(&node, &client, "stranger", ClientLimits::default()).await;
    let (_receiver, callback, mut deliveries) = receiver(|_| Reply::Accept.into()).await;
    let with_key = |key: &str, ttl_ms| Registration {
        dedup: Some(Dedup { key: key.into(), ttl_ms }),
        ..task(callback.clone(), tries(1, 0), 1_500)
    };
    let first = client.register(with_key("order-7", None)).await.unwrap();
    assert!(!first.duplicate, "the first registration with a key: {first:?}");
    let many = client.register_batch((0..50).map(|_| with_key("order-7", None)).collect()).await.unwrap();
    for registered in many {
        assert_eq!(registered.unwrap(), Registered { duplicate: true, ..first }, "the same key once more, in a batch");
    }
    let of_stranger = stranger.register(with_key("order-7", None)).await.unwrap();
    assert_ne!(of_stranger.task_id, first.task_id, "another client's key is another key");
    node.kill();
    tokio::task::block_in_place(|| node.restart());
    let again = client.register(with_key("order-7", None)).await.unwrap();
    assert_eq!(again, Registered { duplicate: true, ..first }, "the same key after a restart");
    let delivered = [deliveries.recv().await.unwrap().task_id, deliveries.recv().await.unwrap().task_id];
    assert!(delivered.contains(&first.task_id), "{} did not come; these did: {delivered:?}", first.task_id);
    // Also when the task is done. A key that has expired is a new one.
    let again = client.register(with_key("order-7", None)).await.unwrap();
    assert_eq!(again, Registered { duplicate: true, ..first }, "the same key after its task is done");
    let short = client.register(with_key("short", Some(50))).await.unwrap();
    let again = until("the key expires", async || {
        Some(client.register(with_key("short", Some(50))).await.unwrap()).filter(|again| !again.duplicate)
    });
    assert_ne!(again.await.task_id, short.task_id, "a key that has expired makes a task of its own");
    let long = client.register(with_key(&"x".repeat(300), None)).await.unwrap_err();
    assert_eq!(long.status(), Some(Status::InvalidRequest), "{long}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_has_a_reply_for_each_and_a_bad_one_harms_no_other() {
    let node = NodeProcess::start(&["--payload-max", "1000"]);
    let client = admin(&node).await;
    let (_receiver, mut deliveries) = Receiver::channel("127.0.0.1:0", 1_000).await.unwrap();
    let callback = to(&_receiver.local_addr().to_string());
    let batch = (0..300).map(|n| {
        let size = if n % 3 == 0 { 1_001 } else { 10 };
        Registration { payload: vec![b'x'; size].into(), ..task(callback.clone(), tries(1, 0), 50) }
    });
    let replies = client.register_batch(batch.collect()).await.unwrap();
    let mut expected = HashSet::new();
    for (n, reply) in replies.into_iter().enumerate() {
        match reply {
            Ok(registered) => {
                assert!(n % 3 > 0, "task {n} is too large, and was accepted: {registered:?}");
                assert!(expected.insert(registered.task_id), "id {} was given twice in a batch", registered.task_id);
            }
            Err(error) => assert!(n % 3 == 0 && error.to_string().contains("payload"), "task {n}: {error}"),
        }
    }
    assert_eq!(expected.len(), 200, "tasks of the batch that are not too large");
    while !expected.is_empty() {
        expected.remove(&next(&mut deliveries).await.task_id);
    }
    let too_many = (0..1_001).map(|_| task(callback.clone(), tries(1, 0), 50)).collect();
    let error = client.register_batch(too_many).await.unwrap_err();
    assert!(error.to_string().contains("1000"), "{error}");
    assert_eq!(client.register_batch(Vec::new()).await.unwrap().len(), 0, "replies to an empty batch");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recurring_task_does_not_drift_waits_for_itself_and_ends() {
    let node = NodeProcess::start(&[]);
    let client = admin(&node).await;
    // Two and a half intervals long.
    let slow = |received: &Received| match received.name.as_str() {
        "slow" | "overlapping" => Answer { reply: Reply::Accept, delay: Duration::from_millis(500) },
        _ => Reply::Accept.into(),
    };
    let (_receiver, callback, mut deliveries) = receiver(slow).await;
    let every = |recurrence: Recurrence, name: &str| Registration {
        recurrence: Some(recurrence),
        tags: named(name, None),
        ..task(callback.clone(), tries(1, 0), 200)
    };
    let quick = Recurrence { count: Some(8), ..Recurrence::every(100) };
    let slow = Recurrence { until_ms: Some(now_ms() + 2_000), ..Recurrence::every(200) };
    let overlapping = Recurrence { overlap: true, count: Some(6), ..Recurrence::every(200) };
    let quick = client.register(every(quick, "quick")).await.unwrap();
    let slow_one = client.register(every(slow, "slow")).await.unwrap();
    let overlapping = client.register(every(overlapping, "overlapping")).await.unwrap();
    let mut seen: HashMap<TaskId, Vec<Received>> = HashMap::new();
    let all = [quick.task_id, slow_one.task_id, overlapping.task_id];
    loop {
        match tokio::time::timeout(Duration::from_millis(50), deliveries.recv()).await {
            Ok(received) => {
                let received = received.unwrap();
                seen.entry(received.task_id).or_default().push(received);
            }
            Err(_) if list(&client, TaskFilter::default()).await.is_empty() => break,
            Err(_) => {}
        }
    }
    for registered in [quick, slow_one, overlapping] {
        for received in &seen[&registered.task_id] {
            let interval = if registered == quick { 100 } else { 200 };
            let due_ms = registered.due_ms + received.occurrence * interval;
            assert_eq!(received.due_ms, due_ms, "due instants do not drift: {received:?}");
            assert!(received.lateness_us().unwrap() >= 0, "before it was due: {received:?}");
        }
    }
    let occurrences = |id| seen[&id].iter().map(|received| received.occurrence).collect::<Vec<_>>();
    let times = |id| seen[&id].iter().map(|received| received.arrived_at).collect::<Vec<_>>();
    assert_eq!(seen.len(), all.len(), "tasks that came, of {all:?}");
    // Two that left a moment apart may come in any order.
    let mut each = occurrences(overlapping.task_id);
    each.sort_unstable();
    assert_eq!(each, [0, 1, 2, 3, 4, 5], "every one, though each takes 500 ms");
    let gaps = |id| times(id).windows(2).map(|pair| pair[1].duration_since(pair[0]).unwrap()).collect::<Vec<_>>();
    let (beside, behind) = (gaps(overlapping.task_id), gaps(slow_one.task_id));
    assert!(beside.iter().any(|gap| *gap < Duration::from_millis(400)), "none begins beside another one: {beside:?}");
    let waits = behind.iter().all(|gap| *gap >= Duration::from_millis(490));
    assert!(waits, "without overlap, none begins while the one before is out, for 500 ms: {behind:?}");
    // Everything that came due is accounted for.
    let ended = past(&client, slow_one.task_id).await;
    let accounted: u64 = ended.iter().map(|past| past.count).sum();
    let due = (slow.until_ms.unwrap() - slow_one.due_ms) / 200 + 1;
    assert_eq!(accounted, due, "each due instant is in the history once: {ended:?}");
    assert!(ended.iter().any(|past| past.outcome == Outcome::Merged), "what was missed is merged: {ended:?}");
    let ended = past(&client, quick.task_id).await;
    let accounted: u64 = ended.iter().map(|past| past.count).sum();
    assert_eq!(accounted, 8, "each of 8 due instants is in the history once: {ended:?}");
}

/// An interval shorter than it takes to write anything down: what can be delivered is, and it ends when it is to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_recurs_faster_than_a_disk_writes_is_delivered() {
    let node = NodeProcess::start(&["--interval-min", "1ms"]);
    let client = admin(&node).await;
    let (_receiver, callback, mut deliveries) = receiver(|_| Reply::Accept.into()).await;
    for missed in [Missed::Once, Missed::Skip, Missed::All { max: 1 }] {
        let every_ms = |count| Some(Recurrence { missed, count, ..Recurrence::every(1) });
        let register = async |recurrence| {
            let registration = Registration { recurrence, ..task(callback.clone(), tries(1, 0), 100) };
            client.register(registration).await.unwrap().task_id
        };
        let id = register(every_ms(None)).await;
        let mut came = 0;
        while came < 100 {
            let received = tokio::time::timeout(PATIENCE, deliveries.recv()).await;
            let received = received.unwrap_or_else(|_| panic!("{missed:?}: after {came}")).unwrap();
            came += usize::from(received.task_id == id);
        }
        client.cancel(id).await.unwrap();
        until("it is gone", async || client.get(id).await.unwrap().is_none().then_some(())).await;
        let id = register(every_ms(Some(500))).await;
        until("it ends", async || client.get(id).await.unwrap().is_none().then_some(())).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_node_slept_through_is_skipped_merged_or_run() {
    let mut node = NodeProcess::start_on_a_fixed_port(&[]);
    let client = admin(&node).await;
    let (_receiver, callback, mut deliveries) = receiver(|_| Reply::Accept.into()).await;
    let mut tasks = Vec::new();
    for missed in [Missed::Skip, Missed::Once, Missed::All { max: 4 }] {
        let recurrence = Some(Recurrence { missed, ..Recurrence::every(200) });
        let registered = client.register(Registration { recurrence, ..task(callback.clone(), tries(1, 0), HOUR_MS) });
        tasks.push(registered.await.unwrap());
    }
    node.kill();
    assert!(deliveries.try_recv().is_err(), "nothing is due yet");
    // An hour, and then several intervals.
    let away_ms = tasks[2].due_ms + 1_900 - now_ms();
    tokio::task::block_in_place(|| node.restart_after(Duration::from_millis(away_ms)));
    let mut seen: HashMap<TaskId, Vec<u64>> = HashMap::new();
    let mut back_at = HashMap::new();
    while tasks.iter().any(|task| seen.get(&task.task_id).is_none_or(|seen| seen.len() < 7)) {
        let received = tokio::time::timeout(PATIENCE, deliveries.recv()).await.unwrap().unwrap();
        // The receiver has not moved on with the node.
        let late_ms = received.lateness_us().unwrap() / 1_000 + i64::try_from(away_ms).unwrap();
        back_at.entry(received.task_id).or_insert(late_ms);
        seen.entry(received.task_id).or_default().push(received.occurrence);
    }
    let first = |n: usize| (seen[&tasks[n].task_id][0], back_at[&tasks[n].task_id]);
    assert!(first(0).0 >= 9 && first(1).0 >= 9, "{:?} {:?}", first(0), first(1));
    assert!(first(2).0 >= 6, "at most four of them: {:?}", first(2));
    let on_time = |n: usize| first(n).1 < i64::try_from(LATENESS_MAX_MS).unwrap();
    assert!(on_time(0) && on_time(1), "{:?} {:?}", first(0), first(1));
    let all = &seen[&tasks[2].task_id];
    assert!(all.windows(2).all(|pair| pair[1] == pair[0] + 1), "one after the other: {all:?}");
    for (n, task) in tasks.iter().enumerate() {
        client.cancel(task.task_id).await.unwrap();
        let ended = past(&client, task.task_id).await;
        // When the node gave up those before the first that came.
        let gave_up = ended.iter().find(|past| past.occurrence + past.count == first(n).0).map(|past| past.ended_ms);
        let came_due = task.due_ms + first(n).0 * 200;
        match n {
            0 => assert!(gave_up.is_some_and(|at| at < came_due && came_due <= at + 200), "the next one: {ended:?}"),
            1 => assert!(gave_up.is_some_and(|at| came_due <= at && at < came_due + 200), "the latest: {ended:?}"),
            _ => {}
        }
        let mut covered: Vec<(u64, u64)> = ended.iter().map(|past| (past.occurrence, past.count)).collect();
        covered.sort_unstable();
        let mut expected = 0;
        for (occurrence, count) in covered {
            assert_eq!(occurrence, expected, "no due instant is unaccounted for: {ended:?}");
            expected += count;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_is_edited_paused_and_resumed() {
    let mut node = NodeProcess::start_on_a_fixed_port(&[]);
    let client = admin(&node).await;
    let stranger = plain_client(&node, &client, "stranger", ClientLimits::default()).await;
    let (_receiver, callback, mut deliveries) = receiver(|_| Reply::Accept.into()).await;
    let registered = client.register(task(to(NOWHERE), tries(1, 0), 3_600_000)).await.unwrap();
    let id = registered.task_id;
    let payload = TaskUpdate { payload: Some(Bytes::from_static(b"new")), ..TaskUpdate::default() };
    assert_eq!(stranger.update(id, payload.clone()).await.unwrap(), Updated::NotFound, "a stranger edits no task");
    assert_eq!(stranger.pause(id).await.unwrap(), None, "a stranger pauses no task");
    let edited = client.update(id, payload.clone()).await.unwrap();
    let expected = Updated::Updated { version: 2, due_ms: registered.due_ms };
    assert_eq!(edited, expected, "a new payload is a new version, and leaves the due instant as it was");
    let old = TaskUpdate { expected_version: Some(1), ..payload };
    let refused = client.update(id, old).await.unwrap();
    assert_eq!(refused, Updated::Conflict { version: 2 }, "an edit of a version that is no more");
    let nothing = client.update(id, TaskUpdate::default()).await.unwrap_err();
    assert_eq!(nothing.status(), Some(Status::InvalidRequest), "{nothing}");
    let paused = client.pause(id).await.unwrap().unwrap();
    assert_eq!(paused.maybe_out, None, "an attempt that may be out, of a task that is due in an hour");
    assert_eq!(client.get(id).await.unwrap().unwrap().state, TaskState::Paused, "state of a paused task");
    let moved = TaskUpdate {
        expected_version: Some(2),
        due: Some(Due::In(100)),
        settings: OwnSettings { callback: Some(callback), ..OwnSettings::default() },
        ..TaskUpdate::default()
    };
    let edited = client.update(id, moved).await.unwrap();
    assert!(matches!(edited, Updated::Updated { version: 3, .. }), "a paused task can be edited: {edited:?}");
    node.kill();
    tokio::task::block_in_place(|| node.restart());
    let task = client.get(id).await.unwrap().unwrap();
    let kept = (task.state, task.version, task.payload.as_ref());
    assert_eq!(kept, (TaskState::Paused, 3, &b"new"[..]), "state, version and payload after a restart");
    let came = deliveries.try_recv();
    assert!(came.is_err(), "a paused task came anyway: {came:?}");
    client.resume(id).await.unwrap().unwrap();
    let received = tokio::time::timeout(PATIENCE, deliveries.recv()).await.unwrap().unwrap();
    let came = (received.task_id, received.payload.as_ref());
    assert_eq!(came, (id, &b"new"[..]), "task and payload after an edit");
    let gone = until("it is settled", async || client.get(id).await.unwrap().is_none().then_some(()));
    gone.await;
    assert_eq!(client.resume(id).await.unwrap(), None, "a task that is done cannot be resumed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_takes_what_is_asked_for() {
    let node = NodeProcess::start(&[]);
    let client = admin(&node).await;
    let other = plain_client(&node, &client, "other", ClientLimits::default()).await;
    let mut mine = Vec::new();
    for n in 0..12u64 {
        let recurrence = (n % 3 == 0).then(|| Recurrence::every(1_000_000));
        let tags = named(&format!("job-{}-{n}", n % 2), Some(("env", if n < 5 { "prod" } else { "test" })));
        let registration =
            Registration { recurrence, tags, ..task(to(NOWHERE), tries(9, 3_600_000), 1_000_000 + 1_000 * n) };
        mine.push(client.register(registration).await.unwrap());
    }
    let others = other.register(task(to(NOWHERE), tries(1, 0), 2_000_000)).await.unwrap();
    let failing = client.register(task(to(NOWHERE), tries(9, 3_600_000), 0)).await.unwrap();
    client.pause(mine[11].task_id).await.unwrap().unwrap();
    until("it is retried", async || {
        client.get(failing.task_id).await.unwrap().filter(|task| task.state == TaskState::Retrying)
    })
    .await;
    let ids = async |client: &Client, filter: TaskFilter| -> Vec<TaskId> {
        list(client, filter).await.iter().map(|task| task.task_id).collect()
    };
    let expect = |numbers: &[usize]| numbers.iter().map(|n| mine[*n].task_id).collect::<Vec<_>>();
    let all = TaskFilter::default;
    assert_eq!(ids(&client, all()).await.len(), 14, "an administrator sees everything");
    assert_eq!(ids(&other, all()).await, [others.task_id], "others see their own");
    let of = |name: &str| TaskFilter { client_id: Some(name.parse().unwrap()), ..all() };
    assert_eq!(ids(&client, of("other")).await, [others.task_id], "another client's, for an administrator");
    assert_eq!(ids(&client, of("admin")).await.len(), 13, "an administrator's own");
    let refused = other.list(of("admin")).await.unwrap_err();
    assert_eq!(refused.status(), Some(Status::Unauthorized), "an administrator's, for another client: {refused}");
    let state = |state| TaskFilter { state: Some(state), ..all() };
    assert_eq!(ids(&client, state(TaskState::Paused)).await, expect(&[11]), "paused");
    assert_eq!(ids(&client, state(TaskState::Retrying)).await, [failing.task_id], "retrying");
    assert_eq!(ids(&client, state(TaskState::Scheduled)).await.len(), 12, "scheduled");
    assert_eq!(ids(&client, state(TaskState::Out)).await, [], "out");
    assert_eq!(ids(&client, TaskFilter { recurring: Some(true), ..all() }).await, expect(&[0, 3, 6, 9]), "recurring");
    let range = TaskFilter { due_after_ms: Some(mine[2].due_ms), due_before_ms: Some(mine[5].due_ms), ..of("admin") };
    let in_range = ids(&client, range).await;
    assert_eq!(in_range.iter().filter(|id| expect(&[3, 4]).contains(id)).count(), 2, "{in_range:?}");
    let name = |prefix: &str| TaskFilter { name_prefix: prefix.into(), ..of("admin") };
    assert_eq!(ids(&client, name("job-1-")).await, expect(&[1, 11, 3, 5, 7, 9]), "in the order of their names");
    assert_eq!(ids(&client, name("job-1-3")).await, expect(&[3]), "by a whole name");
    assert_eq!(ids(&client, name("nothing")).await, [], "by a name that there is not");
    let label = |prefix: &str| TaskFilter { label_prefix: prefix.into(), ..of("admin") };
    assert_eq!(ids(&client, label("env=pr")).await.len(), 5, "by the beginning of a label's value");
    assert_eq!(ids(&client, label("env=")).await.len(), 12, "by a label of any value");
    let paused = TaskFilter { state: Some(TaskState::Paused), ..label("env=") };
    assert_eq!(ids(&client, paused).await, expect(&[11]), "by label and state");
    let refused = client.list(TaskFilter { name_prefix: "job".into(), ..all() }).await.unwrap_err();
    assert!(refused.to_string().contains("client_id"), "{refused}");
    let token = client.list(TaskFilter { limit: 1, ..all() }).await.unwrap().next_token.unwrap();
    let misused = client.list(TaskFilter { token, ..name("job") }).await.unwrap_err();
    assert!(misused.to_string().contains("next_token"), "{misused}");
    let task = client.get(mine[3].task_id).await.unwrap().unwrap();
    assert_eq!(task.tags, named("job-1-3", Some(("env", "prod"))), "name and label as they were registered");
}

/// Ten tasks among a hundred thousand of somebody else's cost what they cost alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_costs_the_same_however_many_tasks_there_are() {
    const OTHERS: usize = 100_000;
    let node = NodeProcess::start(&[]);
    let client = admin(&node).await;
    let small = plain_client(&node, &client, "small", ClientLimits::default()).await;
    for n in 0..10 {
        let tags = named(&format!("mine-{n}"), None);
        small.register(Registration { tags, ..task(to(NOWHERE), tries(1, 0), 3_000_000) }).await.unwrap();
    }
    let page = async |client: &Client, filter: TaskFilter| {
        let mut took = Vec::new();
        for _ in 0..21 {
            let began = Instant::now();
            let page = client.list(filter.clone()).await.unwrap();
            took.push(began.elapsed());
            let found = (page.tasks.len(), page.next_token.is_some());
            assert_eq!(found, (10, filter.limit > 0), "tasks of a page, and whether another one follows");
        }
        took.sort();
        took[took.len() / 2]
    };
    let own = TaskFilter::default();
    let by_name = TaskFilter { name_prefix: "mine".into(), ..TaskFilter::default() };
    let first = TaskFilter { limit: 10, ..TaskFilter::default() };
    let before = [page(&small, own.clone()).await, page(&small, by_name.clone()).await];
    let mut batches = Vec::new();
    for n in 0..OTHERS / 1_000 {
        let delay_ms = 1_000_000 + (n as u64 % 7) * 600_000;
        let batch =
            (0..1_000).map(|_| Registration { payload: Bytes::new(), ..task(to(NOWHERE), tries(1, 0), delay_ms) });
        batches.push(client.register_batch_nowait(batch.collect()).await.unwrap());
    }
    for batch in batches {
        let refused: Vec<_> = batch.await.unwrap().into_iter().filter_map(Result::err).collect();
        assert!(refused.is_empty(), "tasks of others were refused: {refused:?}");
    }
    let after = [page(&small, own).await, page(&small, by_name).await, page(&client, first).await];
    println!("a page of 10: {before:?} alone, {after:?} among {OTHERS}");
    for took in after {
        let limit = before[0].max(before[1]) * 10 + Duration::from_millis(20);
        assert!(took < limit, "a page took {took:?} among {OTHERS} tasks of others, and may take {limit:?}: {after:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn history_tells_what_became_of_a_task_unless_it_is_switched_off() {
    let mut node = NodeProcess::start_on_a_fixed_port(&[]);
    let client = admin(&node).await;
    let stranger = plain_client(&node, &client, "stranger", ClientLimits::default()).await;
    let (_receiver, callback, mut deliveries) = receiver(|received| match received.attempt {
        1 => Reply::refuse("once more, please").into(),
        _ => Reply::Accept.into(),
    })
    .await;
    let registered = client.register(task(callback.clone(), tries(3, 10), 50)).await.unwrap();
    let past_ones = async |client: &Client| past(client, registered.task_id).await;
    let ended = until("it is settled", async || past_ones(&client).await.pop()).await;
    let became = (ended.outcome, ended.attempts, ended.due_ms);
    assert_eq!(became, (Outcome::Acknowledged, 2, registered.due_ms), "outcome, attempts and due instant: {ended:?}");
    let dispatched_ms = ended.dispatched_ms.unwrap();
    assert!(dispatched_ms >= ended.due_ms + 10 && ended.ended_ms >= dispatched_ms, "{ended:?}");
    assert_eq!(past_ones(&stranger).await, [], "others do not see it");
    let cancelled = client.register(task(callback.clone(), tries(1, 0), 60_000)).await.unwrap();
    client.cancel(cancelled.task_id).await.unwrap();
    let past_of_cancelled = past(&client, cancelled.task_id).await;
    assert_eq!(past_of_cancelled[0].outcome, Outcome::Cancelled, "{past_of_cancelled:?}");
    node.kill();
    tokio::task::block_in_place(|| node.restart());
    assert_eq!(past_ones(&client).await, [ended], "history after a restart");
    while deliveries.try_recv().is_ok() {}
    // Switched off, nothing is kept.
    node.kill();
    let tcp = node.started.tcp.to_string();
    let flags = ["--admin-password", ADMIN_PASSWORD, "--tcp-addr", &tcp, "--history", "0s"];
    tokio::task::block_in_place(|| node.restart_with(&flags));
    let registered = client.register(task(callback, tries(3, 10), 0)).await.unwrap();
    until("it is settled", async || client.get(registered.task_id).await.unwrap().is_none().then_some(())).await;
    assert_eq!(past(&client, registered.task_id).await, [], "history where none is kept");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_is_held_to_its_own_limits() {
    let node = NodeProcess::start(&[]);
    let client = admin(&node).await;
    let limits = ClientLimits { delay_max_ms: Some(60_000), payload_bytes_max: Some(10), interval_min_ms: Some(50) };
    let small = plain_client(&node, &client, "small", limits).await;
    let good = small.register(task(to(NOWHERE), tries(1, 0), 60_000)).await.unwrap();
    let late = small.register(task(to(NOWHERE), tries(1, 0), 60_001)).await.unwrap_err();
    assert!(late.to_string().contains("60000 ms"), "{late}");
    let large = Registration { payload: Bytes::from_static(&[0; 11]), ..task(to(NOWHERE), tries(1, 0), 0) };
    let large = small.register(large).await.unwrap_err();
    assert!(large.to_string().contains("10 bytes"), "{large}");
    let every = |every_ms| Registration {
        recurrence: Some(Recurrence { count: Some(1), ..Recurrence::every(every_ms) }),
        ..task(to(NOWHERE), tries(1, 0), 60_000)
    };
    small.register(every(50)).await.unwrap();
    for (client, every_ms, why) in [(&small, 49, "the least is 50 ms"), (&client, 99, "the least is 100 ms")] {
        let quick = client.register(every(every_ms)).await.unwrap_err().to_string();
        assert!(quick.contains(why), "every {every_ms} ms: {quick}");
    }
    let update = TaskUpdate { payload: Some(Bytes::from_static(&[0; 11])), ..TaskUpdate::default() };
    let refused = small.update(good.task_id, update).await.unwrap_err();
    assert!(refused.to_string().contains("10 bytes"), "an edit beyond the client's payload: {refused}");
    let update = TaskUpdate { due: Some(Due::In(100_000)), ..TaskUpdate::default() };
    let refused = small.update(good.task_id, update).await.unwrap_err();
    assert!(refused.to_string().contains("60000 ms"), "an edit beyond the client's delay: {refused}");
    client.register(task(to(NOWHERE), tries(1, 0), 60_001)).await.unwrap();
}
