//! ASOF JOIN: to each row of the left table the one row of the right that was true at its time.
//!
//! Both known ways to write it:
//! - Snowflake's: `a ASOF JOIN b MATCH_CONDITION (a.ts >= b.ts) ON a.device = b.device`. Rows of `a` without a match stay,
//!   with NULLs.
//! - DuckDB's: `a ASOF JOIN b ON a.device = b.device AND a.ts >= b.ts`, which leaves out rows without a match;
//!   `a ASOF LEFT JOIN b ON …` keeps them. `USING (device, ts)` stands for equal devices and `a.ts >= b.ts`, and shows the
//!   columns of `a` only.
//!
//! Exactly one condition compares (`>=`, `>`, `<=`, `<`), all others are equalities of a left and a right expression; there
//! may be none. With `a.ts >= b.ts` the match is the row of `b` with the greatest `b.ts` that is not after `a.ts`, with
//! `<=` the one with the least that is not before. NULL matches nothing. Among rows of `b` with equal keys and time the
//! greatest wins, by the columns that the statement uses, from left to right, NULL being the least.
//!
//! Joins without keys run in one thread. [`syntax`] brings both ways to one tree, [`PlanAsOf`] plans it as [`AsOf`],
//! [`PushIntoAsOf`] moves conditions of WHERE into its inputs, and [`exec`] merges the sorted inputs.

pub(super) mod exec;
pub(crate) mod syntax;

use std::cmp::Ordering;
use std::collections::HashMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::common::{
    Column, DFSchema, DFSchemaRef, JoinType, Result, internal_err, plan_datafusion_err, plan_err,
};
use datafusion::logical_expr::builder::build_join_schema;
use datafusion::logical_expr::planner::{PlannedRelation, RelationPlanner, RelationPlannerContext, RelationPlanning};
use datafusion::logical_expr::utils::{conjunction, split_conjunction_owned};
use datafusion::logical_expr::{
    BinaryExpr, Expr, Extension, Filter, LogicalPlan, LogicalPlanBuilder, Operator, UserDefinedLogicalNodeCore,
};
use datafusion::optimizer::{ApplyOrder, OptimizerConfig, OptimizerRule};
use datafusion::sql::sqlparser::ast::{Join, JoinConstraint, JoinOperator, TableFactor, TableWithJoins};

/// The join: columns of the left input, then of the right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AsOf {
    left: LogicalPlan,
    right: LogicalPlan,
    /// Equalities, of a left and a right expression in either order.
    on: Vec<Expr>,
    /// The comparison.
    matching: Expr,
    /// Whether rows without a match stay.
    pub(super) outer: bool,
    schema: DFSchemaRef,
}

/// A condition whose sides are told apart: `left op right`.
pub(super) struct Sided {
    pub(super) left: Expr,
    pub(super) op: Operator,
    pub(super) right: Expr,
}

impl AsOf {
    fn try_new(left: LogicalPlan, right: LogicalPlan, on: Vec<Expr>, matching: Expr, outer: bool) -> Result<Self> {
        let kind = if outer { JoinType::Left } else { JoinType::Inner };
        let schema = Arc::new(build_join_schema(left.schema(), right.schema(), &kind)?);
        Ok(Self { left, right, on, matching, outer, schema })
    }

    pub(super) fn keys(&self) -> Result<Vec<Sided>> {
        self.on.iter().map(|condition| self.sided(condition)).collect()
    }

    pub(super) fn matching(&self) -> Result<Sided> {
        self.sided(&self.matching)
    }

    fn sided(&self, condition: &Expr) -> Result<Sided> {
        match sided(condition, self.left.schema(), self.right.schema()) {
            Some(sided) => Ok(sided),
            None => internal_err!("{condition} compares no left with a right expression"),
        }
    }
}

