//! Times as people write them: durations (`1h30m`), instants (RFC 3339 or milliseconds since 1970), and back.
//!
//! Pure functions over text and numbers; the clock is the caller's. Nothing is guessed: a number without a unit is
//! refused, and so is a count of seconds where milliseconds belong. What is finer than a millisecond rounds up, so that
//! nothing comes early.

use std::time::Duration;

use super::InstantMs;

const SECOND_MS: u64 = 1000;
const DAY_MS: u64 = 24 * 3600 * SECOND_MS;

/// Longest first; in this order they may follow each other.
const UNITS: [(&str, u64); 6] =
    [("w", 7 * DAY_MS), ("d", DAY_MS), ("h", 3600 * SECOND_MS), ("m", 60 * SECOND_MS), ("s", SECOND_MS), ("ms", 1)];

/// Smaller numbers are seconds by mistake: as milliseconds they would be before 1973.
const UNIX_MS_MIN: u64 = 100_000_000_000;

/// The last instant RFC 3339 can name: 9999-12-31T23:59:59.999Z.
const UNIX_MS_MAX: u64 = 253_402_300_799_999;

/// Reads `250ms`, `5s`, `1h30m`, `2d`: numbers with units, the larger unit first, each at most once.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    const HOW: &str = "write it like 250ms, 5s, 1h30m or 2d (units: w d h m s ms)";
    let mut rest = text.trim();
    if rest.is_empty() {
        return Err(format!("is empty; {HOW}"));
    }
    let mut total_ms = 0u64;
    let mut units_left = &UNITS[..];
    while !rest.is_empty() {
        let digits_end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let (digits, tail) = rest.split_at(digits_end);
        if digits.is_empty() {
            return Err(format!("'{text}': a number is missing before '{rest}'; {HOW}"));
        }
        let unit_end = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        if unit.is_empty() {
            return Err(format!("'{text}': {digits} has no unit; {HOW}"));
        }
        let Some(found) = UNITS.iter().position(|(name, _)| *name == unit) else {
            return Err(format!("'{text}': '{unit}' is not a unit; {HOW}"));
        };
        if found < UNITS.len() - units_left.len() {
            return Err(format!("'{text}': units go from large to small, each once; {HOW}"));
        }
        units_left = &UNITS[found + 1..];
        let part_ms = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(UNITS[found].1));
        total_ms = part_ms
            .and_then(|part_ms| total_ms.checked_add(part_ms))
            .ok_or_else(|| format!("'{text}': is longer than time itself"))?;
        rest = tail;
    }
    Ok(Duration::from_millis(total_ms))
}

/// Reads an instant: RFC 3339 with a zone, or milliseconds since 1970.
pub fn parse_instant(text: &str) -> Result<InstantMs, String> {
    const HOW: &str = "write it like 2030-01-31T08:00:00Z, 2030-01-31T08:00:00+02:00, or in milliseconds since 1970";
    let text = text.trim();
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return match text.parse() {
            Ok(ms @ UNIX_MS_MIN..=UNIX_MS_MAX) => Ok(ms),
            Ok(seconds) if seconds < UNIX_MS_MIN => {
                Err(format!("'{text}' looks like seconds; milliseconds are wanted: {text}000"))
            }
            _ => Err(format!("'{text}' is beyond the year 9999; {HOW}")),
        };
    }
    parse_rfc3339(text).ok_or_else(|| format!("'{text}' is not an instant; {HOW}"))
}

/// `YYYY-MM-DDThh:mm:ss[.fraction](Z|+hh:mm|-hh:mm)`. `None` when it is something else, or before 1970.
fn parse_rfc3339(text: &str) -> Option<InstantMs> {
    let bytes = text.as_bytes();
    let number = |from: usize, len: usize| -> Option<u64> {
        let digits = bytes.get(from..from + len)?;
        digits.iter().try_fold(0, |sum, byte| byte.is_ascii_digit().then(|| sum * 10 + u64::from(byte - b'0')))
    };
    let is = |at: usize, choices: &[u8]| bytes.get(at).is_some_and(|byte| choices.contains(byte));
    if !(is(4, b"-") && is(7, b"-") && is(10, b"Tt ") && is(13, b":") && is(16, b":")) {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 2)?, number(8, 2)?);
    let (hour, minute, second) = (number(11, 2)?, number(14, 2)?, number(17, 2)?);
    if !(1..=12).contains(&month) || !(1..=days_of_month(year, month)).contains(&day) {
        return None;
    }
    if hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let mut at = 19;
    let mut fraction_ms = 0;
    if is(at, b".") {
        let digits = bytes[at + 1..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        let millis = digits.min(3);
        fraction_ms = number(at + 1, millis).filter(|_| digits > 0)? * 10u64.pow(3 - millis as u32);
        fraction_ms += u64::from(bytes[at + 1 + millis..at + 1 + digits].iter().any(|byte| *byte != b'0'));
        at += 1 + digits;
    }
    let offset_minutes = match bytes.get(at)? {
        b'Z' | b'z' if bytes.len() == at + 1 => 0,
        sign @ (b'+' | b'-') if bytes.len() == at + 6 && is(at + 3, b":") => {
            let (hours, minutes) = (number(at + 1, 2)?, number(at + 4, 2)?);
            if hours > 23 || minutes > 59 {
                return None;
            }
            let offset = i64::try_from(hours * 60 + minutes).ok()?;
            if *sign == b'+' { offset } else { -offset }
        }
        _ => return None,
    };
    let days = days_since_1970(year, month, day);
    let minutes = (days * 24 + hour as i64) * 60 + minute as i64 - offset_minutes;
    let ms = minutes * 60_000 + (second * 1000 + fraction_ms) as i64;
    u64::try_from(ms).ok()
}

