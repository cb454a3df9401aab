//! The records of a lane's log, little-endian. A record that does not read is reported, never guessed.
//!
//! ```text
//! 1 schema    canonical text; once per segment before the first batch that uses it
//! 2 group     version u8 = 3 | cut position u64 | sealed i64 (µs) | rows u64 | count u32 | cut batches (wire::CutBatch::write)
//! 3 numbered  group u64 | index u32 | seq u64 | crc u32 | stream (the rest, UTF-8)
//! 8 moved     count u32 | (group u64 | index u32 | came u64, u32 | sealed i64 | seq u64 | crc u32 | cut batch)*: batches of
//!             this lane that stand here from now on, index by index; seq 0: without a number
//! 9 freed     totals | seq u64 | crc u32 | stream (the rest): committed up to here, nothing below is needed
//! 10 dropped  totals | count u32 | (group u64, index u32)* | one cut batch of `losses`, index 0 of this record
//! 11 void     totals | the sealed void batch that takes the place of a numbered one
//! 12 state    totals | cut position u64 | JSON of streams: heads and freed marks; first of each segment but the first
//! 13 part     a group that is not whole; nothing of it counts before its end does
//! 14 end      a group whose batches are in parts: position of the first of them u64 | the group, which has no batches itself
//! ```
//! `totals` are the lane's rows so far: freed u64 | lost u64 | voided u64 | made i64, this record included. `rows` of a group are
//! all that were ever cut for the lane, with this group: what is missing behind a damaged record. Of the first
//! versions are groups of version 2, without `rows`, and of version 1, also without `sealed`, and 4 to 7 for 9 to 12, without
//! `made`: they are read.

use bytes::{Buf, Bytes};
use segment_log::Position;
use wire::{CutBatch, Mark, Seq, StreamName};

use super::Totals;

pub(crate) const SCHEMA: u8 = 1;
pub(crate) const GROUP: u8 = 2;
pub(crate) const NUMBERED: u8 = 3;
pub(crate) const MOVED: u8 = 8;
pub(crate) const FREED: u8 = 9;
pub(crate) const DROPPED: u8 = 10;
pub(crate) const VOID: u8 = 11;
pub(crate) const STATE: u8 = 12;
pub(crate) const PART: u8 = 13;
pub(crate) const END: u8 = 14;
/// What `FREED` to `STATE` were in the first version, whose totals had no `made`.
const FIRST_FREED: u8 = 4;
const FIRST_STATE: u8 = 7;
const VERSION: u8 = 3;
/// When a group was sealed that does not say so: never too old.
pub(crate) const SEALED_UNKNOWN: i64 = i64::MAX;

/// The kind that a record has today, and whether it is of the first version.
pub(crate) fn kind(kind: u8) -> (u8, bool) {
    let first = (FIRST_FREED..=FIRST_STATE).contains(&kind);
    (if first { kind - FIRST_FREED + FREED } else { kind }, first)
}

/// A batch's place: its record in the lane, and which of the record's batches it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    pub(crate) lane: usize,
    pub(crate) group: u64,
    pub(crate) index: u32,
}

/// What one cut brought to a lane.
pub(crate) struct Group {
    pub(crate) cut: Position,
    pub(crate) sealed_us: i64,
    /// All that were cut for the lane; 0 when it does not say so.
    pub(crate) rows: u64,
    pub(crate) batches: Vec<CutBatch>,
}

pub(crate) fn group(cut: Position, sealed_us: i64, rows: u64, batches: &[CutBatch]) -> Vec<u8> {
    let mut out = vec![VERSION];
    out.extend(cut.0.to_le_bytes());
    out.extend(sealed_us.to_le_bytes());
    out.extend(rows.to_le_bytes());
    out.extend((batches.len() as u32).to_le_bytes());
    batches.iter().for_each(|batch| batch.write(&mut out));
    out
}

pub(crate) fn read_group(mut bytes: Bytes) -> Option<Group> {
    let version = bytes.try_get_u8().ok()?;
    let cut = Position(bytes.try_get_u64_le().ok()?);
    let sealed_us = match version {
        1 => SEALED_UNKNOWN,
        2 | VERSION => bytes.try_get_i64_le().ok()?,
        _ => return None,
    };
    let rows = if version < VERSION { 0 } else { bytes.try_get_u64_le().ok()? };
    let count = bytes.try_get_u32_le().ok()?;
    let batches = (0..count).map(|_| CutBatch::read(&mut bytes).ok()).collect::<Option<Vec<_>>>()?;
    bytes.is_empty().then_some(Group { cut, sealed_us, rows, batches })
}

/// The end of a group whose parts begin at `first`.
pub(crate) fn end(first: Position, cut: Position, sealed_us: i64, rows: u64) -> Vec<u8> {
    let mut out = first.0.to_le_bytes().to_vec();
    out.extend(group(cut, sealed_us, rows, &[]));
    out
}

pub(crate) fn read_end(mut bytes: Bytes) -> Option<(Position, Group)> {
    let first = Position(bytes.try_get_u64_le().ok()?);
    read_group(bytes).map(|group| (first, group))
}

