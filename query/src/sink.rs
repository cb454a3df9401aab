//! Where the engine's own streams are written: results of views, alerts.
//!
//! They take the path of everything else, so whoever writes finds out after a restart what it had written by reading its own
//! stream.

use std::fmt;
use std::sync::Arc;

use arrow_array::RecordBatch;
use async_trait::async_trait;
use wire::{StreamName, StreamSchema};

/// Rows were not written. Nothing of them is there, unless the node stopped meanwhile.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SinkError {
    /// The same rows would be refused again.
    #[error("write {stream}: {detail}")]
    Refused { stream: StreamName, detail: String },
    /// Try again.
    #[error("write {stream}: {detail}")]
    Later { stream: StreamName, detail: String },
}

/// The node's own door.
#[async_trait]
pub trait Sink: Send + Sync + fmt::Debug {
    /// Writes rows, whose columns are `schema`'s, as one batch of at most [`wire::BATCH_ROWS_MAX`] rows: whole or not at all.
    /// When it returns they are durable, and every statement that begins sees them.
    async fn append(&self, stream: &StreamName, schema: &Arc<StreamSchema>, rows: RecordBatch)
    -> Result<(), SinkError>;
}
