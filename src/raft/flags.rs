//! The flags of this room: by what nodes know each other.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use crate::flags::{WrongFlag, wrong};

#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Between nodes")]
pub struct PeerFlags {
    /// Certificate of this node, PEM: nodes speak TLS and know each other by certificates of --peer-ca. 'boomerang certs'
    /// makes all three files
    #[arg(long, value_name = "FILE", env = "BOOMERANG_PEER_CERT")]
    pub peer_cert: Option<PathBuf>,
    /// Key of --peer-cert, PEM
    #[arg(long, value_name = "FILE", env = "BOOMERANG_PEER_KEY")]
    pub peer_key: Option<PathBuf>,
    /// Who signs the certificates of all nodes, PEM. Whoever has a certificate of theirs is a node of the cluster
    #[arg(long, value_name = "FILE", env = "BOOMERANG_PEER_CA")]
    pub peer_ca: Option<PathBuf>,
    /// File with a secret that all nodes know, instead of certificates, for nodes on loopback only; its text can be
    /// given in BOOMERANG_CLUSTER_SECRET as well. With certificates besides, both are taken, so that a cluster can go
    /// from one to the other
    #[arg(long, value_name = "FILE", env = "BOOMERANG_CLUSTER_SECRET_FILE")]
    pub cluster_secret_file: Option<PathBuf>,
    /// Not in --help: whoever is on the machine can read arguments.
    #[arg(long, value_name = "TEXT", env = "BOOMERANG_CLUSTER_SECRET", hide = true)]
    pub cluster_secret: Option<String>,
}

/// PEM files.
#[derive(Debug, Clone)]
pub struct PeerTlsFiles {
    pub cert: PathBuf,
    pub key: PathBuf,
    pub ca: PathBuf,
}

/// Where the secret of the cluster is.
#[derive(Clone)]
pub enum SecretFrom {
    File(PathBuf),
    Text(String),
}

impl fmt::Debug for SecretFrom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretFrom")
    }
}

/// By what nodes know each other: one of them at least, unless the node is alone.
#[derive(Debug, Clone, Default)]
pub struct PeerSettings {
    pub tls: Option<PeerTlsFiles>,
    pub secret: Option<SecretFrom>,
}

impl PeerFlags {
    /// `hosts`: where this node and the others are, as far as they are told. `None` for a node that is alone.
    pub fn check<'a>(self, hosts: Option<impl IntoIterator<Item = &'a str>>) -> Result<PeerSettings, WrongFlag> {
        let tls = match (self.peer_cert, self.peer_key, self.peer_ca) {
            (Some(cert), Some(key), Some(ca)) => Some(PeerTlsFiles { cert, key, ca }),
            (None, None, None) => None,
            _ => return Err(wrong("--peer-cert, --peer-key, --peer-ca", "are needed together, or none of them")),
        };
        let secret = match (self.cluster_secret_file, self.cluster_secret.filter(|text| !text.is_empty())) {
            (Some(_), Some(_)) => {
                return Err(wrong("--cluster-secret-file", "cannot be given together with BOOMERANG_CLUSTER_SECRET"));
            }
            (Some(file), None) => Some(SecretFrom::File(file)),
            (None, text) => text.map(SecretFrom::Text),
        };
        let settings = PeerSettings { tls, secret };
        let Some(hosts) = hosts else { return Ok(settings) };
        if settings.tls.is_none() && settings.secret.is_none() {
            let why = "are needed in a cluster: whoever reaches the peer port would be an administrator. 'boomerang certs' \
                       makes them; on loopback --cluster-secret-file will do";
            return Err(wrong("--peer-cert, --peer-key, --peer-ca", why));
        }
        if settings.secret.is_some()
            && let Some(host) = hosts.into_iter().find(|host| !is_loopback(host))
        {
            let why =
                format!("is for nodes on loopback only, where nobody listens in, and '{host}' is not; use --peer-cert");
            return Err(wrong("--cluster-secret-file", why));
        }
        Ok(settings)
    }
}

fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}
