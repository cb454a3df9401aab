//! A table as a statement sees it: Delta files up to one version, and the hot rows above it.
//!
//! A [`LiveTable`] stands in a plan until it is executed and cannot be scanned. [`pin`] replaces every one of them,
//! in subqueries too, by a [`PinnedTable`] over one [`Frozen`] state per stream, so that two mentions of a table in
//! one statement see the same rows. A frozen state is exact: the snapshot of version V, and what the hot contract
//! answers for V; when it answers `Stale(W)` the snapshot is loaded again (rule 4).
//!
//! A caller with a scope sees its rows of it: the filter lies right above both halves, and nothing passes it on the way
//! down but what cannot fail (`scope`).
//!
//! Filters go into the Delta scan, those on `ts` also as bounds of the partition column `_date`; hot rows are
//! filtered by the plan above.

use std::collections::HashMap;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::TimestampMicrosecondType;
use arrow_array::{ArrayRef, Date32Array, RecordBatch, new_null_array};
use arrow_schema::{ArrowError, SchemaRef};
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::tree_node::{Transformed, TreeNodeRecursion};
use datafusion::common::{DFSchema, DataFusionError, Result, ScalarValue, exec_err, internal_err};
use datafusion::datasource::memory::MemorySourceConfig;
use datafusion::datasource::{provider_as_source, source_as_provider};
use datafusion::execution::context::SessionState;
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::logical_expr::utils::split_conjunction;
use datafusion::logical_expr::{BinaryExpr, Expr, LogicalPlan, Operator, TableProviderFilterPushDown, TableType};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::{CastExpr, Column};
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::filter::FilterExec;
use datafusion::physical_plan::projection::ProjectionExec;
use datafusion::physical_plan::union::UnionExec;
use datafusion::prelude::{col, lit};
use deltalake_core::delta_datafusion::{DeltaScanConfig, DeltaScanNext};
use url::Position;
use wire::hot::HotAnswer;
use wire::schema::{DATE, TS};
use wire::{DAY_US, StreamName};

use crate::caller::Caller;
use crate::catalog::{ColdTable, Tables};
use crate::scope;
use crate::scope::hidden::HiddenExec;
use crate::statements::Statements;
use crate::system::{self, Kind, SystemTable};

mod told;

use told::ToldExec;

/// How often a snapshot is loaded again because commits overtook it, before the statement fails.
const STALE_TRIES_MAX: usize = 20;

/// A handle on a stream's table; it has columns and no rows.
#[derive(Debug)]
pub struct LiveTable {
    stream: StreamName,
    schema: SchemaRef,
    /// The state of the past that was asked for.
    past: Option<Arc<Frozen>>,
}

impl LiveTable {
    pub(crate) fn new(stream: StreamName, schema: SchemaRef) -> Self {
        Self { stream, schema, past: None }
    }

    /// The table as it was at this snapshot, without hot rows.
    pub(crate) fn past(stream: StreamName, cold: ColdTable) -> Self {
        let schema = Arc::clone(&cold.schema);
        Self { stream, schema, past: Some(Arc::new(Frozen { cold, hot: Vec::new() })) }
    }
}

#[async_trait]
impl TableProvider for LiveTable {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    async fn scan(
        &self,
        _: &dyn Session,
        _: Option<&Vec<usize>>,
        _: &[Expr],
        _: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        internal_err!("table {} was not pinned before its scan", self.stream)
    }
}

/// One state of a table: version V of the Delta table, and every durable row above it.
#[derive(Debug)]
pub struct Frozen {
    cold: ColdTable,
    hot: Vec<RecordBatch>,
}

impl Frozen {
    pub(crate) fn cold(&self) -> &ColdTable {
        &self.cold
    }

    pub(crate) fn hot(&self) -> &[RecordBatch] {
        &self.hot
    }

