//! The agent, put together: journal, pipeline, spool, uplink, sources and the admin door, and their order of stopping.
//!
//! Start: recover the spool and the journal, restore the pipeline from its snapshot, read the journal once for the
//! redelivery lists, then begin. Stop: sources first, then the journal, then the engine, which brings what is journalled
//! to the spool and what the cloud takes at once to the cloud. A failed disk stops the agent by itself; nothing is
//! retried that a disk refused.

mod engine;
mod history;
mod intake;
mod rate;
mod reload;
mod snapshot_file;
mod status;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use rand::Rng;
use segment_log::{Disk, Options, Position, ReadError, Reader};
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use wire::SpoolId;

pub use self::engine::EngineError;
pub(crate) use self::engine::spool_directory;
use self::engine::{Engine, Order, Parts, Snapshot, incident, remove_other_spools};
use self::intake::Intake;
use self::reload::{Reload, Watch};
pub use self::snapshot_file::SnapshotFileError;
pub use self::status::{
    ConfigurationStatus, FiringStatus, JournalStatus, LaneStatus, LastValue, RowsStatus, RuleStatus, SourceStatus,
    Status, StreamStatus, UplinkStatus,
};
use crate::admin;
use crate::clock::{self, Clock, Machine, Time, Told};
use crate::config::{LaneSettings as LaneConfig, Settings};
use crate::entry::Entry;
use crate::journal::{Journal, JournalError, OpenJournal};
use crate::pipeline::{AGENT_VERSION, Counters, Pipeline, SnapshotError, known_to_sources};
use crate::places::Places;
use crate::publish::{self, Outbox};
use crate::redelivery::Lists;
use crate::remote;
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
    reload: Arc<Notify>,
    stopped: tokio::task::JoinHandle<Result<(), AgentError>>,
}

impl AgentHandle {
    /// What it tells about itself now.
    pub fn status(&self) -> Status {
        self.status.lock().clone()
    }

