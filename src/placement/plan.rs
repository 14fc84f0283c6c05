//! Which replica is to be where: a function of the rows there are and of the nodes.
//!
//! It is asked again and again, and each time moves a few groups one step; whoever asks stores the rows, and asks again
//! when the groups have followed. When nothing is left to improve it answers with nothing.
//!
//! ```text
//!   leave what stays --> fill up, other zones first, least loaded first --> let one go --> spread zones --> even loads
//! ```
//!
//! What it keeps to, and `tests` show with clusters made at random:
//!
//! - No node holds two replicas of a group, and no replica id is used twice.
//! - A change takes away one voter at most, and only while those that stay can go on without it.
//! - A voter on a node that is only away is not given up for nothing: it goes when another has taken its place. A
//!   group gets smaller only when somebody drains a node and there is no other.
//! - A group that has not followed its row yet is changed only when that row names a replica that will not come: its
//!   node is gone, or is to hold nothing, or still holds a voter of an earlier row. No node that is known to hold such a
//!   voter is chosen, for nothing begins there before the group goes on without that one.

use std::collections::{BTreeMap, BTreeSet};

use super::{GroupRow, ReplicaAt, Table};
use crate::task::GroupId;

/// Groups that move at a time: each copies its data, and does so besides its work.
const CHANGES_AT_A_TIME: usize = 4;
/// Loads that differ by this much are evened out.
const UNEVEN: usize = 2;

/// A node as it matters here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeState {
    pub zone: String,
    /// It is there now.
    pub alive: bool,
    /// Somebody wants it to hold nothing.
    pub draining: bool,
    /// It has been away for longer than one waits for a node.
    pub gone: bool,
}

impl NodeState {
    /// What it holds may stay there.
    fn stays(&self) -> bool {
        !self.draining && !self.gone
    }

    /// It can be given more.
    fn takes(&self) -> bool {
        self.alive && self.stays()
    }
}

pub type Nodes = BTreeMap<u64, NodeState>;

/// Groups whose members are not those of their row yet, and the nodes that still hold a voter of an earlier row.
pub type Unsettled = BTreeMap<GroupId, BTreeSet<u64>>;

/// A row that takes the place of the one before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub group: GroupId,
    pub row: GroupRow,
}

/// Why a replica is not moved by hand.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CannotMove {
    #[error("{0} is not known")]
    NoGroup(GroupId),
    #[error("node {0} is not known")]
    NoNode(u64),
    #[error("node {node} holds no voter of {group}")]
    NotThere { group: GroupId, node: u64 },
    #[error("node {node} holds a replica of {group} already")]
    ThereAlready { group: GroupId, node: u64 },
    #[error("node {0} is away, or is being drained: it takes no replica")]
    TakesNone(u64),
}

/// `table`, and the rows that it lacks, spread over the nodes that are there.
pub fn first_rows(table: Table, shards: u16, nodes: &Nodes, replicas: usize) -> Table {
    let missing: Vec<GroupId> = (0..=shards).map(GroupId).filter(|group| !table.contains_key(group)).collect();
    let mut planner = Planner::new(table, nodes, replicas);
    for group in missing {
        planner.table.insert(group, GroupRow { epoch: 1, replicas: Vec::new(), next_replica: 1 });
        for _ in 0..replicas {
            let Some(node) = planner.best_node(group) else { break };
            planner.add_voter(group, node);
        }
        planner.follow_with_learners(group);
        // The one that is first least often.
        let leads = planner.leads();
        let row = &planner.table[&group];
        let first = row.voters().map(|at| at.node_id).min_by_key(|node| leads.get(node).copied().unwrap_or(0));
        if let Some(first) = first {
            planner.put_first(group, first);
        }
    }
    planner.table
}

/// What to change now.
pub fn plan(table: &Table, nodes: &Nodes, replicas: usize, unsettled: &Unsettled) -> Vec<Change> {
    let mut planner = Planner { unsettled: unsettled.clone(), ..Planner::new(table.clone(), nodes, replicas) };
    // At least one: a group that cannot follow must not hold up all others.
    let mut left = CHANGES_AT_A_TIME.saturating_sub(unsettled.len()).max(1);
    for &group in table.keys() {
        if left > 0 && planner.may_change(group) {
            planner.repair(group);
            left -= usize::from(planner.table[&group] != table[&group]);
        }
    }
    let settled: Vec<GroupId> = table.keys().filter(|group| !unsettled.contains_key(group)).copied().collect();
    while left > 0 && (planner.spread_zones(&settled, table) || planner.even_loads(&settled, table)) {
        left -= 1;
    }
    planner.even_leaders(&settled);
    planner.changes(table)
}

