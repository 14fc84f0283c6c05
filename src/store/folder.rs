//! Who may open a data folder: one process at a time, of the right cluster and node, and no older than the data.
//!
//! The folder holds `lock` (held as long as the process lives; the system releases it when the process dies, however
//! it dies), `boomerang.json` (the identity, written before anything else) and `db/`.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The newest format of the folder that this binary writes and understands.
pub const FORMAT: u32 = 4;
/// The oldest one it understands. Those before it are of the time before anybody depended on any.
const FORMAT_OLDEST: u32 = 4;

const IDENTITY_FILE: &str = "boomerang.json";
const LOCK_FILE: &str = "lock";
const UNFINISHED_FILE: &str = "boomerang.json.new";

#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    #[error("data folder {path} is in use by another process{holder}; stop it or choose another --data-dir")]
    Locked { path: String, holder: String },
    #[error(
        "data folder {path} has format {found}, this binary knows formats up to {FORMAT}; use the newer binary that wrote it"
    )]
    Newer { path: String, found: u32 },
    #[error(
        "data folder {path} has format {found}, of a version before the first release, which this binary (from format \
         {FORMAT_OLDEST}) does not carry over; choose an empty --data-dir"
    )]
    Older { path: String, found: u32 },
    #[error(
        "data folder {path} belongs to {field} {found}, not {wanted}; choose another --data-dir or correct --{flag}"
    )]
    Foreign { path: String, field: &'static str, flag: &'static str, found: String, wanted: String },
    #[error("data folder {path} holds files but no {IDENTITY_FILE}: it is not one of Boomerang's; choose an empty one")]
    NotOurs { path: String },
    #[error("data folder {path}: {IDENTITY_FILE} is damaged: {why}")]
    Damaged { path: String, why: String },
    #[error("data folder {path}: cannot {verb}: {source}")]
    Io { path: String, verb: &'static str, source: std::io::Error },
}

/// Whose data it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub format: u32,
    pub cluster: String,
    pub node_id: u64,
    /// Fixed when the cluster was made: ids carry the shard number.
    pub shards: u16,
}

/// A data folder that is ours until this value is dropped.
#[derive(Debug)]
pub struct DataFolder {
    path: PathBuf,
    identity: Identity,
    /// Nothing was in it before.
    new: bool,
    _lock: File,
}

impl Identity {
    /// That of the folder at `path`; `None` when it has none. Nothing is changed, and the folder need not be ours.
    pub fn read(path: &Path) -> Result<Option<Self>, FolderError> {
        let shown = path.display().to_string();
        match std::fs::read_to_string(path.join(IDENTITY_FILE)) {
            Ok(text) => parse(&text, &shown).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(FolderError::Io { path: shown, verb: "read boomerang.json", source }),
        }
    }
}

/// Fails when a process has the data folder at `path` open.
///
/// The lock is taken for a moment, together with all others who ask, and nothing is written: whoever has it open does not
/// notice. A node that starts at this very moment would be refused.
pub fn check_not_in_use(path: &Path) -> Result<(), FolderError> {
    let (shown, lock_path) = (path.display().to_string(), path.join(LOCK_FILE));
    let io = |verb, source| FolderError::Io { path: shown.clone(), verb, source };
    let file = match File::open(&lock_path) {
        // A copy, or a folder from before its first start.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        opened => opened.map_err(|source| io("open the lock", source))?,
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(locked(&lock_path, &shown)),
        Err(TryLockError::Error(source)) => Err(io("lock it", source)),
    }
}

/// The database in the data folder at `path`.
pub fn database_in(path: &Path) -> PathBuf {
    path.join("db")
}

