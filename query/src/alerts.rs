//! Alerts that an operator can trust: rules as SQL, episodes, and the record of what was decided.
//!
//! `rule` reads a rule, `rows` and `statement` find what it is about, `episodes` decides (pure), `log` is the stream
//! that everything is written to, and `runner` is the one task that owns all of it. What is told goes through
//! [`crate::publish`]. Decision 0017.

mod claims;
pub(crate) mod episode;
pub(crate) mod episodes;
mod history;
mod late;
pub(crate) mod log;
mod metrics;
mod order;
mod rows;
pub(crate) mod rule;
mod runner;
mod shown;
pub(crate) mod silence;
pub(crate) mod statement;
pub(crate) mod store;
pub(crate) mod template;
#[cfg(test)]
mod tests;
pub(crate) mod topic;
mod trial;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use self::episode::Episode;
pub use self::episode::Severity;
use self::metrics::Counts;
pub use self::rule::{LANE, RULE_BYTES_MAX, RULES_MAX, RuleSettings};
use self::rule::{Rule, RuleError};
use self::runner::{Command, Limits, Runner};
pub use self::shown::{OPEN_MAX, Opened, Page};
use self::silence::Silence;
use self::store::RuleStore;
pub use self::topic::TopicFilter;
pub use self::trial::{Span as TrialSpan, Trial};
use crate::engine::Engine;
use crate::links::event::LinkEvent;
use crate::publish::alertmanager::REFRESH_EVERY;
use crate::publish::target::{Place, TargetKind, TargetSettings, TargetStatus, Way};
use crate::publish::{Hub, alertmanager, mqtt, webhook};
use crate::sink::Sink;

/// Requests of people that wait for the task.
const COMMANDS_MAX: usize = 256;

/// What can be set.
#[derive(Debug, Clone)]
pub struct AlertSettings {
    /// Where rules that came over HTTP are kept.
    pub data_dir: PathBuf,
    /// Rules of the configuration, a file or more each.
    pub directory: Option<PathBuf>,
    /// What happened longer ago is a backfill.
    pub horizon: Duration,
    /// Rows that come later than so long after they happened are not judged any more by rules that look row by row.
    pub late_max: Duration,
    /// Rows that may be read to judge some late ones; a stretch of the table that has more is given up.
    pub late_rows_max: u64,
    /// An alert that only edges raise which were not heard for so long is stale.
    pub stale_after: Duration,
    /// Devices of one stream whose newest row is remembered.
    pub devices_max: usize,
    /// Who listens to `/v1/alerts/stream` at a time.
    pub subscribers_max: usize,
    pub targets: Vec<TargetSettings>,
}

/// A rule as it stands.
#[derive(Debug, Clone, Serialize)]
pub struct RuleStatus {
    pub name: String,
    /// `runs`, `waits` for its stream, or `refused`.
    pub state: &'static str,
    pub reason: Option<String>,
    /// `rows`, `statement` or `absent`.
    pub kind: Option<&'static str>,
    pub hash: String,
    /// Whether it is from a file of the configuration, and so not changed over HTTP.
    pub configured: bool,
    /// Rows on which its condition failed, or statements that did, since the start.
    pub failed: u64,
    /// Alerts that did not begin because it has `max_instances`, since the start.
    pub refused: u64,
    /// Rows that came too late, or were too much, to be judged, since the start.
    pub unjudged: u64,
    pub last_error: Option<String>,
}

/// Why something is not done.
#[derive(Debug, thiserror::Error)]
pub enum AlertError {
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    Failed(String),
}

/// What somebody says of an alert.
#[derive(Debug, Clone)]
pub enum Word {
    Acknowledge,
    Assign(String),
    Comment,
    Resolve,
}

/// All of it.
#[derive(Debug)]
pub struct Alerts {
    engine: Arc<Engine>,
    commands: mpsc::Sender<Command>,
    hub: Arc<Hub>,
    rules: Arc<Mutex<BTreeMap<String, RuleStatus>>>,
    counts: Arc<Counts>,
    targets: Vec<Arc<Mutex<TargetStatus>>>,
    /// One change of the rules at a time: file and task agree.
    store: tokio::sync::Mutex<RuleStore>,
    token: CancellationToken,
}

