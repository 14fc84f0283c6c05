//! Replicas on several nodes of one process, over real connections.
//!
//! Each node has its own folder, store, groups and port; a replica's id is its node's. Nothing here sleeps to let
//! something happen: what can be awaited is, and what must not happen is awaited until the wait gives up.

mod common;

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::{Duration, Instant};

use boomerang::raft::dial::{Dial, Wire};
use boomerang::raft::groups::GroupsParts;
use boomerang::raft::network::ReplicaClient;
use boomerang::raft::peer_credentials::{PeerCredentials, incoming};
use boomerang::raft::peer_secret::ClusterSecret;
use boomerang::raft::types::{Command, LogId, Membership, MembershipRow, TypeConfig, Vote, log_id, term_of, vote};
use boomerang::raft::{
    Begin, Groups, LEASE, Member, Observer, PeerNetwork, PeerService, Raft, ReplicaId, peer_service,
};
use boomerang::sabotage;
use boomerang::shard::{Batch, Effect, Register, Request};
use boomerang::store::keys::Key;
use boomerang::store::rows::ShardMetaRow;
use boomerang::store::writer::{Writer, WriterThreads};
use boomerang::store::{Row, Store, codec};
use boomerang_task::{Callback, ClientId, GroupId, Policy, Protocol, Retry, ShardId, TaskId};
use boomerang_testkit::OwnAddress;
use boomerang_wire::peer;
use boomerang_wire::peer::peer_client::PeerClient;
use boomerang_wire::peer::peer_server::{Peer, PeerServer};
use boomerang_wire::peer::snapshot_request::Part;
use bytes::Bytes;
use futures::future::{BoxFuture, join_all};
use futures::{FutureExt, Stream, StreamExt};
use openraft::RaftMetrics;
use openraft::network::{NetStreamAppend, NetVote, RPCOption, RaftNetworkFactory};
use openraft::raft::{AppendEntriesRequest, VoteRequest};
use openraft::rt::WatchReceiver as _;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Channel;
use tonic::{Code, Response, Status, Streaming};

const CLUSTER: &str = "test";
const GROUP: GroupId = GroupId(1);
/// No single step takes this long unless something is broken.
const WITHIN: Duration = Duration::from_secs(15);
/// Longer than any election timeout.
const SURELY_ELECTED: Duration = Duration::from_millis(3_500);

fn credentials(node_id: u64) -> PeerCredentials {
    PeerCredentials::secret(CLUSTER, node_id, ClusterSecret::new("all nodes of these tests know it").unwrap())
}

struct Deaf;

impl Observer for Deaf {
    fn applied(&self, _: GroupId, _: &ShardMetaRow, _: &[Effect]) {}
}

struct Node {
    id: u64,
    groups: Groups,
    network: PeerNetwork,
    store: Store,
    _writer: WriterThreads,
    folder: Arc<TempDir>,
    server: Option<Server>,
}

struct Server {
    address: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Node {
    async fn start(id: u64, shards: u16, begin: Begin) -> Self {
        Self::start_in(Arc::new(tempfile::tempdir().unwrap()), id, shards, begin).await
    }

    async fn start_in(folder: Arc<TempDir>, id: u64, shards: u16, begin: Begin) -> Self {
        let store = Store::open(&folder.path().join("db")).unwrap();
        let (writer, writer_threads) = Writer::start(store.clone());
        let network = PeerNetwork::new(CLUSTER, id, Arc::new(credentials(id)));
        let parts = GroupsParts {
            cluster: CLUSTER.to_owned(),
            node_id: id,
            shards,
            store: store.clone(),
            writer,
            staging: folder.path().join("staging"),
            network: network.clone(),
            observer: Arc::new(Deaf),
        };
        let groups = Groups::start(parts).await.unwrap();
        for group in (0..=shards).map(GroupId) {
            // What it holds from an earlier life stays what it was.
            if groups.get(group).is_none() {
                groups.host(group, begin.clone()).await.unwrap();
            }
        }
        let mut node = Self { id, groups, network, store, _writer: writer_threads, folder, server: None };
        node.serve().await;
        node
    }

    async fn serve(&mut self) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let service = PeerService::new(self.groups.clone());
        let (credentials, stopped) = (credentials(self.id), stop.clone().cancelled_owned());
        let task = tokio::spawn(async {
            peer_service::serve(listener, service, Routes::default(), credentials, stopped).await.unwrap()
        });
        self.server = Some(Server { address, stop, task });
    }

    /// Nobody is heard any more.
    async fn stop_serving(&mut self) {
        let server = self.server.take().unwrap();
        server.stop.cancel();
        server.task.await.unwrap();
    }

    fn raft(&self, group: GroupId) -> Raft {
        self.groups.get(group).unwrap().raft
    }

    fn address(&self) -> String {
        self.server.as_ref().unwrap().address.to_string()
    }

    /// As a node that is none of the others.
    async fn client(&self) -> PeerClient<Channel> {
        let network = PeerNetwork::new(CLUSTER, 99, Arc::new(credentials(99)));
        network.set(self.id, &self.address());
        PeerClient::new(network.requests_to(self.id).unwrap())
    }

    fn rows(&self, group: GroupId) -> Vec<Row> {
        let (from, until) = Key::group_range(group);
        self.store.scan_state(&from, &until, usize::MAX).unwrap()
    }

    fn staging(&self) -> Vec<PathBuf> {
        let Ok(found) = std::fs::read_dir(self.folder.path().join("staging")) else { return Vec::new() };
        found.map(|entry| entry.unwrap().path()).collect()
    }

