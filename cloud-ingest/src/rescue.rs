//! Fits a batch into its table's columns: what does not fit goes to `_rescued`, and the row says so (rule 6).
//!
//! Columns are matched by name. A column that the batch lacks is null. A value of another type than its column's is taken
//! in if it fits ([`fit`]); otherwise it is null there, stands in the JSON object `_rescued`, and its row's `quality` gets
//! `type:<field>`. A float that is not finite likewise, with `nonfinite:<field>`, because Parquet statistics hide NaN. A
//! value of a field that the table does not have (yet) stands in `_rescued` too; `quality` stays. In `_rescued` a float that
//! is not finite is text (`"NaN"`, `"Infinity"`, `"-Infinity"`), a timestamp is its number of µs, bytes are hexadecimal.
//!
//! The result is a pure function of the batch, its provenance and the table's fields, so the hot scan and the writer
//! always agree. When a column gets another type, rows that are rescued already are fitted again ([`refit`]), and come out
//! as the batch would (decision 0013). A batch in which everything fits, nearly all, shares its columns with the result.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::Float64Type;
use arrow_array::{
    Array, ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray, new_null_array,
};
use arrow_buffer::{Buffer, NullBuffer, OffsetBuffer};
use arrow_schema::{DataType, Schema, SchemaRef};
use serde_json::value::RawValue;
use wire::ids::{EdgeId, Seq, SpoolId};
use wire::schema::{DATE, DEVICE, FieldType, QUALITY, StreamField, TS, table_schema};

use self::fit::{Fitting, Given};

mod fit;
mod refit;

pub use refit::refit;

/// Quality of a row that nothing is wrong with.
const GOOD: &str = "good";
/// Reasons that stand before a field's name, with a colon between.
const TYPE: &str = "type";
const NONFINITE: &str = "nonfinite";

/// Where a batch came from, and when this node wrote it to its WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provenance {
    pub edge: EdgeId,
    pub spool: SpoolId,
    pub seq: Seq,
    /// µs since 1970, UTC.
    pub received_at_us: i64,
}

/// The columns of a table with these fields, in order, without the partition column.
pub fn row_schema(fields: &[StreamField]) -> SchemaRef {
    let table = table_schema(fields);
    let columns: Vec<_> = table.fields().iter().filter(|column| column.name() != DATE).cloned().collect();
    Arc::new(Schema::new(columns))
}

/// The rows of a stream's batch (`ts`, `device`, fields, `quality`) in the columns of a table with these fields,
/// without the partition column.
pub fn rescue(rows: &RecordBatch, provenance: &Provenance, fields: &[StreamField]) -> RecordBatch {
    let count = rows.num_rows();
    let mut rescued = Rescued::new(count);
    let mut columns = Vec::with_capacity(fields.len() + 8);
    columns.push(own_column(rows, TS, &wire::schema::timestamp_type()));
    columns.push(own_column(rows, DEVICE, &DataType::Utf8));
    for field in fields {
        let name = field.name.as_str();
        let column = match rows.column_by_name(name) {
            None => new_null_array(&field.kind.arrow(), count),
            Some(column) if *column.data_type() != field.kind.arrow() => rescued.fitted(name, column, field.kind),
            Some(column) if field.kind == FieldType::Float64 => rescued.finite(name, column),
            Some(column) => column.clone(),
        };
        columns.push(column);
    }
    for (column, field) in rows.columns().iter().zip(rows.schema_ref().fields()) {
        let name = field.name().as_str();
        let known = matches!(name, TS | DEVICE | QUALITY) || fields.iter().any(|known| known.name.as_str() == name);
        if !known {
            rescued.whole(name, column);
        }
    }
    let quality = own_column(rows, QUALITY, &DataType::Utf8);
    columns.push(rescued.quality(&quality));
    columns.push(constant_text(provenance.edge.as_str(), count));
    columns.push(constant_text(&provenance.spool.to_string(), count));
    columns.push(Arc::new(Int64Array::from(vec![provenance.seq.0.cast_signed(); count])));
    let received = TimestampMicrosecondArray::from(vec![provenance.received_at_us; count]);
    columns.push(Arc::new(received.with_timezone("UTC")));
    columns.push(rescued.into_column());
    RecordBatch::try_new(row_schema(fields), columns).expect("each column was made with its type and length")
}

