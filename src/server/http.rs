//! Health, readiness and metrics over HTTP.
//!
//! `/healthz`: the process answers. `/readyz`: it can store and fire, or says what it is waiting for; a load balancer
//! takes a node out by it. `/metrics`: the text format of Prometheus.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// What this listener shows of the node.
pub trait Watched: Send + Sync + 'static {
    /// Why the node is not ready; nothing when it is.
    fn not_ready(&self) -> Option<String>;
    fn metrics(&self) -> String;
}

pub async fn serve(listener: TcpListener, node: Arc<dyn Watched>, stop: CancellationToken) -> std::io::Result<()> {
    let router = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
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