    /// Notified, it reads its configuration's file again; `/status` says what came of it.
    pub fn reload(&self) -> Arc<Notify> {
        Arc::clone(&self.reload)
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
    start_by(settings, Box::new(Machine::new()), token).await
}

/// The same, by the time of another machine.
pub(crate) async fn start_by(
    settings: Settings,
    time: Box<dyn Time>,
    token: CancellationToken,
) -> Result<AgentHandle, AgentError> {
    // What changes from now on is another one.
    let watch = Watch::new(settings.file.clone());
    let data_dir = &settings.edge.data_dir;
    std::fs::create_dir_all(data_dir).map_err(|source| AgentError::DataDir { path: data_dir.clone(), source })?;
    let address = settings.admin.listen;
    let listener = TcpListener::bind(address).await.map_err(|source| AgentError::Listen { address, source })?;
    let admin = listener.local_addr().map_err(|source| AgentError::Listen { address, source })?;
    let cloud = CloudClient::new(&settings.cloud, &settings.edge.id)?;
    let recovering = settings.clone();
    // Recovery reads all of journal and spool.
    let recovered = tokio::task::spawn_blocking(move || Recovered::open(&recovering, time));
    let recovered = recovered.await.map_err(|_| AgentError::Panicked)??;

    let status = Arc::new(Mutex::new(Status::default()));
    let (orders, orders_of_engine) = mpsc::channel(1);
    let outbox = Outbox::of(&settings);
    let (mut parts, at_end) = recovered.into_parts(&settings, cloud, Arc::clone(&status), orders_of_engine);
    parts.outbox = outbox.as_ref().map(|(_, outbox)| Arc::clone(outbox));
    let remote = Arc::clone(&parts.remote);
    let (journal, sources) = (Arc::clone(&parts.journal), parts.sources.clone());
    let configuration = Arc::clone(&parts.configuration);
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
    let mut intake = Intake::new(settings.clone(), token.child_token());
    intake.start(&settings, &journal, at_end, &sources);
    // With the journal's thread, which the sources' last entries need, too.
    tokio::spawn(clock::keep(Arc::clone(&journal), token.child_token()));
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
    let (commanded, newest) = watch::channel(settings.clone());
    let hand = tokio::spawn(remote::run(newest, remote, token.child_token()));
    tokio::spawn(admin::serve(listener, Arc::clone(&status), admin_token.clone()));
    tracing::info!(%admin, edge = %settings.edge.id, "the agent runs");
    let asked = Arc::new(Notify::new());
    let reload = Reload {
        watch,
        asked: Arc::clone(&asked),
        settings,
        sources,
        intake,
        journal,
        orders,
        configuration,
        commanded,
        token: token.clone(),
    };
    let stopped = tokio::spawn(async move {
        let result = supervise(token, reload, engine_token, engine_done, admin_token).await;
        // It ends by the token, or does not outlive the agent.
        hand.abort();
        let _ = hand.await;
        if let Some(publisher) = publisher {
            // What is left goes with the next start.
            let _ = publisher.await;
        }
        result
    });
    Ok(AgentHandle { admin, status, reload: asked, stopped })
}

/// Waits for the end, meanwhile takes over what changes in the configuration, and ends all in order.
async fn supervise(
    token: CancellationToken,
    mut reload: Reload,
    engine_token: CancellationToken,
    mut engine_done: oneshot::Receiver<Result<(), EngineError>>,
    admin: CancellationToken,
) -> Result<(), AgentError> {
    let mut failed = reload.journal.failed();
    let mut engine_result = None;
    let result = loop {
        tokio::select! {
            () = token.cancelled() => break Ok(()),
            engine = &mut engine_done => {
                engine_result = Some(engine);
                break Ok(());
            }
            error = async { failed.wait_for(Option::is_some).await.ok().and_then(|error| error.clone()) } => {
                break error.map_or(Err(AgentError::Panicked), |error| Err(AgentError::JournalEnded(error)));
            }
            () = reload.due() => {
                if let Err(error) = reload.run().await {
                    break Err(error);
                }
            }
        }
    };
    let Reload { intake, journal, .. } = reload;
    intake.stop().await;
    tokio::task::spawn_blocking(move || journal.stop()).await.map_err(|_| AgentError::Panicked)?;
    engine_token.cancel();
    let engine = match engine_result {
        Some(engine) => engine,
        None => engine_done.await,
    };
    admin.cancel();
    result.and(engine.map_err(|_| AgentError::Panicked)?.map_err(AgentError::from))
}

/// What a start finds on disk.
struct Recovered {
    journal: Arc<Journal>,
    journal_id: segment_log::LogId,
    reader: segment_log::Reader<Disk>,
    pipeline: Pipeline,
    /// What the pipeline goes by.
    in_force: Settings,
    snapshot: Snapshot,
    spool: Spool<Disk>,
    at_end: AtEnd,
    incidents: Vec<String>,
}

impl Recovered {
    fn open(settings: &Settings, time: Box<dyn Time>) -> Result<Self, AgentError> {
        let mut time = Some(time);
        let (snapshot, damaged) = match snapshot_file::read(&settings.edge.data_dir) {
            Ok(snapshot) => (snapshot, None),
            Err(error @ SnapshotFileError::Damaged(_)) => (None, Some(error.to_string())),
            Err(error) => return Err(error.into()),
        };
        let kept = snapshot.as_ref().and_then(|snapshot| snapshot.configuration.as_ref());
        let in_force = match kept.filter(|(version, _)| *version != settings.version) {
            Some((version, text)) => Settings::parse_kept(*version, text).unwrap_or_else(|error| {
                tracing::warn!(error, "what was configured before is not understood any more");
                settings.clone()
            }),
            None => settings.clone(),
        };
        if in_force.version != settings.version {
            if let Some(recovered) =
                Self::open_by(settings, in_force, snapshot.as_ref(), damaged.as_deref(), &mut time)?
            {
                return Ok(recovered);
            }
            tracing::warn!("the journal has no room for the new configuration: it counts from the snapshot on");
        }
        let recovered = Self::open_by(settings, settings.clone(), snapshot.as_ref(), damaged.as_deref(), &mut time)?;
        Ok(recovered.expect("none is only for another configuration"))
    }

