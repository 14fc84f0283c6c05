//! Where this node leads a group, it moves the group's members towards their row, one step at a time.
//!
//! ```text
//!   flatten what is joint --> drop learners that are not wanted --> add the new as learners
//!     --> wait until they have caught up --> hand over, if the leader goes --> one joint change of voters
//!     --> drop those who were voters --> hand over to the first voter of the row
//! ```
//!
//! Each step is found from what the group is now, so that it does not matter who took the one before, or whether that
//! one was seen to its end: a new leader looks and goes on. A step is taken only while everything before it is
//! committed.
//!
//! Voters are changed only when the new ones have caught up and a majority of the new set answers, so that the group
//! goes on without a pause. A leader that is to go hands over first, and so does one that is no voter any more because it
//! has finished what another had begun; and leadership goes to the first voter of the row when that one has been well for
//! some time, one group at a time.
//!
//! A node holds one replica of a group, and none begins there before the one of an earlier row has been released. So a
//! learner that is not wanted is dropped before anything is waited for; and a new voter that has caught up takes the
//! place of an old one while others are waited for, which may never come: first of one that is in their way.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use openraft::ChangeMembers;
use openraft::ServerState;
use openraft::rt::{Instant as _, WatchReceiver as _};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, timeout};

use super::{Cluster, GroupRow};
use crate::raft::{Group, Groups, Member, ReplicaId};
use crate::task::GroupId;

const LOOK_EVERY: Duration = Duration::from_millis(250);
/// A step that takes longer is looked at anew; what it has appended may still be committed.
const STEP_WITHIN: Duration = Duration::from_secs(10);
/// A replica that has not answered for this long is not counted on.
const ANSWERED_WITHIN: Duration = Duration::from_secs(2);
/// Entries that a replica may be behind to become a voter: what comes in during a round trip or two.
const BEHIND_TO_VOTE: u64 = 64;
/// And to lead: nothing is stored while it catches up.
const BEHIND_TO_LEAD: u64 = 8;
/// The first voter must have been well for this long before it is given the lead.
const WELL_FOR: Duration = Duration::from_secs(5);
/// Clocks that agree less than this are on their way to being told apart.
const CLOCK_AHEAD_US_MAX: u64 = 400_000;
/// A node that was heard of within this time is there.
const HEARD_WITHIN: Duration = Duration::from_secs(3);
/// How long a transfer may take before this node is known to lead still.
const HAND_OVER_WITHIN: Duration = Duration::from_secs(3);
/// After a hand-over that came to nothing: each costs the group a moment without a leader.
const HAND_OVER_AGAIN_AFTER: Duration = Duration::from_secs(5);
/// The same, when nothing waits for it.
const WISH_AGAIN_AFTER: Duration = Duration::from_secs(60);

/// Gives leadership away in good order. Returns when it has been asked for, and does not say whether it worked.
pub trait HandOver: Send + Sync + 'static {
    fn hand_over(&self, group: GroupId, to: ReplicaId) -> BoxFuture<'_, ()>;
}

/// Nothing has to be done before.
impl HandOver for Groups {
    fn hand_over(&self, group: GroupId, to: ReplicaId) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let Some(group) = self.get(group) else { return };
            if let Err(error) = group.raft.trigger().transfer_leader(to).await {
                tracing::warn!(group = %group.id, to, %error, "leadership was not handed over");
            }
        })
    }
}

/// A group as its leader sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct View {
    me: ReplicaId,
    /// The last membership is committed.
    committed: bool,
    joint: bool,
    /// Voters of all sets, while it is joint.
    voters: BTreeSet<ReplicaId>,
    members: BTreeMap<ReplicaId, u64>,
    last_index: u64,
    matching: BTreeMap<ReplicaId, u64>,
    /// Those that have answered lately, this one among them.
    answering: BTreeSet<ReplicaId>,
    /// On nodes that stop, or whose clock is not that of this one: they would give the lead away again.
    unfit: BTreeSet<ReplicaId>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    /// The group is as the row wants it.
    Settled,
    Wait(&'static str),
    Flatten,
    AddLearner(ReplicaId, u64),
    ChangeVoters(BTreeSet<ReplicaId>),
    HandOver(ReplicaId),
    Drop(BTreeSet<ReplicaId>),
}

