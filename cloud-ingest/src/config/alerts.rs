//! Alerts as they are configured: rules in files, and who is told.

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer};
use url::Url;
use wire::written::Span;

/// What holds for all alerts.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AlertSettings {
    /// TOML files of `[[rule]]`.
    pub directory: Option<PathBuf>,
    /// What happened longer ago when it is found is recorded as `backfill`, and nobody is told.
    pub horizon: Span,
    /// Rows that come later than so long after they happened are not judged any more.
    pub late_max: Span,
    /// Rows that are read again at most to judge some that came late.
    pub late_rows_max: u64,
    /// An alert that only edges raise which were not heard for so long is marked `stale`.
    pub stale_after: Span,
    /// Devices of one stream whose newest row is remembered.
    pub devices_max: usize,
    /// Who listens to `/v1/alerts/stream` at a time; half of the door's connections unless set.
    pub subscribers_max: Option<usize>,
    /// Who is told.
    pub publish: Vec<PublishSettings>,
}

impl Default for AlertSettings {
    fn default() -> Self {
        Self {
            directory: None,
            horizon: Span(Duration::from_secs(3_600)),
            late_max: Span(Duration::from_secs(7 * 86_400)),
            late_rows_max: 50_000_000,
            stale_after: Span(Duration::from_secs(3_600)),
            devices_max: 100_000,
            subscribers_max: None,
            publish: Vec::new(),
        }
    }
}

/// How somebody is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PublishKind {
    Webhook,
    Alertmanager,
    Mqtt,
}

/// One who is told.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PublishSettings {
    /// Names its place in the sequence: another name begins anew.
    pub name: String,
    pub kind: PublishKind,
    #[serde(deserialize_with = "url")]
    pub url: Url,
    /// With MQTT wildcards.
    #[serde(default = "every_topic")]
    pub topic: String,
    /// All when none are named.
    #[serde(default)]
    pub severity: Vec<String>,
    /// Of a webhook: the key of its signature.
    pub secret: Option<String>,
    /// Of one request.
    #[serde(default = "timeout")]
    pub timeout: Span,
    /// Then it is a dead letter. Of MQTT: connections that were lost over one change.
    #[serde(default = "attempts")]
    pub attempts: u32,
    /// What is older when the target comes back is missed.
    #[serde(default = "max_age")]
    pub max_age: Span,
    pub client_id: Option<String>,
    pub username: Option<String>,
    pub password: Option<String>,
    /// Certificates (PEM) to trust for mqtts; those of the system unless set.
    pub ca_file: Option<PathBuf>,
    /// The node's own certificate and key (PEM), both or none.
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
}

/// How somebody is reached, whatever they are told of.
#[derive(Clone, Copy)]
pub struct Way<'a> {
    pub kind: PublishKind,
    pub url: &'a Url,
    pub secret: Option<&'a str>,
    pub timeout: Duration,
    pub attempts: u32,
    pub client_id: Option<&'a str>,
    pub username: Option<&'a str>,
    pub password: Option<&'a str>,
    pub ca_file: Option<&'a Path>,
    pub cert_file: Option<&'a Path>,
    pub key_file: Option<&'a Path>,
}

/// The `Way` of settings that have its fields. Each has them itself: of a flattened struct, an error would neither tell the place
/// nor the nearest word.
macro_rules! way {
    ($of:expr) => {
        Way {
            kind: $of.kind,
            url: &$of.url,
            secret: $of.secret.as_deref(),
            timeout: $of.timeout.0,
            attempts: $of.attempts,
            client_id: $of.client_id.as_deref(),
            username: $of.username.as_deref(),
            password: $of.password.as_deref(),
            ca_file: $of.ca_file.as_deref(),
            cert_file: $of.cert_file.as_deref(),
            key_file: $of.key_file.as_deref(),
        }
    };
}
pub(super) use way;

impl PublishSettings {
    /// How it is reached.
    pub fn way(&self) -> Way<'_> {
        way!(self)
    }
}

impl fmt::Debug for Way<'_> {
    /// Without the address: it may hold a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Way").field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl Way<'_> {
    /// `here` names who it is.
    pub(super) fn check(&self, here: &str) -> Result<(), String> {
        let of_mqtt = self.kind == PublishKind::Mqtt;
        let schemes: &[&str] = if of_mqtt { &["mqtt", "mqtts"] } else { &["http", "https"] };
        if !schemes.contains(&self.url.scheme()) || self.url.host_str().is_none() {
            return Err(format!("{here} url: {}:// is needed, and a host", schemes.join(":// or ")));
        }
        if self.secret.is_some() && self.kind != PublishKind::Webhook {
            return Err(format!("{here}: secret is of a webhook"));
        }
        if !of_mqtt && (self.username.is_some() || self.client_id.is_some()) {
            return Err(format!("{here}: username and client_id are of mqtt"));
        }
        let files = [self.ca_file, self.cert_file, self.key_file];
        if self.url.scheme() != "mqtts" && files.iter().any(Option::is_some) {
            return Err(format!("{here}: ca_file, cert_file and key_file are for mqtts://"));
        }
        if self.cert_file.is_some() != self.key_file.is_some() || self.cert_file.is_some() && self.ca_file.is_none() {
            return Err(format!("{here}: cert_file and key_file go together, and with ca_file"));
        }
        if self.attempts == 0 || self.timeout.is_zero() {
            return Err(format!("{here}: attempts and timeout are more than 0"));
        }
        Ok(())
    }
}

/// That the names of those who are told, in the table `table`, are names, and each is there once.
pub(super) fn check_names<'a>(table: &str, names: impl Iterator<Item = &'a str>) -> Result<(), String> {
    let mut known = HashSet::new();
    for name in names {
        if name.is_empty() || name.len() > 63 || !known.insert(name) {
            return Err(format!("[[{table}]] `{name}`: a name has from 1 to 63 bytes and is there once"));
        }
    }
    Ok(())
}

pub(super) fn url<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Url, D::Error> {
    // Without the text: it may hold a secret.
    String::deserialize(deserializer)?.parse().map_err(|error| serde::de::Error::custom(format!("url: {error}")))
}

fn every_topic() -> String {
    "#".to_owned()
}

pub(super) fn timeout() -> Span {
    Span(Duration::from_secs(10))
}

pub(super) fn attempts() -> u32 {
    20
}

fn max_age() -> Span {
    Span(Duration::from_secs(86_400))
}

impl fmt::Debug for PublishSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PublishSettings").field("name", &self.name).field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl AlertSettings {
    pub(super) fn check(&self, http_connections: usize) -> Result<(), String> {
        if self.subscribers_max.is_some_and(|max| max >= http_connections) {
            return Err(format!(
                "[alerts] subscribers_max must be less than [listen] http_connections ({http_connections}): edges write there"
            ));
        }
        if self.horizon.0 < Duration::from_secs(1) {
            return Err("[alerts] horizon must be at least 1s".to_owned());
        }
        if self.late_max.0 > Duration::from_secs(366 * 86_400) {
            return Err("[alerts] late_max must be at most 366d".to_owned());
        }
        if self.stale_after.0 < Duration::from_secs(1) {
            return Err("[alerts] stale_after must be at least 1s".to_owned());
        }
        check_names("alerts.publish", self.publish.iter().map(|target| target.name.as_str()))?;
        self.publish.iter().try_for_each(|target| target.way().check(&format!("[[alerts.publish]] `{}`", target.name)))
    }
}
