//! The stream `link_log`: every hop before it is done, how it ended, and how far all was looked at.
//!
//! What an event brings about is decided once: the hop is a row with outcome `begun`, and all that it takes to do it, before anything
//! is done. Its end is another row. So a restart finds the hops that have no end and does them, by their own words even when
//! the link is gone; and it looks at what is behind the last `position`, but for hops that are there. A row `mark` says which
//! links there are, and since which sequence each listens.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use wire::schema::own;
use wire::{StreamName, StreamSchema};

use super::link::{Hop, HopTo};
use crate::alerts::rule::caller;
use crate::engine::{Engine, QueryError};

/// Rows of one batch, and their text in bytes.
const ROWS_MAX: usize = 4_096;
const BYTES_MAX: usize = 8 << 20;

/// What became of a hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Begun,
    /// The edge has done it.
    Answered,
    /// It has a place in the sequence, and whoever listens is told.
    Told,
    /// The edge, or the way there, did not take it.
    Refused,
    /// The edge did not answer in time.
    TimedOut,
    RateLimited,
    /// No hop: which links there are.
    Mark,
}

impl Outcome {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Begun => "begun",
            Self::Answered => "answered",
            Self::Told => "told",
            Self::Refused => "refused",
            Self::TimedOut => "timed_out",
            Self::RateLimited => "rate_limited",
            Self::Mark => "mark",
        }
    }
}

/// Since which sequence each link listens.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Since {
    pub(super) links: BTreeMap<String, i64>,
}

/// A row of the stream.
#[derive(Debug, Clone)]
pub(super) enum Row {
    Hop {
        hop: Arc<Hop>,
        outcome: Outcome,
        answer: String,
        /// µs since 1970 UTC.
        at: i64,
    },
    Mark {
        since: Since,
        at: i64,
    },
}

impl Row {
    fn hop(&self) -> Option<&Hop> {
        match self {
            Self::Hop { hop, .. } => Some(hop),
            Self::Mark { .. } => None,
        }
    }

    fn outcome(&self) -> Outcome {
        match self {
            Self::Hop { outcome, .. } => *outcome,
            Self::Mark { .. } => Outcome::Mark,
        }
    }

    fn at(&self) -> i64 {
        match self {
            Self::Hop { at, .. } | Self::Mark { at, .. } => *at,
        }
    }

    fn detail(&self) -> Option<String> {
        match self {
            Self::Hop { hop, outcome: Outcome::Begun, .. } => serde_json::to_string(hop).ok(),
            Self::Hop { .. } => None,
            Self::Mark { since, .. } => serde_json::to_string(since).ok(),
        }
    }

    /// What it takes, about.
    fn bytes(&self) -> usize {
        let hop = self.hop().map_or(0, |hop| hop.payload.len() + hop.from_topic.len() + hop.id.len());
        500 + hop + self.detail().map_or(0, |detail| detail.len())
    }
}

/// The name of the stream.
pub(super) fn stream() -> StreamName {
    own::LINK_LOG.parse().expect("own names are valid")
}

/// Its schema.
pub(super) fn schema() -> Arc<StreamSchema> {
    Arc::new(own::link_log())
}

/// Rows as batches, in order; the last row of the last one has the position.
pub(super) fn batches(rows: &[Row], position: i64, schema: &StreamSchema) -> Vec<RecordBatch> {
    let mut batches = Vec::new();
    let mut rest = rows;
    while !rest.is_empty() {
        let mut bytes = 0;
        let one_too_many = |row: &Row| {
            bytes += row.bytes();
            bytes > BYTES_MAX
        };
        let count = rest.iter().take(ROWS_MAX).position(one_too_many).unwrap_or(rest.len().min(ROWS_MAX));
        let (now, later) = rest.split_at(count.max(1));
        batches.push(batch(now, later.is_empty().then_some(position), schema));
        rest = later;
    }
    batches
}

fn batch(rows: &[Row], position: Option<i64>, schema: &StreamSchema) -> RecordBatch {
    let columns = schema.arrow().fields().iter().map(|field| -> ArrayRef {
        let name = field.name().as_str();
        let hops = || rows.iter().map(Row::hop);
        match name {
            "ts" | "at" => {
                let times: TimestampMicrosecondArray = rows.iter().map(|row| Some(row.at())).collect();
                Arc::new(times.with_timezone("UTC"))
            }
            "hops" => Arc::new(hops().map(|hop| Some(i64::from(hop?.hops))).collect::<Int64Array>()),
            "cause" => Arc::new(hops().map(|hop| Some(hop?.cause)).collect::<Int64Array>()),
            "position" => {
                let last = |index: usize| position.filter(|_| index + 1 == rows.len());
                Arc::new((0..rows.len()).map(last).collect::<Int64Array>())
            }
            "latency_ms" => {
                let latency = |row: &Row| match row.outcome() {
                    Outcome::Begun | Outcome::Mark => None,
                    _ => Some((row.at() - row.hop()?.at) as f64 / 1e3),
                };
                Arc::new(rows.iter().map(latency).collect::<Float64Array>())
            }
            _ => Arc::new(rows.iter().map(|row| text(name, row)).collect::<StringArray>()),
        }
    });
    let columns = columns.collect();
    RecordBatch::try_new(Arc::clone(schema.arrow()), columns).expect("the columns are the schema's")
}

