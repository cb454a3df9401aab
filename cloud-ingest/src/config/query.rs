//! `[query]`: the limits of questions, and the lanes in which they wait.

use std::collections::HashSet;
use std::time::Duration;

use serde::Deserialize;
use wire::written::{Size, Span};

use super::ReaderSettings;

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

impl QuerySettings {
    pub(super) fn check(&self, readers: &[ReaderSettings]) -> Result<(), String> {
        let mut lanes = HashSet::new();
        for lane in &self.lane {
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
        for reader in readers {
            if let Some(lane) = reader.lanes.iter().find(|lane| !lanes.contains(lane.as_str())) {
                return Err(format!("[[reader]] `{}`: there is no [[query.lane]] `{lane}`", reader.name));
            }
        }
        Ok(())
    }
}
