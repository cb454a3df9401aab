//! Conditions go down a plan of operators only where names tell columns apart.
//!
//! DataFusion 55 takes a condition through an operator by the names of its columns (`FilterRemapper::try_remap`): of two
//! columns of one name, as `a.ts` and `b.ts` above a join, the first is taken for both, and rows are lost or come that
//! should not. So a plan with such an operator goes on as it is: its scans have the conditions that were pushed down
//! while the columns still had their tables' names, and what a scan does not answer for is asked above it.

use std::collections::HashSet;
use std::sync::Arc;

use datafusion::common::Result;
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::TreeNode;
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_optimizer::optimizer::PhysicalOptimizer;
use datafusion::physical_plan::ExecutionPlan;

type Rule = Arc<dyn PhysicalOptimizerRule + Send + Sync>;

/// DataFusion's rules, but for plans in which two columns of an operator have one name.
pub(crate) fn rules() -> Vec<Rule> {
    let rules = PhysicalOptimizer::new().rules.into_iter();
    rules.map(|rule| if rule.name().starts_with("FilterPushdown") { Arc::new(ByName(rule)) } else { rule }).collect()
}

/// A rule that knows columns by name alone.
#[derive(Debug)]
struct ByName(Rule);

impl PhysicalOptimizerRule for ByName {
    fn optimize(&self, plan: Arc<dyn ExecutionPlan>, config: &ConfigOptions) -> Result<Arc<dyn ExecutionPlan>> {
        if plan.exists(|operator| Ok(has_namesakes(operator)))? {
            return Ok(plan);
        }
        self.0.optimize(plan, config)
    }

    fn name(&self) -> &str {
        self.0.name()
    }

    fn schema_check(&self) -> bool {
        self.0.schema_check()
    }
}

fn has_namesakes(operator: &Arc<dyn ExecutionPlan>) -> bool {
    let schema = operator.schema();
    let mut names = HashSet::with_capacity(schema.fields().len());
    !schema.fields().iter().all(|field| names.insert(field.name()))
}
