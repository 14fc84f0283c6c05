//! Who leads what, and which nodes ended by themselves, as seen from outside.
//!
//! Nodes are asked over HTTP, which asks nothing of the groups themselves. What is seen is written down when it is seen; a
//! leader between two looks may never be.

use std::collections::BTreeMap;
use std::time::Duration;

use boomerang_testkit::page;
use futures::future::join_all;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use super::machine::{State, View};
use super::{Cluster, Weakly};
use crate::history::{FaultNote, Stage, What};

const LOOK_EVERY: Duration = Duration::from_millis(500);
const LOOK_WITHIN: Duration = Duration::from_millis(400);

/// Who leads a group, and since which term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leader {
    pub node: u64,
    pub term: u64,
}

/// What a node knows, as `/v1/shards` shows it.
#[derive(Debug, Deserialize)]
struct Map {
    shards: Vec<Shown>,
    cluster: Shown,
}

#[derive(Debug, Deserialize)]
struct Shown {
    shard: Option<u16>,
    node: Option<u64>,
    term: Option<u64>,
}

impl Map {
    /// By group: the cluster's own is 0, and shard `n` is `n + 1`.
    fn leaders(&self) -> impl Iterator<Item = (u16, Leader)> + '_ {
        self.shards.iter().chain([&self.cluster]).filter_map(|shown| {
            let leader = Leader { node: shown.node?, term: shown.term? };
            Some((shown.shard.map_or(0, |shard| shard + 1), leader))
        })
    }
}

/// Until the cluster is stopped.
pub(super) async fn watch(stopped: CancellationToken, cluster: Weakly) {
    let mut every = tokio::time::interval(LOOK_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    while stopped.run_until_cancelled(every.tick()).await.is_some() {
        let Some(cluster) = cluster.get() else { return };
        look(&cluster).await;
    }
}

async fn look(cluster: &Cluster) {
    for machine in cluster.machines() {
        for detail in machine.ends_to_tell() {
            tracing::warn!(detail);
            cluster.recorder().record(What::Fault(FaultNote { fault: "ended".to_owned(), stage: Stage::Note, detail }));
        }
    }
    let views = cluster.hosts().into_iter().filter(|view| view.state == State::Up);
    let pages = join_all(views.map(page_of)).await;
    for page in pages.into_iter().flatten() {
        if let Ok(map) = serde_json::from_str::<Map>(&page) {
            note(cluster, &map);
        }
    }
}

async fn page_of(view: View) -> Option<String> {
    tokio::time::timeout(LOOK_WITHIN, page(&view.addresses.http, "/v1/shards")).await.ok()?.ok()
}

fn note(cluster: &Cluster, map: &Map) {
    let mut known = cluster.known_leaders();
    for (group, leader) in map.leaders() {
        if newer(&mut known, group, leader) {
            let Leader { node, term } = leader;
            cluster.recorder().record(What::Leads { group, node, term });
        }
    }
}

/// Whether nobody has said so before.
fn newer(known: &mut BTreeMap<u16, Leader>, group: u16, leader: Leader) -> bool {
    let newer = known.get(&group).is_none_or(|known| known.term < leader.term);
    if newer {
        known.insert(group, leader);
    }
    newer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leader_is_news_once_and_an_old_one_never() {
        let page = r#"{"shards":[{"shard":0,"node":2,"term":7,"tcp":"a:1"},{"shard":1,"node":null,"term":null}],
            "cluster":{"node":1,"term":3},"nodes":[]}"#;
        let map: Map = serde_json::from_str(page).unwrap();
        let mut known = BTreeMap::new();
        let news: Vec<u16> = map
            .leaders()
            .filter(|(group, leader)| newer(&mut known, *group, *leader))
            .map(|(group, _)| group)
            .collect();
        assert_eq!(news, [1, 0]);
        assert!(map.leaders().all(|(group, leader)| !newer(&mut known, group, leader)));
        assert!(!newer(&mut known, 1, Leader { node: 3, term: 6 }), "somebody who has not heard");
        assert!(newer(&mut known, 1, Leader { node: 3, term: 8 }));
    }
}
