//! How the rows of a view stand in its stream, and how the view shows them again.
//!
//! The stream `<v>_changes` has `ts` (where the window begins, or the event time of a single row), `device` (the question's
//! text column of that name), the columns below, and one field for each other column of the question: under its own
//! name where that can be the name of a field, else as `view_c_` and what of the name can be kept. What a stream cannot
//! store is cast where nothing is lost, and cast back in the view: integers and `Date32` (as a time), times in coarser
//! units than a microsecond; the rest is refused when the view is made.
//!
//! | column | what it is |
//! |---|---|
//! | `view_window`, `view_end` | the window; null for single rows |
//! | `view_revision` | of the window, from 1; readers take the highest |
//! | `view_empty` | this revision says that the window has no rows; the only row of it |
//! | `view_position` | JSON, of the last row of an append: what the view reflects (`state.rs`) |

use std::collections::HashSet;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, TimestampMicrosecondType};
use arrow_array::{
    Array, ArrayRef, BooleanArray, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
    new_null_array,
};
use arrow_cast::{CastOptions, cast_with_options};
use arrow_schema::{ArrowError, DataType, Schema, SchemaRef, TimeUnit};
use datafusion::catalog::TableProvider;
use datafusion::catalog::view::ViewTable;
use datafusion::common::{Result, plan_err};
use datafusion::datasource::provider_as_source;
use datafusion::functions_aggregate::min_max::max_udaf;
use datafusion::logical_expr::expr::WindowFunction;
use datafusion::logical_expr::{Expr, ExprFunctionExt, LogicalPlan, LogicalPlanBuilder};
use datafusion::prelude::{cast, col, lit};
use wire::ids::OWN_EDGE;
use wire::schema::{DEVICE, EDGE, TS, timestamp_type};
use wire::{FieldName, FieldType, StreamField, StreamName, StreamSchema};

use super::shape::Kept;
use crate::fused_table::LiveTable;

pub(crate) const WINDOW: &str = "view_window";
pub(crate) const END: &str = "view_end";
pub(crate) const REVISION: &str = "view_revision";
pub(crate) const EMPTY: &str = "view_empty";
pub(crate) const POSITION: &str = "view_position";
/// Begins the names of Weir's own columns.
const OWN: &str = "view_";

/// Where a column of the question is in the stream.
#[derive(Debug, Clone)]
struct Column {
    name: String,
    kind: DataType,
    stored: String,
    stored_kind: DataType,
}

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Columns {
    columns: Vec<Column>,
    /// That which `ts` of the stream holds.
    time: usize,
    of_windows: bool,
    schema: Arc<StreamSchema>,
}

impl Columns {
    /// The columns for a question of this schema.
    ///
    /// # Errors
    /// When one cannot be stored, or has a name that Weir needs.
    pub(crate) fn of(schema: &Schema, kept: &Kept) -> Result<Self> {
        let (time, of_windows) = match kept {
            Kept::Windows { column, .. } => (*column, true),
            Kept::Rows { column } => (*column, false),
        };
        let mut taken = HashSet::new();
        let mut columns = Vec::with_capacity(schema.fields().len());
        let mut fields = vec![
            (WINDOW, FieldType::Timestamp),
            (END, FieldType::Timestamp),
            (REVISION, FieldType::Int64),
            (EMPTY, FieldType::Bool),
            (POSITION, FieldType::Text),
        ]
        .into_iter()
        .map(|(name, kind)| StreamField { name: name.parse().expect("own names are valid"), kind })
        .collect::<Vec<_>>();
        for (index, field) in schema.fields().iter().enumerate() {
            let name = field.name();
            if name.starts_with(OWN) {
                return plan_err!(
                    "column {name}: names that begin with {OWN} are Weir's own; call it otherwise with AS"
                );
            }
            // A window begins at a microsecond, whatever the function's unit is: date_bin gives nanoseconds.
            let is_window = of_windows && index == time && matches!(field.data_type(), DataType::Timestamp(..));
            let kind = if is_window { Some(FieldType::Timestamp) } else { stored_kind(field.data_type()) };
            let Some(kind) = kind else {
                return plan_err!(
                    "column {name} is {}, which no stream can store: cast it to DOUBLE, BIGINT, TEXT or TIMESTAMP",
                    field.data_type()
                );
            };
            let stored = match () {
                () if index == time => TS.to_owned(),
                () if name == DEVICE && kind == FieldType::Text && taken.insert(DEVICE.to_owned()) => DEVICE.to_owned(),
                () => {
                    let stored = field_name(name, &mut taken);
                    fields.push(StreamField { name: stored.clone(), kind });
                    stored.to_string()
                }
            };
            let (name, kind, stored_kind) = (name.clone(), field.data_type().clone(), kind.arrow());
            columns.push(Column { name, kind, stored, stored_kind });
        }
        let schema = StreamSchema::new(fields).map(Arc::new);
        let schema = schema.map_err(|error| datafusion::common::DataFusionError::Plan(error.to_string()))?;
        Ok(Self { columns, time, of_windows, schema })
    }

