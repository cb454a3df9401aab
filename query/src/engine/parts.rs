//! A question whose rows are computed once: what came of them by then is kept, and the answer put together from it.
//!
//! Its plan has one aggregation above the rows of one table, which rows reach one by one: through conditions and expressions,
//! joins with what does not read that table (*sides*: reference tables), or each as often as it has windows, through one HOP. Of
//! some rows that gives *states* (sums and counts, where the question asks for a mean); the states of other rows are merged with
//! them, and the answer is what the plan makes of all. So an answer costs what is new, however many rows it stands for. The rows
//! of the sides are computed once, for all that is new while they stay as they are. Aggregates that want their rows in an order
//! have no states.

use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode, TreeNodeRecursion};
use datafusion::common::{JoinType, Result, exec_err};
use datafusion::datasource::memory::MemorySourceConfig;
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_optimizer::ensure_requirements::EnsureRequirements;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::aggregates::{AggregateExec, AggregateMode};
use datafusion::physical_plan::coop::CooperativeExec;
use datafusion::physical_plan::empty::EmptyExec;
use datafusion::physical_plan::execution_plan::{ChildrenPropertiesMode, ReplaceChildrenOptions};
use datafusion::physical_plan::filter::FilterExec;
use datafusion::physical_plan::joins::{HashJoinExec, NestedLoopJoinExec};
use datafusion::physical_plan::projection::ProjectionExec;
use wire::StreamName;

use super::States;
use super::ready::{Ready, filled};
use crate::functions::hop::{bounded, is_hop};
use crate::fused_table::gap::{Filling, Gap};

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Parts {
    whole: Ready,
    /// The table whose rows come one by one.
    stream: StreamName,
    /// What they are joined with, from the aggregation down.
    sides: Vec<Arc<dyn ExecutionPlan>>,
    /// From rows to states; from states to fewer; from states to what the aggregation gives.
    partial: Arc<dyn ExecutionPlan>,
    merge: Arc<dyn ExecutionPlan>,
    last: Arc<dyn ExecutionPlan>,
    /// What the plan makes of that, which stands for it as an [`EmptyExec`].
    above: Arc<dyn ExecutionPlan>,
    /// Whether rows come through a HOP. Then states are of one window.
    hops: bool,
    /// The columns that it wants of its table, event time among them.
    columns: SchemaRef,
}

impl Parts {
    /// How a question is computed in parts, by the rows of a stream; None when it cannot be. `hops`: its windows are those of a
    /// HOP.
    ///
    /// # Errors
    /// When its plan cannot be changed so.
    pub(crate) fn of(whole: &Ready, stream: &StreamName, hops: bool) -> Result<Option<Self>> {
        let (mut gaps, mut found, mut all_hops) = (Vec::new(), None, 0);
        whole.plan().apply(|node| {
            let gap = node.downcast_ref::<Gap>().filter(|gap| gap.stream() == stream);
            gaps.extend(gap.map(Gap::timed).transpose()?);
            all_hops += usize::from(is_hop(node));
            // The lowest is found last.
            if let Some(all) = node.downcast_ref::<AggregateExec>()
                && let Some(way) = Way::of(all, stream)
            {
                found = Some((all.clone(), way));
            }
            Ok(TreeNodeRecursion::Continue)
        })?;
        let ([columns], Some((all, way))) = (&gaps[..], found) else { return Ok(None) };
        // Another one would spread states among windows that have states of their own.
        if [way.hops, all_hops] != [usize::from(hops); 2] {
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
        let Some(above) = above(whole, &all, stream)? else { return Ok(None) };
        let (whole, columns, sides) = (whole.clone(), Arc::clone(columns), way.sides);
        Ok(Some(Self { whole, stream: stream.clone(), sides, columns, partial, merge, last, above, hops }))
    }

    /// The columns of its table that it computes from, and event time.
    pub(crate) fn columns(&self) -> &SchemaRef {
        &self.columns
    }

    /// How many other sides its joins have.
    pub(crate) fn sides(&self) -> usize {
        self.sides.len()
    }

    /// The rows of a side.
    pub(crate) fn side(&self, index: usize, states: &States) -> Result<Arc<dyn ExecutionPlan>> {
        filled(&self.sides[index], &self.whole.state, |stream| of(states, stream))
    }

    /// The states of some rows joined with those of the sides, of the window that begins there alone when a row lies in several.
    pub(crate) fn states(
        &self,
        filling: &Filling<'_>,
        start: i64,
        sides: &[Vec<RecordBatch>],
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let states = self.joined(&self.partial, filling, sides)?;
        if self.hops { bounded(states, (start, start.saturating_add(1))) } else { Ok(states) }
    }

    /// A plan that rows come through one by one, over these.
    fn joined(
        &self,
        node: &Arc<dyn ExecutionPlan>,
        filling: &Filling<'_>,
        sides: &[Vec<RecordBatch>],
    ) -> Result<Arc<dyn ExecutionPlan>> {
        if node.is::<Gap>() {
            return filled(node, &self.whole.state, |_| Ok(*filling));
        }
        let (child, other) = (rows_of_join(node, &self.stream), sides.split_first());
        let inputs = match (child, other, &node.children()[..]) {
            (Some(first), Some((side, sides)), [left, right]) => {
                let (rows, other) = if first { (left, right) } else { (right, left) };
                let rows = self.joined(rows, filling, sides)?;
                let side: Arc<dyn ExecutionPlan> =
                    MemorySourceConfig::try_new_exec(std::slice::from_ref(side), other.schema(), None)?;
                if first { vec![rows, side] } else { vec![side, rows] }
            }
            (None, _, [rows]) => vec![self.joined(rows, filling, sides)?],
            _ => return exec_err!("this plan has other joins than when it was planned"),
        };
        replaced(node, inputs)
    }

    /// Some states as few.
    pub(crate) fn merged(&self, states: &[RecordBatch]) -> Result<Arc<dyn ExecutionPlan>> {
        over(&self.merge, self.rows(states)?)
    }

    /// The answer that states give. What is joined with it after the aggregation is as in `all`.
    pub(crate) fn answer(&self, states: &[RecordBatch], all: &States) -> Result<Arc<dyn ExecutionPlan>> {
        let rows = self.rows(states)?;
        let above = filled(&self.above, &self.whole.state, |stream| of(all, stream))?;
        let answer = above.transform_up(|node| {
            if !node.is::<EmptyExec>() {
                return Ok(Transformed::no(node));
            }
            over(&self.last, Arc::clone(&rows)).map(Transformed::yes)
        });
        answer.data()
    }

    fn rows(&self, states: &[RecordBatch]) -> Result<Arc<dyn ExecutionPlan>> {
        Ok(MemorySourceConfig::try_new_exec(&[states.to_vec()], self.partial.schema(), None)?)
    }
}

/// The plan above the aggregation, which is nothing that has an order; None when it has something else that is empty.
fn above(whole: &Ready, all: &AggregateExec, stream: &StreamName) -> Result<Option<Arc<dyn ExecutionPlan>>> {
    let mut empty = 0;
    let above = Arc::clone(whole.plan()).transform_up(|node| {
        empty += usize::from(node.is::<EmptyExec>());
        let is_it = node.downcast_ref::<AggregateExec>().and_then(|all| Way::of(all, stream)).is_some();
        Ok(if is_it { Transformed::yes(Arc::new(EmptyExec::new(all.schema())) as _) } else { Transformed::no(node) })
    });
    // Where rows come in an order, such as that of a table that they are joined with, a plan may do without a sort. No question of
    // a view is known to: an order within its windows begins with the window, which no table has.
    let above = EnsureRequirements::new().optimize(above.data()?, whole.state.options())?;
    Ok((empty == 0).then_some(above))
}

/// What stands for a stream in these states.
fn of<'a>(states: &'a States, stream: &StreamName) -> Result<Filling<'a>> {
    match states.get(stream) {
        Some(frozen) => Ok(Filling::State(frozen)),
        None => exec_err!("{stream} was not frozen"),
    }
}