impl View {
    fn of(group: &Group) -> Option<Self> {
        let metrics = group.raft.metrics();
        let metrics = metrics.borrow_watched();
        if metrics.state != ServerState::Leader {
            return None;
        }
        let membership = metrics.membership_config.membership();
        let matching = metrics.replication.iter().flatten();
        let matching = matching.filter_map(|(id, log)| Some((*id, log.as_ref()?.index)));
        let heard = metrics.heartbeat.iter().flatten();
        let heard = heard.filter(|(_, at)| at.as_ref().is_some_and(|at| at.elapsed() < ANSWERED_WITHIN));
        Some(Self {
            me: group.replica,
            committed: metrics.committed_membership_config == metrics.membership_config,
            joint: membership.get_joint_config().len() > 1,
            voters: membership.voter_ids().collect(),
            members: membership.nodes().map(|(id, member)| (*id, member.node_id)).collect(),
            last_index: metrics.last_log_index.unwrap_or(0),
            matching: matching.collect(),
            answering: heard.map(|(id, _)| *id).chain([group.replica]).collect(),
            unfit: BTreeSet::new(),
        })
    }

    fn note_unfit(&mut self, cluster: &Cluster) {
        let statuses = cluster.statuses();
        let unfit = |node: &u64| {
            statuses
                .get(node)
                .is_some_and(|heard| heard.status.stopping || heard.clock_ahead_us.unsigned_abs() > CLOCK_AHEAD_US_MAX)
        };
        self.unfit = self.members.iter().filter(|(_, node)| unfit(node)).map(|(replica, _)| *replica).collect();
    }

    fn could_lead(&self, replica: ReplicaId) -> bool {
        self.is_close(replica, BEHIND_TO_LEAD) && !self.unfit.contains(&replica)
    }

    fn is_close(&self, replica: ReplicaId, behind: u64) -> bool {
        let matching = if replica == self.me { Some(self.last_index) } else { self.matching.get(&replica).copied() };
        self.answering.contains(&replica) && matching.is_some_and(|index| index + behind >= self.last_index)
    }

    fn answer_with_majority(&self, voters: &BTreeSet<ReplicaId>) -> bool {
        2 * voters.intersection(&self.answering).count() > voters.len()
    }

    /// The next step towards `row`.
    fn step(&self, row: &GroupRow) -> Step {
        if !self.committed {
            return Step::Wait("the last change is not committed");
        }
        if self.joint {
            return Step::Flatten;
        }
        if !self.voters.contains(&self.me) {
            let heirs = row.voters().map(|at| at.replica).filter(|replica| self.voters.contains(replica));
            return self.hand_over(heirs.chain(self.voters.iter().copied()));
        }
        let is_needed = |id: &ReplicaId| self.voters.contains(id) || row.replicas.iter().any(|at| at.replica == *id);
        let unwanted: BTreeSet<ReplicaId> = self.members.keys().filter(|id| !is_needed(id)).copied().collect();
        if !unwanted.is_empty() {
            return Step::Drop(unwanted);
        }
        if let Some(at) = row.replicas.iter().find(|at| !self.members.contains_key(&at.replica)) {
            return Step::AddLearner(at.replica, at.node_id);
        }
        let wanted: BTreeSet<ReplicaId> = row.voters().map(|at| at.replica).collect();
        if wanted == self.voters { Step::Settled } else { self.step_of_voters(row, wanted) }
    }

    /// To the first of `heirs` that could lead.
    fn hand_over(&self, mut heirs: impl Iterator<Item = ReplicaId>) -> Step {
        match heirs.find(|replica| self.could_lead(*replica)) {
            Some(heir) => Step::HandOver(heir),
            None => Step::Wait("nobody who stays has caught up to lead"),
        }
    }

