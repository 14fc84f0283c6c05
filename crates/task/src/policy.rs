//! Where a callback goes, how often it is tried, and what happens when it never succeeds.
//!
//! A policy is interned: it is stored once per shard under the hash of its content, and tasks name that hash. So a task
//! outlives the session it was registered in, and a million tasks of one client share one policy.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{InstantMs, Invalid};

const ENDPOINT_BYTES_MAX: usize = 2048;
const ATTEMPTS_MAX: u32 = 1_000;
/// No pause between two attempts is longer than this.
const RETRY_INTERVAL_MS_MAX: u64 = 7 * 24 * 3600 * 1000;

/// No receiver is waited for longer.
const TIMEOUT_MS_MAX: u64 = 3600 * 1000;
const SECRET_BYTES_MAX: usize = 256;
/// What fits into a datagram with everything else.
const UDP_PAYLOAD_BYTES_MAX: usize = 60_000;

/// How a callback travels. Append only: the number is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Protocol {
    /// Frames over a connection that is kept: `host:port`.
    Tcp,
    /// The service `boomerang.BoomerangCallback`: `host:port`, or a URL.
    Grpc,
    /// A `POST` of the payload, with all else in headers: a URL.
    Http,
    /// One datagram: `host:port`.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "tcp",
            Protocol::Grpc => "grpc",
            Protocol::Http => "http",
            Protocol::Udp => "udp",
        })
    }
}

/// Where a callback goes, and how.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Callback {
    /// How it travels.
    pub protocol: Protocol,
    /// Where it goes.
    pub endpoint: Endpoint,
    /// Those that go with the protocol; others are refused.
    pub options: CallbackOptions,
}

/// What not every receiver needs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CallbackOptions {
    /// HTTP: signs deliveries.
    pub secret: Option<Secret>,
    /// How long the receiver may take; `None` is the node's default.
    pub timeout_ms: Option<u64>,
    /// UDP: an answering datagram is waited for.
    pub acknowledge: bool,
    /// HTTP: version 2 from the start, without TLS.
    pub http2: bool,
    /// HTTP.
    pub follow_redirects: bool,
}

impl CallbackOptions {
    fn validate(&self, protocol: Protocol) -> Result<(), Invalid> {
        let only = |what: &str, for_protocol: Protocol| {
            Err(Invalid::new(format!("callback.{what}: is for {for_protocol} callbacks, this one goes by {protocol}")))
        };
        if self.secret.is_some() && protocol != Protocol::Http {
            return only("secret", Protocol::Http);
        }
        if self.http2 && protocol != Protocol::Http {
            return only("http2", Protocol::Http);
        }
        if self.follow_redirects && protocol != Protocol::Http {
            return only("follow_redirects", Protocol::Http);
        }
        if self.acknowledge && protocol != Protocol::Udp {
            return only("acknowledge", Protocol::Udp);
        }
        if self.timeout_ms.is_some_and(|timeout_ms| timeout_ms == 0 || timeout_ms > TIMEOUT_MS_MAX) {
            return Err(Invalid::new(format!("callback.timeout_ms: is not within 1 and {TIMEOUT_MS_MAX}")));
        }
        Ok(())
    }
}

/// What deliveries are signed with. It is stored as it is, and never shown.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Secret(String);

impl Secret {
    /// 1 to 256 bytes; with `whsec_` before it, base64.
    pub fn new(text: &str) -> Result<Self, Invalid> {
        if text.is_empty() || text.len() > SECRET_BYTES_MAX {
            return Err(Invalid::new(format!("callback.secret: is not within 1 and {SECRET_BYTES_MAX} bytes")));
        }
        let secret = Self(text.to_owned());
        if text.starts_with(Self::BASE64_PREFIX) && secret.base64_key().is_none() {
            return Err(Invalid::new("callback.secret: what follows 'whsec_' is not base64"));
        }
        Ok(secret)
    }

    const BASE64_PREFIX: &str = "whsec_";

