//! By what nodes know each other: nothing is read from a connection between nodes, and nothing sent on it, before both
//! ends have shown that they belong to the cluster.
//!
//! ```text
//!             +-- first byte of TLS ------> certificates: peer_tls --+
//!   connection|                                                      +--> Wire --> gRPC
//!             +-- of our own greeting ----> secret: peer_secret -----+
//! ```
//!
//! A node that has certificates and the secret takes both, and calls by TLS first. So a cluster goes from one to the
//! other, and back, node after node, without a stop.
//!
//! Strangers cost little: what has not shown who it is for a few seconds is hung up on, and when many do that at a time,
//! those that have had the longest go first.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use tokio::net::{TcpListener, TcpStream, lookup_host};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::dial::{Dial, Wire};
use super::flags::{PeerSettings, SecretFrom};
use super::peer_secret::{Called, ClusterSecret, SECRET_BYTES_MIN};
use super::peer_tls::{PeerTls, PeerTlsError, error_chain};
use crate::dialing::connect_to_one_of;
use crate::sabotage::Fault;
use crate::task::locks::Mutex;

/// Two ways there and back, and a signature, on a busy machine.
const SHOWN_WITHIN: Duration = Duration::from_secs(5);
/// Connections that have not shown yet who they are; each is a few kilobytes.
const STRANGERS_MAX: usize = 256;
/// Connections of known nodes that wait to be served.
const WIRES_AHEAD: usize = 16;
/// How often strangers are told of in the log.
const TOLD_EVERY: Duration = Duration::from_secs(10);
/// The first byte of TLS.
const TLS_HANDSHAKE: u8 = 0x16;
/// A connection that cannot be taken for lack of files is tried again so much later.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(50);

#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error(transparent)]
    Tls(#[from] PeerTlsError),
    #[error("--cluster-secret-file: cannot read {path}: {source}")]
    File { path: String, source: io::Error },
    #[error("--cluster-secret-file: others on this machine may read or write {0}: chmod 600 {0}")]
    Open(String),
    #[error("the secret of the cluster is shorter than {SECRET_BYTES_MIN} bytes; 'openssl rand -hex 32' makes one")]
    Short,
}

/// What a node shows, and what it asks for. Cheap to clone.
#[derive(Clone)]
pub struct PeerCredentials {
    cluster: String,
    node_id: u64,
    tls: Option<PeerTls>,
    secret: Option<ClusterSecret>,
}

impl PeerCredentials {
    /// Of the node `node_id`, from the files that its settings name.
    pub fn read(cluster: &str, node_id: u64, settings: &PeerSettings) -> Result<Self, CredentialsError> {
        let tls = settings.tls.as_ref().map(PeerTls::read).transpose()?;
        let secret = match &settings.secret {
            None => None,
            Some(SecretFrom::Text(text)) => Some(ClusterSecret::new(text).ok_or(CredentialsError::Short)?),
            Some(SecretFrom::File(path)) => Some(secret_in(path)?),
        };
        Ok(Self { cluster: cluster.to_owned(), node_id, tls, secret })
    }

    /// With nothing but a secret.
    pub fn secret(cluster: &str, node_id: u64, secret: ClusterSecret) -> Self {
        Self { cluster: cluster.to_owned(), node_id, tls: None, secret: Some(secret) }
    }

    /// Hangs up on whoever is no node of this cluster. `port` is the one that was called.
    async fn accept(&self, mut stream: TcpStream, port: u16) -> io::Result<Wire> {
        let mut first = [0];
        if stream.peek(&mut first).await? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        if Fault::TrustStrangers.is_on() && first[0] == b'P' {
            return Ok(Wire::new(stream));
        }
        match (&self.tls, &self.secret) {
            (Some(tls), _) if first[0] == TLS_HANDSHAKE => tls.accept(stream).await,
            (_, Some(secret)) => {
                only_on_loopback(&stream)?;
                secret.accept(&mut stream, self.called(self.node_id, port)).await?;
                Ok(Wire::new(stream))
            }
            _ => Err(io::Error::new(ErrorKind::PermissionDenied, "it does not speak TLS")),
        }
    }

