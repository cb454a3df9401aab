//! What came from whom since the node started: for those who ask how ingest fares.
//!
//! One entry for each (stream, spool) that this process has taken a batch of, from the WAL or from an edge. It decides
//! nothing: what is durable and committed is kept by the sequences and the tables, and told here.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use tokio::sync::Notify;
use wire::schema::own::BATCH_ORIGINS;
use wire::sealed::{BatchHeader, NO_WATERMARK};
use wire::{EdgeId, Seq, SpoolId, StreamName};

use crate::origins::Origin;

/// So many spools are told of; of more, those that were silent longest are forgotten.
const ENTRIES_MAX: usize = 10_000;
/// Origins that wait to be written at most; what comes above it is not told.
const ORIGINS_MAX: usize = 65_536;

/// What is known of one spool's sequence of a stream.
#[derive(Debug, Clone)]
pub struct Entry {
    pub stream: StreamName,
    pub spool: SpoolId,
    pub edge: EdgeId,
    /// Rows and batches taken.
    pub rows: u64,
    pub batches: u64,
    /// When the last of them was taken, µs since 1970 UTC.
    pub received_at_us: i64,
    /// The latest event time.
    pub max_ts: Option<i64>,
    /// The highest watermark that a batch of it carried.
    pub watermark: Option<i64>,
    /// The last batch taken.
    pub durable: Seq,
    /// Version of the agent that sealed it, and of its configuration.
    pub agent: String,
    pub configuration: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Ledger {
    entries: Mutex<BTreeMap<(StreamName, SpoolId), Entry>>,
    /// What `origins` has not written yet.
    origins: Mutex<Vec<Origin>>,
    noted: Notify,
}

impl Ledger {
    /// A batch was taken.
    pub(crate) fn take(&self, header: &BatchHeader, received_at_us: i64) {
        if header.stream.as_str() == BATCH_ORIGINS {
            return;
        }
        let mut entries = self.entries.lock();
        let key = (header.stream.clone(), header.spool);
        if entries.len() >= ENTRIES_MAX && !entries.contains_key(&key) {
            let silent = entries.iter().min_by_key(|(_, entry)| entry.received_at_us).map(|(key, _)| key.clone());
            silent.map(|key| entries.remove(&key));
        }
        let entry = entries.entry(key).or_insert_with(|| Entry {
            stream: header.stream.clone(),
            spool: header.spool,
            edge: header.edge.clone(),
            rows: 0,
            batches: 0,
            received_at_us,
            max_ts: None,
            watermark: None,
            durable: Seq(0),
            agent: String::new(),
            configuration: 0,
        });
        let is_first = entry.batches == 0;
        entry.rows += u64::from(header.rows);
        entry.batches += 1;
        entry.received_at_us = received_at_us;
        if header.rows > 0 {
            entry.max_ts = entry.max_ts.max(Some(header.max_ts));
        }
        if header.watermark != NO_WATERMARK {
            entry.watermark = entry.watermark.max(Some(header.watermark));
        }
        entry.durable = entry.durable.max(header.seq);
        if is_first || entry.agent != header.agent || entry.configuration != header.configuration {
            entry.agent.clone_from(&header.agent);
            entry.configuration = header.configuration;
            self.note(header, received_at_us);
        }
    }

    /// From this batch on the agent or its configuration is another.
    fn note(&self, header: &BatchHeader, received_at_us: i64) {
        let mut origins = self.origins.lock();
        if origins.len() >= ORIGINS_MAX {
            tracing::warn!(stream = %header.stream, spool = %header.spool, "too many agents at once: this one is not told");
            return;
        }
        origins.push(Origin {
            stream: header.stream.clone(),
            spool: header.spool,
            from: header.seq,
            edge: header.edge.clone(),
            agent: header.agent.clone(),
            configuration: header.configuration,
            received_at_us,
        });
        self.noted.notify_one();
    }

    /// What was noted and not taken yet.
    pub(crate) fn take_origins(&self) -> Vec<Origin> {
        std::mem::take(&mut *self.origins.lock())
    }

    /// Waits until something was noted.
    pub(crate) async fn noted(&self) {
        self.noted.notified().await;
    }

    /// All entries, by stream and spool.
    pub fn entries(&self) -> Vec<Entry> {
        self.entries.lock().values().cloned().collect()
    }

    /// Those of one stream.
    pub fn entries_of(&self, stream: &StreamName) -> Vec<Entry> {
        let entries = self.entries.lock();
        let from = entries.range((stream.clone(), SpoolId([0; 16]))..);
        from.take_while(|((of, _), _)| of == stream).map(|(_, entry)| entry.clone()).collect()
    }
}
