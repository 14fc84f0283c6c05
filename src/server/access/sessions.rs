//! Who is who, until when. Sessions live in the memory of one node and end with it; a task outlives the session it was
//! registered in, because its policy is stored with it.
//!
//! What sessions are opened by is stored in group 0, which every node applies: each node ends its own sessions when it
//! applies that a client has changed or is gone, or that a key was revoked ([`Ending`]).

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::auth::random_hex;
use crate::raft::Observer;
use crate::shard::Effect;
use crate::store::Store;
use crate::store::keys::Key;
use crate::store::overlay::get_row;
use crate::store::rows::{ClientRow, ShardMetaRow};
use crate::task::locks::RwLock;
use crate::task::{ClientId, ClientLimits, GroupId, InstantMs, Policy};

const SWEEP_AGAIN_AFTER_MS: u64 = 1_000;
/// 128 bits: not to be guessed.
const SESSION_ID_BYTES: usize = 16;

#[derive(Debug)]
pub struct Session {
    pub client: ClientId,
    pub admin: bool,
    /// The API key it was opened with.
    pub key_id: Option<String>,
    /// What the session's tasks are registered with: the client's defaults with the session's own settings over them.
    pub policy: Option<Arc<Policy>>,
    pub limits: ClientLimits,
    /// Understands the fields from 20 up.
    pub extended: bool,
    /// Wants to be told where else to go, rather than that this node goes there.
    pub redirects: bool,
    /// Of the client's row that it was opened by.
    fingerprint: Fingerprint,
    expires_at_ms: AtomicU64,
}

impl Session {
    /// Of somebody who is in on another node, for one request.
    pub fn of_caller(client: ClientId, admin: bool, policy: Option<Policy>, limits: ClientLimits) -> Self {
        Self {
            client,
            admin,
            key_id: None,
            policy: policy.map(Arc::new),
            limits,
            extended: true,
            redirects: true,
            fingerprint: Fingerprint::default(),
            expires_at_ms: AtomicU64::new(InstantMs::MAX),
        }
    }
}

/// Tells whether what is stored about a client has changed, in all that its sessions go by: its keys may come and go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fingerprint(u64);

impl Fingerprint {
    pub fn of(row: &ClientRow) -> Self {
        let mut hasher = DefaultHasher::new();
        let ClientLimits { delay_max_ms, payload_bytes_max, interval_min_ms } = row.limits;
        let limits = (delay_max_ms, payload_bytes_max, interval_min_ms);
        (&row.password_hash, row.admin, &row.policy, limits).hash(&mut hasher);
        Self(hasher.finish())
    }
}

/// A session as it begins.
#[derive(Debug)]
pub struct Opened {
    pub client: ClientId,
    pub admin: bool,
    pub key_id: Option<String>,
    pub policy: Option<Policy>,
    pub limits: ClientLimits,
    pub extended: bool,
    pub redirects: bool,
    pub fingerprint: Fingerprint,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    #[error("session_id: is empty; authenticate first")]
    Missing,
    #[error("session is unknown: it has expired, or the node has restarted; authenticate again")]
    Unknown,
    #[error("session has expired; authenticate again")]
    Expired,
    #[error("{0} sessions are open, the limit of this node")]
    TooMany(usize),
    #[error("this client has {0} sessions open, the limit of one client at this node")]
    TooManyOfClient(usize),
}

pub struct Sessions {
    open: RwLock<Open>,
    lifetime_ms: u64,
    sessions_max: usize,
}

#[derive(Default)]
struct Open {
    sessions: HashMap<String, Arc<Session>>,
    /// How many each client has.
    by_client: HashMap<ClientId, usize>,
    /// When those that had expired were last removed to make room.
    swept_ms: InstantMs,
}

impl Open {
    fn insert(&mut self, id: String, session: Arc<Session>) {
        *self.by_client.entry(session.client.clone()).or_default() += 1;
        self.sessions.insert(id, session);
    }

    fn retain(&mut self, stays: impl Fn(&Session) -> bool) {
        let by_client = &mut self.by_client;
        self.sessions.retain(|_, session| {
            let stays = stays(session);
            if !stays {
                leave(by_client, &session.client);
            }
            stays
        });
    }

    fn remove(&mut self, id: &str) {
        if let Some(session) = self.sessions.remove(id) {
            leave(&mut self.by_client, &session.client);
        }
    }
}

