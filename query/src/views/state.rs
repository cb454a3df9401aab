//! What a view knows: how far it has read, what time it is in its streams, and which stretches of event time it must ask
//! again. Pure: it has no clock and no I/O, and `now` is an argument.
//!
//! A [`Record`] of it travels with the rows that it stands for, in the same append: all rows that `sources` covers are
//! reflected, but for those whose times lie in `live` or `past`. So after a restart the newest record and the rows behind
//! it are all that is needed; what was emitted after the record is asked again, found equal, and not emitted twice.
//!
//! As JSON: `{"view": id of the question, "round": n, "watermark": µs or null, "sources": {stream: position},
//! "base": {…}, "since": {…}, "live": [[from, to], …], "past": [[from, to], …], "columns": {column: type}}`. `live` is what
//! new rows touched, `past` history that was not asked yet and what a back-dated revision of a reference table touched.
//! For a view of single rows `past` are rows that `base` covers and `since` does not: what was there when it began, or was
//! committed while it did not look. `columns` are those that the question reads, as `stream.column`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use wire::{Seq, SpoolId, StreamName};

use super::grid::Grid;
use super::intervals::Intervals;
use crate::follow::Position;

/// Stretches of time that are kept apart. Of more the nearest become one: it costs asking what lies between.
pub(crate) const STRETCHES_MAX: usize = 512;

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
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) since: Positions,
    pub(crate) live: Intervals,
    pub(crate) past: Intervals,
    #[serde(default)]
    pub(crate) columns: BTreeMap<String, String>,
}

impl Record {
    /// Whether the view knew what its past is. The first record of all only says that it is there.
    pub(crate) fn begun(&self) -> bool {
        !self.sources.is_empty()
    }
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
        let begun = record.as_ref().is_some_and(Record::begun);
        let now = record.unwrap_or_else(|| Record { view, ..Record::default() });
        Self { grid, lateness_us, recorded: now.clone(), now, begun }
    }

    /// Whether it knows what its past is.
    pub(crate) fn begun(&self) -> bool {
        self.begun
    }

    /// It begins with rows from `first` on: what has closed is its past.
    pub(crate) fn begin(&mut self, first: Option<i64>, positions: Positions) {
        let first = first.map_or(i64::MIN, |first| self.grid.touched(first, first).0);
        let closing = self.closing().unwrap_or(first).max(first);
        self.now.past = Intervals::of(first, closing);
        self.now.live = Intervals::of(closing, i64::MAX);
        self.now.sources = positions;
        self.begun = true;
    }

    /// A view of single rows has its past before it: what `to` covers and `since` does not, all of which lies between these
    /// event times, the last included.
    pub(crate) fn catch_up(
        &mut self,
        stream: &StreamName,
        [since, to]: [Position; 2],
        times: impl IntoIterator<Item = (i64, i64)>,
    ) {
        for (first, last) in times {
            let (from, to) = self.grid.touched(first, last);
            self.now.past.insert(from, to);
        }
        self.now.past.merge_to(STRETCHES_MAX);
        if !self.now.past.is_empty() {
            self.now.base = BTreeMap::from([(stream.clone(), to.clone())]);
            self.now.since = BTreeMap::from([(stream.clone(), since)]);
        }
        self.now.sources = BTreeMap::from([(stream.clone(), to)]);
        self.begun = true;
    }

    /// Everything is asked again.
    pub(crate) fn ask_again(&mut self) {
        if self.begun {
            let closing = self.closing().unwrap_or(i64::MAX);
            self.now.past = Intervals::of(i64::MIN, closing);
            self.now.live = Intervals::of(closing, i64::MAX);
        }
    }

    /// The columns that the question reads, by the newest record; and from now on.
    pub(crate) fn columns(&mut self) -> &mut BTreeMap<String, String> {
        &mut self.now.columns
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

    /// Whether a batch is part of the past of a view of single rows.
    pub(crate) fn is_past(&self, stream: &StreamName, spool: SpoolId, seq: Seq) -> bool {
        let covers = |positions: &Positions| positions.get(stream).is_some_and(|position| position.covers(spool, seq));
        covers(&self.now.base) && !covers(&self.now.since)
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
        Some(self.grid.closing(settled))
    }

    /// Where a stream has been read to.
    pub(crate) fn position(&self, stream: &StreamName) -> Option<&Position> {
        self.now.sources.get(stream)
    }

    /// A stream was read up to here; the rows since then touched these windows.
    pub(crate) fn saw(&mut self, stream: &StreamName, position: Position, touched: &Intervals) {
        self.now.live.add(touched);
        self.now.live.merge_to(STRETCHES_MAX);
        self.now.sources.insert(stream.clone(), position);
    }

    /// A reference table was read up to here; it changed from this time on.
    pub(crate) fn changed_from(&mut self, stream: &StreamName, position: Position, from: Option<i64>) {
        if let Some(from) = from {
            let from = self.grid.touched(from, from).0;
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
            self.now.since.clear();
        }
    }

    /// Its windows.
    pub(crate) fn grid(&mut self) -> &mut Grid {
        &mut self.grid
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
                at = self.grid.slot(at).1;
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
