//! The way of what is asked to the group that proposes it: whether it is taken on, and the line it waits in.
//!
//! What one message asks for travels together. It is looked at once for each group how busy that is, so that nobody is
//! kept waiting by one half of a batch for the refusal of the other, and all of it comes into the line at once, which
//! costs one hop and makes one log entry. What belongs to old work waits for a place in the line instead, and goes into
//! it in parts if there is much of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::future::join_all;
use tokio::sync::mpsc::error::{SendError, TrySendError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::pressure::{Line, Place};
use super::{Answer, Ask, FULL_RETRY, OVERLOADED_RETRY_MS, Proposer, REQUESTS_PER_ENTRY_MAX, Refused, busy};
use crate::task::GroupId;

/// Asks of one group that are not in an entry yet: so many new ones, and so many others.
const ASKS_WAITING_MAX: usize = 8_192;
/// And messages, none of which is empty.
pub(super) const MESSAGES_WAITING_MAX: usize = 2 * ASKS_WAITING_MAX;

/// What came together.
pub(super) type Message = Vec<Waiting>;

pub(super) struct Waiting {
    pub ask: Ask,
    pub answer: Answer,
    /// Room among the payloads that wait; given back with the answer.
    pub _room: Option<OwnedSemaphorePermit>,
    /// Given back when it goes into an entry, or nowhere.
    pub _place: (Place, OwnedSemaphorePermit),
}

/// The line of one group.
pub(super) struct Queue {
    pub asks: mpsc::Sender<Message>,
    pub line: Arc<Line>,
    /// Places in it.
    new: Arc<Semaphore>,
    others: Arc<Semaphore>,
}

impl Queue {
    pub fn new(asks: mpsc::Sender<Message>, line: Arc<Line>) -> Self {
        let places = || Arc::new(Semaphore::new(ASKS_WAITING_MAX));
        Self { asks, line, new: places(), others: places() }
    }

    /// Waits for a place in the line, unless all of it is new.
    async fn send(&self, message: Message) {
        let left = match self.asks.try_send(message) {
            Ok(()) => return,
            Err(TrySendError::Full(message)) if message.iter().all(|waiting| waiting.ask.is_new()) => {
                return message.into_iter().for_each(|waiting| (waiting.answer)(Err(full())));
            }
            Err(TrySendError::Full(message)) => match self.asks.send(message).await {
                Ok(()) => return,
                Err(SendError(message)) => message,
            },
            Err(TrySendError::Closed(message)) => message,
        };
        left.into_iter().for_each(|waiting| (waiting.answer)(Err(Refused::Stopping)));
    }
}

fn full() -> Refused {
    busy("as many requests wait in this shard as may".into(), FULL_RETRY)
}

/// On behalf of one message.
pub struct Admission<'a> {
    proposer: &'a Proposer,
    busy: BTreeMap<GroupId, Option<Refused>>,
    taken: BTreeMap<GroupId, Message>,
}

impl<'a> Admission<'a> {
    pub(super) fn new(proposer: &'a Proposer) -> Self {
        Self { proposer, busy: BTreeMap::new(), taken: BTreeMap::new() }
    }

    /// Why new work for a group is refused, if it is.
    pub fn busy(&mut self, group: GroupId) -> Option<Refused> {
        self.busy.entry(group).or_insert_with(|| self.proposer.busy(group)).clone()
    }

    /// Takes `ask` on, or refuses it. `answer` is called once, perhaps at once, perhaps on another task, and must not
    /// block. Nothing is asked before [`Admission::send`].
    pub async fn put(&mut self, group: GroupId, ask: Ask, answer: Answer) {
        let inner = &self.proposer.inner;
        let refused = ask.refused_by(&inner.disk.borrow());
        if let Some(why) = refused {
            return answer(Err(Refused::Overloaded { why, retry_after_ms: OVERLOADED_RETRY_MS }));
        }
        let is_new = ask.is_new();
        if is_new && let Some(refused) = self.busy(group) {
            return answer(Err(refused));
        }
        let Some(queue) = inner.queues.get(&group) else {
            return answer(Err(Refused::NotLeader { group }));
        };
        let place = match is_new {
            true => queue.new.clone().try_acquire_owned(),
            false => {
                let taken = self.taken.get(&group).map_or(0, Vec::len);
                if taken >= REQUESTS_PER_ENTRY_MAX {
                    // It would wait for places that it has itself.
                    let message = self.taken.remove(&group).unwrap_or_default();
                    queue.send(message).await;
                }
                let place = queue.others.clone().acquire_owned().await;
                Ok(place.expect("the semaphore is never closed"))
            }
        };
        let Ok(place) = place else { return answer(Err(full())) };
        let bytes = u32::try_from(ask.payload_bytes()).expect("payloads are far below 4 GiB");
        let room = match inner.room.clone().try_acquire_many_owned(bytes) {
            Ok(room) => room,
            Err(_) if is_new => {
                return answer(Err(busy("payloads fill the room for those that wait".into(), FULL_RETRY)));
            }
            Err(_) => {
                let room = inner.room.clone().acquire_many_owned(bytes).await;
                room.expect("the semaphore is never closed")
            }
        };
        let waiting = Waiting { ask, answer, _room: Some(room), _place: (Line::join(&queue.line), place) };
        self.taken.entry(group).or_default().push(waiting);
    }

    /// Hands over what was taken on; waits for a place in the line for what is no new work.
    pub async fn send(mut self) {
        let sent = std::mem::take(&mut self.taken).into_iter();
        join_all(sent.map(|(group, message)| self.proposer.inner.queues[&group].send(message))).await;
    }
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        // Whoever asked has gone, or the node stops.
        let left = std::mem::take(&mut self.taken).into_values().flatten();
        left.for_each(|waiting| (waiting.answer)(Err(Refused::Stopping)));
    }
}
