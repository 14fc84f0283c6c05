//! Names of things. A task id says by itself which shard holds the task.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{InstantMs, Invalid};

/// The most shards a cluster can have: what fits into the 12 `rand_a` bits of a UUIDv7.
pub const SHARDS_MAX: u16 = 4096;

const CLIENT_ID_BYTES_MAX: usize = 128;

/// One of the parts the tasks are divided into, counted from 0. Held by the group of the next higher number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ShardId(pub u16);

/// One Raft group. Group 0 is the cluster's own, the groups from 1 up hold one shard each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GroupId(pub u16);

impl GroupId {
    /// Holds the clients, their credentials and the settings that `apply` depends on.
    pub const CLUSTER: GroupId = GroupId(0);

    /// The group that holds `shard`.
    pub fn of_shard(shard: ShardId) -> Self {
        GroupId(shard.0 + 1)
    }

    /// The shard this group holds; `None` for the cluster's own group.
    pub fn shard(self) -> Option<ShardId> {
        self.0.checked_sub(1).map(ShardId)
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "g{}", self.0)
    }
}

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A task's name: a UUIDv7 with the shard number in its `rand_a` bits.
///
/// The order of ids is the order in which they were made, to the millisecond; within (due, id) it breaks ties.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TaskId([u8; 16]);

impl TaskId {
    /// Bytes of an id.
    pub const LEN: usize = 16;

    /// `random` gives the 62 bits of `rand_b`; its two highest bits are ignored.
    pub fn new(made_at: InstantMs, shard: ShardId, random: u64) -> Self {
        assert!(shard.0 < SHARDS_MAX, "shard {} out of range", shard.0);
        let mut bytes = [0u8; 16];
        bytes[..6].copy_from_slice(&made_at.to_be_bytes()[2..]);
        bytes[6..8].copy_from_slice(&(0x7000 | shard.0).to_be_bytes());
        bytes[8..].copy_from_slice(&(random & (u64::MAX >> 2) | 1 << 63).to_be_bytes());
        Self(bytes)
    }

    /// The shard that holds the task.
    pub fn shard(self) -> ShardId {
        ShardId(u16::from_be_bytes([self.0[6], self.0[7]]) & (SHARDS_MAX - 1))
    }

    /// When the leader made it.
    pub fn made_at(self) -> InstantMs {
        let mut bytes = [0; 8];
        bytes[2..].copy_from_slice(&self.0[..6]);
        InstantMs::from_be_bytes(bytes)
    }

    /// As it is stored: their order is the order of ids.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// Reads an id from a stored key. Stored ids were valid when they were written.
    pub fn from_stored(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

impl FromStr for TaskId {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        if text.is_empty() {
            return Err(Invalid::new("task_id: is empty"));
        }
        let uuid = uuid::Uuid::try_parse(text)
            .map_err(|_| Invalid::new(format!("task_id: '{}' is not a UUID", shown(text))))?;
        // The rest of the id is routed by its bits, so a UUID of another kind would point to a random shard.
        if uuid.get_version_num() != 7 || uuid.get_variant() != uuid::Variant::RFC4122 {
            return Err(Invalid::new(format!("task_id: '{uuid}' was not made by Boomerang (not a UUIDv7)")));
        }
        Ok(Self(uuid.into_bytes()))
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(uuid::Uuid::from_bytes_ref(&self.0).as_hyphenated(), f)
    }
}

impl fmt::Debug for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A dead letter's name: the task that died, and when. In text `<task id>@<milliseconds>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DeadLetterId {
    /// When the last attempt failed, Unix milliseconds, by the clock of the shard.
    pub died_ms: InstantMs,
    /// The task whose occurrence it was.
    pub task: TaskId,
}

impl FromStr for DeadLetterId {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let wrong = || Invalid::new(format!("dead_letter_id: '{}' is not <task id>@<milliseconds>", shown(text)));
        let (task, died_ms) = text.split_once('@').ok_or_else(wrong)?;
        Ok(Self { died_ms: died_ms.parse().map_err(|_| wrong())?, task: task.parse().map_err(|_| wrong())? })
    }
}

impl fmt::Display for DeadLetterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.task, self.died_ms)
    }
}

/// What a client's deduplication key is stored and routed by: a hash of both, so that clients do not meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DedupHash(pub [u8; 16]);

impl DedupHash {
    const KEY_BYTES_MAX: usize = 256;