/// The row of `group` with its voter on `from` moved to `to`, as somebody wants it.
pub fn move_replica(table: &Table, nodes: &Nodes, group: GroupId, from: u64, to: u64) -> Result<GroupRow, CannotMove> {
    let row = table.get(&group).ok_or(CannotMove::NoGroup(group))?;
    for node in [from, to] {
        nodes.get(&node).ok_or(CannotMove::NoNode(node))?;
    }
    if !row.voters().any(|at| at.node_id == from) {
        return Err(CannotMove::NotThere { group, node: from });
    }
    if row.voters().any(|at| at.node_id == to) {
        return Err(CannotMove::ThereAlready { group, node: to });
    }
    if !nodes[&to].takes() {
        return Err(CannotMove::TakesNone(to));
    }
    let mut planner = Planner::new(table.clone(), nodes, row.voters().count());
    planner.swap(group, from, to);
    let change = planner.changes(table).pop();
    Ok(change.expect("a voter is elsewhere").row)
}

/// The table as it is planned so far.
struct Planner<'a> {
    table: Table,
    nodes: &'a Nodes,
    replicas: usize,
    unsettled: Unsettled,
}

impl<'a> Planner<'a> {
    fn new(table: Table, nodes: &'a Nodes, replicas: usize) -> Self {
        Self { table, nodes, replicas, unsettled: Unsettled::new() }
    }

    /// The rows that differ from those before, each one epoch on.
    fn changes(self, before: &Table) -> Vec<Change> {
        let differs = |(group, row): &(GroupId, GroupRow)| before.get(group) != Some(row);
        let changed = self.table.into_iter().filter(differs);
        changed.map(|(group, row)| Change { group, row: GroupRow { epoch: row.epoch + 1, ..row } }).collect()
    }

    fn row(&self, group: GroupId) -> &GroupRow {
        &self.table[&group]
    }

    fn row_mut(&mut self, group: GroupId) -> &mut GroupRow {
        self.table.get_mut(&group).expect("a row that was there")
    }

    fn stays(&self, node: u64) -> bool {
        self.nodes.get(&node).is_some_and(NodeState::stays)
    }

    fn takes(&self, node: u64) -> bool {
        self.nodes.get(&node).is_some_and(NodeState::takes)
    }

    /// Nothing of `group` can begin there yet.
    fn is_occupied(&self, group: GroupId, node: u64) -> bool {
        self.unsettled.get(&group).is_some_and(|occupied| occupied.contains(&node))
    }

    /// What the row has there may stay there, and can come.
    fn keeps(&self, group: GroupId, node: u64) -> bool {
        self.stays(node) && !self.is_occupied(group, node)
    }

    fn draining(&self, node: u64) -> bool {
        self.nodes.get(&node).is_some_and(|node| node.draining)
    }

    fn alive(&self, node: u64) -> bool {
        self.nodes.get(&node).is_some_and(|node| node.alive)
    }

