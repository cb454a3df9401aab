//! What the pipeline counted since the agent's directory was made: part of the snapshot, so exact over restarts.
//!
//! They balance (rule 6): for each source read = accepted + quarantined + duplicate + waiting + filtered,
//! and received = journalled + redelivered; for each stream rows = pending + what the spool has, freed, lost or voided.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use wire::StreamName;

/// All counters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    pub sources: BTreeMap<String, SourceTotals>,
    pub streams: BTreeMap<StreamName, StreamTotals>,
    /// Readings in quarantine, by reason.
    pub reasons: BTreeMap<String, u64>,
    /// Journal bytes that could not be read back.
    pub journal_bytes_damaged: u64,
}

/// Messages and readings of one source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceTotals {
    /// Messages in the journal.
    pub journalled: u64,
    /// Messages that were in the journal already when the broker sent them again.
    pub redelivered: u64,
    /// Messages that came while the journal was full, from a source that cannot wait.
    pub missed: u64,
    /// Readings in journalled messages; a message that does not decode is one.
    pub read: u64,
    pub accepted: u64,
    pub quarantined: u64,
    pub duplicate: u64,
    pub waiting: u64,
    /// Readings that the source's `when` or its format passes over.
    #[serde(default)]
    pub filtered: u64,
}

/// Rows of one stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamTotals {
    pub rows: u64,
    /// Of them, too late for their windows.
    pub late: u64,
    /// Of them, with something that a check found.
    #[serde(default)]
    pub flagged: u64,
    /// Of them, made up for gaps.
    #[serde(default)]
    pub imputed: u64,
}

impl Counters {
    pub(super) fn source(&mut self, source: &str) -> &mut SourceTotals {
        entry(&mut self.sources, source, str::to_owned)
    }

    pub(super) fn stream(&mut self, stream: &StreamName) -> &mut StreamTotals {
        if !self.streams.contains_key(stream) {
            self.streams.insert(stream.clone(), StreamTotals::default());
        }
        self.streams.get_mut(stream).expect("it was put there")
    }

    pub(super) fn reason(&mut self, reason: &str) {
        *entry(&mut self.reasons, reason, str::to_owned) += 1;
    }
}

/// `entry` without making an owned key when it is there.
fn entry<'a, V: Default>(map: &'a mut BTreeMap<String, V>, key: &str, own: fn(&str) -> String) -> &'a mut V {
    if !map.contains_key(key) {
        map.insert(own(key), V::default());
    }
    map.get_mut(key).expect("it was put there")
}
