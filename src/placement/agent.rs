//! What this node holds: it hosts what the table names it for, and releases what it does not.
//!
//! A replica comes before its group knows of it, and waits; it goes only when the group says that it has gone without
//! it. A row that does not name a replica is a wish: until the leader's committed membership agrees, that replica may be
//! a voter, and what it has stored may be what makes an acknowledged request safe. Replica ids are not used again, so a
//! leader that has been heard without it will never count on it again.
//!
//! In epoch 1 the voters of a row begin the group together; in any later one the group is there already, and whoever
//! comes waits to be spoken to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::nodes::{ask, own_status};
use super::plan::Unsettled;
use super::{Cluster, GroupRow, Table};
use crate::clock::Clock;
use crate::raft::groups::GroupError;
use crate::raft::{Begin, Group, Member};
use crate::sabotage::Fault;
use crate::task::GroupId;
use crate::wire::peer::{GroupMember, GroupStatus, NodeStatus};

/// What could not be done is tried again, and whoever goes is looked for, this often.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What becomes of a replica that is held here, or not.
#[derive(Debug, PartialEq, Eq)]
enum Duty {
    Nothing,
    Host(Begin),
    /// If the group says so.
    LetGo,
}

fn duty(row: &GroupRow, node_id: u64, held: Option<u64>) -> Duty {
    match (row.on(node_id), held) {
        (Some(at), Some(replica)) if at.replica != replica => Duty::LetGo,
        (None, Some(_)) => Duty::LetGo,
        (Some(_), Some(_)) if row.epoch > 1 => Duty::Nothing,
        (Some(at), _) => Duty::Host(begin(row, at.replica, at.voter)),
        (None, None) => Duty::Nothing,
    }
}

fn begin(row: &GroupRow, replica: u64, voter: bool) -> Begin {
    if row.epoch > 1 || !voter {
        return Begin::Wait { replica };
    }
    let members: BTreeMap<u64, Member> = row.voters().map(|at| (at.replica, Member { node_id: at.node_id })).collect();
    Begin::Together { replica, members }
}

/// Does what is to be done now. True when nothing is left.
pub async fn follow_once(cluster: &Cluster, clock: &Arc<dyn Clock>, table: &Table) -> bool {
    let mut done = true;
    for (&id, row) in table {
        let held = cluster.groups().get(id);
        let finished = match duty(row, cluster.node_id(), held.as_ref().map(|group| group.replica)) {
            Duty::Nothing => Ok(true),
            Duty::Host(begin) => cluster.groups().host(id, begin).await.map(|_| true),
            Duty::LetGo => let_go(cluster, clock, row, &held.expect("a replica is held")).await,
        };
        done &= finished.unwrap_or_else(|error| {
            if let GroupError::Store(error) = &error {
                cluster.groups().fail(&error.to_string());
            }
            tracing::warn!(group = %id, %error, "this node's part of the placement is not done yet");
            false
        });
    }
    done
}

/// Follows the table until it is dropped.
pub async fn follow(cluster: Cluster, clock: Arc<dyn Clock>) {
    let mut tables = cluster.table();
    loop {
        let table = tables.borrow_and_update().clone();
        let done = follow_once(&cluster, &clock, &table).await;
        let changed = tables.changed();
        if done {
            if changed.await.is_err() {
                return;
            }
        } else {
            let _ = timeout(LOOK_EVERY, changed).await;
        }
    }
}

/// False when the group has not gone on without it yet.
async fn let_go(cluster: &Cluster, clock: &Arc<dyn Clock>, row: &GroupRow, group: &Group) -> Result<bool, GroupError> {
    if Fault::LetGoUnasked.is_on() {
        cluster.groups().retire(group.id).await?;
        return Ok(row.on(cluster.node_id()).is_none());
    }
    // Whoever leads it need not be one of those that are to hold it.
    let candidates = cluster.nodes().into_iter().map(|node| node.node_id).filter(|node| *node != cluster.node_id());
    // Asked now: an answer from before this replica came would say the same.
    for node in candidates {
        let Ok(heard) = ask(cluster, &**clock, node).await else { continue };
        if status_of(&heard.status, group.id).is_some_and(|status| goes_on_without(status, group.replica)) {
            cluster.groups().retire(group.id).await?;
            // Another replica of the group may be wanted here.
            return Ok(row.on(cluster.node_id()).is_none());
        }
    }
    tracing::debug!(group = %group.id, replica = group.replica, "is to go, and its group still counts on it");
    Ok(false)
}

fn status_of(status: &NodeStatus, group: GroupId) -> Option<&GroupStatus> {
    status.groups.iter().find(|found| found.group == u32::from(group.0))
}

fn goes_on_without(status: &GroupStatus, replica: u64) -> bool {
    status.leads && !status.joint && !status.members.iter().any(|member| member.replica == replica)
}

