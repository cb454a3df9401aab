//! Hot rows of one table: durable, not yet known to be in the Delta table.
//!
//! A [`HotSet`] is immutable; it is replaced as a whole together with the snapshot (rule 4). Batches are kept in
//! chunks in the order of arrival. Small chunks are merged geometrically, [`FAN_IN`] of about one size into one of the
//! next, because a scan pays for each batch: 30,000 batches of 10 rows cost 60 times what the same rows merged cost,
//! and merging them 0.13 CPU-seconds per million rows (decision 0002). A chunk still tells each (spool, seq).
//! What a commit takes is frozen first, so that merging never reaches into it. Committed chunks stay for a grace time
//! with the version that holds them, for queries that froze an older snapshot.

use std::collections::BTreeSet;
use std::collections::hash_map::{Entry, HashMap};
use std::sync::Arc;
use std::time::Instant;

use arrow_array::RecordBatch;
use arrow_array::cast::AsArray;
use arrow_array::types::TimestampMicrosecondType;
use arrow_select::concat::concat_batches;
use segment_log::Position;
use wire::hot::{HotAnswer, HotRows, HotRun};
use wire::{BATCH_DATES_MAX, DAY_US, Mark, Seq, SpoolId};

/// How many chunks of about one size become one.
const FAN_IN: usize = 8;
/// Chunks of this many rows are not merged further.
const CHUNK_ROWS_MAX: usize = 8_192;

/// First and last batch of one spool in a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub first: Seq,
    pub last: Mark,
}

/// One or more batches, merged.
#[derive(Debug, Clone)]
pub struct Chunk {
    rows: HotRows,
    spans: HashMap<SpoolId, Span>,
    dates: BTreeSet<i64>,
    bytes: usize,
    wal: InWal,
    since: Instant,
}

/// Where the WAL holds a batch, or the oldest of several, and how many bytes they are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InWal {
    pub from: Position,
    pub bytes: usize,
}

impl Chunk {
    /// A chunk of one batch, whose rows have the table's columns.
    pub fn new(rows: RecordBatch, spool: SpoolId, mark: Mark, wal: InWal, since: Instant) -> Self {
        let ts = rows.column(0).as_primitive::<TimestampMicrosecondType>();
        let mut dates = BTreeSet::new();
        let mut last = None;
        for us in ts.values() {
            let date = us.div_euclid(DAY_US);
            if last != Some(date) {
                dates.insert(date);
                last = Some(date);
            }
        }
        let bytes = rows.get_array_memory_size();
        let runs = vec![HotRun { spool, seq: mark.seq, start: 0, rows: rows.num_rows() }];
        let spans = HashMap::from([(spool, Span { first: mark.seq, last: mark })]);
        Self { rows: HotRows::new(rows, runs), spans, dates, bytes, wal, since }
    }

    fn len(&self) -> usize {
        self.rows.rows.num_rows()
    }

    fn size_class(&self) -> u32 {
        (self.len().max(1) as f64).log(FAN_IN as f64) as u32
    }

    /// Merges neighbours, which have equal columns.
    fn merged(parts: &[Self]) -> Option<Self> {
        let (first, last) = (parts.first()?, parts.last()?);
        // Older chunks may lack columns that the table got since.
        if parts.iter().any(|part| part.rows.rows.schema() != last.rows.rows.schema()) {
            return None;
        }
        let dates: BTreeSet<i64> = parts.iter().flat_map(|part| part.dates.iter().copied()).collect();
        if dates.len() > BATCH_DATES_MAX {
            return None;
        }
        let rows = concat_batches(&last.rows.rows.schema(), parts.iter().map(|part| &part.rows.rows)).ok()?;
        let mut runs = Vec::with_capacity(parts.iter().map(|part| part.rows.runs.len()).sum());
        let mut spans = HashMap::new();
        let mut offset = 0;
        for part in parts {
            runs.extend(part.rows.runs.iter().map(|run| HotRun { start: run.start + offset, ..*run }));
            offset += part.len();
            extend_spans(&mut spans, &part.spans);
        }
        let bytes = rows.get_array_memory_size();
        let wal = InWal {
            from: parts.iter().map(|part| part.wal.from).min()?,
            bytes: parts.iter().map(|part| part.wal.bytes).sum(),
        };
        let times = parts.iter().filter_map(|part| part.rows.times);
        let times = times.reduce(|one, other| (one.0.min(other.0), one.1.max(other.1)));
        Some(Self { rows: HotRows { rows, runs, times }, spans, dates, bytes, wal, since: first.since })
    }

