//! Late rows: what is to be judged again, one stretch after the other, beside the rows that come.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use tokio::sync::mpsc;
use wire::{DAY_US, StreamName};

use super::super::episode::Episode;
use super::super::episodes::{Change, Episodes, RuleKey, Subject};
use super::super::late::{Done, Judged, Late, LateError, Task};
use super::super::log::Read;
use super::super::metrics::LateRows;
use super::super::rule::{Kind, Rule};
use super::{Runner, WAIT_MAX};
use crate::follow::{Position, behind, read_by};
use crate::fused_table::Frozen;

/// Late rows that cannot be judged so often are given up.
const FAILED_MAX: u32 = 10;
/// A stretch is judged when no more late rows have come for so long, or for so long at most.
const QUIET: Duration = Duration::from_secs(1);
const QUIET_MAX: Duration = Duration::from_secs(10);
/// Of the time at most one part in so many is spent on it.
const PAUSE: u32 = 10;
/// Alerts that may end while a stretch is judged.
const CHANGED_MAX: usize = 100_000;

/// What is judged again, and what waits.
#[derive(Debug)]
pub(super) struct Again {
    judging: Option<Judging>,
    /// When the first and the last late row came of what waits, by stream.
    came: BTreeMap<StreamName, (Instant, Instant)>,
    due: Instant,
    failed: u32,
}

#[derive(Debug)]
struct Judging {
    stream: StreamName,
    late: Late,
    /// Alerts that were changed since, as they are now.
    changed: HashMap<String, Episode>,
}

impl Default for Again {
    fn default() -> Self {
        Self { judging: None, came: BTreeMap::new(), due: Instant::now(), failed: 0 }
    }
}

impl Again {
    /// Keeps what was decided about rules whose late rows are judged at the moment.
    pub(super) fn note(&mut self, changes: &[Change]) {
        let Some(judging) = &mut self.judging else { return };
        for change in changes {
            let Subject::Alert(alert) = &change.subject else { continue };
            if judging.late.rules.contains(&(alert.rule.clone(), alert.hash.clone()))
                && judging.changed.len() <= CHANGED_MAX
            {
                judging.changed.insert(alert.id.clone(), Episode::clone(alert));
            }
        }
    }
}

impl Runner {
    /// Begins to judge what came late, one stream after the other.
    pub(super) fn judge_again(&mut self, episodes: &Episodes, done: &mpsc::Sender<Done>) {
        if self.again.judging.is_some() || self.again.due > Instant::now() {
            return;
        }
        let is_due = |stream: &&StreamName| {
            let came = self.again.came.get(*stream);
            came.is_none_or(|(first, last)| last.elapsed() >= QUIET || first.elapsed() >= QUIET_MAX)
        };
        let Some(stream) = self.read.late.keys().find(is_due).cloned() else { return };
        let Some(late) = self.read.late.remove(&stream) else { return };
        self.again.came.remove(&stream);
        let runs = |key: &RuleKey| {
            let rule = self.rules.get(&key.0)?.rule.as_ref().ok()?;
            let is_on = matches!(&rule.kind, Kind::Rows(rows) if rows.stream == stream);
            (rule.policy.hash == key.1 && is_on).then(|| Arc::clone(rule))
        };
        let rules: Vec<Arc<Rule>> = late.rules.iter().filter_map(runs).collect();
        if rules.is_empty() {
            return;
        }
        let open = rules.iter().filter_map(|rule| episodes.open_of(&rule.policy)).flat_map(HashMap::values);
        let open = open
            .filter(|open| (open.own().is_some() || open.watch.is_some()) && late.is_about(open))
            .cloned()
            .collect();
        let task = Task {
            stream: stream.clone(),
            late: late.clone(),
            rules,
            rows_max: self.limits.late_rows_max,
            position: self.read.positions.get(&stream).cloned().unwrap_or_default(),
            // No reading is of a later time than that.
            newest: self.read.newest.get(&stream).copied().unwrap_or(self.now.saturating_add(2 * DAY_US)),
            open,
        };
        self.again.judging = Some(Judging { stream, late, changed: HashMap::new() });
        let (engine, done) = (Arc::clone(&self.engine), done.clone());
        tokio::spawn(async move {
            let outcome = task.run(&engine).await;
            // The task has ended when nobody takes it.
            drop(done.send(outcome).await);
        });
    }

