//! One client connection: frames in, frames out.
//!
//! ```text
//!   socket --frames--> read loop --handle--> proposer ... reply --> answers --> write loop --frames--> socket
//!                         ^                                             |
//!                         +---- a place in the window, given back when the answer is written
//! ```
//!
//! Requests with a number are answered as their answers come, the others in their own order: a client of the original
//! protocol sees its answers in the order of its requests, whatever else happens.
//!
//! What a connection can hold is bounded: requests read and not answered, bytes of answers not written. A client that
//! does not read its answers is not read from any more, and after [`TcpSettings::write_timeout`] it is disconnected.
//!
//! Until it has authenticated, a connection is read one small frame at a time, for [`TcpSettings::handshake_timeout`] at
//! most, and goes first when there are too many.

mod envelopes;
mod frames;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use futures::StreamExt;
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::codec::FramedRead;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::guests::{Guest, GuestLimits, Guests};
use super::problem::Problem;
use super::tls::{Inside, Stream, Tls};
use super::{Service, api};
use crate::wire::proto::boomerang_envelope::Payload;
use crate::wire::proto::{BoomerangEnvelope, Status};
use crate::wire::{decode_envelope, encode_frame};
use envelopes::handle;
use frames::{Frames, TooLarge};

/// Answers to everything but lists and gets are about this long.
const SMALL_ANSWER_BYTES: usize = 1024;
/// Bytes gathered into one write.
const WRITE_BYTES: usize = 64 * 1024;
/// After `accept` failed: most likely there are no file descriptors left.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// How often it is looked whether the session by which a connection is known is still there.
const SESSION_LOOK_EVERY: Duration = Duration::from_secs(30);
const CLOSE_WITHIN: Duration = Duration::from_secs(1);
/// How often connections that find no room are told of in the log.
const TOLD_EVERY: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy)]
pub struct TcpSettings {
    pub frame_bytes_max: usize,
    /// Requests of one connection that are read and not answered.
    pub requests_max: usize,
    /// Bytes of large answers of one connection that are not written.
    pub answer_bytes_max: usize,
    /// How long one write may take.
    pub write_timeout: Duration,
    /// A connection that has not authenticated by then is closed.
    pub handshake_timeout: Duration,
    pub connections: GuestLimits,
}

impl Default for TcpSettings {
    fn default() -> Self {
        Self {
            frame_bytes_max: crate::wire::FRAME_BYTES_MAX,
            requests_max: 4_096,
            answer_bytes_max: 4 * 1024 * 1024,
            write_timeout: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(10),
            connections: GuestLimits { all: 10_000, of_an_address: 5_000 },
        }
    }
}

/// Serves until `stop`; then no request is read any more, and the answers under way still leave.
pub async fn serve(
    listener: TcpListener,
    service: Arc<Service>,
    settings: TcpSettings,
    tls: Tls,
    stop: CancellationToken,
) {
    let connections = TaskTracker::new();
    let guests = Guests::new(settings.connections);
    let mut told: Option<Instant> = None;
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let Some(guest) = guests.admit(peer.ip()) else {
                    if told.is_none_or(|at| at.elapsed() > TOLD_EVERY) {
                        told = Some(Instant::now());
                        tracing::warn!(%peer, "no room for another connection: all that are open are known");
                    }
                    continue;
                };
                let (service, tls, stop) = (service.clone(), tls.clone(), stop.clone());
                connections.spawn(async move {
                    service.metrics.connections.inc();
                    connection(stream, peer, guest, &service, settings, tls, stop).await;
                    service.metrics.connections.dec();
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_AGAIN_AFTER).await;
            }
        }
    }
    connections.close();
    connections.wait().await;
}

/// Where an answer goes among the others.
enum Place {
    /// It says itself which request it answers.
    Numbered(u64),
    /// The n-th of those without a number.
    Ordered(u64),
}

