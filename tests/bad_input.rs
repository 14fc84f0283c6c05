//! Whatever a client sends, or does not: it gets a clear answer or is disconnected, the others notice nothing, and no
//! task that was accepted is lost.
//!
//! Where a message goes in and a status and a text come out, the messages are a table: name, message, status, text. The
//! other tests are about what no table can say: who does not read, goes away in the middle, or comes in crowds.

mod common;

use std::io::Write;
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use boomerang_wire::proto::{self, BoomerangEnvelope, Status, boomerang_envelope::Payload};
use common::cases::{
    Came, ask, ask_as_original, case, check, registered, send_bytes, send_last_bytes, send_no_request,
};
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
            missing.swap_remove(at.unwrap_or_else(|| panic!("a callback that no task is waiting for: {arrived:?}")));
            if arrived.payload == b"old connection" {
                assert_eq!(arrived.task_id, id, "the callback names the task that was registered");
                arrived.assert_on_time(due_ms);
            }
        }
        let early = again.get(&self.early.0).task.expect("the task that was registered before is still there");
        let (payload, due_ms) = (early.payload.as_slice(), early.expiration_ms);
        assert_eq!((payload, due_ms), (b"early".as_slice(), self.early.1), "the task that was registered before");
        assert_eq!(self.node.exit_code(), None, "the exit code of a node that should still run");
        assert!(!self.node.log().contains("panicked"), "a thread of the node panicked: {}", self.node.log());
    }

    /// A session of the administrator that understands everything there is.
    fn admin_session(&self, raw: &mut Raw) -> String {
        self.login(raw, as_admin()).session_id
    }

    fn login(&self, raw: &mut Raw, handshake: proto::AuthHandshake) -> proto::AuthResponse {
        match raw.ask("", Payload::AuthHandshake(handshake)) {
            Payload::AuthResponse(answer) if answer.status() == Status::Ok => answer,
            other => panic!("a session was expected: {other:?}"),
        }
    }
}

/// Of a client that understands everything there is.
fn as_admin() -> proto::AuthHandshake {
    proto::AuthHandshake {
        client_id: "admin".into(),
        password: ADMIN_PASSWORD.into(),
        protocol: boomerang_wire::PROTOCOL,
        ..Default::default()
    }
}

fn refresh() -> Payload {
    Payload::SessionRefresh(proto::SessionRefreshRequest {})
}

fn get(task_id: &str) -> legacy::Payload {
    legacy::Payload::GetTaskRequest(legacy::GetTaskRequest { task_id: task_id.to_owned() })
}

fn cancel(task_id: &str) -> legacy::Payload {
    legacy::Payload::CancellationRequest(legacy::CancellationRequest { task_id: task_id.to_owned() })
}

fn register(payload: &[u8], delay_ms: u64, repeat_interval_ms: u64) -> legacy::Payload {
    legacy::Payload::RegistrationRequest(legacy::Task { payload: payload.to_vec(), delay_ms, repeat_interval_ms })
}

fn list(request: legacy::ListTasksRequest) -> legacy::Payload {
    legacy::Payload::ListTasksRequest(request)
}

fn remove_client(client_id: &str) -> legacy::Payload {
    legacy::Payload::ClientDeregistration(legacy::ClientDeregistrationRequest { client_id: client_id.to_owned() })
}

/// What is refused is not quoted at length.
fn assert_short(texts: &[String]) {
    for text in texts {
        assert!(text.len() < 300, "a refusal of {} bytes: {text}", text.len());
    }
}

#[test]
fn a_frame_that_ends_in_the_middle_harms_nobody() {
    let world = World::new(&[]);
    let whole = world.good.frame(register(b"half", 0, 0));
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
    let answer = slow.answer();
    let accepted = matches!(&answer, Payload::RegistrationResponse(answer) if answer.status() == Status::Ok);
    assert!(accepted, "a frame that came in two parts is one frame: {answer:?}");
    world.assert_unharmed_and_comes(&[b"half"]);
}

