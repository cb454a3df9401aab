//! The agent, put together: journal, pipeline, spool, uplink, sources and the admin door, and their order of stopping.
//!
//! Start: recover the spool and the journal, restore the pipeline from its snapshot, read the journal once for the
//! redelivery lists, then begin. Stop: sources first, then the journal, then the engine, which brings what is journalled
//! to the spool and what the cloud takes at once to the cloud. A failed disk stops the agent by itself; nothing is
//! retried that a disk refused.

mod engine;
mod intake;
mod rate;
mod snapshot_file;
mod status;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use rand::Rng;
use segment_log::{Disk, Options, Position, ReadError};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use wire::SpoolId;

pub use self::engine::EngineError;
use self::engine::{Engine, Parts, Snapshot, incident, remove_other_spools, spool_directory};
pub use self::snapshot_file::SnapshotFileError;
pub use self::status::{
    JournalStatus, LaneStatus, RowsStatus, RuleStatus, SourceStatus, Status, StreamStatus, UplinkStatus,
};
use crate::admin;
use crate::config::{LaneSettings as LaneConfig, Settings, SourceSettings};
use crate::entry::Entry;
use crate::journal::{Journal, JournalError, OpenJournal};
use crate::pipeline::{AGENT_VERSION, Counters, Pipeline, SnapshotError};
use crate::places::Places;
use crate::publish::{self, Outbox};
use crate::redelivery::Lists;
use crate::source::SourceState;
use crate::spool::{LaneSettings, Spool, SpoolError, SpoolSettings};
use crate::uplink::http::{ClientError, CloudClient};
use crate::uplink::link::Link;
use crate::uplink::state::Uplink;

/// Kept in the journal for the proof that all was synced.
const JOURNAL_RESERVE_BYTES: u64 = 4 << 10;

