//! The clock of Raft for all groups of a node: one task instead of one timer per group.
//!
//! openraft's own ticks are off. Every few milliseconds this looks at every group at once: where this node leads it
//! has a heartbeat sent when one is due, and where it follows and has heard nobody for a lease it asks for an election.
//! All groups beat at the same moment, and the beats to one node share a message (see [`super::heartbeats`]).
//!
//! ```text
//!   leader killed                          lease over      votes are granted
//!        |<-- up to one beat --><----- LEASE ------><- 0..JITTER ->| elected
//! ```
//!
//! A follower grants no vote before its lease is over, so asking sooner would be in vain; asking at random moments
//! after it keeps two of them from asking at once.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use openraft::ServerState;
use openraft::rt::WatchReceiver as _;
use rand::RngExt;
use rand::rngs::SmallRng;
use tokio::time::{Instant, MissedTickBehavior};

use super::groups::{Group, WeakGroups};
use super::{HEARTBEAT, LEASE};
use crate::random;
use crate::task::GroupId;

const LOOK_EVERY: Duration = Duration::from_millis(20);
/// After the lease a follower waits up to this long before it asks for votes, and again before it asks once more.
const JITTER: Duration = Duration::from_millis(140);
/// How long an election is given before the next one.
const ELECTION: Duration = Duration::from_millis(150);

/// When a replica last heard its leader, or gave its vote to one that may become it.
#[derive(Debug, Clone)]
pub struct Heard {
    /// In milliseconds since then.
    since: Instant,
    at: Arc<AtomicU64>,
}

impl Heard {
    /// As if just now: a replica that starts gives the leader time to speak.
    pub fn now() -> Self {
        Self { since: Instant::now(), at: Arc::default() }
    }

    pub fn note(&self) {
        let millis = u64::try_from(self.since.elapsed().as_millis()).expect("a process does not run for an eternity");
        self.at.store(millis, Ordering::Relaxed);
    }

    pub fn within(&self, span: Duration) -> bool {
        self.at().elapsed() < span
    }

    fn at(&self) -> Instant {
        self.since + Duration::from_millis(self.at.load(Ordering::Relaxed))
    }
}

/// What is next for one group.
struct Pace {
    /// Of the replica that this is about; another one begins anew.
    life: u64,
    beat_at: Instant,
    /// Added to the lease.
    jitter: Duration,
    asked_at: Option<Instant>,
}

/// Runs as long as the groups do.
pub(super) async fn run(groups: WeakGroups) {
    let mut paces: BTreeMap<GroupId, Pace> = BTreeMap::new();
    let mut beats = Beats { beginning: Instant::now(), random: random::source() };
    let mut looks = tokio::time::interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        let Some(all) = groups.all() else { return };
        paces.retain(|id, _| all.binary_search_by_key(id, |group| group.id).is_ok());
        let now = Instant::now();
        for group in all {
            let pace = paces.entry(group.id).or_insert_with(|| Pace::new(&group, now, &mut beats));
            if pace.life != group.life {
                *pace = Pace::new(&group, now, &mut beats);
            }
            // A group that has ended is somebody else's business.
            let _ = match pace.look(&group, now, &mut beats) {
                Some(Due::Beat) => group.raft.trigger().heartbeat().await,
                Some(Due::Election) => {
                    tracing::debug!(group = %group.id, "no leader is heard; asking for votes");
                    group.raft.trigger().elect(true).await
                }
                None => Ok(()),
            };
        }
    }
}

enum Due {
    Beat,
    Election,
}

/// What all groups of a node have in common.
struct Beats {
    beginning: Instant,
    random: SmallRng,
}

impl Beats {
    /// The same moment for all groups.
    fn next(&self, now: Instant) -> Instant {
        let beats = now.duration_since(self.beginning).as_millis() / HEARTBEAT.as_millis();
        self.beginning + HEARTBEAT * u32::try_from(beats + 1).unwrap_or(u32::MAX)
    }

    fn jitter(&mut self) -> Duration {
        self.random.random_range(Duration::ZERO..JITTER)
    }
}

impl Pace {
    fn new(group: &Group, now: Instant, beats: &mut Beats) -> Self {
        Self { life: group.life, beat_at: now, jitter: beats.jitter(), asked_at: None }
    }

    fn look(&mut self, group: &Group, now: Instant, beats: &mut Beats) -> Option<Due> {
        // Most looks end here: nothing is due that does not depend on more.
        let silent_until = group.heard.at() + LEASE + self.jitter;
        let next = self.asked_at.map_or(silent_until, |asked| silent_until.max(asked + ELECTION + self.jitter));
        if now < self.beat_at && now < next {
            return None;
        }
        let metrics = group.raft.metrics();
        let metrics = metrics.borrow_watched();
        match metrics.state {
            ServerState::Leader => {
                // A lone replica has nobody to beat to.
                let alone = metrics.membership_config.membership().nodes().count() == 1;
                // One whose node must not lead falls silent, and the others elect another.
                if alone || now < self.beat_at || !group.may_lead() {
                    return None;
                }
                self.beat_at = beats.next(now);
                Some(Due::Beat)
            }
            ServerState::Follower | ServerState::Candidate if now >= next && group.may_lead() => {
                let is_voter = metrics.membership_config.voter_ids().any(|voter| voter == group.replica);
                self.asked_at = Some(now);
                self.jitter = beats.jitter();
                is_voter.then_some(Due::Election)
            }
            _ => {
                self.beat_at = beats.next(now);
                None
            }
        }
    }
}