#[test]
fn a_frame_above_the_limit_is_answered_with_the_limit_and_the_connection_closed() {
    let world = World::new(&[]);
    let frame_of = |length: u32| {
        let mut bytes = length.to_be_bytes().to_vec();
        // A client in good faith sends the body before it looks for an answer.
        bytes.resize(4 + (length as usize).min(3 * MIB), b'x');
        bytes
    };
    let limit = "the frame is larger than 1048576 bytes; the connection is closed";
    check(
        [
            case("one byte above the limit", frame_of(1024 * 1024 + 1), INVALID_REQUEST, limit),
            case("the longest frame there is", frame_of(u32::MAX), INVALID_REQUEST, limit),
            case("another protocol", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), INVALID_REQUEST, limit),
        ],
        |bytes| send_last_bytes(&mut world.raw(), &bytes),
    );
    // What was asked before it is still answered, in order.
    let mut raw = world.raw();
    raw.send_bytes(&world.good.frame(get(&world.early.0)));
    raw.send_bytes(&[0xff; 4]);
    let first = raw.answer();
    assert!(matches!(first, Payload::GetTaskResponse(_)), "the answer to what was asked first: {first:?}");
    check([case("a frame that follows a request", [], INVALID_REQUEST, limit)], |nothing| {
        send_last_bytes(&mut raw, &nothing)
    });
    world.assert_unharmed();
}

#[test]
fn the_limit_of_a_frame_is_a_setting() {
    let mut world = World::new(&["--frame-max", "8192"]);
    let limit = "the frame is larger than 8192 bytes; the connection is closed";
    check([case("a frame above it", 8193u32.to_be_bytes(), INVALID_REQUEST, limit)], |bytes| {
        send_last_bytes(&mut world.raw(), &bytes)
    });
    check(
        [
            case("a payload of half of it", register(&[b'x'; 4096], HOUR_MS, 0), OK, ""),
            case("a payload above that", register(&[b'x'; 4097], HOUR_MS, 0), INVALID_REQUEST, "payload: ...4096..."),
        ],
        |request| ask_as_original(&mut world.good, &request),
    );
    world.assert_unharmed();
}

#[test]
fn bytes_without_a_meaning_are_refused_and_the_connection_goes_on() {
    let world = World::new(&[]);
    let mut raw = world.raw();
    let frame_of = |body: &[u8]| [&[0, 0, 0, u8::try_from(body.len()).unwrap()], body].concat();
    check(
        [
            case("garbage", frame_of(&[0xff; 8]), INVALID_REQUEST, "the frame does not hold a BoomerangEnvelope: ..."),
            case("an empty frame", frame_of(&[]), INVALID_REQUEST, "the envelope holds no request"),
            case(
                "an envelope with an empty session",
                frame_of(&[0x0a, 0]),
                INVALID_REQUEST,
                "the envelope holds no request",
            ),
            case("a field nobody knows", frame_of(&[0xf8, 0x7f, 1]), INVALID_REQUEST, "the envelope holds no request"),
        ],
        |bytes| send_bytes(&mut raw, &bytes),
    );
    let session = world.admin_session(&mut raw);
    check([case("something sensible", refresh(), Status::Ok, "")], |request| ask(&mut raw, &session, request));
    world.assert_unharmed();
}

#[test]
fn answers_and_callbacks_are_not_requests() {
    const ANSWER: &str = "the envelope holds an answer where a request was expected";
    const CALLBACK: &str = "a callback is sent by the server, to the receiver's own address";
    let refused = |name, payload, text| case(name, payload, Status::InvalidRequest, text);
    let world = World::new(&[]);
    let mut raw = world.raw();
    let session = world.admin_session(&mut raw);
    check(
        [
            refused("authentication", Payload::AuthResponse(Default::default()), ANSWER),
            refused("registration", Payload::RegistrationResponse(Default::default()), ANSWER),
            refused("cancellation", Payload::CancellationResponse(Default::default()), ANSWER),
            refused("session", Payload::SessionRefreshResponse(Default::default()), ANSWER),
            refused("new client", Payload::ClientRegistrationResponse(Default::default()), ANSWER),
            refused("client removed", Payload::ClientDeregistrationResponse(Default::default()), ANSWER),
            refused("callback", Payload::CallbackRequest(Default::default()), CALLBACK),
            refused("answer to a callback", Payload::CallbackResponse(Default::default()), CALLBACK),
            refused("list of tasks", Payload::ListTasksResponse(Default::default()), ANSWER),
            refused("task", Payload::GetTaskResponse(Default::default()), ANSWER),
            refused("error", Payload::ErrorResponse(Default::default()), ANSWER),
            refused("new key", Payload::ApiKeyResponse(Default::default()), ANSWER),
            refused("key revoked", Payload::ApiKeyRevocationResponse(Default::default()), ANSWER),
        ],
        |payload| send_no_request(&mut raw, &session, payload),
    );
    world.assert_unharmed();
}

