//! A table as a statement sees it: Delta files up to one version, and the hot rows above it.
//!
//! A [`LiveTable`] stands in a plan until it is executed and cannot be scanned. [`pin`] replaces every one of them,
//! in subqueries too, by a [`PinnedTable`] over one [`Frozen`] state per stream, so that two mentions of a table in
//! one statement see the same rows; `latest('…')` takes part in it. A frozen state is exact: the snapshot of version V, and
//! what the hot contract answers for V; when it answers `Stale(W)` the snapshot is loaded again (rule 4).
//!
//! A caller with a scope sees its rows of it: the filter lies right above both halves, and nothing passes it on the way
//! down but what cannot fail (`scope`).
//!
//! Filters go into the Parquet scan (`cold`); hot batches whose event times they leave out are not read, and the rows of
//! others are filtered by the plan above.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use arrow_array::cast::AsArray;
use arrow_array::{ArrayRef, Date32Array, RecordBatch, TimestampMicrosecondArray, new_null_array};
use arrow_schema::{ArrowError, SchemaRef};
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::tree_node::{Transformed, TreeNodeRecursion};
use datafusion::common::{DFSchema, DataFusionError, Result, exec_err, internal_err, plan_err};
use datafusion::datasource::memory::MemorySourceConfig;
use datafusion::datasource::{provider_as_source, source_as_provider};
use datafusion::execution::context::SessionState;
use datafusion::logical_expr::{Expr, LogicalPlan, TableProviderFilterPushDown, TableType};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::Column;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::empty::EmptyExec;
use datafusion::physical_plan::filter::FilterExec;
use datafusion::physical_plan::projection::ProjectionExec;
use datafusion::physical_plan::union::UnionExec;
use parking_lot::Mutex;
use wire::hot::{HotAnswer, HotRun};
use wire::schema::{DATE, TS};
use wire::{DAY_US, StreamName};

use crate::caller::Caller;
use crate::catalog::{ColdTable, Tables};
use crate::cold::{self, Bounds};
use crate::follow::Position;
use crate::functions::latest::PinnedLatest;
use crate::functions::latest::cache::{Held, LatestCache};
use crate::functions::latest::computed;
use crate::links::board::Board;
use crate::scope;
use crate::scope::hidden::HiddenExec;
use crate::statements::Statements;
use crate::system::{self, Kind};
use crate::views::Views;

pub(crate) mod gap;
pub(crate) mod told;

use told::ToldExec;

/// How often a snapshot is loaded again because commits overtook it, before the statement fails.
const STALE_TRIES_MAX: usize = 20;

/// A handle that stands in a plan until it is executed: it has columns and no rows.
#[derive(Debug)]
pub struct LiveTable {
    schema: SchemaRef,
    asked: Asked,
}

/// What a statement asks for where it names a table.
#[derive(Debug)]
enum Asked {
    Stream(StreamName),
    /// The state of the past that was asked for, or its newest rows.
    Past(Arc<Frozen>),
    LatestPast(Arc<Frozen>),
    Latest(StreamName, Arc<LatestCache>),
    /// The newest rows if they are kept, else all: the plan above takes the newest out of either.
    LatestIfKept(StreamName, Arc<LatestCache>),
    System(Kind),
}

impl LiveTable {
    pub(crate) fn new(stream: StreamName, schema: SchemaRef) -> Self {
        Self { schema, asked: Asked::Stream(stream) }
    }

    /// The table as it was at this snapshot, without hot rows.
    pub(crate) fn past(cold: ColdTable) -> Self {
        Self {
            schema: Arc::clone(&cold.schema),
            asked: Asked::Past(Arc::new(Frozen::new(cold, Vec::new(), Vec::new(), Vec::new()))),
        }
    }

    /// The newest rows of the table as it was at this snapshot.
    pub(crate) fn latest_past(cold: ColdTable) -> Self {
        let frozen = Arc::new(Frozen::new(cold, Vec::new(), Vec::new(), Vec::new()));
        Self { schema: Arc::clone(&frozen.cold.schema), asked: Asked::LatestPast(frozen) }
    }

