//! Appends to a view's stream: all rows of one revision of a window in one append, which is whole or not at all, and the
//! record of where the view is in the last row of a round.

use std::collections::BTreeSet;

use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_select::concat::concat;
use wire::{BATCH_DATES_MAX, BATCH_ROWS_MAX, DAY_US, TS_MIN_US};

use super::{Runner, ViewError};
use crate::views::columns::{Book, Columns};
use crate::views::state::Record;

/// Bytes of one append: half of what a batch may have.
pub(super) const APPEND_BYTES_MAX: usize = 32 << 20;

/// A window's next revision.
#[derive(Debug)]
pub(super) struct Changed {
    pub(super) window: (i64, i64),
    pub(super) revision: i64,
    /// Stored columns; None when the window has no rows.
    pub(super) rows: Option<Vec<ArrayRef>>,
}

impl Changed {
    fn rows(&self) -> usize {
        self.rows.as_ref().and_then(|columns| columns.first()).map_or(1, |column| column.len())
    }

    fn bytes(&self) -> usize {
        let columns = self.rows.iter().flatten();
        columns.map(|column| column.to_data().get_slice_memory_size().unwrap_or(0)).sum()
    }
}

/// What waits for the next append.
#[derive(Debug)]
pub(super) struct Writer {
    columns: Columns,
    waiting: Vec<Changed>,
    rows: usize,
    bytes: usize,
    dates: BTreeSet<i64>,
}

impl Writer {
    pub(super) fn new(columns: Columns) -> Self {
        Self { columns, waiting: Vec::new(), rows: 0, bytes: 0, dates: BTreeSet::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether a window fits into an append at all.
    pub(super) fn accepts(&self, changed: &Changed) -> Result<(), String> {
        let (rows, bytes) = (changed.rows(), changed.bytes());
        // One row is left for the record.
        if rows < BATCH_ROWS_MAX && bytes <= APPEND_BYTES_MAX {
            return Ok(());
        }
        let start = chrono::DateTime::from_timestamp_micros(changed.window.0).unwrap_or_default();
        Err(format!(
            "the window of {start} has {rows} rows and {bytes} bytes, and may have {BATCH_ROWS_MAX} rows and \
             {APPEND_BYTES_MAX} bytes: make windows smaller, or group by less"
        ))
    }

    /// Whether what waits must go before this.
    pub(super) fn is_full_with(&self, changed: &Changed) -> bool {
        let date = changed.window.0.div_euclid(DAY_US);
        !self.waiting.is_empty()
            && (self.rows + changed.rows() >= BATCH_ROWS_MAX
                || self.bytes + changed.bytes() > APPEND_BYTES_MAX
                || self.dates.len() >= BATCH_DATES_MAX && !self.dates.contains(&date))
    }

    pub(super) fn add(&mut self, changed: Changed) {
        self.rows += changed.rows();
        self.bytes += changed.bytes();
        self.dates.insert(changed.window.0.div_euclid(DAY_US));
        self.waiting.push(changed);
    }

    /// All that waits as rows of the stream, with the record in the last.
    pub(super) fn take(&mut self, record: Option<String>) -> Result<RecordBatch, ViewError> {
        let waiting = std::mem::take(&mut self.waiting);
        (self.rows, self.bytes) = (0, 0);
        self.dates.clear();
        let nothing = self.columns.nulls(1);
        let mut book = Vec::new();
        let mut parts: Vec<Vec<&dyn Array>> = vec![Vec::with_capacity(waiting.len()); nothing.len()];
        for changed in &waiting {
            let row = Book {
                ts: changed.window.0,
                window: Some(changed.window),
                revision: Some(changed.revision),
                empty: changed.rows.is_none(),
                position: None,
            };
            book.extend(std::iter::repeat_n(row, changed.rows()));
            let columns = changed.rows.as_ref().unwrap_or(&nothing);
            parts.iter_mut().zip(columns).for_each(|(part, column)| part.push(column.as_ref()));
        }
        if let Some(last) = book.last_mut() {
            last.position = record;
        }
        let stored = parts.iter().map(|part| concat(part)).collect::<Result<Vec<_>, _>>().map_err(ViewError::table)?;
        self.columns.rows(&stored, &book).map_err(ViewError::table)
    }
}

impl Runner {
    /// Appends what waits with the record of where the view is.
    pub(super) async fn finish(&mut self, mut writer: Writer) -> Result<(), ViewError> {
        let record = self.state.record();
        let text = text(&record)?;
        self.append(writer.take(Some(text))).await?;
        self.state.recorded(record);
        self.recorded_us = self.now.since_us;
        Ok(())
    }

    /// Writes down where the view is, though nothing was emitted.
    pub(super) async fn note(&mut self) -> Result<(), ViewError> {
        let record = self.state.record();
        let row = Book {
            ts: self.state.watermark().unwrap_or(self.now.wall_us).max(TS_MIN_US),
            empty: true,
            position: Some(text(&record)?),
            ..Book::default()
        };
        let columns = &self.view.columns;
        let rows = columns.rows(&columns.nulls(1), &[row]).map_err(ViewError::table);
        self.append(rows).await?;
        self.state.recorded(record);
        self.recorded_us = self.now.since_us;
        Ok(())
    }

    pub(super) async fn append(&mut self, rows: Result<RecordBatch, ViewError>) -> Result<(), ViewError> {
        let rows = rows?;
        let count = rows.num_rows() as u64;
        self.sink.append(&self.view.changes, self.view.columns.schema(), rows).await?;
        self.progress.rows_out += count;
        Ok(())
    }
}

pub(super) fn text(record: &Record) -> Result<String, ViewError> {
    serde_json::to_string(record).map_err(ViewError::table)
}
