//! Health, readiness and metrics over HTTP, and where shards are led.
//!
//! `/healthz`: the process answers. `/readyz`: it can store and fire, or knows who can, or says what it is waiting for; a
//! load balancer takes a node out by it. `/metrics`: the text format of Prometheus. `/v1/shards`: who leads what.
//! `/v1/shards/{n}/leader`: answered by the leader; the others send there with `307`.
//!
//! A node that asks for no credentials answers only who calls it by a name of this machine, and no page of another one:
//! a web page in a developer's browser could have it do things otherwise, by its own name or by one that is made to mean
//! this machine.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Extension, Path, Request, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use serde::Serialize;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::guests::{Guest, GuestLimits, Guests};
use super::routing::Router;
use super::tls::{Inside, Tls};
use crate::task::{GroupId, ShardId};

/// An election takes about a second.
const RETRY_AFTER_SECONDS: &str = "1";
/// Scrapes, probes and a few people.
pub const GUESTS: GuestLimits = GuestLimits { all: 1_000, of_an_address: 500 };
/// Of a request's head, from the connection's first byte or the end of the request before.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
const HEAD_BYTES_MAX: usize = 16 * 1024;
const STREAMS_PER_CONNECTION_MAX: u32 = 16;
/// Whoever looks for longer connects anew: what it does not read is not kept for ever.
const CONNECTION_WITHIN: Duration = Duration::from_secs(15 * 60);
/// A connection over HTTP/2 that says nothing is asked, and closed when it goes on.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(10);
/// After `accept` failed: most likely there are no file descriptors left.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);
/// How long answers under way may take when the node stops.
const STOP_WITHIN: Duration = Duration::from_secs(2);

/// What this listener shows of the node.
pub trait Watched: Send + Sync + 'static {
    /// Why the node is not ready; nothing when it is.
    fn not_ready(&self) -> Option<String>;
    fn metrics(&self) -> String;
    fn router(&self) -> &Router;
}

/// Serves until `stop`. `open`: the node asks for no credentials.
pub async fn serve(listener: TcpListener, node: Arc<dyn Watched>, open: bool, tls: Tls, stop: CancellationToken) {
    let router = axum::Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .route("/v1/shards", get(shards))
        .route("/v1/shards/{shard}/leader", get(leader))
        .with_state(node);
    let router = if open { router.layer(middleware::from_fn(only_this_machine)) } else { router };
    let (guests, connections) = (Guests::new(GUESTS), TaskTracker::new());
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => match guests.admit(peer.ip()) {
                Some(guest) => {
                    connections.spawn(connection(stream, guest, router.clone(), tls.clone(), stop.clone()));
                }
                None => tracing::debug!(%peer, "no room for another connection over HTTP"),
            },
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection over HTTP");
                tokio::time::sleep(ACCEPT_AGAIN_AFTER).await;
            }
        }
    }
    connections.close();
    let _ = tokio::time::timeout(STOP_WITHIN, connections.wait()).await;
}

/// How a request came.
#[derive(Clone, Copy)]
struct Scheme(&'static str);

async fn connection(stream: TcpStream, guest: Guest, router: axum::Router, tls: Tls, stop: CancellationToken) {
    let _ = stream.set_nodelay(true);
    let accepted = tokio::select! {
        accepted = tokio::time::timeout(HEAD_WITHIN, tls.accept(stream, Inside::Http)) => accepted,
        () = guest.shown_out() => return,
        () = stop.cancelled() => return,
    };
    let stream = match accepted {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%error, "a connection over HTTP is closed: no TLS with it"),
        Err(_) => return,
    };
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN).max_buf_size(HEAD_BYTES_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .max_header_list_size(u32::try_from(HEAD_BYTES_MAX).expect("small"))
        .keep_alive_interval(KEEPALIVE_EVERY)
        .keep_alive_timeout(KEEPALIVE_EVERY);
    let (inner, asked) = (TowerToHyperService::new(router), CancellationToken::new());
    let has_asked = asked.clone();
    let scheme = Scheme(if stream.is_encrypted() { "https" } else { "http" });
    let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        has_asked.cancel();
        request.extensions_mut().insert(scheme);
        inner.call(request)
    });
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    // Until then nothing of hyper's looks at the time.
    let silent = async {
        if tokio::time::timeout(HEAD_WITHIN, asked.cancelled()).await.is_ok() {
            std::future::pending::<()>().await;
        }
    };
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = guest.shown_out() => return,
        () = silent => return,
        () = tokio::time::sleep(CONNECTION_WITHIN) => return,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error = %error, "a connection over HTTP has ended");
    }
}

