//! The writer: append, sync, mark, free.
//!
//! Records gather in one buffer and are written with one write per sync (or when 4 MiB have
//! gathered). A new segment is preallocated before the first record goes into it, so a full disk
//! is met there and nowhere else. A segment file is removed only when the one behind it is durable.
//! All durability of the crate passes through `sync_file` and `sync_directory`, below.

mod spare;

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use self::spare::{SPARE, Spare};
use crate::format::{self, MARKER, MARKER_BYTES, RECORD_HEADER, SEGMENT_HEADER, SegmentHeader};
use crate::layer::{Disk, FileLayer, LayerFile};
use crate::recover::{self, Damage, OpenError, Opening, Reason};
use crate::{LogId, Options, Position, ReadError, Reader};

/// Buffered records are written (not synced) when they reach this.
const WRITE_BYTES: usize = 4 << 20;
/// A write buffer that grew past this is given back after it was written.
const KEEP_BYTES: usize = 1 << 20;

/// Where a record went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    pub position: Position,
    /// Behind the record. A marker may lie there: the next record begins here or later.
    pub next: Position,
    /// The record is the first in its segment.
    pub new_segment: bool,
}

/// Work done since open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Syncs that had something to make durable.
    pub syncs: u64,
    /// Bytes written to segment files, headers and markers included.
    pub bytes_written: u64,
    /// Records appended, markers not counted.
    pub records_appended: u64,
}

#[derive(Debug, Error)]
pub enum AppendError {
    /// The cap is reached or the disk is full. A state: try again when something was freed.
    #[error("the log is full")]
    Full,
    #[error("a payload of {length} bytes is above the limit of {max}")]
    TooLarge { length: usize, max: usize },
    #[error("record kind 0 is reserved for markers")]
    ReservedKind,
    /// A new segment could not be made, for another reason than a full disk. Nothing was appended.
    #[error("create segment {path}")]
    Segment { path: PathBuf, source: io::Error },
    /// Buffered records could not be written. Final.
    #[error(transparent)]
    Failed(#[from] SyncError),
}

/// Final: what was not synced before may or may not be on disk, and only opening the log anew tells.
#[derive(Debug, Error)]
pub enum SyncError {
    #[error("sync the log in {directory}")]
    Io { directory: PathBuf, source: io::Error },
    #[error("the log has failed before; it must be opened anew")]
    Poisoned,
}

/// Final, like a failed sync.
#[derive(Debug, Error)]
#[error("free segments of the log in {directory}")]
pub struct FreeError {
    pub directory: PathBuf,
    pub source: io::Error,
}

/// The one place where a file is made durable.
pub(crate) fn sync_file<F: LayerFile>(file: &F) -> io::Result<()> {
    file.sync_data()
}

/// The one place where names are made durable.
pub(crate) fn sync_directory<L: FileLayer>(layer: &L, directory: &Path) -> io::Result<()> {
    layer.sync_dir(directory)
}

/// What writer and readers share. `start <= synced`.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) directory: PathBuf,
    pub(crate) id: LogId,
    synced: AtomicU64,
    start: AtomicU64,
    /// First positions of the segments, ascending.
    firsts: Mutex<VecDeque<u64>>,
}

impl Shared {
    pub(crate) fn synced(&self) -> u64 {
        self.synced.load(Ordering::Acquire)
    }

    pub(crate) fn start(&self) -> u64 {
        self.start.load(Ordering::Acquire)
    }

    /// The first position of the segment that holds `position`, and of the one behind it.
    pub(crate) fn segment_of(&self, position: u64) -> (Option<u64>, Option<u64>) {
        let firsts = self.firsts();
        let behind = firsts.partition_point(|first| *first <= position);
        (behind.checked_sub(1).map(|index| firsts[index]), firsts.get(behind).copied())
    }

    fn firsts(&self) -> MutexGuard<'_, VecDeque<u64>> {
        // The guarded value is whole between any two statements that hold the lock.
        self.firsts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub(crate) first: u64,
    pub(crate) file_bytes: u64,
    /// Its name and header have been synced.
    pub(crate) durable: bool,
}

/// The writing end of a log. See the crate's documentation. Dropping it syncs nothing.
#[derive(Debug)]
pub struct SegmentLog<L: FileLayer = Disk> {
    layer: L,
    /// The identity file; holding it open holds the log's lock.
    identity: L::File,
    shared: Arc<Shared>,
    seed: u32,
    options: Options,
    /// Oldest first; the last is the one appended to, open as `newest`.
    segments: VecDeque<Segment>,
    newest: L::File,
    /// Older segments with bytes that are not synced.
    unsynced: Vec<L::File>,
    /// Names have changed since the last directory sync.
    names_changed: bool,
    /// Records that are not written yet; the first lies at `buffer_at`.
    buffer: Vec<u8>,
    buffer_at: u64,
    /// synced <= buffer_at <= end
    end: u64,
    /// Behind the last record that is not a marker.
    content_end: u64,
    /// The highest `synced_to` that a synced record carries.
    proven: u64,
    failed: bool,
    spare: Spare,
    counters: Counters,
}

