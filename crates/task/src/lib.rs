//! The vocabulary: what a task is, as types that check themselves.
//!
//! Every other room speaks in these words. This one knows no prost, RocksDB, tokio, clock or random number: ids and
//! instants come in as values. A value of one of these types is valid; whoever holds it need not check it again.
//!
//! - [`id`]: task ids, shards, groups, client names
//! - [`policy`]: where a callback goes, how often it is tried, what happens in the end
//! - [`delivery`]: one attempt on its way out, with its fence
//! - [`recurrence`]: how a task goes on; [`tags`]: its name and labels
//! - [`limits`]: the bounds on what a client may ask for
//! - [`locks`]: no word, but what all crates have in common besides
//! ```
//! use boomerang_task::{Callback, Retry};
//!
//! let callback = Callback::from_url("http://shop:8080/due").expect("a scheme that is known").unwrap();
//! assert_eq!(callback.endpoint.as_str(), "http://shop:8080/due");
//! // Five tries: the pauses after the first four.
//! let again = (1..=5).map(|attempt| Retry::default().next_due(attempt, 0, None, 0));
//! assert_eq!(again.collect::<Vec<_>>(), [Some(1_000), Some(2_000), Some(4_000), Some(8_000), None]);
//! ```

#![warn(missing_docs)]

mod delivery;
mod id;
mod limits;
pub mod locks;
mod pauses;
mod policy;
mod recurrence;
mod tags;
pub mod when;

pub use delivery::{DeadLetterNotice, Delivery, Failure, FailureClass, Fence, Outcome};
pub use id::{ClientId, DeadLetterId, DedupHash, GroupId, SHARDS_MAX, ShardId, TaskId};
pub use limits::{ClientLimits, Limits};
pub use pauses::Pauses;
pub use policy::{Backoff, Callback, CallbackOptions, Endpoint, Policy, PolicyId, Protocol, Retry, Secret};
pub use recurrence::{Missed, Recurrence};
pub use tags::Tags;

/// Milliseconds since 1970, as the leader of a shard stamps them.
pub type InstantMs = u64;

/// Why a value was refused. The text names the field and the rule, and goes to the caller as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(pub String);

impl Invalid {
    /// `text` names the field and the rule.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}
