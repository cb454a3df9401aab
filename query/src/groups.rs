//! `GROUP BY device`, and by any other text: rows that follow one another are mostly of one group.
//!
//! The question of this field is about each device, and files are sorted by device. DataFusion takes the text of every row
//! through a hash table; here a row costs a comparison with the text before it, or, if it is short, with one that was met
//! lately, or a look at its index where devices come as indices into a dictionary. What is computed of a group is DataFusion's: its accumulators, and its merging of the partial
//! groups that come out here.
//!
//! As there: when memory runs out, or nearly every row has a group of its own, groups go on as they are, and are put
//! together above.

mod names;
mod rule;

use std::fmt;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::{DataType, SchemaRef};
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{DataFusionError, Result};
use datafusion::config::ConfigOptions;
use datafusion::execution::memory_pool::{MemoryConsumer, MemoryReservation};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::logical_expr::{EmitTo, GroupsAccumulator};
use datafusion::physical_expr::expressions::Column;
use datafusion::physical_expr::utils::collect_columns;
use datafusion::physical_expr::{EquivalenceProperties, Partitioning, PhysicalExpr};
use datafusion::physical_plan::aggregates::{AggregateExec, AggregateMode, aggregate_expressions, evaluate_many};
use datafusion::physical_plan::execution_plan::ReplaceChildrenOptions;
use datafusion::physical_plan::metrics::{ExecutionPlanMetricsSet, MetricsSet};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, ExecutionPlanProperties, InputOrderMode, PlanProperties,
};
use futures::{StreamExt, stream};

use self::names::Names;
pub(crate) use self::rule::ByText;
use crate::execution::counted;

/// Partial groups of rows by one text.
#[derive(Debug)]
struct GroupsExec {
    /// What it stands for.
    partial: Arc<AggregateExec>,
    /// Its rows, whose text may have become indices.
    input: Arc<dyn ExecutionPlan>,
    properties: Arc<PlanProperties>,
    metrics: ExecutionPlanMetricsSet,
}

impl GroupsExec {
    /// In place of this aggregation, if it can be.
    fn of(partial: &AggregateExec) -> Result<Option<Self>> {
        let by = partial.group_expr();
        let [(text, _)] = by.expr() else { return Ok(None) };
        let input = partial.input();
        let fits = *partial.mode() == AggregateMode::Partial
            && by.is_single()
            && partial.limit_options().is_none()
            && *partial.input_order_mode() == InputOrderMode::Linear
            && partial.aggr_expr().iter().all(|aggregate| aggregate.groups_accumulator_supported())
            && text.data_type(&input.schema())? == DataType::Utf8;
        Ok(fits.then(|| Self::new(Arc::new(partial.clone()), Arc::clone(input))))
    }

    fn new(partial: Arc<AggregateExec>, input: Arc<dyn ExecutionPlan>) -> Self {
        let properties = partial.properties();
        let partitions = input.output_partitioning().partition_count();
        let properties = if properties.partitioning.partition_count() == partitions {
            Arc::clone(properties)
        } else {
            let (emission, bounds) = (properties.emission_type, properties.boundedness);
            let partitioning = Partitioning::UnknownPartitioning(partitions);
            let equal = EquivalenceProperties::new(partial.schema());
            Arc::new(PlanProperties::new(equal, partitioning, emission, bounds))
        };
        Self { partial, input, properties, metrics: ExecutionPlanMetricsSet::new() }
    }

    /// Where the text is, when it is a column and nothing else looks at it.
    fn column(&self) -> Option<usize> {
        let [(text, _)] = self.partial.group_expr().expr() else { return None };
        let column = text.downcast_ref::<Column>()?.index();
        let mut others = self.partial.aggr_expr().iter().flat_map(|aggregate| {
            let orders = aggregate.order_bys().iter().map(|order| Arc::clone(&order.expr));
            aggregate.expressions().into_iter().chain(orders).collect::<Vec<_>>()
        });
        let conditions = self.partial.filter_expr().iter().flatten().cloned();
        let looks = |other: Arc<dyn PhysicalExpr>| collect_columns(&other).iter().any(|other| other.index() == column);
        (!others.any(looks) && !conditions.into_iter().any(looks)).then_some(column)
    }