fn text(name: &str, row: &Row) -> Option<String> {
    let own = |text: &str| Some(text.to_owned());
    match name {
        "quality" => return own("good"),
        "outcome" => return own(row.outcome().word()),
        "detail" => return row.detail(),
        _ => {}
    }
    let Row::Hop { hop, answer, .. } = row else { return None };
    let heard = |name: &str| hop.data.get(name).and_then(Value::as_str).map(str::to_owned);
    match (name, &hop.to) {
        ("device", _) => hop.device.clone(),
        ("link", _) => own(&hop.link),
        ("hop_id", _) => own(&hop.id),
        ("from_topic", _) => own(&hop.from_topic),
        ("alert_id", _) => heard("id"),
        ("rule", _) => heard("rule"),
        ("to_kind", HopTo::Edge { .. }) => own("edge"),
        ("to_kind", HopTo::Topic { .. }) => own("topic"),
        ("to_kind", HopTo::Webhook { .. }) => own("webhook"),
        ("to_name", HopTo::Edge { edge, .. }) => own(edge),
        ("to_name", HopTo::Topic { topic }) => own(topic),
        ("to_name", HopTo::Webhook { target }) => own(target),
        ("command", HopTo::Edge { command, .. }) => own(command),
        ("payload", _) => own(&hop.payload).filter(|payload| !payload.is_empty()),
        ("answer", _) => own(answer).filter(|answer| !answer.is_empty()),
        _ => None,
    }
}

/// What a restarted node finds.
#[derive(Debug, Default)]
pub(super) struct Recovered {
    /// None when no link ever was.
    pub(super) position: Option<i64>,
    pub(super) since: Since,
    /// Hops that have no end, in order.
    pub(super) open: Vec<Hop>,
    /// Hops of what is behind the position.
    pub(super) known: BTreeSet<String>,
}

/// Reads what the stream says of the last moment.
///
/// # Errors
/// When it cannot be asked.
pub(super) async fn recover(engine: &Engine) -> Result<Recovered, QueryError> {
    let mut found = Recovered::default();
    if engine.tables().cold(&stream()).is_none() {
        return Ok(found);
    }
    for batch in ask(engine, "SELECT max(position) AS position FROM link_log").await? {
        found.position = batch.column(0).as_primitive::<Int64Type>().iter().flatten().max().or(found.position);
    }
    let mark = "SELECT detail FROM link_log WHERE outcome = 'mark' ORDER BY position DESC, _seq DESC LIMIT 1";
    for text in texts(&ask(engine, mark).await?) {
        found.since = serde_json::from_str(&text).unwrap_or_default();
    }
    let open = "SELECT max(detail) AS detail FROM link_log WHERE hop_id IS NOT NULL GROUP BY hop_id \
                HAVING max(CASE WHEN outcome = 'begun' THEN 0 ELSE 1 END) = 0";
    for text in texts(&ask(engine, open).await?) {
        match serde_json::from_str::<Hop>(&text) {
            Ok(hop) => found.open.push(hop),
            Err(error) => tracing::error!(%error, "a hop of a link is not understood any more"),
        }
    }
    found.open.sort_by(|one, other| (one.cause, &one.link).cmp(&(other.cause, &other.link)));
    let position = found.position.unwrap_or(-1);
    let known = format!("SELECT DISTINCT hop_id FROM link_log WHERE hop_id IS NOT NULL AND cause > {position}");
    found.known = texts(&ask(engine, &known).await?).into_iter().collect();
    Ok(found)
}

/// In the lane of the rules: no reader holds it up.
async fn ask(engine: &Engine, sql: &str) -> Result<Vec<RecordBatch>, QueryError> {
    engine.rows_as(&caller(), sql, usize::MAX).await
}

fn texts(rows: &[RecordBatch]) -> Vec<String> {
    let of = |batch: &RecordBatch| {
        let column = batch.column(0).as_string::<i32>();
        column.iter().flatten().map(str::to_owned).collect::<Vec<_>>()
    };
    rows.iter().flat_map(of).collect()
}