    /// In place of a stream: its newest rows if they are kept. None when it is no stream.
    pub(crate) fn latest_if_kept(&self, cache: &Arc<LatestCache>) -> Option<Self> {
        let Asked::Stream(stream) = &self.asked else { return None };
        let asked = Asked::LatestIfKept(stream.clone(), Arc::clone(cache));
        Some(Self { schema: Arc::clone(&self.schema), asked })
    }

    /// The newest row of each device.
    pub(crate) fn latest(stream: StreamName, schema: SchemaRef, cache: Arc<LatestCache>) -> Self {
        Self { schema, asked: Asked::Latest(stream, cache) }
    }

    /// The stream that it stands for, when it shows all of it as it is now.
    pub(crate) fn stream(&self) -> Option<&StreamName> {
        match &self.asked {
            Asked::Stream(stream) => Some(stream),
            _ => None,
        }
    }

    /// The stream whose present rows it shows, all of them or the newest.
    pub(crate) fn reads(&self) -> Option<&StreamName> {
        match &self.asked {
            Asked::Stream(stream) | Asked::Latest(stream, _) | Asked::LatestIfKept(stream, _) => Some(stream),
            Asked::Past(_) | Asked::LatestPast(_) | Asked::System(_) => None,
        }
    }

    /// Whether it shows what links have done.
    pub(crate) fn shows_links(&self) -> bool {
        matches!(self.asked, Asked::System(Kind::Links))
    }

    /// A table about the node itself.
    pub(crate) fn system(kind: Kind) -> Self {
        Self { schema: kind.schema(), asked: Asked::System(kind) }
    }
}

#[async_trait]
impl TableProvider for LiveTable {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    fn table_type(&self) -> TableType {
        match self.asked {
            Asked::System(_) => TableType::View,
            _ => TableType::Base,
        }
    }

    async fn scan(
        &self,
        _: &dyn Session,
        _: Option<&Vec<usize>>,
        _: &[Expr],
        _: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        internal_err!("a table was not pinned before its scan: {:?}", self.asked)
    }
}

/// One state of a table: version V of the Delta table, and every durable row above it.
#[derive(Debug)]
pub struct Frozen {
    cold: ColdTable,
    hot: Vec<RecordBatch>,
    /// The first and last event time of each.
    times: Vec<(i64, i64)>,
    /// Which batches the rows of each are of, and last those without rows.
    runs: Vec<Vec<HotRun>>,
    span: OnceLock<Option<(i64, i64)>>,
    position: OnceLock<Position>,
}

/// The states that were frozen last, for all who look at tables again and again: nothing is frozen twice between two moves.
#[derive(Debug, Default)]
pub(crate) struct Newest(Mutex<HashMap<StreamName, (u64, Arc<Frozen>)>>);

impl Newest {
    /// As [`Frozen::take`], of now.
    pub(crate) async fn take(&self, tables: &dyn Tables, stream: &StreamName) -> Result<Arc<Frozen>> {
        // Before the state: it is of this number or a later one.
        let moves = tables.moves(stream);
        let known = self.0.lock().get(stream).filter(|(at, _)| *at == moves).map(|(_, frozen)| Arc::clone(frozen));
        if let Some(frozen) = known {
            return Ok(frozen);
        }
        let frozen = Arc::new(Frozen::take(tables, stream).await?);
        self.0.lock().insert(stream.clone(), (moves, Arc::clone(&frozen)));
        Ok(frozen)
    }

    /// Nobody looks any more: what they hold is not kept for them.
    pub(crate) fn forget(&self) {
        self.0.lock().clear();
    }
}

impl Frozen {
    fn new(cold: ColdTable, hot: Vec<RecordBatch>, times: Vec<(i64, i64)>, runs: Vec<Vec<HotRun>>) -> Self {
        Self { cold, hot, times, runs, span: OnceLock::new(), position: OnceLock::new() }
    }

