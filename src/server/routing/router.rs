//! Which node leads what, as seen from here, and what a client is told about it.
//!
//! Every request belongs to a group, or to several, and only the leader of a group answers for it: a follower may be
//! behind. This module says where that leader is and waits until there is one; [`super::forward`] asks it,
//! [`super::batches`] and [`super::pages`] take apart what belongs to several. A node that is alone leads everything, and none of this is on
//! the way of its requests.
//!
//! To lead means two things here. For a write it is a valid lease: the proposer checks it once more, and an entry is
//! appended in the term it was made in or not at all. For a read, this node must also have applied whatever the leaders
//! before it have acknowledged; that is asked of openraft once per term and then remembered.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use openraft::ReadPolicy;
use openraft::rt::WatchReceiver as _;
use rand::RngExt;
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::placement::{Cluster, LeaderAt};
use crate::propose::Turns;
use crate::random;
use crate::sabotage::Fault;
use crate::server::problem::Problem;
use crate::task::locks::RwLock;
use crate::task::{GroupId, Pauses};
use crate::wire::proto;
use crate::wire::routing::Access;

/// A failover takes about a second. Whoever does not follow redirects waits as long as this, and then is refused.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_millis(200);
/// After an election the new leader applies what is left of the log; that takes milliseconds.
const READABLE_WITHIN: Duration = Duration::from_secs(2);
/// How old the list of shards that are led here may be. A refusal makes a new one at once.
const LED_FOR: Duration = Duration::from_millis(50);
/// What this node asks others for at a time, on behalf of its clients; more would only wait there.
const FORWARDED_MAX: usize = 4_096;
/// Told to clients when nobody leads: about half of what an election takes.
const RETRY_AFTER_MS: u64 = 500;

/// Where a request for a group goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::server) enum Route {
    Here,
    At(u64),
    Nobody,
}

pub struct Router {
    cluster: Cluster,
    shards: u16,
    /// By group: the last term of ours in which all that was acknowledged before it was found to be applied.
    readable: Vec<AtomicU64>,
    led: RwLock<Led>,
    turns: Turns,
    forwarded: Arc<Semaphore>,
}

/// The shards this node leads, as of then.
struct Led {
    until: Instant,
    groups: Arc<[GroupId]>,
}

impl Router {
    pub fn new(cluster: Cluster, shards: u16) -> Self {
        Self {
            cluster,
            shards,
            readable: (0..=shards).map(|_| AtomicU64::new(0)).collect(),
            led: RwLock::new(Led { until: Instant::now(), groups: Arc::new([]) }),
            turns: Turns::starting_at(random::source().random()),
            forwarded: Arc::new(Semaphore::new(FORWARDED_MAX)),
        }
    }

    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    pub fn is_alone(&self) -> bool {
        self.cluster.is_alone()
    }

    pub fn all_shards(&self) -> impl Iterator<Item = GroupId> + use<> {
        (1..=self.shards).map(GroupId)
    }

    /// Room among the requests this node asks others for.
    pub(in crate::server) async fn room(&self) -> OwnedSemaphorePermit {
        self.forwarded.clone().acquire_owned().await.expect("the semaphore is never closed")
    }

    /// The term in which this node leads the group now.
    pub(in crate::server) fn leads(&self, group: GroupId) -> Option<u64> {
        self.cluster.groups().get(group)?.leads(Duration::ZERO)
    }

    /// Whether this node is sure now that it may answer for the group.
    pub fn may_serve(&self, group: GroupId, access: Access) -> bool {
        if access == Access::Read && Fault::StaleReads.is_on() && self.cluster.groups().get(group).is_some() {
            return true;
        }
        let Some(term) = self.leads(group) else { return false };
        access == Access::Write || self.readable[usize::from(group.0)].load(Ordering::Acquire) == term
    }

