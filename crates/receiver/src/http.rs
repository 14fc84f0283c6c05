//! Callbacks over HTTP: any path, POST; HTTP/1.1, or HTTP/2 from the start, without TLS.
//!
//! The body is the payload, and the `X-Boomerang-*` headers say the rest. A success is 204, a refusal has its status,
//! its reason as the body, and `Retry-After` when it names one.

use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::time::SystemTime;

use axum::Router;
use axum::body::to_bytes;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::serve::ListenerExt;
use tokio::net::TcpListener;

use super::{DeadLetterCopy, Handler, HttpRequest, PAYLOAD_BYTES_MAX, Received, Refusal, Reply, Shared, signature};
use boomerang_task::{Fence, Protocol};
use boomerang_wire::proto::Status;

pub(super) async fn serve<H: Handler>(listener: TcpListener, shared: Arc<Shared<H>>) {
    let (finish, stop) = (shared.finish.clone(), shared.stop.clone());
    let app = Router::new().fallback(take::<H>).with_state(shared).into_make_service_with_connect_info::<SocketAddr>();
    let listener = listener.tap_io(|stream| {
        // Only a delay of answers would come of a failure.
        let _ = stream.set_nodelay(true);
    });
    let serving = axum::serve(listener, app).with_graceful_shutdown(finish.cancelled_owned());
    let _ = stop.run_until_cancelled_owned(serving.into_future()).await;
}

async fn take<H: Handler>(
    State(shared): State<Arc<Shared<H>>>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
    request: Request,
) -> Response {
    let arrived_at = SystemTime::now();
    match received(&shared, request, from, arrived_at).await {
        Ok(received) => match shared.reply(received).await {
            Reply::Accept => StatusCode::NO_CONTENT.into_response(),
            Reply::Refuse(refusal) => refused(&refusal),
            Reply::Silence => refused(&Refusal::with(Status::Overloaded, "the receiver has ended")),
        },
        Err(refusal) => {
            shared.handler.refused(from, &refusal.reason);
            refused(&refusal)
        }
    }
}

/// Reads a delivery out of a request; what is wrong with it is refused.
async fn received<H: Handler>(
    shared: &Shared<H>,
    request: Request,
    from: SocketAddr,
    arrived_at: SystemTime,
) -> Result<Received, Refusal> {
    let (parts, body) = request.into_parts();
    if parts.method != Method::POST {
        let refusal = Refusal::with(Status::InvalidRequest, format!("{} is not POST", parts.method));
        return Err(Refusal { http_status: Some(405), ..refusal });
    }
    let payload = to_bytes(body, PAYLOAD_BYTES_MAX)
        .await
        .map_err(|error| Refusal::with(Status::InvalidRequest, format!("the body cannot be read: {error}")))?;
    let headers = parts.headers;
    if let Some(secret) = &shared.secret {
        signature::verify(secret, &headers, &payload, arrived_at)
            .map_err(|why| Refusal::with(Status::Unauthorized, why))?;
    }
    let task_id = text(&headers, "x-boomerang-task-id")
        .ok_or_else(|| Refusal::with(Status::InvalidRequest, "no header X-Boomerang-Task-Id: this is no delivery"))?
        .parse()
        .map_err(|error| Refusal::with(Status::InvalidRequest, format!("X-Boomerang-Task-Id: {error}")))?;
    Ok(Received {
        protocol: Protocol::Http,
        task_id,
        client_id: text(&headers, "x-boomerang-client-id").unwrap_or_default(),
        name: text(&headers, "x-boomerang-name").unwrap_or_default(),
        payload,
        occurrence: number(&headers, "X-Boomerang-Occurrence")?,
        attempt: number(&headers, "X-Boomerang-Attempt")?,
        due_ms: number(&headers, "X-Boomerang-Due")?,
        fence: fence(&headers)?,
        dead_letter: match text(&headers, "x-boomerang-dead-letter") {
            None => None,
            Some(id) => Some(DeadLetterCopy {
                id,
                attempts: number(&headers, "X-Boomerang-Dead-Attempts")?,
                error: text(&headers, "x-boomerang-dead-error").unwrap_or_default(),
            }),
        },
        request_id: 0,
        from,
        arrived_at,
        http: Some(HttpRequest {
            target: parts.uri.to_string(),
            version: parts.version,
            headers,
            signed: shared.secret.is_some(),
        }),
    })
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).map(|value| decoded(value.as_bytes()))
}

