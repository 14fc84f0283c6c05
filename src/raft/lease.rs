//! How long a leader may act as one: what followers promise it, and what it has heard of their promises.
//!
//! A leader acts only while a majority of its voters have promised, within [`LEASE`], to vote for nobody else. openraft
//! has such promises too, but they travel with log entries and heartbeats through the task of each group, and wait there
//! behind everything that a busy node has to store and apply. So nodes also ask each other to be *bound*, on a connection and
//! threads of their own (see [`crate::threads`]): one message from node to node names every group that the sender leads,
//! and is answered from what stands here, without asking the group.
//!
//! ```text
//!   leader of g3, g7        "I lead g3 in term 5 and g7 in term 2"          follower
//!     sent at t   ------------------------------------------------------->   Promise::bind: no vote is on its way
//!     Proof::note(t) <----------------------------------------------------   in these groups until LEASE is over
//! ```
//!
//! What must hold, and where it does:
//!
//! 1. A replica that has promised gives no vote for [`LEASE`]: [`Promise::ask`] lets no request for one through, and
//!    [`Promise::stand`] no candidacy of its own.
//! 2. A replica that is about to vote promises nothing: both of them bar [`Promise::bind`] until it is known how that
//!    ended, and the vote itself is noted before it is stored ([`Promise::voted`]), which is before anybody hears of it.
//! 3. A promise to the leader of one term is none to that of an earlier one.
//! 4. A leader counts itself, and so is bound as well: while it leads it gives no vote ([`super::peer_service`]), and once
//!    it has voted in a later term it does not lead, whatever openraft says still.
//! 5. The leader counts from when it sent what was answered, so it is never surer than its followers.
//!
//! A hand-over goes past all of this: the old leader does not act as one from the moment it asks for it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, MutexGuard};

use tokio::time::Instant;

use super::LEASE;
use super::types::ReplicaId;
use crate::task::locks::Mutex;

/// What one replica has promised; cheap to clone.
#[derive(Debug, Clone)]
pub struct Promise {
    state: Arc<Mutex<Promised>>,
}

#[derive(Debug)]
struct Promised {
    /// When the leader was heard last, or a vote was given to one that may become it: until a lease later nobody else is
    /// wished for.
    heard_at: Instant,
    /// When it was heard last: until a lease later nobody else gets a vote.
    bound_at: Option<Instant>,
    /// The highest term in which it has voted, or made a promise.
    term: u64,
    /// Requests for a vote that are being answered.
    asking: usize,
    /// It asks for votes itself; over when its group follows a leader again.
    standing: bool,
    /// Candidacies that its group has not begun yet.
    coming: usize,
    /// Counts those that it has.
    begun: u64,
}

impl Promised {
    fn hear(&mut self) {
        self.heard_at = Instant::now();
        self.bound_at = Some(self.heard_at);
    }

    fn is_bound(&self) -> bool {
        self.bound_at.is_some_and(|at| at.elapsed() < LEASE)
    }
}

impl Promise {
    /// As if the leader had been heard just now: a replica that starts gives it time to speak.
    pub fn now() -> Self {
        let state = Promised {
            heard_at: Instant::now(),
            bound_at: None,
            term: 0,
            asking: 0,
            standing: false,
            coming: 0,
            begun: 0,
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    fn lock(&self) -> MutexGuard<'_, Promised> {
        self.state.lock()
    }

    /// A vote was given to one that may become the leader, which is given time to speak.
    pub fn note_vote(&self) {
        self.lock().heard_at = Instant::now();
    }

    /// To be taken before the group is handed something of a leader's.
    pub fn stand_before(&self) -> StandBefore {
        StandBefore(self.lock().begun)
    }

    /// The group has taken something of a leader's: if it stood for election by then, it follows that one now.
    pub fn note_leader(&self, before: StandBefore) {
        let mut state = self.lock();
        state.hear();
        if state.coming == 0 && state.begun == before.0 {
            state.standing = false;
        }
    }

    pub fn heard_at(&self) -> Instant {
        self.lock().heard_at
    }

    /// The highest term in which it has voted, or made a promise.
    pub fn term(&self) -> u64 {
        self.lock().term
    }

    /// To the leader of `term`, from now on for [`LEASE`]. False when nothing is promised.
    pub fn bind(&self, term: u64) -> bool {
        let mut state = self.lock();
        if state.asking > 0 || state.standing || term < state.term {
            return false;
        }
        state.term = term;
        state.hear();
        true
    }

    /// Before somebody's request for a vote is answered, which goes on until the guard is dropped. `None` when this replica
    /// is bound to its leader.
    pub fn ask(&self) -> Option<Asking> {
        let mut state = self.lock();
        if state.is_bound() {
            return None;
        }
        state.asking += 1;
        Some(Asking { promise: self.clone() })
    }

    /// The same for a candidate to whom the leader itself hands over.
    pub fn ask_in_transfer(&self) -> Asking {
        self.lock().asking += 1;
        Asking { promise: self.clone() }
    }

    /// Before this replica asks for votes by itself. False when it is bound to its leader.
    pub fn stand(&self) -> bool {
        let mut state = self.lock();
        if state.is_bound() {
            return false;
        }
        state.standing = true;
        state.coming += 1;
        true
    }

    /// The same for one to whom the leader itself hands over.
    pub fn stand_in_transfer(&self) {
        let mut state = self.lock();
        state.standing = true;
        state.coming += 1;
    }

    /// The group has begun its candidacy, or has found that there is no reason for one.
    pub fn stood(&self) {
        let mut state = self.lock();
        state.coming -= 1;
        state.begun += 1;
    }

    /// A vote of this term is about to be stored, for whomever.
    pub fn voted(&self, term: u64) {
        let mut state = self.lock();
        state.term = state.term.max(term);
    }
}

/// The candidacies that had begun at some moment.
#[derive(Debug, Clone, Copy)]
pub struct StandBefore(u64);

/// As long as it lives, no promise is made.
pub struct Asking {
    promise: Promise,
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.promise.lock().asking -= 1;
    }
}

