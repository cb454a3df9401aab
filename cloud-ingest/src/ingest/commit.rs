//! Commits: when a stream's hot rows go to its table, and what follows. At most one per stream is under way.

use std::time::Instant;

use segment_log::FileLayer;
use wire::StreamName;
use wire::schema::is_cloud_stream;

use super::Ingest;
use super::errand::{self, CommitEnd, Done};
use crate::class::Class;
use crate::config::Settings;
use crate::delta::{DeltaTable, TableError};

/// A commit takes at most so many times the bytes that make one due: it sorts a copy of them.
const COMMIT_TIMES: usize = 4;

impl<L: FileLayer> Ingest<L> {
    /// Starts those that are due by age, size or memory pressure, and that of the stream that pins the WAL.
    pub(super) fn start_commits(&mut self, now: Instant, pins: Option<&StreamName>) {
        // Under memory pressure the largest goes first, and the others after it while the pressure lasts.
        let mut largest: Vec<(usize, StreamName)> =
            self.streams.iter().map(|(name, stream)| (stream.hot.bytes(), name.clone())).collect();
        largest.sort_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
        let mut pressure = self.hot_bytes() > self.settings.hot.max_bytes.bytes() / 2;
        for (bytes, name) in largest {
            let Some(stream) = self.streams.get(&name) else { continue };
            let old = stream.hot.since().is_some_and(|since| since + self.settings.commit.max_age.0 <= now);
            let large = bytes >= self.settings.commit.max_bytes.bytes();
            let pinning = pins == Some(&name);
            let waits = stream.commits.wait(now) && self.stopping.is_none();
            if stream.commits.running.is_some() || stream.hot.is_empty() || waits {
                continue;
            }
            if old || large || pressure || pinning || self.stopping.is_some() {
                pressure = false;
                self.start_commit(&name);
            }
        }
    }

    fn start_commit(&mut self, name: &StreamName) {
        let bytes_max = commit_bytes_max(&self.settings);
        let Some(stream) = self.streams.get_mut(name) else { return };
        let taking = stream.hot.take(self.settings.commit.max_partitions, bytes_max);
        stream.commits.running = Some(Instant::now());
        let at_once = &self.commits_at_once[stream.class];
        let (stream, mut table) = (name.clone(), stream.table.clone());
        let end = CommitEnd::Failed { reason: TableError::Unanswered.to_string() };
        let died = Done::Committed { stream: stream.clone(), table: table.clone(), end };
        self.send(at_once, errand::COMMIT_MAX, died, async move {
            let end = errand::commit(&mut table, taking).await;
            Done::Committed { stream, table, end }
        });
    }

    pub(super) fn committed(&mut self, name: &StreamName, table: DeltaTable, end: CommitEnd) {
        let Some(stream) = self.streams.get_mut(name) else { return };
        let took_ms = stream.commits.running.map_or(0, |since| since.elapsed().as_millis() as u64);
        stream.commits.ended(&end);
        stream.apply(table, self.settings.hot.grace.0);
        match end {
            CommitEnd::Made { rows } => {
                self.metrics.commits.add(1);
                self.metrics.commit_ms.set(took_ms);
                self.metrics.commit_ms_total.add(took_ms);
                self.metrics.classes[stream.class].committed.add(rows);
                // What the node writes by itself came through no door.
                if !is_cloud_stream(name) && stream.class != Class::Views {
                    self.metrics.rows_committed.add(rows);
                }
            }
            CommitEnd::Moved => tracing::debug!(stream = %name, "another commit was faster"),
            CommitEnd::Failed { reason } => {
                self.metrics.commits_failed.add(1);
                tracing::warn!(stream = %name, reason, "commit not made; it starts again");
            }
        }
        self.publish(name);
    }
}

pub(super) fn commit_bytes_max(settings: &Settings) -> usize {
    settings.commit.max_bytes.bytes().saturating_mul(COMMIT_TIMES)
}