fn leave(by_client: &mut HashMap<ClientId, usize>, client: &ClientId) {
    if let Some(count) = by_client.get_mut(client) {
        *count -= 1;
        if *count == 0 {
            by_client.remove(client);
        }
    }
}

impl Sessions {
    pub fn new(lifetime_ms: u64, sessions_max: usize) -> Self {
        Self { open: RwLock::default(), lifetime_ms, sessions_max }
    }

    /// Returns the session's id and when it ends.
    pub fn open(&self, opened: Opened, now_ms: InstantMs) -> Result<(String, InstantMs), SessionError> {
        let Opened { client, admin, key_id, policy, limits, extended, redirects, fingerprint } = opened;
        let expires_at_ms = now_ms + self.lifetime_ms;
        let policy = policy.map(Arc::new);
        let expires = AtomicU64::new(expires_at_ms);
        let session =
            Session { client, admin, key_id, policy, limits, extended, redirects, fingerprint, expires_at_ms: expires };
        let mut open = self.open.write();
        // One client leaves room for others.
        let of_client_max = self.sessions_max.div_ceil(2);
        let of_client = |open: &Open| open.by_client.get(&session.client).copied().unwrap_or(0);
        if open.sessions.len() >= self.sessions_max || of_client(&open) >= of_client_max {
            // It looks at all of them.
            if now_ms >= open.swept_ms.saturating_add(SWEEP_AGAIN_AFTER_MS) {
                open.swept_ms = now_ms;
                open.retain(|session| session.expires_at_ms.load(Ordering::Relaxed) > now_ms);
            }
            if open.sessions.len() >= self.sessions_max {
                return Err(SessionError::TooMany(self.sessions_max));
            }
            if of_client(&open) >= of_client_max {
                return Err(SessionError::TooManyOfClient(of_client_max));
            }
        }
        let id = random_hex(SESSION_ID_BYTES);
        open.insert(id.clone(), Arc::new(session));
        Ok((id, expires_at_ms))
    }

    pub fn get(&self, id: &str, now_ms: InstantMs) -> Result<Arc<Session>, SessionError> {
        if id.is_empty() {
            return Err(SessionError::Missing);
        }
        let found = self.open.read().sessions.get(id).cloned();
        let session = found.ok_or(SessionError::Unknown)?;
        if session.expires_at_ms.load(Ordering::Relaxed) > now_ms {
            return Ok(session);
        }
        // It stays until it is swept, so that its owner is told that it expired rather than that it never was.
        Err(SessionError::Expired)
    }

    /// Returns when the session ends now.
    pub fn refresh(&self, id: &str, now_ms: InstantMs) -> Result<InstantMs, SessionError> {
        let session = self.get(id, now_ms)?;
        let expires_at_ms = now_ms + self.lifetime_ms;
        session.expires_at_ms.fetch_max(expires_at_ms, Ordering::Relaxed);
        Ok(expires_at_ms)
    }

    /// Ends one that should not have been opened.
    pub fn end(&self, id: &str) {
        self.open.write().remove(id);
    }

    /// Ends all sessions of a client but those that were opened by what is stored about it now.
    pub fn end_others(&self, client: &ClientId, now: Option<Fingerprint>) {
        self.open.write().retain(|session| session.client != *client || Some(session.fingerprint) == now);
    }

    /// Nobody knows any more what they were opened by.
    pub fn end_all(&self) {
        *self.open.write() = Open::default();
    }

    /// Ends all sessions that were opened with an API key that was revoked.
    pub fn end_all_of_key(&self, key_id: &str) {
        self.open.write().retain(|session| session.key_id.as_deref() != Some(key_id));
    }

    /// Forgets what expired more than one lifetime ago.
    pub fn sweep(&self, now_ms: InstantMs) {
        let oldest = now_ms.saturating_sub(self.lifetime_ms);
        self.open.write().retain(|session| session.expires_at_ms.load(Ordering::Relaxed) > oldest);
    }

    pub fn count(&self) -> usize {
        self.open.read().sessions.len()
    }
}

/// Hears what is applied.
pub struct Ending {
    pub sessions: Arc<Sessions>,
    pub store: Store,
}

