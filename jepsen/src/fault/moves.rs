//! One replica moves to another node.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use super::{Begun, NotDone};
use crate::cluster::{Cluster, Group};

pub(super) async fn begin(cluster: &Cluster, rng: &mut StdRng) -> Result<Begun, NotDone> {
    let groups: Vec<Group> = cluster.groups().await?.into_iter().filter(|group| group.group > 0).collect();
    let group = groups.choose(rng).ok_or_else(|| NotDone::NotNow("there are no shards".into()))?;
    let held: Vec<u64> = group.replicas.iter().map(|replica| replica.node_id).collect();
    let free: Vec<u64> = cluster.hosts().iter().map(|view| view.node).filter(|node| !held.contains(node)).collect();
    let (source, target) = (held.choose(rng), free.choose(rng));
    let (Some(source), Some(target)) = (source, target) else {
        return Err(NotDone::NotNow(format!("shard {} has nowhere to go", group.group - 1)));
    };
    let (shard, source, target) = ((group.group - 1).to_string(), source.to_string(), target.to_string());
    cluster.ok(&["cluster", "move", &shard, "--from", &source, "--to", &target, "--no-wait"]).await?;
    Ok(Begun::new(format!("shard {shard} from node {source} to node {target}"), async {
        Ok("nothing is taken back".into())
    }))
}
