//! The session of a connection: opened by a handshake, kept alive in the background, renewed when a node forgot it.
//!
//! A session is volatile on the node and times out there. Half of its remaining life is let pass before it is refreshed,
//! which leaves room for a slow answer and for clocks that differ a little. A clock that differs a lot does no harm
//! either: a request refused for its session is repeated in a new one (see `link`).

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::connection::Connection;
use super::{ClientError, Options, error};
use boomerang_task::InstantMs;
use boomerang_wire::answers::Verdict;
use boomerang_wire::proto::{SessionRefreshRequest, boomerang_envelope::Payload};

/// No refresh comes sooner after another than this, whatever a node says.
const REFRESH_PAUSE_MIN: Duration = Duration::from_millis(20);
/// By our clock the session is over already, so one of the two clocks is wrong and says nothing about its life.
const REFRESH_PAUSE_BLIND: Duration = Duration::from_secs(10);
/// After a refresh that failed on a connection that still stands.
const REFRESH_PAUSE_FAILED: Duration = Duration::from_secs(1);
/// Nodes may hand out sessions of any length; timers may not wait for ever.
const REFRESH_PAUSE_MAX: Duration = Duration::from_secs(3600);

/// What the node gave us in answer to the handshake.
#[derive(Debug, Clone, Default)]
pub(super) struct Session {
    pub id: String,
    /// Grows with every session opened on this connection; 0 is none.
    pub number: u64,
    /// By the node's clock; 0 when it does not say.
    pub expires_at_ms: InstantMs,
    /// How many nodes the cluster has; 0 when the node does not say.
    pub nodes: u32,
    /// Whose it is; empty when the node does not say.
    pub client_id: String,
}

/// Opens a session on a connection, the first one or a further one.
pub(super) async fn open(connection: &Connection, options: &Options) -> Result<(), ClientError> {
    let answer = connection.call(Payload::AuthHandshake(options.handshake())).await?;
    check(&answer)?;
    let Payload::AuthResponse(answer) = answer else {
        return Err(ClientError::Protocol("the handshake was answered with something else".into()));
    };
    connection.change_session(|session| {
        session.id = answer.session_id;
        session.number += 1;
        session.expires_at_ms = answer.expires_at_ms;
        session.nodes = answer.nodes;
        session.client_id = answer.client_id;
    });
    Ok(())
}

/// Opens a new session in place of the one with this number, unless somebody else just did.
pub(super) async fn renew(connection: &Connection, options: &Options, gone: u64) -> Result<(), ClientError> {
    let _one_at_a_time = connection.renewing.lock().await;
    if connection.session_number() != gone {
        return Ok(());
    }
    open(connection, options).await
}

/// Asks for a longer life of the session; the answer is when it ends now, by the node's clock.
pub(super) async fn refresh(connection: &Connection) -> Result<InstantMs, ClientError> {
    let number = connection.session_number();
    let answer = connection.call(Payload::SessionRefresh(SessionRefreshRequest {})).await?;
    check(&answer)?;
    let Payload::SessionRefreshResponse(answer) = answer else {
        return Err(ClientError::Protocol("the refresh was answered with something else".into()));
    };
    connection.change_session(|session| {
        if session.number == number {
            session.expires_at_ms = answer.new_expires_at_ms;
        }
    });
    Ok(answer.new_expires_at_ms)
}

/// Refreshes, or opens a new session when the old one is gone. Lives as long as the connection.
pub(super) async fn keep_alive(connection: Arc<Connection>, options: Arc<Options>) {
    let mut pause = pause_before_refresh(connection.session().expires_at_ms, now_ms());
    loop {
        tokio::select! {
            () = connection.ended() => return,
            () = tokio::time::sleep(pause) => {}
        }
        let session = connection.session();
        let mut result = refresh(&connection).await.map(drop);
        // Nobody but the node can say that a session is good; whatever it did not like, a new one is the remedy.
        if matches!(result, Err(ClientError::Server { .. })) {
            result = renew(&connection, &options, session.number).await;
        }
        pause = match result {
            Ok(()) => pause_before_refresh(connection.session().expires_at_ms, now_ms()),
            Err(_) => REFRESH_PAUSE_FAILED,
        };
    }
}

/// The status of an answer as a result.
pub(super) fn check(answer: &Payload) -> Result<(), ClientError> {
    match Verdict::of(answer) {
        Some(verdict) => error::check(verdict),
        None => Err(ClientError::Protocol("a request came where an answer belongs".into())),
    }
}

fn pause_before_refresh(expires_at_ms: InstantMs, now_ms: InstantMs) -> Duration {
    if expires_at_ms == 0 {
        return REFRESH_PAUSE_MAX;
    }
    match expires_at_ms.checked_sub(now_ms) {
        None | Some(0) => REFRESH_PAUSE_BLIND,
        Some(left_ms) => Duration::from_millis(left_ms / 2).clamp(REFRESH_PAUSE_MIN, REFRESH_PAUSE_MAX),
    }
}

fn now_ms() -> InstantMs {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_life_passes_before_a_refresh() {
        assert_eq!(pause_before_refresh(61_000, 1_000), Duration::from_secs(30));
        assert_eq!(pause_before_refresh(1_002, 1_000), REFRESH_PAUSE_MIN);
        assert_eq!(pause_before_refresh(1_000, 9_000), REFRESH_PAUSE_BLIND, "a wrong clock must not make a busy loop");
        assert_eq!(pause_before_refresh(0, 9_000), REFRESH_PAUSE_MAX);
        assert_eq!(pause_before_refresh(u64::MAX, 0), REFRESH_PAUSE_MAX);
    }
}
