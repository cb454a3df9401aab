//! Rows of any fields, gathered into batches of streams within the limits of a batch.
//!
//! A batch has one type for each field. A row goes into the first open batch of its stream in which each of its fields is
//! new or has its type, so fields that differ from row to row make few batches; which type a table's column has is no
//! matter here: what does not fit is rescued where it is shown and written. Columns are filled up with nulls only where a
//! value follows, so a field that one row has costs little before its batch is closed; what closing costs is counted. Equal
//! rows in equal order give equal batches.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow_array::builder::{BinaryBuilder, BooleanBuilder, Float64Builder, Int64Builder, StringBuilder};
use arrow_array::{ArrayRef, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow_buffer::{Buffer, OffsetBuffer};
use indexmap::IndexMap;
use wire::sealed::{CutError, NO_WATERMARK};
use wire::{
    BATCH_DATES_MAX, BATCH_ROWS_MAX, CutBatch, DAY_US, FIELDS_MAX, FieldName, FieldType, StreamField, StreamName,
    StreamSchema,
};

/// Open batches of a stream: more would mean that its fields have no types to speak of.
const OPEN_MAX: usize = 8;
/// Streams of one gathering.
const STREAMS_MAX: usize = 1_000;
/// A batch is closed above this.
const BATCH_BYTES: usize = 16 << 20;
const GOOD: &str = "good";
/// What a row takes beside its fields: time, device's and quality's offsets, quality.
const ROW_BYTES: usize = 24;

/// A value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Cell<'a> {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(&'a str),
    /// µs since 1970, UTC.
    Time(i64),
    Bytes(&'a [u8]),
}

impl Cell<'_> {
    fn kind(&self) -> FieldType {
        match self {
            Self::Bool(_) => FieldType::Bool,
            Self::Int(_) => FieldType::Int64,
            Self::Float(_) => FieldType::Float64,
            Self::Text(_) => FieldType::Text,
            Self::Time(_) => FieldType::Timestamp,
            Self::Bytes(_) => FieldType::Binary,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len() + 4,
            Self::Bytes(bytes) => bytes.len() + 4,
            _ => 8,
        }
    }
}

/// Why a row is not gathered.
#[derive(Debug, thiserror::Error)]
pub enum RowsError {
    /// Of all rows together: nothing of them may be used.
    #[error("the rows would take more than {0} bytes: send fewer at a time")]
    TooLarge(usize),
    #[error("rows of more than {STREAMS_MAX} streams: send fewer at a time")]
    TooManyStreams,
    #[error("make a batch")]
    Cut(#[from] CutError),
}

/// A batch that has no number yet.
#[derive(Debug, Clone)]
pub struct Gathered {
    pub cut: CutBatch,
    pub schema: Arc<StreamSchema>,
    pub rows: RecordBatch,
}

/// Who makes the batches, as their headers say it.
#[derive(Debug, Clone)]
pub struct Maker {
    /// Version of the software.
    pub agent: String,
    /// Hash of what it was told to do.
    pub configuration: u64,
}

/// Rows on their way into batches.
#[derive(Debug)]
pub struct Gathering {
    maker: Maker,
    bytes_max: usize,
    /// Rows of a batch; never above the limit.
    rows_max: usize,
    /// What all batches take when they are closed.
    bytes: usize,
    declared: BTreeMap<StreamName, StreamSchema>,
    open: BTreeMap<StreamName, Vec<Open>>,
    closed: Vec<Gathered>,
}

impl Gathering {
    /// None yet. All batches together take at most `bytes_max` bytes of memory.
    pub fn new(maker: Maker, bytes_max: usize) -> Self {
        let (declared, open, closed) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        Self { maker, bytes_max, rows_max: BATCH_ROWS_MAX, bytes: 0, declared, open, closed }
    }

    /// Each batch of this stream has these fields, in this order, before any other.
    pub fn declare(&mut self, stream: StreamName, schema: StreamSchema) {
        self.declared.insert(stream, schema);
    }