#[test]
fn a_session_must_be_known_and_alive() {
    let mut world = World::new(&["--session-timeout", "3s"]);
    let task_id = world.early.0.clone();
    let requests = || {
        [
            ("get", get(&task_id)),
            ("register", register(b"x", 0, 0)),
            ("cancel", cancel(&task_id)),
            ("list", list(legacy::ListTasksRequest::default())),
            ("remove a client", remove_client("orders")),
            ("put a client", legacy::Payload::ClientRegistration(ClientRegistrationRequest::default())),
        ]
    };
    let refresh = || legacy::Payload::SessionRefresh(legacy::SessionRefreshRequest {});
    for (session_id, status, text) in [
        ("", UNAUTHORIZED, "session_id: is empty; authenticate first"),
        ("0123456789abcdef0123456789abcdef", SESSION_EXPIRED, "session is unknown: ...; authenticate again"),
    ] {
        let in_session = |request| format!("{request} in session '{session_id}'");
        let rows = requests().map(|(name, request)| case(in_session(name), request, status, text));
        let without_text = case(in_session("refresh"), refresh(), status, "");
        world.good.session_id = session_id.to_owned();
        check(rows.into_iter().chain([without_text]), |request| ask_as_original(&mut world.good, &request));
    }
    let answer = world.good.authenticate("orders", &password_of("orders"));
    world.good.session_id = answer.session_id;
    let (expired, at_ms) = eventually("the session expires", || {
        let answer = world.good.get(&task_id);
        (answer.status != OK).then_some((answer, now_ms()))
    });
    assert!(at_ms >= answer.expires_at_ms, "{} ms before its time: {expired:?}", answer.expires_at_ms - at_ms);
    check(
        [
            case("get, in a session that has ended", get(&task_id), SESSION_EXPIRED, "...expired..."),
            case("refresh, which does not prolong what has ended", refresh(), SESSION_EXPIRED, ""),
        ],
        |request| ask_as_original(&mut world.good, &request),
    );
    // The same connection, a new session.
    world.receiver.next_is(b"meanwhile");
    world.good.session_id = world.good.authenticate("orders", &password_of("orders")).session_id;
    check([case("get, in a new session", get(&task_id), OK, "")], |request| ask_as_original(&mut world.good, &request));
    assert!(world.good.get(&task_id).task.is_some(), "a task outlives the session it was registered in");
}

#[test]
fn task_ids_are_checked() {
    let mut world = World::new(&[]);
    let long = "x".repeat(100_000);
    let ids = [
        ("empty", "", INVALID_REQUEST, "task_id: is empty..."),
        ("a word", "nonsense", INVALID_REQUEST, "task_id: ...is not a UUID..."),
        ("a UUIDv1", "6ba7b810-9dad-11d1-80b4-00c04fd430c8", INVALID_REQUEST, "task_id: ...not a UUIDv7..."),
        ("nothing but zeros", "00000000-0000-0000-0000-000000000000", INVALID_REQUEST, "task_id: ...not a UUIDv7..."),
        ("what a terminal would obey", "\u{0}\u{1b}[31m\u{202e}", INVALID_REQUEST, "task_id: ...is not a UUID..."),
        ("very long", &long, INVALID_REQUEST, "task_id: ...is not a UUID..."),
        ("never made here", "01890000-0000-7001-8000-000000000000", ERROR, "task ... is not known: ..."),
        ("of a shard that is not here", "01890000-0000-7fff-8000-000000000000", ERROR, "task ... is not known: ..."),
    ];
    let rows = |request: fn(&str) -> legacy::Payload| {
        ids.map(|(name, id, status, text)| case(name, request(id), status, text))
    };
    let got = check(rows(get), |request| ask_as_original(&mut world.good, &request));
    let cancelled = check(rows(cancel), |request| ask_as_original(&mut world.good, &request));
    assert_eq!(got, cancelled, "a wrong id is refused in the same words, whatever is asked");
    assert_short(&got);
    world.assert_unharmed();
}

