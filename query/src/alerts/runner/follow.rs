//! What is new in the streams that rules are on, and what it means: each row is looked at once, however it is read.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use arrow_select::concat::concat_batches;
use futures::TryStreamExt;
use wire::StreamName;

use super::super::claims;
use super::super::episodes::Episodes;
use super::super::late::Late;
use super::super::metrics::LateRows;
use super::super::order::{NewRows, Order};
use super::super::rule::{Kind, Rule};
use super::Runner;
use crate::clock::now_us;
use crate::follow::{Position, behind, newest_read};
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
        let known = match self.read.positions.get(stream) {
            Some(known) => known.clone(),
            // What edges raised is never passed over; a rule begins with what comes next.
            None if *stream == claims::stream() => Position::default(),
            None => {
                self.read.newest.insert(stream.clone(), newest_read(&frozen, &shown));
                self.read.positions.insert(stream.clone(), shown);
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
        let since = (known == Position::default()).then(|| now_us() - self.limits.horizon);
        let read = self.read.newest.get(stream).copied().unwrap_or(i64::MIN);
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
                        self.read.newest.insert(stream.clone(), read);
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
            self.judge((stream, read), rules, since, &together(&held, &wanted)?, episodes);
            (held, count) = (Vec::new(), 0);
            if ended {
                break;
            }
        }
        for rule in rules {
            self.refusals(rule, episodes);
        }
        self.read.positions.insert(stream.clone(), shown);
        self.moved = true;
        Ok(())
    }

    /// What new rows mean for every rule of their stream, or as claims of edges.
    fn judge(
        &mut self,
        (stream, read): (&StreamName, i64),
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
            let rows = NewRows::new(rows.clone());
            let newest = self.read.newest.entry(stream.clone()).or_insert(i64::MIN);
            *newest = rows.last().max(*newest);
            let followed = self.followed.entry(stream.clone()).or_default();
            // Of a label set that was not seen since the start all that is older than what had been read is late; a device whose clock
            // is ahead does not make all others late.
            // Rules that tell the same label sets apart see the same rows as late.
            let mut orders: HashMap<&str, Order> = HashMap::new();
            for rule in rules {
                let Kind::Rows(of) = &rule.kind else { continue };
                if !orders.contains_key(of.identity_name.as_str()) {
                    let order = followed.newest.see(&rows, of, self.limits.devices_max, read.min(now));
                    // Where it cannot be told, each row counts as one of the present.
                    let order = order.unwrap_or_else(|_| Order::whole(rows.batch.num_rows()));
                    orders.insert(&of.identity_name, order);
                }
            }
            followed.newest.keep(&orders.keys().copied().collect());
            for rule in rules {
                self.judge_by(stream, rule, (&rows, &orders), episodes, now);
            }
        }
    }

    fn judge_by(
        &mut self,
        stream: &StreamName,
        rule: &Rule,
        (new, orders): (&NewRows, &HashMap<&str, Order>),
        episodes: &mut Episodes,
        now: i64,
    ) {
        let Kind::Rows(rows) = &rule.kind else { return };
        let Some(order) = orders.get(rows.identity_name.as_str()) else { return };
        let mut failed = 0;
        let judged = rows.judge((&rule.policy, &rule.labels), new, order, episodes, (now, &mut failed));
        if failed > 0 || judged.is_err() {
            let mut statuses = self.statuses.lock();
            if let Some(status) = statuses.get_mut(&rule.policy.name) {
                status.failed += failed.max(1);
                let error = judged.as_ref().err().map(|error| error.strip_backtrace());
                status.last_error = error.or(status.last_error.take());
            }
        }
        let key = (rule.policy.name.clone(), rule.policy.hash.clone());
        let since = now.saturating_sub(self.limits.late_max);
        let (late, too_late): (Vec<_>, Vec<_>) =
            judged.unwrap_or_default().into_iter().partition(|row| row.to >= since);
        if !too_late.is_empty() {
            self.counts.late_rows(LateRows::TooLate, too_late.len() as u64);
            let said = format!("{} rows came later than late_max: they are not judged", too_late.len());
            self.not_judged([&key], too_late.len() as u64, &said);
        }
        if let Some(late) = Late::of(key, late) {
            self.is_late(stream.clone(), late);
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
