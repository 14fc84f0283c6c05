//! A client that knows only the original protocol, against a real node: it must be able to do everything the original
//! could, and must never meet a status it does not know.

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::legacy::{
    CancellationRequest, Client, ClientRegistrationRequest, ERROR, FIXED, INVALID_REQUEST, ListTasksRequest, OK,
    Payload, RetryPolicy, SESSION_EXPIRED, Task, UNAUTHORIZED, password_of,
};
use common::node::{ADMIN_PASSWORD, NodeProcess};
use common::receiver::{Does, Receiver, Serves};
use common::{LATENESS_MAX_MS, eventually, now_ms};

const HOUR_MS: u64 = 3_600_000;

/// A node, and a plain client whose callbacks go to `receiver`.
fn world(flags: &[&str], receiver: &Receiver, retry: Option<RetryPolicy>) -> (NodeProcess, Client) {
    let node = NodeProcess::start(flags);
    node.admin().add_client("orders", &receiver.endpoint(), retry);
    let client = Client::login(node.started.tcp, "orders", &password_of("orders"));
    (node, client)
}

fn fixed(max_attempts: u32, interval_ms: u64) -> Option<RetryPolicy> {
    Some(RetryPolicy { max_attempts, strategy: FIXED, interval_ms, max_interval_ms: 0 })
}

#[test]
fn a_task_comes_back_on_time_and_a_plain_answer_settles_it() {
    let receiver = Receiver::that_accepts();
    let (node, mut client) = world(&[], &receiver, None);
    let before_ms = now_ms();
    let (id, due_ms) = client.throw(b"hello", 300);
    assert!((before_ms + 300..=now_ms() + 300).contains(&due_ms), "{due_ms} is not 300 ms ahead of {before_ms}");
    let arrived = receiver.next_is(b"hello");
    arrived.assert_on_time(due_ms);
    assert_eq!(arrived.task_id, id, "the callback names the task that was registered");
    // Settled means gone: there is nothing left that could be delivered again.
    node.wait_for_metric("boomerang_pending", 0.0);
    let gone = client.get(&id);
    assert_eq!(gone.status, ERROR, "a settled task is gone: {gone:?}");
    assert!(gone.error_message.contains(&id) && gone.task.is_none(), "the answer names what is not there: {gone:?}");
    let cancelled = client.cancel(&id);
    assert_eq!(cancelled.status, ERROR, "a settled task cannot be cancelled: {cancelled:?}");
    assert_eq!(node.metric("boomerang_dispatches_total"), 1.0);
    assert_eq!(node.metric("boomerang_acknowledged_total"), 1.0);
    receiver.assert_nothing_came();
}

#[test]
fn tasks_come_in_the_order_they_are_due_and_survive_their_session() {
    let receiver = Receiver::that_accepts();
    let (_node, mut client) = world(&[], &receiver, None);
    let mut dues = Vec::new();
    for delay_ms in [3_000, 1_000, 2_000] {
        dues.push(client.throw(delay_ms.to_string().as_bytes(), delay_ms));
    }
    drop(client);
    for (delay_ms, at) in [(1_000u64, 1), (2_000, 2), (3_000, 0)] {
        let arrived = receiver.next_is(delay_ms.to_string().as_bytes());
        assert_eq!(arrived.task_id, dues[at].0, "the task that is due after {delay_ms} ms");
        arrived.assert_on_time(dues[at].1);
    }
}

