//! Real groups with one member each: one fsync for all, restart, purge, supervision.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use boomerang_testkit::seed;
use futures::future::join_all;
use openraft::rt::WatchReceiver as _;
use openraft::storage::RaftLogStorage;

use super::bench::{Bench, Ignore, append};
use super::crash::{Child, tell};
use super::world::{TERM, World};
use crate::inspect::{Digest, digest, dump};
use crate::raft::groups::{Group, GroupError, Groups, GroupsParts};
use crate::raft::types::{Command, Replies, log_id};
use crate::raft::{Begin, PeerNetwork};
use crate::shard::Batch;
use crate::store::Store;
use crate::store::keys::Key;
use crate::store::writer::{Writer, WriterThreads};
use crate::task::GroupId;

/// Of one replica: an own majority needs no timeout. Less than a lease, and seen once of several times: a disk may be busy, and
/// whoever waits for a lease waits each time.
const LEADS_WITHIN: Duration = Duration::from_millis(400);
const STARTS_MAX: usize = 8;
/// Nothing here takes this long, on any machine.
const NEVER: Duration = Duration::from_secs(30);

/// A node's groups, and what they stand on.
struct Node {
    groups: Groups,
    store: Store,
    writer: Writer,
    _thread: WriterThreads,
}

impl Node {
    async fn start(folder: &Path, shards: u16) -> Self {
        Self::try_start(folder, shards).await.expect("the groups start")
    }

    async fn try_start(folder: &Path, shards: u16) -> Result<Self, GroupError> {
        let store = Store::open(&folder.join("db")).unwrap();
        let (writer, thread) = Writer::start(store.clone());
        let parts = GroupsParts {
            cluster: "test".into(),
            node_id: 1,
            shards,
            store: store.clone(),
            writer: writer.clone(),
            staging: folder.join("staging"),
            network: PeerNetwork::alone("test", 1),
            observer: Arc::new(Ignore),
        };
        let groups = Groups::start(parts).await?;
        for id in (0..=shards).map(GroupId) {
            groups.host(id, Begin::Alone).await?;
        }
        Ok(Self { groups, store, writer, _thread: thread })
    }

    async fn stop(self) {
        self.groups.stop().await.unwrap();
    }

    fn digests(&self) -> Vec<Digest> {
        self.groups.all().iter().map(|group| digest(&self.store, group.id).unwrap()).collect()
    }

