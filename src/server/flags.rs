//! The flags of this room: who gets in, and how much anybody may ask for.

use std::path::PathBuf;
use std::time::Duration;

use super::access::auth::PASSWORD_BYTES_MAX;
use super::guests::GuestLimits;
use super::tcp::TcpSettings;
use super::tls::{TlsFiles, TlsSettings};
use crate::flags::{WrongFlag, duration_ms, within, wrong};
use crate::task::Limits;

const SESSION_DEFAULT: Duration = Duration::from_secs(30 * 60);
/// Sessions of a node at a time.
const SESSIONS_MAX: usize = 100_000;
/// A frame must be able to carry what the protocol needs besides a payload.
const FRAME_BYTES_MIN: usize = 4 * 1024;
const FRAME_BYTES_MOST: usize = 64 * 1024 * 1024;

#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Clients")]
pub struct ServerFlags {
    /// Password of the client `admin`, set at the first start. Without one, it is made up and left in
    /// `<data-dir>/admin-password`
    #[arg(long, value_name = "PASSWORD", env = "BOOMERANG_ADMIN_PASSWORD", hide_env_values = true)]
    pub admin_password: Option<String>,
    /// Certificate of the listeners for clients, over TCP and HTTP, PEM: they speak TLS. Read again when it changes, and at
    /// SIGHUP
    #[arg(long, value_name = "FILE", env = "BOOMERANG_TLS_CERT")]
    pub tls_cert: Option<PathBuf>,
    /// Key of --tls-cert, PEM
    #[arg(long, value_name = "FILE", env = "BOOMERANG_TLS_KEY")]
    pub tls_key: Option<PathBuf>,
    /// Takes clients without TLS: beyond loopback, or beside TLS while clients change over to it. Their passwords can be
    /// read on the way
    #[arg(long, env = "BOOMERANG_INSECURE_PLAINTEXT", value_parser = clap::builder::FalseyValueParser::new())]
    pub insecure_plaintext: bool,
    /// How long a session lasts without being refreshed [default: 30m]
    #[arg(long, value_name = "DURATION", env = "BOOMERANG_SESSION_TIMEOUT")]
    pub session_timeout: Option<String>,
    /// Client connections at a time; of more, those go first that have not authenticated [default: 10000]
    #[arg(long, value_name = "N", env = "BOOMERANG_CONNECTIONS_MAX")]
    pub connections_max: Option<usize>,
    /// Client connections from one address, or one network of IPv6, at a time [default: half of --connections-max]
    #[arg(long, value_name = "N", env = "BOOMERANG_CONNECTIONS_PER_ADDRESS_MAX")]
    pub connections_per_address_max: Option<usize>,
    /// A client that does not take its answers for this long is disconnected [default: 10s]
    #[arg(long, value_name = "DURATION", env = "BOOMERANG_WRITE_TIMEOUT")]
    pub write_timeout: Option<String>,
    /// How far ahead a task may be due [default: 1825d]
    #[arg(long, value_name = "DURATION", env = "BOOMERANG_DELAY_MAX")]
    pub delay_max: Option<String>,
    /// Shortest interval of a recurring task, unless an administrator has set another for its client [default: 100ms]
    #[arg(long, value_name = "DURATION", env = "BOOMERANG_INTERVAL_MIN")]
    pub interval_min: Option<String>,
    /// Largest payload, in bytes [default: 524288]
    #[arg(long, value_name = "BYTES", env = "BOOMERANG_PAYLOAD_MAX")]
    pub payload_max: Option<usize>,
    /// Largest frame, in bytes [default: 1048576]
    #[arg(long, value_name = "BYTES", env = "BOOMERANG_FRAME_MAX")]
    pub frame_max: Option<usize>,
}

/// What this room runs with.
#[derive(Debug, Clone)]
pub struct ServerSettings {
    pub admin_password: Option<String>,
    pub session_lifetime_ms: u64,
    pub sessions_max: usize,
    pub limits: Limits,
    pub tcp: TcpSettings,
    pub tls: TlsSettings,
}

impl ServerFlags {
    pub fn check(self) -> Result<ServerSettings, WrongFlag> {
        let mut limits = Limits::default();
        if let Some(delay_ms) = duration_ms("--delay-max", self.delay_max.as_deref())? {
            limits.delay_max_ms = within("--delay-max", delay_ms, 1, u64::MAX / 4)?;
        }
        if let Some(interval_ms) = duration_ms("--interval-min", self.interval_min.as_deref())? {
            limits.interval_min_ms = within("--interval-min", interval_ms, 1, limits.delay_max_ms)?;
        }
        let mut tcp = TcpSettings::default();
        if let Some(frame) = self.frame_max {
            tcp.frame_bytes_max = within("--frame-max", frame, FRAME_BYTES_MIN, FRAME_BYTES_MOST)?;
            limits.payload_bytes_max = limits.payload_bytes_max.min(tcp.frame_bytes_max / 2);
        }
        if let Some(payload) = self.payload_max {
            // In a callback and in `get`, a payload travels with everything else about its task.
            limits.payload_bytes_max = within("--payload-max", payload, 0, tcp.frame_bytes_max - FRAME_BYTES_MIN / 2)?;
        }
        if let Some(timeout) = duration_ms("--write-timeout", self.write_timeout.as_deref())? {
            tcp.write_timeout = Duration::from_millis(within("--write-timeout", timeout, 100, 3_600_000)?);
        }
        let all = self.connections_max.unwrap_or(tcp.connections.all);
        let all = within("--connections-max", all, 1, 1_000_000)?;
        let of_an_address = self.connections_per_address_max.unwrap_or(all.div_ceil(2));
        let of_an_address = within("--connections-per-address-max", of_an_address, 1, all)?;
        tcp.connections = GuestLimits { all, of_an_address };
        let files = match (self.tls_cert, self.tls_key) {
            (Some(cert), Some(key)) => Some(TlsFiles { cert, key }),
            (None, None) => None,
            _ => return Err(wrong("--tls-cert, --tls-key", "are needed together, or none of them")),
        };
        let tls = TlsSettings { files, plaintext: self.insecure_plaintext };
        let admin_password = self.admin_password.filter(|password| !password.is_empty());
        if admin_password.as_ref().is_some_and(|password| password.len() > PASSWORD_BYTES_MAX) {
            return Err(wrong("--admin-password", format!("is longer than {PASSWORD_BYTES_MAX} bytes")));
        }
        let session = duration_ms("--session-timeout", self.session_timeout.as_deref())?;
        let session = session.unwrap_or(u64::try_from(SESSION_DEFAULT.as_millis()).expect("half an hour"));
        let session_lifetime_ms = within("--session-timeout", session, 100, 365 * 24 * 3_600_000)?;
        Ok(ServerSettings { admin_password, session_lifetime_ms, sessions_max: SESSIONS_MAX, limits, tcp, tls })
    }
}