impl<L: FileLayer> SegmentLog<L> {
    /// Opens the log in `directory`, or makes it there. Reads all of it once. What is found
    /// wrong is in [`Opening`], for the owner to report.
    pub fn open(layer: L, directory: impl Into<PathBuf>, options: Options) -> Result<(Self, Opening), OpenError> {
        let directory = directory.into();
        if let Some(fault) = options.fault() {
            return Err(OpenError::Options(fault));
        }
        let found = recover::recover(&layer, &directory, &options)?;
        let start = found.segments[0].first;
        let shared = Shared {
            directory: directory.clone(),
            id: found.id,
            synced: AtomicU64::new(found.end),
            start: AtomicU64::new(start),
            firsts: Mutex::new(found.segments.iter().map(|segment| segment.first).collect()),
        };
        let mut log = Self {
            layer,
            identity: found.identity,
            shared: Arc::new(shared),
            seed: format::seed(found.id),
            options,
            segments: found.segments.into(),
            newest: found.newest,
            unsynced: Vec::new(),
            names_changed: false,
            buffer: Vec::new(),
            buffer_at: found.end,
            end: found.end,
            content_end: found.content_end,
            proven: found.content_end,
            failed: false,
            spare: Spare::Unwanted,
            counters: Counters::default(),
        };
        if found.must_prove {
            log.prove().map_err(|source| OpenError::Marker { directory, source })?;
        }
        recover::settle_identity(&log.identity, found.id)
            .map_err(|source| OpenError::io(&log.shared.directory, source))?;
        let opening =
            Opening { incidents: found.incidents, torn_tail: found.torn_tail, start: log.start(), end: log.end() };
        Ok((log, opening))
    }

    pub fn id(&self) -> LogId {
        self.shared.id
    }

    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The first position that is still there.
    pub fn start(&self) -> Position {
        Position(self.shared.start())
    }

    /// Behind the last record.
    pub fn end(&self) -> Position {
        Position(self.end)
    }

    /// Everything below is on disk.
    pub fn synced(&self) -> Position {
        Position(self.shared.synced())
    }

    /// The file that holds a position and the byte in it, for people: what to look at. None before the log's start.
    pub fn file_of(&self, position: Position) -> Option<(PathBuf, u64)> {
        let first = self.shared.segment_of(position.0).0?;
        let path = self.shared.directory.join(format::segment_name(first));
        Some((path, SEGMENT_HEADER + position.0 - first))
    }

    /// Where the segment begins that holds this position; None when it is freed.
    pub fn segment_of(&self, position: Position) -> Option<Position> {
        self.shared.segment_of(position.0).0.map(Position)
    }

    /// The first position of the newest segment: what an owner must know about "this segment"
    /// (which schemas are in it) changes when this does.
    pub fn newest_segment(&self) -> Position {
        Position(self.active().first)
    }

    /// Where the second segment begins, when there is one: what stands before can be freed.
    pub fn second_segment(&self) -> Option<Position> {
        self.segments.get(1).map(|segment| Position(segment.first))
    }

