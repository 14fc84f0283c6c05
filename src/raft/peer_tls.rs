//! TLS between nodes: each shows a certificate, and takes nobody whose certificate the common authority has not signed.

use std::path::Path;

use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity, Server, ServerTlsConfig};

#[derive(Debug, thiserror::Error)]
pub enum PeerTlsError {
    #[error("{flag}: cannot read {path}: {source}")]
    File { flag: &'static str, path: String, source: std::io::Error },
    #[error("--peer-cert, --peer-key, --peer-ca: not what they should be: {0}")]
    Unusable(String),
}

/// Both sides of it; cheap enough to clone.
#[derive(Debug, Clone)]
pub struct PeerTls {
    identity: Identity,
    authority: Certificate,
}

impl PeerTls {
    /// From PEM files; the errors name the flags they were given with.
    pub fn read(cert: &Path, key: &Path, authority: &Path) -> Result<Self, PeerTlsError> {
        let read = |flag, path: &Path| {
            std::fs::read(path).map_err(|source| PeerTlsError::File { flag, path: path.display().to_string(), source })
        };
        let tls = Self {
            identity: Identity::from_pem(read("--peer-cert", cert)?, read("--peer-key", key)?),
            authority: Certificate::from_pem(read("--peer-ca", authority)?),
        };
        // Found out now, and not when the first peer calls.
        let unusable = |error: tonic::transport::Error| PeerTlsError::Unusable(error_chain(&error));
        Server::builder().tls_config(tls.server()).map_err(unusable)?;
        Endpoint::from_static("https://localhost").tls_config(tls.client()).map_err(unusable)?;
        Ok(tls)
    }

    /// The other side must be the host it was called as.
    pub(super) fn client(&self) -> ClientTlsConfig {
        ClientTlsConfig::new().ca_certificate(self.authority.clone()).identity(self.identity.clone())
    }

    pub(super) fn server(&self) -> ServerTlsConfig {
        ServerTlsConfig::new().identity(self.identity.clone()).client_ca_root(self.authority.clone())
    }
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