    async fn call(&self, node_id: u64, address: &str) -> io::Result<Wire> {
        if let Some(tls) = &self.tls {
            let (host, _) = host_and_port(address)?;
            match tls.call(connect(address).await?, host).await {
                // As a node hangs up that has no certificate yet.
                Err(error) if self.secret.is_some() && is_hung_up(&error) => {}
                called => return called,
            }
        }
        let secret = self.secret.as_ref().expect("there are certificates or a secret");
        let mut stream = connect(address).await?;
        only_on_loopback(&stream)?;
        let (_, port) = host_and_port(address)?;
        secret.call(&mut stream, self.node_id, self.called(node_id, port)).await?;
        Ok(Wire::new(stream))
    }

    fn called(&self, node_id: u64, port: u16) -> Called<'_> {
        Called { cluster: &self.cluster, node_id, port }
    }
}

impl Dial for PeerCredentials {
    fn dial(&self, node_id: u64, address: &str) -> BoxFuture<'static, io::Result<Wire>> {
        let (credentials, address) = (self.clone(), address.to_owned());
        Box::pin(async move {
            credentials.call(node_id, &address).await.inspect_err(|error| {
                tracing::debug!(node_id, address, error = error_chain(error), "a node cannot be called");
            })
        })
    }
}

async fn connect(address: &str) -> io::Result<TcpStream> {
    let found: Vec<SocketAddr> = lookup_host(address).await?.collect();
    connect_to_one_of(&found).await
}

/// Elsewhere, whoever is on the way could take over a connection after both have proved what they know.
fn only_on_loopback(stream: &TcpStream) -> io::Result<()> {
    match stream.peer_addr()?.ip().to_canonical().is_loopback() {
        true => Ok(()),
        false => Err(io::Error::new(ErrorKind::PermissionDenied, "a secret is taken on loopback only")),
    }
}

fn host_and_port(address: &str) -> io::Result<(&str, u16)> {
    let found = address.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
    let (host, port) = found.ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "not host:port"))?;
    Ok((host.trim_start_matches('[').trim_end_matches(']'), port))
}

fn is_hung_up(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

fn secret_in(path: &std::path::Path) -> Result<ClusterSecret, CredentialsError> {
    use std::os::unix::fs::MetadataExt;
    let shown = path.display().to_string();
    let cannot = |source| CredentialsError::File { path: shown.clone(), source };
    if std::fs::metadata(path).map_err(cannot)?.mode() & 0o077 != 0 {
        return Err(CredentialsError::Open(shown));
    }
    ClusterSecret::new(&std::fs::read_to_string(path).map_err(cannot)?).ok_or(CredentialsError::Short)
}

/// The connections of nodes of this cluster that come to `listener`, until what is returned is dropped.
pub fn incoming(listener: TcpListener, credentials: PeerCredentials) -> mpsc::Receiver<Wire> {
    let (known, wires) = mpsc::channel(WIRES_AHEAD);
    tokio::spawn(take_in(listener, credentials, known));
    wires
}

async fn take_in(listener: TcpListener, credentials: PeerCredentials, known: mpsc::Sender<Wire>) {
    let told = Arc::new(Told::default());
    // In the order in which they came.
    let mut strangers: VecDeque<Stranger> = VecDeque::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = known.closed() => break,
        };
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection of a node cannot be taken");
                tokio::time::sleep(ACCEPT_AGAIN_AFTER).await;
                continue;
            }
        };
        strangers.retain(Stranger::is_one);
        if strangers.len() >= STRANGERS_MAX
            && let Some(oldest) = strangers.pop_front()
        {
            oldest.greeting.abort();
            told.tell(oldest.from, "it does not show who it is, and others need the room");
        }
        let (credentials, known, told) = (credentials.clone(), known.clone(), told.clone());
        let is_known = Arc::new(AtomicBool::new(false));
        let shown = is_known.clone();
        let greeting = tokio::spawn(async move {
            let greeted = async {
                stream.set_nodelay(true)?;
                let port = stream.local_addr()?.port();
                credentials.accept(stream, port).await
            };
            match timeout(SHOWN_WITHIN, greeted).await {
                Ok(Ok(wire)) => {
                    shown.store(true, Ordering::Relaxed);
                    let _ = known.send(wire).await;
                }
                Ok(Err(error)) => told.tell(from, &error_chain(&error)),
                Err(_) => told.tell(from, "it does not show who it is"),
            }
        });
        strangers.push_back(Stranger { from, greeting: greeting.abort_handle(), is_known });
    }
    strangers.iter().for_each(|stranger| stranger.greeting.abort());
}

