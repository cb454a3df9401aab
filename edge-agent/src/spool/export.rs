//! All that is in the spool, for people who want its rows without a cloud.

use segment_log::FileLayer;
use wire::{CutBatch, StreamName};

use super::record::Place;
use super::{Spool, SpoolError};

impl<L: FileLayer> Spool<L> {
    /// The batches that are not committed, stream by stream in their order: numbered ones, then those that wait. One that
    /// cannot be read is counted in the second value; voids have no rows and are left out.
    ///
    /// # Errors
    /// When the disk does not answer, or `take` does not go on.
    pub fn export<E: From<SpoolError>>(
        &mut self,
        mut take: impl FnMut(&Self, &StreamName, CutBatch) -> Result<(), E>,
    ) -> Result<u64, E> {
        let mut places = Vec::<(StreamName, Place)>::new();
        for (stream, sequence) in &self.sequences {
            let rows = sequence.numbered.iter().filter(|numbered| numbered.void.is_none());
            places.extend(rows.map(|numbered| (stream.clone(), numbered.place)));
        }
        for lane in &self.lanes {
            let waiting = lane.waiting.iter();
            places.extend(waiting.flat_map(|(stream, all)| all.iter().map(|one| (stream.clone(), one.place))));
        }
        places.sort_by(|(one, _), (other, _)| one.cmp(other));
        let mut unreadable = 0;
        for (stream, place) in places {
            match self.read(place)? {
                Some(batch) => take(self, &stream, batch)?,
                None => unreadable += 1,
            }
        }
        Ok(unreadable)
    }
}
