//! `boomerang certs`: an authority for one cluster, and certificates of its nodes.
//!
//! The authority is made once and its key kept in the folder, so that nodes can be added later. Whoever has a certificate
//! of it is a node of the cluster: it is to sign nothing else.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use data_encoding::HEXLOWER;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};
use rustls::RootCertStore;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use sha2::{Digest, Sha256};

const AUTHORITY: &str = "ca";
const AUTHORITY_NAME: &str = "Boomerang cluster authority";
/// Of the digest of its key, in its name.
const NAME_BYTES: usize = 8;
/// Longer than anything it signs.
const AUTHORITY_DAYS: u32 = 20 * 365;
const DAYS_DEFAULT: u32 = 825;
const DAYS_MAX: u32 = 10 * 365;
const DAY: Duration = Duration::from_secs(24 * 3_600);
/// Clocks differ.
const VALID_BEFORE: Duration = Duration::from_secs(3_600);

/// What `boomerang certs` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub struct Asked {
    /// Folder of the authority and of all certificates; made if it is not there
    #[arg(long, value_name = "FOLDER")]
    pub out: PathBuf,
    /// A node: a name for its files, and the addresses that others reach it by, without ports; can be given many times
    #[arg(long, value_name = "NAME,ADDRESS...", required = true)]
    pub node: Vec<NodeName>,
    /// How long the certificates are valid; that of the authority is for twenty years
    #[arg(long, value_name = "DAYS", default_value_t = DAYS_DEFAULT, value_parser = clap::value_parser!(u32).range(1..=i64::from(DAYS_MAX)))]
    pub days: u32,
}

/// `node-1,10.0.0.1,node-1.internal`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeName {
    name: String,
    addresses: Vec<String>,
}

