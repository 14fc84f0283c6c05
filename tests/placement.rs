//! Clusters of real processes, with a real etcd or with a fixed list of peers: they begin, grow, shrink, lose nodes and
//! lose etcd, and under all of it nothing that was acknowledged is lost, and nothing comes early.

mod common;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use boomerang_client::{
    Client, ClusterGroups, ClusterNodes, Credentials, Due, Options, OwnSettings, Registered, Registration,
};
use boomerang_task::locks::Mutex;
use boomerang_task::{Callback, Protocol};
use boomerang_wire::proto::cluster_group::State;
use common::etcd::Etcd;
use common::eventually_within;
use common::node::{ADMIN_PASSWORD, Ended, NodeProcess, TOOL_ENDS_WITHIN, free_address, serve_to_its_end, to_its_end};
use common::receiver::Receiver;
use tokio::time::MissedTickBehavior;

const SHARDS: &str = "4";
/// A cluster of processes on a machine with other work takes its time.
const WITHIN: Duration = Duration::from_secs(60);
/// A load, not a measurement.
const REGISTERED_EVERY: Duration = Duration::from_millis(5);
/// Registered tasks are due after this.
const DELAY_MS: u64 = 1_500;

/// Nodes of one cluster.
struct World {
    nodes: BTreeMap<u64, NodeProcess>,
    runtime: tokio::runtime::Runtime,
}

impl World {
    /// All at once: they wait for each other.
    fn start(flags: &[Vec<String>]) -> Self {
        let nodes = NodeProcess::start_all(flags);
        let nodes = nodes.into_iter().map(|node| (node.started.node_id, node)).collect();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        Self { nodes, runtime }
    }

    fn add(&mut self, flags: Vec<String>) {
        let nodes = NodeProcess::start_all(&[flags]);
        self.nodes.extend(nodes.into_iter().map(|node| (node.started.node_id, node)));
    }

    fn node(&mut self, id: u64) -> &mut NodeProcess {
        self.nodes.get_mut(&id).unwrap()
    }

    fn addresses(&self) -> Vec<SocketAddr> {
        self.nodes.values().map(|node| node.started.tcp).collect()
    }

    /// As the node `at` sees them.
    fn groups(&self, at: u64) -> Option<ClusterGroups> {
        let address = self.nodes[&at].started.tcp;
        self.runtime.block_on(async { connect(address).await?.cluster_groups().await.ok() })
    }

    fn cluster(&self, at: u64) -> Option<ClusterNodes> {
        let address = self.nodes[&at].started.tcp;
        self.runtime.block_on(async { connect(address).await?.cluster_nodes().await.ok() })
    }

    /// Until every group has its voters on exactly these nodes, one of them leads, and all is well.
    fn wait_until_on(&self, at: u64, nodes: &[u64], voters: usize) -> ClusterGroups {
        let settled = |groups: &ClusterGroups| {
            groups.groups.iter().all(|group| {
                let on = || group.replicas.iter().filter(|replica| replica.voter).map(|replica| replica.node_id);
                group.state() == State::Ok && on().count() == voters && on().all(|node| nodes.contains(&node))
            })
        };
        wait_for(&format!("groups on {nodes:?}, {voters} voters each"), || {
            let groups = self.groups(at).ok_or("no answer")?;
            if settled(&groups) { Ok(groups) } else { Err(format!("{:?}", shown(&groups))) }
        })
    }
}

fn shown(groups: &ClusterGroups) -> Vec<String> {
    let replicas = |group: &boomerang_client::ClusterGroup| -> Vec<String> {
        group
            .replicas
            .iter()
            .map(|at| format!("{}@{}{}", at.replica, at.node_id, if at.voter { "" } else { "?" }))
            .collect()
    };
    let line = |group| -> String {
        let group: &boomerang_client::ClusterGroup = group;
        format!("g{} {:?} leader {} {:?}", group.group, group.state(), group.leader_node, replicas(group))
    };
    groups.groups.iter().map(line).collect()
}

fn wait_for<T, W: Display>(what: &str, look: impl FnMut() -> Result<T, W>) -> T {
    eventually_within(WITHIN, what, look)
}

