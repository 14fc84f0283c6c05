//! The settings of a node: one struct, three sources, checked once.
//!
//! Each setting comes from its flag, else from its `BOOMERANG_*` variable, else from the TOML file named by `--config`,
//! else from the default shown here. [`Given`] is what a person wrote, all of it optional; [`Settings`] is what a node
//! runs with. Whatever is wrong is refused at the start, by the name of its flag.
//!
//! What `apply` depends on is not here: it would differ from node to node. Only the number of shards is, which is fixed
//! when the data folder is made, and checked against it.

use std::collections::BTreeMap;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::callback::CallbackSettings;
use crate::firing::FiringSettings;
use crate::placement::Placement;
use crate::server::access::auth::PASSWORD_BYTES_MAX;
use crate::server::tcp::TcpSettings;
use crate::task::when::parse_duration;
use crate::task::{Limits, SHARDS_MAX};

const SHARDS_DEFAULT: u16 = 16;
const REPLICAS_DEFAULT: u16 = 3;
const REPLICAS_MAX: u16 = 9;
const NODES_MAX: u16 = 1_000;
const NODE_GRACE_MS: u64 = 5 * 60_000;
const CLUSTER_DEFAULT: &str = "boomerang";
const SESSION_DEFAULT: Duration = Duration::from_secs(30 * 60);
const SESSIONS_MAX: usize = 100_000;
const MIB: u64 = 1024 * 1024;
/// Below this, new tasks are refused.
const DISK_FREE_MIN_MIB: u64 = 128;
/// Kept back for finishing what was accepted, when the disk is full.
const DISK_RESERVE_MIB: u64 = 64;
/// Whoever wants to look back further wants it somewhere else.
const HISTORY_MS_MAX: u64 = 31 * 24 * 3_600_000;
/// More than any disk has.
const CACHE_MIB_MAX: usize = 1 << 20;
const DISK_MIB_MAX: u64 = 1 << 40;
/// A frame must be able to carry what the protocol needs besides a payload.
const FRAME_BYTES_MIN: usize = 4 * 1024;
const FRAME_BYTES_MOST: usize = 64 * 1024 * 1024;

#[derive(Debug, thiserror::Error)]
#[error("{flag}: {why}")]
pub struct SettingsError {
    flag: String,
    why: String,
}

fn wrong(flag: &str, why: impl Into<String>) -> SettingsError {
    SettingsError { flag: flag.to_owned(), why: why.into() }
}

