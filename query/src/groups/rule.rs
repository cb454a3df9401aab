//! Where rows are grouped by one text.

use std::sync::Arc;

use datafusion::common::Result;
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::datasource::source::DataSourceExec;
use datafusion::physical_expr::expressions::Column;
use datafusion::physical_expr::utils::collect_columns;
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::aggregates::AggregateExec;
use datafusion::physical_plan::projection::{ProjectionExec, ProjectionExpr};
use datafusion::physical_plan::union::UnionExec;

use super::GroupsExec;
use crate::cold;
use crate::fused_table::told::ToldExec;

/// See the module.
#[derive(Debug)]
pub(crate) struct ByText;

impl PhysicalOptimizerRule for ByText {
    fn optimize(&self, plan: Arc<dyn ExecutionPlan>, _: &ConfigOptions) -> Result<Arc<dyn ExecutionPlan>> {
        let grouped = plan.transform_up(|node| {
            let groups = node.downcast_ref::<AggregateExec>().map(GroupsExec::of).transpose()?.flatten();
            Ok(match groups {
                Some(groups) => Transformed::yes(over_halves(&groups)?),
                None => Transformed::no(node),
            })
        });
        grouped.data()
    }

    fn name(&self) -> &str {
        "ByText"
    }

    fn schema_check(&self) -> bool {
        true
    }
}

/// Groups of each half of a table, of which files give devices as indices.
fn over_halves(groups: &GroupsExec) -> Result<Arc<dyn ExecutionPlan>> {
    let Some(halves) = groups.input.downcast_ref::<UnionExec>() else {
        return Ok(Arc::new(groups.over(over_indices(groups, &groups.input)?)));
    };
    let halves = halves.inputs().iter().map(|half| {
        let half = groups.over(over_indices(groups, half)?);
        Ok(Arc::new(half) as Arc<dyn ExecutionPlan>)
    });
    UnionExec::try_new(halves.collect::<Result<_>>()?)
}

/// The rows with the text that is grouped by as indices, if they come from files so.
fn over_indices(groups: &GroupsExec, rows: &Arc<dyn ExecutionPlan>) -> Result<Arc<dyn ExecutionPlan>> {
    let Some(column) = groups.column() else { return Ok(Arc::clone(rows)) };
    Ok(with_indices(rows, column)?.unwrap_or_else(|| Arc::clone(rows)))
}

fn with_indices(rows: &Arc<dyn ExecutionPlan>, column: usize) -> Result<Option<Arc<dyn ExecutionPlan>>> {
    if let Some(scan) = rows.downcast_ref::<DataSourceExec>() {
        return cold::with_indices(scan, column);
    }
    if let Some(told) = rows.downcast_ref::<ToldExec>() {
        let input = with_indices(told.input(), column)?;
        return Ok(input.map(|input| Arc::new(told.over(input)) as _));
    }
    if let Some(some) = rows.downcast_ref::<ProjectionExec>() {
        let columns = some.expr();
        let Some(within) = columns[column].expr.downcast_ref::<Column>().map(Column::index) else { return Ok(None) };
        let looks = |other: &ProjectionExpr| collect_columns(&other.expr).iter().any(|other| other.index() == within);
        if columns.iter().filter(|other| looks(other)).count() > 1 {
            return Ok(None);
        }
        let Some(input) = with_indices(some.input(), within)? else { return Ok(None) };
        return Ok(Some(Arc::new(ProjectionExec::try_new(columns.to_vec(), input)?)));
    }
    Ok(None)
}
