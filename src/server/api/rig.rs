//! A node for tests of operations: the real rooms on a disk in memory, without sockets and in a time that passes by itself.
//!
//! It holds the cluster's own group and shard 0, and leads them. Shard 1 is another node's, which is not there, or says what
//! it is told to.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use futures::stream;
use openraft::rt::WatchReceiver as _;
use prost::Message;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tonic::transport::Server;

use super::operation::Operation;
use crate::callback::{CallbackSettings, Callbacks, Carrier};
use crate::clock::Clock;
use crate::firing::FiringSettings;
use crate::metrics::Metrics;
use crate::node::assembly::{Foundation, NodeParts, Rooms};
use crate::placement::verify::Marks;
use crate::placement::{Control, LeaderAt, NodeInfo};
use crate::propose::DiskState;
use crate::raft::dial::{Dial, Wire};
use crate::raft::groups::Begin;
use crate::raft::{Observer, PeerNetwork};
use crate::server::Service;
use crate::server::access::auth::{Auth, AuthError, Identity};
use crate::server::access::sessions::{Ending, Session, Sessions};
use crate::server::problem::Problem;
use crate::server::readers::Readers;
use crate::server::routing::Router;
use crate::server::routing::forward::envelope;
use crate::shard::Effect;
use crate::store::memory::MemoryDisk;
use crate::store::rows::ShardMetaRow;
use crate::store::syncer::Rounds;
use crate::store::writer::Writer;
use crate::task::locks::Mutex;
use crate::task::{
    ClientId, ClientLimits, Delivery, Failure, FailureClass, GroupId, InstantMs, Limits, ShardId, TaskId,
};
use crate::wire::convert::policy_over;
use crate::wire::peer::requests_server::{Requests, RequestsServer};
use crate::wire::peer::{self, forward_response};
use crate::wire::problems::Code;
use crate::wire::proto::boomerang_envelope::Payload;
use crate::wire::proto::{self, CallbackConfig, RetryPolicy};

pub const HERE: ShardId = ShardId(0);
pub const ELSEWHERE: ShardId = ShardId(1);
pub const HOUR_MS: u64 = 3_600_000;
const SHARDS: u16 = 2;
/// Why the disk takes nothing.
pub const DISK: &str = "the disk of this test is full";
/// Nothing takes so long, in the time of the runtime.
const LONG: Duration = Duration::from_secs(600);
const BEGAN_MS: InstantMs = 1_800_000_000_000;

/// The time of the runtime, which stands still while there is something to do, and jumps to the next timer when there is
/// not.
struct RuntimeClock(Instant);

impl Clock for RuntimeClock {
    fn now_us(&self) -> u64 {
        BEGAN_MS * 1000 + u64::try_from(self.0.elapsed().as_micros()).expect("a test is short")
    }
}

/// What becomes of attempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Receivers {
    Accept,
    Refuse,
    /// They take it, and never answer.
    Hang,
}

struct Delivered(watch::Receiver<Receivers>, watch::Sender<u64>);

impl Carrier for Delivered {
    fn carry(&self, _: Delivery, within: Duration) -> BoxFuture<'static, Result<(), Failure>> {
        let receivers = *self.0.borrow();
        self.1.send_modify(|count| *count += 1);
        async move {
            match receivers {
                Receivers::Accept => Ok(()),
                Receivers::Refuse => Err(Failure::new(FailureClass::BadStatus, "no")),
                Receivers::Hang => {
                    tokio::time::sleep(within).await;
                    Err(Failure::new(FailureClass::Timeout, "no answer in time"))
                }
            }
        }
        .boxed()
    }
}

/// Tells that something was applied.
struct Applied(watch::Sender<()>);

impl Observer for Applied {
    fn applied(&self, _: GroupId, _: &ShardMetaRow, _: &[Effect]) {
        self.0.send_replace(());
    }

    fn replaced(&self, _: GroupId) {}
}

/// What the other node says to a request.
pub enum Says {
    /// The answer to it.
    Answer(Box<Payload>),
    /// That it does not lead.
    Elsewhere,
    /// Nothing: it may have done it.
    Nothing,
}

impl Says {
    pub fn answer(payload: Payload) -> Self {
        Says::Answer(Box::new(payload))
    }
}

