//! `HOP(table, ts, hop, size [, zone] [, origin] [, offset])` in FROM: every row once for each hopping window that it lies in,
//! with the columns `window_start` and `window_end`, as RisingWave and Flink have it.
//!
//! A window begins with every bucket of `time_bucket(hop, ts …)` and is `size / hop` buckets long, a whole number of at most
//! [`HOPS_MAX`]: so it has the hour that a clock is set back by, like a bucket. A row without a time lies in none. `table` is
//! a name or a SELECT in parentheses.
//!
//! [`nest`] brings it to a tree that the planner takes, [`PlanHop`] plans it as [`Hop`], [`BoundHop`] makes of conditions on the windows a range of them and a condition on the
//! time, which the scan takes; others pass by themselves. [`exec`] carries it out.

pub(super) mod exec;

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, TimeUnit};
use datafusion::common::tree_node::Transformed;
use datafusion::common::{DFSchema, DFSchemaRef, Result, ScalarValue, internal_err, plan_datafusion_err, plan_err};
use datafusion::logical_expr::planner::{PlannedRelation, RelationPlanner, RelationPlannerContext, RelationPlanning};
use datafusion::logical_expr::utils::{conjunction, split_conjunction};
use datafusion::logical_expr::{
    BinaryExpr, Expr, Extension, Filter, LogicalPlan, Operator, UserDefinedLogicalNodeCore,
};
use datafusion::optimizer::{ApplyOrder, OptimizerConfig, OptimizerRule};
use datafusion::prelude::lit;
use datafusion::sql::sqlparser::ast::{
    Expr as Sql, FunctionArg, FunctionArgExpr, Ident, Join, JoinConstraint, JoinOperator, ObjectName, TableAlias,
    TableFactor, TableWithJoins,
};

use super::bucket_grid::{Buckets, Width};
use super::time_bucket::{buckets, constant, constant_argument, instant, interval};
use crate::as_of;

/// Windows that one row may lie in.
const HOPS_MAX: i64 = 1_000;
/// The columns that it adds.
pub(crate) const WINDOW_START: &str = "window_start";
const WINDOW_END: &str = "window_end";

/// Windows of several buckets, one beginning with every bucket. Equal ones have equal windows.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Windows {
    pub(crate) buckets: Buckets,
    /// Buckets of a window.
    pub(crate) hops: u32,
}

impl Windows {
    /// Of a hop, a size, and what may stand behind them; `kind` is the type of the instants.
    fn of(hop: &ScalarValue, size: &ScalarValue, kind: &DataType, more: &[ScalarValue]) -> Result<Self> {
        let buckets = buckets(hop, kind, more)?;
        let width = |value: &ScalarValue| {
            let parts = interval(value)?;
            Width::new(parts.months, parts.days, parts.nanoseconds)
        };
        let hops = match (width(hop), width(size)) {
            (Some(Width::Micros(hop)), Some(Width::Micros(size))) if size % hop == 0 => size / hop,
            (Some(Width::Months(hop)), Some(Width::Months(size))) if size % hop == 0 => size / hop,
            _ => return plan_err!("HOP: the size {size} is not a whole number of hops of {hop}"),
        };
        match u32::try_from(hops) {
            Ok(hops) if i64::from(hops) <= HOPS_MAX => Ok(Self { buckets, hops }),
            _ => plan_err!("HOP: a row would lie in {hops} windows, and may lie in {HOPS_MAX}: make the hop longer"),
        }
    }

    /// Where the first window begins that holds this instant, and where the last one does; None when out of range.
    pub(crate) fn holding(&mut self, at: i64) -> Option<(i64, i64)> {
        let last = self.buckets.start(at)?;
        Some((self.buckets.before(last, self.hops - 1)?, last))
    }

    /// Where the window that begins here ends.
    pub(crate) fn end(&mut self, start: i64) -> Option<i64> {
        self.buckets.after(start, self.hops)
    }
}

/// The node: the columns of its input, then the window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hop {
    pub(crate) input: LogicalPlan,
    /// The event time, a column.
    pub(crate) time: Expr,
    pub(crate) windows: Windows,
    /// Only windows that begin from the first of these to before the second come.
    pub(super) starts: (i64, i64),
    schema: DFSchemaRef,
}

