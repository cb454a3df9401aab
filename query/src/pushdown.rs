//! Conditions go down a plan of operators only where names tell columns apart.
//!
//! DataFusion 55 takes a condition through an operator by the names of its columns (`FilterRemapper::try_remap`): of two
//! columns of one name, as `a.ts` and `b.ts` above a join, the first is taken for both, and rows are lost or come that
//! should not. So a plan with such an operator goes on as it is: its scans have the conditions that were pushed down
//! while the columns still had their tables' names, and what a scan does not answer for is asked above it.
//!
//! DataFusion 55 lets `max(x)` without GROUP BY leave out what has no greater `x` than was seen (`AggrDynFilter`). Of several
//! aggregates it forgets those of an expression, and those that have only seen NULL: `SELECT max(ts), max(abs(n))` looked only
//! for later rows. So only an aggregate that is alone may do it.

use std::collections::HashSet;
use std::sync::Arc;

use datafusion::common::Result;
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::TreeNode;
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_optimizer::optimizer::PhysicalOptimizer;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::aggregates::AggregateExec;

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
        if plan.exists(|operator| Ok(has_bounds_of_several(operator)))? {
            let mut config = config.clone();
            config.optimizer.enable_aggregate_dynamic_filter_pushdown = false;
            return self.0.optimize(plan, &config);
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

fn has_bounds_of_several(operator: &Arc<dyn ExecutionPlan>) -> bool {
    let aggregate = operator.downcast_ref::<AggregateExec>();
    aggregate.is_some_and(|aggregate| aggregate.group_expr().is_empty() && aggregate.aggr_expr().len() > 1)
}

fn has_namesakes(operator: &Arc<dyn ExecutionPlan>) -> bool {
    let schema = operator.schema();
    let mut names = HashSet::with_capacity(schema.fields().len());
    !schema.fields().iter().all(|field| names.insert(field.name()))
}

#[cfg(test)]
mod tests {
    use arrow::datatypes::Int64Type;
    use arrow_array::cast::AsArray;
    use arrow_array::{Array, Int64Array, RecordBatch};
    use datafusion::execution::runtime_env::RuntimeEnv;
    use datafusion::parquet::arrow::ArrowWriter;
    use datafusion::prelude::{ParquetReadOptions, SessionConfig, SessionContext};

    use super::*;

    /// Of files that are read one after the other only the last has the greatest `n`, and the first the greatest `ts`.
    #[tokio::test]
    async fn what_one_aggregate_needs_is_not_left_out_because_another_does_not() {
        let directory = std::env::temp_dir().join(format!("weir-pushdown-{:032x}", rand::random::<u128>()));
        std::fs::create_dir_all(&directory).unwrap();
        for index in 0..40_i64 {
            let (ts, n) = (Int64Array::from(vec![1_000 - index]), Int64Array::from(vec![(index == 39).then_some(-7)]));
            let rows = RecordBatch::try_from_iter([("ts", Arc::new(ts) as _), ("n", Arc::new(n) as _)]).unwrap();
            let file = std::fs::File::create(directory.join(format!("{index:02}.parquet"))).unwrap();
            let mut writer = ArrowWriter::try_new(file, rows.schema(), None).unwrap();
            writer.write(&rows).unwrap();
            writer.close().unwrap();
        }
        // Statistics would answer without a look.
        let config = SessionConfig::new().with_target_partitions(2).with_collect_statistics(false);
        let state = crate::functions::state(config, Arc::new(RuntimeEnv::default()), 1);
        let session = SessionContext::new_with_state(state);
        session.register_parquet("t", directory.to_str().unwrap(), ParquetReadOptions::default()).await.unwrap();
        for (sql, expected) in [
            ("SELECT max(ts), max(n) FROM t", [1_000, -7]),
            ("SELECT max(ts), max(abs(n)) FROM t", [1_000, 7]),
            ("SELECT max(ts), min(n + 1) FROM t", [1_000, -6]),
            ("SELECT max(ts), max(n) FILTER (WHERE ts < 990) FROM t", [1_000, -7]),
            ("SELECT min(ts), max(ts) FROM t", [961, 1_000]),
        ] {
            let rows = session.sql(sql).await.unwrap().collect().await.unwrap();
            let found = rows[0].columns().iter().map(|column| {
                let column = column.as_primitive::<Int64Type>();
                column.is_valid(0).then(|| column.value(0))
            });
            assert_eq!(found.collect::<Vec<_>>(), expected.map(Some), "{sql}");
        }
        let rows = session.sql("EXPLAIN SELECT max(ts) FROM t").await.unwrap().collect().await.unwrap();
        let plan = arrow::util::pretty::pretty_format_batches(&rows).unwrap().to_string();
        assert!(plan.contains("DynamicFilter"), "one that is alone does: {plan}");
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
