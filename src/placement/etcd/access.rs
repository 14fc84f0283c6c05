//! As whom nodes speak to etcd, and whom they take for it: a user and a password, a client's certificate, an authority.

use std::fmt;
use std::path::{Path, PathBuf};

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};

/// What is given about it.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct AccessSettings {
    pub user: Option<(String, PasswordFrom)>,
    /// Any of its URLs is `https://`.
    pub tls: bool,
    /// Instead of those that this machine trusts.
    pub ca: Option<PathBuf>,
    pub identity: Option<IdentityFiles>,
}

#[derive(Clone, PartialEq, Eq)]
pub enum PasswordFrom {
    File(PathBuf),
    Text(String),
}

/// PEM files of a client's certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityFiles {
    pub cert: PathBuf,
    pub key: PathBuf,
}

impl fmt::Debug for AccessSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = self.user.as_ref().map(|(name, _)| name);
        f.debug_struct("AccessSettings").field("user", &user).field("tls", &self.tls).finish_non_exhaustive()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    #[error("{flag}: cannot read {}: {source}", path.display())]
    File { flag: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{flag}: {}: {why}", path.display())]
    Unusable { flag: &'static str, path: PathBuf, why: String },
}

/// The same, read.
#[derive(Clone, Default)]
pub struct Access {
    user: Option<(String, String)>,
    tls: Option<TlsOptions>,
}

impl Access {
    pub fn read(settings: &AccessSettings) -> Result<Self, AccessError> {
        let user = match &settings.user {
            None => None,
            Some((name, PasswordFrom::Text(text))) => Some((name.clone(), text.clone())),
            Some((name, PasswordFrom::File(path))) => {
                let text = String::from_utf8(read("--etcd-password-file", path)?);
                let text = text.map_err(|error| unusable("--etcd-password-file", path, error))?;
                Some((name.clone(), text.trim_end_matches(['\r', '\n']).to_owned()))
            }
        };
        if !settings.tls {
            if user.is_some() {
                tracing::warn!("the password of --etcd-user goes to etcd in clear: its URLs are http://");
            }
            return Ok(Self { user, tls: None });
        }
        let mut tls = match &settings.ca {
            None => TlsOptions::new().with_native_roots(),
            Some(path) => TlsOptions::new().ca_certificate(Certificate::from_pem(pem("--etcd-ca", path)?)),
        };
        if let Some(IdentityFiles { cert, key }) = &settings.identity {
            tls = tls.identity(Identity::from_pem(pem("--etcd-cert", cert)?, pem("--etcd-key", key)?));
        }
        Ok(Self { user, tls: Some(tls) })
    }

    pub fn add_to(&self, mut options: ConnectOptions) -> ConnectOptions {
        if let Some((name, password)) = &self.user {
            // A token that has run out is asked for anew.
            options = options.with_user(name, password).with_auto_token_refresh(true);
        }
        match &self.tls {
            Some(tls) => options.with_tls(tls.clone()),
            None => options,
        }
    }
}

fn read(flag: &'static str, path: &Path) -> Result<Vec<u8>, AccessError> {
    std::fs::read(path).map_err(|source| AccessError::File { flag, path: path.to_owned(), source })
}

fn unusable(flag: &'static str, path: &Path, why: impl fmt::Display) -> AccessError {
    AccessError::Unusable { flag, path: path.to_owned(), why: why.to_string() }
}

/// A file of this kind, told now, and not whenever etcd is called.
fn pem(flag: &'static str, path: &Path) -> Result<Vec<u8>, AccessError> {
    let text = read(flag, path)?;
    if !text.windows(11).any(|part| part == b"-----BEGIN ") {
        return Err(unusable(flag, path, "holds nothing in PEM"));
    }
    Ok(text)
}
