//! From a decoded reading to rows of its stream: checks, repeats, readings that wait, silent devices, and what is made up
//! for gaps.
//!
//! What goes by time while nothing comes goes by [`Clock`], which counts the time between entries of the journal. A longer
//! time than between two ticks was none in which the agent listened, or a step of the gateway's clock: it counts as little
//! as one.

use segment_log::Position;
use serde::{Deserialize, Serialize};
use wire::TS_MIN_US;

use super::output::Cell;
use super::{GOOD, IMPUTED, Pipeline, cells_bytes};
use crate::decode::Reading;
use crate::entry::Message;
use crate::validate::{Absence, Fault, Held, Judge, Outcome};

/// While the time is a guess, it may be so much later than that.
const GUESS_OFF_MAX_US: i64 = 10 * 366 * 86_400 * 1_000_000;

/// The time that the agent has listened, in µs, and what the gateway's clock said last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Clock {
    listened_us: i64,
    last_us: Option<i64>,
}

impl Pipeline {
    /// Judges a reading of a message, and writes what it brings besides itself. What rows take is added to `taken`: the rows
    /// of one message, made up ones included, must fit into one record of a lane.
    pub(super) fn judge(
        &mut self,
        position: Position,
        stream: usize,
        reading: &mut Reading,
        taken: &mut usize,
    ) -> Result<Outcome, Fault> {
        let bytes = cells_bytes(&reading.values);
        if bytes > self.row_bytes_max {
            return Err(("too_large", format!("its values take {bytes} bytes, a row at most {}", self.row_bytes_max)));
        }
        // A reading that has its own time is not to blame for a gateway that does not know it.
        let arrival_us = match self.told.is_guess() {
            true => reading.ts.min(self.now_us.saturating_add(GUESS_OFF_MAX_US)),
            false => self.now_us,
        };
        let (clock, own) = (self.clock.listened_us, &mut self.streams[stream]);
        let watermark = own.windows.watermark();
        let mut outcome = own.judge.judge(reading, arrival_us, clock, watermark, &mut self.quality)?;
        if let Outcome::Keep { back, made_up } = &mut outcome {
            *taken += reading.device.len() + bytes;
            let in_windows = own.fill_in_windows;
            if let Some(back) = back.take() {
                self.absence(position, stream, &back);
            }
            for reading in std::mem::take(made_up) {
                if *taken > self.row_bytes_max {
                    break;
                }
                *taken += reading.device.len() + cells_bytes(&reading.values);
                let name = &self.outputs[self.streams[stream].output].stream;
                self.counters.stream(name).imputed += 1;
                self.row(position, stream, &reading, IMPUTED, in_windows);
            }
        }
        Ok(outcome)
    }

    /// A reading that no check rejected becomes a row, now or when it has waited.
    pub(super) fn keep(&mut self, position: Position, message: &Message, stream: usize, reading: Reading) {
        let totals = self.counters.source(&message.source);
        totals.read += 1;
        if !self.streams[stream].judge.waits {
            totals.accepted += 1;
            let quality = std::mem::take(&mut self.quality);
            self.accepted(position, stream, &reading, quality.as_str());
            self.quality = quality;
            self.streams[stream].last = Some(reading);
            return;
        }
        totals.waiting += 1;
        let held = Held { source: message.source.clone(), reading, quality: self.quality.take() };
        let clock = self.clock.listened_us;
        let replaced = self.streams[stream].judge.hold.as_mut().and_then(|hold| hold.put(held, clock));
        if let Some(replaced) = replaced {
            let totals = self.counters.source(&replaced.source);
            totals.waiting -= 1;
            totals.duplicate += 1;
        }
        self.release(position, stream);
    }

    /// Readings that have waited go on.
    fn release(&mut self, position: Position, stream: usize) {
        self.release_until(position, stream, self.clock.listened_us);
    }

    pub(super) fn release_until(&mut self, position: Position, stream: usize, clock: i64) {
        while let Some(held) = self.streams[stream].judge.hold.as_mut().and_then(|hold| hold.due(clock)) {
            let totals = self.counters.source(&held.source);
            totals.waiting -= 1;
            totals.accepted += 1;
            self.accepted(position, stream, &held.reading, &held.quality);
            self.streams[stream].last = Some(held.reading);
        }
    }

    fn accepted(&mut self, position: Position, stream: usize, reading: &Reading, quality: &str) {
        if !quality.is_empty() {
            let name = &self.outputs[self.streams[stream].output].stream;
            self.counters.stream(name).flagged += 1;
        }
        self.row(position, stream, reading, quality, true);
        self.judge_reading(position, stream, reading);
    }

    /// What is due by the time alone.
    pub(super) fn advance_clock(&mut self, position: Position, now_us: i64) {
        if self.by_clock.is_empty() {
            return;
        }
        let passed = self.clock.last_us.map_or(0, |last| now_us.saturating_sub(last).clamp(0, self.clock_step_us));
        self.clock = Clock { listened_us: self.clock.listened_us + passed, last_us: Some(now_us) };
        for index in 0..self.by_clock.len() {
            let stream = self.by_clock[index];
            if self.streams[stream].judge.hold.is_some() {
                self.release(position, stream);
                self.close_windows(position, stream);
            }
            self.absences(position, stream);
        }
    }

    /// The streams in which something goes by the clock.
    pub(super) fn find_by_clock(&mut self) {
        let goes = |judge: &Judge| judge.hold.is_some() || judge.expects();
        let streams = self.streams.iter().enumerate().filter(|(_, stream)| goes(&stream.judge));
        self.by_clock = streams.map(|(index, _)| index).collect();
    }

    /// Tells which devices have become absent.
    pub(super) fn absences(&mut self, position: Position, stream: usize) {
        let (clock, own) = (self.clock.listened_us, &mut self.streams[stream]);
        let watermark = own.windows.watermark();
        for mut absence in own.judge.absent(watermark, clock) {
            if absence.last_ts == i64::MIN {
                absence.ts = self.now_us;
            }
            self.absence(position, stream, &absence);
        }
    }

    fn absence(&mut self, position: Position, stream: usize, absence: &Absence) {
        let own = &self.streams[stream];
        let Some(output) = own.absent_output else { return };
        let output = &mut self.outputs[output];
        output.watermark = output.watermark.max(own.windows.watermark());
        self.counters.stream(&output.stream).rows += 1;
        let every_s = absence.every_us as f64 / 1e6;
        if position >= output.skip_before {
            let before = output.bytes();
            let last_ts = (absence.last_ts != i64::MIN).then(|| Cell::Time(absence.last_ts.max(TS_MIN_US)));
            let cells = [Cell::Text(absence.state), last_ts.unwrap_or(Cell::Null), Cell::Float(every_s)];
            output.push(absence.ts.max(TS_MIN_US), Some(&absence.device), cells.into_iter(), GOOD);
            self.pending_rows += 1;
            self.pending_bytes += output.bytes() - before;
        }
        self.judge_absence(position, stream, absence, every_s);
    }
}
