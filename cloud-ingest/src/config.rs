//! The cloud's configuration: TOML as people write it, read into values that are right.
//!
//! Unknown keys are refused, with the nearest right one. Durations are `"60s"`, sizes `"64MiB"`.
//! `configs/cloud.toml` shows every key; a test parses it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
pub use wire::written::{ConfigError, Size, Span};
use wire::written::{load, with_line, with_nearest_key};
use wire::{BATCH_BYTES_MAX, BATCH_DATES_MAX, BATCH_DECODED_BYTES_MAX};

use crate::store::S3Settings;

mod alerts;
mod broker;
mod callers;
mod lake;
mod links;
mod listen;
mod pressure;
mod query;
mod views;

pub use alerts::{AlertSettings, PublishKind, PublishSettings, Way};
pub use broker::BrokerSettings;
pub use callers::{EdgeSettings, ReaderRight, ReaderSettings};
pub use lake::{CompactSettings, Keep, KeepSettings, LakeSettings, StreamSettings};
pub use links::LinksSettings;
pub use listen::{DoorName, ListenSettings, TlsSettings};
pub use pressure::PressureSettings;
pub use query::{DEFAULT_LANE, LaneSettings, QuerySettings, VIEWS_LANE};
pub use views::{ViewPublishSettings, ViewsSettings};

/// Batches of doors that can be remembered: some 150 bytes each, in memory and on disk.
const REPEATS_MAX: usize = 10_000_000;

/// Everything that can be set.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// WAL; and the tables, unless `store.url` says otherwise.
    pub data_dir: PathBuf,
    #[serde(default)]
    pub store: StoreSettings,
    #[serde(default)]
    pub listen: ListenSettings,
    #[serde(default)]
    pub commit: CommitSettings,
    #[serde(default)]
    pub wal: WalSettings,
    #[serde(default)]
    pub hot: HotSettings,
    /// Who waits when memory or log are full.
    #[serde(default)]
    pub pressure: PressureSettings,
    #[serde(default)]
    pub limits: LimitSettings,
    #[serde(default)]
    pub write: WriteSettings,
    #[serde(default)]
    pub query: QuerySettings,
    #[serde(default)]
    pub views: ViewsSettings,
    #[serde(default)]
    pub lake: LakeSettings,
    #[serde(default)]
    pub compact: CompactSettings,
    /// How long rows are kept, where no [`Settings::stream`] says otherwise.
    #[serde(default)]
    pub retention: KeepSettings,
    /// By name of a stream, or a pattern with one `*`.
    #[serde(default)]
    pub stream: BTreeMap<String, StreamSettings>,
    #[serde(default)]
    pub alerts: AlertSettings,
    #[serde(default)]
    pub links: LinksSettings,
    /// An MQTT broker in the same process; none unless it is set.
    #[serde(default)]
    pub broker: Option<BrokerSettings>,
    /// An edge agent in the same process.
    #[serde(default)]
    pub agent: Option<AgentSettings>,
    /// Who may write, and as whom.
    #[serde(default)]
    pub edge: Vec<EdgeSettings>,
    /// Who may ask; with none set, only callers on this machine.
    #[serde(default)]
    pub reader: Vec<ReaderSettings>,
}

/// Where tables are.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreSettings {
    pub url: Option<String>,
    /// For `s3://` addresses.
    pub s3: S3Settings,
}

/// When hot rows become files.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CommitSettings {
    pub max_age: Span,
    pub max_bytes: Size,
    pub max_partitions: usize,
}

impl Default for CommitSettings {
    fn default() -> Self {
        Self { max_age: Span(Duration::from_secs(60)), max_bytes: Size(64 << 20), max_partitions: BATCH_DATES_MAX }
    }
}

/// The write-ahead log.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WalSettings {
    pub max_bytes: Size,
    pub segment_bytes: Size,
}

impl Default for WalSettings {
    fn default() -> Self {
        Self { max_bytes: Size(8 << 30), segment_bytes: Size(128 << 20) }
    }
}

/// Rows in memory.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HotSettings {
    pub max_bytes: Size,
    /// How long committed rows stay for queries that froze an older state.
    pub grace: Span,
}

impl Default for HotSettings {
    fn default() -> Self {
        Self { max_bytes: Size(1 << 30), grace: Span(Duration::from_secs(10)) }
    }
}

/// Limits on what comes from outside.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitSettings {
    /// Bytes of one request.
    pub request_bytes: Size,
    /// Bytes of all requests that are being read or wait for the WAL.
    pub waiting_bytes: Size,
    /// Decoded rows of all requests that wait for the WAL.
    pub decoded_bytes: Size,
    /// Requests that wait for the WAL.
    pub requests_waiting: usize,
}