/// A column that every batch has; null where one has not, so that this function has no error.
fn own_column(rows: &RecordBatch, name: &str, kind: &DataType) -> ArrayRef {
    match rows.column_by_name(name) {
        Some(column) if column.data_type() == kind => column.clone(),
        _ if name == TS => Arc::new(TimestampMicrosecondArray::from(vec![0; rows.num_rows()]).with_timezone("UTC")),
        _ => new_null_array(kind, rows.num_rows()),
    }
}

fn constant_text(text: &str, count: usize) -> ArrayRef {
    let offsets = OffsetBuffer::from_repeated_length(text.len(), count);
    Arc::new(StringArray::new(offsets, Buffer::from(text.repeat(count).into_bytes()), None))
}

/// Values of `_rescued` of one row, by field.
type Values = BTreeMap<String, Box<RawValue>>;

/// What was found that does not fit; empty, and without any allocation per row, in nearly all batches.
struct Rescued {
    count: usize,
    /// Per row: its values, and the reasons in order. Empty while everything fits.
    rows: Vec<(Values, Vec<String>)>,
}

impl Rescued {
    fn new(count: usize) -> Self {
        Self { count, rows: Vec::new() }
    }

    fn add(&mut self, row: usize, name: &str, value: &Given<'_>, reason: Option<&str>) {
        if self.rows.is_empty() {
            self.rows.resize_with(self.count, Default::default);
        }
        let (values, reasons) = &mut self.rows[row];
        values.insert(name.to_owned(), value.json());
        reasons.extend(reason.map(|reason| format!("{reason}:{name}")));
    }

    /// Takes every value of a column.
    fn whole(&mut self, name: &str, column: &ArrayRef) {
        for row in (0..column.len()).filter(|row| column.is_valid(*row)) {
            if let Some(given) = Given::of(column, row) {
                self.add(row, name, &given, None);
            }
        }
    }

    /// Gives a column of this type with the values that fit it, and takes the others.
    fn fitted(&mut self, name: &str, column: &ArrayRef, kind: FieldType) -> ArrayRef {
        let mut fitting = Fitting::new(kind, column.len());
        for row in 0..column.len() {
            let given = if column.is_valid(row) { Given::of(column, row) } else { None };
            if !fitting.take(given.as_ref())
                && let Some(given) = given
            {
                self.add(row, name, &given, Some(why(&given)));
            }
        }
        fitting.finish()
    }

    /// Takes the values of a float column that are not finite, and gives the column without them.
    fn finite(&mut self, name: &str, column: &ArrayRef) -> ArrayRef {
        let floats = column.as_primitive::<Float64Type>();
        if floats.values().iter().all(|value| value.is_finite()) {
            return column.clone();
        }
        for row in (0..floats.len()).filter(|row| floats.is_valid(*row)) {
            if !floats.value(row).is_finite() {
                self.add(row, name, &Given::Float(floats.value(row)), Some(NONFINITE));
            }
        }
        let kept = (0..floats.len()).map(|row| floats.is_valid(row) && floats.value(row).is_finite());
        let nulls = NullBuffer::from_iter(kept);
        // What stands below a null is zero, so that no reader of the raw values meets it.
        let values = floats.values().iter().map(|value| if value.is_finite() { *value } else { 0.0 });
        Arc::new(Float64Array::new(values.collect(), Some(nulls)))
    }

    fn quality(&self, column: &ArrayRef) -> ArrayRef {
        if self.rows.iter().all(|(_, reasons)| reasons.is_empty()) {
            return column.clone();
        }
        let qualities = column.as_string::<i32>().iter();
        let with_reasons = qualities.zip(&self.rows).map(|(quality, (_, reasons))| match quality {
            quality if reasons.is_empty() => quality.map(str::to_owned),
            None | Some(GOOD | "") => Some(reasons.join(",")),
            Some(quality) => Some(format!("{quality},{}", reasons.join(","))),
        });
        Arc::new(with_reasons.collect::<StringArray>())
    }

    fn into_column(self) -> ArrayRef {
        if self.rows.is_empty() {
            return new_null_array(&DataType::Utf8, self.count);
        }
        let objects = self.rows.into_iter().map(|(values, _)| match values.is_empty() {
            true => None,
            false => Some(object(&values)),
        });
        Arc::new(objects.collect::<StringArray>())
    }
}

/// Why a value that does not fit is not in its column.
fn why(given: &Given<'_>) -> &'static str {
    if given.is_finite() { TYPE } else { NONFINITE }
}

fn object(values: &Values) -> String {
    serde_json::to_string(values).expect("text and JSON are JSON")
}

#[cfg(test)]
mod tests;
