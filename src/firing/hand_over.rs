//! Gives the leadership of a group to another replica, with a pause as short as can be.
//!
//! Nothing more is dispatched first: the transfer goes past the leases of the followers, so that for a moment two
//! nodes could take themselves for the leader. What is out is given a moment to come back, because its outcome can only
//! be stored in this term; what has not come back by then is delivered again by the next leader, with a larger fence. If there
//! is none in the end, this one goes on and still knows what is out.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use openraft::ServerState;
use openraft::rt::WatchReceiver as _;
use tokio::time::timeout;

use super::Ledger;
use crate::raft::{Group, LEASE, ReplicaId};

/// Whoever is due meanwhile waits for it.
const SETTLE_WITHIN: Duration = Duration::from_millis(150);
/// A transfer takes milliseconds. When it fails, openraft stores nothing and beats no more for the rest of the term, and
/// whoever can is elected.
const TRANSFER_WITHIN: Duration = LEASE.saturating_mul(3);

#[derive(Debug, thiserror::Error)]
pub enum HandOverError {
    #[error("this node does not lead {0}")]
    NotLeader(crate::task::GroupId),
    #[error("nobody else has stored enough to lead {0}")]
    NobodyReady(crate::task::GroupId),
    #[error("replica {to} of {group} did not take over")]
    NotTaken { group: crate::task::GroupId, to: ReplicaId },
}

/// Returns when another replica leads `group`: `to`, or whoever is best prepared and not on an `unfit` node.
pub async fn hand_over(
    ledger: &Arc<Ledger>,
    group: &Group,
    to: Option<ReplicaId>,
    unfit: &BTreeSet<u64>,
) -> Result<(), HandOverError> {
    let term = group.leads(Duration::ZERO).ok_or(HandOverError::NotLeader(group.id))?;
    // Rather to one that will not keep it than to nobody.
    let heir = || group.best_heir(unfit).or_else(|| group.best_heir(&BTreeSet::new()));
    let to = to.or_else(heir).ok_or(HandOverError::NobodyReady(group.id))?;
    if let Some(idle) = ledger.rest(group.id, term) {
        let _ = timeout(SETTLE_WITHIN, idle.notified()).await;
    }
    let mut server = group.raft.server_metrics();
    let not_taken = || HandOverError::NotTaken { group: group.id, to };
    let taken = async {
        group.transfer(term, to).await.map_err(|_| not_taken())?;
        loop {
            {
                let now = server.borrow_watched();
                if now.state != ServerState::Leader || now.vote.leader_id.term != term {
                    return Ok(());
                }
            }
            server.changed().await.map_err(|_| not_taken())?;
        }
    };
    let result = timeout(TRANSFER_WITHIN, taken).await.unwrap_or_else(|_| Err(not_taken()));
    if result.is_err() {
        group.keep(term);
        ledger.go_on(group.id, term);
    }
    result
}