    /// What is left of it above what is committed; `None` when nothing is.
    fn above(&self, committed: impl Fn(&SpoolId) -> Seq) -> Option<Self> {
        if self.spans.iter().all(|(spool, span)| span.first > committed(spool)) {
            return Some(self.clone());
        }
        let kept: Vec<HotRun> = self.rows.runs.iter().copied().filter(|run| run.seq > committed(&run.spool)).collect();
        if kept.is_empty() {
            return None;
        }
        let slices: Vec<RecordBatch> = kept.iter().map(|run| self.rows.rows.slice(run.start, run.rows)).collect();
        let rows = concat_batches(&self.rows.rows.schema(), &slices).ok()?;
        let mut start = 0;
        let runs = kept
            .iter()
            .map(|run| {
                let moved = HotRun { start, ..*run };
                start += run.rows;
                moved
            })
            .collect();
        let spans = self
            .spans
            .iter()
            .filter(|(spool, span)| span.last.seq > committed(spool))
            .map(|(spool, span)| (*spool, Span { first: span.first.max(committed(spool).next()), last: span.last }))
            .collect();
        let bytes = rows.get_array_memory_size();
        Some(Self { rows: HotRows::new(rows, runs), spans, bytes, ..self.clone() })
    }
}

fn extend_spans(spans: &mut HashMap<SpoolId, Span>, more: &HashMap<SpoolId, Span>) {
    for (spool, span) in more {
        match spans.entry(*spool) {
            Entry::Occupied(mut known) => known.get_mut().last = span.last,
            Entry::Vacant(new) => {
                new.insert(*span);
            }
        }
    }
}

/// Chunks that a version of the table holds, kept for a while.
#[derive(Debug, Clone)]
struct Grace {
    version: u64,
    until: Instant,
    chunks: Vec<Arc<Chunk>>,
}

/// What a commit takes.
#[derive(Debug, Clone, Default)]
pub struct Taking {
    pub rows: Vec<RecordBatch>,
    pub marks: Vec<(SpoolId, Seq, Mark)>,
}

/// The hot rows of one table.
#[derive(Debug, Clone)]
pub struct HotSet {
    /// In order of arrival; the first `frozen` of them belong to a commit that is under way.
    chunks: Vec<Arc<Chunk>>,
    frozen: usize,
    grace: Vec<Grace>,
    /// The oldest version that can be answered for.
    answers_from: u64,
    version: u64,
}

impl HotSet {
    /// No rows above the table's version.
    pub fn new(version: u64) -> Self {
        Self { chunks: Vec::new(), frozen: 0, grace: Vec::new(), answers_from: version, version }
    }

    /// Adds a batch and merges what has become worth it.
    pub fn push(&mut self, chunk: Chunk) {
        self.chunks.push(Arc::new(chunk));
        while let Some(from) = self.mergeable() {
            let parts: Vec<Chunk> = self.chunks[from..].iter().map(|chunk| chunk.as_ref().clone()).collect();
            let Some(merged) = Chunk::merged(&parts) else { return };
            self.chunks.truncate(from);
            self.chunks.push(Arc::new(merged));
        }
    }

    /// Where the last [`FAN_IN`] chunks begin, when they are of one size class and small.
    fn mergeable(&self) -> Option<usize> {
        let from = self.chunks.len().checked_sub(FAN_IN).filter(|from| *from >= self.frozen)?;
        let class = self.chunks.last()?.size_class();
        let rows: usize = self.chunks[from..].iter().map(|chunk| chunk.len()).sum();
        let alike = self.chunks[from..].iter().all(|chunk| chunk.size_class() <= class);
        (alike && rows <= CHUNK_ROWS_MAX).then_some(from)
    }