/// The other node; cheap to clone.
#[derive(Clone)]
pub struct Other {
    says: Arc<Mutex<VecDeque<Says>>>,
    asked: Arc<Mutex<Vec<Payload>>>,
}

impl Other {
    /// All that it was asked.
    pub fn asked(&self) -> Vec<Payload> {
        self.asked.lock().clone()
    }
}

#[tonic::async_trait]
impl Requests for Other {
    async fn forward(
        &self,
        request: tonic::Request<peer::ForwardRequest>,
    ) -> Result<tonic::Response<peer::ForwardResponse>, tonic::Status> {
        let asked = proto::BoomerangEnvelope::decode(request.into_inner().envelope).unwrap().payload.unwrap();
        self.asked.lock().push(asked);
        let says = self.says.lock().pop_front();
        let result = match says.expect("it is asked no more than it has to say") {
            Says::Answer(payload) => forward_response::Result::Envelope(envelope(*payload)),
            Says::Elsewhere => forward_response::Result::Elsewhere(peer::Elsewhere::default()),
            Says::Nothing => return Err(tonic::Status::internal("it died")),
        };
        Ok(tonic::Response::new(peer::ForwardResponse { result: Some(result) }))
    }

    async fn list_part(
        &self,
        _: tonic::Request<peer::PartRequest>,
    ) -> Result<tonic::Response<peer::PartResponse>, tonic::Status> {
        Err(tonic::Status::unimplemented("nobody asks for parts here"))
    }

    async fn identify(
        &self,
        _: tonic::Request<peer::IdentifyRequest>,
    ) -> Result<tonic::Response<peer::IdentifyResponse>, tonic::Status> {
        Err(tonic::Status::unimplemented("nobody asks who it is here"))
    }
}

/// Connections to the other node, whichever address it has.
struct ToOther(mpsc::UnboundedSender<Wire>);

impl Dial for ToOther {
    fn dial(&self, _: u64, _: &str) -> BoxFuture<'static, io::Result<Wire>> {
        let (here, there) = tokio::io::duplex(64 * 1024);
        let dialed = self.0.send(Wire::new(there)).map_err(|_| io::Error::other("the test is over"));
        async move { dialed.map(|()| Wire::new(here)) }.boxed()
    }
}

pub struct Rig {
    pub service: Arc<Service>,
    receivers: watch::Sender<Receivers>,
    attempts: watch::Receiver<u64>,
    applied: watch::Receiver<()>,
    disk: watch::Sender<DiskState>,
    syncs: watch::Sender<bool>,
    syncing: AbortHandle,
    /// Connections to the other node.
    wires: Mutex<Option<mpsc::UnboundedReceiver<Wire>>>,
    _rooms: Mutex<Rooms>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.syncing.abort();
    }
}

/// Syncs at once, unless the disk hangs.
async fn sync(rounds: Rounds, mut syncs: watch::Receiver<bool>) {
    loop {
        rounds.arrived().await;
        if syncs.wait_for(|syncs| *syncs).await.is_err() {
            return;
        }
        rounds.round();
    }
}

impl Rig {
    /// Whose API key this is.
    pub async fn identity_of(&self, key: &str) -> Result<Identity, AuthError> {
        let handshake = proto::AuthHandshake { token: key.to_owned(), ..Default::default() };
        let nobody = |_| None::<std::future::Ready<_>>;
        let found = self.service.auth.identify(&handshake, [10, 0, 0, 1].into(), 0, nobody).await;
        found.map(|(identity, _)| identity)
    }

