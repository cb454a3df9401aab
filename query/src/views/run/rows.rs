//! A round of a view of single rows: what is new of its stream goes through the question and is appended, each row once.
//!
//! The position is in the same append as the rows that it stands for, so an append holds whole batches of the source: those
//! that the node has in memory. What is in files alone (when the view begins, or has not looked for long) is its past: rows
//! between two positions, asked by pieces of event time, so that no more of them is in memory than one answer may have;
//! each append says what is left of the past. Rows that come meanwhile are not between the two, wherever their times lie.
//! So are batches whose answer is too much for one append. Rows of one moment that are too many for it are not told at all,
//! which the view says of itself.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{Array, RecordBatch, UInt32Array};
use arrow_select::concat::concat_batches;
use arrow_select::take::take_record_batch;
use datafusion::datasource::provider_as_source;
use datafusion::logical_expr::LogicalPlanBuilder;
use datafusion::prelude::col;
use wire::schema::{SEQ, SPOOL, TS};
use wire::{BATCH_DATES_MAX, BATCH_ROWS_MAX, DAY_US, Seq, SpoolId, StreamName};

use super::write::{APPEND_BYTES_MAX, text};
use super::{Round, Runner, Seen, ViewError, times};
use crate::engine::{QueryError, bytes_of};
use crate::follow::{self, Unread};
use crate::fused_table::LiveTable;
use crate::views::columns::{self, Book};
use crate::views::intervals::Intervals;
use crate::views::view::among;

/// Rows of the source that go through the question at a time; a batch of it is never divided.
const ROWS_AT_A_TIME: usize = 32_768;

/// Whole batches of the source that wait for the next append.
#[derive(Debug, Default)]
struct Waiting {
    batches: Vec<RecordBatch>,
    covered: Vec<(SpoolId, Seq)>,
    rows: usize,
    bytes: usize,
    dates: BTreeSet<i64>,
}

impl Waiting {
    /// Whether what waits must go before these rows.
    fn is_full_with(&self, unread: &Unread) -> bool {
        let dates = dates(&unread.rows).filter(|date| !self.dates.contains(date)).collect::<BTreeSet<_>>();
        self.covered.last().is_some_and(|last| *last != (unread.spool, unread.seq))
            && (self.rows + unread.rows.num_rows() > ROWS_AT_A_TIME
                || self.bytes + bytes_of(&unread.rows) > APPEND_BYTES_MAX
                || self.dates.len() + dates.len() > BATCH_DATES_MAX)
    }

    fn add(&mut self, unread: Unread) {
        self.rows += unread.rows.num_rows();
        self.bytes += bytes_of(&unread.rows);
        self.dates.extend(dates(&unread.rows));
        self.covered.push((unread.spool, unread.seq));
        self.batches.push(unread.rows);
    }
}

fn dates(rows: &RecordBatch) -> impl Iterator<Item = i64> {
    times(rows).map(|time| time.div_euclid(DAY_US))
}

impl Runner {
    pub(super) async fn rows(&mut self, seen: &Seen) -> Result<Round, ViewError> {
        let stream = self.view.shape.streams.first().cloned();
        let stream = stream.ok_or_else(|| ViewError::Stuck("it follows nothing".to_owned()))?;
        let Some(frozen) = seen.states.get(&stream) else { return Ok(Round::Done) };
        let mut waits = false;
        if let Some([before, after]) = self.moved(seen, &stream) {
            let unread = if self.state.begun() {
                let all = &frozen.cold().schema;
                let unread = follow::in_memory(&self.engine, &stream, frozen, &before, all).await;
                unread.map_err(|error| self.engine.explain(error))?
            } else {
                None
            };
            match unread {
                Some(unread) => match self.live(&stream, unread).await? {
                    true => self.state.read_to(&stream, after),
                    false => waits = true,
                },
                // One past at a time: what came since then waits.
                None if !self.state.left().1.is_empty() => waits = true,
                None => {
                    let times = follow::times_behind(frozen, &before);
                    self.state.catch_up(&stream, [before, after], times);
                }
            }
        }
        let (_, past) = self.state.left();
        let past = past.clone();
        if past.is_empty() {
            return Ok(Round::Done);
        }
        self.past(&stream, &past, seen).await?;
        Ok(if self.state.left().1.is_empty() && !waits { Round::Done } else { Round::More })
    }

