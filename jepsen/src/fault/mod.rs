//! What is done to a cluster.
//!
//! One file for each [`Kind`], or for two that are alike: it begins, which returns a [`Begun`], and that ends. A begun fault is
//! always ended, whatever comes in between; a machine that is down after that is brought up before the next round, and
//! [`heal()`] takes back whatever may be left. [`schedule`] says what comes when, from a seed and from nothing else; [`run`](run::run()) does it and writes it
//! down. Whom it hits is chosen when it begins, among those who lead at that time.
//!
//! One machine of three that hold a shard may be away. So a schedule never breaks more than one at a time in a way that takes it
//! away ([`Kind::is_hard`]), except for those kinds whose purpose it is to ask for more: `majority`, `blackout`, and some
//! partitions.

mod clock;
mod disk_full;
mod drain;
mod etcd;
mod heal;
mod kill;
mod links;
mod majority;
mod moves;
mod partition;
mod pause;
mod power;
mod rolling;
pub mod run;
pub mod schedule;
mod targets;
mod torn_log;
mod wipe;

use std::fmt;

use futures::FutureExt;
use futures::future::{BoxFuture, try_join_all};
use rand::rngs::StdRng;

use crate::cluster::links::Host;
use crate::cluster::{Cluster, ClusterError};

pub use clock::EARLY_US_MAX;
pub use heal::heal;

/// What can be done to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Kill,
    Pause,
    Partition,
    Slow,
    Lossy,
    /// Less than is noticed.
    Clock,
    /// By seconds to hours.
    ClockWild,
    DiskFull,
    EtcdKill,
    EtcdCut,
    RollingRestart,
    Drain,
    Move,
    Wipe,
    TornLog,
    /// What was not synced is lost, on one machine.
    Power,
    Majority,
    /// The same on all machines at once.
    Blackout,
}

impl Kind {
    pub const ALL: [Kind; 18] = [
        Kind::Kill,
        Kind::Pause,
        Kind::Partition,
        Kind::Slow,
        Kind::Lossy,
        Kind::Clock,
        Kind::ClockWild,
        Kind::DiskFull,
        Kind::EtcdKill,
        Kind::EtcdCut,
        Kind::RollingRestart,
        Kind::Drain,
        Kind::Move,
        Kind::Wipe,
        Kind::TornLog,
        Kind::Power,
        Kind::Majority,
        Kind::Blackout,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Kill => "kill",
            Kind::Pause => "pause",
            Kind::Partition => "partition",
            Kind::Slow => "slow",
            Kind::Lossy => "lossy",
            Kind::Clock => "clock",
            Kind::ClockWild => "clock-wild",
            Kind::DiskFull => "disk-full",
            Kind::EtcdKill => "etcd-kill",
            Kind::EtcdCut => "etcd-cut",
            Kind::RollingRestart => "rolling-restart",
            Kind::Drain => "drain",
            Kind::Move => "move",
            Kind::Wipe => "wipe",
            Kind::TornLog => "torn-log",
            Kind::Power => "power",
            Kind::Majority => "majority",
            Kind::Blackout => "blackout",
        }
    }

    /// Whether it takes a machine away: no two of these at the same time.
    pub fn is_hard(self) -> bool {
        match self {
            Kind::Kill
            | Kind::Pause
            | Kind::Partition
            | Kind::ClockWild
            | Kind::DiskFull
            | Kind::RollingRestart
            | Kind::Wipe
            | Kind::TornLog
            | Kind::Power
            | Kind::Majority
            | Kind::Blackout => true,
            Kind::Slow | Kind::Lossy | Kind::Clock | Kind::EtcdKill | Kind::EtcdCut | Kind::Drain | Kind::Move => false,
        }
    }

    /// Why it cannot be done to this cluster, if it cannot.
    pub fn impossible(self, cluster: &Cluster) -> Option<&'static str> {
        match self {
            Kind::Partition | Kind::Slow | Kind::Lossy | Kind::EtcdCut if !cluster.has_network() => {
                Some("the machines have no network of their own")
            }
            Kind::DiskFull | Kind::Power | Kind::Blackout if !cluster.has_disks() => {
                Some("the machines have no disks of their own")
            }
            _ => None,
        }
    }

    async fn begin(self, cluster: &Cluster, rng: &mut StdRng) -> Result<Begun, NotDone> {
        match self {
            Kind::Kill => kill::begin(cluster, rng).await,
            Kind::Pause => pause::begin(cluster, rng),
            Kind::Partition => partition::begin(cluster, rng),
            Kind::Slow => links::slow(cluster, rng),
            Kind::Lossy => links::lossy(cluster, rng),
            Kind::Clock => clock::small(cluster, rng),
            Kind::ClockWild => clock::wild(cluster, rng).await,
            Kind::DiskFull => disk_full::begin(cluster, rng),
            Kind::EtcdKill => etcd::kill(cluster).await,
            Kind::EtcdCut => etcd::cut(cluster, rng),
            Kind::RollingRestart => rolling::begin(cluster, rng),
            Kind::Drain => drain::begin(cluster, rng).await,
            Kind::Move => moves::begin(cluster, rng).await,
            Kind::Wipe => wipe::begin(cluster, rng).await,
            Kind::TornLog => torn_log::begin(cluster, rng).await,
            Kind::Power => power::one(cluster, rng).await,
            Kind::Majority => majority::begin(cluster, rng).await,
            Kind::Blackout => power::all(cluster).await,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A fault that has begun. Nothing ends it but [`Begun::end`].
struct Begun {
    /// What exactly.
    detail: String,
    end: BoxFuture<'static, Result<String, ClusterError>>,
}

impl Begun {
    /// `end` says how it went.
    fn new(
        detail: impl Into<String>,
        end: impl Future<Output = Result<String, ClusterError>> + Send + 'static,
    ) -> Self {
        Self { detail: detail.into(), end: end.boxed() }
    }

    /// The nodes of these machines are down, and are started in the end.
    fn down(detail: impl Into<String>, cluster: &Cluster, hosts: Vec<Host>) -> Self {
        let cluster = cluster.clone();
        Self::new(detail, async move {
            // Together: none of them may be ready alone.
            let took = try_join_all(hosts.iter().map(|host| targets::bring_up(&cluster, *host))).await?;
            let most = took.into_iter().max().unwrap_or_default();
            Ok(format!("machines {hosts:?} are ready again, after {most:.1?}"))
        })
    }
}

/// Why a fault did not begin. What it may have taken down by then is brought up before the next round.
#[derive(Debug, thiserror::Error)]
enum NotDone {
    #[error("{0}")]
    NotNow(String),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
}
