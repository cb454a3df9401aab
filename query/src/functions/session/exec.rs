//! Carries out a SESSION over rows in order of (keys, time). The rows of a session are held, in the statement's memory, until
//! its end is known; nothing else is.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use arrow::compute::{SortOptions, cast, filter, filter_record_batch, is_not_null};
use arrow::datatypes::{DataType, SchemaRef, TimeUnit, TimestampMicrosecondType};
use arrow::row::{OwnedRow, RowConverter, SortField};
use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch, TimestampMicrosecondArray};
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{Result, exec_err, internal_err};
use datafusion::execution::memory_pool::{MemoryConsumer, MemoryReservation};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
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

use super::Silence;

const ORDER: SortOptions = SortOptions { descending: false, nulls_first: true };

/// The operator.
#[derive(Debug)]
pub(in crate::functions) struct SessionExec {
    input: Arc<dyn ExecutionPlan>,
    schema: SchemaRef,
    time: Arc<dyn PhysicalExpr>,
    keys: Vec<Arc<dyn PhysicalExpr>>,
    silence: Silence,
    properties: Arc<PlanProperties>,
}

impl SessionExec {
    pub(in crate::functions) fn new(
        input: Arc<dyn ExecutionPlan>,
        schema: SchemaRef,
        time: Arc<dyn PhysicalExpr>,
        keys: Vec<Arc<dyn PhysicalExpr>>,
        silence: Silence,
    ) -> Self {
        let properties = PlanProperties::new(
            EquivalenceProperties::new_with_orderings(Arc::clone(&schema), [order(&keys, &time)]),
            input.output_partitioning().clone(),
            EmissionType::Incremental,
            input.boundedness(),
        );
        Self { input, schema, time, keys, silence, properties: Arc::new(properties) }
    }
}

fn order(keys: &[Arc<dyn PhysicalExpr>], time: &Arc<dyn PhysicalExpr>) -> Vec<PhysicalSortExpr> {
    keys.iter().chain([time]).map(|column| PhysicalSortExpr::new(Arc::clone(column), ORDER)).collect()
}

impl DisplayAs for SessionExec {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Silence { gap_us, cut_us } = self.silence;
        write!(f, "SessionExec: time=[{}], gap={gap_us}us, cut={cut_us}us", self.time)?;
        self.keys.iter().try_for_each(|key| write!(f, ", {key}"))
    }
}

impl ExecutionPlan for SessionExec {
    fn name(&self) -> &str {
        "SessionExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn input_distribution_requirements(&self) -> InputDistributionRequirements {
        InputDistributionRequirements::new(vec![Distribution::KeyPartitioned(self.keys.clone())])
    }

    fn required_input_ordering(&self) -> Vec<Option<OrderingRequirements>> {
        vec![LexOrdering::new(order(&self.keys, &self.time)).map(OrderingRequirements::from)]
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
        apply_expression_roots(self.keys.iter().chain([&self.time]), f)
    }

    fn replace_children(
        self: Arc<Self>,
        mut children: Vec<Arc<dyn ExecutionPlan>>,
        _: ReplaceChildrenOptions,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let Some(input) = children.pop() else { return internal_err!("SESSION has one input") };
        let (schema, time) = (Arc::clone(&self.schema), Arc::clone(&self.time));
        Ok(Arc::new(Self::new(input, schema, time, self.keys.clone(), self.silence)))
    }

    fn with_new_children(self: Arc<Self>, children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        self.replace_children(children, ReplaceChildrenOptions::new(ChildrenPropertiesMode::Recompute))
    }

    fn cardinality_effect(&self) -> CardinalityEffect {
        CardinalityEffect::LowerEqual
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let input = self.input.execute(partition, Arc::clone(&context))?;
        let of_input = input.schema();
        let sort = |key: &Arc<dyn PhysicalExpr>| Ok(SortField::new_with_options(key.data_type(&of_input)?, ORDER));
        let rows = Rows {
            schema: Arc::clone(&self.schema),
            time: Arc::clone(&self.time),
            keys: self.keys.clone(),
            converter: RowConverter::new(self.keys.iter().map(sort).collect::<Result<_>>()?)?,
            silence: self.silence,
            key: None,
            open: None,
            held: Vec::new(),
            ready: VecDeque::new(),
            memory: MemoryConsumer::new("Session").register(context.memory_pool()),
        };
        let stream = stream::try_unfold(Some((input, rows)), |state| async move {
            let Some((mut input, mut rows)) = state else { return Ok(None) };
            loop {
                if let Some(batch) = rows.next()? {
                    return Ok(Some((batch, Some((input, rows)))));
                }
                match input.next().await {
                    Some(batch) => rows.push(&batch?)?,
                    None if rows.end() => {}
                    None => return Ok(None),
                }
            }
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(Arc::clone(&self.schema), stream)))
    }
}

/// The session of the last row.
struct Open {
    /// The first of rows of which each came less than a gap after another.
    first: i64,
    start: i64,
    last: i64,
}

/// Rows whose sessions are known.
struct Ready {
    rows: RecordBatch,
    windows: Windows,
    /// Of the memory that they had while they were held.
    bytes: usize,
}

