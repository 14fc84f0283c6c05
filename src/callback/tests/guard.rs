use std::sync::atomic::{AtomicUsize, Ordering};

use axum::http::header::LOCATION;
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use tokio::net::UdpSocket;

use super::super::guard::{Place, Untouchable};
use super::*;

/// Nothing but the public network.
fn guarded() -> Callbacks {
    Callbacks::new(settings(), Guard::new(Vec::new(), Arc::new(())))
}

/// A receiver at one port for all protocols, and how often it was spoken to.
async fn anything() -> (u16, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let (tcp, udp) = loop {
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        // Another process may have the port for datagrams.
        if let Ok(udp) = UdpSocket::bind(tcp.local_addr().unwrap()).await {
            break (tcp, udp);
        }
    };
    let (port, connections, datagrams) = (tcp.local_addr().unwrap().port(), count.clone(), count.clone());
    tokio::spawn(async move {
        while tcp.accept().await.is_ok() {
            connections.fetch_add(1, Ordering::Relaxed);
        }
    });
    tokio::spawn(async move {
        while udp.recv(&mut [0; 64]).await.is_ok() {
            datagrams.fetch_add(1, Ordering::Relaxed);
        }
    });
    (port, count)
}

#[tokio::test]
async fn by_no_protocol_and_in_no_spelling_is_this_machine_reached() {
    let callbacks = guarded();
    let (port, count) = anything().await;
    for host in ["127.0.0.1", "2130706433", "0x7f.1", "0177.0.0.1", "0", "localhost", "[::ffff:127.0.0.1]", "[::1]"] {
        for scheme in ["tcp", "udp", "grpc", "http", "https"] {
            let ended = once(&callbacks, &callback(&format!("{scheme}://{host}:{port}"))).await;
            assert_failed(ended, FailureClass::Forbidden, &["callbacks must not go there"]);
        }
        let to = Callback::new(Protocol::Grpc, &format!("http://{host}:{port}")).unwrap();
        assert_failed(once(&callbacks, &to).await, FailureClass::Forbidden, &["callbacks must not go there"]);
        let acknowledged = CallbackOptions { acknowledge: true, ..CallbackOptions::default() };
        let ended = once(&callbacks, &with(&format!("udp://{host}:{port}"), acknowledged)).await;
        assert_failed(ended, FailureClass::Forbidden, &[]);
        let http2 = CallbackOptions { http2: true, ..CallbackOptions::default() };
        let ended = once(&callbacks, &with(&format!("http://{host}:{port}"), http2)).await;
        assert_failed(ended, FailureClass::Forbidden, &[]);
    }
    assert_eq!(count.load(Ordering::Relaxed), 0, "somebody was called");
}

/// Nobody else pays for it: the breaker, which spares those that are down, does not see it.
#[tokio::test]
async fn what_is_forbidden_is_not_taken_for_down() {
    let callbacks = guarded();
    for _ in 0..20 {
        let ended = once(&callbacks, &callback("tcp://127.0.0.1:9")).await;
        assert_failed(ended, FailureClass::Forbidden, &[]);
    }
}

/// A redirect leads to a connection of its own, which is judged like any other. What the receiver would have said there
/// does not come back.
#[tokio::test]
async fn a_redirect_leads_nowhere_that_is_forbidden() {
    let (port, count) = anything().await;
    let places = [
        "http://169.254.169.254/latest/meta-data".to_owned(),
        format!("http://0x7f.0.0.2:{port}/"),
        format!("http://[::ffff:127.0.0.2]:{port}/"),
        format!("http://10.0.0.1:{port}/"),
    ];
    for place in places {
        let router = axum::Router::new().fallback(move || {
            let mut headers = HeaderMap::new();
            headers.insert(LOCATION, place.parse().unwrap());
            async { (StatusCode::TEMPORARY_REDIRECT, headers).into_response() }
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        let allowed = vec!["127.0.0.1".parse().unwrap()];
        let callbacks = Callbacks::new(settings(), Guard::new(allowed, Arc::new(())));
        let follow = CallbackOptions { follow_redirects: true, ..CallbackOptions::default() };
        let ended = once(&callbacks, &with(&format!("http://{address}/"), follow)).await;
        assert_failed(ended, FailureClass::Forbidden, &["callbacks must not go there"]);
    }
    assert_eq!(count.load(Ordering::Relaxed), 0, "somebody was called");
}

struct At(u16);

impl Untouchable for At {
    fn at(&self, port: u16) -> Vec<Place> {
        if port == self.0 { vec![Place::ThisMachine] } else { Vec::new() }
    }
}

#[tokio::test]
async fn what_is_ours_is_out_of_reach_even_where_all_is_allowed() {
    let (port, count) = anything().await;
    let everything = ["0.0.0.0/0", "::/0"].map(|all| all.parse().unwrap()).to_vec();
    let callbacks = Callbacks::new(settings(), Guard::new(everything, Arc::new(At(port))));
    for host in ["127.0.0.1", "127.9.9.9", "localhost", "0", "[::1]"] {
        for scheme in ["tcp", "udp", "grpc", "http"] {
            let ended = once(&callbacks, &callback(&format!("{scheme}://{host}:{port}"))).await;
            let why = if host == "0" { "unspecified" } else { "the cluster itself listens there" };
            assert_failed(ended, FailureClass::Forbidden, &[why]);
        }
    }
    assert_eq!(count.load(Ordering::Relaxed), 0, "somebody was called");
}
