//! `SESSION(table, ts, key, gap [, cut])` in FROM: every row once, with `window_start` and `window_end` of the session that it
//! lies in, as Flink has it and as the edge makes them.
//!
//! Rows of one key belong together as long as each comes less than `gap` after the one before. A session begins with its
//! first row and ends `gap` after its last; a row `gap` or more later begins another. Rows that never stop for so long are
//! cut: once they have gone on for `cut` (24 hours when it is not given), they are at every beginning of a
//! `time_bucket(cut, ts)`. So a session lasts less than twice `cut`, and which one a row lies in depends on a bounded stretch
//! of time around it: see [`Silence::reach_us`]. A row without a time lies in none; a key that is null is a key. Several keys stand in parentheses.
//!
//! How it is written is in [`over_table`]. [`PlanSession`] plans it as [`Sessions`], [`BoundSession`] makes of conditions on the
//! time and the window one on the time alone that leaves the sessions in question whole, which the scan takes. Of other
//! conditions those on keys pass by themselves, and no others. [`exec`] carries it out.

pub(super) mod exec;

use std::cmp::Ordering;
use std::collections::HashSet;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use datafusion::common::tree_node::Transformed;
use datafusion::common::{DFSchemaRef, Result, ScalarValue, internal_err, plan_datafusion_err, plan_err};
use datafusion::logical_expr::planner::{PlannedRelation, RelationPlanner, RelationPlannerContext, RelationPlanning};
use datafusion::logical_expr::utils::split_conjunction;
use datafusion::logical_expr::{Expr, Extension, Filter, LogicalPlan, Operator, UserDefinedLogicalNodeCore};
use datafusion::optimizer::{ApplyOrder, OptimizerConfig, OptimizerRule};
use datafusion::sql::sqlparser::ast::{Expr as Sql, TableFactor};

use super::bucket_grid::{MONDAY_US, Width};
use super::over_table::{self, Call};
use super::time_bucket::{constant_argument, interval};

const CUT_US: i64 = 24 * 3_600_000_000;
/// Of what is given: an hour of it more would be out of range somewhere.
const CUT_MAX_US: i64 = 10 * 366 * CUT_US;

/// What ends a session. Equal ones make equal sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd)]
pub(crate) struct Silence {
    /// `0 < gap_us <= cut_us`
    pub(crate) gap_us: i64,
    cut_us: i64,
}

impl Silence {
    /// None when a session could not be so.
    pub(crate) fn new(gap_us: i64, cut_us: i64) -> Option<Self> {
        (0 < gap_us && gap_us <= cut_us && cut_us <= CUT_MAX_US).then_some(Self { gap_us, cut_us })
    }

    fn of(gap: &ScalarValue, cut: Option<&ScalarValue>) -> Result<Self> {
        let micros = |value: &ScalarValue| {
            let width = interval(value).and_then(|parts| Width::new(parts.months, parts.days, parts.nanoseconds));
            match width {
                Some(Width::Micros(us)) => Ok(us),
                _ => plan_err!("SESSION: a gap and a cut are days and shorter, and positive: {value}"),
            }
        };
        let (gap_us, cut_us) = (micros(gap)?, cut.map_or(Ok(CUT_US), micros)?);
        Self::new(gap_us, cut_us).ok_or_else(|| {
            plan_datafusion_err!(
                "SESSION: the gap {gap} is longer than the cut, or the cut longer than ten years: give both, \
                 SESSION(traffic, ts, device, INTERVAL '2 days', INTERVAL '28 days')"
            )
        })
    }

    /// Whether a row at `at` begins a session, when the one before was at `before` and came, through rows of which each was
    /// less than a gap after another, from one at `first`.
    fn begins(self, first: i64, before: i64, at: i64) -> bool {
        let cut = (at - MONDAY_US).div_euclid(self.cut_us) * self.cut_us + MONDAY_US;
        at - before >= self.gap_us || before < cut && first <= cut - self.cut_us
    }

    /// Whether rows that go on may be cut between two that are both in `[from, to)`.
    pub(crate) fn may_cut(self, from: i64, to: i64) -> bool {
        let bucket = |at: i64| at.saturating_sub(MONDAY_US).div_euclid(self.cut_us);
        bucket(from) != bucket(to.saturating_sub(1))
    }

    /// A session that holds a row, or would if there were one, ends less than this behind it; and a row that comes changes
    /// sessions that end from then on until less than this behind it.
    pub(crate) fn reach_us(self) -> i64 {
        2 * (self.cut_us + self.gap_us)
    }

