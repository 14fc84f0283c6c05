use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::BytesMut;
use futures::StreamExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_util::codec::Framed;

use super::*;
use crate::wire::proto::{BoomerangEnvelope, boomerang_envelope::Payload};
use crate::wire::{FRAME_BYTES_MAX, decode_envelope, encode_frame, frame_codec};

type Frames = Framed<TcpStream, tokio_util::codec::LengthDelimitedCodec>;

/// What a receiver does with a request.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Does {
    Answers(Status, &'static str),
    /// Without the request's number.
    AnswersAsTheOriginal,
    AnswersSomethingElse,
    Garbage,
    TooMuch,
    HangsUp,
    Nothing,
}

/// `does` is asked with the number of the connection, from 0.
async fn receiver(does: impl Fn(usize) -> Does + Send + Sync + 'static) -> Callback {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (does, connections) = (Arc::new(does), AtomicUsize::new(0));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (does, connection) = (does.clone(), connections.fetch_add(1, Ordering::Relaxed));
            tokio::spawn(async move {
                let mut frames = Framed::new(stream, frame_codec(FRAME_BYTES_MAX));
                while let Some(Ok(frame)) = frames.next().await {
                    let request = decode_envelope(frame.freeze()).unwrap();
                    assert!(matches!(request.payload, Some(Payload::CallbackRequest(_))));
                    if !answer(&mut frames, request.request_id, does(connection)).await {
                        return;
                    }
                }
            });
        }
    });
    callback(&format!("tcp://{address}"))
}

async fn answer(frames: &mut Frames, request_id: u64, does: Does) -> bool {
    let response = |status: Status, text: &str| {
        Payload::CallbackResponse(CallbackResponse { status: status.into(), error_message: text.into() })
    };
    let (request_id, payload) = match does {
        Does::Answers(status, text) => (request_id, response(status, text)),
        Does::AnswersAsTheOriginal => (0, response(Status::Ok, "")),
        Does::AnswersSomethingElse => (request_id, Payload::GetTaskRequest(Default::default())),
        Does::Garbage => return frames.get_mut().write_all(&[0, 0, 0, 1, 0xff]).await.is_ok(),
        Does::TooMuch => return frames.get_mut().write_all(&[0xff; 64]).await.is_ok(),
        Does::HangsUp => return false,
        Does::Nothing => return true,
    };
    let mut out = BytesMut::new();
    encode_frame(&BoomerangEnvelope { session_id: String::new(), payload: Some(payload), request_id }, &mut out);
    frames.get_mut().write_all(&out).await.is_ok()
}

#[tokio::test]
async fn every_end_has_its_class() {
    let callbacks = sockets(impatient());
    let place = |callback: &Callback| callback.endpoint.to_string();
    for does in [Does::Answers(Status::Ok, ""), Does::AnswersAsTheOriginal] {
        let to = receiver(move |_| does).await;
        once(&callbacks, &to).await.unwrap();
        once(&callbacks, &to).await.unwrap();
        let by_name = place(&to).replace("127.0.0.1", "localhost");
        once(&callbacks, &callback(&format!("tcp://{by_name}"))).await.unwrap();
    }
    for (does, class, says) in [
        (Does::Answers(Status::Error, "no stock"), FailureClass::BadStatus, "the receiver answered ERROR: no stock"),
        (Does::AnswersSomethingElse, FailureClass::BadAnswer, "something else than a callback response"),
        (Does::Garbage, FailureClass::BadAnswer, "not an envelope"),
        (Does::TooMuch, FailureClass::BadAnswer, "not a frame"),
        (Does::HangsUp, FailureClass::Broken, "closed before the answer"),
        (Does::Nothing, FailureClass::Timeout, "no answer within 150 ms"),
    ] {
        let to = receiver(move |_| does).await;
        assert_failed(once(&callbacks, &to).await, class, &[&place(&to), says]);
    }
    let to = callback(&format!("tcp://{}", dead_address()));
    assert_failed(once(&callbacks, &to).await, FailureClass::Refused, &[&place(&to), "cannot connect", "refused"]);
    let to = callback("tcp://no-such-host.invalid:9");
    assert_failed(
        once(&callbacks, &to).await,
        FailureClass::Unreachable,
        &["'no-such-host.invalid' cannot be resolved"],
    );
    let options = CallbackOptions { timeout_ms: Some(20), ..CallbackOptions::default() };
    let to = with(&format!("tcp://{}", silent().await), options);
    assert_failed(once(&callbacks, &to).await, FailureClass::Timeout, &["no answer within 20 ms"]);
}

#[tokio::test]
async fn a_connection_for_many_that_has_died_silently_is_not_used_for_long() {
    let callbacks = sockets(CallbackSettings { answer_timeout: Duration::from_millis(1_100), ..settings() });
    let asked = Arc::new(AtomicUsize::new(0));
    let to = receiver({
        let asked = asked.clone();
        move |connection| match (connection, asked.fetch_add(1, Ordering::Relaxed)) {
            (0, 1..) => Does::Nothing,
            _ => Does::Answers(Status::Ok, ""),
        }
    })
    .await;
    once(&callbacks, &to).await.unwrap();
    assert_failed(once(&callbacks, &to).await, FailureClass::Timeout, &[]);
    once(&callbacks, &to).await.unwrap();
    assert_eq!(asked.load(Ordering::Relaxed), 3);
}
