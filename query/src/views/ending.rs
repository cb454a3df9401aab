//! Whose sessions end in some slots: so that a view by sessions is asked of these keys alone, and not at all when nothing ends.
//!
//! What ends in a slot is told by the rows of a long time before it ([`Silence::reach_us`]); that something ends there, and of
//! which key, by those of a gap before it: a row without one behind it. But for cuts, which end what goes on: where there may
//! be one, and of stretches that are as long as what is read anyway, everybody is asked.
//!
//! [`Silence::reach_us`]: crate::functions::session::Silence::reach_us

use std::sync::Arc;

use arrow_array::RecordBatch;
use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::common::{Column, Result, ScalarValue};
use datafusion::logical_expr::{Expr, Extension, LogicalPlan, LogicalPlanBuilder, UserDefinedLogicalNodeCore};
use datafusion::prelude::lit;

use super::intervals::Intervals;
use super::shape::Kept;
use super::view::{View, among};
use crate::functions::session::Sessions;

/// Keys that are asked by their names.
pub(crate) const KEYS_MAX: usize = 200;
/// Stretches shorter than this part of the reach are worth a question before.
const SHORT: i64 = 8;

/// The question for the keys of sessions that end in these slots, one more than [`KEYS_MAX`] at most; None when everybody is
/// to be asked.
pub(crate) fn question(view: &View, slots: &Intervals) -> Result<Option<LogicalPlan>> {
    let Kept::Windows { grid, .. } = &view.shape.kept else { return Ok(None) };
    let Some(silence) = grid.silence() else { return Ok(None) };
    let length = slots.iter().map(|(from, to)| to.saturating_sub(from)).fold(0, i64::saturating_add);
    let mut rows = Intervals::default();
    slots.iter().for_each(|(from, to)| rows.insert(from.saturating_sub(silence.gap_us), to));
    let is_cut = rows.iter().any(|(from, to)| silence.may_cut(from, to));
    let mut all = Vec::new();
    view.plan.apply(|node| {
        all.extend(sessions(node).cloned());
        Ok(TreeNodeRecursion::Continue)
    })?;
    let [node] = &all[..] else { return Ok(None) };
    if length > silence.reach_us() / SHORT || is_cut {
        return Ok(None);
    }
    let (qualifier, end) = node.schema().qualified_field(node.end());
    let end = Expr::Column(Column::from((qualifier, end)));
    let Some(ends) = among(&end, slots) else { return Ok(None) };
    let node = LogicalPlan::Extension(Extension { node: Arc::new(node.clone()) });
    let keys = all[0].keys.clone();
    let asked = LogicalPlanBuilder::from(view.narrowed(node, &rows)?).filter(ends)?.project(keys)?.distinct()?;
    asked.limit(0, Some(KEYS_MAX + 1))?.build().map(Some)
}

/// The plan of a view over the rows of these keys alone, of which there is one at least.
pub(crate) fn of_keys(plan: LogicalPlan, keys: &[RecordBatch]) -> Result<LogicalPlan> {
    let of_keys = plan.transform_up(|node| {
        let Some(known) = sessions(&node) else { return Ok(Transformed::no(node)) };
        let mut input = LogicalPlanBuilder::from(known.input.clone());
        for (index, key) in known.keys.iter().enumerate() {
            let (mut values, mut is_null) = (Vec::new(), false);
            for batch in keys {
                for row in 0..batch.num_rows() {
                    match ScalarValue::try_from_array(batch.column(index), row)? {
                        value if value.is_null() => is_null = true,
                        value => values.push(lit(value)),
                    }
                }
            }
            let named = (!values.is_empty()).then(|| key.clone().in_list(values, false));
            let null = is_null.then(|| key.clone().is_null());
            if let Some(condition) = named.into_iter().chain(null).reduce(Expr::or) {
                input = input.filter(condition)?;
            }
        }
        let node = known.with_exprs_and_inputs(known.expressions(), vec![input.build()?])?;
        Ok(Transformed::yes(LogicalPlan::Extension(Extension { node: Arc::new(node) })))
    })?;
    Ok(of_keys.data)
}

fn sessions(node: &LogicalPlan) -> Option<&Sessions> {
    match node {
        LogicalPlan::Extension(extension) => extension.node.as_any().downcast_ref::<Sessions>(),
        _ => None,
    }
}
