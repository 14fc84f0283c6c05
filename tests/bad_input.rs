//! Whatever a client sends, or does not: it gets a clear answer or is disconnected, the others notice nothing, and no
//! task that was accepted is lost.

mod common;

use std::io::Write;
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use boomerang_wire::proto::{self, BoomerangEnvelope, Status, boomerang_envelope::Payload};
use common::legacy::{
    self, CallbackConfig, Client, ClientRegistrationRequest, DlqPolicy, ERROR, INVALID_REQUEST, OK, RetryPolicy,
    SESSION_EXPIRED, TCP, UNAUTHORIZED, password_of,
};
use common::node::{ADMIN_PASSWORD, NodeProcess};
use common::raw::{NoFrame, Raw, frame};
use common::receiver::Receiver;
use common::{eventually, now_ms};

const HOUR_MS: u64 = 3_600_000;
const DAY_MS: u64 = 24 * HOUR_MS;
const MIB: usize = 1024 * 1024;

/// A node with a well-behaved client that has a task under way.
struct World {
    node: NodeProcess,
    good: Client,
    receiver: Receiver,
    /// Registered before anything bad happens.
    early: (String, u64),
}

impl World {
    fn new(flags: &[&str]) -> Self {
        let receiver = Receiver::that_accepts();
        let node = NodeProcess::start(flags);
        node.admin().add_client("orders", &receiver.endpoint(), None);
        let mut good = Client::login(node.started.tcp, "orders", &password_of("orders"));
        let early = good.throw(b"early", HOUR_MS);
        // One more that comes due while it happens.
        good.throw(b"meanwhile", 300);
        Self { node, good, receiver, early }
    }

    fn raw(&self) -> Raw {
        Raw::connect(self.node.started.tcp)
    }

    /// Nothing that was accepted is lost, an old connection works, and so does a new one.
    fn assert_unharmed(self) {
        self.assert_unharmed_and_comes(&[]);
    }

    /// The same, when `others` come as well.
    fn assert_unharmed_and_comes(mut self, others: &[&[u8]]) {
        let (id, due_ms) = self.good.throw(b"old connection", 0);
        let mut again = Client::login(self.node.started.tcp, "orders", &password_of("orders"));
        again.throw(b"new connection", 0);
        let mut missing = vec![b"meanwhile".as_slice(), b"old connection", b"new connection"];
        missing.extend(others);
        while !missing.is_empty() {
            let arrived = self.receiver.next();
            let at = missing.iter().position(|payload| *payload == arrived.payload);
            missing.swap_remove(at.unwrap_or_else(|| panic!("nobody waits for this: {arrived:?}")));
            if arrived.payload == b"old connection" {
                assert_eq!(arrived.task_id, id);
                arrived.assert_on_time(due_ms);
            }
        }
        let early = again.get(&self.early.0).task.expect("nothing is lost");
        assert_eq!((early.payload.as_slice(), early.expiration_ms), (b"early".as_slice(), self.early.1));
        assert_eq!(self.node.exit_code(), None);
        assert!(!self.node.log().contains("panicked"), "{}", self.node.log());
    }

    /// A session that understands everything there is.
    fn login(&self, raw: &mut Raw, handshake: proto::AuthHandshake) -> proto::AuthResponse {
        let handshake = proto::AuthHandshake { protocol: boomerang_wire::PROTOCOL, ..handshake };
        match raw.ask("", Payload::AuthHandshake(handshake)) {
            Payload::AuthResponse(answer) => answer,
            other => panic!("{other:?}"),
        }
    }

    fn admin_session(&self, raw: &mut Raw) -> String {
        let handshake =
            proto::AuthHandshake { client_id: "admin".into(), password: ADMIN_PASSWORD.into(), ..Default::default() };
        let answer = self.login(raw, handshake);
        assert_eq!(answer.status(), Status::Ok, "{answer:?}");
        answer.session_id
    }
}

#[test]
fn a_frame_that_ends_in_the_middle_harms_nobody() {
    let world = World::new(&[]);
    let whole = world.good.frame(legacy::Payload::RegistrationRequest(legacy::Task {
        payload: b"half".to_vec(),
        delay_ms: 0,
        repeat_interval_ms: 0,
    }));
    for cut in [1, 3, 4, 5, whole.len() - 1] {
        let mut raw = world.raw();
        raw.send_bytes(&whole[..cut]);
        raw.finish();
        raw.assert_closed();
        // Gone without a word.
        let mut raw = world.raw();
        raw.send_bytes(&whole[..cut]);
        drop(raw);
    }
    // Half of it, then the rest, is a whole.
    let mut slow = world.raw();
    slow.send_bytes(&whole[..7]);
    slow.send_bytes(&whole[7..]);
    let Payload::RegistrationResponse(answer) = slow.answer() else { panic!() };
    assert_eq!(answer.status(), Status::Ok);
    world.assert_unharmed_and_comes(&[b"half"]);
}

