//! The client's handle: bounds what is under way, sends, and hands out the answers.
//!
//! Order of events for a request: a permit (back-pressure), a connection (made when there is none), the buffer of that
//! connection, the answer. With one node there is one connection and nothing else on the way. In a cluster,
//! [`super::hub`] says which node a request goes to, and a task of its own follows it until there is an answer.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::Instant;

use super::connection::{AnswerResult, Connection, Sent};
use super::hub::Hub;
use super::{ClientError, Options, session};
use boomerang_task::InstantMs;
use boomerang_wire::proto::boomerang_envelope::Payload;

/// Session id, request id and the tags around the payload of an envelope, generously.
const ENVELOPE_BYTES: usize = 256;

/// A connection to a Boomerang cluster. Cheap to clone; all clones share the connections, the sessions and the bound on
/// requests under way. When the last clone is gone the connections end, whatever is still under way; use
/// [`Client::close`] to wait for it.
#[derive(Clone)]
pub struct Client {
    pub(super) hub: Arc<Hub>,
}

impl Client {
    /// Connects and opens a session. Each address is tried once; later, when the connection breaks, requests are more
    /// patient (see [`Options::request_timeout`]).
    pub async fn connect(options: Options) -> Result<Self, ClientError> {
        options.validate()?;
        Ok(Self { hub: Arc::new(Hub::connect(options).await?) })
    }

    /// Sends one request and returns without waiting for its answer, which the [`InFlight`] yields.
    ///
    /// Waits while `inflight_max` requests are unanswered, and for a new connection when there is none. This is how to
    /// keep thousands of requests under way from one task. A permit comes back with the answer, even if nobody polls.
    pub async fn submit(&self, payload: Payload) -> Result<InFlight, ClientError> {
        let permit = self.permit(&payload).await?;
        if self.hub.is_cluster() {
            let (answer, found) = oneshot::channel();
            let following = self.hub.clone().begin(payload).await?;
            tokio::spawn(async move {
                // Whoever asked may have stopped waiting.
                let _ = answer.send(following.await);
                drop(permit);
            });
            return Ok(InFlight(State::Followed(found)));
        }
        let deadline = self.hub.home().deadline();
        let (connection, sent) = self.hub.home().send(payload, Some(permit)).await?;
        Ok(InFlight(State::Sent { hub: self.hub.clone(), connection, sent, deadline }))
    }

    /// Room for one more request, of a size that a node takes.
    pub(super) async fn permit(&self, payload: &Payload) -> Result<OwnedSemaphorePermit, ClientError> {
        let bytes = payload.encoded_len() + ENVELOPE_BYTES;
        let bytes_max = self.hub.options().frame_bytes_max;
        if bytes > bytes_max {
            return Err(ClientError::TooLarge { bytes, bytes_max });
        }
        self.hub.inflight().clone().acquire_owned().await.map_err(|_| ClientError::Closed)
    }

    /// Sends one request and waits for its answer; an answer that is a refusal is an error.
    pub(super) async fn request(&self, payload: Payload) -> AnswerResult {
        let answer = self.submit(payload).await?.await?;
        session::check(&answer)?;
        Ok(answer)
    }

    /// Asks for a longer life of the session. The client does this by itself, so there is rarely a need to call it.
    /// Returns when the session ends, in milliseconds by the node's clock.
    pub async fn refresh(&self) -> Result<InstantMs, ClientError> {
        let home = self.hub.home();
        let connection = home.connection(home.deadline()).await?;
        let number = connection.session_number();
        match session::refresh(&connection).await {
            Err(ClientError::Server { .. }) => {
                session::renew(&connection, self.hub.options(), number).await?;
                Ok(connection.session().expires_at_ms)
            }
            result => result,
        }
    }

    /// Waits until everything under way is answered, or has run out of time, and ends the connections. Requests that come
    /// later, here or on another clone, fail with [`ClientError::Closed`].
    pub async fn close(self) {
        let all = u32::try_from(self.hub.options().inflight_max).expect("bounded by validate()");
        // An error means that another clone has closed it already.
        let _idle = self.hub.inflight().acquire_many(all).await;
        self.hub.inflight().close();
        self.hub.end();
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("options", self.hub.options()).finish_non_exhaustive()
    }
}

/// The answer to a request that was sent. Dropping it does not take the request back.
#[must_use = "the answer says whether the request was executed"]
pub struct InFlight(State);

#[allow(clippy::large_enum_variant, reason = "nearly all are `Sent`, and a box would be an allocation per request")]
enum State {
    Sent {
        hub: Arc<Hub>,
        connection: Arc<Connection>,
        sent: Sent,
        /// Until then it is sent again where that does no harm.
        deadline: Instant,
    },
    /// It was not done, for want of a session or of room, and goes out again.
    Again(Pin<Box<dyn Future<Output = AnswerResult> + Send>>),
    /// In a cluster: whoever follows it has the answer.
    Followed(oneshot::Receiver<AnswerResult>),
    Done,
}

