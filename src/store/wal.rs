//! Damage in a WAL file on which RocksDB would spin for ever, made into damage that it copes with.
//!
//! RocksDB's reader (`ReadPhysicalRecord` in `db/log_reader.cc`, 11.8.1; facebook/rocksdb issue 13333, open) meets a
//! record of a *recyclable* type in a file that is not recycled, calls it bad, and reads the same record again, without
//! an end: the database never opens, and says nothing. We recycle no WAL files, so such a type is always damage; one
//! flipped bit makes a whole record one of them. Before the database is opened, each is turned into its plain
//! counterpart. If that was the flipped bit, the record is whole again; if not, its checksum does not fit, and the
//! reader ends there, as with any other damage at the end of a log.
//!
//! ```text
//!   block of 32 KiB:  | crc:4 len:2 type:1 | payload | crc:4 len:2 type:1 | payload | ... | rest below 7 bytes |
//! ```

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};

use super::error::StoreError;

const BLOCK_BYTES: usize = 32 * 1024;
const HEADER_BYTES: usize = 7;
const TYPE_AT: usize = 6;

/// What a record of a recyclable type is turned into; `None` for all others.
fn plain(kind: u8) -> Option<u8> {
    match kind {
        // Full, first, middle and last part of a record.
        5..=8 => Some(kind - 4),
        // The size of timestamps, and what is known about the file before; neither is written by us.
        11 | 131 => Some(kind - 1),
        _ => None,
    }
}

/// To be called before the database in `db` is opened.
pub fn disarm(db: &Path) -> Result<(), StoreError> {
    for path in files(db)? {
        let found = recyclable(&path).map_err(StoreError::file("check", &path))?;
        if !found.is_empty() {
            warn(&path, found.len());
            replace(&path, &found).map_err(StoreError::file("mend", &path))?;
        }
    }
    Ok(())
}

/// The same for a database that must stay as it is: its WAL files again, harmless, in a folder of their own; `None` when
/// they are harmless where they are.
pub fn disarmed_copies(db: &Path) -> Result<Option<Copies>, StoreError> {
    let mut damaged = false;
    let files = files(db)?;
    for path in &files {
        let found = recyclable(path).map_err(StoreError::file("check", path))?;
        if !found.is_empty() {
            warn(path, found.len());
            damaged = true;
        }
    }
    if !damaged {
        return Ok(None);
    }
    let copies = Copies::new()?;
    for path in files {
        let copy = copies.0.join(path.file_name().expect("it was listed by its name"));
        std::fs::copy(&path, &copy).map_err(StoreError::file("copy", &path))?;
        let found = recyclable(&copy).map_err(StoreError::file("check", &copy))?;
        replace(&copy, &found).map_err(StoreError::file("mend", &copy))?;
    }
    Ok(Some(copies))
}

/// A folder that only we may read, and that goes with everything in it.
pub struct Copies(PathBuf);

impl Copies {
    fn new() -> Result<Self, StoreError> {
        let path = std::env::temp_dir().join(format!("boomerang-wal-{:016x}", rand::random::<u64>()));
        DirBuilder::new().mode(0o700).create(&path).map_err(StoreError::file("create", &path))?;
        Ok(Self(path))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn files(db: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let entries = match std::fs::read_dir(db) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(StoreError::file("list", db))?,
    };
    let paths = entries.map(|entry| Ok(entry.map_err(StoreError::file("list", db))?.path()));
    let paths: Vec<PathBuf> = paths.collect::<Result<_, StoreError>>()?;
    Ok(paths.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "log")).collect())
}

fn warn(path: &Path, records: usize) {
    tracing::warn!(path = %path.display(), records, "a WAL file is damaged; what can be read of it is kept");
}

/// Where a file has records of recyclable types, and what each is turned into.
fn recyclable(path: &Path) -> io::Result<Vec<(u64, u8)>> {
    let mut file = File::open(path)?;
    let mut block = Vec::with_capacity(BLOCK_BYTES);
    let mut found = Vec::new();
    let mut at = 0;
    loop {
        block.clear();
        // Less than a block is the end of the file.
        if (&mut file).take(BLOCK_BYTES as u64).read_to_end(&mut block)? == 0 {
            break;
        }
        found.extend(recyclable_in(&block).map(|(position, kind)| (at + position as u64, kind)));
        at += block.len() as u64;
    }
    Ok(found)
}

fn replace(path: &Path, found: &[(u64, u8)]) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    for (position, kind) in found {
        file.write_all_at(&[*kind], *position)?;
    }
    file.sync_data()
}

/// Where the type of a record in a block is a recyclable one, and what it is turned into.
///
/// Checksums are not looked at. Behind a record that is damaged in another way this reads on where the reader does
/// not: the reader gives up the rest of the block, so that what is changed there changes nothing.
fn recyclable_in(block: &[u8]) -> impl Iterator<Item = (usize, u8)> {
    records(block).filter_map(|at| plain(block[at + TYPE_AT]).map(|kind| (at + TYPE_AT, kind)))
}

