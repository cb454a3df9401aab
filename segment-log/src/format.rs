//! Format version 1, byte for byte: segment header, record header, identity file.
//!
//! The layout is shown in the crate's documentation. Everything here is a pure function of bytes;
//! all integers are little-endian. A checksum of a record or of a cut note starts from the
//! CRC32C of the log's id, so bytes of another log (a copied segment) never check.

use crate::{LogId, Position};

/// The version byte of segments and of the identity file.
pub(crate) const VERSION: u8 = 1;
/// Bytes of a segment's header.
pub(crate) const SEGMENT_HEADER: u64 = 48;
/// Bytes of a record before its payload.
pub(crate) const RECORD_HEADER: usize = 25;
/// The kind of a marker, which has no payload. An owner's kinds are 1 to 255, so a valid record
/// header is never all zeros: a marker at position 0 is never written.
pub(crate) const MARKER: u8 = 0;
/// Bytes of a marker. Each segment keeps this much free for one.
pub(crate) const MARKER_BYTES: u64 = RECORD_HEADER as u64;

const SEGMENT_MAGIC: [u8; 8] = *b"weirSEG\n";
const SEGMENT_SUFFIX: &str = ".seg";

/// The starting value of every checksum of the log.
pub(crate) fn seed(id: LogId) -> u32 {
    crc32c::crc32c(&id.0)
}

/// `00000000000000000000.seg`: the first position in 20 decimal digits.
pub(crate) fn segment_name(first: u64) -> String {
    format!("{first:020}{SEGMENT_SUFFIX}")
}

/// The first position in a segment's name.
pub(crate) fn segment_first(name: &str) -> Option<u64> {
    let first = name.strip_suffix(SEGMENT_SUFFIX)?.parse().ok()?;
    (segment_name(first) == name).then_some(first)
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// A segment's header, found good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub(crate) version: u8,
    pub(crate) id: LogId,
    pub(crate) first: u64,
}

impl SegmentHeader {
    pub(crate) fn encode(id: LogId, first: u64) -> [u8; SEGMENT_HEADER as usize] {
        let mut bytes = [0; SEGMENT_HEADER as usize];
        bytes[..8].copy_from_slice(&SEGMENT_MAGIC);
        bytes[8] = VERSION;
        bytes[16..32].copy_from_slice(&id.0);
        bytes[32..40].copy_from_slice(&first.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..44]);
        bytes[44..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// None if the bytes are not a header whose checksum is right.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() < SEGMENT_HEADER as usize
            || bytes[..8] != SEGMENT_MAGIC
            || u32_at(bytes, 44) != crc32c::crc32c(&bytes[..44])
        {
            return None;
        }
        let mut id = [0; 16];
        id.copy_from_slice(&bytes[16..32]);
        Some(Self { version: bytes[8], id: LogId(id), first: u64_at(bytes, 32) })
    }
}

/// What a record's header says. Only a right checksum makes it true.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RecordHeader {
    pub(crate) length: u32,
    pub(crate) position: u64,
    pub(crate) synced_to: u64,
    pub(crate) kind: u8,
}

impl RecordHeader {
    pub(crate) fn decode(bytes: &[u8]) -> Self {
        Self { length: u32_at(bytes, 4), position: u64_at(bytes, 8), synced_to: u64_at(bytes, 16), kind: bytes[24] }
    }

    /// Bytes of the whole record.
    pub(crate) fn record_bytes(&self) -> u64 {
        RECORD_HEADER as u64 + u64::from(self.length)
    }
}

/// Appends one record to `buffer`.
pub(crate) fn put_record(buffer: &mut Vec<u8>, seed: u32, position: u64, synced_to: u64, kind: u8, payload: &[u8]) {
    let length = u32::try_from(payload.len()).expect("the caller has checked the length");
    let start = buffer.len();
    buffer.extend_from_slice(&[0; 4]);
    buffer.extend_from_slice(&length.to_le_bytes());
    buffer.extend_from_slice(&position.to_le_bytes());
    buffer.extend_from_slice(&synced_to.to_le_bytes());
    buffer.push(kind);
    buffer.extend_from_slice(payload);
    let crc = crc32c::crc32c_append(seed, &buffer[start + 4..]);
    buffer[start..start + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Whether the checksum of these bytes of one record is right.
pub(crate) fn record_checks(seed: u32, record: &[u8]) -> bool {
    u32_at(record, 0) == crc32c::crc32c_append(seed, &record[4..])
}

/// The identity file: the log's id in its first page, a cut note or nothing in its second.
pub(crate) mod identity {
    use super::*;

    pub(crate) const NAME: &str = "log.id";
    /// Bytes of the file: two pages, so that a torn write of the note cannot touch the id.
    pub(crate) const BYTES: u64 = 8192;
    pub(crate) const NOTE_AT: u64 = 4096;
    /// Bytes in use at the start of the first page.
    pub(crate) const ID_BYTES: usize = 36;
    /// Bytes in use at the start of the second page.
    pub(crate) const NOTE_BYTES: usize = 28;

    const ID_MAGIC: [u8; 8] = *b"weirLOG\n";
    const NOTE_MAGIC: [u8; 8] = *b"weirCUT\n";

    /// Everything from `at` on is to be discarded; what was below `synced_to` had been synced.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct CutNote {
        pub(crate) at: Position,
        pub(crate) synced_to: Position,
    }

    pub(crate) fn encode_id(id: LogId) -> [u8; ID_BYTES] {
        let mut bytes = [0; ID_BYTES];
        bytes[..8].copy_from_slice(&ID_MAGIC);
        bytes[8] = VERSION;
        bytes[16..32].copy_from_slice(&id.0);
        let crc = crc32c::crc32c(&bytes[..32]);
        bytes[32..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// The format version and the id.
    pub(crate) fn decode_id(bytes: &[u8]) -> Option<(u8, LogId)> {
        if bytes.len() < ID_BYTES || bytes[..8] != ID_MAGIC || u32_at(bytes, 32) != crc32c::crc32c(&bytes[..32]) {
            return None;
        }
        let mut id = [0; 16];
        id.copy_from_slice(&bytes[16..32]);
        Some((bytes[8], LogId(id)))
    }

    pub(crate) fn encode_note(seed: u32, note: CutNote) -> [u8; NOTE_BYTES] {
        let mut bytes = [0; NOTE_BYTES];
        bytes[..8].copy_from_slice(&NOTE_MAGIC);
        bytes[8..16].copy_from_slice(&note.at.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&note.synced_to.0.to_le_bytes());
        let crc = crc32c::crc32c_append(seed, &bytes[..24]);
        bytes[24..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    pub(crate) fn decode_note(seed: u32, bytes: &[u8]) -> Option<CutNote> {
        if bytes.len() < NOTE_BYTES
            || bytes[..8] != NOTE_MAGIC
            || u32_at(bytes, 24) != crc32c::crc32c_append(seed, &bytes[..24])
        {
            return None;
        }
        Some(CutNote { at: Position(u64_at(bytes, 8)), synced_to: Position(u64_at(bytes, 16)) })
    }
}
