//! Keeps one view: follows its streams, asks what is due, and appends what is new to its stream.
//!
//! A [`Runner`] has one owner and does one [`round`](Runner::round) at a time. What it read of clocks and facts about spools
//! is from before the states it froze, so that a watermark never runs ahead of the rows that it counts on. All of a round
//! is over the same frozen states. Nothing is remembered that is not in the view's own stream: whoever opens it again
//! (after a crash, or an append whose end nobody knows) goes on from the newest record there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use arrow_array::cast::AsArray;
use arrow_array::types::TimestampMicrosecondType;
use arrow_array::{Array, RecordBatch};
use datafusion::datasource::provider_as_source;
use datafusion::functions_aggregate::first_last::last_value_udaf;
use datafusion::logical_expr::{ExprFunctionExt, LogicalPlanBuilder};
use datafusion::prelude::{col, lit};
use wire::StreamName;
use wire::ids::OWN_EDGE;
use wire::reference::VALID_FROM;
use wire::schema::{EDGE, SEQ, SPOOL, TS};

use super::columns::{EMPTY, POSITION, WINDOW};
#[cfg(test)]
use super::definition::Emit;
use super::emitted::Emitted;
use super::grid::Grid;
use super::intervals::Intervals;
use super::partials::Partials;
use super::shape::Kept;
use super::state::{Record, State};
use super::view::View;
use super::watermark::{self, Heard, Moment};
use crate::engine::{Engine, QueryError, States};
use crate::follow::Position;
use crate::fused_table::LiveTable;
use crate::sink::{Sink, SinkError};
use aside::Aside;
use parts::Sides;

mod aside;
mod parts;
mod rows;
mod windows;
mod write;

/// Pieces of what is due that one round asks, before it writes down how far it came.
const PIECES_MAX: usize = 16;
/// A piece that took less is followed by one twice as long, and one that took more by a shorter one.
const PIECE_SHORT: Duration = Duration::from_millis(200);
const PIECE_LONG: Duration = Duration::from_secs(2);

/// Rows per second are told over so long at least, µs.
const RATE_OVER_US: i64 = 5_000_000;

/// Limits of one view.
#[derive(Debug, Clone)]
pub(crate) struct RunLimits {
    /// Of one answer, and so of one piece of event time.
    pub(crate) rows_max: usize,
    pub(crate) bytes_max: usize,
    /// Windows whose last word is remembered.
    pub(crate) windows_max: usize,
    /// Memory for what was computed of windows that are asked more than once.
    pub(crate) partials_bytes_max: usize,
    /// How often what has been read is written down when nothing was emitted.
    pub(crate) record_every_us: i64,
}

/// Why a view does not go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ViewError {
    #[error(transparent)]
    Query(#[from] QueryError),
    #[error("append to its stream: {0}")]
    Sink(#[from] SinkError),
    #[error("{0}")]
    Stuck(String),
}

impl ViewError {
    fn table(error: impl std::fmt::Display) -> Self {
        Self::Stuck(error.to_string())
    }
}

/// Until when the results of another view no longer change, but by late rows.
pub(crate) type Settled = Arc<dyn Fn(&StreamName) -> Option<i64> + Send + Sync>;

/// What a view tells of itself, for `system.views`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Progress {
    pub(crate) begun: bool,
    pub(crate) watermark: Option<i64>,
    /// The edge that the watermark waits for, when one is heard.
    pub(crate) held_by: Option<String>,
    pub(crate) settled: Option<i64>,
    /// Windows that must be asked again, up to the last row.
    pub(crate) dirty_windows: u64,
    /// From when to when of its past is left.
    pub(crate) past: Option<(i64, i64)>,
    pub(crate) rows_in: u64,
    /// Of late; None while it has not been measured for long enough.
    pub(crate) rows_per_second: Option<f64>,
    pub(crate) rows_out: u64,
    pub(crate) revisions: u64,
    pub(crate) memory_bytes: u64,
    pub(crate) computed: Duration,
    /// The last window that could not be told, and why.
    pub(crate) refused: Option<String>,
    /// Windows that wait because they are too much, and why.
    pub(crate) aside: Option<String>,
}

impl Progress {
    /// What people should know of a view that goes on.
    pub(crate) fn reason(&self) -> Option<String> {
        self.aside.clone().or_else(|| self.refused.clone())
    }
}