/// What a leader has heard of the promises of its followers; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Proof {
    heard: Arc<Mutex<Heard>>,
}

#[derive(Debug, Default)]
struct Heard {
    term: u64,
    /// When that was sent which each replica has answered last.
    answered: BTreeMap<ReplicaId, Instant>,
}

impl Proof {
    /// `replica` has promised the leader of `term`, when asked by a message that was sent at `sent`.
    pub fn note(&self, term: u64, replica: ReplicaId, sent: Instant) {
        let mut heard = self.heard.lock();
        if term > heard.term {
            *heard = Heard { term, answered: BTreeMap::new() };
        }
        if term == heard.term {
            let answered = heard.answered.entry(replica).or_insert(sent);
            *answered = sent.max(*answered);
        }
    }

    /// Since when a majority of each of `configs` has been bound to the leader of `term`, which is `own`. `None` when that
    /// is not known.
    pub fn since(&self, term: u64, own: ReplicaId, configs: &[BTreeSet<ReplicaId>]) -> Option<Instant> {
        let heard = self.heard.lock();
        if heard.term != term {
            return None;
        }
        let now = Instant::now();
        let majority_since = |voters: &BTreeSet<ReplicaId>| {
            let mut answered: Vec<Instant> = voters
                .iter()
                .filter_map(|voter| if *voter == own { Some(now) } else { heard.answered.get(voter).copied() })
                .collect();
            answered.sort_unstable_by(|one, other| other.cmp(one));
            answered.get(voters.len() / 2).copied()
        };
        let all: Option<Vec<Instant>> = configs.iter().map(majority_since).collect();
        all?.into_iter().min()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn later(millis: u64) -> impl Future<Output = ()> {
        tokio::time::advance(Duration::from_millis(millis))
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_promised_gives_no_vote_until_the_lease_is_over() {
        let promise = Promise::now();
        assert!(promise.ask().is_some(), "nobody was heard yet");
        assert!(promise.bind(3));
        later(449).await;
        assert!(promise.ask().is_none() && !promise.stand());
        later(1).await;
        assert!(promise.ask().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn who_may_be_voting_promises_nothing() {
        let promise = Promise::now();
        promise.note_vote();
        let one = promise.ask().unwrap();
        let other = promise.ask().unwrap();
        drop(one);
        assert!(!promise.bind(3), "the other request is being answered still");
        promise.voted(4);
        drop(other);
        assert!(!promise.bind(3), "it has voted in a later term");
        assert!(promise.bind(4), "for whoever leads in that");
        assert!(!promise.bind(3));
        later(450).await;
        assert!(promise.stand());
        assert!(!promise.bind(5), "it may be about to vote for itself");
        let before = promise.stand_before();
        promise.note_leader(before);
        assert!(!promise.bind(5), "its candidacy may begin after that");
        promise.stood();
        promise.note_leader(before);
        assert!(!promise.bind(5), "it may have begun after that");
        promise.note_leader(promise.stand_before());
        assert!(promise.bind(5), "it follows again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_hand_over_goes_past_the_promise_and_ends_it() {
        let promise = Promise::now();
        assert!(promise.bind(3) && promise.ask().is_none());
        let transfer = promise.ask_in_transfer();
        assert!(!promise.bind(3));
        promise.voted(4);
        drop(transfer);
        assert!(!promise.bind(3));
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_is_as_old_as_the_majority_that_grants_it() {
        let proof = Proof::default();
        let begin = Instant::now();
        let config = |voters: &[u64]| voters.iter().copied().collect::<BTreeSet<ReplicaId>>();
        let three = [config(&[1, 2, 3])];
        assert_eq!(proof.since(5, 1, &three), None);
        proof.note(5, 2, begin);
        assert_eq!(proof.since(5, 1, &three), Some(begin), "one other is enough");
        later(100).await;
        proof.note(5, 3, begin + Duration::from_millis(100));
        assert_eq!(proof.since(5, 1, &three), Some(begin + Duration::from_millis(100)), "whoever it is");
        assert_eq!(proof.since(5, 1, &[config(&[1, 2, 3, 4, 5])]), Some(begin), "of five it takes two");
        assert_eq!(proof.since(5, 1, &[config(&[1, 2, 3]), config(&[1, 4, 5])]), None, "of both configurations");
        assert_eq!(proof.since(5, 9, &three), Some(begin), "a leader that is no voter needs two others");
        proof.note(5, 2, begin - Duration::from_millis(1));
        assert_eq!(proof.since(5, 9, &three), Some(begin), "an answer that was overtaken takes nothing back");
        assert_eq!(proof.since(6, 1, &three), None, "another term");
        proof.note(6, 2, begin);
        proof.note(5, 3, begin);
        assert_eq!((proof.since(5, 1, &three), proof.since(6, 9, &three)), (None, None));
        assert_eq!(proof.since(7, 1, &[config(&[1])]), None, "a lone voter is known by its configuration");
    }
}