#[test]
fn a_recurring_task_comes_without_drift_until_it_is_cancelled() {
    const INTERVAL_MS: u64 = 1_000;
    let receiver = Receiver::that_accepts();
    let (_node, mut client) = world(&[], &receiver, None);
    let registered = client.register(b"tick", INTERVAL_MS, INTERVAL_MS);
    assert_eq!(registered.status, OK, "{registered:?}");
    let (id, first_ms) = (registered.task_id, registered.scheduled_time_ms);
    let mut last_slot = None;
    for count in 0..4 {
        let arrived = receiver.next_is(b"tick");
        assert_eq!(arrived.task_id, id, "each occurrence has the id of its task");
        arrived.assert_on_time(first_ms + count * INTERVAL_MS);
        // Never two in one interval: each belongs to a due instant of its own.
        let slot = (arrived.at_ms - first_ms) / INTERVAL_MS;
        assert!(Some(slot) > last_slot, "two callbacks in interval {slot}, where each is to have one: {arrived:?}");
        last_slot = Some(slot);
        let task = client.get(&id).task.expect("a recurring task is there until it is cancelled");
        let drift_ms = (task.expiration_ms - first_ms) % INTERVAL_MS;
        assert_eq!(drift_ms, 0, "milliseconds from the grid of due instants: {task:?}");
        assert_eq!(task.repeat_interval_ms, INTERVAL_MS, "the interval that was registered: {task:?}");
    }
    // Depending on the moment an attempt may be out, which an old client is told as an error; it ends either way.
    let cancelled = client.cancel(&id);
    assert!(cancelled.status == OK || cancelled.error_message.contains("too late"), "{cancelled:?}");
    let cancelled_ms = now_ms();
    let gone = client.get(&id);
    assert_eq!(gone.status, ERROR, "a cancelled task is gone: {gone:?}");
    client.throw(b"sentinel", 3 * INTERVAL_MS);
    let mut more = 0;
    while receiver.next().payload != b"sentinel" {
        more += 1;
    }
    let was_out = cancelled.status != OK;
    assert!(more <= u32::from(was_out) + 1, "{more} came after it was cancelled at {cancelled_ms}");
}

#[test]
fn what_is_stored_is_shown() {
    let receiver = Receiver::that_accepts();
    let (node, mut client) = world(&[], &receiver, None);
    let (id, due_ms) = client.throw(b"later", HOUR_MS);
    let found = client.get(&id);
    assert_eq!((found.status, found.error_message.as_str()), (OK, ""), "{found:?}");
    let task = found.task.unwrap();
    let shown = (task.task_id.as_str(), task.client_id.as_str(), task.expiration_ms);
    assert_eq!(shown, (id.as_str(), "orders", due_ms), "id, client and due instant as they were registered");
    let shown = (task.repeat_interval_ms, task.payload.as_slice());
    assert_eq!(shown, (0, b"later".as_slice()), "interval and payload as they were registered");
    // Others do not even learn that it is there, an administrator sees it.
    let mut admin = node.admin();
    admin.add_client("other", &receiver.endpoint(), None);
    let mut other = Client::login(node.started.tcp, "other", &password_of("other"));
    let hidden = (other.get(&id).status, other.cancel(&id).status);
    assert_eq!(hidden, (ERROR, ERROR), "another client neither sees a task nor cancels it");
    assert_eq!(admin.get(&id).task.unwrap().payload, b"later", "the payload, as an administrator sees it");
}

