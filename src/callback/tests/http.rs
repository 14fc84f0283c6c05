use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, Version};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use rustls::RootCertStore;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::*;
use crate::task::{DeadLetterId, DeadLetterNotice, Secret};

#[derive(Debug, Clone)]
struct Seen {
    method: String,
    path: String,
    version: Version,
    headers: HeaderMap,
    body: Bytes,
}

impl Seen {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("no {name} in {:?}", self.headers)).to_str().unwrap()
    }
}

/// Answers by what it has seen, and tells it.
fn router(
    answer: impl Fn(&Seen) -> Response + Clone + Send + Sync + 'static,
) -> (Router, mpsc::UnboundedReceiver<Seen>) {
    let (out, seen) = mpsc::unbounded_channel();
    let router = Router::new().fallback(move |request: Request| {
        let (answer, out) = (answer.clone(), out.clone());
        async move {
            let (parts, body) = request.into_parts();
            let seen = Seen {
                method: parts.method.to_string(),
                path: parts.uri.path_and_query().unwrap().to_string(),
                version: parts.version,
                headers: parts.headers,
                body: to_bytes(body, usize::MAX).await.unwrap(),
            };
            let answer = answer(&seen);
            let _ = out.send(seen);
            answer
        }
    });
    (router, seen)
}

async fn receiver(
    answer: impl Fn(&Seen) -> Response + Clone + Send + Sync + 'static,
) -> (SocketAddr, mpsc::UnboundedReceiver<Seen>) {
    let (router, seen) = router(answer);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    (address, seen)
}

/// Reads the head of a request on each connection, writes `answer`, and closes or keeps the connection.
async fn raw(answer: &'static [u8], keep: bool) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = vec![0; 16 * 1024];
                let _ = stream.read(&mut buffer).await;
                let _ = stream.write_all(answer).await;
                if keep {
                    std::future::pending::<()>().await;
                }
            });
        }
    });
    address
}

fn hook(address: SocketAddr, path: &str) -> Callback {
    callback(&format!("http://{address}{path}"))
}

/// The inverse of what the headers are written with.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        bytes.push(*first);
        if *first == b'%' {
            let (digits, after) = rest.split_at(2);
            *bytes.last_mut().unwrap() = u8::from_str_radix(str::from_utf8(digits).unwrap(), 16).unwrap();
            rest = after;
        }
    }
    String::from_utf8(bytes).unwrap()
}

#[tokio::test]
async fn a_delivery_is_a_post_of_the_payload() {
    let callbacks = sockets(settings());
    let (address, mut seen) = receiver(|_| StatusCode::NO_CONTENT.into_response()).await;
    let to = hook(address, "/hooks/a?key=1");
    let mut sent = delivery(to.clone(), 5);
    sent.name = Some("café 100% ".into());
    attempt(&callbacks, sent.clone()).await.unwrap();
    let first = seen.recv().await.unwrap();
    assert_eq!((&*first.method, &*first.path, first.version), ("POST", "/hooks/a?key=1", Version::HTTP_11));
    assert_eq!(first.body, sent.payload);
    for (name, value) in [
        ("content-type", "application/octet-stream"),
        ("user-agent", concat!("boomerang/", env!("CARGO_PKG_VERSION"))),
        ("x-boomerang-task-id", &sent.task.to_string()),
        ("x-boomerang-client-id", "orders"),
        ("x-boomerang-occurrence", "7"),
        ("x-boomerang-attempt", "2"),
        ("x-boomerang-due", "1000"),
        ("x-boomerang-fence", "3.5"),
        ("x-boomerang-name", "caf%C3%A9 100%25%20"),
    ] {
        assert_eq!(first.header(name), value, "{name}");
    }
    assert_eq!(decoded(first.header("x-boomerang-name")), "café 100% ");
    let absent = ["x-boomerang-dead-letter", "webhook-id", "webhook-signature", "referer", "cookie"];
    assert!(absent.iter().all(|name| !first.headers.contains_key(*name)), "{:?}", first.headers);
    let trace: Vec<&str> = first.header("traceparent").split('-').collect();
    assert_eq!(trace.iter().map(|part| part.len()).collect::<Vec<_>>(), [2, 32, 16, 2]);
    assert_eq!((trace[0], trace[3]), ("00", "01"));
    attempt(&callbacks, sent).await.unwrap();
    let second = seen.recv().await.unwrap();
    assert_ne!(first.header("traceparent"), second.header("traceparent"));
}

