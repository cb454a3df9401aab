//! What a policy takes out of a lane, and the rows of `losses` that say so, in one record.
//!
//! Only batches without a number go. Losses that go with them are summed into the new ones, so that they pin no segment;
//! so are the lane's last ones while they wait, within the hour. One that can no longer be read is a row of its own
//! (`losses_unreadable`): how much it spoke of is not known. Rows of `losses` are no data: they are not counted as lost,
//! but [`made`](super::RowCounts::made) here.

use segment_log::FileLayer;
use wire::schema::own;
use wire::{Seq, StreamSchema};

use super::record::{self, Place};
use super::{Spool, SpoolError, Waiting, losses};
use crate::clock::Step;

/// Batches that one `dropped` record names at most, so that it fits in the reserve.
pub(super) const DROPPED_MAX: usize = 512;

impl<L: FileLayer> Spool<L> {
    /// Drops what waits for longer than its lane's `max_age`; true when there may be more. What was sealed when the clock
    /// stood before 2000, or was not known, has no age; and nothing ages by a step of the clock.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn drop_aged(&mut self, now_us: i64, steps: &[Step]) -> Result<bool, SpoolError> {
        let mut more = false;
        for lane in 0..self.lanes.len() {
            let Some(max_age_us) = self.lanes[lane].settings.max_age_us else { continue };
            let age = |waiting: &Waiting| {
                let sealed_us = waiting.sealed_us;
                let since = steps.iter().filter(|step| step.before_us >= sealed_us).map(|step| step.by_us);
                let age_us = now_us.saturating_sub(sealed_us).saturating_sub(since.fold(0, i64::saturating_add));
                (wire::TS_MIN_US..record::SEALED_UNKNOWN).contains(&sealed_us).then_some(age_us)
            };
            let is_young = |waiting: &Waiting| age(waiting).is_some_and(|age_us| age_us <= max_age_us);
            let is_old = |waiting: &Waiting| age(waiting).is_some_and(|age_us| age_us > max_age_us);
            // Steps only make younger.
            let until = now_us.saturating_sub(max_age_us);
            let super::Lane { waiting, log, .. } = &mut self.lanes[lane];
            let streams = waiting.streams().filter(|(stream, _)| stream.as_str() != own::LOSSES);
            let streams = streams.filter(|(_, queue)| queue.oldest_us() < until);
            let streams = streams.map(|(stream, _)| stream.clone()).collect::<Vec<_>>();
            let mut victims = Vec::new();
            for stream in &streams {
                let visit = |waiting: Waiting| {
                    let goes_on = !is_young(&waiting) && victims.len() < DROPPED_MAX;
                    if goes_on && is_old(&waiting) {
                        victims.push(waiting);
                    }
                    goes_on
                };
                waiting.walk(log, stream, (u64::MAX, false), visit).map_err(SpoolError::Read)?;
            }
            if victims.is_empty() {
                continue;
            }
            more |= victims.len() == DROPPED_MAX;
            match self.take_out(lane, victims, losses::TOO_OLD, now_us) {
                // Not even the reserve has room: at the next try, perhaps.
                Err(SpoolError::Full(_)) => more = false,
                other => other?,
            }
            self.free_segments(lane)?;
        }
        Ok(more)
    }

    /// Takes batches that wait out of a lane and writes what was lost, synced.
    pub(super) fn take_out(
        &mut self,
        lane: usize,
        mut victims: Vec<Waiting>,
        reason: &str,
        now_us: i64,
    ) -> Result<(), SpoolError> {
        victims
            .extend(self.last_losses(lane, now_us)?.filter(|last| victims.iter().all(|one| one.place != last.place)));
        let schema = losses::schema();
        let (mut carried, mut unreadable) = (Vec::new(), 0);
        for victim in victims.iter().filter(|waiting| waiting.stream.as_str() == own::LOSSES) {
            match self.earlier_losses(victim, &schema)? {
                Some(rows) => carried.push(rows),
                None => unreadable += 1,
            }
        }
        if unreadable > 0 {
            tracing::error!(unreadable, "batches of losses rotted on disk: what they spoke of is not known");
        }
        let name = self.lanes[lane].settings.name.clone();
        let losses = losses::batch(&victims, &carried, unreadable, &self.settings, (&name, reason), now_us)?;
        let places = victims.iter().map(|waiting| waiting.place).collect::<Vec<Place>>();
        self.schemas.entry(schema.id()).or_insert_with(|| schema.canonical().to_owned());
        let mut totals = self.lanes[lane].totals;
        totals.made += i64::from(losses.rows);
        for victim in &victims {
            if victim.stream.as_str() == own::LOSSES {
                totals.made -= i64::from(victim.rows);
            } else {
                totals.lost += u64::from(victim.rows);
            }
        }
        let payload = record::dropped(totals, &places, &losses);
        let appended = self.put(lane, record::DROPPED, &payload, &[schema.id()], true)?;
        self.lanes[lane].log.sync()?;
        self.lanes[lane].totals = totals;
        self.forget(lane, &places)?;
        self.admit_losses(lane, appended.position, &losses);
        Ok(())
    }

    /// What a drop wrote last, if it waits and is of this hour.
    fn last_losses(&mut self, lane: usize, now_us: i64) -> Result<Option<Waiting>, SpoolError> {
        let super::Lane { losses, waiting, log, .. } = &mut self.lanes[lane];
        let now_us = now_us.max(wire::TS_MIN_US);
        match *losses {
            Some((place, hour)) if hour == now_us.div_euclid(losses::JOIN_US) => {
                waiting.find(log, None, place).map_err(SpoolError::Read)
            }
            _ => Ok(None),
        }
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
