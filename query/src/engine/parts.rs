//! A question whose rows are computed once: what came of them by then is kept, and the answer put together from it.
//!
//! Its plan has one aggregation above the rows of one table, which rows reach one by one, through conditions and expressions
//! alone, or each as often as it has windows, through one HOP. Of some rows that gives *states* (sums and counts, where the question asks for a mean); the states of other rows
//! are merged with them, and the answer is what the plan makes of all. So an answer costs what is new, however many rows it
//! stands for. Aggregates that want their rows in an order have no states.

use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use datafusion::common::Result;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode, TreeNodeRecursion};
use datafusion::datasource::memory::MemorySourceConfig;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::aggregates::{AggregateExec, AggregateMode};
use datafusion::physical_plan::coop::CooperativeExec;
use datafusion::physical_plan::empty::EmptyExec;
use datafusion::physical_plan::execution_plan::{ChildrenPropertiesMode, ReplaceChildrenOptions};
use datafusion::physical_plan::filter::FilterExec;
use datafusion::physical_plan::projection::ProjectionExec;

use super::ready::{Ready, filled};
use crate::functions::hop::{bounded, is_hop};
use crate::fused_table::gap::{Filling, Gap};

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Parts {
    whole: Ready,
    /// From rows to states; from states to fewer; from states to what stands in the plan's place for the aggregation.
    partial: Arc<dyn ExecutionPlan>,
    merge: Arc<dyn ExecutionPlan>,
    last: Arc<dyn ExecutionPlan>,
    /// Whether rows come through a HOP. Then states are of one window.
    hops: bool,
    /// The columns that it wants of its table, event time among them.
    columns: SchemaRef,
}

impl Parts {
    /// How a question is computed in parts; None when it cannot be. `hops`: its windows are those of a HOP.
    ///
    /// # Errors
    /// When its plan cannot be changed so.
    pub(crate) fn of(whole: &Ready, hops: bool) -> Result<Option<Self>> {
        let (mut gaps, mut found, mut all_hops) = (Vec::new(), None, 0);
        whole.plan().apply(|node| {
            gaps.extend(node.downcast_ref::<Gap>().map(Gap::timed).transpose()?);
            all_hops += usize::from(is_hop(node));
            // The lowest is found last.
            if let Some(all) = node.downcast_ref::<AggregateExec>()
                && let Some(hops) = hops_of_rows(all)
            {
                found = Some((all.clone(), hops));
            }
            Ok(TreeNodeRecursion::Continue)
        })?;
        let ([columns], Some((all, its_hops))) = (&gaps[..], found) else { return Ok(None) };
        // Another one would spread states among windows that have states of their own.
        if [its_hops, all_hops] != [usize::from(hops); 2] {
            return Ok(None);
        }
        let ordered = all.aggr_expr().iter().any(|aggregate| !aggregate.order_bys().is_empty());
        if ordered || all.limit_options().is_some() || all.group_expr().has_grouping_set() {
            return Ok(None);
        }
        let staged = |mode: AggregateMode, input: Arc<dyn ExecutionPlan>| -> Result<Arc<dyn ExecutionPlan>> {
            let group = match mode {
                AggregateMode::Partial => all.group_expr().clone(),
                _ => all.group_expr().as_final(),
            };
            let (aggregates, filters) = (all.aggr_expr().to_vec(), all.filter_expr().to_vec());
            Ok(Arc::new(AggregateExec::try_new(mode, group, aggregates, filters, input, all.input_schema())?))
        };
        let partial = staged(AggregateMode::Partial, Arc::clone(all.input()))?;
        let states: Arc<dyn ExecutionPlan> = Arc::new(EmptyExec::new(partial.schema()));
        let merge = staged(AggregateMode::PartialReduce, Arc::clone(&states))?;
        let last = staged(AggregateMode::Final, states)?;
        if last.schema() != all.schema() || merge.schema() != partial.schema() {
            return Ok(None);
        }
        Ok(Some(Self { whole: whole.clone(), columns: Arc::clone(columns), partial, merge, last, hops }))
    }

    /// The columns of its table that it computes from, and event time.
    pub(crate) fn columns(&self) -> &SchemaRef {
        &self.columns
    }

    /// The states of some rows, of the window that begins there alone when a row lies in several.
    pub(crate) fn states(&self, filling: &Filling<'_>, start: i64) -> Result<Arc<dyn ExecutionPlan>> {
        let states = filled(&self.partial, &self.whole.state, |_| Ok(*filling))?;
        if self.hops { bounded(states, (start, start.saturating_add(1))) } else { Ok(states) }
    }

    /// Some states as few.
    pub(crate) fn merged(&self, states: &[RecordBatch]) -> Result<Arc<dyn ExecutionPlan>> {
        over(&self.merge, self.rows(states)?)
    }

    /// The answer that states give.
    pub(crate) fn answer(&self, states: &[RecordBatch]) -> Result<Arc<dyn ExecutionPlan>> {
        let rows = self.rows(states)?;
        let answer = Arc::clone(self.whole.plan()).transform_up(|node| {
            let is_it = node.downcast_ref::<AggregateExec>().and_then(hops_of_rows).is_some();
            let node = if is_it { over(&self.last, Arc::clone(&rows))? } else { node.reset_state()? };
            Ok(Transformed::yes(node))
        });
        answer.data()
    }

    fn rows(&self, states: &[RecordBatch]) -> Result<Arc<dyn ExecutionPlan>> {
        Ok(MemorySourceConfig::try_new_exec(&[states.to_vec()], self.partial.schema(), None)?)
    }
}

/// A plan with one input over another one.
fn over(plan: &Arc<dyn ExecutionPlan>, input: Arc<dyn ExecutionPlan>) -> Result<Arc<dyn ExecutionPlan>> {
    Arc::clone(plan).replace_children(vec![input], ReplaceChildrenOptions::new(ChildrenPropertiesMode::Recompute))
}

/// How many HOPs rows of a table come through on their way to an aggregation; None when they do not come one by one.
fn hops_of_rows(all: &AggregateExec) -> Option<usize> {
    let (mut node, mut hops) = (all.input(), 0);
    while node.is::<FilterExec>() || node.is::<ProjectionExec>() || node.is::<CooperativeExec>() || is_hop(node) {
        if node.fetch().is_some() {
            return None;
        }
        hops += usize::from(is_hop(node));
        node = node.children().first().copied()?;
    }
    let is_one = matches!(all.mode(), AggregateMode::Single | AggregateMode::SinglePartitioned);
    (is_one && node.is::<Gap>()).then_some(hops)
}
