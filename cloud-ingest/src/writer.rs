//! Writes streams of the node itself: results of views, alerts. They take the path of everything else, from the sequencer to
//! the table, as batches of the edge [`OWN_EDGE`], which no other may call itself.

use std::sync::Arc;

use arrow_array::RecordBatch;
use tokio::sync::{Semaphore, oneshot};
use wire::ids::OWN_EDGE;
use wire::sealed::{CutError, NO_WATERMARK};
use wire::{CutBatch, EdgeId, RefusedRequest, StreamName, StreamSchema};

use crate::class::{ByClass, Class};
use crate::doors::rows::Gathered;
use crate::ingest::write::Writing;
use crate::ingest::{Job, Jobs};

/// Why rows were not written: nothing of them is there, unless the node stopped meanwhile.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// For ever: the rows are over a limit of a batch, or do not have the schema's columns.
    #[error("the rows of {stream} are no batch")]
    Rows { stream: StreamName, source: CutError },
    /// For now: no room, or no table yet.
    #[error(transparent)]
    Back(RefusedRequest),
    #[error("the node stops")]
    Stops,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Writer {
    jobs: Jobs,
    places: ByClass<Arc<Semaphore>>,
    edge: EdgeId,
    agent: String,
}

impl Writer {
    pub(crate) fn new(jobs: Jobs, places: ByClass<Arc<Semaphore>>) -> Self {
        let edge = OWN_EDGE.parse().expect("it is a name");
        Self { jobs, places, edge, agent: format!("weir {}", env!("CARGO_PKG_VERSION")) }
    }

    /// Writes rows, whose columns are `schema`'s, as one batch: when it returns they are durable, and every statement that
    /// begins sees them.
    ///
    /// # Errors
    /// When they are not written.
    pub async fn append(
        &self,
        stream: &StreamName,
        schema: &Arc<StreamSchema>,
        rows: RecordBatch,
    ) -> Result<(), WriteError> {
        let place = Arc::clone(&self.places[Class::of(&self.edge, stream)]);
        let _place = place.acquire_owned().await.map_err(|_| WriteError::Stops)?;
        let cut = CutBatch::seal(stream.clone(), schema, &rows, NO_WATERMARK, &self.agent, 0);
        let cut = cut.map_err(|source| WriteError::Rows { stream: stream.clone(), source })?;
        let batch = Gathered { cut, schema: Arc::clone(schema), rows };
        let (reply, answered) = oneshot::channel();
        let writing = Box::new(Writing::new(self.edge.clone(), vec![(None, batch)], reply));
        self.jobs.send(Job::Write { writing, _place }).map_err(|_| WriteError::Stops)?;
        answered.await.map_err(|_| WriteError::Stops)?.map_err(WriteError::Back)?;
        Ok(())
    }
}
