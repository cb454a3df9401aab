//! `HOP(table, ts, hop, size [, zone] [, origin] [, offset])` in FROM: every row once for each hopping window that it lies in,
//! with the columns `window_start` and `window_end`, as RisingWave and Flink have it.
//!
//! A window begins with every bucket of `time_bucket(hop, ts …)` and is `size / hop` buckets long, a whole number of at most
//! [`HOPS_MAX`]: so it has the hour that a clock is set back by, like a bucket. A row without a time lies in none. `table` is
//! a name or a SELECT in parentheses.
//!
//! How it is written is in [`over_table`]. [`PlanHop`] plans it as [`Hop`], [`BoundHop`] makes of conditions on the windows a
//! range of them and a condition on the time, which the scan takes; others pass by themselves. [`exec`] carries it out.

pub(super) mod exec;

pub(crate) use exec::{bounded, is_hop};

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use arrow::datatypes::DataType;
use datafusion::common::tree_node::Transformed;
use datafusion::common::{DFSchemaRef, Result, ScalarValue, internal_err, plan_datafusion_err, plan_err};
use datafusion::logical_expr::planner::{PlannedRelation, RelationPlanner, RelationPlannerContext, RelationPlanning};
use datafusion::logical_expr::utils::split_conjunction;
use datafusion::logical_expr::{Expr, Extension, Filter, LogicalPlan, Operator, UserDefinedLogicalNodeCore};
use datafusion::optimizer::{ApplyOrder, OptimizerConfig, OptimizerRule};
use datafusion::sql::sqlparser::ast::TableFactor;

use super::bucket_grid::{Buckets, Width};
use super::over_table::{self, Call, WINDOW_END, WINDOW_START};
use super::time_bucket::{buckets, constant_argument, interval};

/// Windows that one row may lie in.
const HOPS_MAX: i64 = 1_000;

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
        let schema = over_table::schema(&input, column)?;
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

    /// A comparison of a column of the window with a moment.
    fn compared(&self, condition: &Expr) -> Option<(&'static str, Operator, i64)> {
        let (index, op, at) = over_table::compared(condition, &self.schema)?;
        let last = self.schema.fields().len() - 1;
        let name = [(last - 1, WINDOW_START), (last, WINDOW_END)].into_iter().find(|(own, _)| *own == index)?.1;
        Some((name, op, at))
    }

    /// That a row lies in one of these windows, where the type of the time can say it.
    fn times(&self, (from, to): (i64, i64)) -> Option<Expr> {
        let kind = self.schema.field(self.schema.fields().len() - 1).data_type();
        let mut windows = self.windows.clone();
        let mut until = |to: i64| {
            let last = windows.buckets.start(to.checked_sub(1)?)?;
            windows.end(last)
        };
        let until = (to < i64::MAX).then(|| until(to)).flatten();
        over_table::within(&self.time, kind, (from > i64::MIN).then_some(from), until)
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

/// Plans what was nested.
#[derive(Debug)]
pub(super) struct PlanHop;

const USAGE: &str = "HOP takes a table, its column of event times, a hop and a size: \
                     HOP(traffic, ts, INTERVAL '5 minutes', INTERVAL '15 minutes')";

impl RelationPlanner for PlanHop {
    fn plan_relation(
        &self,
        relation: TableFactor,
        context: &mut dyn RelationPlannerContext,
    ) -> Result<RelationPlanning> {
        let Call { table, arguments, alias } = match over_table::call(relation, "hop", USAGE)? {
            Ok(call) => call,
            Err(other) => return Ok(RelationPlanning::Original(other)),
        };
        let input = context.plan(table)?;
        let arguments = arguments.into_iter().map(|argument| context.sql_to_expr(argument, input.schema()));
        let arguments = arguments.collect::<Result<Vec<Expr>>>()?;
        let (Some(Expr::Column(time)), [_, hop, size, more @ ..]) = (arguments.first(), &arguments[..]) else {
            return plan_err!("{USAGE}");
        };
        over_table::check(input.schema(), time, "HOP")?;
        let kind = input.schema().qualified_field_from_column(time)?.1.data_type();
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
