//! Carries out a HOP: rows come as often as they have windows, and never more of them at a time than a batch has.

use std::fmt;
use std::sync::Arc;

use arrow::compute::{cast, take_record_batch};
use arrow::datatypes::{DataType, SchemaRef, TimeUnit, TimestampMicrosecondType};
use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch, TimestampMicrosecondArray, UInt32Array};
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode, TreeNodeRecursion};
use datafusion::common::{Result, exec_err, internal_err};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::{EquivalenceProperties, PhysicalExpr};
use datafusion::physical_plan::execution_plan::{
    CardinalityEffect, ChildrenPropertiesMode, EmissionType, ReplaceChildrenOptions, apply_expression_roots,
};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{DisplayAs, DisplayFormatType, ExecutionPlan, ExecutionPlanProperties, PlanProperties};
use futures::{StreamExt, stream};

use super::Windows;

/// The operator.
#[derive(Debug)]
pub(in crate::functions) struct HopExec {
    input: Arc<dyn ExecutionPlan>,
    schema: SchemaRef,
    time: Arc<dyn PhysicalExpr>,
    windows: Windows,
    starts: (i64, i64),
    properties: Arc<PlanProperties>,
}

impl HopExec {
    pub(in crate::functions) fn new(
        input: Arc<dyn ExecutionPlan>,
        schema: SchemaRef,
        time: Arc<dyn PhysicalExpr>,
        windows: Windows,
        starts: (i64, i64),
    ) -> Self {
        let properties = PlanProperties::new(
            EquivalenceProperties::new(Arc::clone(&schema)),
            input.output_partitioning().clone(),
            EmissionType::Incremental,
            input.boundedness(),
        );
        Self { input, schema, time, windows, starts, properties: Arc::new(properties) }
    }
}

/// Whether an operator carries out a HOP.
pub(crate) fn is_hop(plan: &Arc<dyn ExecutionPlan>) -> bool {
    plan.is::<HopExec>()
}

/// A plan whose HOPs make only the windows that begin in `[from, to)`, of those that they made.
pub(crate) fn bounded(plan: Arc<dyn ExecutionPlan>, (from, to): (i64, i64)) -> Result<Arc<dyn ExecutionPlan>> {
    let bounded = plan.transform_up(|node| {
        let Some(hop) = node.downcast_ref::<HopExec>() else { return Ok(Transformed::no(node)) };
        let starts = (hop.starts.0.max(from), hop.starts.1.min(to));
        let (input, schema, time) = (Arc::clone(&hop.input), Arc::clone(&hop.schema), Arc::clone(&hop.time));
        Ok(Transformed::yes(Arc::new(HopExec::new(input, schema, time, hop.windows.clone(), starts)) as _))
    });
    bounded.data()
}

impl DisplayAs for HopExec {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HopExec: time=[{}], windows={}", self.time, self.windows.hops)
    }
}

