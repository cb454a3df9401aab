//! Rows that come behind newer ones of their label set: what they mean is found in the order of event time, in the table.
//!
//! Late rows make a stretch of their stream that is to be judged again ([`Late`]), when no more have come for some seconds. All
//! rows of it that were read until then are read in the order of event time, from long enough before, until the ordered run
//! (`history`) stands where the alerts that are known stand, or to the newest. What was open at the beginning of the stretch is
//! known from the record. What comes out of it takes the place of what was found as rows came (`episodes/late`). One stretch
//! is read at a time, in parts, in the lane of the rules; new rows do not wait for it. What is to be judged again is
//! written with the positions, so that a restart goes on with it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::RecordBatch;
use arrow_select::filter::filter_record_batch;
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use wire::StreamName;

use super::episode::{Episode, Policy};
use super::episodes::{RuleKey, Stretch};
use super::history::History;
use super::log;
use super::rule::{Kind, Rule, caller};
use super::topic::label;
use crate::engine::{Engine, QueryError};
use crate::follow::{Position, read_by};

/// Devices of a stretch that are named; of more all rows are read.
const DEVICES_MAX: usize = 32;
/// What a stretch may have of alerts, and how long it may take; what has more is given up.
const ALERTS_MAX: usize = 100_000;
const TIME_MAX: Duration = Duration::from_secs(300);
/// What was pending so long before a late row, without a row since, is not found: of devices that are named, and of all, µs.
const BEFORE_US: i64 = 24 * 3_600_000_000;
const BEFORE_OF_ALL_US: i64 = 3_600_000_000;
/// A stretch is read in parts: the first so long, µs, and so many rows in each, about.
const PART_US: i64 = 3_600_000_000;
const PART_ROWS: u64 = 500_000;

/// What is to be judged again of one stream: its late rows lie between these event times, the last included.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Late {
    pub(crate) from: i64,
    pub(crate) to: i64,
    pub(crate) rules: BTreeSet<RuleKey>,
    /// None when there are too many.
    pub(crate) devices: Option<BTreeSet<String>>,
    /// Late rows of which it was made, each as often as there are rules.
    #[serde(default)]
    pub(crate) rows: u64,
}

/// By stream.
pub(crate) type Lates = BTreeMap<StreamName, Late>;

/// A late row.
#[derive(Debug)]
pub(crate) struct LateRow {
    pub(crate) from: i64,
    pub(crate) to: i64,
    /// The stream's own device, when that is one of its labels.
    pub(crate) device: Option<String>,
}

impl Late {
    /// Late rows of one rule.
    pub(crate) fn of(rule: RuleKey, rows: Vec<LateRow>) -> Option<Self> {
        let (from, to) = (rows.iter().map(|row| row.from).min()?, rows.iter().map(|row| row.to).max()?);
        let count = rows.len() as u64;
        let devices: Option<BTreeSet<String>> = rows.into_iter().map(|row| row.device).collect();
        let mut late = Self { from, to, rules: BTreeSet::from([rule]), devices, rows: count };
        late.bound();
        Some(late)
    }

    /// Both together.
    pub(crate) fn add(&mut self, other: Self) {
        (self.from, self.to) = (self.from.min(other.from), self.to.max(other.to));
        self.rules.extend(other.rules);
        self.rows = self.rows.saturating_add(other.rows);
        self.devices = self.devices.take().zip(other.devices).map(|(mut one, other)| {
            one.extend(other);
            one
        });
        self.bound();
    }

    fn bound(&mut self) {
        self.devices = self.devices.take().filter(|devices| devices.len() <= DEVICES_MAX);
    }

    /// Whether rows of this alert are among those that are read.
    pub(crate) fn is_about(&self, episode: &Episode) -> bool {
        let Some(devices) = &self.devices else { return true };
        episode.device.as_ref().is_some_and(|device| devices.iter().any(|known| *label(known) == **device))
    }

    /// From when on rows are read: what fires then is in the record, and what is pending was longer than this.
    pub(crate) fn begins<'p>(&self, policies: impl Iterator<Item = &'p Policy>) -> i64 {
        let (hold, keep) = policies.fold((0, 0), |(hold, keep), policy| (policy.hold.max(hold), policy.keep.max(keep)));
        let before = match (hold, &self.devices) {
            (0, _) => 0,
            (_, Some(_)) => BEFORE_US,
            (_, None) => BEFORE_OF_ALL_US,
        };
        self.from.saturating_sub(1).saturating_sub(hold).saturating_sub(keep).saturating_sub(before)
    }
}

