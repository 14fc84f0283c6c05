//! What this node's replicas hear from those on other nodes.
//!
//! A message names cluster, group and replica, and is refused unless all three are held here: replica ids are never
//! reused, so an answer from the wrong one could count as a vote or an acknowledgement that was never given. What
//! openraft would assert about a message is checked before it is handed over: a peer may be wrong, and no group panics.
//!
//! A snapshot is first put into files next to the database, where it has no effect, and handed to openraft when it is
//! whole; a stream that ends early takes its files with it.
//!
//! ```text
//!   header --> vote and log id fit? --> rows --> staging/g3-2-7/ --> end, rows counted --> install, one short step
//! ```
//!
//! Whoever speaks to it has shown by then that it is a node of this cluster: see `peer_credentials`.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::{Stream, StreamExt};
use openraft::raft::{StreamAppendError, StreamAppendResult, VoteResponse};
use openraft::rt::WatchReceiver as _;
use openraft::storage::Snapshot;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Router;
use tonic::{Request, Response, Status, Streaming};

use super::dial::Wire;
use super::groups::{Group, Groups};
use super::pacer;
use super::peer_credentials::{PeerCredentials, incoming};
use super::peer_messages::{
    MESSAGE_BYTES_MAX, Malformed, from_append, from_snapshot_header, from_transfer, from_vote_request,
    to_append_response, to_vote, to_vote_response,
};
use super::state_machine::SnapshotData;
use super::types::{LogId, Raft, SnapshotMeta, TypeConfig, Vote};
use crate::blocking;
use crate::store::export::{Staged, Staging};
use crate::store::keys::Key;
use crate::store::rows::Applied;
use crate::store::{Row, StoreError, codec};
use crate::task::GroupId;
use crate::task::locks::Mutex;
use crate::wire::peer;
use crate::wire::peer::peer_server::{Peer, PeerServer};
use crate::wire::peer::snapshot_request::Part;

/// What one stream may have on its way to us: more than a message of entries usually takes.
const STREAM_WINDOW_BYTES: u32 = 2 * 1024 * 1024;
/// What all streams of a connection may have on their way: groups that do not read for a while must not fill it, or
/// they hold up all others.
const CONNECTION_WINDOW_BYTES: u32 = 64 * 1024 * 1024;
/// Below the time between two heartbeats.
const BEAT_WITHIN: Duration = Duration::from_millis(100);
/// Two lanes per group, and every group a cluster can have. Above it, streams would wait without an end.
const STREAMS_PER_CONNECTION_MAX: u32 = 16 * 1024;
const KEEPALIVE_EVERY: Duration = Duration::from_secs(5);
const KEEPALIVE_WITHIN: Duration = Duration::from_secs(5);

/// Snapshots received at a time: more would only share the disk.
const SNAPSHOTS_AT_A_TIME: usize = 4;
/// A snapshot of which nothing comes for this long is given up.
const SNAPSHOT_STALLED_AFTER: Duration = Duration::from_secs(20);

/// Streams end at once when the node stops; what is left after this is a peer that does not read.
const STOP_WITHIN: Duration = Duration::from_secs(2);

/// The server side of the peer network; cheap to clone.
#[derive(Clone)]
pub struct PeerService {
    inner: Arc<ServiceInner>,
}

struct ServiceInner {
    groups: Groups,
    /// Where snapshots are read: they are as large as shards.
    work: Handle,
    snapshots: Semaphore,
    /// Makes the names of staging folders differ.
    staged: AtomicU64,
    stopping: CancellationToken,
}

/// Serves peers on `listener` until `shutdown` resolves, and `others`, what is not Raft, beside them. A service stops
/// once: serve again with a new one.
pub async fn serve(
    listener: TcpListener,
    service: PeerService,
    others: Routes,
    credentials: PeerCredentials,
    shutdown: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let stopping = service.inner.stopping.clone();
    let stop = async {
        shutdown.await;
        // Without this the long streams would hold the server open for ever.
        stopping.cancel();
    };
    let mut wires = incoming(listener, credentials);
    let wires = futures::stream::poll_fn(move |context| wires.poll_recv(context)).map(Ok::<Wire, std::io::Error>);
    let server = server(service, others).serve_with_incoming_shutdown(wires, stop);
    let late = async {
        stopping.cancelled().await;
        tokio::time::sleep(STOP_WITHIN).await;
    };
    tokio::select! {
        served = server => served,
        () = late => Ok(()),
    }
}