    /// While others have not caught up, `ready` takes the place of a voter that is not wanted: of one whose node is to
    /// hold another replica, if there is one; rather of one that does not answer; of the leader last.
    fn take_a_place(&self, row: &GroupRow, wanted: &BTreeSet<ReplicaId>, ready: ReplicaId) -> Step {
        let is_in_the_way = |voter: &ReplicaId| self.members.get(voter).is_some_and(|node| row.on(*node).is_some());
        let goes = self
            .voters
            .difference(wanted)
            .min_by_key(|voter| (**voter == self.me, !is_in_the_way(voter), self.answering.contains(*voter)));
        let others = || self.voters.iter().copied().filter(|voter| Some(voter) != goes);
        match goes {
            None => Step::Wait("the new voters have not caught up"),
            Some(voter) if *voter == self.me && self.voters.len() > 1 => self.hand_over(others()),
            // The only one stays until there is another.
            Some(voter) => {
                let stays = (*voter == self.me).then_some(*voter);
                let voters: BTreeSet<ReplicaId> = others().chain(stays).chain([ready]).collect();
                match self.answer_with_majority(&voters) {
                    true => Step::ChangeVoters(voters),
                    false => Step::Wait("most of the new voters do not answer"),
                }
            }
        }
    }

    fn step_of_voters(&self, row: &GroupRow, wanted: BTreeSet<ReplicaId>) -> Step {
        let new = || wanted.difference(&self.voters).copied();
        if !new().all(|replica| self.is_close(replica, BEHIND_TO_VOTE)) {
            let ready = new().find(|replica| self.is_close(*replica, BEHIND_TO_VOTE));
            return match ready {
                Some(ready) => self.take_a_place(row, &wanted, ready),
                None => Step::Wait("the new voters have not caught up"),
            };
        }
        if !self.answer_with_majority(&wanted) {
            return Step::Wait("most of the new voters do not answer");
        }
        if wanted.contains(&self.me) {
            return Step::ChangeVoters(wanted);
        }
        // In the order of the row: the first is to lead.
        let heirs = || row.voters().map(|at| at.replica).filter(|replica| self.voters.contains(replica));
        match heirs().next() {
            Some(_) => self.hand_over(heirs()),
            // All voters go. First the new ones join them.
            None => Step::ChangeVoters(&wanted | &self.voters),
        }
    }
}

/// What is remembered of a group from one look to the next.
#[derive(Debug, Default)]
struct Memory {
    /// Since when its first voter has been well.
    well_since: Option<Instant>,
    /// No hand-over before.
    not_before: Option<Instant>,
    /// Why it waits; said once.
    waits: Option<&'static str>,
}

struct Converger {
    cluster: Cluster,
    hand_over: Arc<dyn HandOver>,
    memories: BTreeMap<GroupId, Memory>,
    /// Groups of which a step is being taken.
    at_work: BTreeSet<GroupId>,
    handing_over: bool,
}

/// What a task of a step returns.
struct Done {
    group: GroupId,
    handed_over: bool,
}

/// Goes on until it is dropped.
pub async fn converge(cluster: Cluster, hand_over: Arc<dyn HandOver>) {
    let mut tables = cluster.table();
    let mut converger =
        Converger { cluster, hand_over, memories: BTreeMap::new(), at_work: BTreeSet::new(), handing_over: false };
    let mut looks = tokio::time::interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut steps: JoinSet<Done> = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            Some(done) = steps.join_next() => {
                let Done { group, handed_over } = done.expect("a step does not panic");
                converger.at_work.remove(&group);
                converger.handing_over &= !handed_over;
                // Its next step.
                converger.look_at(group, &mut steps);
            }
            changed = tables.changed() => match changed {
                Ok(()) => converger.look(&mut steps),
                Err(_) => return,
            },
            _ = looks.tick() => converger.look(&mut steps),
        }
    }
}

impl Converger {
    fn look(&mut self, steps: &mut JoinSet<Done>) {
        for group in self.cluster.groups().all() {
            self.look_at(group.id, steps);
        }
    }

    fn look_at(&mut self, id: GroupId, steps: &mut JoinSet<Done>) {
        let table = self.cluster.table().borrow().clone();
        let (Some(row), Some(group)) = (table.get(&id), self.cluster.groups().get(id)) else { return };
        if self.at_work.contains(&id) {
            return;
        }
        let view = group.leads(Duration::ZERO).and_then(|_| View::of(&group));
        let Some(mut view) = view else {
            self.memories.remove(&id);
            return;
        };
        view.note_unfit(&self.cluster);
        match view.step(row) {
            Step::Settled => {
                let step = self.first_voter(id, row, &view).map_or(Step::Settled, Step::HandOver);
                self.take(group, step, WISH_AGAIN_AFTER, steps);
            }
            step => self.take(group, step, HAND_OVER_AGAIN_AFTER, steps),
        }
    }