    /// Decoded bytes, those in their grace time left out.
    pub fn bytes(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.bytes).sum()
    }

    /// Rows that are not committed.
    pub fn rows(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.len()).sum()
    }

    /// Whether nothing waits for a commit.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// When the oldest of it became hot.
    pub fn since(&self) -> Option<Instant> {
        self.chunks.first().map(|chunk| chunk.since)
    }

    /// The oldest WAL position that it still needs.
    pub fn wal_from(&self) -> Option<Position> {
        self.chunks.iter().map(|chunk| chunk.wal.from).min()
    }

    /// Bytes that it needs in the WAL.
    pub fn wal_bytes(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.wal.bytes).sum()
    }

    /// The WAL holds all of it from this position on, too.
    pub fn moved_in_wal(&mut self, to: Position) {
        for chunk in &mut self.chunks {
            Arc::make_mut(chunk).wal.from = to;
        }
    }

    /// Freezes and returns what the next commit takes: whole batches in order, up to `dates_max` dates and `bytes_max`
    /// decoded bytes, and at least one.
    pub fn take(&mut self, dates_max: usize, bytes_max: usize) -> Taking {
        let mut bytes = 0;
        let mut dates = BTreeSet::new();
        let mut spans = HashMap::new();
        let mut rows = Vec::new();
        self.frozen = 0;
        for chunk in &self.chunks {
            let more: BTreeSet<i64> = dates.union(&chunk.dates).copied().collect();
            if (more.len() > dates_max || bytes + chunk.bytes > bytes_max) && self.frozen > 0 {
                break;
            }
            bytes += chunk.bytes;
            dates = more;
            extend_spans(&mut spans, &chunk.spans);
            if chunk.len() > 0 {
                rows.push(chunk.rows.rows.clone());
            }
            self.frozen += 1;
        }
        Taking { rows, marks: spans.into_iter().map(|(spool, span)| (spool, span.first, span.last)).collect() }
    }

    /// The table is at `version` now, with `committed` per spool: what that covers goes into its grace time.
    pub fn committed(&mut self, version: u64, committed: impl Fn(&SpoolId) -> Seq, until: Instant) {
        let (mut kept, mut covered) = (Vec::new(), Vec::new());
        let before = self.chunks.len();
        for chunk in self.chunks.drain(..) {
            match chunk.above(&committed) {
                Some(rest) if rest.rows.runs.len() == chunk.rows.runs.len() => kept.push(chunk),
                Some(rest) => {
                    // Committed by another node up to the middle of a chunk. An older snapshot is not answered then.
                    self.answers_from = version;
                    kept.push(Arc::new(rest));
                }
                None => covered.push(chunk),
            }
        }
        if version > self.version + 1 {
            // Which of it the versions in between have is not known here.
            self.answers_from = version;
        }
        // When nothing was covered (another node's rows, or files that were compacted), a commit under way still has the
        // chunks that it took.
        let frozen = if covered.is_empty() && kept.len() == before { self.frozen } else { 0 };
        (self.chunks, self.frozen, self.version) = (kept, frozen, version);
        self.grace.push(Grace { version, until, chunks: covered });
    }

    /// Columns have other types from this version on: rows are fitted to them, and older versions are not answered for,
    /// because their readers want the types of before.
    pub fn refit(&mut self, version: u64, refit: impl Fn(&RecordBatch) -> RecordBatch) {
        for chunk in &mut self.chunks {
            let chunk = Arc::make_mut(chunk);
            chunk.rows.rows = refit(&chunk.rows.rows);
            chunk.bytes = chunk.rows.rows.get_array_memory_size();
        }
        self.grace.clear();
        self.answers_from = self.answers_from.max(version);
    }

    /// Forgets what has been in its grace time long enough. Says whether anything was.
    pub fn expire(&mut self, now: Instant) -> bool {
        let expired = self.grace.iter().take_while(|grace| grace.until <= now).count();
        for grace in self.grace.drain(..expired) {
            self.answers_from = self.answers_from.max(grace.version);
        }
        expired > 0
    }

    /// Ends grace times, the oldest first, until at most so many decoded bytes are in them: a query that froze an older
    /// state is told to look again. Says whether any was ended.
    pub fn shorten_grace(&mut self, bytes_max: usize) -> bool {
        let bytes = |grace: &Grace| grace.chunks.iter().map(|chunk| chunk.bytes).sum::<usize>();
        let mut all = self.grace.iter().map(bytes).sum::<usize>();
        let mut ended = 0;
        while all > bytes_max {
            all -= bytes(&self.grace[ended]);
            self.answers_from = self.answers_from.max(self.grace[ended].version);
            ended += 1;
        }
        self.grace.drain(..ended);
        ended > 0
    }

    /// Every durable row above `txn` at version `at`, when the table's newest version is `newest` (rule 4).
    pub fn answer(&self, at: u64, newest: u64) -> HotAnswer {
        if at < self.answers_from || at > newest {
            return HotAnswer::Stale(newest.max(at));
        }
        let graced = self.grace.iter().filter(|grace| grace.version > at).flat_map(|grace| &grace.chunks);
        HotAnswer::Rows(graced.chain(&self.chunks).map(|chunk| chunk.rows.clone()).collect())
    }
}

#[cfg(test)]
mod tests;