    /// New rows, some whole batches at a time; false when some of them have become past, or wait until there is none.
    async fn live(&mut self, stream: &StreamName, mut unread: Vec<Unread>) -> Result<bool, ViewError> {
        // In the order of each spool: what is left out behind one is left out behind all.
        unread.sort_by_key(|unread| (unread.spool, unread.seq));
        let mut waiting = Waiting::default();
        for unread in unread {
            if waiting.is_full_with(&unread) && !self.emit(stream, std::mem::take(&mut waiting)).await? {
                return Ok(false);
            }
            waiting.add(unread);
        }
        self.emit(stream, waiting).await
    }

    /// The question's answer for some batches, and that the stream is read so far, in one append. When it is too much for
    /// one, the batches are past, as soon as there is no other; false then.
    async fn emit(&mut self, stream: &StreamName, waiting: Waiting) -> Result<bool, ViewError> {
        let Some(first) = waiting.batches.first() else { return Ok(true) };
        let rows = concat_batches(&first.schema(), &waiting.batches).map_err(ViewError::table)?;
        let count = rows.num_rows() as u64;
        let answer = match self.through(rows).await {
            Ok(answer) => answer,
            Err(ViewError::Query(error)) if error.is_too_much() => return Ok(self.put_off(stream, waiting)),
            Err(error) => return Err(error),
        };
        if answer.as_ref().is_some_and(|answer| !fits(answer)) {
            return Ok(self.put_off(stream, waiting));
        }
        self.progress.rows_in += count;
        self.state.read(stream, waiting.covered);
        if let Some(answer) = answer {
            self.append_rows(&answer).await?;
        }
        Ok(true)
    }

    /// What waits is told as past. One past at a time: while there is another it goes on waiting. Never that it was told.
    fn put_off(&mut self, stream: &StreamName, waiting: Waiting) -> bool {
        if self.state.left().1.is_empty() {
            let before = self.state.position(stream).cloned().unwrap_or_default();
            let mut to = before.clone();
            waiting.covered.iter().for_each(|(spool, seq)| to.cover(*spool, *seq));
            let own = waiting.batches.iter().flat_map(times).map(|time| (time, time));
            self.state.catch_up(stream, [before, to], own.collect::<Vec<_>>());
        }
        false
    }

    /// A piece of the past.
    async fn past(&mut self, stream: &StreamName, past: &Intervals, seen: &Seen) -> Result<(), ViewError> {
        let mut piece = self.state.first_of(past, self.piece);
        let began = Instant::now();
        let rows = loop {
            match self.of_past(stream, &piece, seen).await {
                Ok(rows) => break rows,
                Err(ViewError::Query(error)) if error.is_too_much() => match self.shorten(&piece) {
                    Some(shorter) => piece = shorter,
                    None => return Err(error.into()),
                },
                Err(error) => return Err(error),
            }
        };
        self.paced(began.elapsed());
        // Parts of it in the order of their times, the first one last.
        let mut parts = Vec::new();
        if let Some(rows) = rows {
            self.progress.rows_in += rows.num_rows() as u64;
            parts.push(by_time(&rows)?);
        }
        while let Some(rows) = parts.pop() {
            // Those behind it begin with another moment.
            let part = match parts.last().and_then(|next| times(next).next()) {
                Some(next) => piece.within(i64::MIN, next),
                None => piece.clone(),
            };
            match self.through(rows.clone()).await {
                Ok(Some(answer)) => self.tell_past(&part, answer).await?,
                Ok(None) => {}
                Err(ViewError::Query(error)) if error.is_too_much() => match middle(&rows) {
                    Some(at) => {
                        parts.extend([rows.slice(at, rows.num_rows() - at), rows.slice(0, at)]);
                        continue;
                    }
                    // What took too long, or found no memory, may do so no more.
                    None if !matches!(error, QueryError::TooMuch { .. }) => return Err(error.into()),
                    None => self.leave_out(rows.num_rows(), times(&rows).next().unwrap_or(0), &error.to_string()),
                },
                Err(error) => return Err(error),
            }
            self.state.done(&part);
        }
        self.state.done(&piece);
        Ok(())
    }

