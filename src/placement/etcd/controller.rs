//! The controller: one node at a time, whoever holds the key `controller`, turns nodes and rows into better rows.
//!
//! It knows nothing that another could not find out: the next one looks at the same keys and asks the same nodes, and
//! goes on. Every write asks, in the same transaction, whether this node still holds the key and whether the row is
//! still the one that was looked at; whoever has been away too long, or has read too little, writes nothing.
//!
//! The first rows are written when as many nodes are there as the cluster waits for. Where nodes hold groups already,
//! because etcd was lost or because a node alone becomes a cluster, the rows are taken from what their leaders say.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, Compare, CompareOp, PutOptions, Txn, TxnOp};
use tokio::sync::watch;
use tokio::time::timeout;

use super::register::{Registration, lease_of};
use super::view::{ControllerRow, View, wall_ms};
use super::{EtcdError, Link, absent, answer, backoff, json, node_states, unchanged, wait};
use crate::clock::Clock;
use crate::placement::agent::unsettled;
use crate::placement::nodes::own_status;
use crate::placement::plan::{Nodes, first_rows, plan};
use crate::placement::{Cluster, GroupRow, ReplicaAt, Table};
use crate::raft::ReplicaId;
use crate::task::GroupId;
use crate::wire::peer::NodeStatus;

/// It looks when something has changed, and this often besides.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// And while groups move.
const LOOK_SOON: Duration = Duration::from_millis(300);
/// What was heard within this time counts.
pub const FRESH: Duration = Duration::from_secs(3);
/// Rows in one transaction; etcd takes 128 operations.
const ROWS_AT_A_TIME: usize = 64;
/// Epochs from here on are of rows that were made of groups: seconds, and no counts.
const MADE_ANEW: u64 = 1_000_000_000;

pub struct Controller {
    pub link: Link,
    pub cluster: Cluster,
    pub clock: Arc<dyn Clock>,
    pub shards: u16,
    pub bootstrap_expect: usize,
    pub grace: Duration,
    pub views: watch::Receiver<Arc<View>>,
    pub registration: watch::Receiver<Registration>,
}

impl Controller {
    /// Until it is dropped: waits for its turn, and does the work while it has it.
    pub async fn run(mut self) {
        let mut pauses = backoff();
        while let Some(lease) = lease_of(&mut self.registration).await {
            match self.term(lease).await {
                Ok(()) => pauses = backoff(),
                Err(error) => {
                    tracing::debug!(%error, "the controller stops, or does not begin");
                    wait(&mut pauses).await;
                }
            }
        }
    }

    async fn term(&mut self, lease: i64) -> Result<(), EtcdError> {
        let free = |view: &Arc<View>| view.config.is_some() && view.controller.is_none();
        let mut registration = self.registration.clone();
        tokio::select! {
            free = self.views.wait_for(free) => drop(free.map_err(|_| EtcdError::Failed("nobody watches".into()))?),
            _ = registration.changed() => return Ok(()),
        }
        let mut client = self.link.connect().await?;
        let Some(revision) = self.campaign(&mut client, lease).await? else {
            // Somebody else was quicker; the view will say so.
            let _ = timeout(LOOK_EVERY, self.views.changed()).await;
            return Ok(());
        };
        tracing::info!("this node is the controller");
        let mut seen = false;
        let mut said = None;
        loop {
            let view = self.views.borrow_and_update().clone();
            match &view.controller {
                Some(holder) if holder.created == revision => seen = true,
                _ if seen => break,
                // The view is older than the key.
                _ => {}
            }
            let moving = if seen { self.round(&mut client, &view, revision, &mut said).await? } else { false };
            let wait = if moving { LOOK_SOON } else { LOOK_EVERY };
            tokio::select! {
                _ = timeout(wait, self.views.changed()) => {}
                _ = registration.changed() => break,
            }
        }
        tracing::info!("this node is the controller no longer");
        Ok(())
    }

    /// At which revision this node got the key.
    async fn campaign(&self, client: &mut Client, lease: i64) -> Result<Option<i64>, EtcdError> {
        let row = json(&ControllerRow { node_id: self.cluster.node_id() });
        let put = TxnOp::put(self.link.keys.controller(), row, Some(PutOptions::new().with_lease(lease)));
        let txn = Txn::new().when([absent(self.link.keys.controller())]).and_then([put]);
        let done = answer(client.txn(txn)).await?;
        Ok(done.succeeded().then(|| done.header().map_or(0, |header| header.revision())))
    }

