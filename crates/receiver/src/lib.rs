//! The other end of a callback: takes deliveries, hands each to a handler, and answers as the handler says.
//!
//! Used by `boomtool listen`, the tests and the benches. Whichever protocol brings a delivery, the handler sees the
//! same [`Received`] and gives the same [`Answer`]; what one protocol alone has to say is in [`Received::http`].
//!
//! The instant of arrival is taken before anything else is done with a delivery, so that what the handler does with
//! earlier ones does not count as lateness. What is no delivery, or has the wrong signature, is refused here and never
//! reaches [`Handler::take`].
//!
//! - `tcp`: frames, many in one read and their answers in one write
//! - `grpc`: the service `BoomerangCallback`; `http`: HTTP/1.1 and HTTP/2, without TLS; `udp`: a datagram each way
//! - `signature`: what Standard Webhooks say about who sent it
//! - `tally`: what came, counted
//! ```
//! use boomerang_receiver::Receiver;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> std::io::Result<()> {
//! // By TCP, on any free port; no more than a hundred deliveries wait to be looked at.
//! let (receiver, mut deliveries) = Receiver::channel("127.0.0.1:0", 100).await?;
//! println!("register with --callback tcp://{}", receiver.local_addr());
//! # let stopped = async { receiver.finish().await };
//! # stopped.await;
//! while let Some(delivery) = deliveries.recv().await {
//!     println!("{} came back {:?} us after it was due", delivery.task_id, delivery.lateness_us());
//! }
//! # Ok(())
//! # }
//! ```

#![warn(missing_docs)]

mod grpc;
mod http;
pub mod signature;
mod tally;
mod tcp;
mod udp;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::{HeaderMap, Version};
use bytes::Bytes;
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use tally::{Novelty, Percentiles, Tally, TallySummary};

use boomerang_task::{Fence, InstantMs, Invalid, Protocol, Secret, TaskId};
use boomerang_wire::convert;
use boomerang_wire::proto::{self, CallbackRequest, Status};

/// No delivery over HTTP or gRPC may be larger; far above what a node takes unless its settings say otherwise.
const PAYLOAD_BYTES_MAX: usize = 16 * 1024 * 1024;

/// One delivery, as it came.
#[derive(Debug, Clone)]
pub struct Received {
    /// How it came.
    pub protocol: Protocol,
    /// Which task.
    pub task_id: TaskId,
    /// Whose task; empty when the sender does not say.
    pub client_id: String,
    /// The task's name; empty when it has none.
    pub name: String,
    /// What was registered. It shares the memory of the read it came in: copy it to keep it for long.
    pub payload: Bytes,
    /// The occurrence, counted from 0.
    pub occurrence: u64,
    /// The attempt, counted from 1.
    pub attempt: u32,
    /// When this occurrence was due; 0 when the sender does not say.
    pub due_ms: InstantMs,
    /// Only grows from one delivery of an occurrence to the next.
    pub fence: Fence,
    /// This is the copy of a dead letter, for its destination.
    pub dead_letter: Option<DeadLetterCopy>,
    /// The number of the request; 0 where there is none.
    pub request_id: u64,
    /// The sender's address.
    pub from: SocketAddr,
    /// By the system clock, before anything was done with it.
    pub arrived_at: SystemTime,
    /// What HTTP brings along.
    pub http: Option<HttpRequest>,
}

/// What the destination of dead letters is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetterCopy {
    /// By which it can be replayed.
    pub id: String,
    /// So many were made; 0 when the sender does not say.
    pub attempts: u32,
    /// How the last one failed: the class of the failure, and a text.
    pub error: String,
}

/// A delivery by HTTP, apart from its payload.
#[derive(Debug, Clone)]
pub struct HttpRequest {
    /// Path and query.
    pub target: String,
    /// HTTP/1.1 or HTTP/2.
    pub version: Version,
    /// All of them.
    pub headers: HeaderMap,
    /// The signature was checked, and is right. What has a wrong one is refused before.
    pub signed: bool,
}

impl Received {
    /// How long after its due instant it came, in microseconds; negative when it came early.
    pub fn lateness_us(&self) -> Option<i64> {
        if self.due_ms == 0 {
            return None;
        }
        let arrived_us = self.arrived_at.duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let lateness_us = i128::try_from(arrived_us).ok()? - i128::from(self.due_ms) * 1000;
        i64::try_from(lateness_us).ok()
    }