#[test]
fn a_frame_above_the_limit_is_answered_with_the_limit_and_the_connection_closed() {
    let world = World::new(&[]);
    for length in [MIB + 1, u32::MAX as usize] {
        let mut raw = world.raw();
        let mut bytes = u32::try_from(length).unwrap().to_be_bytes().to_vec();
        // A client in good faith sends the body before it looks for an answer.
        bytes.resize(4 + length.min(3 * MIB), b'x');
        let _ = raw.try_send_bytes(&bytes);
        let (status, text) = raw.problem();
        assert_eq!(status, INVALID_REQUEST);
        assert!(text.contains("1048576") && text.contains("closed"), "{text}");
        raw.assert_closed();
    }
    // What was asked before it is still answered, in order.
    let mut raw = world.raw();
    let mut bytes =
        world.good.frame(legacy::Payload::GetTaskRequest(legacy::GetTaskRequest { task_id: world.early.0.clone() }));
    bytes.extend([0xff; 4]);
    raw.send_bytes(&bytes);
    assert!(matches!(raw.answer(), Payload::GetTaskResponse(_)));
    assert_eq!(raw.problem().0, INVALID_REQUEST);
    raw.assert_closed();
    world.assert_unharmed();
}

#[test]
fn the_limit_of_a_frame_is_a_setting() {
    let world = World::new(&["--frame-max", "8192"]);
    let mut raw = world.raw();
    raw.send_bytes(&8193u32.to_be_bytes());
    assert!(raw.problem().1.contains("8192"));
    raw.assert_closed();
    let mut good = Client::login(world.node.started.tcp, "orders", &password_of("orders"));
    good.throw(&[b'x'; 4096], HOUR_MS);
    let refused = good.register(&[b'x'; 4097], HOUR_MS, 0);
    assert_eq!(refused.status, INVALID_REQUEST);
    assert!(refused.error_message.contains("4096"), "{refused:?}");
    world.assert_unharmed();
}

