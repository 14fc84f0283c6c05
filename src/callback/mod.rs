//! What goes out: one attempt to its receiver, and what came of it.
//!
//! This room knows connections, not tasks: it changes no state, tries once, and says how it ended. Every failure has a
//! class and a text a person can act on. Destinations are independent of each other: each has its own connections, its
//! own limit on the attempts that are out, its own line of those who wait, and a breaker that spares one that is down.
//!
//! ```text
//!   firing -- admit --> [destination: limit, line, breaker] -- permit --> deliver --> tcp | grpc | http | udp
//!     ^                    |    ^                                            |
//!     +---- go, down ------+    +--------- the permit is dropped ------------+
//! ```
//!
//! - [`destinations`]: all of them, each with its [`gate`]: who may go now, as a function
//! - [`tcp`], [`grpc`], [`http`], [`udp`]: one attempt each
//! - [`connect`]: the one way out; [`names`]: from host names to addresses; [`guard`]: which of them may be reached
//! - [`trust`]: whose certificates are believed; [`failures`]: what the errors
//!   of libraries mean; [`flags`]: the room's settings

mod connect;
mod destinations;
mod failures;
pub mod flags;
mod gate;
mod grpc;
pub mod guard;
mod http;
mod names;
mod tcp;
#[cfg(test)]
pub(crate) mod tests;
mod trust;
mod udp;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use connect::Connector;
use destinations::Destinations;
pub use destinations::{CallbackCounts, Name as DestinationName, Permit};
use futures::future::BoxFuture;
use grpc::Grpc;
use guard::Guard;
use http::Http;
use names::Names;
use trust::Trust;
use udp::Udp;

use crate::task::locks::Mutex;
use crate::task::{Callback, Delivery, Endpoint, Failure, FailureClass, GroupId, InstantMs, Outcome, Protocol, TaskId};
use crate::wire::proto::{CallbackResponse, Status};

/// Who says so.
const USER_AGENT_TEXT: &str = concat!("boomerang/", env!("CARGO_PKG_VERSION"));
/// A connection over HTTP/2 is asked for a sign of life after so long without one, and closed after as long again.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// How much of a receiver's text is kept.
const ERROR_CHARS_MAX: usize = 300;

#[derive(Debug, Clone, Copy)]
pub struct CallbackSettings {
    pub connect_timeout: Duration,
    /// From the request to its answer, unless the callback says otherwise.
    pub answer_timeout: Duration,
    /// TCP: connections to one destination. HTTP: those that are kept although nothing is under way.
    pub connections_max: usize,
    /// Requests under way on one connection, to a receiver that numbers its answers.
    pub pipeline_max: usize,
    /// A connection that was not used for this long is closed, and a destination forgotten.
    pub idle_timeout: Duration,
    /// Attempts one destination may have out; the others wait in its line.
    pub in_flight_max: usize,
    /// Attempts all destinations together may have out. What is left of it bounds each of them.
    pub in_flight_of_all_max: usize,
    /// The same, where each of them needs a socket of its own.
    pub in_flight_by_socket_max: usize,
    /// How long nothing is sent to a destination that is down: at first, doubled with each probe that fails, at most.
    pub cool_down_min: Duration,
    pub cool_down_max: Duration,
}

impl Default for CallbackSettings {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(3),
            answer_timeout: Duration::from_secs(10),
            connections_max: 64,
            pipeline_max: 1_024,
            idle_timeout: Duration::from_secs(60),
            in_flight_max: 2_048,
            in_flight_of_all_max: 16_384,
            in_flight_by_socket_max: 256,
            cool_down_min: Duration::from_secs(1),
            cool_down_max: Duration::from_secs(30),
        }
    }
}

/// An attempt that waits for its destination: what the firing room gets back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket {
    pub group: GroupId,
    pub term: u64,
    pub task: TaskId,
    /// As it was handed over.
    pub due_ms: InstantMs,
}

/// Who hears of attempts that waited for their destination. Called from any task; must not block.
pub trait Waiters: Send + Sync + 'static {
    /// It is their turn, with the place each was given; others wait until each permit begins or is dropped.
    fn go(&self, admitted: Vec<(Ticket, Permit)>);
    /// Their destination was found down: each that still goes there has failed like this, without being sent.
    fn down(&self, tickets: Vec<Ticket>, failure: &Failure, destination: &DestinationName);
}

/// How an attempt ended, for whoever makes it.
type Attempt = Result<(), Failure>;

/// A handle on all connections to receivers; cheap to clone.
#[derive(Clone)]
pub struct Callbacks {
    inner: Arc<CallbacksInner>,
}

struct CallbacksInner {
    settings: CallbackSettings,
    destinations: Destinations,
    transports: Transports,
}

/// How attempts leave.
enum Transports {
    Sockets(Box<Sockets>),
    Carried(Arc<dyn Carrier>),
}

/// Takes attempts to their receivers in a simulation, where there are no sockets. Places, lines and breakers are the
/// same.
pub trait Carrier: Send + Sync + 'static {
    fn carry(&self, delivery: Delivery, within: Duration) -> BoxFuture<'static, Result<(), Failure>>;
}

struct Sockets {
    settings: CallbackSettings,
    names: Names,
    connector: Connector,
    tcp: Mutex<HashMap<Endpoint, Arc<tcp::Destination>>>,
    grpc: Grpc,
    http: Http,
    udp: Udp,
}

