//! Opening a log: finds what is good, reports what is damaged, cuts the torn tail.
//!
//! One pass over all segments finds the good records, the ranges without any, and the highest
//! `synced_to`. Below that a bad range is an incident; the first one above it is where the tail was
//! torn, and all from there on is cut. A cut may be interrupted at any point and repeated: a note
//! in the identity file says where to cut until the zeroed space and a marker at the new end are
//! durable. What lies above `synced_to` but is good is written again before it is synced, because
//! after a failed fdatasync the page cache may hold what the disk does not.
//! Memory is bounded: one scan buffer, and 4,096 incidents, of which the last then covers the rest.

mod repair;
mod survey;

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::format::identity::{self, CutNote};
use crate::format::{self, SEGMENT_HEADER, SegmentHeader, VERSION};
use crate::layer::{FileLayer, LayerFile};
use crate::log::{AppendError, Segment, create_segment, sync_directory, sync_file};
use crate::scan::Scanner;
use crate::{LogId, Options, Position};

pub(crate) use repair::blank;
use repair::{blank_from, drop_blank, new_segment, open_newest, remove_behind, repair_headers, write_again};
use survey::{Verdict, judge, survey};

/// A lock that is taken may be free in a moment: the process that had it is ending, or a child of ours that has not become
/// another program yet holds what was open here.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);
const LOCK_AGAIN: Duration = Duration::from_millis(5);

/// A range of the log that holds no readable record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damage {
    pub from: Position,
    /// Exclusive. Equal to `from` where no record is affected ([`Reason::Header`],
    /// [`Reason::Identity`]).
    pub to: Position,
    pub reason: Reason,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Bytes that are no record.
    Record,
    /// Bytes that should be in a file that is not there, or is too short.
    Missing,
    /// The header of the segment that begins here; it was written anew.
    Header,
    /// The identity file; it was written anew, from a segment's header.
    Identity,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.reason {
            Reason::Record => "no readable record",
            Reason::Missing => "missing bytes",
            Reason::Header => "damaged segment header",
            Reason::Identity => "damaged identity file",
        };
        write!(f, "{what} from {} to {}", self.from, self.to)
    }
}

/// What opening a log found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opening {
    /// Damage below what had been synced, in order. Readers meet it again. Past 4,096 ranges the
    /// last one covers all that follow.
    pub incidents: Vec<Damage>,
    /// What was cut behind the last record.
    pub torn_tail: Option<Damage>,
    pub start: Position,
    pub end: Position,
}

#[derive(Debug, Error)]
pub enum OpenError {
    #[error("options of the log: {0}")]
    Options(&'static str),
    #[error("the log in {0} is open already, here or in another process")]
    Locked(PathBuf),
    #[error("{path} has format version {version}; this program knows 1")]
    Version { path: PathBuf, version: u8 },
    /// Neither the identity file nor any segment header can be read, but there is data.
    #[error("{0} holds segments, but nothing there says which log they belong to")]
    Unidentified(PathBuf),
    #[error("{path} belongs to another log than its neighbours")]
    Mixed { path: PathBuf },
    /// Positions would start anew under the same id. Who wants that removes `log.id`.
    #[error("{0} is the directory of a log, but all its segments are gone")]
    NoSegments(PathBuf),
    #[error("write a marker to the log in {directory}")]
    Marker { directory: PathBuf, source: AppendError },
    #[error("open the log at {path}")]
    Io { path: PathBuf, source: io::Error },
}

impl OpenError {
    pub(crate) fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), source }
    }
}

/// A log as recovery leaves it: all up to `end` is on disk, all behind is blank.
#[derive(Debug)]
pub(crate) struct Recovered<F> {
    pub(crate) id: LogId,
    /// The locked identity file.
    pub(crate) identity: F,
    /// Never empty.
    pub(crate) segments: Vec<Segment>,
    pub(crate) newest: F,
    pub(crate) end: u64,
    /// Behind the last record that is not a marker.
    pub(crate) content_end: u64,
    /// No record that is kept proves that all was synced.
    pub(crate) must_prove: bool,
    pub(crate) incidents: Vec<Damage>,
    pub(crate) torn_tail: Option<Damage>,
}

/// A segment file as it was found.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    first: u64,
    size: u64,
    header: Option<SegmentHeader>,
}

impl Candidate {
    fn file_end(&self) -> u64 {
        self.first.saturating_add(self.size.saturating_sub(SEGMENT_HEADER))
    }
}

