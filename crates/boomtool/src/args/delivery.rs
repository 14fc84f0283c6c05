//! Flags that say where a task goes and how often it is tried. The same ones for tasks, updates and clients.

use std::time::Duration;

use clap::{Args, ValueEnum};

use super::millis;
use boomerang_client::OwnSettings;
use boomerang_task::when::parse_duration;
use boomerang_task::{Backoff, Callback, CallbackOptions, Invalid, Protocol, Retry, Secret};

/// Callback, retry and dead-letter settings.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Delivery")]
pub struct PolicyArgs {
    /// Receiver: tcp://host:port, udp://host:port, http(s)://..., grpc(s)://host:port
    #[arg(long, value_name = "URL", value_parser = parse_callback)]
    pub callback: Option<Callback>,
    /// HTTP: sign deliveries with it, as Standard Webhooks say: 'whsec_' and base64, or any other text
    #[arg(long, value_name = "TEXT", value_parser = parse_secret)]
    pub secret: Option<Secret>,
    /// How long the receiver may take to answer
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub callback_timeout: Option<Duration>,
    /// UDP: wait for an answering datagram; without it, sent is done
    #[arg(long)]
    pub ack: bool,
    /// HTTP: version 2 from the start, on a connection without TLS
    #[arg(long)]
    pub http2: bool,
    /// HTTP: follow redirects; without it, a redirect is a failed attempt
    #[arg(long)]
    pub follow_redirects: bool,
    /// How often an occurrence is tried, the first time included
    ///
    /// When one of the five retry flags is given, the others have these defaults: 5 attempts, exponential, 1s, 1m, 0.
    #[arg(long, value_name = "N")]
    pub attempts: Option<u32>,
    /// How the pause between attempts grows
    #[arg(long, value_name = "KIND")]
    pub backoff: Option<BackoffArg>,
    /// The pause after the first attempt
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub retry_interval: Option<Duration>,
    /// The longest pause, with exponential backoff
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub retry_max_interval: Option<Duration>,
    /// Make each pause longer by a random part of it, up to so many percent
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent)]
    pub jitter: Option<u8>,
    /// Where a copy goes when every attempt has failed: a URL like that of --callback, or any text to keep with it
    #[arg(long, value_name = "URL", alias = "dead-letter")]
    pub dead_letters: Option<String>,
}

/// The values of `--backoff`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackoffArg {
    /// Always the same pause
    Fixed,
    /// Twice as long each time
    Exponential,
}

impl PolicyArgs {
    /// The receiver with its options, when it was given.
    pub fn callback(&self) -> Result<Option<Callback>, Invalid> {
        let options = CallbackOptions {
            secret: self.secret.clone(),
            timeout_ms: self.callback_timeout.map(millis),
            acknowledge: self.ack,
            http2: self.http2,
            follow_redirects: self.follow_redirects,
        };
        match &self.callback {
            Some(callback) => callback.clone().with(options).map(Some),
            None if options == CallbackOptions::default() => Ok(None),
            None => Err(Invalid::new(
                "--secret, --callback-timeout, --ack, --http2, --follow-redirects: say more about --callback, which is \
                 missing",
            )),
        }
    }

    /// The retry settings, when any of them was given.
    pub fn retry(&self) -> Result<Option<Retry>, Invalid> {
        let Self { attempts, backoff, retry_interval, retry_max_interval, jitter, .. } = self;
        if attempts.is_none()
            && backoff.is_none()
            && retry_interval.is_none()
            && retry_max_interval.is_none()
            && jitter.is_none()
        {
            return Ok(None);
        }
        let defaults = Retry::default();
        let interval_ms = retry_interval.map_or(defaults.interval_ms, millis);
        let retry = Retry {
            attempts_max: attempts.unwrap_or(defaults.attempts_max),
            backoff: match backoff {
                Some(BackoffArg::Fixed) => Backoff::Fixed,
                Some(BackoffArg::Exponential) => Backoff::Exponential,
                None => defaults.backoff,
            },
            interval_ms,
            interval_max_ms: retry_max_interval.map_or(defaults.interval_max_ms.max(interval_ms), millis),
            jitter_percent: jitter.unwrap_or(defaults.jitter_percent),
        };
        retry.validate()?;
        Ok(Some(retry))
    }

