//! Which rows of a row group are of which device: files are sorted by device, so each has its rows in one piece.
//!
//! With that in memory (`kept`) a question about one device reads its rows and no others, and not the column of devices at all.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use arrow::datatypes::{ArrowNativeType, Int32Type};
use arrow_array::cast::AsArray;
use arrow_array::{Array, RecordBatch};
use arrow_schema::ArrowError;
use datafusion::common::Result;

/// Where rows follow one another in shorter runs than this on average, the column itself is read.
const RUN_ROWS: usize = 4;
/// What a run takes beside its text.
const RUN_BYTES: usize = 48;

/// See the module.
#[derive(Debug)]
pub(super) struct Devices {
    /// Rows that follow one another, in order. Those of no device are left out.
    runs: Vec<(Arc<str>, Range<usize>)>,
    /// Whether each device has one run, in order of their texts.
    sorted: bool,
}

impl Devices {
    /// Of batches of the column as indices, of so many rows in all; none where runs are short, or it is not indices.
    pub(super) fn of(
        batches: impl Iterator<Item = Result<RecordBatch, ArrowError>>,
        rows: usize,
    ) -> Result<Option<Self>> {
        let mut runs: Vec<(Arc<str>, Range<usize>)> = Vec::new();
        let mut row = 0;
        for batch in batches {
            let column = Arc::clone(batch?.column(0));
            let Some(indices) = column.as_dictionary_opt::<Int32Type>() else { return Ok(None) };
            let Some(texts) = indices.values().as_string_opt::<i32>() else { return Ok(None) };
            let mut before = None;
            for index in indices.keys() {
                let index = index.map(ArrowNativeType::as_usize).filter(|index| texts.is_valid(*index));
                let device = index.map(|index| texts.value(index));
                match (device, runs.last_mut()) {
                    (Some(_), Some((_, rows))) if before == index && rows.end == row => rows.end += 1,
                    (Some(device), Some((last, rows))) if **last == *device && rows.end == row => rows.end += 1,
                    (Some(device), _) => runs.push((Arc::from(device), row..row + 1)),
                    (None, _) => {}
                }
                before = index;
                row += 1;
            }
            if runs.len() * RUN_ROWS > rows {
                return Ok(None);
            }
        }
        let sorted = runs.is_sorted_by(|(one, _), (next, _)| one < next);
        Ok(Some(Self { runs, sorted }))
    }

    pub(super) fn bytes(&self) -> usize {
        self.runs.iter().map(|(device, _)| device.len() + RUN_BYTES).sum()
    }

    /// The rows of these devices, in order.
    pub(super) fn rows_of(&self, devices: &[String]) -> Vec<Range<usize>> {
        if !self.sorted {
            let named = self.runs.iter().filter(|(device, _)| devices.iter().any(|named| **named == **device));
            return named.map(|(_, rows)| rows.clone()).collect();
        }
        let find = |named: &String| self.runs.binary_search_by(|(device, _)| (**device).cmp(named.as_str())).ok();
        let found = devices.iter().filter_map(find).collect::<BTreeSet<_>>();
        found.into_iter().map(|run| self.runs[run].1.clone()).collect()
    }

    /// The devices of these rows, which are in order and of some device each.
    pub(super) fn texts(&self, rows: &[Range<usize>]) -> Vec<(Arc<str>, usize)> {
        let mut texts = Vec::with_capacity(rows.len());
        for rows in rows {
            let first = self.runs.partition_point(|(_, run)| run.end <= rows.start);
            for (device, run) in self.runs[first..].iter().take_while(|(_, run)| run.start < rows.end) {
                texts.push((Arc::clone(device), run.end.min(rows.end) - run.start.max(rows.start)));
            }
        }
        texts
    }
}

#[cfg(test)]
mod tests;