    pub async fn start() -> Self {
        let store = MemoryDisk::default().open();
        let (dialed, wires) = mpsc::unbounded_channel();
        let (writer, rounds) = Writer::by_hand(store.clone());
        let (syncs, may_sync) = watch::channel(true);
        let syncing = tokio::spawn(sync(rounds, may_sync)).abort_handle();
        let clock = Arc::new(RuntimeClock(Instant::now()));
        let metrics = Arc::new(Metrics::new());
        let sessions = Arc::new(Sessions::new(HOUR_MS, 1_000));
        let firing = FiringSettings::default();
        let (tells, applied) = watch::channel(());
        let ending: Arc<dyn Observer> = Arc::new(Ending { sessions: sessions.clone(), store: store.clone() });
        let foundation = Foundation::lay(NodeParts {
            cluster: "test".into(),
            node_id: 1,
            shards: SHARDS,
            store: store.clone(),
            writer,
            // Nothing is put there.
            staging: PathBuf::from("no-folder"),
            clock: clock.clone(),
            network: PeerNetwork::new("test", 1, Arc::new(ToOther(dialed))),
            firing,
            metrics: metrics.clone(),
            observers: vec![ending, Arc::new(Applied(tells))],
        });
        let foundation = foundation.await.unwrap();
        let cluster = foundation.cluster.clone();
        cluster.set_node(NodeInfo::at(1, "here"));
        for group in [GroupId::CLUSTER, GroupId::of_shard(HERE)] {
            let group = foundation.groups.host(group, Begin::Alone).await.unwrap();
            let mut metrics = group.raft.metrics();
            while group.leads(Duration::ZERO).is_none() {
                metrics.changed().await.unwrap();
            }
        }
        let (receivers, theirs) = watch::channel(Receivers::Accept);
        let (made, attempts) = watch::channel(0);
        let callbacks = Callbacks::carried(CallbackSettings::default(), Arc::new(Delivered(theirs, made)));
        let (disk, state) = watch::channel(DiskState::Fine);
        let rooms = foundation.build(state, callbacks);
        let service = Arc::new(Service {
            readers: Readers::new(Handle::current(), 1),
            clock,
            proposer: rooms.proposer.clone(),
            dispatches: rooms.ledger.clone(),
            history_ms: firing.history_ms,
            sessions,
            router: Router::new(cluster.clone(), SHARDS),
            auth: Auth::new(store.clone(), false),
            metrics,
            limits: Limits::default(),
            frame_bytes_max: crate::wire::FRAME_BYTES_MAX,
            shards: SHARDS,
            cluster,
            digests: Marks::new(store.clone()),
            control: Control::Alone,
            store,
        });
        let wires = Mutex::new(Some(wires));
        Self { service, receivers, attempts, applied, disk, syncs, syncing, wires, _rooms: Mutex::new(rooms) }
    }

    /// From here on there is another node, and this one is not alone.
    pub fn with_another_node(self) -> Self {
        self.service.cluster.set_node(NodeInfo::at(2, "nowhere"));
        self
    }

    /// The other node leads shard 1, and says this, one after the other, to what it is asked on behalf of clients.
    pub fn with_leader_elsewhere(self, says: impl IntoIterator<Item = Says>) -> (Self, Other) {
        let rig = self.with_another_node();
        rig.service.cluster.told(GroupId::of_shard(ELSEWHERE), LeaderAt { node_id: 2, term: 1 });
        let other = Other { says: Arc::new(Mutex::new(says.into_iter().collect())), asked: Arc::default() };
        let wires = rig.wires.lock().take().expect("there is one other node");
        let wires = stream::unfold(wires, async |mut wires| {
            let wire = wires.recv().await?;
            Some((Ok::<_, io::Error>(wire), wires))
        });
        let serving = Server::builder().add_service(RequestsServer::new(other.clone())).serve_with_incoming(wires);
        tokio::spawn(serving);
        (rig, other)
    }

    pub fn admin(&self) -> Arc<Session> {
        session("admin", true)
    }

    /// A client with a policy of its own.
    pub fn client(&self) -> Arc<Session> {
        session("orders", false)
    }

    /// The same client, which does not follow redirects.
    pub fn follows_nobody(&self) -> Arc<Session> {
        let mut session = session("orders", false);
        Arc::get_mut(&mut session).expect("nobody else has it").redirects = false;
        session
    }

    /// A client that has nothing to do with the other one.
    pub fn stranger(&self) -> Arc<Session> {
        session("stranger", false)
    }

    pub fn set_receivers(&self, receivers: Receivers) {
        self.receivers.send_replace(receivers);
    }

    /// Waits until attempts have been made, so many in all.
    pub async fn attempted(&self, count: u64) {
        let mut attempts = self.attempts.clone();
        let made = attempts.wait_for(|made| *made >= count);
        tokio::time::timeout(LONG, made).await.expect("it is attempted").unwrap();
    }

