//! `time_bucket_gapfill(width, ts [, zone] [, start, finish])`: buckets that had no rows come, too, when it stands in GROUP
//! BY; and `locf(…)` and `interpolate(…)`, which fill what is missing.
//!
//! Every series, which is one value of the other keys of GROUP BY, gets a row for each bucket from the one that holds
//! `start` to the last one that begins before `finish`. Both come from the arguments, or from comparisons of `ts` with
//! constants in WHERE. A row that was made has NULL in all columns but the keys. A series that has no row at all does not
//! come, except where there are no other keys. Groups outside the range stay as they are. HAVING is asked before: a group
//! that it leaves out is a gap.
//!
//! - `locf(x)`: the last x of the series that was not NULL.
//! - `interpolate(x)`: float64, on the straight line between the x before and after, by the times at which their buckets
//!   begin; NULL before the first and after the last.
//!
//! Both stand in the SELECT list of the query that groups, around aggregates: `locf(avg(speed))`. In HAVING they are refused.
//!
//! The rule [`PlanGapFill`] comes first of all optimizer rules, so that WHERE still stands where it was written. It makes
//! `time_bucket` of the function and puts a [`GapFill`] node on the aggregate; [`exec`] carries it out. The rows made by
//! one node are limited ([`PlanGapFill`]): the statement ends with an error rather than fill the memory or the line.

pub(super) mod exec;
mod range;

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use arrow::datatypes::{DataType, Field};
use chrono_tz::Tz;
use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::common::{Column, DFSchema, DFSchemaRef, Result, ScalarValue, exec_err, plan_err};
use datafusion::logical_expr::expr::ScalarFunction;
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::{
    Aggregate, ColumnarValue, Expr, ExprSchemable, Extension, Filter, LogicalPlan, Projection, ScalarFunctionArgs,
    ScalarUDF, ScalarUDFImpl, Signature, UserDefinedLogicalNodeCore, Volatility,
};
use datafusion::optimizer::{OptimizerConfig, OptimizerRule};

use self::range::{Constants, bounds};
use super::asof::unaliased;
use super::time_bucket::{TimeBucket, buckets, coerce, instant};

/// How a column is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd)]
pub(super) enum Method {
    Locf,
    Interpolate,
}

/// A function that only the rule understands.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Placeholder {
    /// None for `time_bucket_gapfill`.
    fill: Option<Method>,
    signature: Signature,
}

/// `time_bucket_gapfill`, `locf` and `interpolate`.
pub(super) fn functions() -> [ScalarUDF; 3] {
    // Not immutable: none is computed while planning.
    [None, Some(Method::Locf), Some(Method::Interpolate)]
        .map(|fill| ScalarUDF::from(Placeholder { fill, signature: Signature::user_defined(Volatility::Stable) }))
}

impl ScalarUDFImpl for Placeholder {
    fn name(&self) -> &str {
        match self.fill {
            None => "time_bucket_gapfill",
            Some(Method::Locf) => "locf",
            Some(Method::Interpolate) => "interpolate",
        }
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, arguments: &[DataType]) -> Result<Vec<DataType>> {
        match (self.fill, arguments) {
            (None, [_, _, ..]) if arguments.len() <= 5 => coerce(arguments),
            (None, _) => plan_err!("time_bucket_gapfill takes a width, a timestamp, and a start and a finish"),
            (Some(Method::Locf), [kind]) => Ok(vec![kind.clone()]),
            (Some(Method::Interpolate), [kind]) if kind.is_numeric() || kind.is_null() => Ok(vec![DataType::Float64]),
            (Some(Method::Interpolate), [kind]) => plan_err!("interpolate: {kind} is no number"),
            _ => plan_err!("{} takes one argument, an aggregate: {}(avg(speed))", self.name(), self.name()),
        }
    }

    fn return_type(&self, arguments: &[DataType]) -> Result<DataType> {
        Ok(arguments[usize::from(self.fill.is_none())].clone())
    }

    fn invoke_with_args(&self, _: ScalarFunctionArgs) -> Result<ColumnarValue> {
        match self.fill {
            None => {
                exec_err!("time_bucket_gapfill stands in GROUP BY, and alone there: GROUP BY time_bucket_gapfill(…)")
            }
            Some(_) => exec_err!(
                "{} stands in the SELECT list of a query that groups by time_bucket_gapfill, around an aggregate",
                self.name()
            ),
        }
    }
}

