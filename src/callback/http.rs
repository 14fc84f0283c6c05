//! Callbacks over HTTP: one POST per attempt, its body the payload as it is.
//!
//! Everything else about the delivery is in headers, in ASCII: whatever is not, and `%`, is percent-encoded. Any status
//! from 200 to 299 is success. What the receiver says besides is read only as far as a failure's text has room, and as
//! long as a moment: an answer without an end costs its connection, not the attempt.
//!
//! Redirects are ours to follow, because they have to stay what they are: a POST of the payload. So they are followed
//! when the policy says so, except where the receiver asks for something else (303), and never from `https` to `http`.
//! The settings of a proxy in the environment are those of whoever started the node, not of the client whose callback
//! this is: they are ignored.

use std::fmt::Write as _;
use std::sync::OnceLock;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures::future::BoxFuture;
use hmac::{Hmac, KeyInit, Mac};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{
    ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION, RETRY_AFTER, USER_AGENT,
};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::client::legacy;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use percent_encoding::percent_decode_str;
use sha2::Sha256;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tonic::codegen::Service;
use url::Url;

use super::connect::{Connector, Late, NoWay};
use super::trust::Trust;
use super::{Attempt, CallbackSettings, KEEP_ALIVE, USER_AGENT_TEXT, failures};
use crate::task::{Delivery, Failure, FailureClass, Secret};

const REDIRECTS_MAX: usize = 5;
/// How much of an answer's body is read, and for how long.
const BODY_BYTES_MAX: usize = 16 * 1024;
const BODY_WITHIN: Duration = Duration::from_millis(250);
/// How much of it a failure shows.
const BODY_CHARS_SHOWN: usize = 300;
/// What an HTTP/2 receiver may send ahead of our reading it.
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;

type Client = legacy::Client<Bounded, Full<Bytes>>;

/// All connections over HTTP.
pub struct Http {
    settings: CallbackSettings,
    connector: Connector,
    trust: Trust,
    plain: OnceLock<Client>,
    /// HTTP/2 from the first byte, without TLS.
    plain_2: OnceLock<Client>,
    /// The receiver picks the version.
    tls: OnceLock<Client>,
}

impl Http {
    pub fn new(settings: CallbackSettings, connector: Connector, trust: Trust) -> Self {
        Self { settings, connector, trust, plain: OnceLock::new(), plain_2: OnceLock::new(), tls: OnceLock::new() }
    }

    pub async fn deliver(&self, delivery: &Delivery, within: Duration) -> Attempt {
        let callback = &delivery.policy.callback;
        let place = shown(callback.endpoint.as_str());
        let mut url = Url::parse(callback.endpoint.as_str())
            .map_err(|error| Failure::new(FailureClass::Unreachable, format!("{place}: not a URL: {error}")))?;
        let headers = headers(delivery);
        let deadline = Instant::now() + within;
        for _ in 0..=REDIRECTS_MAX {
            let place = shown(url.as_str());
            let client = self.client(&url, callback.options.http2);
            let asked = async {
                let first = client.request(request(&url, &headers, &delivery.payload)?).await;
                match first {
                    // It says that it has not looked at it: the connection is about to be closed.
                    Err(error) if was_not_processed(&error) => {
                        Ok(client.request(request(&url, &headers, &delivery.payload)?).await)
                    }
                    first => Ok(first),
                }
            };
            let asked: Result<Result<_, Failure>, _> = timeout_at(deadline, asked).await;
            let answer = asked.map_err(|_| failures::no_answer(place, within))??;
            let response = answer.map_err(|error| not_sent(place, &error))?;
            let next = if callback.options.follow_redirects { redirect(&url, &response) } else { None };
            let Some(next) = next else { return verdict(place, response, deadline).await };
            if url.scheme() == "https" && next.scheme() != "https" {
                let text = format!("{place}: redirects to http://, which is not followed from https://");
                return Err(Failure::new(FailureClass::BadStatus, text));
            }
            beginning(response, deadline).await;
            url = next;
        }
        Err(Failure::new(FailureClass::BadStatus, format!("{place}: more than {REDIRECTS_MAX} redirects")))
    }

    fn client(&self, url: &Url, http2: bool) -> &Client {
        if url.scheme() == "https" {
            self.tls.get_or_init(|| self.build(&self.trust, false))
        } else if http2 {
            self.plain_2.get_or_init(|| self.build(&Trust::nobody(), true))
        } else {
            self.plain.get_or_init(|| self.build(&Trust::nobody(), false))
        }
    }

    fn build(&self, trust: &Trust, http2: bool) -> Client {
        let settings = &self.settings;
        // The receiver picks the version, of those that TLS offers.
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(trust.https())
            .https_or_http()
            .enable_all_versions()
            .wrap_connector(self.connector.clone());
        legacy::Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(settings.idle_timeout)
            .pool_max_idle_per_host(settings.connections_max)
            .http2_only(http2)
            .http2_initial_stream_window_size(STREAM_WINDOW_BYTES)
            .http2_initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            // A connection that carries everything must not be used for long after it has died unnoticed.
            .http2_keep_alive_interval(KEEP_ALIVE)
            .http2_keep_alive_timeout(KEEP_ALIVE)
            .build(Bounded { connector, within: settings.connect_timeout })
    }
}