    /// Takes a state of `stream` that is whole: nothing missing, nothing twice.
    pub async fn take(tables: &dyn Tables, stream: &StreamName) -> Result<Self> {
        let Some(mut cold) = tables.cold(stream) else {
            return exec_err!("table {stream} is gone");
        };
        for _ in 0..STALE_TRIES_MAX {
            let answer = tables.hot().hot(stream, cold.version).await;
            match answer.map_err(|error| DataFusionError::External(Box::new(error)))? {
                HotAnswer::Rows(rows) => {
                    let hot = rows.into_iter().map(|rows| rows.rows).filter(|rows| rows.num_rows() > 0).collect();
                    return Ok(Self { cold, hot });
                }
                HotAnswer::Stale(at_least) => {
                    let reloaded = tables.reload(stream, at_least).await;
                    cold = reloaded.map_err(|error| DataFusionError::External(Box::new(error)))?;
                }
            }
        }
        exec_err!("table {stream} changes faster than it can be read")
    }
}

/// What a statement sees, and on whose behalf.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) tables: &'a dyn Tables,
    pub(crate) statements: &'a Statements,
    pub(crate) caller: &'a Caller,
}

/// Replaces every live table of a plan by one frozen state per stream, of which the caller sees what it may; and every
/// table of the schema `system` by its rows. Called each time a statement is executed.
pub(crate) async fn pin(plan: LogicalPlan, state: &SessionState, view: View<'_>) -> Result<LogicalPlan> {
    let told = matches!(plan, LogicalPlan::Explain(_) | LogicalPlan::Analyze(_));
    let mut streams: HashMap<StreamName, Option<Arc<Frozen>>> = HashMap::new();
    let mut system: HashMap<Kind, Option<Arc<dyn TableProvider>>> = HashMap::new();
    plan.apply_with_subqueries(|node| {
        if let Some(provider) = provider(node) {
            if let Some(live) = provider.downcast_ref::<LiveTable>()
                && live.past.is_none()
            {
                streams.insert(live.stream.clone(), None);
            } else if let Some(live) = provider.downcast_ref::<SystemTable>() {
                system.insert(live.kind(), None);
            }
        }
        Ok(TreeNodeRecursion::Continue)
    })?;
    for (stream, frozen) in &mut streams {
        *frozen = Some(Arc::new(Frozen::take(view.tables, stream).await?));
    }
    for (kind, rows) in &mut system {
        *rows = Some(system::pinned(*kind, view).await?);
    }
    let pinned = plan.transform_down_with_subqueries(|node| {
        let Some(provider) = provider(&node) else {
            return Ok(Transformed::no(node));
        };
        let fixed: Arc<dyn TableProvider> = if let Some(live) = provider.downcast_ref::<LiveTable>() {
            let frozen = live.past.as_ref().or_else(|| streams.get(&live.stream)?.as_ref());
            let Some(frozen) = frozen else {
                return internal_err!("table {} was not frozen", live.stream);
            };
            let scope = view.caller.scope().map(|scope| scope.filter(state, &live.schema)).transpose()?;
            Arc::new(PinnedTable { schema: Arc::clone(&live.schema), frozen: Arc::clone(frozen), scope, told })
        } else if let Some(live) = provider.downcast_ref::<SystemTable>() {
            let Some(Some(rows)) = system.get(&live.kind()) else {
                return internal_err!("a table of the schema system was not filled");
            };
            Arc::clone(rows)
        } else {
            return Ok(Transformed::no(node));
        };
        let LogicalPlan::TableScan(mut scan) = node else {
            return internal_err!("a live table outside a scan");
        };
        scan.source = provider_as_source(fixed);
        Ok(Transformed::yes(LogicalPlan::TableScan(scan)))
    })?;
    Ok(pinned.data)
}

fn provider(node: &LogicalPlan) -> Option<Arc<dyn TableProvider>> {
    let LogicalPlan::TableScan(scan) = node else {
        return None;
    };
    source_as_provider(&scan.source).ok()
}