#[test]
fn times_and_sizes_have_limits_and_refusals_name_them() {
    let mut world = World::new(&["--delay-max", "30d", "--payload-max", "1000"]);
    let limit_ms = 30 * DAY_MS;
    check(
        [
            case("delay", register(b"x", limit_ms + 1, 0), INVALID_REQUEST, "delay_ms...30 days..."),
            case("longest delay", register(b"x", u64::MAX, 0), INVALID_REQUEST, "delay_ms...30 days..."),
            case("interval", register(b"x", 0, limit_ms + 1), INVALID_REQUEST, "repeat_interval_ms...30 days..."),
            case("longest interval", register(b"x", 0, u64::MAX), INVALID_REQUEST, "repeat_interval_ms...30 days..."),
            case("payload", register(&[0; 1001], HOUR_MS, 0), INVALID_REQUEST, "payload: ...1001...1000..."),
            case("both times at their limits", register(b"x", limit_ms, limit_ms), OK, ""),
            case("payload at its limit", register(&[0; 1000], HOUR_MS, 0), OK, ""),
            case("no payload", register(&[], HOUR_MS, 0), OK, ""),
        ],
        |request| ask_as_original(&mut world.good, &request),
    );
    let mut raw = world.raw();
    let due_ms = now_ms() + HOUR_MS;
    let task = |due_ms, delay_ms| proto::Task { due_ms, delay_ms, ..Default::default() };
    let request = |due_ms, delay_ms| Payload::RegistrationRequest(task(due_ms, delay_ms));
    check(
        [
            case("instant and delay", request(due_ms, 5), Status::InvalidRequest, "due_ms...delay_ms..."),
            case("instant", request(due_ms + 31 * DAY_MS, 0), Status::InvalidRequest, "due_ms...30 days..."),
            case("instant within the limit", request(due_ms, 0), Status::Ok, ""),
        ],
        |request| ask(&mut raw, &world.good.session_id, request),
    );
    let answer = raw.ask(&world.good.session_id, request(due_ms, 0));
    let Payload::RegistrationResponse(exact) = answer else { panic!("not a registration: {answer:?}") };
    assert_eq!(exact.scheduled_time_ms, due_ms, "an instant is taken as it is: {exact:?}");
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
    let named = |client_id: &str| ClientRegistrationRequest { client_id: client_id.into(), ..good.clone() };
    let with_password = |password: &str| ClientRegistrationRequest { password: password.into(), ..good.clone() };
    let called =
        |protocol, endpoint: &str| ClientRegistrationRequest { callback: callback(protocol, endpoint), ..good.clone() };
    let retry = || RetryPolicy { max_attempts: 3, strategy: 0, interval_ms: 10, max_interval_ms: 0 };
    let retried = |retry| ClientRegistrationRequest { retry: Some(retry), ..good.clone() };
    let buried = |destination| ClientRegistrationRequest { dlq: Some(DlqPolicy { destination }), ..good.clone() };
    let refused = |name, request, text| case(name, request, INVALID_REQUEST, text);
    let (host, name, password) = ("x".repeat(3_000), "x".repeat(129), "x".repeat(1_025));
    check(
        [
            refused("no name", named(""), "client_id..."),
            refused("a long name", named(&name), "client_id..."),
            refused("a name of two lines", named("a\nb"), "client_id..."),
            refused("no password", with_password(""), "password..."),
            refused("a long password", with_password(&password), "password..."),
            refused("no endpoint", called(TCP, ""), "callback.endpoint..."),
            refused("an endpoint without a port", called(TCP, "no port"), "callback.endpoint..."),
            refused("port 0", called(TCP, "h:0"), "callback.endpoint..."),
            refused("port 70000", called(TCP, "h:70000"), "callback.endpoint..."),
            refused("a long host", called(TCP, &format!("{host}:1")), "callback.endpoint..."),
            refused("a protocol nobody knows", called(9, "h:1"), "callback.protocol..."),
            refused("many attempts", retried(RetryPolicy { max_attempts: 1_001, ..retry() }), "retry.max_attempts..."),
            refused("a strategy nobody knows", retried(RetryPolicy { strategy: 7, ..retry() }), "retry.strategy..."),
            refused("a week", retried(RetryPolicy { interval_ms: 8 * DAY_MS, ..retry() }), "retry.interval_ms..."),
            refused("a long destination", buried(host.clone()), "dlq.destination..."),
        ]
        .map(|row| row.map(legacy::Payload::ClientRegistration)),
        |request| ask_as_original(&mut admin, &request),
    );
    let handshake = legacy::AuthHandshake { client_id: "new".into(), password: "pw".into() };
    check(
        [case("none of these made a client", handshake, UNAUTHORIZED, "client id or password is wrong")],
        |handshake| {
            let mut nobody = Client::connect(world.node.started.tcp);
            ask_as_original(&mut nobody, &legacy::Payload::AuthHandshake(handshake))
        },
    );

    // The same checks for what a session brings itself.
    let mut raw = world.raw();
    let called = |protocol, endpoint: &str| {
        let callback = proto::CallbackConfig { protocol, endpoint: endpoint.into(), ..Default::default() };
        proto::AuthHandshake { callback: Some(callback), ..as_admin() }
    };
    let refused = |name, handshake, text| case(name, handshake, Status::InvalidRequest, text);
    check(
        [
            refused("nobody", proto::AuthHandshake { client_id: String::new(), ..as_admin() }, "client_id..."),
            refused("an endpoint without a port", called(0, "nowhere"), "callback.endpoint..."),
            refused("a protocol nobody knows", called(99, "h:1"), "callback.protocol..."),
        ],
        |handshake| ask(&mut raw, "", Payload::AuthHandshake(handshake)),
    );
    check([case("a good client", legacy::Payload::ClientRegistration(good), OK, "")], |request| {
        ask_as_original(&mut admin, &request)
    });
    world.assert_unharmed();
}

