//! The cloud's configuration: TOML as people write it, read into values that are right.
//!
//! Unknown keys are refused, with the nearest right one. Durations are `"60s"`, sizes `"64MiB"`.
//! `configs/cloud.toml` shows every key; a test parses it.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use wire::ids::OWN_EDGE;
pub use wire::written::{ConfigError, Size, Span};
use wire::written::{load, with_line, with_nearest_key};
use wire::{BATCH_BYTES_MAX, BATCH_DATES_MAX, BATCH_DECODED_BYTES_MAX, EdgeId};

use crate::store::S3Settings;

mod alerts;
mod broker;
mod lake;
mod links;
mod pressure;
mod views;

pub use alerts::{AlertSettings, PublishKind, PublishSettings, Way};
pub use broker::BrokerSettings;
pub use lake::{CompactSettings, Keep, KeepSettings, LakeSettings, StreamSettings};
pub use links::LinksSettings;
pub use pressure::PressureSettings;
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

/// Addresses; port 0 takes a free one.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ListenSettings {
    pub http: SocketAddr,
    pub flight_sql: SocketAddr,
    pub postgres: SocketAddr,
    /// Connections to the HTTP port at one time.
    pub http_connections: usize,
    pub flight_sql_connections: usize,
    pub postgres_connections: usize,
    pub tls: Option<TlsSettings>,
}

/// The certificate of the doors; a door with it speaks TLS only.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsSettings {
    /// PEM: the chain, and the private key.
    pub certificate: PathBuf,
    pub key: PathBuf,
    #[serde(default = "all_doors")]
    pub doors: Vec<DoorName>,
}

/// A door, by its name in `[listen]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DoorName {
    Http,
    FlightSql,
    Postgres,
}

fn all_doors() -> Vec<DoorName> {
    vec![DoorName::Http, DoorName::FlightSql, DoorName::Postgres]
}

impl Default for ListenSettings {
    fn default() -> Self {
        let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
        Self {
            http: local(7300),
            flight_sql: local(7301),
            postgres: local(7302),
            http_connections: 4_096,
            flight_sql_connections: 256,
            postgres_connections: 256,
            tls: None,
        }
    }
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

/// Limits of questions.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuerySettings {
    /// From a statement's place in its lane to its last row.
    pub timeout: Span,
    /// Memory of all running statements together; they spill to disk when they can.
    pub max_bytes: Size,
    /// Memory of one statement.
    pub statement_bytes: Size,
    /// What all of them may have spilled at a time.
    pub spill_bytes: Size,
    /// Rows and bytes of one answer.
    pub result_rows: u64,
    pub result_bytes: Size,
    /// Rows of one JSON answer.
    pub json_rows: usize,
    /// Rows that one `time_bucket_gapfill` may make.
    pub gapfill_rows: usize,
    /// Memory for what `latest` keeps of all streams.
    pub latest_memory: Size,
    /// Statements that `system.queries` remembers.
    pub recent: usize,
    /// Lanes beside `default`, or another `default`.
    pub lane: Vec<LaneSettings>,
}

impl Default for QuerySettings {
    fn default() -> Self {
        Self {
            timeout: Span(Duration::from_secs(300)),
            max_bytes: Size(1 << 30),
            statement_bytes: Size(512 << 20),
            spill_bytes: Size(16 << 30),
            result_rows: 1_000_000_000,
            result_bytes: Size(64 << 30),
            json_rows: 1_000_000,
            gapfill_rows: 1_000_000,
            latest_memory: Size(256 << 20),
            recent: 1_000,
            lane: Vec::new(),
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

/// Statements that wait for each other and for no others.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaneSettings {
    pub name: String,
    /// Statements that run at a time.
    #[serde(default = "lane_running")]
    pub running: usize,
    /// Statements that wait; one more is refused.
    #[serde(default = "lane_waiting")]
    pub waiting: usize,
    /// As `query.timeout` and `query.statement_bytes`, unless said otherwise.
    pub timeout: Option<Span>,
    pub statement_bytes: Option<Size>,
    /// Threads that its statements run on; as many as there are processors, unless said otherwise.
    pub threads: Option<usize>,
}

fn lane_running() -> usize {
    8
}

fn lane_waiting() -> usize {
    64
}

impl LaneSettings {
    /// The lane of a reader for whom no other is set.
    pub fn default_lane() -> Self {
        let (running, waiting) = (lane_running(), lane_waiting());
        Self { name: DEFAULT_LANE.to_owned(), running, waiting, timeout: None, statement_bytes: None, threads: None }
    }
}

/// There is always a lane of this name.
pub const DEFAULT_LANE: &str = "default";
/// The lane that views ask in.
pub const VIEWS_LANE: &str = "views";

/// One edge that may write.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EdgeSettings {
    pub id: EdgeId,
    pub token: String,
}

impl fmt::Debug for EdgeSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EdgeSettings").field("id", &self.id).finish_non_exhaustive()
    }
}

