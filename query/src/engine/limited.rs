//! The limits of an answer while its rows are taken: the statement's time, somebody's word to end it, and its size.

use std::sync::Arc;

use arrow_array::{Array, RecordBatch};
use datafusion::common::DataFusionError;
use datafusion::execution::SendableRecordBatchStream;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use futures::{StreamExt, stream};
use tokio::time::Instant;

use super::explain::Stopped;
use super::state_of;
use crate::statements::{Running, State};

/// The rows within the limits of the statement: its time, somebody's word, and the size of its answer.
pub(super) fn limited(
    rows: SendableRecordBatchStream,
    running: Arc<Running>,
    [rows_max, bytes_max]: [u64; 2],
) -> SendableRecordBatchStream {
    let schema = rows.schema();
    let limited = stream::unfold(Some((rows, running)), move |state| async move {
        let (mut rows, running) = state?;
        let stop = |running: &Running, stopped: Stopped| {
            running.ended(state_of(&stopped.told()));
            Some((Err(DataFusionError::from(stopped)), None))
        };
        let (deadline, limit) = (running.deadline(), running.timeout());
        // Also when the next rows are ready: a slow reader must not get more time than the others.
        if Instant::now() >= deadline {
            return stop(&running, Stopped::Overdue(limit));
        }
        let next = tokio::select! {
            biased;
            () = running.cancelled().cancelled() => return stop(&running, Stopped::Cancelled),
            next = tokio::time::timeout_at(deadline, rows.next()) => next,
        };
        match next {
            Ok(Some(Ok(batch))) => {
                let (rows_given, bytes_given) = running.gave(batch.num_rows(), bytes_of(&batch));
                if rows_given > rows_max || bytes_given > bytes_max {
                    let message = format!("the answer has more than {rows_max} rows or {bytes_max} bytes: add a LIMIT");
                    return stop(&running, Stopped::TooMuch(message));
                }
                Some((Ok(batch), Some((rows, running))))
            }
            Ok(Some(Err(error))) => {
                running.ended(State::Failed);
                Some((Err(error), None))
            }
            // The statement's own task ends by that word and at the deadline, too: what it sent is then not all.
            Ok(None) if running.cancelled().is_cancelled() => stop(&running, Stopped::Cancelled),
            Ok(None) if Instant::now() < deadline => {
                running.ended(State::Done);
                None
            }
            Ok(None) | Err(_) => stop(&running, Stopped::Overdue(limit)),
        }
    });
    Box::pin(RecordBatchStreamAdapter::new(schema, limited))
}

/// Bytes of the rows themselves: a batch may be a slice of larger columns.
pub(crate) fn bytes_of(batch: &RecordBatch) -> usize {
    batch.columns().iter().map(|column| column.to_data().get_slice_memory_size().unwrap_or(0)).sum()
}