    fn vote(&self, group: GroupId) -> Vote {
        self.raft(group).metrics().borrow_watched().vote
    }

    fn applied(&self, group: GroupId) -> Option<LogId> {
        self.raft(group).metrics().borrow_watched().last_applied
    }
}

fn connect(nodes: &[Node]) {
    for from in nodes {
        for to in nodes {
            // A node is told its own address too, as the placement does; it must not use it.
            from.network.set(to.id, &to.address());
        }
    }
}

/// Nodes 1 to `count`, all voters of every group; node 1 leads.
async fn cluster(count: u64, shards: u16) -> Vec<Node> {
    let starts = (1..=count).map(|id| {
        let begin = if id == 1 { Begin::Alone } else { Begin::Wait { replica: id } };
        Node::start(id, shards, begin)
    });
    let nodes = join_all(starts).await;
    connect(&nodes);
    let voters: BTreeSet<ReplicaId> = (1..=count).collect();
    let joins = (0..=shards).map(|group| {
        let raft = nodes[0].raft(GroupId(group));
        let voters = voters.clone();
        async move {
            // The first entry of its term; before it, no membership can be changed.
            raft.wait(Some(WITHIN)).applied_index_at_least(Some(1), "leads alone").await.unwrap();
            for id in 2..=count {
                raft.add_learner(id, Member { node_id: id }, true).await.unwrap();
            }
            raft.change_membership(voters, false).await.unwrap();
        }
    });
    join_all(joins).await;
    nodes
}

/// A task that no other call has made, with bytes that do not become fewer by compression.
fn register(number: u64, payload_bytes: usize) -> Command {
    static MADE: AtomicU64 = AtomicU64::new(0);
    let made = MADE.fetch_add(1, Relaxed);
    let callback = Callback::new(Protocol::Tcp, "127.0.0.1:1").unwrap();
    let policy = Policy { callback, retry: Retry::default(), dead_letter: None };
    let register = Register {
        id: TaskId::new(1_700_000_000_000 + number, ShardId(0), made),
        client: "test".parse::<ClientId>().unwrap(),
        policy: 0,
        due_ms: 1_800_000_000_000 + number,
        recurrence: None,
        tags: None,
        dedup: None,
        numbered: None,
        payload: StdRng::seed_from_u64(made).random_iter().take(payload_bytes).collect(),
    };
    let requests = vec![Request::Register(register)];
    Command(Batch { now_ms: number, policies: vec![policy], requests, ..Batch::default() }.encode(payload_bytes + 256))
}

async fn write_many(raft: &Raft, count: u64, payload_bytes: usize) {
    let writes = (0..count).map(|number| raft.client_write(register(number, payload_bytes)));
    for written in join_all(writes).await {
        written.unwrap();
    }
}

/// Waits until all `nodes` have applied the same, and returns how many rows they agree on.
async fn agree(nodes: &[&Node], group: GroupId) -> usize {
    let last = nodes.iter().filter_map(|node| node.raft(group).metrics().borrow_watched().last_log_index).max();
    for node in nodes {
        node.raft(group).wait(Some(WITHIN)).applied_index(last, "agree").await.unwrap();
    }
    let first = nodes[0].rows(group);
    for node in &nodes[1..] {
        assert_eq!(node.applied(group), nodes[0].applied(group), "what node {} has applied of {group}", node.id);
        assert!(node.rows(group) == first, "node {} differs in {group}", node.id);
    }
    first.len()
}

/// Makes the log of the leader on `node` begin after what is applied now.
async fn purge(node: &Node, group: GroupId) -> LogId {
    let raft = node.raft(group);
    let applied = node.applied(group).unwrap();
    node.store.flush_state(true).unwrap();
    raft.trigger().snapshot().await.unwrap();
    let wait = || raft.wait(Some(WITHIN));
    wait().metrics(|metrics| metrics.snapshot >= Some(applied), "marked").await.unwrap();
    raft.trigger().purge_log(applied.index).await.unwrap();
    wait().metrics(|metrics| metrics.purged >= Some(applied), "purged").await.unwrap();
    applied
}

/// A test that hangs has failed.
async fn bounded(test: impl Future<Output = ()>) {
    tokio::time::timeout(Duration::from_secs(45), test).await.expect("the test is done in time");
}