/// What came after the original protocol: each wrong field is refused by its name, and changes nothing.
#[test]
fn nonsense_in_a_registration_is_refused_by_name() {
    use proto::*;
    let world = World::new(&[]);
    let mut raw = world.raw();
    let session = world.admin_session(&mut raw);
    let here = proto::CallbackConfig { endpoint: world.receiver.endpoint(), ..Default::default() };
    let http = || proto::CallbackConfig { protocol: 2, endpoint: "http://h/".into(), ..Default::default() };
    let udp = proto::CallbackConfig { protocol: 3, endpoint: "h:1".into(), ..Default::default() };
    let task = || Task { callback: Some(here.clone()), delay_ms: HOUR_MS, ..Default::default() };
    let named = |name: &str| Task { name: name.into(), ..task() };
    let labelled = |labels: Vec<(String, String)>| Task { labels: labels.into_iter().collect(), ..task() };
    let with_key = |key: &str, ttl_ms| Task { dedup_key: key.into(), dedup_ttl_ms: ttl_ms, ..task() };
    let every = |recurrence| Task { repeat_interval_ms: 1_000, recurrence: Some(recurrence), ..task() };
    let missed = |missed, missed_max| every(Recurrence { missed, missed_max, ..Default::default() });
    let to = |callback| Task { callback: Some(callback), ..task() };
    let secret = |secret: &str, callback| to(proto::CallbackConfig { secret: secret.into(), ..callback });
    let retried = |retry| Task { retry: Some(retry), ..task() };
    let buried = |destination: &str| Task { dlq: Some(proto::DlqPolicy { destination: destination.into() }), ..task() };
    let long = "x".repeat(9_999);
    let twenty = (0..20).map(|n| (n.to_string(), String::new())).collect();
    let refused = |name, task, text| case(name, task, Status::InvalidRequest, text);
    let rows = [
        refused("an instant beside a delay", Task { due_ms: now_ms(), ..task() }, "due_ms:..."),
        refused("a long key", with_key(&long, 0), "dedup_key:..."),
        refused("a key for ever", with_key("k", u64::MAX), "dedup_ttl_ms:..."),
        refused("a long name", named(&long), "name:..."),
        refused("a name with a zero in it", named("a\u{0}b"), "name:..."),
        refused("a label without a name", labelled(vec![(String::new(), "v".into())]), "labels:..."),
        refused("twenty labels", labelled(twenty), "labels:..."),
        refused(
            "a count, and no interval",
            Task { repeat_interval_ms: 0, ..every(Recurrence { count: 3, ..Default::default() }) },
            "recurrence:...",
        ),
        refused("a rule nobody knows for what is missed", missed(9, 0), "recurrence.missed:..."),
        refused("too many missed at once", missed(2, u32::MAX), "recurrence.missed_max:..."),
        refused(
            "an end in the past",
            every(Recurrence { until_ms: 1, ..Default::default() }),
            "recurrence.until_ms:...",
        ),
        refused(
            "a protocol nobody knows",
            to(proto::CallbackConfig { protocol: 9, ..http() }),
            "callback.protocol:...",
        ),
        refused(
            "no address",
            to(proto::CallbackConfig { endpoint: "nowhere".into(), ..http() }),
            "callback.endpoint:...",
        ),
        refused("a secret that is none", secret("whsec_???", http()), "callback.secret:..."),
        refused("a secret for TCP", secret("s", here.clone()), "callback.secret:..."),
        refused(
            "a receiver with all the time in the world",
            to(proto::CallbackConfig { timeout_ms: u64::MAX, ..http() }),
            "callback.timeout_ms:...",
        ),
        refused(
            "an acknowledgement over HTTP",
            to(proto::CallbackConfig { acknowledge: true, ..http() }),
            "callback.acknowledge:...",
        ),
        refused(
            "many attempts",
            retried(proto::RetryPolicy { max_attempts: 9_999, ..Default::default() }),
            "retry.max_attempts:...",
        ),
        refused(
            "more jitter than time",
            retried(proto::RetryPolicy { jitter_percent: 101, ..Default::default() }),
            "retry.jitter_percent:...",
        ),
        refused("a destination without a host", buried("http:///x"), "dlq.destination:..."),
        refused("a long destination", buried(&long), "dlq.destination:..."),
        refused("more than a datagram", Task { payload: vec![0; 60_001].into(), ..to(udp) }, "payload:..."),
    ];
    let rows = Vec::from(rows);
    check(rows.clone(), |task| ask(&mut raw, &session, Payload::RegistrationRequest(task)));
    // In a batch each is refused just the same, and alone.
    check(rows, |task| {
        let batch = RegistrationBatch { tasks: vec![task.clone(), task], origin: None };
        match raw.ask(&session, Payload::RegistrationBatch(batch)) {
            Payload::RegistrationBatchResponse(mut answer)
                if answer.status() == Status::Ok && matches!(&*answer.responses, [one, other] if one == other) =>
            {
                registered(answer.responses.remove(0))
            }
            other => Came::Amiss(format!("{other:?}")),
        }
    });
    world.assert_unharmed();
}

