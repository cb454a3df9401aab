//! A round of a view of single rows: what is new of its stream goes through the question and is appended, each row once.
//!
//! The position is in the same append as the rows that it stands for, so an append holds whole batches of the source. What
//! was there when the view began is its past: rows that `base` covers, asked by pieces of event time, of which each is one
//! append with what is left of the past. Rows that come meanwhile are not covered by `base`, and are new wherever their
//! times lie.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{Array, RecordBatch, UInt32Array};
use arrow_schema::SchemaRef;
use arrow_select::concat::concat_batches;
use arrow_select::take::take_record_batch;
use datafusion::catalog::MemTable;
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::datasource::provider_as_source;
use datafusion::logical_expr::{LogicalPlan, LogicalPlanBuilder};
use datafusion::prelude::col;
use wire::schema::{SEQ, SPOOL, TS};
use wire::{BATCH_DATES_MAX, BATCH_ROWS_MAX, DAY_US, Seq, SpoolId, StreamName};

use super::write::text;
use super::{Round, Runner, Seen, ViewError, span};
use crate::follow::Position;
use crate::fused_table::{LiveTable, hot_columns};
use crate::views::columns::{self, Book};
use crate::views::intervals::Intervals;
use crate::views::view::among;

/// Rows of the source that go through the question at a time; a batch of it is never divided.
const ROWS_AT_A_TIME: usize = 32_768;

impl Runner {
    pub(super) async fn rows(&mut self, seen: &Seen, now_us: i64) -> Result<Round, ViewError> {
        let stream = self.view.shape.streams.first().cloned();
        let stream = stream.ok_or_else(|| ViewError::Stuck("it follows nothing".to_owned()))?;
        let Some(frozen) = seen.states.get(&stream) else { return Ok(Round::Done) };
        if !self.state.begun() {
            self.state.begin_rows(&stream, Position::of(frozen), span(frozen));
        }
        if let Some((rows, position)) = self.news(seen, &stream, &[]).await? {
            self.live(&stream, &rows, now_us).await?;
            self.state.read_to(&stream, position);
        }
        let (_, past) = self.state.left();
        let past = past.clone();
        if past.is_empty() {
            return Ok(Round::Done);
        }
        self.past(&stream, &past, seen, now_us).await?;
        Ok(if self.state.left().1.is_empty() { Round::Done } else { Round::More })
    }

    /// New rows, some whole batches at a time.
    async fn live(&mut self, stream: &StreamName, rows: &[RecordBatch], now_us: i64) -> Result<(), ViewError> {
        let Some(first) = rows.first() else { return Ok(()) };
        let all = concat_batches(&first.schema(), rows).map_err(ViewError::table)?;
        self.progress.rows_in += all.num_rows() as u64;
        // By batch, in the order of each spool: what is left out behind one is left out behind all.
        let mut batches: BTreeMap<(SpoolId, Seq), Vec<u32>> = BTreeMap::new();
        for (row, batch) in origins(&all)?.into_iter().enumerate() {
            batches.entry(batch).or_default().push(u32::try_from(row).map_err(ViewError::table)?);
        }
        let mut waiting: Vec<u32> = Vec::new();
        let mut covered = Vec::new();
        for ((spool, seq), rows) in batches {
            if !waiting.is_empty() && waiting.len() + rows.len() > ROWS_AT_A_TIME {
                self.emit(stream, &all, std::mem::take(&mut waiting), std::mem::take(&mut covered), now_us).await?;
            }
            waiting.extend(rows);
            covered.push((spool, seq));
        }
        self.emit(stream, &all, waiting, covered, now_us).await
    }

    /// The question's answer for some rows, and that the stream is read so far, in one append.
    async fn emit(
        &mut self,
        stream: &StreamName,
        all: &RecordBatch,
        rows: Vec<u32>,
        covered: Vec<(SpoolId, Seq)>,
        now_us: i64,
    ) -> Result<(), ViewError> {
        let rows = take_record_batch(all, &UInt32Array::from(rows)).map_err(ViewError::table)?;
        let answer = self.through(stream, rows).await?;
        self.state.read(stream, covered);
        let count = answer.as_ref().map_or(0, RecordBatch::num_rows);
        match answer {
            Some(answer) if count > 0 => self.append_rows(&answer, now_us).await,
            _ => Ok(()),
        }
    }

