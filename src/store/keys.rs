//! The keys of everything stored, and so the order of everything stored.
//!
//! ```text
//!   state   group:u16 tag:u8 fields        log   group:u16 kind:u8 [index:u64]
//!
//!   tag 1 task         id                  kind 0 vote
//!       2 timeline     due:u64 id               1 purged
//!       3 cursor       id                       2 replica
//!       4 policy       hash                     3 entry   index
//!       5 dead letter  died at:u64 id
//!       6 dedup        key hash
//!       7 history      hour:u64 id occurrence:u64 ended:u64
//!       8 meta         name:u8
//!       9 client       name                 (group 0 only)
//!      10 api key      key id               (group 0 only)
//!      11 by client    client hash, due:u64 id
//!      12 by tag       client hash, kind:u8 text 0 id
//!      13 dedup end    expires:u64 key hash
//!      14 stand-ins    id
//!      15 its letters  client hash, died at:u64 id
//!      16 sender       hash
//! ```
//!
//! What is indexed by client begins with a hash of the client's name, so that a page of one client's tasks costs the
//! same however many the others have. Two names with one hash would share a range; whoever reads it compares the name.
//! History lies in hours, because it is forgotten by the hour: one range is removed, whatever it holds.
//!
//! All numbers are big-endian, so that the order of bytes is the order of values. A tag is never reused and a key never
//! changes its meaning.

use sha2::{Digest, Sha256};

use crate::task::{ClientId, DeadLetterId, DedupHash, GroupId, InstantMs, PolicyId, TaskId};

const TASK: u8 = 1;
const TIMELINE: u8 = 2;
const CURSOR: u8 = 3;
const POLICY: u8 = 4;
const DEAD_LETTER: u8 = 5;
const DEDUP: u8 = 6;
const HISTORY: u8 = 7;
const META: u8 = 8;
const CLIENT: u8 = 9;
const API_KEY: u8 = 10;
const BY_CLIENT: u8 = 11;
const BY_TAG: u8 = 12;
const DEDUP_END: u8 = 13;
const STAND_INS: u8 = 14;
const LETTER_OF_CLIENT: u8 = 15;
const SENDER: u8 = 16;

/// The name of the choice that [`is_read_alone`] makes. Files say by which name their filters were made, and a filter of
/// another choice is not asked; so a change of the choice needs another name, or rows that are there are not found.
pub const READ_ALONE_NAME: &str = "read-alone-1";

/// Whether rows of this kind are read one by one, by their whole key. All others are only met by scans, which filters
/// do not help.
pub fn is_read_alone(key: &[u8]) -> bool {
    const READ_ALONE: [u8; 10] = [TASK, CURSOR, POLICY, DEAD_LETTER, DEDUP, META, CLIENT, API_KEY, STAND_INS, SENDER];
    key.get(2).is_some_and(|tag| READ_ALONE.contains(tag))
}

/// What history is forgotten by.
pub const HISTORY_BUCKET_MS: u64 = 3_600_000;

/// Which text of a task an index is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TagKind {
    Name = 0,
    /// `key=value`
    Label = 1,
}

const META_APPLIED: u8 = 1;
const META_MEMBERSHIP: u8 = 2;
const META_SHARD: u8 = 3;

const LOG_VOTE: u8 = 0;
const LOG_PURGED: u8 = 1;
const LOG_REPLICA: u8 = 2;
const LOG_ENTRY: u8 = 3;
const LOG_RETIRED: u8 = 4;

/// Not a group: the node's own row, which lies behind all groups.
const NODE: u16 = u16::MAX;

/// Where a value is stored.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(Vec<u8>);

impl AsRef<[u8]> for Key {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Key {
    fn new(group: u16, tag: u8, fields: &[&[u8]]) -> Self {
        let len = 3 + fields.iter().map(|field| field.len()).sum::<usize>();
        let mut bytes = Vec::with_capacity(len);
        bytes.extend_from_slice(&group.to_be_bytes());
        bytes.push(tag);
        for field in fields {
            bytes.extend_from_slice(field);
        }
        Self(bytes)
    }

