//! Revokes an API key; the sessions that were opened with it end.

use std::sync::Arc;

use super::administration::{ask_cluster, check_administrator};
use super::operation::{Operation, Respond};
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::server::problem::Problem;
use crate::shard::{Reply, Request};
use crate::wire::problems::Code;
use crate::wire::proto::{ApiKeyRevocation, ApiKeyRevocationResponse};

impl Operation for ApiKeyRevocation {
    async fn here(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        respond(revoke(service, &session, self).await);
    }
}

async fn revoke(
    service: &Service,
    session: &Session,
    request: ApiKeyRevocation,
) -> Result<ApiKeyRevocationResponse, Problem> {
    check_administrator(session)?;
    let key_id = request.key_id;
    match ask_cluster(service, Request::RemoveApiKey(key_id.clone())).await? {
        Reply::NotFound => Err(Problem::new(Code::NotFound, format!("API key '{key_id}' is not known"))),
        _ => Ok(ApiKeyRevocationResponse::default()),
    }
}
