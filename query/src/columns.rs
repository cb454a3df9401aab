//! The columns of an answer: their types are known before it runs, and every door can send them.
//!
//! What `->` takes out of a JSON text is of several types at once; at the root of a statement it becomes JSON text.

use std::sync::Arc;

use arrow_schema::{DataType, SchemaRef};
use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::common::{Column, Result};
use datafusion::execution::context::SessionState;
use datafusion::logical_expr::{Expr, LogicalPlan, LogicalPlanBuilder, cast};
use datafusion_functions_json::JSON_UNION_DATA_TYPE;
use datafusion_functions_json::udfs::json_union_to_text_udf;

/// The plan, with text where a column would have several types at once.
pub(crate) fn plain(plan: LogicalPlan) -> Result<LogicalPlan> {
    if plan.schema().fields().iter().all(|field| *field.data_type() != *JSON_UNION_DATA_TYPE) {
        return Ok(plan);
    }
    let columns = plan.schema().iter().map(|(table, field)| {
        let column = Expr::Column(Column::new(table.cloned(), field.name()));
        if *field.data_type() != *JSON_UNION_DATA_TYPE {
            return column;
        }
        cast(json_union_to_text_udf().call(vec![column]), DataType::Utf8).alias_qualified(table.cloned(), field.name())
    });
    let columns: Vec<Expr> = columns.collect();
    LogicalPlanBuilder::from(plan).project(columns)?.build()
}

/// The columns as they will come: a plan as it was made has, for one, the types of a UNION's first part. Where a parameter's
/// type is open, and of a statement of very many parts, as far as the plan tells.
pub(crate) fn of(state: &SessionState, plan: &LogicalPlan) -> SchemaRef {
    let columns = |plan: &LogicalPlan| Arc::new(plan.schema().as_arrow().clone());
    if parts(plan) > PARTS_MAX {
        return columns(plan);
    }
    match state.analyzer().execute_and_check(plan.clone(), state.config_options(), |_, _| {}) {
        Ok(analyzed) => columns(&analyzed),
        Err(_) => columns(plan),
    }
}

/// Types of nested parts are found again for each part around them: what has more than this many would take long.
const PARTS_MAX: usize = 1_000;

/// Operators and the parts of their expressions, counted up to one more than [`PARTS_MAX`].
fn parts(plan: &LogicalPlan) -> usize {
    let mut parts = 0;
    let mut count = || {
        parts += 1;
        if parts > PARTS_MAX { TreeNodeRecursion::Stop } else { TreeNodeRecursion::Continue }
    };
    let counted = plan.apply(|operator| {
        count();
        operator.apply_expressions(|expression| expression.apply(|_| Ok(count())))
    });
    if counted.is_err() { PARTS_MAX + 1 } else { parts }
}
