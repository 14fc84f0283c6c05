//! The flags of this room: how long a receiver may take, and how much of it at a time.

use std::time::Duration;

use super::CallbackSettings;
use super::guard::Allowed;
use crate::flags::{WrongFlag, duration_ms, within, wrong};

#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Callbacks")]
pub struct CallbackFlags {
    /// How long a receiver may take to answer [default: 10s]
    #[arg(long, value_name = "DURATION", env = "BOOMERANG_CALLBACK_TIMEOUT")]
    pub callback_timeout: Option<String>,
    /// Callbacks under way to one destination at most; 256 where each needs a connection of its own [default: 2048]
    #[arg(long, value_name = "N", env = "BOOMERANG_DESTINATION_IN_FLIGHT_MAX")]
    pub destination_in_flight_max: Option<usize>,
    /// Networks, and ports of them, that callbacks may go to besides the public network: this machine, private networks
    /// and the like are refused otherwise. 'boomerang dev' allows this machine. For example 10.0.0.0/8,127.0.0.1:9000.
    /// Nodes of the cluster and its etcd are refused even so
    #[arg(long, value_name = "CIDR[:PORT],...", env = "BOOMERANG_CALLBACK_ALLOW")]
    pub callback_allow: Option<String>,
}

impl CallbackFlags {
    /// `open`: this machine, too.
    pub fn allowed(&self, open: bool) -> Result<Vec<Allowed>, WrongFlag> {
        let given = self.callback_allow.as_deref().unwrap_or_default();
        let given = given.split(',').map(str::trim).filter(|text| !text.is_empty());
        let allowed = given.map(|text| text.parse::<Allowed>().map_err(|why| wrong("--callback-allow", why)));
        Allowed::loopback().into_iter().filter(|_| open).map(Ok).chain(allowed).collect()
    }

    /// `in_flight_of_all_max`: attempts that all destinations together may have out.
    pub fn check(self, in_flight_of_all_max: usize) -> Result<CallbackSettings, WrongFlag> {
        let mut settings = CallbackSettings { in_flight_of_all_max, ..CallbackSettings::default() };
        if let Some(timeout) = duration_ms("--callback-timeout", self.callback_timeout.as_deref())? {
            settings.answer_timeout = Duration::from_millis(within("--callback-timeout", timeout, 10, 3_600_000)?);
        }
        let for_one = self.destination_in_flight_max.unwrap_or(settings.in_flight_max);
        settings.in_flight_max = within("--destination-in-flight-max", for_one, 1, 1 << 20)?;
        Ok(settings)
    }
}