impl DataFolder {
    /// Locks the folder for `wanted`, or says by name why not. An empty or missing folder becomes `wanted`'s.
    pub fn open(path: &Path, wanted: &Identity) -> Result<Self, FolderError> {
        let shown = path.display().to_string();
        let io = |verb| {
            let path = shown.clone();
            move |source| FolderError::Io { path, verb, source }
        };
        std::fs::create_dir_all(path).map_err(io("create it"))?;
        let identity_path = path.join(IDENTITY_FILE);
        let known = identity_path.try_exists().map_err(io("read it"))?;
        if !known {
            let others = std::fs::read_dir(path).map_err(io("list it"))?.filter_map(Result::ok);
            // `lost+found` is what a fresh file system has; a lock alone is a start that was cut off.
            if others
                .into_iter()
                .any(|entry| !["lost+found", LOCK_FILE, UNFINISHED_FILE].iter().any(|name| entry.file_name() == *name))
            {
                return Err(FolderError::NotOurs { path: shown });
            }
        }
        let lock = lock(&path.join(LOCK_FILE), &shown)?;
        let identity = if known {
            let text = std::fs::read_to_string(&identity_path).map_err(io("read boomerang.json"))?;
            check(&text, wanted, &shown)?
        } else {
            write_synced(path, &identity_path, wanted).map_err(io("write boomerang.json"))?;
            wanted.clone()
        };
        Ok(Self { path: path.to_owned(), identity, new: !known, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub fn is_new(&self) -> bool {
        self.new
    }

    pub fn database(&self) -> PathBuf {
        database_in(&self.path)
    }

    /// Where parts of a snapshot wait until they are whole.
    pub fn staging(&self) -> PathBuf {
        self.path.join("staging")
    }
}

fn lock(lock_path: &Path, shown: &str) -> Result<File, FolderError> {
    let io = |verb| {
        let path = shown.to_owned();
        move |source| FolderError::Io { path, verb, source }
    };
    let mut options = OpenOptions::new();
    let mut file =
        options.create(true).truncate(false).read(true).write(true).open(lock_path).map_err(io("open the lock"))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(locked(lock_path, shown)),
        Err(TryLockError::Error(source)) => {
            return Err(FolderError::Io { path: shown.to_owned(), verb: "lock it", source });
        }
    }
    // The number is only for the error message of the next one; a full disk must not keep us from starting.
    let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(file)
}

fn locked(lock_path: &Path, shown: &str) -> FolderError {
    let holder = std::fs::read_to_string(lock_path).unwrap_or_default();
    let holder = if holder.trim().is_empty() { String::new() } else { format!(" (pid {})", holder.trim()) };
    FolderError::Locked { path: shown.to_owned(), holder }
}

fn parse(text: &str, shown: &str) -> Result<Identity, FolderError> {
    /// Read on its own first: a newer format may have other fields.
    #[derive(Deserialize)]
    struct FormatOnly {
        format: u32,
    }
    let damaged = |error: serde_json::Error| FolderError::Damaged { path: shown.to_owned(), why: error.to_string() };
    let FormatOnly { format } = serde_json::from_str(text).map_err(damaged)?;
    if format > FORMAT {
        return Err(FolderError::Newer { path: shown.to_owned(), found: format });
    }
    if format < FORMAT_OLDEST {
        return Err(FolderError::Older { path: shown.to_owned(), found: format });
    }
    serde_json::from_str(text).map_err(damaged)
}

fn check(text: &str, wanted: &Identity, shown: &str) -> Result<Identity, FolderError> {
    let found = parse(text, shown)?;
    let foreign = |field, flag, found: String, wanted: String| {
        Err(FolderError::Foreign { path: shown.to_owned(), field, flag, found, wanted })
    };
    if found.cluster != wanted.cluster {
        return foreign("cluster", "cluster", format!("'{}'", found.cluster), format!("'{}'", wanted.cluster));
    }
    if found.node_id != wanted.node_id {
        return foreign("node", "node-id", found.node_id.to_string(), wanted.node_id.to_string());
    }
    if found.shards != wanted.shards {
        return foreign("a number of shards of", "shards", found.shards.to_string(), wanted.shards.to_string());
    }
    Ok(found)
}

/// After this the identity is there in whole, or not at all, whatever happens to the machine.
fn write_synced(folder: &Path, identity_path: &Path, identity: &Identity) -> std::io::Result<()> {
    let unfinished = folder.join(UNFINISHED_FILE);
    let mut file = File::create(&unfinished)?;
    file.write_all(serde_json::to_string_pretty(identity)?.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&unfinished, identity_path)?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity { format: FORMAT, cluster: "test".into(), node_id: 1, shards: 16 }
    }

    #[test]
    fn a_second_opener_is_refused_until_the_first_is_gone() {
        let temp = tempfile::tempdir().unwrap();
        let first = DataFolder::open(temp.path(), &identity()).unwrap();
        assert!(first.is_new());
        let error = DataFolder::open(temp.path(), &identity()).unwrap_err().to_string();
        assert!(error.contains("in use") && error.contains(&std::process::id().to_string()), "{error}");
        drop(first);
        assert!(!DataFolder::open(temp.path(), &identity()).unwrap().is_new());
    }

    #[test]
    fn foreign_newer_and_damaged_folders_are_refused_by_name() {
        let temp = tempfile::tempdir().unwrap();
        drop(DataFolder::open(temp.path(), &identity()).unwrap());
        let refusal = |wanted: &Identity| DataFolder::open(temp.path(), wanted).unwrap_err().to_string();
        assert!(refusal(&Identity { cluster: "prod".into(), ..identity() }).contains("cluster 'test', not 'prod'"));
        assert!(refusal(&Identity { node_id: 2, ..identity() }).contains("node 1, not 2"));
        assert!(refusal(&Identity { shards: 8, ..identity() }).contains("shards"));
        std::fs::write(temp.path().join(IDENTITY_FILE), r#"{"format": 99, "new_field": true}"#).unwrap();
        assert!(refusal(&identity()).contains("format 99"));
        std::fs::write(temp.path().join(IDENTITY_FILE), "{").unwrap();
        assert!(refusal(&identity()).contains("damaged"));
    }

    #[test]
    fn a_folder_of_somebody_else_is_left_alone() {
        let temp = tempfile::tempdir().unwrap();
        std::fs::write(temp.path().join("thesis.tex"), "years of work").unwrap();
        assert!(matches!(DataFolder::open(temp.path(), &identity()), Err(FolderError::NotOurs { .. })));
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 1, "nothing was added");
    }
}