    /// The same groups of other rows: some of them, or with indices in place of texts.
    fn over(&self, input: Arc<dyn ExecutionPlan>) -> Self {
        Self::new(Arc::clone(&self.partial), input)
    }
}

impl DisplayAs for GroupsExec {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by = self.partial.group_expr().expr().iter().map(|(text, _)| text.to_string()).collect::<Vec<_>>();
        let aggregates = self.partial.aggr_expr().iter().map(|aggregate| aggregate.name()).collect::<Vec<_>>();
        write!(f, "GroupsExec: mode=Partial, gby=[{}], aggr=[{}]", by.join(", "), aggregates.join(", "))
    }
}

impl ExecutionPlan for GroupsExec {
    fn name(&self) -> &str {
        "GroupsExec"
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
        self.partial.apply_expressions(f)
    }

    fn replace_children(
        self: Arc<Self>,
        mut children: Vec<Arc<dyn ExecutionPlan>>,
        _: ReplaceChildrenOptions,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        Ok(Arc::new(self.over(children.swap_remove(0))))
    }

    fn with_new_children(self: Arc<Self>, mut children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        Ok(Arc::new(self.over(children.swap_remove(0))))
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let groups = Groups::new(&self.partial, partition, &context)?;
        let rows = self.input.execute(partition, context)?;
        let states = stream::try_unfold((groups, rows), |(mut groups, mut rows)| async move {
            let next = groups.next(&mut rows).await?;
            Ok(next.map(|states| (states, (groups, rows))))
        });
        let states = Box::pin(RecordBatchStreamAdapter::new(self.schema(), states));
        Ok(counted(states, &self.metrics, partition))
    }

    fn metrics(&self) -> Option<MetricsSet> {
        Some(self.metrics.clone_inner())
    }
}

/// The groups of a partition.
struct Groups {
    schema: SchemaRef,
    text: Arc<dyn PhysicalExpr>,
    arguments: Vec<Vec<Arc<dyn PhysicalExpr>>>,
    conditions: Vec<Option<Arc<dyn PhysicalExpr>>>,
    accumulators: Vec<Box<dyn GroupsAccumulator>>,
    names: Names,
    /// Of the last batch's rows.
    numbers: Vec<usize>,
    memory: MemoryReservation,
    /// Groups that go on, and how many of them have.
    out: Option<(RecordBatch, usize)>,
    batch_rows: usize,
    probe: Probe,
    /// Each row goes on as a group of its own.
    passes: bool,
    ends: bool,
}

/// Whether grouping here is worth its while: of so many rows, what part may be groups.
struct Probe {
    rows: usize,
    part_max: f64,
    seen: usize,
}

impl Probe {
    fn new(config: &ConfigOptions) -> Self {
        let rows = config.execution.skip_partial_aggregation_probe_rows_threshold;
        Self { rows, part_max: config.execution.skip_partial_aggregation_probe_ratio_threshold, seen: 0 }
    }

    /// Whether nearly every row that was seen had a group of its own.
    fn is_vain(&self, groups: usize) -> bool {
        self.seen >= self.rows && groups as f64 > self.seen as f64 * self.part_max
    }
}

impl Groups {
    fn new(partial: &AggregateExec, partition: usize, context: &TaskContext) -> Result<Self> {
        let [(text, _)] = partial.group_expr().expr() else {
            return Err(DataFusionError::Internal("groups have one text".to_owned()));
        };
        let accumulators = partial.aggr_expr().iter().map(|aggregate| aggregate.create_groups_accumulator());
        let memory = MemoryConsumer::new(format!("Groups[{partition}]")).with_can_spill(true);
        Ok(Self {
            schema: partial.schema(),
            text: Arc::clone(text),
            arguments: aggregate_expressions(partial.aggr_expr(), partial.mode(), 1)?,
            conditions: partial.filter_expr().to_vec(),
            accumulators: accumulators.collect::<Result<_>>()?,
            names: Names::default(),
            numbers: Vec::new(),
            memory: memory.register(context.memory_pool()),
            out: None,
            batch_rows: context.session_config().batch_size(),
            probe: Probe::new(context.session_config().options()),
            passes: false,
            ends: false,
        })
    }