/// Settings as they are given; every one may be left out.
#[derive(Debug, Clone, Default, clap::Args, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
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
    /// Where the other nodes connect [default: 127.0.0.1:9975]
    #[arg(long, value_name = "ADDR", env = "BOOMERANG_PEER_ADDR")]
    pub peer_addr: Option<String>,
    /// Name of the cluster the data belongs to [default: boomerang]
    #[arg(long, value_name = "NAME", env = "BOOMERANG_CLUSTER")]
    pub cluster: Option<String>,
    /// Address that others reach this node by, without a port, when it listens on all addresses
    #[arg(long, value_name = "HOST", env = "BOOMERANG_ADVERTISE_HOST")]
    pub advertise_host: Option<String>,
    /// etcd of the cluster, which decides where replicas are. Without it and without --peers the node is alone
    #[arg(long, value_name = "URL,URL", env = "BOOMERANG_ETCD")]
    pub etcd: Option<String>,
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
    /// Certificate of this node for its peers, PEM; with it, nodes speak TLS and know each other by their certificates
    #[arg(long, value_name = "FILE", env = "BOOMERANG_PEER_CERT")]
    pub peer_cert: Option<PathBuf>,
    /// Key of --peer-cert, PEM
    #[arg(long, value_name = "FILE", env = "BOOMERANG_PEER_KEY")]
    pub peer_key: Option<PathBuf>,
    /// Whoever has signed the certificates of all nodes, PEM
    #[arg(long, value_name = "FILE", env = "BOOMERANG_PEER_CA")]
    pub peer_ca: Option<PathBuf>,
    /// Number of shards, fixed when the data folder is made [default: 16]
    #[arg(long, value_name = "N", env = "BOOMERANG_SHARDS")]
    pub shards: Option<u16>,
    /// Password of the client `admin`, set at the first start. Without one, it is made up and left in
    /// `<data-dir>/admin-password`
    #[arg(long, value_name = "PASSWORD", env = "BOOMERANG_ADMIN_PASSWORD", hide_env_values = true)]
    pub admin_password: Option<String>,
    /// How long a session lasts without being refreshed [default: 30m]
    #[arg(long, value_name = "DURATION", env = "BOOMERANG_SESSION_TIMEOUT")]
    pub session_timeout: Option<String>,
    /// How far ahead a task may be due [default: 1825d]
    #[arg(long, value_name = "DURATION", env = "BOOMERANG_DELAY_MAX")]
    pub delay_max: Option<String>,
    /// Largest payload, in bytes [default: 524288]
    #[arg(long, value_name = "BYTES", env = "BOOMERANG_PAYLOAD_MAX")]
    pub payload_max: Option<usize>,
    /// Largest frame, in bytes [default: 1048576]
    #[arg(long, value_name = "BYTES", env = "BOOMERANG_FRAME_MAX")]
    pub frame_max: Option<usize>,
    /// A client that does not take its answers for this long is disconnected [default: 10s]
    #[arg(long, value_name = "DURATION", env = "BOOMERANG_WRITE_TIMEOUT")]
    pub write_timeout: Option<String>,
    /// Client connections at a time [default: 10000]
    #[arg(long, value_name = "N", env = "BOOMERANG_CONNECTIONS_MAX")]
    pub connections_max: Option<usize>,
    /// Tick of the timing wheel, in milliseconds [default: 1]
    #[arg(long, value_name = "MS", env = "BOOMERANG_TICK_MS")]
    pub tick_ms: Option<u64>,
    /// Levels of the timing wheel, 64 slots each [default: 4]
    #[arg(long, value_name = "N", env = "BOOMERANG_WHEEL_LEVELS")]
    pub wheel_levels: Option<u32>,
    /// Tasks due within this span are kept in memory [default: 30m]
    #[arg(long, value_name = "DURATION", env = "BOOMERANG_WINDOW")]
    pub window: Option<String>,
    /// Timers in memory at most; the window is shorter when they are reached [default: 4000000]
    #[arg(long, value_name = "N", env = "BOOMERANG_TIMERS_MAX")]
    pub timers_max: Option<usize>,
    /// Callbacks under way at most [default: 16384]
    #[arg(long, value_name = "N", env = "BOOMERANG_IN_FLIGHT_MAX")]
    pub in_flight_max: Option<usize>,
    /// How long it is kept what became of each occurrence, for `boomtool task get`; 0s keeps nothing [default: 24h]
    #[arg(long, value_name = "DURATION", env = "BOOMERANG_HISTORY")]
    pub history: Option<String>,
    /// Callbacks under way to one destination at most; 256 where each needs a connection of its own [default: 2048]
    #[arg(long, value_name = "N", env = "BOOMERANG_DESTINATION_IN_FLIGHT_MAX")]
    pub destination_in_flight_max: Option<usize>,
    /// How long a receiver may take to answer [default: 10s]
    #[arg(long, value_name = "DURATION", env = "BOOMERANG_CALLBACK_TIMEOUT")]
    pub callback_timeout: Option<String>,
    /// With less free space than this, in MiB, new tasks are refused [default: 128]
    #[arg(long, value_name = "MIB", env = "BOOMERANG_DISK_FREE_MIN")]
    pub disk_free_min: Option<u64>,
    /// Space kept back, in MiB, for finishing what was accepted when the disk is full [default: 64]
    #[arg(long, value_name = "MIB", env = "BOOMERANG_DISK_RESERVE")]
    pub disk_reserve: Option<u64>,
    /// Memory, in MiB, for parts of the store that are read again. It is used as far as what is stored needs it: 16, and
    /// about 6 for each million tasks; with less, indexes and filters are read from the disk again and again [default: 256]
    #[arg(long, value_name = "MIB", env = "BOOMERANG_CACHE_MAX")]
    pub cache_max: Option<usize>,
    /// For tests: a file that says how wrong the clocks of this machine are
    #[arg(long, value_name = "FILE", env = "BOOMERANG_TEST_CLOCK", hide = true)]
    pub test_clock: Option<PathBuf>,
}

/// `self`, and what it leaves out from another.
macro_rules! over {
    ($first:expr, $second:expr, $($field:ident),+ $(,)?) => {
        Given { $($field: $first.$field.or($second.$field)),+ }
    };
}

