//! The policy `drop_oldest`: what goes, and the rows of `losses` that say so, in one record.
//!
//! Losses that stand among what is dropped are summed into the new ones, so that they pin no segment. One that can no
//! longer be read is a row of its own (`losses_unreadable`): how much it spoke of is not known.

use segment_log::FileLayer;
use wire::{Seq, StreamSchema};

use super::record::{self, Place};
use super::{Spool, SpoolError, Waiting, losses};

/// Batches that one `dropped` record names at most, so that it fits in the reserve.
const DROPPED_MAX: usize = 512;

impl<L: FileLayer> Spool<L> {
    /// Drops the oldest waiting batches of the lane's first segment. False: nothing to drop.
    pub(super) fn drop_oldest(&mut self, lane: usize, now_us: i64) -> Result<bool, SpoolError> {
        let own = wire::schema::own::LOSSES;
        let reach = self.lanes[lane].settings.segment_bytes;
        let oldest = self.lanes[lane].waiting.values().flat_map(|batches| batches.iter().take(DROPPED_MAX));
        let mut victims = oldest.cloned().collect::<Vec<Waiting>>();
        victims.sort_by_key(|waiting| (waiting.place.group, waiting.place.index));
        victims.truncate(DROPPED_MAX);
        let Some(first) = victims.first().map(|waiting| waiting.place.group) else { return Ok(false) };
        victims.retain(|waiting| waiting.place.group < first.saturating_add(reach));
        if victims.iter().all(|waiting| waiting.stream.as_str() == own) {
            return Ok(false);
        }
        let schema = losses::schema();
        let mut carried = Vec::new();
        let mut unreadable = 0;
        for victim in victims.iter().filter(|waiting| waiting.stream.as_str() == own) {
            match self.earlier_losses(victim, &schema)? {
                Some(rows) => carried.push(rows),
                None => unreadable += 1,
            }
        }
        if unreadable > 0 {
            tracing::error!(unreadable, "batches of losses rotted on disk: what they spoke of is not known");
        }
        let name = self.lanes[lane].settings.name.clone();
        let losses = losses::batch(&victims, &carried, unreadable, &self.settings, &name, now_us)?;
        let places = victims.iter().map(|waiting| waiting.place).collect::<Vec<Place>>();
        self.schemas.entry(schema.id()).or_insert_with(|| schema.canonical().to_owned());
        // Rows of losses are counted where they were made, so those that go are lost as rows, too.
        let mut totals = self.lanes[lane].totals;
        totals.lost += victims.iter().map(|waiting| u64::from(waiting.rows)).sum::<u64>();
        let payload = record::dropped(totals, &places, &losses);
        let appended = self.put(lane, record::DROPPED, &payload, &[schema.id()], true)?;
        self.lanes[lane].log.sync()?;
        self.lanes[lane].totals = totals;
        self.forget(lane, &places);
        self.admit(lane, appended.position, std::slice::from_ref(&losses));
        self.free_segments(lane)?;
        Ok(true)
    }

    fn earlier_losses(
        &mut self,
        victim: &Waiting,
        schema: &StreamSchema,
    ) -> Result<Option<arrow_array::RecordBatch>, SpoolError> {
        let Some(earlier) = self.read(victim.place)? else { return Ok(None) };
        if earlier.schema != schema.id() {
            return Ok(None);
        }
        let numbered = earlier.number(&self.settings.edge, self.id, Seq(1), 0);
        Ok(numbered.decode(schema).ok())
    }
}