#[test]
fn lists_are_filtered_and_paged_without_gaps() {
    let receiver = Receiver::that_accepts();
    let (node, mut client) = world(&[], &receiver, None);
    let mut tasks: Vec<(String, u64)> = (0..30).map(|n| client.throw(b"once", HOUR_MS + n * 1_000)).collect();
    let recurring: Vec<String> = (0..5).map(|n| client.register(b"again", 2 * HOUR_MS + n, HOUR_MS).task_id).collect();
    let mut admin = node.admin();
    admin.add_client("other", &receiver.endpoint(), None);
    let mut other = Client::login(node.started.tcp, "other", &password_of("other"));
    let (of_other, _) = other.throw(b"mine", HOUR_MS);

    let ids = |found: Vec<common::legacy::TaskDetails>| -> Vec<String> {
        found.into_iter().map(|task| task.task_id).collect()
    };
    tasks.sort_by_key(|(id, due_ms)| (*due_ms, id.clone()));
    let once: Vec<String> = tasks.iter().map(|(id, _)| id.clone()).collect();
    let mine: Vec<String> = once.iter().chain(&recurring).cloned().collect();

    // Six pages of 6, in due order.
    let paged = ListTasksRequest { limit: 6, ..Default::default() };
    assert_eq!(client.list(paged.clone()).tasks.len(), 6, "tasks on a page of 6");
    assert_eq!(ids(client.list_all(&paged)), mine, "all pages together, in due order");
    assert_eq!(ids(client.list_all(&ListTasksRequest::default())), mine, "no limit is a limit of the server's");

    let only = |is_recurring| ListTasksRequest { is_recurring: Some(is_recurring), limit: 4, ..Default::default() };
    assert_eq!(ids(client.list_all(&only(false))), once, "tasks that come once");
    assert_eq!(ids(client.list_all(&only(true))), recurring, "tasks that recur");

    let between = ListTasksRequest {
        scheduled_after: tasks[10].1 - 500,
        scheduled_before: tasks[20].1 - 500,
        limit: 3,
        ..Default::default()
    };
    assert_eq!(ids(client.list_all(&between)), once[10..20], "tasks due within a span");
    let empty = ListTasksRequest { scheduled_after: 5 * HOUR_MS + now_ms(), ..Default::default() };
    assert_eq!(client.list_all(&empty), [], "tasks due when nothing is");

    let of = |client_id: &str| ListTasksRequest { client_id: client_id.into(), limit: 10, ..Default::default() };
    assert_eq!(ids(client.list_all(&of("orders"))), mine, "a client's own tasks, asked for by name");
    let refused = client.list(of("other"));
    assert_eq!((refused.status, refused.tasks.len()), (UNAUTHORIZED, 0), "another client's tasks: {refused:?}");
    assert_eq!(ids(admin.list_all(&of("other"))), [of_other], "the same, for an administrator");
    let all = admin.list_all(&ListTasksRequest::default()).len();
    assert_eq!(all, 36, "tasks of all clients, for an administrator");

    // What comes and goes between the pages changes nothing about the others.
    let mut seen = BTreeSet::new();
    let mut next_token = String::new();
    for (page, gone) in [5, 25, 29].into_iter().enumerate() {
        let answer = client.list(ListTasksRequest { limit: 8, next_token, ..Default::default() });
        seen.extend(answer.tasks.into_iter().map(|task| task.task_id));
        next_token = answer.next_token;
        assert!(!next_token.is_empty(), "page {page} is not the last");
        client.throw(b"new", HOUR_MS + 500);
        let cancelled = client.cancel(&once[gone]);
        assert_eq!(cancelled.status, OK, "{cancelled:?}");
    }
    let rest = client.list_all_from(&ListTasksRequest { limit: 8, ..Default::default() }, next_token);
    seen.extend(ids(rest));
    for (at, id) in mine.iter().enumerate() {
        assert!(seen.contains(id) || at == 25 || at == 29, "task {at} was left out");
    }
}

#[test]
fn a_cancelled_task_does_not_come() {
    let receiver = Receiver::that_accepts();
    let (node, mut client) = world(&[], &receiver, None);
    let (cancelled, _) = client.throw(b"never", 700);
    let (_, due_ms) = client.throw(b"sentinel", 1_000);
    let answer = client.cancel(&cancelled);
    assert_eq!((answer.status, answer.error_message.as_str()), (OK, ""), "{answer:?}");
    let again = client.cancel(&cancelled);
    assert_eq!(again.status, ERROR, "a cancelled task cannot be cancelled again: {again:?}");
    assert!(again.error_message.contains(&cancelled), "the answer names what is not there: {again:?}");
    let gone = client.get(&cancelled);
    assert_eq!(gone.status, ERROR, "a cancelled task is gone: {gone:?}");
    receiver.next_is(b"sentinel").assert_on_time(due_ms);
    assert_eq!(node.metric("boomerang_cancellations_total"), 1.0);
}

