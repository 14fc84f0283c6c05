//! Clients and receivers that write the history.
//!
//! Each load is a few processes in the sense of the history: each asks for one thing at a time, waits for the end of it,
//! and says both. What they ask for follows from the seed; when they are answered does not.
//!
//! - [`one_shot`]: tasks that are due once, looked at by get and list
//! - [`races`]: cancels and edits around the due instant
//! - [`recurring`]: tasks that come again
//! - [`dedup`]: the same registration again and again, until one is answered
//! - [`dead_letters`]: receivers that refuse, some for ever
//! - [`fenced`]: a receiver that remembers what it has done, and answers late or not at all
//! - [`receiver`]: the other end of all of them; [`asker`]: from an answer of the client to an end in the history;
//!   [`left`]: what is there when all is over

mod asker;
mod dead_letters;
mod dedup;
mod fenced;
mod left;
mod one_shot;
mod races;
mod receiver;
mod recurring;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use boomerang_client::{
    Client, ClientError, ClientSettings, Credentials, Options, OwnSettings, Registration as Request,
};
use boomerang_task::{Callback, CallbackOptions, ClientId, Invalid, Missed, Protocol, Retry};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::history::{Due, Recorder, Registration, Token};
use crate::payload::Payload;
use asker::Asker;
use receiver::Receivers;

/// Which loads there are, by name.
pub const NAMES: [&str; 6] = ["one-shot", "races", "recurring", "dedup", "dead-letters", "fenced"];