    /// Looks once, and writes what is to be changed. True while something is on its way.
    async fn round(
        &self,
        client: &mut Client,
        view: &View,
        revision: i64,
        said: &mut Option<String>,
    ) -> Result<bool, EtcdError> {
        let nodes = node_states(view, |node| self.is_gone(view, node));
        let replicas = view.config.as_ref().map_or(1, |config| usize::from(config.replicas));
        let mut table = view.table();
        let rows = if table.len() <= usize::from(self.shards) {
            match self.missing_rows(&table, view, &nodes, replicas) {
                Ok(rows) => rows,
                Err(why) => {
                    if said.as_ref() != Some(&why) {
                        tracing::info!(why, "the groups are not made yet");
                        *said = Some(why);
                    }
                    return Ok(false);
                }
            }
        } else {
            let known = self.cluster.table().borrow().clone();
            let ahead =
                |(group, row): &(&GroupId, &GroupRow)| table.get(group).is_some_and(|found| found.epoch < row.epoch);
            let lost: Table = known.iter().filter(ahead).map(|(group, row)| (*group, row.clone())).collect();
            table.extend(lost.clone());
            let unsettled = unsettled(&self.cluster, &*self.clock, &table, FRESH);
            if !unsettled.is_empty() {
                self.cluster.ask_now();
            }
            let mut rows: Table = plan(&table, &nodes, replicas, &unsettled)
                .into_iter()
                .map(|change| (change.group, change.row))
                .collect();
            for (group, row) in &rows {
                tracing::info!(%group, epoch = row.epoch, replicas = ?shown(row), "a row changes");
            }
            for (group, row) in lost {
                rows.entry(group).or_insert(row);
            }
            if rows.is_empty() {
                return Ok(!unsettled.is_empty());
            }
            rows
        };
        let rows: Vec<(GroupId, GroupRow)> = rows.into_iter().collect();
        for rows in rows.chunks(ROWS_AT_A_TIME) {
            if !self.write(client, view, revision, rows).await? {
                tracing::debug!("somebody has changed a row, or the controller is another");
                break;
            }
        }
        Ok(true)
    }

    async fn write(
        &self,
        client: &mut Client,
        view: &View,
        revision: i64,
        rows: &[(GroupId, GroupRow)],
    ) -> Result<bool, EtcdError> {
        let keys = &self.link.keys;
        let ours = Compare::create_revision(keys.controller(), CompareOp::Equal, revision);
        let as_seen = rows.iter().map(|(group, _)| match view.groups.get(group) {
            Some(row) => unchanged(keys.group(*group), row.changed),
            None => absent(keys.group(*group)),
        });
        let when: Vec<Compare> = as_seen.chain([ours]).collect();
        let puts: Vec<TxnOp> =
            rows.iter().map(|(group, row)| TxnOp::put(keys.group(*group), json(row), None)).collect();
        Ok(answer(client.txn(Txn::new().when(when).and_then(puts))).await?.succeeded())
    }

    fn is_gone(&self, view: &View, node: u64) -> bool {
        let away = view.away.get(&node).is_some_and(|away| away.since.elapsed() >= self.grace);
        // It may have lost etcd, and nothing else.
        away && self.cluster.status(node).is_none_or(|heard| heard.at.elapsed() >= self.grace)
    }

    /// The rows of groups that have none, or why they cannot be made yet.
    fn missing_rows(&self, table: &Table, view: &View, nodes: &Nodes, replicas: usize) -> Result<Table, String> {
        let there = view.nodes.keys().filter(|node| !view.drains.contains(node)).count();
        if table.is_empty() && there < self.bootstrap_expect {
            return Err(format!("{there} of {} nodes are there", self.bootstrap_expect));
        }
        let heard = self.cluster.statuses();
        let mut statuses = vec![own_status(&self.cluster, &*self.clock)];
        for node in view.nodes.keys().filter(|node| **node != self.cluster.node_id()) {
            let heard = heard.get(node).filter(|heard| heard.at.elapsed() <= FRESH);
            let heard = heard.ok_or_else(|| format!("node {node} does not say yet what it holds"))?;
            statuses.push((*heard.status).clone());
        }
        let known = self.cluster.table().borrow().clone();
        let held = held_rows(&statuses, &known, wall_ms() / 1_000)?;
        let mut rows = table.clone();
        if is_old(table, &known, &held) {
            // Made anew, a group that is only away would be there twice.
            let away = (0..=self.shards).map(GroupId).find(|id| !table.contains_key(id) && !held.contains_key(id));
            if let Some(away) = away {
                return Err(format!("{away} is held by nobody that is there"));
            }
            tracing::warn!(groups = held.len(), "there are groups without rows: the rows are made of them");
        }
        for (group, row) in held {
            rows.entry(group).or_insert(row);
        }
        let mut all = first_rows(rows, self.shards, nodes, replicas);
        all.retain(|group, _| !table.contains_key(group));
        Ok(all)
    }
}