/// A connection that takes no longer than this, TLS included.
#[derive(Clone)]
struct Bounded {
    connector: HttpsConnector<Connector>,
    within: Duration,
}

impl Service<Uri> for Bounded {
    type Response = MaybeHttpsStream<TokioIo<TcpStream>>;
    type Error = NoWay;
    type Future = BoxFuture<'static, Result<Self::Response, NoWay>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), NoWay>> {
        self.connector.poll_ready(context)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (connecting, within) = (self.connector.call(uri), self.within);
        Box::pin(async move { timeout(within, connecting).await.unwrap_or_else(|_| Err(Late(within).into())) })
    }
}

fn request(url: &Url, headers: &HeaderMap, payload: &Bytes) -> Result<Request<Full<Bytes>>, Failure> {
    let place = shown(url.as_str());
    // Without what is for the header, and for whoever reads the page.
    let mut bare = url.clone();
    let _ = bare.set_username("");
    let _ = bare.set_password(None);
    bare.set_fragment(None);
    let uri: Uri = bare
        .as_str()
        .parse()
        .map_err(|error| Failure::new(FailureClass::Unreachable, format!("{place}: not a URL: {error}")))?;
    let mut request = Request::new(Full::new(payload.clone()));
    (*request.method_mut(), *request.uri_mut(), *request.headers_mut()) = (Method::POST, uri, headers.clone());
    if let Some(credentials) = credentials(url) {
        request.headers_mut().insert(AUTHORIZATION, credentials);
    }
    Ok(request)
}

/// What a URL says about who asks: `https://name:password@host/`.
fn credentials(url: &Url) -> Option<HeaderValue> {
    if url.username().is_empty() && url.password().is_none() {
        return None;
    }
    let mut text: Vec<u8> = percent_decode_str(url.username()).collect();
    text.push(b':');
    text.extend(percent_decode_str(url.password().unwrap_or_default()));
    let mut value = HeaderValue::try_from(format!("Basic {}", BASE64.encode(text))).expect("letters and digits");
    value.set_sensitive(true);
    Some(value)
}

fn not_sent(place: &str, error: &legacy::Error) -> Failure {
    if error.is_connect() {
        return failures::cannot_connect(place, error);
    }
    if is_no_http(error) {
        let text = format!("{place}: what it answered is not HTTP");
        return Failure::new(FailureClass::BadAnswer, text);
    }
    failures::broken(place, error)
}

/// A URL without what it may say about who asks.
fn shown(url: &str) -> &str {
    let url = url.find(['?', '#']).map_or(url, |end| &url[..end]);
    let Some((scheme, rest)) = url.split_once("://") else { return url };
    let authority = rest.find('/').unwrap_or(rest.len());
    match rest[..authority].rfind('@') {
        // Without its scheme: what is left has to be one piece of the whole.
        Some(at) => &url[scheme.len() + "://".len() + at + 1..],
        None => url,
    }
}

/// A receiver that speaks HTTP/2 and goes says up to which request it has come, and refuses those behind.
fn was_not_processed(error: &legacy::Error) -> bool {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            let is_refused = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
            let is_going = error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR);
            return error.is_remote() && (is_refused || is_going);
        }
        next = error.source();
    }
    false
}

fn is_no_http(error: &legacy::Error) -> bool {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        if error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_parse) {
            return true;
        }
        next = error.source();
    }
    false
}

/// Where the same POST is wanted instead.
fn redirect(from: &Url, response: &Response<Incoming>) -> Option<Url> {
    let wanted = matches!(
        response.status(),
        StatusCode::MOVED_PERMANENTLY
            | StatusCode::FOUND
            | StatusCode::TEMPORARY_REDIRECT
            | StatusCode::PERMANENT_REDIRECT
    );
    let location = response.headers().get(LOCATION).filter(|_| wanted)?;
    let next = from.join(location.to_str().ok()?).ok()?;
    matches!(next.scheme(), "http" | "https").then_some(next)
}