/// One who may ask.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReaderSettings {
    pub name: String,
    pub password: String,
    /// The edges whose rows it sees (`*` stands for any characters); all when none are set.
    pub edges: Option<Vec<String>>,
    /// The condition of the rows that it sees, as SQL; all when none is set.
    pub scope: Option<String>,
    /// The lanes that it may use, its own first; `default` when none is set.
    #[serde(default)]
    pub lanes: Vec<String>,
    /// What it may do beside asking.
    #[serde(default)]
    pub rights: Vec<ReaderRight>,
}

/// What a reader may do beside asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReaderRight {
    /// Say what tables and columns are, for everybody to read.
    Comment,
    /// Make and drop views.
    Views,
    /// Change the rules of alerts.
    Rules,
    /// Acknowledge alerts, and silence them.
    Alerts,
    /// Change links.
    Links,
}

impl fmt::Debug for ReaderSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReaderSettings").field("name", &self.name).finish_non_exhaustive()
    }
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
        self.views.check()?;
        self.alerts.check(self.listen.http_connections)?;
        self.links.check()?;
        self.broker.as_ref().map_or(Ok(()), BrokerSettings::check)?;
        let mut ids = HashSet::new();
        for edge in &self.edge {
            if !ids.insert(&edge.id) {
                return Err(format!("[[edge]] `{}` is there twice", edge.id));
            }
            if edge.id.as_str() == OWN_EDGE {
                return Err(format!("[[edge]] `{OWN_EDGE}` is what the cloud calls itself: choose another id"));
            }
            if edge.token.is_empty() {
                return Err(format!("[[edge]] `{}` has an empty token", edge.id));
            }
        }
        let mut names = HashSet::new();
        if let Some(reader) = self.reader.iter().find(|reader| !names.insert(&reader.name)) {
            return Err(format!("[[reader]] `{}` is there twice", reader.name));
        }
        if let Some(reader) = self.reader.iter().find(|reader| reader.password.is_empty()) {
            return Err(format!("[[reader]] `{}` has an empty password", reader.name));
        }
        let limited = |reader: &&ReaderSettings| reader.edges.is_some() || reader.scope.is_some();
        let sees_all = |right: &ReaderRight| *right != ReaderRight::Comment;
        if let Some(reader) = self.reader.iter().filter(limited).find(|reader| reader.rights.iter().any(sees_all)) {
            return Err(format!(
                "[[reader]] `{}` sees a part of the rows, and views, rules and links are made of all: leave edges and scope out, \
                 or every right but \"comment\"",
                reader.name
            ));
        }
        let mut lanes = HashSet::new();
        for lane in &self.query.lane {
            if !lanes.insert(lane.name.as_str()) {
                return Err(format!("[[query.lane]] `{}` is there twice", lane.name));
            }
            if lane.name == VIEWS_LANE {
                return Err(format!("[[query.lane]] `{VIEWS_LANE}` is the lane of views: set it in [views]"));
            }
            if lane.running == 0 || lane.threads == Some(0) {
                return Err(format!("[[query.lane]] `{}`: running and threads must be at least 1", lane.name));
            }
        }
        lanes.insert(DEFAULT_LANE);
        for reader in &self.reader {
            if let Some(lane) = reader.lanes.iter().find(|lane| !lanes.contains(lane.as_str())) {
                return Err(format!("[[reader]] `{}`: there is no [[query.lane]] `{lane}`", reader.name));
            }
        }
        let connections = [
            ("http_connections", self.listen.http_connections),
            ("flight_sql_connections", self.listen.flight_sql_connections),
            ("postgres_connections", self.listen.postgres_connections),
        ];
        if let Some((key, _)) = connections.iter().find(|(_, connections)| *connections == 0) {
            return Err(format!("[listen] {key} must be at least 1"));
        }
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
mod tests {
    use super::*;

