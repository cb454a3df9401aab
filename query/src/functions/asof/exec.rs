//! Merges two inputs that are sorted by (keys, time): to each left row the last right row that comes before or with it.
//!
//! "Before" is the order of the sort: where the match is the next later row, both inputs are sorted by descending time. The
//! inputs are hash partitioned by the keys, and sorted by operators that spill. This one holds a batch of the left, and of
//! the right at most [`HELD_MAX`] batches that rows of that left batch match.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use arrow::compute::{SortOptions, interleave, take};
use arrow::datatypes::SchemaRef;
use arrow::row::{RowConverter, Rows, SortField};
use arrow_array::{Array, ArrayRef, BooleanArray, RecordBatch, RecordBatchOptions, UInt32Array, new_null_array};
use datafusion::arrow::array::make_comparator;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{Result, internal_err};
use datafusion::execution::memory_pool::{MemoryConsumer, MemoryReservation};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::{
    Distribution, EquivalenceProperties, LexOrdering, OrderingRequirements, PhysicalExpr, PhysicalSortExpr,
};
use datafusion::physical_plan::execution_plan::{
    ChildrenPropertiesMode, EmissionType, ReplaceChildrenOptions, apply_expression_roots,
};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, ExecutionPlanProperties, InputDistributionRequirements, PlanProperties,
};
use futures::{StreamExt, stream};

/// Right batches that matches may lie in before rows go out.
const HELD_MAX: usize = 16;

/// What is compared, the same number of expressions on both sides.
#[derive(Debug, Clone)]
pub(in crate::functions) struct Condition {
    /// Keys, then the time.
    pub(in crate::functions) left: Vec<Arc<dyn PhysicalExpr>>,
    pub(in crate::functions) right: Vec<Arc<dyn PhysicalExpr>>,
    /// The match is the next later row, not the last earlier one.
    pub(in crate::functions) forward: bool,
    /// A row of the same time is no match.
    pub(in crate::functions) strict: bool,
    /// Rows without a match stay.
    pub(in crate::functions) outer: bool,
}

impl Condition {
    /// Sort options of key or time number `index`.
    fn options(&self, index: usize) -> SortOptions {
        SortOptions { descending: self.forward && index + 1 == self.left.len(), nulls_first: true }
    }

    fn keys<'a>(&self, side: &'a [Arc<dyn PhysicalExpr>]) -> &'a [Arc<dyn PhysicalExpr>] {
        &side[..side.len() - 1]
    }
}

/// The operator.
#[derive(Debug)]
pub(in crate::functions) struct AsOfExec {
    left: Arc<dyn ExecutionPlan>,
    right: Arc<dyn ExecutionPlan>,
    condition: Condition,
    schema: SchemaRef,
    properties: Arc<PlanProperties>,
}

impl AsOfExec {
    pub(in crate::functions) fn new(
        left: Arc<dyn ExecutionPlan>,
        right: Arc<dyn ExecutionPlan>,
        condition: Condition,
        schema: SchemaRef,
    ) -> Self {
        let properties = PlanProperties::new(
            EquivalenceProperties::new(Arc::clone(&schema)),
            left.output_partitioning().clone(),
            EmissionType::Incremental,
            left.boundedness(),
        );
        Self { left, right, condition, schema, properties: Arc::new(properties) }
    }

    fn ordering(&self, side: &[Arc<dyn PhysicalExpr>]) -> Option<OrderingRequirements> {
        let columns = side.iter().enumerate();
        let columns =
            columns.map(|(index, column)| PhysicalSortExpr::new(Arc::clone(column), self.condition.options(index)));
        LexOrdering::new(columns).map(OrderingRequirements::from)
    }
}

