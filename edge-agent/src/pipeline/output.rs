//! The rows of one stream between two cuts, as columns.
//!
//! Rows keep the order in which they came. A cut takes all of them, as one batch or, when a limit of a batch would be
//! passed (rows, decoded bytes, dates), as several in order.

use std::sync::Arc;

use arrow_array::builder::{
    BinaryBuilder, BooleanBuilder, Float64Builder, Int64Builder, StringBuilder, TimestampMicrosecondBuilder,
};
use arrow_array::{ArrayRef, RecordBatch, TimestampMicrosecondArray};
use segment_log::Position;
use wire::sealed::{CutError, NO_WATERMARK};
use wire::{BATCH_DATES_MAX, BATCH_ROWS_MAX, CutBatch, DAY_US, FieldType, StreamName, StreamSchema};

/// Decoded bytes of one batch, well below what the wire allows: a gateway has little memory.
const BATCH_BYTES: usize = 8 << 20;

/// One value of a row.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Cell<'a> {
    Null,
    Float(f64),
    Int(i64),
    Bool(bool),
    Text(&'a str),
    Time(i64),
    Bytes(&'a [u8]),
}

/// A stream's buffer.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) stream: StreamName,
    pub(super) lane: usize,
    /// Rows of entries below are in the spool already (rule 1).
    pub(super) skip_before: Position,
    /// The highest that a batch may carry; never falls.
    pub(super) watermark: i64,
    schema: StreamSchema,
    columns: Columns,
}

#[derive(Debug)]
struct Columns {
    ts: Vec<i64>,
    device: StringBuilder,
    fields: Vec<Column>,
    quality: StringBuilder,
    row_bytes: Vec<u32>,
    bytes: usize,
}

#[derive(Debug)]
enum Column {
    Float(Float64Builder),
    Int(Int64Builder),
    Bool(BooleanBuilder),
    Text(StringBuilder),
    Time(TimestampMicrosecondBuilder),
    Binary(BinaryBuilder),
}

impl Output {
    pub(super) fn new(stream: StreamName, schema: StreamSchema, lane: usize, skip_before: Position) -> Self {
        let columns = Columns::new(&schema);
        Self { stream, lane, skip_before, watermark: NO_WATERMARK, schema, columns }
    }

    pub(super) fn schema(&self) -> &StreamSchema {
        &self.schema
    }

    pub(super) fn rows(&self) -> usize {
        self.columns.ts.len()
    }

    /// About what the rows take in memory.
    pub(super) fn bytes(&self) -> usize {
        self.columns.bytes
    }

    /// Adds a row; `cells` are the fields in the order of the schema.
    pub(super) fn push<'a>(
        &mut self,
        ts: i64,
        device: Option<&str>,
        cells: impl Iterator<Item = Cell<'a>>,
        quality: &str,
    ) {
        self.columns.push(ts, device, cells, quality);
    }

    /// Takes all rows, sealed.
    pub(super) fn cut(&mut self, agent: &str, configuration: u64) -> Result<Vec<CutBatch>, CutError> {
        if self.columns.ts.is_empty() {
            return Ok(Vec::new());
        }
        let lengths = self.columns.lengths();
        let rows = self.columns.finish(&self.schema)?;
        let mut batches = Vec::new();
        let mut at = 0;
        for length in lengths {
            let part = rows.slice(at, length);
            at += length;
            batches.push(CutBatch::seal(
                self.stream.clone(),
                &self.schema,
                &part,
                self.watermark,
                agent,
                configuration,
            )?);
        }
        Ok(batches)
    }
}

impl Columns {
    fn new(schema: &StreamSchema) -> Self {
        let column = |kind| match kind {
            FieldType::Float64 => Column::Float(Float64Builder::new()),
            FieldType::Int64 => Column::Int(Int64Builder::new()),
            FieldType::Bool => Column::Bool(BooleanBuilder::new()),
            FieldType::Text => Column::Text(StringBuilder::new()),
            FieldType::Timestamp => Column::Time(TimestampMicrosecondBuilder::new().with_timezone("UTC")),
            FieldType::Binary => Column::Binary(BinaryBuilder::new()),
        };
        Self {
            ts: Vec::new(),
            device: StringBuilder::new(),
            fields: schema.fields().iter().map(|field| column(field.kind)).collect(),
            quality: StringBuilder::new(),
            row_bytes: Vec::new(),
            bytes: 0,
        }
    }