/// Why the agent does not start, or stopped by itself.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("make {path}")]
    DataDir { path: PathBuf, source: std::io::Error },
    #[error(
        "the journal in {0} is not the one that the snapshot beside it belongs to: put the right one back, or move both \
             and the spool away to begin anew"
    )]
    OtherJournal(PathBuf),
    #[error("restore the pipeline from its snapshot")]
    Restore(#[from] SnapshotError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotFileError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("{0}")]
    JournalEnded(Arc<JournalError>),
    #[error(transparent)]
    Spool(#[from] SpoolError),
    #[error("read the journal")]
    Read(#[from] ReadError),
    #[error(transparent)]
    Cloud(#[from] ClientError),
    #[error("listen on {address} for admin")]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error("start the engine's thread")]
    Thread(#[source] std::io::Error),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("the engine's thread panicked")]
    Panicked,
}

/// A running agent.
#[derive(Debug)]
pub struct AgentHandle {
    /// Where `/status` and the others are.
    pub admin: SocketAddr,
    status: Arc<Mutex<Status>>,
    stopped: tokio::task::JoinHandle<Result<(), AgentError>>,
}

impl AgentHandle {
    /// What it tells about itself now.
    pub fn status(&self) -> Status {
        self.status.lock().clone()
    }

    /// How often the engine has published its status: a number that stands still is an engine that does.
    pub fn beats(&self) -> impl Fn() -> u64 + use<> {
        let status = Arc::clone(&self.status);
        move || status.lock().published
    }

    /// Waits until it has stopped, by its token or by itself.
    ///
    /// # Errors
    /// When it stopped by itself.
    pub async fn stopped(self) -> Result<(), AgentError> {
        self.stopped.await.map_err(|_| AgentError::Panicked)?
    }
}

/// Starts an agent; it runs until the token is cancelled.
///
/// # Errors
/// When the data directory, the admin address or the certificates cannot be used.
pub async fn start(settings: Settings, token: CancellationToken) -> Result<AgentHandle, AgentError> {
    let data_dir = &settings.edge.data_dir;
    std::fs::create_dir_all(data_dir).map_err(|source| AgentError::DataDir { path: data_dir.clone(), source })?;
    let address = settings.admin.listen;
    let listener = TcpListener::bind(address).await.map_err(|source| AgentError::Listen { address, source })?;
    let admin = listener.local_addr().map_err(|source| AgentError::Listen { address, source })?;
    let cloud = CloudClient::new(&settings.cloud, &settings.edge.id)?;
    let recovering = settings.clone();
    // Recovery reads all of journal and spool.
    let recovered = tokio::task::spawn_blocking(move || Recovered::open(&recovering));
    let recovered = recovered.await.map_err(|_| AgentError::Panicked)??;

    let status = Arc::new(Mutex::new(Status::default()));
    let outbox = Outbox::of(&settings);
    let (mut parts, at_end) = recovered.into_parts(&settings, cloud, Arc::clone(&status));
    parts.outbox = outbox.as_ref().map(|(_, outbox)| Arc::clone(outbox));
    let (journal, sources) = (Arc::clone(&parts.journal), parts.sources.clone());
    let engine_token = CancellationToken::new();
    let engine = Engine::new(parts, tokio::runtime::Handle::current());
    let (done, engine_done) = oneshot::channel();
    let ends = engine_token.clone();
    std::thread::Builder::new()
        .name("engine".to_owned())
        .spawn(move || {
            // Nobody listens any more when the agent was dropped.
            let _ = done.send(engine.run(&ends));
        })
        .map_err(AgentError::Thread)?;
    let intake = token.child_token();
    let tasks = intake::start_sources(&settings, &journal, at_end, &sources, &intake);
    let admin_token = CancellationToken::new();
    let publisher = outbox.map(|(broker, outbox)| {
        // It ends with the admin door: the engine's last turns may find alerts.
        let token = admin_token.clone();
        tokio::spawn(async move {
            if let Err(error) = publish::run(broker, &outbox, token).await {
                tracing::error!(%error, "alerts are not published");
            }
        })
    });
    tokio::spawn(admin::serve(listener, Arc::clone(&status), admin_token.clone()));
    tracing::info!(%admin, edge = %settings.edge.id, "the agent runs");
    let stopped = tokio::spawn(async move {
        let result = supervise(token, intake, tasks, journal, engine_token, engine_done, admin_token).await;
        if let Some(publisher) = publisher {
            // What is left goes with the next start.
            let _ = publisher.await;
        }
        result
    });
    Ok(AgentHandle { admin, status, stopped })
}

/// Waits for the end, and ends all in order.
async fn supervise(
    token: CancellationToken,
    intake: CancellationToken,
    mut tasks: JoinSet<()>,
    journal: Arc<Journal>,
    engine_token: CancellationToken,
    mut engine_done: oneshot::Receiver<Result<(), EngineError>>,
    admin: CancellationToken,
) -> Result<(), AgentError> {
    let mut failed = journal.failed();
    let result = tokio::select! {
        () = token.cancelled() => None,
        engine = &mut engine_done => Some(engine.map_err(|_| AgentError::Panicked)?.map_err(AgentError::from)),
        error = async { failed.wait_for(Option::is_some).await.ok().and_then(|error| error.clone()) } => {
            Some(error.map_or(Err(AgentError::Panicked), |error| Err(AgentError::JournalEnded(error))))
        }
    };
    intake.cancel();
    while tasks.join_next().await.is_some() {}
    let stopping = Arc::clone(&journal);
    tokio::task::spawn_blocking(move || stopping.stop()).await.map_err(|_| AgentError::Panicked)?;
    engine_token.cancel();
    let result = match result {
        Some(result) => result,
        None => engine_done.await.map_err(|_| AgentError::Panicked)?.map_err(AgentError::from),
    };
    admin.cancel();
    result
}

/// What a start finds on disk.
struct Recovered {
    journal: Arc<Journal>,
    journal_id: segment_log::LogId,
    reader: segment_log::Reader<Disk>,
    pipeline: Pipeline,
    snapshot: Snapshot,
    spool: Spool<Disk>,
    at_end: AtEnd,
    incidents: Vec<String>,
}

impl Recovered {
    fn open(settings: &Settings) -> Result<Self, AgentError> {
        let data_dir = &settings.edge.data_dir;
        let mut incidents = Vec::new();
        let directory = spool_directory(data_dir);
        let spool_settings = SpoolSettings {
            edge: settings.edge.id.clone(),
            agent: AGENT_VERSION.to_owned(),
            configuration: settings.version,
            lanes: settings.lanes().iter().map(|lane| spool_lane(lane, settings)).collect(),
        };
        let (spool, damage) = Spool::open(&Disk, &directory, spool_settings, SpoolId(rand::rng().random()))?;
        damage.iter().for_each(|damage| incident(&mut incidents, format!("spool: {damage:?}")));
        remove_other_spools(&directory, spool.id());
        let options = Options {
            segment_bytes: settings.journal.segment_bytes.0,
            max_bytes: settings.journal.max_bytes.0,
            reserve_bytes: JOURNAL_RESERVE_BYTES,
        };
        let (mut journal, opening) = OpenJournal::open(data_dir.join("journal"), options)?;
        opening.incidents.iter().for_each(|damage| incident(&mut incidents, format!("journal: {damage:?}")));
        let lanes = spool.cut_positions();
        let (pipeline, bytes) = match snapshot_file::read(data_dir) {
            Ok(Some(snapshot)) if snapshot.journal != journal.id() => {
                return Err(AgentError::OtherJournal(data_dir.clone()));
            }
            Ok(Some(snapshot)) => {
                let bytes = snapshot.state.len() as u64;
                (Pipeline::restore(settings, &lanes, snapshot.state)?, bytes)
            }
            Ok(None) => (Pipeline::new(settings, opening.start, &lanes), 0),
            Err(error @ SnapshotFileError::Damaged(_)) => {
                // Rows are safe by the lanes' positions; open windows and counts before the journal's start are not.
                incident(&mut incidents, format!("{error}: windows and counters begin anew"));
                (Pipeline::new(settings, opening.start, &lanes), 0)
            }
            Err(error) => return Err(error.into()),
        };
        let from = pipeline.position();
        let seen = lanes.values().copied().fold(from, Position::max);
        if let Some(missing) = journal.skip_to(seen)? {
            incident(&mut incidents, format!("journal: {missing}: the disk lost what it had called written"));
        }
        // Now, so that lanes and windows of this configuration are known before its first cut.
        let mut snapshot = Snapshot { position: from, bytes, needed: false };
        match snapshot_file::write(data_dir, journal.id(), &pipeline.snapshot()) {
            Ok(()) => {}
            Err(error) if error.is_full() => {
                tracing::warn!(%error, "the disk has no room for a snapshot: it is tried again");
                snapshot.needed = !pipeline.as_stored();
            }
            Err(error) => return Err(error.into()),
        }
        let reader = journal.reader(from)?;
        let at_end = AtEnd::read(&pipeline, &journal, from)?;
        let journal_id = journal.id();
        let journal = Arc::new(journal.run(settings.journal.group_wait.0)?);
        Ok(Self { journal, journal_id, reader, pipeline, snapshot, spool, at_end, incidents })
    }

    /// What the engine begins with, and what the sources begin with.
    fn into_parts(self, settings: &Settings, cloud: CloudClient, status: Arc<Mutex<Status>>) -> (Parts, AtEnd) {
        let Self { journal, journal_id, reader, pipeline, snapshot, spool, at_end, incidents } = self;
        let state = |source: &SourceSettings| {
            let totals = at_end.counters.sources.get(source.name()).copied().unwrap_or_default();
            let state = SourceState::from_totals(totals.journalled, totals.redelivered);
            (source.name().to_owned(), Arc::new(state))
        };
        let parts = Parts {
            data_dir: settings.edge.data_dir.clone(),
            edge: settings.edge.id.to_string(),
            stop_within: settings.edge.stop_within.0,
            cut: settings.cut.clone(),
            journal_bytes_max: settings.journal.max_bytes.0,
            sender: journal.sender(),
            journal,
            journal_id,
            reader,
            pipeline,
            snapshot,
            uplink: Uplink::new(spool.id(), settings.cloud.urls.len(), link(settings, &spool)),
            spool,
            cloud,
            sources: settings.source.iter().map(state).collect(),
            status,
            incidents,
            outbox: None,
        };
        (parts, at_end)
    }
}

/// What sources need to know of all that was journalled.
#[derive(Debug)]
struct AtEnd {
    lists: Lists,
    places: Places,
    counters: Counters,
}

impl AtEnd {
    fn read(pipeline: &Pipeline, journal: &OpenJournal, from: Position) -> Result<Self, AgentError> {
        let (lists, places) = (pipeline.lists().clone(), pipeline.places().clone());
        let mut at_end = Self { lists, places, counters: pipeline.counters().clone() };
        let mut reader = journal.reader(from)?;
        loop {
            match reader.next() {
                Ok(Some(record)) => {
                    let Ok(entry) = Entry::read(Bytes::copy_from_slice(record.payload)) else { continue };
                    if let Some(message) = entry.message() {
                        at_end.counters.sources.entry(message.source.clone()).or_default().journalled += 1;
                    }
                    at_end.lists.apply(&entry);
                    at_end.places.apply(&entry);
                }
                Ok(None) => return Ok(at_end),
                // The pipeline reports it when it comes there.
                Err(ReadError::Damaged { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The bandwidths of the spool's lanes; one that is only drained has none.
fn link(settings: &Settings, spool: &Spool<Disk>) -> Link {
    let lanes = settings.lanes();
    let of = |name: &str| lanes.iter().find(|lane| lane.name.as_str() == name).and_then(|lane| lane.bandwidth);
    let bandwidths = spool.lanes().map(|lane| of(&lane.name).map(|bandwidth| bandwidth.0)).collect::<Vec<_>>();
    Link::new(settings.cloud.request_bytes.bytes(), &bandwidths)
}

fn spool_lane(lane: &LaneConfig, settings: &Settings) -> LaneSettings {
    LaneSettings {
        name: lane.name.to_string(),
        max_bytes: lane.max_bytes.0,
        segment_bytes: settings.lane_segment_bytes(),
        on_full: lane.on_full,
        raw: settings.raw_streams(),
        max_age_us: lane.max_age.map(|age| age.micros()),
    }
}
