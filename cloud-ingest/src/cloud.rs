//! Puts the rooms together: store, WAL, tables, the ingest thread, and the HTTP server.
//!
//! [`Cloud::open`] opens and recovers everything before the port answers ready. Stopping: no more requests are
//! taken, maintenance is given up, what is hot is committed, the WAL is marked.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use axum::Router;
use axum::serve::{Listener, ListenerExt};
use segment_log::Disk;
use tokio::sync::Semaphore;
use tokio_util::sync::{CancellationToken, DropGuard};
use url::Url;

use crate::catalog::Catalogue;
use crate::commands::Commands;
use crate::config::Settings;
use crate::http::{self, Door};
use crate::ingest::{Done, Ingest, Job, StartError, queue};
use crate::maintain::Maintenance;
use crate::metrics::Metrics;
use crate::origins;
use crate::remarks::Remarks;
use crate::store::Store;
use crate::writer::Writer;

/// The exit code after a failed sync (`EX_IOERR`).
const EXIT_FAULT: i32 = 74;

/// Why a node does not start.
#[derive(Debug, thiserror::Error)]
pub enum CloudError {
    #[error("make the directory {path}")]
    Directory { path: String, source: std::io::Error },
    #[error("listen on {address}")]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("recover")]
    Recover(#[from] tokio::task::JoinError),
}

/// A node that has recovered and does not listen yet: the tables can be given to the doors for questions.
#[derive(Debug)]
pub struct Cloud {
    settings: Settings,
    store: Store,
    catalogue: Arc<Catalogue>,
    metrics: Arc<Metrics>,
    door: Arc<Door>,
    thread: JoinHandle<()>,
    upkeep: Upkeep,
}

/// The thread that keeps tables in shape, and how it is stopped: also when the node is dropped.
#[derive(Debug)]
struct Upkeep {
    thread: JoinHandle<()>,
    stop: DropGuard,
}

/// A node that listens.
#[derive(Debug)]
pub struct CloudHandle {
    /// Where it really listens.
    pub http: SocketAddr,
    door: Arc<Door>,
    server: tokio::task::JoinHandle<std::io::Result<()>>,
    origins: Origins,
    thread: JoinHandle<()>,
    upkeep: Upkeep,
}

/// The task that writes which agents sealed batches, and how it is stopped.
#[derive(Debug)]
struct Origins {
    task: tokio::task::JoinHandle<()>,
    stop: DropGuard,
}

impl Cloud {
    /// Opens the store, replays the WAL, starts the ingest thread.
    ///
    /// # Errors
    /// When a directory, the WAL or a table cannot be opened.
    pub async fn open(settings: Settings) -> Result<Self, CloudError> {
        std::fs::create_dir_all(&settings.data_dir)
            .map_err(|source| CloudError::Directory { path: settings.data_dir.display().to_string(), source })?;
        let store = open_store(&settings)?;
        let (catalogue, metrics) = (Arc::new(Catalogue::default()), Arc::new(Metrics::default()));
        let (runtime, of_remarks) = (tokio::runtime::Handle::current(), store.clone());
        let opening = {
            let (settings, catalogue, metrics) = (settings.clone(), Arc::clone(&catalogue), Arc::clone(&metrics));
            let store = store.clone();
            move || Ingest::open(Disk, settings, store, catalogue, metrics, runtime)
        };
        let (ingest, jobs) = tokio::task::spawn_blocking(opening).await??;
        let thread = std::thread::Builder::new()
            .name("weir-ingest".to_owned())
            .spawn(move || {
                if let Err(fault) = ingest.run() {
                    tracing::error!(%fault, cause = std::error::Error::source(&fault), "the disk did not keep what was written: stopping");
                    std::process::exit(EXIT_FAULT);
                }
            })
            .map_err(StartError::Thread)?;
        let upkeep = {
            let jobs = jobs.clone();
            let adopt = move |stream, table| {
                // The thread that is asked has stopped: so does this one.
                jobs.send(Job::Done(Box::new(Done::Maintained { stream, table }))).ok();
            };
            let (settings, catalogue, metrics) = (settings.clone(), Arc::clone(&catalogue), Arc::clone(&metrics));
            Upkeep::start(Maintenance::new(settings, store, catalogue, metrics, Box::new(adopt)))?
        };
        let edges = settings.edge.iter().map(|edge| edge.id.clone());
        let commands = Arc::new(Commands::new(edges, settings.links.commands_waiting));
        let counted = Arc::clone(&commands);
        metrics.host(move || counted.metrics());
        let door = Arc::new(Door {
            commands: Arc::clone(&commands),
            edges: settings.edge.clone(),
            write: settings.write.clone(),
            request_bytes_max: settings.limits.request_bytes.bytes(),
            room: http::room_of(settings.limits.waiting_bytes.bytes()),
            decoded: http::room_of(settings.limits.decoded_bytes.bytes()),
            places: queue::places(&settings),
            reading: Arc::new(Semaphore::new(2 * std::thread::available_parallelism().map_or(1, usize::from))),
            jobs,
            metrics: Arc::clone(&metrics),
            own_names: catalogue.own_names().clone(),
            ready: AtomicBool::new(false),
            schemas: Default::default(),
            origins: Default::default(),
        });
        Ok(Self { settings, store: of_remarks, catalogue, metrics, door, thread, upkeep })
    }

