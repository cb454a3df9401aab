//! A round of a view of windows: what new rows touched becomes dirty, what is due is asked, what differs from the last word
//! about a window is its next revision.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{Array, ArrayRef, RecordBatch, UInt32Array};
use arrow_select::take::take;
use datafusion::datasource::provider_as_source;
use datafusion::logical_expr::LogicalPlanBuilder;
use datafusion::prelude::col;
use futures::TryStreamExt;
use wire::StreamName;
use wire::reference::VALID_FROM;
use wire::schema::TS;

use super::write::{Changed, Writer};
use super::{PIECES_MAX, Round, Runner, Seen, ViewError, holds_from, is_result, times};
use crate::engine::{Question, States};
use crate::follow::{self, Position};
use crate::fused_table::LiveTable;
use crate::views::columns::{self, EMPTY, REVISION, WINDOW};
use crate::views::definition::Emit;
use crate::views::emitted::{Digest, Told};
use crate::views::ending;
use crate::views::grid::Grid;
use crate::views::intervals::Intervals;
use crate::views::state::{Due, STRETCHES_MAX};
use crate::views::view::among;

/// The windows of some rows.
struct Touched {
    grid: Grid,
    /// The rows are those of another view.
    is_view: bool,
    windows: Intervals,
    rows: u64,
}

impl Touched {
    fn add(&mut self, rows: &RecordBatch) {
        self.rows += rows.num_rows() as u64;
        let mut last = None;
        for (row, time) in times(rows).enumerate() {
            // Rows of one slot come together, mostly.
            if last.is_some_and(|(start, end)| (start..end).contains(&time)) || self.is_view && !is_result(rows, row) {
                continue;
            }
            let (from, to) = self.grid.touched(time, time);
            self.windows.insert(from, to);
            last = Some(self.grid.slot(time));
        }
        self.windows.merge_to(STRETCHES_MAX);
    }
}

impl Runner {
    pub(super) async fn windows(&mut self, seen: &Seen) -> Result<Round, ViewError> {
        if self.state.begun() {
            self.follow(seen).await?;
        } else {
            let positions = seen.states.iter().map(|(stream, frozen)| (stream.clone(), frozen.position().clone()));
            self.state.begin(seen.span.map(|(first, _)| first), positions.collect());
        }
        let due = match self.view.definition.emit {
            Emit::Final => Due::Closed,
            Emit::Update
                if self.updated_us.is_none_or(|last| self.now.since_us - last >= self.view.definition.every_us) =>
            {
                self.updated_us = Some(self.now.since_us);
                Due::All
            }
            Emit::Update => Due::Closed,
        };
        let mut writer = Writer::new(self.view.columns.clone());
        let mut pieces = 0;
        loop {
            let (live, _) = self.due(due, seen);
            let Some(piece) = self.next_piece(&live).filter(|_| pieces < PIECES_MAX) else { break };
            self.piece(&piece, seen, &mut writer).await?;
            pieces += 1;
        }
        // Its past comes after what is live, a piece at a time.
        let (_, past) = self.due(due, seen);
        if let Some(piece) = self.next_piece(&past) {
            self.piece(&piece, seen, &mut writer).await?;
        }
        if !writer.is_empty() {
            self.finish(writer).await?;
        }
        let (live, past) = self.due(due, seen);
        Ok(if live.is_empty() && past.is_empty() { Round::Done } else { Round::More })
    }