    /// With so many rows in a batch at most.
    #[must_use]
    pub fn with_rows_max(self, rows_max: usize) -> Self {
        Self { rows_max: rows_max.clamp(1, BATCH_ROWS_MAX), ..self }
    }

    /// Adds a row: its fields, each at most once and at most [`FIELDS_MAX`]. The time must be one that can be stored.
    ///
    /// # Errors
    /// When all rows together have become too large.
    pub fn add<'a>(
        &mut self,
        stream: &StreamName,
        ts: i64,
        device: Option<&str>,
        cells: impl Iterator<Item = (&'a FieldName, Cell<'a>)> + Clone,
    ) -> Result<(), RowsError> {
        if !self.open.contains_key(stream) {
            if self.open.len() >= STREAMS_MAX {
                return Err(RowsError::TooManyStreams);
            }
            self.open.insert(stream.clone(), Vec::new());
        }
        let open = self.open.get_mut(stream).expect("it was just added");
        let index = match open.iter().position(|batch| batch.takes(ts, cells.clone())) {
            Some(index) => index,
            None => {
                if open.len() >= OPEN_MAX {
                    self.closed.push(open.remove(0).close(stream, &self.maker)?);
                }
                let declared = self.declared.get(stream).map(Open::with);
                open.push(declared.filter(|batch| batch.takes(ts, cells.clone())).unwrap_or_default());
                open.len() - 1
            }
        };
        let batch = &mut open[index];
        let before = batch.bytes();
        batch.add(ts, device, cells);
        self.bytes += batch.bytes() - before;
        if batch.ts.len() >= self.rows_max || batch.bytes() >= BATCH_BYTES {
            self.closed.push(open.remove(index).close(stream, &self.maker)?);
        }
        if self.bytes > self.bytes_max { Err(RowsError::TooLarge(self.bytes_max)) } else { Ok(()) }
    }

    /// The batches that are full, whose bytes count no more.
    pub fn take_closed(&mut self) -> Vec<Gathered> {
        if self.closed.is_empty() {
            return Vec::new();
        }
        self.bytes = self.open.values().flatten().map(Open::bytes).sum();
        std::mem::take(&mut self.closed)
    }

    /// All batches that are left, those of a stream in the order of their first rows.
    ///
    /// # Errors
    /// When a batch cannot be made.
    pub fn finish(mut self) -> Result<Vec<Gathered>, RowsError> {
        for (stream, open) in std::mem::take(&mut self.open) {
            for batch in open {
                self.closed.push(batch.close(&stream, &self.maker)?);
            }
        }
        Ok(self.closed)
    }
}

/// A batch in the making.
#[derive(Debug, Default)]
struct Open {
    ts: Vec<i64>,
    device: StringBuilder,
    fields: IndexMap<FieldName, Column>,
    dates: BTreeSet<i64>,
    /// Of texts and bytes.
    text_bytes: usize,
}

impl Open {
    fn with(schema: &StreamSchema) -> Self {
        let fields = schema.fields().iter().map(|field| (field.name.clone(), Column::new(field.kind)));
        Self { fields: fields.collect(), ..Self::default() }
    }

