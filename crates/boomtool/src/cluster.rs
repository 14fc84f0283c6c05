//! `boomtool cluster`: status, shards, verify, move, drain, undrain. For administrators.

use std::time::Duration;

use data_encoding::HEXLOWER;
use serde_json::{Value, json};

use super::args::cluster::{ClusterCommand, MoveArgs};
use super::output::{note, table};
use super::show::due_text;
use super::{Context, ToolError, interrupted};
use boomerang_client::{Client, ClientError};
use boomerang_wire::proto::cluster_group::State;
use boomerang_wire::proto::cluster_nodes::Placement;
use boomerang_wire::proto::{ClusterGroup, ClusterNode, ClusterReplica, ClusterVerdict, ReplicaDigest};

const EQUAL: &str = "equal";
const DIFFERENT: &str = "DIFFERENT";

/// So often what is on its way is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

pub(super) async fn run(command: ClusterCommand, context: &Context) -> Result<(), ToolError> {
    let client = context.connect().await?;
    let done = match command {
        ClusterCommand::Status => status(&client, context).await,
        ClusterCommand::Shards => shards(&client, context).await,
        ClusterCommand::Verify => verify(&client, context).await,
        ClusterCommand::Move(args) => move_replica(&client, args, context).await,
        ClusterCommand::Drain { node, no_wait } => drain(&client, node, no_wait, context).await,
        ClusterCommand::Undrain { node } => {
            client.undrain_node(node).await?;
            said(context, node, "undrained")
        }
    };
    context.hang_up(client).await;
    done
}

fn said(context: &Context, node: u64, result: &str) -> Result<(), ToolError> {
    context.output.line(|| format!("node {node}  {result}"), || json!({ "node_id": node, "result": result }))
}

async fn status(client: &Client, context: &Context) -> Result<(), ToolError> {
    let found = client.cluster_nodes().await?;
    if context.output.json {
        return found.nodes.iter().try_for_each(|node| context.output.line(String::new, || node_object(node)));
    }
    let head = ["NODE", "STATE", "REPLICAS", "LEADS", "ZONE", "CLOCK", "VERSION", "TCP", "HTTP", "PEER"];
    let head = head.map(str::to_owned).to_vec();
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(found.nodes.iter().map(node_row)).collect();
    table(&rows).into_iter().try_for_each(|line| context.output.raw(&format!("{line}\n")))?;
    let placement = match found.placement() {
        Placement::Alone => "a node alone".to_owned(),
        Placement::Static => "a fixed list of nodes".to_owned(),
        Placement::Etcd if found.controller == 0 => "by etcd; there is no controller now".to_owned(),
        Placement::Etcd => format!("by etcd; the controller is node {}", found.controller),
    };
    context.output.raw(&format!("cluster {}; placement: {placement}\n", found.cluster))
}

fn state_of(node: &ClusterNode) -> &'static str {
    match node {
        _ if !node.answers => "away",
        _ if node.stopping => "not ready",
        _ if node.draining => "draining",
        _ => "ok",
    }
}

fn node_row(node: &ClusterNode) -> Vec<String> {
    let or_dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    let mut state = state_of(node).to_owned();
    if !node.answers && node.away_since_ms > 0 {
        state = format!("away since {}", due_text(node.away_since_ms));
    }
    if !node.answers && node.draining {
        state.push_str(", draining");
    }
    vec![
        node.node_id.to_string(),
        state,
        node.replicas.to_string(),
        node.leaders.to_string(),
        or_dash(&node.zone),
        if node.answers { clock_text(node.clock_ahead_us) } else { "-".into() },
        or_dash(&node.version),
        or_dash(&node.tcp),
        or_dash(&node.http),
        or_dash(&node.peer),
    ]
}

fn clock_text(ahead_us: i64) -> String {
    let (sign, us) = (if ahead_us < 0 { '-' } else { '+' }, ahead_us.unsigned_abs());
    format!("{sign}{}.{} ms", us / 1000, us % 1000 / 100)
}

