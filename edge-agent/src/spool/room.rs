//! Room in a full lane: its first segment goes.
//!
//! A log is freed from its start, so whatever else the segment holds must stand elsewhere first: batches with numbers, which
//! must come again with the same bytes and which an outage leaves at the very start; and what `thin` keeps. They move to
//! the end, into a segment that cuts leave free for it, with their numbers in the same record. When the disk itself is full,
//! a segment that the lane keeps there for this is opened in its place, and the one that goes becomes the next of these.
//!
//! Where most of a lane is needed no more, nothing is dropped: a stream that the cloud does not commit holds the lane's start,
//! and behind it lies what the others have sent long ago. Then all that is needed moves, whatever the policy; a lane that
//! refuses takes the room of one segment more meanwhile.

use std::path::PathBuf;

use segment_log::FileLayer;
use wire::schema::own;
use wire::{CutBatch, Mark, StreamName};

use super::drop::DROPPED_MAX;
use super::record::{self, Moved, Place};
use super::{OnFull, Spool, SpoolError, Waiting, losses};

/// Batches that one `moved` record takes, about.
const MOVED_BYTES: usize = 1 << 20;

/// A lane of which at most one part in so many is needed is turned over for that. Less, and it would be written again and again
/// for little; more, and what is left empty at the ends of segments might pass for room.
const NEEDED_PART: u64 = 4;

impl<L: FileLayer> Spool<L> {
    /// Makes room, by the lane's policy where something must go for it. False: it refuses, or there is nothing that may go.
    pub(super) fn make_room(&mut self, lane: usize, now_us: i64) -> Result<bool, SpoolError> {
        let refuses = self.lanes[lane].settings.on_full == OnFull::Refuse;
        if self.needed(lane) > self.lanes[lane].log.bytes_on_disk() / NEEDED_PART {
            return if refuses { Ok(false) } else { self.turn_over(lane, true, now_us) };
        }
        let path = PathBuf::from(&self.lanes[lane].settings.name);
        let io = |source| SpoolError::Io { path: path.clone(), source };
        if refuses {
            self.lanes[lane].log.keep_spare().map_err(io)?;
        }
        let made = self.turn_over(lane, false, now_us)?;
        if refuses {
            self.lanes[lane].log.give_spare_back().map_err(io)?;
            return Ok(made);
        }
        Ok(made || self.turn_over(lane, true, now_us)?)
    }

    /// Bytes of the batches in a lane that must stay there, about.
    fn needed(&self, lane: usize) -> u64 {
        let waiting = self.lanes[lane].waiting.streams().map(|(_, queue)| queue.bytes).sum::<u64>();
        let numbered = self.sequences.values().flat_map(|sequence| &sequence.numbered);
        let numbered = numbered.filter(|numbered| numbered.place.lane == lane && numbered.void.is_none());
        waiting + numbered.map(|numbered| numbered.bytes as u64).sum::<u64>()
    }

    /// Frees the first segment: what is needed of it moves, and what may go goes, where `drops`.
    fn turn_over(&mut self, lane: usize, drops: bool, now_us: i64) -> Result<bool, SpoolError> {
        let droppable = |settings: &super::LaneSettings, stream: &StreamName| match settings.on_full {
            OnFull::Refuse => false,
            OnFull::DropOldest => stream.as_str() != own::LOSSES,
            OnFull::Thin => settings.raw.contains(stream),
        };
        let log = &self.lanes[lane].log;
        // It has only one when the disk itself is full.
        let (is_only, end) = log.second_segment().map_or((true, log.end()), |end| (false, end));
        let is_first = |place: &Place| place.lane == lane && place.group < end.0;
        let settings = &self.lanes[lane].settings;
        let (mut victims, mut kept, mut droppable_bytes) = (Vec::new(), Vec::new(), 0);
        let streams = self.lanes[lane].waiting.streams().map(|(stream, queue)| {
            let goes = drops && droppable(settings, stream);
            droppable_bytes += if goes { queue.bytes } else { 0 };
            let joins = drops && settings.on_full == OnFull::DropOldest && stream.as_str() == own::LOSSES;
            (stream.clone(), goes || joins)
        });
        let streams = streams.collect::<Vec<_>>();
        // Less is no segment: what is kept would be written again and again for nothing.
        let is_too_little = droppable_bytes < log.options().payload_bytes_max() as u64 / 2;
        if (drops && is_too_little) || (is_only && (!drops || !self.open_spare(lane)?)) {
            return Ok(false);
        }
        let super::Lane { waiting, log, .. } = &mut self.lanes[lane];
        for (stream, goes) in &streams {
            let visit = |waiting: Waiting| {
                if is_first(&waiting.place) {
                    if *goes { victims.push(waiting) } else { kept.push(waiting) }
                }
                true
            };
            waiting.walk(log, stream, (end.0, false), visit).map_err(SpoolError::Read)?;
        }
        let moved = self.move_kept(lane, &is_first, kept, now_us)?;
        if is_only {
            // There is room now. What must stay has moved already, as far as it has numbers now: no segment is ready when this
            // one goes.
            return Ok(true);
        }
        if !moved {
            return if self.open_spare(lane)? { self.turn_over(lane, drops, now_us) } else { Ok(false) };
        }
        victims.sort_by_key(|waiting| waiting.came);
        let mut victims = victims.into_iter().peekable();
        while victims.peek().is_some() {
            let some = victims.by_ref().take(DROPPED_MAX).collect();
            match self.take_out(lane, some, losses::LANE_FULL, now_us) {
                Err(SpoolError::Full(_)) => return Ok(false),
                other => other?,
            }
        }
        let before = self.lanes[lane].log.start();
        self.free_segments(lane)?;
        Ok(self.lanes[lane].log.start() > before)
    }

