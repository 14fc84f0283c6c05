//! Makes an API key for a client.

use std::sync::Arc;

use super::administration::{ask_cluster, check_administrator, unknown_client};
use super::operation::{Operation, Respond};
use crate::server::Service;
use crate::server::access::auth::new_key;
use crate::server::access::sessions::Session;
use crate::server::problem::Problem;
use crate::shard::{PutApiKey, Reply, Request};
use crate::task::{ClientId, Invalid};
use crate::wire::proto::{ApiKeyRequest, ApiKeyResponse};

const LABEL_BYTES_MAX: usize = 128;

impl Operation for ApiKeyRequest {
    async fn here(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        respond(create(service, &session, self).await);
    }
}

async fn create(service: &Service, session: &Session, request: ApiKeyRequest) -> Result<ApiKeyResponse, Problem> {
    check_administrator(session)?;
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
        Reply::NotFound => Err(unknown_client(&client)),
        _ => Ok(ApiKeyResponse { key_id: new.key_id, key: new.key, ..Default::default() }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::rig::{DISK, Rig, check};
    use super::*;
    use crate::wire::problems::Code;
    use crate::wire::proto::ClientRegistrationRequest;

    fn key_for(client_id: &str) -> ApiKeyRequest {
        ApiKeyRequest { client_id: client_id.into(), label: "laptop".into() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_opens_the_door_for_its_client() {
        let rig = Rig::start().await;
        check(
            "no client",
            &rig.refusal(&rig.admin(), key_for("orders")).await,
            Code::NotFound,
            "'orders' is not known",
        );
        let orders =
            ClientRegistrationRequest { client_id: "orders".into(), password: "x".into(), ..Default::default() };
        rig.ask(&rig.admin(), orders).await.unwrap();
        check("a client", &rig.refusal(&rig.client(), key_for("orders")).await, Code::Unauthorized, "administrator");
        let made = rig.ask(&rig.admin(), key_for("orders")).await.unwrap();
        assert_eq!(rig.identity_of(&made.key).await.unwrap().client.as_str(), "orders");
        let long = ApiKeyRequest { label: "x".repeat(LABEL_BYTES_MAX + 1), ..key_for("orders") };
        check("a label too long", &rig.refusal(&rig.admin(), long).await, Code::InvalidRequest, "label");
    }

    #[tokio::test(start_paused = true)]
    async fn full_and_hanging_disks_are_told_apart() {
        let rig = Rig::start().await;
        rig.let_disk_run_low();
        check("low", &rig.refusal(&rig.admin(), key_for("admin")).await, Code::Overloaded, DISK);
        let rig = Rig::start().await;
        rig.hang_disk();
        // Each repetition would make another one.
        check("hangs", &rig.refusal(&rig.admin(), key_for("admin")).await, Code::MaybeDone, "may have been");
    }
}
