//! From this node's groups to their replicas on other nodes.
//!
//! [`PeerNetwork`] knows where the nodes are (the placement room tells it) and holds four connections to each of them,
//! made when first used and shared by all groups, so that nothing waits behind something of another kind:
//!
//! ```text
//!   control     votes, promises, beats, transfers  small, must be quick: leases and elections hang on them
//!   appends     log entries, pipelined           one long stream per group
//!   snapshots   rows of whole shards             as much as the link carries
//!   requests    what is not Raft: forwarded requests, questions about a node
//! ```
//!
//! Heartbeats to one node are gathered (see `heartbeats`). Log entries travel on a [`Lane`], a stream in both directions
//! that stays open between uses. Several requests may be under way on it; the answers come in their order, so a lane
//! with an answer outstanding is never used again: a late answer would be taken for the next one's, and prove a lease
//! that is not there. A lane that has been owed an answer for too long counts as broken, since openraft waits for it and
//! keeps the log until it comes.
//!
//! openraft takes an answer for all requests up to the entry it names, and the lease from when the last of them was sent.
//! A request without entries names the same entry as the one before it, whose answer would vouch for both: it is held
//! back until the last that names the entry is answered.
//!
//! ```text
//!   sent      8 at 3.6 s    nothing after 8 at 5.6 s     (the link is cut between them)
//!   answered  up to 8 ----> openraft: heard of at 5.6 s
//! ```
//!
//! openraft's stream of requests is read here and not by tonic: it must be dropped the moment the answers are, because
//! the next session waits for it.
//!
//! Everything that goes wrong is `Unreachable`, which makes openraft wait before it tries again.

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::{Stream, StreamExt, TryStreamExt};
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{ErrorSource, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{
    Backoff, NetBackoff, NetSnapshot, NetStreamAppend, NetTransferLeader, NetVote, RPCOption, RaftNetworkFactory,
};
use openraft::raft::{
    AppendEntriesRequest, SnapshotResponse, StreamAppendResult, TransferLeaderRequest, TransferLeaderResponse,
    VoteRequest, VoteResponse,
};
use openraft::{OptionalSend, StorageError};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status, Streaming};

use super::dial::{Dial, Dialer};
use super::heartbeats::Heartbeats;
use super::peer_messages::{
    MESSAGE_BYTES_MAX, from_append_response, from_vote, from_vote_response, to_append, to_snapshot_header, to_transfer,
    to_vote_request,
};
use super::state_machine::SnapshotData;
use super::types::{LogId, Member, ReplicaId, TypeConfig, Vote};
use crate::store::StoreError;
use crate::store::export::Export;
use crate::task::GroupId;
use crate::task::locks::{Mutex, RwLock};
use crate::wire::peer;
use crate::wire::peer::peer_client::PeerClient;
use crate::wire::peer::snapshot_request::Part;

const CONNECT_WITHIN: Duration = Duration::from_secs(1);
/// A node that could not be connected to is not tried again before. Below the time between two heartbeats.
const CALL_AGAIN_AFTER: Duration = Duration::from_millis(100);
/// Opening a lane, connecting included. Heartbeats have less: openraft gives each of them one interval.
const OPEN_WITHIN: Duration = Duration::from_millis(1_500);
/// A connection whose other end is silently gone is noticed after both.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(2);
const KEEPALIVE_WITHIN: Duration = Duration::from_secs(2);

/// How long the other side may take for an answer. It stores the entries before it answers, so this must bear a disk
/// that stutters.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// Besides the time on the way: an entry that is too large for a slow link would be sent again for ever.
const BYTES_PER_SECOND_MIN: u32 = 1024 * 1024;
/// What may be under way on one lane; a follower that is slow holds this much of ours at most.
const UNANSWERED_REQUESTS_MAX: usize = 64;
const UNANSWERED_BYTES_MAX: usize = 4 * 1024 * 1024;