impl Hop {
    fn try_new(input: LogicalPlan, time: Expr, windows: Windows, starts: (i64, i64)) -> Result<Self> {
        let Expr::Column(column) = &time else { return internal_err!("HOP goes by a column, and not by {time}") };
        let kind = input.schema().qualified_field_from_column(column)?.1.data_type().clone();
        let own = |name: &str| (None, Arc::new(Field::new(name, kind.clone(), false)));
        let columns = input.schema().iter().map(|(qualifier, field)| (qualifier.cloned(), Arc::clone(field)));
        let fields = columns.chain([own(WINDOW_START), own(WINDOW_END)]).collect();
        let schema = Arc::new(DFSchema::new_with_metadata(fields, input.schema().metadata().clone())?);
        Ok(Self { input, time, windows, starts, schema })
    }

    /// From where to where windows begin that this condition, and what is known already, leaves.
    fn within(&self, condition: &Expr) -> (i64, i64) {
        let (mut from, mut to) = self.starts;
        let mut windows = self.windows.clone();
        for condition in split_conjunction(condition) {
            let Some((column, op, at)) = self.compared(condition) else { continue };
            let after = at.saturating_add(1);
            match (column, op) {
                (WINDOW_START, Operator::Eq) => (from, to) = (from.max(at), to.min(after)),
                (WINDOW_START, Operator::GtEq) => from = from.max(at),
                (WINDOW_START, Operator::Gt) => from = from.max(after),
                (WINDOW_START, Operator::LtEq) => to = to.min(after),
                (WINDOW_START, Operator::Lt) => to = to.min(at),
                // A window ends behind an instant when it holds it, or begins later.
                (WINDOW_END, Operator::Gt) => from = from.max(windows.holding(at).map_or(from, |(first, _)| first)),
                (WINDOW_END, Operator::GtEq | Operator::Eq) => {
                    from = from.max(windows.holding(at.saturating_sub(1)).map_or(from, |(first, _)| first));
                }
                // And not behind it when it begins before all that hold it.
                (WINDOW_END, Operator::Lt | Operator::LtEq) => {
                    to = to.min(windows.holding(at).map_or(to, |(first, _)| first));
                }
                _ => {}
            }
        }
        (from, to)
    }

    /// A comparison of a column of the window with a moment of its type.
    fn compared(&self, condition: &Expr) -> Option<(&'static str, Operator, i64)> {
        let Expr::BinaryExpr(BinaryExpr { left, op, right }) = condition else { return None };
        let (column, op, value) = match (left.as_ref(), right.as_ref()) {
            (Expr::Column(column), value) => (column, *op, value),
            (value, Expr::Column(column)) => (column, op.swap()?, value),
            _ => return None,
        };
        let last = self.schema.fields().len() - 1;
        let index = self.schema.maybe_index_of_column(column)?;
        let name = [(last - 1, WINDOW_START), (last, WINDOW_END)].into_iter().find(|(own, _)| *own == index)?.1;
        let value = constant(value).filter(|value| value.data_type() == *self.schema.field(last).data_type())?;
        // A part of a microsecond is not told.
        let whole = !matches!(value, ScalarValue::TimestampNanosecond(Some(ns), _) if ns % 1_000 != 0);
        Some((name, op, instant(&value).filter(|_| whole)?))
    }

    /// That a row lies in one of these windows, where the type of the time can say it.
    fn times(&self, (from, to): (i64, i64)) -> Option<Expr> {
        let kind = self.schema.field(self.schema.fields().len() - 1).data_type();
        if !matches!(kind, DataType::Timestamp(TimeUnit::Microsecond | TimeUnit::Nanosecond, _)) {
            return None;
        }
        let moment = |us: i64| ScalarValue::TimestampMicrosecond(Some(us), None).cast_to(kind).ok().map(lit);
        let mut windows = self.windows.clone();
        let mut until = |to: i64| {
            let last = windows.buckets.start(to.checked_sub(1)?)?;
            windows.end(last)
        };
        let since = (from > i64::MIN).then(|| moment(from)).flatten().map(|from| self.time.clone().gt_eq(from));
        let until = (to < i64::MAX).then(|| until(to).and_then(moment)).flatten().map(|to| self.time.clone().lt(to));
        conjunction(since.into_iter().chain(until))
    }
}

impl Hash for Hop {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (&self.input, &self.time, &self.windows, self.starts).hash(state);
    }
}

impl PartialOrd for Hop {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        if self == other {
            return Some(Ordering::Equal);
        }
        let parts = |hop: &Self| (hop.input.clone(), hop.time.clone(), hop.windows.hops, hop.starts);
        match parts(self).partial_cmp(&parts(other)) {
            Some(Ordering::Equal) => None,
            ordering => ordering,
        }
    }
}

