//! The settings of a node: put together from the flags of all rooms, once.
//!
//! Each setting comes from its flag, else from its `BOOMERANG_*` variable, else from the TOML file named by `--config`,
//! else from the default that `--help` shows. A file is flags written down: what it says is read as if it stood on the
//! command line. So clap reads all three, and a name or a value that is wrong is refused by the name of its flag.
//!
//! What `apply` depends on is not here: it would differ from node to node. Only the number of shards is, which is fixed
//! when the data folder is made, and checked against it.

use std::ffi::OsString;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{ArgMatches, Args as _};

use crate::callback::CallbackSettings;
use crate::callback::flags::CallbackFlags;
use crate::callback::guard::Allowed;
use crate::firing::FiringSettings;
use crate::firing::flags::FiringFlags;
use crate::flags::{WrongFlag, within, wrong};
use crate::placement::Placement;
use crate::placement::flags::PlacementFlags;
use crate::raft::flags::{PeerFlags, PeerSettings};
use crate::server::flags::{ServerFlags, ServerSettings};
use crate::server::tls::TlsSettings;
use crate::store::flags::{StoreFlags, StoreSettings};
use crate::task::SHARDS_MAX;

const SHARDS_DEFAULT: u16 = 16;
const CLUSTER_DEFAULT: &str = "boomerang";

/// Settings as they are given; every one may be left out.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Given {
    /// Number of this node, unique in its cluster and never used again [default: 1]
    #[arg(long, value_name = "N", env = "BOOMERANG_NODE_ID")]
    pub node_id: Option<u64>,
    /// Folder of everything stored; made if it is not there
    #[arg(long, value_name = "FOLDER", env = "BOOMERANG_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
    /// Where clients connect; port 0 picks a free one [default: 127.0.0.1:9973]
    #[arg(long, value_name = "ADDR", env = "BOOMERANG_TCP_ADDR")]
    pub tcp_addr: Option<String>,
    /// Health, readiness and metrics [default: 127.0.0.1:9974]
    #[arg(long, value_name = "ADDR", env = "BOOMERANG_HTTP_ADDR")]
    pub http_addr: Option<String>,
    /// Where the other nodes connect; a node that is alone does not listen there [default: 127.0.0.1:9975]
    #[arg(long, value_name = "ADDR", env = "BOOMERANG_PEER_ADDR")]
    pub peer_addr: Option<String>,
    /// Address that others reach this node by, without a port, when it listens on all addresses
    #[arg(long, value_name = "HOST", env = "BOOMERANG_ADVERTISE_HOST")]
    pub advertise_host: Option<String>,
    /// Name of the cluster the data belongs to [default: boomerang]
    #[arg(long, value_name = "NAME", env = "BOOMERANG_CLUSTER")]
    pub cluster: Option<String>,
    /// Number of shards, fixed when the data folder is made [default: 16]
    #[arg(long, value_name = "N", env = "BOOMERANG_SHARDS")]
    pub shards: Option<u16>,
    #[command(flatten)]
    pub placement: PlacementFlags,
    #[command(flatten)]
    pub peers: PeerFlags,
    #[command(flatten)]
    pub server: ServerFlags,
    #[command(flatten)]
    pub firing: FiringFlags,
    #[command(flatten)]
    pub callback: CallbackFlags,
    #[command(flatten)]
    pub store: StoreFlags,
    /// For tests: a file that says how wrong the clocks of this machine are
    #[arg(long, value_name = "FILE", env = "BOOMERANG_TEST_CLOCK", hide = true)]
    pub test_clock: Option<PathBuf>,
}

/// What a TOML file says and `given`, the command line and the variables, does not: as more flags for the command line.
pub fn flags_in_file(path: &Path, given: &ArgMatches) -> Result<Vec<OsString>, WrongFlag> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| wrong("--config", format!("cannot read {}: {error}", path.display())))?;
    let in_file = |why: String| wrong("--config", format!("{}: {why}", path.display()));
    let file: toml::Table = toml::from_str(&text).map_err(|error| in_file(error.to_string()))?;
    let known = Given::augment_args(clap::Command::new("boomerang"));
    let mut flags = Vec::new();
    for (name, value) in file {
        let flag = known.get_arguments().find(|flag| flag.get_long() == Some(&name));
        let flag = flag.ok_or_else(|| in_file(format!("'{name}' is no setting; see 'boomerang serve --help'")))?;
        let takes = if flag.get_action().takes_values() { "a text or a number" } else { "true or false" };
        let given = match value {
            toml::Value::String(text) if flag.get_action().takes_values() => format!("--{name}={text}"),
            toml::Value::Integer(number) if flag.get_action().takes_values() => format!("--{name}={number}"),
            toml::Value::Boolean(true) if !flag.get_action().takes_values() => format!("--{name}"),
            toml::Value::Boolean(false) if !flag.get_action().takes_values() => continue,
            other => return Err(in_file(format!("'{name}' must be {takes}, not {}", other.type_str()))),
        };
        flags.push((flag.get_id().to_string(), OsString::from(given)));
    }
    // What is wrong is told of here, where the file can be named.
    let read = [OsString::from("boomerang")].into_iter().chain(flags.iter().map(|(_, flag)| flag.clone()));
    if let Err(error) = known.try_get_matches_from(read) {
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default();
        return Err(in_file(first.trim_start_matches("error: ").to_owned()));
    }
    // A flag that is on or off is off by default.
    let is_given = |id: &str| given.value_source(id).is_some_and(|source| source != ValueSource::DefaultValue);
    Ok(flags.into_iter().filter(|(id, _)| !is_given(id)).map(|(_, flag)| flag).collect())
}

