//! Removes a client and its keys; its tasks stay.

use std::sync::Arc;

use super::administration::{ask_cluster, check_administrator, unknown_client};
use super::operation::{Operation, Respond};
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::server::problem::Problem;
use crate::shard::{Reply, Request};
use crate::task::ClientId;
use crate::wire::proto::{ClientDeregistrationRequest, ClientDeregistrationResponse};

impl Operation for ClientDeregistrationRequest {
    async fn here(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        respond(remove(service, &session, self).await);
    }
}

async fn remove(
    service: &Service,
    session: &Session,
    request: ClientDeregistrationRequest,
) -> Result<ClientDeregistrationResponse, Problem> {
    check_administrator(session)?;
    let client: ClientId = request.client_id.parse()?;
    if client.as_str() == ClientId::ADMIN {
        return Err(Problem::invalid("client_id: 'admin' cannot be removed"));
    }
    match ask_cluster(service, Request::RemoveClient(client.clone())).await? {
        Reply::NotFound => Err(unknown_client(&client)),
        _ => Ok(ClientDeregistrationResponse::default()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::rig::{DISK, Rig, check};
    use super::*;
    use crate::wire::problems::Code;
    use crate::wire::proto::ClientRegistrationRequest;

    fn remove(client_id: &str) -> ClientDeregistrationRequest {
        ClientDeregistrationRequest { client_id: client_id.into() }
    }

    #[tokio::test(start_paused = true)]
    async fn an_administrator_removes_clients_but_not_the_first_administrator() {
        let rig = Rig::start().await;
        let orders =
            ClientRegistrationRequest { client_id: "orders".into(), password: "x".into(), ..Default::default() };
        rig.ask(&rig.admin(), orders).await.unwrap();
        check("a client", &rig.refusal(&rig.client(), remove("orders")).await, Code::Unauthorized, "administrator");
        rig.ask(&rig.admin(), remove("orders")).await.unwrap();
        check("twice", &rig.refusal(&rig.admin(), remove("orders")).await, Code::NotFound, "'orders' is not known");
        check("admin", &rig.refusal(&rig.admin(), remove("admin")).await, Code::InvalidRequest, "cannot be removed");
        check("no name", &rig.refusal(&rig.admin(), remove("")).await, Code::InvalidRequest, "client_id");
    }

    #[tokio::test(start_paused = true)]
    async fn full_and_hanging_disks_are_told_apart() {
        let rig = Rig::start().await;
        rig.let_disk_run_low();
        check("low", &rig.refusal(&rig.admin(), remove("orders")).await, Code::Overloaded, DISK);
        rig.let_disk_be();
        rig.hang_disk();
        check("hangs", &rig.refusal(&rig.admin(), remove("orders")).await, Code::MaybeDone, "may have been");
    }
}