fn with(flags: &[&str]) -> Vec<String> {
    flags.iter().map(|flag| (*flag).to_owned()).collect()
}

fn in_etcd(etcd: &Etcd, node_id: u64, more: &[&str]) -> Vec<String> {
    let (id, url) = (node_id.to_string(), etcd.url());
    let flags = ["--node-id", &id, "--etcd", &url, "--shards", SHARDS];
    let log = ["--log", "info,openraft=error,boomerang::placement=debug"];
    with(&[&flags[..], &log, more].concat())
}

async fn connect(address: SocketAddr) -> Option<Client> {
    let credentials =
        Credentials::Password { client_id: "admin".parse().unwrap(), password: ADMIN_PASSWORD.to_owned() };
    let mut options = Options::new(vec![address.to_string()], credentials);
    options.connect_timeout = Duration::from_secs(2);
    options.request_timeout = Duration::from_secs(2);
    Client::connect(options).await.ok()
}

/// `boomtool`, at the node with this address.
fn boomtool(address: SocketAddr, args: &[&str]) -> Ended {
    let mut command = common::node::boomtool();
    command.args(args).args(["--addr", &address.to_string(), "--password", ADMIN_PASSWORD]);
    to_its_end(&mut command, TOOL_ENDS_WITHIN)
}

/// Registers tasks, one after the other, wherever it is let, until it is stopped.
struct Load {
    nodes: Arc<Mutex<Vec<SocketAddr>>>,
    stop: Arc<AtomicBool>,
    /// What was acknowledged: payload and due instant.
    acknowledged: Arc<Mutex<BTreeMap<Vec<u8>, u64>>>,
    thread: Option<JoinHandle<()>>,
    receiver: Receiver,
}

impl Load {
    fn start(nodes: Vec<SocketAddr>) -> Self {
        let receiver = Receiver::that_accepts();
        let endpoint = receiver.endpoint();
        let nodes = Arc::new(Mutex::new(nodes));
        let (stop, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(BTreeMap::new())));
        let thread = {
            let (nodes, stop, acknowledged) = (nodes.clone(), stop.clone(), acknowledged.clone());
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(register_all(&nodes, &stop, &acknowledged, &endpoint));
            })
        };
        Self { nodes, stop, acknowledged, thread: Some(thread), receiver }
    }

    fn count(&self) -> usize {
        self.acknowledged.lock().len()
    }

    /// So many more have been acknowledged from now on.
    fn goes_on(&self, more: usize) {
        let from = self.count();
        wait_for(&format!("{more} more tasks"), || {
            let now = self.count();
            if now >= from + more { Ok(()) } else { Err(format!("{} of them", now - from)) }
        });
    }

    fn set_nodes(&self, nodes: Vec<SocketAddr>) {
        *self.nodes.lock() = nodes;
    }

    /// Everything that was acknowledged comes, and nothing before it is due.
    fn judge(mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().expect("the load does not panic");
        let acknowledged = self.acknowledged.lock().clone();
        let mut missing = acknowledged.clone();
        let (mut early, mut late_ms, mut came) = (0, 0, 0);
        while let Some(arrived) =
            self.receiver.next_within(Duration::from_secs(if missing.is_empty() { 0 } else { 15 }))
        {
            came += 1;
            // What was not acknowledged may come as well.
            let Some(due_ms) = acknowledged.get(&arrived.payload) else { continue };
            missing.remove(&arrived.payload);
            early += usize::from(arrived.at_ms < *due_ms);
            late_ms = late_ms.max(arrived.at_ms.saturating_sub(*due_ms));
        }
        let lost = missing.len();
        eprintln!(
            "{} acknowledged, {came} came, lost {lost}, early {early}, at most {late_ms} ms late",
            acknowledged.len()
        );
        assert!(acknowledged.len() > 20, "{} tasks were accepted, which is no load", acknowledged.len());
        assert_eq!(
            (lost, early),
            (0, 0),
            "{:?}",
            missing.keys().take(5).map(|key| String::from_utf8_lossy(key)).collect::<Vec<_>>()
        );
    }
}

