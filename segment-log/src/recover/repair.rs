//! The writing half of recovery: removes, blanks, repairs, and writes again.
//!
//! Each step may be interrupted and done again at the next opening; what makes that safe is the
//! order in which `recover` calls them.

use std::io;
use std::path::Path;

use super::{Candidate, Damage, OpenError, Reason, is_blank, path_of};
use crate::format::{SEGMENT_HEADER, SegmentHeader, VERSION};
use crate::layer::{FileLayer, LayerFile};
use crate::log::{create_segment, is_full, sync_directory, sync_file};
use crate::{LogId, Options, Position};

/// Bytes copied or zeroed at once.
const CHUNK_BYTES: u64 = 64 << 10;

/// Removes segment files whose making was interrupted: no header, and nothing behind it. They must
/// not bound the segment before them, which may have gone on.
pub(super) fn drop_blank<L: FileLayer>(
    layer: &L,
    directory: &Path,
    candidates: &mut Vec<Candidate>,
) -> Result<(), OpenError> {
    let mut index = candidates.len();
    while index > 0 && candidates.len() > 1 {
        index -= 1;
        if candidates[index].header.is_none() && is_blank(layer, directory, &candidates[index])? {
            let path = path_of(directory, candidates.remove(index).first);
            layer.remove(&path).map_err(|source| OpenError::io(&path, source))?;
        }
    }
    Ok(())
}

/// Removes the segments that begin behind `end`.
pub(super) fn remove_behind<L: FileLayer>(
    layer: &L,
    directory: &Path,
    end: u64,
    candidates: &mut Vec<Candidate>,
) -> io::Result<()> {
    while let [.., last] = candidates[..]
        && (last.first > end || last.first == end && last.header.is_none() && candidates.len() > 1)
    {
        layer.remove(&path_of(directory, last.first))?;
        candidates.pop();
    }
    sync_directory(layer, directory)
}

pub(super) fn repair_headers<L: FileLayer>(
    layer: &L,
    directory: &Path,
    id: LogId,
    synced_to: u64,
    candidates: &mut [Candidate],
    incidents: &mut Vec<Damage>,
) -> io::Result<()> {
    for candidate in candidates.iter_mut().filter(|candidate| candidate.header.is_none()) {
        let file = layer.open(&path_of(directory, candidate.first))?;
        file.write_all_at(&SegmentHeader::encode(id, candidate.first), 0)?;
        sync_file(&file)?;
        candidate.size = file.size()?;
        // A header goes to disk with the first record behind it: above `synced_to` it may be torn.
        if candidate.first < synced_to {
            let at = Position(candidate.first);
            incidents.push(Damage { from: at, to: at, reason: Reason::Header });
        }
    }
    incidents.sort_by_key(|damage| damage.from);
    Ok(())
}

/// Zeroes what is not zero behind `end` in the last segment. With `everything`, also what seems to
/// be zero: an earlier try to zero it may have failed to reach the disk.
pub(super) fn blank_from<L: FileLayer>(
    layer: &L,
    directory: &Path,
    end: u64,
    everything: bool,
    candidates: &[Candidate],
) -> io::Result<()> {
    let Some(last) = candidates.last() else {
        return Ok(());
    };
    let file = layer.open(&path_of(directory, last.first))?;
    blank(&file, SEGMENT_HEADER + (end - last.first), everything)?;
    sync_file(&file)
}

/// Zeroes a file from `offset` on, not synced: what is not zero, or everything.
pub(crate) fn blank<F: LayerFile>(file: &F, mut offset: u64, everything: bool) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES as usize];
    let zeros = vec![0; CHUNK_BYTES as usize];
    loop {
        let count = file.read_at(&mut buffer, offset)?;
        if count == 0 {
            break;
        }
        if everything || buffer[..count] != zeros[..count] {
            file.write_all_at(&zeros[..count], offset)?;
        }
        offset += count as u64;
    }
    Ok(())
}

pub(super) fn new_segment<L: FileLayer>(
    layer: &L,
    directory: &Path,
    id: LogId,
    first: u64,
    options: &Options,
) -> io::Result<Candidate> {
    let size = options.segment_bytes;
    let file = create_segment(layer, &path_of(directory, first), id, first, size)?;
    sync_file(&file)?;
    let header = Some(SegmentHeader { version: VERSION, id, first });
    Ok(Candidate { first, size, header })
}

/// Writes again and syncs what is not known to be on disk: records from `from` on, and the headers
/// of segments that begin there or later.
pub(super) fn write_again<L: FileLayer>(
    layer: &L,
    directory: &Path,
    id: LogId,
    from: u64,
    end: u64,
    candidates: &[Candidate],
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES as usize];
    for (index, candidate) in candidates.iter().enumerate() {
        let first = candidate.first;
        let behind = candidates.get(index + 1).map_or(end, |next| next.first.min(end));
        if behind <= from && first < from {
            continue;
        }
        let file = layer.open(&path_of(directory, first))?;
        if first >= from {
            file.write_all_at(&SegmentHeader::encode(id, first), 0)?;
        }
        let mut at = first.max(from);
        while at < behind {
            let want = (behind - at).min(CHUNK_BYTES) as usize;
            let offset = SEGMENT_HEADER + (at - first);
            let count = file.read_at(&mut buffer[..want], offset)?;
            if count == 0 {
                break;
            }
            file.write_all_at(&buffer[..count], offset)?;
            at += count as u64;
        }
        sync_file(&file)?;
    }
    Ok(())
}

/// Opens the newest segment, and preallocates it if a crash came between its making and its sync.
pub(super) fn open_newest<L: FileLayer>(
    layer: &L,
    directory: &Path,
    candidates: &mut [Candidate],
    options: &Options,
) -> io::Result<L::File> {
    let last = candidates.last_mut().expect("a cut leaves at least one segment");
    let file = layer.open(&path_of(directory, last.first))?;
    if last.size < options.segment_bytes {
        match file.allocate(options.segment_bytes) {
            Ok(()) => {
                sync_file(&file)?;
                last.size = options.segment_bytes;
            }
            // It stays short, and the next record opens another when there is room.
            Err(error) if is_full(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(file)
}