/// What a node runs with.
#[derive(Debug, Clone)]
pub struct Settings {
    pub node_id: u64,
    pub data_dir: PathBuf,
    pub tcp_addr: SocketAddr,
    pub http_addr: SocketAddr,
    pub peer_addr: SocketAddr,
    pub cluster: String,
    pub advertise_host: Option<String>,
    pub placement: Placement,
    pub zone: String,
    pub peers: PeerSettings,
    pub shards: u16,
    /// Lets every name in as administrator, on loopback only.
    pub open: bool,
    pub server: ServerSettings,
    pub firing: FiringSettings,
    pub callback: CallbackSettings,
    /// What callbacks may go to besides the public network.
    pub callback_allowed: Vec<Allowed>,
    pub store: StoreSettings,
    /// See [`crate::clock::SystemClock::skewed_by`].
    pub test_clock: Option<PathBuf>,
}

impl Settings {
    /// Checks everything at once and names what is wrong. `open`: `boomerang dev`.
    pub fn build(given: Given, open: bool) -> Result<Self, WrongFlag> {
        let data_dir = given.data_dir.ok_or_else(|| wrong("--data-dir", "is needed: everything is stored there"))?;
        let cluster = given.cluster.unwrap_or_else(|| CLUSTER_DEFAULT.to_owned());
        if cluster.is_empty() || !cluster.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) {
            return Err(wrong("--cluster", "must be letters, digits, '-', '_' and '.'"));
        }
        let node_id = within("--node-id", given.node_id.unwrap_or(1), 1, u64::MAX - 1)?;
        let placement = given.placement.check(node_id)?;
        if open && placement != Placement::Alone {
            return Err(wrong("--etcd, --peers", "are for 'boomerang serve': 'boomerang dev' is one node"));
        }
        let firing = given.firing.check()?;
        let peer_addr = address("--peer-addr", given.peer_addr.as_deref().unwrap_or("127.0.0.1:9975"))?;
        let advertise_host = given.advertise_host.filter(|host| !host.is_empty());
        let hosts = placement.hosts().map(|hosts| {
            let own = [peer_addr.ip().to_string()].into_iter().chain(advertise_host.clone());
            hosts.into_iter().chain(own).collect::<Vec<_>>()
        });
        let settings = Self {
            node_id,
            data_dir,
            tcp_addr: address("--tcp-addr", given.tcp_addr.as_deref().unwrap_or("127.0.0.1:9973"))?,
            http_addr: address("--http-addr", given.http_addr.as_deref().unwrap_or("127.0.0.1:9974"))?,
            peer_addr,
            cluster,
            placement,
            zone: given.placement.zone.unwrap_or_default(),
            peers: given.peers.check(hosts.as_ref().map(|hosts| hosts.iter().map(String::as_str)))?,
            advertise_host,
            shards: within("--shards", given.shards.unwrap_or(SHARDS_DEFAULT), 1, SHARDS_MAX)?,
            open,
            server: given.server.check()?,
            firing,
            callback_allowed: given.callback.allowed(open)?,
            callback: given.callback.check(firing.in_flight_max)?,
            store: given.store.check()?,
            test_clock: given.test_clock,
        };
        for (flag, address) in [
            ("--tcp-addr", settings.tcp_addr),
            ("--http-addr", settings.http_addr),
            ("--peer-addr", settings.peer_addr),
        ] {
            if open && !address.ip().is_loopback() {
                return Err(wrong(flag, "a node that lets everybody in must stay on loopback; use 'boomerang serve'"));
            }
            let TlsSettings { files, plaintext } = &settings.server.tls;
            if flag != "--peer-addr" && !address.ip().is_loopback() && files.is_none() && !plaintext {
                let why = format!(
                    "{address} is reached by others, who would read passwords on the way: give --tls-cert and --tls-key, \
                     or --insecure-plaintext if something else encrypts"
                );
                return Err(wrong(flag, why));
            }
            let known = settings.advertise_host.is_some() || !address.ip().is_unspecified();
            if settings.placement != Placement::Alone && !known {
                let why = format!("is needed: {flag} listens on all addresses, and the others must know one");
                return Err(wrong("--advertise-host", why));
            }
        }
        Ok(settings)
    }
}