#[test]
fn nonsense_about_tasks_and_dead_letters_is_refused_by_name() {
    use proto::*;
    let world = World::new(&[]);
    let mut raw = world.raw();
    let session = world.admin_session(&mut raw);
    let id = &world.early.0;
    let update = |request| Payload::UpdateTaskRequest(UpdateTaskRequest { task_id: id.clone(), ..request });
    let moved = |due_ms, delay_ms| update(UpdateTaskRequest { due_ms, delay_ms, ..Default::default() });
    let pause = |task_id: &str| Payload::PauseTaskRequest(PauseTaskRequest { task_id: task_id.into(), paused: true });
    let list = |request| Payload::ListTasksRequest(request);
    let labelled = |label: &str, name: &str| {
        list(ListTasksRequest { label_prefix: label.into(), name_prefix: name.into(), ..Default::default() })
    };
    let letter = |dead_letter_id| Payload::GetDeadLetterRequest(GetDeadLetterRequest { dead_letter_id });
    let letters = |filter, next_token: &str| {
        let (filter, next_token) = (Some(filter), next_token.to_owned());
        Payload::ListDeadLettersRequest(ListDeadLettersRequest { filter, next_token, limit: 0 })
    };
    let replay = |dead_letter_ids| {
        Payload::ReplayDeadLettersRequest(ReplayDeadLettersRequest { dead_letter_ids, ..Default::default() })
    };
    let refused = |name, request, text| case(name, (session.as_str(), request), Status::InvalidRequest, text);
    let to_nowhere = UpdateTaskRequest { callback: Some(Default::default()), ..Default::default() };
    let of_no_class = DeadLetterFilter { failure_class: 99, ..Default::default() };
    let of_no_task = DeadLetterFilter { task_id: "x".into(), ..Default::default() };
    let no_session =
        |name, request| case(name, ("", request), Status::Unauthorized, "session_id: is empty; authenticate first");
    check(
        [
            refused("an update of nothing", update(Default::default()), "nothing to change..."),
            refused("an update to an instant and a delay", moved(Some(9), Some(9)), "due_ms..."),
            refused("an update to the end of time", moved(Some(u64::MAX), None), "due_ms..."),
            refused("an update by all the time there is", moved(None, Some(u64::MAX)), "delay_ms..."),
            refused("an update to nowhere", update(to_nowhere), "callback.endpoint..."),
            refused("a pause of no task", pause("x"), "task_id..."),
            refused("a task for a dead letter", letter(id.clone()), "dead_letter_id..."),
            case(
                "a dead letter nobody has",
                (&*session, letter(format!("{id}@5"))),
                Status::NotFound,
                "dead letter ... is not known: ...",
            ),
            refused("a replay of no dead letter", replay(vec!["x@y".into()]), "dead_letter_id..."),
            refused("a replay of 1,001", replay(vec![String::new(); 1_001]), "dead_letter_ids..."),
            refused("tasks in no state", list(ListTasksRequest { state: 77, ..Default::default() }), "state..."),
            refused("tasks with a label without a value", labelled("env", ""), "label_prefix..."),
            refused("tasks with a label and a name", labelled("a=", "n"), "label_prefix..."),
            refused(
                "tasks after no task",
                list(ListTasksRequest { next_token: "t".repeat(99), ..Default::default() }),
                "next_token...",
            ),
            refused("dead letters after no dead letter", letters(Default::default(), "nonsense"), "next_token..."),
            refused("dead letters of no class", letters(of_no_class, ""), "failure_class..."),
            refused("dead letters of no task", letters(of_no_task, ""), "task_id..."),
            no_session("an update without a session", update(Default::default())),
            no_session("dead letters without a session", letters(Default::default(), "")),
            no_session("tasks without a session", list(Default::default())),
        ],
        |(session, request)| ask(&mut raw, session, request),
    );
    world.assert_unharmed();
}

