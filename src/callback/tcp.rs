//! Callbacks over TCP: framed envelopes on pooled connections.
//!
//! A receiver of the original protocol answers without saying which request it means. So a connection starts with one
//! request at a time, and a destination gets as many connections as it needs. As soon as an answer echoes the number of
//! its request, the destination is known to keep them apart, and one connection carries all requests, in any order.
//!
//! A request is never sent twice by itself, not even when a pooled connection turns out to be closed: the receiver may
//! have seen it, and a second copy would carry the same fence. That is a failed attempt, and the next one has a larger
//! fence.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::BytesMut;
use futures::StreamExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tokio_util::codec::{FramedRead, LengthDelimitedCodec};

use super::CallbackSettings;
use crate::task::{Delivery, Endpoint};
use crate::wire::proto::{BoomerangEnvelope, CallbackRequest, CallbackResponse, Status, boomerang_envelope::Payload};
use crate::wire::{FRAME_BYTES_MAX, decode_envelope, encode_frame, frame_codec};

/// Frames gathered into one write.
const FRAMES_PER_WRITE: usize = 256;
/// How much of a receiver's text is kept.
const ERROR_CHARS_MAX: usize = 500;

type Answer = Result<(), String>;

/// One receiver.
pub struct Destination {
    endpoint: Endpoint,
    settings: CallbackSettings,
    numbers: AtomicU64,
    /// Connections for one request at a time that have none now.
    idle: Mutex<Vec<(Single, Instant)>>,
    connections: Arc<Semaphore>,
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
    frames: mpsc::Sender<BoomerangEnvelope>,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Answer>>>,
    closed: AtomicBool,
    last_used: Mutex<Instant>,
    reader: Mutex<Option<tokio::task::AbortHandle>>,
}

impl Destination {
    pub fn new(endpoint: Endpoint, settings: CallbackSettings) -> Self {
        Self {
            endpoint,
            settings,
            numbers: AtomicU64::new(1),
            idle: Mutex::default(),
            connections: Arc::new(Semaphore::new(settings.connections_max)),
            shared: Mutex::default(),
            in_pipeline: Semaphore::new(settings.pipeline_max),
        }
    }

    /// Closes what has not been used for long. False when nothing is left.
    pub fn close_idle(&self) -> bool {
        let limit = self.settings.idle_timeout;
        let mut idle = self.idle.lock().expect("no panic under this lock");
        idle.retain(|(_, since)| since.elapsed() < limit);
        let mut shared = self.shared.lock().expect("no panic under this lock");
        if shared.as_ref().is_some_and(|shared| shared.is_idle(limit)) {
            *shared = None;
        }
        !idle.is_empty() || shared.is_some()
    }

    pub async fn deliver(&self, delivery: &Delivery) -> Answer {
        let request = self.request(delivery);
        if let Some(shared) = self.shared() {
            return self.deliver_shared(&shared, request).await;
        }
        let permit = self.connections.acquire().await.expect("the semaphore is never closed");
        // While we waited for a connection, another one may have found out that one is enough.
        if let Some(shared) = self.shared() {
            drop(permit);
            return self.deliver_shared(&shared, request).await;
        }
        let mut connection = self.connection().await?;
        let number = request.request_id;
        let answered = timeout(self.settings.answer_timeout, connection.ask(request)).await;
        let answer = answered.map_err(|_| self.no_answer())?.map_err(|why| format!("{}: {why}", self.endpoint))?;
        if answer.request_id == number {
            self.share(connection);
        } else {
            self.idle.lock().expect("no panic under this lock").push((connection, Instant::now()));
        }
        verdict(answer)
    }

    fn request(&self, delivery: &Delivery) -> BoomerangEnvelope {
        let request = CallbackRequest {
            task_id: delivery.task.to_string(),
            payload: delivery.payload.clone(),
            client_id: delivery.client.to_string(),
            occurrence: delivery.occurrence,
            attempt: delivery.attempt,
            due_ms: delivery.due_ms,
            fence_term: delivery.fence.term,
            fence_seq: delivery.fence.seq,
        };
        BoomerangEnvelope {
            session_id: String::new(),
            request_id: self.numbers.fetch_add(1, Ordering::Relaxed),
            payload: Some(Payload::CallbackRequest(request)),
        }
    }

    fn no_answer(&self) -> String {
        format!("{}: no answer within {} ms", self.endpoint, self.settings.answer_timeout.as_millis())
    }

    fn shared(&self) -> Option<Arc<Shared>> {
        let mut shared = self.shared.lock().expect("no panic under this lock");
        if shared.as_ref().is_some_and(|shared| shared.closed.load(Ordering::Acquire)) {
            *shared = None;
        }
        shared.clone()
    }

