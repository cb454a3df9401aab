//! Alerts as they are configured: rules in files, and who is told.

use std::collections::HashSet;
use std::fmt;
use std::path::PathBuf;
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
}

fn url<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Url, D::Error> {
    // Without the text: it may hold a secret.
    String::deserialize(deserializer)?.parse().map_err(|error| serde::de::Error::custom(format!("url: {error}")))
}

fn every_topic() -> String {
    "#".to_owned()
}

fn timeout() -> Span {
    Span(Duration::from_secs(10))
}

fn attempts() -> u32 {
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
        let mut names = HashSet::new();
        for target in &self.publish {
            let here = format!("[[alerts.publish]] `{}`", target.name);
            if target.name.is_empty() || target.name.len() > 63 || !names.insert(&target.name) {
                return Err(format!("{here}: a name has from 1 to 63 bytes and is there once"));
            }
            let schemes: &[&str] = if target.kind == PublishKind::Mqtt { &["mqtt"] } else { &["http", "https"] };
            if !schemes.contains(&target.url.scheme()) || target.url.host_str().is_none() {
                return Err(format!("{here} url: {}:// is needed, and a host", schemes.join(":// or ")));
            }
            if target.secret.is_some() && target.kind != PublishKind::Webhook {
                return Err(format!("{here}: secret is of a webhook"));
            }
            if target.kind != PublishKind::Mqtt && (target.username.is_some() || target.client_id.is_some()) {
                return Err(format!("{here}: username and client_id are of mqtt"));
            }
            if target.attempts == 0 || target.timeout.0.is_zero() {
                return Err(format!("{here}: attempts and timeout are more than 0"));
            }
        }
        Ok(())
    }
}