fn sided(condition: &Expr, left: &DFSchema, right: &DFSchema) -> Option<Sided> {
    // The optimizer keeps the name of what it turns around in an alias.
    let Expr::BinaryExpr(BinaryExpr { left: first, op, right: second }) = unaliased(condition) else {
        return None;
    };
    let of = |expression: &Expr, schema: &DFSchema| {
        let columns = expression.column_refs();
        !columns.is_empty() && columns.iter().all(|column| schema.maybe_index_of_column(column).is_some())
    };
    if of(first, left) && of(second, right) {
        return Some(Sided { left: first.as_ref().clone(), op: *op, right: second.as_ref().clone() });
    }
    if of(first, right) && of(second, left) {
        return Some(Sided { left: second.as_ref().clone(), op: op.swap()?, right: first.as_ref().clone() });
    }
    None
}

/// An expression without the names that were given to it.
pub(super) fn unaliased(mut expression: &Expr) -> &Expr {
    while let Expr::Alias(alias) = expression {
        expression = &alias.expr;
    }
    expression
}

impl Hash for AsOf {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (&self.left, &self.right, &self.on, &self.matching, self.outer).hash(state);
    }
}

impl PartialOrd for AsOf {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        let parts =
            |join: &Self| (join.left.clone(), join.right.clone(), join.on.clone(), join.matching.clone(), join.outer);
        parts(self).partial_cmp(&parts(other))
    }
}

impl UserDefinedLogicalNodeCore for AsOf {
    fn name(&self) -> &str {
        "AsOfJoin"
    }

    fn inputs(&self) -> Vec<&LogicalPlan> {
        vec![&self.left, &self.right]
    }

    fn schema(&self) -> &DFSchemaRef {
        &self.schema
    }

    fn expressions(&self) -> Vec<Expr> {
        self.on.iter().chain([&self.matching]).cloned().collect()
    }

    fn fmt_for_explain(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AsOfJoin: {} on {}", if self.outer { "left" } else { "inner" }, self.matching)?;
        self.on.iter().try_for_each(|condition| write!(f, ", {condition}"))
    }

    fn with_exprs_and_inputs(&self, mut expressions: Vec<Expr>, inputs: Vec<LogicalPlan>) -> Result<Self> {
        let (Some(matching), Ok([left, right])) = (expressions.pop(), <[LogicalPlan; 2]>::try_from(inputs)) else {
            return internal_err!("an ASOF join has two inputs and a comparison");
        };
        Self::try_new(left, right, expressions, matching, self.outer)
    }

    fn necessary_children_exprs(&self, output: &[usize]) -> Option<Vec<Vec<usize>>> {
        // What the conditions need is added by the caller, from `expressions`.
        let columns = self.left.schema().fields().len();
        let (left, right): (Vec<usize>, Vec<usize>) = output.iter().partition(|column| **column < columns);
        Some(vec![left, right.into_iter().map(|column| column - columns).collect()])
    }
}

/// Plans what [`syntax::nest`] made.
#[derive(Debug)]
pub(super) struct PlanAsOf;

impl RelationPlanner for PlanAsOf {
    fn plan_relation(
        &self,
        relation: TableFactor,
        context: &mut dyn RelationPlannerContext,
    ) -> Result<RelationPlanning> {
        let (mut joins, first, alias) = match relation {
            TableFactor::NestedJoin { table_with_joins, alias }
                if table_with_joins.joins.last().is_some_and(syntax::is_asof) =>
            {
                (table_with_joins.joins, table_with_joins.relation, alias)
            }
            other => return Ok(RelationPlanning::Original(Box::new(other))),
        };
        let Some(last) = joins.pop() else {
            return internal_err!("an ASOF join without a right side");
        };
        let first = match joins.is_empty() {
            true => first,
            false => TableFactor::NestedJoin {
                table_with_joins: Box::new(TableWithJoins { relation: first, joins }),
                alias: None,
            },
        };
        let left = context.plan(first)?;
        let plan = join(left, last, context)?;
        Ok(RelationPlanning::Planned(Box::new(PlannedRelation::new(plan, alias))))
    }
}

const NEEDED: &str = "ASOF JOIN needs exactly one comparison of a left with a right time, such as a.ts >= b.ts, \
                      and otherwise equalities";

