//! Rules as they are written: when an alert begins and ends, and what it says and where.
//!
//! Whether the words are understood is checked with the settings, by compiling them ([`crate::rules`]).

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use url::Url;
use wire::StreamName;

use super::source::url;
use super::{MqttSettings, MqttVersion, Settings, SourceSettings, Span};

/// A rule.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleSettings {
    /// Unique, and a part of each alert's identity.
    pub name: String,
    /// A stream of readings, or of windows.
    pub on: StreamName,
    /// SQL: the alert begins when it is true.
    #[serde(default)]
    pub when: Option<String>,
    /// SQL: the alert ends when it is true and `when` is not. Without it, when `when` is false.
    #[serde(default)]
    pub until: Option<String>,
    /// How long `when` must stay true, in event time, before the alert fires.
    #[serde(rename = "for", default = "at_once")]
    pub hold: Span,
    /// Instead of `when`: a device is silent for so long.
    #[serde(default)]
    pub absent: Option<Span>,
    #[serde(default)]
    pub severity: Severity,
    /// Templates; alerts of one device that differ in these are alerts of their own.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    #[serde(default = "message")]
    pub message: String,
    /// Where the local broker gets it. Without: nowhere.
    #[serde(default)]
    pub topic: Option<String>,
    /// What an actuator is told.
    #[serde(default)]
    pub command: Option<CommandSettings>,
    /// Alerts of this rule that are pending or fire at one time; more do not begin, and are counted.
    #[serde(default = "max_instances")]
    pub max_instances: u32,
}

/// What the local broker brings to an actuator. The same may come again, after a restart or a lost connection: it is to say
/// how things shall be, not to change them. Templates are filled in from the row that made the alert fire.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommandSettings {
    pub topic: String,
    /// The payload while the alert fires.
    pub firing: String,
    /// The payload when the last alert that commands this topic has ended. Without: nothing.
    #[serde(default)]
    pub resolved: Option<String>,
    /// To one topic not more often; what comes in between waits, and only the newest of it goes.
    #[serde(default = "every")]
    pub every: Span,
}

fn every() -> Span {
    Span(Duration::from_secs(1))
}

fn at_once() -> Span {
    Span(Duration::ZERO)
}

fn message() -> String {
    "{rule}: {device}".to_owned()
}

fn max_instances() -> u32 {
    10_000
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    Info,
    #[default]
    Warning,
    Critical,
}

impl RuleSettings {
    /// Whether the local broker gets anything of it.
    pub fn is_told(&self) -> bool {
        self.topic.is_some() || self.command.is_some()
    }
}

impl Severity {
    /// The word in rows and messages.
    pub fn word(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}

/// What holds for all alerts.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AlertSettings {
    /// An alert whose event time is older than this when it is found is recorded as `backfill` and not published.
    pub alert_horizon: Span,
    /// Devices of one stream that the rules remember; when there are more, those that were silent longest and have no
    /// alert are forgotten.
    pub devices_max: u32,
}

impl Default for AlertSettings {
    fn default() -> Self {
        Self { alert_horizon: Span(Duration::from_secs(3_600)), devices_max: 100_000 }
    }
}

/// The broker that gets alerts: that of a source, or one of its own.
#[derive(Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PublishSettings {
    /// The name of an MQTT source: its broker, user and certificates are taken.
    pub source: Option<String>,
    #[serde(deserialize_with = "some_url")]
    pub url: Option<Url>,
    pub version: MqttVersion,
    pub username: Option<String>,
    pub password: Option<String>,
    /// Instead of `password`: the first line of a file.
    pub password_file: Option<PathBuf>,
    pub ca_file: Option<PathBuf>,
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    pub client_id: Option<String>,
    /// Alerts that wait for the broker; when there are more the oldest go, and what fires is published again when the
    /// broker is back.
    pub queue: Option<u32>,
}

fn some_url<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Url>, D::Error> {
    url(deserializer).map(Some)
}

impl fmt::Debug for PublishSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PublishSettings").field("source", &self.source).field("url", &self.url).finish_non_exhaustive()
    }
}

/// See [`Settings::publisher`].
pub(super) fn publisher(settings: &Settings) -> Result<MqttSettings, String> {
    let sources = settings.source.iter().filter_map(|source| match source {
        SourceSettings::Mqtt(mqtt) => Some(&**mqtt),
        _ => None,
    });
    let mut sources = sources.collect::<Vec<_>>();
    let named = settings.publish.as_ref();
    if let Some(name) = named.and_then(|publish| publish.source.as_ref()) {
        sources.retain(|source| source.name == *name);
        if sources.is_empty() {
            return Err(format!("[publish] source: there is no MQTT source `{name}`"));
        }
        if named.is_some_and(|publish| publish.url.is_some()) {
            return Err("[publish] has both source and url: leave one out".to_owned());
        }
    }
    let id = format!("weir-{}-alerts", settings.edge.id);
    let client_id = Some(named.and_then(|publish| publish.client_id.clone()).unwrap_or(id));
    if let Some(publish) = named.filter(|publish| publish.url.is_some()) {
        let url = publish.url.clone().expect("it was looked at");
        let own = MqttSettings::of_broker(url);
        let own = MqttSettings {
            version: publish.version,
            username: publish.username.clone(),
            password: publish.password.clone(),
            password_file: publish.password_file.clone(),
            ca_file: publish.ca_file.clone(),
            cert_file: publish.cert_file.clone(),
            key_file: publish.key_file.clone(),
            client_id,
            ..own
        };
        own.check_broker().map_err(|text| format!("[publish]: {text}"))?;
        return Ok(own);
    }
    match sources.as_slice() {
        [one, others @ ..] if others.iter().all(|other| other.url == one.url) => {
            Ok(MqttSettings { client_id, ..(*one).clone() })
        }
        [] => {
            Err("something is to be published and there is no broker: write [publish] url = \"mqtt://127.0.0.1:1883\""
                .to_owned())
        }
        _ => {
            Err("something is to be published and there are several brokers: write [publish] source = \"…\"".to_owned())
        }
    }
}
