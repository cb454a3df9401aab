//! The edge's configuration: TOML as people write it, read into values that are right.
//!
//! Unknown keys are refused, with the nearest right one. A [`Settings`] that exists is valid: names are names, every
//! field that is mapped has a type, every stream that is named is there. `configs/edge.toml` shows every key; a test
//! parses it. Secrets are never printed.

mod checks;
mod clock;
mod decoding;
mod kept;
mod number;
mod remote;
mod rule;
mod source;
mod stream;
#[cfg(test)]
mod tests;
mod unit;
mod window;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer};
use url::Url;
use wire::schema::own;
pub use wire::written::{ConfigError, Size, Span};
use wire::written::{load, read, with_line, with_nearest_key};
use wire::{BATCH_ROWS_MAX, EdgeId, StreamName};

pub use self::checks::{Allowed, Duplicates, FieldCheck, Fill, StreamCheck, Verdict};
pub use self::clock::{ClockSettings, OnUntrusted, TrustSettings};
pub use self::decoding::{
    Condition, Constant, Decoding, Format, FormatOptions, Precision, Readings, Spread, Test, When,
};
pub use self::number::Number;
pub use self::remote::{RemotePublish, RemoteSettings};
pub use self::rule::{AlertSettings, CommandSettings, PublishSettings, RuleSettings, Severity};
pub use self::source::{
    ExecSettings, FileSettings, HostSettings, HttpSettings, MapSettings, ModbusAddress, ModbusSettings, MqttSettings,
    MqttVersion, Order, Parity, Place, Pointer, RegisterSettings, RegisterType, STATUS, SourceSettings, Table,
    TimeFormat, TimePlace, UnitSettings,
};
pub use self::stream::{FieldSettings, StreamSettings};
pub use self::unit::{Conversion, Unit};
pub use self::window::{AggregateKind, By, WindowSettings};
use crate::rules::Rules;

/// Everything that can be set.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub edge: EdgeSettings,
    #[serde(default)]
    pub admin: AdminSettings,
    pub cloud: CloudSettings,
    #[serde(default)]
    pub journal: JournalSettings,
    #[serde(default)]
    pub cut: CutSettings,
    #[serde(default)]
    pub clock: ClockSettings,
    #[serde(default)]
    pub source: Vec<SourceSettings>,
    #[serde(default)]
    pub stream: BTreeMap<StreamName, StreamSettings>,
    #[serde(default)]
    pub rule: Vec<RuleSettings>,
    #[serde(default)]
    pub alerts: AlertSettings,
    /// What the cloud may have done here.
    #[serde(default)]
    pub command: Vec<RemoteSettings>,
    /// Which broker gets alerts; needed where a rule has a topic and there is not exactly one MQTT source.
    #[serde(default)]
    pub publish: Option<PublishSettings>,
    /// What goes first when the link is thin; [`Settings::lanes`] adds what is not named.
    #[serde(default)]
    lane: Vec<LaneSettings>,
    /// A hash of the text that this was read from; travels with every batch.
    #[serde(skip)]
    pub version: u64,
    /// The text without comments and secrets: what the journal and the snapshot keep of it.
    #[serde(skip)]
    pub text: String,
    /// Where it was read.
    #[serde(skip)]
    pub file: Option<PathBuf>,
}

/// Who this agent is, and where it keeps what it must not forget.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EdgeSettings {
    pub id: EdgeId,
    pub data_dir: PathBuf,
    /// How long a stop may take before what is left is left to the next start.
    #[serde(default = "stop_within")]
    pub stop_within: Span,
}

fn stop_within() -> Span {
    Span(Duration::from_secs(10))
}

/// Health, metrics and status; port 0 takes a free one.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdminSettings {
    pub listen: SocketAddr,
}

impl Default for AdminSettings {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 7310)) }
    }
}

