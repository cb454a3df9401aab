//! One view, planned: its question over live tables, what it reads, how it is kept, and its columns.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_schema::{FieldRef, SchemaRef};
use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::common::{Column, Result, ScalarValue, exec_err, plan_err};
use datafusion::datasource::source_as_provider;
use datafusion::logical_expr::{Expr, LogicalPlan, LogicalPlanBuilder};
use datafusion::prelude::{col, lit};
use wire::schema::TS;
use wire::{NameError, StreamName};

use super::columns::Columns;
use super::definition::Definition;
use super::intervals::Intervals;
use super::shape::{self, Kept, Look, Shape, ViewSource};
use crate::catalog::Tables;
use crate::engine::{Engine, Parts, QueryError, Question, Ready, States};
use crate::fused_table::LiveTable;
use crate::fused_table::gap::Filling;

/// Stretches of time that a scan is told; of more the nearest become one, and what lies between is dropped afterwards.
const STRETCHES_MAX: usize = 16;

/// A question over more rows than these is planned for all threads of its lane.
pub(crate) const READY_ROWS_MAX: u64 = 1 << 18;

/// See the module.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) definition: Definition,
    pub(crate) plan: LogicalPlan,
    pub(crate) shape: Shape,
    pub(crate) columns: Columns,
    /// The stream of its results.
    pub(crate) changes: StreamName,
    /// The columns that the question reads, as `stream.column`, and their types.
    pub(crate) read: BTreeMap<String, String>,
    /// The tables as it was planned over them.
    planned: Vec<(StreamName, SchemaRef)>,
    /// The question, planned down to how it is carried out; None when it cannot be filled with other rows then.
    ready: Option<Ready>,
    /// How it is computed window by window, from what is new; None when it cannot be.
    pub(crate) parts: Option<Parts>,
}

/// Ends the name of the stream of a view's results.
pub(crate) const CHANGES: &str = "_changes";

/// The stream of a view's results.
pub(crate) fn changes(view: &StreamName) -> std::result::Result<StreamName, NameError> {
    format!("{view}{CHANGES}").parse()
}

impl View {
    /// Plans a definition and proves that it can be kept.
    ///
    /// # Errors
    /// Why not.
    pub(crate) async fn of(
        engine: &Engine,
        definition: Definition,
        look: Look<'_>,
    ) -> std::result::Result<Self, QueryError> {
        let changes = changes(&definition.name);
        let changes = changes.map_err(|error| QueryError::Invalid { message: format!("name of the view: {error}") })?;
        let prepared = engine.plan_for_view(&definition.select).await?;
        let plan = prepared.plan().clone();
        let shape = shape::of(&plan, look).map_err(|error| engine.explain(error))?;
        let columns = Columns::of(plan.schema().as_arrow(), &shape.kept).map_err(|error| engine.explain(error))?;
        let (planned, read) = read(&plan).map_err(|error| engine.explain(error))?;
        let ready = Ready::of(engine, definition.name.as_str(), plan.clone()).await?;
        let parts = match (&shape.kept, &ready) {
            (Kept::Windows { grid, .. }, Some(ready)) if grid.silence().is_none() && shape.streams.len() == 1 => {
                let parts = shape.streams.first().map(|stream| Parts::of(ready, stream, grid.overlaps()));
                parts.unwrap_or(Ok(None))
            }
            _ => Ok(None),
        };
        let parts = parts.map_err(|error| engine.explain(error))?;
        Ok(Self { definition, plan, shape, columns, changes, read, planned, ready, parts })
    }

    /// Whether its tables still have the types that it was planned with.
    pub(crate) fn is_current(&self, tables: &dyn Tables) -> bool {
        self.planned.iter().all(|(stream, planned)| {
            let Some(now) = tables.cold(stream).map(|cold| cold.schema) else { return true };
            let same = |field: &FieldRef| {
                now.field_with_name(field.name()).is_ok_and(|now| now.data_type() == field.data_type())
            };
            Arc::ptr_eq(&now, planned) || planned.fields().iter().all(same)
        })
    }

    /// This view as a source of another.
    pub(crate) fn as_source(&self) -> ViewSource {
        ViewSource { name: self.definition.name.clone(), changes: self.changes.clone(), kept: self.shape.kept.clone() }
    }

    /// The question over the rows of windows with these slots alone, of these states, which are those that it will be asked
    /// of. Others that it gives may lack rows.
    pub(crate) fn asked_of(&self, slots: &Intervals, states: &States) -> Result<Question> {
        let (Kept::Windows { grid, .. }, Some(ready)) = (&self.shape.kept, &self.ready) else {
            return self.of_windows(slots).map(Question::from);
        };
        // Windows that overlap must not make the others that these rows lie in.
        if grid.overlaps() {
            return self.of_windows(slots).map(Question::from);
        }
        let mut times = grid.clone().rows(slots);
        times.merge_to(STRETCHES_MAX);
        let condition = among(&col(TS), &times);
        let of_these = states.iter().filter(|(stream, _)| self.shape.streams.contains(*stream));
        let rows = of_these.map(|(_, frozen)| frozen.rows_about(condition.as_slice())).fold(0, u64::saturating_add);
        if rows > READY_ROWS_MAX {
            return self.of_windows(slots).map(Question::from);
        }
        let (ready, streams) = (ready.clone(), self.shape.streams.clone());
        Ok(Question::Ready(Box::new(move |states| {
            ready.over(|stream| match states.get(stream) {
                Some(frozen) if streams.contains(stream) => Ok(Filling::Part(frozen, &times)),
                Some(frozen) => Ok(Filling::State(frozen)),
                None => exec_err!("{stream} was not frozen"),
            })
        })))
    }