    #[test]
    fn the_shipped_configuration_is_right() {
        let settings = Settings::parse(include_str!("../../configs/cloud.toml")).unwrap();
        assert_eq!(settings.commit.max_age, Span(Duration::from_secs(60)));
        assert_eq!(settings.edge.len(), 1);
    }

    #[test]
    fn wrong_configurations_say_what_is_wrong() {
        let check = |text: &str, expected: &str| {
            let error = Settings::parse(&format!("data_dir = \"x\"\n{text}")).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
            assert!(error.contains("line "), "no line: {text}: {error}");
        };
        check("[commit]\nmax_agee = \"1s\"", "did you mean `max_age`?");
        check("[commit]\nmax_age = \"soon\"", "\"250ms\"");
        check("[wal]\nmax_bytes = \"many\"", "\"64MiB\"");
        check("[commit]\nmax_partitions = 3", "less than 64");
        check("[wal]\nsegment_bytes = \"1MiB\"", "at least 33MiB");
        check("[wal]\nmax_bytes = \"100MiB\"\nsegment_bytes = \"40MiB\"", "at least eight times");
        check("[hot]\nmax_bytes = \"1MiB\"", "at least 128MiB");
        check("[pressure]\nalerts = 2.0", "from 0 to 0.5");
        check("[pressure]\nviews = nan", "from 0 to 0.5");
        check("[pressure]\nalerts = 0.3\nviews = 0.3", "together must be at most 0.5");
        check("[pressure]\nalerts = 0.001", "less than 8MiB");
        check("[hot]\nmax_bytes = \"128MiB\"\n[pressure]\nalerts = 0.06", "set it to 0.0625 at least");
        check("[hot]\nmax_bytes = \"128MiB\"\n[pressure]\nviews = 0.4375001", "together must be at most");
        check("[hot]\nmax_bytes = \"128MiB\"\n[pressure]\nviews = 0.4", "less than 80MiB");
        check("[pressure]\nviews_waiting = 0", "at least 1");
        check("[pressure]\nvews = 0.1", "did you mean `views`?");
        check("[limits]\nrequest_bytes = \"4MiB\"", "at least 33MiB");
        check("[limits]\nrequests_waiting = 0", "at least 1");
        check("[limits]\ndecoded_bytes = \"64MiB\"", "at least 128MiB");
        check("[write]\nmax_bytes = \"1GiB\"", "at most limits.request_bytes");
        check("[stream.s.alias]\na = \"b\"\nb = \"c\"", "has an alias itself");
        check("[stream.s.alias]\na = \"B\"", "is not a name");
        check("[write]\ndevise = []", "did you mean `device`?");
        check("[limits]\nwaiting_bytes = \"1MiB\"", "at least request_bytes");
        check("[[edge]]\nid = \"a b\"\ntoken = \"x\"", "not an edge id");
        check("[[edge]]\nid = \"a\"\ntoken = \"\"", "empty token");
        check("[[edge]]\nid = \"weir\"\ntoken = \"x\"", "what the cloud calls itself");
        check("[[edge]]\nid = \"a\"\ntoken = \"x\"\n[[edge]]\nid = \"a\"\ntoken = \"y\"", "twice");
        check("[[reader]]\nname = \"a\"\npassword = \"\"", "empty password");
        check("[listen]\nhttp = \"nowhere\"", "http");
        check("[lake]\ngrace = \"5m\"", "at least 1h");
        check("[lake]\ngrace = \"3d\"\nlog_keep = \"2d\"", "not less than lake.grace");
        check("[lake]\ncheckpoint_commits = 0", "at least 1");
        check("[compact]\ncpu_share = 0.0", "above 0");
        check("[compact]\ncpu_share = 1.5", "at most 1");
        check("[compact]\nfile_bytes = \"1MiB\"", "more than compact.small_bytes");
        check("[compact]\nmin_files = 1", "at least 2");
        check("[compact]\nmemory_bytes = \"1MiB\"", "at least 64MiB");
        check("[retention]\nkeep = \"long\"", "\"forever\"");
        check("[stream.\"a*b*c\"]\nkeep = \"1d\"", "one `*`");
        check("[stream.\"No Name\"]\nkeep = \"1d\"", "is no stream");
        check("[stream.traffic]\nkeeep = \"1d\"", "did you mean `keep`?");
        check("[listen]\nhttp_connections = 0", "http_connections must be at least 1");
        check("[listen]\npostgres_connections = 0", "postgres_connections must be at least 1");
        check("[alerts]\nsubscribers_max = 4096", "less than [listen] http_connections");
        check("[listen.tls]\ncertificate = \"a\"\nkey = \"b\"\ndoors = [\"smtp\"]", "smtp");
        check("[[query.lane]]\nname = \"a\"\n[[query.lane]]\nname = \"a\"", "twice");
        let target = |more: &str| format!("[[alerts.publish]]\nname = \"a\"\n{more}");
        check(&target("kind = \"webhook\"\nurl = \"mqtt://b\""), "http:// or https://");
        check(&target("kind = \"mqtt\"\nurl = \"mqtt://b\"\nsecret = \"x\""), "of a webhook");
        check(&target("kind = \"mqtt\"\nurl = \"mqtt://b\"\nca_file = \"x\""), "for mqtts://");
        check(&target("kind = \"mqtt\"\nurl = \"mqtts://b\"\ncert_file = \"x\"\nkey_file = \"y\""), "with ca_file");
        let target_of_view = |more: &str| format!("[[views.publish]]\nname = \"a\"\nview = \"v\"\n{more}");
        check(&target_of_view("kind = \"webhook\"\nurl = \"mqtt://b\""), "http:// or https://");
        check(&target_of_view("kind = \"alertmanager\"\nurl = \"http://b\""), "webhook or mqtt");
        check(&target_of_view("kind = \"mqtt\"\nurl = \"mqtt://b\"\ntopic = \"a/#\""), "no wildcards");
        check(&target_of_view("kind = \"webhook\"\nurl = \"http://b\"\ntopic = \"a\""), "is of mqtt");
        check(&target("kind = \"fax\"\nurl = \"mqtt://b\""), "fax");
        check("[broker]\nlisten = \"127.0.0.1:1\"\nlisten_v4 = \"127.0.0.1:1\"", "another address");
        check("[broker]\nlisten = \"127.0.0.1:0\"", "needs a port");
        check("[links]\ncommands_waiting = 0", "from 1 to 500");
        check("[links]\ndirektory = \"x\"", "did you mean `directory`?");
        check("[alerts]\ndirektory = \"x\"", "did you mean `directory`?");
        check("[[reader]]\nname = \"a\"\npassword = \"x\"\nscope = \"true\"\nrights = [\"rules\"]", "sees a part");
        check("[[query.lane]]\nname = \"a\"\nrunning = 0", "at least 1");
        check("[[query.lane]]\nname = \"views\"", "the lane of views");
        check("[views]\nthreads = 0", "at least 1");
        check("[views]\nanswer_rows = 1", "at least 1000");
        check("[[reader]]\nname = \"a\"\npassword = \"x\"\nedges = [\"b\"]\nrights = [\"views\"]", "sees a part");
        check("[[reader]]\nname = \"a\"\npassword = \"x\"\nlanes = [\"fast\"]", "no [[query.lane]] `fast`");
    }

    #[test]
    fn no_secret_is_shown() {
        let settings =
            Settings::parse("data_dir = \"x\"\n[[edge]]\nid = \"a\"\ntoken = \"secret\"\n[[reader]]\nname = \"n\"\npassword = \"secret\"")
                .unwrap();
        assert!(!format!("{settings:?}").contains("secret"));
    }
}
