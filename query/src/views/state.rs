//! What a view knows: how far it has read, what time it is in its streams, and which stretches of event time it must ask
//! again. Pure: it has no clock and no I/O, and `now` is an argument.
//!
//! A [`Record`] of it travels with the rows that it stands for, in the same append: all rows that `sources` covers are
//! reflected, but for those whose times lie in `live` or `past`. So after a restart the newest record and the rows behind
//! it are all that is needed; what was emitted after the record is asked again, found equal, and not emitted twice.
//!
//! As JSON: `{"view": id of the question, "round": n, "watermark": µs or null, "sources": {stream: position},
//! "base": {…}, "live": [[from, to], …], "past": [[from, to], …]}`. `live` is what new rows touched, `past` history that
//! was not asked yet and what a back-dated revision of a reference table touched; `base` is where a view of single rows
//! began, as long as its `past` is not empty.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use wire::{Seq, SpoolId, StreamName};

use super::grid::Grid;
use super::intervals::Intervals;
use crate::follow::Position;

/// Stretches of time that are kept apart. Of more the nearest become one: it costs asking what lies between.
const STRETCHES_MAX: usize = 512;

/// Windows are not counted beyond this: it would take as long as it is useless.
const COUNT_MAX: u64 = 10_000;

/// Where every stream of a view has been read to.
pub(crate) type Positions = BTreeMap<StreamName, Position>;

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    pub(crate) view: String,
    pub(crate) round: u64,
    pub(crate) watermark: Option<i64>,
    pub(crate) sources: Positions,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) base: Positions,
    pub(crate) live: Intervals,
    pub(crate) past: Intervals,
}

/// What of a view's time may be asked now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Due {
    /// Windows that have closed.
    Closed,
    /// Open ones too.
    All,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct State {
    grid: Grid,
    lateness_us: i64,
    now: Record,
    /// Whether it has begun: whether it knows where its past ends.
    begun: bool,
    /// What the last record said, to tell whether another is due.
    recorded: Record,
}

impl State {
    /// Of a new view, or from the newest record of an older one.
    pub(crate) fn new(view: String, grid: Grid, lateness_us: i64, record: Option<Record>) -> Self {
        // The first record of all only says that the view is there.
        let begun = record.as_ref().is_some_and(|record| !record.sources.is_empty());
        let now = record.unwrap_or_else(|| Record { view, ..Record::default() });
        Self { grid, lateness_us, recorded: now.clone(), now, begun }
    }

    /// Whether it knows what its past is.
    pub(crate) fn begun(&self) -> bool {
        self.begun
    }

    /// It begins with rows from `first` on: what has closed is its past.
    pub(crate) fn begin(&mut self, first: Option<i64>, positions: Positions) {
        let first = first.map_or(i64::MIN, |first| self.grid.start(first));
        let closing = self.closing().unwrap_or(first).max(first);
        self.now.past = Intervals::of(first, closing);
        self.now.live = Intervals::of(closing, i64::MAX);
        self.now.sources = positions;
        self.begun = true;
    }

    /// A view of single rows begins: what is there, in this span of event time, is its past.
    pub(crate) fn begin_rows(&mut self, stream: &StreamName, position: Position, span: Option<(i64, i64)>) {
        if let Some((first, last)) = span {
            self.now.past = Intervals::of(self.grid.window(first).0, self.grid.window(last).1);
            self.now.base = BTreeMap::from([(stream.clone(), position.clone())]);
        }
        self.now.sources = BTreeMap::from([(stream.clone(), position)]);
        self.begun = true;
    }

    /// A view of single rows has read these batches, too.
    pub(crate) fn read(&mut self, stream: &StreamName, batches: impl IntoIterator<Item = (SpoolId, Seq)>) {
        let position = self.now.sources.entry(stream.clone()).or_default();
        batches.into_iter().for_each(|(spool, seq)| position.cover(spool, seq));
    }

    /// A view of single rows has read all up to here.
    pub(crate) fn read_to(&mut self, stream: &StreamName, position: Position) {
        self.now.sources.insert(stream.clone(), position);
    }

    /// Where a view of single rows began.
    pub(crate) fn base(&self, stream: &StreamName) -> Position {
        self.now.base.get(stream).cloned().unwrap_or_default()
    }