    fn take(&mut self, group: Group, step: Step, again_after: Duration, steps: &mut JoinSet<Done>) {
        let memory = self.memories.entry(group.id).or_default();
        let id = group.id;
        let waits = if let Step::Wait(why) = step { Some(why) } else { None };
        if waits.is_some() && waits != memory.waits {
            tracing::debug!(group = %id, why = waits, "the members do not follow their row yet");
        }
        memory.waits = waits;
        match step {
            Step::Settled | Step::Wait(_) => {}
            Step::HandOver(to) => {
                let early = memory.not_before.is_some_and(|not_before| Instant::now() < not_before);
                if early || self.handing_over || self.cluster.stopping() {
                    return;
                }
                memory.not_before = Some(Instant::now() + again_after);
                self.handing_over = true;
                self.at_work.insert(id);
                let hand_over = self.hand_over.clone();
                steps.spawn(async move {
                    tracing::info!(group = %id, to, "handing over the lead");
                    hand_over.hand_over(id, to).await;
                    let _ = timeout(HAND_OVER_WITHIN, until_it_follows(&group)).await;
                    Done { group: id, handed_over: true }
                });
            }
            step => {
                self.at_work.insert(id);
                steps.spawn(async move {
                    change(&group, step).await;
                    Done { group: id, handed_over: false }
                });
            }
        }
    }

    /// Whom leadership goes to though nothing forces it.
    fn first_voter(&mut self, id: GroupId, row: &GroupRow, view: &View) -> Option<ReplicaId> {
        let first = row.voters().next()?;
        let well = first.replica != view.me
            && view.could_lead(first.replica)
            && self.cluster.answers(first.node_id, HEARD_WITHIN);
        let memory = self.memories.entry(id).or_default();
        if !well {
            memory.well_since = None;
            return None;
        }
        let since = *memory.well_since.get_or_insert_with(Instant::now);
        (since.elapsed() >= WELL_FOR).then_some(first.replica)
    }
}

async fn until_it_follows(group: &Group) {
    let mut metrics = group.raft.server_metrics();
    while metrics.borrow_watched().state == ServerState::Leader {
        if metrics.changed().await.is_err() {
            return;
        }
    }
}