impl Default for LimitSettings {
    fn default() -> Self {
        Self {
            request_bytes: Size(64 << 20),
            waiting_bytes: Size(512 << 20),
            decoded_bytes: Size(512 << 20),
            requests_waiting: 256,
        }
    }
}

/// The doors for senders without an agent: Influx line protocol and OTLP metrics.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WriteSettings {
    /// Bytes of one request, unpacked.
    pub max_bytes: Size,
    /// The first of these tags that a line has names its device.
    pub device: Vec<String>,
    /// The same request again within this time is not stored twice.
    pub repeats_within: Span,
    /// Batches that are remembered for that; of more the oldest are forgotten.
    pub repeats_max: usize,
}

impl Default for WriteSettings {
    fn default() -> Self {
        Self {
            max_bytes: Size(16 << 20),
            device: vec!["device".to_owned(), "host".to_owned()],
            repeats_within: Span(Duration::from_secs(600)),
            repeats_max: 100_000,
        }
    }
}

/// An edge agent in the same process, for sources that are reached from here.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentSettings {
    /// Its configuration, as an edge's; without `[cloud]` and `data_dir`.
    pub config: PathBuf,
}

impl Settings {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// When it cannot be read, or something in it is wrong; the text names the place and the nearest right key.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        load(path, Self::parse)
    }

    /// Reads and checks a text.
    ///
    /// # Errors
    /// What is wrong, for people.
    pub fn parse(text: &str) -> Result<Self, String> {
        let settings: Self = toml::from_str(text).map_err(|error| with_nearest_key(&error.to_string()))?;
        settings.check().map_err(|message| with_line(text, message))?;
        Ok(settings)
    }

    fn check(&self) -> Result<(), String> {
        self.check_lake()?;
        self.listen.check()?;
        callers::check(&self.edge, &self.reader)?;
        self.query.check(&self.reader)?;
        self.views.check()?;
        self.alerts.check(self.listen.http_connections)?;
        self.links.check()?;
        self.broker.as_ref().map_or(Ok(()), BrokerSettings::check)?;
        if self.commit.max_partitions < BATCH_DATES_MAX {
            return Err(format!(
                "[commit] max_partitions is less than {BATCH_DATES_MAX}, the dates that one batch may span"
            ));
        }
        if self.wal.segment_bytes.bytes() < BATCH_BYTES_MAX + (1 << 20) {
            return Err("[wal] segment_bytes must be at least 33MiB: a batch may have 32MiB".to_owned());
        }
        if self.limits.request_bytes.bytes() < BATCH_BYTES_MAX + (1 << 20) {
            return Err("[limits] request_bytes must be at least 33MiB: a batch may have 32MiB".to_owned());
        }
        if self.limits.requests_waiting == 0 {
            return Err("[limits] requests_waiting must be at least 1".to_owned());
        }
        if self.limits.decoded_bytes.bytes() < 2 * BATCH_DECODED_BYTES_MAX {
            return Err(
                "[limits] decoded_bytes must be at least 128MiB: a batch may have 64MiB when it is decoded".to_owned()
            );
        }
        if self.limits.waiting_bytes.0 < self.limits.request_bytes.0 {
            return Err("[limits] waiting_bytes must be at least request_bytes".to_owned());
        }
        for (name, stream) in &self.stream {
            let twice = stream.alias.iter().find(|(_, alias)| stream.alias.contains_key(*alias));
            if let Some((from, alias)) = twice {
                return Err(format!("[stream.{name}.alias] {from} = \"{alias}\": {alias} has an alias itself"));
            }
        }
        if self.write.max_bytes.bytes() > self.limits.request_bytes.bytes() {
            return Err("[write] max_bytes must be at most limits.request_bytes".to_owned());
        }
        if self.write.repeats_max > REPEATS_MAX {
            return Err(format!("[write] repeats_max must be at most {REPEATS_MAX}"));
        }
        // With less, the largest batch might find no room in an empty log.
        if self.wal.max_bytes.bytes() < self.wal.segment_bytes.bytes().saturating_mul(8) {
            return Err("[wal] max_bytes must be at least eight times segment_bytes".to_owned());
        }
        if self.hot.max_bytes.bytes() < 2 * BATCH_DECODED_BYTES_MAX {
            return Err("[hot] max_bytes must be at least 128MiB: a batch may have 64MiB when it is decoded".to_owned());
        }
        self.pressure.check(self)
    }
}

#[cfg(test)]
mod tests;
