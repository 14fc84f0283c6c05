//! Room on the disk: how much there is, and a file that keeps some of it back.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate, statvfs};

/// The file system a folder lies on.
pub struct DiskSpace {
    folder: PathBuf,
}

impl DiskSpace {
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// What an ordinary process can still write.
    pub fn free_bytes(&self) -> io::Result<u64> {
        let space = statvfs(&self.folder)?;
        Ok(space.f_bavail.saturating_mul(space.f_frsize))
    }
}

/// A file without content that takes up room until the room is needed.
pub struct Reserve {
    path: PathBuf,
    bytes: u64,
    kept: bool,
}

impl Reserve {
    /// Nothing is kept yet; a file of an earlier process still is.
    pub fn new(path: PathBuf, bytes: u64) -> Self {
        let kept = path.metadata().is_ok_and(|file| file.len() == bytes) && bytes > 0;
        Self { path, bytes, kept }
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn is_kept(&self) -> bool {
        self.kept
    }

    /// Lays the room by, if there is as much.
    pub fn keep(&mut self) {
        if self.kept || self.bytes == 0 {
            return;
        }
        let laid_by =
            File::create(&self.path).and_then(|file| Ok(fallocate(&file, FallocateFlags::empty(), 0, self.bytes)?));
        match laid_by {
            Ok(()) => self.kept = true,
            Err(error) => {
                tracing::warn!(%error, "no room can be laid by for a full disk");
                self.release();
            }
        }
    }

    /// Gives the room back.
    pub fn release(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::error!(%error, "the reserve cannot be given up");
        }
        self.kept = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserve_takes_room_until_it_is_given_up() {
        const BYTES: u64 = 8 * 1024 * 1024;
        let temp = tempfile::tempdir().unwrap();
        assert!(DiskSpace::new(temp.path()).free_bytes().unwrap() > 0);
        let path = temp.path().join("reserve");
        let mut reserve = Reserve::new(path.clone(), BYTES);
        assert!(!reserve.is_kept());
        reserve.keep();
        reserve.keep();
        assert!(reserve.is_kept());
        let blocks = std::os::unix::fs::MetadataExt::blocks(&path.metadata().unwrap());
        assert!(blocks * 512 >= BYTES, "the room is really taken");
        assert!(Reserve::new(path.clone(), BYTES).is_kept(), "it outlives the process");
        reserve.release();
        reserve.release();
        assert!(!path.exists() && !reserve.is_kept());
    }

    #[test]
    fn what_cannot_be_kept_is_not() {
        let temp = tempfile::tempdir().unwrap();
        let mut reserve = Reserve::new(temp.path().join("reserve"), u64::MAX / 4);
        reserve.keep();
        assert!(!reserve.is_kept());
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0, "and leaves nothing behind");
    }
}
