//! Which node leads what, and how a request gets there.
//!
//! ```text
//!   by id, with a key    led here --> done here ---- NOT_LEADER after all ---+
//!                        elsewhere --> NOT_LEADER, to a client that          |
//!                                      follows redirects                     v
//!                                  --> forward, until someone leads and answers
//!   without a key        to a shard led here; with none, it gets a key, and then see above
//!   batch                each of it by itself, those for one node in one message
//!   list                 the parts of all nodes, merged
//!   replay, purge        chosen as a list is, done one by one
//! ```
//!
//! Who does not follow redirects notices no more of a failover than a pause: a request that was certainly not done is
//! tried again until somebody leads, and one that may be done twice even when nobody knows. Everything else is answered
//! with "may have been done".
//!
//! - [`router`]: who leads, as seen from here; [`forward`]: asks another node
//! - [`leader`]: a request for one leader; [`batches`]: for those of each item; [`pages`]: for all of them

pub(super) mod batches;
pub(super) mod forward;
pub(super) mod leader;
pub(super) mod pages;
mod router;

pub use router::{Router, ShownLeader, ShownMap, ShownNode};