pub(crate) fn recover<L: FileLayer>(
    layer: &L,
    directory: &Path,
    options: &Options,
) -> Result<Recovered<L::File>, OpenError> {
    let io = |source| OpenError::io(directory, source);
    make_directory(layer, directory).map_err(io)?;
    let identity = lock_identity(layer, directory)?;
    let found = read_up_to(&identity, identity::BYTES as usize).map_err(io)?;
    let mut candidates = list_segments(layer, directory)?;
    let (id, identity_lost) = match (identify(layer, directory, &found, &candidates)?, &candidates[..]) {
        (Identified::NotYet, _) => {
            for candidate in &candidates {
                layer.remove(&path_of(directory, candidate.first)).map_err(io)?;
            }
            return birth(layer, directory, identity, options).map_err(io);
        }
        (Identified::ByFile(_), []) => return Err(OpenError::NoSegments(directory.to_path_buf())),
        (Identified::ByFile(id), _) => (id, false),
        (Identified::BySegment(id), _) => (id, true),
    };
    let seed = format::seed(id);
    // A segment of another log counts as one whose header is damaged: no record in it will check.
    for candidate in &mut candidates {
        candidate.header = candidate.header.filter(|h| h.id == id && h.first == candidate.first);
    }
    drop_blank(layer, directory, &mut candidates)?;

    let note = found.get(identity::NOTE_AT as usize..).and_then(|bytes| identity::decode_note(seed, bytes));
    let mut survey = survey(layer, directory, seed, &candidates)?;
    let verdict = judge(&mut survey, note);
    let Verdict { end, mut incidents, torn_tail } = verdict;
    let start = candidates[0].first;
    if identity_lost && end > start.min(1) {
        let at = Position(start);
        incidents.insert(0, Damage { from: at, to: at, reason: Reason::Identity });
    }

    let last_end = candidates.last().map_or(end, Candidate::file_end);
    let cut = note.is_some()
        || torn_tail.is_some()
        || end > last_end
        || candidates.last().is_some_and(|last| last.first > end);
    if cut {
        let cut_here = CutNote { at: Position(end), synced_to: Position(survey.synced_to.min(end)) };
        identity
            .write_all_at(&identity::encode_note(seed, cut_here), identity::NOTE_AT)
            .and_then(|()| sync_file(&identity))
            .and_then(|()| remove_behind(layer, directory, end, &mut candidates))
            .map_err(io)?;
    }
    repair_headers(layer, directory, id, survey.synced_to, &mut candidates, &mut incidents).map_err(io)?;
    if cut {
        blank_from(layer, directory, end, note.is_some(), &candidates).map_err(io)?;
        if candidates.last().is_none_or(|last| end > last.file_end()) {
            candidates.push(new_segment(layer, directory, id, end, options).map_err(io)?);
        }
    }
    write_again(layer, directory, id, survey.synced_to, end, &candidates).map_err(io)?;
    if identity_lost {
        // Perhaps a birth that was interrupted: as there, the segments come first.
        sync_directory(layer, directory).and_then(|()| sync_ancestors(layer, directory)).map_err(io)?;
        write_identity(layer, directory, &identity, id).map_err(io)?;
    }
    let newest = open_newest(layer, directory, &mut candidates, options).map_err(io)?;
    sync_directory(layer, directory).map_err(io)?;

    let segments =
        candidates.iter().map(|found| Segment { first: found.first, file_bytes: found.size, durable: true }).collect();
    let empty = end == start;
    Ok(Recovered {
        id,
        identity,
        segments,
        newest,
        end,
        content_end: if cut { end } else { survey.content_end },
        must_prove: end > 0 && (cut || !(survey.sealed || empty)),
        incidents,
        torn_tail,
    })
}

/// Writes the identity file as it should be between openings, whatever it seems to hold: after a
/// failed sync, the disk may still have an old note that the page cache does not show.
pub(crate) fn settle_identity<F: LayerFile>(identity: &F, id: LogId) -> io::Result<()> {
    identity.write_all_at(&identity::encode_id(id), 0)?;
    identity.write_all_at(&[0; identity::NOTE_BYTES], identity::NOTE_AT)?;
    sync_file(identity)
}

fn path_of(directory: &Path, first: u64) -> PathBuf {
    directory.join(format::segment_name(first))
}

/// Makes the directory and its missing ancestors; birth makes them durable.
fn make_directory<L: FileLayer>(layer: &L, directory: &Path) -> io::Result<()> {
    if directory.as_os_str().is_empty() || layer.exists(directory)? {
        return Ok(());
    }
    if let Some(parent) = directory.parent() {
        make_directory(layer, parent)?;
    }
    match layer.create_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Syncs the names of the directory and of all above it. An earlier birth that was interrupted may
/// have made any of them.
fn sync_ancestors<L: FileLayer>(layer: &L, directory: &Path) -> io::Result<()> {
    for ancestor in directory.ancestors().skip(1) {
        let ancestor = if ancestor.as_os_str().is_empty() { Path::new(".") } else { ancestor };
        match sync_directory(layer, ancestor) {
            // What we may not even read, we have not made anything in.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => break,
            other => other?,
        }
    }
    Ok(())
}

fn lock_identity<L: FileLayer>(layer: &L, directory: &Path) -> Result<L::File, OpenError> {
    let path = directory.join(identity::NAME);
    let file = match layer.create(&path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => layer.open(&path),
        other => other,
    }
    .map_err(|source| OpenError::io(&path, source))?;
    let began = Instant::now();
    loop {
        match file.try_lock() {
            Ok(true) => return Ok(file),
            Ok(false) if began.elapsed() < LOCK_PATIENCE => std::thread::sleep(LOCK_AGAIN),
            Ok(false) => return Err(OpenError::Locked(directory.to_path_buf())),
            Err(source) => return Err(OpenError::io(&path, source)),
        }
    }
}

fn read_up_to<F: LayerFile>(file: &F, bytes: usize) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; bytes];
    let mut have = 0;
    while have < bytes {
        match file.read_at(&mut buffer[have..], have as u64)? {
            0 => break,
            count => have += count,
        }
    }
    buffer.truncate(have);
    Ok(buffer)
}

