//! One TCP connection: numbers requests, writes many in one go, matches answers by number, and ends once.
//!
//! Three tasks serve it: a writer, a reader, and one that looks for requests without an answer. They live until
//! [`Connection::end`], which tells every waiting request why. Invariants: a request id is used once; a request that was
//! accepted by [`Connection::send`] gets exactly one result; after the end nothing is accepted.
//!
//! Request ids grow, and all requests have the same timeout, so the first entry of `pending` is also the first to run
//! out: one timer serves all of them. A caller encodes straight into the buffer the writer sends next; there is no
//! channel, and no allocation per request other than the one-shot its answer comes through.

use std::collections::BTreeMap;
use std::mem;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use boomerang_task::locks::Mutex;
use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, OwnedSemaphorePermit, oneshot};
use tokio::time::Instant;
use tokio_util::codec::{Decoder, LengthDelimitedCodec};
use tokio_util::sync::CancellationToken;

use super::ClientError;
use super::session::Session;
use boomerang_wire::proto::{BoomerangEnvelope, boomerang_envelope::Payload};
use boomerang_wire::{decode_envelope, encode_frame, frame_codec};

/// A page of listed tasks carries their payloads, so an answer may be far larger than a request.
const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;

/// About a thousand answers to registrations in one read.
const READ_BYTES: usize = 64 * 1024;

/// A write buffer that once grew larger than this is given back.
const WRITE_BYTES_KEPT: usize = 1024 * 1024;

/// What a request ends with.
pub(super) type AnswerResult = Result<Payload, ClientError>;

/// A connection and the requests that are under way on it.
pub(super) struct Connection {
    address: String,
    request_timeout: Duration,
    state: Mutex<State>,
    /// Wakes the writer: there are bytes in `State::out`.
    filled: Notify,
    /// Set by [`Connection::end`].
    ended: CancellationToken,
    /// Held while a new session is being opened, so that a thousand refused requests open one.
    pub renewing: tokio::sync::Mutex<()>,
}

struct State {
    /// Encoded frames the writer has not taken yet.
    out: BytesMut,
    pending: BTreeMap<u64, Waiter>,
    request_id_last: u64,
    session: Session,
    /// Why the connection is over.
    end: Option<ClientError>,
}

struct Waiter {
    answer: oneshot::Sender<AnswerResult>,
    deadline: Instant,
    /// Given back with the answer, whether or not anybody still waits for it.
    _permit: Option<OwnedSemaphorePermit>,
}

/// A request that is on its way.
pub(super) struct Sent {
    pub answer: oneshot::Receiver<AnswerResult>,
    /// Kept for the case that the session turns out to be gone.
    pub payload: Payload,
    /// [`Session::number`] of the session it was sent in.
    pub session_number: u64,
}

/// A request that was not sent, because the connection is over.
pub(super) struct Unsent {
    pub payload: Payload,
    pub permit: Option<OwnedSemaphorePermit>,
    pub error: ClientError,
}

impl Connection {
    /// Takes over both directions of a connection and starts its tasks. No session is open yet.
    pub fn start(
        address: &str,
        read_half: impl AsyncRead + Send + Unpin + 'static,
        write_half: impl AsyncWrite + Send + Unpin + 'static,
        request_timeout: Duration,
    ) -> Arc<Self> {
        let connection = Arc::new(Self {
            address: address.to_owned(),
            request_timeout,
            state: Mutex::new(State {
                out: BytesMut::new(),
                pending: BTreeMap::new(),
                request_id_last: 0,
                session: Session::default(),
                end: None,
            }),
            filled: Notify::new(),
            ended: CancellationToken::new(),
            renewing: tokio::sync::Mutex::new(()),
        });
        tokio::spawn(connection.clone().write(write_half));
        tokio::spawn(connection.clone().read(read_half));
        tokio::spawn(connection.clone().expire());
        connection
    }

    /// Puts a request into the buffer. Never waits.
    pub fn send(&self, payload: Payload, permit: Option<OwnedSemaphorePermit>) -> Result<Sent, Box<Unsent>> {
        let mut state = self.state();
        if let Some(error) = &state.end {
            let error = error.clone();
            return Err(Box::new(Unsent { payload, permit, error }));
        }
        let State { out, pending, request_id_last, session, .. } = &mut *state;
        *request_id_last += 1;
        let mut envelope = BoomerangEnvelope {
            // Borrowed for the moment of encoding: a copy for each request would be its largest cost.
            session_id: mem::take(&mut session.id),
            payload: Some(payload),
            request_id: *request_id_last,
        };
        encode_frame(&envelope, out);
        session.id = mem::take(&mut envelope.session_id);
        let (sender, receiver) = oneshot::channel();
        let deadline = Instant::now() + self.request_timeout;
        pending.insert(*request_id_last, Waiter { answer: sender, deadline, _permit: permit });
        let session_number = session.number;
        drop(state);
        self.filled.notify_one();
        let payload = envelope.payload.take().expect("it was put there above");
        Ok(Sent { answer: receiver, payload, session_number })
    }

    /// Sends a request that belongs to the session itself, and waits for its answer. It takes no permit: otherwise
    /// requests that wait for a new session could keep it from being opened.
    pub async fn call(&self, payload: Payload) -> AnswerResult {
        match self.send(payload, None) {
            Ok(sent) => sent.answer.await.unwrap_or_else(|_| Err(self.lost("its tasks are gone"))),
            Err(unsent) => Err(unsent.error),
        }
    }