    /// Before all others.
    pub fn first() -> Self {
        Self(Vec::new())
    }

    pub fn from_stored(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    pub fn task(group: GroupId, id: TaskId) -> Self {
        Self::new(group.0, TASK, &[id.as_bytes()])
    }

    pub fn timeline(group: GroupId, due_ms: InstantMs, id: TaskId) -> Self {
        Self::new(group.0, TIMELINE, &[&due_ms.to_be_bytes(), id.as_bytes()])
    }

    /// The first key of the timeline that is due at `due_ms` or later.
    pub fn timeline_from(group: GroupId, due_ms: InstantMs) -> Self {
        Self::new(group.0, TIMELINE, &[&due_ms.to_be_bytes()])
    }

    pub fn timeline_end(group: GroupId) -> Self {
        Self::new(group.0, TIMELINE + 1, &[])
    }

    pub fn cursor(group: GroupId, id: TaskId) -> Self {
        Self::new(group.0, CURSOR, &[id.as_bytes()])
    }

    pub fn policy(group: GroupId, id: PolicyId) -> Self {
        Self::new(group.0, POLICY, &[&id.0])
    }

    pub fn dead_letter(group: GroupId, letter: DeadLetterId) -> Self {
        Self::new(group.0, DEAD_LETTER, &[&letter.died_ms.to_be_bytes(), letter.task.as_bytes()])
    }

    pub fn dedup(group: GroupId, hash: DedupHash) -> Self {
        Self::new(group.0, DEDUP, &[&hash.0])
    }

    pub fn dedup_end(group: GroupId, expires_ms: InstantMs, hash: DedupHash) -> Self {
        Self::new(group.0, DEDUP_END, &[&expires_ms.to_be_bytes(), &hash.0])
    }

    /// What is known of a sender of registrations.
    pub fn sender(group: GroupId, sender: DedupHash) -> Self {
        Self::new(group.0, SENDER, &[&sender.0])
    }

    pub fn sender_range(group: GroupId) -> (Self, Self) {
        (Self::new(group.0, SENDER, &[]), Self::new(group.0, SENDER + 1, &[]))
    }

    /// The index of what expires at `until_ms` or before.
    pub fn dedup_end_range(group: GroupId, until_ms: InstantMs) -> (Self, Self) {
        let until = until_ms.saturating_add(1);
        (Self::new(group.0, DEDUP_END, &[]), Self::new(group.0, DEDUP_END, &[&until.to_be_bytes()]))
    }

    pub fn history(group: GroupId, ended_ms: InstantMs, id: TaskId, occurrence: u64) -> Self {
        let bucket = ended_ms - ended_ms % HISTORY_BUCKET_MS;
        let (occurrence, ended) = (occurrence.to_be_bytes(), ended_ms.to_be_bytes());
        Self::new(group.0, HISTORY, &[&bucket.to_be_bytes(), id.as_bytes(), &occurrence, &ended])
    }

    /// What ended for one task within the hour of `bucket_ms`.
    pub fn history_of(group: GroupId, bucket_ms: InstantMs, id: TaskId) -> (Self, Self) {
        let from = Self::new(group.0, HISTORY, &[&bucket_ms.to_be_bytes(), id.as_bytes()]);
        let mut until = from.0.clone();
        until.extend_from_slice(&[u8::MAX; 17]);
        (from, Self(until))
    }

    /// All hours that were over at `before_ms`.
    pub fn history_range(group: GroupId, before_ms: InstantMs) -> (Self, Self) {
        let bucket = before_ms - before_ms % HISTORY_BUCKET_MS;
        (Self::new(group.0, HISTORY, &[]), Self::new(group.0, HISTORY, &[&bucket.to_be_bytes()]))
    }

    /// One client's timeline. `client` is [`client_hash`].
    pub fn by_client(group: GroupId, client: [u8; 8], due_ms: InstantMs, id: TaskId) -> Self {
        Self::new(group.0, BY_CLIENT, &[&client, &due_ms.to_be_bytes(), id.as_bytes()])
    }

    pub fn by_tag(group: GroupId, client: [u8; 8], kind: TagKind, text: &str, id: TaskId) -> Self {
        Self::new(group.0, BY_TAG, &[&client, &[kind as u8], text.as_bytes(), &[0], id.as_bytes()])
    }

    /// What all places of an index have before them, for whoever walks along it.
    pub fn timeline_prefix(group: GroupId) -> Self {
        Self::new(group.0, TIMELINE, &[])
    }

    pub fn by_client_prefix(group: GroupId, client: [u8; 8]) -> Self {
        Self::new(group.0, BY_CLIENT, &[&client])
    }

    pub fn by_tag_prefix(group: GroupId, client: [u8; 8], kind: TagKind) -> Self {
        Self::new(group.0, BY_TAG, &[&client, &[kind as u8]])
    }

    pub fn dead_letter_prefix(group: GroupId) -> Self {
        Self::new(group.0, DEAD_LETTER, &[])
    }

    /// This key with more behind it.
    pub fn join(&self, more: &[u8]) -> Self {
        Self([self.0.as_slice(), more].concat())
    }

    /// One client's dead letters.
    pub fn letter_of_client(group: GroupId, client: [u8; 8], letter: DeadLetterId) -> Self {
        let died = letter.died_ms.to_be_bytes();
        Self::new(group.0, LETTER_OF_CLIENT, &[&client, &died, letter.task.as_bytes()])
    }

    pub fn letter_of_client_prefix(group: GroupId, client: [u8; 8]) -> Self {
        Self::new(group.0, LETTER_OF_CLIENT, &[&client])
    }

    /// The tasks that stand in for `id`.
    pub fn stand_ins(group: GroupId, id: TaskId) -> Self {
        Self::new(group.0, STAND_INS, &[id.as_bytes()])
    }

    pub fn applied(group: GroupId) -> Self {
        Self::new(group.0, META, &[&[META_APPLIED]])
    }

    pub fn membership(group: GroupId) -> Self {
        Self::new(group.0, META, &[&[META_MEMBERSHIP]])
    }

    pub fn shard_meta(group: GroupId) -> Self {
        Self::new(group.0, META, &[&[META_SHARD]])
    }

    pub fn client(name: &str) -> Self {
        Self::new(GroupId::CLUSTER.0, CLIENT, &[name.as_bytes()])
    }

    pub fn client_range() -> (Self, Self) {
        (Self::new(GroupId::CLUSTER.0, CLIENT, &[]), Self::new(GroupId::CLUSTER.0, CLIENT + 1, &[]))
    }

    pub fn api_key(key_id: &str) -> Self {
        Self::new(GroupId::CLUSTER.0, API_KEY, &[key_id.as_bytes()])
    }

    pub fn api_key_range() -> (Self, Self) {
        (Self::new(GroupId::CLUSTER.0, API_KEY, &[]), Self::new(GroupId::CLUSTER.0, API_KEY + 1, &[]))
    }

    /// Everything a group has in `state`: from the first key on and before the second.
    pub fn group_range(group: GroupId) -> (Self, Self) {
        (Self(group.0.to_be_bytes().to_vec()), Self((group.0 + 1).to_be_bytes().to_vec()))
    }

    /// Written at every start; its value means nothing.
    pub fn node_opened() -> Self {
        Self::new(NODE, 0, &[])
    }

    pub fn log_vote(group: GroupId) -> Self {
        Self::new(group.0, LOG_VOTE, &[])
    }

    pub fn log_purged(group: GroupId) -> Self {
        Self::new(group.0, LOG_PURGED, &[])
    }

    pub fn log_replica(group: GroupId) -> Self {
        Self::new(group.0, LOG_REPLICA, &[])
    }

    /// The replica was released; what is left of it must go before anything else of the group comes.
    pub fn log_retired(group: GroupId) -> Self {
        Self::new(group.0, LOG_RETIRED, &[])
    }

    pub fn log_entry(group: GroupId, index: u64) -> Self {
        Self::new(group.0, LOG_ENTRY, &[&index.to_be_bytes()])
    }

    pub fn log_end(group: GroupId) -> Self {
        Self::new(group.0, LOG_ENTRY + 1, &[])
    }
}

/// By which a client's part of an index is found.
pub fn client_hash(client: &ClientId) -> [u8; 8] {
    let digest = Sha256::digest(client.as_str());
    digest[..8].try_into().expect("eight of thirty-two bytes")
}

/// A key taken apart again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parsed {
    Task(TaskId),
    Timeline(InstantMs, TaskId),
    Cursor(TaskId),
    Policy(PolicyId),
    DeadLetter(DeadLetterId),
    Dedup(DedupHash),
    DedupEnd(InstantMs, DedupHash),
    Sender(DedupHash),
    /// The occurrence, and when it ended.
    History(TaskId, u64, InstantMs),
    ByClient([u8; 8], InstantMs, TaskId),
    ByTag(TaskId),
    StandIns(TaskId),
    LetterOfClient([u8; 8], DeadLetterId),
    Applied,
    Membership,
    ShardMeta,
    Client(String),
    ApiKey(String),
    NodeOpened,
}

/// What a key of `state` means; `None` when it is not one of ours.
pub fn parse_state(bytes: &[u8]) -> Option<(GroupId, Parsed)> {
    let (group, rest) = bytes.split_first_chunk::<2>()?;
    let group = u16::from_be_bytes(*group);
    let (tag, rest) = rest.split_first()?;
    if group == NODE {
        return Some((GroupId(NODE), Parsed::NodeOpened));
    }
    let id = |bytes: &[u8]| Some(TaskId::from_stored(bytes.try_into().ok()?));
    let instant_and_id = |bytes: &[u8]| {
        let (instant, rest) = bytes.split_first_chunk::<8>()?;
        Some((u64::from_be_bytes(*instant), id(rest)?))
    };
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
    let parsed = match *tag {
        TASK => Parsed::Task(id(rest)?),
        TIMELINE => instant_and_id(rest).map(|(due, id)| Parsed::Timeline(due, id))?,
        CURSOR => Parsed::Cursor(id(rest)?),
        POLICY => Parsed::Policy(PolicyId(rest.try_into().ok()?)),
        DEAD_LETTER => {
            instant_and_id(rest).map(|(died_ms, task)| Parsed::DeadLetter(DeadLetterId { died_ms, task }))?
        }
        DEDUP => Parsed::Dedup(DedupHash(rest.try_into().ok()?)),
        DEDUP_END => {
            let (instant, hash) = rest.split_first_chunk::<8>()?;
            Parsed::DedupEnd(u64::from_be_bytes(*instant), DedupHash(hash.try_into().ok()?))
        }
        SENDER => Parsed::Sender(DedupHash(rest.try_into().ok()?)),
        HISTORY => {
            let (_bucket, rest) = rest.split_first_chunk::<8>()?;
            let (task, rest) = rest.split_first_chunk::<16>()?;
            let (occurrence, ended) = rest.split_first_chunk::<8>()?;
            let ended = u64::from_be_bytes(ended.try_into().ok()?);
            Parsed::History(TaskId::from_stored(*task), u64::from_be_bytes(*occurrence), ended)
        }
        BY_CLIENT => {
            let (client, rest) = rest.split_first_chunk::<8>()?;
            instant_and_id(rest).map(|(due, id)| Parsed::ByClient(*client, due, id))?
        }
        BY_TAG => Parsed::ByTag(TaskId::from_stored(*rest.last_chunk::<16>()?)),
        STAND_INS => Parsed::StandIns(id(rest)?),
        LETTER_OF_CLIENT => {
            let (client, rest) = rest.split_first_chunk::<8>()?;
            let (died_ms, task) = instant_and_id(rest)?;
            Parsed::LetterOfClient(*client, DeadLetterId { died_ms, task })
        }
        META => match rest {
            [META_APPLIED] => Parsed::Applied,
            [META_MEMBERSHIP] => Parsed::Membership,
            [META_SHARD] => Parsed::ShardMeta,
            _ => return None,
        },
        CLIENT => Parsed::Client(text(rest)?),
        API_KEY => Parsed::ApiKey(text(rest)?),
        _ => return None,
    };
    Some((GroupId(group), parsed))
}

/// A key of `log` taken apart again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ParsedLog {
    Vote,
    Purged,
    Replica,
    Retired,
    Entry(u64),
}