impl Given {
    /// Fills in from a TOML file what is not given otherwise.
    pub fn with_file(self, path: &Path) -> Result<Self, SettingsError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| wrong("--config", format!("cannot read {}: {error}", path.display())))?;
        let file: Given =
            toml::from_str(&text).map_err(|error| wrong("--config", format!("{}: {error}", path.display())))?;
        Ok(over!(
            self,
            file,
            node_id,
            data_dir,
            tcp_addr,
            http_addr,
            peer_addr,
            cluster,
            advertise_host,
            etcd,
            peers,
            replicas,
            bootstrap_expect,
            zone,
            node_grace,
            peer_cert,
            peer_key,
            peer_ca,
            shards,
            admin_password,
            session_timeout,
            delay_max,
            payload_max,
            frame_max,
            write_timeout,
            connections_max,
            tick_ms,
            wheel_levels,
            window,
            timers_max,
            in_flight_max,
            history,
            destination_in_flight_max,
            callback_timeout,
            disk_free_min,
            disk_reserve,
            cache_max,
            test_clock,
        ))
    }
}

/// PEM files.
#[derive(Debug, Clone)]
pub struct PeerTlsFiles {
    pub cert: PathBuf,
    pub key: PathBuf,
    pub ca: PathBuf,
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
    pub peer_tls: Option<PeerTlsFiles>,
    pub shards: u16,
    pub admin_password: Option<String>,
    /// Lets every name in as administrator, on loopback only.
    pub open: bool,
    pub session_lifetime_ms: u64,
    pub sessions_max: usize,
    pub limits: Limits,
    pub tcp: TcpSettings,
    pub firing: FiringSettings,
    pub callback: CallbackSettings,
    pub disk_free_min_bytes: u64,
    pub disk_reserve_bytes: u64,
    /// See [`crate::store::Store::fit_cache`].
    pub cache_bytes_max: usize,
    /// See [`crate::clock::SystemClock::skewed_by`].
    pub test_clock: Option<PathBuf>,
}