    fn of(
        request: CallbackRequest,
        protocol: Protocol,
        request_id: u64,
        from: SocketAddr,
        arrived_at: SystemTime,
    ) -> Result<Self, Invalid> {
        Ok(Self {
            protocol,
            task_id: request.task_id.parse()?,
            client_id: request.client_id,
            name: request.name,
            payload: request.payload,
            occurrence: request.occurrence,
            attempt: request.attempt,
            due_ms: request.due_ms,
            fence: Fence { term: request.fence_term, seq: request.fence_seq },
            dead_letter: request.dead_letter.map(|notice| DeadLetterCopy {
                id: notice.dead_letter_id,
                attempts: notice.attempts,
                error: match convert::failure_class_from(notice.failure_class) {
                    Ok(Some(class)) => format!("{class}: {}", notice.error),
                    _ => notice.error,
                },
            }),
            request_id,
            from,
            arrived_at,
            http: None,
        })
    }
}

/// What the sender is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// The task is done.
    Accept,
    /// It is not; the sender may try again.
    Refuse(Refusal),
    /// Nothing at all: the sender runs into its timeout.
    Silence,
}

/// Why not, and how to say so in each protocol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// In words.
    pub reason: String,
    /// What is answered over TCP, gRPC and UDP.
    pub status: Status,
    /// What is answered over HTTP; `None` follows `status`.
    pub http_status: Option<u16>,
    /// HTTP: the next attempt shall come no sooner.
    pub retry_after: Option<Duration>,
}

impl Refusal {
    /// An error, for this reason.
    pub fn new(reason: impl Into<String>) -> Self {
        Self::with(Status::Error, reason)
    }

    fn with(status: Status, reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), status, http_status: None, retry_after: None }
    }

    fn http_status(&self) -> u16 {
        self.http_status.unwrap_or(match self.status {
            Status::InvalidRequest => 400,
            Status::Unauthorized | Status::SessionExpired => 401,
            Status::NotFound => 404,
            Status::Conflict => 409,
            Status::TooLate => 410,
            Status::NotLeader | Status::Overloaded => 503,
            Status::Ok | Status::Error => 500,
        })
    }
}

impl Reply {
    /// An error, for this reason.
    pub fn refuse(reason: impl Into<String>) -> Self {
        Reply::Refuse(Refusal::new(reason))
    }

    /// As a message; `None` for none.
    fn response(&self) -> Option<proto::CallbackResponse> {
        match self {
            Reply::Accept => Some(response(Status::Ok, "")),
            Reply::Refuse(refusal) => Some(response(refusal.status, &refusal.reason)),
            Reply::Silence => None,
        }
    }
}

fn response(status: Status, message: &str) -> proto::CallbackResponse {
    proto::CallbackResponse { status: status.into(), error_message: message.to_owned() }
}

/// What the sender is told, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// What it is told.
    pub reply: Reply,
    /// How long after the arrival.
    pub delay: Duration,
}

impl From<Reply> for Answer {
    fn from(reply: Reply) -> Self {
        Self { reply, delay: Duration::ZERO }
    }
}

/// Decides about deliveries. A closure over `&Received` is one.
///
/// It runs on the thread of the connection: when it blocks, the connection waits.
pub trait Handler: Send + Sync + 'static {
    /// What to answer.
    fn take(&self, received: &Received) -> Answer;

    /// Something came that is no delivery, or whose signature is wrong. It has been refused for this reason.
    fn refused(&self, _from: SocketAddr, _why: &str) {}
}

impl<F: Fn(&Received) -> Answer + Send + Sync + 'static> Handler for F {
    fn take(&self, received: &Received) -> Answer {
        self(received)
    }
}

/// A listening socket and the connections it has accepted. Dropping it ends them; see [`Receiver::finish`].
#[derive(Debug)]
pub struct Receiver {
    protocol: Protocol,
    address: SocketAddr,
    /// Asks connections to answer what they have taken, and end.
    finish: CancellationToken,
    /// Ends connections where they stand.
    stop: CancellationToken,
    connections: TaskTracker,
}

/// What every connection needs.
struct Shared<H> {
    handler: H,
    channel: Option<mpsc::Sender<Received>>,
    secret: Option<Secret>,
    finish: CancellationToken,
    stop: CancellationToken,
    connections: TaskTracker,
}

impl Receiver {
    /// Listens for TCP callbacks on `address` (port 0 picks a free one) and asks `handler` for the answer to each.
    pub async fn bind(address: &str, handler: impl Handler) -> io::Result<Self> {
        Self::start(Protocol::Tcp, address, handler, None, None).await
    }

