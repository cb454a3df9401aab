//! A table as a statement sees it: Delta files up to one version, and the hot rows above it.
//!
//! A [`LiveTable`] stands in a plan until it is executed and cannot be scanned. [`pin`] replaces every one of them,
//! in subqueries too, by a [`PinnedTable`] over one [`Frozen`] state per stream, so that two mentions of a table in
//! one statement see the same rows; `latest('…')` takes part in it. A frozen state is exact: the snapshot of version V, and what the hot contract
//! answers for V; when it answers `Stale(W)` the snapshot is loaded again (rule 4).
//!
//! Filters go into the Parquet scan (`cold`); hot rows are filtered by the plan above.

use std::collections::HashMap;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::TimestampMicrosecondType;
use arrow_array::{ArrayRef, Date32Array, RecordBatch, new_null_array};
use arrow_schema::{ArrowError, SchemaRef};
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::tree_node::{Transformed, TreeNodeRecursion};
use datafusion::common::{DataFusionError, Result, exec_err, internal_err};
use datafusion::datasource::memory::MemorySourceConfig;
use datafusion::datasource::{provider_as_source, source_as_provider};
use datafusion::logical_expr::{Expr, LogicalPlan, TableProviderFilterPushDown, TableType};
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::union::UnionExec;
use wire::hot::HotAnswer;
use wire::schema::{DATE, TS};
use wire::{DAY_US, StreamName};

use crate::catalog::{ColdTable, Tables};
use crate::cold;
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
    pub(crate) async fn take(tables: &dyn Tables, stream: &StreamName) -> Result<Self> {
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
pub(crate) async fn pin(plan: LogicalPlan, tables: &dyn Tables) -> Result<LogicalPlan> {
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
        inputs.extend(cold::scan(&self.frozen.cold, session, &self.schema, projection, filters, limit)?);
        if !self.frozen.hot.is_empty() || inputs.is_empty() {
            inputs.push(self.hot_plan(&wanted, session.config().target_partitions())?);
        }
        UnionExec::try_new(inputs)
    }
}

impl PinnedTable {
    fn hot_plan(&self, wanted: &SchemaRef, partitions: usize) -> Result<Arc<dyn ExecutionPlan>> {
        let mut parts = vec![Vec::new(); partitions.clamp(1, self.frozen.hot.len().max(1))];
        let count = parts.len();
        for (index, rows) in self.frozen.hot.iter().enumerate() {
            parts[index % count].push(hot_columns(rows, wanted)?);
        }
        Ok(MemorySourceConfig::try_new_exec(&parts, Arc::clone(wanted), None)?)
    }
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
