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

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

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
    let entries = match std::fs::read_dir(db) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(StoreError::file("list", db))?,
    };
    for entry in entries {
        let path = entry.map_err(StoreError::file("list", db))?.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            disarm_file(&path).map_err(StoreError::file("check", &path))?;
        }
    }
    Ok(())
}

fn disarm_file(path: &Path) -> io::Result<()> {
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
    if found.is_empty() {
        return Ok(());
    }
    tracing::warn!(path = %path.display(), records = found.len(), "a WAL file is damaged; what can be read of it is kept");
    let file = OpenOptions::new().write(true).open(path)?;
    for (position, kind) in found {
        file.write_all_at(&[kind], position)?;
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
    use std::path::PathBuf;

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