    /// Nodes without a zone share one.
    fn zone(&self, node: u64) -> &'a str {
        self.nodes.get(&node).map_or("", |node| &node.zone)
    }

    /// Voters per node.
    fn loads(&self) -> BTreeMap<u64, usize> {
        let mut loads: BTreeMap<u64, usize> = self.nodes.keys().map(|node| (*node, 0)).collect();
        for at in self.table.values().flat_map(GroupRow::voters) {
            *loads.entry(at.node_id).or_default() += 1;
        }
        loads
    }

    /// Rows per node in which it is the first voter.
    fn leads(&self) -> BTreeMap<u64, usize> {
        let mut leads = BTreeMap::new();
        for at in self.table.values().filter_map(|row| row.voters().next()) {
            *leads.entry(at.node_id).or_default() += 1;
        }
        leads
    }

    fn has_voter_on(&self, group: GroupId, node: u64) -> bool {
        self.row(group).voters().any(|at| at.node_id == node)
    }

    /// Voters of `group` in `zone`, those on nodes that go left out.
    fn in_zone(&self, group: GroupId, zone: &str) -> usize {
        self.row(group).voters().filter(|at| self.keeps(group, at.node_id) && self.zone(at.node_id) == zone).count()
    }

    /// A group that waits for the members of its row is left alone, unless it waits for one that will not come. One
    /// that has never been there is left alone in any case: nobody but the nodes of its first row may begin it.
    fn may_change(&self, group: GroupId) -> bool {
        let row = self.row(group);
        let comes = |at: &ReplicaAt| self.keeps(group, at.node_id);
        !self.unsettled.contains_key(&group) || (row.epoch > 1 && !row.replicas.iter().all(comes))
    }

    /// Where the next voter of `group` is best.
    fn best_node(&self, group: GroupId) -> Option<u64> {
        let loads = self.loads();
        let is_free = |node: u64| self.takes(node) && !self.has_voter_on(group, node) && !self.is_occupied(group, node);
        let free = self.nodes.keys().filter(|node| is_free(**node));
        free.min_by_key(|node| (self.in_zone(group, self.zone(**node)), loads[*node], **node)).copied()
    }

    /// A learner that is there already becomes the voter, and keeps its id.
    fn add_voter(&mut self, group: GroupId, node: u64) {
        let row = self.row_mut(group);
        let known = row.replicas.iter().position(|at| at.node_id == node);
        let replica = match known {
            Some(position) => row.replicas.remove(position).replica,
            None => row.new_replica(),
        };
        let behind_voters = row.voters().count();
        row.replicas.insert(behind_voters, ReplicaAt { replica, node_id: node, voter: true });
    }

    /// Group 0 is on every node: there, its replica goes on as a learner.
    fn take_voter(&mut self, group: GroupId, node: u64) {
        let row = self.row_mut(group);
        let position = row.replicas.iter().position(|at| at.node_id == node).expect("a voter that is there");
        let at = row.replicas.remove(position);
        if group == GroupId::CLUSTER {
            row.replicas.push(ReplicaAt { voter: false, ..at });
        }
    }

    fn swap(&mut self, group: GroupId, from: u64, to: u64) {
        self.add_voter(group, to);
        self.take_voter(group, from);
        self.follow_with_learners(group);
    }

    fn repair(&mut self, group: GroupId) {
        let voters: Vec<u64> = self.row(group).voters().map(|at| at.node_id).collect();
        let staying = voters.iter().filter(|node| self.keeps(group, **node)).count();
        let there = self.nodes.values().filter(|node| node.stays()).count();
        let wanted = self.replicas.min(there).max(1);
        // One goes with each change, so there is no use for more than one beyond what there was.
        let room = wanted.max(voters.len()) + 1 - voters.len();
        for _ in 0..wanted.saturating_sub(staying).min(room) {
            let Some(node) = self.best_node(group) else { break };
            self.add_voter(group, node);
        }
        if let Some(node) = self.dispensable(group, voters.len(), wanted) {
            self.take_voter(group, node);
        }
        self.follow_with_learners(group);
    }

    /// The voter that goes, if one can. `before`: how many there were.
    fn dispensable(&self, group: GroupId, before: usize, wanted: usize) -> Option<u64> {
        let voters: Vec<u64> = self.row(group).voters().map(|at| at.node_id).collect();
        let staying = voters.iter().filter(|node| self.keeps(group, **node)).count();
        let leaving = || voters.iter().copied().filter(|node| !self.keeps(group, *node));
        // Those that are away go first: where a group gets smaller, those that answer are worth more.
        let drained = leaving().filter(|node| self.draining(*node)).min_by_key(|node| self.alive(*node));
        let replaced = staying >= self.replicas.min(before) || (drained.is_some() && staying >= wanted);
        let gone = leaving().find(|node| !self.draining(*node)).filter(|_| replaced);
        let drained = drained.filter(|_| staying >= wanted);
        let surplus = || (leaving().next().is_none() && staying > wanted).then(|| self.least_useful(group, &voters));
        let node = gone.or(drained).or_else(surplus)?;
        let left: Vec<u64> = voters.into_iter().filter(|other| *other != node).collect();
        self.can_go_on(&left).then_some(node)
    }

    fn can_go_on(&self, voters: &[u64]) -> bool {
        let alive = voters.iter().filter(|node| self.alive(**node)).count();
        2 * alive > voters.len()
    }

    /// Nothing of it has changed, and it is in a state to be moved about for comfort.
    fn at_rest(&self, group: GroupId, before: &Table) -> bool {
        let voters: Vec<u64> = self.row(group).voters().map(|at| at.node_id).collect();
        self.table.get(&group) == before.get(&group) && self.can_go_on(&voters)
    }

    /// In the fullest zone, on the fullest node.
    fn least_useful(&self, group: GroupId, voters: &[u64]) -> u64 {
        let loads = self.loads();
        let use_of = |node: &&u64| (!self.alive(**node), self.in_zone(group, self.zone(**node)), loads[*node], **node);
        *voters.iter().max_by_key(use_of).expect("more than are wanted")
    }

    /// Group 0: a learner wherever there is no voter. One that is drained keeps it until it holds nothing else: those
    /// who speak to that node are still let in by it.
    fn follow_with_learners(&mut self, group: GroupId) {
        if group != GroupId::CLUSTER {
            return;
        }
        let busy: BTreeSet<u64> =
            self.loads().into_iter().filter(|(_, load)| *load > 0).map(|(node, _)| node).collect();
        let nodes = self.nodes;
        let keeps = |at: &ReplicaAt| {
            let node = nodes.get(&at.node_id);
            at.voter || node.is_some_and(|node| !node.gone && (!node.draining || busy.contains(&at.node_id)))
        };
        let row = self.row_mut(group);
        row.replicas.retain(keeps);
        for (node, _) in nodes.iter().filter(|(_, node)| node.takes()) {
            if row.on(*node).is_none() {
                let replica = row.new_replica();
                row.replicas.push(ReplicaAt { replica, node_id: *node, voter: false });
            }
        }
    }

    /// Moves one voter out of a zone that the group has twice into one that it does not have. Only groups that are as
    /// they were `before`.
    fn spread_zones(&mut self, settled: &[GroupId], before: &Table) -> bool {
        let loads = self.loads();
        for &group in settled.iter().filter(|group| self.at_rest(**group, before)) {
            let crowded = self.row(group).voters().map(|at| at.node_id);
            let crowded = crowded.filter(|node| self.takes(*node) && self.in_zone(group, self.zone(*node)) > 1);
            let Some(from) = crowded.max_by_key(|node| (loads[node], *node)) else { continue };
            let Some(to) = self.best_node(group).filter(|to| self.in_zone(group, self.zone(*to)) == 0) else {
                continue;
            };
            self.swap(group, from, to);
            return true;
        }
        false
    }

    /// Moves one voter from a node with many to one with few, where that puts no two into one zone.
    fn even_loads(&mut self, settled: &[GroupId], before: &Table) -> bool {
        let mut loads: Vec<(usize, u64)> =
            self.loads().into_iter().filter(|(node, _)| self.takes(*node)).map(|(node, load)| (load, node)).collect();
        loads.sort_unstable();
        for &(most, from) in loads.iter().rev() {
            for &(least, to) in loads.iter().filter(|(load, _)| load + UNEVEN <= most) {
                debug_assert!(least < most);
                let fits = |group: &&GroupId| {
                    self.at_rest(**group, before)
                        && self.has_voter_on(**group, from)
                        && !self.has_voter_on(**group, to)
                        && (self.zone(from) == self.zone(to) || self.in_zone(**group, self.zone(to)) == 0)
                };
                // Rather one that need not change its leader.
                let leads = |group: &&GroupId| self.row(**group).voters().next().is_some_and(|at| at.node_id == from);
                if let Some(&group) = settled.iter().filter(fits).min_by_key(leads) {
                    self.swap(group, from, to);
                    return true;
                }
            }
        }
        false
    }

    fn put_first(&mut self, group: GroupId, node: u64) {
        let row = self.row_mut(group);
        let position = row.replicas.iter().position(|at| at.node_id == node).expect("a voter that is there");
        row.replicas[..=position].rotate_right(1);
    }

    /// As many first voters on each node as on the others. A node that is only away stays first where it was.
    fn even_leaders(&mut self, settled: &[GroupId]) {
        // Each step makes it more even, so it ends; the bound is for a mistake in that thought.
        for _ in 0..self.table.len() * self.nodes.len() {
            let leads = self.leads();
            let count = |node: u64| leads.get(&node).copied().unwrap_or(0);
            let step = settled.iter().find_map(|&group| {
                let row = self.row(group);
                let first = row.voters().next()?.node_id;
                let others = row.voters().skip(1).map(|at| at.node_id).filter(|node| self.takes(*node));
                let best = others.min_by_key(|node| (count(*node), *node))?;
                let uneven = self.alive(first) && count(best) + UNEVEN <= count(first);
                (uneven || !self.stays(first)).then_some((group, best))
            });
            let Some((group, first)) = step else { return };
            self.put_first(group, first);
        }
    }
}