/// The cluster was there before its rows were. One whose first rows are only half written is not old.
fn is_old(table: &Table, known: &Table, held: &Table) -> bool {
    if table.is_empty() {
        !known.is_empty() || !held.is_empty()
    } else {
        table.values().any(|row| row.epoch >= MADE_ANEW)
    }
}

fn shown(row: &GroupRow) -> Vec<String> {
    let shown = |at: &ReplicaAt| format!("{}{}@{}", at.replica, if at.voter { "" } else { "?" }, at.node_id);
    row.replicas.iter().map(shown).collect()
}

/// Rows for the groups that nodes hold, as their leaders know them. Epochs and replica ids of the rows that were lost may
/// be higher than any that is known: `seconds` since 1970 are higher still, for nothing changes once a second for long.
fn held_rows(statuses: &[NodeStatus], known: &Table, seconds: u64) -> Result<Table, String> {
    let groups = || statuses.iter().flat_map(|status| &status.groups);
    let held: BTreeMap<u32, ReplicaId> =
        groups().filter(|group| !group.members.is_empty()).fold(BTreeMap::new(), |mut held, group| {
            let highest = held.entry(group.group).or_default();
            *highest =
                group.members.iter().map(|member| member.replica).chain([group.replica, *highest]).max().unwrap_or(0);
            held
        });
    let mut rows = Table::new();
    for (number, highest) in held {
        let leader = groups().filter(|group| group.group == number && group.leads && !group.joint);
        let leader = leader.max_by_key(|group| group.term).ok_or_else(|| format!("group {number} has no leader"))?;
        let id = GroupId(u16::try_from(number).map_err(|_| format!("there is no group {number}"))?);
        let mut replicas: Vec<ReplicaAt> = leader
            .members
            .iter()
            .map(|member| ReplicaAt { replica: member.replica, node_id: member.node_id, voter: member.voter })
            .collect();
        replicas.sort_by_key(|at| !at.voter);
        let (epoch, next) = known.get(&id).map_or((0, 0), |row| (row.epoch, row.next_replica));
        let row = GroupRow {
            epoch: seconds.max(epoch + 1).max(MADE_ANEW),
            replicas,
            next_replica: seconds.max(next).max(highest + 1),
        };
        rows.insert(id, row);
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::peer::{GroupMember, GroupStatus};

    #[test]
    fn rows_are_made_of_groups_that_are_there() {
        let member = |replica, node_id, voter| GroupMember { replica, node_id, voter, matching: None };
        let members = vec![member(4, 1, false), member(9, 2, true), member(5, 3, true)];
        let follows = GroupStatus { group: 1, replica: 5, members: members.clone(), ..Default::default() };
        let leads = GroupStatus { replica: 9, leads: true, term: 3, ..follows.clone() };
        let status = |groups: &[GroupStatus]| NodeStatus { groups: groups.to_vec(), ..Default::default() };
        assert_eq!(held_rows(&[status(&[]), status(&[])], &Table::new(), 50).unwrap(), Table::new());
        assert!(
            held_rows(&[status(std::slice::from_ref(&follows))], &Table::new(), 50).unwrap_err().contains("no leader")
        );
        let joint = GroupStatus { joint: true, ..leads.clone() };
        assert!(held_rows(&[status(&[joint])], &Table::new(), 50).is_err());
        let mut known = Table::new();
        known.insert(GroupId(1), GroupRow { epoch: 7, replicas: Vec::new(), next_replica: 12 });
        let statuses = [status(&[follows]), status(&[leads])];
        let rows = held_rows(&statuses, &known, 3).unwrap();
        let row = &rows[&GroupId(1)];
        assert_eq!((row.epoch, row.next_replica), (MADE_ANEW, 12), "a clock that is wrong");
        let rows = held_rows(&statuses, &known, 2 * MADE_ANEW).unwrap();
        let row = &rows[&GroupId(1)];
        assert_eq!((row.epoch, row.next_replica), (2 * MADE_ANEW, 2 * MADE_ANEW));
        let none = Table::new();
        assert!(!is_old(&none, &none, &none) && is_old(&none, &none, &rows) && is_old(&none, &rows, &none));
        assert!(is_old(&rows, &none, &none) && !is_old(&known, &none, &none), "half written");
        assert_eq!(shown(row), ["9@2", "5@3", "4?@1"]);
    }
}
