//! From messages to the vocabulary, with checks, and back.

use super::proto::{self, callback_config, recurrence, retry_policy};
use boomerang_task::{
    Backoff, Callback, CallbackOptions, Delivery, Failure, FailureClass, InstantMs, Invalid, Missed, Policy, Protocol,
    Recurrence, Retry, Secret,
};

/// The cap of an exponential policy that names none.
const INTERVAL_MAX_MS_DEFAULT: u64 = 3_600_000;
/// As long as a callback's endpoint may be. It travels in each log entry that names its policy.
const DESTINATION_BYTES_MAX: usize = 2048;

/// Refuses what no callback can be, by the name of the field.
pub fn callback_from(message: &proto::CallbackConfig) -> Result<Callback, Invalid> {
    let protocol = match callback_config::Protocol::try_from(message.protocol) {
        Ok(callback_config::Protocol::Tcp) => Protocol::Tcp,
        Ok(callback_config::Protocol::Grpc) => Protocol::Grpc,
        Ok(callback_config::Protocol::Http) => Protocol::Http,
        Ok(callback_config::Protocol::Udp) => Protocol::Udp,
        Err(_) => return Err(Invalid::new(format!("callback.protocol: {} is unknown", message.protocol))),
    };
    let options = CallbackOptions {
        secret: (!message.secret.is_empty()).then(|| Secret::new(&message.secret)).transpose()?,
        timeout_ms: (message.timeout_ms > 0).then_some(message.timeout_ms),
        acknowledge: message.acknowledge,
        http2: message.http2,
        follow_redirects: message.follow_redirects,
    };
    Callback::new(protocol, &message.endpoint)?.with(options)
}

/// With its secret, for whoever sets it.
pub fn callback_to(callback: &Callback) -> proto::CallbackConfig {
    let secret = callback.options.secret.as_ref().map_or_else(String::new, |secret| secret.expose().to_owned());
    proto::CallbackConfig { secret, ..callback_shown(callback) }
}

/// Without its secret, for whoever looks.
pub fn callback_shown(callback: &Callback) -> proto::CallbackConfig {
    let protocol = match callback.protocol {
        Protocol::Tcp => callback_config::Protocol::Tcp,
        Protocol::Grpc => callback_config::Protocol::Grpc,
        Protocol::Http => callback_config::Protocol::Http,
        Protocol::Udp => callback_config::Protocol::Udp,
    };
    let CallbackOptions { secret: _, timeout_ms, acknowledge, http2, follow_redirects } = callback.options;
    proto::CallbackConfig {
        protocol: protocol.into(),
        endpoint: callback.endpoint.to_string(),
        secret: String::new(),
        timeout_ms: timeout_ms.unwrap_or(0),
        acknowledge,
        http2,
        follow_redirects,
    }
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
    let retry = Retry {
        attempts_max: message.max_attempts.max(1),
        backoff,
        interval_ms: message.interval_ms,
        interval_max_ms,
        jitter_percent: u8::try_from(message.jitter_percent).unwrap_or(u8::MAX),
    };
    retry.validate()?;
    Ok(retry)
}

/// The message of a retry policy.
pub fn retry_to(retry: &Retry) -> proto::RetryPolicy {
    let strategy = match retry.backoff {
        Backoff::Fixed => retry_policy::Strategy::Fixed,
        Backoff::Exponential => retry_policy::Strategy::Exponential,
    };
    proto::RetryPolicy {
        max_attempts: retry.attempts_max,
        strategy: strategy.into(),
        interval_ms: retry.interval_ms,
        max_interval_ms: retry.interval_max_ms,
        jitter_percent: retry.jitter_percent.into(),
    }
}

/// The message of a destination of dead letters.
pub fn dead_letter_to(destination: &str) -> proto::DlqPolicy {
    proto::DlqPolicy { destination: destination.to_owned() }
}

/// The message of a failure at `at_ms`.
pub fn failure_to(failure: &Failure, at_ms: InstantMs) -> proto::Failure {
    proto::Failure { class: failure_class_to(failure.class).into(), text: failure.text.clone(), at_ms }
}

/// The number of a class on the wire.
pub fn failure_class_to(class: FailureClass) -> proto::FailureClass {
    match class {
        FailureClass::Refused => proto::FailureClass::Refused,
        FailureClass::Timeout => proto::FailureClass::Timeout,
        FailureClass::BadStatus => proto::FailureClass::BadStatus,
        FailureClass::BadAnswer => proto::FailureClass::BadAnswer,
        FailureClass::Broken => proto::FailureClass::Broken,
        FailureClass::Unreachable => proto::FailureClass::Unreachable,
        FailureClass::TooLarge => proto::FailureClass::TooLarge,
        FailureClass::CircuitOpen => proto::FailureClass::CircuitOpen,
        FailureClass::Forbidden => proto::FailureClass::Forbidden,
    }
}

