//! What a rule would have found over history.

use futures::StreamExt;
use serde::Serialize;

use super::history::{Found, History};
use super::rule::{Kind, Rule, RuleSettings, caller};
use crate::engine::Engine;

/// Alerts that are shown.
const SHOWN_MAX: usize = 10_000;

/// When an alert fired.
#[derive(Debug, Clone, Serialize)]
pub struct Span {
    pub labels: serde_json::Value,
    pub severity: &'static str,
    pub message: String,
    /// Event times, µs since 1970 UTC: when it began, fired and ended. It has no end when it still fired at the last row.
    pub from: i64,
    pub fired: i64,
    pub to: Option<i64>,
}

/// What was found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Trial {
    pub rows: u64,
    /// Rows on which the condition failed.
    pub failed: u64,
    pub fired: u64,
    /// How long all that ended fired together, s.
    pub firing_s: f64,
    /// The first of them.
    pub alerts: Vec<Span>,
}

/// Runs a rule over the rows of an interval of event time.
pub(crate) async fn run(engine: &Engine, settings: RuleSettings, (from, to): (i64, i64)) -> Result<Trial, String> {
    let rule = Rule::compile(engine, settings).await.map_err(|error| error.to_string())?;
    let Kind::Rows(rows) = &rule.kind else {
        return Err(
            "only a rule that looks at one row at a time can be tried over history: make a view of the rest".to_owned()
        );
    };
    let columns =
        rows.input.fields().iter().map(|field| format!("\"{}\"", field.name())).collect::<Vec<_>>().join(", ");
    let sql = format!(
        "SELECT {columns} FROM {} WHERE ts >= to_timestamp_micros({from}) AND ts < to_timestamp_micros({to}) ORDER BY ts",
        rows.stream
    );
    let explain = |error: crate::QueryError| error.to_string();
    let caller = caller();
    let place = engine.enter(&caller).await.map_err(explain)?;
    let running = engine.begin(&caller, &place, &sql);
    let prepared = engine.prepare(&running, &sql, None).await.map_err(explain)?;
    let mut stream = engine.execute(&running, &prepared, None).await.map_err(explain)?;
    let mut history = History::of(&rule.policy);
    while let Some(batch) = stream.next().await {
        let batch = batch.map_err(|error| engine.explain(error).to_string())?;
        let judged = history.judge(rows, (&rule.policy, &rule.labels), &batch);
        judged.map_err(|error| error.strip_backtrace())?;
    }
    history.judge_rest(rows, (&rule.policy, &rule.labels)).map_err(|error| error.strip_backtrace())?;
    let (rows, failed) = (history.rows, history.failed);
    let mut found: Vec<Found> = history.finish().into_values().flat_map(|set| set.found).collect();
    found.sort_by(|one, other| (one.fired, &one.alert.id).cmp(&(other.fired, &other.alert.id)));
    let fired = |found: &Found| found.alert.to.map_or(0.0, |to| (to - found.fired).max(0) as f64 / 1e6);
    Ok(Trial {
        rows,
        failed,
        fired: found.len() as u64,
        firing_s: found.iter().map(fired).sum(),
        alerts: found.iter().take(SHOWN_MAX).map(span).collect(),
    })
}

fn span(found: &Found) -> Span {
    Span {
        labels: serde_json::from_str(&found.alert.labels).unwrap_or_default(),
        severity: found.alert.severity.word(),
        message: found.alert.message.clone(),
        from: found.alert.from,
        fired: found.fired,
        to: found.alert.to,
    }
}
