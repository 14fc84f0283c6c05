//! How somebody gets in: whoever comes with a password or a key gets a session.

use std::net::IpAddr;

use super::auth::{AuthError, Identity};
use super::sessions::{Fingerprint, Opened};
use crate::server::Service;
use crate::server::problem::Problem;
use crate::server::routing::forward;
use crate::store::StoreError;
use crate::store::keys::Key;
use crate::store::overlay::get_row;
use crate::store::rows::Applied;
use crate::task::GroupId;
use crate::wire::PROTOCOL;
use crate::wire::convert::policy_over;
use crate::wire::proto;

/// Opens a session for whoever the handshake names, which came from this address.
pub(in crate::server) async fn authenticate(
    service: &Service,
    request: proto::AuthHandshake,
    from: IpAddr,
) -> Result<proto::AuthResponse, Problem> {
    let extended = request.protocol >= PROTOCOL;
    // This node may not have heard yet of somebody who is new, so the leader is asked before anybody is turned away.
    let is_behind = !service.router.is_alone() && service.router.leads(GroupId::CLUSTER).is_none();
    let ask = |who| is_behind.then_some(async move { forward::stored(service, &who).await });
    let now_ms = service.clock.now_ms();
    let (identity, known_up_to) = service.auth.identify(&request, from, now_ms, ask).await?;
    let Identity { client, row, key_id } = &identity;
    let policy =
        policy_over(row.policy.as_ref(), request.callback.as_ref(), request.retry.as_ref(), request.dlq.as_ref())?;
    let fingerprint = Fingerprint::of(row);
    let opened = Opened {
        client: client.clone(),
        admin: row.admin,
        key_id: key_id.clone(),
        policy,
        limits: row.limits,
        extended,
        redirects: request.redirects,
        fingerprint,
    };
    let (session_id, expires_at_ms) = service.sessions.open(opened, service.clock.now_ms())?;
    // The client may have been changed or removed since it was looked up; whatever this node applies from now on ends
    // the session by itself. A node that has not come as far as whoever looked knows nothing better.
    if !identity.is_anyone() && applied_index(service)? >= known_up_to {
        let now = service.auth.client(client)?.as_ref().map(Fingerprint::of);
        let key_is_good = key_id.as_ref().is_none_or(|key_id| service.auth.knows_key(key_id).unwrap_or(false));
        if now != Some(fingerprint) || !key_is_good {
            service.sessions.end(&session_id);
            return Err(AuthError::WrongPassword.into());
        }
    }
    let mut answer = proto::AuthResponse { session_id, expires_at_ms, ..Default::default() };
    if extended {
        answer.client_id = identity.client.to_string();
        answer.nodes = service.router.cluster().nodes_count();
    }
    Ok(answer)
}

/// How far this node has applied group 0.
pub(in crate::server) fn applied_index(service: &Service) -> Result<u64, StoreError> {
    let applied: Option<Applied> = get_row(&service.store, "last applied", &Key::applied(GroupId::CLUSTER))?;
    Ok(applied.map_or(0, |applied| applied.index))
}
