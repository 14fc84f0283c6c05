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

#[cfg(test)]
mod tests {
    use super::super::rig::{DISK, Rig, check};
    use super::*;
    use crate::wire::proto::{ApiKeyRequest, ClientRegistrationRequest};

    #[tokio::test(start_paused = true)]
    async fn a_key_is_revoked_once_by_an_administrator() {
        let rig = Rig::start().await;
        let orders =
            ClientRegistrationRequest { client_id: "orders".into(), password: "x".into(), ..Default::default() };
        rig.ask(&rig.admin(), orders).await.unwrap();
        let key = ApiKeyRequest { client_id: "orders".into(), label: "laptop".into() };
        let made = rig.ask(&rig.admin(), key).await.unwrap();
        let revoke = ApiKeyRevocation { key_id: made.key_id.clone() };
        check("a client", &rig.refusal(&rig.client(), revoke.clone()).await, Code::Unauthorized, "administrator");
        rig.let_disk_run_full();
        check("full", &rig.refusal(&rig.admin(), revoke.clone()).await, Code::Overloaded, DISK);
        rig.let_disk_be();
        rig.ask(&rig.admin(), revoke.clone()).await.unwrap();
        assert!(rig.identity_of(&made.key).await.is_err(), "it was revoked");
        check("twice", &rig.refusal(&rig.admin(), revoke.clone()).await, Code::NotFound, &made.key_id);
        rig.hang_disk();
        check("hangs", &rig.refusal(&rig.admin(), revoke).await, Code::MaybeDone, "may have been");
    }
}