#[cfg(test)]
mod tests {
    use boomerang_testkit::seed;
    use rand::RngExt;
    use rand::rngs::StdRng;

    use super::*;
    use crate::placement::ReplicaAt;

    const SHARDS: u16 = 12;

    fn node(zone: &str) -> NodeState {
        NodeState { zone: zone.into(), alive: true, ..NodeState::default() }
    }

    fn nodes(count: u64) -> Nodes {
        (1..=count).map(|id| (id, node(""))).collect()
    }

    /// All steps to the end, as if every group followed at once.
    struct World {
        table: Table,
        nodes: Nodes,
        replicas: usize,
        /// Ids that were ever used.
        used: BTreeMap<GroupId, BTreeSet<u64>>,
        moved: usize,
    }

    impl World {
        fn new(nodes: Nodes, replicas: usize) -> Self {
            let table = first_rows(Table::new(), SHARDS, &nodes, replicas);
            let mut world = Self { table, nodes, replicas, used: BTreeMap::new(), moved: 0 };
            for (group, row) in world.table.clone() {
                world.check_row(group, &row, None);
            }
            world
        }

        fn check_row(&mut self, group: GroupId, row: &GroupRow, before: Option<&GroupRow>) {
            let on: BTreeSet<u64> = row.replicas.iter().map(|at| at.node_id).collect();
            assert_eq!(on.len(), row.replicas.len(), "two replicas on one node: {row:?}");
            let used = self.used.entry(group).or_default();
            for at in &row.replicas {
                let known =
                    before.is_some_and(|before| before.on(at.node_id).is_some_and(|was| was.replica == at.replica));
                assert!(known || used.insert(at.replica), "{group}: replica {} once more: {row:?}", at.replica);
                assert!(at.replica < row.next_replica);
            }
            assert!(row.replicas.iter().skip(row.voters().count()).all(|at| !at.voter), "voters first: {row:?}");
            assert!(row.voters().next().is_some(), "nobody is left: {row:?}");
        }