    fn takes<'a>(&self, ts: i64, cells: impl Iterator<Item = (&'a FieldName, Cell<'a>)>) -> bool {
        if self.dates.len() >= BATCH_DATES_MAX && !self.dates.contains(&ts.div_euclid(DAY_US)) {
            return false;
        }
        let mut new = 0;
        for (name, cell) in cells {
            match self.fields.get(name) {
                Some(column) if column.kind != cell.kind() => return false,
                Some(_) => {}
                None => new += 1,
            }
        }
        self.fields.len() + new <= FIELDS_MAX
    }

    fn add<'a>(&mut self, ts: i64, device: Option<&str>, cells: impl Iterator<Item = (&'a FieldName, Cell<'a>)>) {
        let row = self.ts.len();
        self.ts.push(ts);
        self.device.append_option(device);
        self.text_bytes += device.map_or(0, str::len);
        self.dates.insert(ts.div_euclid(DAY_US));
        for (name, cell) in cells {
            if matches!(cell, Cell::Text(_) | Cell::Bytes(_)) {
                self.text_bytes += cell.bytes();
            }
            match self.fields.get_mut(name) {
                Some(column) => column.put(row, cell),
                None => {
                    let mut column = Column::new(cell.kind());
                    column.put(row, cell);
                    self.fields.insert(name.clone(), column);
                }
            }
        }
    }

    /// What it takes when it is closed.
    fn bytes(&self) -> usize {
        self.ts.len() * (ROW_BYTES + 8 * self.fields.len()) + self.text_bytes
    }

    fn close(mut self, stream: &StreamName, maker: &Maker) -> Result<Gathered, RowsError> {
        let count = self.ts.len();
        let fields = self.fields.iter().map(|(name, column)| StreamField { name: name.clone(), kind: column.kind });
        let schema = StreamSchema::new(fields.collect()).expect("names are the keys of a map, and counted");
        let mut columns: Vec<ArrayRef> = Vec::with_capacity(self.fields.len() + 3);
        columns.push(Arc::new(TimestampMicrosecondArray::from(self.ts).with_timezone("UTC")));
        columns.push(Arc::new(self.device.finish()));
        columns.extend(self.fields.into_values().map(|column| column.close(count)));
        let offsets = OffsetBuffer::from_repeated_length(GOOD.len(), count);
        let good = StringArray::new(offsets, Buffer::from(GOOD.repeat(count).into_bytes()), None);
        columns.push(Arc::new(good));
        let rows = RecordBatch::try_new(Arc::clone(schema.arrow()), columns).map_err(CutError::Arrow)?;
        let cut = CutBatch::seal(stream.clone(), &schema, &rows, NO_WATERMARK, &maker.agent, maker.configuration)?;
        Ok(Gathered { cut, schema: Arc::new(schema), rows })
    }
}

#[derive(Debug)]
struct Column {
    kind: FieldType,
    values: Values,
    /// Rows that it has.
    len: usize,
}

#[derive(Debug)]
enum Values {
    Float(Float64Builder),
    Int(Int64Builder),
    Time(Int64Builder),
    Bool(BooleanBuilder),
    Text(StringBuilder),
    Bytes(BinaryBuilder),
}

impl Column {
    fn new(kind: FieldType) -> Self {
        let values = match kind {
            FieldType::Float64 => Values::Float(Float64Builder::new()),
            FieldType::Int64 => Values::Int(Int64Builder::new()),
            FieldType::Timestamp => Values::Time(Int64Builder::new()),
            FieldType::Bool => Values::Bool(BooleanBuilder::new()),
            FieldType::Text => Values::Text(StringBuilder::new()),
            FieldType::Binary => Values::Bytes(BinaryBuilder::new()),
        };
        Self { kind, values, len: 0 }
    }

    /// Nulls up to a row.
    fn fill(&mut self, row: usize) {
        let missing = row - self.len;
        match &mut self.values {
            Values::Float(values) => values.append_nulls(missing),
            Values::Int(values) | Values::Time(values) => values.append_nulls(missing),
            Values::Bool(values) => values.append_nulls(missing),
            Values::Text(values) => (0..missing).for_each(|_| values.append_null()),
            Values::Bytes(values) => (0..missing).for_each(|_| values.append_null()),
        }
        self.len = row;
    }

    fn put(&mut self, row: usize, cell: Cell<'_>) {
        debug_assert!(self.len <= row, "a field comes once in a row");
        self.fill(row);
        match (&mut self.values, cell) {
            (Values::Float(values), Cell::Float(value)) => values.append_value(value),
            (Values::Int(values), Cell::Int(value)) | (Values::Time(values), Cell::Time(value)) => {
                values.append_value(value);
            }
            (Values::Bool(values), Cell::Bool(value)) => values.append_value(value),
            (Values::Text(values), Cell::Text(value)) => values.append_value(value),
            (Values::Bytes(values), Cell::Bytes(value)) => values.append_value(value),
            _ => unreachable!("`takes` has compared the types"),
        }
        self.len = row + 1;
    }

