//! Callbacks over UDP: one datagram per attempt, which holds a bare `CallbackRequest`.
//!
//! Without an acknowledgement an attempt is over when the datagram has left: it arrives once or not at all, and nobody
//! knows. With one, an attempt has a socket of its own, connected to the receiver: so its answer cannot be taken for
//! that of another attempt, nobody else's datagram is taken for one, and the system says when nobody listens.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use tokio::net::UdpSocket;
use tokio::sync::OnceCell;
use tokio::time::{Instant, timeout_at};

use super::connect::Connector;
use super::{Attempt, failures, response_verdict};
use crate::task::{Delivery, Failure, FailureClass};
use crate::wire::convert::callback_request;
use crate::wire::proto::CallbackResponse;

/// What IPv4 can carry in one datagram: 64 KiB without its headers.
pub const DATAGRAM_BYTES_MAX: usize = 65_507;
/// A response holds a status and a text.
const RESPONSE_BYTES_MAX: usize = 8 * 1024;

/// The sockets of attempts that await no answer.
pub struct Udp {
    connector: Connector,
    v4: OnceCell<UdpSocket>,
    v6: OnceCell<UdpSocket>,
}

impl Udp {
    pub fn new(connector: Connector) -> Self {
        Self { connector, v4: OnceCell::new(), v6: OnceCell::new() }
    }

    pub async fn deliver(&self, delivery: &Delivery, within: Duration) -> Attempt {
        let callback = &delivery.policy.callback;
        let place = callback.endpoint.as_str();
        let datagram = callback_request(delivery).encode_to_vec();
        if datagram.len() > DATAGRAM_BYTES_MAX {
            return Err(too_large(place, datagram.len()));
        }
        let deadline = Instant::now() + within;
        let addresses = timeout_at(deadline, self.connector.addresses_of(place))
            .await
            .map_err(|_| failures::no_answer(place, within))?
            .map_err(|error| failures::cannot_connect(place, &*error))?;
        let ended = if callback.options.acknowledge {
            timeout_at(deadline, ask(place, &addresses, &datagram)).await
        } else {
            timeout_at(deadline, self.send(place, addresses[0], &datagram)).await
        };
        ended.unwrap_or_else(|_| Err(failures::no_answer(place, within)))
    }

    async fn send(&self, place: &str, address: SocketAddr, datagram: &[u8]) -> Attempt {
        let socket = match address {
            SocketAddr::V4(_) => self.v4.get_or_try_init(|| any_port(address)).await,
            SocketAddr::V6(_) => self.v6.get_or_try_init(|| any_port(address)).await,
        };
        let sent = match socket {
            Ok(socket) => socket.send_to(datagram, address).await,
            Err(error) => Err(error),
        };
        sent.map(|_| ()).map_err(|error| not_sent(place, &error, datagram))
    }
}

async fn any_port(to: SocketAddr) -> io::Result<UdpSocket> {
    match to {
        SocketAddr::V4(_) => UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await,
        SocketAddr::V6(_) => UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).await,
    }
}

/// The next address is tried only if nobody listens at the one before: then nobody has the datagram.
async fn ask(place: &str, addresses: &[SocketAddr], datagram: &[u8]) -> Attempt {
    let mut refused = None;
    for address in addresses {
        match ask_one(place, *address, datagram).await {
            Err(failure) if failure.class == FailureClass::Refused => refused = Some(failure),
            ended => return ended,
        }
    }
    Err(refused.expect("a name has at least one address"))
}

async fn ask_one(place: &str, address: SocketAddr, datagram: &[u8]) -> Attempt {
    let mut buffer = vec![0; RESPONSE_BYTES_MAX];
    let asked = async {
        let socket = any_port(address).await?;
        socket.connect(address).await?;
        socket.send(datagram).await?;
        socket.recv(&mut buffer).await
    };
    let bytes = asked.await.map_err(|error| not_sent(place, &error, datagram))?;
    buffer.truncate(bytes);
    let response = CallbackResponse::decode(Bytes::from(buffer)).map_err(|error| {
        Failure::new(FailureClass::BadAnswer, format!("{place}: the answer is not a callback response: {error}"))
    })?;
    response_verdict(place, response)
}

fn not_sent(place: &str, error: &io::Error, datagram: &[u8]) -> Failure {
    match error.kind() {
        ErrorKind::ConnectionRefused => {
            Failure::new(FailureClass::Refused, format!("{place}: nobody listens there: {error}"))
        }
        // The system's own limit may be smaller than the protocol's.
        _ if error.raw_os_error() == Some(rustix::io::Errno::MSGSIZE.raw_os_error()) => {
            too_large(place, datagram.len())
        }
        _ => Failure::new(FailureClass::Unreachable, format!("{place}: cannot send: {error}")),
    }
}

fn too_large(place: &str, bytes: usize) -> Failure {
    let text = format!("{place}: the delivery has {bytes} bytes, a datagram carries {DATAGRAM_BYTES_MAX}");
    Failure::new(FailureClass::TooLarge, text)
}
