//! The flags of this room: where replicas are, and who decides it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::Placement;
use super::etcd::access::{AccessSettings, IdentityFiles, PasswordFrom};
use crate::flags::{WrongFlag, duration_ms, within, wrong};

const REPLICAS_DEFAULT: u16 = 3;
const REPLICAS_MAX: u16 = 9;
const NODES_MAX: u16 = 1_000;
const NODE_GRACE_MS: u64 = 5 * 60_000;

#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Placement")]
pub struct PlacementFlags {
    /// etcd of the cluster, which decides where replicas are. Without it and without --peers the node is alone
    #[arg(long, value_name = "URL,URL", env = "BOOMERANG_ETCD")]
    pub etcd: Option<String>,
    /// User of etcd; what it needs is to read and write the keys below /boomerang/
    #[arg(long, value_name = "NAME", env = "BOOMERANG_ETCD_USER")]
    pub etcd_user: Option<String>,
    /// File with the password of --etcd-user; its text can be given in BOOMERANG_ETCD_PASSWORD as well
    #[arg(long, value_name = "FILE", env = "BOOMERANG_ETCD_PASSWORD_FILE")]
    pub etcd_password_file: Option<PathBuf>,
    /// Not in --help: whoever is on the machine can read arguments.
    #[arg(long, value_name = "TEXT", env = "BOOMERANG_ETCD_PASSWORD", hide = true)]
    pub etcd_password: Option<String>,
    /// Who signs the certificates of etcd, PEM [default: whom this machine trusts]
    #[arg(long, value_name = "FILE", env = "BOOMERANG_ETCD_CA")]
    pub etcd_ca: Option<PathBuf>,
    /// Certificate to show to etcd, PEM
    #[arg(long, value_name = "FILE", env = "BOOMERANG_ETCD_CERT")]
    pub etcd_cert: Option<PathBuf>,
    /// Key of --etcd-cert, PEM
    #[arg(long, value_name = "FILE", env = "BOOMERANG_ETCD_KEY")]
    pub etcd_key: Option<PathBuf>,
    /// All nodes of a cluster without etcd, this one included, as number=host:port of their --peer-addr. The list is
    /// the same on every node and never changes but for the addresses
    #[arg(long, value_name = "N=ADDR,N=ADDR", env = "BOOMERANG_PEERS")]
    pub peers: Option<String>,
    /// Copies of each shard [default: 3, or as many as there are nodes]
    #[arg(long, value_name = "N", env = "BOOMERANG_REPLICAS")]
    pub replicas: Option<u16>,
    /// Nodes that a new cluster waits for before it makes its shards [default: --replicas]
    #[arg(long, value_name = "N", env = "BOOMERANG_BOOTSTRAP_EXPECT")]
    pub bootstrap_expect: Option<u16>,
    /// What fails together with this node: replicas are spread over zones
    #[arg(long, value_name = "NAME", env = "BOOMERANG_ZONE")]
    pub zone: Option<String>,
    /// A node that is away for longer is replaced [default: 5m]
    #[arg(long, value_name = "DURATION", env = "BOOMERANG_NODE_GRACE")]
    pub node_grace: Option<String>,
}

impl PlacementFlags {
    /// For the node `node_id`.
    pub fn check(&self, node_id: u64) -> Result<Placement, WrongFlag> {
        let replicas = within("--replicas", self.replicas.unwrap_or(REPLICAS_DEFAULT), 1, REPLICAS_MAX)?;
        match (self.etcd.as_deref(), self.peers.as_deref()) {
            (Some(_), Some(_)) => Err(wrong("--peers", "cannot be given together with --etcd")),
            (None, None) => Ok(Placement::Alone),
            (None, Some(text)) => Ok(Placement::Static { peers: peers(text, node_id)?, replicas }),
            (Some(text), None) => {
                let grace = duration_ms("--node-grace", self.node_grace.as_deref())?;
                let grace = within("--node-grace", grace.unwrap_or(NODE_GRACE_MS), 1_000, 30 * 24 * 3_600_000)?;
                let expected = self.bootstrap_expect.unwrap_or(replicas);
                let endpoints = endpoints(text)?;
                Ok(Placement::Etcd {
                    access: self.etcd_access(&endpoints)?,
                    endpoints,
                    replicas,
                    bootstrap_expect: within("--bootstrap-expect", expected, 1, NODES_MAX)?,
                    node_grace: Duration::from_millis(grace),
                })
            }
        }
    }
}

impl PlacementFlags {
    fn etcd_access(&self, endpoints: &[String]) -> Result<AccessSettings, WrongFlag> {
        let text = self.etcd_password.clone().filter(|text| !text.is_empty());
        let password = match (&self.etcd_password_file, text) {
            (Some(_), Some(_)) => {
                return Err(wrong("--etcd-password-file", "cannot be given together with BOOMERANG_ETCD_PASSWORD"));
            }
            (Some(file), None) => Some(PasswordFrom::File(file.clone())),
            (None, text) => text.map(PasswordFrom::Text),
        };
        let user = match (self.etcd_user.clone(), password) {
            (Some(name), Some(password)) => Some((name, password)),
            (None, None) => None,
            _ => return Err(wrong("--etcd-user, --etcd-password-file", "are needed together, or none of them")),
        };
        let identity = match (self.etcd_cert.clone(), self.etcd_key.clone()) {
            (Some(cert), Some(key)) => Some(IdentityFiles { cert, key }),
            (None, None) => None,
            _ => return Err(wrong("--etcd-cert, --etcd-key", "are needed together, or none of them")),
        };
        let tls = endpoints.iter().any(|url| url.starts_with("https://"));
        if !tls && (self.etcd_ca.is_some() || identity.is_some()) {
            return Err(wrong("--etcd-ca, --etcd-cert, --etcd-key", "are for an --etcd of https:// URLs"));
        }
        Ok(AccessSettings { user, tls, ca: self.etcd_ca.clone(), identity })
    }
}

/// `1=host:port,2=host:port`
fn peers(text: &str, node_id: u64) -> Result<BTreeMap<u64, String>, WrongFlag> {
    let mut peers = BTreeMap::new();
    for peer in text.split(',').map(str::trim).filter(|peer| !peer.is_empty()) {
        let found = peer.split_once('=').and_then(|(number, at)| Some((number.trim().parse::<u64>().ok()?, at.trim())));
        let (number, at) = found.ok_or_else(|| wrong("--peers", format!("'{peer}' is not number=host:port")))?;
        let port = at.rsplit_once(':').and_then(|(host, port)| (!host.is_empty()).then(|| port.parse::<u16>().ok())?);
        if port.is_none_or(|port| port == 0) {
            return Err(wrong("--peers", format!("'{at}' is not host:port")));
        }
        if peers.insert(number, at.to_owned()).is_some() {
            return Err(wrong("--peers", format!("node {number} is named twice")));
        }
    }
    if !peers.contains_key(&node_id) {
        return Err(wrong("--peers", format!("this node, {node_id}, is not among them")));
    }
    Ok(peers)
}

fn endpoints(text: &str) -> Result<Vec<String>, WrongFlag> {
    let endpoints: Vec<String> =
        text.split(',').map(str::trim).filter(|url| !url.is_empty()).map(str::to_owned).collect();
    if endpoints.is_empty() {
        return Err(wrong("--etcd", "names no URL"));
    }
    match endpoints.iter().find(|url| !url.starts_with("http://") && !url.starts_with("https://")) {
        Some(url) => Err(wrong("--etcd", format!("'{url}' is not a URL, for example http://127.0.0.1:2379"))),
        None => Ok(endpoints),
    }
}
