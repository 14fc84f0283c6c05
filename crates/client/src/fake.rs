//! A node that a test plays by hand: a real loopback socket, and the test decides what is answered, and when.
//!
//! Only for tests, of this room, `tool` and `callback`. Nothing here waits for time; a test awaits the request it expects.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use boomerang_task::locks::Mutex;
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_util::codec::Decoder;

use super::{Client, Credentials, Options};
use boomerang_task::{DeadLetterId, ShardId, TaskId};
use boomerang_testkit::OwnAddress;
use boomerang_wire::proto::{self, BoomerangEnvelope, Status, boomerang_envelope::Payload};
use boomerang_wire::{FRAME_BYTES_MAX, decode_envelope, encode_frame, frame_codec};

/// A listening socket.
pub struct Fake {
    listener: TcpListener,
}

/// The node's end of one connection.
pub struct Peer {
    stream: TcpStream,
    input: BytesMut,
}

impl Fake {
    pub async fn start() -> Self {
        Self { listener: TcpListener::bind("127.0.0.1:0").await.unwrap() }
    }

    pub fn address(&self) -> String {
        self.listener.local_addr().unwrap().to_string()
    }

    pub fn options(&self) -> Options {
        let credentials = Credentials::Password { client_id: "admin".parse().unwrap(), password: "secret".into() };
        Options { connect_timeout: Duration::from_secs(30), ..Options::new(vec![self.address()], credentials) }
    }

    pub async fn accept(&self) -> Peer {
        Peer::new(self.listener.accept().await.unwrap().0)
    }

    pub async fn connect(&self, options: Options) -> (Client, Peer) {
        self.connect_until(options, 0).await
    }

    pub async fn connect_until(&self, options: Options, expires_at_ms: u64) -> (Client, Peer) {
        let (client, peer) = tokio::join!(Client::connect(options), async {
            let mut peer = self.accept().await;
            peer.welcome("session-1", expires_at_ms).await;
            peer
        });
        (client.unwrap(), peer)
    }

    /// Answers every request of every connection with what `answer` makes of it; handshakes are welcome.
    pub fn serve(self, mut answer: impl FnMut(Payload) -> Payload + Send + 'static) {
        tokio::spawn(async move {
            loop {
                let mut peer = self.accept().await;
                while let Some(request) = peer.next().await {
                    let reply = match request.payload.unwrap() {
                        Payload::AuthHandshake(_) => welcome("session-1", 0),
                        payload => answer(payload),
                    };
                    peer.send(request.request_id, reply).await;
                }
            }
        });
    }
}

/// Nodes that play a cluster of one shard by themselves: whoever leads it stores what comes, once per key, the others
/// say who leads. The test moves the leader, kills nodes and has answers lost.
pub struct Cluster {
    addresses: Vec<String>,
    nodes: Vec<tokio::task::JoinHandle<()>>,
    shared: Arc<Mutex<Played>>,
    maps: Arc<Notify>,
}

#[derive(Default)]
struct Played {
    leader: usize,
    term: u64,
    stored: Vec<proto::Task>,
    cancellations: usize,
    /// So many requests are done, and the connection breaks before the answer.
    lost: usize,
}

impl Cluster {
    pub async fn start(count: usize) -> Self {
        let shared = Arc::new(Mutex::new(Played::default()));
        let maps = Arc::new(Notify::new());
        let mut listeners = Vec::new();
        for _ in 0..count {
            listeners.push(Fake::start().await);
        }
        let addresses: Vec<String> = listeners.iter().map(Fake::address).collect();
        let nodes = listeners.into_iter().enumerate().map(|(number, node)| {
            let part = Part { number, addresses: addresses.clone(), shared: shared.clone(), maps: maps.clone() };
            tokio::spawn(part.play(node))
        });
        Self { nodes: nodes.collect(), addresses, shared, maps }
    }

    /// Knows the first node.
    pub fn options(&self) -> Options {
        let credentials = Credentials::Password { client_id: "admin".parse().unwrap(), password: "secret".into() };
        Options::new(vec![self.addresses[0].clone()], credentials)
    }