/// For what nobody tells about: files that come and go.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    tokio::task::block_in_place(|| common::eventually_within(WITHIN, what, || holds().then_some(()).ok_or("not yet")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_written_reaches_every_replica() {
    bounded(async {
        let nodes = cluster(3, 2).await;
        let all: Vec<&Node> = nodes.iter().collect();
        join_all((0..=2).map(|group| {
            let raft = nodes[0].raft(GroupId(group));
            async move { write_many(&raft, 200, 100).await }
        }))
        .await;
        for group in 0..=2 {
            let rows = agree(&all, GroupId(group)).await;
            assert!(rows > 400, "{rows} rows in group {group}, of more than 400 that were written");
        }
        // One entry larger than all that is replicated in one go.
        write_many(&nodes[0].raft(GROUP), 1, 6 * 1024 * 1024).await;
        agree(&all, GROUP).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_node_leads_when_the_leader_stops() {
    bounded(async {
        let mut nodes = cluster(3, 1).await;
        write_many(&nodes[0].raft(GROUP), 20, 100).await;
        let mut old = nodes.remove(0);
        let term = old.vote(GROUP).leader_id.term;
        old.stop_serving().await;
        old.groups.stop().await.unwrap();
        let folder = old.folder.clone();
        let database = folder.path().join("db");
        drop(old);

        let raft = nodes[0].raft(GROUP);
        let later = |metrics: &RaftMetrics<TypeConfig>| {
            metrics.current_term > term && metrics.current_leader.is_some_and(|leader| leader != 1)
        };
        let metrics = raft.wait(Some(WITHIN)).metrics(later, "a new leader").await.unwrap();
        let leader = nodes.iter().find(|node| Some(node.id) == metrics.current_leader).unwrap();
        let raft = leader.raft(GROUP);
        raft.wait(Some(WITHIN)).leader_with_quorum_acked(None, "with a majority").await.unwrap();
        write_many(&raft, 20, 100).await;
        let rows = agree(&nodes.iter().collect::<Vec<_>>(), GROUP).await;
        assert!(rows > 80, "{rows} rows, of more than 80 that were written");

        // It comes back as what it was, wherever it is now, and is told what it has missed. Its database is free once
        // the last task of its groups has ended.
        until("the database is closed", || Store::open(&database).is_ok());
        let leads = leader.vote(GROUP);
        nodes.push(Node::start_in(folder, 1, 1, Begin::Wait { replica: 99 }).await);
        connect(&nodes);
        assert_eq!(nodes[2].groups.get(GROUP).unwrap().replica, 1, "the replica's id on another node");
        let rows = agree(&nodes.iter().collect::<Vec<_>>(), GROUP).await;
        assert!(rows > 80, "{rows} rows, of more than 80 that were written");
        assert_eq!(nodes[2].vote(GROUP), leads, "its vote: who comes back starts no election");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_hears_nobody_disturbs_nobody() {
    bounded(async {
        let mut nodes = cluster(3, 1).await;
        write_many(&nodes[0].raft(GROUP), 5, 100).await;
        agree(&nodes.iter().collect::<Vec<_>>(), GROUP).await;
        let before = nodes[0].vote(GROUP);

        // Node 3 is heard, but hears nothing: it will want to lead, and ask.
        nodes[2].stop_serving().await;
        for other in &nodes[..2] {
            other.network.remove(3);
        }
        let raft = nodes[2].raft(GROUP);
        let campaigns = |metrics: &RaftMetrics<TypeConfig>| metrics.current_term > before.leader_id.term;
        let campaigned = raft.wait(Some(SURELY_ELECTED)).metrics(campaigns, "campaigns").await;
        assert!(campaigned.is_err(), "it went into a term of its own");
        write_many(&nodes[0].raft(GROUP), 5, 100).await;

        // What it has been told meanwhile, again, and in words.
        let last = nodes[0].applied(GROUP);
        let mut client = client(&nodes[2], 1).await;
        let request = VoteRequest::new(vote(before.leader_id.term + 1, 3, false), last);
        let answer = client.pre_vote(request, RPCOption::new(WITHIN)).await.unwrap();
        assert!(!answer.vote_granted, "a vote was promised though a leader lives: {answer:?}");
        assert_eq!(answer.vote, before, "asking for a vote before an election changes nothing");

        nodes[2].serve().await;
        connect(&nodes);
        agree(&nodes.iter().collect::<Vec<_>>(), GROUP).await;
        for node in &nodes {
            assert_eq!(node.vote(GROUP), before, "vote of node {}: nobody was elected meanwhile", node.id);
        }
    })
    .await;
}

/// Keeps the task of a group from doing anything until it is dropped.
struct Busy {
    _release: std::sync::mpsc::Sender<()>,
    over: JoinHandle<()>,
}

impl Busy {
    /// Returns when it has begun.
    async fn begin(raft: Raft) -> Self {
        let (release, gate) = std::sync::mpsc::channel();
        let (begun, begins) = tokio::sync::oneshot::channel();
        let over = tokio::spawn(async move {
            let wait = move |_: &openraft::RaftState<TypeConfig>| {
                let _ = begun.send(());
                let _ = gate.recv();
            };
            tokio::task::unconstrained(async { drop(raft.with_raft_state(wait).await) }).await;
        });
        begins.await.unwrap();
        Self { _release: release, over }
    }

    async fn end(self) {
        let Self { _release, over } = self;
        drop(_release);
        over.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 6)]
async fn a_group_that_is_busy_keeps_its_leader_until_it_hangs() {
    bounded(async {
        let nodes = cluster(3, 1).await;
        let leader = nodes[0].groups.get(GROUP).unwrap();
        let term = leader.leads(Duration::ZERO).expect("node 1 leads");
        let leads_for = async |span: Duration| {
            let until = Instant::now() + span;
            while Instant::now() < until {
                assert_eq!(leader.leads(Duration::ZERO), Some(term), "{:?} before the end", until - Instant::now());
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        // The followers are busy, and answer no beat by way of their groups.
        let busy = [Busy::begin(nodes[1].raft(GROUP)).await, Busy::begin(nodes[2].raft(GROUP)).await];
        leads_for(3 * LEASE).await;
        sabotage::on_this_thread(&[sabotage::Fault::BeatsBehindWork]);
        assert_eq!(leader.leads(Duration::ZERO), None, "beats that wait behind work prove nothing");
        sabotage::on_this_thread(&[]);
        join_all(busy.map(Busy::end)).await;
        // The leader is.
        let busy = Busy::begin(leader.raft.clone()).await;
        leads_for(3 * LEASE).await;
        assert!(nodes[1..].iter().all(|node| node.vote(GROUP).leader_id.term == term), "nobody was elected meanwhile");
        // It does not come back: then another one leads, whatever its node goes on to say.
        let leads_later = |node: &Node| {
            let leads = node.groups.get(GROUP).unwrap().leads(Duration::ZERO);
            leads.is_some_and(|new| new > term).then_some(())
        };
        common::until("another leads", async || nodes[1..].iter().find_map(leads_later)).await;
        assert_eq!(leader.leads(Duration::ZERO), None, "the term of a leader whom another one has followed");
        busy.end().await;
    })
    .await;
}

async fn client(from: &Node, to: u64) -> ReplicaClient {
    from.network.for_group(GROUP).new_client(to, &Member { node_id: to }).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_goes_where_it_is_sent() {
    bounded(async {
        let nodes = cluster(3, 1).await;
        write_many(&nodes[0].raft(GROUP), 5, 100).await;
        let all: Vec<&Node> = nodes.iter().collect();
        agree(&all, GROUP).await;
        let begun = Instant::now();
        nodes[0].raft(GROUP).trigger().transfer_leader(2).await.unwrap();
        let raft = nodes[1].raft(GROUP);
        raft.wait(Some(WITHIN)).leader_with_quorum_acked(None, "node 2 leads").await.unwrap();
        assert!(begun.elapsed() < Duration::from_millis(800), "that was an election timeout: {:?}", begun.elapsed());
        write_many(&raft, 5, 100).await;
        agree(&all, GROUP).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_far_behind_gets_a_snapshot_while_writes_go_on() {
    bounded(async {
        let mut nodes = cluster(2, 1).await;
        let raft = nodes[0].raft(GROUP);
        write_many(&raft, 600, 4_000).await;
        let purged = purge(&nodes[0], GROUP).await;

        let stop = CancellationToken::new();
        let writer = tokio::spawn({
            let (raft, stop) = (raft.clone(), stop.clone());
            async move {
                let mut written = 0;
                while !stop.is_cancelled() {
                    write_many(&raft, 8, 500).await;
                    written += 8;
                }
                written
            }
        });
        nodes.push(Node::start(3, 1, Begin::Wait { replica: 3 }).await);
        connect(&nodes);
        raft.add_learner(3, Member { node_id: 3 }, true).await.unwrap();
        raft.change_membership(BTreeSet::from([1, 2, 3]), false).await.unwrap();
        // Beyond the snapshot, so that the log has taken over from it.
        let reached = nodes[0].applied(GROUP).unwrap().index + 50;
        let new = nodes[2].raft(GROUP);
        let metrics = new.wait(Some(WITHIN)).applied_index_at_least(Some(reached), "catches up").await.unwrap();
        let snapshot = metrics.snapshot;
        assert!(
            snapshot >= Some(purged),
            "the log below {purged:?} is gone, so only a snapshot brings it: {snapshot:?}"
        );
        stop.cancel();
        assert!(writer.await.unwrap() > 0, "nothing was written meanwhile");
        let rows = agree(&nodes.iter().collect::<Vec<_>>(), GROUP).await;
        assert!(rows > 1_200, "{rows} rows, of more than 1,200 that were written");
        assert_eq!(nodes[2].staging(), Vec::<PathBuf>::new(), "parts of a snapshot that is taken in");
    })
    .await;
}

/// A snapshot of `from` as somebody might send it.
struct Forged {
    header: peer::SnapshotHeader,
    rows: Vec<Row>,
}

impl Forged {
    fn of(from: &Node, to: ReplicaId) -> Self {
        let metrics = from.raft(GROUP).metrics().borrow_watched().clone();
        let membership: &Membership = metrics.membership_config.membership();
        let header = peer::SnapshotHeader {
            to: Some(address(CLUSTER, GROUP, to)),
            vote: Some(to_peer_vote(&metrics.vote)),
            last_log_id: metrics.last_applied.as_ref().map(to_peer_id),
            membership: codec::encode(&MembershipRow::from(membership)).into(),
            membership_log_id: metrics.membership_config.log_id().as_ref().map(to_peer_id),
        };
        Self { header, rows: from.rows(GROUP) }
    }

    fn header(&self) -> Part {
        Part::Header(self.header.clone())
    }

    fn rows(&self, count: usize) -> Part {
        let (keys, values) = self.rows[..count].iter().map(|(k, v)| (k.clone().into(), v.clone().into())).unzip();
        Part::Rows(peer::SnapshotRows { keys, values })
    }

    fn end(rows: usize) -> Part {
        Part::End(peer::SnapshotEnd { rows: rows as u64 })
    }
}

fn address(cluster: &str, group: GroupId, replica: ReplicaId) -> peer::Address {
    peer::Address { cluster: cluster.to_owned(), group: group.0.into(), replica }
}

fn to_peer_vote(vote: &Vote) -> peer::Vote {
    peer::Vote { term: vote.leader_id.term, replica: vote.leader_id.voted_for, committed: vote.committed }
}

fn to_peer_id(id: &LogId) -> peer::LogId {
    peer::LogId { term: term_of(id), index: id.index }
}

async fn send(node: &Node, parts: Vec<Part>) -> Result<peer::SnapshotResponse, Status> {
    let parts = parts.into_iter().map(|part| peer::SnapshotRequest { part: Some(part) });
    let answer = node.client().await.snapshot(futures::stream::iter(parts)).await;
    answer.map(Response::into_inner)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_is_not_whole_leaves_no_trace() {
    bounded(async {
        let mut nodes = cluster(1, 1).await;
        write_many(&nodes[0].raft(GROUP), 300, 2_000).await;
        purge(&nodes[0], GROUP).await;
        nodes.push(Node::start(2, 1, Begin::Wait { replica: 2 }).await);
        let new = &nodes[1];
        let forged = Forged::of(&nodes[0], 2);
        let all = forged.rows.len();
        let untouched = || {
            let (rows, parts) = (new.rows(GROUP).len(), new.staging());
            assert!(rows == 0 && parts.is_empty(), "a refused snapshot left {rows} rows and {parts:?} behind");
        };

        // Ends without its last part; claims another number; lacks the row that says what was applied; says another.
        let cut = send(new, vec![forged.header(), forged.rows(all)]).await.unwrap_err();
        assert_eq!(cut.code(), Code::Aborted, "{cut}");
        untouched();
        let short = send(new, vec![forged.header(), forged.rows(all), Forged::end(all + 1)]).await.unwrap_err();
        assert_eq!(short.code(), Code::DataLoss, "{short}");
        let headless = send(new, vec![forged.header(), forged.rows(10), Forged::end(10)]).await.unwrap_err();
        assert_eq!(headless.code(), Code::DataLoss, "{headless}");
        let disordered = vec![forged.header(), forged.rows(10), forged.rows(10), Forged::end(20)];
        let disordered = send(new, disordered).await.unwrap_err();
        assert_eq!(disordered.code(), Code::DataLoss, "rows that do not ascend: {disordered}");
        untouched();

        // The sender dies while its rows are being put into files.
        let (parts, mut receiver) = mpsc::channel(4);
        let mut client = new.client().await;
        let call = tokio::spawn(async move {
            client.snapshot(futures::stream::poll_fn(move |context| receiver.poll_recv(context))).await
        });
        for part in [forged.header(), forged.rows(all / 2)] {
            parts.send(peer::SnapshotRequest { part: Some(part) }).await.unwrap();
        }
        until("the rows are on the way", || !new.staging().is_empty());
        call.abort();
        until("they are gone", || new.staging().is_empty());
        untouched();
        assert_eq!(new.applied(GROUP), None, "what a node has applied that took in no snapshot");

        connect(&nodes);
        nodes[0].raft(GROUP).add_learner(2, Member { node_id: 2 }, true).await.unwrap();
        let rows = agree(&nodes.iter().collect::<Vec<_>>(), GROUP).await;
        assert!(rows > 600, "{rows} rows, of more than 600 that were written");
        assert_eq!(nodes[1].staging(), Vec::<PathBuf>::new(), "parts of a snapshot that is taken in");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_are_wrong_are_refused_and_harm_nobody() {
    bounded(async {
        let nodes = cluster(2, 1).await;
        write_many(&nodes[0].raft(GROUP), 5, 100).await;
        agree(&nodes.iter().collect::<Vec<_>>(), GROUP).await;
        let leads = nodes[0].vote(GROUP);
        let mut client = nodes[1].client().await;

        for (to, code, text) in [
            (None, Code::InvalidArgument, "to: is missing"),
            (Some(address("other", GROUP, 2)), Code::FailedPrecondition, "'test', not 'other'"),
            (Some(address(CLUSTER, GroupId(9), 2)), Code::NotFound, "node 2 holds nothing of group 9"),
            (Some(address(CLUSTER, GROUP, 7)), Code::FailedPrecondition, "holds replica 2 of g1, not 7"),
        ] {
            let refuse = |status: Status| {
                assert_eq!(status.code(), code, "{status}");
                assert!(status.message().contains(text), "{status}");
            };
            let ask = peer::VoteRequest { to: to.clone(), vote: Some(to_peer_vote(&leads)), ..Default::default() };
            refuse(client.vote(ask).await.unwrap_err());
            let transfer =
                peer::TransferRequest { to: to.clone(), from: Some(to_peer_vote(&leads)), ..Default::default() };
            refuse(client.transfer(transfer).await.unwrap_err());
            let append = peer::AppendRequest { to: to.clone(), vote: Some(to_peer_vote(&leads)), ..Default::default() };
            let mut answers = client.append(futures::stream::iter([append])).await.unwrap().into_inner();
            refuse(answers.message().await.unwrap_err());
            let mut forged = Forged::of(&nodes[0], 2);
            forged.header.to = to;
            refuse(send(&nodes[1], vec![forged.header()]).await.unwrap_err());
        }

        // Entries that do not follow each other, a leader that is none, a leader that is the follower itself.
        let right = peer::AppendRequest {
            to: Some(address(CLUSTER, GROUP, 2)),
            vote: Some(to_peer_vote(&leads)),
            ..Default::default()
        };
        let log = nodes[0].store.scan_log(&Key::log_entry(GROUP, 2), &Key::log_end(GROUP), 3).unwrap();
        let entries = |picked: [usize; 2]| picked.map(|at| Bytes::from(log[at].1.clone())).to_vec();
        let wrong = [
            peer::AppendRequest { entries: entries([0, 2]), ..right.clone() },
            peer::AppendRequest { entries: vec![Bytes::from_static(b"nonsense")], ..right.clone() },
            peer::AppendRequest { vote: Some(to_peer_vote(&vote(leads.leader_id.term, 1, false))), ..right.clone() },
            peer::AppendRequest { vote: Some(to_peer_vote(&vote(leads.leader_id.term + 1, 2, true))), ..right.clone() },
            peer::AppendRequest { vote: None, ..right.clone() },
        ];
        for wrong in wrong {
            // The request before it is answered all the same.
            let requests = futures::stream::iter([right.clone(), wrong]);
            let mut answers = client.append(requests).await.unwrap().into_inner();
            let accepted = answers.message().await.unwrap().unwrap();
            let is_accepted = matches!(accepted.result, Some(peer::append_response::Result::Accepted(_)));
            assert!(is_accepted, "what came before the wrong one is accepted: {accepted:?}");
            let refused = answers.message().await.unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        }

        // Of a leader that is not one any more; of one that contradicts what is committed; of what is here already.
        let mut old = Forged::of(&nodes[0], 2);
        old.header.vote = Some(to_peer_vote(&vote(leads.leader_id.term - 1, 1, true)));
        old.header.last_log_id = Some(to_peer_id(&log_id(leads.leader_id.term - 1, 999)));
        old.header.membership_log_id = None;
        let overruled = send(&nodes[1], vec![old.header()]).await.unwrap();
        assert_eq!(overruled.vote, Some(to_peer_vote(&leads)), "the vote that overrules an older leader's snapshot");
        let mut liar = Forged::of(&nodes[0], 2);
        liar.header.vote = Some(to_peer_vote(&vote(leads.leader_id.term + 1, 1, true)));
        liar.header.last_log_id = Some(to_peer_id(&log_id(leads.leader_id.term + 1, 2)));
        liar.header.membership_log_id = None;
        let refused = send(&nodes[1], vec![liar.header()]).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        let known = send(&nodes[1], vec![Forged::of(&nodes[0], 2).header()]).await.unwrap();
        assert_eq!(known.vote, Some(to_peer_vote(&leads)), "the vote after a snapshot of what is known already");

        write_many(&nodes[0].raft(GROUP), 5, 100).await;
        agree(&nodes.iter().collect::<Vec<_>>(), GROUP).await;
        assert_eq!(nodes[1].vote(GROUP), leads, "a vote that nothing of this has changed");
    })
    .await;
}

/// Takes every request of a stream, and answers the first few of its life.
#[derive(Clone, Default)]
struct Silent {
    answers: Arc<AtomicUsize>,
    /// So many more requests must have come before one is answered.
    behind: usize,
    streams: Arc<AtomicUsize>,
    /// Messages with heartbeats; the first is answered, each replica by its number, and no other.
    beats: Arc<AtomicUsize>,
}

#[tonic::async_trait]
impl Peer for Silent {
    type AppendStream = futures::stream::BoxStream<'static, Result<peer::AppendResponse, Status>>;

    async fn append(
        &self,
        requests: tonic::Request<Streaming<peer::AppendRequest>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        self.streams.fetch_add(1, Relaxed);
        let silent = self.clone();
        let answers = requests.into_inner().skip(silent.behind).filter_map(move |_| {
            let left = silent.answers.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1));
            let answer = left.ok().map(|_| {
                let accepted = peer::Accepted { last_log_id: None };
                Ok(peer::AppendResponse { result: Some(peer::append_response::Result::Accepted(accepted)) })
            });
            std::future::ready(answer)
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn bind(&self, _: tonic::Request<peer::BindRequest>) -> Result<Response<peer::BindResponse>, Status> {
        std::future::pending().await
    }

    async fn beat(&self, request: tonic::Request<peer::BeatRequest>) -> Result<Response<peer::BeatResponse>, Status> {
        if self.beats.fetch_add(1, Relaxed) > 0 {
            return std::future::pending().await;
        }
        let answer = |request: peer::AppendRequest| {
            let index = u64::from(request.to.unwrap().group);
            let accepted = peer::Accepted { last_log_id: Some(peer::LogId { term: 1, index }) };
            let answer = peer::AppendResponse { result: Some(peer::append_response::Result::Accepted(accepted)) };
            let refused = || peer::beat_answer::Result::Refused("not this one".into());
            let answer = if index == 3 { refused() } else { peer::beat_answer::Result::Answer(answer) };
            peer::BeatAnswer { result: Some(answer) }
        };
        let answers = request.into_inner().requests.into_iter().map(answer).collect();
        Ok(Response::new(peer::BeatResponse { answers }))
    }

    async fn vote(&self, _: tonic::Request<peer::VoteRequest>) -> Result<Response<peer::VoteResponse>, Status> {
        std::future::pending().await
    }

    async fn transfer(
        &self,
        _: tonic::Request<peer::TransferRequest>,
    ) -> Result<Response<peer::TransferResponse>, Status> {
        std::future::pending().await
    }

    async fn snapshot(
        &self,
        _: tonic::Request<Streaming<peer::SnapshotRequest>>,
    ) -> Result<Response<peer::SnapshotResponse>, Status> {
        std::future::pending().await
    }
}

impl Silent {
    /// As node 2 of the network that comes back, until the task is ended.
    async fn serve(&self) -> (PeerNetwork, tokio::task::JoinHandle<Result<(), tonic::transport::Error>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let network = PeerNetwork::new(CLUSTER, 1, Arc::new(credentials(1)));
        network.set(2, &listener.local_addr().unwrap().to_string());
        let server = tonic::transport::Server::builder().add_service(PeerServer::new(self.clone()));
        let mut wires = incoming(listener, credentials(2));
        let wires = futures::stream::poll_fn(move |context| wires.poll_recv(context)).map(Ok::<Wire, io::Error>);
        (network, tokio::spawn(server.serve_with_incoming(wires)))
    }
}

fn heartbeat() -> AppendEntriesRequest<TypeConfig> {
    AppendEntriesRequest { vote: vote(1, 1, true), prev_log_id: None, entries: Vec::new(), leader_commit: None }
}

fn once() -> impl Stream<Item = AppendEntriesRequest<TypeConfig>> + Unpin + Send + 'static {
    futures::stream::iter([heartbeat()])
}

/// The first connection fails when it is told to; those after it are made.
struct Hesitant {
    asked: AtomicUsize,
    fails: Arc<Notify>,
    to: String,
}

impl Dial for Hesitant {
    fn dial(&self, _: u64, _: &str) -> BoxFuture<'static, io::Result<Wire>> {
        let (asked, fails, to) = (self.asked.fetch_add(1, Relaxed), self.fails.clone(), self.to.clone());
        async move {
            if asked == 0 {
                fails.notified().await;
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            credentials(2).dial(1, &to).await
        }
        .boxed()
    }
}

/// Whoever gives up while a connection is being made leaves it to the next one, which must not fail by what became of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_was_given_up_long_ago_fails_nobody() {
    bounded(async {
        let nodes = cluster(1, 1).await;
        let fails = Arc::new(Notify::new());
        let hesitant = Hesitant { asked: AtomicUsize::new(0), fails: fails.clone(), to: nodes[0].address() };
        let network = PeerNetwork::new(CLUSTER, 2, Arc::new(hesitant));
        network.set(1, "elsewhere:1");
        let mut client = network.for_group(GROUP).new_client(1, &Member { node_id: 1 }).await;
        let request = || VoteRequest::new(vote(0, 2, false), None);
        client.vote(request(), RPCOption::new(Duration::from_millis(200))).await.unwrap_err();
        fails.notify_one();
        client.vote(request(), RPCOption::new(WITHIN)).await.unwrap();
    })
    .await;
}

/// Those of one moment share a message, and each gets its own answer; one that is not answered is not waited for longer
/// than until the next.
/// On one thread, so that all twenty are of one moment.
#[tokio::test]
async fn heartbeats_of_one_moment_share_a_message() {
    bounded(async {
        let silent = Silent::default();
        let (network, server) = silent.serve().await;
        let beat = async |group: u16| {
            let mut client = network.for_group(GroupId(group)).new_heartbeat_client(2, &Member { node_id: 2 }).await;
            let option = RPCOption::new(Duration::from_millis(200));
            let answers = client.stream_append(once(), option).await.unwrap();
            let [answer] = <[_; 1]>::try_from(answers.collect::<Vec<_>>().await).unwrap();
            answer
        };
        for (group, answer) in join_all((1..=20).map(beat)).await.into_iter().enumerate() {
            let number = group as u64 + 1;
            match answer {
                Ok(Ok(last)) => assert_eq!(last, Some(log_id(1, number)), "the entry that answer {number} confirms"),
                other => assert!(number == 3 && other.is_err(), "answer {number}: {other:?}"),
            }
        }
        assert_eq!(silent.beats.load(Relaxed), 1, "beats that came while appends had no answer");
        let begun = Instant::now();
        let unanswered = beat(1).await;
        assert!(unanswered.is_err(), "a beat without an answer: {unanswered:?}");
        let elapsed = begun.elapsed();
        assert!(elapsed < Duration::from_secs(1), "a beat without an answer is waited for for {elapsed:?}");
        server.abort();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_does_not_answer_is_unreachable_and_one_that_is_not_asked_is_fine() {
    bounded(async {
        let silent = Silent::default();
        silent.answers.store(3, Relaxed);
        let (network, server) = silent.serve().await;
        let mut client = network.for_group(GROUP).new_client(2, &Member { node_id: 2 }).await;
        let option = || RPCOption::new(Duration::from_millis(200));
        let streams = || silent.streams.load(Relaxed);

        // Two heartbeats, one lane.
        for _ in 0..2 {
            let answers = client.stream_append(once(), option()).await.unwrap();
            let answers: Vec<_> = answers.collect().await;
            assert!(matches!(&answers[..], [Ok(Ok(None))]), "{answers:?}");
        }
        assert_eq!(streams(), 1, "streams for appends one after the other");

        // One more answer, and then none.
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let input = futures::stream::poll_fn(move |context| receiver.poll_recv(context));
        let mut answers = client.stream_append(input, option()).await.unwrap();
        sender.send(heartbeat()).unwrap();
        let answer = answers.next().await.unwrap();
        assert!(answer.is_ok(), "the one answer that is left: {answer:?}");
        // Nothing is asked, so nothing is missing.
        let idle = tokio::time::timeout(Duration::from_millis(3_300), answers.next()).await;
        assert!(idle.is_err(), "an idle stream ended: {idle:?}");
        sender.send(heartbeat()).unwrap();
        let begun = Instant::now();
        let error = answers.next().await.unwrap().unwrap_err();
        assert!(matches!(error, openraft::errors::RPCError::Unreachable(_)), "{error}");
        let elapsed = begun.elapsed();
        assert!(
            elapsed > Duration::from_millis(2_900),
            "an answer was given up after {elapsed:?} instead of three seconds"
        );
        assert!(answers.next().await.is_none(), "a stream that has failed goes on");
        drop(answers);

        // A heartbeat given up half way takes its lane with it: its answer must not be the next one's.
        let mut answers = client.stream_append(once(), option()).await.unwrap();
        let early = tokio::time::timeout(Duration::from_millis(50), answers.next()).await;
        assert!(early.is_err(), "an answer from one that gives none: {early:?}");
        drop(answers);
        silent.answers.store(1, Relaxed);
        let before = streams();
        let answers: Vec<_> = client.stream_append(once(), option()).await.unwrap().collect().await;
        assert!(matches!(&answers[..], [Ok(Ok(None))]), "{answers:?}");
        assert_eq!(streams(), before + 1, "streams: one that is left with something under way is not used again");

        // A vote is not waited for longer than openraft says.
        let begun = Instant::now();
        let vote = client.vote(VoteRequest::new(vote(1, 1, false), None), option()).await;
        assert!(vote.is_err(), "a vote from one that gives no answers: {vote:?}");
        let elapsed = begun.elapsed();
        assert!(elapsed < Duration::from_secs(1), "a vote without an answer is waited for for {elapsed:?}");

        // A node that is removed is not spoken to any more, even where a stream is open.
        let (_sender, mut receiver) = mpsc::unbounded_channel();
        let input = futures::stream::poll_fn(move |context| receiver.poll_recv(context));
        let mut answers = client.stream_append(input, option()).await.unwrap();
        let removed = async {
            tokio::task::yield_now().await;
            network.remove(2);
        };
        let (answer, ()) = tokio::join!(answers.next(), removed);
        let is_over = matches!(answer, Some(Err(openraft::errors::RPCError::Unreachable(_))));
        assert!(is_over, "a node that is removed is out of reach, also on an open stream: {answer:?}");
        server.abort();
    })
    .await;
}

/// openraft would take the lease from when the second was sent, which nobody may ever have received.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_does_not_vouch_for_a_request_that_was_sent_after_it() {
    bounded(async {
        let silent = Silent { answers: Arc::new(AtomicUsize::new(1)), behind: 1, ..Silent::default() };
        let (network, server) = silent.serve().await;
        let mut client = network.for_group(GROUP).new_client(2, &Member { node_id: 2 }).await;
        let mut answers = async |requests: [AppendEntriesRequest<TypeConfig>; 2]| {
            let requests = futures::stream::iter(requests).chain(futures::stream::pending());
            let mut answers = client.stream_append(requests.boxed(), RPCOption::new(WITHIN)).await.unwrap();
            answers.next().await.unwrap()
        };
        let after = AppendEntriesRequest { prev_log_id: Some(log_id(1, 1)), ..heartbeat() };
        assert!(matches!(answers([heartbeat(), after]).await, Ok(Ok(None))), "it says nothing of the second");
        silent.answers.store(1, Relaxed);
        let error = answers([heartbeat(), heartbeat()]).await.unwrap_err();
        assert_eq!(silent.answers.load(Relaxed), 0, "the first was answered");
        assert!(error.to_string().contains("no answer since"), "{error}");
        server.abort();
    })
    .await;
}

#[tokio::test]
async fn nobody_speaks_to_oneself_or_to_nowhere() {
    bounded(async {
        let network = PeerNetwork::new(CLUSTER, 1, Arc::new(credentials(1)));
        network.set(1, "127.0.0.1:1");
        network.set(3, "not an address");
        network.set(4, "127.0.0.1:1");
        for (node_id, why) in [(1, "is this node"), (2, "no address is known"), (3, "is not an address"), (4, "")] {
            let mut client = network.for_group(GROUP).new_client(9, &Member { node_id }).await;
            let option = || RPCOption::new(WITHIN);
            let refused =
                client.vote(VoteRequest::new(vote(1, 1, false), None), option()).await.unwrap_err().to_string();
            assert!(refused.contains("Unreachable") && refused.contains(why), "{refused}");
            let answers: Vec<_> = client.stream_append(once(), option()).await.unwrap().collect().await;
            assert!(matches!(&answers[..], [Err(openraft::errors::RPCError::Unreachable(_))]), "{answers:?}");
        }
    })
    .await;
}

/// openraft rests after a failure by letting its next request wait. An error that comes sooner makes it ask again at once,
/// thousands of times a second.
#[tokio::test]
async fn a_failure_waits_for_the_request_it_is_about() {
    let nobody = OwnAddress::take().unwrap();
    let network = PeerNetwork::new(CLUSTER, 1, Arc::new(credentials(1)));
    network.set(2, &nobody.to_string());
    let mut client = network.for_group(GROUP).new_client(2, &Member { node_id: 2 }).await;
    let option = || RPCOption::new(Duration::from_millis(200));
    let answers: Vec<_> = client.stream_append(once(), option()).await.unwrap().collect().await;
    assert!(matches!(&answers[..], [Err(_)]), "nobody listens there: {answers:?}");
    // Once it is known that nobody is there, and once nobody knows where it would be.
    for is_known in [true, false] {
        if !is_known {
            network.remove(2);
        }
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let input = futures::stream::poll_fn(move |context| receiver.poll_recv(context));
        let mut answers = client.stream_append(input, option()).await.unwrap();
        let early = tokio::time::timeout(Duration::from_millis(50), answers.next()).await;
        assert!(early.is_err(), "an error about nothing: {early:?}");
        sender.send(heartbeat()).unwrap();
        let answer = answers.next().await.unwrap();
        assert!(answer.is_err(), "an answer from nobody: {answer:?}");
    }
}