fn node_object(node: &ClusterNode) -> Value {
    json!({
        "node_id": node.node_id,
        "state": state_of(node),
        "answers": node.answers,
        "away_since_ms": (node.away_since_ms > 0).then_some(node.away_since_ms),
        "draining": node.draining,
        "stopping": node.stopping,
        "replicas": node.replicas,
        "leaders": node.leaders,
        "zone": node.zone,
        "version": node.version,
        "tcp": node.tcp,
        "http": node.http,
        "peer": Some(&node.peer).filter(|address| !address.is_empty()),
        "clock_ahead_us": node.clock_ahead_us,
    })
}

async fn shards(client: &Client, context: &Context) -> Result<(), ToolError> {
    let found = client.cluster_groups().await?;
    if context.output.json {
        return found.groups.iter().try_for_each(|group| context.output.line(String::new, || group_object(group)));
    }
    let head = ["SHARD", "STATE", "LEADER", "TERM", "REPLICAS"].map(str::to_owned).to_vec();
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(found.groups.iter().map(group_row)).collect();
    table(&rows).into_iter().try_for_each(|line| context.output.raw(&format!("{line}\n")))
}

fn shard_of(group: &ClusterGroup) -> Option<u32> {
    group.group.checked_sub(1)
}

fn group_state(group: &ClusterGroup) -> &'static str {
    match group.state() {
        State::Ok => "ok",
        State::Moving => "moving",
        State::UnderReplicated => "under-replicated",
        State::NoLeader => "no leader",
    }
}

fn group_row(group: &ClusterGroup) -> Vec<String> {
    let replicas: Vec<String> = group.replicas.iter().map(|replica| replica_text(replica, group.leader_node)).collect();
    vec![
        shard_of(group).map_or_else(|| "-".into(), |shard| shard.to_string()),
        group_state(group).to_owned(),
        if group.leader_node == 0 { "-".into() } else { group.leader_node.to_string() },
        group.term.to_string(),
        replicas.join(" "),
    ]
}

fn replica_text(replica: &ClusterReplica, leader_node: u64) -> String {
    let mut text = replica.node_id.to_string();
    text.push_str(if replica.node_id == leader_node { "*" } else { "" });
    text.push_str(if replica.voter { "" } else { "?" });
    text.push_str(if replica.coming { "+" } else { "" });
    text.push_str(if replica.leaving { "-" } else { "" });
    if let Some(lag) = replica.lag.filter(|lag| *lag > 0) {
        text.push_str(&format!("({lag} behind)"));
    }
    text
}

fn group_object(group: &ClusterGroup) -> Value {
    let replica = |replica: &ClusterReplica| {
        json!({
            "replica": replica.replica,
            "node_id": replica.node_id,
            "voter": replica.voter,
            "leaving": replica.leaving,
            "coming": replica.coming,
            "lag": replica.lag,
        })
    };
    json!({
        "shard": shard_of(group),
        "group": group.group,
        "state": group_state(group),
        "leader_node": (group.leader_node > 0).then_some(group.leader_node),
        "term": group.term,
        "epoch": group.epoch,
        "replicas": group.replicas.iter().map(replica).collect::<Vec<_>>(),
    })
}

/// What the digests of a group's replicas say.
fn verdict_text(verdict: &ClusterVerdict) -> String {
    let digests: Vec<&ReplicaDigest> = verdict.replicas.iter().filter(|replica| replica.failed.is_empty()).collect();
    let equal = |replica: &&ReplicaDigest| {
        (&replica.digest, replica.rows, replica.applied_index)
            == (&digests[0].digest, digests[0].rows, digests[0].applied_index)
    };
    match verdict.replicas.iter().find(|replica| !replica.failed.is_empty()) {
        _ if !verdict.failed.is_empty() => verdict.failed.clone(),
        _ if !digests.iter().all(equal) => DIFFERENT.to_owned(),
        Some(replica) => format!("no digest from node {}: {}", replica.node_id, replica.failed),
        None if digests.is_empty() => "it has no replicas".to_owned(),
        None => EQUAL.to_owned(),
    }
}

