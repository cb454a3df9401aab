//! `<data_dir>/snapshot`: the pipeline's state and the journal that it belongs to.
//!
//! ```text
//! "weirSNP\n" | version u8 = 1 | journal id [16] | crc32c u32 of journal id and state | state, to the end
//! ```
//! It is replaced by rename, so a crash leaves the old or the new one, whole. A damaged one is never used. A full disk
//! leaves the old one ([`SnapshotFileError::is_full`]): the caller frees nothing and tries again.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use segment_log::LogId;

const MAGIC: &[u8; 8] = b"weirSNP\n";
const VERSION: u8 = 1;
const HEADER: usize = 8 + 1 + 16 + 4;

/// What a file holds.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) journal: LogId,
    pub(super) state: Bytes,
}

/// Why a snapshot is not used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotFileError {
    #[error("{path}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{0} is no snapshot of this version, or it is damaged")]
    Damaged(PathBuf),
}

impl SnapshotFileError {
    /// Whether the disk had no room: a state, which passes.
    pub fn is_full(&self) -> bool {
        let full =
            |error: &io::Error| matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        matches!(self, Self::Io { source, .. } if full(source))
    }
}

/// Reads the snapshot of a data directory; None when there is none yet.
pub(super) fn read(data_dir: &Path) -> Result<Option<Snapshot>, SnapshotFileError> {
    let path = data_dir.join("snapshot");
    let bytes = match fs::read(&path) {
        Ok(bytes) => Bytes::from(bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(SnapshotFileError::Io { path, source }),
    };
    let sound = bytes.len() >= HEADER && bytes[..8] == *MAGIC && bytes[8] == VERSION;
    let crc = |bytes: &Bytes| crc32c::crc32c_append(crc32c::crc32c(&bytes[9..25]), &bytes[HEADER..]).to_le_bytes();
    if !sound || bytes[25..HEADER] != crc(&bytes) {
        return Err(SnapshotFileError::Damaged(path));
    }
    let mut journal = [0; 16];
    journal.copy_from_slice(&bytes[9..25]);
    Ok(Some(Snapshot { journal: LogId(journal), state: bytes.slice(HEADER..) }))
}

/// Replaces the snapshot; it is durable when this returns.
pub(super) fn write(data_dir: &Path, journal: LogId, state: &[u8]) -> Result<(), SnapshotFileError> {
    let (path, new) = (data_dir.join("snapshot"), data_dir.join("snapshot.new"));
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| SnapshotFileError::Io { path, source }
    };
    let mut header = MAGIC.to_vec();
    header.push(VERSION);
    header.extend(journal.0);
    header.extend(crc32c::crc32c_append(crc32c::crc32c(&journal.0), state).to_le_bytes());
    let written = File::create(&new).and_then(|mut file| {
        file.write_all(&header)?;
        file.write_all(state)?;
        file.sync_all()
    });
    if let Err(source) = written {
        // What there was of it must not keep the disk full.
        let _ = fs::remove_file(&new);
        return Err(SnapshotFileError::Io { path: new, source });
    }
    fs::rename(&new, &path).map_err(io(&path))?;
    File::open(data_dir).and_then(|directory| directory.sync_all()).map_err(io(data_dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_leaves_the_old_one_and_nothing_of_the_new_one() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), LogId([7; 16]), b"old").unwrap();
        let new = directory.path().join("snapshot.new");
        std::os::unix::fs::symlink("/dev/full", &new).unwrap();
        let error = write(directory.path(), LogId([7; 16]), b"new").unwrap_err();
        assert!(error.is_full(), "{error:?}");
        assert!(fs::symlink_metadata(&new).is_err());
        assert_eq!(read(directory.path()).unwrap().unwrap().state, b"old".as_slice());
        assert!(!SnapshotFileError::Damaged(new).is_full());
    }

    #[test]
    fn a_snapshot_comes_back_and_every_flipped_bit_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        assert!(read(directory.path()).unwrap().is_none());
        write(directory.path(), LogId([7; 16]), b"one").unwrap();
        write(directory.path(), LogId([8; 16]), b"state").unwrap();
        let snapshot = read(directory.path()).unwrap().unwrap();
        assert_eq!((snapshot.journal, snapshot.state.as_ref()), (LogId([8; 16]), b"state".as_slice()));
        let path = directory.path().join("snapshot");
        let bytes = fs::read(&path).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, &damaged).unwrap();
            assert!(read(directory.path()).is_err(), "bit {bit}");
        }
    }
}
