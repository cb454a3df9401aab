//! The rows of a batch as bytes: which format they have, and the limits that hold for all of them.
//!
//! Format 1 is an Arrow IPC record batch, read because spools and WALs in the field hold it, and not written any more.
//! Format 2 is [`columns`]. The format is chosen when a batch is sealed and stays with it: nothing encodes rows again until
//! they become Parquet. What a body unpacks to is known before memory is given to it, and every node gives the same answer
//! for the same bytes.

mod arrow;
mod columns;
mod integers;
mod texts;

use std::collections::HashSet;

use arrow_array::cast::AsArray;
use arrow_array::types::TimestampMicrosecondType;
use arrow_array::{Array, RecordBatch};
use bytes::Bytes;

use crate::bytes::Short;
use crate::schema::StreamSchema;
use crate::{BATCH_BYTES_MAX, BATCH_DATES_MAX, BATCH_DECODED_BYTES_MAX, BATCH_ROWS_MAX, DAY_US, TS_MIN_US};

/// How a body is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyFormat {
    /// `message_len u32 | IPC message | IPC data`: one record batch without its schema.
    Arrow = 1,
    /// Columns in Weir's own layout.
    Columns = 2,
}

/// Why the rows of an undamaged batch are refused. A pure function of the batch: every node agrees (rule 6).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    #[error("the Arrow body does not decode: {0}")]
    Arrow(String),
    #[error("the columns do not decode: {0}")]
    Columns(&'static str),
    #[error("the header says {header} rows, the body has {body}")]
    Rows { header: u32, body: usize },
    #[error("{0} rows are more than {BATCH_ROWS_MAX}")]
    TooManyRows(usize),
    #[error("the body would take {0} bytes decoded, more than {BATCH_DECODED_BYTES_MAX}")]
    TooLarge(u64),
    #[error("{0} dates are more than the {BATCH_DATES_MAX} that a batch may span")]
    TooManyDates(usize),
    #[error("an event time is missing or outside what is stored")]
    EventTime,
}

impl From<Short> for BodyError {
    fn from(_: Short) -> Self {
        Self::Columns("the body is cut short")
    }
}

/// What of a batch's header its body stands on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frame {
    pub(crate) format: BodyFormat,
    pub(crate) rows: u32,
    /// Times are written as their distance from it.
    pub(crate) min_ts: i64,
}

/// Rows of [`check`] as a body of format 2.
pub(crate) fn encode(rows: &RecordBatch, min_ts: i64) -> Result<Bytes, BodyError> {
    let body = columns::encode(rows, min_ts)?;
    if body.len() > BATCH_BYTES_MAX {
        return Err(BodyError::TooLarge(body.len() as u64));
    }
    Ok(body.into())
}

pub(crate) fn decode(body: &Bytes, frame: Frame, schema: &StreamSchema) -> Result<RecordBatch, BodyError> {
    match frame.format {
        BodyFormat::Arrow => arrow::decode(body, schema),
        BodyFormat::Columns => columns::decode(body, frame, schema),
    }
}

/// Bytes that the body says it takes once decoded; 0 when that cannot be told, and [`decode`] will refuse it.
pub(crate) fn decoded_bytes(body: &Bytes, format: BodyFormat) -> usize {
    let bytes = match format {
        BodyFormat::Arrow => arrow::decoded_bytes_of(body),
        BodyFormat::Columns => columns::decoded_bytes(body),
    };
    usize::try_from(bytes.unwrap_or(0)).map_or(BATCH_DECODED_BYTES_MAX, |bytes| bytes.min(BATCH_DECODED_BYTES_MAX))
}

/// The limits of a batch, and its smallest and largest event time.
pub(crate) fn check(rows: &RecordBatch) -> Result<(i64, i64), BodyError> {
    if rows.num_rows() > BATCH_ROWS_MAX {
        return Err(BodyError::TooManyRows(rows.num_rows()));
    }
    let times = rows.column(0).as_primitive_opt::<TimestampMicrosecondType>().ok_or(BodyError::EventTime)?;
    if times.null_count() > 0 || times.is_empty() {
        return Err(BodyError::EventTime);
    }
    let (mut min, mut max) = (i64::MAX, i64::MIN);
    let mut dates = HashSet::new();
    let mut last_date = None;
    for &ts in times.values() {
        min = min.min(ts);
        max = max.max(ts);
        let date = ts.div_euclid(DAY_US);
        if last_date != Some(date) {
            last_date = Some(date);
            dates.insert(date);
        }
    }
    if min < TS_MIN_US {
        return Err(BodyError::EventTime);
    }
    if dates.len() > BATCH_DATES_MAX {
        return Err(BodyError::TooManyDates(dates.len()));
    }
    Ok((min, max))
}

#[cfg(test)]
mod tests;