async fn verify(client: &Client, context: &Context) -> Result<(), ToolError> {
    let groups = client.cluster_groups().await?.groups;
    let (mut different, mut unknown) = (0, 0);
    for group in &groups {
        let verdict = client.verify_group(group.group).await?;
        let result = verdict_text(&verdict);
        different += u32::from(result == DIFFERENT);
        unknown += u32::from(result != EQUAL && result != DIFFERENT);
        let shard = shard_of(group).map_or_else(|| "-".to_owned(), |shard| shard.to_string());
        let replica = |replica: &ReplicaDigest| {
            json!({
                "replica": replica.replica,
                "node_id": replica.node_id,
                "digest": HEXLOWER.encode(&replica.digest),
                "rows": replica.rows,
                "applied_index": replica.applied_index,
                "failed": (!replica.failed.is_empty()).then_some(&replica.failed),
            })
        };
        let rows = verdict.replicas.first().map_or(0, |replica| replica.rows);
        context.output.line(
            || format!("shard {shard}  {} replicas  {rows} rows  {result}", verdict.replicas.len()),
            || {
                json!({
                    "shard": shard_of(group),
                    "group": group.group,
                    "result": result,
                    "replicas": verdict.replicas.iter().map(replica).collect::<Vec<_>>(),
                })
            },
        )?;
    }
    match (different, unknown) {
        (0, 0) => Ok(()),
        (0, unknown) => Err(ToolError::Undone(format!("{unknown} of {} could not be compared", groups.len()))),
        (different, _) => Err(ToolError::Undone(format!("the replicas of {different} of {} differ", groups.len()))),
    }
}

async fn move_replica(client: &Client, args: MoveArgs, context: &Context) -> Result<(), ToolError> {
    let MoveArgs { shard, from, to, no_wait } = args;
    client.move_replica(shard, from, to).await?;
    let decided = |result: &'static str| {
        context.output.line(
            || format!("shard {shard}  node {from} to node {to}  {result}"),
            || json!({ "shard": shard, "from": from, "to": to, "result": result }),
        )
    };
    if no_wait {
        return decided("decided");
    }
    wait(context, async || {
        let groups = client.cluster_groups().await?.groups;
        let group = groups.into_iter().find(|group| shard_of(group) == Some(shard.into()));
        // The node that answers may not know yet what was decided.
        let there = |group: &ClusterGroup| {
            let arrived = |replica: &ClusterReplica| replica.node_id == to && replica.voter && !replica.coming;
            group.state() != State::Moving
                && group.replicas.iter().any(arrived)
                && group.replicas.iter().all(|replica| replica.node_id != from)
        };
        Ok(group.filter(|group| !there(group)).map(|group| group_row(&group).join("  ")))
    })
    .await?;
    decided("moved")
}

async fn drain(client: &Client, node: u64, no_wait: bool, context: &Context) -> Result<(), ToolError> {
    client.drain_node(node).await?;
    if no_wait {
        return said(context, node, "draining");
    }
    wait(context, async || {
        let nodes = client.cluster_nodes().await?.nodes;
        let left = nodes.into_iter().find(|found| found.node_id == node).map_or(0, |found| found.replicas);
        Ok((left > 0).then(|| format!("node {node} holds {left} replicas")))
    })
    .await?;
    said(context, node, "drained")
}

