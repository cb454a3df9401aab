//! The single writer: one thread that admits batches, makes them durable, shows them, and starts commits.
//!
//! What wakes it: a request, a finished commit, the tick. What it owns: the WAL, all sequences, the hot rows, and the
//! right to replace a [`TableState`]. The order for a batch is: admit, append, sync, show in hot, ack; so that
//! acknowledged <= visible <= sent (rule 2). Requests that wait together share one sync.
//! Commits run beside it, at most one per stream, and report back; a stream that cannot commit keeps its own rows and
//! is pushed back alone. It stops when it is told to, after committing what is hot, or dies with the process when a
//! sync fails.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arrow_array::{RecordBatch, RecordBatchOptions, new_null_array};
use segment_log::{AppendError, Options, Position};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use wire::schema::StreamField;
use wire::sealed::BodyError;
use wire::{Acks, Mark, Refusal, RefusedRequest, SealedBatch, Seq, SpoolId, StreamAck, StreamName, StreamSchema};

use crate::catalog::{Catalogue, TableState};
use crate::config::Settings;
use crate::delta::{self, CommitError, DeltaTable, TableError, TableSnapshot};
use crate::hot::{Chunk, HotSet, Taking};
use crate::metrics::Metrics;
use crate::rescue::{Provenance, rescue, row_schema};
use crate::sequencer::{Sequence, Sequences, Verdict};
use crate::store::{Store, StoreError, list_streams};
use crate::wal::{Found, Wal};

/// A commit takes at most so many times the bytes that make one due: it sorts a copy of them.
const COMMIT_TIMES: usize = 4;
/// Committed rows that wait for older queries may take so large a part of hot's memory: one in four.
const GRACE_SHARE: usize = 4;
const TICK: Duration = Duration::from_millis(100);
/// Bytes that share one sync at most.
const GROUP_BYTES_MAX: usize = 32 << 20;
/// Kept free in the WAL for its own records.
const WAL_RESERVE_BYTES: u64 = 1 << 20;
const COMMIT_BACKOFF_MIN: Duration = Duration::from_millis(200);
const COMMIT_BACKOFF_MAX: Duration = Duration::from_secs(30);
/// How long a clean stop waits for commits; what is not committed then is in the WAL.
const STOP_MAX: Duration = Duration::from_secs(30);
const RETRY_AFTER_MS: u64 = 500;

/// A batch as the door hands it over: undamaged, its rows decoded, or the reason why they cannot be.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) batch: SealedBatch,
    pub(crate) schema: Arc<StreamSchema>,
    pub(crate) rows: Result<RecordBatch, BodyError>,
}

type Reply = oneshot::Sender<Result<Acks, RefusedRequest>>;

/// What the thread is asked to do.
#[derive(Debug)]
pub(crate) enum Job {
    Batches { batches: Vec<Arrived>, reply: Reply },
    Positions { spools: Vec<SpoolId>, reply: Reply },
    Committed { stream: StreamName, table: Box<DeltaTable>, failure: Option<String>, rows: u64 },
    Stop,
}

