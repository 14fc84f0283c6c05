//! The one way to a receiver: from a host to its addresses, past the [guard](super::guard), to a connection.
//!
//! What is judged is what is connected to: a name is looked up once for both.

use std::collections::HashMap;
use std::error::Error;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::{BoxFuture, join_all};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::codegen::Service;
use tonic::codegen::http::Uri;

use super::guard::{Guard, OurAddress, Place};
use super::names::Names;
use crate::dialing::connect_to_one_of;
use crate::task::locks::Mutex;

/// How long a name of ours may take to be looked up before what it meant last is used.
const OURS_WITHIN: Duration = Duration::from_millis(500);

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
    ours: OurNames,
    guard: Guard,
    within: Duration,
}

impl Connector {
    /// `within`: how long a connection may take, its look-up included.
    pub fn new(names: Names, guard: Guard, within: Duration) -> Self {
        let ours = OurNames { names: names.apart(), last: Arc::default() };
        Self { names, ours, guard, within }
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
        let connect = async { Ok(connect_to_one_of(&self.addresses(host, port).await?).await?) };
        timeout(self.within, connect).await.unwrap_or_else(|_| Err(Late(self.within).into()))
    }

    async fn addresses(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, NoWay> {
        let found = self.look_up(host).await?;
        let places = self.guard.untouchable_at(port);
        let ours = join_all(places.into_iter().map(|place| self.ours.addresses(place))).await.concat();
        let (mut open, mut forbidden) = (Vec::new(), None);
        for ip in found {
            let address = SocketAddr::new(ip, port);
            match self.guard.judge(address, &ours) {
                Ok(()) => open.push(address),
                Err(error) => {
                    tracing::debug!(host, %address, %error, "a callback is not made");
                    forbidden = Some(error);
                }
            }
        }
        match forbidden {
            Some(error) if open.is_empty() => Err(error.into()),
            _ => Ok(open),
        }
    }

    /// At least one address.
    async fn look_up(&self, host: &str) -> Result<Vec<IpAddr>, NoWay> {
        let host = bare(host);
        match host.parse() {
            Ok(ip) => Ok(vec![ip]),
            Err(_) => Ok(self.names.look_up(host).await?.to_vec()),
        }
    }
}

/// Where our own things are. Looked up apart from what clients name, and remembered: nobody is kept from a receiver
/// because a name of ours cannot be looked up now.
#[derive(Clone)]
struct OurNames {
    names: Names,
    last: Arc<Mutex<HashMap<String, Vec<IpAddr>>>>,
}

impl OurNames {
    async fn addresses(&self, place: Place) -> Vec<OurAddress> {
        let host = match place {
            Place::ThisMachine => return vec![OurAddress::ThisMachine],
            Place::Host(host) => host,
        };
        let host = bare(&host);
        if let Ok(ip) = host.parse() {
            return vec![OurAddress::At(ip)];
        }
        let known = match timeout(OURS_WITHIN, self.names.look_up(host)).await {
            Ok(Ok(found)) => {
                self.last.lock().insert(host.to_owned(), found.to_vec());
                Some(found.to_vec())
            }
            _ => self.last.lock().get(host).cloned(),
        };
        match known {
            Some(known) => known.into_iter().map(OurAddress::At).collect(),
            None => vec![OurAddress::Unknown],
        }
    }
}

fn bare(host: &str) -> &str {
    host.trim_start_matches('[').trim_end_matches(']')
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
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

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
        // A name that means nothing keeps callbacks from what may be ours, and from nothing else.
        let unknown = connector(names, &everything, OurNode(9975, Place::Host("gone.test".into())));
        unknown.addresses_of("10.0.0.8:9975").await.unwrap_err();
        assert!(unknown.addresses_of("192.0.2.1:9975").await.is_ok());
    }

    #[tokio::test]
    async fn what_a_name_of_ours_meant_last_is_remembered() {
        let gone = Arc::new(AtomicBool::new(false));
        let is_gone = gone.clone();
        let names = Names::asking(move |_| match is_gone.load(Ordering::Relaxed) {
            true => Err(io::Error::other("no such name")),
            false => Ok(vec![[10, 0, 0, 7].into()]),
        });
        let connector = connector(names, &["10.0.0.0/8"], OurNode(9975, Place::Host("node.test".into())));
        connector.addresses_of("10.0.0.7:9975").await.unwrap_err();
        gone.store(true, Ordering::Relaxed);
        connector.ours.names.forget("node.test");
        connector.addresses_of("10.0.0.7:9975").await.unwrap_err();
        assert!(connector.addresses_of("10.0.0.8:9975").await.is_ok());
    }
}
