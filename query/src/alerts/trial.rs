//! What a rule would have found over history: the same evaluation and the same episodes, with event time as the clock.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_array::RecordBatch;
use serde::Serialize;

use super::episode::{Phase, Policy};
use super::episodes::{Episodes, Subject, Transition};
use super::rows::{FreshRows, Newest};
use super::rule::{Kind, Rule, RuleSettings, caller};
use crate::engine::Engine;

/// Alerts that are shown.
const SHOWN_MAX: usize = 10_000;
/// Rows that are judged together.
const ROWS_TOGETHER: usize = 8_192;

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
pub(crate) async fn run(
    engine: &Engine,
    settings: RuleSettings,
    (from, to): (i64, i64),
    devices_max: usize,
) -> Result<Trial, String> {
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
    let mut trial = Running::new(&rule.policy);
    let mut newest = Newest::default();
    use futures::StreamExt;
    while let Some(batch) = stream.next().await {
        let batch = batch.map_err(|error| engine.explain(error).to_string())?;
        for start in (0..batch.num_rows()).step_by(ROWS_TOGETHER) {
            let part = batch.slice(start, ROWS_TOGETHER.min(batch.num_rows() - start));
            let part = RecordBatch::try_new(Arc::clone(&rows.input), part.columns().to_vec());
            let fresh = FreshRows::new(part.map_err(|error| error.to_string())?, &mut newest, devices_max);
            trial.found.rows += fresh.batch.num_rows() as u64;
            let now = fresh.last();
            let of = (&*rule.policy, &*rule.labels);
            let judged = rows.judge(of, &fresh, &mut trial.episodes, now, &mut trial.found.failed);
            judged.map_err(|error| error.strip_backtrace())?;
            trial.take();
        }
    }
    Ok(trial.finish())
}

struct Running {
    episodes: Episodes,
    found: Trial,
    open: BTreeMap<String, Span>,
}

impl Running {
    fn new(policy: &Arc<Policy>) -> Self {
        let mut episodes = Episodes::new(i64::MAX, 0, i64::MIN / 2);
        episodes.govern(BTreeMap::from([(policy.name.clone(), Arc::clone(policy))]), 0);
        Self { episodes, found: Trial::default(), open: BTreeMap::new() }
    }

    fn take(&mut self) {
        for change in self.episodes.take() {
            let Subject::Alert(alert) = change.subject else { continue };
            match (change.transition, alert.phase) {
                (Transition::Firing, Phase::Firing) => {
                    self.found.fired += 1;
                    let span = Span {
                        labels: serde_json::from_str(&alert.labels).unwrap_or_default(),
                        severity: alert.severity.word(),
                        message: alert.message.clone(),
                        from: alert.from,
                        fired: change.ts,
                        to: None,
                    };
                    self.open.insert(alert.id.clone(), span);
                }
                (Transition::Resolved, _) => {
                    let Some(mut span) = self.open.remove(&alert.id) else { continue };
                    span.to = alert.to;
                    self.found.firing_s += alert.to.map_or(0.0, |to| (to - span.fired).max(0) as f64 / 1e6);
                    self.show(span);
                }
                _ => {}
            }
        }
    }

    fn show(&mut self, span: Span) {
        if self.found.alerts.len() < SHOWN_MAX {
            self.found.alerts.push(span);
        }
    }

    fn finish(mut self) -> Trial {
        for span in std::mem::take(&mut self.open).into_values() {
            self.show(span);
        }
        self.found.alerts.sort_by_key(|span| span.fired);
        self.found
    }
}