#[tokio::test]
async fn the_copy_of_a_dead_letter_says_what_it_is() {
    let callbacks = sockets(settings());
    let (address, mut seen) = receiver(|_| StatusCode::OK.into_response()).await;
    let mut sent = delivery(hook(address, "/dead"), 5);
    let id = DeadLetterId { died_ms: 9_000, task: sent.task };
    let failure = Failure::new(FailureClass::BadStatus, "h:1: the receiver answered ERROR: leider\nübel");
    sent.dead_letter = Some(DeadLetterNotice { id, attempts: 4, failure: failure.clone() });
    attempt(&callbacks, sent).await.unwrap();
    let seen = seen.recv().await.unwrap();
    assert_eq!(seen.header("x-boomerang-dead-letter"), id.to_string());
    assert_eq!(seen.header("x-boomerang-dead-attempts"), "4");
    assert_eq!(decoded(seen.header("x-boomerang-dead-error")), failure.to_string());
}

/// HMAC as RFC 2104 has it, on its own.
fn hmac(key: &[u8], message: &[u8]) -> [u8; 32] {
    let mut block = [0u8; 64];
    if key.len() > 64 {
        block[..32].copy_from_slice(&Sha256::digest(key));
    } else {
        block[..key.len()].copy_from_slice(key);
    }
    let inner = Sha256::new().chain_update(block.map(|byte| byte ^ 0x36)).chain_update(message).finalize();
    Sha256::new().chain_update(block.map(|byte| byte ^ 0x5c)).chain_update(inner).finalize().into()
}

#[tokio::test]
async fn a_signature_can_be_verified_and_names_the_occurrence() {
    let callbacks = sockets(settings());
    let (address, mut seen) = receiver(|_| StatusCode::OK.into_response()).await;
    let long = "k".repeat(100);
    for (secret, key) in [("whsec_aGVsbG8=", "hello"), ("plain text", "plain text"), (&*long, &*long)] {
        let options = CallbackOptions { secret: Some(Secret::new(secret).unwrap()), ..CallbackOptions::default() };
        let to = with(&format!("http://{address}/signed"), options);
        let mut ids = Vec::new();
        for number in [1, 2] {
            let retry = Delivery {
                attempt: number,
                fence: Fence { term: 3, seq: u64::from(number) },
                ..delivery(to.clone(), 1)
            };
            attempt(&callbacks, retry).await.unwrap();
            let seen = seen.recv().await.unwrap();
            let (id, at) = (seen.header("webhook-id"), seen.header("webhook-timestamp"));
            let mut message = format!("{id}.{at}.").into_bytes();
            message.extend_from_slice(&seen.body);
            let expected = base64::engine::general_purpose::STANDARD.encode(hmac(key.as_bytes(), &message));
            assert_eq!(seen.header("webhook-signature"), format!("v1,{expected}"));
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
            assert!(now - at.parse::<u64>().unwrap() < 60);
            ids.push(id.to_owned());
        }
        assert_eq!(ids[0], ids[1]);
        assert_eq!(ids[0], format!("{}.7", ticket(1).task));
    }
}