struct Answer {
    place: Place,
    payload: Payload,
    /// Room in the window; given back when the answer is written.
    room: (OwnedSemaphorePermit, Option<OwnedSemaphorePermit>),
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    guest: Guest,
    service: &Arc<Service>,
    settings: TcpSettings,
    tls: Tls,
    stop: CancellationToken,
) {
    // An answer leaves when it is written.
    let _ = stream.set_nodelay(true);
    let handshake_until = Instant::now() + settings.handshake_timeout;
    let accepted = tokio::select! {
        accepted = tokio::time::timeout_at(handshake_until, tls.accept(stream, Inside::Frames)) => accepted,
        () = stop.cancelled() => return,
        () = guest.shown_out() => return,
    };
    match accepted {
        // Its two directions need nothing of each other.
        Ok(Ok(Stream::Plain(stream))) => {
            let (reader, writer) = stream.into_split();
            serve_frames(reader, writer, handshake_until, peer, guest, service, settings, stop).await;
        }
        Ok(Ok(stream)) => {
            let (reader, writer) = tokio::io::split(stream);
            serve_frames(reader, writer, handshake_until, peer, guest, service, settings, stop).await;
        }
        Ok(Err(error)) => tracing::debug!(%peer, %error, "closed: no TLS with it"),
        Err(_) => tracing::debug!(%peer, "closed: it did not say what it speaks in time"),
    }
}

#[expect(clippy::too_many_arguments, reason = "the second half of the function above, for two kinds of sockets")]
async fn serve_frames(
    reader: impl AsyncRead + Send + Unpin + 'static,
    writer: impl AsyncWrite + Send + Unpin + 'static,
    handshake_until: Instant,
    peer: SocketAddr,
    mut guest: Guest,
    service: &Arc<Service>,
    settings: TcpSettings,
    stop: CancellationToken,
) {
    let shown_out = guest.shown_out();
    let (answers, queue) = mpsc::unbounded_channel();
    let broken = CancellationToken::new();
    let writing = tokio::spawn(write_loop(writer, queue, settings.write_timeout, peer, broken.clone()));
    tokio::select! {
        () = read_loop(reader, handshake_until, peer, &mut guest, service, settings, answers) => {}
        () = shown_out => tracing::debug!(%peer, "closed: it has not authenticated, and others need the room"),
        // Whatever was read is answered; nothing more is.
        () = stop.cancelled() => {}
        () = broken.cancelled() => {}
    }
    let _ = writing.await;
}

async fn read_loop(
    reader: impl AsyncRead + Unpin,
    mut handshake_until: Instant,
    peer: SocketAddr,
    guest: &mut Guest,
    service: &Arc<Service>,
    settings: TcpSettings,
    answers: mpsc::UnboundedSender<Answer>,
) {
    let session = |id: &str| service.sessions.get(id, service.clock.now_ms()).ok();
    let is_session = |id: &str| session(id).is_some();
    let mut frames = FramedRead::new(reader, Frames::new(settings.frame_bytes_max, is_session));
    let window = Arc::new(Semaphore::new(settings.requests_max));
    let answer_bytes = Arc::new(Semaphore::new(settings.answer_bytes_max));
    let mut ordered = 0;
    // The session by which it is known.
    let mut known: Option<String> = None;
    let mut looks = tokio::time::interval(SESSION_LOOK_EVERY);
    loop {
        let room = window.clone().acquire_owned().await.expect("the semaphore is never closed");
        let frame = if let Some(session_id) = &known {
            let frame = loop {
                tokio::select! {
                    biased;
                    frame = frames.next() => break Some(frame),
                    _ = looks.tick() => if !is_session(session_id) { break None },
                }
            };
            let Some(frame) = frame else {
                // It is to show anew who it is.
                known = None;
                guest.is_stranger();
                handshake_until = Instant::now() + settings.handshake_timeout;
                continue;
            };
            frame
        } else if Instant::now() < handshake_until
            && let Ok(frame) = tokio::time::timeout_at(handshake_until, frames.next()).await
        {
            frame
        } else {
            tracing::debug!(%peer, "closed: it did not authenticate in time");
            return;
        };
        let mut place = |number: u64| match number {
            0 => {
                ordered += 1;
                Place::Ordered(ordered - 1)
            }
            number => Place::Numbered(number),
        };
        match frame {
            None => return,
            Some(Err(error)) => {
                // What follows cannot be told apart any more, so this is the last answer.
                if let Some(text) = frame_problem(&error) {
                    let _ = answers.send(Answer { place: place(0), payload: misunderstood(text), room: (room, None) });
                }
                tracing::debug!(%peer, %error, "closed");
                return;
            }
            Some(Ok(frame)) => match decode_envelope(frame) {
                Err(error) => {
                    let payload = misunderstood(format!("the frame does not hold a BoomerangEnvelope: {error}"));
                    let _ = answers.send(Answer { place: place(0), payload, room: (room, None) });
                }
                Ok(envelope) => {
                    let was_known = known.is_some();
                    if !was_known && is_session(&envelope.session_id) {
                        known = Some(envelope.session_id.clone());
                    }
                    let place = place(envelope.request_id);
                    // Taken before the answer is made: as much as it can be.
                    let most = envelope.payload.as_ref().map_or(0, |payload| {
                        api::answer_bytes_max(payload, settings.frame_bytes_max).min(settings.answer_bytes_max)
                    });
                    let large = match u32::try_from(most).unwrap_or(u32::MAX) {
                        0 => None,
                        most => {
                            let permit = answer_bytes.clone().acquire_many_owned(most).await;
                            Some(permit.expect("the semaphore is never closed"))
                        }
                    };
                    let out = answers.clone();
                    let (let_in, is_let_in) = oneshot::channel();
                    let respond = move |payload| {
                        let session = match &payload {
                            Payload::AuthResponse(answer) if answer.status == Status::Ok as i32 => {
                                Some(answer.session_id.clone())
                            }
                            _ => None,
                        };
                        let _ = let_in.send(session);
                        let _ = out.send(Answer { place, payload, room: (room, large) });
                    };
                    handle(service, envelope, peer.ip(), respond).await;
                    // A stranger asks for one thing at a time.
                    if !was_known {
                        if known.is_none() {
                            known = is_let_in.await.ok().flatten();
                        }
                        if let Some(session) = known.as_ref().and_then(|id| session(id)) {
                            frames.decoder_mut().set_known();
                            guest.is_known(&session.client);
                        }
                    }
                }
            },
        }
    }
}

