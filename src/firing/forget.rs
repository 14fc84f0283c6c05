//! Looks for what has been kept long enough, and asks for it to be removed: expired deduplication keys, old history.
//!
//! Finding is done here, from what is stored; whether each of them goes is decided by the state machine.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use super::Parts;
use crate::blocking;
use crate::propose::Ask;
use crate::shard::{Forget, Request};
use crate::store::StoreError;
use crate::store::keys::{Key, Parsed, parse_state};
use crate::task::GroupId;

const LOOK_EVERY: Duration = Duration::from_secs(60);
/// Removed by one request.
const KEYS_MAX: usize = 1_000;

/// Runs as long as this node leads the shard.
pub(super) async fn run(group: GroupId, parts: &Arc<Parts>) -> Result<Infallible, StoreError> {
    let mut from = Key::dedup_end_range(group, 0).0;
    loop {
        let found = blocking::in_place(|| find(group, parts, &mut from))?;
        let more = match found {
            None => false,
            Some(forget) => {
                let more = forget.dedup.len() == KEYS_MAX;
                let asked = parts.proposer.ask(group, Ask::Plain(Request::Forget(forget))).await;
                if let Err(refused) = &asked {
                    tracing::debug!(%group, %refused, "what is old could not be removed; trying again");
                }
                more && asked.is_ok()
            }
        };
        if !more {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// `from` is where the first key that may expire next is: what lies before it has been removed, and only slows a look.
fn find(group: GroupId, parts: &Parts, from: &mut Key) -> Result<Option<Forget>, StoreError> {
    let now_ms = parts.clock.now_ms();
    let (_, until) = Key::dedup_end_range(group, now_ms);
    let mut dedup = Vec::new();
    let rows = if *from < until { parts.store.scan_state(from, &until, KEYS_MAX)? } else { Vec::new() };
    if let Some((key, _)) = rows.first() {
        // What cannot be removed now is met again.
        *from = Key::from_stored(key.clone());
    }
    for (key, _) in rows {
        match parse_state(&key) {
            Some((_, Parsed::DedupEnd(expires_ms, hash))) => dedup.push((expires_ms, hash)),
            other => return Err(StoreError::damaged("the index of deduplication keys", format!("it holds {other:?}"))),
        }
    }
    // With history switched off, what there still is goes at once.
    let history_before = now_ms.saturating_sub(parts.ledger.settings().history_ms);
    let (from, until) = Key::history_range(group, history_before);
    let old = from < until && !parts.store.scan_state(&from, &until, 1)?.is_empty();
    let history_before = if old { history_before } else { 0 };
    Ok((old || !dedup.is_empty()).then_some(Forget { dedup, history_before }))
}