    /// The times of the rows that tell all of the sessions that end in `[from, to)`; of others that they make they may lack
    /// rows. What was before them changes none of these: who was there as long ago as the cut is cut anyway.
    pub(crate) fn rows(self, (from, to): (i64, i64)) -> (i64, i64) {
        (if from > i64::MIN { from.saturating_sub(self.reach_us()) } else { from }, to)
    }
}

/// The node: the columns of its input, then the window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sessions {
    pub(crate) input: LogicalPlan,
    /// The event time, a column.
    pub(crate) time: Expr,
    /// Columns.
    pub(crate) keys: Vec<Expr>,
    pub(crate) silence: Silence,
    /// Only those that end from the first of these to before the second are asked for.
    ends: (i64, i64),
    schema: DFSchemaRef,
}

impl Sessions {
    fn try_new(input: LogicalPlan, time: Expr, keys: Vec<Expr>, silence: Silence, ends: (i64, i64)) -> Result<Self> {
        let Expr::Column(column) = &time else { return internal_err!("SESSION goes by a column, and not by {time}") };
        let schema = over_table::schema(&input, column)?;
        Ok(Self { input, time, keys, silence, ends, schema })
    }

    /// The index of `window_end`.
    pub(crate) fn end(&self) -> usize {
        self.schema.fields().len() - 1
    }

    /// From where to where sessions end that this condition, and what is known already, leaves.
    fn within(&self, condition: &Expr) -> (i64, i64) {
        let (mut from, mut to) = self.ends;
        let time = match &self.time {
            Expr::Column(column) => self.schema.maybe_index_of_column(column),
            _ => None,
        };
        for condition in split_conjunction(condition) {
            let Some((index, op, at)) = over_table::compared(condition, &self.schema) else { continue };
            let (since, until) = match index {
                _ if index == self.end() => (at, at),
                // The session of a row, or that begins with one.
                _ if index + 1 == self.end() || Some(index) == time => {
                    (at.saturating_add(self.silence.gap_us), at.saturating_add(self.silence.reach_us()))
                }
                _ => continue,
            };
            if matches!(op, Operator::Eq | Operator::GtEq | Operator::Gt) {
                from = from.max(since);
            }
            if matches!(op, Operator::Eq | Operator::LtEq | Operator::Lt) {
                to = to.min(until.saturating_add(1));
            }
        }
        (from, to)
    }

    /// That a row belongs to what tells those that end there.
    fn times(&self, ends: (i64, i64)) -> Option<Expr> {
        let (from, to) = self.silence.rows(ends);
        let kind = self.schema.field(self.end()).data_type();
        over_table::within(&self.time, kind, (from > i64::MIN).then_some(from), (to < i64::MAX).then_some(to))
    }
}

impl Hash for Sessions {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (&self.input, &self.time, &self.keys, self.silence, self.ends).hash(state);
    }
}

impl PartialOrd for Sessions {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        if self == other {
            return Some(Ordering::Equal);
        }
        let parts = |sessions: &Self| (sessions.input.clone(), sessions.keys.clone(), sessions.silence, sessions.ends);
        match parts(self).partial_cmp(&parts(other)) {
            Some(Ordering::Equal) => None,
            ordering => ordering,
        }
    }
}

impl UserDefinedLogicalNodeCore for Sessions {
    fn name(&self) -> &str {
        "Sessions"
    }

    fn inputs(&self) -> Vec<&LogicalPlan> {
        vec![&self.input]
    }

    fn schema(&self) -> &DFSchemaRef {
        &self.schema
    }

    fn expressions(&self) -> Vec<Expr> {
        std::iter::once(&self.time).chain(&self.keys).cloned().collect()
    }

    /// All but the keys: without some of its rows a session would be another, or two.
    fn prevent_predicate_push_down_columns(&self) -> HashSet<String> {
        let keys: Vec<&str> = self.keys.iter().filter_map(Expr::try_as_col).map(|key| key.name.as_str()).collect();
        let names = self.schema.fields().iter().map(|field| field.name());
        names.filter(|name| !keys.contains(&name.as_str())).cloned().collect()
    }

    fn fmt_for_explain(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Silence { gap_us, cut_us } = self.silence;
        write!(f, "Sessions: time=[{}], gap={gap_us}us, cut={cut_us}us, keys=[", self.time)?;
        self.keys.iter().enumerate().try_for_each(|(index, key)| match index {
            0 => write!(f, "{key}"),
            _ => write!(f, ", {key}"),
        })?;
        f.write_str("]")
    }