/// Writes an instant as `2030-01-31T08:00:00.000Z`; one beyond the year 9999 as its number.
pub fn format_instant(at_ms: InstantMs) -> String {
    if at_ms > UNIX_MS_MAX {
        return format!("{at_ms} ms");
    }
    let (days, ms) = (at_ms / DAY_MS, at_ms % DAY_MS);
    let (year, month, day) = date_of(days);
    let (hour, minute, second) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", ms % 1000)
}

/// Writes a span as it is read: `1h30m`.
pub fn format_duration(span_ms: u64) -> String {
    let mut text = String::new();
    let mut left_ms = span_ms;
    // Weeks are read and not written: people think in days.
    for (name, unit_ms) in &UNITS[1..] {
        if left_ms >= *unit_ms {
            text.push_str(&format!("{}{name}", left_ms / unit_ms));
            left_ms %= unit_ms;
        }
    }
    if text.is_empty() { "0s".to_owned() } else { text }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_of_month(year: u64, month: u64) -> u64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Years count from March, so that the leap day is the last of its year and months have a formula.
fn days_since_1970(year: u64, month: u64, day: u64) -> i64 {
    let (year, month) = if month > 2 { (year as i64, month - 3) } else { (year as i64 - 1, month + 9) };
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    // 719,468 days lie between March 1 of the year 0 and 1970.
    year * 365 + leap_days + ((153 * month + 2) / 5) as i64 + day as i64 - 1 - 719_468
}

fn date_of(days_since_1970_: u64) -> (u64, u64, u64) {
    // 400 years are 146,097 days.
    let days = days_since_1970_ + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let year = era * 400 + year_of_era;
    if month < 10 { (year, month + 3, day) } else { (year + 1, month - 9, day) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        for (text, ms) in [
            ("250ms", 250),
            ("0s", 0),
            ("5s", 5_000),
            ("1m", 60_000),
            ("1h30m", 5_400_000),
            ("2d", 172_800_000),
            ("1w", 604_800_000),
            ("1d2h3m4s5ms", 93_784_005),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
            if text != "1w" {
                assert_eq!(format_duration(ms), text);
            }
        }
    }

    #[test]
    fn wrong_durations_say_what_is_wrong() {
        for (text, why) in [
            ("", "is empty"),
            ("30", "30 has no unit"),
            ("s", "a number is missing"),
            ("-5s", "a number is missing"),
            ("1.5h", "1 has no unit"),
            ("5y", "'y' is not a unit"),
            ("5 s", "5 has no unit"),
            ("30m1h", "large to small"),
            ("1h1h", "large to small"),
            ("99999999999999999999s", "longer than time"),
            ("99999999999999999w", "longer than time"),
        ] {
            let error = parse_duration(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn instants_are_read_in_both_forms() {
        for (text, ms) in [
            ("2030-01-31T08:00:00Z", 1_896_076_800_000),
            ("2030-01-31T10:00:00+02:00", 1_896_076_800_000),
            ("2030-01-30 22:30:00-09:30", 1_896_076_800_000),
            ("2030-01-31t08:00:00.5z", 1_896_076_800_500),
            ("2030-01-31T08:00:00.0001Z", 1_896_076_800_001),
            ("2030-01-31T08:00:00.123000Z", 1_896_076_800_123),
            ("2024-02-29T00:00:00Z", 1_709_164_800_000),
            ("1970-01-01T00:00:00Z", 0),
            ("1896076800000", 1_896_076_800_000),
        ] {
            assert_eq!(parse_instant(text), Ok(ms), "{text}");
        }
    }

    #[test]
    fn wrong_instants_are_refused() {
        for text in [
            "",
            "tomorrow",
            "2030-01-31",
            "2030-01-31T08:00:00",
            "2030-02-29T08:00:00Z",
            "2030-13-01T08:00:00Z",
            "2030-01-31T24:00:00Z",
            "2030-01-31T08:00:60Z",
            "2030-01-31T08:00:00.Z",
            "2030-01-31T08:00:00+0200",
            "2030-01-31T08:00:00Zx",
            "1969-12-31T23:59:59Z",
            "99999999999999999",
            "2030-01-31T08:00:0\u{e9}Z",
        ] {
            assert!(parse_instant(text).is_err(), "{text}");
        }
        assert!(parse_instant("1896076800").unwrap_err().contains("1896076800000"));
    }

    #[test]
    fn dates_survive_a_round_trip() {
        assert_eq!(format_instant(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(format_instant(UNIX_MS_MAX), "9999-12-31T23:59:59.999Z");
        assert_eq!(format_instant(u64::MAX), format!("{} ms", u64::MAX));
        // Every day of 400 years, which is one whole cycle of the calendar.
        for day in 0..146_097 {
            let at_ms = day * DAY_MS + 45_296_789;
            assert_eq!(parse_rfc3339(&format_instant(at_ms)), Some(at_ms));
        }
    }
}