    /// Time goes on, and never back.
    pub(crate) fn observe(&mut self, watermark: Option<i64>) {
        self.now.watermark = self.now.watermark.max(watermark);
    }

    pub(crate) fn watermark(&self) -> Option<i64> {
        self.now.watermark
    }

    /// Before this every window has closed.
    pub(crate) fn closing(&mut self) -> Option<i64> {
        let settled = self.now.watermark?.saturating_sub(self.lateness_us);
        Some(self.grid.start(settled))
    }

    /// Where a stream has been read to.
    pub(crate) fn position(&self, stream: &StreamName) -> Option<&Position> {
        self.now.sources.get(stream)
    }

    /// A stream was read up to here; the rows since then have these times.
    pub(crate) fn saw(&mut self, stream: &StreamName, position: Position, times: impl Iterator<Item = i64>) {
        let mut last = None;
        for time in times {
            // Rows of one window come together, mostly.
            if last.is_some_and(|(start, end)| (start..end).contains(&time)) {
                continue;
            }
            let (start, end) = self.grid.window(time);
            self.now.live.insert(start, end);
            last = Some((start, end));
        }
        self.now.live.merge_to(STRETCHES_MAX);
        self.now.sources.insert(stream.clone(), position);
    }

    /// A reference table was read up to here; it changed from this time on.
    pub(crate) fn changed_from(&mut self, stream: &StreamName, position: Position, from: Option<i64>) {
        if let Some(from) = from {
            let from = self.grid.start(from);
            // What has not closed is live, whether rows touched it or not.
            let closing = self.closing().unwrap_or(from).max(from);
            self.now.past.insert(from, closing);
            self.now.live.insert(closing, i64::MAX);
        }
        self.now.sources.insert(stream.clone(), position);
    }

    /// What of the live time is due, and of the past.
    pub(crate) fn due(&mut self, due: Due) -> (Intervals, Intervals) {
        let limit = match due {
            Due::All => i64::MAX,
            Due::Closed => self.closing().unwrap_or(i64::MIN),
        };
        (self.now.live.within(i64::MIN, limit), self.now.past.within(i64::MIN, limit))
    }

    /// This is asked and emitted.
    pub(crate) fn done(&mut self, windows: &Intervals) {
        for (from, to) in windows.iter() {
            self.now.live.remove(from, to);
            self.now.past.remove(from, to);
        }
        if self.now.past.is_empty() {
            self.now.base.clear();
        }
    }

    /// The window of an instant.
    pub(crate) fn window(&mut self, at: i64) -> (i64, i64) {
        self.grid.window(at)
    }

    /// The first so many windows of these.
    pub(crate) fn first_of(&mut self, windows: &Intervals, count: usize) -> Intervals {
        self.grid.first(windows, count)
    }

    /// How many windows these are, at most [`COUNT_MAX`].
    pub(crate) fn count(&mut self, windows: &Intervals) -> u64 {
        let mut count = 0;
        for (from, to) in windows.iter() {
            let mut at = from;
            while at < to && count < COUNT_MAX {
                at = self.grid.window(at).1;
                count += 1;
            }
        }
        count
    }

    /// The stretches that are left.
    pub(crate) fn left(&self) -> (&Intervals, &Intervals) {
        (&self.now.live, &self.now.past)
    }

    /// Before this, nothing changes any more but by late rows: the watermark of whoever reads the view.
    pub(crate) fn settled(&mut self) -> Option<i64> {
        let closing = self.closing()?;
        let waiting = [&self.now.live, &self.now.past].into_iter().filter_map(Intervals::first).map(|(from, _)| from);
        waiting.min().map_or(Some(closing), |waiting| (waiting > i64::MIN).then_some(closing.min(waiting)))
    }

    /// What is to be kept with the rows of this round.
    pub(crate) fn record(&mut self) -> Record {
        self.now.round += 1;
        self.now.clone()
    }

    /// A record is durable.
    pub(crate) fn recorded(&mut self, record: Record) {
        self.recorded = record;
    }

    /// Whether more is known than the last record says.
    pub(crate) fn is_ahead(&self) -> bool {
        let Record { sources, live, past, .. } = &self.now;
        (sources, live, past) != (&self.recorded.sources, &self.recorded.live, &self.recorded.past)
    }
}

#[cfg(test)]
mod tests;
