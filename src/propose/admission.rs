//! The way of what is asked to the group that proposes it: whether it is taken on, and the line it waits in.
//!
//! What one message asks for travels together. It is looked at once for each group how busy that is, so that nobody is
//! kept waiting by one half of a batch for the refusal of the other, and all of it comes into the line at once, which
//! costs one hop and makes one log entry. What belongs to old work waits for a place in the line instead. Nobody waits
//! who keeps others waiting: what a message has taken places for goes into the line before that.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::mpsc::error::SendError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::maker::Asked;
use super::pressure::{Line, Place};
use super::{Answer, Ask, FULL_RETRY, OVERLOADED_RETRY_MS, Proposer, Refused, busy};
use crate::task::GroupId;

/// Asks of one group that are not in an entry yet: so many new ones, and so many others.
const ASKS_WAITING_MAX: usize = 8_192;

/// What came together.
pub(super) type Message = Vec<Waiting>;

pub(super) struct Waiting {
    pub asked: Asked,
    /// Given back when it goes into an entry, or nowhere.
    pub _place: (Place, OwnedSemaphorePermit),
}

/// The line of one group.
pub(super) struct Queue {
    /// No message is empty, so there are no more than places.
    asks: mpsc::UnboundedSender<Message>,
    line: Arc<Line>,
    /// Places in it.
    new: Arc<Semaphore>,
    others: Arc<Semaphore>,
}

impl Queue {
    pub fn new(asks: mpsc::UnboundedSender<Message>, line: Arc<Line>) -> Self {
        let places = || Arc::new(Semaphore::new(ASKS_WAITING_MAX));
        Self { asks, line, new: places(), others: places() }
    }

    pub fn line(&self) -> &Line {
        &self.line
    }

    fn send(&self, message: Message) {
        if let Err(SendError(message)) = self.asks.send(message) {
            message.into_iter().for_each(|waiting| (waiting.asked.answer)(Err(Refused::Stopping)));
        }
    }
}

/// On behalf of one message. What was taken on comes into the line when it is dropped, if not before.
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
    /// block. Waits for room unless it is new work.
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
        let places = if is_new { &queue.new } else { &queue.others };
        let bytes = ask.payload_bytes();
        let wanted = u32::try_from(bytes).expect("payloads are far below 4 GiB");
        let Some(place) = self.permits(places, 1, is_new).await else {
            return answer(Err(busy("as many requests wait in this shard as may".into(), FULL_RETRY)));
        };
        let Some(room) = self.permits(&inner.room, wanted, is_new).await else {
            return answer(Err(busy("payloads fill the room for those that wait".into(), FULL_RETRY)));
        };
        let asked = Asked { ask, answer, room: Some(room) };
        let waiting = Waiting { asked, _place: (Line::join(&queue.line, bytes), place) };
        self.taken.entry(group).or_default().push(waiting);
    }

    /// `None` if there are too few for new work.
    async fn permits(&mut self, of: &Arc<Semaphore>, count: u32, is_new: bool) -> Option<OwnedSemaphorePermit> {
        match of.clone().try_acquire_many_owned(count) {
            Ok(permits) => Some(permits),
            Err(_) if is_new => None,
            Err(_) => {
                // Others wait for what this message has, perhaps in the very same line.
                self.hand_over();
                Some(of.clone().acquire_many_owned(count).await.expect("the semaphore is never closed"))
            }
        }
    }

    fn hand_over(&mut self) {
        for (group, message) in std::mem::take(&mut self.taken) {
            self.proposer.inner.queues[&group].send(message);
        }
    }

    /// What was taken on comes into the line.
    pub fn send(self) {
        drop(self);
    }
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        self.hand_over();
    }
}
