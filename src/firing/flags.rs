//! The flags of this room: how precise, how far ahead, how much at a time.

use super::FiringSettings;
use crate::flags::{WrongFlag, duration_ms, within, wrong};

/// Whoever wants to look back further wants it somewhere else.
const HISTORY_MS_MAX: u64 = 31 * 24 * 3_600_000;

#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Firing")]
pub struct FiringFlags {
    /// Tick of the timing wheel, in milliseconds [default: 1]
    #[arg(long, value_name = "MS", env = "BOOMERANG_TICK_MS")]
    pub tick_ms: Option<u64>,
    /// Levels of the timing wheel, 64 slots each [default: 4]
    #[arg(long, value_name = "N", env = "BOOMERANG_WHEEL_LEVELS")]
    pub wheel_levels: Option<u32>,
    /// Tasks due within this span are kept in memory [default: 30m]
    #[arg(long, value_name = "DURATION", env = "BOOMERANG_WINDOW")]
    pub window: Option<String>,
    /// Timers in memory at most; the window is shorter when they are reached [default: 4000000]
    #[arg(long, value_name = "N", env = "BOOMERANG_TIMERS_MAX")]
    pub timers_max: Option<usize>,
    /// Callbacks under way at most [default: 16384]
    #[arg(long, value_name = "N", env = "BOOMERANG_IN_FLIGHT_MAX")]
    pub in_flight_max: Option<usize>,
    /// How long it is kept what became of each occurrence, for `boomtool task get`; 0s keeps nothing [default: 24h]
    #[arg(long, value_name = "DURATION", env = "BOOMERANG_HISTORY")]
    pub history: Option<String>,
}

impl FiringFlags {
    pub fn check(self) -> Result<FiringSettings, WrongFlag> {
        let mut settings = FiringSettings::default();
        settings.wheel.tick_ms = self.tick_ms.unwrap_or(settings.wheel.tick_ms);
        settings.wheel.levels = self.wheel_levels.unwrap_or(settings.wheel.levels);
        settings.wheel.validate().map_err(|error| wrong("--tick-ms, --wheel-levels", error.to_string()))?;
        if let Some(window_ms) = duration_ms("--window", self.window.as_deref())? {
            settings.window_ms = within("--window", window_ms, 1_000, 30 * 24 * 3_600_000)?;
        }
        let timers_max = self.timers_max.unwrap_or(settings.timers_max);
        settings.timers_max = within("--timers-max", timers_max, 1_000, 1 << 31)?;
        let in_flight = self.in_flight_max.unwrap_or(settings.in_flight_max);
        settings.in_flight_max = within("--in-flight-max", in_flight, 1, 1 << 20)?;
        if let Some(history_ms) = duration_ms("--history", self.history.as_deref())? {
            settings.history_ms = within("--history", history_ms, 0, HISTORY_MS_MAX)?;
        }
        Ok(settings)
    }
}