fn join(left: LogicalPlan, join: Join, context: &mut dyn RelationPlannerContext) -> Result<LogicalPlan> {
    let right = context.plan(join.relation)?;
    let both = left.schema().join(right.schema())?;
    let (given, constraint, outer) = match join.join_operator {
        JoinOperator::AsOf { match_condition, constraint } => (Some(match_condition), constraint, true),
        JoinOperator::Left(constraint) | JoinOperator::LeftOuter(constraint) => (None, constraint, true),
        JoinOperator::Join(constraint) | JoinOperator::Inner(constraint) => (None, constraint, false),
        _ => return plan_err!("an ASOF join is an inner or a left join"),
    };
    let mut conditions = Vec::new();
    if let Some(given) = given {
        conditions.extend(split_conjunction_owned(context.sql_to_expr(given, &both)?));
    }
    let mut shared = Vec::new();
    match constraint {
        JoinConstraint::On(expression) => {
            conditions.extend(split_conjunction_owned(context.sql_to_expr(expression, &both)?));
        }
        JoinConstraint::Using(names) => {
            let with_time = conditions.is_empty();
            let last = names.len().saturating_sub(1);
            for (index, name) in names.into_iter().enumerate() {
                let name = match name.0.as_slice() {
                    [part] => part.as_ident().map(|ident| context.normalize_ident(ident.clone())),
                    _ => None,
                };
                let name = name.ok_or_else(|| plan_datafusion_err!("USING takes names of columns"))?;
                let column = |schema: &DFSchema| -> Result<Column> {
                    Ok(Column::from(schema.qualified_field_with_unqualified_name(&name)?))
                };
                let (of_left, of_right) = (column(left.schema())?, column(right.schema())?);
                let op = if with_time && index == last { Operator::GtEq } else { Operator::Eq };
                conditions.push(Expr::BinaryExpr(BinaryExpr::new(
                    Box::new(Expr::Column(of_left)),
                    op,
                    Box::new(Expr::Column(of_right.clone())),
                )));
                shared.push(of_right);
            }
        }
        JoinConstraint::None => {}
        JoinConstraint::Natural => return plan_err!("ASOF JOIN: name the columns with ON or USING"),
    }
    let (mut on, mut matching) = (Vec::new(), None);
    for condition in conditions {
        let Some(sides) = sided(&condition, left.schema(), right.schema()) else {
            return plan_err!("{NEEDED}; this is none: {condition}");
        };
        match sides.op {
            Operator::Eq => on.push(condition),
            Operator::Gt | Operator::GtEq | Operator::Lt | Operator::LtEq if matching.is_none() => {
                matching = Some(condition);
            }
            _ => return plan_err!("{NEEDED}; this is one more: {condition}"),
        }
    }
    let Some(matching) = matching else {
        return plan_err!("{NEEDED}");
    };
    let node = Arc::new(AsOf::try_new(left, right, on, matching, outer)?);
    let plan = LogicalPlan::Extension(Extension { node });
    if shared.is_empty() {
        return Ok(plan);
    }
    let columns: Vec<Expr> =
        plan.schema().iter().map(Column::from).filter(|column| !shared.contains(column)).map(Expr::Column).collect();
    LogicalPlanBuilder::from(plan).project(columns)?.build()
}

/// Moves conditions from above the join into its inputs: those of left columns; those of left keys to the right, too; and
/// a bound of the left time that bounds the right time.
#[derive(Debug)]
pub(super) struct PushIntoAsOf;

impl OptimizerRule for PushIntoAsOf {
    fn name(&self) -> &str {
        "push_into_asof"
    }

    fn apply_order(&self) -> Option<ApplyOrder> {
        Some(ApplyOrder::TopDown)
    }