    fn base64_key(&self) -> Option<Vec<u8>> {
        let encoded = self.0.strip_prefix(Self::BASE64_PREFIX)?;
        base64::engine::general_purpose::STANDARD.decode(encoded).ok().filter(|key| !key.is_empty())
    }

    /// The bytes to sign with: what follows `whsec_` is base64, any other text is its own bytes.
    pub fn key(&self) -> Vec<u8> {
        self.base64_key().unwrap_or_else(|| self.0.as_bytes().to_vec())
    }

    /// For sending it on; nobody shows it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// `host:port` for TCP and UDP, a URL for HTTP and gRPC.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Endpoint(String);

impl Endpoint {
    /// As it was given.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Callback {
    /// From a URL: `tcp://`, `udp://`, `grpc://`, `http://` or `https://`. `None` when it is none of these.
    pub fn from_url(url: &str) -> Option<Result<Self, Invalid>> {
        let (scheme, rest) = url.split_once("://")?;
        Some(match scheme {
            "tcp" => Self::new(Protocol::Tcp, rest),
            "udp" => Self::new(Protocol::Udp, rest),
            "grpc" => Self::new(Protocol::Grpc, rest),
            "http" | "https" => Self::new(Protocol::Http, url),
            _ => return None,
        })
    }

    /// The same with `options`, if they go with the protocol.
    pub fn with(self, options: CallbackOptions) -> Result<Self, Invalid> {
        options.validate(self.protocol)?;
        Ok(Self { options, ..self })
    }

    /// To `endpoint` by `protocol`, without options.
    pub fn new(protocol: Protocol, endpoint: &str) -> Result<Self, Invalid> {
        let refuse = |why: &str| Err(Invalid::new(format!("callback.endpoint: {why}")));
        if endpoint.is_empty() {
            return refuse("is empty");
        }
        if endpoint.len() > ENDPOINT_BYTES_MAX {
            return refuse(&format!("{} bytes, the limit is {ENDPOINT_BYTES_MAX}", endpoint.len()));
        }
        if endpoint.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return refuse("contains blanks or control characters");
        }
        // Clients of the original name a TCP receiver as `host:port` or `tcp://host:port`; both mean the same, and
        // one form is stored, so that they share one policy.
        let endpoint = match protocol {
            Protocol::Tcp => endpoint.strip_prefix("tcp://").unwrap_or(endpoint),
            Protocol::Udp => endpoint.strip_prefix("udp://").unwrap_or(endpoint),
            Protocol::Grpc => endpoint.strip_prefix("grpc://").unwrap_or(endpoint),
            Protocol::Http => endpoint,
        };
        match protocol {
            Protocol::Tcp | Protocol::Udp => check_host_port(endpoint)?,
            Protocol::Http | Protocol::Grpc => {
                let rest = endpoint.strip_prefix("http://").or_else(|| endpoint.strip_prefix("https://"));
                match rest {
                    Some(rest) => check_authority(rest)?,
                    None if protocol == Protocol::Grpc => check_host_port(endpoint)?,
                    None => return refuse("must begin with http:// or https://"),
                }
            }
        }
        Ok(Self { protocol, endpoint: Endpoint(endpoint.to_owned()), options: CallbackOptions::default() })
    }
}

/// The part of a URL behind its scheme: a host, and a port if it names one.
fn check_authority(rest: &str) -> Result<(), Invalid> {
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let port = host.rsplit_once(':').filter(|(_, port)| !port.ends_with(']'));
    match port {
        Some(_) => check_host_port(host),
        None if host.is_empty() => Err(Invalid::new("callback.endpoint: the URL has no host")),
        None => Ok(()),
    }
}

fn check_host_port(text: &str) -> Result<(), Invalid> {
    let port = text.rsplit_once(':').and_then(|(host, port)| {
        let bracketed = host.starts_with('[') && host.ends_with(']');
        (!host.is_empty() && (bracketed || !host.contains(':'))).then(|| u16::from_str(port).ok())?
    });
    match port {
        Some(port) if port > 0 => Ok(()),
        _ => Err(Invalid::new(format!("callback.endpoint: '{text}' is not host:port"))),
    }
}

