//! Clocks that are wrong: by less than is noticed, on several machines at once; or wildly, on one.
//!
//! A node reads its clocks from a file that only tests give it (`--test-clock`). Set while it runs, a jump is slewed; set before it
//! starts, it is the time. A node whose clock was wild is started again in the end, since it would follow the right time
//! for hours.

use rand::RngExt;
use rand::rngs::StdRng;

use super::targets::{bring_up, named, one_of, shuffled, victim};
use super::{Begun, NotDone};
use crate::cluster::links::Host;
use crate::cluster::{Cluster, ClusterError, Skew};

/// No further from the truth is a clock of the small kind, in either direction, drift included: what is due may be
/// early by as much.
const SMALL_US_MAX: u64 = 300_000;
/// Of that, what is set at the beginning; the rest is for drift.
const OFFSET_US_MAX: i64 = 200_000;
/// In a minute, this is 60 ms.
const DRIFT_PPM_MAX: i64 = 1_000;
const SECOND_US: i64 = 1_000_000;
/// A node stops firing when it finds itself further than that from the median of all; see `placement::clock_guard`.
const GUARD_US: u64 = 500_000;
/// It looks once a second; meanwhile a clock that is slewed gains a tenth, and one that drifts a twentieth besides. The rest is
/// for a look that is lost with its packet.
const UNNOTICED_US: u64 = 300_000;

/// So early may be what is due while clocks are wrong; nothing else makes anything early. A median of clocks that are wrong
/// is as wrong as they are, so these add up.
pub const EARLY_US_MAX: u64 = SMALL_US_MAX + GUARD_US + UNNOTICED_US;

pub(super) fn small(cluster: &Cluster, rng: &mut StdRng) -> Result<Begun, NotDone> {
    let hosts = shuffled(cluster, rng);
    let count = rng.random_range(1..=hosts.len());
    let mut details = Vec::new();
    for host in &hosts[..count] {
        let offset_us = rng.random_range(-OFFSET_US_MAX..=OFFSET_US_MAX);
        let drift_ppm = rng.random_range(-DRIFT_PPM_MAX..=DRIFT_PPM_MAX);
        cluster.set_clock(*host, Skew { offset_us, drift_ppm })?;
        details.push(format!("machine {host} by {} ms and {drift_ppm} ppm", offset_us / 1000));
    }
    let (wrong, cluster) = (hosts[..count].to_vec(), cluster.clone());
    Ok(Begun::new(details.join(", "), async move {
        wrong.iter().try_for_each(|host| cluster.set_clock(*host, Skew::default()))?;
        Ok(format!("clocks of machines {wrong:?} are right, and are followed"))
    }))
}

pub(super) async fn wild(cluster: &Cluster, rng: &mut StdRng) -> Result<Begun, NotDone> {
    let host = victim(cluster, rng)?;
    let (seconds, ahead) = (one_of(rng, &[2, 30, 600, 3 * 3_600, 40 * 3_600]), rng.random_bool(0.5));
    let (drift_ppm, restarted) = (one_of(rng, &[0, 0, 50_000, -50_000]), rng.random_bool(0.5));
    let offset_us = if ahead { seconds * SECOND_US } else { -seconds * SECOND_US };
    let name = named(cluster, host);
    cluster.set_clock(host, Skew { offset_us, drift_ppm })?;
    let how = if restarted { "and started with that" } else { "while it runs" };
    let detail =
        format!("{name}: clock {} by {seconds} s, {drift_ppm} ppm, {how}", if ahead { "ahead" } else { "back" });
    let cluster = cluster.clone();
    if restarted && let Err(error) = restart(&cluster, host).await {
        cluster.set_clock(host, Skew::default())?;
        return Err(error.into());
    }
    Ok(Begun::new(detail, async move {
        let took = set_right(&cluster, host).await?;
        Ok(format!("clock of machine {host} is right; started with that, ready after {took:.1?}"))
    }))
}

/// Whether it gets ready with such a clock is its own affair.
async fn restart(cluster: &Cluster, host: Host) -> Result<(), ClusterError> {
    cluster.kill_node(host).await?;
    cluster.start_node(host).await
}

/// The right time, from a start on.
pub(super) async fn set_right(cluster: &Cluster, host: Host) -> Result<std::time::Duration, ClusterError> {
    cluster.set_clock(host, Skew::default())?;
    cluster.kill_node(host).await?;
    bring_up(cluster, host).await
}