/// How long the news that an entry is committed waits for the next entry, which brings it along. A message of its own
/// would cost as much as an entry; until it comes, a follower has not applied what it has stored.
const COMMIT_WAITS: Duration = Duration::from_millis(10);

/// A snapshot of which nothing more can be sent for this long is given up.
const SNAPSHOT_STALLED_AFTER: Duration = Duration::from_secs(10);
/// All rows are there; what is left is one atomic step, which may wait for another of its kind.
const INSTALL_WITHIN: Duration = Duration::from_secs(30);
/// Parts between us and the connection; its window is what limits the flow.
const PARTS_AHEAD: usize = 1;

type BeatAnswer = Result<StreamAppendResult<TypeConfig>, RPCError<TypeConfig>>;
type Answers<'s> = BoxStream<'s, Result<StreamAppendResult<TypeConfig>, RPCError<TypeConfig>>>;

fn unreachable(why: impl std::fmt::Display) -> Unreachable<TypeConfig> {
    Unreachable::from_string(why)
}

fn said(status: &Status) -> Unreachable<TypeConfig> {
    unreachable(format!("{:?}: {}", status.code(), status.message()))
}

/// Where the other nodes are, and the connections to them; cheap to clone.
#[derive(Clone)]
pub struct PeerNetwork {
    inner: Arc<NetworkInner>,
}

struct NetworkInner {
    cluster: String,
    /// Our own: nothing is ever sent there.
    node_id: u64,
    /// `None` on a node that is alone.
    dial: Option<Arc<dyn Dial>>,
    /// See [`crate::threads`].
    urgent: OnceLock<Threads>,
    /// Sent so far: log entries, beats, requests to be bound, votes; answers not counted.
    messages: Arc<AtomicU64>,
    remotes: RwLock<BTreeMap<u64, Arc<Remote>>>,
}

/// Where connections are driven.
#[derive(Clone)]
struct Threads {
    urgent: Handle,
    others: Handle,
}

/// One node at one address.
struct Remote {
    node_id: u64,
    address: String,
    dial: Option<Arc<dyn Dial>>,
    threads: Option<Threads>,
    messages: Arc<AtomicU64>,
    connections: OnceLock<Connections>,
    /// When it could not be connected to last.
    failed_at: Mutex<Option<Instant>>,
    /// It is not there any more, or elsewhere.
    gone: CancellationToken,
}

struct Connections {
    control: Channel,
    appends: Channel,
    snapshots: Channel,
    requests: Channel,
    heartbeats: Heartbeats,
}

impl PeerNetwork {
    /// The network of the node `node_id`; it knows no other node yet. Connections come from `dial`.
    pub fn new(cluster: &str, node_id: u64, dial: Arc<dyn Dial>) -> Self {
        Self::make(cluster, node_id, Some(dial))
    }

    /// Of a node that has no others, and can call none.
    pub fn alone(cluster: &str, node_id: u64) -> Self {
        Self::make(cluster, node_id, None)
    }

    fn make(cluster: &str, node_id: u64, dial: Option<Arc<dyn Dial>>) -> Self {
        let remotes = RwLock::default();
        Self {
            inner: Arc::new(NetworkInner {
                cluster: cluster.to_owned(),
                node_id,
                dial,
                urgent: OnceLock::new(),
                messages: Arc::default(),
                remotes,
            }),
        }
    }

    /// Messages of Raft that were sent to other nodes so far.
    pub fn messages(&self) -> u64 {
        self.inner.messages.load(Relaxed)
    }

    fn count(&self) {
        self.inner.messages.fetch_add(1, Relaxed);
    }

    /// What is urgent runs there, instead of where it is asked for. To be said before anything else.
    /// Everything else runs where this is called.
    pub fn run_urgent_on(&self, urgent: &Handle) {
        let threads = Threads { urgent: urgent.clone(), others: Handle::current() };
        assert!(self.inner.urgent.set(threads).is_ok(), "said once");
    }