    /// Takes what came out of it.
    pub(super) async fn judged(&mut self, done: Done, episodes: &mut Episodes) {
        let Some(Judging { stream, late, changed }) = self.again.judging.take() else { return };
        self.again.due = Instant::now() + PAUSE * done.took;
        if changed.len() > CHANGED_MAX {
            return self.is_late(stream, late);
        }
        let judged = match done.result {
            Ok(mut judged) => {
                let caught_up = self.catch_up((&stream, &late), &done.position, &mut judged).await;
                caught_up.map(|()| judged).map_err(|error| LateError::from(self.engine.explain(error)))
            }
            Err(error) => Err(error),
        };
        match judged {
            Ok(judged) => {
                self.again.failed = 0;
                self.counts.late_rows(LateRows::Judged, late.rows);
                self.reconcile(&late, judged, changed, episodes);
                self.moved = true;
            }
            Err(error) => {
                self.again.failed += 1;
                self.again.due = Instant::now() + WAIT_MAX;
                let given_up = self.again.failed >= FAILED_MAX || matches!(error, LateError::TooMuch { .. });
                tracing::warn!(%stream, %error, given_up, "late rows cannot be judged now");
                let rows = if given_up { late.rows } else { 0 };
                self.not_judged(&late.rules, rows, &format!("rows that came late: {error}"));
                if given_up {
                    self.again.failed = 0;
                    self.counts.late_rows(LateRows::GivenUp, rows);
                } else {
                    self.is_late(stream, late);
                }
            }
        }
    }

    /// The rows that came since, in a stretch that goes to the newest.
    async fn catch_up(
        &self,
        (stream, late): (&StreamName, &Late),
        position: &Position,
        judged: &mut Judged,
    ) -> datafusion::common::Result<()> {
        let read = self.read.positions.get(stream).cloned().unwrap_or_default();
        if !judged.stretch.whole || read == *position {
            return Ok(());
        }
        let Some(Kind::Rows(first)) = judged.histories.first().map(|(rule, _)| &rule.kind) else { return Ok(()) };
        let wanted = Arc::clone(&first.input);
        let frozen = Frozen::take(self.engine.tables().as_ref(), stream).await?;
        let mut rows = behind(&self.engine, stream, &frozen, position, &wanted).await?;
        while let Some(batch) = rows.try_next().await? {
            let batch = arrow_select::filter::filter_record_batch(&batch, &read_by(&batch, &read)?)?;
            for (rule, history) in &mut judged.histories {
                let Kind::Rows(rows) = &rule.kind else { continue };
                history.judge_new(rows, (&rule.policy, &rule.labels), &batch, late.devices.as_ref())?;
            }
        }
        Ok(())
    }

    fn reconcile(&mut self, late: &Late, judged: Judged, changed: HashMap<String, Episode>, episodes: &mut Episodes) {
        let now = self.clock(episodes);
        let Judged { stretch, histories, known } = judged;
        let mut known = known;
        known.extend(changed);
        let mut by_set: BTreeMap<(RuleKey, String), Vec<Episode>> = BTreeMap::new();
        for episode in known.into_values() {
            let has_ended = episode.to.is_some() && !episode.is_raised() && episode.merged_into.is_none();
            if has_ended && late.is_about(&episode) {
                let key = (episode.rule.clone(), episode.hash.clone());
                by_set.entry((key, episode.labels.clone())).or_default().push(episode);
            }
        }
        for (rule, history) in histories {
            // It may have changed meanwhile.
            let policy = &rule.policy;
            let current = self.rules.get(&policy.name).and_then(|kept| kept.rule.as_ref().ok());
            if current.is_none_or(|current| current.policy.hash != policy.hash) {
                continue;
            }
            let key = (policy.name.clone(), policy.hash.clone());
            let mut sets = history.finish();
            let open = episodes.open_of(policy).into_iter().flatten().filter(|(_, open)| late.is_about(open));
            let known = by_set.range((key.clone(), String::new())..).take_while(|((of, _), _)| *of == key);
            let labels: Vec<String> =
                open.map(|(labels, _)| labels.clone()).chain(known.map(|((_, labels), _)| labels.clone())).collect();
            for labels in labels {
                sets.entry(labels).or_default();
            }
            for (labels, ordered) in sets {
                let known = by_set.remove(&(key.clone(), labels.clone())).unwrap_or_default();
                episodes.reconcile(policy, (&labels, stretch), ordered, known, now);
            }
            self.refusals(&rule, episodes);
        }
    }

    /// What is said of rules whose late rows are not judged.
    pub(super) fn not_judged<'k>(&self, rules: impl IntoIterator<Item = &'k RuleKey>, rows: u64, said: &str) {
        let mut statuses = self.statuses.lock();
        for (name, _) in rules {
            if let Some(status) = statuses.get_mut(name) {
                status.unjudged += rows;
                status.last_error = Some(said.to_owned());
            }
        }
    }

    /// A stretch is to be judged again.
    pub(super) fn is_late(&mut self, stream: StreamName, late: Late) {
        let now = Instant::now();
        self.again.came.entry(stream.clone()).or_insert((now, now)).1 = now;
        match self.read.late.get_mut(&stream) {
            Some(known) => known.add(late),
            None => drop(self.read.late.insert(stream, late)),
        }
    }

    /// What is being judged again is not done.
    pub(super) fn to_write(&self) -> Read {
        let mut read = self.read.clone();
        if let Some(Judging { stream, late, .. }) = &self.again.judging {
            let waits = read.late.entry(stream.clone()).or_insert_with(|| late.clone());
            waits.add(late.clone());
        }
        read
    }
}