/// What a round did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Round {
    /// Something more is due at once.
    More,
    /// All that was due is done.
    Done,
}

/// See the module.
pub(crate) struct Runner {
    engine: Arc<Engine>,
    sink: Arc<dyn Sink>,
    view: Arc<View>,
    settled: Settled,
    limits: RunLimits,
    state: State,
    emitted: Emitted,
    partials: Partials,
    /// What new rows are joined with, by where the reference tables stand; None of it when it is too much.
    sides: Option<(Vec<Option<Position>>, Option<Sides>)>,
    /// Windows of one piece.
    piece: usize,
    now: Moment,
    heard: Heard,
    /// Windows that were too much alone.
    aside: Aside,
    /// When something was recorded last, and open windows asked: by the clock that only goes on.
    recorded_us: i64,
    updated_us: Option<i64>,
    /// When rows were counted last, by the same clock, and how many there were.
    counted: (i64, u64),
    progress: Progress,
}

impl std::fmt::Debug for Runner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runner")
            .field("view", &self.view.definition.name)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

/// Frozen states of one round, and the ends of what is in those that the view follows.
struct Seen {
    states: States,
    /// The first and last event time of all rows.
    span: Option<(i64, i64)>,
}

impl Runner {
    /// Goes on where the view's stream says that it was, or begins.
    ///
    /// # Errors
    /// When the stream cannot be read, or holds the results of another question.
    pub(crate) async fn open(
        engine: Arc<Engine>,
        sink: Arc<dyn Sink>,
        view: Arc<View>,
        settled: Settled,
        limits: RunLimits,
        now: Moment,
    ) -> Result<Self, ViewError> {
        let id = view.definition.id();
        let record = newest_record(&engine, &view).await?;
        if record.as_ref().is_some_and(|record| record.view != id) {
            let (changes, name) = (&view.changes, &view.definition.name);
            return Err(ViewError::Stuck(format!(
                "{changes} holds the results of another question that was called {name}: choose another name"
            )));
        }
        let (is_new, begun) = (record.is_none(), record.as_ref().is_some_and(Record::begun));
        let (grid, lateness_us) = match &view.shape.kept {
            Kept::Windows { grid, .. } => (grid.clone(), view.definition.lateness_us),
            Kept::Rows { .. } => (Grid::seconds(), 0),
        };
        let mut runner = Self {
            state: State::new(id, grid, lateness_us, record),
            emitted: Emitted::new(limits.windows_max),
            partials: Partials::new(limits.partials_bytes_max),
            sides: None,
            piece: 1,
            now,
            heard: Heard::default(),
            aside: Aside::default(),
            recorded_us: i64::MIN,
            updated_us: None,
            counted: (now.since_us, 0),
            progress: Progress::default(),
            engine,
            sink,
            view,
            settled,
            limits,
        };
        runner.over_these_columns(begun)?;
        if is_new {
            runner.emitted.learn(&Intervals::of(i64::MIN, i64::MAX), []);
            // Its stream is there from now on, for other views and for who follows it.
            runner.note().await?;
        }
        Ok(runner)
    }