    /// The tables of this node.
    pub fn catalogue(&self) -> Arc<Catalogue> {
        Arc::clone(&self.catalogue)
    }

    /// Where this node's own streams are written.
    pub fn writer(&self) -> Writer {
        Writer::new(self.door.jobs.clone(), self.door.places.clone())
    }

    /// How something is said of its tables.
    pub fn remarks(&self) -> Remarks {
        Remarks::new(self.store.clone(), Arc::clone(&self.catalogue), self.door.jobs.clone())
    }

    /// What edges are to do.
    pub fn commands(&self) -> Arc<Commands> {
        Arc::clone(&self.door.commands)
    }

    /// What this node counts.
    pub fn metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.metrics)
    }

    /// Answers those whom the listener lets in, and `questions` on the same port, until the token is cancelled.
    ///
    /// # Errors
    /// When the listener has no address.
    pub fn listen<L>(self, listener: L, questions: Router, token: CancellationToken) -> Result<CloudHandle, CloudError>
    where
        L: Listener<Addr = SocketAddr>,
    {
        let listen = |source| CloudError::Listen { address: self.settings.listen.http, source };
        let http = listener.local_addr().map_err(listen)?;
        let routes = http::router(Arc::clone(&self.door)).merge(questions);
        let service = routes.into_make_service_with_connect_info::<SocketAddr>();
        self.door.ready.store(true, Ordering::Relaxed);
        let door = Arc::clone(&self.door);
        let server = tokio::spawn(async move {
            let stop = async move {
                token.cancelled().await;
                door.ready.store(false, Ordering::Relaxed);
                door.commands.close();
            };
            // Tapped, because only so a listener of any kind tells the peer.
            axum::serve(listener.tap_io(|_| {}), service).with_graceful_shutdown(stop).await
        });
        let stop = CancellationToken::new();
        let writer = Writer::new(self.door.jobs.clone(), self.door.places.clone());
        let task = tokio::spawn(origins::run(self.catalogue, writer, stop.clone()));
        let origins = Origins { task, stop: stop.drop_guard() };
        Ok(CloudHandle { http, door: self.door, server, origins, thread: self.thread, upkeep: self.upkeep })
    }
}

impl Upkeep {
    fn start(maintenance: Maintenance) -> Result<Self, StartError> {
        let (token, runtime) = (CancellationToken::new(), tokio::runtime::Handle::current());
        let stop = token.clone().drop_guard();
        let thread = std::thread::Builder::new()
            .name("weir-lake".to_owned())
            .spawn(move || runtime.block_on(maintenance.run(token)))
            .map_err(StartError::Thread)?;
        Ok(Self { thread, stop })
    }

    /// Gives up what it is at, and waits for its end.
    fn stop(self) {
        drop(self.stop);
        if self.thread.join().is_err() {
            tracing::error!("the maintenance thread died; tables are as they were");
        }
    }
}

impl CloudHandle {
    /// After the token is cancelled: waits for open requests a moment, then commits what is hot.
    pub async fn stopped(self) {
        const REQUESTS_MAX: std::time::Duration = std::time::Duration::from_secs(5);
        if tokio::time::timeout(REQUESTS_MAX, self.server).await.is_err() {
            tracing::warn!("open requests are broken off");
        }
        drop(self.origins.stop);
        self.origins.task.await.ok();
        let (door, thread, upkeep) = (self.door, self.thread, self.upkeep);
        let joined = tokio::task::spawn_blocking(move || {
            upkeep.stop();
            door.jobs.send(Job::Stop).ok();
            thread.join()
        });
        if !matches!(joined.await, Ok(Ok(()))) {
            tracing::error!("the ingest thread died; the wal has what is not committed");
        }
    }
}

/// The store of a configuration.
///
/// # Errors
/// When the directory cannot be made, or the address is none.
pub fn open_store(settings: &Settings) -> Result<Store, CloudError> {
    Ok(Store::open_with(&store_url(settings)?, &settings.store.s3).map_err(StartError::Store)?)
}

/// `store.url`, or the directory `tables` beside the WAL.
fn store_url(settings: &Settings) -> Result<String, CloudError> {
    if let Some(url) = &settings.store.url {
        return Ok(url.clone());
    }
    let tables = settings.data_dir.join("tables");
    let directory = |source| CloudError::Directory { path: tables.display().to_string(), source };
    std::fs::create_dir_all(&tables).map_err(directory)?;
    let absolute = Path::canonicalize(&tables).map_err(directory)?;
    Url::from_directory_path(&absolute)
        .map(String::from)
        .map_err(|()| directory(std::io::ErrorKind::InvalidInput.into()))
}
