//! Somebody outside who is told of alerts: which, and how far it has everything.
//!
//! Each target is one task with a place of its own in the sequence, which it writes into `alert_deliveries`: at least once, with
//! a stable (id, transition, sequence), also across a crash. A target that hangs, fails or is gone holds up nobody else, and
//! nothing is queued for it: it goes on where it stood. What is older than `max_age` when it comes back is counted as missed;
//! what a broker retains of it is put right all the same.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use rand::Rng;
use ring::hmac;
use rumqttc::{TlsConfiguration, Transport};
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use wire::schema::own;
use wire::{StreamName, StreamSchema};

use super::mqtt::Broker;
use super::sse::Subscription;
use super::webhook::Request;
use super::{Hub, Told};
use crate::alerts::episode::Severity;
use crate::alerts::rule::caller;
use crate::alerts::topic::TopicFilter;
use crate::alerts::wait_for_hub;
use crate::clock::now_us;
use crate::engine::Engine;
use crate::sink::{Sink, SinkError};

/// Changes that are taken at a time.
const PAGE: usize = 64;
/// Progress is written so often at most.
const NOTE_EVERY: Duration = Duration::from_secs(1);
const AGAIN: Duration = Duration::from_millis(500);

/// One who is told.
#[derive(Debug, Clone)]
pub struct TargetSettings {
    pub name: String,
    pub kind: TargetKind,
    pub topic: TopicFilter,
    pub severities: Vec<Severity>,
    /// What is older than this when the target comes back is missed.
    pub max_age: Duration,
}

/// How it is told.
#[derive(Clone)]
pub enum TargetKind {
    Webhook {
        url: url::Url,
        secret: Option<String>,
        timeout: Duration,
        attempts: u32,
    },
    Alertmanager {
        url: url::Url,
        timeout: Duration,
        attempts: u32,
    },
    Mqtt {
        host: String,
        port: u16,
        /// None over plain TCP.
        tls: Option<BrokerTls>,
        client_id: String,
        username: Option<String>,
        password: Option<String>,
        attempts: u32,
    },
}

/// How a broker is known over TLS, and the node to it: PEM.
#[derive(Clone)]
pub struct BrokerTls {
    /// Certificates to trust; those of the system when there are none.
    pub ca: Option<Vec<u8>>,
    /// The node's own certificate and key; only beside `ca`.
    pub own: Option<(Vec<u8>, Vec<u8>)>,
}

impl std::fmt::Debug for BrokerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BrokerTls").field("has_ca", &self.ca.is_some()).finish_non_exhaustive()
    }
}

impl BrokerTls {
    fn transport(self) -> Transport {
        match self.ca {
            Some(ca) => Transport::tls_with_config(TlsConfiguration::Simple { ca, alpn: None, client_auth: self.own }),
            None => Transport::tls_with_default_config(),
        }
    }
}

/// What a target is told through.
#[derive(Debug)]
pub(crate) enum Way {
    Http(Request),
    Alertmanager(Request),
    Mqtt(Broker),
}

impl TargetKind {
    pub(crate) fn way(self) -> Way {
        match self {
            Self::Webhook { url, secret, timeout, attempts } => {
                let secret = secret.map(|secret| hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()));
                Way::Http(Request { url, secret, timeout, attempts })
            }
            Self::Alertmanager { mut url, timeout, attempts } => {
                let path = format!("{}/api/v2/alerts", url.path().trim_end_matches('/'));
                url.set_path(&path);
                Way::Alertmanager(Request { url, secret: None, timeout, attempts })
            }
            Self::Mqtt { host, port, tls, client_id, username, password, attempts } => {
                let transport = tls.map_or(Transport::Tcp, BrokerTls::transport);
                let credentials = username.map(|username| (username, password.unwrap_or_default()));
                Way::Mqtt(Broker { host, port, transport, client_id, credentials, attempts })
            }
        }
    }
}

impl std::fmt::Debug for TargetKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Webhook { .. } => "Webhook",
            Self::Alertmanager { .. } => "Alertmanager",
            Self::Mqtt { .. } => "Mqtt",
        })
    }
}

/// What a target counts since the node started.
#[derive(Debug, Clone, Default, Serialize)]
pub struct TargetStatus {
    pub name: String,
    /// The last change that it has, or that was given up.
    pub sequence: i64,
    /// Changes behind that.
    pub behind: i64,
    pub delivered: u64,
    pub retried: u64,
    pub dead: u64,
    pub missed: u64,
    pub last_error: Option<String>,
}

/// Shared with who shows it.
pub(crate) type Status = Arc<parking_lot::Mutex<TargetStatus>>;

/// A target's place, and what it counts.
#[derive(Debug)]
pub(crate) struct Place {
    settings: TargetSettings,
    engine: Arc<Engine>,
    sink: Arc<dyn Sink>,
    pub(crate) hub: Arc<Hub>,
    status: Status,
    subscription: Subscription,
    noted: (i64, tokio::time::Instant),
    /// Changes that were too old, and the last of them: written when what follows from them is done.
    missed: Option<(i64, i64)>,
    schema: Arc<StreamSchema>,
}