/// `None` is any: the number 0.
pub fn failure_class_from(number: i32) -> Result<Option<FailureClass>, Invalid> {
    let class = proto::FailureClass::try_from(number)
        .map_err(|_| Invalid::new(format!("failure_class: {number} is unknown")))?;
    Ok(Some(match class {
        proto::FailureClass::UnknownFailure => return Ok(None),
        proto::FailureClass::Refused => FailureClass::Refused,
        proto::FailureClass::Timeout => FailureClass::Timeout,
        proto::FailureClass::BadStatus => FailureClass::BadStatus,
        proto::FailureClass::BadAnswer => FailureClass::BadAnswer,
        proto::FailureClass::Broken => FailureClass::Broken,
        proto::FailureClass::Unreachable => FailureClass::Unreachable,
        proto::FailureClass::TooLarge => FailureClass::TooLarge,
        proto::FailureClass::CircuitOpen => FailureClass::CircuitOpen,
        proto::FailureClass::Forbidden => FailureClass::Forbidden,
    }))
}

/// `None` when the task is due once; a recurrence without an interval is refused.
pub fn recurrence_from(interval_ms: u64, message: Option<&proto::Recurrence>) -> Result<Option<Recurrence>, Invalid> {
    let Some(message) = message else { return Ok((interval_ms > 0).then(|| Recurrence::every(interval_ms))) };
    let missed = match recurrence::Missed::try_from(message.missed) {
        Ok(recurrence::Missed::Once) => Missed::Once,
        Ok(recurrence::Missed::Skip) => Missed::Skip,
        Ok(recurrence::Missed::All) if message.missed_max == 0 => Missed::All { max: Missed::MAX_DEFAULT },
        Ok(recurrence::Missed::All) => Missed::All { max: message.missed_max },
        Err(_) => return Err(Invalid::new(format!("recurrence.missed: {} is unknown", message.missed))),
    };
    let recurrence = Recurrence {
        interval_ms,
        missed,
        overlap: message.overlap,
        count: (message.count > 0).then_some(message.count),
        until_ms: (message.until_ms > 0).then_some(message.until_ms),
    };
    recurrence.validate(None)?;
    Ok(Some(recurrence))
}

/// The message of a recurrence.
pub fn recurrence_to(recurrence: &Recurrence) -> proto::Recurrence {
    let (missed, missed_max) = match recurrence.missed {
        Missed::Once => (recurrence::Missed::Once, 0),
        Missed::Skip => (recurrence::Missed::Skip, 0),
        Missed::All { max } => (recurrence::Missed::All, max),
    };
    proto::Recurrence {
        missed: missed.into(),
        missed_max,
        overlap: recurrence.overlap,
        count: recurrence.count.unwrap_or(0),
        until_ms: recurrence.until_ms.unwrap_or(0),
    }
}

/// What a receiver is sent, over TCP, gRPC and UDP alike.
pub fn callback_request(delivery: &Delivery) -> proto::CallbackRequest {
    proto::CallbackRequest {
        task_id: delivery.task.to_string(),
        payload: delivery.payload.clone(),
        client_id: delivery.client.to_string(),
        occurrence: delivery.occurrence,
        attempt: delivery.attempt,
        due_ms: delivery.due_ms,
        fence_term: delivery.fence.term,
        fence_seq: delivery.fence.seq,
        name: delivery.name.clone().unwrap_or_default(),
        dead_letter: delivery.dead_letter.as_ref().map(|notice| proto::DeadLetterNotice {
            dead_letter_id: notice.id.to_string(),
            attempts: notice.attempts,
            failure_class: failure_class_to(notice.failure.class).into(),
            error: notice.failure.text.clone(),
            died_ms: notice.id.died_ms,
        }),
    }
}

/// A destination that looks like a URL of ours must be one: a copy that can never be sent is refused here.
pub fn dead_letter_from(message: &proto::DlqPolicy) -> Result<Option<String>, Invalid> {
    let bytes = message.destination.len();
    if bytes > DESTINATION_BYTES_MAX {
        return Err(Invalid::new(format!("dlq.destination: {bytes} bytes, the limit is {DESTINATION_BYTES_MAX}")));
    }
    if let Some(Err(error)) = Callback::from_url(&message.destination) {
        return Err(Invalid::new(format!("dlq.destination: {error}")));
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
        let message = proto::RetryPolicy { max_attempts: 3, interval_ms: 500, strategy: 1, ..Default::default() };
        assert_eq!(retry_from(&message).unwrap().interval_max_ms, INTERVAL_MAX_MS_DEFAULT);
        assert!(retry_from(&proto::RetryPolicy { strategy: 9, ..message }).is_err());
        assert!(retry_from(&proto::RetryPolicy { max_interval_ms: 1, ..message }).is_err());
    }

    #[test]
    fn a_session_overrides_only_what_it_names() {
        let callback = proto::CallbackConfig { endpoint: "tcp://h:1".into(), ..Default::default() };
        let base = policy_over(None, Some(&callback), None, None).unwrap().unwrap();
        let retry = proto::RetryPolicy { max_attempts: 9, ..Default::default() };
        let over = policy_over(Some(&base), None, Some(&retry), None).unwrap().unwrap();
        assert_eq!(over.callback, base.callback);
        assert_eq!(over.retry.attempts_max, 9);
        assert_eq!(policy_over(None, None, Some(&retry), None).unwrap(), None);
        assert_eq!(callback_to(&base.callback).endpoint, "h:1");
    }
}
