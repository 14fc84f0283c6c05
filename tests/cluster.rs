//! Clusters of real processes under faults. In each test a load of its own process registers tasks and counts what its
//! receiver sees; afterwards the digests of all replicas are compared.
//!
//! One at a time: each has three nodes that write to one disk, and two cores between them.

mod common;

use std::time::Duration;

use boomerang_task::locks::Mutex;
use common::cluster::Cluster;
use common::etcd::Etcd;
use common::{eventually, eventually_within, http_get, one_of_three};

static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE.lock_after_panic()
}

/// 400 tasks a second for ten seconds, each registered before the first is due.
const STEADY: [&str; 6] = ["--tasks", "4000", "--spread", "10s", "--lead", "3s"];

/// What the nodes count.
/// A third node is told to take one in when the groups have settled after the restart before.
const SNAPSHOT_WITHIN: Duration = Duration::from_secs(60);
/// 500 ms is what a release build keeps on an idle machine; see the README for the figure.
const ROLLED_LATEST: Duration = Duration::from_millis(1_500);

const FIRED: &str = "boomerang_acknowledged_total";
const REGISTERED: &str = "boomerang_registrations_total";

/// The node that leads most, from 0, as they say themselves.
fn busiest(cluster: &Cluster) -> usize {
    let nodes = cluster.ok(&["cluster", "status"]);
    let leads = |at: &usize| {
        let node = cluster.nodes[*at].started.node_id;
        nodes.iter().find(|shown| shown["node_id"] == node).and_then(|shown| shown["leaders"].as_u64())
    };
    (0..cluster.nodes.len()).max_by_key(leads).unwrap()
}

fn is_ready(cluster: &Cluster, node: usize) -> bool {
    http_get(cluster.nodes[node].started.http, "/readyz").0 == 200
}

#[test]
fn a_killed_leader_is_replaced_and_nothing_is_lost() {
    let _alone = alone();
    let mut cluster = Cluster::with_peers(3, &[]);
    let load = cluster.load(&STEADY);
    cluster.wait_for_count(FIRED, 1_000);
    let victim = busiest(&cluster);
    cluster.nodes[victim].kill();
    let account = load.finish();
    account.assert_promises();
    account.assert_all_acknowledged();
    // A lease, an election and the overdue ones: well below what a machine with other work makes of it.
    let latest = account.latest();
    assert!(
        latest < Duration::from_secs(4),
        "the latest task came {latest:?} late, which is more than a failover takes"
    );
    cluster.nodes[victim].restart();
    cluster.assert_replicas_agree();
}

#[test]
fn clients_register_on_while_a_leader_is_killed() {
    let _alone = alone();
    let mut cluster = Cluster::with_peers(3, &[]);
    // Registered all the time, and not ahead: the kill falls into the registrations.
    let load = cluster.load(&["--tasks", "16000", "--spread", "8s", "--lead", "1s"]);
    cluster.wait_for_count(REGISTERED, 2_000);
    let victim = busiest(&cluster);
    cluster.nodes[victim].kill();
    let account = load.finish();
    account.assert_promises();
    account.assert_all_acknowledged();
    cluster.nodes[victim].restart();
    cluster.assert_replicas_agree();
}

/// Others lead when it wakes up, and it must find out before it fires anything.
#[test]
fn a_leader_that_was_paused_does_not_go_on_as_before() {
    let _alone = alone();
    let mut cluster = Cluster::with_peers(3, &[]);
    let load = cluster.load(&STEADY);
    cluster.wait_for_count(FIRED, 800);
    let victim = busiest(&cluster);
    cluster.stop_process(victim);
    // A node that is stopped says nothing, not even how much it has counted.
    let paused = cluster.nodes.remove(victim);
    let before = cluster.count(FIRED);
    cluster.wait_for_count(FIRED, before + 1_600);
    cluster.nodes.insert(victim, paused);
    cluster.continue_process(victim);
    let account = load.finish();
    account.assert_promises();
    account.assert_all_acknowledged();
    cluster.assert_replicas_agree();
}

#[test]
fn without_a_majority_nothing_is_promised_and_nothing_is_forgotten() {
    let _alone = alone();
    let mut cluster = Cluster::with_peers(3, &[]);
    let load = cluster.load(&STEADY);
    cluster.wait_for_count(FIRED, 1_000);
    cluster.nodes[1].kill();
    cluster.nodes[2].kill();
    eventually("node 1 says that it is not ready", || (!is_ready(&cluster, 0)).then_some(()));
    cluster.nodes[1].restart();
    eventually("two of three are enough", || is_ready(&cluster, 0).then_some(()));
    let account = load.finish();
    account.assert_promises();
    cluster.nodes[2].restart();
    cluster.assert_replicas_agree();
}