    /// All of them, as a task's own.
    pub fn settings(&self) -> Result<OwnSettings, Invalid> {
        Ok(OwnSettings { callback: self.callback()?, retry: self.retry()?, dead_letters: self.dead_letters.clone() })
    }
}

/// Reads a receiver's URL; its scheme names the protocol.
pub fn parse_callback(url: &str) -> Result<Callback, String> {
    const HOW: &str = "write it like tcp://host:port, udp://host:port, http://host/path, https://host/path or \
        grpc://host:port";
    let Some((scheme, rest)) = url.split_once("://") else {
        return Err(format!("'{url}' has no scheme; {HOW}"));
    };
    let callback = match scheme {
        "grpcs" => Callback::new(Protocol::Grpc, &format!("https://{rest}")),
        _ => match Callback::from_url(url) {
            Some(callback) => callback,
            None => return Err(format!("'{scheme}' is not a protocol of callbacks; {HOW}")),
        },
    };
    callback.map_err(|error| format!("{error}; {HOW}"))
}

pub(super) fn parse_secret(text: &str) -> Result<Secret, String> {
    Secret::new(text).map_err(|error| error.to_string())
}

/// `20` or `20%`.
fn parse_percent(text: &str) -> Result<u8, String> {
    let number = text.strip_suffix('%').unwrap_or(text).parse().ok().filter(|percent| *percent <= 100);
    number.ok_or_else(|| format!("'{text}' is not a percentage; write it like 20, from 0 to 100"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemes_name_protocols() {
        for (url, protocol, endpoint) in [
            ("tcp://h:1", Protocol::Tcp, "h:1"),
            ("udp://[::1]:2", Protocol::Udp, "[::1]:2"),
            ("http://h/x", Protocol::Http, "http://h/x"),
            ("https://h:8443/x?y=1", Protocol::Http, "https://h:8443/x?y=1"),
            ("grpc://h:3", Protocol::Grpc, "h:3"),
            ("grpcs://h:3", Protocol::Grpc, "https://h:3"),
        ] {
            let callback = parse_callback(url).unwrap();
            assert_eq!((callback.protocol, callback.endpoint.as_str()), (protocol, endpoint), "{url}");
        }
    }

    #[test]
    fn options_belong_to_a_callback_that_is_named() {
        let callback = |url: &str| parse_callback(url).unwrap();
        let args = PolicyArgs { callback: Some(callback("udp://h:1")), ack: true, ..Default::default() };
        assert!(args.callback().unwrap().unwrap().options.acknowledge);
        let args = PolicyArgs { callback: Some(callback("tcp://h:1")), ack: true, ..Default::default() };
        assert!(args.callback().unwrap_err().to_string().contains("for udp callbacks"));
        let args = PolicyArgs { secret: Some(Secret::new("x").unwrap()), ..Default::default() };
        assert!(args.callback().unwrap_err().to_string().contains("--callback"));
        assert_eq!(PolicyArgs::default().settings().unwrap(), OwnSettings::default());
    }

    #[test]
    fn one_retry_flag_brings_the_defaults_of_the_others() {
        assert_eq!(PolicyArgs::default().retry().unwrap(), None);
        let args = PolicyArgs { attempts: Some(9), ..Default::default() };
        assert_eq!(args.retry().unwrap(), Some(Retry { attempts_max: 9, ..Retry::default() }));
        let args = PolicyArgs { jitter: Some(9), ..Default::default() };
        assert_eq!(args.retry().unwrap(), Some(Retry { jitter_percent: 9, ..Retry::default() }));
        let args = PolicyArgs { retry_interval: Some(Duration::from_secs(3600)), ..Default::default() };
        assert_eq!(args.retry().unwrap().unwrap().interval_max_ms, 3_600_000, "the cap follows a longer pause");
        let args = PolicyArgs { retry_max_interval: Some(Duration::from_millis(1)), ..Default::default() };
        assert!(args.retry().unwrap_err().to_string().contains("max_interval_ms"));
    }

    #[test]
    fn percentages_have_bounds() {
        assert_eq!(["0", "20", "100%"].map(parse_percent), [Ok(0), Ok(20), Ok(100)]);
        assert!(["101", "-1", "x", "", "1.5"].into_iter().all(|text| parse_percent(text).is_err()));
    }
}
