//! Another configuration while the agent runs: on SIGHUP, or when its file has changed.
//!
//! The file is read and checked first; one that is wrong, or that changes what only a start can change, leaves everything as
//! it is, and `/status` says why. Then: sources that it changes are stopped, the configuration is an entry of the journal,
//! and when that is durable the sources that it changes or adds begin. The pipeline changes when it comes to the entry
//! (`engine/change.rs`). The journal and the sources that stay the same run through.

#[cfg(test)]
pub(super) mod tests;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::engine::Order;
use super::intake::Intake;
use super::status::ConfigurationStatus;
use super::{AgentError, AtEnd, configured};
use crate::config::{RuleSettings, Settings};
use crate::journal::Journal;
use crate::source::SourceState;
use crate::uplink::http::CloudClient;

/// How often the file is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// What an entry of the journal needs beside the text.
const ENTRY_BYTES: u64 = 1 << 10;

/// What a reload needs. One owner: the agent's task.
#[derive(Debug)]
pub(super) struct Reload {
    pub(super) watch: Watch,
    pub(super) asked: Arc<Notify>,
    pub(super) settings: Settings,
    pub(super) sources: Vec<(String, Arc<SourceState>)>,
    pub(super) intake: Intake,
    pub(super) journal: Arc<Journal>,
    pub(super) orders: mpsc::Sender<Order>,
    pub(super) configuration: Arc<Mutex<ConfigurationStatus>>,
    /// Whom the settings tell which commands may be done.
    pub(super) commanded: watch::Sender<Settings>,
    pub(super) token: CancellationToken,
}

/// Why the agent goes on by what it had.
enum Kept {
    /// The file's fault, for people.
    Refused(String),
    /// It is tried again.
    Later(String),
    Ended(AgentError),
}

impl From<AgentError> for Kept {
    fn from(error: AgentError) -> Self {
        Self::Ended(error)
    }
}

impl Reload {
    /// Waits until the file is to be read again.
    pub(super) async fn due(&mut self) {
        loop {
            tokio::select! {
                () = self.asked.notified() => return,
                () = tokio::time::sleep(LOOK_EVERY) => {
                    if self.watch.has_changed() {
                        return;
                    }
                }
            }
        }
    }

    /// Takes the file over, or says why not.
    ///
    /// # Errors
    /// Any is final.
    pub(super) async fn run(&mut self) -> Result<(), AgentError> {
        let (error, refused) = match self.take_over().await {
            Ok(()) => {
                let mut status = self.configuration.lock();
                let now_us = self.journal.clock().best_us();
                (status.reloads, status.loaded_at_us, status.last_error) = (status.reloads + 1, now_us, None);
                tracing::info!(version = self.settings.version, "another configuration");
                return Ok(());
            }
            Err(Kept::Ended(error)) => return Err(error),
            Err(Kept::Later(error)) => {
                self.watch.seen = None;
                (error, 0)
            }
            Err(Kept::Refused(error)) => (error, 1),
        };
        let mut status = self.configuration.lock();
        if status.last_error.as_ref() != Some(&error) {
            tracing::error!(error, "the configuration is not taken over: the agent goes on by what it had");
        }
        status.refused += refused;
        status.last_error = Some(error);
        Ok(())
    }