/// A table at one frozen state, with the columns that the statement was planned with.
#[derive(Debug)]
pub struct PinnedTable {
    schema: SchemaRef,
    frozen: Arc<Frozen>,
    /// The rows that the caller may see; all when there is none.
    scope: Option<Expr>,
    /// Whether the plan is explained.
    told: bool,
}

#[async_trait]
impl TableProvider for PinnedTable {
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
        session: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let wanted: SchemaRef = match projection {
            Some(columns) => Arc::new(self.schema.project(columns)?),
            None => Arc::clone(&self.schema),
        };
        let Some(scope) = &self.scope else {
            return self.rows(session, &wanted, filters, limit).await;
        };
        let read = scope::with_columns_of(&wanted, scope, &self.schema)?;
        let rows = self.rows(session, &read, &scope::harmless(filters), None).await?;
        let in_scope = session.create_physical_expr(scope.clone(), &DFSchema::try_from(Arc::clone(&read))?)?;
        let rows: Arc<dyn ExecutionPlan> = Arc::new(FilterExec::try_new(in_scope, rows)?);
        Ok(Arc::new(HiddenExec::new(as_wanted(rows, &wanted)?)))
    }
}

impl PinnedTable {
    /// Both halves, in these columns.
    async fn rows(
        &self,
        session: &dyn Session,
        wanted: &SchemaRef,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let mut inputs = Vec::with_capacity(2);
        let files = self.frozen.cold.snapshot.log_data().num_files();
        if files > 0 {
            let plan = self.cold_plan(session, wanted, filters, limit).await?;
            let told = |plan| Arc::new(ToldExec::cold(self.frozen.cold.version, files, plan)) as _;
            inputs.push(if self.told { told(plan) } else { plan });
        }
        if !self.frozen.hot.is_empty() || inputs.is_empty() {
            let plan = self.hot_plan(wanted, session.config().target_partitions())?;
            let rows = self.frozen.hot.iter().map(RecordBatch::num_rows).sum();
            let told = |plan| Arc::new(ToldExec::hot(rows, plan)) as _;
            inputs.push(if self.told { told(plan) } else { plan });
        }
        UnionExec::try_new(inputs)
    }

    async fn cold_plan(
        &self,
        session: &dyn Session,
        wanted: &SchemaRef,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let cold = &self.frozen.cold;
        register_store(session, cold)?;
        let mut config = DeltaScanConfig::new();
        config.wrap_partition_values = false;
        config.schema_force_view_types = false;
        let delta = DeltaScanNext::new(cold.snapshot.clone(), config)?;
        let stored = delta.schema();
        let present: Vec<usize> =
            wanted.fields().iter().filter_map(|field| stored.index_of(field.name()).ok()).collect();
        let mut pushed: Vec<Expr> = filters
            .iter()
            .filter(|filter| filter.column_refs().iter().all(|column| stored.index_of(&column.name).is_ok()))
            .cloned()
            .collect();
        pushed.extend(date_bounds(filters));
        let plan = delta.scan(session, Some(&present), &pushed, limit).await?;
        as_wanted(plan, wanted)
    }

    fn hot_plan(&self, wanted: &SchemaRef, partitions: usize) -> Result<Arc<dyn ExecutionPlan>> {
        let mut parts = vec![Vec::new(); partitions.clamp(1, self.frozen.hot.len().max(1))];
        let count = parts.len();
        for (index, rows) in self.frozen.hot.iter().enumerate() {
            parts[index % count].push(hot_columns(rows, wanted)?);
        }
        Ok(MemorySourceConfig::try_new_exec(&parts, Arc::clone(wanted), None)?)
    }
}