#[tokio::test]
async fn other_statuses_are_failures_that_show_what_was_said() {
    let callbacks = sockets(settings());
    let (address, _seen) = receiver(|seen| match &*seen.path {
        "/none?secret=1" => (StatusCode::NOT_FOUND, "no such\n\n  hook\u{7}").into_response(),
        "/created" => StatusCode::CREATED.into_response(),
        _ => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    })
    .await;
    once(&callbacks, &hook(address, "/created")).await.unwrap();
    let ended = once(&callbacks, &hook(address, "/none?secret=1")).await;
    let failure = assert_failed(ended, FailureClass::BadStatus, &[]);
    assert_eq!(failure.text, format!("http://{address}/none: the receiver answered 404 Not Found: no such hook"));
    let to = callback(&format!("http://user:password@{address}/x"));
    let failure = assert_failed(once(&callbacks, &to).await, FailureClass::BadStatus, &["500", "/x"]);
    assert!(!failure.text.contains("password") && failure.retry_after_ms.is_none());
}

#[tokio::test]
async fn a_receiver_may_ask_for_a_pause() {
    let callbacks = sockets(settings());
    let (address, _seen) = receiver(|seen| {
        let in_an_hour = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(3_600));
        let (status, after) = match &*seen.path {
            "/seconds" => (StatusCode::TOO_MANY_REQUESTS, "120".to_owned()),
            "/date" => (StatusCode::SERVICE_UNAVAILABLE, in_an_hour),
            "/past" => (StatusCode::SERVICE_UNAVAILABLE, "Sun, 06 Nov 1994 08:49:37 GMT".to_owned()),
            "/nonsense" => (StatusCode::SERVICE_UNAVAILABLE, "soon".to_owned()),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, "120".to_owned()),
        };
        (status, [("retry-after", after)]).into_response()
    })
    .await;
    let mut pauses = HashMap::new();
    for path in ["/seconds", "/date", "/past", "/nonsense", "/other"] {
        let failure = assert_failed(once(&callbacks, &hook(address, path)).await, FailureClass::BadStatus, &[]);
        pauses.insert(path, failure.retry_after_ms);
    }
    assert_eq!(pauses["/seconds"], Some(120_000));
    assert!(pauses["/date"].is_some_and(|ms| (3_500_000..=3_600_000).contains(&ms)), "{pauses:?}");
    assert_eq!((pauses["/past"], pauses["/nonsense"], pauses["/other"]), (Some(0), None, None));
}

#[tokio::test]
async fn a_redirect_is_followed_only_when_that_is_wanted() {
    let callbacks = sockets(settings());
    let (there, mut arrived) = receiver(|_| StatusCode::OK.into_response()).await;
    let (address, mut seen) = receiver(move |seen| {
        let moved = |status: u16, to: String| {
            (StatusCode::from_u16(status).unwrap(), [("location", to)], "moved").into_response()
        };
        match &*seen.path {
            "/301" => moved(301, format!("http://{there}/new")),
            "/307" => moved(307, "/301".into()),
            "/303" => moved(303, format!("http://{there}/see")),
            "/loop" => moved(308, "/loop".into()),
            _ => moved(302, "ftp://elsewhere/".into()),
        }
    })
    .await;
    let ended = once(&callbacks, &hook(address, "/301")).await;
    assert_failed(ended, FailureClass::BadStatus, &["301", &format!("redirect to http://{there}/new"), "not followed"]);
    seen.recv().await.unwrap();

    let follow = |path: &str| {
        let options = CallbackOptions {
            follow_redirects: true,
            secret: Some(Secret::new("s").unwrap()),
            ..CallbackOptions::default()
        };
        with(&format!("http://{address}{path}"), options)
    };
    let sent = delivery(follow("/307"), 1);
    attempt(&callbacks, sent.clone()).await.unwrap();
    assert_eq!((seen.recv().await.unwrap().path, seen.recv().await.unwrap().path), ("/307".into(), "/301".into()));
    let last = arrived.recv().await.unwrap();
    assert_eq!((&*last.method, &*last.path, &last.body), ("POST", "/new", &sent.payload));
    assert!(last.headers.contains_key("webhook-signature"));
    assert_failed(once(&callbacks, &follow("/303")).await, FailureClass::BadStatus, &["303"]);
    assert_failed(once(&callbacks, &follow("/ftp")).await, FailureClass::BadStatus, &["302", "ftp://elsewhere/"]);
    assert_failed(once(&callbacks, &follow("/loop")).await, FailureClass::BadStatus, &["more than 5 redirects"]);
    assert!(arrived.try_recv().is_err(), "nothing else arrived there");
}