/// The same on connections that come another way, until it is dropped.
pub async fn serve_wires(
    wires: impl Stream<Item = Wire> + Send + 'static,
    service: PeerService,
    others: Routes,
) -> Result<(), tonic::transport::Error> {
    server(service, others).serve_with_incoming(wires.map(Ok::<Wire, std::io::Error>)).await
}

fn server(service: PeerService, others: Routes) -> Router {
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_EVERY))
        .http2_keepalive_timeout(Some(KEEPALIVE_WITHIN))
        .add_routes(others)
        .add_service(PeerServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX))
}

fn stopped() -> Status {
    Status::unavailable("this node is stopping")
}

/// The group's task has ended. It is built again, or the node stops; either way the peer tries later.
fn fatal(error: impl std::fmt::Display) -> Status {
    Status::unavailable(format!("the group is not running: {error}"))
}

impl PeerService {
    /// Snapshots are read on the runtime this is made on; the rest is done on the one that serves it.
    pub fn new(groups: Groups) -> Self {
        let inner = ServiceInner {
            groups,
            work: Handle::current(),
            snapshots: Semaphore::new(SNAPSHOTS_AT_A_TIME),
            staged: AtomicU64::new(0),
            stopping: CancellationToken::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The replica that is meant, or why it is not here.
    fn find(&self, to: Option<&peer::Address>) -> Result<Group, Status> {
        let to = to.ok_or_else(|| Malformed::new("to", "is missing"))?;
        let parts = self.inner.groups.parts();
        if to.cluster != parts.cluster {
            let why = format!("this node belongs to cluster '{}', not '{}'", parts.cluster, to.cluster);
            return Err(Status::failed_precondition(why));
        }
        let id = u16::try_from(to.group).map(GroupId).ok();
        let group = id.and_then(|id| self.inner.groups.get(id));
        let group = group
            .ok_or_else(|| Status::not_found(format!("node {} holds nothing of group {}", parts.node_id, to.group)))?;
        if group.replica != to.replica {
            let why =
                format!("node {} holds replica {} of {}, not {}", parts.node_id, group.replica, group.id, to.replica);
            return Err(Status::failed_precondition(why));
        }
        Ok(group)
    }
}

/// Whether this came from whoever leads the group.
fn is_from_leader(answer: &Result<StreamAppendResult<TypeConfig>, Status>) -> bool {
    !matches!(answer, Ok(Err(StreamAppendError::HigherVote(_))) | Err(_))
}

/// What openraft answers while its own lease lasts: no vote, and nothing has changed.
fn not_granted(group: &Group) -> peer::VoteResponse {
    let receiver = group.raft.metrics();
    let metrics = receiver.borrow_watched();
    to_vote_response(&VoteResponse::new(metrics.vote, metrics.last_applied, false))
}

/// A leader that gets its own message back would take itself for its follower.
fn not_own(group: &Group, vote: &Vote) -> Result<(), Malformed> {
    if vote.leader_id.voted_for == group.replica {
        return Err(Malformed::new("vote", "is that of the replica it is sent to"));
    }
    Ok(())
}

#[tonic::async_trait]
impl Peer for PeerService {
    async fn vote(&self, request: Request<peer::VoteRequest>) -> Result<Response<peer::VoteResponse>, Status> {
        let request = request.into_inner();
        let group = self.find(request.to.as_ref())?;
        let pre_vote = request.pre_vote;
        let request = from_vote_request(request)?;
        not_own(&group, &request.vote)?;
        // openraft knows nothing of a promise made before the start.
        if !request.leadership_transfer && group.bound_until.is_some_and(|until| Instant::now() < until) {
            return Err(Status::unavailable("this replica has just started and may be bound to its leader still"));
        }
        // A leader is sure of itself by the promises of others, of which openraft knows nothing.
        if !request.leadership_transfer && group.leads(Duration::ZERO).is_some() {
            return Ok(Response::new(not_granted(&group)));
        }
        let asking = match request.leadership_transfer {
            true => Some(group.promise.ask_in_transfer()),
            false => group.promise.ask(),
        };
        let Some(asking) = asking else { return Ok(Response::new(not_granted(&group))) };
        // To its end, also when nobody waits for the answer any more: until then no promise may be made.
        let answered = tokio::spawn(async move {
            let answer = if pre_vote { group.raft.pre_vote(request).await } else { group.raft.vote(request).await };
            if answer.as_ref().is_ok_and(|answer| answer.vote_granted && !pre_vote) {
                group.promise.note_vote();
            }
            drop(asking);
            answer
        });
        let answer = answered.await.map_err(|error| Status::internal(error.to_string()))?.map_err(fatal)?;
        Ok(Response::new(to_vote_response(&answer)))
    }

    /// Asks no group: each may be busy.
    async fn bind(&self, request: Request<peer::BindRequest>) -> Result<Response<peer::BindResponse>, Status> {
        let request = request.into_inner();
        let parts = self.inner.groups.parts();
        if request.cluster != parts.cluster {
            let why = format!("this node belongs to cluster '{}', not '{}'", parts.cluster, request.cluster);
            return Err(Status::failed_precondition(why));
        }
        let promised = request.binds.into_iter().map(|bind| {
            let group = u16::try_from(bind.group).ok().and_then(|id| self.inner.groups.get(GroupId(id)));
            // After a start it may be bound to another one, and does not know.
            let free = |group: &Group| group.bound_until.is_none_or(|until| Instant::now() >= until);
            let group = group.filter(|group| group.replica == bind.replica && free(group));
            group.is_some_and(|group| group.promise.bind(bind.term))
        });
        Ok(Response::new(peer::BindResponse { promised: promised.collect() }))
    }

    type AppendStream = futures::stream::BoxStream<'static, Result<peer::AppendResponse, Status>>;

    /// Answers with an open stream at once: the first request, which says for whom it is, may come later.
    async fn append(
        &self,
        requests: Request<Streaming<peer::AppendRequest>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        let service = self.clone();
        let stopping = self.inner.stopping.clone();
        let answers = futures::stream::once(service.start_append(requests.into_inner())).flat_map(|started| {
            let answers: Self::AppendStream = match started {
                Ok(answers) => answers.boxed(),
                Err(status) => futures::stream::once(async { Err(status) }).boxed(),
            };
            answers
        });
        let stop = async move { stopping.cancelled().await };
        let answers = answers.take_until(Box::pin(stop));
        Ok(Response::new(answers.boxed()))
    }

    /// All groups at once: none waits for another.
    async fn beat(&self, request: Request<peer::BeatRequest>) -> Result<Response<peer::BeatResponse>, Status> {
        let beats = request.into_inner().requests.into_iter().map(|request| async move {
            let result = match self.beat_one(request).await {
                Ok(answer) => peer::beat_answer::Result::Answer(answer),
                Err(status) => peer::beat_answer::Result::Refused(status.message().to_owned()),
            };
            peer::BeatAnswer { result: Some(result) }
        });
        Ok(Response::new(peer::BeatResponse { answers: futures::future::join_all(beats).await }))
    }

    async fn transfer(
        &self,
        request: Request<peer::TransferRequest>,
    ) -> Result<Response<peer::TransferResponse>, Status> {
        let request = request.into_inner();
        let group = self.find(request.to.as_ref())?;
        let request = from_transfer(request)?;
        not_own(&group, request.from_leader())?;
        if !group.may_lead() {
            return Err(Status::failed_precondition("this node's clock is wrong; it leads nothing"));
        }
        // To its end, also when nobody waits for the answer any more.
        let transferred = tokio::spawn(async move {
            let stands = request.to_node_id() == &group.replica;
            if stands {
                // At once, past what it has promised.
                group.promise.stand_in_transfer();
            }
            let transferred = group.raft.handle_transfer_leader(request).await;
            if stands {
                pacer::stood(group);
            }
            transferred
        });
        let transferred = transferred.await.map_err(|error| Status::internal(error.to_string()))?;
        match transferred.map_err(fatal)? {
            Ok(()) => Ok(Response::new(peer::TransferResponse {})),
            Err(refused) => Err(Status::failed_precondition(refused.to_string())),
        }
    }

    async fn snapshot(
        &self,
        request: Request<Streaming<peer::SnapshotRequest>>,
    ) -> Result<Response<peer::SnapshotResponse>, Status> {
        let service = self.clone();
        let receiving = self.inner.work.spawn(async move { service.receive(request.into_inner()).await });
        tokio::select! {
            biased;
            answer = AbortOnDropHandle::new(receiving) => {
                answer.map_err(|error| Status::internal(error.to_string()))?.map(Response::new)
            }
            () = self.inner.stopping.cancelled() => Err(stopped()),
        }
    }
}

impl PeerService {
    async fn beat_one(&self, request: peer::AppendRequest) -> Result<peer::AppendResponse, Status> {
        let group = self.find(request.to.as_ref())?;
        let request = from_append(request)?;
        not_own(&group, &request.vote)?;
        let stand = group.promise.stand_before();
        let answer = async {
            let mut answers = pin!(group.raft.stream_append(futures::stream::iter([request])));
            answers.next().await
        };
        // A group that takes its time must not cost the others their lease.
        let answer = timeout(BEAT_WITHIN, answer).await.map_err(|_| Status::unavailable("the group is busy"))?;
        let answer = answer.ok_or_else(|| Status::unavailable("the group is not running"))?.map_err(fatal);
        if is_from_leader(&answer) {
            group.promise.note_leader(stand);
        }
        answer.map(to_append_response)
    }

    async fn start_append(
        self,
        mut requests: Streaming<peer::AppendRequest>,
    ) -> Result<impl Stream<Item = Result<peer::AppendResponse, Status>> + Send + 'static, Status> {
        let first = requests.message().await?;
        let first = first.ok_or_else(|| Status::invalid_argument("the stream has ended before it has begun"))?;
        let group = self.find(first.to.as_ref())?;

        // openraft takes requests only, no errors: one that is wrong ends them, and is told after the last answer.
        let wrong = Arc::new(OnceLock::new());
        let told = wrong.clone();
        let raft = group.raft.clone();
        let promise = group.promise.clone();
        // In the order of the requests, which is that of the answers.
        let stands = Arc::new(Mutex::new(VecDeque::new()));
        let stood = stands.clone();
        let requests = futures::stream::once(async { Ok(first) }).chain(requests).scan((), move |(), request| {
            let checked = request.and_then(|request| {
                let request = from_append(request)?;
                not_own(&group, &request.vote)?;
                stands.lock().push_back(group.promise.stand_before());
                Ok(request)
            });
            let checked = checked.map_err(|status| told.set(status)).ok();
            std::future::ready(checked)
        });
        // A task of openraft's reads the requests; it must not outlive the answers.
        let over = CancellationToken::new();
        let guard = over.clone().drop_guard();
        let requests = requests.take_until(Box::pin(async move { over.cancelled().await }));

        // openraft's answers borrow the handle they come from, which has to live beside them: this future holds both,
        // and is polled by whoever asks for the answers.
        let (out, mut ready) = mpsc::channel(1);
        let forward = async move {
            let _ends_with_the_answers = guard;
            let mut answers = pin!(raft.stream_append(requests));
            while let Some(answer) = answers.next().await {
                let answer = answer.map_err(fatal);
                let before = stood.lock().pop_front();
                if let Some(before) = before.filter(|_| is_from_leader(&answer)) {
                    promise.note_leader(before);
                }
                let answer = answer.map(to_append_response);
                if out.send(answer).await.is_err() {
                    return;
                }
            }
            if let Some(status) = wrong.get() {
                let _ = out.send(Err(status.clone())).await;
            }
        };
        let ready = futures::stream::poll_fn(move |context| ready.poll_recv(context));
        let forward = futures::stream::once(forward).filter_map(|()| std::future::ready(None));
        Ok(futures::stream::select(ready, forward))
    }

    async fn receive(&self, mut parts: Streaming<peer::SnapshotRequest>) -> Result<peer::SnapshotResponse, Status> {
        let Some(Part::Header(header)) = next_part(&mut parts).await? else {
            return Err(Status::invalid_argument("a snapshot begins with its header"));
        };
        let group = self.find(header.to.as_ref())?;
        let (vote, meta) = from_snapshot_header(header)?;
        not_own(&group, &vote)?;
        // Now, so that nothing is sent in vain, and again before it counts.
        if let Some(vote) = overruled(&group.raft, vote, &meta).await? {
            return Ok(vote);
        }
        let _turn = self.inner.snapshots.try_acquire().map_err(|_| {
            Status::resource_exhausted(format!("{SNAPSHOTS_AT_A_TIME} snapshots are on their way here"))
        })?;
        let staged = self.stage(&group, &meta, &mut parts).await?;
        if let Some(vote) = overruled(&group.raft, vote, &meta).await? {
            return Ok(vote);
        }
        tracing::info!(group = %group.id, last = ?meta.last_log_id, "a snapshot is here");
        let snapshot = Snapshot { meta, snapshot: SnapshotData::Staged(staged) };
        let answer = group.raft.install_full_snapshot(vote, snapshot).await.map_err(fatal)?;
        Ok(peer::SnapshotResponse { vote: Some(to_vote(&answer.vote)) })
    }

    /// All rows of a snapshot, in files.
    async fn stage(
        &self,
        group: &Group,
        meta: &SnapshotMeta,
        parts: &mut Streaming<peer::SnapshotRequest>,
    ) -> Result<Staged, Status> {
        let id = group.id;
        let number = self.inner.staged.fetch_add(1, Ordering::Relaxed);
        let folder: PathBuf = self.inner.groups.parts().staging.join(format!("{id}-{}-{number}", group.replica));
        let store = self.inner.groups.parts().store.clone();
        let mut staging = on_disk(move || Staging::begin(&store, id, folder)).await?;
        let mut received = 0;
        let mut applied = None;
        let announced = loop {
            match next_part(parts).await? {
                Some(Part::Rows(rows)) => {
                    let rows = paired(rows)?;
                    received += rows.len() as u64;
                    applied = applied.or(find_applied(id, &rows)?);
                    staging = on_disk(move || staging.add(&rows).map(|()| staging)).await?;
                }
                Some(Part::End(end)) => break end.rows,
                Some(Part::Header(_)) => return Err(Status::invalid_argument("a second header")),
                None => return Err(Status::aborted("the snapshot was cut off; nothing of it is kept")),
            }
        };
        if received != announced {
            return Err(Status::data_loss(format!("{announced} rows were announced and {received} came")));
        }
        // The state machine would find this out too, but only after the old state is gone.
        if applied != meta.last_log_id {
            let why = format!("it should hold what was applied up to {:?} and holds {applied:?}", meta.last_log_id);
            return Err(Status::data_loss(why));
        }
        on_disk(move || staging.finish()).await
    }
}

/// What answers the snapshot without it: a vote higher than its leader's, or that all of it is here already.
///
/// A snapshot that contradicts what is committed here is refused: openraft would panic.
async fn overruled(raft: &Raft, vote: Vote, meta: &SnapshotMeta) -> Result<Option<peer::SnapshotResponse>, Status> {
    let here = raft.with_raft_state(|state| (*state.vote_ref(), state.local_committed().copied()));
    let (known, committed) = here.await.map_err(fatal)?;
    let answer = |vote| Ok(Some(peer::SnapshotResponse { vote: Some(to_vote(&vote)) }));
    if vote.partial_cmp(&known).is_none_or(std::cmp::Ordering::is_lt) {
        return answer(known);
    }
    let (Some(committed), Some(last)) = (committed, meta.last_log_id) else { return Ok(None) };
    if last > committed && last.index <= committed.index {
        let why = format!("a snapshot up to {last} contradicts {committed}, which is committed here");
        return Err(Status::failed_precondition(why));
    }
    // Nothing is installed then, and openraft does not look at the rows.
    if last <= committed {
        let snapshot = Snapshot { meta: meta.clone(), snapshot: SnapshotData::Marker };
        return answer(raft.install_full_snapshot(vote, snapshot).await.map_err(fatal)?.vote);
    }
    Ok(None)
}

async fn next_part(parts: &mut Streaming<peer::SnapshotRequest>) -> Result<Option<Part>, Status> {
    let message = timeout(SNAPSHOT_STALLED_AFTER, parts.message()).await;
    let message = message.map_err(|_| Status::deadline_exceeded("nothing more of the snapshot comes"))??;
    match message {
        Some(message) => message.part.map(Some).ok_or_else(|| Malformed::new("part", "is missing").into()),
        None => Ok(None),
    }
}

fn paired(rows: peer::SnapshotRows) -> Result<Vec<Row>, Malformed> {
    let peer::SnapshotRows { keys, values } = rows;
    if keys.len() != values.len() {
        return Err(Malformed::new("rows", format!("{} keys and {} values", keys.len(), values.len())));
    }
    Ok(keys.into_iter().zip(values).map(|(key, value)| (key.into(), value.into())).collect())
}

/// What the rows say was applied, if that row is among them.
fn find_applied(group: GroupId, rows: &[Row]) -> Result<Option<LogId>, Status> {
    let key = Key::applied(group);
    let found = rows.binary_search_by(|(found, _)| found.as_slice().cmp(key.as_ref()));
    let Ok(position) = found else { return Ok(None) };
    let applied: Applied = codec::decode("last applied", &rows[position].1).map_err(|error| in_store(&error))?;
    Ok(Some(applied.into()))
}

/// Blocking work on files, where it holds nobody up.
async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Status> {
    let done = blocking::aside(work).await;
    done.map_err(|error| Status::internal(format!("staging a snapshot: {error}")))?.map_err(|error| in_store(&error))
}

fn in_store(error: &StoreError) -> Status {
    match error {
        StoreError::Damaged { .. } => Status::data_loss(error.to_string()),
        _ => Status::internal(error.to_string()),
    }
}
