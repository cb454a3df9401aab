//! What this node counts, by name. Rule 6 at the door: rows received = durable + duplicate + refused + pushed back.
//!
//! `weir_cloud_rows_…` count what came through a door; what is durable of that and not committed is hot. Metrics with a `class`
//! count everything that is written, what the node writes by itself too, and balance for each class alike.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::class::{ByClass, Class};

/// A number that only grows, or one that is set.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Rows, by what became of them (rule 6).
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tally {
    pub(crate) durable: u64,
    pub(crate) duplicate: u64,
    pub(crate) refused: u64,
    pub(crate) pushed_back: u64,
}

impl Tally {
    fn received(&self) -> u64 {
        self.durable + self.duplicate + self.refused + self.pushed_back
    }
}

/// Of one class: rows that were written and what became of them, and what is in memory and log.
#[derive(Debug, Default)]
pub struct ClassMetrics {
    pub received: Counter,
    pub durable: Counter,
    pub duplicate: Counter,
    pub refused: Counter,
    pub pushed_back: Counter,
    pub committed: Counter,
    pub hot_rows: Counter,
    pub hot_bytes: Counter,
    /// Kept for it and those before it, and what it could still take.
    pub hot_kept_bytes: Counter,
    pub hot_free_bytes: Counter,
    /// Bytes of the WAL that are not committed, and what it could still take.
    pub wal_bytes: Counter,
    pub wal_free_bytes: Counter,
}

impl ClassMetrics {
    /// In the order in which they are told.
    fn named(&self) -> [(&'static str, &'static str, &Counter); 12] {
        [
            ("weir_cloud_received_total", "counter", &self.received),
            ("weir_cloud_durable_total", "counter", &self.durable),
            ("weir_cloud_duplicate_total", "counter", &self.duplicate),
            ("weir_cloud_refused_total", "counter", &self.refused),
            ("weir_cloud_pushed_back_total", "counter", &self.pushed_back),
            ("weir_cloud_committed_total", "counter", &self.committed),
            ("weir_cloud_class_hot_rows", "gauge", &self.hot_rows),
            ("weir_cloud_class_hot_bytes", "gauge", &self.hot_bytes),
            ("weir_cloud_class_hot_kept_bytes", "gauge", &self.hot_kept_bytes),
            ("weir_cloud_class_hot_free_bytes", "gauge", &self.hot_free_bytes),
            ("weir_cloud_class_wal_bytes", "gauge", &self.wal_bytes),
            ("weir_cloud_class_wal_free_bytes", "gauge", &self.wal_free_bytes),
        ]
    }
}

/// All of them.
#[derive(Debug, Default)]
pub struct Metrics {
    pub rows_received: Counter,
    pub rows_durable: Counter,
    pub rows_duplicate: Counter,
    pub rows_refused: Counter,
    pub rows_pushed_back: Counter,
    pub rows_committed: Counter,
    pub commits: Counter,
    pub commits_failed: Counter,
    pub wal_syncs: Counter,
    pub wal_bytes: Counter,
    /// Times that a stream which cannot commit was carried to the head of the WAL.
    pub wal_carried: Counter,
    pub hot_bytes: Counter,
    /// Of the newest commit, from the taking of its rows to its answer.
    pub commit_ms: Counter,
    pub commit_ms_total: Counter,
    pub checkpoints: Counter,
    pub log_objects_deleted: Counter,
    pub compactions: Counter,
    /// Merges whose files others replaced first.
    pub compactions_overtaken: Counter,
    pub compacted_files: Counter,
    pub compacted_bytes_in: Counter,
    pub compacted_bytes_out: Counter,
    /// Files that a merge would like to have, of all tables.
    pub small_files: Counter,
    /// Rows of files that retention took from their tables.
    pub rows_retired: Counter,
    pub files_vacuumed: Counter,
    pub bytes_vacuumed: Counter,
    pub maintenance_failed: Counter,
    pub classes: ByClass<ClassMetrics>,
    /// Requests that were answered with an error, by its kind; rows of those that could not be read count nowhere.
    requests_refused: Mutex<BTreeMap<&'static str, u64>>,
    guests: Guests,
}

/// What others in this process count, as text.
#[derive(Default)]
struct Guests(Mutex<Vec<Box<dyn Fn() -> String + Send + Sync>>>);

impl fmt::Debug for Guests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guests").field("count", &self.0.lock().len()).finish()
    }
}