#[tokio::test]
async fn what_is_in_the_way_has_its_class() {
    let callbacks = sockets(impatient());
    let address = dead_address();
    let ended = once(&callbacks, &hook(address, "/x")).await;
    assert_failed(ended, FailureClass::Refused, &[&format!("http://{address}/x: cannot connect"), "refused"]);
    let ended = once(&callbacks, &callback("http://no-such-host.invalid/x")).await;
    assert_failed(ended, FailureClass::Unreachable, &["'no-such-host.invalid' cannot be resolved"]);
    let ended = once(&callbacks, &hook(silent().await, "/x")).await;
    assert_failed(ended, FailureClass::Timeout, &["no answer within 150 ms"]);
    let options = CallbackOptions { timeout_ms: Some(20), ..CallbackOptions::default() };
    let ended = once(&callbacks, &with(&format!("http://{}/x", silent().await), options)).await;
    assert_failed(ended, FailureClass::Timeout, &["no answer within 20 ms"]);
    let ended = once(&callbacks, &hook(raw(b"", false).await, "/x")).await;
    assert_failed(ended, FailureClass::Broken, &["broke before the answer"]);
    let ended = once(&callbacks, &hook(raw(b"HTTP/1.1 200 OK\r\nContent-Le", false).await, "/x")).await;
    assert_failed(ended, FailureClass::Broken, &["broke before the answer"]);
    let ended = once(&callbacks, &hook(raw(b"SSH-2.0-OpenSSH_9.6\r\n\r\n", false).await, "/x")).await;
    assert_failed(ended, FailureClass::BadAnswer, &["not HTTP"]);
}

#[tokio::test]
async fn an_answer_without_an_end_costs_a_moment() {
    let callbacks = sockets(settings());
    let endless = || {
        let chunk = Bytes::from(vec![b'x'; 64 * 1024]);
        Body::from_stream(futures::stream::repeat_with(move || Ok::<_, std::convert::Infallible>(chunk.clone())))
    };
    let (address, _seen) = receiver(move |seen| match &*seen.path {
        "/fine" => endless().into_response(),
        _ => (StatusCode::BAD_REQUEST, endless()).into_response(),
    })
    .await;
    for http2 in [false, true] {
        let options = CallbackOptions { http2, ..CallbackOptions::default() };
        let to = |path: &str| with(&format!("http://{address}{path}"), options.clone());
        once(&callbacks, &to("/fine")).await.unwrap();
        let failure = assert_failed(once(&callbacks, &to("/bad")).await, FailureClass::BadStatus, &["400", "xxx..."]);
        assert!(failure.text.len() < 500);
    }
    // It has answered; that its body never comes does not matter.
    once(&callbacks, &hook(raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab", true).await, "/")).await.unwrap();
}

#[tokio::test]
async fn connections_are_used_again_and_http_2_needs_one() {
    let callbacks = sockets(settings());
    for (http2, version) in [(false, Version::HTTP_11), (true, Version::HTTP_2)] {
        let (router, mut seen) = router(|_| "thank you".into_response());
        let (listener, connections) = Counted::bind().await;
        let address = listener.inner.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        let to = with(&format!("http://{address}/"), CallbackOptions { http2, ..CallbackOptions::default() });
        for _ in 0..10 {
            once(&callbacks, &to).await.unwrap();
            assert_eq!(seen.recv().await.unwrap().version, version);
        }
        if http2 {
            let many = (0..100).map(|n| attempt(&callbacks, delivery(to.clone(), n)));
            futures::future::try_join_all(many).await.unwrap();
        }
        assert_eq!(connections.load(Ordering::Relaxed), 1);
    }
}

struct Counted {
    inner: TcpListener,
    connections: Arc<AtomicUsize>,
}

impl Counted {
    async fn bind() -> (Self, Arc<AtomicUsize>) {
        let connections = Arc::<AtomicUsize>::default();
        let inner = TcpListener::bind("127.0.0.1:0").await.unwrap();
        (Self { inner, connections: connections.clone() }, connections)
    }
}

impl axum::serve::Listener for Counted {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        let accepted = axum::serve::Listener::accept(&mut self.inner).await;
        self.connections.fetch_add(1, Ordering::Relaxed);
        accepted
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.inner.local_addr()
    }
}

/// A receiver with a certificate.
struct Secure {
    inner: TcpListener,
    acceptor: TlsAcceptor,
}

impl axum::serve::Listener for Secure {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            let (stream, from) = self.inner.accept().await.unwrap();
            // Whoever does not trust us leaves.
            if let Ok(stream) = self.acceptor.accept(stream).await {
                return (stream, from);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.inner.local_addr()
    }
}

/// Its port, and those who trust it.
pub async fn secure(router: Router, versions: &[&[u8]]) -> (u16, RootCertStore) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    config.alpn_protocols = versions.iter().map(|version| version.to_vec()).collect();
    let inner = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = inner.local_addr().unwrap().port();
    let listener = Secure { inner, acceptor: TlsAcceptor::from(Arc::new(config)) };
    tokio::spawn(async move { axum::serve(listener, router).await });
    (port, roots)
}