impl DisplayAs for AsOfExec {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Condition { left, right, forward, strict, outer } = &self.condition;
        let op = match (forward, strict) {
            (false, false) => ">=",
            (false, true) => ">",
            (true, false) => "<=",
            (true, true) => "<",
        };
        write!(f, "AsOfExec: {}", if *outer { "left" } else { "inner" })?;
        let last = left.len() - 1;
        left.iter().zip(right).enumerate().try_for_each(|(index, (left, right))| {
            write!(f, ", {left} {} {right}", if index == last { op } else { "=" })
        })
    }
}

impl ExecutionPlan for AsOfExec {
    fn name(&self) -> &str {
        "AsOfExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn input_distribution_requirements(&self) -> InputDistributionRequirements {
        let (left, right) = (&self.condition.left, &self.condition.right);
        if left.len() == 1 {
            return InputDistributionRequirements::new(vec![Distribution::SinglePartition; 2]);
        }
        InputDistributionRequirements::co_partitioned(vec![
            Distribution::KeyPartitioned(self.condition.keys(left).to_vec()),
            Distribution::KeyPartitioned(self.condition.keys(right).to_vec()),
        ])
    }

    fn required_input_ordering(&self) -> Vec<Option<OrderingRequirements>> {
        vec![self.ordering(&self.condition.left), self.ordering(&self.condition.right)]
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.left, &self.right]
    }

    fn apply_expressions(
        &self,
        f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        apply_expression_roots(self.condition.left.iter().chain(&self.condition.right), f)
    }

    fn replace_children(
        self: Arc<Self>,
        children: Vec<Arc<dyn ExecutionPlan>>,
        _: ReplaceChildrenOptions,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let Ok([left, right]) = <[Arc<dyn ExecutionPlan>; 2]>::try_from(children) else {
            return internal_err!("an ASOF join has two inputs");
        };
        Ok(Arc::new(Self::new(left, right, self.condition.clone(), Arc::clone(&self.schema))))
    }

    fn with_new_children(self: Arc<Self>, children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        self.replace_children(children, ReplaceChildrenOptions::new(ChildrenPropertiesMode::Recompute))
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let left = self.left.execute(partition, Arc::clone(&context))?;
        let right = self.right.execute(partition, Arc::clone(&context))?;
        let none = none(&right.schema())?;
        let merge = Merge {
            left: Side::new(left, &self.condition, &self.condition.left)?,
            right: Side::new(right, &self.condition, &self.condition.right)?,
            condition: self.condition.clone(),
            candidate: None,
            held: vec![none],
            memory: MemoryConsumer::new("AsOf").register(context.memory_pool()),
            matches: Vec::new(),
            schema: Arc::clone(&self.schema),
        };
        let stream =
            stream::try_unfold(merge, |mut merge| async move { Ok(merge.next().await?.map(|batch| (batch, merge))) });
        Ok(Box::pin(RecordBatchStreamAdapter::new(Arc::clone(&self.schema), stream)))
    }
}

/// One row of NULLs, also where the schema says that there is none.
fn none(schema: &SchemaRef) -> Result<RecordBatch> {
    let fields: Vec<_> = schema.fields().iter().map(|field| field.as_ref().clone().with_nullable(true)).collect();
    let columns = schema.fields().iter().map(|field| new_null_array(field.data_type(), 1)).collect();
    let options = RecordBatchOptions::new().with_row_count(Some(1));
    let schema = Arc::new(arrow::datatypes::Schema::new(fields));
    Ok(RecordBatch::try_new_with_options(schema, columns, &options)?)
}

/// One input at one of its rows.
struct Side {
    input: SendableRecordBatchStream,
    expressions: Vec<Arc<dyn PhysicalExpr>>,
    /// Of the keys, and of keys and time.
    converters: (RowConverter, RowConverter),
    at: Option<At>,
}

struct At {
    batch: RecordBatch,
    /// None when there are no keys.
    keys: Option<Rows>,
    order: Rows,
    /// No key and not the time is NULL.
    comparable: BooleanArray,
    row: usize,
}

