//! What etcd holds of a cluster, as this node has last heard it: keys and values, and nothing that waits.
//!
//! ```text
//!   /boomerang/<cluster>/config         what is the same for all: format, shards, replicas     once
//!                       /ids/<node>     which data folder has the number, and where it was     once, addresses change
//!                       /nodes/<node>   the node is there                                      on its lease
//!                       /drains/<node>  it is to hold nothing                                  by an operator
//!                       /groups/<n>     the replicas of a group                                by the controller
//!                       /controller     who that is                                            on its lease
//! ```
//!
//! Values are JSON, for people with `etcdctl`. What cannot be understood is left out and logged: a newer version may
//! have written it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::placement::{GroupRow, NodeInfo, Table};
use crate::task::{GroupId, InstantMs};

/// The newest format of these keys that this binary writes and understands.
pub const FORMAT: u32 = 1;

/// Fixed when the cluster is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    pub format: u32,
    pub shards: u16,
    pub replicas: u16,
}

/// A node's number, taken for ever.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRow {
    /// The one data folder that may use it.
    pub folder: String,
    /// The node as it was when it last registered.
    pub node: NodeInfo,
}

/// Somebody wants the node to hold nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainRow {
    pub since_ms: InstantMs,
}

/// Who is the controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControllerRow {
    pub node_id: u64,
}

/// The keys of one cluster.
#[derive(Debug, Clone)]
pub struct Keys {
    prefix: String,
}

impl Keys {
    pub fn new(cluster: &str) -> Self {
        Self { prefix: format!("/boomerang/{cluster}/") }
    }

    pub fn all(&self) -> &str {
        &self.prefix
    }

    pub fn config(&self) -> String {
        format!("{}config", self.prefix)
    }

    pub fn controller(&self) -> String {
        format!("{}controller", self.prefix)
    }

    pub fn id(&self, node_id: u64) -> String {
        format!("{}ids/{node_id}", self.prefix)
    }

    pub fn node(&self, node_id: u64) -> String {
        format!("{}nodes/{node_id}", self.prefix)
    }

    pub fn drain(&self, node_id: u64) -> String {
        format!("{}drains/{node_id}", self.prefix)
    }

    pub fn group(&self, group: GroupId) -> String {
        format!("{}groups/{}", self.prefix, group.0)
    }

    pub fn groups(&self) -> String {
        format!("{}groups/", self.prefix)
    }
}

/// A value, and at which revision it became what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored<T> {
    pub value: T,
    pub created: i64,
    pub changed: i64,
}

/// Since when a node has been away, for this node's eyes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Away {
    pub since: Instant,
    pub since_ms: InstantMs,
}

#[derive(Debug, Clone, Default)]
pub struct View {
    pub config: Option<Config>,
    pub ids: BTreeMap<u64, IdRow>,
    pub nodes: BTreeMap<u64, NodeInfo>,
    pub drains: BTreeSet<u64>,
    pub groups: BTreeMap<GroupId, Stored<GroupRow>>,
    pub controller: Option<Stored<ControllerRow>>,
    pub away: BTreeMap<u64, Away>,
}

/// One key that was written or, without a value, removed.
pub struct Change<'a> {
    pub key: &'a [u8],
    pub value: Option<&'a [u8]>,
    pub created: i64,
    pub changed: i64,
}

impl View {
    pub fn apply(&mut self, keys: &Keys, change: &Change<'_>) {
        let key = String::from_utf8_lossy(change.key);
        let Some(rest) = key.strip_prefix(keys.all()) else { return };
        match rest.split_once('/') {
            None if rest == "config" => self.config = value(change),
            None if rest == "controller" => self.controller = stored(change),
            Some(("ids", node)) => put(&mut self.ids, node.parse().ok(), value(change)),
            Some(("nodes", node)) => put(&mut self.nodes, node.parse().ok(), value(change)),
            Some(("drains", node)) => {
                let Ok(node) = node.parse() else { return };
                if change.value.is_some() {
                    self.drains.insert(node);
                } else {
                    self.drains.remove(&node);
                }
            }
            Some(("groups", group)) => put(&mut self.groups, group.parse().ok().map(GroupId), stored(change)),
            _ => tracing::debug!(%key, "a key in etcd that is not known here"),
        }
    }

