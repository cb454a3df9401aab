//! What is new in the streams that rules are on, and what it means: each row is looked at once, however it is read.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use arrow_select::concat::concat_batches;
use futures::TryStreamExt;
use wire::StreamName;

use super::super::claims;
use super::super::episodes::Episodes;
use super::super::rows::FreshRows;
use super::super::rule::{Kind, Rule};
use super::Runner;
use crate::clock::now_us;
use crate::follow::{Position, behind};
use crate::fused_table::Frozen;

/// Rows of batches that are looked at together; and that are held while they are read from files.
const ROWS_TOGETHER: usize = 16_384;
const ROWS_HELD: usize = 131_072;

impl Runner {
    /// Looks at what is new in every stream that a rule is on.
    pub(super) async fn follow(&mut self, episodes: &mut Episodes) {
        let mut wanted = self.wanted();
        if wanted.iter().any(|(stream, rules)| !self.fit(stream, rules)) {
            self.wait_no_longer(episodes).await;
            wanted = self.wanted();
        }
        for (stream, rules) in wanted {
            // Rows of a stream that got other columns wait until all of its rules are about these.
            if !self.fit(&stream, &rules) {
                continue;
            }
            if let Err(error) = self.follow_one(&stream, &rules, episodes).await {
                tracing::warn!(%stream, %error, "its new rows cannot be read yet");
            }
        }
    }

    /// The streams that are followed, each with its rules; that of the edges' alerts always is.
    fn wanted(&self) -> BTreeMap<StreamName, Vec<Arc<Rule>>> {
        let mut wanted = BTreeMap::from([(claims::stream(), Vec::new())]);
        for rule in self.rules.values().filter_map(|kept| kept.rule.as_ref().ok()) {
            if let Kind::Rows(rows) = &rule.kind {
                wanted.entry(rows.stream.clone()).or_default().push(Arc::clone(rule));
            }
        }
        wanted
    }

    /// Whether the rules of a stream are about its columns as they are.
    fn fit(&mut self, stream: &StreamName, rules: &[Arc<Rule>]) -> bool {
        let Some(cold) = self.engine.tables().cold(stream) else { return true };
        let followed = self.followed.entry(stream.clone()).or_default();
        if followed.columns.as_ref().is_some_and(|known| same_columns(known, &cold.schema)) {
            return true;
        }
        let fits = rules.iter().all(|rule| match &rule.kind {
            Kind::Rows(rows) => same_columns(&rows.input, &cold.schema),
            _ => true,
        });
        if fits {
            followed.columns = Some(cold.schema);
        }
        fits
    }

    async fn follow_one(
        &mut self,
        stream: &StreamName,
        rules: &[Arc<Rule>],
        episodes: &mut Episodes,
    ) -> datafusion::common::Result<()> {
        let tables = Arc::clone(self.engine.tables());
        if tables.cold(stream).is_none() {
            return Ok(());
        }
        let frozen = Frozen::take(tables.as_ref(), stream).await?;
        let shown = Position::of(&frozen);
        let known = match self.positions.get(stream) {
            Some(known) => known.clone(),
            // What edges raised is never passed over; a rule begins with what comes next.
            None if *stream == claims::stream() => Position::default(),
            None => {
                self.positions.insert(stream.clone(), shown);
                // Written at once: after a crash the rule begins here, too.
                let now = self.clock(episodes);
                episodes.mark(now);
                return Ok(());
            }
        };
        if known == shown {
            return Ok(());
        }
        let wanted = match rules.first().map(|rule| &rule.kind) {
            Some(Kind::Rows(rows)) => Arc::clone(&rows.input),
            _ => claims::columns(&frozen.cold().schema),
        };
        // History from before there was a record is none of the business of what edges raise.
        let since = (known == Position::default()).then(|| now_us() - self.horizon);
        let mut rows = behind(&self.engine, stream, &frozen, &known, &wanted).await?;
        let (mut held, mut count, mut before) = (Vec::new(), 0, None);
        loop {
            let next = match rows.try_next().await {
                Ok(next) => next,
                Err(error) => {
                    // All of it is looked at again later.
                    if let Some((was, newest)) = before {
                        *episodes = was;
                        self.followed.entry(stream.clone()).or_default().newest = newest;
                    }
                    return Err(error);
                }
            };
            let ended = next.is_none();
            count += next.as_ref().map_or(0, RecordBatch::num_rows);
            held.extend(next);
            if !ended && count < ROWS_HELD {
                continue;
            }
            if !ended && before.is_none() {
                let newest = self.followed.get(stream).map(|followed| followed.newest.clone());
                before = Some((episodes.clone(), newest.unwrap_or_default()));
            }
            self.judge(stream, rules, since, &together(&held, &wanted)?, episodes);
            (held, count) = (Vec::new(), 0);
            if ended {
                break;
            }
        }
        for rule in rules {
            self.refusals(rule, episodes);
        }
        self.positions.insert(stream.clone(), shown);
        self.moved = true;
        Ok(())
    }