    /// The answer for a part of a piece, in as many appends as it needs, each with what is left of the piece.
    async fn tell_past(&mut self, part: &Intervals, answer: RecordBatch) -> Result<(), ViewError> {
        let (mut answer, mut times) = self.in_order(answer)?;
        while !times.is_empty() {
            let fit = fitting(&times, bytes_of(&answer) / answer.num_rows().max(1));
            let rows = match fit {
                Fit::All => times.len(),
                Fit::First(rows) | Fit::TooMuch(rows) => rows,
            };
            self.state.done(&part.within(i64::MIN, times.get(rows).copied().unwrap_or(i64::MAX)));
            match fit {
                Fit::TooMuch(_) => self.leave_out(rows, times[0], "one append has no room for them"),
                _ => self.append_rows(&answer.slice(0, rows)).await?,
            }
            answer = answer.slice(rows, answer.num_rows() - rows);
            times.drain(..rows);
        }
        Ok(())
    }

    /// Rows of one moment are not told: they cannot be divided.
    fn leave_out(&mut self, rows: usize, time: i64, why: &str) {
        let at = chrono::DateTime::from_timestamp_micros(time).unwrap_or_default();
        let why = format!("{rows} rows of {at} are not told: {why}");
        tracing::warn!(view = %self.view.definition.name, "{why}");
        self.progress.refused = Some(why);
    }

    /// Rows of the past at these times.
    async fn of_past(
        &self,
        stream: &StreamName,
        piece: &Intervals,
        seen: &Seen,
    ) -> Result<Option<RecordBatch>, ViewError> {
        let Some(frozen) = seen.states.get(stream) else { return Ok(None) };
        let schema = Arc::clone(&frozen.cold().schema);
        let live = Arc::new(LiveTable::new(stream.clone(), Arc::clone(&schema)));
        let scan = LogicalPlanBuilder::scan(stream.as_str(), provider_as_source(live), None);
        let plan = scan.and_then(|scan| match among(&col(TS), piece) {
            Some(filter) => scan.filter(filter)?.build(),
            None => scan.build(),
        });
        let plan = plan.map_err(|error| self.engine.explain(error))?;
        let limits = [self.limits.rows_max, self.limits.bytes_max];
        let answered = self.engine.ask("what was there before a view", plan, seen.states.clone(), limits).await?;
        let all = concat_batches(&schema, &answered.rows).map_err(ViewError::table)?;
        let is_past = |(_, (spool, seq)): &(usize, (SpoolId, Seq))| self.state.is_past(stream, *spool, *seq);
        let own = origins(&all)?.into_iter().enumerate().filter(is_past);
        let own: Vec<u32> = own.map(|(row, _)| row as u32).collect();
        if own.is_empty() {
            return Ok(None);
        }
        take_record_batch(&all, &UInt32Array::from(own)).map(Some).map_err(ViewError::table)
    }

    /// The question's answer for these rows of its stream; None when it has no rows.
    async fn through(&mut self, rows: RecordBatch) -> Result<Option<RecordBatch>, ViewError> {
        let question = self.view.asked_over(rows).map_err(|error| self.engine.explain(error))?;
        let limits = [usize::MAX, self.limits.bytes_max];
        let name = self.view.definition.name.as_str();
        let answered = self.engine.ask(name, question, Default::default(), limits).await?;
        self.progress.computed += answered.computed;
        self.progress.memory_bytes = self.progress.memory_bytes.max(answered.memory_bytes as u64);
        let Some(first) = answered.rows.first() else { return Ok(None) };
        let answer = concat_batches(&first.schema(), &answered.rows).map_err(ViewError::table)?;
        Ok(Some(answer).filter(|answer| answer.num_rows() > 0))
    }

    /// An answer in the order of its event times, and these.
    fn in_order(&self, answer: RecordBatch) -> Result<(RecordBatch, Vec<i64>), ViewError> {
        let column = answer.column(self.view.columns.time());
        let sorted = arrow::compute::sort_to_indices(column, None, None).map_err(ViewError::table)?;
        let answer = take_record_batch(&answer, &sorted).map_err(ViewError::table)?;
        let stored = self.view.columns.stored(&answer).map_err(ViewError::table)?;
        let times = columns::times(&stored[self.view.columns.time()]);
        let times = times.ok_or_else(|| ViewError::Stuck("rows without event times".to_owned()))?.values().to_vec();
        Ok((answer, times))
    }