fn placeholder(expression: &Expr) -> Option<(Option<Method>, &ScalarFunction)> {
    match expression {
        Expr::ScalarFunction(function) => Some((function.func.inner().downcast_ref::<Placeholder>()?.fill, function)),
        _ => None,
    }
}

fn is_gapfill(expression: &Expr) -> bool {
    matches!(placeholder(expression), Some((None, _)))
}

/// A column that is filled.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd)]
pub(super) struct Fill {
    pub(super) method: Method,
    /// Over the columns of the aggregate.
    pub(super) of: Expr,
    /// Of the column that it becomes.
    pub(super) name: String,
}

/// An aggregate whose missing buckets come, too: the columns of its input, then those that are filled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct GapFill {
    input: LogicalPlan,
    /// The column of buckets.
    pub(super) time: Expr,
    /// The columns that make a series.
    pub(super) keys: Vec<Expr>,
    pub(super) fills: Vec<Fill>,
    /// Where the buckets of the range begin, microseconds, ascending.
    pub(super) range: Arc<[i64]>,
    pub(super) rows_max: usize,
    schema: DFSchemaRef,
}

impl GapFill {
    fn try_new(
        input: LogicalPlan,
        time: Expr,
        keys: Vec<Expr>,
        fills: Vec<Fill>,
        range: Arc<[i64]>,
        rows_max: usize,
    ) -> Result<Self> {
        let of_input = input.schema();
        let mut fields = Vec::new();
        for (qualifier, field) in of_input.iter() {
            let column = Expr::Column(Column::new(qualifier.cloned(), field.name()));
            let kept = column == time || keys.contains(&column);
            let nullable = field.is_nullable() || !kept;
            fields.push((qualifier.cloned(), Arc::new(field.as_ref().clone().with_nullable(nullable))));
        }
        for fill in &fills {
            fields.push((None, Arc::new(Field::new(&fill.name, fill.of.get_type(of_input)?, true))));
        }
        let schema = Arc::new(DFSchema::new_with_metadata(fields, of_input.metadata().clone())?);
        Ok(Self { input, time, keys, fills, range, rows_max, schema })
    }

    fn with(&self, input: LogicalPlan, fills: Vec<Fill>) -> Result<Self> {
        Self::try_new(input, self.time.clone(), self.keys.clone(), fills, Arc::clone(&self.range), self.rows_max)
    }

    fn into_plan(self) -> LogicalPlan {
        LogicalPlan::Extension(Extension { node: Arc::new(self) })
    }
}

impl Hash for GapFill {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (&self.input, &self.time, &self.keys, &self.fills, self.range.len()).hash(state);
    }
}

impl PartialOrd for GapFill {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        if self == other {
            return Some(Ordering::Equal);
        }
        match (&self.input, &self.fills, self.range.first()).partial_cmp(&(
            &other.input,
            &other.fills,
            other.range.first(),
        )) {
            Some(Ordering::Equal) => None,
            ordering => ordering,
        }
    }
}

impl UserDefinedLogicalNodeCore for GapFill {
    fn name(&self) -> &str {
        "GapFill"
    }

    fn inputs(&self) -> Vec<&LogicalPlan> {
        vec![&self.input]
    }

    fn schema(&self) -> &DFSchemaRef {
        &self.schema
    }

    fn expressions(&self) -> Vec<Expr> {
        let fills = self.fills.iter().map(|fill| fill.of.clone());
        std::iter::once(self.time.clone()).chain(self.keys.iter().cloned()).chain(fills).collect()
    }

    fn prevent_predicate_push_down_columns(&self) -> std::collections::HashSet<String> {
        // A condition on the keys takes or leaves whole series.
        let keys: Vec<&str> =
            self.keys.iter().filter_map(|key| key.try_as_col()).map(|key| key.name.as_str()).collect();
        let names = self.schema.fields().iter().map(|field| field.name());
        names.filter(|name| !keys.contains(&name.as_str())).cloned().collect()
    }

    fn fmt_for_explain(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GapFill: time=[{}], buckets={}", self.time, self.range.len())?;
        self.fills.iter().try_for_each(|fill| write!(f, ", {:?}({})", fill.method, fill.of))
    }