/// Until nothing is left, which is shown whenever it is something else than before.
async fn wait(context: &Context, look: impl AsyncFn() -> Result<Option<String>, ClientError>) -> Result<(), ToolError> {
    let mut shown = String::new();
    let looking = async {
        loop {
            match look().await {
                Ok(None) => return Ok(()),
                Ok(Some(left)) if left != shown => {
                    if !context.output.json {
                        note(&left);
                    }
                    shown = left;
                }
                Ok(Some(_)) => {}
                // The node that is asked may be one that comes and goes.
                Err(error) if super::watch::look_again(&error) => {}
                Err(error) => return Err(ToolError::from(error)),
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    tokio::select! {
        done = looking => done,
        () = interrupted() => Err(ToolError::Undone("it goes on, and nobody waits for it".into())),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::super::tests::boomtool;
    use super::*;
    use boomerang_client::fake::Fake;
    use boomerang_wire::proto::cluster_request::Ask;
    use boomerang_wire::proto::cluster_response::Answer;
    use boomerang_wire::proto::{self, ClusterGroups, ClusterNodes, Status, boomerang_envelope::Payload};

    fn node(node_id: u64, replicas: u32) -> ClusterNode {
        ClusterNode {
            node_id,
            tcp: format!("h{node_id}:9973"),
            version: "1".into(),
            answers: true,
            replicas,
            leaders: 2,
            clock_ahead_us: -1_540,
            ..Default::default()
        }
    }

    fn group() -> ClusterGroup {
        let replica = |replica, node_id| ClusterReplica { replica, node_id, voter: true, ..Default::default() };
        ClusterGroup {
            group: 4,
            state: State::Moving.into(),
            leader_node: 1,
            term: 7,
            replicas: vec![
                replica(1, 1),
                ClusterReplica { leaving: true, ..replica(2, 2) },
                ClusterReplica { lag: Some(12), voter: false, ..replica(3, 3) },
                ClusterReplica { coming: true, ..replica(4, 4) },
            ],
            epoch: 3,
        }
    }

    fn answered(answer: Option<Answer>) -> Payload {
        Payload::ClusterResponse(proto::ClusterResponse { answer, ..Default::default() })
    }

    fn refused(text: &str) -> Payload {
        let status = Status::InvalidRequest.into();
        Payload::ClusterResponse(proto::ClusterResponse { status, error_message: text.into(), ..Default::default() })
    }

    #[tokio::test]
    async fn the_cluster_is_shown_and_changed() {
        let fake = Fake::start().await;
        let address = fake.address();
        let looks = AtomicU32::new(0);
        fake.serve(move |request| {
            let Payload::ClusterRequest(request) = request else { panic!("{request:?}") };
            match request.ask.unwrap() {
                Ask::Nodes(_) => {
                    let left = 1_u32.saturating_sub(looks.fetch_add(1, Ordering::Relaxed));
                    let away = ClusterNode { answers: false, away_since_ms: 1_000, ..node(2, left) };
                    let nodes = vec![node(1, 5), away];
                    let placement = Placement::Etcd.into();
                    answered(Some(Answer::Nodes(ClusterNodes { cluster: "c".into(), placement, controller: 1, nodes })))
                }
                Ask::Groups(_) => answered(Some(Answer::Groups(ClusterGroups { groups: vec![group()] }))),
                Ask::Verify(asked) => {
                    assert_eq!(asked.group, 4);
                    let digest =
                        |replica, rows| ReplicaDigest { replica, node_id: replica, rows, ..Default::default() };
                    let replicas = vec![digest(1, 10), digest(2, 10), digest(3, 11)];
                    answered(Some(Answer::Verdict(ClusterVerdict { group: 4, replicas, failed: String::new() })))
                }
                Ask::Drain(asked) if asked.node_id == 2 => answered(None),
                Ask::Drain(_) => refused("node 9 is not known"),
                Ask::Undrain(_) => answered(None),
                Ask::Move(asked) => {
                    assert_eq!((asked.shard, asked.from_node, asked.to_node), (3, 1, 4));
                    refused("the placement is static: replicas do not move")
                }
            }
        });
        let run = async |line: &str| boomtool(&format!("cluster {line} --addr {address}")).await;
        let (printed, result) = run("status").await;
        result.unwrap();
        assert!(printed.contains("1     ok") && printed.contains("away since 1970"), "{printed}");
        assert!(printed.contains("-1.5 ms") && printed.contains("the controller is node 1"), "{printed}");
        let printed = run("shards").await.0;
        assert!(printed.contains("3      moving  1       7     1* 2- 3?(12 behind) 4+"), "{printed}");
        let printed = run("shards --json").await.0;
        let object: Value = serde_json::from_str(&printed).unwrap();
        assert_eq!((&object["shard"], &object["state"]), (&json!(3), &json!("moving")));
        assert_eq!(run("drain 2").await.0, "node 2  drained\n");
        assert_eq!(run("drain 2 --no-wait --json").await.0, "{\"node_id\":2,\"result\":\"draining\"}\n");
        assert_eq!(run("undrain 2").await.0, "node 2  undrained\n");
        let (printed, result) = run("verify").await;
        assert!(printed.contains("shard 3  3 replicas  10 rows  DIFFERENT"), "{printed}");
        assert_eq!(result.unwrap_err().to_string(), "the replicas of 1 of 1 differ");
        let error = run("drain 9").await.1.unwrap_err();
        assert!(error.to_string().contains("node 9 is not known"), "{error}");
        let error = run("move 3 --from 1 --to 4").await.1.unwrap_err();
        assert!(error.to_string().contains("static") && error.exit_code() == 1, "{error}");
    }
}
