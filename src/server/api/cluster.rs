//! The cluster as operators see it, and what they may change. For administrators.
//!
//! Any node answers from what it knows: the table, and what the others have said of themselves within the last seconds.
//! Nothing is asked for the sake of an answer, so that it comes even when half of the cluster is away.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::administration::check_administrator;
use super::operation::{Operation, Respond};
use crate::inspect::Digest;
use crate::placement::agent::has_followed;
use crate::placement::nodes::own_status;
use crate::placement::verify::{Verdict, verify};
use crate::placement::{Control, ControlError, GroupRow};
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::server::problem::Problem;
use crate::task::{GroupId, Invalid};
use crate::wire::peer::{GroupStatus, NodeStatus};
use crate::wire::proto::cluster_group::State;
use crate::wire::proto::cluster_nodes::Placement;
use crate::wire::proto::cluster_request::Ask;
use crate::wire::proto::cluster_response::Answer;
use crate::wire::proto::{self, ClusterRequest, ClusterResponse};

/// Who has not said anything for longer does not answer.
const ANSWERS_WITHIN: Duration = Duration::from_secs(3);

impl Operation for ClusterRequest {
    async fn here(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        // Rare, and large: not a part of what each connection keeps.
        let answer = Box::pin(answer(service, &session, self)).await;
        respond(answer.map(|answer| ClusterResponse { answer, ..Default::default() }));
    }
}

async fn answer(service: &Service, session: &Session, request: ClusterRequest) -> Result<Option<Answer>, Problem> {
    check_administrator(session)?;
    match request.ask {
        None => Err(Invalid::new("ask: is missing").into()),
        Some(Ask::Nodes(_)) => Ok(Some(Answer::Nodes(nodes(service)))),
        Some(Ask::Groups(_)) => Ok(Some(Answer::Groups(groups(service)))),
        Some(Ask::Verify(asked)) => {
            let group = u16::try_from(asked.group).ok().filter(|group| *group <= service.shards);
            let group = group.ok_or_else(|| Invalid::new(format!("group: there is no group {}", asked.group)))?;
            let verdict = verify(&service.cluster, &*service.digests, GroupId(group)).await;
            Ok(Some(Answer::Verdict(shown_verdict(verdict))))
        }
        Some(Ask::Move(asked)) => {
            let control = service.control.changeable()?;
            let shard = u16::try_from(asked.shard).ok().filter(|shard| *shard < service.shards);
            let shard = shard.ok_or_else(|| Invalid::new(format!("shard: there is no shard {}", asked.shard)))?;
            let group = GroupId(shard + 1);
            if !has_settled(service, group) {
                return Err(ControlError::Moving(group).into());
            }
            control.move_replica(group, asked.from_node, asked.to_node).await?;
            Ok(None)
        }
        Some(Ask::Drain(asked)) => {
            service.control.changeable()?.drain(asked.node_id).await?;
            Ok(None)
        }
        Some(Ask::Undrain(asked)) => {
            service.control.changeable()?.undrain(asked.node_id).await?;
            Ok(None)
        }
    }
}

fn shown_verdict(verdict: Verdict) -> proto::ClusterVerdict {
    let replica = |(replica, node_id, digest): (u64, u64, Result<Digest, String>)| match digest {
        Ok(Digest { applied, rows, hash }) => proto::ReplicaDigest {
            replica,
            node_id,
            digest: hash.to_vec().into(),
            rows,
            applied_index: applied.map_or(0, |applied| applied.index),
            failed: String::new(),
        },
        Err(failed) => proto::ReplicaDigest { replica, node_id, failed, ..Default::default() },
    };
    proto::ClusterVerdict {
        group: verdict.group.0.into(),
        replicas: verdict.replicas.into_iter().map(replica).collect(),
        failed: verdict.failed.unwrap_or_default(),
    }
}

/// This node, and the others as they were heard last.
fn statuses(service: &Service) -> BTreeMap<u64, NodeStatus> {
    let heard = service.cluster.statuses().into_iter().filter(|(_, heard)| heard.at.elapsed() <= ANSWERS_WITHIN);
    let own = own_status(&service.cluster, &*service.clock);
    heard.map(|(node, heard)| (node, (*heard.status).clone())).chain([(own.node_id, own)]).collect()
}

/// What the leader says of a group.
fn led(statuses: &BTreeMap<u64, NodeStatus>, group: GroupId) -> Option<&GroupStatus> {
    let all = statuses.values().flat_map(|status| &status.groups);
    all.filter(|found| found.group == u32::from(group.0) && found.leads).max_by_key(|found| found.term)
}

