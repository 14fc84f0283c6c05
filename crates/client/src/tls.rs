//! TLS to the nodes of a cluster.

use std::fmt;
use std::io;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Whose certificates nodes must show. Cheap to clone.
#[derive(Clone)]
pub struct Tls {
    connector: TlsConnector,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

/// What is given for TLS cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{what}: {why}")]
pub struct TlsError {
    what: &'static str,
    why: String,
}

fn wrong(what: &'static str, why: impl fmt::Display) -> TlsError {
    TlsError { what, why: why.to_string() }
}

impl Tls {
    /// Nodes show certificates that one of these has signed, in PEM.
    pub fn trusting(authorities: &[u8]) -> Result<Self, TlsError> {
        Self::with(only(authorities)?, None)
    }

    /// Nodes show certificates that somebody has signed whom this machine trusts.
    pub fn trusting_the_system() -> Result<Self, TlsError> {
        Self::with(of_system()?, None)
    }

    /// The same, and this client shows a certificate itself: a chain and its key, in PEM. `authorities`: `None` is whom this
    /// machine trusts.
    pub fn showing(authorities: Option<&[u8]>, chain: &[u8], key: &[u8]) -> Result<Self, TlsError> {
        let roots = authorities.map_or_else(of_system, only)?;
        let chain = certificates("certificate", chain)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| wrong("key", error))?;
        Self::with(roots, Some((chain, key)))
    }

    fn with(
        roots: RootCertStore,
        identity: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
    ) -> Result<Self, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let nodes = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| wrong("TLS", error))?
            .with_webpki_verifier(nodes.map_err(|error| wrong("authorities", error))?);
        let config = match identity {
            None => builder.with_no_client_auth(),
            Some((chain, key)) => {
                builder.with_client_auth_cert(chain, key).map_err(|error| wrong("certificate", error))?
            }
        };
        Ok(Self { connector: Arc::new(config).into() })
    }

    /// `address`: `host:port`; the node must be that host.
    pub(crate) async fn connect(&self, address: &str, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(host).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        self.connector.connect(name, stream).await
    }
}

fn certificates(what: &'static str, text: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found = CertificateDer::pem_slice_iter(text).collect::<Result<Vec<_>, _>>();
    let found = found.map_err(|error| wrong(what, error))?;
    if found.is_empty() { Err(wrong(what, "holds no certificate in PEM")) } else { Ok(found) }
}

fn only(authorities: &[u8]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("authorities", authorities)? {
        roots.add(certificate).map_err(|error| wrong("authorities", error))?;
    }
    Ok(roots)
}

fn of_system() -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() { Err(wrong("authorities", "this machine trusts nobody")) } else { Ok(roots) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_certificate_is_named() {
        let error = Tls::trusting(b"nonsense").unwrap_err().to_string();
        assert_eq!(error, "authorities: holds no certificate in PEM");
        let error = Tls::showing(Some(b""), b"", b"").unwrap_err().to_string();
        assert!(error.starts_with("authorities: "), "{error}");
    }
}
