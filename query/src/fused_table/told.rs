//! One half of a table in a plan that is explained: which it is, how many of its files are read, and, by
//! `EXPLAIN ANALYZE`, how many rows came out of it. Plans that only run do without it.

use std::fmt;
use std::sync::Arc;

use datafusion::common::Result;
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::datasource::physical_plan::FileScanConfig;
use datafusion::datasource::source::DataSourceExec;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_plan::execution_plan::ReplaceChildrenOptions;
use datafusion::physical_plan::filter_pushdown::{FilterDescription, FilterPushdownPhase};
use datafusion::physical_plan::metrics::{ExecutionPlanMetricsSet, MetricsSet};
use datafusion::physical_plan::{DisplayAs, DisplayFormatType, ExecutionPlan, PlanProperties};

use crate::cold::PagesExec;
use crate::execution::counted;

/// See the module.
#[derive(Debug)]
pub(crate) struct ToldExec {
    label: String,
    input: Arc<dyn ExecutionPlan>,
    metrics: ExecutionPlanMetricsSet,
}

impl ToldExec {
    /// The half in files: of how many the plan left which.
    pub(super) fn cold(version: u64, files: usize, input: Arc<dyn ExecutionPlan>) -> Self {
        let read = files_of(&input);
        let label =
            format!("ColdRows: version={version}, files_read={read}, files_pruned={}", files.saturating_sub(read));
        Self::new(label, input)
    }

    /// The half in memory: how many rows are read, and how many the plan left out.
    pub(super) fn hot(rows: usize, pruned: usize, input: Arc<dyn ExecutionPlan>) -> Self {
        Self::new(format!("HotRows: rows={rows}, rows_pruned={pruned}"), input)
    }

    pub(crate) fn input(&self) -> &Arc<dyn ExecutionPlan> {
        &self.input
    }

    /// The same of another plan.
    pub(crate) fn over(&self, input: Arc<dyn ExecutionPlan>) -> Self {
        Self::new(self.label.clone(), input)
    }

    fn new(label: String, input: Arc<dyn ExecutionPlan>) -> Self {
        Self { label, input, metrics: ExecutionPlanMetricsSet::new() }
    }
}

fn files_of(plan: &Arc<dyn ExecutionPlan>) -> usize {
    let scan =
        plan.downcast_ref::<DataSourceExec>().and_then(|scan| scan.data_source().downcast_ref::<FileScanConfig>());
    let own = scan.map_or(0, |scan| scan.file_groups.iter().map(|group| group.len()).sum::<usize>());
    let own = plan.downcast_ref::<PagesExec>().map_or(own, PagesExec::files);
    own + plan.children().into_iter().map(files_of).sum::<usize>()
}

impl DisplayAs for ToldExec {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.label)
    }
}

impl ExecutionPlan for ToldExec {
    fn name(&self) -> &str {
        "ToldExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        self.input.properties()
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }

    fn maintains_input_order(&self) -> Vec<bool> {
        vec![true]
    }

    fn benefits_from_input_partitioning(&self) -> Vec<bool> {
        vec![false]
    }

    fn apply_expressions(
        &self,
        _: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn replace_children(
        self: Arc<Self>,
        mut children: Vec<Arc<dyn ExecutionPlan>>,
        _: ReplaceChildrenOptions,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        Ok(Arc::new(self.over(children.swap_remove(0))))
    }

    fn with_new_children(self: Arc<Self>, mut children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        Ok(Arc::new(self.over(children.swap_remove(0))))
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        Ok(counted(self.input.execute(partition, context)?, &self.metrics, partition))
    }

    fn metrics(&self) -> Option<MetricsSet> {
        Some(self.metrics.clone_inner())
    }

    /// As if it were not there.
    fn gather_filters_for_pushdown(
        &self,
        _: FilterPushdownPhase,
        parent_filters: Vec<Arc<dyn PhysicalExpr>>,
        _: &ConfigOptions,
    ) -> Result<FilterDescription> {
        FilterDescription::from_children(parent_filters, &self.children())
    }
}
