//! Callbacks over TCP: frames, as clients speak them too.
//!
//! The instant of arrival is taken once per read, right after it. Many deliveries come in one read and their answers
//! leave in one write. A numbered delivery (`request_id`) is answered when its answer is ready; one without a number is
//! answered in the order of arrival, as the original protocol has it: a delayed answer then holds back the ones behind
//! it.
//!
//! A connection neither reads nor answers while its handler or its channel keeps it waiting: that is the back-pressure.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tokio_util::codec::Decoder;

use super::{Handler, Received, Shared, response};
use boomerang_task::Protocol;
use boomerang_wire::proto::{self, BoomerangEnvelope, Status, boomerang_envelope::Payload};
use boomerang_wire::{FRAME_BYTES_MAX, decode_envelope, encode_frame, frame_codec};

const READ_BYTES: usize = 64 * 1024;

/// After a failed accept, which is nearly always a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

pub(super) async fn accept<H: Handler>(listener: TcpListener, shared: Arc<Shared<H>>) {
    loop {
        let accepted = tokio::select! {
            () = shared.finish.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, from)) = accepted else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        // Only a delay of answers would come of a failure.
        let _ = stream.set_nodelay(true);
        let connection = Connection {
            stream,
            from,
            shared: shared.clone(),
            out: BytesMut::new(),
            delayed: BTreeMap::new(),
            delayed_count: 0,
            unnumbered_at: None,
        };
        let stop = shared.stop.clone();
        // A connection that breaks is the sender's to make anew; there is nobody here to be told.
        shared.connections.spawn(async move { stop.run_until_cancelled_owned(connection.serve()).await });
    }
}

struct Connection<H> {
    stream: TcpStream,
    from: SocketAddr,
    shared: Arc<Shared<H>>,
    /// Answers that leave with the next write.
    out: BytesMut,
    /// Answers that wait for their time, by time and then by arrival.
    delayed: BTreeMap<(Instant, u64), BoomerangEnvelope>,
    /// Makes the keys of `delayed` differ.
    delayed_count: u64,
    /// When the last delayed answer without a number leaves: none may overtake it.
    unnumbered_at: Option<Instant>,
}

impl<H: Handler> Connection<H> {
    async fn serve(mut self) -> io::Result<()> {
        let mut codec = frame_codec(FRAME_BYTES_MAX);
        let mut input = BytesMut::with_capacity(READ_BYTES);
        // Until the sender has said its last word, or this side wants no more.
        let mut reading = true;
        while reading || !self.delayed.is_empty() {
            input.reserve(READ_BYTES);
            let next = self.delayed.first_key_value().map(|((at, _), _)| *at);
            let finish = self.shared.finish.clone();
            tokio::select! {
                read = self.stream.read_buf(&mut input), if reading => {
                    let arrived_at = SystemTime::now();
                    if read? == 0 {
                        reading = false;
                    }
                    while let Some(frame) = codec.decode(&mut input)? {
                        if !self.take(frame.freeze(), arrived_at).await {
                            self.stream.write_all(&self.out).await?;
                            return Ok(());
                        }
                    }
                }
                () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
                () = finish.cancelled(), if reading => reading = false,
            }
            self.release(Instant::now());
            if !self.out.is_empty() {
                self.stream.write_all(&self.out).await?;
                self.out.clear();
            }
        }
        self.stream.shutdown().await
    }

    /// One frame. False when the connection has no future.
    async fn take(&mut self, frame: Bytes, arrived_at: SystemTime) -> bool {
        let envelope = match decode_envelope(frame) {
            Ok(envelope) => envelope,
            Err(error) => {
                self.refuse(0, &format!("not an envelope: {error}"));
                self.release(Instant::now());
                return false;
            }
        };
        let request_id = envelope.request_id;
        let Some(Payload::CallbackRequest(request)) = envelope.payload else {
            self.refuse(request_id, "this is a receiver: it takes callback_request only");
            return true;
        };
        let received = match Received::of(request, Protocol::Tcp, request_id, self.from, arrived_at) {
            Ok(received) => received,
            Err(error) => {
                let why = error.to_string();
                self.shared.handler.refused(self.from, &why);
                let response = response(Status::InvalidRequest, &why);
                self.queue(request_id, Payload::CallbackResponse(response), Duration::ZERO);
                return true;
            }
        };
        let Some(answer) = self.shared.take(received).await else { return false };
        if let Some(response) = answer.reply.response() {
            self.queue(request_id, Payload::CallbackResponse(response), answer.delay);
        }
        true
    }

