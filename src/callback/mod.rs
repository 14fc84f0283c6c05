//! What goes out: one attempt to its receiver, and what came of it.
//!
//! This room knows connections, not tasks: it changes no state, tries once, and says how it ended. Every failure
//! becomes a text a person can act on. Destinations are independent of each other: each has its own connections and
//! its own bounds on them. What they still share is the number of attempts a node has out at a time: a receiver that hangs
//! while thousands of tasks for it are due can use that up.

mod tcp;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::task::{Callback, Delivery, Endpoint, Failure, FailureClass, GroupId, InstantMs, Outcome, Protocol, TaskId};

#[derive(Debug, Clone, Copy)]
pub struct CallbackSettings {
    pub connect_timeout: Duration,
    /// From the request to its answer.
    pub answer_timeout: Duration,
    /// Connections to one destination.
    pub connections_max: usize,
    /// Requests under way on one connection, to a receiver that numbers its answers.
    pub pipeline_max: usize,
    /// A connection that was not used for this long is closed.
    pub idle_timeout: Duration,
}

impl Default for CallbackSettings {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(3),
            answer_timeout: Duration::from_secs(10),
            connections_max: 64,
            pipeline_max: 1_024,
            idle_timeout: Duration::from_secs(60),
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

/// A place among the attempts that one destination may have out. Given back when it is dropped.
#[derive(Debug)]
pub struct Permit {}

/// Who hears of attempts that waited for their destination. Called from any task; must not block.
pub trait Waiters: Send + Sync + 'static {
    /// It is their turn, with the place each was given.
    fn go(&self, admitted: Vec<(Ticket, Permit)>);
    /// Their destination was found down: each has failed like this, without being sent.
    fn down(&self, tickets: Vec<Ticket>, failure: &Failure);
}

/// A handle on all connections to receivers; cheap to clone.
#[derive(Clone)]
pub struct Callbacks {
    inner: Arc<Inner>,
}

struct Inner {
    settings: CallbackSettings,
    tcp: Mutex<HashMap<Endpoint, Arc<tcp::Destination>>>,
}

impl Callbacks {
    pub fn new(settings: CallbackSettings) -> Self {
        let inner = Arc::new(Inner { settings, tcp: Mutex::default() });
        let weak = Arc::downgrade(&inner);
        tokio::spawn(async move {
            let mut rounds = tokio::time::interval(settings.idle_timeout / 2);
            loop {
                rounds.tick().await;
                let Some(inner) = weak.upgrade() else { return };
                let mut destinations = inner.tcp.lock().expect("no panic under this lock");
                destinations.retain(|_, destination| destination.close_idle() || Arc::strong_count(destination) > 1);
            }
        });
        Self { inner }
    }

    /// Whether callbacks of this protocol can be delivered; others are refused when they are registered.
    pub fn supports(protocol: Protocol) -> bool {
        matches!(protocol, Protocol::Tcp)
    }

    /// Who is told of attempts that wait. Set once, before the first of them.
    pub fn set_waiters(&self, _waiters: Arc<dyn Waiters>) {}

    /// A place among the attempts out to `callback`. `None`: there is none now, and the ticket waits in line; the
    /// waiters hear of it.
    pub fn admit(&self, _callback: &Callback, _ticket: Ticket) -> Option<Permit> {
        Some(Permit {})
    }

    /// One attempt.
    pub async fn deliver(&self, _permit: Permit, delivery: Delivery) -> Outcome {
        let callback = &delivery.policy.callback;
        let result = match callback.protocol {
            Protocol::Tcp => {
                let destination = self.tcp_destination(&callback.endpoint);
                destination.deliver(&delivery).await
            }
            other => Err(format!("{other} callbacks are not supported by this version")),
        };
        match result {
            Ok(()) => Outcome::Acknowledged,
            Err(why) => Outcome::Failed(Failure::new(FailureClass::Broken, why)),
        }
    }

    fn tcp_destination(&self, endpoint: &Endpoint) -> Arc<tcp::Destination> {
        let mut destinations = self.inner.tcp.lock().expect("no panic under this lock");
        if let Some(destination) = destinations.get(endpoint) {
            return destination.clone();
        }
        let destination = Arc::new(tcp::Destination::new(endpoint.clone(), self.inner.settings));
        destinations.insert(endpoint.clone(), destination.clone());
        destination
    }
}
