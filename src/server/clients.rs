//! Clients and their keys, for administrators. All of it lies in the cluster's own group.

use std::sync::Arc;

use super::Service;
use super::auth::new_key;
use super::problem::Problem;
use super::sessions::{Session, SessionError};
use crate::propose::Ask;
use crate::shard::{PutApiKey, PutClient, Reply, Request};
use crate::task::{ClientId, ClientLimits, GroupId, Invalid};
use crate::wire::convert::policy_over;
use crate::wire::proto::{self, Status};

pub(super) fn administrator(session: Result<Arc<Session>, SessionError>) -> Result<Arc<Session>, Problem> {
    let session = session?;
    if session.admin {
        return Ok(session);
    }
    Err(Problem::new(Status::Unauthorized, format!("client '{}' is not an administrator", session.client)))
}

/// Asks the cluster's own group.
async fn ask_cluster(service: &Service, request: Request) -> Result<Reply, Problem> {
    Ok(service.proposer.ask(GroupId::CLUSTER, Ask::Plain(request)).await?)
}

pub(super) async fn register(
    service: &Service,
    session: Result<Arc<Session>, SessionError>,
    request: proto::ClientRegistrationRequest,
) -> Result<(), Problem> {
    administrator(session)?;
    let client: ClientId = request.client_id.parse()?;
    let policy = policy_over(None, request.callback.as_ref(), request.retry.as_ref(), request.dlq.as_ref())?;
    let limits = request.limits.unwrap_or_default();
    let limits = ClientLimits {
        delay_max_ms: (limits.delay_max_ms > 0).then_some(limits.delay_max_ms),
        payload_bytes_max: (limits.payload_bytes_max > 0).then_some(limits.payload_bytes_max),
    };
    let password_hash = service.auth.hash(request.password).await?;
    let put = PutClient { client, password_hash, admin: request.is_admin, policy, limits, only_if_absent: false };
    // Whoever is in with an old password or old rights comes in again with the new ones: see `sessions`.
    ask_cluster(service, Request::PutClient(put)).await?;
    Ok(())
}

pub(super) async fn deregister(
    service: &Service,
    session: Result<Arc<Session>, SessionError>,
    client: &str,
) -> Result<(), Problem> {
    administrator(session)?;
    let client: ClientId = client.parse()?;
    if client.as_str() == ClientId::ADMIN {
        return Err(Problem::new(Status::InvalidRequest, "client_id: 'admin' cannot be removed"));
    }
    match ask_cluster(service, Request::RemoveClient(client.clone())).await? {
        Reply::NotFound => Err(Problem::new(Status::NotFound, format!("client '{client}' is not known"))),
        _ => Ok(()),
    }
}

pub(super) async fn create_key(
    service: &Service,
    session: Result<Arc<Session>, SessionError>,
    request: proto::ApiKeyRequest,
) -> Result<proto::ApiKeyResponse, Problem> {
    const LABEL_BYTES_MAX: usize = 128;
    administrator(session)?;
    let client: ClientId = request.client_id.parse()?;
    if request.label.len() > LABEL_BYTES_MAX {
        return Err(Invalid::new(format!("label: more than {LABEL_BYTES_MAX} bytes")).into());
    }
    let new = new_key();
    let put = PutApiKey {
        key_id: new.key_id.clone(),
        client: client.clone(),
        label: request.label,
        secret_hash: new.secret_hash,
    };
    match ask_cluster(service, Request::PutApiKey(put)).await? {
        Reply::NotFound => Err(Problem::new(Status::NotFound, format!("client '{client}' is not known"))),
        _ => Ok(proto::ApiKeyResponse {
            status: Status::Ok as i32,
            key_id: new.key_id,
            key: new.key,
            ..Default::default()
        }),
    }
}

pub(super) async fn revoke_key(
    service: &Service,
    session: Result<Arc<Session>, SessionError>,
    key_id: String,
) -> Result<(), Problem> {
    administrator(session)?;
    match ask_cluster(service, Request::RemoveApiKey(key_id.clone())).await? {
        Reply::NotFound => Err(Problem::new(Status::NotFound, format!("API key '{key_id}' is not known"))),
        _ => Ok(()),
    }
}
