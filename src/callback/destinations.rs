//! All destinations, each with its gate: who has to wait, who is told when, and what is forgotten.
//!
//! A destination is what is reached together: a protocol and a `host:port`, for HTTP without the path, for the host of
//! a hundred thousand hooks is one receiver. All of its state is under one small lock, which is never held while the
//! waiters are called or something is awaited.
//!
//! How many may be out is bounded for each, and less when the node itself runs short: nobody gets more than a quarter of
//! what is left, so that destinations that hang never have all of it between them. A TCP receiver starts with as many as
//! it gets connections, until it has shown that one connection can carry more.
//!
//! Nobody in line is forgotten: a gate moves when a permit comes back, and when a cool-down ends, for which a timer is
//! set as long as somebody waits. Who hands out turns of a destination goes on until there are none, and whatever
//! happens meanwhile is left to it: so the waiters hear of turns in order, and a waiter that drops a permit at once
//! does not call itself.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, MutexGuard, OnceLock};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::Instant;

use super::gate::{CoolDowns, Evidence, Gate, Pass};
use super::{CallbackSettings, Ticket, Waiters};
use crate::task::locks::Mutex;
use crate::task::{Callback, Failure, FailureClass, Protocol};

/// The ways to a receiver that differ in how many attempts they carry, or in what their success shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Tcp,
    Grpc,
    Http,
    Https,
    /// Version 2 of HTTP from the start.
    Http2,
    Udp,
    UdpAcknowledged,
}

impl Way {
    const COUNT: usize = 7;

    fn of(callback: &Callback) -> Self {
        match callback.protocol {
            Protocol::Tcp => Way::Tcp,
            Protocol::Grpc => Way::Grpc,
            Protocol::Http if callback.endpoint.as_str().starts_with("https:") => Way::Https,
            Protocol::Http if callback.options.http2 => Way::Http2,
            Protocol::Http => Way::Http,
            Protocol::Udp if callback.options.acknowledge => Way::UdpAcknowledged,
            Protocol::Udp => Way::Udp,
        }
    }

    /// `pipelined`: the receiver has shown that it keeps many requests apart on one connection.
    fn limit(self, settings: &CallbackSettings, pipelined: bool) -> usize {
        match self {
            Way::Tcp if !pipelined => settings.in_flight_max.min(settings.connections_max),
            Way::Tcp | Way::Grpc | Way::Http2 | Way::Udp => settings.in_flight_max,
            Way::Http | Way::Https | Way::UdpAcknowledged => {
                settings.in_flight_max.min(settings.in_flight_by_socket_max)
            }
        }
    }
}

/// The part of an endpoint that names the receiver: its host and port, without a password.
fn receiver(callback: &Callback) -> &str {
    let endpoint = callback.endpoint.as_str();
    let rest = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest);
    let authority = rest.find(['/', '\\', '?', '#']).map_or(rest, |end| &rest[..end]);
    authority.rsplit_once('@').map_or(authority, |(_, host)| host)
}

pub struct Destinations {
    by_way: [Mutex<HashMap<Box<str>, Arc<Destination>>>; Way::COUNT],
    shared: Arc<Shared>,
}

struct Shared {
    settings: CallbackSettings,
    /// Permits that have not come back, of all destinations.
    out: AtomicUsize,
    waiters: OnceLock<Arc<dyn Waiters>>,
    /// Timers are set from threads that may be none of the runtime's.
    runtime: Handle,
}

struct Destination {
    way: Way,
    name: Box<str>,
    state: Mutex<State>,
    shared: Arc<Shared>,
}

struct State {
    gate: Gate,
    pipelined: bool,
    /// Somebody is handing out turns, and looks again before it ends.
    handing: bool,
    /// The earliest instant at which a timer looks.
    timer: Option<Instant>,
    last_used: Instant,
}

/// How many wait, and how many destinations are down.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CallbackCounts {
    /// Attempts in the lines of all destinations.
    pub waiting: usize,
    /// Destinations nobody is sent to but a probe now and then.
    pub breakers_open: usize,
    /// Destinations that are remembered.
    pub destinations: usize,
}

impl Destinations {
    pub fn new(settings: CallbackSettings) -> Self {
        let (waiters, runtime) = (OnceLock::new(), Handle::current());
        let shared = Arc::new(Shared { settings, out: AtomicUsize::new(0), waiters, runtime });
        Self { by_way: Default::default(), shared }
    }