/// Why the node cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("open the write-ahead log")]
    Wal(#[from] segment_log::OpenError),
    #[error("read the write-ahead log")]
    Replay(#[from] segment_log::ReadError),
    #[error("open the store")]
    Store(#[from] StoreError),
    #[error("open a table")]
    Table(#[from] TableError),
    #[error("commit while recovering")]
    Commit(#[from] CommitError),
    #[error("start the ingest thread")]
    Thread(std::io::Error),
}

#[derive(Debug)]
struct Stream {
    table: DeltaTable,
    snapshot: TableSnapshot,
    sequences: Sequences,
    hot: HotSet,
    committing: bool,
    failures: u32,
    not_before: Option<Instant>,
}

impl Stream {
    fn new(table: DeltaTable) -> Self {
        let snapshot = table.snapshot();
        let hot = HotSet::new(snapshot.version);
        Self { table, snapshot, sequences: Sequences::new(), hot, committing: false, failures: 0, not_before: None }
    }

    fn sequence(&mut self, spool: SpoolId) -> &mut Sequence {
        let committed = self.snapshot.txn.get(&spool).copied().unwrap_or_default();
        self.sequences.entry(spool).or_insert_with(|| Sequence::at(committed))
    }

    /// The table has moved on, by our commit or another's: both halves change together.
    fn apply(&mut self, name: &StreamName, snapshot: TableSnapshot, grace: Duration) {
        if snapshot.version <= self.snapshot.version {
            return;
        }
        let mut forked = HashSet::new();
        for (spool, sequence) in &mut self.sequences {
            let Some(committed) = snapshot.txn.get(spool).copied() else { continue };
            if sequence.agrees_with(committed) {
                sequence.commit(committed);
            } else {
                // Another node took another history of this spool. The edge still holds ours: it frees by CRC.
                tracing::error!(stream = %name, %spool, at = %committed.seq, "spool was forked on another node");
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
        self.snapshot = snapshot;
    }
}

/// The thread's own state.
#[derive(Debug)]
pub(crate) struct Ingest {
    settings: Settings,
    node: String,
    store: Store,
    runtime: Handle,
    wal: Wal,
    streams: BTreeMap<StreamName, Stream>,
    catalogue: Arc<Catalogue>,
    metrics: Arc<Metrics>,
    sender: SyncSender<Job>,
    jobs: Receiver<Job>,
    stopping: Option<Instant>,
}

/// A batch that is appended and not yet synced.
struct Staged {
    stream: StreamName,
    chunk: Chunk,
}

/// A request whose answer waits for the sync.
struct Waiting {
    reply: Reply,
    answer: Result<Acks, RefusedRequest>,
    touched: HashSet<(SpoolId, StreamName)>,
}

fn now_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

impl Ingest {
    /// Opens WAL and tables, and puts what the tables do not have back into hot. Blocks; not for an async thread.
    pub(crate) fn open(
        settings: Settings,
        store: Store,
        catalogue: Arc<Catalogue>,
        metrics: Arc<Metrics>,
        runtime: Handle,
    ) -> Result<(Self, SyncSender<Job>), StartError> {
        let options = Options {
            segment_bytes: settings.wal.segment_bytes.0,
            max_bytes: settings.wal.max_bytes.0,
            reserve_bytes: WAL_RESERVE_BYTES.min(settings.wal.segment_bytes.0 / 8),
        };
        let (wal, opening) = Wal::open(&settings.data_dir.join("wal"), options)?;
        for incident in &opening.incidents {
            tracing::error!(
                ?incident,
                "the wal is damaged: edges still hold what was not committed, and send it again"
            );
        }
        let (sender, jobs) = sync_channel(settings.limits.requests_waiting);
        let node = node_name(&settings.data_dir);
        let mut ingest = Self {
            settings,
            node,
            store,
            runtime,
            wal,
            streams: BTreeMap::new(),
            catalogue,
            metrics,
            sender: sender.clone(),
            jobs,
            stopping: None,
        };
        ingest.open_tables()?;
        ingest.recover()?;
        for name in ingest.streams.keys().cloned().collect::<Vec<_>>() {
            ingest.publish(&name);
        }
        Ok((ingest, sender))
    }

    fn open_tables(&mut self) -> Result<(), StartError> {
        for name in self.runtime.block_on(list_streams(&self.store))? {
            if !self.streams.contains_key(&name)
                && let Some(table) = self.runtime.block_on(DeltaTable::open(&self.store, &name))?
            {
                self.streams.insert(name, Stream::new(table));
            }
        }
        Ok(())
    }

    fn recover(&mut self) -> Result<(), StartError> {
        let started = Instant::now();
        let mut again = 0_u64;
        let directory = self.settings.data_dir.join("wal");
        let (settings, store, runtime) = (&self.settings, &self.store, &self.runtime);
        let streams = &mut self.streams;
        self.wal.replay(|found| {
                let replayed = match found {
                    Found::Damaged(range) => {
                        tracing::error!(directory = %directory.display(), range, "wal record lost; its edge still holds it");
                        return Ok(());
                    }
                    Found::Batch(replayed) => replayed,
                };
                let header = replayed.batch.header();
                let fields = if header.void.is_some() { &[] } else { replayed.schema.fields() };
                if !streams.contains_key(&header.stream) {
                        let table = runtime.block_on(DeltaTable::create(store, &header.stream, fields))?;
                    streams.insert(header.stream.clone(), Stream::new(table));
                }
                let Some(stream) = streams.get_mut(&header.stream) else { return Ok(()) };
                if stream.sequence(header.spool).judge(header, replayed.batch.chain_crc()) != Verdict::Accept {
                    return Ok(());
                }
                let Ok(rows) = replayed.batch.decode(&replayed.schema) else {
                    tracing::error!(stream = %header.stream, seq = %header.seq, "a batch of the wal does not decode");
                    return Ok(());
                };
                extend_fields(stream, &header.stream, fields, settings.hot.grace.0, runtime)?;
                again += u64::from(header.rows);
                let mark = Mark { seq: header.seq, crc: replayed.batch.chain_crc() };
                let rows = provenanced(&rows, &replayed.batch, replayed.received_at_us, &stream.snapshot);
                stream.sequence(header.spool).advance(mark);
                stream.hot.push(Chunk::new(rows, header.spool, mark, replayed.position, Instant::now()));
                if stream.hot.bytes() > settings.commit.max_bytes.bytes() {
                    commit_now(stream, &header.stream, settings, runtime)?;
                }
                Ok::<(), StartError>(())
            })?;
        tracing::info!(rows = again, streams = self.streams.len(), took = ?started.elapsed(), "wal replayed");
        Ok(())
    }

    /// The thread's loop.
    pub(crate) fn run(mut self) {
        loop {
            match self.jobs.recv_timeout(TICK) {
                Ok(job) => self.work(job),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.tick();
            if self.stopped() {
                break;
            }
        }
        if let Err(error) = self.wal.mark() {
            die(&error);
        }
    }

    /// One job, and those that wait behind it, under one sync.
    fn work(&mut self, first: Job) {
        let mut staged = Vec::new();
        let mut waiting = Vec::new();
        // What may read tables again, answer positions or free segments comes when all that is staged is synced and shown.
        let (mut asked, mut finished) = (Vec::new(), Vec::new());
        let mut bytes = 0;
        let mut next = Some(first);
        while let Some(job) = next.take() {
            match job {
                Job::Batches { batches, reply } => {
                    bytes += batches.iter().map(|arrived| arrived.batch.bytes().len()).sum::<usize>();
                    waiting.push(self.admit(batches, reply, &mut staged));
                }
                Job::Positions { spools, reply } => asked.push((spools, reply)),
                Job::Committed { stream, table, failure, rows } => finished.push((stream, table, failure, rows)),
                Job::Stop => self.stopping = Some(Instant::now()),
            }
            if bytes < GROUP_BYTES_MAX {
                next = self.jobs.try_recv().ok();
            }
        }
        if !staged.is_empty() {
            if let Err(error) = self.wal.sync() {
                die(&error);
            }
            self.show(staged);
        }
        for Waiting { reply, answer, touched } in waiting {
            let answer = answer.map(|acks| Acks { acks: self.acks(&touched), ..acks });
            // A caller that has gone asks again and is told by `positions`.
            reply.send(answer).ok();
        }
        for (stream, table, failure, rows) in finished {
            self.committed(&stream, *table, failure, rows);
        }
        for (spools, reply) in asked {
            let answer = self.positions(&spools);
            reply.send(answer).ok();
        }
    }

    fn show(&mut self, staged: Vec<Staged>) {
        let mut shown = HashSet::new();
        for Staged { stream: name, chunk } in staged {
            let Some(stream) = self.streams.get_mut(&name) else { continue };
            // The table may have been read again since it was staged, and have it from another node.
            let txn = Arc::clone(&stream.snapshot.txn);
            let committed = |spool: &SpoolId| txn.get(spool).map_or(Seq(0), |mark| mark.seq);
            if let Some(chunk) = chunk.above(committed) {
                stream.hot.push(chunk);
                shown.insert(name);
            }
        }
        for name in &shown {
            self.publish(name);
        }
        self.metrics.wal_syncs.set(self.wal.syncs());
        self.metrics.wal_bytes.set(self.wal.bytes());
        self.metrics.hot_bytes.set(self.hot_bytes() as u64);
    }

    fn admit(&mut self, batches: Vec<Arrived>, reply: Reply, staged: &mut Vec<Staged>) -> Waiting {
        let mut acks = Acks { node: self.node.clone(), ..Acks::default() };
        let mut touched = HashSet::new();
        let mut stopped = HashSet::new();
        let mut refused = None;
        for arrived in batches {
            let header = arrived.batch.header().clone();
            let rows = u64::from(header.rows);
            self.metrics.rows_received.add(rows);
            if stopped.contains(&(header.spool, header.stream.clone())) {
                self.metrics.rows_pushed_back.add(rows);
                continue;
            }
            touched.insert((header.spool, header.stream.clone()));
            let outcome = self.admit_batch(arrived, staged);
            match outcome {
                Ok(Verdict::Accept) => self.metrics.rows_durable.add(rows),
                Ok(_) => self.metrics.rows_duplicate.add(rows),
                Err(Turned::Back(answer)) => {
                    self.metrics.rows_pushed_back.add(rows);
                    stopped.insert((header.spool, header.stream));
                    refused.get_or_insert(answer);
                }
                Err(Turned::Refused(reason)) => {
                    self.metrics.rows_refused.add(rows);
                    stopped.insert((header.spool, header.stream.clone()));
                    acks.refused.push(Refusal { spool: header.spool, stream: header.stream, seq: header.seq, reason });
                }
            }
        }
        let answer = match refused {
            Some(answer) => Err(answer),
            None => Ok(acks),
        };
        Waiting { reply, answer, touched }
    }

    fn admit_batch(&mut self, arrived: Arrived, staged: &mut Vec<Staged>) -> Result<Verdict, Turned> {
        let header = arrived.batch.header();
        let (name, spool, crc) = (header.stream.clone(), header.spool, arrived.batch.chain_crc());
        // First of all, and from the bytes alone: a batch at fault makes no table and every node refuses it.
        let rows = arrived.rows.map_err(|error| Turned::Refused(error.to_string()))?;
        // A void batch has no rows, so its schema says nothing about the table.
        let fields = if header.void.is_some() { &[] } else { arrived.schema.fields() };
        self.ensure_table(&name, fields).map_err(|error| Turned::unready(&name, &error))?;
        let Some(stream) = self.streams.get_mut(&name) else { return Err(Turned::back(&name)) };
        let mut verdict = stream.sequence(spool).judge(header, crc);
        if matches!(verdict, Verdict::Gap { .. } | Verdict::Forked) {
            // Another node may have committed meanwhile: look before saying no (rule 3).
            self.reload(&name).map_err(|error| Turned::unready(&name, &error))?;
            let Some(stream) = self.streams.get_mut(&name) else { return Err(Turned::back(&name)) };
            verdict = stream.sequence(spool).judge(header, crc);
        }
        match verdict {
            Verdict::Duplicate => return Ok(verdict),
            Verdict::Gap { expected } => {
                return Err(Turned::Back(RefusedRequest::Gap { spool, stream: name, expected, got: header.seq }));
            }
            Verdict::Forked => {
                return Err(Turned::Back(RefusedRequest::Forked { spool, stream: name, at: header.seq }));
            }
            Verdict::Accept => {}
        }
        if self.hot_bytes() + rows.get_array_memory_size() > self.settings.hot.max_bytes.bytes() {
            return Err(Turned::back(&name));
        }
        let Some(stream) = self.streams.get_mut(&name) else { return Err(Turned::back(&name)) };
        let received_at_us = now_us();
        let rows = provenanced(&rows, &arrived.batch, received_at_us, &stream.snapshot);
        let position = match self.wal.append(&arrived.batch, &arrived.schema, received_at_us) {
            Ok(position) => position,
            Err(AppendError::Full) => return Err(Turned::back(&name)),
            Err(AppendError::TooLarge { .. }) => {
                return Err(Turned::Back(RefusedRequest::TooLarge { bytes_max: self.wal_payload_max() }));
            }
            Err(error) => die(&error),
        };
        let mark = Mark { seq: arrived.batch.header().seq, crc };
        stream.sequence(spool).advance(mark);
        staged.push(Staged { stream: name, chunk: Chunk::new(rows, spool, mark, position, Instant::now()) });
        Ok(Verdict::Accept)
    }

    fn wal_payload_max(&self) -> usize {
        self.settings.wal.segment_bytes.bytes()
    }

    /// The stream's table, with every field of the batch that it can have.
    fn ensure_table(&mut self, name: &StreamName, fields: &[StreamField]) -> Result<(), StartError> {
        if !self.streams.contains_key(name) {
            let table = self.runtime.block_on(DeltaTable::create(&self.store, name, fields))?;
            tracing::info!(stream = %name, "table appears");
            self.streams.insert(name.clone(), Stream::new(table));
            self.publish(name);
        }
        let Some(stream) = self.streams.get_mut(name) else { return Ok(()) };
        let before = stream.snapshot.version;
        let extended = extend_fields(stream, name, fields, self.settings.hot.grace.0, &self.runtime);
        if stream.snapshot.version != before {
            self.publish(name);
        }
        extended
    }

    fn reload(&mut self, name: &StreamName) -> Result<(), TableError> {
        let Some(stream) = self.streams.get_mut(name) else { return Ok(()) };
        let snapshot = self.runtime.block_on(stream.table.reload())?;
        stream.apply(name, snapshot, self.settings.hot.grace.0);
        self.publish(name);
        Ok(())
    }

    fn positions(&mut self, spools: &[SpoolId]) -> Result<Acks, RefusedRequest> {
        let mut reloaded = self.open_tables().map_err(|error| error.to_string());
        for name in self.streams.keys().cloned().collect::<Vec<_>>() {
            reloaded = reloaded.and_then(|()| self.reload(&name).map_err(|error| error.to_string()));
        }
        reloaded.map_err(|detail| RefusedRequest::NotReady { detail })?;
        let mut touched = HashSet::new();
        for (name, stream) in &self.streams {
            for spool in spools {
                if stream.sequences.contains_key(spool) || stream.snapshot.txn.contains_key(spool) {
                    touched.insert((*spool, name.clone()));
                }
            }
        }
        Ok(Acks { node: self.node.clone(), acks: self.acks(&touched), refused: Vec::new() })
    }

    fn acks(&mut self, touched: &HashSet<(SpoolId, StreamName)>) -> Vec<StreamAck> {
        let mut acks = Vec::with_capacity(touched.len());
        for (spool, name) in touched {
            if let Some(stream) = self.streams.get_mut(name) {
                let sequence = stream.sequence(*spool);
                let (durable, committed) = (sequence.durable(), sequence.committed());
                acks.push(StreamAck { spool: *spool, stream: name.clone(), durable, committed });
            }
        }
        acks
    }

    fn publish(&self, name: &StreamName) {
        if let Some(stream) = self.streams.get(name) {
            let state = TableState { snapshot: stream.snapshot.clone(), hot: stream.hot.clone() };
            self.catalogue.replace(name, state);
        }
    }

    fn hot_bytes(&self) -> usize {
        self.streams.values().map(|stream| stream.hot.bytes()).sum()
    }

    fn tick(&mut self) {
        let now = Instant::now();
        let grace_bytes_max = self.settings.hot.max_bytes.bytes() / GRACE_SHARE / self.streams.len().max(1);
        for name in self.streams.keys().cloned().collect::<Vec<_>>() {
            let Some(stream) = self.streams.get_mut(&name) else { continue };
            if stream.hot.expire(now) | stream.hot.shorten_grace(grace_bytes_max) {
                self.publish(&name);
            }
        }
        // Under memory pressure the largest goes first, and the others after it while the pressure lasts.
        let mut due: Vec<(usize, StreamName)> =
            self.streams.iter().map(|(name, stream)| (stream.hot.bytes(), name.clone())).collect();
        due.sort_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
        let mut pressure = self.hot_bytes() > self.settings.hot.max_bytes.bytes() / 2;
        for (bytes, name) in due {
            let Some(stream) = self.streams.get_mut(&name) else { continue };
            let old = stream.hot.since().is_some_and(|since| since + self.settings.commit.max_age.0 <= now);
            let large = bytes >= self.settings.commit.max_bytes.bytes();
            let waits = stream.not_before.is_some_and(|until| until > now) && self.stopping.is_none();
            if stream.committing || stream.hot.is_empty() || waits {
                continue;
            }
            if old || large || pressure || self.stopping.is_some() {
                pressure = false;
                self.start_commit(&name);
            }
        }
    }

    fn start_commit(&mut self, name: &StreamName) {
        let Some(stream) = self.streams.get_mut(name) else { return };
        let taking = stream.hot.take(self.settings.commit.max_partitions, commit_bytes_max(&self.settings));
        stream.committing = true;
        let mut table = stream.table.clone();
        let (stream_name, sender, runtime) = (name.clone(), self.sender.clone(), self.runtime.clone());
        let schema = row_schema(&stream.snapshot.fields);
        self.runtime.spawn_blocking(move || {
            let (failure, rows) = runtime.block_on(commit(&mut table, taking, &schema));
            let done = Job::Committed { stream: stream_name, table: Box::new(table), failure, rows };
            // The receiver is gone only when the process ends; the WAL has the rows.
            sender.send(done).ok();
        });
    }

    fn committed(&mut self, name: &StreamName, table: DeltaTable, failure: Option<String>, rows: u64) {
        let Some(stream) = self.streams.get_mut(name) else { return };
        stream.committing = false;
        let snapshot = table.snapshot();
        if snapshot.version > stream.snapshot.version {
            stream.table = table;
            stream.apply(name, snapshot, self.settings.hot.grace.0);
        }
        match failure {
            None => {
                stream.failures = 0;
                stream.not_before = None;
                self.metrics.commits.add(1);
                self.metrics.rows_committed.add(rows);
                maintain(name, &stream.snapshot, &self.runtime);
            }
            Some(reason) => {
                stream.failures += 1;
                let wait = COMMIT_BACKOFF_MIN.saturating_mul(1 << stream.failures.min(10)).min(COMMIT_BACKOFF_MAX);
                stream.not_before = Some(Instant::now() + wait);
                self.metrics.commits_failed.add(1);
                tracing::warn!(stream = %name, reason, ?wait, "commit not made; it starts again");
            }
        }
        if let Some(fault) = self.store.sync_failure() {
            die(&fault);
        }
        self.publish(name);
        let oldest = self.streams.values().filter_map(|stream| stream.hot.wal_from()).min();
        let free: Position = oldest.unwrap_or(self.wal.end());
        self.wal.free_before(free);
        self.metrics.hot_bytes.set(self.hot_bytes() as u64);
        self.metrics.wal_bytes.set(self.wal.bytes());
    }

    fn stopped(&self) -> bool {
        let Some(since) = self.stopping else { return false };
        let idle = self.streams.values().all(|stream| !stream.committing && stream.hot.is_empty());
        idle || since.elapsed() > STOP_MAX
    }
}

/// Why a batch was not taken.
enum Turned {
    /// For now, or because of the caller.
    Back(RefusedRequest),
    /// For ever, because of the batch.
    Refused(String),
}

impl Turned {
    /// The table cannot be read or extended now: only this stream waits.
    fn unready(stream: &StreamName, error: &dyn std::error::Error) -> Self {
        tracing::warn!(%stream, reason = chain(error), "stream is pushed back");
        Self::back(stream)
    }

    fn back(stream: &StreamName) -> Self {
        Self::Back(RefusedRequest::PushedBack { stream: stream.clone(), retry_after_ms: RETRY_AFTER_MS })
    }
}

/// A sync that fails leaves memory and disk apart: nothing that follows could be trusted, so nothing follows.
fn die(error: &dyn std::fmt::Display) -> ! {
    tracing::error!(%error, "the disk did not keep what was written: stopping");
    std::process::exit(74)
}

/// Adds the fields that the table does not have, in a commit of its own, before a row of them is shown.
fn extend_fields(
    stream: &mut Stream,
    name: &StreamName,
    fields: &[StreamField],
    grace: Duration,
    runtime: &Handle,
) -> Result<(), StartError> {
    let known: HashSet<&str> = stream.snapshot.fields.iter().map(|field| field.name.as_str()).collect();
    if fields.iter().all(|field| known.contains(field.name.as_str())) {
        return Ok(());
    }
    let snapshot = match runtime.block_on(stream.table.add_fields(fields)) {
        Err(CommitError::Moved { .. }) => {
            runtime.block_on(stream.table.reload())?;
            runtime.block_on(stream.table.add_fields(fields))?
        }
        other => other?,
    };
    stream.apply(name, snapshot, grace);
    Ok(())
}

fn provenanced(rows: &RecordBatch, batch: &SealedBatch, received_at_us: i64, snapshot: &TableSnapshot) -> RecordBatch {
    let header = batch.header();
    let provenance = Provenance { edge: header.edge.clone(), spool: header.spool, seq: header.seq, received_at_us };
    rescue(rows, &provenance, &snapshot.fields)
}

/// Commits what was taken; after any failure reads the table again, so that what is there counts.
async fn commit(table: &mut DeltaTable, taking: Taking, schema: &arrow_schema::SchemaRef) -> (Option<String>, u64) {
    let rows: Vec<RecordBatch> = taking.rows.iter().filter_map(|rows| widened(rows, schema)).collect();
    let count = rows.iter().map(|rows| rows.num_rows() as u64).sum();
    match table.commit(&rows, &taking.marks).await {
        Ok(_) => (None, count),
        Err(error) => {
            let mut reason = chain(&error);
            if let Err(error) = table.reload().await {
                reason = format!("{reason}; {}", chain(&error));
            }
            (Some(reason), 0)
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

fn commit_bytes_max(settings: &Settings) -> usize {
    settings.commit.max_bytes.bytes().saturating_mul(COMMIT_TIMES)
}

/// Rows that became hot before the table got its newest fields, with nulls for those.
fn widened(rows: &RecordBatch, schema: &arrow_schema::SchemaRef) -> Option<RecordBatch> {
    if rows.schema().fields() == schema.fields() {
        return Some(rows.clone());
    }
    let columns = schema
        .fields()
        .iter()
        .map(|field| match rows.column_by_name(field.name()) {
            Some(column) => Arc::clone(column),
            None => new_null_array(field.data_type(), rows.num_rows()),
        })
        .collect();
    let options = RecordBatchOptions::new().with_row_count(Some(rows.num_rows()));
    let widened = RecordBatch::try_new_with_options(Arc::clone(schema), columns, &options);
    Some(widened.expect("rows have the types of the table that they were rescued for; types never change"))
}

fn commit_now(stream: &mut Stream, name: &StreamName, settings: &Settings, runtime: &Handle) -> Result<(), StartError> {
    let taking = stream.hot.take(settings.commit.max_partitions, commit_bytes_max(settings));
    let schema = row_schema(&stream.snapshot.fields);
    let (failure, _) = runtime.block_on(commit(&mut stream.table, taking, &schema));
    if let Some(reason) = failure {
        tracing::warn!(stream = %name, reason, "commit not made while recovering; it starts again later");
    }
    let snapshot = stream.table.snapshot();
    stream.apply(name, snapshot, Duration::ZERO);
    Ok(())
}

fn maintain(name: &StreamName, snapshot: &TableSnapshot, runtime: &Handle) {
    if !snapshot.version.is_multiple_of(delta::CHECKPOINT_EVERY) {
        return;
    }
    let (name, snapshot) = (name.clone(), snapshot.clone());
    runtime.spawn(async move {
        if let Err(error) = delta::maintain(&name, &snapshot).await {
            tracing::warn!(stream = %name, %error, "checkpoint not written; the next one is");
        }
    });
}

/// The node's name in acks: `durable` counts for it alone, so a copy of a data directory must not share it for long.
fn node_name(data_dir: &Path) -> String {
    format!("{:08x}-{}", crc32c::crc32c(data_dir.as_os_str().as_encoded_bytes()), std::process::id())
}