impl Alerts {
    /// Reads the rules, and starts the task and one for each target. They end with the token.
    ///
    /// # Errors
    /// When a file of rules cannot be read or is wrong, or no thread can be started; for people.
    pub fn start(
        engine: Arc<Engine>,
        sink: Arc<dyn Sink>,
        settings: AlertSettings,
        token: CancellationToken,
    ) -> Result<Arc<Self>, String> {
        let (store, loaded) = RuleStore::open(&settings.data_dir.join("rules"), settings.directory.as_deref())?;
        let hub = Arc::new(Hub::new(Arc::clone(&engine), settings.subscribers_max));
        let (commands, received) = mpsc::channel(COMMANDS_MAX);
        let (rules, counts) = (Arc::default(), Arc::<Counts>::default());
        let runner = Runner::new(
            (Arc::clone(&engine), Arc::clone(&sink), Arc::clone(&hub)),
            Limits {
                horizon: micros(settings.horizon),
                late_max: micros(settings.late_max),
                late_rows_max: settings.late_rows_max,
                stale_after: micros(settings.stale_after),
                devices_max: settings.devices_max,
            },
            loaded,
            (Arc::clone(&rules), Arc::clone(&counts)),
            received,
        );
        let (stop, ends) = (token.clone(), Ends(token.clone()));
        std::thread::Builder::new()
            .name("weir-alerts".to_owned())
            .spawn(move || {
                let _ends = ends;
                match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                    Ok(runtime) => runtime.block_on(runner.run(stop)),
                    Err(error) => tracing::error!(%error, "no runtime for alerts"),
                }
            })
            .map_err(|error| format!("start the thread of alerts: {error}"))?;
        let targets = settings.targets.iter().map(|target| {
            let status = TargetStatus { name: target.name.clone(), ..TargetStatus::default() };
            let status = Arc::new(Mutex::new(status));
            let place = Place::new(
                target.clone(),
                Arc::clone(&engine),
                Arc::clone(&sink),
                Arc::clone(&hub),
                Arc::clone(&status),
            );
            serve(&target.kind, place, Firing(commands.clone()), token.clone());
            status
        });
        let targets = targets.collect();
        let store = tokio::sync::Mutex::new(store);
        Ok(Arc::new(Self { engine, commands, hub, rules, counts, targets, store, token }))
    }

    /// What is told.
    pub fn hub(&self) -> &Arc<Hub> {
        &self.hub
    }

    /// Ends with the node.
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// The rules as they stand.
    pub fn rules(&self) -> Vec<RuleStatus> {
        self.rules.lock().values().cloned().collect()
    }

    /// The targets as they stand.
    pub fn targets(&self) -> Vec<TargetStatus> {
        self.targets.iter().map(|target| target.lock().clone()).collect()
    }

    /// The text of a rule that came over HTTP.
    pub async fn text(&self, name: &str) -> Option<String> {
        self.store.lock().await.text(name)
    }

    /// Whether a rule can run: what kind it is, and its hash.
    ///
    /// # Errors
    /// Why not.
    pub async fn check(&self, settings: RuleSettings) -> Result<RuleStatus, AlertError> {
        let name = settings.name.clone();
        let rule =
            Rule::compile(&self.engine, settings).await.map_err(|error| AlertError::Invalid(error.to_string()))?;
        Ok(shown::status_of(&name, Ok(&rule), false))
    }

    /// Adds or replaces a rule. When it returns it is kept and runs.
    ///
    /// # Errors
    /// Why it is refused.
    pub async fn put(self: &Arc<Self>, name: &str, text: &str) -> Result<RuleStatus, AlertError> {
        let settings = RuleSettings::parse(name, text).map_err(AlertError::Invalid)?;
        let rule = Rule::compile(&self.engine, settings.clone()).await.map_err(|error| match error {
            RuleError::Waits(reason) | RuleError::Refused(reason) => AlertError::Invalid(reason),
            RuleError::Busy(reason) => AlertError::Failed(reason),
        })?;
        let status = shown::status_of(name, Ok(&rule), false);
        let (alerts, text) = (Arc::clone(self), text.to_owned());
        to_its_end(async move {
            let mut store = alerts.store.lock().await;
            store.admits(&settings).map_err(AlertError::Invalid)?;
            store.put(settings, &text).map_err(AlertError::Failed)?;
            alerts.ask(|reply| Command::Put { rule: Box::new(rule), reply }).await
        })
        .await?;
        Ok(status)
    }

    /// Removes a rule. What it raised has ended.
    ///
    /// # Errors
    /// When there is none of this name, or it is from the configuration.
    pub async fn delete(self: &Arc<Self>, name: &str) -> Result<(), AlertError> {
        let (alerts, name) = (Arc::clone(self), name.to_owned());
        to_its_end(async move {
            let mut store = alerts.store.lock().await;
            store.delete(&name).map_err(AlertError::NotFound)?;
            alerts.ask(|reply| Command::Delete { name, reply }).await
        })
        .await
    }

    /// What a rule would have found over history, in this interval of event time (µs).
    ///
    /// # Errors
    /// When it cannot run, or not over history.
    pub async fn trial(&self, settings: RuleSettings, from: i64, to: i64) -> Result<Trial, AlertError> {
        trial::run(&self.engine, settings, (from, to)).await.map_err(AlertError::Invalid)
    }

    /// Alerts that are open, the worst first.
    ///
    /// # Errors
    /// When the node stops.
    pub async fn open(&self, page: Page) -> Result<Opened, AlertError> {
        self.ask(|reply| Command::Open { page, reply }).await
    }

    /// The silences, as JSON.
    ///
    /// # Errors
    /// When the node stops.
    pub async fn silences(&self) -> Result<serde_json::Value, AlertError> {
        self.ask(|reply| Command::Silences { reply }).await
    }

    /// Somebody says something of an alert. When it returns it is in the record.
    ///
    /// # Errors
    /// When there is no such alert.
    pub async fn say(&self, id: &str, word: Word, by: &str, note: &str) -> Result<(), AlertError> {
        let (id, by, note) = (id.to_owned(), by.to_owned(), note.to_owned());
        let said = self.ask(|reply| Command::Say { id, word, by, note, reply }).await?;
        said.map_err(|unknown| AlertError::NotFound(unknown.to_string()))
    }

    pub(crate) async fn silence(&self, silence: Silence) -> Result<(), AlertError> {
        let said = self.ask(|reply| Command::Silence { silence, reply }).await?;
        said.map_err(|unknown| AlertError::Invalid(unknown.to_string()))
    }

    /// A link tells something. When it returns it is durable; its sequence.
    pub(crate) async fn event(&self, event: LinkEvent) -> Result<i64, AlertError> {
        self.ask(|reply| Command::Event { event: Box::new(event), reply }).await
    }

    /// Ends a silence.
    ///
    /// # Errors
    /// When there is none of this id.
    pub async fn unsilence(&self, id: &str, by: &str) -> Result<(), AlertError> {
        let (id, by) = (id.to_owned(), by.to_owned());
        let said = self.ask(|reply| Command::Unsilence { id, by, reply }).await?;
        said.map_err(|unknown| AlertError::NotFound(unknown.to_string()))
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, AlertError> {
        let stops = || AlertError::Failed("the node stops".to_owned());
        let (reply, answered) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| stops())?;
        answered.await.map_err(|_| stops())
    }
}