/// What a key of `log` means; `None` when it is not one of ours.
pub fn parse_log(bytes: &[u8]) -> Option<(GroupId, ParsedLog)> {
    let (group, rest) = bytes.split_first_chunk::<2>()?;
    let parsed = match rest {
        [LOG_VOTE] => ParsedLog::Vote,
        [LOG_PURGED] => ParsedLog::Purged,
        [LOG_REPLICA] => ParsedLog::Replica,
        [LOG_RETIRED] => ParsedLog::Retired,
        [LOG_ENTRY, index @ ..] => ParsedLog::Entry(u64::from_be_bytes(index.try_into().ok()?)),
        _ => return None,
    };
    Some((GroupId(u16::from_be_bytes(*group)), parsed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::ShardId;
    use boomerang_testkit::seed;
    use rand::RngExt;

    #[test]
    fn what_is_read_alone_keeps_its_name() {
        let read_alone: Vec<u8> = (0..=u8::MAX).filter(|tag| is_read_alone(&[0, 1, *tag])).collect();
        let chosen = (READ_ALONE_NAME, &read_alone[..]);
        assert_eq!(chosen, ("read-alone-1", &[1, 3, 4, 5, 6, 8, 9, 10, 14, 16][..]), "another choice has another name");
    }

    #[test]
    fn the_order_of_timeline_keys_is_the_order_of_due_and_id() {
        let seed = seed::one();
        let mut rng = seed.rng();
        let mut pairs: Vec<(u64, TaskId)> = (0..2_000)
            .map(|_| {
                let due = rng.random::<u64>() >> rng.random_range(0..64);
                (due, TaskId::new(rng.random::<u64>() >> 16, ShardId(3), rng.random()))
            })
            .collect();
        let group = GroupId(4);
        let mut keys: Vec<Key> = pairs.iter().map(|(due, id)| Key::timeline(group, *due, *id)).collect();
        pairs.sort();
        keys.sort();
        for ((due, id), key) in pairs.iter().zip(&keys) {
            assert_eq!(parse_state(key.as_ref()), Some((group, Parsed::Timeline(*due, *id))));
            assert!(*key >= Key::timeline_from(group, *due) && *key < Key::timeline_end(group));
        }
    }

    #[test]
    fn a_group_holds_its_keys_and_no_others() {
        let id = TaskId::new(1, ShardId(0), 1);
        let (from, until) = Key::group_range(GroupId(1));
        for key in [Key::task(GroupId(1), id), Key::shard_meta(GroupId(1)), Key::cursor(GroupId(1), id)] {
            assert!(key >= from && key < until);
        }
        assert!(Key::task(GroupId(2), id) >= until);
        assert!(Key::client("x") < from);
        assert!(Key::node_opened() > Key::group_range(GroupId(4096)).1);
    }

    #[test]
    fn keys_of_the_log_are_read_back() {
        let group = GroupId(700);
        for (key, parsed) in [
            (Key::log_vote(group), ParsedLog::Vote),
            (Key::log_purged(group), ParsedLog::Purged),
            (Key::log_replica(group), ParsedLog::Replica),
            (Key::log_retired(group), ParsedLog::Retired),
            (Key::log_entry(group, 0), ParsedLog::Entry(0)),
            (Key::log_entry(group, u64::MAX), ParsedLog::Entry(u64::MAX)),
        ] {
            assert_eq!(parse_log(key.as_ref()), Some((group, parsed)));
            assert!(key < Key::group_range(group).1);
        }
    }

    #[test]
    fn foreign_keys_are_not_ours() {
        for bytes in [&b""[..], b"\0", b"\0\x01\x01short", b"\0\x01\x63", b"\0\x01\x08\x63"] {
            assert_eq!(parse_state(bytes), None, "{bytes:?}");
            assert_eq!(parse_log(bytes), None, "{bytes:?}");
        }
    }
}
