//! What this node counts, by name. Rule 6 at the door: rows received = durable + duplicate + refused + pushed back.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

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
    pub hot_bytes: Counter,
}

impl Metrics {
    /// All of them as Prometheus reads them.
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
            ("weir_cloud_hot_bytes", "gauge", &self.hot_bytes),
        ];
        let mut text = String::new();
        for (name, kind, counter) in rows {
            // Writing to a String cannot fail.
            writeln!(text, "# TYPE {name} {kind}\n{name} {}", counter.get()).ok();
        }
        text
    }
}
