//! All that is in the spool, stream by stream, for people who want to see it without a cloud.

use std::collections::BTreeSet;

use segment_log::FileLayer;
use wire::{CutBatch, StreamName};

use super::{Spool, SpoolError};

impl<L: FileLayer> Spool<L> {
    /// The streams that have something in the spool.
    pub fn streams(&self) -> BTreeSet<StreamName> {
        let numbered = self.sequences.iter().filter(|(_, sequence)| !sequence.numbered.is_empty());
        let waiting = self.lanes.iter().flat_map(|lane| lane.waiting.streams());
        numbered.map(|(stream, _)| stream).chain(waiting.map(|(stream, _)| stream)).cloned().collect()
    }

    /// The batches of a stream that are not committed, in their order: numbered ones, then those that wait, lane by lane.
    /// Voids have no rows and are left out. Returns how many cannot be read, or are not taken.
    ///
    /// # Errors
    /// When the disk does not answer, or `take` does not go on.
    pub fn each<E: From<SpoolError>>(
        &mut self,
        stream: &StreamName,
        mut take: impl FnMut(&Self, CutBatch) -> Result<bool, E>,
    ) -> Result<u64, E> {
        let numbered = self.sequences.get(stream).into_iter().flat_map(|sequence| &sequence.numbered);
        let numbered = numbered.filter(|numbered| numbered.void.is_none()).map(|numbered| numbered.place);
        let mut places = numbered.collect::<Vec<_>>();
        for super::Lane { waiting, log, .. } in &mut self.lanes {
            let visit = |waiting: super::Waiting| {
                places.push(waiting.place);
                true
            };
            waiting.walk(log, stream, (u64::MAX, false), visit).map_err(SpoolError::Read)?;
        }
        let mut left_out = 0;
        for place in places {
            left_out += match self.read(place)? {
                Some(batch) => u64::from(!take(self, batch)?),
                None => 1,
            };
        }
        Ok(left_out)
    }
}