#[test]
fn a_cancel_that_comes_too_late_says_so() {
    let receiver = Receiver::start(Serves::All, |payload, _| match payload {
        b"slow" => Does::Nothing,
        _ => Does::Accept,
    });
    let (node, mut client) = world(&["--callback-timeout", "400ms"], &receiver, fixed(5, 50));
    let (id, _) = client.throw(b"slow", 0);
    receiver.next_is(b"slow");
    // The attempt is out, and stays so until its timeout.
    let answer = client.cancel(&id);
    assert_eq!(answer.status, ERROR, "a task that is out cannot be cancelled for certain: {answer:?}");
    assert!(answer.error_message.contains("too late"), "{answer:?}");
    // No further attempt follows, and it is no dead letter either: that is what was asked for.
    node.wait_for_metric("boomerang_failed_attempts_total", 1.0);
    client.throw(b"sentinel", 200);
    receiver.next_is(b"sentinel");
    node.wait_for_metric("boomerang_pending", 0.0);
    assert_eq!(node.metric("boomerang_dead_letters"), 0.0);
}

#[test]
fn a_session_lives_as_long_as_it_is_refreshed() {
    let receiver = Receiver::that_accepts();
    let (_node, mut client) = world(&["--session-timeout", "1500ms"], &receiver, None);
    let first_end_ms = client.expires_at_ms;
    let left_ms = first_end_ms.saturating_sub(now_ms());
    assert!((1..=1_500).contains(&left_ms), "a new session of 1500 ms ends in {left_ms} ms");
    let mut end_ms = first_end_ms;
    eventually("the first end of the session is over", || {
        let refreshed = client.refresh();
        assert_eq!(refreshed.status, OK, "a session that is alive can be prolonged: {refreshed:?}");
        assert!(refreshed.new_expires_at_ms >= end_ms, "prolonged from {end_ms} to an earlier end: {refreshed:?}");
        end_ms = refreshed.new_expires_at_ms;
        (now_ms() > first_end_ms).then_some(())
    });
    client.throw(b"still here", HOUR_MS);
}

#[test]
fn only_an_administrator_adds_and_removes_clients() {
    let receiver = Receiver::that_accepts();
    let (node, mut client) = world(&[], &receiver, None);
    let tcp = node.started.tcp;
    let request = |client_id: &str, password: &str| ClientRegistrationRequest {
        client_id: client_id.into(),
        password: password.into(),
        ..Default::default()
    };
    let refused = client.put_client(request("friend", "pw"));
    assert_eq!(refused.status, UNAUTHORIZED, "a plain client adds no clients: {refused:?}");
    assert!(refused.error_message.contains("orders"), "the refusal names who asked: {refused:?}");
    assert_eq!(client.remove_client("admin").status, UNAUTHORIZED, "a plain client removes no clients");
    let nobody = Client::connect(tcp).authenticate("friend", "pw");
    assert_eq!(nobody.status, UNAUTHORIZED, "a client whose registration was refused is none: {nobody:?}");

    let mut admin = node.admin();
    let added = admin.put_client(request("friend", "pw"));
    assert_eq!(added.status, OK, "{added:?}");
    let mut friend = Client::login(tcp, "friend", "pw");
    // It has no receiver, and an original session cannot bring one.
    let homeless = friend.register(b"?", 0, 0);
    assert_eq!(homeless.status, INVALID_REQUEST, "a task needs a receiver: {homeless:?}");
    assert!(homeless.error_message.contains("callback"), "{homeless:?}");
    // A second registration of the name changes the password.
    let changed = admin.put_client(request("friend", "better"));
    assert_eq!(changed.status, OK, "{changed:?}");
    let with_the_old = Client::connect(tcp).authenticate("friend", "pw");
    assert_eq!(with_the_old.status, UNAUTHORIZED, "an old password opens nothing: {with_the_old:?}");
    Client::login(tcp, "friend", "better");

    // A removed client's sessions end, its password is worth nothing, its tasks come all the same.
    let (_, due_ms) = client.throw(b"last will", 800);
    assert_eq!(admin.remove_client("orders").status, OK, "an administrator removes a client");
    assert_eq!(client.register(b"more", 0, 0).status, SESSION_EXPIRED, "a removed client registers nothing");
    assert_eq!(client.refresh().status, SESSION_EXPIRED, "a removed client prolongs nothing");
    let back = client.authenticate("orders", &password_of("orders"));
    assert_eq!(back.status, UNAUTHORIZED, "a removed client does not come in again: {back:?}");
    receiver.next_is(b"last will").assert_on_time(due_ms);
    assert_eq!(admin.remove_client("orders").status, ERROR, "nobody is removed twice");
    assert_eq!(admin.remove_client("admin").status, INVALID_REQUEST, "somebody must be left");
    // An administrator made by another one.
    let second = ClientRegistrationRequest { is_admin: true, ..request("second", "pw") };
    assert_eq!(admin.put_client(second).status, OK, "an administrator adds another one");
    assert_eq!(Client::login(tcp, "second", "pw").remove_client("friend").status, OK, "the other one removes a client");
}