    async fn deliver_shared(&self, shared: &Arc<Shared>, request: BoomerangEnvelope) -> Answer {
        let _room = self.in_pipeline.acquire().await.expect("the semaphore is never closed");
        let number = request.request_id;
        let (out, answer) = oneshot::channel();
        shared.waiting.lock().expect("no panic under this lock").insert(number, out);
        *shared.last_used.lock().expect("no panic under this lock") = Instant::now();
        let asked = async {
            // A closed connection drops the senders of those who wait, and so answers them.
            let _ = shared.frames.send(request).await;
            if shared.closed.load(Ordering::Acquire) {
                shared.fail_all();
            }
            answer.await
        };
        let answered = timeout(self.settings.answer_timeout, asked).await;
        shared.waiting.lock().expect("no panic under this lock").remove(&number);
        match answered {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(format!("{}: the connection broke before the answer", self.endpoint)),
            Err(_) => Err(self.no_answer()),
        }
    }

    async fn connection(&self) -> Result<Single, String> {
        while let Some((connection, _)) = self.pop_idle() {
            if connection.is_alive() {
                return Ok(connection);
            }
        }
        let connect = TcpStream::connect(self.endpoint.as_str());
        let stream = timeout(self.settings.connect_timeout, connect)
            .await
            .map_err(|_| {
                format!("{}: no connection within {} ms", self.endpoint, self.settings.connect_timeout.as_millis())
            })?
            .map_err(|error| format!("{}: cannot connect: {error}", self.endpoint))?;
        // A frame leaves when it is written.
        let _ = stream.set_nodelay(true);
        let (reader, writer) = stream.into_split();
        Ok(Single { reader: FramedRead::new(reader, frame_codec(FRAME_BYTES_MAX)), writer })
    }

    fn pop_idle(&self) -> Option<(Single, Instant)> {
        self.idle.lock().expect("no panic under this lock").pop()
    }

    /// From now on this connection carries everything.
    fn share(&self, connection: Single) {
        let mut place = self.shared.lock().expect("no panic under this lock");
        if place.is_none() {
            *place = Some(Shared::start(connection, self.settings.pipeline_max));
            self.idle.lock().expect("no panic under this lock").clear();
        }
    }
}

fn verdict(answer: BoomerangEnvelope) -> Answer {
    let Some(Payload::CallbackResponse(CallbackResponse { status, error_message })) = answer.payload else {
        return Err("the receiver answered with something else than a callback response".into());
    };
    let name = match Status::try_from(status) {
        Ok(Status::Ok) => return Ok(()),
        Ok(known) => known.as_str_name().to_owned(),
        Err(_) => status.to_string(),
    };
    let text: String = error_message.chars().take(ERROR_CHARS_MAX).collect();
    Err(format!("the receiver answered {name}: {text}"))
}

impl Single {
    async fn ask(&mut self, request: BoomerangEnvelope) -> Result<BoomerangEnvelope, String> {
        let mut frame = BytesMut::new();
        encode_frame(&request, &mut frame);
        self.writer.write_all(&frame).await.map_err(|error| format!("cannot send: {error}"))?;
        match self.reader.next().await {
            None => Err("the connection was closed before the answer".into()),
            Some(Err(error)) => Err(format!("cannot read the answer: {error}")),
            Some(Ok(frame)) => {
                decode_envelope(frame.freeze()).map_err(|error| format!("the answer is not an envelope: {error}"))
            }
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
            reader: Mutex::default(),
        });
        let reader = tokio::spawn(read_answers(connection.reader, Arc::downgrade(&shared)));
        *shared.reader.lock().expect("no panic under this lock") = Some(reader.abort_handle());
        tokio::spawn(write_frames(connection.writer, queue));
        shared
    }

    fn is_idle(&self, limit: Duration) -> bool {
        self.waiting.lock().expect("no panic under this lock").is_empty()
            && self.last_used.lock().expect("no panic under this lock").elapsed() >= limit
    }

    /// Dropping the senders tells those who wait.
    fn fail_all(&self) {
        self.closed.store(true, Ordering::Release);
        self.waiting.lock().expect("no panic under this lock").clear();
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(reader) = self.reader.lock().expect("no panic under this lock").take() {
            reader.abort();
        }
    }
}

/// Many frames leave in one write. Ends when the last sender is gone or the connection breaks.
async fn write_frames(mut writer: OwnedWriteHalf, mut queue: mpsc::Receiver<BoomerangEnvelope>) {
    let mut frames = Vec::with_capacity(FRAMES_PER_WRITE);
    let mut buffer = BytesMut::new();
    while queue.recv_many(&mut frames, FRAMES_PER_WRITE).await > 0 {
        buffer.clear();
        for frame in frames.drain(..) {
            encode_frame(&frame, &mut buffer);
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
            Some(Ok(frame)) => decode_envelope(frame.freeze()).ok(),
            _ => None,
        };
        let Some(answer) = answer else {
            shared.fail_all();
            return;
        };
        let waiting = shared.waiting.lock().expect("no panic under this lock").remove(&answer.request_id);
        // Nobody waits any more for an answer that came after its timeout.
        if let Some(waiting) = waiting {
            let _ = waiting.send(verdict(answer));
        }
    }
}
