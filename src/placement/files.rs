//! The few files of this room in the data folder: whole or not there, whatever happens to the machine.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER;
use rand::Rng;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Names the data folder, and no other one ever.
const FOLDER_FILE: &str = "folder-id";
const FOLDER_BYTES: usize = 16;

#[derive(Debug, thiserror::Error)]
#[error("cannot {verb} {path}: {source}")]
pub struct FileError {
    verb: &'static str,
    path: String,
    source: std::io::Error,
}

fn failed(verb: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> FileError {
    let path = path.display().to_string();
    move |source| FileError { verb, path, source }
}

/// A JSON file; nothing when it is not there.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, FileError> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("read", path)(error)),
    };
    serde_json::from_slice(&text).map(Some).map_err(|error| failed("understand", path)(error.into()))
}

/// After this the file is what it was, or this, and stays so.
pub fn write(path: &Path, value: &impl Serialize) -> Result<(), FileError> {
    let text = serde_json::to_vec_pretty(value).expect("plain fields");
    let unfinished = path.with_extension("new");
    let written = || {
        let mut file = File::create(&unfinished)?;
        file.write_all(&text)?;
        file.sync_all()?;
        std::fs::rename(&unfinished, path)?;
        File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    written().map_err(failed("write", path))
}

/// The id of a data folder, made when it has none.
pub fn folder_id(data_dir: &Path) -> Result<String, FileError> {
    let path: PathBuf = data_dir.join(FOLDER_FILE);
    if let Some(id) = read(&path)? {
        return Ok(id);
    }
    let mut bytes = [0; FOLDER_BYTES];
    rand::rng().fill_bytes(&mut bytes);
    let id = HEXLOWER.encode(&bytes);
    write(&path, &id)?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_keeps_its_id() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let id = folder_id(one.path()).unwrap();
        assert_eq!(id.len(), 2 * FOLDER_BYTES);
        assert_eq!(folder_id(one.path()).unwrap(), id);
        assert_ne!(folder_id(other.path()).unwrap(), id);
        std::fs::write(one.path().join(FOLDER_FILE), "no json").unwrap();
        assert!(folder_id(one.path()).unwrap_err().to_string().contains("understand"));
    }
}