#[test]
fn a_wrong_password_is_refused_without_a_hint() {
    let receiver = Receiver::that_accepts();
    let (node, _client) = world(&[], &receiver, None);
    let mut stranger = Client::connect(node.started.tcp);
    let mut texts = BTreeSet::new();
    for (client_id, password) in [("admin", "guess"), ("admin", ""), ("nobody", "guess"), ("orders", ADMIN_PASSWORD)] {
        let refused = stranger.authenticate(client_id, password);
        assert_eq!((refused.status, refused.session_id.as_str()), (UNAUTHORIZED, ""), "{client_id}");
        texts.insert(refused.error_message);
    }
    assert_eq!(texts.len(), 1, "the text must not tell which names exist: {texts:?}");
    assert_eq!(stranger.register(b"x", 0, 0).status, UNAUTHORIZED, "without a session");
    // The same connection may try again.
    assert_eq!(stranger.authenticate("admin", ADMIN_PASSWORD).status, OK);
}

#[test]
fn answers_come_in_the_order_of_the_requests() {
    const TASKS: u64 = 2_000;
    const MINUTE_MS: u64 = 60_000;
    let receiver = Receiver::that_accepts();
    let (node, mut client) = world(&[], &receiver, None);
    let mut bytes = Vec::new();
    for number in 0..TASKS {
        let delay_ms = HOUR_MS + number * MINUTE_MS;
        let task = Task { payload: number.to_string().into_bytes(), delay_ms, repeat_interval_ms: 0 };
        bytes.extend(client.frame(Payload::RegistrationRequest(task)));
        if number % 500 == 7 {
            // What is answered at once waits for its turn as well.
            let request = CancellationRequest { task_id: "nonsense".into() };
            bytes.extend(client.frame(Payload::CancellationRequest(request)));
        }
    }
    let begun_ms = now_ms();
    client.raw.send_bytes(&bytes);
    let mut ids = Vec::new();
    for number in 0..TASKS {
        let Payload::RegistrationResponse(answer) = client.answer() else { panic!("out of order at {number}") };
        assert_eq!(answer.status, OK, "{answer:?}");
        // Which request it answers is seen from the due instant: they lie a minute apart.
        let answered = (answer.scheduled_time_ms - begun_ms - HOUR_MS) / MINUTE_MS;
        assert_eq!(answered, number, "the request that answer {number} is about: {answer:?}");
        ids.push(answer.task_id);
        if number % 500 == 7 {
            let Payload::CancellationResponse(answer) = client.answer() else { panic!("out of order at {number}") };
            assert_eq!(answer.status, INVALID_REQUEST, "{answer:?}");
        }
    }
    assert_eq!(node.metric("boomerang_registrations_total"), TASKS as f64);
    assert_eq!(node.metric("boomerang_pending"), TASKS as f64);
    for number in [0, 999, 1_999] {
        let payload = client.get(&ids[number]).task.unwrap().payload;
        assert_eq!(payload, number.to_string().as_bytes(), "payload of the task that answer {number} named");
    }
}

