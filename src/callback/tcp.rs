//! Callbacks over TCP: framed envelopes on pooled connections.
//!
//! A receiver of the original protocol answers without saying which request it means. So a connection starts with one
//! request at a time, and a destination gets as many connections as it needs. As soon as an answer echoes the number of
//! its request, the destination is known to keep them apart, and one connection carries all requests, in any order.
//!
//! A simple receiver of the original protocol serves one connection until its end, and only then looks at the next: a
//! connection that we kept open would make the others run into their timeouts. So connections are kept for long only
//! when a receiver has shown that it serves several: while one that has answered was still open, another one answered.
//!
//! Such a connection can die without a sign, as when a firewall forgets it. One on which nothing was heard while a
//! request ran into its timeout gets no more requests.
//!
//! A request is never sent twice by itself, not even when a pooled connection turns out to be closed: the receiver may
//! have seen it, and a second copy would carry the same fence. That is a failed attempt, and the next one has a larger
//! fence.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use tokio::io::AsyncWriteExt;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};
use tokio_util::codec::{FramedRead, LengthDelimitedCodec};

use super::connect::Connector;
use super::{Attempt, CallbackSettings, failures, response_verdict};
use crate::task::locks::Mutex;
use crate::task::{Delivery, Endpoint, Failure, FailureClass};
use crate::wire::convert::callback_request;
use crate::wire::proto::{BoomerangEnvelope, CallbackResponse, boomerang_envelope::Payload};
use crate::wire::{FRAME_BYTES_MAX, decode_envelope, encode_frame, frame_codec};

/// A connection for many requests on which nothing came for this long, while one of them waited in vain, gets no more.
const SILENT_AFTER: Duration = Duration::from_secs(1);
/// Frames gathered into one write.
const FRAMES_PER_WRITE: usize = 256;
/// How long a connection that has answered stays open for a receiver that may not look at the next one before.
const KEPT_WITHOUT_PROOF: Duration = Duration::from_millis(20);

/// One receiver.
pub struct Destination {
    endpoint: Endpoint,
    settings: CallbackSettings,
    connector: Connector,
    numbers: AtomicU64,
    /// Connections for one request at a time that have none now.
    idle: Mutex<Vec<(Single, Instant)>>,
    connections: Arc<Semaphore>,
    /// Requests under way on these.
    unanswered: AtomicUsize,
    /// Counts the answers that came on these.
    answers: watch::Sender<u64>,
    /// The receiver has been seen to serve several connections side by side.
    side_by_side: AtomicBool,
    /// The connection to a receiver that numbers its answers.
    shared: Mutex<Option<Arc<Shared>>>,
    in_pipeline: Semaphore,
}

/// A connection that carries one request at a time.
struct Single {
    reader: FramedRead<OwnedReadHalf, LengthDelimitedCodec>,
    writer: OwnedWriteHalf,
}

/// A connection that carries many.
struct Shared {
    frames: mpsc::Sender<Bytes>,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Reported>>>,
    closed: AtomicBool,
    last_used: Mutex<Instant>,
    last_heard: Mutex<Instant>,
    reader: Mutex<Option<tokio::task::AbortHandle>>,
}

impl Destination {
    pub fn new(endpoint: Endpoint, settings: CallbackSettings, connector: Connector) -> Self {
        Self {
            endpoint,
            settings,
            connector,
            numbers: AtomicU64::new(1),
            idle: Mutex::default(),
            connections: Arc::new(Semaphore::new(settings.connections_max)),
            unanswered: AtomicUsize::new(0),
            answers: watch::Sender::new(0),
            side_by_side: AtomicBool::new(false),
            shared: Mutex::default(),
            in_pipeline: Semaphore::new(settings.pipeline_max),
        }
    }

    /// Closes what has not been used for long. False when nothing is left.
    pub fn close_idle(&self) -> bool {
        let limit = self.settings.idle_timeout;
        let mut idle = self.idle.lock();
        idle.retain(|(_, since)| since.elapsed() < limit);
        let mut shared = self.shared.lock();
        if shared.as_ref().is_some_and(|shared| shared.is_idle(limit)) {
            *shared = None;
        }
        !idle.is_empty() || shared.is_some()
    }