    async fn append_rows(&mut self, answer: &RecordBatch) -> Result<(), ViewError> {
        let stored = self.view.columns.stored(answer).map_err(ViewError::table)?;
        let times = columns::times(&stored[self.view.columns.time()]).filter(|times| times.null_count() == 0);
        let times = times.ok_or_else(|| ViewError::Stuck("a row without an event time".to_owned()))?;
        let mut book: Vec<Book> = times.values().iter().map(|ts| Book { ts: *ts, ..Book::default() }).collect();
        let record = self.state.record();
        if let Some(last) = book.last_mut() {
            last.position = Some(text(&record)?);
        }
        let rows = self.view.columns.rows(&stored, &book).map_err(ViewError::table);
        self.append(rows).await?;
        self.state.recorded(record);
        self.recorded_us = self.now.since_us;
        Ok(())
    }
}

/// Whether one append takes an answer.
fn fits(answer: &RecordBatch) -> bool {
    answer.num_rows() <= BATCH_ROWS_MAX && bytes_of(answer) <= APPEND_BYTES_MAX
}

/// Rows of a stream in the order of their times.
fn by_time(rows: &RecordBatch) -> Result<RecordBatch, ViewError> {
    let ts = rows.column_by_name(TS).ok_or_else(|| ViewError::Stuck("rows without event times".to_owned()))?;
    let sorted = arrow::compute::sort_to_indices(ts, None, None).map_err(ViewError::table)?;
    take_record_batch(rows, &sorted).map_err(ViewError::table)
}

/// Where rows in the order of their times are divided, between two moments, as near to the middle as may be; None when they
/// are all of one.
fn middle(rows: &RecordBatch) -> Option<usize> {
    let times: Vec<i64> = times(rows).collect();
    let half = *times.get(times.len() / 2)?;
    let (from, to) = (times.partition_point(|time| *time < half), times.partition_point(|time| *time <= half));
    [from, to].into_iter().find(|at| (1..times.len()).contains(at))
}

/// What one append takes of rows in the order of their times, so that those of one moment stay together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fit {
    All,
    First(usize),
    /// The first so many are of one moment, and too much.
    TooMuch(usize),
}

/// What one append takes of rows with these times, which grow.
fn fitting(times: &[i64], bytes_of_row: usize) -> Fit {
    let rows_max = (APPEND_BYTES_MAX / bytes_of_row.max(1)).clamp(1, BATCH_ROWS_MAX);
    let mut dates = BTreeSet::new();
    let full = times.iter().enumerate().position(|(row, time)| {
        dates.insert(time.div_euclid(DAY_US));
        row >= rows_max || dates.len() > BATCH_DATES_MAX
    });
    let Some(full) = full else { return Fit::All };
    match times.partition_point(|time| *time < times[full]) {
        0 => Fit::TooMuch(times.partition_point(|time| *time <= times[full])),
        rows => Fit::First(rows),
    }
}

/// The batch that each row came in.
fn origins(rows: &RecordBatch) -> Result<Vec<(SpoolId, Seq)>, ViewError> {
    let lacking = || ViewError::Stuck("rows that do not say where they come from".to_owned());
    let spools = rows.column_by_name(SPOOL).and_then(|column| column.as_string_opt::<i32>()).ok_or_else(lacking)?;
    let seqs =
        rows.column_by_name(SEQ).and_then(|column| column.as_primitive_opt::<Int64Type>()).ok_or_else(lacking)?;
    let mut last: Option<(&str, SpoolId)> = None;
    let mut origins = Vec::with_capacity(rows.num_rows());
    for row in 0..rows.num_rows() {
        let text = spools.value(row);
        let spool = match last {
            Some((known, spool)) if known == text => spool,
            _ => text.parse().map_err(|_| lacking())?,
        };
        last = Some((text, spool));
        origins.push((spool, Seq(seqs.value(row).unsigned_abs())));
    }
    Ok(origins)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_append_takes_whole_moments_within_its_limits() {
        let check = |times: &[i64], bytes: usize, expected: Fit| assert_eq!(fitting(times, bytes), expected, "{bytes}");
        let seconds = |count: i64| (0..count).map(|second| second * 1_000_000).collect::<Vec<_>>();
        let full = BATCH_ROWS_MAX as i64;
        check(&seconds(full), 10, Fit::All);
        check(&seconds(full + 1), 10, Fit::First(BATCH_ROWS_MAX));
        check(&[0, 1, 2, 2, 3], APPEND_BYTES_MAX / 3, Fit::First(2));
        check(&(0..65).map(|day| day * DAY_US).collect::<Vec<_>>(), 10, Fit::First(64));
        check(&[5, 5, 6], APPEND_BYTES_MAX, Fit::TooMuch(2));
    }
}