    /// The same, after finding out what is not known yet.
    pub async fn can_serve(&self, group: GroupId, access: Access) -> bool {
        if access == Access::Write || self.may_serve(group, access) {
            return self.leads(group).is_some();
        }
        let Some(here) = self.cluster.groups().get(group) else { return false };
        let Some(term) = here.leads(Duration::ZERO) else { return false };
        let caught_up = here.raft.ensure_linearizable(ReadPolicy::ReadIndex);
        let caught_up = tokio::time::timeout(READABLE_WITHIN, caught_up).await;
        // The same term before and after: what was found out is about this one.
        let sure = matches!(caught_up, Ok(Ok(_))) && here.leads(Duration::ZERO) == Some(term);
        if sure {
            self.readable[usize::from(group.0)].store(term, Ordering::Release);
        }
        sure
    }

    /// Where to go with a request for `group`; `past` could not be reached just now.
    pub(in crate::server) fn route(&self, group: GroupId, past: Option<u64>) -> Route {
        let here = self.cluster.node_id();
        let known = self.cluster.leader(group).map(|leader| leader.node_id);
        let held = self.cluster.groups().get(group).is_some();
        match known {
            Some(node_id) if node_id == here => Route::Here,
            Some(node_id) if held || Some(node_id) != past => Route::At(node_id),
            _ if held => Route::Nobody,
            // Whoever holds a replica of it knows more than this node.
            _ => self.holder(group, past).map_or(Route::Nobody, Route::At),
        }
    }

    /// A node that is to hold `group`, at random.
    fn holder(&self, group: GroupId, past: Option<u64>) -> Option<u64> {
        let table = self.cluster.table().borrow().clone();
        let here = self.cluster.node_id();
        let holders = table.get(&group)?.replicas.iter().map(|at| at.node_id);
        let others: Vec<u64> = holders.filter(|node_id| *node_id != here && Some(*node_id) != past).collect();
        (!others.is_empty()).then(|| others[rand::random_range(0..others.len())])
    }

    /// Another node has said who leads `group`.
    pub(in crate::server) fn told(&self, group: GroupId, leader: LeaderAt) {
        if leader.node_id != 0 && self.cluster.groups().get(group).is_none() {
            self.cluster.told(group, leader);
        }
    }

    fn led(&self) -> Arc<[GroupId]> {
        let now = Instant::now();
        {
            let led = self.led.read();
            if now < led.until {
                return led.groups.clone();
            }
        }
        let groups: Arc<[GroupId]> = self.all_shards().filter(|group| self.leads(*group).is_some()).collect();
        *self.led.write() = Led { until: now + LED_FOR, groups: groups.clone() };
        groups
    }

    /// What was believed to be led here is not.
    pub(in crate::server) fn look_again(&self) {
        self.led.write().until = Instant::now();
    }

    pub(in crate::server) fn leads_any(&self) -> bool {
        !self.led().is_empty()
    }

    /// A shard for `tasks` new tasks, of those led here: each in turn.
    pub(in crate::server) fn shard_here(&self, tasks: usize) -> Option<GroupId> {
        let led = self.led();
        let turn = self.turns.take(tasks);
        (!led.is_empty()).then(|| led[usize::try_from(turn % led.len() as u64).expect("an index")])
    }

    /// Waits until something has changed about `group`, or for a moment.
    async fn changed(&self, group: GroupId, at_most: Duration) {
        // A busy group changes all the time.
        tokio::time::sleep(PAUSE_MIN / 2).await;
        let Some(here) = self.cluster.groups().get(group) else { return tokio::time::sleep(at_most).await };
        let mut metrics = here.raft.metrics();
        tokio::select! {
            _ = metrics.changed() => {}
            () = tokio::time::sleep(at_most) => {}
        }
    }