    fn played(&self) -> std::sync::MutexGuard<'_, Played> {
        self.shared.lock()
    }

    pub fn lead(&self, leader: usize, term: u64) {
        let mut played = self.played();
        (played.leader, played.term) = (leader, term);
    }

    pub fn lose_answers(&self, count: usize) {
        self.played().lost = count;
    }

    pub fn kill(&self, node: usize) {
        self.nodes[node].abort();
    }

    pub fn stored(&self) -> Vec<proto::Task> {
        self.played().stored.clone()
    }

    pub fn cancellations(&self) -> usize {
        self.played().cancellations
    }

    /// Somebody asks for the map, or has asked.
    pub async fn asked_for_the_map(&self) {
        self.maps.notified().await;
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.nodes.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

/// What one of the nodes is played by.
#[derive(Clone)]
struct Part {
    number: usize,
    addresses: Vec<String>,
    shared: Arc<Mutex<Played>>,
    maps: Arc<Notify>,
}

impl Part {
    async fn play(self, node: Fake) {
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let mut peer = node.accept().await;
            let part = self.clone();
            connections.spawn(async move {
                while let Some(request) = peer.next().await {
                    let Some(answer) = part.answer(request.payload.unwrap()) else { return };
                    peer.send(request.request_id, answer).await;
                }
            });
        }
    }

    /// `None` breaks the connection.
    fn answer(&self, request: Payload) -> Option<Payload> {
        let mut played = self.shared.lock();
        let here = played.leader == self.number;
        let detail = Some(proto::Detail {
            leader_address: self.addresses[played.leader].clone(),
            term: played.term,
            ..Default::default()
        });
        let status = if here { Status::Ok } else { Status::NotLeader }.into();
        let detail = detail.filter(|_| !here);
        let answer = match request {
            Payload::AuthHandshake(handshake) => {
                assert!(handshake.redirects);
                return Some(Payload::AuthResponse(proto::AuthResponse {
                    session_id: "session".into(),
                    client_id: "admin".into(),
                    nodes: u32::try_from(self.addresses.len()).unwrap(),
                    ..Default::default()
                }));
            }
            Payload::ShardMapRequest(_) => {
                self.maps.notify_one();
                return Some(self.map(&played));
            }
            Payload::RegistrationRequest(task) if here => Payload::RegistrationResponse(self.store(&mut played, task)),
            Payload::RegistrationRequest(_) => {
                Payload::RegistrationResponse(proto::RegistrationResponse { status, detail, ..Default::default() })
            }
            Payload::RegistrationBatch(mut batch) => {
                for (task, place) in batch.tasks.iter_mut().zip(0..) {
                    let behind = |origin: proto::Origin| proto::Origin { number: origin.number + place, ..origin };
                    task.origin = task.origin.take().or(batch.origin.clone().map(behind));
                }
                let one = |task| match here {
                    true => self.store(&mut played, task),
                    false => proto::RegistrationResponse { status, detail: detail.clone(), ..Default::default() },
                };
                let responses = batch.tasks.into_iter().map(one).collect();
                Payload::RegistrationBatchResponse(proto::RegistrationBatchResponse { responses, ..Default::default() })
            }
            Payload::CancellationRequest(_) => {
                played.cancellations += usize::from(here);
                Payload::CancellationResponse(proto::CancellationResponse { status, detail, ..Default::default() })
            }
            Payload::CancellationBatch(batch) => {
                played.cancellations += if here { batch.task_ids.len() } else { 0 };
                let one = proto::CancellationResponse { status, detail, ..Default::default() };
                let responses = vec![one; batch.task_ids.len()];
                Payload::CancellationBatchResponse(proto::CancellationBatchResponse { responses, ..Default::default() })
            }
            other => panic!("the fake cluster does not play {other:?}"),
        };
        if here && played.lost > 0 {
            played.lost -= 1;
            return None;
        }
        Some(answer)
    }

    fn map(&self, played: &Played) -> Payload {
        let nodes = (1..).zip(&self.addresses).map(|(node_id, address)| {
            let address = address.clone();
            proto::NodeAddress { node_id, address }
        });
        Payload::ShardMapResponse(proto::ShardMapResponse {
            shards: vec![proto::ShardLeader { node_id: played.leader as u64 + 1, term: played.term }],
            nodes: nodes.collect(),
            ..Default::default()
        })
    }

    /// Due at the number of the node.
    fn store(&self, played: &mut Played, task: proto::Task) -> proto::RegistrationResponse {
        // The sender and its number; what the sender has had answers to changes from one try to the next.
        let origin =
            |task: &proto::Task| task.origin.clone().map(|origin| (origin.sender, origin.shard, origin.number));
        let again = |stored: &proto::Task| match task.dedup_key.is_empty() {
            true => origin(stored) == origin(&task),
            false => stored.dedup_key == task.dedup_key,
        };
        let known = played.stored.iter().position(again);
        let place = known.unwrap_or(played.stored.len());
        if known.is_none() {
            played.stored.push(task);
        }
        proto::RegistrationResponse {
            task_id: task_id_in(0, place as u64).to_string(),
            scheduled_time_ms: self.number as u64,
            duplicate: known.is_some(),
            ..Default::default()
        }
    }
}

/// Runs `call` against a node that answers its one request with `answer`, and returns that request.
pub async fn exchange<T>(answer: Payload, call: impl AsyncFnOnce(Client) -> T) -> (Payload, T) {
    let fake = Fake::start().await;
    let (client, mut peer) = fake.connect(fake.options()).await;
    tokio::join!(
        async {
            let request = peer.next().await.unwrap();
            peer.send(request.request_id, answer).await;
            request.payload.unwrap()
        },
        call(client)
    )
}