    /// Runs what leading hangs on.
    pub(super) fn spawn_urgent(&self, future: impl Future<Output = ()> + Send + 'static) {
        match self.inner.urgent.get() {
            Some(threads) => threads.urgent.spawn(future),
            None => tokio::spawn(future),
        };
    }

    /// Asks a node for its promises; they are of no use after the time that `within` allows.
    pub(super) async fn bind(&self, node_id: u64, binds: Vec<peer::Bind>, within: Duration) -> Option<Vec<bool>> {
        let remote = self.remote(node_id).ok()?;
        remote.check_reachable().ok()?;
        let mut client = client(&remote.connections().ok()?.control);
        self.count();
        let request = peer::BindRequest { cluster: self.inner.cluster.clone(), binds };
        match timeout(within, client.bind(request)).await {
            Ok(Ok(answer)) => Some(answer.into_inner().promised),
            Ok(Err(status)) => {
                tracing::debug!(node_id, why = %remote.refused(&status), "nothing is promised");
                None
            }
            Err(_) => None,
        }
    }

    /// From now on `node_id` is at `address` (`host:port`). A node that moves loses what was under way to it.
    pub fn set(&self, node_id: u64, address: &str) {
        let mut remotes = self.inner.remotes.write();
        if remotes.get(&node_id).is_some_and(|known| known.address == address) {
            return;
        }
        let remote = Remote {
            node_id,
            address: address.to_owned(),
            dial: self.inner.dial.clone(),
            threads: self.inner.urgent.get().cloned(),
            messages: self.inner.messages.clone(),
            connections: OnceLock::new(),
            failed_at: Mutex::new(None),
            gone: CancellationToken::new(),
        };
        if let Some(before) = remotes.insert(node_id, Arc::new(remote)) {
            before.gone.cancel();
        }
    }

    /// Nothing more is sent to `node_id` until it is set again.
    pub fn remove(&self, node_id: u64) {
        if let Some(before) = self.inner.remotes.write().remove(&node_id) {
            before.gone.cancel();
        }
    }

    pub fn address(&self, node_id: u64) -> Option<String> {
        let remotes = self.inner.remotes.read();
        remotes.get(&node_id).map(|remote| remote.address.clone())
    }

    /// The connection for what is not Raft. Must be called within the runtime that is to run it.
    pub fn requests_to(&self, node_id: u64) -> Result<Channel, String> {
        let remote = self.remote(node_id).map_err(|error| error.to_string())?;
        Ok(remote.connections().map_err(|error| error.to_string())?.requests.clone())
    }

    pub fn cluster(&self) -> &str {
        &self.inner.cluster
    }

    /// What openraft takes as the network of one group.
    pub fn for_group(&self, group: GroupId) -> GroupNetwork {
        GroupNetwork { network: self.clone(), group, log: None }
    }

    fn remote(&self, node_id: u64) -> Result<Arc<Remote>, Unreachable<TypeConfig>> {
        if node_id == self.inner.node_id {
            return Err(unreachable(format!("node {node_id} is this node: a replica here has no peer here")));
        }
        let remotes = self.inner.remotes.read();
        remotes.get(&node_id).cloned().ok_or_else(|| unreachable(format!("no address is known for node {node_id}")))
    }
}

impl Remote {
    /// A node that is away would otherwise be called by every group for every heartbeat.
    fn check_reachable(&self) -> Result<(), Unreachable<TypeConfig>> {
        let failed_at = *self.failed_at.lock();
        match failed_at.filter(|at| at.elapsed() < CALL_AGAIN_AFTER) {
            Some(_) => Err(unreachable("it could not be connected to a moment ago")),
            None => Ok(()),
        }
    }

