//! Where statements run: a runtime of their own, so that a heavy one holds no worker that takes batches or watches the
//! clock.
//!
//! A statement is one task; its rows come over a channel of [`BATCHES_AHEAD`] batches, so a slow reader slows it down.
//! Dropping the stream aborts the task; what it computes at that moment ends at its next pause, and nobody waits for it.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use datafusion::common::DataFusionError;
use datafusion::execution::{RecordBatchStream, SendableRecordBatchStream};
use datafusion::physical_plan::metrics::{BaselineMetrics, ExecutionPlanMetricsSet};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use futures::{Stream, StreamExt};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::breadth::STACK_BYTES;

/// Batches that are computed before somebody asks for them.
const BATCHES_AHEAD: usize = 2;

/// Rows that are counted where a plan shows how many came out of one of its parts.
pub(crate) fn counted(
    rows: SendableRecordBatchStream,
    metrics: &ExecutionPlanMetricsSet,
    partition: usize,
) -> SendableRecordBatchStream {
    let (schema, count) = (rows.schema(), BaselineMetrics::new(metrics, partition));
    let rows = rows.inspect(move |batch| {
        if let Ok(batch) = batch {
            count.record_output(batch.num_rows());
        }
    });
    Box::pin(RecordBatchStreamAdapter::new(schema, rows))
}

/// The runtime. Cheap to clone; it ends in the background with its last owner.
#[derive(Debug, Clone)]
pub(crate) struct Execution(Arc<Owned>);

#[derive(Debug)]
struct Owned(Option<Runtime>);

impl Drop for Owned {
    fn drop(&mut self) {
        // A runtime may not be dropped where others run; its tasks have no one to answer any more.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl Execution {
    /// A runtime with so many threads, which stand back behind others as far as `nice` says.
    pub(crate) fn new(threads: usize, nice: i32) -> std::io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(threads.max(1))
            .thread_name("statement")
            .thread_stack_size(STACK_BYTES)
            .on_thread_start(move || stand_back(nice))
            .enable_all()
            .build()?;
        Ok(Self(Arc::new(Owned(Some(runtime)))))
    }

    fn runtime(&self) -> &Runtime {
        self.0.0.as_ref().expect("the runtime is there until its last owner goes")
    }

    /// Computes something here: plans a statement. Who drops the future no longer waits for it.
    pub(crate) async fn compute<T, F>(&self, work: F) -> Result<T, DataFusionError>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let task = self.runtime().spawn(work);
        let _task = AbortOnDrop(task.abort_handle());
        task.await.map_err(|_| lost())
    }

    /// Runs a statement, from its start to its last row, and not longer than to the deadline or somebody's word, also when
    /// nobody reads: the rows then end, and the caller knows by the clock and the word that they are not all. Returns when it has
    /// started.
    pub(crate) async fn run<F>(
        &self,
        start: F,
        deadline: Instant,
        end: CancellationToken,
    ) -> Result<SendableRecordBatchStream, DataFusionError>
    where
        F: Future<Output = Result<SendableRecordBatchStream, DataFusionError>> + Send + 'static,
    {
        let (started, start_of) = oneshot::channel();
        let (sender, rows) = mpsc::channel(BATCHES_AHEAD);
        let ended = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&ended);
        let task = self.runtime().spawn(async move {
            let mut stream = match start.await {
                Ok(stream) => stream,
                Err(error) => {
                    // Nobody asks any more when this cannot be told.
                    let _ = started.send(Err(error));
                    return;
                }
            };
            if started.send(Ok(stream.schema())).is_err() {
                return;
            }
            let forward = async {
                while let Some(item) = stream.next().await {
                    if sender.send(item).await.is_err() {
                        return;
                    }
                }
            };
            // Elapsed, ended or done: the channel closes either way.
            let _ = end.run_until_cancelled(tokio::time::timeout_at(deadline, forward)).await;
            // After a panic nobody comes here.
            ends.store(true, Ordering::Release);
        });
        let task = AbortOnDrop(task.abort_handle());
        let schema = start_of.await.map_err(|_| lost())??;
        Ok(Box::pin(Rows { schema, rows, ended, _task: task, _execution: self.clone() }))
    }
}

/// Of the calling thread alone, which is what Linux means by a process here.
#[cfg(target_os = "linux")]
fn stand_back(nice: i32) {
    if nice > 0
        && let Err(error) = rustix::process::setpriority_process(None, nice)
    {
        tracing::warn!(%error, "a thread of statements does not stand back behind alerts");
    }
}

#[cfg(not(target_os = "linux"))]
fn stand_back(_: i32) {}

fn lost() -> DataFusionError {
    DataFusionError::Execution("the statement ended without an answer".to_owned())
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Rows {
    schema: SchemaRef,
    rows: mpsc::Receiver<Result<RecordBatch, DataFusionError>>,
    /// Whether the task came to its end, or the reader knows that it did not.
    ended: Arc<AtomicBool>,
    _task: AbortOnDrop,
    _execution: Execution,
}

impl Stream for Rows {
    type Item = Result<RecordBatch, DataFusionError>;
    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match ready!(self.rows.poll_recv(context)) {
            None if !self.ended.swap(true, Ordering::Acquire) => Poll::Ready(Some(Err(lost()))),
            next => Poll::Ready(next),
        }
    }
}

impl RecordBatchStream for Rows {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use arrow_schema::Schema;

    use super::*;

    #[tokio::test]
    async fn rows_that_end_in_a_panic_end_in_an_error() {
        let execution = Execution::new(1, 0).unwrap();
        for panics in [false, true] {
            let schema = Arc::new(Schema::empty());
            let rows = RecordBatch::new_empty(Arc::clone(&schema));
            let start = async move {
                let rows = futures::stream::iter(0..2).map(move |number| {
                    assert!(!panics || number == 0, "as it is meant");
                    Ok(rows.clone())
                });
                Ok(Box::pin(RecordBatchStreamAdapter::new(schema, rows)) as SendableRecordBatchStream)
            };
            let deadline = Instant::now() + std::time::Duration::from_secs(60);
            let rows = execution.run(start, deadline, CancellationToken::new()).await.unwrap();
            let rows = rows.map(|rows| rows.is_ok()).collect::<Vec<_>>().await;
            assert_eq!(rows, [true, !panics]);
        }
    }

    #[tokio::test]
    async fn threads_stand_back_and_nobody_elses_do() {
        let own = || rustix::process::getpriority_process(None).unwrap();
        let before = own();
        for nice in [0, before + 3] {
            let execution = Execution::new(1, nice).unwrap();
            let of_thread = execution.compute(async move { own() }).await.unwrap();
            assert_eq!(of_thread, before.max(nice));
        }
        assert_eq!(own(), before);
    }
}
