use prost::Message;
use tokio::net::UdpSocket;
use tokio::time::timeout;

use super::super::udp::DATAGRAM_BYTES_MAX;
use super::*;
use crate::wire::proto::CallbackRequest;

fn acknowledged(address: SocketAddr) -> Callback {
    with(&format!("udp://{address}"), CallbackOptions { acknowledge: true, ..CallbackOptions::default() })
}

async fn request(socket: &UdpSocket) -> (CallbackRequest, SocketAddr) {
    let mut buffer = vec![0; 65_536];
    let (bytes, from) = timeout(PATIENCE, socket.recv_from(&mut buffer)).await.unwrap().unwrap();
    (CallbackRequest::decode(&buffer[..bytes]).unwrap(), from)
}

async fn receiver(answer: impl Fn(&CallbackRequest) -> Vec<u8> + Send + 'static) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (request, from) = request(&socket).await;
            socket.send_to(&answer(&request), from).await.unwrap();
        }
    });
    address
}

fn response(status: i32, text: &str) -> Vec<u8> {
    CallbackResponse { status, error_message: text.into() }.encode_to_vec()
}

#[tokio::test]
async fn a_datagram_that_has_left_is_enough_without_an_acknowledgement() {
    let callbacks = sockets(settings());
    for any in ["127.0.0.1:0", "[::1]:0"] {
        // A machine without IPv6 has half of this test.
        let Ok(socket) = UdpSocket::bind(any).await else { continue };
        let to = callback(&format!("udp://{}", socket.local_addr().unwrap()));
        for number in 1..=3 {
            attempt(&callbacks, delivery(to.clone(), number)).await.unwrap();
            let (request, _) = request(&socket).await;
            assert_eq!((request.task_id, request.fence_seq), (ticket(number).task.to_string(), number));
            assert_eq!(request.payload, format!("payload {number}"));
        }
    }
    let to = callback("udp://no-such-host.invalid:9");
    assert_failed(once(&callbacks, &to).await, FailureClass::Unreachable, &["no-such-host.invalid:9"]);
}

#[tokio::test]
async fn an_acknowledgement_is_waited_for_when_it_is_wanted() {
    let callbacks = sockets(impatient());
    let to = acknowledged(receiver(|_| response(0, "")).await);
    once(&callbacks, &to).await.unwrap();
    let to = acknowledged(receiver(|request| response(1, &format!("not {}", request.occurrence))).await);
    assert_failed(once(&callbacks, &to).await, FailureClass::BadStatus, &["the receiver answered ERROR: not 7"]);
    let to = acknowledged(receiver(|_| response(99, "")).await);
    assert_failed(once(&callbacks, &to).await, FailureClass::BadStatus, &["answered 99"]);
    let to = acknowledged(receiver(|_| vec![0xff; 5]).await);
    assert_failed(once(&callbacks, &to).await, FailureClass::BadAnswer, &["not a callback response"]);
    let deaf = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let to = acknowledged(deaf.local_addr().unwrap());
    assert_failed(once(&callbacks, &to).await, FailureClass::Timeout, &["no answer within 150 ms"]);
    let gone = deaf.local_addr().unwrap();
    drop(deaf);
    assert_failed(once(&callbacks, &acknowledged(gone)).await, FailureClass::Refused, &[&gone.to_string(), "nobody"]);
}

#[tokio::test]
async fn answers_reach_the_attempt_they_are_for_and_strangers_are_not_heard() {
    let callbacks = sockets(settings());
    let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
    let to = acknowledged(socket.local_addr().unwrap());
    let attempts: Vec<_> = (0..50)
        .map(|number| {
            let (callbacks, delivery) = (callbacks.clone(), delivery(to.clone(), number));
            tokio::spawn(async move { attempt(&callbacks, delivery).await })
        })
        .collect();
    let mut asked = Vec::new();
    for _ in 0..50 {
        asked.push(request(&socket).await);
    }
    let stranger = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for (request, from) in asked.iter().rev() {
        stranger.send_to(&response(1, "a stranger"), from).await.unwrap();
        let odd = request.fence_seq % 2 == 1;
        socket.send_to(&response(i32::from(odd), "odd"), from).await.unwrap();
    }
    for (number, attempt) in attempts.into_iter().enumerate() {
        let ended = attempt.await.unwrap();
        if number % 2 == 1 {
            assert_failed(ended, FailureClass::BadStatus, &["odd"]);
        } else {
            ended.unwrap();
        }
    }
}

#[tokio::test]
async fn what_fits_no_datagram_is_not_sent() {
    let callbacks = sockets(settings());
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let to = callback(&format!("udp://{}", socket.local_addr().unwrap()));
    let sized = |bytes: usize| Delivery { payload: Bytes::from(vec![b'x'; bytes]), ..delivery(to.clone(), 1) };
    let frame = crate::wire::convert::callback_request(&sized(60_000)).encoded_len() - 60_000;
    attempt(&callbacks, sized(DATAGRAM_BYTES_MAX - frame)).await.unwrap();
    assert_eq!(request(&socket).await.0.payload.len(), DATAGRAM_BYTES_MAX - frame);
    let ended = attempt(&callbacks, sized(DATAGRAM_BYTES_MAX - frame + 1)).await;
    assert_failed(ended, FailureClass::TooLarge, &["65508 bytes", "65507"]);
}