/// A row that its group has not followed is not changed by hand: who begins the group may hang on it.
fn has_settled(service: &Service, group: GroupId) -> bool {
    let table = service.cluster.table().borrow().clone();
    let statuses = statuses(service);
    let leader = led(&statuses, group);
    table.get(&group).is_none_or(|row| leader.is_some_and(|leader| has_followed(leader, row)))
}

fn nodes(service: &Service) -> proto::ClusterNodes {
    let (cluster, statuses) = (&service.cluster, statuses(service));
    let table = cluster.table().borrow().clone();
    let view = match &service.control {
        Control::Etcd(control) => Some(control.view()),
        Control::Alone | Control::Fixed => None,
    };
    let known = cluster.nodes().into_iter().map(|node| {
        let id = node.node_id;
        let status = statuses.get(&id);
        let named = table.values().filter(|row| row.on(id).is_some()).count();
        let held = status.map_or(0, |status| status.groups.len());
        let leaders = status.map_or(0, |status| status.groups.iter().filter(|group| group.leads).count());
        let heard = cluster.status(id);
        let quiet_since = heard.as_ref().filter(|_| status.is_none()).map(|heard| {
            let quiet_ms = u64::try_from(heard.at.elapsed().as_millis()).unwrap_or(u64::MAX);
            service.clock.now_ms().saturating_sub(quiet_ms)
        });
        let away = view.as_ref().and_then(|view| view.away.get(&id)).map(|away| away.since_ms);
        proto::ClusterNode {
            node_id: id,
            peer: node.peer,
            tcp: node.tcp,
            http: node.http,
            zone: node.zone,
            version: node.version,
            answers: status.is_some(),
            away_since_ms: quiet_since.or(away).unwrap_or(0),
            draining: view.as_ref().is_some_and(|view| view.drains.contains(&id)),
            stopping: status.is_some_and(|status| status.stopping),
            replicas: count(named.max(held)),
            leaders: count(leaders),
            clock_ahead_us: heard.map_or(0, |heard| heard.clock_ahead_us),
        }
    });
    proto::ClusterNodes {
        cluster: cluster.network().cluster().to_owned(),
        placement: match service.control {
            Control::Alone => Placement::Alone,
            Control::Fixed => Placement::Static,
            Control::Etcd(_) => Placement::Etcd,
        }
        .into(),
        controller: view.as_ref().and_then(|view| view.controller.as_ref()).map_or(0, |holder| holder.value.node_id),
        nodes: known.collect(),
    }
}

fn groups(service: &Service) -> proto::ClusterGroups {
    let statuses = statuses(service);
    let table = service.cluster.table().borrow().clone();
    let wanted = wanted_replicas(service);
    let shown = |(id, row): (&GroupId, &GroupRow)| group(*id, row, led(&statuses, *id), &statuses, wanted);
    proto::ClusterGroups { groups: table.iter().map(shown).collect() }
}

/// Voters that every group is to have.
fn wanted_replicas(service: &Service) -> usize {
    let Control::Etcd(control) = &service.control else { return 0 };
    let view = control.view();
    let may_hold = view.ids.keys().filter(|node| !view.drains.contains(node)).count();
    view.config.as_ref().map_or(0, |config| usize::from(config.replicas)).min(may_hold)
}

