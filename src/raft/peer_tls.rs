//! TLS between nodes: each shows a certificate, and takes nobody whose certificate the common authority has not signed.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io;
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::dial::Wire;
use super::flags::PeerTlsFiles;

#[derive(Debug, thiserror::Error)]
pub enum PeerTlsError {
    #[error("{flag}: cannot read {path}: {source}")]
    File { flag: &'static str, path: String, source: std::io::Error },
    #[error("{flag}: {path}: {why}")]
    Unusable { flag: &'static str, path: String, why: String },
}

/// Both sides of it; cheap to clone.
#[derive(Clone)]
pub struct PeerTls {
    acceptor: TlsAcceptor,
    connector: TlsConnector,
}

impl PeerTls {
    /// From PEM files; the errors name the flags they were given with.
    pub fn read(files: &PeerTlsFiles) -> Result<Self, PeerTlsError> {
        let chain = certificates("--peer-cert", &files.cert)?;
        let (flag, path) = ("--peer-key", &files.key);
        let key = PrivateKeyDer::from_pem_slice(&read(flag, path)?).map_err(|error| unusable(flag, path, error))?;
        let (flag, path) = ("--peer-ca", &files.ca);
        let mut roots = RootCertStore::empty();
        for authority in certificates(flag, path)? {
            roots.add(authority).map_err(|error| unusable(flag, path, error))?;
        }
        let (roots, provider) = (Arc::new(roots), Arc::new(ring::default_provider()));
        Self::with(chain, key, roots, provider).map_err(|error| unusable("--peer-cert", &files.cert, error))
    }

    fn with(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        roots: Arc<RootCertStore>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let nodes = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build()?;
        // What the others will say of it, said at once.
        let (own, between) = chain.split_first().ok_or("holds no certificate")?;
        nodes.verify_client_cert(own, between, UnixTime::now())?;
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(nodes)
            .with_single_cert(chain.clone(), key.clone_key())?;
        let nodes = WebPkiServerVerifier::builder_with_provider(roots, provider.clone()).build()?;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_webpki_verifier(nodes)
            .with_client_auth_cert(chain, key)?;
        server.alpn_protocols = vec![b"h2".to_vec()];
        client.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Self { acceptor: Arc::new(server).into(), connector: Arc::new(client).into() })
    }

    /// Whoever has called has shown a certificate when this returns.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<Wire> {
        Ok(Wire::new(self.acceptor.accept(stream).await?))
    }

    /// The other side must be the host it was called as.
    pub async fn call(&self, stream: TcpStream, host: &str) -> io::Result<Wire> {
        let name = ServerName::try_from(host.to_owned());
        let name = name.map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, format!("'{host}': {error}")))?;
        Ok(Wire::new(self.connector.connect(name, stream).await?))
    }
}

fn read(flag: &'static str, path: &Path) -> Result<Vec<u8>, PeerTlsError> {
    fs::read(path).map_err(|source| PeerTlsError::File { flag, path: path.display().to_string(), source })
}

fn unusable(flag: &'static str, path: &Path, why: impl std::fmt::Display) -> PeerTlsError {
    PeerTlsError::Unusable { flag, path: path.display().to_string(), why: why.to_string() }
}

fn certificates(flag: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, PeerTlsError> {
    let text = read(flag, path)?;
    let found = CertificateDer::pem_slice_iter(&text).collect::<Result<Vec<_>, _>>();
    let found = found.map_err(|error| unusable(flag, path, error))?;
    if found.is_empty() {
        return Err(unusable(flag, path, "holds no certificate in PEM"));
    }
    Ok(found)
}

/// An error with what it came from, which is where TLS says what it does not like.
pub(super) fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}