/// Where batches go.
#[derive(Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloudSettings {
    /// In order of preference.
    #[serde(deserialize_with = "urls")]
    pub urls: Vec<Url>,
    #[serde(default)]
    pub token: Option<String>,
    /// A file whose first line is the token; instead of `token`.
    #[serde(default)]
    pub token_file: Option<PathBuf>,
    /// Certificates (PEM) to trust for https, instead of the built-in ones.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// How long a request may take.
    #[serde(default = "request_timeout")]
    pub timeout: Span,
    /// Bytes of sealed batches in one request.
    #[serde(default = "request_bytes")]
    pub request_bytes: Size,
}

fn urls<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Url>, D::Error> {
    #[derive(Deserialize)]
    struct Address(#[serde(deserialize_with = "source::url")] Url);
    Ok(Vec::<Address>::deserialize(deserializer)?.into_iter().map(|address| address.0).collect())
}

fn request_timeout() -> Span {
    Span(Duration::from_secs(30))
}

fn request_bytes() -> Size {
    Size(1 << 20)
}

impl fmt::Debug for CloudSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CloudSettings").field("urls", &self.urls).finish_non_exhaustive()
    }
}

/// The journal: every message as it came, before it is acknowledged.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JournalSettings {
    /// When it is full, sources that can wait get no acknowledgement; what the others send is counted in `losses`.
    pub max_bytes: Size,
    pub segment_bytes: Size,
    /// Between the beginnings of two syncs at least; the first message of a group waits a quarter of it for others, and 0.5 ms at most.
    pub group_wait: Span,
}

impl Default for JournalSettings {
    fn default() -> Self {
        Self { max_bytes: Size(1 << 30), segment_bytes: Size(16 << 20), group_wait: Span(Duration::from_millis(1)) }
    }
}

/// When rows become a batch.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CutSettings {
    /// Never more often than this: each cut costs a sync.
    pub seal_min: Span,
    /// Rows wait at most this long.
    pub seal_max: Span,
    /// So long instead, and in larger batches, when the cloud is away; and at most so long when a request takes longer than
    /// `seal_max`.
    pub seal_away: Span,
    /// So many rows are a batch at once.
    pub rows: usize,
}

impl Default for CutSettings {
    fn default() -> Self {
        Self {
            seal_min: Span(Duration::from_millis(10)),
            seal_max: Span(Duration::from_secs(1)),
            seal_away: Span(Duration::from_secs(10)),
            rows: 8_192,
        }
    }
}

/// What happens when a lane of the spool is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnFull {
    /// The pipeline waits; the journal fills, and then the sources are not acknowledged.
    Refuse,
    /// The oldest batches that were never sent go, and are counted in `losses`.
    DropOldest,
    /// Of those, only readings go: what was made of them stays. When there are none left, the pipeline waits.
    Thin,
}

/// A lane: streams that share a priority and a part of the disk.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaneSettings {
    /// Also the name of its directory.
    pub name: StreamName,
    pub streams: Vec<StreamName>,
    /// 1 goes before 2.
    pub priority: Option<u32>,
    pub max_bytes: Option<Size>,
    #[serde(default = "on_full")]
    pub on_full: OnFull,
    /// What waits for longer is dropped, and counted in `losses`. Off unless set.
    #[serde(default)]
    pub max_age: Option<Span>,
    /// Bytes a second to the cloud, at most. Off unless set.
    #[serde(default)]
    pub bandwidth: Option<Size>,
}

impl LaneSettings {
    /// What is not said: 1, and last for [`REST_LANE`].
    pub fn priority(&self) -> u32 {
        self.priority.unwrap_or(if self.name.as_str() == REST_LANE { u32::MAX } else { 1 })
    }

    /// What is not said: 256 MiB, and 4 GiB for [`REST_LANE`].
    pub fn max_bytes(&self) -> u64 {
        self.max_bytes.map_or(if self.name.as_str() == REST_LANE { 4 << 30 } else { 256 << 20 }, |bytes| bytes.0)
    }
}

fn on_full() -> OnFull {
    OnFull::Refuse
}

