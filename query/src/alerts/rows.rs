//! A rule that looks at one row at a time, compiled once, over batches of new rows.
//!
//! The condition is evaluated as a column over the whole batch; labels and values are computed for rows that matter only: those
//! that hold, and of the others those of a label set with an open alert. No plan is made and nothing is asked. A row on which
//! the condition is NULL, or fails, changes nothing.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int64Type, TimestampMicrosecondType};
use arrow_array::{Array, ArrayRef, BooleanArray, RecordBatch, RecordBatchOptions, StringArray, UInt32Array};
use arrow_cast::display::{ArrayFormatter, FormatOptions};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use arrow_select::take::take_record_batch;
use datafusion::common::Result;
use datafusion::execution::context::SessionState;
use datafusion::logical_expr::Expr;
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::Column;
use wire::StreamName;
use wire::schema::{DEVICE, TS};

use super::episode::{Policy, Says, Seen, Severity};
use super::episodes::Episodes;
use super::rule::RowsOnly;
use super::template::{Places, Words};
use super::topic::label;
use crate::views;

/// Rows of a batch on which a condition may fail before the rest of it says nothing.
const FAILURES_MAX: usize = 64;
/// Labels of an alert that are columns.
pub(crate) const LABELS_MAX: usize = 64;
const WINDOW_START: &str = "window_start";
const WINDOW_END: &str = "window_end";
const SEVERITY: &str = "severity";
const VALUE: &str = "value";

/// Which column of a result means what.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Shape {
    labels: Vec<usize>,
    device: Option<usize>,
    severity: Option<usize>,
    value: Option<usize>,
}

impl Shape {
    /// That of these columns; only the device is a label when they are all of a stream's.
    pub(crate) fn new(schema: &Schema, of_one_stream: bool, value: Option<&str>) -> Result<Self, String> {
        let is_text = |index: usize| matches!(schema.field(index).data_type(), DataType::Utf8 | DataType::Utf8View);
        let text = |name: &str| schema.index_of(name).ok().filter(|index| is_text(*index));
        let (device, severity) = (text(DEVICE), text(SEVERITY).filter(|_| !of_one_stream));
        let labels = match of_one_stream {
            true => device.into_iter().collect(),
            false => {
                let is_label = |index: &usize| is_text(*index) && Some(*index) != severity;
                (0..schema.fields().len()).filter(is_label).collect::<Vec<_>>()
            }
        };
        if labels.len() > LABELS_MAX {
            let count = labels.len();
            return Err(format!("{count} text columns, each a label: SELECT those that tell its alerts apart"));
        }
        let is_number = |index: &usize| {
            let kind = schema.field(*index).data_type();
            kind.is_numeric()
        };
        let value = match value {
            Some(name) => {
                let index = schema.index_of(name).map_err(|_| format!("value: there is no column `{name}`"))?;
                Some(index).filter(is_number).ok_or_else(|| format!("value: `{name}` is no number"))?.into()
            }
            None => schema.index_of(VALUE).ok().filter(is_number).or_else(|| {
                let plain = |index: &usize| is_number(index) && !schema.field(*index).name().starts_with('_');
                (0..schema.fields().len()).find(plain)
            }),
        };
        Ok(Self { labels, device, severity, value })
    }
}

/// Rows of a result, as alerts see them.
pub(crate) struct Instances<'r> {
    shape: &'r Shape,
    more: &'r [(String, Places)],
    rows: &'r RecordBatch,
    values: Option<ArrayRef>,
}

impl<'r> Instances<'r> {
    pub(crate) fn new(shape: &'r Shape, more: &'r [(String, Places)], rows: &'r RecordBatch) -> Self {
        let values = shape.value.and_then(|index| arrow_cast::cast(rows.column(index), &DataType::Float64).ok());
        Self { shape, more, rows, values }
    }

    pub(crate) fn device(&self, row: usize) -> Option<String> {
        text(self.rows.column(self.shape.device?), row).map(|device| label(&device).into_owned())
    }

    /// A JSON object, its keys in order.
    pub(crate) fn labels(&self, row: usize) -> String {
        let mut labels = BTreeMap::new();
        let schema = self.rows.schema_ref();
        for index in &self.shape.labels {
            let value = text(self.rows.column(*index), row);
            labels.insert(schema.field(*index).name().clone(), value.map(|value| label(&value).into_owned()));
        }
        if !self.more.is_empty() {
            let words = self.values(row);
            let fill = |places: &Places| Some(label(&places.fill(&words)).into_owned());
            labels.extend(self.more.iter().map(|(name, places)| (name.clone(), fill(places))));
        }
        serde_json::to_string(&labels).unwrap_or_default()
    }

