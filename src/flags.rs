//! What the flags of all rooms share: how a value is read, and the error that names the flag.
//!
//! Each room declares its own flags and checks them; [`crate::settings`] puts them together.

use std::fmt::Display;
use std::time::Duration;

use crate::task::when::parse_duration;

/// A value that cannot be used, by the name of its flag.
#[derive(Debug, thiserror::Error)]
#[error("{flag}: {why}")]
pub struct WrongFlag {
    flag: String,
    why: String,
}

pub fn wrong(flag: &str, why: impl Into<String>) -> WrongFlag {
    WrongFlag { flag: flag.to_owned(), why: why.into() }
}

/// `value`, unless it is below `min` or above `max`.
pub fn within<T: PartialOrd + Display>(flag: &str, value: T, min: T, max: T) -> Result<T, WrongFlag> {
    if value < min || value > max {
        return Err(wrong(flag, format!("{value} is not within {min} and {max}")));
    }
    Ok(value)
}

/// A duration as people write it, for example `10m`.
pub fn duration(flag: &str, text: Option<&str>) -> Result<Option<Duration>, WrongFlag> {
    text.map(|text| parse_duration(text).map_err(|why| wrong(flag, why))).transpose()
}

/// The same, in milliseconds.
pub fn duration_ms(flag: &str, text: Option<&str>) -> Result<Option<u64>, WrongFlag> {
    let duration = duration(flag, text)?;
    Ok(duration.map(|duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)))
}
