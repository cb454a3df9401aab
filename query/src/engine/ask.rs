//! Questions whose answers are wanted whole: those of the node itself, and of its views: planned before, asked of states that
//! were frozen before, in a lane of their own, so that views take no room from those who ask.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use arrow_array::RecordBatch;
use datafusion::common::DataFusionError;
use datafusion::logical_expr::LogicalPlan;
use datafusion::physical_plan::{ExecutionPlan, execute_stream};
use futures::StreamExt;
use wire::StreamName;

use super::{Engine, Prepared, QueryError, bytes_of, task};
use crate::caller::{Caller, Door};
use crate::engine::explain::Stopped;
use crate::fused_table::{Frozen, View, pin_over};

/// The lane of views; without one of this name they ask in the usual one.
pub const VIEWS_LANE: &str = "views";

/// States of tables that a question is asked of; others are frozen when it is.
pub(crate) type States = HashMap<StreamName, Arc<Frozen>>;

/// What is asked for a view.
pub(crate) enum Question {
    /// Planned when it is asked, over live tables, for all threads of its lane.
    Plan(LogicalPlan),
    /// A [`Ready`](super::Ready) one, filled where it is asked.
    Ready(Fill),
}

/// Makes the plan that is carried out, over these states.
type Fill = Box<dyn FnOnce(&States) -> Result<Arc<dyn ExecutionPlan>, DataFusionError> + Send>;

impl From<LogicalPlan> for Question {
    fn from(plan: LogicalPlan) -> Self {
        Self::Plan(plan)
    }
}

/// What a question for a view gave.
#[derive(Debug, Default)]
pub(crate) struct Answered {
    pub(crate) rows: Vec<RecordBatch>,
    /// The most memory that it had at a time, bytes.
    pub(crate) memory_bytes: usize,
    /// What its operators computed, all threads together.
    pub(crate) computed: Duration,
}

fn caller() -> Caller {
    Caller::new("views", Door::Node, None, Arc::new([VIEWS_LANE.to_owned()]))
}

impl Engine {
    /// All rows of a statement that the node itself asks.
    ///
    /// # Errors
    /// As [`Engine::rows_as`].
    pub async fn rows(&self, sql: &str) -> Result<Vec<RecordBatch>, QueryError> {
        self.rows_as(&Caller::node(), sql, usize::MAX).await
    }

    /// The first rows of a statement, and some more when there are more than so many.
    ///
    /// # Errors
    /// As [`Engine::prepare`] and [`Engine::execute`].
    pub(crate) async fn rows_as(
        &self,
        caller: &Caller,
        sql: &str,
        rows_max: usize,
    ) -> Result<Vec<RecordBatch>, QueryError> {
        let running = self.begin(caller, &self.enter(caller).await?, sql);
        let prepared = self.prepare(&running, sql, None).await?;
        let mut stream = self.execute(&running, &prepared, None).await?;
        let (mut rows, mut count) = (Vec::new(), 0);
        while count <= rows_max
            && let Some(batch) = stream.next().await
        {
            let batch = batch.map_err(|error| self.explain(error))?;
            count += batch.num_rows();
            rows.push(batch);
        }
        Ok(rows)
    }

    /// Plans the question of a view.
    ///
    /// # Errors
    /// As [`Engine::prepare`].
    pub(crate) async fn plan_for_view(&self, select: &str) -> Result<Prepared, QueryError> {
        let caller = caller();
        let running = self.begin(&caller, &self.enter(&caller).await?, select);
        let prepared = self.prepare(&running, select, None).await;
        running.planned();
        prepared
    }

    /// Computes something for a view in the lane of views, within its time.
    ///
    /// # Errors
    /// When it fails, or takes too long.
    pub(crate) async fn compute_for_view<T, F>(&self, name: &str, work: F) -> Result<T, QueryError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, DataFusionError>> + Send + 'static,
    {
        let caller = caller();
        let running = self.begin(&caller, &self.enter(&caller).await?, name);
        running.planned();
        self.aside(&running, work).await?.map_err(|error| self.explain(error))
    }

    /// All rows of a question over these states, as the node sees them; at most so many rows and bytes.
    ///
    /// # Errors
    /// When it fails, or a limit of its lane or of the answer is reached.
    pub(crate) async fn ask(
        &self,
        name: &str,
        question: impl Into<Question>,
        states: States,
        [rows_max, bytes_max]: [usize; 2],
    ) -> Result<Answered, QueryError> {
        let (caller, question) = (caller(), question.into());
        let running = self.begin(&caller, &self.enter(&caller).await?, name);
        // Many times a second: not for the list of what people asked.
        running.planned();
        let (session, planner, tables) = (self.session().clone(), Arc::clone(&self.planner), Arc::clone(&self.tables));
        let (statements, views, links, pool) = (
            Arc::clone(&self.statements),
            Arc::clone(&self.views),
            Arc::clone(&self.links),
            Arc::clone(running.pool()),
        );
        let work = async move {
            let (physical, context) = match question {
                Question::Ready(fill) => (fill(&states)?, planner.task(&pool)),
                Question::Plan(plan) => {
                    let state = session.state();
                    let (tables, views, links) = (tables.as_ref(), views.as_ref(), links.as_ref());
                    let view = View { tables, statements: &statements, views, links, caller: &caller };
                    let pinned = pin_over(plan, &state, view, states).await?;
                    (state.create_physical_plan(&pinned).await?, task(&state, &pool))
                }
            };
            let mut stream = execute_stream(Arc::clone(&physical), context)?;
            let (mut rows, mut count, mut bytes) = (Vec::new(), 0, 0);
            while let Some(batch) = stream.next().await {
                let batch = batch?;
                count += batch.num_rows();
                bytes += bytes_of(&batch);
                if count > rows_max || bytes > bytes_max {
                    let message = format!("more than {rows_max} rows or {bytes_max} bytes at a time");
                    return Err(DataFusionError::from(Stopped::TooMuch(message)));
                }
                rows.push(batch);
            }
            Ok(Answered { rows, memory_bytes: pool.peak(), computed: computed(&physical) })
        };
        self.aside(&running, Box::pin(work)).await?.map_err(|error| self.explain(error))
    }
}

/// What a plan and all below it computed.
fn computed(plan: &Arc<dyn ExecutionPlan>) -> Duration {
    let own = plan.metrics().and_then(|metrics| metrics.elapsed_compute()).unwrap_or(0);
    let below: Duration = plan.children().into_iter().map(computed).sum();
    Duration::from_nanos(own as u64) + below
}
