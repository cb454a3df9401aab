//! What the agent tells about itself: published by the engine some times a second, shown by `admin`.

use std::net::SocketAddr;

use serde::Serialize;

use crate::clock::ClockStatus;
use crate::pipeline::{SourceTotals, StreamTotals};
use crate::publish::PublisherStatus;
use crate::remote::RemoteStatus;
use crate::rules::{self, RuleTotals};

/// All of it, from one moment.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Status {
    pub edge: String,
    pub agent: String,
    pub spool: String,
    pub uptime_s: u64,
    /// How often a status was published: two questions with another number saw another moment.
    pub published: u64,
    /// Whether all that was journalled is applied, cut and committed by the cloud.
    pub drained: bool,
    pub sources: Vec<SourceStatus>,
    pub streams: Vec<StreamStatus>,
    pub lanes: Vec<LaneStatus>,
    pub journal: JournalStatus,
    pub uplink: UplinkStatus,
    pub clock: ClockStatus,
    pub rows: RowsStatus,
    pub configuration: ConfigurationStatus,
    /// Readings in quarantine, by reason.
    pub quarantined: std::collections::BTreeMap<String, u64>,
    /// What does not go on for now, and why; it is tried again by itself.
    pub problems: Vec<String>,
    /// Damage found on disk since the start.
    pub incidents: Vec<String>,
    pub rules: Vec<RuleStatus>,
    /// Alerts that fire, at most [`FIRING_MAX`].
    pub firing: Vec<FiringStatus>,
    /// The way to the broker that gets alerts.
    pub publisher: Option<PublisherStatus>,
    /// Commands of the cloud.
    pub commands: RemoteStatus,
}

/// Alerts that are shown one by one.
pub(super) const FIRING_MAX: usize = 50;

/// An alert that fires.
#[derive(Debug, Clone, Default, Serialize)]
pub struct FiringStatus {
    pub rule: String,
    pub severity: String,
    pub device: String,
    pub message: String,
    pub id: String,
    /// Event time of its beginning, µs since 1970 UTC.
    pub from_us: i64,
}

impl From<rules::Transition> for FiringStatus {
    fn from(alert: rules::Transition) -> Self {
        let rules::Transition { rule, severity, device, message, id, from, .. } = alert;
        Self { rule, severity: severity.to_owned(), device, message, id, from_us: from }
    }
}

/// One rule. Counts are since the data directory was made, or since the rule's text changed.
#[derive(Debug, Clone, Default, Serialize)]
pub struct RuleStatus {
    pub name: String,
    pub pending: usize,
    pub firing: usize,
    #[serde(flatten)]
    pub totals: RuleTotals,
}

impl From<rules::RuleStatus<'_>> for RuleStatus {
    fn from(rule: rules::RuleStatus<'_>) -> Self {
        Self { name: rule.name.to_owned(), pending: rule.pending, firing: rule.firing, totals: rule.totals }
    }
}

/// One source. Counts are since the data directory was made.
#[derive(Debug, Clone, Default, Serialize)]
pub struct SourceStatus {
    pub name: String,
    pub connected: bool,
    pub connects: u64,
    pub received: u64,
    /// Messages a second over the last seconds.
    pub rate: f64,
    #[serde(flatten)]
    pub totals: SourceTotals,
    pub last_arrival_us: i64,
    pub last_error: Option<String>,
    /// Where it listens, when it is a door.
    pub address: Option<SocketAddr>,
    /// What it has published since the start: requests for births.
    pub commands_sent: u64,
}

/// One stream.
#[derive(Debug, Clone, Default, Serialize)]
pub struct StreamStatus {
    pub name: String,
    #[serde(flatten)]
    pub totals: StreamTotals,
    /// Rows a second over the last seconds.
    pub rate: f64,
    /// Rows that wait for a cut.
    pub pending: u64,
    /// Rows that the cloud has not called committed: those that wait for a cut, and those in the spool.
    pub uncommitted: u64,
    /// µs since 1970 UTC.
    pub watermark_us: Option<i64>,
    /// How far the watermark is behind the gateway's clock, s.
    pub lag_s: Option<f64>,
    /// Why a reading went to quarantine last, since the start.
    pub last_error: Option<String>,
    /// Rates of the last minutes, for the page.
    #[serde(skip)]
    pub rates: Vec<f64>,
    /// Device, event time and the first values of the reading that was accepted last since the start.
    pub last: Vec<LastValue>,
}

/// A value as people read it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct LastValue {
    pub name: String,
    pub value: String,
    /// Those of the last minutes, of any device, when they are numbers; for the page.
    #[serde(skip)]
    pub samples: Vec<f64>,
}

/// One lane of the spool.
#[derive(Debug, Clone, Default, Serialize)]
pub struct LaneStatus {
    pub name: String,
    pub bytes: u64,
    pub bytes_max: u64,
    pub bytes_written: u64,
    /// Bytes written a second over the last seconds.
    pub rate: f64,
    pub batches_waiting: u64,
    pub full: bool,
}

/// The journal.
#[derive(Debug, Clone, Default, Serialize)]
pub struct JournalStatus {
    pub bytes: u64,
    pub bytes_max: u64,
    /// Journalled and not applied yet.
    pub lag_bytes: u64,
    pub full: bool,
    pub bytes_written: u64,
    pub syncs: u64,
}

/// The way to the cloud.
#[derive(Debug, Clone, Default, Serialize)]
pub struct UplinkStatus {
    pub url: String,
    /// The node that answers, when one does.
    pub node: Option<String>,
    pub in_flight: usize,
    pub bytes_sent: u64,
    pub last_error: Option<String>,
}

/// Rows from the pipeline on: sealed = committed + spooled + lost + voided (rule 6).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct RowsStatus {
    pub sealed: u64,
    pub committed: u64,
    pub spooled: u64,
    pub lost: u64,
    /// Of batches that the cloud refused for good; their rows are in quarantine.
    pub voided: u64,
}

/// The configuration, and what became of changes to its file.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ConfigurationStatus {
    /// What the pipeline goes by now; each batch carries it.
    pub version: u64,
    /// When the agent took over what it has, µs since 1970 UTC.
    pub loaded_at_us: i64,
    pub reloads: u64,
    /// Files that were not taken over: the agent goes on by what it had.
    pub refused: u64,
    /// Why the last file was not taken over; None when it was.
    pub last_error: Option<String>,
}
