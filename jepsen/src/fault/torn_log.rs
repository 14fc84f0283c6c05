//! SIGKILL in the middle of a write: the log file ends with what never was a whole record.
//!
//! Nothing is taken away, since what was synced is there after any kill; something is added, as if a write had begun.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::{Rng, RngExt};

use super::targets::{named, victim};
use super::{Begun, NotDone};
use crate::cluster::Cluster;

/// A record of RocksDB's log begins with a checksum, its length and its type.
const HEADER: usize = 7;
/// The type of a record that is not continued.
const FULL: u8 = 1;
const ZEROS_MAX: usize = 64 * 1024;

pub(super) async fn begin(cluster: &Cluster, rng: &mut StdRng) -> Result<Begun, NotDone> {
    let host = victim(cluster, rng)?;
    let (tail, what) = tail(rng);
    let name = named(cluster, host);
    cluster.kill_node(host).await?;
    // From here on it has to come back, torn or not.
    let torn = tear(&cluster.data_dir(host)?, &tail);
    let detail = match torn {
        Ok(file) => format!("{name} killed; {} ends with {what}", file.display()),
        Err(error) => format!("{name} killed; its log could not be torn: {error}"),
    };
    Ok(Begun::down(detail, cluster, vec![host]))
}

/// What a write leaves that was cut short, and how to call it.
fn tail(rng: &mut StdRng) -> (Vec<u8>, String) {
    if rng.random_bool(0.3) {
        let count = rng.random_range(1..=ZEROS_MAX);
        return (vec![0; count], format!("{count} zeros"));
    }
    // A record that says how long it is, and ends before that.
    let length: u16 = rng.random_range(64..16_000);
    let mut record = vec![0; rng.random_range(1..HEADER + usize::from(length))];
    rng.fill_bytes(&mut record);
    let header = [&length.to_le_bytes()[..], &[FULL]].concat();
    for (place, byte) in record.iter_mut().skip(HEADER - header.len()).zip(header) {
        *place = byte;
    }
    let count = record.len();
    (record, format!("{count} bytes of a record of {length}"))
}

/// Appends to the newest log file.
fn tear(folder: &Path, tail: &[u8]) -> io::Result<PathBuf> {
    let newest = newest_log(folder)?.ok_or_else(|| io::Error::other("there is no log file"))?;
    let mut file = File::options().append(true).open(&newest)?;
    file.write_all(tail)?;
    file.sync_all()?;
    Ok(newest.file_name().map(PathBuf::from).unwrap_or(newest))
}

/// RocksDB numbers its log files.
fn newest_log(folder: &Path) -> io::Result<Option<PathBuf>> {
    let mut newest = None;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            newest = newest.max(newest_log(&path)?.and_then(|path| Some((number(&path)?, path))));
        } else if let Some(number) = number(&path) {
            newest = newest.max(Some((number, path)));
        }
    }
    Ok(newest.map(|(_, path)| path))
}

fn number(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    name.strip_suffix(".log")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn the_newest_log_is_torn_and_nothing_is_taken_from_it() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("db");
        fs::create_dir(&inner).unwrap();
        for name in ["000009.log", "000123.log", "LOG", "000200.sst"] {
            fs::write(inner.join(name), "kept").unwrap();
        }
        let torn = tear(folder.path(), b"torn").unwrap();
        assert_eq!(torn, Path::new("000123.log"));
        assert_eq!(fs::read(inner.join("000123.log")).unwrap(), b"kepttorn");
        assert_eq!(fs::read(inner.join("000009.log")).unwrap(), b"kept");
    }

    #[test]
    fn a_torn_record_is_shorter_than_it_says() {
        let mut rng = StdRng::seed_from_u64(7);
        for _ in 0..1_000 {
            let (tail, what) = tail(&mut rng);
            if tail.len() < HEADER || what.ends_with("zeros") {
                continue;
            }
            let says = usize::from(u16::from_le_bytes([tail[4], tail[5]]));
            assert!(tail.len() < HEADER + says, "{what}");
            assert_eq!(tail[6], FULL);
        }
    }
}