impl Metrics {
    /// Tells what others count along with what the node does: names of their own, as Prometheus reads them.
    pub fn host(&self, text: impl Fn() -> String + Send + Sync + 'static) {
        self.guests.0.lock().push(Box::new(text));
    }

    /// Rows of a request came through a door.
    pub(crate) fn came_in(&self, class: Class, tally: &Tally) {
        self.rows_received.add(tally.received());
        self.rows_durable.add(tally.durable);
        self.rows_duplicate.add(tally.duplicate);
        self.rows_refused.add(tally.refused);
        self.rows_pushed_back.add(tally.pushed_back);
        self.wrote(class, tally);
    }

    /// Rows were written, by whomever.
    pub(crate) fn wrote(&self, class: Class, tally: &Tally) {
        let of = &self.classes[class];
        of.received.add(tally.received());
        of.durable.add(tally.durable);
        of.duplicate.add(tally.duplicate);
        of.refused.add(tally.refused);
        of.pushed_back.add(tally.pushed_back);
    }

    pub(crate) fn refuse(&self, kind: &'static str) {
        *self.requests_refused.lock().entry(kind).or_default() += 1;
    }

    /// All of them as Prometheus reads them, since this process began.
    pub fn text(&self) -> String {
        let rows = [
            ("weir_cloud_rows_received_total", "counter", &self.rows_received),
            ("weir_cloud_rows_durable_total", "counter", &self.rows_durable),
            ("weir_cloud_rows_duplicate_total", "counter", &self.rows_duplicate),
            ("weir_cloud_rows_refused_total", "counter", &self.rows_refused),
            ("weir_cloud_rows_pushed_back_total", "counter", &self.rows_pushed_back),
            ("weir_cloud_rows_committed_total", "counter", &self.rows_committed),
            ("weir_cloud_commits_total", "counter", &self.commits),
            ("weir_cloud_commits_failed_total", "counter", &self.commits_failed),
            ("weir_cloud_wal_syncs_total", "counter", &self.wal_syncs),
            ("weir_cloud_wal_bytes", "gauge", &self.wal_bytes),
            ("weir_cloud_wal_carried_total", "counter", &self.wal_carried),
            ("weir_cloud_hot_bytes", "gauge", &self.hot_bytes),
            ("weir_cloud_commit_last_milliseconds", "gauge", &self.commit_ms),
            ("weir_cloud_commit_milliseconds_total", "counter", &self.commit_ms_total),
            ("weir_cloud_checkpoints_total", "counter", &self.checkpoints),
            ("weir_cloud_log_objects_deleted_total", "counter", &self.log_objects_deleted),
            ("weir_cloud_compactions_total", "counter", &self.compactions),
            ("weir_cloud_compactions_overtaken_total", "counter", &self.compactions_overtaken),
            ("weir_cloud_compacted_files_total", "counter", &self.compacted_files),
            ("weir_cloud_compacted_bytes_in_total", "counter", &self.compacted_bytes_in),
            ("weir_cloud_compacted_bytes_out_total", "counter", &self.compacted_bytes_out),
            ("weir_cloud_small_files", "gauge", &self.small_files),
            ("weir_cloud_rows_retired_total", "counter", &self.rows_retired),
            ("weir_cloud_files_vacuumed_total", "counter", &self.files_vacuumed),
            ("weir_cloud_bytes_vacuumed_total", "counter", &self.bytes_vacuumed),
            ("weir_cloud_maintenance_failed_total", "counter", &self.maintenance_failed),
        ];
        let mut text = String::new();
        for (name, kind, counter) in rows {
            // Writing to a String cannot fail.
            writeln!(text, "# TYPE {name} {kind}\n{name} {}", counter.get()).ok();
        }
        for (index, (name, kind, _)) in self.classes[Class::Alerts].named().into_iter().enumerate() {
            writeln!(text, "# TYPE {name} {kind}").ok();
            for (class, of) in self.classes.iter() {
                writeln!(text, "{name}{{class=\"{}\"}} {}", class.name(), of.named()[index].2.get()).ok();
            }
        }
        text.push_str("# TYPE weir_cloud_requests_refused_total counter\n");
        for (kind, count) in self.requests_refused.lock().iter() {
            writeln!(text, "weir_cloud_requests_refused_total{{error=\"{kind}\"}} {count}").ok();
        }
        self.guests.0.lock().iter().for_each(|guest| text.push_str(&guest()));
        text
    }
}