    /// What is no delivery.
    fn refuse(&mut self, request_id: u64, why: &str) {
        self.shared.handler.refused(self.from, why);
        let (status, error_message) = (Status::InvalidRequest.into(), why.to_owned());
        let refusal = Payload::ErrorResponse(proto::ErrorResponse { status, error_message });
        self.queue(request_id, refusal, Duration::ZERO);
    }

    /// Puts an answer into the next write, or aside until its time.
    fn queue(&mut self, request_id: u64, payload: Payload, delay: Duration) {
        let envelope = BoomerangEnvelope { session_id: String::new(), payload: Some(payload), request_id };
        let mut at = (!delay.is_zero()).then(|| Instant::now() + delay);
        if request_id == 0 {
            at = at.max(self.unnumbered_at);
            self.unnumbered_at = at;
        }
        match at {
            None => encode_frame(&envelope, &mut self.out),
            Some(at) => {
                self.delayed_count += 1;
                self.delayed.insert((at, self.delayed_count), envelope);
            }
        }
    }

    /// Moves the answers whose time has come into the next write.
    fn release(&mut self, now: Instant) {
        while let Some(entry) = self.delayed.first_entry().filter(|entry| entry.key().0 <= now) {
            encode_frame(&entry.remove(), &mut self.out);
        }
        // An answer yet to come may leave at once when all before it have left.
        if self.unnumbered_at.is_some_and(|at| at <= now) {
            self.unnumbered_at = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::super::{Answer, Receiver, Reply};
    use super::*;
    use boomerang_client::fake::{Peer, callback_request, task_id};
    use boomerang_task::Fence;
    use boomerang_wire::proto::CallbackRequest;

    async fn sender(receiver: &Receiver) -> Peer {
        Peer::new(TcpStream::connect(receiver.local_addr()).await.unwrap())
    }

    fn delivery(random: u64) -> Payload {
        Payload::CallbackRequest(callback_request(random))
    }

    fn frames(deliveries: impl IntoIterator<Item = (u64, u64)>) -> BytesMut {
        let mut out = BytesMut::new();
        for (request_id, random) in deliveries {
            let payload = Some(delivery(random));
            encode_frame(&BoomerangEnvelope { session_id: String::new(), payload, request_id }, &mut out);
        }
        out
    }

    fn status(envelope: &BoomerangEnvelope) -> (u64, Status, &str) {
        let Some(Payload::CallbackResponse(response)) = &envelope.payload else { panic!("{envelope:?}") };
        (envelope.request_id, response.status(), &response.error_message)
    }

    #[tokio::test]
    async fn many_deliveries_in_one_write_are_taken_and_answered() {
        let (receiver, mut channel) = Receiver::channel("127.0.0.1:0", 1000).await.unwrap();
        let mut sender = sender(&receiver).await;
        sender.send_raw(&frames((1..=500).map(|n| (n, n)))).await;
        for n in 1..=500 {
            assert_eq!(status(&sender.next().await.unwrap()), (n, Status::Ok, ""));
            let received = channel.recv().await.unwrap();
            assert_eq!((received.task_id, received.payload), (task_id(n), Bytes::from(n.to_string())));
            assert_eq!((received.attempt, received.due_ms), (1, 1_000));
            assert_eq!(received.fence, Fence { term: 3, seq: n });
        }
    }

    #[tokio::test]
    async fn an_original_sender_gets_its_answers_in_order() {
        // The first answer is delayed, the others would be ready at once.
        let handler = |received: &Received| match received.payload.as_ref() {
            b"1" => Answer { reply: Reply::Accept, delay: Duration::from_millis(30) },
            text => Reply::refuse(String::from_utf8_lossy(text)).into(),
        };
        let receiver = Receiver::bind("127.0.0.1:0", handler).await.unwrap();
        let mut original = sender(&receiver).await;
        original.send_raw(&frames([(0, 1), (0, 2), (0, 3)])).await;
        assert_eq!(status(&original.next().await.unwrap()), (0, Status::Ok, ""));
        assert_eq!(status(&original.next().await.unwrap()), (0, Status::Error, "2"));
        assert_eq!(status(&original.next().await.unwrap()), (0, Status::Error, "3"));

        let mut ours = sender(&receiver).await;
        ours.send_raw(&frames([(7, 1), (8, 2)])).await;
        assert_eq!(status(&ours.next().await.unwrap()), (8, Status::Error, "2"), "a numbered answer does not wait");
        assert_eq!(status(&ours.next().await.unwrap()), (7, Status::Ok, ""));
    }

    #[tokio::test]
    async fn a_frame_may_come_byte_by_byte() {
        let (receiver, mut channel) = Receiver::channel("127.0.0.1:0", 10).await.unwrap();
        let mut sender = sender(&receiver).await;
        for byte in frames([(1, 1), (2, 2)]) {
            sender.send_raw(&[byte]).await;
        }
        assert_eq!(channel.recv().await.unwrap().task_id, task_id(1));
        assert_eq!(channel.recv().await.unwrap().task_id, task_id(2));
        assert_eq!(sender.next().await.unwrap().request_id, 1);
    }

    #[tokio::test]
    async fn what_is_no_delivery_is_refused() {
        let receiver = Receiver::bind("127.0.0.1:0", |_: &Received| Reply::Accept.into()).await.unwrap();
        let mut sender = sender(&receiver).await;
        sender.send(5, Payload::GetTaskRequest(Default::default())).await;
        let answer = sender.next().await.unwrap();
        assert!(matches!(answer.payload, Some(Payload::ErrorResponse(_))) && answer.request_id == 5);
        sender.send(6, Payload::CallbackRequest(CallbackRequest { task_id: "x".into(), ..Default::default() })).await;
        assert_eq!(status(&sender.next().await.unwrap()).1, Status::InvalidRequest);
        sender.send_raw(&[0, 0, 0, 1, 0xff]).await;
        assert!(matches!(sender.next().await.unwrap().payload, Some(Payload::ErrorResponse(_))));
        assert!(sender.next().await.is_none());
    }

    #[tokio::test]
    async fn finish_answers_what_was_taken() {
        let (taken, mut taken_count) = mpsc::unbounded_channel();
        let handler = move |_: &Received| {
            taken.send(()).unwrap();
            Answer { reply: Reply::Accept, delay: Duration::from_millis(30) }
        };
        let receiver = Receiver::bind("127.0.0.1:0", handler).await.unwrap();
        let mut sender = sender(&receiver).await;
        sender.send_raw(&frames([(1, 1), (2, 2)])).await;
        taken_count.recv().await.unwrap();
        taken_count.recv().await.unwrap();
        receiver.finish().await;
        assert_eq!(sender.next().await.unwrap().request_id, 1);
        assert_eq!(sender.next().await.unwrap().request_id, 2);
        assert!(sender.next().await.is_none());
    }

    #[tokio::test]
    async fn a_sender_that_hangs_up_is_forgotten_and_a_dropped_receiver_hangs_up() {
        let (receiver, mut channel) = Receiver::channel("127.0.0.1:0", 10).await.unwrap();
        drop(sender(&receiver).await);
        let mut other = sender(&receiver).await;
        other.send_raw(&frames([(1, 1)])).await;
        channel.recv().await.unwrap();
        assert_eq!(other.next().await.unwrap().request_id, 1);
        drop(receiver);
        assert!(other.next().await.is_none());
    }
}
