//! The one owner of pipeline, spool and uplink state: a thread that reads the journal, cuts, spools and sends.
//!
//! It is woken by the journal's synced end, by answers from the cloud, and by its own deadlines. A turn takes answers,
//! writes cuts that a full lane held back, applies entries, cuts when that is due, sends, and now and then writes a
//! snapshot. Requests run as tasks beside it and come back as answers. It stops by the token, after what is journalled is
//! in the spool; any error is final, and the process stops. A full disk is none: what finds no room waits, is shown as a
//! problem, and is tried again. While a lane that refuses is full, a second pipeline goes on for the others: `forerun.rs`.

mod change;
mod clock;
mod cut;
mod forerun;
mod publish;
mod requests;
mod snapshot;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use segment_log::{Disk, LogId, Position, ReadError, Reader};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use wire::sealed::CutError;
use wire::{Acks, Seq, SpoolId, StreamName};

use self::clock::ClockAhead;
use self::cut::is_full;
use self::forerun::Forerunner;
use super::history::History;
use super::rate::Rates;
use super::snapshot_file::SnapshotFileError;
use super::status::{ConfigurationStatus, Status};
use crate::config::{CutSettings, Settings};
use crate::entry::Entry;
use crate::journal::{Journal, JournalSender};
use crate::pipeline::{LaneCut, Pipeline, SnapshotError};
use crate::publish::{Outbox, Replay};
use crate::remote::RemoteStatus;
use crate::source::SourceState;
use crate::spool::{Spool, SpoolError};
use crate::uplink::http::{CloudClient, Failed};
use crate::uplink::state::Uplink;

/// Entries applied in one turn, so that answers and deadlines are not kept waiting.
const ENTRIES_PER_TURN: usize = 4_096;
/// Pending rows are cut when they take so much, whatever their number.
const PENDING_BYTES_MAX: usize = 2 << 20;
/// So long after the last cut the spool is idle.
const IDLE: Duration = Duration::from_secs(5);
/// How often it is looked for what is too old.
const AGED_EVERY: Duration = Duration::from_secs(1);
/// How often the status is published.
const STATUS_EVERY: Duration = Duration::from_millis(200);
/// After a full lane or a failed request the next try without an event.
const RETRY: Duration = Duration::from_millis(100);
/// A fork for which the disk had no room is tried again so often: each try copies the spool.
const FORK_RETRY: Duration = Duration::from_secs(5);
/// Answers that wait for the next turn.
const ANSWERS_MAX: usize = 64;
/// Incidents that are shown.
const INCIDENTS_MAX: usize = 100;

/// Why the agent stopped by itself.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Spool(#[from] SpoolError),
    #[error("read the journal")]
    Read(#[from] ReadError),
    #[error("seal rows")]
    Cut(#[from] CutError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotFileError),
    #[error("go on by the new configuration")]
    Change(#[from] SnapshotError),
    #[error("the journal has ended")]
    Journal,
}

/// What a request was for.
#[derive(Debug)]
struct Of {
    /// None for `positions`.
    stream: Option<StreamName>,
    epoch: u64,
    /// When the answer comes there may be another spool, and more may be freed.
    spool: SpoolId,
    freed: Seq,
    lane: usize,
    bytes: usize,
    /// It only asks whether the preferred address answers.
    probe: bool,
}

/// An answer to a request.
#[derive(Debug)]
struct Answer {
    of: Of,
    elapsed: Duration,
    result: Result<Acks, Failed>,
}

/// Why the cloud did not take a request.
#[derive(Debug, PartialEq, Eq)]
struct Complaint {
    text: String,
    /// It was one that sends, and not a question where the cloud stands.
    of_rows: bool,
}

/// What is known of the snapshot on disk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Snapshot {
    /// Where the journal stood.
    pub(super) position: Position,
    pub(super) bytes: u64,
    /// Nothing may be read and cut before a new one is written.
    pub(super) needed: bool,
}

/// A configuration that was checked: what of it does not concern the pipeline counts at once, the rest from its entry in the
/// journal on.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) settings: Settings,
    /// When it has changed.
    pub(super) cloud: Option<CloudClient>,
    pub(super) sources: Vec<(String, Arc<SourceState>)>,
}