/// Takes a step that is an entry of the log.
async fn change(group: &Group, step: Step) {
    tracing::info!(group = %group.id, ?step, "changing the members");
    let raft = &group.raft;
    let change = async {
        match &step {
            Step::AddLearner(replica, node_id) => {
                let member = Member { node_id: *node_id };
                raft.add_learner(*replica, member, false).await
            }
            // Those that go stay learners until they know it, and do not ask for votes.
            Step::ChangeVoters(voters) => raft.change_membership(voters.clone(), true).await,
            Step::Drop(replicas) => raft.change_membership(ChangeMembers::RemoveNodes(replicas.clone()), true).await,
            // Nothing is added; but what is joint becomes one set.
            Step::Flatten => raft.change_membership(ChangeMembers::AddVoterIds(BTreeSet::new()), true).await,
            Step::Settled | Step::Wait(_) | Step::HandOver(_) => unreachable!("no entry of the log"),
        }
    };
    match timeout(STEP_WITHIN, change).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => {
            tracing::info!(group = %group.id, ?step, %error, "the members were not changed yet");
            // What stands in the way takes a moment to go.
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Err(_) => tracing::info!(group = %group.id, ?step, "a change of the members takes long"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::ReplicaAt;

    /// A row of voters, and of learners.
    fn row(voters: &[u64], learners: &[u64]) -> GroupRow {
        let at = |voter| move |id: &u64| ReplicaAt { replica: *id, node_id: 10 + *id, voter };
        let replicas = voters.iter().map(at(true)).chain(learners.iter().map(at(false))).collect();
        GroupRow { epoch: 2, replicas, next_replica: 99 }
    }

    /// A group at rest, led by the first.
    fn view(voters: &[u64], learners: &[u64]) -> View {
        let all: Vec<u64> = voters.iter().chain(learners).copied().collect();
        View {
            me: voters[0],
            committed: true,
            joint: false,
            voters: voters.iter().copied().collect(),
            members: all.iter().map(|id| (*id, 10 + *id)).collect(),
            last_index: 1_000,
            matching: all.iter().map(|id| (*id, 1_000)).collect(),
            answering: all.iter().copied().collect(),
            unfit: BTreeSet::new(),
        }
    }

    fn set(ids: &[u64]) -> BTreeSet<u64> {
        ids.iter().copied().collect()
    }

    /// The view when the step has been taken; those who are new have caught up.
    fn after(before: &View, step: &Step) -> View {
        let mut view = before.clone();
        match step {
            Step::AddLearner(replica, node) => {
                view.members.insert(*replica, *node);
                view.matching.insert(*replica, view.last_index);
                view.answering.insert(*replica);
            }
            Step::ChangeVoters(voters) => view.voters = voters.clone(),
            Step::HandOver(to) => view.me = *to,
            Step::Drop(replicas) => view.members.retain(|id, _| !replicas.contains(id)),
            Step::Flatten => view.joint = false,
            Step::Settled | Step::Wait(_) => panic!("no step: {step:?}"),
        }
        view
    }

    fn steps(mut view: View, row: &GroupRow) -> Vec<Step> {
        let mut steps = Vec::new();
        loop {
            let step = view.step(row);
            if step == Step::Settled {
                return steps;
            }
            view = after(&view, &step);
            steps.push(step);
            assert!(steps.len() < 20, "{steps:?}");
        }
    }

    #[test]
    fn a_group_grows() {
        let expected = [Step::AddLearner(2, 12), Step::AddLearner(3, 13), Step::ChangeVoters(set(&[1, 2, 3]))];
        assert_eq!(steps(view(&[1], &[]), &row(&[1, 2, 3], &[])), expected);
    }

    #[test]
    fn a_leader_that_goes_hands_over_first() {
        let expected =
            [Step::AddLearner(4, 14), Step::HandOver(2), Step::ChangeVoters(set(&[2, 3, 4])), Step::Drop(set(&[1]))];
        assert_eq!(steps(view(&[1, 2, 3], &[]), &row(&[2, 3, 4], &[])), expected);
    }

    #[test]
    fn the_only_voter_is_replaced_by_way_of_two() {
        let expected = [
            Step::AddLearner(2, 12),
            Step::ChangeVoters(set(&[1, 2])),
            Step::HandOver(2),
            Step::ChangeVoters(set(&[2])),
            Step::Drop(set(&[1])),
        ];
        assert_eq!(steps(view(&[1], &[]), &row(&[2], &[])), expected);
    }

    #[test]
    fn learners_come_stay_and_become_voters() {
        let expected = [Step::Drop(set(&[5])), Step::AddLearner(4, 14), Step::ChangeVoters(set(&[1, 3]))];
        assert_eq!(steps(view(&[1, 2], &[3, 5]), &row(&[1, 3], &[2, 4])), expected);
    }

    #[test]
    fn what_a_crash_left_is_finished_first() {
        let uncommitted = View { committed: false, ..view(&[1, 2], &[3]) };
        assert!(matches!(uncommitted.step(&row(&[1, 2, 3], &[])), Step::Wait(_)));
        let joint = View { joint: true, ..view(&[1, 2, 3], &[]) };
        assert_eq!(joint.step(&row(&[1, 2], &[])), Step::Flatten);
    }

    /// It was a voter of the old set only, and has led the change to its end. One that drops itself leads on, and is no
    /// member of what it leads.
    #[test]
    fn a_leader_that_is_no_voter_hands_over_before_anything_else() {
        let found = View { me: 5, ..view(&[1, 2, 3], &[5]) };
        let expected = [Step::HandOver(2), Step::Drop(set(&[5])), Step::AddLearner(4, 14)];
        assert_eq!(steps(found.clone(), &row(&[4, 2, 3], &[]))[..3], expected);
        assert_eq!(steps(found.clone(), &row(&[1, 2, 3], &[5])), [Step::HandOver(1)]);
        let unfit = View { unfit: set(&[1, 2, 3]), ..found };
        assert!(matches!(unfit.step(&row(&[1, 2, 3], &[])), Step::Wait(_)));
    }

    #[test]
    fn voters_change_only_when_the_new_ones_are_there() {
        let wanted = row(&[1, 2, 4], &[]);
        let mut found = view(&[1, 2, 3], &[4]);
        assert_eq!(found.step(&wanted), Step::ChangeVoters(set(&[1, 2, 4])));
        found.matching.insert(4, 1_000 - BEHIND_TO_VOTE - 1);
        assert!(matches!(found.step(&wanted), Step::Wait(_)));
        found.matching.insert(4, 1_000);
        found.answering.remove(&4);
        assert!(matches!(found.step(&wanted), Step::Wait(_)));
    }

    /// It was left like this by rows that named the nodes of old voters again.
    #[test]
    fn a_voter_makes_room_for_another_replica_on_its_node() {
        let row = GroupRow {
            epoch: 30,
            replicas: [(25, 4), (31, 7), (32, 9)]
                .map(|(replica, node_id)| ReplicaAt { replica, node_id, voter: true })
                .to_vec(),
            next_replica: 33,
        };
        let mut found = view(&[17, 19, 20], &[25, 31, 32]);
        found.members = BTreeMap::from([(17, 5), (19, 7), (20, 4), (25, 4), (31, 7), (32, 9), (22, 7)]);
        for replica in [25, 31] {
            found.answering.remove(&replica);
            found.matching.remove(&replica);
        }
        let mut steps = Vec::new();
        loop {
            let step = found.step(&row);
            match &step {
                Step::Settled => break,
                Step::Wait(_) => {
                    // What has room begins, and catches up.
                    let has_room = |(id, node): (&u64, &u64)| {
                        !found.members.iter().any(|(other, at)| at == node && other < id)
                            && !found.answering.contains(id)
                    };
                    let begins = found.members.iter().find(|(id, node)| has_room((id, node))).map(|(id, _)| *id);
                    let begins = begins.unwrap_or_else(|| panic!("stuck after {steps:?}"));
                    found.answering.insert(begins);
                    found.matching.insert(begins, found.last_index);
                    continue;
                }
                step => found = after(&found, step),
            }
            assert!(found.voters.len() == 3, "{steps:?}");
            steps.push(step);
        }
        assert_eq!(steps[0], Step::Drop(set(&[22])));
        assert_eq!(steps[1], Step::ChangeVoters(set(&[17, 20, 32])));
        assert_eq!((found.voters, found.members.len()), (set(&[25, 31, 32]), 3));
    }

    /// The nodes of 2 and 3 are lost, that of 3 before anything was there: what is left is enough all the same.
    #[test]
    fn a_new_voter_does_not_wait_for_those_that_never_come() {
        let row = row(&[2, 4, 3, 5], &[]);
        let mut found = view(&[4, 1, 2], &[3, 5]);
        for replica in [2, 3] {
            found.answering.remove(&replica);
            found.matching.remove(&replica);
        }
        assert_eq!(found.step(&row), Step::ChangeVoters(set(&[2, 4, 5])));
        found.me = 1;
        assert_eq!(found.step(&row), Step::HandOver(4));
        found.matching.remove(&5);
        assert!(matches!(found.step(&row), Step::Wait(_)));
        // One that is alone is not alone any more.
        let mut alone = view(&[1], &[6, 7]);
        alone.matching.remove(&7);
        let row = super::tests::row(&[6, 7], &[]);
        assert_eq!(alone.step(&row), Step::ChangeVoters(set(&[1, 6])));
    }

    #[test]
    fn no_majority_of_those_that_answer_is_removed() {
        let mut found = view(&[1, 2, 3], &[]);
        found.answering.remove(&2);
        assert!(matches!(found.step(&row(&[1, 2], &[])), Step::Wait(_)));
        assert_eq!(found.step(&row(&[1, 3], &[])), Step::ChangeVoters(set(&[1, 3])));
    }

    #[test]
    fn only_who_has_caught_up_is_handed_the_lead() {
        let wanted = row(&[2, 3], &[]);
        let mut found = view(&[1, 2, 3], &[]);
        assert_eq!(found.step(&wanted), Step::HandOver(2));
        found.matching.insert(2, 900);
        assert_eq!(found.step(&wanted), Step::HandOver(3));
        found.unfit.insert(3);
        assert!(matches!(found.step(&wanted), Step::Wait(_)));
        found.unfit.clear();
        found.matching.insert(3, 900);
        assert!(matches!(found.step(&wanted), Step::Wait(_)));
    }
}
