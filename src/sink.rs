//! The streams that `query` writes, through the door of the node in the same process.

use std::sync::Arc;

use arrow::array::RecordBatch;
use async_trait::async_trait;
use cloud_ingest::{WriteError, Writer};
use query::{Sink, SinkError};
use wire::{StreamName, StreamSchema};

/// The door of this process.
#[derive(Debug)]
pub(crate) struct NodeSink(pub(crate) Writer);

#[async_trait]
impl Sink for NodeSink {
    async fn append(
        &self,
        stream: &StreamName,
        schema: &Arc<StreamSchema>,
        rows: RecordBatch,
    ) -> Result<(), SinkError> {
        let wrote = self.0.append(stream, schema, rows).await;
        wrote.map_err(|error| {
            let stream = stream.clone();
            match error {
                WriteError::Rows { source, .. } => SinkError::Refused { stream, detail: source.to_string() },
                error @ (WriteError::Back(_) | WriteError::Stops) => {
                    SinkError::Later { stream, detail: error.to_string() }
                }
            }
        })
    }
}
