//! A rule over rows in the order of event time: the same evaluation and the same episodes, with event time as the clock.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::TimestampMicrosecondType;
use arrow_array::{BooleanArray, RecordBatch};
use arrow_select::concat::concat_batches;
use arrow_select::filter::filter_record_batch;
use wire::schema::{DEVICE, TS};

use super::episode::{CLOUD, Episode, Phase, Policy, Raised, Watch};
use super::episodes::{Episodes, Subject, Transition};
use super::order::{NewRows, Newest};
use super::rows::RowRule;
use super::template::Places;

/// Rows that are judged together, and of one moment that are.
const ROWS_TOGETHER: usize = 8_192;
const ROWS_HELD: usize = 131_072;
/// Label sets whose newest row is remembered: rows come in order, so what is forgotten is not missed.
const SETS_MAX: usize = 262_144;

/// An alert of the past, as it was when it fired; with its end, unless it fires at the last row.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) alert: Episode,
    /// Event time, µs.
    pub(crate) fired: i64,
}

/// What a rule finds of one label set: its alerts in order, and what is open, pending or firing, at the last row.
#[derive(Debug, Default)]
pub(crate) struct Ordered {
    pub(crate) found: Vec<Found>,
    pub(crate) open: Option<Episode>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct History {
    episodes: Episodes,
    newest: Newest,
    found: BTreeMap<String, Vec<Found>>,
    /// Rows of the newest time: others of it may follow.
    held: Option<RecordBatch>,
    pub(crate) rows: u64,
    /// Rows on which the condition failed.
    pub(crate) failed: u64,
}

impl History {
    pub(crate) fn of(policy: &Arc<Policy>) -> Self {
        let mut episodes = Episodes::new(i64::MAX, 0, i64::MIN / 2);
        episodes.govern(BTreeMap::from([(policy.name.clone(), Arc::clone(policy))]), 0);
        Self { episodes, newest: Newest::default(), found: BTreeMap::new(), held: None, rows: 0, failed: 0 }
    }

    /// From a time on, at which this alert was open.
    pub(crate) fn begin(&mut self, known: &Episode, start: i64) {
        let Some(raised) = known.raised.get(CLOUD) else { return };
        let firing = raised.fired < start;
        let watch = Watch { from: raised.from, last: i64::MIN, firing, clear: None, revision: i64::MIN };
        let raised = Raised { to: None, ..raised.clone() };
        let alert = Episode {
            phase: if firing { Phase::Firing } else { Phase::Pending },
            from: raised.from,
            to: None,
            // That nobody was told would fire again with the next row.
            quiet: None,
            raised: if firing { BTreeMap::from([(CLOUD.to_owned(), raised.clone())]) } else { BTreeMap::new() },
            watch: Some(watch),
            unsettled_at: None,
            lingers: None,
            ended_by_hand: None,
            ..known.clone()
        };
        if firing {
            let found = Found { alert: Episode { watch: None, ..alert.clone() }, fired: raised.fired };
            self.found.entry(alert.labels.clone()).or_default().push(found);
        }
        self.episodes.restore(alert);
    }

    /// The next rows, in order of `ts`, their columns those of the stream.
    ///
    /// # Errors
    /// When labels cannot be computed.
    pub(crate) fn judge(
        &mut self,
        rule: &RowRule,
        of: (&Policy, &[(String, Places)]),
        rows: &RecordBatch,
    ) -> datafusion::common::Result<()> {
        let rows = RecordBatch::try_new(Arc::clone(&rule.input), rows.columns().to_vec())?;
        let rows = match self.held.take() {
            Some(held) => concat_batches(&rule.input, [&held, &rows])?,
            None => rows,
        };
        let ts = rows.column_by_name(TS).and_then(|ts| ts.as_primitive_opt::<TimestampMicrosecondType>());
        let begun = ts.and_then(|ts| ts.values().last().map(|last| ts.values().partition_point(|ts| ts < last)));
        let done = begun.filter(|begun| rows.num_rows() - begun <= ROWS_HELD).unwrap_or(rows.num_rows());
        self.held = (done < rows.num_rows()).then(|| rows.slice(done, rows.num_rows() - done));
        self.judge_all(rule, of, &rows.slice(0, done))
    }

