//! An append-only, checksummed, crash-safe log on disk. The edge's journal, the edge's spool and
//! the cloud's WAL stand on it.
//!
//! # Promises
//! - What lay below [`SegmentLog::synced`] is there after a power cut, in order and equal.
//! - Nothing is ever read that was not appended, and a position names one record for ever. A
//!   record that was appended but not synced may survive a crash; then all before it did as well.
//! - A bad record above the highest `synced_to` found anywhere is a torn tail and is cut. Below
//!   it, it is an incident: its exact range is reported at open and again to each reader, and all
//!   other records stay readable.
//! - A full disk, like the cap, is [`AppendError::Full`]: a state, in which the log goes on when
//!   space comes back. A failed write or fdatasync is final: the log never retries it.
//! - Memory: the records appended since the last write (at most 4 MiB and one record), and for
//!   each scan or reader one buffer of 128 KiB or the largest record.
//!
//! # What it does not do
//! One log has one writer (held by a file lock). It has no threads and no clock: who appends
//! decides when to sync, and after an idle while and at closing calls [`SegmentLog::mark`].
//! It does not know what records mean.
//!
//! # Layout, format version 1
//! A log is a directory: `log.id`, and segments named by their first position in 20 digits, as
//! `00000000000000065488.seg`. Positions count record bytes since the log's birth, without holes:
//! position `p` lies at byte `48 + p - first` of its segment, and a segment ends where the next one
//! begins. Segments are preallocated; behind the last record they are zero. All integers are
//! little-endian, all checksums CRC32C.
//! ```text
//! segment header, 48 bytes            record, 25 bytes and the payload
//!  0  "weirSEG\n"                      0  u32  checksum of all that follows,
//!  8  u8   format version, 1                   started from crc32c(log id)
//!  9  zero                             4  u32  payload length in bytes
//! 16  log id                           8  u64  position of this record
//! 32  u64  first position             16  u64  synced_to: all below was synced
//! 40  zero                            24  u8   kind: 1-255 the owner's, 0 a marker
//! 44  u32  checksum of bytes 0-44     25  payload
//!
//! log.id, 8192 bytes                  cut note, 28 bytes at 4096 of log.id, else zero
//!  0  "weirLOG\n"                      0  "weirCUT\n"
//!  8  u8   format version, 1           8  u64  discard all from here on
//!  9  zero                            16  u64  synced_to
//! 16  log id                          24  u32  checksum, started from crc32c(log id)
//! 32  u32  checksum of bytes 0-32
//! ```
//! The cut note makes cutting a torn tail repeatable: it is durable before the first byte is
//! zeroed, and is cleared only when a marker at the new end is durable.
//!
//! # Limits
//! A payload is at most [`Options::payload_bytes_max`]: a record lies within one segment.

pub mod failpoint;
mod format;
pub mod layer;
mod log;
mod options;
mod read;
mod recover;
mod scan;
pub mod sim;

use std::fmt;

pub use layer::{Disk, FileLayer, LayerFile};
pub use log::{AppendError, Appended, Counters, FreeError, SegmentLog, SyncError};
pub use options::Options;
pub use read::{ReadError, Reader, Record};
pub use recover::{Damage, OpenError, Opening, Reason};

/// A byte offset since the log's birth. Later records have higher positions, across segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position(pub u64);

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A random id, made with the log's directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogId(pub [u8; 16]);

impl fmt::Display for LogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