    fn rewrite(&self, plan: LogicalPlan, _: &dyn OptimizerConfig) -> Result<Transformed<LogicalPlan>> {
        let LogicalPlan::Filter(filter) = plan else {
            return Ok(Transformed::no(plan));
        };
        let join = match filter.input.as_ref() {
            LogicalPlan::Extension(extension) => extension.node.as_any().downcast_ref::<AsOf>(),
            _ => None,
        };
        let Some(join) = join else {
            return Ok(Transformed::no(LogicalPlan::Filter(filter)));
        };
        let of_left = |condition: &Expr| {
            let columns = condition.column_refs();
            let here = columns.iter().all(|column| join.left.schema().maybe_index_of_column(column).is_some());
            here && !columns.is_empty() && !condition.is_volatile() && !has_subquery(condition)
        };
        let (left, above): (Vec<Expr>, Vec<Expr>) =
            split_conjunction_owned(filter.predicate.clone()).into_iter().partition(of_left);
        if left.is_empty() {
            return Ok(Transformed::no(LogicalPlan::Filter(filter)));
        }
        let right = left.iter().map(|condition| for_right(join, condition)).collect::<Result<Vec<_>>>()?;
        let right: Vec<Expr> = right.into_iter().flatten().collect();
        let pushed = AsOf::try_new(
            filtered(join.left.clone(), left)?,
            filtered(join.right.clone(), right)?,
            join.on.clone(),
            join.matching.clone(),
            join.outer,
        )?;
        let plan = LogicalPlan::Extension(Extension { node: Arc::new(pushed) });
        Ok(Transformed::yes(filtered(plan, above)?))
    }
}

fn has_subquery(expression: &Expr) -> bool {
    let found = expression.exists(|inner| {
        Ok(matches!(
            inner,
            Expr::ScalarSubquery(_) | Expr::InSubquery(_) | Expr::Exists(_) | Expr::OuterReferenceColumn(..)
        ))
    });
    found.unwrap_or(true)
}

fn filtered(plan: LogicalPlan, conditions: Vec<Expr>) -> Result<LogicalPlan> {
    match conjunction(conditions) {
        Some(predicate) => Ok(LogicalPlan::Filter(Filter::try_new(predicate, Arc::new(plan))?)),
        None => Ok(plan),
    }
}

/// What a condition of the left says about the matching rows of the right.
fn for_right(join: &AsOf, condition: &Expr) -> Result<Option<Expr>> {
    let mut columns: HashMap<Column, Column> = HashMap::new();
    for key in join.keys()? {
        if let (Expr::Column(left), Expr::Column(right)) = (key.left, key.right) {
            columns.insert(left, right);
        }
    }
    if bounds_time(join, condition)?
        && let Sided { left: Expr::Column(left), right: Expr::Column(right), .. } = join.matching()?
    {
        columns.insert(left, right);
    }
    if !condition.column_refs().iter().all(|column| columns.contains_key(*column)) {
        return Ok(None);
    }
    let renamed = condition.clone().transform(|inner| {
        Ok(match inner {
            Expr::Column(column) => match columns.get(&column) {
                Some(right) => Transformed::yes(Expr::Column(right.clone())),
                None => Transformed::no(Expr::Column(column)),
            },
            inner => Transformed::no(inner),
        })
    })?;
    Ok(Some(renamed.data))
}

/// Whether this bounds the left time on the side that the right time lies on: `a.ts < c` where `a.ts >= b.ts`.
fn bounds_time(join: &AsOf, condition: &Expr) -> Result<bool> {
    let Expr::BinaryExpr(BinaryExpr { left, op, right }) = condition else {
        return Ok(false);
    };
    let time = join.matching()?;
    let op = match (left.as_ref(), right.as_ref()) {
        (Expr::Column(_), Expr::Literal(..)) if **left == time.left => *op,
        (Expr::Literal(..), Expr::Column(_)) if **right == time.left => match op.swap() {
            Some(op) => op,
            None => return Ok(false),
        },
        _ => return Ok(false),
    };
    Ok(match time.op {
        Operator::Gt | Operator::GtEq => matches!(op, Operator::Lt | Operator::LtEq),
        _ => matches!(op, Operator::Gt | Operator::GtEq),
    })
}