    /// Notes who is away from now on, and who is not any more.
    pub fn note_away(&mut self) {
        let (since, since_ms) = (Instant::now(), wall_ms());
        let missing: BTreeSet<u64> = self.ids.keys().filter(|node| !self.nodes.contains_key(node)).copied().collect();
        self.away.retain(|node, _| missing.contains(node));
        for node in missing {
            self.away.entry(node).or_insert(Away { since, since_ms });
        }
    }

    pub fn table(&self) -> Table {
        self.groups.iter().map(|(group, row)| (*group, row.value.clone())).collect()
    }

    /// All nodes there ever were, each where it was last.
    pub fn known(&self) -> BTreeMap<u64, NodeInfo> {
        let was = self.ids.iter().map(|(node, row)| (*node, row.node.clone()));
        was.chain(self.nodes.iter().map(|(node, info)| (*node, info.clone()))).collect()
    }
}

pub fn wall_ms() -> InstantMs {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn put<K: Ord, V>(map: &mut BTreeMap<K, V>, key: Option<K>, value: Option<V>) {
    let Some(key) = key else { return };
    match value {
        Some(value) => drop(map.insert(key, value)),
        None => drop(map.remove(&key)),
    }
}

fn value<T: DeserializeOwned>(change: &Change<'_>) -> Option<T> {
    let bytes = change.value?;
    let understood = serde_json::from_slice(bytes);
    if let Err(error) = &understood {
        let key = String::from_utf8_lossy(change.key);
        tracing::warn!(%key, %error, "a value in etcd is not understood");
    }
    understood.ok()
}

fn stored<T: DeserializeOwned>(change: &Change<'_>) -> Option<Stored<T>> {
    Some(Stored { value: value(change)?, created: change.created, changed: change.changed })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(view: &mut View, key: &str, value: Option<&str>) {
        let key = format!("/boomerang/c/{key}");
        let change = Change { key: key.as_bytes(), value: value.map(str::as_bytes), created: 3, changed: 7 };
        view.apply(&Keys::new("c"), &change);
    }

    #[test]
    fn keys_come_and_go() {
        let node =
            |zone: &str| format!(r#"{{"node_id":2,"peer":"p","tcp":"t","http":"h","zone":"{zone}","version":"1"}}"#);
        let mut view = View::default();
        apply(&mut view, "config", Some(r#"{"format":1,"shards":4,"replicas":3}"#));
        apply(&mut view, "ids/2", Some(&format!(r#"{{"folder":"f","node":{}}}"#, node("old"))));
        view.note_away();
        assert!(view.away.contains_key(&2));
        apply(&mut view, "nodes/2", Some(&node("new")));
        view.note_away();
        assert!(view.away.is_empty());
        assert_eq!((view.config.as_ref().unwrap().shards, view.known()[&2].zone.as_str()), (4, "new"));
        let row = r#"{"epoch":2,"replicas":[{"replica":1,"node_id":2,"voter":true}],"next_replica":2}"#;
        apply(&mut view, "groups/3", Some(row));
        assert_eq!((view.table()[&GroupId(3)].epoch, view.groups[&GroupId(3)].changed), (2, 7));
        apply(&mut view, "drains/2", Some(r#"{"since_ms":1}"#));
        assert!(view.drains.contains(&2));
        for gone in ["nodes/2", "drains/2", "groups/3", "controller"] {
            apply(&mut view, gone, None);
        }
        view.note_away();
        assert!(view.nodes.is_empty() && view.drains.is_empty() && view.table().is_empty());
        assert!(view.away.contains_key(&2));
        assert_eq!(view.known()[&2].zone, "old");
    }

    #[test]
    fn what_is_not_understood_is_left_out() {
        let mut view = View::default();
        for (key, value) in [("groups/1", "{"), ("groups/x", "{}"), ("nodes/1", "[]"), ("later/1", "{}"), ("x", "")] {
            apply(&mut view, key, Some(value));
        }
        apply(&mut view, "", Some(""));
        assert!(view.table().is_empty() && view.nodes.is_empty());
    }
}
