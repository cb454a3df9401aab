//! A reader: follows the synced end of a log on its own, in any thread.
//!
//! It opens its own file handles, checks every record itself, and reads nothing at or behind the
//! synced end. A damaged range is reported once, with the exact range that recovery would report,
//! and the next call goes on behind it. Memory: one scan buffer.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;

use crate::format::{self, MARKER};
use crate::layer::{Disk, FileLayer};
use crate::log::Shared;
use crate::scan::{Found, Scanner, Step};
use crate::{LogId, Position};

/// A record; its payload is borrowed from the reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    pub position: Position,
    /// Behind the record.
    pub next: Position,
    pub kind: u8,
    pub payload: &'a [u8],
}

#[derive(Debug, Error)]
pub enum ReadError {
    /// There is no readable record in `from..to`. Reported once.
    #[error("the log is damaged from {from} to {to}")]
    Damaged { from: Position, to: Position },
    /// The position lies in a segment that was freed.
    #[error("position {at} was freed; the log starts at {start}")]
    Freed { at: Position, start: Position },
    /// The position lies behind the synced end. What asks for it knows more than this log.
    #[error("position {at} is behind the log's end at {end}")]
    BeyondEnd { at: Position, end: Position },
    /// The disk did not answer. Asking again tries again.
    #[error("read {path}")]
    Io { path: PathBuf, source: io::Error },
}

/// Reads records in order. See the module's documentation.
#[derive(Debug)]
pub struct Reader<L: FileLayer = Disk> {
    layer: L,
    shared: Arc<Shared>,
    at: u64,
    /// The open segment, which holds `at` or ends there.
    scanner: Option<Scanner<L::File>>,
    /// The first position of the segment behind the open one, once there is one.
    behind: Option<u64>,
}

impl<L: FileLayer> Reader<L> {
    pub(crate) fn new(layer: L, shared: Arc<Shared>, from: Position) -> Result<Self, ReadError> {
        let end = Position(shared.synced());
        if from > end {
            return Err(ReadError::BeyondEnd { at: from, end });
        }
        let reader = Self { layer, shared, at: from.0, scanner: None, behind: None };
        reader.check_not_freed()?;
        Ok(reader)
    }

    /// Another reader of the same log, from `from` on: the position of a record, or any `next`.
    pub fn another(&self, from: Position) -> Result<Self, ReadError> {
        Self::new(self.layer.clone(), Arc::clone(&self.shared), from)
    }

    /// The log that is read.
    pub fn id(&self) -> LogId {
        self.shared.id
    }

    /// Where the next call goes on.
    pub fn position(&self) -> Position {
        Position(self.at)
    }

    /// The synced end as it is now.
    pub fn synced(&self) -> Position {
        Position(self.shared.synced())
    }

    /// The next record, or None at the synced end; ask again later.
    #[allow(clippy::should_implement_trait, reason = "a record borrows from the reader")]
    pub fn next(&mut self) -> Result<Option<Record<'_>>, ReadError> {
        let Some(found) = self.find()? else {
            return Ok(None);
        };
        let scanner = self.scanner.as_ref().expect("the scanner that found the record");
        Ok(Some(Record {
            position: Position(found.position),
            next: Position(found.next),
            kind: found.kind,
            payload: scanner.payload(&found),
        }))
    }

    fn find(&mut self) -> Result<Option<Found>, ReadError> {
        loop {
            self.check_not_freed()?;
            let synced = self.shared.synced();
            if self.at >= synced {
                return Ok(None);
            }
            let Some(scanner) = self.scanner_at(synced)? else {
                // The file is gone: all of it that should be there is damaged.
                let (_, behind) = self.shared.segment_of(self.at);
                let to = behind.map_or(synced, |first| first.min(synced));
                let from = std::mem::replace(&mut self.at, to);
                return Err(ReadError::Damaged { from: Position(from), to: Position(to) });
            };
            let first = scanner.first();
            let step = scanner.step().map_err(|source| self.io_error(first, source))?;
            match step {
                Step::Record(found) => {
                    self.at = found.next;
                    if found.kind != MARKER {
                        return Ok(Some(found));
                    }
                }
                Step::Bad { from, to } => {
                    self.at = to;
                    return Err(ReadError::Damaged { from: Position(from), to: Position(to) });
                }
                Step::End => {
                    // Only a segment behind the open one can hold `at`, which is below the end.
                    self.scanner = None;
                }
            }
        }
    }

    /// A scanner that stands at `self.at` and may go up to `synced`; None if there is no file.
    fn scanner_at(&mut self, synced: u64) -> Result<Option<&mut Scanner<L::File>>, ReadError> {
        if self.behind.is_none_or(|behind| self.at >= behind) || self.scanner.is_none() {
            let (first, behind) = self.shared.segment_of(self.at);
            self.behind = behind;
            let Some(first) = first else {
                // Freed between the check and here.
                self.check_not_freed()?;
                return Ok(None);
            };
            if self.scanner.as_ref().is_none_or(|scanner| scanner.first() != first) {
                let path = self.shared.directory.join(format::segment_name(first));
                let file = match self.layer.open(&path) {
                    Ok(file) => file,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        self.scanner = None;
                        self.check_not_freed()?;
                        return Ok(None);
                    }
                    Err(source) => return Err(ReadError::Io { path, source }),
                };
                let seed = format::seed(self.shared.id);
                self.scanner = Some(Scanner::new(file, seed, first, self.at, self.at));
            }
        }
        let limit = self.behind.map_or(synced, |behind| behind.min(synced));
        let scanner = self.scanner.as_mut().expect("opened above, or before");
        scanner.raise_limit(limit);
        Ok(Some(scanner))
    }

    fn check_not_freed(&self) -> Result<(), ReadError> {
        let start = self.shared.start();
        if self.at < start {
            return Err(ReadError::Freed { at: Position(self.at), start: Position(start) });
        }
        Ok(())
    }

    fn io_error(&self, first: u64, source: io::Error) -> ReadError {
        let path = self.shared.directory.join(format::segment_name(first));
        ReadError::Io { path, source }
    }
}