    /// What goes on next.
    async fn next(&mut self, rows: &mut SendableRecordBatchStream) -> Result<Option<RecordBatch>> {
        loop {
            if let Some((groups, from)) = self.out.take() {
                let rows = self.batch_rows.min(groups.num_rows() - from);
                let part = groups.slice(from, rows);
                self.out = (from + rows < groups.num_rows()).then_some((groups, from + rows));
                if self.out.is_none() {
                    self.memory.free();
                }
                return Ok(Some(part));
            }
            if self.ends {
                return Ok(None);
            }
            match rows.next().await.transpose()? {
                None => {
                    self.ends = true;
                    self.emit()?;
                }
                Some(rows) if rows.num_rows() == 0 => {}
                Some(rows) if self.passes => return self.each(&rows).map(Some),
                Some(rows) => {
                    self.add(&rows)?;
                    self.passes = self.probe.is_vain(self.names.len());
                    if self.passes || self.memory.try_resize(self.bytes()).is_err() {
                        self.emit()?;
                    }
                }
            }
        }
    }

    fn bytes(&self) -> usize {
        let states = self.accumulators.iter().map(|accumulator| accumulator.size()).sum::<usize>();
        states + self.names.bytes() + self.numbers.capacity() * size_of::<usize>()
    }

    fn add(&mut self, rows: &RecordBatch) -> Result<()> {
        let text = self.text.evaluate(rows)?.into_array(rows.num_rows())?;
        self.names.number(&text, &mut self.numbers)?;
        self.probe.seen += rows.num_rows();
        let (values, conditions) = (evaluate_many(&self.arguments, rows)?, self.conditions_of(rows)?);
        for ((accumulator, values), condition) in self.accumulators.iter_mut().zip(&values).zip(&conditions) {
            let condition = condition.as_ref().map(|condition| condition.as_boolean());
            accumulator.update_batch(values, &self.numbers, condition, self.names.len())?;
        }
        Ok(())
    }

    /// Lets go on what there is, and begins anew.
    fn emit(&mut self) -> Result<()> {
        if self.names.len() > 0 {
            let mut columns = vec![self.names.take()];
            for accumulator in &mut self.accumulators {
                columns.extend(accumulator.state(EmitTo::All)?);
            }
            self.out = Some((RecordBatch::try_new(Arc::clone(&self.schema), columns)?, 0));
        }
        self.numbers = Vec::new();
        // It is there already, whether there is room for it or not.
        self.memory.resize(self.out.as_ref().map_or(0, |(groups, _)| groups.get_array_memory_size()));
        Ok(())
    }

    /// Rows as a group each.
    fn each(&self, rows: &RecordBatch) -> Result<RecordBatch> {
        let text = self.text.evaluate(rows)?.into_array(rows.num_rows())?;
        let (values, conditions) = (evaluate_many(&self.arguments, rows)?, self.conditions_of(rows)?);
        let mut columns = vec![names::texts(&text)?];
        for ((accumulator, values), condition) in self.accumulators.iter().zip(&values).zip(&conditions) {
            let condition = condition.as_ref().map(|condition| condition.as_boolean());
            columns.extend(accumulator.convert_to_state(values, condition)?);
        }
        Ok(RecordBatch::try_new(Arc::clone(&self.schema), columns)?)
    }

    fn conditions_of(&self, rows: &RecordBatch) -> Result<Vec<Option<ArrayRef>>> {
        let conditions = self.conditions.iter().map(|condition| {
            let condition = condition.as_ref().map(|condition| condition.evaluate(rows)?.into_array(rows.num_rows()));
            condition.transpose()
        });
        conditions.collect()
    }
}

#[cfg(test)]
mod tests;