fn group(
    id: GroupId,
    row: &GroupRow,
    leader: Option<&GroupStatus>,
    statuses: &BTreeMap<u64, NodeStatus>,
    wanted: usize,
) -> proto::ClusterGroup {
    let mut replicas = Vec::new();
    let members = leader.map(|status| &*status.members).unwrap_or_default();
    for member in members {
        let last_index = leader.map_or(0, |status| status.last_index);
        let lag = member.matching.map(|matching| last_index.saturating_sub(matching.index));
        let leaving = !row.replicas.iter().any(|at| at.replica == member.replica);
        let own = leader.is_some_and(|status| status.replica == member.replica);
        replicas.push(proto::ClusterReplica {
            replica: member.replica,
            node_id: member.node_id,
            voter: member.voter,
            leaving,
            coming: false,
            lag: if own { Some(0) } else { lag },
        });
    }
    for at in row.replicas.iter().filter(|at| !members.iter().any(|member| member.replica == at.replica)) {
        let coming = leader.is_some();
        replicas.push(proto::ClusterReplica {
            replica: at.replica,
            node_id: at.node_id,
            voter: at.voter,
            leaving: false,
            coming,
            lag: None,
        });
    }
    replicas.sort_by_key(|replica| (!replica.voter, replica.replica));
    let voters = || row.voters().map(|at| at.node_id);
    let answering = voters().filter(|node| statuses.contains_key(node)).count();
    let state = match leader {
        None => State::NoLeader,
        Some(status) if !has_followed(status, row) => State::Moving,
        Some(_) if answering < voters().count().max(wanted) => State::UnderReplicated,
        Some(_) => State::Ok,
    };
    let leader_node = statuses.values().find(|status| status.groups.iter().any(|found| Some(found) == leader));
    proto::ClusterGroup {
        group: id.0.into(),
        state: state.into(),
        leader_node: leader_node.map_or(0, |status| status.node_id),
        term: leader.map_or(0, |status| status.term),
        replicas,
        epoch: row.epoch,
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::rig::{Rig, check};
    use super::*;
    use crate::placement::ReplicaAt;
    use crate::wire::peer::{GroupMember, LogId};
    use crate::wire::problems::Code;

    fn row() -> GroupRow {
        let at = |replica, node_id| ReplicaAt { replica, node_id, voter: true };
        GroupRow { epoch: 4, replicas: vec![at(1, 1), at(2, 2)], next_replica: 4 }
    }

    fn status(node_id: u64, leads: bool, members: &[(u64, u64)]) -> NodeStatus {
        let matching = Some(LogId { term: 3, index: 90 });
        let member = |(replica, node_id): &(u64, u64)| GroupMember {
            replica: *replica,
            node_id: *node_id,
            voter: true,
            matching,
        };
        let group = GroupStatus {
            group: 1,
            replica: node_id,
            term: 3,
            leads,
            last_index: 100,
            members: members.iter().map(member).collect(),
            ..Default::default()
        };
        NodeStatus { node_id, groups: vec![group], ..Default::default() }
    }

    fn look(statuses: &[NodeStatus], wanted: usize) -> proto::ClusterGroup {
        let statuses: BTreeMap<u64, NodeStatus> =
            statuses.iter().map(|status| (status.node_id, status.clone())).collect();
        group(GroupId(1), &row(), led(&statuses, GroupId(1)), &statuses, wanted)
    }

    #[test]
    fn a_group_is_shown_as_its_leader_knows_it() {
        let both = [(1, 1), (2, 2)];
        let found = look(&[status(1, true, &both), status(2, false, &both)], 2);
        assert_eq!((found.state(), found.leader_node, found.term, found.epoch), (State::Ok, 1, 3, 4));
        let lags: Vec<Option<u64>> = found.replicas.iter().map(|replica| replica.lag).collect();
        assert_eq!(lags, [Some(0), Some(10)]);
        assert_eq!(look(&[status(1, true, &both)], 2).state(), State::UnderReplicated);
        assert_eq!(look(&[status(1, true, &both), status(2, false, &both)], 3).state(), State::UnderReplicated);
        let moving = look(&[status(1, true, &[(1, 1), (3, 3)]), status(2, false, &[])], 2);
        assert_eq!(moving.state(), State::Moving);
        let shown: Vec<_> = moving.replicas.iter().map(|at| (at.replica, at.leaving, at.coming)).collect();
        assert_eq!(shown, [(1, false, false), (2, false, true), (3, true, false)]);
        let nobody = look(&[status(2, false, &both)], 2);
        assert_eq!((nobody.state(), nobody.leader_node, nobody.replicas.len()), (State::NoLeader, 0, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn only_administrators_look_and_nobody_moves_what_is_alone() {
        let rig = Rig::start().await;
        let request = |ask| ClusterRequest { ask: Some(ask) };
        let nodes = request(Ask::Nodes(proto::ClusterNodesRequest {}));
        check("a client", &rig.refusal(&rig.client(), nodes).await, Code::Unauthorized, "administrator");
        let Some(Answer::Nodes(found)) = rig.ask(&rig.admin(), nodes).await.unwrap().answer else { panic!("nodes") };
        assert_eq!(found.nodes.len(), 1);
        let verify = |group| request(Ask::Verify(proto::ClusterVerifyRequest { group }));
        let move_replica = request(Ask::Move(proto::MoveReplica { shard: 0, from_node: 1, to_node: 2 }));
        for (name, request, text) in [
            ("nothing", ClusterRequest { ask: None }, "ask: is missing"),
            ("no group", verify(99), "there is no group 99"),
            ("alone", move_replica, "alone"),
            ("drained", request(Ask::Drain(proto::DrainNode { node_id: 1 })), "alone"),
        ] {
            check(name, &rig.refusal(&rig.admin(), request).await, Code::InvalidRequest, text);
        }
    }
}