/// Delta's columns as the plan wants them: by name, missing ones null, other representations cast.
fn as_wanted(plan: Arc<dyn ExecutionPlan>, wanted: &SchemaRef) -> Result<Arc<dyn ExecutionPlan>> {
    let stored = plan.schema();
    let same = stored.fields().len() == wanted.fields().len()
        && stored
            .fields()
            .iter()
            .zip(wanted.fields())
            .all(|(a, b)| a.name() == b.name() && a.data_type() == b.data_type());
    if same {
        return Ok(plan);
    }
    let columns = wanted
        .fields()
        .iter()
        .map(|field| {
            let expression: Arc<dyn PhysicalExpr> = match stored.index_of(field.name()) {
                Ok(index) => {
                    let column: Arc<dyn PhysicalExpr> = Arc::new(Column::new(field.name(), index));
                    if stored.field(index).data_type() == field.data_type() {
                        column
                    } else {
                        Arc::new(CastExpr::new(column, field.data_type().clone(), None))
                    }
                }
                Err(_) => datafusion::physical_expr::expressions::lit(ScalarValue::try_from(field.data_type())?),
            };
            Ok((expression, field.name().clone()))
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Arc::new(ProjectionExec::try_new(columns, plan)?))
}

fn hot_columns(rows: &RecordBatch, wanted: &SchemaRef) -> Result<RecordBatch> {
    let stored = rows.schema();
    let columns = wanted
        .fields()
        .iter()
        .map(|field| match stored.index_of(field.name()) {
            Ok(index) => Ok(Arc::clone(rows.column(index))),
            Err(_) if field.name() == DATE => dates(rows),
            Err(_) => Ok(new_null_array(field.data_type(), rows.num_rows())),
        })
        .collect::<Result<Vec<ArrayRef>, ArrowError>>()?;
    let options = arrow_array::RecordBatchOptions::new().with_row_count(Some(rows.num_rows()));
    Ok(RecordBatch::try_new_with_options(Arc::clone(wanted), columns, &options)?)
}

fn dates(rows: &RecordBatch) -> Result<ArrayRef, ArrowError> {
    let ts = rows
        .column_by_name(TS)
        .and_then(|ts| ts.as_primitive_opt::<TimestampMicrosecondType>())
        .ok_or_else(|| ArrowError::SchemaError("hot rows have no event time".to_owned()))?;
    Ok(Arc::new(ts.unary::<_, arrow_array::types::Date32Type>(|us| us.div_euclid(DAY_US) as i32) as Date32Array))
}

/// Bounds of `_date` that follow from comparisons of `ts` with a constant, so that whole partitions are left out.
fn date_bounds(filters: &[Expr]) -> Vec<Expr> {
    filters.iter().flat_map(split_conjunction).filter_map(date_bound).collect()
}

fn date_bound(filter: &Expr) -> Option<Expr> {
    let Expr::BinaryExpr(BinaryExpr { left, op, right }) = filter else {
        return None;
    };
    let (column, op, value) = match (left.as_ref(), right.as_ref()) {
        (Expr::Column(column), Expr::Literal(value, _)) => (column, *op, value),
        (Expr::Literal(value, _), Expr::Column(column)) => (column, op.swap()?, value),
        _ => return None,
    };
    if column.name != TS {
        return None;
    }
    let ScalarValue::TimestampMicrosecond(Some(us), _) = value.cast_to(&wire::schema::timestamp_type()).ok()? else {
        return None;
    };
    let date = lit(ScalarValue::Date32(Some(i32::try_from(us.div_euclid(DAY_US)).ok()?)));
    match op {
        Operator::Gt | Operator::GtEq => Some(col(DATE).gt_eq(date)),
        Operator::Lt | Operator::LtEq => Some(col(DATE).lt_eq(date)),
        Operator::Eq => Some(col(DATE).eq(date)),
        _ => None,
    }
}

fn register_store(session: &dyn Session, cold: &ColdTable) -> Result<()> {
    let root = cold.log_store.root_url();
    let url = ObjectStoreUrl::parse(&root[Position::BeforeScheme..Position::BeforePath])?;
    if session.runtime_env().object_store(&url).is_err() {
        session.runtime_env().register_object_store(url.as_ref(), cold.log_store.root_object_store(None));
    }
    Ok(())
}