impl FromStr for NodeName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',').map(str::trim);
        let name = parts.next().unwrap_or_default().to_owned();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
            return Err(format!("'{name}' is no name of files: letters, digits, '-', '_' and '.'"));
        }
        if name == AUTHORITY {
            return Err(format!("'{name}' is what the files of the authority are called"));
        }
        let addresses: Vec<String> = parts.map(str::to_owned).collect();
        if addresses.is_empty() {
            return Err(format!("'{name}' needs an address, for example {name},127.0.0.1"));
        }
        let is_name = |text: &str| !text.is_empty() && !text.contains("..") && text.chars().all(plain);
        match addresses.iter().find(|address| address.parse::<IpAddr>().is_err() && !is_name(address)) {
            Some(address) => Err(format!("'{address}' is neither a host name nor an IP address without port")),
            None => Ok(Self { name, addresses }),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum CertsError {
    #[error("cannot {what} {}: {source}", path.display())]
    File { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is there already: delete it to have another made", .0.display())]
    There(PathBuf),
    #[error("--node: '{0}' is named twice: give all of its addresses at once, {0},ADDRESS,ADDRESS")]
    Twice(String),
    #[error("{} is missing, without which nothing can be signed by {AUTHORITY}.pem beside it", .0.display())]
    NoKey(PathBuf),
    #[error("{}: {why}", path.display())]
    Foreign { path: PathBuf, why: String },
    #[error("cannot make a certificate: {0}")]
    Making(#[from] rcgen::Error),
}

/// Makes what is asked for, or nothing of it; returns the files, in pairs of certificate and key.
pub fn make(asked: &Asked) -> Result<Vec<(PathBuf, PathBuf)>, CertsError> {
    let cannot = |what, path: &Path| {
        let path = path.to_owned();
        move |source| CertsError::File { what, path, source }
    };
    std::fs::create_dir_all(&asked.out).map_err(cannot("make", &asked.out))?;
    let files = |name: &str| (asked.out.join(format!("{name}.pem")), asked.out.join(format!("{name}.key")));
    for (at, node) in asked.node.iter().enumerate() {
        if asked.node[..at].iter().any(|other| other.name == node.name) {
            return Err(CertsError::Twice(node.name.clone()));
        }
        let (cert, key) = files(&node.name);
        if let Some(there) = [cert, key].into_iter().find(|path| path.exists()) {
            return Err(CertsError::There(there));
        }
    }
    let (authority_cert, authority_key) = files(AUTHORITY);
    let mut made = Vec::new();
    let (key, certificate) = match std::fs::read_to_string(&authority_key) {
        Ok(text) => {
            let foreign =
                |error: rcgen::Error| CertsError::Foreign { path: authority_key.clone(), why: error.to_string() };
            let key = KeyPair::from_pem(&text).map_err(foreign)?;
            let certificate = std::fs::read_to_string(&authority_cert).map_err(cannot("read", &authority_cert))?;
            (key, certificate)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound && authority_cert.exists() => {
            return Err(CertsError::NoKey(authority_key));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = KeyPair::generate()?;
            let certificate = authority(&key)?.self_signed(&key)?.pem();
            made.push((authority_cert.clone(), certificate.clone(), authority_key.clone(), key.serialize_pem()));
            (key, certificate)
        }
        Err(error) => return Err(cannot("read", &authority_key)(error)),
    };
    let issuer = Issuer::new(authority(&key)?, key);
    for node in &asked.node {
        let key = KeyPair::generate()?;
        let signed = of_node(node, asked.days)?.signed_by(&key, &issuer)?;
        // Another authority may have been put there, by the same name or by another.
        checked(&certificate, signed.der()).map_err(|why| CertsError::Foreign { path: authority_cert.clone(), why })?;
        let (cert_file, key_file) = files(&node.name);
        made.push((cert_file, signed.pem(), key_file, key.serialize_pem()));
    }
    for (cert_file, cert, key_file, key) in &made {
        // Keys first: a certificate that is there has its key.
        write_new(key_file, key, 0o600).map_err(cannot("write", key_file))?;
        write_new(cert_file, cert, 0o644).map_err(cannot("write", cert_file))?;
    }
    Ok(made.into_iter().map(|(cert, _, key, _)| (cert, key)).collect())
}

fn named(name: &str) -> DistinguishedName {
    let mut names = DistinguishedName::new();
    names.push(DnType::CommonName, name);
    names
}

fn valid_for(params: &mut CertificateParams, days: u32) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let epoch = date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(VALID_BEFORE);
    params.not_after = epoch + now + DAY * days;
}

/// The same each time, but for its dates: what it signs names it. Named after its key, so that two can be told apart.
fn authority(key: &KeyPair) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(Vec::new())?;
    let digest = Sha256::digest(key.public_key_raw());
    params.distinguished_name = named(&format!("{AUTHORITY_NAME} {}", HEXLOWER.encode(&digest[..NAME_BYTES])));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid_for(&mut params, AUTHORITY_DAYS);
    Ok(params)
}

fn of_node(node: &NodeName, days: u32) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(node.addresses.clone())?;
    params.distinguished_name = named(&node.name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // A node calls and is called.
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    valid_for(&mut params, days);
    Ok(params)
}

/// Whether nodes that trust this authority will take this certificate.
fn checked(authority: &str, certificate: &CertificateDer<'_>) -> Result<(), String> {
    let authority = CertificateDer::from_pem_slice(authority.as_bytes()).map_err(|error| error.to_string())?;
    let mut roots = RootCertStore::empty();
    roots.add(authority).map_err(|error| error.to_string())?;
    let nodes = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::new(ring::default_provider()));
    let nodes = nodes.build().map_err(|error| error.to_string())?;
    let signed = nodes.verify_client_cert(certificate, &[], UnixTime::now());
    signed.map(drop).map_err(|_| format!("is not the authority that {AUTHORITY}.key beside it belongs to"))
}

fn write_new(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn asked(out: &Path, nodes: &[&str]) -> Asked {
        let node = nodes.iter().map(|node| node.parse().unwrap()).collect();
        Asked { out: out.to_owned(), node, days: DAYS_DEFAULT }
    }

    #[test]
    fn nodes_can_be_added_and_nothing_is_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("certs");
        let made = make(&asked(&out, &["a,127.0.0.1", "b,::1,b.internal"])).unwrap();
        assert_eq!(made.len(), 3, "the authority, too");
        for (cert, key) in &made {
            assert_eq!(std::fs::metadata(key).unwrap().mode() & 0o777, 0o600, "{key:?}");
            assert!(cert.exists());
        }
        let before = std::fs::read(out.join("ca.pem")).unwrap();
        assert_eq!(make(&asked(&out, &["c,127.0.0.1"])).unwrap().len(), 1);
        assert_eq!(std::fs::read(out.join("ca.pem")).unwrap(), before);
        let twice = make(&asked(&out, &["d,127.0.0.1", "a,127.0.0.1"])).unwrap_err();
        assert!(matches!(&twice, CertsError::There(path) if path.ends_with("a.pem")), "{twice}");
        let same = make(&asked(&out, &["d,127.0.0.1", "d,::1"])).unwrap_err();
        assert!(matches!(&same, CertsError::Twice(name) if name == "d"), "{same}");
        assert!(!out.join("d.pem").exists(), "all or nothing");
    }

    #[test]
    fn another_authority_is_noticed() {
        let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for folder in [&ours, &theirs] {
            make(&asked(folder.path(), &["a,127.0.0.1"])).unwrap();
        }
        std::fs::copy(theirs.path().join("ca.pem"), ours.path().join("ca.pem")).unwrap();
        let error = make(&asked(ours.path(), &["b,127.0.0.1"])).unwrap_err().to_string();
        assert!(error.contains("ca.pem: is not the authority that ca.key"), "{error}");
        std::fs::remove_file(ours.path().join("ca.key")).unwrap();
        let error = make(&asked(ours.path(), &["b,127.0.0.1"])).unwrap_err().to_string();
        assert!(error.contains("ca.key is missing"), "{error}");
        std::fs::write(ours.path().join("ca.key"), "nonsense").unwrap();
        assert!(matches!(make(&asked(ours.path(), &["b,127.0.0.1"])), Err(CertsError::Foreign { .. })));
    }

    #[test]
    fn a_node_is_a_name_and_addresses() {
        for (text, why) in [
            ("", "no name"),
            ("a/b,127.0.0.1", "no name"),
            ("..,127.0.0.1", "no name"),
            ("ca,127.0.0.1", "the authority"),
            ("a", "needs an address"),
            ("a,127.0.0.1:9975", "without port"),
            ("a,", "without port"),
        ] {
            let error = text.parse::<NodeName>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
