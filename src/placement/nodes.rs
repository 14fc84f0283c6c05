//! What nodes ask of each other besides Raft: how they are.
//!
//! Every node asks every other about once a second and keeps the answers in [`Cluster`]: from there come who leads a
//! group that is not held here, which node is there to lead, what `boomtool cluster` shows, and what tells the
//! controller that a group has followed its row. An answer is as old as it is; nothing is decided by it that would be
//! wrong a second later.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, join_all};
use openraft::rt::WatchReceiver as _;
use rand::RngExt;
use tokio::time::{Instant, timeout};
use tonic::service::Routes;
use tonic::{Request, Response, Status};

use super::cluster::Heard;
use super::{Cluster, LeaderAt};
use crate::clock::Clock;
use crate::inspect::Digest;
use crate::raft::types::{LogId, term_of};
use crate::raft::{Group, ReplicaId};
use crate::random;
use crate::task::GroupId;
use crate::wire::peer;
use crate::wire::peer::nodes_client::NodesClient;
use crate::wire::peer::nodes_server::{Nodes, NodesServer};

const ASK_EVERY: Duration = Duration::from_secs(1);
/// Of the time between two rounds, this part is left to chance, so that the nodes do not all ask at once.
const JITTER: f64 = 0.2;
const ANSWER_WITHIN: Duration = Duration::from_millis(900);
/// 4,096 groups with nine members each fit several times.
const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Whoever computes digests on this node; see [`super::verify`].
pub trait Digests: Send + Sync + 'static {
    /// Puts a mark into the log of a group that is led here.
    fn mark(&self, group: GroupId, mark: u64) -> BoxFuture<'_, Result<(), String>>;
    fn digest(&self, group: GroupId, mark: u64) -> BoxFuture<'_, Result<Digest, String>>;
}

/// Answers the other nodes; cheap to clone.
#[derive(Clone)]
pub struct NodesService {
    cluster: Cluster,
    clock: Arc<dyn Clock>,
    digests: Arc<dyn Digests>,
}

impl NodesService {
    pub fn new(cluster: Cluster, clock: Arc<dyn Clock>, digests: Arc<dyn Digests>) -> Self {
        Self { cluster, clock, digests }
    }

    /// What is added to the peer listener.
    pub fn routes(self) -> Routes {
        Routes::new(NodesServer::new(self))
    }