    async fn take_over(&mut self) -> Result<(), Kept> {
        let Some(path) = self.watch.path.clone() else {
            return Err(Kept::Refused("the agent was not started from a file".to_owned()));
        };
        self.watch.read();
        let read = tokio::task::spawn_blocking(move || Settings::load(&path));
        let next = read.await.map_err(|_| AgentError::Panicked)?.map_err(|error| Kept::Refused(error.to_string()))?;
        may_follow(&self.settings, &next).map_err(Kept::Refused)?;
        let cloud = if next.cloud == self.settings.cloud {
            None
        } else {
            let cloud = CloudClient::new(&next.cloud, &next.edge.id);
            let cloud = cloud.map_err(|error| Kept::Refused(format!("[cloud]: {error}")))?;
            Some(cloud.with_clock(Arc::clone(self.journal.clock())))
        };
        if self.journal.is_full() {
            return Err(Kept::Later("the journal has no room for another configuration".to_owned()));
        }
        next.warnings().iter().for_each(|warning| tracing::warn!("{warning}"));
        self.intake.stop_what_changes(&next).await;
        let (data_dir, journal) = (next.edge.data_dir.clone(), Arc::clone(&self.journal));
        self.tell(&next).await?;
        let read = tokio::task::spawn_blocking(move || AtEnd::now(&data_dir, &journal));
        let at_end = read.await.map_err(|_| AgentError::Panicked)??;
        let state = |name: &str| {
            let known = self.sources.iter().find(|(known, _)| known == name);
            known.cloned().unwrap_or_else(|| at_end.source_state(name))
        };
        self.sources = next.source.iter().map(|source| state(source.name())).collect();
        let order = Order { settings: next.clone(), cloud, sources: self.sources.clone() };
        // It takes it in its next turn; it has ended when it does not, which the agent sees.
        let _ = self.orders.send(order).await;
        self.intake.start(&next, &self.journal, at_end, &self.sources);
        self.journal.clock().change(next.clock.clone());
        self.commanded.send_replace(next.clone());
        self.settings = next;
        Ok(())
    }

    /// The configuration is durable in the journal when this returns, and so is all that stopped sources gave: what is
    /// journalled later goes by it.
    async fn tell(&self, next: &Settings) -> Result<(), Kept> {
        let stopping = || Kept::Later("the agent is stopping".to_owned());
        let mut sender = self.journal.sender();
        let mut durable = sender.durable();
        let entry = configured(next);
        let told = async {
            let ticket = sender.append(&entry).await.ok()?;
            durable.wait_for(|durable| *durable >= ticket).await.ok().map(drop)
        };
        tokio::select! {
            told = told => told.ok_or_else(stopping),
            () = self.token.cancelled() => Err(stopping()),
            // The engine has ended, and nothing frees a full journal any more.
            () = self.orders.closed() => Err(stopping()),
        }
    }
}

/// Refuses what only a start can change.
fn may_follow(settings: &Settings, next: &Settings) -> Result<(), String> {
    let keys = [
        ("edge.id", settings.edge.id != next.edge.id),
        ("edge.data_dir", settings.edge.data_dir != next.edge.data_dir),
        ("admin.listen", settings.admin != next.admin),
        ("journal", settings.journal != next.journal),
        ("the broker that gets alerts", broker(settings) != broker(next)),
    ];
    let changed = keys.iter().filter(|(_, changed)| *changed).map(|(key, _)| *key).collect::<Vec<_>>().join(", ");
    if !changed.is_empty() {
        return Err(format!("{changed}: this cannot change while the agent runs; restart it"));
    }
    if next.text.len() as u64 + ENTRY_BYTES > next.journal.segment_bytes.0 / 2 {
        return Err("the configuration is larger than half a segment of the journal".to_owned());
    }
    Ok(())
}

/// How alerts reach their broker; None when no rule tells any.
fn broker(settings: &Settings) -> Option<impl PartialEq + use<>> {
    let broker = settings.publisher().ok().filter(|_| settings.rule.iter().any(RuleSettings::is_told))?;
    let files = (broker.ca_file, broker.cert_file, broker.key_file);
    Some((broker.url, broker.version, broker.username, broker.password, broker.client_id, files))
}

/// The file, and how it looked when it was read.
#[derive(Debug)]
pub(super) struct Watch {
    path: Option<PathBuf>,
    seen: Option<Look>,
    /// How it looked last: a file that is still being written is left alone.
    last: Option<Look>,
}

type Look = (SystemTime, u64);

impl Watch {
    pub(super) fn new(path: Option<PathBuf>) -> Self {
        let mut watch = Self { path, seen: None, last: None };
        watch.read();
        watch
    }

    fn look(&self) -> Option<Look> {
        let metadata = fs::metadata(self.path.as_ref()?).ok()?;
        Some((metadata.modified().ok()?, metadata.len()))
    }

    /// It is read now.
    fn read(&mut self) {
        self.seen = self.look();
        self.last = self.seen;
    }

    /// Whether it is another than the one that was read, and was the same at the last look.
    fn has_changed(&mut self) -> bool {
        let look = self.look();
        let settled = std::mem::replace(&mut self.last, look) == look;
        look.is_some() && look != self.seen && settled
    }
}
