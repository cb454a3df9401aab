//! Links: what an alert on a topic brings about elsewhere, without anybody in between.
//!
//! A link listens to topics as a subscriber does, and brings what meets its condition to an edge as a command, to another topic,
//! or to a webhook. [`link`] reads one, [`loops`] finds links that would feed themselves, [`event`] is what a link tells,
//! [`runner`] is the one task that owns all of it, and [`log`] the stream `link_log` that every hop is written to before it is
//! done. Commands go through [`Courier`], because the door of edges is not in this crate. Decision 0018.

pub(crate) mod board;
pub(crate) mod event;
mod link;
mod log;
mod loops;
mod runner;
mod store;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use wire::{Command, CommandReply};

pub use self::board::LinkStatus;
use self::link::{Link, LinkSettings, Places};
use self::runner::{Change, Runner};
use self::store::LinkStore;
use crate::alerts::{AlertError, Alerts};
use crate::engine::Engine;
use crate::sink::Sink;

/// Links at a time.
pub const LINKS_MAX: usize = 256;
/// Longest text of one link.
pub const LINK_BYTES_MAX: usize = 16 << 10;
/// Changes of links that wait for the task.
const CHANGES_MAX: usize = 16;

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Carried {
    Answered(CommandReply),
    /// No answer within its time; whether the edge had fetched it.
    TimedOut {
        fetched: bool,
    },
    /// It was never handed out: why.
    Refused(String),
}

/// Brings commands to edges.
#[async_trait]
pub trait Courier: Send + Sync + std::fmt::Debug {
    /// Whether there is such an edge.
    fn knows(&self, edge: &str) -> bool;

    /// Has an edge do something, and waits for its answer, at most so long.
    async fn carry(&self, edge: &str, command: Command, within: Duration) -> Carried;
}

/// What can be set.
#[derive(Debug)]
pub struct LinkRoom {
    /// Where links that came over HTTP are kept.
    pub data_dir: PathBuf,
    /// Links of the configuration, a file or more each.
    pub directory: Option<PathBuf>,
    /// The webhooks that are configured, by name.
    pub webhooks: Vec<String>,
}

/// All of it.
#[derive(Debug)]
pub struct Links {
    engine: Arc<Engine>,
    changes: mpsc::Sender<Change>,
    places: Places,
    /// One change at a time: file and task agree.
    store: tokio::sync::Mutex<LinkStore>,
}

impl Links {
    /// Reads the links, and starts the task. It ends with the token.
    ///
    /// # Errors
    /// When a file of links cannot be read or is wrong, or links feed themselves; for people.
    pub fn start(
        engine: Arc<Engine>,
        sink: Arc<dyn Sink>,
        alerts: &Arc<Alerts>,
        courier: Arc<dyn Courier>,
        room: LinkRoom,
        token: CancellationToken,
    ) -> Result<Arc<Self>, String> {
        let places = Places { courier: Arc::clone(&courier), webhooks: room.webhooks };
        let (store, loaded) = LinkStore::open(&room.data_dir.join("links"), room.directory.as_deref())?;
        let mut links = Vec::new();
        for loaded in loaded {
            let link = Link::read(loaded.settings, &places);
            links.push((link, loaded.configured));
        }
        // A link that came over HTTP may be about an edge that is no longer configured: it waits. A file is a mistake of now.
        for (link, configured) in &links {
            if let (Err(refused), true) = (link, configured) {
                return Err(refused.reason.clone());
            }
        }
        let (changes, received) = mpsc::channel(CHANGES_MAX);
        let runner = Runner::new(Arc::clone(&engine), sink, Arc::clone(alerts), courier, links, received);
        tokio::spawn(runner.run(token));
        let store = tokio::sync::Mutex::new(store);
        Ok(Arc::new(Self { engine, changes, places, store }))
    }

    /// The links as they stand.
    pub fn all(&self) -> Vec<LinkStatus> {
        self.engine.links().all()
    }

    /// The text of a link that came over HTTP.
    pub async fn text(&self, name: &str) -> Option<String> {
        self.store.lock().await.text(name)
    }

    /// Adds or replaces a link. When it returns it is kept, and hears what is decided from now on.
    ///
    /// # Errors
    /// Why it is refused.
    pub async fn put(&self, name: &str, text: &str) -> Result<LinkStatus, AlertError> {
        let settings = LinkSettings::parse(name, text).map_err(AlertError::Invalid)?;
        let link = Link::read(settings.clone(), &self.places);
        let link = link.map_err(|refused| AlertError::Invalid(refused.reason))?;
        let mut store = self.store.lock().await;
        store.admits(&settings).map_err(AlertError::Invalid)?;
        store.put(settings, text).map_err(AlertError::Failed)?;
        self.ask(|reply| Change::Put { link: Box::new(link), reply }).await?;
        let stops = || AlertError::Failed("the node stops".to_owned());
        self.all().into_iter().find(|link| link.name == name).ok_or_else(stops)
    }

    /// Removes a link. What it has begun goes on to its end.
    ///
    /// # Errors
    /// When there is none of this name, or it is from the configuration.
    pub async fn delete(&self, name: &str) -> Result<(), AlertError> {
        let mut store = self.store.lock().await;
        store.delete(name).map_err(AlertError::NotFound)?;
        let name = name.to_owned();
        self.ask(|reply| Change::Delete { name, reply }).await
    }

    async fn ask(&self, change: impl FnOnce(oneshot::Sender<()>) -> Change) -> Result<(), AlertError> {
        let stops = || AlertError::Failed("the node stops".to_owned());
        let (reply, answered) = oneshot::channel();
        self.changes.send(change(reply)).await.map_err(|_| stops())?;
        answered.await.map_err(|_| stops())
    }

    /// What links count since the node started, as Prometheus reads it.
    pub fn metrics(&self) -> String {
        self.engine.links().metrics()
    }
}
