//! Who somebody is, and until when.
//!
//! - [`auth`]: passwords and API keys; [`failures`]: how often somebody may be wrong; [`sessions`]: who is in; [`handshake`]:
//!   how somebody gets in

pub mod auth;
mod failures;
pub(super) mod handshake;
pub mod sessions;