/// A batch that gets another place in its lane.
pub(crate) struct Moved {
    pub(crate) from: Place,
    pub(crate) came: (u64, u32),
    pub(crate) sealed_us: i64,
    /// None as long as it has no number.
    pub(crate) mark: Option<Mark>,
    pub(crate) batch: CutBatch,
}

pub(crate) fn moved(batches: &[Moved]) -> Vec<u8> {
    let mut out = (batches.len() as u32).to_le_bytes().to_vec();
    for moved in batches {
        let mark = moved.mark.unwrap_or_default();
        out.extend(moved.from.group.to_le_bytes());
        out.extend(moved.from.index.to_le_bytes());
        out.extend(moved.came.0.to_le_bytes());
        out.extend(moved.came.1.to_le_bytes());
        out.extend(moved.sealed_us.to_le_bytes());
        out.extend(mark.seq.0.to_le_bytes());
        out.extend(mark.crc.to_le_bytes());
        moved.batch.write(&mut out);
    }
    out
}

pub(crate) fn read_moved(lane: usize, mut bytes: Bytes) -> Option<Vec<Moved>> {
    let count = bytes.try_get_u32_le().ok()?;
    let mut moved = Vec::new();
    for _ in 0..count {
        let from = Place { lane, group: bytes.try_get_u64_le().ok()?, index: bytes.try_get_u32_le().ok()? };
        let came = (bytes.try_get_u64_le().ok()?, bytes.try_get_u32_le().ok()?);
        let sealed_us = bytes.try_get_i64_le().ok()?;
        let mark = Mark { seq: Seq(bytes.try_get_u64_le().ok()?), crc: bytes.try_get_u32_le().ok()? };
        let batch = CutBatch::read(&mut bytes).ok()?;
        moved.push(Moved { from, came, sealed_us, mark: (mark.seq.0 > 0).then_some(mark), batch });
    }
    bytes.is_empty().then_some(moved)
}

pub(crate) fn numbered(place: Place, stream: &StreamName, mark: Mark) -> Vec<u8> {
    let mut out = place.group.to_le_bytes().to_vec();
    out.extend(place.index.to_le_bytes());
    out.extend(freed(stream, mark));
    out
}

pub(crate) fn read_numbered(lane: usize, mut bytes: Bytes) -> Option<(Place, StreamName, Mark)> {
    if bytes.len() < 24 {
        return None;
    }
    let place = Place { lane, group: bytes.get_u64_le(), index: bytes.get_u32_le() };
    let (stream, mark) = read_freed(bytes)?;
    Some((place, stream, mark))
}

pub(crate) fn freed(stream: &StreamName, mark: Mark) -> Vec<u8> {
    let mut out = mark.seq.0.to_le_bytes().to_vec();
    out.extend(mark.crc.to_le_bytes());
    out.extend_from_slice(stream.as_str().as_bytes());
    out
}

pub(crate) fn read_freed(mut bytes: Bytes) -> Option<(StreamName, Mark)> {
    if bytes.len() < 12 {
        return None;
    }
    let mark = Mark { seq: Seq(bytes.get_u64_le()), crc: bytes.get_u32_le() };
    Some((std::str::from_utf8(&bytes).ok()?.parse().ok()?, mark))
}

/// A record that takes places out of the lane.
pub(crate) struct Dropped {
    pub(crate) totals: Totals,
    pub(crate) places: Vec<Place>,
    pub(crate) losses: CutBatch,
}

pub(crate) fn dropped(totals: Totals, places: &[Place], losses: &CutBatch) -> Vec<u8> {
    let mut out = with_totals(totals, &(places.len() as u32).to_le_bytes());
    for place in places {
        out.extend(place.group.to_le_bytes());
        out.extend(place.index.to_le_bytes());
    }
    losses.write(&mut out);
    out
}

pub(crate) fn read_dropped(lane: usize, bytes: Bytes, first: bool) -> Option<Dropped> {
    let (totals, mut bytes) = split_totals(bytes, first)?;
    let count = bytes.try_get_u32_le().ok()? as usize;
    if bytes.len() < count.checked_mul(12)? {
        return None;
    }
    let places =
        (0..count).map(|_| Place { lane, group: bytes.get_u64_le(), index: bytes.get_u32_le() }).collect::<Vec<_>>();
    let losses = CutBatch::read(&mut bytes).ok()?;
    bytes.is_empty().then_some(Dropped { totals, places, losses })
}

pub(crate) fn with_totals(totals: Totals, rest: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(32 + rest.len());
    for value in [totals.freed, totals.lost, totals.voided] {
        out.extend(value.to_le_bytes());
    }
    out.extend(totals.made.to_le_bytes());
    out.extend_from_slice(rest);
    out
}

/// `first`: of the first version, see [`kind`].
pub(crate) fn split_totals(mut bytes: Bytes, first: bool) -> Option<(Totals, Bytes)> {
    let mut next = || bytes.try_get_u64_le().ok();
    let (freed, lost, voided) = (next()?, next()?, next()?);
    let made = if first { 0 } else { bytes.try_get_i64_le().ok()? };
    Some((Totals { freed, lost, voided, made }, bytes))
}
