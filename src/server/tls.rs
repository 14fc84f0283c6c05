//! TLS for clients, on the listeners over TCP and HTTP alike.
//!
//! Certificates are read again when their files change, and at SIGHUP, without a connection being lost: whoever comes
//! from then on sees the new ones. A pair that cannot be used leaves the old one, and the log says so.
//!
//! The first byte of a connection says whether it is TLS: no frame of ours and no request of HTTP begins with it. So one
//! listener can take both, for as long as it takes clients to change over.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// How often the files are looked at. What replaces them may do so in several steps.
const LOOK_EVERY: Duration = Duration::from_secs(5);
const TLS_HANDSHAKE: u8 = 0x16;

/// PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// What a listener for clients takes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsSettings {
    pub files: Option<TlsFiles>,
    /// Also without TLS.
    pub plaintext: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{flag}: cannot read {}: {source}", path.display())]
    File { flag: &'static str, path: PathBuf, source: io::Error },
    #[error("{flag}: {}: {why}", path.display())]
    Unusable { flag: &'static str, path: PathBuf, why: String },
}

/// Which protocol is spoken in it, when client and server agree on that by TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inside {
    Frames,
    Http,
}

/// Takes connections in. Cheap to clone.
#[derive(Clone)]
pub struct Tls {
    configs: Option<watch::Receiver<Arc<Configs>>>,
    plaintext: bool,
}

struct Configs {
    frames: Arc<ServerConfig>,
    http: Arc<ServerConfig>,
}

/// Reads the files again, until it is dropped.
pub struct Renewal {
    files: TlsFiles,
    seen: [u8; 32],
    configs: watch::Sender<Arc<Configs>>,
}

impl Tls {
    /// With what keeps its certificates as the files are, when there are any.
    pub fn read(settings: &TlsSettings) -> Result<(Self, Option<Renewal>), TlsError> {
        let Some(files) = &settings.files else { return Ok((Self { configs: None, plaintext: true }, None)) };
        let (configs, seen) = configs(files)?;
        let (sender, receiver) = watch::channel(Arc::new(configs));
        let tls = Self { configs: Some(receiver), plaintext: settings.plaintext };
        Ok((tls, Some(Renewal { files: files.clone(), seen, configs: sender })))
    }

    /// Whoever has called sends nothing yet that is not encrypted, unless that is allowed.
    pub async fn accept(&self, stream: TcpStream, inside: Inside) -> io::Result<Stream> {
        let Some(configs) = &self.configs else { return Ok(Stream::Plain(stream)) };
        let mut first = [0];
        if stream.peek(&mut first).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if first[0] != TLS_HANDSHAKE {
            return match self.plaintext {
                true => Ok(Stream::Plain(stream)),
                false => Err(io::Error::new(io::ErrorKind::PermissionDenied, "it does not speak TLS")),
            };
        }
        let configs = configs.borrow().clone();
        let config = match inside {
            Inside::Frames => &configs.frames,
            Inside::Http => &configs.http,
        };
        Ok(Stream::Tls(Box::new(TlsAcceptor::from(config.clone()).accept(stream).await?)))
    }
}

impl Renewal {
    pub async fn run(mut self) {
        let mut hangups = signal(SignalKind::hangup()).expect("signals can be handled");
        let mut looks = tokio::time::interval(LOOK_EVERY);
        let mut told = None;
        loop {
            let asked = tokio::select! {
                _ = looks.tick() => false,
                _ = hangups.recv() => true,
            };
            let files = self.files.clone();
            let read = tokio::task::spawn_blocking(move || configs(&files));
            match read.await.expect("reading certificates does not panic") {
                Ok((_, seen)) if seen == self.seen && !asked => {}
                Ok((configs, seen)) => {
                    self.seen = seen;
                    self.configs.send_replace(Arc::new(configs));
                    tracing::info!(cert = %self.files.cert.display(), "certificates were read again");
                }
                // Half of a pair may be there: the next look finds the rest.
                Err(error) => {
                    let text = error.to_string();
                    if asked || told.as_ref() != Some(&text) {
                        tracing::warn!(%error, "the certificates stay as they were");
                        told = Some(text);
                    }
                }
            }
        }
    }
}

/// And a digest of both files.
fn configs(files: &TlsFiles) -> Result<(Configs, [u8; 32]), TlsError> {
    let cert_text = read("--tls-cert", &files.cert)?;
    let key_text = read("--tls-key", &files.key)?;
    let unusable = |flag, path: &Path, why: String| TlsError::Unusable { flag, path: path.to_owned(), why };
    let chain = CertificateDer::pem_slice_iter(&cert_text).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(|error| unusable("--tls-cert", &files.cert, error.to_string()))?;
    if chain.is_empty() {
        return Err(unusable("--tls-cert", &files.cert, "holds no certificate in PEM".into()));
    }
    let key = PrivateKeyDer::from_pem_slice(&key_text);
    let key = key.map_err(|error| unusable("--tls-key", &files.key, error.to_string()))?;
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring has what they need")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| unusable("--tls-cert", &files.cert, error.to_string()))?;
    let mut http = config.clone();
    http.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let seen = Sha256::new().chain_update(&cert_text).chain_update([0]).chain_update(&key_text).finalize().into();
    Ok((Configs { frames: Arc::new(config), http: Arc::new(http) }, seen))
}

fn read(flag: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::File { flag, path: path.to_owned(), source })
}

/// A connection of a client.
pub enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    pub fn is_encrypted(&self) -> bool {
        matches!(self, Stream::Tls(_))
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_read(context, buf),
            Stream::Tls(stream) => Pin::new(&mut **stream).poll_read(context, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Tls(stream) => Pin::new(&mut **stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_write_vectored(context, parts),
            Stream::Tls(stream) => Pin::new(&mut **stream).poll_write_vectored(context, parts),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Stream::Plain(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(context),
            Stream::Tls(stream) => Pin::new(&mut **stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Tls(stream) => Pin::new(&mut **stream).poll_shutdown(context),
        }
    }
}