#[test]
fn an_api_key_opens_until_it_is_revoked() {
    let world = World::new(&[]);
    let mut raw = world.raw();
    let admin = world.admin_session(&mut raw);
    let create = |client_id: &str, label: &str| {
        Payload::ApiKeyRequest(proto::ApiKeyRequest { client_id: client_id.into(), label: label.into() })
    };
    let created = |raw: &mut Raw, client_id: &str, label: &str| match raw.ask(&admin, create(client_id, label)) {
        Payload::ApiKeyResponse(answer) if answer.status() == Status::Ok => answer,
        other => panic!("a key was expected: {other:?}"),
    };
    let revoke = |key_id: &str| Payload::ApiKeyRevocation(proto::ApiKeyRevocation { key_id: key_id.into() });
    let with_key = |key: &str| proto::AuthHandshake {
        token: key.into(),
        protocol: boomerang_wire::PROTOCOL,
        ..Default::default()
    };
    let open = |key: &str| ("", Payload::AuthHandshake(with_key(key)));
    let task = |payload: &[u8], delay_ms| {
        Payload::RegistrationRequest(proto::Task { payload: payload.to_vec().into(), delay_ms, ..Default::default() })
    };

    let made = created(&mut raw, "orders", "ci");
    let spare = created(&mut raw, "orders", "spare");
    assert!(made.key != spare.key && made.key.contains(&made.key_id), "two keys, each with its id: {made:?} {spare:?}");
    let session = world.login(&mut raw, with_key(&made.key)).session_id;
    let (prefix, secret) = made.key.rsplit_once('_').unwrap();
    let of_the_other = spare.key.rsplit_once('_').unwrap().1;
    let wrong = "the API key is wrong or was revoked";
    let not_admin = "client 'orders' is not an administrator";
    let refused = |name, key: &str| case(name, open(key), Status::Unauthorized, wrong);
    check(
        [
            case("a key for nobody", (&*admin, create("nobody", "")), Status::NotFound, "client 'nobody' is not known"),
            case("a long label", (&*admin, create("orders", &"x".repeat(129))), Status::InvalidRequest, "label..."),
            // Whoever comes with a key is its client: with its receiver, and without its administrator's rights.
            case("a task by key", (&*session, task(b"with a key", 0)), Status::Ok, ""),
            case("a key made by key", (&*session, create("orders", "")), Status::Unauthorized, not_admin),
            case("a key revoked by key", (&*session, revoke(&made.key_id)), Status::Unauthorized, not_admin),
            refused("only the beginning of a key", "bmr_"),
            refused("a letter", "x"),
            refused("a key without its first letter", &made.key[1..]),
            refused("a key with a digit too many", &format!("{prefix}_{secret}0")),
            refused("a key with another one's secret", &format!("{prefix}_{of_the_other}")),
            case("the administrator revokes it", (&*admin, revoke(&made.key_id)), Status::Ok, ""),
            refused("the key, revoked", &made.key),
            case("who came in with it", (&*session, task(b"", HOUR_MS)), Status::SessionExpired, "..."),
            case("it is revoked again", (&*admin, revoke(&made.key_id)), Status::NotFound, "API key ... is not known"),
            case("the other key", open(&spare.key), Status::Ok, ""),
        ],
        |(session, request)| ask(&mut raw, session, request),
    );
    // A client's keys go with it.
    let mut original_admin = world.node.admin();
    original_admin.add_client("gone", &world.receiver.endpoint(), None);
    let of_gone = created(&mut raw, "gone", "");
    check([case("the client is removed", remove_client("gone"), OK, "")], |request| {
        ask_as_original(&mut original_admin, &request)
    });
    check([refused("a key of a client that is gone", &of_gone.key)], |(session, request)| {
        ask(&mut raw, session, request)
    });
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
    let gets: Vec<u8> = large.iter().cycle().take(2_000).flat_map(|id| world.good.frame(get(id))).collect();
    let all = legacy::ListTasksRequest { limit: 1_000, ..Default::default() };
    let lists = world.good.frame(list(all)).repeat(500);
    // Refused, so that the disk is not filled: the answers are as long as others.
    let registrations = world.good.frame(register(&[], u64::MAX, 0)).repeat(4_000);
    // The tasks are in memory by now, and everything has been used once.
    assert!(world.good.get(&large[0]).task.is_some(), "a task that was registered is there");
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
        let (connected, elapsed) = (world.node.metric("boomerang_connections"), begun.elapsed());
        assert!(
            elapsed < Duration::from_secs(15),
            "{connected} connections after {elapsed:?}: who does not read stays"
        );
    }
    eprintln!(
        "disconnected after {:?}; memory {} KiB, at most {} KiB more; {served} others served, the slowest in {longest:?}",
        begun.elapsed(),
        before / 1024,
        most.saturating_sub(before) / 1024
    );
    let growth_kib = most.saturating_sub(before) / 1024;
    assert!(
        growth_kib < GROWTH_MAX / 1024,
        "who does not read costs {growth_kib} KiB, more than {}",
        GROWTH_MAX / 1024
    );
    assert!(served > 10, "only {served} others were served meanwhile");
    assert!(longest < Duration::from_secs(1), "one of {served} others waited for {longest:?}, above a second");
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
    slow.send_bytes(&world.good.frame(get(&id)).repeat(ASKED));
    // Nobody reads, and everything that may pile up has piled up: the others do not wait for it.
    world.good.throw(b"x", HOUR_MS);
    slow.finish();
    for n in 0..ASKED {
        let answer = slow.answer();
        let Payload::GetTaskResponse(answer) = answer else { panic!("answer {n} is not a task: {answer:?}") };
        assert_eq!(answer.task.expect("the task").payload.len(), 400 * 1024, "length of the payload of answer {n}");
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
        let bytes = world.good.frame(list(request));
        world.good.raw.send_bytes(&bytes);
        let body = world.good.raw.next_frame(common::PATIENCE).unwrap();
        assert!(body.len() <= MIB, "a frame of {} bytes, above the limit of {MIB}", body.len());
        let envelope: legacy::Envelope = prost::Message::decode(&*body).unwrap();
        let Some(legacy::Payload::ListTasksResponse(answer)) = envelope.payload else {
            panic!("not a page of tasks: {envelope:?}")
        };
        assert_eq!(answer.status, OK, "{}", answer.error_message);
        found.extend(answer.tasks.into_iter().map(|task| task.task_id));
        next_token = answer.next_token;
        if next_token.is_empty() {
            break;
        }
    }
    assert_eq!(found, ids, "all pages together show each task once, in the order of due instants");
    world.assert_unharmed();
}