    fn with_exprs_and_inputs(&self, expressions: Vec<Expr>, mut inputs: Vec<LogicalPlan>) -> Result<Self> {
        let mut expressions = expressions.into_iter();
        let (Some(time), Some(input)) = (expressions.next(), inputs.pop()) else {
            return internal_err!("SESSION has an input and a time");
        };
        Self::try_new(input, time, expressions.collect(), self.silence, self.ends)
    }

    fn necessary_children_exprs(&self, output: &[usize]) -> Option<Vec<Vec<usize>>> {
        // Time and keys are added by the caller, from `expressions`.
        let columns = self.input.schema().fields().len();
        Some(vec![output.iter().copied().filter(|column| *column < columns).collect()])
    }
}

/// Plans what was nested.
#[derive(Debug)]
pub(super) struct PlanSession;

const USAGE: &str = "SESSION takes a table, its column of event times, a key or several in parentheses, a gap, and what cuts \
                     those that do not end: SESSION(traffic, ts, device, INTERVAL '30 minutes', INTERVAL '1 day')";

impl RelationPlanner for PlanSession {
    fn plan_relation(
        &self,
        relation: TableFactor,
        context: &mut dyn RelationPlannerContext,
    ) -> Result<RelationPlanning> {
        let Call { table, arguments, alias } = match over_table::call(relation, "session", USAGE)? {
            Ok(call) => call,
            Err(other) => return Ok(RelationPlanning::Original(other)),
        };
        let input = context.plan(table)?;
        let ([time, keys, gap], cut) = match <[Sql; 3]>::try_from(arguments.iter().take(3).cloned().collect::<Vec<_>>())
        {
            Ok(three) if arguments.len() <= 4 => (three, arguments.get(3).cloned()),
            _ => return plan_err!("{USAGE}"),
        };
        let keys = match keys {
            Sql::Tuple(keys) => keys,
            Sql::Nested(key) => vec![*key],
            key => vec![key],
        };
        let mut column = |expression: Sql| match context.sql_to_expr(expression, input.schema())? {
            column @ Expr::Column(_) => Ok(column),
            _ => plan_err!("{USAGE}"),
        };
        let time = column(time)?;
        let keys = keys.into_iter().map(&mut column).collect::<Result<Vec<_>>>()?;
        if let Some(time) = time.try_as_col() {
            over_table::check(input.schema(), time, "SESSION")?;
        }
        let mut value = |expression: Sql| {
            let argument = context.sql_to_expr(expression, input.schema())?;
            constant_argument(&argument).ok_or_else(|| plan_datafusion_err!("SESSION: {argument} is not constant"))
        };
        let (gap, cut) = (value(gap)?, cut.map(&mut value).transpose()?);
        let silence = Silence::of(&gap, cut.as_ref())?;
        let sessions = Sessions::try_new(input, time, keys, silence, (i64::MIN, i64::MAX))?;
        let plan = LogicalPlan::Extension(Extension { node: Arc::new(sessions) });
        Ok(RelationPlanning::Planned(Box::new(PlannedRelation::new(plan, alias))))
    }
}

/// Makes of a condition on times and windows one on the time below, which leaves whole the sessions that are asked for.
#[derive(Debug)]
pub(super) struct BoundSession;

impl OptimizerRule for BoundSession {
    fn name(&self) -> &str {
        "bound_session"
    }

    fn apply_order(&self) -> Option<ApplyOrder> {
        Some(ApplyOrder::TopDown)
    }

    fn rewrite(&self, plan: LogicalPlan, _: &dyn OptimizerConfig) -> Result<Transformed<LogicalPlan>> {
        let LogicalPlan::Filter(filter) = plan else { return Ok(Transformed::no(plan)) };
        let sessions = match filter.input.as_ref() {
            LogicalPlan::Extension(extension) => extension.node.as_any().downcast_ref::<Sessions>(),
            _ => None,
        };
        let narrowed = sessions.map(|sessions| (sessions, sessions.within(&filter.predicate)));
        let Some((sessions, ends)) = narrowed.filter(|(sessions, ends)| sessions.ends != *ends) else {
            return Ok(Transformed::no(LogicalPlan::Filter(filter)));
        };
        let input = match sessions.times(ends) {
            Some(times) => LogicalPlan::Filter(Filter::try_new(times, Arc::new(sessions.input.clone()))?),
            None => sessions.input.clone(),
        };
        let sessions = Sessions::try_new(input, sessions.time.clone(), sessions.keys.clone(), sessions.silence, ends)?;
        let plan = LogicalPlan::Extension(Extension { node: Arc::new(sessions) });
        Ok(Transformed::yes(LogicalPlan::Filter(Filter::try_new(filter.predicate, Arc::new(plan))?)))
    }
}
