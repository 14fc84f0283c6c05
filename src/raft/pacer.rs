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
use std::time::Duration;

use openraft::ServerState;
use openraft::rt::WatchReceiver as _;
use rand::RngExt;
use rand::rngs::SmallRng;
use tokio::time::{Instant, MissedTickBehavior};

use super::groups::{Group, WeakGroups};
use super::lease::Proof;
use super::network::PeerNetwork;
use super::{HEARTBEAT, LEASE};
use crate::random;
use crate::task::GroupId;
use crate::wire::peer;

const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How often the other nodes are asked for their promises: often enough for three to be lost in a row.
const BIND_EVERY: Duration = Duration::from_millis(100);
/// After the lease a follower waits up to this long before it asks for votes, and again before it asks once more.
const JITTER: Duration = Duration::from_millis(140);
/// How long an election is given before the next one.
const ELECTION: Duration = Duration::from_millis(150);

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
pub(super) async fn run(groups: WeakGroups, network: PeerNetwork) {
    let mut paces: BTreeMap<GroupId, Pace> = BTreeMap::new();
    let mut beats = Beats { beginning: Instant::now(), random: random::source() };
    let mut bind_at = Instant::now();
    let mut looks = tokio::time::interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        let Some(all) = groups.all() else { return };
        paces.retain(|id, _| all.binary_search_by_key(id, |group| group.id).is_ok());
        let now = Instant::now();
        if now >= bind_at {
            bind_at = now + BIND_EVERY;
            let mut binds = Binds::default();
            all.iter().for_each(|group| binds.add(group));
            binds.send(&network);
        }
        // One that is lost is no reason to refuse anything: others lead by then.
        let ages = all.iter().filter_map(Group::lease_age).filter(|age| *age < LEASE);
        groups.set_lease_age(ages.max().unwrap_or_default());
        for group in all {
            let pace = paces.entry(group.id).or_insert_with(|| Pace::new(&group, now, &mut beats));
            if pace.life != group.life {
                *pace = Pace::new(&group, now, &mut beats);
            }
            // A group that has ended is somebody else's business.
            match pace.look(&group, now, &mut beats) {
                Some(DueMessage::Beat) => {
                    network.spawn_urgent(async move { drop(group.raft.trigger().heartbeat().await) });
                }
                Some(DueMessage::Election) if group.promise.stand() => {
                    tracing::debug!(group = %group.id, "no leader is heard; asking for votes");
                    network.spawn_urgent(async move {
                        let _ = group.raft.trigger().elect(true).await;
                        stood(group);
                    });
                }
                Some(DueMessage::Election) | None => {}
            }
        }
    }
}

/// Waits until the group has dealt with what it was asked for before, and says that its candidacy has begun.
pub(super) fn stood(group: Group) {
    tokio::spawn(async move {
        // It deals with one after the other. When it is gone, it will not vote any more.
        let _ = group.raft.with_raft_state(|_| ()).await;
        group.promise.stood();
    });
}

/// What the other nodes are asked to promise, for all groups that are led here.
#[derive(Default)]
struct Binds {
    by_node: BTreeMap<u64, Vec<(peer::Bind, Proof)>>,
}

impl Binds {
    fn add(&mut self, group: &Group) {
        let Some((term, others)) = group.wishes_bound() else { return };
        for (replica, node_id) in others {
            let bind = peer::Bind { group: group.id.0.into(), replica, term };
            self.by_node.entry(node_id).or_default().push((bind, group.proof.clone()));
        }
    }

    fn send(self, network: &PeerNetwork) {
        for (node_id, asked) in self.by_node {
            let from = network.clone();
            network.spawn_urgent(async move {
                let binds = asked.iter().map(|(bind, _)| *bind).collect();
                let sent = Instant::now();
                let Some(promised) = from.bind(node_id, binds, LEASE).await else { return };
                for ((bind, proof), promised) in asked.into_iter().zip(promised) {
                    if promised {
                        proof.note(bind.term, bind.replica, sent);
                    }
                }
            });
        }
    }
}

enum DueMessage {
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

    fn look(&mut self, group: &Group, now: Instant, beats: &mut Beats) -> Option<DueMessage> {
        // Most looks end here: nothing is due that does not depend on more.
        let silent_until = group.promise.heard_at() + LEASE + self.jitter;
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
                Some(DueMessage::Beat)
            }
            ServerState::Follower | ServerState::Candidate if now >= next && group.may_lead() => {
                let is_voter = metrics.membership_config.voter_ids().any(|voter| voter == group.replica);
                self.asked_at = Some(now);
                self.jitter = beats.jitter();
                is_voter.then_some(DueMessage::Election)
            }
            _ => {
                self.beat_at = beats.next(now);
                None
            }
        }
    }
}
