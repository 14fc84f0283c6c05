//! Where a callback goes, how often it is tried, and what happens when it never succeeds.
//!
//! A policy is interned: it is stored once per shard under the hash of its content, and tasks name that hash. So a task
//! outlives the session it was registered in, and a million tasks of one client share one policy.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{InstantMs, Invalid};

const ENDPOINT_BYTES_MAX: usize = 2048;
const ATTEMPTS_MAX: u32 = 1_000;
/// No pause between two attempts is longer than this.
const RETRY_INTERVAL_MS_MAX: u64 = 7 * 24 * 3600 * 1000;

/// How a callback travels. Append only: the number is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Protocol {
    Tcp,
    Grpc,
    Http,
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

/// Where a callback goes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Callback {
    pub protocol: Protocol,
    pub endpoint: Endpoint,
}

/// `host:port` for TCP and UDP, a URL for HTTP and gRPC.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Endpoint(String);

impl Endpoint {
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
            Protocol::Grpc | Protocol::Http => endpoint,
        };
        match protocol {
            Protocol::Tcp | Protocol::Udp => check_host_port(endpoint)?,
            Protocol::Http | Protocol::Grpc => {
                let rest = endpoint.strip_prefix("http://").or_else(|| endpoint.strip_prefix("https://"));
                match rest {
                    Some(rest) if !rest.is_empty() && !rest.starts_with('/') => {}
                    Some(_) => return refuse("the URL has no host"),
                    None if protocol == Protocol::Grpc => check_host_port(endpoint)?,
                    None => return refuse("must begin with http:// or https://"),
                }
            }
        }
        Ok(Self { protocol, endpoint: Endpoint(endpoint.to_owned()) })
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
    Fixed,
    Exponential,
}

/// How often one occurrence is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Retry {
    /// The first try included; at least 1.
    pub attempts_max: u32,
    pub backoff: Backoff,
    pub interval_ms: u64,
    pub interval_max_ms: u64,
}

impl Retry {
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
        if self.interval_max_ms < self.interval_ms {
            return Err(Invalid::new("retry.max_interval_ms: is smaller than interval_ms"));
        }
        Ok(())
    }

    /// When to try again after `attempt` (counted from 1) failed; `None` when that was the last one.
    pub fn next_due(&self, attempt: u32, failed_at: InstantMs) -> Option<InstantMs> {
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
        Some(failed_at.saturating_add(pause))
    }
}

impl Default for Retry {
    /// Five tries over about fifteen seconds: rides out a restart of the receiver.
    fn default() -> Self {
        Self { attempts_max: 5, backoff: Backoff::Exponential, interval_ms: 1_000, interval_max_ms: 60_000 }
    }
}

/// Callback, retry and dead-letter settings of a task.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Policy {
    pub callback: Callback,
    pub retry: Retry,
    /// Where a copy of a dead letter goes. The dead letter itself is always stored in the shard.
    pub dead_letter: Option<String>,
}

impl Policy {
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
        let retry = Retry { attempts_max: 4, backoff: Backoff::Exponential, interval_ms: 100, interval_max_ms: 250 };
        let pauses: Vec<_> = (1..=4).map(|attempt| retry.next_due(attempt, 1_000)).collect();
        assert_eq!(pauses, [Some(1_100), Some(1_200), Some(1_250), None]);
        let long = Retry { attempts_max: 1_000, interval_max_ms: u64::MAX, ..retry };
        assert_eq!(long.next_due(999, u64::MAX - 1), Some(u64::MAX));
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
