//! The sizes of a log, all in bytes, and what must hold between them.

use crate::format::{MARKER_BYTES, RECORD_HEADER, SEGMENT_HEADER};

/// The sizes of a log. They may differ from one open to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The size of a segment file. Freeing works by whole segments.
    pub segment_bytes: u64,
    /// The most that all segment files together may take; at least two segments.
    pub max_bytes: u64,
    /// Room kept free for [`SegmentLog::append_control`](crate::SegmentLog::append_control) when
    /// the log or the disk is full. It lies at the end of the newest segment, so it is really
    /// there: the cap and a full disk cannot take it.
    pub reserve_bytes: u64,
}

impl Options {
    /// The largest payload of a record.
    pub fn payload_bytes_max(&self) -> usize {
        let overhead = SEGMENT_HEADER + RECORD_HEADER as u64 + MARKER_BYTES + self.reserve_bytes;
        let room = self.segment_bytes.saturating_sub(overhead);
        room.min(u64::from(u32::MAX)) as usize
    }

    /// What is wrong with them, if anything.
    pub(crate) fn fault(&self) -> Option<&'static str> {
        if self.payload_bytes_max() == 0 {
            Some("segment_bytes leaves no room for a record beside reserve_bytes")
        } else if self.max_bytes < self.segment_bytes.saturating_mul(2) {
            Some("max_bytes must be at least two times segment_bytes")
        } else {
            None
        }
    }
}