fn misunderstood(text: impl Into<String>) -> Payload {
    api::misunderstood(Problem::invalid(text))
}

/// What to tell a client whose bytes are no frames; nothing when it has gone.
fn frame_problem(error: &std::io::Error) -> Option<String> {
    error.get_ref()?.downcast_ref::<TooLarge>().map(ToString::to_string)
}

async fn write_loop(
    mut writer: impl AsyncWrite + Unpin,
    mut queue: mpsc::UnboundedReceiver<Answer>,
    write_timeout: Duration,
    peer: SocketAddr,
    broken: CancellationToken,
) {
    let mut next_ordered = 0;
    let mut early: BTreeMap<u64, Answer> = BTreeMap::new();
    let mut buffer = BytesMut::with_capacity(SMALL_ANSWER_BYTES);
    let mut rooms = Vec::new();
    while let Some(answer) = queue.recv().await {
        let mut arrived = Some(answer);
        while let Some(answer) = arrived {
            match answer.place {
                Place::Numbered(number) => put(answer, number, &mut buffer, &mut rooms),
                Place::Ordered(turn) => {
                    early.insert(turn, answer);
                    while let Some(answer) = early.remove(&next_ordered) {
                        put(answer, 0, &mut buffer, &mut rooms);
                        next_ordered += 1;
                    }
                }
            }
            // Whatever else is there leaves in the same write.
            arrived = if buffer.len() < WRITE_BYTES { queue.try_recv().ok() } else { None };
        }
        let written = async {
            writer.write_all(&buffer).await?;
            writer.flush().await
        };
        match tokio::time::timeout(write_timeout, written).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::debug!(%peer, %error, "cannot write");
                break;
            }
            Err(_) => {
                tracing::warn!(%peer, "disconnected: it did not read its answers");
                break;
            }
        }
        rooms.clear();
        buffer.clear();
        if buffer.capacity() > 4 * WRITE_BYTES {
            buffer = BytesMut::with_capacity(SMALL_ANSWER_BYTES);
        }
    }
    // So that whoever speaks TLS knows that this was all.
    let _ = tokio::time::timeout(CLOSE_WITHIN, writer.shutdown()).await;
    broken.cancel();
}

fn put(
    answer: Answer,
    request_id: u64,
    buffer: &mut BytesMut,
    rooms: &mut Vec<(OwnedSemaphorePermit, Option<OwnedSemaphorePermit>)>,
) {
    let envelope = BoomerangEnvelope { session_id: String::new(), request_id, payload: Some(answer.payload) };
    buffer.reserve(envelope.encoded_len() + SMALL_ANSWER_BYTES);
    encode_frame(&envelope, buffer);
    rooms.push(answer.room);
}