    /// Takes a state of `stream` that is whole: nothing missing, nothing twice.
    pub(crate) async fn take(tables: &dyn Tables, stream: &StreamName) -> Result<Self> {
        let Some(mut cold) = tables.cold(stream) else {
            return exec_err!("table {stream} is gone");
        };
        for _ in 0..STALE_TRIES_MAX {
            let answer = tables.hot().hot(stream, cold.version).await;
            match answer.map_err(|error| DataFusionError::External(Box::new(error)))? {
                HotAnswer::Rows(rows) => {
                    let (rows, empty): (Vec<_>, Vec<_>) = rows.into_iter().partition(|hot| hot.rows.num_rows() > 0);
                    let times = rows.iter().map(|hot| hot.times.unwrap_or((i64::MIN, i64::MAX))).collect();
                    let (hot, mut runs): (Vec<_>, Vec<_>) = rows.into_iter().map(|hot| (hot.rows, hot.runs)).unzip();
                    runs.push(empty.into_iter().flat_map(|hot| hot.runs).collect());
                    return Ok(Self::new(cold, hot, times, runs));
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

    /// The first and last event time of each of [`Frozen::hot`].
    pub(crate) fn times(&self) -> &[(i64, i64)] {
        &self.times
    }

    /// How many rows there may be at most of these filters on event time.
    pub(crate) fn rows_about(&self, filters: &[Expr]) -> u64 {
        let bounds = Bounds::of(filters);
        let hot = self.hot.iter().zip(&self.times).filter(|(_, times)| bounds.may_have_times(**times));
        let hot: usize = hot.map(|(rows, _)| rows.num_rows()).sum();
        hot as u64 + cold::rows_about(&self.cold, &bounds)
    }

    /// The first and last event time of all rows; wider than they are where files do not say exactly.
    pub(crate) fn span(&self) -> Option<(i64, i64)> {
        *self.span.get_or_init(|| {
            let files = self.cold.files.iter().map(|file| (file.earliest_us(), file.latest_us()));
            files.chain(self.times.iter().copied()).reduce(|one, other| (one.0.min(other.0), one.1.max(other.1)))
        })
    }

    /// Where who has read all of it stands.
    pub(crate) fn position(&self) -> &Position {
        self.position.get_or_init(|| Position::of(self))
    }

    /// Which batches the rows of each of [`Frozen::hot`] are of, and last those without rows.
    pub(crate) fn runs(&self) -> &[Vec<HotRun>] {
        &self.runs
    }
}

/// What a statement sees, and on whose behalf.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) tables: &'a dyn Tables,
    pub(crate) statements: &'a Statements,
    pub(crate) views: &'a Views,
    pub(crate) links: &'a Board,
    pub(crate) caller: &'a Caller,
}

/// What the live tables of a plan become.
#[derive(Default)]
struct Pinned {
    streams: HashMap<StreamName, Arc<Frozen>>,
    latest: HashMap<StreamName, Arc<Held>>,
    system: HashMap<Kind, Arc<dyn TableProvider>>,
}

impl Pinned {
    async fn frozen(&mut self, stream: &StreamName, view: View<'_>) -> Result<Arc<Frozen>> {
        if let Some(frozen) = self.streams.get(stream) {
            return Ok(Arc::clone(frozen));
        }
        let frozen = Arc::new(Frozen::take(view.tables, stream).await?);
        self.streams.insert(stream.clone(), Arc::clone(&frozen));
        Ok(frozen)
    }

    /// Freezes what is asked for, if it was not frozen yet.
    async fn add(&mut self, asked: &Asked, view: View<'_>) -> Result<()> {
        match asked {
            Asked::Stream(stream) => {
                self.frozen(stream, view).await?;
            }
            Asked::Past(_) | Asked::LatestPast(_) => {}
            // Which row is the newest of those that the caller sees, what is kept of all rows does not tell.
            Asked::Latest(stream, _) | Asked::LatestIfKept(stream, _) if view.caller.scope().is_some() => {
                self.frozen(stream, view).await?;
            }
            Asked::Latest(stream, cache) | Asked::LatestIfKept(stream, cache) => {
                let frozen = self.frozen(stream, view).await?;
                if !self.latest.contains_key(stream) {
                    match cache.at(stream, frozen.cold()).await {
                        Ok(held) => drop(self.latest.insert(stream.clone(), held)),
                        Err(_) if matches!(asked, Asked::LatestIfKept(..)) => {}
                        Err(error) => return Err(error),
                    }
                }
            }
            Asked::System(kind) => {
                if !self.system.contains_key(kind) {
                    self.system.insert(*kind, system::pinned(*kind, view).await?);
                }
            }
        }
        Ok(())
    }
}

/// Replaces every live table of a plan by one frozen state per stream, of which the caller sees what it may; and every
/// table of the schema `system` by its rows. Called each time a statement is executed.
pub(crate) async fn pin(plan: LogicalPlan, state: &SessionState, view: View<'_>) -> Result<LogicalPlan> {
    pin_over(plan, state, view, HashMap::new()).await
}

/// As [`pin`], with the states of some streams frozen before.
pub(crate) async fn pin_over(
    plan: LogicalPlan,
    state: &SessionState,
    view: View<'_>,
    streams: HashMap<StreamName, Arc<Frozen>>,
) -> Result<LogicalPlan> {
    let told = matches!(plan, LogicalPlan::Explain(_) | LogicalPlan::Analyze(_));
    let mut providers = Vec::new();
    plan.apply_with_subqueries(|node| {
        providers.extend(provider(node));
        Ok(TreeNodeRecursion::Continue)
    })?;
    let mut pinned = Pinned { streams, ..Pinned::default() };
    for live in providers.iter().filter_map(|provider| provider.downcast_ref::<LiveTable>()) {
        pinned.add(&live.asked, view).await?;
    }
    let fixed = plan.transform_down_with_subqueries(|node| {
        let Some(provider) = provider(&node) else {
            return Ok(Transformed::no(node));
        };
        let Some(live) = provider.downcast_ref::<LiveTable>() else {
            return Ok(Transformed::no(node));
        };
        let schema = Arc::clone(&live.schema);
        let table = |frozen: &Arc<Frozen>| {
            as_planned(&schema, &frozen.cold.schema)?;
            let scope = view.caller.scope().map(|scope| scope.filter(state, &schema)).transpose()?;
            let (schema, frozen) = (Arc::clone(&schema), Arc::clone(frozen));
            Ok::<_, DataFusionError>(Arc::new(PinnedTable { schema, frozen, scope, told }) as Arc<dyn TableProvider>)
        };
        let LogicalPlan::TableScan(mut scan) = node else {
            return internal_err!("a live table outside of a scan");
        };
        let fixed = match &live.asked {
            Asked::Past(frozen) => Some(table(frozen)?),
            Asked::LatestPast(frozen) => return Ok(Transformed::yes(computed::newest(&scan, table(frozen)?)?)),
            Asked::System(kind) => pinned.system.get(kind).cloned(),
            Asked::Stream(stream) => pinned.streams.get(stream).map(table).transpose()?,
            Asked::Latest(stream, _) | Asked::LatestIfKept(stream, _) => {
                match (pinned.streams.get(stream), pinned.latest.get(stream), &live.asked) {
                    (Some(frozen), Some(held), _) => {
                        as_planned(&schema, &frozen.cold.schema)?;
                        let (schema, frozen) = (Arc::clone(&schema), Arc::clone(frozen));
                        Some(Arc::new(PinnedLatest::new(schema, frozen, Arc::clone(held))) as _)
                    }
                    (Some(frozen), None, Asked::LatestIfKept(..)) => Some(table(frozen)?),
                    (Some(frozen), None, _) => {
                        return Ok(Transformed::yes(computed::newest(&scan, table(frozen)?)?));
                    }
                    (None, ..) => None,
                }
            }
        };
        let Some(fixed) = fixed else {
            return internal_err!("a live table that was not frozen");
        };
        scan.source = provider_as_source(fixed);
        Ok(Transformed::yes(LogicalPlan::TableScan(scan)))
    })?;
    Ok(fixed.data)
}

/// A plan holds for the types that it was made with: a column that has got another one since is not cast behind its back.
fn as_planned(planned: &SchemaRef, now: &SchemaRef) -> Result<()> {
    for field in planned.fields() {
        let kind = now.field_with_name(field.name())?.data_type();
        if kind != field.data_type() {
            return plan_err!(
                "column {} was {} when this statement was prepared, and is {kind} now: prepare it again",
                field.name(),
                field.data_type()
            );
        }
    }
    Ok(())
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
            return self.rows(session, &wanted, filters, limit);
        };
        let read = scope::with_columns_of(&wanted, scope, &self.schema)?;
        let rows = self.rows(session, &read, &scope::harmless(filters), None)?;
        let in_scope = session.create_physical_expr(scope.clone(), &DFSchema::try_from(Arc::clone(&read))?)?;
        let rows: Arc<dyn ExecutionPlan> = Arc::new(FilterExec::try_new(in_scope, rows)?);
        let columns = wanted.fields().iter().map(|field| {
            let column = Column::new_with_schema(field.name(), &read)?;
            Ok((Arc::new(column) as Arc<dyn PhysicalExpr>, field.name().clone()))
        });
        let columns = columns.collect::<Result<Vec<_>>>()?;
        Ok(Arc::new(HiddenExec::new(Arc::new(ProjectionExec::try_new(columns, rows)?))))
    }
}

impl PinnedTable {
    /// Both halves, in these columns.
    fn rows(
        &self,
        session: &dyn Session,
        wanted: &SchemaRef,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let mut inputs = Vec::with_capacity(2);
        let cold = cold::scan(&self.frozen.cold, session, &self.schema, wanted, filters, limit)?;
        if self.told && !self.frozen.cold.files.is_empty() {
            let (version, files) = (self.frozen.cold.version, self.frozen.cold.files.len());
            let plan = cold.unwrap_or_else(|| Arc::new(EmptyExec::new(Arc::clone(wanted))));
            inputs.push(Arc::new(ToldExec::cold(version, files, plan)) as Arc<dyn ExecutionPlan>);
        } else {
            inputs.extend(cold);
        }
        if !self.frozen.hot.is_empty() || inputs.is_empty() {
            let all = self.frozen.hot.iter().map(RecordBatch::num_rows).sum::<usize>();
            let bounds = Bounds::of(filters);
            let hot = self.frozen.hot.iter().zip(&self.frozen.times);
            let hot = hot.filter(|(_, times)| bounds.may_have_times(**times)).map(|(rows, _)| rows).collect::<Vec<_>>();
            let rows = hot.iter().map(|rows| rows.num_rows()).sum();
            let plan = hot_plan(&hot, wanted, session.config().target_partitions())?;
            inputs.push(if self.told { Arc::new(ToldExec::hot(rows, all - rows, plan)) } else { plan });
        }
        UnionExec::try_new(inputs)
    }
}

fn hot_plan(hot: &[&RecordBatch], wanted: &SchemaRef, partitions: usize) -> Result<Arc<dyn ExecutionPlan>> {
    let mut parts = vec![Vec::new(); partitions.clamp(1, hot.len().max(1))];
    let count = parts.len();
    for (index, rows) in hot.iter().enumerate() {
        parts[index % count].push(hot_columns(rows, wanted)?);
    }
    Ok(MemorySourceConfig::try_new_exec(&parts, Arc::clone(wanted), None)?)
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
    let ts = event_times(rows)?;
    Ok(Arc::new(ts.unary::<_, arrow_array::types::Date32Type>(|us| us.div_euclid(DAY_US) as i32) as Date32Array))
}

fn event_times(rows: &RecordBatch) -> Result<&TimestampMicrosecondArray, ArrowError> {
    let ts = rows.column_by_name(TS).and_then(|ts| ts.as_primitive_opt());
    ts.ok_or_else(|| ArrowError::SchemaError("hot rows have no event time".to_owned()))
}

#[cfg(test)]
mod tests {
    use arrow_schema::{DataType, Field, Schema};

    use super::*;

    fn table(columns: &[(&str, DataType)]) -> SchemaRef {
        let field = |(name, kind): &(&str, DataType)| Field::new(*name, kind.clone(), true);
        Arc::new(Schema::new(columns.iter().map(field).collect::<Vec<_>>()))
    }

    #[test]
    fn a_plan_is_not_run_over_columns_that_have_other_types_since() {
        let planned = table(&[("n", DataType::Int64)]);
        assert!(as_planned(&planned, &planned).is_ok());
        assert!(as_planned(&planned, &table(&[("m", DataType::Utf8), ("n", DataType::Int64)])).is_ok());
        let error = as_planned(&planned, &table(&[("n", DataType::Utf8)])).unwrap_err().to_string();
        assert!(error.contains("column n was Int64") && error.contains("is Utf8 now: prepare it again"), "{error}");
        assert!(as_planned(&planned, &table(&[("m", DataType::Int64)])).is_err());
    }
}