    /// `within`: how long the receiver may take, from the request to its answer.
    pub async fn deliver(self: &Arc<Self>, delivery: &Delivery, within: Duration) -> Attempt {
        let request = self.request(delivery);
        if self.shared().is_some() {
            // The connection is picked when there is room on it: one that breaks meanwhile takes only along what it
            // was given.
            let _room = self.in_pipeline.acquire().await.expect("the semaphore is never closed");
            if let Some(shared) = self.shared() {
                return self.deliver_shared(&shared, request, within).await;
            }
        }
        let permit = timeout(within, self.connections.acquire()).await;
        let permit = permit.map_err(|_| failures::no_connection(self.place(), within))?;
        let permit = permit.expect("the semaphore is never closed");
        // While we waited for a connection, another one may have found out that one is enough.
        if let Some(shared) = self.shared() {
            drop(permit);
            let _room = self.in_pipeline.acquire().await.expect("the semaphore is never closed");
            return self.deliver_shared(&shared, request, within).await;
        }
        let number = request.number;
        // Counted before the pool is looked at: whoever puts a connection back knows of us, or we find it there.
        let unanswered = Unanswered::new(&self.unanswered);
        let mut connection = Box::pin(self.connection()).await?;
        let answered = timeout(within, connection.ask(request.frame, self.place())).await;
        drop(unanswered);
        let (answered_number, said) = answered.map_err(|_| {
            // Perhaps nobody looks at that connection: be careful again.
            self.side_by_side.store(false, Ordering::Relaxed);
            failures::no_answer(self.place(), within)
        })??;
        if answered_number == number {
            self.share(connection);
        } else {
            self.answers.send_modify(|count| *count += 1);
            self.keep(connection);
        }
        verdict(self.place(), said)
    }

    /// Whether the receiver has shown that one connection can carry many requests.
    pub fn is_pipelined(&self) -> bool {
        self.shared().is_some()
    }

    fn place(&self) -> &str {
        self.endpoint.as_str()
    }

    /// Puts back a connection that has answered, for as long as that does no harm.
    fn keep(self: &Arc<Self>, connection: Single) {
        let mut idle = self.idle.lock();
        if self.side_by_side.load(Ordering::Relaxed) {
            idle.push((connection, Instant::now()));
            return;
        }
        let destination = self.clone();
        if self.unanswered.load(Ordering::SeqCst) == 0 {
            idle.push((connection, Instant::now()));
            tokio::spawn(async move {
                tokio::time::sleep(KEPT_WITHOUT_PROOF).await;
                if !destination.side_by_side.load(Ordering::Relaxed) {
                    let mut idle = destination.idle.lock();
                    idle.retain(|(_, since)| since.elapsed() < KEPT_WITHOUT_PROOF);
                }
            });
            return;
        }
        // Not to be used meanwhile: it may be what the others wait for the end of.
        let mut answers = self.answers.subscribe();
        tokio::spawn(async move {
            if timeout(KEPT_WITHOUT_PROOF, answers.changed()).await.is_ok() && connection.is_alive() {
                destination.side_by_side.store(true, Ordering::Relaxed);
                destination.idle.lock().push((connection, Instant::now()));
            }
        });
    }

    fn request(&self, delivery: &Delivery) -> Request {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let payload = Some(Payload::CallbackRequest(callback_request(delivery)));
        let mut frame = BytesMut::new();
        encode_frame(&BoomerangEnvelope { session_id: String::new(), request_id: number, payload }, &mut frame);
        Request { number, frame: frame.freeze() }
    }

    fn shared(&self) -> Option<Arc<Shared>> {
        let mut shared = self.shared.lock();
        if shared.as_ref().is_some_and(|shared| shared.closed.load(Ordering::Acquire)) {
            *shared = None;
        }
        shared.clone()
    }

    async fn deliver_shared(&self, shared: &Arc<Shared>, request: Request, within: Duration) -> Attempt {
        let Request { number, frame } = request;
        let (out, answer) = oneshot::channel();
        let asked_at = Instant::now();
        shared.waiting.lock().insert(number, out);
        *shared.last_used.lock() = asked_at;
        let asked = async {
            // A closed connection drops the senders of those who wait, and so answers them.
            let _ = shared.frames.send(frame).await;
            if shared.closed.load(Ordering::Acquire) {
                shared.fail_all();
            }
            answer.await
        };
        let answered = timeout(within, asked).await;
        shared.waiting.lock().remove(&number);
        match answered {
            Ok(Ok(said)) => verdict(self.place(), said),
            Ok(Err(_)) => {
                let text = format!("{}: the connection broke before the answer", self.endpoint);
                Err(Failure::new(FailureClass::Broken, text))
            }
            Err(_) => {
                if asked_at.elapsed() >= SILENT_AFTER && !shared.was_heard_since(asked_at) {
                    self.retire(shared);
                }
                Err(failures::no_answer(self.place(), within))
            }
        }
    }

    /// It may have died without a sign, as when a firewall forgets it: the next request finds out on another one. Those
    /// that are on this one may still be answered.
    fn retire(&self, silent: &Arc<Shared>) {
        let mut shared = self.shared.lock();
        if shared.as_ref().is_some_and(|shared| Arc::ptr_eq(shared, silent)) {
            *shared = None;
        }
    }

    async fn connection(&self) -> Result<Single, Failure> {
        while let Some((connection, _)) = self.pop_idle() {
            if connection.is_alive() {
                return Ok(connection);
            }
        }
        let stream = self.connector.connect_to(self.place()).await;
        let stream = stream.map_err(|error| failures::cannot_connect(self.place(), &*error))?;
        let (reader, writer) = stream.into_split();
        Ok(Single { reader: FramedRead::new(reader, frame_codec(FRAME_BYTES_MAX)), writer })
    }

    fn pop_idle(&self) -> Option<(Single, Instant)> {
        self.idle.lock().pop()
    }

