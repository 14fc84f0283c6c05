//! How a connection over TCP is made to a name that has several addresses.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rustix::net::sockopt;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// So long an address is waited for before the next one is tried as well (RFC 8305).
const NEXT_AFTER: Duration = Duration::from_millis(250);
/// A connection on which nothing comes is asked for a sign of life after so long, and again after as long.
const KEEPALIVE: Duration = Duration::from_secs(15);
const KEEPALIVE_TRIES: u32 = 3;
/// What was sent and is not acknowledged for so long breaks the connection.
const UNACKNOWLEDGED_MS: u32 = 30_000;

/// The first that answers. One that is silent does not keep the next from being tried, and is waited for all the same.
pub async fn connect_to_one_of(addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let (mut rest, mut connecting, mut failed) = (addresses.iter(), FuturesUnordered::new(), None);
    loop {
        match rest.next() {
            Some(address) => connecting.push(TcpStream::connect(*address)),
            None if connecting.is_empty() => {
                return Err(
                    failed.unwrap_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "there is no address"))
                );
            }
            None => {}
        }
        let answered = match rest.len() {
            0 => connecting.next().await,
            _ => timeout(NEXT_AFTER, connecting.next()).await.ok().flatten(),
        };
        match answered {
            Some(Ok(stream)) => return lively(stream),
            Some(Err(error)) => failed = Some(error),
            None => {}
        }
    }
}

/// What is written leaves at once, and a connection that has died without a sign is noticed.
fn lively(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(&stream, true)?;
    sockopt::set_tcp_keepidle(&stream, KEEPALIVE)?;
    sockopt::set_tcp_keepintvl(&stream, KEEPALIVE)?;
    sockopt::set_tcp_keepcnt(&stream, KEEPALIVE_TRIES)?;
    sockopt::set_tcp_user_timeout(&stream, UNACKNOWLEDGED_MS)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn an_address_that_does_not_answer_leaves_it_to_the_next() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let there = listener.local_addr().unwrap();
        // Nobody listens at the first; of a network for documents, nobody answers at the second.
        for first in ["127.0.0.2", "192.0.2.1"] {
            let first = SocketAddr::new(first.parse().unwrap(), there.port());
            let begun = std::time::Instant::now();
            assert_eq!(connect_to_one_of(&[first, there]).await.unwrap().peer_addr().unwrap(), there);
            assert!(begun.elapsed() < Duration::from_secs(20), "{first}: {:?}", begun.elapsed());
        }
        let nobody = connect_to_one_of(&[SocketAddr::new([127, 0, 0, 2].into(), there.port())]).await.unwrap_err();
        assert_eq!(nobody.kind(), io::ErrorKind::ConnectionRefused);
        assert!(connect_to_one_of(&[]).await.is_err());
    }
}