    /// The same for any protocol. With a secret, deliveries by HTTP must be signed with it.
    pub async fn listen(
        protocol: Protocol,
        address: &str,
        secret: Option<Secret>,
        handler: impl Handler,
    ) -> io::Result<Self> {
        Self::start(protocol, address, handler, secret, None).await
    }

    /// Accepts every delivery over TCP and passes it to a channel of this capacity. Once the channel is closed,
    /// deliveries are no longer answered.
    pub async fn channel(address: &str, capacity: usize) -> io::Result<(Self, mpsc::Receiver<Received>)> {
        Self::channel_of(Protocol::Tcp, address, capacity).await
    }

    /// The same for any protocol.
    pub async fn channel_of(
        protocol: Protocol,
        address: &str,
        capacity: usize,
    ) -> io::Result<(Self, mpsc::Receiver<Received>)> {
        let (sender, receiver) = mpsc::channel(capacity);
        let accept = |_: &Received| Reply::Accept.into();
        Ok((Self::start(protocol, address, accept, None, Some(sender)).await?, receiver))
    }

    async fn start<H: Handler>(
        protocol: Protocol,
        address: &str,
        handler: H,
        secret: Option<Secret>,
        channel: Option<mpsc::Sender<Received>>,
    ) -> io::Result<Self> {
        let (finish, stop, connections) = (CancellationToken::new(), CancellationToken::new(), TaskTracker::new());
        let shared = Arc::new(Shared {
            handler,
            channel,
            secret,
            finish: finish.clone(),
            stop: stop.clone(),
            connections: connections.clone(),
        });
        let address = if protocol == Protocol::Udp {
            let socket = UdpSocket::bind(address).await?;
            let address = socket.local_addr()?;
            connections.spawn(udp::serve(socket, shared));
            address
        } else {
            let listener = TcpListener::bind(address).await?;
            let address = listener.local_addr()?;
            match protocol {
                Protocol::Tcp => connections.spawn(tcp::accept(listener, shared)),
                Protocol::Grpc => connections.spawn(grpc::serve(listener, shared)),
                Protocol::Http => connections.spawn(http::serve(listener, shared)),
                Protocol::Udp => unreachable!("taken above"),
            };
            address
        };
        Ok(Self { protocol, address, finish, stop, connections })
    }

    /// What it speaks.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// Where it listens; with the port that was picked.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Takes no further deliveries, answers those it has taken (delayed ones in their time), and ends.
    pub async fn finish(self) {
        self.finish.cancel();
        self.connections.close();
        self.connections.wait().await;
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.finish.cancel();
        self.stop.cancel();
    }
}

impl<H: Handler> Shared<H> {
    /// What to answer to a delivery; `None` when nobody takes deliveries any more.
    async fn take(&self, received: Received) -> Option<Answer> {
        let answer = self.handler.take(&received);
        if let Some(channel) = &self.channel {
            channel.send(received).await.ok()?;
        }
        Some(answer)
    }

    /// The same, and waits until it is time. Where a request must have an answer, silence ends with the receiver.
    async fn reply(&self, received: Received) -> Reply {
        let answer = self.take(received).await.unwrap_or(Reply::Silence.into());
        if !answer.delay.is_zero() {
            tokio::select! {
                () = tokio::time::sleep(answer.delay) => {}
                () = self.stop.cancelled() => return Reply::Silence,
            }
        }
        if answer.reply == Reply::Silence {
            self.finish.cancelled().await;
        }
        answer.reply
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use boomerang_client::fake::task_id;

    #[test]
    fn lateness_is_measured_in_microseconds() {
        let from = "127.0.0.1:1".parse().unwrap();
        let request = CallbackRequest { task_id: task_id(1).to_string(), due_ms: 1_000, ..Default::default() };
        let lateness_us = |request: &CallbackRequest, us| {
            let arrived_at = UNIX_EPOCH + Duration::from_micros(us);
            Received::of(request.clone(), Protocol::Tcp, 1, from, arrived_at).unwrap().lateness_us()
        };
        assert_eq!(lateness_us(&request, 1_000_482), Some(482));
        assert_eq!(lateness_us(&request, 999_999), Some(-1));
        assert_eq!(lateness_us(&CallbackRequest { due_ms: 0, ..request }, 5), None);
    }

    #[test]
    fn a_refusal_has_a_status_of_its_own_over_http_or_follows() {
        let refusal = Refusal { status: Status::Overloaded, ..Refusal::new("full") };
        assert_eq!(refusal.http_status(), 503);
        assert_eq!(Refusal { http_status: Some(429), ..refusal }.http_status(), 429);
        assert_eq!(Refusal::new("no").http_status(), 500);
    }
}