impl Settings {
    /// Checks everything at once and names what is wrong. `open`: `boomerang dev`.
    pub fn build(given: Given, open: bool) -> Result<Self, SettingsError> {
        let data_dir = given.data_dir.ok_or_else(|| wrong("--data-dir", "is needed: everything is stored there"))?;
        let cluster = given.cluster.unwrap_or_else(|| CLUSTER_DEFAULT.to_owned());
        if cluster.is_empty() || !cluster.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) {
            return Err(wrong("--cluster", "must be letters, digits, '-', '_' and '.'"));
        }
        let shards = within("--shards", given.shards.unwrap_or(SHARDS_DEFAULT), 1, SHARDS_MAX)?;
        let mut limits = Limits::default();
        if let Some(delay_ms) = duration_ms("--delay-max", given.delay_max.as_deref())? {
            limits.delay_max_ms = within("--delay-max", delay_ms, 1, u64::MAX / 4)?;
        }
        let mut tcp = TcpSettings::default();
        if let Some(frame) = given.frame_max {
            tcp.frame_bytes_max = within("--frame-max", frame, FRAME_BYTES_MIN, FRAME_BYTES_MOST)?;
            limits.payload_bytes_max = limits.payload_bytes_max.min(tcp.frame_bytes_max / 2);
        }
        if let Some(payload) = given.payload_max {
            // In a callback and in `get`, a payload travels with everything else about its task.
            limits.payload_bytes_max = within("--payload-max", payload, 0, tcp.frame_bytes_max - FRAME_BYTES_MIN / 2)?;
        }
        if let Some(timeout) = duration_ms("--write-timeout", given.write_timeout.as_deref())? {
            tcp.write_timeout = Duration::from_millis(within("--write-timeout", timeout, 100, 3_600_000)?);
        }
        if let Some(connections) = given.connections_max {
            tcp.connections_max = within("--connections-max", connections, 1, 1_000_000)?;
        }
        let mut firing = FiringSettings::default();
        firing.wheel.tick_ms = given.tick_ms.unwrap_or(firing.wheel.tick_ms);
        firing.wheel.levels = given.wheel_levels.unwrap_or(firing.wheel.levels);
        firing.wheel.validate().map_err(|error| wrong("--tick-ms, --wheel-levels", error.to_string()))?;
        if let Some(window_ms) = duration_ms("--window", given.window.as_deref())? {
            firing.window_ms = within("--window", window_ms, 1_000, 30 * 24 * 3_600_000)?;
        }
        firing.timers_max = within("--timers-max", given.timers_max.unwrap_or(firing.timers_max), 1_000, 1 << 31)?;
        let in_flight = given.in_flight_max.unwrap_or(firing.in_flight_max);
        firing.in_flight_max = within("--in-flight-max", in_flight, 1, 1 << 20)?;
        if let Some(history_ms) = duration_ms("--history", given.history.as_deref())? {
            firing.history_ms = within("--history", history_ms, 0, HISTORY_MS_MAX)?;
        }
        let mut callback = CallbackSettings::default();
        if let Some(timeout) = duration_ms("--callback-timeout", given.callback_timeout.as_deref())? {
            callback.answer_timeout = Duration::from_millis(within("--callback-timeout", timeout, 10, 3_600_000)?);
        }
        let for_one = given.destination_in_flight_max.unwrap_or(callback.in_flight_max);
        callback.in_flight_of_all_max = firing.in_flight_max;
        callback.in_flight_max = within("--destination-in-flight-max", for_one, 1, 1 << 20)?;
        let disk_free_min = given.disk_free_min.unwrap_or(DISK_FREE_MIN_MIB);
        let disk_reserve = given.disk_reserve.unwrap_or(DISK_RESERVE_MIB);
        let admin_password = given.admin_password.filter(|password| !password.is_empty());
        if admin_password.as_ref().is_some_and(|password| password.len() > PASSWORD_BYTES_MAX) {
            return Err(wrong("--admin-password", format!("is longer than {PASSWORD_BYTES_MAX} bytes")));
        }
        let session = duration_ms("--session-timeout", given.session_timeout.as_deref())?;
        let session = session.unwrap_or(u64::try_from(SESSION_DEFAULT.as_millis()).expect("half an hour"));
        let node_id = within("--node-id", given.node_id.unwrap_or(1), 1, u64::MAX - 1)?;
        let replicas = within("--replicas", given.replicas.unwrap_or(REPLICAS_DEFAULT), 1, REPLICAS_MAX)?;
        let placement = match (given.etcd.as_deref(), given.peers.as_deref()) {
            (Some(_), Some(_)) => return Err(wrong("--peers", "cannot be given together with --etcd")),
            (None, None) => Placement::Alone,
            (None, Some(text)) => Placement::Static { peers: peers(text, node_id)?, replicas },
            (Some(text), None) => {
                let grace = duration_ms("--node-grace", given.node_grace.as_deref())?;
                let grace = within("--node-grace", grace.unwrap_or(NODE_GRACE_MS), 1_000, 30 * 24 * 3_600_000)?;
                Placement::Etcd {
                    endpoints: endpoints(text)?,
                    replicas,
                    bootstrap_expect: within(
                        "--bootstrap-expect",
                        given.bootstrap_expect.unwrap_or(replicas),
                        1,
                        NODES_MAX,
                    )?,
                    node_grace: Duration::from_millis(grace),
                }
            }
        };
        if open && placement != Placement::Alone {
            return Err(wrong("--etcd, --peers", "are for 'boomerang serve': 'boomerang dev' is one node"));
        }
        let peer_tls = match (given.peer_cert, given.peer_key, given.peer_ca) {
            (Some(cert), Some(key), Some(ca)) => Some(PeerTlsFiles { cert, key, ca }),
            (None, None, None) => None,
            _ => return Err(wrong("--peer-cert, --peer-key, --peer-ca", "are needed together, or none of them")),
        };
        let settings = Self {
            node_id,
            data_dir,
            tcp_addr: address("--tcp-addr", given.tcp_addr.as_deref().unwrap_or("127.0.0.1:9973"))?,
            http_addr: address("--http-addr", given.http_addr.as_deref().unwrap_or("127.0.0.1:9974"))?,
            peer_addr: address("--peer-addr", given.peer_addr.as_deref().unwrap_or("127.0.0.1:9975"))?,
            cluster,
            advertise_host: given.advertise_host.filter(|host| !host.is_empty()),
            placement,
            zone: given.zone.unwrap_or_default(),
            peer_tls,
            shards,
            admin_password,
            open,
            session_lifetime_ms: within("--session-timeout", session, 100, 365 * 24 * 3_600_000)?,
            sessions_max: SESSIONS_MAX,
            limits,
            tcp,
            firing,
            callback,
            disk_free_min_bytes: within("--disk-free-min", disk_free_min, 0, DISK_MIB_MAX)? * MIB,
            disk_reserve_bytes: within("--disk-reserve", disk_reserve, 0, DISK_MIB_MAX)? * MIB,
            cache_bytes_max: match given.cache_max {
                None => crate::store::CACHE_BYTES_MAX_DEFAULT,
                Some(cache) => within("--cache-max", cache, 1, CACHE_MIB_MAX)? * 1024 * 1024,
            },
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
            let known = settings.advertise_host.is_some() || !address.ip().is_unspecified();
            if settings.placement != Placement::Alone && !known {
                let why = format!("is needed: {flag} listens on all addresses, and the others must know one");
                return Err(wrong("--advertise-host", why));
            }
        }
        Ok(settings)
    }
}

