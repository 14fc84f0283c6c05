//! Passwords and API keys.
//!
//! Clients and keys live in the cluster's own group, of which every node holds a replica, so nobody else is asked. A
//! replica may be a little behind: before somebody is turned away, the leader is asked what it has stored, and this node checks
//! by that. Passwords and keys themselves go to no other node.
//! A password is hashed with argon2, which is slow and large on purpose: few are checked at a time, on threads that may
//! block, and few wait for that. Who has been wrong too often waits before it is heard again (see [`super::failures`]).
//! A password that was right is remembered, so that it is checked once and not with each connection: after a failover all
//! clients come at once. An API key is 256 random bits; one fast hash protects it.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use argon2::password_hash::PasswordHasher;
use argon2::password_hash::phc::PasswordHash;
use argon2::{Argon2, PasswordVerifier};
use data_encoding::HEXLOWER;
use hmac::{Hmac, KeyInit, Mac};
use rand::Rng;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::{Mutex as AsyncMutex, Semaphore};

use super::failures::Failures;
use crate::server::guests::whose;
use crate::store::keys::Key;
use crate::store::overlay::get_row;
use crate::store::rows::{ApiKeyRow, ClientRow};
use crate::store::{Store, StoreError};
use crate::task::locks::Mutex;
use crate::task::{ClientId, ClientLimits, InstantMs, Invalid};
use crate::wire::proto::AuthHandshake;

/// Each takes about 20 MiB and some 20 ms of a core.
const PASSWORDS_AT_A_TIME: usize = 2;
/// Passwords that wait to be checked: longer than this takes, nobody waits.
const PASSWORDS_WAITING_MAX: usize = 64;
/// Questions to the leader of group 0 at a time.
const QUESTIONS_MAX: usize = 16;
/// What is told to those who find no room among them.
const PASSWORDS_AGAIN_AFTER: Duration = Duration::from_millis(500);
pub const PASSWORD_BYTES_MAX: usize = 1024;
/// Passwords remembered as right.
const RIGHT_MAX: usize = 16 * 1024;
/// How an API key begins, so that one can be found where it should not be.
const KEY_PREFIX: &str = "bmr";
const KEY_ID_BYTES: usize = 8;
const KEY_SECRET_BYTES: usize = 32;

#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// One text for every reason: it must not tell which names exist.
    #[error("client id or password is wrong")]
    WrongPassword,
    #[error("the API key is wrong or was revoked")]
    WrongKey,
    #[error("too many logins wait to be looked at; this one was not")]
    Busy,
    #[error("too many logins have failed from this address, or as this client; nothing was looked at")]
    TooManyFailures(Duration),
    #[error("password: {0} bytes, the limit is {PASSWORD_BYTES_MAX}")]
    PasswordTooLong(usize),
    #[error("password: is empty")]
    PasswordEmpty,
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Who somebody turned out to be.
#[derive(Debug)]
pub struct Identity {
    pub client: ClientId,
    pub row: ClientRow,
    /// The API key it came in with.
    pub key_id: Option<String>,
}

impl Identity {
    /// Nobody is registered under this name: a node that is open to all has let it in.
    pub fn is_anyone(&self) -> bool {
        self.row.password_hash.is_empty()
    }
}

/// Whom somebody claims to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Who {
    Client(ClientId),
    /// Of a key that names itself.
    Key(String),
}

/// What is stored about somebody.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    client: ClientId,
    row: ClientRow,
    key: Option<ApiKeyRow>,
}

impl AuthError {
    /// After which time it may be different.
    pub fn again_after(&self) -> Option<Duration> {
        match self {
            AuthError::Busy => Some(PASSWORDS_AGAIN_AFTER),
            AuthError::TooManyFailures(wait) => Some(*wait),
            _ => None,
        }
    }
}

/// Lets clients in.
pub struct Auth {
    store: Store,
    /// Those who are checked, and those who wait for it.
    queue: Arc<Semaphore>,
    room: Arc<Semaphore>,
    /// Questions to the leader of group 0 that are under way.
    questions: Semaphore,
    right: Right,
    /// The same password of the same client is checked once, however many come with it.
    checking: Mutex<HashMap<[u8; 32], Arc<AsyncMutex<()>>>>,
    failures: Mutex<Failures>,
    /// `boomerang dev`: every name is welcome, as administrator.
    open: bool,
}