        fn check_change(&self, before: &GroupRow, after: &GroupRow) {
            let ids = |row: &GroupRow| row.voters().map(|at| at.replica).collect::<BTreeSet<_>>();
            let (old, new) = (ids(before), ids(after));
            assert_eq!(after.epoch, before.epoch + 1);
            assert!(old.difference(&new).count() <= 1, "more than one goes: {before:?} {after:?}");
            if old.len() > 2 {
                assert!(2 * old.intersection(&new).count() > old.len(), "{before:?} {after:?}");
            }
            if old.difference(&new).count() > 0 {
                let alive = after.voters().filter(|at| self.nodes[&at.node_id].alive).count();
                assert!(2 * alive > new.len(), "those who stay cannot go on: {after:?}");
            }
        }

        fn step(&mut self, unsettled: &Unsettled) -> bool {
            let changes = plan(&self.table, &self.nodes, self.replicas, unsettled);
            let again = plan(&self.table, &self.nodes, self.replicas, unsettled);
            assert_eq!(changes, again, "the same question has the same answer");
            for Change { group, row } in &changes {
                let before = self.table.insert(*group, row.clone()).unwrap();
                self.check_row(*group, row, Some(&before));
                self.check_change(&before, row);
                self.moved += row.voters().filter(|at| before.on(at.node_id).is_none_or(|was| !was.voter)).count();
            }
            let voters = changes.iter().filter(|change| !unsettled.contains_key(&change.group)).count();
            assert!(voters <= self.table.len());
            !changes.is_empty()
        }

