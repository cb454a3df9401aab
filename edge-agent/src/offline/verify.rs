//! `edge-agent spool verify`: all records of one log, read as a start reads them and not changed.
//!
//! Each range without a readable record is named by its positions in the log, its file, and the bytes in that file.
//! Memory: one read buffer, one record, and at most 4,096 ranges of each kind.

use bytes::Bytes;
use indicatif::ProgressBar;
use segment_log::{Damage, OpenError, Opening, ReadError, Reason, SegmentLog};

use super::Log;
use super::untouched::Untouched;
use crate::entry::Entry;

/// How often a log's bytes are read, for a bar's length.
pub(super) const PASSES: u64 = 2;
/// Entries of no known content that are named.
const UNKNOWN_MAX: usize = 4_096;

/// What reading a log found.
#[derive(Debug)]
pub(super) struct Finding {
    pub(super) log: Log,
    /// Why it does not even open.
    pub(super) broken: Option<String>,
    opening: Option<Opening>,
    /// The bad ranges, for people.
    ranges: Vec<String>,
    /// Good records whose content is not known: what another version wrote. They are no damage, but nobody reads them.
    unknown: Vec<String>,
    pub(super) records: u64,
    bytes: u64,
    /// Of all records, in order: equal when the same can be read.
    pub(super) crc: u32,
}

impl Finding {
    pub(super) fn is_damaged(&self) -> bool {
        self.broken.is_some() || !self.ranges.is_empty()
    }

    /// A line for the log, and one for each range.
    pub(super) fn describe(&self) -> Vec<String> {
        let name = &self.log.name;
        let mut lines = Vec::new();
        if let Some(broken) = &self.broken {
            lines.push(format!("{name}: {broken}"));
        }
        if let Some(Opening { start, end, .. }) = &self.opening {
            let health = if self.is_damaged() { "damaged" } else { "whole" };
            let (records, bytes) = (self.records, self.bytes);
            lines.push(format!("{name}: {health}; {records} records, {bytes} bytes, positions {start} to {end}"));
        }
        lines.extend(self.ranges.iter().chain(&self.unknown).map(|range| format!("{name}: {range}")));
        lines
    }
}

/// Reads all of a log and writes nothing.
///
/// # Errors
/// When it is open elsewhere, or the disk does not answer. A log that does not open is a finding.
pub(super) fn verify(log: Log, bar: &ProgressBar) -> Result<Finding, OpenError> {
    let opened = SegmentLog::open(Untouched(bar.clone()), log.path.clone(), log.options);
    let mut finding = Finding {
        log,
        broken: None,
        opening: None,
        ranges: Vec::new(),
        unknown: Vec::new(),
        records: 0,
        bytes: 0,
        crc: 0,
    };
    let (opened, opening) = match opened {
        Ok(opened) => opened,
        Err(error @ (OpenError::Locked(_) | OpenError::Io { .. })) => return Err(error),
        Err(error) => return Ok(Finding { broken: Some(error.to_string()), ..finding }),
    };
    finding.ranges.extend(opening.incidents.iter().map(|damage| named(&opened, *damage)));
    let torn = opening
        .torn_tail
        .map(|damage| format!("torn tail, which nobody was told is safe: {}; a start cuts it", named(&opened, damage)));
    finding.ranges.extend(torn);
    finding.read(&opened, &opening).map_err(|error| match error {
        ReadError::Io { path, source } => OpenError::Io { path, source },
        error => OpenError::Io { path: finding.log.path.clone(), source: std::io::Error::other(error) },
    })?;
    finding.opening = Some(opening);
    Ok(finding)
}

impl Finding {
    fn read(&mut self, log: &SegmentLog<Untouched>, opening: &Opening) -> Result<(), ReadError> {
        let mut reader = log.reader(opening.start)?;
        while reader.position() < opening.end {
            match reader.next() {
                Ok(Some(record)) => {
                    self.records += 1;
                    self.bytes += record.next.0 - record.position.0;
                    self.crc = crc32c::crc32c_append(self.crc, &record.position.0.to_le_bytes());
                    self.crc = crc32c::crc32c_append(self.crc, record.payload);
                    if self.log.is_journal
                        && self.unknown.len() < UNKNOWN_MAX
                        && let Err(error) = Entry::read(Bytes::copy_from_slice(record.payload))
                    {
                        let (from, to) = (record.position, record.next);
                        self.unknown.push(format!("positions {from} to {to}: {error}"));
                    }
                }
                Ok(None) => break,
                // Named by the opening already.
                Err(ReadError::Damaged { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// A bad range: what it is, its positions, its file and the bytes there.
fn named(log: &SegmentLog<Untouched>, damage: Damage) -> String {
    let Damage { from, to, reason } = damage;
    let file = log.file_of(from).map(|(path, at)| (path.display().to_string(), at));
    match (reason, file) {
        (Reason::Identity, _) => format!("{damage}; log.id"),
        (Reason::Header, Some((path, _))) => format!("{damage}; {path}, bytes 0 to 48"),
        (_, Some((path, at))) => format!("{damage}; {path}, bytes {at} to {}", at + (to.0 - from.0)),
        (_, None) => damage.to_string(),
    }
}