/// What is not visible ASCII comes percent-encoded.
fn decoded(value: &[u8]) -> String {
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value;
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail.get(..2).filter(|_| *first == b'%').and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// 0 when it is missing.
fn number<T: FromStr + Default>(headers: &HeaderMap, name: &str) -> Result<T, Refusal> {
    match text(headers, name) {
        None => Ok(T::default()),
        Some(text) => {
            text.parse().map_err(|_| Refusal::with(Status::InvalidRequest, format!("{name}: '{text}' is not a number")))
        }
    }
}

fn fence(headers: &HeaderMap) -> Result<Fence, Refusal> {
    let Some(text) = text(headers, "x-boomerang-fence") else { return Ok(Fence { term: 0, seq: 0 }) };
    let parts = text.split_once('.').and_then(|(term, seq)| Some((term.parse().ok()?, seq.parse().ok()?)));
    let (term, seq) = parts.ok_or_else(|| {
        Refusal::with(Status::InvalidRequest, format!("X-Boomerang-Fence: '{text}' is not <term>.<seq>"))
    })?;
    Ok(Fence { term, seq })
}

fn refused(refusal: &Refusal) -> Response {
    let status = StatusCode::from_u16(refusal.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = (status, refusal.reason.clone()).into_response();
    if let Some(after) = refusal.retry_after {
        // Whole seconds are all the header can say; a shorter pause would be none.
        let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

#[cfg(test)]
mod tests {
    use boomerang_task::locks::Mutex;
    use std::time::Duration;

    use bytes::Bytes;

    use super::super::{Answer, Receiver};
    use super::*;
    use boomerang_client::fake::task_id;
    use boomerang_task::Secret;

    /// Notes what was taken, and why other things were refused.
    #[derive(Default)]
    struct Notes {
        taken: Mutex<Vec<Received>>,
        refused: Mutex<Vec<String>>,
    }

    struct Taker(Arc<Notes>, Reply);

    impl Handler for Taker {
        fn take(&self, received: &Received) -> Answer {
            self.0.taken.lock().push(received.clone());
            self.1.clone().into()
        }

        fn refused(&self, _from: SocketAddr, why: &str) {
            self.0.refused.lock().push(why.to_owned());
        }
    }

    async fn start(secret: Option<Secret>, reply: Reply) -> (Receiver, Arc<Notes>, String) {
        let notes = Arc::new(Notes::default());
        let handler = Taker(notes.clone(), reply);
        let receiver = Receiver::listen(Protocol::Http, "127.0.0.1:0", secret, handler).await.unwrap();
        let url = format!("http://{}/hook?x=1", receiver.local_addr());
        (receiver, notes, url)
    }

    fn client(http2: bool) -> reqwest::Client {
        // A second provider is refused, and the first is the same one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let builder = reqwest::Client::builder();
        if http2 { builder.http2_prior_knowledge() } else { builder }.build().unwrap()
    }

    fn delivery(client: &reqwest::Client, url: &str) -> reqwest::RequestBuilder {
        client
            .post(url)
            .header("X-Boomerang-Task-Id", task_id(7).to_string())
            .header("X-Boomerang-Client-Id", "orders")
            .header("X-Boomerang-Occurrence", "4")
            .header("X-Boomerang-Attempt", "2")
            .header("X-Boomerang-Due", "1700000000000")
            .header("X-Boomerang-Fence", "3.17")
            .header("X-Boomerang-Name", "n%C3%A4chtlich 100%25 %")
            .header("X-Boomerang-Dead-Letter", "some@1")
            .header("X-Boomerang-Dead-Attempts", "5")
            .header("X-Boomerang-Dead-Error", "refused: nobody listens")
            .body("hello")
    }

    #[tokio::test]
    async fn headers_say_what_the_body_does_not() {
        let (_receiver, notes, url) = start(None, Reply::Accept).await;
        for http2 in [false, true] {
            let answer = delivery(&client(http2), &url).send().await.unwrap();
            assert_eq!(answer.status(), 204);
            let received = notes.taken.lock().pop().unwrap();
            assert_eq!((received.task_id, received.client_id.as_str()), (task_id(7), "orders"));
            assert_eq!((received.occurrence, received.attempt, received.due_ms), (4, 2, 1_700_000_000_000));
            assert_eq!((received.fence, received.payload), (Fence { term: 3, seq: 17 }, Bytes::from("hello")));
            assert_eq!(received.name, "n\u{e4}chtlich 100% %");
            let copy = received.dead_letter.unwrap();
            assert_eq!(
                (copy.id.as_str(), copy.attempts, copy.error.as_str()),
                ("some@1", 5, "refused: nobody listens")
            );
            let http = received.http.unwrap();
            assert_eq!((http.version == axum::http::Version::HTTP_2, http.signed), (http2, false));
            assert!(http.target.ends_with("/hook?x=1"), "{}", http.target);
        }
    }

    #[tokio::test]
    async fn a_refusal_has_its_status_and_says_when_to_come_back() {
        let refusal =
            Refusal { http_status: Some(429), retry_after: Some(Duration::from_millis(1500)), ..Refusal::new("busy") };
        let (_receiver, _, url) = start(None, Reply::Refuse(refusal)).await;
        let answer = delivery(&client(false), &url).send().await.unwrap();
        assert_eq!((answer.status().as_u16(), answer.headers()["retry-after"].to_str().unwrap()), (429, "2"));
        assert_eq!(answer.text().await.unwrap(), "busy");
    }

    #[tokio::test]
    async fn what_is_no_delivery_is_refused() {
        let (_receiver, notes, url) = start(None, Reply::Accept).await;
        let client = client(false);
        assert_eq!(client.get(&url).send().await.unwrap().status(), 405);
        assert_eq!(client.post(&url).send().await.unwrap().status(), 400);
        for (name, value) in [("X-Boomerang-Task-Id", "x"), ("X-Boomerang-Due", "soon"), ("X-Boomerang-Fence", "3")] {
            let mut request = delivery(&client, &url).build().unwrap();
            request.headers_mut().insert(name, value.parse().unwrap());
            let answer = client.execute(request).await.unwrap();
            assert_eq!(answer.status(), 400);
            assert!(answer.text().await.unwrap().starts_with(name));
        }
        assert!(notes.taken.lock().is_empty());
        assert_eq!(notes.refused.lock().len(), 5);
    }

    #[tokio::test]
    async fn with_a_secret_only_what_is_signed_is_taken() {
        let secret = Secret::new("whsec_c2VjcmV0IGtleQ==").unwrap();
        let (_receiver, notes, url) = start(Some(secret.clone()), Reply::Accept).await;
        let client = client(false);
        assert_eq!(delivery(&client, &url).send().await.unwrap().status(), 401);
        let timestamp = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        for (body, status) in [("hello", 204), ("hell", 401)] {
            let answer = delivery(&client, &url)
                .header("webhook-id", "msg_1")
                .header("webhook-timestamp", timestamp.to_string())
                .header("webhook-signature", signature::sign(&secret, "msg_1", timestamp, body.as_bytes()))
                .send()
                .await
                .unwrap();
            assert_eq!(answer.status(), status, "signed for '{body}', sent 'hello'");
        }
        let taken = notes.taken.lock();
        assert!(taken.len() == 1 && taken[0].http.as_ref().unwrap().signed);
    }

    #[tokio::test]
    async fn silence_lasts_until_the_end() {
        let (receiver, notes, url) = start(None, Reply::Silence).await;
        let sending = tokio::spawn(delivery(&client(false), &url).send());
        while notes.taken.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        receiver.finish().await;
        assert_eq!(sending.await.unwrap().unwrap().status(), 503);
    }
}