impl ExecutionPlan for HopExec {
    fn name(&self) -> &str {
        "HopExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }

    fn apply_expressions(
        &self,
        f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        apply_expression_roots([&self.time], f)
    }

    fn replace_children(
        self: Arc<Self>,
        mut children: Vec<Arc<dyn ExecutionPlan>>,
        _: ReplaceChildrenOptions,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let Some(input) = children.pop() else { return internal_err!("HOP has one input") };
        let (schema, time) = (Arc::clone(&self.schema), Arc::clone(&self.time));
        Ok(Arc::new(Self::new(input, schema, time, self.windows.clone(), self.starts)))
    }

    fn with_new_children(self: Arc<Self>, children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        self.replace_children(children, ReplaceChildrenOptions::new(ChildrenPropertiesMode::Recompute))
    }

    fn cardinality_effect(&self) -> CardinalityEffect {
        CardinalityEffect::Unknown
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let input = self.input.execute(partition, Arc::clone(&context))?;
        let spread = Spread {
            schema: Arc::clone(&self.schema),
            windows: self.windows.clone(),
            starts: self.starts,
            rows_max: context.session_config().batch_size().max(1),
            bucket: None,
            current: Vec::new(),
        };
        let time = Arc::clone(&self.time);
        let state = (input, spread, None::<Left>);
        let stream = stream::try_unfold(state, move |(mut input, mut spread, mut left)| {
            let time = Arc::clone(&time);
            async move {
                loop {
                    if let Some(from) = left.as_mut()
                        && let Some(batch) = spread.next(from)?
                    {
                        return Ok(Some((batch, (input, spread, left))));
                    }
                    let Some(rows) = input.next().await.transpose()? else { return Ok(None) };
                    let times = time.evaluate(&rows)?.into_array(rows.num_rows())?;
                    let zone = match times.data_type() {
                        DataType::Timestamp(_, zone) => zone.clone(),
                        other => return exec_err!("HOP: {other} is no timestamp"),
                    };
                    let times = cast(&times, &DataType::Timestamp(TimeUnit::Microsecond, zone))?;
                    left = Some(Left { rows, times, row: 0, window: 0 });
                }
            }
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(Arc::clone(&self.schema), stream)))
    }
}

/// Rows of the input, and how far they have come: the next is `row` in the window number `window` of its own.
struct Left {
    rows: RecordBatch,
    times: ArrayRef,
    row: usize,
    window: usize,
}

/// What makes batches of rows in their windows.
struct Spread {
    schema: SchemaRef,
    windows: Windows,
    starts: (i64, i64),
    rows_max: usize,
    /// From where to where `current` holds.
    bucket: Option<(i64, i64)>,
    /// Windows as (start, end) of the rows in `bucket`.
    current: Vec<(i64, i64)>,
}

impl Spread {
    /// The next rows; None when all have come.
    fn next(&mut self, left: &mut Left) -> Result<Option<RecordBatch>> {
        let times = left.times.as_primitive::<TimestampMicrosecondType>().clone();
        let (mut rows, mut starts, mut ends) = (Vec::<u32>::new(), Vec::new(), Vec::new());
        while left.row < times.len() && rows.len() < self.rows_max {
            if times.is_valid(left.row) {
                self.find(times.value(left.row))?;
                let some = self.current.iter().skip(left.window).take(self.rows_max - rows.len());
                let before = rows.len();
                for (start, end) in some {
                    rows.push(left.row as u32);
                    starts.push(*start);
                    ends.push(*end);
                }
                left.window += rows.len() - before;
                if left.window < self.current.len() {
                    break;
                }
            }
            (left.row, left.window) = (left.row + 1, 0);
        }
        if rows.is_empty() {
            return Ok(None);
        }
        let taken = take_record_batch(&left.rows, &UInt32Array::from(rows))?;
        let kind = self.schema.field(self.schema.fields().len() - 1).data_type();
        let zone = match kind {
            DataType::Timestamp(_, zone) => zone.clone(),
            _ => None,
        };
        let moments = |us: Vec<i64>| cast(&TimestampMicrosecondArray::from(us).with_timezone_opt(zone.clone()), kind);
        let mut columns = taken.columns().to_vec();
        columns.push(moments(starts)?);
        columns.push(moments(ends)?);
        Ok(Some(RecordBatch::try_new(Arc::clone(&self.schema), columns)?))
    }

    /// The windows of an instant that are asked for.
    fn find(&mut self, at: i64) -> Result<()> {
        if self.bucket.is_some_and(|(from, to)| (from..to).contains(&at)) {
            return Ok(());
        }
        let Windows { buckets, hops } = &mut self.windows;
        let found = buckets.start(at).and_then(|last| {
            let next = buckets.next(last)?;
            let (mut start, mut end, mut found) = (last, buckets.after(next, *hops - 1)?, Vec::new());
            for index in 0..*hops {
                if (self.starts.0..self.starts.1).contains(&start) {
                    found.push((start, end));
                }
                if start < self.starts.0 || index + 1 == *hops {
                    break;
                }
                (start, end) = (buckets.before(start, 1)?, buckets.before(end, 1)?);
            }
            Some(((last, next), found))
        });
        let Some((bucket, current)) = found else { return exec_err!("HOP: a timestamp is out of range") };
        (self.bucket, self.current) = (Some(bucket), current);
        Ok(())
    }
}