/// How the pause between attempts grows. Append only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Backoff {
    /// The same pause each time.
    Fixed,
    /// Twice the pause before, up to a bound.
    Exponential,
}

/// How often one occurrence is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Retry {
    /// The first try included; at least 1.
    pub attempts_max: u32,
    /// How pauses grow.
    pub backoff: Backoff,
    /// The first pause, milliseconds; at most a week.
    pub interval_ms: u64,
    /// The longest pause, milliseconds; at most a week. Means something with [`Backoff::Exponential`] only.
    pub interval_max_ms: u64,
    /// Each pause is longer by a random part of itself, up to so many percent.
    pub jitter_percent: u8,
}

impl Retry {
    /// Refuses what is out of range, by the name of the field.
    pub fn validate(&self) -> Result<(), Invalid> {
        if self.attempts_max == 0 || self.attempts_max > ATTEMPTS_MAX {
            return Err(Invalid::new(format!(
                "retry.max_attempts: {} is not within 1 and {ATTEMPTS_MAX}",
                self.attempts_max
            )));
        }
        for (name, value) in [("interval_ms", self.interval_ms), ("max_interval_ms", self.interval_max_ms)] {
            if value > RETRY_INTERVAL_MS_MAX {
                return Err(Invalid::new(format!(
                    "retry.{name}: {value} ms, the limit is {RETRY_INTERVAL_MS_MAX} ms (7 days)"
                )));
            }
        }
        if self.jitter_percent > 100 {
            return Err(Invalid::new(format!("retry.jitter_percent: {} is more than 100", self.jitter_percent)));
        }
        if self.interval_max_ms < self.interval_ms {
            return Err(Invalid::new("retry.max_interval_ms: is smaller than interval_ms"));
        }
        Ok(())
    }

    /// When to try again after `attempt` (counted from 1) failed; `None` when that was the last one. `random` decides
    /// about jitter: a value, so that every replica computes the same.
    pub fn next_due(
        &self,
        attempt: u32,
        failed_at: InstantMs,
        retry_after_ms: Option<u64>,
        random: u64,
    ) -> Option<InstantMs> {
        if attempt >= self.attempts_max {
            return None;
        }
        let pause = match self.backoff {
            Backoff::Fixed => self.interval_ms,
            Backoff::Exponential => {
                let doublings = (attempt - 1).min(63);
                self.interval_ms.saturating_mul(1u64 << doublings).min(self.interval_max_ms)
            }
        };
        // In parts of 2^32, so that no pause overflows.
        let most = u128::from(pause) * u128::from(self.jitter_percent) / 100;
        let jitter = u64::try_from((most * u128::from(random >> 32)) >> 32).expect("less than the pause");
        let asked_for = retry_after_ms.unwrap_or(0).min(RETRY_INTERVAL_MS_MAX);
        Some(failed_at.saturating_add(pause.saturating_add(jitter).max(asked_for)))
    }
}

impl Default for Retry {
    /// Five tries over about fifteen seconds: rides out a restart of the receiver.
    fn default() -> Self {
        Self {
            attempts_max: 5,
            backoff: Backoff::Exponential,
            interval_ms: 1_000,
            interval_max_ms: 60_000,
            jitter_percent: 0,
        }
    }
}

/// Callback, retry and dead-letter settings of a task.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Policy {
    /// Where each attempt goes.
    pub callback: Callback,
    /// How often it is tried, and when.
    pub retry: Retry,
    /// Where a copy of a dead letter goes. The dead letter itself is always stored in the shard.
    pub dead_letter: Option<String>,
}

/// How often the copy of a dead letter is tried: over some hours, for its destination may be down as well.
const COPY_RETRY: Retry = Retry {
    attempts_max: 20,
    backoff: Backoff::Exponential,
    interval_ms: 1_000,
    interval_max_ms: 3_600_000,
    jitter_percent: 20,
};