/// Where the records of a block begin.
fn records(block: &[u8]) -> impl Iterator<Item = usize> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let header: &[u8; HEADER_BYTES] = block.get(at..)?.first_chunk()?;
        let this = at;
        at += HEADER_BYTES + usize::from(u16::from_le_bytes([header[4], header[5]]));
        Some(this)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::keys::Key;
    use crate::store::{LogWrite, Store};
    use crate::task::GroupId;

    const GROUP: GroupId = GroupId(1);
    const ROWS: u64 = 300;

    /// A folder with rows in its WAL alone, as a killed process leaves it, and that WAL.
    fn killed() -> (tempfile::TempDir, PathBuf) {
        let (temp, left) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store = Store::open(temp.path()).unwrap();
        for index in 0..ROWS {
            // Some fill a block and more.
            let value = vec![index as u8; if index % 50 == 7 { 70_000 } else { 100 }];
            store.write_log(vec![LogWrite::Put(Key::log_entry(GROUP, index), value)]).unwrap();
        }
        let mut wal = None;
        for entry in std::fs::read_dir(temp.path()).unwrap() {
            let path = entry.unwrap().path();
            let copy = left.path().join(path.file_name().unwrap());
            std::fs::copy(&path, &copy).unwrap();
            if copy.extension().is_some_and(|extension| extension == "log") {
                wal = Some(copy);
            }
        }
        (left, wal.unwrap())
    }

    fn rows_left(folder: &Path) -> u64 {
        let store = Store::open(folder).unwrap();
        let rows = store.scan_log(&Key::log_entry(GROUP, 0), &Key::log_end(GROUP), usize::MAX).unwrap();
        for (index, (key, _)) in (0..).zip(&rows) {
            assert_eq!(*key, Key::log_entry(GROUP, index).into_bytes(), "a prefix");
        }
        rows.len() as u64
    }

    fn types(wal: &Path) -> Vec<usize> {
        let bytes = std::fs::read(wal).unwrap();
        let blocks = bytes.chunks(BLOCK_BYTES).enumerate();
        blocks.flat_map(|(n, block)| records(block).map(move |at| n * BLOCK_BYTES + at + TYPE_AT)).collect()
    }

    #[test]
    fn a_sound_wal_is_left_alone() {
        let (left, wal) = killed();
        let before = std::fs::read(&wal).unwrap();
        let kinds: Vec<u8> = types(&wal).into_iter().map(|at| before[at]).collect();
        assert!(
            [1, 2, 3, 4].iter().all(|kind| kinds.contains(kind)) && kinds.iter().all(|kind| *kind <= 4),
            "{kinds:?}"
        );
        disarm(left.path()).unwrap();
        assert_eq!(std::fs::read(&wal).unwrap(), before);
        assert_eq!(rows_left(left.path()), ROWS);
        disarm(&left.path().join("missing")).unwrap();
    }

    #[test]
    fn whoever_only_reads_mends_copies() {
        let (left, wal) = killed();
        let mut bytes = std::fs::read(&wal).unwrap();
        let types = types(&wal);
        assert!(disarmed_copies(left.path()).unwrap().is_none(), "there is nothing to mend");
        bytes[types[types.len() / 2]] ^= 4;
        std::fs::write(&wal, &bytes).unwrap();
        let copies = disarmed_copies(left.path()).unwrap().unwrap();
        let (copied, temporary) = (copies.path().join(wal.file_name().unwrap()), copies.path().to_owned());
        assert_ne!(std::fs::read(&copied).unwrap(), bytes);
        drop(copies);
        assert!(!temporary.exists());
        let store = Store::open_read_only(left.path()).unwrap();
        let rows = store.scan_log(&Key::log_entry(GROUP, 0), &Key::log_end(GROUP), usize::MAX).unwrap();
        assert_eq!((rows.len() as u64, std::fs::read(&wal).unwrap()), (ROWS, bytes));
    }

    /// Without `disarm`, opening these never ends.
    #[test]
    fn a_flipped_bit_in_a_type_costs_nothing() {
        let (left, wal) = killed();
        let mut bytes = std::fs::read(&wal).unwrap();
        let types = types(&wal);
        for at in [types[3], types[types.len() / 2], *types.last().unwrap()] {
            bytes[at] ^= 4;
        }
        std::fs::write(&wal, bytes).unwrap();
        assert_eq!(rows_left(left.path()), ROWS);
    }

    #[test]
    fn behind_other_damage_the_log_ends() {
        let (left, wal) = killed();
        let mut bytes = std::fs::read(&wal).unwrap();
        let types = types(&wal);
        let from = types[types.len() / 2] - TYPE_AT;
        // Each block from here on begins with a type on which the reader would spin.
        bytes[from..].fill(0x83);
        std::fs::write(&wal, bytes).unwrap();
        let rows = rows_left(left.path());
        assert!(rows > 0 && rows < ROWS, "{rows}");
    }
}
