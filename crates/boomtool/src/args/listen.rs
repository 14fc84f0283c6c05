//! What can be typed after `boomtool listen`.

use std::str::FromStr;
use std::time::Duration;

use clap::{ArgGroup, Args};

use super::delivery::parse_secret;
use boomerang_task::when::parse_duration;
use boomerang_task::{Protocol, Secret};
use boomerang_wire::proto::Status;

/// `listen`.
#[derive(Debug, Args)]
#[command(
    group = ArgGroup::new("addresses").args(["tcp", "grpc", "http", "udp"]).required(true).multiple(true),
    long_about = "Receive callbacks and print them as they come.\n\n\
        Listens on any number of addresses at once. Each line says when a delivery arrived, by how many milliseconds \
        it was late (measured by the clock of this machine: trust it as far as the clocks agree), how it came, which \
        task, attempt, occurrence and fence it carries, and the payload. DUPLICATE marks a delivery whose occurrence \
        came before with the same or a later attempt or the same fence, STALE one that came after a larger fence. At \
        the end, or on Ctrl-C, a summary follows: on standard output with --quiet, else on standard error.\n\n\
        It can play a bad receiver: slow with --delay, failing with --fail-rate and --status.\n\n\
        With --count, an end before so many deliveries is a failure (exit code 1).",
    after_help = "\
Examples:
  boomtool listen --tcp 127.0.0.1:9980
  boomtool listen --tcp 127.0.0.1:9980 --grpc 127.0.0.1:9981 --http 127.0.0.1:9982 --udp 127.0.0.1:9983
  boomtool listen --tcp 127.0.0.1:0 --count 1000 --quiet --json    # port 0: a free one, named on standard error
  boomtool listen --http 127.0.0.1:9982 --fail-rate 30% --status 503 --retry-after 5s --delay 200ms
  boomtool listen --http 127.0.0.1:9982 --secret whsec_c2VjcmV0    # only what is signed with it"
)]
pub struct Listen {
    /// Address for TCP callbacks; port 0 picks a free one
    #[arg(long, value_name = "HOST:PORT")]
    pub tcp: Vec<String>,
    /// Address for gRPC callbacks
    #[arg(long, value_name = "HOST:PORT")]
    pub grpc: Vec<String>,
    /// Address for HTTP callbacks, HTTP/1.1 and HTTP/2
    #[arg(long, value_name = "HOST:PORT")]
    pub http: Vec<String>,
    /// Address for UDP callbacks
    #[arg(long, value_name = "HOST:PORT")]
    pub udp: Vec<String>,
    /// HTTP: refuse what is not signed with this secret
    #[arg(long, value_name = "TEXT", value_parser = parse_secret)]
    pub secret: Option<Secret>,
    /// Stop after so many deliveries
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Which part of the deliveries fails, at random: 0.3 or 30% [default: all with --status, else none]
    #[arg(long, value_name = "PART", value_parser = parse_part)]
    pub fail_rate: Option<f64>,
    /// What the sender of a failed one is told: a code of HTTP, or for the others a status such as 'error',
    /// 'overloaded'
    ///
    /// Can be given twice, once for HTTP and once for the others. The one follows the other as far as it can. 'ok'
    /// means that nothing fails.
    #[arg(long, value_name = "CODE|STATUS")]
    pub status: Vec<StatusArg>,
    /// HTTP: tell the sender of a failed one to come back no sooner
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub retry_after: Option<Duration>,
    /// How long the sender waits for its answer
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = parse_duration)]
    pub delay: Duration,
    /// Print the summary only
    #[arg(long)]
    pub quiet: bool,
    /// How many characters of a payload are shown
    #[arg(long, value_name = "N", default_value_t = 60)]
    pub width: usize,
}

impl Listen {
    /// Every address with its protocol.
    pub fn addresses(&self) -> impl Iterator<Item = (Protocol, &str)> {
        let tcp = self.tcp.iter().map(|address| (Protocol::Tcp, address.as_str()));
        let grpc = self.grpc.iter().map(|address| (Protocol::Grpc, address.as_str()));
        let http = self.http.iter().map(|address| (Protocol::Http, address.as_str()));
        let udp = self.udp.iter().map(|address| (Protocol::Udp, address.as_str()));
        tcp.chain(grpc).chain(http).chain(udp)
    }

    /// The part of deliveries that fails.
    pub fn failing(&self) -> f64 {
        let ok = self.status.contains(&StatusArg::Status(Status::Ok));
        match self.fail_rate {
            _ if ok => 0.0,
            Some(rate) => rate,
            None if self.status.is_empty() => 0.0,
            None => 1.0,
        }
    }
}

/// A value of `--status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatusArg {
    /// For HTTP.
    Code(u16),
    /// For the others.
    Status(Status),
}

impl FromStr for StatusArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(code) = text.parse() {
            return match code {
                200..=599 => Ok(StatusArg::Code(code)),
                _ => Err(format!("{code} is not a final status of HTTP: 200 to 599")),
            };
        }
        let name = text.to_ascii_uppercase().replace('-', "_");
        Status::from_str_name(&name).map(StatusArg::Status).ok_or_else(|| {
            format!(
                "'{text}' is neither a code of HTTP nor a status: ok, error, unauthorized, invalid-request, \
                 session-expired, not-leader, overloaded, not-found, too-late, conflict"
            )
        })
    }
}

/// `0.3` or `30%`.
fn parse_part(text: &str) -> Result<f64, String> {
    let part = match text.strip_suffix('%') {
        Some(percent) => percent.parse().map(|percent: f64| percent / 100.0),
        None => text.parse(),
    };
    match part {
        Ok(part) if (0.0..=1.0).contains(&part) => Ok(part),
        _ => Err(format!("'{text}' is not a part of all; write it like 0.3 or 30%")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_codes_or_names() {
        assert_eq!("503".parse(), Ok(StatusArg::Code(503)));
        assert_eq!("not-leader".parse(), Ok(StatusArg::Status(Status::NotLeader)));
        assert_eq!("Invalid_Request".parse(), Ok(StatusArg::Status(Status::InvalidRequest)));
        assert!(["99", "600", "100", "teapot", ""].into_iter().all(|text| text.parse::<StatusArg>().is_err()));
    }

    #[test]
    fn parts_are_fractions_or_percentages() {
        assert_eq!([parse_part("0.25"), parse_part("25%"), parse_part("1")], [Ok(0.25), Ok(0.25), Ok(1.0)]);
        assert!(["30", "-1", "101%", "x", "nan"].into_iter().all(|text| parse_part(text).is_err()));
    }
}