fn within<T: PartialOrd + std::fmt::Display>(flag: &str, value: T, min: T, max: T) -> Result<T, SettingsError> {
    if value < min || value > max {
        return Err(wrong(flag, format!("{value} is not within {min} and {max}")));
    }
    Ok(value)
}

/// `1=host:port,2=host:port`
fn peers(text: &str, node_id: u64) -> Result<BTreeMap<u64, String>, SettingsError> {
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

fn endpoints(text: &str) -> Result<Vec<String>, SettingsError> {
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

fn address(flag: &str, text: &str) -> Result<SocketAddr, SettingsError> {
    let found = text.to_socket_addrs().map_err(|error| wrong(flag, format!("'{text}' is not host:port: {error}")))?;
    found.into_iter().next().ok_or_else(|| wrong(flag, format!("'{text}' has no address")))
}

fn duration_ms(flag: &str, text: Option<&str>) -> Result<Option<u64>, SettingsError> {
    let Some(text) = text else { return Ok(None) };
    let duration = parse_duration(text).map_err(|why| wrong(flag, why))?;
    Ok(Some(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given() -> Given {
        Given { data_dir: Some("d".into()), ..Given::default() }
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("boomerang.toml");
        std::fs::write(&path, "shards = 4\nwindow = \"10m\"\nnode-id = 7\n").unwrap();
        let given = Given { shards: Some(2), ..given() }.with_file(&path).unwrap();
        let settings = Settings::build(given, false).unwrap();
        assert_eq!((settings.shards, settings.node_id, settings.firing.window_ms), (2, 7, 600_000));
        assert_eq!(settings.tcp_addr.port(), 9973);
        std::fs::write(&path, "shard = 4\n").unwrap();
        let error = Given::default().with_file(&path).unwrap_err().to_string();
        assert!(error.contains("shard"), "{error}");
    }

    #[test]
    fn wrong_settings_are_refused_by_name() {
        let refusal = |given: Given| Settings::build(given, false).unwrap_err().to_string();
        assert!(refusal(Given::default()).starts_with("--data-dir"));
        assert!(refusal(Given { shards: Some(0), ..given() }).starts_with("--shards: 0"));
        assert!(refusal(Given { shards: Some(5000), ..given() }).contains("4096"));
        assert!(refusal(Given { tcp_addr: Some("nowhere".into()), ..given() }).starts_with("--tcp-addr"));
        assert!(refusal(Given { window: Some("10".into()), ..given() }).starts_with("--window"));
        assert!(refusal(Given { tick_ms: Some(0), ..given() }).starts_with("--tick-ms"));
        assert!(refusal(Given { cluster: Some("a b".into()), ..given() }).starts_with("--cluster"));
        assert!(refusal(Given { payload_max: Some(1 << 20), ..given() }).starts_with("--payload-max"));
        let for_one = Given { destination_in_flight_max: Some(0), ..given() };
        assert!(refusal(for_one).starts_with("--destination-in-flight-max"));
        let peers = |text: &str| refusal(Given { peers: Some(text.into()), ..given() });
        assert!(peers("2=a:1").contains("this node, 1, is not among them"));
        assert!(peers("1=a:1,1=b:1").contains("named twice"));
        assert!(peers("1=a").contains("not host:port"));
        assert!(peers("a:1").contains("not number=host:port"));
        assert!(refusal(Given { etcd: Some("a:2379".into()), ..given() }).contains("not a URL"));
        assert!(
            refusal(Given { etcd: Some("http://a".into()), peers: Some("1=a:1".into()), ..given() })
                .contains("together")
        );
        assert!(refusal(Given { peer_cert: Some("c".into()), ..given() }).contains("--peer-ca"));
        let open = Given { tcp_addr: Some("0.0.0.0:0".into()), ..given() };
        assert!(Settings::build(open, true).unwrap_err().to_string().contains("loopback"));
    }
}
