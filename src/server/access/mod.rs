//! Who somebody is, and until when.
//!
//! - [`auth`]: passwords and API keys; [`sessions`]: who is in; [`handshake`]: how somebody gets in

pub mod auth;
pub(super) mod handshake;
pub mod sessions;
