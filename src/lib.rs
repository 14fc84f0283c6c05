//! The server of Boomerang, a durable, replicated scheduler.
//!
//! `docs/ARCHITECTURE.md` gives the reading order and the life of one task. The rooms, each with a head comment that
//! says what it is for and what it must not do:
//!
//! | Room | Holds |
//! | --- | --- |
//! | [`task`] | the vocabulary, with validation |
//! | [`wheel`] | the hierarchical timing wheel |
//! | [`store`] | RocksDB: keys, rows, the writer |
//! | [`shard`] | the replicated state machine, a function |
//! | [`certs`] | certificates for the nodes of a cluster |
//! | [`raft`] | openraft: log store, groups, network |
//! | [`inspect`] | what is stored, for people, and to compare replicas |
//! | [`propose`] | from what is asked to what is replicated |
//! | [`placement`] | who hosts which group |
//! | [`callback`] | what goes out |
//! | [`firing`] | the leader: window, wheel, dispatch, settle |
//! | [`server`] | what comes in |
//! | [`node`] | the rooms put together |
//! | [`threads`] | threads of their own for what must not wait behind work |
//! | [`sabotage`] | what is broken on purpose, to see that it is found |

#![forbid(unsafe_code)]

pub mod blocking;
pub mod callback;
pub mod certs;
pub mod clock;
pub mod dialing;
pub mod disk;
pub mod firing;
pub mod flags;
pub mod inspect;
pub mod metrics;
pub mod node;
pub mod placement;
pub mod propose;
pub mod raft;
pub mod random;
pub mod sabotage;
pub mod server;
pub mod settings;
pub mod shard;
pub mod store;
pub mod threads;
pub mod wheel;

pub use boomerang_task as task;
pub use boomerang_wire as wire;