    /// The schema of the stream.
    pub(crate) fn schema(&self) -> &Arc<StreamSchema> {
        &self.schema
    }

    /// Whether this table of its stream can hold its rows.
    ///
    /// # Errors
    /// Why not, for people.
    pub(crate) fn check(&self, changes: &StreamName, table: &SchemaRef) -> std::result::Result<(), String> {
        if table.index_of(POSITION).is_err() {
            return Err(format!("{changes} is a stream of its own: choose another name"));
        }
        let other = self.schema.arrow().fields().iter().find_map(|field| {
            let stored = table.field_with_name(field.name()).ok()?;
            (stored.data_type() != field.data_type()).then(|| (field, stored.data_type().clone()))
        });
        match other {
            None => Ok(()),
            Some((field, stored)) => Err(format!(
                "column {} is {} now, and {changes} has it as {stored}: a column that the question reads has got another \
                 type; drop the view, and create it under another name",
                field.name(),
                field.data_type()
            )),
        }
    }

    /// The column of the question that holds the window, or the event time.
    pub(crate) fn time(&self) -> usize {
        self.time
    }

    /// Names of the columns in the stream, in the order of the question's.
    pub(crate) fn stored_names(&self) -> impl Iterator<Item = &str> {
        self.columns.iter().map(|column| column.stored.as_str())
    }

    /// Rows of the question as they are stored: its columns in their order. A float that is not finite is null, as in
    /// every stream.
    pub(crate) fn stored(&self, rows: &RecordBatch) -> std::result::Result<Vec<ArrayRef>, ArrowError> {
        let exact = CastOptions { safe: false, ..CastOptions::default() };
        let stored = rows.columns().iter().zip(&self.columns).map(|(array, column)| {
            let array = cast_with_options(array, &column.stored_kind, &exact)?;
            Ok(if column.stored_kind == DataType::Float64 { finite(&array) } else { array })
        });
        stored.collect()
    }

    /// Stored columns of the question as rows of the stream, all of which have these bookkeeping columns.
    pub(crate) fn rows(&self, stored: &[ArrayRef], book: &[Book]) -> std::result::Result<RecordBatch, ArrowError> {
        let count = book.len();
        let arrow = self.schema.arrow();
        let columns = arrow.fields().iter().map(|field| -> ArrayRef {
            let times = |of: fn(&Book) -> Option<i64>| {
                Arc::new(book.iter().map(of).collect::<TimestampMicrosecondArray>().with_timezone("UTC")) as ArrayRef
            };
            match field.name().as_str() {
                TS => times(|book| Some(book.ts)),
                WINDOW => times(|book| book.window.map(|(start, _)| start)),
                END => times(|book| book.window.map(|(_, end)| end)),
                REVISION => Arc::new(book.iter().map(|book| book.revision).collect::<Int64Array>()),
                EMPTY => Arc::new(book.iter().map(|book| Some(book.empty)).collect::<BooleanArray>()),
                POSITION => Arc::new(book.iter().map(|book| book.position.as_deref()).collect::<StringArray>()),
                wire::schema::QUALITY => Arc::new(StringArray::from_iter_values(std::iter::repeat_n("good", count))),
                name => match self.columns.iter().position(|column| column.stored == name) {
                    Some(index) => Arc::clone(&stored[index]),
                    None => new_null_array(field.data_type(), count),
                },
            }
        });
        RecordBatch::try_new(Arc::clone(arrow), columns.collect())
    }

    /// Nulls for rows that only keep the book.
    pub(crate) fn nulls(&self, count: usize) -> Vec<ArrayRef> {
        self.columns.iter().map(|column| new_null_array(&column.stored_kind, count)).collect()
    }

    /// What the view shows: of each window its highest revision, unless that is empty; of single rows all.
    ///
    /// # Errors
    /// When the stream's table lacks a column, because something else has this name.
    pub(crate) fn view(&self, changes: &StreamName, table: &SchemaRef) -> Result<Arc<dyn TableProvider>> {
        Ok(Arc::new(ViewTable::new(self.plan(changes, table)?, None)))
    }

