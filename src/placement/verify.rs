//! Whether the replicas of a group are equal: each computes a digest of its state at the same entry of the log.
//!
//! The leader proposes a *mark*, a number made up for this one look. When the entry that carries it has been applied, a
//! replica pins its state as it is at that moment and reads it on a thread of its own, while the group goes on. The
//! digests are kept for a while, for whoever asks for them by the mark.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::future::{BoxFuture, join_all};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::Cluster;
use super::nodes::Digests;
use crate::inspect::{Digest, DigestThreads};
use crate::propose::{Ask, Proposer};
use crate::raft::{Observer, ReplicaId};
use crate::shard::{Effect, Request};
use crate::store::Store;
use crate::store::rows::{Applied, ShardMetaRow};
use crate::task::GroupId;
use crate::task::locks::Mutex;

/// Whoever has not asked by then has gone.
const KEPT_FOR: Duration = Duration::from_secs(60);
/// A replica that is far behind, or reads millions of rows, takes its time.
const DIGEST_WITHIN: Duration = Duration::from_secs(45);
const MARK_WITHIN: Duration = Duration::from_secs(12);

type Found = Option<Result<Digest, String>>;

struct Mark {
    since: Instant,
    digest: watch::Sender<Found>,
}

/// The digests of this node's replicas.
pub struct Marks {
    store: Store,
    /// Given when there is one; what is asked before is refused.
    proposer: OnceLock<Proposer>,
    marks: Mutex<HashMap<(GroupId, u64), Mark>>,
    threads: DigestThreads,
}

impl Marks {
    pub fn new(store: Store) -> Arc<Self> {
        let threads = DigestThreads::default();
        Arc::new(Self { store, proposer: OnceLock::new(), marks: Mutex::default(), threads })
    }

    /// No digest is computed any more.
    pub fn stop(&self) {
        self.threads.stop();
    }

    pub fn propose_with(&self, proposer: Proposer) {
        let _ = self.proposer.set(proposer);
    }

    /// Whether the entry or the question comes first, they meet here.
    fn sender(&self, group: GroupId, mark: u64) -> watch::Sender<Found> {
        let mut marks = self.marks.lock();
        marks.retain(|_, mark| mark.since.elapsed() < KEPT_FOR);
        let new = || Mark { since: Instant::now(), digest: watch::Sender::new(None) };
        marks.entry((group, mark)).or_insert_with(new).digest.clone()
    }
}

impl Digests for Marks {
    fn mark(&self, group: GroupId, mark: u64) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move {
            let proposer = self.proposer.get().ok_or("the node is starting")?;
            let marked = proposer.ask(group, Ask::Plain(Request::Mark(mark))).await;
            marked.map(|_| ()).map_err(|refused| refused.to_string())
        })
    }

    /// Waits until `mark` has been applied here and the digest is computed.
    fn digest(&self, group: GroupId, mark: u64) -> BoxFuture<'_, Result<Digest, String>> {
        Box::pin(async move {
            let mut found = self.sender(group, mark).subscribe();
            let waited = timeout(DIGEST_WITHIN, found.wait_for(Option::is_some)).await;
            let late = |_| format!("the mark is not applied within {DIGEST_WITHIN:?}");
            waited.map_err(late)?.map_err(|_| "the node stops".to_owned())?.clone().expect("waited for it")
        })
    }
}

impl Observer for Marks {
    fn applied(&self, group: GroupId, _: &ShardMetaRow, effects: &[Effect]) {
        for effect in effects {
            let Effect::Marked { mark } = effect else { continue };
            let sender = self.sender(group, *mark);
            // Nothing of the group is applied before this returns.
            self.threads.digest(self.store.clone(), group, move |digest| {
                sender.send_replace(Some(digest.map_err(|error| error.to_string())));
            });
        }
    }
}

/// What was found of one group.
#[derive(Debug, Clone)]
pub struct Verdict {
    pub group: GroupId,
    /// The digest of each replica, or why there is none.
    pub replicas: Vec<(ReplicaId, u64, Result<Digest, String>)>,
    /// Why nobody was asked.
    pub failed: Option<String>,
}

impl Verdict {
    fn failed(group: GroupId, why: String) -> Self {
        Self { group, replicas: Vec::new(), failed: Some(why) }
    }
}

/// Has all replicas of a group looked at.
pub async fn verify(cluster: &Cluster, here: &dyn Digests, group: GroupId) -> Verdict {
    let Some(leader) = cluster.leader(group) else {
        return Verdict::failed(group, "nobody leads it".into());
    };
    let members = match members(cluster, group, leader.node_id) {
        Ok(members) => members,
        Err(why) => return Verdict::failed(group, why),
    };
    let mark = rand::random();
    if let Err(why) = mark_at(cluster, here, leader.node_id, group, mark).await {
        return Verdict::failed(group, format!("node {} leads it and said: {why}", leader.node_id));
    }
    let replicas = members.into_iter().map(|(replica, node_id)| async move {
        (replica, node_id, digest_of(cluster, here, node_id, group, mark).await)
    });
    Verdict { group, replicas: join_all(replicas).await, failed: None }
}

/// Replica and node of each member, as the leader has said.
fn members(cluster: &Cluster, group: GroupId, leader: u64) -> Result<Vec<(ReplicaId, u64)>, String> {
    if let Some(held) = cluster.groups().get(group) {
        return Ok(held.members().into_iter().map(|(replica, member)| (replica, member.node_id)).collect());
    }
    let heard = cluster.status(leader).ok_or("its leader has said nothing yet")?;
    let found = heard.status.groups.iter().find(|status| status.group == u32::from(group.0));
    let found = found.ok_or("its leader does not hold it")?;
    Ok(found.members.iter().map(|member| (member.replica, member.node_id)).collect())
}

type Client = crate::wire::peer::nodes_client::NodesClient<tonic::transport::Channel>;

fn client(cluster: &Cluster, node_id: u64) -> Result<Client, String> {
    Ok(Client::new(cluster.network().requests_to(node_id)?))
}

async fn mark_at(cluster: &Cluster, here: &dyn Digests, node: u64, group: GroupId, mark: u64) -> Result<(), String> {
    if node == cluster.node_id() {
        return here.mark(group, mark).await;
    }
    let name = cluster.network().cluster().to_owned();
    let request = crate::wire::peer::MarkRequest { cluster: name, group: group.0.into(), mark };
    let mut client = client(cluster, node)?;
    let answer = timeout(MARK_WITHIN, client.mark(request)).await.map_err(|_| "no answer".to_owned())?;
    answer.map(|_| ()).map_err(|status| status.message().to_owned())
}

async fn digest_of(
    cluster: &Cluster,
    here: &dyn Digests,
    node: u64,
    group: GroupId,
    mark: u64,
) -> Result<Digest, String> {
    if node == cluster.node_id() {
        return here.digest(group, mark).await;
    }
    let name = cluster.network().cluster().to_owned();
    let request = crate::wire::peer::DigestRequest { cluster: name, group: group.0.into(), mark };
    let mut client = client(cluster, node)?;
    let answer = timeout(DIGEST_WITHIN, client.digest(request)).await.map_err(|_| "no answer".to_owned())?;
    let answer = answer.map_err(|status| status.message().to_owned())?.into_inner();
    let hash = answer.digest.as_ref().try_into().map_err(|_| "its digest is no digest".to_owned())?;
    let applied = answer.applied.map(|id| Applied { term: id.term, index: id.index });
    Ok(Digest { applied, rows: answer.rows, hash })
}