    /// New work is refused from here on.
    pub fn let_disk_run_low(&self) {
        self.disk.send_replace(DiskState::Low(DISK.into()));
    }

    /// Everything is refused from here on.
    pub fn let_disk_run_full(&self) {
        self.disk.send_replace(DiskState::Full(DISK.into()));
    }

    /// There is room again.
    pub fn let_disk_be(&self) {
        self.disk.send_replace(DiskState::Fine);
    }

    /// From here on nothing reaches the disk, and nobody hears of it.
    pub fn hang_disk(&self) {
        self.syncs.send_replace(false);
    }

    /// Asks as whoever is connected asks.
    pub async fn ask<O: Operation>(&self, session: &Arc<Session>, request: O) -> Result<O::Answer, Problem> {
        let (out, answer) = oneshot::channel();
        let respond = Box::new(move |answer| {
            let _ = out.send(answer);
        });
        super::ask(&self.service, session.clone(), request, respond).await;
        answer.await.expect("every request is answered")
    }

    /// The code it is refused with.
    pub async fn refusal<O: Operation<Answer: std::fmt::Debug>>(&self, session: &Arc<Session>, request: O) -> Problem {
        self.ask(session, request).await.expect_err("it is to be refused")
    }

    /// Registers a task that is due in an hour, and returns its id.
    pub async fn register(&self) -> String {
        self.ask(&self.client(), in_an_hour()).await.unwrap().task_id
    }

    /// Registers a task and returns its id when its first attempt is out.
    pub async fn register_and_send(&self, receivers: Receivers) -> String {
        self.set_receivers(receivers);
        let before = *self.attempts.borrow();
        let registered = self.ask(&self.client(), proto::Task { delay_ms: 1, ..in_an_hour() }).await.unwrap();
        self.attempted(before + 1).await;
        registered.task_id
    }

    /// Has a task of the client die, and returns the id of its dead letter.
    pub async fn bury(&self) -> String {
        let died = self.letters().await.len() + 1;
        let mut applied = self.applied.clone();
        self.register_and_send(Receivers::Refuse).await;
        loop {
            // Before the look: what is applied during it is not missed.
            applied.mark_unchanged();
            let letters = self.letters().await;
            if letters.len() >= died {
                return letters.last().unwrap().dead_letter_id.clone();
            }
            tokio::time::timeout(LONG, applied.changed()).await.expect("it dies").unwrap();
        }
    }

    pub async fn letters(&self) -> Vec<proto::DeadLetter> {
        let request = proto::ListDeadLettersRequest::default();
        self.ask(&self.client(), request).await.unwrap().dead_letters
    }
}

fn session(name: &str, admin: bool) -> Arc<Session> {
    let client: ClientId = name.parse().unwrap();
    let callback = CallbackConfig { endpoint: "127.0.0.1:9".into(), ..Default::default() };
    let retry = RetryPolicy { max_attempts: 1, interval_ms: 1_000, ..Default::default() };
    let policy = policy_over(None, Some(&callback), Some(&retry), None).unwrap();
    Arc::new(Session::of_caller(client, admin, policy, ClientLimits::default()))
}

/// A task that goes to the shard that is led here.
pub fn in_an_hour() -> proto::Task {
    in_shard(HERE)
}

/// A task that goes to the other node.
pub fn elsewhere() -> proto::Task {
    in_shard(ELSEWHERE)
}

fn in_shard(shard: ShardId) -> proto::Task {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let origin = proto::Origin { sender: "rig".into(), shard: shard.0.into(), number, answered_below: number };
    proto::Task { delay_ms: HOUR_MS, payload: "a payload".into(), origin: Some(origin), ..Default::default() }
}

/// One that may go anywhere.
pub fn anywhere() -> proto::Task {
    proto::Task { origin: None, ..in_an_hour() }
}

/// An id that nobody has.
pub fn nobodys(shard: ShardId) -> String {
    TaskId::new(BEGAN_MS, shard, 12_345).to_string()
}

/// What is refused, and with which code; for tables.
pub fn check(name: &str, found: &Problem, code: Code, text: &str) {
    assert_eq!(found.code, code, "{name}: {found:?}");
    assert!(found.text.contains(text), "{name}: '{}' should contain '{text}'", found.text);
}