        fn settle(&mut self) -> usize {
            let moved = self.moved;
            for _ in 0..500 {
                if !self.step(&Unsettled::new()) {
                    return self.moved - moved;
                }
            }
            panic!("it does not come to rest: {:?}", self.table);
        }

        fn load(&self, node: u64) -> usize {
            self.table.values().filter(|row| row.voters().any(|at| at.node_id == node)).count()
        }

        fn leads(&self, node: u64) -> usize {
            self.table.values().filter(|row| row.voters().next().unwrap().node_id == node).count()
        }

        fn check_at_rest(&self) {
            let there: Vec<u64> = self.nodes.iter().filter(|(_, node)| node.takes()).map(|(id, _)| *id).collect();
            let zones: BTreeSet<&str> = there.iter().map(|id| self.nodes[id].zone.as_str()).collect();
            let all_answer = self.nodes.values().all(|node| node.alive || node.gone || node.draining);
            for (group, row) in &self.table {
                let voters: Vec<u64> = row.voters().map(|at| at.node_id).collect();
                let alive = voters.iter().filter(|id| self.nodes[id].alive).count();
                // Without a majority nobody can lead it, and nothing can be changed.
                if !all_answer || there.is_empty() || 2 * alive <= voters.len() {
                    continue;
                }
                let staying = voters.iter().filter(|id| self.nodes[id].stays()).count();
                assert!(staying >= self.replicas.min(there.len()), "{group}: {row:?} {:?}", self.nodes);
                assert!(voters.iter().all(|id| !self.nodes[id].draining), "still on a drained node: {row:?}");
                let of_group: BTreeSet<&str> = voters.iter().map(|id| self.nodes[id].zone.as_str()).collect();
                if voters.iter().all(|id| self.nodes[id].takes()) {
                    assert_eq!(of_group.len(), voters.len().min(zones.len()), "{group}: {row:?} {:?}", self.nodes);
                }
                if *group == GroupId::CLUSTER {
                    assert!(there.iter().all(|id| row.on(*id).is_some()), "no replica of group 0: {row:?}");
                }
            }
        }
    }

    #[test]
    fn a_new_cluster_is_even_from_the_start() {
        for count in 1..=7 {
            let mut world = World::new(nodes(count), 3);
            let table = world.table.clone();
            world.check_at_rest();
            for row in table.values() {
                assert_eq!((row.epoch, row.voters().count()), (1, 3.min(count as usize)));
            }
            let loads: Vec<usize> = (1..=count).map(|id| world.load(id)).collect();
            let leads: Vec<usize> = (1..=count).map(|id| world.leads(id)).collect();
            let spread = |of: &[usize]| of.iter().max().unwrap() - of.iter().min().unwrap();
            assert!(spread(&loads) <= 1 && spread(&leads) <= 1, "{loads:?} {leads:?}");
            assert_eq!(world.settle(), 0, "nothing is left to improve");
        }
    }

    #[test]
    fn it_grows_from_one_to_three_to_five_and_back() {
        let mut world = World::new(nodes(1), 3);
        assert!(world.table.values().all(|row| row.replicas.len() == 1));
        world.nodes = nodes(3);
        assert_eq!(world.settle(), 2 * (usize::from(SHARDS) + 1));
        world.check_at_rest();
        world.nodes = nodes(5);
        let moved = world.settle();
        assert!(moved <= 16, "39 voters on 5 nodes instead of 3 take 16 moves and not {moved}");
        world.check_at_rest();
        for id in [2, 4] {
            let load = world.load(id);
            world.nodes.get_mut(&id).unwrap().draining = true;
            let moved = world.settle();
            assert!(moved <= load + 2, "{moved} moves for the {load} replicas of node {id}");
            world.check_at_rest();
            assert!(world.table.values().all(|row| row.on(id).is_none()), "node {id} holds something");
        }
        for id in [1, 3] {
            world.nodes.get_mut(&id).unwrap().draining = true;
            world.settle();
            world.check_at_rest();
        }
        assert!(world.table.values().all(|row| row.replicas.len() == 1 && row.replicas[0].node_id == 5));
        world.nodes.get_mut(&5).unwrap().draining = true;
        assert_eq!(world.settle(), 0, "the last one cannot go");
    }

