//! What went wrong with what is stored.

use std::path::Path;

use super::folder::FolderError;

/// A storage error is the node's end: whoever meets one stops rather than answers.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot {verb} {what}: {source}")]
    Rocks { verb: &'static str, what: &'static str, source: rocksdb::Error },
    #[error("{what} is damaged: {why}")]
    Damaged { what: &'static str, why: String },
    #[error("cannot {verb} {path}: {source}")]
    File { verb: &'static str, path: String, source: std::io::Error },
    #[error(transparent)]
    Folder(#[from] FolderError),
}

impl StoreError {
    pub(crate) fn damaged(what: &'static str, why: impl Into<String>) -> Self {
        Self::Damaged { what, why: why.into() }
    }

    pub(super) fn file(verb: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.display().to_string();
        move |source| Self::File { verb, path, source }
    }
}

impl From<StoreError> for std::io::Error {
    fn from(error: StoreError) -> Self {
        std::io::Error::other(error)
    }
}
