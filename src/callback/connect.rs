//! The one way to a receiver: from a host to its addresses, past the [guard](super::guard), to a connection.
//!
//! What is judged is what is connected to: a name is looked up once for both.

use std::error::Error;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::codegen::Service;
use tonic::codegen::http::Uri;

use super::guard::{Guard, Ours, Place};
use super::names::Names;

/// So long an address is waited for before the next one is tried as well (RFC 8305).
const NEXT_AFTER: Duration = Duration::from_millis(250);

/// `Unresolved`, `Forbidden`, `Late` or an error of the system.
pub type NoWay = Box<dyn Error + Send + Sync>;

/// There was no connection in time.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("no connection within {} ms", .0.as_millis())]
pub struct Late(pub Duration);

/// Makes connections to receivers. Cheap to clone.
#[derive(Clone)]
pub struct Connector {
    names: Names,
    guard: Guard,
    within: Duration,
}

impl Connector {
    /// `within`: how long a connection may take, its look-up included.
    pub fn new(names: Names, guard: Guard, within: Duration) -> Self {
        Self { names, guard, within }
    }

    /// Of `host:port`.
    pub async fn connect_to(&self, endpoint: &str) -> Result<TcpStream, NoWay> {
        let (host, port) = host_and_port(endpoint)?;
        self.connect(host, port).await
    }

    /// The addresses of `host:port` that may be reached; at least one.
    pub async fn addresses_of(&self, endpoint: &str) -> Result<Vec<SocketAddr>, NoWay> {
        let (host, port) = host_and_port(endpoint)?;
        self.addresses(host, port).await
    }

    async fn connect(&self, host: &str, port: u16) -> Result<TcpStream, NoWay> {
        let connect = async {
            let stream = connect_to_one_of(&self.addresses(host, port).await?).await?;
            // What is written leaves at once.
            let _ = stream.set_nodelay(true);
            Ok(stream)
        };
        timeout(self.within, connect).await.unwrap_or_else(|_| Err(Late(self.within).into()))
    }

    async fn addresses(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, NoWay> {
        let found = self.look_up(host).await?;
        let mut ours = Vec::new();
        for place in self.guard.untouchable_at(port) {
            match place {
                Place::ThisMachine => ours.push(Ours::ThisMachine),
                // Who cannot say where our own things are lets nobody near their port.
                Place::Host(host) => ours.extend(self.look_up(&host).await?.into_iter().map(Ours::At)),
            }
        }
        let (mut open, mut forbidden) = (Vec::new(), None);
        for ip in found {
            let address = SocketAddr::new(ip, port);
            match self.guard.judge(address, &ours) {
                Ok(()) => open.push(address),
                Err(error) => forbidden = Some(error),
            }
        }
        match forbidden {
            Some(error) if open.is_empty() => Err(error.into()),
            _ => Ok(open),
        }
    }

    /// At least one address.
    async fn look_up(&self, host: &str) -> Result<Vec<IpAddr>, NoWay> {
        let host = host.trim_start_matches('[').trim_end_matches(']');
        match host.parse() {
            Ok(ip) => Ok(vec![ip]),
            Err(_) => Ok(self.names.look_up(host).await?.to_vec()),
        }
    }
}

/// The first that answers. One that is silent does not keep the next from being tried, and is waited for all the same.
async fn connect_to_one_of(addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let (mut rest, mut connecting, mut failed) = (addresses.iter(), FuturesUnordered::new(), None);
    loop {
        match rest.next() {
            Some(address) => connecting.push(TcpStream::connect(*address)),
            None if connecting.is_empty() => return Err(failed.expect("there is one address at least")),
            None => {}
        }
        let next = if rest.len() == 0 { None } else { Some(NEXT_AFTER) };
        let answered = async {
            match next {
                Some(after) => timeout(after, connecting.next()).await.ok().flatten(),
                None => connecting.next().await,
            }
        };
        match answered.await {
            Some(Ok(stream)) => return Ok(stream),
            Some(Err(error)) => failed = Some(error),
            None => {}
        }
    }
}

fn host_and_port(endpoint: &str) -> Result<(&str, u16), NoWay> {
    let found = endpoint.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
    found.ok_or_else(|| no_address(endpoint))
}

fn no_address(text: &str) -> NoWay {
    io::Error::new(io::ErrorKind::InvalidInput, format!("'{text}' is not host:port")).into()
}

/// For hyper and tonic.
impl Service<Uri> for Connector {
    type Response = TokioIo<TcpStream>;
    type Error = NoWay;
    type Future = BoxFuture<'static, Result<Self::Response, NoWay>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), NoWay>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move {
            let host = uri.host().ok_or_else(|| no_address(&uri.to_string()))?;
            let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
            Ok(TokioIo::new(connector.connect(host, port).await?))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::super::guard::{Allowed, Forbidden, Untouchable};
    use super::*;