/// What the engine is made of; see [`Engine::run`].
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) data_dir: PathBuf,
    pub(super) edge: String,
    pub(super) stop_within: Duration,
    pub(super) cut: CutSettings,
    pub(super) journal_bytes_max: u64,
    pub(super) journal: Arc<Journal>,
    pub(super) journal_id: LogId,
    pub(super) sender: JournalSender,
    pub(super) reader: Reader<Disk>,
    pub(super) pipeline: Pipeline,
    pub(super) snapshot: Snapshot,
    pub(super) spool: Spool<Disk>,
    pub(super) uplink: Uplink,
    pub(super) cloud: CloudClient,
    pub(super) sources: Vec<(String, Arc<SourceState>)>,
    /// The agent's, and those that the pipeline goes by until the journal says otherwise.
    pub(super) settings: Settings,
    pub(super) in_force: Settings,
    pub(super) orders: mpsc::Receiver<Order>,
    pub(super) configuration: Arc<Mutex<ConfigurationStatus>>,
    pub(super) status: Arc<Mutex<Status>>,
    pub(super) incidents: Vec<String>,
    /// Where alerts are published; None without a broker for them.
    pub(super) outbox: Option<Arc<Outbox>>,
    /// What became of commands of the cloud.
    pub(super) remote: Arc<Mutex<RemoteStatus>>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Engine {
    parts: Parts,
    runtime: Handle,
    /// A request that finds no room waits with its answer; requests in flight are bounded, one for each stream and one.
    answers: (mpsc::Sender<Answer>, mpsc::Receiver<Answer>),
    /// The answer that ended a wait, for the turn that follows.
    woken_by: Option<Answer>,
    in_flight: usize,
    /// The index of the address that is used.
    url: watch::Sender<usize>,
    bytes_sent: u64,
    last_error: Option<Complaint>,
    ahead: ClockAhead,
    /// A cut whose lanes from here on were full.
    held: Vec<(usize, LaneCut)>,
    held_position: Position,
    full_lanes: HashSet<usize>,
    forerunner: Option<Forerunner>,
    /// What entries before brought about was told by a forerunner.
    told_until: Position,
    /// What the pipeline goes by from here on, once all before it is cut.
    next: Option<Settings>,
    last_cut: Instant,
    /// When it was last looked for what is too old.
    aged: Instant,
    /// Nothing was cut since the spool's last marker.
    marked: bool,
    /// Nothing is sent any more for this spool: what is not committed goes on in a new one, at the next try.
    forking: Option<Instant>,
    /// Where the journal ended at the start: a copy of this directory may have what is before.
    found_until: Position,
    /// Something that came since was applied.
    replayed: bool,
    /// Another directory has the same batches; else it is the cloud that lost some.
    copied: bool,
    /// Why the last snapshot was not written, and when it is tried again.
    no_snapshot: Option<(String, Instant)>,
    /// Since when rows are pending.
    pending_since: Option<Instant>,
    /// What the cloud was heard to have of each stream of this spool.
    known: HashMap<StreamName, Seq>,
    started: Instant,
    published: Instant,
    rates: Rates,
    replay: Replay,
    history: History,
}

impl Engine {
    pub(super) fn new(parts: Parts, runtime: Handle) -> Self {
        let now = Instant::now();
        let found_until = *parts.journal.synced().borrow();
        // No source runs yet: what the journal has is of the run before.
        let replay = Replay::new(found_until);
        Self {
            replay,
            parts,
            runtime,
            answers: mpsc::channel(ANSWERS_MAX),
            woken_by: None,
            in_flight: 0,
            url: watch::Sender::new(0),
            bytes_sent: 0,
            last_error: None,
            ahead: ClockAhead::default(),
            held: Vec::new(),
            held_position: Position(0),
            full_lanes: HashSet::new(),
            forerunner: None,
            told_until: Position(0),
            next: None,
            last_cut: now,
            aged: now,
            marked: true,
            forking: None,
            found_until,
            replayed: false,
            copied: false,
            no_snapshot: None,
            pending_since: None,
            known: HashMap::new(),
            started: now,
            published: now,
            rates: Rates::default(),
            history: History::default(),
        }
    }

