//! One stream as the ingest thread holds it: its table, its sequences, its hot rows, and how its commits fare.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::RecordBatch;
use wire::schema::StreamField;
use wire::sealed::BatchHeader;
use wire::{Mark, SealedBatch, Seq, SpoolId, StreamName};

use super::errand::CommitEnd;
use crate::alias::{self, Aliases};
use crate::catalog::TableState;
use crate::class::Class;
use crate::delta::{DeltaTable, TableSnapshot};
use crate::hot::{Chunk, HotSet, InWal};
use crate::rescue::{Provenance, refit, rescue};
use crate::sequencer::{Sequence, Sequences, Verdict};
use crate::wal::Schemas;

const COMMIT_BACKOFF_MIN: Duration = Duration::from_millis(200);
const COMMIT_BACKOFF_MAX: Duration = Duration::from_secs(30);
/// A commit that takes longer is one that does not get on.
const COMMIT_SLOW: Duration = Duration::from_secs(30);

/// How the commits of a stream fare.
#[derive(Debug, Default)]
pub(super) struct Commits {
    /// Since when one is under way.
    pub(super) running: Option<Instant>,
    failures: u32,
    pub(super) not_before: Option<Instant>,
}

impl Commits {
    /// Whether they fail or hang.
    pub(super) fn struggle(&self) -> bool {
        self.failures > 0 || self.running.is_some_and(|since| since.elapsed() > COMMIT_SLOW)
    }

    /// Whether the next one has to wait.
    pub(super) fn wait(&self, now: Instant) -> bool {
        self.not_before.is_some_and(|until| until > now)
    }

    pub(super) fn ended(&mut self, end: &CommitEnd) {
        self.running = None;
        self.not_before = None;
        if let CommitEnd::Failed { .. } = end {
            self.failures += 1;
            let wait = COMMIT_BACKOFF_MIN.saturating_mul(1 << self.failures.min(10)).min(COMMIT_BACKOFF_MAX);
            self.not_before = Some(Instant::now() + wait);
        } else {
            self.failures = 0;
        }
    }
}

#[derive(Debug)]
pub(super) struct Stream {
    pub(super) name: StreamName,
    pub(super) table: DeltaTable,
    pub(super) snapshot: TableSnapshot,
    pub(super) hot: HotSet,
    pub(super) commits: Commits,
    /// That of its batches which goes first.
    pub(super) class: Class,
    sequences: Sequences,
    aliases: Aliases,
    /// Those of its hot batches, and older ones.
    schemas: Schemas,
}

impl Stream {
    pub(super) fn new(name: StreamName, table: DeltaTable, aliases: Aliases) -> Self {
        let snapshot = table.snapshot();
        let hot = HotSet::new(snapshot.version);
        let (sequences, schemas, commits) = (Sequences::new(), Schemas::new(), Commits::default());
        Self { name, table, snapshot, hot, commits, class: Class::Readings, sequences, aliases, schemas }
    }

    pub(super) fn sequence(&mut self, spool: SpoolId) -> &mut Sequence {
        let committed = self.snapshot.txn.get(&spool).copied().unwrap_or_default();
        self.sequences.entry(spool).or_insert_with(|| Sequence::at(committed))
    }

    /// Whether it has ever heard of this spool.
    pub(super) fn knows(&self, spool: SpoolId) -> bool {
        self.sequences.contains_key(&spool) || self.snapshot.txn.contains_key(&spool)
    }

    /// What a batch is in its sequence.
    pub(super) fn judge(&mut self, batch: &SealedBatch) -> Verdict {
        let header = batch.header();
        self.sequence(header.spool).judge(header, batch.chain_crc())
    }

    /// A batch that was accepted and appended: its sequence goes on. What is to be shown when it is durable.
    pub(super) fn accept(&mut self, accepted: Accepted<'_>) -> Chunk {
        let header = accepted.batch.header();
        let mark = Mark { seq: header.seq, crc: accepted.batch.chain_crc() };
        self.class = self.class.min(Class::of(&header.edge, &header.stream));
        self.sequence(header.spool).advance(mark);
        self.schemas.entry(accepted.schema.id()).or_insert_with(|| Arc::clone(accepted.schema));
        let rows = self.fitted(accepted.rows, header, accepted.received_at_us);
        let wal = InWal { from: accepted.wal_from, bytes: accepted.batch.bytes().len() };
        Chunk::new(rows, header.spool, mark, wal, Instant::now())
    }

    fn fitted(&self, rows: &RecordBatch, header: &BatchHeader, received_at_us: i64) -> RecordBatch {
        let provenance = Provenance { edge: header.edge.clone(), spool: header.spool, seq: header.seq, received_at_us };
        rescue(&alias::rows(&self.aliases, rows), &provenance, &self.snapshot.fields)
    }

    /// The schemas of all batches that its hot rows came from.
    pub(super) fn schemas(&self) -> Schemas {
        self.schemas.clone()
    }

    /// The table has moved on, by our commit or another's: both halves change together.
    pub(super) fn apply(&mut self, table: DeltaTable, grace: Duration) {
        let snapshot = table.snapshot();
        if snapshot.version <= self.snapshot.version {
            return;
        }
        self.table = table;
        let mut forked = HashSet::new();
        for (spool, sequence) in &mut self.sequences {
            let Some(committed) = snapshot.txn.get(spool).copied() else { continue };
            if sequence.agrees_with(committed) {
                sequence.commit(committed);
            } else {
                // Another node took another history of this spool. The edge still holds ours: it frees by CRC.
                tracing::error!(stream = %self.name, %spool, at = %committed.seq, "spool was forked on another node");
                *sequence = Sequence::at(committed);
                forked.insert(*spool);
            }
        }
        let txn = Arc::clone(&snapshot.txn);
        let committed = |spool: &SpoolId| {
            if forked.contains(spool) {
                return Seq(u64::MAX - 1);
            }
            txn.get(spool).map_or(Seq(0), |mark| mark.seq)
        };
        self.hot.committed(snapshot.version, committed, Instant::now() + grace);
        if retyped(&self.snapshot.fields, &snapshot.fields) {
            self.hot.refit(snapshot.version, |rows| refit(rows, &snapshot.fields));
        }
        self.snapshot = snapshot;
    }

    /// What readers see of it (rule 4).
    pub(super) fn state(&self) -> TableState {
        TableState { snapshot: self.snapshot.clone(), hot: self.hot.clone() }
    }
}

/// Whether a field has another type than it had.
fn retyped(before: &[StreamField], now: &[StreamField]) -> bool {
    before.iter().any(|field| now.iter().any(|other| other.name == field.name && other.kind != field.kind))
}

/// See [`Stream::accept`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Accepted<'a> {
    pub(super) batch: &'a SealedBatch,
    pub(super) schema: &'a Arc<wire::StreamSchema>,
    pub(super) rows: &'a RecordBatch,
    pub(super) received_at_us: i64,
    pub(super) wal_from: segment_log::Position,
}
