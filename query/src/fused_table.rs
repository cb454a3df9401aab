//! A table as a statement sees it: Delta files up to one version, and the hot rows above it.
//!
//! A [`LiveTable`] stands in a plan until it is executed and cannot be scanned. [`pin`] replaces every one of them,
//! in subqueries too, by a [`PinnedTable`] over one [`Frozen`] state per stream, so that two mentions of a table in
//! one statement see the same rows; `latest('…')` takes part in it. A frozen state is exact: the snapshot of version V, and what the hot contract
//! answers for V; when it answers `Stale(W)` the snapshot is loaded again (rule 4).
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
use datafusion::common::{DataFusionError, Result, ScalarValue, exec_err, internal_err};
use datafusion::datasource::memory::MemorySourceConfig;
use datafusion::datasource::{provider_as_source, source_as_provider};
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::logical_expr::utils::split_conjunction;
use datafusion::logical_expr::{BinaryExpr, Expr, LogicalPlan, Operator, TableProviderFilterPushDown, TableType};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::{CastExpr, Column};
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::projection::ProjectionExec;
use datafusion::physical_plan::union::UnionExec;
use datafusion::prelude::{col, lit};
use deltalake_core::delta_datafusion::{DeltaScanConfig, DeltaScanNext};
use url::Position;
use wire::hot::HotAnswer;
use wire::schema::{DATE, TS};
use wire::{DAY_US, StreamName};

use crate::catalog::{ColdTable, Tables};
use crate::functions::latest::LiveLatest;

/// How often a snapshot is loaded again because commits overtook it, before the statement fails.
const STALE_TRIES_MAX: usize = 20;

/// A handle on a stream's table; it has columns and no rows.
#[derive(Debug)]
pub struct LiveTable {
    stream: StreamName,
    schema: SchemaRef,
}

impl LiveTable {
    pub(crate) fn new(stream: StreamName, schema: SchemaRef) -> Self {
        Self { stream, schema }
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

    /// The cold half.
    pub(crate) fn cold(&self) -> &ColdTable {
        &self.cold
    }

    /// The hot half: batches that have rows.
    pub(crate) fn hot(&self) -> &[RecordBatch] {
        &self.hot
    }
}

/// Replaces every live table of a plan by one frozen state per stream. Called each time a statement is executed.
pub async fn pin(plan: LogicalPlan, tables: &dyn Tables) -> Result<LogicalPlan> {
    let mut lives = Vec::new();
    plan.apply_with_subqueries(|node| {
        lives.extend(live_table(node));
        Ok(TreeNodeRecursion::Continue)
    })?;
    let mut streams: HashMap<StreamName, Arc<Frozen>> = HashMap::new();
    let mut latest: HashMap<StreamName, Arc<dyn TableProvider>> = HashMap::new();
    for live in &lives {
        let stream = live_stream(live);
        let frozen = match streams.get(stream) {
            Some(frozen) => Arc::clone(frozen),
            None => Arc::new(Frozen::take(tables, stream).await?),
        };
        if let Some(live) = live.downcast_ref::<LiveLatest>()
            && !latest.contains_key(stream)
        {
            latest.insert(stream.clone(), Arc::new(live.pin(&frozen).await?));
        }
        streams.insert(stream.clone(), frozen);
    }
    let pinned = plan.transform_down_with_subqueries(|node| {
        let Some(live) = live_table(&node) else {
            return Ok(Transformed::no(node));
        };
        let LogicalPlan::TableScan(mut scan) = node else {
            return internal_err!("a live table outside a scan");
        };
        let stream = live_stream(&live);
        let provider = match (live.is::<LiveLatest>(), latest.get(stream), streams.get(stream)) {
            (true, Some(latest), _) => Arc::clone(latest),
            (false, _, Some(frozen)) => {
                Arc::new(PinnedTable { schema: live.schema(), frozen: Arc::clone(frozen) }) as _
            }
            _ => return internal_err!("table {stream} was not frozen"),
        };
        scan.source = provider_as_source(provider);
        Ok(Transformed::yes(LogicalPlan::TableScan(scan)))
    })?;
    Ok(pinned.data)
}

fn live_table(node: &LogicalPlan) -> Option<Arc<dyn TableProvider>> {
    let LogicalPlan::TableScan(scan) = node else {
        return None;
    };
    let provider = source_as_provider(&scan.source).ok()?;
    (provider.is::<LiveTable>() || provider.is::<LiveLatest>()).then_some(provider)
}

fn live_stream(provider: &Arc<dyn TableProvider>) -> &StreamName {
    match provider.downcast_ref::<LiveTable>() {
        Some(live) => &live.stream,
        None => provider.downcast_ref::<LiveLatest>().expect("live_table checked the type").stream(),
    }
}

/// A table at one frozen state, with the columns that the statement was planned with.
#[derive(Debug)]
pub struct PinnedTable {
    schema: SchemaRef,
    frozen: Arc<Frozen>,
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
        let mut inputs = Vec::with_capacity(2);
        if self.frozen.cold.snapshot.log_data().num_files() > 0 {
            inputs.push(self.cold_plan(session, &wanted, filters, limit).await?);
        }
        if !self.frozen.hot.is_empty() || inputs.is_empty() {
            inputs.push(self.hot_plan(&wanted, session.config().target_partitions())?);
        }
        UnionExec::try_new(inputs)
    }
}

impl PinnedTable {
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

/// Hot rows as the plan wants them: by name, missing ones null, dates from `ts`.
pub(crate) fn hot_columns(rows: &RecordBatch, wanted: &SchemaRef) -> Result<RecordBatch> {
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
