//! While a lane that refuses is full, the pipeline waits with what it has cut for it (rule 7). A second one, made from the
//! first as it stands, goes on for the other lanes: rules go on, alerts are published, windows and alerts are spooled,
//! until the journal is full, too.
//!
//! Both read the same journal and so find the same (rule 1). A forerunner's cuts put its lanes ahead of the pipeline, as a
//! crash between two lanes does; the pipeline passes over what they have when it comes by, and tells nothing again. When it
//! has caught up with the last of those cuts the forerunner ends, and what that has not cut is found again. It is never in
//! a snapshot, and stands still before another configuration, which is the pipeline's to take.
//! Limit: it takes as much memory as the pipeline's state, once more.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use bytes::Bytes;
use segment_log::{Disk, Position, ReadError, Reader};

use super::clock::{ClockAhead, tell_spool};
use super::cut::is_full;
use super::{ENTRIES_PER_TURN, Engine, EngineError, RETRY, STATUS_EVERY};
use crate::entry::Entry;
use crate::pipeline::{LaneCut, Pipeline};
use crate::spool::SpoolError;

/// One that misses a lane which has room again is made anew, so often at most: it reads all that waits.
const RENEW_EVERY: Duration = Duration::from_secs(5);

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Forerunner {
    pub(super) pipeline: Pipeline,
    reader: Reader<Disk>,
    ahead: ClockAhead,
    begun: Instant,
    /// Where it cut last.
    cut: Position,
    pending_since: Option<Instant>,
    /// Lanes for which it keeps nothing.
    full: HashSet<usize>,
    /// Of lanes that became full under it; while the pipeline stands they are tried again.
    pub(super) held: Vec<(Position, usize, LaneCut)>,
    /// Another configuration comes next.
    pub(super) stands: bool,
}

impl Engine {
    /// Lets a forerunner go on while the pipeline waits, or is behind it. Returns how long nothing is due for it.
    pub(super) fn forerun(&mut self) -> Result<Duration, EngineError> {
        let misses = |runner: &mut Forerunner| runner.full.iter().any(|lane| !self.full_lanes.contains(lane));
        if !self.held.is_empty() {
            self.forerunner.take_if(|runner| runner.begun.elapsed() >= RENEW_EVERY && misses(runner));
        }
        let Some(mut runner) =
            self.forerunner.take().map_or_else(|| self.begin_forerun(), |runner| Ok(Some(runner)))?
        else {
            return Ok(STATUS_EVERY);
        };
        if self.held.is_empty() {
            // The pipeline has come by, or will.
            runner.held.clear();
        }
        self.write_ahead(&mut runner)?;
        let more = self.read_ahead(&mut runner)?;
        let due = self.cut_ahead(&mut runner)?;
        let wait = if runner.held.is_empty() { due } else { due.min(RETRY) };
        self.forerunner = Some(runner);
        Ok(if more { Duration::ZERO } else { wait })
    }

    /// Ends a forerunner with whose last cut the pipeline has caught up.
    pub(super) fn end_forerun(&mut self) {
        let position = self.parts.pipeline.position();
        if self.forerunner.take_if(|runner| position >= runner.cut).is_some() {
            tracing::info!("the pipeline has caught up with the lanes that went ahead");
        }
    }

    fn begin_forerun(&mut self) -> Result<Option<Forerunner>, EngineError> {
        let parts = &self.parts;
        if self.held.is_empty() || self.next.is_some() {
            return Ok(None);
        }
        let full = self.held.iter().map(|(lane, _)| *lane).collect::<HashSet<_>>();
        let lanes = parts.spool.cut_positions();
        let Some(pipeline) = parts.pipeline.forerunner(&parts.in_force, lanes, full.iter().copied())? else {
            return Ok(None);
        };
        let cut = pipeline.position();
        Ok(Some(Forerunner {
            reader: parts.journal.reader(cut)?,
            pipeline,
            ahead: ClockAhead::default(),
            begun: Instant::now(),
            cut,
            pending_since: None,
            full,
            held: Vec::new(),
            stands: false,
        }))
    }