#[test]
fn nodes_are_restarted_one_after_the_other_and_nobody_notices() {
    let _alone = alone();
    let mut cluster = Cluster::with_peers(3, &[]);
    one_of_three(|| {
        let before = cluster.count(FIRED);
        let load = cluster.load(&["--tasks", "6000", "--spread", "20s", "--lead", "3s"]);
        cluster.wait_for_count(FIRED, before + 200);
        for node in 0..3 {
            let code = cluster.nodes[node].terminate();
            assert_eq!(code, Some(0), "node {} stops in order", node + 1);
            cluster.nodes[node].restart();
            eventually("it is ready again", || is_ready(&cluster, node).then_some(()));
        }
        let account = load.finish();
        account.assert_promises();
        account.assert_all_acknowledged();
        if account.latest() < ROLLED_LATEST { Ok(()) } else { Err(format!("{:?}", account.latest())) }
    });
    cluster.assert_replicas_agree();
}

/// Its replicas are made anew, under new ids, from snapshots, while the load goes on.
#[test]
fn a_node_that_lost_its_disk_is_replaced_by_one_with_a_new_number() {
    let _alone = alone();
    let etcd = Etcd::start();
    let flags = ["--node-grace", "2s"];
    let mut cluster = Cluster::with_etcd(3, &etcd.url(), &flags);
    cluster.ok(&["bench", "register", "--quiet", "--keep", "--tasks", "20000", "--batch", "100", "--payload", "500"]);
    let load = cluster.load(&["--tasks", "8000", "--spread", "20s", "--lead", "3s"]);
    cluster.wait_for_count(FIRED, 200);
    cluster.nodes[2].kill();
    cluster.nodes.remove(2);
    cluster.add(4, &etcd.url(), &flags);
    cluster.wait_until_whole(3);
    let account = load.finish();
    account.assert_promises();
    account.assert_all_acknowledged();
    cluster.assert_replicas_agree();
}

/// Away from a node and back at once, while another replica goes: the node must release its old replica before it can
/// hold the new one, and only those that are on their way out may know that it can.
#[test]
fn a_replica_moves_away_and_back() {
    let _alone = alone();
    let etcd = Etcd::start();
    let cluster = Cluster::with_etcd(4, &etcd.url(), &[]);
    cluster.wait_until_whole(3);
    let load = cluster.load(&["--tasks", "2000", "--spread", "10s", "--lead", "2s"]);
    let holders = || -> Vec<u64> {
        let shown = cluster.ok(&["cluster", "shards"]);
        let shard = shown.iter().find(|shard| shard["shard"] == 0).unwrap();
        shard["replicas"].as_array().unwrap().iter().map(|replica| replica["node_id"].as_u64().unwrap()).collect()
    };
    let begun = holders();
    let other = (1..=4).find(|node| !begun.contains(node)).unwrap();
    for (from, to) in [(begun[0], other), (begun[2], begun[0]), (other, begun[2])] {
        let (from_text, to_text) = (from.to_string(), to.to_string());
        let args = ["cluster", "move", "0", "--from", &from_text, "--to", &to_text];
        eventually("the replica moves", || match cluster.run(&args) {
            (0, ..) => Some(()),
            // The row was changed a moment ago.
            (_, _, said) if said.contains("CONFLICT") => None,
            // The cluster keeps its nodes evenly loaded, and may have moved it by itself.
            _ if holders().contains(&to) || !holders().contains(&from) => Some(()),
            other => panic!("exit code, objects and text of `boomtool cluster move`: {other:?}"),
        });
    }
    let account = load.finish();
    account.assert_promises();
    account.assert_all_acknowledged();
    let (code, _, said) = cluster.run(&["cluster", "move", "0", "--from", "9", "--to", "1"]);
    assert!(code == 1 && said.contains('9'), "a node that is not there cannot be moved from: exit code {code}, {said}");
    cluster.assert_replicas_agree();
}

/// Killed while it takes in snapshots, and once more: nothing of a snapshot counts before all of it is there.
#[test]
fn a_snapshot_that_is_cut_off_is_sent_again() {
    let _alone = alone();
    let etcd = Etcd::start();
    let mut cluster = Cluster::with_etcd(1, &etcd.url(), &["--bootstrap-expect", "1"]);
    // More entries than are kept for followers, and more bytes than a memtable holds: what is missing comes as a snapshot.
    let many = ["--tasks", "24000", "--payload", "4000", "--connections", "2", "--inflight", "4"];
    cluster.ok(&[&["bench", "register", "--quiet", "--keep"], &many[..]].concat());
    // First the one that receives, and then one that sends, to a third.
    for (receiver, victim) in [(1, 1), (2, 0)] {
        cluster.add(receiver + 1, &etcd.url(), &[]);
        let staging = cluster.nodes[usize::try_from(receiver).unwrap()].data_dir().join("staging");
        let arriving = || std::fs::read_dir(&staging).ok()?.next().map(|_| ());
        eventually_within(SNAPSHOT_WITHIN, "a snapshot is on its way", || arriving().ok_or("none"));
        cluster.nodes[victim].kill();
        cluster.nodes[victim].restart();
    }
    cluster.wait_until_whole(3);
    cluster.assert_replicas_agree();
    let ready = http_get(cluster.nodes[0].started.http, "/readyz");
    assert_eq!(ready.0, 200, "a node that has taken in its snapshots is ready: {}", ready.1);
}