    /// What came back instead of an answer, from it or because it is not there.
    fn refused(&self, status: &Status) -> Unreachable<TypeConfig> {
        if connection_failed(status) {
            *self.failed_at.lock() = Some(Instant::now());
        }
        said(status)
    }

    /// Must be called within the runtime that is to run the connections.
    fn connections(&self) -> Result<&Connections, Unreachable<TypeConfig>> {
        if let Some(connections) = self.connections.get() {
            return Ok(connections);
        }
        let dial = self.dial.clone().ok_or_else(|| unreachable("this node is alone"))?;
        let dialer = Dialer { dial, node_id: self.node_id, address: self.address.clone() };
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address))
            .map_err(|error| unreachable(format!("'{}' is not an address: {error}", self.address)))?
            .connect_timeout(CONNECT_WITHIN)
            .http2_keep_alive_interval(KEEPALIVE_EVERY)
            .keep_alive_timeout(KEEPALIVE_WITHIN)
            .keep_alive_while_idle(true);
        let connect = || endpoint.connect_with_connector_lazy(dialer.clone());
        // A connection is driven where it was made.
        let urgent = self.threads.as_ref().map(|threads| &threads.urgent);
        let others = self.threads.as_ref().map(|threads| &threads.others);
        let control = {
            let _entered = urgent.map(Handle::enter);
            connect()
        };
        Ok(self.connections.get_or_init(|| Connections {
            heartbeats: {
                let _entered = urgent.map(Handle::enter);
                Heartbeats::start(control.clone(), self.messages.clone())
            },
            control,
            appends: {
                let _entered = others.map(Handle::enter);
                connect()
            },
            snapshots: {
                let _entered = others.map(Handle::enter);
                connect()
            },
            requests: {
                let _entered = others.map(Handle::enter);
                connect()
            },
        }))
    }
}

