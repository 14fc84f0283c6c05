//! One connection and how it is made: dialled when it is needed, and again when it broke.
//!
//! Only one caller at a time makes a connection; the others wait for what comes of it, at most until their own deadline.
//! After a pass over all addresses in vain there is a pause, which doubles up to a bound and is randomised, so that a
//! thousand clients do not fall upon a node the moment it is back.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, MutexGuard, OnceLock};
use std::time::Duration;

use boomerang_task::locks::Mutex;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::connection::{Connection, Sent};
use super::{ClientError, Options, session};
use boomerang_task::{ClientId, Pauses};
use boomerang_wire::proto::boomerang_envelope::Payload;

/// The pause after the first pass over all addresses in vain.
const REDIAL_PAUSE_MIN: Duration = Duration::from_millis(50);
const REDIAL_PAUSE_MAX: Duration = Duration::from_secs(2);

/// A connection to one of several addresses: made when it is needed, and again when it broke.
pub(super) struct Link {
    options: Arc<Options>,
    inflight: Arc<Semaphore>,
    addresses: Mutex<Arc<[String]>>,
    current: Mutex<Option<Arc<Connection>>>,
    /// Held across awaits on purpose: whoever waits for it waits for a connection.
    redial: tokio::sync::Mutex<Redial>,
    /// Told of every session that is opened.
    seen: Arc<Seen>,
}

/// What a handshake says of the cluster.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// How many nodes it has; 0 when the node does not say.
    pub nodes: AtomicU32,
    /// Whose sessions these are.
    pub client_id: OnceLock<ClientId>,
}

/// Where the search for a connection stands. Kept between requests, so that they share one backoff.
struct Redial {
    /// Index of the address to try next.
    next: usize,
    /// Attempts in vain since the last good one.
    failures: usize,
    not_before: Instant,
    /// After a pass over all addresses in vain.
    pauses: Pauses,
    last_error: Option<ClientError>,
}

const fn redial_pauses() -> Pauses {
    Pauses::new(REDIAL_PAUSE_MIN, REDIAL_PAUSE_MAX)
}

impl Link {
    /// `inflight` is closed when the client is.
    pub fn new(options: Arc<Options>, addresses: Vec<String>, inflight: Arc<Semaphore>, seen: Arc<Seen>) -> Self {
        let redial =
            Redial { next: 0, failures: 0, not_before: Instant::now(), pauses: redial_pauses(), last_error: None };
        Self {
            options,
            inflight,
            addresses: Mutex::new(addresses.into()),
            current: Mutex::new(None),
            redial: tokio::sync::Mutex::new(redial),
            seen,
        }
    }

    /// The first connection: each address is tried once.
    pub async fn begin(&self) -> Result<(), ClientError> {
        let mut redial = self.redial.lock().await;
        let addresses = self.addresses().len();
        for address in 1..=addresses {
            match self.dial(&mut redial).await {
                Ok(_) => break,
                Err(error) if error.is_final() || address == addresses => return Err(error),
                Err(_) => {}
            }
        }
        Ok(())
    }

    pub fn deadline(&self) -> Instant {
        Instant::now() + self.options.request_timeout
    }

    fn addresses(&self) -> Arc<[String]> {
        self.addresses.lock().clone()
    }