    /// As it was left; the journal says where the present configuration begins, and what is known of the time. None when it
    /// has no room for the first; then `time` is left.
    fn open_by(
        settings: &Settings,
        in_force: Settings,
        snapshot: Option<&snapshot_file::Snapshot>,
        damaged: Option<&str>,
        time: &mut Option<Box<dyn Time>>,
    ) -> Result<Option<Self>, AgentError> {
        let data_dir = &settings.edge.data_dir;
        let mut incidents = Vec::new();
        let directory = spool_directory(data_dir);
        let spool_settings = spool_settings_with(&in_force, settings);
        let (spool, damage) = Spool::open(&Disk, &directory, spool_settings, SpoolId(rand::rng().random()))?;
        damage.iter().for_each(|damage| incident(&mut incidents, format!("spool: {damage:?}")));
        remove_other_spools(&directory, spool.id());
        let (mut journal, opening) = OpenJournal::open(data_dir.join("journal"), journal_options(settings))?;
        opening.incidents.iter().for_each(|damage| incident(&mut incidents, format!("journal: {damage:?}")));
        let lanes = spool.cut_positions();
        let (pipeline, bytes) = match snapshot {
            Some(snapshot) if snapshot.journal != journal.id() => {
                return Err(AgentError::OtherJournal(data_dir.clone()));
            }
            Some(snapshot) => {
                let bytes = snapshot.state.len() as u64;
                (Pipeline::restore(&in_force, &lanes, snapshot.state.clone())?, bytes)
            }
            None => (Pipeline::new(&in_force, opening.start, &lanes), 0),
        };
        if let Some(error) = damaged {
            // Rows are safe by the lanes' positions; open windows and counts before the journal's start are not.
            incident(&mut incidents, format!("{error}: windows and counters begin anew"));
        }
        let from = pipeline.position();
        let seen = lanes.values().copied().fold(from, Position::max);
        if let Some(missing) = journal.skip_to(seen)? {
            incident(&mut incidents, format!("journal: {missing}: the disk lost what it had called written"));
        }
        // Now, so that lanes and windows of this configuration are known before its first cut.
        let mut snapshot = Snapshot { position: from, bytes, needed: false };
        let configuration = (in_force.version, in_force.text.as_str());
        match snapshot_file::write(data_dir, journal.id(), configuration, &pipeline.snapshot()) {
            Ok(()) => {}
            Err(error) if error.is_full() => {
                tracing::warn!(%error, "the disk has no room for a snapshot: it is tried again");
                snapshot.needed = !pipeline.as_stored();
            }
            Err(error) => return Err(error.into()),
        }
        let at_end = AtEnd::of(&pipeline).read(journal.reader(from)?)?;
        if at_end.configured.unwrap_or(in_force.version) != settings.version
            && !journal.record(&configured(settings))?
            && in_force.version != settings.version
        {
            return Ok(None);
        }
        let reader = journal.reader(from)?;
        let journal_id = journal.id();
        let time = time.take().unwrap_or_else(|| Box::new(Machine::new()));
        let (clock, mark) = Clock::begin(time, settings.clock.clone(), &at_end.told);
        if !journal.record_in_reserve(&Entry::Clock(mark))? {
            tracing::warn!("the journal has no room for the clock: what comes goes by what it said last");
        }
        let journal = Arc::new(journal.run(settings.journal.group_wait.0, Arc::new(clock))?);
        Ok(Some(Self { journal, journal_id, reader, pipeline, in_force, snapshot, spool, at_end, incidents }))
    }

    /// What the engine begins with, and what the sources begin with.
    fn into_parts(
        self,
        settings: &Settings,
        cloud: CloudClient,
        status: Arc<Mutex<Status>>,
        orders: mpsc::Receiver<Order>,
    ) -> (Parts, AtEnd) {
        let Self { journal, journal_id, reader, pipeline, in_force, snapshot, spool, at_end, incidents } = self;
        let loaded_at_us = journal.clock().best_us();
        let configuration = ConfigurationStatus { loaded_at_us, ..ConfigurationStatus::default() };
        let parts = Parts {
            data_dir: settings.edge.data_dir.clone(),
            edge: settings.edge.id.to_string(),
            stop_within: settings.edge.stop_within.0,
            cut: settings.cut.clone(),
            journal_bytes_max: settings.journal.max_bytes.0,
            sender: journal.sender(),
            journal: Arc::clone(&journal),
            journal_id,
            reader,
            pipeline,
            snapshot,
            uplink: Uplink::new(
                spool.id(),
                settings.cloud.urls.len(),
                Link::new(settings.cloud.request_bytes.bytes(), &bandwidths(settings, &spool)),
            ),
            spool,
            cloud: cloud.with_clock(Arc::clone(journal.clock())),
            sources: settings.source.iter().map(|source| at_end.source_state(source.name())).collect(),
            settings: settings.clone(),
            in_force,
            orders,
            configuration: Arc::new(Mutex::new(configuration)),
            status,
            incidents,
            outbox: None,
            remote: Arc::default(),
        };
        (parts, at_end)
    }
}

/// What sources need to know of all that was journalled, and which configuration it told last.
#[derive(Debug)]
struct AtEnd {
    lists: Lists,
    places: Places,
    counters: Counters,
    told: Told,
    configured: Option<u64>,
}

impl AtEnd {
    /// What a pipeline knows of it, which stands at its own position.
    fn of(pipeline: &Pipeline) -> Self {
        let (lists, places) = (pipeline.lists().clone(), pipeline.places().clone());
        let (counters, told) = (pipeline.counters().clone(), pipeline.told().clone());
        Self { lists, places, counters, told, configured: None }
    }