pub(super) fn client(channel: &Channel) -> PeerClient<Channel> {
    PeerClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

/// What is put into the sender leaves as the body of a request.
fn body<T: Send + 'static>(mut receiver: mpsc::Receiver<T>) -> impl Stream<Item = T> + Send + 'static {
    futures::stream::poll_fn(move |context| receiver.poll_recv(context))
}

/// Makes clients for the replicas of one group.
pub struct GroupNetwork {
    network: PeerNetwork,
    group: GroupId,
    log: Option<watch::Receiver<u64>>,
}

impl GroupNetwork {
    /// With news of the last entry of this node's log; see [`COMMIT_WAITS`].
    pub fn with_log(self, last: watch::Receiver<u64>) -> Self {
        Self { log: Some(last), ..self }
    }

    fn client(&self, replica: ReplicaId, member: &Member, urgent: bool) -> ReplicaClient {
        let to = peer::Address { cluster: self.network.inner.cluster.clone(), group: self.group.0.into(), replica };
        let (network, log) = (self.network.clone(), self.log.clone());
        ReplicaClient { network, node_id: member.node_id, to, urgent, log, idle_lane: None }
    }
}

impl RaftNetworkFactory<TypeConfig> for GroupNetwork {
    type Network = ReplicaClient;

    async fn new_client(&mut self, target: ReplicaId, member: &Member) -> ReplicaClient {
        self.client(target, member, false)
    }

    async fn new_heartbeat_client(&mut self, target: ReplicaId, member: &Member) -> ReplicaClient {
        self.client(target, member, true)
    }
}

/// Speaks to one replica on another node. Connects when there is something to say.
pub struct ReplicaClient {
    network: PeerNetwork,
    node_id: u64,
    to: peer::Address,
    /// For heartbeats, which do not go where log entries go.
    urgent: bool,
    /// The last entry of this node's log.
    log: Option<watch::Receiver<u64>>,
    /// Open, and nothing is outstanding on it.
    idle_lane: Option<Lane>,
}

impl ReplicaClient {
    fn remote(&self) -> Result<Arc<Remote>, Unreachable<TypeConfig>> {
        self.network.remote(self.node_id)
    }

    /// One question with one answer, within what openraft allows for it.
    async fn ask<T>(
        &self,
        option: &RPCOption,
        question: impl AsyncFnOnce(PeerClient<Channel>) -> Result<Response<T>, Status> + Clone,
    ) -> Result<T, RPCError<TypeConfig>> {
        let remote = self.remote()?;
        remote.check_reachable()?;
        let client = client(&remote.connections()?.control);
        self.network.count();
        let asked = async {
            match question.clone()(client.clone()).await {
                // Whoever gave up while a connection was being made has left it like that, and the next one fails by a
                // deadline of long ago. Then it is made anew. The node may have been asked already. That is harmless in
                // Raft: a vote is given once in a term however often it is asked for, and whatever else is asked names
                // its term and its place in the log.
                Err(status) if connection_failed(&status) => question(client).await,
                answer => answer,
            }
        };
        match timeout(option.soft_ttl(), asked).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(remote.refused(&status).into()),
            Err(_) => Err(unreachable(format!("node {} does not answer", self.node_id)).into()),
        }
    }

    async fn ask_vote(
        &self,
        request: VoteRequest<TypeConfig>,
        pre_vote: bool,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let request = to_vote_request(self.to.clone(), &request, pre_vote);
        let answer = self.ask(&option, async move |mut client| client.vote(request).await).await?;
        from_vote_response(answer).map_err(|malformed| unreachable(malformed).into())
    }

    /// One heartbeat after the other; openraft asks for one at a time.
    fn beat<'s, S>(&'s self, input: S) -> impl Stream<Item = BeatAnswer> + Send + 's
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
    {
        input.then(async |request| {
            let remote = self.remote()?;
            remote.check_reachable()?;
            let request = to_append(Some(self.to.clone()), &request);
            let answer = tokio::select! {
                biased;
                answer = remote.connections()?.heartbeats.send(request) => answer,
                () = remote.gone.cancelled() => return Err(unreachable("the node is not there any more").into()),
            };
            let answer = answer.map_err(|status| remote.refused(&status))?;
            from_append_response(answer).map_err(|malformed| unreachable(malformed).into())
        })
    }

    async fn open_lane(&mut self) -> Result<Lane, RPCError<TypeConfig>> {
        let remote = self.remote()?;
        if let Some(lane) = self.idle_lane.take().filter(|lane| lane.leads_to(&remote)) {
            return Ok(lane);
        }
        remote.check_reachable()?;
        let connections = remote.connections()?;
        let mut client = client(&connections.appends);
        let (requests, receiver) = mpsc::channel(1);
        let opened = timeout(OPEN_WITHIN, client.append(body(receiver))).await;
        let opened = opened.map_err(|_| unreachable(format!("node {} cannot be reached", self.node_id)))?;
        let answers = opened.map_err(|status| remote.refused(&status))?.into_inner();
        Ok(Lane { remote, requests, answers, to: Some(self.to.clone()) })
    }
}

/// A stream of requests to a replica and of its answers.
struct Lane {
    remote: Arc<Remote>,
    requests: mpsc::Sender<peer::AppendRequest>,
    answers: Streaming<peer::AppendResponse>,
    /// Goes with the first request.
    to: Option<peer::Address>,
}

impl Lane {
    fn leads_to(&self, remote: &Arc<Remote>) -> bool {
        Arc::ptr_eq(&self.remote, remote) && !self.requests.is_closed()
    }
}

/// A request on its way.
struct Sent {
    bytes: usize,
    /// The last entry that the other side has when it has done this.
    up_to: Option<LogId>,
}

/// What has been sent on a lane and not been answered.
struct Unanswered {
    requests: VecDeque<Sent>,
    bytes: usize,
    /// When the oldest was sent, or the one before it answered.
    since: Instant,
}

impl Unanswered {
    fn new() -> Self {
        Self { requests: VecDeque::new(), bytes: 0, since: Instant::now() }
    }

