//! What alerts count since the node started, as Prometheus reads it. Every name stands here, once.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Alerts;
use super::episode::{Phase, Quiet};
use super::episodes::{Change, Episodes, Subject, Transition};

/// Numbers of the task that decides.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pending: AtomicU64,
    firing: AtomicU64,
    recorded: AtomicU64,
    told: AtomicU64,
    late: AtomicU64,
    late_rows: [AtomicU64; 3],
}

/// What became of rows that came late, counted for each rule that they say something to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LateRows {
    Judged,
    /// Later than `late_max`.
    TooLate,
    /// They were too much, or could not be read.
    GivenUp,
}

impl Counts {
    /// Changes that are in the record now.
    pub(crate) fn add(&self, changes: &[Change]) {
        let is_late = |change: &&Change| match &change.subject {
            Subject::Alert(alert) => change.transition == Transition::Firing && alert.quiet == Some(Quiet::Backfill),
            _ => false,
        };
        let count = |count: usize| count as u64;
        self.recorded.fetch_add(count(changes.len()), Ordering::Relaxed);
        self.told.fetch_add(count(changes.iter().filter(|change| change.told).count()), Ordering::Relaxed);
        self.late.fetch_add(count(changes.iter().filter(is_late).count()), Ordering::Relaxed);
    }

    pub(crate) fn late_rows(&self, end: LateRows, rows: u64) {
        self.late_rows[end as usize].fetch_add(rows, Ordering::Relaxed);
    }

    /// What is open now.
    pub(crate) fn set(&self, episodes: &Episodes) {
        let count = |phase: Phase| episodes.open().filter(|episode| episode.phase == phase).count() as u64;
        self.pending.store(count(Phase::Pending), Ordering::Relaxed);
        self.firing.store(count(Phase::Firing), Ordering::Relaxed);
    }
}

/// A family of numbers: its name, its kind, and each with its labels.
fn family(text: &mut String, name: &str, kind: &str, values: impl IntoIterator<Item = (String, u64)>) {
    // Writing to a String cannot fail.
    writeln!(text, "# TYPE {name} {kind}").ok();
    for (labels, value) in values {
        writeln!(text, "{name}{labels} {value}").ok();
    }
}

fn label(name: &str, value: &str) -> String {
    let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!("{{{name}=\"{value}\"}}")
}

impl Alerts {
    /// All of it.
    pub fn metrics(&self) -> String {
        let mut text = String::new();
        let plain = |count: &AtomicU64| [(String::new(), count.load(Ordering::Relaxed))];
        let counts = &self.counts;
        let open = [("pending", &counts.pending), ("firing", &counts.firing)];
        let open = open.map(|(state, count)| (label("state", state), count.load(Ordering::Relaxed)));
        family(&mut text, "weir_alerts_open", "gauge", open);
        family(&mut text, "weir_alert_changes_total", "counter", plain(&counts.recorded));
        family(&mut text, "weir_alert_changes_told_total", "counter", plain(&counts.told));
        family(&mut text, "weir_alert_late_total", "counter", plain(&counts.late));
        let ends = [("judged", LateRows::Judged), ("too_late", LateRows::TooLate), ("given_up", LateRows::GivenUp)];
        let ends = ends.map(|(end, rows)| (label("end", end), counts.late_rows[rows as usize].load(Ordering::Relaxed)));
        family(&mut text, "weir_alert_late_rows_total", "counter", ends);
        let rules = self.rules();
        let in_state = |state: &str| rules.iter().filter(|rule| rule.state == state).count() as u64;
        let states = ["runs", "waits", "refused"].map(|state| (label("state", state), in_state(state)));
        family(&mut text, "weir_alert_rules", "gauge", states);
        let failed = rules.iter().map(|rule| rule.failed).sum();
        family(&mut text, "weir_alert_rule_failures_total", "counter", [(String::new(), failed)]);
        let refused = rules.iter().map(|rule| rule.refused).sum();
        family(&mut text, "weir_alert_refused_total", "counter", [(String::new(), refused)]);
        let listening = self.hub.subscribers() as u64;
        family(&mut text, "weir_alert_subscribers", "gauge", [(String::new(), listening)]);
        let targets = self.targets();
        let behind = |target: &crate::publish::target::TargetStatus| u64::try_from(target.behind).unwrap_or_default();
        let of = |value: &dyn Fn(&crate::publish::target::TargetStatus) -> u64| {
            targets.iter().map(|target| (label("target", &target.name), value(target))).collect::<Vec<_>>()
        };
        family(&mut text, "weir_alert_delivered_total", "counter", of(&|target| target.delivered));
        family(&mut text, "weir_alert_retried_total", "counter", of(&|target| target.retried));
        family(&mut text, "weir_alert_dead_total", "counter", of(&|target| target.dead));
        family(&mut text, "weir_alert_missed_total", "counter", of(&|target| target.missed));
        family(&mut text, "weir_alert_behind", "gauge", of(&behind));
        text
    }
}
