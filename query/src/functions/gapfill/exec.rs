//! Carries out a gap fill. A series is held as a whole, in the statement's memory, until its last row is there; rows come
//! and go in order of (keys, bucket).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arrow::compute::{BatchCoalescer, SortOptions, cast, concat_batches, take};
use arrow::datatypes::{DataType, Float64Type, SchemaRef, TimeUnit, TimestampMicrosecondType};
use arrow::row::{OwnedRow, RowConverter, SortField};
use arrow_array::builder::Float64Builder;
use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch, TimestampMicrosecondArray, UInt32Array, new_null_array};
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{Result, exec_err, internal_err};
use datafusion::execution::memory_pool::{MemoryConsumer, MemoryReservation};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::expressions::Column;
use datafusion::physical_expr::{
    Distribution, EquivalenceProperties, LexOrdering, OrderingRequirements, PhysicalExpr, PhysicalSortExpr,
};
use datafusion::physical_plan::execution_plan::{
    CardinalityEffect, ChildrenPropertiesMode, EmissionType, ReplaceChildrenOptions, apply_expression_roots,
};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, ExecutionPlanProperties, InputDistributionRequirements, PlanProperties,
};
use futures::{StreamExt, stream};

use super::Method;

/// A column that is filled.
#[derive(Debug, Clone)]
pub(in crate::functions) struct Fill {
    pub(in crate::functions) method: Method,
    pub(in crate::functions) of: Arc<dyn PhysicalExpr>,
}

/// What is the same for all partitions.
#[derive(Debug)]
struct Shape {
    time: usize,
    keys: Vec<usize>,
    fills: Vec<Fill>,
    range: Arc<[i64]>,
    rows_max: usize,
    /// Rows made by all partitions so far.
    made: AtomicUsize,
    schema: SchemaRef,
}

/// The operator.
#[derive(Debug)]
pub(in crate::functions) struct GapFillExec {
    input: Arc<dyn ExecutionPlan>,
    shape: Arc<Shape>,
    time: Arc<dyn PhysicalExpr>,
    keys: Vec<Arc<dyn PhysicalExpr>>,
    properties: Arc<PlanProperties>,
}

impl GapFillExec {
    pub(in crate::functions) fn try_new(
        input: Arc<dyn ExecutionPlan>,
        schema: SchemaRef,
        time: Arc<dyn PhysicalExpr>,
        keys: Vec<Arc<dyn PhysicalExpr>>,
        fills: Vec<Fill>,
        range: Arc<[i64]>,
        rows_max: usize,
    ) -> Result<Self> {
        let index = |expression: &Arc<dyn PhysicalExpr>| match expression.downcast_ref::<Column>() {
            Some(column) => Ok(column.index()),
            None => internal_err!("a gap fill groups by columns, and not by {expression}"),
        };
        let indices = keys.iter().map(index).collect::<Result<_>>()?;
        let shape = Shape {
            time: index(&time)?,
            keys: indices,
            fills,
            range,
            rows_max,
            made: AtomicUsize::new(0),
            schema: Arc::clone(&schema),
        };
        let order = ordering(&keys, &time);
        let properties = PlanProperties::new(
            EquivalenceProperties::new_with_orderings(schema, [order]),
            input.output_partitioning().clone(),
            EmissionType::Incremental,
            input.boundedness(),
        );
        Ok(Self { input, shape: Arc::new(shape), time, keys, properties: Arc::new(properties) })
    }
}

fn ordering(keys: &[Arc<dyn PhysicalExpr>], time: &Arc<dyn PhysicalExpr>) -> Vec<PhysicalSortExpr> {
    let options = SortOptions { descending: false, nulls_first: true };
    keys.iter().chain([time]).map(|column| PhysicalSortExpr::new(Arc::clone(column), options)).collect()
}

impl DisplayAs for GapFillExec {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GapFillExec: time=[{}], buckets={}", self.time, self.shape.range.len())?;
        self.shape.fills.iter().try_for_each(|fill| write!(f, ", {:?}({})", fill.method, fill.of))
    }
}

impl ExecutionPlan for GapFillExec {
    fn name(&self) -> &str {
        "GapFillExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn input_distribution_requirements(&self) -> InputDistributionRequirements {
        InputDistributionRequirements::new(vec![if self.keys.is_empty() {
            Distribution::SinglePartition
        } else {
            Distribution::KeyPartitioned(self.keys.clone())
        }])
    }

    fn required_input_ordering(&self) -> Vec<Option<OrderingRequirements>> {
        vec![LexOrdering::new(ordering(&self.keys, &self.time)).map(OrderingRequirements::from)]
    }