    fn push(&mut self, sent: Sent) {
        if self.requests.is_empty() {
            self.since = Instant::now();
        }
        self.bytes += sent.bytes;
        self.requests.push_back(sent);
    }

    /// False when nothing was outstanding.
    fn pop(&mut self) -> bool {
        self.since = Instant::now();
        self.requests.pop_front().map(|sent| self.bytes -= sent.bytes).is_some()
    }

    /// Whether openraft would take an answer that the other side has everything up to `last` for one to a request that
    /// has none yet.
    fn would_be_vouched_for(&self, last: Option<LogId>) -> bool {
        self.requests.front().is_some_and(|sent| sent.up_to <= last)
    }

    fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// When it is too late for the oldest one's answer.
    fn deadline(&self) -> Instant {
        let on_the_way = Duration::from_secs_f64(self.bytes as f64 / f64::from(BYTES_PER_SECOND_MIN));
        self.since + ANSWER_WITHIN + on_the_way
    }

    fn has_room(&self) -> bool {
        self.requests.len() < UNANSWERED_REQUESTS_MAX && self.bytes < UNANSWERED_BYTES_MAX
    }
}

/// One use of a lane: everything in `input` goes out, and an answer comes back for each but those that the next one
/// includes.
struct Session<'s, S> {
    /// Where the lane goes when it can be used again.
    home: &'s mut Option<Lane>,
    lane: Lane,
    input: S,
    input_ended: bool,
    unanswered: Unanswered,
    pace: Pace,
    /// See [`PeerNetwork::messages`].
    messages: Arc<AtomicU64>,
}

/// When openraft is asked for the next request. It has one ready as soon as something is committed; unless there is a new
/// entry to send, it is asked for that only after [`COMMIT_WAITS`].
struct Pace {
    log: Option<watch::Receiver<u64>>,
    /// The last entry that was sent.
    sent: Option<u64>,
    rests_until: Instant,
}

impl Pace {
    fn new(log: Option<watch::Receiver<u64>>) -> Self {
        Self { log, sent: None, rests_until: Instant::now() }
    }

    fn note(&mut self, sent: &Sent) {
        self.sent = sent.up_to.map(|id| id.index);
        self.rests_until = Instant::now() + COMMIT_WAITS;
    }

    /// Waits until there is an entry to send, or the rest is over.
    async fn wait(&mut self) {
        let (Some(log), Some(sent)) = (&mut self.log, self.sent) else { return };
        let more = log.wait_for(|last| *last > sent);
        let _ = timeout_at(self.rests_until, more).await;
    }
}

impl<'s, S> Session<'s, S>
where
    S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Unpin + Send + 'static,
{
    /// The next answer, and the session if it goes on after it.
    async fn next(mut self) -> Option<(Result<StreamAppendResult<TypeConfig>, RPCError<TypeConfig>>, Option<Self>)> {
        loop {
            if self.input_ended && self.unanswered.is_empty() {
                *self.home = Some(self.lane);
                return None;
            }
            let Lane { remote, requests, answers, to } = &mut self.lane;
            let (pace, input, count) = (&mut self.pace, &mut self.input, &self.messages);
            let send = async {
                pace.wait().await;
                let permit = requests.reserve().await.map_err(|_| unreachable("the connection is lost"))?;
                let Some(request) = input.next().await else { return Ok(None) };
                let up_to = request.entries.last().map_or(request.prev_log_id, |last| Some(last.log_id));
                let message = to_append(to.take(), &request);
                let bytes = message.entries.iter().map(bytes::Bytes::len).sum();
                permit.send(message);
                count.fetch_add(1, Relaxed);
                Ok::<Option<Sent>, Unreachable<TypeConfig>>(Some(Sent { bytes, up_to }))
            };
            let may_send = !self.input_ended && self.unanswered.has_room();
            let error = tokio::select! {
                biased;
                answer = answers.message() => match answered(&mut self.unanswered, answer) {
                    Ok(Ok(last)) if self.unanswered.would_be_vouched_for(last) => continue,
                    Ok(Ok(last)) => return Some((Ok(Ok(last)), Some(self))),
                    // The other side says no more after this.
                    Ok(Err(rejected)) => return Some((Ok(Err(rejected)), None)),
                    Err(error) => error,
                },
                () = remote.gone.cancelled() => unreachable("the node is not there any more"),
                sent = send, if may_send => match sent {
                    Ok(Some(sent)) => {
                        self.pace.note(&sent);
                        self.unanswered.push(sent);
                        continue;
                    }
                    Ok(None) => {
                        self.input_ended = true;
                        continue;
                    }
                    Err(error) => error,
                },
                () = sleep_until(self.unanswered.deadline()), if !self.unanswered.is_empty() => {
                    unreachable(format!("no answer since {:?}", self.unanswered.since.elapsed()))
                }
            };
            return Some((Err(error.into()), None));
        }
    }
}

