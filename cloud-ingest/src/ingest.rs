//! The single writer: one thread that admits batches, makes them durable, shows them, and starts commits.
//!
//! What wakes it: a request, an errand that is back from the store, the tick. What it owns: the WAL, all sequences, the
//! hot rows, and the right to replace a [`TableState`](crate::TableState). The order for a batch is: admit, append, sync,
//! show in hot, ack; so that acknowledged <= visible <= sent (rule 2). Requests that wait together share one sync. What this
//! node's own doors were sent goes the same way, and gets its number here (`ingest/write.rs`).
//!
//! It never waits for the store: what a request wants to know of it (a table to be made, a gap to be looked into) is an
//! errand, and the request is parked meanwhile, for [`PARKED_MAX`] at most. A stream that cannot commit is pushed back
//! alone, at its share of memory and WAL, and pins nobody else's segments (rule 7; `ingest/carry.rs`). The thread stops
//! when it is told to, after committing what is hot, or with a [`Fault`], and then the process has to.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::time::{Duration, Instant};

use segment_log::{AppendError, FileLayer, FreeError, Options, Position, ReadError, SyncError};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use wire::sealed::BatchHeader;
use wire::{Acks, RefusedAnswer, RefusedRequest, SpoolId, StreamAck, StreamName};

use self::admit::Hungry;
use self::carry::Carry;
pub(crate) use self::errand::Done;
use self::errand::{LookBook, Subject, Ticket};
pub(crate) use self::queue::Jobs;
use self::queue::Queue;
use self::request::{Arrived, Request};
use self::stream::Stream;
use self::write::Writing;
use crate::alias::Aliases;
use crate::catalog::Catalogue;
use crate::class::{Budget, ByClass, Class};
use crate::config::Settings;
use crate::delta::TableError;
use crate::ledger::kept::{Kept, KeptError, SaveError};
use crate::metrics::Metrics;
use crate::repeats::{Repeats, RepeatsError};
use crate::store::{Store, StoreError};
use crate::wal::Wal;

mod admit;
mod carry;
mod commit;
mod errand;
pub(crate) mod queue;
mod recover;
pub(crate) mod request;
mod stream;
pub(crate) mod write;

/// Committed rows that wait for older queries may take so large a part of hot's memory: one in four.
const GRACE_SHARE: usize = 4;
const TICK: Duration = Duration::from_millis(100);
/// Bytes that share one sync at most; and that go with alerts, which do not wait for much.
const GROUP_BYTES_MAX: usize = 32 << 20;
const GROUP_BYTES_WITH_ALERTS: usize = if cfg!(test) { 1 << 10 } else { 1 << 20 };
/// Kept free in the WAL for its own records.
const WAL_RESERVE_BYTES: u64 = 1 << 20;
/// How long a request waits for the store at most. It is then answered with what is known.
const PARKED_MAX: Duration = Duration::from_secs(10);
/// So long after the last job the WAL is idle.
const IDLE: Duration = Duration::from_secs(5);
/// How long a clean stop waits for commits; what is not committed then is in the WAL.
const STOP_MAX: Duration = Duration::from_secs(30);
pub(crate) const RETRY_AFTER_MS: u64 = 500;

pub(crate) type Reply = oneshot::Sender<Result<Acks, RefusedAnswer>>;

/// What the thread is asked to do.
#[derive(Debug)]
pub(crate) enum Job {
    Batches { class: Class, batches: Vec<Arrived>, reply: Reply, _place: OwnedSemaphorePermit },
    Write { writing: Box<Writing>, _place: OwnedSemaphorePermit },
    Positions { spools: Vec<SpoolId>, reply: Reply, _place: OwnedSemaphorePermit },
    Done(Box<Done>),
    Stop,
}

impl Job {
    /// Whose request it is; an errand is nobody's.
    fn class(&self) -> Option<Class> {
        match self {
            Self::Batches { class, .. } => Some(*class),
            Self::Write { writing, .. } => Some(writing.class()),
            Self::Positions { .. } => Some(Class::Readings),
            Self::Done(_) | Self::Stop => None,
        }
    }
}

