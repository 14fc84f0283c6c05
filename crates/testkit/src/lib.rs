//! What tests, benches and fault tests share, and nothing of the server.
//!
//! - [`Process`]: the one launcher of nodes, and of whatever else runs until it is told to end; [`run()`]: a command that ends
//!   by itself
//! - [`Etcd`]: where the etcd of a cluster runs
//! - [`Certs`]: by what the nodes of a cluster know each other
//! - [`OwnAddress`]: an address for a process that is yet to begin
//! - [`page()`]: a look at what a process shows by HTTP
//! - [`seed`]: where chance comes from in tests

mod address;
mod certs;
mod etcd;
mod page;
mod process;
mod run;
pub mod seed;

pub use address::OwnAddress;
pub use certs::Certs;
pub use etcd::{Etcd, EtcdTls};
pub use page::page;
pub use process::{Cause, Handle, NotReady, Process, Started, all_started, log_end, without_settings};
pub use run::{Ended, blocking, run};
pub use rustix::process::Signal;