    /// `NOT_LEADER`, with what is known.
    pub(in crate::server) fn not_leader(&self, group: GroupId) -> Problem {
        let leader = self.cluster.leader(group).filter(|leader| leader.node_id != self.cluster.node_id());
        let address = leader.and_then(|leader| self.cluster.node(leader.node_id)).map(|node| node.tcp);
        // Empty until that node has said it.
        let address = address.filter(|address| !address.is_empty());
        let name = shown(group);
        let text = match (&leader, &address) {
            (Some(leader), Some(address)) => format!("node {} at {address} leads {name}, not this one", leader.node_id),
            _ => format!("nobody leads {name} now, as far as this node knows; nothing was done"),
        };
        let known = address.is_some();
        let detail = proto::Detail {
            leader_address: address.unwrap_or_default(),
            shard: group.shard().map_or(0, |shard| u32::from(shard.0)),
            term: leader.filter(|_| known).map_or(0, |leader| leader.term),
            retry_after_ms: if known { 0 } else { RETRY_AFTER_MS },
            ..Default::default()
        };
        Problem::not_leader(text, detail)
    }

    /// The answer to a request for the map.
    pub(in crate::server) fn map(&self) -> proto::ShardMapResponse {
        let leader = |group| {
            let leader = self.cluster.leader(group).unwrap_or(LeaderAt { node_id: 0, term: 0 });
            proto::ShardLeader { node_id: leader.node_id, term: leader.term }
        };
        let nodes = self.cluster.nodes().into_iter().filter(|node| !node.tcp.is_empty());
        proto::ShardMapResponse {
            shards: self.all_shards().map(leader).collect(),
            cluster: Some(leader(GroupId::CLUSTER)),
            nodes: nodes.map(|node| proto::NodeAddress { node_id: node.node_id, address: node.tcp }).collect(),
            ..Default::default()
        }
    }

    /// The same for people, in JSON.
    pub fn shown_map(&self) -> ShownMap {
        let nodes = self.cluster.nodes().into_iter();
        ShownMap {
            shards: self.all_shards().map(|group| self.shown_leader(group)).collect(),
            cluster: self.shown_leader(GroupId::CLUSTER),
            nodes: nodes.map(|node| ShownNode { node: node.node_id, tcp: node.tcp, http: node.http }).collect(),
        }
    }

    pub fn shown_leader(&self, group: GroupId) -> ShownLeader {
        let leader = self.cluster.leader(group);
        let node = leader.and_then(|leader| self.cluster.node(leader.node_id));
        ShownLeader {
            shard: group.shard().map(|shard| shard.0),
            node: leader.map(|leader| leader.node_id),
            term: leader.map(|leader| leader.term),
            tcp: node.as_ref().map(|node| node.tcp.clone()).filter(|address| !address.is_empty()),
            http: node.map(|node| node.http).filter(|address| !address.is_empty()),
        }
    }
}

/// How a group is called towards clients.
pub(super) fn shown(group: GroupId) -> String {
    group.shard().map_or_else(|| "the cluster's own group".to_owned(), |shard| format!("shard {shard}"))
}

/// Who leads a group, as `/v1/shards` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ShownLeader {
    /// None for the cluster's own group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shard: Option<u16>,
    pub node: Option<u64>,
    pub term: Option<u64>,
    pub tcp: Option<String>,
    pub http: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ShownNode {
    pub node: u64,
    pub tcp: String,
    pub http: String,
}

/// What `/v1/shards` answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ShownMap {
    pub shards: Vec<ShownLeader>,
    pub cluster: ShownLeader,
    pub nodes: Vec<ShownNode>,
}

/// How long somebody is kept waiting, with pauses that grow and differ.
pub(super) struct Patience {
    until: Instant,
    pauses: Pauses,
}

impl Patience {
    pub fn new() -> Self {
        Self { until: Instant::now() + PATIENCE, pauses: Pauses::new(PAUSE_MIN, PAUSE_MAX) }
    }

    /// Waits for news of `group`. False when it has been long enough.
    pub async fn wait(&mut self, router: &Router, group: GroupId) -> bool {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        router.changed(group, self.pauses.next(rand::random()).min(left)).await;
        true
    }
}