    /// See [`Columns::view`].
    pub(crate) fn plan(&self, changes: &StreamName, table: &SchemaRef) -> Result<LogicalPlan> {
        let live = LiveTable::new(changes.clone(), Arc::clone(table));
        let scan = LogicalPlanBuilder::scan(changes.as_str(), provider_as_source(Arc::new(live)), None)?;
        let shown = match self.of_windows {
            true => newest(scan)?,
            false => scan.filter(col(EDGE).eq(lit(OWN_EDGE)))?,
        };
        let shown = shown.filter(col(EMPTY).is_false())?;
        let columns = self.columns.iter().map(|column| {
            let shown = |expr: Expr| match (&column.stored_kind, &column.kind) {
                (stored, kind) if stored == kind => expr,
                (_, kind) => cast(expr, kind.clone()),
            };
            shown(col(column.stored.as_str())).alias(column.name.clone())
        });
        shown.project(columns.collect::<Vec<_>>())?.build()
    }
}

/// Of a scan of a view's stream the rows of each window's highest revision.
pub(crate) fn newest(scan: LogicalPlanBuilder) -> Result<LogicalPlanBuilder> {
    let own = scan.filter(col(EDGE).eq(lit(OWN_EDGE)).and(col(WINDOW).is_not_null()))?;
    let highest = Expr::from(WindowFunction::new(max_udaf(), vec![col(REVISION)]));
    let newest = highest.partition_by(vec![col(TS)]).build()?.alias("newest");
    own.window(vec![newest])?.filter(col(REVISION).eq(col("newest")))
}

/// What the bookkeeping columns of one row are.
#[derive(Debug, Clone, Default)]
pub(crate) struct Book {
    pub(crate) ts: i64,
    pub(crate) window: Option<(i64, i64)>,
    pub(crate) revision: Option<i64>,
    pub(crate) empty: bool,
    pub(crate) position: Option<String>,
}

/// The type that a stream stores this one as, without a loss.
fn stored_kind(kind: &DataType) -> Option<FieldType> {
    Some(match kind {
        DataType::Float64 | DataType::Float32 | DataType::Float16 => FieldType::Float64,
        DataType::Int64 | DataType::Int32 | DataType::Int16 | DataType::Int8 => FieldType::Int64,
        // Checked row by row: a count that does not fit ends the view with an error, and not with another number.
        DataType::UInt64 | DataType::UInt32 | DataType::UInt16 | DataType::UInt8 => FieldType::Int64,
        DataType::Boolean => FieldType::Bool,
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => FieldType::Text,
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => FieldType::Binary,
        DataType::Date32 => FieldType::Timestamp,
        DataType::Timestamp(TimeUnit::Second | TimeUnit::Millisecond | TimeUnit::Microsecond, zone)
            if zone.as_deref().is_none_or(|zone| matches!(zone, "UTC" | "+00:00")) =>
        {
            FieldType::Timestamp
        }
        _ => return None,
    })
}

/// A name for a field that nobody else has.
fn field_name(name: &str, taken: &mut HashSet<String>) -> FieldName {
    if let Ok(own) = name.parse::<FieldName>()
        && taken.insert(name.to_owned())
    {
        return own;
    }
    let plain: String = name
        .to_lowercase()
        .chars()
        .map(|character| if character.is_ascii_alphanumeric() { character } else { '_' })
        .take(40)
        .collect();
    let mut number = 1;
    loop {
        let tried = if number == 1 { format!("{OWN}c_{plain}") } else { format!("{OWN}c_{plain}_{number}") };
        if taken.insert(tried.clone()) {
            return tried.parse().expect("letters, digits and _ of less than 64 bytes are a name");
        }
        number += 1;
    }
}

fn finite(floats: &ArrayRef) -> ArrayRef {
    let floats = floats.as_primitive::<Float64Type>();
    if floats.values().iter().all(|value| value.is_finite()) {
        return Arc::new(floats.clone());
    }
    Arc::new(floats.iter().map(|value| value.filter(|value| value.is_finite())).collect::<Float64Array>())
}

/// Event times of a stored column.
pub(crate) fn times(column: &ArrayRef) -> Option<&TimestampMicrosecondArray> {
    column.as_primitive_opt::<TimestampMicrosecondType>().filter(|times| *times.data_type() == timestamp_type())
}