/// There was no connection to send it on, or it broke before the answer; the node may have heard it or not. What the node
/// itself says has no source.
fn connection_failed(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

fn answered(
    unanswered: &mut Unanswered,
    answer: Result<Option<peer::AppendResponse>, Status>,
) -> Result<StreamAppendResult<TypeConfig>, Unreachable<TypeConfig>> {
    let answer = answer.map_err(|status| said(&status))?;
    let answer = answer.ok_or_else(|| unreachable("the node has ended the stream"))?;
    if !unanswered.pop() {
        return Err(unreachable("an answer to nothing"));
    }
    from_append_response(answer).map_err(unreachable)
}

impl NetStreamAppend<TypeConfig> for ReplicaClient {
    /// Returns at once; the lane is opened when the answers are first asked for, where openraft can still change its
    /// mind.
    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _option: RPCOption,
    ) -> BoxFuture<'s, Result<Answers<'s>, RPCError<TypeConfig>>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        if self.urgent {
            return Box::pin(async { Ok(self.beat(input).boxed()) });
        }
        let answers = async move {
            // openraft holds its first request back while it is to wait after a failure. Whoever fails without asking for
            // one is called again at once, and never rests.
            let mut input = input.peekable();
            let first = Pin::new(&mut input).peek();
            let first = match self.remote().map(|remote| remote.gone.clone()) {
                Ok(gone) => tokio::select! {
                    biased;
                    () = gone.cancelled() => return Err(unreachable("the node is not there any more").into()),
                    first = first => first,
                },
                Err(_) => first.await,
            };
            if first.is_none() {
                return Ok(futures::stream::empty().boxed());
            }
            let lane = self.open_lane().await?;
            let (home, pace) = (&mut self.idle_lane, Pace::new(self.log.clone()));
            let messages = self.network.inner.messages.clone();
            let session =
                Session { home, lane, input, input_ended: false, unanswered: Unanswered::new(), pace, messages };
            let answers = futures::stream::unfold(Some(session), async |session| session?.next().await);
            Ok::<Answers<'s>, RPCError<TypeConfig>>(answers.boxed())
        };
        Box::pin(async { Ok(futures::stream::once(answers).try_flatten().boxed()) })
    }
}

impl NetVote<TypeConfig> for ReplicaClient {
    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.ask_vote(request, false, option).await
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.ask_vote(request, true, option).await
    }
}

impl NetTransferLeader<TypeConfig> for ReplicaClient {
    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        let request = to_transfer(self.to.clone(), &request);
        self.ask(&option, async move |mut client| client.transfer(request).await).await?;
        Ok(Ok(()))
    }
}

impl NetBackoff<TypeConfig> for ReplicaClient {
    /// As the group's configuration says.
    fn backoff(&self) -> Option<Backoff> {
        None
    }
}