    pub fn set_waiters(&self, waiters: Arc<dyn Waiters>) {
        assert!(self.shared.waiters.set(waiters).is_ok(), "the waiters are set once");
    }

    pub fn admit(&self, callback: &Callback, ticket: Ticket) -> Option<Permit> {
        let destination = self.destination(callback);
        let now = Instant::now();
        let mut state = destination.state();
        state.last_used = now;
        destination.set_limit(&mut state);
        let Some(pass) = state.gate.admit(ticket, now) else {
            destination.set_timer(&mut state, now);
            return None;
        };
        drop(state);
        Some(destination.permit(pass))
    }

    fn destination(&self, callback: &Callback) -> Arc<Destination> {
        let (way, name) = (Way::of(callback), receiver(callback));
        let mut destinations = self.by_way[way as usize].lock();
        if let Some(destination) = destinations.get(name) {
            return destination.clone();
        }
        let destination = Arc::new(Destination::new(way, name, self.shared.clone()));
        destinations.insert(name.into(), destination.clone());
        destination
    }

    /// Forgets destinations nobody has used for `limit`.
    pub fn forget_idle(&self, limit: Duration) {
        for destinations in &self.by_way {
            let mut destinations = destinations.lock();
            // Whoever is about to use one has it already, or waits for the lock we hold.
            destinations.retain(|_, destination| Arc::strong_count(destination) > 1 || !destination.is_unused(limit));
        }
    }

    pub fn counts(&self) -> CallbackCounts {
        let mut counts = CallbackCounts::default();
        for destinations in &self.by_way {
            for destination in destinations.lock().values() {
                let state = destination.state();
                counts.destinations += 1;
                counts.waiting += state.gate.waiting();
                counts.breakers_open += usize::from(state.gate.is_open());
            }
        }
        counts
    }
}

impl Destination {
    fn new(way: Way, name: &str, shared: Arc<Shared>) -> Self {
        let settings = &shared.settings;
        let cool_downs = CoolDowns { min: settings.cool_down_min, max: settings.cool_down_max };
        let gate = Gate::new(way.limit(settings, false), cool_downs);
        let state = State { gate, pipelined: false, handing: false, timer: None, last_used: Instant::now() };
        Self { way, name: name.into(), state: Mutex::new(state), shared }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    fn set_limit(&self, state: &mut State) {
        let Shared { settings, out, .. } = &*self.shared;
        let left = settings.in_flight_of_all_max.saturating_sub(out.load(Ordering::Relaxed));
        state.gate.set_limit(self.way.limit(settings, state.pipelined).min(left / 4));
    }

    fn is_unused(&self, limit: Duration) -> bool {
        let state = self.state();
        state.gate.is_idle() && state.last_used.elapsed() >= limit
    }

    fn end(self: &Arc<Self>, pass: Pass, evidence: Evidence, pipelined: bool) {
        let now = Instant::now();
        self.shared.out.fetch_sub(1, Ordering::Relaxed);
        let mut state = self.state();
        state.pipelined |= pipelined;
        state.last_used = now;
        let was_open = state.gate.is_open();
        state.gate.end(pass, evidence, now);
        let is_open = state.gate.is_open();
        drop(state);
        match (was_open, is_open) {
            (false, true) => tracing::warn!(destination = %self, "cannot be reached: only probes go there for now"),
            (true, false) => tracing::info!(destination = %self, "can be reached again"),
            _ => {}
        }
        self.hand_out();
    }

    fn begin(self: &Arc<Self>, pass: &mut Pass) {
        let mut state = self.state();
        state.gate.begin(pass);
        // Somebody may have come meanwhile, though there is room.
        let others = state.gate.waiting() > 0;
        drop(state);
        if others {
            self.hand_out();
        }
    }

    /// Tells the waiters whatever there is to tell.
    fn hand_out(self: &Arc<Self>) {
        let mut state = self.state();
        if state.handing {
            return;
        }
        loop {
            let now = Instant::now();
            let down = state.gate.take_down();
            self.set_limit(&mut state);
            let turns = state.gate.turns(now);
            state.handing = !down.is_empty() || !turns.is_empty();
            if !state.handing {
                self.set_timer(&mut state, now);
                return;
            }
            drop(state);
            let waiters = self.shared.waiters.get().expect("the waiters are set before anybody waits");
            for (tickets, failure) in down {
                waiters.down(tickets, &self.is_down(&failure), &Name { way: self.way, name: self.name.clone() });
            }
            if !turns.is_empty() {
                waiters.go(turns.into_iter().map(|(ticket, pass)| (ticket, self.permit(pass))).collect());
            }
            state = self.state();
        }
    }

    fn permit(self: &Arc<Self>, pass: Pass) -> Permit {
        self.shared.out.fetch_add(1, Ordering::Relaxed);
        Permit { destination: self.clone(), pass, evidence: Evidence::Nothing, pipelined: false }
    }

    fn is_down(&self, probe: &Failure) -> Failure {
        let name = &self.name;
        // The failure names its destination too, mostly in the same words.
        let why = probe.text.strip_prefix(&**name).and_then(|rest| rest.strip_prefix(": ")).unwrap_or(&probe.text);
        Failure::new(FailureClass::CircuitOpen, format!("not sent: {name} is down: {why}"))
    }

    fn set_timer(self: &Arc<Self>, state: &mut State, now: Instant) {
        let Some(at) = state.gate.wakes_at(now).filter(|at| state.timer.is_none_or(|timer| *at < timer)) else {
            return;
        };
        state.timer = Some(at);
        let destination = self.clone();
        self.shared.runtime.spawn(async move {
            tokio::time::sleep_until(at).await;
            let mut state = destination.state();
            if state.timer == Some(at) {
                state.timer = None;
            }
            drop(state);
            destination.hand_out();
        });
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.way, self.name)
    }
}