async fn verdict(place: &str, response: Response<Incoming>, deadline: Instant) -> Attempt {
    let status = response.status();
    let waits = matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
    let retry_after_ms = response.headers().get(RETRY_AFTER).filter(|_| waits).and_then(retry_after_ms);
    let location = response.headers().get(LOCATION).filter(|_| status.is_redirection());
    // Without what may be secret in it: failures are shown, and travel on.
    let location = location.map(|location| String::from_utf8_lossy(location.as_bytes()).into_owned());
    let location = location.map(|location| location.split(['?', '#']).next().unwrap_or_default().to_owned());
    // An answer that is read to its end leaves a connection that can be used again.
    let body = beginning(response, deadline).await;
    if status.is_success() {
        return Ok(());
    }
    let mut text = format!("{place}: the receiver answered {status}");
    if let Some(location) = location {
        let _ = write!(text, ", a redirect to {location}, which was not followed");
    }
    let said = one_line(&body);
    if !said.is_empty() {
        let _ = write!(text, ": {said}");
    }
    let mut failure = Failure::new(FailureClass::BadStatus, text);
    failure.retry_after_ms = retry_after_ms;
    Err(failure)
}

/// What of the body comes at once, up to a bound.
async fn beginning(mut response: Response<Incoming>, deadline: Instant) -> Vec<u8> {
    let deadline = deadline.min(Instant::now() + BODY_WITHIN);
    let mut body = Vec::new();
    while let Ok(Some(Ok(frame))) = timeout_at(deadline, response.frame()).await {
        let Ok(chunk) = frame.into_data() else { continue };
        let room = BODY_BYTES_MAX - body.len();
        body.extend_from_slice(&chunk[..chunk.len().min(room)]);
        if chunk.len() > room {
            break;
        }
    }
    body
}

/// For a text in a log or a table.
fn one_line(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let mut line = String::new();
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty()) {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
        if let Some((end, _)) = line.char_indices().nth(BODY_CHARS_SHOWN) {
            line.truncate(end);
            line.push_str("...");
            break;
        }
    }
    line
}

/// Seconds from now, or a date.
fn retry_after_ms(value: &HeaderValue) -> Option<u64> {
    let text = value.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(seconds.saturating_mul(1000));
    }
    let at = httpdate::parse_http_date(text).ok()?;
    let pause = at.duration_since(SystemTime::now()).unwrap_or_default();
    Some(u64::try_from(pause.as_millis()).unwrap_or(u64::MAX))
}

fn headers(delivery: &Delivery) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(16);
    let mut put = |name: &'static str, text: &str| {
        headers.insert(HeaderName::from_static(name), encoded(text));
    };
    put("x-boomerang-task-id", &delivery.task.to_string());
    put("x-boomerang-client-id", delivery.client.as_str());
    put("x-boomerang-occurrence", &delivery.occurrence.to_string());
    put("x-boomerang-attempt", &delivery.attempt.to_string());
    put("x-boomerang-due", &delivery.due_ms.to_string());
    put("x-boomerang-fence", &format!("{}.{}", delivery.fence.term, delivery.fence.seq));
    if let Some(name) = &delivery.name {
        put("x-boomerang-name", name);
    }
    if let Some(letter) = &delivery.dead_letter {
        put("x-boomerang-dead-letter", &letter.id.to_string());
        put("x-boomerang-dead-attempts", &letter.attempts.to_string());
        put("x-boomerang-dead-error", &letter.failure.to_string());
    }
    // Never zero, which would be no id. Sampled: a receiver that samples what its caller does would drop it otherwise.
    let (trace, span) = (rand::random::<u128>() | 1, rand::random::<u64>() | 1);
    put("traceparent", &format!("00-{trace:032x}-{span:016x}-01"));
    if let Some(secret) = &delivery.policy.callback.options.secret {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let id = message_id(delivery);
        put("webhook-signature", &signature(secret, &id, now, &delivery.payload));
        put("webhook-id", &id);
        put("webhook-timestamp", &now.to_string());
    }
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
    headers.insert(USER_AGENT, HeaderValue::from_static(USER_AGENT_TEXT));
    headers
}

/// The same for each attempt of an occurrence. The copy of a dead letter is another message.
fn message_id(delivery: &Delivery) -> String {
    match &delivery.dead_letter {
        Some(letter) => letter.id.to_string(),
        None => format!("{}.{}", delivery.task, delivery.occurrence),
    }
}

/// As in Standard Webhooks 1.0.
fn signature(secret: &Secret, id: &str, timestamp: u64, payload: &Bytes) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(&secret.key()).expect("a key of any length is good");
    mac.update(format!("{id}.{timestamp}.").as_bytes());
    mac.update(payload);
    format!("v1,{}", BASE64.encode(mac.finalize().into_bytes()))
}

/// Percent-encoded where it is not ASCII that can be seen, a blank between such, or the sign itself.
fn encoded(text: &str) -> HeaderValue {
    let bytes = text.as_bytes();
    let mut out = String::with_capacity(bytes.len());
    for (index, byte) in bytes.iter().enumerate() {
        let inner = index > 0 && index + 1 < bytes.len();
        match byte {
            b' ' if inner => out.push(' '),
            b'%' | ..=b' ' | 0x7f.. => {
                let _ = write!(out, "%{byte:02X}");
            }
            _ => out.push(char::from(*byte)),
        }
    }
    HeaderValue::try_from(out).expect("visible ASCII and blanks")
}