    /// What new rows mean for every rule of their stream, or as claims of edges.
    fn judge(
        &mut self,
        stream: &StreamName,
        rules: &[Arc<Rule>],
        since: Option<i64>,
        rows: &[RecordBatch],
        episodes: &mut Episodes,
    ) {
        let now = self.clock(episodes);
        for rows in rows {
            if *stream == claims::stream() {
                let mut claims = claims::read(rows);
                claims.retain(|claim| since.is_none_or(|since| claim.ts >= since));
                let before = episodes.make_room();
                claims.iter().for_each(|claim| episodes.candidate(claim, now));
                let turned_away = episodes.make_room() - before;
                if turned_away > 0 {
                    tracing::error!(
                        turned_away,
                        "edges raise more alerts than may be open: these are in `alerts` alone"
                    );
                }
            }
            if rules.is_empty() {
                continue;
            }
            let followed = self.followed.entry(stream.clone()).or_default();
            let fresh = FreshRows::new(rows.clone(), &mut followed.newest, self.devices_max);
            for rule in rules {
                self.judge_by(rule, &fresh, episodes, now);
            }
        }
    }

    fn judge_by(&mut self, rule: &Rule, fresh: &FreshRows, episodes: &mut Episodes, now: i64) {
        let Kind::Rows(rows) = &rule.kind else { return };
        let mut failed = 0;
        let judged = rows.judge((&rule.policy, &rule.labels), fresh, episodes, now, &mut failed);
        if failed > 0 || judged.is_err() {
            let mut statuses = self.statuses.lock();
            if let Some(status) = statuses.get_mut(&rule.policy.name) {
                status.failed += failed.max(1);
                status.last_error = judged.err().map(|error| error.strip_backtrace()).or(status.last_error.take());
            }
        }
    }

    /// Tells how many alerts of a rule found no room.
    pub(super) fn refusals(&self, rule: &Rule, episodes: &Episodes) {
        let refused = episodes.refused(&rule.policy.name);
        if refused > 0
            && let Some(status) = self.statuses.lock().get_mut(&rule.policy.name)
            && status.refused != refused
        {
            status.refused = refused;
            status.last_error = Some(format!("it has {} alerts, and no more", rule.policy.instances_max));
        }
    }
}

/// Whether names and types are the same; what is said of columns may differ.
pub(super) fn same_columns(one: &SchemaRef, other: &SchemaRef) -> bool {
    let pairs = || one.fields().iter().zip(other.fields());
    Arc::ptr_eq(one, other)
        || one.fields().len() == other.fields().len()
            && pairs().all(|(one, other)| one.name() == other.name() && one.data_type() == other.data_type())
}

/// Small batches together, large ones as they are.
fn together(rows: &[RecordBatch], schema: &SchemaRef) -> datafusion::common::Result<Vec<RecordBatch>> {
    let (mut all, mut some, mut count) = (Vec::new(), Vec::new(), 0);
    for batch in rows {
        some.push(batch.clone());
        count += batch.num_rows();
        if count >= ROWS_TOGETHER {
            all.push(concat_batches(schema, &some)?);
            (some, count) = (Vec::new(), 0);
        }
    }
    if count > 0 {
        all.push(concat_batches(schema, &some)?);
    }
    Ok(all)
}