    /// Of `key` as `client` gives it: at most 256 bytes.
    pub fn new(client: &ClientId, key: &str) -> Result<Self, Invalid> {
        if key.len() > Self::KEY_BYTES_MAX {
            return Err(Invalid::new(format!("dedup_key: {} bytes, the limit is {}", key.len(), Self::KEY_BYTES_MAX)));
        }
        let digest = Sha256::new().chain_update(client.as_str()).chain_update([0]).chain_update(key).finalize();
        let mut hash = [0; 16];
        hash.copy_from_slice(&digest[..16]);
        Ok(Self(hash))
    }

    /// Where it lives: a repeated request meets itself.
    pub fn shard(self, shards: u16) -> ShardId {
        let number = u64::from_be_bytes(self.0[..8].try_into().expect("eight bytes")) % u64::from(shards);
        ShardId(u16::try_from(number).expect("below the number of shards"))
    }
}

/// Who a task belongs to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ClientId(String);

impl ClientId {
    /// The administrator every cluster starts with.
    pub const ADMIN: &'static str = "admin";

    /// As it was given.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ClientId {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        if text.is_empty() {
            return Err(Invalid::new("client_id: is empty"));
        }
        if text.len() > CLIENT_ID_BYTES_MAX {
            return Err(Invalid::new(format!("client_id: {} bytes, the limit is {CLIENT_ID_BYTES_MAX}", text.len())));
        }
        // It is printed in tables, logs and HTTP headers.
        if text.chars().any(|c| c.is_control()) || text.trim() != text {
            return Err(Invalid::new("client_id: control characters or outer blanks"));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A caller's text cut to what an error message can bear.
fn shown(text: &str) -> String {
    const SHOWN_CHARS_MAX: usize = 64;
    let mut cut: String = text.chars().take(SHOWN_CHARS_MAX).flat_map(char::escape_default).collect();
    if text.chars().nth(SHOWN_CHARS_MAX).is_some() {
        cut.push_str("...");
    }
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_carries_its_shard_and_sorts_by_time() {
        for shard in [0, 1, 255, 256, SHARDS_MAX - 1] {
            let id = TaskId::new(1_700_000_000_000, ShardId(shard), u64::MAX);
            assert_eq!((id.shard(), id.made_at()), (ShardId(shard), 1_700_000_000_000));
            let text = id.to_string();
            assert_eq!(text.parse::<TaskId>().unwrap(), id);
            assert_eq!(uuid::Uuid::parse_str(&text).unwrap().get_version_num(), 7);
        }
        let earlier = TaskId::new(1_000, ShardId(9), u64::MAX);
        let later = TaskId::new(1_001, ShardId(0), 0);
        assert!(earlier < later);
    }

    #[test]
    fn foreign_ids_are_refused_by_name() {
        for (text, why) in [
            ("", "is empty"),
            ("nonsense", "is not a UUID"),
            ("\u{0}\u{1b}[31m", "\\u{1b}"),
            ("6ba7b810-9dad-11d1-80b4-00c04fd430c8", "not a UUIDv7"),
        ] {
            let error = text.parse::<TaskId>().unwrap_err().to_string();
            assert!(error.contains(why), "{text:?}: {error}");
        }
        assert!("x".repeat(1000).parse::<TaskId>().unwrap_err().to_string().len() < 120);
    }

    #[test]
    fn a_dead_letter_is_named_by_task_and_instant() {
        let id = DeadLetterId { died_ms: 77, task: TaskId::new(5, ShardId(3), 9) };
        assert_eq!(id.to_string().parse::<DeadLetterId>().unwrap(), id);
        for wrong in ["", "x@1", &id.task.to_string(), &format!("{}@", id.task), &format!("{}@-1", id.task)] {
            assert!(wrong.parse::<DeadLetterId>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_same_key_of_two_clients_is_not_the_same() {
        let hash = |client: &str, key: &str| DedupHash::new(&client.parse().unwrap(), key).unwrap();
        assert_eq!(hash("a", "k"), hash("a", "k"));
        assert_ne!(hash("a", "k"), hash("b", "k"));
        assert_ne!(hash("a", "bk"), hash("ab", "k"));
        assert!(hash("a", "k").shard(16).0 < 16);
        assert!(DedupHash::new(&"a".parse().unwrap(), &"x".repeat(257)).is_err());
    }

    #[test]
    fn client_ids_fit_on_a_line() {
        assert!("orders".parse::<ClientId>().is_ok());
        for text in ["", " x", "a\nb", &"x".repeat(129)] {
            assert!(text.parse::<ClientId>().is_err(), "{text:?}");
        }
    }
}