/// Passwords that were right, each as a keyed hash of itself and of the hash it was checked against: with another
/// password, or another stored hash, it is not found. The key is this process's own and is written nowhere.
struct Right {
    key: [u8; 32],
    marks: Mutex<HashSet<[u8; 32]>>,
}

impl Right {
    fn new() -> Self {
        let mut key = [0; 32];
        rand::rng().fill_bytes(&mut key);
        Self { key, marks: Mutex::default() }
    }

    fn mark(&self, password: &str, hash: &str) -> [u8; 32] {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.key).expect("a key of any length will do");
        // No hash holds a zero byte, so the two cannot be mistaken for other two.
        [hash.as_bytes(), &[0], password.as_bytes()].iter().for_each(|part| mac.update(part));
        mac.finalize().into_bytes().into()
    }

    fn holds(&self, mark: &[u8; 32]) -> bool {
        self.marks.lock().contains(mark)
    }

    fn add(&self, mark: [u8; 32]) {
        let mut marks = self.marks.lock();
        if marks.len() >= RIGHT_MAX {
            marks.clear();
        }
        marks.insert(mark);
    }
}

/// An API key as it is handed out, once.
pub struct NewKey {
    pub key_id: String,
    pub key: String,
    pub secret_hash: [u8; 32],
}

impl Auth {
    pub fn new(store: Store, open: bool) -> Self {
        Self {
            store,
            queue: Arc::new(Semaphore::new(PASSWORDS_AT_A_TIME + PASSWORDS_WAITING_MAX)),
            room: Arc::new(Semaphore::new(PASSWORDS_AT_A_TIME)),
            questions: Semaphore::new(QUESTIONS_MAX),
            right: Right::new(),
            checking: Mutex::default(),
            failures: Mutex::default(),
            open,
        }
    }

    /// What is stored about a client now.
    pub fn client(&self, client: &ClientId) -> Result<Option<ClientRow>, StoreError> {
        get_row(&self.store, "a client", &Key::client(client.as_str()))
    }

    /// What this node knows of somebody.
    pub fn stored(&self, who: &Who) -> Result<Option<Stored>, StoreError> {
        let (client, key) = match who {
            Who::Client(client) => (client.clone(), None),
            Who::Key(key_id) => {
                let row: Option<ApiKeyRow> = get_row(&self.store, "an api key", &Key::api_key(key_id))?;
                let Some(row) = row else { return Ok(None) };
                (row.client.clone(), Some(row))
            }
        };
        Ok(self.client(&client)?.map(|row| Stored { client, row, key }))
    }

    /// A try of somebody at this address, unless there have been too many.
    fn count(&self, from: IpAddr, who: &Who, now_ms: InstantMs) -> Result<(), AuthError> {
        let mut failures = self.failures.lock();
        match failures.wait(from, who.client(), now_ms) {
            Some(wait) => Err(AuthError::TooManyFailures(wait)),
            None => {
                failures.note(from, who.client(), now_ms);
                Ok(())
            }
        }
    }

    /// Whether somebody at this address is who it claims to be: by what this node knows, or else by what the leader of group 0
    /// does, which `ask` asks, with how far it had applied the group; `None` when there is nobody to ask.
    pub async fn identify<A: Future<Output = Option<(Option<Stored>, u64)>>>(
        &self,
        handshake: &AuthHandshake,
        from: IpAddr,
        now_ms: InstantMs,
        ask: impl FnOnce(Who) -> Option<A>,
    ) -> Result<(Identity, u64), AuthError> {
        let who = Who::of(handshake)?;
        let here = self.stored(&who)?;
        if self.open {
            let Who::Client(client) = who else { return Ok((check_key(&handshake.token, here)?, 0)) };
            let row = here.map_or_else(|| anyone(true), |stored| stored.row);
            let row = ClientRow { admin: true, password_hash: String::new(), ..row };
            return Ok((Identity { client, row, key_id: None }, 0));
        }
        if handshake.password.len() > PASSWORD_BYTES_MAX {
            return Err(AuthError::PasswordTooLong(handshake.password.len()));
        }
        // What costs next to nothing is not counted: whoever is known is not kept out by others at the same address.
        if let Some(identity) = self.known(&who, handshake, here.clone()) {
            return Ok((identity, 0));
        }
        let mark = here.as_ref().map(|stored| self.right.mark(&handshake.password, &stored.row.password_hash));
        let turn = mark.map(|mark| self.checking.lock().entry(mark).or_default().clone());
        let waited = match &turn {
            Some(turn) => Some(turn.lock().await),
            None => None,
        };
        let found = match self.known(&who, handshake, here.clone()) {
            Some(identity) => Ok((identity, 0)),
            None => self.try_to_identify(handshake, &who, here, from, now_ms, ask).await,
        };
        drop(waited);
        if let (Some(mark), Some(turn)) = (mark, turn) {
            let mut checking = self.checking.lock();
            // The map has one, and we have one.
            if Arc::strong_count(&turn) <= 2 {
                checking.remove(&mark);
            }
        }
        found
    }

