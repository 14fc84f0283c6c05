//! The heartbeats of all groups to one node share a message.
//!
//! `pacer` has them sent at one moment, and each is gathered here for the blink that this moment lasts. One message
//! instead of one per group is most of what an idle cluster saves: there is little to compute in a heartbeat, and much
//! to wake up.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::HEARTBEAT;
use super::network::client;
use crate::wire::peer;
use crate::wire::peer::beat_answer::Result as Answer;

/// Those of one moment come within less. It is taken from the lease.
const GATHER: Duration = Duration::from_millis(2);
/// More than a node has groups.
const GATHERED_MAX: usize = 8_192;

struct Waiting {
    request: peer::AppendRequest,
    answer: oneshot::Sender<Result<peer::AppendResponse, Status>>,
}

/// To one node; its task ends with this handle.
pub(super) struct Heartbeats {
    waiting: mpsc::UnboundedSender<Waiting>,
}

impl Heartbeats {
    /// Must be called within the runtime.
    pub fn start(channel: Channel, messages: Arc<AtomicU64>) -> Self {
        let (waiting, gathered) = mpsc::unbounded_channel();
        tokio::spawn(gather(channel, gathered, messages));
        Self { waiting }
    }

    pub async fn send(&self, request: peer::AppendRequest) -> Result<peer::AppendResponse, Status> {
        let (answer, answered) = oneshot::channel();
        let gone = || Status::unavailable("the node is not there any more");
        self.waiting.send(Waiting { request, answer }).map_err(|_| gone())?;
        answered.await.unwrap_or_else(|_| Err(gone()))
    }
}

async fn gather(channel: Channel, mut gathered: mpsc::UnboundedReceiver<Waiting>, messages: Arc<AtomicU64>) {
    let mut waiting = Vec::new();
    while gathered.recv_many(&mut waiting, 1).await > 0 {
        tokio::time::sleep(GATHER).await;
        while waiting.len() < GATHERED_MAX
            && let Ok(more) = gathered.try_recv()
        {
            waiting.push(more);
        }
        messages.fetch_add(1, Relaxed);
        // One that is slow does not hold up the next.
        tokio::spawn(send(channel.clone(), std::mem::take(&mut waiting)));
    }
}

async fn send(channel: Channel, waiting: Vec<Waiting>) {
    let (requests, senders): (Vec<_>, Vec<_>) = waiting.into_iter().map(|one| (one.request, one.answer)).unzip();
    let sent = timeout(HEARTBEAT, client(&channel).beat(peer::BeatRequest { requests })).await;
    let answers = match sent {
        Ok(Ok(response)) => Ok(response.into_inner().answers),
        Ok(Err(status)) => Err(status),
        Err(_) => Err(Status::deadline_exceeded("no answer to a heartbeat")),
    };
    match answers {
        Ok(answers) if answers.len() == senders.len() => {
            for (sender, answer) in senders.into_iter().zip(answers) {
                let answer = match answer.result {
                    Some(Answer::Answer(answer)) => Ok(answer),
                    Some(Answer::Refused(why)) => Err(Status::new(Code::FailedPrecondition, why)),
                    None => Err(Status::new(Code::Internal, "an empty answer to a heartbeat")),
                };
                // Whoever asked may have given up.
                let _ = sender.send(answer);
            }
        }
        Ok(_) => refuse(senders, &Status::internal("not as many answers as heartbeats")),
        Err(status) => refuse(senders, &status),
    }
}

fn refuse(senders: Vec<oneshot::Sender<Result<peer::AppendResponse, Status>>>, status: &Status) {
    for sender in senders {
        let _ = sender.send(Err(status.clone()));
    }
}
