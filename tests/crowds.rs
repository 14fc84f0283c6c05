//! What costs before anybody is known: logins that fail, connections that say nothing or little, requests by a browser that
//! somebody else has sent. A node stays there for those it knows.

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use boomerang_wire::proto::{self, BoomerangEnvelope, Status, Task, boomerang_envelope::Payload};
use common::node::{ADMIN_PASSWORD, NodeProcess};
use common::raw::Raw;
use common::{PATIENCE, http_get};

fn handshake(client_id: &str, password: &str) -> Payload {
    Payload::AuthHandshake(proto::AuthHandshake {
        client_id: client_id.into(),
        password: password.into(),
        protocol: boomerang_wire::PROTOCOL,
        ..Default::default()
    })
}

fn login(raw: &mut Raw, client_id: &str, password: &str) -> proto::AuthResponse {
    match raw.ask("", handshake(client_id, password)) {
        Payload::AuthResponse(answer) => answer,
        other => panic!("not an answer to a handshake: {other:?}"),
    }
}

#[test]
fn who_is_wrong_too_often_waits_and_whoever_is_known_does_not() {
    let node = NodeProcess::start(&[]);
    let mut good = Raw::connect(node.started.tcp);
    assert_eq!(login(&mut good, "admin", ADMIN_PASSWORD).status(), Status::Ok);
    let session_id = login(&mut good, "admin", ADMIN_PASSWORD).session_id;
    let request = proto::ApiKeyRequest { client_id: "admin".into(), label: "a test".into() };
    let key = match good.ask(&session_id, Payload::ApiKeyRequest(request)) {
        Payload::ApiKeyResponse(answer) => answer.key,
        other => panic!("{other:?}"),
    };
    let mut bad = Raw::connect(node.started.tcp);
    let statuses: Vec<Status> = (0..100).map(|n| login(&mut bad, "admin", &format!("guess {n}")).status()).collect();
    let refused = statuses.iter().position(|status| *status == Status::Overloaded);
    let refused = refused.unwrap_or_else(|| panic!("guesses go on for ever: {statuses:?}"));
    // One a second is forgotten meanwhile.
    assert!((20..60).contains(&refused), "a few are heard at once: {statuses:?}");
    assert!(statuses[..refused].iter().all(|status| *status == Status::Unauthorized), "{statuses:?}");
    let answer = login(&mut bad, "somebody else", "guess");
    assert_eq!(answer.status(), Status::Overloaded, "the address waits, whoever it names: {answer:?}");
    let wait_ms = answer.detail.unwrap().retry_after_ms;
    assert!((1..=1_000).contains(&wait_ms), "it is told for how long: {wait_ms}");
    // From the same address, with a password that was right before, and with a key.
    let mut again = Raw::connect(node.started.tcp);
    assert_eq!(login(&mut again, "admin", ADMIN_PASSWORD).status(), Status::Ok);
    let by_key = proto::AuthHandshake { token: key, protocol: boomerang_wire::PROTOCOL, ..Default::default() };
    match again.ask("", Payload::AuthHandshake(by_key)) {
        Payload::AuthResponse(answer) => assert_eq!(answer.status(), Status::Ok, "{answer:?}"),
        other => panic!("{other:?}"),
    }
}

/// As after a restart: all come at once, and none of their passwords is remembered.
#[test]
fn a_crowd_with_the_right_password_gets_in_at_once() {
    let node = NodeProcess::start(&[]);
    let begun = Instant::now();
    let mut crowd: Vec<Raw> = (0..500).map(|_| Raw::connect(node.started.tcp)).collect();
    for one in &mut crowd {
        let payload = Some(handshake("admin", ADMIN_PASSWORD));
        one.send(&BoomerangEnvelope { payload, ..Default::default() });
    }
    for one in &mut crowd {
        match one.answer() {
            Payload::AuthResponse(answer) => assert_eq!(answer.status(), Status::Ok, "{answer:?}"),
            other => panic!("{other:?}"),
        }
    }
    assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
}