    async fn try_to_identify<A: Future<Output = Option<(Option<Stored>, u64)>>>(
        &self,
        handshake: &AuthHandshake,
        who: &Who,
        here: Option<Stored>,
        from: IpAddr,
        now_ms: InstantMs,
        ask: impl FnOnce(Who) -> Option<A>,
    ) -> Result<(Identity, u64), AuthError> {
        let from = whose(from);
        self.count(from, who, now_ms)?;
        let wrong = match self.check(handshake, here.clone()).await {
            Ok(identity) => {
                self.failures.lock().take_back(from, who.client());
                return Ok((identity, 0));
            }
            Err(wrong @ (AuthError::WrongPassword | AuthError::WrongKey)) => wrong,
            Err(error) => return Err(error),
        };
        let Some(asked) = ask(who.clone()) else { return Err(wrong) };
        let _question = self.questions.try_acquire().map_err(|_| AuthError::Busy)?;
        let Some((there @ Some(_), applied_index)) = asked.await else { return Err(wrong) };
        if there == here {
            return Err(wrong);
        }
        let identity = self.check(handshake, there).await?;
        self.failures.lock().take_back(from, who.client());
        Ok((identity, applied_index))
    }

    /// By a password that is remembered, or by a key.
    fn known(&self, who: &Who, handshake: &AuthHandshake, here: Option<Stored>) -> Option<Identity> {
        let Who::Client(client) = who else { return check_key(&handshake.token, here).ok() };
        let row = here?.row;
        let is_right = self.right.holds(&self.right.mark(&handshake.password, &row.password_hash));
        is_right.then(|| Identity { client: client.clone(), row, key_id: None })
    }

    /// Whether somebody is who it claims to be, by what is stored about it.
    async fn check(&self, handshake: &AuthHandshake, stored: Option<Stored>) -> Result<Identity, AuthError> {
        if !handshake.token.is_empty() {
            return check_key(&handshake.token, stored);
        }
        let password = handshake.password.clone();
        // An unknown name takes as long as a wrong password.
        let hash = stored.as_ref().map_or_else(|| nobody().to_owned(), |stored| stored.row.password_hash.clone());
        let right = self.in_turn(move || verify(&password, &hash)).await?;
        match stored {
            Some(Stored { client, row, .. }) if right => {
                self.right.add(self.right.mark(&handshake.password, &row.password_hash));
                Ok(Identity { client, row, key_id: None })
            }
            _ => Err(AuthError::WrongPassword),
        }
    }

    /// Does what takes a core for long, when it is its turn. The place is taken until it is done, also if nobody waits any
    /// more.
    async fn in_turn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, AuthError> {
        let queued = self.queue.clone().try_acquire_owned().map_err(|_| AuthError::Busy)?;
        let room = self.room.clone().acquire_owned().await.expect("the semaphore is never closed");
        let done = tokio::task::spawn_blocking(move || {
            let _places = (queued, room);
            work()
        });
        Ok(done.await.expect("argon2 does not panic"))
    }

    pub fn knows_key(&self, key_id: &str) -> Result<bool, StoreError> {
        Ok(self.store.get_state(&Key::api_key(key_id))?.is_some())
    }

    pub fn knows_admin(&self) -> Result<bool, StoreError> {
        Ok(self.store.get_state(&Key::client(ClientId::ADMIN))?.is_some())
    }

    /// The hash to store for a new password.
    pub async fn hash(&self, password: String) -> Result<String, AuthError> {
        if password.is_empty() {
            return Err(AuthError::PasswordEmpty);
        }
        if password.len() > PASSWORD_BYTES_MAX {
            return Err(AuthError::PasswordTooLong(password.len()));
        }
        self.in_turn(move || hash_password(&password)).await
    }
}