/// A stretch that is judged, by rules that run. The stream was read to `position`, where its newest event time was `newest`,
/// and these alerts fired by rows, or were pending.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) stream: StreamName,
    pub(crate) late: Late,
    pub(crate) rules: Vec<Arc<Rule>>,
    /// Rows that it may read.
    pub(crate) rows_max: u64,
    pub(crate) position: Position,
    pub(crate) newest: i64,
    pub(crate) open: Vec<Episode>,
}

/// What came out of it.
#[derive(Debug)]
pub(crate) struct Judged {
    pub(crate) stretch: Stretch,
    pub(crate) histories: Vec<(Arc<Rule>, History)>,
    /// Alerts of the record that had ended.
    pub(crate) known: HashMap<String, Episode>,
}

/// Why a stretch was not judged.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LateError {
    #[error(transparent)]
    Asked(#[from] QueryError),
    /// It would be so again.
    #[error("what is to be read for rows from {from} to {to} (µs) is {what}: they are not judged")]
    TooMuch { from: i64, to: i64, what: String },
}

/// How a task ended, and how long it took.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) result: Result<Judged, LateError>,
    pub(crate) position: Position,
    pub(crate) took: Duration,
}

impl Task {
    /// Reads and judges.
    pub(crate) async fn run(self, engine: &Engine) -> Done {
        let begun = Instant::now();
        let result = self.judge(engine, begun).await;
        Done { result, position: self.position, took: begun.elapsed() }
    }

    async fn judge(&self, engine: &Engine, begun: Instant) -> Result<Judged, LateError> {
        let hashes: BTreeSet<String> = self.rules.iter().map(|rule| rule.policy.hash.clone()).collect();
        let start = self.late.begins(self.rules.iter().map(|rule| &*rule.policy));
        let mut known: HashMap<String, Episode> = HashMap::new();
        let mut histories: Vec<(Arc<Rule>, History)> = Vec::new();
        let (mut from, mut length, mut all_rows) = (start, PART_US, 0);
        loop {
            let to = from.saturating_add(length);
            let ended = log::ended_between(engine, &hashes, (from, to)).await?;
            known.extend(ended.into_iter().map(|episode| (episode.id.clone(), episode)));
            if from == start {
                histories = self
                    .rules
                    .iter()
                    .map(|rule| (Arc::clone(rule), self.history(&rule.policy, start, &known)))
                    .collect();
            }
            let rows = self.part(engine, (from, to), &mut histories, (all_rows, begun)).await?;
            all_rows += rows;
            let alerts = known.len() + histories.iter().map(|(_, history)| history.alerts()).sum::<usize>();
            self.is_bounded(all_rows, alerts, begun)?;
            let whole = to > self.newest;
            let stands = to > self.late.to
                && histories.iter().all(|(rule, history)| self.agrees(&rule.policy, history, to, &known));
            if whole || stands {
                return Ok(Judged {
                    stretch: Stretch { from: start, to: if whole { i64::MAX } else { to }, whole },
                    histories,
                    known,
                });
            }
            from = to;
            length = match rows {
                ..PART_ROWS => length.saturating_mul(2),
                _ if rows > 4 * PART_ROWS => (length / 4).max(1_000_000),
                _ => length,
            };
        }
    }

    fn is_bounded(&self, rows: u64, alerts: usize, begun: Instant) -> Result<(), LateError> {
        let what = match () {
            () if rows > self.rows_max => format!("more than {} rows", self.rows_max),
            () if alerts > ALERTS_MAX => format!("more than {ALERTS_MAX} alerts"),
            () if begun.elapsed() > TIME_MAX => format!("more than is read in {} s", TIME_MAX.as_secs()),
            () => return Ok(()),
        };
        Err(LateError::TooMuch { from: self.late.from, to: self.late.to, what })
    }

