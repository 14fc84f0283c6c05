//! Room on the disk: how much there is, and a reserve for when there is none.
//!
//! A full disk must not be the end of a node: settling, cancelling and purging need a little room to make more. So a
//! ballast file lies in the data folder, as real blocks; when the disk is nearly full it is deleted, and made again
//! once there is room. When that is, another part decides: this one only measures and does.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::io::Errno;

/// The unit of `st_blocks`, whatever the file system's own blocks are.
const STAT_BLOCK_BYTES: u64 = 512;
const ZEROS_BYTES: usize = 256 * 1024;

/// The file system that holds `path`.
#[derive(Debug, Clone)]
pub struct DiskSpace {
    pub path: PathBuf,
}

impl DiskSpace {
    /// What we may still write: less than what is free, as some may be kept for root.
    pub fn free_bytes(&self) -> io::Result<u64> {
        let found = statvfs(&self.path)?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }
}

/// A file of `bytes` that only takes up room.
#[derive(Debug)]
pub struct Reserve {
    path: PathBuf,
    bytes: u64,
    held: bool,
}

impl Reserve {
    /// The reserve at `path`, if an earlier process left one; see [`Reserve::restore`].
    pub fn find(path: PathBuf, bytes: u64) -> Self {
        let mut reserve = Self { path, bytes, held: false };
        reserve.held = reserve.is_there().unwrap_or(false);
        reserve
    }

    pub fn is_held(&self) -> bool {
        self.held
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Gives the room back. Without a reserve this does nothing.
    pub fn release(&mut self) -> io::Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => {
                self.held = false;
                Ok(())
            }
        }
    }

    /// Takes the room again; when there is not enough of it nothing is taken, and the error says so.
    pub fn restore(&mut self) -> io::Result<()> {
        self.restore_by(|file, bytes| Ok(fallocate(file, FallocateFlags::empty(), 0, bytes)?))
    }

    fn restore_by(&mut self, allocate: impl FnOnce(&File, u64) -> io::Result<()>) -> io::Result<()> {
        self.held = false;
        if self.is_there()? {
            self.held = true;
            return Ok(());
        }
        // Not there, or what is left of one that was cut off, or of another size.
        self.release()?;
        let folder = self.path.parent().unwrap_or(Path::new(".")).to_owned();
        // Asked first: filling the disk to the brim, only to learn that it does not fit, would hurt all others.
        let free = DiskSpace { path: folder }.free_bytes()?;
        if free < self.bytes {
            let why = format!("{} bytes are wanted and {free} are free", self.bytes);
            return Err(io::Error::new(io::ErrorKind::StorageFull, why));
        }
        if let Err(error) = self.fill(allocate) {
            let _ = self.release();
            return Err(error);
        }
        self.held = true;
        Ok(())
    }

    /// In whole, and as blocks rather than as a hole.
    fn is_there(&self) -> io::Result<bool> {
        match std::fs::metadata(&self.path) {
            Ok(found) => Ok(found.len() == self.bytes && found.blocks() * STAT_BLOCK_BYTES >= self.bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn fill(&self, allocate: impl FnOnce(&File, u64) -> io::Result<()>) -> io::Result<()> {
        let mut file = OpenOptions::new().create_new(true).write(true).open(&self.path)?;
        match allocate(&file, self.bytes) {
            Err(error) if is_unsupported(&error) => {
                let zeros = vec![0; ZEROS_BYTES];
                let mut left = self.bytes;
                while left > 0 {
                    let now = left.min(ZEROS_BYTES as u64);
                    file.write_all(&zeros[..usize::try_from(now).expect("at most the length of a Vec")])?;
                    left -= now;
                }
            }
            allocated => allocated?,
        }
        // Some file systems give out blocks only now.
        file.sync_all()
    }
}

/// The file system does not know `fallocate`, as opposed to refusing this one.
fn is_unsupported(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    [Errno::OPNOTSUPP, Errno::NOSYS].iter().any(|errno| code == Some(errno.raw_os_error()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(path: &Path, bytes: u64) -> Reserve {
        let mut reserve = Reserve::find(path.to_owned(), bytes);
        let _ = reserve.restore();
        reserve
    }

    const BYTES: u64 = 3 * 1024 * 1024 + 17;

    fn blocks_bytes(path: &Path) -> u64 {
        std::fs::metadata(path).unwrap().blocks() * STAT_BLOCK_BYTES
    }

    #[test]
    fn free_room_is_what_df_says() {
        let temp = tempfile::tempdir().unwrap();
        let space = DiskSpace { path: temp.path().into() };
        let output =
            std::process::Command::new("df").args(["--output=avail", "-B1"]).arg(temp.path()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let df: u64 = text.lines().nth(1).unwrap().trim().parse().unwrap();
        let ours = space.free_bytes().unwrap();
        // Others write at the same time.
        assert!(ours.abs_diff(df) < 4 * 1024 * 1024 * 1024, "{ours} and {df}");
        assert!(DiskSpace { path: temp.path().join("missing") }.free_bytes().is_err());
    }

    #[test]
    fn a_reserve_is_real_blocks_and_comes_and_goes() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("reserve");
        let mut reserve = made(&path, BYTES);
        assert!(reserve.is_held());
        assert!(blocks_bytes(&path) >= BYTES);
        reserve.restore().unwrap();
        assert!(reserve.is_held());
        for _ in 0..2 {
            reserve.release().unwrap();
            assert!(!reserve.is_held() && !path.exists());
        }
        reserve.restore().unwrap();
        assert!(reserve.is_held() && blocks_bytes(&path) >= BYTES);
        let inode = std::fs::metadata(&path).unwrap().ino();
        drop(reserve);
        assert!(made(&path, BYTES).is_held());
        assert_eq!(std::fs::metadata(&path).unwrap().ino(), inode, "one that is there is taken over");
    }

    #[test]
    fn a_hole_or_another_size_is_not_a_reserve() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("reserve");
        File::create(&path).unwrap().set_len(BYTES).unwrap();
        assert!(blocks_bytes(&path) < BYTES, "the file system knows holes");
        assert!(made(&path, BYTES).is_held());
        assert!(blocks_bytes(&path) >= BYTES);
        assert!(made(&path, BYTES / 2).is_held());
        assert_eq!(std::fs::metadata(&path).unwrap().len(), BYTES / 2);
    }

    #[test]
    fn without_fallocate_zeros_are_written() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("reserve");
        let mut reserve = Reserve { path: path.clone(), bytes: BYTES, held: false };
        reserve.restore_by(|_, _| Err(Errno::OPNOTSUPP.into())).unwrap();
        assert!(reserve.is_held());
        assert_eq!(std::fs::metadata(&path).unwrap().len(), BYTES);
        assert!(blocks_bytes(&path) >= BYTES);
    }

    #[test]
    fn without_room_there_is_no_reserve_and_nothing_is_left_behind() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("reserve");
        let mut reserve = made(&path, 1 << 60);
        assert!(!reserve.is_held() && !path.exists());
        assert_eq!(reserve.restore().unwrap_err().kind(), io::ErrorKind::StorageFull);
        reserve.release().unwrap();
        // The room is there when asked for and gone when taken: what was taken by then goes back.
        let mut reserve = Reserve { path: path.clone(), bytes: BYTES, held: false };
        let error = reserve.restore_by(|file, _| {
            file.set_len(4096)?;
            Err(Errno::NOSPC.into())
        });
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert!(!reserve.is_held() && !path.exists());
        assert!(!made(Path::new("/nonexistent/reserve"), 1).is_held());
    }
}