enum Windows {
    /// Start and end of all of them.
    One(i64, i64),
    /// Starts and ends, row by row.
    Each(Vec<i64>, Vec<i64>),
}

/// From rows to rows with their sessions.
struct Rows {
    schema: SchemaRef,
    time: Arc<dyn PhysicalExpr>,
    keys: Vec<Arc<dyn PhysicalExpr>>,
    converter: RowConverter,
    silence: Silence,
    /// The key of the last row.
    key: Option<OwnedRow>,
    open: Option<Open>,
    /// Rows of the open session, and their bytes.
    held: Vec<(RecordBatch, usize)>,
    ready: VecDeque<Ready>,
    memory: MemoryReservation,
}

impl Rows {
    fn push(&mut self, batch: &RecordBatch) -> Result<()> {
        let times = self.time.evaluate(batch)?.into_array(batch.num_rows())?;
        let (batch, times) = match times.null_count() {
            0 => (batch.clone(), times),
            _ => {
                let timed = is_not_null(&times)?;
                (filter_record_batch(batch, &timed)?, filter(&times, &timed)?)
            }
        };
        let zone = match times.data_type() {
            DataType::Timestamp(_, zone) => zone.clone(),
            other => return exec_err!("SESSION: {other} is no timestamp"),
        };
        let times = cast(&times, &DataType::Timestamp(TimeUnit::Microsecond, zone))?;
        let times = times.as_primitive::<TimestampMicrosecondType>().values();
        let keys = self.keys.iter().map(|key| key.evaluate(&batch)?.into_array(batch.num_rows()));
        let keys = self.converter.convert_columns(&keys.collect::<Result<Vec<ArrayRef>>>()?)?;
        let reach = self.silence.reach_us();
        // Of the rows whose session has ended.
        let (mut starts, mut ends) = (Vec::with_capacity(times.len()), Vec::with_capacity(times.len()));
        for (row, at) in times.iter().copied().enumerate() {
            if at.checked_sub(reach).and(at.checked_add(reach)).is_none() {
                return exec_err!("SESSION: a timestamp is out of range");
            }
            let is_same_key = match row.checked_sub(1) {
                Some(before) => keys.row(before) == keys.row(row),
                None => self.key.as_ref().is_some_and(|key| key.row() == keys.row(row)),
            };
            match &mut self.open {
                Some(open) if is_same_key && !self.silence.begins(open.first, open.last, at) => open.last = at,
                _ => {
                    let ended = self.open.take();
                    let goes_on = ended.as_ref().filter(|ended| is_same_key && at - ended.last < self.silence.gap_us);
                    let first = goes_on.map_or(at, |ended| ended.first);
                    if let Some(ended) = ended {
                        let (start, end) = self.release(&ended);
                        starts.resize(row, start);
                        ends.resize(row, end);
                    }
                    self.open = Some(Open { first, start: at, last: at });
                }
            }
        }
        let (known, count) = (ends.len(), batch.num_rows());
        if known > 0 {
            let windows = Windows::Each(starts, ends);
            self.ready.push_back(Ready { rows: batch.slice(0, known), windows, bytes: 0 });
        }
        if known < count {
            self.key = Some(keys.row(count - 1).owned());
            self.hold(batch.slice(known, count - known))?;
        }
        Ok(())
    }

    fn hold(&mut self, rows: RecordBatch) -> Result<()> {
        let bytes = rows.columns().iter().map(|column| column.to_data().get_slice_memory_size());
        let bytes = bytes.sum::<std::result::Result<usize, _>>()?;
        self.memory.try_grow(bytes)?;
        self.held.push((rows, bytes));
        Ok(())
    }

    /// The start and the end of a session whose last row has come; the rows that are held are its.
    fn release(&mut self, ended: &Open) -> (i64, i64) {
        let (start, end) = (ended.start, ended.last + self.silence.gap_us);
        let known = |(rows, bytes)| Ready { rows, windows: Windows::One(start, end), bytes };
        self.ready.extend(self.held.drain(..).map(known));
        (start, end)
    }

    /// No row comes any more. Whether there was a session that was open.
    fn end(&mut self) -> bool {
        let ended = self.open.take();
        ended.map(|ended| self.release(&ended)).is_some()
    }

    /// The next rows with their sessions; None when more must come first.
    fn next(&mut self) -> Result<Option<RecordBatch>> {
        let Some(Ready { rows, windows, bytes }) = self.ready.pop_front() else { return Ok(None) };
        self.memory.shrink(bytes);
        let count = rows.num_rows();
        let (starts, ends) = match windows {
            Windows::One(start, end) => (vec![start; count], vec![end; count]),
            Windows::Each(starts, ends) => (starts, ends),
        };
        let kind = self.schema.field(self.schema.fields().len() - 1).data_type();
        let zone = match kind {
            DataType::Timestamp(_, zone) => zone.clone(),
            _ => None,
        };
        let moments = |us: Vec<i64>| cast(&TimestampMicrosecondArray::from(us).with_timezone_opt(zone.clone()), kind);
        let mut columns = rows.columns().to_vec();
        columns.push(moments(starts)?);
        columns.push(moments(ends)?);
        Ok(Some(RecordBatch::try_new(Arc::clone(&self.schema), columns)?))
    }
}
