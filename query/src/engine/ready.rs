//! A question that is planned once, down to how it is carried out, and asked many times, each time over other rows.
//!
//! Planning a question of a view takes longer than counting the rows of a window. A [`Ready`] one has gaps where its tables
//! are (`fused_table/gap`), and nothing in it that an earlier run has left. It is for one thread: what has many rows is planned
//! anew, for all of them.

use std::sync::Arc;

use datafusion::common::Result;
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode, TreeNodeRecursion};
use datafusion::execution::context::SessionState;
use datafusion::execution::{SessionStateBuilder, TaskContext};
use datafusion::logical_expr::LogicalPlan;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::prelude::SessionContext;
use wire::StreamName;

use super::{Engine, QueryError};
use crate::fused_table::gap::{self, Filling, Gap};
use crate::memory::StatementPool;

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Ready {
    plan: Arc<dyn ExecutionPlan>,
    pub(super) state: Arc<Planner>,
}

/// The session that such questions are planned in: as everybody's, for one thread, and without conditions that a plan finds
/// while it runs, which the next run would find there.
pub(super) struct Planner(SessionState);

impl std::fmt::Debug for Planner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Planner")
    }
}

impl Planner {
    pub(super) fn of(session: &SessionContext) -> Self {
        let state = session.state();
        let mut config = state.config().clone().with_target_partitions(1);
        let optimizer = &mut config.options_mut().optimizer;
        optimizer.enable_dynamic_filter_pushdown = false;
        optimizer.enable_topk_dynamic_filter_pushdown = false;
        optimizer.enable_join_dynamic_filter_pushdown = false;
        optimizer.enable_aggregate_dynamic_filter_pushdown = false;
        Self(SessionStateBuilder::new_from_existing(state).with_config(config).build())
    }

    /// With what it plans.
    pub(super) fn options(&self) -> &ConfigOptions {
        self.0.config_options()
    }

    /// Where what it has planned is carried out.
    pub(super) fn task(&self, pool: &Arc<StatementPool>) -> Arc<TaskContext> {
        super::task(&self.0, pool)
    }
}

impl Ready {
    /// The question of a view, planned. None when it reads what is no stream, or the plan hides where it does.
    ///
    /// # Errors
    /// When it cannot be planned.
    pub(crate) async fn of(engine: &Engine, name: &str, plan: LogicalPlan) -> Result<Option<Self>, QueryError> {
        let state = Arc::clone(&engine.planner);
        let planned = async move {
            let Some(opened) = gap::opened(plan)? else { return Ok(None) };
            let wanted = gap::gaps(&state.0.optimize(&opened)?)?;
            let plan = state.0.create_physical_plan(&opened).await?;
            let mut found = 0;
            plan.apply(|node| {
                found += usize::from(node.downcast_ref::<Gap>().is_some());
                Ok(TreeNodeRecursion::Continue)
            })?;
            Ok((found == wanted).then_some(Self { plan, state }))
        };
        engine.compute_for_view(name, planned).await
    }

    /// The plan, with its gaps.
    pub(super) fn plan(&self) -> &Arc<dyn ExecutionPlan> {
        &self.plan
    }

    /// The plan, over what each stream is filled with.
    pub(crate) fn over<'a>(
        &self,
        filling: impl Fn(&StreamName) -> Result<Filling<'a>>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        filled(&self.plan, &self.state, filling)
    }
}

/// A plan as it was before it ever ran, its gaps filled.
pub(super) fn filled<'a>(
    plan: &Arc<dyn ExecutionPlan>,
    state: &Planner,
    filling: impl Fn(&StreamName) -> Result<Filling<'a>>,
) -> Result<Arc<dyn ExecutionPlan>> {
    let filled = Arc::clone(plan).transform_up(|node| {
        let filled: Arc<dyn ExecutionPlan> = match node.downcast_ref::<Gap>() {
            Some(gap) => Arc::new(gap.filled(&state.0, &filling(gap.stream())?)?),
            None => node.reset_state()?,
        };
        Ok(Transformed::yes(filled))
    });
    filled.data()
}