impl UserDefinedLogicalNodeCore for Hop {
    fn name(&self) -> &str {
        "Hop"
    }

    fn inputs(&self) -> Vec<&LogicalPlan> {
        vec![&self.input]
    }

    fn schema(&self) -> &DFSchemaRef {
        &self.schema
    }

    fn expressions(&self) -> Vec<Expr> {
        vec![self.time.clone()]
    }

    fn prevent_predicate_push_down_columns(&self) -> std::collections::HashSet<String> {
        [WINDOW_START, WINDOW_END].map(str::to_owned).into()
    }

    fn fmt_for_explain(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hop: time=[{}], windows={}", self.time, self.windows.hops)
    }

    fn with_exprs_and_inputs(&self, mut expressions: Vec<Expr>, mut inputs: Vec<LogicalPlan>) -> Result<Self> {
        let (Some(time), Some(input)) = (expressions.pop(), inputs.pop()) else {
            return internal_err!("HOP has an input and a time");
        };
        Self::try_new(input, time, self.windows.clone(), self.starts)
    }

    fn necessary_children_exprs(&self, output: &[usize]) -> Option<Vec<Vec<usize>>> {
        // The time is added by the caller, from `expressions`.
        let columns = self.input.schema().fields().len();
        Some(vec![output.iter().copied().filter(|column| *column < columns).collect()])
    }
}

/// Plans what [`nest`] made.
#[derive(Debug)]
pub(super) struct PlanHop;

const USAGE: &str = "HOP takes a table, its column of event times, a hop and a size: \
                     HOP(traffic, ts, INTERVAL '5 minutes', INTERVAL '15 minutes')";

/// The table of a HOP, when this is one: the words of its name.
pub(crate) fn table_of(factor: &mut TableFactor) -> Option<&mut [Ident]> {
    let TableFactor::Table { name, args: Some(arguments), .. } = factor else { return None };
    if !is_hop(name) {
        return None;
    }
    match arguments.args.first_mut()? {
        FunctionArg::Unnamed(FunctionArgExpr::Expr(Sql::Identifier(word))) => Some(std::slice::from_mut(word)),
        FunctionArg::Unnamed(FunctionArgExpr::Expr(Sql::CompoundIdentifier(words))) => Some(words),
        _ => None,
    }
}

fn is_hop(name: &ObjectName) -> bool {
    matches!(&name.0[..], [part] if part.as_ident().is_some_and(|word| word.value.eq_ignore_ascii_case("hop")))
}

/// Makes of a HOP its table and, joined to it in parentheses, the rest: the planner finds tables where tables stand only.
pub(in crate::functions) fn nest(factor: &mut TableFactor) {
    let TableFactor::Table { name, args: Some(arguments), alias, .. } = factor else { return };
    if !is_hop(name) {
        return;
    }
    let (relation, called) = match arguments.args.first() {
        Some(FunctionArg::Unnamed(FunctionArgExpr::Expr(Sql::Identifier(word)))) => named(vec![word.clone()]),
        Some(FunctionArg::Unnamed(FunctionArgExpr::Expr(Sql::CompoundIdentifier(words)))) => named(words.clone()),
        Some(FunctionArg::Unnamed(FunctionArgExpr::Expr(Sql::Subquery(subquery)))) => {
            let called = alias_of("hop".to_owned());
            let subquery = subquery.clone();
            let table = TableFactor::Derived { lateral: false, subquery, alias: Some(called.clone()), sample: None };
            (table, Some(called))
        }
        _ => return,
    };
    arguments.args.remove(0);
    let alias = alias.take().or(called);
    let function = std::mem::replace(factor, relation.clone());
    let join = Join { relation: function, global: false, join_operator: JoinOperator::Join(JoinConstraint::None) };
    let table_with_joins = Box::new(TableWithJoins { relation, joins: vec![join] });
    *factor = TableFactor::NestedJoin { table_with_joins, alias };
}

/// The arguments of a HOP behind its table, when this is one that was nested.
fn nested(relation: &TableFactor) -> Option<&[FunctionArg]> {
    let TableFactor::NestedJoin { table_with_joins, .. } = relation else { return None };
    match &table_with_joins.joins[..] {
        [Join { relation: TableFactor::Table { name, args: Some(arguments), .. }, .. }] if is_hop(name) => {
            Some(&arguments.args)
        }
        _ => None,
    }
}

