//! What came from whom: for those who ask how ingest fares.
//!
//! One entry for each (stream, spool) that this node has taken a batch of, from the WAL or from an edge: what it has taken
//! since it started, and in all, which is [`kept`] over restarts. It decides nothing: what is durable and committed is kept
//! by the sequences and the tables, and told here.

use std::collections::{BTreeMap, BTreeSet};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use wire::schema::own::BATCH_ORIGINS;
use wire::sealed::{BatchHeader, NO_WATERMARK};
use wire::{EdgeId, Seq, SpoolId, StreamName};

use crate::origins::Origin;

pub mod kept;

/// So many spools are told of; of more, those that were silent longest are forgotten.
const ENTRIES_MAX: usize = 10_000;
/// Origins that wait to be written at most; what comes above it is not told.
const ORIGINS_MAX: usize = 65_536;

/// What is known of one spool's sequence of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
    /// The highest watermark that a batch of it carried since the start.
    #[serde(skip)]
    pub watermark: Option<i64>,
    /// The last batch taken.
    pub durable: Seq,
    /// Version of the agent that sealed it, and of its configuration.
    pub agent: String,
    pub configuration: u64,
}

impl Entry {
    fn new(header: &BatchHeader) -> Self {
        Self {
            stream: header.stream.clone(),
            spool: header.spool,
            edge: header.edge.clone(),
            rows: 0,
            batches: 0,
            received_at_us: 0,
            max_ts: None,
            watermark: None,
            durable: Seq(0),
            agent: String::new(),
            configuration: 0,
        }
    }

    fn take(&mut self, header: &BatchHeader, received_at_us: i64) {
        self.rows += u64::from(header.rows);
        self.batches += 1;
        self.received_at_us = received_at_us;
        if header.rows > 0 {
            self.max_ts = self.max_ts.max(Some(header.max_ts));
        }
        if header.watermark != NO_WATERMARK {
            self.watermark = self.watermark.max(Some(header.watermark));
        }
        self.durable = self.durable.max(header.seq);
        if self.agent != header.agent {
            self.agent.clone_from(&header.agent);
        }
        self.configuration = header.configuration;
    }
}

type Entries = BTreeMap<(StreamName, SpoolId), Entry>;

#[derive(Debug, Default)]
struct Known {
    since_start: Entries,
    in_all: Entries,
    /// Of these more is known than was kept.
    changed: BTreeSet<(StreamName, SpoolId)>,
}

impl Known {
    /// Counts a batch among all, if it is not counted yet.
    fn tally(&mut self, header: &BatchHeader, received_at_us: i64) {
        let entry = of(&mut self.in_all, header);
        if header.seq > entry.durable {
            entry.take(header, received_at_us);
            self.changed.insert((header.stream.clone(), header.spool));
        }
    }
}

/// The entry of a batch's sequence; of too many, the one that was silent longest makes room.
fn of<'a>(entries: &'a mut Entries, header: &BatchHeader) -> &'a mut Entry {
    let key = (header.stream.clone(), header.spool);
    if entries.len() >= ENTRIES_MAX && !entries.contains_key(&key) {
        let silent = entries.iter().min_by_key(|(_, entry)| entry.received_at_us).map(|(key, _)| key.clone());
        silent.map(|key| entries.remove(&key));
    }
    entries.entry(key).or_insert_with(|| Entry::new(header))
}

/// See the module.
#[derive(Debug, Default)]
pub struct Ledger {
    known: Mutex<Known>,
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
        let mut known = self.known.lock();
        known.tally(header, received_at_us);
        let entry = of(&mut known.since_start, header);
        let is_other = entry.agent != header.agent || entry.configuration != header.configuration;
        if entry.batches == 0 || is_other {
            self.note(header, received_at_us);
        }
        entry.take(header, received_at_us);
    }

    /// A batch was found that this node took before it started, and that needs nothing any more.
    pub(crate) fn recall(&self, header: &BatchHeader, received_at_us: i64) {
        if header.stream.as_str() != BATCH_ORIGINS {
            self.known.lock().tally(header, received_at_us);
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

    /// All entries, by stream and spool: what this node has taken in all.
    pub fn entries(&self) -> Vec<Entry> {
        self.known.lock().in_all.values().cloned().collect()
    }

    /// Those of one stream, with what was taken since the start.
    pub fn entries_of(&self, stream: &StreamName) -> Vec<Entry> {
        let known = self.known.lock();
        let from = known.since_start.range((stream.clone(), SpoolId([0; 16]))..);
        from.take_while(|((of, _), _)| of == stream).map(|(_, entry)| entry.clone()).collect()
    }
}