/// The groups whose members, as their leaders know them, are not those of their row: they are on their way, or nobody
/// leads them. With the nodes where a voter of each still is that its row does not name.
pub fn unsettled(cluster: &Cluster, clock: &dyn Clock, table: &Table, fresh: Duration) -> Unsettled {
    let own = own_status(cluster, clock);
    let heard = cluster.statuses();
    let others = heard.values().filter(|heard| heard.at.elapsed() <= fresh).map(|heard| &*heard.status);
    let statuses: Vec<&NodeStatus> = others.chain([&own]).collect();
    let leaders = |id: GroupId| statuses.iter().filter_map(move |status| status_of(status, id)).filter(|s| s.leads);
    let occupied = |(id, row): (&GroupId, &GroupRow)| match leaders(*id).max_by_key(|status| status.term) {
        Some(status) if has_followed(status, row) => None,
        Some(status) => Some((*id, occupied(status, row))),
        // Those who follow know the members too, if not the last ones.
        None => {
            let known = statuses.iter().filter_map(|status| status_of(status, *id));
            Some((*id, known.flat_map(|status| occupied(status, row)).collect()))
        }
    };
    table.iter().filter_map(occupied).collect()
}

fn occupied(status: &GroupStatus, row: &GroupRow) -> BTreeSet<u64> {
    let is_named = |member: &GroupMember| row.on(member.node_id).is_some_and(|at| at.replica == member.replica);
    let old = status.members.iter().filter(|member| member.voter && !is_named(member));
    old.map(|member| member.node_id).collect()
}

/// The group is as its row wants it.
pub fn has_followed(status: &GroupStatus, row: &GroupRow) -> bool {
    let found = |at: &super::ReplicaAt| {
        let same =
            |member: &GroupMember| (member.replica, member.node_id, member.voter) == (at.replica, at.node_id, at.voter);
        status.members.iter().any(same)
    };
    !status.joint && status.members.len() == row.replicas.len() && row.replicas.iter().all(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::ReplicaAt;

    fn row(epoch: u64) -> GroupRow {
        let at = |replica, node_id, voter| ReplicaAt { replica, node_id, voter };
        GroupRow { epoch, replicas: vec![at(5, 1, true), at(6, 2, true), at(7, 3, false)], next_replica: 8 }
    }

    #[test]
    fn only_the_voters_of_the_first_row_begin_a_group() {
        let members = BTreeMap::from([(5, Member { node_id: 1 }), (6, Member { node_id: 2 })]);
        let together = Duty::Host(Begin::Together { replica: 6, members });
        assert_eq!(duty(&row(1), 2, None), together);
        assert_eq!(duty(&row(1), 2, Some(6)), together, "it may have been stopped before it had begun");
        assert_eq!(duty(&row(1), 3, None), Duty::Host(Begin::Wait { replica: 7 }));
        assert_eq!(duty(&row(2), 2, None), Duty::Host(Begin::Wait { replica: 6 }));
        assert_eq!(duty(&row(2), 2, Some(6)), Duty::Nothing);
        assert_eq!(duty(&row(2), 4, None), Duty::Nothing);
        assert_eq!(duty(&row(2), 4, Some(1)), Duty::LetGo);
        assert_eq!(duty(&row(2), 2, Some(1)), Duty::LetGo, "first the old one goes");
    }

    fn status() -> GroupStatus {
        let member = |replica, node_id, voter| GroupMember { replica, node_id, voter, matching: None };
        let members = vec![member(5, 1, true), member(6, 2, true), member(7, 3, false)];
        GroupStatus { group: 1, replica: 5, term: 3, leads: true, members, ..Default::default() }
    }

    #[test]
    fn a_replica_goes_when_the_leader_has_committed_that_it_does() {
        assert!(goes_on_without(&status(), 4));
        assert!(!goes_on_without(&status(), 7), "still a learner");
        assert!(!goes_on_without(&GroupStatus { joint: true, ..status() }, 4), "may be undone");
        assert!(!goes_on_without(&GroupStatus { leads: false, ..status() }, 4), "may know nothing of it");
    }

    #[test]
    fn a_group_has_followed_when_nothing_is_left_to_do() {
        assert!(has_followed(&status(), &row(2)));
        assert!(!has_followed(&GroupStatus { joint: true, ..status() }, &row(2)));
        let mut more = status();
        more.members.push(GroupMember { replica: 4, node_id: 9, voter: false, matching: None });
        assert!(!has_followed(&more, &row(2)));
        assert_eq!(occupied(&status(), &row(2)), BTreeSet::new());
        let mut old = status();
        old.members.extend([(3, 2, true), (4, 9, true), (2, 8, false)].map(|(replica, node_id, voter)| GroupMember {
            replica,
            node_id,
            voter,
            matching: None,
        }));
        assert_eq!(
            occupied(&old, &row(2)),
            BTreeSet::from([2, 9]),
            "a learner is dropped before anything is waited for"
        );
        let mut learner = status();
        learner.members[0].voter = false;
        assert!(!has_followed(&learner, &row(2)));
    }
}
