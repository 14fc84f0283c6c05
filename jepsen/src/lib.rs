//! Fault tests of Boomerang.
//!
//! ```text
//!   load --> cluster of real processes <-- fault        sim: the same code, one thread, simulated time
//!     \             |                      /                              |
//!      '--------> history <---------------'  <----------------------------'
//!                   |
//!                 check, one file per promise --> verdicts --> report
//! ```
//!
//! - [`history`]: everything that clients, receivers and those who break things saw, in order
//! - [`check`]: one file for each promise: what in a history breaks it
//! - [`cluster`]: nodes and etcd as processes, each in a network of its own; [`fault`]: what is done to them
//! - [`load`]: clients and receivers that write the history
//! - [`payload`]: what a task says of itself; [`effects`]: what a receiver remembers; `patience`: how one waits for what tells nobody
//! - [`sim`]: the simulation; its histories meet the same checkers
//! - [`report`]: a history and its verdicts as a page with pictures; [`run`]: all of it, from the first process on

pub mod check;
pub mod cluster;
pub mod effects;
pub mod fault;
pub mod history;
pub mod load;
mod patience;
pub mod payload;
pub mod report;
pub mod run;
pub mod sim;
