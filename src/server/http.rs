//! Health, readiness and metrics over HTTP, and where shards are led.
//!
//! `/healthz`: the process answers. `/readyz`: it can store and fire, or knows who can, or says what it is waiting for; a
//! load balancer takes a node out by it. `/metrics`: the text format of Prometheus. `/v1/shards`: who leads what.
//! `/v1/shards/{n}/leader`: answered by the leader; the others send there with `307`.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::routing::Router;
use crate::task::{GroupId, ShardId};

/// An election takes about a second.
const RETRY_AFTER_SECONDS: &str = "1";

/// What this listener shows of the node.
pub trait Watched: Send + Sync + 'static {
    /// Why the node is not ready; nothing when it is.
    fn not_ready(&self) -> Option<String>;
    fn metrics(&self) -> String;
    fn router(&self) -> &Router;
}

pub async fn serve(listener: TcpListener, node: Arc<dyn Watched>, stop: CancellationToken) -> std::io::Result<()> {
    let router = axum::Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .route("/v1/shards", get(shards))
        .route("/v1/shards/{shard}/leader", get(leader))
        .with_state(node);
    axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await
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

async fn leader(State(node): State<Arc<dyn Watched>>, Path(shard): Path<u16>, uri: Uri) -> Response {
    let router = node.router();
    let Some(group) = router.all_shards().find(|group| *group == GroupId::of_shard(ShardId(shard))) else {
        return (StatusCode::NOT_FOUND, format!("there is no shard {shard}\n")).into_response();
    };
    match unless_led_here(router, group, &uri) {
        Some(elsewhere) => elsewhere,
        None => json(&router.shown_leader(group)),
    }
}

/// What answers a request for `group` on a node that does not lead it: `307` to the same path on the one that does, or
/// `503` while nobody does.
pub fn unless_led_here(router: &Router, group: GroupId, uri: &Uri) -> Option<Response> {
    let leader = router.shown_leader(group);
    if leader.node == Some(router.cluster().node_id()) {
        return None;
    }
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    Some(match leader.http {
        Some(address) => Redirect::temporary(&format!("http://{address}{path}")).into_response(),
        None => {
            let why = "nobody leads it now, as far as this node knows\n";
            (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, RETRY_AFTER_SECONDS)], why).into_response()
        }
    })
}