fn list_segments<L: FileLayer>(layer: &L, directory: &Path) -> Result<Vec<Candidate>, OpenError> {
    let names = layer.list(directory).map_err(|source| OpenError::io(directory, source))?;
    let mut firsts: Vec<u64> = names.iter().filter_map(|name| format::segment_first(name)).collect();
    firsts.sort_unstable();
    let mut candidates = Vec::with_capacity(firsts.len());
    for first in firsts {
        let path = path_of(directory, first);
        let read = || {
            let file = layer.open(&path)?;
            Ok((file.size()?, read_up_to(&file, SEGMENT_HEADER as usize)?))
        };
        let (size, bytes) = read().map_err(|source| OpenError::io(&path, source))?;
        let header = SegmentHeader::decode(&bytes);
        if let Some(SegmentHeader { version, .. }) = header
            && version != VERSION
        {
            return Err(OpenError::Version { path, version });
        }
        candidates.push(Candidate { first, size, header });
    }
    Ok(candidates)
}

enum Identified {
    ByFile(LogId),
    /// The identity file is damaged, lost or not written yet.
    BySegment(LogId),
    /// The log's birth was interrupted before anything could be appended, or never began.
    NotYet,
}

fn identify<L: FileLayer>(
    layer: &L,
    directory: &Path,
    found: &[u8],
    candidates: &[Candidate],
) -> Result<Identified, OpenError> {
    if let Some((version, id)) = identity::decode_id(found) {
        if version != VERSION {
            return Err(OpenError::Version { path: directory.join(identity::NAME), version });
        }
        return Ok(Identified::ByFile(id));
    }
    let mut known = candidates.iter().filter_map(|found| Some((found.first, found.header?.id)));
    if let Some((_, id)) = known.next() {
        return match known.find(|(_, other)| *other != id) {
            Some((first, _)) => Err(OpenError::Mixed { path: path_of(directory, first) }),
            None => Ok(Identified::BySegment(id)),
        };
    }
    match candidates {
        [] => Ok(Identified::NotYet),
        [only] if only.first == 0 && is_blank(layer, directory, only)? => Ok(Identified::NotYet),
        _ => Err(OpenError::Unidentified(directory.to_path_buf())),
    }
}

/// Whether nothing lies behind the segment's header.
fn is_blank<L: FileLayer>(layer: &L, directory: &Path, candidate: &Candidate) -> Result<bool, OpenError> {
    let path = path_of(directory, candidate.first);
    let content_end = layer.open(&path).and_then(|file| {
        Scanner::new(file, 0, candidate.first, candidate.first, candidate.file_end()).content_end(candidate.first)
    });
    Ok(content_end.map_err(|source| OpenError::io(&path, source))? == candidate.first)
}

fn birth<L: FileLayer>(
    layer: &L,
    directory: &Path,
    identity: L::File,
    options: &Options,
) -> io::Result<Recovered<L::File>> {
    let mut id = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut id)?;
    let id = LogId(id);
    // The segment first: an identity without a segment means that data was lost.
    let newest = create_segment(layer, &path_of(directory, 0), id, 0, options.segment_bytes)?;
    sync_file(&newest)?;
    sync_directory(layer, directory)?;
    sync_ancestors(layer, directory)?;
    write_identity(layer, directory, &identity, id)?;
    Ok(Recovered {
        id,
        identity,
        segments: vec![Segment { first: 0, file_bytes: options.segment_bytes, durable: true }],
        newest,
        end: 0,
        content_end: 0,
        must_prove: false,
        incidents: Vec::new(),
        torn_tail: None,
    })
}

fn write_identity<L: FileLayer>(layer: &L, directory: &Path, identity: &L::File, id: LogId) -> io::Result<()> {
    identity.allocate(identity::BYTES)?;
    identity.write_all_at(&identity::encode_id(id), 0)?;
    sync_file(identity)?;
    sync_directory(layer, directory)
}