/// A place among the attempts that one destination may have out. Given back when it is dropped.
pub struct Permit {
    destination: Arc<Destination>,
    pass: Pass,
    evidence: Evidence,
    pipelined: bool,
}

impl Permit {
    /// The attempt has its place in the order. Until then, if it was waited for, others of its shard wait behind it.
    pub fn begin(&mut self) {
        if self.pass.is_on_its_way() {
            self.destination.begin(&mut self.pass);
        }
    }

    /// Notes how the attempt to `callback` ended, and whether its receiver keeps many requests apart on one connection.
    /// A task may have been given another receiver while it waited: then it says nothing about the destination whose
    /// place it has.
    pub(super) fn note(&mut self, callback: &Callback, ended: &Result<(), Failure>, pipelined: bool) {
        let Destination { way, name, shared, .. } = &*self.destination;
        if *way != Way::of(callback) || **name != *receiver(callback) {
            return;
        }
        self.pipelined = pipelined;
        // Whoever waits for less than others would says nothing about what they will meet.
        let hasty = callback.options.timeout_ms.map(Duration::from_millis);
        let hasty = hasty.is_some_and(|timeout| timeout < shared.settings.answer_timeout);
        match ended {
            Err(failure) if hasty && failure.class == FailureClass::Timeout => {}
            ended => self.evidence = evidence(ended),
        }
    }
}

/// Which destination, for whoever has to tell whether a callback still goes there.
#[derive(Debug, Clone)]
pub struct Name {
    way: Way,
    name: Box<str>,
}

impl Name {
    #[cfg(test)]
    pub fn new(callback: &Callback) -> Self {
        Self { way: Way::of(callback), name: receiver(callback).into() }
    }

    pub fn is_of(&self, callback: &Callback) -> bool {
        self.way == Way::of(callback) && *self.name == *receiver(callback)
    }
}

fn evidence(ended: &Result<(), Failure>) -> Evidence {
    let Err(failure) = ended else { return Evidence::Answered };
    match failure.class {
        FailureClass::Refused | FailureClass::Timeout | FailureClass::Broken | FailureClass::Unreachable => {
            Evidence::Failed(failure.clone())
        }
        FailureClass::BadStatus | FailureClass::BadAnswer => Evidence::Answered,
        // It did not leave.
        FailureClass::TooLarge | FailureClass::CircuitOpen | FailureClass::Forbidden => Evidence::Nothing,
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.destination.end(self.pass, std::mem::take(&mut self.evidence), self.pipelined);
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Permit for {}", self.destination)
    }
}