impl Policy {
    /// How the copy of a dead letter travels, if its destination is a URL.
    pub fn for_copy(&self) -> Option<Policy> {
        let mut callback = Callback::from_url(self.dead_letter.as_deref()?)?.ok()?;
        if callback.protocol == Protocol::Http {
            // Who can check the one can check the other.
            callback.options.secret.clone_from(&self.callback.options.secret);
        }
        Some(Policy { callback, retry: COPY_RETRY, dead_letter: None })
    }

    /// About what it takes.
    pub fn bytes(&self) -> usize {
        let secret = self.callback.options.secret.as_ref().map_or(0, |secret| secret.expose().len());
        self.callback.endpoint.as_str().len() + self.dead_letter.as_ref().map_or(0, String::len) + secret
    }

    /// Whether a payload of so many bytes goes by any protocol.
    pub fn takes_any(payload_bytes: usize) -> bool {
        payload_bytes <= UDP_PAYLOAD_BYTES_MAX
    }

    /// What could never be sent is refused when it is asked for, not when it is due.
    pub fn check_payload(&self, payload_bytes: usize) -> Result<(), Invalid> {
        let by_udp = |policy: &Policy| policy.callback.protocol == Protocol::Udp;
        if !Self::takes_any(payload_bytes) && (by_udp(self) || self.for_copy().as_ref().is_some_and(by_udp)) {
            return Err(Invalid::new(format!(
                "payload: {payload_bytes} bytes, a datagram carries at most {UDP_PAYLOAD_BYTES_MAX}"
            )));
        }
        Ok(())
    }

    /// Equal policies have equal ids.
    pub fn id(&self) -> PolicyId {
        // Hashed over a form of its own, so that the id survives a change of the stored encoding.
        let mut hash = Sha256::new();
        let retry = &self.retry;
        hash.update(format!(
            "{}\0{}\0{}\0{:?}\0{}\0{}\0{}",
            self.callback.protocol,
            self.callback.endpoint,
            retry.attempts_max,
            retry.backoff,
            retry.interval_ms,
            retry.interval_max_ms,
            self.dead_letter.as_deref().unwrap_or(""),
        ));
        hash.update([0, retry.jitter_percent]);
        let CallbackOptions { secret, timeout_ms, acknowledge, http2, follow_redirects } = &self.callback.options;
        hash.update(format!(
            "\0{}\0{timeout_ms:?}\0{acknowledge}{http2}{follow_redirects}",
            secret.as_ref().map_or("", Secret::expose)
        ));
        let digest = hash.finalize();
        let mut id = [0u8; PolicyId::LEN];
        id.copy_from_slice(&digest[..PolicyId::LEN]);
        PolicyId(id)
    }
}

/// The hash of a policy's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PolicyId(pub [u8; 16]);

impl PolicyId {
    /// Bytes of an id.
    pub const LEN: usize = 16;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_checked_when_they_are_stored_not_when_they_fire() {
        for (protocol, text, good) in [
            (Protocol::Tcp, "127.0.0.1:9000", true),
            (Protocol::Tcp, "tcp://receiver.local:9000", true),
            (Protocol::Tcp, "[::1]:9000", true),
            (Protocol::Tcp, "::1:9000", false),
            (Protocol::Tcp, "receiver", false),
            (Protocol::Tcp, "receiver:0", false),
            (Protocol::Tcp, "receiver:70000", false),
            (Protocol::Tcp, ":80", false),
            (Protocol::Tcp, "", false),
            (Protocol::Tcp, "a b:80", false),
            (Protocol::Http, "https://example.org/hook", true),
            (Protocol::Http, "example.org:80", false),
            (Protocol::Http, "http:///hook", false),
            (Protocol::Http, "http://user:secret@[::1]:80/hook?x=http://y:0", true),
            (Protocol::Http, "http://[::1]/hook", true),
            (Protocol::Http, "http://h:99999/hook", false),
            (Protocol::Http, "http://h:/hook", false),
            (Protocol::Grpc, "https://h:0", false),
            (Protocol::Grpc, "example.org:80", true),
        ] {
            let result = Callback::new(protocol, text);
            assert_eq!(result.is_ok(), good, "{protocol} {text}: {result:?}");
        }
        assert!(Callback::new(Protocol::Tcp, &format!("{}:1", "x".repeat(3000))).is_err());
    }

