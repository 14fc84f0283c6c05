//! Registers a client, or changes one.

use std::sync::Arc;

use super::administration::{ask_cluster, check_administrator};
use super::operation::{Operation, Respond};
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::server::problem::Problem;
use crate::shard::{PutClient, Request};
use crate::task::{ClientId, ClientLimits};
use crate::wire::convert::policy_over;
use crate::wire::proto::{ClientRegistrationRequest, ClientRegistrationResponse};

impl Operation for ClientRegistrationRequest {
    async fn here(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        respond(register(service, &session, self).await);
    }
}

async fn register(
    service: &Service,
    session: &Session,
    request: ClientRegistrationRequest,
) -> Result<ClientRegistrationResponse, Problem> {
    check_administrator(session)?;
    let client: ClientId = request.client_id.parse()?;
    let policy = policy_over(None, request.callback.as_ref(), request.retry.as_ref(), request.dlq.as_ref())?;
    let limits = request.limits.unwrap_or_default();
    let limits = ClientLimits {
        delay_max_ms: (limits.delay_max_ms > 0).then_some(limits.delay_max_ms),
        payload_bytes_max: (limits.payload_bytes_max > 0).then_some(limits.payload_bytes_max),
        interval_min_ms: (limits.interval_min_ms > 0).then_some(limits.interval_min_ms),
    };
    let password_hash = service.auth.hash(request.password).await?;
    let put = PutClient { client, password_hash, admin: request.is_admin, policy, limits, only_if_absent: false };
    // Whoever is in with an old password or old rights comes in again with the new ones: see `sessions`.
    ask_cluster(service, Request::PutClient(put)).await?;
    Ok(ClientRegistrationResponse::default())
}

#[cfg(test)]
mod tests {
    use super::super::rig::{DISK, Rig, check};
    use super::*;
    use crate::wire::problems::Code;

    fn orders() -> ClientRegistrationRequest {
        ClientRegistrationRequest { client_id: "orders".into(), password: "a password".into(), ..Default::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn an_administrator_makes_and_changes_clients() {
        let rig = Rig::start().await;
        let orders_row = || rig.service.auth.client(&"orders".parse().unwrap()).unwrap();
        check("a client", &rig.refusal(&rig.client(), orders()).await, Code::Unauthorized, "not an administrator");
        assert_eq!(orders_row(), None);
        rig.ask(&rig.admin(), orders()).await.unwrap();
        assert!(!orders_row().unwrap().admin);
        rig.ask(&rig.admin(), ClientRegistrationRequest { is_admin: true, ..orders() }).await.unwrap();
        assert!(orders_row().unwrap().admin);
    }

    #[tokio::test(start_paused = true)]
    async fn refusals() {
        let rig = Rig::start().await;
        for (name, request, text) in [
            ("no name", ClientRegistrationRequest { client_id: String::new(), ..orders() }, "client_id"),
            ("no password", ClientRegistrationRequest { password: String::new(), ..orders() }, "password"),
            ("a password too long", ClientRegistrationRequest { password: "x".repeat(5_000), ..orders() }, "password"),
        ] {
            check(name, &rig.refusal(&rig.admin(), request).await, Code::InvalidRequest, text);
        }
        rig.let_disk_run_low();
        check("low", &rig.refusal(&rig.admin(), orders()).await, Code::Overloaded, DISK);
        let rig = Rig::start().await;
        rig.hang_disk();
        check("hangs", &rig.refusal(&rig.admin(), orders()).await, Code::MaybeDone, "may have been");
    }
}