    #[test]
    fn a_node_that_is_away_keeps_its_place_until_it_is_gone_and_another_is_there() {
        let mut world = World::new(nodes(3), 3);
        let before = world.table.clone();
        world.nodes.get_mut(&2).unwrap().alive = false;
        world.settle();
        assert_eq!(world.table, before, "away");
        world.nodes.get_mut(&2).unwrap().gone = true;
        world.settle();
        for row in world.table.values() {
            assert!(row.voters().any(|at| at.node_id == 2), "there is nobody in its place: {row:?}");
        }
        world.nodes.insert(4, node(""));
        let moved = world.settle();
        assert_eq!(moved, usize::from(SHARDS) + 1);
        assert!(world.table.values().all(|row| row.on(2).is_none() && row.voters().count() == 3));
    }

    #[test]
    fn where_a_group_gets_smaller_those_that_answer_stay() {
        let mut world = World::new(nodes(3), 3);
        world.nodes.get_mut(&3).unwrap().alive = false;
        world.nodes.get_mut(&3).unwrap().gone = true;
        world.nodes.get_mut(&2).unwrap().draining = true;
        world.settle();
        assert!(world.table.values().all(|row| row.replicas.len() == 1 && row.replicas[0].node_id == 1));
    }

    #[test]
    fn a_group_that_has_not_followed_is_left_alone() {
        let mut world = World::new(nodes(3), 3);
        let all: Unsettled = world.table.keys().map(|group| (*group, BTreeSet::new())).collect();
        world.nodes = nodes(5);
        assert!(!world.step(&all));
        // Not even for a drained node while it is not known to have begun.
        world.nodes.get_mut(&1).unwrap().draining = true;
        assert!(!world.step(&all));
        for row in world.table.values_mut() {
            row.epoch = 2;
        }
        assert!(world.step(&all), "but it need not wait for a node that is to hold nothing");
    }

    #[test]
    fn no_replica_is_wanted_where_a_voter_of_an_earlier_row_is() {
        let group = GroupId(1);
        let at = |replica, node_id| ReplicaAt { replica, node_id, voter: true };
        let row = |replicas: &[ReplicaAt]| GroupRow { epoch: 9, replicas: replicas.to_vec(), next_replica: 22 };
        // Its voters are on 5, 7 and 4. The node in the place of 7 dies before it has anything.
        let table = Table::from([(group, row(&[at(20, 4), at(17, 5), at(21, 8)]))]);
        let mut all = Nodes::from([4, 5, 7, 8, 9].map(|id| (id, node(""))));
        (all.get_mut(&8).unwrap().alive, all.get_mut(&8).unwrap().gone) = (false, true);
        let unsettled = Unsettled::from([(group, BTreeSet::from([7]))]);
        let planned = |table: &Table, nodes: &Nodes| plan(table, nodes, 3, &unsettled).pop().map(|change| change.row);
        let on = |row: GroupRow| row.voters().map(|at| at.node_id).collect::<BTreeSet<_>>();
        assert_eq!(planned(&table, &all).map(on), Some(BTreeSet::from([4, 5, 9])));
        // A row that names such a node is changed, and not while there is no other.
        let table = Table::from([(group, row(&[at(20, 4), at(17, 5), at(21, 7)]))]);
        assert_eq!(planned(&table, &all).map(on), Some(BTreeSet::from([4, 5, 9])));
        all.remove(&9);
        assert_eq!(planned(&table, &all), None);
    }

