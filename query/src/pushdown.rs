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
//!
//! The first rows of a table in an order let its scan leave out what comes behind them. Of groups nothing can be left out so:
//! none of them comes before all rows were seen, and until then each row would be compared for nothing.

use std::collections::HashSet;
use std::sync::Arc;

use datafusion::common::Result;
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::TreeNode;
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_optimizer::optimizer::PhysicalOptimizer;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::aggregates::AggregateExec;
use datafusion::physical_plan::sorts::sort::SortExec;

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
        let mut config = config.clone();
        if plan.exists(|operator| Ok(has_bounds_of_several(operator)))? {
            config.optimizer.enable_aggregate_dynamic_filter_pushdown = false;
        }
        if plan.exists(|operator| Ok(is_best_of_groups(operator)))? {
            config.optimizer.enable_topk_dynamic_filter_pushdown = false;
        }
        self.0.optimize(plan, &config)
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

fn is_best_of_groups(operator: &Arc<dyn ExecutionPlan>) -> bool {
    let mut below = operator.downcast_ref::<SortExec>().filter(|sort| sort.fetch().is_some()).map(SortExec::input);
    while let Some(plan) = below {
        if plan.downcast_ref::<AggregateExec>().is_some_and(|aggregate| !aggregate.group_expr().is_empty()) {
            return true;
        }
        below = match plan.children()[..] {
            [input] => Some(input),
            _ => None,
        };
    }
    false
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

    #[tokio::test]
    async fn the_first_of_groups_leave_out_no_row_of_theirs() {
        let session = SessionContext::new_with_state(crate::functions::state(
            SessionConfig::new().with_target_partitions(2),
            Arc::new(RuntimeEnv::default()),
            1,
        ));
        let path = std::env::temp_dir().join(format!("weir-pushdown-{:032x}.parquet", rand::random::<u128>()));
        let rows = RecordBatch::try_from_iter([("n", Arc::new(Int64Array::from(vec![3, 1, 2])) as _)]).unwrap();
        let mut writer = ArrowWriter::try_new(std::fs::File::create(&path).unwrap(), rows.schema(), None).unwrap();
        writer.write(&rows).unwrap();
        writer.close().unwrap();
        session.register_parquet("t", path.to_str().unwrap(), ParquetReadOptions::default()).await.unwrap();
        for (sql, leaves_out) in [
            ("SELECT n FROM t ORDER BY n LIMIT 2", true),
            ("SELECT n, count(*) FROM t GROUP BY n ORDER BY n LIMIT 2", false),
            ("SELECT n FROM (SELECT n, count(*) FROM t GROUP BY n) ORDER BY n LIMIT 2", false),
        ] {
            let rows = session.sql(sql).await.unwrap().collect().await.unwrap();
            let found = rows.iter().flat_map(|rows| rows.column(0).as_primitive::<Int64Type>().values().to_vec());
            assert_eq!(found.collect::<Vec<_>>(), [1, 2], "{sql}");
            let rows = session.sql(&format!("EXPLAIN {sql}")).await.unwrap().collect().await.unwrap();
            let plan = arrow::util::pretty::pretty_format_batches(&rows).unwrap().to_string();
            assert_eq!(plan.contains("DynamicFilter"), leaves_out, "{sql}: {plan}");
        }
        std::fs::remove_file(&path).unwrap();
    }

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