    /// Runs until the token is cancelled; then all that is journalled is in the spool, unless a lane is full.
    ///
    /// # Errors
    /// Any is final.
    pub(super) fn run(mut self, token: &CancellationToken) -> Result<(), EngineError> {
        let mut synced = self.parts.journal.synced();
        self.publish();
        while !token.is_cancelled() {
            synced.borrow_and_update();
            let wait = self.turn()?;
            if !wait.is_zero() {
                self.wait(&mut synced, token, wait);
            }
        }
        let until = Instant::now() + self.parts.stop_within / 2;
        self.finish(until)
    }

    /// What is journalled goes to the spool, and a snapshot makes the next start quick.
    fn finish(&mut self, until: Instant) -> Result<(), EngineError> {
        self.forerunner = None;
        loop {
            let more = self.held.is_empty() && self.read()?;
            self.write_held()?;
            if self.held.is_empty() && self.parts.pipeline.may_cut() {
                self.cut()?;
            }
            if !more {
                break;
            }
        }
        // What the cloud takes at once need not wait for the next start.
        let never = CancellationToken::new();
        let mut synced = self.parts.journal.synced();
        while Instant::now() < until && self.parts.uplink.node().0.is_some() {
            let wait = self.turn()?;
            if self.in_flight == 0 && self.parts.spool.waiting().is_empty() {
                break;
            }
            self.wait(&mut synced, &never, wait.min(RETRY));
        }
        if self.held.is_empty() && self.next.is_none() && self.parts.pipeline.pending_rows() == 0 {
            self.snapshot()?;
        }
        self.parts.spool.mark()?;
        self.publish();
        Ok(())
    }

    fn wait(&mut self, synced: &mut watch::Receiver<Position>, token: &CancellationToken, wait: Duration) {
        let answers = &mut self.answers.1;
        self.woken_by = self.runtime.block_on(async {
            tokio::select! {
                changed = synced.changed() => {
                    // The journal's end is told to the agent by the journal; until the token comes this must not spin.
                    if changed.is_err() { tokio::time::sleep(wait).await; }
                    None
                }
                answer = answers.recv() => answer,
                () = tokio::time::sleep(wait) => None,
                () = token.cancelled() => None,
            }
        });
    }

    /// One turn; returns how long nothing is due. Zero: there is more to do.
    fn turn(&mut self) -> Result<Duration, EngineError> {
        while let Some(answer) = self.woken_by.take().or_else(|| self.answers.1.try_recv().ok()) {
            self.answered(answer)?;
        }
        while let Ok(order) = self.parts.orders.try_recv() {
            self.obey(order)?;
        }
        self.write_held()?;
        let more = self.held.is_empty() && self.read()?;
        let mut wait = self.forerun()?;
        self.give_commands();
        wait = wait.min(self.cut_when_due()?);
        if self.snapshot_is_due() {
            self.snapshot()?;
        }
        self.go_on_forking()?;
        wait = wait.min(self.send()?);
        if self.aged.elapsed() >= AGED_EVERY && !self.drop_aged()? {
            self.aged = Instant::now();
        }
        if !self.marked && self.last_cut.elapsed() >= IDLE {
            // Damage in what is there will not pass for a torn tail (rule 8).
            self.parts.spool.mark()?;
            self.marked = true;
        }
        if self.published.elapsed() >= STATUS_EVERY {
            self.publish();
        }
        if !self.held.is_empty() {
            wait = wait.min(RETRY);
        }
        Ok(if more { Duration::ZERO } else { wait.min(STATUS_EVERY) })
    }