async fn register_all(
    nodes: &Mutex<Vec<SocketAddr>>,
    stop: &AtomicBool,
    acknowledged: &Mutex<BTreeMap<Vec<u8>, u64>>,
    endpoint: &str,
) {
    let mut clients: BTreeMap<SocketAddr, Client> = BTreeMap::new();
    let callback = Callback::new(Protocol::Tcp, endpoint).unwrap();
    let mut pace = tokio::time::interval(REGISTERED_EVERY);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for number in 0_usize.. {
        pace.tick().await;
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let now = nodes.lock().clone();
        let node = now[number % now.len()];
        if let Entry::Vacant(place) = clients.entry(node) {
            let Some(client) = connect(node).await else { continue };
            place.insert(client);
        }
        let payload = format!("task {number}").into_bytes();
        let registration = Registration {
            payload: payload.clone().into(),
            due: Due::In(DELAY_MS),
            settings: OwnSettings { callback: Some(callback.clone()), ..OwnSettings::default() },
            ..Registration::default()
        };
        match clients[&node].register(registration).await {
            Ok(Registered { due_ms, .. }) => {
                acknowledged.lock().insert(payload, due_ms);
            }
            // Refused, or nobody knows: the number is not used again.
            Err(error) if error.status().is_none() => drop(clients.remove(&node)),
            Err(_) => {}
        }
    }
}

/// How often each node leads.
fn leads(groups: &ClusterGroups) -> BTreeMap<u64, usize> {
    let mut leads = BTreeMap::new();
    for group in &groups.groups {
        *leads.entry(group.leader_node).or_default() += 1;
    }
    leads
}

#[test]
fn three_nodes_begin_and_one_that_is_lost_is_replaced() {
    let etcd = Etcd::start();
    let flags = |id| in_etcd(&etcd, id, &["--node-grace", "3s"]);
    let mut world = World::start(&[flags(1), flags(2), flags(3)]);
    world.wait_until_on(1, &[1, 2, 3], 3);
    wait_for("leaders are spread", || {
        let leads = leads(&world.groups(2).ok_or("no answer")?);
        if leads.values().all(|count| (1..=2).contains(count)) && leads.len() == 3 {
            Ok(())
        } else {
            Err(format!("{leads:?}"))
        }
    });

    // A number belongs to a folder, and the number of shards to the cluster.
    let empty = tempfile::tempdir().unwrap();
    let wiped = flags(2);
    let wiped: Vec<&str> = wiped.iter().map(String::as_str).collect();
    let refused = serve_to_its_end(&empty.path().join("a"), &wiped);
    assert_eq!(refused.code, Some(1), "{}", refused.stderr);
    let text = "node id 2 belongs to another data folder: a wiped node needs a new --node-id";
    assert!(refused.stderr.contains(text), "{}", refused.stderr);
    let refused =
        serve_to_its_end(&empty.path().join("b"), &["--node-id", "9", "--etcd", &etcd.url(), "--shards", "8"]);
    assert_eq!(refused.code, Some(1), "{}", refused.stderr);
    assert!(refused.stderr.contains("the cluster has 4 shards"), "{}", refused.stderr);

    let load = Load::start(vec![world.nodes[&1].started.tcp, world.nodes[&2].started.tcp]);
    load.goes_on(30);
    world.add(flags(4));
    world.node(3).kill();
    world.wait_until_on(1, &[1, 2, 4], 3);
    load.goes_on(30);
    let away = world.cluster(1).unwrap().nodes.into_iter().find(|node| node.node_id == 3).unwrap();
    assert!(!away.answers && away.away_since_ms > 0 && away.replicas == 0, "a node that is away is replaced: {away:?}");

    // It comes back as it was, releases what it has, and gets what is its own now.
    world.node(3).restart();
    world.wait_until_on(1, &[1, 2, 3, 4], 3);
    wait_for("node 3 holds a replica of the cluster's own group", || {
        let groups = world.groups(1).ok_or("no answer")?;
        let own = groups.groups[0].replicas.iter().find(|at| at.node_id == 3 && !at.coming).copied();
        match own {
            Some(at) if at.replica > 3 => Ok(()),
            found => Err(format!("{found:?}")),
        }
    });
    load.judge();
}