fn address(flag: &str, text: &str) -> Result<SocketAddr, WrongFlag> {
    let found = text.to_socket_addrs().map_err(|error| wrong(flag, format!("'{text}' is not host:port: {error}")))?;
    found.into_iter().next().ok_or_else(|| wrong(flag, format!("'{text}' has no address")))
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        given: Given,
    }

    /// As the command line says, and as far as it does not, a file.
    fn given(flags: &str, file: Option<&Path>) -> Result<Given, Box<dyn std::error::Error>> {
        let mut line = vec![OsString::from("boomerang")];
        line.extend(flags.split_whitespace().map(OsString::from));
        if let Some(path) = file {
            line.extend(flags_in_file(path, &Cli::command().try_get_matches_from(&line)?)?);
        }
        Ok(Cli::try_parse_from(line)?.given)
    }

    fn build(flags: &str) -> Result<Settings, WrongFlag> {
        Settings::build(given(&format!("--data-dir d {flags}"), None).unwrap(), false)
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("boomerang.toml");
        let refused = |text: &str| {
            std::fs::write(&path, text).unwrap();
            given("", Some(&path)).unwrap_err().to_string()
        };
        assert!(refused("shard = 4\n").contains("'shard' is no setting"));
        assert!(refused("shards = [4]\n").contains("'shards' must be a text or a number, not array"));
        assert!(refused("shards = \n").contains("boomerang.toml"));
        assert!(refused("insecure-plaintext = 1\n").contains("must be true or false, not integer"));
        let four = refused("shards = \"four\"\n");
        assert!(four.contains("boomerang.toml: invalid value 'four' for '--shards <N>'"), "{four}");
        std::fs::write(&path, "shards = 4\nwindow = \"10m\"\nnode-id = 7\ninsecure-plaintext = true\n").unwrap();
        let given = given("--data-dir d --shards 2", Some(&path)).unwrap();
        let settings = Settings::build(given, false).unwrap();
        assert_eq!((settings.shards, settings.node_id, settings.firing.window_ms), (2, 7, 600_000));
        assert_eq!((settings.tcp_addr.port(), settings.server.tls.plaintext), (9973, true));
        std::fs::write(&path, "insecure-plaintext = false\n").unwrap();
        let given = self::given("--data-dir d", Some(&path)).unwrap();
        assert!(!Settings::build(given, false).unwrap().server.tls.plaintext);
    }

    #[test]
    fn wrong_settings_are_refused_by_name() {
        for (flags, text) in [
            ("--shards 0", "--shards: 0"),
            ("--shards 5000", "4096"),
            ("--tcp-addr nowhere", "--tcp-addr"),
            ("--window 10", "--window"),
            ("--tick-ms 0", "--tick-ms"),
            ("--cluster a/b", "--cluster"),
            ("--payload-max 1048576", "--payload-max"),
            ("--tcp-addr 0.0.0.0:1", "--tcp-addr: 0.0.0.0:1 is reached by others"),
            ("--http-addr [::]:1 --tls-cert c", "--tls-cert, --tls-key: are needed together"),
            ("--http-addr [::]:1", "--insecure-plaintext"),
            ("--callback-allow 10.0.0.0/8,localhost", "--callback-allow: 'localhost' is no network"),
            ("--destination-in-flight-max 0", "--destination-in-flight-max"),
            ("--session-timeout 1ms", "--session-timeout: 1 is not within"),
            ("--history 32d", "--history"),
            ("--cache-max 0", "--cache-max"),
            ("--peers 2=a:1", "this node, 1, is not among them"),
            ("--peers 1=a:1,1=b:1", "named twice"),
            ("--peers 1=a", "not host:port"),
            ("--peers a:1", "not number=host:port"),
            ("--etcd a:2379", "not a URL"),
            ("--etcd http://a --peers 1=a:1", "together"),
            ("--etcd http://a --etcd-user u", "--etcd-user, --etcd-password-file: are needed together"),
            ("--etcd http://a --etcd-user u --etcd-password p --etcd-password-file f", "together"),
            ("--etcd http://a --etcd-ca c", "https:// URLs"),
            ("--etcd https://a --etcd-cert c", "--etcd-cert, --etcd-key: are needed together"),
            ("--peer-cert c", "--peer-ca"),
            ("--peers 1=127.0.0.1:1,2=127.0.0.1:2", "--peer-cert, --peer-key, --peer-ca: are needed in a cluster"),
            ("--etcd http://a", "'boomerang certs'"),
            ("--etcd http://a --peer-addr 10.0.0.1:1 --cluster-secret-file f", "'10.0.0.1' is not"),
            ("--etcd http://a --advertise-host a --cluster-secret-file f", "'a' is not"),
            (
                "--etcd http://a --peer-addr 0.0.0.0:1 --advertise-host 127.0.0.1 --cluster-secret-file f",
                "'0.0.0.0' is not",
            ),
            ("--peers 1=127.0.0.1:1,2=b:2 --cluster-secret-file f", "'b' is not"),
            ("--cluster-secret-file f --cluster-secret t", "together"),
        ] {
            let error = build(flags).unwrap_err().to_string();
            assert!(error.contains(text), "{flags}: {error}");
        }
        assert!(Settings::build(Given::default(), false).unwrap_err().to_string().starts_with("--data-dir"));
        let open = given("--data-dir d --tcp-addr 0.0.0.0:0", None).unwrap();
        assert!(Settings::build(open, true).unwrap_err().to_string().contains("loopback"));
    }
}
