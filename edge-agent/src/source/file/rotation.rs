//! Which files are to be read, and from where: the place in the journal found again among a file and those that it was
//! rotated to.
//!
//! A rotated file has the name of the file and behind it a `.` or `-` and nothing but digits and the signs of a date:
//! `counts.csv.1`, `counts.csv-20261121`. Packed ones are not read. Those that were written later than the one that the
//! place stands in follow it, in the order of their times; of one time, which some disks tell apart by seconds only, by their
//! names: `.2` before `.1`, and a date before a later one.

use std::cmp::Reverse;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::config::FileSettings;
use crate::entry::{FileId, Place};

/// `.99999`; what has more digits is a date.
const NUMBER_MAX_LEN: usize = 6;

/// A file and from where it is read.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) file: File,
    pub(super) from: u64,
}

/// What is to be read, in order; the last has the configured name.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) parts: Vec<Part>,
    /// The file that the place stands in was not found: what came behind it is lost if it was not read.
    pub(super) gone: bool,
}

/// Which file on this machine.
pub(super) fn id_of(file: &File) -> io::Result<FileId> {
    let metadata = file.metadata()?;
    Ok(FileId { device: metadata.dev(), inode: metadata.ino() })
}

/// Whether the line before the place stands in this file where it stood.
pub(super) fn holds(file: &File, place: &Place) -> bool {
    let Some(start) = place.offset.checked_sub(place.line_bytes) else { return false };
    let mut line = vec![0; usize::from(place.check_bytes)];
    let long_enough = file.metadata().is_ok_and(|metadata| metadata.len() >= place.offset);
    long_enough && file.read_exact_at(&mut line, start).is_ok() && crc32c::crc32c(&line) == place.check_crc
}

/// Whether another file has the name now. While none has, the old one may still grow.
pub(super) fn was_rotated(path: &Path, file: &File) -> io::Result<bool> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(FileId { device: metadata.dev(), inode: metadata.ino() } != id_of(file)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// What is to be read from the place on.
pub(super) fn find(settings: &FileSettings, place: Option<&Place>) -> io::Result<Found> {
    let present = File::open(&settings.path);
    let whole = |file| vec![Part { file, from: 0 }];
    let Some(place) = place else { return Ok(Found { parts: whole(present?), gone: false }) };
    let is_it = |file: &File| id_of(file).is_ok_and(|id| id == place.file);
    if let Ok(file) = &present
        && is_it(file)
    {
        // The same file, but cut off: it begins anew.
        let from = if holds(file, place) { place.offset } else { 0 };
        return Ok(Found { parts: vec![Part { file: present?, from }], gone: false });
    }
    if settings.follow {
        let mut rotated = rotated(&settings.path)?.into_iter();
        let found = rotated.by_ref().find_map(|path| {
            let file = File::open(path).ok()?;
            (is_it(&file) && holds(&file, place)).then_some(file)
        });
        if let Some(file) = found {
            let mut parts = vec![Part { file, from: place.offset }];
            for path in rotated {
                parts.push(Part { file: File::open(path)?, from: 0 });
            }
            // Until there is a new one, the old one is the last.
            match present {
                Ok(file) => parts.push(Part { file, from: 0 }),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            return Ok(Found { parts, gone: false });
        }
    }
    let present = present?;
    // A copy of what was read: an editor has written it anew, or it was moved to another disk.
    if holds(&present, place) {
        return Ok(Found { parts: vec![Part { file: present, from: place.offset }], gone: false });
    }
    Ok(Found { parts: whole(present), gone: settings.follow })
}

/// The files that this one was rotated to, the oldest first.
fn rotated(path: &Path) -> io::Result<Vec<PathBuf>> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let other = entry.file_name();
        let suffix = other.to_str().and_then(|other| other.strip_prefix(name)).unwrap_or_default();
        let of_a_date = |sign: char| sign.is_ascii_digit() || matches!(sign, '-' | '_' | '.' | ':' | 'T' | 'Z');
        if suffix.starts_with(['.', '-'])
            && suffix[1..].starts_with(|first: char| first.is_ascii_digit())
            && suffix.chars().all(of_a_date)
        {
            // A number counts backwards, and a date forwards.
            let number = suffix[1..].parse::<u32>().ok().filter(|_| suffix.len() <= NUMBER_MAX_LEN);
            files.push((entry.metadata()?.modified()?, Reverse(number), entry.path()));
        }
    }
    files.sort();
    Ok(files.into_iter().map(|(_, _, path)| path).collect())
}