impl NetSnapshot<TypeConfig> for ReplicaClient {
    type SnapshotData = SnapshotData;

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: openraft::alias::SnapshotOf<TypeConfig, SnapshotData>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let SnapshotData::Outgoing(export) = snapshot.snapshot else {
            unreachable!("a snapshot to send is read from the store");
        };
        let header = to_snapshot_header(self.to.clone(), &vote, &snapshot.meta);
        let remote = self.remote()?;
        let mut client = client(&remote.connections()?.snapshots);
        let (parts, receiver) = mpsc::channel(PARTS_AHEAD);
        let exchange = async {
            let answer = std::pin::pin!(client.snapshot(body(receiver)));
            exchange(header, export, parts, answer).await
        };
        // Whatever ends this early, the stream goes without its last part, and the other side forgets it.
        let answer = tokio::select! {
            biased;
            closed = cancel => return Err(closed.into()),
            () = remote.gone.cancelled() => return Err(unreachable("the node is not there any more").into()),
            answer = exchange => answer?,
        };
        let answer = from_vote(answer.vote).map_err(unreachable)?;
        // openraft takes every vote that is not higher for a success.
        if answer != vote && answer.partial_cmp(&vote).is_none_or(Ordering::is_lt) {
            return Err(unreachable(format!("the snapshot of {vote} was answered with {answer}")).into());
        }
        Ok(SnapshotResponse::new(answer))
    }
}

/// Sends the snapshot and waits until it is installed; the answer may come before all of it is sent.
async fn exchange(
    header: peer::SnapshotHeader,
    export: Export,
    parts: mpsc::Sender<peer::SnapshotRequest>,
    mut answer: impl Future<Output = Result<Response<peer::SnapshotResponse>, Status>> + Unpin,
) -> Result<peer::SnapshotResponse, StreamingError<TypeConfig>> {
    let early = tokio::select! {
        biased;
        early = &mut answer => Some(early),
        sent = send_parts(header, export, parts) => {
            sent?;
            None
        }
    };
    let answer = match early {
        Some(early) => early,
        None => {
            let answer = timeout(INSTALL_WITHIN, answer).await;
            answer.map_err(|_| unreachable("the snapshot is sent, but not installed"))?
        }
    };
    Ok(answer.map_err(|status| said(&status))?.into_inner())
}

async fn send_parts(
    header: peer::SnapshotHeader,
    mut export: Export,
    parts: mpsc::Sender<peer::SnapshotRequest>,
) -> Result<(), StreamingError<TypeConfig>> {
    send_part(&parts, Part::Header(header)).await?;
    let mut sent = 0;
    while let Some(chunk) = export.chunks.recv().await {
        let rows = chunk.map_err(read_failed)?;
        sent += rows.len() as u64;
        let (keys, values) = rows.into_iter().map(|(key, value)| (key.into(), value.into())).unzip();
        if !send_part(&parts, Part::Rows(peer::SnapshotRows { keys, values })).await? {
            return Ok(());
        }
    }
    send_part(&parts, Part::End(peer::SnapshotEnd { rows: sent })).await?;
    Ok(())
}

/// False when the call is over; its answer says why.
async fn send_part(parts: &mpsc::Sender<peer::SnapshotRequest>, part: Part) -> Result<bool, Unreachable<TypeConfig>> {
    let request = peer::SnapshotRequest { part: Some(part) };
    let sent = timeout(SNAPSHOT_STALLED_AFTER, parts.send(request)).await;
    let stalled = |_| unreachable(format!("nothing of the snapshot was taken for {SNAPSHOT_STALLED_AFTER:?}"));
    sent.map(|sent| sent.is_ok()).map_err(stalled)
}

fn read_failed(error: StoreError) -> StreamingError<TypeConfig> {
    StorageError::read_snapshot(None, ErrorSource::from_error(&error)).into()
}
