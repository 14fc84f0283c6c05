//! The flags of this room: how much disk and memory it keeps free, keeps back and uses.

use super::CACHE_BYTES_MAX_DEFAULT;
use crate::flags::{WrongFlag, within};

const MIB: u64 = 1024 * 1024;
const DISK_FREE_MIN_MIB: u64 = 128;
const DISK_RESERVE_MIB: u64 = 64;
/// More than any disk has.
const CACHE_MIB_MAX: usize = 1 << 20;
const DISK_MIB_MAX: u64 = 1 << 40;

#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Disk and memory")]
pub struct StoreFlags {
    /// With less free space than this, in MiB, new tasks are refused [default: 128]
    #[arg(long, value_name = "MIB", env = "BOOMERANG_DISK_FREE_MIN")]
    pub disk_free_min: Option<u64>,
    /// Space kept back, in MiB, for finishing what was accepted when the disk is full [default: 64]
    #[arg(long, value_name = "MIB", env = "BOOMERANG_DISK_RESERVE")]
    pub disk_reserve: Option<u64>,
    /// Memory, in MiB, for parts of the store that are read again. It is used as far as what is stored needs it: 16, and
    /// about 6 for each million tasks; with less, indexes and filters are read from the disk again and again [default: 256]
    #[arg(long, value_name = "MIB", env = "BOOMERANG_CACHE_MAX")]
    pub cache_max: Option<usize>,
}

/// What this room runs with.
#[derive(Debug, Clone, Copy)]
pub struct StoreSettings {
    /// Below this, new tasks are refused.
    pub disk_free_min_bytes: u64,
    /// Kept back for finishing what was accepted, when the disk is full.
    pub disk_reserve_bytes: u64,
    /// See [`super::Store::fit_cache`].
    pub cache_bytes_max: usize,
}

impl StoreFlags {
    pub fn check(self) -> Result<StoreSettings, WrongFlag> {
        let free_min = self.disk_free_min.unwrap_or(DISK_FREE_MIN_MIB);
        let reserve = self.disk_reserve.unwrap_or(DISK_RESERVE_MIB);
        Ok(StoreSettings {
            disk_free_min_bytes: within("--disk-free-min", free_min, 0, DISK_MIB_MAX)? * MIB,
            disk_reserve_bytes: within("--disk-reserve", reserve, 0, DISK_MIB_MAX)? * MIB,
            cache_bytes_max: match self.cache_max {
                None => CACHE_BYTES_MAX_DEFAULT,
                Some(cache) => within("--cache-max", cache, 1, CACHE_MIB_MAX)? * 1024 * 1024,
            },
        })
    }
}