#[test]
fn bytes_without_a_meaning_are_refused_and_the_connection_goes_on() {
    let world = World::new(&[]);
    let mut raw = world.raw();
    // A frame of garbage; a frame of nothing; an envelope of nothing; unknown fields only.
    let garbage: Vec<u8> = [0, 0, 0, 8].into_iter().chain([0xff; 8]).collect();
    let unknown_only = [0, 0, 0, 3, 0xf8, 0x7f, 1];
    for (bytes, why) in [
        (garbage.as_slice(), "BoomerangEnvelope"),
        (&[0, 0, 0, 0], "no request"),
        (&[0, 0, 0, 2, 0x0a, 0], "no request"),
        (&unknown_only, "no request"),
    ] {
        raw.send_bytes(bytes);
        let (status, text) = raw.problem();
        assert_eq!(status, INVALID_REQUEST);
        assert!(text.contains(why), "{bytes:?}: {text}");
    }
    // The same connection can still do something sensible.
    let session = world.admin_session(&mut raw);
    let refreshed = raw.ask(&session, Payload::SessionRefresh(proto::SessionRefreshRequest {}));
    assert!(matches!(refreshed, Payload::SessionRefreshResponse(answer) if answer.status() == Status::Ok));
    // Somebody who speaks another protocol altogether, whose first bytes are a huge length.
    let mut http = world.raw();
    http.send_bytes(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(http.problem().1.contains("1048576"));
    http.assert_closed();
    world.assert_unharmed();
}

#[test]
fn answers_and_callbacks_are_not_requests() {
    let world = World::new(&[]);
    let mut raw = world.raw();
    let session = world.admin_session(&mut raw);
    let wrong = [
        Payload::AuthResponse(proto::AuthResponse::default()),
        Payload::RegistrationResponse(proto::RegistrationResponse::default()),
        Payload::CancellationResponse(proto::CancellationResponse::default()),
        Payload::SessionRefreshResponse(proto::SessionRefreshResponse::default()),
        Payload::ClientRegistrationResponse(proto::ClientRegistrationResponse::default()),
        Payload::ClientDeregistrationResponse(proto::ClientDeregistrationResponse::default()),
        Payload::CallbackRequest(proto::CallbackRequest::default()),
        Payload::CallbackResponse(proto::CallbackResponse::default()),
        Payload::ListTasksResponse(proto::ListTasksResponse::default()),
        Payload::GetTaskResponse(proto::GetTaskResponse::default()),
        Payload::ErrorResponse(proto::ErrorResponse::default()),
        Payload::ApiKeyResponse(proto::ApiKeyResponse::default()),
        Payload::ApiKeyRevocationResponse(proto::ApiKeyRevocationResponse::default()),
    ];
    for payload in wrong {
        let callback = matches!(payload, Payload::CallbackRequest(_) | Payload::CallbackResponse(_));
        let envelope = BoomerangEnvelope { session_id: session.clone(), request_id: 77, payload: Some(payload) };
        raw.send(&envelope);
        let answer = raw.next().unwrap();
        assert_eq!(answer.request_id, 77, "the answer says which frame it is about");
        let Some(Payload::ErrorResponse(answer)) = answer.payload else { panic!("{answer:?}") };
        assert_eq!(answer.status(), Status::InvalidRequest);
        let why = if callback { "a callback is sent by the server" } else { "an answer where a request was expected" };
        assert!(answer.error_message.contains(why), "{answer:?}");
    }
    world.assert_unharmed();
}

#[test]
fn a_session_must_be_known_and_alive() {
    let mut world = World::new(&["--session-timeout", "3s"]);
    let task_id = world.early.0.clone();
    for (session_id, status, why) in [
        ("", UNAUTHORIZED, "authenticate"),
        ("0123456789abcdef0123456789abcdef", SESSION_EXPIRED, "authenticate again"),
    ] {
        world.good.session_id = session_id.to_owned();
        let refused = world.good.get(&task_id);
        assert_eq!(refused.status, status);
        assert!(refused.error_message.contains(why), "{refused:?}");
        assert_eq!(world.good.register(b"x", 0, 0).status, status);
        assert_eq!(world.good.cancel(&task_id).status, status);
        assert_eq!(world.good.list(legacy::ListTasksRequest::default()).status, status);
        assert_eq!(world.good.remove_client("orders").status, status);
        assert_eq!(world.good.put_client(ClientRegistrationRequest::default()).status, status);
        assert_eq!(world.good.refresh().status, status);
    }
    let answer = world.good.authenticate("orders", &password_of("orders"));
    world.good.session_id = answer.session_id;
    let expired = eventually("the session expires", || {
        let answer = world.good.get(&task_id);
        (answer.status != OK).then_some((answer, now_ms()))
    });
    assert_eq!(expired.0.status, SESSION_EXPIRED);
    assert!(expired.0.error_message.contains("expired"), "{expired:?}");
    assert!(expired.1 >= answer.expires_at_ms, "not before its time");
    assert_eq!(world.good.refresh().status, SESSION_EXPIRED, "what has ended cannot be prolonged");
    // The same connection, a new session.
    let answer = world.good.authenticate("orders", &password_of("orders"));
    assert_eq!(answer.status, OK);
    world.receiver.next_is(b"meanwhile");
    world.good.session_id = answer.session_id;
    assert!(world.good.get(&task_id).task.is_some(), "a task outlives the session it was registered in");
}

#[test]
fn task_ids_are_checked() {
    let mut world = World::new(&[]);
    let other_shard = "01890000-0000-7fff-8000-000000000000";
    let long = "x".repeat(100_000);
    for (id, status, why) in [
        ("", INVALID_REQUEST, "task_id: is empty"),
        ("nonsense", INVALID_REQUEST, "is not a UUID"),
        ("6ba7b810-9dad-11d1-80b4-00c04fd430c8", INVALID_REQUEST, "not a UUIDv7"),
        ("00000000-0000-0000-0000-000000000000", INVALID_REQUEST, "not a UUIDv7"),
        ("\u{0}\u{1b}[31m\u{202e}", INVALID_REQUEST, "is not a UUID"),
        (long.as_str(), INVALID_REQUEST, "is not a UUID"),
        // Well-formed, and never made here: of a shard that there is, and of one that there is not.
        ("01890000-0000-7001-8000-000000000000", ERROR, "not known"),
        (other_shard, ERROR, "not known"),
    ] {
        let got = world.good.get(id);
        assert_eq!(got.status, status, "{got:?}");
        assert!(got.error_message.contains(why) && got.error_message.len() < 300, "{got:?}");
        assert!(!got.error_message.contains('\u{1b}'), "nothing that a terminal would obey");
        let cancelled = world.good.cancel(id);
        assert_eq!((cancelled.status, cancelled.error_message), (status, got.error_message));
    }
    world.assert_unharmed();
}

#[test]
fn times_and_sizes_have_limits_and_refusals_name_them() {
    let mut world = World::new(&["--delay-max", "30d", "--payload-max", "1000"]);
    let limit_ms = 30 * DAY_MS;
    for (delay_ms, interval_ms, field) in [
        (limit_ms + 1, 0, "delay_ms"),
        (u64::MAX, 0, "delay_ms"),
        (0, limit_ms + 1, "repeat_interval_ms"),
        (0, u64::MAX, "repeat_interval_ms"),
    ] {
        let refused = world.good.register(b"x", delay_ms, interval_ms);
        assert_eq!((refused.status, refused.task_id.as_str()), (INVALID_REQUEST, ""));
        assert!(refused.error_message.starts_with(field) && refused.error_message.contains("30 days"), "{refused:?}");
    }
    assert_eq!(world.good.register(b"x", limit_ms, limit_ms).status, OK, "the limits themselves are allowed");
    let refused = world.good.register(&[0; 1001], HOUR_MS, 0);
    assert_eq!(refused.status, INVALID_REQUEST);
    assert!(refused.error_message.contains("1001") && refused.error_message.contains("1000"), "{refused:?}");
    world.good.throw(&[0; 1000], HOUR_MS);
    world.good.throw(&[], HOUR_MS);

    let mut raw = world.raw();
    let ask = |raw: &mut Raw, task| match raw.ask(&world.good.session_id, Payload::RegistrationRequest(task)) {
        Payload::RegistrationResponse(answer) => answer,
        other => panic!("{other:?}"),
    };
    let due_ms = now_ms() + HOUR_MS;
    let both = ask(&mut raw, proto::Task { due_ms, delay_ms: 5, ..Default::default() });
    assert_eq!(both.status(), Status::InvalidRequest);
    assert!(both.error_message.contains("due_ms") && both.error_message.contains("delay_ms"), "{both:?}");
    let far = ask(&mut raw, proto::Task { due_ms: due_ms + 31 * DAY_MS, ..Default::default() });
    assert_eq!(far.status(), Status::InvalidRequest);
    assert!(far.error_message.starts_with("due_ms") && far.error_message.contains("30 days"), "{far:?}");
    let exact = ask(&mut raw, proto::Task { due_ms, ..Default::default() });
    assert_eq!((exact.status(), exact.scheduled_time_ms), (Status::Ok, due_ms));
    drop(raw);
    world.assert_unharmed();
}

#[test]
fn clients_and_their_settings_are_checked_when_they_are_set() {
    let world = World::new(&[]);
    let mut admin = world.node.admin();
    let callback = |protocol, endpoint: &str| Some(CallbackConfig { protocol, endpoint: endpoint.into() });
    let good = ClientRegistrationRequest {
        client_id: "new".into(),
        password: "pw".into(),
        callback: callback(TCP, "h:1"),
        ..Default::default()
    };
    let retry = RetryPolicy { max_attempts: 3, strategy: 0, interval_ms: 10, max_interval_ms: 0 };
    let named = |client_id: String| ClientRegistrationRequest { client_id, ..good.clone() };
    let called =
        |protocol, endpoint: &str| ClientRegistrationRequest { callback: callback(protocol, endpoint), ..good.clone() };
    let retried = |retry| ClientRegistrationRequest { retry: Some(retry), ..good.clone() };
    for (request, why) in [
        (named(String::new()), "client_id"),
        (named("x".repeat(129)), "client_id"),
        (named("a\nb".into()), "client_id"),
        (ClientRegistrationRequest { password: String::new(), ..good.clone() }, "password"),
        (ClientRegistrationRequest { password: "x".repeat(1025), ..good.clone() }, "password"),
        (called(TCP, ""), "callback.endpoint"),
        (called(TCP, "no port"), "callback.endpoint"),
        (called(TCP, "h:0"), "callback.endpoint"),
        (called(TCP, "h:70000"), "callback.endpoint"),
        (called(TCP, &format!("{}:1", "x".repeat(3_000))), "callback.endpoint"),
        (called(9, "h:1"), "callback.protocol"),
        (retried(RetryPolicy { max_attempts: 1_001, ..retry.clone() }), "retry.max_attempts"),
        (retried(RetryPolicy { strategy: 7, ..retry.clone() }), "retry.strategy"),
        (retried(RetryPolicy { interval_ms: 8 * DAY_MS, ..retry }), "retry.interval_ms"),
        (
            ClientRegistrationRequest { dlq: Some(DlqPolicy { destination: "x".repeat(3_000) }), ..good.clone() },
            "dlq.destination",
        ),
    ] {
        let refused = admin.put_client(request);
        assert_eq!(refused.status, INVALID_REQUEST, "{why}: {refused:?}");
        assert!(refused.error_message.contains(why) && refused.error_message.len() < 4_000, "{why}: {refused:?}");
    }
    // None of these has left anything behind.
    assert_eq!(Client::connect(world.node.started.tcp).authenticate("new", "pw").status, UNAUTHORIZED);

    // The same checks for what a session brings itself.
    let mut raw = world.raw();
    for (handshake, why) in [
        (proto::AuthHandshake { client_id: String::new(), ..Default::default() }, "client_id"),
        (
            proto::AuthHandshake {
                callback: Some(proto::CallbackConfig { protocol: 0, endpoint: "nowhere".into(), ..Default::default() }),
                ..as_admin()
            },
            "callback.endpoint",
        ),
        (
            proto::AuthHandshake {
                callback: Some(proto::CallbackConfig { protocol: 99, endpoint: "h:1".into(), ..Default::default() }),
                ..as_admin()
            },
            "callback.protocol",
        ),
    ] {
        let refused = world.login(&mut raw, handshake);
        assert_eq!((refused.status(), refused.session_id.as_str()), (Status::InvalidRequest, ""), "{why}");
        assert!(refused.error_message.contains(why), "{refused:?}");
    }
    assert_eq!(admin.put_client(good).status, OK);
    world.assert_unharmed();
}

/// What came after the original protocol: each wrong field is refused by its name, and changes nothing.
#[test]
fn nonsense_in_later_messages_is_refused_by_name() {
    use proto::*;
    let world = World::new(&[]);
    let mut raw = world.raw();
    let session = world.admin_session(&mut raw);
    let here = Some(proto::CallbackConfig { endpoint: world.receiver.endpoint(), ..Default::default() });
    let task = || Task { callback: here.clone(), delay_ms: HOUR_MS, ..Default::default() };
    let every = |recurrence: Recurrence| Task { repeat_interval_ms: 1_000, recurrence: Some(recurrence), ..task() };
    let to = |callback: proto::CallbackConfig| Task { callback: Some(callback), ..task() };
    let http = || proto::CallbackConfig { protocol: 2, endpoint: "http://h/".into(), ..Default::default() };
    let letter = format!("{}@5", world.early.0);
    let long = "x".repeat(1_000);
    let tasks: Vec<(&str, Task)> = vec![
        ("due_ms", Task { due_ms: now_ms(), ..task() }),
        ("dedup_key", Task { dedup_key: long.clone(), ..task() }),
        ("dedup_ttl_ms", Task { dedup_key: "k".into(), dedup_ttl_ms: u64::MAX, ..task() }),
        ("name", Task { name: long.clone(), ..task() }),
        ("name", Task { name: "a\u{0}b".into(), ..task() }),
        ("labels", Task { labels: [("".to_owned(), "v".to_owned())].into(), ..task() }),
        ("labels", Task { labels: (0..20).map(|n| (n.to_string(), String::new())).collect(), ..task() }),
        ("recurrence", Task { recurrence: Some(Recurrence { count: 3, ..Default::default() }), ..task() }),
        ("recurrence.missed", every(Recurrence { missed: 9, ..Default::default() })),
        ("recurrence.missed_max", every(Recurrence { missed: 2, missed_max: u32::MAX, ..Default::default() })),
        ("recurrence.until_ms", every(Recurrence { until_ms: 1, ..Default::default() })),
        ("callback.protocol", to(proto::CallbackConfig { protocol: 9, ..http() })),
        ("callback.endpoint", to(proto::CallbackConfig { endpoint: "nowhere".into(), ..http() })),
        ("callback.secret", to(proto::CallbackConfig { secret: "whsec_???".into(), ..http() })),
        ("callback.secret", to(proto::CallbackConfig { secret: "s".into(), ..here.clone().unwrap() })),
        ("callback.timeout_ms", to(proto::CallbackConfig { timeout_ms: u64::MAX, ..http() })),
        ("callback.acknowledge", to(proto::CallbackConfig { acknowledge: true, ..http() })),
        (
            "retry.max_attempts",
            Task { retry: Some(proto::RetryPolicy { max_attempts: 9_999, ..Default::default() }), ..task() },
        ),
        (
            "retry.jitter_percent",
            Task { retry: Some(proto::RetryPolicy { jitter_percent: 101, ..Default::default() }), ..task() },
        ),
        ("dlq.destination", Task { dlq: Some(proto::DlqPolicy { destination: "http:///x".into() }), ..task() }),
        ("dlq.destination", Task { dlq: Some(proto::DlqPolicy { destination: "x".repeat(9_999) }), ..task() }),
    ];
    for (field, task) in tasks {
        let Payload::RegistrationResponse(answer) = raw.ask(&session, Payload::RegistrationRequest(task.clone()))
        else {
            panic!()
        };
        assert_eq!(answer.status(), Status::InvalidRequest, "{task:?}");
        assert!(answer.error_message.starts_with(&format!("{field}:")), "{field}: {}", answer.error_message);
        // In a batch it is refused just the same, and alone.
        let batch = RegistrationBatch { tasks: vec![task.clone(), task], origin: None };
        let Payload::RegistrationBatchResponse(answer) = raw.ask(&session, Payload::RegistrationBatch(batch)) else {
            panic!()
        };
        assert_eq!((answer.status(), answer.responses.len()), (Status::Ok, 2));
        assert!(answer.responses.iter().all(|answer| answer.status() == Status::InvalidRequest));
    }
    let udp = proto::CallbackConfig { protocol: 3, endpoint: "h:1".into(), ..Default::default() };
    let too_large = Task { payload: vec![0; 60_001].into(), ..to(udp) };
    let Payload::RegistrationResponse(answer) = raw.ask(&session, Payload::RegistrationRequest(too_large)) else {
        panic!()
    };
    assert!(answer.error_message.starts_with("payload:"), "{}", answer.error_message);

    let id = world.early.0.clone();
    let update =
        |request: UpdateTaskRequest| Payload::UpdateTaskRequest(UpdateTaskRequest { task_id: id.clone(), ..request });
    let list = |request: ListTasksRequest| Payload::ListTasksRequest(request);
    let letters = |filter: DeadLetterFilter, next_token: &str| {
        let (filter, next_token) = (Some(filter), next_token.to_owned());
        Payload::ListDeadLettersRequest(ListDeadLettersRequest { filter, next_token, limit: 0 })
    };
    let replay = |ids: Vec<String>| {
        Payload::ReplayDeadLettersRequest(ReplayDeadLettersRequest { dead_letter_ids: ids, ..Default::default() })
    };
    let requests: Vec<(&str, Status, Payload)> = vec![
        ("nothing to change", Status::InvalidRequest, update(Default::default())),
        (
            "due_ms",
            Status::InvalidRequest,
            update(UpdateTaskRequest { due_ms: Some(9), delay_ms: Some(9), ..Default::default() }),
        ),
        ("due_ms", Status::InvalidRequest, update(UpdateTaskRequest { due_ms: Some(u64::MAX), ..Default::default() })),
        (
            "delay_ms",
            Status::InvalidRequest,
            update(UpdateTaskRequest { delay_ms: Some(u64::MAX), ..Default::default() }),
        ),
        (
            "callback.endpoint",
            Status::InvalidRequest,
            update(UpdateTaskRequest { callback: Some(Default::default()), ..Default::default() }),
        ),
        (
            "task_id",
            Status::InvalidRequest,
            Payload::PauseTaskRequest(PauseTaskRequest { task_id: "x".into(), paused: true }),
        ),
        (
            "dead_letter_id",
            Status::InvalidRequest,
            Payload::GetDeadLetterRequest(GetDeadLetterRequest { dead_letter_id: id.clone() }),
        ),
        (
            "dead letter",
            Status::NotFound,
            Payload::GetDeadLetterRequest(GetDeadLetterRequest { dead_letter_id: letter }),
        ),
        ("dead_letter_id", Status::InvalidRequest, replay(vec!["x@y".into()])),
        ("dead_letter_ids", Status::InvalidRequest, replay(vec![String::new(); 1_001])),
        ("state", Status::InvalidRequest, list(ListTasksRequest { state: 77, ..Default::default() })),
        (
            "label_prefix",
            Status::InvalidRequest,
            list(ListTasksRequest { label_prefix: "env".into(), ..Default::default() }),
        ),
        (
            "label_prefix",
            Status::InvalidRequest,
            list(ListTasksRequest { label_prefix: "a=".into(), name_prefix: "n".into(), ..Default::default() }),
        ),
        (
            "next_token",
            Status::InvalidRequest,
            list(ListTasksRequest { next_token: "t".repeat(99), ..Default::default() }),
        ),
        ("next_token", Status::InvalidRequest, letters(Default::default(), "nonsense")),
        (
            "failure_class",
            Status::InvalidRequest,
            letters(DeadLetterFilter { failure_class: 99, ..Default::default() }, ""),
        ),
        (
            "task_id",
            Status::InvalidRequest,
            letters(DeadLetterFilter { task_id: "x".into(), ..Default::default() }, ""),
        ),
    ];
    for (text, status, request) in requests {
        let shown = format!("{request:?}");
        let (found, message) = match raw.ask(&session, request) {
            Payload::UpdateTaskResponse(answer) => (answer.status(), answer.error_message),
            Payload::PauseTaskResponse(answer) => (answer.status(), answer.error_message),
            Payload::GetDeadLetterResponse(answer) => (answer.status(), answer.error_message),
            Payload::ReplayDeadLettersResponse(answer) => (answer.status(), answer.error_message),
            Payload::ListTasksResponse(answer) => (answer.status(), answer.error_message),
            Payload::ListDeadLettersResponse(answer) => (answer.status(), answer.error_message),
            other => panic!("{other:?}"),
        };
        assert_eq!(found, status, "{shown}: {message}");
        assert!(message.starts_with(text), "{shown}: {message}");
    }
    // Without a session, nothing.
    for request in [update(Default::default()), letters(Default::default(), ""), list(Default::default())] {
        let answer = format!("{:?}", raw.ask("", request));
        assert!(answer.contains("authenticate first"), "{answer}");
    }
    world.assert_unharmed();
}

fn as_admin() -> proto::AuthHandshake {
    proto::AuthHandshake { client_id: "admin".into(), password: ADMIN_PASSWORD.into(), ..Default::default() }
}

#[test]
fn an_api_key_opens_until_it_is_revoked() {
    let world = World::new(&[]);
    let mut raw = world.raw();
    let admin = world.admin_session(&mut raw);
    let create = |raw: &mut Raw, session: &str, client_id: &str, label: &str| {
        let request = proto::ApiKeyRequest { client_id: client_id.into(), label: label.into() };
        match raw.ask(session, Payload::ApiKeyRequest(request)) {
            Payload::ApiKeyResponse(answer) => answer,
            other => panic!("{other:?}"),
        }
    };
    let revoke = |raw: &mut Raw, session: &str, key_id: &str| match raw
        .ask(session, Payload::ApiKeyRevocation(proto::ApiKeyRevocation { key_id: key_id.into() }))
    {
        Payload::ApiKeyRevocationResponse(answer) => answer.status(),
        other => panic!("{other:?}"),
    };
    let with_token = |token: &str| proto::AuthHandshake { token: token.into(), ..Default::default() };

    let made = create(&mut raw, &admin, "orders", "ci");
    assert_eq!(made.status(), Status::Ok, "{made:?}");
    let spare = create(&mut raw, &admin, "orders", "spare");
    assert!(made.key != spare.key && made.key.contains(&made.key_id));
    assert_eq!(create(&mut raw, &admin, "nobody", "").status(), Status::NotFound);
    assert_eq!(create(&mut raw, &admin, "orders", &"x".repeat(129)).status(), Status::InvalidRequest);

    let session = world.login(&mut raw, with_token(&made.key));
    assert_eq!(session.status(), Status::Ok, "{session:?}");
    // It is its client: with its receiver, and without its administrator's rights.
    let task = proto::Task { payload: b"with a key".as_slice().into(), ..Default::default() };
    let registered = raw.ask(&session.session_id, Payload::RegistrationRequest(task));
    assert!(matches!(registered, Payload::RegistrationResponse(answer) if answer.status() == Status::Ok));
    assert_eq!(create(&mut raw, &session.session_id, "orders", "").status(), Status::Unauthorized);
    assert_eq!(revoke(&mut raw, &session.session_id, &made.key_id), Status::Unauthorized);

    let (prefix, secret) = made.key.rsplit_once('_').unwrap();
    let swapped = format!("{prefix}_{}", spare.key.rsplit_once('_').unwrap().1);
    for wrong in ["bmr_", "x", &made.key[1..], &format!("{}_{secret}0", prefix), &swapped] {
        assert_eq!(world.login(&mut raw, with_token(wrong)).status(), Status::Unauthorized, "{wrong}");
    }

    assert_eq!(revoke(&mut raw, &admin, &made.key_id), Status::Ok);
    let refused = world.login(&mut raw, with_token(&made.key));
    assert_eq!(refused.status(), Status::Unauthorized);
    assert!(refused.error_message.contains("revoked"), "{refused:?}");
    // And whoever came in with it is out.
    let task = proto::Task { delay_ms: HOUR_MS, ..Default::default() };
    let late = raw.ask(&session.session_id, Payload::RegistrationRequest(task));
    assert!(matches!(late, Payload::RegistrationResponse(answer) if answer.status() == Status::SessionExpired));
    assert_eq!(revoke(&mut raw, &admin, &made.key_id), Status::NotFound);
    assert_eq!(world.login(&mut raw, with_token(&spare.key)).status(), Status::Ok, "the other one is another one");
    // A client's keys go with it.
    let mut legacy_admin = world.node.admin();
    legacy_admin.add_client("gone", &world.receiver.endpoint(), None);
    let of_gone = create(&mut raw, &admin, "gone", "");
    assert_eq!(legacy_admin.remove_client("gone").status, OK);
    assert_eq!(world.login(&mut raw, with_token(&of_gone.key)).status(), Status::Unauthorized);
    world.assert_unharmed_and_comes(&[b"with a key"]);
}

/// Sends `bytes` again and again and never reads. Returns how many bytes went out until the server had enough.
fn send_and_never_read(raw: &Raw, bytes: Vec<u8>, sent: Arc<AtomicUsize>) -> std::thread::JoinHandle<()> {
    let mut stream = raw.stream();
    std::thread::spawn(move || {
        while stream.write_all(&bytes).is_ok() {
            sent.fetch_add(bytes.len(), Ordering::Relaxed);
        }
        let _ = stream.shutdown(Shutdown::Both);
    })
}

#[test]
fn a_client_that_does_not_read_its_answers_is_disconnected_and_costs_little() {
    const TASK_BYTES: usize = 400 * 1024;
    /// Four large answers and what was read ahead, twice over, and what the store needs meanwhile. Without a bound it
    /// would be gigabytes.
    const GROWTH_MAX: u64 = 64 << 20;
    let mut world = World::new(&["--write-timeout", "1s"]);
    let mut large = Vec::new();
    for _ in 0..8 {
        large.push(world.good.throw(&vec![b'x'; TASK_BYTES], HOUR_MS).0);
    }
    let gets: Vec<u8> = large
        .iter()
        .cycle()
        .take(2_000)
        .flat_map(|id| {
            world.good.frame(legacy::Payload::GetTaskRequest(legacy::GetTaskRequest { task_id: id.clone() }))
        })
        .collect();
    let list = legacy::ListTasksRequest { limit: 1_000, ..Default::default() };
    let lists = world.good.frame(legacy::Payload::ListTasksRequest(list)).repeat(500);
    // Refused, so that the disk is not filled: the answers are as long as others.
    let task = legacy::Task { payload: Vec::new(), delay_ms: u64::MAX, repeat_interval_ms: 0 };
    let registrations = world.good.frame(legacy::Payload::RegistrationRequest(task)).repeat(4_000);
    // The tasks are in memory by now, and everything has been used once.
    assert!(world.good.get(&large[0]).task.is_some());
    let before = world.node.resident_bytes();
    let connections = world.node.metric("boomerang_connections");

    let mut slow = Vec::new();
    for bytes in [gets, lists, registrations] {
        let raw = Raw::connect_with_small_buffer(world.node.started.tcp);
        let sent = Arc::new(AtomicUsize::new(0));
        slow.push((send_and_never_read(&raw, bytes, sent.clone()), raw));
    }
    let begun = Instant::now();
    let (mut most, mut served, mut longest) = (0, 0, Duration::ZERO);
    while world.node.metric("boomerang_connections") > connections
        || slow.iter().any(|(thread, _)| !thread.is_finished())
    {
        let asked = Instant::now();
        world.good.throw(b"x", HOUR_MS);
        longest = longest.max(asked.elapsed());
        served += 1;
        most = most.max(world.node.resident_bytes());
        assert!(begun.elapsed() < Duration::from_secs(15), "they are still connected");
    }
    eprintln!(
        "disconnected after {:?}; memory {} KiB, at most {} KiB more; {served} others served, the slowest in {longest:?}",
        begun.elapsed(),
        before / 1024,
        most.saturating_sub(before) / 1024
    );
    assert!(most.saturating_sub(before) < GROWTH_MAX, "{} KiB more", most.saturating_sub(before) / 1024);
    assert!(served > 10 && longest < Duration::from_secs(1), "{served} served, the slowest in {longest:?}");
    for (thread, _) in slow {
        thread.join().unwrap();
    }
    world.assert_unharmed();
}

#[test]
fn a_client_that_reads_late_but_reads_gets_everything() {
    let mut world = World::new(&["--write-timeout", "5s"]);
    let (id, _) = world.good.throw(&vec![b'x'; 400 * 1024], HOUR_MS);
    let mut slow = Raw::connect_with_small_buffer(world.node.started.tcp);
    const ASKED: usize = 40;
    let get = world.good.frame(legacy::Payload::GetTaskRequest(legacy::GetTaskRequest { task_id: id }));
    slow.send_bytes(&get.repeat(ASKED));
    // Nobody reads, and everything that may pile up has piled up: the others do not wait for it.
    world.good.throw(b"x", HOUR_MS);
    slow.finish();
    for n in 0..ASKED {
        let Payload::GetTaskResponse(answer) = slow.answer() else { panic!() };
        assert_eq!(answer.task.expect("the task").payload.len(), 400 * 1024, "answer {n}");
    }
    // Half-closed: it gets all its answers, and then the end.
    slow.assert_closed();
    world.assert_unharmed();
}

#[test]
fn a_page_of_large_tasks_fits_into_a_frame() {
    let mut world = World::new(&[]);
    // Many small ones and then one of the largest: together more than a frame takes.
    let mut ids: Vec<String> = (0..700).map(|n| world.good.throw(&[b'x'; 700], 2 * HOUR_MS + n).0).collect();
    for n in 0..3 {
        ids.push(world.good.throw(&vec![b'x'; 512 * 1024], 3 * HOUR_MS + n).0);
    }
    let request =
        legacy::ListTasksRequest { scheduled_after: now_ms() + 3 * HOUR_MS / 2, limit: 1_000, ..Default::default() };
    let mut found = Vec::new();
    let mut next_token = String::new();
    loop {
        let request = legacy::ListTasksRequest { next_token, ..request.clone() };
        let bytes = world.good.frame(legacy::Payload::ListTasksRequest(request));
        world.good.raw.send_bytes(&bytes);
        let body = world.good.raw.next_frame(common::PATIENCE).unwrap();
        assert!(body.len() <= MIB, "a frame of {} bytes", body.len());
        let envelope: legacy::Envelope = prost::Message::decode(&*body).unwrap();
        let Some(legacy::Payload::ListTasksResponse(answer)) = envelope.payload else { panic!() };
        assert_eq!(answer.status, OK);
        found.extend(answer.tasks.into_iter().map(|task| task.task_id));
        next_token = answer.next_token;
        if next_token.is_empty() {
            break;
        }
    }
    assert_eq!(found, ids);
    world.assert_unharmed();
}

#[test]
fn a_next_token_of_somebody_elses_making_is_refused() {
    let mut world = World::new(&[]);
    for next_token in ["x".to_owned(), "0".repeat(52), "é".repeat(26), "f".repeat(100_000)] {
        let answer = world.good.list(legacy::ListTasksRequest { next_token, ..Default::default() });
        assert_eq!(answer.status, INVALID_REQUEST);
        assert!(answer.error_message.contains("next_token") && answer.error_message.len() < 300, "{answer:?}");
    }
    // Wishes beyond reason are cut down to what there is.
    let all = legacy::ListTasksRequest { limit: u32::MAX, scheduled_before: u64::MAX, ..Default::default() };
    assert_eq!(world.good.list(all).status, OK);
    let none = legacy::ListTasksRequest { scheduled_after: u64::MAX, scheduled_before: 1, ..Default::default() };
    assert_eq!(world.good.list(none).tasks, []);
    world.assert_unharmed();
}

#[test]
fn connections_that_say_nothing_and_connections_that_come_and_go() {
    let world = World::new(&[]);
    let connections = world.node.metric("boomerang_connections");
    let silent = world.raw();
    let mut held = Vec::new();
    for n in 0..500 {
        let mut raw = world.raw();
        match n % 4 {
            // Closed at once.
            0 => {}
            // Closed in the middle of a frame.
            1 => raw.send_bytes(&[0, 0]),
            // Asked, and gone before the answer.
            2 => raw.send_bytes(&frame(&BoomerangEnvelope::default())),
            _ => held.push(raw),
        }
    }
    drop(held);
    // The silent one is still there, and can begin to speak.
    world.node.wait_for_metric("boomerang_connections", connections + 1.0);
    let mut silent = silent;
    world.admin_session(&mut silent);
    assert_eq!(silent.next_frame(Duration::from_millis(50)), Err(NoFrame::TimedOut), "nothing that nobody asked for");
    world.assert_unharmed();
}

#[test]
fn more_connections_than_the_limit_wait_and_are_served_later() {
    let mut world = World::new(&["--connections-max", "3"]);
    let held: Vec<Raw> = (0..3).map(|_| world.raw()).collect();
    // The good client and two of these are in.
    world.good.throw(b"x", HOUR_MS);
    world.node.wait_for_metric("boomerang_connections", 3.0);
    drop(held);
    world.assert_unharmed();
}