/// Why the node cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("open the write-ahead log")]
    Wal(#[from] segment_log::OpenError),
    #[error("read the write-ahead log")]
    Replay(#[from] ReadError),
    #[error(transparent)]
    Repeats(#[from] RepeatsError),
    #[error(transparent)]
    Ledger(#[from] KeptError),
    #[error("write to the write-ahead log")]
    Append(#[from] AppendError),
    #[error("open the store")]
    Store(#[from] StoreError),
    #[error("open a table")]
    Table(#[from] TableError),
    #[error("the write-ahead log holds more than hot.max_bytes of {stream}, and its table takes no commit: {reason}")]
    Full { stream: StreamName, reason: String },
    #[error("start the ingest thread")]
    Thread(std::io::Error),
}

/// Memory and disk are apart: nothing that follows could be trusted, so nothing follows, and the process stops.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    #[error(transparent)]
    Sync(#[from] SyncError),
    #[error("append to the write-ahead log")]
    Append(#[source] AppendError),
    #[error(transparent)]
    Ledger(#[from] SaveError),
    #[error(transparent)]
    Free(#[from] FreeError),
    #[error("the store did not keep what was written: {0}")]
    Store(String),
}

/// What waits for errands.
#[derive(Debug)]
struct Parked {
    tickets: Vec<Ticket>,
    until: Instant,
    what: Waiting,
}

#[derive(Debug)]
enum Waiting {
    Batches(Box<Request>),
    Write(Box<Writing>),
    Positions { spools: Vec<SpoolId>, reply: Reply },
}

impl Waiting {
    fn class(&self) -> Class {
        match self {
            Self::Batches(request) => request.class(),
            Self::Write(writing) => writing.class(),
            Self::Positions { .. } => Class::Readings,
        }
    }
}

/// The thread's own state.
#[derive(Debug)]
pub(crate) struct Ingest<L: FileLayer> {
    settings: Settings,
    node: String,
    store: Store,
    runtime: Handle,
    wal: Wal<L>,
    /// What the doors took lately, and their spool.
    repeats: Repeats<L>,
    /// What the ledger has on disk.
    kept: Kept<L>,
    /// Streams of which the WAL has batches that a door took and that could not be put back, and from where on.
    held: BTreeMap<StreamName, Position>,
    streams: BTreeMap<StreamName, Stream>,
    looks: LookBook,
    /// Why tables could not be opened, so that each reason is told once.
    unopened: BTreeMap<StreamName, String>,
    parked: Vec<Parked>,
    /// Batches that are taken and not shown yet: for the ledger.
    noted: Vec<(BatchHeader, i64)>,
    carry: Option<Carry<L>>,
    carry_not_before: Option<Instant>,
    catalogue: Arc<Catalogue>,
    metrics: Arc<Metrics>,
    looks_at_once: ByClass<Arc<Semaphore>>,
    commits_at_once: ByClass<Arc<Semaphore>>,
    /// Who found no room lately.
    hungry: Hungry,
    sender: Jobs,
    jobs: Queue,
    /// When the last job came.
    busy: Instant,
    stopping: Option<Instant>,
}

impl<L: FileLayer> Ingest<L> {
    /// Opens WAL and tables, and puts what the tables do not have back into hot. Blocks; not for an async thread.
    pub(crate) fn open(
        layer: L,
        settings: Settings,
        store: Store,
        catalogue: Arc<Catalogue>,
        metrics: Arc<Metrics>,
        runtime: Handle,
    ) -> Result<(Self, Jobs), StartError> {
        let options = Options {
            segment_bytes: settings.wal.segment_bytes.0,
            max_bytes: settings.wal.max_bytes.0,
            reserve_bytes: WAL_RESERVE_BYTES.min(settings.wal.segment_bytes.0 / 8),
        };
        let (wal, opening) = Wal::open(layer.clone(), &settings.data_dir.join("wal"), options)?;
        let (within_us, ids_max) = (settings.write.repeats_within.micros(), settings.write.repeats_max);
        let kept = Kept::open(layer.clone(), &settings.data_dir.join("ledger"), catalogue.ledger())?;
        let (repeats, of_repeats) = Repeats::open(layer, &settings.data_dir.join("doors"), within_us, ids_max)?;
        for incident in &of_repeats.incidents {
            tracing::error!(?incident, "the log of the doors is damaged: what they took then may be taken again");
        }
        for incident in &opening.incidents {
            tracing::error!(
                ?incident,
                "the wal is damaged: edges still hold what was not committed, and send it again"
            );
        }
        let (sender, jobs) = queue::queue();
        let at_once = || ByClass::new(|class| Arc::new(Semaphore::new(errand::at_once_max(class))));
        let mut ingest = Self {
            settings,
            node: node_name(),
            store,
            runtime,
            wal,
            repeats,
            kept,
            held: BTreeMap::new(),
            streams: BTreeMap::new(),
            looks: LookBook::default(),
            unopened: BTreeMap::new(),
            parked: Vec::new(),
            noted: Vec::new(),
            carry: None,
            carry_not_before: None,
            catalogue,
            metrics,
            looks_at_once: at_once(),
            commits_at_once: at_once(),
            hungry: Hungry::default(),
            sender: sender.clone(),
            jobs,
            busy: Instant::now(),
            stopping: None,
        };
        ingest.recover()?;
        for name in ingest.streams.keys() {
            ingest.publish(name);
        }
        Ok((ingest, sender))
    }

    /// The thread's loop.
    ///
    /// # Errors
    /// Final: the process has to stop at once.
    pub(crate) fn run(mut self) -> Result<(), Fault> {
        while self.turn()? {}
        self.kept.save(self.catalogue.ledger())?;
        self.kept.mark()?;
        self.repeats.mark()?;
        Ok(self.wal.mark()?)
    }

    /// Waits for a job or the tick and does what is due; false when it has stopped.
    fn turn(&mut self) -> Result<bool, Fault> {
        match self.jobs.next_within(TICK) {
            Some(job) => {
                self.busy = Instant::now();
                self.work(job)?;
            }
            // Damage in what is there will not pass for a torn tail (rule 8). Nothing is written where nothing is new.
            None if self.busy.elapsed() >= IDLE => self.wal.mark()?,
            None => {}
        }
        self.tick()?;
        Ok(!self.stopped())
    }

    /// One job, and those that wait behind it, under one sync. What replaces tables or frees segments comes when all
    /// that was admitted is synced and shown.
    fn work(&mut self, first: Job) -> Result<(), Fault> {
        let (mut requests, mut writes, mut done) = (Vec::new(), Vec::new(), Vec::new());
        let (mut bytes, mut bytes_max) = (0, GROUP_BYTES_MAX);
        let mut next = Some(first);
        while let Some(job) = next.take() {
            if job.class() == Some(Class::Alerts) {
                bytes_max = GROUP_BYTES_WITH_ALERTS;
            }
            match job {
                Job::Batches { class, batches, reply, .. } => {
                    bytes += batches.iter().map(|arrived| arrived.batch.bytes().len()).sum::<usize>();
                    requests.push(Request::new(class, batches, reply));
                }
                Job::Write { writing, .. } => {
                    bytes += writing.wal_bytes();
                    writes.push(*writing);
                }
                Job::Positions { spools, reply, .. } => self.park_positions(spools, reply),
                Job::Done(errand) => done.push(*errand),
                Job::Stop => self.stopping = Some(Instant::now()),
            }
            if bytes < bytes_max {
                next = self.jobs.next();
            }
        }
        self.take(requests, writes)?;
        for errand in done {
            self.done(errand)?;
        }
        self.resume()
    }

    /// Admits requests, syncs once, shows what is durable, answers. Those that want something of the store are parked.
    fn take(&mut self, mut requests: Vec<Request>, mut writes: Vec<Writing>) -> Result<(), Fault> {
        let (mut staged, mut through, mut written) = (BTreeSet::new(), Vec::new(), Vec::new());
        // Who goes before finds room before.
        writes.sort_by_key(Writing::class);
        requests.sort_by_key(Request::class);
        for mut writing in writes {
            match self.admit_write(&mut writing, &mut staged)? {
                None => written.push(writing),
                Some(tickets) => self.park(tickets, Waiting::Write(Box::new(writing))),
            }
        }
        for mut request in requests {
            match self.admit(&mut request, &mut staged)? {
                None => through.push(request),
                Some(ticket) => self.park(vec![ticket], Waiting::Batches(Box::new(request))),
            }
        }
        if !staged.is_empty() {
            self.wal.sync()?;
            self.show(&staged);
        }
        written.into_iter().for_each(|writing| self.answer_write(writing));
        for request in through {
            let acks = self.acks(request.touched());
            request.answer(&self.node, acks, &self.metrics);
        }
        Ok(())
    }

    /// Their new rows are in the streams' own hot sets since they were appended, so that they count; readers see them now.
    fn show(&mut self, staged: &BTreeSet<StreamName>) {
        staged.iter().for_each(|name| self.publish(name));
        // Not before: a view that hears of a batch's watermark must see its rows.
        let ledger = self.catalogue.ledger();
        self.noted.drain(..).for_each(|(header, received_at_us)| ledger.take(&header, received_at_us));
        // Whoever looked in between has seen the rows and not the watermark.
        self.catalogue.heard(staged.iter());
        self.metrics.wal_syncs.set(self.wal.syncs());
        self.metrics.wal_bytes.set(self.wal.bytes());
        self.gauge();
    }

    fn park(&mut self, tickets: Vec<Ticket>, what: Waiting) {
        self.parked.push(Parked { tickets, until: Instant::now() + PARKED_MAX, what });
    }

    /// Whether one more of a class may wait for the store.
    fn may_park(&self, class: Class) -> bool {
        let parked = self.parked.iter().filter(|parked| parked.what.class() == class).count();
        parked < queue::requests_waiting(&self.settings)[class]
    }

    /// Positions are answered when everything was looked at since they were asked for (rule 3).
    fn park_positions(&mut self, spools: Vec<SpoolId>, reply: Reply) {
        if !self.may_park(Class::Readings) {
            reply.send(Err(RefusedRequest::NotReady { detail: "busy".to_owned() }.into())).ok();
            return;
        }
        let subjects = self.streams.keys().cloned().map(Subject::Stream).chain([Subject::All]).collect::<Vec<_>>();
        let ask = |subject| self.ask(self.class_of(&subject), subject, &[]);
        let tickets = subjects.into_iter().map(ask).collect();
        self.park(tickets, Waiting::Positions { spools, reply });
    }

    /// Goes on with those parked whose looks are over, in the order in which they came.
    fn resume(&mut self) -> Result<(), Fault> {
        let now = Instant::now();
        let (mut requests, mut writes) = (Vec::new(), Vec::new());
        for parked in std::mem::take(&mut self.parked) {
            let late = || Err("the store did not answer in time".to_owned());
            let ready = parked.until <= now || parked.tickets.iter().all(|ticket| self.looks.outcome(ticket).is_some());
            if !ready {
                self.parked.push(parked);
                continue;
            }
            let outcomes = parked
                .tickets
                .into_iter()
                .map(|ticket| (self.looks.outcome(&ticket).unwrap_or_else(late), ticket.subject))
                .collect::<Vec<_>>();
            match parked.what {
                Waiting::Batches(mut request) => {
                    request.looked(outcomes.into_iter().try_for_each(|(outcome, _)| outcome));
                    requests.push(*request);
                }
                Waiting::Write(mut writing) => {
                    writing.looked(outcomes.into_iter().try_for_each(|(outcome, _)| outcome));
                    writes.push(*writing);
                }
                // A caller that has gone asks again.
                Waiting::Positions { spools, reply } => {
                    reply.send(self.positions(&spools, outcomes)).ok();
                }
            }
        }
        if requests.is_empty() && writes.is_empty() { Ok(()) } else { self.take(requests, writes) }
    }

    /// A stream that could not be looked at is left out: the edge sends it from its first batch, and it is judged then.
    fn positions(
        &mut self,
        spools: &[SpoolId],
        outcomes: Vec<(Result<(), String>, Subject)>,
    ) -> Result<Acks, RefusedAnswer> {
        let mut unseen = BTreeSet::new();
        for (outcome, subject) in outcomes {
            match (outcome, subject) {
                (Ok(()), _) => {}
                (Err(detail), Subject::All) => return Err(RefusedRequest::NotReady { detail }.into()),
                (Err(_), Subject::Stream(name)) => {
                    unseen.insert(name);
                }
            }
        }
        let mut touched = BTreeSet::new();
        for (name, stream) in self.streams.iter().filter(|(name, _)| !unseen.contains(*name)) {
            let known = spools.iter().filter(|spool| stream.knows(**spool));
            touched.extend(known.map(|spool| (*spool, name.clone())));
        }
        Ok(Acks { node: self.node.clone(), acks: self.acks(&touched), refused: Vec::new() })
    }

    fn acks(&mut self, touched: &BTreeSet<(SpoolId, StreamName)>) -> Vec<StreamAck> {
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

    /// What the fields of a stream are called that its senders call otherwise.
    fn aliases(&self, name: &StreamName) -> Option<&Aliases> {
        self.settings.aliases_of(name)
    }

    fn publish(&self, name: &StreamName) {
        if let Some(stream) = self.streams.get(name) {
            self.catalogue.replace(name, stream.state());
        }
    }

    fn hot_bytes(&self) -> usize {
        self.streams.values().map(|stream| stream.hot.bytes()).sum()
    }

    /// Hot's memory, and what of it is kept for whom.
    fn hot_budget(&self) -> Budget {
        Budget::new(self.settings.hot.max_bytes.bytes(), self.settings.pressure.kept())
    }

    /// The part of the WAL that batches may fill which are not committed.
    fn live_budget(&self) -> Budget {
        Budget::new(self.settings.wal.max_bytes.bytes() / carry::LIVE_SHARE, self.settings.pressure.kept())
    }

    /// Tells how full it is.
    fn gauge(&self) {
        let (mut rows, mut hot, mut live) = (ByClass::<usize>::default(), ByClass::default(), ByClass::default());
        for stream in self.streams.values() {
            rows[stream.class] += stream.hot.rows();
            hot[stream.class] += stream.hot.bytes();
            live[stream.class] += stream.hot.wal_bytes();
        }
        self.metrics.hot_bytes.set(hot.iter().map(|(_, bytes)| *bytes as u64).sum());
        let (hot_budget, live_budget) = (self.hot_budget(), self.live_budget());
        for class in Class::ALL {
            let of = &self.metrics.classes[class];
            of.hot_rows.set(rows[class] as u64);
            of.hot_bytes.set(hot[class] as u64);
            of.hot_kept_bytes.set(hot_budget.kept(class) as u64);
            of.hot_free_bytes.set(hot_budget.free(class, &hot) as u64);
            of.wal_bytes.set(live[class] as u64);
            of.wal_free_bytes.set(live_budget.free(class, &live) as u64);
        }
    }

    fn tick(&mut self) -> Result<(), Fault> {
        let now = Instant::now();
        let grace_bytes_max = self.settings.hot.max_bytes.bytes() / GRACE_SHARE / self.streams.len().max(1);
        for (name, stream) in &mut self.streams {
            if stream.hot.expire(now) | stream.hot.shorten_grace(grace_bytes_max) {
                self.catalogue.replace(name, stream.state());
            }
        }
        let pins = self.pins_wal();
        self.start_commits(now, pins.as_ref());
        self.carry(pins)?;
        if self.parked.iter().any(|parked| parked.until <= now) { self.resume() } else { Ok(()) }
    }

    /// Frees the WAL below what is hot.
    fn free(&mut self) -> Result<(), Fault> {
        let of_streams = self.streams.values().filter_map(|stream| stream.hot.wal_from());
        let oldest = of_streams.chain(self.held.values().copied()).min();
        // An id must not go with the record that it lies in.
        self.repeats.sync()?;
        self.repeats.expire(chrono::Utc::now().timestamp_micros())?;
        let oldest = oldest.unwrap_or(self.wal.end());
        if self.wal.has_before(oldest) {
            self.kept.save(self.catalogue.ledger())?;
        }
        self.wal.free_before(oldest)?;
        self.gauge();
        self.metrics.wal_bytes.set(self.wal.bytes());
        Ok(())
    }

    fn stopped(&self) -> bool {
        let Some(since) = self.stopping else { return false };
        let idle = self.streams.values().all(|stream| stream.commits.running.is_none() && stream.hot.is_empty());
        idle || since.elapsed() > STOP_MAX
    }
}

/// The node's name in acks, another one at each start: `durable` counts for this process and its WAL alone, and a copy
/// of a data directory or a container with the same paths must not share it.
fn node_name() -> String {
    format!("{:016x}", RandomState::new().build_hasher().finish())
}

#[cfg(test)]
mod tests;
