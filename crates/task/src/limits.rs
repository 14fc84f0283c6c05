//! The bounds on what a client may ask for. Whatever is beyond them is refused at once, with the limit in the text.

use serde::{Deserialize, Serialize};

use super::{InstantMs, Invalid};

const YEAR_MS: u64 = 365 * 24 * 3600 * 1000;

/// What a node allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How far ahead a task may be due, and how long the interval of a recurring one may be.
    pub delay_max_ms: u64,
    /// Bytes of a payload.
    pub payload_bytes_max: usize,
    /// How short the interval of a recurring task may be, in milliseconds.
    pub interval_min_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        // Five years, and half of what one frame of the default size can carry.
        Self { delay_max_ms: 5 * YEAR_MS, payload_bytes_max: 512 * 1024, interval_min_ms: 100 }
    }
}

/// What one client may ask for, where that is not what the node allows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientLimits {
    /// Milliseconds ahead that a task may be due, and of an interval; `None`: what the node allows, which is the most.
    pub delay_max_ms: Option<u64>,
    /// Bytes of a payload; `None`: what the node allows, which is the most.
    pub payload_bytes_max: Option<u64>,
    /// The shortest interval, in milliseconds; `None`: that of the node. It may be shorter.
    pub interval_min_ms: Option<u64>,
}

impl Limits {
    /// The limits of one client.
    pub fn with(&self, client: ClientLimits) -> Self {
        let payload = client.payload_bytes_max.map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
        Self {
            delay_max_ms: client.delay_max_ms.map_or(self.delay_max_ms, |most| most.min(self.delay_max_ms)),
            payload_bytes_max: payload.map_or(self.payload_bytes_max, |most| most.min(self.payload_bytes_max)),
            interval_min_ms: client.interval_min_ms.unwrap_or(self.interval_min_ms),
        }
    }

    /// Refuses a payload of too many bytes.
    pub fn check_payload(&self, bytes: usize) -> Result<(), Invalid> {
        if bytes > self.payload_bytes_max {
            return Err(Invalid::new(format!("payload: {bytes} bytes, the limit is {} bytes", self.payload_bytes_max)));
        }
        Ok(())
    }

    /// Refuses what is due too far ahead.
    pub fn check_delay(&self, delay_ms: u64) -> Result<(), Invalid> {
        self.check_span("delay_ms", delay_ms)
    }

    /// Refuses an interval that is too long or too short; 0 is none.
    pub fn check_interval(&self, interval_ms: u64) -> Result<(), Invalid> {
        if interval_ms > 0 && interval_ms < self.interval_min_ms {
            let least = self.interval_min_ms;
            return Err(Invalid::new(format!("repeat_interval_ms: {interval_ms} ms, the least is {least} ms")));
        }
        self.check_span("repeat_interval_ms", interval_ms)
    }

    /// An absolute due instant; one in the past is due at once.
    pub fn check_due(&self, due_ms: InstantMs, now_ms: InstantMs) -> Result<(), Invalid> {
        self.check_span("due_ms", due_ms.saturating_sub(now_ms))
    }

    fn check_span(&self, field: &str, span_ms: u64) -> Result<(), Invalid> {
        if span_ms > self.delay_max_ms {
            return Err(Invalid::new(format!(
                "{field}: {span_ms} ms ahead, the limit is {} ms ({} days)",
                self.delay_max_ms,
                self.delay_max_ms / (24 * 3600 * 1000)
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_field_and_limit() {
        let limits = Limits::default();
        assert!(limits.check_delay(limits.delay_max_ms).is_ok());
        let text = limits.check_delay(limits.delay_max_ms + 1).unwrap_err().to_string();
        assert!(text.starts_with("delay_ms") && text.contains("1825 days"), "{text}");
        assert!(limits.check_due(5, 1_000).is_ok(), "a due instant in the past is due at once");
        assert!(limits.check_due(u64::MAX, 0).is_err());
        assert!(limits.check_payload(limits.payload_bytes_max + 1).is_err());
        let client = limits.with(ClientLimits {
            delay_max_ms: Some(10),
            payload_bytes_max: Some(u64::MAX),
            interval_min_ms: Some(5),
        });
        assert!(client.check_delay(11).is_err() && client.payload_bytes_max == limits.payload_bytes_max);
        assert!(client.check_interval(5).is_ok() && client.check_interval(4).is_err());
        assert!(limits.check_interval(0).is_ok(), "none");
        let text = limits.check_interval(99).unwrap_err().to_string();
        assert_eq!(text, "repeat_interval_ms: 99 ms, the least is 100 ms");
    }
}
