//! The contract for hot data: what a query may ask of the node that holds it (rule 4).
//!
//! `hot(stream, V)` answers every durable batch whose seq is above `txn` at table version V, or `Stale(W)` when the
//! node can no longer answer for V because batches that were committed after it have left its grace time: the query
//! then reloads its snapshot to at least W and asks again. So no row is missing and none is twice, whatever commits
//! happen between the two halves of a read. A query uses one V for all nodes and removes repeats by (spool, seq).

use std::fmt;

use arrow_array::RecordBatch;
use arrow_array::cast::AsArray;
use arrow_array::types::TimestampMicrosecondType;

use crate::ids::{Seq, SpoolId, StreamName};
use crate::schema::TS;

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
    /// The first and last event time of `rows`, microseconds; none without rows.
    pub times: Option<(i64, i64)>,
}

impl HotRows {
    /// Rows of a table, with their event times as they say.
    pub fn new(rows: RecordBatch, runs: Vec<HotRun>) -> Self {
        let ts = rows.column_by_name(TS).and_then(|ts| ts.as_primitive_opt::<TimestampMicrosecondType>());
        let times = ts.and_then(|ts| {
            let first = *ts.values().first()?;
            let wider = |(first, last): (i64, i64), us: &i64| (first.min(*us), last.max(*us));
            Some(ts.values().iter().fold((first, first), wider))
        });
        Self { rows, runs, times }
    }
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