    /// Bytes of all segment files, preallocated space included.
    pub fn bytes_on_disk(&self) -> u64 {
        self.segments.iter().map(|segment| segment.file_bytes).sum()
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Appends a record. It is in memory until [`sync`](Self::sync).
    pub fn append(&mut self, kind: u8, payload: &[u8]) -> Result<Appended, AppendError> {
        self.append_record(kind, payload, false)
    }

    /// Like [`append`](Self::append), but when the log is full it may use the reserve.
    pub fn append_control(&mut self, kind: u8, payload: &[u8]) -> Result<Appended, AppendError> {
        self.append_record(kind, payload, true)
    }

    /// Whether an append of that length would open a new segment.
    pub fn starts_segment(&self, payload_length: usize) -> bool {
        let record = RECORD_HEADER as u64 + payload_length as u64;
        self.end + record + self.options.reserve_bytes > self.room_end()
    }

    /// Opens a new segment now, so that the next record is the first in it; does nothing if the
    /// newest segment is empty. For an owner whose segments must begin with records of its own:
    /// `if log.starts_segment(n) { log.start_segment()? }`, then what
    /// [`newest_segment`](Self::newest_segment) still lacks, then the record.
    pub fn start_segment(&mut self) -> Result<(), AppendError> {
        if self.failed {
            return Err(SyncError::Poisoned.into());
        }
        if self.end == self.active().first { Ok(()) } else { self.roll() }
    }

    /// Writes and makes durable all that was appended. Readers then see it.
    pub fn sync(&mut self) -> Result<Position, SyncError> {
        if self.failed {
            return Err(SyncError::Poisoned);
        }
        if self.end > self.shared.synced() || self.names_changed {
            self.make_durable().map_err(|source| self.fail(source))?;
        }
        Ok(Position(self.end))
    }

    /// Syncs, and writes a marker if no record on disk proves yet that the last ones were synced.
    /// For an idle or closing log; without new records it does nothing.
    pub fn mark(&mut self) -> Result<(), SyncError> {
        self.sync()?;
        if self.proven < self.content_end
            && self.end + MARKER_BYTES <= self.active().first + self.active().file_bytes - SEGMENT_HEADER
        {
            self.put(MARKER, &[]);
            self.sync()?;
        }
        Ok(())
    }

    /// Removes the segments that lie wholly below `position`, and at most what is synced; never
    /// the newest. Returns the bytes of the removed files, or of those that are kept as a spare.
    pub fn free_before(&mut self, position: Position) -> Result<u64, FreeError> {
        if self.failed {
            let source = io::Error::other(SyncError::Poisoned);
            return Err(FreeError { directory: self.shared.directory.clone(), source });
        }
        let mut freed = 0;
        while self.segments.len() > 1 {
            let behind = self.segments[1];
            // What lies behind must be durable before the link to it goes.
            if !behind.durable || behind.first > position.0 || behind.first > self.shared.synced() {
                break;
            }
            let oldest = self.segments[0];
            // Readers are told first: a missing file below `start` is "freed", not damage.
            self.shared.start.store(behind.first, Ordering::Release);
            let directory = &self.shared.directory;
            let path = directory.join(format::segment_name(oldest.first));
            // One by one: a power cut may keep any subset of removals, and a hole is an incident.
            let keep = self.spare == Spare::Wanted && oldest.file_bytes == self.options.segment_bytes;
            let gone = match keep {
                true => self.layer.rename(&path, &directory.join(SPARE)),
                false => self.layer.remove(&path),
            };
            let removed = match gone {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                Ok(()) if keep => {
                    self.spare = Spare::There;
                    Ok(())
                }
                other => other,
            };
            if let Err(source) = removed.and_then(|()| sync_directory(&self.layer, directory)) {
                let directory = directory.clone();
                self.failed = true;
                return Err(FreeError { directory, source });
            }
            self.shared.firsts().pop_front();
            self.segments.pop_front();
            freed += oldest.file_bytes;
        }
        Ok(freed)
    }

    /// A reader of what is synced, from `from` on: the position of a record, or any `next`.
    pub fn reader(&self, from: Position) -> Result<Reader<L>, ReadError> {
        Reader::new(self.layer.clone(), Arc::clone(&self.shared), from)
    }

    fn active(&self) -> &Segment {
        self.segments.back().expect("a log has at least one segment")
    }

    /// Where records of the newest segment must end: behind that is room for one marker.
    fn room_end(&self) -> u64 {
        let segment = self.active();
        segment.first + (segment.file_bytes - SEGMENT_HEADER).saturating_sub(MARKER_BYTES)
    }

    fn append_record(&mut self, kind: u8, payload: &[u8], control: bool) -> Result<Appended, AppendError> {
        if self.failed {
            return Err(SyncError::Poisoned.into());
        }
        if kind == MARKER {
            return Err(AppendError::ReservedKind);
        }
        let max = self.options.payload_bytes_max();
        if payload.len() > max {
            return Err(AppendError::TooLarge { length: payload.len(), max });
        }
        if self.starts_segment(payload.len()) {
            let record = (RECORD_HEADER + payload.len()) as u64;
            match self.roll() {
                Ok(()) => {}
                // The reserve is only for when there is no other room, or it would be gone by then.
                Err(AppendError::Full) if control && self.end + record <= self.room_end() => {}
                Err(error) => return Err(error),
            }
        }
        let position = self.end;
        self.put(kind, payload);
        self.content_end = self.end;
        self.counters.records_appended += 1;
        let appended = Appended {
            position: Position(position),
            next: Position(self.end),
            new_segment: position == self.active().first,
        };
        if self.buffer.len() >= WRITE_BYTES {
            self.write_buffer().map_err(|source| self.fail(source))?;
        }
        Ok(appended)
    }

    fn put(&mut self, kind: u8, payload: &[u8]) {
        let before = self.buffer.len();
        format::put_record(&mut self.buffer, self.seed, self.end, self.shared.synced(), kind, payload);
        self.end += (self.buffer.len() - before) as u64;
    }

    /// Goes on at `position`, when the log ends before it although its owner knows that all below was synced: the disk did
    /// not keep what it said it had. The positions between are never used again. Returns them: each reader, and each
    /// opening while the segment before them is there, meets them as damage. A log that ends later is left as it is.
    ///
    /// The new segment may lie above the cap, for without it nothing could be appended under a position of its own.
    pub fn skip_to(&mut self, position: Position) -> Result<Option<Damage>, AppendError> {
        if position.0 <= self.end {
            return Ok(None);
        }
        self.sync()?;
        let missing = Damage { from: Position(self.end), to: position, reason: Reason::Missing };
        (self.end, self.buffer_at) = (position.0, position.0);
        if let Err(error) = self.make_segment() {
            (self.end, self.buffer_at) = (missing.from.0, missing.from.0);
            return Err(error);
        }
        self.content_end = self.end;
        // Proven by the marker, without which the next opening would take the new segment for a torn tail.
        self.shared.synced.store(self.end, Ordering::Release);
        self.put(MARKER, &[]);
        self.sync()?;
        Ok(Some(missing))
    }

    /// Makes a new segment behind the last record.
    fn roll(&mut self) -> Result<(), AppendError> {
        if self.bytes_on_disk() + self.options.segment_bytes > self.options.max_bytes {
            return Err(AppendError::Full);
        }
        self.make_segment()
    }

    fn make_segment(&mut self) -> Result<(), AppendError> {
        self.write_buffer().map_err(|source| self.fail(source))?;
        let directory = &self.shared.directory;
        let path = directory.join(format::segment_name(self.end));
        // Whatever comes of it, the name must not outlive a removal that a power cut forgot.
        self.names_changed = true;
        let file = match create_segment(&self.layer, &path, self.shared.id, self.end, self.options.segment_bytes) {
            Ok(file) => file,
            Err(source) if is_full(&source) => return Err(AppendError::Full),
            Err(source) => return Err(AppendError::Segment { path, source }),
        };
        self.add_segment(file);
        Ok(())
    }

    fn add_segment(&mut self, file: L::File) {
        let file_bytes = self.options.segment_bytes;
        self.counters.bytes_written += SEGMENT_HEADER;
        self.unsynced.push(std::mem::replace(&mut self.newest, file));
        self.segments.push_back(Segment { first: self.end, file_bytes, durable: false });
        self.shared.firsts().push_back(self.end);
    }

    fn write_buffer(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let offset = SEGMENT_HEADER + (self.buffer_at - self.active().first);
        self.newest.write_all_at(&self.buffer, offset)?;
        self.counters.bytes_written += self.buffer.len() as u64;
        self.buffer_at = self.end;
        self.buffer.clear();
        self.buffer.shrink_to(KEEP_BYTES);
        Ok(())
    }

    fn make_durable(&mut self) -> io::Result<()> {
        let proof = self.shared.synced();
        let appended = self.end > proof;
        self.write_buffer()?;
        for file in self.unsynced.drain(..) {
            sync_file(&file)?;
        }
        sync_file(&self.newest)?;
        if self.names_changed {
            sync_directory(&self.layer, &self.shared.directory)?;
            self.names_changed = false;
        }
        for segment in self.segments.iter_mut().rev().take_while(|segment| !segment.durable) {
            segment.durable = true;
        }
        if appended {
            // The records just synced were all appended after the sync before.
            self.proven = proof;
        }
        self.counters.syncs += 1;
        self.shared.synced.store(self.end, Ordering::Release);
        Ok(())
    }

    /// Writes and syncs a marker at the end, which recovery has made durable.
    fn prove(&mut self) -> Result<(), AppendError> {
        let segment = *self.active();
        if self.end + MARKER_BYTES > segment.first + segment.file_bytes.saturating_sub(SEGMENT_HEADER) {
            self.roll()?;
        }
        self.put(MARKER, &[]);
        self.sync()?;
        Ok(())
    }

    fn fail(&mut self, source: io::Error) -> SyncError {
        self.failed = true;
        SyncError::Io { directory: self.shared.directory.clone(), source }
    }
}

pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Makes and preallocates a segment file with its header, none of it synced. Leaves no file behind
/// when it fails.
pub(crate) fn create_segment<L: FileLayer>(
    layer: &L,
    path: &Path,
    id: LogId,
    first: u64,
    file_bytes: u64,
) -> io::Result<L::File> {
    let file = layer.create(path)?;
    let made = file.allocate(file_bytes).and_then(|()| file.write_all_at(&SegmentHeader::encode(id, first), 0));
    match made {
        Ok(()) => Ok(file),
        Err(error) => {
            // The first error is the one that counts; a file left here is blank, and recovery drops it.
            let _ = layer.remove(path);
            Err(error)
        }
    }
}