    pub(crate) fn severity(&self, row: usize) -> Option<Severity> {
        Severity::of(&text(self.rows.column(self.shape.severity?), row)?)
    }

    pub(crate) fn value(&self, row: usize) -> Option<f64> {
        let values = self.values.as_ref()?.as_primitive_opt::<Float64Type>()?;
        values.is_valid(row).then(|| values.value(row)).filter(|value| value.is_finite())
    }

    /// All values of a row, without provenance.
    pub(crate) fn values(&self, row: usize) -> Words {
        let schema = self.rows.schema_ref();
        let columns = schema.fields().iter().zip(self.rows.columns());
        let shown = columns.filter(|(field, _)| !field.name().starts_with('_'));
        shown.map(|(field, column)| (field.name().clone(), json(column, row))).collect()
    }
}

fn text(column: &ArrayRef, row: usize) -> Option<String> {
    if column.is_null(row) {
        return None;
    }
    match column.data_type() {
        DataType::Utf8 => Some(column.as_string::<i32>().value(row).to_owned()),
        DataType::Utf8View => Some(column.as_string_view().value(row).to_owned()),
        _ => ArrayFormatter::try_new(column, &FormatOptions::default()).ok().map(|all| all.value(row).to_string()),
    }
}

fn json(column: &ArrayRef, row: usize) -> serde_json::Value {
    if column.is_null(row) {
        return serde_json::Value::Null;
    }
    match column.data_type() {
        DataType::Float64 => column.as_primitive::<Float64Type>().value(row).into(),
        DataType::Int64 => column.as_primitive::<Int64Type>().value(row).into(),
        DataType::Boolean => column.as_boolean().value(row).into(),
        _ => text(column, row).into(),
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct RowRule {
    pub(crate) stream: StreamName,
    /// The columns of the stream, as the expressions count them.
    pub(crate) input: SchemaRef,
    predicate: Option<Arc<dyn PhysicalExpr>>,
    until: Option<Arc<dyn PhysicalExpr>>,
    columns: Vec<Arc<dyn PhysicalExpr>>,
    output: SchemaRef,
    shape: Shape,
    /// The stream's own device, when the labels have it: rows of other devices than those of open alerts end nothing.
    by_device: Option<usize>,
}

impl RowRule {
    /// Compiles the parts of a SELECT.
    ///
    /// # Errors
    /// When DataFusion cannot make expressions of them.
    pub(crate) fn new(
        state: &SessionState,
        (stream, below, predicate, columns): RowsOnly,
        until: Option<Expr>,
        (shape, names): (Shape, &[String]),
    ) -> Result<Self> {
        let schema = below.schema();
        let compile = |expr| state.create_physical_expr(expr, schema);
        let columns: Vec<_> = columns.into_iter().map(compile).collect::<Result<_>>()?;
        let input: SchemaRef = Arc::new(schema.as_arrow().clone());
        let until = until.map(compile).transpose()?;
        let predicate = predicate.map(compile).transpose()?;
        let field =
            |(column, name): (&Arc<dyn PhysicalExpr>, &String)| Ok(Field::new(name, column.data_type(&input)?, true));
        let output = Arc::new(Schema::new(columns.iter().zip(names).map(field).collect::<Result<Vec<_>>>()?));
        let by_device = shape.device.filter(|index| shape.labels.contains(index)).and_then(|index| {
            let column = columns[index].downcast_ref::<Column>()?;
            (input.field(column.index()).name() == DEVICE).then(|| column.index())
        });
        Ok(Self { stream, predicate, until, columns, output, shape, by_device, input })
    }

    /// What new rows mean for the alerts of this rule. `fresh` are rows that are not older than the newest of their device.
    pub(crate) fn judge(
        &self,
        (policy, more): (&Policy, &[(String, Places)]),
        rows: &FreshRows,
        episodes: &mut Episodes,
        now: i64,
        failed: &mut u64,
    ) -> Result<()> {
        let holds = self.predicate.as_ref().map(|predicate| test(predicate, &rows.batch, failed));
        let open: Option<HashSet<String>> = episodes.open_of(policy).map(|open| {
            open.values()
                .filter(|episode| episode.watch.is_some())
                .filter_map(|episode| episode.device.clone())
                .collect()
        });
        let mut chosen: Vec<u32> = Vec::new();
        let mut says: Vec<Says> = Vec::new();
        let is_true = |row: usize| holds.as_ref().is_none_or(|holds| holds.is_valid(row) && holds.value(row));
        let devices = self.by_device.and_then(|index| rows.batch.column(index).as_string_opt::<i32>());
        // Without an open alert only a row that holds can mean something; most batches have none.
        if open.is_none() && holds.as_ref().is_some_and(|holds| holds.true_count() == 0) {
            return Ok(());
        }
        let until = match (&self.until, &open) {
            (Some(until), Some(_)) => Some(test(until, &rows.batch, failed)),
            _ => None,
        };
        // An alert may begin and end within the batch: from its first row on the others of its device count, too.
        let mut begun: HashSet<&str> = HashSet::new();
        for row in (0..rows.batch.num_rows()).filter(|row| rows.fresh.value(*row)) {
            let device = devices.filter(|devices| devices.is_valid(row)).map(|devices| devices.value(row));
            let said = if is_true(row) {
                begun.extend(device);
                Says::Holds
            } else {
                let known = holds.as_ref().is_some_and(|holds| holds.is_valid(row));
                let matters = match device {
                    Some(device) => {
                        begun.contains(device) || open.as_ref().is_some_and(|open| open.contains(&*label(device)))
                    }
                    None => open.is_some() || !chosen.is_empty(),
                };
                let ends = match (&self.until, &until) {
                    _ if !matters => continue,
                    (None, _) if known => true,
                    (None, _) => continue,
                    (Some(_), Some(until)) => until.is_valid(row) && until.value(row),
                    // What begins in this batch is asked for its end alone.
                    (Some(until), None) => {
                        let said = test(until, &rows.batch.slice(row, 1), failed);
                        said.is_valid(0) && said.value(0)
                    }
                };
                match (known, ends) {
                    (true, true) => Says::Not,
                    (true, false) => Says::Lapses,
                    (false, true) => Says::Ends,
                    (false, false) => Says::Neither,
                }
            };
            chosen.push(row as u32);
            says.push(said);
        }
        if chosen.is_empty() {
            return Ok(());
        }
        let input = take_record_batch(&rows.batch, &UInt32Array::from(chosen.clone()))?;
        let columns = self.columns.iter().map(|column| column.evaluate(&input)?.into_array(input.num_rows()));
        let columns = columns.collect::<Result<Vec<_>>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(input.num_rows()));
        let output = RecordBatch::try_new_with_options(Arc::clone(&self.output), columns, &options)?;
        let instances = Instances::new(&self.shape, more, &output);
        for (at, (row, says)) in chosen.iter().zip(says).enumerate() {
            let (from, to) = rows.times[*row as usize];
            let (labels, device) = (instances.labels(at), instances.device(at));
            let seen = Seen {
                labels: &labels,
                device: device.as_deref(),
                says,
                from,
                to,
                severity: instances.severity(at),
                value: instances.value(at),
                values: &|| instances.values(at),
            };
            episodes.see(policy, &seen, now);
        }
        Ok(())
    }
}

/// A condition over a batch. Where it fails on a row, that row is NULL, and counted.
fn test(condition: &Arc<dyn PhysicalExpr>, rows: &RecordBatch, failed: &mut u64) -> BooleanArray {
    let mut left = FAILURES_MAX;
    let whole = tested(condition, rows, &mut left);
    *failed += (FAILURES_MAX - left) as u64;
    whole
}

fn tested(condition: &Arc<dyn PhysicalExpr>, rows: &RecordBatch, left: &mut usize) -> BooleanArray {
    let count = rows.num_rows();
    if *left == 0 {
        return BooleanArray::new_null(count);
    }
    let column = condition.evaluate(rows).and_then(|value| value.into_array(count));
    if let Ok(column) = column {
        return column.as_boolean_opt().cloned().unwrap_or_else(|| BooleanArray::new_null(count));
    }
    if count <= 1 {
        *left -= 1;
        return BooleanArray::new_null(count);
    }
    let half = count / 2;
    let first = tested(condition, &rows.slice(0, half), left);
    let second = tested(condition, &rows.slice(half, count - half), left);
    first.iter().chain(second.iter()).collect()
}

/// New rows of a stream, with their event times.
#[derive(Debug)]
pub(crate) struct FreshRows {
    pub(crate) batch: RecordBatch,
    /// A reading begins and ends at once, a window at its bounds.
    times: Vec<(i64, i64)>,
    /// Rows that are not older than the newest of their device.
    fresh: BooleanArray,
}

/// The newest event time of each device of a stream.
#[derive(Debug, Clone, Default)]
pub(crate) struct Newest {
    of: HashMap<String, i64>,
}

impl FreshRows {
    /// Rows of a batch, and what is newest with them.
    pub(crate) fn new(batch: RecordBatch, newest: &mut Newest, devices_max: usize) -> Self {
        let column = |name: &str| {
            let column = batch.column_by_name(name)?;
            column.as_primitive_opt::<TimestampMicrosecondType>()
        };
        let ts = column(TS);
        // Windows of edges, and of views.
        let start = column(WINDOW_START).or_else(|| column(views::WINDOW));
        let end = column(WINDOW_END).or_else(|| column(views::END));
        let at = |column: Option<&arrow_array::PrimitiveArray<TimestampMicrosecondType>>, row: usize| {
            column.filter(|column| column.is_valid(row)).map(|column| column.value(row))
        };
        let times: Vec<(i64, i64)> = (0..batch.num_rows())
            .map(|row| {
                let ts = at(ts, row).unwrap_or(0);
                let to = at(end, row).unwrap_or(ts);
                (at(start, row).unwrap_or(ts).min(to), to)
            })
            .collect();
        let devices: Option<&StringArray> = batch.column_by_name(DEVICE).and_then(|column| column.as_string_opt());
        let fresh = times.iter().enumerate().map(|(row, (_, to))| {
            let device = devices.filter(|devices| devices.is_valid(row)).map_or("", |devices| devices.value(row));
            Some(newest.sees(device, *to, devices_max))
        });
        let fresh = fresh.collect();
        Self { batch, times, fresh }
    }

    /// The newest event time of them.
    pub(crate) fn last(&self) -> i64 {
        self.times.iter().map(|(_, to)| *to).max().unwrap_or(0)
    }
}

impl Newest {
    fn sees(&mut self, device: &str, to: i64, devices_max: usize) -> bool {
        if let Some(newest) = self.of.get_mut(device) {
            if to < *newest {
                return false;
            }
            *newest = to;
            return true;
        }
        if self.of.len() >= devices_max {
            self.forget();
        }
        if self.of.len() >= devices_max {
            return true;
        }
        self.of.insert(device.to_owned(), to);
        true
    }

    /// The half that was silent longest; of these a late row may count as one of the present.
    fn forget(&mut self) {
        let mut all: Vec<i64> = self.of.values().copied().collect();
        let middle = all.len() / 2;
        if middle == 0 {
            return;
        }
        let (_, bound, _) = all.select_nth_unstable(middle);
        let bound = *bound;
        self.of.retain(|_, to| *to >= bound);
    }
}

#[cfg(test)]
mod tests {
    use arrow_array::TimestampMicrosecondArray;

    use super::*;

    const HOUR: i64 = 3_600_000_000;

    fn times(columns: &[(&str, Option<i64>)]) -> (i64, i64) {
        let column = |value: &Option<i64>| Arc::new(TimestampMicrosecondArray::from(vec![*value])) as ArrayRef;
        let columns = columns.iter().map(|(name, value)| (*name, column(value), true));
        let batch = RecordBatch::try_from_iter_with_nullable(columns).unwrap();
        FreshRows::new(batch, &mut Newest::default(), 10).times[0]
    }

    /// By its beginning alone an hour is old as soon as it is over: its alerts would be history, and nobody told.
    #[test]
    fn a_window_lasts_from_its_start_to_its_end_whoever_made_it() {
        let ts = (TS, Some(7 * HOUR));
        assert_eq!(times(&[ts]), (7 * HOUR, 7 * HOUR));
        for (start, end) in [(WINDOW_START, WINDOW_END), (views::WINDOW, views::END)] {
            assert_eq!(times(&[ts, (start, Some(7 * HOUR)), (end, Some(8 * HOUR))]), (7 * HOUR, 8 * HOUR));
            // A view of single rows has the columns, and nothing in them.
            assert_eq!(times(&[ts, (start, None), (end, None)]), (7 * HOUR, 7 * HOUR));
        }
    }
}