    /// Moves what the first segment must not take with it; false when there is no room for it.
    fn move_kept(
        &mut self,
        lane: usize,
        is_first: &dyn Fn(&Place) -> bool,
        kept: Vec<Waiting>,
        now_us: i64,
    ) -> Result<bool, SpoolError> {
        let mut leaving = Vec::new();
        for (stream, sequence) in &self.sequences {
            let numbered = sequence.numbered.iter().filter(|numbered| is_first(&numbered.place));
            leaving.extend(numbered.map(|numbered| (stream.clone(), Leaving::Numbered(numbered.mark, numbered.place))));
        }
        leaving.extend(kept.into_iter().map(|waiting| (waiting.stream.clone(), Leaving::Waiting(waiting))));
        leaving.sort_by_key(|(_, leaving)| leaving.place());
        let bytes_max = MOVED_BYTES.min(self.lanes[lane].log.options().payload_bytes_max() / 2);
        let (mut group, mut voids, mut rotted, mut bytes) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for (stream, leaving) in leaving {
            let from = leaving.place();
            let from = Place { lane, group: from.0, index: from.1 };
            let (came, sealed_us, mark) = match &leaving {
                Leaving::Numbered(mark, _) => (leaving.place(), record::SEALED_UNKNOWN, Some(*mark)),
                Leaving::Waiting(waiting) => (waiting.came, waiting.sealed_us, None),
            };
            let void =
                mark.and_then(|mark| self.find(&stream, mark.seq)).and_then(|(_, numbered)| numbered.void.clone());
            let batch = match (self.read(from)?, leaving) {
                (Some(batch), _) if void.is_none() => batch,
                (_, Leaving::Waiting(waiting)) => {
                    rotted.push(waiting);
                    continue;
                }
                _ => {
                    // A void batch needs no rows. What has rotted becomes void when it is sent.
                    voids.extend(void.map(|void| *void));
                    nothing(&stream)
                }
            };
            let batch_bytes = batch.body.len() + 512;
            if bytes + batch_bytes > bytes_max && !group.is_empty() {
                if !self.put_moved(lane, std::mem::take(&mut group), std::mem::take(&mut voids))? {
                    return Ok(false);
                }
                bytes = 0;
            }
            bytes += batch_bytes;
            group.push(Moved { from, came, sealed_us, mark, batch });
        }
        if !self.put_moved(lane, group, voids)? {
            return Ok(false);
        }
        match rotted.is_empty() {
            true => Ok(true),
            false => self.take_out(lane, rotted, losses::ROTTED, now_us).map(|()| true),
        }
    }

    /// One record of batches that move, synced; then they stand there. Voids are written again behind it.
    fn put_moved(&mut self, lane: usize, group: Vec<Moved>, voids: Vec<wire::SealedBatch>) -> Result<bool, SpoolError> {
        if group.is_empty() {
            return Ok(true);
        }
        let ids = group.iter().map(|moved| moved.batch.schema).collect::<Vec<_>>();
        let appended = match self.put(lane, record::MOVED, &record::moved(&group), &ids, true) {
            Err(SpoolError::Full(_)) => return Ok(false),
            other => other?,
        };
        for void in voids {
            let payload = record::with_totals(self.lanes[lane].totals, void.bytes());
            match self.put(lane, record::VOID, &payload, &[], true) {
                // The first one is still there, and so is its segment.
                Err(SpoolError::Full(_)) => return Ok(false),
                other => other?,
            };
        }
        self.lanes[lane].log.sync()?;
        for (index, moved) in group.into_iter().enumerate() {
            let place = Place { lane, group: appended.position.0, index: index as u32 };
            self.stands(lane, &moved, place)?;
        }
        Ok(true)
    }

    fn stands(&mut self, lane: usize, moved: &Moved, place: Place) -> Result<(), SpoolError> {
        if let Some(Mark { seq, .. }) = moved.mark {
            let sequence = self.sequences.get_mut(&moved.batch.stream);
            if let Some(numbered) = sequence.and_then(|s| s.numbered.iter_mut().find(|n| n.mark.seq == seq)) {
                numbered.place = place;
            }
        } else if let Some(waiting) = self.lanes[lane].take(Some(&moved.batch.stream), moved.from)? {
            self.lanes[lane].waiting.push_moved(Waiting { place, ..waiting });
        }
        let lane = &mut self.lanes[lane];
        if let Some((losses, _)) = lane.losses.as_mut().filter(|(losses, _)| *losses == moved.from) {
            *losses = place;
        }
        lane.release(moved.from);
        lane.hold(place);
        Ok(())
    }
}

enum Leaving {
    Numbered(Mark, Place),
    Waiting(Waiting),
}

impl Leaving {
    fn place(&self) -> (u64, u32) {
        let place = match self {
            Self::Numbered(_, place) => *place,
            Self::Waiting(waiting) => waiting.place,
        };
        (place.group, place.index)
    }
}

/// In the place of rows that nobody needs or can read.
fn nothing(stream: &StreamName) -> CutBatch {
    CutBatch {
        stream: stream.clone(),
        schema: losses::schema().id(),
        rows: 0,
        min_ts: 0,
        max_ts: 0,
        watermark: wire::sealed::NO_WATERMARK,
        agent: String::new(),
        configuration: 0,
        format: wire::BodyFormat::Columns,
        body: bytes::Bytes::new(),
    }
}