/// A plan with one input over another one.
fn over(plan: &Arc<dyn ExecutionPlan>, input: Arc<dyn ExecutionPlan>) -> Result<Arc<dyn ExecutionPlan>> {
    replaced(plan, vec![input])
}

/// A plan over other inputs, with nothing that an earlier run has left: a join would still have the rows of the side that it reads first.
fn replaced(plan: &Arc<dyn ExecutionPlan>, inputs: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
    let options = ReplaceChildrenOptions::new(ChildrenPropertiesMode::Recompute);
    Arc::clone(plan).replace_children(inputs, options)?.reset_state()
}

/// How rows of a stream come to an aggregation one by one.
struct Way {
    hops: usize,
    /// The other sides of the joins that they come through.
    sides: Vec<Arc<dyn ExecutionPlan>>,
}

impl Way {
    /// None when they do not come so.
    fn of(all: &AggregateExec, stream: &StreamName) -> Option<Self> {
        let (mut node, mut way) = (all.input(), Self { hops: 0, sides: Vec::new() });
        let is_one = matches!(all.mode(), AggregateMode::Single | AggregateMode::SinglePartitioned);
        while is_one && node.fetch().is_none() {
            if let Some(gap) = node.downcast_ref::<Gap>() {
                return (gap.stream() == stream).then_some(way);
            }
            node = match (rows_of_join(node, stream), &node.children()[..]) {
                (Some(first), [left, right]) => {
                    way.sides.push(Arc::clone(if first { right } else { left }));
                    if first { left } else { right }
                }
                (None, [rows]) if passes(node) => {
                    way.hops += usize::from(is_hop(node));
                    rows
                }
                _ => return None,
            };
        }
        None
    }
}

/// Whether rows come through one by one.
fn passes(node: &Arc<dyn ExecutionPlan>) -> bool {
    node.is::<FilterExec>() || node.is::<ProjectionExec>() || node.is::<CooperativeExec>() || is_hop(node)
}

/// Of a join that each row of a stream comes through by itself: whether these rows are its first input. A side that is kept
/// though nothing of the stream meets it would have to know all of them.
fn rows_of_join(node: &Arc<dyn ExecutionPlan>, stream: &StreamName) -> Option<bool> {
    let kind = match (node.downcast_ref::<HashJoinExec>(), node.downcast_ref::<NestedLoopJoinExec>()) {
        (Some(join), _) => join.join_type(),
        (_, Some(join)) => join.join_type(),
        _ => return None,
    };
    let [left, right] = node.children()[..] else { return None };
    match (reads(left, stream), reads(right, stream), kind) {
        (true, false, JoinType::Inner | JoinType::Left) => Some(true),
        (false, true, JoinType::Inner | JoinType::Right) => Some(false),
        _ => None,
    }
}

fn reads(plan: &Arc<dyn ExecutionPlan>, stream: &StreamName) -> bool {
    plan.downcast_ref::<Gap>().is_some_and(|gap| gap.stream() == stream)
        || plan.children().into_iter().any(|child| reads(child, stream))
}