#[test]
fn a_cluster_grows_from_one_to_three_to_five_and_shrinks_to_one() {
    let etcd = Etcd::start();
    let flags = |id| in_etcd(&etcd, id, &["--bootstrap-expect", "1"]);
    let mut world = World::start(&[flags(1)]);
    world.wait_until_on(1, &[1], 1);
    let load = Load::start(world.addresses());
    load.goes_on(30);
    for (new, all) in [([2, 3], &[1, 2, 3][..]), ([4, 5], &[1, 2, 3, 4, 5])] {
        for id in new {
            world.add(flags(id));
        }
        load.set_nodes(world.addresses());
        world.wait_until_on(1, all, 3);
        load.goes_on(30);
    }

    // First the one that everything began on.
    let at = |world: &World, id: u64| world.nodes[&id].started.tcp;
    let drained = boomtool(at(&world, 2), &["cluster", "drain", "1"]);
    assert_eq!((drained.code, drained.stdout.as_str()), (Some(0), "node 1  drained\n"), "{}", drained.stderr);
    world.wait_until_on(2, &[2, 3, 4, 5], 3);
    load.set_nodes([2, 3, 4, 5].map(|id| at(&world, id)).to_vec());
    load.goes_on(30);
    assert_eq!(world.node(1).terminate(), Some(0), "exit code of a drained node after SIGTERM");
    let away = world.cluster(2).unwrap().nodes.into_iter().find(|node| node.node_id == 1).unwrap();
    assert!(away.draining && away.replicas == 0, "a node that is drained and gone holds nothing: {away:?}");

    // Two at a time, until there are fewer nodes than copies are wanted.
    for id in ["2", "4"] {
        let drained = boomtool(at(&world, 3), &["cluster", "drain", id, "--no-wait"]);
        assert_eq!(drained.code, Some(0), "{}", drained.stderr);
    }
    world.wait_until_on(3, &[3, 5], 2);
    load.set_nodes([3, 5].map(|id| at(&world, id)).to_vec());
    load.goes_on(30);
    let codes = [2, 4].map(|id| world.node(id).terminate());
    assert_eq!(codes, [Some(0); 2], "exit codes of drained nodes after SIGTERM");

    let text = |world: &World, args: &[&str]| {
        let ended = boomtool(at(world, 3), args);
        (ended.code, ended.stdout + &ended.stderr)
    };
    let (code, said) = text(&world, &["cluster", "drain", "7"]);
    assert!(code == Some(1) && said.contains("node 7 is not known"), "exit code {code:?}: {said}");
    let (code, said) = text(&world, &["cluster", "shards"]);
    assert!(code == Some(0) && said.contains("SHARD") && said.lines().count() == 6, "exit code {code:?}: {said}");
    let (code, said) = text(&world, &["cluster", "status", "--json"]);
    assert!(code == Some(0) && said.lines().count() == 5, "exit code {code:?}: {said}");
    let (code, said) = text(&world, &["cluster", "drain", "5"]);
    assert_eq!(code, Some(0), "{said}");
    world.wait_until_on(3, &[3], 1);
    let (code, said) = text(&world, &["cluster", "drain", "3"]);
    assert!(code == Some(1) && said.contains("the last one"), "exit code {code:?}: {said}");
    load.set_nodes(vec![at(&world, 3)]);
    load.goes_on(30);
    let (code, said) = text(&world, &["cluster", "undrain", "5"]);
    assert_eq!(code, Some(0), "{said}");
    world.wait_until_on(3, &[3, 5], 2);
    load.judge();
}

