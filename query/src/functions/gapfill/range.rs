//! The range of a gap fill, as far as WHERE tells it.

use std::sync::Arc;

use arrow::datatypes::DataType;
use datafusion::common::{DFSchemaRef, Result, ScalarValue};
use datafusion::logical_expr::simplify::SimplifyContext;
use datafusion::logical_expr::utils::split_conjunction;
use datafusion::logical_expr::{Expr, LogicalPlan, Operator};
use datafusion::optimizer::OptimizerConfig;
use datafusion::optimizer::simplify_expressions::ExprSimplifier;

use crate::functions::time_bucket::instant;

/// Computes what is constant in a statement.
pub(super) struct Constants<'a> {
    pub(super) schema: &'a DFSchemaRef,
    pub(super) config: &'a dyn OptimizerConfig,
}

impl Constants<'_> {
    /// The value of an expression without columns; None when it has some, or is not constant otherwise.
    pub(super) fn fold(&self, expression: &Expr) -> Result<Option<ScalarValue>> {
        if !expression.column_refs().is_empty() {
            return Ok(None);
        }
        let context = SimplifyContext::builder()
            .with_schema(Arc::clone(self.schema))
            .with_config_options(self.config.options())
            .with_query_execution_start_time(self.config.query_execution_start_time())
            .build();
        match ExprSimplifier::new(context).simplify(expression.clone())? {
            Expr::Literal(value, _) => Ok(Some(value)),
            _ => Ok(None),
        }
    }
}

/// First instant, and first one past the end, that WHERE lets through.
pub(super) fn bounds(plan: &LogicalPlan, ts: &Expr, constants: &Constants) -> Result<(Option<i64>, Option<i64>)> {
    let (mut from, mut to): (Option<i64>, Option<i64>) = (None, None);
    let mut plan = plan;
    while let LogicalPlan::Filter(filter) = plan {
        for condition in split_conjunction(&filter.predicate) {
            let comparisons: Vec<(&Expr, Operator, &Expr)> = match condition {
                Expr::BinaryExpr(compared) => vec![(&compared.left, compared.op, &compared.right)],
                Expr::Between(between) if !between.negated => {
                    vec![(&between.expr, Operator::GtEq, &between.low), (&between.expr, Operator::LtEq, &between.high)]
                }
                _ => Vec::new(),
            };
            for (left, op, right) in comparisons {
                let (op, constant) = match (uncast(left) == uncast(ts), uncast(right) == uncast(ts)) {
                    (true, false) => (op, right),
                    (false, true) => match op.swap() {
                        Some(op) => (op, left),
                        None => continue,
                    },
                    _ => continue,
                };
                let Some(us) = constants.fold(constant)?.and_then(|value| instant(&value)) else {
                    continue;
                };
                let after = us.saturating_add(1);
                let later = |us: i64| from.map_or(us, |from| from.max(us));
                let earlier = |us: i64| to.map_or(us, |to| to.min(us));
                match op {
                    Operator::GtEq => from = Some(later(us)),
                    Operator::Gt => from = Some(later(after)),
                    Operator::Lt => to = Some(earlier(us)),
                    Operator::LtEq => to = Some(earlier(after)),
                    Operator::Eq => (from, to) = (Some(later(us)), Some(earlier(after))),
                    _ => {}
                }
            }
        }
        plan = &filter.input;
    }
    Ok((from, to))
}

fn uncast(mut expression: &Expr) -> &Expr {
    loop {
        expression = match expression {
            Expr::Alias(alias) => &alias.expr,
            Expr::Cast(cast) if matches!(cast.field.data_type(), DataType::Timestamp(..)) => &cast.expr,
            expression => return expression,
        };
    }
}