#[test]
fn a_receiver_that_refuses_or_closes_is_tried_again_and_then_given_up() {
    const PAUSE_MS: u64 = 300;
    for does in [Does::Refuse, Does::Close] {
        let receiver = Receiver::start(Serves::All, move |_, _| does);
        let (node, mut client) = world(&[], &receiver, fixed(3, PAUSE_MS));
        let (id, due_ms) = client.throw(b"try", 100);
        let first = receiver.next_is(b"try");
        first.assert_on_time(due_ms);
        let mut last = first.at;
        for _ in 0..2 {
            let again = receiver.next_is(b"try");
            assert_eq!(again.task_id, id, "the next attempt is one of the same task");
            let pause = u64::try_from((again.at - last).as_millis()).unwrap();
            // The pause begins when the failure is known, which is after the receiver saw the attempt.
            let in_time = (PAUSE_MS - 1..PAUSE_MS + LATENESS_MAX_MS).contains(&pause);
            assert!(
                in_time,
                "{pause} ms between two attempts instead of {PAUSE_MS}, with a receiver that does {does:?}"
            );
            last = again.at;
        }
        node.wait_for_metric("boomerang_dead_letters", 1.0);
        node.wait_for_metric("boomerang_pending", 0.0);
        assert_eq!(node.metric("boomerang_failed_attempts_total"), 3.0);
        let gone = client.get(&id);
        assert_eq!(gone.status, ERROR, "a task that is a dead letter is gone: {gone:?}");
        receiver.assert_nothing_came();
    }
}

#[test]
fn a_receiver_that_comes_round_gets_the_task_once_more_and_no_dead_letter() {
    let silent = Arc::new(AtomicBool::new(true));
    let receiver = Receiver::start(Serves::All, move |_, _| match silent.swap(false, Ordering::SeqCst) {
        true => Does::Nothing,
        false => Does::Accept,
    });
    let (node, mut client) = world(&["--callback-timeout", "300ms"], &receiver, fixed(3, 100));
    let begun = Instant::now();
    let (id, _) = client.throw(b"patience", 0);
    for attempt in 1..=2 {
        assert_eq!(receiver.next_is(b"patience").task_id, id, "attempt {attempt}");
    }
    let elapsed = begun.elapsed();
    assert!(elapsed >= Duration::from_millis(400), "{elapsed:?} is less than the timeout and the pause take");
    node.wait_for_metric("boomerang_pending", 0.0);
    assert_eq!(node.metric("boomerang_dead_letters"), 0.0);
    receiver.assert_nothing_came();
}

#[test]
fn a_receiver_that_closes_after_each_answer_gets_everything() {
    const TASKS: usize = 200;
    let receiver = Receiver::start(Serves::All, |_, _| Does::AcceptAndClose);
    let (node, mut client) = world(&[], &receiver, fixed(5, 50));
    let mut missing: BTreeSet<String> = (0..TASKS as u64).map(|n| client.throw(b"x", 300 + n).0).collect();
    while !missing.is_empty() {
        missing.remove(&receiver.next().task_id);
    }
    node.wait_for_metric("boomerang_pending", 0.0);
    assert_eq!(node.metric("boomerang_dead_letters"), 0.0);
}

