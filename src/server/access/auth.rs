//! Passwords and API keys.
//!
//! Clients and keys live in the cluster's own group, of which every node holds a replica, so nobody else is asked. A
//! replica may be a little behind: before somebody is turned away, the leader is asked (see [`super::handshake`]).
//! A password is hashed with argon2, which is slow and large on purpose: few are checked at a time, on threads that may
//! block, and few wait for that. Who has been wrong too often waits before it is heard again (see [`super::failures`]).
//! A password that was right is remembered, so that it is checked once and not with each connection: after a failover all
//! clients come at once. An API key is 256 random bits; one fast hash protects it.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::Duration;

use argon2::password_hash::PasswordHasher;
use argon2::password_hash::phc::PasswordHash;
use argon2::{Argon2, PasswordVerifier};
use data_encoding::HEXLOWER;
use hmac::{Hmac, KeyInit, Mac};
use rand::Rng;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::failures::Failures;
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
    #[error("{PASSWORDS_WAITING_MAX} passwords wait to be checked; nothing was looked at")]
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
    queue: Semaphore,
    room: Semaphore,
    right: Right,
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
            queue: Semaphore::new(PASSWORDS_AT_A_TIME + PASSWORDS_WAITING_MAX),
            room: Semaphore::new(PASSWORDS_AT_A_TIME),
            right: Right::new(),
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

    /// Whether somebody at this address may try at all.
    pub fn hear(&self, from: IpAddr, who: &Who, now_ms: InstantMs) -> Result<(), AuthError> {
        match self.failures.lock().wait(from, who.client(), now_ms) {
            Some(wait) if !self.open => Err(AuthError::TooManyFailures(wait)),
            _ => Ok(()),
        }
    }

    /// It was wrong.
    pub fn note_failure(&self, from: IpAddr, who: &Who, now_ms: InstantMs) {
        self.failures.lock().note(from, who.client(), now_ms);
    }

    /// Whether this password is remembered as right: that costs nothing to find out.
    pub fn is_remembered(&self, handshake: &AuthHandshake, stored: Option<&Stored>) -> bool {
        let mark = |stored: &Stored| self.right.mark(&handshake.password, &stored.row.password_hash);
        handshake.token.is_empty() && stored.is_some_and(|stored| self.right.holds(&mark(stored)))
    }

    /// Whether somebody is who it claims to be, by what is stored about it.
    pub async fn check(&self, handshake: &AuthHandshake, stored: Option<Stored>) -> Result<Identity, AuthError> {
        match handshake.token.is_empty() {
            true => self.check_password(handshake.client_id.parse()?, handshake.password.clone(), stored).await,
            false => check_key(&handshake.token, stored),
        }
    }

    async fn check_password(
        &self,
        client: ClientId,
        password: String,
        stored: Option<Stored>,
    ) -> Result<Identity, AuthError> {
        let row = stored.map(|stored| stored.row);
        if self.open {
            let row = row.unwrap_or_else(|| anyone(true));
            let row = ClientRow { admin: true, password_hash: String::new(), ..row };
            return Ok(Identity { client, row, key_id: None });
        }
        if password.len() > PASSWORD_BYTES_MAX {
            return Err(AuthError::PasswordTooLong(password.len()));
        }
        let mark = row.as_ref().map(|row| self.right.mark(&password, &row.password_hash));
        let is_known = || mark.as_ref().is_some_and(|mark| self.right.holds(mark));
        // Of many that come together, one is checked while the others wait.
        let _room = match is_known() {
            true => None,
            false => Some(self.room().await?),
        };
        if let Some(row) = row.as_ref().filter(|_| is_known()) {
            return Ok(Identity { client, row: row.clone(), key_id: None });
        }
        // An unknown name takes as long as a wrong password.
        let hash = row.as_ref().map_or_else(|| nobody().to_owned(), |row| row.password_hash.clone());
        let checked = tokio::task::spawn_blocking(move || verify(&password, &hash));
        let right = checked.await.expect("argon2 does not panic");
        match row {
            Some(row) if right => {
                self.right.add(mark.expect("made from its row"));
                Ok(Identity { client, row, key_id: None })
            }
            _ => Err(AuthError::WrongPassword),
        }
    }

    /// A place among those whose passwords are checked.
    async fn room(&self) -> Result<(SemaphorePermit<'_>, SemaphorePermit<'_>), AuthError> {
        let queued = self.queue.try_acquire().map_err(|_| AuthError::Busy)?;
        Ok((queued, self.room.acquire().await.expect("the semaphore is never closed")))
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
        let _room = self.room().await?;
        let hashed = tokio::task::spawn_blocking(move || hash_password(&password));
        Ok(hashed.await.expect("argon2 does not panic"))
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
