//! Whose certificates are believed: those the system trusts (`SSL_CERT_FILE` and `SSL_CERT_DIR` name others), read when
//! the first connection with TLS is made.

use std::sync::{Arc, OnceLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::{CryptoProvider, ring};
use rustls::{ClientConfig, RootCertStore};

#[derive(Clone, Default)]
pub struct Trust {
    roots: Arc<OnceLock<Arc<RootCertStore>>>,
}

impl Trust {
    #[cfg(test)]
    pub fn only(roots: RootCertStore) -> Self {
        Self { roots: Arc::new(OnceLock::from(Arc::new(roots))) }
    }

    /// For connections that have no TLS, and are made by somebody who asks for it all the same.
    pub fn nobody() -> Self {
        Self { roots: Arc::new(OnceLock::from(Arc::new(RootCertStore::empty()))) }
    }

    fn roots(&self) -> Arc<RootCertStore> {
        self.roots.get_or_init(|| Arc::new(of_system())).clone()
    }

    /// For HTTP.
    pub fn https(&self) -> ClientConfig {
        config(self.roots())
    }

    /// For gRPC. An error when nobody is trusted.
    pub fn verifier(&self) -> Result<Arc<dyn ServerCertVerifier>, rustls::client::VerifierBuilderError> {
        Ok(WebPkiServerVerifier::builder_with_provider(self.roots(), provider()).build()?)
    }
}

fn config(roots: Arc<RootCertStore>) -> ClientConfig {
    ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("ring has what they need")
        .with_root_certificates(roots)
        .with_no_client_auth()
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn of_system() -> RootCertStore {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!(%error, "a trusted certificate of this system cannot be read");
    }
    let mut roots = RootCertStore::empty();
    let (_, ignored) = roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        tracing::warn!(ignored, "this system trusts no certificates: no callback over TLS can be delivered");
    }
    roots
}