    /// Ends the connection: everything under way gets `why`, and so does whatever comes later. The first call counts.
    pub fn end(&self, why: ClientError) {
        let pending = {
            let mut state = self.state();
            if state.end.is_some() {
                return;
            }
            state.end = Some(why.clone());
            mem::take(&mut state.pending)
        };
        self.ended.cancel();
        // What was sent may have been done: "closed" would say that it was not sent.
        let told = if matches!(why, ClientError::Closed) { self.lost("the client was closed") } else { why };
        for waiter in pending.into_values() {
            // Whoever asked may have stopped waiting.
            let _ = waiter.answer.send(Err(told.clone()));
        }
    }

    pub fn is_open(&self) -> bool {
        !self.ended.is_cancelled()
    }

    /// Returns when the connection is over.
    pub async fn ended(&self) {
        self.ended.cancelled().await;
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn session(&self) -> Session {
        self.state().session.clone()
    }

    pub fn session_number(&self) -> u64 {
        self.state().session.number
    }

    pub fn change_session(&self, change: impl FnOnce(&mut Session)) {
        change(&mut self.state().session);
    }

    /// Nothing awaits and nothing can panic under this lock, so it is a plain one.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    fn lost(&self, reason: impl ToString) -> ClientError {
        ClientError::ConnectionLost { address: self.address.clone(), reason: reason.to_string() }
    }

    async fn write(self: Arc<Self>, mut half: impl AsyncWrite + Unpin) {
        let mut taken = BytesMut::new();
        loop {
            mem::swap(&mut self.state().out, &mut taken);
            if taken.is_empty() {
                tokio::select! {
                    () = self.ended.cancelled() => return,
                    () = self.filled.notified() => {}
                }
                // Whoever is ready to send as well shall share this write.
                tokio::task::yield_now().await;
                continue;
            }
            let written = async {
                half.write_all(&taken).await?;
                half.flush().await
            };
            tokio::select! {
                () = self.ended.cancelled() => return,
                result = written => if let Err(error) = result {
                    return self.end(self.lost(error));
                }
            }
            taken.clear();
            if taken.capacity() > WRITE_BYTES_KEPT {
                taken = BytesMut::new();
            }
        }
    }

    async fn read(self: Arc<Self>, mut half: impl AsyncRead + Unpin) {
        let mut codec = frame_codec(ANSWER_BYTES_MAX);
        let mut input = BytesMut::with_capacity(READ_BYTES);
        let mut answers = Vec::new();
        loop {
            input.reserve(READ_BYTES);
            let read = tokio::select! {
                () = self.ended.cancelled() => return,
                read = half.read_buf(&mut input) => read,
            };
            match read {
                Ok(0) => return self.end(self.lost("the node closed it")),
                Ok(_) => {}
                Err(error) => return self.end(self.lost(error)),
            }
            let cut = self.cut(&mut codec, &mut input, &mut answers);
            // The good answers before a bad frame are still good.
            if let Err(error) = self.hand_out(&mut answers).and(cut) {
                return self.end(error);
            }
        }
    }

    /// Cuts what was read into numbered answers.
    fn cut(
        &self,
        codec: &mut LengthDelimitedCodec,
        input: &mut BytesMut,
        answers: &mut Vec<(u64, Payload)>,
    ) -> Result<(), ClientError> {
        while let Some(frame) = codec.decode(input).map_err(|error| ClientError::Protocol(error.to_string()))? {
            let envelope = decode_envelope(frame.freeze()).map_err(|error| ClientError::Protocol(error.to_string()))?;
            match envelope.payload {
                Some(Payload::ErrorResponse(error)) if envelope.request_id == 0 => {
                    return Err(self.lost(format!("the node did not understand a frame: {}", error.error_message)));
                }
                _ if envelope.request_id == 0 => {
                    return Err(ClientError::Protocol("an answer without a request number".into()));
                }
                Some(payload) => answers.push((envelope.request_id, payload)),
                None => return Err(ClientError::Protocol("an envelope of a kind unknown to this client".into())),
            }
        }
        Ok(())
    }

    /// Gives each answer to the request with its number, all under one lock.
    fn hand_out(&self, answers: &mut Vec<(u64, Payload)>) -> Result<(), ClientError> {
        let mut found = Vec::with_capacity(answers.len());
        let mut result = Ok(());
        {
            let mut state = self.state();
            for (request_id, payload) in answers.drain(..) {
                if request_id > state.request_id_last {
                    result = Err(ClientError::Protocol(format!("an answer to request {request_id}, never sent")));
                    break;
                }
                // One that is missing has run out of time before.
                if let Some(waiter) = state.pending.remove(&request_id) {
                    found.push((waiter, payload));
                }
            }
        }
        for (waiter, payload) in found {
            let _ = waiter.answer.send(Ok(payload));
        }
        result
    }

    async fn expire(self: Arc<Self>) {
        loop {
            let (late, next) = {
                let now = Instant::now();
                let mut state = self.state();
                let mut late = Vec::new();
                while let Some(entry) = state.pending.first_entry().filter(|entry| entry.get().deadline <= now) {
                    late.push(entry.remove());
                }
                // A request sent from now on cannot run out earlier than this.
                let next = state.pending.first_key_value().map_or(now + self.request_timeout, |(_, w)| w.deadline);
                (late, next)
            };
            for waiter in late {
                let _ = waiter.answer.send(Err(ClientError::Timeout { after: self.request_timeout }));
            }
            tokio::select! {
                () = self.ended.cancelled() => return,
                () = tokio::time::sleep_until(next) => {}
            }
        }
    }
}
