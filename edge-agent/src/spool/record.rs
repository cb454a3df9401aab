//! The records of a lane's log, format version 1, little-endian. A record that does not read is reported, never guessed.
//!
//! ```text
//! 1 schema    canonical text; once per segment before the first batch that uses it
//! 2 group     version u8 = 1 | cut position u64 | count u32 | cut batches (wire::CutBatch::write)
//! 3 numbered  group u64 | index u32 | seq u64 | crc u32 | stream (the rest, UTF-8)
//! 4 freed     totals | seq u64 | crc u32 | stream (the rest): committed up to here, nothing below is needed
//! 5 dropped   totals | count u32 | (group u64, index u32)* | one cut batch of `losses`, index 0 of this record
//! 6 void      totals | the sealed void batch that takes the place of a numbered one
//! 7 state     totals | cut position u64 | JSON of streams: heads and freed marks; first of each segment but the first
//! ```
//! `totals` are the lane's rows so far: freed u64 | lost u64 | voided u64, this record included.

use bytes::{Buf, Bytes};
use segment_log::Position;
use wire::{CutBatch, Mark, Seq, StreamName};

use super::Totals;

pub(crate) const SCHEMA: u8 = 1;
pub(crate) const GROUP: u8 = 2;
pub(crate) const NUMBERED: u8 = 3;
pub(crate) const FREED: u8 = 4;
pub(crate) const DROPPED: u8 = 5;
pub(crate) const VOID: u8 = 6;
pub(crate) const STATE: u8 = 7;
const VERSION: u8 = 1;

/// A batch's place: its record in the lane, and which of the record's batches it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    pub(crate) lane: usize,
    pub(crate) group: u64,
    pub(crate) index: u32,
}

pub(crate) fn group(cut: Position, batches: &[CutBatch]) -> Vec<u8> {
    let mut out = vec![VERSION];
    out.extend(cut.0.to_le_bytes());
    out.extend((batches.len() as u32).to_le_bytes());
    batches.iter().for_each(|batch| batch.write(&mut out));
    out
}

pub(crate) fn read_group(mut bytes: Bytes) -> Option<(Position, Vec<CutBatch>)> {
    if bytes.len() < 13 || bytes.get_u8() != VERSION {
        return None;
    }
    let cut = Position(bytes.get_u64_le());
    let count = bytes.get_u32_le();
    let batches = (0..count).map(|_| CutBatch::read(&mut bytes).ok()).collect::<Option<Vec<_>>>()?;
    bytes.is_empty().then_some((cut, batches))
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

pub(crate) fn read_dropped(lane: usize, bytes: Bytes) -> Option<Dropped> {
    let (totals, mut bytes) = split_totals(bytes)?;
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
    let mut out = Vec::with_capacity(24 + rest.len());
    for value in [totals.freed, totals.lost, totals.voided] {
        out.extend(value.to_le_bytes());
    }
    out.extend_from_slice(rest);
    out
}

pub(crate) fn split_totals(mut bytes: Bytes) -> Option<(Totals, Bytes)> {
    let mut next = || bytes.try_get_u64_le().ok();
    let totals = Totals { freed: next()?, lost: next()?, voided: next()? };
    Some((totals, bytes))
}
