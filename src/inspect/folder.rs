//! The data folder of a node that does not run.

use std::io;
use std::path::{Path, PathBuf};

use super::InspectError;
use crate::store::Store;
use crate::store::folder::{FolderError, Identity, check_not_in_use, database_in};

/// A data folder as it was when it was opened. Nothing in it is changed, and what a node does to it later is not seen.
pub struct StoppedFolder {
    pub path: PathBuf,
    pub identity: Identity,
    pub store: Store,
}

impl StoppedFolder {
    pub fn open(path: &Path) -> Result<Self, InspectError> {
        let identity = match Identity::read(path) {
            Ok(Some(identity)) => identity,
            Ok(None) => return Err(not_a_data_folder(path)),
            Err(FolderError::Older { path, found }) => return Err(InspectError::Older { path, found }),
            Err(error) => return Err(error.into()),
        };
        check_stopped(path)?;
        let database = database_in(path);
        if !database.join("CURRENT").try_exists().map_err(|source| unreadable(&database, source))? {
            return Err(InspectError::NoDatabase { path: shown(path) });
        }
        let opened = Store::open_read_only(&database);
        // A node that has begun in the meantime may have changed files while they were opened.
        check_stopped(path)?;
        Ok(Self { path: path.to_owned(), identity, store: opened? })
    }
}

fn check_stopped(path: &Path) -> Result<(), InspectError> {
    check_not_in_use(path).map_err(|error| match error {
        FolderError::Locked { path, holder } => InspectError::Running { path, holder },
        error => error.into(),
    })
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn unreadable(path: &Path, source: io::Error) -> InspectError {
    InspectError::Unreadable { path: shown(path), source }
}

/// Says what is at `path` instead, and which folder may have been meant.
fn not_a_data_folder(path: &Path) -> InspectError {
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(source) => return unreadable(path, source),
    };
    let names: Vec<PathBuf> = entries.filter_map(Result::ok).map(|entry| entry.path()).collect();
    if names.is_empty() {
        return InspectError::Empty { path: shown(path) };
    }
    let is_one = |path: &PathBuf| matches!(Identity::read(path), Ok(Some(_)));
    let mut near: Vec<PathBuf> = names.into_iter().filter(is_one).collect();
    near.sort();
    near.extend(path.parent().map(Path::to_owned).filter(is_one));
    let hint = match &near[..] {
        [] => "; give the folder that the node was given as --data-dir".to_owned(),
        near => format!("; did you mean {}?", near.iter().map(|path| shown(path)).collect::<Vec<_>>().join(" or ")),
    };
    InspectError::NotADataFolder { path: shown(path), hint }
}
