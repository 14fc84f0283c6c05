//! What can be asked for: one file per operation, and the dispatcher that finds it.
//!
//! Which operations there are is one table, [`crate::wire::for_each_operation!`]. A new one is a line there, its messages in
//! `proto/client.proto`, and a file here with what it does.
//!
//! - [`operation`]: what an operation is
//! - tasks: [`register_task`], [`register_tasks`], [`cancel_task`], [`cancel_tasks`], [`update_task`], [`pause_task`],
//!   [`get_task`], [`list_tasks`]; what they share: [`tasks`], [`gathered`]
//! - dead letters: [`list_dead_letters`], [`get_dead_letter`], [`replay_dead_letters`], [`purge_dead_letters`]; what they
//!   share: [`dead_letters`]
//! - for administrators: [`register_client`], [`remove_client`], [`create_key`], [`revoke_key`], [`cluster`]; what they
//!   share: [`administration`]
//! - [`shard_map`]: who leads what

mod administration;
mod cancel_task;
mod cancel_tasks;
mod cluster;
mod create_key;
mod dead_letters;
mod gathered;
mod get_dead_letter;
mod get_task;
mod list_dead_letters;
mod list_tasks;
pub(super) mod operation;
mod pause_task;
mod purge_dead_letters;
mod register_client;
mod register_task;
mod register_tasks;
mod remove_client;
mod replay_dead_letters;
mod revoke_key;
#[cfg(test)]
pub(super) mod rig;
mod shard_map;
mod tasks;
mod update_task;

use std::sync::Arc;

use super::Service;
use super::access::sessions::Session;
use super::problem::Problem;
use super::routing::leader;
use crate::task::GroupId;
use crate::wire::answers::Answer;
use crate::wire::for_each_operation;
use crate::wire::operations;
use crate::wire::proto;
use crate::wire::proto::boomerang_envelope::Payload;
use crate::wire::routing::{Asker, Target};
use operation::{Operation, PartRead, Respond, done_here};

/// What is no request, and why; in words for whoever sent it.
fn no_request(payload: &Payload) -> Problem {
    Problem::invalid(match payload {
        Payload::AuthHandshake(_) | Payload::SessionRefresh(_) => "a session belongs to the node it was opened on",
        Payload::CallbackRequest(_) | Payload::CallbackResponse(_) => {
            "a callback is sent by the server, to the receiver's own address"
        }
        _ => "the envelope holds an answer where a request was expected",
    })
}

macro_rules! dispatch {
    ($($request:ident: $message:ident => $answer:ident $(($mark:ident))?, $effect:expr, $target:expr;)*) => {
        /// Answers a request, wherever in the cluster it belongs. Returns when the next one may be read.
        pub(super) async fn answer(
            service: &Arc<Service>,
            session: Arc<Session>,
            payload: Payload,
            respond: impl FnOnce(Payload) + Send + 'static,
        ) {
            match payload {
                $(Payload::$request(request) => {
                    let respond: Respond<proto::$message> = Box::new(move |answer| {
                        respond(Payload::$answer(answer.unwrap_or_else(proto::$answer::refusing)));
                    });
                    ask(service, session, request, respond).await;
                })*
                // Named one by one, so that the compiler asks for the line of a new request.
                Payload::AuthHandshake(_)
                | Payload::AuthResponse(_)
                | Payload::SessionRefresh(_)
                | Payload::SessionRefreshResponse(_)
                | Payload::CallbackRequest(_)
                | Payload::CallbackResponse(_)
                | Payload::ErrorResponse(_)
                $(| Payload::$answer(_))* => respond(misunderstood(no_request(&payload))),
            }
        }

        /// Answers a request of another node's client on this node.
        pub(super) async fn answer_here(service: &Arc<Service>, session: Arc<Session>, payload: Payload) -> Payload {
            match payload {
                $(Payload::$request(request) => {
                    let answer = Box::pin(done_here(service, session, request)).await;
                    Payload::$answer(answer.unwrap_or_else(proto::$answer::refusing))
                })*
                _ => misunderstood(no_request(&payload)),
            }
        }

        /// This node's part of what several nodes answer together.
        pub(super) fn part_here(
            service: &Arc<Service>,
            session: Arc<Session>,
            payload: Payload,
            groups: Vec<GroupId>,
        ) -> PartRead {
            match payload {
                $(Payload::$request(request) => request.part(service, session, groups),)*
                _ => Box::pin(async move { Err(no_request(&payload)) }),
            }
        }

        /// How many bytes the answer to a request may have; 0 for those that are always small.
        pub(super) fn answer_bytes_max(payload: &Payload, frame_bytes_max: usize) -> usize {
            match payload {
                $(Payload::$request(request) => request.answer_bytes_max(frame_bytes_max),)*
                _ => 0,
            }
        }
    };
}

for_each_operation!(dispatch);

/// The answer to what is no request.
pub(super) fn misunderstood(problem: Problem) -> Payload {
    Payload::ErrorResponse(proto::ErrorResponse::refusing(problem))
}

/// The answer to a request that is refused before it is looked at.
pub(super) fn refused(payload: &Payload, problem: Problem) -> Payload {
    match operations::refused(payload, problem) {
        Payload::ErrorResponse(_) => misunderstood(no_request(payload)),
        answer => answer,
    }
}

async fn ask<O: Operation>(service: &Arc<Service>, session: Arc<Session>, request: O, respond: Respond<O>) {
    if service.router.is_alone() {
        return request.here(service, session, respond).await;
    }
    match request.target(&Asker { client: Some(&session.client), shards: service.shards }) {
        Target::Any => request.here(service, session, respond).await,
        // Apart, for each connection keeps room for the largest of all these.
        Target::Leader(group, access) => {
            Box::pin(leader::ask(service, session, request, group, access, respond)).await;
        }
        Target::AnyLeader | Target::Batch | Target::Cancellations | Target::Page | Target::DeadLetters => {
            Box::pin(request.among_nodes(service, session, respond)).await;
        }
    }
}