    fn close(mut self, count: usize) -> ArrayRef {
        self.fill(count);
        match self.values {
            Values::Float(mut values) => Arc::new(values.finish()),
            Values::Int(mut values) => Arc::new(values.finish()),
            Values::Time(mut values) => {
                let times = values.finish();
                Arc::new(times.reinterpret_cast::<arrow_array::types::TimestampMicrosecondType>().with_timezone("UTC"))
            }
            Values::Bool(mut values) => Arc::new(values.finish()),
            Values::Text(mut values) => Arc::new(values.finish()),
            Values::Bytes(mut values) => Arc::new(values.finish()),
        }
    }
}

#[cfg(test)]
mod tests {
    use arrow_array::Array;
    use wire::TS_MIN_US;

    use super::*;

    fn gathering(bytes_max: usize) -> Gathering {
        Gathering::new(Maker { agent: "test".to_owned(), configuration: 0 }, bytes_max)
    }

    fn add(rows: &mut Gathering, ts: i64, cells: &[(&str, Cell<'_>)]) -> Result<(), RowsError> {
        let names: Vec<(FieldName, Cell<'_>)> =
            cells.iter().map(|(name, cell)| (name.parse().unwrap(), *cell)).collect();
        rows.add(&"m".parse().unwrap(), ts, Some("d"), names.iter().map(|(name, cell)| (name, *cell)))
    }

    fn shape(batches: &[Gathered]) -> Vec<(usize, String)> {
        batches.iter().map(|batch| (batch.rows.num_rows(), batch.schema.canonical().replace('\n', ","))).collect()
    }

    #[test]
    fn fields_that_come_and_go_share_a_batch_and_types_that_differ_do_not() {
        let mut rows = gathering(1 << 20);
        for n in 0..10 {
            let value = if n % 2 == 0 { Cell::Int(n) } else { Cell::Float(n as f64) };
            let other = ["a", "b"][(n % 3 == 0) as usize];
            add(&mut rows, TS_MIN_US + n, &[("v", value), (other, Cell::Bool(true))]).unwrap();
        }
        let batches = rows.finish().unwrap();
        let all = |kind: &str| format!("ts timestamp,device text,v {kind},b bool,a bool,quality text,");
        let (int, float) = (all("int64"), all("float64").replace("b bool,a bool", "a bool,b bool"));
        assert_eq!(shape(&batches), [(5, int), (5, float)]);
        let v = batches[0].rows.column_by_name("a").unwrap();
        assert_eq!((v.len(), v.null_count()), (5, 2));
        assert_eq!(batches[0].cut.decode(&batches[0].schema).unwrap(), batches[0].rows);
    }

    #[test]
    fn a_batch_ends_at_each_of_its_limits() {
        let mut rows = gathering(64 << 20);
        for n in 0..BATCH_ROWS_MAX as i64 + 1 {
            add(&mut rows, TS_MIN_US + n, &[("v", Cell::Int(n))]).unwrap();
        }
        let counts: Vec<usize> = rows.finish().unwrap().iter().map(|batch| batch.rows.num_rows()).collect();
        assert_eq!(counts, [BATCH_ROWS_MAX, 1]);
        let mut rows = gathering(64 << 20);
        for day in 0..65 {
            add(&mut rows, TS_MIN_US + day * DAY_US, &[("v", Cell::Int(day))]).unwrap();
        }
        assert_eq!(rows.finish().unwrap().len(), 2);
        let mut rows = gathering(64 << 20);
        for n in 0..600 {
            add(&mut rows, TS_MIN_US, &[(&format!("f{n}"), Cell::Int(n))]).unwrap();
        }
        assert_eq!(rows.finish().unwrap().len(), 2, "of 600 fields");
    }

    #[test]
    fn what_closing_costs_is_counted_before_memory_is_given_to_it() {
        let mut rows = gathering(1 << 20);
        // Each row has another field: 500 columns of 10,000 rows would be 40 MB.
        let ended =
            (0..10_000_i64).find(|n| add(&mut rows, TS_MIN_US, &[(&format!("f{}", n % 500), Cell::Int(*n))]).is_err());
        assert!(ended.is_some_and(|n| n < 1_000), "{ended:?}");
    }
}