/// The lane of windows, quarantine, losses and alerts, when the configuration has none of its own for them.
pub const FIRST_LANE: &str = "first";
/// The lane of all that no other lane names.
pub const REST_LANE: &str = "rest";
/// A segment of a lane's log; a lane is at least two.
pub const LANE_SEGMENT_BYTES: u64 = 16 << 20;

fn first_line(path: &Path) -> Result<String, ConfigError> {
    Ok(read(path)?.lines().next().unwrap_or_default().trim().to_owned())
}

impl Settings {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// When it cannot be read, or something in it is wrong; the text names the place and the nearest right key.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let mut settings = load(path, Self::parse)?;
        settings.file = Some(path.to_owned());
        settings.open_secrets()?;
        Ok(settings)
    }

    /// Reads the files that hold a token or a password in place of them.
    pub(crate) fn open_secrets(&mut self) -> Result<(), ConfigError> {
        let taken = |file: &mut Option<PathBuf>, secret: &mut Option<String>| {
            if let Some(file) = file.take() {
                *secret = Some(first_line(&file)?);
            }
            Ok::<_, ConfigError>(())
        };
        taken(&mut self.cloud.token_file, &mut self.cloud.token)?;
        for source in &mut self.source {
            match source {
                SourceSettings::Http(http) => taken(&mut http.token_file, &mut http.token)?,
                SourceSettings::Mqtt(mqtt) => taken(&mut mqtt.password_file, &mut mqtt.password)?,
                _ => {}
            }
        }
        if let Some(publish) = &mut self.publish {
            taken(&mut publish.password_file, &mut publish.password)?;
        }
        Ok(())
    }

    /// Reads and checks a text. A `token_file` or `password_file` is not opened.
    ///
    /// # Errors
    /// What is wrong, for people.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut settings: Self = toml::from_str(text).map_err(|error| with_nearest_key(&error.to_string()))?;
        settings.version = u64::from(crc32c::crc32c(text.as_bytes()));
        settings.text = kept::without_secrets(text)?;
        settings.source.iter_mut().for_each(SourceSettings::name_by_stream);
        settings.check().map_err(|message| with_line(text, message))?;
        Ok(settings)
    }

    /// Reads what was kept of a configuration: its version, and [`Settings::text`].
    ///
    /// # Errors
    /// When this agent reads other configurations than the one that kept it.
    pub fn parse_kept(version: u64, text: &str) -> Result<Self, String> {
        Ok(Self { version, ..Self::parse(text)? })
    }

    /// The lanes in order of priority: those of the configuration, then what it does not name.
    pub fn lanes(&self) -> Vec<LaneSettings> {
        let mut lanes = self.lane.clone();
        let named =
            |lanes: &[LaneSettings], stream: &StreamName| lanes.iter().any(|lane| lane.streams.contains(stream));
        let first = self.streams_made().filter(|stream| !named(&lanes, stream)).collect::<Vec<_>>();
        if !first.is_empty() {
            lanes.push(LaneSettings {
                name: FIRST_LANE.parse().expect("a name"),
                streams: first,
                priority: Some(0),
                max_bytes: None,
                on_full: OnFull::Refuse,
                max_age: None,
                bandwidth: None,
            });
        }
        if !lanes.iter().any(|lane| lane.name.as_str() == REST_LANE) {
            lanes.push(LaneSettings {
                name: REST_LANE.parse().expect("a name"),
                streams: Vec::new(),
                priority: None,
                max_bytes: None,
                on_full: OnFull::Refuse,
                max_age: None,
                bandwidth: None,
            });
        }
        lanes.sort_by_key(LaneSettings::priority);
        lanes
    }

    /// How often the journal is told the time. None when nothing needs it.
    pub fn tick_every(&self) -> Option<Duration> {
        self.stream.values().filter_map(StreamSettings::tick_every).min()
    }

    /// A lane that refuses fills the journal, which is what rules read (rule 1).
    fn rules_that_may_stand_still(&self) -> Option<String> {
        let told = self.rule.iter().filter(|rule| rule.is_told()).map(|rule| rule.name.as_str()).collect::<Vec<_>>();
        let lanes = self.lanes();
        let full = lanes.iter().filter(|lane| lane.on_full == OnFull::Refuse);
        let full = full.map(|lane| lane.name.as_str()).collect::<Vec<_>>();
        if told.is_empty() || full.is_empty() {
            return None;
        }
        Some(format!(
            "rules that are published ({}) stand still when a lane with on_full = \"refuse\" is full ({}), and then the \
             journal (journal.max_bytes): nothing is taken any more, and no alert fires or ends until the cloud takes rows again; \
             where alerts must go on through a longer outage, choose \"drop_oldest\" or \"thin\"",
            told.join(", "),
            full.join(", ")
        ))
    }

    /// What is right and may still not be meant, for `check` and the start.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        for url in &self.cloud.urls {
            let loopback = matches!(url.host_str(), Some("127.0.0.1" | "localhost" | "[::1]"));
            if url.scheme() == "http" && !loopback {
                warnings
                    .push(format!("{url} carries token and rows in the clear; use https outside a trusted network"));
            }
        }
        let with_windows = self.stream.iter().filter(|(name, stream)| !stream.windows(name).is_empty());
        let windows = with_windows.map(|(_, stream)| stream.windows_max_bytes.0).sum::<u64>();
        if windows.saturating_mul(4) > self.journal.max_bytes.0 {
            warnings.push(format!(
                "the windows of all streams may hold {} MiB, and a snapshot of them is written whenever a quarter of the \
                 journal ({} MiB) has come in: with full windows the disk writes more for them than for the data; raise \
                 journal.max_bytes to four times that, or lower windows_max_bytes",
                windows >> 20,
                self.journal.max_bytes.0 >> 20
            ));
        }
        for source in &self.source {
            let (Some(decoding), Some(stream)) = (source.decoding(), self.stream.get(source.stream())) else {
                continue;
            };
            let topics = if let SourceSettings::Mqtt(mqtt) = source { mqtt.topics.as_slice() } else { &[] };
            let told = decoding.warnings(stream, topics);
            warnings.extend(told.into_iter().map(|text| format!("[[source]] `{}`: {text}", source.name())));
        }
        warnings.extend(self.rules_that_may_stand_still());
        let streams = self.raw_streams().into_iter().chain(self.streams_made()).collect::<Vec<_>>();
        for (lane, stream) in self.lane.iter().flat_map(|lane| lane.streams.iter().map(move |stream| (lane, stream))) {
            if !streams.contains(stream) {
                let likeness = |name: &&StreamName| strsim::jaro_winkler(stream.as_str(), name.as_str());
                let nearest = streams.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
                let nearest = nearest.map(|name| format!("; did you mean `{name}`?")).unwrap_or_default();
                warnings.push(format!("[[lane]] `{}`: nothing fills the stream `{stream}`{nearest}", lane.name));
            }
        }
        warnings
    }

    /// The streams that the agent makes itself: its own, windows, absent devices.
    fn streams_made(&self) -> impl Iterator<Item = StreamName> {
        let own = [own::QUARANTINE, own::LOSSES, own::ALERTS];
        let own = own.into_iter().map(|name| name.parse().expect("an own name is valid"));
        let windows = self.stream.iter().flat_map(|(name, stream)| stream.windows(name)).map(|(name, _)| name);
        let absent = self.stream.iter().filter_map(|(name, stream)| stream.absent_stream(name));
        own.chain(windows).chain(absent)
    }

    /// The streams of readings, which [`OnFull::Thin`] drops.
    pub fn raw_streams(&self) -> BTreeSet<StreamName> {
        self.source.iter().map(|source| source.stream().clone()).collect()
    }

    /// A segment of a lane's log: what one cut may bring fits in it, also when a source allows long payloads.
    pub fn lane_segment_bytes(&self) -> u64 {
        let payloads = self.source.iter().map(|source| source.max_payload().0);
        LANE_SEGMENT_BYTES.max(payloads.max().unwrap_or(0).saturating_mul(4) + (8 << 20))
    }

    fn check(&self) -> Result<(), String> {
        if self.cloud.urls.is_empty() {
            return Err("[cloud] urls is empty: name at least one".to_owned());
        }
        if self.cloud.urls.iter().any(|url| url.password().is_some() || !url.username().is_empty()) {
            return Err(
                "[cloud] urls: an address has a user or a password: they belong to no url, and are shown with it; \
                        what the cloud asks for is `token`"
                    .to_owned(),
            );
        }
        if let Some(url) = self.cloud.urls.iter().find(|url| !matches!(url.scheme(), "http" | "https")) {
            return Err(format!("[cloud] urls: `{url}` is neither http nor https"));
        }
        match (&self.cloud.token, &self.cloud.token_file) {
            (Some(_), Some(_)) => return Err("[cloud] has both token and token_file: leave one out".to_owned()),
            (None, None) => return Err("[cloud] has no token: write the one that the cloud's [[edge]] has".to_owned()),
            (Some(token), None) if token.is_empty() => return Err("[cloud] token is empty".to_owned()),
            _ => {}
        }
        if self.journal.max_bytes.0 < self.journal.segment_bytes.0.saturating_mul(2) {
            return Err("[journal] max_bytes must be at least two times segment_bytes".to_owned());
        }
        if self.cut.rows == 0 || self.cut.rows > BATCH_ROWS_MAX {
            return Err(format!("[cut] rows must be from 1 to {BATCH_ROWS_MAX}"));
        }
        if self.source.is_empty() {
            return Err("no [[source]]: nothing would ever come in".to_owned());
        }
        let mut names = HashSet::new();
        for source in &self.source {
            if !names.insert(source.name()) {
                return Err(format!("two [[source]] are called `{}`: give one another `name`", source.name()));
            }
            source.check(self.stream.get(source.stream()), self.journal.segment_bytes)?;
        }
        for (name, stream) in &self.stream {
            stream.check(name)?;
        }
        self.clock.check()?;
        self.check_lanes()?;
        self.check_rules()
    }

    /// Rules are read to the last word: what would not be understood later is refused now.
    fn check_rules(&self) -> Result<(), String> {
        if self.alerts.devices_max == 0 {
            return Err("[alerts] devices_max must be at least 1".to_owned());
        }
        Rules::new(self)?;
        if self.rule.iter().any(RuleSettings::is_told) || self.publish.is_some() {
            self.publisher()?;
        }
        crate::remote::check(&self.command)?;
        if !self.command.is_empty() {
            self.publisher().map_err(|error| format!("[[command]]: {error}"))?;
        }
        Ok(())
    }

    /// The broker that gets alerts, as the settings of a client that publishes only.
    ///
    /// # Errors
    /// When it is not said which one, or what is said is wrong.
    pub fn publisher(&self) -> Result<MqttSettings, String> {
        rule::publisher(self)
    }

    fn check_lanes(&self) -> Result<(), String> {
        let (mut names, mut streams) = (HashSet::new(), HashSet::new());
        for lane in &self.lane {
            if !names.insert(&lane.name) {
                return Err(format!("[[lane]] `{}` is there twice", lane.name));
            }
            if lane.name.as_str() == FIRST_LANE {
                return Err(format!("[[lane]] `{FIRST_LANE}`: the name is taken by what Weir sends first"));
            }
            if let Some(twice) = lane.streams.iter().find(|stream| !streams.insert(*stream)) {
                return Err(format!("stream `{twice}` is in two lanes"));
            }
            // One that drops keeps a segment free for what must stay.
            let segments = if lane.on_full == OnFull::Refuse { 2 } else { 3 };
            if lane.max_bytes() < segments * self.lane_segment_bytes() {
                let least = segments * (self.lane_segment_bytes() >> 20);
                return Err(format!("[[lane]] `{}`: max_bytes is less than {least} MiB", lane.name));
            }
            if lane.bandwidth.is_some_and(|bandwidth| bandwidth.0 == 0) {
                return Err(format!("[[lane]] `{}`: a bandwidth of 0 would send nothing", lane.name));
            }
        }
        Ok(())
    }
}