    /// From now on this connection carries everything.
    fn share(&self, connection: Single) {
        let mut place = self.shared.lock();
        if place.is_none() {
            *place = Some(Shared::start(connection, self.settings.pipeline_max));
            self.idle.lock().clear();
        }
    }
}

/// A request on a connection of its own, until it is answered.
struct Unanswered<'a>(&'a AtomicUsize);

impl<'a> Unanswered<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A request, ready to leave. Not the message, which is large and would be carried along by all that waits.
struct Request {
    number: u64,
    frame: Bytes,
}

/// What a receiver has answered, if that is what it should.
type Reported = Option<CallbackResponse>;

fn said(answer: BoomerangEnvelope) -> (u64, Reported) {
    let said = match answer.payload {
        Some(Payload::CallbackResponse(response)) => Some(response),
        _ => None,
    };
    (answer.request_id, said)
}

fn verdict(place: &str, said: Reported) -> Attempt {
    match said {
        Some(response) => response_verdict(place, response),
        None => {
            let text = format!("{place}: the receiver answered with something else than a callback response");
            Err(Failure::new(FailureClass::BadAnswer, text))
        }
    }
}

impl Single {
    async fn ask(&mut self, frame: Bytes, place: &str) -> Result<(u64, Reported), Failure> {
        self.writer.write_all(&frame).await.map_err(|error| failures::broken(place, &error))?;
        match self.reader.next().await {
            None => {
                let text = format!("{place}: the connection was closed before the answer");
                Err(Failure::new(FailureClass::Broken, text))
            }
            // A frame that is cut off, or too large to be an answer.
            Some(Err(error)) if error.kind() == ErrorKind::InvalidData => {
                Err(Failure::new(FailureClass::BadAnswer, format!("{place}: the answer is not a frame: {error}")))
            }
            Some(Err(error)) => Err(failures::broken(place, &error)),
            Some(Ok(frame)) => decode_envelope(frame.freeze()).map(said).map_err(|error| {
                Failure::new(FailureClass::BadAnswer, format!("{place}: the answer is not an envelope: {error}"))
            }),
        }
    }

    /// False when the receiver has closed it, or sent what nobody asked for.
    fn is_alive(&self) -> bool {
        let mut byte = [0];
        let nothing = |error: std::io::Error| error.kind() == std::io::ErrorKind::WouldBlock;
        self.reader.read_buffer().is_empty() && self.reader.get_ref().try_read(&mut byte).is_err_and(nothing)
    }
}

impl Shared {
    fn start(connection: Single, pipeline_max: usize) -> Arc<Self> {
        let (frames, queue) = mpsc::channel(pipeline_max);
        let shared = Arc::new(Self {
            frames,
            waiting: Mutex::default(),
            closed: AtomicBool::new(false),
            last_used: Mutex::new(Instant::now()),
            last_heard: Mutex::new(Instant::now()),
            reader: Mutex::default(),
        });
        let reader = tokio::spawn(read_answers(connection.reader, Arc::downgrade(&shared)));
        *shared.reader.lock() = Some(reader.abort_handle());
        tokio::spawn(write_frames(connection.writer, queue));
        shared
    }

    fn is_idle(&self, limit: Duration) -> bool {
        self.waiting.lock().is_empty() && self.last_used.lock().elapsed() >= limit
    }

    fn was_heard_since(&self, instant: Instant) -> bool {
        *self.last_heard.lock() >= instant
    }

    /// Dropping the senders tells those who wait.
    fn fail_all(&self) {
        self.closed.store(true, Ordering::Release);
        self.waiting.lock().clear();
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(reader) = self.reader.lock().take() {
            reader.abort();
        }
    }
}

/// Many frames leave in one write. Ends when the last sender is gone or the connection breaks.
async fn write_frames(mut writer: OwnedWriteHalf, mut queue: mpsc::Receiver<Bytes>) {
    let mut frames = Vec::with_capacity(FRAMES_PER_WRITE);
    let mut buffer = BytesMut::new();
    while queue.recv_many(&mut frames, FRAMES_PER_WRITE).await > 0 {
        buffer.clear();
        for frame in frames.drain(..) {
            buffer.extend_from_slice(&frame);
        }
        if writer.write_all(&buffer).await.is_err() {
            // The reader meets the end of the connection and tells those who wait.
            return;
        }
    }
}

async fn read_answers(mut reader: FramedRead<OwnedReadHalf, LengthDelimitedCodec>, shared: std::sync::Weak<Shared>) {
    loop {
        let frame = reader.next().await;
        let Some(shared) = shared.upgrade() else { return };
        let answer = match frame {
            Some(Ok(frame)) => decode_envelope(frame.freeze()).ok().map(said),
            _ => None,
        };
        let Some((number, said)) = answer else {
            shared.fail_all();
            return;
        };
        *shared.last_heard.lock() = Instant::now();
        let waiting = shared.waiting.lock().remove(&number);
        // Nobody waits any more for an answer that came after its timeout.
        if let Some(waiting) = waiting {
            let _ = waiting.send(said);
        }
    }
}