#[tokio::test]
async fn tls_is_trusted_or_the_receiver_is_unreachable() {
    for (offered, version) in [(&[&b"h2"[..], b"http/1.1"][..], Version::HTTP_2), (&[], Version::HTTP_11)] {
        let (router, mut seen) = router(|_| StatusCode::OK.into_response());
        let (port, roots) = secure(router, offered).await;
        let believing = trusting(settings(), Trust::only(roots));
        once(&believing, &callback(&format!("https://localhost:{port}/x"))).await.unwrap();
        assert_eq!(seen.recv().await.unwrap().version, version);
        let ended = once(&believing, &callback(&format!("https://127.0.0.1:{port}/x"))).await;
        assert_failed(ended, FailureClass::Unreachable, &["certificate is not accepted", "not valid for name"]);

        let others = trusting(settings(), Trust::only(RootCertStore::empty()));
        let ended = once(&others, &callback(&format!("https://localhost:{port}/x"))).await;
        assert_failed(ended, FailureClass::Unreachable, &["certificate is not accepted", "UnknownIssuer"]);
        assert!(seen.try_recv().is_err());
    }
    let callbacks = sockets(settings());
    let (address, _seen) = receiver(|_| StatusCode::OK.into_response()).await;
    let ended = once(&callbacks, &callback(&format!("https://{address}/x"))).await;
    assert_failed(ended, FailureClass::Unreachable, &["no TLS with it"]);
}

#[tokio::test]
async fn a_redirect_never_leaves_tls() {
    let (there, mut arrived) = receiver(|_| StatusCode::OK.into_response()).await;
    let (router, _seen) =
        router(move |_| (StatusCode::PERMANENT_REDIRECT, [("location", format!("http://{there}/"))]).into_response());
    let (port, roots) = secure(router, &[]).await;
    let callbacks = trusting(settings(), Trust::only(roots));
    let options = CallbackOptions { follow_redirects: true, ..CallbackOptions::default() };
    let ended = once(&callbacks, &with(&format!("https://localhost:{port}/"), options)).await;
    assert_failed(ended, FailureClass::BadStatus, &["not followed from https://"]);
    assert!(arrived.try_recv().is_err());
}