impl Side {
    fn new(
        input: SendableRecordBatchStream,
        condition: &Condition,
        expressions: &[Arc<dyn PhysicalExpr>],
    ) -> Result<Self> {
        let schema = input.schema();
        let fields = expressions
            .iter()
            .enumerate()
            .map(|(index, expression)| {
                Ok(SortField::new_with_options(expression.data_type(&schema)?, condition.options(index)))
            })
            .collect::<Result<Vec<_>>>()?;
        let keys = RowConverter::new(fields[..fields.len() - 1].to_vec())?;
        let converters = (keys, RowConverter::new(fields)?);
        Ok(Self { input, expressions: expressions.to_vec(), converters, at: None })
    }

    /// Goes on to a batch that has rows left, or to the end.
    async fn load(&mut self) -> Result<bool> {
        while self.at.as_ref().is_none_or(|at| at.row == at.batch.num_rows()) {
            let Some(batch) = self.input.next().await else {
                self.at = None;
                return Ok(false);
            };
            let batch = batch?;
            let columns = self
                .expressions
                .iter()
                .map(|expression| expression.evaluate(&batch)?.into_array(batch.num_rows()))
                .collect::<Result<Vec<ArrayRef>>>()?;
            let comparable = (0..batch.num_rows())
                .map(|row| Some(columns.iter().all(|column| column.is_valid(row))))
                .collect::<BooleanArray>();
            let keys = match &columns[..columns.len() - 1] {
                [] => None,
                keys => Some(self.converters.0.convert_columns(keys)?),
            };
            let order = self.converters.1.convert_columns(&columns)?;
            self.at = Some(At { batch, keys, order, comparable, row: 0 });
        }
        Ok(true)
    }
}

impl At {
    fn key(&self) -> &[u8] {
        self.keys.as_ref().map_or(&[], |keys| keys.row(self.row).data())
    }
}

/// The right row that comes last before the left row at hand.
struct Candidate {
    /// Among those held.
    batch: usize,
    row: usize,
    key: Box<[u8]>,
    order: Box<[u8]>,
}

struct Merge {
    left: Side,
    right: Side,
    condition: Condition,
    candidate: Option<Candidate>,
    /// Right batches with matches; the first is the row of NULLs.
    held: Vec<RecordBatch>,
    memory: MemoryReservation,
    /// For each left row since those that went out: where its match lies.
    matches: Vec<(usize, usize)>,
    schema: SchemaRef,
}

impl Merge {
    /// The next rows of the result.
    async fn next(&mut self) -> Result<Option<RecordBatch>> {
        loop {
            if !self.left.load().await? {
                return Ok(None);
            }
            while self.held.len() <= HELD_MAX && self.has_left_row() {
                self.advance().await?;
                let matched = self.matched();
                self.matches.push(matched);
                if let Some(at) = &mut self.left.at {
                    at.row += 1;
                }
            }
            let batch = self.emit()?;
            if batch.num_rows() > 0 {
                return Ok(Some(batch));
            }
        }
    }

    fn has_left_row(&self) -> bool {
        self.left.at.as_ref().is_some_and(|at| at.row < at.batch.num_rows())
    }

