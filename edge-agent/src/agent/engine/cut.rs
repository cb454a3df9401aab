//! When pending rows are cut, and how a cut gets into its lanes: a full lane that refuses holds back its part.

use std::time::{Duration, Instant};

use super::clock::tell_spool;
use super::{Engine, EngineError, PENDING_BYTES_MAX, STATUS_EVERY};
use crate::config::CutSettings;
use crate::pipeline::Pipeline;
use crate::spool::SpoolError;

impl Engine {
    /// Cuts when rows wait and it is time: at `seal_min` when the cloud has been given all that is live, and at the latest
    /// when a batch is full or `seal_max` is over; without the cloud, or on a link where a request takes longer than that,
    /// up to `seal_away`. Returns how long that is away.
    pub(super) fn cut_when_due(&mut self) -> Result<Duration, EngineError> {
        let Some(since) = self.pending_since else { return Ok(STATUS_EVERY) };
        if !self.held.is_empty() || !self.parts.pipeline.may_cut() {
            return Ok(STATUS_EVERY);
        }
        let full = is_full(&self.parts.pipeline, &self.parts.cut);
        let due = self.cut_is_due(since, full);
        let now = Instant::now();
        if due > now {
            return Ok(due - now);
        }
        self.cut()?;
        Ok(Duration::ZERO)
    }

    /// When what is pending since then is cut.
    pub(super) fn cut_is_due(&self, since: Instant, full: bool) -> Instant {
        let parts = &self.parts;
        let has_room = !parts.spool.has_live();
        let slow = match parts.uplink.node().0 {
            Some(_) => Duration::from_millis(parts.uplink.link.last_ms()),
            None => Duration::MAX,
        };
        let seal_max = parts.cut.seal_max.0.max(slow.min(parts.cut.seal_away.0));
        let after = if full || has_room { Duration::ZERO } else { seal_max };
        let seal_min = if full { Duration::ZERO } else { parts.cut.seal_min.0 };
        (since + after).max(self.last_cut + seal_min)
    }

    pub(super) fn cut(&mut self) -> Result<(), EngineError> {
        self.pending_since = None;
        if self.parts.pipeline.pending_rows() == 0 {
            return Ok(());
        }
        let cut = self.parts.pipeline.cut()?;
        self.last_cut = Instant::now();
        self.marked = false;
        self.held_position = cut.position;
        // A lane that gets nothing needs no record: applied again, these entries give it nothing again.
        self.held = cut.lanes.into_iter().enumerate().filter(|(_, lane)| !lane.batches.is_empty()).collect();
        self.write_held()
    }

    /// Writes what a cut gives to each lane; a full lane that refuses holds it back, and reading stops.
    pub(super) fn write_held(&mut self) -> Result<(), EngineError> {
        let mut held = Vec::new();
        let now_us = tell_spool(&mut self.parts.spool, &self.parts.journal, &self.parts.pipeline);
        for (lane, cut) in std::mem::take(&mut self.held) {
            match self.parts.spool.append(lane, self.held_position, &cut.batches, &cut.schemas, now_us) {
                Ok(()) => self.has_room(lane),
                Err(SpoolError::Full(name)) => {
                    self.is_full(lane, &name);
                    held.push((lane, cut));
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.held = held;
        Ok(())
    }

    pub(super) fn has_room(&mut self, lane: usize) {
        if self.full_lanes.remove(&lane) {
            tracing::info!(lane, "the lane has room again");
        }
    }

    pub(super) fn is_full(&mut self, lane: usize, name: &str) {
        if self.full_lanes.insert(lane) {
            tracing::warn!(lane = %name, "the lane is full: what comes for it waits in the journal");
        }
    }
}

/// Whether the pending rows are a batch.
pub(super) fn is_full(pipeline: &Pipeline, cut: &CutSettings) -> bool {
    pipeline.pending_rows() >= cut.rows || pipeline.pending_bytes() >= PENDING_BYTES_MAX
}
