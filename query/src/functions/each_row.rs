//! A condition that has another answer for each row is asked of the rows that it stands above, and not of those below a HOP or a
//! SESSION: without some of its rows a session would be another. DataFusion moves a condition down when it names no column
//! that the node forbids, whatever functions are in it; so what is volatile becomes a column first.

use std::sync::Arc;

use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::common::{Column, Result};
use datafusion::logical_expr::utils::{conjunction, split_conjunction_owned};
use datafusion::logical_expr::{Expr, Filter, LogicalPlan, Projection};
use datafusion::optimizer::{ApplyOrder, OptimizerConfig, OptimizerRule};

use super::hop::Hop;
use super::session::Sessions;

/// The column that such conditions become.
const HOLDS: &str = "__weir_holds";

/// See the module. It stands before DataFusion's own rules.
#[derive(Debug)]
pub(super) struct EachRow;

impl OptimizerRule for EachRow {
    fn name(&self) -> &str {
        "each_row"
    }

    fn apply_order(&self) -> Option<ApplyOrder> {
        Some(ApplyOrder::BottomUp)
    }

    fn rewrite(&self, plan: LogicalPlan, _: &dyn OptimizerConfig) -> Result<Transformed<LogicalPlan>> {
        let LogicalPlan::Filter(filter) = plan else { return Ok(Transformed::no(plan)) };
        if !filter.predicate.is_volatile() || !has_windows(&filter.input)? {
            return Ok(Transformed::no(LogicalPlan::Filter(filter)));
        }
        let parts = split_conjunction_owned(filter.predicate).into_iter();
        let (volatile, others): (Vec<_>, Vec<_>) = parts.partition(Expr::is_volatile);
        let below = match conjunction(others) {
            Some(others) => Arc::new(LogicalPlan::Filter(Filter::try_new(others, filter.input)?)),
            None => filter.input,
        };
        let columns: Vec<Expr> = below.schema().iter().map(|field| Expr::Column(Column::from(field))).collect();
        let holds = conjunction(volatile).map(|holds| holds.alias(HOLDS));
        let with = Projection::try_new(columns.iter().cloned().chain(holds).collect(), below)?;
        let holds = Expr::Column(Column::from_name(HOLDS));
        let kept = Filter::try_new(holds, Arc::new(LogicalPlan::Projection(with)))?;
        let plan = Projection::try_new(columns, Arc::new(LogicalPlan::Filter(kept)))?;
        Ok(Transformed::yes(LogicalPlan::Projection(plan)))
    }
}

/// Whether there is a HOP or a SESSION below.
fn has_windows(plan: &LogicalPlan) -> Result<bool> {
    plan.exists(|node| {
        let LogicalPlan::Extension(extension) = node else { return Ok(false) };
        let node = extension.node.as_any();
        Ok(node.is::<Hop>() || node.is::<Sessions>())
    })
}