    /// Tries these as well from now on, behind those it knows.
    pub fn add_addresses<'a>(&self, more: impl Iterator<Item = &'a String>) {
        let mut addresses = self.addresses.lock();
        let new: Vec<String> = more.filter(|address| !addresses.contains(address)).cloned().collect();
        if !new.is_empty() {
            *addresses = addresses.iter().cloned().chain(new).collect();
        }
    }

    /// Sends on the connection there is, or on a new one. Nothing is sent twice: a connection that is over refuses.
    pub async fn send(
        &self,
        mut payload: Payload,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Result<(Arc<Connection>, Sent), ClientError> {
        let mut permit = permit;
        let mut deadline = None;
        loop {
            let connection = match self.open_connection() {
                Some(connection) => connection,
                None => self.connection(*deadline.get_or_insert_with(|| self.deadline())).await?,
            };
            match connection.send(payload, permit) {
                Ok(sent) => return Ok((connection, sent)),
                Err(unsent) => (payload, permit) = (unsent.payload, unsent.permit),
            }
            // It broke in between. Whoever broke it has ended it, so the next round makes a new one.
        }
    }

    /// The connection, if it stands.
    pub fn open_connection(&self) -> Option<Arc<Connection>> {
        self.current().as_ref().filter(|connection| connection.is_open()).cloned()
    }

    /// The connection, made anew when there is none; tried until `deadline`.
    pub async fn connection(&self, deadline: Instant) -> Result<Arc<Connection>, ClientError> {
        if let Some(connection) = self.open_connection() {
            return Ok(connection);
        }
        let Ok(mut redial) = tokio::time::timeout_at(deadline, self.redial.lock()).await else {
            let timed_out = io::Error::new(io::ErrorKind::TimedOut, "no node answered in time");
            return Err(ClientError::connect(&self.addresses().join(" or "), timed_out));
        };
        if let Some(connection) = self.open_connection() {
            return Ok(connection);
        }
        loop {
            if self.inflight.is_closed() {
                return Err(ClientError::Closed);
            }
            if redial.not_before >= deadline
                && let Some(error) = &redial.last_error
            {
                return Err(error.clone());
            }
            tokio::time::sleep_until(redial.not_before).await;
            match self.dial(&mut redial).await {
                // Closed meanwhile: nobody else would end this one.
                Ok(_) if self.inflight.is_closed() => self.end(),
                Ok(connection) => return Ok(connection),
                Err(error) if error.is_final() || Instant::now() >= deadline => return Err(error),
                Err(_) => {}
            }
        }
    }

    /// The connection, or one attempt to make it, unless one has just failed: there are other nodes to go to.
    pub async fn try_connection(&self) -> Result<Arc<Connection>, ClientError> {
        if let Some(connection) = self.open_connection() {
            return Ok(connection);
        }
        let mut redial = self.redial.lock().await;
        if let Some(connection) = self.open_connection() {
            return Ok(connection);
        }
        if self.inflight.is_closed() {
            return Err(ClientError::Closed);
        }
        if let Some(error) = redial.last_error.as_ref().filter(|_| redial.not_before > Instant::now()) {
            return Err(error.clone());
        }
        self.dial(&mut redial).await
    }

    /// One attempt on one address: connect, handshake, and on success the new current connection.
    async fn dial(&self, redial: &mut Redial) -> Result<Arc<Connection>, ClientError> {
        let addresses = self.addresses();
        let address = &addresses[redial.next % addresses.len()];
        match dial_address(address, &self.options).await {
            Ok(connection) => {
                (redial.failures, redial.last_error, redial.pauses) = (0, None, redial_pauses());
                self.note(&connection);
                tokio::spawn(session::keep_alive(connection.clone(), self.options.clone()));
                *self.current() = Some(connection.clone());
                Ok(connection)
            }
            Err(error) => {
                redial.next = (redial.next + 1) % addresses.len();
                redial.failures += 1;
                redial.last_error = Some(error.clone());
                if redial.failures.is_multiple_of(addresses.len()) {
                    redial.not_before = Instant::now() + redial.pauses.next(rand::random());
                }
                Err(error)
            }
        }
    }

    fn note(&self, connection: &Connection) {
        let session = connection.session();
        self.seen.nodes.store(session.nodes, Ordering::Relaxed);
        if let Ok(client_id) = session.client_id.parse() {
            let _ = self.seen.client_id.set(client_id);
        }
    }

    pub fn end(&self) {
        if let Some(connection) = self.current().take() {
            connection.end(ClientError::Closed);
        }
    }

    fn current(&self) -> MutexGuard<'_, Option<Arc<Connection>>> {
        self.current.lock()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.end();
    }
}

async fn start(address: &str, stream: TcpStream, options: &Options) -> Result<Arc<Connection>, ClientError> {
    #[cfg(feature = "tls")]
    if let Some(tls) = &options.tls {
        let stream = tls.connect(address, stream).await.map_err(|error| ClientError::connect(address, error))?;
        let (read_half, write_half) = tokio::io::split(stream);
        return Ok(Connection::start(address, read_half, write_half, options.request_timeout));
    }
    let (read_half, write_half) = stream.into_split();
    Ok(Connection::start(address, read_half, write_half, options.request_timeout))
}

/// Connects and opens a session.
async fn dial_address(address: &str, options: &Options) -> Result<Arc<Connection>, ClientError> {
    let attempt = async {
        let stream = TcpStream::connect(address).await.map_err(|error| ClientError::connect(address, error))?;
        stream.set_nodelay(true).map_err(|error| ClientError::connect(address, error))?;
        let connection = EndOnDrop(Some(start(address, stream, options).await?));
        match session::open(connection.get(), options).await {
            Ok(()) => Ok(connection.keep()),
            // No request was under way, so this is not a loss but a failure to connect.
            Err(ClientError::ConnectionLost { address, reason }) => {
                Err(ClientError::connect(&address, io::Error::other(format!("{reason} during the handshake"))))
            }
            Err(error) => Err(error),
        }
    };
    match tokio::time::timeout(options.connect_timeout, attempt).await {
        Ok(result) => result,
        Err(_) => {
            let text = format!("no connection and handshake within {:?}", options.connect_timeout);
            Err(ClientError::connect(address, io::Error::new(io::ErrorKind::TimedOut, text)))
        }
    }
}

/// Ends a connection whose handshake failed or was given up, so that its tasks do not stay.
struct EndOnDrop(Option<Arc<Connection>>);

impl EndOnDrop {
    fn get(&self) -> &Connection {
        self.0.as_ref().expect("there until keep()")
    }

    fn keep(mut self) -> Arc<Connection> {
        self.0.take().expect("there until keep()")
    }
}

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        if let Some(connection) = &self.0 {
            connection.end(ClientError::Closed);
        }
    }
}