    /// New rows make their windows dirty; a revision of a reference table all from the time on since when it holds.
    async fn follow(&mut self, seen: &Seen) -> Result<(), ViewError> {
        let view = Arc::clone(&self.view);
        for stream in &view.shape.streams {
            let Some([before, after]) = self.moved(seen, stream) else { continue };
            let is_view = view.shape.views.contains_key(stream);
            let touched = Touched { grid: self.state.grid().clone(), is_view, windows: Intervals::default(), rows: 0 };
            let touched = match self.fold(seen, stream, &before, &[TS, WINDOW, EMPTY], touched, Touched::add).await {
                Ok(touched) => {
                    self.progress.rows_in += touched.rows;
                    touched.windows
                }
                // Too many to look at each: whatever their files may touch is asked again.
                Err(ViewError::Query(error)) if error.is_too_much() => {
                    let mut touched = Intervals::default();
                    let times = seen.states.get(stream).map(|frozen| follow::times_behind(frozen, &before));
                    for (first, last) in times.into_iter().flatten() {
                        let (from, to) = self.state.grid().touched(first, last);
                        touched.insert(from, to);
                    }
                    touched
                }
                Err(error) => return Err(error),
            };
            self.take_in(seen, stream, &before, &touched).await?;
            self.state.saw(stream, after, &touched);
        }
        for stream in &view.shape.references {
            let Some([before, after]) = self.moved(seen, stream) else { continue };
            let earliest = |from: &mut Option<i64>, rows: &RecordBatch| {
                if let Some(since) = holds_from(rows) {
                    *from = Some(from.map_or(since, |from| from.min(since)));
                }
            };
            let from = self.fold(seen, stream, &before, &[VALID_FROM], None, earliest).await?;
            if let Some(from) = from {
                self.changed_from(from);
            }
            self.state.changed_from(stream, after, from);
        }
        Ok(())
    }