impl Future for InFlight {
    type Output = AnswerResult;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<AnswerResult> {
        let state = &mut self.0;
        loop {
            match state {
                State::Sent { sent, .. } => {
                    let answer = ready!(Pin::new(&mut sent.answer).poll(context));
                    let State::Sent { hub, connection, sent, deadline } = std::mem::replace(state, State::Done) else {
                        unreachable!("matched above")
                    };
                    // The sender is dropped without an answer only when the runtime goes down.
                    let answer = answer.unwrap_or_else(|_| Err(ClientError::Closed));
                    if !hub.is_for_again(&sent.payload, &answer) {
                        return Poll::Ready(answer);
                    }
                    *state = State::Again(Box::pin(hub.again((connection, sent), answer, deadline)));
                }
                State::Again(again) => {
                    let answer = ready!(again.as_mut().poll(context));
                    *state = State::Done;
                    return Poll::Ready(answer);
                }
                State::Followed(found) => {
                    let answer = ready!(Pin::new(found).poll(context));
                    *state = State::Done;
                    return Poll::Ready(answer.unwrap_or(Err(ClientError::Closed)));
                }
                State::Done => panic!("polled after the answer"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime, UNIX_EPOCH};

    use bytes::Bytes;
    use tokio::time::Instant;

    use super::super::fake::{self, Fake};
    use super::super::{Due, Registration};
    use super::*;
    use boomerang_wire::proto::{self, Status};

    fn in_a_second() -> Registration {
        Registration { payload: Bytes::from_static(b"x"), due: Due::In(1_000), ..Default::default() }
    }

    #[tokio::test]
    async fn answers_are_matched_by_number_not_by_order() {
        let fake = Fake::start().await;
        let (client, mut peer) = fake.connect(fake.options()).await;
        let mut waiting = Vec::new();
        for _ in 0..100 {
            waiting.push(client.register_nowait(in_a_second()).await.unwrap());
        }
        let mut requests = Vec::new();
        for _ in 0..100 {
            let request = peer.next().await.unwrap();
            assert_eq!(request.session_id, "session-1");
            requests.push(request.request_id);
        }
        assert_eq!(requests[0], 2, "the handshake was 1");
        for request_id in requests.iter().rev() {
            peer.send(*request_id, fake::registered(*request_id)).await;
        }
        for (waiting, request_id) in waiting.into_iter().zip(requests) {
            assert_eq!(waiting.await.unwrap().due_ms, request_id);
        }
    }

    #[tokio::test]
    async fn the_handshake_carries_credentials_and_overrides() {
        let fake = Fake::start().await;
        let mut options = fake.options();
        options.retry = Some(boomerang_task::Retry::default());
        options.dead_letter = Some("http://dead.example".into());
        let (client, peer) = tokio::join!(Client::connect(options), async {
            let mut peer = fake.accept().await;
            let request = peer.next().await.unwrap();
            let Some(Payload::AuthHandshake(handshake)) = request.payload else { panic!("no handshake") };
            assert_eq!((handshake.client_id.as_str(), handshake.password.as_str()), ("admin", "secret"));
            assert_eq!(handshake.protocol, boomerang_wire::PROTOCOL);
            assert_eq!(handshake.retry.unwrap().max_attempts, 5);
            assert_eq!(handshake.dlq.unwrap().destination, "http://dead.example");
            peer.send(request.request_id, fake::refused_handshake(Status::Unauthorized, "wrong password")).await;
            peer
        });
        drop(peer);
        let error = client.unwrap_err();
        assert_eq!(error.to_string(), "UNAUTHORIZED: wrong password");
    }

    #[tokio::test]
    async fn a_full_window_holds_back_the_next_request() {
        let fake = Fake::start().await;
        let (client, mut peer) = fake.connect(Options { inflight_max: 2, ..fake.options() }).await;
        let first = client.register_nowait(in_a_second()).await.unwrap();
        let _second = client.register_nowait(in_a_second()).await.unwrap();
        let mut third = Box::pin(client.register_nowait(in_a_second()));
        assert!(poll_once(third.as_mut()).await.is_none(), "the window is full");
        let request = peer.next().await.unwrap();
        peer.send(request.request_id, fake::registered(7)).await;
        let _third = third.await.unwrap();
        assert_eq!(first.await.unwrap().due_ms, 7);
    }

    #[tokio::test]
    async fn what_was_not_done_waits_for_its_turn_no_longer_than_its_deadline() {
        let fake = Fake::start().await;
        let request_timeout = Duration::from_millis(200);
        let (client, mut peer) = fake.connect(Options { inflight_max: 1, request_timeout, ..fake.options() }).await;
        let first = tokio::spawn(client.register_nowait(in_a_second()).await.unwrap());
        let mut second = Box::pin(client.register_nowait(in_a_second()));
        assert!(poll_once(second.as_mut()).await.is_none(), "it is next, and stays so");
        let request = peer.next().await.unwrap();
        let detail = Some(proto::Detail { retry_after_ms: 1, ..Default::default() });
        let no_room = proto::RegistrationResponse { status: Status::Overloaded.into(), detail, ..Default::default() };
        peer.send(request.request_id, Payload::RegistrationResponse(no_room)).await;
        assert_eq!(first.await.unwrap().unwrap_err().status(), Some(Status::Overloaded), "as it was told");
    }

    async fn poll_once<F: Future>(mut future: Pin<&mut F>) -> Option<F::Output> {
        std::future::poll_fn(|context| match future.as_mut().poll(context) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending => Poll::Ready(None),
        })
        .await
    }

    #[tokio::test]
    async fn an_expired_session_is_opened_again_once_for_all() {
        let fake = Fake::start().await;
        let (client, mut peer) = fake.connect(fake.options()).await;
        let waiting = register_many(&client, 3).await;
        let serve = async {
            for _ in 0..3 {
                let request = peer.next().await.unwrap();
                peer.send(request.request_id, fake::refused(Status::SessionExpired, "session expired")).await;
            }
            peer.welcome("session-2", 0).await;
            for _ in 0..3 {
                let request = peer.next().await.unwrap();
                assert_eq!(request.session_id, "session-2");
                assert!(
                    matches!(request.payload, Some(Payload::RegistrationRequest(_))),
                    "one handshake for all three"
                );
                peer.send(request.request_id, fake::registered(9)).await;
            }
            &mut peer
        };
        let (peer, ()) = tokio::join!(serve, async {
            for answer in waiting {
                assert_eq!(answer.await.unwrap().unwrap().due_ms, 9);
            }
        });
        // A third refusal in a row is the caller's to see.
        let ((), result) = tokio::join!(
            async {
                for session in ["session-3", "session-4"] {
                    let request = peer.next().await.unwrap();
                    peer.send(request.request_id, fake::refused(Status::Unauthorized, "unknown session")).await;
                    peer.welcome(session, 0).await;
                }
                let request = peer.next().await.unwrap();
                peer.send(request.request_id, fake::refused(Status::SessionExpired, "again")).await;
            },
            client.register(in_a_second())
        );
        assert_eq!(result.unwrap_err().status(), Some(Status::SessionExpired));
    }

    type Waiting = tokio::task::JoinHandle<Result<super::super::Registered, ClientError>>;

    async fn register_many(client: &Client, count: usize) -> Vec<Waiting> {
        let mut waiting = Vec::new();
        for _ in 0..count {
            let answer = client.register_nowait(in_a_second()).await.unwrap();
            waiting.push(tokio::spawn(answer));
        }
        waiting
    }

    fn now_ms() -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
    }

    fn refreshed(new_expires_at_ms: u64) -> Payload {
        Payload::SessionRefreshResponse(proto::SessionRefreshResponse { new_expires_at_ms, ..Default::default() })
    }

    #[tokio::test]
    async fn the_session_is_refreshed_before_it_expires() {
        let fake = Fake::start().await;
        let (client, mut peer) = fake.connect_until(fake.options(), now_ms() + 200).await;
        let request = peer.next().await.unwrap();
        assert!(matches!(request.payload, Some(Payload::SessionRefresh(_))));
        peer.send(request.request_id, refreshed(now_ms() + 200)).await;
        // The second one is refused: the session is opened anew without any request having failed.
        let request = peer.next().await.unwrap();
        assert!(matches!(request.payload, Some(Payload::SessionRefresh(_))));
        peer.send(request.request_id, fake::refused(Status::SessionExpired, "gone")).await;
        peer.welcome("session-2", now_ms() + 200).await;
        let request = peer.next().await.unwrap();
        assert!(matches!(request.payload, Some(Payload::SessionRefresh(_))));
        assert_eq!(request.session_id, "session-2");
        peer.send(request.request_id, refreshed(now_ms() + 3_600_000)).await;
        let ((), expires) = tokio::join!(
            async {
                let request = peer.next().await.unwrap();
                assert_eq!(request.session_id, "session-2");
                peer.send(request.request_id, refreshed(5)).await;
            },
            client.refresh()
        );
        assert_eq!(expires.unwrap(), 5);
    }

    #[tokio::test]
    async fn a_broken_connection_fails_what_is_under_way_and_is_made_anew() {
        let fake = Fake::start().await;
        let (client, mut peer) = fake.connect(fake.options()).await;
        let answer = client.register_nowait(in_a_second()).await.unwrap();
        peer.next().await.unwrap();
        drop(peer);
        let error = answer.await.unwrap_err();
        assert!(matches!(error, ClientError::ConnectionLost { .. }), "{error}");

        let (registered, ()) = tokio::join!(client.register(in_a_second()), async {
            let mut peer = fake.accept().await;
            peer.welcome("session-b", 0).await;
            let request = peer.next().await.unwrap();
            assert_eq!((request.session_id.as_str(), request.request_id), ("session-b", 2));
            peer.send(request.request_id, fake::registered(3)).await;
        });
        assert_eq!(registered.unwrap().due_ms, 3);
    }

    #[tokio::test]
    async fn a_dead_address_is_passed_over() {
        let fake = Fake::start().await;
        let mut options = fake.options();
        options.addresses.insert(0, fake::dead_address().to_string());
        let (client, _peer) = fake.connect(options).await;
        drop(client);

        let dead = Options { addresses: vec![fake::dead_address().to_string()], ..fake.options() };
        let error = Client::connect(dead).await.unwrap_err();
        assert!(matches!(error, ClientError::Connect { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_request_without_a_node_gives_up_at_its_deadline() {
        let fake = Fake::start().await;
        let options = Options { request_timeout: Duration::from_millis(200), ..fake.options() };
        let (client, peer) = fake.connect(options).await;
        drop((fake, peer));
        let started = Instant::now();
        // The first one may still meet the old connection.
        let mut error = client.register(in_a_second()).await.unwrap_err();
        if matches!(error, ClientError::ConnectionLost { .. }) {
            error = client.register(in_a_second()).await.unwrap_err();
        }
        assert!(matches!(error, ClientError::Connect { .. }), "{error}");
        assert!(started.elapsed() < Duration::from_secs(5));
    }

    #[tokio::test]
    async fn a_slow_answer_is_a_timeout_and_its_late_arrival_harmless() {
        let fake = Fake::start().await;
        let options = Options { request_timeout: Duration::from_millis(50), ..fake.options() };
        let (client, mut peer) = fake.connect(options).await;
        let error = client.register(in_a_second()).await.unwrap_err();
        assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
        let late = peer.next().await.unwrap();
        let answer = client.register_nowait(in_a_second()).await.unwrap();
        let request = peer.next().await.unwrap();
        peer.send(late.request_id, fake::registered(1)).await;
        peer.send(request.request_id, fake::registered(2)).await;
        assert_eq!(answer.await.unwrap().due_ms, 2);
    }

    #[tokio::test]
    async fn nonsense_ends_the_connection_with_its_reason() {
        let fake = Fake::start().await;
        let (client, mut peer) = fake.connect(fake.options()).await;
        for (request_id, answer, why) in [
            (0, fake::registered(1), "without a request number"),
            (99, fake::registered(1), "never sent"),
            (0, fake::refused(Status::InvalidRequest, "bad frame"), "bad frame"),
        ] {
            let waiting = tokio::spawn({
                let client = client.clone();
                async move { client.register(in_a_second()).await }
            });
            if !matches!(peer.next().await, Some(request) if request.request_id == 2) {
                peer = fake.accept().await;
                peer.welcome("session-n", 0).await;
                peer.next().await.unwrap();
            }
            peer.send(request_id, answer).await;
            let error = waiting.await.unwrap().unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[tokio::test]
    async fn close_waits_for_what_is_under_way_and_refuses_the_rest() {
        let fake = Fake::start().await;
        let (client, mut peer) = fake.connect(fake.options()).await;
        let answer = client.register_nowait(in_a_second()).await.unwrap();
        let other = client.clone();
        let request = peer.next().await.unwrap();
        let ((), ()) = tokio::join!(client.close(), peer.send(request.request_id, fake::registered(4)));
        assert_eq!(answer.await.unwrap().due_ms, 4);
        assert!(matches!(other.register(in_a_second()).await, Err(ClientError::Closed)));
        assert!(peer.next().await.is_none(), "the socket is closed");
    }

    #[tokio::test]
    async fn the_last_handle_takes_the_connection_along() {
        let fake = Fake::start().await;
        let (client, mut peer) = fake.connect(fake.options()).await;
        drop(client);
        assert!(peer.next().await.is_none());
    }

    #[tokio::test]
    async fn a_request_too_large_is_not_sent() {
        let fake = Fake::start().await;
        let (client, _peer) = fake.connect(Options { frame_bytes_max: 1024, ..fake.options() }).await;
        let large = Registration { payload: Bytes::from(vec![0; 1024]), ..in_a_second() };
        assert!(matches!(client.register(large).await, Err(ClientError::TooLarge { .. })));
    }
}
