//! Sessions: rows of a group of which each came less than `gap` after the one before, by event time.
//!
//! A session is known by its first event time and ends `gap` after its last. A late row may join two sessions, or begin one
//! earlier: then the result that stood under the later beginning is taken back by one of `count` 0 and a higher revision, so
//! that who reads the highest revision of each `window_start` counts no row twice.

use std::collections::{BTreeMap, BTreeSet};

use super::aggregate::Aggregate;
use super::{Held, Late, Window, WindowRow};
use crate::decode::Reading;

/// What finds sessions; the sessions themselves are the window's results. End, start and group of each.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    starts: BTreeMap<String, BTreeSet<i64>>,
    ends: BTreeSet<(i64, i64, String)>,
    /// Those with rows that no result has told.
    pending: BTreeSet<(i64, i64, String)>,
    /// Results to take back: start, group and revision.
    gone: Vec<(i64, String, i64)>,
}

impl Sessions {
    fn insert(&mut self, end: i64, start: i64, group: &str, pending: bool) {
        self.starts.entry(group.to_owned()).or_default().insert(start);
        self.ends.insert((end, start, group.to_owned()));
        if pending {
            self.pending.insert((end, start, group.to_owned()));
        }
    }

    /// Whether it was pending.
    fn remove(&mut self, end: i64, start: i64, group: &str) -> bool {
        if let Some(starts) = self.starts.get_mut(group) {
            starts.remove(&start);
            if starts.is_empty() {
                self.starts.remove(group);
            }
        }
        let key = (end, start, group.to_owned());
        self.ends.remove(&key);
        self.pending.remove(&key)
    }

    /// The earliest beginning of those that are open or have changed.
    pub(super) fn first_open(&self) -> Option<i64> {
        self.pending.iter().map(|(_, start, _)| *start).min()
    }

    pub(super) fn first_end(&self) -> Option<i64> {
        self.ends.first().map(|(end, ..)| *end)
    }
}

impl Window {
    /// After a restart: what finds the sessions.
    pub(super) fn index_sessions(&mut self, gap: i64) {
        let watermark = self.closed_before;
        for (start, groups) in &self.results {
            for (group, aggregate) in groups {
                let end = aggregate.newest.saturating_add(gap);
                self.sessions.insert(end, *start, group, end > watermark);
            }
        }
    }

    pub(super) fn add_to_session(&mut self, gap: i64, key: &str, reading: &Reading, held: &mut Held) -> Late {
        let ts = reading.ts;
        if ts < self.given_up_before {
            return Late::Late;
        }
        let starts = self.sessions.starts.get(key);
        let before = starts.and_then(|starts| starts.range(..=ts).next_back().copied());
        let before = before.filter(|start| ts < self.newest(*start, key).saturating_add(gap));
        let after = starts.and_then(|starts| starts.range(ts + 1..).next().copied());
        let after = after.filter(|start| *start < ts.saturating_add(gap));
        let mut aggregate = match before {
            Some(start) => self.take_session(gap, start, key, held),
            None => Aggregate::new(&self.kinds, self.wants),
        };
        aggregate.add(reading, self.wants);
        if let Some(start) = after {
            let other = self.take_session(gap, start, key, held);
            if other.revision > 0 {
                self.sessions.gone.push((start, key.to_owned(), other.revision + 1));
            }
            aggregate.merge(other);
        }
        held.results += 1;
        held.bytes += aggregate.bytes(key);
        let start = before.unwrap_or(ts);
        self.sessions.insert(aggregate.newest.saturating_add(gap), start, key, true);
        self.results.entry(start).or_default().insert(key.to_owned(), aggregate);
        Late::Good
    }

    fn newest(&self, start: i64, key: &str) -> i64 {
        self.results.get(&start).and_then(|groups| groups.get(key)).map_or(i64::MIN, |aggregate| aggregate.newest)
    }

    fn take_session(&mut self, gap: i64, start: i64, key: &str, held: &mut Held) -> Aggregate {
        let end = self.newest(start, key).saturating_add(gap);
        self.sessions.remove(end, start, key);
        let groups = self.results.get_mut(&start).expect("what finds sessions finds these");
        let aggregate = groups.remove(key).expect("what finds sessions finds these");
        if groups.is_empty() {
            self.results.remove(&start);
        }
        held.results -= 1;
        held.bytes -= aggregate.bytes(key);
        aggregate
    }

    /// Emits what has ended, and forgets what can no longer change.
    pub(super) fn close_sessions(
        &mut self,
        index: usize,
        watermark: i64,
        keep_from: i64,
        held: &mut Held,
    ) -> Vec<WindowRow> {
        let mut rows = Vec::new();
        self.closed_before = self.closed_before.max(watermark);
        for (start, group, revision) in std::mem::take(&mut self.sessions.gone) {
            let nothing = Aggregate { revision, newest: start, ..Aggregate::new(&self.kinds, self.wants) };
            rows.push(self.row(index, start, start, &group, &nothing));
        }
        while let Some((end, start, group)) = self.sessions.pending.first().cloned() {
            if end > watermark {
                break;
            }
            self.sessions.pending.pop_first();
            rows.extend(self.emit_session(index, end, start, &group));
        }
        while let Some((end, start, group)) = self.sessions.ends.first().cloned() {
            if end > keep_from {
                break;
            }
            self.forget_session(end, start, &group, held);
        }
        rows
    }

    /// Emits and forgets the session that ended first.
    pub(super) fn give_up_session(&mut self, index: usize, held: &mut Held, rows: &mut Vec<WindowRow>) {
        let Some((end, start, group)) = self.sessions.ends.first().cloned() else { return };
        if self.sessions.pending.remove(&(end, start, group.clone())) {
            rows.extend(self.emit_session(index, end, start, &group));
        }
        self.forget_session(end, start, &group, held);
        self.given_up_before = self.given_up_before.max(end);
    }

    fn emit_session(&mut self, index: usize, end: i64, start: i64, group: &str) -> Option<WindowRow> {
        let aggregate = self.results.get_mut(&start)?.get_mut(group)?;
        aggregate.revision += 1;
        let aggregate = &self.results[&start][group];
        Some(self.row(index, start, end, group, aggregate))
    }

    fn forget_session(&mut self, end: i64, start: i64, group: &str, held: &mut Held) {
        self.sessions.remove(end, start, group);
        let Some(groups) = self.results.get_mut(&start) else { return };
        if let Some(aggregate) = groups.remove(group) {
            held.results -= 1;
            held.bytes -= aggregate.bytes(group);
        }
        if groups.is_empty() {
            self.results.remove(&start);
        }
    }
}
