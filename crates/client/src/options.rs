//! Where to connect, as whom, and how patiently.
//!
//! One struct with its defaults in one place; `boomtool` shares them. Checked once, in `Client::connect`.

use std::fmt;
use std::time::Duration;

use boomerang_task::{Callback, ClientId, Invalid, Retry};
use boomerang_wire::{self, convert, proto};

/// More requests under way than this bring no more throughput, only longer queues.
const INFLIGHT_MAX_DEFAULT: usize = 4096;
/// What a semaphore of tokio and the timer arithmetic can bear without a thought.
const INFLIGHT_MAX_MAX: usize = 1 << 20;

/// How a client says who it is.
#[derive(Clone)]
pub enum Credentials {
    /// A registered client and its password.
    Password {
        /// Who it is.
        client_id: ClientId,
        /// May be empty where the node lets anyone in (`boomerang dev`).
        password: String,
    },
    /// An API key, which names its client by itself.
    Token(String),
}

impl fmt::Debug for Credentials {
    /// Secrets stay out of logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Credentials::Password { client_id, .. } => write!(f, "Password({client_id})"),
            Credentials::Token(_) => f.write_str("Token"),
        }
    }
}

/// Settings of a [`super::Client`].
#[derive(Debug, Clone)]
pub struct Options {
    /// Nodes of one cluster as `host:port`, tried in this order.
    pub addresses: Vec<String>,
    /// Who is calling.
    pub credentials: Credentials,
    /// Nodes are spoken to by TLS, and must show certificates.
    #[cfg(feature = "tls")]
    pub tls: Option<super::Tls>,
    /// Takes the place of the client's registered receiver, for tasks registered through this client.
    pub callback: Option<Callback>,
    /// Takes the place of the client's registered retry settings.
    pub retry: Option<Retry>,
    /// Takes the place of the client's registered dead-letter destination.
    pub dead_letter: Option<String>,
    /// For one address: connection and handshake together.
    pub connect_timeout: Duration,
    /// From sending a request to its answer; also how long a request waits for a new connection.
    pub request_timeout: Duration,
    /// How many requests may be sent and not yet answered; the next one waits.
    pub inflight_max: usize,
    /// In a cluster, a registration without a deduplication key gets a number, so that it can be sent again when no answer
    /// comes, and is stored once.
    pub retry_registrations: bool,
    /// A registration, an edit or a list that a node has no room for is sent again by itself, if the node says that it
    /// will have some within half a second, as a busy node does. Without this, and when `request_timeout` is over, the
    /// refusal is what the caller gets.
    pub wait_for_room: bool,
    /// The largest request that is sent. A node ends the connection at a larger one, and with it all other requests.
    pub frame_bytes_max: usize,
}

impl Options {
    /// The defaults, for one address or many.
    pub fn new(addresses: Vec<String>, credentials: Credentials) -> Self {
        Self {
            addresses,
            credentials,
            #[cfg(feature = "tls")]
            tls: None,
            callback: None,
            retry: None,
            dead_letter: None,
            connect_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(10),
            inflight_max: INFLIGHT_MAX_DEFAULT,
            retry_registrations: true,
            wait_for_room: true,
            frame_bytes_max: boomerang_wire::FRAME_BYTES_MAX,
        }
    }

    pub(super) fn validate(&self) -> Result<(), Invalid> {
        let refuse = |text: String| Err(Invalid(text));
        if self.addresses.is_empty() {
            return refuse("addresses: is empty; name at least one node as host:port".into());
        }
        for address in &self.addresses {
            let port = address.rsplit_once(':').map(|(host, port)| (!host.is_empty(), port.parse::<u16>()));
            if !matches!(port, Some((true, Ok(port))) if port > 0) {
                return refuse(format!("addresses: '{address}' is not host:port"));
            }
        }
        for (name, value) in [("connect_timeout", self.connect_timeout), ("request_timeout", self.request_timeout)] {
            if value.is_zero() {
                return refuse(format!("{name}: is zero"));
            }
        }
        if self.inflight_max == 0 || self.inflight_max > INFLIGHT_MAX_MAX {
            return refuse(format!("inflight_max: {} is not within 1 and {INFLIGHT_MAX_MAX}", self.inflight_max));
        }
        if let Some(retry) = &self.retry {
            retry.validate()?;
        }
        Ok(())
    }

    pub(super) fn handshake(&self) -> proto::AuthHandshake {
        let (client_id, password, token) = match &self.credentials {
            Credentials::Password { client_id, password } => (client_id.to_string(), password.clone(), String::new()),
            Credentials::Token(token) => (String::new(), String::new(), token.clone()),
        };
        proto::AuthHandshake {
            client_id,
            password,
            token,
            callback: self.callback.as_ref().map(convert::callback_to),
            retry: self.retry.as_ref().map(convert::retry_to),
            dlq: self.dead_letter.as_deref().map(convert::dead_letter_to),
            protocol: boomerang_wire::PROTOCOL,
            redirects: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use boomerang_task::Backoff;

    #[test]
    fn wrong_options_name_the_field() {
        let good = Options::new(vec!["localhost:9973".into()], Credentials::Token("t".into()));
        assert!(good.validate().is_ok());
        for (wrong, field) in [
            (Options { addresses: vec![], ..good.clone() }, "addresses"),
            (Options { addresses: vec!["localhost".into()], ..good.clone() }, "addresses"),
            (Options { addresses: vec![":9973".into()], ..good.clone() }, "addresses"),
            (Options { inflight_max: 0, ..good.clone() }, "inflight_max"),
            (Options { request_timeout: Duration::ZERO, ..good.clone() }, "request_timeout"),
            (Options { retry: Some(Retry { attempts_max: 0, ..Retry::default() }), ..good.clone() }, "max_attempts"),
        ] {
            assert!(wrong.validate().unwrap_err().to_string().contains(field), "{field}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let credentials = Credentials::Password { client_id: "admin".parse().unwrap(), password: "hunter2".into() };
        let options = Options::new(vec![], credentials);
        assert!(!format!("{options:?}").contains("hunter2"));
        assert!(!format!("{:?}", Credentials::Token("hunter2".into())).contains("hunter2"));
    }

    #[test]
    fn retries_survive_the_wire() {
        let retry =
            Retry { attempts_max: 7, backoff: Backoff::Fixed, interval_ms: 5, interval_max_ms: 9, jitter_percent: 3 };
        assert_eq!(convert::retry_from(&convert::retry_to(&retry)).unwrap(), retry);
    }
}