/// A connection, until it has shown who it is.
struct Stranger {
    from: SocketAddr,
    greeting: AbortHandle,
    is_known: Arc<AtomicBool>,
}

impl Stranger {
    fn is_one(&self) -> bool {
        !self.greeting.is_finished() && !self.is_known.load(Ordering::Relaxed)
    }
}

/// What was said of strangers: seldom, however many there are.
#[derive(Default)]
struct Told {
    last: Mutex<(Option<Instant>, u64)>,
}

impl Told {
    fn tell(&self, from: SocketAddr, why: &str) {
        let mut last = self.last.lock();
        if last.0.is_some_and(|at| at.elapsed() < TOLD_EVERY) {
            last.1 += 1;
            return;
        }
        let others = std::mem::take(&mut last.1);
        last.0 = Some(Instant::now());
        tracing::warn!(%from, why, others, "a connection to the peer port is refused");
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn credentials(node_id: u64, secret: &str) -> PeerCredentials {
        PeerCredentials::secret("c", node_id, ClusterSecret::new(secret).unwrap())
    }

    async fn listen(credentials: PeerCredentials) -> (String, mpsc::Receiver<Wire>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        (address, incoming(listener, credentials))
    }

    const SECRET: &str = "a secret of many letters";

    #[tokio::test]
    async fn a_connection_of_a_node_is_passed_on_and_no_other() {
        let (address, mut wires) = listen(credentials(1, SECRET)).await;
        let mut wire = credentials(2, SECRET).dial(1, &address).await.unwrap();
        wire.write_all(b"hello").await.unwrap();
        let mut heard = [0; 5];
        wires.recv().await.unwrap().read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"hello");
        for stranger in [credentials(2, "another secret of many"), credentials(2, SECRET)] {
            // The second knows the secret, and takes this one for another node.
            assert!(stranger.dial(3, &address).await.is_err());
        }
        assert!(wires.try_recv().is_err(), "a stranger is let in");
    }

    /// However many say nothing, nodes get through.
    #[tokio::test]
    async fn those_who_say_nothing_do_not_keep_nodes_out() {
        let (address, mut wires) = listen(credentials(1, SECRET)).await;
        let mut silent = Vec::new();
        for _ in 0..STRANGERS_MAX + 1 {
            silent.push(TcpStream::connect(&address).await.unwrap());
        }
        credentials(2, SECRET).dial(1, &address).await.unwrap();
        wires.recv().await.unwrap();
        let mut nothing = Vec::new();
        // It ends, because the first makes room.
        silent[0].read_to_end(&mut nothing).await.unwrap_or_default();
        assert!(nothing.is_empty());
        drop(wires);
    }

    #[test]
    fn a_secret_in_a_file_is_for_its_owner_only() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        std::fs::write(&path, SECRET).unwrap();
        let set = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        set(0o640);
        assert!(matches!(secret_in(&path), Err(CredentialsError::Open(_))));
        set(0o600);
        assert!(secret_in(&path).is_ok(), "it can be read");
        std::fs::write(&path, "short\n").unwrap();
        assert!(matches!(secret_in(&path), Err(CredentialsError::Short)));
        assert!(matches!(secret_in(&folder.path().join("none")), Err(CredentialsError::File { .. })));
    }

    #[test]
    fn an_address_is_a_host_and_a_port() {
        assert_eq!(host_and_port("[::1]:9").unwrap(), ("::1", 9));
        assert_eq!(host_and_port("node-1.internal:9975").unwrap(), ("node-1.internal", 9975));
        assert!(host_and_port("node-1.internal").is_err());
    }
}
