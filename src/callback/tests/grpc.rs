use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::http::HeaderMap;
use rustls::RootCertStore;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Request, Response, Status as GrpcStatus};

use super::http::secure;
use super::*;
use crate::wire::proto::CallbackRequest;
use crate::wire::proto::boomerang_callback_server::{BoomerangCallback, BoomerangCallbackServer};

/// Answers by the payload.
#[derive(Clone, Default)]
struct Receiver {
    connections: Arc<AtomicUsize>,
}

#[tonic::async_trait]
impl BoomerangCallback for Receiver {
    async fn on_task_expired(
        &self,
        request: Request<CallbackRequest>,
    ) -> Result<Response<CallbackResponse>, GrpcStatus> {
        let agent = request.metadata().get("user-agent").unwrap().to_str().unwrap();
        assert!(agent.starts_with(USER_AGENT_TEXT), "{agent}");
        assert!(request.metadata().contains_key("grpc-timeout"));
        let respond = |status: Status, text: &str| {
            Ok(Response::new(CallbackResponse { status: status.into(), error_message: text.into() }))
        };
        match &*request.into_inner().payload {
            b"refuse" => respond(Status::Error, "no stock"),
            b"busy" => Err(GrpcStatus::unavailable("restarting")),
            b"late" => Err(GrpcStatus::deadline_exceeded("too slow")),
            b"hang" => std::future::pending().await,
            b"huge" => respond(Status::Error, &"x".repeat(1 << 20)),
            _ => respond(Status::Ok, ""),
        }
    }
}

async fn receiver() -> (SocketAddr, Receiver) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, receiver) = (listener.local_addr().unwrap(), Receiver::default());
    let connections = receiver.connections.clone();
    let incoming = futures::StreamExt::inspect(TcpIncoming::from(listener), move |_| {
        connections.fetch_add(1, Ordering::Relaxed);
    });
    tokio::spawn(
        Server::builder().add_service(BoomerangCallbackServer::new(receiver.clone())).serve_with_incoming(incoming),
    );
    (address, receiver)
}

fn grpc(endpoint: &str) -> Callback {
    Callback::new(Protocol::Grpc, endpoint).unwrap()
}

fn saying(callback: &Callback, payload: &'static str) -> Delivery {
    Delivery { payload: Bytes::from_static(payload.as_bytes()), ..delivery(callback.clone(), 1) }
}

#[tokio::test]
async fn answers_and_statuses_have_their_class() {
    let callbacks = sockets(impatient());
    let (address, receiver) = receiver().await;
    let to = grpc(&address.to_string());
    for endpoint in [format!("http://{address}"), format!("grpc://{address}"), address.to_string()] {
        once(&callbacks, &grpc(&endpoint)).await.unwrap();
    }
    assert_eq!(receiver.connections.load(Ordering::Relaxed), 2, "one per spelling, and reused");
    for (payload, class, says) in [
        ("refuse", FailureClass::BadStatus, "the receiver answered ERROR: no stock"),
        ("busy", FailureClass::BadStatus, "the receiver answered Unavailable: restarting"),
        ("late", FailureClass::Timeout, "did not finish in time: too slow"),
        ("hang", FailureClass::Timeout, "no answer within 150 ms"),
        ("huge", FailureClass::BadStatus, "too large"),
    ] {
        assert_failed(attempt(&callbacks, saying(&to, payload)).await, class, &[&address.to_string(), says]);
    }
    assert_eq!(receiver.connections.load(Ordering::Relaxed), 2);
    attempt(&callbacks, saying(&to, "fine")).await.unwrap();
}

#[tokio::test]
async fn what_is_in_the_way_has_its_class_and_a_receiver_that_comes_back_is_found() {
    let callbacks = sockets(impatient());
    let address = dead_address();
    let to = grpc(&address.to_string());
    for _ in 0..2 {
        assert_failed(once(&callbacks, &to).await, FailureClass::Refused, &[&address.to_string(), "refused"]);
    }
    let listener = TcpListener::bind(address).await.unwrap();
    let service = BoomerangCallbackServer::new(Receiver::default());
    let serving = tokio::spawn(Server::builder().add_service(service).serve_with_incoming(TcpIncoming::from(listener)));
    once(&callbacks, &to).await.unwrap();
    serving.abort();

    let to = grpc("no-such-host.invalid:9");
    assert_failed(
        once(&callbacks, &to).await,
        FailureClass::Unreachable,
        &["no-such-host.invalid:9", "cannot connect"],
    );
    let to = grpc(&silent().await.to_string());
    assert_failed(once(&callbacks, &to).await, FailureClass::Timeout, &["no answer"]);
}

#[tokio::test]
async fn a_connection_that_breaks_under_a_request_is_broken() {
    let callbacks = sockets(settings());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = grpc(&listener.local_addr().unwrap().to_string());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // Its preface has arrived.
            stream.readable().await.unwrap();
        }
    });
    assert_failed(once(&callbacks, &to).await, FailureClass::Broken, &[to.endpoint.as_str()]);
}

#[tokio::test]
async fn an_answer_that_is_not_grpc_harms_nobody() {
    let callbacks = sockets(settings());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = grpc(&listener.local_addr().unwrap().to_string());
    let router = Router::new().fallback(|headers: HeaderMap| async move {
        let wrong =
            [("content-type", "application/grpc"), ("grpc-status", "5"), ("grpc-status-details-bin", "not base64!")];
        assert_eq!(headers["content-type"], "application/grpc");
        wrong
    });
    tokio::spawn(async move { axum::serve(listener, router).await });
    assert_failed(once(&callbacks, &to).await, FailureClass::BadAnswer, &["not gRPC"]);

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = grpc(&listener.local_addr().unwrap().to_string());
    tokio::spawn(async move { axum::serve(listener, Router::new()).await });
    let failure = assert_failed(once(&callbacks, &to).await, FailureClass::BadStatus, &["404"]);
    assert!(failure.text.contains(&format!("{:?}", Code::Unimplemented)), "{failure}");
}

#[tokio::test]
async fn tls_is_trusted_or_the_receiver_is_unreachable() {
    let router = Routes::new(BoomerangCallbackServer::new(Receiver::default())).into_axum_router();
    let (port, roots) = secure(router, &[b"h2"]).await;
    let (trusted, other) = (format!("https://localhost:{port}"), format!("https://127.0.0.1:{port}"));
    let believing = trusting(settings(), Trust::only(roots));
    once(&believing, &grpc(&trusted)).await.unwrap();
    let ended = once(&believing, &grpc(&other)).await;
    assert_failed(ended, FailureClass::Unreachable, &[&other, "certificate is not accepted", "not valid for name"]);

    let (_, strangers) = secure(Router::new(), &[]).await;
    let others = trusting(settings(), Trust::only(strangers));
    let ended = once(&others, &grpc(&trusted)).await;
    assert_failed(ended, FailureClass::Unreachable, &[&trusted, "certificate is not accepted"]);
    let nobody = trusting(settings(), Trust::only(RootCertStore::empty()));
    assert_failed(once(&nobody, &grpc(&trusted)).await, FailureClass::Unreachable, &[&trusted, "cannot connect"]);
}
