//! Callbacks over UDP: a datagram with a `CallbackRequest`, answered with one that holds a `CallbackResponse`.
//!
//! What the answer belongs to is known to the sender by the port it sent from. There is no back-pressure: what the
//! handler or the channel has no time for stays in the socket's buffer, and is lost when that is full.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use prost::Message;
use tokio::net::UdpSocket;

use super::{Handler, Received, Shared, response};
use boomerang_task::Protocol;
use boomerang_wire::proto::{CallbackRequest, CallbackResponse, Status};

/// The most an IP packet can carry.
const DATAGRAM_BYTES_MAX: usize = 65_535;

pub(super) async fn serve<H: Handler>(socket: UdpSocket, shared: Arc<Shared<H>>) {
    let socket = Arc::new(socket);
    let mut input = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        let result = tokio::select! {
            () = shared.finish.cancelled() => return,
            result = socket.recv_from(&mut input) => result,
        };
        let arrived_at = SystemTime::now();
        // An error is the report that an answer found nobody; the next datagram is none the worse for it.
        let Ok((bytes, from)) = result else { continue };
        let request = CallbackRequest::decode(Bytes::copy_from_slice(&input[..bytes]))
            .map_err(|error| format!("not a CallbackRequest: {error}"))
            .and_then(|request| {
                Received::of(request, Protocol::Udp, 0, from, arrived_at).map_err(|error| error.to_string())
            });
        let received = match request {
            Ok(received) => received,
            Err(why) => {
                shared.handler.refused(from, &why);
                send(&socket, from, &response(Status::InvalidRequest, &why)).await;
                continue;
            }
        };
        let Some(answer) = shared.take(received).await else { return };
        let Some(response) = answer.reply.response() else { continue };
        if answer.delay.is_zero() {
            send(&socket, from, &response).await;
            continue;
        }
        let (socket, stop) = (socket.clone(), shared.stop.clone());
        shared.connections.spawn(stop.run_until_cancelled_owned(async move {
            tokio::time::sleep(answer.delay).await;
            send(&socket, from, &response).await;
        }));
    }
}

/// A datagram that cannot be sent is as good as one that is lost.
async fn send(socket: &UdpSocket, to: SocketAddr, response: &CallbackResponse) {
    let _ = socket.send_to(&response.encode_to_vec(), to).await;
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{Answer, Receiver, Reply};
    use super::*;
    use boomerang_client::fake::{callback_request, task_id};

    async fn sender(receiver: &Receiver) -> UdpSocket {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.connect(receiver.local_addr()).await.unwrap();
        socket
    }

    async fn answer(socket: &UdpSocket) -> CallbackResponse {
        let mut input = [0; 1024];
        let bytes = socket.recv(&mut input).await.unwrap();
        CallbackResponse::decode(&input[..bytes]).unwrap()
    }

    #[tokio::test]
    async fn a_datagram_is_answered_with_a_datagram() {
        let (receiver, mut channel) = Receiver::channel_of(Protocol::Udp, "127.0.0.1:0", 10).await.unwrap();
        let sender = sender(&receiver).await;
        sender.send(&callback_request(5).encode_to_vec()).await.unwrap();
        assert_eq!(answer(&sender).await.status(), Status::Ok);
        let received = channel.recv().await.unwrap();
        assert_eq!((received.task_id, received.protocol, received.fence.seq), (task_id(5), Protocol::Udp, 5));
        assert_eq!(received.from, sender.local_addr().unwrap());
        for wrong in [&b"\xff\xff"[..], b""] {
            sender.send(wrong).await.unwrap();
            assert_eq!(answer(&sender).await.status(), Status::InvalidRequest);
        }
    }

    #[tokio::test]
    async fn refusals_silence_and_delays_are_as_with_the_others() {
        let handler = |received: &Received| match received.payload.as_ref() {
            b"1" => Reply::Silence.into(),
            b"2" => Answer { reply: Reply::Accept, delay: Duration::from_millis(20) },
            _ => Reply::refuse("no").into(),
        };
        let receiver = Receiver::listen(Protocol::Udp, "127.0.0.1:0", None, handler).await.unwrap();
        let sender = sender(&receiver).await;
        for n in 1..=3 {
            sender.send(&callback_request(n).encode_to_vec()).await.unwrap();
        }
        let first = answer(&sender).await;
        assert_eq!((first.status(), first.error_message.as_str()), (Status::Error, "no"));
        receiver.finish().await;
        assert_eq!(answer(&sender).await.status(), Status::Ok, "the delayed one was sent before the end");
    }
}
