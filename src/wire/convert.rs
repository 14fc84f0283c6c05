//! From messages to the vocabulary, with checks, and back.

use super::proto::{self, callback_config, retry_policy};
use crate::task::{Backoff, Callback, Invalid, Policy, Protocol, Retry};

/// The cap of an exponential policy that names none.
const INTERVAL_MAX_MS_DEFAULT: u64 = 3_600_000;
/// As long as a callback's endpoint may be. It travels in each log entry that names its policy.
const DESTINATION_BYTES_MAX: usize = 2048;

pub fn callback_from(message: &proto::CallbackConfig) -> Result<Callback, Invalid> {
    let protocol = match callback_config::Protocol::try_from(message.protocol) {
        Ok(callback_config::Protocol::Tcp) => Protocol::Tcp,
        Ok(callback_config::Protocol::Grpc) => Protocol::Grpc,
        Ok(callback_config::Protocol::Http) => Protocol::Http,
        Ok(callback_config::Protocol::Udp) => Protocol::Udp,
        Err(_) => return Err(Invalid::new(format!("callback.protocol: {} is unknown", message.protocol))),
    };
    Callback::new(protocol, &message.endpoint)
}

pub fn callback_to(callback: &Callback) -> proto::CallbackConfig {
    let protocol = match callback.protocol {
        Protocol::Tcp => callback_config::Protocol::Tcp,
        Protocol::Grpc => callback_config::Protocol::Grpc,
        Protocol::Http => callback_config::Protocol::Http,
        Protocol::Udp => callback_config::Protocol::Udp,
    };
    proto::CallbackConfig { protocol: protocol.into(), endpoint: callback.endpoint.to_string() }
}

/// A field that is 0 was not set: proto3 cannot tell the two apart, and the original's clients leave fields out.
pub fn retry_from(message: &proto::RetryPolicy) -> Result<Retry, Invalid> {
    let backoff = match retry_policy::Strategy::try_from(message.strategy) {
        Ok(retry_policy::Strategy::Fixed) => Backoff::Fixed,
        Ok(retry_policy::Strategy::Exponential) => Backoff::Exponential,
        Err(_) => return Err(Invalid::new(format!("retry.strategy: {} is unknown", message.strategy))),
    };
    let interval_max_ms = match (backoff, message.max_interval_ms) {
        (Backoff::Fixed, 0) => message.interval_ms,
        (Backoff::Exponential, 0) => message.interval_ms.max(INTERVAL_MAX_MS_DEFAULT),
        // A fixed pause needs no cap; one that is smaller by mistake must not make the policy unusable.
        (Backoff::Fixed, cap) => cap.max(message.interval_ms),
        (Backoff::Exponential, cap) => cap,
    };
    let retry =
        Retry { attempts_max: message.max_attempts.max(1), backoff, interval_ms: message.interval_ms, interval_max_ms };
    retry.validate()?;
    Ok(retry)
}

pub fn dead_letter_from(message: &proto::DlqPolicy) -> Result<Option<String>, Invalid> {
    let bytes = message.destination.len();
    if bytes > DESTINATION_BYTES_MAX {
        return Err(Invalid::new(format!("dlq.destination: {bytes} bytes, the limit is {DESTINATION_BYTES_MAX}")));
    }
    Ok((bytes > 0).then(|| message.destination.clone()))
}

/// The settings a message carries, each over the default that was there before it.
pub fn policy_over(
    defaults: Option<&Policy>,
    callback: Option<&proto::CallbackConfig>,
    retry: Option<&proto::RetryPolicy>,
    dlq: Option<&proto::DlqPolicy>,
) -> Result<Option<Policy>, Invalid> {
    let callback = match (callback, defaults) {
        (Some(message), _) => callback_from(message)?,
        (None, Some(defaults)) => defaults.callback.clone(),
        // Without a receiver there is nothing the other settings could apply to.
        (None, None) => return Ok(None),
    };
    let retry = match retry {
        Some(message) => retry_from(message)?,
        None => defaults.map_or_else(Retry::default, |defaults| defaults.retry),
    };
    let dead_letter = match dlq {
        Some(message) => dead_letter_from(message)?,
        None => defaults.and_then(|defaults| defaults.dead_letter.clone()),
    };
    Ok(Some(Policy { callback, retry, dead_letter }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_old_client_leaves_out_gets_a_sane_value() {
        let retry = retry_from(&proto::RetryPolicy::default()).unwrap();
        assert_eq!((retry.attempts_max, retry.interval_ms), (1, 0));
        let message = proto::RetryPolicy { max_attempts: 3, interval_ms: 500, strategy: 1, max_interval_ms: 0 };
        assert_eq!(retry_from(&message).unwrap().interval_max_ms, INTERVAL_MAX_MS_DEFAULT);
        assert!(retry_from(&proto::RetryPolicy { strategy: 9, ..message }).is_err());
        assert!(retry_from(&proto::RetryPolicy { max_interval_ms: 1, ..message }).is_err());
    }

    #[test]
    fn a_session_overrides_only_what_it_names() {
        let callback = proto::CallbackConfig { protocol: 0, endpoint: "tcp://h:1".into() };
        let base = policy_over(None, Some(&callback), None, None).unwrap().unwrap();
        let retry = proto::RetryPolicy { max_attempts: 9, ..Default::default() };
        let over = policy_over(Some(&base), None, Some(&retry), None).unwrap().unwrap();
        assert_eq!(over.callback, base.callback);
        assert_eq!(over.retry.attempts_max, 9);
        assert_eq!(policy_over(None, None, Some(&retry), None).unwrap(), None);
        assert_eq!(callback_to(&base.callback).endpoint, "h:1");
    }
}
