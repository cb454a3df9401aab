//! A plan that is carried out many times, each time over other rows of its tables.
//!
//! [`opened`] puts a gap where a plan has a live table; the plan is then optimized and planned once, down to how it is carried
//! out, and each gap filled whenever it is ([`Gap::filled`]): with the rows of a state, or of some times of it. Conditions that
//! were moved down to a gap are still above it; what fills it may leave out rows by them, and need not.

use std::fmt;
use std::sync::Arc;

use arrow_array::{BooleanArray, RecordBatch};
use arrow_schema::{Schema, SchemaRef};
use arrow_select::filter::filter_record_batch;
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::tree_node::{Transformed, TreeNodeRecursion};
use datafusion::common::{DFSchema, Result, internal_err};
use datafusion::datasource::memory::MemorySourceConfig;
use datafusion::datasource::provider_as_source;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::logical_expr::{Expr, LogicalPlan, TableProviderFilterPushDown, TableType};
use datafusion::physical_expr::{EquivalenceProperties, PhysicalExpr};
use datafusion::physical_plan::coalesce_partitions::CoalescePartitionsExec;
use datafusion::physical_plan::execution_plan::{Boundedness, EmissionType, ReplaceChildrenOptions};
use datafusion::physical_plan::filter::FilterExecBuilder;
use datafusion::physical_plan::union::UnionExec;
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, ExecutionPlanProperties, Partitioning, PlanProperties,
};
use wire::StreamName;
use wire::schema::TS;

use super::{Frozen, LiveTable, as_planned, event_times, hot_columns, provider};
use crate::cold;
use crate::views::{Intervals, among};

