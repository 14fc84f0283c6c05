//! Signatures of Standard Webhooks: who sent a delivery, and that nobody changed it or sends it again much later.
//!
//! Signed is `<webhook-id>.<webhook-timestamp>.<body>`, with HMAC-SHA-256. `webhook-signature` holds one or more of
//! `v1,<base64>`, with blanks between: more than one while a secret is being exchanged for another.

use std::time::{SystemTime, UNIX_EPOCH};

use axum::http::HeaderMap;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use boomerang_task::Secret;

/// A signature that is older than this, or further in the future, is not accepted: it may be a copy.
pub const TOLERANCE_S: u64 = 300;

fn mac(secret: &Secret, id: &str, timestamp: &str, body: &[u8]) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(&secret.key()).expect("a key of any length will do");
    for part in [id.as_bytes(), b".", timestamp.as_bytes(), b".", body] {
        mac.update(part);
    }
    mac
}

/// The value of `webhook-signature`. `timestamp` is in seconds since 1970.
pub fn sign(secret: &Secret, id: &str, timestamp: u64, body: &[u8]) -> String {
    let tag = mac(secret, id, &timestamp.to_string(), body).finalize().into_bytes();
    format!("v1,{}", STANDARD.encode(tag))
}

/// Checks the three `webhook-*` headers against the body; an error says what is wrong.
pub fn verify(secret: &Secret, headers: &HeaderMap, body: &[u8], now: SystemTime) -> Result<(), String> {
    let header = |name: &str| {
        let value = headers.get(name).ok_or_else(|| format!("not signed: no header {name}"))?;
        value.to_str().map_err(|_| format!("{name}: is not text"))
    };
    let (id, timestamp, signatures) =
        (header("webhook-id")?, header("webhook-timestamp")?, header("webhook-signature")?);
    let signed_at: u64 = timestamp.parse().map_err(|_| format!("webhook-timestamp: '{timestamp}' is not a number"))?;
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    if now.abs_diff(signed_at) > TOLERANCE_S {
        return Err(format!("webhook-timestamp: {signed_at} is more than {TOLERANCE_S} s away from this clock"));
    }
    let mac = mac(secret, id, timestamp, body);
    let matches = |signature: &str| {
        let tag = signature.strip_prefix("v1,").and_then(|encoded| STANDARD.decode(encoded).ok());
        // In constant time.
        tag.is_some_and(|tag| mac.clone().verify_slice(&tag).is_ok())
    };
    if signatures.split_ascii_whitespace().any(matches) { Ok(()) } else { Err("webhook-signature: is wrong".into()) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn headers(id: &str, timestamp: &str, signature: &str) -> HeaderMap {
        let pairs = [("webhook-id", id), ("webhook-timestamp", timestamp), ("webhook-signature", signature)];
        pairs.into_iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn the_example_of_the_standard_is_right() {
        // From the reference libraries of Standard Webhooks.
        let secret = Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let body = br#"{"test": 2432232314}"#;
        let (id, timestamp) = ("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330);
        let signature = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
        assert_eq!(sign(&secret, id, timestamp, body), signature);
        let now = UNIX_EPOCH + Duration::from_secs(timestamp + TOLERANCE_S);
        verify(&secret, &headers(id, "1614265330", signature), body, now).unwrap();
        verify(&secret, &headers(id, "1614265330", &format!("v1,AAAA v2,x {signature}")), body, now).unwrap();
    }

    #[test]
    fn whatever_is_changed_is_noticed() {
        let secret = Secret::new("plain").unwrap();
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let good = sign(&secret, "a", 1_000_000, b"body");
        verify(&secret, &headers("a", "1000000", &good), b"body", now).unwrap();
        for (headers, body, later, why) in [
            (headers("b", "1000000", &good), "body", 0, "is wrong"),
            (headers("a", "1000001", &good), "body", 0, "is wrong"),
            (headers("a", "1000000", &good), "bodY", 0, "is wrong"),
            (headers("a", "1000000", "v1,AAAA"), "body", 0, "is wrong"),
            (headers("a", "1000000", ""), "body", 0, "is wrong"),
            (headers("a", "1000000", &good), "body", TOLERANCE_S + 1, "away from this clock"),
            (headers("a", "x", &good), "body", 0, "not a number"),
            (HeaderMap::new(), "body", 0, "no header webhook-id"),
        ] {
            let error = verify(&secret, &headers, body.as_bytes(), now + Duration::from_secs(later)).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        let other = Secret::new("other").unwrap();
        assert!(verify(&other, &headers("a", "1000000", &good), b"body", now).is_err());
    }
}