impl Observer for Ending {
    fn applied(&self, group: GroupId, _: &ShardMetaRow, effects: &[Effect]) {
        if group != GroupId::CLUSTER {
            return;
        }
        for effect in effects {
            match effect {
                Effect::ClientChanged { client } => {
                    // A store that cannot be read ends the node elsewhere, and until then nobody stays in.
                    let row = get_row::<ClientRow>(&self.store, "a client", &Key::client(client.as_str()));
                    self.sessions.end_others(client, row.ok().flatten().as_ref().map(Fingerprint::of));
                }
                Effect::KeyRevoked { key_id } => self.sessions.end_all_of_key(key_id),
                Effect::Scheduled { .. } | Effect::Ended { .. } | Effect::Marked { .. } => {}
            }
        }
    }

    fn replaced(&self, group: GroupId) {
        if group == GroupId::CLUSTER {
            self.sessions.end_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(name: &str) -> ClientId {
        name.parse().unwrap()
    }

    fn opened(name: &str) -> Opened {
        Opened {
            client: client(name),
            admin: false,
            key_id: None,
            policy: None,
            limits: ClientLimits::default(),
            extended: false,
            redirects: false,
            fingerprint: Fingerprint::default(),
        }
    }

    #[test]
    fn a_session_ends_unless_it_is_refreshed() {
        let sessions = Sessions::new(100, 10);
        let (id, expires) = sessions.open(opened("a"), 1_000).unwrap();
        assert_eq!(expires, 1_100);
        assert!(sessions.get(&id, 1_099).is_ok());
        assert_eq!(sessions.refresh(&id, 1_050).unwrap(), 1_150);
        assert!(sessions.get(&id, 1_149).is_ok());
        assert_eq!(sessions.get(&id, 1_150).unwrap_err(), SessionError::Expired);
        assert_eq!(sessions.refresh(&id, 1_150).unwrap_err(), SessionError::Expired);
        assert_eq!(sessions.get("", 0).unwrap_err(), SessionError::Missing);
        assert_eq!(sessions.get("nonsense", 0).unwrap_err(), SessionError::Unknown);
        sessions.sweep(1_250);
        assert_eq!(sessions.count(), 0);
    }

    #[test]
    fn their_number_is_bounded_and_expired_ones_make_room() {
        let sessions = Sessions::new(100, 4);
        for _ in 0..2 {
            sessions.open(opened("a"), 1_000).unwrap();
        }
        assert_eq!(sessions.open(opened("a"), 1_050).unwrap_err(), SessionError::TooManyOfClient(2));
        let (id, _) = sessions.open(opened("b"), 1_050).unwrap();
        sessions.open(opened("b"), 1_050).unwrap();
        assert_eq!(sessions.open(opened("c"), 1_050).unwrap_err(), SessionError::TooMany(4));
        sessions.end(&id);
        sessions.open(opened("c"), 1_050).unwrap();
        // All others have expired by then.
        sessions.open(opened("a"), 2_100).unwrap();
        assert_eq!(sessions.count(), 1);
        ["a", "b", "c"].iter().for_each(|name| sessions.end_others(&client(name), None));
        assert_eq!(sessions.count(), 0);
        assert!(sessions.open.read().by_client.is_empty(), "nothing stays of those who have left");
    }

    #[test]
    fn a_client_that_has_changed_comes_in_again() {
        let row = ClientRow {
            password_hash: "hash".into(),
            admin: false,
            policy: None,
            limits: ClientLimits::default(),
            since_ms: 1,
            api_keys: Vec::new(),
        };
        let fingerprint = Fingerprint::of(&row);
        assert_eq!(Fingerprint::of(&ClientRow { api_keys: vec!["k".into()], ..row.clone() }), fingerprint);
        let sessions = Sessions::new(100, 10);
        let (other, _) = sessions.open(opened("b"), 0).unwrap();
        let (id, _) = sessions.open(Opened { fingerprint, ..opened("a") }, 0).unwrap();
        sessions.end_others(&client("a"), Some(fingerprint));
        assert!(sessions.get(&id, 0).is_ok(), "it was let in by the leader, before this node had heard of the client");
        sessions.end_others(&client("a"), Some(Fingerprint::of(&ClientRow { admin: true, ..row })));
        assert_eq!(sessions.get(&id, 0).unwrap_err(), SessionError::Unknown);
        assert!(sessions.get(&other, 0).is_ok());
    }
}