/// A request without an answer is unknown after this.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a receiver may take before the attempt has failed.
const ANSWER_WITHIN_MS: u64 = 1_500;
const RETRY_AFTER_MS: u64 = 300;
const RETRY_AFTER_MS_MAX: u64 = 2_000;
const PASSWORD: &str = "a load's own";

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("no load is called '{name}'; there are {}", NAMES.join(", "))]
    Unknown { name: String },
    #[error("the receiver cannot listen on {address}: {source}")]
    Listen { address: IpAddr, source: std::io::Error },
    #[error("the cluster lets no load in: {0}")]
    Client(#[from] ClientError),
    #[error(transparent)]
    Invalid(#[from] Invalid),
}

/// What is put under load.
#[derive(Debug, Clone)]
pub struct Target {
    /// Where clients connect.
    pub addresses: Vec<String>,
    /// Of the client `admin`.
    pub password: String,
    /// Where receivers listen.
    pub receiver_host: IpAddr,
}

#[derive(Debug, Clone)]
pub struct LoadSettings {
    /// Names out of [`NAMES`].
    pub loads: Vec<String>,
    pub seed: u64,
    /// Operations per second of all loads together, about, while all goes well.
    pub rate: u32,
}

/// What the processes of all loads share.
struct Shared {
    recorder: Recorder,
    receivers: Receivers,
    tokens: AtomicU64,
    /// No process begins anything new.
    stop: CancellationToken,
}

impl Shared {
    fn token(&self) -> Token {
        self.tokens.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// One process of a load.
struct Worker {
    shared: Arc<Shared>,
    asker: Asker,
    rng: StdRng,
    /// Between two operations, on average.
    pause: Duration,
    load: &'static str,
}

impl Worker {
    /// Waits for the next turn; `false` when there is none.
    async fn turn(&mut self) -> bool {
        let pause = self.pause.mul_f64(self.rng.random_range(0.2..1.8));
        self.rest(pause).await
    }

    async fn rest(&self, span: Duration) -> bool {
        tokio::select! {
            () = self.shared.stop.cancelled() => false,
            () = tokio::time::sleep(span) => true,
        }
    }

    /// A receiver's address, over any of the protocols that are answered.
    fn callback(&mut self) -> Callback {
        let protocol = match self.rng.random_range(0..10) {
            0..6 => Protocol::Tcp,
            6..8 => Protocol::Http,
            8 => Protocol::Grpc,
            _ => Protocol::Udp,
        };
        let options = CallbackOptions {
            timeout_ms: Some(ANSWER_WITHIN_MS),
            acknowledge: protocol == Protocol::Udp,
            ..Default::default()
        };
        Callback { options, ..self.shared.receivers.callback(protocol) }
    }

    /// By the clock of the history.
    fn now_ms(&self) -> u64 {
        self.shared.recorder.look(|history| history.began_ms) + self.shared.recorder.now_us() / 1000
    }

    /// What all registrations have in common.
    fn registration(&self, payload: Payload, attempts: u32) -> Registration {
        Registration {
            token: payload.token,
            load: self.load.to_owned(),
            client: self.asker.client_id(),
            due: Due::In(0),
            every_ms: None,
            missed: Missed::Once,
            count: None,
            key: None,
            attempts,
            refusals: payload.refusals,
        }
    }

    /// What goes to the node with that, for one of our receivers.
    fn request(&mut self, payload: Payload, attempts_max: u32) -> Request {
        let (interval_ms, interval_max_ms) = (RETRY_AFTER_MS, RETRY_AFTER_MS_MAX);
        let retry = Retry { attempts_max, interval_ms, interval_max_ms, ..Retry::default() };
        let settings = OwnSettings { callback: Some(self.callback()), retry: Some(retry), ..Default::default() };
        Request { payload: payload.bytes(), settings, ..Default::default() }
    }

    async fn run(mut self) {
        match self.load {
            "one-shot" => one_shot::run(&mut self).await,
            "races" => races::run(&mut self).await,
            "recurring" => recurring::run(&mut self).await,
            "dedup" => Box::pin(dedup::run(&mut self)).await,
            "dead-letters" => dead_letters::run(&mut self).await,
            _ => fenced::run(&mut self).await,
        }
    }
}

/// Loads at work.
pub struct Load {
    shared: Arc<Shared>,
    admin: Client,
    workers: JoinSet<()>,
}

impl Load {
    /// Makes a client for each load, and begins.
    pub async fn start(target: &Target, settings: &LoadSettings, recorder: Recorder) -> Result<Self, LoadError> {
        let loads = settings.loads.iter().map(|name| {
            NAMES.into_iter().find(|known| known == name).ok_or_else(|| LoadError::Unknown { name: name.clone() })
        });
        let loads = loads.collect::<Result<Vec<_>, _>>()?;
        let receivers = Receivers::start(target.receiver_host, recorder.clone())
            .await
            .map_err(|source| LoadError::Listen { address: target.receiver_host, source })?;
        // Nodes that are ready know their administrator.
        let admin = connect(target, &ClientId::ADMIN.parse()?, &target.password, true).await?;
        let shared =
            Arc::new(Shared { recorder, receivers, tokens: AtomicU64::new(0), stop: CancellationToken::new() });
        let mut rng = StdRng::seed_from_u64(settings.seed);
        let (mut workers, processes) = (JoinSet::new(), Arc::new(AtomicU32::new(0)));
        let count = workers_of(&loads);
        let pause = Duration::from_secs(1).mul_f64(f64::from(count) / f64::from(settings.rate.max(1)));
        for load in loads {
            let client_id: ClientId = format!("jepsen-{load}").parse()?;
            admin.register_client(ClientSettings::new(client_id.clone(), PASSWORD)).await?;
            for number in 0..workers_per(load) {
                // Some send again by themselves what has no answer, some do not.
                let client = connect(target, &client_id, PASSWORD, number % 2 == 0).await?;
                let asker = Asker::new(processes.clone(), client, client_id.clone(), shared.recorder.clone());
                let rng = StdRng::seed_from_u64(rng.random());
                workers.spawn(Worker { shared: shared.clone(), asker, rng, pause, load }.run());
            }
        }
        Ok(Self { shared, admin, workers })
    }

    /// No more is begun; what is under way ends.
    pub async fn stop(&mut self) {
        self.shared.stop.cancel();
        while let Some(ended) = self.workers.join_next().await {
            ended.expect("no load panics");
        }
    }

    /// After [`Load::stop`] and healing: waits until nothing is left that is due within `patience`, or `patience` is
    /// over, and says what the cluster still has.
    pub async fn account(&self, patience: Duration) -> Result<(), LoadError> {
        left::account(&self.admin, &self.shared.recorder, patience).await
    }
}

/// Registrations whose answers may take a second each go side by side.
fn workers_per(load: &str) -> u32 {
    match load {
        "one-shot" => 8,
        "races" => 10,
        "recurring" => 4,
        "dedup" => 6,
        "dead-letters" => 4,
        _ => 6,
    }
}

fn workers_of(loads: &[&str]) -> u32 {
    loads.iter().map(|load| workers_per(load)).sum()
}

async fn connect(target: &Target, client: &ClientId, password: &str, again: bool) -> Result<Client, ClientError> {
    let credentials = Credentials::Password { client_id: client.clone(), password: password.to_owned() };
    let mut options = Options::new(target.addresses.clone(), credentials);
    options.request_timeout = REQUEST_TIMEOUT;
    options.connect_timeout = CONNECT_TIMEOUT;
    options.retry_registrations = again;
    Client::connect(options).await
}