    fn push<'a>(&mut self, ts: i64, device: Option<&str>, mut cells: impl Iterator<Item = Cell<'a>>, quality: &str) {
        let mut bytes = 8 + 8 + device.map_or(0, str::len) + quality.len();
        self.ts.push(ts);
        self.device.append_option(device);
        for column in &mut self.fields {
            bytes += column.push(cells.next().unwrap_or(Cell::Null));
        }
        self.quality.append_value(quality);
        self.row_bytes.push(u32::try_from(bytes).unwrap_or(u32::MAX));
        self.bytes += bytes;
    }

    /// How many rows each batch gets.
    fn lengths(&self) -> Vec<usize> {
        let mut lengths = Vec::new();
        let (mut rows, mut bytes, mut dates) = (0, 0, Vec::new());
        for (&ts, &row_bytes) in self.ts.iter().zip(&self.row_bytes) {
            let date = ts.div_euclid(DAY_US);
            let new_date = !dates.contains(&date);
            let full = rows == BATCH_ROWS_MAX
                || bytes + row_bytes as usize > BATCH_BYTES
                || (new_date && dates.len() == BATCH_DATES_MAX);
            if full && rows > 0 {
                lengths.push(rows);
                (rows, bytes) = (0, 0);
                dates.clear();
            }
            if new_date || dates.is_empty() {
                dates.push(date);
            }
            rows += 1;
            bytes += row_bytes as usize;
        }
        lengths.push(rows);
        lengths
    }

    fn finish(&mut self, schema: &StreamSchema) -> Result<RecordBatch, CutError> {
        let ts = TimestampMicrosecondArray::from(std::mem::take(&mut self.ts)).with_timezone("UTC");
        let mut columns: Vec<ArrayRef> = vec![Arc::new(ts), Arc::new(self.device.finish())];
        columns.extend(self.fields.iter_mut().map(Column::finish));
        columns.push(Arc::new(self.quality.finish()));
        self.row_bytes.clear();
        self.bytes = 0;
        Ok(RecordBatch::try_new(schema.arrow().clone(), columns)?)
    }
}

impl Column {
    /// Returns the bytes that the value takes. A value of another type becomes null; the callers give the right one.
    fn push(&mut self, cell: Cell<'_>) -> usize {
        match (self, cell) {
            (Self::Float(column), Cell::Float(value)) => column.append_value(value),
            (Self::Float(column), _) => column.append_null(),
            (Self::Int(column), Cell::Int(value)) => column.append_value(value),
            (Self::Int(column), _) => column.append_null(),
            (Self::Bool(column), Cell::Bool(value)) => column.append_value(value),
            (Self::Bool(column), _) => column.append_null(),
            (Self::Time(column), Cell::Time(value)) => column.append_value(value),
            (Self::Time(column), _) => column.append_null(),
            (Self::Text(column), Cell::Text(value)) => {
                column.append_value(value);
                return 4 + value.len();
            }
            (Self::Text(column), _) => column.append_null(),
            (Self::Binary(column), Cell::Bytes(value)) => {
                column.append_value(value);
                return 4 + value.len();
            }
            (Self::Binary(column), _) => column.append_null(),
        }
        8
    }

    fn finish(&mut self) -> ArrayRef {
        match self {
            Self::Float(column) => Arc::new(column.finish()),
            Self::Int(column) => Arc::new(column.finish()),
            Self::Bool(column) => Arc::new(column.finish()),
            Self::Text(column) => Arc::new(column.finish()),
            Self::Time(column) => Arc::new(column.finish()),
            Self::Binary(column) => Arc::new(column.finish()),
        }
    }
}