impl RelationPlanner for PlanHop {
    fn plan_relation(
        &self,
        relation: TableFactor,
        context: &mut dyn RelationPlannerContext,
    ) -> Result<RelationPlanning> {
        if matches!(&relation, TableFactor::Table { name, args: Some(_), .. } if is_hop(name)) {
            return plan_err!("{USAGE}");
        }
        let arguments = nested(&relation).map(<[_]>::to_vec);
        let (arguments, table_with_joins, alias) = match (arguments, relation) {
            (Some(arguments), TableFactor::NestedJoin { table_with_joins, alias }) => {
                (arguments, table_with_joins, alias)
            }
            (_, other) => return Ok(RelationPlanning::Original(Box::new(other))),
        };
        let input = context.plan(table_with_joins.relation)?;
        let arguments = arguments
            .into_iter()
            .map(|argument| match argument {
                FunctionArg::Unnamed(FunctionArgExpr::Expr(argument)) => context.sql_to_expr(argument, input.schema()),
                _ => plan_err!("{USAGE}"),
            })
            .collect::<Result<Vec<Expr>>>()?;
        let (Some(Expr::Column(time)), [_, hop, size, more @ ..]) = (arguments.first(), &arguments[..]) else {
            return plan_err!("{USAGE}");
        };
        if let Some(own) = [WINDOW_START, WINDOW_END].into_iter().find(|own| has(input.schema(), own)) {
            return plan_err!(
                "HOP adds a column {own}, and this table has one: take the columns that you need, \
                 HOP((SELECT ts, device FROM …), ts, …)"
            );
        }
        let kind = input.schema().qualified_field_from_column(time)?.1.data_type();
        if !matches!(kind, DataType::Timestamp(..)) {
            return plan_err!("HOP: {} is {kind}, and no timestamp", time.name);
        }
        let value = |argument: &Expr| {
            constant_argument(argument).ok_or_else(|| plan_datafusion_err!("HOP: {argument} is not constant"))
        };
        let more = more.iter().map(value).collect::<Result<Vec<_>>>()?;
        let windows = Windows::of(&value(hop)?, &value(size)?, kind, &more)?;
        let time = Expr::Column(time.clone());
        let hop = Hop::try_new(input, time, windows, (i64::MIN, i64::MAX))?;
        let plan = LogicalPlan::Extension(Extension { node: Arc::new(hop) });
        Ok(RelationPlanning::Planned(Box::new(PlannedRelation::new(plan, alias))))
    }
}

fn has(schema: &DFSchema, name: &str) -> bool {
    schema.fields().iter().any(|field| field.name() == name)
}

/// A table by its name, and what it is called where nothing else is said.
fn named(words: Vec<Ident>) -> (TableFactor, Option<TableAlias>) {
    let called = words.last().map(|word| {
        let name = if word.quote_style.is_some() { word.value.clone() } else { word.value.to_lowercase() };
        alias_of(as_of::parts(&name).0.to_owned())
    });
    (as_of::table_named(ObjectName::from(words), None), called)
}

fn alias_of(name: String) -> TableAlias {
    TableAlias { explicit: true, name: Ident::with_quote('"', name), columns: Vec::new(), at: None }
}

/// Makes of a condition on windows a range of them, and a condition on the time below.
#[derive(Debug)]
pub(super) struct BoundHop;

impl OptimizerRule for BoundHop {
    fn name(&self) -> &str {
        "bound_hop"
    }

    fn apply_order(&self) -> Option<ApplyOrder> {
        Some(ApplyOrder::TopDown)
    }

    fn rewrite(&self, plan: LogicalPlan, _: &dyn OptimizerConfig) -> Result<Transformed<LogicalPlan>> {
        let LogicalPlan::Filter(filter) = plan else { return Ok(Transformed::no(plan)) };
        let hop = match filter.input.as_ref() {
            LogicalPlan::Extension(extension) => extension.node.as_any().downcast_ref::<Hop>(),
            _ => None,
        };
        let Some((hop, starts)) =
            hop.map(|hop| (hop, hop.within(&filter.predicate))).filter(|(hop, within)| hop.starts != *within)
        else {
            return Ok(Transformed::no(LogicalPlan::Filter(filter)));
        };
        let input = match hop.times(starts) {
            Some(times) => LogicalPlan::Filter(Filter::try_new(times, Arc::new(hop.input.clone()))?),
            None => hop.input.clone(),
        };
        let hop = Hop::try_new(input, hop.time.clone(), hop.windows.clone(), starts)?;
        let plan = LogicalPlan::Extension(Extension { node: Arc::new(hop) });
        Ok(Transformed::yes(LogicalPlan::Filter(Filter::try_new(filter.predicate, Arc::new(plan))?)))
    }
}