    fn with_exprs_and_inputs(&self, expressions: Vec<Expr>, mut inputs: Vec<LogicalPlan>) -> Result<Self> {
        let mut expressions = expressions.into_iter();
        let (Some(time), Some(input)) = (expressions.next(), inputs.pop()) else {
            return plan_err!("a gap fill has a column of buckets and an input");
        };
        let keys: Vec<Expr> = expressions.by_ref().take(self.keys.len()).collect();
        let fills = self.fills.iter().zip(expressions).map(|(fill, of)| Fill { of, ..fill.clone() }).collect();
        Self::try_new(input, time, keys, fills, Arc::clone(&self.range), self.rows_max)
    }

    fn necessary_children_exprs(&self, output: &[usize]) -> Option<Vec<Vec<usize>>> {
        // What the node itself needs is added by the caller, from `expressions`.
        let columns = self.input.schema().fields().len();
        Some(vec![output.iter().copied().filter(|column| *column < columns).collect()])
    }
}

/// Turns the functions into [`GapFill`] nodes.
#[derive(Debug)]
pub(crate) struct PlanGapFill {
    /// Rows that one node may make, and buckets of one series.
    pub(crate) rows_max: usize,
}

impl OptimizerRule for PlanGapFill {
    fn name(&self) -> &str {
        "plan_gap_fill"
    }

    fn rewrite(&self, plan: LogicalPlan, config: &dyn OptimizerConfig) -> Result<Transformed<LogicalPlan>> {
        let mut found = false;
        plan.apply_with_subqueries(|node| {
            if let LogicalPlan::Aggregate(aggregate) = node {
                for key in &aggregate.group_expr {
                    found |= key.exists(|inner| Ok(is_gapfill(inner)))?;
                }
            }
            Ok(if found { TreeNodeRecursion::Stop } else { TreeNodeRecursion::Continue })
        })?;
        if !found {
            return Ok(Transformed::no(plan));
        }
        plan.transform_up_with_subqueries(|node| {
            let rewritten = match node {
                LogicalPlan::Aggregate(aggregate) => self.aggregate(aggregate, config)?,
                // Nothing else than HAVING stands here yet.
                LogicalPlan::Filter(filter) => match gap_fill(&filter.input) {
                    Some(gaps) => {
                        let having = Filter::try_new(filter.predicate, Arc::new(gaps.input.clone()))?;
                        gaps.with(LogicalPlan::Filter(having), Vec::new())?.into_plan()
                    }
                    None => LogicalPlan::Filter(filter).recompute_schema()?,
                },
                LogicalPlan::Projection(projection) => filled(projection)?,
                // A gap may be NULL where the aggregate was not.
                node => node.recompute_schema()?,
            };
            Ok(Transformed::yes(rewritten))
        })
    }
}

fn gap_fill(plan: &LogicalPlan) -> Option<&GapFill> {
    match plan {
        LogicalPlan::Extension(extension) => extension.node.as_any().downcast_ref::<GapFill>(),
        _ => None,
    }
}

/// Takes the fills out of a SELECT list and puts them into the node below, if there is one.
fn filled(projection: Projection) -> Result<LogicalPlan> {
    let mut fills: Vec<Fill> = Vec::new();
    let names = NamePreserver::new_for_projection();
    let take = |fills: &mut Vec<Fill>, expression: Expr| {
        let name = names.save(&expression);
        let rewritten = expression.transform_down(|inner| {
            let Some((Some(method), function)) = placeholder(&inner) else {
                return Ok(Transformed::no(inner));
            };
            let of = function.args[0].clone();
            let known = fills.iter().find(|fill| fill.method == method && fill.of == of).map(|fill| fill.name.clone());
            let column = known.unwrap_or_else(|| {
                let name = format!("__filled_{}", fills.len());
                fills.push(Fill { method, of, name: name.clone() });
                name
            });
            Ok(Transformed::yes(Expr::Column(Column::new_unqualified(column))))
        })?;
        Ok(name.restore(rewritten.data))
    };
    let expressions =
        projection.expr.iter().cloned().map(|expression| take(&mut fills, expression)).collect::<Result<Vec<_>>>()?;
    if fills.is_empty() {
        return LogicalPlan::Projection(projection).recompute_schema();
    }
    let Some(input) = with_fills(&projection.input, fills)? else {
        return plan_err!(
            "locf and interpolate stand in the SELECT list of a query that groups by time_bucket_gapfill"
        );
    };
    Ok(LogicalPlan::Projection(Projection::try_new(expressions, Arc::new(input))?))
}

