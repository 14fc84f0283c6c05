//! The bytes of every stored value: a version byte, then the fields.
//!
//! This is the one place that knows `bincode`, which is pinned to 2.0.1 because it is no longer maintained; nothing
//! outside names it, so the encoding can be changed here alone.
//!
//! To change a stored format: add a version with its own `decode` arm that builds the present type from the old bytes,
//! raise [`VERSION`], keep a data folder of the old version under `tests/data/` with a test that opens it, and raise
//! `folder::FORMAT` when an older binary must not open the result. Enums are append only.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::StoreError;

const VERSION: u8 = 4;

fn config() -> impl bincode::config::Config {
    bincode::config::standard()
}

pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    encode_sized(value, 64)
}

/// `encode`, for values whose size is known about.
pub fn encode_sized<T: Serialize>(value: &T, bytes: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes);
    out.push(VERSION);
    bincode::serde::encode_into_std_write(value, &mut out, config()).expect("our types always encode");
    out
}

/// `what` names the value in the error.
pub fn decode<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, StoreError> {
    let (version, body) = bytes.split_first().ok_or_else(|| StoreError::damaged(what, "is empty"))?;
    if *version != VERSION {
        return Err(StoreError::damaged(what, format!("version {version} is unknown, this binary knows {VERSION}")));
    }
    let (value, read) = bincode::serde::decode_from_slice(body, config())
        .map_err(|error| StoreError::damaged(what, error.to_string()))?;
    if read != body.len() {
        return Err(StoreError::damaged(what, format!("{} bytes too many", body.len() - read)));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_is_named_and_never_a_panic() {
        let bytes = encode(&("text".to_owned(), 7u64));
        assert_eq!(decode::<(String, u64)>("pair", &bytes).unwrap(), ("text".to_owned(), 7));
        for cut in 0..bytes.len() {
            let error = decode::<(String, u64)>("pair", &bytes[..cut]).unwrap_err();
            assert!(error.to_string().starts_with("pair is damaged"), "{error}");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(decode::<(String, u64)>("pair", &longer).is_err());
        let mut newer = bytes;
        newer[0] = 9;
        assert!(decode::<(String, u64)>("pair", &newer).unwrap_err().to_string().contains("version 9"));
    }
}
