//! Cuts into a lane, each as one atomic group.
//!
//! A cut of up to [`PART_BYTES`] is one record. A larger one (a tick may close windows of very many devices) is written in
//! parts, which count only when the record behind the last of them is there, the group's end: that one carries the position,
//! and one sync takes all. Parts without an end, after a crash or for want of room, are passed over, and go with their segment.

use segment_log::{FileLayer, Position};
use wire::{CutBatch, StreamSchema};

use super::record::{self, Place};
use super::{Lane, OnFull, Spool, SpoolError, Waiting, losses};
use crate::failpoint;

/// A record of a group is not longer, unless it is a single batch.
const PART_BYTES: usize = 4 << 20;
/// Segments that one cut turns over at most, so that the engine is not away for long: the next try goes on there.
const TURNS_MAX: usize = 32;
/// What a batch takes there beside its body, at most: names and numbers.
const BATCH_HEAD: usize = 512;

impl<L: FileLayer> Spool<L> {
    /// Writes one cut of a lane and syncs it: all of it is there after a crash, or nothing. An empty one only moves the cut
    /// position.
    ///
    /// # Errors
    /// `Full` when it does not fit and the lane refuses; then nothing has happened to the cut.
    pub fn append(
        &mut self,
        lane: usize,
        cut: Position,
        batches: &[CutBatch],
        schemas: &[StreamSchema],
        now_us: i64,
    ) -> Result<(), SpoolError> {
        for schema in schemas {
            self.schemas.entry(schema.id()).or_insert_with(|| schema.canonical().to_owned());
        }
        let sealed_us = if self.knows_clock { now_us } else { record::SEALED_UNKNOWN };
        let mut turns = 0;
        let brought = loop {
            match self.write_group(lane, cut, batches, sealed_us) {
                Err(SpoolError::Full(name)) => {
                    turns += 1;
                    if turns > TURNS_MAX || !self.make_room(lane, now_us)? {
                        return Err(SpoolError::Full(name));
                    }
                }
                other => break other?,
            }
        };
        failpoint::reach("spool.append");
        self.lanes[lane].log.sync()?;
        failpoint::reach("spool.cut");
        self.lanes[lane].cut = cut;
        self.lanes[lane].rows += rows(batches);
        self.admit(lane, brought);
        Ok(())
    }

    fn write_group(
        &mut self,
        lane: usize,
        cut: Position,
        batches: &[CutBatch],
        sealed_us: i64,
    ) -> Result<Vec<Waiting>, SpoolError> {
        let all = self.lanes[lane].rows + rows(batches);
        // Half of what a segment takes: the state and the schemas stand before it.
        let part_bytes = PART_BYTES.min(self.lanes[lane].log.options().payload_bytes_max() / 2);
        let lengths = parts(batches, part_bytes);
        if lengths.len() == 1 {
            let position = self.write(lane, record::GROUP, &record::group(cut, sealed_us, all, batches), batches)?;
            return Ok(brought(lane, position, sealed_us, batches));
        }
        if !self.has_room(lane, batches, part_bytes) {
            return Err(SpoolError::Full(self.lanes[lane].settings.name.clone()));
        }
        let (mut waiting, mut rest, mut first) = (Vec::new(), batches, None);
        for length in lengths {
            let (part, left) = rest.split_at(length);
            rest = left;
            let position = self.write(lane, record::PART, &record::group(cut, sealed_us, 0, part), part)?;
            first = first.or(Some(position));
            waiting.extend(brought(lane, position, sealed_us, part));
        }
        let end = record::end(first.unwrap_or_default(), cut, sealed_us, all);
        self.put(lane, record::END, &end, &[], false)?;
        Ok(waiting)
    }

    fn write(&mut self, lane: usize, kind: u8, payload: &[u8], batches: &[CutBatch]) -> Result<Position, SpoolError> {
        let ids = batches.iter().map(|batch| batch.schema).collect::<Vec<_>>();
        Ok(self.put(lane, kind, payload, &ids, false)?.position)
    }

    /// Whether a group of parts fits as a whole: parts that are given up would fill a lane that refuses.
    fn has_room(&self, lane: usize, batches: &[CutBatch], part_bytes: usize) -> bool {
        let Lane { settings, log, .. } = &self.lanes[lane];
        let spare = if settings.on_full == OnFull::Refuse { 0 } else { settings.segment_bytes };
        let all = batches.iter().map(bytes).sum::<usize>();
        // A part that does not fit any more leaves the end of a segment empty.
        let longest = batches.iter().map(bytes).max().unwrap_or(0).max(part_bytes);
        let payload_bytes = log.options().payload_bytes_max();
        let segments = all.div_ceil(payload_bytes.saturating_sub(longest).max(payload_bytes / 4)) as u64;
        log.bytes_on_disk() + segments * settings.segment_bytes + spare <= settings.max_bytes
    }

    /// What came counts as waiting.
    pub(super) fn admit(&mut self, lane: usize, brought: Vec<Waiting>) {
        let lane = &mut self.lanes[lane];
        for waiting in brought {
            if let Some(segment) = lane.log.segment_of(Position(waiting.place.group)) {
                lane.waiting.push(segment.0, &waiting);
                lane.hold(waiting.place);
            }
        }
    }

    /// A batch of losses that a drop has written.
    pub(super) fn admit_losses(&mut self, lane: usize, position: Position, losses: &CutBatch) {
        self.admit(lane, brought(lane, position, record::SEALED_UNKNOWN, std::slice::from_ref(losses)));
        let hour = losses.min_ts.div_euclid(losses::JOIN_US);
        self.lanes[lane].losses = Some((Place { lane, group: position.0, index: 0 }, hour));
    }
}

/// The batches that a record has brought.
pub(super) fn brought(lane: usize, position: Position, sealed_us: i64, batches: &[CutBatch]) -> Vec<Waiting> {
    let places = (0..).map(|index| Place { lane, group: position.0, index });
    let each = places.zip(batches);
    each.map(|(place, batch)| Waiting::new(place, batch, (place.group, place.index), sealed_us)).collect()
}

fn rows(batches: &[CutBatch]) -> u64 {
    batches.iter().map(|batch| u64::from(batch.rows)).sum()
}

fn bytes(batch: &CutBatch) -> usize {
    batch.body.len() + BATCH_HEAD
}

/// How many batches each record gets, of up to so many bytes and at least one.
fn parts(batches: &[CutBatch], part_bytes: usize) -> Vec<usize> {
    let mut lengths = vec![0];
    let mut filled = 0;
    for bytes in batches.iter().map(bytes) {
        if filled + bytes > part_bytes && filled > 0 {
            lengths.push(0);
            filled = 0;
        }
        filled += bytes;
        *lengths.last_mut().expect("there is one") += 1;
    }
    lengths
}