impl Callbacks {
    /// In a runtime; to where `guard` lets them.
    pub fn new(settings: CallbackSettings, guard: Guard) -> Self {
        Self::trusting(settings, guard, Trust::default())
    }

    fn trusting(settings: CallbackSettings, guard: Guard, trust: Trust) -> Self {
        let names = Names::new();
        let connector = Connector::new(names.clone(), guard, settings.connect_timeout);
        Self::leaving(
            settings,
            Transports::Sockets(Box::new(Sockets {
                settings,
                tcp: Mutex::default(),
                grpc: Grpc::new(settings, connector.clone(), trust.clone()),
                http: Http::new(settings, connector.clone(), trust),
                udp: Udp::new(connector.clone()),
                names,
                connector,
            })),
        )
    }

    /// By `carrier`, whatever the protocol.
    pub fn carried(settings: CallbackSettings, carrier: Arc<dyn Carrier>) -> Self {
        Self::leaving(settings, Transports::Carried(carrier))
    }

    fn leaving(settings: CallbackSettings, transports: Transports) -> Self {
        let inner = Arc::new(CallbacksInner { settings, destinations: Destinations::new(settings), transports });
        let weak = Arc::downgrade(&inner);
        tokio::spawn(async move {
            let mut rounds = tokio::time::interval(settings.idle_timeout / 2);
            loop {
                rounds.tick().await;
                let Some(inner) = weak.upgrade() else { return };
                inner.keep_house();
            }
        });
        Self { inner }
    }

    /// Who is told of attempts that wait. Set once, before the first of them, and kept as long as this handle is: what
    /// they hold of whoever holds this handle, they must hold weakly.
    pub fn set_waiters(&self, waiters: Arc<dyn Waiters>) {
        self.inner.destinations.set_waiters(waiters);
    }

    /// A place among the attempts out to `callback`. `None`: there is none now, and the ticket waits in line; the
    /// waiters hear of it.
    pub fn admit(&self, callback: &Callback, ticket: Ticket) -> Option<Permit> {
        self.inner.destinations.admit(callback, ticket)
    }

    pub fn counts(&self) -> CallbackCounts {
        self.inner.destinations.counts()
    }

    /// One attempt.
    pub async fn deliver(&self, mut permit: Permit, delivery: Delivery) -> Outcome {
        let inner = &self.inner;
        let policy = delivery.policy.clone();
        let callback = &policy.callback;
        let within = callback.options.timeout_ms.map_or(inner.settings.answer_timeout, Duration::from_millis);
        let (ended, pipelined) = match &inner.transports {
            Transports::Sockets(sockets) => sockets.deliver(&delivery, within).await,
            Transports::Carried(carrier) => (carrier.carry(delivery, within).await, true),
        };
        permit.note(callback, &ended, pipelined);
        match ended {
            Ok(()) => Outcome::Acknowledged,
            Err(failure) => Outcome::Failed(failure),
        }
    }
}

impl CallbacksInner {
    fn keep_house(&self) {
        self.destinations.forget_idle(self.settings.idle_timeout);
        if let Transports::Sockets(sockets) = &self.transports {
            sockets.keep_house();
        }
    }
}

impl Sockets {
    /// How it ended, and whether the receiver keeps many requests apart on one connection.
    async fn deliver(&self, delivery: &Delivery, within: Duration) -> (Attempt, bool) {
        let callback = &delivery.policy.callback;
        let ended = match callback.protocol {
            Protocol::Tcp => {
                let destination = self.tcp_destination(&callback.endpoint);
                let ended = destination.deliver(delivery, within).await;
                return (ended, destination.is_pipelined());
            }
            // In boxes: what they keep while they wait is large, and every attempt over TCP would carry room for it.
            Protocol::Grpc => Box::pin(self.grpc.deliver(delivery, within)).await,
            Protocol::Http => Box::pin(self.http.deliver(delivery, within)).await,
            Protocol::Udp => Box::pin(self.udp.deliver(delivery, within)).await,
        };
        (ended, false)
    }

    fn tcp_destination(&self, endpoint: &Endpoint) -> Arc<tcp::Destination> {
        let mut destinations = self.tcp.lock();
        if let Some(destination) = destinations.get(endpoint) {
            return destination.clone();
        }
        let destination = Arc::new(tcp::Destination::new(endpoint.clone(), self.settings, self.connector.clone()));
        destinations.insert(endpoint.clone(), destination.clone());
        destination
    }

    fn keep_house(&self) {
        self.names.forget_old();
        self.grpc.close_idle();
        let mut destinations = self.tcp.lock();
        destinations.retain(|_, destination| destination.close_idle() || Arc::strong_count(destination) > 1);
    }
}

/// What a receiver's answer means, over TCP, gRPC and UDP alike.
fn response_verdict(place: &str, response: CallbackResponse) -> Attempt {
    let CallbackResponse { status, error_message } = response;
    let name = match Status::try_from(status) {
        Ok(Status::Ok) => return Ok(()),
        Ok(known) => known.as_str_name().to_owned(),
        Err(_) => status.to_string(),
    };
    let said: String = error_message.chars().take(ERROR_CHARS_MAX).collect();
    Err(Failure::new(FailureClass::BadStatus, format!("{place}: the receiver answered {name}: {said}")))
}