/// The next changes of a target.
#[derive(Debug, Default)]
pub(crate) struct Due {
    /// Topics of changes that are too old to be told.
    pub(crate) past: BTreeSet<String>,
    pub(crate) told: Vec<Arc<Told>>,
}

impl Place {
    pub(crate) fn new(
        settings: TargetSettings,
        engine: Arc<Engine>,
        sink: Arc<dyn Sink>,
        hub: Arc<Hub>,
        status: Status,
    ) -> Self {
        let (topic, severities) = (settings.topic.clone(), settings.severities.clone());
        let subscription = Subscription { topic, severities, after: 0 };
        let noted = (0, tokio::time::Instant::now());
        let schema = Arc::new(own::alert_deliveries());
        Self { settings, engine, sink, hub, status, subscription, noted, missed: None, schema }
    }

    pub(crate) fn name(&self) -> &str {
        &self.settings.name
    }

    pub(crate) fn subscription(&self) -> &Subscription {
        &self.subscription
    }

    pub(crate) fn status(&self) -> Status {
        Arc::clone(&self.status)
    }

    /// Waits until the node knows its place in the sequence, and finds its own: that which it wrote, or now.
    pub(crate) async fn find(&mut self, token: &CancellationToken) -> Option<()> {
        let newest = wait_for_hub(&self.hub, token).await?;
        loop {
            let known = self.engine.tables().cold(&stream()).is_some();
            let name = self.settings.name.replace('\'', "''");
            let asked = format!("SELECT max(sequence) AS sequence FROM alert_deliveries WHERE target = '{name}'");
            let rows = if known { self.engine.rows_as(&caller(), &asked, usize::MAX).await } else { Ok(Vec::new()) };
            match rows {
                Ok(rows) => {
                    use arrow_array::cast::AsArray;
                    let column = |rows: &RecordBatch| {
                        rows.column(0).as_primitive::<arrow_array::types::Int64Type>().iter().flatten().max()
                    };
                    let found = rows.iter().filter_map(column).max();
                    self.subscription.after = found.unwrap_or(newest);
                    self.noted.0 = self.subscription.after;
                    if found.is_none() {
                        self.note("delivered", self.subscription.after, 0, None, token).await;
                    }
                    return Some(());
                }
                Err(error) => {
                    tracing::warn!(target = self.name(), %error, "cannot find where it stood");
                    pause(Duration::from_secs(1), token).await?;
                }
            }
        }
    }

    /// The next changes that it wants; what is too old is counted and passed over. What was given before is done with. None
    /// when the node stops.
    pub(crate) async fn next(&mut self, token: &CancellationToken) -> Option<Due> {
        let mut changed = self.hub.changed();
        loop {
            if let Some((sequence, count)) = self.missed {
                self.note("missed", sequence, count, None, token).await;
                self.missed = None;
            }
            changed.mark_unchanged();
            self.tell();
            let page = match self.hub.after(self.subscription.after, PAGE).await {
                Ok(page) => page,
                Err(error) => {
                    tracing::warn!(target = self.name(), %error, "cannot catch up yet");
                    pause(Duration::from_secs(1), token).await?;
                    continue;
                }
            };
            let Some(last) = page.last().map(|told| told.sequence) else {
                if self.noted.0 < self.subscription.after {
                    let due = self.noted.1 + NOTE_EVERY;
                    tokio::select! {
                        () = token.cancelled() => {}
                        gone = changed.changed() => { gone.ok()?; continue; }
                        () = tokio::time::sleep_until(due) => {}
                    }
                    self.note("delivered", self.subscription.after, 0, None, token).await;
                }
                tokio::select! {
                    () = token.cancelled() => return None,
                    gone = changed.changed() => gone.ok()?,
                }
                continue;
            };
            let since = now_us() - i64::try_from(self.settings.max_age.as_micros()).unwrap_or(i64::MAX);
            let wanted: Vec<Arc<Told>> = page.into_iter().filter(|told| self.wants(told)).collect();
            let (old, wanted): (Vec<_>, Vec<_>) = wanted.into_iter().partition(|told| told.at < since);
            if let Some(newest) = old.last() {
                self.status.lock().missed += old.len() as u64;
                let count = old.len() as i64;
                tracing::warn!(target = self.name(), count, "changes were too old when it came back");
                self.missed = Some((newest.sequence, count));
            }
            if wanted.is_empty() {
                self.subscription.after = last;
                if old.is_empty() {
                    continue;
                }
            }
            return Some(Due { past: old.iter().map(|told| told.topic.clone()).collect(), told: wanted });
        }
    }

    /// What of those that fire on a topic, and that it wants, stands for all: the worst, as it was told last. Waits until that
    /// can be read; the outer None when the node stops.
    pub(crate) async fn fires_on(&self, topic: &str, token: &CancellationToken) -> Option<Option<Arc<Told>>> {
        let severities = &self.subscription.severities;
        let wanted = |(_, severity): &(String, Severity)| severities.is_empty() || severities.contains(severity);
        let mut firing: Vec<_> = self.hub.fires_on(topic).into_iter().filter(wanted).collect();
        firing.sort_by(|one, other| other.1.cmp(&one.1).then_with(|| one.0.cmp(&other.0)));
        for (id, _) in firing {
            let last = loop {
                match self.hub.last_of(&id).await {
                    Ok(last) => break last,
                    Err(error) => {
                        tracing::warn!(target = self.name(), %error, "cannot read what fires on a topic yet");
                        pause(AGAIN, token).await?;
                    }
                }
            };
            // It may have ended meanwhile.
            if let Some(told) = last.filter(|told| told.firing) {
                return Some(Some(told));
            }
        }
        Some(None)
    }