    fn dump(&self) -> String {
        let mut out = Vec::new();
        dump(&self.store, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }
}

/// The term it leads in, and has applied its first entry of.
async fn leads(group: &Group) -> u64 {
    let wait = group.raft.wait(Some(NEVER));
    let metrics = wait.metrics(
        |metrics| {
            let term = metrics.last_applied.map(|id| id.committed_leader_id().term);
            metrics.state.is_leader() && term == Some(metrics.current_term)
        },
        "leads",
    );
    let term = metrics.await.unwrap().current_term;
    assert_eq!(group.leads(Duration::from_millis(100)), Some(term));
    term
}

async fn propose(group: &Group, batch: Batch) -> Replies {
    let requests = batch.requests.len();
    let answer = group.raft.client_write(Command(batch.encode(256))).await.expect("the only member accepts");
    assert_eq!(answer.data.0.len(), requests, "one reply per request");
    answer.data
}

/// Proposes `count` batches to every group with tasks, to all groups at once.
async fn write(node: &Node, worlds: &mut BTreeMap<GroupId, World>, count: u64) {
    let writes = worlds.iter_mut().map(|(id, world)| {
        let group = node.groups.get(*id).unwrap();
        async move {
            for _ in 0..count {
                propose(&group, world.batch()).await;
            }
        }
    });
    join_all(writes).await;
}

fn worlds(seed: u64, shards: u16) -> BTreeMap<GroupId, World> {
    (1..=shards).map(|id| (GroupId(id), World::new(seed, GroupId(id)))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_fsync_serves_all_groups() {
    let seed = seed::one();
    let temp = tempfile::tempdir().unwrap();
    let node = Node::start(temp.path(), 16).await;
    let mut worlds = worlds(*seed, 16);
    join_all(node.groups.all().iter().map(leads)).await;
    let before = node.writer.counts();
    let since = Instant::now();
    write(&node, &mut worlds, 50).await;
    let (syncs, requests) = node.writer.counts();
    let (syncs, requests) = (syncs - before.0, requests - before.1);
    println!("16 groups, 800 proposals: {syncs} syncs for {requests} requests in {:?}", since.elapsed());
    assert!(requests >= 800, "every proposal is synced");
    assert!(syncs * 2 < requests, "{syncs} syncs for {requests} requests");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_lead_again_soon_after_a_restart_in_a_larger_term_with_the_same_state() {
    let seed = seed::one();
    let temp = tempfile::tempdir().unwrap();
    let mut worlds = worlds(*seed, 4);
    let mut before: Option<(Vec<u64>, Vec<Digest>)> = None;
    let mut quickest = NEVER;
    for round in 0..STARTS_MAX {
        if round >= 3 && quickest < LEADS_WITHIN {
            break;
        }
        let node = Node::start(temp.path(), 4).await;
        let since = Instant::now();
        let terms = join_all(node.groups.all().iter().map(leads)).await;
        let took = since.elapsed();
        println!("start {round}: all lead after {took:?}");
        if let Some((terms_before, digests)) = before {
            quickest = quickest.min(took);
            assert!(terms.iter().zip(&terms_before).all(|(now, before)| now > before), "{terms:?} {terms_before:?}");
            for (now, before) in node.digests().iter().zip(&digests) {
                assert_eq!((now.hash, now.rows), (before.hash, before.rows), "{}", node.dump());
                assert!(now.applied.unwrap().index > before.applied.unwrap().index, "an entry of the new term");
            }
        }
        write(&node, &mut worlds, 30).await;
        before = Some((terms, node.digests()));
        let text = node.dump();
        assert!(!text.contains(" ? ") && text.contains("g1 membership "), "{text}");
        node.stop().await;
    }
    assert!(quickest < LEADS_WITHIN, "all lead after {quickest:?}");
}

const KILLED_SHARDS: u16 = 4;

/// A child: tells what was acknowledged, until it is killed.
pub async fn serve_until_killed(folder: &Path, seed: u64) {
    let node = Node::start(folder, KILLED_SHARDS).await;
    for group in node.groups.all() {
        tell(&format!("term {} {}", group.id.0, leads(&group).await));
    }
    let flushing = node.store.clone();
    std::thread::spawn(move || {
        loop {
            flushing.flush_state(true).unwrap();
        }
    });
    tokio::spawn(node.groups.clone().look_after());
    let writers = worlds(seed, KILLED_SHARDS).into_iter().map(|(id, mut world)| {
        let group = node.groups.get(id).unwrap();
        tokio::spawn(async move {
            for count in 1u64.. {
                propose(&group, world.batch()).await;
                tell(&format!("acknowledged {} {count}", id.0));
            }
        })
    });
    join_all(writers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_kill_groups_lead_again_with_everything_that_was_acknowledged() {
    let seed = seed::one();
    let mut quickest = NEVER;
    for (round, enough) in [40, 400].into_iter().cycle().take(STARTS_MAX).enumerate() {
        if round >= 2 && quickest < LEADS_WITHIN {
            break;
        }
        let temp = tempfile::tempdir().unwrap();
        let mut child = Child::start("groups", temp.path(), *seed);
        let mut told: Vec<String> = std::iter::from_fn(|| child.next()).take(enough).collect();
        told.extend(child.kill());
        let promise = |what: &str, group: GroupId| -> u64 {
            let prefix = format!("{what} {} ", group.0);
            told.iter().filter_map(|line| line.strip_prefix(&prefix)?.parse().ok()).max().unwrap_or(0)
        };
        let node = Node::start(temp.path(), KILLED_SHARDS).await;
        let since = Instant::now();
        let terms = join_all(node.groups.all().iter().map(leads)).await;
        println!("killed after {enough}: all lead after {:?}", since.elapsed());
        quickest = quickest.min(since.elapsed());
        for (group, term) in node.groups.all().iter().zip(terms) {
            assert!(term > promise("term", group.id), "{} {term}", group.id);
            if group.id == GroupId::CLUSTER {
                continue;
            }
            // Everything acknowledged is there, and perhaps one more that nobody heard of.
            let acknowledged = promise("acknowledged", group.id);
            assert!(acknowledged > 0, "it was killed after it had begun");
            let found = digest(&node.store, group.id).unwrap();
            let mut world = World::new(*seed, group.id);
            (0..acknowledged).for_each(|_| drop(world.batch()));
            let mut fits = world.holds(&node.store);
            if !fits {
                world.batch();
                fits = world.holds(&node.store);
            }
            assert!(fits, "{} {found}: {acknowledged} acknowledged\n{}", group.id, node.dump());
        }
        node.stop().await;
    }
    assert!(quickest < LEADS_WITHIN, "all lead after {quickest:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_durable_leaves_the_log_and_nothing_else() {
    let seed = seed::one();
    const GROUP: GroupId = GroupId(1);
    let temp = tempfile::tempdir().unwrap();
    let node = Node::start(temp.path(), 1).await;
    let mut worlds = worlds(*seed, 1);
    let group = node.groups.get(GROUP).unwrap();
    leads(&group).await;
    tokio::spawn(node.groups.clone().look_after());
    let log_len =
        || node.store.scan_log(&Key::log_entry(GROUP, 0), &Key::log_end(GROUP), usize::MAX).unwrap().len() as u64;
    for round in 0..2 {
        write(&node, &mut worlds, 400).await;
        node.store.flush_state(true).unwrap();
        let durable = node.store.durable_applied(GROUP).unwrap().unwrap().index;
        write(&node, &mut worlds, 50).await;
        let purged = |min: u64| {
            let wait = group.raft.wait(Some(NEVER));
            async move {
                let enough = |purged: Option<u64>| purged >= Some(min);
                let metrics = wait.metrics(|metrics| enough(metrics.purged.map(|id| id.index)), "purges");
                metrics.await.unwrap().purged.unwrap().index
            }
        };
        // All but what stays for followers that are a little behind.
        let purged = purged(durable - 128).await;
        let last = group.raft.metrics().borrow_watched().last_log_index.unwrap();
        println!("round {round}: durable {durable}, purged {purged}, last {last}, {} left", log_len());
        assert!(purged <= durable, "purged up to {purged}, durable up to {durable}");
        assert_eq!(log_len(), last - purged, "what is purged is gone, and only that");
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_panics_is_built_again_while_the_others_go_on() {
    let temp = tempfile::tempdir().unwrap();
    let node = Node::start(temp.path(), 3).await;
    let seed = seed::one();
    let mut worlds = worlds(*seed, 3);
    let terms = join_all(node.groups.all().iter().map(leads)).await;
    write(&node, &mut worlds, 20).await;

    // The core of one and the state machine of another: each panics in a way of its own.
    let [core, machine, well] = [1, 2, 3].map(|id| node.groups.get(GroupId(id)).unwrap());
    core.raft.external_request(|_| panic!("on purpose, in the core")).await.unwrap();
    machine.raft.with_state_machine::<_, ()>(|_| panic!("on purpose, in the state machine")).await.unwrap_err();

    let mut metrics = core.raft.metrics();
    while metrics.changed().await.is_ok() {}
    assert_eq!(core.leads(Duration::ZERO), None, "what is dead leads nobody, whatever it said last");
    assert_eq!(well.leads(Duration::ZERO), Some(terms[3]));

    let mut changes = node.groups.changes();
    let looking = tokio::spawn(node.groups.clone().look_after());
    let world = worlds.get_mut(&well.id).unwrap();
    propose(&well, world.batch()).await;
    assert_eq!(leads(&well).await, terms[3], "it was not disturbed");
    for (broken, term) in [(core, terms[1]), (machine, terms[2])] {
        let is_another = |_: &u64| node.groups.get(broken.id).is_some_and(|group| group.life != broken.life);
        let built_again = tokio::time::timeout(NEVER, changes.wait_for(is_another)).await;
        built_again.unwrap_or_else(|_| panic!("{} is not built again", broken.id)).unwrap();
        let rebuilt = node.groups.get(broken.id).unwrap();
        assert!(leads(&rebuilt).await > term);
        let world = worlds.get_mut(&broken.id).unwrap();
        assert!(world.holds(&node.store), "{}", node.dump());
        propose(&rebuilt, world.batch()).await;
        assert!(world.holds(&node.store), "{}", node.dump());
    }
    looking.abort();
    node.stop().await;
}

/// What openraft would take for a new group: an empty state over a log that was purged.
#[tokio::test]
async fn a_group_whose_state_was_lost_does_not_start() {
    let seed = seed::one();
    const GROUP: GroupId = GroupId(1);
    let temp = tempfile::tempdir().unwrap();
    let bench = Bench::open(temp.path());
    let mut log = bench.log(GROUP);
    append(&mut log, &World::new(*seed, GROUP).take(10)).await;
    log.purge(log_id(TERM, 5)).await.unwrap();
    drop((log, bench));
    let error = Node::try_start(temp.path(), 1).await.err().expect("it does not start").to_string();
    assert!(error.contains("the state is damaged: it holds nothing and the log begins after"), "{error}");
}
