//! Callbacks over gRPC: the service `BoomerangCallback`, without TLS.
//!
//! An answer that is a refusal is a `CallbackResponse` with its status, and not a gRPC status: those are for what is
//! wrong with the call itself.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::net::TcpListener;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use super::{Handler, PAYLOAD_BYTES_MAX, Received, Reply, Shared};
use boomerang_task::Protocol;
use boomerang_wire::proto::boomerang_callback_server::{BoomerangCallback, BoomerangCallbackServer};
use boomerang_wire::proto::{CallbackRequest, CallbackResponse};

struct Service<H>(Arc<Shared<H>>);

#[tonic::async_trait]
impl<H: Handler> BoomerangCallback for Service<H> {
    async fn on_task_expired(&self, request: Request<CallbackRequest>) -> Result<Response<CallbackResponse>, Status> {
        let arrived_at = SystemTime::now();
        let from = request.remote_addr().ok_or_else(|| Status::internal("a caller without an address"))?;
        let received = match Received::of(request.into_inner(), Protocol::Grpc, 0, from, arrived_at) {
            Ok(received) => received,
            Err(error) => {
                let why = error.to_string();
                self.0.handler.refused(from, &why);
                return Err(Status::invalid_argument(why));
            }
        };
        match self.0.reply(received).await {
            Reply::Silence => Err(Status::unavailable("the receiver has ended")),
            reply => Ok(Response::new(reply.response().expect("not silence"))),
        }
    }
}

pub(super) async fn serve<H: Handler>(listener: TcpListener, shared: Arc<Shared<H>>) {
    let (finish, stop) = (shared.finish.clone(), shared.stop.clone());
    let service = BoomerangCallbackServer::new(Service(shared)).max_decoding_message_size(PAYLOAD_BYTES_MAX);
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let serving =
        Server::builder().add_service(service).serve_with_incoming_shutdown(incoming, finish.cancelled_owned());
    // An error would be one of the listener, which a sender notices by itself.
    let _ = stop.run_until_cancelled_owned(serving).await;
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{Answer, Receiver, Refusal};
    use super::*;
    use boomerang_client::fake::{callback_request, task_id};
    use boomerang_wire::proto;
    use boomerang_wire::proto::boomerang_callback_client::BoomerangCallbackClient;

    async fn sender(receiver: &Receiver) -> BoomerangCallbackClient<tonic::transport::Channel> {
        BoomerangCallbackClient::connect(format!("http://{}", receiver.local_addr())).await.unwrap()
    }

    #[tokio::test]
    async fn deliveries_are_taken_and_answered() {
        let (receiver, mut channel) = Receiver::channel_of(Protocol::Grpc, "127.0.0.1:0", 10).await.unwrap();
        let mut sender = sender(&receiver).await;
        for n in 1..=3 {
            let answer = sender.on_task_expired(callback_request(n)).await.unwrap().into_inner();
            assert_eq!(answer.status(), proto::Status::Ok);
            let received = channel.recv().await.unwrap();
            assert_eq!(
                (received.task_id, received.payload, received.protocol),
                (task_id(n), n.to_string().into(), Protocol::Grpc)
            );
            assert_eq!((received.fence.term, received.fence.seq, received.due_ms), (3, n, 1_000));
        }
        let wrong = CallbackRequest { task_id: "x".into(), ..callback_request(1) };
        assert_eq!(sender.on_task_expired(wrong).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    }

    #[tokio::test]
    async fn a_refusal_is_an_answer_and_a_delayed_one_is_given_at_the_end() {
        let handler = |_: &Received| Answer {
            reply: Reply::Refuse(Refusal { status: proto::Status::Overloaded, ..Refusal::new("full") }),
            delay: Duration::from_millis(20),
        };
        let receiver = Receiver::listen(Protocol::Grpc, "127.0.0.1:0", None, handler).await.unwrap();
        let mut sender = sender(&receiver).await;
        let answer = sender.on_task_expired(callback_request(1)).await.unwrap().into_inner();
        assert_eq!((answer.status(), answer.error_message.as_str()), (proto::Status::Overloaded, "full"));
        receiver.finish().await;
        assert!(sender.on_task_expired(callback_request(2)).await.is_err(), "nobody is there any more");
    }
}
