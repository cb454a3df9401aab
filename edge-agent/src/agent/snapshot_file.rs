//! `<data_dir>/snapshot`: the pipeline's state, the journal that it belongs to, and the configuration that it goes on by.
//!
//! ```text
//! "weirSNP\n" | version u8 = 2 | journal id [16] | crc32c u32 of all behind the version but itself
//!             | configuration u64 | length u32 | its text without secrets | state, to the end
//! ```
//! Version 1 had no configuration: the state began behind the checksum.
//!
//! It is replaced by rename, so a crash leaves the old or the new one, whole. A damaged one is never used. A full disk
//! leaves the old one ([`SnapshotFileError::is_full`]): the caller frees nothing and tries again.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bytes::{Buf, Bytes};
use segment_log::LogId;

use crate::failpoint;

const MAGIC: &[u8; 8] = b"weirSNP\n";
const VERSION: u8 = 2;
const HEADER: usize = 8 + 1 + 16 + 4;

/// What a file holds.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) journal: LogId,
    /// Version and text. None in a file of version 1.
    pub(super) configuration: Option<(u64, String)>,
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
    let sound = bytes.len() >= HEADER && bytes[..8] == *MAGIC && (1..=VERSION).contains(&bytes[8]);
    let crc = |bytes: &Bytes| crc32c::crc32c_append(crc32c::crc32c(&bytes[9..25]), &bytes[HEADER..]).to_le_bytes();
    if !sound || bytes[25..HEADER] != crc(&bytes) {
        return Err(SnapshotFileError::Damaged(path));
    }
    let mut journal = [0; 16];
    journal.copy_from_slice(&bytes[9..25]);
    let mut state = bytes.slice(HEADER..);
    let configuration = match bytes[8] {
        1 => None,
        _ => Some(take_configuration(&mut state).ok_or(SnapshotFileError::Damaged(path))?),
    };
    Ok(Some(Snapshot { journal: LogId(journal), configuration, state }))
}

fn take_configuration(bytes: &mut Bytes) -> Option<(u64, String)> {
    let (version, len) = (bytes.try_get_u64_le().ok()?, bytes.try_get_u32_le().ok()? as usize);
    let text = (bytes.len() >= len).then(|| bytes.split_to(len))?;
    Some((version, String::from_utf8(text.into()).ok()?))
}

/// Replaces the snapshot; it is durable when this returns.
pub(super) fn write(
    data_dir: &Path,
    journal: LogId,
    (version, text): (u64, &str),
    state: &[u8],
) -> Result<(), SnapshotFileError> {
    let (path, new) = (data_dir.join("snapshot"), data_dir.join("snapshot.new"));
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| SnapshotFileError::Io { path, source }
    };
    let configuration =
        [version.to_le_bytes().as_slice(), &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
    let mut header = MAGIC.to_vec();
    header.push(VERSION);
    header.extend(journal.0);
    let crc = crc32c::crc32c_append(crc32c::crc32c(&journal.0), &configuration);
    header.extend(crc32c::crc32c_append(crc, state).to_le_bytes());
    header.extend(configuration);
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
    failpoint::reach("snapshot.written");
    fs::rename(&new, &path).map_err(io(&path))?;
    failpoint::reach("snapshot.named");
    File::open(data_dir).and_then(|directory| directory.sync_all()).map_err(io(data_dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_leaves_the_old_one_and_nothing_of_the_new_one() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), LogId([7; 16]), (1, "a"), b"old").unwrap();
        let new = directory.path().join("snapshot.new");
        std::os::unix::fs::symlink("/dev/full", &new).unwrap();
        let error = write(directory.path(), LogId([7; 16]), (1, "a"), b"new").unwrap_err();
        assert!(error.is_full(), "{error:?}");
        assert!(fs::symlink_metadata(&new).is_err());
        assert_eq!(read(directory.path()).unwrap().unwrap().state, b"old".as_slice());
        assert!(!SnapshotFileError::Damaged(new).is_full());
    }

    #[test]
    fn a_snapshot_comes_back_and_every_flipped_bit_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        assert!(read(directory.path()).unwrap().is_none());
        write(directory.path(), LogId([7; 16]), (1, "a"), b"one").unwrap();
        write(directory.path(), LogId([8; 16]), (2, "b = 1"), b"state").unwrap();
        let snapshot = read(directory.path()).unwrap().unwrap();
        assert_eq!((snapshot.journal, snapshot.state.as_ref()), (LogId([8; 16]), b"state".as_slice()));
        assert_eq!(snapshot.configuration, Some((2, "b = 1".to_owned())));
        let path = directory.path().join("snapshot");
        let bytes = fs::read(&path).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, &damaged).unwrap();
            assert!(read(directory.path()).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_snapshot_of_version_1_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let crc = crc32c::crc32c(&[[7; 16].as_slice(), b"state"].concat()).to_le_bytes();
        let bytes = [b"weirSNP\n\x01".as_slice(), &[7; 16], &crc, b"state"].concat();
        fs::write(directory.path().join("snapshot"), bytes).unwrap();
        let snapshot = read(directory.path()).unwrap().unwrap();
        assert_eq!((snapshot.configuration, snapshot.state.as_ref()), (None, b"state".as_slice()));
    }
}