    fn wants(&self, told: &Told) -> bool {
        told.only.as_deref().map_or_else(|| self.subscription.wants(told), |only| only == self.settings.name)
    }

    /// It has this change.
    pub(crate) async fn delivered(&mut self, told: &Told, token: &CancellationToken) {
        self.subscription.after = told.sequence;
        {
            let mut status = self.status.lock();
            status.delivered += 1;
            status.last_error = None;
        }
        if self.noted.1.elapsed() >= NOTE_EVERY {
            self.note("delivered", told.sequence, 0, None, token).await;
        }
        self.tell();
    }

    /// It did not take it, and will be asked again.
    pub(crate) fn retried(&self, error: &str) {
        let mut status = self.status.lock();
        status.retried += 1;
        status.last_error = Some(error.to_owned());
    }

    /// It will never take it.
    pub(crate) async fn dead(&mut self, told: &Told, reason: &str, token: &CancellationToken) {
        tracing::error!(target = self.name(), sequence = told.sequence, reason, "an alert is given up");
        self.subscription.after = told.sequence;
        {
            let mut status = self.status.lock();
            status.dead += 1;
            status.last_error = Some(reason.to_owned());
        }
        self.note("dead", told.sequence, 1, Some((told, reason)), token).await;
        self.tell();
    }

    fn tell(&self) {
        let mut status = self.status.lock();
        status.sequence = self.subscription.after;
        status.behind = (self.hub.newest() - self.subscription.after).max(0);
    }

    /// Writes a row of `alert_deliveries`.
    async fn note(
        &mut self,
        state: &str,
        sequence: i64,
        count: i64,
        about: Option<(&Told, &str)>,
        token: &CancellationToken,
    ) {
        let text = |value: Option<&str>| Arc::new(StringArray::from(vec![value])) as ArrayRef;
        let number = |value: i64| Arc::new(Int64Array::from(vec![value])) as ArrayRef;
        let body = about.map(|(told, _)| String::from_utf8_lossy(&told.body).into_owned());
        let columns = self.schema.arrow().fields().iter().map(|field| match field.name().as_str() {
            "ts" => Arc::new(TimestampMicrosecondArray::from(vec![now_us()]).with_timezone("UTC")) as ArrayRef,
            "quality" => text(Some("good")),
            "target" => text(Some(&self.settings.name)),
            "sequence" => number(sequence),
            "state" => text(Some(state)),
            "count" => number(count),
            "alert_id" => text(about.map(|(told, _)| told.id.as_str())),
            "reason" => text(about.map(|(_, reason)| reason)),
            "body" => text(body.as_deref()),
            _ => text(None),
        });
        let columns = columns.collect();
        let rows =
            RecordBatch::try_new(Arc::clone(self.schema.arrow()), columns).expect("the columns are the schema's");
        match write(self.sink.as_ref(), (&stream(), &self.schema), rows, self.name(), token).await {
            None => return,
            Some(Err(error)) => self.status.lock().last_error = Some(error.to_string()),
            Some(Ok(())) => {}
        }
        self.noted = (sequence.max(self.noted.0), tokio::time::Instant::now());
    }
}

/// Writes what is known of a target, as soon as there is room; what would be refused for ever is given up: the target is
/// told on, and after a restart more of it again. None when the node stops.
pub(crate) async fn write(
    sink: &dyn Sink,
    (stream, schema): (&StreamName, &Arc<StreamSchema>),
    rows: RecordBatch,
    target: &str,
    token: &CancellationToken,
) -> Option<Result<(), SinkError>> {
    let mut wait = Duration::from_millis(100);
    while let Err(error) = sink.append(stream, schema, rows.clone()).await {
        if matches!(error, SinkError::Refused { .. }) {
            tracing::error!(target, %error, "its place is not written");
            return Some(Err(error));
        }
        tracing::warn!(target, %error, "its place is not written yet");
        pause(wait, token).await?;
        wait = (2 * wait).min(Duration::from_secs(10));
    }
    Some(Ok(()))
}

fn stream() -> StreamName {
    own::ALERT_DELIVERIES.parse().expect("own names are valid")
}

/// A part of a wait, so that not all come back at one moment.
pub(crate) fn jittered(wait: Duration) -> Duration {
    wait.mul_f64(rand::rng().random_range(0.5..=1.0))
}

/// Waits; None when the node stops meanwhile.
pub(crate) async fn pause(wait: Duration, token: &CancellationToken) -> Option<()> {
    tokio::select! {
        () = token.cancelled() => None,
        () = tokio::time::sleep(wait) => Some(()),
    }
}