#[test]
fn a_next_token_of_somebody_elses_making_is_refused() {
    let mut world = World::new(&[]);
    let after =
        |next_token: &str| list(legacy::ListTasksRequest { next_token: next_token.into(), ..Default::default() });
    let between = |scheduled_after, scheduled_before, limit| {
        list(legacy::ListTasksRequest { scheduled_after, scheduled_before, limit, ..Default::default() })
    };
    let refused = |name, token: &str| case(name, after(token), INVALID_REQUEST, "...next_token...");
    let texts = check(
        [
            refused("a letter", "x"),
            refused("as long as a real one", &"0".repeat(52)),
            refused("as long, in letters of two bytes", &"é".repeat(26)),
            refused("very long", &"f".repeat(100_000)),
            // Wishes beyond reason are cut down to what there is.
            case("all there are, and more", between(0, u64::MAX, u32::MAX), OK, ""),
            case("a span that ends before it begins", between(u64::MAX, 1, 0), OK, ""),
        ],
        |request| ask_as_original(&mut world.good, &request),
    );
    assert_short(&texts);
    let none = legacy::ListTasksRequest { scheduled_after: u64::MAX, scheduled_before: 1, ..Default::default() };
    assert_eq!(world.good.list(none).tasks, [], "tasks of a span that ends before it begins");
    world.assert_unharmed();
}

#[test]
fn connections_that_say_nothing_and_those_that_come_and_go_harm_nobody() {
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
    let unasked = silent.next_frame(Duration::from_millis(50));
    assert_eq!(unasked, Err(NoFrame::TimedOut), "nothing comes that nobody asked for");
    world.assert_unharmed();
}

#[test]
fn of_more_connections_than_the_limit_those_go_that_are_not_known() {
    let mut world = World::new(&["--connections-max", "3", "--connections-per-address-max", "3"]);
    let mut held: Vec<Raw> = (0..3).map(|_| world.raw()).collect();
    // The good client is known, and of these the first has made room.
    held[0].assert_closed();
    world.good.throw(b"x", HOUR_MS);
    world.node.wait_for_metric("boomerang_connections", 3.0);
    drop(held);
    world.assert_unharmed();
}
