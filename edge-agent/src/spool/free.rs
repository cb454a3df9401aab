//! What the cloud has committed leaves the disk: numbered batches up to a mark of our own, and segments without a live one.
//!
//! Promise (rule 2): nothing is freed by a mark whose CRC is not that of our own batch.

use segment_log::{FileLayer, Position};
use wire::{Mark, StreamName};

use super::{Spool, SpoolError, record};
use crate::failpoint;

impl<L: FileLayer> Spool<L> {
    /// Whether a mark names a batch of this spool's own history; false also when that cannot be told any more.
    pub fn is_own(&self, stream: &StreamName, mark: Mark) -> bool {
        let Some(sequence) = self.sequences.get(stream) else { return mark.seq.0 == 0 };
        if mark.seq == sequence.freed.seq {
            return mark.seq.0 == 0 || mark.crc == sequence.freed.crc;
        }
        self.find(stream, mark.seq).is_some_and(|(_, numbered)| {
            mark.crc == numbered.mark.crc || numbered.void.as_ref().is_some_and(|void| void.crc() == mark.crc)
        })
    }

    /// Frees a stream up to `mark`, if its CRC is our own; returns whether anything was freed.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn free(&mut self, stream: &StreamName, mark: Mark) -> Result<bool, SpoolError> {
        if !self.is_own(stream, mark) {
            return Ok(false);
        }
        let Some(sequence) = self.sequences.get_mut(stream) else { return Ok(false) };
        let mut touched = Vec::new();
        while let Some(numbered) = sequence.numbered.pop_front_if(|numbered| numbered.mark.seq <= mark.seq) {
            sequence.freed = numbered.mark;
            self.lanes[numbered.place.lane].totals.freed += u64::from(numbered.rows);
            self.lanes[numbered.place.lane].release(numbered.place);
            if !touched.contains(&numbered.place.lane) {
                touched.push(numbered.place.lane);
            }
        }
        let freed = sequence.freed;
        for &lane in &touched {
            // Not worth a sync of its own: if it is forgotten, the next `positions` says it again.
            let payload = record::with_totals(self.lanes[lane].totals, &record::freed(stream, freed));
            match self.put(lane, record::FREED, &payload, &[], true) {
                Ok(_) | Err(SpoolError::Full(_)) => {}
                Err(error) => return Err(error),
            }
            failpoint::reach("free.put");
            self.free_segments(lane)?;
            failpoint::reach("free.done");
        }
        Ok(!touched.is_empty())
    }

    pub(super) fn free_segments(&mut self, lane: usize) -> Result<(), SpoolError> {
        let lane = &mut self.lanes[lane];
        let until = lane.live.first_key_value().map_or(lane.log.end(), |(segment, _)| Position(*segment));
        if until > lane.log.start() && lane.log.start() != lane.log.newest_segment() {
            // What says that they are not needed must outlive the segments.
            lane.log.sync()?;
            lane.log.free_before(until)?;
        }
        Ok(())
    }
}