/// Goes on when nobody waits for it any more: what is half done is never left so.
async fn to_its_end(work: impl Future<Output = Result<(), AlertError>> + Send + 'static) -> Result<(), AlertError> {
    let done = tokio::spawn(work).await;
    done.unwrap_or_else(|error| Err(AlertError::Failed(format!("the change of a rule was not finished: {error}"))))
}

/// A node whose task of alerts has ended raises none, and nobody would know: it stops, too.
struct Ends(CancellationToken);

impl Drop for Ends {
    fn drop(&mut self) {
        if !self.0.is_cancelled() {
            tracing::error!("the task of alerts has ended: the node stops");
            self.0.cancel();
        }
    }
}

/// Asks the task of alerts which of them fire.
#[derive(Debug, Clone)]
pub(crate) struct Firing(mpsc::Sender<Command>);

impl Firing {
    /// Those that somebody was told of and that nothing keeps quiet now. None when the node stops.
    pub(crate) async fn ask(&self) -> Option<Vec<Episode>> {
        let (reply, answered) = oneshot::channel();
        self.0.send(Command::Firing { reply }).await.ok()?;
        answered.await.ok()
    }
}

/// Starts the task of a target.
fn serve(kind: &TargetKind, place: Place, firing: Firing, token: CancellationToken) {
    match kind.clone().way() {
        Way::Http(request) => tokio::spawn(webhook::run(request, place, token)),
        Way::Alertmanager(request) => tokio::spawn(alertmanager::run(request, place, (firing, REFRESH_EVERY), token)),
        Way::Mqtt(broker) => tokio::spawn(mqtt::run(broker, place, token)),
    };
}

fn micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(i64::MAX)
}

/// Waits until the node knows where the stream of decisions ends; None when it stops before.
pub(crate) async fn wait_for_hub(hub: &Hub, token: &CancellationToken) -> Option<i64> {
    let mut changed = hub.changed();
    tokio::select! {
        () = token.cancelled() => None,
        newest = changed.wait_for(|newest| *newest >= 0) => newest.ok().map(|newest| *newest),
    }
}
