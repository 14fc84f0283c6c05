//! Looks for what has been kept long enough, and asks for it to be removed: expired deduplication keys, senders of
//! registrations that were not seen for long, old history.
//!
//! Finding is done here, from what is stored; whether each of them goes is decided by the state machine.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use super::FiringParts;
use crate::blocking;
use crate::propose::Ask;
use crate::shard::{Forget, Request};
use crate::store::keys::{Key, Parsed, parse_state};
use crate::store::rows::SenderRow;
use crate::store::{StoreError, codec};
use crate::task::{DedupHash, GroupId};

const LOOK_EVERY: Duration = Duration::from_secs(60);
/// Removed by one request: rows of the index of expiries, each with the keys of one log entry.
const INDEX_ROWS_MAX: usize = 1_000;
/// Keys, besides those of the last row.
const KEYS_MAX: usize = 4_000;

/// How long a sender is remembered that registers nothing: longer than anybody tries to send again.
const SENDER_KEPT_MS: u64 = 10 * 60_000;

/// Runs as long as this node leads the shard.
pub(super) async fn run(group: GroupId, parts: &Arc<FiringParts>) -> Result<Infallible, StoreError> {
    let mut from = Key::dedup_end_range(group, 0).0;
    loop {
        let found = blocking::in_place(|| find(group, parts, &mut from))?;
        let more = match found {
            None => false,
            Some(forget) => {
                // Whatever else there is comes with the next look.
                let more = !forget.dedup.is_empty() || !forget.senders.is_empty();
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
fn find(group: GroupId, parts: &FiringParts, from: &mut Key) -> Result<Option<Forget>, StoreError> {
    let now_ms = parts.clock.now_ms();
    let (_, until) = Key::dedup_end_range(group, now_ms);
    let mut dedup = Vec::new();
    let rows = if *from < until { parts.store.scan_state(from, &until, INDEX_ROWS_MAX)? } else { Vec::new() };
    if let Some((key, _)) = rows.first() {
        // What cannot be removed now is met again.
        *from = Key::from_stored(key.clone());
    }
    let mut keys = 0;
    for (key, value) in rows {
        if keys > KEYS_MAX {
            break;
        }
        match parse_state(&key) {
            Some((_, Parsed::DedupEnd(expires_ms, first))) => {
                keys += codec::decode::<Vec<DedupHash>>("expired deduplication keys", &value)?.len();
                dedup.push((expires_ms, first));
            }
            other => return Err(StoreError::damaged("the index of deduplication keys", format!("it holds {other:?}"))),
        }
    }
    // With history switched off, what there still is goes at once.
    let history_before = now_ms.saturating_sub(parts.ledger.settings().history_ms);
    let (from, until) = Key::history_range(group, history_before);
    let old = from < until && !parts.store.scan_state(&from, &until, 1)?.is_empty();
    let history_before = if old { history_before } else { 0 };
    let senders = find_senders(group, parts, now_ms.saturating_sub(SENDER_KEPT_MS))?;
    let any = old || !dedup.is_empty() || !senders.is_empty();
    Ok(any.then_some(Forget { dedup, senders, history_before }))
}

/// Those that were seen last before then. There are as many in all as clients that have registered since.
fn find_senders(group: GroupId, parts: &FiringParts, before_ms: u64) -> Result<Vec<(DedupHash, u64)>, StoreError> {
    let (mut from, until) = Key::sender_range(group);
    let mut senders = Vec::new();
    loop {
        let rows = parts.store.scan_state(&from, &until, INDEX_ROWS_MAX)?;
        for (key, value) in &rows {
            let row: SenderRow = codec::decode("a sender", value)?;
            match parse_state(key) {
                Some((_, Parsed::Sender(_))) if row.seen_ms >= before_ms => {}
                Some((_, Parsed::Sender(sender))) => senders.push((sender, row.seen_ms)),
                other => return Err(StoreError::damaged("the senders", format!("among them is {other:?}"))),
            }
        }
        match rows.last() {
            Some((last, _)) if rows.len() == INDEX_ROWS_MAX && senders.len() < INDEX_ROWS_MAX => {
                from = Key::from_stored(last.clone()).join(&[0]);
            }
            _ => return Ok(senders),
        }
    }
}