#[test]
fn a_stranger_sends_little_at_a_time() {
    let node = NodeProcess::start(&[]);
    let task = |bytes: usize| {
        Payload::RegistrationRequest(Task { payload: vec![b'x'; bytes].into(), delay_ms: 60_000, ..Default::default() })
    };
    let mut stranger = Raw::connect(node.started.tcp);
    stranger.send(&BoomerangEnvelope { payload: Some(task(12 * 1024)), ..Default::default() });
    let (status, text) = stranger.problem();
    assert_eq!(status, Status::InvalidRequest as i32, "{text}");
    assert!(text.contains("8192 bytes, and nobody has authenticated"), "{text}");
    stranger.assert_closed();
    // Whoever is known sends what it may, at once, and on another connection as well.
    let mut known = Raw::connect(node.started.tcp);
    let session_id = login(&mut known, "admin", ADMIN_PASSWORD).session_id;
    let mut back = Raw::connect(node.started.tcp);
    for connection in [&mut known, &mut back] {
        match connection.ask(&session_id, task(100 * 1024)) {
            // It has no callback; that is looked at when all of it is there.
            Payload::RegistrationResponse(answer) => assert_eq!(answer.status(), Status::InvalidRequest, "{answer:?}"),
            other => panic!("{other:?}"),
        }
    }
}

/// Many that say nothing, on every listener: who is in stays in, and who comes gets in.
#[test]
fn those_who_say_nothing_keep_nobody_out() {
    let node = NodeProcess::start(&["--connections-max", "200"]);
    let mut inside = Raw::connect(node.started.tcp);
    assert_eq!(login(&mut inside, "admin", ADMIN_PASSWORD).status(), Status::Ok);
    let silent = |address: SocketAddr| -> Vec<TcpStream> {
        (0..1_500).filter_map(|_| TcpStream::connect(address).ok()).collect()
    };
    let (on_tcp, on_http) = (silent(node.started.tcp), silent(node.started.http));
    let mut late = Raw::connect(node.started.tcp);
    assert_eq!(login(&mut late, "admin", ADMIN_PASSWORD).status(), Status::Ok, "who comes gets in");
    assert_eq!(login(&mut inside, "admin", ADMIN_PASSWORD).status(), Status::Ok, "who is in stays in");
    assert_eq!(http_get(node.started.http, "/readyz").0, 200, "who looks is shown");
    assert!(node.metric("boomerang_connections") <= 100.0, "more than one address may have");
    drop((on_tcp, on_http));
}

#[test]
fn a_request_that_does_not_come_to_its_end_is_hung_up_on() {
    let node = NodeProcess::start(&[]);
    let begun = Instant::now();
    let half = |address: SocketAddr, bytes: &[u8]| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(bytes).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    let mut slow = [
        half(node.started.http, b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: "),
        half(node.started.http, b""),
        half(node.started.tcp, &[0, 0]),
        half(node.started.tcp, b""),
    ];
    for (number, stream) in slow.iter_mut().enumerate() {
        let mut rest = Vec::new();
        let ended = stream.read_to_end(&mut rest);
        assert!(ended.is_ok(), "connection {number} is still open after {:?}: {ended:?}", begun.elapsed());
    }
    assert!(begun.elapsed() > Duration::from_secs(5), "people are given a moment: {:?}", begun.elapsed());
    let mut large =
        half(node.started.http, format!("GET /healthz HTTP/1.1\r\nHost: x\r\nX: {}", "x".repeat(64_000)).as_bytes());
    let mut answer = String::new();
    let _ = large.read_to_string(&mut answer);
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
}

/// What a web page can have a developer's browser send.
#[test]
fn a_node_that_asks_for_no_credentials_answers_this_machine_only() {
    let status = |node: &NodeProcess, headers: &str| {
        let mut stream = TcpStream::connect(node.started.http).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET /healthz HTTP/1.1\r\n{headers}Connection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        (text.split(' ').nth(1).unwrap().parse::<u16>().unwrap(), text)
    };
    let cases = [
        ("Host: localhost\r\n", 200),
        ("Host: 127.0.0.1:9974\r\n", 200),
        ("Host: [::1]:9974\r\n", 200),
        ("Host: localhost\r\nOrigin: http://localhost:3000\r\n", 200),
        ("Host: evil.example\r\n", 403),
        ("Host: localhost.evil.example\r\n", 403),
        ("Host: 10.0.0.1\r\n", 403),
        ("Host: localhost\r\nOrigin: https://evil.example\r\n", 403),
        ("Host: localhost\r\nOrigin: null\r\n", 403),
        ("Host: localhost\r\nSec-Fetch-Site: cross-site\r\n", 403),
    ];
    let (dev, serve) = (NodeProcess::start_dev(), NodeProcess::start(&[]));
    for (headers, wanted) in cases {
        let (found, text) = status(&dev, headers);
        assert_eq!(found, wanted, "{headers:?}: {text}");
        if wanted == 403 {
            assert!(text.contains("is not this machine"), "{text}");
        }
        assert_eq!(status(&serve, headers).0, 200, "health is open to all: {headers:?}");
    }
}