#[test]
fn a_receiver_of_one_connection_at_a_time_gets_everything() {
    // More than there may be connections, all due at about the same time, and each is tried once.
    const TASKS: usize = 100;
    let receiver = Receiver::start(Serves::OneAtATime, |_, _| Does::Accept);
    let (node, mut client) = world(&[], &receiver, fixed(1, 0));
    for round in 0..2 {
        let task = Task { payload: b"x".to_vec(), delay_ms: 500, repeat_interval_ms: 0 };
        let register = client.frame(Payload::RegistrationRequest(task));
        client.raw.send_bytes(&register.repeat(TASKS));
        let mut missing = BTreeSet::new();
        for _ in 0..TASKS {
            let answer = client.answer();
            let Payload::RegistrationResponse(answer) = answer else { panic!("not a registration: {answer:?}") };
            missing.insert(answer.task_id);
        }
        let begun = Instant::now();
        while !missing.is_empty() {
            let arrived = receiver.next();
            assert!(
                missing.remove(&arrived.task_id),
                "a task came twice, though each attempt was answered: {arrived:?}"
            );
        }
        eprintln!("round {round}: {TASKS} tasks in {:?}", begun.elapsed());
        node.wait_for_metric("boomerang_pending", 0.0);
        assert_eq!(node.metric("boomerang_dead_letters"), 0.0);
    }
    assert_eq!(node.metric("boomerang_failed_attempts_total"), 0.0);
}

#[test]
fn a_receiver_of_many_connections_keeps_them() {
    const ROUNDS: usize = 20;
    const TASKS: usize = 20;
    let receiver = Receiver::that_accepts();
    let (node, mut client) = world(&[], &receiver, fixed(1, 0));
    let task = Task { payload: b"x".to_vec(), delay_ms: 50, repeat_interval_ms: 0 };
    let register = client.frame(Payload::RegistrationRequest(task));
    let mut connections = BTreeSet::new();
    for _ in 0..ROUNDS {
        client.raw.send_bytes(&register.repeat(TASKS));
        for _ in 0..TASKS {
            client.answer();
        }
        connections.extend((0..TASKS).map(|_| receiver.next().connection));
    }
    node.wait_for_metric("boomerang_pending", 0.0);
    eprintln!("{} connections for {} callbacks", connections.len(), ROUNDS * TASKS);
    let (used, callbacks) = (connections.len(), ROUNDS * TASKS);
    assert!(used < callbacks / 4, "{used} connections for {callbacks} callbacks, where they could have been kept");
}

/// The original named a receiver of four protocols by number; each of them is called back.
#[test]
fn callbacks_come_by_every_protocol_of_the_original() {
    use boomerang_receiver::Receiver as Modern;
    use boomerang_task::Protocol;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let node = NodeProcess::start(&[]);
    for (number, protocol) in [(0, Protocol::Tcp), (1, Protocol::Grpc), (2, Protocol::Http), (3, Protocol::Udp)] {
        let (receiver, mut deliveries) = runtime.block_on(Modern::channel_of(protocol, "127.0.0.1:0", 10)).unwrap();
        let address = receiver.local_addr();
        let endpoint = match protocol {
            Protocol::Http => format!("http://{address}/callback"),
            Protocol::Grpc => format!("http://{address}"),
            Protocol::Tcp | Protocol::Udp => address.to_string(),
        };
        let client_id = format!("by-{protocol}");
        let answer = node.admin().put_client(ClientRegistrationRequest {
            password: password_of(&client_id),
            client_id: client_id.clone(),
            callback: Some(common::legacy::CallbackConfig { protocol: number, endpoint }),
            ..Default::default()
        });
        assert_eq!(answer.status, OK, "{answer:?}");
        let mut client = Client::login(node.started.tcp, &client_id, &password_of(&client_id));
        let (id, _) = client.throw(b"hello", 100);
        let came = async { tokio::time::timeout(common::PATIENCE, deliveries.recv()).await };
        let received = runtime.block_on(came).expect("it comes").unwrap();
        let what = (received.task_id.to_string(), received.payload.as_ref());
        assert_eq!(what, (id, &b"hello"[..]), "task and payload by {protocol}");
        assert_eq!((received.protocol, received.client_id), (protocol, client_id), "protocol and client");
        node.wait_for_metric("boomerang_pending", 0.0);
    }
}