/// With what a gap is filled.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Filling<'a> {
    State(&'a Frozen),
    /// The rows of these times alone.
    Part(&'a Frozen, &'a Intervals),
    /// These, with the columns that are wanted of their table, and maybe others.
    Rows(&'a RecordBatch),
}

/// A plan whose live tables are gaps; None when one of them is no stream as it is now.
pub(crate) fn opened(plan: LogicalPlan) -> Result<Option<LogicalPlan>> {
    let mut all = true;
    let opened = plan.transform_down_with_subqueries(|node| {
        let Some(provider) = provider(&node) else { return Ok(Transformed::no(node)) };
        let Some(live) = provider.downcast_ref::<LiveTable>() else { return Ok(Transformed::no(node)) };
        let (LogicalPlan::TableScan(mut scan), Some(stream)) = (node.clone(), live.stream()) else {
            all = false;
            return Ok(Transformed::new(node, false, TreeNodeRecursion::Stop));
        };
        let table = GapTable { stream: stream.clone(), schema: Arc::clone(&live.schema) };
        scan.source = provider_as_source(Arc::new(table));
        Ok(Transformed::yes(LogicalPlan::TableScan(scan)))
    })?;
    Ok(all.then_some(opened.data))
}

/// How many gaps a plan has.
pub(crate) fn gaps(plan: &LogicalPlan) -> Result<usize> {
    let mut count = 0;
    plan.apply_with_subqueries(|node| {
        count += usize::from(provider(node).is_some_and(|table| table.downcast_ref::<GapTable>().is_some()));
        Ok(TreeNodeRecursion::Continue)
    })?;
    Ok(count)
}

#[derive(Debug)]
struct GapTable {
    stream: StreamName,
    schema: SchemaRef,
}

#[async_trait]
impl TableProvider for GapTable {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    fn supports_filters_pushdown(&self, filters: &[&Expr]) -> Result<Vec<TableProviderFilterPushDown>> {
        Ok(vec![TableProviderFilterPushDown::Inexact; filters.len()])
    }

    async fn scan(
        &self,
        _: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        _: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let wanted = match projection {
            Some(columns) => Arc::new(self.schema.project(columns)?),
            None => Arc::clone(&self.schema),
        };
        let properties = PlanProperties::new(
            EquivalenceProperties::new(Arc::clone(&wanted)),
            Partitioning::UnknownPartitioning(1),
            EmissionType::Incremental,
            Boundedness::Bounded,
        );
        Ok(Arc::new(Gap {
            stream: self.stream.clone(),
            schema: Arc::clone(&self.schema),
            wanted,
            filters: filters.to_vec(),
            properties: Arc::new(properties),
            rows: None,
        }))
    }
}

/// See the module. It has one partition, and so does what fills it.
#[derive(Debug)]
pub(crate) struct Gap {
    stream: StreamName,
    /// Of the table as it was planned, and of the columns that are wanted of it.
    schema: SchemaRef,
    wanted: SchemaRef,
    filters: Vec<Expr>,
    properties: Arc<PlanProperties>,
    /// What fills it.
    rows: Option<Arc<dyn ExecutionPlan>>,
}

impl Gap {
    /// Whose rows belong here.
    pub(crate) fn stream(&self) -> &StreamName {
        &self.stream
    }

    /// The columns that are wanted of them, and their event time, last if nobody asked for it.
    pub(crate) fn timed(&self) -> Result<SchemaRef> {
        if self.wanted.index_of(TS).is_ok() {
            return Ok(Arc::clone(&self.wanted));
        }
        let ts = Arc::new(self.schema.field_with_name(TS)?.clone());
        Ok(Arc::new(Schema::new(self.wanted.fields().iter().cloned().chain([ts]).collect::<Vec<_>>())))
    }

    /// This gap, filled. Plans above it need not look at it again.
    ///
    /// # Errors
    /// When a column that is wanted has got another type since it was planned.
    pub(crate) fn filled(&self, session: &dyn Session, filling: &Filling<'_>) -> Result<Self> {
        let rows = Some(self.rows(session, filling)?);
        let (stream, schema, wanted) = (self.stream.clone(), Arc::clone(&self.schema), Arc::clone(&self.wanted));
        Ok(Self { stream, schema, wanted, filters: Vec::new(), properties: Arc::clone(&self.properties), rows })
    }

    fn rows(&self, session: &dyn Session, filling: &Filling<'_>) -> Result<Arc<dyn ExecutionPlan>> {
        let (frozen, times) = match filling {
            Filling::State(frozen) => (*frozen, None),
            Filling::Part(frozen, times) => (*frozen, Some(*times)),
            Filling::Rows(rows) => {
                as_planned(&self.wanted, rows.schema_ref())?;
                let rows = hot_columns(rows, &self.wanted)?;
                return Ok(MemorySourceConfig::try_new_exec(&[vec![rows]], Arc::clone(&self.wanted), None)?);
            }
        };
        as_planned(&self.wanted, &frozen.cold().schema)?;
        let mut inputs = Vec::with_capacity(2);
        inputs.extend(self.cold(session, frozen, times)?);
        let hot = self.hot(frozen, times)?;
        if !hot.is_empty() || inputs.is_empty() {
            inputs.push(MemorySourceConfig::try_new_exec(&[hot], Arc::clone(&self.wanted), None)? as _);
        }
        let all = UnionExec::try_new(inputs)?;
        let is_one = all.output_partitioning().partition_count() == 1;
        Ok(if is_one { all } else { Arc::new(CoalescePartitionsExec::new(all)) })
    }

    fn hot(&self, frozen: &Frozen, times: Option<&Intervals>) -> Result<Vec<RecordBatch>> {
        let mut hot = Vec::with_capacity(frozen.hot().len());
        for (rows, (first, last)) in frozen.hot().iter().zip(frozen.times()) {
            match times {
                Some(times) if !times.meets(*first, *last) => {}
                Some(times) if !times.covers(*first, *last) => {
                    let among = event_times(rows)?.values().iter().map(|at| Some(times.meets(*at, *at)));
                    let among =
                        filter_record_batch(&hot_columns(rows, &self.wanted)?, &among.collect::<BooleanArray>())?;
                    hot.extend((among.num_rows() > 0).then_some(among));
                }
                _ => hot.push(hot_columns(rows, &self.wanted)?),
            }
        }
        Ok(hot)
    }

    fn cold(
        &self,
        session: &dyn Session,
        frozen: &Frozen,
        times: Option<&Intervals>,
    ) -> Result<Option<Arc<dyn ExecutionPlan>>> {
        let ts = datafusion::prelude::col(TS);
        let Some(condition) = times.and_then(|times| among(&ts, times)) else {
            return cold::scan(frozen.cold(), session, &self.schema, &self.wanted, &self.filters, None);
        };
        let mut filters = self.filters.clone();
        filters.push(condition.clone());
        let columns = self.wanted.fields().len();
        let read = self.timed()?;
        let Some(rows) = cold::scan(frozen.cold(), session, &self.schema, &read, &filters, None)? else {
            return Ok(None);
        };
        let among = session.create_physical_expr(condition, &DFSchema::try_from(Arc::clone(&read))?)?;
        let rows = FilterExecBuilder::new(among, rows).apply_projection(Some((0..columns).collect()))?.build()?;
        Ok(Some(Arc::new(rows)))
    }
}

impl DisplayAs for Gap {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gap: stream={}", self.stream)
    }
}

impl ExecutionPlan for Gap {
    fn name(&self) -> &str {
        "Gap"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        self.rows.iter().collect()
    }

    fn apply_expressions(
        &self,
        _: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn replace_children(
        self: Arc<Self>,
        _: Vec<Arc<dyn ExecutionPlan>>,
        _: ReplaceChildrenOptions,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        Ok(self)
    }

    fn with_new_children(self: Arc<Self>, _: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        Ok(self)
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        match &self.rows {
            Some(rows) => rows.execute(partition, context),
            None => internal_err!("a gap of {} was not filled", self.stream),
        }
    }
}
