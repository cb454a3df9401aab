//! The contract for hot data: what a query may ask of the node that holds it (rule 4).
//!
//! `hot(stream, V)` answers every durable batch whose seq is above `txn` at table version V, or `Stale(W)` when the
//! node can no longer answer for V because batches that were committed after it have left its grace time: the query
//! then reloads its snapshot to at least W and asks again. So no row is missing and none is twice, whatever commits
//! happen between the two halves of a read. A query uses one V for all nodes and removes repeats by (spool, seq).

use std::fmt;

use arrow_array::RecordBatch;

use crate::ids::{Seq, SpoolId, StreamName};

/// Rows of one batch within a merged hot batch: `rows` rows from `start`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HotRun {
    pub spool: SpoolId,
    pub seq: Seq,
    pub start: usize,
    pub rows: usize,
}

/// Hot rows, small batches merged, with all columns of the table at the version they were rescued against.
#[derive(Debug, Clone)]
pub struct HotRows {
    pub rows: RecordBatch,
    /// Covers `rows` without holes, in order.
    pub runs: Vec<HotRun>,
}

/// Answer of a node for one stream at one table version.
#[derive(Debug, Clone)]
pub enum HotAnswer {
    Rows(Vec<HotRows>),
    /// Reload the table to at least this version and ask again.
    Stale(u64),
}

/// A node did not answer.
#[derive(Debug, Clone, thiserror::Error)]
#[error("no answer for hot rows of {stream}: {detail}")]
pub struct HotError {
    pub stream: StreamName,
    pub detail: String,
}

/// Where a query gets hot rows from: in process, or another node over Flight.
#[async_trait::async_trait]
pub trait HotSource: Send + Sync + fmt::Debug {
    /// Every durable batch of `stream` above `txn` at table version `at`.
    async fn hot(&self, stream: &StreamName, at: u64) -> Result<HotAnswer, HotError>;
}
