//! A rule that looks at one row at a time, compiled once, over batches of new rows.
//!
//! The condition is evaluated as a column over the whole batch; labels and values are computed for rows that matter only: those
//! that hold, and of the others those of a label set with an open alert. No plan is made and nothing is asked. A row on which
//! the condition is NULL, or fails, changes nothing.

use std::collections::{BTreeMap, HashSet};
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int64Type};
use arrow_array::{Array, ArrayRef, BooleanArray, RecordBatch, RecordBatchOptions, UInt32Array};
use arrow_cast::display::{ArrayFormatter, FormatOptions};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use arrow_select::take::take_record_batch;
use datafusion::common::Result;
use datafusion::execution::context::SessionState;
use datafusion::logical_expr::Expr;
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::Column;
use wire::StreamName;
use wire::schema::DEVICE;

use super::episode::{Policy, Says, Seen, Severity};
use super::episodes::Episodes;
use super::late::LateRow;
use super::order::{NewRows, Order};
use super::rule::RowsOnly;
use super::template::{Places, Words};
use super::topic::label;

/// Rows of a batch on which a condition may fail before the rest of it says nothing.
const FAILURES_MAX: usize = 64;
/// Labels of an alert that are columns.
pub(crate) const LABELS_MAX: usize = 64;
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
    /// What tells label sets apart: of these, and of what makes them.
    identity: Vec<Arc<dyn PhysicalExpr>>,
    /// Rules of one stream with the same one tell the same label sets apart.
    pub(crate) identity_name: String,
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
        (shape, names, labels): (Shape, &[String], &[&str]),
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
        let of_labels = labels.iter().filter_map(|label| names.iter().position(|name| name == label));
        let mut told_apart: Vec<usize> = shape.labels.iter().copied().chain(of_labels).collect();
        told_apart.sort_unstable();
        told_apart.dedup();
        let identity: Vec<_> = told_apart.into_iter().map(|index| Arc::clone(&columns[index])).collect();
        let identity_name = identity.iter().map(|column| format!("{column}\n")).collect();
        Ok(Self { stream, predicate, until, columns, output, shape, by_device, identity, identity_name, input })
    }

    /// What new rows mean for the alerts of this rule: those that are in order. It gives those that are not and say something
    /// that no alert says already.
    pub(crate) fn judge(
        &self,
        (policy, more): (&Policy, &[(String, Places)]),
        rows: &NewRows,
        order: &Order,
        episodes: &mut Episodes,
        (now, failed): (i64, &mut u64),
    ) -> Result<Vec<LateRow>> {
        let holds = self.predicate.as_ref().map(|predicate| test(predicate, &rows.batch, failed));
        let mut late = self.late((policy, more), rows, (&order.fresh, holds.as_ref()), episodes)?;
        late.extend(self.judge_fresh((policy, more), rows, (&order.fresh, holds), episodes, (now, failed))?);
        Ok(late)
    }

    fn judge_fresh(
        &self,
        (policy, more): (&Policy, &[(String, Places)]),
        rows: &NewRows,
        (fresh, holds): (&BooleanArray, Option<BooleanArray>),
        episodes: &mut Episodes,
        (now, failed): (i64, &mut u64),
    ) -> Result<Vec<LateRow>> {
        let open: Option<HashSet<String>> = episodes.open_of(policy).map(|open| {
            open.values()
                .filter(|episode| episode.watch.is_some())
                .filter_map(|episode| episode.device.clone())
                .collect()
        });
        let mut chosen: Vec<(u32, Says)> = Vec::new();
        let is_true = |row: usize| holds.as_ref().is_none_or(|holds| holds.is_valid(row) && holds.value(row));
        let devices = self.by_device.and_then(|index| rows.batch.column(index).as_string_opt::<i32>());
        // Without an open alert only a row that holds can mean something; most batches have none.
        if open.is_none() && holds.as_ref().is_some_and(|holds| holds.true_count() == 0) {
            return Ok(Vec::new());
        }
        let until = match (&self.until, &open) {
            (Some(until), Some(_)) => Some(test(until, &rows.batch, failed)),
            _ => None,
        };
        // An alert may begin and end within the batch: from its first row on the others of its device count, too.
        let mut begun: HashSet<&str> = HashSet::new();
        for row in rows.in_order().filter(|row| fresh.value(*row)) {
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
            chosen.push((row as u32, said));
        }
        if chosen.is_empty() {
            return Ok(Vec::new());
        }
        // Of rows of one moment, those that hold are last.
        chosen.sort_by_key(|(row, says)| (rows.moments[*row as usize], *says == Says::Holds));
        let output = self.output(rows, &chosen.iter().map(|(row, _)| *row).collect::<Vec<_>>())?;
        let instances = Instances::new(&self.shape, more, &output);
        let mut late = Vec::new();
        for (at, (row, says)) in chosen.into_iter().enumerate() {
            let (from, _) = rows.times[row as usize];
            let (labels, device) = (instances.labels(at), instances.device(at));
            let seen = Seen {
                labels: &labels,
                device: device.as_deref(),
                says,
                from,
                moment: rows.moments[row as usize],
                severity: instances.severity(at),
                value: instances.value(at),
                values: &|| instances.values(at),
            };
            if !episodes.see(policy, &seen, now) {
                late.push(self.late_row(rows, row as usize));
            }
        }
        Ok(late)
    }

    /// Its columns for some rows.
    fn output(&self, rows: &NewRows, chosen: &[u32]) -> Result<RecordBatch> {
        let input = take_record_batch(&rows.batch, &UInt32Array::from(chosen.to_vec()))?;
        let columns = self.columns.iter().map(|column| column.evaluate(&input)?.into_array(input.num_rows()));
        let columns = columns.collect::<Result<Vec<_>>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(input.num_rows()));
        Ok(RecordBatch::try_new_with_options(Arc::clone(&self.output), columns, &options)?)
    }

    /// Rows that are not in order, but for those that hold within an alert that says so already.
    fn late(
        &self,
        (policy, more): (&Policy, &[(String, Places)]),
        rows: &NewRows,
        (fresh, holds): (&BooleanArray, Option<&BooleanArray>),
        episodes: &Episodes,
    ) -> Result<Vec<LateRow>> {
        if fresh.false_count() == 0 {
            return Ok(Vec::new());
        }
        let late = (0..rows.batch.num_rows()).filter(|row| !fresh.value(*row));
        let (holding, others): (Vec<usize>, Vec<usize>) =
            late.partition(|row| holds.is_none_or(|holds| holds.is_valid(*row) && holds.value(*row)));
        // Where the condition is NULL, only `until` can say something.
        let says = |row: &usize| self.until.is_some() || holds.is_some_and(|holds| holds.is_valid(*row));
        let mut late: Vec<LateRow> = others.into_iter().filter(says).map(|row| self.late_row(rows, row)).collect();
        if holding.is_empty() {
            return Ok(late);
        }
        let output = self.output(rows, &holding.iter().map(|row| *row as u32).collect::<Vec<_>>())?;
        let instances = Instances::new(&self.shape, more, &output);
        let is_new = |(at, row): (usize, usize)| {
            let (from, to) = rows.times[row];
            (!episodes.knows(policy, &instances.labels(at), from, to)).then(|| self.late_row(rows, row))
        };
        late.extend(holding.into_iter().enumerate().filter_map(is_new));
        Ok(late)
    }

    fn late_row(&self, rows: &NewRows, row: usize) -> LateRow {
        let (from, to) = rows.times[row];
        let devices = self.by_device.and_then(|index| rows.batch.column(index).as_string_opt::<i32>());
        let device = devices.filter(|devices| devices.is_valid(row)).map(|devices| devices.value(row).to_owned());
        LateRow { from, to, device }
    }

    /// Which label set each row is of, as a number.
    pub(crate) fn identities(&self, rows: &NewRows, state: &RandomState) -> Result<Vec<u64>> {
        let count = rows.batch.num_rows();
        let mut hashers: Vec<_> = (0..count).map(|_| state.build_hasher()).collect();
        for column in &self.identity {
            let column = arrow_cast::cast(&column.evaluate(&rows.batch)?.into_array(count)?, &DataType::Utf8)?;
            for (value, hasher) in column.as_string::<i32>().iter().zip(&mut hashers) {
                value.hash(hasher);
            }
        }
        Ok(hashers.into_iter().map(|hasher| hasher.finish()).collect())
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
