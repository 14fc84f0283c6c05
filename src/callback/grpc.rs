//! Callbacks over gRPC: `BoomerangCallback.OnTaskExpired` on one connection per receiver, made when it is first needed.
//!
//! Connections are tonic's business: it has them made, once at a time per receiver, and again when a request comes after
//! a connection has ended.
//!
//! A failure of the way to the receiver and its own answer reach us as the same type: a status. Ours has an error of a
//! library behind it, and that is what is told.

use std::collections::HashMap;
use std::error::Error;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures::FutureExt;
use tokio::time::{Instant, timeout};
use tonic::transport::{Channel, ClientTlsConfig};
use tonic::{Code, ConnectError, Request, Status, TimeoutExpired};

use super::connect::Connector;
use super::trust::Trust;
use super::{Attempt, CallbackSettings, KEEP_ALIVE, USER_AGENT_TEXT, failures, response_verdict};
use crate::task::locks::Mutex;
use crate::task::{Delivery, Endpoint, Failure, FailureClass};
use crate::wire::convert::callback_request;
use crate::wire::proto::boomerang_callback_client::BoomerangCallbackClient;

/// A response holds a status and a text.
const RESPONSE_BYTES_MAX: usize = 64 * 1024;
const HEADERS_BYTES_MAX: u32 = 16 * 1024;

/// The connections to all receivers.
pub struct Grpc {
    settings: CallbackSettings,
    connector: Connector,
    trust: Trust,
    channels: Mutex<HashMap<Endpoint, (Channel, Instant)>>,
}

impl Grpc {
    pub fn new(settings: CallbackSettings, connector: Connector, trust: Trust) -> Self {
        Self { settings, connector, trust, channels: Mutex::default() }
    }

    pub async fn deliver(&self, delivery: &Delivery, within: Duration) -> Attempt {
        let endpoint = &delivery.policy.callback.endpoint;
        let channel = self.channel(endpoint)?;
        let mut client = BoomerangCallbackClient::new(channel).max_decoding_message_size(RESPONSE_BYTES_MAX);
        let mut request = Request::new(callback_request(delivery));
        // The receiver learns how long it is waited for.
        request.set_timeout(within);
        // tonic panics when the details of a status are not base64, and those come from the receiver.
        let asked = AssertUnwindSafe(client.on_task_expired(request)).catch_unwind();
        match timeout(within, asked).await {
            Err(_) => Err(failures::no_answer(endpoint.as_str(), within)),
            Ok(Err(_)) => {
                let text = format!("{endpoint}: its answer is not gRPC");
                Err(Failure::new(FailureClass::BadAnswer, text))
            }
            Ok(Ok(Err(status))) => Err(self.not_ok(endpoint, &status, within)),
            Ok(Ok(Ok(response))) => response_verdict(endpoint.as_str(), response.into_inner()),
        }
    }

    fn channel(&self, endpoint: &Endpoint) -> Result<Channel, Failure> {
        let mut channels = self.channels.lock();
        if let Some((channel, last_used)) = channels.get_mut(endpoint) {
            *last_used = Instant::now();
            return Ok(channel.clone());
        }
        let channel =
            self.connect_lazy(endpoint).map_err(|error| failures::cannot_connect(endpoint.as_str(), &*error))?;
        channels.insert(endpoint.clone(), (channel.clone(), Instant::now()));
        Ok(channel)
    }

    fn connect_lazy(&self, endpoint: &Endpoint) -> Result<Channel, Box<dyn Error>> {
        let text = endpoint.as_str();
        let url = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let secure = url.starts_with("https://");
        let mut connection = Channel::from_shared(url)?
            .user_agent(USER_AGENT_TEXT)?
            .connect_timeout(self.settings.connect_timeout)
            .http2_max_header_list_size(HEADERS_BYTES_MAX)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .buffer_size(self.settings.in_flight_max);
        if secure {
            let tls = ClientTlsConfig::new().timeout(self.settings.connect_timeout);
            connection = connection.tls_config_with_verifier(tls, self.trust.verifier()?)?;
        }
        Ok(connection.connect_with_connector_lazy(self.connector.clone()))
    }

    /// Closes what has not been used for long; what is under way keeps its connection.
    pub fn close_idle(&self) {
        let mut channels = self.channels.lock();
        channels.retain(|_, (_, last_used)| last_used.elapsed() < self.settings.idle_timeout);
    }

    fn not_ok(&self, endpoint: &Endpoint, status: &Status, within: Duration) -> Failure {
        let place = endpoint.as_str();
        match status.source() {
            Some(source) if has::<TimeoutExpired>(source) => failures::no_answer(place, within),
            Some(source) if has::<ConnectError>(source) => {
                let failure = failures::cannot_connect(place, source);
                match failure.class {
                    FailureClass::Timeout => failures::no_connection(place, self.settings.connect_timeout),
                    _ => failure,
                }
            }
            Some(source) => failures::broken(place, source),
            None if status.code() == Code::DeadlineExceeded => {
                let text = format!("{place}: the receiver did not finish in time: {}", status.message());
                Failure::new(FailureClass::Timeout, text)
            }
            None => {
                let text = format!("{place}: the receiver answered {:?}: {}", status.code(), status.message());
                Failure::new(FailureClass::BadStatus, text)
            }
        }
    }
}

fn has<E: Error + 'static>(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.is::<E>() {
            return true;
        }
        next = error.source();
    }
    false
}