    const WITHIN: Duration = Duration::from_secs(20);

    /// One address is ours.
    struct OurNode(u16, Place);

    impl Untouchable for OurNode {
        fn at(&self, port: u16) -> Vec<Place> {
            if port == self.0 { vec![self.1.clone()] } else { Vec::new() }
        }
    }

    fn connector(names: Names, allowed: &[&str], ours: impl Untouchable) -> Connector {
        let allowed = allowed.iter().map(|text| text.parse::<Allowed>().unwrap()).collect();
        Connector::new(names, Guard::new(allowed, Arc::new(ours)), WITHIN)
    }

    #[tokio::test]
    async fn every_spelling_of_an_address_is_the_address() {
        let connector = connector(Names::new(), &[], ());
        for host in [
            "127.0.0.1",
            "2130706433",
            "0x7f000001",
            "0177.0.0.1",
            "127.1",
            "0",
            "localhost",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[fe80::1%lo]",
            "[fe80::1%1]",
            "169.254.169.254",
            "[0:0:0:0:0:ffff:a9fe:a9fe]",
        ] {
            let error = connector.connect_to(&format!("{host}:9")).await.unwrap_err();
            assert!(error.is::<Forbidden>(), "{host}: {error}");
        }
    }

    #[tokio::test]
    async fn an_address_that_does_not_answer_leaves_it_to_the_next() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        // Nobody listens at the first; of a network for documents, nobody answers at the second.
        for first in ["127.0.0.2", "192.0.2.1"] {
            let names = Names::asking(move |_| Ok(vec![first.parse().unwrap(), [127, 0, 0, 1].into()]));
            let connector = connector(names, &["127.0.0.0/8"], ());
            let begun = std::time::Instant::now();
            connector.connect_to(&format!("a.test:{port}")).await.unwrap();
            assert!(begun.elapsed() < WITHIN / 2, "{first}: {:?}", begun.elapsed());
        }
        let nobody = connector(Names::new(), &["127.0.0.0/8"], ());
        let error = nobody.connect_to(&format!("127.0.0.2:{port}")).await.unwrap_err();
        let refused = error.downcast_ref::<io::Error>().map(io::Error::kind);
        assert_eq!(refused, Some(io::ErrorKind::ConnectionRefused));
    }

    /// A name that changes its answer: whatever it says, what is connected to is what was judged.
    #[tokio::test]
    async fn a_name_that_changes_its_answer_is_judged_each_time_it_is_used() {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let names = Names::asking(move |_| {
            let first = count.fetch_add(1, Ordering::Relaxed) == 0;
            Ok(vec![if first { [192, 0, 2, 1].into() } else { [127, 0, 0, 1].into() }])
        });
        let connector = connector(names.clone(), &[], ());
        assert_eq!(connector.addresses_of("a.test:9").await.unwrap(), ["192.0.2.1:9".parse().unwrap()]);
        names.forget("a.test");
        let error = connector.addresses_of("a.test:9").await.unwrap_err();
        assert!(error.is::<Forbidden>(), "{error}");
        assert_eq!(asked.load(Ordering::Relaxed), 2, "each answer is used once");
    }

    #[tokio::test]
    async fn of_several_addresses_those_that_may_be_reached_are() {
        let names = Names::asking(|_| Ok(vec![[10, 0, 0, 1].into(), [192, 0, 2, 1].into()]));
        let connector = connector(names, &[], ());
        assert_eq!(connector.addresses_of("a.test:9").await.unwrap(), ["192.0.2.1:9".parse().unwrap()]);
    }

    #[tokio::test]
    async fn what_is_ours_is_not_reached_by_any_name() {
        let names = Names::asking(|host| match host {
            "node.test" | "alias.test" => Ok(vec![[10, 0, 0, 7].into()]),
            _ => Err(io::Error::other("no such name")),
        });
        let everything = ["0.0.0.0/0", "::/0"];
        let ours = OurNode(9975, Place::Host("node.test".into()));
        let guarded = connector(names.clone(), &everything, ours);
        for (endpoint, open) in [
            ("10.0.0.7:9975", false),
            ("alias.test:9975", false),
            ("[::ffff:10.0.0.7]:9975", false),
            ("10.0.0.7:9976", true),
            ("10.0.0.8:9975", true),
        ] {
            assert_eq!(guarded.addresses_of(endpoint).await.is_ok(), open, "{endpoint}");
        }
        let unknown = connector(names, &everything, OurNode(9975, Place::Host("gone.test".into())));
        unknown.addresses_of("10.0.0.8:9975").await.unwrap_err();
    }
}