impl Peer {
    pub fn new(stream: TcpStream) -> Self {
        Self { stream, input: BytesMut::new() }
    }

    /// The next envelope; `None` when the other end closed the connection.
    pub async fn next(&mut self) -> Option<BoomerangEnvelope> {
        let mut codec = frame_codec(FRAME_BYTES_MAX);
        loop {
            // A fresh codec reads the length again, so the frame must be whole before it is asked.
            let len = self.input.get(..4).map(|len| u32::from_be_bytes(len.try_into().unwrap()) as usize);
            if len.is_some_and(|len| self.input.len() >= 4 + len) {
                let frame = codec.decode(&mut self.input).unwrap().expect("a whole frame");
                return Some(decode_envelope(frame.freeze()).unwrap());
            }
            if self.stream.read_buf(&mut self.input).await.unwrap_or(0) == 0 {
                return None;
            }
        }
    }

    pub async fn send(&mut self, request_id: u64, payload: Payload) {
        let mut out = BytesMut::new();
        let envelope = BoomerangEnvelope { session_id: String::new(), payload: Some(payload), request_id };
        encode_frame(&envelope, &mut out);
        self.send_raw(&out).await;
    }

    pub async fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// Expects a handshake and opens a session.
    pub async fn welcome(&mut self, session: &str, expires_at_ms: u64) {
        let request = self.next().await.expect("a handshake");
        assert!(matches!(request.payload, Some(Payload::AuthHandshake(_))), "{:?}", request.payload);
        self.send(request.request_id, welcome(session, expires_at_ms)).await;
    }
}

pub fn welcome(session: &str, expires_at_ms: u64) -> Payload {
    Payload::AuthResponse(proto::AuthResponse { session_id: session.to_owned(), expires_at_ms, ..Default::default() })
}

pub fn task_id(random: u64) -> TaskId {
    TaskId::new(1_700_000_000_000, ShardId(3), random)
}

pub fn task_id_in(shard: u16, random: u64) -> TaskId {
    TaskId::new(1_700_000_000_000, ShardId(shard), random)
}

pub fn registered(due_ms: u64) -> Payload {
    Payload::RegistrationResponse(proto::RegistrationResponse {
        task_id: task_id(due_ms).to_string(),
        scheduled_time_ms: due_ms,
        ..Default::default()
    })
}

pub fn refused(status: Status, message: &str) -> Payload {
    Payload::ErrorResponse(proto::ErrorResponse { status: status.into(), error_message: message.to_owned() })
}

pub fn refused_handshake(status: Status, message: &str) -> Payload {
    Payload::AuthResponse(proto::AuthResponse {
        status: status.into(),
        error_message: message.to_owned(),
        ..Default::default()
    })
}

/// A task as a node describes it.
pub fn details(random: u64, payload: &'static [u8]) -> proto::TaskDetails {
    proto::TaskDetails {
        task_id: task_id(random).to_string(),
        client_id: "orders".into(),
        expiration_ms: 1_800_000_000_000 + random,
        payload: Bytes::from_static(payload),
        first_due_ms: 1_800_000_000_000,
        attempt: 1,
        callback: Some(proto::CallbackConfig { protocol: 0, endpoint: "h:1".into(), ..Default::default() }),
        ..Default::default()
    }
}

pub fn dead_letter_id(random: u64) -> DeadLetterId {
    DeadLetterId { died_ms: 1_800_000_060_000, task: task_id(random) }
}

/// A dead letter as a node describes it.
pub fn dead_letter(random: u64) -> proto::DeadLetter {
    let task = details(random, b"dead");
    proto::DeadLetter {
        dead_letter_id: dead_letter_id(random).to_string(),
        task_id: task.task_id,
        client_id: task.client_id,
        payload: task.payload,
        due_ms: task.first_due_ms,
        died_ms: dead_letter_id(random).died_ms,
        attempts: 5,
        failure: Some(proto::Failure {
            class: proto::FailureClass::Refused.into(),
            text: "nobody listens at h:1".into(),
            at_ms: dead_letter_id(random).died_ms,
        }),
        callback: task.callback,
        ..Default::default()
    }
}

/// A delivery, whose payload is its number.
pub fn callback_request(random: u64) -> proto::CallbackRequest {
    proto::CallbackRequest {
        task_id: task_id(random).to_string(),
        payload: Bytes::from(random.to_string()),
        attempt: 1,
        due_ms: 1_000,
        fence_term: 3,
        fence_seq: random,
        ..Default::default()
    }
}

/// An address where nobody listens, nor is it given to anybody while the tests run; the test that has it may listen there.
pub fn dead_address() -> SocketAddr {
    OwnAddress::take().unwrap().keep()
}