    /// Goes on over columns that have other types than those of the newest record: everything is asked again.
    fn over_these_columns(&mut self, begun: bool) -> Result<(), ViewError> {
        let read = &self.view.read;
        let before = std::mem::replace(self.state.columns(), read.clone());
        let other = before.iter().find_map(|(column, kind)| {
            let now = read.get(column).filter(|now| *now != kind)?;
            Some(format!("{column} was {kind}, and is {now} now"))
        });
        match (&self.view.shape.kept, other) {
            (Kept::Rows { .. }, Some(other)) if begun => Err(ViewError::Stuck(format!(
                "{other}: rows that it has told stay as they were; drop it, and create it under another name"
            ))),
            (Kept::Windows { .. }, _) if before != *read => {
                self.state.ask_again();
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// What it tells of itself.
    pub(crate) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// What the view shows as its question would: closed windows that need not be asked again.
    #[cfg(test)]
    pub(crate) fn closed(&mut self) -> Intervals {
        let end = match self.view.definition.emit {
            _ if !self.state.begun() => i64::MIN,
            Emit::Final => self.state.closing().unwrap_or(i64::MIN),
            Emit::Update => i64::MAX,
        };
        Intervals::of(i64::MIN, end).without(&self.left_to_do())
    }

    /// What must be asked, now or when it has closed.
    #[cfg(test)]
    pub(crate) fn left_to_do(&self) -> Intervals {
        let (live, past) = self.state.left();
        let mut left = live.clone();
        left.add(past);
        left
    }

    /// One turn, at this moment.
    ///
    /// # Errors
    /// Why it did not go on. It must be opened again: what is durable is in its stream.
    pub(crate) async fn round(&mut self, now: Moment) -> Result<Round, ViewError> {
        self.now = now;
        let facts = self.engine.tables().spools_of(&self.view.shape.streams);
        let settled: BTreeMap<StreamName, Option<i64>> =
            self.view.shape.views.iter().map(|(changes, view)| (changes.clone(), (self.settled)(view))).collect();
        let seen = self.freeze().await?;
        let (heard, idle_us) = (&mut self.heard, self.view.definition.idle_us);
        let of_stream = |stream: &StreamName| match settled.get(stream) {
            Some(settled) => Some((*settled, None)),
            None => {
                let edges = heard.edges(stream, facts.iter().filter(|fact| fact.stream == *stream), now);
                let stored = seen.states.get(stream).and_then(|frozen| frozen.span()).map(|(_, last)| last);
                // A stream that never had a row holds nothing back, like an edge that is silent.
                let watermark = watermark::of_stream(&edges, stored, idle_us)?;
                Some((Some(watermark), watermark::held_by(&edges, idle_us)))
            }
        };
        let slowest = self.view.shape.streams.iter().filter_map(of_stream).min();
        let (watermark, held_by) = slowest.unwrap_or_default();
        self.progress.held_by = held_by;
        self.state.observe(watermark);
        if !self.state.begun() && self.state.watermark().is_none() {
            return Ok(Round::Done);
        }
        let round = match self.view.shape.kept {
            Kept::Windows { .. } => self.windows(&seen).await?,
            Kept::Rows { .. } => self.rows(&seen).await?,
        };
        if self.state.is_ahead() && now.since_us.saturating_sub(self.recorded_us) >= self.limits.record_every_us {
            self.note().await?;
        }
        self.tell(&seen);
        Ok(round)
    }

    /// One state of each table, for the whole round.
    async fn freeze(&self) -> Result<Seen, ViewError> {
        let tables = self.engine.tables();
        let (mut states, mut whole) = (States::new(), None::<(i64, i64)>);
        let shape = &self.view.shape;
        for stream in shape.streams.iter().chain(&shape.references) {
            let frozen = self.engine.newest().take(tables.as_ref(), stream).await;
            let frozen = frozen.map_err(|error| self.engine.explain(error))?;
            if let Some((first, last)) = frozen.span().filter(|_| shape.streams.contains(stream)) {
                whole = Some(whole.map_or((first, last), |(from, to)| (from.min(first), to.max(last))));
            }
            states.insert(stream.clone(), frozen);
        }
        Ok(Seen { states, span: whole })
    }

    /// From where to where a stream has moved since it was read; None when it has not.
    fn moved(&self, seen: &Seen, stream: &StreamName) -> Option<[Position; 2]> {
        let after = seen.states.get(stream)?.position();
        let before = self.state.position(stream).cloned().unwrap_or_default();
        (*after != before).then(|| [before, after.clone()])
    }

    fn tell(&mut self, seen: &Seen) {
        let sides = self.sides.as_ref().and_then(|(_, sides)| sides.as_deref()).map_or(0, |sides| parts::bytes(sides));
        let settled = self.state.settled();
        let (first, end) = seen.span.map_or((0, 0), |(first, last)| self.state.grid().held(first, last));
        let (live, past) = self.state.left();
        let (live, past) = (live.within(first, end), past.within(first, end));
        let ends = past.first().zip(past.iter().next_back()).map(|((from, _), (_, to))| (from, to));
        self.progress.begun = self.state.begun();
        self.progress.watermark = self.state.watermark();
        self.progress.past = ends;
        self.progress.dirty_windows = self.state.count(&live) + self.state.count(&past);
        self.progress.settled = settled;
        let (since, rows) = self.counted;
        let elapsed = self.now.since_us.saturating_sub(since);
        if elapsed >= RATE_OVER_US {
            self.progress.rows_per_second = Some((self.progress.rows_in - rows) as f64 / (elapsed as f64 / 1e6));
            self.counted = (self.now.since_us, self.progress.rows_in);
        }
        self.progress.memory_bytes =
            self.progress.memory_bytes.max((self.emitted.bytes() + self.partials.bytes() + sides) as u64);
        let (live, past) = self.state.left();
        self.aside.keep(|start| live.contains(start) || past.contains(start));
        self.progress.aside = self.aside.told();
    }

    /// So many windows of what is due, from its beginning; one that was too much comes alone.
    fn next_piece(&mut self, due: &Intervals) -> Option<Intervals> {
        let piece = (!due.is_empty()).then(|| self.state.first_of(due, self.piece))?;
        Some(match self.aside.first_in(&piece) {
            Some(start) if piece.first().is_some_and(|(first, _)| first == start) => {
                let (from, to) = self.state.grid().slot(start);
                Intervals::of(from, to)
            }
            Some(start) => piece.within(i64::MIN, start),
            None => piece,
        })
    }

    /// How long a piece took decides how long the next is.
    fn paced(&mut self, took: Duration) {
        if took < PIECE_SHORT {
            self.piece = self.piece.saturating_mul(2).min(1 << 20);
        } else if took > PIECE_LONG {
            self.piece = (self.piece / 2).max(1);
        }
    }

    /// Of a piece that was too much a smaller one; none of a single window.
    fn shorten(&mut self, piece: &Intervals) -> Option<Intervals> {
        let count = self.state.count(piece);
        if count <= 1 {
            return None;
        }
        self.piece = usize::try_from(count / 4).unwrap_or(1).max(1);
        Some(self.state.first_of(piece, self.piece))
    }
}

/// Whether a row of a view's stream is a row of its results, and not only a record.
fn is_result(rows: &RecordBatch, row: usize) -> bool {
    let of_window = rows.column_by_name(WINDOW).is_some_and(|window| window.is_valid(row));
    let of_rows =
        || rows.column_by_name(EMPTY).and_then(|empty| empty.as_boolean_opt()).is_some_and(|empty| !empty.value(row));
    of_window || of_rows()
}

/// Since when the earliest of these revisions of a reference table holds. One that does not say it may be the first of
/// its key, which holds from ever.
fn holds_from(rows: &RecordBatch) -> Option<i64> {
    let since = rows.column_by_name(VALID_FROM).and_then(|since| since.as_primitive_opt::<TimestampMicrosecondType>());
    let since = since.filter(|_| rows.num_rows() > 0)?;
    if since.null_count() > 0 { Some(i64::MIN) } else { arrow::compute::min(since) }
}

/// Event times of rows.
fn times(rows: &RecordBatch) -> impl Iterator<Item = i64> {
    let ts = rows.column_by_name(TS).and_then(|ts| ts.as_primitive_opt::<TimestampMicrosecondType>());
    ts.into_iter().flat_map(|ts| ts.values().iter().copied())
}

/// The newest record of the view's stream, if it has one. Numbers of batches tell which it is, and of several spools the
/// round: clocks go back.
async fn newest_record(engine: &Arc<Engine>, view: &View) -> Result<Option<Record>, ViewError> {
    let Some(cold) = engine.tables().cold(&view.changes) else { return Ok(None) };
    view.columns.check(&view.changes, &cold.schema).map_err(ViewError::Stuck)?;
    let live = Arc::new(LiveTable::new(view.changes.clone(), Arc::clone(&cold.schema)));
    let last = last_value_udaf().call(vec![col(POSITION)]).order_by(vec![col(SEQ).sort(true, false)]).build();
    let plan = last.and_then(|last| {
        let scan = LogicalPlanBuilder::scan(view.changes.as_str(), provider_as_source(live), None)?;
        let records = scan.filter(col(EDGE).eq(lit(OWN_EDGE)).and(col(POSITION).is_not_null()))?;
        records.aggregate(vec![col(SPOOL)], vec![last.alias("newest")])?.project(vec![col("newest")])?.build()
    });
    let plan = plan.map_err(|error| engine.explain(error))?;
    let answered = engine.ask("where a view was", plan, States::new(), [usize::MAX; 2]).await?;
    let texts = answered.rows.iter().flat_map(|rows| rows.column(0).as_string::<i32>().iter().flatten());
    let mut newest: Option<Record> = None;
    for text in texts {
        let record: Record = serde_json::from_str(text).map_err(ViewError::table)?;
        newest = Some(match newest {
            Some(known) if known.round >= record.round => known,
            _ => record,
        });
    }
    Ok(newest)
}