    /// What decoders ask for goes to their sources. What the run before asked for is not asked for again by it.
    fn give_commands(&mut self) {
        let parts = &mut self.parts;
        let pipeline = self.forerunner.as_mut().map_or(&mut parts.pipeline, |runner| &mut runner.pipeline);
        let commands = pipeline.take_commands().into_iter().filter(|_| self.replayed);
        for (name, command) in commands {
            if let Some((_, source)) = parts.sources.iter().find(|(source, _)| *source == name) {
                source.command(command);
            }
        }
    }

    /// Applies entries; true when there may be more to apply at once. Nothing may be held back.
    fn read(&mut self) -> Result<bool, EngineError> {
        if self.next.is_some() && self.parts.pipeline.may_cut_to_change() {
            return self.change();
        }
        if self.parts.snapshot.needed {
            return Ok(false);
        }
        for _ in 0..ENTRIES_PER_TURN {
            self.end_forerun();
            let parts = &mut self.parts;
            if parts.pipeline.may_cut() && is_full(&parts.pipeline, &parts.cut) {
                return Ok(true);
            }
            if parts.pipeline.waits_for_clock()
                && let Some(more) = self.ahead.find(&parts.journal, &mut parts.pipeline)?
            {
                return Ok(more);
            }
            match parts.reader.next() {
                Ok(Some(record)) => {
                    let (position, next) = (record.position, record.next);
                    if !self.replayed && position >= self.found_until {
                        // What the run before asked for, or would have.
                        parts.pipeline.take_commands();
                        self.replayed = true;
                    }
                    let is_told = position < self.told_until;
                    match Entry::read(Bytes::copy_from_slice(record.payload)) {
                        Ok(entry) => {
                            parts.pipeline.apply(position, next, &entry);
                            let changes = match entry {
                                Entry::Configured { version, text } => self.is_told(position, version, &text),
                                _ => false,
                            };
                            let parts = &mut self.parts;
                            if is_told {
                                parts.pipeline.take_commands();
                            } else if let Some(outbox) = &parts.outbox {
                                let (found, pipeline) = (parts.pipeline.take_alerts(), &parts.pipeline);
                                self.replay.applied(position, found, outbox, || pipeline.published());
                            }
                            if changes {
                                return Ok(true);
                            }
                        }
                        Err(error) => {
                            parts.pipeline.damaged(position, next);
                            incident(&mut parts.incidents, format!("journal {position} to {next}: {error}"));
                        }
                    }
                }
                Ok(None) => {
                    if let Some(outbox) = &parts.outbox {
                        self.replay.end(outbox, || parts.pipeline.published());
                    }
                    return Ok(false);
                }
                Err(ReadError::Damaged { from, to }) => {
                    parts.pipeline.damaged(from, to);
                    incident(&mut parts.incidents, format!("journal {from} to {to}: damaged on disk"));
                }
                Err(error) => return Err(error.into()),
            }
            if self.pending_since.is_none() && self.parts.pipeline.pending_rows() > 0 {
                self.pending_since = Some(Instant::now());
            }
        }
        Ok(true)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Where the spools of a data directory lie.
pub(crate) fn spool_directory(data_dir: &Path) -> PathBuf {
    data_dir.join("spool")
}

/// Removes what a fork left: spools that the file `id` does not name.
pub(super) fn remove_other_spools(directory: &Path, current: SpoolId) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let id = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse::<SpoolId>().ok());
        if id.is_some_and(|id| id != current)
            && let Err(error) = std::fs::remove_dir_all(&path)
        {
            tracing::warn!(path = %path.display(), %error, "a spool that is no longer used stays on disk");
        }
    }
}

pub(super) fn incident(incidents: &mut Vec<String>, text: String) {
    tracing::error!(incident = text, "damage");
    if incidents.len() < INCIDENTS_MAX {
        incidents.push(text);
    }
}