#[test]
fn without_etcd_everything_goes_on_but_placement() {
    let mut etcd = Etcd::start();
    // Where a node is, the others learn from etcd: it must come back where it was.
    let flags =
        |id| in_etcd(&etcd, id, &["--replicas", "2", "--bootstrap-expect", "3", "--peer-addr", &free_address()]);
    let mut world = World::start(&[1, 2, 3].map(flags));
    world.wait_until_on(1, &[1, 2, 3], 2);
    let load = Load::start(world.addresses());
    load.goes_on(30);
    etcd.kill();
    load.goes_on(100);
    let refused = boomtool(world.nodes[&1].started.tcp, &["cluster", "drain", "3"]);
    assert!(
        refused.code == Some(1) && refused.stderr.contains("placement cannot be changed now"),
        "{}",
        refused.stderr
    );
    // A node that was here before finds its way without etcd.
    world.node(2).kill();
    world.node(2).restart();
    load.set_nodes(world.addresses());
    load.goes_on(50);
    etcd.restart();
    wait_for("node 3 is drained", || {
        let drained = boomtool(world.nodes[&1].started.tcp, &["cluster", "drain", "3"]);
        if drained.code == Some(0) { Ok(()) } else { Err(drained.stderr) }
    });
    world.wait_until_on(1, &[1, 2], 2);
    let rest: Vec<SocketAddr> = [1, 2].map(|id| world.nodes[&id].started.tcp).to_vec();
    load.set_nodes(rest);
    load.goes_on(30);
    load.judge();
}

#[test]
fn a_fixed_list_of_peers_needs_no_etcd() {
    let peers = [1, 2, 3].map(|_| free_address());
    let list = format!("1={},2={},3={}", peers[0], peers[1], peers[2]);
    let flags = |id: usize| {
        with(&["--node-id", &id.to_string(), "--peer-addr", &peers[id - 1], "--peers", &list, "--shards", SHARDS])
    };
    let mut world = World::start(&[flags(1), flags(2), flags(3)]);
    world.wait_until_on(1, &[1, 2, 3], 3);
    let load = Load::start([1, 2].map(|id| world.nodes[&id].started.tcp).to_vec());
    load.goes_on(30);
    world.node(3).kill();
    load.goes_on(30);
    let empty = tempfile::tempdir().unwrap();
    let wiped = ["--node-id", "3", "--peers", &list, "--shards", SHARDS];
    let refused = serve_to_its_end(&empty.path().join("a"), &wiped);
    assert_eq!(refused.code, Some(1), "{}", refused.stderr);
    assert!(refused.stderr.contains("the cluster has begun already"), "{}", refused.stderr);
    world.node(3).restart();
    world.wait_until_on(2, &[1, 2, 3], 3);
    let refused = boomtool(world.nodes[&1].started.tcp, &["cluster", "move", "0", "--from", "1", "--to", "2"]);
    let text = "the placement is static: replicas do not move";
    assert!(refused.code == Some(1) && refused.stderr.contains(text), "{}", refused.stderr);
    load.judge();
}

#[test]
fn a_node_alone_becomes_a_cluster_and_a_cluster_survives_the_loss_of_etcd() {
    let mut etcd = Etcd::start();
    let mut world = World::start(&[with(&["--node-id", "1", "--shards", SHARDS])]);
    let load = Load::start(world.addresses());
    load.goes_on(30);
    assert_eq!(world.node(1).terminate(), Some(0), "exit code after SIGTERM");
    let flags = in_etcd(&etcd, 1, &["--bootstrap-expect", "1", "--admin-password", ADMIN_PASSWORD]);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    world.node(1).restart_with(&flags);
    load.set_nodes(world.addresses());
    world.wait_until_on(1, &[1], 1);
    world.add(in_etcd(&etcd, 2, &["--bootstrap-expect", "1"]));
    world.wait_until_on(2, &[1, 2], 2);
    load.set_nodes(world.addresses());
    load.goes_on(30);

    let epochs = |world: &World| world.groups(1).map(|groups| groups.groups.iter().map(|group| group.epoch).max());
    let before = epochs(&world).unwrap().unwrap();
    etcd.lose_everything();
    wait_for("new rows", || match epochs(&world) {
        Some(Some(epoch)) if epoch > before => Ok(()),
        found => Err(format!("{found:?} after {before}")),
    });
    load.goes_on(30);
    world.add(in_etcd(&etcd, 3, &["--bootstrap-expect", "1"]));
    world.wait_until_on(1, &[1, 2, 3], 3);
    load.judge();
}
