//! Whether the replicas of a group are equal: each computes a digest of its state at the same entry of the log.
//!
//! The leader proposes a *mark*, a number made up for this one look. When the entry that carries it has been applied, a
//! replica pins its state as it is at that moment and reads it on a thread of its own, while the group goes on. The
//! digests are kept for a while, for whoever asks for them by the mark.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::raft::Observer;
use crate::shard::Effect;
use crate::store::Store;
use crate::store::dump::{Digest, digest_aside};
use crate::store::rows::ShardMetaRow;
use crate::task::GroupId;

/// Whoever has not asked by then has gone.
const KEPT_FOR: Duration = Duration::from_secs(60);

type Found = Option<Result<Digest, String>>;

struct Mark {
    since: Instant,
    digest: watch::Sender<Found>,
}

/// The digests of this node's replicas.
pub struct Marks {
    store: Store,
    marks: Mutex<HashMap<(GroupId, u64), Mark>>,
}

impl Marks {
    pub fn new(store: Store) -> Arc<Self> {
        Arc::new(Self { store, marks: Mutex::default() })
    }

    /// Waits until `mark` has been applied here and the digest is computed.
    pub async fn digest(&self, group: GroupId, mark: u64, within: Duration) -> Result<Digest, String> {
        let mut found = self.sender(group, mark).subscribe();
        let waited = tokio::time::timeout(within, found.wait_for(Option::is_some)).await;
        let found = waited.map_err(|_| format!("{group} has not applied the mark within {within:?}"))?;
        found.map_err(|_| "the node stops".to_owned())?.clone().expect("waited for it")
    }

    /// Whether the entry or the question comes first, they meet here.
    fn sender(&self, group: GroupId, mark: u64) -> watch::Sender<Found> {
        let mut marks = self.marks.lock().expect("no panic under this lock");
        marks.retain(|_, mark| mark.since.elapsed() < KEPT_FOR);
        let new = || Mark { since: Instant::now(), digest: watch::Sender::new(None) };
        marks.entry((group, mark)).or_insert_with(new).digest.clone()
    }
}

impl Observer for Marks {
    fn applied(&self, group: GroupId, _: &ShardMetaRow, effects: &[Effect]) {
        for effect in effects {
            let Effect::Marked { mark } = effect else { continue };
            let sender = self.sender(group, *mark);
            // Nothing of the group is applied before this returns.
            digest_aside(self.store.clone(), group, move |digest| {
                sender.send_replace(Some(digest.map_err(|error| error.to_string())));
            });
        }
    }
}