    /// From the snapshot of a running agent on.
    fn now(data_dir: &Path, journal: &Journal) -> Result<Self, AgentError> {
        loop {
            let snapshot = snapshot_file::read(data_dir)?;
            let Some(snapshot) = snapshot else { return Err(AgentError::OtherJournal(data_dir.to_owned())) };
            let (from, lists, places, counters) = known_to_sources(snapshot.state)?;
            let at_end = Self { lists, places, counters, told: Told::default(), configured: None };
            match journal.reader(from).map_err(AgentError::from).and_then(|reader| at_end.read(reader)) {
                // There is a newer snapshot by now.
                Err(AgentError::Read(ReadError::Freed { .. })) => {}
                other => return other,
            }
        }
    }

    fn read(mut self, mut reader: Reader<Disk>) -> Result<Self, AgentError> {
        loop {
            match reader.next() {
                Ok(Some(record)) => {
                    let Ok(entry) = Entry::read(Bytes::copy_from_slice(record.payload)) else { continue };
                    if let Some(message) = entry.message() {
                        self.counters.sources.entry(message.source.clone()).or_default().journalled += 1;
                    }
                    if let Entry::Configured { version, .. } = &entry {
                        self.configured = Some(*version);
                    }
                    self.lists.apply(&entry);
                    self.places.apply(&entry);
                    self.told.follow(&entry);
                }
                Ok(None) => return Ok(self),
                // The pipeline reports it when it comes there.
                Err(ReadError::Damaged { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// What a source that begins tells: its counts go on.
    fn source_state(&self, name: &str) -> (String, Arc<SourceState>) {
        let totals = self.counters.sources.get(name).copied().unwrap_or_default();
        (name.to_owned(), Arc::new(SourceState::from_totals(totals.journalled, totals.redelivered)))
    }
}

/// How the journal of these settings is opened.
pub(crate) fn journal_options(settings: &Settings) -> Options {
    Options {
        segment_bytes: settings.journal.segment_bytes.0,
        max_bytes: settings.journal.max_bytes.0,
        reserve_bytes: JOURNAL_RESERVE_BYTES,
    }
}

/// How the spool of these settings is opened.
pub(crate) fn spool_settings(settings: &Settings) -> SpoolSettings {
    spool_settings_with(settings, settings)
}

/// The entry behind which the settings count.
fn configured(settings: &Settings) -> Entry {
    Entry::Configured { version: settings.version, text: settings.text.clone() }
}

/// The lanes that a pipeline of settings writes to, with the sizes of `sizes`.
fn spool_settings_with(of: &Settings, sizes: &Settings) -> SpoolSettings {
    let segment_bytes = of.lane_segment_bytes().max(sizes.lane_segment_bytes());
    let raw = &of.raw_streams() | &sizes.raw_streams();
    let sizes = sizes.lanes();
    let lane = |lane: LaneConfig| {
        let size = sizes.iter().find(|size| size.name == lane.name).unwrap_or(&lane);
        LaneSettings {
            name: lane.name.to_string(),
            max_bytes: size.max_bytes(),
            segment_bytes,
            on_full: size.on_full,
            raw: raw.clone(),
            max_age_us: size.max_age.map(|age| age.micros()),
        }
    };
    SpoolSettings {
        edge: of.edge.id.clone(),
        agent: AGENT_VERSION.to_owned(),
        configuration: of.version,
        lanes: of.lanes().into_iter().map(lane).collect(),
    }
}

/// Of the spool's lanes; one that is only drained has none.
fn bandwidths(settings: &Settings, spool: &Spool<Disk>) -> Vec<Option<u64>> {
    let lanes = settings.lanes();
    let of = |name: &str| lanes.iter().find(|lane| lane.name.as_str() == name).and_then(|lane| lane.bandwidth);
    spool.lanes().map(|lane| of(&lane.name).map(|bandwidth| bandwidth.0)).collect()
}
