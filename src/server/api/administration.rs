//! What the operations of administrators share.

use crate::propose::Ask;
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::server::problem::Problem;
use crate::shard::{Reply, Request};
use crate::task::{ClientId, GroupId};
use crate::wire::problems::Code;

pub(super) fn check_administrator(session: &Session) -> Result<(), Problem> {
    if session.admin {
        return Ok(());
    }
    Err(Problem::unauthorized(format!("client '{}' is not an administrator", session.client)))
}

/// Asks the cluster's own group, where clients and their keys are.
pub(super) async fn ask_cluster(service: &Service, request: Request) -> Result<Reply, Problem> {
    Ok(service.proposer.ask(GroupId::CLUSTER, Ask::Plain(request)).await?)
}

pub(super) fn unknown_client(client: &ClientId) -> Problem {
    Problem::new(Code::NotFound, format!("client '{client}' is not known"))
}