/// The plan with these fills in its gap fill, which stands on top or below window functions.
fn with_fills(plan: &LogicalPlan, fills: Vec<Fill>) -> Result<Option<LogicalPlan>> {
    if let Some(gaps) = gap_fill(plan) {
        return Ok(Some(gaps.with(gaps.input.clone(), fills)?.into_plan()));
    }
    let LogicalPlan::Window(window) = plan else {
        return Ok(None);
    };
    match with_fills(&window.input, fills)? {
        Some(input) => plan.with_new_exprs(plan.expressions(), vec![input]).map(Some),
        None => Ok(None),
    }
}

impl PlanGapFill {
    fn aggregate(&self, aggregate: Aggregate, config: &dyn OptimizerConfig) -> Result<LogicalPlan> {
        let mut at = None;
        for (index, key) in aggregate.group_expr.iter().enumerate() {
            if key.exists(|inner| Ok(is_gapfill(inner)))?
                && (at.replace(index).is_some() || !is_gapfill(unaliased(key)))
            {
                return plan_err!("time_bucket_gapfill stands once in GROUP BY, and alone: not inside an expression");
            }
        }
        let Some(at) = at else {
            return LogicalPlan::Aggregate(aggregate).recompute_schema();
        };
        let Some((_, function)) = placeholder(unaliased(&aggregate.group_expr[at])) else {
            return plan_err!("time_bucket_gapfill stands alone in GROUP BY");
        };
        let constants = Constants { schema: aggregate.input.schema(), config };
        let (width, ts) = (constants.fold(&function.args[0])?, &function.args[1]);
        let kind = ts.get_type(aggregate.input.schema())?;
        let (mut zone, mut ends) = (None, Vec::new());
        for argument in &function.args[2..] {
            match constants.fold(argument)? {
                Some(ScalarValue::Utf8(Some(text))) if text.parse::<Tz>().is_ok() => {
                    zone = Some(ScalarValue::Utf8(Some(text)));
                }
                Some(value) => ends.push(value),
                None => return plan_err!("time_bucket_gapfill: start and finish are constants, and not {argument}"),
            }
        }
        let Some(width) = width.filter(|width| !width.is_null()) else {
            return plan_err!("time_bucket_gapfill: the width is constant");
        };
        if ends.len() > 2 {
            return plan_err!("time_bucket_gapfill takes a width, a timestamp, a zone, a start and a finish");
        }
        let mut grid = buckets(&width, &kind, zone.as_slice())?;
        let (from_where, to_where) = bounds(&aggregate.input, ts, &constants)?;
        let end = |index: usize| match ends.get(index).filter(|end| !end.is_null()) {
            Some(end) => match instant(end) {
                Some(us) => Ok(Some(us)),
                None => plan_err!("time_bucket_gapfill: {end} is no timestamp"),
            },
            None => Ok(None),
        };
        let (from, to) = (end(0)?.or(from_where), end(1)?.or(to_where));
        let (Some(from), Some(to)) = (from, to) else {
            return plan_err!(
                "time_bucket_gapfill must know where to begin and where to end: \
                 add WHERE ts >= … AND ts < …, or a start and a finish after the timestamp"
            );
        };
        let mut range = Vec::new();
        let mut bucket = grid.start(from);
        while let Some(begins) = bucket.filter(|begins| *begins < to) {
            if range.len() == self.rows_max {
                return plan_err!(
                    "time_bucket_gapfill: the range has more than {} buckets; take a wider bucket or a shorter range",
                    self.rows_max
                );
            }
            range.push(begins);
            bucket = grid.next(begins);
        }
        let schema = Arc::clone(&aggregate.schema);
        let name = schema.field(at).name().clone();
        let mut group = aggregate.group_expr.clone();
        let arguments = [lit(&width), ts.clone()].into_iter().chain(zone.as_ref().map(lit)).collect();
        group[at] = ScalarUDF::from(TimeBucket::new()).call(arguments).alias(name);
        let keys = group.len();
        let aggregate = Aggregate::try_new(aggregate.input, group, aggregate.aggr_expr)?;
        let column = |index: usize| Expr::Column(Column::from(aggregate.schema.qualified_field(index)));
        let others = (0..keys).filter(|index| *index != at).map(column).collect();
        let time = column(at);
        let plan = LogicalPlan::Aggregate(aggregate);
        Ok(GapFill::try_new(plan, time, others, Vec::new(), range.into(), self.rows_max)?.into_plan())
    }
}

fn lit(value: &ScalarValue) -> Expr {
    Expr::Literal(value.clone(), None)
}