    fn maintains_input_order(&self) -> Vec<bool> {
        vec![true]
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }

    fn apply_expressions(
        &self,
        f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        let fills = self.shape.fills.iter().map(|fill| &fill.of);
        apply_expression_roots(self.keys.iter().chain([&self.time]).chain(fills), f)
    }

    fn replace_children(
        self: Arc<Self>,
        mut children: Vec<Arc<dyn ExecutionPlan>>,
        _: ReplaceChildrenOptions,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let Some(input) = children.pop() else {
            return internal_err!("a gap fill has one input");
        };
        let shape = &self.shape;
        Ok(Arc::new(Self::try_new(
            input,
            Arc::clone(&shape.schema),
            Arc::clone(&self.time),
            self.keys.clone(),
            shape.fills.clone(),
            Arc::clone(&shape.range),
            shape.rows_max,
        )?))
    }

    fn with_new_children(self: Arc<Self>, children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        self.replace_children(children, ReplaceChildrenOptions::new(ChildrenPropertiesMode::Recompute))
    }

    fn cardinality_effect(&self) -> CardinalityEffect {
        CardinalityEffect::GreaterEqual
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let input = self.input.execute(partition, Arc::clone(&context))?;
        let of_input = input.schema();
        let sort = SortOptions { descending: false, nulls_first: true };
        let keys = self
            .shape
            .keys
            .iter()
            .map(|key| SortField::new_with_options(of_input.field(*key).data_type().clone(), sort))
            .collect();
        let series = Series {
            shape: Arc::clone(&self.shape),
            of_input,
            keys: RowConverter::new(keys)?,
            key: None,
            rows: Vec::new(),
            memory: MemoryConsumer::new("GapFill").register(context.memory_pool()),
            filled: BatchCoalescer::new(Arc::clone(&self.shape.schema), context.session_config().batch_size()),
        };
        let stream = stream::try_unfold(Some((input, series)), |state| async move {
            let Some((mut input, mut series)) = state else {
                return Ok(None);
            };
            loop {
                if let Some(batch) = series.filled.next_completed_batch() {
                    return Ok(Some((batch, Some((input, series)))));
                }
                match input.next().await {
                    Some(batch) => series.push(&batch?)?,
                    None => {
                        series.finish()?;
                        // All that is left comes at once: it is at most one series more than a batch.
                        let mut left = Vec::new();
                        while let Some(batch) = series.filled.next_completed_batch() {
                            left.push(batch);
                        }
                        let batch = concat_batches(&series.shape.schema, &left)?;
                        return Ok((batch.num_rows() > 0).then_some((batch, None)));
                    }
                }
            }
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(Arc::clone(&self.shape.schema), stream)))
    }
}

/// The series at hand.
struct Series {
    shape: Arc<Shape>,
    of_input: SchemaRef,
    keys: RowConverter,
    key: Option<OwnedRow>,
    rows: Vec<RecordBatch>,
    memory: MemoryReservation,
    filled: BatchCoalescer,
}

impl Series {
    fn push(&mut self, batch: &RecordBatch) -> Result<()> {
        let columns: Vec<ArrayRef> = self.shape.keys.iter().map(|key| Arc::clone(batch.column(*key))).collect();
        if columns.is_empty() {
            return self.hold(batch.clone());
        }
        let keys = self.keys.convert_columns(&columns)?;
        let mut start = 0;
        while start < batch.num_rows() {
            let key = keys.row(start);
            if self.key.as_ref().is_some_and(|held| held.row() != key) {
                self.emit()?;
            }
            let mut end = start + 1;
            while end < batch.num_rows() && keys.row(end) == key {
                end += 1;
            }
            self.hold(batch.slice(start, end - start))?;
            self.key = Some(key.owned());
            start = end;
        }
        Ok(())
    }

    fn hold(&mut self, rows: RecordBatch) -> Result<()> {
        let bytes = rows.columns().iter().map(|column| column.to_data().get_slice_memory_size());
        self.memory.try_grow(bytes.sum::<Result<usize, _>>()?)?;
        self.rows.push(rows);
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        // Without keys there is one series, also when nothing came.
        if self.key.is_some() || self.shape.keys.is_empty() {
            self.emit()?;
        }
        Ok(self.filled.finish_buffered_batch()?)
    }

