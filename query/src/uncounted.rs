//! What would take memory that no limit of DataFusion's counts, and is refused: an allocation that fails ends the process.
//!
//! A window function that collects its frame (`array_agg(v) OVER ()`) holds a copy of the frame for every row. The
//! functions that make a long text or list from a short call (`repeat('x', 1000000000)`) may be called with a constant
//! of at most [`LENGTH_MAX`].

use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::common::{Result, ScalarValue, plan_err};
use datafusion::logical_expr::{Expr, LogicalPlan};

/// Window functions that give a list of their frame, for each row.
const COLLECT: [&str; 6] = ["array_agg", "string_agg", "nth_value_agg", "json_agg", "array_concat_agg", "histogram"];
/// Functions that make something as long as their second argument says.
const STRETCH: [&str; 8] =
    ["repeat", "lpad", "rpad", "array_repeat", "list_repeat", "array_resize", "list_resize", "space"];
/// Functions that list numbers from the first argument to the second.
const COUNT: [&str; 2] = ["range", "generate_series"];
/// Characters or elements of one value that is made so.
const LENGTH_MAX: i64 = 1_000_000;

/// Refuses a plan that asks for it.
pub(crate) fn check(plan: &LogicalPlan) -> Result<()> {
    plan.apply_with_subqueries(|node| {
        for expression in node.expressions() {
            expression.apply(|expr| look(expr).map(|()| TreeNodeRecursion::Continue))?;
        }
        Ok(TreeNodeRecursion::Continue)
    })?;
    Ok(())
}

fn look(expr: &Expr) -> Result<()> {
    match expr {
        Expr::WindowFunction(window) if COLLECT.contains(&window.fun.name()) => {
            plan_err!("{} is not offered as a window function: aggregate with GROUP BY", window.fun.name())
        }
        Expr::ScalarFunction(call) if STRETCH.contains(&call.name()) => within(call.name(), length(call.args.get(1))),
        Expr::ScalarFunction(call) if COUNT.contains(&call.name()) => {
            let (first, second) = (call.args.first(), call.args.get(1));
            let span = match (length(first), length(second)) {
                (Some(first), Some(second)) => Some(second.saturating_sub(first).saturating_abs()),
                (only, None) if call.args.len() == 1 => only,
                _ => None,
            };
            within(call.name(), span)
        }
        _ => Ok(()),
    }
}

fn length(argument: Option<&Expr>) -> Option<i64> {
    let mut argument = argument?;
    while let Expr::Cast(cast) = argument {
        argument = cast.expr.as_ref();
    }
    let value = match argument {
        Expr::Literal(value, _) => value.clone(),
        Expr::Negative(inner) => match inner.as_ref() {
            Expr::Literal(value, _) => value.arithmetic_negate().ok()?,
            _ => return None,
        },
        _ => return None,
    };
    match value.cast_to(&arrow_schema::DataType::Int64) {
        Ok(ScalarValue::Int64(value)) => value,
        _ => None,
    }
}

/// A length that is not a constant is not known before it is made.
fn within(name: &str, length: Option<i64>) -> Result<()> {
    match length {
        Some(length) if length <= LENGTH_MAX => Ok(()),
        Some(length) => plan_err!("{name} of {length} is more than {LENGTH_MAX}"),
        None => plan_err!("{name} needs a constant length here, of at most {LENGTH_MAX}"),
    }
}
