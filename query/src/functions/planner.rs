//! From the logical nodes of this room to their operators, and the session's planner that knows both.

use std::sync::Arc;

use async_trait::async_trait;
use datafusion::catalog::Session;
use datafusion::common::{DFSchema, Result, internal_err};
use datafusion::execution::context::QueryPlanner;
use datafusion::logical_expr::physical_planning_context::PhysicalPlanningContext;
use datafusion::logical_expr::{Expr, LogicalPlan, Operator, UserDefinedLogicalNode};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_planner::{DefaultPhysicalPlanner, ExtensionPlanner, PhysicalPlanner};

use super::asof::AsOf;
use super::asof::exec::{AsOfExec, Condition};
use super::gapfill::GapFill;
use super::gapfill::exec::{Fill, GapFillExec};
use super::hop::Hop;
use super::hop::exec::HopExec;
use super::session::Sessions;
use super::session::exec::SessionExec;

/// The session's planner.
#[derive(Debug)]
pub(super) struct Planner;

#[async_trait]
impl QueryPlanner for Planner {
    async fn create_physical_plan(&self, plan: &LogicalPlan, session: &dyn Session) -> Result<Arc<dyn ExecutionPlan>> {
        let planner = DefaultPhysicalPlanner::with_extension_planners(vec![Arc::new(Nodes)]);
        planner.create_physical_plan(plan, session).await
    }
}

struct Nodes;

#[async_trait]
impl ExtensionPlanner for Nodes {
    async fn plan_extension(
        &self,
        planner: &dyn PhysicalPlanner,
        node: &dyn UserDefinedLogicalNode,
        logical_inputs: &[&LogicalPlan],
        physical_inputs: &[Arc<dyn ExecutionPlan>],
        session: &dyn Session,
        context: &PhysicalPlanningContext,
    ) -> Result<Option<Arc<dyn ExecutionPlan>>> {
        let expression = |expression: &Expr, schema: &DFSchema| -> Result<Arc<dyn PhysicalExpr>> {
            planner.create_physical_expr(expression, schema, session, context)
        };
        if let Some(gaps) = node.as_any().downcast_ref::<GapFill>() {
            let ([logical], [input]) = (logical_inputs, physical_inputs) else {
                return internal_err!("a gap fill has one input");
            };
            let schema = logical.schema();
            let keys = gaps.keys.iter().map(|key| expression(key, schema)).collect::<Result<_>>()?;
            let fills = gaps
                .fills
                .iter()
                .map(|fill| Ok(Fill { method: fill.method, of: expression(&fill.of, schema)? }))
                .collect::<Result<_>>()?;
            return Ok(Some(Arc::new(GapFillExec::try_new(
                Arc::clone(input),
                Arc::clone(node.schema().inner()),
                expression(&gaps.time, schema)?,
                keys,
                fills,
                Arc::clone(&gaps.range),
                gaps.rows_max,
            )?)));
        }
        if let Some(hop) = node.as_any().downcast_ref::<Hop>() {
            let ([logical], [input]) = (logical_inputs, physical_inputs) else {
                return internal_err!("HOP has one input");
            };
            let time = expression(&hop.time, logical.schema())?;
            let schema = Arc::clone(node.schema().inner());
            return Ok(Some(Arc::new(HopExec::new(Arc::clone(input), schema, time, hop.windows.clone(), hop.starts))));
        }
        if let Some(sessions) = node.as_any().downcast_ref::<Sessions>() {
            let ([logical], [input]) = (logical_inputs, physical_inputs) else {
                return internal_err!("SESSION has one input");
            };
            let time = expression(&sessions.time, logical.schema())?;
            let keys = sessions.keys.iter().map(|key| expression(key, logical.schema())).collect::<Result<_>>()?;
            let schema = Arc::clone(node.schema().inner());
            return Ok(Some(Arc::new(SessionExec::new(Arc::clone(input), schema, time, keys, sessions.silence))));
        }
        if let Some(join) = node.as_any().downcast_ref::<AsOf>() {
            let ([left, right], [left_input, right_input]) = (logical_inputs, physical_inputs) else {
                return internal_err!("an ASOF join has two inputs");
            };
            let time = join.matching()?;
            let (mut of_left, mut of_right) = (Vec::new(), Vec::new());
            for sides in join.keys()?.iter().chain([&time]) {
                of_left.push(expression(&sides.left, left.schema())?);
                of_right.push(expression(&sides.right, right.schema())?);
            }
            let condition = Condition {
                left: of_left,
                right: of_right,
                forward: matches!(time.op, Operator::Lt | Operator::LtEq),
                strict: matches!(time.op, Operator::Lt | Operator::Gt),
                outer: join.outer,
            };
            let schema = Arc::clone(node.schema().inner());
            return Ok(Some(Arc::new(AsOfExec::new(
                Arc::clone(left_input),
                Arc::clone(right_input),
                condition,
                schema,
            ))));
        }
        Ok(None)
    }
}