    fn emit(&mut self) -> Result<()> {
        let rows = concat_batches(&self.of_input, &self.rows)?;
        self.rows.clear();
        let shape = &self.shape;
        let times = cast(rows.column(shape.time), &DataType::Timestamp(TimeUnit::Microsecond, None))?;
        let order = merged(times.as_primitive::<TimestampMicrosecondType>(), &shape.range);
        let new = order.iter().filter(|place| place.row.is_none()).count();
        if shape.made.fetch_add(new, Ordering::Relaxed) + new > shape.rows_max {
            return exec_err!(
                "time_bucket_gapfill: more than {} rows would be made; take a wider bucket, a shorter range, or fewer series",
                shape.rows_max
            );
        }
        let bytes = rows.get_array_memory_size() + order.len() * (size_of::<Place>() + 8 * shape.schema.fields().len());
        self.memory.try_resize(bytes)?;
        let taken: UInt32Array = order.iter().map(|place| place.row).collect();
        let mut columns = Vec::with_capacity(shape.schema.fields().len());
        for (index, column) in rows.columns().iter().enumerate() {
            columns.push(if index == shape.time {
                let times: TimestampMicrosecondArray = order.iter().map(|place| place.time).collect();
                // Both have the same clock: what a cast would move is the hour, not the instant.
                let kind = column.data_type();
                let zone = match kind {
                    DataType::Timestamp(_, zone) => zone.clone(),
                    _ => None,
                };
                cast(&(Arc::new(times.with_timezone_opt(zone)) as ArrayRef), kind)?
            } else if shape.keys.contains(&index) {
                let first: UInt32Array = order.iter().map(|_| Some(0)).collect();
                take(column, &first, None)?
            } else {
                take(column, &taken, None)?
            });
        }
        for fill in &shape.fills {
            let values = if rows.num_rows() == 0 {
                new_null_array(&fill.of.data_type(&self.of_input)?, 0)
            } else {
                fill.of.evaluate(&rows)?.into_array(rows.num_rows())?
            };
            columns.push(match fill.method {
                Method::Locf => take(&values, &carried(&values, &order), None)?,
                Method::Interpolate => interpolated(&values, &order),
            });
        }
        self.filled.push_batch(RecordBatch::try_new(Arc::clone(&shape.schema), columns)?)?;
        self.memory.shrink(self.memory.size());
        Ok(())
    }
}

/// A row that goes out.
struct Place {
    /// Where its bucket begins, microseconds.
    time: Option<i64>,
    /// The row that it was; None when it is made.
    row: Option<u32>,
}

/// The rows of a series and its range in order of time; rows without a time come first, as they came.
fn merged(times: &TimestampMicrosecondArray, range: &[i64]) -> Vec<Place> {
    let mut order = Vec::with_capacity(times.len().max(range.len()));
    let mut range = range.iter().copied().peekable();
    for (row, time) in times.iter().enumerate() {
        if let Some(time) = time {
            while let Some(made) = range.next_if(|begins| *begins < time) {
                order.push(Place { time: Some(made), row: None });
            }
            range.next_if_eq(&time);
        }
        order.push(Place { time, row: Some(row as u32) });
    }
    order.extend(range.map(|begins| Place { time: Some(begins), row: None }));
    order
}

/// For each place the last row until there whose value is not NULL.
fn carried(values: &ArrayRef, order: &[Place]) -> UInt32Array {
    let mut last = None;
    order
        .iter()
        .map(|place| {
            last = place.row.filter(|row| place.time.is_some() && values.is_valid(*row as usize)).or(last);
            // A row without a time is in no gap.
            if place.time.is_none() { place.row } else { last }
        })
        .collect()
}

/// Values on the line between the last one before and the first one after.
fn interpolated(values: &ArrayRef, order: &[Place]) -> ArrayRef {
    let values = values.as_primitive::<Float64Type>();
    let known = |place: &Place| {
        place.row.map(|row| row as usize).filter(|row| values.is_valid(*row)).map(|row| values.value(row))
    };
    let points: Vec<(i64, f64)> = order.iter().filter_map(|place| Some((place.time?, known(place)?))).collect();
    let mut after = 0;
    let mut filled = Float64Builder::with_capacity(order.len());
    for place in order {
        let Some(time) = place.time else {
            filled.append_option(known(place));
            continue;
        };
        while after < points.len() && points[after].0 <= time {
            after += 1;
        }
        filled.append_option(known(place).or_else(|| {
            let ((from, low), (to, high)) = (*points.get(after.checked_sub(1)?)?, *points.get(after)?);
            Some(low + (high - low) * ((time - from) as f64 / (to - from) as f64))
        }));
    }
    Arc::new(filled.finish())
}