    /// A piece of what was there when the view began.
    async fn past(&mut self, stream: &StreamName, past: &Intervals, seen: &Seen, now_us: i64) -> Result<(), ViewError> {
        let mut piece = self.state.first_of(past, self.piece);
        let began = Instant::now();
        let rows = loop {
            match self.of_past(stream, &piece, seen).await {
                Ok(rows) => break rows,
                Err(ViewError::Query(error)) if self.shorten(&error) => {
                    piece = self.state.first_of(&piece, self.piece);
                }
                Err(error) => return Err(error),
            }
        };
        self.paced(began.elapsed());
        let Some(rows) = rows else {
            self.state.done(&piece);
            return Ok(());
        };
        self.progress.rows_in += rows.num_rows() as u64;
        let Some(answer) = self.through(stream, rows).await?.filter(|answer| answer.num_rows() > 0) else {
            self.state.done(&piece);
            return Ok(());
        };
        // What does not fit into one append waits: the piece ends before it.
        let (answer, end) = self.as_one_append(answer)?;
        let done = end.map_or_else(|| piece.clone(), |end| piece.within(i64::MIN, end));
        self.state.done(&done);
        self.append_rows(&answer, now_us).await
    }

    /// Rows of these times that were there when the view began.
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
        let base = self.state.base(stream);
        let own = origins(&all)?.into_iter().enumerate().filter(|(_, (spool, seq))| base.covers(*spool, *seq));
        let own: Vec<u32> = own.map(|(row, _)| row as u32).collect();
        if own.is_empty() {
            return Ok(None);
        }
        take_record_batch(&all, &UInt32Array::from(own)).map(Some).map_err(ViewError::table)
    }

    /// The question's answer for these rows of its stream.
    async fn through(&mut self, stream: &StreamName, rows: RecordBatch) -> Result<Option<RecordBatch>, ViewError> {
        let plan = over(&self.view.plan, stream, &rows).map_err(|error| self.engine.explain(error))?;
        let limits = [usize::MAX, self.limits.bytes_max];
        let answered = self.engine.ask(self.view.definition.name.as_str(), plan, Default::default(), limits).await?;
        self.progress.computed += answered.computed;
        self.progress.memory_bytes = self.progress.memory_bytes.max(answered.memory_bytes as u64);
        let Some(first) = answered.rows.first() else { return Ok(None) };
        concat_batches(&first.schema(), &answered.rows).map(Some).map_err(ViewError::table)
    }

    /// As many of the rows, in order of time, as one append takes; and the time of the first that it does not take.
    fn as_one_append(&self, answer: RecordBatch) -> Result<(RecordBatch, Option<i64>), ViewError> {
        let column = answer.column(self.view.columns.time());
        let sorted = arrow::compute::sort_to_indices(column, None, None).map_err(ViewError::table)?;
        let answer = take_record_batch(&answer, &sorted).map_err(ViewError::table)?;
        let starts = self.view.columns.stored(&answer).map_err(ViewError::table)?;
        let times = columns::times(&starts[self.view.columns.time()]);
        let times = times.ok_or_else(|| ViewError::Stuck("rows without event times".to_owned()))?.values().to_vec();
        let mut dates = std::collections::BTreeSet::new();
        let fits = times.iter().enumerate().position(|(row, time)| {
            dates.insert(time.div_euclid(DAY_US));
            row >= BATCH_ROWS_MAX || dates.len() > BATCH_DATES_MAX
        });
        let Some(full) = fits else { return Ok((answer, None)) };
        let end = times[full];
        let before = times.partition_point(|time| *time < end);
        if before == 0 {
            return Err(ViewError::Stuck(format!("more than {BATCH_ROWS_MAX} rows of one moment, {end} µs")));
        }
        Ok((answer.slice(0, before), Some(end)))
    }

    async fn append_rows(&mut self, answer: &RecordBatch, now_us: i64) -> Result<(), ViewError> {
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
        self.recorded_us = now_us;
        Ok(())
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

/// The question over these rows in place of its stream.
fn over(plan: &LogicalPlan, stream: &StreamName, rows: &RecordBatch) -> datafusion::common::Result<LogicalPlan> {
    let replaced = plan.clone().transform_up(|node| {
        let LogicalPlan::TableScan(mut scan) = node else { return Ok(Transformed::no(node)) };
        let schema: SchemaRef = scan.source.schema();
        let is_stream = datafusion::datasource::source_as_provider(&scan.source)?
            .downcast_ref::<LiveTable>()
            .and_then(LiveTable::stream)
            == Some(stream);
        if !is_stream {
            return Ok(Transformed::no(LogicalPlan::TableScan(scan)));
        }
        let rows = hot_columns(rows, &schema)?;
        scan.source = provider_as_source(Arc::new(MemTable::try_new(schema, vec![vec![rows]])?));
        Ok(Transformed::yes(LogicalPlan::TableScan(scan)))
    })?;
    Ok(replaced.data)
}