/// Refuses whoever calls this machine by a name that is not its own, and pages of others.
async fn only_this_machine(request: Request, next: Next) -> Response {
    let named = request.uri().authority().map(|authority| authority.as_str());
    let named = named.or_else(|| text(request.headers(), header::HOST));
    let page = text(request.headers(), header::ORIGIN);
    // What a page of another machine includes comes without an origin.
    let from = request.headers().get("sec-fetch-site").and_then(|value| value.to_str().ok());
    let foreign = match (named, page) {
        (Some(host), _) if !is_this_machine(host) => Some(("Host", host)),
        (_, Some(origin)) if !origin.split_once("://").is_some_and(|(_, host)| is_this_machine(host)) => {
            Some(("Origin", origin))
        }
        _ if from == Some("cross-site") => Some(("Sec-Fetch-Site", "cross-site")),
        _ => None,
    };
    match foreign {
        None => next.run(request).await,
        Some((name, value)) => {
            let shown: String = value.chars().filter(|c| c.is_ascii_graphic()).take(100).collect();
            let why = format!(
                "{name} '{shown}' is not this machine. This node asks for no credentials, so it answers only at \
                 localhost and 127.0.0.1; 'boomerang serve' asks for some\n"
            );
            (StatusCode::FORBIDDEN, why).into_response()
        }
    }
}

/// Something else than text is foreign to everybody.
fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name).map(|value| value.to_str().unwrap_or("?"))
}

/// `localhost`, `127.0.0.1`, `[::1]`, with or without a port.
fn is_this_machine(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map_or("", |(host, _)| host),
        None => authority.split_once(':').map_or(authority, |(host, _)| host),
    };
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

async fn ready(State(node): State<Arc<dyn Watched>>) -> impl IntoResponse {
    match node.not_ready() {
        None => (StatusCode::OK, "ready\n".to_owned()),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
    }
}

async fn metrics(State(node): State<Arc<dyn Watched>>) -> impl IntoResponse {
    let format = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, format)], node.metrics())
}

async fn shards(State(node): State<Arc<dyn Watched>>) -> Response {
    json(&node.router().shown_map())
}

fn json(value: &impl Serialize) -> Response {
    let text = serde_json::to_string(value).expect("our types always encode");
    ([(header::CONTENT_TYPE, "application/json")], text).into_response()
}

async fn leader(
    State(node): State<Arc<dyn Watched>>,
    Path(shard): Path<u16>,
    uri: Uri,
    Extension(Scheme(scheme)): Extension<Scheme>,
) -> Response {
    let router = node.router();
    let Some(group) = router.all_shards().find(|group| *group == GroupId::of_shard(ShardId(shard))) else {
        return (StatusCode::NOT_FOUND, format!("there is no shard {shard}\n")).into_response();
    };
    match unless_led_here(router, group, &uri, scheme) {
        Some(elsewhere) => elsewhere,
        None => json(&router.shown_leader(group)),
    }
}

/// What answers a request for `group` on a node that does not lead it: `307` to the same path on the one that does, or
/// `503` while nobody does.
pub fn unless_led_here(router: &Router, group: GroupId, uri: &Uri, scheme: &str) -> Option<Response> {
    let leader = router.shown_leader(group);
    if leader.node == Some(router.cluster().node_id()) {
        return None;
    }
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    Some(match leader.http {
        Some(address) => Redirect::temporary(&format!("{scheme}://{address}{path}")).into_response(),
        None => {
            let why = "nobody leads it now, as far as this node knows\n";
            (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, RETRY_AFTER_SECONDS)], why).into_response()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_known_by_its_own_names() {
        for own in
            ["localhost", "LOCALHOST:9974", "127.0.0.1:9974", "127.1.2.3", "[::1]:9974", "[::1]", "[::ffff:127.0.0.1]"]
        {
            assert!(is_this_machine(own), "{own}");
        }
        for foreign in
            ["", "?", "null", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "[::2]"]
        {
            assert!(!is_this_machine(foreign), "{foreign}");
        }
    }
}
