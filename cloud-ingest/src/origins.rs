//! Which agent sealed which batches: the stream `batch_origins`, one row for each time that the agent or its configuration is
//! another than that of the batch before it in a (stream, spool), and for the first batch that this process takes of one.
//!
//! A batch has both in its header, and a table keeps only its number; so the rows say from which number on they hold, until
//! the next. They are written behind what they tell of, as soon as it is shown. A crash between the two is made good
//! when the batch is replayed from the WAL; it is not if the batch was committed within that moment: then what was written
//! before holds until the next batch.

use std::sync::Arc;
use std::time::Duration;

use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use tokio_util::sync::CancellationToken;
use wire::schema::own;
use wire::{BATCH_ROWS_MAX, EdgeId, Seq, SpoolId, StreamName, StreamSchema};

use crate::catalog::Catalogue;
use crate::writer::{WriteError, Writer};

/// Rows are gathered for so long at least.
const GATHER: Duration = Duration::from_millis(100);
/// After they could not be written.
const RETRY: Duration = Duration::from_secs(1);
/// How long the last of them may take when the node stops.
const STOP_MAX: Duration = Duration::from_secs(2);

/// From this batch on, another agent or configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    pub stream: StreamName,
    pub spool: SpoolId,
    pub from: Seq,
    pub edge: EdgeId,
    pub agent: String,
    pub configuration: u64,
    /// When that batch was taken, µs since 1970 UTC.
    pub received_at_us: i64,
}

/// Writes what the ledger has noted, until the token is cancelled and the rest is written.
pub(crate) async fn run(catalogue: Arc<Catalogue>, writer: Writer, stop: CancellationToken) {
    let (stream, schema): (StreamName, _) =
        (own::BATCH_ORIGINS.parse().expect("own names are valid"), Arc::new(own::batch_origins()));
    let mut waiting = Vec::new();
    while !stop.is_cancelled() {
        tokio::select! {
            () = stop.cancelled() => break,
            () = catalogue.ledger().noted() => {}
        }
        stop.run_until_cancelled(tokio::time::sleep(GATHER)).await;
        waiting.append(&mut catalogue.ledger().take_origins());
        while !waiting.is_empty() && !stop.is_cancelled() {
            if write(&writer, &stream, &schema, &mut waiting).await.is_err() {
                stop.run_until_cancelled(tokio::time::sleep(RETRY)).await;
            }
        }
    }
    waiting.append(&mut catalogue.ledger().take_origins());
    let rest = async { while write(&writer, &stream, &schema, &mut waiting).await.is_ok() && !waiting.is_empty() {} };
    tokio::time::timeout(STOP_MAX, rest).await.ok();
}

/// Writes a batch of them, the first.
async fn write(
    writer: &Writer,
    stream: &StreamName,
    schema: &Arc<StreamSchema>,
    waiting: &mut Vec<Origin>,
) -> Result<(), WriteError> {
    if waiting.is_empty() {
        return Ok(());
    }
    let count = waiting.len().min(BATCH_ROWS_MAX);
    match writer.append(stream, schema, rows(schema, &waiting[..count])).await {
        // The same rows would be refused again.
        Err(error @ WriteError::Rows { .. }) => tracing::error!(%error, "which agents sealed batches is not kept"),
        wrote => wrote?,
    }
    waiting.drain(..count);
    Ok(())
}

fn rows(schema: &StreamSchema, origins: &[Origin]) -> RecordBatch {
    let texts = |text: fn(&Origin) -> String| Arc::new(StringArray::from_iter_values(origins.iter().map(text)));
    let integers = |integer: fn(&Origin) -> i64| Arc::new(Int64Array::from_iter_values(origins.iter().map(integer)));
    let ts = TimestampMicrosecondArray::from_iter_values(origins.iter().map(|origin| origin.received_at_us));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(ts.with_timezone("UTC")),
        Arc::new(StringArray::new_null(origins.len())),
        texts(|origin| origin.stream.to_string()),
        texts(|origin| origin.spool.to_string()),
        integers(|origin| origin.from.0.cast_signed()),
        texts(|origin| origin.edge.to_string()),
        texts(|origin| origin.agent.clone()),
        integers(|origin| origin.configuration.cast_signed()),
        Arc::new(StringArray::from_iter_values(origins.iter().map(|_| "good"))),
    ];
    RecordBatch::try_new(Arc::clone(schema.arrow()), columns).expect("the columns are those of the schema")
}
