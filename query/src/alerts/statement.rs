//! Rules that are asked as statements, in a lane of their own: every row of the answer is an alert that holds now.

use std::sync::Arc;

use arrow_array::RecordBatch;
use futures::StreamExt;

use super::episode::{Says, Seen};
use super::episodes::Episodes;
use super::rows::{Instances, Shape};
use super::rule::{Kind, Rule, caller};
use super::template::Words;
use crate::engine::{Engine, QueryError};

/// What a rule's statement answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) rule: Arc<Rule>,
    pub(crate) rows: Result<Vec<RecordBatch>, QueryError>,
}

/// The text of a rule's statement; None for one that looks at rows. `listening` is since when the node has listened, µs.
fn text(rule: &Rule, now: i64, listening: i64) -> Option<String> {
    match &rule.kind {
        Kind::Rows(_) => None,
        Kind::Statement { sql, .. } => Some(sql.clone()),
        Kind::Absent { stream, by, absent, .. } => {
            let columns = by.iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
            // Silent by the clock, when the node was there to hear, or by event time: so far behind the newest of all.
            let silent_before = if now - listening >= *absent { now - absent } else { 0 };
            let newest = format!("(SELECT max(ts) FROM latest('{stream}'))");
            Some(format!(
                "SELECT {columns}, max(ts) AS last_ts FROM latest('{stream}') GROUP BY {columns} \
                 HAVING max(_received_at) < to_timestamp_micros({silent_before}) \
                 OR max(ts) < {newest} - INTERVAL '{absent} microseconds'"
            ))
        }
    }
}

/// Asks.
pub(crate) async fn ask(engine: &Engine, rule: Arc<Rule>, now: i64, listening: i64) -> Answer {
    let rows = match text(&rule, now, listening) {
        Some(text) => rows(engine, &text, rule.policy.instances_max).await,
        None => Ok(Vec::new()),
    };
    Answer { rule, rows }
}

/// The first rows of a statement.
async fn rows(engine: &Engine, sql: &str, rows_max: usize) -> Result<Vec<RecordBatch>, QueryError> {
    let caller = caller();
    let running = engine.begin(&caller, &engine.enter(&caller).await?, sql);
    let prepared = engine.prepare(&running, sql, None).await?;
    let mut stream = engine.execute(&running, &prepared, None).await?;
    let (mut rows, mut count) = (Vec::new(), 0);
    while let Some(batch) = stream.next().await {
        let batch = batch.map_err(|error| engine.explain(error))?;
        count += batch.num_rows();
        rows.push(batch);
        if count > rows_max {
            break;
        }
    }
    Ok(rows)
}

/// What an answer means: what is in it holds, what is no longer in it has ended.
pub(crate) fn judge(rule: &Rule, answer: &[RecordBatch], episodes: &mut Episodes, now: i64) {
    let mut held = std::collections::HashSet::new();
    for batch in answer {
        let Ok(shape) = Shape::new(batch.schema_ref(), false, rule.settings.value.as_deref()) else { continue };
        let instances = Instances::new(&shape, &rule.labels, batch);
        for row in 0..batch.num_rows() {
            let (labels, device) = (instances.labels(row), instances.device(row));
            if !held.insert(labels.clone()) {
                continue;
            }
            let seen = Seen {
                labels: &labels,
                device: device.as_deref(),
                says: Says::Holds,
                from: now,
                to: now,
                severity: instances.severity(row),
                value: instances.value(row),
                values: &|| instances.values(row),
            };
            episodes.see(&rule.policy, &seen, now);
        }
    }
    let open = episodes.open_of(&rule.policy).into_iter().flatten();
    let mut gone: Vec<(String, Option<String>)> = open
        .filter(|(labels, episode)| episode.watch.is_some() && !held.contains(*labels))
        .map(|(labels, episode)| (labels.clone(), episode.device.clone()))
        .collect();
    gone.sort();
    for (labels, device) in gone {
        let seen = Seen {
            labels: &labels,
            device: device.as_deref(),
            says: Says::Not,
            from: now,
            to: now,
            severity: None,
            value: None,
            values: &Words::new,
        };
        episodes.see(&rule.policy, &seen, now);
    }
}