impl Who {
    /// By what somebody shakes hands.
    pub fn of(handshake: &AuthHandshake) -> Result<Self, AuthError> {
        if handshake.token.is_empty() {
            return Ok(Self::Client(handshake.client_id.parse()?));
        }
        let (key_id, _) = parse_key(&handshake.token).ok_or(AuthError::WrongKey)?;
        Ok(Self::Key(key_id.to_owned()))
    }

    fn client(&self) -> Option<&ClientId> {
        match self {
            Self::Client(client) => Some(client),
            Self::Key(_) => None,
        }
    }
}

fn check_key(key: &str, stored: Option<Stored>) -> Result<Identity, AuthError> {
    let (key_id, secret) = parse_key(key).ok_or(AuthError::WrongKey)?;
    let Stored { client, row, key } = stored.ok_or(AuthError::WrongKey)?;
    let is_right = |key: &ApiKeyRow| same(&key.secret_hash, &hash_secret(secret));
    key.filter(is_right).ok_or(AuthError::WrongKey)?;
    Ok(Identity { client, row, key_id: Some(key_id.to_owned()) })
}

/// A client nobody has registered, in a node that is open to all.
fn anyone(admin: bool) -> ClientRow {
    ClientRow {
        password_hash: String::new(),
        admin,
        policy: None,
        limits: ClientLimits::default(),
        since_ms: 0,
        api_keys: Vec::new(),
    }
}

fn hash_password(password: &str) -> String {
    let hash: PasswordHash =
        Argon2::default().hash_password(password.as_bytes()).expect("the default parameters are valid");
    hash.to_string()
}

fn verify(password: &str, hash: &str) -> bool {
    match PasswordHash::new(hash) {
        Ok(hash) => Argon2::default().verify_password(password.as_bytes(), &hash).is_ok(),
        Err(_) => false,
    }
}

/// The hash of a password nobody knows.
fn nobody() -> &'static str {
    static NOBODY: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| hash_password(&random_hex(32)));
    &NOBODY
}

/// Compares in a time that does not depend on where the difference is.
fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

fn hash_secret(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

fn parse_key(key: &str) -> Option<(&str, &str)> {
    let (id, secret) = key.strip_prefix(KEY_PREFIX)?.strip_prefix('_')?.split_once('_')?;
    (id.len() == 2 * KEY_ID_BYTES && secret.len() == 2 * KEY_SECRET_BYTES).then_some((id, secret))
}

pub fn new_key() -> NewKey {
    let (key_id, secret) = (random_hex(KEY_ID_BYTES), random_hex(KEY_SECRET_BYTES));
    let secret_hash = hash_secret(&secret);
    NewKey { key: format!("{KEY_PREFIX}_{key_id}_{secret}"), key_id, secret_hash }
}

/// `bytes` random bytes in hexadecimal.
pub fn random_hex(bytes: usize) -> String {
    let mut random = vec![0; bytes];
    rand::rng().fill_bytes(&mut random);
    HEXLOWER.encode(&random)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_by_their_id_and_checked_by_their_secret() {
        let new = new_key();
        let (id, secret) = parse_key(&new.key).unwrap();
        assert_eq!(id, new.key_id);
        assert!(same(&hash_secret(secret), &new.secret_hash));
        for wrong in ["", "bmr_", "bmr_x_y", &new.key[1..], &new.key[..new.key.len() - 1]] {
            assert!(parse_key(wrong).is_none(), "{wrong}");
        }
    }

    #[test]
    fn a_password_that_was_right_is_known_with_its_hash_only() {
        let right = Right::new();
        let mark = right.mark("boomerang", "hash");
        assert!(!right.holds(&mark));
        right.add(mark);
        assert!(right.holds(&right.mark("boomerang", "hash")));
        for (password, hash) in [("boomerang ", "hash"), ("boomerang", "hash of another"), ("", "hash")] {
            assert!(!right.holds(&right.mark(password, hash)), "{password} {hash}");
        }
        assert!(!Right::new().holds(&Right::new().mark("boomerang", "hash")), "another process has another key");
        (0..RIGHT_MAX).for_each(|n| right.add(right.mark(&n.to_string(), "hash")));
        assert!(right.marks.lock().len() <= RIGHT_MAX);
    }

    #[test]
    fn a_password_is_checked_against_its_hash_only() {
        let hash = hash_password("boomerang");
        assert!(hash.starts_with("$argon2id$"));
        assert!(verify("boomerang", &hash));
        assert!(!verify("boomerang ", &hash));
        assert!(!verify("boomerang", "not a hash"));
        assert!(!verify("", nobody()));
    }
}