    /// Applies entries; true when there may be more to apply at once.
    fn read_ahead(&mut self, runner: &mut Forerunner) -> Result<bool, EngineError> {
        let Forerunner { pipeline, reader, .. } = runner;
        let parts = &self.parts;
        for _ in 0..ENTRIES_PER_TURN {
            if runner.stands {
                return Ok(false);
            }
            if is_full(pipeline, &parts.cut) {
                return Ok(true);
            }
            if pipeline.waits_for_clock()
                && let Some(more) = runner.ahead.find(&parts.journal, pipeline)?
            {
                return Ok(more);
            }
            match reader.next() {
                Ok(Some(record)) => {
                    let (position, next) = (record.position, record.next);
                    let is_told = position < self.told_until;
                    if !self.replayed && position >= self.found_until {
                        pipeline.take_commands();
                        self.replayed = true;
                    }
                    match Entry::read(Bytes::copy_from_slice(record.payload)) {
                        Ok(Entry::Configured { version, .. }) if version != parts.in_force.version => {
                            runner.stands = true;
                            continue;
                        }
                        Ok(entry) => pipeline.apply(position, next, &entry),
                        // The pipeline reports it when it comes there.
                        Err(_) => pipeline.damaged(position, next),
                    }
                    if is_told {
                        pipeline.take_commands();
                    } else if let Some(outbox) = &parts.outbox {
                        let found = pipeline.take_alerts();
                        self.replay.applied(position, found, outbox, || pipeline.published());
                    }
                    self.told_until = self.told_until.max(next);
                }
                Ok(None) => {
                    if let Some(outbox) = &parts.outbox {
                        self.replay.end(outbox, || pipeline.published());
                    }
                    return Ok(false);
                }
                Err(ReadError::Damaged { from, to }) => pipeline.damaged(from, to),
                Err(error) => return Err(error.into()),
            }
            if runner.pending_since.is_none() && pipeline.pending_rows() > 0 {
                runner.pending_since = Some(Instant::now());
            }
        }
        Ok(true)
    }

    /// Cuts when that is due; returns how long that is away.
    fn cut_ahead(&mut self, runner: &mut Forerunner) -> Result<Duration, EngineError> {
        let Some(since) = runner.pending_since else { return Ok(STATUS_EVERY) };
        let due = self.cut_is_due(since, is_full(&runner.pipeline, &self.parts.cut));
        let now = Instant::now();
        if due > now {
            return Ok(due - now);
        }
        runner.pending_since = None;
        let cut = runner.pipeline.cut()?;
        runner.cut = cut.position;
        (self.last_cut, self.marked) = (now, false);
        let lanes = cut.lanes.into_iter().enumerate().filter(|(_, lane)| !lane.batches.is_empty());
        runner.held.extend(lanes.map(|(lane, rows)| (cut.position, lane, rows)));
        self.write_ahead(runner)?;
        Ok(STATUS_EVERY)
    }

    /// Writes what a cut gives to each lane. One that is full gets nothing more from here: what comes behind would leave a gap.
    fn write_ahead(&mut self, runner: &mut Forerunner) -> Result<(), EngineError> {
        for (position, lane, cut) in std::mem::take(&mut runner.held) {
            let parts = &mut self.parts;
            let now_us = tell_spool(&mut parts.spool, &parts.journal, &runner.pipeline);
            match parts.spool.append(lane, position, &cut.batches, &cut.schemas, now_us) {
                Ok(()) => {
                    parts.pipeline.lane_stands(lane, position);
                    self.has_room(lane);
                }
                Err(SpoolError::Full(name)) => {
                    runner.pipeline.lane_stands(lane, Position(u64::MAX));
                    runner.full.insert(lane);
                    runner.held.push((position, lane, cut));
                    self.is_full(lane, &name);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