    /// Goes over the rows of a stream behind a position, in those of these columns that it has.
    async fn fold<T: Send + 'static>(
        &self,
        seen: &Seen,
        stream: &StreamName,
        before: &Position,
        columns: &[&str],
        mut folded: T,
        add: fn(&mut T, &RecordBatch),
    ) -> Result<T, ViewError> {
        let Some(frozen) = seen.states.get(stream) else { return Ok(folded) };
        let all = &frozen.cold().schema;
        let known: Vec<usize> = columns.iter().filter_map(|name| all.index_of(name).ok()).collect();
        let wanted = Arc::new(all.project(&known).map_err(ViewError::table)?);
        let in_memory = follow::in_memory(&self.engine, stream, frozen, before, &wanted).await;
        if let Some(unread) = in_memory.map_err(|error| self.engine.explain(error))? {
            unread.iter().for_each(|unread| add(&mut folded, &unread.rows));
            return Ok(folded);
        }
        let (engine, frozen) = (Arc::clone(&self.engine), Arc::clone(frozen));
        let (stream, before) = (stream.clone(), before.clone());
        let work = async move {
            let mut rows = follow::behind(&engine, &stream, &frozen, &before, &wanted).await?;
            while let Some(rows) = rows.try_next().await? {
                add(&mut folded, &rows);
            }
            Ok(folded)
        };
        Ok(self.engine.compute_for_view("what came while a view did not look", work).await?)
    }

    /// What is due where there are rows. Where there are none nothing is to be asked, and that is done.
    fn due(&mut self, due: Due, seen: &Seen) -> (Intervals, Intervals) {
        let closing = self.state.closing().unwrap_or(i64::MIN);
        let (from, to) = match seen.span {
            Some((first, last)) => self.state.grid().held(first, last),
            None => (closing, closing),
        };
        self.state.done(&Intervals::of(i64::MIN, from.min(closing)));
        self.state.done(&Intervals::of(to, closing));
        let (live, past) = self.state.due(due);
        let (mut live, mut past) = (live.within(from, to), past.within(from, to));
        for start in self.aside.resting(self.now.since_us) {
            let (from, to) = self.state.grid().slot(start);
            live.remove(from, to);
            past.remove(from, to);
        }
        (live, past)
    }

    /// Asks a piece, or as much of it as can be asked at a time. A window that is too much alone is set aside.
    async fn piece(&mut self, piece: &Intervals, seen: &Seen, writer: &mut Writer) -> Result<(), ViewError> {
        let mut piece = piece.clone();
        loop {
            let began = Instant::now();
            match self.evaluate(&piece, seen, writer).await {
                Ok(()) => {
                    self.paced(began.elapsed());
                    self.state.done(&piece);
                    return Ok(());
                }
                Err(ViewError::Query(error)) if error.is_too_much() => match self.shorten(&piece) {
                    Some(shorter) => piece = shorter,
                    None => {
                        let start = piece.first().map_or(i64::MIN, |(start, _)| start);
                        if self.aside.add(start, &error, began.elapsed(), self.now.since_us) {
                            return Ok(());
                        }
                        return Err(error.into());
                    }
                },
                Err(error) => return Err(error),
            }
        }
    }

    async fn evaluate(&mut self, piece: &Intervals, seen: &Seen, writer: &mut Writer) -> Result<(), ViewError> {
        self.learn(piece).await?;
        let (mut answer, rest) = self.by_parts(piece, seen).await?;
        if !rest.is_empty()
            && let Some(question) = self.question(&rest, seen).await?
        {
            answer.extend(self.asked(question, seen).await?);
        }
        let known = self.emitted.within(piece);
        let mut windows = self.by_window(piece, &answer)?;
        let gone = known.iter().filter(|(start, told)| told.digest.is_some() && !windows.contains_key(start));
        let gone: Vec<i64> = gone.map(|(start, _)| *start).collect();
        windows.extend(gone.into_iter().map(|start| (start, None)));
        for (start, rows) in windows {
            let before = known.get(&start).copied();
            let digest = rows.as_ref().map(digest);
            if before.map(|told| told.digest) == Some(digest) {
                continue;
            }
            let told = Told { revision: before.map_or(0, |told| told.revision) + 1, digest };
            let window = (start, self.state.grid().until(start));
            let changed = Changed { window, revision: told.revision, rows };
            if let Err(why) = writer.accepts(&changed) {
                self.progress.refused = Some(why);
                continue;
            }
            if writer.is_full_with(&changed) {
                let rows = writer.take(None);
                self.append(rows).await?;
            }
            self.progress.revisions += 1;
            self.emitted.tell(start, told);
            writer.add(changed);
        }
        self.emitted.trim();
        Ok(())
    }

    /// Learns what was told of a piece. What comes after all that is known is asked for at once: nobody else tells anything.
    async fn learn(&mut self, piece: &Intervals) -> Result<(), ViewError> {
        let unknown = self.emitted.unknown(piece);
        if unknown.is_empty() {
            return Ok(());
        }
        if let Some(open) = self.emitted.to_the_end(&unknown) {
            match self.told(&open).await {
                Ok(told) => {
                    self.emitted.learn(&open, told);
                    return Ok(());
                }
                Err(ViewError::Query(error)) if error.is_too_much() => {}
                Err(error) => return Err(error),
            }
        }
        let told = self.told(&unknown).await?;
        self.emitted.learn(&unknown, told);
        Ok(())
    }

    /// The question over a piece; None when it has no answer there, because no session ends.
    async fn question(&mut self, piece: &Intervals, seen: &Seen) -> Result<Option<Question>, ViewError> {
        let view = Arc::clone(&self.view);
        let engine = Arc::clone(&self.engine);
        let failed = |error| engine.explain(error);
        let Some(question) = ending::question(&view, piece).map_err(failed)? else {
            return Ok(Some(view.asked_of(piece, &seen.states).map_err(failed)?));
        };
        let plan = view.of_windows(piece).map_err(failed)?;
        let keys = self.asked(question, seen).await?;
        Ok(match keys.iter().map(RecordBatch::num_rows).sum() {
            0 => None,
            1..=ending::KEYS_MAX => Some(ending::of_keys(plan, &keys).map_err(failed)?.into()),
            _ => Some(plan.into()),
        })
    }

    pub(super) async fn asked(
        &mut self,
        question: impl Into<Question>,
        seen: &Seen,
    ) -> Result<Vec<RecordBatch>, ViewError> {
        let limits = [self.limits.rows_max, self.limits.bytes_max];
        let name = self.view.definition.name.as_str();
        let answered = self.engine.ask(name, question, seen.states.clone(), limits).await?;
        self.progress.computed += answered.computed;
        self.progress.memory_bytes = self.progress.memory_bytes.max(answered.memory_bytes as u64);
        Ok(answered.rows)
    }

    /// The stored columns of the rows of each window of a piece.
    fn by_window(
        &mut self,
        piece: &Intervals,
        answer: &[RecordBatch],
    ) -> Result<BTreeMap<i64, Option<Vec<ArrayRef>>>, ViewError> {
        let mut windows: BTreeMap<i64, Option<Vec<ArrayRef>>> = BTreeMap::new();
        let Some(first) = answer.first() else { return Ok(windows) };
        let rows = arrow_select::concat::concat_batches(&first.schema(), answer).map_err(ViewError::table)?;
        let stored = self
            .view
            .columns
            .stored(&rows)
            .map_err(|error| ViewError::Stuck(format!("a value that no stream can store: {error}")))?;
        let starts = columns::times(&stored[self.view.columns.time()])
            .filter(|starts| starts.null_count() == 0)
            .ok_or_else(|| ViewError::Stuck("a row without a window".to_owned()))?;
        let mut indices: BTreeMap<i64, Vec<u32>> = BTreeMap::new();
        for (row, start) in starts.values().iter().enumerate() {
            indices.entry(*start).or_default().push(u32::try_from(row).map_err(ViewError::table)?);
        }
        for (start, rows) in indices {
            if !self.state.grid().stands(start) {
                return Err(ViewError::Stuck(format!(
                    "a row of a window that begins at {start} µs, where none begins"
                )));
            }
            if !piece.contains(start) {
                continue;
            }
            let rows = UInt32Array::from(rows);
            let taken = stored.iter().map(|column| take(column, &rows, None)).collect::<Result<Vec<_>, _>>();
            windows.insert(start, Some(taken.map_err(ViewError::table)?));
        }
        Ok(windows)
    }

    /// The last words about windows of these times, from the view's own stream.
    async fn told(&self, windows: &Intervals) -> Result<BTreeMap<i64, Told>, ViewError> {
        let view = &self.view;
        let Some(cold) = self.engine.tables().cold(&view.changes) else { return Ok(BTreeMap::new()) };
        let live = Arc::new(LiveTable::new(view.changes.clone(), Arc::clone(&cold.schema)));
        let wanted: Vec<_> = [TS, REVISION, EMPTY].into_iter().chain(view.columns.stored_names()).map(col).collect();
        let wanted: Vec<_> = {
            let mut names = BTreeSet::new();
            wanted.into_iter().filter(|column| names.insert(column.to_string())).collect()
        };
        let plan = LogicalPlanBuilder::scan(view.changes.as_str(), provider_as_source(live), None)
            .and_then(|scan| match among(&col(TS), windows) {
                Some(times) => scan.filter(times),
                None => Ok(scan),
            })
            .and_then(|scan| columns::newest(scan)?.project(wanted)?.build())
            .map_err(|error| self.engine.explain(error))?;
        let limits = [self.limits.rows_max, self.limits.bytes_max];
        let answered = self.engine.ask("what a view has told", plan, States::new(), limits).await?;
        let mut told: BTreeMap<i64, Told> = BTreeMap::new();
        for rows in &answered.rows {
            let column = |name: &str| rows.column_by_name(name).ok_or_else(|| ViewError::Stuck(format!("no {name}")));
            let revisions = column(REVISION)?.as_primitive::<Int64Type>().clone();
            let empty = column(EMPTY)?.as_boolean().clone();
            let stored =
                view.columns.stored_names().map(|name| column(name).cloned()).collect::<Result<Vec<_>, _>>()?;
            for (row, start) in times(rows).enumerate().filter(|(_, start)| windows.contains(*start)) {
                let revision = revisions.value(row);
                let last = told.entry(start).or_insert(Told { revision, digest: None });
                if last.revision > revision {
                    continue;
                }
                if last.revision < revision {
                    *last = Told { revision, digest: None };
                }
                if !empty.value(row) {
                    last.digest.get_or_insert_default().add(&stored, row);
                }
            }
        }
        Ok(told)
    }
}

fn digest(rows: &Vec<ArrayRef>) -> Digest {
    let mut digest = Digest::default();
    let count = rows.first().map_or(0, |column| column.len());
    (0..count).for_each(|row| digest.add(rows, row));
    digest
}
