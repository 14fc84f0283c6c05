//! A disk that something else has filled: nearly, so that the node should see it coming, or to the last block, so that even a
//! small write may fail. Then the node may end by a storage error, and is started when there is room again.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;
use rustix::fs::{FallocateFlags, fallocate, statvfs};
use tokio_util::task::AbortOnDropHandle;

use super::targets::{bring_up, named, one_of, victim};
use super::{Begun, NotDone};
use crate::cluster::links::Host;
use crate::cluster::{Cluster, ClusterError};

const MIB: u64 = 1024 * 1024;

/// A node that has met a full disk has ended by then; one that ends later comes back before the next round.
const END_WITHIN: Duration = Duration::from_secs(1);
/// So often what the node has freed is taken as well.
const TAKE_EVERY: Duration = Duration::from_millis(200);

pub(super) fn begin(cluster: &Cluster, rng: &mut StdRng) -> Result<Begun, NotDone> {
    let host = victim(cluster, rng)?;
    let left = one_of(rng, &[0, MIB, 20 * MIB, 90 * MIB]);
    let greedy = rng.random_bool(0.5);
    if !cluster.has_disks() {
        return Err(NotDone::NotNow("the machines have no disks of their own".into()));
    }
    let failed = |source| ClusterError::Io { what: format!("fill the disk of machine {host}"), source };
    let ballast = ballast(cluster, host)?;
    cluster.fill_disk(host, true)?;
    let taken = match fill(&ballast, left) {
        Ok(taken) => taken,
        Err(error) => {
            make_room(cluster, host)?;
            return Err(failed(error).into());
        }
    };
    let more = if greedy { ", and what is freed is taken" } else { "" };
    let detail = format!("{}: {} MiB taken, {} MiB left{more}", named(cluster, host), taken / MIB, left / MIB);
    let taking = greedy.then(|| AbortOnDropHandle::new(tokio::spawn(take_more(ballast, left))));
    let cluster = cluster.clone();
    Ok(Begun::new(detail, async move {
        if let Some(taking) = taking {
            taking.abort();
            let _ = taking.await;
        }
        make_room(&cluster, host)?;
        // One that found no room has ended, or is about to.
        if !cluster.has_ended(host, END_WITHIN).await? {
            return Ok(format!("machine {host} has room again; its node went on all the while"));
        }
        let took = bring_up(&cluster, host).await?;
        Ok(format!("machine {host} has room again; its node had ended, and is ready after {took:.1?}"))
    }))
}

/// A node keeps room back and frees it when there is no other: that goes too.
async fn take_more(ballast: PathBuf, left: u64) {
    let mut every = tokio::time::interval(TAKE_EVERY);
    loop {
        every.tick().await;
        if let Err(error) = fill(&ballast, left) {
            tracing::warn!(%error, "cannot fill a disk any further");
            return;
        }
    }
}

/// Takes what somebody else had put there away again.
pub(super) fn make_room(cluster: &Cluster, host: Host) -> Result<(), ClusterError> {
    match std::fs::remove_file(ballast(cluster, host)?) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(ClusterError::Io { what: format!("empty the disk of machine {host}"), source })
        }
        _ => cluster.fill_disk(host, false),
    }
}

fn ballast(cluster: &Cluster, host: Host) -> Result<PathBuf, ClusterError> {
    cluster.disk(host).map(|disk| disk.join("ballast"))
}

/// Takes all space but `left`, to the block; how much more that is.
fn fill(ballast: &Path, left: u64) -> io::Result<u64> {
    let file = File::options().create(true).append(true).open(ballast)?;
    let before = file.metadata()?.len();
    let mut most = u64::MAX;
    loop {
        let (room, length) = (statvfs(ballast)?, file.metadata()?.len());
        let take = (room.f_bavail * room.f_frsize).saturating_sub(left).min(most);
        if take < room.f_frsize {
            return Ok(length - before);
        }
        match fallocate(&file, FallocateFlags::empty(), length, take) {
            Ok(()) => {}
            // The file system needs some for itself, and says so only when asked for too much.
            Err(rustix::io::Errno::NOSPC) => most = take / 2,
            Err(error) => return Err(error.into()),
        }
    }
}