    #[test]
    fn a_node_that_was_left_is_free_when_its_voter_has_gone() {
        let group = GroupId(1);
        let at = |replica, node_id| ReplicaAt { replica, node_id, voter: true };
        // Its voters are on 1, 3 and 4. The one in the place of 1 never comes, and 3 is lost too.
        let row = GroupRow { epoch: 9, replicas: vec![at(8, 2), at(5, 3), at(6, 4)], next_replica: 9 };
        let mut world =
            World { table: Table::from([(group, row)]), nodes: nodes(5), replicas: 3, used: BTreeMap::new(), moved: 0 };
        for id in [2, 3] {
            (world.nodes.get_mut(&id).unwrap().alive, world.nodes.get_mut(&id).unwrap().gone) = (false, true);
        }
        let occupied = Unsettled::from([(group, BTreeSet::from([1]))]);
        assert!(world.step(&occupied));
        assert!(world.table[&group].on(5).is_some() && world.table[&group].on(1).is_none());
        // The new one has taken the place of the one on 1.
        let free = Unsettled::from([(group, BTreeSet::new())]);
        while world.step(&free) {}
        let on: BTreeSet<u64> = world.table[&group].voters().map(|at| at.node_id).collect();
        assert_eq!(on, BTreeSet::from([1, 4, 5]));
    }

    #[test]
    fn a_replica_is_moved_by_hand() {
        let mut all = nodes(4);
        all.get_mut(&4).unwrap().alive = false;
        let table = first_rows(Table::new(), SHARDS, &nodes(2), 1);
        let group = GroupId(3);
        let from = table[&group].replicas[0].node_id;
        let to = 3 - from;
        let row = move_replica(&table, &all, group, from, to).unwrap();
        assert_eq!((row.epoch, row.next_replica), (2, 3));
        assert_eq!(row.replicas, vec![ReplicaAt { replica: 2, node_id: to, voter: true }]);
        assert_eq!(move_replica(&table, &all, group, to, from), Err(CannotMove::NotThere { group, node: to }));
        assert_eq!(move_replica(&table, &all, group, from, 4), Err(CannotMove::TakesNone(4)));
        assert_eq!(move_replica(&table, &all, group, from, 9), Err(CannotMove::NoNode(9)));
        assert_eq!(move_replica(&table, &all, GroupId(99), from, to), Err(CannotMove::NoGroup(GroupId(99))));
    }

    #[test]
    fn random_clusters_come_to_rest_and_keep_the_rules() {
        for seed in seed::rounds(300) {
            let rng = &mut seed.rng();
            let zones = ["a", "b", "c", "d"];
            let zoned = rng.random_range(1..=zones.len());
            let mut next_id = rng.random_range(1..6_u64);
            let zone = |rng: &mut StdRng| node(zones[rng.random_range(0..zoned)]);
            let first: Nodes = (1..=next_id).map(|id| (id, zone(rng))).collect();
            let mut world = World::new(first, rng.random_range(1..=5));
            for _ in 0..12 {
                let ids: Vec<u64> = world.nodes.keys().copied().collect();
                let id = ids[rng.random_range(0..ids.len())];
                let found = world.nodes.get_mut(&id).unwrap();
                match rng.random_range(0..6) {
                    0 | 1 => {
                        next_id += 1;
                        let new = zone(rng);
                        world.nodes.insert(next_id, new);
                    }
                    2 => found.draining = !found.draining,
                    3 => found.alive = false,
                    4 => found.gone = !found.alive,
                    _ => (found.alive, found.gone) = (true, false),
                }
                // Some have not followed yet.
                let mut unsettled = Unsettled::new();
                for group in world.table.keys() {
                    if rng.random_range(0..4) == 0 {
                        let occupied = world.nodes.keys().filter(|_| rng.random_range(0..4) == 0).copied().collect();
                        unsettled.insert(*group, occupied);
                    }
                }
                let before = world.table.clone();
                world.step(&unsettled);
                for (group, occupied) in &unsettled {
                    let mut new = world.table[group].voters().filter(|at| !before[group].replicas.contains(at));
                    assert!(new.all(|at| !occupied.contains(&at.node_id)), "{group} cannot begin there: {occupied:?}");
                }
                if rng.random_range(0..3) == 0 {
                    world.settle();
                    world.check_at_rest();
                }
            }
            // In the end everybody is back.
            for found in world.nodes.values_mut() {
                (found.alive, found.gone, found.draining) = (true, false, false);
            }
            world.settle();
            world.check_at_rest();
            for row in world.table.values() {
                assert_eq!(row.voters().count(), world.replicas.min(world.nodes.len()), "{row:?}");
            }
        }
    }
}
