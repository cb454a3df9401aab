//! When the pipeline's state is written, so that a start is quick and the journal can be freed.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::super::snapshot_file;
use super::{Engine, EngineError, Snapshot};

/// A snapshot is due when the journal has grown by so many times its size, and by this much.
const SNAPSHOT_FACTOR: u64 = 4;
const SNAPSHOT_BYTES_MIN: u64 = 4 << 20;
/// Or by this part of its cap: nothing else frees it.
const SNAPSHOT_JOURNAL_PARTS: u64 = 4;
/// A snapshot for which the disk had no room is tried again so often.
const SNAPSHOT_RETRY: Duration = Duration::from_secs(1);

impl Engine {
    pub(super) fn snapshot_is_due(&self) -> bool {
        let parts = &self.parts;
        let Snapshot { position: at, bytes, needed } = parts.snapshot;
        let position = parts.pipeline.position();
        let grown = position.0.saturating_sub(at.0);
        let idle = self.held.is_empty() && parts.pipeline.pending_rows() == 0;
        // Windows may hold so much that four times it never fits into the journal. And a full one brings nothing more.
        let often =
            (parts.journal_bytes_max / SNAPSHOT_JOURNAL_PARTS).min(SNAPSHOT_BYTES_MIN.max(SNAPSHOT_FACTOR * bytes));
        let at_its_end = || parts.journal.is_full() && parts.reader.position() >= *parts.journal.synced().borrow();
        let waits = self.no_snapshot.as_ref().is_some_and(|(_, until)| Instant::now() < *until);
        // Behind the entry that tells the next one it would belong to neither.
        idle && !waits && self.next.is_none() && (needed || grown >= often || (grown > 0 && at_its_end()))
    }

    /// Only when no row is pending: all lanes have all before the position, or nothing of it. A full disk leaves the old
    /// one, and the journal that goes with it.
    pub(super) fn snapshot(&mut self) -> Result<(), EngineError> {
        self.count_redelivered();
        let parts = &mut self.parts;
        let state = parts.pipeline.snapshot();
        let configuration = (parts.in_force.version, parts.in_force.text.as_str());
        match snapshot_file::write(&parts.data_dir, parts.journal_id, configuration, &state) {
            Ok(()) => {}
            Err(error) if error.is_full() => {
                let text = format!("the disk has no room for a snapshot of {} bytes", state.len());
                if self.no_snapshot.is_none() {
                    tracing::warn!(%error, "{text}: the journal is kept");
                }
                self.no_snapshot = Some((text, Instant::now() + SNAPSHOT_RETRY));
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        }
        if self.no_snapshot.take().is_some() {
            tracing::info!("the disk has room for a snapshot again");
        }
        parts.snapshot = Snapshot { position: parts.pipeline.position(), bytes: state.len() as u64, needed: false };
        parts.journal.free_before(parts.pipeline.position());
        Ok(())
    }

    pub(super) fn count_redelivered(&mut self) {
        let parts = &mut self.parts;
        for (name, source) in &parts.sources {
            parts.pipeline.set_redelivered(name, source.redelivered.load(Ordering::Relaxed));
        }
    }
}
