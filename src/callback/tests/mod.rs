//! Against real receivers, over real sockets of loopback.

mod grpc;
mod guard;
mod http;
mod lines;
mod tcp;
mod udp;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use super::guard::Allowed;
use super::*;
use crate::task::{CallbackOptions, Fence, Policy, Retry, ShardId};
use boomerang_client::fake::dead_address;

/// Longer than anything takes that works.
const PATIENCE: Duration = Duration::from_secs(20);
/// Short enough to be waited for by a test that means to.
const SHORT: Duration = Duration::from_millis(150);

pub fn ticket(number: u64) -> Ticket {
    let task = TaskId::new(1_000, ShardId(0), number);
    Ticket { group: GroupId(1), term: 1, task, due_ms: 1_000 }
}

fn settings() -> CallbackSettings {
    CallbackSettings { answer_timeout: PATIENCE, connect_timeout: PATIENCE, ..CallbackSettings::default() }
}

/// To receivers on this machine.
fn sockets(settings: CallbackSettings) -> Callbacks {
    trusting(settings, Trust::default())
}

fn trusting(settings: CallbackSettings, trust: Trust) -> Callbacks {
    Callbacks::trusting(settings, Guard::new(Allowed::loopback().into(), Arc::new(())), trust)
}

fn impatient() -> CallbackSettings {
    CallbackSettings { answer_timeout: SHORT, ..settings() }
}

fn callback(url: &str) -> Callback {
    Callback::from_url(url).unwrap().unwrap()
}

fn with(url: &str, options: CallbackOptions) -> Callback {
    callback(url).with(options).unwrap()
}

fn delivery(callback: Callback, number: u64) -> Delivery {
    let policy = Policy { callback, retry: Retry::default(), dead_letter: None };
    Delivery {
        task: ticket(number).task,
        client: "orders".parse().unwrap(),
        name: None,
        payload: Bytes::from(format!("payload {number}")),
        occurrence: 7,
        attempt: 2,
        due_ms: 1_000,
        fence: Fence { term: 3, seq: number },
        policy: Arc::new(policy),
        dead_letter: None,
    }
}

/// One attempt that does not have to wait.
async fn attempt(callbacks: &Callbacks, delivery: Delivery) -> Result<(), Failure> {
    let permit = callbacks.admit(&delivery.policy.callback, ticket(0)).expect("nobody waits");
    match callbacks.deliver(permit, delivery).await {
        Outcome::Acknowledged => Ok(()),
        Outcome::Failed(failure) => Err(failure),
    }
}

async fn once(callbacks: &Callbacks, callback: &Callback) -> Result<(), Failure> {
    attempt(callbacks, delivery(callback.clone(), 1)).await
}

#[track_caller]
fn assert_failed(ended: Result<(), Failure>, class: FailureClass, says: &[&str]) -> Failure {
    let failure = ended.expect_err("it should have failed");
    assert_eq!(failure.class, class, "{failure}");
    for part in says {
        assert!(failure.text.contains(part), "'{part}' is not in: {}", failure.text);
    }
    failure
}

/// Accepts and never says a word.
async fn silent() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            kept.push(stream);
        }
    });
    address
}

/// What the waiters were told.
#[derive(Debug)]
enum Reported {
    Go(Vec<(Ticket, Permit)>),
    Down(Vec<Ticket>, Failure),
}

struct Channel(mpsc::UnboundedSender<Reported>);

impl Waiters for Channel {
    fn go(&self, admitted: Vec<(Ticket, Permit)>) {
        let _ = self.0.send(Reported::Go(admitted));
    }

    fn down(&self, tickets: Vec<Ticket>, failure: &Failure, _: &DestinationName) {
        let _ = self.0.send(Reported::Down(tickets, failure.clone()));
    }
}

fn listen(callbacks: &Callbacks) -> mpsc::UnboundedReceiver<Reported> {
    let (out, told) = mpsc::unbounded_channel();
    callbacks.set_waiters(Arc::new(Channel(out)));
    told
}

/// A permit for tests of whoever holds permits: it came from a destination nobody waits for.
pub(crate) fn loose_permit() -> Permit {
    struct Nobody;
    impl Waiters for Nobody {
        fn go(&self, _: Vec<(Ticket, Permit)>) {}
        fn down(&self, _: Vec<Ticket>, _: &Failure, _: &DestinationName) {}
    }
    static PLACE: std::sync::LazyLock<(tokio::runtime::Runtime, Destinations)> = std::sync::LazyLock::new(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let _entered = runtime.enter();
        let unbounded = usize::MAX / 2;
        let settings = CallbackSettings {
            in_flight_max: unbounded,
            in_flight_of_all_max: unbounded,
            ..CallbackSettings::default()
        };
        let destinations = Destinations::new(settings);
        destinations.set_waiters(Arc::new(Nobody));
        drop(_entered);
        (runtime, destinations)
    });
    let callback = Callback::new(Protocol::Udp, "h:1").unwrap();
    PLACE.1.admit(&callback, ticket(0)).expect("there is always room")
}

/// The name of a destination, for the same.
pub(crate) fn loose_name() -> DestinationName {
    DestinationName::new(&Callback::new(Protocol::Udp, "h:1").unwrap())
}