    /// The question over these rows of the one stream that a view of single rows has.
    pub(crate) fn asked_over(&self, rows: RecordBatch) -> Result<Question> {
        let Some(ready) = self.ready.clone() else {
            return plan_err!("the plan of this question hides what it reads");
        };
        Ok(Question::Ready(Box::new(move |_| ready.over(|_| Ok(Filling::Rows(&rows))))))
    }

    /// The question over the rows of windows with these slots alone. Others that it gives may lack rows.
    pub(crate) fn of_windows(&self, slots: &Intervals) -> Result<LogicalPlan> {
        let Kept::Windows { column, grid } = &self.shape.kept else { return Ok(self.plan.clone()) };
        let mut grid = grid.clone();
        let plan = self.narrowed(self.plan.clone(), &grid.rows(slots))?;
        if !grid.overlaps() {
            return Ok(plan);
        }
        // Their rows lie in others, too, which need not be told.
        let mut slots = slots.clone();
        slots.merge_to(STRETCHES_MAX);
        let (qualifier, field) = plan.schema().qualified_field(*column);
        let start = Expr::Column(Column::from((qualifier, field)));
        match among(&start, &slots) {
            Some(filter) => LogicalPlanBuilder::from(plan).filter(filter)?.build(),
            None => Ok(plan),
        }
    }

    /// The question, or a part of it, over rows of these times alone.
    pub(crate) fn narrowed(&self, plan: LogicalPlan, times: &Intervals) -> Result<LogicalPlan> {
        let mut times = times.clone();
        times.merge_to(STRETCHES_MAX);
        let narrowed = plan.transform_up(|node| {
            let LogicalPlan::TableScan(scan) = &node else { return Ok(Transformed::no(node)) };
            let provider = source_as_provider(&scan.source)?;
            let stream = provider.downcast_ref::<LiveTable>().and_then(LiveTable::stream);
            if !stream.is_some_and(|stream| self.shape.streams.contains(stream)) {
                return Ok(Transformed::no(node));
            }
            let ts = Expr::Column(Column::new(Some(scan.table_name.clone()), TS));
            match among(&ts, &times) {
                Some(filter) => Ok(Transformed::yes(LogicalPlanBuilder::from(node).filter(filter)?.build()?)),
                None => Ok(Transformed::no(node)),
            }
        })?;
        Ok(narrowed.data)
    }
}

/// The tables of a plan, and the columns of them that it names.
#[expect(clippy::type_complexity, reason = "two lists that are taken apart at once")]
fn read(plan: &LogicalPlan) -> Result<(Vec<(StreamName, SchemaRef)>, BTreeMap<String, String>)> {
    let (mut tables, mut names) = (Vec::new(), BTreeSet::from([TS.to_owned()]));
    plan.apply(|node| {
        node.apply_expressions(|expr| {
            names.extend(expr.column_refs().into_iter().map(|column| column.name.clone()));
            Ok(TreeNodeRecursion::Continue)
        })?;
        if let LogicalPlan::TableScan(scan) = node {
            let provider = source_as_provider(&scan.source)?;
            let stream = provider.downcast_ref::<LiveTable>().and_then(LiveTable::stream);
            tables.extend(stream.map(|stream| (stream.clone(), scan.source.schema())));
        }
        Ok(TreeNodeRecursion::Continue)
    })?;
    let of_table = |(stream, schema): &(StreamName, SchemaRef)| {
        let named = schema.fields().iter().filter(|field| names.contains(field.name()));
        named.map(|field| (format!("{stream}.{}", field.name()), field.data_type().to_string())).collect::<Vec<_>>()
    };
    let read = tables.iter().flat_map(of_table).collect();
    Ok((tables, read))
}

/// Whether a time lies in one of these; None for no condition at all.
pub(crate) fn among(ts: &Expr, times: &Intervals) -> Option<Expr> {
    let moment = |us: i64| lit(ScalarValue::TimestampMicrosecond(Some(us), Some("UTC".into())));
    let one = |(from, to): (i64, i64)| {
        let since = (from > i64::MIN).then(|| ts.clone().gt_eq(moment(from)));
        let until = (to < i64::MAX).then(|| ts.clone().lt(moment(to)));
        since.into_iter().chain(until).reduce(Expr::and)
    };
    let mut all = times.iter();
    let first = all.next()?;
    let Some(last) = all.next_back() else { return one(first) };
    // From the first to the last leaves out files; which of it, the rows.
    let around = one((first.0, last.1));
    let each = times.iter().filter_map(one).reduce(Expr::or);
    match (around, each) {
        (Some(around), Some(each)) => Some(around.and(each)),
        (around, each) => around.or(each),
    }
}