    /// Takes the right on, past all rows that come before the left one.
    async fn advance(&mut self) -> Result<()> {
        loop {
            if !self.right.load().await? {
                return Ok(());
            }
            let (Some(left), Some(right)) = (&self.left.at, &mut self.right.at) else {
                return Ok(());
            };
            let order = right.order.row(right.row);
            match order.cmp(&left.order.row(left.row)) {
                Ordering::Greater => return Ok(()),
                // Two NULLs are as equal as two times; neither row is matched then.
                Ordering::Equal if self.condition.strict => return Ok(()),
                _ => {}
            }
            if right.comparable.value(right.row) {
                let tie = self.candidate.as_ref().is_some_and(|held| *held.order == *order.data());
                let held = self.candidate.as_ref().map(|held| (&self.held[held.batch], held.row));
                if !tie || held.is_none_or(|(batch, row)| greater(&right.batch, right.row, batch, row)) {
                    let batch = match self.held.iter().rposition(|held| same(held, &right.batch)) {
                        Some(batch) => batch,
                        None => {
                            // The candidate before is let go, unless a row that still waits is matched with it.
                            let unused = |index: usize| self.matches.iter().all(|(batch, _)| *batch != index);
                            if self.held.len() > 1 && unused(self.held.len() - 1) {
                                self.held.pop();
                            }
                            self.memory.try_resize(held_bytes(&self.held) + right.batch.get_array_memory_size())?;
                            self.held.push(right.batch.clone());
                            self.held.len() - 1
                        }
                    };
                    let (key, order) = (right.key().into(), order.data().into());
                    self.candidate = Some(Candidate { batch, row: right.row, key, order });
                }
            }
            right.row += 1;
        }
    }

    fn matched(&self) -> (usize, usize) {
        match (&self.left.at, &self.candidate) {
            (Some(left), Some(candidate)) if left.comparable.value(left.row) && *candidate.key == *left.key() => {
                (candidate.batch, candidate.row)
            }
            _ => (0, 0),
        }
    }

    /// The left rows that wait, with their matches; afterwards only the candidate's batch is held.
    fn emit(&mut self) -> Result<RecordBatch> {
        let Some(left) = &self.left.at else {
            return internal_err!("rows wait and have no batch");
        };
        let matches = std::mem::take(&mut self.matches);
        let first = left.row - matches.len();
        let kept: Vec<usize> =
            (0..matches.len()).filter(|index| self.condition.outer || matches[*index].0 > 0).collect();
        let rows: UInt32Array = kept.iter().map(|index| Some((first + index) as u32)).collect();
        let places: Vec<(usize, usize)> = kept.iter().map(|index| matches[*index]).collect();
        let mut columns = Vec::with_capacity(self.schema.fields().len());
        for column in left.batch.columns() {
            columns.push(take(column, &rows, None)?);
        }
        for index in 0..self.held[0].num_columns() {
            let sources: Vec<&dyn Array> = self.held.iter().map(|batch| batch.column(index).as_ref()).collect();
            columns.push(interleave(&sources, &places)?);
        }
        let options = RecordBatchOptions::new().with_row_count(Some(kept.len()));
        let batch = RecordBatch::try_new_with_options(Arc::clone(&self.schema), columns, &options)?;
        if let Some(candidate) = &mut self.candidate {
            let held = self.held.swap_remove(candidate.batch);
            self.held.truncate(1);
            self.held.push(held);
            candidate.batch = 1;
        }
        self.memory.try_resize(held_bytes(&self.held))?;
        Ok(batch)
    }
}

fn held_bytes(held: &[RecordBatch]) -> usize {
    held.iter().map(RecordBatch::get_array_memory_size).sum()
}

/// Whether two batches are the same rows in memory, which two batches of one input never are unless they are one.
fn same(a: &RecordBatch, b: &RecordBatch) -> bool {
    a.num_rows() == b.num_rows()
        && a.num_columns() == b.num_columns()
        && a.num_columns() > 0
        && a.columns().iter().zip(b.columns()).all(|(a, b)| Arc::ptr_eq(a, b))
}

/// Whether a row is greater than another of the same schema, by its columns from left to right.
pub(in crate::functions) fn greater(a: &RecordBatch, row_a: usize, b: &RecordBatch, row_b: usize) -> bool {
    for (a, b) in a.columns().iter().zip(b.columns()) {
        // Types that have no order tell no difference.
        let ordering = make_comparator(a, b, SortOptions { descending: false, nulls_first: true })
            .map_or(Ordering::Equal, |compare| compare(row_a, row_b));
        if ordering != Ordering::Equal {
            return ordering == Ordering::Greater;
        }
    }
    false
}
