//! TLS between nodes: each shows a certificate, and takes nobody whose certificate the common authority has not signed.

use std::path::Path;

use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

#[derive(Debug, thiserror::Error)]
#[error("{flag}: cannot read {path}: {source}")]
pub struct PeerTlsError {
    flag: &'static str,
    path: String,
    source: std::io::Error,
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
            std::fs::read(path).map_err(|source| PeerTlsError { flag, path: path.display().to_string(), source })
        };
        Ok(Self {
            identity: Identity::from_pem(read("--peer-cert", cert)?, read("--peer-key", key)?),
            authority: Certificate::from_pem(read("--peer-ca", authority)?),
        })
    }

    pub fn from_pem(cert: &str, key: &str, authority: &str) -> Self {
        Self { identity: Identity::from_pem(cert, key), authority: Certificate::from_pem(authority) }
    }

    /// The other side must be the host it was called as.
    pub(super) fn client(&self) -> ClientTlsConfig {
        ClientTlsConfig::new().ca_certificate(self.authority.clone()).identity(self.identity.clone())
    }

    pub(super) fn server(&self) -> ServerTlsConfig {
        ServerTlsConfig::new().identity(self.identity.clone()).client_ca_root(self.authority.clone())
    }
}
