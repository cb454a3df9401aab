//! Rules that are asked as statements, in a lane of their own: every row of the answer is an alert that holds now.

use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_array::cast::AsArray;

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

/// The column of an absence that is not sure: nothing was heard since the node listens, and it does not for long enough.
const UNSURE: &str = "_unsure";

/// The text of a rule's statement; None for one that looks at rows. `listening` is since when the node has listened, µs.
fn text(rule: &Rule, now: i64, listening: i64) -> Option<String> {
    match &rule.kind {
        Kind::Rows(_) => None,
        Kind::Statement { sql, .. } => Some(sql.clone()),
        Kind::Absent { stream, by, absent, .. } => {
            let columns = by.iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
            let labels = by.iter().map(|name| format!("CAST(\"{name}\" AS VARCHAR) AS \"{name}\""));
            let labels = labels.collect::<Vec<_>>().join(", ");
            // Silent by the clock, when the node was there to hear, or by event time: so far behind the newest of all. Before
            // it was there for long enough, who was silent then and has not been heard since is not known to be back.
            let (silent_before, unheard) =
                if now - listening >= *absent { (now - absent, now - absent) } else { (0, listening) };
            let newest = format!("(SELECT max(ts) FROM latest('{stream}'))");
            let behind = format!("max(ts) < {newest} - INTERVAL '{absent} microseconds'");
            let received_before = |us: i64| format!("max(_received_at) < to_timestamp_micros({us})");
            let (silent, unheard) = (received_before(silent_before), received_before(unheard));
            Some(format!(
                "SELECT {labels}, max(ts) AS last_ts, NOT ({silent} OR {behind}) AS {UNSURE} FROM latest('{stream}') \
                 GROUP BY {columns} HAVING {unheard} OR {behind}"
            ))
        }
    }
}

/// Asks.
pub(crate) async fn ask(engine: &Engine, rule: Arc<Rule>, now: i64, listening: i64) -> Answer {
    let rows = match text(&rule, now, listening) {
        Some(text) => engine.rows_as(&caller(), &text, rule.policy.instances_max).await,
        None => Ok(Vec::new()),
    };
    Answer { rule, rows }
}

/// What an answer means: what is in it holds, what is no longer in it has ended, unless the answer was cut off.
pub(crate) fn judge(rule: &Rule, answer: &[RecordBatch], episodes: &mut Episodes, now: i64) {
    let mut held = std::collections::HashSet::new();
    let is_whole = answer.iter().map(RecordBatch::num_rows).sum::<usize>() <= rule.policy.instances_max;
    for batch in answer {
        let Ok(shape) = Shape::new(batch.schema_ref(), false, rule.settings.value.as_deref()) else { continue };
        let instances = Instances::new(&shape, &rule.labels, batch);
        let unsure = batch.column_by_name(UNSURE).and_then(|column| column.as_boolean_opt());
        for row in 0..batch.num_rows() {
            let (labels, device) = (instances.labels(row), instances.device(row));
            if !held.insert(labels.clone()) || unsure.is_some_and(|unsure| unsure.value(row)) {
                continue;
            }
            let seen = Seen {
                labels: &labels,
                device: device.as_deref(),
                says: Says::Holds,
                from: now,
                moment: (now, 0),
                severity: instances.severity(row),
                value: instances.value(row),
                values: &|| instances.values(row),
            };
            episodes.see(&rule.policy, &seen, now);
        }
    }
    if !is_whole {
        return;
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
            moment: (now, 0),
            severity: None,
            value: None,
            values: &Words::new,
        };
        episodes.see(&rule.policy, &seen, now);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use arrow_array::{ArrayRef, BooleanArray, StringArray};

    use super::super::rule::RuleSettings;
    use super::*;
    use crate::clock::now_us;
    use crate::engine::tests::engine;

    async fn compile(engine: &Engine, text: &str) -> Arc<Rule> {
        Arc::new(Rule::compile(engine, RuleSettings::parse("r", text).unwrap()).await.unwrap())
    }

    fn answer(rows: &[(&str, bool)]) -> Vec<RecordBatch> {
        let devices: ArrayRef = Arc::new(StringArray::from_iter_values(rows.iter().map(|(device, _)| device)));
        let unsure: ArrayRef = Arc::new(BooleanArray::from_iter(rows.iter().map(|(_, unsure)| Some(*unsure))));
        vec![RecordBatch::try_from_iter([("device", devices), (UNSURE, unsure)]).unwrap()]
    }

    fn judged(rule: &Rule, episodes: &mut Episodes, rows: &[(&str, bool)], now: i64) -> Vec<String> {
        judge(rule, &answer(rows), episodes, now);
        let word = |change: &super::super::episodes::Change| {
            let super::super::episodes::Subject::Alert(alert) = &change.subject else { panic!() };
            format!("{} {}", alert.device.as_deref().unwrap_or_default(), change.transition.word())
        };
        episodes.take().iter().map(word).collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_answer_that_was_cut_off_ends_nothing() {
        let (engine, _traffic) = engine(6, 0, Duration::from_secs(60)).await;
        let text = "sql = \"SELECT device, count(*) AS n FROM traffic GROUP BY device\"\nmax_instances = 2";
        let rule = compile(&engine, text).await;
        let mut episodes = Episodes::new(i64::MAX, 0, 0);
        let (a, b, c) = (("a", false), ("b", false), ("c", false));
        assert_eq!(judged(&rule, &mut episodes, &[a, b], 1), ["a firing", "b firing"]);
        assert!(judged(&rule, &mut episodes, &[c, a, c], 2).is_empty(), "there may be more that it does not show");
        assert_eq!(episodes.refused("r"), 1);
        assert_eq!(judged(&rule, &mut episodes, &[a], 3), ["b resolved"]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_absence_that_is_not_sure_begins_and_ends_nothing() {
        let (engine, _traffic) = engine(6, 0, Duration::from_secs(60)).await;
        let rule = compile(&engine, "on = \"traffic\"\nabsent = \"15m\"").await;
        let mut episodes = Episodes::new(i64::MAX, 0, 0);
        assert_eq!(judged(&rule, &mut episodes, &[("a", false)], 1), ["a firing"]);
        // A node that has just started does not know of either.
        assert!(judged(&rule, &mut episodes, &[("a", true), ("b", true)], 2).is_empty());
        assert_eq!(judged(&rule, &mut episodes, &[("b", true)], 3), ["a resolved"]);
        // It can be asked, both when the node has listened for long and when it has not: all devices were heard at one time.
        for listening in [0, now_us()] {
            let now = now_us();
            let found = ask(&engine, Arc::clone(&rule), now, listening).await.rows.unwrap();
            assert!(found.iter().all(|batch| batch.column_by_name(UNSURE).is_some()));
        }
    }
}
