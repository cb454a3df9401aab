//! The functions that somebody who works with time series expects, beside DataFusion's own. Users read of them in
//! `docs/sql-functions.md`.
//!
//! [`state`] makes the session that statements are optimized and run in; [`register`] gives the functions to it, and to
//! every other session that plans statements (a door with a dialect of its own).

pub(crate) mod asof;
pub(crate) mod bucket_grid;
mod by_time;
mod each_row;
mod gapfill;
mod geodesy;
mod h3;
mod histogram;
pub(crate) mod hop;
pub(crate) mod latest;
mod one_group;
pub(crate) mod over_table;
mod over_time;
mod planner;
pub(crate) mod session;
pub(crate) mod time_bucket;
mod utc;

use std::sync::Arc;

use datafusion::common::Result;
use datafusion::execution::SessionStateBuilder;
use datafusion::execution::context::SessionState;
use datafusion::execution::runtime_env::RuntimeEnv;
use datafusion::functions_aggregate::approx_percentile_cont::approx_percentile_cont_udaf;
use datafusion::logical_expr::{AggregateUDF, ScalarUDF};
use datafusion::optimizer::Optimizer;
use datafusion::optimizer::OptimizerRule;
use datafusion::prelude::{SessionConfig, SessionContext};

use self::latest::cache::LatestCache;
use crate::catalog::Tables;
use crate::groups::ByText;
use crate::pushdown;

/// The state of a session that can carry out what the functions become.
pub(crate) fn state(config: SessionConfig, runtime: Arc<RuntimeEnv>, gapfill_rows_max: usize) -> SessionState {
    let ours: [Arc<dyn OptimizerRule + Send + Sync>; 3] = [
        Arc::new(gapfill::PlanGapFill { rows_max: gapfill_rows_max }),
        Arc::new(asof::PushIntoAsOf),
        Arc::new(each_row::EachRow),
    ];
    let mut rules: Vec<_> = ours.into_iter().chain(Optimizer::new().rules).collect();
    // Where conditions stand right above a HOP or a SESSION: what comes later puts columns between.
    let pushed = rules.iter().position(|rule| rule.name() == "push_down_filter").map_or(rules.len(), |at| at + 1);
    let bounds: [Arc<dyn OptimizerRule + Send + Sync>; 2] = [Arc::new(hop::BoundHop), Arc::new(session::BoundSession)];
    rules.splice(pushed..pushed, bounds);
    let mut physical = pushdown::rules();
    // What is checked last is the plan that runs.
    physical.insert(physical.len() - 1, Arc::new(ByText));
    SessionStateBuilder::new()
        .with_config(config)
        .with_runtime_env(runtime)
        .with_default_features()
        .with_optimizer_rules(rules)
        .with_physical_optimizer_rules(physical)
        .with_query_planner(Arc::new(planner::Planner))
        .build()
}

/// Makes the functions known to a session.
///
/// # Errors
/// When the session takes no functions.
pub(crate) fn register(session: &SessionContext, tables: &Arc<dyn Tables>, latest: &Arc<LatestCache>) -> Result<()> {
    // Spatial and JSON functions first: what is registered later under a name of theirs takes its place.
    geodatafusion::register(session);
    datafusion_functions_json::register_all(&mut session.clone())?;
    let scalar = [
        utc::date_trunc(),
        ScalarUDF::from(time_bucket::TimeBucket::new()),
        ScalarUDF::from(geodesy::OnSphere::new(geodesy::Measure::Distance)),
        ScalarUDF::from(geodesy::OnSphere::new(geodesy::Measure::Within)),
    ];
    for function in scalar.into_iter().chain(gapfill::functions()).chain(h3::functions()) {
        session.register_udf(function);
    }
    let courses = [
        over_time::Course::Delta,
        over_time::Course::Increase,
        over_time::Course::Rate,
        over_time::Course::TimeWeightedAvg,
        over_time::Course::TimeWeight,
    ];
    let aggregates = [
        AggregateUDF::from(by_time::ByTime::new(by_time::End::First)),
        AggregateUDF::from(by_time::ByTime::new(by_time::End::Last)),
        AggregateUDF::from(histogram::Histogram::new()),
        approx_percentile_cont_udaf().as_ref().clone().with_aliases(["approx_percentile"]),
    ];
    let courses = courses.map(|course| AggregateUDF::from(over_time::OverTime::new(course)));
    for function in aggregates.into_iter().chain(courses) {
        session.register_udaf(function);
    }
    session.register_relation_planner(Arc::new(asof::PlanAsOf))?;
    session.register_relation_planner(Arc::new(hop::PlanHop))?;
    session.register_relation_planner(Arc::new(session::PlanSession))?;
    session.register_udtf("latest", Arc::new(latest::LatestFunction::new(Arc::clone(tables), Arc::clone(latest))));
    Ok(())
}

#[cfg(test)]
mod tests;