    fn check(&self, cluster: &str) -> Result<(), Status> {
        let ours = self.cluster.network().cluster();
        if cluster != ours {
            let why = format!("this node belongs to cluster '{ours}', not '{cluster}'");
            return Err(Status::failed_precondition(why));
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl Nodes for NodesService {
    async fn status(&self, request: Request<peer::StatusRequest>) -> Result<Response<peer::NodeStatus>, Status> {
        self.check(&request.get_ref().cluster)?;
        Ok(Response::new(own_status(&self.cluster, &*self.clock)))
    }

    async fn digest(&self, request: Request<peer::DigestRequest>) -> Result<Response<peer::DigestResponse>, Status> {
        let request = request.into_inner();
        self.check(&request.cluster)?;
        let digest = self.digests.digest(group_id(request.group)?, request.mark).await;
        let Digest { applied, rows, hash } = digest.map_err(Status::unavailable)?;
        let applied = applied.map(|applied| peer::LogId { term: applied.term, index: applied.index });
        Ok(Response::new(peer::DigestResponse { digest: hash.to_vec().into(), rows, applied }))
    }

    async fn mark(&self, request: Request<peer::MarkRequest>) -> Result<Response<peer::MarkResponse>, Status> {
        let request = request.into_inner();
        self.check(&request.cluster)?;
        let marked = self.digests.mark(group_id(request.group)?, request.mark).await;
        marked.map_err(Status::unavailable)?;
        Ok(Response::new(peer::MarkResponse {}))
    }
}

fn group_id(number: u32) -> Result<GroupId, Status> {
    u16::try_from(number).map(GroupId).map_err(|_| Status::invalid_argument("group: there is none of this number"))
}

/// This node as it sees itself.
pub fn own_status(cluster: &Cluster, clock: &dyn Clock) -> peer::NodeStatus {
    let node_id = cluster.node_id();
    let here = cluster.node(node_id);
    let founding = cluster.founding();
    let founder = |(node_id, folder)| peer::Founder { node_id, folder };
    let mut status = peer::NodeStatus {
        node_id,
        clock_us: clock.now_us(),
        stopping: !cluster.takes_leads(),
        groups: cluster.groups().all().iter().map(|group| group_status(cluster, group)).collect(),
        folder: founding.folder,
        founders: founding.founders.into_iter().map(founder).collect(),
        ..Default::default()
    };
    if let Some(here) = here {
        (status.peer, status.tcp, status.http) = (here.peer, here.tcp, here.http);
        (status.zone, status.version) = (here.zone, here.version);
    }
    status
}

fn group_status(cluster: &Cluster, group: &Group) -> peer::GroupStatus {
    let leads = group.leads(Duration::ZERO).is_some();
    let leader = cluster.leader(group.id);
    let metrics = group.raft.metrics();
    let metrics = metrics.borrow_watched();
    let membership = metrics.membership_config.membership();
    let voters: BTreeSet<ReplicaId> = membership.voter_ids().collect();
    let matching = |replica: &ReplicaId| metrics.replication.as_ref()?.get(replica)?.as_ref().map(to_log_id);
    let members = membership.nodes().map(|(replica, member)| peer::GroupMember {
        replica: *replica,
        node_id: member.node_id,
        voter: voters.contains(replica),
        matching: matching(replica),
    });
    let committed = metrics.committed_membership_config == metrics.membership_config;
    peer::GroupStatus {
        group: group.id.0.into(),
        replica: group.replica,
        term: metrics.current_term,
        leads,
        leader_node: leader.map_or(0, |leader| leader.node_id),
        applied: metrics.last_applied.as_ref().map(to_log_id),
        last_index: metrics.last_log_index.unwrap_or(0),
        members: members.collect(),
        joint: membership.get_joint_config().len() > 1 || !committed,
    }
}

fn to_log_id(id: &LogId) -> peer::LogId {
    peer::LogId { term: term_of(id), index: id.index }
}

/// Asks every other node, again and again, until it is dropped.
pub async fn ask_around(cluster: Cluster, clock: Arc<dyn Clock>) {
    let mut random = random::source();
    loop {
        let nodes = cluster.nodes().into_iter().map(|node| node.node_id).filter(|node| *node != cluster.node_id());
        join_all(nodes.map(|node| hear(&cluster, &*clock, node))).await;
        let wait = ASK_EVERY.mul_f64(1.0 + JITTER * (random.random::<f64>() - 0.5));
        let _ = timeout(wait, cluster.asked()).await;
    }
}

async fn hear(cluster: &Cluster, clock: &dyn Clock, node_id: u64) {
    match ask(cluster, clock, node_id).await {
        Ok(heard) => {
            for group in &heard.status.groups {
                let Ok(id) = u16::try_from(group.group).map(GroupId) else { continue };
                if group.leader_node != 0 {
                    cluster.told(id, LeaderAt { node_id: group.leader_node, term: group.term });
                }
            }
            cluster.heard(heard);
        }
        Err(why) => tracing::debug!(node = node_id, why, "a node does not say how it is"),
    }
}

/// Asks one node now.
pub async fn ask(cluster: &Cluster, clock: &dyn Clock, node_id: u64) -> Result<Heard, String> {
    let channel = cluster.network().requests_to(node_id)?;
    let mut client = NodesClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let request = peer::StatusRequest { cluster: cluster.network().cluster().to_owned() };
    let (asked, asked_us) = (Instant::now(), clock.now_us());
    let answer = timeout(ANSWER_WITHIN, client.status(request)).await;
    let answer = answer.map_err(|_| format!("no answer within {ANSWER_WITHIN:?}"))?;
    let status = answer.map_err(|status| status.message().to_owned())?.into_inner();
    if status.node_id != node_id {
        return Err(format!("at its address there is node {}", status.node_id));
    }
    let took = asked.elapsed();
    let halfway_us = asked_us + u64::try_from(took.as_micros() / 2).unwrap_or(0);
    let clock_ahead_us = i64::try_from(i128::from(status.clock_us) - i128::from(halfway_us)).unwrap_or(i64::MAX);
    Ok(Heard { status: Arc::new(status), at: Instant::now(), clock_ahead_us, took })
}
