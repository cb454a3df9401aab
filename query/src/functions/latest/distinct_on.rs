//! `SELECT DISTINCT ON (device) … FROM stream ORDER BY device, ts DESC` is answered from what `latest` keeps.
//!
//! `latest` has one row per device, one with its greatest `ts`: the question over it has an answer that the question over
//! all rows may have, too. Conditions may stand between the two if they let through the newest row of a device whenever
//! they let through any: those on `device` alone, and `ts` being at or after something. Where the rows are not kept, because
//! the reader has a scope or they do not fit, the stream itself is asked.

use std::sync::Arc;

use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::common::{Column, Result};
use datafusion::datasource::{provider_as_source, source_as_provider};
use datafusion::logical_expr::utils::split_conjunction;
use datafusion::logical_expr::{Distinct, DistinctOn, Expr, Filter, LogicalPlan, Operator, SubqueryAlias};
use wire::schema::{DEVICE, TS};

use super::cache::LatestCache;
use crate::fused_table::LiveTable;

/// The plan, with such questions asked of `latest`.
pub(crate) fn rewrite(plan: LogicalPlan, cache: &Arc<LatestCache>) -> Result<LogicalPlan> {
    let rewritten = plan.transform_down_with_subqueries(|node| match node {
        LogicalPlan::Distinct(Distinct::On(distinct)) if asks_for_newest(&distinct) => {
            Ok(match over_latest(&distinct.input, cache) {
                Some(input) => {
                    let distinct = DistinctOn { input: Arc::new(input), ..distinct };
                    Transformed::yes(LogicalPlan::Distinct(Distinct::On(distinct)))
                }
                None => Transformed::no(LogicalPlan::Distinct(Distinct::On(distinct))),
            })
        }
        node => Ok(Transformed::no(node)),
    });
    Ok(rewritten?.data)
}

fn asks_for_newest(distinct: &DistinctOn) -> bool {
    let [on] = &distinct.on_expr[..] else { return false };
    let Some([device, ts]) = distinct.sort_expr.as_deref() else { return false };
    is(on, DEVICE) && is(&device.expr, DEVICE) && is(&ts.expr, TS) && !ts.asc
}

fn is(expression: &Expr, column: &str) -> bool {
    matches!(expression, Expr::Column(Column { name, .. }) if name == column)
}

/// The same rows out of `latest`; None when something else is asked.
fn over_latest(plan: &LogicalPlan, cache: &Arc<LatestCache>) -> Option<LogicalPlan> {
    match plan {
        LogicalPlan::TableScan(scan) if scan.filters.is_empty() && scan.fetch.is_none() => {
            let provider = source_as_provider(&scan.source).ok()?;
            let latest = provider.downcast_ref::<LiveTable>()?.latest_if_kept(cache)?;
            let mut scan = scan.clone();
            scan.source = provider_as_source(Arc::new(latest));
            Some(LogicalPlan::TableScan(scan))
        }
        LogicalPlan::Filter(filter) if split_conjunction(&filter.predicate).into_iter().all(spares_newest) => {
            let input = over_latest(&filter.input, cache)?;
            Filter::try_new(filter.predicate.clone(), Arc::new(input)).ok().map(LogicalPlan::Filter)
        }
        LogicalPlan::SubqueryAlias(alias) => {
            let input = over_latest(&alias.input, cache)?;
            SubqueryAlias::try_new(Arc::new(input), alias.alias.clone()).ok().map(LogicalPlan::SubqueryAlias)
        }
        _ => None,
    }
}

/// Whether a condition that lets through any row of a device lets through its newest.
fn spares_newest(condition: &Expr) -> bool {
    // A subquery may ask for any column of the row.
    let subquery = |node: &Expr| {
        matches!(node, Expr::InSubquery(_) | Expr::Exists(_) | Expr::ScalarSubquery(_) | Expr::SetComparison(_))
    };
    if condition.is_volatile() || condition.exists(|node| Ok(subquery(node))).unwrap_or(true) {
        return false;
    }
    if condition.column_refs().iter().all(|column| column.name == DEVICE) {
        return true;
    }
    let Expr::BinaryExpr(compared) = condition else { return false };
    let constant = |expression: &Expr| !expression.any_column_refs();
    match compared.op {
        Operator::Gt | Operator::GtEq => is(&compared.left, TS) && constant(&compared.right),
        Operator::Lt | Operator::LtEq => constant(&compared.left) && is(&compared.right, TS),
        _ => false,
    }
}