    /// The alerts of a rule that may have been open at some time, those of the past and those that are.
    fn of_rule<'t>(
        &'t self,
        policy: &'t Policy,
        known: &'t HashMap<String, Episode>,
    ) -> impl Iterator<Item = &'t Episode> {
        let of_rule = |episode: &&Episode| episode.rule == policy.name && episode.hash == policy.hash;
        let is_open = |id: &str| self.open.iter().any(|open| open.id == id);
        let ended = known.values().filter(move |known| !is_open(&known.id));
        self.open.iter().chain(ended).filter(of_rule).filter(|episode| self.late.is_about(episode))
    }

    /// A run of the rule from a time on, with what was open then.
    pub(crate) fn history(&self, policy: &Policy, start: i64, known: &HashMap<String, Episode>) -> History {
        // How many there may be is decided where they become alerts.
        let mut history = History::of(&Arc::new(Policy { instances_max: usize::MAX, ..policy.clone() }));
        for episode in self.of_rule(policy, known) {
            if episode.own().is_some_and(|own| is_open_at(own, start)) {
                history.begin(episode, start);
            }
        }
        history
    }

    /// Whether what follows would be judged as it was before: the same alerts are open, and none is pending.
    pub(crate) fn agrees(&self, policy: &Policy, history: &History, at: i64, known: &HashMap<String, Episode>) -> bool {
        let found: HashMap<&str, &Episode> = history.open().map(|open| (&*open.labels, open)).collect();
        let mut open: HashMap<&str, &Episode> = HashMap::new();
        for episode in self.of_rule(policy, known) {
            if episode.watch.as_ref().is_some_and(|watch| !watch.firing && watch.from < at) {
                return false;
            }
            let Some(own) = episode.own() else { continue };
            let is_found = found.get(&*episode.labels).is_some_and(|found| found.from == own.0);
            if is_open_at(own, at) && !is_found {
                return false;
            }
            if is_found {
                open.insert(&episode.labels, episode);
            }
        }
        found.values().all(|found| {
            let Some(watch) = found.watch.as_ref().filter(|watch| watch.firing) else { return false };
            let Some(known) = open.get(&*found.labels) else { return false };
            let end = known.own().and_then(|(_, to)| to);
            match (watch.clear, end) {
                (None, Some(end)) => end >= at,
                // It ends there in the record, too.
                (Some(clear), Some(end)) => clear == end,
                // It is kept firing since the same row.
                (clear, None) => {
                    clear == known.watch.as_ref().and_then(|watch| watch.clear).filter(|clear| *clear < at)
                }
            }
        })
    }

    /// Judges the rows between two event times that were read; how many there are.
    async fn part(
        &self,
        engine: &Engine,
        (from, to): (i64, i64),
        histories: &mut [(Arc<Rule>, History)],
        (before, begun): (u64, Instant),
    ) -> Result<u64, LateError> {
        let Some(Kind::Rows(first)) = self.rules.first().map(|rule| &rule.kind) else { return Ok(0) };
        let columns: Vec<String> = first.input.fields().iter().map(|field| format!("\"{}\"", field.name())).collect();
        let devices = self.late.devices.as_ref().map(|devices| {
            let quoted: Vec<String> =
                devices.iter().map(|device| format!("'{}'", device.replace('\'', "''"))).collect();
            format!(" AND device IN ({})", quoted.join(", "))
        });
        let sql = format!(
            "SELECT {} FROM {} WHERE ts >= to_timestamp_micros({from}) AND ts < to_timestamp_micros({to}){} ORDER BY ts",
            columns.join(", "),
            self.stream,
            devices.as_deref().unwrap_or_default(),
        );
        let caller = caller();
        let running = engine.begin(&caller, &engine.enter(&caller).await?, &sql);
        let prepared = engine.prepare(&running, &sql, None).await?;
        let mut stream = engine.execute(&running, &prepared, None).await?;
        let mut count = 0;
        while let Some(batch) = stream.next().await {
            let read = |batch: RecordBatch| Ok(filter_record_batch(&batch, &read_by(&batch, &self.position)?)?);
            let batch = batch.and_then(read).map_err(|error| engine.explain(error))?;
            count += batch.num_rows() as u64;
            self.is_bounded(before + count, 0, begun)?;
            for (rule, history) in histories.iter_mut() {
                let Kind::Rows(rows) = &rule.kind else { continue };
                let judged = history.judge(rows, (&rule.policy, &rule.labels), &batch);
                judged.map_err(|error| engine.explain(error))?;
            }
        }
        for (rule, history) in histories.iter_mut() {
            let Kind::Rows(rows) = &rule.kind else { continue };
            let judged = history.judge_rest(rows, (&rule.policy, &rule.labels));
            judged.map_err(|error| engine.explain(error))?;
        }
        Ok(count)
    }
}

fn is_open_at((from, to): (i64, Option<i64>), at: i64) -> bool {
    from < at && to.is_none_or(|to| to >= at)
}