    /// No row of a time that it has seen follows.
    ///
    /// # Errors
    /// When labels cannot be computed.
    pub(crate) fn judge_rest(
        &mut self,
        rule: &RowRule,
        of: (&Policy, &[(String, Places)]),
    ) -> datafusion::common::Result<()> {
        self.held.take().map_or(Ok(()), |held| self.judge_all(rule, of, &held))
    }

    /// Rows as they came, those of some devices alone: what is not in order is left out.
    ///
    /// # Errors
    /// When labels cannot be computed.
    pub(crate) fn judge_new(
        &mut self,
        rule: &RowRule,
        of: (&Policy, &[(String, Places)]),
        rows: &RecordBatch,
        devices: Option<&BTreeSet<String>>,
    ) -> datafusion::common::Result<()> {
        let named = rows.column_by_name(DEVICE).and_then(|column| column.as_string_opt::<i32>());
        let rows = match (devices, named) {
            (Some(devices), Some(named)) => {
                let chosen = named.iter().map(|device| Some(device.is_some_and(|device| devices.contains(device))));
                filter_record_batch(rows, &chosen.collect::<BooleanArray>())?
            }
            _ => rows.clone(),
        };
        self.judge_all(rule, of, &rows)
    }

    fn judge_all(
        &mut self,
        rule: &RowRule,
        (policy, labels): (&Policy, &[(String, Places)]),
        rows: &RecordBatch,
    ) -> datafusion::common::Result<()> {
        let mut start = 0;
        while start < rows.num_rows() {
            let length = ROWS_TOGETHER.min(rows.num_rows() - start);
            let part = NewRows::new(rows.slice(start, length));
            self.rows += length as u64;
            let order = self.newest.see(&part, rule, SETS_MAX, i64::MIN)?;
            rule.judge((policy, labels), &part, &order, &mut self.episodes, (part.last(), &mut self.failed))?;
            self.take();
            start += length;
        }
        Ok(())
    }

    /// A row in order.
    #[cfg(test)]
    pub(crate) fn see(&mut self, policy: &Policy, seen: &super::episode::Seen<'_>) {
        self.episodes.see(policy, seen, seen.to());
        self.take();
    }

    fn take(&mut self) {
        for change in self.episodes.take() {
            let Subject::Alert(alert) = change.subject else { continue };
            let of_set = self.found.entry(alert.labels.clone());
            match (change.transition, alert.phase) {
                (Transition::Firing, Phase::Firing) => {
                    let alert = Episode { watch: None, ..*alert };
                    of_set.or_default().push(Found { alert, fired: change.ts });
                }
                (Transition::Resolved, _) => {
                    let last = of_set.or_default().last_mut();
                    if let Some(last) = last.filter(|found| found.alert.id == alert.id) {
                        last.alert.to = alert.to;
                    }
                }
                _ => {}
            }
        }
    }

    /// How many it has in memory.
    pub(crate) fn alerts(&self) -> usize {
        self.found.values().map(Vec::len).sum::<usize>() + self.episodes.open().count()
    }

    /// What is open, by label set.
    pub(crate) fn open(&self) -> impl Iterator<Item = &Episode> {
        self.episodes.open()
    }

    /// By label set; of all that were read and of which something was found.
    pub(crate) fn finish(self) -> BTreeMap<String, Ordered> {
        let mut sets: BTreeMap<String, Ordered> = BTreeMap::new();
        for episode in self.episodes.open() {
            sets.entry(episode.labels.clone()).or_default().open = Some(episode.clone());
        }
        for (labels, found) in self.found {
            sets.entry(labels).or_default().found = found;
        }
        sets
    }
}
