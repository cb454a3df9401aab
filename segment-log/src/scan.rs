//! Walks the records of one segment, and finds the next good one behind bad bytes.
//!
//! A record counts only if its stored position is where it lies, it ends within the scanned range,
//! and its checksum (seeded with the log's id) is right. Memory: one read buffer, or the largest
//! record of the segment. Used by recovery and by readers, so both see the same truth.

use std::io;

use crate::format::{self, RECORD_HEADER, RecordHeader, SEGMENT_HEADER};
use crate::layer::LayerFile;

/// Bytes read at once.
const READ_BYTES: u64 = 128 << 10;
/// A buffer that grew past this for a large record is given back at the next read.
const KEEP_BYTES: usize = 1 << 20;
/// Blank space is skipped in steps of this.
const BLANK_BYTES: usize = 4096;
static BLANK: [u8; BLANK_BYTES] = [0; BLANK_BYTES];

/// A good record; its payload is in the scanner's buffer until the next step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub(crate) position: u64,
    pub(crate) next: u64,
    pub(crate) synced_to: u64,
    pub(crate) kind: u8,
}

#[derive(Debug)]
pub(crate) enum Step {
    Record(Found),
    /// No good record in `from..to`, and one begins at `to` or `to` is the end of the range.
    Bad {
        from: u64,
        to: u64,
    },
    End,
}

#[derive(Debug)]
pub(crate) struct Scanner<F> {
    file: F,
    seed: u32,
    first: u64,
    at: u64,
    limit: u64,
    buffer: Vec<u8>,
    buffer_at: u64,
}

impl<F: LayerFile> Scanner<F> {
    /// Scans `at..limit` of the segment whose first position is `first`. Bytes at or behind
    /// `limit` are never looked at.
    pub(crate) fn new(file: F, seed: u32, first: u64, at: u64, limit: u64) -> Self {
        Self { file, seed, first, at, limit, buffer: Vec::new(), buffer_at: at }
    }

    pub(crate) fn first(&self) -> u64 {
        self.first
    }

    pub(crate) fn raise_limit(&mut self, limit: u64) {
        self.limit = self.limit.max(limit);
    }

    /// After a `Bad` step the scanner stands at its `to`.
    pub(crate) fn step(&mut self) -> io::Result<Step> {
        if self.at >= self.limit {
            return Ok(Step::End);
        }
        let from = self.at;
        if let Some(found) = self.record_at(from)? {
            self.at = found.next;
            return Ok(Step::Record(found));
        }
        self.at = self.seek(from + 1)?;
        Ok(Step::Bad { from, to: self.at })
    }

    /// The payload of the record found by the last step.
    pub(crate) fn payload(&self, found: &Found) -> &[u8] {
        let start = (found.position - self.buffer_at) as usize;
        let end = (found.next - self.buffer_at) as usize;
        &self.buffer[start + RECORD_HEADER..end]
    }

    /// The position behind the last byte of `from..limit` that is not zero, or `from`.
    pub(crate) fn content_end(&mut self, from: u64) -> io::Result<u64> {
        let mut end = from;
        let mut at = from;
        while at < self.limit {
            let window = self.fill(at, 1)?;
            if window.is_empty() {
                break;
            }
            for (index, block) in window.chunks(BLANK_BYTES).enumerate() {
                if block != &BLANK[..block.len()]
                    && let Some(last) = block.iter().rposition(|byte| *byte != 0)
                {
                    end = at + (index * BLANK_BYTES + last + 1) as u64;
                }
            }
            at += window.len() as u64;
        }
        Ok(end)
    }

    /// The next good record at or behind `at`, or the limit.
    fn seek(&mut self, mut at: u64) -> io::Result<u64> {
        while at < self.limit {
            let window = self.fill(at, RECORD_HEADER)?;
            if window.len() < RECORD_HEADER {
                break;
            }
            if window.len() >= BLANK_BYTES && window[..BLANK_BYTES] == BLANK {
                // A header is never all zeros, so none begins here before its last bytes could lie outside.
                at += (BLANK_BYTES - RECORD_HEADER + 1) as u64;
                continue;
            }
            let tries = (window.len() - RECORD_HEADER + 1).min(BLANK_BYTES);
            let hit = (0..tries).find(|i| format::u64_at(window, i + 8) == at + *i as u64);
            match hit {
                Some(index) => {
                    at += index as u64;
                    if self.record_at(at)?.is_some() {
                        return Ok(at);
                    }
                    at += 1;
                }
                None => at += tries as u64,
            }
        }
        Ok(self.limit)
    }

    fn record_at(&mut self, at: u64) -> io::Result<Option<Found>> {
        let (seed, limit) = (self.seed, self.limit);
        let window = self.fill(at, RECORD_HEADER)?;
        if window.len() < RECORD_HEADER {
            return Ok(None);
        }
        let header = RecordHeader::decode(window);
        let length = header.record_bytes();
        if header.position != at || length > limit - at || header.synced_to > at {
            return Ok(None);
        }
        if window[..RECORD_HEADER] == BLANK[..RECORD_HEADER] {
            return Ok(None);
        }
        let window = self.fill(at, length as usize)?;
        if (window.len() as u64) < length || !format::record_checks(seed, &window[..length as usize]) {
            return Ok(None);
        }
        Ok(Some(Found { position: at, next: at + length, synced_to: header.synced_to, kind: header.kind }))
    }

    /// The bytes from `at` on that are in memory, at least `need` of them unless the range or the
    /// file ends before.
    fn fill(&mut self, at: u64, need: usize) -> io::Result<&[u8]> {
        let need = (need as u64).min(self.limit - at);
        let buffer_end = self.buffer_at + self.buffer.len() as u64;
        if at < self.buffer_at || at + need > buffer_end {
            let want = need.max(READ_BYTES).min(self.limit - at) as usize;
            if at >= self.buffer_at && at < buffer_end {
                self.buffer.drain(..(at - self.buffer_at) as usize);
            } else {
                self.buffer.clear();
            }
            self.buffer_at = at;
            if self.buffer.capacity() > KEEP_BYTES && want <= READ_BYTES as usize {
                self.buffer.shrink_to(READ_BYTES as usize);
            }
            let mut have = self.buffer.len();
            self.buffer.resize(want.max(have), 0);
            while have < want {
                let offset = SEGMENT_HEADER + (at - self.first) + have as u64;
                let count = match self.file.read_at(&mut self.buffer[have..want], offset) {
                    Ok(count) => count,
                    Err(error) => {
                        self.buffer.truncate(have);
                        return Err(error);
                    }
                };
                if count == 0 {
                    break;
                }
                have += count;
            }
            self.buffer.truncate(have);
        }
        Ok(&self.buffer[(at - self.buffer_at) as usize..])
    }
}