    #[test]
    fn both_spellings_of_an_endpoint_share_one_policy() {
        let policy = |text| Policy {
            callback: Callback::new(Protocol::Tcp, text).unwrap(),
            retry: Retry::default(),
            dead_letter: None,
        };
        assert_eq!(policy("tcp://h:1").id(), policy("h:1").id());
        assert_ne!(policy("h:2").id(), policy("h:1").id());
    }

    #[test]
    fn pauses_double_up_to_the_cap_and_end() {
        let retry = Retry {
            attempts_max: 4,
            backoff: Backoff::Exponential,
            interval_ms: 100,
            interval_max_ms: 250,
            jitter_percent: 0,
        };
        let pauses: Vec<_> = (1..=4).map(|attempt| retry.next_due(attempt, 1_000, None, u64::MAX)).collect();
        assert_eq!(pauses, [Some(1_100), Some(1_200), Some(1_250), None]);
        let long = Retry { attempts_max: 1_000, interval_max_ms: u64::MAX, jitter_percent: 100, ..retry };
        assert_eq!(long.next_due(999, u64::MAX - 1, None, u64::MAX), Some(u64::MAX));
    }

    #[test]
    fn jitter_only_lengthens_and_the_receiver_may_ask_for_more() {
        let retry = Retry { backoff: Backoff::Fixed, interval_ms: 1_000, jitter_percent: 50, ..Retry::default() };
        assert_eq!(retry.next_due(1, 0, None, 0), Some(1_000));
        assert_eq!(retry.next_due(1, 0, None, u64::MAX), Some(1_499));
        assert_eq!(retry.next_due(1, 0, Some(10), 0), Some(1_000));
        assert_eq!(retry.next_due(1, 0, Some(5_000), 0), Some(5_000));
        assert_eq!(retry.next_due(1, 0, Some(u64::MAX), 0), Some(RETRY_INTERVAL_MS_MAX));
    }

    #[test]
    fn options_belong_to_their_protocol_and_secrets_stay_hidden() {
        let secret = Secret::new("whsec_aGVsbG8=").unwrap();
        assert_eq!(secret.key(), b"hello");
        assert_eq!(Secret::new("plain").unwrap().key(), b"plain");
        assert!(Secret::new("").is_err() && Secret::new("whsec_!").is_err());
        let options = CallbackOptions { secret: Some(secret), ..CallbackOptions::default() };
        assert!(!format!("{options:?}").contains("aGVs"));
        assert!(Callback::new(Protocol::Tcp, "h:1").unwrap().with(options.clone()).is_err());
        let http = Callback::new(Protocol::Http, "http://h").unwrap();
        let signed = http.clone().with(options).unwrap();
        let policy = |callback| Policy { callback, retry: Retry::default(), dead_letter: None };
        assert_ne!(policy(http).id(), policy(signed).id());
    }

    #[test]
    fn a_destination_that_is_a_url_gets_copies() {
        let policy = |text: &str| Policy {
            callback: Callback::new(Protocol::Tcp, "h:1").unwrap(),
            retry: Retry::default(),
            dead_letter: Some(text.into()),
        };
        let copy = policy("https://dead.example/letters").for_copy().unwrap();
        assert_eq!((copy.callback.protocol, copy.dead_letter), (Protocol::Http, None));
        assert_eq!(policy("udp://h:1").for_copy().unwrap().callback.protocol, Protocol::Udp);
        assert_eq!(policy("ops-team").for_copy(), None);
        assert_eq!(policy("kafka://topic").for_copy(), None);
    }

    #[test]
    fn wrong_retries_name_the_field() {
        let wrong = Retry { attempts_max: 0, ..Retry::default() };
        assert!(wrong.validate().unwrap_err().to_string().contains("max_attempts"));
        let wrong = Retry { interval_max_ms: 1, ..Retry::default() };
        assert!(wrong.validate().unwrap_err().to_string().contains("max_interval_ms"));
        assert!(Retry::default().validate().is_ok());
    }
}
